"""A trained model takes a reweighted prior wherever it takes its own, and a ratio is kept beside the run that it belongs to."""

import contextlib
import json
import math
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from meme_dist import assess, run_commands, stored_ratio
from meme_dist import stored as stores
from meme_dist.cli import main
from meme_dist.data.shards import Dataset, write_shards
from meme_dist.data.stream import Evaluation
from meme_dist.evaluate import evaluate
from meme_dist.metrics.coherence import joint_coherence
from meme_dist.metrics.generation import joint_generations
from meme_dist.metrics.likelihood import log_likelihood, queries
from meme_dist.metrics.rows import evaluating
from meme_dist.noise import Noise
from meme_dist.objectives.base import Objective
from meme_dist.ratio import Contrast, LogRatio, untrained
from meme_dist.reweight_command import told
from meme_dist.reweighted import Langevin, Resample, Reweighted, normalised, posterior_draws
from meme_dist.stored import Stored, load
from meme_dist.stored_ratio import fit_stored, load_ratio
from meme_dist.tables import tables
from meme_dist.train import checkpoint as checkpoints
from tests.test_cli import FIELDS, rows
from tests.test_reweighted import shaken
from tests.trainings import SHARDED, build, shards

TINY = ["--samples", "2", "--pseudo-inputs", "4", "--latent-dim", "3", "--batch-size", "8", "--steps", "4"]
CONTRAST = Contrast(width=16, depth=1, steps=40, batch_size=64, held_out=0.0)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with labelled shards, and a run of `auto` on them."""
    folder = tmp_path_factory.mktemp("home")
    write_shards(Dataset("scans", FIELDS, rows, ("dark", "bright")), folder / "shards", rows_per_shard=8)
    with contextlib.chdir(folder):
        assert main(["train", "auto", "--shards", str(folder / "shards"), *TINY, "--run", "first", "--no-evaluate"]) == 0
    return folder


@pytest.fixture(autouse=True)
def few_draws_for_z(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_ratio, "normalised", partial(normalised, budget=5000))


@pytest.fixture
def stored(home: Path) -> Stored:
    return load(home / "runs/first", device=torch.device("cpu"))


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 rows in three modalities, 30 % of the entries missing."""
    return shards(tmp_path_factory.mktemp("linear") / "shards")


def reweighted(objective: Objective, *, shift: bool = True) -> Reweighted:
    ratio = untrained(objective.latent_dim, Contrast(width=8, depth=1)) if shift else LogRatio()
    shaken(ratio)
    return Reweighted(objective, ratio, 0.1 if shift else 0.0, Resample(20))


# ---- latents ----------------------------------------------------------------------------------------------------------------------------


def test_latents_are_draws_of_what_each_row_observes_whatever_is_missing(linear: Path) -> None:
    objective = build(SHARDED)
    (batch,) = Evaluation(linear, "train", batch_size=128, seed=5)
    table = posterior_draws(objective, [batch], rows=96, draws=2)
    assert table.shape == (2, 96, 2) and not bool(batch.observed.all(1)[:96].all())
    with evaluating(objective):
        expected = objective.infer(batch).sample(Noise(5, batch.draw), "ratio/latents", 2)[:, :96]
    assert torch.equal(table, expected)


def test_ranks_fill_in_one_table(linear: Path) -> None:
    objective = build(SHARDED)
    whole = posterior_draws(objective, Evaluation(linear, "train", batch_size=32, seed=1), rows=90, draws=3)
    parts: list[torch.Tensor] = []
    for rank in range(2):
        batches = Evaluation(linear, "train", batch_size=32, seed=1, rank=rank, world=2)
        posterior_draws(objective, batches, rows=90, draws=3, reduce=lambda table: parts.append(table.clone()) or table)
    assert whole.shape == (3, 90, 2)
    torch.testing.assert_close(sum(parts)[:, :-1].unflatten(-1, (3, -1)).transpose(0, 1), whole)  # type: ignore[index]


def test_latents_that_are_not_finite_are_refused(linear: Path) -> None:
    objective = build(SHARDED)
    with torch.no_grad():
        next(objective.modality("x0").encoder.parameters()).fill_(math.nan)
    with pytest.raises(ValueError, match="latents: those of .* of 40 rows are not finite"):
        posterior_draws(objective, Evaluation(linear, "train", batch_size=32), rows=40)


# ---- the objective ----------------------------------------------------------------------------------------------------------------------


def test_a_reweighted_objective_differs_in_its_prior_alone(linear: Path) -> None:
    objective = build(SHARDED).eval()
    asked = reweighted(objective)
    (batch,) = Evaluation(linear, "train", batch_size=128)
    assert torch.equal(asked(batch).total, objective(batch).total)
    assert torch.equal(asked.infer(batch).mean, objective.infer(batch).mean)
    z = torch.randn(2, 3, 2)
    ratio = asked.log_ratio(z.flatten(0, 1)).view(2, 3)
    torch.testing.assert_close(asked.prior().log_prob(z), objective.prior().log_prob(z) + ratio - 0.1)


def test_a_prior_can_be_reweighted_wherever_one_is_asked_for(linear: Path) -> None:
    """Generation, likelihood and coherence: with a ratio of 1 the likelihood is the model's own, with another it is not."""
    objective = build(SHARDED).eval()
    batches = list(Evaluation(linear, "test", batch_size=32))
    metric = log_likelihood(queries(SHARDED), samples=(4,), rows=8)
    own, same, other = (
        evaluate(asked, batches, [metric]) for asked in (objective, reweighted(objective, shift=False), reweighted(objective))
    )
    key = next(name for name in own if "|" not in name and not name.endswith("/square"))
    torch.testing.assert_close(same[key].total, own[key].total)
    assert (other[key].total - own[key].total).abs() > 1e-3
    made = joint_generations(reweighted(objective), 70, seed=3)
    part = joint_generations(reweighted(objective), 3, seed=3, first=66)
    assert all(torch.equal(x[66:69], part[name]) and x.isfinite().all() for name, x in made.items())
    judges = {name: lambda x: (x.sum(-1) > 0).long() for name in SHARDED}
    with evaluating(objective):
        assert joint_coherence(reweighted(objective), judges, num=30)["joint_coherence/all"].count == 30


# ---- on the disk ------------------------------------------------------------------------------------------------------------------------


def test_what_was_saved_is_what_is_loaded(stored: Stored) -> None:
    about = fit_stored(stored, "last", CONTRAST, Resample(50, clip=30.0), rows=100, draws=8)
    again = load_ratio(stored, "last")
    place = stored.folder / "ratio/last"
    assert sorted(path.name for path in place.iterdir()) == ["ratio.safetensors", "state.json"]
    assert again.sampler == Resample(50, 30.0) and again.log_z == about["normaliser"]["log_z"]
    assert json.loads((place / "state.json").read_text())["gain"] == about["gain"]
    tensors = load_file(place / "ratio.safetensors")
    assert all(torch.equal(value, tensors[name]) for name, value in again.log_ratio.state_dict().items())
    assert fit_stored(stored, "last", CONTRAST, Resample(50, clip=30.0), rows=100, draws=8) == about  # the same again, in its place
    z, noise = torch.randn(1, 5, 3), Noise(0, torch.arange(5))
    assert torch.equal(load_ratio(stored, "last").prior().log_prob(z), again.prior().log_prob(z))
    assert torch.equal(load_ratio(stored, "last").prior().sample(noise, "x", 1), again.prior().sample(noise, "x", 1))
    assert load_ratio(stored, "last", langevin=True).sampler == Langevin(proposals=50)  # chains start at draws as good as those of the run
    assert again.pooled == about["normaliser"]["pooled"]
    assert not any(parameter.requires_grad for parameter in again.log_ratio.parameters())


def test_a_ratio_of_other_weights_is_refused_and_so_is_one_that_was_altered(stored: Stored) -> None:
    fit_stored(stored, "last", CONTRAST, Resample(50), rows=100, draws=8)
    with torch.no_grad():
        next(stored.objective.parameters()).add_(1e-6)
    with pytest.raises(ValueError, match=re.escape(f"meme-dist reweight {stored.folder} --checkpoint last")):
        load_ratio(stored, "last")
    with pytest.raises(ValueError, match="no ratio for that checkpoint; fit one"):
        load_ratio(stored, "best")
    fit_stored(stored, "last", CONTRAST, Resample(50), rows=100, draws=8)
    file = stored.folder / "ratio/last/ratio.safetensors"
    save_file({name: value + 1 for name, value in load_file(file).items()}, file)
    with pytest.raises(ValueError, match="altered"):
        load_ratio(stored, "last")


def test_a_ratio_whose_normaliser_came_without_an_error_is_to_be_fitted_again(stored: Stored) -> None:
    fit_stored(stored, "last", CONTRAST, Resample(50), rows=100, draws=8)
    place = stored.folder / "ratio/last"
    found = checkpoints.read(place, only=[stored_ratio.STEM])
    del found.state["normaliser"]["pooled"]
    checkpoints.write(place, found)
    with pytest.raises(ValueError, match="fitted by an earlier version, whose log Z came without its error; again: meme-dist reweight"):
        load_ratio(stored, "last")


@pytest.mark.parametrize("pooled", [7.0, 7000.0])
def test_a_log_z_of_few_effective_draws_is_told_with_the_gain_and_with_likelihoods(
    home: Path, pooled: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    normaliser = {"log_z": 1.0, "error": 0.2, "pooled": pooled, "spread": 1.0, "effective": 20.0, "proposals": 1000}
    said = told("first", "last", {"gain": {"value": 2.0, "error": 0.2}, "normaliser": normaliser})
    asked: list[dict] = []
    found = SimpleNamespace(objective=Reweighted(build(SHARDED), LogRatio(), 1.0, Resample(), pooled=pooled))
    monkeypatch.setattr(assess, "assess_stored", lambda *_, how, **__: asked.append(how))
    monkeypatch.setattr(run_commands, "find", lambda *_, **__: found)
    monkeypatch.setattr(run_commands, "_with_prior", lambda stored, *_: stored)
    monkeypatch.setattr(stores, "on_split", lambda stored, *_: stored)
    assert main(["evaluate", "first", "--prior", "reweighted"]) == 0
    entries = {"log_likelihood": [{"targets": ["a"], "given": [], "samples": 1, "value": 1.0, "low": 0.0, "high": 2.0, "count": 9}]}
    for text in (said, str(asked), tables(entries | asked[0])):
        assert ("upper guesses: log Z rests on 7 effective draws" in text) == (pooled == 7)


def test_the_command_line_reweights_generates_and_evaluates(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Stored] = []
    monkeypatch.setattr(assess, "assess_stored", lambda stored, *_, **__: asked.append(stored))
    monkeypatch.chdir(home)
    for bad in (["--clip", "0"], ["--clip", "nan"], ["--rows", "-1"], ["--draws", "0"]):
        assert main(["reweight", "first", *bad]) == 2
        assert f"{bad[0].strip('-')}" in capsys.readouterr().err
    assert main(["reweight", "first", "--bound", "4", "--steps", "20", "--proposals", "40", "--draws", "8"]) == 0
    said = capsys.readouterr().out
    assert "of 40 proposals" in said and "nats" in said and "evaluate first --prior reweighted" in said
    for prior in ("own", "reweighted", "reweighted_langevin"):
        assert main(["generate", "first", "--num", "5", "--prior", prior, "--out", prior]) == 0
        assert main(["evaluate", "first", "--prior", prior]) == 0
    own, *drawn = (load_file(home / name / "draws.safetensors") for name in ("own", "reweighted", "reweighted_langevin"))
    assert all(not torch.equal(own[name], others[name]) for others in drawn for name in own)
    runs = Path("runs/first")
    assert [stored.folder for stored in asked] == [runs, runs / "reweighted", runs / "reweighted-langevin"]
    assert (runs / "reweighted/run.json").read_bytes() == (runs / "run.json").read_bytes()
    assert [isinstance(stored.objective, Reweighted) for stored in asked] == [False, True, True]
    capsys.readouterr()
    assert main(["evaluate", "first", "--prior", "reweighted", "--pool", "mixture"]) == 2
    assert "--pool or --prior" in capsys.readouterr().err
