"""The part of AnnData's HDF5 layout that is needed: columns of data frames, and matrices that are read some rows at a time.

Layout: anndata's "on-disk format", versions 0.7 and later; h5py alone reads it.
"""

import importlib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from scipy import sparse

ENTRIES = 1 << 22  # numbers that are read at once where a whole matrix is gone through
GAP = 32  # rows that are read and dropped sooner than a new read is begun
OLD = "write it again with anndata 0.8 or later"


def h5py() -> Any:
    """The module. Raises ValueError where it is not installed."""
    try:
        return importlib.import_module("h5py")
    except ImportError as error:
        raise ValueError("h5py, which reads .h5mu and .h5ad, is not installed: pip install -e '.[h5]' in the project's folder") from error


# ---- data frames ------------------------------------------------------------------------------------------------------------------------


def names(frame: Any, place: str) -> np.ndarray:
    """The names of a frame's rows, as an array of texts. Raises ValueError for another layout."""
    if "_index" not in getattr(frame, "attrs", {}):
        raise ValueError(f"{place}: expected a data frame with an index, got {type(frame).__name__}; {OLD}")
    return _values(frame[frame.attrs["_index"]])[0].astype(str).astype(object)


def index(frame: Any, place: str) -> np.ndarray:
    """`names` that tell rows apart. Raises ValueError for names that occur twice."""
    found = names(frame, place)
    unique, times = np.unique(found, return_counts=True)
    if len(unique) < len(found):
        raise ValueError(f"{place}: expected each name once, got {unique[times > 1][0]!r} {times.max()} times; make names unique")
    return found


def classes(frame: Any, column: str, place: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """A column as class numbers [rows], -1 where it has no value, and the names of the classes.

    Raises ValueError for a column that is not there, for numbers with fractions, and for categories of which two have the same name.
    """
    if column not in frame:
        raise ValueError(f"{place}: no column {column!r}; there are {sorted(set(frame) - {frame.attrs.get('_index'), '__categories'})}")
    node, old = frame[column], frame.get("__categories", {})
    if hasattr(node, "keys") and "codes" in node:
        return node["codes"][:].astype(np.int64), _named(_values(node["categories"])[0], f"{place}: {column!r}")
    if column in old:
        return node[:].astype(np.int64), _named(_values(old[column])[0], f"{place}: {column!r}")
    values, there = _values(node)
    if values.dtype.kind == "f":
        there = there & np.isfinite(values)
        if (values[there] != np.rint(values[there])).any():
            raise ValueError(f"{place}: {column!r} has fractions, expected classes; make it a categorical column")
    found, numbers = np.unique(values[there], return_inverse=True)
    codes = np.full(len(values), -1, dtype=np.int64)
    codes[there] = numbers
    return codes, _named(found, f"{place}: {column!r}")


def _values(node: Any) -> tuple[np.ndarray, np.ndarray]:
    """A column, and where it has values."""
    if hasattr(node, "keys"):
        if "values" not in node:
            raise ValueError(f"{node.name}: unknown kind of column, with {sorted(node)}; {OLD}")
        return _values(node["values"])[0], ~node["mask"][:] if "mask" in node else np.ones(len(node["values"]), dtype=bool)
    values = node.asstr()[:] if h5py().check_string_dtype(node.dtype) else node[:]
    return values, np.ones(len(values), dtype=bool)


def _named(values: np.ndarray, place: str) -> tuple[str, ...]:
    """What the classes are called: a whole number without its ".0", one class in columns of floats and of integers."""
    names = [str(value).removesuffix(".0") if values.dtype.kind == "f" else str(value) for value in values]
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise ValueError(f"{place}: expected categories with names of their own, got {twice[0]!r} for two of them; rename one")
    return tuple(names)


# ---- matrices ---------------------------------------------------------------------------------------------------------------------------

Block = np.ndarray | sparse.csr_matrix


class Matrix(Protocol):
    """Rows by columns; `row_bytes` is what a row takes in memory, about."""

    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def row_bytes(self) -> float: ...
    def read(self, low: int, high: int) -> Block: ...


class Dense(NamedTuple):
    """A dataset of two axes."""

    data: Any

    @property
    def shape(self) -> tuple[int, int]:
        return self.data.shape

    @property
    def row_bytes(self) -> float:
        return self.shape[1] * self.data.dtype.itemsize

    def read(self, low: int, high: int) -> Block:
        """These rows."""
        return self.data[low:high]


class Columns(NamedTuple):
    """A data frame of numbers, as a matrix."""

    frame: Any
    names: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.frame[self.names[0]]), len(self.names)

    @property
    def row_bytes(self) -> float:
        return 8 * len(self.names)

    def read(self, low: int, high: int) -> Block:
        """These rows."""
        return np.column_stack([self.frame[name][low:high] for name in self.names])


class Sparse(NamedTuple):
    """Compressed rows (CSR): where each begins is kept in memory."""

    data: Any
    indices: Any
    start: np.ndarray
    columns: int

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.start) - 1, self.columns

    @property
    def row_bytes(self) -> float:
        return int(self.start[-1]) / max(1, self.shape[0]) * (self.data.dtype.itemsize + self.indices.dtype.itemsize)

    def read(self, low: int, high: int) -> Block:
        """These rows."""
        first, last = int(self.start[low]), int(self.start[high])
        parts = self.data[first:last], self.indices[first:last], self.start[low : high + 1] - first
        return sparse.csr_matrix(parts, shape=(high - low, self.columns))


def matrix(node: Any, scratch: Path) -> Matrix:
    """X, a layer or an array of obsm. Compressed columns (CSC) are first turned into rows, in files in `scratch`.

    Raises ValueError for any other layout.
    """
    if not hasattr(node, "keys"):
        if len(node.shape) != 2:
            raise ValueError(f"{node.name}: expected a matrix, got an array of shape {node.shape}")
        return Dense(node)
    kind = node.attrs.get("encoding-type", node.attrs.get("h5sparse_format", ""))
    if kind == "dataframe":
        return _columns(node)
    if kind.startswith("csr"):
        return Sparse(node["data"], node["indices"], node["indptr"][:].astype(np.int64), _shape(node)[1])
    if kind.startswith("csc"):
        return _by_rows(node, *_shape(node), scratch)
    raise ValueError(f"{node.name}: expected an array, or a sparse matrix by rows or columns, got {kind or 'a group'!r}; {OLD}")


def _columns(frame: Any) -> Columns:
    names = tuple(map(str, frame.attrs["column-order"]))
    if other := [name for name in names if hasattr(frame[name], "keys") or frame[name].dtype.kind not in "biuf"]:
        raise ValueError(f"{frame.name}: expected columns of numbers without gaps, got {other[0]!r} of another kind; leave it out")
    return Columns(frame, names)


def _shape(node: Any) -> tuple[int, int]:
    rows, columns = node.attrs.get("shape", node.attrs.get("h5sparse_shape"))
    return int(rows), int(columns)


def _by_rows(node: Any, rows: int, columns: int, scratch: Path) -> Sparse:
    """A matrix by columns, written anew by rows, as many numbers in memory as `ENTRIES`."""
    first, total = node["indptr"][:], len(node["data"])
    spans = [(low, min(low + ENTRIES, total)) for low in range(0, total, ENTRIES)]
    start = np.zeros(rows + 1, dtype=np.int64)
    for low, high in spans:
        start[1:] += np.bincount(node["indices"][low:high], minlength=rows)
    start = start.cumsum()
    data, indices = _map(scratch / "data", node["data"].dtype, total), _map(scratch / "indices", np.dtype(np.int32), total)
    free = start[:-1].copy()  # of each row, where its next number goes
    for low, high in spans:
        row = node["indices"][low:high]
        order = np.argsort(row, kind="stable")
        row = row[order]
        place = free[row] + np.arange(len(row)) - np.searchsorted(row, row)
        data[place] = node["data"][low:high][order]
        indices[place] = np.searchsorted(first, low + order, side="right") - 1
        free += np.bincount(row, minlength=rows)
    return Sparse(data, indices, start, columns)


def _map(path: Path, dtype: np.dtype, size: int) -> np.memmap:
    """A new file of that many numbers. Its room is taken now: a map that finds the disk full kills by SIGBUS, without a word."""
    shape = max(1, size)
    try:
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, shape * dtype.itemsize)
    except OSError as error:
        message = f"{error.strerror}: expected room for {shape * dtype.itemsize / 1e6:.1f} MB of scratch files in {path.parent}"
        raise OSError(error.errno, f"{message}; name a folder that has it: TMPDIR=FOLDER") from error
    return np.memmap(path, dtype, "r+", shape=shape)


def blocks(x: Matrix) -> Iterator[tuple[int, Block]]:
    """All rows in order, some at a time, each block with the number of its first row."""
    step = max(1, int(8 * ENTRIES / max(1.0, x.row_bytes)))
    return ((low, x.read(low, min(low + step, x.shape[0]))) for low in range(0, x.shape[0], step))


def take(x: Matrix, rows: np.ndarray) -> Block:
    """Some rows, in any order: what lies together is read together."""
    unique, where = np.unique(rows, return_inverse=True)
    runs = np.split(unique, np.flatnonzero(np.diff(unique) > GAP) + 1) if len(unique) else []
    parts: list[Any] = [x.read(int(run[0]), int(run[-1]) + 1)[run - run[0]] for run in runs]
    if not parts:
        return x.read(0, 0)
    joined: Any = np.concatenate(parts) if isinstance(parts[0], np.ndarray) else sparse.vstack(parts, format="csr")
    return joined[where]
