"""Checks at the start of a training: some launches run without a word and train the wrong thing."""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from meme_dist.train.checkpoint import fingerprint
from meme_dist.train.engines.base import Engine
from meme_dist.train.engines.strategy import Strategy
from meme_dist.train.training import Training


def check_world(accelerator: Accelerator, environment: Mapping[str, str] = os.environ) -> None:
    """Raise ValueError unless as many processes train together as the launcher started.

    `accelerate launch --multi_gpu` without a GPU, for one, starts two trainings that know nothing of each other.
    """
    started, together = int(environment.get("WORLD_SIZE", "1")), accelerator.num_processes
    if started != together:
        raise ValueError(
            f"the launcher started {started} processes (WORLD_SIZE), but {together} train together on {accelerator.device}; "
            "launch with a configuration that fits this machine, for two processes on a CPU: --config_file launch/accelerate/cpu2.yaml"
        )


def check_batch(training: Training, world: int) -> None:
    """Raise ValueError unless the rows of a step divide evenly among ranks and micro batches."""
    parts = world * training.accumulate
    if training.batch_size % parts:
        raise ValueError(
            f"batch_size: {training.batch_size} rows do not divide among {world} processes with {training.accumulate} micro batches each; "
            f"choose a multiple of {parts}, such as {-(-training.batch_size // parts) * parts}"
        )


def check_engine(strategy: Strategy, engine: Engine, world: int) -> None:
    """Raise ValueError where the engine is not the one asked for, or where processes would train replicas that never meet."""
    wrapped: Any = getattr(engine, "wrapped", None)
    running = {
        "ddp": isinstance(wrapped, DistributedDataParallel) or world == 1 and wrapped is engine.objective,
        "fsdp2": isinstance(wrapped, FSDPModule) and all(isinstance(p, DTensor) for p in engine.objective.parameters()),
    }
    stage = getattr(engine, "stage", None)
    if engine.name != strategy.name or not running.get(strategy.name, stage == strategy.stage):
        raise ValueError(
            f"{world} processes: expected the engine {strategy.name}, as the launch configuration says, got {engine.name} around "
            f"{type(wrapped).__name__}; its replicas would drift apart. Choose a configuration from launch/accelerate/"
        )


def check_equal(accelerator: Accelerator, module: nn.Module, settings: Mapping[str, Any]) -> None:
    """Raise ValueError on all ranks unless all have the same weights and settings. Call it before wrapping: DDP copies rank 0."""
    hashes = {"weights": fingerprint(module.state_dict()), "settings": fingerprint_json(settings)}
    numbers = [int(value[:15], 16) for value in hashes.values()]
    table = cast(Tensor, accelerator.gather(torch.tensor([numbers], dtype=torch.int64, device=accelerator.device))).cpu()
    for column, what in enumerate(hashes):
        different = torch.nonzero(table[:, column] != table[0, column]).flatten().tolist()
        if different:
            raise ValueError(
                f"{what} differ between rank 0 and rank {', '.join(map(str, different))}; build the objective from the same seed, data and "
                "keywords on every rank (torch.manual_seed before building; pseudo-inputs from the same batch)"
            )


def fingerprint_json(settings: Mapping[str, Any]) -> str:
    """A hash in hexadecimal of plain settings, in whatever order they come."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
