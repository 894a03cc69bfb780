"""Whole weights, gradients and optimiser state on every rank: one process alone, or DistributedDataParallel through Accelerate."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from meme_dist.train import randomness
from meme_dist.train.engines.base import Moments, TorchEngine, adam, autocast_forward, layout_of
from meme_dist.train.training import Training
from meme_dist.types import Batch, Loss


class Replicated(TorchEngine):
    """All ranks hold everything; gradients are averaged over ranks during the backward pass of the last micro batch."""

    name = "ddp"

    def __init__(self, objective: nn.Module, training: Training, accelerator: Accelerator):
        self.objective, self.layout, self.accelerator = objective, layout_of(objective), accelerator
        self._parameters = dict(objective.named_parameters())
        autocast_forward(objective, accelerator.device, training.precision)
        self.optimizer = adam(objective, training, fused=True)
        self.groups = accelerator.num_processes
        # One process alone under a launcher would get DDP too: nothing to exchange, and hooks that wait for the device.
        self.wrapped = objective if self.groups == 1 else cast(nn.Module, accelerator.prepare(objective))
        self._laid_out = self.groups == 1

    def forward(self, batch: Batch, *, last: bool) -> Loss:
        if not self._laid_out:
            self._lay_out(batch)
        with self._alone(last):
            return self.wrapped(batch)

    def _lay_out(self, batch: Batch) -> None:
        """DistributedDataParallel lays its buckets out anew after its first pass, in the order in which gradients came, and sums over three
        ranks or more are rounded by the layout. So a first pass is made and forgotten: else a resumed run's first step, which has the old
        layout, would not be the uninterrupted run's to the last bit."""
        self._laid_out = True
        with self.undisturbed():
            self.wrapped(batch).total.backward()
        self.require_gradients()  # before the next pass, in which DDP would say it in words of its own
        self.optimizer.zero_grad()

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Passes within it leave neither running statistics nor random state behind."""
        state, buffers = randomness.capture(), {name: x.clone() for name, x in self.objective.named_buffers()}
        try:
            yield
        finally:
            randomness.restore(state)
            for name, x in self.objective.named_buffers():
                x.copy_(buffers[name])

    def backward(self, loss: Tensor, *, last: bool) -> None:
        with self._alone(last):
            loss.backward()

    def _alone(self, last: bool) -> AbstractContextManager[Any]:
        """No exchange of gradients but in the last micro batch; DDP decides that in the forward pass."""
        return nullcontext() if last else self.accelerator.no_sync(self.wrapped)

    def squared_norm(self) -> Tensor:
        norm = get_total_norm([g for _, g in self.own_gradients()])
        self._norm = norm
        return norm.double().square() / self.accelerator.num_processes  # the same on all ranks

    def update(self, norm: float, clip: float | None) -> float:
        if clip is not None:
            clip_grads_with_norm_(self._parameters.values(), clip, self._norm)
        self.optimizer.step()
        return norm

    def part(self, name: str) -> Tensor:
        return self._parameters[name].detach()

    def whole(self, name: str, part: Tensor) -> Tensor:
        return part

    def cut(self, name: str, value: Tensor) -> Tensor:
        return value

    def moments(self, name: str) -> dict[str, Tensor]:
        return dict(self.optimizer.state.get(self._parameters[name], {}))

    @torch.no_grad()
    def load(self, name: str, value: Tensor, moments: Moments) -> None:
        parameter = self._parameters[name]
        parameter.copy_(value)
        self.optimizer.state[parameter] = {key: x.to(parameter.device, copy=True) for key, x in moments.items()}

    @contextmanager
    def evaluated(self, parts: Mapping[str, Tensor] | None) -> Iterator[nn.Module]:
        if parts is None:
            yield self.objective
            return
        kept = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._fill(parts)
        try:
            yield self.objective
        finally:
            self._fill(kept)

    @torch.no_grad()
    def _fill(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])
