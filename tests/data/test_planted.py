"""Laws of planted evidence: the ceiling is exact, and the rows are what it is computed for."""

from math import sqrt

import numpy as np
import pytest

from meme_dist.data.sets.planted import ceiling, planted, read, sampling_ceiling
from meme_dist.data.shards import Dataset
from tests.data.small import REAL, array, rows, signed_mnist

needs_real_data = pytest.mark.skipif(not (REAL / "fashion_subset_20000_4000.npz").is_file(), reason="no real data in ../shared/data")


def guessed(observed: int, noise: float, classes: int, trials: int = 200_000, *, drawn: bool = False) -> float:
    """How often the class with the highest posterior is right: simulated, ties broken at random; or one drawn from the posterior."""
    rng = np.random.default_rng(1)
    y = rng.integers(classes, size=trials)
    log_posterior = rng.random((trials, classes)) * 1e-9
    for _ in range(observed):
        wrong = rng.random(trials) < noise
        others = np.array([rng.integers(classes - 1, size=trials)])[0]
        seen = np.where(wrong, others + (others >= y), y)
        log_posterior += np.where(np.arange(classes) == seen[:, None], np.log(1 - noise), np.log(noise / (classes - 1)))
    return float(((log_posterior + rng.gumbel(size=(trials, classes)) * drawn).argmax(1) == y).mean())


@pytest.mark.parametrize(
    ("observed", "noise", "classes"), [(1, 0.3, 10), (2, 0.3, 10), (3, 0.3, 10), (5, 0.6, 10), (4, 0.5, 3), (3, 0.95, 4)]
)
def test_the_ceiling_is_how_often_a_bayesian_is_right(observed, noise, classes):
    exact = ceiling(observed, noise=noise, classes=classes)
    assert abs(guessed(observed, noise, classes) - exact) < 4 * sqrt(exact * (1 - exact) / 200_000)
    exact = sampling_ceiling(observed, noise=noise, classes=classes)
    assert abs(guessed(observed, noise, classes, drawn=True) - exact) < 4 * sqrt(exact * (1 - exact) / 200_000)


def test_known_sampling_ceilings():
    assert [sampling_ceiling(n, noise=0.3) for n in (0, 1)] == pytest.approx([0.1, 0.7**2 + 0.3**2 / 9])
    assert sampling_ceiling(2, noise=0.3, classes=2) == pytest.approx((0.7**4 + 0.3**4) / (0.7**2 + 0.3**2) + 2 * 0.7 * 0.3 / 2)
    assert sampling_ceiling(4, noise=0.0) == pytest.approx(1)  # no doubt: the ceiling itself
    assert sampling_ceiling(5, noise=0.9) == pytest.approx(0.1)  # no evidence


@pytest.mark.parametrize("noise", [0.05, 0.3, 0.7, 1.0])
def test_the_sampling_ceiling_rises_with_more_views_and_stays_below_the_ceiling(noise):
    values = [sampling_ceiling(n, noise=noise, classes=6) for n in range(8)]
    assert (np.diff(values) > -1e-12).all() and values[-1] > values[0]
    assert all(value < ceiling(n, noise=noise, classes=6) for n, value in enumerate(values) if n and noise < 1)


def test_known_ceilings():
    assert [ceiling(n, noise=0.3) for n in (0, 1, 2)] == pytest.approx([0.1, 0.7, 0.7])
    # three views: two or three right, or one right and two others that differ (8 in 9), a tie of three
    assert ceiling(3, noise=0.3) == pytest.approx(0.7**3 + 3 * 0.7**2 * 0.3 + 3 * 0.7 * 0.3**2 * (8 / 9) / 3)
    assert ceiling(4, noise=0.0) == pytest.approx(1)
    assert ceiling(5, noise=0.9) == pytest.approx(0.1)  # every class is shown equally often: no evidence
    assert ceiling(1, noise=1.0) == pytest.approx(1 / 9)  # one class is ruled out
    assert ceiling(3, noise=0.4, classes=2) == pytest.approx(0.6**3 + 3 * 0.6**2 * 0.4)


def test_the_ceiling_never_falls_with_more_views():
    for noise in (0.1, 0.3, 0.7, 0.97):
        values = [ceiling(n, noise=noise, classes=6) for n in range(8)]
        assert all(b >= a - 1e-12 for a, b in zip(values, values[1:], strict=False)) and values[-1] > values[0]


def recognised(dataset: Dataset, split: str, images: str = "digits", source=None) -> np.ndarray:
    """The class that each view of each row shows [rows, views]: pixels are scrambled, so an image is known by its sorted pixels."""
    pixels, label = read(images, source, split)  # type: ignore[arg-type]
    known = {np.sort(image).tobytes(): value for image, value in zip(pixels, label, strict=True)}
    return np.array([[known[np.sort(array(row, name)).tobytes()] for name in dataset.fields] for row in dataset.rows(split)])


def test_sources_are_right_with_the_stated_probability_wrong_ones_uniform_and_independent_and_the_target_is_right():
    dataset = planted(rows=6000, noise=0.3)
    y = np.array([row.label for row in dataset.rows("train")])
    seen = recognised(dataset, "train")
    assert np.abs(np.bincount(y, minlength=10) - 600).max() < 4 * sqrt(600)
    assert (seen[:, -1] == y).all()
    right = seen[:, :-1] == y[:, None]
    assert np.abs(right.mean(0) - 0.7).max() < 4 * sqrt(0.21 / 6000)
    wrong = (seen[:, :-1] - y[:, None])[~right] % 10
    share = np.bincount(wrong, minlength=10)[1:] / len(wrong)
    assert np.abs(share - 1 / 9).max() < 4 * sqrt(1 / 9 / len(wrong))
    assert np.abs(np.corrcoef(right.T) - np.eye(3)).max() < 4 / sqrt(6000)


def test_a_vote_over_the_sources_of_the_test_rows_reaches_the_ceiling():
    dataset = planted(rows=1, sources=4, noise=0.4)
    y = np.array([row.label for row in dataset.rows("test")])
    seen = recognised(dataset, "test")
    assert len(y) == 4000
    for observed in (1, 2, 3, 4):
        votes = (seen[:, :observed, None] == np.arange(10)).sum(1) + np.random.default_rng(0).random((len(y), 10)) * 0.1
        expected = ceiling(observed, noise=0.4)
        assert abs((votes.argmax(1) == y).mean() - expected) < 4 * sqrt(expected * (1 - expected) / len(y))


def test_each_view_scrambles_its_pixels_its_own_way_the_same_in_both_splits():
    dataset = planted(rows=3000, noise=0.0, sources=2)
    means = {
        split: [np.mean([array(row, name) for row in rows(dataset, split)], 0) for name in dataset.fields] for split in ("train", "test")
    }
    for a in range(3):
        for b in range(3):
            alike = np.corrcoef(means["train"][a], means["test"][b])[0, 1]
            assert alike > 0.95 if a == b else alike < 0.5


def test_views_of_a_row_show_images_of_their_own():
    dataset = planted(rows=2000, noise=0.0)
    same = [np.array_equal(np.sort(array(row, "source1")), np.sort(array(row, "target"))) for row in dataset.rows("train")]
    assert np.mean(same) < 0.03  # by chance: 1 in 144


@pytest.mark.parametrize("images", ["digits", "mnist"])
def test_test_rows_show_no_training_image(tmp_path, images):
    source = None if images == "digits" else signed_mnist(tmp_path)
    dataset = planted(images=images, source=source, rows=500)
    found = {
        split: {np.sort(array(row, name)).tobytes() for row in rows(dataset, split) for name in row.data} for split in ("train", "test")
    }
    known = {split: {np.sort(image).tobytes() for image in read(images, source, split)[0]} for split in ("train", "test")}
    for split in ("train", "test"):
        assert found[split] <= known[split]
    if images == "digits":
        assert not found["train"] & found["test"]


def test_images_are_averaged_over_two_by_two_pixels(tmp_path):
    pixels, _ = read("mnist", signed_mnist(tmp_path), "train")
    with np.load(tmp_path / "mnist.npz") as file:
        image = file["x_train"][7].astype(float) / 255
    assert pixels.shape == (300, 196)
    assert np.allclose(pixels[7].reshape(14, 14)[2, 3], image[4:6, 6:8].mean(), atol=1e-6)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"images": "fashion"}, "name the folder that has fashion_subset_20000_4000.npz: --source FOLDER"),
        ({"sources": 0}, "sources: expected a number from 1 to 9"),
        ({"noise": 1.5}, "noise: expected a probability from 0 to 1"),
        ({"rows": 0}, "rows: expected at least 1"),
    ],
)
def test_impossible_keywords_are_refused(keywords, message):
    with pytest.raises(ValueError, match=message):
        planted(**keywords)


def test_impossible_ceilings_are_refused():
    with pytest.raises(ValueError, match="expected 0 observed views or more of 2 classes or more, got -1 of 10"):
        ceiling(-1, noise=0.3)
    with pytest.raises(ValueError, match="0 observed views or more"):
        sampling_ceiling(-1, noise=0.3)


def test_a_file_without_some_class_is_refused(tmp_path):
    with np.load(signed_mnist(tmp_path) / "mnist.npz") as file:
        arrays = dict(file)
    np.savez(tmp_path / "mnist.npz", **{**arrays, "y_test": np.zeros(100, dtype=np.uint8)})
    with pytest.raises(ValueError, match=r"y_test: expected images of all classes from 0 to 9, got \[0\]"):
        rows(planted(images="mnist", source=tmp_path), "test")


@needs_real_data
def test_real_fashion_plants_what_the_ceiling_is_computed_for():
    dataset = planted(images="fashion", source=REAL, rows=1)
    assert dataset.classes[8] == "bag"
    y = np.array([row.label for row in dataset.rows("test")])
    seen = recognised(dataset, "test", "fashion", REAL)
    assert (seen[:, -1] == y).mean() > 0.999 and np.abs((seen[:, :-1] == y[:, None]).mean(0) - 0.7).max() < 4 * sqrt(0.21 / 4000)
