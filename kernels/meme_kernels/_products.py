"""What the two ops on products of experts share: the specification, a closed-form gradient for where no kernel runs, the switch.

Products for all subsets at once are two matrix products with the mask. Autograd would hold and pass over a dozen tensors [S, B, D] on
the way back; the closed form makes that five, which is what a CPU pays for when S runs to a thousand.
"""

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from meme_kernels import _product_kernels as kernels
from meme_kernels._op import sums_dtype, through_reference, uses_triton

Against = Literal["nothing", "standard", "experts"]


def products(mean: Tensor, scale: Tensor, mask: Tensor, *, standard: bool, against: Against) -> tuple[Tensor, ...]:
    """Mean and scale [S, B, D] of the products, and their divergences [S, B] or [S, N, B] unless `against` nothing."""
    _check(mean, scale, mask)
    if against == "experts" and not uses_triton(mean, scale, mask):
        return specification(mean, scale, mask, standard=standard, against=against)
    return _Products.apply(mean, scale, mask, standard, against)


def specification(mean: Tensor, scale: Tensor, mask: Tensor, *, standard: bool, against: Against) -> tuple[Tensor, ...]:
    """The same in plain PyTorch, on any device and in any floating type, differentiable as often as you like.

    One non-finite coordinate of a member makes the whole row of its products NaN (the kernel: that coordinate). Divergences from experts
    are taken one expert after the other, so that [S, N, B, D] is never held.
    """
    mean, scale, prior = _prepared(mean, scale, mask, standard)
    precision = 1 / scale.square()
    total = _weighted(mask, precision) + prior.nan_to_num(nan=1.0)
    joint = torch.where(prior.isnan(), torch.nan, _weighted(mask, precision * mean) / total)
    variance = torch.where(prior.isnan(), torch.nan, 1 / total)
    if against == "nothing":
        return joint, variance.sqrt()
    if against == "standard":
        return joint, variance.sqrt(), _divergence(variance, joint.square())
    kl = []
    for m, p, member in zip(mean, precision, _rows(mask)[..., None].unbind(1), strict=True):
        m, p = torch.where(member, m, 0.0), torch.where(member, p, 1.0)
        kl.append(torch.where(member[..., 0], _divergence(variance * p, (joint - m).square() * p), 0.0))
    return joint, variance.sqrt(), torch.stack(kl, 1)


def _divergence(ratio: Tensor, distance: Tensor) -> Tensor:
    return (ratio - 1 - ratio.log() + distance).sum(-1) / 2


def _prepared(mean: Tensor, scale: Tensor, mask: Tensor, standard: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Experts in the type sums are kept in, with N(0, 1) for what is not finite, so that 0 times them is 0; and what a subset's precision
    starts with [S, B, 1]: 1 with the standard expert and where no expert is, NaN where a member is not finite."""
    wide = sums_dtype(mean, scale)
    mean, scale = mean.to(wide), scale.to(wide)
    finite = (0 * mean + 0 * (1 / (scale * scale))) == 0
    broken = _weighted(mask, (~finite.all(-1, keepdim=True)).to(wide)) > 0
    empty = ~_rows(mask).any(1)[:, :, None]
    prior = torch.where(broken, torch.nan, 1.0 if standard else empty.to(wide))
    return torch.where(finite, mean, 0.0), torch.where(finite, scale, 1.0), prior


def _rows(mask: Tensor) -> Tensor:
    return mask if mask.dim() == 3 else mask[:, :, None]


def _weighted(mask: Tensor, x: Tensor) -> Tensor:
    """The sums of x [N, B, *] over each of the subsets: [S, B, *]."""
    weight = mask.to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):  # a sum of precisions in bf16 would be wrong by 1 %
        if mask.dim() == 2:
            return (weight @ x.flatten(1)).view(len(mask), *x.shape[1:])
        return torch.einsum("snb,nbd->sbd", weight, x)


def _check(mean: Tensor, scale: Tensor, mask: Tensor) -> None:
    rows = tuple(mean.shape[:2])
    if mean.dim() != 3 or mean.shape != scale.shape or mask.dtype != torch.bool or tuple(mask.shape[1:]) not in (rows, rows[:1]):
        got = f"{tuple(mean.shape)}, {tuple(scale.shape)}, {tuple(mask.shape)} {mask.dtype}"
        raise ValueError(f"products of experts: expected mean and scale [N, B, D], mask bool [S, N] or [S, N, B], got {got}")


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mean: Tensor, scale: Tensor, mask: Tensor, standard: bool, against: Against) -> tuple[Tensor, ...]:
        ctx.standard, ctx.against, ctx.launches = standard, against, uses_triton(mean, scale, mask)
        ctx.set_materialize_grads(ctx.launches)
        if ctx.launches:
            ctx.save_for_backward(mean, scale, mask)
            outputs = kernels.products(mean, scale, mask, standard, against)
            return outputs[:2] if against == "nothing" else outputs
        prepared = _prepared(mean, scale, mask, standard)
        outputs = _by_matrices(*prepared, mask, against)
        ctx.save_for_backward(mean, scale, mask, *prepared, *outputs[:2])
        return outputs

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> tuple[Tensor | None, ...]:
        mean, scale, mask, *saved = ctx.saved_tensors
        if torch.is_grad_enabled():
            reference = partial(specification, standard=ctx.standard, against=ctx.against)
            return *through_reference(reference, (mean, scale, mask), g), None, None
        if not ctx.launches:
            mean_in, scale_in, prior, joint, deviation = saved
            g_mean, g_scale = _matrix_gradients(g, mean_in, scale_in, prior, mask, joint, deviation)
            return g_mean.to(mean.dtype), g_scale.to(scale.dtype), None, None, None
        g_kl = g[2] if len(g) == 3 else g[0].new_empty(0)
        return *kernels.gradients(g[0], g[1], g_kl, mean, scale, mask, ctx.standard, ctx.against), None, None, None


def _by_matrices(mean: Tensor, scale: Tensor, prior: Tensor, mask: Tensor, against: Against) -> tuple[Tensor, ...]:
    precision = (scale * scale).reciprocal_()
    total = _weighted(mask, precision).add_(prior)
    variance = total.reciprocal()
    joint = _weighted(mask, precision.mul_(mean)).mul_(variance)
    if against == "nothing":
        return joint, variance.sqrt_()
    kl = total.log_().add_(variance).sub_(1).addcmul_(joint, joint).sum(-1) / 2
    return joint, variance.sqrt_(), kl


def _matrix_gradients(
    g: tuple[Tensor | None, ...], mean: Tensor, scale: Tensor, prior: Tensor, mask: Tensor, joint: Tensor, deviation: Tensor
) -> tuple[Tensor, Tensor]:
    """The formulas of `product_of_experts` and, with a third gradient, of divergences from the standard Normal; None stands for zeros."""
    g_joint, g_deviation, g_kl = (*g, None)[:3]
    g_kl = None if g_kl is None else g_kl[:, :, None]
    variance = deviation * deviation
    g_moment = _added(g_joint, None if g_kl is None else joint * g_kl, joint) * variance
    from_kl = None if g_kl is None else (variance - 1).mul_(g_kl)
    g_total = _added(None if g_deviation is None else g_deviation * deviation, from_kl, joint).mul_(variance * -0.5)
    g_total.addcmul_(g_moment, joint, value=-1)
    broken, members = prior.isnan(), mask.transpose(0, 1)
    if broken.device.type != "cpu" or torch.compiler.is_compiling() or broken.any():  # looking costs a CPU less than filling
        # a product with a member that is not finite gives no gradient, to other experts neither
        g_moment, g_total = g_moment.masked_fill(broken, 0.0), g_total.masked_fill(broken, 0.0)
    g_mean, g_precision = _weighted(members, g_moment), _weighted(members, g_total)
    precision = (scale * scale).reciprocal_()
    g_scale = g_precision.addcmul_(mean, g_mean).mul_(precision).div_(scale).mul_(-2)
    return g_mean.mul_(precision), g_scale


def _added(a: Tensor | None, b: Tensor | None, like: Tensor) -> Tensor:
    if a is None:
        return torch.zeros_like(like) if b is None else b
    return a if b is None else a + b
