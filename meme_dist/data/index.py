"""What a folder of shards must hold: a manifest for the set, and for each split an index with one record a row.

Several folders that agree in fields and classes are one set: the rows of folder after folder.

The index makes absence a fact: a member that it lists and the tar lacks is damage, a member that it does not list was never there.
Both files are plain (JSON and an array without pickle) and sealed: the manifest knows its own checksum and that of each index.
"""

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from meme_dist.data.cache import Cache
from meme_dist.data.fields import Field, check_modality_names
from meme_dist.data.files import Shard, file_sha256
from meme_dist.data.source import Local, Remote, absolute, folders, source_of

FORMAT = 1
MANIFEST = "manifest.json"
TAR_BLOCK = 512  # a header is one block, a payload is filled up to whole blocks
REPAIR = "write the shards again"


@dataclass(frozen=True)
class Split:
    """One part of the data set ("train", "test", perhaps "validation"): its shards in order, and what is in them."""

    rows: int
    single: bool  # does any row hold one modality only?
    present: Mapping[str, int]  # rows in which each modality is there
    index_file: str
    index_sha256: str
    shards: tuple[Shard, ...]
    names_file: str = ""  # see `meme_dist.data.names`; none where rows have no names
    names_sha256: str = ""


def record_type(modalities: int) -> np.dtype:
    """One record a row. Columns follow the manifest's fields; `offset` is where a payload starts, `size` is -1 where it is absent.

    `crc` covers the header, the payload and its filling: any changed byte of a member changes it.
    """
    columns = (modalities,)
    return np.dtype([("key", "S16"), ("label", "<i8"), ("offset", "<i8", columns), ("size", "<i8", columns), ("crc", "<u4", columns)])


def padded(size: int | np.ndarray) -> Any:
    """Bytes that a payload takes in a tar."""
    return -(-size // TAR_BLOCK) * TAR_BLOCK


class IndexWriter:
    """Appends records to a `.npy` file, so that an index of any length needs no memory."""

    def __init__(self, path: Path, modalities: int):
        self._file = path.open("wb")
        self._type = record_type(modalities)
        self._rows = 0
        self._write_header()

    def append(self, records: np.ndarray) -> None:
        self._file.write(records.astype(self._type).tobytes())
        self._rows += len(records)

    def __enter__(self) -> "IndexWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            start = self._file.tell()
            self._file.seek(0)
            self._write_header()  # numpy leaves room for the number to grow
            assert self._rows == 0 or self._file.tell() < start
        self._file.close()

    def _write_header(self) -> None:
        shape = {"descr": np.lib.format.dtype_to_descr(self._type), "fortran_order": False, "shape": (self._rows,)}
        np.lib.format.write_array_header_2_0(self._file, shape)


class Index:
    """The records of one split, mapped from the disk rather than read, one file for each folder; it travels to workers as paths."""

    def __init__(self, files: Sequence[tuple[Path, int]], modalities: int):
        self._files, self._modalities = tuple(files), modalities
        self._starts = np.cumsum([0, *(rows for _, rows in self._files)])

    @cached_property
    def maps(self) -> list[np.ndarray]:
        """The records file by file."""
        return [_mapped(path, rows, self._modalities) for path, rows in self._files]

    @property
    def records(self) -> np.ndarray:
        """All records: a map of one file, a copy in memory of several."""
        return self.maps[0] if len(self.maps) == 1 else np.concatenate(self.maps)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The records of some rows, which are in ascending order."""
        if len(self.maps) == 1:
            return self.maps[0][rows]
        cuts = np.searchsorted(rows, self._starts)
        return np.concatenate(
            [
                records[rows[low:high] - self._starts[n]]
                for n, (records, (low, high)) in enumerate(zip(self.maps, pairwise(cuts), strict=True))
            ]
        )

    def span(self, start: int, stop: int) -> np.ndarray:
        """The records of rows start..stop, which one folder holds."""
        number = int(np.searchsorted(self._starts, start, side="right")) - 1
        return self.maps[number][start - self._starts[number] : stop - self._starts[number]]

    @property
    def observed(self) -> np.ndarray:
        """Which modality each row holds, [rows, N]."""
        return np.concatenate([records["size"] >= 0 for records in self.maps])

    @cached_property
    def label(self) -> np.ndarray:
        """Class of each row, -1 where it has none, [rows]."""
        return self.maps[0]["label"] if len(self.maps) == 1 else np.concatenate([records["label"] for records in self.maps])

    def key(self, row: int) -> str:
        return self.span(row, row + 1)["key"][0].decode()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("maps", "label")}


def _mapped(path: Path, rows: int, modalities: int) -> np.ndarray:
    records = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))  # a plain array over the map is much faster to cut
    if records.dtype != record_type(modalities) or records.shape != (rows,):
        raise ValueError(f"{path}: expected {rows} records of {modalities} modalities, got {records.shape} of {records.dtype}")
    return records


@dataclass(frozen=True)
class Manifest:
    """A folder of shards, as `manifest.json` describes it; or several, which `parts` names in order, as if they were one.

    `folder` is what `load` was given: a path, an address, or a brace pattern of either. Loading it again gives the same set.
    """

    folder: Path | str
    name: str
    fields: Mapping[str, Field]
    classes: tuple[str, ...]
    source: Mapping[str, Any]
    rows_per_shard: int
    splits: Mapping[str, Split]
    parts: tuple["Manifest", ...] = ()
    cache: Cache | None = None  # where copies of remote files go; None: `Cache.of()`
    features_sha256: str = ""  # see `meme_dist.data.names`; none where features have no names

    @classmethod
    def load(cls, folder: Path | str, *, cache: Path | str | None = None) -> "Manifest":
        """Read the manifest of a folder, of an address (`s3://bucket/set`), or those of a brace pattern (`/data/mine-{000..003}`).

        `cache` is the folder for copies of remote files (see `Cache.of`). Raises ValueError where there is no manifest, where it was
        changed after it was written, and where several do not agree; OSError where an address cannot be reached.
        """
        parts = [cls._load(part, Cache.of(cache)) for part in folders(folder, MANIFEST)]
        if len(parts) == 1:
            return parts[0]
        return _union(folder if any("://" in str(part.folder) for part in parts) else Path(folder), parts)

    @classmethod
    def _load(cls, folder: str, cache: Cache) -> "Manifest":
        source = source_of(folder, cache)
        path = f"{folder.rstrip('/')}/{MANIFEST}"
        try:
            text = source.text(MANIFEST)
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(
                f"{folder}: expected a folder of shards, found no {MANIFEST}; write one with `meme-dist shards write`"
            ) from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: expected a manifest in JSON, got something else ({error!r}); {REPAIR}") from error
        try:
            content = json.loads(text)
            sealed = content.pop("checksum")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: expected a manifest in JSON, got something else ({error!r}); {REPAIR}") from error
        if content.get("format") != FORMAT:
            raise ValueError(f"{path}: expected format {FORMAT}, got {content.get('format')!r}; {REPAIR} with this version")
        if sealed != digest(content):
            raise ValueError(f"{path}: expected checksum {sealed}, got {digest(content)}: it was changed after it was written; {REPAIR}")
        return cls._from_json(Path(folder) if isinstance(source, Local) else folder, content, cache)

    def save(self) -> None:
        """Write `manifest.json` into the folder."""
        content = self.to_json()
        text = json.dumps({**content, "checksum": digest(content)}, indent=1, ensure_ascii=False)
        (Path(self.folder) / MANIFEST).write_text(text + "\n", encoding="utf-8")

    @cached_property
    def fingerprint(self) -> str:
        """A hash of everything that decides what the rows are: all but the folder and the provenance."""
        if self.parts:
            return digest({"sets": [part.fingerprint for part in self.parts]})
        return digest({name: value for name, value in self.to_json().items() if name != "source"})

    @property
    def address(self) -> str:
        """`folder` in words that mean the same in every working folder: what a run writes down."""
        return absolute(self.folder)

    def num_rows(self, split: str) -> int:
        return self._split(split).rows

    def single(self, split: str) -> bool:
        """Does any row of the split hold one modality only?"""
        return self._split(split).single

    @property
    def watched(self) -> str:
        """The split that a training is watched on, and its best step chosen: "validation" where there is one, else "test"."""
        return "validation" if "validation" in self.splits else "test"

    def shards(self, split: str) -> tuple[Shard, ...]:
        return self._split(split).shards

    def path(self, shard: Shard) -> Path:
        """The shard as a file on this machine: itself, or a verified copy of a remote one."""
        source, own = self._place(shard)
        return source.file(own.file, own.sha256)

    def size(self, shard: Shard) -> int:
        """Its bytes where it lies. Raises FileNotFoundError where it is missing, OSError where that cannot be found out."""
        source, own = self._place(shard)
        return source.size(own)

    def read(self, shard: Shard, begin: int, end: int) -> bytes:
        """Bytes begin..end of a shard, fewer where it ends before. Raises as `size` does."""
        source, own = self._place(shard)
        return source.read(own, begin, end, keep=self._fits)

    def forget(self, shard: Shard) -> bool:
        """Remove the copy of a remote shard, which may be worse than the original; was there one?"""
        source, own = self._place(shard)
        return source.forget(own)

    def copy(self, shard: Shard) -> contextlib.AbstractContextManager[Path | None]:
        """The shard as it is where it lies, unverified, as a file on this machine for a while; None where it is missing."""
        source, own = self._place(shard)
        return source.copy(own)

    def is_local(self, shard: Shard) -> bool:
        """Does it lie on this machine, so that a look at it costs nothing?"""
        return isinstance(self._place(shard)[0], Local)

    def index(self, split: str) -> Index:
        """The index of a split. Raises ValueError where it is missing or is not the one that belongs to this manifest."""
        self._split(split)
        parts = [part for part in self.parts or (self,) if split in part.splits]
        return Index([(part._index_file(split), part.splits[split].rows) for part in parts], len(self.fields))

    def _index_file(self, split: str) -> Path:
        entry = self.splits[split]
        return self.sealed(entry.index_file, entry.index_sha256, "the index")

    def sealed(self, file: str, sha256: str, what: str) -> Path:
        """A file beside the manifest, on this machine. Raises ValueError where it is missing or is not the one with this checksum."""
        name = f"{str(self.folder).rstrip('/')}/{file}"
        try:
            path = self._source.file(file, sha256)
            found = file_sha256(path)
        except FileNotFoundError:
            raise ValueError(f"{name}: {what} is missing; {REPAIR}") from None
        except ValueError as error:
            raise ValueError(f"{name}: expected {what} with sha256 {sha256}; {error}; {REPAIR}") from error
        if found != sha256:
            raise ValueError(f"{name}: expected {what} with sha256 {sha256}, got {found}: it is another or altered; {REPAIR}")
        return path

    @cached_property
    def _source(self) -> Local | Remote:
        return source_of(str(self.folder), self.cache or Cache.of())

    @cached_property
    def _places(self) -> dict[str, tuple[Local | Remote, Shard]]:
        """Where each shard of each folder lies, and what it is called there."""
        return {
            _inside(part, shard): (part._source, shard) for part in self.parts for split in part.splits.values() for shard in split.shards
        }

    def _place(self, shard: Shard) -> tuple[Local | Remote, Shard]:
        return self._places[shard.file] if self.parts else (self._source, shard)

    @cached_property
    def _fits(self) -> bool:
        """Would the copies of all shards fit into the cache at once?"""
        return sum(shard.bytes for split in self.splits.values() for shard in split.shards) <= (self.cache or Cache.of()).bound

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "name": self.name,
            "fields": {name: field.to_json() for name, field in self.fields.items()},
            "classes": list(self.classes),
            "source": dict(self.source),
            "rows_per_shard": self.rows_per_shard,
            "splits": {name: _split_to_json(split) for name, split in self.splits.items()},
            **({"features_sha256": self.features_sha256} if self.features_sha256 else {}),
        }

    def described(self) -> list[dict[str, Any]]:
        """The content of each folder's manifest, as JSON holds it; `of` makes the same set of it."""
        return [{"folder": str(part.folder), **part.to_json()} for part in self.parts or (self,)]

    @classmethod
    def of(cls, folder: str, content: Sequence[Mapping[str, Any]]) -> "Manifest":
        """The set that `described` told of, without a look at its folder: with the same fields and fingerprint, wherever its rows are."""
        parts = [cls._from_json(entry["folder"], entry, Cache.of()) for entry in content]
        return replace(parts[0], folder=folder) if len(parts) == 1 else _union(folder, parts)

    @classmethod
    def _from_json(cls, folder: Path | str, content: Mapping[str, Any], cache: Cache) -> "Manifest":
        check_modality_names(list(content["fields"]))
        fields = {name: Field.from_json(entry) for name, entry in content["fields"].items()}
        splits = {name: _split_from_json(entry) for name, entry in content["splits"].items()}
        for split in splits.values():
            for file in [split.index_file, *(shard.file for shard in split.shards), *filter(None, [split.names_file])]:
                check_file_name(file)
        classes, rows_per_shard, features = tuple(content["classes"]), content["rows_per_shard"], content.get("features_sha256", "")
        return cls(folder, content["name"], fields, classes, content["source"], rows_per_shard, splits, (), cache, features)

    def _split(self, split: str) -> Split:
        if split not in self.splits:
            raise ValueError(f"{self.folder}: expected a split among {list(self.splits)}, got {split!r}")
        return self.splits[split]


def check_file_name(file: str) -> None:
    """Raise ValueError unless this is a plain name inside the folder: no path, no address, no command."""
    if Path(file).name != file or ":" in file:
        raise ValueError(f"{MANIFEST}: expected the name of a file in the folder, got {file!r}")


def digest(content: Mapping[str, Any]) -> str:
    """sha256 of a JSON value, whatever the order of its keys in the file; the order of modalities counts."""
    ordered = json.dumps([content, list(content.get("fields", {}))], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(ordered.encode()).hexdigest()


def _union(folder: Path | str, parts: Sequence[Manifest]) -> Manifest:
    """Folders as one set: the rows of the second follow those of the first. Raises ValueError where fields or classes differ."""
    first = parts[0]
    for part in parts[1:]:
        for what in ("fields", "classes"):
            here, there = getattr(part, what), getattr(first, what)
            if here != there or list(here) != list(there):
                raise ValueError(
                    f"{part.folder}: expected the {what} of {first.folder}, got others; only sets that agree in them can be one"
                )
    if len(features := {part.features_sha256 for part in parts} - {""}) > 1:
        raise ValueError(f"{folder}: expected the same names of features in all folders, in one order; join them before `convert`")
    names = dict.fromkeys(name for part in parts for name in part.splits)
    splits = {name: _joined(name, [part for part in parts if name in part.splits]) for name in names}
    source = {"sets": [dict(part.source) for part in parts]}
    rows_per_shard = max(part.rows_per_shard for part in parts)
    whole = (folder, first.name, first.fields, first.classes, source, rows_per_shard, splits, tuple(parts), first.cache)
    return Manifest(*whole, features_sha256=next(iter(features), ""))


def _joined(name: str, parts: Sequence[Manifest]) -> Split:
    splits = [part.splits[name] for part in parts]
    present = {modality: sum(split.present[modality] for split in splits) for modality in parts[0].fields}
    shards = [shard._replace(file=_inside(part, shard)) for part in parts for shard in part.splits[name].shards]
    single = any(split.single for split in splits)
    return Split(sum(split.rows for split in splits), single, present, index_file="", index_sha256="", shards=tuple(shards))


def _inside(part: Manifest, shard: Shard) -> str:
    """What a shard is called among those of other folders."""
    return f"{str(part.folder).rstrip('/')}/{shard.file}"


def _split_to_json(split: Split) -> dict[str, Any]:
    entry = {**vars(split), "present": dict(split.present), "shards": [shard._asdict() for shard in split.shards]}
    return {name: value for name, value in entry.items() if split.names_file or not name.startswith("names_")}


def _split_from_json(entry: Mapping[str, Any]) -> Split:
    return Split(**{**entry, "shards": tuple(Shard(**shard) for shard in entry["shards"])})
