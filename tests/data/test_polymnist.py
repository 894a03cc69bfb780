"""Laws of digits over photographs: whose digit, whose photograph, which crop, and colours inverted where the ink is."""

import numpy as np
import pytest
from PIL import Image

from meme_dist.data.sets.polymnist import composed, photographs, polymnist
from meme_dist.data.shards import Dataset
from tests.data.small import REAL, array, gradients, read_sign, rows, shown, signed_mnist

needs_real_data = pytest.mark.skipif(not (REAL / "photographs").is_dir(), reason="no photographs in ../shared/data")


def parsed(image: np.ndarray, photo: int) -> tuple[int, int]:
    """Class and number of the MNIST image in a composed one, which must be a crop of this `gradients` photograph, inverted at the ink."""
    blue = image[2].astype(int)
    ink = blue == 255 - 10 * photo
    assert (ink | (blue == 10 * photo)).all()
    paper = np.where(ink, 255 - image, image).astype(int)
    top, left = paper[0, 0, 0], paper[1, 0, 0]
    assert (paper[0] == np.indices((28, 28))[0] + top).all() and (paper[1] == np.indices((28, 28))[1] + left).all()
    return read_sign(ink)


def signs(dataset: Dataset, split: str) -> list[tuple[int | None, list[tuple[int, int]]]]:
    return [(row.label, [parsed(array(row, f"m{j}"), j) for j in range(len(dataset.fields))]) for row in dataset.rows(split)]


def test_each_modality_shows_a_digit_of_the_rows_class_over_a_crop_of_its_own_photograph(tmp_path):
    dataset = polymnist(source=gradients(signed_mnist(tmp_path), 3), modalities=3)
    for split, numbers in (("train", set(range(300))), ("test", set(range(300, 400)))):
        found = signs(dataset, split)
        assert len(found) == len(numbers)
        assert all(digit == label for label, row in found for digit, _ in row)
        for column in range(3):  # every image of its own part of MNIST once a modality, so the parts share none
            assert {row[column][1] for _, row in found} == numbers
        for a, b in ((0, 1), (1, 2), (0, 2)):  # an order of its own each: chance leaves 1 in 30, and 1 in 10 to test
            assert sum(row[a] == row[b] for _, row in found) < len(found) / 4
    assert [label for label, _ in signs(dataset, "train")] != sorted(label for label, _ in signs(dataset, "train"))  # type: ignore[type-var]


def test_crops_are_spread_over_the_whole_photograph(tmp_path):
    dataset = polymnist(source=gradients(signed_mnist(tmp_path), 2, shape=(31, 29)), modalities=2)
    corners = {tuple(array(row, "m0")[:2, 0, 0].tolist()) for row in dataset.rows("train")}
    assert corners == {(top, left) for top in range(4) for left in range(2)}


def test_colours_are_inverted_where_the_digit_is_brighter_than_128_and_nowhere_else():
    digit = np.zeros((28, 28), dtype=np.uint8)
    digit[1, 2], digit[3, 4], digit[5, 6] = 255, 129, 128
    photo = np.random.default_rng(0).integers(0, 256, (28, 28, 3)).astype(np.uint8)
    image = composed(photo, digit, np.array([0.999, 0.999]))
    inverted = (image != photo.transpose(2, 0, 1)).all(0)
    assert sorted(zip(*map(np.ndarray.tolist, np.nonzero(inverted)), strict=True)) == [(1, 2), (3, 4)]
    assert (image[:, 3, 4] == 255 - photo[3, 4]).all()


def test_fewer_photographs_than_modalities_come_again_turned(tmp_path):
    gradients(tmp_path, 2, shape=(40, 30))
    found = photographs(tmp_path, 10)
    assert len({photo.tobytes() + bytes(photo.shape[:2]) for photo in found}) == 10
    assert [int(photo[0, 0, 2]) for photo in found] == 5 * [0, 10]
    assert np.array_equal(found[2], np.rot90(found[0])) and found[2].shape == (30, 40, 3)
    assert np.array_equal(found[8], found[0][:, ::-1])
    assert len({photo.tobytes() + bytes(photo.shape[:2]) for photo in photographs(gradients(tmp_path / "one", 1), 8)}) == 8


def test_photographs_lie_beside_mnist_or_in_their_folder(tmp_path):
    gradients(signed_mnist(tmp_path), 1)
    gradients(tmp_path / "photographs", 4)
    assert [int(photo[0, 0, 2]) for photo in photographs(tmp_path, 4)] == [0, 10, 20, 30]


def test_rows_are_a_random_part_of_the_whole(tmp_path):
    gradients(signed_mnist(tmp_path), 2)
    some, every = (rows(polymnist(source=tmp_path, modalities=2, rows=count)) for count in (40, 10_000))
    assert len(some) == 40 and len(every) == 300
    assert [row.label for row in some] == [row.label for row in every[:40]]
    assert len({row.label for row in some}) > 6
    assert shown(polymnist(source=tmp_path, modalities=2, rows=40), "test") == {("m0", "m1"): 100}


def test_grey_and_transparent_photographs_serve_too(tmp_path):
    Image.fromarray(np.full((28, 28), 7, dtype=np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(np.full((28, 28, 4), 9, dtype=np.uint8)).save(tmp_path / "b.png")
    grey, clear = photographs(tmp_path, 2)
    assert (grey == 7).all() and (clear == 9).all() and grey.shape == clear.shape == (28, 28, 3)


def test_photographs_that_are_none_or_too_few_or_too_small_are_named(tmp_path):
    signed_mnist(tmp_path)
    with pytest.raises(ValueError, match="5 modalities need at least 1 photographs .* got 0"):
        rows(polymnist(source=tmp_path))
    gradients(tmp_path, 1)
    with pytest.raises(ValueError, match="9 modalities need at least 2 photographs .* got 1"):
        rows(polymnist(source=tmp_path, modalities=9))
    gradients(tmp_path, 1, shape=(27, 60))
    with pytest.raises(ValueError, match="0.png: expected a photograph of 28 x 28 or more, got 27 x 60"):
        rows(polymnist(source=tmp_path))
    (tmp_path / "0.png").write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match="0.png: expected a photograph as PNG"):
        rows(polymnist(source=tmp_path))


@pytest.mark.parametrize(
    ("keywords", "message"), [({"modalities": 11}, "modalities: expected a number from 2 to 10"), ({"rows": 0}, "rows:")]
)
def test_impossible_keywords_are_refused(tmp_path, keywords, message):
    with pytest.raises(ValueError, match=message):
        polymnist(source=tmp_path, **keywords)


@needs_real_data
def test_seven_real_photographs_carry_ten_modalities():
    found = [row for row, _ in zip(polymnist(source=REAL, modalities=10, rows=50).rows("train"), range(50), strict=False)]
    assert len(found) == 50 and {array(row, f"m{j}").shape for row in found for j in range(10)} == {(3, 28, 28)}
    assert {row.label for row in found} == set(range(10))
    assert len({photo.tobytes() for photo in photographs(REAL, 10)}) == 10
