"""The kernels of `meme_bound`: one program for a source i and a block of rows, samples and rows in a tile [K, rows].

Tables are read where they lie: only the row axis must be contiguous, the others come as strides.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from meme_kernels._launch import cdiv, power_of_two
from meme_kernels._math import exp
from meme_kernels._op import opaque, run, sums_dtype
from meme_kernels._triton import jit, tl

TILE = 512  # entries of a tile [K, rows]: 4 a thread with 4 warps
TALLEST = 2048  # entries of a tile of many samples: 8 a thread with 8 warps; of twice as many the backward kernel spills


class Tables(NamedTuple):
    """What the bound is made of; see `meme_bound.meme_bound`."""

    own: Tensor
    cross: Tensor
    density: Tensor
    prior: Tensor | None
    alone: Tensor | None
    closed: Tensor | None
    observed: Tensor
    index: Tensor | None
    gap: Tensor | None
    ess: Tensor | None


# ---- device functions --------------------------------------------------------------------------------------------------------------------


@jit
def _tile(ptr, i, k, b, s_i, s_k, K, B, ACC: tl.constexpr):
    """The tile [K, rows] of source i. Masked by its bounds alone, so that loads are 16 bytes wide; the caller selects what is there."""
    mask = (k < K)[:, None] & (b < B)[None, :]
    return tl.load(ptr + i * s_i + k[:, None] * s_k + b[None, :], mask=mask, other=0.0).to(ACC)


@jit
def _targets(
    cross_ptr, density_ptr, observed_ptr, i, k, b, inside, a_i, a_j, a_k, q_i, q_j, q_k, decoded, K, B,
    N: tl.constexpr, MIXTURE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Whether rows hold source i, and how many others then; t: the sum of A[i, j] over these targets; for a mixture Q[i, i], and the
    log-sum-exp of the targets' Q[i, j]."""
    here = tl.load(observed_ptr + i * B + b, mask=inside, other=0) != 0
    others = tl.zeros(b.shape, tl.int32)
    t = tl.zeros((k.shape[0], b.shape[0]), ACC)
    top = tl.full((k.shape[0], b.shape[0]), float("-inf"), ACC)
    total = tl.zeros((k.shape[0], b.shape[0]), ACC)
    density = total
    for j in tl.static_range(N):
        target = here & (i != j) & (tl.load(observed_ptr + j * B + b, mask=inside, other=0) != 0)
        others += target.to(tl.int32)
        t += tl.where(target[None, :], _tile(cross_ptr + j * a_j, i, k, b, a_i, a_k, decoded, B, ACC), 0.0)
        if MIXTURE:
            q = _tile(density_ptr + j * q_j, i, k, b, q_i, q_k, K, B, ACC)
            density = tl.where(i == j, q, density)
            q = tl.where(target[None, :], q, float("-inf"))
            new = tl.maximum(top, q)
            safe = tl.where(new == float("-inf"), 0.0, new)
            total = total * exp(top - safe) + exp(q - safe)
            top = new
    return here, others, t, density, tl.where(others > 0, top, 0.0) + tl.log(tl.where(total > 0, total, 1.0))


@jit
def _softmax(t, k, K):
    """Softmax over the samples and the log of the sum that it divides by; padding samples get 0."""
    t = tl.where((k < K)[:, None], t, float("-inf"))
    top = tl.max(t, 0)
    share = exp(t - top[None, :])
    total = tl.sum(share, 0)
    return share / total[None, :], top + tl.log(total)


@jit
def _source(
    own_ptr, cross_ptr, density_ptr, prior_ptr, alone_ptr, closed_ptr, observed_ptr, index_ptr,
    i, k, b, inside, o_i, o_k, a_i, a_j, a_k, q_i, q_j, q_k, K, B,
    N: tl.constexpr, ESTIMATOR: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What both passes need of source i: presence, t, p and their log sum, the mixture, v, own, ratio, closed form, exactness."""
    decoded = K * 0 + 1 if ESTIMATOR == 2 else K
    here, others, t, density, mixed = _targets(
        cross_ptr, density_ptr, observed_ptr, i, k, b, inside, a_i, a_j, a_k, q_i, q_j, q_k, decoded, K, B,
        N, prior_ptr is None, ACC,
    )  # fmt: skip
    valid = (k < K)[:, None] & here[None, :]
    share, log_sum = _softmax(t, k, K)
    paired = others > 0
    if ESTIMATOR == 2:
        index = tl.load(index_ptr + i * B + b, mask=inside, other=0)
        even = 1.0 / (tl.zeros(share.shape, ACC) + K)
        weight = tl.where(paired[None, :], tl.where(k[:, None] == index[None, :], 1.0, 0.0), even)
    else:
        weight = tl.where((k == 0)[:, None], share * K, 0.0) if ESTIMATOR == 1 else share
    weight = tl.where((k < K)[:, None], weight, 0.0)
    if prior_ptr is not None:
        density = _tile(density_ptr + i * q_j, i, k, b, q_i, q_k, K, B, ACC)
    ratio = tl.where(valid, -density, 0.0)
    if prior_ptr is not None:
        ratio += tl.where(valid & paired[None, :], _tile(prior_ptr, i, k, b, K * B, B, K, B, ACC), 0.0)
    else:
        count = tl.log(tl.where(paired, others, 1).to(ACC))
        ratio += tl.where(valid & paired[None, :], mixed - count[None, :], 0.0)
    if alone_ptr is not None:
        ratio += tl.where(valid & (others == 0)[None, :], _tile(alone_ptr, i, k, b, K * B, B, K, B, ACC), 0.0)
    if ESTIMATOR == 0:
        own = _tile(own_ptr, i, k, b, o_i, o_k, K, B, ACC)
    else:  # one sample is decoded, and its value stands for all
        own = tl.load(own_ptr + i * o_i + b, mask=inside, other=0.0).to(ACC)[None, :] + tl.zeros(share.shape, ACC)
    own = tl.where(valid, own, 0.0)
    closed = tl.zeros(b.shape, ACC)
    exact = b < 0
    if closed_ptr is not None:
        exact = paired if prior_ptr is not None else others == 1
        closed = tl.load(closed_ptr + i * B + b, mask=inside & exact, other=0.0).to(ACC)
    return here, others, t, share, log_sum, mixed, weight, own, ratio, closed, exact


# ---- kernels -----------------------------------------------------------------------------------------------------------------------------


@jit
def _forward_kernel(
    own_ptr, cross_ptr, density_ptr, prior_ptr, alone_ptr, closed_ptr, observed_ptr, index_ptr, gap_ptr, ess_ptr,
    objective_ptr, metrics_ptr,
    o_i, o_k, a_i, a_j, a_k, q_i, q_j, q_k, K, B, cross_weight,
    N: tl.constexpr, ESTIMATOR: tl.constexpr, KB: tl.constexpr, BB: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    program, blocks = tl.program_id(0).to(tl.int64), tl.cdiv(B, BB)
    i = program // blocks
    b = (program % blocks) * BB + tl.arange(0, BB)
    K, B, a_j, q_j = K + i * 0, B + i * 0, a_j + i * 0, q_j + i * 0  # 64 bits from here on
    k, inside = tl.arange(0, KB).to(tl.int64), b < B
    here, others, t, share, log_sum, mixed, weight, own, ratio, closed, exact = _source(
        own_ptr, cross_ptr, density_ptr, prior_ptr, alone_ptr, closed_ptr, observed_ptr, index_ptr,
        i, k, b, inside, o_i, o_k, a_i, a_j, a_k, q_i, q_j, q_k, K, B, N, ESTIMATOR, ACC,
    )  # fmt: skip
    mass, sampled = tl.sum(weight, 0), tl.sum(weight * ratio, 0)
    reconstruction = tl.sum(weight * own, 0) if ESTIMATOR == 0 else tl.sum(tl.where((k == 0)[:, None], own, 0.0), 0)
    if ESTIMATOR == 2:
        fresh = tl.sum(t, 0)
        fit = reconstruction - fresh
        marginal = fresh + tl.load(gap_ptr + i * B + b, mask=inside, other=0.0).to(ACC)
        ess = tl.load(ess_ptr + i * B + b, mask=inside, other=0.0).to(ACC)
    else:
        fit = tl.sum(weight * (own - t), 0)
        marginal = log_sum - tl.log(tl.zeros(b.shape, ACC) + K)
        ess = 1.0 / tl.sum(share * share, 0)
    log_ratio = tl.where(exact, mass * closed, sampled)
    objective = (fit + log_ratio + cross_weight * marginal) / (others + 1).to(ACC)
    at, plane = i * B + b, N * B
    paired = others > 0
    tl.store(objective_ptr + at, tl.where(here, objective, 0.0), mask=inside)
    tl.store(metrics_ptr + at, tl.where(here, fit + sampled + marginal, 0.0), mask=inside)
    tl.store(metrics_ptr + plane + at, tl.where(here, reconstruction, 0.0), mask=inside)
    tl.store(metrics_ptr + 2 * plane + at, tl.where(here, log_ratio, 0.0), mask=inside)
    tl.store(metrics_ptr + 3 * plane + at, tl.where(paired, marginal, 0.0), mask=inside)
    tl.store(metrics_ptr + 4 * plane + at, tl.where(paired, ess, 0.0), mask=inside)


@jit
def _backward_kernel(
    g_ptr, own_ptr, cross_ptr, density_ptr, prior_ptr, alone_ptr, closed_ptr, observed_ptr, index_ptr,
    d_own_ptr, d_cross_ptr, d_density_ptr, d_prior_ptr, d_alone_ptr, d_closed_ptr,
    o_i, o_k, a_i, a_j, a_k, q_i, q_j, q_k, K, B, cross_weight,
    N: tl.constexpr, ESTIMATOR: tl.constexpr, STOP: tl.constexpr, KB: tl.constexpr, BB: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    program, blocks = tl.program_id(0).to(tl.int64), tl.cdiv(B, BB)
    i = program // blocks
    b = (program % blocks) * BB + tl.arange(0, BB)
    K, B, a_j, q_j = K + i * 0, B + i * 0, a_j + i * 0, q_j + i * 0  # 64 bits from here on
    k, inside = tl.arange(0, KB).to(tl.int64), b < B
    here, others, t, share, log_sum, mixed, weight, own, ratio, closed, exact = _source(
        own_ptr, cross_ptr, density_ptr, prior_ptr, alone_ptr, closed_ptr, observed_ptr, index_ptr,
        i, k, b, inside, o_i, o_k, a_i, a_j, a_k, q_i, q_j, q_k, K, B, N, ESTIMATOR, ACC,
    )  # fmt: skip
    g = tl.load(g_ptr + i * B + b, mask=inside, other=0.0).to(ACC)
    g = tl.where(here, g / (others + 1).to(ACC), 0.0)[None, :]
    paired = (others > 0)[None, :]
    d_t = (cross_weight - 1.0) * tl.where((k == 0)[:, None], 1.0, 0.0) if ESTIMATOR == 2 else cross_weight * share - weight
    if not STOP:
        gain = own - t + tl.where(exact[None, :], closed[None, :], ratio)
        d_t += gain * weight - share * tl.sum(gain * weight, 0)[None, :]
    d_t, d_ratio = g * d_t, tl.where(exact[None, :], 0.0, g * weight)
    valid = (k < K)[:, None] & inside[None, :]
    row = k[:, None] * B + b[None, :]
    if ESTIMATOR == 0:
        tl.store(d_own_ptr + i * K * B + row, (g * weight).to(d_own_ptr.dtype.element_ty), mask=valid)
    else:
        mass = tl.sum(weight, 0) if ESTIMATOR == 1 else tl.full(b.shape, 1.0, ACC)
        tl.store(d_own_ptr + i * B + b, (tl.sum(g, 0) * mass).to(d_own_ptr.dtype.element_ty), mask=inside)
    if closed_ptr is not None:
        d_closed = tl.where(exact, tl.sum(g, 0) * tl.sum(weight, 0), 0.0)
        tl.store(d_closed_ptr + i * B + b, d_closed.to(d_closed_ptr.dtype.element_ty), mask=inside)
    if alone_ptr is not None:
        single = tl.where(paired, 0.0, d_ratio)
        tl.store(d_alone_ptr + i * K * B + row, single.to(d_alone_ptr.dtype.element_ty), mask=valid)
    if prior_ptr is not None:
        given = tl.where(paired, d_ratio, 0.0)
        tl.store(d_prior_ptr + i * K * B + row, given.to(d_prior_ptr.dtype.element_ty), mask=valid)
    decoded = K * 0 + 1 if ESTIMATOR == 2 else K
    for j in tl.static_range(N):
        there = tl.load(observed_ptr + j * B + b, mask=here & inside, other=0) != 0
        target = (there & (i != j))[None, :]
        at = (i * N + j) * decoded * B + row
        tl.store(d_cross_ptr + at, tl.where(target, d_t, 0.0).to(d_cross_ptr.dtype.element_ty), mask=valid & (k < decoded)[:, None])
        d_q = tl.where(i == j, -d_ratio, 0.0)
        if prior_ptr is None:
            q = _tile(density_ptr + j * q_j, i, k, b, q_i, q_k, K, B, ACC)
            q = tl.where(valid & target, q, float("-inf"))
            d_q += tl.where(target, d_ratio * exp(q - mixed), 0.0)
        tl.store(d_density_ptr + (i * N + j) * K * B + row, d_q.to(d_density_ptr.dtype.element_ty), mask=valid)


@jit
def _draw_kernel(
    cross_ptr, observed_ptr, uniform_ptr, index_ptr, gap_ptr, ess_ptr, a_i, a_j, a_k, K, B,
    N: tl.constexpr, KB: tl.constexpr, BB: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    program, blocks = tl.program_id(0).to(tl.int64), tl.cdiv(B, BB)
    i = program // blocks
    b = (program % blocks) * BB + tl.arange(0, BB)
    K, B, a_j = K + i * 0, B + i * 0, a_j + i * 0  # 64 bits from here on
    k, inside = tl.arange(0, KB).to(tl.int64), b < B
    _, _, t, _, _ = _targets(cross_ptr, cross_ptr, observed_ptr, i, k, b, inside, a_i, a_j, a_k, 0, 0, 0, K, K, B, N, False, ACC)
    share, log_sum = _softmax(t, k, K)
    edges = tl.cumsum(share, 0)
    uniform = tl.load(uniform_ptr + i * B + b, mask=inside, other=0.5).to(ACC)
    threshold = uniform * tl.max(edges, 0)  # not the sum of the shares: rounded in another order it may exceed the last edge
    index = tl.sum(((threshold[None, :] > edges) & (k < K)[:, None]).to(tl.int64), 0)
    index = tl.minimum(index, K - 1)
    chosen = tl.sum(tl.where(k[:, None] == index[None, :], t, 0.0), 0)
    tl.store(index_ptr + i * B + b, index, mask=inside)
    tl.store(gap_ptr + i * B + b, log_sum - tl.log(tl.zeros(b.shape, ACC) + K) - chosen, mask=inside)
    tl.store(ess_ptr + i * B + b, 1.0 / tl.sum(share * share, 0), mask=inside)


# ---- launches ----------------------------------------------------------------------------------------------------------------------------


def _blocks(samples: int, rows: int) -> dict[str, Any]:
    tall = power_of_two(samples)
    wide = min(max(TILE // tall, 16), max(TALLEST // tall, 1))
    return {"KB": tall, "BB": min(wide, max(power_of_two(rows), 16)), "num_warps": 4 if tall <= 64 else 8}


def _contiguous_rows(x: Tensor) -> Tensor:
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def _fake_forward(
    own: Tensor, cross: Tensor, density: Tensor, prior: Tensor | None, alone: Tensor | None, closed: Tensor | None, observed: Tensor,
    index: Tensor | None, gap: Tensor | None, ess: Tensor | None, estimator: int, cross_weight: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    wide, shape = sums_dtype(own, cross, density), observed.shape
    return own.new_empty(shape, dtype=wide), own.new_empty((5, *shape), dtype=wide)


@opaque(_fake_forward)
def _forward(
    own: Tensor, cross: Tensor, density: Tensor, prior: Tensor | None, alone: Tensor | None, closed: Tensor | None, observed: Tensor,
    index: Tensor | None, gap: Tensor | None, ess: Tensor | None, estimator: int, cross_weight: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    objective, metrics = _fake_forward(own, cross, density, prior, alone, closed, observed, index, gap, ess, estimator, cross_weight)
    tables, strides, sizes = _prepared(own, cross, density, prior, alone, closed, observed, index, gap, ess)
    run(_forward_kernel, sizes.grid, *tables, objective, metrics, *strides, *sizes.shape, cross_weight,
        N=len(own), ESTIMATOR=estimator, **sizes.blocks, ACC=accumulator(objective))  # fmt: skip
    return objective, metrics


def _fake_backward(
    g: Tensor, own: Tensor, cross: Tensor, density: Tensor, prior: Tensor | None, alone: Tensor | None, closed: Tensor | None,
    observed: Tensor, index: Tensor | None, estimator: int, cross_weight: float, stop_gradient: bool,
) -> list[Tensor]:  # fmt: skip
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (own, cross, density, prior, alone, closed) if x is not None
    ]


@opaque(_fake_backward)
def _backward(
    g: Tensor, own: Tensor, cross: Tensor, density: Tensor, prior: Tensor | None, alone: Tensor | None, closed: Tensor | None,
    observed: Tensor, index: Tensor | None, estimator: int, cross_weight: float, stop_gradient: bool,
) -> list[Tensor]:  # fmt: skip
    found = _fake_backward(g, own, cross, density, prior, alone, closed, observed, index, estimator, cross_weight, stop_gradient)
    outputs = _aligned(found, (own, cross, density, prior, alone, closed))
    tables, strides, sizes = _prepared(own, cross, density, prior, alone, closed, observed, index, None, None)
    run(_backward_kernel, sizes.grid, g.contiguous(), *tables[:8], *outputs, *strides, *sizes.shape, cross_weight,
        N=len(own), ESTIMATOR=estimator, STOP=stop_gradient, **sizes.blocks, ACC=accumulator(g))  # fmt: skip
    return found


def _fake_draw(cross: Tensor, observed: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide, shape = sums_dtype(cross), observed.shape
    return cross.new_empty(shape, dtype=torch.int64), cross.new_empty(shape, dtype=wide), cross.new_empty(shape, dtype=wide)


@opaque(_fake_draw)
def draw(cross: Tensor, observed: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """index, gap and effective sample size, each [N, B]: see `meme_bound.resample`."""
    index, gap, ess = _fake_draw(cross, observed, uniform)
    cross = _contiguous_rows(cross)
    (n, rows), samples = observed.shape, cross.shape[2]
    blocks = _blocks(samples, rows)
    run(_draw_kernel, (n * cdiv(rows, blocks["BB"]),), cross, observed.contiguous(), uniform.contiguous(), index, gap, ess,
        *cross.stride()[:3], samples, rows, N=n, **blocks, ACC=accumulator(gap))  # fmt: skip
    return index, gap, ess


class _Sizes(NamedTuple):
    grid: tuple[int]
    shape: tuple[int, int]
    blocks: dict[str, Any]


def _prepared(own: Tensor, cross: Tensor, density: Tensor, *others: Tensor | None) -> tuple[list[Tensor | None], list[int], _Sizes]:
    own, cross, density = (_contiguous_rows(x) for x in (own, cross, density))
    n, _, samples, rows = density.shape
    blocks = _blocks(samples, rows)
    strides = [own.stride(0), own.stride(1), *cross.stride()[:3], *density.stride()[:3]]
    sizes = _Sizes((n * cdiv(rows, blocks["BB"]),), (samples, rows), blocks)
    return [own, cross, density, *(None if x is None else x.contiguous() for x in others)], strides, sizes


def _aligned(found: list[Tensor], given: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """The gradients at the places of the inputs they belong to."""
    rest = iter(found)
    return [None if x is None else next(rest) for x in given]


def accumulator(like: Tensor) -> Any:
    """The kernels' type for sums that are returned as `like`."""
    return tl.float64 if like.dtype == torch.float64 else tl.float32


def forward(tables: Tables, estimator: int, cross_weight: float, stop_gradient: bool) -> tuple[Tensor, Tensor]:
    """Objective [N, B] and metrics [5, N, B]."""
    return _forward(*tables, estimator, cross_weight)


def backward(tables: Tables, g: Tensor, estimator: int, cross_weight: float, stop_gradient: bool) -> list[Tensor | None]:
    """Gradients of own, cross, density, prior, alone and closed, None where none was given."""
    return _aligned(_backward(g, *tables[:8], estimator, cross_weight, stop_gradient), tables[:6])
