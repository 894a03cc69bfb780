"""What rows and features are called where they come from (cells, genes), in plain files beside the index.

    SPLIT.names.txt   a row's name a line, in the order of the rows; an empty line for a row without one
    features.json     {modality: [the name of each element of its event]}

Both are sealed as the index is: the manifest has their checksums. Shards need neither, and those of rows without names have none.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

from meme_dist.data.fields import Field
from meme_dist.data.files import file_sha256
from meme_dist.data.index import Manifest

FEATURES = "features.json"


def row_names(manifest: Manifest, split: str) -> list[str]:
    """The name of each row of a split, "" for a row without one. Raises ValueError for a file of names that is not the manifest's."""
    found: list[str] = []
    for part in manifest.parts or (manifest,):
        if split not in part.splits:
            continue
        entry = part.splits[split]
        own = _read(part, split).split("\n")[:-1] if entry.names_file else [""] * entry.rows
        if len(own) != entry.rows:
            raise ValueError(f"{part.folder}: {entry.names_file}: expected {entry.rows} names, got {len(own)}; write the shards again")
        found += own
    return found


def feature_names(manifest: Manifest) -> dict[str, list[str]]:
    """The names of each modality's elements; nothing where they have none. Raises ValueError as `row_names` does."""
    named = next((part for part in manifest.parts or (manifest,) if part.features_sha256), None)
    if named is None:
        return {}
    found = json.loads(named.sealed(FEATURES, named.features_sha256, "the names of features").read_text(encoding="utf-8"))
    check_features(found, manifest.fields)
    return found


def check_features(features: Mapping[str, Sequence[str]], fields: Mapping[str, Field]) -> None:
    """Raise ValueError unless these are names for all elements of some of the fields."""
    for name, called in features.items():
        size = math.prod(fields[name].shape) if name in fields else 0
        if len(called) != size:
            raise ValueError(f"features of {name}: expected {size} names, one for each element of the field, got {len(called)}")


def write_features(folder: Path, features: Mapping[str, Sequence[str]]) -> str:
    """Write the names; returns the file's sha256."""
    path = folder / FEATURES
    with path.open("w", encoding="utf-8") as file:
        json.dump({name: list(called) for name, called in features.items()}, file, ensure_ascii=False)
        _flush(file)
    return file_sha256(path)


class NamesWriter:
    """Appends the names of a split's rows, so that names of any number need no memory; leaves no file where no row has one."""

    def __init__(self, folder: Path, split: str):
        self._path, self._named = folder / f"{split}.names.txt", False
        self._file = self._path.open("w", encoding="utf-8", newline="\n")

    def append(self, names: Sequence[str]) -> None:
        self._file.writelines(f"{name}\n" for name in names)
        self._named = self._named or any(names)

    def sealed(self) -> tuple[str, str]:
        """The file and its sha256, both empty where there is none; once it is closed."""
        return (self._path.name, file_sha256(self._path)) if self._named else ("", "")

    def __enter__(self) -> "NamesWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._named and kind is None:
            _flush(self._file)
        self._file.close()
        if not self._named:
            self._path.unlink()


def _read(manifest: Manifest, split: str) -> str:
    entry = manifest.splits[split]
    path = manifest.sealed(entry.names_file, entry.names_sha256, "the names of rows")
    return path.read_bytes().decode("utf-8")


def _flush(file: IO[str]) -> None:
    file.flush()
    os.fsync(file.fileno())
