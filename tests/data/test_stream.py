"""The order of rows is arithmetic: the same for any number of ranks and workers, each row once an epoch, resumed from one integer."""

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meme_dist.data.fields import SPECIAL, Field
from meme_dist.data.index import Manifest
from meme_dist.data.order import Order, default_streams, permutation
from meme_dist.data.shards import Dataset, Row, write_shards
from meme_dist.data.stream import Evaluation, Stream
from meme_dist.types import Batch

WORDS = (*SPECIAL, "even", "odd")
FIELDS = {
    "number": Field("vector", (2,), "npy", "normal"),
    "picture": Field("image", (1, 3, 4), "png", "laplace"),
    "name": Field("text", (2,), "txt", "categorical", WORDS),
}
ROWS = {"train": 96, "test": 50}


@cache
def datum(number: int) -> Row:
    """Row `number`: its number is written in each modality that is there."""
    picture = torch.full((1, 3, 4), number, dtype=torch.uint8)
    data = {"number": torch.tensor([number, 0.5]), "picture": picture, "name": WORDS[3 + number % 2]}
    for absent in [["number"], ["picture", "name"], [], ["name"], [], ["picture"], []][number % 7]:
        del data[absent]
    return Row(data, number % 2)


def dataset(rows: dict[str, int]) -> Dataset:
    return Dataset("numbers", FIELDS, lambda split: (datum(number) for number in range(rows[split])), WORDS[3:])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 rows in 12 equal shards for training; 50 rows in 7 uneven ones for evaluation."""
    path = tmp_path_factory.mktemp("stream") / "shards"
    write_shards(dataset(ROWS), path, rows_per_shard=8)
    return path


def label_of(batch: Batch) -> torch.Tensor:
    assert batch.label is not None
    return batch.label


def numbers(batch: Batch) -> list[int]:
    """Which row of the data set each row of a batch is: read off the content, every modality having to agree."""
    readings: list[set[int]] = [set() for _ in batch.draw]
    for name, reading in (("number", lambda x: x[:, 0].round()), ("picture", lambda x: (x[:, 0, 0, 0] * 255).round())):
        column = list(batch.modalities).index(name)
        for place, value in enumerate(reading(batch.dense(name)).long().tolist()):
            if batch.observed[place, column]:
                readings[place].add(value)
    assert all(len(reading) == 1 for reading in readings), readings
    found = [reading.pop() for reading in readings]
    for place, number in enumerate(found):
        row = datum(number)
        assert batch.observed[place].tolist() == [name in row.data for name in FIELDS], number
        assert label_of(batch)[place] == number % 2
        if "name" in row.data:
            assert batch.dense("name")[place].tolist() == FIELDS["name"].decode(FIELDS["name"].encode(row.data["name"])).tolist()
    return found


def steps(stream: Stream, count: int) -> list[list[Batch]]:
    return list(itertools.islice(stream, count))


def global_numbers(folder: Path, count: int, *, world: int = 1, split: str = "train", **keywords) -> list[list[int]]:
    """The rows of each global batch, rank by rank and micro batch by micro batch."""
    ranks = [steps(Stream(folder, split, rank=rank, world=world, **keywords), count) for rank in range(world)]
    return [[number for rank in ranks for batch in rank[step] for number in numbers(batch)] for step in range(count)]


# ---- order: pure arithmetic ---------------------------------------------------------------------------------------------------------

orders = st.builds(Order, st.integers(1, 70), st.integers(1, 9), st.integers(0, 99), st.integers(1, 12), st.integers(1, 6))


def take(order: Order, stream: int, count: int, start: int = 0) -> list[int]:
    return list(itertools.islice(itertools.chain.from_iterable(window.tolist() for window in order.windows(stream, start)), count))


@settings(max_examples=100, deadline=None)
@given(orders)
def test_each_epoch_of_the_endless_order_holds_every_row_exactly_once_for_any_sizes(order: Order) -> None:
    epochs, length = 3, -(-3 * order.rows // order.streams) + 1
    streams = [take(order, stream, length) for stream in range(order.streams)]
    line = [streams[place % order.streams][place // order.streams] for place in range(epochs * order.rows)]
    for epoch in range(epochs):
        assert sorted(line[epoch * order.rows : (epoch + 1) * order.rows]) == list(range(order.rows))


@settings(max_examples=100, deadline=None)
@given(orders, st.integers(0, 8), st.integers(0, 200))
def test_seeking_is_the_same_as_reading_and_throwing_away(order: Order, stream: int, start: int) -> None:
    stream %= order.streams
    assert take(order, stream, 20, start) == take(order, stream, start + 20)[start:]


def test_seeking_a_billion_steps_ahead_takes_no_longer() -> None:
    order = Order.of(rows=1_000_003, row_bytes=4000, streams=64, seed=0)
    assert len(set(take(order, 5, 100, 10**12))) == 100


def test_order_differs_between_epochs_and_seeds_and_leaves_no_neighbours_together() -> None:
    order = Order.of(rows=20_000, row_bytes=4000, streams=16, seed=0)
    first, second, other = take(order, 0, 1250), take(order, 0, 1250, 1250), take(Order(*vars(order).values()), 0, 1250)
    assert first == other and first != second and first != take(Order.of(rows=20_000, row_bytes=4000, streams=16, seed=1), 0, 1250)
    assert len(set(first) & set(second)) < 0.15 * 1250  # a stream sees other rows in the next epoch: 1/16 by chance
    assert (np.abs(np.diff(first)) == 1).mean() < 0.01
    window = next(order.windows(0, 0))
    assert np.abs(np.corrcoef(window, np.arange(len(window)))[0, 1]) < 5 / np.sqrt(len(window))


def test_a_window_mixes_rows_from_all_over_the_set() -> None:
    order = Order.of(rows=200_000, row_bytes=4000, streams=16, seed=0)
    windows = [next(order.windows(stream, 0)) for stream in range(16)]
    assert min(len(window) for window in windows) > 500
    assert np.mean([np.std(window) for window in windows]) > 0.27 * 200_000  # uniform: 0.289


def test_memory_is_bounded_whatever_the_rows_weigh() -> None:
    for row_bytes in (100, 4_000, 1_000_000):
        for streams in (1, 8, 64):
            order = Order.of(rows=10**6, row_bytes=row_bytes, streams=streams, seed=0)
            assert order.window * streams <= 16_384 and order.window * streams * row_bytes <= max(128 * 2**20, streams * row_bytes)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 300), st.integers(0, 2**63))
def test_a_permutation_holds_each_number_once(size: int, key: int) -> None:
    assert sorted(permutation(size, key)) == list(range(size))


def test_permutations_are_uniform_and_never_change_between_versions() -> None:
    counts = Counter(tuple(permutation(3, seed).tolist()) for seed in range(6000))
    assert len(counts) == 6 and max(abs(count - 1000) for count in counts.values()) < 150  # 5 standard deviations
    assert permutation(8, 0, "blocks", 3).tolist() == [4, 3, 5, 2, 0, 6, 7, 1]


def test_the_default_number_of_streams_is_a_divisor_up_to_64_and_serves_usual_worlds() -> None:
    assert [default_streams(size) for size in (1, 7, 96, 100, 128, 130, 4096)] == [1, 7, 48, 50, 64, 26, 64]


# ---- streams over shards ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 4])
def test_with_equal_shards_each_epoch_holds_every_row_exactly_once(folder: Path, world: int) -> None:
    batches = global_numbers(folder, 24, world=world, batch_size=8, streams=4, seed=3)
    for epoch in range(2):
        assert sorted(itertools.chain(*batches[12 * epoch : 12 * epoch + 12])) == list(range(96))
    assert batches[:12] != batches[12:]


@pytest.mark.parametrize("streams", [1, 4, 12])
def test_with_uneven_shards_no_row_is_ever_more_than_one_visit_ahead_of_another(folder: Path, streams: int) -> None:
    """50 rows, batches of 12: epochs end inside of batches, and still none is lost or doubled."""
    visits: Counter[int] = Counter(dict.fromkeys(range(50), 0))
    for batch in global_numbers(folder, 25, split="test", batch_size=12, streams=streams, seed=0):
        visits.update(batch)
        assert max(visits.values()) - min(visits.values()) <= 2  # inside a batch the places of an epoch's end may be dealt out in any order
    assert set(visits.values()) == {6}


def test_order_depends_on_the_seed_and_the_step_alone(folder: Path) -> None:
    torch.manual_seed(1)
    first = global_numbers(folder, 13, batch_size=8, streams=4, seed=5)
    torch.manual_seed(2)
    np.random.seed(3)
    assert global_numbers(folder, 13, batch_size=8, streams=4, seed=5) == first
    assert global_numbers(folder, 13, batch_size=8, streams=4, seed=6) != first


def fingerprint(ranks: list[list[list[Batch]]], names: list[str]) -> str:
    """One hash of everything that is in the global batches, packed tensors compared row by row."""
    digest = hashlib.sha256()
    for step in zip(*ranks, strict=True):
        batches = [batch for rank in step for batch in rank]
        for name in names:
            digest.update(torch.cat([batch.dense(name) for batch in batches]).numpy().tobytes())
        digest.update(torch.cat([batch.observed for batch in batches]).numpy().tobytes())
        digest.update(torch.cat([batch.draw for batch in batches]).numpy().tobytes())
        digest.update(torch.cat([label_of(batch) for batch in batches]).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize(("batch_size", "streams", "worlds"), [(12, 4, (3, 6, 12)), (12, 1, (2, 3)), (100, None, (4, 20))])
def test_ranks_that_do_not_divide_the_streams_share_them_and_change_nothing(
    folder: Path, batch_size: int, streams: int | None, worlds: tuple[int, ...]
) -> None:
    keywords = {"batch_size": batch_size, "streams": streams, "seed": 7, "step": 5}
    alone = global_numbers(folder, 3, **keywords)
    assert all(global_numbers(folder, 3, world=world, **keywords) == alone for world in worlds)
    shared = Stream(folder, "train", world=worlds[0], workers=9, **keywords)
    assert shared.workers == min(9, -(-shared.streams // worlds[0]))


SET_UPS = [(world, 0, accumulate) for world in (1, 2, 4) for accumulate in (1, 2)] + [(1, 1, 2), (1, 2, 1), (2, 1, 1), (2, 2, 2), (4, 2, 2)]


def test_global_batches_are_the_same_for_any_ranks_workers_and_accumulation(folder: Path) -> None:
    """11 set-ups over 15 steps (an epoch and a quarter), one hash; draws number the rows of the run without a gap."""
    hashes = {}
    for world, workers, accumulate in SET_UPS:
        keywords = {"batch_size": 8, "streams": 4, "seed": 0, "world": world, "workers": workers, "accumulate": accumulate}
        ranks = [steps(Stream(folder, "train", rank=rank, **keywords), 15) for rank in range(world)]
        assert {(len(step), len(step[0].draw)) for rank in ranks for step in rank} == {(accumulate, 8 // world // accumulate)}
        draws = [batch.draw for step in zip(*ranks, strict=True) for rank in step for batch in rank]
        assert torch.cat(draws).tolist() == list(range(15 * 8))
        hashes[world, workers, accumulate] = fingerprint(ranks, list(FIELDS))
    assert len(set(hashes.values())) == 1, hashes


@pytest.mark.parametrize("stop", [1, 5, 12, 17])
@pytest.mark.parametrize("workers", [0, 1])
def test_stopped_and_resumed_is_the_same_as_never_stopped_on_any_number_of_ranks(folder: Path, stop: int, workers: int) -> None:
    keywords = {"batch_size": 8, "streams": 4, "seed": 0}
    whole = global_numbers(folder, 22, **keywords)
    begun = Stream(folder, "train", workers=workers, **keywords)
    batches = iter(begun)
    assert [numbers(next(batches)[0]) for _ in range(stop)] == whole[:stop]
    state = begun.state_dict()
    assert state["step"] == stop
    for world in (1, 2, 4):
        ranks = [Stream(folder, "train", rank=rank, world=world, **keywords) for rank in range(world)]
        for stream in ranks:
            stream.load_state_dict(state)
        rest = [steps(stream, 3) for stream in ranks]
        assert [[n for rank in rest for batch in rank[step] for n in numbers(batch)] for step in range(3)] == whole[stop : stop + 3]
        assert rest[0][0][0].draw[0] == stop * 8 and ranks[0].state_dict()["step"] == stop + 3


def test_workers_that_read_ahead_do_not_move_the_position(folder: Path) -> None:
    stream = Stream(folder, "train", batch_size=8, streams=4, seed=0, workers=2)
    steps(stream, 2)
    assert stream.step == 2
    assert numbers(steps(stream, 1)[0][0]) == global_numbers(folder, 3, batch_size=8, streams=4, seed=0)[2]
    stream.step = 7
    assert steps(stream, 1)[0][0].draw[0] == 56


@pytest.mark.parametrize(
    ("change", "message"),
    [({"seed": 1}, "seed was 0 .* is 1 now"), ({"batch_size": 16}, "batch_size was 8 .* is 16"), ({"streams": 8}, "streams was 4 .* is 8")],
)
def test_a_state_of_another_run_is_refused_and_the_error_says_what_differs(folder: Path, change: dict, message: str) -> None:
    keywords = {"batch_size": 8, "streams": 4, "seed": 0}
    state = Stream(folder, "train", **keywords, step=3).state_dict()
    with pytest.raises(ValueError, match=message):
        Stream(folder, "train", **{**keywords, **change}).load_state_dict(state)
    with pytest.raises(ValueError, match="split was 'train' .* is 'test'"):
        Stream(folder, "test", **keywords).load_state_dict(state)


def test_a_state_over_other_shards_is_refused(folder: Path, tmp_path: Path) -> None:
    write_shards(dataset({"train": 96, "test": 51}), tmp_path / "other", rows_per_shard=8)
    state = Stream(folder, "train", batch_size=8, seed=0).state_dict()
    with pytest.raises(ValueError, match="stream: shards was"):
        Stream(tmp_path / "other", "train", batch_size=8, seed=0).load_state_dict(state)


def test_the_stream_leaves_the_global_random_state_alone(folder: Path) -> None:
    before = torch.get_rng_state()
    for workers in (0, 1):
        steps(Stream(folder, "train", batch_size=8, seed=0, workers=workers), 2)
        list(Evaluation(folder, "test", batch_size=8, workers=workers))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"batch_size": 9, "world": 2}, "batch_size: expected a multiple of world x accumulate = 2 x 1, got 9"),
        ({"batch_size": 8, "accumulate": 3}, "batch_size: expected a multiple of world x accumulate = 1 x 3, got 8"),
        ({"batch_size": 8, "streams": 3}, r"streams: expected a divisor of batch_size 8 \(one of \[1, 2, 4, 8\]\), got 3"),
        ({"batch_size": 8, "rank": 2, "world": 2}, "rank: expected 0 to 1 for world 2, got 2"),
        ({"batch_size": 0}, "batch_size: expected a number above 0, got 0"),
        ({"batch_size": 8, "accumulate": 0}, "accumulate: expected a number above 0, got 0"),
        ({"batch_size": 8, "workers": -1}, "workers: expected 0 or more, got -1"),
        ({"batch_size": 8, "step": -1}, "step: expected 0 or more, got -1"),
    ],
)
def test_numbers_that_do_not_divide_are_refused_with_those_that_would(folder: Path, keywords: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Stream(folder, "train", seed=0, **keywords)


def test_more_workers_or_streams_than_rows_are_no_error(tmp_path: Path) -> None:
    write_shards(dataset({"train": 3, "test": 1}), tmp_path / "few")
    visits = Counter(itertools.chain(*global_numbers(tmp_path / "few", 6, batch_size=16, seed=0)))
    assert visits == {0: 32, 1: 32, 2: 32}
    assert Stream(tmp_path / "few", "train", batch_size=4, seed=0, workers=9).workers == 4


def test_an_error_in_a_worker_arrives_with_its_place(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(split: str) -> Iterator[Row]:
        yield from (datum(number) for number in range(9))
        yield Row({"number": torch.full((2,), float("inf"))}, 0)

    with monkeypatch.context() as patch:
        patch.setattr(Field, "_check_values", lambda *_: None)
        write_shards(Dataset("bad", FIELDS, poisoned, WORDS[3:]), tmp_path / "bad", rows_per_shard=8)
    with pytest.raises(ValueError, match="^train-000001.tar, row 00000009, modality number: expected finite numbers, got 2"):
        steps(Stream(tmp_path / "bad", "train", batch_size=10, seed=0, workers=1), 1)


def test_single_and_labels_are_facts_of_the_split(folder: Path, tmp_path: Path) -> None:
    full = Dataset("full", FIELDS, lambda split: (Row(datum(2).data) for _ in range(4)))
    write_shards(full, tmp_path / "full")
    batch, other = (
        steps(Stream(tmp_path / "full", "train", batch_size=4, seed=7), 1)[0][0],
        steps(Stream(folder, "train", batch_size=4, seed=7), 1)[0][0],
    )
    assert (batch.single, batch.label, batch.seed) == (False, None, 7)
    assert other.single and other.label is not None
    assert next(iter(Evaluation(tmp_path / "full", "test", batch_size=4))).label is None


def test_every_tensor_of_a_batch_is_pinned_where_there_is_a_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keywords = {"batch_size": 8, "streams": 4, "seed": 0}
    plain = steps(Stream(folder, "train", **keywords), 1)[0][0]
    pinned: list[torch.Tensor] = []

    def pin(x: torch.Tensor) -> torch.Tensor:
        pinned.append(x.clone())
        return pinned[-1]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    batch = steps(Stream(folder, "train", **keywords), 1)[0][0]
    tensors = [x for packed in batch.modalities.values() for x in packed] + [batch.observed, batch.alone, batch.draw, label_of(batch)]
    assert {id(x) for x in tensors} == {id(x) for x in pinned} and len(tensors) == 16
    assert fingerprint([[[batch]]], list(FIELDS)) == fingerprint([[[plain]]], list(FIELDS))


# ---- evaluation ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 7, 50, 64])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_evaluation_holds_every_row_once_in_order_and_equally_many_batches_on_each_rank(folder: Path, world: int, batch_size: int) -> None:
    ranks = [Evaluation(folder, "test", batch_size=batch_size, rank=rank, world=world) for rank in range(world)]
    batches = [list(evaluation) for evaluation in ranks]
    assert {len(rank) for rank in batches} == {len(ranks[0])} == {-(-50 // (world * batch_size))}
    dealt = [batch for turn in zip(*batches, strict=True) for batch in turn]
    assert all(len(batch.draw) == batch_size for batch in dealt)
    draw = torch.cat([batch.draw for batch in dealt])
    observed = torch.cat([batch.observed for batch in dealt])
    label = torch.cat([label_of(batch) for batch in dealt])
    real = draw < 50
    assert draw.tolist() == list(range(len(draw)))  # padding rows have draws of their own
    assert not observed[~real].any() and (label[~real] == -1).all()
    for number, seen, kind in zip(draw[real].tolist(), observed[real].tolist(), label[real].tolist(), strict=True):
        assert seen == [name in datum(number).data for name in FIELDS] and kind == number % 2


@pytest.mark.parametrize("rows", [1, 16, 17, 33, 50, 99])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_ranks_share_the_first_rows_to_within_a_batch_and_read_no_more_batches_than_hold_them(folder: Path, world: int, rows: int) -> None:
    size = 4
    ranks = [Evaluation(folder, "test", batch_size=size, rank=rank, world=world) for rank in range(world)]
    whole, found = ([list(one) for one in split] for split in (ranks, [one.first(rows) for one in ranks]))
    for split in (whole, found):
        shares = [sum(int((batch.draw < min(rows, 50)).sum()) for batch in batches) for batches in split]
        assert sum(shares) == min(rows, 50) and max(shares) - min(shares) <= size
    read = [batch for batches in found for batch in batches if bool(batch.observed.any())]
    assert len(read) == -(-min(rows, 50) // size) and len({len(batches) for batches in found}) == 1
    same = {int(batch.draw[0]): batch for batches in whole for batch in batches}
    assert all(torch.equal(batch.dense("number"), same[int(batch.draw[0])].dense("number")) for batch in read)
    assert len(list(Evaluation(folder, "test", batch_size=size, workers=2).first(rows))) == -(-min(rows, 50) // size)


def test_evaluation_gives_the_rows_their_contents(folder: Path) -> None:
    assert [numbers(batch) for batch in Evaluation(folder, "test", batch_size=10)] == [
        list(range(start, start + 10)) for start in range(0, 50, 10)
    ]


def test_evaluation_does_not_depend_on_workers_and_can_be_repeated(folder: Path) -> None:
    alone = Evaluation(folder, "test", batch_size=16)
    expected = fingerprint([[[batch] for batch in alone]], list(FIELDS))
    assert fingerprint([[[batch] for batch in alone]], list(FIELDS)) == expected
    parallel = Evaluation(folder, "test", batch_size=16, workers=2)
    assert fingerprint([[[batch] for batch in parallel]], list(FIELDS)) == expected


def test_a_rank_without_rows_gets_batches_of_padding(tmp_path: Path) -> None:
    write_shards(dataset({"train": 2, "test": 1}), tmp_path / "few")
    ranks = [list(Evaluation(tmp_path / "few", "train", batch_size=4, rank=rank, world=5)) for rank in range(5)]
    assert [int(rank[0].observed.any(1).sum()) for rank in ranks] == [2, 0, 0, 0, 0] and {len(rank) for rank in ranks} == {1}
    assert len(set(torch.cat([rank[0].draw for rank in ranks]).tolist())) == 20


def test_the_manifest_describes_what_the_stream_reads(folder: Path) -> None:
    stream = Stream(folder, "train", batch_size=8, seed=0)
    assert stream.manifest.fingerprint == Manifest.load(folder).fingerprint and stream.manifest.num_rows("train") == 96
    assert dict(stream.manifest.fields) == FIELDS and stream.manifest.classes == ("even", "odd")
