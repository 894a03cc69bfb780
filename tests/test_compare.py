"""Laws of comparisons: what is planned is what is run, once; what is reported is what the runs hold; what fails takes nothing with it."""

import csv
import fcntl
import inspect
import io
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from meme_dist import cli, record
from meme_dist.compare import cells, command, measurements, planned, rivals, tabulation
from meme_dist.compare.cells import Plan, flags, model_of, part_of, slug, typed, varied_of
from meme_dist.compare.report import write_report
from meme_dist.compare.running import Runner, Running, Task, orphans_of, surroundings
from meme_dist.compare.tabulation import Run, best, direction, main_measurements, tabulated
from meme_dist.data.sets.linear_gaussian import linear_gaussian
from meme_dist.data.shards import write_shards
from meme_dist.flags import recipe_flags
from meme_dist.recipes import RECIPES
from meme_dist.recipes.keywords import flatten
from meme_dist.run import WriteTo
from tests.ranks import forkserver

pytestmark = pytest.mark.repeats

QUIET = Console(quiet=True)
SMALL = ["--steps", "6", "--samples", "2", "--latent-dim", "2", "--batch-size", "8", "--pseudo-inputs", "4"]
TINY = [*SMALL, "--rows-in-all", "40"]
WRITTEN = ("table.json", "costs.json", "report.md", *(f"measurements.{ending}" for ending in ("md", "csv", "tex")))
PRETENDED = Path(__file__).with_name("pretended.py")


def asked(words: list[str], options: type = command.Comparison, recipe: str = "linear_gaussian") -> tuple[Any, dict[str, Any]]:
    """As the command line parses it."""
    return recipe_flags(recipe, {}, words, options, f"meme-dist compare {recipe}")


def plan_of(*words: str, recipe: str = "linear_gaussian") -> Plan:
    size = TINY if recipe == "linear_gaussian" else SMALL
    given, arguments = asked([*size, "--schedule", "constant", "--out", "unused", *words], recipe=recipe)
    models = dict(model_of(recipe, text) for text in given.models or ("meme",))
    return command._plan(recipe, command._common(arguments), given, models=models, reference=given.reference)


# ---- plans ------------------------------------------------------------------------------------------------------------------------


def another(value: Any, hint: Any) -> Any:
    """A value that the keyword does not have by default."""
    parts = getattr(hint, "__args__", ())
    choices = [choice for part in (hint, *parts) for choice in getattr(part, "__args__", ()) if isinstance(choice, str)]
    if choices:  # of a Literal, or of one that may be None
        return next(choice for choice in choices if choice != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, list):
        return [0.5, 0.75] if float in hint.__args__ else [4, 5]
    if value is None:
        return 0.25 if float in hint.__args__ else str(Path("elsewhere").resolve()) if Path in hint.__args__ else 3
    return value + 1 if isinstance(value, int) else value / 2 if isinstance(value, float) else str(Path("elsewhere").resolve())


@pytest.mark.parametrize("recipe", [name for name in RECIPES if ":" not in name])
def test_flags_say_every_keyword_of_every_recipe_so_that_training_understands_them(recipe: str) -> None:
    """Defaults and the opposite of all defaults, through the parser of `meme-dist train`."""
    hints, known = cells._hints(RECIPES[recipe]), cells.defaults(recipe)
    needed = {
        name: str(Path("there").resolve()) for name, p in inspect.signature(RECIPES[recipe]).parameters.items() if p.default is p.empty
    }
    changed = needed | {name: another(value, hints[name]) for name, value in known.items()}
    if changed.get("objective") == "meme":
        changed["samples"] = 1  # more are refused beside targets
    for keywords in ({**needed, **known}, changed):
        _, arguments = recipe_flags(recipe, {}, [*flags(keywords, known), "--out", "x"], WriteTo, "test")
        assert flatten(arguments) == keywords
        assert {name: typed(recipe, name, cells.shown(value)) for name, value in keywords.items()} == keywords


def test_a_switch_is_said_both_ways_and_its_help_shows_both(capsys: pytest.CaptureFixture[str]) -> None:
    _, arguments = asked(["--shared", "--no-tight", "--out", "x"])
    assert arguments["model"].shared and not arguments["model"].tight
    with pytest.raises(SystemExit):
        asked(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--shared, --no-shared" in shown and "--tight, --no-tight" in shown


def test_flags_of_a_resumed_run_are_what_differs_from_it() -> None:
    assert flags({"a": 1, "b": True, "c": False, "d": -2.0}, {"a": 1, "b": True, "c": False, "d": -2.0}) == []
    assert flags({"b": False, "c": True, "d": -2.0, "e_f": [1, 2]}, {"b": True, "c": False, "d": 0.0}) == [
        *["--no-b", "--c", "--d=-2.0", "--e-f", "1", "2"]
    ]


def test_words_name_models_parts_and_varied_keywords() -> None:
    laplace = {"objective": "mmvae", "posterior": "laplace", "samples": 5}
    assert model_of("linear_gaussian", "mmvae:posterior=laplace,samples=5") == ("mmvae:posterior=laplace,samples=5", laplace)
    assert model_of("linear_gaussian", "L 5=mmvae:posterior=laplace,samples=5") == ("L 5", laplace)
    assert model_of("linear_gaussian", "meme") == ("meme", {"objective": "meme"})
    assert model_of("linear_gaussian", "wide=:latent_dim=9") == ("wide", {"latent_dim": 9})
    assert varied_of("linear_gaussian", "missing=0,.5") == ("missing", [0.0, 0.5])
    assert varied_of("linear_gaussian", "batch-size=8,16") == varied_of("linear_gaussian", "batch_size=8,16") == ("batch_size", [8, 16])
    assert model_of("linear_gaussian", "wide=:latent-dim=9") == ("wide", {"latent_dim": 9})
    base = {"samples": 5}
    assert part_of("linear_gaussian", "samples=1,5,30", base) == {"samples=1": {"samples": 1}, "samples=30": {"samples": 30}}
    assert part_of("linear_gaussian", "batch-size=8", {}) == {"batch_size=8": {"batch_size": 8}}
    assert part_of("linear_gaussian", "kept:stop_gradient=false,samples=3", base) == {"kept": {"stop_gradient": False, "samples": 3}}


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--models", "mmvae", "mem"], "objective: expected meme, .*, got 'mem'"),
        (["--models", "meme:sample=3"], "has no keyword 'sample'"),
        (["--vary", "missing=x"], "missing: expected a number, got 'x'"),
        (["--vary", "private_dim=0,2"], "meme-private_dim=2-seed0: private_dim: expected 0 to 1"),
        (["--models", "meme:samples=3", "--vary", "samples=1,2"], "samples is set by the model and varied too"),
        (["--vary", "seed=1,2"], "seed is set by the model and varied too"),
        (["--models", "a b=meme", "a-b=mmvae"], "two cells would share a folder: a-b-seed"),
        (["--reference", "mvae", "--models", "meme"], "reference: expected one of the models ['meme'], got 'mvae'"),
        (["--vary", "missing=0,.1", "missing=.2"], "vary: expected different names, got 'missing' twice; give all its values at once"),
        (["--seeds", "0", "1", "0"], "seeds: expected different ones, got 0 1 0; a run twice tells nothing new"),
        (["--seed", "5"], "seed 5: no run would have it, they have the seeds 0 1 2; name all of them"),
    ],
)
def test_a_wrong_word_is_refused_before_anything_runs(words: list[str], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint.replace("[", r"\[").replace("]", r"\]")):
        plan_of(*words)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["compare", "--vary", "missing=0,.1", "--vary", "event=3,4"], "--vary: expected once, with all its values behind it"),
        (["compare", "--models", "meme", "--models=mmvae"], "--models: expected once"),
        (["ablate", "--seeds", "0", "--seeds", "1"], "--seeds: expected once"),
        (["compare", "--models"], "--models: expected values behind it .--models A B., got none"),
        (["compare", "--models", "--seeds", "0"], "--models: expected values behind it"),
        (["compare", "--models="], "--models: expected values behind it"),
        (["compare", "--models", ""], "--models: expected values behind it"),
        (["compare", "--models", "meme", "meme"], "models: expected different names, got 'meme' twice; NAME=MODEL gives one"),
        (["compare", "--seed", "0"], "--seed: .* name them: --seeds 0 1 2"),
        (["ablate", "--seed=3"], "--seed: .* name them: --seeds 0 1 2"),
        (["ablate", "--part", "base:samples=3"], "parts: expected different names, got 'base' twice; NAME:KEYWORD=VALUE gives one"),
        (["ablate", "--part", "k:samples=3", "--part", "k:event=3"], "parts: expected different names, got 'k' twice"),
    ],
)
def test_nothing_that_was_asked_is_dropped_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], complaint: str
) -> None:
    monkeypatch.setattr(command, "run_plan", lambda *_, **__: 0)
    kind, *rest = words
    with pytest.raises(ValueError, match=complaint):
        command.main("ablate" if kind == "ablate" else "compare", ["linear_gaussian", *TINY, "--out", str(tmp_path / "out"), *rest])
    assert not (tmp_path / "out").exists()


def test_one_run_judges_all_wherever_their_rows_differ() -> None:
    assert plan_of("--models", "meme", "mmvae:samples=3,learning_rate=.01", "pooled=meme:pool=product").judge == "own"
    assert plan_of("--vary", "samples=1,2").judge == plan_of("--models", "meme", "half=meme:missing=.5").judge == "first"
    assert plan_of("--models", "meme", "half=meme:missing=.5", "--judge", "own").judge == "own"


def test_a_split_that_the_rows_do_not_have_is_refused_before_anything_is_trained(tmp_path: Path, shards: Path) -> None:
    cells.check_split(plan_of("--split", "validation", "--validation", ".1", recipe="digits"))
    given = ["--shards", str(shards), "--split"]
    cells.check_split(plan_of(*given, "train", recipe="auto"))
    for words, recipe, complaint in (
        (["--split", "holdout"], "digits", "expected test, got 'holdout'; hold rows out with --validation .1"),
        (["--split", "train", "--validation", ".1"], "digits", "expected test or validation, got 'train'"),
        (["--split", "validation"], "linear_gaussian", "expected test, got 'validation'; recipe 'linear_gaussian' holds no rows out"),
        (["--split", "validation", "--vary", "validation=.1,0"], "digits", "meme-validation=0.0-seed0: split: expected test, got"),
        ([*given, "validation"], "auto", "expected train or test, got 'validation'"),
    ):
        with (
            pytest.raises(ValueError, match=re.escape(complaint)),
            Runner(plan_of(*words, recipe=recipe), Running(tmp_path), console=QUIET),
        ):
            pass
    assert not list(tmp_path.iterdir())


PLANS = sorted((Path(__file__).parents[1] / "benchmarks" / "plans").glob("*.toml"))


@pytest.mark.parametrize("file", PLANS, ids=lambda file: file.stem)
def test_the_published_comparisons_can_be_run_and_name_every_run_apart(file: Path) -> None:
    found = cells.load(file).cells()
    assert len(found) > 1 and len({cell.name for cell in found}) == len(found)


def test_cells_are_every_combination_once_and_the_plan_in_a_file_is_the_plan(tmp_path: Path) -> None:
    plan = plan_of("--models", "meme", "few=meme:samples=1", "--vary", "missing=0,.5", "event=3,4,5", "--seeds", "4", "7")
    found = plan.cells()
    assert len(found) == len({cell.name for cell in found}) == 2 * 2 * 3 * 2
    assert [cell.name for cell in found[:3]] == [
        f"{name}-missing=0.0-event=3-seed{s}" for name, s in (("meme", 4), ("few", 4), ("meme", 7))
    ]
    last = found[-1].keywords
    assert (last["samples"], last["missing"], last["event"], last["seed"], last["steps"]) == (1, 0.5, 5, 7, 6)
    (tmp_path / "plan.json").write_text(json.dumps(plan.__dict__))
    toml = (
        'recipe = "linear_gaussian"\nseeds = [4, 7]\njudge = "first"\n[models.meme]\nobjective = "meme"\n[models.few]\nobjective = "meme"\n'
    )
    toml += (
        "samples = 1\n[vary]\nmissing = [0, 0.5]\nevent = [3, 4, 5]\n[common]\nsteps = 6\nsamples = 2\nrows_in_all = 40\nbatch_size = 8\n"
    )
    (tmp_path / "plan.toml").write_text(toml + 'schedule = "constant"\npseudo_inputs = 4\n')
    for file in ("plan.json", "plan.toml"):
        assert cells.load(tmp_path / file).cells() == found
    (tmp_path / "plan.toml").write_text(toml + "speed = 3\n")
    with pytest.raises(ValueError, match="no keyword 'speed'"):
        cells.load(tmp_path / "plan.toml")
    (tmp_path / "plan.toml").write_text(toml + "seed = 3\n")
    with pytest.raises(ValueError, match=r"seed 3: no run would have it.* seeds = \[\.\.\.\]"):
        cells.load(tmp_path / "plan.toml")
    (tmp_path / "plan.toml").write_text(f"sedes = [1]\n{toml}")
    with pytest.raises(ValueError, match=r"plan.toml: expected a recipe .* got sedes, recipe"):
        cells.load(tmp_path / "plan.toml")


def test_an_ablation_changes_one_part_of_the_base_at_a_time_and_by_default_each_part_of_meme(monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[Plan] = []
    monkeypatch.setattr(command, "run_plan", lambda plan, *_, **__: plans.append(plan) or 0)
    given, arguments = asked([*TINY, "--samples", "11", "--latent-dim", "8", "--out", "x"], command.Ablation)
    assert command.ablate("linear_gaussian", arguments, given, console=QUIET) == 0
    base, plan = flatten(arguments), plans[0]
    assert plan.against == "base" and plan.models["base"] == {}
    assert all(any(base[key] != value for key, value in changed.items()) for label, changed in plan.models.items() if label != "base")
    parts = {key for changed in plan.models.values() for key in changed}
    assert parts >= {
        "pseudo_inputs",
        "stop_gradient",
        "samples",
        "cross_weight",
        "estimator",
        "combination",
        "log_ratio",
        "private_dim",
        "posterior",
    }
    assert {"samples=1", "samples=5", "samples=30"} <= set(plan.models) and "samples=11" not in plan.models
    given, arguments = asked([*TINY, "--out", "x", "--part", "samples=1,2,9", "--part", "k:event=2"], command.Ablation)
    command.ablate("linear_gaussian", arguments, given, console=QUIET)
    assert list(plans[1].models) == ["base", "samples=1", "samples=9", "k"]
    given, arguments = asked([*TINY, "--out", "x", "--no-shared", "--no-stop-gradient", "--estimator", "released"], command.Ablation)
    command.ablate("linear_gaussian", arguments, given, console=QUIET)
    assert not {"second encoders", "estimator=rao_blackwell"} & set(plans[2].models) and "weights' gradient kept" in plans[2].models


def test_the_default_parts_of_meme_are_rivals_of_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[Plan] = []
    monkeypatch.setattr(command, "run_plan", lambda plan, *_, **__: plans.append(plan) or 0)
    for words in ([], ["--no-shared"], ["--no-stop-gradient", "--estimator", "rao_blackwell"]):
        given, arguments = asked([*TINY, "--out", "x", "--seeds", "0", *words], command.Ablation)
        command.ablate("linear_gaussian", arguments, given, console=QUIET)
        rivals.check(plans[-1])


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (
            ["a=mmvae:cross_weight=1", "b=mmvae:cross_weight=5"],
            "models 'a' and 'b' would be the same model twice: they differ in cross_weight",
        ),
        (["meme", "m=meme:samples=2"], "models 'meme' and 'm' would be the same model twice: they have the same settings"),
        (["a=mvae:alpha=.1", "b=mvae", "mmvae"], "they differ in alpha, which neither reads; leave one of them out"),
        (["meme", "p=meme:pool=product", "q=meme:pool=product"], "models 'p' and 'q' would be the same model twice"),
    ],
)
def test_a_model_twice_is_no_comparison(tmp_path: Path, words: list[str], complaint: str) -> None:
    runner = Runner(plan_of("--models", *words), Running(tmp_path / "out"), console=QUIET)
    with pytest.raises(ValueError, match=complaint):
        runner.check()


def test_models_that_are_the_same_in_some_settings_only_are_rivals_and_so_are_pools() -> None:
    rivals.check(plan_of("--models", "a=:cross_weight=1", "b=:cross_weight=5", "--vary", "objective=mmvae,meme"))
    rivals.check(plan_of("--models", "meme", "p=meme:pool=product", "m=meme:pool=mixture"))


def test_a_model_that_cannot_be_built_is_left_to_its_own_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("nothing there")

    monkeypatch.setattr(rivals, "_manifest", broken)
    rivals.check(plan_of("--models", "a=mmvae:cross_weight=1", "b=mmvae:cross_weight=5"))


LACKING = """
from meme_dist.recipes.linear_gaussian import linear_gaussian
from meme_dist.recipes.base import Model, Recipe
from meme_dist.train.training import Training


def counting(*, model: Model = Model(latent_dim=2), training: Training = Training()) -> Recipe:
    made = linear_gaussian(model=model, training=training)
    return Recipe(lambda manifest: made.build(manifest) if manifest.num_rows("train") else None, training, made.dataset)
"""


def test_a_recipe_that_builds_from_rows_which_are_not_written_yet_is_refused_nothing(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(LACKING)
    models = {objective: {"objective": objective} for objective in ("meme", "mmvae")}
    rivals.check(Plan(f"{tmp_path}/own.py:counting", {"steps": 2}, models, (0,)))


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["meme", "p=mopoe:private_dim=1"], "p-seed0: MoPoE has no private latents"),
        (["meme", "mmvae", "--vary", "missing=0,2"], "meme-missing=2.0-seed0: missing: expected a share from 0 to "),
        (["meme", "few=meme:missing=.3", "many=meme:missing=2"], "many-seed0: missing: expected a share from 0 to "),
        (
            ["l=mmvae:posterior=laplace", "lp=mmvae:posterior=laplace,pool=product"],
            "lp-seed0: pool 'product' needs Normal posteriors, this",
        ),
        (["meme", "mvae", "p=mvae:pool=mixture", "--vary", "event=3,4"], "p-event=3-seed0: mvae multiplies N(0, I) and its encoders"),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_a_cell_that_is_certain_to_be_refused_is_before_anything_runs(
    tmp_path: Path, words: list[str], complaint: str, dry_run: bool
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(complaint)}"):
        command.run_plan(plan_of("--models", *words), Running(tmp_path / "out", dry_run=dry_run), console=QUIET)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_named_as_a_place_where_nothing_can_be_written() -> None:
    with pytest.raises(OSError, match="cannot write /proc/nope; choose another place"):
        command.run_plan(plan_of("--models", "meme"), Running(Path("/proc/nope")), console=QUIET)


# ---- statistics -------------------------------------------------------------------------------------------------------------------


def runs_of(plan: Plan, value: Callable[[cells.Cell], float | None], name: str = "cross_coherence/a>b") -> list[Run]:
    found = [(cell, value(cell)) for cell in plan.cells()]
    return [Run(cell, None if measured is None else {name: measured}, {}, Path(cell.name)) for cell, measured in found]


def test_a_table_holds_scipys_intervals_of_pairs_averaged_over_the_settings_of_a_seed() -> None:
    plan = plan_of("--models", "meme", "mmvae", "m5=meme:samples=5", "--vary", "missing=0,.5", "--seeds", "0", "1", "2")
    generator = np.random.default_rng(0)
    values = {cell.name: float(generator.normal()) for cell in plan.cells()}
    lost = "mmvae-missing=0.5-seed1"
    table = tabulated(plan, runs_of(plan, lambda cell: None if cell.name == lost else values[cell.name]))
    means = table["settings"][0]["measurements"]["cross_coherence/a>b"]["models"]["m5"]
    own = [values[f"m5-missing=0.0-seed{seed}"] for seed in range(3)]
    low, high = stats.t.interval(0.95, 2, np.mean(own), stats.sem(own))
    assert (means["value"], means["low"], means["high"], means["count"]) == pytest.approx((np.mean(own), low, high, 3))
    tests = {test["model"]: test for test in table["tests"]}
    assert set(tests) == {"mmvae", "m5"} and tests["m5"]["count"] == tests["mmvae"]["count"] == 3  # seeds: settings are no further pairs
    keys = [[f"-missing={m}-seed{s}" for m in ("0.0", "0.5") if f"mmvae-missing={m}-seed{s}" != lost] for s in range(3)]
    differences = [np.mean([values[f"mmvae{key}"] - values[f"meme{key}"] for key in of_seed]) for of_seed in keys]
    interval = stats.ttest_1samp(differences, 0.0).confidence_interval(0.95)
    assert (tests["mmvae"]["low"], tests["mmvae"]["high"]) == pytest.approx((interval.low, interval.high))
    p = sorted(test["p"] for test in tests.values())
    assert sorted(test["holm"] for test in tests.values()) == pytest.approx([min(1, 2 * p[0]), max(min(1, 2 * p[0]), p[1])])
    assert {run["run"]: run["values"] for run in table["runs"]}[lost] is None


def test_the_best_is_named_only_where_it_is_surely_better_than_every_other() -> None:
    def by_seed(*found: float, first: int = 0) -> dict[tuple[str, int], float]:
        return {("{}", first + number): value for number, value in enumerate(found)}

    close = {"a": by_seed(0.90, 0.70, 0.80), "b": by_seed(0.88, 0.685, 0.778), "c": by_seed(0.1, 0.2, 0.0)}
    assert best(close, 1) == "a"  # apart in every pair, although their own intervals overlap
    assert best(close, -1) == "c"
    assert best({**close, "b": by_seed(0.8, 0.75, 0.70)}, 1) is None
    assert best({**close, "b": by_seed(0.1, 0.1, first=7)}, 1) is None  # no pair, no claim
    assert best(close, 0) is None and best({"a": by_seed(1.0, 2.0)}, 1) is None


def test_what_is_better_and_what_is_shown() -> None:
    better = {
        "cross_coherence/a+b>c": 1,
        "log_likelihood/a|b@100": 1,
        "frechet/a>b": -1,
        "imputation/a>b/rmse": -1,
        "imputation/a>b/crps": -1,
    }
    neither = ["classifier/a", "imputation/a>b/coverage@95%", "frechet/real>b", "information/real>b", "correlation/plain/a-b/real"]
    better |= {"imputation/a>b/log_likelihood": 1, "information/a>b": -1, "frechet/mean": -1, **dict.fromkeys(neither, 0)}
    assert {name: direction(name) for name in better} == better
    many = [f"cross_coherence/{k}>{j}" for k in range(4) for j in range(4)]
    assert main_measurements(["cross_coherence/mean", *many, "ari/a"]) == ["cross_coherence/mean"]
    assert main_measurements(["cross_coherence/a>b", "latent_accuracy/a"]) == ["cross_coherence/a>b", "latent_accuracy/a"]
    filled = [f"imputation/{s}>c/{q}" for s in ("a", "b", "a+b", "1 observed") for q in ("rmse", "mae", "crps")]
    assert main_measurements(filled) == ["imputation/a+b>c/rmse"] and main_measurements(["ari/a"]) == ["ari/a"]


def test_derived_values_are_means_of_single_sources_and_the_widest_likelihood() -> None:
    coherence = [(["a"], "b", 0.2), (["b"], "a", 0.4), (["a", "b"], "c", 0.9), (["c"], "c", 1.0)]
    likelihood = [(["a"], [], 9, 0.0), (["a", "b"], [], 1, -2.0), (["a", "b"], [], 9, -1.0), (["a", "b"], ["c"], 9, 3.0)]
    likelihood += [(["a"], ["b"], 9, -4.0), (["b"], ["a", "c"], 9, -2.0), (["b"], ["a"], 1, -90.0)]
    results = {
        "cross_coherence": [{"sources": s, "target": t, "value": v} for s, t, v in coherence],
        "log_likelihood": [{"targets": t, "given": g, "samples": k, "value": v} for t, g, k, v in likelihood],
    }
    expected = {"cross_coherence/mean": pytest.approx(0.3), "log_likelihood/joint": -1.0, "log_likelihood/conditional": -3.0}
    assert tabulation.derived(results) == expected


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ('"models": ["meme"]', "models: expected a table of keywords for each name"),
        ('"models": {"m": "mmvae"}', "models: expected a table"),
        ('"models": {"m": {}}, "vary": {"missing": 0.5}', "vary: expected a list of values for each keyword"),
        ('"models": {"m": {}}, "vary": {"missing": []}', "vary: expected a list"),
        ('"models": {"m": {}}, "seeds": 3', "seeds: expected a list of whole numbers, got 3"),
        ('"models": {"m": {}}, "seeds": [0.5]', "seeds: expected"),
        ('"models": {"m": {}}, "reference": ["m"]', "reference: expected the name of a model"),
        ('"models": {"m": {}}, "judge": "frist"', "judge: expected auto or own or first, got 'frist'"),
        ('"models": {"m": {}}, "kind": "x"', "kind: expected comparison or ablation"),
        ('"models": {"m": {}}, "recipe": ["digits"]', "expected a recipe"),
        ('"models": {"m": {}}, "recipe": "enas"', "recipe 'enas' needs source"),
    ],
)
def test_a_plan_that_cannot_be_meant_is_refused_in_words(tmp_path: Path, entry: str, message: str) -> None:
    recipe = "" if '"recipe"' in entry else '"recipe": "digits", '
    (tmp_path / "plan.json").write_text(f"{{{recipe}{entry}}}")
    with pytest.raises(ValueError, match=re.escape(message)):
        cells.load(tmp_path / "plan.json")


def test_the_parts_of_meme_are_no_parts_of_another_objective(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the base is 'csvae'"):
        command.main("ablate", ["swiss_roll", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "benchmarks" / "plans").glob("*.toml")), ids=lambda path: path.stem)
def test_published_plans_are_still_understood(path: Path) -> None:
    """What made the figures of docs/results.md can be asked for again."""
    plan = cells.load(path)
    assert len(plan.cells()) == len(plan.models) * len(plan.seeds) * len(plan.settings())


# ---- running, with processes that only pretend to train ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "rows"
    write_shards(linear_gaussian(rows=8), folder)
    return folder


@pytest.fixture
def home(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("meme_dist.compare.running.POLL", 0.02)
    for name in ("PRETEND_FAIL", "PRETEND_SLOW"):
        monkeypatch.delenv(name, raising=False)
    yield tmp_path / "out"


def pretend(home: Path, plan: Plan, shards: Path, **running: Any) -> int:
    """Run the plan to its report."""
    home.mkdir(exist_ok=True)
    told = {"recipe": plan.recipe, "keywords": {cell.name: dict(cell.keywords) for cell in plan.cells()}, "shards": str(shards)}
    (home / "keywords.json").write_text(json.dumps(told))
    launch = f"{sys.executable} -S -E {PRETENDED}"
    return command.run_plan(plan, Running(out=home, launch=launch, **running), console=QUIET)


def calls(home: Path) -> list[str]:
    return (home / "calls.txt").read_text().splitlines()


def digests(home: Path) -> dict[str, bytes]:
    return {name: (home / name).read_bytes() for name in (*WRITTEN, "plan.json")}


def test_every_cell_is_run_once_and_running_again_changes_no_byte(home: Path, shards: Path) -> None:
    plan = plan_of("--models", "meme", "few=meme:samples=1", "--seeds", "0", "1", "2")
    assert pretend(home, plan, shards, jobs=2) == 0
    assert sorted(calls(home)) == sorted(f"train {cell.name}" for cell in plan.cells())
    first = digests(home)
    assert pretend(home, plan, shards) == 0 and len(calls(home)) == 6
    assert digests(home) == first
    for name in WRITTEN:
        (home / name).unlink()
    assert command.report_only(home, console=QUIET) == 0 and digests(home) == first
    more = plan_of("--models", "meme", "few=meme:samples=1", "--seeds", "0", "1", "2", "3")
    assert pretend(home, more, shards) == 0 and calls(home)[6:] == ["train meme-seed3", "train few-seed3"]


def test_a_dry_run_tells_how_far_every_run_is_and_touches_nothing(
    home: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(out: Path) -> list[str]:
        assert command.run_plan(plan, Running(out=out, dry_run=True), console=Console(width=200)) == 0
        return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]

    plan = plan_of("--models", "meme", "few=meme:samples=1", "--seeds", "0", "1")
    assert told(home)[-1] == "0 of 4 are measured; nothing was started" and not home.exists()
    monkeypatch.setenv("PRETEND_FAIL", "few-seed1")
    assert pretend(home, plan, shards) == 1
    (home / "runs" / "meme-seed1" / "results.json").unlink()
    unfinished = home / "runs" / "few-seed1"
    unfinished.mkdir(exist_ok=True)
    before = {path: path.stat().st_mtime_ns for path in home.rglob("*")}
    expected = ["measured meme-seed0", "measured few-seed0", "trained, not measured meme-seed1", "not begun few-seed1"]
    assert told(home) == [*expected, "", "2 of 4 are measured; nothing was started"]
    assert {path: path.stat().st_mtime_ns for path in home.rglob("*")} == before
    with pytest.raises(ValueError, match="samples"):
        other = plan_of("--models", "meme", "few=meme:samples=2", "--seeds", "0", "1")
        command.run_plan(other, Running(out=home, dry_run=True), console=QUIET)


def test_a_failed_run_is_named_with_its_last_lines_and_nothing_else_is_lost(
    home: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of("--models", "meme", "few=meme:samples=1", "--seeds", "0", "1", "2")
    monkeypatch.setenv("PRETEND_FAIL", "few-seed1")
    assert pretend(home, plan, shards) == 1 and len(calls(home)) == 6
    text = (home / "report.md").read_text()
    assert "`few-seed1` ended with:" in text and "ValueError: out of luck" in text and "5 of 6 runs are measured" in text
    table = json.loads((home / "table.json").read_text())
    counts = {model: entry["count"] for model, entry in table["settings"][0]["measurements"]["cross_coherence/mean"]["models"].items()}
    assert counts == {"meme": 3, "few": 2} and {test["count"] for test in table["tests"]} == {2}
    assert command.report_only(home, console=QUIET) == 1
    monkeypatch.delenv("PRETEND_FAIL")
    assert pretend(home, plan, shards) == 0 and calls(home)[6:] == ["train few-seed1"]
    assert pretend(tmp_path / "whole", plan, shards) == 0
    assert (home / "table.json").read_bytes() == (tmp_path / "whole" / "table.json").read_bytes()


def test_a_comparison_that_was_told_to_stop_goes_on_to_the_same_table(
    home: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of("--models", "meme", "few=meme:samples=1", "--seeds", "0", "1", "--steps", "40")
    monkeypatch.setenv("PRETEND_SLOW", "0.02")
    monkeypatch.setattr("meme_dist.supervise.LAST_WORDS", 0.05)

    def stop() -> None:
        state = home / "runs" / "few-seed0" / "checkpoints" / "last" / "state.json"
        deadline = time.monotonic() + 30
        while not state.is_file() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    assert pretend(home, plan, shards) == 75
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert "stopped" not in (home / "report.md").read_text() and calls(home) == ["train meme-seed0", "train few-seed0"]
    step = json.loads((home / "runs" / "few-seed0" / "checkpoints" / "last" / "state.json").read_text())["step"]
    assert f"saved at step {step}" in (home / "logs" / "few-seed0.log").read_text()  # in its own time: nothing was killed
    assert 0 < step < 40 and not (home / "runs" / "few-seed0" / "report.md").exists() and orphans_of(home) == []
    monkeypatch.setenv("PRETEND_SLOW", "0")
    assert pretend(home, plan, shards) == 0
    assert "--resume" in (home / "logs" / "few-seed0.log").read_text()
    assert pretend(tmp_path / "whole", plan, shards) == 0
    assert (home / "table.json").read_bytes() == (tmp_path / "whole" / "table.json").read_bytes()


def die_comparing(home: Path, plan: Plan, shards: Path) -> None:
    os.environ["PRETEND_SLOW"] = "0.05"
    pretend(home, plan, shards)


def test_what_a_killed_comparison_left_running_is_stopped_before_anything_starts(home: Path, shards: Path) -> None:
    plan = plan_of("--models", "meme", "--seeds", "0", "1", "--steps", "600")
    process = forkserver().Process(target=die_comparing, args=(home, plan, shards))
    process.start()
    state = home / "runs" / "meme-seed0" / "checkpoints" / "last" / "state.json"
    deadline = time.monotonic() + 60
    while not state.is_file() and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(ValueError, match="another comparison is at work here"):
        pretend(home, plan, shards)
    process.kill()
    process.join()
    assert len(orphans_of(home.resolve())) == 1
    assert pretend(home, plan, shards) == 0  # a run of 600 slow steps would not have ended
    words, saved, again, *_ = (home / "logs" / "meme-seed0.log").read_text().splitlines()
    assert words.startswith("$") and saved.startswith("saved at step") and "--resume" in again
    assert orphans_of(home.resolve()) == [] and calls(home) == ["train meme-seed0"] * 2 + ["train meme-seed1"]


def half_made(run: Path) -> None:
    """A process that is killed before the record has its name."""
    with mock.patch("os.replace", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        record.write_json(run / record.FILE, {})


@pytest.mark.parametrize("begin", [lambda run: None, half_made], ids=["a folder", "half a record"])
def test_a_second_comparison_touches_nothing_that_the_first_is_just_making(home: Path, shards: Path, begin: Callable[[Path], None]) -> None:
    plan, run = plan_of("--models", "meme", "--seeds", "0"), home / "runs" / "meme-seed0"
    run.mkdir(parents=True)
    begin(run)
    making = [path.name for path in run.iterdir()]
    assert len(making) == (begin is half_made)
    with open(home / ".lock", "w") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another comparison is at work here"):
            pretend(home, plan, shards)
    assert [path.name for path in run.iterdir()] == making
    assert pretend(home, plan, shards) == 0  # what a killed process left so is cleared away


def test_one_runs_rows_judge_all_and_are_asked_first(home: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of("--models", "meme", "few=meme:samples=1", "--vary", "missing=0,.5", "--seeds", "0")
    assert plan.judge == "first"
    monkeypatch.setenv("PRETEND_FAIL", "train meme-missing=0.0")  # then the next one judges
    assert pretend(home, plan, shards, jobs=3) == 1
    judge = "few-missing=0.0-seed0"
    measured = [call for call in calls(home) if call.startswith("evaluate")]
    assert measured[0] == f"evaluate {judge}"
    assert sorted(measured[1:]) == [f"evaluate {name}-missing=0.5-seed0 judge {judge}" for name in ("few", "meme")]
    monkeypatch.delenv("PRETEND_FAIL")
    assert pretend(home, plan, shards) == 0  # once chosen it judges ever after
    assert calls(home)[-1] == f"evaluate meme-missing=0.0-seed0 judge {judge}"
    assert f"The classifiers of one run's rows judge all runs: of `{judge}`." in (home / "report.md").read_text()
    with pytest.raises(ValueError, match="add --judge first"):
        pretend(home, plan_of("--models", "meme", "--seeds", "0"), shards)


def test_a_run_of_other_modalities_is_judged_by_its_own_rows_and_the_report_says_whose_judge(
    home: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of("--models", "meme", "few=meme:samples=1", "two=meme:modalities=2", "--seeds", "0")
    monkeypatch.setattr("meme_dist.compare.running.alike", lambda *runs: "two" not in str(runs))
    assert plan.judge == "first" and pretend(home, plan, shards) == 0
    assert [call for call in calls(home) if "judge" in call] == ["evaluate few-seed0 judge meme-seed0"]
    assert "of the rows of `meme-seed0` (2 runs), `two-seed0` (1 run); what" in (home / "report.md").read_text()


def test_a_judge_that_left_the_plan_before_it_was_measured_still_judges_and_one_that_is_gone_is_replaced(
    home: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRETEND_FAIL", "evaluate")
    assert pretend(home, plan_of("--models", "meme", "--judge", "first", "--seeds", "0"), shards) == 1
    monkeypatch.delenv("PRETEND_FAIL")
    plan = plan_of("--models", "few=meme:samples=1", "mmvae", "--judge", "first", "--seeds", "0")
    assert pretend(home, plan, shards) == 0
    assert {call for call in calls(home) if "judge" in call} == {f"evaluate {m}-seed0 judge meme-seed0" for m in ("few", "mmvae")}
    shutil.rmtree(home / "runs" / "meme-seed0")
    more = plan_of("--models", "few=meme:samples=1", "mmvae", "--judge", "first", "--seeds", "0", "1")
    assert pretend(home, more, shards) == 0
    assert sorted(call for call in calls(home)[3:] if call.startswith("evaluate") and call.endswith(("few-seed0", "judge few-seed0"))) == [
        *["evaluate few-seed0", "evaluate few-seed1 judge few-seed0", "evaluate mmvae-seed0 judge few-seed0"],
        "evaluate mmvae-seed1 judge few-seed0",
    ]
    assert "The classifiers of one run's rows judge all runs: of `few-seed0`." in (home / "report.md").read_text()


def remeasured(home: Path, run: str, **by_hand: Any) -> None:
    """As somebody's `meme-dist evaluate` leaves a run's results in this version: it names a judge, RUNS/NAME, where that is another run."""
    file = home / "runs" / run / "results.json"
    by_hand = {name: value.replace("RUNS", str(home / "runs")) if isinstance(value, str) else value for name, value in by_hand.items()}
    entries = {name: value for name, value in json.loads(file.read_text()).items() if name != "judge"} | {"split": "test"} | by_hand
    file.write_text(json.dumps(entries | {"cross_coherence": [{"sources": ["a"], "target": "b", "value": 7.0}]}))


@pytest.mark.parametrize(
    ("judge", "by_hand", "said"),
    [
        ("own", {"judge": "/elsewhere/runs/other"}, "judge /elsewhere/runs/other in place of RUNS/few-seed0;"),
        ("own", {"judge": "RUNS/meme-seed0", "seed": 5}, "judge RUNS/meme-seed0 in place of RUNS/few-seed0, seed 5 in place of 0;"),
        ("own", {"seed": 5}, "the rest: seed 5 in place of 0;"),
        ("first", {"judge": "RUNS/meme-seed0", "seed": 5}, "the rest: seed 5 in place of 0;"),
        ("first", {"judge": "RUNS/meme-seed0", "checkpoint": "best"}, "the rest: checkpoint best in place of last;"),
        ("first", {"judge": "RUNS/few-seed1"}, "judge RUNS/few-seed1 in place of RUNS/meme-seed0;"),
        ("first", {}, "judge RUNS/few-seed0 in place of RUNS/meme-seed0;"),
    ],
)
def test_what_was_measured_otherwise_than_planned_is_in_no_table_and_is_measured_again(
    home: Path, shards: Path, judge: str, by_hand: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, runs = plan_of("--models", "meme", "few=meme:samples=1", "--seeds", "0", "1", "--judge", judge), str(home / "runs")
    assert pretend(home, plan, shards) == 0
    before, first = calls(home), digests(home)
    remeasured(home, "few-seed0", **by_hand)
    assert command.report_only(home, console=Console(width=400)) == 1
    assert "few-seed0: left out, measured otherwise than the rest" in capsys.readouterr().out
    table, text = json.loads((home / "table.json").read_text()), (home / "report.md").read_text()
    assert [run["run"] for run in table["runs"] if run["values"] is None] == ["few-seed0"]
    assert "3 of 4 runs are measured" in text and said in text.replace(runs, "RUNS")
    assert command.run_plan(plan, Running(home, dry_run=True), console=Console(width=200)) == 0
    assert "measured otherwise  few-seed0" in capsys.readouterr().out
    assert pretend(home, plan, shards) == 0 and digests(home) == first
    assert calls(home) == [*before, "evaluate few-seed0" + (" judge meme-seed0" if judge == "first" else "")]


@pytest.mark.parametrize(
    ("judge", "run", "by_hand"),
    [
        ("own", "few-seed0", {}),
        ("own", "few-seed0", {"judge": "RUNS/few-seed0", "seed": 0}),
        ("first", "few-seed0", {"judge": "RUNS/meme-seed0"}),
        ("first", "meme-seed0", {}),
    ],
)
def test_what_was_measured_by_hand_as_planned_counts(home: Path, shards: Path, judge: str, run: str, by_hand: dict[str, Any]) -> None:
    plan = plan_of("--models", "meme", "few=meme:samples=1", "--seeds", "0", "1", "--judge", judge)
    assert pretend(home, plan, shards) == 0
    before = calls(home)
    remeasured(home, run, **by_hand)
    assert pretend(home, plan, shards) == 0 and calls(home) == before
    found = {entry["run"]: entry["values"] for entry in json.loads((home / "table.json").read_text())["runs"]}
    assert found[run]["cross_coherence/a>b"] == 7.0


def test_a_comparison_that_was_moved_or_copied_is_still_measured_as_planned(home: Path, shards: Path, tmp_path: Path) -> None:
    plan = plan_of("--models", "meme", "few=meme:samples=1", "--seeds", "0", "1", "--judge", "first")
    assert pretend(home, plan, shards) == 0
    first = digests(home)
    shutil.copytree(home, tmp_path / "copied")
    shutil.move(home, tmp_path / "moved")
    for place in ("copied", "moved"):
        assert command.report_only(tmp_path / place, console=QUIET) == 0 and digests(tmp_path / place) == first


def test_a_comparison_beside_another_one_of_other_rows_is_not_judged_by_its_runs(home: Path, shards: Path, tmp_path: Path) -> None:
    plan = plan_of("--models", "meme", "few=meme:samples=1", "--seeds", "0", "--judge", "first")
    assert pretend(home, plan, shards) == 0
    other = tmp_path / "other" / "runs" / "meme-seed0"
    other.mkdir(parents=True)
    kept = json.loads((home / "runs" / "meme-seed0" / "run.json").read_text())
    for place, counts in ((str(shards), 2), ("/elsewhere", 1)):  # the same rows make the same judge
        (other / "run.json").write_text(json.dumps(kept | {"shards": place}))
        remeasured(home, "few-seed0", judge=str(other))
        write_report(home)
        assert f"{counts} of 2 runs are measured" in (home / "report.md").read_text()


def test_the_seed_that_a_run_is_measured_with_is_its_recipes(home: Path, shards: Path, tmp_path: Path) -> None:
    """By default a recipe of one's own measures all runs with one seed; the table's measure each with its own."""
    (tmp_path / "own.py").write_text(LACKING)
    for recipe, seed in (("linear_gaussian", 3), (f"{tmp_path}/own.py:counting", 0)):
        plan = Plan(recipe, cells.defaults(recipe), {"meme": {"objective": "meme"}}, (3,))
        run = tmp_path / recipe.rpartition(":")[2] / "runs" / "meme-seed3"
        run.mkdir(parents=True)
        for given in (0, 3, None):
            (run / "results.json").write_text(json.dumps({} if given is None else {"seed": given}))
            said = "" if given in (seed, None) else f"seed {given} in place of {seed}"
            assert planned.otherwise(plan, plan.cells()[0], run.parents[1]) == said


def test_a_plan_written_by_hand_may_leave_the_judge_out(home: Path, shards: Path) -> None:
    home.mkdir()
    (home / cells.FILE).write_text(json.dumps({"recipe": "linear_gaussian", "models": {"meme": {}}}))
    assert pretend(home, plan_of("--models", "meme", "--seeds", "0"), shards) == 0


@pytest.mark.parametrize("vary", [[], ["--vary", "missing=0,.5"]])
def test_a_pooled_model_is_another_ones_runs_asked_again(home: Path, shards: Path, vary: list[str]) -> None:
    plan = plan_of("--models", "meme", "pooled=meme:pool=product", *vary, "--seeds", "0", "1")
    assert pretend(home, plan, shards, jobs=2) == 0
    assert not [call for call in calls(home) if call.startswith("train pooled")]
    asked_again = [call.split(" judge")[0] for call in calls(home) if " pool" in call]
    assert sorted(asked_again) == sorted(f"evaluate {cell.name} pool" for cell in plan.cells() if cell.model == "meme")
    test = next(t for t in json.loads((home / "table.json").read_text())["tests"] if t["measurement"] == "cross_coherence/mean")
    assert (test["model"], test["value"], test["count"]) == ("pooled", pytest.approx(0.05), len(plan.seeds))
    assert pretend(home, plan, shards) == 0 and len(asked_again) == len([call for call in calls(home) if " pool" in call])
    with pytest.raises(ValueError, match="none has these settings without it; add it"):
        plan_of("--models", "meme", "pooled=mmvae:pool=product")
    with pytest.raises(ValueError, match="pool: expected mixture, product"):
        plan_of("--models", "meme", "meme:pool=sum")


def test_a_run_with_other_keywords_is_refused_and_more_steps_of_it_are_not(home: Path, shards: Path) -> None:
    assert pretend(home, plan_of("--models", "meme", "--seeds", "0"), shards) == 0
    before = digests(home)
    with pytest.raises(ValueError, match=r"--samples: 2 in the run, 3 now.*--out FOLDER"):
        pretend(home, plan_of("--models", "meme", "--seeds", "0", "--samples", "3"), shards)
    assert digests(home) == before
    assert pretend(home, plan_of("--models", "meme", "--seeds", "0", "--steps", "9"), shards) == 0
    assert json.loads((home / "runs" / "meme-seed0" / "results.json").read_text())["step"] == 9
    assert "--resume" in (home / "logs" / "meme-seed0.log").read_text() and "--steps 9" in (home / "logs" / "meme-seed0.log").read_text()
    with pytest.raises(ValueError, match=r"meme-seed0: was trained for 9 steps, more than the 6 it is asked for; give --steps 9 or more"):
        pretend(home, plan_of("--models", "meme", "--seeds", "0", "--steps", "6"), shards)
    (home / "runs" / "meme-seed1").mkdir()  # killed before it wrote its record
    assert pretend(home, plan_of("--models", "meme", "--seeds", "0", "1", "--steps", "9"), shards) == 0


def test_a_run_older_than_a_keyword_is_resumed_without_naming_it(home: Path) -> None:
    plan = plan_of("--models", "meme", "--seeds", "0", "--steps", "9")
    keywords = {**plan.cells()[0].keywords, "steps": 6}
    del keywords["balance"]  # False by default, and no flag says --balance False
    folder = home / "runs" / "meme-seed0"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"recipe": plan.recipe, "keywords": keywords, "shards": "", "command": [], "format": 1}))
    words = Runner(plan, Running(home), console=QUIET).words(Task(plan.cells()[0], "train"))
    assert words[:2] == ["train", "--resume"] and words[3:5] == ["--steps", "9"] and "--balance" not in words


@pytest.mark.parametrize("vary", [[], ["--vary", "missing=0,.3"]], ids=["own judge", "first judge"])
def test_on_another_split_runs_are_measured_apart_and_the_test_rows_are_never_looked_at(home: Path, shards: Path, vary: list[str]) -> None:
    words = ["--models", "meme", "pooled=meme:pool=product", *vary, "--seeds", "0", "--validation", ".1"]
    plan = plan_of(*words, "--split", "validation", recipe="digits")
    assert pretend(home, plan, shards) == 0
    runs = [cell.run for cell in plan.cells() if cell.model == "meme"]
    measured = [call.split(" judge")[0] for call in calls(home) if call.startswith("evaluate")]
    asked = ([f"evaluate {run} split", f"evaluate {run} pool split"] for run in runs)
    assert sorted(measured) == sorted(call for both in asked for call in both)
    assert not [run for run in runs if (home / "runs" / run / "results.json").exists()]
    assert (home / "runs" / runs[0] / "on-validation" / "results.json").is_file()
    assert (home / "runs" / runs[0] / "pooled-product" / "on-validation" / "results.json").is_file()
    text = (home / "report.md").read_text()
    assert "Measured on the split `validation`: no test row was looked at." in text and "rows / s" in text  # of the run's own log
    assert pretend(home, plan, shards) == 0 and len([call for call in calls(home) if call.startswith("evaluate")]) == len(measured)
    assert pretend(home, plan_of(*words, recipe="digits"), shards) == 0  # then the test rows, of the same trained runs
    assert len([call for call in calls(home) if call.startswith("train")]) == (len(runs) if vary else 2 * len(runs))
    assert (home / "runs" / runs[0] / "results.json").is_file()


def test_the_report_shows_tables_curves_pictures_and_what_is_missing(home: Path, shards: Path) -> None:
    plan = plan_of("--models", "meme", "m9=meme:samples=9", "--vary", "missing=0,.3,.6", "--seeds", "0", "1", "2")
    assert pretend(home, plan, shards, jobs=2) == 0
    text = (home / "report.md").read_text()
    first = 0.5 + 0.02 + 0.03 * (0 + 2 + 4) / 3 + 0.005
    assert f"{first:.3f} [" in text and f"| **{first + 0.07:.3f} [" in text  # better by as much in every pair
    assert "+0.070 [0.070, 0.070]" in text and "| 0.25 " in text  # 3 seeds, however many settings: 2 / 2^3
    for name in ("against-missing", "by-inputs"):
        assert (home / "figures" / f"{name}.png").stat().st_size > 5000 and f"figures/{name}.png" in text
    assert "104" in text.split("## Time and memory")[1]  # the median of the three seeds' rows a second
    (home / "runs" / "m9-missing=0.0-seed0" / "report.md").unlink()
    (home / "runs" / "earlier-seed0").mkdir()
    (home / "runs" / "earlier-seed0" / "run.json").write_text("{}")
    write_report(home)
    text = (home / "report.md").read_text()
    assert "17 of 18 runs are measured" in text and "earlier plan, in no table: `earlier-seed0`" in text


def test_the_csv_gives_back_the_numbers_of_the_table_to_the_last_digit() -> None:
    plan = plan_of("--models", "meme", 'a, "b"=mmvae', "--vary", "missing=0,.5", "--seeds", "0", "1", "2")
    generator = np.random.default_rng(1)
    found = tabulated(
        plan, runs_of(plan, lambda cell: None if cell.model != "meme" and cell.setting["missing"] else float(generator.normal()))
    )
    lines = list(csv.DictReader(io.StringIO(measurements.comma_separated(found))))
    back = {(line["missing"], line["measurement"], line["model"]): line for line in lines}
    entries = [(e["setting"], name, one) for e in found["settings"] for name, one in e["measurements"].items()]
    assert len(back) == len(lines) == len(entries) * len(plan.models) == 4
    for setting, name, one in entries:
        for model, numbers in one["models"].items():
            line = back[str(setting["missing"]), name, model]
            assert {key: float(line[key]) if line[key] else None for key in numbers} == numbers
            assert line["best"] == str(int(one["best"] == model))


def test_the_printed_table_has_balanced_columns_and_no_special_character_bare() -> None:
    plan = plan_of("--models", "meme", "50 % & {more}_~^\\#$<|>=mmvae", "--vary", "missing=0,.5", "--seeds", "0", "1", "2")
    found = tabulated(plan, runs_of(plan, lambda cell: -1.0 - (cell.model != "meme") - 0.001 * cell.seed))
    text = measurements.latex(found)
    assert r"50 \% \& \{more\}\_\textasciitilde{}\textasciicircum{}\textbackslash{}\#\$\textless{}\textbar{}\textgreater{}" in text
    assert r"cross\_coherence/a\textgreater{}b & \textbf{$-$1.001 [$-$1.003, $-$0.999]} & $-$2.001 [" in text
    assert text.count(r"\begin{tabular}{lrr}") == text.count(r"\toprule") == text.count(r"\end{table}") == 2
    assert text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")
    rows = [line for line in text.splitlines() if line.endswith(r" \\")]
    assert [len(re.findall(r"(?<!\\)&", row)) for row in rows] == [2] * 4
    assert not re.search(r"(?<!\\)[%#_~^|<>]", text.partition("\n")[2].replace(r"\\", ""))  # behind the comment


def test_jobs_share_cores_and_gpus_and_one_job_has_all() -> None:
    assert surroundings(1, 1, {"A": "b"}, 4) == {"A": "b"}
    assert [surroundings(slot, 3, {}, 2)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["0", "1", "0"]
    assert surroundings(1, 2, {"CUDA_VISIBLE_DEVICES": "5,7", "OMP_NUM_THREADS": "3"}, 2) == {
        "CUDA_VISIBLE_DEVICES": "7",
        "OMP_NUM_THREADS": "3",
        "MEME_DIST_JOBS": "2",
    }
    assert "CUDA_VISIBLE_DEVICES" not in surroundings(0, 2, {}, 1)
    with pytest.raises(ValueError, match="jobs: expected at least 1, got 0"):
        Runner(plan_of(), Running(Path("x"), jobs=0), console=QUIET)
    assert slug("mmvae: Laplace, K=5") == "mmvae-Laplace-K=5"


# ---- the real thing ---------------------------------------------------------------------------------------------------------------


@pytest.mark.launch
def test_a_real_comparison_that_is_killed_goes_on_to_what_an_undisturbed_training_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    tiny = [*TINY, "--steps", "60", "--save-every", "2", "--log-every", "20", "--schedule", "constant"]
    words = ["linear_gaussian", *tiny, "--out", "out", "--models", "meme", "mmvae", "--seeds", "0"]
    process = forkserver().Process(target=command.main, args=("compare", words))
    process.start()
    run = Path("out/runs/meme-seed0")
    deadline = time.monotonic() + 120
    while not (run / "checkpoints" / "last" / "state.json").is_file() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.join()
    assert command.main("compare", [*words, "--jobs", "2"]) == 0
    assert f"--resume {run.resolve()}" in Path("out/logs/meme-seed0.log").read_text()
    assert cli.main(["train", "linear_gaussian", *tiny, "--seed", "0", "--run", "alone/run"]) == 0
    alone, inside = (json.loads((folder / "results.json").read_text()) for folder in (Path("alone/run"), run))
    assert alone == inside
    table = json.loads(Path("out/table.json").read_text())
    assert all(run["values"] is not None for run in table["runs"]) and len(table["runs"]) == 2
    assert {(test["model"], test["count"]) for test in table["tests"]} == {("mmvae", 1)}
    assert Path("out/figures/cross-generation.png").stat().st_size > 5000
    before = Path("out/table.json").read_bytes()
    assert command.main("compare", ["--report-only", "out"]) == 0 and Path("out/table.json").read_bytes() == before
    Path("out/plan.toml").write_text('recipe = "linear_gaussian"\n[models.meme]\nspeed = 3\n')
    with pytest.raises(ValueError, match="no keyword 'speed'"):
        command.main("compare", ["out/plan.toml", "--out", "other"])
