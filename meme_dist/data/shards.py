"""Rows in, tar shards out: a missing modality is a missing member, and an index beside the shards says what each row must hold."""

import errno
import itertools
import json
import mmap
import operator
import os
import reprlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from webdataset.writer import TarWriter

from meme_dist.data import names
from meme_dist.data.check import Problem, Report, check_shards
from meme_dist.data.fields import Field, check_modality_names
from meme_dist.data.files import Shard, file_sha256, sync
from meme_dist.data.index import MANIFEST, TAR_BLOCK, IndexWriter, Manifest, Split, padded, record_type
from meme_dist.data.source import check_local
from meme_dist.ranks import Processes, hidden

__all__ = ["Dataset", "Manifest", "Problem", "Report", "Row", "check_shards", "write_shards", "write_shards_together"]

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room on the disk, in the quota, in one file


class Row(NamedTuple):
    """One datum: uint8 images [C, H, W], float32 vectors, counts, sentences. A modality that is missing has no entry."""

    data: Mapping[str, Tensor | str]
    label: int | None = None
    name: str | None = None  # what it is called where it comes from: a cell's barcode


Part = Callable[[str, range], Iterator[Row]]
"""Some rows of a split, by number: what several processes ask of a data set that they write together."""


@dataclass(frozen=True)
class Dataset:
    """A source of rows, two or more modalities each described by a `Field`.

    `rows(split)` yields the rows of one of the `splits` in their final, already shuffled order, the same every time. `source` holds the
    keywords that made the set (JSON values), and `files()` says where the files are that the rows are read from: folders of shards with
    another source, or from files of another content, are never taken for this one.
    """

    name: str
    fields: Mapping[str, Field]
    rows: Callable[[str], Iterator[Row]]
    classes: tuple[str, ...] = ()
    source: Mapping[str, Any] = field(default_factory=dict)
    splits: tuple[str, ...] = ("train", "test")
    features: Mapping[str, Sequence[str]] = field(default_factory=dict)  # of each modality, what its elements are called: genes
    files: Callable[[], Sequence[Path]] = tuple  # asked for when rows are: a set can be described where its files have gone

    def __post_init__(self) -> None:
        check_modality_names(list(self.fields))
        names.check_features(self.features, self.fields)

    def sealed(self) -> "Dataset":
        """The same set, with the content of its files in its source, by name. Raises what `files` does where they have gone.

        Not their path: a relative one means other files in another folder, and the same files are the same rows wherever they lie. Nor
        size and time, though they would be instant: a file put back with its old time would pass for what it replaced. Hashing the 258 MB
        of MNIST-SVHN took 0.6 to 0.8 s on an EPYC core, at each start of a training.
        """
        files = self.files()
        content = {"sha256": {path.name: file_sha256(path) for path in files}} if files else {}
        return replace(self, source={**self.source, **content}, files=tuple)


def write_shards(dataset: Dataset, folder: Path | str, *, rows_per_shard: int = 1024, splits: Sequence[str] | None = None) -> Manifest:
    """Write a data set as tar shards with manifest and index; only one row and one shard's index are in memory at a time.

    All is written into a hidden folder beside `folder` and renamed at the end: `folder` is complete or not there, also when the disk is
    full or the process dies. A folder that already holds the same set is returned as it is, so that several processes may call this.
    Raises ValueError for an address, for a folder that holds anything else, and for rows that do not fit the fields, naming split, row
    and modality; OSError where the disk is full.
    """
    check_local(folder)
    folder = Path(folder).resolve()  # a link cannot be renamed to
    splits = dataset.splits if splits is None else splits
    wanted = _description(dataset, rows_per_shard, splits)
    if (manifest := _already(folder, wanted)) is not None:
        return manifest
    with _full_disk_told(folder), hidden(folder) as temporary:
        _write(dataset, temporary, wanted["source"], rows_per_shard, splits)
        return _publish(temporary, folder, wanted)


def write_shards_together(
    dataset: Dataset, folder: Path | str, *, part: Part, rows: Mapping[str, int], rows_per_shard: int, processes: Processes
) -> Manifest:
    """`write_shards` on several processes, each whole shards of its own: the same folder, byte by byte, for any number of them. Collective.

    `part(split, rows)` gives a range of the rows that `dataset.rows` gives; `rows` has how many each split holds. Every shard is asked
    for as a range of its own. After each the processes hear of one another, so that where one fails all have stopped before anything
    is cleared away; index and manifest are written by rank 0 at the end. `folder` must be on storage that all of them share.
    """
    manifest = None
    with processes.agreed():
        check_local(folder)
        folder = Path(folder).resolve()
        wanted = _description(dataset, rows_per_shard, list(rows))
        if processes.is_main:
            manifest = _already(folder, wanted)
    if not processes.from_main(int(manifest is not None)):
        with _full_disk_told(folder), hidden(folder, processes) as temporary:
            _write_parts(dataset, temporary, part, rows, rows_per_shard, processes)
            with processes.agreed():
                if processes.is_main:
                    _finish(dataset, temporary, wanted["source"], rows, rows_per_shard)
                    _publish(temporary, folder, wanted)
    with processes.agreed():
        manifest = Manifest.load(folder)
    return manifest


class _Written(NamedTuple):
    """A shard, its rows' records and their names."""

    shard: Shard
    records: np.ndarray
    names: list[str]


def _write_parts(dataset: Dataset, folder: Path, part: Part, rows: Mapping[str, int], rows_per_shard: int, processes: Processes) -> None:
    """This rank's shards, each with a file beside it that holds what rank 0 needs to know of it."""
    for split, number_of_rows in rows.items():
        shares = processes.shares(-(-number_of_rows // rows_per_shard))
        for turn in range(len(shares[0])):
            with processes.agreed():
                for number in shares[processes.rank][turn : turn + 1]:
                    mine = range(number * rows_per_shard, min(number_of_rows, (number + 1) * rows_per_shard))
                    shard, records, called = _write_numbered(dataset, split, folder, number, zip(mine, part(split, mine), strict=True))
                    np.savez(_aside(folder, split, number), records=records, told=np.array(json.dumps([shard, called])))


def _finish(dataset: Dataset, folder: Path, source: Mapping[str, Any], rows: Mapping[str, int], rows_per_shard: int) -> None:
    """Index and manifest, when all shards are there."""
    written = {}
    for split, number_of_rows in rows.items():
        numbers = range(-(-number_of_rows // rows_per_shard))
        written[split] = _split(dataset, split, folder, (_taken(_aside(folder, split, number)) for number in numbers))
    _write_manifest(dataset, folder, source, rows_per_shard, written)


def _aside(folder: Path, split: str, number: int) -> Path:
    return folder / f"{split}-{number:06d}.written.npz"


def _taken(path: Path) -> _Written:
    with np.load(path, allow_pickle=False) as aside:
        (shard, called), records = json.loads(str(aside["told"])), aside["records"]
    path.unlink()
    return _Written(Shard(*shard), records, called)


def _already(folder: Path, wanted: Mapping[str, Any]) -> Manifest | None:
    """The manifest of a folder that holds the same set; None where there is nothing. Raises ValueError for anything else."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder, found a file; choose another name")
    if folder.exists() and any(folder.iterdir()):
        return _existing(folder, wanted)
    if folder.exists() and (folder.samefile(".") or folder.is_mount()):  # what is written takes the place of an empty folder
        raise ValueError(f"{folder}: expected a folder that can be replaced, got the working folder or a mount; name a new one in it")
    return None


@contextmanager
def _full_disk_told(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise OSError(
            error.errno, f"{error.strerror}: {folder} was not written, nothing is left of it; make room or choose another disk"
        ) from error


def _write(dataset: Dataset, folder: Path, source: Mapping[str, Any], rows_per_shard: int, splits: Sequence[str]) -> None:
    _write_manifest(
        dataset, folder, source, rows_per_shard, {split: _write_split(dataset, split, folder, rows_per_shard) for split in splits}
    )


def _write_manifest(dataset: Dataset, folder: Path, source: Mapping[str, Any], rows_per_shard: int, written: Mapping[str, Split]) -> None:
    sealed = names.write_features(folder, dataset.features) if dataset.features else ""
    whole = (folder, dataset.name, dict(dataset.fields), tuple(dataset.classes), source, rows_per_shard, written)
    Manifest(*whole, features_sha256=sealed).save()
    sync(folder / MANIFEST)


def _publish(temporary: Path, folder: Path, wanted: Mapping[str, Any]) -> Manifest:
    """Give the finished folder its name, all at once."""
    try:
        temporary.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return _existing(folder, wanted)  # another process was faster
    sync(folder.parent)
    return Manifest.load(folder)


def _description(dataset: Dataset, rows_per_shard: int, splits: Sequence[str]) -> dict[str, Any]:
    """What decides whether a folder holds this data set, as JSON gives it back."""
    if rows_per_shard < 1:
        raise ValueError(f"rows_per_shard: expected a number above 0, got {rows_per_shard}")
    description = {
        "name": dataset.name,
        "fields": {name: field.to_json() for name, field in dataset.fields.items()},
        "order of fields": list(dataset.fields),
        "classes": list(dataset.classes),
        "source": dict(dataset.sealed().source),
        "rows_per_shard": rows_per_shard,
        "splits": sorted(splits),
    }
    try:
        return json.loads(json.dumps(description, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{dataset.name}: source: expected JSON values (numbers, strings, lists), got {dataset.source!r}: {error}"
        ) from error


def _existing(folder: Path, wanted: Mapping[str, Any]) -> Manifest:
    if not (folder / MANIFEST).is_file():
        some = ", ".join(sorted(path.name for path in folder.iterdir())[:3])
        raise ValueError(f"{folder}: expected an empty or new folder, found {some}; nothing was touched, choose another folder")
    manifest = Manifest.load(folder)
    there = {**manifest.to_json(), "order of fields": list(manifest.fields), "splits": sorted(manifest.splits)}
    there = json.loads(json.dumps({name: there[name] for name in wanted}))
    if differences := list(_differences("", there, wanted)):
        raise ValueError(
            f"{folder}: it holds another data set ({'; '.join(differences[:5])}); nothing was touched, choose another folder or remove it"
        )
    for split in manifest.splits.values():
        for shard in split.shards:
            size = manifest.path(shard).stat().st_size if manifest.path(shard).is_file() else None
            if size != shard.bytes:
                raise ValueError(f"{manifest.path(shard)}: expected {shard.bytes} bytes, got {size}; remove the folder and write it again")
    return manifest


def _differences(place: str, there: Any, wanted: Any) -> Iterator[str]:
    if isinstance(there, dict) and isinstance(wanted, dict):
        for name in [*there, *(name for name in wanted if name not in there)]:
            yield from _differences(f"{place}.{name}".lstrip("."), there.get(name), wanted.get(name))
    elif there != wanted:
        yield f"{place}: {there!r} there, {wanted!r} wanted"


def _write_split(dataset: Dataset, split: str, folder: Path, rows_per_shard: int) -> Split:
    return _split(dataset, split, folder, _numbered(dataset, split, folder, rows_per_shard))


def _numbered(dataset: Dataset, split: str, folder: Path, rows_per_shard: int) -> Iterator[_Written]:
    rows = enumerate(dataset.rows(split))
    for number in itertools.count():
        if (first := next(rows, None)) is None:
            return
        yield _write_numbered(dataset, split, folder, number, itertools.chain([first], itertools.islice(rows, rows_per_shard - 1)))


def _write_numbered(dataset: Dataset, split: str, folder: Path, number: int, rows: Iterator[tuple[int, Row]]) -> _Written:
    """Shard `number` of a split, with its rows' records and names."""
    path, called = folder / f"{split}-{number:06d}.tar", []
    records = _write_shard(dataset, split, path, _listed(rows, called))
    return _Written(Shard(path.name, len(records), path.stat().st_size, file_sha256(path)), records, called)


def _listed(rows: Iterator[tuple[int, Row]], called: list[str]) -> Iterator[tuple[int, Row]]:
    """The same rows, their names noted once they are written: what is no row is found out there."""
    for number, row in rows:
        yield number, row
        called.append(row.name or "")


def _split(dataset: Dataset, split: str, folder: Path, written: Iterable[_Written]) -> Split:
    """The index and the names of shards that come in order, and the manifest's entry."""
    index_file = f"{split}.index.npy"
    shards, single, present = [], False, np.zeros(len(dataset.fields), dtype=np.int64)
    with IndexWriter(folder / index_file, len(dataset.fields)) as index, names.NamesWriter(folder, split) as called:
        for shard, records, some in written:
            called.append(some)
            shards.append(shard)
            observed = records["size"] >= 0
            single, present = single or bool((observed.sum(1) == 1).any()), present + observed.sum(0)
            index.append(records)
    if not shards:
        raise ValueError(f"{dataset.name}: split {split!r} has no rows; leave it out of `splits`")
    sync(folder / index_file)
    counts = dict(zip(dataset.fields, present.tolist(), strict=True))
    sealed = (index_file, file_sha256(folder / index_file))
    return Split(sum(shard.rows for shard in shards), single, counts, *sealed, tuple(shards), *called.sealed())


def _write_shard(dataset: Dataset, split: str, path: Path, rows: Iterator[tuple[int, Row]]) -> np.ndarray:
    """One tar, and the records of its rows. Equal rows make equal bytes: no clock, no user."""
    records = []
    with path.open("wb") as file:
        with TarWriter(file, encoder=False, mtime=0) as tar:  # encoder=False: bytes or an error, webdataset never pickles
            for number, row in rows:
                members = _encode_row(dataset, f"{dataset.name}: split {split!r}, row {number}", row)
                start = tar.tarstream.offset
                key = f"{number:08d}"
                tar.write({"__key__": key, **{f"{name}.{dataset.fields[name].codec}": data for name, data in members.items()}})
                records.append(_record(dataset, key, row.label, members, start))
        file.flush()
        os.fsync(file.fileno())
    return _checksums(path, np.array(records, dtype=record_type(len(dataset.fields))))


def _encode_row(dataset: Dataset, place: str, row: Row) -> dict[str, bytes]:
    if not isinstance(row, Row):
        raise ValueError(f"{place}: expected a Row({{modality: datum}}, label) of meme_dist.data.shards, got {reprlib.repr(row)}")
    if unknown := set(row.data) - set(dataset.fields):
        raise ValueError(f"{place}: unknown modalities {sorted(unknown)}; the fields are {list(dataset.fields)}")
    if not row.data:
        raise ValueError(f"{place}: expected one modality or more, got nothing; leave the row out")
    if "\n" in (row.name or ""):
        raise ValueError(f"{place}: expected a name of one line, got {row.name!r}; rename the row")
    if row.label is not None and not _is_index(row.label, len(dataset.classes)):
        raise ValueError(f"{place}: expected a label from 0 to {len(dataset.classes) - 1} (one of `classes`) or None, got {row.label!r}")
    members = {}
    for name, x in row.data.items():
        try:
            members[name] = dataset.fields[name].encode(x)
        except ValueError as error:
            raise ValueError(f"{place}, modality {name}: {error}") from error
    return members


def _is_index(label: Any, classes: int) -> bool:
    """Is it a whole number, of whatever library, that names a class?"""
    try:
        return 0 <= operator.index(label) < classes
    except TypeError:
        return False


def _record(dataset: Dataset, key: str, label: int | None, members: Mapping[str, bytes], start: int) -> tuple:
    """Where webdataset puts the members of a row that begins at `start`: in the order of their file names, a header before each."""
    offset, size = dict.fromkeys(dataset.fields, -1), dict.fromkeys(dataset.fields, -1)
    for name in sorted(members, key=lambda name: f"{name}.{dataset.fields[name].codec}"):
        offset[name], size[name] = start + TAR_BLOCK, len(members[name])
        start += TAR_BLOCK + padded(size[name])
    return key, -1 if label is None else label, list(offset.values()), list(size.values()), [0] * len(size)


def _checksums(path: Path, records: np.ndarray) -> np.ndarray:
    """Fill in the checksums from the finished file: what counts is what is on the disk."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as tar:
        for row, column in zip(*np.nonzero(records["size"] >= 0), strict=True):
            begin, size = int(records["offset"][row, column]), int(records["size"][row, column])
            header = tar[begin - TAR_BLOCK : begin]
            assert header.startswith(bytes(records["key"][row]) + b".") and int(header[124:135], 8) == size, (
                "the tar is not laid out as computed"
            )
            records["crc"][row, column] = zlib.crc32(tar[begin - TAR_BLOCK : begin + padded(size)])
    return records
