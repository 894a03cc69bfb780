"""From what the launcher asked for to an engine."""

import torch
from accelerate import Accelerator
from torch import nn

from meme_dist.train.engines.base import Engine
from meme_dist.train.engines.captured import Captured
from meme_dist.train.engines.replicated import Replicated
from meme_dist.train.engines.strategy import Strategy
from meme_dist.train.training import Training


def build(strategy: Strategy, objective: nn.Module, training: Training, accelerator: Accelerator) -> Engine:
    """The engine for this strategy, or for modality parallelism, around an objective that lies on its device. Collective.

    Sharding engines are imported where they are used: DeepSpeed is not always installed, and takes seconds to load.
    """
    if strategy.name == "ddp" and training.members == 1:
        alone = accelerator.num_processes == 1 and accelerator.device.type == "cuda"
        return (Captured if alone and training.graph else Replicated)(objective, training, accelerator)
    _require_group(accelerator.device)
    if training.members > 1:
        if strategy.name != "ddp":
            raise ValueError(
                f"members: {training.members} processes share a model, and the launch configuration asks for {strategy.name}; "
                "expected one of the two: launch with ddp.yaml"
            )
        from meme_dist.train.engines.placed import Placed

        return Placed(objective, training, accelerator.device, world=accelerator.num_processes)
    if strategy.name == "fsdp2":
        from meme_dist.train.engines.fully_sharded import FullySharded

        return FullySharded(objective, training, accelerator.device)
    from meme_dist.train.engines.zero import Zero

    return Zero(objective, training, accelerator.device, strategy, world=accelerator.num_processes)


def _require_group(device: torch.device) -> None:
    """One process alone has no process group, and sharding engines want one of size 1."""
    if not torch.distributed.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
