"""Laws of measuring a run on another split than test, and of measurements that are asked for at the command line."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from meme_dist.cli import main
from meme_dist.data.fields import Field
from meme_dist.data.shards import Dataset, Row, write_shards
from meme_dist.data.validation import with_validation

pytestmark = pytest.mark.repeats

TINY = ["--samples", "2", "--pseudo-inputs", "4", "--latent-dim", "3", "--batch-size", "8", "--steps", "2", "--no-evaluate"]
FIELDS = {name: Field(kind="vector", shape=(size,), codec="npy", likelihood="normal") for name, size in (("a", 3), ("b", 2))}


def rows(split: str) -> Iterator[Row]:
    """Two classes, whose vectors differ in sign."""
    generator = torch.Generator().manual_seed(len(split))
    for number in range(60):
        data = {name: 2.0 * (number % 2) - 1 + torch.randn(field.shape, generator=generator) for name, field in FIELDS.items()}
        yield Row(data, number % 2)


def test_validation_is_measured_beside_the_test_rows_which_nothing_looks_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    manifest = write_shards(with_validation(Dataset("few", FIELDS, rows, ("low", "high")), 0.4, seed=1), Path("shards"))
    for shard in manifest.shards("test"):
        manifest.path(shard).unlink()
    assert main(["train", "auto", "--shards", "shards", *TINY, "--run", "r"]) == 0
    assert main(["evaluate", "r", "--split", "validation", "--correlation", "1", "--information", "8", "--seed", "7"]) == 0
    run = Path("runs/r")
    results = json.loads((run / "on-validation" / "results.json").read_text())
    assert (results["split"], results["step"], results["seed"]) == ("validation", 2, 7)
    assert {entry["count"] for entry in results["classifiers"].values()} == {24}
    assert [entry["components"] for entry in results["correlation"]] == [1] and results["information"][0]["count"] == 8
    assert (run / "on-validation" / "report.md").is_file() and not (run / "results.json").exists()
    capsys.readouterr()
    assert main(["evaluate", "r", "--split", "holdout"]) == 2
    said = " ".join("".join(capsys.readouterr()).split())
    assert "there is no split 'holdout' (it has train, validation, test); recipes hold rows out with --validation .1" in said
    assert not (run / "on-holdout").exists()
