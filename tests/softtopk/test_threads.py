"""The C++ backend among threads and processes: forks, callers at once, sanitizers.

What forks runs in a process of its own, where a child that hangs is ended by its alarm.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import softtopk

ROOT = Path(__file__).resolve().parents[2]
if (reason := softtopk.available_backends()["cpu"]) is not None:
    pytest.skip(f"cpu: {reason}", allow_module_level=True)
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
needs_proc = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's /proc")

# What the scripts share. In a child nothing may be compared by torch: its own loops would hang.
COMMON = """
import os, signal, sys, threading
import torch

def batch(rows=48, n=4096):
    g = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, rows, n, generator=g)
    return x, torch.rand(rows, generator=g) * n, 10 ** (-4 * torch.rand(rows, generator=g)), v

def everything(x, k, alpha, v):
    from softtopk.backends import cpu
    p, solution = cpu.soft_topk_forward(x, k, alpha)
    tensors = [p, solution, *cpu.soft_topk_backward(x, solution, alpha, v)]
    tensors += [cpu.hard_topk_mask(x, k), *cpu.hard_topk_indices(x, k, 40)]
    return [tensor.numpy().tobytes() for tensor in tensors]

def serial():
    torch.set_num_threads(1)
    want = everything(*inputs)
    torch.set_num_threads(4)
    return want

def tasks():
    return len(os.listdir("/proc/self/task"))

def succeeds_in_child(f):
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        try:
            os._exit(0 if f() else 1)
        finally:
            os._exit(2)
    return os.waitpid(child, 0)[1] == 0

inputs = batch()
"""


def run(script: str, path: Path):
    path = path / "script.py"
    path.write_text(COMMON + script)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, path], env=environment, check=True, timeout=60)


@needs_fork
@pytest.mark.parametrize("shape", ["48, 4096", "1, 300000"])
def test_fork_after_use(shape, tmp_path):
    """The child and its own child give the same bits, and so does the parent afterwards."""
    script = (
        f"inputs = batch({shape})"
        + """
want = serial()
assert everything(*inputs) == want
same = lambda: everything(*inputs) == want
assert succeeds_in_child(same)
assert succeeds_in_child(lambda: same() and succeeds_in_child(same))
assert same()
"""
    )
    run(script, tmp_path)


@needs_fork
@needs_proc
def test_fork_before_the_module_is_loaded(tmp_path):
    """torch has used OpenMP before the fork, and the child is the first to load softtopk._C."""
    script = """
torch.set_num_threads(4)
torch.ones(1000, 1000).exp()
def first():
    assert "softtopk._C" not in sys.modules
    parallel = everything(*inputs)
    return parallel == serial()
assert succeeds_in_child(first)
"""
    run(script, tmp_path)


@needs_fork
@needs_proc
def test_child_runs_in_parallel(tmp_path):
    script = """
inputs = batch(256, 8192)
want = serial()
def peak():
    most, done = 0, threading.Event()
    def call():
        for _ in range(5): assert everything(*inputs) == want
        done.set()
    caller = threading.Thread(target=call)
    caller.start()
    while not done.is_set() and caller.is_alive(): most = max(most, tasks())
    caller.join()
    return done.is_set() and most > 2
assert succeeds_in_child(peak)
"""
    run(script, tmp_path)


@needs_fork
@needs_proc
def test_child_that_gets_no_threads(tmp_path):
    """The address space left is too small for the stacks of 200 threads."""
    script = """
import resource
want = serial()
everything(*inputs)
def limited():
    torch.set_num_threads(200)
    inputs = batch(1600, 4096)
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + (1 << 28)
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    from softtopk.backends import cpu
    p, _ = cpu.soft_topk_forward(*inputs[:3])
    torch.set_num_threads(1)
    return p.numpy().tobytes() == cpu.soft_topk_forward(*inputs[:3])[0].numpy().tobytes()
assert succeeds_in_child(limited)
"""
    run(script, tmp_path)


@pytest.mark.parametrize("method", [pytest.param("fork", marks=needs_fork), "spawn"])
def test_multiprocessing(method, tmp_path):
    script = f"""
import multiprocessing

def send(queue):
    torch.set_num_threads(4)
    queue.put(everything(*inputs))

if __name__ == "__main__":
    want = serial()
    assert everything(*inputs) == want
    context = multiprocessing.get_context("{method}")
    queue = context.Queue()
    child = context.Process(target=send, args=(queue,), daemon=True)
    child.start()
    assert queue.get(timeout=20) == want
    child.join()
"""
    run(script, tmp_path)


@needs_fork
@pytest.mark.parametrize("threads", [1, 4])
def test_data_loader_worker(threads, tmp_path):
    """A worker has one thread unless it asks for more."""
    script = f"""
class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 3
    def __getitem__(self, i):
        if {threads} > 1: torch.set_num_threads({threads})
        return everything(*inputs)

want = serial()
assert everything(*inputs) == want
loader = torch.utils.data.DataLoader(
    Data(), batch_size=None, num_workers=1, timeout=10, multiprocessing_context="fork"
)
assert list(loader) == [want] * 3
"""
    run(script, tmp_path)


@needs_proc
def test_one_thread_starts_none(tmp_path):
    script = """
torch.set_num_threads(1)
everything(*batch(2, 2))
before = tasks()
want = everything(*inputs)
assert tasks() == before
torch.set_num_threads(4)
assert everything(*inputs) == want and tasks() > before
"""
    run(script, tmp_path)


@needs_proc
def test_call_inside_a_parallel_region(tmp_path):
    """As from a loop of torch's own: a nested team is one thread, and every caller gets its rows."""
    script = """
import ctypes
want = serial()
maps = {line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}
if not maps:
    sys.exit()  # another OpenMP
got = []
region = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: got.append(everything(*inputs)))
for path in maps:
    ctypes.CDLL(path).GOMP_parallel(region, None, 3, 0)
assert got == [want] * 3 * len(maps)
"""
    run(script, tmp_path)


def results(x: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
    """Forward, backward and hard top-k of the public functions."""
    x, k, alpha = (t.detach().clone().requires_grad_() for t in (x, k, torch.tensor(0.05)))
    p = softtopk.soft_topk(x, k, alpha, backend="cpu")
    hard = softtopk.hard_topk(x, k, backend="cpu")
    return [p.detach(), *torch.autograd.grad(p, (x, k, alpha), v), hard.detach()]


def test_many_python_threads_at_once():
    """On inputs of their own and shared ones, while another thread changes torch's number of threads."""
    g = torch.Generator().manual_seed(0)
    inputs = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for rows, n in ((24, 3000), (3, 20000), (5, 100), (1, 80000)):
            x, v = torch.randn(2, rows, n, generator=g).to(dtype)
            inputs.append((x, torch.rand(rows, generator=g) * n, v))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    wanted = [results(*arguments) for arguments in inputs]
    failures, finished = [], []
    done, start = threading.Event(), threading.Barrier(9)

    def call(caller: int):
        start.wait()
        for turn in range(12):
            i = (turn + caller // 2 * (caller % 2)) % len(inputs)  # even callers go together
            same = [torch.equal(a, b) for a, b in zip(results(*inputs[i]), wanted[i], strict=True)]
            if not all(same):
                failures.append((caller, turn, same))
        finished.append(caller)

    def change():
        start.wait()
        while not done.wait(0.001):
            torch.set_num_threads(torch.get_num_threads() % 5 + 1)

    callers = [threading.Thread(target=call, args=(caller,)) for caller in range(8)]
    changer = threading.Thread(target=change)
    for thread in (*callers, changer):
        thread.start()
    for thread in callers:
        thread.join()
    done.set()
    changer.join()
    torch.set_num_threads(before)
    assert len(finished) == 8 and not failures


@pytest.mark.parametrize(
    "sanitizers,arguments",
    [("thread", ["two types"]), ("address,undefined,float-cast-overflow", [])],
    ids=["thread", "address"],
)
def test_sanitizers(sanitizers, arguments, tmp_path):
    """The launchers on several threads of several callers, in a program built with GCC's or Clang's."""
    cxx = os.environ.get("CXX", "c++").split()
    flags = ["-std=c++17", "-O1", "-g1", "-pthread", "-Wno-psabi", f"-fsanitize={sanitizers}"]
    flags += ["-fno-sanitize-recover=all", "-DSOFTTOPK_ISA=baseline", "-DSOFTTOPK_BYTES=16"]
    probe, program = tmp_path / "probe.cpp", tmp_path / "program"
    probe.write_text("int main() {}")
    if not shutil.which(cxx[0]) or subprocess.run([*cxx, *flags, probe, "-o", program]).returncode:
        pytest.skip(f"{' '.join(cxx)} does not build with -fsanitize={sanitizers}")
    sources = [ROOT / "tests/softtopk/thread_sanitizer.cpp", *(ROOT / "csrc/cpu").glob("*.cpp")]
    subprocess.run([*cxx, *flags, f"-I{ROOT}/csrc", *sources, "-o", program], check=True)
    # A randomised address space of more bits than the sanitizer knows stops it before main.
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []
    command = next((c for c in (fixed, []) if subprocess.run([*c, "true"]).returncode == 0), [])
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}  # its search for leaks needs ptrace
    command += [program, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
