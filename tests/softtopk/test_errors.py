"""Every wrong call and its message, raised before any work."""

from __future__ import annotations

import pytest
import torch

from softtopk import BackendUnavailable, SoftTopK, available_backends, hard_topk, log_soft_topk, soft_topk

X = torch.randn(3, 8)

WRONG = [
    (lambda: soft_topk([1.0, 2.0], 1), TypeError, "x must be a torch.Tensor, not list"),
    (lambda: soft_topk(torch.arange(4), 1), TypeError, "x has dtype torch.int64"),
    (lambda: soft_topk(torch.randn(3).to_sparse(), 1), TypeError, "x has layout torch.sparse_coo"),
    (lambda: soft_topk(torch.tensor(1.0), 1), ValueError, r"x has shape \(\)"),
    (lambda: soft_topk(torch.empty(3, 0), 0), ValueError, r"x of shape \(3, 0\) has no element along dim=-1"),
    (lambda: soft_topk(X, 1, dim=2), IndexError, "dim=2 is out of range for x of shape"),
    (lambda: soft_topk(X, 1, dim=0.5), TypeError, "dim=0.5 must be an integer"),
    (lambda: soft_topk(X, -0.5), ValueError, "k=-0.5 must lie between 0 and 8"),
    (lambda: soft_topk(X, 8.5), ValueError, "k=8.5 must lie between 0 and 8"),
    (lambda: soft_topk(X, float("nan")), ValueError, "k=nan must lie between"),
    (lambda: soft_topk(X, "2"), TypeError, "k must be a number or a tensor, not str"),
    (lambda: soft_topk(X, True), TypeError, "k must be a number or a tensor, not bool"),
    (lambda: soft_topk(X, 1 + 0j), TypeError, "k must be a number or a tensor, not complex"),
    (lambda: soft_topk(X, 1, 0), ValueError, "alpha=0.0 must be > 0 and finite"),
    (lambda: soft_topk(X, 1, -1e-4), ValueError, "alpha=-0.0001 must be > 0"),
    (lambda: soft_topk(X, 1, float("inf")), ValueError, "alpha=inf must be > 0 and finite"),
    (lambda: soft_topk(X, 1, float("nan")), ValueError, "alpha=nan must be > 0"),
    (lambda: soft_topk(X, torch.ones(8)), ValueError, r"k of shape \(8,\) does not broadcast to \(3,\)"),
    (lambda: soft_topk(X, torch.ones(2, 3)), ValueError, r"k of shape \(2, 3\) does not broadcast to \(3,\)"),
    (lambda: soft_topk(X, torch.ones(3, 1)), ValueError, r"k of shape \(3, 1\) does not broadcast to \(3,\)"),
    (
        lambda: soft_topk(X, 1, torch.ones(2)),
        ValueError,
        r"alpha of shape \(2,\) does not broadcast to \(3,\)",
    ),
    (lambda: soft_topk(X, torch.ones(3, dtype=torch.bool)), TypeError, "k has dtype torch.bool"),
    (
        lambda: soft_topk(X, 1, torch.ones(3, dtype=torch.complex64)),
        TypeError,
        "alpha has dtype torch.complex64",
    ),
    (lambda: soft_topk(X, torch.ones(3, device="meta")), ValueError, "k is on meta, x on cpu"),
    (lambda: soft_topk(X, 1, backend="metal"), ValueError, "backend='metal' is unknown; choose one of cuda,"),
    (lambda: soft_topk(X, 1, backend=3), TypeError, "backend=3 must be a string or None"),
    (lambda: soft_topk(X, 1, largest="no"), TypeError, "largest='no' must be True or False"),
    (lambda: soft_topk(X, 1, hard=1), TypeError, "hard=1 must be True or False"),
    (
        lambda: soft_topk(X, 1, return_threshold=None),
        TypeError,
        "return_threshold=None must be True or False",
    ),
    (lambda: soft_topk(torch.randn(3, dtype=torch.complex64), 1), TypeError, "x has dtype torch.complex64"),
    (lambda: log_soft_topk(X, 8.5), ValueError, "k=8.5 must lie between 0 and 8"),
    (lambda: log_soft_topk(X, 1, 0), ValueError, "alpha=0.0 must be > 0 and finite"),
    (lambda: log_soft_topk(X, 1, complement="yes"), TypeError, "complement='yes' must be True or False"),
    (lambda: log_soft_topk(X, 1, dim=5), IndexError, "dim=5 is out of range for x of shape"),
    (lambda: log_soft_topk(X.int(), 1), TypeError, "x has dtype torch.int32"),
    (lambda: log_soft_topk(X, torch.ones(5)), ValueError, r"k of shape \(5,\) does not broadcast to \(3,\)"),
    (lambda: hard_topk(X, 9), ValueError, "k=9.0 must lie between 0 and 8"),
    (lambda: hard_topk(X, None), TypeError, "k must be a number or a tensor, not NoneType"),
    (lambda: hard_topk(X, 1, return_indices=2), TypeError, "return_indices=2 must be True or False"),
    (lambda: hard_topk(X, 1, backend="gpu"), ValueError, "backend='gpu' is unknown; choose one of cuda,"),
    (lambda: hard_topk(X, 2, max_k=2), ValueError, "max_k=2 has a meaning only with return_indices=True"),
    (lambda: hard_topk(X, torch.ones(3), return_indices=True), ValueError, "give max_k when k is a tensor"),
    (lambda: hard_topk(X, 2, max_k=-1, return_indices=True), ValueError, "max_k=-1 must be an integer >= 0"),
    (
        lambda: hard_topk(X, 2, max_k=2.5, return_indices=True),
        ValueError,
        "max_k=2.5 must be an integer >= 0",
    ),
    (lambda: SoftTopK(0), ValueError, "k=0 must be > 0 and finite"),
    (lambda: SoftTopK(float("inf")), ValueError, "k=inf must be > 0 and finite"),
    (lambda: SoftTopK(1.5, fraction=True), ValueError, "k=1.5 must be > 0 and <= 1.0"),
    (lambda: SoftTopK(1, fraction=True, learn_k=True), ValueError, "k=1.0 as a fraction is the end of its"),
    (lambda: SoftTopK(torch.ones(3)), TypeError, "k must be a number, not Tensor"),
    (lambda: SoftTopK(2, alpha=-1), ValueError, "alpha=-1 must be > 0 and finite"),
    (lambda: SoftTopK(2, "small"), TypeError, "alpha must be a number, not str"),
    (lambda: SoftTopK(9)(X), ValueError, "k=9.0 must lie between 0 and 8"),
]


@pytest.mark.parametrize("call,error,message", WRONG, ids=[f"{i}-{w[2][:40]}" for i, w in enumerate(WRONG)])
def test_wrong_call(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_an_absent_backend_says_how_to_get_it():
    absent = {name: reason for name, reason in available_backends().items() if reason}
    for name, reason in absent.items():
        with pytest.raises(BackendUnavailable, match=f"backend='{name}' is not available: "):
            soft_topk(X, 1, backend=name)
        assert len(reason) > 20


def test_a_backend_for_another_device():
    if available_backends()["cpu"] is not None or not torch.cuda.is_available():
        pytest.skip("needs the cpu backend and a GPU")
    with pytest.raises(ValueError, match="backend='cpu' does not run on device 'cuda"):
        soft_topk(X.cuda(), 1, backend="cpu")
