"""A recipe of one's own, FILE.py:FUNCTION, is one like any other: trained, resumed, measured and compared from any folder."""

import hashlib
import json
import os
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from meme_dist import stored
from meme_dist.cli import main
from meme_dist.compare import cells, command
from meme_dist.data.index import Manifest
from meme_dist.data.sets.linear_gaussian import linear_gaussian
from meme_dist.modality import Modality
from meme_dist.objectives.base import Objective
from meme_dist.objectives.mvae import MVAE
from meme_dist.recipes import named
from meme_dist.recipes.base import Model, Recipe
from meme_dist.recipes.heeded import Unheeded, held
from meme_dist.recipes.named import recipe_of, short
from meme_dist.recipes.networks import modalities_for
from meme_dist.train.training import Training

SOURCE = '''
from torch import nn

from helper import SCALE
from meme_dist.data.index import Manifest
from meme_dist.data.sets.linear_gaussian import linear_gaussian
from meme_dist.likelihoods import Normal
from meme_dist.modality import Modality
from meme_dist.objectives.mvtcae import MVTCAE
from meme_dist.recipes.base import Model, Recipe
from meme_dist.recipes.networks import modalities_for
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


def deaf(*, model: Model = Model(latent_dim=3), training: Training = Training(steps=2, batch_size=8)) -> Recipe:
    """It takes a model and reads its size alone."""
    return Recipe(lambda manifest: Mine(modalities_for(manifest.fields, Model(latent_dim=model.latent_dim), scale=1.0)), training, ROWS)


def endless(*, training: Training = Training(steps=2)) -> Recipe:
    """It trains for as long as it likes."""
    return Recipe(lambda manifest: Mine(modalities_for(manifest.fields, Model(latent_dim=3), scale=1.0)), Training(steps=300), ROWS)


def seedless(*, hidden: int = 4) -> Recipe:
    """It does not say how it trains."""
    return mine(hidden=hidden)


def listed(*, kinds: list[str] = ["a"], training: Training = Training(steps=2)) -> Recipe:
    """Several words in one keyword."""
    return mine(training=training)


ROWS = linear_gaussian(rows=40)
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


# ---- its file stays as it was ---------------------------------------------------------------------------------------------------------


def rewritten(own: Path, source: str) -> str:
    """Another content of the recipes' file, which the next command reads as another process would; its sha256."""
    (own / "code/own.py").write_text(source)
    named._loaded.cache_clear()
    return hashlib.sha256(source.encode()).hexdigest()


def test_a_run_goes_on_and_is_measured_with_the_file_that_it_began_with_alone(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("train code/own.py:mine --no-evaluate --run runs/r".split()) == 0
    kept = json.loads(Path("runs/r/run.json").read_text())
    now = rewritten(own, edited := SOURCE.replace("nn.ReLU()", "nn.Tanh()"))
    for words in ("train --resume runs/r --steps 3 --no-evaluate", "evaluate runs/r", "generate runs/r --num 2"):
        capsys.readouterr()
        assert main(words.split()) == 2, words
        said = " ".join(capsys.readouterr().err.split())
        assert (
            f"{own}/code/own.py: was changed since runs/r began with it (sha256 {kept['recipe_sha256'][:12]} then, {now[:12]} now)" in said
        )
        assert "Put the file back as it was, or start a new run from its settings: meme-dist train --like runs/r --run NAME" in said
    assert main("train --like runs/r --no-evaluate --run runs/s".split()) == 0
    assert json.loads(Path("runs/s/run.json").read_text())["recipe_sha256"] == now
    assert rewritten(own, SOURCE) == kept["recipe_sha256"] != now
    assert main("train --resume runs/r --steps 3 --no-evaluate".split()) == 0
    rewritten(own, edited)
    del kept["recipe_sha256"]  # a run from before it was kept
    Path("runs/r/run.json").write_text(json.dumps(kept))
    assert main("train --resume runs/r --steps 4 --no-evaluate".split()) == 0


def test_the_runs_of_a_comparison_have_one_file(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "compare code/own.py:mine --seeds 0 1 --out out --dry-run".split()
    assert main("train code/own.py:mine --seed 0 --no-evaluate --run out/runs/own-mine-seed0".split()) == 0 and main(words) == 0
    rewritten(own, SOURCE.replace("nn.ReLU()", "nn.Tanh()"))
    capsys.readouterr()
    assert main(words) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "own.py: was changed since" in said and "Or compare in another folder: --out FOLDER" in said


def test_the_hash_is_of_the_code_that_runs(own: Path) -> None:
    """Not of what the file holds by the time that a run's rows are written, nor of what Python cached of a file of that time and size."""
    name, file, edited = f"{own}/code/own.py:mine", own / "code/own.py", SOURCE.replace("nothing = 3", "nothing = 4")
    recipe_of(name)
    time, began = file.stat().st_mtime, named.fingerprint(name)
    file.write_text(edited)
    assert named.fingerprint(name) == began and named.fingerprint("digits") == ""
    now = rewritten(own, edited)
    os.utime(file, (time, time))
    with pytest.raises(ValueError, match="got 4"):
        recipe_of(f"{file}:nothing")
    assert named.fingerprint(name) == now


# ---- it is held to what it is asked ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Taste:
    """A group of one's own."""

    latent_dim: int = 3
    beta: float = 1.0


class Keeping(MVAE):
    """An objective that keeps its settings, to read them at every step."""

    def __init__(self, modalities: Mapping[str, Modality], model: Model):
        super().__init__(modalities)
        self.model = model


def recipe(build: Callable[..., Objective], group: Any = Model(latent_dim=3)) -> Callable[..., Recipe]:
    """A recipe with one group, held to it."""

    def function(*, group=group, training: Training = Training()) -> Recipe:
        return Recipe(lambda manifest: build(modalities_for(manifest.fields, Model(latent_dim=3), scale=1.0), group), training, ROWS)

    return held(function)


ROWS = linear_gaussian(rows=8)
FIELDS = Manifest(Path(), ROWS.name, ROWS.fields, ROWS.classes, {}, 0, {})


def test_a_setting_that_it_never_reads_is_refused_and_one_that_its_objective_ignores_is_not() -> None:
    asked = Model(latent_dim=3, objective="mmvae", beta=3.0, cross_weight=1.0, combination="product")
    deaf = recipe(lambda modalities, _: MVAE(modalities))
    deaf().build(FIELDS)
    with pytest.raises(
        Unheeded, match="asked for --beta 3.0 --combination product --cross-weight 1.0 --objective mmvae, and reads no such"
    ):
        deaf(group=asked).build(FIELDS)
    some = recipe(lambda modalities, model: MVAE(modalities, beta=model.beta))
    some(group=Model(latent_dim=3, beta=3.0)).build(FIELDS)
    with pytest.raises(Unheeded, match="asked for --combination product --cross-weight 1.0 --objective mmvae, and"):
        some(group=asked).build(FIELDS)
    built = recipe(lambda modalities, model: model.build(modalities))
    assert type(built(group=asked).build(FIELDS)).__name__ == "MMVAE"  # which has no use for the cross weight
    taste = recipe(lambda modalities, taste: MVAE(modalities, beta=taste.beta), Taste())
    taste(group=Taste(beta=2.0)).build(FIELDS)
    with pytest.raises(Unheeded, match="asked for --latent-dim 4, and"):
        taste(group=Taste(latent_dim=4)).build(FIELDS)


def test_an_objective_may_keep_its_settings_and_gets_them_as_they_are() -> None:
    objective = recipe(Keeping)(group=Model(latent_dim=3, beta=3.0)).build(FIELDS)
    assert type(objective.model) is Model and pickle.loads(pickle.dumps(objective.model)) == Model(latent_dim=3, beta=3.0)


def test_what_it_does_not_heed_is_refused_before_anything_is_trained(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, complaint in (
        ("train code/own.py:endless --steps 9 --run r", "recipe 'endless' trains with steps 300 in place of 9; pass its `training` on"),
        ("compare code/own.py:endless --out out", "own-endless-seed0: recipe 'endless' trains with steps 300 in place of 2"),
        (
            "compare code/own.py:deaf --models meme mmvae --out out",
            "mmvae-seed0: recipe 'deaf' was asked for --objective mmvae, and reads no",
        ),
        ("ablate code/own.py:deaf --part beta=2 --out out", "beta=2.0-seed0: recipe 'deaf' was asked for --beta 2.0, and reads no such"),
        ("compare code/own.py:deaf --vary beta=none,2 --out out", "own-deaf-beta=2.0-seed0: recipe 'deaf' was asked for --beta 2.0"),
        ("compare code/own.py:seedless --out out", "it has no keyword seed and no steps; give it `training: Training = Training()`"),
    ):
        assert main(words.split()) == 2, words
        assert complaint in " ".join(capsys.readouterr().err.split())
    assert not (own / "out").exists() and not (own / "runs").exists()


def test_without_names_of_models_it_is_compared_under_its_own(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("compare code/own.py:deaf --seeds 0 --out out --dry-run".split()) == 0
    assert capsys.readouterr().out.split()[:3] == ["not", "begun", "own-deaf-seed0"]


def test_a_keyword_with_several_words_is_a_list_of_words_wherever_it_is_named(own: Path) -> None:
    name = f"{own}/code/own.py:listed"
    assert cells.varied_of(name, "kinds=a b,c") == ("kinds", [["a", "b"], ["c"]])
    assert cells.model_of(name, "m=:kinds=a b") == ("m", {"kinds": ["a", "b"]})
    (own / "plan.json").write_text(json.dumps({"recipe": name, "seeds": [0], "models": {"m": {"kinds": ["a b", "c"]}}}))
    plan = cells.load(own / "plan.json")
    assert plan.models == {"m": {"kinds": ["a b", "c"]}}
    assert cells.unflatten(recipe_of(name), plan.cells()[0].keywords)["kinds"] == ["a b", "c"]
    with pytest.raises(ValueError, match=r"steps: expected a whole number, got \['1', '2'\]"):
        cells.typed(name, "steps", ["1", "2"])
