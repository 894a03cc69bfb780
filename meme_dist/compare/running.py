"""The runs of a comparison: each a process of its own, `python -m meme_dist train ...`, some at a time, none twice.

What is there decides what is done: a run with results is left alone, one that was interrupted is resumed, one that is trained is only
measured, and so is one that was measured otherwise than the plan asks. A run that fails leaves its log and the others go on. With
`judge="first"` runs are trained first and measured apart, by the classifiers of the first trained run's rows (`meme-dist evaluate
--judge`), as long as it has the same modalities; with a split other than test they are too, and no test row is looked at.

SIGTERM, SIGINT and SIGUSR1 are passed on to the runs, which save and end; the status is then 75 and the same command goes on. If this
process is killed its runs live on: the next one finds them by their environment and tells them to stop before it starts anything.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Literal, NamedTuple

from rich.console import Console

from meme_dist import record, supervise
from meme_dist.compare import cells, rivals
from meme_dist.compare.cells import Cell, Plan
from meme_dist.compare.planned import JUDGE, RUNS, alike, as_planned, judge_of, measured, otherwise
from meme_dist.compare.tabulation import LOGS
from meme_dist.data.source import check_local
from meme_dist.leave import naming
from meme_dist.report import REPORT
from meme_dist.run import DATA
from meme_dist.supervise import POLL, Attempt, Launch, Marked, reached, statuses, verdict
from meme_dist.train import durable
from meme_dist.train.claim import Claim
from meme_dist.train.signals import ECHO, EXITS, JOBS, SAVED

STOPPING = 600.0  # seconds for runs to save once they were told to stop
UNFINISHED = f"{record.FILE}{durable.UNFINISHED}"
THREADS = "OMP_NUM_THREADS"
DEVICES = "CUDA_VISIBLE_DEVICES"

What = Literal["train", "measure"]


@dataclass(frozen=True)
class Running:
    """Where and how runs are started."""

    out: Path
    """Folder of the comparison: new, or one to go on with."""
    data: Path = DATA
    """Folder in which shards and classifiers are written, once for each data set."""
    jobs: int = 1
    """Runs at a time. Each gets its share of the cores and, where there are several GPUs, one of them."""
    launch: str = ""
    """What starts each run instead of this Python, "accelerate launch --config_file FILE"; with several jobs, launches on one machine need
    ports of their own."""
    dry_run: bool = False
    """Say how far each run is, and start nothing."""


class Task(NamedTuple):
    """What is to be done next for a cell."""

    cell: Cell
    what: What


class Child(Launch):
    """A launch whose output goes to a file."""

    def __init__(self, words: Sequence[str], exits: Path, *, output: IO[bytes], environment: Mapping[str, str]):
        Marked.__init__(self, re.escape(str(exits)))
        surroundings = {**environment, EXITS: str(exits)}
        self.process = subprocess.Popen(list(words), env=surroundings, stdout=output, stderr=output, start_new_session=True)


class Attempted(NamedTuple):
    """A running task: its processes, its slot among the jobs, its log and when it began."""

    task: Task
    child: Child
    exits: Path
    slot: int
    since: float


class Runner:
    """Runs every cell of a plan. Within it the folder is this process's alone, and signals stop the runs."""

    def __init__(self, plan: Plan, running: Running, *, console: Console):
        if running.jobs < 1:
            raise ValueError(f"jobs: expected at least 1, got {running.jobs}")
        check_local(running.out)
        check_local(running.data)
        self.plan, self.folder, self.console = plan, running.out.resolve(), console
        self.running = replace(running, data=running.data.resolve())
        self.cells = plan.cells()
        self._claim = Claim()
        self._told_at: float | None = None
        self._passed_on = self._impatient = False
        self._failed: set[str] = set()
        self._active: list[Attempted] = []

    def check(self) -> None:
        """Refuse what could not go on in this folder (another judge, a run of other keywords or of more steps, files that are no run)
        and what would be no comparison: a model twice."""
        cells.check_split(self.plan)
        self._check_judge()
        for cell in self.cells:
            self._check(cell)
        rivals.check(self.plan)

    def how_far(self, cell: Cell) -> str:
        """A cell's state in words."""
        steps, step = cell.keywords["steps"], reached(self.path(cell))
        if self._is(cell, "measured"):
            return "measured"
        if self._has_results(cell):
            return "measured otherwise"
        if step < 0:
            return "not begun"
        return "trained, not measured" if step >= steps else f"at step {step:,} of {steps:,}"

    def __enter__(self) -> "Runner":
        self.check()
        with naming(self.folder):
            for name in (RUNS, LOGS):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            holder = self._claim.take(self.folder)
        if holder is not None:
            raise ValueError(f"{self.folder}: another comparison is at work here, {holder}; wait for it, or stop it")
        self._before = {number: signal.signal(number, self._noted) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for attempted in self._active:
            attempted.child.end()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        shutil.rmtree(self.folder / "exits", ignore_errors=True)
        self._claim.__exit__(kind, error, traceback)

    def run(self) -> int:
        """Until nothing is left to do; 0, 1 where something failed, 75 where it was told to stop."""
        self._stop_orphans()
        for cell in self.cells:  # not before: somebody else's processes may be making a run here
            self._clear(cell)
            self._tell_otherwise(cell)
        while True:
            self._reap()
            self._pass_on()
            while self._told_at is None and len(self._active) < self.running.jobs and (task := self._next()) is not None:
                self._start(task)
            if not self._active:
                break
            time.sleep(POLL)
        if self._told_at is not None:
            return SAVED
        return 1 if self._failed or not all(self._is(cell, "measured") for cell in self.cells) else 0

    # ---- what to do -------------------------------------------------------------------------------------------------------------------

    def path(self, cell: Cell) -> Path:
        """The run's folder."""
        return self.folder / RUNS / cell.run

    def _check(self, cell: Cell) -> None:
        """Refuse a run of other keywords, or of more steps."""
        folder = self.path(cell)
        if (folder / record.FILE).is_file():
            old = record.load(folder)
            try:
                record.check_unchanged(folder, old, self.plan.recipe, cell.keywords, cells.defaults(self.plan.recipe))
            except ValueError as error:
                raise ValueError(f"{error}. Or compare in another folder: --out FOLDER") from None
            if (step := reached(folder)) > cell.keywords["steps"]:
                raise ValueError(
                    f"{folder}: was trained for {step} steps, more than the {cell.keywords['steps']} it is asked for; "
                    f"give --steps {step} or more. Or compare in another folder: --out FOLDER"
                )
        elif folder.is_dir() and any(path.name != UNFINISHED for path in folder.iterdir()):
            raise ValueError(f"{folder}: expected a run, found files without {record.FILE}; move the folder away")

    def _clear(self, cell: Cell) -> None:
        """Clear away what a process left that was killed before it wrote its record."""
        folder = self.path(cell)
        if folder.is_dir() and not (folder / record.FILE).is_file():
            (folder / UNFINISHED).unlink(missing_ok=True)
            folder.rmdir()

    def _tell_otherwise(self, cell: Cell) -> None:
        if self._has_results(cell) and (how := otherwise(self.plan, cell, self.folder)):
            self.console.print(f"{cell.name}: was measured otherwise than the rest, and will be again: {how}", markup=False, soft_wrap=True)

    def _has_results(self, cell: Cell) -> bool:
        """Whether there are any, also such as were not measured as planned."""
        return measured(self.folder / RUNS / cell.folder, cell.keywords["steps"])

    def _is(self, cell: Cell, state: Literal["trained", "measured"]) -> bool:
        if state == "measured":
            return as_planned(self.plan, cell, self.folder)
        return self._has_results(cell) or cell.pool is None and reached(self.path(cell)) >= cell.keywords["steps"]

    def _check_judge(self) -> None:
        path = self.folder / cells.FILE
        before = json.loads(path.read_text(encoding="utf-8")).get("judge", Plan.judge) if path.is_file() else self.plan.judge
        if before != self.plan.judge:
            raise ValueError(
                f"{self.folder}: runs there were judged by classifiers of {before!r} rows, others would be by {self.plan.judge!r}; "
                f"add --judge {before}, or compare in another folder: --out FOLDER"
            )

    def _next(self) -> Task | None:
        """The first task in the order of cells that nothing stands in the way of."""
        busy = {attempted.task.cell.name for attempted in self._active}
        for task in map(self._task, [cell for cell in self.cells if cell.name not in busy and cell.name not in self._failed]):
            if task is not None and (task.what == "train" or self._may_measure(task.cell)):
                return task
        return None

    def _task(self, cell: Cell) -> Task | None:
        if self._is(cell, "measured"):
            return None
        if cell.pool is not None:
            trained = next(other for other in self.cells if other.name == cell.run)
            return Task(cell, "measure") if self._is(trained, "measured") else None
        return Task(cell, "measure" if self._has_results(cell) or self._apart and self._is(cell, "trained") else "train")

    @property
    def _apart(self) -> bool:
        """Whether runs are measured by commands of their own, not at the end of their training."""
        return self.plan.judge == "first" or self.plan.split != "test"

    def _judge(self) -> str | None:
        """The name of the run that judges: the first that is trained, once all before it have failed; the same while it is there."""
        if (name := judge_of(self.folder)) is not None:
            return name
        file = self.folder / JUDGE
        if file.is_file():
            gone = file.read_text(encoding="utf-8").strip()
            self.console.print(f"{file}: the run {gone!r}, whose rows judged, is gone; another one judges all runs, anew", soft_wrap=True)
            file.unlink()
        for cell in (cell for cell in self.cells if cell.pool is None):
            if self._is(cell, "trained"):
                file.write_text(f"{cell.name}\n", encoding="utf-8")
                return cell.name
            if cell.name not in self._failed:
                return None
        return None

    def _may_measure(self, cell: Cell) -> bool:
        """Whether the judge is known and its classifiers are there to take, or it is no other run's turn to train them."""
        if self.plan.judge == "own":
            return True
        judge, others = self._judge(), {other.name for other in self.cells} - {cell.name, *self._failed}
        return judge is not None and (judge not in others or any((self.folder / RUNS / judge).glob(f"**/{REPORT}")))

    def words(self, task: Task) -> list[str]:
        """The command, without what launches it."""
        folder, data = str(self.path(task.cell)), ["--data", str(self.running.data)]
        if task.what == "measure":
            words = ["evaluate", folder, *data, *([] if task.cell.pool is None else ["--pool", task.cell.pool])]
            words += [] if task.cell.split == "test" else ["--split", task.cell.split]
            judge = self.folder / RUNS / (self._judge() or "") if self.plan.judge == "first" else self.path(task.cell)
            return [*words, *(["--judge", str(judge)] if judge.name != task.cell.run and alike(judge, folder) else [])]
        rest = [*data, *(["--no-evaluate"] if self._apart else [])]
        if (self.path(task.cell) / record.FILE).is_file():
            known = {**cells.defaults(self.plan.recipe), **record.load(self.path(task.cell)).keywords}  # it may be older than a keyword
            return ["train", "--resume", folder, *cells.flags(task.cell.keywords, known), *rest]
        return ["train", self.plan.recipe, *cells.flags(task.cell.keywords, cells.defaults(self.plan.recipe)), "--run", folder, *rest]

    # ---- doing it ---------------------------------------------------------------------------------------------------------------------

    def _start(self, task: Task) -> None:
        slot = min(set(range(self.running.jobs)) - {attempted.slot for attempted in self._active})
        words = [*(shlex.split(self.running.launch) or [sys.executable]), "-m", "meme_dist", *self.words(task)]
        exits = self.folder / "exits" / task.cell.name
        shutil.rmtree(exits, ignore_errors=True)
        exits.mkdir(parents=True)
        with open(self.folder / LOGS / f"{task.cell.name}.log", "ab") as log:
            log.write(f"$ {shlex.join(words)}\n".encode())
            log.flush()
            child = Child(words, exits, output=log, environment=surroundings(slot, self.running.jobs, os.environ, gpus()))
        self._active.append(Attempted(task, child, exits, slot, time.monotonic()))
        self._say(task, "began")

    def _reap(self) -> None:
        """Settle what has ended; what is left of its processes is ended too."""
        for attempted in [a for a in self._active if a.child.process.poll() is not None]:
            attempted.child.end()
            self._active.remove(attempted)
            seconds = time.monotonic() - attempted.since
            attempt = Attempt(attempted.child.process.wait(), statuses(attempted.exits), seconds)
            what = verdict(attempt, stopped=self._told_at is not None)
            self._settle(attempted.task, what if what != "stopped" or self._told_at is not None else "crash", attempt)

    def _settle(self, task: Task, what: str, attempt: Attempt) -> None:
        complete = self._is(task.cell, "trained" if task.what == "train" and self._apart else "measured")
        if what == "done" and complete:
            self._say(task, f"done in {attempt.seconds:.0f} s")
        elif self._told_at is not None:
            self._say(task, "stopped")
        else:
            self._failed.add(task.cell.name)
            self._say(task, f"FAILED with status {attempt.status}; it said last:")
            log = (self.folder / LOGS / f"{task.cell.name}.log").read_text(encoding="utf-8", errors="replace").splitlines()
            for line in log[-5:]:
                self.console.print(f"    {line}", markup=False, soft_wrap=True)

    def _say(self, task: Task, text: str) -> None:
        done = sum(self._is(cell, "measured") for cell in self.cells)
        self.console.print(f"{done}/{len(self.cells)}  {task.cell.name}, {task.what}: {text}", markup=False, soft_wrap=True)

    # ---- stopping ---------------------------------------------------------------------------------------------------------------------

    def _noted(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._told_at is None:
            self._told_at = now
        elif number == signal.SIGINT or now - self._told_at > ECHO:
            self._impatient = True

    def _pass_on(self) -> None:
        """Tell the runs to stop, once; end them where they take too long, or where it was asked for twice."""
        if self._told_at is None:
            return
        if not self._passed_on:
            self._passed_on = True
            for attempted in self._active:
                attempted.child.stop()
        if self._impatient or time.monotonic() - self._told_at > STOPPING:
            for attempted in self._active:
                attempted.child.end()

    def _stop_orphans(self) -> None:
        """Runs of a comparison that was killed: they save and end before anything is started."""
        orphans, deadline = orphans_of(self.folder), time.monotonic() + STOPPING
        if orphans:
            self.console.print(f"{self.folder}: stopping what a killed comparison left: {', '.join(map(str, orphans))}", soft_wrap=True)
        for process in orphans:
            supervise._send(process, signal.SIGTERM)
        while (left := orphans_of(self.folder)) and self._told_at is None:
            if time.monotonic() > deadline:
                raise ValueError(f"{self.folder}: what a killed comparison left does not end; kill {' '.join(map(str, left))}")
            time.sleep(POLL)


def orphans_of(folder: Path) -> list[int]:
    """Processes that were started for this comparison, told by their environment: ranks if there are any, and no workers of theirs."""
    return Marked(re.escape(f"{folder / 'exits'}{os.sep}") + ".*").leaders()


def surroundings(slot: int, jobs: int, environment: Mapping[str, str], devices: int) -> dict[str, str]:
    """The environment of a run: with several jobs its share of the cores (unless the user says how many) and one of several GPUs."""
    found = dict(environment)
    if jobs > 1:
        found.setdefault(THREADS, str(max(1, (os.cpu_count() or 1) // jobs)))
        found[JOBS] = str(jobs)
        visible = environment.get(DEVICES, ",".join(map(str, range(devices)))).split(",")
        if len(visible) > 1:
            found[DEVICES] = visible[slot % len(visible)]
    return found


def gpus() -> int:
    """GPUs of this machine."""
    import torch

    return torch.cuda.device_count()
