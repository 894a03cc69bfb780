"""Checks at the start of a training: some launches run without a word and train the wrong thing."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from meme_dist.data.workers import SHARED
from meme_dist.train.checkpoint import fingerprint
from meme_dist.train.engines.base import Engine
from meme_dist.train.engines.strategy import hidden
from meme_dist.train.keeper import PATIENCE
from meme_dist.train.log import TRACKER
from meme_dist.train.signals import JOBS
from meme_dist.train.training import Training

ENOUGH = 1 << 30  # bytes of shared memory, for loader processes that nobody asked for
# Ranks wait in a collective while one of them writes or reads for PATIENCE: NCCL's own limit of 10 minutes would end them before that.
LIMIT = timedelta(seconds=2 * PATIENCE)


def accelerator(folder: Path | None) -> Accelerator:
    """Process group, device and trackers; precision, accumulation and wrapping are the engines' affair."""
    state = AcceleratorState._shared_state
    if state and state["_mixed_precision"] != "no":  # somebody else's in this process; Accelerate keeps one state for all
        AcceleratorState._reset_state()
    with hidden():
        return Accelerator(
            cpu=not torch.cuda.is_available(),  # else a GPU-less launch of several processes trains several unconnected models
            mixed_precision="no",
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            log_with=None if folder is None else TRACKER,
            project_dir=folder,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=LIMIT)],  # for every engine: `hidden` has them all start from this group
        )


def device() -> torch.device:
    """Where one process alone trains."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def loaders(training: Training, environment: Mapping[str, str] = os.environ) -> int:
    """Loader processes of this training process, where the run leaves it open.

    A GPU is through with a step in a few milliseconds, which is what one process takes to read and decode its rows: up to four take turns,
    as far as this process's share of the cores goes, and where shared memory has room for them (a container may have 64 MiB). On a CPU they
    would want the cores that train.
    """
    if training.workers is not None:
        return training.workers
    if not (torch.cuda.is_available() and SHARED.is_dir() and shutil.disk_usage(SHARED).free >= ENOUGH):
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = cores // (int(environment.get("LOCAL_WORLD_SIZE", 1)) * int(environment.get(JOBS, 1)))
    return min(4, max(0, share - 1))


def token(gather: Callable[[Tensor], Tensor]) -> str:
    """A name for this launch, the same on all ranks. Collective."""
    return f"{int(gather(torch.tensor(int.from_bytes(os.urandom(4), 'little')))[0]):08x}"


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


def check_launcher(words: Sequence[str], environment: Mapping[str, str] = os.environ) -> None:
    """Raise ValueError where `accelerate launch`, whose command line these words are, was to start several processes and started one.

    `--cpu --num_processes 2`, or a file of kind MULTI_CPU, does that without a word (Accelerate 1.15).
    """
    asked = announced(words)
    if asked > 1 and "WORLD_SIZE" not in environment:
        raise ValueError(
            f"the launcher was asked for {asked} processes and started one; several processes on a CPU need a configuration of "
            "distributed_type MULTI_GPU, in spite of its name: --config_file launch/accelerate/ddp.yaml, without --cpu"
        )


def announced(words: Sequence[str]) -> int:
    """How many processes an `accelerate launch` command line asks for, by its flag or its file; 1 for any other command."""
    if "launch" not in words or not any("accelerate" in word for word in words[: words.index("launch") + 1]):
        if not any("accelerate.commands.launch" in word or word.endswith("commands/launch.py") for word in words):
            return 1
    flags = dict(zip(words, words[1:], strict=False)) | {name: value for name, _, value in (word.partition("=") for word in words) if value}
    if "--num_processes" in flags:
        return int(flags["--num_processes"])
    file = Path(flags.get("--config_file", ""))
    return int((yaml.safe_load(file.read_text(encoding="utf-8")) or {}).get("num_processes") or 1) if file.is_file() else 1


def parent() -> list[str]:
    """The command line of the process that started this one; nothing where the system does not tell (Linux does)."""
    try:
        return Path(f"/proc/{os.getppid()}/cmdline").read_text(encoding="utf-8").split("\0")[:-1]
    except (OSError, UnicodeDecodeError):
        return []


def check_batch(training: Training, world: int) -> None:
    """Raise ValueError unless the rows of a step divide evenly among ranks (of which `members` have the same) and micro batches."""
    if world % training.members:
        raise ValueError(f"members: {world} processes do not divide into groups of {training.members}; launch a multiple of that")
    world //= training.members
    parts = world * training.accumulate
    if training.batch_size % parts:
        raise ValueError(
            f"batch_size: {training.batch_size} rows do not divide among {world} processes with {training.accumulate} micro batches each; "
            f"choose a multiple of {parts}, such as {-(-training.batch_size // parts) * parts}"
        )


def check_engine(name: str, engine: Engine, world: int) -> None:
    """Raise ValueError where the engine is not the one asked for, or where processes would train replicas that never meet."""
    wrapped: Any = getattr(engine, "wrapped", None)
    running = {
        "ddp": isinstance(wrapped, DistributedDataParallel) or world == 1 and wrapped is engine.objective,
        "modality": engine.members > 1,
        "fsdp2": isinstance(wrapped, FSDPModule) and all(isinstance(p, DTensor) for p in engine.objective.parameters()),
    }
    stage = f"zero{getattr(engine, 'stage', None)}"
    if engine.name != name or not running.get(name, stage == name):
        raise ValueError(
            f"{world} processes: expected the engine {name}, as the launch configuration says, got {engine.name} around "
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
