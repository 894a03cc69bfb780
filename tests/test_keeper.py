"""Several ranks write one checkpoint: none waits long for another, all learn the same, and what is being written is not thrown away.

The ranks are threads here, whose collectives are a barrier and a list.
"""

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from meme_dist import leave
from meme_dist.train import checkpoint, keeper
from meme_dist.train.engines.base import Engine
from meme_dist.train.heartbeat import HUNG, Heart
from meme_dist.train.keeper import Keeper
from meme_dist.train.trainer import Trainer, Training
from tests.trainings import Rows, build, mixed


class Ranks:
    """Threads that exchange what ranks would."""

    def __init__(self, world: int, monkeypatch: pytest.MonkeyPatch):
        self.world, self._barrier, self._values, self._own = world, threading.Barrier(world), [None] * world, threading.local()
        monkeypatch.setattr(torch.distributed, "all_gather_object", self._all_gather)
        monkeypatch.setattr(torch.distributed, "broadcast_object_list", self._broadcast)

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        """What each rank returns or raises."""
        found: list[Any] = [None] * self.world

        def enter(rank: int) -> None:
            self._own.rank = rank
            try:
                found[rank] = function(rank)
            except Exception as error:
                found[rank] = error

        threads = [threading.Thread(target=enter, args=(rank,)) for rank in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    def keeper(self, engine: Engine, rank: int) -> Keeper:
        return Keeper(engine, rank=rank, world=self.world, token="token", reduce=lambda x: torch.stack(self._exchange(x)).sum(0))

    def _exchange(self, value: Any) -> list[Any]:
        self._values[self._own.rank] = value
        self._barrier.wait(30)
        found = list(self._values)
        self._barrier.wait(30)
        return found

    def _all_gather(self, into: list[Any], value: Any) -> None:
        into[:] = self._exchange(value)

    def _broadcast(self, values: list[Any], source: int) -> None:
        values[:] = self._exchange(list(values))[source]


@pytest.fixture(scope="module")
def engine() -> Engine:
    """That of a training of two modalities."""
    return Trainer(build(), Rows("ab", mixed("ab"), batch_size=8), Training(batch_size=8)).engine


def saved(ranks: Ranks, engine: Engine, folder: Path, spoil: Callable[[Keeper], None] = lambda _: None) -> list[Any]:
    """What a save comes to on every rank: an error, or the seconds that it took."""

    def save(rank: int) -> float:
        start, kept = time.monotonic(), ranks.keeper(engine, rank)
        spoil(kept)
        kept.save(folder, {"step": 1}, average=None, random={"cpu": torch.zeros(2, 5)}, keep=1)
        kept.wait()
        return time.monotonic() - start

    return ranks.run(save)


class Disk:
    """Has room for so many bytes below a folder; what does not fit is written as far as it does."""

    def __init__(self, folder: Path, room: int, monkeypatch: pytest.MonkeyPatch):
        self.folder, self.room, self._lock = folder, room, threading.Lock()
        monkeypatch.setattr(checkpoint, "_write_file", self._write_file)
        monkeypatch.setattr(Path, "write_text", lambda path, text, **_: self._write_file(path, text.encode()))

    def _write_file(self, path: Path, content: bytes) -> str:
        with self._lock:
            free = self.room - sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())
            path.write_bytes(content[: max(0, free)])
        if free < len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return checkpoint.hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("room", [0.05, 0.5, 0.9])  # of what it takes: for no share, for a part, for one of two
def test_on_a_full_disk_no_rank_waits_for_another_and_all_are_told_what_all_of_it_needs(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: float
) -> None:
    ranks = Ranks(2, monkeypatch)
    assert max(saved(ranks, engine, tmp_path / "whole")) < 30
    tensors = checkpoint.read(tmp_path / "whole").tensors
    needed = sum(x.numel() * x.element_size() for entries in tensors.values() for x in entries.values())
    Disk(tmp_path / "full", int(room * sum(path.stat().st_size for path in (tmp_path / "whole").iterdir())), monkeypatch)
    start = time.monotonic()
    for error in saved(ranks, engine, tmp_path / "full" / "last"):
        assert isinstance(error, OSError) and error.errno == errno.ENOSPC
        assert f"this checkpoint needs {needed:,} bytes" in str(error)
    assert time.monotonic() - start < 30  # not half an hour
    assert list((tmp_path / "full").iterdir()) == []


def test_ranks_that_say_nothing_are_waited_for_together(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "PATIENCE", 1.0)
    monkeypatch.setattr(Keeper, "_follow", lambda *_: None)
    start = time.monotonic()
    first, *others = saved(Ranks(4, monkeypatch), engine, tmp_path / "last")
    assert 1.0 <= time.monotonic() - start < 2.5
    assert "rank 1 could not write its share: nothing came of it" in str(first) and len(others) == 3


def test_a_checkpoint_that_cannot_get_its_name_is_given_up_at_once(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(checkpoint, "commit", refuse)
    start = time.monotonic()
    for error in saved(Ranks(2, monkeypatch), engine, tmp_path / "last"):
        assert isinstance(error, OSError) and error.errno == errno.EIO  # on all of them: their exit statuses follow from it
    assert time.monotonic() - start < 30 and list(tmp_path.iterdir()) == []


# ---- which one to go on from --------------------------------------------------------------------------------------------------------


def test_all_ranks_go_on_from_the_checkpoint_that_rank_0_chose(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one is damaged, and rank 1 has an old list in which the one before it does not stand."""
    folder, older = tmp_path / "last", checkpoint.older
    for step in (1, 2, 3):
        checkpoint.write(folder, checkpoint.Checkpoint({"model": {"w": torch.zeros(3)}}, {"step": step}), keep=3)
    (folder / "model.safetensors").unlink()
    ranks = Ranks(2, monkeypatch)
    monkeypatch.setattr(checkpoint, "older", lambda folder: older(folder)[getattr(ranks._own, "rank", 0) :])
    found = ranks.run(lambda rank: ranks.keeper(engine, rank).find(folder)[0])
    assert found == [tmp_path / "last-00000002"] * 2


def test_where_no_checkpoint_is_whole_all_ranks_raise_what_rank_0_found(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.write(tmp_path / "last", checkpoint.Checkpoint({"model": {"w": torch.zeros(3)}}, {"step": 1}))
    (tmp_path / "last" / "model.safetensors").unlink()
    ranks = Ranks(2, monkeypatch)
    for error in ranks.run(lambda rank: ranks.keeper(engine, rank).find(tmp_path / "last")):
        assert isinstance(error, ValueError) and "model.safetensors: this file of the checkpoint is missing" in str(error)


# ---- slow storage, and the end of the process ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("patience", "expected"), [(60.0, []), (0.2, [HUNG])])
def test_waiting_for_slow_storage_is_no_hanging_until_it_takes_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patience: float, expected: list[int]
) -> None:
    ended, write = [], checkpoint.write_tensors
    monkeypatch.setattr(checkpoint, "write_tensors", lambda *values: (time.sleep(1.6), write(*values))[1])
    monkeypatch.setattr(keeper, "GLANCE", 0.05)
    monkeypatch.setattr(keeper, "PATIENCE", patience)
    heart = Heart(tmp_path, patience=0.8, interval=0.1, end=ended.append)
    trainer = Trainer(build(), Rows("ab", mixed("ab"), batch_size=8), Training(batch_size=8), folder=tmp_path, heart=heart)
    with heart:
        trainer.save()
    assert ended == expected


@pytest.mark.parametrize(("seconds", "finished"), [(0.2, True), (5.0, False)])
def test_a_checkpoint_under_way_when_a_process_leaves_is_finished_within_bounds(
    monkeypatch: pytest.MonkeyPatch, seconds: float, finished: bool
) -> None:
    monkeypatch.setattr(leave, "PATIENCE", 1.0)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    over, at_exit = threading.Event(), []
    monkeypatch.setattr(os, "_exit", lambda status: at_exit.append((status, written.is_set())))
    written = threading.Event()
    thread = threading.Thread(target=lambda: (over.wait(seconds), written.set()), name=leave.WRITER)
    thread.start()
    leave.leave(2)
    over.set()
    thread.join()
    assert at_exit == [(2, finished)]
