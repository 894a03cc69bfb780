"""Frechet distance: how far what is generated lies from real data, in the features of any network.

    d^2 = |m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1^1/2 C_2 C_1^1/2)^1/2)             m, C: mean and covariance of the features

the squared 2-Wasserstein distance of two Normals (Dowson and Landau 1982; Heusel et al. 2017, who take features of an ImageNet network and
call it FID). The default features are those in front of the last layer of the classifier that judges coherence, so the numbers compare
models on one data set judged by one classifier, and nothing else.

Estimated from few rows it is too large, by an amount that falls as one over their number (Chong and Forsyth 2020): compare numbers of
equal counts, and see what two halves of the real rows are apart, which would be 0 without that bias. It has no interval of its own.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from meme_dist.metrics.coherence import Sources
from meme_dist.metrics.rows import Embed, Metric, holds, joined, noise_of, shown
from meme_dist.noise import Noise
from meme_dist.objectives.base import Objective
from meme_dist.types import Batch, Sums

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


def frechet_distance(a: Moments, b: Moments) -> float:
    """The squared distance d^2 of the formula above, which is what FID reports; NaN below two rows on a side."""
    if min(a.count, b.count) < 2:
        return math.nan
    root = _root(a.covariance)
    inner = torch.linalg.eigvalsh(root @ b.covariance @ root)
    shared = torch.where(inner > FLOOR * inner[-1], inner, 0.0).sqrt().sum()
    spread = a.covariance.trace() + b.covariance.trace() - 2 * shared
    return float((a.mean - b.mean).square().sum() + spread.clamp(min=0))


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

    A row counts where it holds the sources (for the prior: anything) and its number is below `rows`. The real rows come in two halves, of
    even and odd number: total [2, 1 + E, E], count [2].
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
                sums[frechet_key(sources, name)] = _padded(made, sizes[name], batch.draw.device)
            sums[frechet_key(None, name)] = _halves(batch, name, embed, wanted, sizes[name])
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


def _padded(features: Float[Tensor, "R E"] | None, size: int, device: torch.device) -> Sums:
    return moment_sums(torch.zeros(0, size, device=device) if features is None else features)


def _halves(batch: Batch, name: str, embed: Embed, wanted: Bool[Tensor, " B"], size: int) -> Sums:
    there = holds(batch, [name]) & wanted
    data, odd = batch.dense(name)[there], batch.draw[there] % 2 == 1
    features = embed(data) if len(data) else torch.zeros(0, size, device=batch.draw.device)
    halves = [moment_sums(features[~odd]), moment_sums(features[odd])]
    return Sums(torch.stack([half.total for half in halves]), torch.stack([half.count for half in halves]))


class Frechet(NamedTuple):
    """The distance of made data from real data; `sources` empty: made from the prior, None: one half of the real data from the other."""

    sources: Sources | None
    target: str
    value: float
    count: int  # features on the side that was made (of the smaller half)
    real: int


def frechet_distances(sums: Mapping[str, Sums], names: Sequence[str], targets: Sequence[str]) -> list[Frechet]:
    """All distances from the sums of `frechet`."""
    found = []
    for target in targets:
        halves = sums[frechet_key(None, target)]
        real = moments(Sums(halves.total.sum(0), halves.count.sum()))
        even, odd = (moments(Sums(total, count)) for total, count in zip(halves.total, halves.count, strict=True))
        for sources in [*few_sources(names, target), ()]:
            made = moments(sums[frechet_key(sources, target)])
            found.append(Frechet(sources, target, frechet_distance(made, real), made.count, real.count))
        smaller = min(even.count, odd.count)
        found.append(Frechet(None, target, frechet_distance(even, odd), smaller, even.count + odd.count - smaller))
    return found
