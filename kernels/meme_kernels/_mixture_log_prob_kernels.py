"""Triton kernels of mixture_log_prob: operands, log densities, responsibilities, and the two gradients that are sums over them.

How a tile is laid out. A thread that holds x components of y rows loads 2 x + y numbers for the 3 x y instructions of one coordinate, so
it should hold a square patch, not a line; Triton's default layout gives it a line. Hence tiles of four axes: two of registers (XM, XR) and
two of threads (TM * TR = 128), component m = i * TM + j, row r = k * TR + l. A vector that a loop step loads has fewer numbers than the
program has threads: Triton then loads it straight into that layout, without shared memory or a barrier. Operands come padded to whole
tiles, because a mask costs an instruction for every number loaded.
"""

from meme_kernels._triton import jit, tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NORMAL_RATE = tl.constexpr(0.8493218002880191)  # sqrt(log2(e) / 2): the square of a difference times rate is in bits
NORMAL_BITS = tl.constexpr(1.3257480647361593)  # log2(2 pi) / 2
THREADS_M, THREADS_R, THREADS_D = 16, 8, 16  # of a tile; 128 in all: 16 components x 8 rows, or 8 rows or components x 16 coordinates


@jit
def operands_kernel(
    mean_ptr, scale_ptr, weight_ptr, mean_out, rate_out, constant_out, M, MP, D,
    BM: tl.constexpr, BD: tl.constexpr, LAPLACE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """mean and rate [D, MP], constant [MP]: a log density in bits is constant - sum_d ((z - mean) rate)^2, or |.| for Laplace."""
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    logs = tl.zeros((BM,), ACC)
    for first in range(0, D, BD):
        d = first + tl.arange(0, BD)
        inside = (m < M)[:, None] & (d < D)[None, :]
        source = m[:, None] * D + d[None, :]
        mean = tl.load(mean_ptr + source, mask=inside, other=0.0).to(ACC)
        scale = tl.load(scale_ptr + source, mask=inside, other=1.0).to(ACC)
        rate = tl.where(inside, (LOG2E if LAPLACE else NORMAL_RATE) / scale, 0.0)
        logs += tl.sum(tl.log2(scale), 1)
        target = d.to(tl.int64)[None, :] * MP + m[:, None]
        tl.store(mean_out + target, mean, mask=(m < MP)[:, None] & (d < D)[None, :])
        tl.store(rate_out + target, rate.to(ACC), mask=(m < MP)[:, None] & (d < D)[None, :])
    weight = tl.load(weight_ptr + m, mask=m < M, other=0.0).to(ACC) * LOG2E
    constant = weight - logs - (tl.zeros((BM,), ACC) + (1.0 if LAPLACE else NORMAL_BITS)) * D
    tl.store(constant_out + m, tl.where(m < M, constant, float("-inf")), mask=m < MP)


@jit
def _exponents(
    z_at, mean_at, rate_at, RP, MP, D,
    XM: tl.constexpr, XR: tl.constexpr, TM: tl.constexpr, TR: tl.constexpr, LAPLACE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A tile [XM, XR, TM, TR] of sum_d ((z - mean) rate)^2 or |(z - mean) rate|: three instructions a number."""
    m = (tl.arange(0, XM).to(tl.int64) * TM)[:, None, None, None] + tl.arange(0, TM).to(tl.int64)[None, None, :, None]
    r = (tl.arange(0, XR).to(tl.int64) * TR)[None, :, None, None] + tl.arange(0, TR).to(tl.int64)[None, None, None, :]
    total = tl.zeros((XM, XR, TM, TR), ACC)
    for _ in range(D):
        u = (tl.load(z_at + r).to(ACC) - tl.load(mean_at + m).to(ACC)) * tl.load(rate_at + m).to(ACC)
        total += tl.abs(u) if LAPLACE else u * u
        z_at += RP  # stepped, not multiplied: no product to overflow
        mean_at += MP
        rate_at += MP
    return total


@jit
def density_kernel(
    z_ptr, mean_ptr, rate_ptr, constant_ptr, top_ptr, total_ptr, R, RP, MP, D, tiles, splits,
    XM: tl.constexpr, XR: tl.constexpr, TM: tl.constexpr, TR: tl.constexpr, LAPLACE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Partial pairs top = max_m, total = sum_m 2^(. - top) of XR * TR rows over `tiles` tiles of components, to [splits, R].

    Every thread keeps its own pair for the components it meets: threads speak to each other once, at the end.
    """
    program = tl.program_id(0).to(tl.int64)
    row, split = (program // splits) * (XR * TR), program % splits
    start = split * tiles * (XM * TM)
    z_at, mean_at, rate_at = z_ptr + row, mean_ptr + start, rate_ptr + start
    constant_at = constant_ptr + start + (tl.arange(0, XM) * TM)[:, None, None, None] + tl.arange(0, TM)[None, None, :, None]
    top = tl.full((XR, TM, TR), float("-inf"), ACC)
    total = tl.zeros((XR, TM, TR), ACC)
    for _ in range(tiles):
        score = tl.load(constant_at).to(ACC) - _exponents(z_at, mean_at, rate_at, RP, MP, D, XM, XR, TM, TR, LAPLACE, ACC)
        new = tl.maximum(top, tl.max(score, 0))
        safe = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2(top - safe) + tl.sum(tl.exp2(score - safe[None]), 0)
        top = new
        mean_at += XM * TM
        rate_at += XM * TM
        constant_at += XM * TM
    # Stored from the loop's own layout (lane 0 of TM writes): a smaller store would pull the loop into another layout.
    new = tl.max(top, 1, keep_dims=True)
    safe = tl.where(new == float("-inf"), 0.0, new)
    total = tl.sum(total * tl.exp2(top - safe), 1, keep_dims=True)
    lane = tl.arange(0, TM)[None, :, None]
    r = row + (tl.arange(0, XR) * TR)[:, None, None] + tl.arange(0, TR)[None, None, :] + lane * 0
    first = (r < R) & (lane == 0)
    tl.store(top_ptr + split * R + r, tl.broadcast_to(new, (XR, TM, TR)), mask=first)
    tl.store(total_ptr + split * R + r, tl.broadcast_to(total, (XR, TM, TR)), mask=first)


@jit
def merge_kernel(tops_ptr, totals_ptr, out_ptr, top_ptr, total_ptr, R, splits, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """The pairs of all splits, in their order, to one pair and to its log-sum-exp in nats."""
    r = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), float("-inf"), ACC)
    total = tl.zeros((BLOCK,), ACC)
    tops_at, totals_at = tops_ptr + r, totals_ptr + r
    for _ in range(splits):
        other = tl.load(tops_at, mask=r < R, other=float("-inf")).to(ACC)
        new = tl.maximum(top, other)
        safe = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2(top - safe) + tl.load(totals_at, mask=r < R, other=0.0).to(ACC) * tl.exp2(other - safe)
        top = new
        tops_at += R
        totals_at += R
    tl.store(out_ptr + r, (top + tl.log2(tl.where(total == 0, 1.0, total))) * LN2, mask=r < R)
    tl.store(top_ptr + r, top, mask=r < R)
    tl.store(total_ptr + r, total, mask=r < R)


@jit
def responsibility_kernel(
    z_ptr, mean_ptr, rate_ptr, constant_ptr, top_ptr, total_ptr, g_ptr, by_row_ptr, by_component_ptr, R, RP, M, MP, D,
    XM: tl.constexpr, XR: tl.constexpr, TM: tl.constexpr, TR: tl.constexpr, LAPLACE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A tile of g_r q_m(z_r) / sum q(z_r), written as [R, MP] and as [M, RP]; 0 in the padding and where every weight is 0."""
    program = tl.program_id(0).to(tl.int64)
    tiles = MP // (XM * TM)
    row, component = (program // tiles) * (XR * TR), (program % tiles) * (XM * TM)
    r = row + (tl.arange(0, XR) * TR)[None, :, None, None] + tl.arange(0, TR)[None, None, None, :]
    m = component + (tl.arange(0, XM) * TM)[:, None, None, None] + tl.arange(0, TM)[None, None, :, None]
    exponent = _exponents(z_ptr + row, mean_ptr + component, rate_ptr + component, RP, MP, D, XM, XR, TM, TR, LAPLACE, ACC)
    score = tl.load(constant_ptr + m).to(ACC) - exponent
    top = tl.load(top_ptr + r, mask=r < R, other=float("inf")).to(ACC)  # nothing is left of a padding row
    total = tl.load(total_ptr + r, mask=r < R, other=1.0).to(ACC)
    g = tl.load(g_ptr + r, mask=r < R, other=0.0).to(ACC)
    factor = tl.where(total == 0, 0.0, g / tl.where(total == 0, 1.0, total))
    share = factor * tl.exp2(score - tl.where(top == float("-inf"), 0.0, top))
    tl.store(by_row_ptr + r * MP + m, share, mask=tl.broadcast_to(r < R, (XM, XR, TM, TR)))
    tl.store(by_component_ptr + m * RP + r, share, mask=tl.broadcast_to(m < M, (XM, XR, TM, TR)))


@jit
def row_gradient_kernel(
    z_ptr, mean_ptr, slope_ptr, share_ptr, out_ptr, R, RP, M, D, DP, span, splits,
    XR: tl.constexpr, XD: tl.constexpr, TR: tl.constexpr, TD: tl.constexpr, LAPLACE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A tile of rows and coordinates of the sum over `span` components of share [M, RP] * slope [M, DP] * (mean - z, or its sign), to
    [splits, R, D]."""
    program = tl.program_id(0).to(tl.int64)
    tiles = DP // (XD * TD)
    column, split, row = (program % tiles) * (XD * TD), (program // tiles) % splits, (program // tiles // splits) * (XR * TR)
    r = (tl.arange(0, XR).to(tl.int64) * TR)[:, None, None, None] + tl.arange(0, TR).to(tl.int64)[None, None, :, None]
    d = (tl.arange(0, XD).to(tl.int64) * TD)[None, :, None, None] + tl.arange(0, TD).to(tl.int64)[None, None, None, :]
    z = tl.load(z_ptr + (row + r) * DP + column + d, mask=row + r < R, other=0.0).to(ACC)
    total = tl.zeros((XR, XD, TR, TD), ACC)
    start = split * span
    share_at, mean_at, slope_at = share_ptr + start * RP + row, mean_ptr + start * DP + column, slope_ptr + start * DP + column
    for _ in range(tl.minimum(span, M - start)):
        share = tl.load(share_at + r).to(ACC)
        slope = tl.load(slope_at + d).to(ACC)
        away = tl.load(mean_at + d).to(ACC) - z
        if LAPLACE:
            total += share * tl.where(away > 0, slope, tl.where(away < 0, -slope, 0.0))
        else:
            total += share * (away * slope)
        share_at += RP
        mean_at += DP
        slope_at += DP
    target = out_ptr + (split * R + row + r) * D + column + d
    tl.store(target, total.to(out_ptr.dtype.element_ty), mask=(row + r < R) & (column + d < D))


@jit
def component_gradient_kernel(
    z_ptr, mean_ptr, share_ptr, first_ptr, second_ptr, R, M, MP, D, DP, span, splits,
    XM: tl.constexpr, XD: tl.constexpr, TM: tl.constexpr, TD: tl.constexpr, LAPLACE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A tile of components and coordinates of the sums over `span` rows of share [R, MP] times z - mean and times (z - mean)^2
    (Laplace: its sign and |z - mean|), to two [splits, M, D]."""
    program = tl.program_id(0).to(tl.int64)
    tiles = DP // (XD * TD)
    column, split, component = (program % tiles) * (XD * TD), (program // tiles) % splits, (program // tiles // splits) * (XM * TM)
    m = (tl.arange(0, XM).to(tl.int64) * TM)[:, None, None, None] + tl.arange(0, TM).to(tl.int64)[None, None, :, None]
    d = (tl.arange(0, XD).to(tl.int64) * TD)[None, :, None, None] + tl.arange(0, TD).to(tl.int64)[None, None, None, :]
    mean = tl.load(mean_ptr + (component + m) * DP + column + d, mask=component + m < M, other=0.0).to(ACC)
    first = tl.zeros((XM, XD, TM, TD), ACC)
    second = tl.zeros((XM, XD, TM, TD), ACC)
    start = split * span
    share_at, z_at = share_ptr + start * MP + component, z_ptr + start * DP + column
    for _ in range(tl.minimum(span, R - start)):
        share = tl.load(share_at + m).to(ACC)
        away = tl.load(z_at + d).to(ACC) - mean
        pull = tl.where(away > 0, share, tl.where(away < 0, -share, 0.0)) if LAPLACE else share * away
        first += pull
        second += pull * away
        share_at += MP
        z_at += DP
    inside = (component + m < M) & (column + d < D)
    target = (split * M + component + m) * D + column + d
    tl.store(first_ptr + target, first, mask=inside)
    tl.store(second_ptr + target, second, mask=inside)
