"""Whether the cells of a comparison can be trained, and are different ones: found out before hours are spent, by building each once."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

from meme_dist.compare.cells import Cell, Plan
from meme_dist.data.index import Manifest, Split
from meme_dist.pooled import Pool, Pooled
from meme_dist.recipes.base import Recipe
from meme_dist.recipes.heeded import Unheeded, watch
from meme_dist.recipes.keywords import unflatten
from meme_dist.recipes.named import function_of


def check(plan: Plan) -> None:
    """Raise ValueError, naming the cell, for a model or a pool that is refused, and for two models that train the same in every setting."""
    first = [cell for cell in plan.cells() if cell.seed == plan.seeds[0]]
    trained = [cell for cell in first if cell.pool is None]
    read = {cell.run: _read(plan, cell, [other for other in first if other.pool and other.run == cell.run]) for cell in trained}
    each = {model: [(read[cell.run], cell.pool) for cell in first if cell.model == model] for model in plan.models}
    for a, b in itertools.combinations(plan.models, 2):
        if each[a] == each[b]:
            asked = [{**plan.common, **plan.models[model]} for model in (a, b)]
            differ = ", ".join(sorted(name for name in {*asked[0], *asked[1]} if asked[0].get(name) != asked[1].get(name)))
            why = f"they differ in {differ}, which neither reads" if differ else "they have the same settings"
            raise ValueError(f"models {a!r} and {b!r} would be the same model twice: {why}; leave one of them out")


def _read(plan: Plan, cell: Cell, pooled: Sequence[Cell]) -> Mapping[str, Any]:
    """The keywords of a run that it reads. What breaks otherwise than in words of refusal reads all: its own runs say what is wrong."""
    function, keywords = function_of(plan.recipe), dict(cell.keywords)
    try:
        watching = watch(function, unflatten(function, keywords))
        objective, unread = watching.build(_manifest(watching.made))
    except Exception as error:  # of somebody's code and files: anything
        _refuse(plan, cell, error)
        return keywords
    for other in pooled:
        try:
            Pooled(objective, cast(Pool, other.pool))
        except Exception as error:
            _refuse(plan, other, error)
    return {name: value for name, value in keywords.items() if name not in unread}


def _refuse(plan: Plan, cell: Cell, error: Exception) -> None:
    """Raise a refusal, naming the cell; not of an ablation's part, since not every one of the default parts fits every base."""
    part = plan.kind == "ablation" and cell.model != plan.against
    if isinstance(error, Unheeded) or isinstance(error, ValueError) and not part:
        raise ValueError(f"{cell.name}: {error}") from None


class _Unwritten(Mapping[str, Split]):
    """The splits of rows that are not written yet: a recipe that asks for them can be built by its own runs only."""

    def __getitem__(self, name: str) -> NoReturn:
        raise RuntimeError(f"no split {name!r}: the rows are not written yet")

    def __iter__(self) -> NoReturn:
        raise RuntimeError("no splits: the rows are not written yet")

    def __len__(self) -> NoReturn:
        raise RuntimeError("no splits: the rows are not written yet")


def _manifest(recipe: Recipe) -> Manifest:
    """The rows' manifest; of those that are not written yet, what is known of it: the fields, all that most recipes build from."""
    if recipe.shards is not None:
        return Manifest.load(recipe.shards)
    assert recipe.dataset is not None
    return Manifest(Path(), recipe.dataset.name, recipe.dataset.fields, recipe.dataset.classes, {}, 0, _Unwritten())
