"""What a recipe returns, and the keywords that most recipes share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

from meme_dist.classifiers import Build, small_network
from meme_dist.data.fields import Field
from meme_dist.data.index import Manifest
from meme_dist.data.shards import Dataset
from meme_dist.distributions import DiagLaplace, DiagNormal, Diagonal
from meme_dist.evaluate import Measures
from meme_dist.modalities.attribute import Attribute
from meme_dist.modality import Modality, balanced_weights, softmax_scale, softplus_scale
from meme_dist.objectives.base import Objective
from meme_dist.objectives.csvae import CSVAE, Independence
from meme_dist.objectives.holder import Holder
from meme_dist.objectives.jmvae import JMVAE
from meme_dist.objectives.meme import MEME, Combination, Estimator, LogRatio, check_targets
from meme_dist.objectives.mmvae import MMVAE, Gradient
from meme_dist.objectives.mmvaeplus import MMVAEPlus
from meme_dist.objectives.mmvm import MMVM
from meme_dist.objectives.mopoe import MoPoE
from meme_dist.objectives.mvae import MVAE
from meme_dist.objectives.mvtcae import MVTCAE
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


Name = Literal["meme", "mvae", "mmvae", "mmvaeplus", "mopoe", "mvtcae", "jmvae", "mmvm", "holder", "csvae"]


@dataclass(frozen=True)
class Model:
    """The objective and the size of its networks. In brackets who reads a setting; the others ignore it."""

    objective: Name = "meme"
    """What is optimised: MEME, or a rival (docs/objectives.md)."""
    latent_dim: int = 64
    """Size of each modality's latent space, the private part included."""
    private_dim: int = 0
    """How many of the latents each modality has for itself: what the others cannot know of it (meme, mmvaeplus)."""
    posterior: Literal["normal", "laplace"] = "normal"
    """Family of the posteriors."""
    scales: Literal["softplus", "softmax"] = "softplus"
    """Posterior scales: each free, or with a fixed sum so that none can become sharp everywhere (MMVAE as published)."""
    pseudo_inputs: int = 100
    """Learnable pseudo-inputs of each modality: what stands in for it in rows where it is missing (meme)."""
    samples: int = 11
    """Posterior samples of a row and source, K (meme, mmvae, mmvaeplus)."""
    estimator: Estimator = "resampled"
    """Gradient estimator of meme: resampled (cheapest), rao_blackwell (lowest variance) or released (the authors' code)."""
    targets: int | None = None
    """Other modalities that each one explains in a step, drawn anew for each row: n (1 + targets) decodings of a row's n modalities instead
    of n^2, the same in expectation; needs --samples 1. By default all (meme)."""
    cross_weight: float = 10.0
    """Weight of log q(target | source) in meme: 10 in the released code, 1 in the paper (where the cross gradient cancels)."""
    combination: Combination = "mixture"
    """How several observed modalities combine as a conditional prior (meme)."""
    inference: Combination | None = None
    """How several inputs combine when a trained meme is asked; by default as `combination`."""
    log_ratio: LogRatio = "closed_form"
    """KL in closed form where there is one, or the log-ratio at the samples, the paper's bound (meme)."""
    stop_gradient: bool = True
    """Stop the gradient of the importance weights (appendix B of the paper); released and rao_blackwell can do without (meme)."""
    shared: bool = True
    """Whether a modality's encoder is its conditional prior too, as in the paper, or a second encoder is (meme)."""
    gradient: Gradient = "dreg"
    """That of the importance-weighted bound (iwae), doubly reparameterised as published (dreg), or so without its bias, which is large
    for many samples (unbiased_dreg) (mmvae, mmvaeplus)."""
    tight: bool = False
    """The bound over all samples of a row instead of the mean over its modalities (mmvae, mmvaeplus)."""
    resampled: bool = True
    """Differentiate one sample drawn by weight instead of all: the same in expectation, for less than half (mmvae, mmvaeplus, holder)."""
    beta: float | None = None
    """Weight of the divergences (all but meme); by default what was published: 1, or 2.5 for mopoe and mvtcae."""
    anneal: int = 0
    """Rows seen until the divergences have that weight, to which it rises from 0 in a straight line (KL annealing); with mmvm, alpha falls
    from 1 instead. 0: from the start (all but meme)."""
    alpha: float | None = None
    """mvtcae: share of the total correlation (.9); jmvae: weight of the single encoders (.1); mmvm: of the standard prior (0)."""
    subsets: int | None = None
    """Random subsets of a row: mvae's extra bounds (1 from three modalities on), mopoe's divergences (all up to N = 12)."""
    independence: Independence = "reversal"
    """How the free latents are kept from knowing the labels (csvae)."""
    independence_weight: float = 10.0
    """Weight of that; 0 leaves it to the conditional priors alone (csvae)."""
    block_weight: float = 10.0
    """Weight of the KL of the labels' latents: the price of what they know beside their label (csvae)."""
    likelihood_weight: float = 1.0
    """Multiplies every modality's log-likelihood: 20 does what a Laplace scale of 1/20 does, sharper images for a looser match of the
    posteriors. At 1 the bound is one on the evidence of the likelihoods as they are."""
    dropout: float = 0.0
    """Share of a training row's features (pixels, genes, ...) that encoders do not see, drawn anew each time: for few rows of many
    features, which encoders otherwise know by heart (all; never of csvae's labels)."""
    balance: bool = False
    """Weight each modality's log-likelihood by the largest event size over its own; otherwise all weigh 1."""

    def __post_init__(self) -> None:
        if self.latent_dim < 1:
            raise ValueError(f"latent_dim: expected at least 1, got {self.latent_dim}")
        if not 0 <= self.private_dim < self.latent_dim:
            raise ValueError(f"private_dim: expected 0 to {self.latent_dim - 1} of latent_dim {self.latent_dim}, got {self.private_dim}")
        if self.objective == "csvae" and self.posterior != "normal":
            raise ValueError(f"csvae: the latents of labels are Normal, and all have to be; take --posterior normal, got {self.posterior}")
        if self.objective == "meme":
            check_targets(self.targets, self.samples)  # before any row is written
        if self.anneal < 0:
            raise ValueError(f"anneal: expected a number of rows, 0 or more, got {self.anneal}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: expected a share from 0 to below 1, got {self.dropout}")
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

    def build(self, modalities: Mapping[str, Modality]) -> Objective:
        """The objective over these modalities, whose posteriors become what `private_dim`, `scales` and `dropout` say."""
        for modality in modalities.values():
            modality.private_dim = self.private_dim
            modality.dropout = 0.0 if isinstance(modality, Attribute) else self.dropout
            modality.to_scale = softmax_scale if self.scales == "softmax" else softplus_scale
        objective = self._over(modalities)
        if not isinstance(objective, MEME):  # which has no weight that could rise
            objective.anneal = self.anneal
        return objective

    def _over(self, modalities: Mapping[str, Modality]) -> Objective:
        match self.objective:
            case "meme":
                return self._meme(modalities)
            case "mmvae":
                return MMVAE(modalities, **self._weighted())
            case "mmvaeplus":
                return MMVAEPlus(modalities, **self._weighted())
            case "mvae":
                return MVAE(modalities, subsets=self.subsets, **_given(beta=self.beta))
            case "mopoe":
                return MoPoE(modalities, subsets=self.subsets, **_given(beta=self.beta))
            case "mvtcae":
                return MVTCAE(modalities, **_given(alpha=self.alpha, beta=self.beta))
            case "jmvae":
                return JMVAE(modalities, **_given(alpha=self.alpha, beta=self.beta))
            case "mmvm":
                return MMVM(modalities, **_given(alpha=self.alpha, beta=self.beta))
            case "holder":
                return Holder(modalities, resampled=self.resampled, **_given(beta=self.beta))
            case "csvae":
                return self._csvae(modalities)

    def _meme(self, modalities: Mapping[str, Modality]) -> MEME:
        return MEME(
            modalities,
            pseudo_inputs=self.pseudo_inputs,
            samples=self.samples,
            estimator=self.estimator,
            cross_weight=self.cross_weight,
            combination=self.combination,
            inference=self.inference,
            log_ratio=self.log_ratio,
            stop_gradient=self.stop_gradient,
            shared=self.shared,
            targets=self.targets,
        )

    def _csvae(self, modalities: Mapping[str, Modality]) -> CSVAE:
        return CSVAE(
            modalities,
            block_weight=self.block_weight,
            independence=self.independence,
            independence_weight=self.independence_weight,
            **_given(beta=self.beta),
        )

    def _weighted(self) -> dict[str, Any]:
        settings = {"samples": self.samples, "gradient": self.gradient, "tight": self.tight, "resampled": self.resampled}
        return settings | _given(beta=self.beta)


def _given(**settings: float | None) -> dict[str, Any]:
    """The settings that were given: an objective has its own published defaults for the others."""
    return {name: value for name, value in settings.items() if value is not None}
