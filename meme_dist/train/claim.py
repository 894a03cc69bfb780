"""One training at a time in a run's folder, and all of its ranks or none: two would write one log, and remove each other's checkpoints.

Rank 0 holds a lock on RUN/.lock. Only the lock counts, and the system gives it back however its holder ends; the file stays, and says who
took the folder last.
"""

import fcntl
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from meme_dist.leave import MISTAKE, status_of
from meme_dist.train.signals import EXITS

if TYPE_CHECKING:  # the supervisor takes folders too, and does without the seconds that torch takes
    from torch import Tensor

FILE = ".lock"
LAUNCHED = 120.0  # seconds that a supervised launch waits for the one before it: an NFS server keeps a lost machine's locks for 90
POLL = 0.2
MOST = 256  # bytes of the file that are read


class Claim:
    """Within it folders can be taken, each by one process at a time; leaving gives them back."""

    def __init__(self) -> None:
        self._files: list[int] = []

    def __enter__(self) -> "Claim":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for file in self._files:
            os.close(file)
        self._files = []

    @property
    def held(self) -> bool:
        """Whether something is locked; not where the file system knows no locks."""
        return bool(self._files)

    def take(self, folder: Path, *, patience: float = 0.0) -> str | None:
        """Lock a folder; returns who has it, in words, where that is somebody else for longer than `patience` seconds.

        Where the file system knows no locks (ENOLCK, ENOTSUP) nothing is locked and nobody refused.
        """
        file, deadline = os.open(folder / FILE, os.O_RDWR | os.O_CREAT, 0o666), time.monotonic() + patience
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < deadline:
                    time.sleep(POLL)
                    continue
                holder = _holder(file)
                os.close(file)
                return holder
            except OSError:
                os.close(file)
                return None
            self._files.append(file)
            _sign(file)
            return None

    def begin(self, run: Path) -> None:
        """Lock a run's folder to train in it. Raises ValueError where another training has it."""
        holder = self.take(run, patience=LAUNCHED if EXITS in os.environ else 0.0)
        if holder is not None:
            raise ValueError(
                f"{run}: is being trained by {holder}, and two trainings would spoil each other's files; wait for that one to end, "
                f"or stop it (SIGTERM: it saves), then go on with --resume {run}"
            )


def on_main(is_main: bool, reduce: "Callable[[Tensor], Tensor]", work: Callable[[], None]) -> None:
    """Rank 0 alone does this; nobody goes on before it is done, and where it fails all ranks end with the same status. Collective."""
    import torch

    problem = None
    if is_main:
        try:
            work()
        except Exception as error:
            problem = error
    status = int(reduce(torch.full((1,), 0 if problem is None else status_of(problem))))
    if problem is not None:
        raise problem
    if status:
        raise (ValueError if status == MISTAKE else OSError)("rank 0 could not begin, and tells why")


def _sign(file: int) -> None:
    try:
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    except OSError:  # a full disk: the lock holds without a name on it
        pass


def _holder(file: int) -> str:
    try:
        return os.pread(file, MOST, 0).decode(errors="replace") or "another process"
    except OSError:
        return "another process"
