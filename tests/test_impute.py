"""What is filled in: by whom it was made, under which names it stands, what it is on average, and how sure it is."""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from meme_dist.cli import main
from meme_dist.convert import Convert, convert
from meme_dist.data.adapters import new_h5mu
from meme_dist.data.adapters.mudata import from_h5
from meme_dist.data.fields import Field
from meme_dist.data.index import Manifest
from meme_dist.data.names import feature_names, row_names
from meme_dist.data.sets.linear_gaussian import linear_gaussian
from meme_dist.data.shards import Dataset, Row, write_shards
from meme_dist.impute import check_features, impute, impute_h5mu, storable
from meme_dist.likelihoods import Bernoulli, NegativeBinomial, Normal
from meme_dist.metrics import completion
from meme_dist.metrics.completion import predicted
from meme_dist.modalities.vector import mlp
from meme_dist.noise import Noise
from meme_dist.objectives.base import Objective
from meme_dist.objectives.meme import MEME
from meme_dist.pooled import Pooled
from meme_dist.refine import Refining
from meme_dist.types import pack_dense
from tests.data.test_adapters import PROTEIN, RNA, counts, levels, write_h5mu
from tests.test_metrics import TRUTH, linear_data, linear_model
from tests.trainings import SHARDED, build


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("linear") / "shards"
    write_shards(linear_gaussian(rows=30, missing=0.4), folder)
    return folder


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """250 cells of two modalities, of which 50 have both, as shards."""
    folder = tmp_path_factory.mktemp("cells")
    convert(Convert(files=(write_h5mu(folder / "cells.h5mu"),), out=folder / "shards", label="type", rows_per_shard=60))
    return folder / "shards"


def of_cells() -> Objective:
    torch.manual_seed(0)
    rna = mlp((6,), latent_dim=2, hidden=(4,), likelihood=NegativeBinomial((6,)), log_input=True)
    return MEME({"rna": rna, "protein": mlp((3,), latent_dim=2, hidden=(4,), likelihood=Normal())}, pseudo_inputs=3)


def opened(path: Path) -> Any:
    return pytest.importorskip("h5py").File(path, "r")


# ---- whose completions ------------------------------------------------------------------------------------------------------------------


def test_completions_by_other_weights_or_asked_otherwise_are_another_data_set_and_the_same_are_taken_as_they_are(
    linear: Path, tmp_path: Path
) -> None:
    fields, first, out = Manifest.load(linear).fields, build(SHARDED), tmp_path / "out"
    found = impute(first, fields, linear, out)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert impute(build(SHARDED), fields, linear, out) == found
    others = [build(SHARDED, seed=1), Pooled(first, "product"), Refining(first, budget=3), Refining(first, budget=4)]
    for other in others:
        with pytest.raises(ValueError, match="it holds another data set .*source.model.*choose another folder"):
            impute(other, fields, linear, out)
    with pytest.raises(ValueError, match="source.draws: 1 there, 2 wanted"):
        impute(first, fields, linear, out, draws=2)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    impute(others[2], fields, linear, tmp_path / "refined")
    for other in (others[3], Refining(first, budget=3, temper=0.5)):
        with pytest.raises(ValueError, match="source.model"):
            impute(other, fields, linear, tmp_path / "refined")


# ---- under which names ------------------------------------------------------------------------------------------------------------------


def test_imputed_shards_keep_the_names_of_cells_and_features(cells: Path, tmp_path: Path) -> None:
    before = Manifest.load(cells)
    impute(of_cells(), before.fields, cells, tmp_path / "whole")
    after = Manifest.load(tmp_path / "whole")
    assert feature_names(after) == feature_names(before) == {"rna": [f"v{n}" for n in range(6)], "protein": [f"v{n}" for n in range(3)]}
    assert all(row_names(after, split) == row_names(before, split) for split in ("train", "test"))


@pytest.mark.parametrize("interval", [None, 0.9])
def test_a_file_of_cells_gives_every_measured_number_back_under_its_names_and_fills_in_exactly_the_others(
    cells: Path, tmp_path: Path, interval: float | None
) -> None:
    manifest, out = Manifest.load(cells), tmp_path / "whole.h5mu"
    found = impute_h5mu(of_cells(), manifest.fields, cells, out, draws=19, interval=interval)
    assert sum(part.filled for part in found.values()) == 2 * 250 - 300 and [path.name for path in tmp_path.iterdir()] == [out.name]
    with opened(out) as file:
        for name, own, x in (("rna", RNA, counts()), ("protein", PROTEIN, levels().astype(np.float32))):
            group = file[f"mod/{name}"]
            names = group["obs/_index"].asstr()[:].tolist()
            assert sorted(names) == sorted({*RNA, *PROTEIN}) and names == file["obs/_index"].asstr()[:].tolist()
            assert group["var/_index"].asstr()[:].tolist() == [f"v{number}" for number in range(x.shape[1])]
            measured = group["obs/observed"][:]
            assert {cell for cell, there in zip(names, measured, strict=True) if there} == set(own)
            place = [own.index(cell) for cell, there in zip(names, measured, strict=True) if there]
            np.testing.assert_array_equal(group["X"][:][measured], x[place])
            assert (group["X"][:][~measured] != 0).all()  # means of a network, never 0
            assert set(group["layers"]) == (set() if interval is None else {"lower", "upper"})
            if interval is not None:
                lower, upper = group["layers/lower"][:], group["layers/upper"][:]
                np.testing.assert_array_equal(lower[measured], upper[measured])
                assert (lower <= upper).all() and (lower[~measured] < upper[~measured]).mean() > 0.9
        split, codes = (file[f"obs/{column}/codes"][:] for column in ("split", "label"))
        kinds = file["obs/label/categories"].asstr()[:]
    assert np.bincount(split).tolist() == [200, 50]
    wanted = {cell: None if cell not in RNA or cell == "c3" else "B" if int(cell[1:]) % 3 else "A" for cell in names}
    assert {cell: None if code < 0 else kinds[code] for cell, code in zip(names, codes, strict=True)} == wanted
    assert sum(len(row.data) for part in ("train", "test") for row in from_h5(out, label="label").rows(part)) == 500


def test_shards_without_names_become_a_file_of_rows_that_are_called_by_split_and_number(linear: Path, tmp_path: Path) -> None:
    impute_h5mu(build(SHARDED), Manifest.load(linear).fields, linear, tmp_path / "x.h5mu")
    with opened(tmp_path / "x.h5mu") as file:
        assert file["obs/_index"].asstr()[29:31].tolist() == ["train-00000029", "test-00000000"]
        assert file["mod/x1/var/_index"].asstr()[:].tolist() == ["x1_0", "x1_1", "x1_2", "x1_3"]
        about = json.loads(file["uns/meme_dist"].asstr()[()])
    assert about["imputed"] == str(linear) and about["draws"] == 1 and len(about["model"]["weights"]) == 64


def test_a_file_that_cannot_be_finished_is_not_there_and_one_that_is_there_stays(
    linear: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    what, out = (build(SHARDED), Manifest.load(linear).fields, linear), tmp_path / "x.h5mu"
    with monkeypatch.context() as patch:
        patch.setattr(new_h5mu, "put", full)
        with pytest.raises(OSError, match="No space left"):
            impute_h5mu(*what, out)
    assert list(tmp_path.iterdir()) == []
    out.write_text("mine")
    with pytest.raises(ValueError, match="exists already, and nothing is overwritten"):
        impute_h5mu(*what, out)
    assert out.read_text() == "mine"
    with pytest.raises(ValueError, match="expected the name of a .h5mu file"):
        impute_h5mu(*what, tmp_path / "x.h5ad")
    with pytest.raises(ValueError, match="interval of 20 draws ends between two"):
        impute_h5mu(*what, tmp_path / "y.h5mu", draws=20, interval=0.95)


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
@pytest.mark.parametrize("kind", ["file", "dangling link"])
def test_a_file_that_appears_during_the_work_is_kept_and_the_finished_one_lies_where_the_error_says(
    linear: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool, kind: str
) -> None:
    def refused(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    what, out, put = (build(SHARDED), Manifest.load(linear).fields, linear), tmp_path / "x.h5mu", new_h5mu.put
    synced, sync = [], os.fsync

    def meanwhile(*arguments: Any) -> None:
        put(*arguments)
        if not os.path.lexists(out):
            out.write_text("mine") if kind == "file" else out.symlink_to("nowhere")

    if not links:
        monkeypatch.setattr(os, "link", refused)
    impute_h5mu(*what, tmp_path / "whole.h5mu")
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.readlink(f"/proc/self/fd/{file}")), sync(file)))
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="appeared during the work, .* the finished file is ") as told:
        patch.setattr(new_h5mu, "put", meanwhile)
        impute_h5mu(*what, out)
    assert out.read_text() == "mine" if kind == "file" else out.readlink() == Path("nowhere")
    kept = Path(str(told.value).split("the finished file is ")[1])
    assert kept.read_bytes() == (tmp_path / "whole.h5mu").read_bytes()
    assert sorted(tmp_path.iterdir()) == sorted([out, kept, tmp_path / "whole.h5mu"])
    assert Path(synced[0]).name == "whole.h5mu" and synced[-1] == str(tmp_path)  # the file before its name


def test_a_link_to_nothing_is_no_new_name(linear: Path, tmp_path: Path) -> None:
    (tmp_path / "x.h5mu").symlink_to("nowhere.h5mu")
    with pytest.raises(ValueError, match="expected a new name, got a link to nowhere.h5mu, which is not there"):
        impute_h5mu(build(SHARDED), Manifest.load(linear).fields, linear, tmp_path / "x.h5mu")
    assert [path.name for path in tmp_path.iterdir()] == ["x.h5mu"]


def test_images_and_intervals_without_a_density_are_refused_for_files(tmp_path: Path) -> None:
    fields = {"a": Field("vector", (2,), "npy", "bernoulli"), "b": Field("vector", (2,), "npy", "normal")}
    rows = [Row({"a": torch.ones(2), "b": torch.ones(2)})]
    write_shards(Dataset("units", fields, lambda split: iter(rows)), tmp_path / "units")
    objective = MEME({"a": mlp((2,), latent_dim=2, hidden=(2,), likelihood=Bernoulli()), "b": mlp((2,), latent_dim=2)}, pseudo_inputs=1)
    with pytest.raises(ValueError, match="interval: a has a bernoulli likelihood"):
        impute_h5mu(objective, fields, tmp_path / "units", tmp_path / "x.h5mu", draws=39, interval=0.95)


def test_the_command_says_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["impute", "any", "--shards", "cells"]) == 2
    assert "expected --out FOLDER for shards, --h5mu FILE" in " ".join(capsys.readouterr().err.split())
    assert main(["impute", "any", "--shards", "cells", "--out", "x", "--interval", ".95"]) == 2
    assert "give --interval with --h5mu FILE" in " ".join(capsys.readouterr().err.split())


def test_shards_whose_features_are_others_than_those_of_the_training_set_are_refused(cells: Path) -> None:
    trained, rows = Manifest.load(cells), [Row({"rna": torch.ones(6, dtype=torch.int32), "protein": torch.ones(3)})]
    for name, features in {"unnamed": {}, "swapped": {"rna": ["v1", "v0", "v2", "v3", "v4", "v5"]}}.items():
        write_shards(Dataset("other", trained.fields, lambda split: iter(rows), features=features), cells.parent / name)
    unnamed, swapped = (Manifest.load(cells.parent / name) for name in ("unnamed", "swapped"))
    for pair in ((trained, trained), (unnamed, trained), (trained, unnamed)):
        check_features(*pair)
    with pytest.raises(ValueError, match="swapped: expected features with the names of the training set, in its order, got others"):
        check_features(swapped, trained)


# ---- what it is on average --------------------------------------------------------------------------------------------------------------


def test_counts_in_shards_are_whole_and_their_mean_is_the_expected_count() -> None:
    field, expected = Field("counts", (5,), "npy", "poisson"), torch.tensor([0.1, 0.3, 0.49, 2.75, 7.0])
    rows = 4000
    whole = storable(field, expected.expand(rows, 5), Noise(0, torch.arange(rows)), "whole")
    assert bool((whole == whole.round()).all()) and bool((whole[:, 4] == 7).all())
    share = expected - expected.floor()
    error = (share * (1 - share) / rows).sqrt()
    assert bool(((whole.mean(0) - expected).abs() <= 4 * error).all())
    cut = storable(field, expected.expand(7, 5), Noise(0, torch.arange(100, 107)), "whole")
    assert torch.equal(cut, whole[100:107])  # a row's numbers are its own


# ---- how sure it is ---------------------------------------------------------------------------------------------------------------------


def test_values_and_intervals_of_an_exact_posterior_are_those_of_the_conditional_density() -> None:
    """x1 | x0 ~ Normal(W m + b, W S W^T + noise^2), m and S the posterior's: by the closed form, and by how often x1 lies within."""
    rows, draws, level = 400, 99, 0.9
    x, observed = linear_data(rows, seed=8)
    observed = {name: there & (name == "x0") for name, there in observed.items()}
    found = predicted(linear_model(), pack_dense(x, observed), draws=draws, interval=level)
    assert set(found) == {"x1", "x2"} and found["x1"].ends is not None
    mean, stddev = TRUTH.posterior({"x0": x["x0"]})
    weight = TRUTH.weight["x1"]
    closed, spread = mean @ weight.T + TRUTH.bias["x1"], (weight * stddev[0]).square().sum(1)
    standard = ((found["x1"].value - closed) / (spread / draws).sqrt()).numpy()
    assert abs(standard).max() < 5.5 and 0.9 < standard.std() < 1.1  # of means of so many draws
    lower, upper = found["x1"].ends
    inside = ((lower <= x["x1"]) & (x["x1"] <= upper)).double().mean(1)
    assert abs(float(inside.mean()) - level) < 4 * float(inside.std()) / math.sqrt(rows)
    deviation = (spread + TRUTH.scale["x1"] ** 2).sqrt()
    for end, tail in ((lower, (1 - level) / 2), (upper, (1 + level) / 2)):  # what lies below an order statistic: i / (K + 1), a Beta's mean
        below = stats.norm.cdf(((end - closed) / deviation).numpy()).mean(1)
        assert abs(below.mean() - tail) < 4 * math.sqrt(tail * (1 - tail) / (draws + 2) / rows)


def test_what_a_row_is_filled_in_with_does_not_depend_on_the_rows_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    x, observed = linear_data(40, missing=0.5, seed=9)
    observed["x0"][:] = True
    whole = predicted(linear_model(), pack_dense(x, observed), draws=19, interval=0.9)["x1"]
    monkeypatch.setattr(completion, "AT_ONCE", 50)
    some = {name: value[:20] for name, value in x.items()}, {name: there[:20] for name, there in observed.items()}
    first = predicted(linear_model(), pack_dense(*some), draws=19, interval=0.9)["x1"]
    assert whole.ends is not None and first.ends is not None and 5 < len(first.value) < 15
    for one, all_ in zip((first.value, *first.ends), (whole.value, *whole.ends), strict=True):
        torch.testing.assert_close(one, all_[: len(one)])
