"""Encoded rows to tensors to batches: what a loader worker does, and what the main process puts together."""

from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from meme_dist.data.reader import Raw, Reader
from meme_dist.types import Batch, pack


class Part(NamedTuple):
    """Decoded rows, before they become a batch."""

    present: Mapping[str, Shaped[Tensor, "R *event"]]  # the rows that hold a modality, in row order
    observed: np.ndarray  # [rows, N]
    label: np.ndarray  # [rows], -1 where there is none


def decode(reader: Reader, rows: Sequence[int], raw: Sequence[Raw]) -> Part:
    """Decode rows modality by modality. Raises ValueError naming shard, row and modality of a datum that its field refuses."""
    observed = np.array([[member is not None for member in members] for members in raw], dtype=bool)
    present = {}
    for column, (name, field) in enumerate(reader.manifest.fields.items()):
        members = [member for row in raw if (member := row[column]) is not None]
        try:
            present[name] = field.decode_rows(members)
        except ValueError:
            _name_the_culprit(reader, name, [(row, members[column]) for row, members in zip(rows, raw, strict=True)])
            raise
    return Part(present, observed.reshape(len(rows), len(present)), np.asarray(reader.index.label[list(rows)], dtype=np.int64))


def _name_the_culprit(reader: Reader, name: str, members: Sequence[tuple[int, memoryview | None]]) -> None:
    for row, member in members:
        try:
            if member is not None:
                reader.manifest.fields[name].decode(member)
        except ValueError as error:
            raise ValueError(f"{reader.place(row, name)}: {error}") from error


def join(parts: Sequence[Part]) -> Part:
    """The rows of several parts, one after the other."""
    if len(parts) == 1:
        return parts[0]
    present = {name: torch.cat([part.present[name] for part in parts]) for name in parts[0].present}
    return Part(present, np.concatenate([part.observed for part in parts]), np.concatenate([part.label for part in parts]))


def cut(part: Part, low: int, high: int) -> Part:
    """Rows low..high of a part."""
    before, inside = part.observed[:low].sum(0), part.observed[low:high].sum(0)
    present = {name: x[before[column] : before[column] + inside[column]] for column, (name, x) in enumerate(part.present.items())}
    return Part(present, part.observed[low:high], part.label[low:high])


def fill(part: Part, size: int) -> Part:
    """The part with rows behind it that observe nothing, up to `size` rows."""
    extra = size - len(part.observed)
    observed = np.concatenate([part.observed, np.zeros((extra, len(part.present)), dtype=bool)])
    return Part(part.present, observed, np.concatenate([part.label, np.full(extra, -1)]))


def to_batch(part: Part, *, draw: np.ndarray, seed: int, single: bool, labelled: bool) -> Batch:
    """A packed batch, in pinned memory where there is a GPU to copy it to."""
    label = torch.from_numpy(np.ascontiguousarray(part.label)) if labelled else None
    batch = pack(part.present, part.observed, draw=draw, seed=seed, single=single, label=label)
    return _pin(batch) if torch.cuda.is_available() else batch


def _pin(batch: Batch) -> Batch:
    return batch._replace(
        modalities={name: type(packed)(*(x.pin_memory() for x in packed)) for name, packed in batch.modalities.items()},
        observed=batch.observed.pin_memory(),
        draw=batch.draw.pin_memory(),
        label=None if batch.label is None else batch.label.pin_memory(),
    )


def parts(dataset: Dataset, workers: int) -> Iterator[Part]:
    """What a data set of whole parts makes, here or in worker processes; torch's global random state stays untouched.

    Workers come from a fork server: forking a process that has threads or a CUDA context may deadlock. A ValueError of a worker is raised
    here with its own words.
    """
    if not workers:
        yield from dataset if isinstance(dataset, IterableDataset) else map(dataset.__getitem__, range(len(cast(Sized, dataset))))
        return
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "webdataset", "meme_dist.data.stream"])  # imported once, not once a worker
    for part in DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        multiprocessing_context=context,
        collate_fn=_as_it_is,
        generator=torch.Generator().manual_seed(0),
        prefetch_factor=2,
    ):
        if isinstance(part, Failure):
            raise ValueError(part.message)
        yield part


class Failure(NamedTuple):
    """An error on its way out of a worker: sent as a value, it arrives without the worker's traceback and without a wait for its end."""

    message: str


def _as_it_is(part: Any) -> Any:
    return part
