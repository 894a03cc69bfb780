"""Every sample under every posterior: Q[i, j, k, b] = log q_j(z[i, k, b]) for diagonal densities.

    Normal:  log q = - sum_d [ (z - mean)^2 / (2 scale^2) + log scale ] - (D / 2) log 2 pi
    Laplace: log q = - sum_d [ |z - mean| / scale + log (2 scale) ]

Reads N K B D samples and 2 N B D parameters, writes N^2 K B sums; about 4 N^2 K B D floating point operations.
The reference goes posterior by posterior: it holds [N, K, B, D], never [N, N, K, B, D].
"""

import math

import torch
from torch import Tensor


def normal(z: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """z [..., D], mean and scale broadcast against it -> [...]."""
    return -((z - mean) / scale).square().sum(-1) / 2 - scale.log().sum(-1) - 0.5 * math.log(2 * math.pi) * z.shape[-1]


def laplace(z: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """z [..., D], mean and scale broadcast against it -> [...]."""
    return -((z - mean) / scale).abs().sum(-1) - scale.log().sum(-1) - math.log(2) * z.shape[-1]


def cross_log_prob(z: Tensor, mean: Tensor, scale: Tensor, density=normal) -> Tensor:
    """z [N, K, B, D], mean and scale [N, B, D] -> [N (source of the sample), N (posterior), K, B]."""
    return torch.stack([density(z, m, s) for m, s in zip(mean, scale, strict=True)], 1)
