"""Where a folder of shards is: on this machine, or behind an address that fsspec opens. Both answer the same few questions.

A folder on this machine is read in place. Shards behind an address are copied whole into the cache where all of the set fits there; else
each read fetches its range alone, since a shard is read in many pieces at many times and would be fetched anew for each.
"""

import contextlib
import itertools
import os
import re
import tempfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from braceexpand import braceexpand

from meme_dist.data.cache import Cache
from meme_dist.data.files import Shard, file_sha256, read_range
from meme_dist.data.retry import retried

SCHEMES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf", "oss", "webhdfs", "http", "https", "file", "memory")
MOST_FOLDERS = 4096  # of one pattern
FETCHES = 2  # of a shard that arrives other than it should: a transfer may go wrong, twice the same way it hardly does


def folders(address: Path | str, marker: str) -> list[str]:
    """The folders that an address stands for: itself, or those of its brace pattern, `mine-{000..003}` or `{a,b}/mine`.

    `marker` is the file that makes a folder one of shards: a local folder that holds it is taken by its name, braces and all.
    Raises ValueError for patterns that are none, and for anything that is neither a path nor an address of a known kind: no command is run.
    """
    text = _text(address)
    if not text or text != text.strip() or "\n" in text:
        raise ValueError(f"shards: expected a folder, a brace pattern or an address, got {text!r}")
    if "{" not in text or (Path(text) / marker).is_file():
        found = [text]
    else:
        found = _expanded(text)
    if len(found) > MOST_FOLDERS:
        raise ValueError(f"{text}: expected at most {MOST_FOLDERS} folders, got more; split the pattern or write larger shards")
    for folder in found:
        _check_address(folder, marker)
    places = [folder.rstrip("/") if "://" in folder else os.path.realpath(folder) for folder in found]
    if len(set(places)) < len(places):
        twice = next(folder for folder, place in zip(found, places, strict=True) if places.count(place) > 1)
        raise ValueError(f"{text}: expected each folder once, got {twice} twice: its rows would count double")
    return found


def source_of(folder: str, cache: Cache) -> "Local | Remote":
    """What answers for one folder."""
    return Remote(folder, cache) if "://" in folder else Local(Path(folder))


def absolute(address: Path | str) -> str:
    """The same address from any working folder: what a run writes down."""
    text = _text(address)
    whole = _absolute(text)
    if "{" not in text or Path(text).is_dir():
        return whole
    found = [_absolute(folder) for folder in _expanded(text)]
    with contextlib.suppress(ValueError):  # `..` may have taken a brace away
        if _expanded(whole) == found:
            return whole
    return found[0] if len(found) == 1 else "{" + ",".join(re.sub(r"[{},\\]", r"\\\g<0>", folder) for folder in found) + "}"


def check_local(place: Path | str) -> None:
    """Raise ValueError for an address, also one that a `Path` squeezed to `s3:/bucket`: nothing is written through one.

    Of any kind, known here or not: as a folder `s3:` in the working folder it would look written, and go with the node.
    """
    text = _text(place)
    if re.match(r"[A-Za-z][A-Za-z0-9+.:-]*:/", text):
        raise ValueError(
            f"{text}: expected a local folder or file to write to, got an address; write it on this machine and copy it there with the "
            "store's own tool (shards are read from addresses)"
        )


def _absolute(folder: str) -> str:
    return folder if "://" in folder else os.path.abspath(folder)


def _expanded(pattern: str) -> list[str]:
    """The folders of a brace pattern, one more than there may be at most."""
    try:
        return list(itertools.islice(braceexpand(pattern), MOST_FOLDERS + 1))
    except ValueError as error:  # braces that do not match
        raise ValueError(f"{pattern}: expected a brace pattern such as mine-{{000..003}}, got {error}") from error


def _text(address: Path | str) -> str:
    """A `Path` squeezes the two slashes of an address into one: given back here."""
    text = os.fspath(address)
    squeezed = re.match(rf"({'|'.join(SCHEMES)}):/(?!/)", text) if isinstance(address, Path) else None
    return text if squeezed is None else f"{squeezed[1]}://{'/' * (squeezed[1] == 'file')}{text[squeezed.end() :]}"


def _check_address(folder: str, marker: str) -> None:
    scheme, separator, rest = folder.partition("://")
    if not separator:
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", folder) and not (Path(folder) / marker).is_file():
            raise ValueError(f"{folder}: expected a folder or an address such as s3://bucket/set, got neither; no command is ever run")
        return
    if scheme not in SCHEMES or "::" in folder:
        raise ValueError(f"{folder}: expected a plain address with one of {', '.join(SCHEMES)}, got {scheme!r}; no command is ever run")
    if "?" in rest or "#" in rest or (scheme in ("http", "https") and "@" in rest):
        raise ValueError(f"{scheme}://...: expected the address of a folder without query or password; give passwords to the driver alone")


class Local:
    """A folder on this machine, read in place."""

    def __init__(self, path: Path):
        self.path, self._prefix = path, os.path.join(path, "")  # joined as text: a path object a read would cost as much as the read

    def text(self, name: str) -> str:
        """A small file. Raises FileNotFoundError, NotADirectoryError and what else the file system has."""
        return (self.path / name).read_text(encoding="utf-8")

    def file(self, name: str, sha256: str) -> Path:
        """A file on this machine with that content, which is not looked at."""
        return self.path / name

    def size(self, shard: Shard) -> int:
        """Bytes of a shard. Raises FileNotFoundError where it is missing."""
        path = self._prefix + shard.file
        return retried(path, lambda: os.stat(path).st_size)

    def read(self, shard: Shard, begin: int, end: int, *, keep: bool) -> bytes:
        """Bytes begin..end of a shard, fewer where it ends before. Raises FileNotFoundError where it is missing."""
        path = self._prefix + shard.file
        return retried(path, lambda: read_range(path, begin, end))

    def forget(self, shard: Shard) -> bool:
        """Was there a copy that may be worse than the original? Then it is gone now."""
        return False

    @contextlib.contextmanager
    def copy(self, shard: Shard) -> Iterator[Path | None]:
        """The shard as it is, as a file on this machine for a while; None where it is missing."""
        path = self.path / shard.file
        yield path if path.is_file() else None


class Remote:
    """A folder behind an address. `file:///mnt/share/set` is one too: that is how a slow disk's shards get into the cache."""

    def __init__(self, address: str, cache: Cache):
        self.address, self.cache = address.rstrip("/"), cache
        self._sizes: dict[str, int] = {}
        self._altered: set[str] = set()  # shards that are not what the manifest says, even fetched twice: read by range, row by row

    def text(self, name: str) -> str:
        """A small file, never from the cache. Raises FileNotFoundError; OSError where it cannot be reached."""
        return self._retried(name, lambda path: self._system.cat_file(path)).decode()

    def file(self, name: str, sha256: str) -> Path:
        """A copy on this machine with that content. Raises FileNotFoundError, ValueError where its content is another, OSError."""
        kept = f"{sha256}{Path(name).suffix}"
        path = self.cache.find(kept)
        if path is not None and file_sha256(path) == sha256:
            return path
        if (path := self._fetched(name, kept, sha256)) is None:
            raise ValueError(f"{self.address}/{name}: expected a file with sha256 {sha256}, got another, {FETCHES} times")
        return path

    def size(self, shard: Shard) -> int:
        """Bytes of a shard, asked for once. Raises FileNotFoundError where it is missing."""
        if self.cache.find(_kept(shard), shard.bytes):
            return shard.bytes
        if shard.file not in self._sizes:
            self._sizes[shard.file] = self._retried(shard.file, lambda path: int(self._system.info(path)["size"]))
        return self._sizes[shard.file]

    def read(self, shard: Shard, begin: int, end: int, *, keep: bool) -> bytes:
        """Bytes begin..end of a shard, fewer where it ends before: from the cache where shards are to be kept there.

        Raises FileNotFoundError where it is missing, OSError where it cannot be reached.
        """
        for _ in range(FETCHES if keep else 0):
            path = self._copy_of(shard)
            if path is None:
                break
            with contextlib.suppress(FileNotFoundError):  # another process needed the room just now
                return read_range(path, begin, end)
        end = min(end, self.size(shard))
        return self._range(shard, begin, end) if begin < end else b""

    def forget(self, shard: Shard) -> bool:
        """Remove a copy that may be worse than the original; was there one?"""
        return self.cache.discard(_kept(shard))

    @contextlib.contextmanager
    def copy(self, shard: Shard) -> Iterator[Path | None]:
        """The shard as it is there, as a file on this machine for a while; None where it is missing."""
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "shard.tar"
            try:
                self._retried(shard.file, lambda path: self._system.get_file(path, str(target)))
            except FileNotFoundError:
                target = None
            yield target

    def _range(self, shard: Shard, begin: int, end: int) -> bytes:
        """Bytes begin..end alone, or cut out of the whole shard: what a web server sends that knows no ranges."""
        data = self._retried(shard.file, lambda path: self._system.cat_file(path, begin, end))
        if len(data) <= end - begin:
            return data
        if len(data) != self.size(shard):
            raise OSError(
                f"{self.address}/{shard.file}: expected {end - begin} bytes from byte {begin} on, got {len(data)}; "
                "let the server answer requests for ranges, or copy the shards to this machine"
            )
        return data[begin:end]

    def _copy_of(self, shard: Shard) -> Path | None:
        """The verified copy of a shard, fetched where there is none; None where what is fetched is something else."""
        if path := self.cache.find(_kept(shard), shard.bytes):
            return path
        if shard.file in self._altered:
            return None
        if (path := self._fetched(shard.file, _kept(shard), shard.sha256)) is None:
            self._altered.add(shard.file)
        return path

    def _fetched(self, name: str, kept: str, sha256: str) -> Path | None:
        def fetch(target: Path) -> None:
            self._retried(name, lambda path: self._system.get_file(path, str(target)))

        copies = (self.cache.add(kept, sha256, fetch) for _ in range(FETCHES))
        return next((path for path in copies if path is not None), None)

    def _retried(self, name: str, call: Any) -> Any:
        """`call` with the path that fsspec knows the file by."""
        return retried(f"{self.address}/{name}", lambda: call(f"{self._root}/{name}"))

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        import fsspec

        try:
            system, root = fsspec.core.url_to_fs(self.address)
        except ImportError as error:
            raise ValueError(f"{self.address}: expected the driver for such addresses to be installed ({error})") from error
        return system, root.rstrip("/")

    @property
    def _system(self) -> Any:
        return self._opened[0]

    @property
    def _root(self) -> str:
        return self._opened[1]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_opened"}


def _kept(shard: Shard) -> str:
    return f"{shard.sha256}.tar"
