"""MVTCAE: a product of posteriors that keeps the total correlation of the views (Hwang, Kim, Hong, Kim, NeurIPS 2021).

    q(z | x) ~ prod_{i observed} q_i(z | x_i)      without a prior expert
    loss = -(N - alpha) / N  E_q[ sum_{i observed} log p_i(x_i | z) ]
           + beta ( (1 - alpha) KL(q || N(0, I)) + alpha / N  sum_{i observed} KL(q || q_i) )

N is the number of all modalities, also in rows that lack some, as in MultiVae. A row of one modality has KL(q || q_i) = 0.
The bound that is reported is E_q[ sum log p_i(x_i | z) ] - KL(q || N(0, I)), which never exceeds log p(x).
"""

from collections.abc import Mapping

import torch

from meme_dist.distributions import Components, DiagNormal, Posterior, divergence, expert_divergence, product
from meme_dist.modality import Modality
from meme_dist.noise import Noise
from meme_dist.objectives.base import Objective
from meme_dist.objectives.parts import elbo_terms, needs_normal
from meme_dist.priors import Standard
from meme_dist.types import Batch, Loss, Sums


class MVTCAE(Objective):
    """Multi-view total-correlation auto-encoder for any N >= 2 and any non-empty pattern of present modalities.

    `alpha`: 0 is the ELBO of the product, 1 leaves only what each view can predict of it. Published values: .9 for three views and 5/6 for
      the five of PolyMNIST (authors' code), .1 (MultiVae's default).
    `beta`: weight of the divergences (published: 2.5).
    """

    def __init__(self, modalities: Mapping[str, Modality], *, alpha: float = 0.9, beta: float = 2.5):
        super().__init__(modalities)
        needs_normal(self)
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha: expected 0 to 1, got {alpha}")
        self.alpha, self.beta = alpha, beta
        self.standard = Standard(self.latent_dim, self.family)

    def initialise(self, batch: Batch) -> None:
        """Nothing depends on the data."""

    def prior(self) -> Components:
        """N(0, I)."""
        return self.standard.components()

    def infer(self, batch: Batch) -> Posterior:
        """The product of the posteriors of what each row observes; N(0, I) for a row with nothing."""
        joint = product(self.posteriors(batch), batch.observed.T[None])
        return DiagNormal(joint.mean[0], joint.scale[0])

    def forward(self, batch: Batch) -> Loss:
        """The sum over rows of the loss above."""
        joint, to_experts = expert_divergence(self.posteriors(batch), batch.observed.T[None])
        to_prior = divergence(joint, self.standard.density())[0]
        z = joint.reparameterise(Noise(batch.seed, batch.draw), "joint", 1)
        explained = self.explanations(batch, z[None])[0, :, 0]
        share = self.alpha / len(self.modalities)
        divergences = (1 - self.alpha) * to_prior + share * to_experts[0].sum(0)
        experts, held = to_experts[0].detach().sum(1), batch.observed.sum(0).to(explained.dtype)
        parts = {f"kl/{name}": Sums(experts[i], held[i]) for i, name in enumerate(batch.modalities)}
        terms = {**elbo_terms(batch, explained, torch.where(batch.observed.any(1), to_prior, 0.0)), **parts}
        return Loss((self.beta * self.risen(batch) * divergences).sum() - (1 - share) * explained.sum(), terms)
