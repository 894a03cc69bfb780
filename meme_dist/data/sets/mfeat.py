"""Six real views of 2,000 handwritten digits: UCI's "Multiple Features" (Duin et al. 1998; CC BY 4.0).

fou: Fourier coefficients of the shape; fac: profile correlations; kar: Karhunen-Loeve coefficients; pix: averages of 2 x 3 pixels; zer:
Zernike moments, which do not change under rotation and so cannot tell 6 from 9; mor: morphological features.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from meme_dist.data.fields import Field
from meme_dist.data.sets._arrays import held_out, locate, read_arrays, standardised
from meme_dist.data.sets._missing import check_missing, missing_at_random
from meme_dist.data.sets._names import NAMES
from meme_dist.data.sets._pairing import check_split, generator, rows_of
from meme_dist.data.shards import Dataset, Row

FILE = "mfeat_six_views.npz"
VIEWS = {"fou": 76, "fac": 216, "kar": 64, "pix": 240, "zer": 47, "mor": 6}
TEST_SHARE = 4  # one row in four


def mfeat(*, source: Path, missing: float = 0.0, seed: int = 0) -> Dataset:
    """1,500 rows to train on with a share of `missing` entries absent at random (each row keeps one), 500 complete ones to test on.

    Every view is a vector, standardised by the training rows. The split is the same for every seed: of each class 50 random rows are the
    test part, none of them with a twin (six digits are in the file twice). `source` holds `mfeat_six_views.npz`: the views by name, and
    the digits `y`. Raises ValueError for a missing or altered file, and for a share below 0 or above 5/6.
    """
    check_missing(missing, len(VIEWS))

    def rows(split: str) -> Iterator[Row]:
        check_split(split)
        number, share = (seed, missing) if split == "train" else (0, 0.0)
        views, label, test = read(source)
        chosen = np.flatnonzero(test == (split == "test"))
        order = chosen[generator(number, f"mfeat/{split}/order").permutation(len(chosen))]
        observed = missing_at_random(len(order), len(VIEWS), share, generator(number, f"mfeat/{split}/missing"))
        return rows_of(views, dict.fromkeys(VIEWS, order), observed, label[order])

    fields = {name: Field(kind="vector", shape=(size,), codec="npy", likelihood="normal") for name, size in VIEWS.items()}
    return Dataset("mfeat", fields, rows, NAMES, {"missing": missing, "seed": seed}, files=lambda: locate(source, [FILE]))


def read(source: Path) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """All standardised views [rows, size], the labels [rows], and which rows are the test part [rows], in the file's order."""
    (path,) = locate(source, [FILE])
    arrays = read_arrays(path, {"y": ("rows",), **{name: ("rows", size) for name, size in VIEWS.items()}})
    label, views = arrays["y"], {name: arrays[name] for name in VIEWS}
    table = [row.tobytes() for row in np.concatenate(list(views.values()), axis=1)]
    seen = Counter(table)
    alone = np.array([seen[row] == 1 for row in table])
    test = held_out(label, one_in=TEST_SHARE, eligible=alone, rng=generator(0, "mfeat/split"))
    return {name: standardised(view, ~test) for name, view in views.items()}, label, test
