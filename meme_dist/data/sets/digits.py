"""Digits in three modalities, without a download: upper half, lower half, name.

The images are scikit-learn's bundled copy of the test part of UCI's "Optical recognition of handwritten digits" (1,797 real 8x8
images by 13 writers, values 0 to 16; Alpaydin and Kaynak 1998; CC BY 4.0), here scaled to 0..255.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from meme_dist.data.fields import Field
from meme_dist.data.sets._missing import check_missing, missing_at_random
from meme_dist.data.sets._names import NAMES, SPELLED, name_field
from meme_dist.data.sets._pairing import check_split, generator, rows_of
from meme_dist.data.shards import Dataset, Row

MODALITIES = ("upper", "lower", "name")
BRIGHTEST = 16
TEST_SHARE = 5  # one image in five


def digits(*, missing: float = 0.3, missing_in_test: float = 0.0, seed: int = 0) -> Dataset:
    """1,442 training rows with a share of `missing` entries absent at random, and 355 test rows with `missing_in_test` absent.

    Every row keeps at least one modality. The test part is the last fifth of each class's images: the file goes writer by writer, so
    most of its writers are new. Test rows are the same for every seed. Raises ValueError for a share below 0 or above 2/3.
    """
    for share in (missing, missing_in_test):
        check_missing(share, len(MODALITIES))

    def rows(split: str) -> Iterator[Row]:
        check_split(split)
        share, number = (missing, seed) if split == "train" else (missing_in_test, 0)
        images, label = _images(split)
        order = generator(number, f"digits/{split}/order").permutation(len(label))
        observed = missing_at_random(len(label), len(MODALITIES), share, generator(number, f"digits/{split}/missing"))
        indices = {"upper": order, "lower": order, "name": label[order]}
        return rows_of({**images, "name": SPELLED}, indices, observed, label[order])

    half = Field(kind="image", shape=(1, 4, 8), codec="npy", likelihood="laplace")
    keywords: Mapping[str, Any] = {"missing": missing, "missing_in_test": missing_in_test, "seed": seed}
    return Dataset("digits", {"upper": half, "lower": half, "name": name_field()}, rows, NAMES, keywords)


def _images(split: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Both halves [rows, 1, 4, 8] as bytes, and the labels [rows], in the file's order."""
    from sklearn.datasets import load_digits  # here: it takes a second to import, and most commands never need it

    pixels, label = load_digits(return_X_y=True)
    images = np.rint(pixels * (255 / BRIGHTEST)).astype(np.uint8).reshape(-1, 1, 8, 8)
    chosen = _is_test(label) == (split == "test")
    return {"upper": images[chosen, :, :4].copy(), "lower": images[chosen, :, 4:].copy()}, label[chosen]


def _is_test(label: np.ndarray) -> np.ndarray:
    """The last fifth of each class, in the file's order."""
    test = np.zeros(len(label), dtype=bool)
    for value in np.unique(label):
        members = np.flatnonzero(label == value)
        test[members[len(members) - len(members) // TEST_SHARE :]] = True
    return test
