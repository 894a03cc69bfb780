"""What a recipe returns, and the keywords that most recipes share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal

from meme_dist.classifiers import Build, small_network
from meme_dist.data.fields import Field
from meme_dist.data.index import Manifest
from meme_dist.data.shards import Dataset
from meme_dist.distributions import DiagLaplace, DiagNormal, Diagonal
from meme_dist.evaluate import Measures
from meme_dist.modality import Modality, balanced_weights
from meme_dist.objectives.base import Objective
from meme_dist.objectives.meme import MEME, Combination, Estimator, LogRatio
from meme_dist.train.training import Training


@dataclass(frozen=True)
class Recipe:
    """An experiment: what to train, on which rows, for how long, and what to measure.

    The rows are a data set to be written into shards, or (`shards`) a folder of shards that is there already: exactly one of the two.
    """

    build: Callable[[Manifest], Objective]  # the objective with its networks, from the fields of the manifest
    training: Training
    dataset: Dataset | None = None
    shards: Path | str | None = None
    measures: Measures = Measures()
    judge: Build = small_network  # the classifiers' networks

    def __post_init__(self) -> None:
        if (self.dataset is None) == (self.shards is None):
            raise ValueError("a recipe needs a data set to write or a folder of shards that exists: exactly one of the two")


@dataclass(frozen=True)
class Model:
    """The objective and the size of its networks."""

    latent_dim: int = 64
    """Size of the latent space."""
    posterior: Literal["normal", "laplace"] = "normal"
    """Family of the posteriors."""
    pseudo_inputs: int = 100
    """Learnable pseudo-inputs of each modality: what stands in for it in rows where it is missing."""
    samples: int = 11
    """Posterior samples of a row and source (K)."""
    estimator: Estimator = "resampled"
    """Gradient estimator: resampled (cheapest), rao_blackwell (lowest variance) or released (the authors' code)."""
    cross_weight: float = 10.0
    """Weight of log q(target | source): 10 in the released code, 1 in the paper (where the cross gradient cancels)."""
    combination: Combination = "mixture"
    """How several observed modalities combine."""
    log_ratio: LogRatio = "closed_form"
    """KL in closed form where there is one, or the log-ratio at the samples (the paper's bound)."""
    stop_gradient: bool = True
    """Stop the gradient of the importance weights (appendix B of the paper); released and rao_blackwell can do without."""
    likelihood_weight: float = 1.0
    """Multiplies every modality's log-likelihood: 20 does what a Laplace scale of 1/20 does, sharper images for a looser match of the
    posteriors. At 1 the bound is one on the evidence of the likelihoods as they are."""
    balance: bool = False
    """Weight each modality's log-likelihood by the largest event size over its own; otherwise all weigh 1."""

    def __post_init__(self) -> None:
        if self.latent_dim < 1:
            raise ValueError(f"latent_dim: expected at least 1, got {self.latent_dim}")
        if not self.likelihood_weight > 0:
            raise ValueError(f"likelihood_weight: expected a number above 0, got {self.likelihood_weight}")

    @property
    def family(self) -> type[Diagonal]:
        """The class of the posteriors."""
        return DiagLaplace if self.posterior == "laplace" else DiagNormal

    def weights(self, fields: Mapping[str, Field]) -> dict[str, float]:
        """The likelihood weight of each modality: `likelihood_weight`, times the rule that `balance` names."""
        sizes = {name: prod(field.shape) for name, field in fields.items()}
        weights = balanced_weights(sizes) if self.balance else dict.fromkeys(sizes, 1.0)
        return {name: self.likelihood_weight * weight for name, weight in weights.items()}

    def objective(self, modalities: Mapping[str, Modality]) -> MEME:
        """MEME over these modalities."""
        return MEME(
            modalities,
            pseudo_inputs=self.pseudo_inputs,
            samples=self.samples,
            estimator=self.estimator,
            cross_weight=self.cross_weight,
            combination=self.combination,
            log_ratio=self.log_ratio,
            stop_gradient=self.stop_gradient,
        )
