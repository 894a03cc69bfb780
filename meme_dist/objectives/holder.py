"""Hoelder pooling: the joint posterior is (sum_i sqrt q_i)^2, between mixture and product (Vo and Valera, arXiv 2601.06572, 2606.13381).

    q(z | x) ~ ( (1/n) sum_{i observed} q_i(z | x_i)^(1/2) )^2
    bound    = E_q[ sum_{i observed} log p_i(x_i | z) + beta (log p(z) - log q(z | x)) ]

The pool at alpha = 1/2 is the one symmetric member of the alpha-divergence family. The first paper trains a moment-matching Normal in its
place (HELVAE), the second trains the pool itself. What follows was derived here, from the papers' definition of the pool: for diagonal
Normals it is a mixture of n (n + 1) / 2 Normals in closed form (`holder_pool`), so with f_c = the bracket at z_c ~ N_c, its weights pi_c

    bound      = sum_c pi_c E[f_c]
    d bound    = E[ sum_c f_c d pi_c  +  sum_c pi_c d f_c ]

with one sample from each component, without a score function: the weights' gradient is exact given the f_c, and needs no baseline as the
d pi_c sum to 0. `resampled` takes the f_c from decodings without a gradient, and d log p(x | z) of the second sum from one component, drawn
by weight; the rest of d f_c costs no decoding and stays whole.
"""

from collections.abc import Mapping
from itertools import combinations_with_replacement

import torch
from jaxtyping import Float
from torch import Tensor

from meme_dist.bounds import Weighted, drawn, surrogate
from meme_dist.distributions import Components, DiagNormal, Posterior, WeightedMixture, holder_pool, pairs_of, sample_table
from meme_dist.modality import Modality
from meme_dist.noise import Noise
from meme_dist.objectives.base import Objective
from meme_dist.objectives.parts import elbo_terms, needs_normal
from meme_dist.priors import Standard
from meme_dist.types import Batch, Loss


class Holder(Objective):
    """Hoelder-pooled multimodal VAE for any N >= 2 and any non-empty pattern of present modalities. At beta = 1 it is the pool's ELBO.

    A row's n (n + 1) / 2 components are decoded by each of its n decoders: 75 decodings a row at N = 5.

    `resampled`: the same expected gradient with one decoding of them differentiated; without it all are.
    `beta`: weight of the KL (ours: 1; the papers' values were not to be had).
    """

    def __init__(self, modalities: Mapping[str, Modality], *, resampled: bool = True, beta: float = 1.0):
        super().__init__(modalities)
        needs_normal(self)
        self.resampled, self.beta = resampled, beta
        self.standard = Standard(self.latent_dim, self.family)

    def initialise(self, batch: Batch) -> None:
        """Nothing depends on the data."""

    def prior(self) -> Components:
        """N(0, I)."""
        return self.standard.components()

    def infer(self, batch: Batch) -> Posterior:
        """The pool of the posteriors of what each row observes; N(0, I) for a row with nothing."""
        return holder_pool(self.posteriors(batch), batch.observed.T)

    def forward(self, batch: Batch) -> Loss:
        """-(sum over rows of the bound)."""
        pool, z, ratio = self._sampled(batch)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.resampled):
            table = self.explanations(batch, z)[:, :, 0]
        weight = torch.where(batch.observed.any(1), pool.log_weight.exp(), 0.0)
        explained, divergence = (weight[:, None] * table).sum(0), -(weight * ratio).sum(0)
        bound = explained.sum(0) - self.beta * self.risen(batch) * divergence
        through = bound + self._drawn(batch, z, weight, bound) if self.resampled else bound
        return Loss(-surrogate(bound, through).sum(), elbo_terms(batch, explained, divergence))

    def _sampled(self, batch: Batch) -> tuple[WeightedMixture, Float[Tensor, "C 1 B D"], Float[Tensor, "C B"]]:
        """The pool, a sample of each component, and log p - log q of it; modalities in the order of their names, whatever the batch's."""
        names, q = list(batch.modalities), self.posteriors(batch)
        order = sorted(range(len(names)), key=names.__getitem__)
        mean, scale, observed = (torch.stack([x[n] for n in order]) for x in (q.mean, q.scale, batch.observed.T))
        pool = holder_pool(DiagNormal(mean, scale), observed)
        i, j = pairs_of(len(names), mean.device)
        purposes = [f"{a}+{b}" for a, b in combinations_with_replacement(sorted(names), 2)]
        z, density = sample_table(pool.components, observed[i] & observed[j], Noise(batch.seed, batch.draw), purposes, 1)
        mixture = torch.logsumexp(density[:, :, 0] + pool.log_weight, 1)
        return pool, z, self.standard.density().log_prob(z)[:, 0] - mixture

    def _drawn(
        self, batch: Batch, z: Float[Tensor, "C 1 B D"], weight: Float[Tensor, "C B"], bound: Float[Tensor, " B"]
    ) -> Float[Tensor, " B"]:
        """What one component's sample explains, drawn by weight."""
        uniform = Noise(batch.seed, batch.draw).uniform("component", 1, 1)[0, :, 0]
        index = drawn(Weighted(bound, weight.detach()[:, None]), uniform[None])
        chosen = z.gather(0, index[:, None, :, None].expand(-1, -1, -1, z.shape[-1]))
        return self.explanations(batch, chosen).sum((0, 1, 2))
