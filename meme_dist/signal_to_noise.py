"""How much of a gradient is signal: mean against spread over many draws of the noise, at fixed weights and a fixed batch.

The paper's reason (appendix B, figure 10) to stop the gradient of MEME's importance weights is that the rest of it is mostly noise, the
more so the more samples K there are; here that is measured on a trained run, for every K, with the gradient of the weights and without.
The expectations differ: without it the estimator is biased by design, so that a higher ratio is not by itself a better direction.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from meme_dist.data.stream import Evaluation
from meme_dist.metrics.rows import device_of, on_device
from meme_dist.objectives.meme import MEME
from meme_dist.record import write_json
from meme_dist.stored import load
from meme_dist.types import Batch

FILE = "signal_to_noise.json"
SAMPLES = (1, 5, 11, 30)
ROWS = 32  # of the batch
WHOLE = "all"

Gradients = Mapping[str, Tensor]
"""A flat gradient of each network."""


class Ratio(NamedTuple):
    """Of one network's gradient g over R draws.

    `pooled`: |E g| / sqrt(E |g - E g|^2), with |E g|^2 estimated as |mean|^2 - variance / R (at least 0), so that pure noise gives 0.
    `coordinates`: the mean over coordinates of |mean| / standard deviation, the paper's figure. Pure noise gives sqrt(2 / (pi R)), `floor`.
    """

    pooled: float
    coordinates: float
    floor: float


def ratios(gradients: Iterable[Gradients]) -> dict[str, Ratio]:
    """The ratios of each network, and of all together under `all`. Raises ValueError for fewer than two draws.

    Means and variances are updated draw by draw (Welford 1962), in double precision: two numbers a weight, however many draws.
    """
    means: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    draws = 0
    for gradient in gradients:
        draws += 1
        for name, value in gradient.items():
            new = value.detach().double()
            mean = means.setdefault(name, torch.zeros_like(new))
            step = new - mean
            mean += step / draws
            squares.setdefault(name, torch.zeros_like(new)).add_(step * (new - mean))
    if draws < 2:
        raise ValueError(f"signal to noise: expected at least 2 draws, got {draws}")
    means[WHOLE], squares[WHOLE] = torch.cat(list(means.values())), torch.cat(list(squares.values()))
    return {name: _ratio(means[name], squares[name] / (draws - 1), draws) for name in means}


def _ratio(mean: Tensor, variance: Tensor, draws: int) -> Ratio:
    noise = float(variance.sum())
    signal = max(0.0, float(mean.square().sum()) - noise / draws)
    alive = variance > 0  # weights that no row of the batch reaches have neither signal nor noise
    each = float((mean.abs()[alive] / variance[alive].sqrt()).mean()) if bool(alive.any()) else math.nan
    return Ratio(math.sqrt(signal / noise) if noise else math.nan, each, math.sqrt(2 / (math.pi * draws)))


def signal_to_noise(objective: MEME, batch: Batch, *, draws: int, samples: Sequence[int] = SAMPLES) -> list[dict[str, Any]]:
    """For every K, with and without the gradient of the weights: {"samples", "stop_gradient", "network", "pooled", "coordinates", "floor"}.

    Networks whose gradient is the same in all draws, as where nothing reaches them, or not finite, have no ratio and are left out.

    The estimator is `rao_blackwell` over all targets throughout, where nothing but the posterior samples is drawn. The objective's own
    settings, and the gradients that it holds, are afterwards what they were. Networks run in the mode that the objective is in.
    """
    found = []
    for number in samples:
        for stop in (True, False):
            with _set(objective, samples=number, stop_gradient=stop, estimator="rao_blackwell", targets=None):
                made = ratios(_gradient(objective, batch, draw) for draw in range(draws))
            known = {name: ratio for name, ratio in made.items() if all(map(math.isfinite, ratio))}
            found += [{"samples": number, "stop_gradient": stop, "network": name, **ratio._asdict()} for name, ratio in known.items()]
    return found


def of_run(folder: Path, *, draws: int, samples: Sequence[int] = SAMPLES) -> dict[str, Any]:
    """That of a trained run of MEME, at its last weights and the first training rows. Raises ValueError for a run of another objective."""
    stored = load(folder)
    if not isinstance(stored.objective, MEME):
        raise ValueError(f"{folder}: signal to noise is measured of MEME's gradient, this is a run of {type(stored.objective).__name__}")
    rows = next(iter(Evaluation(stored.manifest.folder, "train", batch_size=ROWS, seed=stored.recipe.training.seed)))
    batch = on_device(rows, device_of(stored.objective))
    entries = signal_to_noise(stored.objective, batch, draws=draws, samples=samples)
    return {"run": folder.name, "step": stored.step, "rows": len(batch.observed), "draws": draws, "entries": entries}


def write(folder: Path, run: Path, *, draws: int) -> None:
    """`of_run` into the folder's `signal_to_noise.json`."""
    write_json(folder / FILE, of_run(run, draws=draws))


def held(folder: Path) -> tuple[str, int, int] | None:
    """Run, step and draws of the folder's `signal_to_noise.json`; None where there is none."""
    path = folder / FILE
    data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    return data and (data["run"], data["step"], data["draws"])


def _gradient(objective: MEME, batch: Batch, draw: int) -> Gradients:
    """The gradient of the summed loss at another visit of the same rows, by encoder, decoder and what else a modality owns."""
    rows = len(batch.observed)
    number = torch.arange(rows, device=batch.draw.device, dtype=batch.draw.dtype)
    parameters = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    loss = objective(batch._replace(draw=number + (draw + 1) * rows)).total
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    groups: dict[str, list[Tensor]] = {}
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        flat = torch.zeros_like(parameter) if gradient is None else gradient
        groups.setdefault(_network(name), []).append(flat.flatten())
    return {name: torch.cat(parts) for name, parts in groups.items()}


def _network(name: str) -> str:
    """`modalities.photo.decoder.0.weight` -> `photo decoder`; `pseudo.photo.data` -> `photo pseudo`."""
    family, modality, *rest = name.split(".")
    return f"{modality} {rest[0] if family == 'modalities' else family}"


@contextmanager
def _set(objective: MEME, **settings: Any) -> Iterator[None]:
    before = {name: getattr(objective, name) for name in settings}
    try:
        for name, value in settings.items():
            setattr(objective, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(objective, name, value)
