"""Log density of an evenly weighted mixture of M diagonal components: log (1/M) sum_m q_m(z).

Reads rows D + 2 M D numbers, writes `rows`; about 4 rows M D floating point operations. The Normal reference is two matrix products,
    sum_d (z - mean)^2 / scale^2 = z^2 @ (1/scale^2) - 2 z @ (mean/scale^2) + sum_d mean^2/scale^2,
in float64, where the cancellation (up to z^2/scale^2 ~ 1e8) leaves 1e-8; so it never holds [rows, M, D]. The Laplace reference goes
component block by component block.
"""

import math

import torch
from torch import Tensor

_BLOCK = 64  # components at a time in the Laplace form


def normal(z: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """z [rows, D], mean and scale [M, D] -> [rows], in the type of z."""
    wide, mean, scale = z.double(), mean.double(), scale.double()
    precision = scale.square().reciprocal()
    constant = (mean.square() * precision).sum(-1) + 2 * scale.log().sum(-1) + math.log(2 * math.pi) * z.shape[-1]
    distance = wide.square() @ precision.T - 2 * wide @ (mean * precision).T
    return (torch.logsumexp(-(distance + constant) / 2, -1) - math.log(len(mean))).to(z.dtype)


def laplace(z: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """z [rows, D], mean and scale [M, D] -> [rows]."""
    blocks = [
        -((z[:, None] - m) / s).abs().sum(-1) - s.log().sum(-1) - math.log(2) * z.shape[-1]
        for m, s in zip(mean.split(_BLOCK), scale.split(_BLOCK), strict=True)
    ]
    return torch.logsumexp(torch.cat(blocks, -1), -1) - math.log(len(mean))
