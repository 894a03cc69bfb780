"""The report of a run: `illustrate` draws its figures, `write_report` turns what the folder holds into `report.md`.

A report is made from files alone (run.json, metrics.jsonl, results.json, figures/*.png), so it can be written again at any time and says
nothing that the folder does not hold. Paths in it are relative: the folder can be moved or sent.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from meme_dist import figures
from meme_dist.data.fields import Field
from meme_dist.evaluate import Measured, flatten
from meme_dist.metrics.generation import cross_generations, imputations, joint_generations
from meme_dist.metrics.intervals import aggregate
from meme_dist.metrics.latents import Latents
from meme_dist.metrics.rows import holds
from meme_dist.objectives.base import Objective
from meme_dist.tables import estimate, table, tables
from meme_dist.types import Batch

RUN, LOG, RESULTS, FIGURES, REPORT = "run.json", "metrics.jsonl", "results.json", "figures", "report.md"
COLUMNS = 10  # of a grid
POINTS = 400  # of a modality in the latent map
USUAL = {"split": "test", "checkpoint": "last", "pool": "own", "prior": "own", "judge": None, "likelihoods": None}  # after a training


# ---- figures ----------------------------------------------------------------------------------------------------------------------------


def illustrate(
    folder: Path,
    objective: Objective,
    batch: Batch,
    *,
    fields: Mapping[str, Field],
    classes: Sequence[str],
    measured: Measured,
    seed: int = 0,
) -> None:
    """Draw every figure that the model, one batch of the rows measured, the measurements and the folder's log give rise to."""
    place = folder / FIGURES
    _draw_grids(place, objective, batch, fields, seed)
    if measured.latents is not None:
        _draw_latents(place / "latent_map.png", measured.latents, classes)
    if len({entry["inputs"] for entry in measured.results.get("coherence_by_inputs", [])}) > 1:
        figures.inputs_curve(place / "coherence_by_inputs.png", measured.results["coherence_by_inputs"])
    if related := measured.results.get("relatedness"):
        figures.relatedness_panels(place / "relatedness.png", related, classes)
    log = read_log(folder / LOG)
    if any("loss" in line for line in log):
        figures.loss_curves(place / "loss.png", log)
    if any(figures.is_coherence(name) for line in log for name in line):
        real = {name: entry["value"] for name, entry in measured.results.get("classifiers", {}).items() if entry["value"] is not None}
        figures.coherence_curves(place / "coherence.png", log, real)


def _draw_grids(place: Path, objective: Objective, batch: Batch, fields: Mapping[str, Field], seed: int) -> None:
    made = cross_generations(objective, batch)
    chosen = {name: rows for name in fields if len(rows := _columns(batch, holds(batch, [name])))}
    inputs = {name: batch.dense(name)[rows] for name, rows in chosen.items()}
    outputs = {(source, target): data[0, chosen[source].cpu()] for (source, target), data in made.items() if source in chosen}
    if inputs:
        figures.cross_grid(place / "cross_generation.png", fields, inputs, outputs)
    figures.joint_grid(place / "joint_generation.png", fields, joint_generations(objective, COLUMNS, seed=seed))
    partial = _columns(batch, batch.observed.any(1) & ~batch.observed.all(1))
    if len(partial):
        filled = {name: data[0, partial.cpu()] for name, data in imputations(objective, batch).items()}
        there = dict(zip(batch.modalities, batch.observed[partial].T.cpu(), strict=True))
        shown = {name: _either(there[name], batch.dense(name)[partial].cpu(), data) for name, data in filled.items()}
        figures.imputed_grid(place / "imputation.png", fields, shown, there)


def _columns(batch: Batch, allowed: Tensor) -> Int[Tensor, " columns"]:
    """Up to COLUMNS of the allowed rows: the first of each class, in the order of classes, then the first of what is left."""
    rows = allowed.nonzero()[:, 0]
    if batch.label is None:
        return rows[:COLUMNS]
    label = batch.label[rows].tolist()
    firsts = [number for number, value in enumerate(label) if value >= 0 and value not in label[:number]]
    rest = [number for number in range(len(label)) if number not in set(firsts)]
    chosen = sorted([*firsts, *rest][:COLUMNS], key=lambda number: (label[number] < 0, label[number]))
    return rows[torch.tensor(chosen, dtype=torch.int64, device=rows.device)]


def _either(there: Tensor, data: Tensor, made: Tensor) -> Tensor:
    return torch.where(there.view(-1, *[1] * (data.dim() - 1)), data, made.to(data.dtype))


def _draw_latents(path: Path, latents: Latents, classes: Sequence[str]) -> None:
    points: dict[str, np.ndarray] = {}
    label: dict[str, np.ndarray] = {}
    for sources, posterior in latents.posteriors.items():
        rows = posterior.observed.nonzero()[:POINTS, 0]
        if len(sources) == 1 and len(rows):
            points[sources[0]], label[sources[0]] = posterior.mean[rows].numpy(), latents.label[rows].numpy()
    if points:
        enough = sum(map(len, points.values())) >= 30
        figures.latent_map(path, points, label, classes, project=figures.tsne if enough else figures.pca)


# ---- files ------------------------------------------------------------------------------------------------------------------------------


def read_log(path: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl; none where there is no file. A last line that was cut off by a kill is left out.

    Raises ValueError for a broken line before the last.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = []
    for number, line in enumerate(lines):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number + 1 < len(lines):
                raise ValueError(f"{path}, line {number + 1}: expected a JSON object, got {line[:40]!r}; remove the line") from error
    return found


def write_report(folder: Path) -> Path:
    """Write report.md from what the run's folder holds; parts that are not there are left out. Returns its path.

    Raises ValueError for a folder without a run.json.
    """
    run, results, log = _read_json(folder / RUN), _read_json(folder / RESULTS), read_log(folder / LOG)
    if run is None:
        raise ValueError(f"{folder}: expected a run folder, got one without {RUN}; give the folder that training wrote")
    parts = [
        f"# {run.get('recipe', 'a run')}: report",
        _summary(run, results or {}, log),
        tables(results) if results else "Not evaluated yet.",
        _pictures(folder),
        _what_ran(run),
    ]
    path = folder / REPORT
    written = path.with_name(f"{REPORT}.tmp")
    written.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    written.replace(path)
    return path


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected JSON, got a file that is none ({error}); write it again by evaluating the run") from error


def _summary(run: Mapping[str, Any], results: Mapping[str, Any], log: Sequence[Mapping[str, float]]) -> str:
    trained = [line for line in log if "loss" in line]
    said = [f"Recipe `{run.get('recipe', 'unknown')}`"]
    if trained:
        last = trained[-1]
        said.append(f"trained to step {last['step']:,.0f}, where the loss was {last['loss']:.1f} a row")
    if "step" in results:
        how = [f"{name} `{results[name]}`" for name, usual in USUAL.items() if results.get(name, usual) != usual]
        said.append(f"evaluated at step {results['step']:,}" + (f" ({', '.join(how)})" if how else ""))
    cross = [entry["value"] for entry in results.get("cross_coherence", []) if entry["value"] is not None]
    if cross:
        said.append(f"cross coherence {min(cross):.3f} to {max(cross):.3f}")
    sure = "Intervals are 95 %, over rows of one run as if independent; they show neither the spread over seeds nor that of other images."
    return f"{'; '.join(said)}. {sure}"


def _what_ran(run: Mapping[str, Any]) -> str:
    """Everything in run.json: enough to run it again."""
    command = run.get("command")
    shown = {key: value for key, value in run.items() if key not in ("command", "format")}
    lines = [(name, value) for key, entry in shown.items() for name, value in _flat(key, entry)]
    text = "## What ran\n\n"
    if command:
        text += f"```\n{shlex.join(map(str, command))}\n```\n\n"
    return text + table(["setting", "value"], [[name, f"`{value}`" if value not in ("", None) else "–"] for name, value in lines])


def _flat(key: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [pair for name, entry in value.items() for pair in _flat(f"{key}: {name}" if ":" not in key else f"{key}.{name}", entry)]
    return [(key, ", ".join(map(str, value)) if isinstance(value, list | tuple) else value)]


CAPTIONS = {
    "cross_generation": "Each block starts from real data (first line); below, what the model makes of each column, one sample.",
    "joint_generation": "Each column is one draw from the prior, decoded into every modality.",
    "imputation": "Rows with missing modalities, one a column; what the model filled in stands on colour.",
    "coherence_by_inputs": "Cross coherence against the number of modalities that the model starts from; dashed: the best there can be.",
    "coherence": "Coherence over steps, measured during training on part of the held-out rows.",
    "loss": "The loss and its terms over steps, means a row, in nats.",
    "latent_map": "Posterior means of single modalities. Modalities that mean the same should lie together, apart from other classes.",
    "relatedness": "Distances between posteriors across modalities; class matrix and dendrogram show which classes the model holds close.",
}


def _pictures(folder: Path) -> str:
    names = {path.stem: path for path in sorted((folder / FIGURES).glob("*.png"))}
    order = [*(name for name in CAPTIONS if name in names), *(name for name in names if name not in CAPTIONS)]
    titles = {name: name.replace("_", " ").capitalize() for name in order}
    shown = [f"### {titles[name]}\n\n{CAPTIONS.get(name, '')}\n\n![{titles[name]}]({FIGURES}/{names[name].name})" for name in order]
    return "\n\n".join(["## Figures", *shown]) if shown else ""


# ---- several runs ----------------------------------------------------------------------------------------------------------------------


def over_runs_table(folders: Sequence[Path]) -> str:
    """Runs of one experiment that differ in their seed: every measurement's mean with Student's t interval, and each run's own value.

    Raises ValueError for a folder that was not evaluated, and for runs that share no measurement.
    """
    flat = []
    for folder in folders:
        results = _read_json(folder / RESULTS)
        if results is None:
            raise ValueError(f"{folder}: expected an evaluated run, got a folder without {RESULTS}; evaluate it first")
        flat.append(flatten(results))
    found = aggregate(flat)
    digits = {name: 1 if name.startswith("log_likelihood") else 3 for name in found}
    lines = [
        [f"`{name}`", estimate(over.json(), digits=digits[name]), ", ".join(f"{run[name]:.{digits[name]}f}" for run in flat)]
        for name, over in found.items()
    ]
    return table(["measurement", f"mean of {len(flat)} runs", "each"], lines)
