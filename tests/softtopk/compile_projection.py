"""Compile the Triton kernels of relu_projection for sm_80 and sm_90 GPUs that need not be there.

The process must not have TRITON_INTERPRET=1, under which the kernels are not compilable functions.
"""

from __future__ import annotations

import types

import torch

torch.cuda.is_available = lambda: True  # the backend refuses to load where nothing can run

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from softtopk.backends.triton import projection  # noqa: E402

MEMORY = {80: 99 << 10, 90: 227 << 10}  # shared memory of a block, of the 80s that of sm_86
# Architecture, element, whether all is a multiple of 16 and of a step, arguments that are 1.
CASES = [(90, "bf16", True, ()), (80, "fp16", True, ()), (90, "fp16", False, ("rows", "n", "d"))]
PIPELINED = ("forward_kernel", "backward_kernel")


def compile_kernel(kernel, arch, element, whole, ones):
    properties = types.SimpleNamespace(shared_memory_per_block_optin=MEMORY[arch])
    torch.cuda.get_device_properties = lambda device: properties
    projection.tiles.cache_clear()
    tile = dict(projection.tiles(torch.device("cuda")))
    options = {name: tile.pop(name) for name in ("num_warps", "num_stages")}
    constants = tile | dict(GROUP=projection.GROUP, STEPS=12, WHOLE=whole)
    constants |= dict(zip(("ROWS", "COLUMNS"), projection.EXPAND, strict=True)) | dict.fromkeys(ones, 1)
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    if kernel is projection.expand_kernel:
        options = {}
    pointers = dict.fromkeys(("w2", "parts", "g", "sums", "grad_weight", "dots", "squares"), "*fp32") | {
        "mask": "*u8"
    }
    pointers |= dict.fromkeys(("x", "weight", "bias", "expanded"), f"*{element}")
    signature = {a: "constexpr" if a in constants else pointers.get(a, "i32") for a in kernel.arg_names}
    free = [i for i, a in enumerate(kernel.arg_names) if a not in constants]
    attributes = {(i,): [["tt.divisibility", 16]] for i in free} if whole else {}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


if __name__ == "__main__":
    for name in (*PIPELINED, "expand_kernel"):
        for arch, *case in CASES:
            binary = compile_kernel(getattr(projection, name), arch, *case)
            assert binary.metadata.shared <= MEMORY[arch], (name, arch, binary.metadata.shared)
            if case[1] and name in PIPELINED:
                assert "cp.async" in binary.asm["ptx"], f"{name} waits for every tile that it loads"
            print(name, arch, *case, len(binary.asm["cubin"]), "bytes", flush=True)
