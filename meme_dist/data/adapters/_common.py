"""What every adapter decides in the same way: names, the rows to test on, and what values there are."""

import math
import re
from collections.abc import Iterable

import numpy as np

from meme_dist.data.fields import LARGEST_COUNT
from meme_dist.data.sets._pairing import check_split, generator

__all__ = ["COUNT_LIKELIHOODS", "Values", "check_split", "generator", "held_out", "modality_names"]

COUNT_LIKELIHOODS = ("poisson", "negative_binomial")
LONGEST = 40  # letters of a modality's name


def modality_names(given: Iterable[str]) -> dict[str, str]:
    """Each name as a word that may be part of a file name: "Gene Expression" -> "gene_expression".

    Raises ValueError for names that become the same word, or none.
    """
    names = {name: re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")[:LONGEST] for name in given}
    names = {name: word if word[:1].isalpha() else f"m{word}"[:LONGEST] for name, word in names.items()}
    if len(set(names.values())) < len(names):
        raise ValueError(f"modalities: expected names that differ in letters and digits, got {list(names)}; rename them")
    return names


def held_out(rows: int, test_share: float, seed: int) -> dict[str, np.ndarray]:
    """Row numbers of "train" and "test", ascending: a share of all rows, to the nearest row, drawn at random.

    Raises ValueError for a share that is not between 0 and 1, or leaves one of the two without a row.
    """
    count = round(rows * test_share) if 0 < test_share < 1 else 0
    if not 0 < count < rows:
        raise ValueError(
            f"test_share: expected a share between 0 and 1 that leaves rows to train and to test on, got {test_share} of {rows}"
        )
    order = generator(seed, "adapters/test").permutation(rows)
    return {"train": np.sort(order[count:]), "test": np.sort(order[:count])}


class Values:
    """What the numbers of one modality are like, part after part: whether all are whole, and their range."""

    def __init__(self) -> None:
        self.whole, self.lowest, self.highest = True, math.inf, -math.inf

    def add(self, x: np.ndarray) -> None:
        """Finite numbers of any shape."""
        if x.size:
            self.whole = self.whole and (x.dtype.kind in "bui" or bool((x == np.rint(x)).all()))
            self.lowest, self.highest = min(self.lowest, float(x.min())), max(self.highest, float(x.max()))

    @property
    def counts(self) -> bool:
        """Whole numbers that are not negative."""
        return self.whole and self.lowest >= 0 and self.highest <= LARGEST_COUNT

    @property
    def unit(self) -> bool:
        """All in [0, 1]."""
        return self.lowest >= 0 and self.highest <= 1
