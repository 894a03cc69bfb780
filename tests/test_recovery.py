"""What a training survives: damaged checkpoints, steps that are not finite, jumps of the loss, being told to stop."""

import errno
import json
import math
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from meme_dist.data.index import Manifest
from meme_dist.leave import FAILED, WRITER, status_of
from meme_dist.recipes import RECIPES
from meme_dist.recipes.base import Recipe
from meme_dist.recipes.keywords import unflatten
from meme_dist.run import Ranks, Watch, Where, initial_objective, prepare, train_prepared
from meme_dist.train import checkpoint
from meme_dist.train.signals import Stop
from meme_dist.train.spikes import SpikeDetector
from meme_dist.train.trainer import NonFiniteError, Trainer, Training
from tests.ranks import run_ranks
from tests.trainings import SHARDED, Rows, build, mixed, shards, stream, weights

pytestmark = pytest.mark.repeats

BATCH = 8


class Spoilt(Rows):
    """Rows of which some steps of the stream have NaN, or absurdly large numbers, in modality b."""

    def __init__(self, spoil: dict[int, float], **layout: Any):
        super().__init__("ab", mixed("ab", 12 * BATCH), batch_size=BATCH, **layout)
        self.spoil = spoil

    def batch(self, positions: np.ndarray) -> Any:
        made = super().batch(positions)
        if self.step in self.spoil:
            made.modalities["b"].data.fill_(self.spoil[self.step])
        return made


def trainer_on(folder: Path | None, spoil: dict[int, float], *, rank: int = 0, world: int = 1, **settings: Any) -> Trainer:
    training = Training(**({"steps": 6, "batch_size": BATCH, "ema": 0.9, "log_every": 1} | settings))
    return Trainer(build(), Spoilt(spoil, rank=rank, world=world), training, folder=folder)


def run(trainer: Trainer, save_at: tuple[int, ...] = ()) -> list[float]:
    losses = []
    for report in trainer:
        losses.append(report.loss)
        if report.step in save_at:
            trainer.save()
    return losses


def notes(folder: Path) -> list[str]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["note"] for line in lines if "note" in line]


# ---- going back -----------------------------------------------------------------------------------------------------------------------


def test_a_run_goes_back_to_its_checkpoint_and_passes_over_the_rows_since(tmp_path: Path) -> None:
    """Step 4 of the stream is broken: the run goes back to step 2 and trains on from row block 5, as one that never saw blocks 2 to 4."""
    trainer = trainer_on(tmp_path, {4: torch.nan}, rollbacks=1)
    losses = run(trainer, save_at=(2,))
    assert (trainer.step, trainer.passed) == (6, 3)
    other = trainer_on(None, {})
    expected = []
    for report in other:
        expected.append(report.loss)
        if report.step == 2:
            other.stream.step += 3
    assert losses[:2] + losses[4:] == expected  # steps 3 and 4 were made twice
    assert all(torch.equal(p, weights(other.objective)[name]) for name, p in trainer.objective.named_parameters())
    (note,) = notes(tmp_path)
    assert note.startswith("went back from step 4 to 2: step 5: loss per row nan")
    logged = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if "note" not in line]
    assert logged == [1, 2, 3, 4, 5, 6]


def test_killed_after_going_back_a_run_resumes_as_if_it_had_not_been(tmp_path: Path) -> None:
    settings = {"rollbacks": 1, "skips": 1}
    whole = trainer_on(tmp_path / "whole", {1: torch.nan, 4: torch.nan}, **settings)
    run(whole, save_at=(2, 4))
    first = trainer_on(tmp_path / "parts", {1: torch.nan, 4: torch.nan}, **settings)
    for report in first:
        if report.step in (2, 4):
            first.save()
        if report.step == 4 and first._gone_back:
            break
    again = trainer_on(tmp_path / "parts", {1: torch.nan, 4: torch.nan}, **settings)
    assert again.resume() and (again.passed, again._gone_back) == (first.passed, 1)
    run(again)
    assert (again.step, again.passed) == (whole.step, whole.passed)
    assert all(torch.equal(p, weights(whole.objective)[name]) for name, p in again.objective.named_parameters())


@pytest.mark.parametrize("saved", [False, True])
def test_without_a_checkpoint_or_beyond_its_budget_a_run_stops_with_the_diagnosis(tmp_path: Path, saved: bool) -> None:
    trainer = trainer_on(tmp_path, {3: torch.nan, 5: torch.nan}, rollbacks=1)
    with pytest.raises(NonFiniteError, match="data of b not finite") as error:
        run(trainer, save_at=(2,) if saved else ())
    assert error.value.step == (4 if not saved else trainer.step + 1)
    assert trainer._gone_back == int(saved)


def test_a_jump_of_the_loss_makes_a_run_go_back_and_without_leave_it_goes_on(tmp_path: Path) -> None:
    settings = {"steps": 60, "log_every": 100}
    for rollbacks in (0, 1):
        trainer = trainer_on(tmp_path / str(rollbacks), {50: 300.0}, rollbacks=rollbacks, **settings)
        trainer._spikes = SpikeDetector(warmup=20)
        run(trainer, save_at=(40,))
        assert (trainer.step, trainer.passed) == (60, 11 * rollbacks)
    assert notes(tmp_path / "1")[0].startswith("went back from step 50 to 40: the loss jumped to ")


def together(rank: int, world: int, folder: Path) -> tuple[int, int, float]:
    trainer = trainer_on(folder, {4: torch.nan} if rank == 1 else {}, rank=rank, world=world, rollbacks=1)
    losses = run(trainer, save_at=(2,))
    return trainer.step, trainer.passed, losses[-1]


def test_all_ranks_go_back_where_one_is_broken(tmp_path: Path) -> None:
    first, second = run_ranks(together, 2, tmp_path)
    assert first == second and first[:2] == (6, 3)


# ---- checkpoints that are damaged -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["state.json", "model.safetensors", "ema.safetensors"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it_and_said(tmp_path: Path, damage: str) -> None:
    trainer = trainer_on(tmp_path, {})
    run(trainer, save_at=(2, 4))
    path = tmp_path / "checkpoints" / "last" / damage
    path.write_bytes(path.read_bytes()[:-9])
    again = trainer_on(tmp_path, {})
    assert again.resume() and again.step == 2
    assert notes(tmp_path) and f"passed over a damaged checkpoint: {path}" in notes(tmp_path)[0]
    run(again, save_at=(4,))
    assert all(torch.equal(p, weights(trainer.objective)[name]) for name, p in again.objective.named_parameters())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


class FailingDisk:
    """Reads of a checkpoint's files below a folder fail with an error of the disk, the first `times` of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, number: int = errno.EIO, times: float = math.inf):
        self.folder, self.number, self.left, read = folder, number, times, Path.open

        def opened(path: Path, *values: Any, **keywords: Any) -> Any:
            if path.suffix == ".safetensors" and self.folder in path.parents and self.left > 0:
                self.left -= 1
                raise OSError(self.number, os.strerror(self.number), str(path))
            return read(path, *values, **keywords)

        monkeypatch.setattr(Path, "open", opened)


@pytest.mark.parametrize("file", ["state.json", "model.safetensors"])
@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
def test_whatever_damaged_the_newest_checkpoint_a_run_goes_on_from_the_one_before_and_saves_again(
    tmp_path: Path, file: str, damage: Callable[[Path], object]
) -> None:
    run(trainer_on(tmp_path, {}), save_at=(2, 4))
    path = tmp_path / "checkpoints" / "last" / file
    damage(path)
    again = trainer_on(tmp_path, {})
    assert again.resume() and again.step == 2
    assert len(notes(tmp_path)) == 1 and str(path) in notes(tmp_path)[0]
    run(again, save_at=(4, 5))
    assert checkpoint.verify(tmp_path / "checkpoints" / "last")["step"] == 5
    assert [path.name for path in checkpoint.older(tmp_path / "checkpoints" / "last")] == ["last-00000004"]


@pytest.mark.parametrize("number", checkpoint.UNREADABLE)
def test_a_checkpoint_that_the_disk_cannot_read_is_passed_over_for_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    run(trainer_on(tmp_path, {}), save_at=(2, 4))
    again = trainer_on(tmp_path, {})
    FailingDisk(monkeypatch, tmp_path / "checkpoints" / "last", number)
    assert again.resume() and again.step == 2
    assert len(notes(tmp_path)) == 1 and os.strerror(number) in notes(tmp_path)[0]


def test_a_disk_that_fails_once_costs_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(trainer_on(tmp_path, {}), save_at=(2, 4))
    again = trainer_on(tmp_path, {})
    FailingDisk(monkeypatch, tmp_path / "checkpoints" / "last", times=1)
    assert again.resume() and again.step == 4 and notes(tmp_path) == []


def test_a_disk_that_reads_no_checkpoint_at_all_is_a_failure_that_may_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A supervisor tries again after it, where a checkpoint that is wrong is for a person."""
    run(trainer_on(tmp_path, {}), save_at=(2, 4))
    again = trainer_on(tmp_path, {})
    FailingDisk(monkeypatch, tmp_path / "checkpoints")
    with pytest.raises(OSError) as caught:
        again.resume()
    assert caught.value.errno == errno.EIO and status_of(caught.value) == FAILED


def test_what_is_no_checkpoint_is_not_taken_for_a_damaged_one(tmp_path: Path) -> None:
    run(trainer_on(tmp_path, {}), save_at=(2, 4))
    last = tmp_path / "checkpoints" / "last"
    (last / "state.json").rename(last / "notes.txt")
    again = trainer_on(tmp_path, {})
    for using in (again.resume, again.save):
        with pytest.raises(ValueError, match="not a whole checkpoint"):
            using()
    assert (last / "notes.txt").is_file()


def test_an_older_checkpoint_without_its_state_is_passed_over_too(tmp_path: Path) -> None:
    run(trainer_on(tmp_path, {}, keep=3), save_at=(2, 4, 6))
    (tmp_path / "checkpoints" / "last" / "model.safetensors").unlink()
    (tmp_path / "checkpoints" / "last-00000004" / "state.json").unlink()
    again = trainer_on(tmp_path, {}, keep=3)
    assert again.resume() and again.step == 2 and len(notes(tmp_path)) == 2


def test_as_many_checkpoints_as_asked_for_are_kept_newest_first(tmp_path: Path) -> None:
    trainer = trainer_on(tmp_path, {}, keep=3)
    run(trainer, save_at=(1, 2, 3, 5, 6))
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["last", "last-00000003", "last-00000005"]
    assert [checkpoint.verify(path)["step"] for path in (folder / "last", *checkpoint.older(folder / "last"))] == [6, 5, 3]


def test_a_checkpoint_written_in_the_background_is_of_the_step_at_which_it_was_asked_for(tmp_path: Path, monkeypatch: Any) -> None:
    moved, write = threading.Event(), checkpoint.write_tensors
    monkeypatch.setattr(checkpoint, "write_tensors", lambda *values: (moved.wait(30), write(*values))[1])
    trainer = trainer_on(tmp_path, {})
    steps = iter(trainer)
    next(steps), next(steps)
    expected = weights(trainer.objective)
    trainer.save(wait=False)
    next(steps), next(steps)  # weights move before the files are written
    moved.set()
    trainer.settle()
    saved = checkpoint.read(tmp_path / "checkpoints" / "last")
    assert saved.state["step"] == 2
    assert all(torch.equal(saved.tensors["model"][name], x) for name, x in expected.items())


# ---- being told to stop ---------------------------------------------------------------------------------------------------------------


def told(rank: int, world: int, folder: Path) -> tuple[int, bool]:
    """Rank 1 alone is told to stop in the middle of step 3."""
    stop = Stop()
    training = Training(steps=6, batch_size=BATCH, log_every=1)
    trainer = Trainer(build(), Rows("ab", mixed("ab"), batch_size=BATCH, rank=rank, world=world), training, folder=folder, stop=stop)
    for report in trainer:
        if report.step == 2 and rank == 1:
            stop.requested = True
    return trainer.step, trainer.stopping


def test_when_one_rank_is_told_to_stop_all_stop_after_the_same_step(tmp_path: Path) -> None:
    assert run_ranks(told, 2, tmp_path) == [(3, True), (3, True)]


class StopAt(Stop):
    """Is told to stop in the middle of a step: it is asked once in each."""

    def __init__(self, step: int):
        super().__init__()
        self.left = step

    def __getattribute__(self, name: str) -> Any:
        if name != "requested":
            return super().__getattribute__(name)
        self.left -= 1
        return self.left == 0


def trained(folder: Path, *, stop_at: int = 0, resume: bool = False, steps: int = 6) -> bool:
    settings = {"steps": steps, "batch_size": 8, "evaluate_every": 2, "save_every": 4, "log_every": 1, "schedule": "constant"}
    arguments = unflatten(RECIPES["linear_gaussian"], {"rows_in_all": 40, "samples": 2, "pseudo_inputs": 4, **settings})
    where = Where(run=str(folder), resume=str(folder) if resume else None, data=folder.parent / "data", evaluate=False)
    alone, console = Ranks(0, 0, 1), Console(quiet=True)
    prepared = prepare("linear_gaussian", arguments, where, alone, console=console)
    return train_prepared(prepared, where, alone, StopAt(stop_at), console=console)


def log_of(folder: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name != "rows_per_second"} for line in lines]


def test_a_run_stopped_where_an_evaluation_was_due_makes_it_up_and_logs_what_the_undisturbed_run_does(tmp_path: Path) -> None:
    assert trained(tmp_path / "whole")
    for stop_at in (2, 4):  # at 4 a save is due as well
        folder = tmp_path / str(stop_at)
        assert not trained(folder, stop_at=stop_at)
        assert trained(folder, resume=True)
        assert log_of(folder) == log_of(tmp_path / "whole")
        best = (checkpoint.read(path / "checkpoints" / "best") for path in (folder, tmp_path / "whole"))
        assert len({(saved.state["step"], saved.state["value"]) for saved in best}) == 1


@pytest.mark.parametrize(("fails_at", "saved"), [(4, 4), (6, 4), (8, 8)])
def test_an_evaluation_that_fails_loses_no_step_that_was_to_be_saved_and_the_resumed_run_is_the_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int, saved: int
) -> None:
    """At 4 and 8 a save is due as well; the one before 6 is from before the evaluation of its own step, which is then made again."""
    assert trained(tmp_path / "whole", steps=8)
    with monkeypatch.context() as patch:
        evaluate = Watch.evaluate

        def failing(watch: Watch) -> dict[str, float]:
            if watch.trainer.step == fails_at:
                raise OSError("the test rows are gone")
            return evaluate(watch)

        patch.setattr(Watch, "evaluate", failing)
        with pytest.raises(OSError, match="rows are gone"):
            trained(tmp_path / "parts", steps=8)
    for thread in threading.enumerate():
        if thread.name == WRITER:
            thread.join()
    assert checkpoint.read_state(tmp_path / "parts" / "checkpoints" / "last")["step"] == saved
    assert trained(tmp_path / "parts", steps=8, resume=True)
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")
    for name in ("last", "best"):
        one, two = (checkpoint.read(tmp_path / run / "checkpoints" / name) for run in ("parts", "whole"))
        assert (one.state["step"], one.state.get("value")) == (two.state["step"], two.state.get("value"))
        assert all(torch.equal(x, two.tensors["model"][key]) for key, x in one.tensors["model"].items())


def test_several_processes_need_a_name_for_the_run_that_all_of_them_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for rank in range(2):
        with pytest.raises(ValueError, match="2 processes share one run, .* add --run NAME"):
            prepare("linear_gaussian", {}, Where(), Ranks(rank, rank, 2), console=Console(quiet=True))
    assert list(tmp_path.iterdir()) == []


# ---- rows that cannot be read -----------------------------------------------------------------------------------------------------------


def on_damaged_shards(rank: int, world: int, folder: Path, until: int) -> tuple[list[float], list[str]]:
    """Two rows of the shards were altered; each rank meets those of its own share."""
    training = Training(steps=12, batch_size=16, damaged=2, log_every=1)
    rows = stream(folder / "shards", batch_size=16, rank=rank, world=world, damaged=2)
    trainer = Trainer(build(SHARDED), rows, training, folder=folder / "run")
    trainer.resume()
    losses = []
    for report in trainer:
        losses.append(report.loss)
        if report.step == until:
            break
    trainer.save()
    trainer.close()
    return losses, sorted(problem.row or "" for problem in rows.damaged)


def test_damaged_rows_are_passed_over_and_known_to_all_ranks_and_to_the_resumed_run(tmp_path: Path) -> None:
    for name in ("whole", "parts"):
        shards(tmp_path / name / "shards")
        path = tmp_path / name / "shards" / "train-000001.tar"
        content = bytearray(path.read_bytes())
        for place in (700, len(content) // 2):
            content[place] ^= 1
        path.write_bytes(content)
    losses, rows = on_damaged_shards(0, 1, tmp_path / "whole", 12)
    assert len(rows) == 2  # an epoch is 6 steps
    first = run_ranks(on_damaged_shards, 2, tmp_path / "parts", 8)
    assert first[0][1] == first[1][1] == rows
    rest, again = on_damaged_shards(0, 1, tmp_path / "parts", 12)
    assert again == rows and first[0][0] + rest == pytest.approx(losses, rel=1e-5)
    for name in ("whole", "parts"):  # once each, however often the run was resumed
        assert sum("another row stands in for one that cannot be read" in note for note in notes(tmp_path / name / "run")) == 2


def test_a_row_that_cannot_be_read_does_not_keep_a_training_from_beginning(tmp_path: Path) -> None:
    """The pseudo-inputs come from rows too: within the budget they pass over it, and without one the row is named."""
    shards(tmp_path / "shards")
    path = sorted((tmp_path / "shards").glob("train-*.tar"))[0]
    content = bytearray(path.read_bytes())
    content[700] ^= 1
    path.write_bytes(content)
    found = Manifest.load(tmp_path / "shards")

    def recipe(damaged: int) -> Recipe:
        return Recipe(lambda _: build(SHARDED), Training(steps=1, batch_size=16, damaged=damaged), shards=tmp_path / "shards")

    before = weights(build(SHARDED))
    after = weights(initial_objective(recipe(1), found))
    assert any(not torch.equal(before[name], after[name]) for name in before if name.startswith("pseudo"))
    with pytest.raises(ValueError, match="train-000000.tar"):
        initial_objective(recipe(0), found)
