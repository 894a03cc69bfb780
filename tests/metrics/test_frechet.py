"""Laws of the Frechet distance: the closed form of Normals, by other routes, and what a planted model must get."""

import math
import sys

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.linalg import sqrtm
from torch import Tensor

from meme_dist.evaluate import evaluate
from meme_dist.metrics.frechet import (
    GROUPS,
    Frechet,
    Moments,
    few_sources,
    frechet,
    frechet_distance,
    frechet_distances,
    moment_sums,
    moments,
)
from meme_dist.types import Sums
from tests.planted import CLASSES, modality, planted, rows


def drawn(seed: int, count: int, size: int) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(size=(count, size)) @ rng.normal(size=(size, size)) + 3 * rng.normal(size=size))


def reference(a: np.ndarray, b: np.ndarray) -> float:
    """scipy's matrix square root of C_1 C_2, as the original FID code has it."""
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first + second - 2 * np.real(sqrtm(first @ second)))


def test_it_is_the_formula_with_scipys_matrix_square_root() -> None:
    for seed in range(5):
        a, b = drawn(seed, 60, 7), drawn(seed + 50, 90, 7)
        found = frechet_distance(moments(moment_sums(a)), moments(moment_sums(b)))
        assert found == pytest.approx(reference(a.numpy(), b.numpy()), rel=1e-8)
        assert found == pytest.approx(frechet_distance(moments(moment_sums(b)), moments(moment_sums(a))), rel=1e-9)


def test_of_two_scaled_standard_normals_it_is_the_known_value() -> None:
    identity, shift = torch.eye(5, dtype=torch.float64), torch.arange(5).double()
    found = frechet_distance(Moments(0 * shift, identity, 9), Moments(shift, 9 * identity, 9))
    assert found == pytest.approx(30 + 5 * (3 - 1) ** 2, abs=1e-12)


def test_singular_covariances_are_no_trouble() -> None:
    """Fewer rows than features: tr (C_1^1/2 C_2 C_1^1/2)^1/2 is the nuclear norm of the product of the centred data."""
    a, b = drawn(1, 6, 40), drawn(2, 9, 40)
    centred = [(x - x.mean(0)) / math.sqrt(len(x) - 1) for x in (a, b)]
    shared = torch.linalg.svdvals(centred[0] @ centred[1].T).sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + centred[0].square().sum() + centred[1].square().sum() - 2 * shared
    assert frechet_distance(moments(moment_sums(a)), moments(moment_sums(b))) == pytest.approx(float(expected), rel=1e-9)
    alike = moments(moment_sums(a))
    assert frechet_distance(alike, alike) == pytest.approx(0, abs=1e-5 * float(alike.covariance.trace()))


def test_moments_add_over_parts_and_need_two_rows() -> None:
    x = drawn(3, 50, 4).float()
    parts = [moment_sums(part) for part in x.split([7, 1, 42])]
    whole = moments(Sums(sum(part.total for part in parts), sum(part.count for part in parts)))
    assert torch.allclose(whole.mean, x.double().mean(0), rtol=1e-12) and whole.count == 50
    assert np.allclose(whole.covariance.numpy(), np.cov(x.double().numpy(), rowvar=False), rtol=1e-12)
    assert math.isnan(frechet_distance(whole, moments(moment_sums(x[:1]))))


def test_features_that_are_not_finite_have_no_distance() -> None:
    x = drawn(3, 50, 4)
    broken = x.clone()
    broken[7, 2] = math.inf
    whole, other = moments(moment_sums(x)), moments(moment_sums(broken))
    assert math.isnan(frechet_distance(whole, other)) and math.isnan(frechet_distance(other, whole))
    assert math.isnan(distances(broken, x)["None"].value) and math.isnan(distances(x, broken)["('a',)"].value)


def test_its_bias_falls_as_one_over_the_rows() -> None:
    """Two samples of one Normal: 0 for infinitely many rows, and twice as many halve what is measured."""
    values = []
    for count in (100, 200, 400):
        pairs = [(drawn_standard(seed, count), drawn_standard(seed + 99, count)) for seed in range(20)]
        values.append(np.mean([frechet_distance(moments(moment_sums(a)), moments(moment_sums(b))) for a, b in pairs]))
    assert values[0] / values[1] == pytest.approx(2, rel=0.15) and values[1] / values[2] == pytest.approx(2, rel=0.15)


def drawn_standard(seed: int, count: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(count, 8)))


def in_groups(x: Tensor) -> Sums:
    parts = [moment_sums(x[group::GROUPS]) for group in range(GROUPS)]
    return Sums(torch.stack([part.total for part in parts]), torch.stack([part.count for part in parts]))


def two_samples(seed: int, rows: int = 200) -> tuple[Tensor, Tensor]:
    """Of N(0, I) and N(1, 1.5^2 I) in four numbers, 5 apart, the second row by row correlated with the first."""
    x, noise = (torch.from_numpy(np.random.default_rng([seed, k]).normal(size=(rows, 4))) for k in (0, 1))
    return x, 1 + 1.5 * (0.6 * x + 0.8 * noise)


def distances(x: Tensor, y: Tensor) -> dict[str, Frechet]:
    """Of made (y) from real data (x), and of the halves of x."""
    sums = {"frechet/real>b": in_groups(x), "frechet/a>b": in_groups(y), "frechet/prior>b": in_groups(y[:1])}
    return {str(one.sources): one for one in frechet_distances(sums, ["a", "b"], ["b"])}


def test_its_interval_covers_the_distance_of_the_densities_as_often_as_it_says() -> None:
    """120 pairs of samples; the bias of the value, 8 / 200, is small beside its standard error of .3."""
    found = [distances(*two_samples(seed))["('a',)"] for seed in range(120)]
    assert 0.89 < np.mean([one.low < 5 < one.high for one in found]) <= 0.99
    widths = np.array([one.high - one.low for one in found]) / (2 * stats.t.ppf(0.975, GROUPS - 1))
    assert widths.mean() == pytest.approx(np.std([one.value for one in found]), rel=0.2)


def test_its_interval_is_that_of_a_bootstrap_over_rows_of_both_sides_together() -> None:
    x, y = (one.numpy() for one in two_samples(7, 400))
    rng = np.random.default_rng(0)
    again = [reference(x[chosen], y[chosen]) for chosen in rng.integers(400, size=(300, 400))]
    one = distances(torch.from_numpy(x), torch.from_numpy(y))["('a',)"]
    assert (one.high - one.low) / (2 * stats.t.ppf(0.975, GROUPS - 1)) == pytest.approx(np.std(again), rel=0.25)


def test_halves_have_an_interval_above_nought_and_too_few_rows_or_too_many_features_none(monkeypatch: pytest.MonkeyPatch) -> None:
    found = distances(*two_samples(3))
    assert 0 <= found["None"].low < found["None"].value < found["None"].high < 1
    assert math.isnan(found["()"].value) and math.isinf(found["()"].high) and math.isinf(found["()"].low)
    monkeypatch.setattr(sys.modules[frechet.__module__], "WIDEST", 8)
    wide = with_features(9)
    assert math.isinf(wide.low) and math.isfinite(wide.value) and math.isfinite(with_features(8).low)


def with_features(features: int) -> Frechet:
    """A planted model with so many features, most of which say nothing."""
    label = np.arange(60) % CLASSES
    objective, fill = planted({name: modality() for name in "ab"}), torch.nn.ConstantPad1d((0, features - CLASSES), 0.0)
    sums = evaluate(objective, [rows({"a": label, "b": label}, label)], [frechet({"b": fill}, list("ab"), rows=60)])
    return frechet_distances(sums, list("ab"), ["b"])[0]


def embed(x: Tensor) -> Tensor:
    """Features of one-hot classes that no two classes share."""
    return x @ torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, -1.0], [3.0, 1.0, 0.0], [0.0, 0.0, 5.0]])


def test_a_planted_model_gets_what_its_classes_say_for_any_split_of_the_rows() -> None:
    """`b` shows every class as it is, and as class 0 or 1 from the prior; rows from 80 on count nowhere."""
    label = np.random.default_rng(4).integers(0, CLASSES, 100)
    seen = {"a": np.where(np.arange(100) % 5 == 0, -1, label), "b": label, "c": label}
    objective = planted({name: modality() for name in "abc"}, prior=2)
    metric = frechet({"b": embed}, list("abc"), rows=80)
    whole = evaluate(objective, [rows(seen, label, padding=3)], [metric])
    parts = [
        evaluate(objective, [rows({n: x[low:high] for n, x in seen.items()}, label[low:high], first=low, padding=pad)], [metric])
        for low, high, pad in ((0, 33, 5), (33, 90, 0), (90, 100, 7))
    ]
    found = {one.sources: one for one in frechet_distances(whole, list("abc"), ["b"])}
    assert list(found) == [("a",), ("c",), ("a", "c"), (), None] and few_sources("ab", "b") == [("a",)]
    real = embed(torch.eye(CLASSES)[label[:80]]).numpy()
    assert found["c",].value == pytest.approx(0, abs=1e-5) and found["c",].count == found["c",].real == 80
    kept = real[seen["a"][:80] >= 0]
    assert found["a",].value == pytest.approx(reference(kept, real), rel=1e-5) and found["a",].count == len(kept)
    assert found[None].value == pytest.approx(reference(real[::2], real[1::2]), rel=1e-5) and found[None].count == 40
    classes = torch.eye(CLASSES)[[0, 1] * 4000]
    limit = reference(embed(classes).numpy(), real)
    assert found[()].value == pytest.approx(limit, rel=0.2) and found[()].count == 80
    for name, (total, count) in whole.items():
        assert torch.allclose(sum(part[name].total for part in parts), total, rtol=1e-6, atol=1e-6)
        assert torch.equal(sum(part[name].count for part in parts), count)
