"""MNIST with SVHN (Street View House Numbers), paired by digit: the set of Shi et al. 2019 and Joy et al. 2022.

Files: MNIST in IDX format (LeCun et al.; CC BY-SA 3.0) and the cropped digits of SVHN in MATLAB format (Netzer et al. 2011;
non-commercial use). Checksums: as published with torchvision, TensorFlow Datasets and others, which agree.
"""

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from meme_dist.data.fields import Field
from meme_dist.data.sets._download import Remote, find, present
from meme_dist.data.sets._idx import read_idx
from meme_dist.data.sets._missing import check_partly_paired
from meme_dist.data.sets._names import NAMES
from meme_dist.data.sets._pairing import Indices, Labels, Rest, Split, check_split, generator, one_to_one, partial_rows, permuted
from meme_dist.data.shards import Dataset, Row

MNIST_MIRRORS = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/")
SVHN_MIRRORS = ("http://ufldl.stanford.edu/housenumbers/",)


def _remote(name: str, mirrors: tuple[str, ...], size: int, sha256: str) -> Remote:
    return Remote(name, tuple(mirror + name for mirror in mirrors), size, sha256)


FILES = {
    "train": (
        _remote("train-images-idx3-ubyte.gz", MNIST_MIRRORS, 9912422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
        _remote("train-labels-idx1-ubyte.gz", MNIST_MIRRORS, 28881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
        _remote("train_32x32.mat", SVHN_MIRRORS, 182040794, "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8"),
    ),
    "test": (
        _remote("t10k-images-idx3-ubyte.gz", MNIST_MIRRORS, 1648877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
        _remote("t10k-labels-idx1-ubyte.gz", MNIST_MIRRORS, 4542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
        _remote("test_32x32.mat", SVHN_MIRRORS, 64275384, "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b"),
    ),
}


def mnist_svhn(
    *,
    source: Path | None = None,
    pairing: Literal["one_to_one", "permutations"] = "one_to_one",
    permutations: int = 30,
    paired_fraction: float = 1.0,
    always: Literal["split", "mnist", "svhn"] = "split",
    unpaired: bool = True,
    seed: int = 0,
) -> Dataset:
    """Rows of an MNIST image (1, 28, 28) and an SVHN image (3, 32, 32) of the same digit; test rows are the same for every seed.

    `source` is a folder with the six official files; without it they are downloaded once (258 MB).
    `pairing`: "one_to_one" in the files' order as the released MEME code does (56,068 training pairs), or MMVAE's random matching within
    classes, `permutations` times (1,682,040 pairs for 30; 10 GB of shards). The 10,000 test pairs are of one permutation then.
    `paired_fraction` of the training pairs stay pairs; of each other one modality alone stays: `always`, or for "split" either with equal
    probability. `unpaired=False` drops those (the control: pairs only). Raises ValueError for missing or altered files and bad keywords.
    """
    fields = {
        "mnist": Field(kind="image", shape=(1, 28, 28), codec="npy", likelihood="laplace"),
        "svhn": Field(kind="image", shape=(3, 32, 32), codec="npy", likelihood="laplace"),
    }

    check_partly_paired(paired_fraction, always, list(fields))

    def rows(split: str) -> Iterator[Row]:
        check_split(split)
        train = split == "train"
        part = read(split, source)
        number, rest = (seed, Rest(paired_fraction, always, unpaired)) if train else (0, Rest())
        indices = _match(part.labels, pairing, permutations if train else 1, generator(number, f"mnist_svhn/{split}/pairs"))
        label = part.labels["mnist"][indices["mnist"]]
        return partial_rows(part.data, indices, label, rest=rest, seed=number, purpose=f"mnist_svhn/{split}")

    keywords = {
        "pairing": pairing,
        "permutations": permutations,
        "paired_fraction": paired_fraction,
        "always": always,
        "unpaired": unpaired,
        "seed": seed,
    }
    return Dataset("mnist_svhn", fields, rows, NAMES, keywords, files=lambda: _files(source))


def _files(source: Path | None) -> list[Path]:
    """Those of the user; downloads are always the same files, which `find` sees to."""
    return [] if source is None else list(present([file for split in FILES.values() for file in split], source).values())


def _match(labels: Labels, pairing: str, permutations: int, rng: np.random.Generator) -> Indices:
    if pairing == "one_to_one":
        return one_to_one(labels)
    if pairing == "permutations":
        return permuted(labels, permutations=permutations, rng=rng)
    raise ValueError(f"pairing: expected 'one_to_one' or 'permutations', got {pairing!r}")


def read(split: str, source: Path | None = None) -> Split:
    """Both official sets, images as bytes and channels first, in the files' order. Raises ValueError for missing or altered files."""
    files = FILES[split]
    found = find(files, source=source)
    images, labels, photos = (found[file.name] for file in files)
    x, y = read_idx(images, rank=3), read_idx(labels, rank=1)
    if len(x) != len(y) or x.shape[1:] != (28, 28):
        raise ValueError(f"{images}: expected {len(y)} images of 28x28, as many as {labels.name} has labels, got {x.shape}")
    photo, digit = read_svhn(photos)
    return Split({"mnist": x[:, None], "svhn": photo}, {"mnist": y, "svhn": digit})


def read_svhn(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images [rows, 3, 32, 32] as bytes and digits [rows] of a cropped-digits file, in which the digit 0 is labelled 10."""
    from scipy.io import loadmat  # here: half a second to import, and most commands never need it
    from scipy.io.matlab import MatReadError

    try:
        content = loadmat(path, variable_names=("X", "y"))
    except (MatReadError, NotImplementedError, OSError, TypeError, ValueError, zlib.error) as error:
        raise ValueError(f"{path}: no readable MATLAB file ({error}); get the file again") from error
    x, y = content.get("X"), content.get("y")
    if x is None or y is None or x.dtype != np.uint8 or x.shape[:3] != (32, 32, 3) or x.shape[3:] != (y.size,):
        got = {name: (value.dtype.name, value.shape) for name, value in (("X", x), ("y", y)) if value is not None}
        raise ValueError(f"{path}: expected X (32, 32, 3, rows) of uint8 and y (rows, 1), got {got}")
    y = y.ravel().astype(np.int64)
    if not ((y >= 1) & (y <= 10)).all():
        raise ValueError(f"{path}: expected labels from 1 to 10 (10 is the digit 0), got {np.unique(y).tolist()}")
    return np.ascontiguousarray(x.transpose(3, 2, 0, 1)), y % 10
