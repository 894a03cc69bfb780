"""Public files: from a folder that the user names, or fetched once into a cache, and never believed without their checksum."""

import functools
import hashlib
import os
import sys
import tempfile
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple
from urllib.request import urlopen

CHUNK = 1 << 20
TIMEOUT = 30  # seconds without an answer


class Remote(NamedTuple):
    """A public file: the addresses are tried in turn."""

    name: str
    urls: tuple[str, ...]
    size: int  # bytes
    sha256: str


def find(files: Sequence[Remote], *, source: Path | None, cache: Path | None = None) -> dict[str, Path]:
    """Where each file lies, by name: in `source`, or in the cache, to which it is downloaded if need be.

    A file in `source` may also lie there unpacked (without `.gz`): that has no checksum, and its reader checks it. Raises ValueError,
    naming the files, their addresses and what to do, where one is missing from `source`, cannot be had, or has another checksum.
    """
    if source is not None:
        return _in_folder(files, source)
    folder = cache or cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    return {file.name: fetch(file, folder) for file in files}


def cache_folder() -> Path:
    """`meme-dist` in the user's cache folder: $XDG_CACHE_HOME, by default ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "meme-dist"


def fetch(file: Remote, folder: Path) -> Path:
    """The file in `folder`, downloaded unless it is there and whole; a file with another checksum is removed.

    Written beside its place and moved there when it is whole, so that processes that fetch it at once cannot harm each other.
    """
    target = folder / file.name
    if target.exists():
        if _sha256(target) == file.sha256:
            return target
        target.unlink(missing_ok=True)  # another process may have been here first
    failures = []
    for url in file.urls:
        try:
            return _download(file, url, target)
        except (OSError, HTTPException, ValueError) as error:
            failures.append(f"{url}: {error}")
    tried = "; ".join(failures)
    raise ValueError(f"{file.name}: could not be downloaded ({tried}). Get it elsewhere and name the folder that has it: --source FOLDER")


def present(files: Sequence[Remote], source: Path) -> dict[str, Path]:
    """Where each file lies in `source`, packed or not; its content is not looked at. Raises ValueError for those that are missing."""
    found = {file.name: _present(source, file.name) for file in files}
    missing = [file for file in files if found[file.name] is None]
    if missing:
        wanted = "; ".join(f"{file.name} (from {file.urls[0]})" for file in missing)
        raise ValueError(f"{source}: missing {wanted}. Put the files there, or name the folder that has them: --source FOLDER")
    return {name: path for name, path in found.items() if path is not None}


def _in_folder(files: Sequence[Remote], source: Path) -> dict[str, Path]:
    found = present(files, source)
    for file in files:
        if (path := found[file.name]).name == file.name:
            _check(path, file)
    return found


@functools.cache  # a data set asks for its files with every split
def _check(path: Path, file: Remote) -> None:
    if (got := _sha256(path)) != file.sha256:
        raise ValueError(
            f"{path}: expected {file.size} bytes with sha256 {file.sha256}, got {path.stat().st_size} with {got}; "
            f"it is cut or altered, get it again (from {file.urls[0]})"
        )


def _present(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / name.removesuffix(".gz")) if path.is_file()), None)


def _download(file: Remote, url: str, target: Path) -> Path:
    print(f"downloading {url} ({file.size / 1e6:.1f} MB) to {target.parent}", file=sys.stderr)
    handle, name = tempfile.mkstemp(prefix=file.name, suffix=".part", dir=target.parent)
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as out, urlopen(url, timeout=TIMEOUT) as response:
            while chunk := response.read(CHUNK):
                out.write(chunk)
        if (got := _sha256(part)) != file.sha256:
            raise ValueError(f"expected {file.size} bytes with sha256 {file.sha256}, got {part.stat().st_size} with {got}; removed")
        return part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
