"""Whether the models of a comparison are different ones: found out before hours are spent, by building each of them once."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meme_dist.compare.cells import Cell, Plan
from meme_dist.data.index import Manifest
from meme_dist.recipes.base import Recipe
from meme_dist.recipes.heeded import Unheeded, watch
from meme_dist.recipes.keywords import unflatten
from meme_dist.recipes.named import function_of


def check(plan: Plan) -> None:
    """Raise ValueError for two models that would train the same in every setting, and for one that its recipe of one's own ignores."""
    first = [cell for cell in plan.cells() if cell.seed == plan.seeds[0]]
    read = {cell.run: _read(plan.recipe, cell) for cell in first if cell.pool is None}
    each = {model: [(read[cell.run], cell.pool) for cell in first if cell.model == model] for model in plan.models}
    for a, b in itertools.combinations(plan.models, 2):
        if each[a] == each[b]:
            asked = [{**plan.common, **plan.models[model]} for model in (a, b)]
            differ = ", ".join(sorted(name for name in {*asked[0], *asked[1]} if asked[0].get(name) != asked[1].get(name)))
            why = f"they differ in {differ}, which neither reads" if differ else "they have the same settings"
            raise ValueError(f"models {a!r} and {b!r} would be the same model twice: {why}; leave one of them out")


def _read(recipe: str, cell: Cell) -> Mapping[str, Any]:
    """The keywords of a run that it reads. What cannot be built here reads all: its own runs say what is wrong, and the others go on."""
    function, keywords = function_of(recipe), dict(cell.keywords)
    try:
        watching = watch(function, unflatten(function, keywords))
        _, unread = watching.build(_manifest(watching.made))
    except Unheeded as error:
        raise ValueError(f"{cell.name}: {error}") from None
    except Exception:  # of somebody's code and files: anything
        return keywords
    return {name: value for name, value in keywords.items() if name not in unread}


def _manifest(recipe: Recipe) -> Manifest:
    """The rows' manifest; of those that are not written yet, what is known of it: the fields, all that a recipe builds from."""
    if recipe.shards is not None:
        return Manifest.load(recipe.shards)
    assert recipe.dataset is not None
    return Manifest(Path(), recipe.dataset.name, recipe.dataset.fields, recipe.dataset.classes, {}, 0, {})
