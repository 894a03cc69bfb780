"""DeepSpeed's ZeRO, stages 1 to 3: optimiser state, then gradients, then weights sharded over all ranks; host memory holds them if asked.

`deepspeed.initialize` is called here with a configuration made of the run's own settings, so that micro batch, accumulation and clipping
have one source. Weights are float32 masters and autocast makes the computation bf16, as with the other engines: same numbers everywhere.
"""

import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meme_dist.train.engines.base import Engine, Moments, adam, autocast_forward, layout_of
from meme_dist.train.engines.replica import Replica
from meme_dist.train.engines.strategy import Strategy
from meme_dist.train.training import Training
from meme_dist.types import Batch, Loss

BUCKET = 48 * 2**20  # numbers that cross the ranks at a time, at most: DeepSpeed's default of 5e8 takes gigabytes for any model
PERSISTENT = 10_000  # ZeRO-3 never gives up parameters smaller than this: gathering them costs more than keeping them


class Zero(Engine):
    """A DeepSpeed engine. A parameter's part is the whole of it in stages 1 and 2, and in stage 3 this rank's piece of it, flat and padded.

    Needs the package deepspeed (ImportError otherwise). Offloading uses DeepSpeed's own Adam on the host, which it compiles at first use.
    """

    def __init__(self, objective: nn.Module, training: Training, device: torch.device, strategy: Strategy, *, world: int):
        self.objective, self.layout, self.name, self.stage = objective, layout_of(objective), strategy.name, strategy.stage
        self._parameters, self.groups = dict(objective.named_parameters()), world
        self._replica = Replica(objective, device, training.precision) if self.stage == 3 else None
        self._broken: dict[str, Tensor] = {}
        deepspeed = _deepspeed(device)
        autocast_forward(objective, device, training.precision)
        for name, parameter in self._parameters.items():
            if not parameter.requires_grad:
                continue
            parameter.register_hook(lambda gradient, name=name: self._look(name, gradient))
        self.optimizer = _host_adam(objective, training) if strategy.offload_optimizer else adam(objective, training)
        count = sum(p.numel() for p in self._parameters.values())
        settings = configuration(training, strategy, world=world, parameters=count)
        self.wrapped, *_ = deepspeed.initialize(model=objective, optimizer=self.optimizer, config=settings, dist_init_required=False)

    def forward(self, batch: Batch, *, last: bool) -> Loss:
        self.wrapped.set_gradient_accumulation_boundary(last)
        return self.wrapped(batch)

    def begin(self) -> None:
        """DeepSpeed forgets the gradient in its update."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.wrapped.backward(loss, scale_wrt_gas=False)
        if not last:
            self.wrapped.step()  # counts the micro batch; the weights move at the boundary

    def _look(self, name: str, gradient: Tensor) -> None:
        """DeepSpeed takes gradients away as they are made, so each rank looks at its own on the way."""
        fault = ~gradient.isfinite().all()
        self._broken[name] = self._broken[name] | fault if name in self._broken else fault

    def squared_norm(self) -> Tensor:
        faults = torch.stack(list(self._broken.values())).any()
        return torch.where(faults, torch.nan, 0.0).double()

    def update(self, norm: float, clip: float | None) -> float:
        self._broken.clear()
        self.wrapped.step()  # sums over the ranks first, and drops the step where that sum is not finite
        return float(self.wrapped.get_global_grad_norm()) if self.wrapped.was_step_applied() else math.nan

    def discard(self) -> None:
        """DeepSpeed drops a step whose norm is not finite, with all its buffers: one NaN in the gradient makes sure of that."""
        from deepspeed.utils import safe_get_full_grad, safe_set_full_grad

        if not self._broken:  # it has dropped this step already, in `update`
            return
        self._broken.clear()
        first = next(p for p in self._parameters.values() if p.requires_grad)
        gradient = safe_get_full_grad(first)
        assert gradient is not None
        safe_set_full_grad(first, torch.full_like(gradient, torch.nan))
        self.wrapped.step()

    def idle(self) -> list[str]:
        return [name for name, p in self._parameters.items() if p.requires_grad and name not in self._broken]

    def gradients(self) -> Iterator[tuple[str, bool]]:
        for name, fault in self._broken.items():
            yield name, not bool(fault)

    def part(self, name: str) -> Tensor:
        parameter: Any = self._parameters[name]
        return parameter.ds_tensor.data if self.stage == 3 else parameter.detach()

    def whole(self, name: str, part: Tensor) -> Tensor:
        if self.stage < 3:
            return part
        like = self.layout.state[name]
        part = part.to(self.wrapped.device)  # offloaded, it lies in host memory, from which NCCL sends nothing
        parts = [torch.empty_like(part) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, part.contiguous())
        return torch.cat(parts)[: like.numel()].view(like.shape)

    def moments(self, name: str) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        steps = [entry["step"] for entry in self._inner.state.values() if "step" in entry]
        if not steps:
            return {}
        parameter = self._parameters[name]
        found = {key: cast(Tensor, safe_get_full_optimizer_state(parameter, key)) for key in ("exp_avg", "exp_avg_sq")}
        return {"step": torch.as_tensor(float(steps[0])), **{key: x.view(self.layout.state[name].shape) for key, x in found.items()}}

    @torch.no_grad()
    def load(self, name: str, value: Tensor, moments: Moments) -> None:
        value = value.to(self.wrapped.device)
        if moments:
            self._make_moments(moments["step"])
        if self.stage < 3:
            self._load_flat(name, value, moments)
        else:
            self._load_sharded(name, value, moments)

    def _load_flat(self, name: str, value: Tensor, moments: Moments) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        parameter = self._parameters[name]
        parameter.copy_(value)
        safe_set_full_fp32_param(parameter, value)
        for key in moments.keys() - {"step"}:
            safe_set_full_optimizer_state(parameter, moments[key].to(value), key)

    def _load_sharded(self, name: str, value: Tensor, moments: Moments) -> None:
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        parameter: Any = self._parameters[name]
        part = self.cut(name, value)
        parameter.ds_tensor.data.copy_(part)
        if parameter.numel() == value.numel():  # small ones are never given up
            parameter.copy_(value)
        safe_set_local_fp32_param(parameter, part)
        for key in moments.keys() - {"step"}:
            safe_set_local_optimizer_state(parameter, self.cut(name, moments[key].to(value)), key)

    def cut(self, name: str, value: Tensor) -> Tensor:
        if self.stage < 3:
            return value
        size = self.part(name).numel()
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        return F.pad(value.flatten(), (0, size * world - value.numel()))[rank * size : (rank + 1) * size]

    def _make_moments(self, step: Tensor) -> None:
        """Optimiser state to fill: DeepSpeed lets torch make it in the first update, which a resumed run has not made."""
        zero, inner = self.wrapped.optimizer, self._inner
        flats = zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
        for flat in flats:
            if not inner.state[flat]:
                inner.state[flat] = {"exp_avg": torch.zeros_like(flat), "exp_avg_sq": torch.zeros_like(flat)}
            inner.state[flat]["step"] = step.clone() if isinstance(inner, torch.optim.AdamW) else int(step)
        if self.stage < 3:
            zero._lazy_init_hp_params_optimizer_state()

    @property
    def _inner(self) -> Any:
        return self.wrapped.optimizer.optimizer

    @contextmanager
    def evaluated(self, parts: Mapping[str, Tensor] | None) -> Iterator[nn.Module]:
        if self._replica is not None:
            live = {name: self.part(name) for name in self._parameters} if parts is None else parts
            with self._replica.filled((name, self.whole(name, part)) for name, part in live.items()) as module:
                yield module
            return
        kept = {name: p.data for name, p in self._parameters.items()}
        self._point(parts or {})  # the averages themselves: DeepSpeed's flat buffers stay as they are
        try:
            yield self.objective
        finally:
            self._point(kept)

    def _point(self, parts: Mapping[str, Tensor]) -> None:
        for name, part in parts.items():
            self._parameters[name].data = part


def configuration(training: Training, strategy: Strategy, *, world: int, parameters: int) -> dict[str, Any]:
    """DeepSpeed's configuration of this training: every number comes from the run's own settings."""
    bucket = min(BUCKET, -(-parameters // 1024) * 1024)  # a multiple, for the alignment that DeepSpeed asks for
    zero: dict[str, Any] = {"stage": strategy.stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if strategy.stage == 3:
        zero |= {"stage3_param_persistence_threshold": PERSISTENT, "stage3_prefetch_bucket_size": bucket}
    if strategy.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if strategy.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_batch_size": training.batch_size,
        "train_micro_batch_size_per_gpu": training.batch_size // world // training.accumulate,
        "gradient_accumulation_steps": training.accumulate,
        "gradient_clipping": training.clip or 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": strategy.offload_optimizer,
        "steps_per_print": 2**31,
    }


def _deepspeed(device: torch.device) -> Any:
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it, for one process without a launcher too
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise ImportError(
            f"the launch configuration asks for DeepSpeed, which cannot be imported ({error}); "
            "pip install -e '.[deepspeed]' in the project's folder"
        ) from error
    deepspeed.utils.logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)  # torch 2.13's, of DeepSpeed's calls
    if device.type == "cpu":
        # A faster all-reduce on one machine, compiled at the first use: a compiler is more than a run on a CPU should need.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _host_adam(module: nn.Module, training: Training) -> torch.optim.Optimizer:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    settings: dict[str, Any] = {"lr": training.learning_rate, "betas": training.betas, "weight_decay": training.weight_decay}
    return DeepSpeedCPUAdam(module.parameters(), adamw_mode=True, **settings)
