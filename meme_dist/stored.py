"""A run that was trained: its model, its recipe and its rows, from its folder alone."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch

from meme_dist import record
from meme_dist.data.index import Manifest
from meme_dist.objectives.base import Objective
from meme_dist.pooled import Pool, Pooled
from meme_dist.ranks import ALONE, Processes
from meme_dist.recipes.base import Recipe
from meme_dist.recipes.keywords import unflatten
from meme_dist.recipes.named import recipe_of
from meme_dist.train import checkpoint as checkpoints


class Stored(NamedTuple):
    """A trained model and what belongs to it."""

    objective: Objective
    recipe: Recipe
    manifest: Manifest
    folder: Path
    step: int


def arguments_of(folder: Path) -> tuple[str, dict[str, Any]]:
    """The recipe's name and its keywords, as a run's run.json has them. Raises ValueError for a recipe that is not there."""
    saved = record.load(folder)
    try:
        return saved.recipe, unflatten(recipe_of(saved.recipe), saved.keywords)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def load(
    folder: Path, *, checkpoint: str = "last", device: torch.device | None = None, rows: bool = True, shards: str | None = None
) -> Stored:
    """The model of a run, with its averaged weights where it has some, on `device`: by default a GPU if there is one.

    `shards`: where its rows are now, if they have moved. Without `rows` nobody will read them, and they need not be there. Raises
    ValueError where there is no such run or checkpoint, where the shards have gone or are others, where the weights are another model's, or
    where the recipe's file was changed (`record.check_recipe`).
    """
    name, arguments = arguments_of(folder)
    record.check_recipe(folder, record.load(folder))
    recipe = recipe_of(name)(**arguments)
    manifest = _shards_of(folder, shards) if rows else _kept(folder) or _shards_of(folder, shards)
    torch.manual_seed(recipe.training.seed)
    objective = recipe.build(manifest)
    place = folder / "checkpoints" / checkpoint
    try:
        step = checkpoints.load_weights(objective, place)
        seen = checkpoints.read(place, only=[]).state["stream"].get("shards", manifest.fingerprint)
    except FileNotFoundError as error:
        raise ValueError(f"{error}; train it further: meme-dist train --resume {folder}") from None
    if seen != manifest.fingerprint:
        raise ValueError(
            f"{manifest.folder}: expected the shards that {folder} was trained on (fingerprint {seen[:12]}), got others "
            f"({manifest.fingerprint[:12]}); name the folder that has them: meme-dist evaluate {folder} --shards FOLDER"
        )
    objective.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    return Stored(objective, recipe, manifest, folder, step)


def _shards_of(folder: Path, shards: str | None) -> Manifest:
    try:
        return Manifest.load(shards or record.load(folder).shards)
    except ValueError as error:
        raise ValueError(
            f"{folder}: its rows cannot be read: {error}. If the shards have moved, say once where they are: "
            f"meme-dist evaluate {folder} --shards FOLDER"
        ) from None


def _kept(folder: Path) -> Manifest | None:
    """What the manifest of a run's shards said, wherever they are now; None for a run that did not keep it."""
    file = folder / record.ROWS
    if not file.is_file():
        return None
    try:
        return Manifest.of(record.load(folder).shards, json.loads(file.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file}: not the description of a run's rows ({error!r}); remove it, the shards describe them too") from error


def pooled(stored: Stored, pool: Pool, processes: Processes = ALONE) -> Stored:
    """The same run asked another way, in a folder of its own within the run's (pooled-POOL, with the run's run.json). Collective."""
    return within(stored, f"pooled-{pool}", processes)._replace(objective=Pooled(stored.objective, pool))


def on_split(stored: Stored, split: str, processes: Processes = ALONE) -> Stored:
    """The same run measured on a split other than test, in a folder of its own within the run's (on-SPLIT). Collective.

    Raises ValueError where the data set has no such split.
    """
    if split not in (splits := stored.manifest.splits):
        known = ", ".join(splits)
        raise ValueError(f"{stored.folder}: there is no split {split!r} (it has {known}); recipes hold rows out with --validation .1")
    return stored if split == "test" else within(stored, on(split), processes)


def on(split: str) -> str:
    """The folder, within a run's, of what was measured on a split other than test."""
    return f"on-{split}"


def within(stored: Stored, name: str, processes: Processes = ALONE) -> Stored:
    """The same run, with a folder of its own within the run's to write to (and the run's run.json in it). Collective."""
    folder = stored.folder / name
    with processes.agreed():
        if processes.is_main:
            folder.mkdir(exist_ok=True)
            shutil.copyfile(stored.folder / record.FILE, folder / record.FILE)
    return stored._replace(folder=folder)
