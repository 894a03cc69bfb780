"""`meme-dist compare` and `meme-dist ablate`: what they are asked, and what they do: plan, run every cell, report.

A comparison's folder:

    plan.json              what is compared: every keyword of every cell
    runs/MODEL-SETTING-seedS   run folders as `meme-dist train` makes them
    logs/                  what each run said
    table.json, costs.json, measurements.md, .csv and .tex, figures/, report.md
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
from rich.console import Console

from meme_dist import signal_to_noise
from meme_dist.compare import cells
from meme_dist.compare.cells import JudgeAsked, Plan
from meme_dist.compare.planned import RUNS
from meme_dist.compare.report import AGAIN, write_report
from meme_dist.compare.running import Runner, Running
from meme_dist.compare.tabulation import read
from meme_dist.data.source import absolute
from meme_dist.flags import PROGRAM, STYLE, recipe_flags, recipe_named, value_of
from meme_dist.recipes.keywords import flatten
from meme_dist.recipes.named import is_own, short
from meme_dist.record import write_json
from meme_dist.supervise import progress
from meme_dist.train.signals import SAVED

T = TypeVar("T")

BASE = "base"
LISTS = ("--models", "--vary", "--seeds")  # flags with all their values behind them


@dataclass(frozen=True)
class Asked(Running):
    """What both commands are asked beside the recipe's keywords, which hold for all runs."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds; each trains every model once. Intervals and tests are over them, so that one alone says little."""
    vary: tuple[str, ...] = ()
    """Keywords with several values, `paired_fraction=1,.5 always=split,mnist`: every combination is a setting."""
    split: str = "test"
    """Whose rows measure the runs: test, or validation where rows were held out for it (--validation .1), to choose settings on."""
    judge: JudgeAsked = "auto"
    """Whose rows train the classifiers that judge a run: its own, or the first run's for all; auto is first where something varies
    or a model has other rows."""


@dataclass(frozen=True)
class Comparison(Asked):
    """What `compare` is asked."""

    models: tuple[str, ...] = ()
    """Models, `meme mmvae "mmvae:posterior=laplace,scales=softmax" "NAME=meme:samples=5" "mmvae:pool=product"` (the runs of mmvae, asked
    for the product of what modalities say); by default the recipe's own."""
    reference: str = ""
    """The model that the others are tested against, by its name; by default the first."""


@dataclass(frozen=True)
class Ablation(Asked):
    """What `ablate` is asked; the recipe's keywords are the base that parts are changed from, one at a time."""

    part: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A keyword and its values, `samples=1,5,11`, or several together, `NAME:stop_gradient=false,estimator=released`; may be repeated."""
    gradient_draws: int = 50
    """Draws for the signal-to-noise ratio of the base's gradient, after all runs; 0 leaves it out."""


USAGE = f"""usage: {PROGRAM} compare RECIPE --out FOLDER --models meme mmvae ... [settings]    models x settings x seeds, to one report
       {PROGRAM} compare PLAN --out FOLDER                                   the same from a file, TOML or JSON
       {PROGRAM} compare --report-only FOLDER                                write the report of either again
       {PROGRAM} ablate RECIPE --out FOLDER [--part ...] [settings]           a base, and one part of it changed at a time

`{PROGRAM} compare RECIPE --help` lists every setting. What is done stays done: the same command goes on where it was stopped."""


def main(command: Literal["compare", "ablate"], words: Sequence[str]) -> int:
    """Either command from its words; the exit status. Raises ValueError for words that cannot be meant."""
    console = Console(highlight=False)
    _check_words(words)
    if (folder := value_of("--report-only", words)) is not None:
        return report_only(Path(folder), console=console)
    if not words or words[0].startswith("-"):
        print(USAGE)
        return 0 if words and words[0] in ("-h", "--help") else 2
    if command == "compare" and words[0].endswith((".toml", ".json")):
        running = tyro.cli(Running, args=list(words[1:]), prog=f"{PROGRAM} {command} {words[0]}", config=STYLE)
        return run_plan(cells.load(Path(words[0])), running, console=console)
    recipe, program = recipe_named(words[0]), f"{PROGRAM} {command} {words[0]}"
    if command == "compare":
        asked, arguments = recipe_flags(recipe, {}, words[1:], Comparison, program)
        return compare(recipe, arguments, asked, console=console)
    base, arguments = recipe_flags(recipe, {}, words[1:], Ablation, program)
    return ablate(recipe, arguments, base, console=console)


def compare(recipe: str, arguments: Mapping[str, Any], asked: Comparison, *, console: Console) -> int:
    """Run and report models x settings x seeds; 0, 1 where runs failed, 75 where it was told to stop.

    Raises ValueError, and starts nothing, for what the recipe refuses and for a run of other keywords in the folder.
    """
    common = _common(arguments)
    named = "objective" in common and not is_own(recipe)  # one of one's own may have an objective of its own
    texts = asked.models or ([common["objective"]] if named else [])
    models = _distinct("models", (cells.model_of(recipe, text) for text in texts), "NAME=MODEL gives one") or {short(recipe): {}}
    plan = _plan(recipe, common, asked, models=models, reference=asked.reference)
    return run_plan(plan, asked, console=console)


def ablate(recipe: str, arguments: Mapping[str, Any], asked: Ablation, *, console: Console) -> int:
    """Run and report the base and every part changed alone; statuses and errors as for `compare`."""
    common = _common(arguments)
    if not asked.part and (base := common.get("objective", short(recipe))) != "meme":
        raise ValueError(f"ablate: these parts are MEME's, and the base is {base!r}; name parts of it with --part")
    parts = [pair for text in asked.part or parts_of_meme(common) for pair in cells.part_of(recipe, text, common).items()]
    parts = parts if asked.part else _changing(parts, common)
    models = _distinct("parts", [(BASE, {}), *parts], "NAME:KEYWORD=VALUE gives one")
    plan = _plan(recipe, common, asked, models=models, reference=BASE, kind="ablation")
    return run_plan(plan, asked, console=console, gradient_draws=asked.gradient_draws)


def parts_of_meme(base: Mapping[str, Any]) -> list[str]:
    """The parts of MEME that its paper, or its code, could do without, one after the other; weights of one sample are none."""
    weights = ["weights' gradient kept:stop_gradient=false,estimator=rao_blackwell", "estimator=released,rao_blackwell,resampled"]
    return [
        "pseudo_inputs=1,10,100",
        "samples=1,5,11,30",
        "cross_weight=1,10",
        *(weights if base["samples"] > 1 else []),
        "combination=mixture,product,product_with_standard",
        "log_ratio=closed_form,sampled",
        f"private_dim=0,{max(1, base['latent_dim'] // 4)}",
        "second encoders:shared=false",
        "Laplace posteriors:posterior=laplace,combination=mixture,inference=mixture",
    ]


def run_plan(plan: Plan, running: Running, *, console: Console, gradient_draws: int = 0) -> int:
    """Keep the plan in the folder, run what is not there yet, and report; returns the exit status."""
    folder = running.out
    if running.dry_run:
        return _tell(Runner(plan, running, console=console), console=console)
    with Runner(plan, running, console=console) as runner:
        write_json(folder / cells.FILE, dataclasses.asdict(plan))
        status = runner.run()
    if gradient_draws and status != SAVED:
        _measure_gradient(plan, folder, gradient_draws, console=console)
    console.print(f"\nreport  {write_report(folder)}", soft_wrap=True)
    return status


def report_only(folder: Path, *, console: Console) -> int:
    """Write everything again from the run folders; 1 where runs have no results, or such as were measured otherwise."""
    if not (folder / cells.FILE).is_file():
        begun = f"{PROGRAM} compare RECIPE --out FOLDER --models A B begins one"
        raise ValueError(f"{folder}: expected the folder of a comparison, with its {cells.FILE}, found none; {begun}")
    path = write_report(folder)
    _, runs = read(folder)
    for run in (run for run in runs if run.otherwise):
        left = f"{run.cell.name}: left out, measured otherwise than the rest: {run.otherwise}; {AGAIN}"
        console.print(left, markup=False, soft_wrap=True)
    console.print(f"report  {path}", soft_wrap=True)
    return 0 if all(run.values is not None for run in runs) else 1


def _tell(runner: Runner, *, console: Console) -> int:
    """What `--dry-run` prints: how far every run is."""
    runner.check()
    told = [(runner.how_far(cell), cell.folder) for cell in runner.cells]
    for how_far, name in told:
        console.print(f"{how_far:>24}  {name}", markup=False, soft_wrap=True)
    console.print(f"\n{sum(how_far == 'measured' for how_far, _ in told)} of {len(told)} are measured; nothing was started")
    return 0


def _check_words(words: Sequence[str]) -> None:
    """Refuse what the parser would take, and then nobody would read."""
    if value_of("--seed", words) is not None:
        raise ValueError("--seed: no run would have it, since every model is trained with several seeds; name them: --seeds 0 1 2")
    for flag in LISTS:
        places = [place for place, word in enumerate(words) if word.partition("=")[0] == flag]
        if len(places) > 1:
            raise ValueError(f"{flag}: expected once, with all its values behind it ({flag} A B), got several; only the last would count")
        first = [words[place].partition("=")[2] or "".join(words[place + 1 : place + 2]) for place in places]
        if any(not word or word.startswith("--") for word in first):
            raise ValueError(f"{flag}: expected values behind it ({flag} A B), got none; leave it out for what is done by default")


def _distinct(what: str, pairs: Iterable[tuple[str, T]], advice: str) -> dict[str, T]:
    """A dictionary; raises ValueError where a name would stand for two things."""
    found: dict[str, T] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{what}: expected different names, got {name!r} twice; {advice}")
        found[name] = value
    return found


def _changing(parts: Iterable[tuple[str, dict[str, Any]]], base: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Without the parts that the base has already, and those that are an earlier part on this base."""
    found: list[tuple[str, dict[str, Any]]] = []
    for label, keywords in parts:
        if {**base, **keywords} not in [base, *({**base, **other} for _, other in found)]:
            found.append((label, keywords))
    return found


def _common(arguments: Mapping[str, Any]) -> dict[str, Any]:
    common = flatten(arguments)
    return common | ({"shards": absolute(common["shards"])} if "shards" in common else {})


def _plan(recipe: str, common: Mapping[str, Any], asked: Asked, *, models: Mapping[str, Mapping[str, Any]], **rest: Any) -> Plan:
    vary = _distinct("vary", (cells.varied_of(recipe, text) for text in asked.vary), "give all its values at once, KEYWORD=A,B")
    judge = cells.resolved(recipe, asked.judge, models, vary)
    return Plan(recipe=recipe, common=common, models=models, seeds=asked.seeds, vary=vary, judge=judge, split=asked.split, **rest)


def _measure_gradient(plan: Plan, folder: Path, draws: int, *, console: Console) -> None:
    """Of the first run of the base that is trained, once."""
    for cell in plan.cells():
        run, steps = folder / RUNS / cell.name, cell.keywords["steps"]
        meme = cell.keywords.get("objective") == "meme" and not is_own(plan.recipe)  # one of one's own may train anything
        if cell.model == plan.against and meme and progress(run) >= steps:
            if signal_to_noise.held(folder) != (cell.name, steps, draws):
                console.print(f"{run}: signal-to-noise ratio of its gradient, {draws} draws", soft_wrap=True)
                signal_to_noise.write(folder, run, draws=draws)
            return
