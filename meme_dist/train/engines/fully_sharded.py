"""FSDP2: weights, gradients and optimiser state sharded over all ranks, weights gathered module by module while they are in use."""

import warnings
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from meme_dist.train.engines.base import Moments, TorchEngine, adam, autocast_forward, layout_of, own
from meme_dist.train.engines.replica import Replica
from meme_dist.train.training import Training
from meme_dist.types import Batch, Loss

UNITS = ("encoder", "decoder")  # of each modality: gathered together, freed together; what is left is gathered for the whole step


class FullySharded(TorchEngine):
    """`fully_shard` of torch over one dimension of all ranks, on CUDA devices and, for tests, over gloo on the CPU.

    Parameters stay float32; autocast makes the computation bf16. A parameter's part is this rank's rows of it (dimension 0).
    """

    name = "fsdp2"

    def __init__(self, objective: nn.Module, training: Training, device: torch.device):
        self.objective, self.layout = objective, layout_of(objective)
        self._replica = Replica(objective, device, training.precision)
        autocast_forward(objective, device, training.precision)
        if scalars := [name for name, p in objective.named_parameters() if not p.dim()]:
            raise ValueError(f"{', '.join(scalars)}: parameters without a dimension, which FSDP2 cannot shard; give them the shape [1]")
        # Decoders end in a view; nothing here changes a network's output in place, which is what the warning is about.
        warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view tensor", UserWarning)
        self.groups = torch.distributed.get_world_size()
        mesh = init_device_mesh(device.type, (self.groups,))
        for path, module in list(objective.named_modules()):
            if path.rpartition(".")[2] in UNITS and any(True for _ in module.parameters()):
                fully_shard(module, mesh=mesh)
        self.wrapped = cast(Any, fully_shard(objective, mesh=mesh))
        assert isinstance(self.wrapped, FSDPModule)
        self._parameters = dict(objective.named_parameters())
        self.optimizer = adam(objective, training)

    def forward(self, batch: Batch, *, last: bool) -> Loss:
        return self.wrapped(batch)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.wrapped.set_requires_gradient_sync(last)
        self.wrapped.set_is_last_backward(last)
        loss.backward()

    def squared_norm(self) -> Tensor:
        return get_total_norm([g for _, g in self.own_gradients() if g.numel()]).double().square()

    @torch.no_grad()
    def update(self, norm: float, clip: float | None) -> float:
        if clip is not None and (factor := clip / (norm + 1e-6)) < 1:  # as torch.nn.utils.clip_grad_norm_
            torch._foreach_mul_([g for _, g in self.own_gradients()], factor)
        self.optimizer.step()
        return norm

    def part(self, name: str) -> Tensor:
        return own(self._parameters[name].detach())

    def whole(self, name: str, part: Tensor) -> Tensor:
        return self._sharded(name, part).full_tensor()

    def moments(self, name: str) -> dict[str, Tensor]:
        state = self.optimizer.state.get(self._parameters[name], {})
        return {key: x.full_tensor() if isinstance(x, DTensor) else x for key, x in state.items()}

    @torch.no_grad()
    def load(self, name: str, value: Tensor, moments: Moments) -> None:
        self.part(name).copy_(self.cut(name, value))
        placed = {key: x.clone() if key == "step" else self._sharded(name, self.cut(name, x)) for key, x in moments.items()}
        self.optimizer.state[self._parameters[name]] = placed

    def evaluated(self, parts: Mapping[str, Tensor] | None) -> Any:
        live = {name: self.part(name) for name in self._parameters} if parts is None else parts
        return self._replica.filled((name, self.whole(name, part)) for name, part in live.items())

    def _sharded(self, name: str, part: Tensor) -> DTensor:
        like = cast(DTensor, self._parameters[name])
        shape, stride = like.shape, like.stride()  # given: what `from_local` infers is wrong where rows do not divide evenly
        return DTensor.from_local(part, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride)

    def cut(self, name: str, value: Tensor) -> Tensor:
        """Its rows: chunks of ceil(rows / ranks), as torch cuts them."""
        like = cast(DTensor, self._parameters[name])
        rank, world = like.device_mesh.get_local_rank(), like.device_mesh.size()
        size = -(-value.shape[0] // world)
        low = min(rank * size, value.shape[0])
        return value[low : low + size].to(like.device, copy=True)
