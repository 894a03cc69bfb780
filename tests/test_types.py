"""A batch holds what is present and nothing else: work is counted here, row by row and pair by pair."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from meme_dist.types import Batch, Packed, pack, pack_dense


def half_missing(rows: int, modalities: int, seed: int) -> np.ndarray:
    """A mask [rows, modalities] in which exactly half of the entries are missing and no row is empty."""
    generator = np.random.default_rng(seed)
    while True:
        mask = generator.permutation(np.arange(rows * modalities) % 2).reshape(rows, modalities).astype(bool)
        for row in np.flatnonzero(~mask.any(1)):  # move an entry in from the fullest row
            giver = mask.sum(1).argmax()
            mask[giver, np.flatnonzero(mask[giver])[0]] = False
            mask[row, generator.integers(modalities)] = True
        if mask.any(1).all():
            return mask


def data_of(mask: np.ndarray) -> dict[str, Tensor]:
    """One number a datum, telling its row and modality apart: 100 * modality + row, and NaN where it is absent."""
    rows, modalities = mask.shape
    x = 100.0 * torch.arange(modalities)[:, None] + torch.arange(rows)
    x[torch.from_numpy(~mask.T)] = float("nan")
    return {f"m{column}": x[column][:, None].clone() for column in range(modalities)}


def packed(mask: np.ndarray, **keywords) -> Batch:
    return pack_dense(data_of(mask), {f"m{column}": torch.from_numpy(mask[:, column]) for column in range(mask.shape[1])}, **keywords)


def pairs(batch: Batch, name: str) -> list[tuple[int, int]]:
    """The (source modality, row) pairs in which a modality is decoded, padding left out."""
    rows, modalities = batch.observed.shape
    found = [divmod(number, rows) for number in batch.modalities[name].source.tolist()]
    return [pair for pair in found if pair[0] < modalities]


def random_mask(rows: int, modalities: int, share: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((rows, modalities)) < share


# few rows need no padding, more than 64 nearly always do
masks = st.builds(
    random_mask, st.integers(1, 10) | st.integers(64, 200), st.integers(2, 5), st.sampled_from([0, 0.3, 0.7, 1]), st.integers(0, 999)
)


@pytest.mark.parametrize("modalities", [2, 3, 5])
def test_with_half_of_the_entries_missing_work_is_what_is_observed_plus_less_than_10_percent(modalities: int) -> None:
    """B = 128: encoders see the observed rows, decoders those and the observed pairs; a dense batch would be 2 and 4 times that."""
    for seed in range(20):
        mask = half_missing(128, modalities, seed)
        batch = packed(mask)
        encoded = sum(len(packed.data) for packed in batch.modalities.values())
        decoded = encoded + sum(len(packed.source) for packed in batch.modalities.values())
        rows, held = int(mask.sum()), mask.sum(1)
        own_and_crossed = rows + int((held * (held - 1)).sum())
        assert rows == 64 * modalities and rows <= encoded < 1.1 * rows
        assert own_and_crossed <= decoded < 1.1 * own_and_crossed
        assert decoded < 0.75 * 128 * modalities**2
        assert all(len(packed.source) == len(packed.target) for packed in batch.modalities.values())


@settings(max_examples=100, deadline=None)
@given(masks)
def test_rows_and_pairs_are_exactly_those_that_are_observed(mask: np.ndarray) -> None:
    batch = packed(mask)
    rows, modalities = mask.shape
    for column, (name, packed_rows) in enumerate(batch.modalities.items()):
        real = packed_rows.row < rows
        assert packed_rows.row[real].tolist() == np.flatnonzero(mask[:, column]).tolist()
        assert packed_rows.data[real, 0].tolist() == (100 * column + packed_rows.row[real]).tolist()
        others = [other for other in range(modalities) if other != column]
        expected = [(other, row) for other in others for row in range(rows) if mask[row, column] and mask[row, other]]
        assert pairs(batch, name) == expected
        for source, target in zip(packed_rows.source.tolist(), packed_rows.target.tolist(), strict=True):
            if source < modalities * rows:  # the datum that a pair decodes is that of its row
                assert packed_rows.data[target, 0] == 100 * column + source % rows


@settings(max_examples=100, deadline=None)
@given(masks)
def test_the_content_of_an_absent_entry_is_never_read_and_padding_repeats_real_rows(mask: np.ndarray) -> None:
    batch = packed(mask)
    for column, packed_rows in enumerate(batch.modalities.values()):
        there = {100.0 * column + row for row in np.flatnonzero(mask[:, column])} or {0.0}
        assert set(packed_rows.data[:, 0].tolist()) <= there  # NaN is in none of them
        assert ((packed_rows.target >= 0) & (packed_rows.target < len(packed_rows.data))).all()


@settings(max_examples=100, deadline=None)
@given(masks)
def test_dense_undoes_packing_with_zeros_where_nothing_is(mask: np.ndarray) -> None:
    batch = packed(mask)
    for column, (name, x) in enumerate(data_of(mask).items()):
        expected = torch.where(torch.from_numpy(mask[:, column])[:, None], x, 0.0)
        assert torch.equal(batch.dense(name), expected)


@settings(max_examples=50, deadline=None)
@given(masks)
def test_shapes_come_in_few_sizes(mask: np.ndarray) -> None:
    """Multiples of B / 32, and never empty: every module runs on every rank, and few graphs are compiled."""
    granule = max(1, len(mask) // 32)
    for packed_rows in packed(mask).modalities.values():
        assert all(len(x) > 0 and len(x) % granule == 0 for x in packed_rows)


def test_only_shows_the_same_rows_with_some_modalities_and_no_pairs() -> None:
    batch = packed(half_missing(12, 3, 0), draw=range(40, 52), seed=9, label=torch.arange(12), single=False)
    for names in itertools.chain.from_iterable(itertools.permutations(["m0", "m1", "m2"], size) for size in (1, 2, 3)):
        seen = batch.only(*names)
        assert list(seen.modalities) == list(names)
        assert torch.equal(seen.observed, batch.observed[:, [int(name[1]) for name in names]])
        assert all(torch.equal(seen.dense(name), batch.dense(name)) for name in names)
        assert all(len(seen.modalities[name].source) == len(seen.modalities[name].target) == 0 for name in names)
        assert (seen.draw is batch.draw, seen.label is batch.label, seen.seed, seen.single) == (True, True, 9, False)


def test_only_of_an_unknown_modality_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown modalities \['smell'\]; this batch has \['m0', 'm1'\]"):
        packed(np.ones((2, 2), dtype=bool)).only("m0", "smell")


def test_draws_number_the_rows_unless_they_are_given() -> None:
    mask = np.ones((3, 2), dtype=bool)
    assert packed(mask).draw.tolist() == [0, 1, 2] and packed(mask, draw=[7, 5, 2**40]).draw.tolist() == [7, 5, 2**40]
    assert packed(mask, draw=[7, 5, 6]).draw.dtype == torch.int64


def test_a_mask_that_disagrees_with_the_data_is_an_error() -> None:
    with pytest.raises(ValueError, match="b: the mask names 1 present rows, the data has 2"):
        pack({"a": torch.zeros(2, 1), "b": torch.zeros(2, 1)}, np.array([[True, True], [True, False]]))
    with pytest.raises(ValueError, match=r"observed: expected shape \(B, 2\), got \(2, 3\)"):
        pack({"a": torch.zeros(2, 1), "b": torch.zeros(2, 1)}, np.ones((2, 3), dtype=bool))


def test_rows_that_observe_nothing_and_modalities_without_rows_are_legal() -> None:
    batch = pack({"a": torch.zeros(0, 2, 3), "b": torch.ones(1, 4)}, np.array([[False, False], [False, True], [False, False]]))
    assert batch.dense("a").shape == (3, 2, 3) and not batch.dense("a").any()
    assert batch.dense("b").sum(1).tolist() == [0, 4, 0]
    empty: Packed = batch.modalities["a"]
    assert empty.row.tolist() == [3] and empty.source.tolist() == [6] and not empty.data.any()
