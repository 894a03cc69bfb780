"""A tiny data set with three modalities and most rows incomplete, for the tests of shards."""

import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from meme_dist.data.fields import SPECIAL, Field
from meme_dist.data.files import file_sha256
from meme_dist.data.index import IndexWriter, Split
from meme_dist.data.shards import Dataset, Row, write_shards
from meme_dist.types import Batch

WORDS = (*SPECIAL, "zero", "one", "two")
FIELDS = {
    "picture": Field("image", (1, 20, 30), "npy", "laplace"),
    "name": Field("text", (3,), "txt", "categorical", WORDS),
    "sound": Field("vector", (5,), "npy", "normal"),
}


def datum(number: int) -> Row:
    """Row `number`, always the same; one or two modalities are missing in most rows."""
    generator = torch.Generator().manual_seed(number)
    data = {
        "picture": torch.randint(0, 256, (1, 20, 30), dtype=torch.uint8, generator=generator),
        "name": WORDS[3 + number % 3],
        "sound": torch.randn(5, generator=generator),
    }
    for absent in [["sound"], ["picture", "name"], [], ["name"], ["picture"]][number % 5]:
        del data[absent]
    return Row(data, number % 3 if number % 4 else None)


SIZES = {"train": 23, "test": 9}


def rows(split: str) -> Iterator[Row]:
    return (datum(number) for number in range(SIZES[split]))


def dataset(make: Callable[[str], Iterator[Row]] = rows, **changes: object) -> Dataset:
    return Dataset(**{"name": "tiny", "fields": FIELDS, "rows": make, "classes": WORDS[3:], "source": {"noise": 0.5}, **changes})


# ---- rows that are numbers: which row a batch holds can be read off its content ------------------------------------------------------

COUNTED = {"left": Field("vector", (2,), "npy", "normal"), "right": Field("counts", (1,), "npy", "poisson")}


def counted(low: int, high: int, poisoned: Collection[int] = ()) -> Dataset:
    """Rows low..high: each holds its number in one modality or in both; poisoned ones are no numbers."""

    def row(number: int) -> Row:
        data = {"left": torch.tensor([float(number), float("nan") if number in poisoned else -1.0]), "right": torch.tensor([number])}
        for absent in (["left"], [], ["right"], [])[number % 4]:
            del data[absent]
        return Row(data)

    return Dataset("counted", COUNTED, lambda split: (row(number) for number in range(low, high)))


def row_numbers(batch: Batch) -> list[int]:
    """The number that each row of a batch holds, its modalities having to agree; -1 for padding."""
    left, right = (batch.dense(name)[:, 0].long().tolist() for name in COUNTED)
    found = []
    for a, b, (first, second) in zip(left, right, batch.observed.tolist(), strict=True):
        assert not (first and second) or a == b
        found.append(a if first else b if second else -1)
    return found


def unequal(folder: Path, lengths: Sequence[int], poisoned: Collection[int] = ()) -> Path:
    """Counted rows in shards of these lengths, split "train": what `write_shards` does not write and others may."""
    ends = np.cumsum([0, *lengths]).tolist()
    parts = [
        write_shards(counted(low, high, poisoned), folder / f"part-{low}", rows_per_shard=high - low, splits=["train"])
        for low, high in pairwise(ends)
    ]
    with IndexWriter(folder / "train.index.npy", len(COUNTED)) as index:
        for part in parts:
            index.append(part.index("train").records)
    shards = [part.shards("train")[0]._replace(file=f"train-{number:06d}.tar") for number, part in enumerate(parts)]
    for part, shard in zip(parts, shards, strict=True):
        part.path(part.shards("train")[0]).rename(folder / shard.file)
        shutil.rmtree(part.folder)
    present = {name: sum(part.splits["train"].present[name] for part in parts) for name in COUNTED}
    split = Split(ends[-1], True, present, "train.index.npy", file_sha256(folder / "train.index.npy"), tuple(shards))
    replace(parts[0], folder=folder, splits={"train": split}).save()
    return folder
