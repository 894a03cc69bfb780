"""MMVAE: the joint posterior is the even mixture of the modalities' posteriors (Shi, Siddharth, Paige, Torr, NeurIPS 2019).

    q(z | x) = (1/n) sum_{i observed} q_i(z | x_i)
    log w[i, k] = sum_{j observed} log p_j(x_j | z[i, k]) + beta (log p(z[i, k]) - log q(z[i, k] | x)),    z[i, k] ~ q_i(z | x_i)

and a row's loss is minus one of the bounds of `meme_dist.bounds`, whose strata are the modalities. At beta = 1 it never exceeds log p(x).
A row with missing modalities mixes, and explains, those it has.

The doubly reparameterised gradient (`dreg`, what Shi et al. publish and MultiVae trains) drops the score of log q from d log w, and gives
each sample's path its weight twice in return. For samples of the very q whose score is dropped, that leaves the expected gradient as it is.
Samples of stratum i come from q_i, though, and the score of the mixture is

    d log q(z | x) = sum_j r_j(z) d log q_j(z | x_j),      r_j = q_j / sum_l q_l

so that it is exact for one modality, for K = 1 (untight), and for posteriors that are equal or far apart; else what it leaves out is

    (1/n) E sum_i sum_k ( w_ik (1 - w_ik) (d log w_ik / d z) (d z / d phi) - w_ik sum_j r_j d log q_j ),   w_ik the weights of source i

In a linear-Gaussian example of two modalities, whose posteriors overlap in part, the expected gradient of the posteriors' parameters is off
by 9 % of its norm at K = 4 and by 54 % at K = 16; by 5 and 6 % with `tight` (measured against `iwae`, which is unbiased but noisy:
tests/objectives/test_mmvae.py). Decoders and prior have the bound's own gradient.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from meme_dist.bounds import Weighted, drawn, importance_weighted, scale_gradient, surrogate
from meme_dist.distributions import Components, Diagonal, Mixture, Posterior, mixture_of, sample_table
from meme_dist.modality import Modality
from meme_dist.noise import Noise
from meme_dist.objectives.base import Objective, Private
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
            table = self.reconstructions(batch, drawn_ones.z, private=drawn_ones.private)
        log_weight = self._log_weight(table.sum(1), drawn_ones, batch)
        weighted = importance_weighted(log_weight, batch.observed.T, tight=self.tight)
        if self.resampled:
            through = self._resampled(batch, drawn_ones, weighted)
        else:
            through = (weighted.weight * log_weight).sum((0, 1))
            self._double(drawn_ones, self._second(weighted, batch))
        return Loss(-surrogate(weighted.bound, through).sum(), self._terms(batch, weighted, table))

    def _sampled(self, batch: Batch) -> "Samples":
        q, own = self.split(self.encodings(batch))
        names, stopped = list(batch.modalities), self.gradient == "dreg"
        noise = Noise(batch.seed, batch.draw)
        z, density = sample_table(q, batch.observed.T, noise, names, self.samples, path_gradient=stopped)
        z = z.view_as(z)  # from here on a node apart from that of the densities, which dreg weighs by themselves
        private, ratio = self._private(own, batch)
        source = torch.arange(len(z), device=z.device)[:, None, None].expand(z.shape[:3])
        return Samples(z, density, source, z.new_zeros(z.shape[:3]) if ratio is None else ratio, private)

    def _private(self, own: Mapping[str, Diagonal], batch: Batch) -> tuple[Private, Tensor | None]:
        """Samples of the modalities' own latents, and log p - log q of those of each source; MMVAE has none."""
        return {}, None

    def _log_weight(self, explained: Float[Tensor, "S K B"], samples: "Samples", batch: Batch) -> Float[Tensor, "S K B"]:
        mixture = mixture_of(samples.density.transpose(0, 1), batch.observed.T[:, None, None])
        return explained + self.beta * (self.standard.density().log_prob(samples.z) - mixture + samples.ratio)

    def _second(self, weighted: Weighted, batch: Batch) -> Float[Tensor, "S K B"]:
        """A sample's weight within the bound that it is part of: that of its modality, or the tight one."""
        return weighted.weight if self.tight else weighted.weight * batch.observed.sum(1).clamp(min=1)

    def _double(self, samples: "Samples", weight: Float[Tensor, "S K B"]) -> None:
        """The second weight of dreg, on every way in which a sample's place enters."""
        if self.gradient == "dreg":
            scale_gradient(samples.z, weight[..., None])
            scale_gradient(samples.density, weight[:, None])

    def _resampled(self, batch: Batch, samples: "Samples", weighted: Weighted) -> Float[Tensor, " B"]:
        """log w of one sample of each modality (averaged), or of one of all: its gradient is that of the bound, in expectation."""
        index, second = drawn(weighted, self._uniform(batch)), self._second(weighted, batch)
        if self.tight:
            chosen, second = _merged(samples).at(index), second.flatten(0, 1)[None].gather(1, index[:, None])
            self._double(chosen, second)
            explained = self.explanations(batch, chosen.z, private=chosen.private)
            return torch.where(batch.observed.any(1), self._log_weight(explained.sum(1), chosen, batch)[0, 0], 0.0)
        chosen, second = samples.at(index), second.gather(1, index[:, None])
        self._double(chosen, second)
        log_weight = self._log_weight(self.reconstructions(batch, chosen.z, private=chosen.private).sum(1), chosen, batch)[:, 0]
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


class Samples(NamedTuple):
    """Samples, each of them under each modality's posterior, and what belongs to latents that modalities have for themselves."""

    z: Float[Tensor, "S K B D"]
    density: Float[Tensor, "S N K B"]
    source: Int[Tensor, "S K B"]
    ratio: Float[Tensor, "S K B"]
    private: Private

    def at(self, index: Int[Tensor, "S B"]) -> "Samples":
        """One sample of each source."""
        place = index[:, None]
        return Samples(
            _taken(self.z, place),
            self.density.gather(2, place[:, None].expand(-1, self.density.shape[1], -1, -1)),
            self.source.gather(1, place),
            self.ratio.gather(1, place),
            {name: _taken(own, place) for name, own in self.private.items()},
        )


def _taken(z: Float[Tensor, "S K B D"], place: Int[Tensor, "S 1 B"]) -> Float[Tensor, "S 1 B D"]:
    return z.gather(1, place[..., None].expand(-1, -1, -1, z.shape[-1]))


def _merged(samples: Samples) -> Samples:
    """The samples of all sources as those of one."""
    return Samples(
        samples.z.flatten(0, 1)[None],
        samples.density.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None],
        samples.source.flatten(0, 1)[None],
        samples.ratio.flatten(0, 1)[None],
        {name: own.flatten(0, 1)[None] for name, own in samples.private.items()},
    )
