"""The full evaluation of a model: every measurement, results.json, figures, report.md, and the table on the screen."""

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from meme_dist.classifiers import Classifier, ClassifierTraining, trained_classifiers
from meme_dist.data.index import Manifest
from meme_dist.data.stream import Evaluation
from meme_dist.evaluate import Learnt, alone, measure
from meme_dist.objectives.base import Objective
from meme_dist.progress import stage
from meme_dist.ranks import ALONE, Processes
from meme_dist.recipes.base import Recipe
from meme_dist.record import write_json
from meme_dist.report import FIGURES, RESULTS, illustrate, write_report
from meme_dist.stored import Stored
from meme_dist.tables import on_screen

EVALUATION_ROWS = 256  # of a batch, on each rank
GRID = Path(FIGURES) / "cross_generation.png"


class Place(NamedTuple):
    """This process among all that evaluate together."""

    rank: int = 0
    world: int = 1
    reduce: Callable[[Tensor], Tensor] = alone


def evaluation(manifest: Manifest, split: str, place: Place, *, seed: int, damaged: int = 0) -> Evaluation:
    """Every row of a split once, this rank's share of them; `damaged`: as many training rows as may be unreadable."""
    return Evaluation(manifest.folder, split, batch_size=EVALUATION_ROWS, rank=place.rank, world=place.world, seed=seed, damaged=damaged)


def classifiers_of(recipe: Recipe, manifest: Manifest, cache: Path, *, console: Console, visible: bool = True) -> dict[str, Classifier]:
    """The judges of coherence: trained once for a data set, then found in `cache`; none for rows without labels."""
    if len(manifest.classes) < 2:
        return {}
    with stage("looking for classifiers, or training them", console=console, visible=visible):
        return trained_classifiers(
            manifest.fields,
            len(manifest.classes),
            evaluation(manifest, "train", Place(), seed=0, damaged=recipe.training.damaged),
            fingerprint=manifest.fingerprint,
            cache=cache,
            build=recipe.judge,
            device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        )


def learnt_by_classifiers(recipe: Recipe, manifest: Manifest, place: Place) -> Learnt:
    """The rows of a data set that its classifiers learn from: at most as many as `ClassifierTraining` lets them see."""
    train, most = manifest.splits["train"], ClassifierTraining.rows
    share = min(1.0, most / train.rows)
    batches = evaluation(manifest, "train", place, seed=0, damaged=recipe.training.damaged).first(most)
    return Learnt(batches, {name: share * rows for name, rows in train.present.items()})


def check_judges(judges: Manifest, manifest: Manifest) -> None:
    """Raise ValueError, naming the first difference, unless both have the same fields and classes, so that one can judge the other."""
    ours, theirs = _judged(manifest), _judged(judges)
    for what, value in ours.items():
        if theirs.get(what) != value:
            raise ValueError(
                f"{judges.folder}: expected a judge with the {what} of the run, {reprlib.repr(value)}, "
                f"got {reprlib.repr(theirs.get(what))}; judge by a run on rows of the same modalities and classes"
            )


def _judged(manifest: Manifest) -> dict[str, Any]:
    """What a classifier depends on, by its name in words."""
    found: dict[str, Any] = {"modalities": list(manifest.fields), "classes": list(manifest.classes)}
    return found | {f"{entry} of {name}": value for name, field in manifest.fields.items() for entry, value in field.to_json().items()}


def assess(
    objective: Objective,
    recipe: Recipe,
    manifest: Manifest,
    folder: Path,
    classifiers: Mapping[str, Classifier],
    *,
    step: int,
    place: Place,
    console: Console,
    judges: Manifest | None = None,
    split: str = "test",
    how: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Measure what the recipe asks for. Collective; rank 0 writes results.json, the figures and report.md, and prints the table.

    `judges`: whose rows the classifiers learnt from, where they are not the run's own. `split`: whose rows count as the test rows. `how`:
    what else is not as usual (`report.USUAL`), for results.json and the report.
    """
    seed = recipe.measures.seed
    with stage("measuring", console=console, visible=place.rank == 0):
        measured = measure(
            objective,
            train=evaluation(manifest, "train", place, seed=seed, damaged=recipe.training.damaged),
            test=evaluation(manifest, split, place, seed=seed),
            fields=manifest.fields,
            classes=manifest.classes,
            classifiers=classifiers,
            learnt=learnt_by_classifiers(recipe, judges or manifest, place) if recipe.measures.information_rows else None,
            measures=recipe.measures,
            reduce=place.reduce,
            rank=place.rank,
            world=place.world,
        )
    if place.rank != 0:
        return
    results = {"step": step, "split": split, **how, **measured.results}
    write_json(folder / RESULTS, results)
    with stage("drawing figures", console=console, visible=True):
        rows = next(iter(evaluation(manifest, split, Place(), seed=seed)))
        illustrate(folder, objective, rows, fields=manifest.fields, classes=manifest.classes, measured=measured, seed=seed)
        report = write_report(folder)
    console.print(on_screen(results), markup=False, soft_wrap=True)
    console.print(f"\ngrid    {folder / GRID}\nreport  {report}", soft_wrap=True)


def assess_stored(
    stored: Stored,
    cache: Path,
    *,
    seed: int | None,
    judges: Manifest | None = None,
    processes: Processes = ALONE,
    console: Console,
    split: str = "test",
    how: Mapping[str, str] = MappingProxyType({}),
    correlation: int | None = None,
    information: int | None = None,
) -> None:
    """The full evaluation of a run that was trained earlier; classifiers from the rows of `judges`, or its own. Collective.

    `seed`, `correlation` (components) and `information` (rows) replace what the recipe's `Measures` say, where they are not None. Raises
    ValueError where classifiers of the rows of `judges` cannot judge the run's.
    """
    with processes.agreed():
        if judges is not None:
            check_judges(judges, stored.manifest)
    asked = {"seed": seed, "correlation_components": correlation, "information_rows": information}
    measures = replace(stored.recipe.measures, **{name: value for name, value in asked.items() if value is not None})
    recipe = replace(stored.recipe, measures=measures)
    classifiers: dict[str, Classifier] = {}
    for turn in (True, False):  # rank 0 trains the classifiers and stores them, then the others find them there
        with processes.agreed():
            if processes.is_main == turn:
                classifiers = classifiers_of(recipe, judges or stored.manifest, cache, console=console, visible=turn)
    place = Place(processes.rank, processes.world, processes.reduce)
    objective, _, manifest, folder, step = stored
    assess(
        objective,
        recipe,
        manifest,
        folder,
        classifiers,
        step=step,
        place=place,
        console=console,
        judges=judges,
        split=split,
        how=how,
    )
