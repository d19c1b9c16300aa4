"""Times of the Triton backend's sparse functions, in milliseconds: `python -m benchmarks.triton_sparse`.

bfloat16 pre-activations and weights, k = 64, alpha = 1e-4; latents alike, and some that are in every row.
With SOFTTOPK_AUTOTUNE=1 the tile sizes of the selection are measured first.
"""

from __future__ import annotations

import torch
from triton.testing import do_bench

from softtopk.backends.triton import sparse

SHAPES = [(4096, 16384, 768), (4096, 24576, 768), (4096, 65536, 2304), (8192, 131072, 512)]  # rows, n, d
PLACES = 128
BANDWIDTH = 4.8e12  # of an H200, bytes a second


def milliseconds(run) -> float:
    return do_bench(run, warmup=10, rep=50, return_mode="median")


def measure(rows: int, n: int, d: int, skew: float) -> dict[str, float]:
    """Latent l is raised by skew * 2^(-l / 16): with a large skew the first few are in every row."""
    x = torch.randn(rows, n, device="cuda")
    x += skew * 2.0 ** (-torch.arange(n, device="cuda") / 16)
    x = x.bfloat16()
    weight = torch.randn(n, d, device="cuda", dtype=torch.bfloat16)
    y = torch.randn(rows, d, device="cuda", dtype=torch.bfloat16)

    def select(mode="soft"):
        return sparse.code_forward(x, 64.0, 1e-4, None, 0.0, mode, PLACES)

    values, indices, active, counts, state = select()
    g = torch.randn_like(values)
    transposed = sparse.transpose(indices, counts, n)
    dtype = weight.dtype
    times = {
        "soft": milliseconds(select),
        "straight_through": milliseconds(lambda: select("straight_through")),
        "hard": milliseconds(lambda: select("hard")),
        "code_backward": milliseconds(
            lambda: sparse.code_backward(active, None, counts, state, 1e-4, g, 1.0)
        ),
        "transpose": milliseconds(lambda: sparse.transpose(indices, counts, n)),
        "decode": milliseconds(lambda: sparse.decode(values, indices, counts, weight, None)),
        "decoder gradients": milliseconds(
            lambda: sparse.latent_gradients(values, indices, *transposed, y, weight, dtype, False, False)
        ),
        "encoder gradients": milliseconds(
            lambda: sparse.latent_gradients(values, indices, *transposed, y, None, torch.float32, True, True)
        ),
    }
    times["soft, of the read floor"] = x.nbytes / BANDWIDTH * 1e3 / times["soft"]
    return times


if __name__ == "__main__":
    for shape in SHAPES:
        for skew in (0.0, 20.0):
            for name, value in measure(*shape, skew).items():
                print(*shape, f"skew {skew}", name, f"{value:.4f}", flush=True)
