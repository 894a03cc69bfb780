"""How a training begins and ends: mistakes come before the first step and leave nothing, rare modalities train, Ctrl-C saves."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from meme_dist import run
from meme_dist.cli import main
from meme_dist.data.fields import Field
from meme_dist.data.first import first_batch
from meme_dist.data.index import Manifest
from meme_dist.data.shards import Dataset, Row, write_shards
from meme_dist.data.stream import Stream
from meme_dist.priors import PseudoInputs
from meme_dist.recipes.auto import auto
from meme_dist.recipes.base import Model
from meme_dist.train import checkpoint, startup
from meme_dist.train.signals import SAVED
from meme_dist.train.training import Training
from meme_dist.types import Batch

TINY = ["--samples", "2", "--pseudo-inputs", "4", "--latent-dim", "2", "--batch-size", "8", "--log-every", "1", "--steps", "4"]
FIELDS = {name: Field(kind="vector", shape=(size,), codec="npy", likelihood="normal") for name, size in (("a", 3), ("b", 2))}


def rows(split: str, number: int = 24, rare: tuple[int, ...] | None = None) -> Iterator[Row]:
    """Vectors; modality b in all rows, or in those of `rare` alone."""
    generator = torch.Generator().manual_seed(len(split))
    for row in range(number):
        data = {name: torch.randn(field.shape, generator=generator) for name, field in FIELDS.items()}
        yield Row(data if rare is None or row in rare else {"a": data["a"]})


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_shards(Dataset("few", FIELDS, rows), tmp_path / "shards")
    return tmp_path


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join("".join(capsys.readouterr()).split())


# ---- splits -----------------------------------------------------------------------------------------------------------------------


def test_without_rows_to_watch_a_run_trains_and_says_so_and_is_refused_before_it_begins_if_it_should_be_measured(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(Dataset("few", FIELDS, rows, splits=("train",)), home / "alone")
    words = ["train", "auto", "--shards", "alone", *TINY, "--evaluate-every", "2", "--run", "r"]
    assert main(words) == 2
    assert "expected a split 'test' to measure on at the end, got only train" in said(capsys) and not Path("runs/r").exists()
    assert main([*words, "--no-evaluate"]) == 0
    assert said(capsys).count("no validation or test rows, so no held-out loss and no best step") == 1
    assert checkpoint.read_state(Path("runs/r/checkpoints/last"))["step"] == 4
    assert [line for line in Path("runs/r/metrics.jsonl").read_text().splitlines() if "held_out" in line] == []
    assert main(["train", "--resume", "r", "--no-evaluate"]) == 0


@pytest.mark.parametrize("watched", [[], ["--no-evaluate"]])
def test_a_missing_shard_of_the_test_rows_is_named_before_a_step_is_made(
    home: Path, capsys: pytest.CaptureFixture[str], watched: list[str]
) -> None:
    (home / "shards" / "test-000000.tar").unlink()
    assert main(["train", "auto", "--shards", "shards", *TINY, "--run", "r", *watched]) == 2
    shown = said(capsys)
    assert "test-000000.tar" in shown and "missing" in shown and "step 1/4" not in shown and not Path("runs/r").exists()


# ---- mistakes ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [["--batch-size", "30", "--accumulate", "4"], ["--combination", "product", "--posterior", "laplace"]])
def test_a_start_that_fails_leaves_no_folder_and_the_corrected_command_takes_the_name(home: Path, wrong: list[str]) -> None:
    words = ["train", "auto", "--shards", "shards", *TINY, "--run", "r", "--no-evaluate"]
    assert main([*words, *wrong]) == 2
    assert not Path("runs/r").exists()
    assert main(words) == 0


@pytest.mark.parametrize("processes", [0, -2])
def test_a_dry_run_on_less_than_one_process_is_refused(home: Path, capsys: pytest.CaptureFixture[str], processes: int) -> None:
    assert main(["train", "auto", "--shards", "shards", *TINY, "--dry-run", str(processes)]) == 2
    assert f"--dry-run: expected 1 process or more, got {processes}" in said(capsys)


OWN = """
from meme_dist.data.fields import Field
from meme_dist.data.shards import Dataset
from meme_dist.recipes.base import Recipe
from meme_dist.train.training import Training

FIELDS = {name: Field(kind="vector", shape=(2,), codec="npy", likelihood="normal") for name in ("a", "b")}


def nothing():
    "Nothing."


def dicts():
    "Rows that are none."
    return Recipe(lambda manifest: None, Training(), Dataset("mine", FIELDS, lambda split: iter([{"a": 1}])))
"""


def test_a_recipe_that_returns_none_and_rows_that_are_no_rows_are_told_in_words(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "own.py").write_text(OWN)
    assert main(["train", "own.py:nothing", "--run", "r"]) == 2
    assert "own.py:nothing: expected the function to return a Recipe (meme_dist.recipes.base), got None" in said(capsys)
    assert main(["shards", "write", "own.py:dicts", "--out", "mine"]) == 2
    assert "mine: split 'train', row 0: expected a Row({modality: datum}, label)" in said(capsys)
    assert main(["train", "own.py:dicts", "--run", "r"]) == 2 and not Path("runs/r").exists()


def test_where_nothing_can_be_written_the_place_that_was_asked_for_is_named(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "file").write_text("")
    words = ["train", "auto", "--shards", "shards", *TINY, "--no-evaluate", "--run"]
    assert main([*words, "file/r"]) == 2
    assert "cannot write file/r; choose another place" in said(capsys)
    assert main([*words, "r"]) == 0
    for command in (["export", "r", "--out", "gone/w.safetensors"], ["generate", "r", "--num", "2", "--out", "file/drawn"]):
        capsys.readouterr()
        assert main(command) == 2
        shown = said(capsys)
        assert f"cannot write {command[-1]}; choose another place" in shown and "writing-" not in shown and "partial" not in shown


# ---- what changes nothing ---------------------------------------------------------------------------------------------------------


def test_settings_that_change_nothing_are_told_once_before_the_first_step_of_a_training_alone(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "auto", "--shards", "shards", *TINY, "--no-evaluate", "--run"]
    assert main([*words, "r", "--objective", "mopoe", "--targets", "1", "--cross-weight", "3", "--samples", "1"]) == 0
    told = "MoPoE has no use for --cross-weight 3.0 --pseudo-inputs 4 --samples 1 --targets 1 here, and trains the same without"
    before, once, after = said(capsys).partition(told)
    assert once and "step 1/4" in after and "step 1/4" not in before and "has no use" not in before + after
    assert main(["generate", "r", "--num", "2", "--out", "drawn"]) == 0 and "has no use" not in said(capsys)
    assert main([*words, "s", "--anneal", "100000"]) == 0
    assert "MEME has no use for --anneal 100000 here, and trains" in said(capsys)
    assert main([*words, "t"]) == 0 and "has no use" not in said(capsys)


@pytest.mark.parametrize("rank", [0, 1])
def test_of_several_processes_the_first_tells_what_changes_nothing(home: Path, capsys: pytest.CaptureFixture[str], rank: int) -> None:
    asked = {"shards": "shards", "model": Model(latent_dim=2, balance=True, objective="mvae", cross_weight=1.0)}
    prepared = run.prepare("auto", asked, run.Where(run="r"), run.Ranks(rank, rank, 2), console=Console())
    run.initial_objective(prepared.recipe, prepared.manifest)
    assert said(capsys).count("MVAE has no use for --cross-weight 1.0 here") == (rank == 0)


# ---- a modality that few rows hold --------------------------------------------------------------------------------------------------


def test_a_modality_in_a_few_of_many_rows_trains_with_every_seed_and_its_pseudo_inputs_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "INITIAL_ROWS", 16)
    for rare in ((3, 50, 77, 120), (77,)):
        folder = tmp_path / str(len(rare))
        manifest = write_shards(Dataset("rare", FIELDS, lambda split, rare=rare: rows(split, 160, rare)), folder, rows_per_shard=40)
        model = Model(latent_dim=2, pseudo_inputs=8)
        for seed in range(4):
            recipe = auto(shards=str(folder), model=model, training=Training(steps=1, batch_size=8, seed=seed))
            inputs: Any = run.initial_objective(recipe, manifest).pseudo
            assert len(inputs["b"].inputs.unique(dim=0)) == len(inputs["a"].inputs.unique(dim=0)) == 8


def present(batch: Batch, name: str) -> torch.Tensor:
    packed = batch.modalities[name]
    return packed.data[packed.row < len(batch.observed)]


def test_rows_that_hold_every_modality_are_the_first_rows_of_the_stream_and_others_stand_behind_them(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    manifest = write_shards(Dataset("rare", FIELDS, lambda split: rows(split, 160, (3, 50, 77, 120))), folder)
    for size in (160, 16):
        (expected,) = next(iter(Stream(folder, "train", batch_size=size, seed=2)))
        came = first_batch(manifest, "train", rows=size, seed=2)
        for name in FIELDS if size == 160 else "a":
            assert torch.equal(present(came, name), present(expected, name))
        assert came.observed.sum(0).tolist() == [size, 4] and len(came.observed) == (160 if size == 160 else 20)


def test_a_modality_that_no_row_holds_is_named(tmp_path: Path) -> None:
    manifest = write_shards(Dataset("rare", FIELDS, lambda split: rows(split, 20, ())), tmp_path / "s")
    with pytest.raises(ValueError, match="^b: no training row holds it"):
        run.initial_objective(auto(shards=str(manifest.folder), model=Model(latent_dim=2, pseudo_inputs=8)), manifest)


@pytest.mark.parametrize("row", [torch.zeros(3), torch.tensor([1.0, -2.0, 0.0])])
def test_pseudo_inputs_made_of_one_row_differ_and_lie_about_it(row: torch.Tensor) -> None:
    pseudo = PseudoInputs(6, (3,))
    pseudo.initialise(row[None], torch.Generator().manual_seed(0))
    assert len(pseudo.inputs.unique(dim=0)) == 6 and torch.equal(pseudo.inputs[0].detach(), row)
    assert (pseudo.inputs - row).abs().max() < 0.5


# ---- Ctrl-C -----------------------------------------------------------------------------------------------------------------------


def test_ctrl_c_saves_the_step_under_way_and_ends_with_75_and_the_resumed_run_goes_on_from_it(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = run.shown

    def interrupted(reports: Any, **how: Any) -> Iterator[Any]:
        for report in shown(reports, **how):
            if report.step == 2:
                os.kill(os.getpid(), signal.SIGINT)
            yield report

    words = ["train", "auto", "--shards", "shards", *TINY, "--no-evaluate", "--run"]
    with monkeypatch.context() as patch:
        patch.setattr(run, "shown", interrupted)
        assert main([*words, "r"]) == SAVED
    assert checkpoint.read_state(Path("runs/r/checkpoints/last"))["step"] == 3
    assert main(["train", "--resume", "r", "--no-evaluate"]) == 0 and main([*words, "whole"]) == 0
    steps = [[json.loads(line)["step"] for line in Path(f"runs/{name}/metrics.jsonl").read_text().splitlines()] for name in ("r", "whole")]
    assert steps[0] == steps[1]
    one, two = (checkpoint.read(Path(f"runs/{name}/checkpoints/last")).tensors["model"] for name in ("r", "whole"))
    assert all(torch.equal(x, two[name]) for name, x in one.items())


def test_a_manifest_is_the_same_from_what_a_run_keeps_of_it(home: Path) -> None:
    write_shards(Dataset("few", FIELDS, lambda split: rows(split, 5)), home / "more")
    for folder in ("shards", f"{home}/{{shards,more}}"):
        manifest = Manifest.load(folder)
        again = Manifest.of(manifest.address, json.loads(json.dumps(manifest.described())))
        assert again.fingerprint == manifest.fingerprint and list(again.fields.items()) == list(manifest.fields.items())


@pytest.mark.parametrize(
    ("gpu", "ranks", "said", "expected"), [(False, 1, None, 0), (True, 1, None, 4), (True, 4, None, 1), (True, 8, 3, 3), (True, 8, None, 0)]
)
def test_a_gpu_is_fed_by_up_to_four_processes_as_the_cores_allow(
    gpu: bool, ranks: int, said: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(startup.shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 31))
    asked = Training(workers=said), {"LOCAL_WORLD_SIZE": str(ranks)}
    assert startup.loaders(*asked) == expected
    assert startup.loaders(asked[0], asked[1] | {"MEME_DIST_JOBS": "8"}) == (said or 0)
    monkeypatch.setattr(startup.shutil, "disk_usage", lambda _: SimpleNamespace(free=64 << 20))  # a container's
    assert startup.loaders(*asked) == (said or 0)
