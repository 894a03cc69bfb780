"""What a decoder's output means: log p(x | parameters), its mean, and how many outputs a datum needs.

A decoder gives parameters [K, P, *event] (times two outputs, or a vocabulary, where `outputs` says so). Learned scales and dispersions are
parameters of the likelihood, one for each channel (the event's first axis) or one for the whole event.
"""

import math
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from meme_dist.distributions import log_likelihood, token_log_prob

SCALE_FLOOR = 1e-4  # of learned scales and rates: keeps log and division finite


@runtime_checkable
class Likelihood(Protocol):
    """A family of densities over data given decoder outputs."""

    def log_prob(self, x: Shaped[Tensor, "P *event"], params: Float[Tensor, "K P *event"]) -> Float[Tensor, "K P"]: ...
    def mean(self, params: Float[Tensor, "..."]) -> Shaped[Tensor, "..."]: ...


class _Scaled(nn.Module):
    """A location family whose scale is fixed, or learned as one number (softplus of a parameter plus a floor)."""

    def __init__(self, scale: float = 1.0, *, learned: bool = False):
        super().__init__()
        if not scale > SCALE_FLOOR:
            raise ValueError(f"scale: expected more than {SCALE_FLOOR}, got {scale}")
        raw = torch.tensor(math.log(math.expm1(scale - SCALE_FLOOR)))
        self.raw = nn.Parameter(raw) if learned else None
        self.fixed = scale

    @property
    def scale(self) -> Tensor:
        return torch.tensor(self.fixed) if self.raw is None else F.softplus(self.raw) + SCALE_FLOOR

    def mean(self, params: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The location itself."""
        return params


class Normal(_Scaled):
    """Normal(params, scale^2) over each element, summed over the event."""

    def log_prob(self, x: Shaped[Tensor, "P *event"], params: Float[Tensor, "K P *event"]) -> Float[Tensor, "K P"]:
        """Sum over the event, in nats."""
        return log_likelihood.normal(x, params, self.scale.to(params))


class Laplace(_Scaled):
    """Laplace(params, scale) over each element, summed over the event."""

    def log_prob(self, x: Shaped[Tensor, "P *event"], params: Float[Tensor, "K P *event"]) -> Float[Tensor, "K P"]:
        """Sum over the event, in nats."""
        return log_likelihood.laplace(x, params, self.scale.to(params))


class Bernoulli(nn.Module):
    """Bernoulli over each element from logits; x in [0, 1]."""

    def log_prob(self, x: Shaped[Tensor, "P *event"], params: Float[Tensor, "K P *event"]) -> Float[Tensor, "K P"]:
        """Sum over the event, in nats."""
        return log_likelihood.bernoulli(x, params)

    def mean(self, params: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Probabilities."""
        return params.sigmoid()


class Categorical(nn.Module):
    """Tokens [P, T] from logits [K, P, T, V]; positions that hold `padding` are not scored."""

    def __init__(self, padding: int = 0):
        super().__init__()
        self.padding = padding

    def log_prob(self, x: Int[Tensor, "P T"], params: Float[Tensor, "K P T V"]) -> Float[Tensor, "K P"]:
        """Sum over the positions that hold a token, in nats."""
        return token_log_prob(x, params, self.padding)

    def mean(self, params: Float[Tensor, "*rows T V"]) -> Int[Tensor, "*rows T"]:
        """The most probable token at each position (a mode: tokens have no mean); padding is never chosen."""
        scores = params.clone()
        scores[..., self.padding] = -torch.inf
        return scores.argmax(-1)


class Poisson(nn.Module):
    """Counts of rate softplus(params)."""

    def log_prob(self, x: Shaped[Tensor, "P *event"], params: Float[Tensor, "K P *event"]) -> Float[Tensor, "K P"]:
        """Sum over the event, in nats."""
        return log_likelihood.poisson(x, self.mean(params))

    def mean(self, params: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The rate."""
        return F.softplus(params) + SCALE_FLOOR


class NegativeBinomial(nn.Module):
    """Counts of mean softplus(params) and variance mean + mean^2 / dispersion, one learned dispersion for each element of the event."""

    def __init__(self, event: tuple[int, ...]):
        super().__init__()
        self.raw = nn.Parameter(torch.full(event, math.log(math.expm1(1.0))))

    def log_prob(self, x: Shaped[Tensor, "P *event"], params: Float[Tensor, "K P *event"]) -> Float[Tensor, "K P"]:
        """Sum over the event, in nats."""
        return log_likelihood.negative_binomial(x, self.mean(params), F.softplus(self.raw) + SCALE_FLOOR)

    def mean(self, params: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The mean count."""
        return F.softplus(params) + SCALE_FLOOR
