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
from softtopk.backends.triton import (  # noqa: E402
    hard_topk,
    launch,
    log_domain,
    soft_topk,
    sparse_backward,
    sparse_decode,
    sparse_gradients,
    sparse_select,
)

KERNELS = {
    "forward": soft_topk.forward_kernel,
    "backward": soft_topk.backward_kernel,
    "log": log_domain.log_kernel,
    "log_backward": log_domain.log_backward_kernel,
    "hard_topk": hard_topk.mask_kernel,
    "hard_topk indices": hard_topk.indices_kernel,
    "code": sparse_select.code_kernel,
    "code_backward": sparse_backward.code_backward_kernel,
    "decode": sparse_decode.decode_kernel,
    "chunk": sparse_gradients.chunk_kernel,
    "latent": sparse_gradients.latent_kernel,
    "project": sparse_gradients.project_kernel,
}
SWEEPS = ("forward", "backward", "log", "log_backward", "hard_topk", "code")  # tiled by launch.tile
POINTERS = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64",
}  # fmt: skip
COMPUTED = (
    "values", "active", "state", "g", "grad_active", "scale", "dots", "partial", "partial_sums", "raw",
    "grad", "sums", "squares",
)  # fmt: skip
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
    types = dict.fromkeys(("x", "v", "out", "mask", "grad_x", "bias", "y", "weight"), POINTERS[dtype])
    types |= dict.fromkeys(("solution", "grad_k", "grad_alpha", *COMPUTED), POINTERS[compute])
    types |= dict.fromkeys(("offsets", "entries", "latents"), "*i32") | {"ends": "*i64"}
    types |= dict.fromkeys(("indices", "counts"), "*i64" if name == "hard_topk" else "*i32")
    types |= {"k": "*fp64", "alpha": "*fp32", "thresholds": "*fp32"}
    types |= dict.fromkeys(("k_bits", "alpha_bits", "threshold_bits", "selection_bits"), "i64")
    if name in SWEEPS:
        tile = dict(launch.tile(name, launch.default(name, dtype.itemsize, n), dtype.itemsize, n))
        options = {option: tile.pop(option) for option in ("num_warps", "maxnreg")}
    else:
        columns, warps = launch.columns(n, dtype.itemsize)
        tile, options = dict(TILE=columns, BLOCK=128, AHEAD=4, CHUNK=256), dict(num_warps=warps)
    constants = {
        "LARGEST": largest, "T": tl.float64 if dtype == torch.float64 else tl.float32,
        "WRITE": form == "p", "COMPLEMENT": form == "log_complement", "ZERO_SILENT": largest,
        "MODE": {"p": 0, "log": 1}.get(form, 2), **tile,
    }  # fmt: skip
    if not tensors:
        constants |= dict.fromkeys(("k", "alpha", "bias", "thresholds", "weight", "sums"))
    if form in ("none", "log_complement"):
        constants |= {"state": None, "squares": None}
    if name in ("decode", "project"):
        constants.pop("weight", None)
    if name == "code_backward":
        constants.pop("state", None)
    if n == 1:  # a launch makes an argument that equals 1 a constant
        ones = ("n", "x_stride", "v_stride", "max_k", "d")
        constants |= {p.name: 1 for p in kernel.params if p.name in ones and not p.do_not_specialize}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {a: "constexpr" if a in constants else types.get(a, "i32") for a in kernel.arg_names}
    source = ASTSource(kernel, signature, constants)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


if __name__ == "__main__":
    for name, kernel in KERNELS.items():
        for case in CASES if name.split()[0] in SWEEPS else (*CASES[::2], CASES[-1]):
            binary = compile_kernel(name, kernel, *case)
            # A global that is not equal to itself, a NaN, would fail every launch but the first.
            names = [name for (name, _), (value, _) in kernel.used_global_vals.items() if value != value]
            assert not names, f"{kernel.fn.__name__} uses globals that compare unequal: {names}"
            print(kernel.fn.__name__, *case, len(binary.asm["cubin"]), "bytes", flush=True)
