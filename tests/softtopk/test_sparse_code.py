"""The class SparseCode: its forms, statistics and order by latent."""

from __future__ import annotations

import pytest
import torch

from softtopk import SparseCode, soft_topk_code
from tests.cases import make
from tests.sparse_oracle import assert_well_formed


def test_dense_and_back(backend, device):
    pre = make("relu", 5, 60, seed=2).to(device)
    code = soft_topk_code(pre, 7, 0.05, backend=backend)
    whole = code.to_dense()
    back = SparseCode.from_dense(whole, backend=backend)
    assert_well_formed(back)
    assert torch.equal(back.to_dense(), whole)
    assert back.max_active == back.counts.max() == (whole != 0).sum(1).max()
    roomy = SparseCode.from_dense(whole, max_active=80, backend=backend)
    assert roomy.max_active == 80 and torch.equal(roomy.to_dense(), whole)
    cut = SparseCode.from_dense(whole, max_active=3, backend=backend)
    assert cut.overflow and torch.equal(cut.counts, back.counts)
    assert torch.equal(cut.indices, back.indices[:, :3])
    none = SparseCode.from_dense(torch.zeros(2, 9, device=device), backend=backend)
    assert none.counts.tolist() == [0, 0] and (none.to_dense() == 0).all()


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch: sparse CSR is in beta
def test_csr(backend, device):
    pre = make("relu", 5, 60, seed=2).to(device)
    code = soft_topk_code(pre, 7, 0.05, backend=backend)
    csr = code.to_csr()
    assert csr.layout == torch.sparse_csr and csr.shape == (5, 60)
    assert csr.values().numel() == code.counts.sum()
    assert torch.equal(csr.to_dense(), code.to_dense())
    weight = torch.randn(60, 4, device=device)
    torch.testing.assert_close(csr @ weight, code.to_dense() @ weight)


def test_statistics(backend, device):
    x = torch.zeros(4, 6, device=device)
    x[0, [1, 3]] = torch.tensor([1.0, 2.0], device=device)
    x[1, 3] = -1
    x[3, 5] = 4
    code = SparseCode.from_dense(x, backend=backend)
    assert code.l0() == 1 and code.l0().device.type == device
    assert code.fired().tolist() == [False, True, False, True, False, True]
    masked = code.with_values(torch.where(code.values < 0, 0, code.values))
    assert masked.l0() == 0.75 and torch.equal(masked.to_dense(), x.clamp(min=0))
    with pytest.raises(ValueError, match=r"values has shape \(4, 3\); \(4, 2\) is needed"):
        code.with_values(torch.zeros(4, 3, device=device))


def test_transposed_is_made_once_and_shared(backend, device):
    code = soft_topk_code(make("relu", 6, 50, seed=1).to(device), 8, 0.05, backend=backend)
    offsets, entries = code.transposed()
    assert code.transposed().offsets is offsets and code.detach().transposed().entries is entries
    assert not code.detach().values.requires_grad
    C = code.max_active
    by_latent = [[] for _ in range(50)]
    for row in range(6):
        for j in range(code.counts[row]):
            by_latent[code.indices[row, j]].append(row * C + j)
    assert offsets.dtype == entries.dtype == torch.int32 and offsets.shape == (51,)
    for latent, want in enumerate(by_latent):
        assert entries[offsets[latent] : offsets[latent + 1]].tolist() == want


def test_repr():
    code = soft_topk_code(torch.rand(2, 3, 40), 4, backend="reference")
    text = "SparseCode(shape=(2, 3, 40), max_active=64, dtype=torch.float32, device='cpu')"
    assert repr(code) == text
