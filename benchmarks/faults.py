"""Every fault that a training should survive, provoked for real on tiny trainings: what was said, what was lost, and how long it took.

*Jobs.* Two ranks on the CPU train `linear_gaussian`, launched by torchrun under `meme_dist.supervise`, and one rank does itself the harm
that the plan holds for it: SIGKILL at random steps, death within the write of a checkpoint, a full disk (the device `/dev/full`), hanging,
SIGTERM. One run goes through all of them, launch after launch. Where it goes on, the files of its checkpoint are compared with those of a
run that nobody disturbed (weights, moments, random states), and at its end too.

*Shards.* See `benchmarks.damage`.

Seconds: `detected` from the fault to the first word of it, an error or the end of the job; `again` from the fault until one step is
trained again, with all that ending and starting processes takes. The supervisor's pause is 0.1 s here and 10 s usually, the watchdog's
patience 4 s here and 300 s usually.
"""

import functools
import itertools
import json
import math
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import damage
from benchmarks.record import CPU, keep
from meme_dist.data.stream import Stream
from meme_dist.supervise import progress
from meme_dist.train import checkpoint
from meme_dist.train.heartbeat import Heart

STEPS, SAVE_EVERY, ROWS = 180, 5, 64  # of a job; rows a step
KILLED = range(12, 96, 6)  # SIGKILL comes up to two steps behind some of these: between two there is time to resume
PATIENCE, INTERVAL = 4.0, 0.4  # seconds of the jobs' heartbeat; 300 and 10 usually
LONGEST = 300.0  # seconds that a job may take
HERE = Path(__file__).parents[1]
Row = dict[str, Any]


def main(*, kills: int = 5, folder: Path | None = None, save: bool = True) -> None:
    """Provoke each fault: three and a half minutes on two cores, four where they are busy.

    Args:
        kills: How often a rank is killed, at random steps.
        folder: A new folder for the runs and all that they said (said.txt); by default they are thrown away.
        save: Append the rows to benchmarks/results/faults.jsonl.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        runs = (folder or Path(temporary)).resolve()
        measured = [*damage.measured(runs / "shards"), *of_jobs(runs / "jobs", kills)]
    show(measured)
    if save:
        print(f"kept in {keep('faults', measured, device=CPU, threads=1)}")


# ---- jobs: what is to happen, and what happened ------------------------------------------------------------------------------------------


class Fault(NamedTuple):
    """What a rank does to itself in which step, and a pattern for the first words that tell of it."""

    name: str
    step: int
    rank: int
    told: str


DEAD = r"failed \(exitcode: -9\) local_rank: \d"


def planned(kills: int, seed: int = 0) -> list[Fault]:
    """The faults of one run, in the order of their steps."""
    dice = random.Random(seed)
    steps = [step + dice.randrange(3) for step in sorted(dice.sample(KILLED, kills))]
    deaths = [Fault("SIGKILL of a rank", step, dice.randrange(2), DEAD) for step in steps]
    return [
        *deaths,
        Fault("full disk", 101, 0, "no space left.*|another rank could not write.*"),
        Fault("SIGKILL in the write of a checkpoint", 116, 1, DEAD),
        Fault("torn checkpoint", 129, 1, "passed over a damaged checkpoint.*"),
        Fault("hanging rank", 146, 1, "no rank has moved.*"),
        Fault("SIGTERM to a rank", 160, 1, "supervise: stopped.*"),
    ]


NAN = Fault("NaN on one rank", 15, 1, "skipped: .*")


def note(folder: Path, event: str, **what: Any) -> None:
    """Add a line to the events of a job; ranks and launches share the file."""
    with open(folder / "events.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"event": event, "time": time.time(), **what}) + "\n")


def events(folder: Path, kind: str) -> list[Row]:
    """The events of one kind so far."""
    path = folder / "events.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def pending(folder: Path) -> Fault | None:
    """The fault whose turn it is; None where all of the plan has happened."""
    plan = [Fault(*entries) for entries in json.loads((folder / "plan.json").read_text(encoding="utf-8"))]
    return next(itertools.islice(plan, len(events(folder, "provoked")), None), None)


def outcome(fault: Fault, happened: float, lines: Sequence[tuple[float, str]], back: Row | None, again: float) -> Row:
    """One result: `lines` with their times are what the job said, `back` the event of the launch that went on (None: it never ended)."""
    found = ((at, re.search(fault.told, line)) for at, line in lines if at >= happened)
    told, message = next(((at, match[0]) for at, match in found if match), (math.nan, ""))
    lost = {} if back is None else {"steps_again": max(0, back["reached"] - back["step"]), "same": back["same"]}
    seconds = {"detected_s": round(told - happened, 2), "again_s": round(again - happened, 2)}
    return {"part": "job", "fault": fault.name, "step": fault.step, "message": re.sub(r"/\S*/run/", "run/", message), **lost, **seconds}


def of_jobs(folder: Path, kills: int) -> list[Row]:
    """A run that is left alone, one that goes through the plan, and one with NaN; one result a fault."""
    whole, parts, odd = (folder / name for name in ("whole", "parts", "odd"))
    job(whole, [], "--keep", "999")
    plan = planned(kills)
    lines = job(parts, plan)
    back = [{**event, "same": event["sums"] == sums_at(whole, event["step"])} for event in events(parts, "start")]
    after = [event["time"] for event in events(parts, "again")]
    happened = [event["time"] for event in events(parts, "provoked")]
    launches = sum("supervise: launch" in line for _, line in lines)
    if (len(happened), launches) != (len(plan), len(plan) + 1):
        raise RuntimeError(
            f"expected {len(plan)} faults, a launch after each, got {len(happened)} and {launches} launches:\n{_last(lines)}"
        )
    found = [outcome(*one[:2], lines, *one[2:]) for one in zip(plan, happened, back[1:], after[1:], strict=True)]
    ended = sums_at(parts, STEPS) == sums_at(whole, STEPS) is not None
    return [{**row, "same_end": ended} for row in found] + [_nan(odd)]


def _nan(folder: Path) -> Row:
    lines = job(folder, [NAN], "--skips", "1", "--steps", "30")
    (provoked,), (_, again) = events(folder, "provoked"), events(folder, "again")
    saved = checkpoint.read(folder / "run" / "checkpoints" / "last")
    finite = all(bool(x.isfinite().all()) for x in saved.tensors["model"].values())
    row = outcome(NAN, provoked["time"], lines, None, again["time"])
    return {**row, "rows_passed_over": ROWS * saved.state["passed"], "finite": finite, "steps": saved.state["step"]}


def sums_at(folder: Path, step: int) -> Row | None:
    """Checksums of the files of a job's checkpoint at this step: equal where all of it is, bit by bit."""
    last = folder / "run" / "checkpoints" / "last"
    found = (checkpoint.read_state(path) for path in (last, *checkpoint.older(last)) if (path / checkpoint.STATE).is_file())
    return next((dict(state["sha256"]) for state in found if state["step"] == step), None)


# ---- jobs: their processes ---------------------------------------------------------------------------------------------------------------


def job(folder: Path, plan: Sequence[Fault], *settings: str) -> list[tuple[float, str]]:
    """Supervise two ranks until they are done, starting the supervisor again wherever it ended before; all that was said, with times."""
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    words = ["--steps", str(STEPS), "--batch-size", str(ROWS), "--save-every", str(SAVE_EVERY), "--log-every", "1", "--no-evaluate"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--", "benchmarks.faults"]
    train = ["train", "linear_gaussian", "--run", str(folder / "run"), "--data", str(folder.parent / "data"), *words, *settings]
    supervisor = [sys.executable, "-m", "meme_dist.supervise", "--pause", "0.1", "--again", "--", *launcher, str(folder), *train]
    said: list[tuple[float, str]] = []
    for _ in range(len(plan) + 1):
        if _said(supervisor, said) == 0:  # else it was told to stop, or somebody had to make room on the disk: start it again
            (folder / "said.txt").write_text("".join(f"{at:.2f} {line}" for at, line in said), encoding="utf-8")
            return said
    raise RuntimeError(f"the job did not come to its end:\n{_last(said)}")


def _last(said: Sequence[tuple[float, str]]) -> str:
    return "".join(line for _, line in said[-40:])


def _said(command: Sequence[str], said: list[tuple[float, str]]) -> int:
    """Run a command, add its lines to `said` as they come, and return its exit status."""
    here = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(HERE)}
    with subprocess.Popen(command, env=os.environ | here, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        watch = threading.Timer(LONGEST, process.terminate)
        watch.start()
        try:
            said.extend((time.time(), line) for line in process.stdout or ())
        finally:
            watch.cancel()
            process.terminate()
        return process.wait()


def rank(folder: Path, words: Sequence[str]) -> None:
    """What torchrun starts: `meme-dist train` with a quick watchdog and a stream that provokes the next fault."""
    from meme_dist import __main__, run

    run.Heart = functools.partial(Heart, patience=PATIENCE, interval=INTERVAL)  # type: ignore[misc,assignment]
    Stream.__iter__ = provoking(folder, Stream.__iter__)
    sys.argv[1:] = words
    __main__.program()


def provoking(folder: Path, iterate: Callable[[Stream], Iterator[Any]]) -> Callable[[Stream], Iterator[Any]]:
    """`Stream.__iter__` with the pending fault in its step; rank 0 notes where a launch starts and when it has trained a step."""

    def steps(stream: Stream) -> Iterator[Any]:
        start, fault = stream.step, pending(folder)
        reached = folder / "reached"
        if stream.rank == 0:
            before = int(reached.read_text()) if reached.is_file() else 0
            note(folder, "start", step=start, reached=before, sums=sums_at(folder, start))
        for batches in iterate(stream):
            if stream.rank == 0:
                reached.write_text(str(stream.step - 1))
                if stream.step == start + 2 or fault and fault.name == NAN.name and stream.step == fault.step + 2:
                    note(folder, "again")
            if fault and (stream.rank, stream.step) == (fault.rank, fault.step):
                PROVOKE[fault.name](Scene(folder, batches, fault.name))
            yield batches

    return steps


# ---- jobs: the faults --------------------------------------------------------------------------------------------------------------------


class Scene(NamedTuple):
    """Where a fault happens: the job's folder, and the batches of the step."""

    folder: Path
    batches: Any
    name: str

    def happens(self) -> None:
        """Note the moment."""
        note(self.folder, "provoked", name=self.name)


def _kill(here: Scene) -> None:
    here.happens()
    os.kill(os.getpid(), signal.SIGKILL)


def _stop(here: Scene) -> None:
    here.happens()
    os.kill(os.getpid(), signal.SIGTERM)


def _hang(here: Scene) -> None:
    here.happens()
    time.sleep(3600)


def _spoil(here: Scene) -> None:
    here.happens()
    next(packed for packed in here.batches[0].modalities.values() if len(packed.data)).data.fill_(math.nan)


def _fill_disk(here: Scene) -> None:
    """The next file of a checkpoint goes to a device on which there is never any space."""

    def write(path: Path, content: bytes) -> str:
        here.happens()
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(content)
        return ""

    checkpoint._write_file = write


def _die_writing(here: Scene) -> None:
    """The next file of a checkpoint is written to its half."""

    def write(path: Path, content: bytes) -> str:
        path.write_bytes(content[: len(content) // 2])
        _kill(here)
        return ""

    checkpoint._write_file = write


def _tear(here: Scene) -> None:
    """A file of the newest checkpoint is cut and the process gone, as where a machine loses its power."""
    last = here.folder / "run" / "checkpoints" / "last"
    while progress(here.folder / "run") < 125:
        time.sleep(0.01)
    file = next(last.glob("model*.safetensors"))
    os.truncate(file, file.stat().st_size // 2)
    _kill(here)


PROVOKE: Mapping[str, Callable[[Scene], None]] = {
    "SIGKILL of a rank": _kill,
    "full disk": _fill_disk,
    "SIGKILL in the write of a checkpoint": _die_writing,
    "torn checkpoint": _tear,
    "hanging rank": _hang,
    "SIGTERM to a rank": _stop,
    NAN.name: _spoil,
}


# ---- figures -----------------------------------------------------------------------------------------------------------------------------


def show(measured: Sequence[Row]) -> None:
    """A line a fault: median and range where it happened several times."""
    for name in dict.fromkeys(row["fault"] for row in measured):
        rows = [row for row in measured if row["fault"] == name]
        keys = [key for key in rows[0] if key not in ("part", "fault", "message", "detected_s", "again_s", "step")]
        rest = {key: rows[0][key] if len(rows) == 1 else [row[key] for row in rows] for key in keys}
        print(f"{name}: detected {spread(rows, 'detected_s')}, again {spread(rows, 'again_s')}; {rest}\n    {rows[0]['message']}")


def spread(rows: Sequence[Row], key: str) -> str:
    """Median of some seconds, and their range where there are several."""
    seconds = [row[key] for row in rows if key in row]
    if not seconds:
        return "-"
    middle = f"{statistics.median(seconds):.3g} s"
    return middle if len(seconds) == 1 else f"{middle} ({min(seconds):.3g} to {max(seconds):.3g})"


if __name__ == "__main__":
    rank(Path(sys.argv[1]), sys.argv[2:])
