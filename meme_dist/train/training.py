"""The settings of a training run, and what follows from them by arithmetic: learning rates and the fields that fix a trajectory."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

# What may change between a run and its continuation: when it is looked at, and how the work is laid out on a machine. (Micro batches and
# ranks change sums by rounding alone; `steps` is free as long as the schedule does not read it.)
FREE = ("log_every", "evaluate_every", "save_every", "keep", "damaged", "skips", "rollbacks", "workers", "accumulate", "members", "graph")


@dataclass(frozen=True)
class Training:
    """How an objective is trained. All counts of steps are optimiser steps.

    Raises ValueError for a value out of range.
    """

    steps: int = 2000
    """Optimiser steps in all."""
    batch_size: int = 128
    """Rows of an optimiser step, over all processes and micro batches together."""
    learning_rate: float = 5e-4
    """The highest learning rate of the schedule (Adam)."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """What the learning rate does after the warm-up: stay, or fall to zero at the last step."""
    warmup: int = 0
    """Steps over which the learning rate rises linearly from zero."""
    members: int = 1
    """Processes that share one copy of the model, each with the networks of some modalities (modality parallelism)."""
    accumulate: int = 1
    """Micro batches of an optimiser step, on each process: less memory, the same update."""
    clip: float | None = None
    """Largest global norm of the gradient (of the loss per row); longer ones are scaled down to it."""
    ema: float | None = None
    """Decay of the exponential moving average of the weights, for evaluation; for example 0.999."""
    precision: Literal["float32", "bf16"] = "float32"
    """bf16: networks under autocast; densities, weights and optimiser stay float32."""
    seed: int = 0
    """Seed of data order, noise and weights."""
    log_every: int = 50
    """Steps between two lines of metrics.jsonl."""
    evaluate_every: int = 500
    """Steps between two evaluations."""
    save_every: int = 500
    """Steps between two checkpoints."""
    keep: int = 2
    """Checkpoints that are kept: the last one and those before it, for the case that it is damaged. The best one is kept apart."""
    damaged: int = 0
    """How many training rows may be unreadable (cut, altered, undecodable): each is named, and another row stands in its place. 0: stop."""
    skips: int = 0
    """How many steps may pass without an update because their loss or gradient is not finite, before the run goes back or stops."""
    rollbacks: int = 0
    """How often the run may go back to its last checkpoint, and pass over the rows since, where it would stop otherwise."""
    workers: int | None = None
    """Loader processes of each training process; none: up to four where a GPU would wait for rows, no process of its own on a CPU."""
    graph: bool = True
    """One process on a GPU: forward and backward pass as one CUDA graph, launched at once. Without effect elsewhere."""
    weight_decay: float = 0.0
    """Decoupled weight decay (AdamW), on every trained tensor."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates of the first and second moment."""

    def __post_init__(self) -> None:
        positive = ("steps", "batch_size", "learning_rate", "accumulate", "log_every", "evaluate_every", "save_every", "keep", "members")
        for name in positive:
            _require(getattr(self, name) > 0, name, getattr(self, name), "a number above 0")
        for name in ("warmup", "seed", "weight_decay", "damaged", "skips", "rollbacks"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        _require(self.workers is None or self.workers >= 0, "workers", self.workers, "0 or more, or none")
        _require(self.clip is None or self.clip > 0, "clip", self.clip, "a norm above 0, or none")
        _require(self.ema is None or 0 < self.ema < 1, "ema", self.ema, "a decay between 0 and 1, or none")
        _require(all(0 <= beta < 1 for beta in self.betas), "betas", self.betas, "two numbers in [0, 1)")
        _require(self.schedule in ("constant", "cosine", "linear"), "schedule", self.schedule, "constant, cosine or linear")
        _require(self.precision in ("float32", "bf16"), "precision", self.precision, "float32 or bf16")


def learning_rate(training: Training, step: int) -> float:
    """The learning rate of the update that leads from `step` to `step + 1`.

    rate = learning_rate * min(1, (step + 1) / warmup) * shape((step - warmup) / (steps - warmup)), with shape(t) = 1, (1 + cos(pi t)) / 2
    or 1 - t, and t = 0 during the warm-up. A pure function of the step: there is no schedule state to save.
    """
    rise = min(1.0, (step + 1) / training.warmup) if training.warmup else 1.0
    if training.schedule == "constant":
        return training.learning_rate * rise
    progress = min(1.0, max(0, step - training.warmup) / max(1, training.steps - training.warmup))
    fall = (1 + math.cos(math.pi * progress)) / 2 if training.schedule == "cosine" else 1 - progress
    return training.learning_rate * rise * fall


def trajectory(training: Training, configuration: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The settings that fix what a run computes: those of the training, and the caller's own (a recipe's keywords), without `FREE` ones.

    Two runs with equal trajectories and equal data make the same updates; a checkpoint is only continued under its own.
    """
    free = (*FREE, "steps") if training.schedule == "constant" else FREE
    settings = {f"training.{name}": value for name, value in dataclasses.asdict(training).items() if name not in free}
    settings |= {name: value for name, value in _flat(configuration or {}) if name.removeprefix("training.") not in free}
    return settings


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs = []
    for name, value in values.items():
        nested = isinstance(value, Mapping)
        pairs += _flat(value, f"{prefix}{name}.") if nested else [(f"{prefix}{name}", value)]
    return pairs


def _require(holds: bool, name: str, value: Any, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
