"""soft_topk_code and hard_topk_code: what is kept, with which value, in which order; bad rows, overflow."""

from __future__ import annotations

import doctest
import functools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import inf, nan

import softtopk
from softtopk import SparseCode, hard_topk, hard_topk_code, soft_topk_code, sparse
from tests.cases import BAR_FAMILIES, FAMILIES, gapped, make
from tests.conftest import skip_if_slow
from tests.sparse_oracle import activation, assert_values, assert_well_formed, dense, dense_hard

SETTINGS = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def budgets(n: int) -> torch.Tensor:
    return torch.tensor([k for k in (0, 0.5, 1, 8, 8.5, n / 3, 0.75 * n, n - 0.5, n) if k <= n])


# ---- values against the dense operator in float64


@functools.cache
def soft_case(family: str, n: int, alpha: float):
    """One row per budget and the dense result; shared by all backends."""
    k = budgets(n)
    pre = make(family, len(k), n, seed=n)
    return pre, k, dense(pre.double(), k, alpha)


@pytest.mark.parametrize("n", [1, 31, 700, 5000])
@pytest.mark.parametrize("alpha", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("family", FAMILIES)
def test_soft_values(backend, device, family, alpha, n):
    skip_if_slow(backend, device, n <= 31 or (n == 700 and alpha == 1e-2 and family in BAR_FAMILIES))
    pre, k, want = soft_case(family, n, alpha)
    code = soft_topk_code(pre.to(device), k.to(device), alpha, backend=backend)
    assert_well_formed(code)
    assert code.values.dtype == torch.float32 and code.shape == pre.shape and not code.overflow
    assert_values(code, want, pre.relu())


@functools.cache
def long_case(n: int, dtype: torch.dtype):
    """Rows that chip memory holds whole or in parts: usual ones, one sorted, one of few distinct values."""
    pre = torch.randn(6, n, generator=torch.Generator().manual_seed(n)).to(dtype)
    pre[4], pre[5] = pre[4].sort().values, pre[5].round()
    k = torch.tensor([32.0, 48.5, 64, 96, 64, 64])
    return pre, k, dense(pre.double(), k, 1e-4), dense_hard(pre.double(), k.round())


@pytest.mark.parametrize(
    "n,dtype",
    [
        (520, torch.bfloat16),
        (700, torch.float32),
        (1027, torch.bfloat16),
        (2048, torch.bfloat16),
        (16384, torch.bfloat16),
        (24575, torch.bfloat16),
        (24576, torch.float32),
        (65536, torch.bfloat16),
        (100003, torch.float32),
        (262144, torch.float32),
    ],
)
def test_long_rows(backend, device, dtype, n):
    skip_if_slow(backend, device, False)
    if backend == "reference":
        pytest.skip("what is wanted is its work")
    pre, k, want, want_hard = long_case(n, dtype)
    at = pre.to(device)
    for rows, room in (5, 256), (6, max(n // 4, 320)):  # more, and room enough, for the tied row
        code = soft_topk_code(at[:rows], k[:rows].to(device), 1e-4, max_active=room, backend=backend)
        assert_well_formed(code)
        assert code.values.shape[1] == room
        assert_values(code, want[:rows], pre[:rows].relu())
    hard = hard_topk_code(at, k.round().to(device), backend=backend)
    assert_well_formed(hard)
    assert torch.equal(hard.to_dense().double().cpu(), want_hard)


@pytest.mark.parametrize("n", [1500, 4096, 24576, 65536])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_wanted(backend, device, dtype, n):
    skip_if_slow(backend, device, False)
    if backend == "reference":
        pytest.skip("what is wanted is its work")
    pre = torch.randn(6, n, generator=torch.Generator().manual_seed(n)).to(dtype)
    k = torch.tensor([3, 150, 220.5, 300, 370, 450])
    code = soft_topk_code(pre.to(device), k.to(device), 1e-4, backend=backend)
    assert_well_formed(code)
    assert_values(code, dense(pre.double(), k, 1e-4), pre.relu())
    hard = hard_topk_code(pre.to(device), k.round().to(device), backend=backend)
    assert_well_formed(hard)
    assert torch.equal(hard.to_dense().double().cpu(), dense_hard(pre.double(), k.round()))


@pytest.mark.parametrize("family", ["relu", "heavy_tailed", "tied", "negative"])
@pytest.mark.parametrize("n", [64, 3000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(backend, device, dtype, n, family):
    skip_if_slow(backend, device, n == 64)
    pre = make(family, 4, n, seed=1).to(dtype)
    k = torch.tensor([3, 7.25, 20, 40])
    code = soft_topk_code(pre.to(device), k.to(device), 1e-2, backend=backend)
    assert_well_formed(code)
    assert code.values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_values(code, dense(pre.double(), k, 1e-2), pre.relu())
    if dtype == torch.float64:
        want = dense(pre, k, 1e-2)
        error = (code.to_dense().cpu() - want).abs() / pre.abs().clamp(min=1)
        assert error.max() <= 1.01 * 2.0**-24 and error.median() <= 1e-15


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias_and_thresholds(backend, device, dtype, hard):
    g = torch.Generator().manual_seed(2)
    pre = torch.randn(4, 90, generator=g).to(dtype)
    bias, thresholds = torch.randn(90, generator=g), torch.rand(90, generator=g)
    k = torch.tensor([2.5, 9, 30, 80])
    for threshold in (0.0, 0.5, thresholds):
        on_device = threshold.to(device) if isinstance(threshold, torch.Tensor) else threshold
        code = soft_topk_code(
            pre.to(device),
            k.to(device),
            0.05,
            bias=bias.to(device),
            threshold=on_device,
            hard=hard,
            backend=backend,
        )
        a = activation(pre, bias, threshold)  # rounded to the dtype of pre
        assert_well_formed(code)
        assert_values(code, dense(a.double(), k, 0.05, hard=hard), a)
        assert (a.gather(1, code.indices.long().clamp(max=89).cpu())[code.indices.cpu() < 90] > 0).all()


def test_an_activation_is_above_the_threshold_not_at_it(backend, device):
    pre = torch.tensor([[0.5, 0.25, 0.75, 0.5, -1.0]], device=device)
    for threshold in (0.5, torch.full((5,), 0.5, device=device)):
        for function in (soft_topk_code, hard_topk_code):
            code = function(pre, 3, threshold=threshold, backend=backend)
            assert code.counts.tolist() == [1] and code.indices[0, 0] == 2


def test_zeros_take_part_in_the_budget(backend, device):
    """Fewer positive elements than the budget: p is 1 at none of them, the rest goes to the zeros."""
    pre = -torch.ones(2, 50)
    pre[0, [3, 20, 33]] = torch.tensor([0.5, 0.02, 0.3])
    pre[1, 7] = 1e-3
    code = soft_topk_code(pre.to(device), 25, 0.1, backend=backend)
    assert code.counts.tolist() == [3, 1] and code.indices[0, :3].tolist() == [3, 20, 33]
    assert_values(code, dense(pre.double(), 25.0, 0.1), pre.relu())
    zero = soft_topk_code(-torch.ones(3, 40, device=device), 5, 0.1, backend=backend)
    assert zero.counts.tolist() == [0, 0, 0] and (zero.values == 0).all() and (zero.indices == 40).all()


def test_the_first_below_a_gap_is_kept(backend, device):
    """At an integer k its p is 0 and its q 1/2; its value is 0, lest it counted as active."""
    x = gapped(gap=1e4, alpha=1e-4, above=6, n=40, seed=3) + 2
    code = soft_topk_code(x.to(device), 6, 1e-4, backend=backend)
    below = x.topk(7).indices[0, 6].item()
    row = code.indices[0, : code.counts[0]].tolist()
    assert below in row
    assert code.values[0, row.index(below)] == 0 and code.l0() == 6
    assert not code.fired()[below] and code.fired().sum() == 6


def test_active_entries_have_a_gate_of_2_to_the_minus_24(backend, device):
    """A gap of 28 alpha: the elements below it have p of 2^-23 and less, and all of them a share of q."""
    x = gapped(gap=28, alpha=0.05, above=6, n=200, seed=3) + 4
    code = soft_topk_code(x.to(device), 6, 0.05, backend=backend)
    gate = code.to_dense().cpu() / x
    entries = code.indices[0, : code.counts[0]].long()
    assert gate[gate != 0].min() >= 0.999 * 2.0**-24
    assert (gate[0, entries.cpu()] == 0).sum() > 3 and ((gate > 0) & (gate < 1e-5)).sum() > 0


@pytest.mark.parametrize("n", [1, 2, 40, 3000])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hard_codes(backend, device, dtype, family, n):
    skip_if_slow(backend, device, n <= 40)
    k = budgets(n)
    pre = make(family, len(k), n, seed=n).to(dtype)
    code = hard_topk_code(pre.to(device), k.to(device), backend=backend)
    assert_well_formed(code)
    assert torch.equal(code.to_dense().cpu(), dense_hard(pre, k).float())
    assert code.counts.tolist() == (dense_hard(pre, k) > 0).sum(1).tolist()
    straight = soft_topk_code(pre.to(device), k.to(device), 1e-2, hard=True, backend=backend)
    assert_well_formed(straight)
    assert torch.equal(straight.to_dense(), code.to_dense())


def test_ties_go_to_the_lowest_index(backend, device):
    pre = torch.tensor([[1.0, 2.0, 1.0, 1.0, 2.0, -1.0]], device=device)
    code = hard_topk_code(pre, 3, backend=backend)
    assert code.indices[0, :4].tolist() == [0, 1, 4, 6] and code.counts.tolist() == [3]
    # round-half-up, and nothing that is not positive
    assert hard_topk_code(pre, 1.5, backend=backend).counts.tolist() == [2]
    assert hard_topk_code(pre, 6, backend=backend).counts.tolist() == [5]


# ---- rows that are not ordinary


@pytest.mark.parametrize("mode", ["soft", "straight_through", "hard"])
def test_nan_and_infinity(backend, device, mode):
    pre = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)).to(device)
    pre[1, 40] = nan
    pre[2, [5, 9]] = inf
    pre[3, :3] = -inf
    k = torch.tensor([4, 4, 4, 4, nan, 4.0], device=device)
    options = {"backend": backend, "max_active": 64}
    if mode == "hard":
        code = hard_topk_code(pre, k, **options)
    else:
        code = soft_topk_code(pre, k, 0.1, hard=mode == "straight_through", **options)
    for row in (1, 4):
        assert code.counts[row] == 1 and code.indices[row, 0] == 0 and code.values[row, 0].isnan()
        assert (code.values[row, 1:] == 0).all() and (code.indices[row, 1:] == 50).all()
    whole = code.to_dense()
    assert whole[2, 5] == whole[2, 9] == inf and whole[[0, 2, 3, 5]].isnan().sum() == 0
    assert (whole[3, :3] == 0).all()
    good = torch.tensor([0, 3, 5])
    want = (
        dense_hard(pre[good].cpu().double(), 4)
        if mode == "hard"
        else dense(pre[good].cpu().double(), 4.0, 0.1, hard=mode == "straight_through")
    )
    alone = SparseCode.from_dense(whole[good.to(device)], backend=backend)
    assert_values(alone, want, pre[good].cpu().relu())


@pytest.mark.parametrize("alpha", [0.0, -1.0, inf, nan])
def test_a_bad_alpha_makes_its_row_nan(backend, device, alpha):
    pre = torch.rand(2, 30, device=device)
    scale = torch.tensor([alpha, 0.1], device=device)
    code = soft_topk_code(pre, 3, scale, backend=backend)
    assert code.counts[0] == 1 and code.values[0, 0].isnan() and code.indices[0, 0] == 0
    assert code.values[1].isfinite().all() and code.counts[1] > 1


def test_a_k_tensor_out_of_range_is_clamped(backend, device):
    pre = torch.rand(3, 20, device=device) + 0.1
    k = torch.tensor([-2.0, 99.0, 20.0], device=device)
    code = soft_topk_code(pre, k, 0.1, backend=backend)
    assert (code.to_dense()[0] == 0).all()
    torch.testing.assert_close(code.to_dense()[1:], pre[1:], rtol=1e-6, atol=0)


def test_an_empty_batch_and_one_latent(backend, device):
    for function in (soft_topk_code, hard_topk_code):
        code = function(torch.empty(0, 7, device=device), 2, backend=backend)
        assert code.shape == (0, 7) and code.values.shape == (0, 64) and code.to_dense().shape == (0, 7)
        assert not code.overflow and not code.fired().any()
    one = soft_topk_code(torch.tensor([[2.0], [-1.0]], device=device), 0.25, backend=backend)
    torch.testing.assert_close(one.to_dense().cpu(), torch.tensor([[0.5], [0.0]]))


# ---- room


@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_overflow(backend, device, mode):
    pre = torch.rand(3, 400, generator=torch.Generator().manual_seed(1)).to(device)
    pre[1] = -1
    pre[1, :5] = 1

    def code(max_active, check):
        options = {"max_active": max_active, "check": check, "backend": backend}
        return (
            hard_topk_code(pre, 90, **options) if mode == "hard" else soft_topk_code(pre, 90, 0.02, **options)
        )

    whole = code(400, False)
    assert not whole.overflow
    checked = code(32, True)
    most = whole.counts.max().item()
    assert checked.max_active == 32 * -(-most // 32) and not checked.overflow
    assert torch.equal(checked.to_dense(), whole.to_dense())
    cut = code(32, False)
    assert cut.overflow and cut.max_active == 32 and cut.overflow.device == cut.device
    assert torch.equal(cut.counts, whole.counts)
    for row in range(3):
        kept = min(32, whole.counts[row].item())
        assert torch.equal(cut.indices[row, :kept], whole.indices[row, :kept])
        assert torch.equal(cut.values[row, :kept], whole.values[row, :kept])
    assert (cut.indices[1, 5:] == 400).all() and cut.counts[1] == 5


def test_default_room(backend, device):
    pre = torch.randn(2, 300, device=device)
    assert soft_topk_code(pre, 10, 1e-4, backend=backend).max_active == 64
    assert soft_topk_code(pre, 26, 1e-4, backend=backend).max_active == 96
    assert hard_topk_code(pre, torch.tensor([3, 40.0], device=device), backend=backend).max_active == 96
    assert hard_topk_code(pre, 3, check=False, backend=backend).max_active == 64


# ---- determinism, shapes, strides


def test_bit_equal_whatever_the_place_in_the_batch(backend, device):
    skip_if_slow(backend, device, False)
    pre = make("relu", 9, 3000, seed=8).to(device)
    k = torch.linspace(5, 60, 9, device=device)
    first, again = (soft_topk_code(pre, k, 1e-2, max_active=200, backend=backend) for _ in range(2))
    for name in ("values", "indices", "counts"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    for row in (0, 4, 8):
        other = soft_topk_code(pre[row : row + 1], k[row : row + 1], 1e-2, max_active=200, backend=backend)
        assert torch.equal(other.values[0], first.values[row])
        assert torch.equal(other.indices[0], first.indices[row])


def test_shapes_and_strides(backend, device):
    pre = torch.randn(2, 3, 40, device=device)
    code = soft_topk_code(pre, 4, 0.05, backend=backend)
    assert code.shape == (2, 3, 40) and code.values.shape[0] == 6
    flat = soft_topk_code(pre.view(6, 40), 4, 0.05, backend=backend)
    assert torch.equal(code.to_dense(), flat.to_dense().view(2, 3, 40))
    row = soft_topk_code(pre[0, 0], 4, 0.05, backend=backend)
    assert row.shape == (40,) and torch.equal(row.to_dense(), flat.to_dense()[0])
    k = torch.tensor([[4.0, 5.0, 6.0]], device=device)  # broadcasts over the first dimension
    each = soft_topk_code(pre, k, 0.05, backend=backend).to_dense()
    assert torch.equal(each[0, 1], soft_topk_code(pre[0, 1], 5, 0.05, backend=backend).to_dense())
    turned = pre.view(6, 40).t().contiguous().t()
    assert torch.equal(soft_topk_code(turned, 4, 0.05, backend=backend).to_dense(), flat.to_dense())
    sliced = torch.randn(6, 90, device=device)[:, 3:43]
    copied = soft_topk_code(sliced.contiguous(), 4, 0.05, backend=backend)
    assert torch.equal(soft_topk_code(sliced, 4, 0.05, backend=backend).to_dense(), copied.to_dense())


def test_arguments_are_not_modified(backend, device):
    pre, bias = torch.randn(3, 40, device=device), torch.randn(40, device=device)
    k, alpha = torch.tensor([-1.0, 3.0, 99.0], device=device), torch.rand(3, device=device)
    copies = [t.clone() for t in (pre, bias, k, alpha)]
    leaves = [t.requires_grad_() for t in (pre, bias, k, alpha)]
    soft_topk_code(pre, k, alpha, bias=bias, backend=backend).values.pow(2).sum().backward()
    assert all(torch.equal(t.detach(), c) for t, c in zip(leaves, copies, strict=True))


def test_examples_of_the_docstrings():
    names = {**vars(sparse), "torch": torch}
    (example,) = doctest.DocTestFinder().find(soft_topk_code.__wrapped__, "soft_topk_code", sparse, names)
    assert doctest.DocTestRunner().run(example) == (0, 2)


# ---- properties


@st.composite
def problems(draw):
    """Rows of moderate float64 values with ties and zeros, a budget inside (0, n), a scale."""
    n, rows = draw(st.integers(1, 30)), draw(st.integers(1, 4))
    values = st.one_of(st.floats(-5, 5), st.integers(-3, 3).map(float))
    x = [draw(st.lists(values, min_size=n, max_size=n)) for _ in range(rows)]
    k = draw(st.floats(0.01, 0.99)) * n if draw(st.booleans()) else float(draw(st.integers(0, n)))
    return torch.tensor(x, dtype=torch.float64), k, 10.0 ** draw(st.floats(-4, 1))


@pytest.fixture(params=["reference", "cpu"])
def fast(request):
    if softtopk.available_backends()[request.param] is not None:
        pytest.skip(f"{request.param} is not built")
    return request.param


@given(problem=problems(), seed=st.integers(0, 99))
@SETTINGS
def test_properties(fast, problem, seed):
    pre, k, alpha = problem
    code = soft_topk_code(pre, k, alpha, backend=fast)
    assert_well_formed(code)
    whole = code.to_dense()
    bar = 1.01 * 2.0**-24 * pre.abs()
    assert ((whole - dense(pre, k, alpha)).abs() <= bar + 1e-12).all()
    assert (whole >= 0).all() and (whole <= pre.relu() + 1e-15).all()
    # The gates sum to k less what the zeros take and what was dropped.
    gates = torch.where(pre > 0, whole / pre, 0)
    assert (gates.sum(1) <= k + 1e-9).all()
    if (pre > 0).all():
        assert (gates.sum(1) >= k - pre.shape[1] * 2.0**-24 - 1e-9).all()
    # Larger elements have larger values, equal ones equal.
    order = pre.argsort(1)
    assert (whole.gather(1, order).diff(dim=1) >= -2 * bar.amax(1, keepdim=True) - 1e-12).all()
    permutation = torch.randperm(len(pre), generator=torch.Generator().manual_seed(seed))
    permuted = soft_topk_code(pre[permutation], k, alpha, backend=fast)
    assert torch.equal(permuted.to_dense(), whole[permutation])
    hard = hard_topk_code(pre, k, backend=fast)
    assert torch.equal(hard.to_dense(), pre.relu() * hard_topk(pre.relu(), k, backend=fast))
