"""MoPoE: the joint posterior is the even mixture of the products over all subsets (Sutter, Daunhawer, Vogt, ICLR 2021).

    q_A(z | x_A) ~ prod_{i in A} q_i(z | x_i)
    q(z | x)     = (1 / (2^n - 1)) sum_A q_A(z | x_A)                   over the non-empty subsets A of the n modalities that a row observes
    loss         = -E_q[ sum_{i observed} log p_i(x_i | z) ] + (beta / (2^n - 1)) sum_A KL(q_A || N(0, I))

The divergences are the convex bound of KL(q || N(0, I)). One z a row, from a subset that is drawn for each row: the authors and MultiVae
(on complete data) give contiguous slices of the batch to the subsets instead, so that a row's subset depends on its place in the batch.

The N(0, I) expert is part of the product of all N modalities, and of no other subset's: so in the authors' code and in MultiVae, though not
in the paper's formula.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from meme_dist.distributions import Components, DiagNormal, Diagonal, Posterior, even_mixture, product_divergence
from meme_dist.modality import Modality
from meme_dist.noise import Noise
from meme_dist.objectives.base import Objective
from meme_dist.objectives.parts import all_subsets, elbo_terms, needs_normal, random_subsets
from meme_dist.priors import Standard
from meme_dist.types import Batch, Loss

LARGEST = 12  # modalities whose 4,095 subsets are still gone through


class MoPoE(Objective):
    """Mixture of products of experts for any N >= 2 and any non-empty pattern of present modalities.

    `beta`: weight of the divergences (published: 2.5 on PolyMNIST and MNIST-SVHN-text).
    `standard`: where the N(0, I) expert enters: the product of all N modalities (published), or nowhere.
    `subsets`: KL terms a row, of random subsets, with the same expected loss; None goes through all, which ends at N = 12.
    `inference`: q(z | what a row observes) is the product of all of it, from which the paper's and MultiVae's conditional generations come,
      or the mixture that training samples from.
    """

    def __init__(
        self,
        modalities: Mapping[str, Modality],
        *,
        beta: float = 2.5,
        standard: Literal["full_set", "never"] = "full_set",
        subsets: int | None = None,
        inference: Literal["mixture", "product"] = "product",
    ):
        super().__init__(modalities)
        needs_normal(self)
        if subsets is not None and subsets < 1:
            raise ValueError(f"subsets: expected at least 1, got {subsets}")
        if len(modalities) > LARGEST and (subsets is None or inference == "mixture"):
            raise ValueError(
                f"{len(modalities)} modalities have {2 ** len(modalities) - 1} subsets, and {LARGEST} are the most whose subsets are gone "
                "through: give subsets (16, say) for training and inference='product'"
            )
        self.beta, self.subsets = beta, subsets
        self.expert: Literal["full_set", "never"] = standard
        self.inference: Literal["mixture", "product"] = inference
        self.standard = Standard(self.latent_dim, self.family)

    def initialise(self, batch: Batch) -> None:
        """Nothing depends on the data."""

    def prior(self) -> Components:
        """N(0, I)."""
        return self.standard.components()

    def infer(self, batch: Batch) -> Posterior:
        """The product of what each row observes, or the mixture over the subsets of it. A row with nothing gets N(0, I)."""
        observed, experts = batch.observed.T, self._experts(batch)
        if self.inference == "product" or len(observed) == 1:
            joint, _ = product_divergence(experts, self._members(observed[None]), standard=False)
            return DiagNormal(joint.mean[0], joint.scale[0])
        subsets = all_subsets(len(observed), observed.device)
        products, _ = product_divergence(experts, self._members(subsets), standard=False)
        something = observed.any(0)[:, None]  # where a row has nothing, products of what stands in for its modalities are no N(0, I)
        products = DiagNormal(torch.where(something, products.mean, 0.0), torch.where(something, products.scale, 1.0))
        return even_mixture(products, _within(subsets, observed))

    def forward(self, batch: Batch) -> Loss:
        """-(sum over rows of the bound)."""
        experts = self._experts(batch)
        drawn = random_subsets(batch, "subset", self.subsets or 1)
        products, divergences = product_divergence(experts, self._members(drawn), standard=False)
        kl = self._over_all(experts, batch) if self.subsets is None else divergences.mean(0)
        first = DiagNormal(products.mean[:1], products.scale[:1])
        z = first.reparameterise(Noise(batch.seed, batch.draw), "joint", 1)
        explained = self.explanations(batch, z[None])[0, :, 0]
        return Loss((self.beta * self.risen(batch) * kl).sum() - explained.sum(), elbo_terms(batch, explained, kl))

    def _over_all(self, experts: Diagonal, batch: Batch) -> Float[Tensor, " B"]:
        """The mean of KL(q_A || N(0, I)) over every subset A of what a row observes."""
        subsets = all_subsets(len(batch.modalities), batch.observed.device)
        _, kl = product_divergence(experts, self._members(subsets), standard=False)
        within = _within(subsets, batch.observed.T)
        return torch.where(within, kl, 0.0).sum(0) / within.sum(0).clamp(min=1)

    def _experts(self, batch: Batch) -> Diagonal:
        """The modalities' posteriors, and after them N(0, I) where it may enter."""
        q = self.posteriors(batch)
        if not self._joined(len(q.mean)):
            return q
        return DiagNormal(torch.cat([q.mean, torch.zeros_like(q.mean[:1])]), torch.cat([q.scale, torch.ones_like(q.scale[:1])]))

    def _members(self, subsets: Bool[Tensor, "S N *rows"]) -> Bool[Tensor, "S M *rows"]:
        """Which experts are multiplied: those of the subset, and N(0, I) in the full set."""
        return torch.cat([subsets, subsets.all(1, keepdim=True)], 1) if self._joined(subsets.shape[1]) else subsets

    def _joined(self, count: int) -> bool:
        return self.expert == "full_set" and count == len(self.modalities)


def _within(subsets: Bool[Tensor, "S N"], observed: Bool[Tensor, "N B"]) -> Bool[Tensor, "S B"]:
    """Which subsets each row observes as a whole: those with no member that it lacks."""
    return subsets.float() @ (~observed).float() == 0
