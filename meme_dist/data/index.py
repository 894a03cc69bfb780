"""What a folder of shards must hold: a manifest for the set, and for each split an index with one record a row.

The index makes absence a fact: a member that it lists and the tar lacks is damage, a member that it does not list was never there.
Both files are plain (JSON and an array without pickle) and sealed: the manifest knows its own checksum and that of each index.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from meme_dist.data.fields import Field, check_modality_names

FORMAT = 1
MANIFEST = "manifest.json"
TAR_BLOCK = 512  # a header is one block, a payload is filled up to whole blocks
REPAIR = "write the shards again"


class Shard(NamedTuple):
    """One tar file: its rows follow those of the shard before it."""

    file: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """One part of the data set ("train", "test", perhaps "validation"): its shards in order, and what is in them."""

    rows: int
    single: bool  # does any row hold one modality only?
    present: Mapping[str, int]  # rows in which each modality is there
    index_file: str
    index_sha256: str
    shards: tuple[Shard, ...]


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
    """The records of one split, mapped from the disk rather than read; it travels to workers as a path."""

    def __init__(self, path: Path, rows: int, modalities: int):
        self._path, self._rows, self._modalities = path, rows, modalities

    @cached_property
    def records(self) -> np.ndarray:
        records = np.load(self._path, mmap_mode="r", allow_pickle=False)
        if records.dtype != record_type(self._modalities) or records.shape != (self._rows,):
            raise ValueError(
                f"{self._path}: expected {self._rows} records of {self._modalities} modalities, got {records.shape} of {records.dtype}"
            )
        return records

    @property
    def observed(self) -> np.ndarray:
        """Which modality each row holds, [rows, N]."""
        return self.records["size"] >= 0

    @property
    def label(self) -> np.ndarray:
        """Class of each row, -1 where it has none, [rows]."""
        return self.records["label"]

    def key(self, row: int) -> str:
        return self.records["key"][row].decode()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "records"}


@dataclass(frozen=True)
class Manifest:
    """A folder of shards, as `manifest.json` describes it."""

    folder: Path
    name: str
    fields: Mapping[str, Field]
    classes: tuple[str, ...]
    source: Mapping[str, Any]
    rows_per_shard: int
    splits: Mapping[str, Split]

    @classmethod
    def load(cls, folder: Path | str) -> "Manifest":
        """Read a folder's manifest. Raises ValueError where there is none, or where it was changed after it was written."""
        folder = Path(folder)
        path = folder / MANIFEST
        if not path.is_file():
            raise ValueError(f"{folder}: expected a folder of shards, found no {MANIFEST}; write one with `meme-dist shards write`")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            sealed = content.pop("checksum")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: expected a manifest in JSON, got something else ({error!r}); {REPAIR}") from error
        if content.get("format") != FORMAT:
            raise ValueError(f"{path}: expected format {FORMAT}, got {content.get('format')!r}; {REPAIR} with this version")
        if sealed != digest(content):
            raise ValueError(f"{path}: expected checksum {sealed}, got {digest(content)}: it was changed after it was written; {REPAIR}")
        return cls._from_json(folder, content)

    def save(self) -> None:
        """Write `manifest.json` into the folder."""
        content = self.to_json()
        text = json.dumps({**content, "checksum": digest(content)}, indent=1, ensure_ascii=False)
        (self.folder / MANIFEST).write_text(text + "\n", encoding="utf-8")

    @cached_property
    def fingerprint(self) -> str:
        """A hash of everything that decides what the rows are: all but the folder and the provenance."""
        return digest({name: value for name, value in self.to_json().items() if name != "source"})

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
        return self.folder / shard.file

    def index(self, split: str) -> Index:
        """The index of a split. Raises ValueError where it is missing or is not the one that belongs to this manifest."""
        entry = self._split(split)
        path = self.folder / entry.index_file
        if not path.is_file():
            raise ValueError(f"{path}: the index of split {split!r} is missing; {REPAIR}")
        if (found := file_sha256(path)) != entry.index_sha256:
            raise ValueError(
                f"{path}: expected the index with sha256 {entry.index_sha256}, got {found}: it is another or altered; {REPAIR}"
            )
        return Index(path, entry.rows, len(self.fields))

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "name": self.name,
            "fields": {name: field.to_json() for name, field in self.fields.items()},
            "classes": list(self.classes),
            "source": dict(self.source),
            "rows_per_shard": self.rows_per_shard,
            "splits": {name: _split_to_json(split) for name, split in self.splits.items()},
        }

    @classmethod
    def _from_json(cls, folder: Path, content: Mapping[str, Any]) -> "Manifest":
        check_modality_names(list(content["fields"]))
        fields = {name: Field.from_json(entry) for name, entry in content["fields"].items()}
        splits = {name: _split_from_json(entry) for name, entry in content["splits"].items()}
        for split in splits.values():
            for file in [split.index_file, *(shard.file for shard in split.shards)]:
                check_file_name(file)
        return cls(folder, content["name"], fields, tuple(content["classes"]), content["source"], content["rows_per_shard"], splits)

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


def file_sha256(path: Path) -> str:
    """sha256 of a file, read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _split_to_json(split: Split) -> dict[str, Any]:
    return {**vars(split), "present": dict(split.present), "shards": [shard._asdict() for shard in split.shards]}


def _split_from_json(entry: Mapping[str, Any]) -> Split:
    return Split(**{**entry, "shards": tuple(Shard(**shard) for shard in entry["shards"])})
