"""A rank is killed at random moments, over and over; each time all ranks are started anew: in the end the weights are those of a run
that nobody disturbed, bit by bit, and no checkpoint on the way was unreadable."""

import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meme_dist.train import checkpoint
from tests.ranks import _end, _enter, forkserver, run_ranks
from tests.test_engines import needs, trainer_on, whole
from tests.trainings import mixed

KILLS = 20
STEPS = 120


def train(rank: int, world: int, folder: Path, engine: str) -> dict[str, np.ndarray]:
    """Resume where there is something, save every third step in the background, and so to the end."""
    trainer = trainer_on(engine, rank, world, mixed("abc", 64), folder, steps=STEPS, log_every=STEPS)
    trainer.resume()
    for report in trainer:
        if report.step % 3 == 0:
            trainer.save(wait=False)
    trainer.close()
    return whole(trainer)


def killed(folder: Path, engine: str, rendezvous: Path, random_: random.Random) -> str:
    """Start two ranks, kill one at a random moment after the first step that they save, then the other, as a launcher does."""
    rendezvous.mkdir()
    context = forkserver()
    answers = context.Queue()
    processes = [context.Process(target=_enter, args=(train, r, 2, str(rendezvous), answers, (folder, engine))) for r in range(2)]
    for process in processes:
        process.start()
    before, deadline = step_of(folder), time.monotonic() + 60
    while step_of(folder) == before and time.monotonic() < deadline and all(p.is_alive() for p in processes):
        time.sleep(0.002)
    time.sleep(random_.uniform(0, 0.15))
    victim = random_.randrange(2)
    processes[victim].kill()
    time.sleep(random_.uniform(0, 0.05))  # the other may be in the midst of its share of a checkpoint
    processes[1 - victim].kill()
    _end(processes)
    return f"rank {victim} after step {step_of(folder)}"


def step_of(folder: Path) -> int:
    try:
        found = checkpoint.locate(folder / "checkpoints" / "last")
        return -1 if found is None else int(checkpoint.read_state(found)["step"])
    except (FileNotFoundError, ValueError):  # it is being replaced at this moment
        return -1


@pytest.mark.parametrize(("engine", "kills"), [("ddp", KILLS), ("zero2", 2)])
def test_killed_at_random_moments_and_resumed_is_never_killed_bit_by_bit(engine: str, kills: int, tmp_path: Path) -> None:
    needs(engine)
    expected: list[dict[str, Any]] = run_ranks(train, 2, tmp_path / "whole", engine)
    dice, places = random.Random(0), []
    for number in range(kills):
        places.append(killed(tmp_path / "parts", engine, tmp_path / f"meeting{number}", dice))
        for path in (found for found in [checkpoint.locate(tmp_path / "parts" / "checkpoints" / "last")] if found):
            checkpoint.verify(path)
    print(*places, sep="\n")
    for came, true in zip(run_ranks(train, 2, tmp_path / "parts", engine), expected, strict=True):
        assert all(np.array_equal(came[kind], true[kind]) for kind in ("weights", "averages", "moments"))
