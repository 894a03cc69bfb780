"""What the launch test starts on each process: three steps of a tiny training; rank 0 writes losses and weights to FOLDER/result.npz."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from meme_dist.leave import leave
from meme_dist.run import ranks
from meme_dist.train.trainer import Trainer, Training
from tests.trainings import Rows, build, mixed


def train(folder: Path | None) -> dict[str, Any]:
    """Losses and weights after three steps, on as many ranks as were launched."""
    place = ranks()
    stream = Rows("abc", mixed("abc"), batch_size=12, rank=place.rank, world=place.world)
    trainer = Trainer(build("abc"), stream, Training(steps=3, batch_size=12, clip=1.0, warmup=2, log_every=1), folder=folder)
    losses = [report.loss for report in trainer]
    if folder is not None:
        trainer.save()
    trainer.close()
    engine = trainer.engine
    weights = torch.cat([engine.whole(name, engine.part(name)).flatten().clone() for name in engine.names()])
    return {"world": trainer.world, "engine": engine.name, "losses": np.array(losses), "weights": weights.numpy()}


if __name__ == "__main__":
    result = train(Path(sys.argv[1]))
    if ranks().rank == 0:
        np.savez(Path(sys.argv[1]) / "result.npz", **result)
    leave(0)
