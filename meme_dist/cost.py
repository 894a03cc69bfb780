"""What a training cost: `cost.jsonl` in a run's folder, one line for each time that it ran (a run that was resumed has several).

    {"step": 2000, "seconds", "cpu_seconds", "peak_bytes", "device_peak_bytes" (null without a GPU), "parameters"}

Seconds are those of the training loop alone, without evaluations; the rest is of one process, rank 0, and its loader's workers: CPU time
of all threads, the largest resident set and the most memory allocated on its GPU since the loop began. What a killed process did since
it started is in no line.
"""

import json
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

FILE = "cost.jsonl"
PROCESS = Path("/proc/self")  # Linux


class Meter:
    """Runs from when it is made."""

    def __init__(self) -> None:
        self._paused = _Clock(0.0, 0.0)
        _forget_peak()
        self._start = _clock()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time within it does not count; memory does."""
        before = _clock()
        try:
            yield
        finally:
            self._paused = self._paused.plus(_clock().minus(before))

    def read(self) -> dict[str, Any]:
        """What was spent so far."""
        spent = _clock().minus(self._start).minus(self._paused)
        device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        return {"seconds": spent.wall, "cpu_seconds": spent.cpu, "peak_bytes": _peak(), "device_peak_bytes": device}

    def write(self, folder: Path, *, step: int, parameters: int) -> None:
        """Append a line to the run's `cost.jsonl`."""
        with open(folder / FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **self.read(), "parameters": parameters}) + "\n")


class _Clock(NamedTuple):
    wall: float
    cpu: float

    def minus(self, other: "_Clock") -> "_Clock":
        return _Clock(self.wall - other.wall, self.cpu - other.cpu)

    def plus(self, other: "_Clock") -> "_Clock":
        return _Clock(self.wall + other.wall, self.cpu + other.cpu)


def _clock() -> _Clock:
    workers = resource.getrusage(resource.RUSAGE_CHILDREN)  # those that have ended
    return _Clock(time.perf_counter(), time.process_time() + workers.ru_utime + workers.ru_stime)


def _forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        (PROCESS / "clear_refs").write_text("5", encoding="ascii")  # the peak begins anew: man 5 proc
    except OSError:  # not Linux, or not allowed: then the peak is that of the process's whole life
        pass


def _peak() -> int:
    """The largest resident set in bytes. Linux's own `ru_maxrss` will not do: across exec it keeps what the parent had in memory."""
    try:
        lines = (PROCESS / "status").read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
