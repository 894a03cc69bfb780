"""Where the time of a training step goes: the trainer's own ranges, its operator calls and launches, and communication that nothing hides.

One step through the real trainer and stream, as PyTorch's profiler sees it on rank 0. The ranges are the trainer's (`meme/data` and so on);
what lies in none of them is `other`. `data` is the wait for the next rows; `copy`, on CUDA alone, is the device's time for copies from the
host, which run beside the computing. Exposed communication is the time in which a collective runs and nothing computes: on a CUDA device
NCCL's kernels without another kernel beside them, on a CPU gloo's work without an operator beside it.
"""

import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks import digits
from benchmarks.ranks import run_ranks
from meme_dist.train.trainer import Trainer, Training

RANGES = ("data", "forward", "backward", "check", "update")  # of the trainer, in its order
PREFIX = "meme/"
COLLECTIVES = ("gloo:", "nccl", "c10d::")  # gloo's work, NCCL's kernels, and the calls that ask for either
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
WARM = 20  # a recorded step has its room by then

Interval = tuple[float, float]


def breakdown(*, world: int, batch_size: int, steps: int = 10, graph: bool = True) -> list[dict[str, Any]]:
    """The row of a training on `world` ranks, in ms a step; more than one rank are processes of this machine. `graph`: as `Training`'s."""
    with tempfile.TemporaryDirectory() as folder:
        shards = digits.write(Path(folder) / "digits")
        settings = (shards, batch_size, steps, graph)
        found = stepped(0, 1, *settings) if world == 1 else run_ranks(stepped, world, *settings)[0]
    return [{"part": "breakdown", "world": world, "batch_size": batch_size, "graph": graph, **found}]


def stepped(rank: int, world: int, shards: Path, batch_size: int, steps: int, graph: bool = True) -> dict[str, float]:
    """On a rank: train, and profile `steps` steps after the first ones."""
    training = Training(steps=WARM + steps + 1, batch_size=batch_size, log_every=10**6, graph=graph)
    trainer = digits.trainer(shards, training, rank, world)
    return profiled(trainer, steps)


def profiled(trainer: Trainer, steps: int) -> dict[str, float]:
    """Milliseconds of each range a step and what else the profiler saw, of the trainer's next steps. The profiler's own cost is in them."""
    reports = iter(trainer)
    for _ in range(WARM):
        next(reports)
    cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    with profile(activities=[ProfilerActivity.CPU, *cuda], acc_events=True) as profiler:
        start = time.perf_counter()
        for _ in range(steps):
            next(reports)
        if cuda:
            torch.cuda.synchronize()
        wall = 1e3 * (time.perf_counter() - start)
    return {name: round(value / steps, 3) for name, value in summary(list(profiler.events() or []), wall).items()}


def summary(events: Sequence[Any], wall: float) -> dict[str, float]:
    """Sums over all the profiled steps: ms of each range, of what is in none, of communication; calls and launches."""
    spent = {name: sum(_ms(event) for event in events if _is_range(event, name)) for name in RANGES}
    device = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    copies = [event for event in device if event.name.startswith("Memcpy HtoD")]
    device = [event for event in device if not event.name.startswith(("Memcpy", "Memset"))]
    calls = [event for event in events if event.device_type == DeviceType.CPU and _is_call(event)]
    kernels = device or calls
    talking = [event for event in device or events if event.name.startswith(("nccl",) if device else ("gloo:",))]
    computing = [event for event in kernels if not event.name.startswith(COLLECTIVES)]
    exposed = minus(union(map(_interval, talking)), union(map(_interval, computing)))
    return {
        "wall_ms": wall,
        **{f"{name}_ms": value for name, value in spent.items()},
        "copy_ms": length(union(map(_interval, copies))),
        "other_ms": max(0.0, wall - sum(spent.values())),
        "collective_ms": length(union(map(_interval, talking))),
        "exposed_ms": length(exposed),
        "operator_calls": len(calls),
        "kernel_launches": sum(event.name.startswith(LAUNCHES) for event in events),
    }


def _is_range(event: Any, name: str) -> bool:
    return event.name == PREFIX + name and event.device_type == DeviceType.CPU


def _is_call(event: Any) -> bool:
    """An operator that Python, autograd or an optimiser called, not one that another operator is made of."""
    parent = event.cpu_parent
    return event.name.startswith("aten::") and not (parent is not None and parent.name.startswith("aten::"))


def _ms(event: Any) -> float:
    return event.time_range.elapsed_us() / 1e3


def _interval(event: Any) -> Interval:
    return event.time_range.start / 1e3, event.time_range.end / 1e3


# ---- intervals --------------------------------------------------------------------------------------------------------------------------


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same points in time, as intervals that do not touch, in order."""
    merged: list[Interval] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((begin, end))
    return merged


def minus(left: Sequence[Interval], right: Sequence[Interval]) -> list[Interval]:
    """What of the left is not in the right; both as `union` gives them."""
    return [piece for interval in left for piece in _without(interval, right)]


def _without(interval: Interval, holes: Iterable[Interval]) -> Iterator[Interval]:
    begin, end = interval
    for low, high in holes:
        if high <= begin or low >= end:
            continue
        if low > begin:
            yield begin, low
        begin = high
    if begin < end:
        yield begin, end


def length(intervals: Iterable[Interval]) -> float:
    """Of all of them together."""
    return sum(end - begin for begin, end in intervals)


# ---- telling ----------------------------------------------------------------------------------------------------------------------------


def show(rows: Sequence[dict[str, Any]]) -> None:
    """One line a number of ranks."""
    names = [name for name in rows[0] if name != "part"]
    lines = [[name.removesuffix("_ms") for name in names], *([f"{float(row[name]):.4g}" for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print("\nbreakdown of a training step through the trainer (digits), ms a step, profiler on")
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
