"""Worker processes: they are told apart from a crash, leave nothing behind, and hand over memory that is used again."""

import itertools
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from meme_dist.data.shards import write_shards
from meme_dist.data.stream import Evaluation, Stream
from meme_dist.data.workers import AHEAD
from tests.data.tiny import counted, row_numbers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workers") / "set"
    write_shards(counted(0, 64), folder, rows_per_shard=16)
    return folder


def test_batches_that_are_kept_do_not_change_when_the_shared_memory_is_used_again(folder: Path) -> None:
    for workers in (1, 2):
        stream = Stream(folder, "train", batch_size=8, streams=4, seed=0, workers=workers)
        kept, numbers = [], []
        for step in itertools.islice(stream, 4 * AHEAD):
            kept.append(step[0])
            numbers.append(row_numbers(step[0]))
        assert [row_numbers(batch) for batch in kept] == numbers
        evaluated = list(Evaluation(folder, "train", batch_size=4, workers=workers))
        assert [number for batch in evaluated for number in row_numbers(batch)] == list(range(64))


def test_a_worker_that_dies_is_an_error_and_not_a_wait(folder: Path) -> None:
    steps = iter(Stream(folder, "train", batch_size=8, streams=4, seed=0, workers=2))
    next(steps)
    for process in multiprocessing.active_children():
        os.kill(process.pid or 0, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="a loader worker died with exit code -9; out of memory, perhaps"):
        for _ in itertools.islice(steps, 4 * AHEAD):
            pass


def test_workers_end_with_the_iteration_however_it_ends(folder: Path) -> None:
    steps = iter(Stream(folder, "train", batch_size=8, streams=4, seed=0, workers=2))
    next(steps)
    assert len(multiprocessing.active_children()) == 2
    steps.close()  # type: ignore[attr-defined]
    assert multiprocessing.active_children() == []
    assert len(list(Evaluation(folder, "train", batch_size=4, workers=2))) == 16
    assert multiprocessing.active_children() == []
    batches = iter(Evaluation(folder, "train", batch_size=4, workers=2))
    next(batches)
    del batches
    assert multiprocessing.active_children() == []


def test_workers_do_not_outlive_a_main_process_that_is_killed(folder: Path) -> None:
    script = f"""
import multiprocessing, os, signal
from meme_dist.data.stream import Stream
if __name__ == "__main__":
    steps = iter(Stream({str(folder)!r}, "train", batch_size=8, streams=4, seed=0, workers=2))
    next(steps)
    print(*[process.pid for process in multiprocessing.active_children()], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2])
    workers = [int(word) for word in done.stdout.split()]
    assert len(workers) == 2, done.stderr
    deadline = time.monotonic() + 10
    while (alive := [pid for pid in workers if running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert alive == []


def test_an_error_that_nobody_catches_ends_the_process_and_its_workers(folder: Path) -> None:
    script = f"""
from meme_dist.data.stream import Stream
if __name__ == "__main__":
    steps = iter(Stream({str(folder)!r}, "train", batch_size=8, streams=4, seed=0, workers=1))
    next(steps)
    raise RuntimeError("broken step")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2])
    assert done.returncode == 1 and done.stderr.endswith("RuntimeError: broken step\n")


def running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_too_little_shared_memory_is_an_error_before_it_kills(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(OSError, match="workers: expected 0 MB of shared memory in /dev/shm for one, found 0 MB; use fewer workers or 0"):
        next(iter(Stream(folder, "train", batch_size=8, seed=0, workers=1)))


def test_parts_of_several_modalities_and_types_keep_their_places_in_the_shared_memory(tmp_path: Path) -> None:
    from tests.data.tiny import dataset

    write_shards(dataset(), tmp_path / "tiny", rows_per_shard=8)
    alone, helped = (Stream(tmp_path / "tiny", "train", batch_size=12, streams=6, seed=0, workers=workers) for workers in (0, 2))
    for [a], [b] in itertools.islice(zip(alone, helped, strict=True), 6):
        for name in a.modalities:
            assert torch.equal(a.dense(name), b.dense(name)) and a.dense(name).dtype == b.dense(name).dtype
