"""The program: recipe -> shards -> stream -> trainer -> evaluation -> figures and report.

Every rank runs the same lines; rank 0 writes. What a run leaves behind, in its folder:

    run.json        recipe, keywords, commit, versions, machine: enough to run it again
    shards.json     what the shards' manifest says: the model can be built when they are elsewhere
    metrics.jsonl   one line a logged step, evaluations among them (and the same for TensorBoard)
    checkpoints/    last (for --resume) and best (lowest held-out loss), safetensors
    results.json    every measurement of the last evaluation, with 95 % intervals
    figures/        grids, latent maps, loss terms, relatedness
    report.md       all of it to read
"""

import hashlib
import itertools
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from rich.console import Console

from meme_dist import record
from meme_dist.assess import EVALUATION_ROWS, Place, assess, classifiers_of, evaluation
from meme_dist.classifiers import Classifier
from meme_dist.cost import Meter
from meme_dist.data.first import first_batch
from meme_dist.data.index import MANIFEST, Manifest
from meme_dist.data.shards import write_shards
from meme_dist.data.source import absolute, check_local
from meme_dist.data.stream import Evaluation, Stream
from meme_dist.evaluate import evaluate, values
from meme_dist.metrics.coherence import cross_coherence, source_sets
from meme_dist.metrics.rows import Metric
from meme_dist.objectives.base import Objective
from meme_dist.progress import shown, stage
from meme_dist.recipes.base import Recipe
from meme_dist.recipes.heeded import held
from meme_dist.recipes.keywords import defaults, flatten
from meme_dist.recipes.named import fingerprint, function_of, recipe_of, short
from meme_dist.train.claim import Claim, on_main
from meme_dist.train.heartbeat import Heart
from meme_dist.train.signals import Stop
from meme_dist.train.startup import loaders
from meme_dist.train.trainer import Trainer
from meme_dist.types import Batch, Sums

RUNS = Path("runs")
DATA = Path("data")
PROGRESS_ROWS = 2048  # test rows of an evaluation during the training
INITIAL_ROWS = 1024  # training rows from which data-dependent parameters are set
PATIENCE = 3600.0  # seconds that other processes wait for rank 0 to write the shards


class Ranks(NamedTuple):
    """This process among those that a launcher started together; one process without a launcher."""

    rank: int
    local: int
    world: int


@dataclass(frozen=True)
class Where:
    """Where a run is written."""

    run: str | None = None
    """Name of the run, or a path; by default the recipe and the time (one process). A bare name stands for runs/NAME."""
    resume: str | None = None
    """Continue this run (name or path) from its last checkpoint; without RECIPE, exactly as it began."""
    like: str | None = None
    """Start a new run with the recipe and the keywords of this one (name or path)."""
    data: Path = DATA
    """Folder in which shards and classifiers are written, once for each data set."""
    dry_run: int | None = None
    """Train nothing: say what the training would take on this many processes, in memory, traffic and time, under each engine."""
    evaluate: bool = True
    """Measure coherence on the way and everything at the end; without it, `meme-dist evaluate RUN` can do it later."""


@dataclass(frozen=True)
class WriteTo:
    """Where shards are written."""

    out: Path
    """New folder for the shards."""
    rows_per_shard: int = 1024
    """Rows of each tar file."""


class Prepared(NamedTuple):
    """All that is there before the first step."""

    name: str
    recipe: Recipe
    keywords: Mapping[str, Any]
    manifest: Manifest
    folder: Path


def ranks() -> Ranks:
    """From the environment, as torchrun and `accelerate launch` set it."""
    rank, local, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")))
    return Ranks(rank, local, world)


def run_folder(name: str) -> Path:
    """Where a run of this name is: a bare name stands in runs/ (unless a run is right here), a path is taken as it is.

    Raises ValueError for an address.
    """
    check_local(name)
    path = Path(name)
    if path.name == record.FILE:
        return path.parent
    here = len(path.parts) > 1 or (path / record.FILE).is_file()
    return path if here else RUNS / path


# ---- training ---------------------------------------------------------------------------------------------------------------------


def train(name: str, arguments: Mapping[str, Any], where: Where, *, console: Console) -> bool:
    """Train a recipe with these keywords and evaluate it; False where it was told to stop (SIGTERM, SIGUSR1, SIGINT) and saved.

    Raises ValueError for an existing run folder without `resume`, and for a resumed run whose recipe or keywords changed, that is trained
    further than it is asked to, or that `run` contradicts. What fails before the first step leaves no run folder.
    """
    started = ranks()
    prepared = prepare(name, arguments, where, started, console=console)
    with Stop() as stop:
        return train_prepared(prepared, where, started, stop, console=console)


def train_prepared(prepared: Prepared, where: Where, started: Ranks, stop: Stop, *, console: Console) -> bool:
    """The training itself, from the objective to the report; False where it was stopped before its last step.

    Meanwhile the run's folder is this training's alone: ValueError, on all ranks, where another one is at work there.
    """
    with Claim() as claim:
        return _train_claimed(prepared, where, started, stop, claim, console=console)


def _train_claimed(prepared: Prepared, where: Where, started: Ranks, stop: Stop, claim: Claim, *, console: Console) -> bool:
    heart = Heart(prepared.folder, rank=started.rank, world=started.world)
    objective = initial_objective(prepared.recipe, prepared.manifest)
    parameters = sum(p.numel() for p in objective.parameters())  # before an engine shards them
    trainer = build_trainer(objective, prepared, started, stop=stop, heart=heart)
    if trainer.is_main:
        about = f"{prepared.folder}: {prepared.name}, {described(prepared.manifest)}, {trainer.engine.name} on {trainer.world}"
        console.print(about, soft_wrap=True)
    if where.resume is not None:
        on_main(trainer.is_main, trainer.reduce, lambda: claim.begin(prepared.folder))
        if not trainer.resume() and trainer.is_main:
            console.print(f"{prepared.folder}: it has no checkpoint yet, so it starts from the beginning", soft_wrap=True)
    training = prepared.recipe.training
    if trainer.step > training.steps:
        raise ValueError(
            f"{prepared.folder}: was trained for {trainer.step} steps, more than the {training.steps} it is asked for; "
            f"give --steps {trainer.step} or more, or start a new run from its settings: --like {prepared.folder}"
        )
    watch = Watch(prepared, trainer, where.data / "classifiers" if where.evaluate else None, console=console)
    _write_down(prepared, trainer, claim, new=where.resume is None)
    meter = Meter()

    def look() -> None:
        with heart.resting(), meter.paused():
            watch.evaluate()

    with heart:
        if trainer.evaluated < trainer.step and watch.due(trainer.step):  # the checkpoint is from before it
            look()
        for report in shown(trainer, total=training.steps, console=console, visible=trainer.is_main):
            last = report.step == training.steps
            if last or report.step % training.save_every == 0:  # before the look: if that fails, nothing is lost
                trainer.save(wait=False)
            if last or watch.due(report.step) and not trainer.stopping:
                look()
    done = trainer.step == training.steps
    if not done:
        trainer.save()
    if trainer.is_main:
        meter.write(prepared.folder, step=trainer.step, parameters=parameters)
    if where.evaluate and done:
        watch.measure()
    trainer.close()
    if not done and trainer.is_main:
        console.print(f"{prepared.folder}: stopped and saved at step {trainer.step}; go on with --resume {prepared.folder}", soft_wrap=True)
    return done


def prepare(name: str, arguments: Mapping[str, Any], where: Where, started: Ranks, *, console: Console) -> Prepared:
    """The recipe, its shards (written where they are not there yet) and the folder for the run, which is not made yet."""
    check_local(where.data)
    keywords, folder = flatten(arguments), _folder(name, where, started.world)
    old = None if where.resume is None else record.load(folder)
    if "shards" in keywords:  # a run must find them from any folder
        keywords["shards"] = absolute(keywords["shards"])
    if old is not None:
        record.check_unchanged(folder, old, name, keywords, defaults(recipe_of(name)))
    elif started.rank == 0:  # before an hour of writing shards
        record.check_new(folder)
    say = (lambda text: console.print(text, markup=False, soft_wrap=True)) if started.rank == 0 else None
    recipe = held(function_of(name), say)(**arguments)
    if old is not None and _same_source(old, keywords) and (Path(old.shards) / MANIFEST).is_file():
        manifest = Manifest.load(old.shards)  # its own, also where the files that they were made from have gone or are others by now
    else:
        manifest = shards_of(recipe, where.data, started, console=console)
    return Prepared(name, recipe, keywords, manifest, folder)


def shards_of(recipe: Recipe, data: Path, started: Ranks, *, console: Console) -> Manifest:
    """The recipe's shards: those that it names, or its data set written into a folder of its own, once.

    A hash in the folder's name stands for the keywords and for the content of the files that the rows are read from.
    """
    check_local(data)
    if recipe.shards is not None:
        return Manifest.load(recipe.shards)
    assert recipe.dataset is not None
    dataset = recipe.dataset.sealed()
    key = {"source": dataset.source, "fields": {name: field.to_json() for name, field in dataset.fields.items()}}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:8]
    folder = data / f"{dataset.name}-{digest}"
    if started.local != 0:  # one process of each machine writes
        _wait_for(folder / MANIFEST)
        return Manifest.load(folder)
    new = not (folder / MANIFEST).is_file()
    with stage(f"writing the rows of {dataset.name} into shards: {folder}", console=console, visible=new):
        return write_shards(dataset, folder)


def _same_source(old: record.Record | None, keywords: Mapping[str, Any]) -> bool:
    """Does a run read its rows from where it began, as it was told then?"""
    return old is not None and all(keywords.get(place) == old.keywords.get(place) for place in record.PLACES)


def initial_objective(recipe: Recipe, manifest: Manifest) -> Objective:
    """The objective as training begins, the same on every rank: weights from the seed, pseudo-inputs from a first step of many rows.

    A row that cannot be read is passed over as in training.
    """
    training = recipe.training
    torch.manual_seed(training.seed)
    objective = recipe.build(manifest)
    objective.initialise(first_batch(manifest, "train", rows=INITIAL_ROWS, seed=training.seed, damaged=training.damaged))
    return objective


def build_trainer(objective: Objective, prepared: Prepared, started: Ranks, *, stop: Stop, heart: Heart) -> Trainer:
    """Stream and trainer; raises ValueError where the ranks disagree about what to train."""
    manifest, training = prepared.manifest, prepared.recipe.training
    stream = Stream(
        manifest.folder,
        "train",
        batch_size=training.batch_size,
        seed=training.seed,
        rank=started.rank // training.members,  # the members of a group see the same rows
        world=max(1, started.world // training.members),
        accumulate=training.accumulate,
        workers=loaders(training),
        damaged=training.damaged,
    )
    own = {name: value for name, value in prepared.keywords.items() if name not in {*vars(training), *record.PLACES}}
    known = {f"training.{name}" if name in vars(training) else name: value for name, value in defaults(recipe_of(prepared.name)).items()}
    return Trainer(objective, stream, training, folder=prepared.folder, configuration=own, defaults=known, stop=stop, heart=heart)


def _write_down(prepared: Prepared, trainer: Trainer, claim: Claim, *, new: bool) -> None:
    """The run's folder and its run.json, or where a resumed run's shards are now. Collective: then every rank may write there."""
    name, _, keywords, manifest, folder = prepared

    def write() -> None:
        if new:
            about = record.describe(name, keywords, manifest.address, world=trainer.world, sha256=fingerprint(name))
            record.create(folder, about, manifest)
            claim.begin(folder)
        else:
            record.move(folder, manifest, keywords)

    on_main(trainer.is_main, trainer.reduce, write)


def described(manifest: Manifest) -> str:
    """What there is to train on, in a line: rows, modalities, the share of missing entries."""
    split = manifest.splits["train"]
    missing = 1 - sum(split.present.values()) / (split.rows * len(manifest.fields))
    use = {"train": "train", "validation": "choose the best step"}
    rows = ", ".join(f"{entry.rows:,} rows to {use.get(name, 'test')} on" for name, entry in manifest.splits.items())
    return f"{rows}, modalities {', '.join(manifest.fields)}, {missing:.0%} of the training entries missing"


class Watch:
    """Evaluations of a training: short ones on the way, for the log and to know the best step, and the full one at its end."""

    def __init__(self, prepared: Prepared, trainer: Trainer, cache: Path | None, *, console: Console):
        self.prepared, self.trainer, self.console = prepared, trainer, console
        self.place = Place(trainer.rank, trainer.world, trainer.reduce)
        self.rows = self._rows(measured=cache is not None)
        self.classifiers = {} if cache is None else self._in_turn(cache)

    def due(self, step: int) -> bool:
        """Is the training looked at after this step?"""
        training = self.prepared.recipe.training
        return step % training.evaluate_every == 0 or step == training.steps

    def evaluate(self) -> dict[str, float]:
        """Held-out loss and, with labels, cross coherence on the first rows of the validation split (without one, of the test split).

        They are logged, and the best step's weights kept. Nothing of it where there is neither split.
        """
        manifest, trainer = self.prepared.manifest, self.trainer
        if self.rows is None:
            return {}
        metrics: list[Metric] = [held_out_loss]
        if self.classifiers:
            metrics.append(cross_coherence(self.classifiers, source_sets(list(manifest.fields))))
        most = -(-PROGRESS_ROWS // (EVALUATION_ROWS * trainer.world))
        with trainer.averaged() as module:
            found = values(evaluate(cast(Objective, module), itertools.islice(self.rows, most), metrics, reduce=trainer.reduce))
        trainer.log(found)
        trainer.save_best(-found["held_out/loss"], wait=False)
        return found

    def measure(self) -> None:
        """Everything, at the end: results.json, figures, report, and the table on the screen."""
        prepared, trainer = self.prepared, self.trainer
        with trainer.averaged() as module:
            assess(
                cast(Objective, module),
                prepared.recipe,
                prepared.manifest,
                prepared.folder,
                self.classifiers,
                step=trainer.step,
                place=self.place,
                console=self.console,
            )

    def _rows(self, *, measured: bool) -> Evaluation | None:
        """The rows to watch; None without such a split. Raises ValueError, before a step is made, for splits or shards that are missing."""
        manifest, seed = self.prepared.manifest, self.prepared.recipe.training.seed
        if measured and "test" not in manifest.splits:
            raise ValueError(
                f"{manifest.folder}: expected a split 'test' to measure on at the end, got only {', '.join(manifest.splits)}; "
                "add one, or train without measuring: --no-evaluate"
            )
        used = dict.fromkeys([manifest.watched, "test"] if measured else [manifest.watched])
        rows = {split: evaluation(manifest, split, self.place, seed=seed) for split in used if split in manifest.splits}
        if not rows and self.trainer.is_main:
            self.console.print(f"{manifest.folder}: no validation or test rows, so no held-out loss and no best step", soft_wrap=True)
        return rows.get(manifest.watched)

    def _in_turn(self, cache: Path) -> dict[str, Classifier]:
        """Rank 0 trains the classifiers and stores them, then the others find them there."""
        found: dict[str, Classifier] = {}
        for turn in (True, False):
            if self.trainer.is_main == turn:
                try:
                    found = classifiers_of(self.prepared.recipe, self.prepared.manifest, cache, console=self.console, visible=turn)
                except ValueError as error:
                    raise ValueError(f"{error}; or train without measuring: --no-evaluate") from error
            self.trainer.reduce(torch.zeros(1))
        return found


def held_out_loss(objective: Objective, batch: Batch) -> Mapping[str, Sums]:
    """The training loss of rows that were not trained on, `held_out/loss`."""
    return {"held_out/loss": Sums(objective(batch).total.detach(), batch.observed.any(1).sum())}


def _folder(name: str, where: Where, world: int) -> Path:
    if where.resume is not None:
        folder = run_folder(where.resume)
        if where.run is not None and run_folder(where.run).resolve() != folder.resolve():
            raise ValueError(
                f"--resume goes on in {folder}, got --run {where.run} with it; leave --run out, or begin that run anew: --like {folder}"
            )
        return folder
    if where.run is not None:
        return run_folder(where.run)
    if world > 1:  # each would name it by its own clock, and write its share of a checkpoint into a folder of its own
        raise ValueError(f"train: {world} processes share one run, which needs a name that all of them know; add --run NAME")
    return RUNS / f"{short(name)}-{time.strftime('%Y%m%d-%H%M%S')}"


def _wait_for(file: Path) -> None:
    """Another process writes this file last of all. If that process fails, the launcher ends this one too."""
    deadline = time.monotonic() + PATIENCE
    while not file.is_file():
        if time.monotonic() > deadline:
            raise ValueError(
                f"{file}: waited {PATIENCE / 60:.0f} minutes for another process to write it; write it first: meme-dist shards write"
            )
        time.sleep(0.2)
