"""A budget for damage: what cannot be read is named, counted and replaced, the same way for any ranks and workers, and never used."""

import itertools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from meme_dist.data.check import Problem
from meme_dist.data.fields import Field
from meme_dist.data.index import TAR_BLOCK, Manifest
from meme_dist.data.stream import Evaluation, Stream
from tests.data.tiny import row_numbers, unequal

LENGTHS = (8, 8, 8, 8)
ROWS = sum(LENGTHS)
KEYWORDS = {"batch_size": 8, "streams": 8, "seed": 1}
EPOCH = ROWS // 8  # steps


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return unequal(tmp_path, LENGTHS)


def flip(folder: Path, row: int, column: int, place: int = 0) -> None:
    """Another bit in the payload of one member."""
    manifest = Manifest.load(folder)
    path = manifest.path(manifest.shards("train")[row // 8])
    data = bytearray(path.read_bytes())
    data[int(manifest.index("train").records[row]["offset"][column]) + place] ^= 1
    path.write_bytes(data)


def places(folder: Path, steps: int, *, world: int = 1, state: dict | None = None, **keywords) -> tuple[list[int], list[list[Problem]]]:
    """The row at each place of the endless order, and what each rank reported."""
    found, reports = {}, []
    for rank in range(world):
        stream = Stream(folder, "train", rank=rank, world=world, **{**KEYWORDS, **keywords})
        if state:
            stream.load_state_dict(state)
        for step in itertools.islice(stream, steps):
            for batch in step:
                found |= dict(zip(batch.draw.tolist(), row_numbers(batch), strict=True))
        reports.append(list(stream.damaged))
    return [found[place] for place in sorted(found)], reports


def header(folder: Path) -> set[int]:
    flip(folder, 9, 1, -TAR_BLOCK + 3)
    return {9}


def payloads(folder: Path) -> set[int]:
    for row, column in ((1, 0), (1, 1), (11, 0), (30, 0)):  # row 1 twice: one row
        flip(folder, row, column, 130)
    return {1, 11, 30}


def cut(folder: Path) -> set[int]:
    offset = int(Manifest.load(folder).index("train").records[21]["offset"].max())
    path = folder / "train-000002.tar"
    path.write_bytes(path.read_bytes()[: offset + 10])
    return {21, 22, 23}


def gone(folder: Path) -> set[int]:
    (folder / "train-000001.tar").unlink()
    return set(range(8, 16))


def empty(folder: Path) -> set[int]:
    (folder / "train-000001.tar").write_bytes(b"")
    return set(range(8, 16))


def longer(folder: Path) -> set[int]:
    """Members behind the last row are no row's damage; they are never read."""
    with (folder / "train-000001.tar").open("ab") as file:
        file.write(b"x" * 1024)
    return set()


DAMAGES = (header, payloads, cut, gone, empty, longer)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_rows_are_replaced_in_their_places_and_all_others_stay_in_theirs(folder: Path, damage: Callable[[Path], set[int]]) -> None:
    whole, _ = places(folder, 2 * EPOCH)
    lost = damage(folder)
    found, [report] = places(folder, 2 * EPOCH, damaged=len(lost) or 1)
    for before, after in zip(whole, found, strict=True):
        assert (after == before) == (before not in lost) and after not in lost and after >= 0
    assert found[:ROWS] != found[ROWS:]
    replaced = {before: {after for b, after in zip(whole, found, strict=True) if b == before} for before in lost}
    assert all(len(substitutes) == 1 for substitutes in replaced.values())  # of (seed, row), not of the epoch
    named = {8 * int(problem.shard[6:12]) + int(problem.row or "") for problem in report}
    assert named == lost and len(report) == len(lost)


def test_each_damaged_row_is_named_with_shard_modality_and_cause(folder: Path) -> None:
    payloads(folder)
    _, [report] = places(folder, EPOCH, damaged=3)
    assert {(problem.shard, problem.row, problem.modality) for problem in report} == {
        ("train-000000.tar", "00000001", "left"),
        ("train-000001.tar", "00000003", "left"),
        ("train-000003.tar", "00000006", "left"),
    }
    assert all("expected bytes with checksum" in problem.message for problem in report)
    gone(folder)
    _, [report] = places(folder, EPOCH, damaged=10)
    assert Counter(problem.message for problem in report)["the shard is missing"] == 8


def test_the_same_rows_and_the_same_reports_on_any_ranks_and_workers(folder: Path) -> None:
    payloads(folder)
    cut(folder)
    alone, [report] = places(folder, 2 * EPOCH, damaged=6)
    assert len(report) == 6
    for world, workers in ((1, 2), (2, 0), (2, 1), (4, 2)):
        found, reports = places(folder, 2 * EPOCH, world=world, workers=workers, damaged=6)
        assert found == alone
        assert set(itertools.chain(*reports)) == set(report)


def test_the_substitute_depends_on_the_seed(folder: Path) -> None:
    gone(folder)
    first, second = (places(folder, EPOCH, damaged=8, seed=seed)[0] for seed in (1, 2))
    assert Counter(first) != Counter(second)


def test_without_a_budget_any_damage_stops_at_once_and_an_evaluation_has_none(folder: Path) -> None:
    payloads(folder)
    with pytest.raises(ValueError, match="train-00000..tar, row 000000.., modality left: .*shards check"):
        places(folder, EPOCH)
    with pytest.raises(ValueError, match="train-000000.tar, row 00000001, modality left"):
        list(Evaluation(folder, "train", batch_size=8))


@pytest.mark.parametrize("workers", [0, 2])
def test_beyond_the_budget_the_stream_stops_in_that_step_and_names_the_first(folder: Path, workers: int) -> None:
    _, [report] = (gone(folder), *places(folder, EPOCH, damaged=8))[1:]
    stream = Stream(folder, "train", workers=workers, damaged=3, **KEYWORDS)
    steps = 0
    with pytest.raises(ValueError, match="expected at most 3 damaged rows, got [4-8]: train-000001.tar, row .*: the shard is missing; "):
        for _ in stream:
            steps += 1
    assert stream.step == steps < EPOCH and list(stream.damaged)[:3] == report[:3]
    assert [str(problem) for problem in stream.damaged] == [str(problem) for problem in report[: len(stream.damaged)]]


def test_a_row_that_is_met_again_is_counted_once(folder: Path) -> None:
    payloads(folder)
    _, [report] = places(folder, 5 * EPOCH, damaged=3)
    assert len(report) == 3


@pytest.mark.parametrize("stop", range(1, EPOCH + 2))
def test_resumed_is_the_same_as_never_stopped_rows_and_reports_alike(folder: Path, stop: int) -> None:
    payloads(folder)
    whole, [report] = places(folder, 2 * EPOCH, damaged=3)
    begun = Stream(folder, "train", damaged=3, **KEYWORDS)
    for _ in itertools.islice(begun, stop):
        pass
    state = json.loads(json.dumps(begun.state_dict()))
    rest, [resumed] = places(folder, 2 * EPOCH - stop, state=state, damaged=3)
    assert rest == whole[8 * stop :] and resumed == report
    with pytest.raises(ValueError, match="expected at most 0 damaged rows|expected at most 1 damaged rows|shards check"):
        places(folder, 2 * EPOCH, state=state, damaged=1)


def test_what_other_ranks_met_can_be_counted_into_the_same_budget(folder: Path) -> None:
    payloads(folder)
    streams = [Stream(folder, "train", rank=rank, world=2, damaged=2, **KEYWORDS) for rank in range(2)]
    for stream in streams:
        for _ in itertools.islice(stream, EPOCH):
            pass
    both = [problem for stream in streams for problem in stream.damaged]
    assert len(both) == 3
    for stream in streams:
        with pytest.raises(ValueError, match="expected at most 2 damaged rows, got 3"):
            stream.admit(both)


def test_an_undecodable_datum_is_replaced_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Intact by its checksum, and refused by its field: row 5 holds a number that is none, row 4 lacks that modality."""
    with monkeypatch.context() as patch:
        patch.setattr(Field, "_check_values", lambda *_: None)
        folder = unequal(tmp_path, LENGTHS, poisoned=(4, 5))
    found, [report] = places(folder, EPOCH, damaged=3, workers=1)
    assert {(problem.row, problem.modality) for problem in report} == {("00000005", "left")} and len(found) == ROWS
    assert "expected finite numbers" in report[0].message and 5 not in found


def test_bytes_and_data_that_are_bad_in_one_part_have_the_same_substitutes_on_any_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Field, "_check_values", lambda *_: None)
        folder = unequal(tmp_path, LENGTHS, poisoned=(5,))
    payloads(folder)
    alone = places(folder, EPOCH, damaged=4)[0]
    assert all(places(folder, EPOCH, world=world, damaged=4)[0] == alone for world in (2, 4, 8))


def test_where_nothing_is_left_to_stand_in_the_stream_stops(folder: Path) -> None:
    for path in folder.glob("train-*.tar"):
        path.unlink()
    with pytest.raises(ValueError, match="it is damaged, and so are 64 rows that were tried in its place"):
        places(folder, 1, damaged=16)


def test_the_budget_is_bounded(folder: Path) -> None:
    for damaged in (-1, 17):
        with pytest.raises(ValueError, match=f"damaged: expected 0 to 16, half of the split's rows, got {damaged}"):
            Stream(folder, "train", damaged=damaged, **KEYWORDS)


def test_a_shard_that_vanishes_in_mid_epoch_costs_no_more_than_its_rows(folder: Path) -> None:
    stream = Stream(folder, "train", damaged=8, **KEYWORDS)
    steps = iter(stream)
    next(steps)
    lost = gone(folder)
    later = [number for step in itertools.islice(steps, 2 * EPOCH) for number in row_numbers(step[0])]
    assert not lost & set(later[2 * ROWS - 8 :]) and {problem.shard for problem in stream.damaged} == {"train-000001.tar"}
    strict = iter(Stream(unequal(folder / "again", LENGTHS), "train", **KEYWORDS))
    next(strict)
    gone(folder / "again")
    with pytest.raises(ValueError, match="train-000001.tar: expected a file of 20480 bytes, found none"):
        list(itertools.islice(strict, 2 * EPOCH))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_over_training_rows_has_the_same_budget(folder: Path, workers: int) -> None:
    """Classifiers and probes learn from training rows: a training that may lose some must not stop at its evaluation."""
    lost = payloads(folder)
    rows = [row for batch in Evaluation(folder, "train", batch_size=5, workers=workers, damaged=3) for row in row_numbers(batch)]
    rows = rows[:ROWS]  # the last batch is filled up
    assert [row for row in range(ROWS) if rows[row] != row] == sorted(lost) and not lost & set(rows)
    with pytest.raises(ValueError, match="expected at most 2 damaged rows, got 3"):
        list(Evaluation(folder, "train", batch_size=5, workers=workers, damaged=2))
