"""The swiss roll of Klys, Snell and Zemel (2018): points on a rolled-up sheet, and a label that is which half of its width they are in.

    t = 1.5 pi (1 + 2 u),   point = (t cos t, 21 v, t sin t) + noise,   u, v ~ uniform on [0, 1];      low = (height < 10)

where the height is the middle coordinate, before the noise is added to it. The rule is known, so that an edited point can be judged by it
(`low`), and so is what an edit should leave alone: the two coordinates of the roll.
"""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from meme_dist.data.fields import Field
from meme_dist.data.sets._pairing import check_split, generator
from meme_dist.data.shards import Dataset, Row

WIDTH = 21.0
BORDER = 10.0  # below it a point is low: 10/21 of them
TEST_ROWS = 4000


def swiss_roll(*, rows: int = 10_000, noise: float = 0.0, unlabelled: float = 0.0, seed: int = 0) -> Dataset:
    """`rows` to train on, 4,000 complete ones to test on: `point` [3] and `low` [1], 1 where its height is below 10; the class is the same.

    `noise` is the standard deviation of what is added to each coordinate. A share of `unlabelled` training rows has no `low` (and no
    class). Test rows are the same for every seed. Raises ValueError for no rows, a negative noise and a share outside [0, 1].
    """
    if rows < 1 or noise < 0 or not 0 <= unlabelled <= 1:
        raise ValueError(f"expected 1 row or more, noise from 0 on, unlabelled from 0 to 1; got {rows}, {noise} and {unlabelled}")

    def generate(split: str) -> Iterator[Row]:
        check_split(split)
        number, share, count = (seed, unlabelled, rows) if split == "train" else (0, 0.0, TEST_ROWS)
        points, label = _draw(count, noise, generator(number, f"swiss_roll/{split}/points"))
        known = generator(number, f"swiss_roll/{split}/unlabelled").permutation(count) >= round(share * count)
        for point, value, told in zip(points, label, known, strict=True):
            data = {"point": torch.from_numpy(point)}
            yield Row({**data, "low": torch.tensor([float(value)])} if told else data, int(value) if told else None)

    fields = {
        "point": Field(kind="vector", shape=(3,), codec="npy", likelihood="normal"),
        "low": Field(kind="vector", shape=(1,), codec="npy", likelihood="bernoulli"),
    }
    keywords = {"rows": rows, "noise": noise, "unlabelled": unlabelled, "seed": seed}
    return Dataset("swiss_roll", fields, generate, ("high", "low"), keywords)


def low(point: Float[Tensor, "*rows 3"]) -> Bool[Tensor, "*rows"]:
    """The rule: whether a point's height is below 10."""
    return point[..., 1] < BORDER


def _draw(count: int, noise: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    t, height = 1.5 * np.pi * (1 + 2 * rng.random(count)), WIDTH * rng.random(count)
    exact = np.stack([t * np.cos(t), height, t * np.sin(t)], 1)
    return (exact + noise * rng.standard_normal((count, 3))).astype(np.float32), height < BORDER
