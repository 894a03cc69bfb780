"""Shards to batches: the only layer that decides which rank and which worker reads what.

`Stream` is endless and for training; `Evaluation` is finite and gives every row once. Both read by offset and check every byte.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from meme_dist.data.check import Problem
from meme_dist.data.collate import Part, cut, decode, fill, join, to_batch
from meme_dist.data.index import Manifest
from meme_dist.data.order import Order, default_streams
from meme_dist.data.reader import Raw, Reader
from meme_dist.data.substitute import decode_intact
from meme_dist.data.workers import parts
from meme_dist.types import Batch

NAMED = 5  # damaged rows that an error names


class Stream:
    """Endless batches for training. The global batch of step t is a pure function of (seed, shards, virtual streams, batch size, t).

    Ranks, workers and accumulation only say who reads which share of it: the rows of a global batch are ordered by (stream, place in the
    stream), rank r takes the r-th contiguous share, and the micro batches are contiguous parts of that. `step` is the whole state: it is
    the number of steps handed out; set it before iterating and the stream goes on from there, on any number of ranks.

    `batch_size` counts the rows of an optimiser step over all ranks. `streams` is fixed for a run and must divide it; the default is the
    largest divisor of `batch_size` up to 64. Where ranks do not divide the streams, neighbours share one: each goes through its order and
    reads its own rows alone. More workers than a rank has streams are not started.
    `folder` is a path, an address or a brace pattern (see `Manifest.load`), and `cache` the folder for copies of remote shards.

    `damaged` is how many different rows of this rank may be unreadable before it stops, at most half of the split. Such a row is named in
    `Stream.damaged` when its turn comes, and another row, which (seed, row) alone decide, stands in its place; its bytes are never used.
    Raises ValueError for numbers that do not divide, for shards that are missing, cut or altered and data their fields refuse, beyond what
    `damaged` allows; OSError for a source that cannot be reached.
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
        damaged: int = 0,
        cache: Path | str | None = None,
    ):
        _check_rank(rank, world)
        _check_positive(batch_size=batch_size, accumulate=accumulate)
        streams = default_streams(batch_size) if streams is None else streams
        _check_division(batch_size, streams, world, accumulate)
        self.manifest, self.split = Manifest.load(folder, cache=cache), split
        self.batch_size, self.streams, self.seed, self.step = batch_size, streams, seed, _at_least_zero("step", step)
        self.rank, self.world, self.accumulate = rank, world, accumulate
        self.workers = min(_at_least_zero("workers", workers), len(_streams_of(self._mine, batch_size // streams)))
        self.single = self.manifest.single(split)
        rows = self.manifest.num_rows(split)
        self._damaged = _Budget(self.manifest, _at_most("damaged", damaged, rows // 2))
        self._reader = _Heard(self.manifest, split, lenient=damaged > 0)
        row_bytes = sum(shard.bytes for shard in self.manifest.shards(split)) / rows
        self._order = Order.of(rows=rows, row_bytes=row_bytes, streams=streams, seed=seed)

    def __iter__(self) -> Iterator[list[Batch]]:
        """From `step` on: for each optimiser step this rank's `accumulate` micro batches. `step` counts what was handed out."""
        step, rows = _at_least_zero("step", self.step), self.batch_size // self.streams
        source = parts(_Shares(self._reader, self._order, self._mine, rows, step), self.workers)
        while True:
            share = join([next(source) for _ in range(self.workers)]) if self.workers else next(source)
            self.admit(share.damaged)
            batches = self._micro_batches(share, self.step)
            self.step += 1
            yield batches

    @property
    def damaged(self) -> tuple[Problem, ...]:
        """The rows so far that could not be read, each once, in the order in which their turns came."""
        return tuple(self._damaged.found.values())

    @property
    def arrived(self) -> int:
        """Grows with each answer of the source to this rank, its workers included: a batch may take many, slow and yet no hang."""
        return int(self._reader.arrived)

    def admit(self, problems: Sequence[Problem]) -> None:
        """Count damaged rows: this rank's own, or those of other ranks, so that all share one budget.

        Raises ValueError, naming the first, where there are more than `damaged` allows.
        """
        self._damaged.admit(problems)

    def state_dict(self) -> dict[str, Any]:
        """The position, what it is a position in, and the damaged rows met on the way."""
        return {"step": self.step, **self._identity, "damaged": [list(problem) for problem in self.damaged]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another stream of the same run stood. Raises ValueError, saying which, where this is another stream."""
        for name, value in self._identity.items():
            if state.get(name) != value:
                raise ValueError(
                    f"stream: {name} was {state.get(name)!r} when the state was saved and is {value!r} now; "
                    "the same position would hold other rows: resume with what the run began with, or begin a new run"
                )
        self.step = _at_least_zero("step", state["step"])
        self._damaged.found.clear()
        self.admit([Problem(*entries) for entries in state.get("damaged", [])])

    @property
    def _identity(self) -> dict[str, Any]:
        shards, split = self.manifest.fingerprint, self.split
        return {"seed": self.seed, "batch_size": self.batch_size, "streams": self.streams, "split": split, "shards": shards, "order": 1}

    @property
    def _mine(self) -> range:
        """This rank's rows of a step, numbered by (stream, place in the stream)."""
        share = self.batch_size // self.world
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
    """Every row of a split exactly once over the ranks, in equally many batches on each rank.

    Batches follow the order of rows and are dealt out in turn: batch b, the same on any number of ranks, is for rank b mod world, so that
    what is measured on the first rows alone is shared, too. They are always full: rows that observe nothing stand behind the last one (a
    rank may have none but those). `Batch.draw` is the row's number in the split; padding rows go on counting behind the last, each its own.
    Raises ValueError and OSError as `Stream` does. `damaged` is for training rows alone: others stand in for that many of them, as in a
    stream, where every row of a test counts.
    """

    def __init__(
        self,
        folder: Path | str,
        split: str,
        *,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        workers: int = 0,
        damaged: int = 0,
        cache: Path | str | None = None,
    ):
        _check_rank(rank, world)
        _check_positive(batch_size=batch_size)
        self.manifest, self.split = Manifest.load(folder, cache=cache), split
        self.batch_size, self.rank, self.world, self.seed = batch_size, rank, world, seed
        self.single = self.manifest.single(split)
        rows = self.manifest.num_rows(split)
        self._damaged = _Budget(self.manifest, _at_most("damaged", damaged, rows // 2))
        self._reader = Reader(self.manifest, split, lenient=damaged > 0)
        self._batches = -(-rows // batch_size)  # of all ranks
        self.workers = min(_at_least_zero("workers", workers), len(self))

    def __len__(self) -> int:
        """Batches of each rank."""
        return -(-self._batches // self.world)

    def first(self, rows: int) -> "Evaluation":
        """The same, of as few batches as hold the first `rows` rows, each of them as it is here."""
        part = copy.copy(self)
        part._batches = min(self._batches, -(-rows // self.batch_size))
        part.workers = min(self.workers, len(part))
        return part

    def __iter__(self) -> Iterator[Batch]:
        numbers = range(self.rank, self.world * len(self), self.world)
        rows = min(self.manifest.num_rows(self.split), self._batches * self.batch_size)
        mine = _Batches(self._reader, numbers, rows, self.batch_size, self.seed)
        for number, part in zip(numbers, parts(mine, self.workers), strict=True):
            self._damaged.admit(part.damaged)
            draw = number * self.batch_size + np.arange(self.batch_size)
            part = join([part]) if self.workers else part
            yield to_batch(part, draw=draw, seed=self.seed, single=self.single, labelled=bool(self.manifest.classes))


class _Heard(Reader):
    """A reader that counts the answers of the source in memory that its copies in worker processes share."""

    def __init__(self, manifest: Manifest, split: str, *, lenient: bool):
        super().__init__(manifest, split, lenient=lenient)
        self.arrived = torch.zeros((), dtype=torch.int64).share_memory_()

    def _bytes(self, number: int, begin: int, end: int) -> bytes:
        data = super()._bytes(number, begin, end)
        self.arrived += 1  # two processes at once may count as one: that it moves is all that matters
        return data


class _Shares:
    """The work of a stream: for each step the rows of a worker's share of the rank's virtual streams, of which each gives `each` rows."""

    def __init__(self, reader: Reader, order: Order, mine: range, each: int, step: int):
        self.reader, self.order, self.mine, self.step = reader, order, mine, step
        self.each, self.streams, self.fields = each, _streams_of(mine, each), reader.manifest.fields

    def most(self, workers: int) -> int:
        return self.each * -(-len(self.streams) // workers)

    def parts(self, worker: int, workers: int, rooms: Iterator[Mapping[str, Tensor] | None]) -> Iterator[Part]:
        low, high = (number * len(self.streams) // workers for number in (worker, worker + 1))
        sources = [self._raw(stream) for stream in self.streams[low:high]]
        for room in rooms:
            rows, raw = [], []
            for source in sources:
                more, members = next(source)
                rows += more
                raw += members
            yield _decoded(self.reader, rows, raw, self.order.seed, room)

    def _raw(self, stream: int) -> Iterator[tuple[list[int], list]]:
        """What a stream gives to this rank's part of each step: numbers of rows, and their bytes."""
        begin, end = max(self.mine.start, stream * self.each), min(self.mine.stop, (stream + 1) * self.each)
        size, place, rows, raw = end - begin, 0, [], []
        for window in self.order.windows(stream, self.step * self.each):
            within = stream * self.each + np.arange(place, place + len(window)) % self.each
            place, window = place + len(window), window[(begin <= within) & (within < end)]
            rows, raw = rows + window.tolist(), [*raw, *_read(self.reader, window)]
            whole = len(rows) // size * size
            for low in range(0, whole, size):
                yield rows[low : low + size], raw[low : low + size]
            rows, raw = rows[whole:], raw[whole:]


class _Batches:
    """The work of an evaluation: these batches of the first `rows` rows, filled up behind them. Worker w of n makes each n-th from w on."""

    def __init__(self, reader: Reader, numbers: range, rows: int, batch_size: int, seed: int):
        self.reader, self.numbers, self.rows, self.size, self.seed = reader, numbers, rows, batch_size, seed
        self.fields = reader.manifest.fields

    def most(self, workers: int) -> int:
        return self.size

    def parts(self, worker: int, workers: int, rooms: Iterator[Mapping[str, Tensor] | None]) -> Iterator[Part]:
        for number, room in zip(self.numbers[worker::workers], rooms, strict=False):
            rows = np.arange(min(self.rows, number * self.size), min(self.rows, (number + 1) * self.size))
            yield fill(_decoded(self.reader, rows.tolist(), _read(self.reader, rows), self.seed, room), self.size)


def _read(reader: Reader, rows: np.ndarray) -> Sequence[Raw | Problem]:
    return reader.attempt(rows) if reader.lenient else reader.read(rows)


def _decoded(reader: Reader, rows: Sequence[int], raw: Sequence[Raw | Problem], seed: int, room: Mapping[str, Tensor] | None) -> Part:
    return decode_intact(reader, rows, raw, seed, room) if reader.lenient else decode(reader, rows, cast(Sequence[Raw], raw), room)


class _Budget:
    """The damaged rows that were met, each once, and how many there may be."""

    def __init__(self, manifest: Manifest, most: int):
        self.manifest, self.most, self.found = manifest, most, dict[tuple[str, str | None], Problem]()

    def admit(self, problems: Sequence[Problem]) -> None:
        self.found |= {(p.shard, p.row): p for p in problems if (p.shard, p.row) not in self.found}
        if len(self.found) > self.most:
            first = "; ".join(map(str, [*self.found.values()][:NAMED]))
            raise ValueError(
                f"{self.manifest.folder}: expected at most {self.most} damaged rows, got {len(self.found)}: {first}; "
                "see `meme-dist shards check`, then write the shards again or allow more"
            )


def _streams_of(rows: range, each: int) -> range:
    """The streams that these rows of a step come from."""
    return range(rows.start // each, -(-rows.stop // each))


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


def _at_most(name: str, number: int, most: int) -> int:
    if not 0 <= number <= most:
        raise ValueError(f"{name}: expected 0 to {most}, half of the split's rows, got {number}")
    return number


def _check_division(batch_size: int, streams: int, world: int, accumulate: int) -> None:
    if batch_size % (world * accumulate):
        raise ValueError(f"batch_size: expected a multiple of world x accumulate = {world} x {accumulate}, got {batch_size}")
    if streams < 1 or batch_size % streams:
        fitting = [number for number in range(1, batch_size + 1) if batch_size % number == 0]
        raise ValueError(f"streams: expected a divisor of batch_size {batch_size} (one of {fitting}), got {streams}")
