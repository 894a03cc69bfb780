"""What one micro batch costs, counted on one real forward and backward pass: parameters, saved activations, FLOPs, runs of each network."""

import copy
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from meme_dist.train.engines.fully_sharded import UNITS
from meme_dist.train.training import Training
from meme_dist.types import Batch, Loss

SHARED = "shared"  # parameters that belong to no single modality
REST = "rest"  # the unit of everything outside encoders and decoders


class Unit(NamedTuple):
    """Parameters that a sharding engine gathers together, and how often one forward pass asks for them."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    forwards: int  # runs, those without gradients included
    backwards: int  # runs that have a backward pass

    @property
    def size(self) -> int:
        """Its numbers."""
        return sum(map(prod, self.shapes))


@dataclass(frozen=True)
class Counts:
    """One micro batch of `rows` rows on one rank. Bytes are those of the tensors' types; a multiplication and an addition are two FLOPs."""

    rows: int
    parameters: Mapping[str, int]  # numbers of each modality: networks, likelihood, pseudo-inputs; "shared" is what belongs to none
    trainable: int
    units: tuple[Unit, ...]
    buffers: int  # bytes of running statistics and the like
    activations: int  # bytes that autograd keeps for the backward pass: distinct storages, parameters and buffers left out
    flops: int  # of forward and backward pass: matrix products and convolutions, which is what FlopCounterMode knows
    seconds: float  # of forward and backward pass, median, on this machine as it is

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self.parameters.values())


def count(objective: nn.Module, batch: Batch, training: Training, *, repeats: int = 3) -> Counts:
    """Run this micro batch forwards and backwards (once to count, `repeats` times to time) and count what it costs.

    Objective and batch lie on one device. Weights, gradients, running statistics and random states are afterwards what they were.
    """

    def loss() -> Tensor:
        with torch.autocast(batch.observed.device.type, torch.bfloat16, enabled=training.precision == "bf16"):
            return cast(Loss, objective(batch)).total

    with _untouched(objective), _runs(objective) as runs:
        activations, flops = _counted(loss, [*objective.parameters(), *objective.buffers()])
        counted = copy.deepcopy(runs)
        seconds = statistics.median(_timed(lambda: loss().backward(), batch.observed.device) for _ in range(repeats))
    return Counts(
        rows=len(batch.observed),
        parameters=_by_modality(objective),
        trainable=sum(p.numel() for p in objective.parameters() if p.requires_grad),
        units=_units(objective, counted),
        buffers=sum(b.nbytes for b in objective.buffers()),
        activations=activations,
        flops=flops,
        seconds=seconds,
    )


def _counted(loss: Callable[[], Tensor], kept_anyway: list[Tensor]) -> tuple[int, int]:
    """Bytes saved by one forward pass, and the FLOPs of it and its backward pass."""
    apart = {tensor.untyped_storage().data_ptr() for tensor in kept_anyway}
    saved: dict[int, torch.UntypedStorage] = {}  # held here: a freed one's address could come again

    def look(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in apart:
            saved[storage.data_ptr()] = storage
        return tensor

    with FlopCounterMode(display=False) as counter:
        with saved_tensors_hooks(look, lambda tensor: tensor):
            total = loss()
        saved_bytes = sum(storage.nbytes() for storage in saved.values())
        saved.clear()
        total.backward()
    return saved_bytes, counter.get_total_flops()


def _timed(call: Callable[[], Any], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- parameters -------------------------------------------------------------------------------------------------------------------------


def _by_modality(objective: nn.Module) -> dict[str, int]:
    """An objective's parameters are called FAMILY.MODALITY.REST: networks and pseudo-inputs of one modality count together."""
    sizes = dict.fromkeys(dict(getattr(objective, "modalities", {})), 0)
    for path, parameter in objective.named_parameters():
        owner = next((part for part in path.split(".")[1:2] if part in sizes), SHARED)
        sizes[owner] = sizes.get(owner, 0) + parameter.numel()
    return sizes


def _modules(objective: nn.Module) -> dict[str, nn.Module]:
    """The units that FSDP2 shards: encoders and decoders that hold parameters."""
    named = objective.named_modules()
    return {path: module for path, module in named if path.rpartition(".")[2] in UNITS and any(True for _ in module.parameters())}


def _units(objective: nn.Module, runs: Mapping[str, Counter[bool]]) -> tuple[Unit, ...]:
    units, taken = [], set()
    for path, module in _modules(objective).items():
        own = [p for p in module.parameters() if id(p) not in taken]
        taken |= {id(p) for p in own}
        units.append(Unit(path, tuple(tuple(p.shape) for p in own), runs[path].total(), runs[path][True]))
    rest = tuple(tuple(p.shape) for p in objective.parameters() if id(p) not in taken)
    return (*units, Unit(REST, rest, 1, 0))  # gathered once: it stays whole until its backward pass is over


@contextmanager
def _runs(objective: nn.Module) -> Iterator[dict[str, Counter[bool]]]:
    """Within it, how often each unit ran with gradients (True) and without (False)."""
    modules = _modules(objective)
    runs: dict[str, Counter[bool]] = {path: Counter() for path in modules}

    def note(path: str) -> Callable[..., None]:
        return lambda *_: runs[path].update([torch.is_grad_enabled()])

    handles = [module.register_forward_pre_hook(note(path)) for path, module in modules.items()]
    try:
        yield runs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _untouched(objective: nn.Module) -> Iterator[None]:
    """Within it the objective trains; afterwards gradients, buffers, mode and torch's random states are as before."""
    training, gradients = objective.training, [p.grad for p in objective.parameters()]
    buffers = [b.detach().clone() for b in objective.buffers()]
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        objective.train()
        objective.zero_grad()
        try:
            yield
        finally:
            for parameter, gradient in zip(objective.parameters(), gradients, strict=True):
                parameter.grad = gradient
            for buffer, value in zip(objective.buffers(), buffers, strict=True):
                buffer.copy_(value)
            objective.train(training)
