"""Builds softtopk._C with ninja: the C++ compiler for csrc, nvcc for csrc/cuda where there is one.

The native module knows nothing of torch, so one build serves every torch. Environment variables:
    CXX, CXXFLAGS, LDFLAGS   the C++ compiler (GCC or Clang) and additions to its flags
    SOFTTOPK_CUDA            unset: CUDA if nvcc is found; 1: fail where it cannot be built; 0: off
    CUDA_HOME                where bin/nvcc is looked for before the PATH
    TORCH_CUDA_ARCH_LIST     as for torch, "8.0;9.0+PTX"; otherwise those of the GPUs that this
                             machine has or, where it has none, ARCHITECTURES below
Everything lies in build/softtopk, so that a second build compiles only what has changed.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import ninja
import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD = Path("build/softtopk")  # relative to ROOT, like every path in build.ninja
# Machine code for 8.0 runs on 8.6 and 8.9 too, that for 12.0 on 12.1; PTX of the last serves what comes.
ARCHITECTURES = ["80", "90", "100", "120"]
# csrc/cpu/sweeps.cpp is compiled once per instruction set; csrc/cpu/dispatch.cpp chooses at run time.
SWEEPS = {"baseline": "-DSOFTTOPK_BYTES=16"}
if platform.machine() in ("x86_64", "AMD64"):
    SWEEPS["avx2"] = "-DSOFTTOPK_BYTES=32 -mavx2 -mfma"
    SWEEPS["avx512"] = "-DSOFTTOPK_BYTES=64 -mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl"


def find_nvcc():
    """The path of nvcc and None, or None and the reason why CUDA is not built."""
    asked = os.environ.get("SOFTTOPK_CUDA", "")
    if asked not in ("", "0", "1"):
        sys.exit(f"SOFTTOPK_CUDA={asked!r} must be 0, 1 or unset")
    if asked == "0":
        return None, "SOFTTOPK_CUDA=0"
    home = os.environ.get("CUDA_HOME")
    nvcc = (home and shutil.which("nvcc", path=f"{home}/bin")) or shutil.which("nvcc")
    if not any(ROOT.glob("csrc/cuda/*.cu")):
        nvcc, reason = None, "the source tree has no csrc/cuda/*.cu"
    else:
        reason = None if nvcc else "nvcc is neither in CUDA_HOME/bin nor on the PATH"
    if asked == "1" and reason:
        sys.exit(f"SOFTTOPK_CUDA=1, but {reason}")
    return nvcc, reason


def architectures(nvcc):
    """What to compile for, as ["80", "90", "120+PTX"]."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if asked:
        return [entry.replace(".", "") for entry in asked]
    known = subprocess.run(
        [nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True
    ).stdout.split()
    present = visible_architectures()
    if present and all(f"sm_{number}" in known for number in present):
        return present
    found = [number for number in ARCHITECTURES if f"sm_{number}" in known]
    if not found:
        sys.exit(f"{nvcc} compiles for none of the architectures {', '.join(ARCHITECTURES)}")
    return [*found[:-1], f"{found[-1]}+PTX"]


def visible_architectures():
    """The architectures of this machine's GPUs, ["90"], none without a driver."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    if shutil.which(query[0]) is None:
        return []
    answer = subprocess.run(query, capture_output=True, text=True)
    if answer.returncode:
        return []
    return sorted({line.strip().replace(".", "") for line in answer.stdout.splitlines() if line.strip()})


def gencode(architecture):
    number = architecture.removesuffix("+PTX")
    code = f"sm_{number},compute_{number}" if architecture.endswith("+PTX") else f"sm_{number}"
    return f"-gencode=arch=compute_{number},code=[{code}]"


def compiler():
    cxx = os.environ.get("CXX", "c++")
    if not cxx.strip() or shutil.which(shlex.split(cxx)[0]) is None:
        sys.exit(f"softtopk needs a C++17 compiler; CXX={cxx!r} was not found")
    return cxx


def ninja_file(module, nvcc, targets):
    """The text of build.ninja, which makes `module`."""
    cxx = compiler()
    openmp = "" if sys.platform == "darwin" else "-fopenmp"
    shared = "-shared -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"
    flags = f"-std=c++17 -O3 -fPIC -fvisibility=hidden {openmp} -Wall -Wextra -Wno-psabi"
    cuda_flags = f"-std=c++17 -O3 -Xcompiler=-fPIC,-fvisibility=hidden {' '.join(map(gencode, targets))}"
    cuda_flags += " --threads 0"  # the architectures of a file at once
    linker = f"{nvcc} -Xcompiler=-fopenmp" if nvcc else f"{cxx} {openmp}"
    lines = [
        f"builddir = {BUILD}",
        "rule cxx",
        f"  command = {cxx} {flags} $extra {os.environ.get('CXXFLAGS', '')} -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule nvcc",
        f"  command = {nvcc} {cuda_flags} -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {linker} {shared} $in -o $out {os.environ.get('LDFLAGS', '')}",
    ]
    objects = []

    def compile_with(rule, source, extra="", suffix=""):
        objects.append(f"{BUILD}/{source.stem}{suffix}{source.suffix}.o")
        lines.extend([f"build {objects[-1]}: {rule} {source.relative_to(ROOT)}", f"  extra = {extra}"])

    includes = [sysconfig.get_paths()["include"], pybind11.get_include()]
    python = " ".join(f"-isystem {shlex.quote(path)}" for path in includes)
    for source in sorted(ROOT.glob("csrc/*.cpp")):
        compile_with("cxx", source, f"{python} -include {BUILD}/config.h")
    for source in sorted(ROOT.glob("csrc/cpu/*.cpp")):
        if source.name != "sweeps.cpp":
            compile_with("cxx", source, "-DSOFTTOPK_X86" if len(SWEEPS) > 1 else "")
            continue
        for isa, extra in SWEEPS.items():
            compile_with("cxx", source, f"-DSOFTTOPK_ISA={isa} {extra}", f"_{isa}")
    for source in sorted(ROOT.glob("csrc/cuda/*.cu")) if nvcc else []:
        compile_with("nvcc", source)
    return "\n".join([*lines, f"build {module}: link {' '.join(objects)}", ""])


def write_if_changed(path, text):
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


class NinjaBuild(build_ext):
    def build_extension(self, extension):
        nvcc, reason = find_nvcc()
        targets = architectures(nvcc) if nvcc else []
        config = ["#define SOFTTOPK_WITH_CUDA", f'#define SOFTTOPK_CUDA_ARCHITECTURES "{";".join(targets)}"']
        if reason:
            config = [f'#define SOFTTOPK_CUDA_REASON "{reason}"']
        output = Path(self.get_ext_fullpath(extension.name)).resolve()
        module = BUILD / output.name
        (ROOT / BUILD).mkdir(parents=True, exist_ok=True)
        write_if_changed(ROOT / BUILD / "config.h", "\n".join([*config, ""]))
        write_if_changed(ROOT / BUILD / "build.ninja", ninja_file(module, nvcc, targets))
        command = [os.path.join(ninja.BIN_DIR, "ninja"), "-f", f"{BUILD}/build.ninja", str(module)]
        if subprocess.run(command, cwd=ROOT).returncode:
            sys.exit("softtopk: the native module could not be compiled; the compiler's words are above")
        # Also into the source tree, which is what Python imports when it is run from there.
        for folder in {output.parent, ROOT / "softtopk"}:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / module, folder)
        cuda = f"for CUDA architectures {' '.join(targets)} ({nvcc})" if nvcc else f"WITHOUT CUDA: {reason}"
        print(f"softtopk: built {output.name} for the CPU ({', '.join(SWEEPS)}), {cuda}", file=sys.stderr)


setup(
    ext_modules=[Extension("softtopk._C", sources=[])],
    cmdclass={"build_ext": NinjaBuild},
)
