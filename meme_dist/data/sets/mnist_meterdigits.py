"""MNIST with photographed meter digits, paired by digit; optionally spoken digits and the digit's name: up to four modalities.

Real stand-in for MNIST-SVHN where SVHN cannot be had. `source` holds `mnist.npz` (LeCun et al.; CC BY-SA 3.0), `meterdigits.npz`
(haverland/Tenth-of-step-of-a-meter-digit, Apache-2.0) and, for `spoken`, `fsdd_logmel_32x32.npz` (Free Spoken Digit Dataset, CC BY-SA 4.0).
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from meme_dist.data.fields import Field
from meme_dist.data.sets._arrays import IMAGES, MNIST, Shape, locate, read_arrays
from meme_dist.data.sets._missing import check_partly_paired
from meme_dist.data.sets._names import NAMES, SPELLED, name_field
from meme_dist.data.sets._pairing import Indices, Rest, Split, check_split, generator, partial_rows, recycled
from meme_dist.data.shards import Dataset, Row

SPOKEN_MEAN, SPOKEN_STDDEV = -4.282, 5.181  # of log-mel energies, over all elements of the 2,700 training recordings
PHOTO_MARGIN = 6  # columns of zeros on either side of a 32x20 photo

FILES = {
    "mnist": (MNIST, IMAGES),
    "photo": ("meterdigits.npz", {"x": ("rows", 32, 20, 3), "y": ("rows",), "is_test": ("rows",)}),
    "spoken": ("fsdd_logmel_32x32.npz", {"x": ("rows", 32, 32), "y": ("rows",), "is_train": ("rows",)}),
}


def mnist_meterdigits(
    *,
    source: Path,
    spoken: bool = False,
    name: bool = False,
    permutations: int = 3,
    paired_fraction: float = 1.0,
    always: Literal["split", "mnist", "photo", "spoken", "name"] = "split",
    unpaired: bool = True,
    seed: int = 0,
) -> Dataset:
    """Rows of an MNIST image (1, 28, 28) and a meter photo (3, 32, 32: 32x20 between two margins of zeros) of the same digit.

    Training: of each class every MNIST image at most once and every photo at most `permutations` times, whichever ends first, in random
    order: 48,502 pairs for 3, none of them twice. Test: the 3,000 test photos, each with another MNIST test image of its class, the same
    for every seed. `spoken` adds a log-mel spectrogram (1, 32, 32), standardised and kept as floats (bytes would round it to 0.07), and
    reuses each recording as often as needed (300 a class are few; train and test recordings are apart, their speakers are the same six).
    `name` adds the digit's name, letter by letter.

    `paired_fraction` of the training rows stay whole; of each other row one modality alone stays: `always`, or for "split" any with equal
    probability. `unpaired=False` drops those (the control: pairs only). Raises ValueError for missing files and bad keywords.
    """
    fields = _fields(spoken, name)

    check_partly_paired(paired_fraction, always, list(fields))

    def rows(split: str) -> Iterator[Row]:
        check_split(split)
        train = split == "train"
        part = read(split, source, spoken=spoken)
        number, rest = (seed, Rest(paired_fraction, always, unpaired)) if train else (0, Rest())
        indices = _match(part, permutations if train else 1, generator(number, f"mnist_meterdigits/{split}/pairs"))
        label = part.labels["mnist"][indices["mnist"]]
        data, indices = ({**part.data, "name": SPELLED}, {**indices, "name": label}) if name else (part.data, indices)
        return partial_rows(data, indices, label, rest=rest, seed=number, purpose=f"mnist_meterdigits/{split}")

    keywords = {
        "spoken": spoken,
        "name": name,
        "permutations": permutations,
        "paired_fraction": paired_fraction,
        "always": always,
        "unpaired": unpaired,
        "seed": seed,
    }
    return Dataset("mnist_meterdigits", fields, rows, NAMES, keywords, files=lambda: _files(source, spoken))


def read(split: str, source: Path, *, spoken: bool = False) -> Split:
    """Images as bytes, channels first, and spectrograms as floats, in the files' order. Raises ValueError for missing or altered files."""
    wanted = zip(_files(source, spoken), _wanted(spoken), strict=True)
    mnist, photo, *rest = (read_arrays(path, shapes) for path, (_, shapes) in wanted)
    here = photo["is_test"].astype(bool) == (split == "test")
    data: dict[str, np.ndarray | tuple[str, ...]] = {"mnist": mnist[f"x_{split}"][:, None], "photo": _padded(photo["x"][here])}
    labels = {"mnist": mnist[f"y_{split}"], "photo": photo["y"][here]}
    for speech in rest:
        here = speech["is_train"].astype(bool) == (split == "train")
        data["spoken"] = (speech["x"][here, None].astype(np.float32) - SPOKEN_MEAN) / SPOKEN_STDDEV
        labels["spoken"] = speech["y"][here]
    return Split(data, labels)


def _wanted(spoken: bool) -> list[tuple[str, Mapping[str, Shape]]]:
    return [FILES[key] for key in ("mnist", "photo", *(["spoken"] if spoken else []))]


def _files(source: Path, spoken: bool) -> list[Path]:
    return locate(source, [name for name, _ in _wanted(spoken)])


def _fields(spoken: bool, name: bool) -> dict[str, Field]:
    fields = {
        "mnist": Field(kind="image", shape=(1, 28, 28), codec="npy", likelihood="laplace"),
        "photo": Field(kind="image", shape=(3, 32, 32), codec="npy", likelihood="laplace"),
    }
    if spoken:
        fields["spoken"] = Field(kind="vector", shape=(1, 32, 32), codec="npy", likelihood="normal")
    if name:
        fields["name"] = name_field()
    return fields


def _match(part: Split, permutations: int, rng: np.random.Generator) -> Indices:
    uses = {"mnist": 1, "photo": permutations, "spoken": None}
    return recycled(part.labels, uses={key: uses[key] for key in part.labels}, rng=rng)


def _padded(photos: np.ndarray) -> np.ndarray:
    """[rows, 32, 20, 3] -> [rows, 3, 32, 32]."""
    margin = (PHOTO_MARGIN, PHOTO_MARGIN)
    return np.pad(photos.transpose(0, 3, 1, 2), ((0, 0), (0, 0), (0, 0), margin))
