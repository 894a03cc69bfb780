"""Planted evidence: how well a class can be told from several noisy views is known exactly.

    y ~ uniform over C classes
    source view j shows an image of class s_j:  s_j = y with probability 1 - p, else one of the C - 1 others, each as likely
    the target view shows an image of class y

Each view draws its own image, independently, and scrambles its pixels by a fixed permutation of its own, so that no two encoders can
share anything. `ceiling` says how often the best guess of y is right; no model can beat it (sources -> target), and one that pools its
sources must rise with their number. `sampling_ceiling` says how often one draw of y from its exact posterior is right, which is what a
perfect model reaches in cross coherence: that makes the target from one sample of z, not from the best guess.
"""

from collections.abc import Iterator
from itertools import combinations_with_replacement
from math import factorial, prod
from pathlib import Path
from typing import Literal

import numpy as np

from meme_dist.data.fields import Field
from meme_dist.data.sets._arrays import IMAGES, MNIST, locate, read_arrays
from meme_dist.data.sets._missing import check_missing, missing_at_random
from meme_dist.data.sets._names import NAMES
from meme_dist.data.sets._pairing import check_split, generator, rows_of
from meme_dist.data.sets.digits import digits
from meme_dist.data.shards import Dataset, Row

Images = Literal["digits", "mnist", "fashion"]
FILES = {"mnist": MNIST, "fashion": "fashion_subset_20000_4000.npz"}
GARMENTS = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
CLASSES = 10
POOL = 2  # 28 x 28 pixels are averaged to 14 x 14
TEST_ROWS = 4000
MOST_SOURCES = 9


def planted(
    *,
    images: Images = "digits",
    source: Path | None = None,
    sources: int = 3,
    noise: float = 0.3,
    rows: int = 20_000,
    missing: float = 0.0,
    seed: int = 0,
) -> Dataset:
    """`rows` to train on and 4,000 complete ones to test on, of views source1, source2, ... and target; the label is y.

    What a source shows when it is wrong is not kept. `images`: "digits" (8 x 8, scikit-learn's, no file needed), "mnist" (`source` holds
    `mnist.npz`) or "fashion" (`source` holds `fashion_subset_20000_4000.npz`: Fashion-MNIST, Zalando, MIT, or a part of it in the format
    of mnist.npz), averaged to 14 x 14; pixels in [0, 1]. Training and test rows draw from the training and the test images; the test
    rows are the same for every seed. A share of `missing` training entries is absent at random, each row keeps one.
    Raises ValueError for missing or altered files and bad keywords.
    """
    if not 1 <= sources <= MOST_SOURCES:
        raise ValueError(f"sources: expected a number from 1 to {MOST_SOURCES}, got {sources}")
    if rows < 1:
        raise ValueError(f"rows: expected at least 1, got {rows}")
    _check_noise(noise)
    check_missing(missing, sources + 1)
    if images != "digits" and source is None:
        raise ValueError(f"images {images!r} come from a file: name the folder that has {FILES[images]}: --source FOLDER")
    names = [*(f"source{number}" for number in range(1, sources + 1)), "target"]

    def generate(split: str) -> Iterator[Row]:
        check_split(split)
        number, share, count = (seed, missing, rows) if split == "train" else (0, 0.0, TEST_ROWS)
        pixels, label = read(images, source, split)
        y = generator(number, f"planted/{split}/y").integers(CLASSES, size=count)
        data, indices = {}, {}
        for view, name in enumerate(names):
            rng = generator(number, f"planted/{split}/{name}")
            indices[name] = _drawn(shown(y, 0.0 if name == "target" else noise, CLASSES, rng), label, rng)
            data[name] = pixels[:, generator(0, f"planted/view {view}").permutation(pixels.shape[1])]
        observed = missing_at_random(count, len(names), share, generator(number, f"planted/{split}/missing"))
        return rows_of(data, indices, observed, y)

    size = 64 if images == "digits" else (28 // POOL) ** 2
    field = Field(kind="vector", shape=(size,), codec="npy", likelihood="normal")

    def files() -> list[Path]:
        return [] if images == "digits" or source is None else locate(source, [FILES[images]])

    keywords = {"images": images, "sources": sources, "noise": noise, "rows": rows, "missing": missing, "seed": seed}
    classes = GARMENTS if images == "fashion" else NAMES
    return Dataset("planted", dict.fromkeys(names, field), generate, classes, keywords, files=files)


def ceiling(observed: int, *, noise: float, classes: int = CLASSES) -> float:
    """The probability that the best guess of y is right, for one who knows exactly what `observed` source views show.

        sum over s_1..s_n of  max_y  (1 / C)  prod_j  p(s_j | y);   p(s | y) = 1 - p if s = y, else p / (C - 1)

    Ties need no rule: any guess among the best is right equally often. How many other sources there are, unobserved, does not matter.
    Raises ValueError for a number of views below 0, fewer than two classes, and noise outside [0, 1].
    """
    return sum(orders * max(joint) for orders, joint in _evidence(observed, noise, classes))


def sampling_ceiling(observed: int, *, noise: float, classes: int = CLASSES) -> float:
    """The probability that a y drawn from p(y | what `observed` source views show) is right, for one who knows exactly what they show.

        E sum_y p(y | s_1..s_n)^2  =  sum over s_1..s_n of  sum_y p(y, s_1..s_n)^2 / p(s_1..s_n)

    At most `ceiling`, and equal to it where nothing is left to doubt. From one source (1 - p)^2 + p^2 / (C - 1). A model whose samples of
    z make the target sharper than the posterior is, always the most probable class say, can exceed it; it cannot exceed `ceiling`.
    Raises ValueError as `ceiling` does.
    """
    known = [(orders, joint) for orders, joint in _evidence(observed, noise, classes) if sum(joint) > 0]
    return sum(orders * sum(p**2 for p in joint) / sum(joint) for orders, joint in known)


def _evidence(observed: int, noise: float, classes: int) -> Iterator[tuple[int, list[float]]]:
    """p(y, s_1..s_n) of every y, for counts of how often each class is shown, and in how many orders these can come."""
    if observed < 0 or classes < 2:
        raise ValueError(f"expected 0 observed views or more of 2 classes or more, got {observed} of {classes}")
    _check_noise(noise)
    right, wrong = 1 - noise, noise / (classes - 1)
    for seen in combinations_with_replacement(range(classes), observed):
        counts = [seen.count(value) for value in range(classes)]
        orders = factorial(observed) // prod(map(factorial, counts))
        yield orders, [right**count * wrong ** (observed - count) / classes for count in counts]


def shown(y: np.ndarray, noise: float, classes: int, rng: np.random.Generator) -> np.ndarray:
    """The class that a view shows in each row: y, or with probability `noise` another one, each as likely."""
    other = (y + rng.integers(1, classes, size=len(y))) % classes
    return np.where(rng.random(len(y)) < noise, other, y)


def read(images: Images, source: Path | None, split: str) -> tuple[np.ndarray, np.ndarray]:
    """The images of a split as float32 [images, pixels] in [0, 1], and their labels. Raises ValueError for missing or altered files."""
    if images == "digits" or source is None:
        found = list(digits(missing=0).rows(split))
        halves = [np.concatenate([np.ravel(row.data["upper"]), np.ravel(row.data["lower"])]) for row in found]
        return np.stack(halves).astype(np.float32) / 255, np.array([row.label for row in found])
    (path,) = locate(source, [FILES[images]])
    arrays = read_arrays(path, IMAGES)
    if not np.array_equal(there := np.unique(arrays[f"y_{split}"]), np.arange(CLASSES)):
        raise ValueError(f"{path}: y_{split}: expected images of all classes from 0 to {CLASSES - 1}, got {there.tolist()}")
    x = arrays[f"x_{split}"].astype(np.float32) / 255
    small = x.reshape(len(x), 28 // POOL, POOL, 28 // POOL, POOL).mean((2, 4))
    return small.reshape(len(x), -1), arrays[f"y_{split}"]


def _drawn(wanted: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """For each wanted class the number of a random image of it."""
    by_class = np.argsort(label, kind="stable")
    first, last = (np.searchsorted(label[by_class], wanted, side) for side in ("left", "right"))
    return by_class[rng.integers(first, last)]


def _check_noise(noise: float) -> None:
    if not 0 <= noise <= 1:
        raise ValueError(f"noise: expected a probability from 0 to 1, got {noise}")
