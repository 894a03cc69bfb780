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
        """Within it, the module with these whole parameters and the live module's mode and buffers, of modalities that this rank holds.

        Those that it gave up (modality parallelism) have constants alone, which the copy has kept.
        """
        mine = dict(self._module.named_parameters())
        for name, value in values:
            mine[name].data = value.detach()
        live = dict(self._live.named_buffers())
        for name, buffer in self._module.named_buffers():
            if name in live:
                buffer.data = live[name].detach().clone()
        self._module.train(self._live.training)
        try:
            yield self._module
        finally:
            self._free()

    def _free(self) -> None:
        for parameter in self._module.parameters():
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
