"""What is asked of single files, wherever they came from."""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple


class Shard(NamedTuple):
    """One tar file: its rows follow those of the shard before it."""

    file: str
    rows: int
    bytes: int
    sha256: str


def file_sha256(path: Path) -> str:
    """sha256 of a file, read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_range(path: Path | str, begin: int, end: int) -> bytes:
    """Bytes begin..end of a file; fewer where it ends before."""
    with open(path, "rb", buffering=0) as file:
        file.seek(begin)
        data = file.read(end - begin)
        while len(data) < end - begin:  # a raw file may give less than was asked for
            more = file.read(end - begin - len(data))
            if not more:
                break
            data += more
    return data


def sync(path: Path) -> None:
    """Ask the disk to keep a file, or a folder's list of files, before anything relies on it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
