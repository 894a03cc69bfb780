"""What data sets of graphs share: a graph and its value in a row, split and thinned out alike."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from meme_dist.data.fields import Field
from meme_dist.data.sets._missing import check_missing, missing_at_random
from meme_dist.data.sets._pairing import check_split, generator
from meme_dist.data.sets._pairing import rows_of as paired
from meme_dist.data.shards import Row

MODALITIES = ("graph", "value")
TEST_SHARE = 10  # one row in so many is held out


class Graphs(NamedTuple):
    """Arrays [R, G, 1 + G] (`meme_dist.data.graph_codec`) and a number for each, in its own unit [R]."""

    x: np.ndarray
    value: np.ndarray


def fields_of(vocabulary: Sequence[str], size: int) -> dict[str, Field]:
    """A graph and a standardised number."""
    plan = Field(kind="graph", shape=(size, 1 + size), codec="npy", likelihood="categorical", vocabulary=tuple(vocabulary))
    return {"graph": plan, "value": Field(kind="vector", shape=(1,), codec="npy", likelihood="normal")}


def check_graph_missing(missing: float) -> None:
    """Raise ValueError for a share of missing entries that leaves a row without any."""
    check_missing(missing, len(MODALITIES))


def rows_of(name: str, read: Callable[[], Graphs], *, missing: float, seed: int) -> Callable[[str], Iterator[Row]]:
    """`Dataset.rows`: nine rows in ten to train on, in an order that follows `seed`; the same others, complete, to test on."""

    def rows(split: str) -> Iterator[Row]:
        check_split(split)
        number, share = (seed, missing) if split == "train" else (0, 0.0)
        found = read()
        chosen = parts(name, len(found.value))[split]
        order = chosen[generator(number, f"{name}/{split}/order").permutation(len(chosen))]
        observed = missing_at_random(len(order), len(MODALITIES), share, generator(number, f"{name}/{split}/missing"))
        value = standardised(name, found.value).astype(np.float32)[:, None]
        return _unlabelled(
            paired({"graph": found.x, "value": value}, dict.fromkeys(MODALITIES, order), observed, np.zeros(len(value))[order])
        )

    return rows


def parts(name: str, rows: int) -> dict[str, np.ndarray]:
    """Which rows of the file belong to which split."""
    shuffled = generator(0, f"{name}/split").permutation(rows)
    return {"test": np.sort(shuffled[: rows // TEST_SHARE]), "train": np.sort(shuffled[rows // TEST_SHARE :])}


def standardised(name: str, value: np.ndarray) -> np.ndarray:
    """(value - mean) / stddev, both of the training rows."""
    known = value[parts(name, len(value))["train"]]
    return (value - known.mean()) / known.std()


def _unlabelled(rows: Iterator[Row]) -> Iterator[Row]:
    return (Row(row.data) for row in rows)
