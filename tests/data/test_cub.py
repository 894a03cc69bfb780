"""Laws of the birds: whose caption, which split, which words, and where parts lie."""

import gzip
from collections import Counter

import numpy as np
import pytest

from meme_dist.data.fields import UNKNOWN
from meme_dist.data.sets.cub import ARRAYS, TEXT, cub, read, vocabulary
from meme_dist.data.shards import Row
from tests.data.small import REAL, array, contents, cub_files, rows

needs_real_data = pytest.mark.skipif(not (REAL / "cub_text").is_dir(), reason="no real data in ../shared/data")


def said(row: Row) -> tuple[int, int]:
    """Image and number of a caption of the small files."""
    caption = row.data["caption"]
    assert isinstance(caption, str)
    _, image, _, number, *_ = caption.split()
    return int(image), int(number)


def test_every_modality_of_a_row_is_of_the_image_that_its_caption_describes(tmp_path):
    dataset = cub(source=cub_files(tmp_path))
    with np.load(tmp_path / ARRAYS) as file:
        kind, parts, attributes = file["class_index"], file["parts"], file["class_attributes"]
    for split in ("train", "test"):
        for row in dataset.rows(split):
            image, _ = said(row)
            assert np.array_equal(array(row, "visible"), parts[image, :, 2])
            assert np.allclose(array(row, "attributes"), attributes[kind[image]] / 100, atol=1e-6)
            assert dataset.classes[row.label or 0] == {0: "auk", 2: "crow"}[int(kind[image])]


def test_training_images_come_with_several_captions_test_images_with_one_and_none_is_in_both(tmp_path):
    dataset = cub(source=cub_files(tmp_path), captions=4)
    train, test = ([said(row) for row in dataset.rows(split)] for split in ("train", "test"))
    assert len(set(train)) == len(train) == 4 * 16 and set(Counter(image for image, _ in train).values()) == {4}
    assert len(test) == len({image for image, _ in test}) == 4
    assert not {image for image, _ in train} & {image for image, _ in test}
    assert len({number for _, number in train}) == 10  # drawn, not the first four
    assert not {image for image, _ in train + test} & set(range(1, 30, 3))  # weakly paired
    assert {said(row) for row in cub(source=tmp_path).rows("train")} >= set(train)


def test_the_vocabulary_is_what_training_captions_say_three_times(tmp_path):
    assert vocabulary(["b a a", "a b c b"]) == ("<pad>", "<unk>", "<eos>", "a", "b")
    cub_files(tmp_path)
    birds = read(tmp_path)
    held = [sentence.split()[1] for number, sentence in enumerate(birds.caption) if birds.test[number // 10]]
    field = cub(source=tmp_path).fields["caption"]
    assert {"image", "caption", "green"} <= set(field.vocabulary)
    only_tested = set(held) - {str(number) for number in range(10)}  # those are captions' numbers too
    assert only_tested and not only_tested & set(field.vocabulary)
    assert UNKNOWN in field.decode(field.encode(f"image {min(only_tested)}"))


def test_captions_are_lower_case_words_without_punctuation(tmp_path):
    assert all(caption == caption.lower() and caption.replace(" ", "").isalnum() for caption in read(cub_files(tmp_path)).caption)


def test_places_are_relative_to_the_box_standardised_by_what_training_images_show_and_hidden_parts_stand_at_the_mean(tmp_path):
    cub_files(tmp_path)
    birds = read(tmp_path)
    place, seen = birds.parts.reshape(-1, 15, 2), birds.visible > 0
    for part in range(15):
        shown = place[~birds.test & seen[:, part], part]
        assert np.abs(shown.mean(0)).max() < 1e-5 and np.abs(shown.std(0) - 1).max() < 1e-5
    assert not place[~seen].any()
    with np.load(tmp_path / ARRAYS) as file:
        arrays = dict(file)
    moved = np.where(arrays["parts"][..., 2:] > 0, 2 * arrays["parts"][..., :2] + 11, 0)
    box = np.concatenate([2 * arrays["bbox"][:, :2] + 11, 2 * arrays["bbox"][:, 2:]], 1)
    parts = np.concatenate([moved, arrays["parts"][..., 2:]], 2)
    np.savez(tmp_path / ARRAYS, **{**arrays, "parts": parts, "bbox": box})
    assert np.allclose(read(tmp_path).parts, birds.parts, atol=1e-3)


def test_where_parts_of_test_images_lie_changes_no_training_row(tmp_path):
    before = rows(cub(source=cub_files(tmp_path)))
    tested = {said(row)[0] for row in cub(source=tmp_path).rows("test")}
    with np.load(tmp_path / ARRAYS) as file:
        arrays = dict(file)
    arrays["parts"][list(tested), :, :2] *= 3
    np.savez(tmp_path / ARRAYS, **arrays)
    assert list(map(contents, rows(cub(source=tmp_path)))) == list(map(contents, before))


def test_captions_of_another_number_are_refused(tmp_path):
    text = cub_files(tmp_path) / TEXT
    text.write_bytes(gzip.compress(b"a bird\n"))
    with pytest.raises(ValueError, match="expected 300 captions, 10 for each image of cub_test2933_parts_attrs.npz, got 1"):
        cub(source=tmp_path)
    with pytest.raises(ValueError, match="captions: expected a number from 1 to 10, got 0"):
        cub(source=tmp_path, captions=0)


@needs_real_data
def test_real_birds_are_1923_and_470_of_41_kinds():
    dataset = cub(source=REAL / "cub_text", captions=2)
    train, test = (rows(dataset, split) for split in ("train", "test"))
    assert (len(train), len(test), len(dataset.classes)) == (2 * 1923, 470, 41)
    assert {row.label for row in test} == set(range(41))
    assert len(dataset.fields["caption"].vocabulary) == 978
    assert not {contents(row)["parts"] for row in train} & {contents(row)["parts"] for row in test}
    # seen by eye in the files: the first image, an albatross, shows its tail, and its first caption says grey
    birds = read(REAL / "cub_text")
    assert birds.classes[0] == "001.Black_footed_Albatross" and "medium sized bird has a dark grey color" in birds.caption[0]
