"""Encoded rows to tensors to batches: what a loader worker does, and what the main process puts together."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from meme_dist.data.check import Problem
from meme_dist.data.fields import Buffer
from meme_dist.data.reader import Raw, Reader
from meme_dist.types import Batch, pack


class Part(NamedTuple):
    """Decoded rows, before they become a batch."""

    present: Mapping[str, Shaped[Tensor, "R *event"]]  # the rows that hold a modality, in row order
    observed: np.ndarray  # [rows, N]
    label: np.ndarray  # [rows], -1 where there is none
    damaged: tuple[Problem, ...] = ()  # rows that others stand in for


def decode(reader: Reader, rows: Sequence[int], raw: Sequence[Raw], out: Mapping[str, Tensor] | None = None) -> Part:
    """Decode rows modality by modality, into the first rows of `out` where that is given.

    Raises ValueError naming shard, row and modality of a datum that its field refuses.
    """
    columns = list(zip(*raw, strict=True)) or [()] * len(reader.manifest.fields)
    observed = np.array([[member is not None for member in column] for column in columns], dtype=bool).T
    present = {}
    for column, (name, field) in enumerate(reader.manifest.fields.items()):
        members = [member for member in columns[column] if member is not None]
        try:
            present[name] = field.decode_rows(members, None if out is None else out[name])
        except ValueError:
            _name_the_culprit(reader, name, [(row, members[column]) for row, members in zip(rows, raw, strict=True)])
            raise
    return Part(present, observed, np.asarray(reader.index.label[list(rows)], dtype=np.int64))


def _name_the_culprit(reader: Reader, name: str, members: Sequence[tuple[int, Buffer | None]]) -> None:
    for row, member in members:
        try:
            if member is not None:
                reader.manifest.fields[name].decode(member)
        except ValueError as error:
            raise ValueError(f"{reader.place(row, name)}: {error}") from error


def join(parts: Sequence[Part]) -> Part:
    """The rows of several parts, one after the other: always a copy, in pinned memory where there is a GPU to copy it to."""
    present = {name: _joined([part.present[name] for part in parts]) for name in parts[0].present}
    observed, label = np.concatenate([part.observed for part in parts]), np.concatenate([part.label for part in parts])
    return Part(present, observed, label, sum((part.damaged for part in parts), ()))


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    rows = sum(len(x) for x in tensors)
    out = torch.empty((rows, *tensors[0].shape[1:]), dtype=tensors[0].dtype, pin_memory=torch.cuda.is_available())
    return torch.cat(list(tensors), out=out)


def cut(part: Part, low: int, high: int) -> Part:
    """Rows low..high of a part."""
    before, inside = part.observed[:low].sum(0), part.observed[low:high].sum(0)
    present = {name: x[before[column] : before[column] + inside[column]] for column, (name, x) in enumerate(part.present.items())}
    return Part(present, part.observed[low:high], part.label[low:high])


def fill(part: Part, size: int) -> Part:
    """The part with rows behind it that observe nothing, up to `size` rows."""
    extra = size - len(part.observed)
    observed = np.concatenate([part.observed, np.zeros((extra, len(part.present)), dtype=bool)])
    return part._replace(observed=observed, label=np.concatenate([part.label, np.full(extra, -1)]))


def to_batch(part: Part, *, draw: np.ndarray, seed: int, single: bool, labelled: bool) -> Batch:
    """A packed batch, in pinned memory where there is a GPU to copy it to."""
    label = torch.from_numpy(np.ascontiguousarray(part.label)) if labelled else None
    batch = pack(part.present, part.observed, draw=draw, seed=seed, single=single, label=label)
    return _pin(batch) if torch.cuda.is_available() else batch


def _pin(batch: Batch) -> Batch:
    return batch._replace(
        modalities={name: type(packed)(*(x.pin_memory() for x in packed)) for name, packed in batch.modalities.items()},
        observed=batch.observed.pin_memory(),
        alone=batch.alone.pin_memory(),
        draw=batch.draw.pin_memory(),
        label=None if batch.label is None else batch.label.pin_memory(),
    )
