"""Samples of a mixture's experts, differentiated along all experts at once: what makes `MMVAE`'s unbiased gradient.

    q = (1/n) sum_j q_j,      r_j(z) = q_j / (n q),      T_j(z) = m_j + s_j e,   e = (z - m_j) / s_j held fixed

T_j(z) has the value z, and moves as a sample of expert j does when its mean m_j and scale s_j change. For z ~ q_i and any f,

    E f r_j d log q_j  =  E r_j { df/dz + f d(log q_i - log q)/dz } dT_j                                                      (1)

because q_i r_j = q_j (q_i / (n q)), and E_{q_j} h d log q_j = E_{q_j} (dh/dz) dT_j for h = f q_i / (n q), both being the derivative of
E_{q_j} h by q_j's parameters. It holds where h is continuous, with kinks as well: for Normals and Laplaces. The scores r_j d log q_j of the
mixture, which make importance-weighted gradients noisy, become forces along paths, whose noise does not grow with the number of samples.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from meme_dist.distributions import Diagonal


def responsibilities(density: Float[Tensor, "S N K B"], observed: Bool[Tensor, "N B"]) -> Float[Tensor, "S N K B"]:
    """r_j of each sample from log q_j of it, over what the row observes; even where it observes nothing. Carries no gradient."""
    there = (observed | ~observed.any(0))[:, None]
    return torch.where(there, density.detach(), -torch.inf).softmax(1)


def densities(z: Float[Tensor, "S K B D"], q: Diagonal) -> Float[Tensor, "S N K B"]:
    """log q_j of each sample, for stacked experts [N, B, D] that are held fixed: it has a gradient to z alone."""
    return torch.stack([type(q)(mean, scale).log_prob(z) for mean, scale in zip(q.mean.detach(), q.scale.detach(), strict=True)], 1)


def along_all(z: Float[Tensor, "S K B D"], q: Diagonal, share: Float[Tensor, "S N K B"]) -> Float[Tensor, "S K B D"]:
    """Zeros, with the gradient of sum_j share_j T_j(z) by the experts' parameters; q stacked [N, B, D]."""
    moved = torch.zeros_like(z)
    for j, (mean, scale) in enumerate(zip(q.mean, q.scale, strict=True)):
        step = mean - mean.detach() + _standardised(z, mean, scale) * (scale - scale.detach())
        moved = moved + share[:, j, ..., None].detach() * step
    return moved


def drawn_apart(
    z: Float[Tensor, "S K B D"],
    source: Int[Tensor, "S K B"],
    q: Diagonal,
    share: Float[Tensor, "S N K B"],
    weight: Float[Tensor, "S K B"],
) -> Float[Tensor, " B"]:
    """A number whose gradient is sum_{s,k,j} weight share_j (d(log q_source - log q)/dz) dT_j, for z from expert `source`.

    Its own value means nothing. No network is asked, and nothing of the size of [S, N, K, B, D] is kept for the backward pass.
    """
    mean, scale = q.mean.detach(), q.scale.detach()
    force = torch.zeros_like(z)
    for j, (m, s) in enumerate(zip(mean, scale, strict=True)):
        force += ((source == j).to(z.dtype) - share[:, j])[..., None] * _slope(type(q)(m, s), z)
    force = weight[..., None] * force
    total = z.new_zeros(z.shape[2])
    for j, (m, s) in enumerate(zip(q.mean, q.scale, strict=True)):
        pushed = share[:, j, ..., None] * force
        total = total + (pushed.sum((0, 1)) * m + (pushed * _standardised(z, m, s)).sum((0, 1)) * s).sum(-1)
    return total


def _standardised(z: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    return ((z - mean) / scale).detach()


def _slope(q: Diagonal, z: Tensor) -> Tensor:
    """d log q(z) / dz."""
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        return torch.autograd.grad(q.log_prob(leaf).sum(), leaf)[0]
