"""One training at a time in a run's folder, whoever asks and however the one before ended."""

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from meme_dist.cli import main
from meme_dist.train import claim
from meme_dist.train.claim import FILE, Claim
from meme_dist.train.signals import EXITS
from meme_dist.train.trainer import Trainer
from tests.ranks import forkserver, run_ranks

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--rows-in-all", "40", "--samples", "2", "--pseudo-inputs", "4", "--latent-dim", "2", "--batch-size", "8", "--log-every", "1"]
WORDS = ["train", "linear_gaussian", *TINY, "--steps", "4", "--save-every", "1", "--no-evaluate", "--run"]


def hold(folder: Path, ready: Any) -> None:
    with Claim() as held:
        held.take(folder)
        ready.set()
        time.sleep(600)


def test_a_folder_is_one_processs_until_it_is_given_back_or_the_process_is_killed(tmp_path: Path) -> None:
    context = forkserver()
    ready = context.Event()
    process = context.Process(target=hold, args=(tmp_path, ready))
    process.start()
    assert ready.wait(30)
    with Claim() as mine:
        assert mine.take(tmp_path) == f"process {process.pid} on {socket.gethostname()}" and not mine.held
        with pytest.raises(ValueError, match=f"being trained by process {process.pid} on .* go on with --resume"):
            mine.begin(tmp_path)
        process.kill()
        process.join()
        assert mine.take(tmp_path) is None and mine.held
        with Claim() as other:
            assert other.take(tmp_path) == f"process {os.getpid()} on {socket.gethostname()}"
    with Claim() as later:
        assert later.take(tmp_path) is None


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_storage_that_knows_no_locks_refuses_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(file: int, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(claim.fcntl, "flock", refuse)
    with Claim() as mine:
        mine.begin(tmp_path)
        assert not mine.held


def test_a_supervised_launch_waits_for_the_one_before_it_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(EXITS, str(tmp_path))
    before = Claim()
    before.take(tmp_path)
    threading.Timer(0.5, before.__exit__, (None, None, None)).start()
    with Claim() as mine:
        mine.begin(tmp_path)
        assert mine.held


# ---- trainings --------------------------------------------------------------------------------------------------------------------


def written(run: Path) -> dict[str, Any]:
    """What a training leaves that does not depend on when it ran, or on draws in its process before it."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    log = [{name: value for name, value in line.items() if name != "rows_per_second"} for line in lines]
    stored = {
        str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*.safetensors")) if path.name != "random.safetensors"
    }
    assert len(stored) >= 4  # weights and optimizer, last and best
    return {"log": log, **stored}


def test_a_second_training_of_a_live_run_is_refused_and_the_first_is_as_if_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*WORDS, "alone"]) == 0
    assert main([*WORDS, "first"]) == 0 and written(Path("runs/first")) == written(Path("runs/alone"))
    shutil.rmtree("runs/first")
    seconds: list[subprocess.CompletedProcess[str]] = []
    save = Trainer.save

    def meanwhile(trainer: Trainer, **keywords: Any) -> None:
        save(trainer, **keywords)
        if trainer.step == 2:
            words = [sys.executable, "-m", "meme_dist", "train", "--resume", "first", "--no-evaluate"]
            path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
            seconds.append(subprocess.run(words, capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": path}))

    monkeypatch.setattr(Trainer, "save", meanwhile)
    assert main([*WORDS, "first"]) == 0
    (second,) = seconds
    assert second.returncode == 2, second.stdout + second.stderr
    assert (
        f"is being trained by process {os.getpid()} on {socket.gethostname()}" in second.stderr and "--resume runs/first" in second.stderr
    )
    assert written(Path("runs/first")) == written(Path("runs/alone"))
    monkeypatch.setattr(Trainer, "save", save)
    assert main(["train", "--resume", "first", "--no-evaluate"]) == 0  # it has ended, and is anybody's again
    assert (Path("runs/first") / FILE).is_file()


def resume(rank: int, world: int, home: Path) -> int:
    os.chdir(home)
    return main(["train", "--resume", "r", "--no-evaluate"])


def test_all_ranks_end_where_the_first_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*WORDS, "r"]) == 0
    with Claim() as live:
        live.take(tmp_path / "runs" / "r")
        assert run_ranks(resume, 2, tmp_path) == [2, 2]
    assert run_ranks(resume, 2, tmp_path) == [0, 0]
