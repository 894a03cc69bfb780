"""The log of a run: metrics.jsonl, one flat JSON object a line, and the same numbers for TensorBoard. Rank 0 writes."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

from accelerate import Accelerator

from meme_dist.train.durable import replace

FILE = "metrics.jsonl"
TRACKER = "tensorboard"


class Log:
    """`write` appends {"step": 50, "loss": 81.2, "bound/photo": -40.1, ...}. Without a folder it writes nothing.

    `rewind` makes the log continue that of an interrupted run; without it an existing file is an error, since two runs would mix.
    """

    def __init__(self, folder: Path | None, accelerator: Accelerator):
        self._folder = folder if accelerator.is_main_process else None
        self._accelerator = accelerator
        self._resumed_at: int | None = None
        self._open = False

    def rewind(self, step: int) -> None:
        """Drop the lines past `step` (and a last line that was cut): the run is there again. The file is replaced atomically."""
        self._resumed_at = step
        if self._folder is not None and (path := self._folder / FILE).exists():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
            replace(path, "".join(f"{line}\n" for line in kept))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line; it has reached the operating system when this returns.

        Where a run goes on from, what is measured again replaces what was: a checkpoint may be from before a measurement of its step.
        """
        if self._folder is None:
            return
        if not self._open:
            self._start(self._folder)
        if step == self._resumed_at and (path := self._folder / FILE).exists():
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _step_of(line) != step or not values.keys() & json.loads(line).keys()]
            replace(path, "".join(f"{line}\n" for line in kept))
        with open(self._folder / FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        self._accelerator.log(dict(values), step=step)

    def note(self, step: int, text: str) -> None:
        """Append a line of words, {"step": 50, "note": "skipped: ..."}, and say it on standard error (rank 0)."""
        if self._folder is None:
            return
        if not self._open:
            self._start(self._folder)
        with open(self._folder / FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "note": text}) + "\n")
        print(f"step {step}: {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """End TensorBoard's writer."""
        if self._open:
            for tracker in self._accelerator.trackers:
                tracker.finish()
            self._open = False

    def _start(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if self._resumed_at is None and (folder / FILE).exists():
            raise ValueError(f"{folder / FILE}: the log of another run; resume that run, or give this one a folder of its own")
        purge = {} if self._resumed_at is None else {"purge_step": self._resumed_at + 1}
        self._accelerator.init_trackers(TRACKER, init_kwargs={TRACKER: purge})
        self._open = True


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
