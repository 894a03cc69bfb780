"""Ranks change nothing in what is made of a trained model either, and where one fails all end and one says why."""

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from meme_dist import figures
from meme_dist.assess import assess_stored, check_judges
from meme_dist.cli import main
from meme_dist.data.index import Manifest
from meme_dist.data.sets.linear_gaussian import linear_gaussian
from meme_dist.data.shards import Dataset, write_shards
from meme_dist.data.stream import Evaluation
from meme_dist.draws import save_draws
from meme_dist.evaluate import Measures
from meme_dist.impute import _Rows, _source, impute, impute_h5mu
from meme_dist.metrics.generation import CHUNK, imputations, joint_generations
from meme_dist.ranks import Processes, joined
from meme_dist.stored import load
from tests import ranks
from tests.test_cli import FIELDS, rows
from tests.trainings import SHARDED, build

ROOT = Path(__file__).resolve().parents[1]
run_ranks = functools.partial(ranks.run_ranks, timeout=200.0)
TINY = ["--samples", "2", "--pseudo-inputs", "4", "--latent-dim", "3", "--batch-size", "8", "--steps", "4"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with labelled shards of eight rows (five to train, three to test), and a run of `auto` on them."""
    folder = tmp_path_factory.mktemp("home")
    write_shards(Dataset("scans", FIELDS, rows, ("dark", "bright")), folder / "shards", rows_per_shard=8)
    with contextlib.chdir(folder):
        assert main(["train", "auto", "--shards", str(folder / "shards"), *TINY, "--run", "first", "--no-evaluate"]) == 0
    return folder


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 rows to train and 22 to test in three modalities, in shards of 40 rows: three and one, the last of each not full."""
    folder = tmp_path_factory.mktemp("linear") / "shards"
    write_shards(linear_gaussian(rows=90, missing=0.3), folder, rows_per_shard=40)
    return folder


def commands(rank: int, world: int, folder: Path, lines: list[list[str]]) -> list[tuple[int, str]]:
    """Exit status and output of each command on this rank; an evaluation measures little of each thing."""
    recipes = importlib.import_module("meme_dist.recipes.auto")
    recipes.Measures = functools.partial(Measures, joint_draws=700, likelihood_samples=(1, 4))
    figures.tsne = figures.pca  # which takes seconds less
    os.chdir(folder)
    done = []
    for words in lines:
        text = io.StringIO()
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            done.append((main(words), text.getvalue()))
    return done


def digests(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Every number and word of a JSON value, with its place."""
    if isinstance(value, dict | list):
        for name, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(part, f"{place}/{name}")
    else:
        yield place, value


# ---- the same, whatever the number of ranks ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(home: Path) -> dict[int, list[list[tuple[int, str]]]]:
    """By number of ranks: what `evaluate`, `generate` and `impute` said on each rank. Results of w ranks are kept as results-w.json."""
    said = {}
    for world in (1, 2, 3):
        lines = [
            ["evaluate", "first"],
            ["generate", "first", "--num", "150", "--out", f"drawn-{world}"],
            ["impute", "first", "--shards", "shards", "--out", f"whole-{world}"],
        ]
        said[world] = run_ranks(commands, world, home, lines)
        (home / "runs/first/results.json").rename(home / f"results-{world}.json")
    return said


def test_every_rank_ends_well_and_rank_0_alone_says_what_was_made(made: dict[int, list[list[tuple[int, str]]]]) -> None:
    for said in made.values():
        assert all(status == 0 for rank in said for status, _ in rank)
        assert "report.md" in said[0][0][1] and "Cross coherence" in said[0][0][1]
        assert "draws.safetensors" in said[0][1][1] and "filled in" in said[0][2][1]
        assert [text for rank in said[1:] for _, text in rank] == [""] * 3 * len(said[1:])


@pytest.mark.parametrize("world", [2, 3])
def test_results_of_an_evaluation_are_those_of_one_process_to_1e_6(home: Path, made: Any, world: int) -> None:
    one, many = (dict(leaves(json.loads((home / f"results-{ranks}.json").read_text()))) for ranks in (1, world))
    assert many.keys() == one.keys() and len(one) > 100
    counts = [place for place in one if not isinstance(one[place], float)]
    assert {place: many[place] for place in counts} == {place: one[place] for place in counts}
    numbers = [place for place in one if isinstance(one[place], float)]
    assert {place: many[place] for place in numbers} == pytest.approx({place: one[place] for place in numbers}, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("what", ["whole", "drawn"])
def test_imputed_shards_and_generated_rows_are_the_same_byte_by_byte(home: Path, made: Any, what: str, world: int) -> None:
    assert digests(home / f"{what}-1") == digests(home / f"{what}-{world}")
    assert main(["shards", "check", str(home / "whole-1")]) == 0
    assert [path.name for path in home.iterdir() if path.name.startswith(".")] == []


def fill_in(rank: int, world: int, shards: Path, out: Path) -> dict[str, tuple[int, int, int]]:
    with joined(rank, rank, world) as processes:
        return {
            split: tuple(filled)
            for split, filled in impute(build(SHARDED), Manifest.load(shards).fields, shards, out, seed=3, processes=processes).items()
        }


@pytest.mark.parametrize("world", [2, 4])  # of three shards and one: 2 + 1, and more ranks than shards
def test_ranks_write_the_shards_that_one_writer_writes_row_after_row(linear: Path, tmp_path: Path, world: int) -> None:
    manifest = Manifest.load(linear)
    objective = build(SHARDED)
    source = {**_source(objective, manifest), "draws": 1, "seed": 3}
    alone = Dataset(f"{manifest.name}_imputed", manifest.fields, _Rows(objective, manifest, 3), manifest.classes, source)
    write_shards(alone, tmp_path / "alone", rows_per_shard=40)
    found = run_ranks(fill_in, world, linear, tmp_path / "together")
    assert digests(tmp_path / "together") == digests(tmp_path / "alone") and len(digests(tmp_path / "alone")) == 7
    assert [found[0]] * world == found and all(there + filled == 3 * rows for rows, there, filled in found[0].values())
    before, after = Manifest.load(linear).index("train"), Manifest.load(tmp_path / "together").index("train")
    assert [after.key(row) for row in range(90)] == [before.key(row) for row in range(90)]
    assert not before.observed.all() and after.observed.all()
    rows, whole = (next(iter(Evaluation(folder, "train", batch_size=90, seed=3))) for folder in (linear, tmp_path / "together"))
    for name, made in imputations(build(SHARDED), rows).items():
        there = rows.observed[:, SHARDED.index(name), None]
        torch.testing.assert_close(whole.dense(name), torch.where(there, rows.dense(name), made[0]), rtol=1e-5, atol=1e-6)


def fill_in_file(rank: int, world: int, shards: Path, out: Path) -> dict[str, Any]:
    how = {"draws": 9, "interval": 0.8, "seed": 3}
    with joined(rank, rank, world) as processes:
        return impute_h5mu(build(SHARDED), Manifest.load(shards).fields, shards, out, **how, processes=processes)


def test_ranks_write_the_file_of_cells_that_one_writes(linear: Path, tmp_path: Path) -> None:
    """Blocks of 40, 40, 10 and 22 rows: two turns of three ranks, two of them without a block in the second."""
    h5py = pytest.importorskip("h5py")
    one, many = tmp_path / "one.h5mu", tmp_path / "many.h5mu"
    found = impute_h5mu(build(SHARDED), Manifest.load(linear).fields, linear, one, draws=9, interval=0.8, seed=3)
    assert run_ranks(fill_in_file, 3, linear, many) == [found] * 3 and sorted(tmp_path.iterdir()) == [many, one]
    with h5py.File(one) as expected, h5py.File(many) as made:
        for name in SHARDED:
            for place in ("X", "layers/lower", "layers/upper", "obs/observed"):
                np.testing.assert_array_equal(made[f"mod/{name}/{place}"][:], expected[f"mod/{name}/{place}"][:])


def fill_in_twice(rank: int, world: int, shards: Path, out: Path) -> tuple[bool, list[int]]:
    first = fill_in(rank, world, shards, out)
    times = [path.stat().st_mtime_ns for path in sorted(out.iterdir())]
    again = fill_in(rank, world, shards, out)
    return again == first, [time - path.stat().st_mtime_ns for time, path in zip(times, sorted(out.iterdir()), strict=True)]


def test_shards_that_are_there_already_are_not_written_again(linear: Path, tmp_path: Path) -> None:
    assert run_ranks(fill_in_twice, 2, linear, tmp_path / "out") == [(True, [0] * 7)] * 2


def test_the_file_of_draws_is_what_safetensors_writes_and_a_draw_does_not_depend_on_how_many_there_are(home: Path, made: Any) -> None:
    stored = load(home / "runs/first")
    draws = joint_generations(stored.objective, 150)
    save_file(draws, home / "expected.safetensors")
    assert (home / "drawn-3/draws.safetensors").read_bytes() == (home / "expected.safetensors").read_bytes()
    assert load_file(home / "drawn-3/draws.safetensors")["scan"].shape == (150, 1, 4, 4) and CHUNK < 150 < 3 * CHUNK
    for first, num in ((0, 5), (3, 1), (60, 40), (128, 22)):
        part = joint_generations(stored.objective, num, first=first)
        assert all(torch.equal(part[name], x[first : first + num]) for name, x in draws.items())


def test_shares_are_contiguous_cover_everything_once_and_the_first_is_never_smaller() -> None:
    for number, world in itertools.product(range(12), range(1, 6)):
        shares = Processes(0, world).shares(number)
        assert [thing for share in shares for thing in share] == list(range(number)) and len(shares) == world
        assert all(len(a) >= len(b) for a, b in itertools.pairwise(shares))


# ---- one fails, all end -----------------------------------------------------------------------------------------------------------------


def damaged(home: Path, tmp_path: Path, file: str) -> Path:
    """The shards with one byte changed."""
    folder = tmp_path / "damaged"
    folder.mkdir()
    for path in (home / "shards").iterdir():
        content = bytearray(path.read_bytes())
        if path.name == file:
            content[700] ^= 1
        (folder / path.name).write_bytes(content)
    return folder


@pytest.mark.parametrize(("file", "teller"), [("train-000000.tar", 0), ("train-000004.tar", 1), ("test-000002.tar", 1)])
def test_a_damaged_shard_on_one_rank_ends_all_is_told_once_and_leaves_nothing(home: Path, tmp_path: Path, file: str, teller: int) -> None:
    shards = damaged(home, tmp_path, file)
    said = run_ranks(commands, 2, home, [["impute", "first", "--shards", str(shards), "--out", str(tmp_path / "out" / "filled")]])
    assert [status for ((status, _),) in said] == [2, 2]
    assert said[teller][0][1].startswith(f"error: rank {teller} of 2: {file}, row ") and said[1 - teller][0][1] == ""
    assert list((tmp_path / "out").iterdir()) == []


def evaluate_damaged(rank: int, world: int, home: Path, shards: Path) -> tuple[str, int]:
    """Evaluate on other shards than the run's; error, and the status of the results file."""
    from rich.console import Console

    from meme_dist.assess import assess_stored

    try:
        with joined(rank, rank, world) as processes:
            stored = load(home / "runs/first")._replace(manifest=Manifest.load(shards), folder=shards)
            console = Console(file=io.StringIO())
            assess_stored(stored, home / "data", seed=None, processes=processes, console=console)
    except Exception as error:
        return f"{type(error).__name__}: {error}", len(list(shards.glob("results.json")))
    return "", 1


def test_a_rank_that_fails_between_two_sums_brings_the_others_down(home: Path, tmp_path: Path) -> None:
    shards = damaged(home, tmp_path, "test-000002.tar")
    said = run_ranks(evaluate_damaged, 3, home, shards)
    (teller,) = (rank for rank, (text, _) in enumerate(said) if text.startswith(f"ValueError: rank {rank} of 3: test-000002.tar, row "))
    assert [text for rank, text in enumerate(said) if rank != teller] == [(f"Elsewhere: rank {teller} failed", 0)] * 2


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["evaluate", "frist"], "no run there"),
        (["generate", "first", "--out", "shards"], "exists already"),
        (["impute", "first", "--shards", "shards", "--out", "runs"], "expected an empty or new folder"),
    ],
)
def test_what_is_wrong_on_all_ranks_is_told_once(home: Path, words: list[str], part: str) -> None:
    said = run_ranks(commands, 2, home, [words])
    assert [status for ((status, _),) in said] == [2, 2]
    assert said[0][0][1].startswith("error: rank 0 of 2: ") and part in said[0][0][1] and said[1][0][1] == ""


def test_a_judge_of_other_fields_or_classes_is_refused_before_anything_is_trained(home: Path, tmp_path: Path) -> None:
    stored = load(home / "runs/first")
    others = {
        "other classes": (FIELDS, rows, ("dark", "bright", "grey"), "the classes of the run, .*'dark', 'bright'.*, got .*'grey'"),
        "no classes": (FIELDS, lambda split: (row._replace(label=None) for row in rows(split)), (), "the classes of the run.*got \\[\\]"),
    }
    for name, (fields, made, classes, said) in others.items():
        write_shards(Dataset("scans", fields, made, classes), tmp_path / name)
        with pytest.raises(ValueError, match=f"{name}: expected a judge with {said}.*; judge by a run on rows of"):
            assess_stored(stored, tmp_path / "cache", seed=None, judges=Manifest.load(tmp_path / name), console=Console(quiet=True))
    scan = dataclasses.replace(FIELDS["scan"], likelihood="normal")
    for fields, said in (
        ({**FIELDS, "scan": scan}, "likelihood of scan of the run, 'laplace', got 'normal'"),
        ({"scan": scan}, "modalities"),
    ):
        with pytest.raises(ValueError, match=f"expected a judge with the {said}"):
            check_judges(dataclasses.replace(stored.manifest, fields=fields), stored.manifest)
    check_judges(stored.manifest, stored.manifest)
    assert not (tmp_path / "cache").exists()


def fail(rank: int, world: int, who: Sequence[int]) -> tuple[str, float]:
    """Some fail outside of agreed work; what each raised, and when. Who tells it takes half a second for that."""
    text = ""
    try:
        with joined(rank, rank, world):
            if rank in who:
                raise ValueError("the sums are wrong")
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    time.sleep(0.5 * text.startswith("ValueError"))
    return text, time.monotonic()


@pytest.mark.parametrize("who", [(0,), (2,), (0, 1, 2)])
def test_an_error_outside_of_agreed_work_is_told_once_and_the_others_stay_until_it_is_told(who: Sequence[int]) -> None:
    said = run_ranks(fail, 3, who)
    ((teller, told),) = [(rank, end) for rank, (text, end) in enumerate(said) if text.startswith("ValueError")]
    assert teller in who and said[teller][0] == f"ValueError: rank {teller} of 3: the sums are wrong"
    others = [said[rank] for rank in range(3) if rank != teller]
    assert [text for text, _ in others] == [f"Elsewhere: rank {teller} failed"] * 2 and all(end > told for _, end in others)


def one_is_killed(rank: int, world: int, folder: Path) -> None:
    """Killed between two shards: nothing of what stands in `finally` runs there."""
    try:
        with joined(rank, rank, world) as processes:
            processes.reduce(torch.ones(1))
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            with processes.agreed():
                pass
    except Exception as error:
        (folder / f"{rank}.txt").write_text(f"{type(error).__name__}: {error}")


def test_a_killed_rank_is_missed_at_once(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="rank 1 of 3: died with exit code -9"):
        run_ranks(one_is_killed, 3, tmp_path)
    said = sorted(path.read_text() for path in tmp_path.iterdir())
    assert len(said) == 2 and said[0].startswith("Elsewhere") and "another process ended or does not answer" in said[1]


def unforeseen(rank: int, world: int) -> tuple[str, list[str]]:
    try:
        with joined(rank, rank, world) as processes, processes.agreed():
            if rank == 1:
                raise ZeroDivisionError("a mistake of ours")
    except Exception as error:
        return f"{type(error).__name__}: {error}", getattr(error, "__notes__", [])
    return "", []


def test_an_error_that_is_not_foreseen_keeps_its_kind_and_gets_its_rank() -> None:
    assert run_ranks(unforeseen, 2) == [("Elsewhere: rank 1 failed", []), ("ZeroDivisionError: a mistake of ours", ["on rank 1 of 2"])]


def own_disks(rank: int, world: int, folder: Path, shards: Path) -> str:
    (folder / str(rank)).mkdir()
    os.chdir(folder / str(rank))
    try:
        fill_in(rank, world, shards, Path("out"))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_ranks_that_do_not_share_a_disk_are_told_so(linear: Path, tmp_path: Path) -> None:
    first, second = run_ranks(own_disks, 2, tmp_path, linear)
    assert first == "Elsewhere: rank 1 failed" and f"rank 1 of 2: {tmp_path / '1'}" in second
    assert "storage that all processes share" in second
    assert [path for path in tmp_path.rglob("*") if path.parent != tmp_path] == []


def no_room(rank: int, world: int, folder: Path, shards: Path) -> str:
    """Rank 1's disk is full at its first shard."""
    from meme_dist.data import shards as module

    write, written = module._write_shard, []

    def refuse(*values: Any) -> np.ndarray:
        written.append(values)
        if rank == 1:
            raise OSError(28, "No space left on device")
        return write(*values)

    module._write_shard = refuse
    try:
        fill_in(rank, world, shards, folder / "out")
    except Exception as error:
        return f"{len(written)} {type(error).__name__}: {error}"
    return ""


def test_a_full_disk_on_one_rank_stops_the_others_at_the_same_shard_and_leaves_nothing(linear: Path, tmp_path: Path) -> None:
    first, second = run_ranks(no_room, 2, tmp_path, linear)
    assert first == "1 Elsewhere: rank 1 failed"  # of the three shards that are its own
    assert second.startswith("1 OSError: rank 1 of 2: [Errno 28] No space left on device: ") and "nothing is left of it" in second
    assert list(tmp_path.iterdir()) == []


def save_some(rank: int, world: int, home: Path, folder: Path) -> str:
    """Rank 1 cannot write its second chunk."""
    from meme_dist import draws as module

    made = []

    def refuse(*values: Any, **keywords: Any) -> dict[str, torch.Tensor]:
        made.append(keywords)
        if rank == 1 and len(made) == 2:
            raise ValueError("no more")
        return joint_generations(*values, **keywords)

    module.joint_generations = refuse
    try:
        with joined(rank, rank, world) as processes:
            save_draws(load(home / "runs/first"), folder / "drawn", num=4 * CHUNK, seed=0, processes=processes)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_draws_of_which_one_share_fails_are_not_there(home: Path, tmp_path: Path) -> None:
    assert run_ranks(save_some, 2, home, tmp_path) == ["Elsewhere: rank 1 failed", "ValueError: rank 1 of 2: no more"]
    assert list(tmp_path.iterdir()) == []


# ---- the real launcher ------------------------------------------------------------------------------------------------------------------


def launched(home: Path, words: list[str]) -> subprocess.CompletedProcess[str]:
    config = str(ROOT / "launch" / "accelerate" / "cpu2.yaml")
    command = ["accelerate.commands.launch", "--config_file", config, "--main_process_port", "0", "-m", "meme_dist", *words]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", *command], cwd=home, env=environment, capture_output=True, text=True, timeout=100)


@pytest.mark.launch
def test_two_launched_processes_impute_the_shards_of_one(home: Path, made: Any) -> None:
    done = launched(home, ["impute", "first", "--shards", "shards", "--out", "launched"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("filled in") == 2 and done.stdout.count("train") == 1  # a line for each split
    assert digests(home / "launched") == digests(home / "whole-1")
