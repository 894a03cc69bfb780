"""Vectors and counts: a multi-layer perceptron each way."""

from collections.abc import Sequence
from math import prod

from torch import nn

from meme_dist.distributions import DiagNormal, Diagonal
from meme_dist.likelihoods import Laplace, Likelihood
from meme_dist.modality import Modality


def mlp(
    event: tuple[int, ...],
    *,
    latent_dim: int,
    hidden: Sequence[int] = (512, 512),
    likelihood: Likelihood | None = None,
    family: type[Diagonal] = DiagNormal,
    weight: float = 1.0,
    log_input: bool = False,
    bounded: bool = False,
) -> Modality:
    """A perceptron over the flattened event. `log_input` encodes log(1 + x) (counts); `bounded` ends the decoder in a sigmoid."""
    size = prod(event)
    encoder = [nn.Flatten(), *([_Log1p()] if log_input else []), *layers([size, *hidden]), nn.Linear(hidden[-1], 2 * latent_dim)]
    decoder = [*layers([latent_dim, *reversed(hidden)]), nn.Linear(hidden[0], size), *([nn.Sigmoid()] if bounded else [])]
    return Modality(
        encoder=nn.Sequential(*encoder),
        decoder=nn.Sequential(*decoder, nn.Unflatten(-1, event)),
        likelihood=likelihood or Laplace(),
        latent_dim=latent_dim,
        feature=event,
        family=family,
        weight=weight,
    )


def layers(sizes: Sequence[int]) -> list[nn.Module]:
    """Linear and SiLU for each step between consecutive sizes."""
    return [layer for a, b in zip(sizes[:-1], sizes[1:], strict=True) for layer in (nn.Linear(a, b), nn.SiLU())]


class _Log1p(nn.Module):
    def forward(self, x):
        """log(1 + x), with x held at 0 from below: a pseudo-input may wander there."""
        return x.clamp(min=0).log1p()
