"""Bytes of rows, straight from their offsets in the tars, each byte checked against the index."""

import os
import zlib

import numpy as np

from meme_dist.data.check import first_problem, shard_starts
from meme_dist.data.index import TAR_BLOCK, Manifest, padded

Raw = tuple[memoryview | None, ...]  # one row: the encoded datum of each modality, None where it is absent
ADVICE = "the shard was cut or altered: see `meme-dist shards check {folder}`, then write the shards again"


class Reader:
    """Reads rows of one split by number. Neighbouring rows cost one read of the file; nothing is searched for and nothing unpickled.

    Raises ValueError, naming shard, row and modality, for a shard that is missing, shorter or longer than the index says, for any byte
    that was changed, and for members that the index does not know (even behind the last row).
    """

    def __init__(self, manifest: Manifest, split: str):
        self.manifest, self.split = manifest, split
        self.index = manifest.index(split)
        self._shards = manifest.shards(split)
        self._starts = shard_starts(manifest, split)
        for number in range(len(self._shards)):
            self._check_size(number)

    def read(self, rows: np.ndarray) -> list[Raw]:
        """The rows asked for, in that order, which may be any."""
        order = np.argsort(rows, kind="stable")
        ordered = rows[order]
        shard = np.searchsorted(self._starts, ordered, side="right") - 1
        cuts = np.flatnonzero((np.diff(ordered) != 1) | (np.diff(shard) != 0)) + 1
        raw: list[Raw] = []
        for run in np.split(np.arange(len(rows)), cuts):
            if len(run):
                raw += self._read_run(int(shard[run[0]]), int(ordered[run[0]]), int(ordered[run[-1]]) + 1)
        back = np.empty(len(rows), dtype=np.int64)
        back[order] = np.arange(len(rows))
        return [raw[place] for place in back]

    def place(self, row: int, modality: str | None = None) -> str:
        """Where a row stands, for messages."""
        shard = self._shards[int(np.searchsorted(self._starts, row, side="right")) - 1]
        return f"{shard.file}, row {self.index.key(row)}" + (f", modality {modality}" if modality else "")

    def _read_run(self, number: int, start: int, stop: int) -> list[Raw]:
        """Rows start..stop of one shard, which lie side by side in it."""
        records = self.index.records[start:stop]
        offset, size, crc = records["offset"], records["size"], records["crc"]
        present = size >= 0
        begin = int(offset[0][present[0]].min()) - TAR_BLOCK
        end = int((offset[-1] + padded(size[-1]))[present[-1]].max())
        last = stop == self._starts[number + 1]
        data = self._bytes(number, begin, self._shards[number].bytes if last else end)
        if last and any(data[end - begin :]):
            raise self._damaged(number)
        begins, sizes, crcs = (offset - begin).tolist(), size.tolist(), crc.tolist()
        return [self._row(data, number, *row) for row in zip(begins, sizes, crcs, strict=True)]

    def _row(self, data: memoryview, number: int, begins: list[int], sizes: list[int], crcs: list[int]) -> Raw:
        members: list[memoryview | None] = []
        for begin, size, crc in zip(begins, sizes, crcs, strict=True):
            if size < 0:
                members.append(None)
                continue
            if zlib.crc32(data[begin - TAR_BLOCK : begin + padded(size)]) != crc:
                raise self._damaged(number)
            members.append(data[begin : begin + size])
        return tuple(members)

    def _bytes(self, number: int, begin: int, end: int) -> memoryview:
        self._check_size(number)
        with self.manifest.path(self._shards[number]).open("rb", buffering=0) as file:
            file.seek(begin)
            data = file.read(end - begin)
            while len(data) < end - begin:  # a raw file may give less than was asked for
                more = file.read(end - begin - len(data))
                if not more:
                    raise self._damaged(number)
                data += more
        return memoryview(data)

    def _check_size(self, number: int) -> None:
        shard = self._shards[number]
        try:
            same = os.stat(self.manifest.path(shard)).st_size == shard.bytes
        except OSError:
            same = False
        if not same:
            raise self._damaged(number)

    def _damaged(self, number: int) -> ValueError:
        """The whole shard is looked at before anything is said: the first byte that differs need not tell what happened."""
        problem = first_problem(self.manifest, self.split, self.index, number)
        return ValueError(f"{problem}; {ADVICE.format(folder=self.manifest.folder)}")
