"""Modality parallelism as an engine: each member of a group holds the networks of some modalities, groups see different rows."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.utils import clip_grads_with_norm_

from meme_dist.objectives.base import Objective
from meme_dist.train.engines.base import Moments, TorchEngine, adam, autocast_forward, layout_of
from meme_dist.train.engines.replica import Replica
from meme_dist.train.modality_parallel import ModalityParallel
from meme_dist.train.training import Training
from meme_dist.types import Batch, Loss


class Placed(TorchEngine):
    """A parameter's part is the whole of it on the member that owns its modality, and an empty tensor on the others.

    Raises ValueError for an objective with buffers (running statistics of one member's modalities would differ between groups), and as
    `ModalityParallel` does.
    """

    name = "modality"

    def __init__(self, objective: nn.Module, training: Training, device: torch.device, *, world: int):
        kept = objective.state_dict()  # without constants, which are buffers that no checkpoint holds
        if buffers := [name for name, _ in objective.named_buffers() if name in kept]:
            raise ValueError(f"{', '.join(buffers[:5])}: modality parallelism cannot keep running statistics; use group or layer norm")
        self.objective, self.layout = objective, layout_of(objective)
        self._replica = Replica(objective, device, training.precision)
        self.members, self.groups = training.members, world // training.members
        mesh = init_device_mesh(device.type, (self.groups, self.members), mesh_dim_names=("data", "modality"))
        self.wrapped = ModalityParallel(cast(Objective, objective), mesh)
        self._within, self._device = mesh.get_group("modality"), device
        self._parameters = dict(objective.named_parameters())
        self._owner = {name: self.wrapped.assignment[name.split(".")[1]] for name in self.names()}
        autocast_forward(self.wrapped, device, training.precision)
        self.optimizer = adam(objective, training)

    def forward(self, batch: Batch, *, last: bool) -> Loss:
        return self.wrapped(self.wrapped.needed(batch))

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()
        if last:
            self.wrapped.synchronise_gradients()

    def squared_norm(self) -> Tensor:
        self._norm = self.wrapped.gradient_norm()
        return self._norm.double().square() / (self.groups * self.members)  # the same on all ranks

    def update(self, norm: float, clip: float | None) -> float:
        if clip is not None:
            clip_grads_with_norm_(self._parameters.values(), clip, self._norm)
        self.optimizer.step()
        return norm

    def part(self, name: str) -> Tensor:
        like = self.layout.state[name]
        return self._parameters[name].detach() if name in self._parameters else torch.empty(0, dtype=like.dtype, device=self._device)

    def whole(self, name: str, part: Tensor) -> Tensor:
        return self._from_owner(name, part)

    def cut(self, name: str, value: Tensor) -> Tensor:
        return value if name in self._parameters else value.new_empty(0)

    def _from_owner(self, name: str, part: Tensor) -> Tensor:
        """The owner's tensor of the parameter's shape, on every rank."""
        like = self.layout.state[name]
        mine = name in self._parameters
        tensor = part.contiguous() if mine else torch.empty(like.shape, dtype=like.dtype, device=self._device)
        torch.distributed.broadcast(tensor, group=self._within, group_src=self._owner[name])
        return tensor

    def moments(self, name: str) -> dict[str, Tensor]:
        if not self.optimizer.state:  # no rank has made an update
            return {}
        own = self.optimizer.state.get(self._parameters.get(name, torch.empty(0)), {})
        step = next(iter(self.optimizer.state.values()))["step"]
        found = {key: self._from_owner(name, own.get(key, torch.empty(0))) for key in ("exp_avg", "exp_avg_sq")}
        return {"step": step, **found}

    @torch.no_grad()
    def load(self, name: str, value: Tensor, moments: Moments) -> None:
        if (parameter := self._parameters.get(name)) is None:
            return
        parameter.copy_(value)
        state = {key: x.clone() if key == "step" else x.to(self._device, copy=True) for key, x in moments.items()}
        self.optimizer.state[parameter] = state

    def broadcast_buffers(self) -> None:
        """Nothing: there are constants alone, each with the member that holds its modality, and ranks have different ones."""

    def evaluated(self, parts: Mapping[str, Tensor] | None) -> AbstractContextManager[nn.Module]:
        live = {name: self.part(name) for name in self.names()} if parts is None else parts
        return self._replica.filled((name, self.whole(name, part)) for name, part in live.items())
