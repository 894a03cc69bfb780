"""Filling in what is missing: incomplete shards in, complete shards out."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Shaped
from torch import Tensor

from meme_dist.data.fields import Field
from meme_dist.data.index import Manifest
from meme_dist.data.shards import Dataset, Row, write_shards
from meme_dist.data.stream import Evaluation
from meme_dist.metrics.generation import imputations
from meme_dist.objectives.base import Objective
from meme_dist.types import Batch

ROWS = 256  # of a batch


class Filled(NamedTuple):
    """How many entries of a split were there, and how many were filled in."""

    rows: int
    there: int
    filled: int


def impute(objective: Objective, fields: Mapping[str, Field], shards: Path, out: Path, *, seed: int = 0) -> dict[str, Filled]:
    """Write the rows of `shards` into new shards `out`, every missing entry filled in; each row once, in order, with its key and label.

    An entry that is there is copied as it is. A missing one becomes the likelihood's mean at one draw of q(z | what the row observes):
    other seeds give other plausible completions. What was missing stands in the index of `shards`: the same row there lacks the member.
    Raises ValueError where the shards' fields are not those that the model was trained on, and for an `out` that holds something else.
    """
    manifest = Manifest.load(shards)
    check_fields(manifest, fields)
    source = {"imputed": str(shards.resolve()), "rows": manifest.fingerprint, "seed": seed}
    rows = _Rows(objective, manifest, seed)
    write_shards(
        Dataset(f"{manifest.name}_imputed", manifest.fields, rows, manifest.classes, source),
        out,
        rows_per_shard=manifest.rows_per_shard,
        splits=list(manifest.splits),
    )
    counts = {name: (split.rows, sum(split.present.values())) for name, split in manifest.splits.items()}
    return {name: Filled(rows, there, rows * len(fields) - there) for name, (rows, there) in counts.items()}


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
    """`Dataset.rows` of the filled-in set: reads, infers and decodes batch by batch, so that memory does not grow with the rows."""

    def __init__(self, objective: Objective, manifest: Manifest, seed: int):
        self.objective, self.manifest, self.seed = objective, manifest, seed

    def __call__(self, split: str) -> Iterator[Row]:
        left = self.manifest.num_rows(split)  # the last batch is filled up with rows that are none
        for batch in Evaluation(self.manifest.folder, split, batch_size=min(ROWS, left), seed=self.seed):
            columns = self._filled(batch)
            for row in range(min(left, len(batch.observed))):
                label = -1 if batch.label is None else int(batch.label[row])
                yield Row({name: column[row] for name, column in columns.items()}, None if label < 0 else label)
            left -= len(batch.observed)

    def _filled(self, batch: Batch) -> dict[str, Tensor]:
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
