"""Which row stands where in an endless training stream: pure arithmetic, the same for ever on every machine.

Position p of the endless order belongs to virtual stream p mod V and to epoch p div R. So R positions in a row hold every row exactly
once, whatever R and V are, and step t is made of the positions t * B ... (t + 1) * B - 1: the state of a stream is one integer.

Inside an epoch the R rows are cut into blocks of neighbours (one read each), the blocks are permuted, the result is dealt out to the
streams in V contiguous parts, and each stream shuffles its part window by window. Where to resume is computed, never searched for.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

MOST_STREAMS = 64  # more mix better and serve more ranks, and each holds a window in memory
POOL_ROWS = 16_384  # rows that all windows hold together ...
POOL_BYTES = 128 * 2**20  # ... and their bytes
READ_ROWS = 32  # neighbours that are read at once


def default_streams(batch_size: int) -> int:
    """The largest divisor of the batch size up to 64: a function of the batch size alone, so that the order is that of the run."""
    return max(streams for streams in range(1, MOST_STREAMS + 1) if batch_size % streams == 0)


@dataclass(frozen=True)
class Order:
    """The endless order of `rows` rows in `streams` virtual streams."""

    rows: int
    streams: int
    seed: int
    window: int  # rows that a stream shuffles at a time
    block: int  # neighbouring rows that stay together until then

    @classmethod
    def of(cls, *, rows: int, row_bytes: float, streams: int, seed: int) -> "Order":
        """Windows and blocks that fit the data: bounded memory, long reads, and still several blocks to mix in each stream."""
        pool = min(POOL_ROWS, POOL_BYTES / max(row_bytes, 1))
        window = max(1, int(pool / streams))
        block = min(READ_ROWS, max(1, rows // streams // 4), max(1, window // 4))
        return cls(rows, streams, seed, window, block)

    def windows(self, stream: int, start: int) -> Iterator[np.ndarray]:
        """The rows of one stream from its `start`-th on, endless, in windows already shuffled."""
        epoch = (start * self.streams + stream) // self.rows
        while True:
            first, begin, size = self._part(stream, epoch)
            for number, low, high in self._cuts(size):
                if (skip := max(0, start - first - low)) < high - low:
                    rows = self._rows(epoch, begin + low, begin + high)
                    yield rows[permutation(high - low, self.seed, "window", epoch, stream, number)][skip:]
            epoch += 1

    def _part(self, stream: int, epoch: int) -> tuple[int, int, int]:
        """A stream's share of an epoch: its first place in the stream, where it begins in the epoch's block order, its size."""
        every = np.arange(self.streams)
        first = -((every - epoch * self.rows) // self.streams)  # the first i with i * V + stream >= epoch * R
        sizes = -((every - (epoch + 1) * self.rows) // self.streams) - first
        return int(first[stream]), int(sizes[:stream].sum()), int(sizes[stream])

    def _cuts(self, size: int) -> Iterator[tuple[int, int, int]]:
        """Windows of nearly equal size: number, begin, end."""
        count = -(-size // self.window)
        for number in range(count):
            yield number, number * size // count, (number + 1) * size // count

    def _rows(self, epoch: int, low: int, high: int) -> np.ndarray:
        """Rows low..high of an epoch's block order."""
        blocks, ends = _block_order(self, epoch)
        first, last = np.searchsorted(ends, [low, high - 1], side="right")
        pieces = [np.arange(*self._bounds(block)) for block in blocks[first : last + 1].tolist()]
        skip = low - (int(ends[first]) - len(pieces[0]))
        return np.concatenate(pieces)[skip : skip + high - low]

    @property
    def _blocks(self) -> int:
        return -(-self.rows // self.block)

    def _bounds(self, block: int | np.ndarray) -> tuple:
        return block * self.rows // self._blocks, (block + 1) * self.rows // self._blocks


@lru_cache(maxsize=4)
def _block_order(order: Order, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The permuted blocks of an epoch, and where each ends in their concatenation; shared by all streams of a process."""
    blocks = permutation(order._blocks, order.seed, "blocks", epoch)
    low, high = order._bounds(blocks)
    return blocks, np.cumsum(high - low)


def permutation(size: int, *key: int | str) -> np.ndarray:
    """A permutation of 0 .. size - 1 that depends on the key alone: sorted by splitmix64 (Steele et al. 2014) of a counter.

    Spelt out, because neither `random` nor numpy promises the same shuffle in its next version, and runs are resumed under those.
    """
    start = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little")
    x = np.uint64(start) + np.arange(1, size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(x ^ (x >> np.uint64(31)), kind="stable")
