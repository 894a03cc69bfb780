"""RNA and surface-protein counts of the same 500 blood cells: CITE-seq (GSE126310, as CiteFuse distributes it; GPL-3)."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from meme_dist.data.fields import Field
from meme_dist.data.sets._arrays import held_out, locate, read_arrays
from meme_dist.data.sets._missing import check_missing, missing_at_random
from meme_dist.data.sets._pairing import check_split, generator
from meme_dist.data.shards import Dataset, Row

FILE = "citeseq_pbmc_eccite.npz"
ARRAYS = {"rna": "rna_hvg1000", "protein": "adt"}
SIZES = {"rna": 1000, "protein": 49}
TEST_SHARE = 5  # one cell in five


def citeseq(*, source: Path, missing: float = 0.0, seed: int = 0) -> Dataset:
    """400 cells to train on with a share of `missing` entries absent at random (each keeps one), 100 complete ones to test on; no labels.

    Counts as they were measured, neither scaled nor logged: 1,000 variable genes and 49 proteins (the four hashtags in the file mark
    samples, not cells, and are left out). The split is random and the same for every seed. `source` holds `citeseq_pbmc_eccite.npz`.
    Raises ValueError for a missing or altered file, and for a share below 0 or above 1/2.
    """
    check_missing(missing, len(SIZES))

    def rows(split: str) -> Iterator[Row]:
        check_split(split)
        number, share = (seed, missing) if split == "train" else (0, 0.0)
        counts = read(split, source)
        order = generator(number, f"citeseq/{split}/order").permutation(len(counts["rna"]))
        observed = missing_at_random(len(order), len(counts), share, generator(number, f"citeseq/{split}/missing"))
        return _rows(counts, order, observed)

    fields = {name: Field(kind="counts", shape=(size,), codec="npy", likelihood="negative_binomial") for name, size in SIZES.items()}
    return Dataset("citeseq", fields, rows, (), {"missing": missing, "seed": seed}, files=lambda: locate(source, [FILE]))


def _rows(counts: dict[str, np.ndarray], order: np.ndarray, observed: np.ndarray) -> Iterator[Row]:
    for row, shown in zip(order, observed, strict=True):
        held = [name for name, there in zip(counts, shown, strict=True) if there]
        yield Row({name: torch.from_numpy(counts[name][row]) for name in held})


def read(split: str, source: Path) -> dict[str, np.ndarray]:
    """The counts [cells, features] of a split, in the file's order."""
    (path,) = locate(source, [FILE])
    arrays = read_arrays(path, {array: ("cells", SIZES[name]) for name, array in ARRAYS.items()})
    cells = len(arrays["adt"])
    one_class, all_cells = np.zeros(cells, dtype=np.int64), np.ones(cells, dtype=bool)
    test = held_out(one_class, one_in=TEST_SHARE, eligible=all_cells, rng=generator(0, "citeseq/split"))
    return {name: arrays[array][test == (split == "test")].astype(np.int32) for name, array in ARRAYS.items()}
