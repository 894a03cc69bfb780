"""How a training is stopped from outside, and what its processes say when they end.

A batch system announces the end of a job by SIGUSR1 (minutes before) or SIGTERM (seconds before), a person by SIGINT (Ctrl-C). The signal
only sets a flag; the trainer adds the flags of all ranks in the one reduction that it makes each step anyway, so that all of them save
after the same step and end with status 75. Launchers (torchrun, `accelerate launch`) end with 1 whatever their ranks ended with, hence
`tell`.
"""

import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

SAVED = 75  # exit status, EX_TEMPFAIL of sysexits.h: everything is saved, start me again
EXITS = "MEME_DIST_EXITS"  # the supervisor names a folder in it, where every rank leaves its exit status
JOBS = "MEME_DIST_JOBS"  # the variable says how many runs this machine trains at a time
WATCHED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SAVING = b"\nstopping after this step, to save; Ctrl-C again ends at once\n"
ECHO = 10.0  # seconds within which further signals are the first one's echo


class Stop:
    """Within it SIGTERM, SIGUSR1 and SIGINT set `requested`; on leaving, the handlers from before are back.

    A job is often told the same thing several times at once (Slurm signals every process, torchrun passes on what it got itself), so that
    signals within `echo` seconds of the first count as one. A later one goes to the handler from before, which by default ends the process;
    so does a second SIGINT at once, where no launcher started the process: it is a person's. A SIGINT that was ignored before (a shell's
    job in the background) still is.

    Raises ValueError on entering in another thread than the main one: Python runs handlers there alone, and lets nobody else set them.
    """

    def __init__(self, *, echo: float = ECHO):
        self.echo = echo
        self.requested = False
        self._first = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is not threading.main_thread():
            raise ValueError(
                f"signals are handled in the main thread only, this is {threading.current_thread().name!r}; train in the main thread"
            )
        deaf = {signal.SIGINT} if signal.getsignal(signal.SIGINT) is signal.SIG_IGN else set()
        self._before = {number: signal.signal(number, self._noted) for number in WATCHED if number not in deaf}
        for number in self._before:
            signal.siginterrupt(number, False)  # a C library in the middle of a read goes on with it
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._restore()

    def _noted(self, number: int, frame: FrameType | None) -> None:
        now, person = time.monotonic(), number == signal.SIGINT and "RANK" not in os.environ
        if not self.requested:
            self.requested, self._first = True, now
            if person:
                os.write(2, SAVING)  # print is not for handlers: it may have been interrupted itself
        elif person or now - self._first > self.echo:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: it was set by C code, and cannot be set again
        self._before = {}


def tell(status: int) -> None:
    """Leave this rank's exit status for the supervisor, where one started it; `told` reads them.

    Never raises: a process on its way out has nobody left to tell that it could not write.
    """
    folder = os.environ.get(EXITS)
    if folder is None:
        return
    try:
        (Path(folder) / f"rank-{int(os.environ.get('RANK', '0')):05d}").write_text(f"{status}\n", encoding="ascii")
    except OSError:
        pass


def told(folder: Path) -> dict[int, int]:
    """The exit status of each rank that left one in this folder; a killed rank leaves none."""
    files = {int(path.name.partition("-")[2]): path.read_text(encoding="ascii").strip() for path in sorted(folder.glob("rank-*"))}
    return {rank: int(text) for rank, text in files.items() if text}  # a file without text is being written
