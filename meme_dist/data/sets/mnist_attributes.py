"""MNIST with attributes that are measured from its pixels: whether a digit is thick, and whether it leans to the right.

    thickness = 2 area / edge     area: pixels with at least half the brightness of the brightest; edge: those of them with a dark neighbour
    slant     = -m11 / m02        second central moments of the brightness, rows counted downwards: the tangent of the angle

Both are thresholded at the median of the training images, so that half of them have each attribute, and the same rule judges what a model
makes (`Attributes.of`). MNIST: LeCun et al.; CC BY-SA 3.0.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped

from meme_dist.data.fields import Field
from meme_dist.data.sets._arrays import IMAGES, MNIST, locate, read_arrays
from meme_dist.data.sets._names import NAMES
from meme_dist.data.sets._pairing import check_split, generator
from meme_dist.data.shards import Dataset, Row

ATTRIBUTES = ("thick", "leaning")


@dataclass(frozen=True)
class Attributes:
    """The medians of the training images, and the rule that follows from them."""

    thickness: float
    slant: float

    def of(self, images: Shaped[np.ndarray, "R 28 28"]) -> dict[str, Bool[np.ndarray, " R"]]:
        """Which images have which attribute. Brightness may have any unit."""
        return {"thick": thickness(images) > self.thickness, "leaning": slant(images) > self.slant}


def mnist_attributes(*, source: Path, rows: int | None = None, unlabelled: float = 0.0, seed: int = 0) -> Dataset:
    """MNIST images `digit` (1, 28, 28) with `thick` [1] and `leaning` [1], each 0 or 1; the class is the digit.

    `source` is a folder with `mnist.npz`. `rows`: that many training images at random, by default all 60,000; the test images are all
    10,000. A share of `unlabelled` training entries of each attribute is missing, independently. The medians are those of all training
    images, whatever `rows` says. Raises ValueError for a missing or altered file and bad keywords.
    """
    if (rows is not None and rows < 1) or not 0 <= unlabelled <= 1:
        raise ValueError(f"expected 1 row or more, unlabelled from 0 to 1; got {rows} and {unlabelled}")

    def generate(split: str) -> Iterator[Row]:
        check_split(split)
        arrays = read(source)
        images, digit = arrays[f"x_{split}"], arrays[f"y_{split}"]
        has = rule(arrays["x_train"]).of(images)
        number, share = (seed, unlabelled) if split == "train" else (0, 0.0)
        order = generator(number, f"mnist_attributes/{split}/order").permutation(len(images))
        order = order[:rows] if split == "train" else order
        hidden = {name: generator(number, f"mnist_attributes/{split}/{name}").random(len(images)) < share for name in ATTRIBUTES}
        for row in order:
            told = {name: torch.tensor([float(has[name][row])]) for name in ATTRIBUTES if not hidden[name][row]}
            yield Row({"digit": torch.from_numpy(images[row][None]), **told}, int(digit[row]))

    flag = Field(kind="vector", shape=(1,), codec="npy", likelihood="bernoulli")
    fields = {"digit": Field(kind="image", shape=(1, 28, 28), codec="npy", likelihood="bernoulli"), **dict.fromkeys(ATTRIBUTES, flag)}
    keywords = {"rows": rows, "unlabelled": unlabelled, "seed": seed}
    return Dataset("mnist_attributes", fields, generate, NAMES, keywords, files=lambda: locate(source, [MNIST]))


def read(source: Path) -> Mapping[str, np.ndarray]:
    """The arrays of `mnist.npz` in the folder. Raises ValueError for a missing or altered file."""
    (path,) = locate(source, [MNIST])
    return read_arrays(path, IMAGES)


def rule(train: Shaped[np.ndarray, "R 28 28"]) -> Attributes:
    """The medians of these images."""
    return Attributes(float(np.median(thickness(train))), float(np.median(slant(train))))


def thickness(images: Shaped[np.ndarray, "R H W"]) -> Float[np.ndarray, " R"]:
    """Twice the area over the length of its edge: about the width of a stroke in pixels. 0 for an image without any brightness."""
    brightest = images.reshape(len(images), -1).max(1)[:, None, None]
    ink = (images >= brightest / 2) & (brightest > 0)
    around = np.pad(ink, ((0, 0), (1, 1), (1, 1)))
    inner = ink & around[:, :-2, 1:-1] & around[:, 2:, 1:-1] & around[:, 1:-1, :-2] & around[:, 1:-1, 2:]
    area, edge = ink.sum((1, 2)), (ink & ~inner).sum((1, 2))
    return 2 * area / np.maximum(edge, 1)


def slant(images: Shaped[np.ndarray, "R H W"]) -> Float[np.ndarray, " R"]:
    """How far the digit leans to the right: columns to the right per row upwards. 0 for an image without any height."""
    light = images.astype(np.float64)
    total = np.maximum(light.sum((1, 2)), 1e-12)
    row, column = np.arange(light.shape[1]), np.arange(light.shape[2])
    by_row, by_column = light.sum(2), light.sum(1)
    down = row - ((by_row @ row) / total)[:, None]
    across = column - ((by_column @ column) / total)[:, None]
    mixed = ((down[:, None] @ light)[:, 0] * across).sum(1)
    spread = (by_row * down**2).sum(1)
    return -mixed / np.where(spread > 0, spread, 1.0)
