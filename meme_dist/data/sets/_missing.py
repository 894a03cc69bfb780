"""Which modalities a row shows: masks [rows, N] in which no row is ever empty."""

from collections.abc import Sequence
from math import comb

import numpy as np


def partly_paired(rows: int, modalities: Sequence[str], *, paired_fraction: float, always: str, rng: np.random.Generator) -> np.ndarray:
    """The first `paired_fraction` of the (shuffled) rows complete; of each other row one modality alone.

    The one that stays is `always`, or for "split" any with equal probability: subscripts and SPLIT of Joy et al. 2022, tables 3 to 7.
    The choices do not depend on the fraction: less of it turns some complete rows into single ones and changes nothing else.
    Raises ValueError as `check_partly_paired` does.
    """
    check_partly_paired(paired_fraction, always, modalities)
    drawn = rng.integers(len(modalities), size=rows)
    kept = drawn if always == "split" else np.full(rows, list(modalities).index(always))
    observed = kept[:, None] == np.arange(len(modalities))
    observed[: round(paired_fraction * rows)] = True
    return observed


def check_partly_paired(paired_fraction: float, always: str, modalities: Sequence[str]) -> None:
    """Raise ValueError for a fraction outside [0, 1] or an unknown modality."""
    if not 0 <= paired_fraction <= 1:
        raise ValueError(f"paired_fraction: expected a number from 0 to 1, got {paired_fraction}")
    if always not in ("split", *modalities):
        raise ValueError(f"always: expected 'split' or one of {list(modalities)}, got {always!r}")


def missing_at_random(rows: int, modalities: int, missing: float, rng: np.random.Generator) -> np.ndarray:
    """Entries missing independently, given that each row keeps one; the share of missing entries is `missing` to the nearest entry.

    Independent entries that are missing with probability p leave rows empty, and redrawing those would lower the share (.3 would give
    .28 for three modalities): entries are drawn at the p whose share is right after redrawing, and the few that chance leaves over or
    short are flipped at random. Raises ValueError as `check_missing` does.
    """
    check_missing(missing, modalities)
    wanted = round((1 - missing) * rows * modalities)
    counts = rng.choice(np.arange(1, modalities + 1), size=rows, p=_count_probabilities(modalities, missing))
    places = rng.random((rows, modalities)).argsort(1).argsort(1)  # of each row's entries, in random order
    observed = places < counts[:, None]
    _settle(observed, max(rows, wanted), rng)
    return observed


def check_missing(missing: float, modalities: int) -> None:
    """Raise ValueError for a share below 0 or above (N - 1) / N, where each row keeps one modality only."""
    highest = (modalities - 1) / modalities
    if not 0 <= missing <= highest:
        raise ValueError(f"missing: expected a share from 0 to {highest:.3f} ({modalities} modalities, each row keeps one), got {missing}")


def _count_probabilities(modalities: int, missing: float) -> np.ndarray:
    """How many entries a row keeps: a binomial without its zero, with the mean asked for (bisection; the mean rises with `keep`)."""
    counts = np.arange(1, modalities + 1)
    ways = np.array([comb(modalities, int(count)) for count in counts])
    low, high = 0.0, 1.0
    for _ in range(60):
        keep = (low + high) / 2
        weights = ways * keep ** (counts - 1) * (1 - keep) ** (modalities - counts)
        enough = weights @ counts > (1 - missing) * modalities * weights.sum()
        low, high = (low, keep) if enough else (keep, high)
    weights = ways * low ** (counts - 1) * (1 - low) ** (modalities - counts)
    return weights / weights.sum()


def _settle(observed: np.ndarray, wanted: int, rng: np.random.Generator) -> None:
    """Flip random entries, in place, until `wanted` are observed and no row is empty."""
    surplus = int(observed.sum()) - wanted
    for row, column in zip(*np.unravel_index(rng.permutation(observed.size), observed.shape), strict=True):
        if surplus == 0:
            return
        if surplus > 0 and observed[row, column] and observed[row].sum() > 1:
            observed[row, column], surplus = False, surplus - 1
        elif surplus < 0 and not observed[row, column]:
            observed[row, column], surplus = True, surplus + 1
