"""Bytes of rows, straight from their offsets in the tars, each byte checked against the index."""

import zlib
from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import numpy as np

from meme_dist.data.check import Problem, first_problem, shard_starts
from meme_dist.data.index import TAR_BLOCK, Manifest, padded

SMALL = 4096  # bytes of a member with its header
Raw = tuple[bytes | memoryview | None, ...]  # one row: the encoded datum of each modality, None where it is absent
ADVICE = "the shard was cut or altered: see `meme-dist shards check {folder}`, then write the shards again"


class Broken(Exception):
    """Bytes that are not what the index says; what is wrong, and with which modality where that is known."""

    def __init__(self, cause: str, column: int | None = None):
        super().__init__(cause)
        self.cause, self.column = cause, column


class Reader:
    """Reads rows of one split by number. Neighbouring rows cost one read of the file; nothing is searched for and nothing unpickled.

    Raises ValueError, naming shard, row and modality, for a shard that is missing, shorter or longer than the index says, for any byte
    that was changed, and for members that the index does not know (even behind the last row); OSError for a source that cannot be reached.
    """

    def __init__(self, manifest: Manifest, split: str, *, lenient: bool = False):
        self.manifest, self.split, self.lenient = manifest, split, lenient
        self.index = manifest.index(split)
        self.rows = manifest.num_rows(split)
        self._shards = manifest.shards(split)
        self._starts = shard_starts(manifest, split)
        for number, shard in enumerate(self._shards):
            if not lenient and manifest.is_local(shard):
                try:
                    self._check_size(number)
                except Broken:
                    raise self._damaged(number) from None

    def read(self, rows: np.ndarray) -> list[Raw]:
        """The rows asked for, in that order, which may be any."""
        return cast(list[Raw], self._read(rows, lenient=False))  # no problem comes back: each is raised

    def attempt(self, rows: np.ndarray) -> list[Raw | Problem]:
        """`read`, with what is wrong with it in the place of a damaged row. Only the row's own bytes count, not its shard's size."""
        return self._read(rows, lenient=True)

    def _read(self, rows: np.ndarray, *, lenient: bool) -> list[Raw | Problem]:
        order = np.argsort(rows, kind="stable")
        ordered = rows[order]
        shard = np.searchsorted(self._starts, ordered, side="right") - 1
        cuts = np.flatnonzero((np.diff(ordered) != 1) | (np.diff(shard) != 0)) + 1
        members = _Members(self.index.take(ordered))
        found: list[Raw | Problem] = []
        for low, high in pairwise([0, *cuts.tolist(), len(rows)]):
            if low < high:
                found += self._read_run(int(shard[low]), int(ordered[low]), members, low, high, lenient)
        back = np.empty(len(rows), dtype=np.int64)
        back[order] = np.arange(len(rows))
        return [found[place] for place in back.tolist()]

    def place(self, row: int, modality: str | None = None) -> str:
        """Where a row stands, for messages."""
        return f"{self._shard_of(row)}, row {self.index.key(row)}" + (f", modality {modality}" if modality else "")

    def problem(self, row: int, modality: str | None, cause: str) -> Problem:
        """What is wrong with a row, in one value."""
        return Problem(self._shard_of(row), self.index.key(row), modality, cause)

    def _shard_of(self, row: int) -> str:
        return self._shards[int(np.searchsorted(self._starts, row, side="right")) - 1].file

    def _read_run(
        self, number: int, row: int, members: "_Members", low: int, high: int, lenient: bool
    ) -> Sequence[Raw] | Sequence[Raw | Problem]:
        """Rows low..high of `members`, which lie side by side in one shard; the first is row `row` of the split."""
        try:
            return self._run(number, row, members, low, high)
        except Broken:
            if self.manifest.forget(self._shards[number]):  # a copy that went bad here, perhaps: once more, from the source
                return self._read_run(number, row, members, low, high, lenient)
            if not lenient:
                raise self._damaged(number) from None
        return [self._read_alone(number, row + place, members, low + place) for place in range(high - low)]

    def _read_alone(self, number: int, row: int, members: "_Members", low: int) -> Raw | Problem:
        """One row of a shard that is damaged somewhere."""
        try:
            return self._run(number, row, members, low, low + 1, alone=True)[0]
        except Broken as broken:
            name = None if broken.column is None else list(self.manifest.fields)[broken.column]
            return self.problem(row, name, broken.cause)

    def _run(self, number: int, row: int, members: "_Members", low: int, high: int, *, alone: bool = False) -> list[Raw]:
        """One read, and a look at each byte of it; `alone`: whatever is wrong with the rest of the shard."""
        begin, end = members.bounds(low, high)
        last = row + high - low == self._starts[number + 1] and not alone
        if not alone:
            self._check_size(number)
        data = self._bytes(number, begin, self._shards[number].bytes if last else end)
        if last and any(data[end - begin :]):
            raise Broken("expected nothing behind the last row, got bytes that are not zero")
        return members.cut(data, begin, low, high)

    def _bytes(self, number: int, begin: int, end: int) -> bytes:
        try:
            data = self.manifest.read(self._shards[number], begin, end)
        except FileNotFoundError:
            raise Broken("the shard is missing") from None
        if len(data) < end - begin:
            raise Broken(f"expected {end - begin} bytes from byte {begin} on, got {len(data)}: the shard ends there")
        return data

    def _check_size(self, number: int) -> None:
        shard = self._shards[number]
        try:
            size = self.manifest.size(shard)
        except FileNotFoundError:
            raise Broken("the shard is missing") from None
        if size != shard.bytes:
            raise Broken(f"expected a shard of {shard.bytes} bytes, got {size}")

    def _damaged(self, number: int) -> ValueError:
        """The whole shard is looked at before anything is said: the first byte that differs need not tell what happened."""
        problem = first_problem(self.manifest, self.split, self.index, number)
        return ValueError(f"{problem}; {ADVICE.format(folder=self.manifest.folder)}")


class _Members:
    """Where the members of some rows stand in their shards, and their checksums: plain lists, row by row, since Python loops over them.

    These loops are most of what reading costs.
    """

    def __init__(self, records: np.ndarray):
        self._present = records["size"] >= 0
        offset, size = records["offset"][self._present], records["size"][self._present]
        self._begins, self._ends, self._stops = offset.tolist(), (offset + size).tolist(), (offset + padded(size)).tolist()
        self._crcs = records["crc"][self._present].tolist()
        self._first = [0, *np.cumsum(self._present.sum(1)).tolist()]  # of each row, and where the last one ends
        self._complete = bool(self._present.all())

    def bounds(self, low: int, high: int) -> tuple[int, int]:
        """The bytes that rows low..high take in their shard, headers included."""
        first, last = slice(*self._first[low : low + 2]), slice(*self._first[high - 1 : high + 1])
        return min(self._begins[first]) - TAR_BLOCK, max(self._stops[last])

    def cut(self, data: bytes, start: int, low: int, high: int) -> list[Raw]:
        """Rows low..high out of their bytes, which begin at `start`, each member checked."""
        span = slice(self._first[low], self._first[high])
        begins, ends, stops, crcs = self._begins[span], self._ends[span], self._stops[span], self._crcs[span]
        checksum, view, header = zlib.crc32, memoryview(data), start + TAR_BLOCK
        for number, (begin, stop, expected) in enumerate(zip(begins, stops, crcs, strict=True)):
            if (found := checksum(view[begin - header : stop - start])) != expected:
                column = int(np.nonzero(self._present[low:high])[1][number])
                raise Broken(f"expected bytes with checksum {expected:08x}, got checksum {found:08x}", column)
        # Small members are bytes of their own: the garbage collector would walk over as many views again and again.
        source = data if len(data) < SMALL * len(begins) else view
        payloads = iter([source[begin - start : end - start] for begin, end in zip(begins, ends, strict=True)])
        if self._complete:
            return list(zip(*[payloads] * self._present.shape[1], strict=True))
        return [tuple([next(payloads) if there else None for there in row]) for row in self._present[low:high].tolist()]
