"""The supervisor starts again what died, and only that; the launches are small fakes of a launcher and its ranks."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from meme_dist import record, supervise
from meme_dist.leave import status_of
from meme_dist.run import run_folder
from meme_dist.supervise import JOURNAL, Attempt, Limits, Supervisor, folder_of, main, pause, progress, resuming, run_of, verdict

QUICK = Limits(budget=2, pause=0.0, failing=1.0, stopping=2.0)
# A rank of a fake training: `begin` makes the run, `save(step)` a checkpoint, `end(status)` leaves its status as a rank does.
RANK = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
run = Path(sys.argv[sys.argv.index("--run") + 1])
count = len((run / "attempts").read_text()) if (run / "attempts").exists() else 0
def begin():
    run.mkdir(parents=True, exist_ok=True)
    (run / "run.json").write_text("{}")
    (run / "attempts").write_text("x" * (count + 1))
    (run / f"words-{count}").write_text(" ".join(sys.argv[1:]))
def save(step):
    (run / "checkpoints" / "last").mkdir(parents=True, exist_ok=True)
    (run / "checkpoints" / "last" / "state.json").write_text(json.dumps({"step": step}))
def end(status, launcher=None):
    Path(os.environ["MEME_DIST_EXITS"], f"rank-{int(os.environ.get('RANK', 0)):05d}").write_text(str(status))
    sys.exit(status if launcher is None else launcher)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run's folder; launches do not pay for torch, which they do not use."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs" / "tried"


def command(body: str, run: Path) -> list[str]:
    return [sys.executable, "-c", RANK + textwrap.dedent(body), "train", "digits", "--run", str(run)]


def events(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / JOURNAL).read_text().splitlines()]


def kinds(run: Path) -> list[str]:
    return [event["event"] for event in events(run)]


def left(run: Path) -> list[str]:
    """Processes that still carry the mark of a launch of this run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            found += [path.parent.name] if f"MEME_DIST_EXITS={run.parent}".encode() in path.read_bytes() else []
        except OSError:
            continue
    return found


# ---- what became of a launch ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "ranks", "stopped", "expected"),
    [
        (0, {}, False, "done"),
        (0, {0: 0, 1: 0}, False, "done"),
        (1, {0: 2, 1: 2}, False, "mistake"),  # a launcher ends with 1 whatever happened
        (2, {}, False, "mistake"),
        (1, {0: 2}, False, "mistake"),  # the others were ended by the launcher
        (1, {0: 75, 1: 75}, False, "stopped"),
        (1, {0: 75, 1: 0}, False, "stopped"),
        (75, {}, False, "stopped"),
        (-15, {}, True, "stopped"),  # told to stop before it could save
        (1, {0: 2}, True, "mistake"),
        (0, {0: 0}, True, "done"),  # it was at its end anyway
        (1, {}, False, "crash"),
        (-9, {}, False, "crash"),
        (1, {0: 75, 1: 124}, False, "crash"),
        (1, {0: 0}, False, "crash"),  # rank 1 was killed
        (0, {0: 1}, False, "crash"),  # a launcher that hides it
    ],
)
def test_what_became_of_a_launch(status: int, ranks: dict[int, int], stopped: bool, expected: str) -> None:
    assert verdict(Attempt(status, ranks, 1.0), stopped=stopped) == expected


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.ENOENT, errno.EROFS, errno.EEXIST])
def test_what_only_a_person_can_put_right_is_not_tried_again(number: int) -> None:
    assert status_of(OSError(number, os.strerror(number))) == 2
    assert status_of(ValueError("a wrong flag")) == 2


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET, None])
def test_what_may_work_again_is_a_crash_and_tried_again(number: int | None) -> None:
    error = OSError("storage was gone") if number is None else OSError(number, os.strerror(number))
    assert verdict(Attempt(1, {0: status_of(error)}, 1.0), stopped=False) == "crash"


def test_the_pause_doubles_up_to_the_longest() -> None:
    assert [pause(Limits(pause=10, longest=100), crashes) for crashes in range(7)] == [10, 10, 20, 40, 80, 100, 100]


def test_the_run_is_read_from_the_command_and_is_where_the_program_puts_it(folder: Path) -> None:
    assert (
        run_of(["train", "digits", "--run", "a"]) == run_of(["train", "--run=a"]) == run_of(["train", "--resume", "a", "--run", "b"]) == "a"
    )
    Path("here").mkdir()
    Path("here", record.FILE).touch()
    for name in ("a", "runs/a", "here", "here/run.json", "/tmp/a"):
        assert folder_of(name) == run_folder(name)
    with pytest.raises(ValueError, match="add --run NAME"):
        run_of(["train", "digits", "--run"])


def test_progress_is_the_step_of_the_newest_checkpoint(folder: Path) -> None:
    assert progress(folder) == -1
    for name, text in (
        ("last", '{"step": 7}'),
        ("last-00000005", '{"step": 5}'),
        ("last.1.partial", '{"step": 9}'),
        ("best", '{"step": 8}'),
    ):
        (folder / "checkpoints" / name).mkdir(parents=True)
        (folder / "checkpoints" / name / "state.json").write_text(text)
    assert progress(folder) == 7
    (folder / "checkpoints" / "last" / "state.json").write_text('{"step"')
    assert progress(folder) == 5


def test_a_relaunch_resumes_a_run_that_exists_and_nothing_else(folder: Path) -> None:
    words = ["accelerate", "launch", "-m", "meme_dist", "train", "digits", "--run", str(folder)]
    assert resuming(words, folder) == words
    folder.mkdir(parents=True)
    (folder / record.FILE).touch()
    assert resuming(words, folder) == [*words, "--resume", str(folder)]
    again = ["train", f"--resume={folder}"]
    assert resuming(again, folder) == again


# ---- the loop ---------------------------------------------------------------------------------------------------------------------


def test_a_crash_is_followed_by_a_fresh_launch_that_resumes(folder: Path) -> None:
    body = "begin(); save(10 * count); end(0) if count == 2 else os.kill(os.getpid(), signal.SIGKILL)"
    assert Supervisor(command(body, folder), QUICK).run() == 0
    assert kinds(folder) == ["launch", "crash", "launch", "crash", "launch", "done"]
    words = [(folder / f"words-{attempt}").read_text() for attempt in range(3)]
    assert words == [f"train digits --run {folder}", *[f"train digits --run {folder} --resume {folder}"] * 2]
    assert [event["status"] for event in events(folder) if "status" in event] == [-9, -9, 0]
    assert [event["step"] for event in events(folder)] == [-1, 0, 0, 10, 10, 20]


def test_crashes_without_progress_use_up_the_budget_and_progress_fills_it(folder: Path) -> None:
    """Three crashes at step 0, of which the first makes progress (a first checkpoint); one at 5, and three more: the third is too many."""
    body = "begin(); save(5 if count > 2 else 0); end(1)"
    assert Supervisor(command(body, folder), QUICK).run() == 1
    assert kinds(folder).count("launch") == 3 + 1 + 3 and kinds(folder)[-1] == "hopeless"


def test_a_launch_that_never_gets_anywhere_is_given_up(folder: Path) -> None:
    assert Supervisor(command("end(1)", folder), QUICK).run() == 1
    assert not folder.exists() and list(folder.parent.iterdir()) == []  # nothing is left beside the run either


@pytest.mark.parametrize(("status", "expected"), [(2, 2), (75, 75)])
def test_mistakes_and_saved_runs_are_not_started_again_though_the_launcher_says_1(folder: Path, status: int, expected: int) -> None:
    assert Supervisor(command(f"begin(); end({status}, launcher=1)", folder), QUICK).run() == expected
    assert kinds(folder) == ["launch", {2: "mistake", 75: "stopped"}[status]]
    assert events(folder)[-1]["ranks"] == {"0": status}


def test_a_run_that_exists_is_gone_on_with_only_where_that_is_said(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / record.FILE).touch()
    for again, words in ((False, f"train digits --run {folder}"), (True, f"train digits --run {folder} --resume {folder}")):
        body = "begin(); (run / 'seen').write_text(' '.join(sys.argv[1:])); end(0)"
        assert Supervisor(command(body, folder), Limits(again=again)).run() == 0
        assert (folder / "seen").read_text() == words


ORPHANS = """
begin()
ranks = [subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"],
                          env={**os.environ, "RANK": str(rank)}, start_new_session=True) for rank in range(2)]
time.sleep(0.3)
"""


def test_ranks_that_hang_after_another_failed_are_killed_with_all_that_came_of_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "LAST_WORDS", 0.5)
    start = time.monotonic()
    body = ORPHANS + "Path(os.environ['MEME_DIST_EXITS'], 'rank-00002').write_text('1'); [rank.wait() for rank in ranks]"
    assert Supervisor(command(body, folder), Limits(budget=0, pause=0.0, failing=0.5)).run() == 1
    assert left(folder) == [] and time.monotonic() - start < 15
    assert events(folder)[1]["ranks"] == {"2": 1}


def test_ranks_that_outlive_their_launcher_are_killed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "LAST_WORDS", 0.5)
    assert Supervisor(command(ORPHANS + "os.kill(os.getpid(), signal.SIGKILL)", folder), Limits(budget=0, pause=0.0)).run() == 1
    assert left(folder) == []


# ---- storage that is away for a moment --------------------------------------------------------------------------------------------


def faltering(call: Callable[..., Any], *, seen: list[int]) -> Callable[..., Any]:
    """Fails the first time and every other: each call once, before it works."""

    def called(*arguments: Any, **keywords: Any) -> Any:
        seen.append(len(seen))
        if len(seen) % 2:
            raise OSError(errno.ESTALE, "Stale file handle")
        return call(*arguments, **keywords)

    return called


@pytest.mark.parametrize("what", ["told", "progress", "open"])
def test_storage_that_fails_for_a_moment_ends_no_launch_and_changes_no_verdict(
    folder: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr("meme_dist.data.retry.FIRST_WAIT", 0.01)
    monkeypatch.setattr(supervise, "POLL", 0.02)
    seen: list[int] = []
    monkeypatch.setattr(supervise, what, faltering(getattr(supervise, what, open), seen=seen), raising=False)
    body = "begin(); save(10 * count); time.sleep(0.3); (run / f'whole-{count}').touch(); end(0 if count == 2 else 1)"
    assert Supervisor(command(body, folder), Limits(budget=1, pause=0.0)).run() == 0
    assert kinds(folder) == ["launch", "crash", "launch", "crash", "launch", "done"] and len(seen) >= 6
    assert all((folder / f"whole-{count}").exists() for count in range(3))  # none was ended before its time
    assert [event["step"] for event in events(folder)] == [-1, 0, 0, 10, 10, 20]
    assert [event["ranks"] for event in events(folder) if "ranks" in event] == [{"0": 1}, {"0": 1}, {"0": 0}]


def test_a_launch_whose_ranks_cannot_be_asked_counts_as_a_crash(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(folder: Path) -> dict[int, int]:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("meme_dist.data.retry.FIRST_WAIT", 0.01)
    monkeypatch.setattr(supervise, "told", away)
    assert Supervisor(command("begin(); end(0)", folder), Limits(budget=0, pause=0.0)).run() == 1
    assert kinds(folder) == ["launch", "crash", "hopeless"] and events(folder)[1]["ranks"] is None


# ---- a supervisor that was killed -------------------------------------------------------------------------------------------------

ALONE = """
def lives(process):
    try:
        return (Path("/proc") / process / "environ").read_bytes() != b""
    except OSError:
        return False
begin()
with open(run / "processes", "a+") as file:
    file.seek(0)
    beside = [process for process in file.read().split() if lives(process)]
    file.write(f"{os.getpid()}\\n")
(run / f"beside-{count}").write_text(" ".join(beside))
heard = []
signal.signal(signal.SIGTERM, lambda *_: heard.append(1)); (run / f"ready-{count}").touch()
while count == 0 and not heard: time.sleep(0.05)
time.sleep(0.5)
save(7 + count)
end(0 if count else 75)
"""


def test_what_a_killed_supervisor_left_has_saved_and_ended_before_anything_is_launched(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = command(ALONE, folder)
    environment = {**os.environ, "PYTHONPATH": str(Path(supervise.__file__).parents[1])}
    first = subprocess.Popen([sys.executable, "-m", "meme_dist.supervise", "--", *words], env=environment)
    try:
        deadline = time.monotonic() + 30
        while not (folder / "ready-0").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert main(["--again", "--", *words]) == 2 and not (folder / "ready-1").exists()
        assert f"process {first.pid} on {socket.gethostname()} supervises this run already" in capfd.readouterr().err
        first.kill()
        first.wait()
        mine = folder.with_name(f".{folder.name}-original")  # a name like those of the folders for exits, and somebody's files
        mine.mkdir()
        (mine / "thesis.tex").touch()
        assert len(left(folder)) == 1
        assert Supervisor(words, Limits(again=True)).run() == 0
        assert [(folder / f"beside-{count}").read_text() for count in range(2)] == ["", ""]
        assert kinds(folder) == ["orphans", "launch", "done"] and [event.get("step") for event in events(folder)] == [None, 7, 8]
        assert sorted(folder.parent.iterdir()) == [mine, folder] and list(mine.iterdir()) == [mine / "thesis.tex"]
    finally:
        first.kill()
        for process in left(folder):
            os.kill(int(process), signal.SIGKILL)


def test_the_processes_of_a_run_of_a_longer_name_are_none_of_this_one(folder: Path) -> None:
    for run, exits, own in (
        ("a", "a-abcd1234", True),
        ("a", "a-b-abcd1234", False),
        ("a-b", "a-b-abcd1234", True),
        ("a", "ba-abcd1234", False),
    ):
        process = subprocess.Popen(["sleep", "60"], env={"MEME_DIST_EXITS": str(folder.parent / f".{exits}")})
        try:
            while not Path(f"/proc/{process.pid}/environ").read_bytes():  # empty for a moment after it was started
                time.sleep(0.01)
            assert (process.pid in supervise.Orphans(folder.with_name(run)).processes()) == own
        finally:
            process.kill()
            process.wait()


# ---- signals ----------------------------------------------------------------------------------------------------------------------

SAVES = """
import threading
rank = '''
import os, signal, sys, time
from pathlib import Path
heard = []
signal.signal(signal.SIGTERM, lambda *a: heard.append(1)); Path(sys.argv[1], "ready-" + os.environ["RANK"]).touch()
while not heard: time.sleep(0.05)
time.sleep(0.3)
Path(sys.argv[1], "heard-" + os.environ["RANK"]).write_text(str(len(heard)))
Path(os.environ["MEME_DIST_EXITS"], "rank-0000" + os.environ["RANK"]).write_text("75")
sys.exit(75)
'''
begin()
def started(i):
    return subprocess.Popen([sys.executable, "-c", rank, str(run)], env={**os.environ, "RANK": str(i)}, start_new_session=True)
ranks = [started(0), started(1)]
[rank.wait() for rank in ranks]
sys.exit(1)
"""


def signal_later(holds: Sequence[Path], number: int) -> threading.Thread:
    """Signal this process as soon as these files are there."""

    def wait() -> None:
        deadline = time.monotonic() + 30
        while not all(path.exists() for path in holds) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_reaches_every_rank_once_and_the_launcher_not_at_all(folder: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    thread = signal_later([folder / "ready-0", folder / "ready-1"], number)
    assert Supervisor(command(SAVES, folder), QUICK).run() == 75
    thread.join()
    assert [(folder / f"heard-{rank}").read_text() for rank in range(2)] == ["1", "1"]
    assert kinds(folder) == ["launch", "stopped"] and events(folder)[-1]["status"] == 1  # the launcher came to its own end
    assert signal.getsignal(number) == before


def test_ranks_that_do_not_stop_in_time_are_killed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "LAST_WORDS", 0.3)
    body = ORPHANS + "(run / 'ready').touch(); [rank.wait() for rank in ranks]"
    thread = signal_later([folder / "ready"], signal.SIGTERM)
    start = time.monotonic()
    assert Supervisor(command(body, folder), Limits(stopping=0.5)).run() == 75
    thread.join()
    assert left(folder) == [] and time.monotonic() - start < 15


def test_a_signal_in_the_pause_ends_it(folder: Path) -> None:
    thread = signal_later([folder / "attempts"], signal.SIGTERM)
    start = time.monotonic()
    assert Supervisor(command("begin(); end(1)", folder), Limits(pause=60)).run() == 75
    thread.join()
    assert time.monotonic() - start < 30


# ---- the command ------------------------------------------------------------------------------------------------------------------


def test_the_program_runs_a_command_and_explains_what_it_lacks(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--pause", "0.1", "--", *command("begin(); print('trained'); end(0)", folder)]
    environment = {**os.environ, "PYTHONPATH": str(Path(supervise.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-m", "meme_dist.supervise", *words], capture_output=True, text=True, timeout=60, env=environment
    )
    assert (done.returncode, done.stdout) == (0, "trained\n"), done.stderr
    assert "supervise: done: step -1" in done.stderr
    for wrong, part in (([], "no command"), (["--", "train"], "--run NAME"), (["--", "no-such-program", "--run", "a"], "no-such-program")):
        assert main(wrong) == 2
        assert part in capfd.readouterr().err
