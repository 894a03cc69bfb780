"""The density ratio of the aggregate posterior to a prior, from a classifier that tells their draws apart (noise contrastive estimation).

    min over l:  - E_q log s(l(z)) - E_p log s(-l(z)),   s the logistic function;   there l = log q(z) / p(z),  q(z) = E_data q(z | x)

(Aneja et al. 2021, NCP-VAE, arXiv 2010.02917). Where q and p are far apart the classifier is perfect long before its ratio is: then a
second stage tells q from the draws of the first one's prior, and log ratios add (Rhodes et al. 2020; Xiao and Han 2022, arXiv 2209.08739).
What keeps log ratios small: a bound B tanh(l / B), smoothed labels (|l| <= log((1 - s) / s) at the minimum), a penalty on l^2.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import softplus

from meme_dist.distributions import Prior
from meme_dist.noise import Noise
from meme_dist.resampling import resample

CHECK = 50  # steps between two looks at the held-out draws
TOGETHER = 20  # steps whose draws are made at once: made step by step they cost as much as a step of a small network
FLOOR = 1e-6  # of the spread that inputs are divided by: a latent that never moves stays 0


@dataclass(frozen=True)
class Contrast:
    """How a ratio is fitted."""

    bound: float = math.inf
    """B: a stage's log ratio lies in [-B, B]."""
    smoothing: float = 0.0
    """s: the label of q's draws is 1 - s, that of the prior's s."""
    penalty: float = 0.0
    """Weight of the mean of l^2."""
    stages: int = 1
    """Classifiers, each against the draws of the prior before it."""
    proposals: int = 500
    """Of each draw that a later stage is shown of the prior before it."""
    pool: int = 10_000
    """Those draws."""
    width: int = 128
    """Units of a hidden layer."""
    depth: int = 3
    """Hidden layers."""
    steps: int = 1000
    """Optimiser steps of a stage."""
    batch_size: int = 256
    """Draws of each side in a step."""
    learning_rate: float = 5e-3
    """Adam's, falling to 0 along a half cosine."""
    held_out: float = 0.1
    """Share of the rows that choose the best step; 0: the last step is taken."""
    seed: int = 0
    """Of weights and draws."""

    def __post_init__(self) -> None:
        if not self.bound > 0:
            raise ValueError(f"bound: expected a number above 0 (inf: none), got {self.bound}")
        if not 0 <= self.smoothing < 0.5:
            raise ValueError(f"smoothing: expected a share from 0 to below .5, got {self.smoothing}")
        if not self.penalty >= 0:
            raise ValueError(f"penalty: expected a number from 0 on, got {self.penalty}")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out: expected a share from 0 to below 1, got {self.held_out}")
        for name in ("stages", "proposals", "pool", "width", "depth", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")


class Stage(nn.Module):
    """One classifier's log ratio, in [-bound, bound]: a perceptron of standardised z, 0 everywhere before it is trained."""

    def __init__(self, size: int, *, width: int, depth: int, bound: float):
        super().__init__()
        self.bound = bound
        widths = [size, *[width] * depth]
        hidden = [layer for a, b in zip(widths, widths[1:], strict=False) for layer in (nn.Linear(a, b), nn.SiLU())]
        self.network = nn.Sequential(*hidden, nn.Linear(width, 1))
        nn.init.zeros_(self.network[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.network[-1].bias)  # type: ignore[arg-type]
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))

    def forward(self, z: Float[Tensor, "R D"]) -> Float[Tensor, " R"]:
        logit = self.network((z - self.get_buffer("mean")) / self.get_buffer("scale"))[:, 0]
        return logit if math.isinf(self.bound) else self.bound * torch.tanh(logit / self.bound)

    @torch.no_grad()
    def standardise(self, z: Float[Tensor, "R D"]) -> None:
        """Take mean and spread of the inputs from these."""
        self.get_buffer("mean").copy_(z.mean(0))
        self.get_buffer("scale").copy_(z.std(0, correction=0).clamp(min=FLOOR))


class LogRatio(nn.Module):
    """The sum of the stages' log ratios: |log r| <= stages x bound; 0 without a stage."""

    def __init__(self, stages: list[Stage] | None = None):
        super().__init__()
        self.stages = nn.ModuleList(stages or [])

    def forward(self, z: Float[Tensor, "R D"]) -> Float[Tensor, " R"]:
        return sum((stage(z) for stage in self.stages), torch.zeros_like(z[:, 0]))


def untrained(size: int, contrast: Contrast) -> LogRatio:
    """All stages as they are before training, the same for the same seed; torch's own generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(contrast.seed)  # and not those of GPUs, which the fork would not give back
        kinds = {"width": contrast.width, "depth": contrast.depth, "bound": contrast.bound}
        return LogRatio([Stage(size, **kinds) for _ in range(contrast.stages)])


def fit_ratio(base: Prior, latents: Float[Tensor, "S R D"], contrast: Contrast) -> LogRatio:
    """The log ratio of what `latents` are draws of, S for each of R rows, to the base prior; on their device, which is the prior's too.

    Rows are held out whole. Raises ValueError for latents that are not finite, for too few rows, and where a fit is not finite.
    """
    train, test = _split(_checked(latents), contrast)
    stages: list[Stage] = []
    for stage in untrained(latents.shape[-1], contrast).to(latents.device).stages:
        assert isinstance(stage, Stage)
        negatives = _negatives(base, LogRatio(stages), contrast, latents.device)
        stage.standardise(torch.cat([train.flatten(0, 1), negatives(0, len(train[0]))]))
        _fit(stage, train, test, negatives, contrast)
        stages.append(stage)
    return LogRatio(stages).eval().requires_grad_(False)


def classification_loss(
    posterior: Float[Tensor, " R"], prior: Float[Tensor, " Q"], *, smoothing: float = 0.0, penalty: float = 0.0
) -> Float[Tensor, ""]:
    """The loss of the log ratios at draws of q and of p, in nats for a pair; 2 log 2 where they cannot be told apart.

    A label of 1 - s costs (1 - s) softplus(-l) + s softplus(l) = softplus(-l) + s l.
    """
    told = softplus(-posterior).mean() + softplus(prior).mean() + smoothing * (posterior.mean() - prior.mean())
    return told + penalty * (posterior.square().mean() + prior.square().mean()) / 2


Draw = Callable[[int, int], Float[Tensor, "R D"]]
"""`num` draws of a prior, others for each number of a step."""


@torch.no_grad()
def _negatives(base: Prior, ratio: LogRatio, contrast: Contrast, device: torch.device) -> Draw:
    """Draws of the prior as reweighted so far: fresh ones of the base, or of a pool where each one costs many proposals.

    Steps below 0 are for choosing the best step: their draws are no others'.
    """

    if not ratio.stages:
        return lambda step, num: base.sample(_noise(contrast, step, num, device), "ratio/base", 1)[0]
    purpose = f"ratio/stage {len(ratio.stages)}"
    sizes = {purpose: contrast.pool, f"{purpose}/held out": max(1, int(contrast.held_out * contrast.pool))}
    noise = {name: _noise(contrast, 0, size, device) for name, size in sizes.items()}
    shown, hidden = (resample(base, ratio, noise[name], name, 1, proposals=contrast.proposals).z[0] for name in sizes)

    def drawn(step: int, num: int) -> Tensor:
        pool = hidden if step < 0 else shown
        return pool[_places(_noise(contrast, step, num, device).uniform(f"{purpose}/pick", 1, 1)[0, :, 0], len(pool))]

    return drawn


def _fit(stage: Stage, train: Tensor, test: Tensor, negatives: Draw, contrast: Contrast) -> None:
    """Train one stage, and leave it at the step whose held-out loss was lowest: at step 0, a ratio of 1, where none is below 2 log 2.

    Where no rows are held out it is left at the last step.
    """
    optimizer = torch.optim.Adam(stage.parameters(), contrast.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, contrast.steps)
    regular = {"smoothing": contrast.smoothing, "penalty": contrast.penalty}
    best, kept = 2 * math.log(2), {name: value.clone() for name, value in stage.state_dict().items()}
    for step, (posterior, prior) in enumerate(itertools.islice(_pairs(train, negatives, contrast), contrast.steps), 1):
        optimizer.zero_grad()
        classification_loss(stage(posterior), stage(prior), **regular).backward()
        optimizer.step()
        schedule.step()
        if step % CHECK == 0 or step == contrast.steps:
            loss = _plain_loss(stage, test if test.numel() else train, negatives)
            if not math.isfinite(loss):
                raise ValueError(f"ratio: the loss is {loss} at step {step}; take a lower learning rate, or a bound")
            if loss < best or not test.numel():
                best, kept = loss, {name: value.clone() for name, value in stage.state_dict().items()}
    stage.load_state_dict(kept)


@torch.no_grad()
def _plain_loss(stage: Stage, latents: Float[Tensor, "S R D"], negatives: Draw) -> float:
    """The loss without regularisers, against draws that no step was shown."""
    z = latents.flatten(0, 1)
    return float(classification_loss(stage(z), stage(negatives(-1, len(z)))))


def _pairs(train: Float[Tensor, "S R D"], negatives: Draw, contrast: Contrast) -> Iterator[tuple[Tensor, Tensor]]:
    """The draws of q and of the prior of one step after another."""
    num = TOGETHER * contrast.batch_size
    for step in itertools.count(1, TOGETHER):
        with torch.no_grad():
            sample, row = _noise(contrast, step, num, train.device).uniform("ratio/posterior", 1, 2)[0].unbind(-1)
            posterior, prior = train[_places(sample, len(train)), _places(row, train.shape[1])], negatives(step, num)
        yield from zip(posterior.split(contrast.batch_size), prior.split(contrast.batch_size), strict=True)


def _noise(contrast: Contrast, step: int, num: int, device: torch.device) -> Noise:
    return Noise(contrast.seed, (step << 32) + torch.arange(num, device=device))


def _places(uniform: Float[Tensor, " B"], size: int) -> Tensor:
    return (uniform * size).long().clamp(max=size - 1)


def _split(latents: Float[Tensor, "S R D"], contrast: Contrast) -> tuple[Tensor, Tensor]:
    rows = latents.shape[1]
    held_out = int(contrast.held_out * rows)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(contrast.seed)).to(latents.device)
    return latents[:, order[held_out:]], latents[:, order[:held_out]]


def _checked(latents: Float[Tensor, "S R D"]) -> Float[Tensor, "S R D"]:
    bad = int((~latents.isfinite().all(-1)).sum())
    if bad:
        raise ValueError(f"latents: {bad} of {latents.shape[0] * latents.shape[1]} are not finite; is the model trained?")
    if latents.shape[0] < 1 or latents.shape[1] < 2:
        raise ValueError(f"latents: expected draws of at least 2 rows, got shape {tuple(latents.shape)}")
    return latents.detach()
