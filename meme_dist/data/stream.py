"""Shards to batches: the only layer that decides which rank and which worker reads what.

`Stream` is endless and for training; `Evaluation` is finite and gives every row once. Both read by offset and check every byte.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from meme_dist.data.collate import Failure, Part, cut, decode, fill, join, parts, to_batch
from meme_dist.data.index import Manifest
from meme_dist.data.order import Order, default_streams
from meme_dist.data.reader import Raw, Reader
from meme_dist.types import Batch


class Stream:
    """Endless batches for training. The global batch of step t is a pure function of (seed, shards, virtual streams, batch size, t).

    Ranks, workers and accumulation only say who reads which share of it: the rows of a global batch are ordered by (stream, place in the
    stream), rank r takes the r-th contiguous share, and the micro batches are contiguous parts of that. `step` is the whole state: it is
    the number of steps handed out; set it before iterating and the stream goes on from there, on any number of ranks.

    `batch_size` counts the rows of an optimiser step over all ranks. `streams` is fixed for a run and must divide it and be a multiple
    of `world`; the default is the largest divisor of `batch_size` up to 64. More workers than a rank has streams are not started.
    Raises ValueError for numbers that do not divide, for shards that are missing, cut or altered, and for data their fields refuse.
    """

    def __init__(
        self,
        folder: Path | str,
        split: str,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        workers: int = 0,
        streams: int | None = None,
        step: int = 0,
    ):
        _check_rank(rank, world)
        _check_positive(batch_size=batch_size, accumulate=accumulate)
        streams = default_streams(batch_size) if streams is None else streams
        _check_division(batch_size, streams, world, accumulate)
        self.manifest, self.split = Manifest.load(folder), split
        self.batch_size, self.streams, self.seed, self.step = batch_size, streams, seed, _at_least_zero("step", step)
        self.rank, self.world, self.accumulate = rank, world, accumulate
        self.workers = min(_at_least_zero("workers", workers), streams // world)
        self.single = self.manifest.single(split)
        self._reader = Reader(self.manifest, split)
        rows = self.manifest.num_rows(split)
        row_bytes = sum(shard.bytes for shard in self.manifest.shards(split)) / rows
        self._order = Order.of(rows=rows, row_bytes=row_bytes, streams=streams, seed=seed)

    def __iter__(self) -> Iterator[list[Batch]]:
        """From `step` on: for each optimiser step this rank's `accumulate` micro batches. `step` counts what was handed out."""
        mine = _Parts(self._reader, self._order, self._mine, self.batch_size // self.streams, _at_least_zero("step", self.step))
        source = parts(mine, self.workers)
        while True:
            share = join([next(source) for _ in range(max(1, self.workers))])
            batches = self._micro_batches(share, self.step)
            self.step += 1
            yield batches

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it is a position in."""
        return {"step": self.step, **self._identity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another stream of the same run stood. Raises ValueError, saying which, where this is another stream."""
        for name, value in self._identity.items():
            if state.get(name) != value:
                raise ValueError(
                    f"stream: {name} was {state.get(name)!r} when the state was saved and is {value!r} now; "
                    "the same position would hold other rows: resume with what the run began with, or begin a new run"
                )
        self.step = _at_least_zero("step", state["step"])

    @property
    def _identity(self) -> dict[str, Any]:
        shards, split = self.manifest.fingerprint, self.split
        return {"seed": self.seed, "batch_size": self.batch_size, "streams": self.streams, "split": split, "shards": shards, "order": 1}

    @property
    def _mine(self) -> range:
        """The virtual streams of this rank."""
        share = self.streams // self.world
        return range(self.rank * share, (self.rank + 1) * share)

    def _micro_batches(self, share: Part, step: int) -> list[Batch]:
        size = self.batch_size // self.world // self.accumulate
        start = step * self.batch_size + self.rank * size * self.accumulate
        batches = []
        for number in range(self.accumulate):
            part = cut(share, number * size, (number + 1) * size)
            draw = start + number * size + np.arange(size)
            batches.append(to_batch(part, draw=draw, seed=self.seed, single=self.single, labelled=bool(self.manifest.classes)))
        return batches


class Evaluation:
    """Every row of a split exactly once over the ranks, in row order, in equally many batches on each rank.

    Rank r has the r-th contiguous share of the rows. Batches are always full: rows that observe nothing stand where a share ends early (a
    rank may have none but those). `Batch.draw` is the row's number in the split; padding rows go on counting behind the last, each its own.
    Raises ValueError as `Stream` does.
    """

    def __init__(self, folder: Path | str, split: str, *, batch_size: int, rank: int = 0, world: int = 1, seed: int = 0, workers: int = 0):
        _check_rank(rank, world)
        _check_positive(batch_size=batch_size)
        self.manifest, self.split = Manifest.load(folder), split
        self.batch_size, self.rank, self.world, self.seed = batch_size, rank, world, seed
        self.single = self.manifest.single(split)
        self._reader = Reader(self.manifest, split)
        rows = self.manifest.num_rows(split)
        self._low, self._high = rank * rows // world, (rank + 1) * rows // world
        self._length = -(-rows // (world * batch_size))
        self.workers = min(_at_least_zero("workers", workers), self._length)

    def __len__(self) -> int:
        """Batches of each rank."""
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        mine = _Ranges(self._reader, self._low, self._high, self.batch_size, self._length)
        rows = self.manifest.num_rows(self.split)
        padding = rows + self.rank * self._length * self.batch_size - self._low  # those of the ranks before come first
        for number, part in enumerate(parts(mine, self.workers)):
            draw = self._low + number * self.batch_size + np.arange(self.batch_size)
            draw = np.where(draw < self._high, draw, draw - self._high + padding)
            yield to_batch(part, draw=draw, seed=self.seed, single=self.single, labelled=bool(self.manifest.classes))


class _Parts(IterableDataset):
    """What a worker does for a stream: for each step the rows of its share of the rank's virtual streams, decoded."""

    def __init__(self, reader: Reader, order: Order, streams: range, rows: int, step: int):
        self.reader, self.order, self.streams, self.rows, self.step = reader, order, streams, rows, step

    def __iter__(self) -> Iterator[Part | Failure]:
        info = get_worker_info()
        if info is None:
            yield from self._parts(self.streams)
            return
        share = [number * len(self.streams) // info.num_workers for number in (info.id, info.id + 1)]
        source, failure = self._parts(self.streams[slice(*share)]), None
        while True:
            try:
                part = failure or next(source)
            except ValueError as error:
                part = failure = Failure(str(error))
            yield part

    def _parts(self, streams: range) -> Iterator[Part]:
        sources = [self._raw(stream) for stream in streams]
        while True:
            rows = [next(source) for source in sources for _ in range(self.rows)]
            yield decode(self.reader, [row for row, _ in rows], [raw for _, raw in rows])

    def _raw(self, stream: int) -> Iterator[tuple[int, Raw]]:
        for rows in self.order.windows(stream, self.step * self.rows):
            yield from zip(rows.tolist(), self.reader.read(rows), strict=True)


class _Ranges(Dataset):
    """What a worker does for an evaluation: batch by batch the next rows, filled up at the end."""

    def __init__(self, reader: Reader, low: int, high: int, batch_size: int, length: int):
        self.reader, self.low, self.high, self.batch_size, self.length = reader, low, high, batch_size, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> Part | Failure:
        try:
            return self._part(number)
        except ValueError as error:
            if get_worker_info() is None:
                raise
            return Failure(str(error))

    def _part(self, number: int) -> Part:
        start = min(self.high, self.low + number * self.batch_size)
        rows = np.arange(start, min(self.high, start + self.batch_size))
        return fill(decode(self.reader, rows.tolist(), self.reader.read(rows)), self.batch_size)


def _check_rank(rank: int, world: int) -> None:
    if not 0 <= rank < world:
        raise ValueError(f"rank: expected 0 to {world - 1} for world {world}, got {rank}")


def _check_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name}: expected a number above 0, got {number}")


def _at_least_zero(name: str, number: int) -> int:
    if number < 0:
        raise ValueError(f"{name}: expected 0 or more, got {number}")
    return number


def _check_division(batch_size: int, streams: int, world: int, accumulate: int) -> None:
    if batch_size % (world * accumulate):
        raise ValueError(f"batch_size: expected a multiple of world x accumulate = {world} x {accumulate}, got {batch_size}")
    if streams < 1 or batch_size % streams or streams % world:
        fitting = [number for number in range(world, batch_size + 1, world) if batch_size % number == 0]
        raise ValueError(
            f"streams: expected a divisor of batch_size {batch_size} that is a multiple of world {world} (one of {fitting}), got {streams}"
        )
