"""Local intrinsic dimension of activations: how many directions the data vary in around each of them.

With T_j the distance to the j-th neighbour of k, the likelihood of a density that is uniform nearby gives

    1 / m = 1 / (k - 1) sum_{j < k} log(T_k / T_j)

(Levina & Bickel 2004). Estimates are combined as MacKay & Ghahramani (2005) corrected it, by the mean of
1 / m and not of m, which is biased for few neighbours: over all samples for the dimension of the data, over
a sample and its neighbours for the local one.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_BYTES = 64 * 2**20  # of distances, and of neighbours, that are held at once


@torch.no_grad()
def local_dimension(x: Tensor, neighbours: int = 20) -> Tensor:
    """The dimension (N,) around every sample of x (N, d), float64, at the scale of its neighbours.

    Copies of a sample count once. Time is O(N^2 d), memory O(N (d + neighbours)).

    Raises ValueError for neighbours < 2, and where no more than `neighbours` samples are distinct.
    """
    distinct, where = x.unique(dim=0, return_inverse=True)
    inverse, nearest = inverse_dimension(distinct, neighbours)
    around = (inverse + inverse[nearest].sum(1)) / (neighbours + 1)
    return (1 / around.clamp(min=torch.finfo(around.dtype).tiny))[where]


@torch.no_grad()
def intrinsic_dimension(x: Tensor, neighbours: int = 20) -> float:
    """The dimension of all samples x (N, d) together; arguments and errors as in `local_dimension`."""
    return float(1 / inverse_dimension(x.unique(dim=0), neighbours)[0].mean())


def inverse_dimension(x: Tensor, neighbours: int) -> tuple[Tensor, Tensor]:
    """1 / m (N,), float64, of distinct samples x (N, d), and the neighbours (N, neighbours) of each."""
    if neighbours < 2:
        raise ValueError(f"neighbours={neighbours} must be at least 2")
    if len(x) <= neighbours:
        raise ValueError(f"{len(x)} distinct samples are too few for neighbours={neighbours}")
    x = x - x.mean(0)  # the expansion of |x - y|^2 is exact only where |x| is not much larger
    squares = x.pow(2).sum(1)
    room = CHUNK_BYTES // x.element_size()
    rows = max(1, min(room // len(x), room // (neighbours * x.shape[1])))
    inverse, nearest = [], []
    for first in range(0, len(x), rows):
        part = x[first : first + rows]
        distance = torch.addmm(squares, part, x.T, alpha=-2)  # without |part|^2, which orders nothing
        itself = torch.arange(first, first + len(part), device=x.device).unsqueeze(1)
        distance.scatter_(1, itself, torch.inf)
        found = distance.topk(neighbours, largest=False).indices
        exact = (x[found] - part.unsqueeze(1)).norm(dim=2).double()
        exact, order = exact.sort(dim=1)
        logs = exact.clamp(min=torch.finfo(x.dtype).tiny).log()
        inverse.append((logs[:, -1:] - logs[:, :-1]).mean(1))
        nearest.append(found.gather(1, order))
    return torch.cat(inverse), torch.cat(nearest)
