"""Tiny trainings that the trainer's tests share: a MEME of three vectors, on rows in memory or on real shards."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from meme_dist.data.sets.linear_gaussian import linear_gaussian
from meme_dist.data.shards import write_shards
from meme_dist.data.stream import Stream
from meme_dist.modalities.vector import mlp
from meme_dist.objectives.meme import MEME
from meme_dist.types import Batch, pack

SIZES = {"a": 3, "b": 2, "c": 4, "x0": 4, "x1": 4, "x2": 4}
SHARDED = ("x0", "x1", "x2")  # the modalities of the shards
PATTERNS = {"a": (1, 0), "b": (0, 1), "ab": (1, 1)}


def build(names: Sequence[str] = ("a", "b"), *, seed: int = 0, dropout: float = 0.0, **settings: Any) -> MEME:
    """A MEME of small perceptrons, with pseudo-inputs from data; the same for the same seed. Dropout draws from torch's own generator."""
    torch.manual_seed(seed)
    settings = {"pseudo_inputs": 4, "samples": 3} | settings
    objective = MEME({name: mlp((SIZES[name],), latent_dim=2, hidden=(6,)) for name in names}, **settings)
    rows = Rows(names, np.ones((8, len(names)), dtype=bool), batch_size=8)
    objective.initialise(next(iter(rows))[0])
    if dropout:
        for modality in objective.modalities.values():
            modality.encoder.append(nn.Dropout(dropout))
    return objective


def shards(folder: Path) -> Path:
    """Linear-Gaussian shards of 96 rows in three modalities, 30 % of the entries missing."""
    write_shards(linear_gaussian(rows=96, missing=0.3), folder, rows_per_shard=32)
    return folder


def stream(folder: Path, *, batch_size: int, **layout: int) -> Stream:
    """The real stream over `shards`, in four virtual streams."""
    return Stream(folder, "train", batch_size=batch_size, **({"seed": 0, "streams": 4} | layout))


class Rows:
    """An endless stream over a few rows in memory, with the mask [rows, N] that is given; the global batch is the same for every layout."""

    def __init__(
        self,
        names: Sequence[str],
        observed: np.ndarray,
        *,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        seed: int = 0,
    ):
        generator = np.random.default_rng(0)
        self.names, self.observed = names, np.asarray(observed, dtype=bool)
        self.data = {name: generator.normal(size=(len(observed), SIZES[name])).astype("float32") for name in names}
        self.batch_size, self.rank, self.world, self.accumulate, self.seed = batch_size, rank, world, accumulate, seed
        self.step = 0

    def __iter__(self) -> Iterator[list[Batch]]:
        while True:
            parts = np.arange(self.batch_size).reshape(self.world, self.accumulate, -1)[self.rank]
            yield [self.batch(part) for part in parts]
            self.step += 1

    def batch(self, positions: np.ndarray) -> Batch:
        draw = self.step * self.batch_size + positions
        rows = draw % len(self.observed)
        observed = self.observed[rows]
        present = {n: torch.from_numpy(self.data[n][rows[observed[:, i]]]) for i, n in enumerate(self.names)}
        return pack(present, observed, draw=draw, seed=self.seed, single=True)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "batch_size": self.batch_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


def mixed(names: Sequence[str], rows: int = 24) -> np.ndarray:
    """A mask [rows, N] with every pattern in it: row r has the pattern of the binary digits of r (none present: all present)."""
    bits = (np.arange(rows)[:, None] >> np.arange(len(names))) % 2 == 1
    return np.where(bits.any(1, keepdims=True), bits, True)


def weights(module: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of the parameters."""
    return {name: p.detach().clone() for name, p in module.named_parameters()}
