"""Row sums of log p(x | parameters) over any event, data [P, *event] against parameters [K, P, *event] -> [K, P].

    Normal             - (x - mean)^2 / (2 scale^2) - log scale - log(2 pi) / 2
    Laplace            - |x - mean| / scale - log (2 scale)
    Bernoulli          x logit - softplus(logit)
    Poisson            x log rate - rate - log x!
    negative binomial  lgamma(x + r) - lgamma(r) - log x! + r log(r / (r + rate)) + x log(rate / (r + rate)),  variance rate + rate^2 / r

Reads P E + K P E numbers, writes K P. All sums in float32 (float64 for float64 parameters), whatever autocast does outside.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def normal(x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """Normal with a scale that broadcasts over the event."""
    return _sum(-((x - mean) / scale).square() / 2 - scale.log() - 0.5 * math.log(2 * math.pi))


def laplace(x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """Laplace with a scale that broadcasts over the event."""
    return _sum(-(x - mean).abs() / scale - scale.log() - math.log(2))


def bernoulli(x: Tensor, logit: Tensor) -> Tensor:
    """Bernoulli (x in [0, 1]) from logits: finite for any logit."""
    return _sum(x * logit - F.softplus(logit))


def poisson(x: Tensor, rate: Tensor) -> Tensor:
    """Poisson counts; rate > 0."""
    return _sum(torch.xlogy(x, rate) - rate - torch.lgamma(x + 1))


def negative_binomial(x: Tensor, rate: Tensor, dispersion: Tensor) -> Tensor:
    """Counts of mean `rate` > 0 and variance rate + rate^2 / dispersion."""
    ratio = torch.log1p(rate / dispersion)  # - log of the failure probability; exact where rate << dispersion
    body = torch.lgamma(x + dispersion) - torch.lgamma(dispersion) - torch.lgamma(x + 1)
    return _sum(body - (dispersion + x) * ratio + x * (rate.log() - dispersion.log()))


def _sum(terms: Tensor) -> Tensor:
    return terms.flatten(2).sum(-1)
