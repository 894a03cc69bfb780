"""Masked products of diagonal Normals: precision-weighted, one product for each of S subsets of N experts.

    precision_s = sum_n mask[s, n] / scale_n^2 (+ 1 with a standard expert),   mean_s = sum_n mask[s, n] mean_n / scale_n^2 / precision_s

Reads 2 N B D numbers, writes 2 S B D; 4 S N B D floating point operations, as two small matrix products.
"""

import torch
from torch import Tensor


def product_of_experts(mean: Tensor, scale: Tensor, mask: Tensor, standard: bool) -> tuple[Tensor, Tensor]:
    """mean, scale [N, B, D], mask [S, N, B] -> mean, scale [S, B, D].

    An empty product without the standard expert has no density: such entries get mean 0, scale 1, and are the caller's to mask.
    """
    weight = mask.to(mean.dtype)
    precision = scale.square().reciprocal()
    with torch.autocast(mean.device.type, enabled=False):  # a sum of precisions in bf16 would be wrong by 1 %
        total = torch.einsum("snb,nbd->sbd", weight, precision) + (1.0 if standard else 0.0)
        moment = torch.einsum("snb,nbd->sbd", weight, precision * mean)
    total = torch.where(total > 0, total, 1.0)
    return moment / total, total.rsqrt()
