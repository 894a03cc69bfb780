"""`python -m benchmarks stream` measures what it says: every reader makes the same rows of the same bytes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import record, stream
from meme_dist.data.index import Manifest
from meme_dist.data.shards import write_shards
from meme_dist.data.stream import Evaluation

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves shards to the garbage collector


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return write_shards(stream._small(32), tmp_path / "set", splits=["train"], rows_per_shard=12)


def test_webdataset_and_the_files_hold_the_rows_that_the_stream_holds(manifest: Manifest, tmp_path: Path) -> None:
    [batch] = Evaluation(manifest.folder, "train", batch_size=32)
    members = stream.Reader(manifest, "train").read(np.arange(32))
    columns = {name: [bytes(row[column] or b"") for row in members] for column, name in enumerate(manifest.fields)}
    files = stream._write_files(manifest, columns, tmp_path / "files")
    samples = list(stream._webdataset(manifest))
    assert len(samples) == len(files) == 32
    for name in manifest.fields:
        whole = batch.dense(name)
        assert torch.equal(torch.stack([sample[name] for sample in samples]), whole)
        assert torch.equal(torch.stack([files[row][name] for row in range(32)]), whole)


def test_rows_a_second_and_shares_of_the_bound_follow_from_the_times() -> None:
    taken = {(part, 0): [stream.Taken(wall, wall)] * 3 for part, wall in zip(stream.PARTS, (1.0, 3.0, 7.0, 2.0), strict=True)}
    taken["stream", 1] = [stream.Taken(5.0, 4.0), stream.Taken(4.0, 8.0), stream.Taken(6.0, 8.0)]
    rows = {(row["reader"], row["workers"]): row for row in stream._rows("small", 1000, 10, taken)}
    assert [rows[name, 0]["rows_per_s"] for name in ("raw read", "bound", "bound, one by one", "bound with crc-32")] == [
        1000,
        250,
        125,
        200,
    ]
    own = rows["stream", 1]
    assert (own["rows_per_s"], own["of_bound"], own["of_bound_cpu"], own["cpu_us"]) == (200, 0.8, 0.5, 8000.0)
    assert own["rows_per_s_p20"] < 200 < own["rows_per_s_p80"]


def test_it_runs_and_keeps_a_row_for_every_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    stream.main(rows=32, pictures=16, batch_size=16, workers=0, repeats=1)
    rows = [json.loads(line) for line in (tmp_path / "stream.jsonl").read_text().splitlines()]
    readers = ["raw read", "bound", "bound, one by one", "bound with crc-32", "stream", "webdataset", "loader over files"]
    assert [(row["set"], row["reader"]) for row in rows] == [(name, reader) for name in ("small", "png", "raw") for reader in readers]
    assert all(row["rows_per_s"] > 0 and "device" in row for row in rows) and "rows/s" in capsys.readouterr().out
    with pytest.raises(ValueError, match="expected multiples of batch_size 16, got 33 and 16"):
        stream.main(rows=33, pictures=16, batch_size=16, save=False)
