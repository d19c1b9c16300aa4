"""The log domain in Triton: the densities by way of logarithms, log p and log(1 - p), and the backward.

The mathematics and the names are those of log_backward and log_densities in backends/reference.py.
"""

import triton
import triton.language as tl

from softtopk.backends.triton.sweeps import INF, LN_2, chunk, exponent, per_row, read, scale_in, tails


@triton.jit
def log_densities(r_A, r_B, P, Q, D, alpha):
    """R, w_A, w_B, log_h_A, log_h_B, all in float64, as alpha is."""
    P = P.to(tl.float64)
    Q = Q.to(tl.float64)
    r_A = r_A.to(tl.float64)
    r_B = r_B.to(tl.float64)
    log_P = tl.log(P)
    log_Q = tl.log(Q)
    log_D = tl.log(tl.abs(D.to(tl.float64)))
    both = (P > 0) & (Q > 0)
    half_gap = (r_A - r_B) / alpha * 0.5
    half_gap = tl.where(half_gap == INF, (r_A * 0.5 - r_B * 0.5) / alpha, half_gap)
    log_c = tl.where(both, (log_P + log_Q) * 0.5 - half_gap, -INF)
    most = tl.maximum(log_D, log_c)
    limit = most == -INF  # R = 0: the shares at the limit
    log_R = most + tl.log(1 + tl.exp(2 * tl.where(limit, -INF, tl.minimum(log_D, log_c) - most))) * 0.5
    magnitude = tl.log(1 + tl.exp(tl.where(limit, -INF, log_D - log_R)))  # log((R + |D|) / R)
    limiting = both.to(tl.float64) * -LN_2
    larger = tl.where(limit, limiting, magnitude - LN_2)
    smaller = tl.where(limit, limiting, 2 * (log_c - log_R) - magnitude - LN_2)
    log_w_A = tl.where(P == 0, -INF, tl.where(D >= 0, larger, smaller))
    log_w_B = tl.where(Q == 0, -INF, tl.where(D >= 0, smaller, larger))
    log_h_A = tl.where(P == 0, -INF, log_w_A + log_R - log_P)
    log_h_B = tl.where(Q == 0, -INF, log_w_B + log_R - log_Q)
    return tl.exp(log_R), tl.exp(log_w_A), tl.exp(log_w_B), log_h_A, log_h_B


@triton.jit
def steps(alpha, T: tl.constexpr):
    """(before, rate, after): t = (x - r) / alpha in units of 2^64, which does not overflow where t does,
    is (x * before - r * before) * rate, and z / alpha is z * after * rate; alpha in float64."""
    tiny = alpha < 1 / 2.0**64
    before = tl.where(tiny, 1.0, 1 / 2.0**64).to(T)
    after = tl.where(tiny, 2.0**64, 1.0).to(T)
    rate = (tl.where(tiny, 1 / 2.0**64, 1.0).to(tl.float64) / alpha).to(T)
    return before, rate, after


@triton.jit
def log_of_rest(h):
    """log(1 - h) for 0 <= h <= 1/2: -2 artanh(h / (2 - h)) by its series. log is poor near 1."""
    TERMS: tl.constexpr = 16 if h.dtype == tl.float64 else 7
    s = h / (2 - h)
    square = s * s
    series = tl.zeros_like(h)
    for i in tl.static_range(TERMS):
        series = series * square + 1.0 / (2 * (TERMS - 1 - i) + 1)
    return -2 * s * series


@triton.jit
def relative_u(v, h, v_origin, h_origin):
    """v / (1 - h) - v_origin / (1 - h_origin)"""
    rest = 1 - h_origin
    return ((v - v_origin) * rest + v_origin * (h - h_origin)) / ((1 - h) * rest)


@triton.jit(do_not_specialize=["alpha_bits"])
def log_kernel(
    x, x_stride, solution, alpha, alpha_stride, alpha_bits: tl.int64, out, n,
    COMPLEMENT: tl.constexpr, LARGEST: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """log p or log(1 - p) from x and the solution."""
    row = tl.program_id(0).to(tl.int64)
    r_A = tl.load(solution + row * 5)
    r_B = tl.load(solution + row * 5 + 1)
    P = tl.load(solution + row * 5 + 2)
    Q = tl.load(solution + row * 5 + 3)
    D = tl.load(solution + row * 5 + 4)
    a = scale_in(per_row(alpha, alpha_stride, alpha_bits, row), T)
    scale, rate = exponent(a, T)
    before, per_alpha, _ = steps(a, T)
    _, _, _, log_h_A, log_h_B = log_densities(r_A, r_B, P, Q, D, a)
    log_h = (log_h_A if COMPLEMENT else log_h_B).to(T)
    h = tl.exp(log_h_B if COMPLEMENT else log_h_A).to(T)
    origin_A = tl.where(tl.abs(r_A) < INF, r_A, 0) * before
    origin_B = tl.where(tl.abs(r_B) < INF, r_B, 0) * before
    start = tl.zeros((), tl.int32)
    while start < n:
        values = read(x + row * x_stride, start, n, LARGEST, BLOCK, T)
        above = values >= r_A
        t = (values * before - tl.where(above, origin_A, origin_B)) * per_alpha
        rest = log_of_rest(h * tails(values, r_A, r_B, scale, rate))
        weight = tl.where(above == COMPLEMENT, log_h - tl.abs(t) * 2.0**64, rest)
        weight = tl.where(D == D, weight, float("nan"))
        i = start + tl.arange(0, BLOCK)
        tl.store(out + row * n + i, weight.to(out.dtype.element_ty), mask=i < n)
        start += BLOCK


@triton.jit(do_not_specialize=["alpha_bits"])
def log_backward_kernel(
    x, x_stride, solution, alpha, alpha_stride, alpha_bits: tl.int64, v, v_stride,
    grad_x, grad_k, grad_alpha, n,
    COMPLEMENT: tl.constexpr, LARGEST: tl.constexpr,
    T: tl.constexpr, BLOCK: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_row = x + row * x_stride
    v_row = v + row * v_stride
    x_tile = read(x_row, 0, n, LARGEST, BLOCK, T)
    v_tile = read(v_row, 0, n, True, BLOCK, T)
    r_A = tl.load(solution + row * 5)
    r_B = tl.load(solution + row * 5 + 1)
    P = tl.load(solution + row * 5 + 2)
    Q = tl.load(solution + row * 5 + 3)
    D = tl.load(solution + row * 5 + 4)
    a = scale_in(per_row(alpha, alpha_stride, alpha_bits, row), T)
    scale, base_2 = exponent(a, T)
    before, rate, after = steps(a, T)
    free = (P > 0) | (Q > 0)  # not so where k was clamped: nothing could move there

    R, w_A, w_B, log_h_A, log_h_B = log_densities(r_A, r_B, P, Q, D, a)
    w_major = (w_B if COMPLEMENT else w_A).to(T)
    w_minor = (w_A if COMPLEMENT else w_B).to(T)
    q_A = tl.where(P == 0, 0, w_A / P.to(tl.float64)).to(T)
    q_B = tl.where(Q == 0, 0, w_B / Q.to(tl.float64)).to(T)
    h_A = tl.exp(log_h_A).to(T)
    h_B = tl.exp(log_h_B).to(T)

    # The pivot is the first element of the largest q.
    at_A = q_A >= q_B
    x_pivot = tl.where(at_A, r_A, r_B)
    pivot = tl.zeros((), tl.int32) + n
    start = tl.zeros((), tl.int32)
    while start < (BLOCK if RESIDENT else n):
        values = chunk(x_tile, x_row, start, n, LARGEST, RESIDENT, BLOCK)
        i = start + tl.arange(0, BLOCK)
        pivot = tl.minimum(pivot, tl.min(tl.where(values == x_pivot, i, n)))
        start += BLOCK
    v_pivot = tl.load(v_row + pivot, mask=pivot < n, other=0).to(T)
    pivot_major = q_A < q_B if COMPLEMENT else q_A >= q_B
    # u is taken relative to the pivot's, if that is major; exactly 0 at the pivot, where a difference of
    # two quotients need not be (a compiler may fuse one with the subtraction).
    v_origin = tl.where(pivot_major, v_pivot, 0)
    h_origin = tl.where(pivot_major, tl.where(at_A, h_A, h_B), 0)
    u_pivot = v_origin / (1 - h_origin)
    dominates = (pivot_major == 0) & (tl.where(at_A, q_A, q_B) > 0.75)
    dominant = tl.where(dominates, 0.75, INF).to(T)

    mean_u = tl.zeros((), T)
    mean_t = tl.zeros((), T)
    rest_q = tl.zeros((), T)
    rest_v = tl.zeros((), T)
    start = tl.zeros((), tl.int32)
    while start < (BLOCK if RESIDENT else n):
        values = chunk(x_tile, x_row, start, n, LARGEST, RESIDENT, BLOCK)
        incoming = chunk(v_tile, v_row, start, n, True, RESIDENT, BLOCK)
        above = values >= r_A
        minor = (above == COMPLEMENT) & (tl.abs(values) < INF)
        e = tails(values, r_A, r_B, scale, base_2)
        q = tl.where(above, q_A, q_B) * e
        du = relative_u(incoming, tl.where(above, h_A, h_B) * e, v_origin, h_origin)
        mean_u += tl.sum(tl.where(minor | (q == 0), 0, q * du))
        mean_t += tl.sum(tl.where(q == 0, 0, q * ((values * before - x_pivot * before) * rate)))
        rest_q += tl.sum(tl.where(q <= dominant, q, 0))
        rest_v += tl.sum(tl.where(minor & (q <= dominant), incoming, 0))
        start += BLOCK
    M = u_pivot * w_major + mean_u
    shift = u_pivot * w_minor - mean_u
    V = rest_v + tl.where(dominates, v_pivot, 0)

    sign = -1 if COMPLEMENT else 1
    covariance = tl.zeros((), T)
    start = tl.zeros((), tl.int32)
    while start < (BLOCK if RESIDENT else n):
        values = chunk(x_tile, x_row, start, n, LARGEST, RESIDENT, BLOCK)
        incoming = chunk(v_tile, v_row, start, n, True, RESIDENT, BLOCK)
        above = values >= r_A
        minor = (above == COMPLEMENT) & (tl.abs(values) < INF)
        e = tails(values, r_A, r_B, scale, base_2)
        q = tl.where(above, q_A, q_B) * e
        h = tl.where(above, h_A, h_B) * e
        u = incoming / (1 - h)
        centred = tl.where(q <= dominant, incoming - q * V, incoming * rest_q - q * rest_v) - h * M
        on_major = tl.where(q == 0, 0, h * (relative_u(incoming, h, v_origin, h_origin) + shift) - q * V)
        z = tl.where(minor, tl.where(q == 0, incoming, centred), on_major)
        g = tl.where(minor, incoming, tl.where(q == 0, 0, h * u))
        dt = tl.where(minor | (q != 0), (values * before - x_pivot * before) * rate - mean_t, 0)
        covariance += tl.sum(g * dt)
        gradient = sign * ((z * after) * rate)
        if not LARGEST:
            gradient = -gradient
        gradient = tl.where(D == D, tl.where(free, gradient, 0), float("nan"))
        i = start + tl.arange(0, BLOCK)
        tl.store(grad_x + row * n + i, gradient.to(grad_x.dtype.element_ty), mask=i < n)
        start += BLOCK

    to_k = sign * (tl.where(V == 0, 0, V.to(tl.float64) / R) + M)
    to_alpha = -sign * (covariance.to(tl.float64) / a) * 2.0**64
    to_k = tl.where(D == D, tl.where(free, to_k, 0), float("nan"))
    to_alpha = tl.where(D == D, tl.where(free, to_alpha, 0), float("nan"))
    tl.store(grad_k + row, to_k.to(T))
    tl.store(grad_alpha + row, to_alpha.to(T))
