"""The watchdog names who hangs and ends the process, is quiet about slow work, and the straggler's line names the slowest rank."""

import dataclasses
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from meme_dist.data.files import Shard
from meme_dist.data.index import Manifest
from meme_dist.data.shards import write_shards
from meme_dist.data.stream import Stream
from meme_dist.train import heartbeat
from meme_dist.train.heartbeat import FOLDER, HUNG, Heart, Standing, behind, straggler
from meme_dist.train.signals import EXITS, told
from meme_dist.train.trainer import Trainer, Training
from tests.data.tiny import counted
from tests.ranks import run_ranks
from tests.trainings import SHARDED, build, shards, stream

QUICK = {"patience": 0.4, "interval": 0.05}


def until(holds: Callable[[], object], seconds: float = 5.0) -> bool:
    """Whether it comes to hold within that time."""
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(holds())


def stands_still(rank: int, world: int, folder: str, sleeper: int) -> tuple[list[int], str]:
    """Steps that end in a collective; one rank sleeps on its way to the fourth. Statuses asked for, and what was written to stderr."""
    errors, ended = Path(folder) / f"errors-{rank}", []
    os.dup2(os.open(errors, os.O_CREAT | os.O_WRONLY), 2)
    with Heart(Path(folder), rank=rank, world=world, patience=1.0, interval=0.1, end=ended.append) as heart:
        for step in range(1, 6):
            heart.beat("data", step)
            if step == 4 and rank == sleeper:
                time.sleep(3.0)
            heart.beat("backward", step)
            torch.distributed.all_reduce(torch.ones(1))
    return ended, errors.read_text()


def test_a_rank_that_sleeps_is_named_by_all_of_them(tmp_path: Path) -> None:
    for rank, (ended, text) in enumerate(run_ranks(stands_still, 3, str(tmp_path), 1)):
        assert ended == [HUNG]
        assert f"rank {rank} of 3: no rank has moved for 1 s. Behind: rank 1 (step 4, data, process " in text, text
        assert "The others wait in step 4, backward." in text and "in stands_still" in text
        assert ("all_reduce" in text.partition("in stands_still")[0]) == (rank != 1)  # the innermost call of the main thread


def test_a_process_whose_main_thread_hangs_ends_with_a_status_of_its_own_and_tells_it(tmp_path: Path) -> None:
    script = "import time; from meme_dist.train.heartbeat import Heart\nwith Heart(None, patience=0.5, interval=0.1): time.sleep(30)"
    environment = {**os.environ, EXITS: str(tmp_path), "RANK": "3"}
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env=environment)
    assert (done.returncode, told(tmp_path)) == (HUNG, {3: HUNG}) and time.monotonic() - start < 25
    assert 'File "<string>", line 2 in <module>' in done.stderr and f"status {HUNG}" in done.stderr


def test_slow_work_that_says_so_is_no_hang_and_silence_is_one() -> None:
    ended: list[int] = []
    with Heart(None, end=ended.append, **QUICK) as heart:
        for _ in range(10):
            heart.alive()
            time.sleep(0.1)
        with heart.resting():
            time.sleep(0.8)
        assert ended == []
        assert until(lambda: ended == [HUNG])


def test_ranks_that_wait_for_one_at_work_are_patient(tmp_path: Path) -> None:
    ended: list[int] = []
    with ExitStack() as stack:
        waiting, slow = (stack.enter_context(Heart(tmp_path, rank=rank, world=2, end=ended.append, **QUICK)) for rank in range(2))
        for step in range(1, 4):
            waiting.beat("forward", step)
        slow.beat("forward", 1)
        for _ in range(12):
            slow.alive()
            time.sleep(0.1)
        assert ended == []
        with slow.resting():
            time.sleep(0.8)
        assert ended == []
        assert until(lambda: ended == [HUNG, HUNG])


def test_a_rank_that_is_gone_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ended: list[int] = []
    with Heart(tmp_path, rank=0, world=2, end=ended.append, **QUICK):
        assert until(lambda: ended == [HUNG])
    assert "Behind: rank 1 (no heartbeat file: it ended, or does not share the run's folder)" in capfd.readouterr().err


NOBODYS = {
    "nothing": b"",
    "cut": b'{"rank": 1, "bea',
    "no text": bytes(range(128, 256)),
    "a list": b"[]",
    "a number": b"7",
    "another's": b'{"step": 3}',
    "too deep": b"[" * 100_000,
    "words": b'{"rank": 1, "beats": "9", "step": 5, "where": "data", "idle": "long"}',
    "no beats": b'{"rank": 1, "beats": null, "step": 5, "where": "data", "idle": 0.0}',
    "not a number": b'{"rank": 1, "beats": 9, "step": 5, "where": "data", "idle": NaN}',
    "the future": b'{"rank": 1, "beats": 9, "step": 5, "where": "data", "idle": -1e9}',
    "a large number": b'{"rank": 1, "beats": 9, "step": 5, "where": "data", "idle": 1%s}' % (b"0" * 400),
}


@pytest.mark.parametrize("content", NOBODYS.values(), ids=NOBODYS.keys())
def test_whatever_lies_in_another_ranks_file_the_alarm_comes(tmp_path: Path, capfd: pytest.CaptureFixture[str], content: bytes) -> None:
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "rank-00001.json").write_bytes(content)
    ended: list[int] = []
    with Heart(tmp_path, rank=0, world=2, end=ended.append, patience=0.1, interval=0.02):
        assert until(lambda: ended == [HUNG], 3.0)
    assert "Behind: rank 1 (no heartbeat file that can be read" in capfd.readouterr().err


def test_a_place_that_cannot_be_written_in_utf8_silences_no_alarm(tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir()
    odd = b'{"rank": 1, "beats": 0, "step": 5, "where": "\\ud800", "idle": 9.0}'
    (tmp_path / FOLDER / "rank-00001.json").write_bytes(odd)
    ended: list[int] = []
    with Heart(tmp_path, rank=0, world=2, end=ended.append, patience=0.1, interval=0.02) as heart:
        heart.beat("data", 5)
        assert until(lambda: ended == [HUNG], 3.0)


def test_a_rank_whose_machine_is_gone_is_silent_and_named(tmp_path: Path) -> None:
    places = [Standing(0, 9, 5, "update", 40.0), Standing(1, 9, 5, "update", 0.0, host="far", pid=7)]
    (tmp_path / FOLDER).mkdir()
    for place in places:
        heartbeat.write(tmp_path / FOLDER, place)
    path = tmp_path / FOLDER / "rank-00001.json"
    os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 100))
    found = heartbeat.read(tmp_path / FOLDER, 0, 2)
    assert found[1].idle == pytest.approx(100, abs=5) and found[1].silent == found[1].idle
    text = behind(found, interval=10)
    assert re.match(r"Behind: rank 1 \(step 5, update, process 7 on far, its watchdog silent for \d+ s", text), text


def test_where_all_stand_at_the_same_place_no_rank_is_blamed() -> None:
    text = behind([Standing(rank, 9, 5, "backward", 40.0) for rank in range(3)])
    assert text.startswith("All of them are in step 5, backward") and "rank" not in text.replace("ranks", "")


def test_storage_that_fails_leaves_a_rank_to_itself(tmp_path: Path) -> None:
    ended: list[int] = []
    with Heart(tmp_path, rank=0, world=2, end=ended.append, **QUICK) as heart:
        shutil.rmtree(tmp_path / FOLDER)
        for _ in range(8):
            heart.beat("data", 1)
            time.sleep(0.1)
        assert ended == []
        assert until(lambda: ended == [HUNG])


ANSWER = 0.3  # seconds that a source takes to answer, a fifth of the patience of these hearts


class Slow(Manifest):
    """Shards that answer late, or after some of them fall silent for twice that patience."""

    answers: int | None = None

    def read(self, shard: Shard, begin: int, end: int) -> bytes:
        if self.answers is not None:
            if self.answers == 0:
                time.sleep(10 * ANSWER)
            object.__setattr__(self, "answers", self.answers - 1)
        time.sleep(ANSWER)
        return super().read(shard, begin, end)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("answers", "expected"), [(None, []), (3, [HUNG])])
def test_a_source_that_answers_slowly_trips_no_heart_however_many_reads_a_batch_takes_and_one_that_hangs_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, answers: int | None, expected: list[int]
) -> None:
    """A first batch of 12 reads or more takes more than twice the patience."""
    write_shards(counted(0, 24), tmp_path / "set", rows_per_shard=2)
    source = Stream(tmp_path / "set", "train", batch_size=8, streams=4, seed=0, workers=workers)
    slow = Slow(**{field.name: getattr(source.manifest, field.name) for field in dataclasses.fields(source.manifest) if field.init})
    object.__setattr__(slow, "answers", answers)
    source._reader.manifest = slow
    ended: list[int] = []
    over = threading.Event()
    reading = threading.Thread(target=lambda: (next(iter(source)), over.set()), daemon=True)
    reading.start()
    assert until(lambda: source.arrived, 30.0)  # a worker's start is no part of it
    with Heart(None, patience=5 * ANSWER, interval=ANSWER / 3, end=lambda status: (ended.append(status), over.set())) as heart:
        heart.listen(lambda: source.arrived)
        heart.beat("data", 1)
        begun = time.monotonic()
        assert over.wait(30)
        reading.join(30 if expected else 0)  # what hung goes on, after this heart has spoken
        assert ended == expected and (expected or time.monotonic() - begun > 1.5 * 5 * ANSWER)


def test_a_trainer_has_its_heart_listen_to_what_its_stream_reads(tmp_path: Path) -> None:
    heart, rows = Heart(None), stream(shards(tmp_path / "set"), batch_size=8)
    trainer = Trainer(build(SHARDED), rows, Training(batch_size=8, steps=1), heart=heart)
    before = heart._count()
    next(iter(trainer))
    assert heart._count() == rows.arrived > before


def test_the_thread_and_the_file_end_with_the_trainer(tmp_path: Path) -> None:
    with pytest.raises(KeyError), Heart(tmp_path, rank=4, world=5):
        assert any(thread.name == "heartbeat" for thread in threading.enumerate())
        raise KeyError
    assert not any(thread.name == "heartbeat" for thread in threading.enumerate())
    with Heart(tmp_path, rank=4, world=5, patience=9, interval=0.05):
        assert until(lambda: [path.name for path in (tmp_path / FOLDER).glob("*.json")] == ["rank-00004.json"])
    assert list((tmp_path / FOLDER).iterdir()) == []


def test_time_in_which_the_whole_process_was_stopped_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look each second, one of them after an hour in which the job was suspended: nine seconds count, and the tenth is one too many."""
    now, ended = 0.0, []
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now)
    looks = [1.0, 1.0, 1.0, 1.0, 1.0, 3600.0, 1.0, 1.0, 1.0]

    class Turns:
        def wait(self, interval: float) -> bool:
            nonlocal now
            now += looks[0] if looks else 0.0
            return not looks or looks.pop(0) < 0

    heart = Heart(None, patience=10.0, interval=1.0, end=ended.append)
    monkeypatch.setattr(heart, "_ended", Turns())
    heart._watch()
    assert ended == [] and heart._idle == 4 + 2 + 3
    looks.append(1.0)
    heart._watch()
    assert ended == [HUNG]


def test_times_are_seconds_a_step_of_data_and_forward_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(heartbeat.time, "perf_counter", lambda: now)
    heart = Heart(None)
    for step in range(1, 5):
        for phase, seconds in (("data", 0.25 * step), ("forward", 0.5), ("backward", 8.0), ("update", 16.0)):
            heart.beat(phase, step)
            now += seconds
    heart.beat("data", 5)
    assert heart.times().tolist() == [0.625, 0.5]
    assert heart.times().tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("data", "forward", "expected"),
    [
        ([0.01, 0.01, 0.01, 0.41], [0.2, 0.2, 0.2, 0.2], "data takes rank 3 0.410 s a step, the median rank 0.010 s (41.0 times)"),
        ([0.0, 0.0, 0.0, 0.0], [0.2, 0.5, 0.2, 0.2], "forward takes rank 1 0.500 s a step, the median rank 0.200 s (2.5 times)"),
        ([0.3, 0.1], [0.2, 0.2], "data takes rank 0 0.300 s a step, the median rank 0.100 s (3.0 times)"),
        ([0.0, 0.1], [0.2, 0.2], "data takes rank 1 0.100 s a step, the median rank 0.000 s"),
        ([0.10, 0.14], [0.2, 0.2], None),  # less than 1.5 times
        ([0.000, 0.009], [0.2, 0.2], None),  # too little to matter
        ([5.0], [7.0], None),  # alone
    ],
)
def test_the_slowest_rank_is_named_where_it_is_slow_enough(data: list[float], forward: list[float], expected: str | None) -> None:
    line = straggler(torch.tensor([data, forward]).T)
    assert line == (None if expected is None else f"straggler: {expected}")


def test_a_rank_slow_in_both_is_named_for_both() -> None:
    line = straggler(torch.tensor([[0.1, 0.1], [0.1, 0.1], [0.9, 0.3]]))
    assert line is not None and line.count("rank 2") == 2 and "; forward takes" in line


@pytest.mark.parametrize("interval", [0.0, 300.0, math.nan])
def test_an_interval_that_is_no_part_of_the_patience_is_refused(interval: float) -> None:
    with pytest.raises(ValueError, match="interval: expected seconds between 0 and the patience of 300"):
        Heart(None, interval=interval)
