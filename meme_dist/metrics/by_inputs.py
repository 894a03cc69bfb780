"""Coherence against the number of inputs: does a model make better use of three modalities than of one?

For every size n the mean over the pairs (sources, target), |sources| = n, target outside them, of the cross coherence of that pair; over
all targets, and towards each one. Where the sets of sources were sampled (many modalities) it is the mean over those that were. The rows
of a split stand in many pairs, so the pairs are far from independent: the interval is that of the delete-a-group jackknife, which leaves
groups of rows out of all pairs at once. One pair alone keeps Wilson's interval, and so does what is the same without any group.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from meme_dist.metrics.coherence import Sources, cross_key
from meme_dist.metrics.intervals import Estimate, jackknife, proportion, within
from meme_dist.types import Sums

GROUPS = 10  # of rows, for the jackknife


class ByInputs(NamedTuple):
    """The mean coherence from `inputs` modalities towards `target` (None: all), over `pairs` of sources and target."""

    inputs: int
    target: str | None
    pairs: int
    estimate: Estimate  # its count: rows of the pair that has the most


def coherence_by_inputs(sums: Mapping[str, Sums], sources: Sequence[Sources], targets: Sequence[str]) -> list[ByInputs]:
    """From the sums of `cross_coherence(..., groups=GROUPS)`: over all targets, then towards each target, sizes rising.

    Pairs that no row holds count nowhere; sizes without a pair are left out.
    """
    asked: list[str | None] = [None, *(targets if len(targets) > 1 else [])]
    found = []
    for target in asked:
        for size in sorted({len(chosen) for chosen in sources}):
            pairs = [(s, t) for s in sources if len(s) == size for t in targets if t not in s and target in (None, t)]
            keys = [key for key in (cross_key(*pair) for pair in pairs) if float(sums[key].count) > 0]
            if keys:
                found.append(ByInputs(size, target, len(keys), _mean(sums, keys)))
    return found


def _mean(sums: Mapping[str, Sums], keys: Sequence[str]) -> Estimate:
    if len(keys) == 1:
        return proportion(sums[keys[0]])
    hits, count = (np.stack([np.asarray(sums[f"{key}/groups"][part]) for key in keys]) for part in (0, 1))  # [pairs, groups]
    groups = count.any(0)
    hits, count = hits[:, groups], count[:, groups]
    with np.errstate(invalid="ignore"):
        left = (hits.sum(1, keepdims=True) - hits) / (count.sum(1, keepdims=True) - count)  # NaN where a group was all there was
    whole = math.fsum(hits.sum(1) / count.sum(1)) / len(keys)
    rows = round(float(count.sum(1).max()))
    return within(jackknife(whole, left.mean(0).tolist(), count=rows))
