"""Frechet distance: how far what is generated lies from real data, in the features of any network.

    d^2 = |m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1^1/2 C_2 C_1^1/2)^1/2)             m, C: mean and covariance of the features

the squared 2-Wasserstein distance of two Normals (Dowson and Landau 1982; Heusel et al. 2017, who take features of an ImageNet network and
call it FID). The default features are those in front of the last layer of the classifier that judges coherence, so the numbers compare
models on one data set judged by one classifier, and nothing else.

Estimated from few rows it is too large, by an amount that falls as one over their number (Chong and Forsyth 2020): compare numbers of
equal counts, and see what two halves of the real rows are apart, which would be 0 without that bias. Its interval is that of the
delete-a-group jackknife over rows, each group left out of both sides at once: how far the value would move with other rows of the same
number. It knows nothing of the bias, and nothing of other weights.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from meme_dist.metrics.coherence import Sources
from meme_dist.metrics.intervals import jackknife
from meme_dist.metrics.rows import Embed, Metric, holds, joined, noise_of, shown
from meme_dist.noise import Noise
from meme_dist.objectives.base import Objective
from meme_dist.types import Batch, Sums

GROUPS = 20  # of rows, for the jackknife; rows are shuffled, so a row's number names its group
WIDEST = 512  # features: of more only two groups are kept, halves, since each group holds their square; there is no interval then
FLOOR = 1e-12  # of the largest eigenvalue: below it a covariance is singular, and roots would make rounding large


class Moments(NamedTuple):
    """Mean and covariance (with count - 1) of features, double precision."""

    mean: Float[Tensor, " E"]
    covariance: Float[Tensor, "E E"]
    count: int


def moment_sums(features: Float[Tensor, "R E"]) -> Sums:
    """Sum of the rows above the sum of their outer products, [1 + E, E]: adds over batches and ranks."""
    x = features.double()
    return Sums(torch.cat([x.sum(0, keepdim=True), x.T @ x]), torch.tensor(float(len(x)), dtype=torch.float64, device=x.device))


def moments(sums: Sums) -> Moments:
    """Mean and covariance from `moment_sums`; NaN below two rows."""
    count = float(sums.count)
    if count < 2:
        return Moments(torch.full_like(sums.total[0], math.nan), torch.full_like(sums.total[1:], math.nan), round(count))
    mean = sums.total[0] / count
    return Moments(mean, (sums.total[1:] - count * torch.outer(mean, mean)) / (count - 1), round(count))


def frechet_distance(a: Moments, b: Moments, *, root: Float[Tensor, "E E"] | None = None) -> float:
    """The squared distance d^2 of the formula above, which is what FID reports; NaN below two rows on a side, and of what is not finite.

    `root`: that of a's covariance, where the caller has it from another distance.
    """
    if not (_known(a) and _known(b)):
        return math.nan
    root = _root(a.covariance) if root is None else root
    inner = torch.linalg.eigvalsh(root @ b.covariance @ root)
    shared = torch.where(inner > FLOOR * inner[-1], inner, 0.0).sqrt().sum()
    spread = a.covariance.trace() + b.covariance.trace() - 2 * shared
    return float((a.mean - b.mean).square().sum() + spread.clamp(min=0))


def _known(one: Moments) -> bool:
    return one.count > 1 and bool(one.mean.isfinite().all() and one.covariance.isfinite().all())


def _root(covariance: Float[Tensor, "E E"]) -> Float[Tensor, "E E"]:
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def few_sources(names: Sequence[str], target: str) -> list[Sources]:
    """What a modality is made from for metrics that cost a pass through the decoder each: every other one alone, and all others."""
    others = tuple(name for name in names if name != target)
    return [*((name,) for name in others), *([others] if len(others) > 1 else [])]


def frechet_key(sources: Sources | None, target: str) -> str:
    """The name of features: made from sources, from the prior (`frechet/prior>photo`, sources empty), or real (None)."""
    return f"frechet/{'real' if sources is None else joined(sources) or 'prior'}>{target}"


def frechet(embedders: Mapping[str, Embed], names: Sequence[str], *, rows: int) -> Metric:
    """Features of what is made of each modality from `few_sources`, one sample z a row, and from the prior; and of its real data.

    A row counts where it holds the sources (for the prior: anything) and its number is below `rows`. All come in groups, by row number:
    total [G, 1 + E, E], count [G].
    """
    sizes: dict[str, int] = {}

    def metric(objective: Objective, batch: Batch) -> dict[str, Sums]:
        sums: dict[str, Sums] = {}
        wanted = batch.draw < rows
        for name, embed in embedders.items():
            if name not in sizes:  # a rank may have no rows at all and must know the shape of its sums
                sizes[name] = embed(batch.dense(name)[:1]).shape[1]
            for sources in [*few_sources(names, name), ()]:
                counted = wanted & (holds(batch, sources) if sources else batch.observed.any(1))
                made = _made(objective, batch, sources, name, embed, counted)
                sums[frechet_key(sources, name)] = _grouped(made, batch.draw[counted], sizes[name])
            there = holds(batch, [name]) & wanted
            real = embed(batch.dense(name)[there]) if bool(there.any()) else None
            sums[frechet_key(None, name)] = _grouped(real, batch.draw[there], sizes[name])
        return sums

    return metric


def _made(
    objective: Objective, batch: Batch, sources: Sources, name: str, embed: Embed, counted: Bool[Tensor, " B"]
) -> Float[Tensor, "R E"] | None:
    if not bool(counted.any()):  # no decoder sees an empty batch
        return None
    purpose = f"frechet/{joined(sources)}"
    q = objective.infer(batch.only(*sources)) if sources else objective.prior()
    z = q.sample(noise_of(batch), purpose, 1)[:, counted]
    return embed(shown(objective, name, z, Noise(batch.seed, batch.draw[counted]), purpose)[0])


def _grouped(features: Float[Tensor, "R E"] | None, number: Int[Tensor, " R"], size: int) -> Sums:
    """The sums of each group of rows; zeros where there are none."""
    x = torch.zeros(0, size, device=number.device) if features is None else features
    groups = GROUPS if size <= WIDEST else 2
    parts = [moment_sums(x[number % groups == group]) for group in range(groups)]
    return Sums(torch.stack([part.total for part in parts]), torch.stack([part.count for part in parts]))


class Frechet(NamedTuple):
    """The distance of made data from real data; `sources` empty: made from the prior, None: one half of the real data from the other."""

    sources: Sources | None
    target: str
    value: float
    count: int  # features on the side that was made (of the smaller half)
    real: int
    low: float  # of the 95 % interval; infinite, as high is, where there are too few rows or too many features for one
    high: float


def frechet_distances(sums: Mapping[str, Sums], names: Sequence[str], targets: Sequence[str]) -> list[Frechet]:
    """All distances from the sums of `frechet`."""
    found = []
    for target in targets:
        real = _leaving_out(sums[frechet_key(None, target)])
        roots = [_root(one.covariance) if _known(one) else None for one in real]
        for sources in [*few_sources(names, target), ()]:
            made = _leaving_out(sums[frechet_key(sources, target)])
            apart = [frechet_distance(a, b, root=root) for a, b, root in zip(real, made, roots, strict=True)]
            found.append(_measured(sources, target, apart, made[0].count, real[0].count))
        found.append(_of_halves(target, sums[frechet_key(None, target)]))
    return found


def _leaving_out(sums: Sums) -> list[Moments]:
    """Of all rows, then without each group of them."""
    total, count = sums.total.sum(0), sums.count.sum()
    groups = zip(sums.total, sums.count, strict=True)
    return [moments(Sums(total, count)), *(moments(Sums(total - part, count - rows)) for part, rows in groups)]


def _of_halves(target: str, real: Sums) -> Frechet:
    """One half of the real rows, of even number, from the other; both lose a group at once."""
    even, odd = (_leaving_out(Sums(real.total[half::2], real.count[half::2])) for half in (0, 1))
    smaller = min(even[0].count, odd[0].count)
    apart = [frechet_distance(a, b) for a, b in zip(even, odd, strict=True)]
    return _measured(None, target, apart, smaller, even[0].count + odd[0].count - smaller)


def _measured(sources: Sources | None, target: str, apart: Sequence[float], count: int, real: int) -> Frechet:
    """From the distance of all rows and those without each group."""
    estimate = jackknife(apart[0], apart[1:] if len(apart) > 3 else [], count=count)
    low = max(0.0, estimate.low) if math.isfinite(estimate.low) else estimate.low
    return Frechet(sources, target, estimate.value, count, real, low, estimate.high)
