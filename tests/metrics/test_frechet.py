"""Laws of the Frechet distance: the closed form of Normals, by other routes, and what a planted model must get."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from meme_dist.evaluate import evaluate
from meme_dist.metrics.frechet import Moments, few_sources, frechet, frechet_distance, frechet_distances, moment_sums, moments
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


def test_its_bias_falls_as_one_over_the_rows() -> None:
    """Two samples of one Normal: 0 for infinitely many rows, and twice as many halve what is measured."""
    values = []
    for count in (100, 200, 400):
        pairs = [(drawn_standard(seed, count), drawn_standard(seed + 99, count)) for seed in range(20)]
        values.append(np.mean([frechet_distance(moments(moment_sums(a)), moments(moment_sums(b))) for a, b in pairs]))
    assert values[0] / values[1] == pytest.approx(2, rel=0.15) and values[1] / values[2] == pytest.approx(2, rel=0.15)


def drawn_standard(seed: int, count: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(count, 8)))


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
