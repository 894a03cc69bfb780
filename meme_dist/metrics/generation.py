"""What a model makes: one modality from others, all of them from nothing, and the missing ones of each row."""

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from meme_dist.metrics.rows import device_of, evaluating, holds, joined, noise_of, on_device
from meme_dist.noise import Noise
from meme_dist.objectives.base import Objective
from meme_dist.types import Batch

CHUNK = 64  # draws from the prior that are decoded together
Grid = dict[tuple[str, str], Shaped[Tensor, "K R *event"]]


def complete_rows(batch: Batch, rows: int) -> Bool[Tensor, " B"]:
    """The first `rows` rows that hold every modality: the inputs of a grid."""
    complete = holds(batch, list(batch.modalities))
    return complete & (complete.cumsum(0) <= rows)


def cross_generations(objective: Objective, batch: Batch, *, samples: int = 1, purpose: str = "cross generation") -> Grid:
    """[source, target] -> `samples` likelihood means of the target for each row, z ~ q(z | x_source); the diagonal: reconstructions.

    Rows without the source get what a standard posterior gives: look at the rows of `holds` only.
    """
    batch = on_device(batch, device_of(objective))
    grid: Grid = {}
    with evaluating(objective):
        for source in batch.modalities:
            given, noise = batch.only(source), noise_of(batch)
            z = objective.infer(given).sample(noise, f"{purpose}/{source}", samples)
            made = {name: objective.reconstruct(name, z, noise, f"{purpose}/{source}", given=given).cpu() for name in batch.modalities}
            grid |= {(source, target): x for target, x in made.items()}
    return grid


def joint_generations(objective: Objective, num: int, *, seed: int = 0, first: int = 0) -> dict[str, Shaped[Tensor, "R *event"]]:
    """All modalities of the draws `first` to `first + num` from the prior, on the CPU; draw i is the same, bit by bit, in any range.

    CHUNK draws are decoded at a time and the last chunk is cut: how a product of matrices is rounded may depend on the number of rows.
    """
    chunks = [_chunk(objective, number, seed) for number in range(first // CHUNK, -(-(first + num) // CHUNK))]
    start = first % CHUNK
    return {name: torch.cat([chunk[name] for chunk in chunks])[start : start + num] for name in objective.modalities}


def _chunk(objective: Objective, number: int, seed: int) -> dict[str, Shaped[Tensor, "R *event"]]:
    with evaluating(objective):
        draw = torch.arange(number * CHUNK, (number + 1) * CHUNK, device=device_of(objective))
        noise = Noise(seed, draw)
        z = objective.prior().sample(noise, "joint generation", 1)
        return {name: objective.reconstruct(name, z, noise, "joint generation")[0].cpu() for name in objective.modalities}


def imputations(objective: Objective, batch: Batch, *, samples: int = 1) -> dict[str, Shaped[Tensor, "K B *event"]]:
    """`samples` likelihood means of every modality for each row, z ~ q(z | what the row observes).

    Whether an entry was missing, `batch.observed` says. Samples differ where the row leaves the modality open.
    """
    batch = on_device(batch, device_of(objective))
    with evaluating(objective):
        noise, purpose = noise_of(batch), f"imputation/{joined(batch.modalities)}"
        z = objective.infer(batch).sample(noise, purpose, samples)
        return {name: objective.reconstruct(name, z, noise, purpose, given=batch).cpu() for name in batch.modalities}
