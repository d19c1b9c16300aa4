"""softtopk.optim against torch.optim.Adam and what used to follow its step."""

from __future__ import annotations

import copy as copying

import pytest
import torch
from torch import Tensor

from softtopk import optim
from softtopk.optim import Adam, Clipped, clip_factor, clip_factors
from tests.waiting import waiting_is_an_error

# Lengths that are whole numbers of 16 bytes and others; rows of one place a thread, of several, and more
# than a block can keep; more elements than a block of a flat sweep.
SHAPES = [(), (1,), (5,), (4099,), (3, 4), (7, 5), (2, 3, 8), (3, 2052), (2, 5001), (2, 9000)]
ROWS = [(5, 4), (6, 3), (4, 1), (3, 1001), (3, 1501), (3, 2052), (3, 2051), (2, 6144), (2, 9000)]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    return request.param


def make(shape, device, dtype=torch.float32, seed=0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def pair(shape, device, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    """The same parameter twice."""
    return tuple(make(shape, device, dtype).requires_grad_() for _ in range(2))


def give(step: int, *parameters: Tensor) -> None:
    """Gradients of another size at every step, the same for all."""
    for parameter in parameters:
        g = make(parameter.shape, parameter.device, parameter.dtype, seed=step + 1)
        parameter.grad = g * 10.0 ** (step % 5 - 3)


def state_of(optimizer, parameter) -> list[Tensor]:
    state = optimizer.state[parameter]
    return [parameter.detach(), state["exp_avg"], state["exp_avg_sq"]]


def assert_same(ours, p, theirs, q):
    # Of float32, what a step is made of is exact to some 1e-6 of itself; a difference may cancel.
    exact = dict(rtol=1e-12, atol=1e-13) if p.dtype == torch.float64 else dict(rtol=3e-6, atol=3e-7)
    for got, want in zip(state_of(ours, p), state_of(theirs, q), strict=True):
        torch.testing.assert_close(got, want, **exact)
    assert float(ours.state[p]["step"]) == float(theirs.state[q]["step"])


def unit_rows(q: Tensor) -> None:
    with torch.no_grad():
        q.div_(q.norm(dim=1, keepdim=True).clamp(min=1e-12))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_is_adam(device, shape, dtype):
    p, q = pair(shape, device, dtype)
    options = dict(lr=3e-3, betas=(0.8, 0.99), eps=1e-6)
    ours, theirs = Adam([p], **options), torch.optim.Adam([q], **options)
    for step in range(12):
        give(step, p, q)
        ours.step()
        theirs.step()
        assert_same(ours, p, theirs, q)


@pytest.mark.parametrize("shape", ROWS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_rows_of_unit_norm_and_copies(device, shape, dtype):
    p, q = pair(shape, device, dtype)
    copy = torch.zeros_like(p, dtype=torch.bfloat16)
    ours = Adam([p], lr=1e-2, copies={p: copy}, normalize_rows=[p])
    theirs = torch.optim.Adam([q], lr=1e-2)
    for step in range(5):
        give(step, p, q)
        ours.step()
        theirs.step()
        unit_rows(q)
        assert_same(ours, p, theirs, q)
        assert torch.equal(copy, p.detach().bfloat16())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_copies(device, shape):
    p = make(shape, device).requires_grad_()
    copies = {p: torch.zeros_like(p, dtype=torch.bfloat16)}
    optimizer = Adam([p], lr=0.1, copies=copies)
    optimizer.refresh_copies()
    assert torch.equal(copies[p], p.detach().bfloat16())
    give(0, p)
    optimizer.step()
    assert torch.equal(copies[p], p.detach().bfloat16())


@pytest.mark.parametrize("kind", [torch.float16, torch.float64], ids=["float16", "float64"])
def test_copies_of_other_dtypes(device, kind):
    p = make((6, 8), device).requires_grad_()
    copy = torch.zeros_like(p, dtype=kind)
    optimizer = Adam([p], lr=0.1, copies={p: copy})
    give(0, p)
    optimizer.step()
    assert torch.equal(copy, p.detach().to(kind))


def test_a_row_of_zeros_stays(device):
    p = torch.zeros(3, 8, device=device).requires_grad_()
    p.grad = torch.zeros_like(p)
    p.grad[1] = 1.0
    Adam([p], normalize_rows=[p]).step()
    assert not p[0].any() and not p[2].any()
    torch.testing.assert_close(p[1].norm(), torch.ones((), device=device))


def test_learning_rate_on_the_device(device):
    p, q = pair((7, 6), device)
    rate = torch.tensor(1e-2, device=device)
    ours, theirs = Adam([p], lr=rate), torch.optim.Adam([q], lr=1e-2)
    for step in range(4):
        rate.fill_(1e-2 / (step + 1))
        theirs.param_groups[0]["lr"] = 1e-2 / (step + 1)
        give(step, p, q)
        ours.step()
        theirs.step()
        assert_same(ours, p, theirs, q)


def test_schedulers(device):
    p, q = pair((7, 6), device)
    ours, theirs = Adam([p], lr=1e-2), torch.optim.Adam([q], lr=1e-2)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (ours, theirs)]
    for step in range(3):
        give(step, p, q)
        ours.step()
        theirs.step()
        for scheduler in schedulers:
            scheduler.step()
        assert_same(ours, p, theirs, q)


def test_many_parameters_together(device):
    # More than a launch takes, of two groups, one of them not on 16 bytes, one without rows.
    shapes = [(), (5,), (3, 700), (4099,), (0, 3)] * 9
    pairs = [pair(shape, device) for shape in shapes]
    shifted = [make((30,), device)[1:].requires_grad_() for _ in range(2)]
    pairs.append(tuple(shifted))
    copies = {p: torch.zeros_like(p, dtype=torch.bfloat16) for p, _ in pairs[::3]}
    split = len(pairs) // 3
    options = [dict(lr=0.01, eps=1e-6), dict(lr=0.002, betas=(0.8, 0.99))]

    def groups(which):
        parts = pairs[:split], pairs[split:]
        return [{"params": [p[which] for p in part], **o} for part, o in zip(parts, options, strict=True)]

    ours, theirs = Adam(groups(0), copies=copies), torch.optim.Adam(groups(1))
    for step in range(3):
        for p, q in pairs:
            give(step, p, q)
        ours.step()
        theirs.step()
    for p, q in pairs:
        assert_same(ours, p, theirs, q)
    for p, copy in copies.items():
        assert torch.equal(copy, p.detach().bfloat16())


@pytest.mark.parametrize("by_group", [False, True], ids=["one", "by group"])
def test_scale(device, by_group):
    shapes = [(5, 8), (9,)]
    pairs = [pair(shape, device) for shape in shapes]
    ours = Adam([{"params": [p]} for p, _ in pairs])
    theirs = torch.optim.Adam([q for _, q in pairs])
    factors = [torch.tensor(f, device=device) for f in ((0.25, 3.0) if by_group else (0.25, 0.25))]
    for step in range(4):
        for (p, q), factor in zip(pairs, factors, strict=True):
            give(step, p, q)
            q.grad *= factor
        before = [p.grad.clone() for p, _ in pairs]
        ours.step(scale=factors if by_group else factors[0])
        theirs.step()
        for (p, q), g in zip(pairs, before, strict=True):
            assert torch.equal(p.grad, g)
            assert_same(ours, p, theirs, q)


@pytest.mark.parametrize("normalize", [False, True], ids=["", "normalize"])
@pytest.mark.parametrize("kind", [torch.float32, torch.bool], ids=["float32", "bool"])
def test_found_inf(device, normalize, kind):
    p, q = pair((5, 12), device)
    copy = torch.zeros_like(p, dtype=torch.bfloat16)
    ours = Adam([p], copies={p: copy}, normalize_rows=[p] if normalize else [])
    theirs = torch.optim.Adam([q])
    for step in range(5):
        give(step, p, q)
        skipped = step in (0, 3)
        if skipped:
            p.grad[2, 3] = float("inf")
        before = [t.clone() for t in (p.detach(), copy)]
        ours.step(found_inf=torch.tensor(skipped, device=device).to(kind))
        if skipped:
            assert torch.equal(p.detach(), before[0])
            if step:
                assert torch.equal(copy, before[1])
        else:
            theirs.step()
            if normalize:
                unit_rows(q)
            assert_same(ours, p, theirs, q)
    assert float(ours.state[p]["step"]) == 3


@pytest.mark.parametrize("normalize", [False, True], ids=["", "normalize"])
@pytest.mark.parametrize("shape", [(9, 8), (9, 5), (9,), (9, 2052), (9, 9000), (9, 2, 4)], ids=str)
def test_rows_without_a_gradient_are_left_alone(device, shape, normalize):
    if normalize and len(shape) != 2:
        pytest.skip("rows are of 2-D parameters")
    p, q = pair(shape, device)
    copy = torch.full_like(p, 7.0, dtype=torch.bfloat16)
    ours = Adam([p], lr=0.1, copies={p: copy}, normalize_rows=[p] if normalize else [])
    theirs = torch.optim.Adam([q], lr=0.1)
    for step, counts in enumerate([[1] * 9, [0, 2, 0, 0, 1, 3, 0, 1, 0], [3, 0, 0, 0, 0, 0, 0, 0, 9]]):
        counts = torch.tensor(counts, device=device)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
        silent = counts == 0
        give(step, p, q)
        p.grad[silent] = float("nan")
        before = [t.clone() for t in (*(state_of(ours, p) if step else [p.detach()]), copy)]
        kept = [t.clone() for t in (state_of(theirs, q) if step else [])]
        ours.step(active={p: offsets})
        theirs.step()
        if normalize:
            unit_rows(q)
        for now, then in zip(state_of(theirs, q), kept, strict=False):
            now[silent] = then[silent]
        assert_same(ours, p, theirs, q)
        now = [*(state_of(ours, p) if step else [p.detach()]), copy]
        for new, old in zip(now, before, strict=True):
            assert torch.equal(new[silent], old[silent])
        assert torch.equal(copy[~silent], p.detach()[~silent].bfloat16())


@pytest.mark.parametrize("capturable", [False, True])
def test_checkpoints_load_either_way(device, capturable):
    p, q = pair((6, 5), device)
    ours = Adam([p], lr=2e-3)
    theirs = torch.optim.Adam([q], lr=2e-3, capturable=capturable and device == "cuda")
    for step in range(3):
        give(step, p, q)
        ours.step()
        theirs.step()
    other_p, other_q = (t.detach().clone().requires_grad_() for t in (p, q))
    # From torch's to ours, and from ours to torch's.
    new_ours, new_theirs = Adam([other_p]), torch.optim.Adam([other_q])
    new_ours.load_state_dict(copying.deepcopy(theirs.state_dict()))
    new_theirs.load_state_dict(copying.deepcopy(ours.state_dict()))
    step = new_ours.state[other_p]["step"]
    assert step.dtype == torch.float32 and step.device.type == device and step.shape == ()
    assert new_ours.param_groups[0]["lr"] == 2e-3
    give(3, other_p, other_q, q)
    if device == "cpu":  # capturable, as ours says it is, is for GPUs
        new_theirs.param_groups[0]["capturable"] = False
    for optimizer in (new_ours, new_theirs, theirs):
        optimizer.step()
    assert_same(new_ours, other_p, theirs, q)
    assert_same(new_ours, other_p, new_theirs, other_q)


def test_options_of_torch_alone(device):
    q = make((3, 2), device).requires_grad_()
    q.grad = torch.ones_like(q)
    theirs = torch.optim.Adam([q], weight_decay=0.1)
    theirs.step()
    with pytest.raises(ValueError, match="weight_decay"):
        Adam([q]).load_state_dict(theirs.state_dict())


def test_closure_and_parameters_without_gradients(device):
    p, idle = make((4,), device).requires_grad_(), make((3,), device).requires_grad_()
    optimizer = Adam([p, idle])

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first
    assert idle not in optimizer.state


def test_strided_parameters(device):
    p, q = (make((6, 8), device).t().requires_grad_() for _ in range(2))
    ours, theirs = Adam([p], normalize_rows=[p]), torch.optim.Adam([q])
    give(0, p, q)
    ours.step()
    theirs.step()
    unit_rows(q)
    assert_same(ours, p, theirs, q)


@pytest.mark.parametrize("offset", [1, 2, 3])
@pytest.mark.parametrize("normalize", [False, True], ids=["", "normalize"])
def test_parameters_that_start_anywhere(device, offset, normalize):
    def within(t: Tensor) -> Tensor:
        whole = t.new_zeros(t.numel() + offset)
        whole[offset:] = t.flatten()
        return whole[offset:].view(t.shape)

    p, q = (within(make((6, 8), device)).requires_grad_() for _ in range(2))
    copy = within(torch.zeros(6, 8, dtype=torch.bfloat16, device=device))
    ours = Adam([p], copies={p: copy}, normalize_rows=[p] if normalize else [])
    theirs = torch.optim.Adam([q])
    give(0, p, q)
    ours.step()
    theirs.step()
    if normalize:
        unit_rows(q)
    assert_same(ours, p, theirs, q)
    assert torch.equal(copy, p.detach().bfloat16())


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
def test_clip_factor(device, size):
    gradients = [size * make(shape, device, seed=i) for i, shape in enumerate([(3, 4), (5,), ()])]
    squares = [gradients[0].square().sum(1), gradients[1].square().sum(), gradients[2].square()]
    scale, norm = clip_factor(squares, 1.0)
    assert scale.shape == norm.shape == () and scale.device.type == device
    parameters = [torch.zeros_like(g).requires_grad_() for g in gradients]
    for parameter, g in zip(parameters, gradients, strict=True):
        parameter.grad = g.clone()
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(parameters, 1.0))
    for parameter, g in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(g * scale, parameter.grad)


def test_clip_factor_of_what_is_not_finite(device):
    scale, norm = clip_factor([torch.tensor([1.0, float("inf")], device=device)], 1.0)
    assert scale == 0 and norm == float("inf")
    scale, norm = clip_factor([torch.tensor([1.0, float("nan")], device=device)], 1.0)
    assert scale.isnan() and norm.isnan()


@pytest.mark.parametrize("many", [False, True], ids=["", "more than a launch takes"])
def test_clip_factors_of_groups(device, many):
    # Several blocks of a tensor, ends of blocks, tensors that do not start on 16 bytes, none at all.
    shapes = [(), (5,), (70_001,), (16384,), (0,), (129, 300)] * (20 if many else 1)
    gradients = [make(shape, device, seed=i) for i, shape in enumerate(shapes)]
    gradients.append(make((20_000,), device)[3:])
    squares = [make((40,), device, seed=i).square() for i in range(3)]
    groups = [Clipped(squares[:1], gradients[::2], 1.0), Clipped([], [], 2.0), Clipped([], gradients, 1e4)]
    groups.append(Clipped(squares, gradients[1::2], 7.0))
    scales, norms = clip_factors(groups)
    for group, scale, norm in zip(groups, scales, norms, strict=True):
        total = sum(float(part.double().sum()) for part in group.squares)
        total += sum(float(part.double().square().sum()) for part in group.gradients)
        assert scale.shape == norm.shape == () and scale.dtype == norm.dtype == torch.float32
        torch.testing.assert_close(float(norm), total**0.5, rtol=1e-6, atol=0)
        torch.testing.assert_close(
            float(scale), min(1.0, group.max_norm / (total**0.5 + 1e-6)), rtol=1e-6, atol=0
        )


def test_errors():
    p = torch.zeros(3, 4, requires_grad=True)
    for options in (dict(lr=-1.0), dict(betas=(1.0, 0.9)), dict(betas=(0.9, -0.1)), dict(eps=-1.0)):
        with pytest.raises(ValueError):
            Adam([p], **options)
    with pytest.raises(ValueError, match="copy"):
        Adam([p], copies={p: torch.zeros(4, 3)})
    with pytest.raises(ValueError, match="normalize_rows"):
        Adam([p], normalize_rows=[torch.zeros(3)])
    p.grad = torch.zeros_like(p)
    with pytest.raises(ValueError, match="offsets"):
        Adam([p]).step(active={p: torch.zeros(3, dtype=torch.int32)})
    p.grad = None
    p.grad = torch.zeros_like(p).to_sparse()
    with pytest.raises(RuntimeError, match="dense"):
        Adam([p]).step()


@pytest.mark.gpu
def test_the_kernel_is_used():
    p = make((3, 4), "cuda").requires_grad_()
    assert optim.natively(p)


@pytest.mark.gpu
@pytest.mark.parametrize("normalize", [False, True], ids=["", "normalize"])
def test_in_a_graph_without_waiting(normalize):
    p, q = pair((50, 64), "cuda")
    ours = Adam([p], lr=torch.tensor(1e-2, device="cuda"), normalize_rows=[p] if normalize else [])
    theirs = torch.optim.Adam([q], lr=1e-2)
    scale, found_inf = torch.ones((), device="cuda"), torch.zeros((), device="cuda")

    def eager():
        theirs.step()
        if normalize:
            unit_rows(q)

    give(0, p, q)
    with waiting_is_an_error():
        ours.step(scale=scale, found_inf=found_inf)
    eager()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.step(scale=scale, found_inf=found_inf)
    for step in range(1, 5):
        p.grad.copy_(make((50, 64), "cuda", seed=step))
        q.grad.copy_(p.grad)
        graph.replay()
        eager()
        assert_same(ours, p, theirs, q)
    before = p.detach().clone()
    found_inf.fill_(1)
    graph.replay()
    assert torch.equal(p.detach(), before) and ours.state[p]["step"] == 5
