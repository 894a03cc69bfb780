"""How sure a number is: 95 % intervals of proportions, of means and over runs."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from scipy import special  # `scipy.stats` takes a second to import, in every command

from meme_dist.types import Sums

LEVEL = 0.95
ROUNDING = 1e-6  # of a range: an interval narrower than that has no width


class Estimate(NamedTuple):
    """A measured value with its interval; `count` is what it was measured on (rows, draws, runs). Nothing: count 0, value NaN."""

    value: float
    low: float
    high: float
    count: int

    def json(self) -> dict[str, float | int | None]:
        """As plain JSON, where NaN and infinity, which JSON has not, are null."""
        numbers = {"value": self.value, "low": self.low, "high": self.high}
        return {**{k: v if math.isfinite(v) else None for k, v in numbers.items()}, "count": self.count}


def proportion(sums: Sums, *, level: float = LEVEL) -> Estimate:
    """A share of rows, with Wilson's score interval, which stays inside [0, 1] and is honest at 0 and 1 (Wilson 1927, JASA 22)."""
    hits, count = float(sums.total), float(sums.count)
    if count == 0:
        return Estimate(math.nan, 0.0, 1.0, 0)
    return Estimate(hits / count, *_wilson(hits / count, count, level), round(count))


def mean(sums: Sums, squares: Sums, *, level: float = LEVEL) -> Estimate:
    """A mean over rows with Student's t interval, from the sums of the values and of their squares.

    With fewer than two rows there is no spread to go by and the interval is the whole line.
    """
    count = float(sums.count)
    if count == 0:
        return Estimate(math.nan, -math.inf, math.inf, 0)
    value = float(sums.total) / count
    if count < 2:
        return Estimate(value, -math.inf, math.inf, round(count))
    variance = max(0.0, float(squares.total) / count - value**2) * count / (count - 1)
    half = _student_quantile(level, round(count) - 1) * math.sqrt(variance / count)
    return Estimate(value, value - half, value + half, round(count))


def within(estimate: Estimate, least: float = 0.0, most: float = 1.0, *, level: float = LEVEL) -> Estimate:
    """The estimate of what lies between `least` and `most`, its interval kept there.

    An interval without width, as of rows that all say the same, gives way to Wilson's for that share of the range: there is no spread to
    go by, and yet `count` rows are not certain.
    """
    if estimate.count == 0:
        return estimate
    low, high = estimate.low, estimate.high
    if high - low < ROUNDING * (most - least):
        share = (estimate.value - least) / (most - least)
        low, high = (least + (most - least) * end for end in _wilson(share, estimate.count, level))
    return estimate._replace(low=max(least, low), high=min(most, high))


def jackknife(whole: float, parts: Sequence[float], *, count: int, level: float = LEVEL) -> Estimate:
    """The value on everything, with the t interval of the delete-a-group jackknife.

        s.e.^2 = (G - 1) / G * sum_g (part_g - mean part)^2       part_g: the value without group g

    It needs no independence between what is averaged, only between rows: pairwise statistics qualify (Efron and Tibshirani 1993, ch. 11).
    """
    groups = len(parts)
    if groups < 2 or not all(map(math.isfinite, parts)):
        return Estimate(whole, -math.inf, math.inf, count)
    centre = math.fsum(parts) / groups
    error = math.sqrt((groups - 1) / groups * math.fsum((part - centre) ** 2 for part in parts))
    half = _student_quantile(level, groups - 1) * error
    return Estimate(whole, whole - half, whole + half, count)


def over_runs(values: Sequence[float], *, level: float = LEVEL) -> Estimate:
    """The mean over independent runs (seeds) with Student's t interval; `count` is the number of runs. One run has no interval."""
    runs = [value for value in values if value is not None and math.isfinite(value)]
    if not runs:
        return Estimate(math.nan, -math.inf, math.inf, 0)
    value = math.fsum(runs) / len(runs)
    if len(runs) == 1:
        return Estimate(value, -math.inf, math.inf, 1)
    error = math.sqrt(math.fsum((run - value) ** 2 for run in runs) / (len(runs) - 1) / len(runs))
    half = _student_quantile(level, len(runs) - 1) * error
    return Estimate(value, value - half, value + half, len(runs))


def aggregate(runs: Sequence[Mapping[str, float]], *, level: float = LEVEL) -> dict[str, Estimate]:
    """`over_runs` of every named value (`meme_dist.evaluate.flatten` makes them) that all runs measured.

    Raises ValueError where the runs share no value, which says that they are not runs of one experiment.
    """
    shared = [name for name in (runs[0] if runs else ()) if all(name in run for run in runs)]
    if not shared:
        raise ValueError(f"aggregate: {len(runs)} runs share no measured value; give results of the same recipe with the same metrics")
    return {name: over_runs([run[name] for run in runs], level=level) for name in shared}


def _wilson(share: float, count: float, level: float) -> tuple[float, float]:
    z2 = _normal_quantile(level) ** 2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = math.sqrt(z2 * (share * (1 - share) / count + z2 / (4 * count**2))) / (1 + z2 / count)
    return max(0.0, centre - half), min(1.0, centre + half)


def _normal_quantile(level: float) -> float:
    return float(special.ndtri((1 + level) / 2))


def _student_quantile(level: float, freedom: int) -> float:
    return float(special.stdtrit(freedom, (1 + level) / 2))
