"""Kernels of log_likelihood: a program owns a tile of data, rows [BP] by event elements [BE], and walks the K parameter sets over it.

So x, and what depends on x and extra alone (the special functions), is read and computed once for all k. EXTRA says what `extra` is:
"none", "scalar", "element" ([E]) or "full" ([K, P, E]). With "element" a program takes `depth` row tiles one after the other, so that
extra is read and its gradient written once for many rows.
"""

from meme_kernels._math import LOG_2PI
from meme_kernels._special import digamma_rest, log1p, log_ratio, sigmoid, softplus, stirling_rest
from meme_kernels._triton import jit, tl

LOG_2 = tl.constexpr(0.6931471805599453)


@jit
def _data(x_ptr, row_ptr, p, e, there, inside, X, E, HAS_ROW: tl.constexpr, ACC: tl.constexpr):
    """x [BP, BE] of these packed rows; NaN for a row number that names none of the X rows, which is not read."""
    if HAS_ROW:
        row = tl.load(row_ptr + p, mask=there, other=0)
        exists = ((row >= 0) & (row < X))[:, None]
        x = tl.load(x_ptr + row[:, None] * E + e[None, :], mask=inside & exists, other=0).to(ACC)
        return tl.where(exists, x, float("nan"))
    else:
        return tl.load(x_ptr + p[:, None] * E + e[None, :], mask=inside, other=0).to(ACC)


@jit
def _factors(x, s, FAMILY: tl.constexpr):
    """Two factors that spare a division for each k; x stands for those that a family does not need."""
    if FAMILY == "normal" or FAMILY == "laplace":
        return 1.0 / s, x
    elif FAMILY == "bernoulli":
        return x, x
    elif FAMILY == "poisson":
        return 1.0 / tl.where(x > 0.0, x, 1.0), x
    else:
        return 1.0 / tl.where(x > 0.0, x, 1.0), 1.0 / (x + s)


@jit
def _constant(x, s, FAMILY: tl.constexpr):
    """The part of the log density that does not depend on the parameter."""
    if FAMILY == "normal":
        return 0.0 * x - tl.log(s) - 0.5 * LOG_2PI
    elif FAMILY == "laplace":
        return 0.0 * x - tl.log(s) - LOG_2
    elif FAMILY == "bernoulli":
        return 0.0 * x
    else:
        safe = tl.where(x > 0.0, x, 1.0)
        minus_factorial = tl.where(x > 0.0, -stirling_rest(safe) - tl.log(safe), 0.0)  # x log x - x - log x!
        if FAMILY == "poisson":
            return minus_factorial
        else:
            return minus_factorial + stirling_rest(x + s) - stirling_rest(s)


@jit
def _term(x, theta, s, a, b, FAMILY: tl.constexpr):
    """The part of the log density that depends on the parameter theta. Counts are scored against their own best rate (Loader 2000):
    log p(x | theta) - log p(x | x), so that nothing large is ever subtracted."""
    t = theta - x
    if FAMILY == "normal":
        z = t * a
        return -0.5 * z * z
    elif FAMILY == "laplace":
        return -tl.abs(t) * a
    elif FAMILY == "bernoulli":
        return x * theta - softplus(theta)
    else:
        hit = tl.where(x > 0.0, x * log_ratio(theta * a, t * a), 0.0)
        if FAMILY == "poisson":
            return hit - t
        else:
            return hit - (x + s) * log_ratio((theta + s) * b, t * b)


@jit
def _slopes(x, theta, s, a, b, FAMILY: tl.constexpr, WANT_EXTRA: tl.constexpr, WANT_X: tl.constexpr):
    """Derivatives of the log density by theta, extra and x; the last two without `_constant_slopes`, and zero where not wanted."""
    t = theta - x
    by_extra = t * 0.0
    by_x = t * 0.0
    if FAMILY == "normal":
        z = t * a
        by_theta = -z * a
        by_extra = z * z * a
        by_x = z * a
    elif FAMILY == "laplace":
        sign = tl.where(t > 0.0, 1.0, tl.where(t < 0.0, -1.0, 0.0))
        by_theta = -sign * a
        by_extra = tl.abs(t) * a * a
        by_x = sign * a
    elif FAMILY == "bernoulli":
        by_theta = x - sigmoid(theta)
        by_x = theta
    elif FAMILY == "poisson":
        by_theta = -t / theta
        if WANT_X:
            by_x = tl.log(theta)
    else:
        spread = 1.0 / (theta + s)
        by_theta = -t / theta * (s * spread)
        if WANT_EXTRA or WANT_X:
            ratio = log_ratio((theta + s) * b, t * b)
            by_extra = t * spread - ratio
            by_x = tl.log(theta) - ratio
    return by_theta, by_extra, by_x


@jit
def _constant_slopes(x, s, a, FAMILY: tl.constexpr, WANT_EXTRA: tl.constexpr, WANT_X: tl.constexpr):
    """The parts of the derivatives by extra and by x that do not depend on the parameter."""
    by_extra = x * 0.0
    by_x = x * 0.0
    if FAMILY == "normal" or FAMILY == "laplace":
        by_extra -= a
    elif FAMILY == "poisson":
        if WANT_X:
            by_x = -digamma_rest(x + 1.0) - log1p(x)
    elif FAMILY == "negative_binomial":
        rest = digamma_rest(x + s) if WANT_EXTRA or WANT_X else x * 0.0
        if WANT_EXTRA:
            by_extra = rest - digamma_rest(s)
        if WANT_X:
            by_x = rest - digamma_rest(x + 1.0) - log1p(x)
    return by_extra, by_x


@jit
def forward_kernel(
    x_ptr, parameter_ptr, extra_ptr, row_ptr, out_ptr, X, K, P, E, step, depth,
    FAMILY: tl.constexpr, EXTRA: tl.constexpr, HAS_ROW: tl.constexpr, BP: tl.constexpr, BE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out [tiles of E, K, P]: the sum over one tile of the event. step = P E, from one k to the next."""
    tiles = tl.cdiv(E, BE)
    program = tl.program_id(0).to(tl.int64)
    tile = program % tiles
    e = tile * BE + tl.arange(0, BE)
    if EXTRA == "scalar":
        s = tl.load(extra_ptr).to(ACC)
    elif EXTRA == "element":
        s = tl.load(extra_ptr + e, mask=e < E, other=1.0).to(ACC)[None, :]
    for i in range(depth):
        p = ((program // tiles) * depth + i) * BP + tl.arange(0, BP)
        there = p < P
        inside = there[:, None] & (e < E)[None, :]
        x = _data(x_ptr, row_ptr, p, e, there, inside, X, E, HAS_ROW, ACC)
        base = tl.zeros((BP,), ACC)
        if EXTRA == "none":
            s = x
        if EXTRA != "full":
            a, b = _factors(x, s, FAMILY)
            base += tl.sum(tl.where(inside, _constant(x, s, FAMILY), 0.0), 1)
        offset = p[:, None] * E + e[None, :]
        out_at = out_ptr + tile * K * P + p
        for _ in range(K):
            theta = tl.load(parameter_ptr + offset, mask=inside, other=1.0).to(ACC)
            if EXTRA == "full":
                s = tl.load(extra_ptr + offset, mask=inside, other=1.0).to(ACC)
                a, b = _factors(x, s, FAMILY)
                term = _term(x, theta, s, a, b, FAMILY) + _constant(x, s, FAMILY)
            else:
                term = _term(x, theta, s, a, b, FAMILY)
            tl.store(out_at, tl.sum(tl.where(inside, term, 0.0), 1) + base, mask=there)
            offset += step
            out_at += P


@jit
def backward_kernel(
    g_ptr, x_ptr, parameter_ptr, extra_ptr, row_ptr, d_parameter_ptr, d_extra_ptr, d_x_ptr, X, K, P, E, step, depth,
    FAMILY: tl.constexpr, EXTRA: tl.constexpr, HAS_ROW: tl.constexpr, WANT_EXTRA: tl.constexpr, WANT_X: tl.constexpr,
    BP: tl.constexpr, BE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The parameter's gradient, x's (its sum over k) and extra's: element by element where full, else summed over this program's rows and
    all k into d_extra [programs] (scalar) or [row programs, E] (element), for a second sum."""
    tiles = tl.cdiv(E, BE)
    program = tl.program_id(0).to(tl.int64)
    e = (program % tiles) * BE + tl.arange(0, BE)
    if EXTRA == "scalar":
        s = tl.load(extra_ptr).to(ACC)
    elif EXTRA == "element":
        s = tl.load(extra_ptr + e, mask=e < E, other=1.0).to(ACC)[None, :]
    total = tl.zeros((BP, BE), ACC)
    for i in range(depth):
        p = ((program // tiles) * depth + i) * BP + tl.arange(0, BP)
        there = p < P
        inside = there[:, None] & (e < E)[None, :]
        x = _data(x_ptr, row_ptr, p, e, there, inside, X, E, HAS_ROW, ACC)
        if EXTRA == "none":
            s = x
        if EXTRA != "full":
            a, b = _factors(x, s, FAMILY)
            rest_extra, rest_x = _constant_slopes(x, s, a, FAMILY, WANT_EXTRA, WANT_X)
        sum_x = tl.zeros((BP, BE), ACC)
        offset, g_at = p[:, None] * E + e[None, :], g_ptr + p
        for _ in range(K):
            g = tl.load(g_at, mask=there, other=0.0).to(ACC)[:, None]
            theta = tl.load(parameter_ptr + offset, mask=inside, other=1.0).to(ACC)
            if EXTRA == "full":
                s = tl.load(extra_ptr + offset, mask=inside, other=1.0).to(ACC)
                a, b = _factors(x, s, FAMILY)
                rest_extra, rest_x = _constant_slopes(x, s, a, FAMILY, WANT_EXTRA, WANT_X)
            by_theta, by_extra, by_x = _slopes(x, theta, s, a, b, FAMILY, WANT_EXTRA, WANT_X)
            tl.store(d_parameter_ptr + offset, (g * by_theta).to(d_parameter_ptr.dtype.element_ty), mask=inside)
            if WANT_EXTRA:
                by_extra = g * (by_extra + rest_extra)
                if EXTRA == "full":
                    tl.store(d_extra_ptr + offset, by_extra.to(d_extra_ptr.dtype.element_ty), mask=inside)
                else:
                    total += by_extra
            if WANT_X:
                sum_x += g * (by_x + rest_x)
            offset += step
            g_at += P
        if WANT_X:
            tl.store(d_x_ptr + p[:, None] * E + e[None, :], sum_x.to(d_x_ptr.dtype.element_ty), mask=inside)
    if WANT_EXTRA and EXTRA == "scalar":
        tl.store(d_extra_ptr + program, tl.sum(tl.sum(tl.where((e < E)[None, :], total, 0.0), 1), 0))
    if WANT_EXTRA and EXTRA == "element":
        tl.store(d_extra_ptr + (program // tiles) * E + e, tl.sum(total, 0), mask=e < E)
