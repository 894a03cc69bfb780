"""What benchmarks train through the real trainer and stream: three modalities of handwritten digits, 30 % of the entries missing."""

from pathlib import Path

import torch

from meme_dist.data.index import Manifest
from meme_dist.data.shards import write_shards
from meme_dist.data.stream import Evaluation, Stream
from meme_dist.objectives.base import Objective
from meme_dist.recipes.digits import digits
from meme_dist.train.trainer import Trainer, Training


def write(folder: Path) -> Path:
    """The shards of the recipe `digits`."""
    dataset = digits().dataset
    assert dataset is not None
    write_shards(dataset, folder, rows_per_shard=256)
    return folder


def objective(folder: Path) -> Objective:
    """The recipe's networks, the same on every rank."""
    torch.manual_seed(0)
    built = digits().build(Manifest.load(folder))
    built.initialise(next(iter(Evaluation(folder, "train", batch_size=256))))
    return built


def stream(folder: Path, training: Training, rank: int, world: int) -> Stream:
    """This rank's share of the rows of each step."""
    return Stream(folder, "train", batch_size=training.batch_size, seed=0, rank=rank, world=world, accumulate=training.accumulate)


def trainer(folder: Path, training: Training, rank: int, world: int) -> Trainer:
    """The trainer as `meme-dist train digits` makes it, without a folder to write to."""
    return Trainer(objective(folder), stream(folder, training, rank, world), training)
