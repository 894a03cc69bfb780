"""Birds without their pictures: captions, part locations, visible parts and attributes of CUB-200-2011.

Captions: Reed et al. 2016; parts, boxes and attributes: Wah et al. 2011 (research, non-commercial use). Of the files' 2,933 images the
2,393 count whose captions were paired with them beyond doubt (`pairing_strong`).
"""

import gzip
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from meme_dist.data.fields import SPECIAL, Field
from meme_dist.data.sets._arrays import held_out, locate, read_arrays, standardised
from meme_dist.data.sets._missing import check_missing, missing_at_random
from meme_dist.data.sets._pairing import check_split, generator, rows_of
from meme_dist.data.shards import Dataset, Row

ARRAYS, TEXT = "cub_test2933_parts_attrs.npz", "captions_testclasses.txt.gz"
CAPTIONS = 10  # of an image
WORDS = 32  # of a caption: 99 % of them have no more
COMMON = 3  # a word of the vocabulary is in the training captions this often
PARTS, ATTRIBUTES = 15, 312
TEST_SHARE = 5  # one image in five
MODALITIES = ("caption", "parts", "visible", "attributes")


class Birds(NamedTuple):
    """What is known of the images whose pairing is strong, in the files' order; caption k of image i is number 10 i + k."""

    caption: tuple[str, ...]  # [10 images], words in lower case
    parts: np.ndarray  # [images, 30], float32
    visible: np.ndarray  # [images, 15], 0 or 1
    attributes: np.ndarray  # [images, 312], in [0, 1]
    label: np.ndarray  # [images]
    classes: tuple[str, ...]
    test: np.ndarray  # [images], bool


def cub(*, source: Path, captions: int = CAPTIONS, missing: float = 0.0, seed: int = 0) -> Dataset:
    """1,923 images to train on, `captions` rows of each, and 470 to test on, one row each; labels are the 41 kinds of bird.

    Of every kind a random fifth of the images is the test part, the same for every seed.
    A row has one caption (a training image comes with `captions` different ones of its ten); where the 15 parts lie, across and down,
    within the bird's box, standardised by the training images, a part that is not visible standing at the mean; which parts are visible
    (0 or 1); and the share of people who saw each of 312 attributes in birds of the kind. The vocabulary is what the training captions
    say three times or more, so `source` is read at once: `cub_test2933_parts_attrs.npz` and `captions_testclasses.txt.gz`. A share of
    `missing` training entries is absent at random, each row keeps one.
    Raises ValueError for missing or altered files, captions outside 1..10, and a share below 0 or above 3/4.
    """
    if not 1 <= captions <= CAPTIONS:
        raise ValueError(f"captions: expected a number from 1 to {CAPTIONS}, got {captions}")
    check_missing(missing, len(MODALITIES))
    birds = read(source)

    def rows(split: str) -> Iterator[Row]:
        check_split(split)
        number, share, each = (seed, missing, captions) if split == "train" else (0, 0.0, 1)
        images = np.flatnonzero(birds.test == (split == "test"))
        drawn = generator(number, f"cub/{split}/captions").permuted(np.tile(np.arange(CAPTIONS), (len(images), 1)), axis=1)[:, :each]
        image, caption = np.repeat(images, each), (CAPTIONS * images[:, None] + drawn).ravel()
        order = generator(number, f"cub/{split}/order").permutation(len(image))
        observed = missing_at_random(len(order), len(MODALITIES), share, generator(number, f"cub/{split}/missing"))
        indices = {"caption": caption[order], **dict.fromkeys(MODALITIES[1:], image[order])}
        data = {"caption": birds.caption, "parts": birds.parts, "visible": birds.visible, "attributes": birds.attributes}
        return rows_of(data, indices, observed, birds.label[image[order]])

    keywords = {"captions": captions, "missing": missing, "seed": seed}
    return Dataset("cub", _fields(birds), rows, birds.classes, keywords, files=lambda: locate(source, [ARRAYS, TEXT]))


def read(source: Path) -> Birds:
    """Both files. Raises ValueError where one is missing or altered."""
    path, text = locate(source, [ARRAYS, TEXT])
    shapes = {
        "pairing_strong": ("images",),
        "class_index": ("images",),
        "class_names": ("classes",),
        "bbox": ("images", 4),
        "parts": ("images", PARTS, 3),
        "class_attributes": ("classes", ATTRIBUTES),
    }
    arrays = read_arrays(path, shapes)
    sentences = _sentences(text, CAPTIONS * len(arrays["bbox"]))
    chosen = np.flatnonzero(arrays["pairing_strong"])
    kinds, label = np.unique(arrays["class_index"][chosen], return_inverse=True)
    test = held_out(label, one_in=TEST_SHARE, eligible=np.ones(len(label), dtype=bool), rng=generator(0, "cub/split"))
    seen = arrays["parts"][chosen, :, 2] > 0
    return Birds(
        tuple(sentences[CAPTIONS * image + number] for image in chosen for number in range(CAPTIONS)),
        _located(arrays["parts"][chosen, :, :2], arrays["bbox"][chosen], seen, ~test),
        seen.astype(np.float32),
        (arrays["class_attributes"][kinds][label] / 100).astype(np.float32),  # per cent in the file
        label,
        tuple(str(name) for name in arrays["class_names"][kinds]),
        test,
    )


def vocabulary(sentences: Sequence[str]) -> tuple[str, ...]:
    """The special tokens, then the words that these sentences say three times or more, in alphabetical order."""
    said = Counter(word for sentence in sentences for word in sentence.split())
    return (*SPECIAL, *sorted(word for word, times in said.items() if times >= COMMON))


def _fields(birds: Birds) -> dict[str, Field]:
    heard = [sentence for number, sentence in enumerate(birds.caption) if not birds.test[number // CAPTIONS]]
    return {
        "caption": Field(kind="text", shape=(WORDS,), codec="txt", likelihood="categorical", vocabulary=vocabulary(heard)),
        "parts": Field(kind="vector", shape=(2 * PARTS,), codec="npy", likelihood="normal"),
        "visible": Field(kind="vector", shape=(PARTS,), codec="npy", likelihood="bernoulli"),
        "attributes": Field(kind="vector", shape=(ATTRIBUTES,), codec="npy", likelihood="bernoulli"),
    }


def _located(place: np.ndarray, box: np.ndarray, seen: np.ndarray, train: np.ndarray) -> np.ndarray:
    """[images, 15, 2] pixels -> [images, 30]: within the box (left, top, width, height), standardised by the parts seen in training."""
    within = (place - box[:, None, :2]) / box[:, None, 2:]
    located = np.zeros((len(place), PARTS, 2), dtype=np.float32)  # the mean, where nothing is seen
    for part in range(PARTS):
        rows = np.flatnonzero(seen[:, part])
        if train[rows].any():
            located[rows, part] = standardised(within[rows, part], train[rows])
    return located.reshape(len(place), -1)


def _sentences(path: Path, count: int) -> list[str]:
    """The captions, one a line, as words in lower case without punctuation."""
    try:
        lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    except (EOFError, OSError, UnicodeDecodeError, zlib.error) as error:
        raise ValueError(f"{path}: expected gzipped text, one caption a line ({error}); get the file again") from error
    if len(lines) != count:
        raise ValueError(f"{path}: expected {count} captions, {CAPTIONS} for each image of {ARRAYS}, got {len(lines)}; get the file again")
    return [" ".join(re.findall("[a-z0-9]+", line.lower())) for line in lines]
