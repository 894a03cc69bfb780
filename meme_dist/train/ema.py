"""The exponential moving average of an objective's weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def decay_at(decay: float, updates: int) -> float:
    """The decay of update number `updates` (from 1): min(decay, (1 + updates) / (10 + updates)).

    The rise keeps the first average from remembering the initial weights for 1 / (1 - decay) steps.
    """
    return min(decay, (1 + updates) / (10 + updates))


class Average:
    """average <- d * average + (1 - d) * weights after each update, with d = `decay_at`; it starts at the initial weights.

    Parameters are averaged; buffers are always the live ones.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.module, self.decay = module, decay
        self.parameters = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Take in the weights after update number `updates`."""
        weight = 1 - decay_at(self.decay, updates)
        torch._foreach_lerp_(list(self.parameters.values()), [p.detach() for p in self.module.parameters()], weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the module holds the average; the weights come back bit by bit."""
        kept = [p.detach().clone() for p in self.module.parameters()]
        _fill(self.module, list(self.parameters.values()))
        try:
            yield
        finally:
            _fill(self.module, kept)

    def state_dict(self) -> dict[str, Tensor]:
        """A whole state of the module, with the averages in place of its parameters."""
        average_of: dict[Tensor, Tensor] = {p: self.parameters[name] for name, p in self.module.named_parameters()}  # tied: two names each
        live: dict[str, Tensor] = self.module.state_dict(keep_vars=True)
        return {name: average_of[value] if value in average_of else value.detach() for name, value in live.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take the averages out of a whole state of the module."""
        for name, average in self.parameters.items():
            average.copy_(state[name])


@torch.no_grad()
def _fill(module: nn.Module, values: list[Tensor]) -> None:
    for parameter, value in zip(module.parameters(), values, strict=True):
        parameter.copy_(value)
