"""Whether the runs of a comparison are measured, all of them alike: as its plan asks, and not by hand in another way since."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meme_dist import record
from meme_dist.compare.cells import Cell, Plan
from meme_dist.data.index import Manifest
from meme_dist.recipes.keywords import unflatten
from meme_dist.recipes.named import function_of
from meme_dist.report import REPORT, RESULTS

RUNS = "runs"
JUDGE = "judge"  # names the run whose rows train the classifiers


def measured(folder: Path, steps: int) -> bool:
    """Whether a run was trained for so many steps and measured to the end (the report is written last)."""
    return (folder / REPORT).is_file() and results_of(folder).get("step") == steps


def as_planned(plan: Plan, cell: Cell, folder: Path) -> bool:
    """Whether a cell was measured, and as all others are: what is done of a comparison."""
    return measured(folder / RUNS / cell.folder, cell.keywords["steps"]) and not otherwise(plan, cell, folder)


def otherwise(plan: Plan, cell: Cell, folder: Path) -> str:
    """How a cell was measured otherwise than the comparison in `folder` measures it, in words; empty where it was not.

    Somebody can have measured a run by hand: by another judge, with another seed, at another checkpoint. Such figures do not belong beside
    the others. What results do not say, since they are older than the entry, counts as planned.
    """
    results = results_of(folder / RUNS / cell.folder)
    planned = {"seed": _seed_of(plan.recipe, json.dumps(dict(cell.keywords))), "checkpoint": "last"}
    differ = [
        f"{name} {results[name]} in place of {value}"
        for name, value in planned.items()
        if value is not None and results.get(name, value) != value
    ]
    return ", ".join(filter(None, [_wrong_judge(plan, cell, folder, results), *differ]))


@functools.cache
def _seed_of(recipe: str, keywords: str) -> int | None:
    """The seed that a run with these keywords (JSON) is measured with; None where its recipe cannot be asked."""
    try:
        function = function_of(recipe)
        return function(**unflatten(function, json.loads(keywords))).measures.seed
    except Exception:  # of somebody's code and files: anything
        return None


def _wrong_judge(plan: Plan, cell: Cell, folder: Path, results: Mapping[str, Any]) -> str:
    name, given = cell.run if plan.judge == "own" else judge_of(folder), results.get("judge")
    if name is None:
        return ""
    judge, run = folder / RUNS / name, folder / RUNS / cell.run
    if given is None:
        right = name == cell.run or "split" not in results or not _can_judge(judge, run)  # older than `split`: than `judge` too
    else:
        right = _same(Path(given), judge)
    return "" if right else f"judge {given or run} in place of {judge}"


def judge_of(folder: Path) -> str | None:
    """The run of a comparison whose rows judge all of its runs (`judge="first"`); None where none does yet, or it is gone."""
    file = folder / JUDGE
    name = file.read_text(encoding="utf-8").strip() if file.is_file() else ""
    return name if name and (folder / RUNS / name / record.FILE).is_file() else None


def _same(given: Path, judge: Path) -> bool:
    """Whether what results name is this run: there, or where the comparison was before it was moved, or copied with the same rows."""
    if given.resolve() == judge.resolve():
        return True
    if given.name != judge.name or not given.is_absolute():
        return False
    return not (given / record.FILE).is_file() or record.load(given).shards == record.load(judge).shards


def results_of(folder: Path) -> dict[str, Any]:
    """The content of a folder's results.json, nothing where there is none. Raises ValueError where it is no JSON."""
    path = folder / RESULTS
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected JSON ({error}); measure the run again: meme-dist evaluate {path.parent}") from error


def alike(*runs: Path | str) -> bool:
    """Whether runs have the same modalities and classes, so that one's classifiers can judge the other. Raises as `Manifest.load`."""
    first, second = (Manifest.load(record.load(Path(run)).shards) for run in runs)
    return first.fields == second.fields and first.classes == second.classes


def _can_judge(judge: Path, run: Path) -> bool:
    try:
        return alike(judge, run)
    except (ValueError, OSError):  # their rows have gone: the report says whose classifiers judged (`report._judged`)
        return False
