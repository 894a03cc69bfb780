"""MuData and AnnData (`.h5mu`, `.h5ad`): each modality of a MuData, or each AnnData file, is a modality; cells are matched by name.

A cell that is in the `obs` of one modality and not in that of another lacks the other. Nothing is guessed from zeros: a cell whose counts
are all zero is there, and is written. Matrices are read some rows at a time, so a file may be larger than the memory.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import sparse

from meme_dist.data.adapters import _h5
from meme_dist.data.adapters._common import COUNT_LIKELIHOODS, Values, check_split, generator, held_out, modality_names
from meme_dist.data.fields import Field, Likelihood
from meme_dist.data.files import file_sha256
from meme_dist.data.shards import Dataset, Row

BLOCK = 64  # cells that lie together are read together
WINDOW = 1 << 27  # bytes of matrices among whose rows the order is random; three times as much is in memory


def from_h5(
    *files: Path | str,
    layers: Mapping[str, str] | str = "X",
    label: str | None = None,
    features: str | None = None,
    obsm: Sequence[str] = (),
    likelihoods: Mapping[str, Likelihood] | None = None,
    test_share: float = 0.2,
    name: str = "mudata",
    seed: int = 0,
) -> Dataset:
    """The cells of one or more files that hold two modalities or more together, a share of them to test on, in random order.

    A `.h5mu` gives all its modalities, a `.h5ad` one of the file's name; with `features`, a column of `var`, one for each of its values
    (in 10x files: feature_types), and one for each array of `obsm` that is named. `layers` names the layer to read instead of X, for all
    modalities or by modality. Whole numbers become counts (negative_binomial), others vectors (normal), unless `likelihoods` says
    otherwise. `label` is the column of `obs` with the classes, of the MuData or of any modality, where a cell has it first.

    Modalities are named by `modality_names`; rows and features keep their names in `obs` and `var`. The order is random among blocks of 64
    neighbours, as many as `WINDOW` holds, and over all such windows, so that the file is read once. Raises ValueError for other layouts,
    unknown layers or columns, names of cells that occur twice, and NaN or infinity, naming the cell.
    """
    paths = [Path(file) for file in files]
    parts = _named(_parts(paths, features, obsm), layers)
    cells, parts = _matched(parts)
    codes, classes = _labels(paths, parts, cells, label)
    fields = {part.name: _field(part, (likelihoods or {}).get(part.name)) for part in parts}
    if unknown := set(likelihoods or {}) - set(fields):
        raise ValueError(f"likelihoods: unknown modalities {sorted(unknown)}; there are {list(fields)}")
    features_of = {part.name: _feature_names(part, fields[part.name].shape[0]) for part in parts}
    numbers = held_out(len(cells), test_share, seed)

    def rows(split: str) -> Iterator[Row]:
        check_split(split)
        return _rows(parts, fields, numbers[split], codes, cells, generator(seed, f"adapters/{split}/order"))

    keywords = {
        "sha256": [file_sha256(path) for path in paths],
        "layers": [part.place for part in parts],
        "label": label,
        "test_share": test_share,
        "seed": seed,
    }
    return Dataset(name, fields, rows, classes, keywords, features=features_of)


class _Part(NamedTuple):
    """Where one modality is kept."""

    name: str
    path: Path
    group: str  # of the AnnData in the file
    place: str  # of the matrix in the group
    columns: np.ndarray | None  # None: all
    position: np.ndarray  # of each cell among the rows of the matrix, -1 where it is none of them


# ---- what there is ----------------------------------------------------------------------------------------------------------------------


def _parts(paths: Sequence[Path], features: str | None, obsm: Sequence[str]) -> list[_Part]:
    none = np.empty(0, dtype=np.int64)
    found = []
    for path in paths:
        with _opened(path) as file:
            if "mod" in file:
                if (axis := int(file.attrs.get("axis", 0))) != 0:
                    raise ValueError(f"{path}: expected modalities that share cells (axis 0), got axis {axis}")
                if features is not None or obsm:
                    raise ValueError(
                        f"{path}: expected a .h5ad file for features or obsm, got a .h5mu, which has its modalities; leave them out"
                    )
                order = file["mod"].attrs.get("mod-order", list(file["mod"]))
                found += [_Part(str(key), path, f"mod/{key}", "X", None, none) for key in order]
                continue
            found += [_Part(key, path, "/", "X", columns, none) for key, columns in _of_features(path, file, features)]
            found += [_Part(key, path, "/", f"obsm/{key}", None, none) for key in obsm]
    if len(found) < 2:
        raise ValueError(
            f"{', '.join(map(str, paths)) or 'no file'}: expected two modalities or more, got {[part.name for part in found]}; give the "
            "files of the others too, or name the column of var that tells features apart (features), or arrays (obsm)"
        )
    return found


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The file. Raises ValueError where it is no HDF5 file."""
    if not path.is_file():
        raise ValueError(f"{path}: expected a .h5mu or .h5ad file, found none")
    try:
        file = _h5.h5py().File(path, "r")
    except OSError as error:
        raise ValueError(f"{path}: expected a .h5mu or .h5ad file, which is HDF5 ({error})") from error
    with file:
        yield file


def _of_features(path: Path, file: Any, features: str | None) -> list[tuple[str, np.ndarray | None]]:
    if features is None:
        return [(path.name.split(".")[0], None)]
    codes, kinds = _h5.classes(file["var"], features, f"{path}: var")
    return [(kind, np.flatnonzero(codes == number)) for number, kind in enumerate(kinds) if (codes == number).any()]


def _named(parts: Sequence[_Part], layers: Mapping[str, str] | str) -> list[_Part]:
    """With the layers that are asked for, and names that shards can have."""
    if len({part.name for part in parts}) < len(parts):
        raise ValueError(f"modalities: expected each name once, got {[part.name for part in parts]}; rename the files")
    names = modality_names(part.name for part in parts)
    wanted = dict.fromkeys(names.values(), layers) if isinstance(layers, str) else dict(layers)
    if unknown := set(wanted) - set(names.values()):
        raise ValueError(f"layers: unknown modalities {sorted(unknown)}; there are {list(names.values())}")
    return [_layered(part._replace(name=names[part.name]), wanted.get(names[part.name], "X")) for part in parts]


def _layered(part: _Part, layer: str) -> _Part:
    if layer == "X" or part.place != "X":
        return part
    with _opened(part.path) as file:
        there = list(file[part.group].get("layers", {}))
    if layer not in there:
        raise ValueError(f"{part.name}: no layer {layer!r}; there are {['X', *there]}; name layers by modality")
    return part._replace(place=f"layers/{layer}")


def _matched(parts: Sequence[_Part]) -> tuple[np.ndarray, list[_Part]]:
    """The names of all cells, in the order in which modalities have them first, and where each is in each modality."""
    names = {}
    for part in parts:
        if (part.path, part.group) not in names:
            with _opened(part.path) as file:
                names[part.path, part.group] = _h5.index(file[part.group]["obs"], f"{part.name}: obs")
    number = {name: place for place, name in enumerate(dict.fromkeys(name for some in names.values() for name in some))}
    matched = []
    for part in parts:
        own = names[part.path, part.group]
        position = np.full(len(number), -1, dtype=np.int64)
        position[[number[name] for name in own]] = np.arange(len(own))
        matched.append(part._replace(position=position))
    return np.array(list(number), dtype=object), matched


def _labels(paths: Sequence[Path], parts: Sequence[_Part], cells: np.ndarray, label: str | None) -> tuple[np.ndarray, tuple[str, ...]]:
    """The class of each cell, -1 without one: from every `obs` that has the column, the first that has a value for a cell."""
    codes, known = np.full(len(cells), -1, dtype=np.int64), {}
    if label is None:
        return codes, ()
    place, found, columns = {name: number for number, name in enumerate(cells)}, False, set()
    for path, group in dict.fromkeys([(path, "/") for path in paths] + [(part.path, part.group) for part in parts]):
        with _opened(path) as file:
            frame = file[group].get("obs")
            columns |= set(frame or ()) - {"_index", "__categories"}
            if frame is None or label not in frame:
                continue
            own, classes = _h5.classes(frame, label, f"{path}: {group} obs")
            at = np.array([place.get(name, -1) for name in _h5.index(frame, f"{path}: {group} obs")])
        numbers = np.array([known.setdefault(name, len(known)) for name in classes] + [-1])  # -1, of no value, points to the last
        new = (at >= 0) & (own >= 0)
        new[new] = codes[at[new]] < 0
        codes[at[new]], found = numbers[own[new]], True
    if not found:
        raise ValueError(f"label: no column {label!r} in any obs; there are {sorted(columns)}")
    return codes, tuple(known)


def _field(part: _Part, wanted: Likelihood | None) -> Field:
    """Kind by the values, all of which are read. Raises ValueError for NaN, naming the cell."""
    values = Values()
    with ExitStack() as stack:
        x = _matrix(part, stack)
        if x.shape[0] != (part.position >= 0).sum():
            raise ValueError(f"{part.name}: expected a matrix of {(part.position >= 0).sum()} rows, as obs has, got {x.shape[0]}")
        for low, block in _h5.blocks(x):
            block = block if part.columns is None else block[:, part.columns]
            numbers = block.data if isinstance(block, sparse.csr_matrix) else block
            if not np.isfinite(numbers).all():
                raise ValueError(_not_finite(part, low, block))
            values.add(numbers)
        width = x.shape[1] if part.columns is None else len(part.columns)
    likelihood = wanted or ("negative_binomial" if values.counts else "normal")
    if likelihood in COUNT_LIKELIHOODS and not values.counts:
        raise ValueError(f"{part.name}: expected counts, got numbers from {values.lowest:g} to {values.highest:g}, or fractions")
    return Field("counts" if likelihood in COUNT_LIKELIHOODS else "vector", (width,), "npy", likelihood)


def _feature_names(part: _Part, width: int) -> list[str]:
    """From var, or the columns of a frame in obsm; those of a bare array are numbered."""
    with _opened(part.path) as file:
        group = file[part.group]
        if not part.place.startswith("obsm/"):
            names = _h5.names(group.get("var"), f"{part.name}: var")
            return (names if part.columns is None else names[part.columns]).tolist()
        columns = group[part.place].attrs.get("column-order")
        key = part.place.partition("/")[2]
        return [f"{key}_{number}" for number in range(width)] if columns is None else list(map(str, columns))


def _not_finite(part: _Part, low: int, block: Any) -> str:
    dense = block.toarray() if isinstance(block, sparse.csr_matrix) else block
    row = low + int(np.flatnonzero(~np.isfinite(dense).all(1))[0])
    with _opened(part.path) as file:
        cell = _h5.index(file[part.group]["obs"], f"{part.name}: obs")[row]
    return (
        f"{part.name}, cell {cell!r} (row {row}): expected finite numbers, got NaN or infinity; leave the cell out of this modality's obs"
    )


# ---- rows -------------------------------------------------------------------------------------------------------------------------------


def _rows(
    parts: Sequence[_Part], fields: Mapping[str, Field], mine: np.ndarray, codes: np.ndarray, cells: np.ndarray, rng: np.random.Generator
) -> Iterator[Row]:
    with ExitStack() as stack:
        matrices = {part.name: _matrix(part, stack) for part in parts}
        size = max(BLOCK, int(WINDOW / max(1.0, sum(x.row_bytes for x in matrices.values()))))
        for window in _windows(mine, size, rng):
            yield from _of_window(parts, matrices, fields, window, codes, cells)  # whose matrices are let go before the next are read


def _of_window(
    parts: Sequence[_Part],
    matrices: Mapping[str, _h5.Matrix],
    fields: Mapping[str, Field],
    window: np.ndarray,
    codes: np.ndarray,
    cells: np.ndarray,
) -> Iterator[Row]:
    held = {part.name: _held(matrices[part.name], part, window) for part in parts}
    for number, cell in enumerate(window):
        there = {name: (block, int(where[number])) for name, (block, where) in held.items() if where[number] >= 0}
        data = {name: _datum(block, row, fields[name]) for name, (block, row) in there.items()}
        yield Row(data, int(codes[cell]) if codes[cell] >= 0 else None, str(cells[cell]))


def _windows(mine: np.ndarray, size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """All of `mine` once: blocks of neighbours in random order, and the rows of as many blocks as `size` allows in random order."""
    blocks = np.array_split(mine, range(BLOCK, len(mine), BLOCK))
    order, together = rng.permutation(len(blocks)), max(1, size // BLOCK)
    for low in range(0, len(order), together):
        yield rng.permutation(np.concatenate([blocks[number] for number in order[low : low + together]]))


def _held(x: _h5.Matrix, part: _Part, window: np.ndarray) -> tuple[_h5.Block, np.ndarray]:
    """The rows that are there of a window's, and for each of the window where it is among them, or -1."""
    position = part.position[window]
    there = position >= 0
    block = _h5.take(x, position[there])
    return block if part.columns is None else block[:, part.columns], np.where(there, there.cumsum() - 1, -1)


def _datum(block: Any, row: int, field: Field) -> torch.Tensor:
    dense = block[row].toarray()[0] if isinstance(block, sparse.csr_matrix) else block[row]
    return torch.from_numpy(dense.astype(np.int32 if field.kind == "counts" else np.float32))


def _matrix(part: _Part, stack: ExitStack) -> _h5.Matrix:
    """The matrix of a part, until `stack` closes."""
    file = stack.enter_context(_opened(part.path))
    scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="meme-dist-"))
    group = file[part.group]
    if part.place not in group:
        raise ValueError(f"{part.path}: {part.group}: no {part.place}; there are {sorted(group)}")
    return _h5.matrix(group[part.place], Path(scratch))
