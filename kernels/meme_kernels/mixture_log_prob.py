"""Log density of a mixture of M diagonal components, at each of R points:

    out_r = log sum_m exp(log_weight_m) q_m(z_r),      q_m Normal or Laplace with mean_m, scale_m [D]

With u = (z_r - mean_m) / scale_m and the share w_rm = g_r exp(log_weight_m) q_m(z_r) / exp(out_r):

    Normal:   dz_r = -sum_m w u / scale,         dmean_m = sum_r w u / scale,         dscale_m = sum_r w (u^2 - 1) / scale
    Laplace:  dz_r = -sum_m w sign(u) / scale,   dmean_m = sum_r w sign(u) / scale,   dscale_m = sum_r w (|u| - 1) / scale
    both:     dlog_weight_m = sum_r w

Differences are squared directly. Expanded into matrix products the exponent cancels: with means 100 scales from the origin float32 loses
0.3 nats and TF32 100, float64 everything at a scale of e^-30. Neither [R, M, D] nor [R, M] is held: a running (maximum, sum) pair a row.

Bound: every (r, m, d) costs 3 float32 instructions forward (subtract, multiply, multiply-add; Laplace: add the magnitude), and backward
10 (3 for the exponent again, 3 for dz, 4 for dmean and dscale). At L lane instructions a second that is 3 R M D / L and 10 R M D / L
seconds; an H100 has L = 132 SMs * 128 lanes * 1.755 GHz = 29.6e12: 0.10 and 0.34 ps each. The bytes, (R + 2 M) D numbers, do not count.

Backward, the shares are computed once, for as many rows at a time as fill 2^23 (64 rows at least), and written both ways round (64 MiB in
float32); a kernel that owns rows and one that owns components read them, so that no loop sums across threads. Computing them in both would
cost 13 instructions instead of 10 and a reduction for every d. Saved for backward: the inputs, and two numbers a row.
Every sum is taken in one order, splits by a second pass: no atomics, bitwise repeatable.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from meme_kernels import _mixture_log_prob_kernels as kernels
from meme_kernels._launch import block, cdiv
from meme_kernels._op import Case, Cost, FusedOp, Size, at_a_time, nbytes, opaque, run, sums_dtype, through_reference, uses_triton
from meme_kernels._triton import tl

Family = Literal["normal", "laplace"]

PROGRAMS = 528  # that fill a large GPU: four for each of 132 multiprocessors
SHARES = 2**23  # held at once in the backward pass
PATCH = 64  # rows or components in a tile of the gradient kernels, and the multiple that shares are padded to
ELEMENTS = 2**18  # of [rows, M, D] at a time in the reference on a CPU: a megabyte, what a core's cache holds


def mixture_log_prob(z: Tensor, mean: Tensor, scale: Tensor, log_weight: Tensor | None = None, *, family: Family = "normal") -> Tensor:
    """z [R, D], mean and scale [M, D], log_weight [M] -> [R], float32 (float64 for float64).

    Without log_weight all weights are 1 / M. With it they are used as they are: they need not sum to one, and a component of weight
    -inf is absent, whatever its parameters hold. Where all are absent the value is -inf and the gradient 0.
    Scales between 1e-18 and 1e18. Raises ValueError for other shapes, another family and M = 0.
    """
    _check(z, mean, scale, log_weight, family)
    chosen = _Mixture if uses_triton(z, mean, scale, log_weight) else _Reference
    return chosen.apply(z, *_weighted(mean, scale, log_weight), family == "laplace")


def reference(z: Tensor, mean: Tensor, scale: Tensor, log_weight: Tensor | None = None, *, family: Family = "normal") -> Tensor:
    """The specification, on any device and in any floating type. It goes block by block over rows (whole under torch.compile), forward and
    backward, and saves its inputs alone; only a second derivative holds [R, M, D]."""
    _check(z, mean, scale, log_weight, family)
    return _Reference.apply(z, *_weighted(mean, scale, log_weight), family == "laplace")


def naive(z: Tensor, mean: Tensor, scale: Tensor, log_weight: Tensor | None = None, *, family: Family = "normal") -> Tensor:
    """As commonly written: several [R, M, D] tensors."""
    u = (z[:, None] - mean) / scale
    if family == "normal":
        each = -u.square() / 2 - scale.log() - math.log(2 * math.pi) / 2
    else:
        each = -u.abs() - scale.log() - math.log(2)
    return torch.logsumexp(each.sum(-1) + (-math.log(len(mean)) if log_weight is None else log_weight), -1)


def _weighted(mean: Tensor, scale: Tensor, log_weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """mean, scale and log_weight; an absent component holds the standard one, which its weight then removes."""
    if log_weight is None:
        return mean, scale, mean.new_full((len(mean),), -math.log(len(mean)), dtype=sums_dtype(mean))
    there = (log_weight != -torch.inf)[:, None]
    return torch.where(there, mean, 0.0), torch.where(there, scale, 1.0), log_weight


def _check(z: Tensor, mean: Tensor, scale: Tensor, log_weight: Tensor | None, family: str) -> None:
    if family not in ("normal", "laplace"):
        raise ValueError(f"mixture_log_prob: expected family 'normal' or 'laplace', got {family!r}")
    shapes = [tuple(x.shape) for x in (z, mean, scale)]
    if len(shapes[0]) != 2 or len(shapes[1]) != 2 or shapes[1] != shapes[2] or shapes[0][1] != shapes[1][1] or shapes[1][0] == 0:
        raise ValueError(f"mixture_log_prob: expected z [R, D], mean and scale [M, D] with M > 0, got {shapes}")
    if log_weight is not None and tuple(log_weight.shape) != shapes[1][:1]:
        raise ValueError(f"mixture_log_prob: expected log_weight [{shapes[1][0]}], got {tuple(log_weight.shape)}")


# ---- reference --------------------------------------------------------------------------------------------------------------------------


def _blocks(z: Tensor, mean: Tensor) -> int:
    """Rows at a time."""
    return max(len(z), 1) if torch.compiler.is_compiling() else max(1, at_a_time(ELEMENTS, z.device) // max(mean.numel(), 1))


def _parts(z: Tensor, mean: Tensor, scale: Tensor, log_weight: Tensor, laplace: bool) -> tuple[Tensor, Tensor]:
    """Some rows' u [rows, M, D] and scores [rows, M]."""
    u = (z[:, None] - mean) / scale
    height, norm = (u.abs(), math.log(2)) if laplace else (u.square() / 2, math.log(2 * math.pi) / 2)
    return u, log_weight - (height + scale.log() + norm).sum(-1)


class _Reference(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, mean: Tensor, scale: Tensor, log_weight: Tensor, laplace: bool) -> Tensor:
        ctx.save_for_backward(z, mean, scale, log_weight)
        ctx.laplace = laplace
        wide = sums_dtype(z, mean, scale, log_weight)
        z, mean, scale, log_weight = (x.to(wide) for x in (z, mean, scale, log_weight))
        return torch.cat([torch.logsumexp(_parts(rows, mean, scale, log_weight, laplace)[1], -1) for rows in z.split(_blocks(z, mean))])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """In differentiable operations, so that autograd gives the second derivative."""
        saved = ctx.saved_tensors
        (g,) = gradients
        z, mean, scale, log_weight = (x.to(g.dtype) for x in saved)
        of_z: list[Tensor] = []
        sums: list[Tensor] = []
        size = _blocks(z, mean)
        for rows, upstream in zip(z.split(size), g.split(size), strict=True):
            u, score = _parts(rows, mean, scale, log_weight, ctx.laplace)
            empty = (score == -torch.inf).all(-1, keepdim=True)
            share = upstream[:, None] * torch.where(empty, 0.0, torch.softmax(torch.where(empty, 0.0, score), -1))
            pull = share[..., None] * (u.sign() if ctx.laplace else u)
            of_z.append(-(pull / scale).sum(1))
            mass = share.sum(0)
            part = [pull.sum(0) / scale, ((pull * u).sum(0) - mass[:, None]) / scale, mass]
            sums = [a + b for a, b in zip(sums, part, strict=True)] if sums else part
        return *(y.to(x.dtype) for x, y in zip(saved, (torch.cat(of_z), *sums), strict=True)), None


# ---- launch and binding -----------------------------------------------------------------------------------------------------------------


class _Tile(NamedTuple):
    """Registers along both axes, and the sizes that follow."""

    XM: int
    XR: int
    components: int
    rows: int


def _tile(num_rows: int, num_components: int) -> _Tile:
    """Up to 64 x 64, 32 numbers a thread; smaller where that would leave a GPU idle, for then latency counts, not instructions."""
    xm = block(cdiv(num_components, kernels.THREADS_M), most=4)
    xr = block(cdiv(num_rows, kernels.THREADS_R), most=8)
    while xm * xr > 1 and cdiv(num_components, xm * kernels.THREADS_M) * cdiv(num_rows, xr * kernels.THREADS_R) < PROGRAMS // 2:
        xm, xr = (xm, xr // 2) if xr >= 2 * xm else (xm // 2, xr)
    return _Tile(xm, xr, xm * kernels.THREADS_M, xr * kernels.THREADS_R)


def _accumulator(like: Tensor) -> Any:
    return tl.float64 if like.dtype == torch.float64 else tl.float32


def _settings(tile: _Tile, laplace: bool, like: Tensor) -> dict[str, Any]:
    shape = {"XM": tile.XM, "XR": tile.XR, "TM": kernels.THREADS_M, "TR": kernels.THREADS_R}
    return shape | {"LAPLACE": laplace, "ACC": _accumulator(like), "num_warps": 4}


def _wider(x: Tensor, rows: int, columns: int) -> Tensor:
    """x [r, c] with zeros up to multiples of `rows` and `columns`, contiguous."""
    short = (-len(x) % rows, -x.shape[1] % columns)
    return pad(x, (0, short[1], 0, short[0])) if any(short) else x.contiguous()


def _operands(mean: Tensor, scale: Tensor, log_weight: Tensor, wide: torch.dtype, multiple: int, laplace: bool) -> tuple[Tensor, ...]:
    """mean and rate [D, MP], constant [MP]."""
    (m, d), padded = mean.shape, cdiv(len(mean), multiple) * multiple
    centre, rate, constant = (mean.new_empty(*shape, dtype=wide) for shape in ((d, padded), (d, padded), (padded,)))
    bm, bd = 16, block(d, most=32)
    run(
        kernels.operands_kernel, (cdiv(padded, bm),), mean.contiguous(), scale.contiguous(), log_weight.contiguous(),
        centre, rate, constant, m, padded, d, BM=bm, BD=bd, LAPLACE=laplace, ACC=_accumulator(rate), num_warps=4,
    )  # fmt: skip
    return centre, rate, constant


def _fake_forward(z: Tensor, mean: Tensor, scale: Tensor, log_weight: Tensor, laplace: bool) -> tuple[Tensor, Tensor, Tensor]:
    wide = sums_dtype(z, mean, scale, log_weight)
    out, top, total = (z.new_empty(len(z), dtype=wide) for _ in range(3))
    return out, top, total


@opaque(_fake_forward)
def _forward(z: Tensor, mean: Tensor, scale: Tensor, log_weight: Tensor, laplace: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The log density of each row, and its pair in bits: log2 of the largest term, and the sum in units of it."""
    out, top, total = _fake_forward(z, mean, scale, log_weight, laplace)
    r, (m, d) = len(z), mean.shape
    tile = _tile(r, m)
    row_tiles, tiles = cdiv(r, tile.rows), cdiv(m, tile.components)
    each = cdiv(tiles, cdiv(PROGRAMS, max(row_tiles, 1)))  # tiles of components for one program
    splits = cdiv(tiles, each)
    rows = _wider(z.T.to(out.dtype), 1, tile.rows)
    mean, rate, constant = _operands(mean, scale, log_weight, out.dtype, each * tile.components, laplace)
    tops, totals = (out.new_empty(splits, r) for _ in range(2))
    sizes = (r, rows.shape[1], len(constant), d, each, splits)
    run(kernels.density_kernel, (row_tiles * splits,), rows, mean, rate, constant, tops, totals, *sizes, **_settings(tile, laplace, out))
    run(kernels.merge_kernel, (cdiv(r, 256),), tops, totals, out, top, total, r, splits, BLOCK=256, ACC=_accumulator(out), num_warps=4)
    return out, top, total


def _fake_backward(
    g: Tensor, z: Tensor, mean: Tensor, scale: Tensor, log_weight: Tensor, top: Tensor, total: Tensor, laplace: bool, need: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_rows, of_components = (z.shape if need[0] else (0, 0)), (mean.shape if need[1] else (0, 0))
    return z.new_empty(of_rows), mean.new_empty(of_components), scale.new_empty(of_components), log_weight.new_empty(of_components[0])


@opaque(_fake_backward)
def _backward(
    g: Tensor, z: Tensor, mean: Tensor, scale: Tensor, log_weight: Tensor, top: Tensor, total: Tensor, laplace: bool, need: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of z, mean, scale and log_weight; `need` says whether rows and whether components want theirs (else empty)."""
    of_z, of_mean, of_scale, of_weight = _fake_backward(g, z, mean, scale, log_weight, top, total, laplace, need)
    m, d = mean.shape
    chunk = _rows_of_shares(m)
    tile = _tile(min(chunk, len(z)), m)
    operands = _operands(mean, scale, log_weight, g.dtype, PATCH, laplace)
    patch = _Patch.across(d)
    centre, slope = _wider(mean, 1, patch.coordinates), _slope(scale, g.dtype, laplace, patch.coordinates)
    zeros = partial(mean.new_zeros, dtype=g.dtype)
    first, second, mass = (zeros(x) for x in (of_mean.shape, of_mean.shape, of_weight.shape))
    for start in range(0, len(z), chunk):
        chosen = slice(start, start + chunk)
        by_row, by_component = _shares(g[chosen], z[chosen], top[chosen], total[chosen], operands, m, tile, laplace)
        rows = _wider(z[chosen], 1, patch.coordinates)
        if need[0]:
            _row_gradient(rows, centre, slope, by_component, of_z[chosen], patch, laplace)
        if need[1]:
            sums = _component_sums(rows, centre, by_row, m, d, patch, laplace)
            first, second, mass = (x + y for x, y in zip((first, second, mass), sums, strict=True))
        del by_row, by_component  # before the next ones are made
    if need[1]:
        inverse = scale.to(g.dtype).reciprocal()
        of_mean.copy_(first * inverse if laplace else first * inverse * inverse)
        of_scale.copy_(((second * inverse if laplace else second * inverse * inverse) - mass[:, None]) * inverse)
        of_weight.copy_(mass)
    return of_z, of_mean, of_scale, of_weight


def _rows_of_shares(m: int) -> int:
    """Rows whose shares are held at a time."""
    return max(64, SHARES // m // 64 * 64)


def _shares(
    g: Tensor, z: Tensor, top: Tensor, total: Tensor, operands: tuple[Tensor, ...], m: int, tile: _Tile, laplace: bool
) -> tuple[Tensor, Tensor]:
    """The shares of these rows, [rows, MP] and [M, rows and padding]."""
    mean, rate, constant = operands
    rows = _wider(z.T.to(g.dtype), 1, PATCH)
    (d, mp), (r, rp) = mean.shape, (len(z), rows.shape[1])
    by_row, by_component = g.new_empty(r, mp), g.new_empty(m, rp)
    grid = (rp // tile.rows * (mp // tile.components),)
    settings = _settings(tile, laplace, g)
    run(kernels.responsibility_kernel, grid, rows, mean, rate, constant, top, total, g, by_row, by_component, r, rp, m, mp, d, **settings)
    return by_row, by_component


class _Patch(NamedTuple):
    """PATCH rows or components x up to 64 coordinates, a tile of the gradient kernels: registers along coordinates, coordinates in all."""

    XD: int
    coordinates: int

    @classmethod
    def across(cls, d: int) -> "_Patch":
        """32 numbers a thread where D > 32."""
        xd = block(cdiv(d, kernels.THREADS_D), most=4)
        return cls(xd, xd * kernels.THREADS_D)

    def splits(self, owners: int, d: int, terms: int) -> tuple[int, int]:
        """In how many parts to take a sum of `terms` for these owners, and how many terms a part has: at least 16."""
        programs = cdiv(owners, PATCH) * cdiv(d, self.coordinates)
        span = max(16, cdiv(terms, cdiv(PROGRAMS, max(programs, 1))))
        return max(cdiv(terms, span), 1), span


def _slope(scale: Tensor, wide: torch.dtype, laplace: bool, multiple: int) -> Tensor:
    """1 / scale^2 (Laplace: 1 / scale) [M, DP]."""
    inverse = scale.to(wide).reciprocal()
    return _wider(inverse if laplace else inverse.square(), 1, multiple)


def _row_gradient(z: Tensor, mean: Tensor, slope: Tensor, share: Tensor, out: Tensor, patch: _Patch, laplace: bool) -> None:
    """To `out` [R, D], from z [R, DP], mean and slope [M, DP] and share [M, RP]."""
    (r, d), m = out.shape, len(mean)
    splits, span = patch.splits(r, d, m)
    target = out if splits == 1 else slope.new_empty(splits, r, d)
    grid = (cdiv(r, PATCH) * splits * cdiv(d, patch.coordinates),)
    sizes = (r, share.shape[1], m, d, z.shape[1], span, splits)
    run(
        kernels.row_gradient_kernel, grid, z, mean, slope, share, target, *sizes,
        XR=PATCH // kernels.THREADS_R, XD=patch.XD, TR=kernels.THREADS_R, TD=kernels.THREADS_D,
        LAPLACE=laplace, ACC=_accumulator(slope), num_warps=4,
    )  # fmt: skip
    if splits > 1:
        out.copy_(target.sum(0))


def _component_sums(z: Tensor, mean: Tensor, share: Tensor, m: int, d: int, patch: _Patch, laplace: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the rows z [R, DP] with mean [M, DP] and shares [R, MP]: two [M, D], and of the shares alone [M]."""
    splits, span = patch.splits(m, d, len(z))
    first, second = (share.new_empty(splits, m, d) for _ in range(2))
    xm = PATCH // kernels.THREADS_R // (2 if laplace else 1)  # choosing a sign takes registers
    grid = (cdiv(m, xm * kernels.THREADS_R) * splits * cdiv(d, patch.coordinates),)
    sizes = (len(z), m, share.shape[1], d, z.shape[1], span, splits)
    run(
        kernels.component_gradient_kernel, grid, z, mean, share, first, second, *sizes,
        XM=xm, XD=patch.XD, TM=kernels.THREADS_R, TD=kernels.THREADS_D, LAPLACE=laplace, ACC=_accumulator(share), num_warps=4,
    )  # fmt: skip
    return first.sum(0), second.sum(0), share[:, :m].sum(0)


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, mean: Tensor, scale: Tensor, log_weight: Tensor, laplace: bool) -> Tensor:
        out, top, total = _forward(z, mean, scale, log_weight, laplace)
        ctx.save_for_backward(z, mean, scale, log_weight, top, total)
        ctx.laplace = laplace
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        z, mean, scale, log_weight, top, total = ctx.saved_tensors
        if torch.is_grad_enabled():
            return through_reference(_Reference.apply, (z, mean, scale, log_weight, ctx.laplace), gradients)
        need = ctx.needs_input_grad[:4]
        g = gradients[0].contiguous()
        found = _backward(g, z, mean, scale, log_weight, top, total, ctx.laplace, [need[0], any(need[1:])])
        return *(x if wanted else None for x, wanted in zip(found, need, strict=True)), None


# ---- what the op says of itself ---------------------------------------------------------------------------------------------------------

_SIZES: dict[Size, list[tuple[int, int, int]]] = {  # R, M, D
    "tiny": [(1, 1, 1), (5, 3, 2), (17, 33, 7), (9, 65, 16), (70, 8, 20), (3, 130, 5), (0, 4, 3), (2, 1, 65)],
    "small": [(256, 128, 20)],
    "paper": [(11 * 128, 128, 64)],
    "large": [(2**16, 4096, 64)],
}


def _cases(size: Size, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    families: list[Family] = ["normal", "laplace"]
    for i, (r, m, d) in enumerate(_SIZES[size]):
        tensors = [torch.randn(r, d, device=device), torch.randn(m, d, device=device), torch.rand(m, d, device=device) + 0.5]
        if size == "tiny" and i % 2 or size == "small":
            tensors.append(torch.randn(m, device=device))
        leaves = tuple(x.to(dtype).requires_grad_() for x in tensors)
        for family in families if size != "tiny" else [families[i // 2 % 2]]:
            yield Case(f"R={r} M={m} D={d} {family}{' weighted' * (len(leaves) > 3)}", leaves, {"family": family})


def _cost(
    z: Tensor, mean: Tensor, scale: Tensor, log_weight: Tensor | None = None, *, family: Family = "normal", backward: bool = False
) -> Cost:
    inputs, row, work = nbytes(z, mean, scale, log_weight), len(z) * sums_dtype(z, mean).itemsize, len(z) * mean.numel()
    return Cost(inputs + 3 * row, inputs, 13 * work) if backward else Cost(inputs, row, 4 * work)


def _workspace(z: Tensor, mean: Tensor, scale: Tensor, log_weight: Tensor | None = None, *, family: Family = "normal") -> int:
    """The shares of some rows, both ways round, and the partial sums of both gradients."""
    (m, d), rows = mean.shape, min(_rows_of_shares(len(mean)), len(z))
    patch = _Patch.across(d)
    partial_sums = 2 * patch.splits(m, d, rows)[0] * m * d + patch.splits(rows, d, m)[0] * rows * d
    return (2 * rows * m + partial_sums) * sums_dtype(z, mean).itemsize


OP = FusedOp(
    name="mixture_log_prob", call=mixture_log_prob, reference=reference, naive=naive, cases=_cases, cost=_cost, workspace=_workspace
)
