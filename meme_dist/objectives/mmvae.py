"""MMVAE: the joint posterior is the even mixture of the modalities' posteriors (Shi, Siddharth, Paige, Torr, NeurIPS 2019).

    q(z | x) = (1/n) sum_{i observed} q_i(z | x_i)
    log w[i, k] = sum_{j observed} log p_j(x_j | z[i, k]) + beta (log p(z[i, k]) - log q(z[i, k] | x)),    z[i, k] ~ q_i(z | x_i)

and a row's loss is minus one of the bounds of `meme_dist.bounds`, whose strata are the modalities. At beta = 1 it never exceeds log p(x).
A row with missing modalities mixes, and explains, those it has.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from meme_dist.bounds import Weighted, drawn, importance_weighted, scale_gradient, surrogate
from meme_dist.distributions import Components, Mixture, Posterior, mixture_of, sample_table
from meme_dist.modality import Modality
from meme_dist.noise import Noise
from meme_dist.objectives.base import Objective
from meme_dist.priors import Standard
from meme_dist.types import Batch, Loss, Sums

Gradient = Literal["iwae", "dreg"]


class MMVAE(Objective):
    """Mixture-of-experts multimodal VAE for any N >= 2 and any non-empty pattern of present modalities.

    `gradient`: that of the importance-weighted bound (iwae), or the doubly reparameterised one, whose noise does not grow with K (dreg).
    `tight`: the bound over all n K samples; without it the mean over the modalities of their own bounds, as published.
    `resampled`: decode all samples without a gradient, draw by weight, and differentiate one sample a modality (`tight`: one a row). The
      same expected gradient for about 2/5 of the work at K = 10, and memory that does not grow with K.
    `learned_prior`: scales of the prior are trained (published).
    """

    def __init__(
        self,
        modalities: Mapping[str, Modality],
        *,
        samples: int = 10,
        gradient: Gradient = "dreg",
        tight: bool = False,
        resampled: bool = True,
        beta: float = 1.0,
        learned_prior: bool = True,
    ):
        super().__init__(modalities)
        if samples < 1:
            raise ValueError(f"samples: expected at least 1, got {samples}")
        self.samples, self.tight, self.resampled, self.beta = samples, tight, resampled, beta
        self.gradient: Gradient = gradient
        self.standard = Standard(self.latent_dim, self.family, learned=learned_prior)

    def initialise(self, batch: Batch) -> None:
        """Nothing depends on the data."""

    def prior(self) -> Components:
        """The standard density, with the scales that were learned."""
        return self.standard.components()

    def infer(self, batch: Batch) -> Posterior:
        """The mixture of the posteriors of what each row observes."""
        return Mixture(self.posteriors(batch), batch.observed.T)

    def forward(self, batch: Batch) -> Loss:
        """-(sum over rows of the bound)."""
        drawn_ones = self._sampled(batch)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.resampled):
            table = self.reconstructions(batch, drawn_ones.z)
        log_weight = self._log_weight(table.sum(1), drawn_ones, batch)
        weighted = importance_weighted(log_weight, batch.observed.T, tight=self.tight)
        if self.resampled:
            through = self._resampled(batch, drawn_ones, weighted)
        else:
            through = (weighted.weight * log_weight).sum((0, 1))
            self._double(drawn_ones, self._second(weighted, batch))
        return Loss(-surrogate(weighted.bound, through).sum(), self._terms(batch, weighted, table))

    def _sampled(self, batch: Batch) -> "_Samples":
        q, noise = self.posteriors(batch), Noise(batch.seed, batch.draw)
        names, stopped = list(batch.modalities), self.gradient == "dreg"
        return _Samples(*sample_table(q, batch.observed.T, noise, names, self.samples, path_gradient=stopped))

    def _log_weight(self, explained: Float[Tensor, "S K B"], samples: "_Samples", batch: Batch) -> Float[Tensor, "S K B"]:
        mixture = mixture_of(samples.density.transpose(0, 1), batch.observed.T[:, None, None])
        return explained + self.beta * (self.standard.density().log_prob(samples.z) - mixture)

    def _second(self, weighted: Weighted, batch: Batch) -> Float[Tensor, "S K B"]:
        """A sample's weight within the bound that it is part of: that of its modality, or the tight one."""
        return weighted.weight if self.tight else weighted.weight * batch.observed.sum(1).clamp(min=1)

    def _double(self, samples: "_Samples", weight: Float[Tensor, "S K B"]) -> None:
        """The second weight of dreg, on both ways in which a sample's place enters."""
        if self.gradient == "dreg":
            scale_gradient(samples.z, weight[..., None])
            scale_gradient(samples.density, weight[:, None])

    def _resampled(self, batch: Batch, samples: "_Samples", weighted: Weighted) -> Float[Tensor, " B"]:
        """log w of one sample of each modality (averaged), or of one of all: its gradient is that of the bound, in expectation."""
        uniform = self._uniform(batch)
        index, second = drawn(weighted, uniform), self._second(weighted, batch)
        chosen, second = (_of_all if self.tight else _of_each)(samples, second, index)
        self._double(chosen, second)
        if self.tight:
            return self._log_weight(self.explanations(batch, chosen.z).sum(1), chosen, batch)[0, 0]
        log_weight = self._log_weight(self.reconstructions(batch, chosen.z).sum(1), chosen, batch)[:, 0]
        observed = batch.observed.T
        return torch.where(observed, log_weight, 0.0).sum(0) / observed.sum(0).clamp(min=1)

    def _uniform(self, batch: Batch) -> Float[Tensor, "G B"]:
        noise = Noise(batch.seed, batch.draw)
        groups = ["all"] if self.tight else list(batch.modalities)
        return torch.stack([noise.uniform(f"{name}/resample", 1, 1)[0, :, 0] for name in groups])

    def _terms(self, batch: Batch, weighted: Weighted, table: Float[Tensor, "N N K B"]) -> Mapping[str, Sums]:
        own, rows = table.detach().diagonal(dim1=0, dim2=1).mean(0).T, batch.observed.any(1).sum().to(weighted.bound.dtype)
        counts = batch.observed.sum(0).to(own.dtype)
        terms = {f"reconstruction/{name}": Sums(own[i].sum(), counts[i]) for i, name in enumerate(batch.modalities)}
        share = self._second(weighted, batch).to(own.dtype)
        ess = torch.where(batch.observed.any(1), 1 / share.square().sum((0, 1) if self.tight else 1).clamp(min=1e-9), 0.0)
        ess = ess if self.tight else torch.where(batch.observed.T, ess, 0.0).sum(0) / batch.observed.sum(1).clamp(min=1)
        return terms | {"bound": Sums(weighted.bound.detach().sum(), rows), "ess": Sums(ess.sum(), rows)}


class _Samples(NamedTuple):
    """Samples, and each of them under each modality's posterior."""

    z: Float[Tensor, "S K B D"]
    density: Float[Tensor, "S N K B"]


def _of_each(samples: _Samples, second: Float[Tensor, "S K B"], index: Int[Tensor, "S B"]) -> tuple[_Samples, Float[Tensor, "S 1 B"]]:
    """One sample of each source."""
    place = index[:, None]
    z = samples.z.gather(1, place[..., None].expand(-1, -1, -1, samples.z.shape[-1]))
    density = samples.density.gather(2, place[:, None].expand(-1, samples.density.shape[1], -1, -1))
    return _Samples(z, density), second.gather(1, place)


def _of_all(samples: _Samples, second: Float[Tensor, "S K B"], index: Int[Tensor, "1 B"]) -> tuple[_Samples, Float[Tensor, "1 1 B"]]:
    """One sample of all sources: one source of one sample."""
    merged = _Samples(samples.z.flatten(0, 1)[None], samples.density.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None])
    return _of_each(merged, second.flatten(0, 1)[None], index)
