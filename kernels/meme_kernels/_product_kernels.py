"""Kernels and launches of the products of experts, with and without divergences.

The N experts are unrolled: a thread holds mean and precision of the N experts at its coordinates in registers and walks over the
subsets. A sum over experts never leaves the thread, N need be no power of two, and an expert outside a subset costs one predicated
instruction whose result is dropped, so that NaN in it reaches nothing. A program owns a tile [rows, coordinates] of one range of subsets.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from meme_kernels._launch import block, cdiv
from meme_kernels._op import opaque, run, sums_dtype
from meme_kernels._triton import jit, tl

# ---- device -----------------------------------------------------------------------------------------------------------------------------


@jit
def _experts(mean_at, scale_at, plane, inside, N: tl.constexpr, ACC: tl.constexpr):
    """Means and precisions of the N experts at a tile of coordinates; experts are `plane` numbers apart."""
    mean = ()
    precision = ()
    for _n in tl.static_range(N):  # type: ignore
        scale = tl.load(scale_at, mask=inside, other=1.0).to(ACC)
        mean += (tl.load(mean_at, mask=inside, other=0.0).to(ACC),)
        precision += (1.0 / (scale * scale),)
        mean_at += plane
        scale_at += plane
    return mean, precision


@jit
def _members(mask_at, b, B, N: tl.constexpr, PER_ROW: tl.constexpr):
    """Which experts are in one subset: N truths [1, 1], or [rows, 1] where rows differ."""
    members = ()
    for _n in tl.static_range(N):  # type: ignore
        if PER_ROW:
            members += ((tl.load(mask_at + b, mask=b < B, other=0) != 0)[:, None],)
            mask_at += B
        else:
            members += (tl.load(mask_at) != 0,)
            mask_at += 1
    return members


@jit
def _product(mean, precision, members, zero, N: tl.constexpr, STANDARD: tl.constexpr):
    """Mean and precision of one subset's product; an empty one is N(0, I)."""
    moment = zero
    total = zero + 1.0 if STANDARD else zero
    empty = 1.0
    for n in tl.static_range(N):  # type: ignore
        moment = tl.where(members[n], moment + precision[n] * mean[n], moment)
        total = tl.where(members[n], total + precision[n], total)
        empty = tl.where(members[n], 0.0, empty)
    if not STANDARD:
        total += empty
    return moment / total, total


@jit
def _divergence(ratio, distance, inside):
    """KL of two Normals summed over a tile's coordinates; ratio of variances, squared distance of means in the second's deviations."""
    return 0.5 * tl.sum(tl.where(inside, ratio - 1.0 - tl.log(ratio) + distance, 0.0), 1)


@jit
def _tile(B, D, BB: tl.constexpr, BD: tl.constexpr):
    """This program's rows [BB], coordinates [BD] (both int64), tile of coordinates, and range of subsets."""
    tiles_d = tl.cdiv(D, BD)
    tiles_b = tl.cdiv(B, BB)
    program = tl.program_id(0).to(tl.int64)
    tile = program % tiles_d
    b = (program // tiles_d) % tiles_b * BB + tl.arange(0, BB)
    return b, tile * BD + tl.arange(0, BD), tile, program // (tiles_d * tiles_b)


@jit
def _forward_kernel(
    mean_ptr, scale_ptr, mask_ptr, out_mean_ptr, out_scale_ptr, kl_ptr, S, B, D, plane, chunk,
    N: tl.constexpr, STANDARD: tl.constexpr, AGAINST: tl.constexpr, PER_ROW: tl.constexpr,
    BB: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Products of `chunk` subsets at one tile: mean, scale [S, B, D]; divergences of a tile [tiles, S, B] or [tiles, S, N, B]."""
    b, d, tile, split = _tile(B, D, BB, BD)
    inside = (b < B)[:, None] & (d < D)[None, :]
    at = b[:, None] * D + d[None, :]
    mean, precision = _experts(mean_ptr + at, scale_ptr + at, plane, inside, N, ACC)
    zero = tl.zeros((BB, BD), ACC)
    first = split * chunk
    mask_step = N * tl.cast(B, tl.int64) if PER_ROW else N
    mask_at = mask_ptr + first * mask_step
    out_mean_at, out_scale_at = out_mean_ptr + first * plane + at, out_scale_ptr + first * plane + at
    kl_step = N * tl.cast(B, tl.int64) if AGAINST == "experts" else tl.cast(B, tl.int64)
    kl_at = kl_ptr + (tile * S + first) * kl_step + b
    for _ in range(first, tl.minimum(first + chunk, S)):
        members = _members(mask_at, b, B, N, PER_ROW)
        joint, total = _product(mean, precision, members, zero, N, STANDARD)
        variance = 1.0 / total
        if AGAINST == "standard":
            tl.store(kl_at, _divergence(variance, joint * joint, inside), mask=b < B)
        tl.store(out_mean_at, joint, mask=inside)
        tl.store(out_scale_at, tl.sqrt(variance), mask=inside)
        if AGAINST == "experts":
            expert_at = kl_at
            for n in tl.static_range(N):
                shift = joint - mean[n]
                kl = _divergence(variance * precision[n], shift * shift * precision[n], inside & members[n])
                tl.store(expert_at, kl, mask=b < B)
                expert_at += B
        mask_at += mask_step
        out_mean_at += plane
        out_scale_at += plane
        kl_at += kl_step


@jit
def _backward_kernel(
    g_mean_ptr, g_scale_ptr, g_kl_ptr, mean_ptr, scale_ptr, mask_ptr, out_mean_ptr, out_scale_ptr, S, B, D, plane, chunk,
    N: tl.constexpr, STANDARD: tl.constexpr, AGAINST: tl.constexpr, PER_ROW: tl.constexpr,
    BB: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients of the experts at one tile from `chunk` subsets, whose products are computed again: [splits, N, B, D] each."""
    b, d, _, split = _tile(B, D, BB, BD)
    inside = (b < B)[:, None] & (d < D)[None, :]
    at = b[:, None] * D + d[None, :]
    mean, precision = _experts(mean_ptr + at, scale_ptr + at, plane, inside, N, ACC)
    zero = tl.zeros((BB, BD), ACC)
    grad_mean, grad_precision = (), ()  # the first still to be multiplied by the expert's precision
    for _n in tl.static_range(N):
        grad_mean += (zero,)
        grad_precision += (zero,)
    first = split * chunk
    mask_step = N * tl.cast(B, tl.int64) if PER_ROW else N
    mask_at = mask_ptr + first * mask_step
    g_mean_at, g_scale_at = g_mean_ptr + first * plane + at, g_scale_ptr + first * plane + at
    kl_step = N * tl.cast(B, tl.int64) if AGAINST == "experts" else tl.cast(B, tl.int64)
    g_kl_at = g_kl_ptr + first * kl_step + b
    for _ in range(first, tl.minimum(first + chunk, S)):
        members = _members(mask_at, b, B, N, PER_ROW)
        joint, total = _product(mean, precision, members, zero, N, STANDARD)
        variance = 1.0 / total
        g_joint = tl.load(g_mean_at, mask=inside, other=0.0).to(ACC)
        g_scale = tl.load(g_scale_at, mask=inside, other=0.0).to(ACC)
        g_total = -0.5 * g_scale * variance * tl.sqrt(variance)
        g_mean, g_precision = grad_mean, grad_precision
        if AGAINST == "standard":
            g = tl.load(g_kl_at, mask=b < B, other=0.0).to(ACC)[:, None]
            g_total += 0.5 * g * (variance - variance * variance)
            g_joint += g * joint
        if AGAINST == "experts":
            expert_at = g_kl_at
            g_mean, g_precision = (), ()
            for n in tl.static_range(N):
                g = tl.load(expert_at, mask=b < B, other=0.0).to(ACC)[:, None]
                shift = joint - mean[n]
                own = 0.5 * g * (variance + shift * shift - 1.0 / precision[n])
                g_mean += (tl.where(members[n], grad_mean[n] - g * shift, grad_mean[n]),)
                g_precision += (tl.where(members[n], grad_precision[n] + own, grad_precision[n]),)
                g_joint = tl.where(members[n], g_joint + g * precision[n] * shift, g_joint)
                g_total = tl.where(members[n], g_total + 0.5 * g * variance * (1.0 - precision[n] * variance), g_total)
                expert_at += B
        g_moment = g_joint * variance
        g_total -= g_moment * joint
        grad_mean, grad_precision = (), ()
        for n in tl.static_range(N):
            grad_mean += (tl.where(members[n], g_mean[n] + g_moment, g_mean[n]),)
            grad_precision += (tl.where(members[n], g_precision[n] + (g_total + g_moment * mean[n]), g_precision[n]),)
        mask_at += mask_step
        g_mean_at += plane
        g_scale_at += plane
        g_kl_at += kl_step
    out_at = split * N * plane + at
    for n in tl.static_range(N):
        # an expert in no subset has gradients of exactly 0, whatever it holds; precision * sqrt(precision) alone may overflow
        g_mean = tl.where(grad_mean[n] == 0.0, 0.0, precision[n] * grad_mean[n])
        g_scale = tl.where(grad_precision[n] == 0.0, 0.0, -2.0 * precision[n] * (tl.sqrt(precision[n]) * grad_precision[n]))
        tl.store(out_mean_ptr + out_at, g_mean.to(out_mean_ptr.dtype.element_ty), mask=inside)
        tl.store(out_scale_ptr + out_at, g_scale.to(out_scale_ptr.dtype.element_ty), mask=inside)
        out_at += plane


# ---- launch -----------------------------------------------------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """Rows and coordinates as the kernel sees them, blocks, ranges of subsets."""

    b: int
    d: int
    bb: int
    bd: int
    chunk: int
    splits: int
    num_warps: int

    @property
    def grid(self) -> tuple[int, ...]:
        return (cdiv(self.b, self.bb) * cdiv(self.d, self.bd) * self.splits,)


def _plan(shape: torch.Size, subsets: int, *, by_row: bool, held: int) -> _Plan:
    """`held` numbers a coordinate stay in registers, 64 a thread, with at most 4 coordinates (one 16-byte load) to a thread. Rows are one
    long row where neither masks nor sums tell them apart."""
    n, b, d = shape if by_row else (shape[0], 1, shape[1] * shape[2])
    num_warps = 4 if b * d >= 2**17 else 1
    elements = 32 * num_warps * (4 if held <= 16 else 2 if held <= 32 else 1)
    bd = block(d, most=elements)
    bb = block(b, most=elements // bd)
    programs = max(cdiv(b, bb) * cdiv(d, bd), 1)
    # few programs: subsets are split over the grid, in ranges long enough that reading the experts again (from L2) stays an eighth
    chunk = min(max(cdiv(subsets * programs, _PROGRAMS), 64, 8 * n), max(subsets, 1))
    return _Plan(b, d, bb, bd, chunk, cdiv(subsets, chunk), num_warps)


_PROGRAMS = 1024  # enough to fill the largest devices several times over


def _fake_products(mean: Tensor, scale: Tensor, mask: Tensor, standard: bool, against: str) -> tuple[Tensor, Tensor, Tensor]:
    n, b, d = mean.shape
    wide, s = sums_dtype(mean, scale), mask.shape[0]  # len() would freeze a dynamic size
    kl = {"nothing": (0,), "standard": (s, b), "experts": (s, n, b)}[against]
    return mean.new_empty(s, b, d, dtype=wide), mean.new_empty(s, b, d, dtype=wide), mean.new_empty(kl, dtype=wide)


@opaque(_fake_products)
def products(mean: Tensor, scale: Tensor, mask: Tensor, standard: bool, against: str) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and scale [S, B, D] of the products, and their divergences `against` "nothing" [0], "standard" [S, B] or "experts" [S, N, B]."""
    out_mean, out_scale, kl = _fake_products(mean, scale, mask, standard, against)
    per_row, n, s = mask.dim() == 3, len(mean), len(mask)
    plan = _plan(mean.shape, s, by_row=per_row or against != "nothing", held=(3 if against == "experts" else 2) * n)
    tiles = kl.new_empty(cdiv(plan.d, plan.bd), *kl.shape)
    run(
        _forward_kernel, plan.grid, mean.contiguous(), scale.contiguous(), mask.contiguous().view(torch.uint8), out_mean, out_scale, tiles,
        s, plan.b, plan.d, plan.b * plan.d, plan.chunk, N=n, STANDARD=standard, AGAINST=against, PER_ROW=per_row,
        BB=plan.bb, BD=plan.bd, ACC=_accumulator(out_mean), num_warps=plan.num_warps,
    )  # fmt: skip
    return out_mean, out_scale, tiles[0] if len(tiles) == 1 else tiles.sum(0)


def _fake_gradients(
    g_mean: Tensor, g_scale: Tensor, g_kl: Tensor, mean: Tensor, scale: Tensor, mask: Tensor, standard: bool, against: str
) -> tuple[Tensor, Tensor]:
    whole = torch.contiguous_format
    return torch.empty_like(mean, memory_format=whole), torch.empty_like(scale, memory_format=whole)


@opaque(_fake_gradients)
def gradients(
    g_mean: Tensor, g_scale: Tensor, g_kl: Tensor, mean: Tensor, scale: Tensor, mask: Tensor, standard: bool, against: str
) -> tuple[Tensor, Tensor]:
    """Gradients of the experts from those of all that `products` gives."""
    per_row, n, s = mask.dim() == 3, len(mean), len(mask)
    plan = _plan(mean.shape, s, by_row=per_row or against != "nothing", held=(7 if against == "experts" else 4) * n)
    one = plan.splits == 1
    out_mean, out_scale = (x.new_empty(plan.splits, *x.shape, dtype=x.dtype if one else g_mean.dtype) for x in (mean, scale))
    run(
        _backward_kernel, plan.grid, g_mean.contiguous(), g_scale.contiguous(), g_kl.contiguous(), mean.contiguous(), scale.contiguous(),
        mask.contiguous().view(torch.uint8), out_mean, out_scale,
        s, plan.b, plan.d, plan.b * plan.d, plan.chunk, N=n, STANDARD=standard, AGAINST=against, PER_ROW=per_row,
        BB=plan.bb, BD=plan.bd, ACC=_accumulator(g_mean), num_warps=plan.num_warps,
    )  # fmt: skip
    if one:
        return out_mean[0], out_scale[0]
    return out_mean.sum(0).to(mean.dtype), out_scale.sum(0).to(scale.dtype)


def _accumulator(like: Tensor) -> Any:
    return tl.float64 if like.dtype == torch.float64 else tl.float32
