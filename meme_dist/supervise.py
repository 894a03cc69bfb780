"""`python -m meme_dist.supervise -- accelerate launch ... -m meme_dist train RECIPE --run NAME`: start a training again whenever it dies.

Always a new launch of everything, with `--resume NAME` added once the run exists: ranks that torchrun restarts in place can meet what the
attempt before left in its rendezvous, and hang. What became of an attempt is told by its ranks, since launchers end with 1 for everything:

    every rank ended with 0                 done                            0
    a rank ended with 2                     a mistake of the caller's       2, not tried again
    ranks ended with 75                     told to stop, and saved         75, for the batch system to start it again
    anything else                           a crash                         tried again, after a pause that doubles

A crash that left no newer checkpoint than the crash before it uses up the budget; progress fills it again. SIGTERM, SIGUSR1 and SIGINT are
passed on to the ranks themselves as SIGTERM, never to the launcher: torchrun would give them 30 seconds, and it dies of SIGUSR1.

Storage that fails for a moment ends no launch. If this process is killed its launch lives on: the next one that goes on with the run finds
it by its environment, and starts nothing before it has saved and ended.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NamedTuple

import tyro

from meme_dist import record
from meme_dist.data.retry import lasting, retried
from meme_dist.flags import value_of
from meme_dist.leave import MISTAKE, status_of
from meme_dist.train.claim import FILE, Claim
from meme_dist.train.signals import ECHO, EXITS, SAVED, told

JOURNAL = "supervisor.jsonl"
POLL = 0.2  # seconds between two looks at the running launch
LAST_WORDS = 5.0  # seconds between SIGTERM and SIGKILL for what is left of a launch
PROCESSES = Path("/proc")

Verdict = Literal["done", "mistake", "stopped", "crash"]


@dataclass(frozen=True)
class Limits:
    """How patient the supervisor is. Times are seconds."""

    budget: int = 3
    """Crashes in a row without a newer checkpoint: one more, and it gives up."""
    pause: float = 10.0
    """Before the first relaunch; it doubles with every crash without progress."""
    longest: float = 600.0
    """The longest pause."""
    failing: float = 60.0
    """For the launch to end by itself once a rank has ended badly; then all of it is killed."""
    stopping: float = 600.0
    """For the ranks to save once they were told to stop; then all of them are killed."""
    again: bool = False
    """The run may exist already: go on with it. For a job that the batch system starts again."""


class Attempt(NamedTuple):
    """How a launch ended: the launcher's exit status, that of each rank that left one, and the seconds that it ran.

    `ranks` is None where what they left cannot be read.
    """

    status: int
    ranks: Mapping[int, int] | None
    seconds: float


# ---- what to start, and what became of it -----------------------------------------------------------------------------------------


def run_of(command: Sequence[str]) -> str:
    """The run that a command trains, from its `--resume` or `--run`. Raises ValueError where it has neither."""
    name = value_of("--resume", command) or value_of("--run", command)
    if name is None:
        raise ValueError("supervise: the command names no run, so it could not be resumed; add --run NAME to it")
    return name


def folder_of(name: str) -> Path:
    """The folder of a run: the same answer as `meme_dist.run.run_folder`, without the seconds that importing all of it takes."""
    path = Path(name)
    if path.name == record.FILE:
        return path.parent
    return path if len(path.parts) > 1 or (path / record.FILE).is_file() else Path("runs") / path


def resuming(command: Sequence[str], folder: Path) -> list[str]:
    """The command as it goes on: with `--resume` of its run, where that exists and the command does not say so already."""
    words = list(command)
    begun = (folder / record.FILE).is_file()
    return [*words, "--resume", run_of(words)] if begun and value_of("--resume", words) is None else words


def progress(folder: Path) -> int:
    """The step of the newest checkpoint of a run; -1 without one. A damaged one counts as none: the training decides what to do with it."""
    found = (path for path in folder.glob("checkpoints/last*/state.json") if not path.parent.name.endswith("partial"))
    return max(map(_step_of, found), default=-1)


def reached(folder: Path) -> int:
    """The same, asked again where storage fails for a moment. Raises OSError where it fails for longer."""
    return retried(str(folder), lambda: progress(folder))


def statuses(exits: Path) -> dict[int, int] | None:
    """What the ranks of a launch that has ended left in this folder; None where it cannot be read for longer than a moment."""
    try:
        return retried(str(exits), lambda: told(exits))
    except OSError:
        return None


def verdict(attempt: Attempt, *, stopped: bool) -> Verdict:
    """What became of a launch. `stopped`: it was told to stop, so that however it ended, whoever told it decides about what follows."""
    if attempt.ranks is None:  # the launcher's status alone tells nothing
        return "stopped" if stopped else "crash"
    found = set(attempt.ranks.values()) or {attempt.status}
    if MISTAKE in found:
        return "mistake"
    if found == {0} and attempt.status == 0:
        return "done"
    return "stopped" if stopped or found - {0} == {SAVED} else "crash"


def pause(limits: Limits, crashes: int) -> float:
    """Seconds to wait before the next launch, after so many crashes without progress."""
    return min(limits.longest, limits.pause * 2.0 ** max(0, crashes - 1))


# ---- the loop ---------------------------------------------------------------------------------------------------------------------


class Supervisor:
    """One run, from its first launch to its end."""

    def __init__(self, command: Sequence[str], limits: Limits):
        self.command, self.limits = list(command), limits
        self.folder = folder_of(run_of(command))
        self._told_at: float | None = None
        self._impatient = False
        self._step = -1  # of the newest checkpoint that was seen
        self._lines: list[str] = []  # of the journal, until there is a folder to put it in

    def run(self) -> int:
        """Launch until it is done, stopped, a mistake or hopeless; returns the exit status."""
        before = {number: signal.signal(number, self._noted) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
        try:
            return self._run()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _run(self) -> int:
        going_on = self.limits.again or value_of("--resume", self.command) is not None
        if going_on and not self._stop_orphans():
            return SAVED
        words = self._words() if self.limits.again else self.command
        crashes = 0
        while True:
            step = self._progress()
            self._note("launch", step=step, command=words)
            attempt = self._launch(words)
            what = verdict(attempt, stopped=self._told_at is not None)
            crashes = 0 if what != "crash" or self._progress() > step else crashes + 1
            self._note(what, step=self._progress(), status=attempt.status, ranks=attempt.ranks, seconds=attempt.seconds)
            if what != "crash":
                return {"done": 0, "mistake": MISTAKE, "stopped": SAVED}[what]
            if crashes > self.limits.budget:
                self._note("hopeless", crashes=crashes)
                return 1
            if not self._wait(pause(self.limits, crashes)):
                return SAVED
            words = self._words()

    def _words(self) -> list[str]:
        return retried(str(self.folder), lambda: resuming(self.command, self.folder))

    def _progress(self) -> int:
        """The step of the newest checkpoint; the last that was known where the folder cannot be read."""
        with suppress(OSError):
            self._step = reached(self.folder)
        return self._step

    def _stop_orphans(self) -> bool:
        """What a killed supervisor of this run left: its ranks save and end, its folders go. False where this one was told to stop then."""
        left, deadline, signalled = Orphans(self.folder), time.monotonic() + self.limits.stopping, set[int]()
        retried(str(self.folder.parent), left.check)
        if found := left.processes():
            self._note("orphans", processes=[str(process) for process in found])
        while left.processes() and self._told_at is None and time.monotonic() < deadline:
            for process in set(left.leaders()) - signalled:  # whoever leads once a launcher without ranks has gone is told too
                signalled.add(process)
                _send(process, signal.SIGTERM)
            time.sleep(POLL)
        if self._told_at is None:
            left.end()
            with suppress(OSError):  # a folder that stays is in nobody's way
                left.clear()
        return self._told_at is None

    def _noted(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._told_at is None:
            self._told_at = now
        elif number == signal.SIGINT or now - self._told_at > ECHO:
            self._impatient = True

    def _wait(self, seconds: float) -> bool:
        """Whether that time passed without a word to stop."""
        deadline = time.monotonic() + seconds
        while self._told_at is None and time.monotonic() < deadline:
            time.sleep(min(POLL, seconds))
        return self._told_at is None

    def _launch(self, words: Sequence[str]) -> Attempt:
        start = time.monotonic()
        with retried(str(self.folder.parent), self._exits) as made, Claim() as claim:
            exits = Path(made).resolve()
            with suppress(OSError):  # storage gone for a moment: then the next supervisor cannot tell that this one is alive
                claim.take(exits)
            launch = Launch(words, str(exits))
            try:
                self._attend(launch, exits)
            finally:
                launch.end()
            return Attempt(launch.process.wait(), statuses(exits), round(time.monotonic() - start, 1))

    def _exits(self) -> "tempfile.TemporaryDirectory[str]":
        """A folder beside the run's, so that ranks on other machines reach it too; the run's own must not exist before the run."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix=f".{self.folder.name}-", dir=self.folder.parent, ignore_cleanup_errors=True)

    def _attend(self, launch: "Launch", exits: Path) -> None:
        """Return once the launch has ended, or it is time to end it."""
        deadline, passed_on = float("inf"), False
        while launch.process.poll() is None and time.monotonic() < deadline and not self._impatient:
            if self._told_at is not None and not passed_on:
                passed_on, deadline = True, time.monotonic() + self.limits.stopping
                launch.stop()
            with suppress(OSError):  # then nothing is told yet: a healthy training does not end because its storage was away for a moment
                if set(told(exits).values()) - {0, SAVED}:
                    deadline = min(deadline, time.monotonic() + self.limits.failing)
            time.sleep(POLL)

    def _note(self, event: str, **what: Any) -> None:
        """Add a line to the journal, and say it."""
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": event, **what}
        self._lines.append(json.dumps(line))
        shown = ", ".join(f"{key} {' '.join(value) if isinstance(value, list) else value}" for key, value in what.items())
        with suppress(OSError):  # a log on storage that is away
            print(f"supervise: {event}: {shown}", file=sys.stderr, flush=True)
        with suppress(OSError):  # then with the next line
            retried(str(self.folder), self._write)

    def _write(self) -> None:
        if (self.folder / record.FILE).is_file():
            with open(self.folder / JOURNAL, "a", encoding="utf-8") as file:
                file.writelines(f"{text}\n" for text in self._lines)
            self._lines = []


class Marked:
    """The processes of this machine that tell how they end in such a folder (a regular expression), those whose parent has died too."""

    def __init__(self, exits: str):
        self._mark = re.compile(os.fsencode(f"{EXITS}={exits}"), re.DOTALL)

    def processes(self) -> list[int]:
        """Those that still live."""
        return sorted(self._environments())

    def leaders(self) -> list[int]:
        """Whom to tell to stop: the ranks, or all where there are none; not the helpers that they started, which would die of it."""
        found = self._environments()
        ranks = {process for process, held in found.items() if any(entry.startswith(b"RANK=") for entry in held)} or set(found)
        return sorted(process for process in ranks if _parent(process) not in ranks)

    def end(self) -> None:
        """End all that is left: SIGTERM, and SIGKILL after a few seconds."""
        for number, seconds in ((signal.SIGTERM, LAST_WORDS), (signal.SIGKILL, LAST_WORDS)):
            deadline = time.monotonic() + seconds
            for process in self.processes():
                _send(process, number)
            while self.processes() and time.monotonic() < deadline:
                time.sleep(POLL / 4)

    def _environments(self) -> dict[int, list[bytes]]:
        others = (entry for entry in _environments() if entry[0] != os.getpid())
        return {process: held for process, held in others if any(map(self._mark.fullmatch, held))}


class Launch(Marked):
    """A launched command in a process group of its own, and every process that came of it: they all carry its mark in their environment."""

    def __init__(self, words: Sequence[str], mark: str):
        super().__init__(re.escape(mark))
        # A launcher dies of SIGUSR1 and leaves its ranks behind. This one ignores it; so do its ranks, until they set their own handlers.
        usual = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        try:
            self.process = subprocess.Popen(list(words), env={**os.environ, EXITS: mark}, start_new_session=True)
        finally:
            signal.signal(signal.SIGUSR1, usual)

    def stop(self) -> None:
        """SIGTERM to the ranks, once each; without ranks, to the command."""
        for process in self.leaders() or [self.process.pid]:
            _send(process, signal.SIGTERM)

    def processes(self) -> list[int]:
        """Those that still live; where the system is not Linux, the command alone is known."""
        alive = self.process.poll() is None
        if not PROCESSES.is_dir():
            return [self.process.pid] if alive else []
        return super().processes()


class Orphans(Marked):
    """What a killed supervisor of a run left: processes, and the hidden folder in which they tell how they ended."""

    def __init__(self, run: Path):
        self._parent, self._name = run.parent.resolve(), re.compile(rf"\.{re.escape(run.name)}-[a-z0-9_]{{8}}")  # of tempfile
        super().__init__(re.escape(f"{self._parent}{os.sep}") + self._name.pattern)

    def check(self) -> None:
        """Raise ValueError where the supervisor of these processes lives."""
        for folder in self._folders():
            with Claim() as claim:
                if (holder := claim.take(folder)) is not None:
                    raise ValueError(f"supervise: {holder} supervises this run already; wait for it, or stop it with SIGTERM: it saves")

    def clear(self) -> None:
        """Remove the folders."""
        for folder in self._folders():
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()

    def _folders(self) -> list[Path]:
        """Those of that name with nothing in them but what supervised ranks leave."""
        found = [path for path in self._parent.glob(".*") if self._name.fullmatch(path.name) and path.is_dir()]
        return [path for path in found if all(re.fullmatch(rf"rank-\d+|{re.escape(FILE)}", part.name) for part in path.iterdir())]


def _environments() -> Iterator[tuple[int, list[bytes]]]:
    for path in PROCESSES.glob("[0-9]*/environ"):
        try:
            yield int(path.parent.name), path.read_bytes().split(b"\0")
        except OSError:  # it ended meanwhile, or is somebody else's
            continue


def _parent(process: int) -> int:
    try:
        return int((PROCESSES / str(process) / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _send(process: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, number)


def _step_of(state: Path) -> int:
    try:
        return int(json.loads(state.read_text(encoding="utf-8"))["step"])
    except (ValueError, KeyError, TypeError):
        return -1
    except OSError as error:
        if lasting(error):
            return -1
        raise


def main(words: Sequence[str]) -> int:
    """`[--budget N ...] -- COMMAND ...`; returns the exit status."""
    own, command = (list(words[: words.index("--")]), list(words[words.index("--") + 1 :])) if "--" in words else (list(words), [])
    limits = tyro.cli(Limits, args=own, prog="python -m meme_dist.supervise", description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    try:
        if not command:
            raise ValueError("supervise: no command; expected [options] -- accelerate launch ... -m meme_dist train RECIPE --run NAME")
        return Supervisor(command, limits).run()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return status_of(error)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
