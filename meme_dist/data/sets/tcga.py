"""Three omics of breast tumours: The Cancer Genome Atlas, as mixOmics distributes it (GPL>=2). Its test part truly lacks one of them."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from meme_dist.data.fields import Field
from meme_dist.data.sets._arrays import locate, read_arrays, standardised
from meme_dist.data.sets._pairing import check_split, generator, rows_of
from meme_dist.data.shards import Dataset, Row

FILE = "tcga_breast_mrna_mirna_protein.npz"
OMICS = {"mrna": 200, "mirna": 184, "protein": 142}  # features
NEVER_TESTED = "protein"
CLASSES = ("Basal", "Her2", "LumA")  # subtypes


def tcga(*, source: Path, seed: int = 0) -> Dataset:
    """150 tumours to train on, all complete, and 70 to test on, of which nobody measured the proteins; labels are the subtypes.

    Each omics is a vector, standardised by the training rows. `source` holds `tcga_breast_mrna_mirna_protein.npz`. Raises ValueError
    for a missing or altered file.
    """

    def rows(split: str) -> Iterator[Row]:
        check_split(split)
        omics, label = read(split, source)
        order = generator(seed if split == "train" else 0, f"tcga/{split}/order").permutation(len(label))
        return rows_of(omics, dict.fromkeys(omics, order), np.ones((len(order), len(omics)), dtype=bool), label[order])

    fields = {name: Field(kind="vector", shape=(size,), codec="npy", likelihood="normal") for name, size in OMICS.items()}
    return Dataset("tcga", fields, rows, CLASSES, {"seed": seed}, files=lambda: locate(source, [FILE]))


def read(split: str, source: Path) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """What a split has of the three, standardised [rows, features], and the labels [rows], in the file's order."""
    (path,) = locate(source, [FILE])
    shapes = {f"{name}_{part}": (part, size) for name, size in OMICS.items() for part in ("train", "test") if _has(part, name)}
    arrays = read_arrays(path, {**shapes, "y_train": ("train",), "y_test": ("test",)})
    omics = {}
    for name in OMICS:
        if _has(split, name):
            train, wanted = arrays[f"{name}_train"], arrays[f"{name}_{split}"]
            stacked = standardised(np.concatenate([train, wanted]), np.arange(len(train)))
            omics[name] = stacked[len(train) :]
    return omics, arrays[f"y_{split}"]


def _has(split: str, name: str) -> bool:
    return split == "train" or name != NEVER_TESTED
