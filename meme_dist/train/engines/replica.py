"""An ordinary module beside a sharded one: it takes whole weights for an evaluation and holds none otherwise."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from meme_dist.train.engines.base import autocast_forward


class Replica:
    """A copy of the objective, made before it is sharded. Evaluation calls more of it than `forward` (encoders, decoders, priors), and a
    sharded module gathers its weights for `forward` alone. Between evaluations its parameters take no memory; within, one whole model."""

    def __init__(self, module: nn.Module, device: torch.device, precision: str):
        self._live, self._module = module, copy.deepcopy(module)
        autocast_forward(self._module, device, precision)
        self._free()

    @contextmanager
    def filled(self, values: Iterable[tuple[str, Tensor]]) -> Iterator[nn.Module]:
        """Within it, the module with these whole parameters and the live module's buffers and mode."""
        mine = dict(self._module.named_parameters())
        for name, value in values:
            mine[name].data = value.detach()
        for buffer, live in zip(self._module.buffers(), self._live.buffers(), strict=True):
            buffer.data = live.detach().clone()
        self._module.train(self._live.training)
        try:
            yield self._module
        finally:
            self._free()

    def _free(self) -> None:
        for parameter in self._module.parameters():
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
