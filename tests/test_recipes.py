"""Every recipe, under every name: it builds, it trains, its keywords are flat, and a named setting is the same function."""

import inspect
import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from meme_dist.data.fields import Field
from meme_dist.data.index import Manifest
from meme_dist.data.shards import Dataset, Row, write_shards
from meme_dist.distributions import DiagNormal
from meme_dist.recipes import RECIPES
from meme_dist.recipes.base import Model, Name, Recipe
from meme_dist.recipes.heeded import held
from meme_dist.recipes.keywords import flatten, names, unflatten, with_defaults
from meme_dist.recipes.networks import modality_for
from meme_dist.train.training import Training
from meme_dist.types import Batch, pack_dense
from tests.data.small import cub_files

BIRDS = tempfile.TemporaryDirectory()  # a recipe that reads its vocabulary when it is built needs files that are there
NEEDED: Mapping[str, Mapping[str, Any]] = {
    "mnist_svhn": {"source": Path("nowhere")},
    "mnist_meterdigits": {"source": Path("nowhere"), "spoken": True, "name": True},
    "digits4": {"source": Path("nowhere")},
    "polymnist": {"source": Path("nowhere")},
    "mfeat": {"source": Path("nowhere")},
    "cub": {"source": cub_files(Path(BIRDS.name))},
    "tcga": {"source": Path("nowhere")},
    "citeseq": {"source": Path("nowhere")},
    "mnist_attributes": {"source": Path("nowhere")},
    "enas": {"source": Path("nowhere")},
    "asia": {"source": Path("nowhere")},
}
FIELDS = {
    "photo": Field(kind="image", shape=(3, 20, 17), codec="png", likelihood="laplace"),
    "scan": Field(kind="image", shape=(1, 4, 8), codec="npy", likelihood="bernoulli"),
    "genes": Field(kind="counts", shape=(30,), codec="npy", likelihood="negative_binomial"),
    "clicks": Field(kind="counts", shape=(3, 2), codec="npy", likelihood="poisson"),
    "views": Field(kind="vector", shape=(7,), codec="npy", likelihood="normal"),
    "flags": Field(kind="vector", shape=(5,), codec="npy", likelihood="bernoulli"),
    "plan": Field(kind="graph", shape=(4, 5), codec="npy", likelihood="categorical", vocabulary=("in", "out")),
    "words": Field(kind="text", shape=(6,), codec="txt", likelihood="categorical", vocabulary=("<pad>", "<unk>", "<eos>", "a", "b")),
}


def data_of(field: Field, rows: int) -> torch.Tensor:
    """Random rows as they come out of a shard."""
    if field.kind == "graph":
        token = torch.randint(1, 1 + len(field.vocabulary), (rows, field.shape[0], 1))
        return torch.cat([token, torch.ones(rows, field.shape[0], field.shape[0], dtype=torch.int64).tril()], -1)
    if field.kind == "text":
        return torch.randint(0, len(field.vocabulary), (rows, *field.shape))
    if field.kind == "counts":
        return torch.poisson(torch.full((rows, *field.shape), 3.0))
    return torch.rand(rows, *field.shape)


def batch_of(fields: Mapping[str, Field]) -> Batch:
    """Two complete rows, then for each modality a row that holds it alone, then one with all but the first."""
    size = len(fields)
    observed = torch.cat([torch.ones(2, size), torch.eye(size), 1 - torch.eye(size)[:1]]).bool()
    data = {name: data_of(field, len(observed)) for name, field in fields.items()}
    return pack_dense(data, dict(zip(fields, observed.T, strict=True)))


def some_rows(split: str):
    """Ten rows of all fields, one entry in three missing, in the form in which a shard is written."""
    torch.manual_seed(len(split))
    for row in range(10):
        data = {name: data_of(field, 1)[0] for number, (name, field) in enumerate(FIELDS.items()) if (row + number) % 3}
        data = {name: (x * 255).to(torch.uint8) if FIELDS[name].kind == "image" else x for name, x in data.items()}
        yield Row(data, row % 2)


@pytest.fixture(scope="module")
def any_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("any") / "shards"
    write_shards(Dataset("any", FIELDS, some_rows, ("even", "odd")), folder)
    return folder


def needed(name: str, any_shards: Path) -> dict[str, Any]:
    """The keywords without a default."""
    return {"shards": str(any_shards)} if name == "auto" else dict(NEEDED.get(name.partition(":")[0], {}))


def tiny(name: str, any_shards: Path) -> Recipe:
    """The recipe with three samples and four pseudo-inputs: its networks as they are, its work a tenth. It is held to all three."""
    defaults = inspect.signature(RECIPES[name]).parameters["model"].default
    model = {**flatten({"model": defaults}), "samples": 3, "pseudo_inputs": 4}
    return held(RECIPES[name])(**needed(name, any_shards), model=Model(**model), training=Training(steps=3))


def manifest_of(recipe: Recipe) -> Manifest:
    if recipe.shards is not None:
        return Manifest.load(recipe.shards)
    assert recipe.dataset is not None
    return Manifest(Path(), recipe.dataset.name, recipe.dataset.fields, recipe.dataset.classes, {}, 1024, {})


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_builds_and_every_weight_moves_in_its_first_step(name: str, any_shards: Path) -> None:
    recipe = tiny(name, any_shards)
    manifest = manifest_of(recipe)
    batch = batch_of(manifest.fields)
    objective = recipe.build(manifest)
    objective.initialise(batch)
    optimizer = torch.optim.Adam(objective.parameters(), lr=1e-3)
    loss = objective(batch).total
    loss.backward()
    assert torch.isfinite(loss)
    still = [name for name, p in objective.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert still == []
    before = {name: p.detach().clone() for name, p in objective.named_parameters()}
    optimizer.step()
    assert [name for name, p in objective.named_parameters() if torch.equal(p, before[name])] == []


@pytest.mark.parametrize("name", FIELDS)
def test_the_network_for_a_field_gives_back_data_of_its_shape_and_range(name: str) -> None:
    field = FIELDS[name]
    modality = modality_for(field, latent_dim=3, family=DiagNormal, scale=0.5)
    x = data_of(field, 5)
    q = modality.encode(x)
    made = modality.reconstruct(q.mean)
    assert made.shape == x.shape and made.dtype == x.dtype
    assert torch.isfinite(modality.log_prob(x, q.mean[None])).all()
    if field.kind in ("image", "counts") or field.likelihood == "bernoulli":
        assert bool((made >= 0).all())
    if field.kind == "image" or field.likelihood == "bernoulli":
        assert bool((made <= 1).all())


def test_balance_gives_every_modality_the_weight_of_the_largest_event() -> None:
    weights = Model(balance=True).weights(FIELDS)
    assert weights["photo"] == 1.0 and weights["flags"] == 3 * 20 * 17 / 5
    assert set(Model().weights(FIELDS).values()) == {1.0}


@pytest.mark.parametrize("name", RECIPES)
def test_keywords_are_flat_distinct_and_come_back_from_json(name: str, any_shards: Path) -> None:
    recipe = RECIPES[name]
    keywords = names(recipe)
    assert len(keywords) == len(set(keywords))
    given = {**needed(name, any_shards), "training": Training(steps=7, betas=(0.5, 0.9), clip=1.0), "model": Model(samples=2)}
    flat = json.loads(json.dumps(flatten(given)))
    assert flat["steps"] == 7 and flat["samples"] == 2
    back = unflatten(recipe, flat)
    expected = {key: value.resolve() if isinstance(value, Path) else value for key, value in given.items()}
    assert {key: back[key] for key in given} == expected


def test_an_unknown_keyword_of_a_recorded_run_is_named() -> None:
    with pytest.raises(ValueError, match=r"no keywords \['colour'\].*it has .*missing"):
        unflatten(RECIPES["digits"], {"colour": "red"})


def test_a_setting_changes_defaults_and_explicit_keywords_win() -> None:
    def recipe(*, a: int = 1, b: int = 2) -> tuple[int, int]:
        """About.

        More.
        """
        return a, b

    setting = with_defaults(recipe, "Otherwise.", b=5)
    assert setting() == (1, 5) and setting(b=3) == (1, 3)
    assert (setting.__doc__ or "").startswith("Otherwise.\n\n") and "More." in (setting.__doc__ or "")
    with pytest.raises(ValueError, match=r"no keywords \['c'\]"):
        with_defaults(recipe, c=1)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_says_what_it_is_in_one_line_and_explains_every_keyword(name: str) -> None:
    text = inspect.getdoc(RECIPES[name]) or ""
    assert 10 < len(text.splitlines()[0]) <= 100
    explained = text.partition("Args:")[2]
    assert [key for key in inspect.signature(RECIPES[name]).parameters if f"\n    {key}: " not in explained] == []


@pytest.mark.parametrize("objective", ["csvae", "mmvae"])
def test_weights_of_likelihoods_reach_every_modality_of_the_swiss_roll(objective: Name) -> None:
    """But for the labels of csvae, whose weight is --label-weight."""
    recipe = RECIPES["swiss_roll"](model=Model(objective=objective, latent_dim=4, likelihood_weight=20.0, balance=True))
    built = recipe.build(manifest_of(recipe))
    expected = {"point": 20.0, "low": 30.0 if objective == "csvae" else 60.0}
    assert {name: built.modality(name).weight for name in expected} == expected


@pytest.mark.parametrize("objective", sorted(set(get_args(Name)) - {"meme"}))
def test_annealing_reaches_every_rival_and_less_than_no_rows_are_refused(objective: Name) -> None:
    recipe = RECIPES["linear_gaussian"](
        model=Model(objective=objective, latent_dim=3, private_dim=int(objective == "mmvaeplus"), anneal=640)
    )
    assert recipe.build(manifest_of(recipe)).anneal == 640
    with pytest.raises(ValueError, match="anneal: expected a number of rows, 0 or more, got -1"):
        Model(objective=objective, anneal=-1)


@pytest.mark.parametrize("objective", get_args(Name))
def test_what_was_asked_for_and_its_objective_has_no_use_for_is_told_in_a_line(objective: Name) -> None:
    rivals = {*get_args(Name)} - {"meme"}
    used = {
        "anneal 640": rivals,
        "beta 2.0": rivals,
        "cross-weight 3.0": {"meme"},
        "no-resampled": {"mmvae", "mmvaeplus", "holder"},
        "samples 5": {"meme", "mmvae", "mmvaeplus"},
        "subsets 1": {"mvae", "mopoe"},
    }
    told: list[str] = []
    recipe = held(RECIPES["linear_gaussian"], told.append)
    plain = replace(
        inspect.signature(recipe).parameters["model"].default, objective=objective, latent_dim=3, private_dim=int(objective == "mmvaeplus")
    )
    recipe(model=plain).build(manifest_of(recipe()))
    assert told == []
    recipe(model=replace(plain, anneal=640, beta=2.0, cross_weight=3.0, resampled=False, samples=5, subsets=1)).build(manifest_of(recipe()))
    idle = " ".join(f"--{flag}" for flag, objectives in used.items() if objective not in objectives)
    assert len(told) == 1 and f" has no use for {idle} here, and trains the same without" in told[0]
    assert told[0].partition(" ")[0].lower() == objective


@pytest.mark.parametrize(("targets", "samples"), [(2, 11), (0, 1)])
def test_targets_that_cannot_be_drawn_are_refused_before_any_row_is_written(targets: int, samples: int) -> None:
    with pytest.raises(ValueError, match=f"targets: expected at least 1, and samples=1 .*, got {targets} with {samples}"):
        Model(targets=targets, samples=samples)


@pytest.mark.parametrize("objective", ["csvae", "mmvae"])
def test_dropout_reaches_every_encoder_but_those_of_labels(objective: Name) -> None:
    recipe = RECIPES["swiss_roll"](model=Model(objective=objective, latent_dim=4, dropout=0.5))
    built = recipe.build(manifest_of(recipe))
    expected = {"point": 0.5, "low": 0.0 if objective == "csvae" else 0.5}
    assert {name: built.modality(name).dropout for name in expected} == expected
