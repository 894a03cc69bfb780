"""A loss that jumps: a running mean and variance, and the question whether the next loss still belongs to them."""

import math
from collections.abc import Mapping
from typing import Any

THRESHOLD = 8.0  # standard deviations above the running mean
MEMORY = 100  # steps over which mean and variance are averaged
WARMUP = 100  # losses to see before the first alarm
FLOOR = 1e-6  # least deviation, in shares of the mean: what rounding does to a constant loss is no jump


class SpikeDetector:
    """Tells a jump of the loss from its noise, one loss a step. Fed with the loss over all ranks, every rank comes to the same answer.

        alarm  <=>  loss > mean + threshold * deviation,     mean, variance: exponential averages with decay 1 - 1 / memory

    with the averages corrected for their start as in Adam. Only upward: a falling loss lies below its running mean. A loss beyond the
    threshold enters the averages as if it stood on it, so that a single spike does not hide the next, and a loss that stays on a higher
    level is accepted after some steps. A loss that is not finite is always an alarm and enters nothing.
    """

    def __init__(self, *, threshold: float = THRESHOLD, memory: int = MEMORY, warmup: int = WARMUP):
        if not (threshold > 0 and memory > 1 and warmup > 1):
            raise ValueError(f"expected a threshold above 0, memory and warm-up above 1, got {threshold}, {memory} and {warmup}")
        self.threshold, self.memory, self.warmup = threshold, memory, warmup
        self.seen, self._mean, self._variance = 0, 0.0, 0.0

    def observe(self, loss: float) -> bool:
        """Whether this loss is a spike; it becomes part of what the next one is compared with."""
        if not math.isfinite(loss):
            return True
        spike = self.seen >= self.warmup and loss > self.limit
        self._average(min(loss, self.limit) if spike else loss)
        return spike

    @property
    def mean(self) -> float:
        """The running mean of the losses; NaN before the first."""
        return self._mean if self.seen else math.nan

    @property
    def deviation(self) -> float:
        """The running standard deviation, of losses from the mean before them, at least a millionth of it; NaN before the second loss."""
        if self.seen < 2:
            return math.nan
        weight = 1 - (1 - 1 / self.memory) ** (self.seen - 1)
        return max(math.sqrt(self._variance / weight), FLOOR * abs(self._mean))

    @property
    def limit(self) -> float:
        """The highest loss that is no spike."""
        return self.mean + self.threshold * self.deviation

    def _average(self, loss: float) -> None:
        """Mean with the weights of an exponential average that started empty; the variance around the mean before each loss."""
        rate = 1 / self.memory
        self.seen += 1
        if self.seen == 1:
            self._mean = loss
            return
        surprise = loss - self._mean
        self._variance = (1 - rate) * self._variance + rate * surprise * surprise
        self._mean += surprise * rate / (1 - (1 - rate) ** self.seen)

    def state_dict(self) -> dict[str, Any]:
        """Three numbers, for the JSON of a checkpoint; they come back exactly."""
        return {"seen": self.seen, "mean": self._mean, "variance": self._variance}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.seen, self._mean, self._variance = int(state["seen"]), float(state["mean"]), float(state["variance"])
