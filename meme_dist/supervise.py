"""`python -m meme_dist.supervise -- accelerate launch ... -m meme_dist train RECIPE --run NAME`: start a training again whenever it dies.

Always a new launch of everything, with `--resume NAME` added once the run exists: ranks that torchrun restarts in place can meet what the
attempt before left in its rendezvous, and hang. What became of an attempt is told by its ranks, since launchers end with 1 for everything:

    every rank ended with 0                 done                            0
    a rank ended with 2                     a mistake of the caller's       2, not tried again
    ranks ended with 75                     told to stop, and saved         75, for the batch system to start it again
    anything else                           a crash                         tried again, after a pause that doubles

A crash that left no newer checkpoint than the crash before it uses up the budget; progress fills it again. SIGTERM, SIGUSR1 and SIGINT are
passed on to the ranks themselves as SIGTERM, never to the launcher: torchrun would give them 30 seconds, and it dies of SIGUSR1.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NamedTuple

import tyro

from meme_dist import record
from meme_dist.flags import value_of
from meme_dist.leave import MISTAKE, status_of
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
    """How a launch ended: the launcher's exit status, that of each rank that left one, and the seconds that it ran."""

    status: int
    ranks: Mapping[int, int]
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


def verdict(attempt: Attempt, *, stopped: bool) -> Verdict:
    """What became of a launch. `stopped`: it was told to stop, so that however it ended, whoever told it decides about what follows."""
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
        words = resuming(self.command, self.folder) if self.limits.again else self.command
        crashes = 0
        while True:
            step = progress(self.folder)
            self._note("launch", step=step, command=words)
            attempt = self._launch(words)
            what = verdict(attempt, stopped=self._told_at is not None)
            crashes = 0 if what != "crash" or progress(self.folder) > step else crashes + 1
            self._note(what, step=progress(self.folder), status=attempt.status, ranks=dict(attempt.ranks), seconds=attempt.seconds)
            if what != "crash":
                return {"done": 0, "mistake": MISTAKE, "stopped": SAVED}[what]
            if crashes > self.limits.budget:
                self._note("hopeless", crashes=crashes)
                return 1
            if not self._wait(pause(self.limits, crashes)):
                return SAVED
            words = resuming(self.command, self.folder)

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
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        # Beside the run's folder, so that ranks on other machines reach it too; the folder itself must not exist before the run.
        with tempfile.TemporaryDirectory(prefix=f".{self.folder.name}-", dir=self.folder.parent, ignore_cleanup_errors=True) as exits:
            exits = str(Path(exits).resolve())
            launch = Launch(words, exits)
            try:
                self._attend(launch, Path(exits))
            finally:
                launch.end()
            return Attempt(launch.process.wait(), told(Path(exits)), round(time.monotonic() - start, 1))

    def _attend(self, launch: "Launch", exits: Path) -> None:
        """Return once the launch has ended, or it is time to end it."""
        deadline, passed_on = float("inf"), False
        while launch.process.poll() is None and time.monotonic() < deadline and not self._impatient:
            if self._told_at is not None and not passed_on:
                passed_on, deadline = True, time.monotonic() + self.limits.stopping
                launch.stop()
            if set(told(exits).values()) - {0, SAVED}:
                deadline = min(deadline, time.monotonic() + self.limits.failing)
            time.sleep(POLL)

    def _note(self, event: str, **what: Any) -> None:
        """Add a line to the journal, and say it."""
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": event, **what}
        self._lines.append(json.dumps(line))
        shown = ", ".join(f"{key} {' '.join(value) if isinstance(value, list) else value}" for key, value in what.items())
        print(f"supervise: {event}: {shown}", file=sys.stderr, flush=True)
        if (self.folder / record.FILE).is_file():
            with open(self.folder / JOURNAL, "a", encoding="utf-8") as file:
                file.writelines(f"{text}\n" for text in self._lines)
            self._lines = []


class Launch:
    """A launched command in a process group of its own, and every process that came of it: they all carry its mark in their environment."""

    def __init__(self, words: Sequence[str], mark: str):
        self._mark = f"{EXITS}={mark}".encode()
        # A launcher dies of SIGUSR1 and leaves its ranks behind. This one ignores it; so do its ranks, until they set their own handlers.
        usual = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        try:
            self.process = subprocess.Popen(list(words), env={**os.environ, EXITS: mark}, start_new_session=True)
        finally:
            signal.signal(signal.SIGUSR1, usual)

    def stop(self) -> None:
        """SIGTERM to the ranks, once each and not to their helpers (a loader's worker would die of it); without ranks, to the command."""
        for process in self._ranks() or [self.process.pid]:
            _send(process, signal.SIGTERM)

    def end(self) -> None:
        """End all that is left: SIGTERM, and SIGKILL after a few seconds."""
        for number, seconds in ((signal.SIGTERM, LAST_WORDS), (signal.SIGKILL, LAST_WORDS)):
            deadline = time.monotonic() + seconds
            for process in self.processes():
                _send(process, number)
            while self.processes() and time.monotonic() < deadline:
                time.sleep(POLL / 4)

    def processes(self) -> list[int]:
        """The processes of this launch that still live on this machine, those whose parent has died too."""
        if not PROCESSES.is_dir():  # not Linux: the command alone is known
            return [self.process.pid] if self.process.poll() is None else []
        self.process.poll()
        return [process for process, environment in _environments() if self._mark in environment]

    def _ranks(self) -> list[int]:
        marked = {process: environment for process, environment in _environments() if self._mark in environment}
        ranks = {process for process, environment in marked.items() if any(entry.startswith(b"RANK=") for entry in environment)}
        return sorted(process for process in ranks if _parent(process) not in ranks)


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
    try:
        os.kill(process, number)
    except ProcessLookupError:
        pass


def _step_of(state: Path) -> int:
    try:
        return int(json.loads(state.read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return -1


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
