"""The IDX format of the MNIST files, plain or gzipped: two zero bytes, a type, a rank, big-endian sizes, then the elements."""

import gzip
import zlib
from pathlib import Path

import numpy as np

UNSIGNED_BYTE = 8  # the type of all MNIST files
_GZIP = b"\x1f\x8b"


def read_idx(path: Path, *, rank: int) -> np.ndarray:
    """An array of unsigned bytes with `rank` axes.

    Raises ValueError, naming the file, where it is cut, altered, of another type or rank, or longer or shorter than its header says.
    """
    data = _content(path)
    if len(data) < 4 + 4 * rank or data[:3] != bytes([0, 0, UNSIGNED_BYTE]) or data[3] != rank:
        raise ValueError(f"{path}: expected an IDX file of unsigned bytes with {rank} axes, got one that starts with {data[:4].hex()}")
    shape = tuple(int(size) for size in np.frombuffer(data, dtype=">u4", count=rank, offset=4))
    elements = np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * rank)
    if len(elements) != np.prod(shape):
        raise ValueError(f"{path}: its header says {shape}, {np.prod(shape)} bytes, but {len(elements)} follow; get the file again")
    return elements.reshape(shape).copy()  # writable: torch warns of anything else


def _content(path: Path) -> bytes:
    data = path.read_bytes()
    if not data.startswith(_GZIP):
        return data
    try:
        return gzip.decompress(data)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: the gzip file is cut or altered ({error}); get the file again") from error
