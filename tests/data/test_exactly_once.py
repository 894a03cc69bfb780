"""Seven shards of unequal length, any ranks and workers, interrupted anywhere: every row once an epoch, and nothing ever hangs."""

import itertools
import random
from collections import Counter
from pathlib import Path

import pytest

from meme_dist.data.shards import check_shards, write_shards
from meme_dist.data.stream import Evaluation, Stream
from tests.data.tiny import counted, row_numbers, unequal

LENGTHS = (1, 9, 2, 5, 13, 3, 4)
ROWS = sum(LENGTHS)  # 37: no batch size ends with an epoch
STEPS = 8  # of 12 rows: two epochs and a half
KEYWORDS = {"batch_size": 12, "streams": 12, "seed": 4}  # as many streams as rows a step: a row's draw is its place in the endless order


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = unequal(tmp_path_factory.mktemp("exactly-once"), LENGTHS)
    assert check_shards(folder) == (ROWS, len(LENGTHS), ())
    return folder


def places(folder: Path, first: int, last: int, *, world: int, workers: int, state: dict | None = None) -> tuple[dict[int, int], dict]:
    """Which row stands at each place of steps first..last, over all ranks, and the state of rank 0 behind them."""
    found: dict[int, int] = {}
    for rank in reversed(range(world)):
        stream = Stream(folder, "train", rank=rank, world=world, workers=workers, **KEYWORDS)
        if state is not None:
            stream.load_state_dict(state)
        for step in itertools.islice(stream, last - first):
            for batch in step:
                here = dict(zip(batch.draw.tolist(), row_numbers(batch), strict=True))
                assert not here.keys() & found.keys()
                found |= here
    return found, stream.state_dict()


def check(found: dict[int, int]) -> None:
    assert sorted(found) == list(range(STEPS * 12))
    for epoch in range(2):
        seen = Counter(found[place] for place in range(epoch * ROWS, (epoch + 1) * ROWS))
        assert seen == Counter(range(ROWS)), epoch
    assert set(Counter(found[place] for place in range(2 * ROWS, STEPS * 12)).values()) == {1}


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_row_once_an_epoch_although_interrupted_and_resumed_on_other_ranks(folder: Path, world: int, workers: int) -> None:
    chance = random.Random(f"{world} {workers}")
    stop = chance.randrange(1, STEPS)
    before, state = places(folder, 0, stop, world=world, workers=workers)
    others, helpers = chance.choice([number for number in (1, 2, 3, 4) if number != world]), chance.choice([0, 1])
    after, _ = places(folder, stop, STEPS, world=others, workers=helpers, state=state)
    assert not before.keys() & after.keys()
    check(before | after)
    assert before | after == places(folder, 0, STEPS, world=1, workers=0)[0]


def test_interrupted_behind_every_single_step_and_resumed_on_other_ranks_each_time(folder: Path) -> None:
    found: dict[int, int] = {}
    state, chance = None, random.Random(0)
    for step in range(STEPS):
        here, state = places(folder, step, step + 1, world=chance.choice([1, 2, 3, 4]), workers=0, state=state)
        found |= here
    check(found)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 3, 4])
def test_an_evaluation_reads_every_row_exactly_once(folder: Path, world: int, workers: int) -> None:
    ranks = [Evaluation(folder, "train", batch_size=3, rank=rank, world=world, workers=workers) for rank in range(world)]
    batches = [list(evaluation) for evaluation in ranks]
    assert {len(rank) for rank in batches} == {-(-ROWS // (3 * world))}
    rows = [number for turn in zip(*batches, strict=True) for batch in turn for number in row_numbers(batch) if number >= 0]
    assert rows == list(range(ROWS))


@pytest.mark.parametrize("lengths", [(5,), (1,), (1, 1, 1), (1,) * 9, (6, 1)], ids=str)
def test_fewer_shards_than_workers_and_shards_of_one_row_neither_hang_nor_lose_a_row(tmp_path: Path, lengths: tuple[int, ...]) -> None:
    """Four ranks with two workers each: eight readers."""
    folder, rows = unequal(tmp_path, lengths), sum(lengths)
    found: dict[int, int] = {}
    for rank in range(4):
        stream = Stream(folder, "train", batch_size=8, streams=8, seed=0, rank=rank, world=4, workers=2 if rank == 1 else 0)
        for step in itertools.islice(stream, 5):
            found |= dict(zip(step[0].draw.tolist(), row_numbers(step[0]), strict=True))
    for epoch in range(40 // rows):
        assert sorted(found[place] for place in range(epoch * rows, (epoch + 1) * rows)) == list(range(rows))
    for rank in (0, 3):
        assert len(list(Evaluation(folder, "train", batch_size=2, rank=rank, world=4, workers=2))) == -(-rows // 8)


def test_several_folders_hold_every_row_once_too(tmp_path: Path) -> None:
    ends = [0, 4, 5, 12]
    for number, (low, high) in enumerate(itertools.pairwise(ends)):
        write_shards(counted(low, high), tmp_path / f"set-{number}", rows_per_shard=3, splits=["train"])
    stream = Stream(tmp_path / "set-{0..2}", "train", batch_size=4, streams=4, seed=0, workers=1)
    rows = [number for step in itertools.islice(stream, 6) for number in row_numbers(step[0])]
    assert sorted(rows[:12]) == sorted(rows[12:]) == list(range(12))
