"""Coherence: does what the model makes show the class it should?

Cross coherence (Shi et al. 2019; Joy et al. 2022, table 3): z ~ q(z | x_S), one sample; the mean of the target's likelihood at z; a
classifier trained on real data of the target names its class; the share of rows in which that is the row's label. Report it beside the
classifier's own accuracy on real data, which is a reference and no bound: what is made can be more typical of its class than what is real.

Joint coherence: z ~ p(z), all modalities decoded, the share of draws in which all the named classes agree.
"""

import math
import random
from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from meme_dist.metrics.rows import Classify, Metric, add_up, device_of, holds, joined, labelled, noise_of, share, shown
from meme_dist.noise import Noise
from meme_dist.objectives.base import Objective
from meme_dist.types import Batch, Sums

Sources = tuple[str, ...]


def source_sets(names: Sequence[str], *, most: int = 31) -> list[Sources]:
    """The non-empty sets of modalities to start from, small ones first, each in the order of `names`.

    All 2^N - 1 of them while they are at most `most`; else every modality alone, and about equally many of every other size, the small
    families whole and the large ones sampled without repetition. A pure function of both: runs of any seed are asked the same.
    """
    if most < 1:
        raise ValueError(f"source_sets: expected at least one set, got most={most}")
    sizes = range(1, len(names) + 1)
    quota = _quotas([math.comb(len(names), size) for size in sizes], most)
    generator = random.Random(0)
    return [chosen for size, count in zip(sizes, quota, strict=True) for chosen in _some(names, size, count, generator)]


def _quotas(families: Sequence[int], most: int) -> list[int]:
    """Hand out `most` places: to single modalities first, then one to each unfinished family in turn, smallest sets first."""
    quota = [min(families[0], most), *[0] * (len(families) - 1)]
    while sum(quota) < min(most, sum(families)):
        for index, available in enumerate(families):
            if quota[index] < available and sum(quota) < most:
                quota[index] += 1
    return quota


def _some(names: Sequence[str], size: int, count: int, generator: random.Random) -> list[Sources]:
    if count == math.comb(len(names), size):
        return list(combinations(names, size))
    chosen: set[tuple[int, ...]] = set()
    while len(chosen) < count:
        chosen.add(tuple(sorted(generator.sample(range(len(names)), size))))
    return [tuple(names[index] for index in indices) for indices in sorted(chosen)]


def cross_key(sources: Sources, target: str) -> str:
    """The name of a cross coherence: `cross_coherence/mnist+name>photo`."""
    return f"cross_coherence/{joined(sources)}>{target}"


def cross_coherence(classifiers: Mapping[str, Classify], sources: Sequence[Sources], *, own: bool = False, groups: int = 0) -> Metric:
    """Cross coherence from every set of sources to every classified modality outside it (`own`: also to those inside).

    A row counts where it holds ALL the sources and has a label; whether it holds the target does not matter. `KEY/groups` [groups]: the
    same sums for each group of rows (row number modulo `groups`), for the intervals of averages over entries.
    """

    def metric(objective: Objective, batch: Batch) -> dict[str, Sums]:
        known = labelled(batch, "cross coherence")
        sums: dict[str, Sums] = {}
        for chosen in sources:
            targets = [name for name in classifiers if own or name not in chosen]
            if targets:
                sums |= _from_sources(objective, batch, chosen, {name: classifiers[name] for name in targets}, known, groups)
        return sums

    return metric


def _from_sources(
    objective: Objective,
    batch: Batch,
    sources: Sources,
    classifiers: Mapping[str, Classify],
    known: Bool[Tensor, " B"],
    groups: int,
) -> dict[str, Sums]:
    counted = holds(batch, sources) & known
    label, row = batch.label[counted] if batch.label is not None else batch.draw[:0], batch.draw[counted]
    hits = {name: torch.zeros(0, dtype=torch.bool, device=row.device) for name in classifiers}
    if len(label):  # no decoder sees an empty batch
        given, purpose = batch.only(*sources), f"coherence/{joined(sources)}"
        z = objective.infer(given).sample(noise_of(batch), purpose, 1)
        for name, classify in classifiers.items():
            if name in sources:  # it knows its own latents
                made = shown(objective, name, z, noise_of(batch), purpose, given=given)[0, counted]
            else:
                made = shown(objective, name, z[:, counted], Noise(batch.seed, row), purpose)[0]
            hits[name] = classify(made) == label.to(z.device)
    found = {cross_key(sources, name): share(right) for name, right in hits.items()}
    if groups:
        found |= {f"{cross_key(sources, name)}/groups": _by_group(right, row[: len(right)], groups) for name, right in hits.items()}
    return found


def _by_group(hits: Bool[Tensor, " R"], row: Int[Tensor, " R"], groups: int) -> Sums:
    member = torch.nn.functional.one_hot(row % groups, groups).double()
    return Sums(hits.double() @ member, member.sum(0))


def joint_coherence(
    objective: Objective,
    classifiers: Mapping[str, Classify],
    *,
    num: int = 10_000,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    chunk: int = 500,
) -> dict[str, Sums]:
    """This rank's part of `num` draws from the prior: `joint_coherence/all`, and `joint_coherence/a=b` for every two modalities.

    Draw i is the same whatever rank makes it. Call it under `evaluating(objective)`. Raises ValueError for less than two classifiers.
    """
    if len(classifiers) < 2:
        raise ValueError(f"joint coherence compares modalities: expected two or more classifiers, got {sorted(classifiers)}")
    prior = objective.prior()
    draws = torch.arange(rank, num, world, device=device_of(objective))
    totals: dict[str, Sums] = {name: add_up(draws[:0].double()) for name in ("joint_coherence/all", *map(joint_key, _pairs(classifiers)))}
    for draw in draws.split(chunk) if len(draws) else ():  # more ranks than draws: no decoder sees an empty batch
        noise = Noise(seed, draw)
        z = prior.sample(noise, "joint coherence", 1)
        named = {name: classify(shown(objective, name, z, noise, "joint coherence")[0]) for name, classify in classifiers.items()}
        for key, sums in _agreement(named).items():
            totals[key] = Sums(totals[key].total + sums.total, totals[key].count + sums.count)
    return totals


def joint_key(pair: Sequence[str]) -> str:
    """The name of a pairwise joint coherence: `joint_coherence/mnist=photo`."""
    return f"joint_coherence/{pair[0]}={pair[1]}"


def _pairs(names: Mapping[str, Classify]) -> list[tuple[str, str]]:
    return list(combinations(names, 2))


def _agreement(named: Mapping[str, Int[Tensor, " R"]]) -> dict[str, Sums]:
    stacked = torch.stack(list(named.values()))
    pairs = {joint_key((a, b)): share(named[a] == named[b]) for a, b in combinations(named, 2)}
    return {"joint_coherence/all": share((stacked == stacked[0]).all(0)), **pairs}


def classifier_accuracy(classifiers: Mapping[str, Classify]) -> Metric:
    """How often each classifier is right on REAL data, `classifier/NAME`: the reference of every coherence towards it."""

    def metric(objective: Objective, batch: Batch) -> dict[str, Sums]:
        known = labelled(batch, "classifier accuracy")
        sums = {}
        for name, classify in classifiers.items():
            counted = holds(batch, [name]) & known
            label = batch.label[counted] if batch.label is not None else batch.draw[:0]
            shown = classify(batch.dense(name)[counted]) if len(label) else label
            sums[f"classifier/{name}"] = share(shown == label.to(shown.device))
        return sums

    return metric
