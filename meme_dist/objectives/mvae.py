"""MVAE: the joint posterior is the product of the modalities' posteriors and the prior (Wu and Goodman, NeurIPS 2018).

    q(z | x_A) ~ N(z; 0, I) prod_{i in A} q_i(z | x_i)
    ELBO(A)    = E_q(z|x_A)[ sum_{i in A} log p_i(x_i | z) ] - beta KL(q(z | x_A) || N(0, I))
    loss       = -( ELBO(observed) + sum_{i observed} ELBO({i}) + sum_{k} ELBO(A_k) )                                          (eq. 5)

with A_k random subsets of what the row observes: without the smaller terms the single posteriors are never trained.

Differences from published code: subsets are uniform over the non-empty ones of each row's own modalities and drawn row by row, while the
authors draw a size, then a subset of it (of 2 to N - 1 modalities) for the whole batch.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from meme_dist.distributions import Components, DiagNormal, Posterior, product, product_divergence
from meme_dist.modality import Modality
from meme_dist.noise import Noise
from meme_dist.objectives.base import Objective
from meme_dist.objectives.parts import elbo_terms, needs_normal, random_subsets
from meme_dist.priors import Standard
from meme_dist.types import Batch, Loss, Sums


class MVAE(Objective):
    """Product-of-experts multimodal VAE for any N >= 2 and any non-empty pattern of present modalities.

    A row of one modality has equal joint and single terms, and counts both, as in MultiVae: so each observed entry is explained as often,
    whatever its row observes besides. A row's terms all weigh 1; MultiVae averages each over the rows that have it.

    `subsets`: random subsets for each row. None is what was published: 1, but 0 for two modalities, which have no others.
    `beta`: weight of the KL (published: 1).
    """

    def __init__(self, modalities: Mapping[str, Modality], *, subsets: int | None = None, beta: float = 1.0):
        super().__init__(modalities)
        needs_normal(self)
        if subsets is not None and subsets < 0:
            raise ValueError(f"subsets: expected at least 0, got {subsets}")
        self.subsets, self.beta = int(len(modalities) > 2) if subsets is None else subsets, beta
        self.standard = Standard(self.latent_dim, self.family)

    def initialise(self, batch: Batch) -> None:
        """Nothing depends on the data."""

    def prior(self) -> Components:
        """N(0, I)."""
        return self.standard.components()

    def infer(self, batch: Batch) -> Posterior:
        """The product of the prior and the posteriors of what each row observes."""
        joint = product(self.posteriors(batch), batch.observed.T[None], standard=True)
        return DiagNormal(joint.mean[0], joint.scale[0])

    def forward(self, batch: Batch) -> Loss:
        """-(sum over rows of their ELBOs)."""
        sources = self._sources(batch)
        joint, kl = product_divergence(self.posteriors(batch), sources, standard=True)
        z = joint.mean + joint.scale * self._noise(batch).to(joint.mean.dtype)
        names = list(batch.modalities)
        targets = [names, *[[name] for name in names], *[names] * self.subsets]
        table = self.explanations(batch, z[:, None], targets)[:, :, 0]
        explained = torch.where(sources, table, 0.0)
        return Loss((self.beta * self.risen(batch) * kl).sum() - explained.sum(), self._terms(batch, explained, kl))

    def _sources(self, batch: Batch) -> Bool[Tensor, "S N B"]:
        """What each ELBO is about: everything, each modality alone, random subsets."""
        observed = batch.observed.T
        single = torch.eye(len(observed), dtype=torch.bool, device=observed.device)[..., None] & observed
        drawn = [random_subsets(batch, "subset", self.subsets)] if self.subsets else []
        return torch.cat([observed[None], single, *drawn])

    def _noise(self, batch: Batch) -> Float[Tensor, "S B D"]:
        noise, size = Noise(batch.seed, batch.draw), self.latent_dim
        drawn = [noise.normal("subset/z", self.subsets, size)] if self.subsets else []  # "subset" chose the subsets
        return torch.cat([noise.normal(purpose, 1, size) for purpose in ("joint", *batch.modalities)] + drawn)

    def _terms(self, batch: Batch, explained: Float[Tensor, "S N B"], kl: Float[Tensor, "S B"]) -> Mapping[str, Sums]:
        """Those of the joint posterior, and each modality's own bound."""
        held = batch.observed.sum(0).to(kl.dtype)
        own = (explained.sum(1) - kl).detach().sum(1)
        alone = {f"bound/{name}": Sums(own[1 + i], held[i]) for i, name in enumerate(batch.modalities)}
        return {**elbo_terms(batch, explained[0], kl[0]), **alone}
