"""Laws of pairing by class and of masks."""

from collections import Counter
from itertools import product
from math import comb, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meme_dist.data.sets._missing import missing_at_random, partly_paired
from meme_dist.data.sets._pairing import Rest, generator, one_to_one, partial_rows, permuted, recycled

# Data of each class 0..9 in the public files.
MNIST = (5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949)
MNIST_TEST = (980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009)
SVHN = (4948, 13861, 10585, 8497, 7458, 6882, 5727, 5595, 5045, 4659)
SVHN_TEST = (1744, 5099, 4149, 2882, 2523, 2384, 1977, 2019, 1660, 1595)
METER = (2008, 1593, 1948, 1507, 1567, 1983, 1414, 1289, 1755, 1313)


def labels(**counts: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {name: generator(1, name).permutation(np.repeat(np.arange(len(each)), each)) for name, each in counts.items()}


def rng() -> np.random.Generator:
    return generator(0, "test")


def size(indices: dict[str, np.ndarray]) -> int:
    (count,) = {len(index) for index in indices.values()}
    return count


def test_one_to_one_gives_the_papers_56068_training_and_10000_test_pairs():
    assert size(one_to_one(labels(mnist=MNIST, svhn=SVHN))) == 56_068
    assert size(one_to_one(labels(mnist=MNIST_TEST, svhn=SVHN_TEST))) == 10_000


def test_thirty_permutations_of_mnist_svhn_give_1682040_pairs_that_use_each_datum_30_times_or_never():
    indices = permuted(labels(mnist=MNIST, svhn=SVHN), permutations=30, rng=rng())
    assert size(indices) == 30 * 56_068 == 1_682_040
    assert all(set(np.bincount(index)) == {0, 30} for index in indices.values())


def test_meter_digits_used_three_times_give_48502_pairs_and_no_pair_twice():
    indices = recycled(labels(mnist=MNIST, photo=METER), uses={"mnist": 1, "photo": 3}, rng=rng())
    assert size(indices) == 48_502
    assert len(set(zip(indices["mnist"], indices["photo"], strict=True))) == 48_502
    assert np.bincount(indices["mnist"]).max() == 1
    assert np.bincount(indices["photo"]).max() == 3


def test_one_to_one_pairs_the_kth_of_a_class_with_the_kth():
    label = labels(a=(5, 3), b=(2, 9))
    indices = one_to_one(label)
    for value, count in ((0, 2), (1, 3)):
        for name in label:
            members = indices[name][label[name][indices[name]] == value]
            assert members.tolist() == np.flatnonzero(label[name] == value)[:count].tolist()


@settings(max_examples=30, deadline=None)
@given(counts=st.lists(st.tuples(*[st.integers(0, 6)] * 3), min_size=2, max_size=4), times=st.integers(1, 4))
def test_every_rule_pairs_equal_classes_for_any_number_of_modalities(counts, times):
    label = labels(**{f"m{number}": each for number, each in enumerate(counts)})
    uses = {name: times if name == "m0" else None for name in label}
    scarcest = np.min(counts, axis=0)
    expected = {
        "one_to_one": scarcest.sum(),
        "permuted": times * scarcest.sum(),
        "recycled": sum(times * count for count, least in zip(counts[0], scarcest, strict=True) if least),
    }
    found = {
        "one_to_one": one_to_one(label),
        "permuted": permuted(label, permutations=times, rng=rng()),
        "recycled": recycled(label, uses=uses, rng=rng()),
    }
    for rule, indices in found.items():
        classes = [label[name][index] for name, index in indices.items()]
        assert size(indices) == expected[rule]
        assert all(np.array_equal(classes[0], other) for other in classes)


def test_an_unlimited_modality_is_reused_evenly_within_one_use():
    indices = recycled(labels(a=(50, 20), b=(7, 3)), uses={"a": 1, "b": None}, rng=rng())
    uses = np.bincount(indices["b"])
    label = labels(b=(7, 3))["b"]
    assert size(indices) == 70
    assert all(np.ptp(uses[label == value]) <= 1 for value in (0, 1))


def test_two_permutations_repeat_a_pair_only_as_often_as_chance_does():
    # Of two permutations of n, one pair is expected to agree whatever n is: C(3, 2) a class, nearly Poisson.
    indices = permuted(labels(a=(200,) * 50, b=(300,) * 50), permutations=3, rng=rng())
    times = Counter(zip(indices["a"].tolist(), indices["b"].tolist(), strict=True))
    repeats = sum(comb(count, 2) for count in times.values())
    assert abs(repeats - 150) < 4 * sqrt(150)


def test_a_permutation_uses_each_datum_once():
    indices = permuted(labels(a=(40,), b=(30,)), permutations=4, rng=rng())
    for index in indices.values():
        assert all(len(set(chunk)) == 30 for chunk in index.reshape(4, 30))


@pytest.mark.parametrize("always", ["split", "a", "b"])
def test_the_paired_share_is_exact_and_every_other_row_keeps_one_modality(always):
    for rows, fraction in product((1000, 777), (0.0, 0.0625, 0.25, 1.0)):
        observed = partly_paired(rows, ["a", "b"], paired_fraction=fraction, always=always, rng=rng())
        paired = round(fraction * rows)
        assert observed[:paired].all()
        assert (observed[paired:].sum(1) == 1).all()
        if always != "split":
            assert observed[:, "ab".index(always)].all()


@pytest.mark.parametrize("modalities", [2, 3, 4])
def test_split_keeps_each_modality_with_equal_probability(modalities):
    rows = 30_000
    kept = partly_paired(rows, [f"m{n}" for n in range(modalities)], paired_fraction=0, always="split", rng=rng()).mean(0)
    share = 1 / modalities
    assert (abs(kept - share) < 4 * sqrt(share * (1 - share) / rows)).all()


def test_a_smaller_paired_share_only_thins_rows_out():
    masks = [partly_paired(500, ["a", "b"], paired_fraction=fraction, always="split", rng=rng()) for fraction in (0.1, 0.5, 0.9)]
    for fewer, more in zip(masks, masks[1:], strict=False):
        assert not (fewer & ~more).any()
        changed = (fewer != more).any(1)
        assert changed.sum() == 200


@pytest.mark.parametrize(("modalities", "missing"), [(2, 0.0), (2, 0.3), (2, 0.5), (3, 0.3), (3, 0.66), (3, 2 / 3), (5, 0.5), (5, 0.8)])
def test_the_missing_share_is_exact_to_the_entry_and_no_row_is_empty(modalities, missing):
    observed = missing_at_random(999, modalities, missing, rng())
    assert observed.any(1).all()
    assert abs((~observed).sum() - missing * observed.size) <= 0.5 + 1e-6


def test_missing_patterns_follow_independent_entries_given_that_one_is_left():
    rows, missing = 40_000, 0.3
    observed = missing_at_random(rows, 3, missing, rng())
    count = Counter(map(tuple, observed.tolist()))
    p = next(p for p in np.linspace(0.3, 0.4, 100_001) if (p - p**3) / (1 - p**3) >= missing)  # independent entries, empty rows redrawn
    for pattern in product((False, True), repeat=3):
        probability = 0 if not any(pattern) else p ** (3 - sum(pattern)) * (1 - p) ** sum(pattern) / (1 - p**3)
        assert abs(count[pattern] - rows * probability) <= 4 * sqrt(rows * probability)


def test_pairs_only_are_exactly_the_complete_rows_of_the_partial_set():
    data = {"a": np.arange(100, dtype=np.float32)[:, None], "b": np.arange(100, dtype=np.float32)[:, None]}
    indices, label = {"a": np.arange(100), "b": np.arange(100)}, np.arange(100)

    def rows(unpaired: bool) -> list:
        return list(partial_rows(data, indices, label, rest=Rest(0.25, "split", unpaired), seed=3, purpose="test"))

    everything, pairs = rows(True), rows(False)
    assert len(everything) == 100
    assert len(pairs) == 25
    assert [row.label for row in pairs] == [row.label for row in everything if len(row.data) == 2]


def test_each_purpose_has_random_numbers_of_its_own():
    draws = {(seed, purpose): tuple(generator(seed, purpose).integers(1 << 30, size=4)) for seed in (0, 1) for purpose in ("order", "kept")}
    assert len(set(draws.values())) == 4
    assert draws[0, "order"] == tuple(generator(0, "order").integers(1 << 30, size=4))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: permuted(labels(a=(2,), b=(2,)), permutations=0, rng=rng()), "permutations: expected at least 1, got 0"),
        (lambda: recycled(labels(a=(2,), b=(2,)), uses={"a": None, "b": None}, rng=rng()), "a limit for at least one"),
        (lambda: recycled(labels(a=(2,), b=(2,)), uses={"a": 0, "b": None}, rng=rng()), "uses of a: expected at least 1"),
        (lambda: partly_paired(9, ["a", "b"], paired_fraction=1.5, always="split", rng=rng()), "from 0 to 1, got 1.5"),
        (lambda: partly_paired(9, ["a", "b"], paired_fraction=0.5, always="c", rng=rng()), "'split' or one of"),
        (lambda: missing_at_random(9, 3, 0.7, rng()), "from 0 to 0.667"),
        (lambda: missing_at_random(9, 3, float("nan"), rng()), "from 0 to 0.667"),
    ],
)
def test_impossible_settings_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
