"""Every wrong call of the sparse path and its message, raised before any work."""

from __future__ import annotations

import pytest
import torch

from softtopk import (
    SparseCode,
    encode_hard_topk,
    encode_soft_topk,
    hard_topk_code,
    soft_topk_code,
    soft_topk_decode,
    sparse_decode,
)

PRE = torch.randn(3, 8)
X = torch.randn(3, 5)
W = torch.randn(8, 5)
B = torch.randn(8)
K = torch.ones(3)
META = torch.device("meta")


def code(**options):
    return soft_topk_code(PRE, 2, backend="reference", **options)


def decode(weight=W, bias=None, **options):
    return sparse_decode(code(), weight, bias, backend="reference", **options)


def encode(x=X, weight=W, bias=B, k=2, **options):
    return encode_soft_topk(x, weight, bias, k, backend="reference", **options)


WRONG = [
    # as of soft_topk
    (lambda: soft_topk_code([1.0], 1), TypeError, "pre must be a torch.Tensor, not list"),
    (lambda: soft_topk_code(torch.arange(4), 1), TypeError, "pre has dtype torch.int64"),
    (lambda: soft_topk_code(PRE.to_sparse(), 1), TypeError, "pre has layout torch.sparse_coo"),
    (lambda: soft_topk_code(torch.tensor(1.0), 1), ValueError, r"pre has shape \(\)"),
    (lambda: soft_topk_code(torch.empty(3, 0), 0), ValueError, r"pre of shape \(3, 0\) has no element"),
    (lambda: soft_topk_code(PRE, 8.5), ValueError, "k=8.5 must lie between 0 and 8"),
    (lambda: soft_topk_code(PRE, "2"), TypeError, "k must be a number or a tensor, not str"),
    (lambda: soft_topk_code(PRE, 1, 0), ValueError, "alpha=0.0 must be > 0 and finite"),
    (
        lambda: soft_topk_code(PRE, torch.ones(8)),
        ValueError,
        r"k of shape \(8,\) does not broadcast to \(3,\), the shape of pre, \(3, 8\)",
    ),
    (lambda: soft_topk_code(PRE, 1, K.to(META)), ValueError, "alpha is on meta, pre on cpu"),
    (lambda: soft_topk_code(PRE, 1, backend="metal"), ValueError, "backend='metal' is unknown"),
    (lambda: soft_topk_code(PRE, 1, backend=3), TypeError, "backend=3 must be a string or None"),
    (lambda: hard_topk_code(PRE, 9), ValueError, "k=9.0 must lie between 0 and 8"),
    (lambda: hard_topk_code(PRE.int(), 9), TypeError, "pre has dtype torch.int32"),
    # options of a selection
    (lambda: code(hard=1), TypeError, "hard=1 must be True or False"),
    (lambda: code(check=None), TypeError, "check=None must be True or False"),
    (lambda: hard_topk_code(PRE, 1, check=2), TypeError, "check=2 must be True or False"),
    (lambda: code(bias=1.0), TypeError, "bias must be a torch.Tensor, not float"),
    (lambda: code(bias=torch.arange(8)), TypeError, "bias has dtype torch.int64; float16"),
    (lambda: code(bias=torch.ones(5)), ValueError, r"bias has shape \(5,\); \(8,\) is needed"),
    (lambda: code(bias=torch.ones(8, device=META)), ValueError, "bias is on meta, pre on cpu"),
    (lambda: code(threshold=-0.1), ValueError, "threshold=-0.1 must be >= 0 and finite"),
    (lambda: code(threshold=float("nan")), ValueError, "threshold=nan must be >= 0"),
    (lambda: code(threshold="0"), TypeError, "threshold must be a number or a tensor, not str"),
    (lambda: code(threshold=True), TypeError, "threshold must be a number or a tensor, not bool"),
    (lambda: code(threshold=torch.ones(8).double()), TypeError, "threshold has dtype torch.float64; float32"),
    (lambda: code(threshold=torch.ones(3)), ValueError, r"threshold has shape \(3,\); \(8,\) is needed"),
    (lambda: code(max_active=0), ValueError, "max_active=0 must be an integer >= 1"),
    (lambda: code(max_active=2.0), ValueError, "max_active=2.0 must be an integer >= 1"),
    (lambda: code(max_active=True), ValueError, "max_active=True must be an integer >= 1"),
    (lambda: soft_topk_code(PRE, K, check=False), ValueError, "give max_active when k is a tensor"),
    (lambda: hard_topk_code(PRE, K, check=False), ValueError, "give max_active when k is a tensor"),
    (lambda: code(selection_gradient="k"), TypeError, "selection_gradient must be a number, not str"),
    (lambda: code(selection_gradient=float("inf")), ValueError, "selection_gradient=inf must be finite"),
    # encoders
    (lambda: encode(x=[1.0]), TypeError, "x must be a torch.Tensor, not list"),
    (lambda: encode(x=torch.empty(3, 0)), ValueError, r"x of shape \(3, 0\) has no element along dim=-1"),
    (lambda: encode(weight=None), TypeError, "weight must be a torch.Tensor, not NoneType"),
    (lambda: encode(weight=W.t()), ValueError, r"weight has shape \(5, 8\); \(any, 5\) is needed"),
    (lambda: encode(weight=W[0]), ValueError, r"weight has shape \(5,\); \(any, 5\) is needed"),
    (lambda: encode(weight=W[:0], bias=None), ValueError, r"weight has shape \(0, 5\): at least one latent"),
    (lambda: encode(weight=W.to(META)), ValueError, "weight is on meta, x on cpu"),
    (lambda: encode(weight=W.int()), TypeError, "weight has dtype torch.int32"),
    (lambda: encode(bias=torch.ones(5)), ValueError, r"bias has shape \(5,\); \(8,\) is needed"),
    (
        lambda: encode(x=X.bfloat16()),
        TypeError,
        "x has dtype torch.bfloat16, weight torch.float32; they must",
    ),
    (lambda: encode(copy=W.bfloat16()), TypeError, "x has dtype torch.float32, copy torch.bfloat16; they"),
    (lambda: encode(k=8.5), ValueError, "k=8.5 must lie between 0 and 8"),  # latents, not elements of x
    (lambda: encode(alpha=-1), ValueError, "alpha=-1.0 must be > 0"),
    (lambda: encode(sparse_gradient=1), TypeError, "sparse_gradient=1 must be True or False"),
    (lambda: encode_hard_topk(X, W, B, K, check=False), ValueError, "give max_active when k is a tensor"),
    (lambda: encode_hard_topk(X, W, B, 2, copy=W[:4]), ValueError, r"copy has shape \(4, 5\); \(8, 5\) is"),
    # decoders
    (lambda: sparse_decode(PRE, W), TypeError, "code must be a softtopk.SparseCode, not Tensor"),
    (lambda: decode(weight=W.t()), ValueError, r"weight has shape \(5, 8\); \(8, any\) is needed"),
    (
        lambda: decode(weight=W.double()),
        TypeError,
        "weight has dtype torch.float64, code torch.float32: one of",
    ),
    (lambda: decode(weight=W.to(META)), ValueError, "weight is on meta, code on cpu"),
    (lambda: decode(bias=torch.ones(8)), ValueError, r"bias has shape \(8,\); \(5,\) is needed"),
    (lambda: decode(copy=W.double()), TypeError, "copy has dtype torch.float64, weight torch.float32: one"),
    (lambda: decode(copy=W.clone().requires_grad_()), ValueError, "copy requires a gradient, which goes to"),
    (
        lambda: decode(copy=torch.float64),
        TypeError,
        "copy has dtype torch.float64, weight torch.float32: one",
    ),
    (lambda: decode(copy=torch.int8), TypeError, "copy=torch.int8; float16, bfloat16, float32 or"),
    (lambda: encode(copy=torch.bfloat16), TypeError, "x has dtype torch.float32, copy torch.bfloat16; they"),
    (lambda: decode(copy=3), TypeError, "copy must be a torch.Tensor, not int"),
    (lambda: decode(project="yes"), TypeError, "project='yes' must be True or False"),
    (lambda: decode(squares=torch.ones(5)), ValueError, r"squares has shape \(5,\); \(8,\) is needed"),
    (lambda: decode(squares=torch.ones(8).double()), TypeError, "squares has dtype torch.float64; float32"),
    (lambda: decode(squares=[0.0]), TypeError, "squares must be a torch.Tensor, not list"),
    (
        lambda: soft_topk_decode(PRE, 2, 0.1, W, torch.ones(8), backend="reference"),
        ValueError,
        r"decoder_bias has shape \(8,\); \(5,\) is needed",
    ),
    (lambda: soft_topk_decode(PRE, 9, 0.1, W.t()), ValueError, r"weight has shape \(5, 8\); \(8, any\) is"),
    # from dense
    (lambda: SparseCode.from_dense([1.0]), TypeError, "x must be a torch.Tensor, not list"),
    (lambda: SparseCode.from_dense(PRE, 0), ValueError, "max_active=0 must be an integer >= 1"),
    (lambda: SparseCode.from_dense(PRE, backend="gpu"), ValueError, "backend='gpu' is unknown"),
]


@pytest.mark.parametrize("call,error,message", WRONG, ids=[f"{i}-{w[2][:40]}" for i, w in enumerate(WRONG)])
def test_wrong_call(call, error, message):
    with pytest.raises(error, match=message):
        call()
