"""The training loop: one optimiser step at a time, run alone or under `accelerate launch`."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, send_to_device
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from meme_dist.train import checkpoint, randomness, startup
from meme_dist.train.ema import Average
from meme_dist.train.guard import NonFiniteError, diagnose
from meme_dist.train.log import TRACKER, Log
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

    The update is that of (sum of the loss over all rows of the step) / batch_size, for any number of ranks and micro batches. Every rank
    runs the same lines; rank 0 writes. `folder` gets metrics.jsonl, TensorBoard's files and checkpoints/ (None: nothing is written).
    `configuration` is what else fixes the trajectory (a recipe's keywords): it must be equal on all ranks, and on resuming.

    One number pair (loss, gradient norm) is read from the device each step, so that nothing is updated from a value that is not finite;
    everything else is read on logged steps.

    Raises ValueError at the start where ranks disagree or the launch would train something else; NonFiniteError before a broken update.
    """

    def __init__(
        self,
        objective: nn.Module,
        stream: Steps,
        training: Training,
        *,
        folder: Path | None = None,
        configuration: Mapping[str, Any] | None = None,
    ):
        self.objective, self.stream, self.training = objective, stream, training
        self.folder = None if folder is None else Path(folder)
        self.step = 0
        self.settings = trajectory(training, configuration)
        startup.check_engine()
        self.accelerator = _accelerator(training, self.folder)
        startup.check_world(self.accelerator)
        startup.check_batch(training, self.accelerator.num_processes)
        objective.to(self.accelerator.device)
        startup.check_equal(self.accelerator, objective, self.settings)
        randomness.seed_everything(training.seed, self.rank)
        decay = training.weight_decay
        self.optimizer = torch.optim.AdamW(objective.parameters(), training.learning_rate, betas=training.betas, weight_decay=decay)
        self._wrapped, self._prepared = self.accelerator.prepare(objective, self.optimizer)
        startup.check_wrapped(self.accelerator, self._wrapped)
        self._average = None if training.ema is None else Average(objective, training.ema)
        self._averaging = False
        self._log = Log(self.folder, self.accelerator)
        self._logged = (0, time.perf_counter())  # step and time of the last log

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
        self.stream.step = self.step
        self._logged = (self.step, time.perf_counter())
        for micro_batches in self.stream:
            yield self._advance(micro_batches)
            if self.step >= self.training.steps:
                return

    def _advance(self, micro_batches: Sequence[Batch]) -> Report:
        self._require_live_weights()
        batches = [cast(Batch, send_to_device(batch, self.accelerator.device, non_blocking=True)) for batch in micro_batches]
        losses = self._backward(batches)
        norm = get_total_norm([p.grad for p in self._trained() if p.grad is not None])
        loss, norm_value = self._checked(batches, losses, norm)
        rate = self._update(norm)
        return self._report(losses, loss, norm_value, rate)

    def _backward(self, batches: Sequence[Batch]) -> list[Loss]:
        """Gradient of (sum over the rows of all ranks) / batch_size; DDP averages over ranks, hence the factor `world`."""
        scale = self.world / self.training.batch_size
        losses = []
        self._wrapped.train()
        self._prepared.zero_grad()  # here, not after the update: until the next step the gradient can be looked at
        for position, batch in enumerate(batches, 1):
            last = position == len(batches)
            with nullcontext() if last else self.accelerator.no_sync(self._wrapped):
                loss: Loss = self._wrapped(batch)
                self.accelerator.backward(loss.total * scale)
            losses.append(loss._replace(total=loss.total.detach()))
        return losses

    def _checked(self, batches: Sequence[Batch], losses: Sequence[Loss], norm: Tensor) -> tuple[float, float]:
        """Loss per row and gradient norm, read once; raises on all ranks before the update where one of them is not finite on any."""
        total = torch.stack([loss.total for loss in losses]).sum() / self.training.batch_size
        # NaN and infinity survive a sum over ranks, so that one reduction tells every rank.
        loss, mean_norm = self.reduce(torch.stack([total, norm.to(total) / self.world])).tolist()
        if math.isfinite(loss) and math.isfinite(mean_norm):
            return loss, mean_norm
        raise diagnose(self.objective, batches, losses, step=self.step + 1, total=loss, norm=mean_norm, gather=self.gather)

    def _update(self, norm: Tensor) -> float:
        rate = learning_rate(self.training, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.training.clip is not None:
            clip_grads_with_norm_(self._trained(), self.training.clip, norm)
        self._prepared.step()
        self.step += 1
        if self._average is not None:
            self._average.update(self.step)
        return rate

    def _trained(self) -> list[nn.Parameter]:
        """The trained parameters; raises ValueError for one without a gradient, which would leave other ranks waiting for ever."""
        named = [(name, p) for name, p in self.objective.named_parameters() if p.requires_grad]
        if idle := [name for name, p in named if p.grad is None]:
            raise ValueError(
                f"{', '.join(idle[:5])}: no part in the loss, so no gradient; every parameter must take part in every batch, with zero "
                "weight if need be (or set requires_grad to False)"
            )
        return [p for _, p in named]

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
    def averaged(self) -> Iterator[None]:
        """Within it the objective holds the weights to evaluate with: their moving average, if there is one. Collective.

        Buffers (running statistics) become those of rank 0, as in a checkpoint. Training or saving meanwhile raises ValueError.
        """
        if self.world > 1:
            for buffer in self.objective.buffers():
                torch.distributed.broadcast(buffer, 0)
        if self._average is None:
            yield
            return
        self._averaging = True
        try:
            with self._average.applied():
                yield
        finally:
            self._averaging = False

    # ---- keeping --------------------------------------------------------------------------------------------------------------------

    def save(self, folder: Path | None = None) -> None:
        """Write a checkpoint to `folder` (default: checkpoints/last of the run's folder). Collective; rank 0 writes, all wait.

        Raises OSError on all ranks where the disk is full; the checkpoint before it is then intact.
        """
        self._write(self._checkpoint_folder(folder, "last"), {})

    def save_best(self, value: float, folder: Path | None = None) -> bool:
        """Write checkpoints/best if `value` (higher is better, equal on all ranks) beats the one it was written with. Collective."""
        folder = self._checkpoint_folder(folder, "best")
        found = checkpoint.locate(folder) if self.is_main else None
        better = math.isfinite(value) and (found is None or value > checkpoint.read_state(found)["value"])
        better = bool(self.reduce(torch.tensor(float(better and self.is_main))).item())
        if better:
            self._write(folder, {"value": value})
        return better

    def resume(self, folder: Path | None = None) -> bool:
        """Continue exactly where a checkpoint was written; False where there is none (the run then starts from the beginning).

        Raises ValueError, before anything is changed, for a damaged file, another model, changed settings or another stream.
        """
        folder = self._checkpoint_folder(folder, "last")
        seen = self.reduce(torch.tensor(float(checkpoint.locate(folder) is not None))).item()
        if seen not in (0, self.world):
            raise ValueError(
                f"{folder}: {seen:.0f} of {self.world} ranks see a checkpoint here; it must be on storage that all of them share"
            )
        if seen:
            self._restore(folder, checkpoint.read(folder))
        self._log.rewind(self.step)
        return bool(seen)

    def close(self) -> None:
        """End the log's writers. The trainer can still be asked for its objective."""
        self._log.close()

    def _checkpoint_folder(self, folder: Path | None, name: str) -> Path:
        if folder is None and self.folder is None:
            raise ValueError("this trainer has no folder; say where: save(folder)")
        return Path(folder) if folder is not None else Path(self.folder or ".") / "checkpoints" / name

    def _write(self, folder: Path, extra: Mapping[str, Any]) -> None:
        self._require_live_weights()
        random = {name: self.gather(state).cpu() for name, state in randomness.capture().items()}
        problem = None
        if self.is_main:
            try:
                checkpoint.write(folder, self._checkpoint(random, extra))
            except Exception as error:  # whatever it is, the other ranks must not wait for it
                problem = error
        failed = self.reduce(torch.tensor(float(problem is not None))).item()  # and the barrier
        if problem is not None:
            raise problem
        if failed:
            raise OSError(f"{folder}: rank 0 could not write this checkpoint; its message says why")

    def _checkpoint(self, random: Mapping[str, Tensor], extra: Mapping[str, Any]) -> checkpoint.Checkpoint:
        tensors: dict[str, checkpoint.Tensors] = {
            "model": self.objective.state_dict(),
            "optimizer": checkpoint.optimizer_state(self.optimizer, self.objective),
            "random": random,  # one row a rank
        }
        if self._average is not None:
            tensors["ema"] = self._average.state_dict()
        stream = {**self.stream.state_dict(), "step": self.step}  # what was consumed, however far a loader has read ahead
        return checkpoint.Checkpoint(
            tensors, {"step": self.step, "settings": self.settings, "stream": stream, "world": self.world, **extra}
        )

    def _restore(self, folder: Path, saved: checkpoint.Checkpoint) -> None:
        checkpoint.check_settings(saved.state["settings"], self.settings, folder)
        checkpoint.check_tensors(saved.tensors["model"], self.objective.state_dict(), folder / "model.safetensors")
        self.stream.load_state_dict(saved.state["stream"])
        checkpoint.load_optimizer(self.optimizer, self.objective, saved.tensors["optimizer"], folder / "optimizer.safetensors")
        self.objective.load_state_dict(dict(saved.tensors["model"]))
        if self._average is not None:
            self._average.load_state_dict(dict(saved.tensors["ema"]))
        self.step = int(saved.state["step"])
        if saved.state["world"] == self.world:
            randomness.restore({name: states[self.rank] for name, states in saved.tensors["random"].items()})
        else:  # rows keep their noise (it is keyed by row, not by rank); what else is random starts afresh
            randomness.seed_everything(self.training.seed, self.rank, self.step)

    def _require_live_weights(self) -> None:
        if self._averaging:
            raise ValueError("the objective holds averaged weights; leave `averaged()` before training or saving")


def _accelerator(training: Training, folder: Path | None) -> Accelerator:
    precision = "bf16" if training.precision == "bf16" else "no"
    state = AcceleratorState._shared_state
    if state and state["_mixed_precision"] != precision:  # an earlier trainer of this process; Accelerate keeps one state for all
        AcceleratorState._reset_state()
    return Accelerator(
        cpu=not torch.cuda.is_available(),  # else a GPU-less launch of several processes trains several unconnected models
        mixed_precision=precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # micro batches are the trainer's own affair
        log_with=None if folder is None else TRACKER,
        project_dir=folder,
    )
