"""Checkpoints are whole or not there, say what is wrong with them, and fit only what they were saved from."""

import errno
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from meme_dist.train import checkpoint
from meme_dist.train.checkpoint import Checkpoint, load_weights, locate, read, write
from meme_dist.train.trainer import Trainer, Training
from meme_dist.train.training import FREE
from tests.ranks import forkserver
from tests.trainings import Rows, build, mixed, weights


def version(number: int) -> Checkpoint:
    """A small checkpoint all of whose parts say which one it is."""
    return Checkpoint({"model": {"w": torch.full((8,), float(number))}, "optimizer": {"w/step": torch.tensor(number)}}, {"step": number})


def number_in(folder: Path) -> int:
    """Which version lies there; fails where its parts disagree."""
    found = read(folder)
    numbers = {int(found.state["step"]), int(found.tensors["optimizer"]["w/step"]), *map(int, found.tensors["model"]["w"])}
    assert len(numbers) == 1
    return numbers.pop()


def trainer(
    folder: Path | None = None,
    *,
    names: str = "ab",
    configuration: dict[str, Any] | None = None,
    defaults: dict[str, Any] | None = None,
    **settings: Any,
) -> Trainer:
    training = Training(**({"steps": 9, "batch_size": 8, "ema": 0.9} | settings))
    rows = Rows(names, mixed(names), batch_size=training.batch_size)
    return Trainer(build(names), rows, training, folder=folder, configuration=configuration, defaults=defaults)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The folder of a run that was saved after two steps."""
    first = trainer(tmp_path)
    for report in first:
        if report.step == 2:
            break
    first.save()
    return tmp_path


# ---- whole or not there -------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """What stands for SIGKILL: no handler of the code under test may see it."""


class Reaper:
    """Dies before the n-th operation on the file system, in the middle of it where it has one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int):
        self.at, self.done = at, 0
        monkeypatch.setattr(
            checkpoint, "_write_file", self.around(checkpoint._write_file, lambda path, content: path.write_bytes(content[:9]))
        )
        monkeypatch.setattr(checkpoint, "sync", self.around(checkpoint.sync))
        monkeypatch.setattr(checkpoint.os, "rename", self.around(os.rename))
        monkeypatch.setattr(checkpoint.shutil, "rmtree", self.around(shutil.rmtree, self.half_remove))

    def around(self, operation: Callable[..., Any], half: Callable[..., Any] = lambda *_, **__: None) -> Callable[..., Any]:
        def call(*values: Any, **keywords: Any) -> Any:
            self.done += 1
            if self.done == self.at:
                half(*values)
                raise Killed
            return operation(*values, **keywords)

        return call

    @staticmethod
    def half_remove(folder: Path, *_: Any) -> None:
        for file in sorted(folder.iterdir())[:1] if folder.exists() else []:
            file.unlink()


def write_until(folder: Path, number: int, at: int) -> bool:
    """Write a version, dying at an operation; whether it was finished."""
    with pytest.MonkeyPatch.context() as patch:
        Reaper(patch, at)
        try:
            write(folder, version(number))
        except Killed:
            return False
    return True


@pytest.mark.parametrize("name", ["last", "lr[0.1]", "a b"])
def test_killed_at_any_operation_and_again_at_any_a_whole_checkpoint_is_there(tmp_path: Path, monkeypatch: Any, name: str) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # for the time it takes; a killed process loses nothing that it gave to the system
    write(tmp_path / "count" / name, version(0))
    operations = next(at - 1 for at in range(1, 99) if write_until(tmp_path / "count" / name, at, at))
    assert operations >= 8
    for first in range(1, operations + 3):
        for second in range(1, operations + 3):
            folder = tmp_path / f"{first}-{second}" / name
            write(folder, version(1))
            newest = 2 if write_until(folder, 2, first) else 1
            assert number_in(folder) in {newest, 2}
            newest = max(newest, number_in(folder))
            finished = write_until(folder, 3, second)
            assert number_in(folder) in ({3} if finished else {newest, 3})
            write(folder, version(4))
            assert number_in(folder) == 4
            assert [path.name for path in folder.parent.iterdir()] == [name]


def save_for_ever(folder: Path) -> None:
    number = int(read(folder).state["step"])
    while True:
        number += 1
        big = torch.full((50_000,), float(number))
        write(folder, Checkpoint({"model": {"w": big}, "optimizer": {"w/step": torch.tensor(number)}}, {"step": number}))


def test_sigkill_while_saving_over_and_over_leaves_a_whole_checkpoint_each_time(tmp_path: Path) -> None:
    folder, reached = tmp_path / "last", 0
    write(folder, version(0))
    for pause in (0.05, 0.011, 0.023):
        process = forkserver().Process(target=save_for_ever, args=(folder,))
        process.start()
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and checkpoint.read_state(_stable(folder))["step"] == reached:
            time.sleep(0.001)
        time.sleep(pause)
        process.kill()
        process.join()
        assert number_in(folder) > reached
        reached = number_in(folder)


def _stable(folder: Path) -> Path:
    """`folder`, or where it is for the moment that it is being replaced."""
    while True:
        found = locate(folder)
        try:
            if found is not None and checkpoint.read_state(found):
                return found
        except (FileNotFoundError, ValueError):
            pass


def test_reading_while_a_training_replaces_it_gives_one_whole_checkpoint(tmp_path: Path, monkeypatch: Any) -> None:
    folder = tmp_path / "last"
    write(folder, version(1))
    original, calls = checkpoint._read_tensors, []

    def replaced_meanwhile(*values: Any) -> Any:
        calls.append(values)
        if len(calls) == 2:  # model.safetensors of version 1 has been read
            write(folder, version(2))
        return original(*values)

    monkeypatch.setattr(checkpoint, "_read_tensors", replaced_meanwhile)
    assert number_in(folder) == 2
    assert len(calls) == 4


@pytest.mark.parametrize("broken", ["model", "optimizer", "state"])
def test_a_full_disk_leaves_the_checkpoint_before_and_says_what_is_needed(tmp_path: Path, monkeypatch: Any, broken: str) -> None:
    folder = tmp_path / "last"
    write(folder, version(1))
    whole = checkpoint._write_file

    def out_of_space(path: Path, content: bytes) -> str:
        if path.stem == broken:
            path.write_bytes(content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole(path, content)

    monkeypatch.setattr(checkpoint, "_write_file", out_of_space)
    with pytest.raises(
        OSError, match=r"last: no space left: this checkpoint needs 40 bytes, [\d,]+ are free .* before it is intact"
    ) as error:
        write(folder, version(2))
    assert error.value.errno == errno.ENOSPC
    assert number_in(folder) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["last"]  # what was half written no longer takes space


def test_a_checkpoint_is_safetensors_and_json_with_the_checksum_of_each_file(saved: Path) -> None:
    folder = saved / "checkpoints" / "last"
    files = {path.name for path in folder.iterdir()}
    assert files == {"model.safetensors", "ema.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"}
    assert set(json.loads((folder / "state.json").read_text())["sha256"]) == files - {"state.json"}
    with safetensors.safe_open(folder / "optimizer.safetensors", "pt") as file:
        names = set(file.keys())
    parameters = set(dict(build().named_parameters()))
    state = read(folder).state
    assert state["step"] == state["stream"]["step"] == 2  # what was trained on, not what was read
    assert names == {f"{name}/{kind}" for name in parameters for kind in ("exp_avg", "exp_avg_sq", "step")}


# ---- damaged ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["model", "ema", "optimizer", "random"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_damaged_file_is_named_and_nothing_is_loaded(saved: Path, file: str, damage: str) -> None:
    path = saved / "checkpoints" / "last" / f"{file}.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes({"cut": content[:-9], "flipped": content, "gone": b""}[damage])
    if damage == "gone":
        path.unlink()
    again = trainer(saved)
    before = weights(again.objective)
    with pytest.raises(ValueError, match=rf"{file}.safetensors: (cut or altered: sha256|this file of the checkpoint is missing)"):
        again.resume()
    assert again.step == 0 and all(torch.equal(p, before[name]) for name, p in again.objective.named_parameters())


@pytest.mark.parametrize("damage", ["cut", "edited", "future"])
def test_a_damaged_state_is_named(saved: Path, damage: str) -> None:
    path = saved / "checkpoints" / "last" / "state.json"
    state = json.loads(path.read_text())
    if damage == "future":
        state.pop("digest")
        state["format"] = 2
        state["digest"] = checkpoint._digest_of(state)
    text = json.dumps(state)
    path.write_text({"cut": text[:-20], "edited": text.replace('"step": 2', '"step": 3', 1), "future": text}[damage])
    expected = {"cut": "cut or altered", "edited": "altered after it was written", "future": "format 2, this version reads format 1"}
    with pytest.raises(ValueError, match=f"state.json: .*{expected[damage]}"):
        trainer(saved).resume()


def test_no_checkpoint_is_said_with_the_folder(tmp_path: Path) -> None:
    for reading in (read, lambda folder: load_weights(build(), folder)):
        with pytest.raises(FileNotFoundError, match="nowhere: no checkpoint here; expected a folder with state.json"):
            reading(tmp_path / "nowhere")


def test_a_folder_of_something_else_is_neither_read_nor_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for using in (lambda: write(tmp_path, version(1)), lambda: read(tmp_path), lambda: trainer().resume(tmp_path)):
        with pytest.raises(ValueError, match=r"not a whole checkpoint \(state.json is missing\); nothing was touched"):
            using()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


# ---- of something else --------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_model_lists_the_first_differences(saved: Path) -> None:
    with pytest.raises(ValueError, match="model.safetensors: checkpoint of another model; ") as error:
        trainer(saved, names="abc").resume()
    message = str(error.value)
    assert "9 missing: modalities.c.encoder.1.weight; " in message and message.count("modalities.c.") == 4 and "; and 5 more" in message
    with pytest.raises(ValueError, match=r"9 missing: modalities.c.* \| 9 unexpected: modalities.b.decoder.0.bias; "):
        load_weights(build("a" + "c"), saved / "checkpoints" / "last")
    small = build(pseudo_inputs=3)
    before = weights(small)
    with pytest.raises(ValueError, match=r"2 different: pseudo.a.inputs \(4, 3\) float32 where the model has \(3, 3\) float32"):
        load_weights(small, saved / "checkpoints" / "last")
    assert all(torch.equal(p, before[name]) for name, p in small.named_parameters())
    with pytest.raises(ValueError, match="float32 where the model has .* float64"):
        load_weights(build().double(), saved / "checkpoints" / "last")


def test_resuming_into_changed_settings_names_them_with_both_values(tmp_path: Path) -> None:
    recipe = {"latent_dim": 2, "network": {"hidden": (6, 7)}, "workers": 0}
    trainer(tmp_path, configuration=recipe).save()
    same = trainer(tmp_path, configuration={**recipe, "workers": 3}, save_every=7, log_every=3, accumulate=2, steps=11)
    assert same.resume()
    changed = trainer(tmp_path, configuration={"latent_dim": 2, "network": {"hidden": (6, 8)}, "extra": True}, learning_rate=0.1, ema=None)
    with pytest.raises(ValueError, match="cannot resume into changed settings, ") as error:
        changed.resume()
    message = str(error.value)
    for change in (
        "training.learning_rate: 0.0005 in the checkpoint, 0.1 now",
        "training.ema: 0.9 in the checkpoint, None now",
        "network.hidden: [6, 7] in the checkpoint, [6, 8] now",
        "extra: (absent) in the checkpoint, True now",
    ):
        assert change in message
    assert "latent_dim" not in message and "workers" not in message


def test_a_checkpoint_older_than_a_setting_had_its_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as then:
        then.setattr("meme_dist.train.training.FREE", (*FREE, "precision", "weight_decay"))  # these settings were not there yet
        trainer(tmp_path, configuration={"latent_dim": 2}).save()
    known = {"latent_dim": 3, "network": {"hidden": (6, 7)}, "training.weight_decay": 0.1}
    with pytest.raises(ValueError, match=r"network.hidden: \[6, 7\] in the checkpoint, \[9\] now"):
        trainer(tmp_path, configuration={"latent_dim": 2, "network": {"hidden": (9,)}}, defaults=known, weight_decay=0.1).resume()
    with pytest.raises(ValueError, match=r"weight_decay: 0.1 in the checkpoint, 0.0 now"):
        trainer(tmp_path, configuration={"latent_dim": 2, "network": {"hidden": (6, 7)}}, defaults=known).resume()
    assert trainer(tmp_path, configuration={"latent_dim": 2, "network": {"hidden": (6, 7)}}, defaults=known, weight_decay=0.1).resume()


def test_resuming_on_another_stream_is_refused_before_anything_changes(saved: Path) -> None:
    again = trainer(saved)
    before = weights(again.objective)

    def refuse(state: dict[str, Any]) -> None:
        raise ValueError(f"stream: shards were {state['batch_size']}")

    again.stream.load_state_dict = refuse
    with pytest.raises(ValueError, match="stream: shards were 8"):
        again.resume()
    assert again.step == 0 and all(torch.equal(p, before[name]) for name, p in again.objective.named_parameters())


# ---- last and best ------------------------------------------------------------------------------------------------------------------


def test_best_is_replaced_by_better_values_only_and_apart_from_last(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    kept = [run.save_best(value) for report, value in zip(run, (0.3, 0.2, float("nan"), 0.3, 0.5), strict=False)]
    assert kept == [True, False, False, False, True]
    best = read(tmp_path / "checkpoints" / "best").state
    assert (best["step"], best["value"]) == (5, 0.5)
    assert not (tmp_path / "checkpoints" / "last").exists()
    run.save()
    again = trainer(tmp_path)
    assert again.resume() and not again.save_best(0.4) and again.save_best(0.6)  # the value outlives the process


@pytest.mark.parametrize("damage", ["cut", "no value"])
def test_a_damaged_best_is_replaced_by_any_value(tmp_path: Path, damage: str) -> None:
    run = trainer(tmp_path)
    next(iter(run))
    assert run.save_best(1.0)
    path = tmp_path / "checkpoints" / "best" / "state.json"
    state = json.loads(path.read_text())
    state = {name: entry for name, entry in state.items() if name not in ("value", "digest")}
    path.write_text(path.read_text()[:-30] if damage == "cut" else json.dumps({**state, "digest": checkpoint._digest_of(state)}))
    assert run.save_best(0.5) and read(tmp_path / "checkpoints" / "best").state["value"] == 0.5


@pytest.mark.parametrize(
    ("steps", "keep", "left"),
    [
        ((100, 200, 200), 2, [200, 100]),  # told to stop right after a save
        ((100, 200, 300, 250), 3, [250, 200, 100]),  # 300 was damaged, so the run went on from 200
        ((100, 200, 300, 50), 3, [50]),
    ],
)
def test_a_checkpoint_of_a_step_that_was_gone_back_from_takes_no_place(
    tmp_path: Path, steps: tuple[int, ...], keep: int, left: list[int]
) -> None:
    for step in steps:
        write(tmp_path / "last", version(step), keep=keep)
    assert [number_in(path) for path in (tmp_path / "last", *checkpoint.older(tmp_path / "last"))] == left


def test_a_step_just_saved_is_not_saved_again_unless_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, saves, whole = trainer(tmp_path), [], checkpoint.commit

    def commit(*values: Any, **keywords: Any) -> None:
        saves.append(values)
        if len(saves) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        whole(*values, **keywords)

    monkeypatch.setattr(checkpoint, "commit", commit)
    steps = iter(run)
    next(steps)
    run.save(wait=False)
    run.save()
    assert len(saves) == 1
    next(steps)
    with pytest.raises(OSError, match="Input/output"):
        run.save()
    run.save()
    assert len(saves) == 3 and read(tmp_path / "checkpoints" / "last").state["step"] == 2


def test_an_export_is_one_file_with_the_weights_that_load_weights_takes(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    next(iter(run))
    run.save()
    last = tmp_path / "checkpoints" / "last"
    for averaged in (True, False):
        out, other = tmp_path / f"{averaged}.safetensors", build(seed=5)
        assert checkpoint.export(last, out, averaged=averaged) == 1
        load_weights(other, last, averaged=averaged)
        exported = safetensors.torch.load_file(out)
        assert exported.keys() == other.state_dict().keys()
        assert all(torch.equal(exported[name], x) for name, x in other.state_dict().items())
    with pytest.raises(ValueError, match="True.safetensors: exists already"):
        checkpoint.export(last, tmp_path / "True.safetensors")


def test_load_weights_gives_the_average_where_there_is_one_and_the_weights_when_asked(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    next(iter(run))
    run.save()
    live = weights(run.objective)
    with run.averaged():
        average = weights(run.objective)
    for averaged, expected in ((True, average), (False, live)):
        other = build(seed=5)
        assert load_weights(other, tmp_path / "checkpoints" / "last", averaged=averaged) == 1
        assert all(torch.equal(p, expected[name]) for name, p in other.named_parameters())
    plain = trainer(tmp_path / "plain", ema=None)
    plain.save()
    other = build(seed=5)
    assert load_weights(other, tmp_path / "plain" / "checkpoints" / "last") == 0
    assert all(torch.equal(p, q) for p, q in zip(other.parameters(), plain.objective.parameters(), strict=True))
