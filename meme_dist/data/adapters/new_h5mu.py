"""A `.h5mu` file of whole matrices, written some cells at a time: MuData reads it, and so does `from_h5`.

Layout: anndata's "on-disk format" 0.2.0 and mudata's 0.1.0; h5py alone writes it. Each modality has all cells, in one order: X, its layers,
and `obs["observed"]`, which tells the cells that were measured from those that were filled in.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from meme_dist.data.adapters import _h5

VERSIONS = {"MuData": "0.1.0", "anndata": "0.1.0", "dict": "0.1.0"}  # of encodings; others have 0.2.0
CHUNK = 1 << 18  # numbers that are compressed together
HEADER = 512  # bytes before the HDF5 data that say which library's file it is


class Cells(NamedTuple):
    """What is known of the cells: names, columns of classes (a number of each, -1 for none, and their names), and who was measured."""

    names: Sequence[str]
    columns: Mapping[str, tuple[np.ndarray, Sequence[str]]]
    observed: Mapping[str, np.ndarray]  # of each modality, [cells]


def create(path: Path, cells: Cells, features: Mapping[str, Sequence[str]], layers: Sequence[str], about: Mapping[str, Any]) -> None:
    """A new file without numbers yet. `about` are JSON values, kept in `uns`. Raises ValueError where two cells have one name."""
    if len(set(cells.names)) < len(cells.names):
        known: set[str] = set()
        twice = next(name for name in cells.names if name in known or known.add(name))
        raise ValueError(f"{path.name}: expected each cell's name once, got {twice!r} twice; fill in the folders one by one")
    with _h5.h5py().File(path, "w", userblock_size=HEADER) as file:
        _mark(file, "MuData")
        file.attrs["axis"], file.attrs["encoder"], file.attrs["encoder-version"] = 0, "meme-dist", "1"
        _frame(file, "obs", cells.names, cells.columns)
        _frame(file, "var", [name for called in features.values() for name in called], {})
        _text(_mark(file.create_group("uns"), "dict"), "meme_dist", json.dumps(about))
        _maps(file, len(cells.names), {name: len(called) for name, called in features.items()})
        file.create_group("mod").attrs["mod-order"] = list(features)
        for name, called in features.items():
            group = _mark(file["mod"].create_group(name), "anndata")
            _frame(group, "obs", cells.names, {})
            _array(group["obs"], "observed", cells.observed[name])
            group["obs"].attrs["column-order"] = ["observed"]
            _frame(group, "var", called, {})
            for part in ("layers", "obsm", "varm", "obsp", "varp", "uns"):
                _mark(group.create_group(part), "dict")
            for place in ("X", *(f"layers/{layer}" for layer in layers)):
                _matrix(group, place, len(cells.names), len(called))
    with path.open("r+b") as raw:
        raw.write(b"MuData (format-version=0.1.0;creator=meme-dist;creator-version=1)")


def put(path: Path, start: int, matrices: Mapping[str, np.ndarray]) -> None:
    """The numbers of some cells, from cell `start` on: {"rna/X": [cells, features], "rna/layers/lower": ...}."""
    with _h5.h5py().File(path, "r+") as file:
        for place, x in matrices.items():
            file[f"mod/{place}"][start : start + len(x)] = x


def _mark(node: Any, kind: str) -> Any:
    node.attrs["encoding-type"], node.attrs["encoding-version"] = kind, VERSIONS.get(kind, "0.2.0")
    return node


def _array(group: Any, name: str, x: np.ndarray) -> None:
    _mark(group.create_dataset(name, data=x), "array")


def _texts(group: Any, name: str, texts: Sequence[str]) -> None:
    _mark(group.create_dataset(name, data=np.array(texts, dtype=object), dtype=_h5.h5py().string_dtype()), "string-array")


def _text(group: Any, name: str, text: str) -> None:
    _mark(group.create_dataset(name, data=text, dtype=_h5.h5py().string_dtype()), "string")


def _frame(group: Any, name: str, index: Sequence[str], columns: Mapping[str, tuple[np.ndarray, Sequence[str]]]) -> None:
    frame = _mark(group.create_group(name), "dataframe")
    frame.attrs["_index"] = "_index"
    frame.attrs.create("column-order", list(columns), dtype=_h5.h5py().string_dtype())
    _texts(frame, "_index", index)
    for column, (codes, classes) in columns.items():
        node = _mark(frame.create_group(column), "categorical")
        node.attrs["ordered"] = False
        _array(node, "codes", codes.astype(np.int32))
        _texts(node, "categories", classes)


def _maps(file: Any, cells: int, widths: Mapping[str, int]) -> None:
    """Which cells and features of the whole each modality has, and where among its own: from 1 on, 0 for none."""
    for part in ("obsm", "varm", "obsmap", "varmap", "obsp", "varp"):
        _mark(file.create_group(part), "dict")
    start, total = 0, sum(widths.values())
    for name, width in widths.items():
        place = np.zeros(total, dtype=np.uint32)
        place[start : start + width] = np.arange(1, width + 1)
        for kind, whole in (("obs", np.arange(1, cells + 1, dtype=np.uint32)), ("var", place)):
            _array(file[f"{kind}map"], name, whole)
            _array(file[f"{kind}m"], name, whole > 0)
        start += width


def _matrix(group: Any, place: str, rows: int, columns: int) -> None:
    """Zeros, which take no room before they are written over. gzip: every reader of HDF5 has it."""
    chunk = (max(1, min(rows, CHUNK // columns)), columns)
    _mark(group.create_dataset(place, (rows, columns), np.float32, chunks=chunk, compression="gzip", compression_opts=1), "array")
