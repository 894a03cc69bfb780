"""`meme-dist train RECIPE --dry-run PROCESSES`: what a training would take under each engine, without training."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from meme_dist.data.prefetch import moved
from meme_dist.data.stream import Evaluation
from meme_dist.recipes.named import recipe_of
from meme_dist.run import Ranks, Where, initial_objective, shards_of
from meme_dist.train import plan
from meme_dist.train.counting import count
from meme_dist.train.startup import check_batch, device

LINK = 12.5e9  # bytes a second that a process sends: a 100 Gb/s network; within a machine with NVLink it is several times that


def rehearse(name: str, arguments: Mapping[str, Any], where: Where, processes: int, *, console: Console) -> None:
    """Count one micro batch of this recipe on this machine, and print memory, traffic and speed for so many processes.

    Shards are written where they are not there yet; no run folder is made. Raises ValueError for less than one process, and where the
    batch does not divide.
    """
    if processes < 1:
        raise ValueError(f"--dry-run: expected 1 process or more, got {processes}")
    recipe = recipe_of(name)(**arguments)
    training = recipe.training
    check_batch(training, processes)
    manifest = shards_of(recipe, where.data, Ranks(0, 0, 1), console=console)
    objective = initial_objective(recipe, manifest).to(device())
    rows = min(training.batch_size // processes // training.accumulate, manifest.num_rows("train"))
    batch = next(iter(Evaluation(manifest.address, "train", batch_size=rows, seed=training.seed)))
    counts = count(objective, moved(batch, device()), training)
    planned = plan.plan(counts, training, world=processes, machine=plan.machine_of(counts, bandwidth=LINK), gpu=device().type == "cuda")
    lines = plan.table(planned)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    console.print(f"{name} on {processes} processes, bytes of one of them (nothing is trained):", soft_wrap=True)
    for line in lines:  # not rich's table, which would break the columns to fit a narrow screen
        console.print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)), markup=False, soft_wrap=True)
    for title, text in plan.notes(planned):
        console.print(f"{title:<13}{text}", markup=False, soft_wrap=True)
