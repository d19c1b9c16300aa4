"""Compile every Triton kernel for sm_80 and sm_90 GPUs that need not be there.

The process must not have TRITON_INTERPRET=1, under which the kernels are not compilable functions.
"""

from __future__ import annotations

import torch

torch.cuda.is_available = lambda: True  # the backend refuses to load where nothing can run

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from softtopk.backends.reference import compute_dtype  # noqa: E402
from softtopk.backends.triton import hard_topk, launch, log_domain, soft_topk  # noqa: E402

KERNELS = {
    "forward": soft_topk.forward_kernel,
    "backward": soft_topk.backward_kernel,
    "log": log_domain.log_kernel,
    "log_backward": log_domain.log_backward_kernel,
    "hard_topk": hard_topk.mask_kernel,
    "hard_topk indices": hard_topk.indices_kernel,
}
POINTERS = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64",
}  # fmt: skip
# Architecture, x's dtype, n, largest, k and alpha as tensors, form: every branch of the kernels.
CASES = [
    (90, torch.float32, 300, True, False, "p"),
    (80, torch.float32, 300_000, False, True, "log"),
    (80, torch.bfloat16, 300, False, True, "none"),
    (90, torch.float16, 300_000, True, False, "log_complement"),
    (90, torch.float64, 300, True, True, "log"),
    (80, torch.float64, 300_000, False, False, "p"),
    (90, torch.float32, 32768, True, True, "p"),
    (90, torch.float32, 1, True, False, "p"),
]


def compile_kernel(name, kernel, arch, dtype, n, largest, tensors, form):
    compute = compute_dtype(dtype)
    name = name.split()[0]
    tile = dict(launch.tile(name, launch.default(name, dtype.itemsize, n), dtype.itemsize, n))
    options = {option: tile.pop(option) for option in ("num_warps", "maxnreg")}
    types = dict.fromkeys(("x", "v", "out", "mask", "grad_x"), POINTERS[dtype])
    types |= dict.fromkeys(("solution", "grad_k", "grad_alpha"), POINTERS[compute])
    types |= {"indices": "*i64", "counts": "*i64", "k": "*fp64", "alpha": "*fp32"}
    types |= {"k_bits": "i64", "alpha_bits": "i64"}
    constants = {
        "LARGEST": largest, "T": tl.float64 if dtype == torch.float64 else tl.float32,
        "WRITE": form == "p", "COMPLEMENT": form == "log_complement", **tile,
    }  # fmt: skip
    if not tensors:
        constants |= {"k": None, "alpha": None}
    if n == 1:  # a launch makes an argument that equals 1 a constant
        ones = ("n", "x_stride", "v_stride", "max_k")
        constants |= {p.name: 1 for p in kernel.params if p.name in ones and not p.do_not_specialize}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {a: "constexpr" if a in constants else types.get(a, "i32") for a in kernel.arg_names}
    source = ASTSource(kernel, signature, constants)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


if __name__ == "__main__":
    for name, kernel in KERNELS.items():
        for case in CASES:
            binary = compile_kernel(name, kernel, *case)
            # A global that is not equal to itself, a NaN, would fail every launch but the first.
            names = [name for (name, _), (value, _) in kernel.used_global_vals.items() if value != value]
            assert not names, f"{kernel.fn.__name__} uses globals that compare unequal: {names}"
            print(kernel.fn.__name__, *case, len(binary.asm["cubin"]), "bytes", flush=True)
