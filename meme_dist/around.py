"""A trained objective asked otherwise: pooled (`pooled`), with another prior (`reweighted`), or refined (`refine`)."""

from collections.abc import Mapping
from typing import cast

from meme_dist.distributions import Diagonal, Posterior, Prior
from meme_dist.modality import Modality
from meme_dist.objectives.base import Objective
from meme_dist.types import Batch, Loss


class Around(Objective):
    """Another objective: networks, loss, inference and prior are its own, but for what a subclass says instead."""

    private_latents = True

    def __init__(self, objective: Objective):
        super().__init__(cast(Mapping[str, Modality], dict(objective.modalities.items())))
        self.objective = objective

    def forward(self, batch: Batch) -> Loss:
        """The loss that the objective was trained with."""
        return self.objective(batch)

    def posteriors(self, batch: Batch) -> Diagonal:
        """The objective's."""
        return self.objective.posteriors(batch)

    def infer(self, batch: Batch) -> Posterior:
        """The objective's."""
        return self.objective.infer(batch)

    def prior(self) -> Prior:
        """The objective's."""
        return self.objective.prior()

    def private_prior(self, name: str) -> Diagonal:
        """The objective's."""
        return self.objective.private_prior(name)

    def initialise(self, batch: Batch) -> None:
        """It was trained."""
