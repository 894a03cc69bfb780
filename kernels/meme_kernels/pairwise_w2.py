"""All squared 2-Wasserstein distances between two sets of diagonal Normals:

    W2^2(a_s, b_t) = ||mean_s - mean_t||^2 + ||scale_s - scale_t||^2

(Appendix F of Joy et al. 2022 prints a plus sign in the first norm: a slip.) It is the squared Euclidean distance of the concatenated
parameters, E = 2 D numbers a row, so [S, T, D] is never held. Differences are squared directly: the expanded form |a|^2 + |b|^2 - 2 a b
loses all digits where distances are small beside the norms.

    gradient of a_s:  2 sum_t g[s, t] (a_s - b_t),   of b_t:  2 sum_s g[s, t] (b_t - a_s)

Forward reads (S + T) E numbers, writes S T, 3 S T E flops. Backward reads those and S T gradients, writes (S + T) E, 8 S T E flops.
Every sum is taken by one program in one order: no atomics, bitwise repeatable.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from meme_kernels._launch import block, cdiv
from meme_kernels._op import Case, Cost, FusedOp, Size, opaque, run, sums_dtype, through_reference, uses_triton
from meme_kernels._triton import jit, tl


def pairwise_w2(mean_a: Tensor, scale_a: Tensor, mean_b: Tensor, scale_b: Tensor) -> Tensor:
    """mean_a, scale_a [S, D], mean_b, scale_b [T, D] -> [S, T], float32 (float64 for float64).

    Raises ValueError for other shapes.
    """
    _check(mean_a, scale_a, mean_b, scale_b)
    if not uses_triton(mean_a, scale_a, mean_b, scale_b):
        return reference(mean_a, scale_a, mean_b, scale_b)
    return _Distance.apply(torch.cat([mean_a, scale_a], -1), torch.cat([mean_b, scale_b], -1))


def reference(mean_a: Tensor, scale_a: Tensor, mean_b: Tensor, scale_b: Tensor) -> Tensor:
    """The specification, on any device and in any floating type."""
    return _reference(torch.cat([mean_a, scale_a], -1), torch.cat([mean_b, scale_b], -1))


def naive(mean_a: Tensor, scale_a: Tensor, mean_b: Tensor, scale_b: Tensor) -> Tensor:
    """As commonly written: two [S, T, D] tensors."""
    return (mean_a[:, None] - mean_b).square().sum(-1) + (scale_a[:, None] - scale_b).square().sum(-1)


def _reference(a: Tensor, b: Tensor) -> Tensor:
    return _Reference.apply(a, b)


def _check(mean_a: Tensor, scale_a: Tensor, mean_b: Tensor, scale_b: Tensor) -> None:
    shapes = [tuple(x.shape) for x in (mean_a, scale_a, mean_b, scale_b)]
    if shapes[0] != shapes[1] or shapes[2] != shapes[3] or len(shapes[0]) != 2 or len(shapes[2]) != 2 or shapes[0][1] != shapes[2][1]:
        raise ValueError(f"pairwise_w2: expected mean and scale [S, D] and [T, D] of one D, got {shapes}")


class _Reference(torch.autograd.Function):
    """torch.cdist with a second derivative; nothing larger than [S, T] is held before that is asked for."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        wide = sums_dtype(a, b)
        return torch.cdist(a.to(wide), b.to(wide), compute_mode="donot_use_mm_for_euclid_dist").square()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        """As two matrix products, in float64: what cancels there leaves more digits than float32 inputs have."""
        a, b = ctx.saved_tensors
        g, x, y = gradients[0].double(), a.double(), b.double()
        grad_a = 2 * (g.sum(1, keepdim=True) * x - g @ y)
        grad_b = 2 * (g.sum(0)[:, None] * y - g.T @ x)
        return grad_a.to(a.dtype), grad_b.to(b.dtype)


# ---- kernels ----------------------------------------------------------------------------------------------------------------------------


@jit
def _distance_kernel(a_ptr, b_ptr, out_ptr, S, T, E, BS: tl.constexpr, BT: tl.constexpr, ACC: tl.constexpr):
    """A tile [BS, BT] of distances; a [E, S] and b [E, T] come transposed, so that every load is of consecutive numbers."""
    tiles = tl.cdiv(T, BT)
    program = tl.program_id(0).to(tl.int64)
    s = (program // tiles) * BS + tl.arange(0, BS)
    t = (program % tiles) * BT + tl.arange(0, BT)
    total = tl.zeros((BS, BT), ACC)
    a_at, b_at = a_ptr + s, b_ptr + t  # stepped, not multiplied: no product to overflow
    for _ in range(E):
        a = tl.load(a_at, mask=s < S, other=0.0).to(ACC)
        b = tl.load(b_at, mask=t < T, other=0.0).to(ACC)
        difference = a[:, None] - b[None, :]
        total += difference * difference
        a_at += S
        b_at += T
    tl.store(out_ptr + s[:, None] * T + t[None, :], total, mask=(s < S)[:, None] & (t < T)[None, :])


@jit
def _gradient_kernel(g_ptr, a_ptr, b_ptr, out_ptr, S, T, E, BS: tl.constexpr, BE: tl.constexpr, ACC: tl.constexpr):
    """A tile [BS, BE] of 2 sum_t g[t, s] (a_s - b_t); g [T, S], a [S, E], b [T, E]."""
    tiles = tl.cdiv(E, BE)
    program = tl.program_id(0).to(tl.int64)
    s = (program // tiles) * BS + tl.arange(0, BS)
    e = (program % tiles) * BE + tl.arange(0, BE)
    inside = (s < S)[:, None] & (e < E)[None, :]
    a = tl.load(a_ptr + s[:, None] * E + e[None, :], mask=inside, other=0.0).to(ACC)
    total = tl.zeros((BS, BE), ACC)
    g_at, b_at = g_ptr + s, b_ptr + e
    for _ in range(T):
        g = tl.load(g_at, mask=s < S, other=0.0).to(ACC)
        b = tl.load(b_at, mask=e < E, other=0.0).to(ACC)
        total += g[:, None] * (a - b[None, :])
        g_at += S
        b_at += E
    tl.store(out_ptr + s[:, None] * E + e[None, :], (2.0 * total).to(out_ptr.dtype.element_ty), mask=inside)


# ---- launch and binding -----------------------------------------------------------------------------------------------------------------


def _fake_distance(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0], dtype=sums_dtype(a, b))  # len() would fix the size for torch.compile


@opaque(_fake_distance)
def _distance(a: Tensor, b: Tensor) -> Tensor:
    out = _fake_distance(a, b)
    (s, e), t = a.shape, len(b)
    bs, bt = block(s, least=16, most=64), block(t, least=16, most=64)
    grid = (cdiv(s, bs) * cdiv(t, bt),)
    run(_distance_kernel, grid, a.T.contiguous(), b.T.contiguous(), out, s, t, e, BS=bs, BT=bt, ACC=_accumulator(out), num_warps=4)
    return out


def _fake_gradient(g: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.empty_like(a, memory_format=torch.contiguous_format)


@opaque(_fake_gradient)
def _gradient(g: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The gradient of a [S, E] from g [T, S] and b [T, E]."""
    out = _fake_gradient(g, a, b)
    (s, e), t = a.shape, len(b)
    bs, be = block(s, least=16, most=64), block(e, least=16, most=64)
    grid = (cdiv(s, bs) * cdiv(e, be),)
    run(
        _gradient_kernel, grid, g.contiguous(), a.contiguous(), b.contiguous(), out, s, t, e, BS=bs, BE=be, ACC=_accumulator(g), num_warps=4
    )
    return out


def _accumulator(like: Tensor) -> Any:
    return tl.float64 if like.dtype == torch.float64 else tl.float32


class _Distance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return _distance(a, b)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        if torch.is_grad_enabled():
            return through_reference(_reference, (a, b), gradients)
        (g,) = gradients
        grad_a = _gradient(g.T, a, b) if ctx.needs_input_grad[0] else None
        grad_b = _gradient(g, b, a) if ctx.needs_input_grad[1] else None
        return grad_a, grad_b


# ---- what the op says of itself ---------------------------------------------------------------------------------------------------------

_SIZES = {
    "tiny": [(1, 1, 1), (3, 5, 2), (17, 33, 7), (65, 16, 20), (0, 4, 3), (4, 0, 3)],
    "small": [(128, 128, 20)],
    "paper": [(1000, 1000, 64)],
    "large": [(8192, 8192, 64)],
}


def _cases(size: Size, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    for s, t, d in _SIZES[size]:
        rows = [torch.randn(n, d, device=device) for n in (s, t)]
        scales = [torch.rand(n, d, device=device) + 0.1 for n in (s, t)]
        tensors = (rows[0], scales[0], rows[1], scales[1])
        yield Case(f"S={s} T={t} D={d}", tuple(x.to(dtype).requires_grad_() for x in tensors), {})


def _cost(mean_a: Tensor, scale_a: Tensor, mean_b: Tensor, scale_b: Tensor, *, backward: bool = False) -> Cost:
    s, t, e, item = len(mean_a), len(mean_b), 2 * mean_a.shape[-1], mean_a.element_size()
    parameters, table = (s + t) * e * item, s * t * sums_dtype(mean_a).itemsize
    return Cost(parameters + table, parameters, 8 * s * t * e) if backward else Cost(parameters, table, 3 * s * t * e)


def _workspace(mean_a: Tensor, scale_a: Tensor, mean_b: Tensor, scale_b: Tensor) -> int:
    """The table's gradient turned round, for that of a."""
    return len(mean_a) * len(mean_b) * sums_dtype(mean_a).itemsize


OP = FusedOp(name="pairwise_w2", call=pairwise_w2, reference=reference, naive=naive, cases=_cases, cost=_cost, workspace=_workspace)
