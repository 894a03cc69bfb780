"""A signal stops all ranks after the same step, only once, and everything is as before afterwards."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from meme_dist.train import signals
from meme_dist.train.signals import EXITS, SAVED, Stop, tell, told
from tests.ranks import run_ranks


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_sets_the_flag_and_nothing_else(number: signal.Signals) -> None:
    with Stop() as stop:
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.requested


def test_the_handlers_from_before_are_back_afterwards_also_after_an_error() -> None:
    before = [signal.getsignal(number) for number in signals.WATCHED]
    with Stop():
        assert [signal.getsignal(number) for number in signals.WATCHED] != before
    assert [signal.getsignal(number) for number in signals.WATCHED] == before
    with pytest.raises(KeyError), Stop():
        raise KeyError
    assert [signal.getsignal(number) for number in signals.WATCHED] == before


def test_echoes_of_the_first_signal_change_nothing_and_a_later_one_reaches_the_handler_from_before() -> None:
    heard: list[int] = []
    usual = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with Stop(echo=0.2) as stop:
            for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
                signal.raise_signal(number)
            assert stop.requested and heard == []
            time.sleep(0.25)
            signal.raise_signal(signal.SIGTERM)
            assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, usual)


def test_a_later_signal_ends_a_process_that_had_no_handler_before() -> None:
    lines = [
        "import os, signal, time",
        "from meme_dist.train.signals import Stop",
        "with Stop(echo=0.1):",
        "    os.kill(os.getpid(), signal.SIGTERM); print('saving', flush=True); time.sleep(0.2)",
        "    os.kill(os.getpid(), signal.SIGTERM); print('never', flush=True)",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "saving\n"), done.stderr


def test_a_second_interrupt_ends_at_once_unless_a_launcher_may_have_sent_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal's Ctrl-C reaches a launched process twice: from the terminal, and passed on by the launcher."""
    monkeypatch.setenv("RANK", "0")
    with Stop() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
    monkeypatch.delenv("RANK")
    with pytest.raises(KeyboardInterrupt), Stop():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def test_an_interrupt_that_a_shell_keeps_from_its_background_jobs_stays_ignored() -> None:
    usual = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Stop() as stop:
            signal.raise_signal(signal.SIGINT)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGINT, usual)


def test_another_thread_than_the_main_one_is_told_so() -> None:
    caught: list[str] = []

    def enter() -> None:
        try:
            with Stop():
                pass
        except ValueError as error:
            caught.append(str(error))

    thread = threading.Thread(target=enter, name="elsewhere")
    thread.start()
    thread.join()
    assert len(caught) == 1 and "main thread" in caught[0] and "'elsewhere'" in caught[0]


def stops_at(rank: int, world: int, signalled: int) -> int:
    """The step after which a rank stops, where one of them is signalled in its seventh."""
    with Stop() as stop:
        for step in range(1, 51):
            if step == 7 and rank == signalled:
                os.kill(os.getpid(), signal.SIGUSR1)
            flag = torch.tensor(float(stop.requested))
            torch.distributed.all_reduce(flag)
            if flag:
                return step
    return 0


@pytest.mark.parametrize("signalled", [0, 2])
def test_a_signal_to_one_rank_stops_all_of_them_after_the_same_step(signalled: int) -> None:
    assert run_ranks(stops_at, 3, signalled) == [7, 7, 7]


def test_ranks_tell_how_they_ended_and_a_killed_one_tells_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(EXITS, str(tmp_path))
    for rank, status in ((0, SAVED), (12, 1)):
        monkeypatch.setenv("RANK", str(rank))
        tell(status)
    (tmp_path / "rank-00003").touch()  # another one is just writing
    assert told(tmp_path) == {0: SAVED, 12: 1}


def test_telling_never_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(EXITS, raising=False)
    tell(0)
    monkeypatch.setenv(EXITS, str(tmp_path / "gone"))
    tell(0)
    assert list(tmp_path.iterdir()) == []
