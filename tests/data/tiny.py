"""A tiny data set with three modalities and most rows incomplete, for the tests of shards."""

from collections.abc import Callable, Iterator

import torch

from meme_dist.data.fields import SPECIAL, Field
from meme_dist.data.shards import Dataset, Row

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
