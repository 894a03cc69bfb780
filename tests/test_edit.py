"""Editing attributes of a trained run: what a word asks for, what stays, and that nothing is overwritten."""

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from meme_dist import edit as edits
from meme_dist import run as runs
from meme_dist import stored as stores
from meme_dist.cli import main
from meme_dist.data.fields import SPECIAL, Field
from meme_dist.data.index import Manifest
from meme_dist.distributions import DiagNormal
from meme_dist.edit import Given, edit, given, save_edits, wanted
from meme_dist.likelihoods import Normal
from meme_dist.metrics.generation import joint_generations
from meme_dist.modalities.attribute import Attribute
from meme_dist.modality import Modality
from meme_dist.objectives.csvae import CSVAE
from meme_dist.objectives.meme import MEME
from meme_dist.recipes.linear_gaussian import linear
from meme_dist.stored import Stored
from meme_dist.types import Batch, pack

FIELDS = {
    "x": Field(kind="vector", shape=(3,), codec="npy", likelihood="normal"),
    "on": Field(kind="vector", shape=(1,), codec="npy", likelihood="bernoulli"),
    "shade": Field(kind="text", shape=(1,), codec="txt", likelihood="categorical", vocabulary=(*SPECIAL, "dark", "light", "grey")),
}


def stored(folder: Path) -> Stored:
    """A model whose decoder shows its latents: z, the flag's block, the word's."""
    torch.manual_seed(0)
    decoder = nn.Linear(3, 3)
    decoder.weight.data, decoder.bias.data = torch.eye(3), torch.zeros(3)
    x = Modality(encoder=nn.Linear(3, 6), decoder=decoder, likelihood=Normal(), latent_dim=3, feature=(3,))
    attributes = {
        "on": Attribute(start=1, size=1, latent_dim=3),
        "shade": Attribute(start=2, size=1, latent_dim=3, values=3, kind="word"),
    }
    manifest = Manifest(folder, "shown", FIELDS, (), {}, 8, {})
    return Stored(CSVAE({"x": x, **attributes}), None, manifest, folder, 1)  # type: ignore[arg-type]


def batch(rows: int = 6) -> Batch:
    data = {"x": torch.randn(rows, 3), "on": torch.zeros(rows, 1), "shade": torch.full((rows, 1), 3)}
    return pack(data, torch.ones(rows, 3).bool().numpy())


def test_words_name_an_attribute_and_one_of_its_values(tmp_path: Path) -> None:
    run = stored(tmp_path)
    assert wanted(run, ["on=1", "shade=light"]) == {"on": 1, "shade": 1}
    for words, says in [
        (["on"], "expected ATTRIBUTE=VALUE, for example --set on=1"),
        (["shad=dark"], "no attribute 'shad'; did you mean 'shade'"),
        (["x=1"], r"no attribute 'x' \(there are on, shade\)"),
        (["on=2"], r"on has no value '2' \(there are 0, 1\)"),
        (["shade=lihgt"], "shade has no value 'lihgt'; did you mean 'light'"),
        (["on=1", "on=0"], "on is set twice"),
        ([], "expected ATTRIBUTE=VALUE once or more, got none; for example --set on=1"),
    ]:
        with pytest.raises(ValueError, match=says):
            wanted(run, words)
    lone = run._replace(objective=MEME({name: linear(4, 2, family=DiagNormal) for name in "ab"}, pseudo_inputs=1))
    with pytest.raises(ValueError, match="MEME, has no attributes to set; train one: --objective csvae"):
        wanted(lone, ["on=1"])


@pytest.mark.parametrize("draw", [False, True])
def test_an_edited_row_keeps_everything_but_the_attribute(tmp_path: Path, draw: bool) -> None:
    run, rows = stored(tmp_path), batch()
    assert isinstance(run.objective, CSVAE)
    made = edit(run.objective, rows, {"on": 1}, draw=draw)
    own, edited = made["own"]["x"], made["edited"]["x"]
    assert torch.equal(own[:, [0, 2]], edited[:, [0, 2]]) and not torch.equal(own[:, 1], edited[:, 1])
    mean = run.objective.attribute("on").conditional_prior().mean[1].item()
    assert torch.allclose(edited[:, 1], torch.tensor(mean)) != draw and (edited[:, 1] - mean).abs().max() < 2
    assert set(made["own"]) == {"x"}


def test_new_rows_have_the_attributes_that_were_asked_for_and_the_others_as_they_come(tmp_path: Path) -> None:
    run = stored(tmp_path)
    free, set_ = joint_generations(run.objective, 128), joint_generations(given(run, {"on": 1}).objective, 128)
    assert set_["on"].min() > 0.5 and 0.3 < (free["on"] > 0.5).float().mean() < 0.7
    assert torch.equal(free["x"][:, 0], set_["x"][:, 0])  # z is the same draw
    assert len(set_["shade"].unique()) == 3
    model = given(run, {"on": 0}).objective
    assert isinstance(model, Given)
    rows = batch()
    assert torch.equal(model(rows).total, run.objective(rows).total)
    assert torch.equal(model.infer(rows).mean, run.objective.infer(rows).mean)


def test_edits_are_written_into_a_new_folder_alone(tmp_path: Path) -> None:
    run = stored(tmp_path)
    paths = save_edits(run, batch(), {"on": 1, "shade": 2}, tmp_path / "edited", draw=False)
    assert [path.name for path in paths] == ["edits.png", "edits.safetensors"] and all(path.stat().st_size > 0 for path in paths)
    found = load_file(paths[1])
    assert set(found) == {f"x/{what}" for what in ("own", "edited")} and all(x.shape == (6, 3) for x in found.values())
    with pytest.raises(ValueError, match="exists already, and nothing is overwritten"):
        save_edits(run, batch(), {"on": 1}, tmp_path / "edited", draw=False)
    assert [list(p) for p in itertools.pairwise(found["x/edited"][:2, 1].tolist())] == [[pytest.approx(3.0)] * 2]


def test_the_documented_commands_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, text = stored(tmp_path), (Path(__file__).parents[1] / "docs/attributes.md").read_text()
    monkeypatch.setattr(runs, "run_folder", Path)
    monkeypatch.setattr(stores, "load", lambda folder, **_: run)
    monkeypatch.setattr(edits, "first_rows", lambda stored, rows, *, seed: batch(rows))
    lines = [line.partition("#")[0].split()[1:] for line in text.splitlines() if line.startswith("meme-dist edit")]
    assert len(lines) > 1 and all(main([word.replace("thick", "on") for word in words]) == 0 for words in lines)
    assert len(list(tmp_path.glob("edited-*"))) == len(lines)
    assert main(["edit", "strokes", "--set"]) == 2
