"""Any trained objective with a prior that knows where its posteriors are, p(z) = r(z) p_base(z) / Z: the model is left as it is.

A prior that training never quite fills leaves holes: decoders are asked for z that no posterior ever gave them, and what they make of them
does not fit together. With r the ratio of the aggregate posterior to the base prior (`meme_dist.ratio`) the holes have little weight (Aneja
et al. 2021, NCP-VAE, arXiv 2010.02917). The evidence lower bound rises by

    gain = E_q[log r] - log Z  <=  KL(q || p_base),   with equality for the exact ratio

Z is a mean over base draws, which must have met the points where r is large: those are rarer than one in exp(KL). Where it rests on fewer
than `FEWEST` effective draws log Z is too low more often than not, and the gain and every likelihood under this prior are upper guesses.
Draws come by resampling proposals of the base prior (`Resample`), or by Markov chains from such draws (`Langevin`). Resampling M proposals
fails where log q / p_base exceeds log M on much of q: its effective sample size tells.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from meme_dist.around import Around
from meme_dist.distributions import Prior
from meme_dist.mcmc import HMC, MALA, ULA, sample
from meme_dist.metrics.rows import device_of, evaluating, noise_of, on_device
from meme_dist.noise import Noise
from meme_dist.objectives.base import Objective
from meme_dist.resampling import LogWeight, Normaliser, Resampled, normaliser, resample
from meme_dist.types import Batch

BUDGET = 500_000  # base draws that Z is the mean of, whatever a draw is resampled from
FEWEST = 200  # of exact ratios (KL 5 to 10, 24 seeds each) log Z from so many was up to 3 of its errors too low; from 100 up to 4


class Resample(NamedTuple):
    """Draws by importance resampling, each from `proposals` of its own; weights count at most `clip` times their mean Z."""

    proposals: int = 1000
    clip: float = math.inf


def checked(sampler: Resample) -> Resample:
    """The same. Raises ValueError for fewer than one proposal and for a clip that is not above 0."""
    if sampler.proposals < 1:
        raise ValueError(f"proposals: expected at least 1, got {sampler.proposals}")
    if not sampler.clip > 0:
        raise ValueError(f"clip: expected a number above 0 (inf: none), got {sampler.clip}")
    return sampler


class Langevin(NamedTuple):
    """Draws by Langevin chains, one each, of `budget` gradients; they start at resampled draws of `proposals`."""

    budget: int = 100
    kernel: HMC | ULA = MALA
    proposals: int = 1000


Sampler = Resample | Langevin


class ReweightedPrior(NamedTuple):
    """r(z) p_base(z) / Z: a `Prior` itself, so that it can be reweighted again."""

    base: Prior
    log_ratio: LogWeight
    log_z: float
    sampler: Sampler = Resample()

    def sample(self, noise: Noise, purpose: str, num: int) -> Float[Tensor, "num B D"]:
        """One draw for each sample and row, by the prior's sampler; not reparameterised. A draw does not depend on those beside it."""
        z = self.resampled(noise, purpose, num).z
        if isinstance(self.sampler, Resample):
            return z
        chains = sample(
            self._log_density,
            z.flatten(0, 1),
            kernel=self.sampler.kernel,
            budget=self.sampler.budget,
            noise=noise,
            purpose=f"{purpose}/chain",
        )
        return chains.chain.z.view(z.shape)

    def resampled(self, noise: Noise, purpose: str, num: int) -> Resampled:
        """The resampled draws alone, with what their proposals say of Z."""
        clip = self.sampler.clip if isinstance(self.sampler, Resample) else math.inf
        ceiling = self.log_z + math.log(clip)
        return resample(self.base, self.log_ratio, noise, purpose, num, proposals=self.sampler.proposals, ceiling=ceiling)

    def log_prob(self, z: Float[Tensor, "K B D"]) -> Float[Tensor, "K B"]:
        """log p_base(z) + log r(z) - log Z."""
        return self.base.log_prob(z) + self.log_ratio(z.flatten(0, -2)).view(z.shape[:-1]) - self.log_z

    def _log_density(self, z: Float[Tensor, "C D"]) -> Float[Tensor, " C"]:
        return self.log_prob(z[None])[0]


def normalised(
    base: Prior,
    log_ratio: LogWeight,
    sampler: Sampler,
    *,
    seed: int = 0,
    draws: int = 100,
    budget: int = BUDGET,
    device: torch.device | None = None,
) -> tuple[ReweightedPrior, Normaliser]:
    """The reweighted prior with log Z from `budget` base draws, how well that is known, and how well its sampler resamples `draws`."""
    noise, each = Noise(seed, torch.arange(draws, device=device)), math.ceil(budget / draws)
    found = normaliser(resample(base, log_ratio, noise, "ratio/normaliser", 1, proposals=each), each)
    prior = ReweightedPrior(base, log_ratio, found.log_z, sampler)
    asked = normaliser(prior.resampled(noise, "ratio/normaliser", 1), sampler.proposals)
    return prior, found._replace(spread=asked.spread, effective=asked.effective, proposals=asked.proposals)


def caution(pooled: float) -> str | None:
    """What is to be said of a gain, and of likelihoods, whose log Z rests on so many effective draws; None: nothing."""
    return None if pooled >= FEWEST else f"upper guesses: log Z rests on {pooled:.0f} effective draws, and is likely too low"


class Gain(NamedTuple):
    """How much the evidence lower bound rises, in nats a row, and its standard error: over rows, and of log Z."""

    value: float
    error: float


@torch.no_grad()
def gain(prior: ReweightedPrior, latents: Float[Tensor, "S R D"], *, error: float) -> Gain:
    """E_q[log r] - log Z, at S draws of q for each of R rows: at rows that the ratio was not fitted to. `error`: of the prior's log Z."""
    rows = prior.log_ratio(latents.flatten(0, 1)).view(latents.shape[:2]).double().mean(0)
    return Gain(float(rows.mean()) - prior.log_z, math.hypot(float(rows.std()) / math.sqrt(len(rows)), error))


def posterior_draws(
    objective: Objective,
    batches: Iterable[Batch],
    *,
    rows: int,
    draws: int = 1,
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> Float[Tensor, "S R D"]:
    """`draws` of q(z | what a row observes) for each of the rows 0 .. rows - 1 of a split that observes something: the aggregate posterior.

    `batches` number their rows in `draw`, as `Evaluation` does. Each rank fills in its rows and `reduce` completes the table, the same on
    every rank, on the model's device. Raises ValueError where draws are not finite.
    """
    device = device_of(objective)
    table = torch.zeros(rows, draws * objective.latent_dim + 1, device=device)
    with evaluating(objective):
        for batch in batches:
            batch = on_device(batch, device)
            wanted = (batch.draw < rows) & batch.observed.any(1)
            if not bool(wanted.any()):
                continue
            z = objective.infer(batch).sample(noise_of(batch), "ratio/latents", draws)
            filled = torch.cat([z.transpose(0, 1).flatten(1), torch.ones_like(z[0, :, :1])], -1)
            table[batch.draw[wanted]] = filled[wanted].float()
    table = reduce(table)
    there = table[table[:, -1] != 0, :-1]
    bad = int((~there.isfinite().all(-1)).sum())
    if bad:
        raise ValueError(f"latents: those of {bad} of {len(there)} rows are not finite; is the model trained?")
    return there.unflatten(-1, (draws, -1)).transpose(0, 1)


class Reweighted(Around):
    """`objective` with a reweighted prior; everything else (networks, inference, loss) is its own.

    `pooled`: the effective number of base draws that log Z rests on.
    """

    def __init__(self, objective: Objective, log_ratio: nn.Module, log_z: float, sampler: Sampler, *, pooled: float = math.inf):
        super().__init__(objective)
        self.log_ratio, self.log_z, self.sampler, self.pooled = log_ratio, log_z, sampler, pooled

    @property
    def caution(self) -> str | None:
        """What is to be said of likelihoods under this prior."""
        return caution(self.pooled)

    def prior(self) -> ReweightedPrior:
        """The objective's, reweighted."""
        return ReweightedPrior(self.objective.prior(), self.log_ratio, self.log_z, self.sampler)
