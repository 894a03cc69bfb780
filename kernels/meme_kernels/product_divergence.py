"""Products of diagonal Normals as in `product_of_experts`, with their divergences in the same pass: from the standard Normal prior (MVAE,
MoPoE) or from each of their own experts (MVTCAE).

    KL(product_s || N(0, I)) = 1/2 sum_d  v - 1 - log v + mean_s^2                                      v = 1 / P_s, the variance
    KL(product_s || q_n)     = 1/2 sum_d  r - 1 - log r + (mean_s - mean_n)^2 / scale_n^2               r = v / scale_n^2

The gradient adds g mean_s and g v (1 - v) / 2 to those of mean_s and P_s; against experts, with t = mean_s - mean_n,

    mean_s:  sum_n g_n t / scale_n^2       P_s:  sum_n g_n v (1 - r) / 2       mean_n:  -g_n t / scale_n^2
    1 / scale_n^2:  g_n (v + t^2 - scale_n^2) / 2

Reads and writes what `product_of_experts` does and S B (or S N B) divergences. Nothing is saved but the inputs; sums over D are taken by
tiles in a fixed order: no atomics, bitwise repeatable.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from meme_kernels._op import Case, Cost, FusedOp, Size, sums_dtype
from meme_kernels._products import products, specification
from meme_kernels.product_of_experts import cases, cost
from meme_kernels.product_of_experts import naive as naive_products

Against = Literal["standard", "experts"]


def product_divergence(
    mean: Tensor, scale: Tensor, mask: Tensor, *, standard: bool, against: Against = "standard"
) -> tuple[Tensor, Tensor, Tensor]:
    """mean, scale [N, B, D], mask bool [S, N] or [S, N, B] -> mean, scale [S, B, D] of the products and their divergences in nats.

    Against "standard" these are KL(product || N(0, I)) [S, B]; against "experts" KL(product || expert n) [S, N, B], 0 for experts outside
    the subset. An empty product without the standard expert counts as N(0, I): divergence 0, no gradient. Raises ValueError for other
    shapes, masks or `against`.
    """
    if against not in ("standard", "experts"):
        raise ValueError(f"product_divergence: against must be 'standard' or 'experts', got {against!r}")
    joint, deviation, kl = products(mean, scale, mask, standard=standard, against=against)
    return joint, deviation, kl


def reference(mean: Tensor, scale: Tensor, mask: Tensor, *, standard: bool, against: Against = "standard") -> tuple[Tensor, Tensor, Tensor]:
    """The specification, on any device and in any floating type."""
    joint, deviation, kl = specification(mean, scale, mask, standard=standard, against=against)
    return joint, deviation, kl


def naive(mean: Tensor, scale: Tensor, mask: Tensor, *, standard: bool, against: Against = "standard") -> tuple[Tensor, Tensor, Tensor]:
    """As the libraries of multimodal VAEs loop over subsets, then over the products (and experts) for the divergences."""
    means, scales = naive_products(mean, scale, mask, standard=standard)
    if against == "standard":
        kl = means.new_zeros(means.shape[:2])
        for k in range(len(kl)):
            kl[k, :] = _against(means[k], scales[k], 0.0, torch.ones_like(scales[k]))
        return means, scales, kl
    kl = means.new_zeros(*mask.shape[:2], mean.shape[1])
    for k in range(len(kl)):
        for n, member in enumerate(mask[k]):
            m, q = (torch.where(member.view(-1, 1), x[n], outside) for x, outside in ((mean, means[k]), (scale, scales[k])))
            kl[k, n, :] = _against(means[k], scales[k], m, q)
    return means, scales, kl


def _against(mean: Tensor, scale: Tensor, other: Tensor | float, deviation: Tensor) -> Tensor:
    return -0.5 * (1 - (scale / deviation) ** 2 - ((mean - other) / deviation) ** 2 + 2 * (scale.log() - deviation.log())).sum(-1)


# ---- what the op says of itself ---------------------------------------------------------------------------------------------------------


def _cases(size: Size, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    for case in cases(size, device, dtype):
        several = len(case.arguments[0]) > 1  # the product of one expert is that expert: only roundings would be compared
        for against in ("standard", "experts") if several else ("standard",):
            yield Case(f"{case.label} against {against}", case.arguments, case.settings | {"against": against})


def _cost(mean: Tensor, scale: Tensor, mask: Tensor, *, standard: bool, against: Against = "standard", backward: bool = False) -> Cost:
    (n, b, d), s = mean.shape, len(mask)
    many = n if against == "experts" else 1
    kl = s * many * b * sums_dtype(mean, scale).itemsize
    read, written, flops = cost(mean, scale, mask, standard=standard, backward=backward)
    more = (9 if backward else 6) * s * many * b * d
    return Cost(read + kl, written, flops + more) if backward else Cost(read, written + kl, flops + more)


OP = FusedOp(name="product_divergence", call=product_divergence, reference=reference, naive=naive, cases=_cases, cost=_cost)
