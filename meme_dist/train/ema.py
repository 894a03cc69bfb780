"""The exponential moving average of an objective's weights."""

import torch
from torch import Tensor

from meme_dist.train.engines.base import Engine


def decay_at(decay: float, updates: int) -> float:
    """The decay of update number `updates` (from 1): min(decay, (1 + updates) / (10 + updates)).

    The rise keeps the first average from remembering the initial weights for 1 / (1 - decay) steps.
    """
    return min(decay, (1 + updates) / (10 + updates))


class Average:
    """average <- d * average + (1 - d) * weights after each update, with d = `decay_at`; it starts at the initial weights.

    Each rank averages what it holds of a parameter: where weights are sharded the average is too, and nothing is gathered. Parameters are
    averaged; buffers are always the live ones.
    """

    def __init__(self, engine: Engine, decay: float):
        self.engine, self.decay = engine, decay
        self.parts: dict[str, Tensor] = {name: engine.part(name).clone() for name in engine.names()}

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Take in the weights after update number `updates`."""
        live = [self.engine.part(name) for name in self.parts]
        torch._foreach_lerp_(list(self.parts.values()), live, 1 - decay_at(self.decay, updates))

    def load(self, name: str, value: Tensor) -> None:
        """Set a parameter's average from a whole tensor."""
        self.parts[name].copy_(self.engine.cut(name, value))
