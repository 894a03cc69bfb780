"""Laws of the data sets with attributes: rules that judge as the labels do, and measurements that follow the picture."""

from pathlib import Path

import numpy as np
import pytest
import torch

from meme_dist.data.sets.mnist_attributes import Attributes, mnist_attributes, read, rule, slant, thickness
from meme_dist.data.sets.swiss_roll import BORDER, WIDTH, low, swiss_roll
from tests.data.small import REAL, array, rows, same, shown

needs_real_data = pytest.mark.skipif(not (REAL / "mnist.npz").is_file(), reason="no real data in ../shared/data")


def test_points_lie_on_the_roll_and_the_rule_gives_back_their_labels() -> None:
    found = rows(swiss_roll(rows=2000))
    point = np.stack([array(row, "point") for row in found])
    angle = np.hypot(point[:, 0], point[:, 2])
    assert (angle >= 1.5 * np.pi - 1e-3).all() and (angle <= 4.5 * np.pi + 1e-3).all()
    np.testing.assert_allclose(angle * np.cos(angle), point[:, 0], atol=2e-3)
    assert point[:, 1].min() >= 0 and point[:, 1].max() <= WIDTH
    label = np.array([row.label for row in found])
    assert low(torch.from_numpy(point)).long().tolist() == label.tolist() == [int(array(row, "low")[0]) for row in found]
    assert label.mean() == pytest.approx(BORDER / WIDTH, abs=0.04)
    for column in (0, 2):  # where on the roll a point is says nothing of its label
        assert abs(np.corrcoef(point[:, column], label)[0, 1]) < 0.08


def test_the_seed_the_noise_and_the_labels_of_a_roll_are_apart() -> None:
    assert same(swiss_roll(rows=50, seed=1), swiss_roll(rows=50, seed=1), "train")
    assert not same(swiss_roll(rows=50, seed=1), swiss_roll(rows=50, seed=2), "train")
    assert same(swiss_roll(rows=50, seed=1), swiss_roll(rows=70, seed=2), "test")
    whole, partial = rows(swiss_roll(rows=200)), rows(swiss_roll(rows=200, unlabelled=0.3))
    assert shown(swiss_roll(rows=200, unlabelled=0.3)) == {("point", "low"): 140, ("point",): 60}
    for a, b in zip(whole, partial, strict=True):
        assert (
            np.array_equal(array(a, "point"), array(b, "point"))
            and b.label in (a.label, None)
            and ("low" in b.data) == (b.label is not None)
        )
    apart = [
        array(a, "point") - array(b, "point")
        for a, b in zip(rows(swiss_roll(rows=500, noise=0.5)), rows(swiss_roll(rows=500)), strict=True)
    ]
    assert np.std(apart) == pytest.approx(0.5, rel=0.1)
    with pytest.raises(ValueError, match="unlabelled from 0 to 1; got 10, 0.0 and 1.5"):
        swiss_roll(rows=10, unlabelled=1.5)
    with pytest.raises(ValueError, match="split: expected 'train' or 'test'"):
        list(swiss_roll().rows("all"))


def bar(width: int, lean: float = 0.0, size: int = 28) -> np.ndarray:
    """A stroke of this width and 20 rows, which leans by so many columns a row upwards."""
    image = np.zeros((size, size), dtype=np.uint8)
    for row in range(4, 24):
        start = 12 + round(lean * (14 - row))
        image[row, start : start + width] = 255
    return image


def test_thickness_is_about_the_width_of_a_stroke_and_knows_no_brightness() -> None:
    measured = thickness(np.stack([bar(width) for width in (2, 3, 4, 6)]))
    assert (np.diff(measured) > 0).all()
    assert measured[1] == pytest.approx(2 * 60 / (60 - 18))  # 20 x 3, of which 18 x 1 have four bright neighbours
    dim = bar(4).astype(np.float32) / 1000
    assert thickness(dim[None])[0] == measured[2]
    assert thickness(np.zeros((1, 28, 28)))[0] == 0 and slant(np.zeros((1, 28, 28)))[0] == 0


def test_slant_is_the_tangent_of_the_lean_and_is_not_moved_by_shifting_the_digit() -> None:
    images = np.stack([bar(3, lean) for lean in (-0.4, 0.0, 0.3)])
    assert slant(images) == pytest.approx([-0.4, 0, 0.3], abs=0.03)
    assert slant(np.roll(images, (2, -3), (1, 2))) == pytest.approx(slant(images))
    assert Attributes(2.9, 0.1).of(images)["leaning"].tolist() == [False, False, True]


def mnist_of(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    made = {}
    for split, count in (("train", 40), ("test", 12)):
        made[f"x_{split}"] = np.stack([bar(int(rng.integers(2, 7)), float(rng.uniform(-0.4, 0.4))) for _ in range(count)])
        made[f"y_{split}"] = (np.arange(count) % 10).astype(np.uint8)
    np.savez(folder / "mnist.npz", **made)
    return folder


def test_half_of_the_training_images_lean_and_test_images_are_judged_by_the_same_medians(tmp_path: Path) -> None:
    dataset = mnist_attributes(source=mnist_of(tmp_path))
    train, test = rows(dataset), rows(dataset, "test")
    assert (len(train), len(test)) == (40, 12)
    assert 0.4 <= np.mean([array(row, "leaning")[0] for row in train]) <= 0.5  # bars of one slant are on one side of the median
    judge = rule(read(tmp_path)["x_train"])
    for row in train + test:
        has = judge.of(array(row, "digit"))
        assert {name: float(has[name][0]) for name in has} == {name: float(array(row, name)[0]) for name in has}
    few = rows(mnist_attributes(source=tmp_path, rows=10))
    assert [array(row, "thick")[0] for row in few] == [array(row, "thick")[0] for row in train[:10]]  # the medians stay those of all
    partial = rows(mnist_attributes(source=tmp_path, unlabelled=0.5))
    assert 0.3 < sum("thick" in row.data for row in partial) / 40 < 0.7 and all("digit" in row.data for row in partial)
    assert {tuple(row.data) for row in rows(mnist_attributes(source=tmp_path, unlabelled=0.5), "test")} == {("digit", "thick", "leaning")}
    with pytest.raises(ValueError, match="expected 1 row or more"):
        mnist_attributes(source=tmp_path, rows=0)
    (tmp_path / "mnist.npz").unlink()
    with pytest.raises(ValueError, match="missing mnist.npz; name the folder that has them: --source FOLDER"):
        list(dataset.rows("train"))


@needs_real_data
def test_real_digits_differ_in_both_attributes_which_are_nearly_independent() -> None:
    images = read(REAL)["x_test"]
    has = rule(images).of(images)
    assert all(0.45 < value.mean() <= 0.5 for value in has.values())
    assert abs(np.corrcoef(has["thick"], has["leaning"])[0, 1]) < 0.15
