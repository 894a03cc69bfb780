"""What a decoder's output means: log p(x | parameters), its mean, and how many outputs a datum needs.

A decoder gives parameters [K, P, *event] (times two outputs, or a vocabulary, where `outputs` says so). Learned scales and dispersions are
parameters of the likelihood: one scale for the whole event, one dispersion for each of its elements.
"""

import math
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from meme_dist.distributions import log_likelihood, token_log_prob

Rows = Int[Tensor, " P"] | None
SCALE_FLOOR = 1e-4  # of learned scales and rates: keeps log and division finite


@runtime_checkable
class Likelihood(Protocol):
    """A family of densities over data given decoder outputs. `row` says which datum each of the P rows has (without it p has the p-th), so
    that data that several sources explain are never copied."""

    def log_prob(self, x: Shaped[Tensor, "X *event"], params: Float[Tensor, "K P *event"], row: Rows = None) -> Float[Tensor, "K P"]: ...
    def mean(self, params: Float[Tensor, "..."]) -> Shaped[Tensor, "..."]: ...


class _Scaled(nn.Module):
    """A location family whose scale is fixed, or learned as one number (softplus of a parameter plus a floor)."""

    def __init__(self, scale: float = 1.0, *, learned: bool = False):
        super().__init__()
        if not scale > SCALE_FLOOR:
            raise ValueError(f"scale: expected more than {SCALE_FLOOR}, got {scale}")
        raw = torch.tensor([math.log(math.expm1(scale - SCALE_FLOOR))])  # one entry: a tensor without a dimension cannot be sharded
        self.raw = nn.Parameter(raw) if learned else None
        self.fixed = scale

    def scale(self, params: Float[Tensor, "..."]) -> Float[Tensor, ""]:
        """The scale as a number on the device of `params`, filled there: no copy from the host. At least float32."""
        if self.raw is not None:
            return F.softplus(self.raw[0]) + SCALE_FLOOR
        return torch.full((), self.fixed, dtype=torch.promote_types(params.dtype, torch.float32), device=params.device)

    def mean(self, params: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The location itself."""
        return params


class Normal(_Scaled):
    """Normal(params, scale^2) over each element, summed over the event."""

    def log_prob(self, x: Shaped[Tensor, "X *event"], params: Float[Tensor, "K P *event"], row: Rows = None) -> Float[Tensor, "K P"]:
        """Sum over the event, in nats."""
        return log_likelihood(x, params, self.scale(params), family="normal", row=row)


class Laplace(_Scaled):
    """Laplace(params, scale) over each element, summed over the event."""

    def log_prob(self, x: Shaped[Tensor, "X *event"], params: Float[Tensor, "K P *event"], row: Rows = None) -> Float[Tensor, "K P"]:
        """Sum over the event, in nats."""
        return log_likelihood(x, params, self.scale(params), family="laplace", row=row)


class Bernoulli(nn.Module):
    """Bernoulli over each element from logits; x in [0, 1]."""

    def log_prob(self, x: Shaped[Tensor, "X *event"], params: Float[Tensor, "K P *event"], row: Rows = None) -> Float[Tensor, "K P"]:
        """Sum over the event, in nats."""
        return log_likelihood(x, params, family="bernoulli", row=row)

    def mean(self, params: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Probabilities."""
        return params.sigmoid()


class Categorical(nn.Module):
    """Tokens [P, T] from logits [K, P, T, V]; positions that hold `padding` are not scored."""

    def __init__(self, padding: int = 0):
        super().__init__()
        self.padding = padding

    def log_prob(self, x: Int[Tensor, "X T"], params: Float[Tensor, "K P T V"], row: Rows = None) -> Float[Tensor, "K P"]:
        """Sum over the positions that hold a token, in nats."""
        return token_log_prob(x, params, self.padding, row=row)

    def mean(self, params: Float[Tensor, "*rows T V"]) -> Int[Tensor, "*rows T"]:
        """The most probable token at each position (a mode: tokens have no mean); padding is never chosen."""
        scores = params.clone()
        scores[..., self.padding] = -torch.inf
        return scores.argmax(-1)


class Poisson(nn.Module):
    """Counts of rate softplus(params)."""

    def log_prob(self, x: Shaped[Tensor, "X *event"], params: Float[Tensor, "K P *event"], row: Rows = None) -> Float[Tensor, "K P"]:
        """Sum over the event, in nats."""
        return log_likelihood(x, self.mean(params), family="poisson", row=row)

    def mean(self, params: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The rate."""
        return F.softplus(params) + SCALE_FLOOR


class NegativeBinomial(nn.Module):
    """Counts of mean softplus(params) and variance mean + mean^2 / dispersion, one learned dispersion for each element of the event."""

    def __init__(self, event: tuple[int, ...]):
        super().__init__()
        self.raw = nn.Parameter(torch.full(event, math.log(math.expm1(1.0))))

    def log_prob(self, x: Shaped[Tensor, "X *event"], params: Float[Tensor, "K P *event"], row: Rows = None) -> Float[Tensor, "K P"]:
        """Sum over the event, in nats."""
        return log_likelihood(x, self.mean(params), F.softplus(self.raw) + SCALE_FLOOR, family="negative_binomial", row=row)

    def mean(self, params: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The mean count."""
        return F.softplus(params) + SCALE_FLOOR
