"""The training loop: one optimiser step at a time, run alone or under `accelerate launch`, on whichever engine the launcher asked for."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from meme_dist.data.prefetch import prefetch
from meme_dist.train import checkpoint, randomness, startup
from meme_dist.train.ema import Average
from meme_dist.train.engines.build import build
from meme_dist.train.engines.strategy import requested
from meme_dist.train.guard import NonFiniteError, diagnose
from meme_dist.train.heartbeat import Heart, straggler
from meme_dist.train.keeper import Keeper
from meme_dist.train.log import Log
from meme_dist.train.signals import Stop
from meme_dist.train.spikes import SpikeDetector
from meme_dist.train.training import Training, learning_rate, trajectory
from meme_dist.types import Batch, Loss

__all__ = ["NonFiniteError", "Report", "Trainer", "Training"]


class Steps(Protocol):
    """What the trainer asks of a stream: `data.stream.Stream`, or anything that gives this rank's micro batches of each step."""

    step: int  # where iteration starts

    def __iter__(self) -> Iterator[Sequence[Batch]]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Report(NamedTuple):
    """One optimiser step over all ranks. `loss` is the mean over its rows, taken before the update.

    `terms` (means over the rows that have them) and `rows_per_second` (since the last log) are filled on logged steps only: `terms` is
    empty and `rows_per_second` NaN on the others.
    """

    step: int
    loss: float
    terms: Mapping[str, float]
    rows_per_second: float
    gradient_norm: float
    learning_rate: float


class Trainer:
    """Adam on an objective, fed by a stream. Iterating is training: each item is the report of one optimiser step, until `training.steps`.

    The update is that of (sum of the loss over all rows of the step) / batch_size, for any number of ranks and micro batches, on every
    engine. Every rank runs the same lines; rank 0 writes the log. `folder` gets metrics.jsonl, TensorBoard's files and checkpoints/ (None:
    nothing is written). `configuration` is what else fixes the trajectory (a recipe's keywords): it must be equal on all ranks, and on
    resuming, where a checkpoint older than a setting had what `defaults` says (as `configuration` does, the training's own under
    "training.NAME"). `stop` says when this process was told to stop: all ranks then do, after one step. `heart` is told where this rank is.

    A few numbers (loss, gradient norm, whether to stop) are read from the device each step, so that nothing is updated from a value that is
    not finite; everything else is read on logged steps.

    Raises ValueError at the start where ranks disagree or the launch would train something else; NonFiniteError before a broken update,
    once more steps than `training.skips` were broken and the run has gone back to a checkpoint `training.rollbacks` times.
    """

    def __init__(
        self,
        objective: nn.Module,
        stream: Steps,
        training: Training,
        *,
        folder: Path | None = None,
        configuration: Mapping[str, Any] | None = None,
        defaults: Mapping[str, Any] | None = None,
        stop: Stop | None = None,
        heart: Heart | None = None,
    ):
        self.objective, self.stream, self.training = objective, stream, training
        self.folder = None if folder is None else Path(folder)
        self.step = 0
        self.passed = 0  # steps of the stream that gave no update: skipped, or gone back over
        self.evaluated = 0  # the step whose evaluation `save_best` heard of last
        self.stopping = False  # all ranks agree: one of them was told to stop
        self.heart, self._stop = heart or Heart(None), stop or Stop()
        self.heart.listen(lambda: getattr(stream, "arrived", 0))  # not every stream reads
        self.settings, self._defaults = trajectory(training, configuration), trajectory(Training(), defaults)
        startup.check_launcher(startup.parent())
        strategy = requested()
        self.accelerator = startup.accelerator(self.folder)
        startup.check_world(self.accelerator)
        startup.check_batch(training, self.accelerator.num_processes)
        objective.to(self.accelerator.device)
        startup.check_equal(self.accelerator, objective, self.settings)
        randomness.seed_everything(training.seed, self.rank)
        self.engine = build(strategy, objective, training, self.accelerator)
        startup.check_engine("modality" if training.members > 1 else strategy.name, self.engine, self.world)
        self._average = None if training.ema is None else Average(self.engine, training.ema)
        self._averaging = False
        token = startup.token(self.gather)
        self._keeper = Keeper(self.engine, rank=self.rank, world=self.world, token=token, reduce=self.reduce, alive=self.heart.alive)
        self._saved: tuple[Path, int, int] | None = None  # the save before: where, and of which step
        self._log = Log(self.folder, self.accelerator)
        self._logged = (0, time.perf_counter())  # step and time of the last log
        self._spikes = SpikeDetector()
        self._skipped = self._gone_back = self._told = 0

    @property
    def rank(self) -> int:
        """This process's number, from 0."""
        return self.accelerator.process_index

    @property
    def world(self) -> int:
        """How many processes train together."""
        return self.accelerator.num_processes

    @property
    def is_main(self) -> bool:
        """Whether this rank writes."""
        return self.accelerator.is_main_process

    def reduce(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, on every rank. Collective."""
        return cast(Tensor, self.accelerator.reduce(tensor.to(self.accelerator.device), "sum"))

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all ranks [world, ...], on every rank; they have one shape. Collective."""
        return cast(Tensor, self.accelerator.gather(tensor.to(self.accelerator.device).unsqueeze(0)))

    # ---- stepping -------------------------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Report]:
        if self.step >= self.training.steps:
            return
        self._logged = (self.step, time.perf_counter())
        source, gone_back = self._source(), self._gone_back
        while self.step < self.training.steps and not self.stopping:
            if gone_back != self._gone_back:  # then the stream was set back too: begin to read anew
                source, gone_back = self._source(), self._gone_back
            with self._phase("data"):
                batches = next(source)
            report = self._advance(batches)
            if report is not None:
                yield report

    def _source(self) -> Iterator[list[Batch]]:
        self.stream.step = self.step + self.passed
        return prefetch(self.stream, self.accelerator.device)

    def _advance(self, batches: Sequence[Batch]) -> Report | None:
        """One step of the stream; None where it gave no update."""
        self._require_live_weights()
        losses = self._backward(batches)
        with self._phase("check"):
            loss, norm = self._agree(losses)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._pass_over(self._diagnosis(batches, losses, loss, norm))
            return None
        if self._jumped(loss):
            return None
        with self._phase("update"):
            rate, norm = self._update(norm)
        if not math.isfinite(norm):
            self._pass_over(self._diagnosis(batches, losses, loss, norm))
            return None
        return self._report(losses, loss, norm, rate)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """A part of a step, named for the watchdog and for profilers."""
        self.heart.beat(name, self.step)
        with record_function(f"meme/{name}"):
            yield

    def _backward(self, batches: Sequence[Batch]) -> list[Loss]:
        """Gradient of (sum over the rows of all ranks) / batch_size; engines average over groups of ranks, hence that factor."""
        scale = self.engine.groups / self.training.batch_size
        losses = []
        self.engine.begin()  # here, not after the update: until the next step the gradient can be looked at
        for position, batch in enumerate(batches, 1):
            last = position == len(batches)
            with self._phase("forward"):
                loss = self.engine.forward(batch, last=last)
            with self._phase("backward"):
                self.engine.backward(loss.total * scale, last=last)
            losses.append(loss._replace(total=loss.total.detach()))
        self.engine.require_gradients()
        return losses

    def _agree(self, losses: Sequence[Loss]) -> tuple[float, float]:
        """Loss per row and gradient norm of the step, the same on all ranks; one exchange, read once. Also whether to stop after it.

        NaN and infinity survive a sum over ranks, so that one reduction tells every rank.
        """
        rows = self.training.batch_size * self.engine.members  # as often as they are counted
        total = torch.stack([loss.total for loss in losses]).sum().double() / rows
        squared = self.engine.squared_norm().to(total)
        stop = torch.full_like(total, float(self._stop.requested))
        loss, squared_norm, stops = self.reduce(torch.stack([total, squared, stop])).tolist()
        self.stopping = stops > 0
        return loss, math.sqrt(squared_norm) if squared_norm >= 0 else math.nan

    def _update(self, norm: float) -> tuple[float, float]:
        rate = learning_rate(self.training, self.step)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        norm = self.engine.update(norm, self.training.clip)
        if math.isfinite(norm):
            self.step += 1
            if self._average is not None:
                self._average.update(self.step)
        return rate, norm

    # ---- steps that give no update ----------------------------------------------------------------------------------------------------

    def _diagnosis(self, batches: Sequence[Batch], losses: Sequence[Loss], loss: float, norm: float) -> NonFiniteError:
        return diagnose(self.engine, batches, losses, step=self.step + 1, total=loss, norm=norm, gather=self.gather)

    def _pass_over(self, error: NonFiniteError) -> None:
        """Skip a broken step, or go back to the last checkpoint and go on behind it, within their budgets; else raise it."""
        if self._skipped < self.training.skips:
            self.engine.discard()
            self._skipped, self.passed = self._skipped + 1, self.passed + 1
            self._log.note(self.step, f"skipped: {error}")
        elif not self._go_back(str(error)):
            raise error

    def _jumped(self, loss: float) -> bool:
        """Whether the loss jumped and the run went back for it; where it may not (any more), a jump is trained on."""
        return self.training.rollbacks > 0 and self._spikes.observe(loss) and self._go_back(f"the loss jumped to {loss:.6g}")

    def _go_back(self, why: str) -> bool:
        """Take weights, moments and averages from the last good checkpoint, and pass over the rows seen since; False if that is spent."""
        if self.folder is None or self._gone_back >= self.training.rollbacks:
            return False
        with self.heart.resting():  # a large checkpoint on slow storage is read for minutes
            found, _ = self._keeper.find(self._checkpoint_folder(None, "last"))
            if found is None:
                return False
            self.engine.discard()
            seen, gone_back, here = self.step + self.passed + 1, self._gone_back + 1, self.step
            self._restore(found, checkpoint.read(found))
        self.passed, self._gone_back, self._skipped = seen - self.step, gone_back, 0
        self._log.rewind(self.step)
        self._log.note(self.step, f"went back from step {here} to {self.step}: {why}")
        return True

    # ---- telling --------------------------------------------------------------------------------------------------------------------

    def _report(self, losses: Sequence[Loss], loss: float, norm: float, rate: float) -> Report:
        logged = self.step % self.training.log_every == 0 or self.step == self.training.steps
        if not logged:
            return Report(self.step, loss, {}, math.nan, norm, rate)
        terms = self._terms(losses)
        (step, then), now = self._logged, time.perf_counter()
        self._logged = (self.step, now)
        speed = (self.step - step) * self.training.batch_size / (now - then)
        self.log({"loss": loss, "gradient_norm": norm, "learning_rate": rate, "rows_per_second": speed, **terms})
        if late := straggler(self.gather(self.heart.times()).cpu()):
            self._log.note(self.step, late)
        return Report(self.step, loss, terms, speed, norm, rate)

    def _terms(self, losses: Sequence[Loss]) -> dict[str, float]:
        """Each term's mean over the rows of the step that have it; a term that none has is left out."""
        names = sorted(losses[0].terms)
        sums = torch.stack([torch.stack([torch.stack(loss.terms[name]) for name in names]) for loss in losses]).sum(0)
        return {name: total / count for name, (total, count) in zip(names, self.reduce(sums).tolist(), strict=True) if count}

    def log(self, values: Mapping[str, float]) -> None:
        """Add a line at the present step to metrics.jsonl and TensorBoard (rank 0)."""
        self._log.write(self.step, values)

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """Gives a module with the weights to evaluate with: their moving average, if there is one. Collective.

        It is the objective itself, or where that is sharded a whole copy for the while. Buffers (running statistics) are those of rank 0,
        as in a checkpoint. Training or saving meanwhile raises ValueError.
        """
        self.engine.broadcast_buffers()
        self._averaging = self._average is not None
        try:
            with self.engine.evaluated(None if self._average is None else self._average.parts) as module:
                yield module
        finally:
            self._averaging = False

    # ---- keeping --------------------------------------------------------------------------------------------------------------------

    def save(self, folder: Path | None = None, *, wait: bool = True) -> None:
        """Write a checkpoint to `folder` (default: checkpoints/last of the run's folder), each rank its share. Collective.

        Without `wait` it returns as soon as everything is copied, and the files are written meanwhile; `settle` (or the next save) says
        how that ended. A step just saved is not saved again. Raises OSError on all ranks where a disk is full; the one before is intact.
        """
        what = (self._checkpoint_folder(folder, "last"), self.step, self.passed)
        if what != self._saved:
            self._write(what[0], {}, wait=False, keep=self.training.keep)
            self._saved = what
        if wait:
            self.settle()

    def save_best(self, value: float, folder: Path | None = None, *, wait: bool = True) -> bool:
        """Write checkpoints/best if `value` (higher is better, equal on all ranks) beats the one it was written with. Collective."""
        folder = self._checkpoint_folder(folder, "best")
        self.settle()
        self.evaluated = self.step
        better = self.is_main and math.isfinite(value) and value > checkpoint.value_of(folder)
        better = bool(self.reduce(torch.tensor(float(better))).item())
        if better:
            self._write(folder, {"value": value}, wait=wait, keep=1)
        return better

    def settle(self) -> None:
        """Wait for a save that is under way. Collective; raises OSError on all ranks where it failed."""
        saved, self._saved = self._saved, None  # it stays so where the save failed
        self._keeper.wait()
        self._saved = saved

    def resume(self, folder: Path | None = None) -> bool:
        """Continue exactly where a checkpoint was written; False where there is none (the run then starts from the beginning).

        A damaged checkpoint is passed over for the one before it, and said in the log. Raises ValueError, before anything is changed, for
        checkpoints that are all damaged, another model, changed settings or another stream.
        """
        folder = self._checkpoint_folder(folder, "last")
        found, problems = self._keeper.find(folder)
        if found is not None:
            self._restore(found, checkpoint.read(found))
        self._log.rewind(self.step)
        for problem in problems:
            self._log.note(self.step, f"passed over a damaged checkpoint: {problem}")
        return found is not None

    def close(self) -> None:
        """End a save that is under way and the log's writers. The trainer can still be asked for its objective. Collective."""
        self.settle()
        self._log.close()

    def _checkpoint_folder(self, folder: Path | None, name: str) -> Path:
        if folder is None and self.folder is None:
            raise ValueError("this trainer has no folder; say where: save(folder)")
        return Path(folder) if folder is not None else Path(self.folder or ".") / "checkpoints" / name

    def _write(self, folder: Path, extra: Mapping[str, Any], *, wait: bool, keep: int) -> None:
        self._require_live_weights()
        self._share_damage()
        random = {name: self.gather(state).cpu() for name, state in randomness.capture().items()}  # one row a rank
        stream = {**self.stream.state_dict(), "step": self.step + self.passed}  # what was consumed, however far a loader has read ahead
        state = {"step": self.step, "evaluated": self.evaluated, "settings": self.settings, "stream": stream, "world": self.world}
        state |= {"passed": self.passed, "skipped": self._skipped, "gone_back": self._gone_back, "spikes": self._spikes.state_dict()}
        state |= {"engine": self.engine.remembered, **extra}
        self._keeper.save(folder, state, average=self._average, random=random, keep=keep)
        if wait:
            self.settle()

    def _share_damage(self) -> None:
        """Rows that could not be read, on every rank's list: each rank reads its own share, and a resumed run may cut it otherwise."""
        stream: Any = self.stream
        if not self.training.damaged:
            return
        lists: list[Any] = [list(stream.damaged)]
        if self.world > 1:
            lists *= self.world
            torch.distributed.all_gather_object(lists, list(stream.damaged))
        stream.admit([problem for each in lists for problem in each])
        for problem in stream.damaged[self._told :]:
            self._log.note(self.step, f"another row stands in for one that cannot be read: {problem}")
        self._told = len(stream.damaged)

    def _restore(self, folder: Path, saved: checkpoint.Checkpoint) -> None:
        state = saved.state
        checkpoint.check_settings(state["settings"], self.settings, folder, defaults=self._defaults)
        checkpoint.check_tensors(saved.tensors["model"], self.engine.layout.state, folder / "model.safetensors")
        self.stream.load_state_dict(state["stream"])
        self._told = len(state["stream"].get("damaged", []))  # the log has those
        self._keeper.restore(folder, saved, self._average)
        self.step, self.passed = int(state["step"]), int(state.get("passed", 0))
        self.evaluated = int(state.get("evaluated", self.step))
        self._skipped, self._gone_back = int(state.get("skipped", 0)), int(state.get("gone_back", 0))
        self._spikes.load_state_dict(state.get("spikes", SpikeDetector().state_dict()))
        self.engine.remember(state.get("engine", {}))
        if state["world"] == self.world:
            randomness.restore({name: states[self.rank] for name, states in saved.tensors["random"].items()})
        else:  # rows keep their noise (it is keyed by row, not by rank); what else is random starts afresh
            randomness.seed_everything(self.training.seed, self.rank, self.step)

    def _require_live_weights(self) -> None:
        if self._averaging:
            raise ValueError("the objective holds averaged weights; leave `averaged()` before training or saving")
