"""What a step over complete rows costs as modalities are added: MEME whose sources explain all others, or some drawn, beside rivals.

N pictures a row (3 x 28 x 28, the networks of `polymnist`), one sample. A row's decodings are N^2 for MEME, N (1 + m) with m targets drawn
(`meme-dist train --targets m`), and N for MoPoE, of 2^N - 1 subsets up to N = 12, and MVTCAE.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.record import CPU, interleaved, keep
from benchmarks.step import counted
from meme_dist.likelihoods import Laplace
from meme_dist.modalities.image import conv
from meme_dist.objectives.base import Objective
from meme_dist.objectives.mopoe import LARGEST
from meme_dist.recipes.base import Model
from meme_dist.types import Batch, pack_dense

IMAGE, LATENT, CHANNELS = (3, 28, 28), 32, (16, 32, 64)
COLUMNS = ("form", "modalities", "cpu_ms", "ms", "decoder_rows", "saved_mb")


def main(
    *, modalities: tuple[int, ...] = (2, 5, 10, 20), targets: tuple[int, ...] = (1, 2), rows: int = 32, repeats: int = 5, save: bool = True
) -> None:
    """Time and saved bytes of a step (forward, backward, Adam; one thread of a CPU) against the number of modalities.

    Args:
        modalities: How many.
        targets: How many are drawn.
        rows: Of a step.
        repeats: How often each is timed, in turn.
        save: Append the rows to benchmarks/results/targets.jsonl.
    """
    torch.set_num_threads(1)
    found = [row for number in modalities for row in measured(number, targets, rows, repeats)]
    print("  ".join(f"{name:>14}" for name in COLUMNS))
    for row in found:
        print("  ".join(f"{row[name]:>14}" for name in COLUMNS))
    if save:
        print(f"\nkept in {keep('targets', found, device=CPU, threads=1)}")


def measured(number: int, targets: Sequence[int], rows: int, repeats: int) -> list[dict[str, Any]]:
    """All forms over so many modalities, timed in turn."""
    models = {"meme": model("meme", number)}
    models |= {f"meme, {count} drawn": model("meme", number, targets=count) for count in targets if count < number - 1}
    models |= {name: model(name, number) for name in ("mopoe", "mvtcae") if name != "mopoe" or number <= LARGEST}
    batch = complete(number, rows)
    steps = {name: _step(objective, batch) for name, objective in models.items()}
    times = interleaved(steps, repeats)
    found = []
    for name, step in steps.items():
        networks = {key: models[name].modality(key) for key in batch.modalities}
        found.append({"form": name, "modalities": number, "rows": rows, **times[name], **counted(step, networks)})
    return found


def model(name: Any, number: int, **settings: Any) -> Objective:
    """That objective over so many equal modalities."""
    torch.manual_seed(0)
    networks = {f"m{index}": conv(IMAGE, latent_dim=LATENT, channels=CHANNELS, likelihood=Laplace(0.1)) for index in range(number)}
    return Model(objective=name, latent_dim=LATENT, samples=1, **settings).build(networks)


def complete(number: int, rows: int) -> Batch:
    """Random pictures, none missing."""
    generator = torch.Generator().manual_seed(1)
    data = {f"m{index}": torch.rand(rows, *IMAGE, generator=generator) for index in range(number)}
    return pack_dense(data, {name: torch.ones(rows, dtype=torch.bool) for name in data}, single=False)


def _step(objective: Objective, batch: Batch) -> Callable[[], None]:
    objective.initialise(batch)
    optimizer = torch.optim.AdamW(objective.parameters(), 1e-4, fused=True)

    def call() -> None:
        optimizer.zero_grad()
        (objective(batch).total / len(batch.observed)).backward()
        optimizer.step()

    return call
