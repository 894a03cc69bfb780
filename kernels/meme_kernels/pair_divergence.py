"""KL of the two posteriors of every row that holds exactly two modalities, both ways round, in nats:

    Normal   sum_d log(s_j / s_i) + (s_i^2 + (m_i - m_j)^2) / (2 s_j^2) - 1/2
    Laplace  sum_d log(s_j / s_i) + (s_i exp(-|m_i - m_j| / s_i) + |m_i - m_j|) / s_j - 1

KL(q_i || q_j) stands at [i, b], KL(q_j || q_i) at [j, b], and 0 in all other rows: where a row has one target, the conditional prior of
MEME is one expert and its log-ratio has this closed form (released code of Joy et al. 2022); where it has more, the mixture has none.

Forward reads the 2 N B D parameters of those rows, each once for itself and once as its partner's (from the cache), and writes N B; about
10 N B D flops. Backward reads them again and writes 2 N B D gradients: a program owns its (i, b), as source of one KL and target of the
other. No atomics, every sum in one order.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from meme_kernels._launch import block, cdiv
from meme_kernels._math import exp
from meme_kernels._op import Case, Cost, FusedOp, Size, nbytes, opaque, run, sums_dtype, through_reference, uses_triton
from meme_kernels._triton import jit, tl

FAMILIES = ("normal", "laplace")


def pair_divergence(mean: Tensor, scale: Tensor, observed: Tensor, *, family: str) -> Tensor:
    """mean, scale [N, B, D], observed bool [N, B] -> [N, B], float32 (float64 for float64). Absent entries reach nothing, NaN included.

    Raises ValueError for shapes that do not fit, a mask that is not bool, and another family than normal or laplace.
    """
    if family not in FAMILIES:
        raise ValueError(f"family: expected one of {', '.join(FAMILIES)}, got {family!r}")
    if mean.shape != scale.shape or mean.dim() != 3 or observed.shape != mean.shape[:2] or observed.dtype != torch.bool:
        got = f"{tuple(mean.shape)}, {tuple(scale.shape)} and {observed.dtype} {tuple(observed.shape)}"
        raise ValueError(f"pair_divergence: expected mean and scale [N, B, D] and bool observed [N, B], got {got}")
    if not uses_triton(mean, scale, observed):
        return reference(mean, scale, observed, family=family)
    return _PairDivergence.apply(mean, scale, observed, FAMILIES.index(family))


def reference(mean: Tensor, scale: Tensor, observed: Tensor, *, family: str) -> Tensor:
    """The specification: work is done for the rows that hold two, N times [rows, D]."""
    two, partner = _partners(observed)
    wide = sums_dtype(mean, scale)
    mean, scale = (torch.where(two[..., None], x.to(wide), filler) for x, filler in ((mean, 0.0), (scale, 1.0)))
    index = partner[..., None].expand(mean.shape)
    value = _kl(mean, scale, mean.gather(0, index), scale.gather(0, index), family).sum(-1)
    return torch.where(two, value, 0.0)


def naive(mean: Tensor, scale: Tensor, observed: Tensor, *, family: str) -> Tensor:
    """As commonly written: the whole table of pairs [N, N, B, D], then selected."""
    table = _kl(mean[:, None], scale[:, None], mean[None], scale[None], family).sum(-1)
    two, _ = _partners(observed)
    pairs = two[:, None] & two[None] & ~torch.eye(len(mean), dtype=torch.bool, device=mean.device)[..., None]
    return torch.where(pairs, table, 0.0).sum(1)


def _kl(mean: Tensor, scale: Tensor, other_mean: Tensor, other_scale: Tensor, family: str) -> Tensor:
    shift = mean - other_mean
    if family == "normal":
        ratio, shift = scale / other_scale, shift / other_scale  # first: squares of scales under- or overflow, of ratios not
        return (ratio.square() + shift.square() - 1) / 2 - ratio.log()
    expected = scale * torch.exp(-shift.abs() / scale) + shift.abs()
    return (other_scale / scale).log() + expected / other_scale - 1


def _partners(observed: Tensor) -> tuple[Tensor, Tensor]:
    """Whether the entry belongs to a row that holds exactly two, and the other one's number (0 elsewhere), both [N, B]."""
    two = observed & (observed.sum(0) == 2)
    number = torch.arange(len(observed), device=observed.device)[:, None]
    return two, torch.where(two, (number * observed).sum(0) - number, 0)


# ---- kernels -----------------------------------------------------------------------------------------------------------------------------


@jit
def _rows(observed_ptr, B, N: tl.constexpr, BB: tl.constexpr):
    """This program's source and rows, which of them hold two modalities, and their partner."""
    program, blocks = tl.program_id(0).to(tl.int64), tl.cdiv(B, BB)
    i = program // blocks
    b = (program % blocks) * BB + tl.arange(0, BB)
    held, partner = tl.zeros((BB,), tl.int64), tl.zeros((BB,), tl.int64)
    for j in tl.static_range(N):
        there = tl.load(observed_ptr + (i * 0 + j) * B + b, mask=b < B, other=0) != 0
        held += there
        partner += tl.where(there & (i != j), j, 0)
    here = tl.load(observed_ptr + i * B + b, mask=b < B, other=0) != 0
    return i, b, here & (held == 2), partner


@jit
def _parameters(mean_ptr, scale_ptr, row, d, D, mask, ACC: tl.constexpr):
    at = row[:, None] * D + d[None, :]
    return tl.load(mean_ptr + at, mask=mask, other=0.0).to(ACC), tl.load(scale_ptr + at, mask=mask, other=1.0).to(ACC)


@jit
def _forward_kernel(
    mean_ptr, scale_ptr, observed_ptr, out_ptr, B, D,
    N: tl.constexpr, LAPLACE: tl.constexpr, BB: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i, b, two, partner = _rows(observed_ptr, B, N, BB)
    total = tl.zeros((BB,), ACC)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        mask = two[:, None] & (d < D)[None, :]
        mean, scale = _parameters(mean_ptr, scale_ptr, i * B + b, d, D, mask, ACC)
        other_mean, other_scale = _parameters(mean_ptr, scale_ptr, partner * B + b, d, D, mask, ACC)
        shift, ratio = mean - other_mean, scale / other_scale
        if LAPLACE:
            distance = tl.abs(shift)
            body = ratio * exp(-distance / scale) + distance / other_scale - 1.0
        else:
            body = 0.5 * (ratio * ratio + (shift / other_scale) * (shift / other_scale) - 1.0)
        total += tl.sum(tl.where(mask, body - tl.log(ratio), 0.0), 1)
    tl.store(out_ptr + i * B + b, tl.where(two, total, 0.0), mask=b < B)


@jit
def _backward_kernel(
    g_ptr, mean_ptr, scale_ptr, observed_ptr, d_mean_ptr, d_scale_ptr, B, D,
    N: tl.constexpr, LAPLACE: tl.constexpr, BB: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A program's entry is the source of its own KL (gradient g) and the target of its partner's (gradient h)."""
    i, b, two, partner = _rows(observed_ptr, B, N, BB)
    g = tl.load(g_ptr + i * B + b, mask=two, other=0.0).to(ACC)[:, None]
    h = tl.load(g_ptr + partner * B + b, mask=two, other=0.0).to(ACC)[:, None]
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        inside = (b < B)[:, None] & (d < D)[None, :]
        mask = two[:, None] & inside
        mean, scale = _parameters(mean_ptr, scale_ptr, i * B + b, d, D, mask, ACC)
        other_mean, other_scale = _parameters(mean_ptr, scale_ptr, partner * B + b, d, D, mask, ACC)
        shift = mean - other_mean
        if LAPLACE:
            distance = tl.abs(shift)
            sign = tl.where(shift > 0, 1.0, tl.where(shift < 0, -1.0, 0.0)).to(ACC)
            ours, theirs = exp(-distance / scale), exp(-distance / other_scale)
            d_mean = sign * (g * (1.0 - ours) / other_scale + h * (1.0 - theirs) / scale)
            d_scale = g * (ours * (1.0 + distance / scale) / other_scale - 1.0 / scale)
            d_scale += h * (1.0 - (other_scale * theirs + distance) / scale) / scale
        else:
            ratio, back = scale / other_scale, other_scale / scale
            d_mean = g * (shift / other_scale) / other_scale + h * (shift / scale) / scale
            d_scale = g * (ratio * ratio - 1.0) / scale
            d_scale += h * (1.0 - back * back - (shift / scale) * (shift / scale)) / scale
        at = (i * B + b)[:, None] * D + d[None, :]
        tl.store(d_mean_ptr + at, tl.where(mask, d_mean, 0.0).to(d_mean_ptr.dtype.element_ty), mask=inside)
        tl.store(d_scale_ptr + at, tl.where(mask, d_scale, 0.0).to(d_scale_ptr.dtype.element_ty), mask=inside)


# ---- launch and binding ------------------------------------------------------------------------------------------------------------------


def _fake_forward(mean: Tensor, scale: Tensor, observed: Tensor, family: int) -> Tensor:
    return mean.new_empty(observed.shape, dtype=sums_dtype(mean, scale))


@opaque(_fake_forward)
def _forward(mean: Tensor, scale: Tensor, observed: Tensor, family: int) -> Tensor:
    out = _fake_forward(mean, scale, observed, family)
    tensors = (mean.contiguous(), scale.contiguous(), observed.contiguous(), out)
    run(
        _forward_kernel, *_launch(mean), *tensors, *mean.shape[1:], N=len(mean), LAPLACE=family == 1, **_blocks(mean), ACC=_accumulator(out)
    )
    return out


def _fake_backward(g: Tensor, mean: Tensor, scale: Tensor, observed: Tensor, family: int) -> tuple[Tensor, Tensor]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (mean, scale))  # type: ignore[return-value]


@opaque(_fake_backward)
def _backward(g: Tensor, mean: Tensor, scale: Tensor, observed: Tensor, family: int) -> tuple[Tensor, Tensor]:
    found = _fake_backward(g, mean, scale, observed, family)
    tensors = (g.contiguous(), mean.contiguous(), scale.contiguous(), observed.contiguous(), *found)
    run(_backward_kernel, *_launch(mean), *tensors, *mean.shape[1:], N=len(mean), LAPLACE=family == 1, **_blocks(mean), ACC=_accumulator(g))
    return found


def _blocks(mean: Tensor) -> dict[str, int]:
    """A tile of at most 1,024 entries: 8 a thread."""
    wide = block(mean.shape[-1], least=16, most=128)
    return {"BB": 1024 // wide, "BD": wide, "num_warps": 4}


def _launch(mean: Tensor) -> tuple[tuple[int]]:
    return ((len(mean) * cdiv(mean.shape[1], _blocks(mean)["BB"]),),)


def _accumulator(like: Tensor) -> Any:
    return tl.float64 if like.dtype == torch.float64 else tl.float32


class _PairDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mean: Tensor, scale: Tensor, observed: Tensor, family: int) -> Tensor:
        ctx.save_for_backward(mean, scale, observed)
        ctx.family = family
        return _forward(mean, scale, observed, family)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        mean, scale, observed = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *through_reference(_specified(observed, ctx.family), (mean, scale), gradients), None, None
        return *_backward(gradients[0], mean, scale, observed, ctx.family), None, None


def _specified(observed: Tensor, family: int) -> Any:
    return lambda mean, scale: reference(mean, scale, observed, family=FAMILIES[family])


# ---- what the op says of itself ----------------------------------------------------------------------------------------------------------

_SIZES = {
    "tiny": [(2, 1, 1), (2, 9, 20), (3, 33, 5), (5, 7, 130), (3, 0, 4), (2, 4, 0)],
    "small": [(2, 128, 20)],
    "paper": [(2, 128, 64)],
    "large": [(8, 65536, 64)],
}


def _cases(size: Size, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    for n, b, d in _SIZES[size]:
        for family in FAMILIES if size == "tiny" else FAMILIES[:1]:
            mean, scale = torch.randn(n, b, d, device=device), torch.rand(n, b, d, device=device) + 0.3
            observed = torch.rand(n, b, device=device).argsort(0) < 2 if size != "tiny" else torch.rand(n, b, device=device) > 0.4
            parameters = (x.to(dtype).requires_grad_() for x in (mean, scale))
            yield Case(f"N={n} B={b} D={d} {family}", (*parameters, observed), {"family": family})


def _cost(mean: Tensor, scale: Tensor, observed: Tensor, *, backward: bool = False, family: str = "normal") -> Cost:
    """Of rows that all hold two: 2 of N modalities are read."""
    rows, d = observed.shape[1], mean.shape[-1]
    read, sums = 4 * rows * d * mean.element_size() + nbytes(observed), observed.numel() * sums_dtype(mean, scale).itemsize
    return Cost(read + sums, nbytes(mean, scale), 40 * rows * d) if backward else Cost(read, sums, 20 * rows * d)


OP = FusedOp(name="pair_divergence", call=pair_divergence, reference=reference, naive=naive, cases=_cases, cost=_cost)
