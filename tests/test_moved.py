"""A trained run whose shards have moved: what needs no rows works, what reads them is told where they are, and others are refused."""

import json
import shutil
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from meme_dist.cli import main
from meme_dist.data.fields import Field
from meme_dist.data.shards import Dataset, Row, write_shards
from meme_dist.data.stream import Evaluation
from meme_dist.stored import Stored

TINY = ["--samples", "2", "--pseudo-inputs", "4", "--latent-dim", "2", "--batch-size", "8", "--schedule", "constant", "--steps", "2"]
FIELDS = {name: Field(kind="vector", shape=(size,), codec="npy", likelihood="normal") for name, size in (("a", 3), ("b", 2))}


def rows(split: str, seed: int = 0) -> Iterator[Row]:
    generator = torch.Generator().manual_seed(len(split) + seed)
    for _ in range(24):
        yield Row({name: torch.randn(field.shape, generator=generator) for name, field in FIELDS.items()})


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join("".join(capsys.readouterr()).split())


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> deque[float]:
    """What evaluations found: here the loss of the test rows is enough, read from the shards as every measurement is."""
    found: deque[float] = deque()

    def assess(stored: Stored, *_: object, **__: object) -> None:
        rows = Evaluation(stored.manifest.folder, "test", batch_size=24)
        found.append(float(stored.objective(next(iter(rows))).total.detach()))

    monkeypatch.setattr("meme_dist.assess.assess_stored", assess)
    return found


@pytest.fixture
def moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose shards were in `old` and are in `new`."""
    monkeypatch.chdir(tmp_path)
    write_shards(Dataset("few", FIELDS, rows), tmp_path / "old")
    write_shards(Dataset("few", FIELDS, lambda split: rows(split, 9)), tmp_path / "other")
    assert main(["train", "auto", "--shards", "old", *TINY, "--run", "r", "--no-evaluate"]) == 0
    assert main(["generate", "r", "--num", "3", "--out", "before"]) == 0
    (tmp_path / "old").rename("new")
    return tmp_path


def test_generate_needs_no_shards_and_evaluate_finds_them_where_it_is_told_once(
    moved: Path, measured: deque[float], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree("new", "old")
    assert main(["evaluate", "r"]) == 0
    shutil.rmtree("old")

    assert main(["generate", "r", "--num", "3", "--out", "after"]) == 0
    before, after = load_file("before/draws.safetensors"), load_file("after/draws.safetensors")
    assert all(torch.equal(x, after[name]) for name, x in before.items())
    capsys.readouterr()
    assert main(["evaluate", "r"]) == 2
    assert "If the shards have moved, say once where they are: meme-dist evaluate runs/r --shards FOLDER" in said(capsys)
    assert main(["evaluate", "r", "--shards", "other"]) == 2
    assert "error: other: expected the shards that runs/r was trained on" in said(capsys) and len(measured) == 1
    assert main(["evaluate", "r", "--shards", "new"]) == 0 and main(["evaluate", "r"]) == 0
    assert len(measured) == 3 and len(set(measured)) == 1


def test_a_run_resumed_with_its_shards_elsewhere_knows_where_they_are(
    moved: Path, measured: deque[float], capsys: pytest.CaptureFixture[str]
) -> None:
    before = Path("runs/r/run.json").read_bytes()
    assert main(["train", "--resume", "r", "--shards", "other", "--steps", "3", "--no-evaluate"]) == 2
    assert "shards" in said(capsys) and Path("runs/r/run.json").read_bytes() == before
    Path("runs/r/shards.json").unlink()  # a run from before it was kept
    assert main(["train", "--resume", "r", "--shards", "new", "--steps", "3", "--no-evaluate"]) == 0
    record = json.loads(Path("runs/r/run.json").read_text())
    assert record["shards"] == record["keywords"]["shards"] == str(moved / "new")
    assert {**record, "shards": 0, "keywords": 0} == {**json.loads(before), "shards": 0, "keywords": 0}
    assert Path("runs/r/shards.json").is_file()
    assert main(["evaluate", "r"]) == 0
