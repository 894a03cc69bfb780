"""Bounds of log p(x) from log importance weights, for joint posteriors that are mixtures: sampled stratum by stratum.

The weights of a row are log w[s, k] = log p(x, z[s, k]) - log q(z[s, k] | x) with z[s, k] from stratum s (an expert, a subset) of an even
mixture q over the strata that are `present`. With n of them:

    tight    L = log (1 / (n K)) sum_{s,k} w[s, k]            Shi et al. 2019, `m_iwae` of their code: rises to the evidence with K
    looser   L = (1 / n) sum_s log (1 / K) sum_k w[s, k]      `m_iwae_looser`, what they and MultiVae train: at most the tight one

K = 1 makes `looser` the stratified ELBO of a mixture posterior. Neither exceeds log p(x) in expectation, by Jensen's inequality.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Weighted(NamedTuple):
    """A bound of each row, and how much each sample counts in its gradient: weight = d bound / d log w, which sums to 1 over a row."""

    bound: Float[Tensor, " B"]
    weight: Float[Tensor, "S K B"]


def importance_weighted(log_weight: Float[Tensor, "S K B"], present: Bool[Tensor, "S B"], *, tight: bool = False) -> Weighted:
    """The bound and its weights; 0 for rows without any present stratum, whose log weights are never read.

    The gradient of `bound` flows through the log weights as it is (no stop); `weight` carries none.
    """
    count = present.sum(0).clamp(min=1).to(log_weight.dtype)
    there = present[:, None].expand_as(log_weight)
    samples = log_weight.shape[1]
    safe = torch.where(there, log_weight, 0.0)
    if not tight:
        each = safe.logsumexp(1) - math.log(samples)
        bound = torch.where(present, each, 0.0).sum(0) / count
        weight = torch.where(there, safe.softmax(1) / count, 0.0)
        return Weighted(bound, weight.detach())
    some = present.any(0)
    filled = torch.where(there | ~some, safe, -torch.inf)
    bound = torch.where(some, filled.flatten(0, 1).logsumexp(0) - (count * samples).log(), 0.0)
    weight = torch.where(there, filled.flatten(0, 1).softmax(0).view_as(safe), 0.0)
    return Weighted(bound, weight.detach())


def drawn(weighted: Weighted, uniform: Float[Tensor, "G B"]) -> Int[Tensor, "G B"]:
    """A sample k of each group of a row, drawn by its weight: groups are the strata, or one for all S K samples (index s K + k).

    E over the draw of d log w[drawn] is the bound's gradient (times n for strata), at the cost of differentiating one sample instead
    of all: Rao-Blackwellised backwards (Burda et al. 2016, sec. 3 states the weighted sum; drawing is what Bornschein and Bengio 2015 do).
    """
    grouped = weighted.weight.flatten(0, 1)[None] if len(uniform) == 1 else weighted.weight
    edges = grouped.cumsum(1)
    return (uniform[:, None] * edges[:, -1:] > edges).sum(1).clamp(max=grouped.shape[1] - 1)


def surrogate(value: Float[Tensor, " B"], through: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """`value` with the gradient of `through`."""
    return value.detach() + through - through.detach()


def scale_gradient(x: Float[Tensor, "*any"], factor: Float[Tensor, "*any"]) -> None:
    """Multiply the gradient that reaches x by `factor`, which broadcasts to it: the second weight of the doubly reparameterised estimator.

    With the posterior's parameters stopped inside log q, d L / d phi = sum_k weight_k^2 (d log w_k / d z_k) (d z_k / d phi) (Tucker et al.
    2019, eq. 8): the first weight comes with the loss, the second here, on every path to z.
    """
    if x.requires_grad:
        x.register_hook(lambda gradient: factor.detach() * gradient)
