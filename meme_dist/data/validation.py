"""A third part for data sets that have two: training rows held out for choosing settings, so that no test row is used for it."""

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from meme_dist.data.sets._pairing import generator
from meme_dist.data.shards import Dataset, Row

VALIDATION = "validation"


def with_validation(dataset: Dataset, share: float, *, seed: int, apart: str | None = None) -> Dataset:
    """The same set with `share` of its training rows, to the nearest row and at random, as the split "validation"; itself for share 0.

    Both parts keep the rows' order, and what is missing in them; together they are the training rows as they were, and the test rows are
    not touched. The same seed holds out the same rows. `apart`: a modality whose data come in several rows; each datum of it then stands
    in one part alone, and the share is met as closely from below as whole groups of rows allow.
    Which rows they are is known after one pass over the training rows. Raises ValueError for a share below 0 or from 1 on, and, then,
    where it leaves one of the parts empty.
    """
    if not 0 <= share < 1:
        raise ValueError(f"validation: expected a share of the training rows from 0 to below 1, got {share}")
    if share == 0:
        return dataset

    @functools.cache
    def held() -> np.ndarray:
        return held_rows(_groups(dataset, apart), share, generator(seed, f"{dataset.name}/{VALIDATION}"))

    def rows(split: str) -> Iterator[Row]:
        if split not in ("train", VALIDATION):
            return dataset.rows(split)
        return (row for row, out in zip(dataset.rows("train"), held(), strict=True) if out == (split == VALIDATION))

    source = {**dataset.source, VALIDATION: share, f"{VALIDATION}_seed": seed, f"{VALIDATION}_apart": apart}
    return replace(dataset, rows=rows, source=source, splits=("train", VALIDATION, "test"))


def held_rows(group: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Which rows [rows] are held out: whole groups in random order, each that still fits, up to `share` of the rows to the nearest one.

    Raises ValueError where that is none of them or all of them.
    """
    names, member = np.unique(group, return_inverse=True)
    sizes, room = np.bincount(member), round(share * len(group))
    chosen = np.zeros(len(names), dtype=bool)
    for number in rng.permutation(len(names)):
        if sizes[number] <= room:
            chosen[number], room = True, room - sizes[number]
    out = chosen[member]
    if not out.any() or out.all():
        raise ValueError(f"validation: a share of {share} of {len(group)} training rows leaves one of the two parts empty")
    return out


def _groups(dataset: Dataset, apart: str | None) -> np.ndarray:
    """A number for each training row, shared by rows whose datum of the modality `apart` is the same."""
    known: dict[object, int] = {}
    return np.array([known.setdefault(_identity(number, row, apart), number) for number, row in enumerate(dataset.rows("train"))])


def _identity(number: int, row: Row, apart: str | None) -> object:
    if apart is None or apart not in row.data:
        return number
    datum = row.data[apart]
    return hashlib.sha256(datum.encode() if isinstance(datum, str) else datum.numpy().tobytes()).digest()
