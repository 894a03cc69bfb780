"""Who stands still, and who is slow.

A rank that hangs makes all others wait in their next collective, for an hour (`startup.LIMIT`) and without a word about whom they wait
for. Here every rank has a watchdog thread that notes in a small file where its main thread is. Once no rank has moved for
`patience` seconds, each names the ranks that are behind, prints what all its threads are doing and ends its process, so that the launcher
takes the job down and a supervisor can start it again.
"""

import contextlib
import faulthandler
import json
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from meme_dist.train.signals import tell

FOLDER = "heartbeats"  # in the run's folder
HUNG = 124  # exit status of a process that its watchdog ended, that of timeout(1)
PATIENCE = 300.0  # seconds without a move; far below the limit of collectives, which names nobody
INTERVAL = 10.0  # seconds between two looks: one small file written a rank
KINDS = ("data", "forward")  # phases that a rank goes through on its own; from the backward pass on it waits for others
SLOW = 1.5  # a straggler takes this many times the median
NOTICED = 0.01  # seconds a step that a straggler loses at least


class Standing(NamedTuple):
    """Where a rank stands: calls of `beat` so far, step and phase of the last, seconds since it moved and since its file was written."""

    rank: int
    beats: int
    step: int
    where: str
    idle: float
    silent: float = 0.0
    host: str = ""
    pid: int = 0


class Heart:
    """A rank's note of where it is, and its watchdog. Use it as a context: the thread ends with it.

    The main thread calls `beat` at every phase of a step; all ranks make the same calls, so that whoever made fewer is behind. Slow work
    of another kind says `alive()` now and then, or runs within `resting()` where it cannot. `folder` is the run's (None: this rank watches
    itself alone); it must be on storage that all ranks share, or a rank takes the others for gone.

    Time in which the process was stopped as a whole (a suspended job) does not count. The watchdog needs Python's global lock: a rank
    that never gives it back is ended by the other ranks' watchdogs, which see that it is silent.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        rank: int = 0,
        world: int = 1,
        patience: float = PATIENCE,
        interval: float = INTERVAL,
        end: Callable[[int], object] = os._exit,
    ):
        if not 0 < interval < patience:
            raise ValueError(f"interval: expected seconds between 0 and the patience of {patience}, got {interval}")
        self.folder = None if folder is None else Path(folder) / FOLDER
        self.rank, self.world, self.patience, self.interval, self.end = rank, world, patience, interval, end
        self.beats, self.step, self.where = 0, 0, "start"
        self._moved, self._resting, self._idle = True, 0, 0.0
        self._since, self._seconds, self._steps = time.perf_counter(), dict.fromkeys(KINDS, 0.0), 0
        self._count, self._counted = (lambda: 0), 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)

    def __enter__(self) -> "Heart":
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        if self.folder is not None:
            _file(self.folder, self.rank).unlink(missing_ok=True)

    # ---- the main thread ------------------------------------------------------------------------------------------------------------

    def beat(self, where: str, step: int) -> None:
        """The main thread enters a phase of a step: "data", "forward", ... The time since the last call is counted for the phase before."""
        now = time.perf_counter()
        if self.where in self._seconds:
            self._seconds[self.where] += now - self._since
            self._steps += self.where == KINDS[0]
        self._since, self.where, self.step = now, where, step
        self.beats += 1
        self._moved = True

    def alive(self) -> None:
        """The main thread is at work on something slow."""
        self._moved = True

    def listen(self, count: Callable[[], int]) -> None:
        """While `count` changes the main thread waits for something that moves, such as shards that arrive, in its loader workers too."""
        self._count = count

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """Within it nothing is suspected: for work of any length that cannot say `alive`, on this rank or on one that it waits for."""
        self._resting += 1
        try:
            yield
        finally:
            self._resting -= 1
            self._moved = True

    def times(self) -> Float[Tensor, "2"]:
        """Seconds a step that this rank waited for data and spent in its forward pass, means since the last call; for `straggler`.

        On a GPU the forward pass is only launched in that time; a rank whose device is slow shows where launching outruns it.
        """
        found = torch.tensor([self._seconds[kind] / max(1, self._steps) for kind in KINDS])
        self._seconds, self._steps = dict.fromkeys(KINDS, 0.0), 0
        return found

    # ---- the watchdog ---------------------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._ended.wait(self.interval):
            before, elapsed = (now := time.monotonic()), now - before
            heard, self._counted = (count := self._count()) != self._counted, count
            moved, self._moved = self._moved or self._resting > 0 or heard, False
            self._idle = 0.0 if moved else self._idle + min(elapsed, 2 * self.interval)
            standings = self._look()
            if min(standing.idle for standing in standings) >= self.patience:
                self._alarm(standings)
                return

    def _look(self) -> list[Standing]:
        """Note where this rank stands and, where it is suspicious itself, read where the others do."""
        own = Standing(self.rank, self.beats, self.step, self.where, self._idle, 0.0, socket.gethostname(), os.getpid())
        if self.folder is None:
            return [own]
        try:
            write(self.folder, own)
            return read(self.folder, self.rank, self.world) if self._idle >= self.patience else [own]
        except OSError:  # storage that fails must not end a training that runs: this rank is left to itself
            return [own]

    def _alarm(self, standings: Sequence[Standing]) -> None:
        text = f"rank {self.rank} of {self.world}: no rank has moved for {self.patience:.0f} s. {behind(standings, self.interval)} "
        text += f"This process ends with status {HUNG}; what its threads are doing:\n"
        os.write(2, text.encode(errors="replace"))  # not through sys.stderr: a thread that hangs may hold its lock
        faulthandler.dump_traceback(2, all_threads=True)
        tell(HUNG)
        self.end(HUNG)


def write(folder: Path, standing: Standing) -> None:
    """Replace a rank's file: a reader sees the old one or the new one."""
    path = _file(folder, standing.rank)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(standing._asdict()), encoding="utf-8")
    partial.replace(path)


def read(folder: Path, rank: int, world: int) -> list[Standing]:
    """Where all ranks of this training stand; one whose file is missing or says something else is not heard of.

    Ages are differences of files' times: no clocks are compared.
    """
    newest = _file(folder, rank).stat().st_mtime
    found = []
    for other in range(world):
        path = _file(folder, other)
        try:
            standing = _parsed(path.read_bytes(), other)
            silent = max(0.0, newest - path.stat().st_mtime)
        except FileNotFoundError:
            standing, silent = _unheard(other, "no heartbeat file"), math.inf
        found.append(standing._replace(idle=standing.idle + silent, silent=silent))
    return found


def _parsed(content: bytes, rank: int) -> Standing:
    """What a rank's file says: that of a machine that lost power may be empty, and anything may lie there under its name."""
    try:
        standing = Standing(**json.loads(content))
        idle = float(standing.idle)
        if isinstance(standing.beats, int) and standing.beats >= 0 and idle >= 0:  # NaN is neither
            return standing._replace(rank=rank, idle=idle)
    except (ValueError, TypeError, OverflowError, RecursionError):
        pass
    return _unheard(rank, "no heartbeat file that can be read")


def _unheard(rank: int, why: str) -> Standing:
    return Standing(rank, -1, 0, why, math.inf)


def behind(standings: Sequence[Standing], interval: float = INTERVAL) -> str:
    """A sentence that names the ranks behind: those that made the fewest calls, and those whose watchdog has fallen silent too."""
    least, most = (bound(standing.beats for standing in standings) for bound in (min, max))
    late = [s for s in standings if s.beats == least < most or s.silent > 3 * interval]
    front = max(standings, key=lambda standing: standing.beats)
    if not late:
        return f"All of them are in step {front.step}, {front.where}: a collective, the network, or storage that all of them wait for."
    named = "; ".join(_described(standing, interval) for standing in late)
    return f"Behind: {named}. The others wait in step {front.step}, {front.where}."


def _described(standing: Standing, interval: float) -> str:
    if standing.beats < 0:
        return f"rank {standing.rank} ({standing.where}: it ended, or does not share the run's folder)"
    place = f"step {standing.step}, {standing.where}, process {standing.pid} on {standing.host}"
    quiet = f", its watchdog silent for {standing.silent:.0f} s: stopped, or its machine gone" if standing.silent > 3 * interval else ""
    return f"rank {standing.rank} ({place}{quiet})"


def straggler(times: Float[Tensor, "world 2"]) -> str | None:
    """A line that names the slowest rank, from `Heart.times` of all ranks (seconds a step), or None where they are alike.

    A rank is a straggler in a phase that takes it more than 1.5 times the (lower) median of all ranks, and 10 ms a step longer.
    """
    lines = []
    for kind, column in zip(KINDS, times.double().T, strict=True):
        median, slowest = float(column.median()), int(column.argmax())
        seconds = float(column[slowest])
        if seconds > SLOW * median and seconds - median > NOTICED:
            lines.append(f"{kind} takes rank {slowest} {seconds:.3f} s a step, the median rank {median:.3f} s{_ratio(seconds, median)}")
    return "straggler: " + "; ".join(lines) if lines else None


def _ratio(seconds: float, median: float) -> str:
    return f" ({seconds / median:.1f} times)" if median > 0 else ""


def _file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.json"
