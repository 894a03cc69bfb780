"""Priors over z: a standard density, with or without learned scales, and mixtures that are made of posteriors."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from meme_dist.distributions import Components, Diagonal
from meme_dist.modality import Encoding


class Standard(nn.Module):
    """Independent coordinates of mean 0: scale 1 each, or (`learned`) scales that share a sum of D, as in Shi et al. 2019's code."""

    def __init__(self, size: int, family: type[Diagonal], *, learned: bool = False):
        super().__init__()
        self.family = family
        self.raw = nn.Parameter(torch.zeros(size)) if learned else None
        self.register_buffer("mean", torch.zeros(size), persistent=False)

    def density(self) -> Diagonal:
        """The prior itself, [D]."""
        mean = torch.as_tensor(self.mean)
        return self.family(mean, torch.ones_like(mean) if self.raw is None else len(self.raw) * self.raw.softmax(-1))

    def components(self) -> Components:
        """The prior as a mixture of one."""
        density = self.density()
        return Components(self.family(density.mean[None], density.scale[None]))


class PseudoInputs(nn.Module):
    """M learnable pseudo-inputs of one modality: they stand in for its data where it is missing (Joy et al. 2022, eq. 4).

        p_lambda(z) = (1/M) sum_m q(z | u_m)

    A VampPrior (Tomczak and Welling 2018) whose components come out of the modality's own encoder. They live in feature space, after the
    modality's embedding, so that tokens have them too; `initialise` sets them from data, M need not match any batch size.
    """

    def __init__(self, count: int, feature: tuple[int, ...]):
        super().__init__()
        if count < 1:
            raise ValueError(f"pseudo_inputs: expected at least 1, got {count}")
        self.inputs = nn.Parameter(torch.zeros(count, *feature))

    @torch.no_grad()
    def initialise(self, features: Float[Tensor, "R *feature"], generator: torch.Generator) -> None:
        """Take M of these rows; where there are fewer, repeat them with a tenth of their spread as noise, so that none stay equal.

        Rows that are all the same (one alone) have none: then it is a tenth of their mean size, or of 1.
        """
        if len(features) == 0:
            raise ValueError("pseudo-inputs: expected at least one row that holds the modality, got none")
        count = len(self.inputs)
        order = torch.randperm(len(features), generator=generator).repeat(-(-count // len(features)))[:count]
        chosen = features.to(self.inputs)[order.to(features.device)]
        spread = chosen.std(0, correction=0, keepdim=True)
        if not spread.any():
            spread = chosen.abs().mean() if chosen.any() else torch.ones_like(spread)
        jitter = torch.randn(chosen.shape, generator=generator).to(chosen) * (0.1 * spread)
        self.inputs.copy_(chosen)
        self.inputs[len(features) :] += jitter[len(features) :]

    def posterior(self, encoding: Encoding) -> Diagonal:
        """The M components q(z | u_m), [M, D]."""
        return encoding.encode_features(self.inputs)


def join(posteriors: list[Diagonal]) -> Diagonal:
    """The components of several mixtures with equal M as one mixture [N M, D]."""
    return type(posteriors[0])(torch.cat([q.mean for q in posteriors]), torch.cat([q.scale for q in posteriors]))
