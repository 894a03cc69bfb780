"""Products of diagonal Normals, one for each of S subsets of N experts. Precisions add, means average by precision:

    P_s = sum_{n in s} 1 / scale_n^2  (+ 1 with a standard Normal expert)     scale_s = P_s^{-1/2}
    mean_s = sum_{n in s} mean_n / scale_n^2 / P_s

With h_s = g_mean_s / P_s and k_s = -g_scale_s scale_s^3 / 2 - h_s mean_s (the gradient of P_s) an expert's gradients are

    mean_n:  sum_{s with n} h_s / scale_n^2        scale_n:  -2 / scale_n^3  sum_{s with n} (k_s + h_s mean_n)

Forward reads 2 N B D numbers and the mask, writes 2 S B D; 3 flops for each member of a subset and coordinate. Backward reads
2 (N + S) B D, writes 2 N B D, 7 flops: products are computed again from the experts, which stay in registers. Nothing is saved but the
inputs. Every sum is taken in one order: no atomics, bitwise repeatable.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from meme_kernels._op import Case, Cost, FusedOp, Size, nbytes, sums_dtype
from meme_kernels._products import products, specification

Subsets = Literal["all", "others", "joint", "none"]


def product_of_experts(mean: Tensor, scale: Tensor, mask: Tensor, *, standard: bool) -> tuple[Tensor, Tensor]:
    """mean, scale [N, B, D], mask bool [S, N] (the same subsets for all rows) or [S, N, B] -> mean, scale [S, B, D], float32 (float64).

    An expert outside a subset reaches neither its value nor its gradient, NaN in it neither. An empty product without the standard expert
    has no density: it gets mean 0, scale 1 and no gradient, and is the caller's to mask. Raises ValueError for other shapes or masks.
    """
    joint, deviation = products(mean, scale, mask, standard=standard, against="nothing")
    return joint, deviation


def reference(mean: Tensor, scale: Tensor, mask: Tensor, *, standard: bool) -> tuple[Tensor, Tensor]:
    """The specification, on any device and in any floating type: two products with the mask as a matrix."""
    joint, deviation = specification(mean, scale, mask, standard=standard, against="nothing")
    return joint, deviation


def naive(mean: Tensor, scale: Tensor, mask: Tensor, *, standard: bool) -> tuple[Tensor, Tensor]:
    """As the libraries of multimodal VAEs loop over subsets: experts are joined one by one, and so are the products, as log variances."""
    log_variance = 2 * scale.log()
    means = log_variances = mean.new_empty(0, *mean.shape[1:])
    for subset in mask:
        m, v = _product_of_all(*_joined(mean, log_variance, subset, standard=standard))
        means, log_variances = torch.cat([means, m[None]]), torch.cat([log_variances, v[None]])
    return means, (log_variances / 2).exp()


def _joined(mean: Tensor, log_variance: Tensor, subset: Tensor, *, standard: bool) -> tuple[Tensor, Tensor]:
    """The members of one subset [N] or [N, B], stacked; where only some rows have one, the others get an expert that says nothing."""
    m = v = mean.new_empty(0, *mean.shape[1:])
    for n, member in enumerate(subset):
        if member.any():
            m_n, v_n = mean[n], log_variance[n]
            if member.dim():
                m_n, v_n = torch.where(member[:, None], m_n, 0.0), torch.where(member[:, None], v_n, torch.inf)
            m, v = torch.cat([m, m_n[None]]), torch.cat([v, v_n[None]])
    if standard:
        m, v = torch.cat([m, torch.zeros_like(mean[:1])]), torch.cat([v, torch.zeros_like(mean[:1])])
    return m, v


def _product_of_all(mean: Tensor, log_variance: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log variance of the product of these experts [members, B, D]; N(0, I) where none says anything."""
    precision = 1 / log_variance.exp()
    total = precision.sum(0)
    total = torch.where(total == 0, 1.0, total)
    return (precision * mean).sum(0) / total, (1 / total).log()


# ---- what the op says of itself ---------------------------------------------------------------------------------------------------------

# experts, rows, coordinates, which subsets, whether each row has its own, standard expert
SIZES: dict[Size, list[tuple[int, int, int, Subsets, bool, bool]]] = {
    "tiny": [
        (1, 1, 1, "all", False, False),
        (3, 5, 2, "all", False, True),
        (4, 17, 9, "others", True, False),
        (5, 3, 33, "all", True, True),
        (2, 33, 5, "all", True, False),
        (3, 2, 131, "others", False, False),
        (7, 2, 3, "joint", True, False),
        (2, 0, 3, "all", False, False),
        (2, 3, 0, "all", True, True),
        (2, 3, 4, "none", False, False),
    ],
    "small": [(5, 128, 20, "all", False, False)],
    "paper": [(3, 128, 64, "others", True, False), (10, 128, 64, "all", False, True)],
    "large": [(5, 8192, 64, "all", False, True), (5, 65536, 64, "others", True, False), (10, 2048, 64, "all", True, False)],
}


def subsets(n: int, kind: Subsets, device: torch.device) -> Tensor:
    """bool [S, N]: the empty subset and "all" others, one less than all ("others"), "none", or all experts at once ("joint")."""
    if kind == "all":
        return (torch.arange(2**n, device=device)[:, None] >> torch.arange(n, device=device)) % 2 == 1
    if kind == "others":
        return ~torch.eye(n, dtype=torch.bool, device=device)
    return torch.ones(0 if kind == "none" else 1, n, dtype=torch.bool, device=device)


def cases(size: Size, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """The calls of both ops on products: of different subsets, some with experts that some rows have not."""
    for n, b, d, kind, by_row, standard in SIZES[size]:
        mean, scale = torch.randn(n, b, d, device=device), torch.rand(n, b, d, device=device) + 0.3
        mask = subsets(n, kind, device)
        if by_row:
            mask = mask[:, :, None] & (torch.rand(n, b, device=device) < 0.7)
        label = f"N={n} B={b} D={d} {kind}{' by row' if by_row else ''}{' standard' if standard else ''}"
        yield Case(label, (mean.to(dtype).requires_grad_(), scale.to(dtype).requires_grad_(), mask), {"standard": standard})


def cost(mean: Tensor, scale: Tensor, mask: Tensor, *, standard: bool, backward: bool = False) -> Cost:
    """Experts and mask read, products written; backward the gradients instead. As if all experts were members of all subsets."""
    (n, b, d), s = mean.shape, len(mask)
    experts, out = nbytes(mean, scale), 2 * s * b * d * sums_dtype(mean, scale).itemsize
    read = experts + nbytes(mask)
    return Cost(read + out, experts, 7 * s * n * b * d) if backward else Cost(read, out, 3 * s * n * b * d)


OP = FusedOp(name="product_of_experts", call=product_of_experts, reference=reference, naive=naive, cases=cases, cost=cost)
