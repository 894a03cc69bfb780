"""The benchmark of faults tells the truth: each fault happens once, where the plan has it, and what is said of it is what was measured."""

import errno
import json
import math
import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import damage, faults
from benchmarks.faults import NAN, Fault, Scene, events, outcome, pending, planned
from meme_dist.data.index import TAR_BLOCK
from meme_dist.data.sets.linear_gaussian import linear_gaussian
from meme_dist.data.shards import check_shards, write_shards
from meme_dist.train import checkpoint
from meme_dist.train.checkpoint import Checkpoint, write

DEATH = Fault("SIGKILL of a rank", 12, 1, faults.DEAD)
LINES = {  # as they were said
    "SIGKILL of a rank": "E1125 elastic/multiprocessing/api.py:1002] failed (exitcode: -9) local_rank: 0 (pid: 7232) of binary: python",
    "full disk": "error: [Errno 28] /tmp/x/run/checkpoints/last: no space left: this checkpoint needs 39,784 bytes",
    "torn checkpoint": "step 120: passed over a damaged checkpoint: /tmp/x/run/checkpoints/last/model-00001-of-00002.safetensors: cut",
    "hanging rank": "rank 1 of 2: no rank has moved for 4 s. Behind: rank 1",
    "SIGTERM to a rank": "supervise: stopped: step 160, status 1, ranks {0: 75, 1: 75}, seconds 13.5",
    "NaN on one rank": "step 14: skipped: step 15: loss per row nan",
}


# ---- plan -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_the_faults_of_a_plan_come_in_their_order_with_steps_between_in_which_to_resume(seed: int) -> None:
    plan = planned(5, seed)
    steps = [fault.step for fault in plan]
    assert (
        all(later - earlier >= 4 for earlier, later in zip(steps, steps[1:], strict=False))
        and 2 < steps[0]
        and steps[-1] < faults.STEPS - 2
    )
    assert [fault.name for fault in plan].count(DEATH.name) == 5 and {*(fault.name for fault in plan), NAN.name} == faults.PROVOKE.keys()
    assert planned(5, seed) == plan != planned(5, seed + 1)


def test_each_fault_knows_the_words_that_tell_of_it_and_no_other() -> None:
    for fault in (*planned(1), NAN):
        assert [name for name, line in LINES.items() if re.search(fault.told, line)] == [
            "SIGKILL of a rank" if "SIGKILL" in fault.name else fault.name
        ]


def test_faults_wait_for_their_turn_and_each_happens_once(tmp_path: Path) -> None:
    plan = planned(2)
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    for fault in plan:
        assert pending(tmp_path) == fault
        faults.note(tmp_path, "start")
        faults.note(tmp_path, "provoked", name=fault.name)
    assert pending(tmp_path) is None and len(events(tmp_path, "provoked")) == len(plan)


# ---- what is made of it -----------------------------------------------------------------------------------------------------------------


def test_an_outcome_counts_from_the_fault_to_the_first_words_of_it() -> None:
    lines = [(9.0, LINES[DEATH.name]), (10.0, "Connection reset by peer"), (10.5, LINES[DEATH.name]), (11.0, LINES[DEATH.name])]
    row = outcome(DEATH, 10.0, lines, {"reached": 11, "step": 10, "same": True}, 17.25)
    assert (row["detected_s"], row["again_s"], row["steps_again"], row["same"]) == (0.5, 7.25, 1, True)
    assert row["message"] == "failed (exitcode: -9) local_rank: 0"
    assert outcome(DEATH, 10.0, lines, {"reached": 11, "step": 12, "same": False}, 17.25)["steps_again"] == 0  # saved on the way out
    torn = Fault("torn checkpoint", 1, 1, "passed over.*")
    assert outcome(torn, 0.0, [(1.0, LINES["torn checkpoint"])], None, 2.0)["message"].startswith(
        "passed over a damaged checkpoint: run/checkpoints/last/model-00001"
    )


def test_a_fault_of_which_nothing_was_said_has_no_time_of_detection() -> None:
    row = outcome(DEATH, 10.0, [(9.0, LINES[DEATH.name])], None, 12.0)
    assert math.isnan(row["detected_s"]) and row["message"] == ""


def test_times_are_a_median_and_a_range_where_there_are_several() -> None:
    rows = [{"detected_s": seconds} for seconds in (0.3, 0.1, 4.0)]
    assert faults.spread(rows, "detected_s") == "0.3 s (0.1 to 4)"
    assert faults.spread(rows[:1], "detected_s") == "0.3 s" and faults.spread(rows, "again_s") == "-"


def test_checksums_are_those_of_the_step_asked_for(tmp_path: Path) -> None:
    for step in (5, 10):
        tensors = {"model": {"w": torch.full((3,), float(step))}}
        write(tmp_path / "run" / "checkpoints" / "last", Checkpoint(tensors, {"step": step}), keep=2)
    first, second = (faults.sums_at(tmp_path, step) for step in (5, 10))
    assert first and second and first != second and faults.sums_at(tmp_path, 7) is None


# ---- the stream that provokes -----------------------------------------------------------------------------------------------------------


class Fake:
    """A stream of batches with two modalities, the first of them observed nowhere."""

    def __init__(self, rank: int, step: int):
        self.rank, self.step = rank, step

    def __iter__(self) -> Iterator[Any]:
        while True:
            self.step += 1
            modalities = {"x0": SimpleNamespace(data=torch.zeros(0, 2)), "x1": SimpleNamespace(data=torch.zeros(3, 2))}
            yield [SimpleNamespace(modalities=modalities)]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stream_provokes_its_fault_in_one_step_of_one_rank(tmp_path: Path, rank: int) -> None:
    (tmp_path / "plan.json").write_text(json.dumps([NAN._replace(step=6)]))
    steps = faults.provoking(tmp_path, Fake.__iter__)(Fake(rank, 3))  # type: ignore[arg-type]
    spoilt = [bool(next(steps)[0].modalities["x1"].data.isnan().all()) for _ in range(6)]
    assert spoilt == [step == 6 and rank == NAN.rank for step in range(4, 10)]
    assert len(events(tmp_path, "provoked")) == (rank == NAN.rank)
    assert [event["step"] for event in events(tmp_path, "start")] == ([3] if rank == 0 else [])
    assert len(events(tmp_path, "again")) == (2 if rank == 0 else 0)  # the first step after the start, and the one after the fault


def test_the_disk_is_full_by_word_of_the_system_and_a_torn_write_leaves_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_write_file", checkpoint._write_file)
    faults._fill_disk(Scene(tmp_path, None, "full disk"))
    with pytest.raises(OSError) as error:
        checkpoint._write_file(tmp_path / "a", b"content")
    assert error.value.errno == errno.ENOSPC and len(events(tmp_path, "provoked")) == 1
    killed: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda *words: killed.append(words))
    faults._die_writing(Scene(tmp_path, None, "write"))
    checkpoint._write_file(tmp_path / "b", b"content!")
    assert (tmp_path / "b").read_bytes() == b"cont" and killed == [(os.getpid(), 9)]


# ---- shards -----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(linear_gaussian(rows=96, missing=0.3), tmp_path / "good", rows_per_shard=32)
    return tmp_path


@pytest.mark.parametrize("name", damage.DAMAGES)
def test_a_damage_is_what_it_is_called_and_touches_one_row_or_the_end_of_the_tar(folder: Path, name: str) -> None:
    at = damage.target(folder / "good")
    before = at.path.read_bytes()
    damage.DAMAGES[name](at)
    report = check_shards(folder / "good")
    assert {problem.shard for problem in report.problems} == {damage.BROKEN}
    after = at.path.read_bytes() if at.path.exists() else b""
    if len(after) == len(before):
        changed = [place for place, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]
        assert at.offset - TAR_BLOCK <= changed[0] and (name == "duplicate keys" or changed[-1] < at.offset + at.size)
    said = {
        "oversized member": "ends or breaks",
        "path traversal name": "../../canary",
        "pickle member": ".x0.pkl",
        "duplicate keys": "second",
    }
    assert said.get(name, "") in str(report) and not (folder / "good" / "canary").exists()


def test_the_bomb_is_real(folder: Path) -> None:
    at = damage.target(folder / "good")
    damage.plant(at)
    pickle.loads(at.path.read_bytes()[at.offset : at.offset + at.size])
    assert (folder / "good" / "canary").is_dir()


def test_a_training_stops_at_the_damage_and_ends_as_if_there_had_been_none(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = damage._to_the_end(damage._trainer(folder / "good", folder / "whole"))
    row = damage.damaged("wrong shape", folder, expected)
    assert row["same_end"] and row["rows_replaced"] == 1 and "with checksum" in row["message"] and str(folder) not in row["message"]
    assert not damage.damaged("empty shard", folder, "other weights")["same_end"]
    monkeypatch.setitem(damage.DAMAGES, "none", lambda at: None)  # type: ignore[arg-type]
    row = damage.damaged("none", folder, expected)
    assert row["message"] == "no error" and row["rows_replaced"] == 0
