"""MMVAE: the joint posterior is the even mixture of the modalities' posteriors (Shi, Siddharth, Paige, Torr, NeurIPS 2019).

    q(z | x) = (1/n) sum_{i observed} q_i(z | x_i)
    log w[i, k] = sum_{j observed} log p_j(x_j | z[i, k]) + beta (log p(z[i, k]) - log q(z[i, k] | x)),    z[i, k] ~ q_i(z | x_i)

and a row's loss is minus one of the bounds of `meme_dist.bounds`, whose strata are the modalities. At beta = 1 it never exceeds log p(x).
A row with missing modalities mixes, and explains, those it has.

The doubly reparameterised gradient (`dreg`, what Shi et al. publish and MultiVae trains) drops the score of log q from d log w, and gives
each sample's path a second factor in return, 1 - beta (1 - w): its weight again at beta = 1. For samples of the very q whose score is
dropped, that leaves the expected gradient as it is. Samples of stratum i come from q_i, though, and the score of the mixture is

    d log q(z | x) = sum_j r_j(z) d log q_j(z | x_j),      r_j = q_j / sum_l q_l

so that it is exact for one modality, for K = 1 (untight), and for posteriors that are equal or far apart; else what it leaves out is

    (1/n) E sum_i sum_k ( w_ik (1 - w_ik) (d log w_ik / d z) (d z / d phi) - w_ik sum_j r_j d log q_j ),   w_ik the weights of source i

In a linear-Gaussian example of two modalities, whose posteriors overlap in part, the expected gradient of the posteriors' parameters is off
by 9 % of its norm at K = 4 and by 54 % at K = 16; by 5 and 6 % with `tight` (measured against `iwae`, which is unbiased but noisy:
tests/objectives/test_mmvae.py). Decoders and prior have the bound's own gradient.

`unbiased_dreg` turns every score of the mixture into forces along the experts' paths instead of dropping it. Equation (1) of
`mixture_paths` with f = w_ik, whose slope is w_ik (1 - w_ik) d log w_ik / dz, gives for either bound, with u_ik = d L / d log w_ik (that is
w_ik / n, tight: w_ik) and T_j, r_j from there,

    d L / d phi_j = E sum_ik { u_ik (d log w_ik / dz) [delta_ij - beta r_j (1 - w_ik)]
                               - beta r_j (u_ik - 1 / (n K)) d(log q_i - log q)/dz } dT_j / d phi_j

in which 1 / (n K) takes nothing away, sum_i E_{q_i} r_j d log q_j being n E_q r_j d log q_j = 0, and is there to lessen the noise. It
decodes no more than `dreg`, equals it for one modality, and is exact for any K, beta, and family.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from meme_dist.bounds import Weighted, drawn, importance_weighted, scale_gradient, surrogate
from meme_dist.distributions import Components, Diagonal, Mixture, Posterior, mixture_of, sample_table
from meme_dist.modality import Modality
from meme_dist.noise import Noise
from meme_dist.objectives.base import Objective, Private, Rise
from meme_dist.objectives.mixture_paths import along_all, densities, drawn_apart, responsibilities
from meme_dist.priors import Standard
from meme_dist.types import Batch, Loss, Sums

Gradient = Literal["iwae", "dreg", "unbiased_dreg"]


class MMVAE(Objective):
    """Mixture-of-experts multimodal VAE for any N >= 2 and any non-empty pattern of present modalities.

    `gradient`: that of the importance-weighted bound (iwae); the doubly reparameterised one, whose noise does not grow with K, as
      published, biased where posteriors overlap in part (dreg); or the same without the bias (unbiased_dreg).
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
        if gradient not in get_args(Gradient):
            raise ValueError(f"gradient: expected one of {', '.join(get_args(Gradient))}, got {gradient!r}")
        self.samples, self.tight, self.beta = samples, tight, beta
        self.resampled = resampled and (tight or samples > 1)  # the one sample of a modality need not be decoded again
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
        q, own = self.split(self.encodings(batch))
        samples = self._sampled(q, own, batch)
        if not self.resampled:
            samples = self._followed(samples, q, batch)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.resampled):
            table = self.reconstructions(batch, samples.z, private=samples.private)
        explained, ratio, beta = table.sum(1), self._log_ratio(samples, batch), self._beta(batch)
        log_weight = explained + beta * ratio
        weighted = importance_weighted(log_weight, batch.observed.T, tight=self.tight)
        if self.resampled:
            through = self._resampled(batch, samples, q, weighted)
        else:
            through = (weighted.weight * log_weight).sum((0, 1))
            self._double(samples, self._second(weighted, batch), beta)
        through = through + self._apart(samples, q, weighted, batch)
        # The loss is a bound of the evidence at beta = 1 alone; what is reported is one at any.
        bound = importance_weighted((explained + ratio).detach(), batch.observed.T, tight=self.tight).bound
        return Loss(-surrogate(weighted.bound, through).sum(), self._terms(batch, weighted, bound, table))

    def _sampled(self, q: Diagonal, own: Mapping[str, Diagonal], batch: Batch) -> "Samples":
        names, stopped = list(batch.modalities), self.gradient != "iwae"
        noise = Noise(batch.seed, batch.draw)
        z, density = sample_table(q, batch.observed.T, noise, names, self.samples, path_gradient=stopped)
        z = z.view_as(z)  # from here on a node apart from that of the densities, which dreg weighs by themselves
        private, ratio = self._private(own, batch)
        source = torch.arange(len(z), device=z.device)[:, None, None].expand(z.shape[:3])
        return Samples(z, density, source, z.new_zeros(z.shape[:3]) if ratio is None else ratio, private)

    def _private(self, own: Mapping[str, Diagonal], batch: Batch) -> tuple[Private, Tensor | None]:
        """Samples of the modalities' own latents, and log p - log q of those of each source; MMVAE has none."""
        return {}, None

    def _log_ratio(self, samples: "Samples", batch: Batch) -> Float[Tensor, "S K B"]:
        """log p - log q of all latents; log w is the log-likelihoods and beta times it."""
        mixture = mixture_of(samples.density.transpose(0, 1), batch.observed.T[:, None, None])
        return self.standard.density().log_prob(samples.z) - mixture + samples.ratio

    def _second(self, weighted: Weighted, batch: Batch) -> Float[Tensor, "S K B"]:
        """A sample's weight within the bound that it is part of: that of its modality, or the tight one."""
        return weighted.weight if self.tight else weighted.weight * batch.observed.sum(1).clamp(min=1)

    def _followed(self, samples: "Samples", q: Diagonal, batch: Batch) -> "Samples":
        """The same samples for unbiased_dreg: each moves with all experts too, by their responsibilities, and so do its densities."""
        if self.gradient != "unbiased_dreg":
            return samples
        others = along_all(samples.z, q, responsibilities(samples.density, batch.observed.T))
        z = samples.z + others
        return samples._replace(z=z, density=densities(z, q), others=others)

    def _beta(self, batch: Batch) -> Rise:
        """The weight of log p - log q in each row's log w."""
        return self.beta * self.risen(batch)

    def _double(self, samples: "Samples", weight: Float[Tensor, "S K B"], beta: Rise) -> None:
        """The second factor of dreg, on every way in which a sample's place enters; of unbiased_dreg, on how it moves with all experts."""
        factor = self._factor(weight, beta)
        if self.gradient == "dreg":
            scale_gradient(samples.z, factor[..., None])
            scale_gradient(samples.density, factor[:, None])
        if samples.others is not None:
            scale_gradient(samples.others, (factor - 1)[..., None])

    def _factor(self, weight: Float[Tensor, "S K B"], beta: Rise) -> Float[Tensor, "S K B"]:
        """1 - beta (1 - w): log q counts beta times in log w, and so does its score. At beta = 1 the weight itself, to the bit."""
        return (1 - beta) + beta * weight

    def _apart(self, samples: "Samples", q: Diagonal, weighted: Weighted, batch: Batch) -> Float[Tensor, " B"]:
        """What unbiased_dreg adds because a sample comes from one expert, not from the mixture; its value means nothing."""
        if self.gradient != "unbiased_dreg" or not torch.is_grad_enabled():
            return torch.zeros_like(weighted.bound)
        observed = batch.observed.T
        even = observed.to(weighted.weight.dtype) / (observed.sum(0).clamp(min=1) * self.samples)
        share = responsibilities(samples.density, observed)
        return drawn_apart(samples.z.detach(), samples.source, q, share, -self._beta(batch) * (weighted.weight - even[:, None]))

    def _resampled(self, batch: Batch, samples: "Samples", q: Diagonal, weighted: Weighted) -> Float[Tensor, " B"]:
        """log w of one sample of each modality (averaged), or of one of all: its gradient is that of the bound, in expectation."""
        index, second, beta = drawn(weighted, self._uniform(batch)), self._second(weighted, batch), self._beta(batch)
        if self.tight:
            chosen, second = _merged(samples).at(index), second.flatten(0, 1)[None].gather(1, index[:, None])
            chosen = self._followed(chosen, q, batch)
            self._double(chosen, second, beta)
            explained = self.explanations(batch, chosen.z, private=chosen.private).sum(1)
            log_weight = explained + beta * self._log_ratio(chosen, batch)
            return torch.where(batch.observed.any(1), log_weight[0, 0], 0.0)
        chosen, second = self._followed(samples.at(index), q, batch), second.gather(1, index[:, None])
        self._double(chosen, second, beta)
        explained = self.reconstructions(batch, chosen.z, private=chosen.private).sum(1)
        log_weight, observed = explained + beta * self._log_ratio(chosen, batch), batch.observed.T
        return torch.where(observed, log_weight[:, 0], 0.0).sum(0) / observed.sum(0).clamp(min=1)

    def _uniform(self, batch: Batch) -> Float[Tensor, "G B"]:
        noise = Noise(batch.seed, batch.draw)
        groups = ["all"] if self.tight else list(batch.modalities)
        return torch.stack([noise.uniform(f"{name}/resample", 1, 1)[0, :, 0] for name in groups])

    def _terms(self, batch: Batch, weighted: Weighted, bound: Float[Tensor, " B"], table: Float[Tensor, "N N K B"]) -> Mapping[str, Sums]:
        own, rows = table.detach().diagonal(dim1=0, dim2=1).mean(0).T, batch.observed.any(1).sum().to(bound.dtype)
        counts = batch.observed.sum(0).to(own.dtype)
        terms = {f"reconstruction/{name}": Sums(own[i].sum(), counts[i]) for i, name in enumerate(batch.modalities)}
        share = self._second(weighted, batch).to(own.dtype)
        ess = torch.where(batch.observed.any(1), 1 / share.square().sum((0, 1) if self.tight else 1).clamp(min=1e-9), 0.0)
        ess = ess if self.tight else torch.where(batch.observed.T, ess, 0.0).sum(0) / batch.observed.sum(1).clamp(min=1)
        return terms | {"bound": Sums(bound.sum(), rows), "ess": Sums(ess.sum(), rows)}


class Samples(NamedTuple):
    """Samples, each of them under each modality's posterior, and what belongs to latents that modalities have for themselves."""

    z: Float[Tensor, "S K B D"]
    density: Float[Tensor, "S N K B"]
    source: Int[Tensor, "S K B"]
    ratio: Float[Tensor, "S K B"]
    private: Private
    others: Float[Tensor, "S K B D"] | None = None
    """Zeros that move with all experts, where z does."""

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
