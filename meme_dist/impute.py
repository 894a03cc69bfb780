"""Filling in what is missing: incomplete shards in, complete shards out."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from meme_dist.data.collate import decode, fill, to_batch
from meme_dist.data.fields import Field
from meme_dist.data.index import Manifest
from meme_dist.data.reader import Reader
from meme_dist.data.shards import Dataset, Row, write_shards_together
from meme_dist.metrics.generation import imputations
from meme_dist.objectives.base import Objective
from meme_dist.ranks import ALONE, Processes
from meme_dist.types import Batch

ROWS = 256  # of a batch


class Filled(NamedTuple):
    """How many entries of a split were there, and how many were filled in."""

    rows: int
    there: int
    filled: int


def impute(
    objective: Objective, fields: Mapping[str, Field], shards: Path | str, out: Path, *, seed: int = 0, processes: Processes = ALONE
) -> dict[str, Filled]:
    """Write the rows of `shards` into new shards `out`, every missing entry filled in; each row once, in order, with its key and label.

    An entry that is there is copied as it is. A missing one becomes the likelihood's mean at one draw of q(z | what the row observes):
    other seeds give other plausible completions. What was missing stands in the index of `shards`: the same row there lacks the member.
    Collective: each process fills in shards of its own, and `out` is the same, byte by byte, for any number of them.
    Raises ValueError where the shards' fields are not those that the model was trained on, and for an `out` that holds something else.
    """
    with processes.agreed():
        manifest = Manifest.load(shards)
        check_fields(manifest, fields)
        filled = _Rows(objective, manifest, seed)
        source = {"imputed": manifest.address, "rows": manifest.fingerprint, "seed": seed}
        dataset = Dataset(f"{manifest.name}_imputed", manifest.fields, filled, manifest.classes, source)
    rows = {name: split.rows for name, split in manifest.splits.items()}
    rows_per_shard = manifest.rows_per_shard
    write_shards_together(dataset, out, part=filled.part, rows=rows, rows_per_shard=rows_per_shard, processes=processes)
    there = {name: sum(split.present.values()) for name, split in manifest.splits.items()}
    return {name: Filled(rows[name], there[name], rows[name] * len(fields) - there[name]) for name in rows}


def check_fields(manifest: Manifest, fields: Mapping[str, Field]) -> None:
    """Raise ValueError, naming the first differences, unless these shards have the fields that a model was trained on."""
    if list(manifest.fields) != list(fields):
        raise ValueError(f"{manifest.folder}: expected the modalities {list(fields)} that the model has, got {list(manifest.fields)}")
    for name, field in fields.items():
        theirs = manifest.fields[name].to_json()
        if different := [entry for entry, value in field.to_json().items() if theirs[entry] != value]:
            entry = different[0]
            raise ValueError(
                f"{manifest.folder}, modality {name}: expected {entry} {field.to_json()[entry]!r}, as the model was trained on, "
                f"got {theirs[entry]!r}; write the shards as the training set was"
            )


class _Rows:
    """`Dataset.rows` of the filled-in set, and any part of them: batch by batch, so that memory does not grow with the rows.

    A part is cut into batches from its own first row, each filled up to the same size: what a row is filled in with may differ in the
    last bit by the rows around it, and is the same for the same part whoever asks for it.
    """

    def __init__(self, objective: Objective, manifest: Manifest, seed: int):
        self.objective, self.manifest, self.seed = objective, manifest, seed
        self._readers: dict[str, Reader] = {}

    def __call__(self, split: str) -> Iterator[Row]:
        rows, size = self.manifest.num_rows(split), self.manifest.rows_per_shard
        for start in range(0, rows, size):
            yield from self.part(split, range(start, min(rows, start + size)))

    def part(self, split: str, rows: range) -> Iterator[Row]:
        size = min(ROWS, self.manifest.rows_per_shard, self.manifest.num_rows(split))
        for start in range(rows.start, rows.stop, size):
            mine = np.arange(start, min(rows.stop, start + size))
            batch = self._batch(split, mine, size)
            columns = self._columns(batch)
            for row in range(len(mine)):
                label = -1 if batch.label is None else int(batch.label[row])
                yield Row({name: column[row] for name, column in columns.items()}, None if label < 0 else label)

    def _batch(self, split: str, rows: np.ndarray, size: int) -> Batch:
        """These rows, and behind them rows that observe nothing."""
        if split not in self._readers:
            self._readers[split] = Reader(self.manifest, split)
        reader, manifest = self._readers[split], self.manifest
        part = fill(decode(reader, rows.tolist(), reader.read(rows)), size)
        draw = np.concatenate([rows, manifest.num_rows(split) + np.arange(size - len(rows))])
        return to_batch(part, draw=draw, seed=self.seed, single=manifest.single(split), labelled=bool(manifest.classes))

    def _columns(self, batch: Batch) -> dict[str, Tensor]:
        made = imputations(self.objective, batch)
        return {
            name: storable(field, _either(there, batch.dense(name), made[name][0]))
            for (name, field), there in zip(self.manifest.fields.items(), batch.observed.T, strict=True)
        }


def _either(there: Tensor, data: Shaped[Tensor, "B *event"], made: Shaped[Tensor, "B *event"]) -> Shaped[Tensor, "B *event"]:
    return torch.where(there.view(-1, *[1] * (data.dim() - 1)), data, made.to(data.dtype))


def storable(field: Field, x: Shaped[Tensor, "*event"]) -> Shaped[Tensor, "*event"]:
    """Decoded or generated data in the form in which the field is written: bytes for pixels, whole numbers for counts, token ids."""
    if field.kind == "image":
        return (x.clamp(0, 1) * 255).round().to(torch.uint8)
    if field.kind == "counts":
        return x.clamp(min=0).round()
    return x.clamp(0, 1) if field.likelihood == "bernoulli" else x
