"""Attribute subspaces (CSVAE): does z stop telling the label, does w tell it, does an edit change it and nothing else?

Each row is a training by the library's own recipe and trainer, then probed on test rows (`meme_dist.metrics.leakage`):

    z, w      accuracy of fresh perceptrons that read the label from samples of the free latents, or of the label's block
    base      that of always guessing the commonest label of the test rows
    swap      share of test rows that show the other label, by the known rule, once the block is set to it
    shift     how far an edit moves what it should leave alone (swiss roll: the two coordinates of the roll, whose radius is 14)

The control has no term of independence (weight 0). Aims on the swiss roll: z within 2 points of the base rate, w and swap high.
"""

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.record import keep
from meme_dist.data.index import Manifest
from meme_dist.data.sets import mnist_attributes as digits
from meme_dist.data.sets.swiss_roll import low
from meme_dist.data.stream import Evaluation, Stream
from meme_dist.evaluate import evaluate
from meme_dist.metrics.intervals import over_runs
from meme_dist.metrics.leakage import FREE, Rest, Rule, edits, estimates, leakage
from meme_dist.objectives.csvae import CSVAE, Independence
from meme_dist.recipes.base import Model, Recipe
from meme_dist.recipes.mnist_attributes import mnist_attributes
from meme_dist.recipes.swiss_roll import swiss_roll
from meme_dist.run import Ranks, initial_objective, shards_of
from meme_dist.train.startup import device
from meme_dist.train.trainer import Trainer

Row = dict[str, Any]
PROBED = 4000  # rows of either split that the probes see
AIMS = {"z": 0.02, "w": 0.99, "swap": 0.95}  # above the base rate; at least; at least


class Case(NamedTuple):
    """One training."""

    data: str
    independence: Independence
    weight: float
    block_weight: float | None  # None: the recipe's
    seed: int


def main(
    *,
    seeds: int = 3,
    steps: int = 5000,
    weights: tuple[float, ...] = (0.0, 10.0),
    hsic: tuple[float, ...] = (1000.0, 10_000.0),
    block_weights: tuple[float, ...] = (1.0,),
    source: Path | None = None,
    digit_seeds: int = 1,
    digit_steps: int = 1500,
    digit_rows: int = 10_000,
    threads: int = 2,
    save: bool = True,
) -> None:
    """Leakage, swaps and purity of CSVAE on the swiss roll, and on MNIST with measured attributes where its file is at hand.

    Args:
        seeds: Seeds of each setting on the swiss roll.
        steps: Training steps there.
        weights: Weights of the adversary (reversal); 0 is the control.
        hsic: Weights of HSIC in its place.
        block_weights: Also the recipe's adversary with these weights of the block's KL: what becomes of an edit's purity.
        source: Folder with mnist.npz; without it the digits are left out.
        digit_seeds: Seeds of each setting on MNIST.
        digit_steps: Training steps there.
        digit_rows: Training images there.
        threads: CPU threads.
        save: Append the rows to benchmarks/results/attributes.jsonl.
    """
    torch.set_num_threads(threads)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(seeds, weights, hsic, block_weights, digit_seeds if source else 0):
            recipe = recipe_of(case, steps if case.data == "swiss_roll" else digit_steps, source, digit_rows)
            rows += measured(case, recipe, Path(folder), source)
            print(told(rows[-1]), flush=True)
    show(rows)
    if save and rows:
        print(f"\nkept in {keep('attributes', rows, device=device(), threads=threads)}")


def cases(seeds: int, weights: Sequence[float], hsic: Sequence[float], block_weights: Sequence[float], digit_seeds: int) -> Iterator[Case]:
    """The grid, seed by seed."""
    default = Model(objective="csvae").independence_weight
    for seed in range(seeds):
        yield from (Case("swiss_roll", "reversal", weight, None, seed) for weight in weights)
        yield from (Case("swiss_roll", "hsic", weight, None, seed) for weight in hsic)
        yield from (Case("swiss_roll", "reversal", default, block, seed) for block in block_weights)
    for seed in range(digit_seeds):
        yield from (Case("mnist_attributes", "reversal", weight, None, seed) for weight in weights)
        yield from (Case("mnist_attributes", "hsic", weight, None, seed) for weight in hsic)


def recipe_of(case: Case, steps: int, source: Path | None, rows: int) -> Recipe:
    """The recipe as it comes, with this case's setting."""
    made = swiss_roll if case.data == "swiss_roll" else mnist_attributes
    defaults: Mapping[str, Any] = made.__kwdefaults__
    model = replace(defaults["model"], independence=case.independence, independence_weight=case.weight)
    if case.block_weight is not None:
        model = replace(model, block_weight=case.block_weight)
    training = replace(defaults["training"], steps=steps, seed=case.seed)
    if case.data == "swiss_roll":
        return swiss_roll(model=model, training=training)
    assert source is not None
    return mnist_attributes(source=source, rows_in_all=rows, model=model, training=training)


def measured(case: Case, recipe: Recipe, folder: Path, source: Path | None) -> list[Row]:
    """Train, then a row for each attribute."""
    start = time.process_time()
    manifest = shards_of(recipe, folder, Ranks(0, 0, 1), console=Console(quiet=True))
    objective = initial_objective(recipe, manifest)
    assert isinstance(objective, CSVAE)
    training = recipe.training
    stream = Stream(manifest.folder, "train", batch_size=training.batch_size, seed=training.seed)
    for _ in (trainer := Trainer(objective, stream, training)):
        pass
    trainer.close()
    spent = time.process_time() - start
    target, rules, rest = judged(case.data, source)
    matrix = leakage(objective, split(manifest, "train"), split(manifest, "test"), rows=PROBED)
    changed = evaluate(objective, split(manifest, "test"), [lambda _, batch: edits(objective, batch, target, rules, rest)])
    found = estimates(changed)
    rows = []
    for name in objective.attributes:
        others = {f"w of {part}": e.value for (who, part), e in matrix.accuracy.items() if who == name and part not in (FREE, name)}
        kept = {key: e.value for key, e in found.items() if key.startswith(f"kept/{name}>")}
        values = {
            "base": matrix.base[name].value,
            "z": matrix.accuracy[name, FREE].value,
            "w": matrix.accuracy[name, name].value,
            **others,
            "swap": found[f"success/{name}"].value,
            "reconstructed": found[f"reconstructed/{name}"].value,
            **({"shift": found[f"shift/{name}"].value} if rest else {}),
            **kept,
        }
        about = {**case._asdict(), "steps": training.steps, "attribute": name, "cpu_seconds": round(spent, 1)}
        rows.append({**about, **{key: round(value, 4) for key, value in values.items()}})
    return rows


def split(manifest: Manifest, name: str) -> Evaluation:
    """Every row of a split, in order."""
    return Evaluation(manifest.folder, name, batch_size=500, seed=0)


def judged(data: str, source: Path | None) -> tuple[str, dict[str, Rule], Rest | None]:
    """What is edited, by which rules it is judged, and what should stay."""
    if data == "swiss_roll":
        return "point", {"low": lambda x: low(x).long()}, lambda x: x[:, [0, 2]]
    assert source is not None
    attributes = digits.rule(digits.read(source)["x_train"])

    def rule(name: str) -> Rule:
        return lambda x: torch.from_numpy(attributes.of(_pixels(x))[name]).long().to(x.device)

    return "digit", {name: rule(name) for name in digits.ATTRIBUTES}, None


def _pixels(x: Tensor) -> Any:
    return x[:, 0].cpu().numpy()


# ---- telling ----------------------------------------------------------------------------------------------------------------------------

COLUMNS = ("base", "z", "w", "swap", "shift", "reconstructed")


def told(row: Row) -> str:
    """One row, as it comes."""
    values = ", ".join(f"{key} {row[key]:.3f}" for key in COLUMNS if key in row)
    return f"{setting(row)}, seed {row['seed']}, {row['attribute']}: {values} ({row['cpu_seconds']:.0f} s)"


def setting(row: Row) -> str:
    """What is compared."""
    block = "" if row["block_weight"] is None else f", block weight {row['block_weight']:g}"
    return f"{row['data']}: {row['independence']} {row['weight']:g}{block}"


def show(rows: Sequence[Row]) -> None:
    """Means over seeds with 95 % t intervals, the worst seed, and whether every seed reaches the aims."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((setting(row), row["attribute"]), []).append(row)
    print(f"\n{'':<46}{'':<9}{'base':>6}{'z':>24}{'w':>24}{'swap':>24}{'shift':>18}{'aims':>7}")
    for (name, attribute), group in groups.items():
        cells = [f"{group[0]['base']:>6.3f}"] + [_cell([row[key] for row in group]).rjust(24) for key in ("z", "w", "swap")]
        shift = _cell([row["shift"] for row in group]) if "shift" in group[0] else "-"
        print(f"{name:<46}{attribute:<9}" + "".join(cells) + shift.rjust(18) + f"{sum(map(reached, group))}/{len(group)}".rjust(7))


def reached(row: Row) -> bool:
    """Whether a training does all that is asked of it."""
    return row["z"] <= row["base"] + AIMS["z"] and row["w"] >= AIMS["w"] and row["swap"] >= AIMS["swap"]


def _cell(values: Sequence[float]) -> str:
    found = over_runs(values)
    spread = f" [{found.low:.3f}, {found.high:.3f}]" if len(values) > 1 else ""
    return f"{found.value:.3f}{spread}"
