"""A folder of verified copies of remote files, shared by all runs, ranks and workers of a machine and bounded in bytes.

A copy is named by the sha256 of what it holds. It is written under a name of its own, checked, and renamed: whoever finds a file here finds
all of it. Processes that want the same one at once take turns by a lock, so that one fetches it and the others find it; where there are no
locks, or whoever has one hangs, they fetch it twice, which is all that happens.
"""

import contextlib
import fcntl
import os
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from meme_dist.data.files import file_sha256

DEFAULT_GIGABYTES = 50.0
STALE = 3600.0  # seconds without a byte written, after which an unfinished copy is one that somebody left behind
STALLED = 60.0  # seconds without a byte written, after which another process's fetch is waited for no longer; a source is retried for 16 s
GLANCE = 0.02  # seconds between two tries to get a lock
LEFT = (".part", ".lock")  # what a process that is killed leaves behind
BOUNDED = ".tar"  # indexes stay: they are small, and a running job may open them at any time


@dataclass(frozen=True)
class Cache:
    """Copies of at most `bound` bytes of shards: where a new one does not fit, those that were used the longest ago go."""

    folder: Path
    bound: int

    @classmethod
    def of(cls, folder: Path | str | None = None) -> "Cache":
        """`folder`, else that of MEME_DIST_CACHE, else meme-dist in the user's cache folder; 50 GB, else MEME_DIST_CACHE_GB of shards.

        Raises ValueError for a MEME_DIST_CACHE_GB that is no number of 0 or more (0: shards are never kept).
        """
        if not (folder := folder or os.environ.get("MEME_DIST_CACHE")):
            folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "meme-dist" / "shards"
        wanted = os.environ.get("MEME_DIST_CACHE_GB") or DEFAULT_GIGABYTES
        try:
            bound = int(float(wanted) * 1e9)
        except (ValueError, OverflowError):
            bound = -1
        if bound < 0:
            raise ValueError(f"MEME_DIST_CACHE_GB: expected gigabytes, a number of 0 or more, got {wanted!r}")
        return cls(Path(folder).absolute(), bound)

    def find(self, name: str, size: int | None = None) -> Path | None:
        """The copy, marked as used now; None where there is none of that size."""
        path = self.folder / name
        try:
            if size is not None and path.stat().st_size != size:
                return None
            os.utime(path)
        except OSError:
            return path if path.exists() else None  # a cache of another user's can be read and not marked
        return path

    def add(self, name: str, sha256: str, fetch: Callable[[Path], object]) -> Path | None:
        """Have `fetch` write a file and keep it as `name`; None, and nothing kept, where its sha256 is not the one expected.

        Where another process did so meanwhile its copy is taken, and nothing is fetched.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._alone(name):
            path = self.find(name)
            with contextlib.suppress(OSError):  # another process may be trimming
                if path is not None and file_sha256(path) == sha256:
                    return path
            return self._new(name, sha256, fetch)

    def _new(self, name: str, sha256: str, fetch: Callable[[Path], object]) -> Path | None:
        path = self.folder / name
        temporary = self.folder / f"{name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.part"
        try:
            fetch(temporary)
            if file_sha256(temporary) != sha256:
                return None
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        self._trim(path)
        return path

    @contextlib.contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """Within it no other process of this machine adds `name`, as far as can be had. The lock ends with the process that holds it."""
        path = self.folder / f"{name}.lock"
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # no locks here, or somebody hangs: then without
                handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
                stack.callback(os.close, handle)
                self._lock(handle, name)
                # Before it is given up: who waits for this file gets it and finds the copy, who comes later finds the copy at once.
                stack.callback(self.discard, path.name)
            yield

    def _lock(self, handle: int, name: str) -> None:
        """Wait for the lock as long as its holder's file grows. Raises OSError where there are no locks, TimeoutError where it stands."""
        before, since = -1, time.monotonic()
        while True:
            with contextlib.suppress(BlockingIOError):
                return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if (written := self._written(name)) != before:
                before, since = written, time.monotonic()
            elif time.monotonic() - since > STALLED:
                raise TimeoutError
            time.sleep(GLANCE)

    def _written(self, name: str) -> int:
        """Bytes of unfinished copies of `name`."""
        total = 0
        for path in self.folder.glob(f"{name}.*.part"):
            with contextlib.suppress(OSError):  # it just got its name
                total += path.stat().st_size
        return total

    def discard(self, name: str) -> bool:
        """Remove a copy that turned out to be damaged; was there one?"""
        try:
            (self.folder / name).unlink()
        except OSError:
            return False
        return True

    def _trim(self, new: Path) -> None:
        """Down to the bound: the least recently used first, never the new one, never one that is being written."""
        copies = []
        for path in self.folder.iterdir():
            with contextlib.suppress(OSError):  # another process may be trimming too
                status = path.stat()
                if path.suffix in LEFT and status.st_mtime < time.time() - STALE:
                    path.unlink()
                elif path.suffix == BOUNDED:
                    copies.append((status.st_mtime, path, status.st_size))
        excess = sum(size for *_, size in copies) - self.bound
        for _, path, size in sorted(copies):
            if excess <= 0:
                return
            if path != new:
                self.discard(path.name)
                excess -= size
