"""A recipe of one's own, FILE.py:FUNCTION, is one like any other: trained, resumed, measured and compared from any folder."""

import json
import os
from pathlib import Path

import pytest

from meme_dist import stored
from meme_dist.cli import main
from meme_dist.compare import cells, command
from meme_dist.recipes.named import recipe_of, short

SOURCE = '''
from torch import nn

from helper import SCALE
from meme_dist.data.index import Manifest
from meme_dist.data.sets.linear_gaussian import linear_gaussian
from meme_dist.likelihoods import Normal
from meme_dist.modality import Modality
from meme_dist.objectives.mvtcae import MVTCAE
from meme_dist.recipes.base import Recipe
from meme_dist.train.training import Training


class Mine(MVTCAE):
    """An objective that the library does not know."""


def mine(*, hidden: int = 4, training: Training = Training(steps=2, batch_size=8, save_every=2)) -> Recipe:
    """My networks on a linear model.

    Args:
        hidden: Width of the networks.
        training: How long and how fast.
    """

    def build(manifest: Manifest) -> Mine:
        def network(come: int, go: int) -> nn.Module:
            return nn.Sequential(nn.Linear(come, hidden), nn.ReLU(), nn.Linear(hidden, go))

        sizes = {name: field.shape[0] for name, field in manifest.fields.items()}
        return Mine({
            name: Modality(encoder=network(n, 6), decoder=network(3, n), likelihood=Normal(SCALE), latent_dim=3, feature=(n,))
            for name, n in sizes.items()
        })

    return Recipe(build, training, linear_gaussian(rows=40))


nothing = 3
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "code").mkdir()
    (tmp_path / "code/helper.py").write_text("SCALE = 0.5\n")
    (tmp_path / "code/own.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_is_trained_resumed_and_loaded_by_its_file_from_any_folder(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main("train code/own.py:mine --hidden 5 --no-evaluate --run runs/r --data data".split()) == 0
    kept = json.loads((own / "runs/r/run.json").read_text())
    assert kept["recipe"] == f"{own}/code/own.py:mine" and kept["keywords"]["hidden"] == 5
    os.chdir(own / "code")
    assert main(["train", "--resume", str(own / "runs/r"), "--steps", "4", "--no-evaluate"]) == 0
    found = stored.load(own / "runs/r")
    assert found.step == 4 and type(found.objective).__name__ == "Mine"
    assert found.objective.modality("x0").encoder[0].out_features == 5  # type: ignore[index]
    assert main(["shards", "write", "own.py:mine", "--out", str(own / "shards")]) == 0


def test_a_plan_names_it_by_its_whole_path(own: Path) -> None:
    (own / "plan.toml").write_text('recipe = "code/own.py:mine"\nseeds = [0]\n[models.wide]\nhidden = 9\n')
    plan = cells.load(own / "plan.toml")
    assert plan.recipe == f"{own}/code/own.py:mine" and [cell.keywords["hidden"] for cell in plan.cells()] == [9]


def test_it_is_compared_and_ablated_though_its_objective_is_none_of_the_names(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[cells.Plan] = []
    monkeypatch.setattr(command, "run_plan", lambda plan, *_, **__: plans.append(plan) or 0)
    assert main("compare code/own.py:mine --vary hidden=4,5 --out out".split()) == 0
    assert main("ablate code/own.py:mine --part hidden=6 --out out".split()) == 0
    compared, ablated = plans
    assert list(compared.models) == ["own-mine"] and [cell.keywords["hidden"] for cell in compared.cells()[::3]] == [4, 5]
    assert ablated.cells()[-1].keywords["hidden"] == 6
    assert main("ablate code/own.py:mine --out out".split()) == 2  # the default parts are MEME's


def test_what_is_no_recipe_is_refused_in_words(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, words in (
        ("code/own.py", "expected a file and a function in it that returns a Recipe, code/own.py:FUNCTION"),
        ("code/gone.py:mine", "gone.py: expected a Python file with a recipe, found none"),
        ("code/own.py:yours", "expected a function 'yours' that returns a Recipe, got none"),
        ("code/own.py:nothing", "expected a function 'nothing' that returns a Recipe, got 3"),
    ):
        assert main(["train", name, "--run", "runs/none"]) == 2
        assert words in " ".join(capsys.readouterr().err.split())
    with pytest.raises(ValueError, match="recipe 'mine' is not known here; .*FILE.py:FUNCTION"):
        recipe_of("mine")
    assert not (own / "runs").exists() and short("/a/own.py:mine") == "own-mine" and short("mnist_svhn:paper") == "mnist_svhn-paper"
