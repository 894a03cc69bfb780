"""Plans of comparisons in files: what they leave out is what the command line leaves out, and what is wrong is named with its place."""

import re
from pathlib import Path

import pytest
from rich.console import Console

from meme_dist.compare import cells, command
from meme_dist.flags import recipe_flags

PLAN = 'recipe = "planted"\nseeds = [0]\n[common]\nsteps = 20\n[models.meme]\n[models.mopoe]\nobjective = "mopoe"\n'
VARIED = f"{PLAN}[vary]\nmissing = [0.0, 0.3]\n"
OTHER_ROWS = f"{PLAN}missing = 0.3\n"


@pytest.mark.parametrize(
    ("text", "words", "judge"),
    [
        (PLAN, ["--models", "meme", "mopoe"], "own"),
        (VARIED, ["--models", "meme", "mopoe", "--vary", "missing=0,.3"], "first"),
        (OTHER_ROWS, ["--models", "meme", "mopoe:missing=.3"], "first"),
        (f'judge = "auto"\n{VARIED}', ["--models", "meme", "mopoe", "--vary", "missing=0,.3"], "first"),
        (f'judge = "own"\n{VARIED}', ["--models", "meme", "mopoe", "--vary", "missing=0,.3", "--judge", "own"], "own"),
    ],
)
def test_a_file_has_the_judge_that_the_same_words_have(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, words: list[str], judge: str
) -> None:
    (tmp_path / "plan.toml").write_text(text)
    plans: list[cells.Plan] = []
    monkeypatch.setattr(command, "run_plan", lambda plan, *_, **__: plans.append(plan) or 0)
    given = ["--steps", "20", "--seeds", "0", "--out", str(tmp_path / "out"), *words]
    asked, arguments = recipe_flags("planted", {}, given, command.Comparison, "compare")
    command.compare("planted", arguments, asked, console=Console(quiet=True))
    assert cells.load(tmp_path / "plan.toml").judge == plans[0].judge == judge


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("steps = 20", "stesp = 20", r"plan.toml: \[common\]: recipe 'planted' has no keyword 'stesp'; did you mean 'steps'\?; it has "),
        ("steps = 20", "steps = 20.5", r"plan.toml: \[common\]: steps: expected a whole number, got '20.5'$"),
        ('"mopoe"', '"mopeo"', r"plan.toml: \[models.mopoe\]: objective: expected meme, .* got 'mopeo'; did you mean 'mopoe'\?$"),
        ('"mopoe"', '"mopoe"\nbeta = "two"', r"plan.toml: \[models.mopoe\]: beta: expected a number or none, got 'two'$"),
        ('"planted"', '"plantd"', r"plan.toml: unknown recipe 'plantd'; did you mean 'planted'\?"),
        ("seeds", 'reference = "mem"\nseeds', r"plan.toml: reference: expected one of the models \['meme', 'mopoe'\], got 'mem'$"),
        ("seeds", 'judge = "frist"\nseeds', r"plan.toml: judge: expected auto or own or first, got 'frist'$"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_its_place(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    (tmp_path / "plan.toml").write_text(PLAN.replace(old, new, 1))
    with pytest.raises(ValueError, match=complaint):
        cells.load(tmp_path / "plan.toml")


def test_a_folder_without_a_comparison_is_named_and_how_one_begins(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"nowhere: expected the folder of a comparison, with its plan.json, found none; meme-dist compare"
    ):
        command.report_only(tmp_path / "nowhere", console=Console(quiet=True))


def test_the_plan_that_the_documents_show_is_understood(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "docs" / "objectives.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "plan.toml").write_text(shown)
    plan = cells.load(tmp_path / "plan.toml")
    assert len(plan.cells()) == 3 * 3 * 2 and {cell.pool for cell in plan.cells()} == {None, "product"}
