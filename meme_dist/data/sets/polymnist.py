"""MNIST digits over photographs, 2 to 10 modalities, made as PolyMNIST is (Sutter, Daunhawer and Vogt 2021) from files that the user has.

All images of a row show the same digit, each in another hand and over a random crop of its modality's own photograph, whose colours are
inverted where the digit is. PolyMNIST's own photographs are not needed, so figures on other photographs are no figures on PolyMNIST.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from meme_dist.data.fields import Field
from meme_dist.data.sets._arrays import IMAGES, MNIST, locate, read_arrays
from meme_dist.data.sets._missing import check_missing, missing_at_random
from meme_dist.data.sets._names import NAMES
from meme_dist.data.sets._pairing import check_split, generator, permuted
from meme_dist.data.shards import Dataset, Row

FEWEST, MOST = 2, 10  # modalities
SIDE = 28
INK = 128  # a pixel is the digit's where it is brighter: PolyMNIST's threshold
TURNS = 8  # ways of laying a photograph: four rotations, mirrored or not
ALL_ROWS = 60_000


def polymnist(*, source: Path, modalities: int = 5, rows: int = ALL_ROWS, missing: float = 0.0, seed: int = 0) -> Dataset:
    """Rows of images m0, m1, ... (3, 28, 28) of the same digit; at most `rows` to train on (60,000 there are) and 10,000 complete to test.

    `source` holds `mnist.npz` (LeCun et al.; CC BY-SA 3.0) and one or more photographs as .png, there or in its folder `photographs`,
    each at least 28 x 28. Modality j is over the j-th by name; where there are fewer, the same ones come again, rotated by 90, 180 and
    270 degrees, then mirrored. For each modality and class the MNIST images are in a random order of their own: an image is used once a
    modality, and stands twice in the same row by chance only (PolyMNIST's rule). Training and test rows share the photographs, never an
    MNIST image. A share of `missing` training entries is absent at random, each row keeps one. Test rows are the same for every seed.
    Raises ValueError for missing or altered files, too few photographs (one serves eight modalities) and bad keywords.
    """
    if not FEWEST <= modalities <= MOST:
        raise ValueError(f"modalities: expected a number from {FEWEST} to {MOST}, got {modalities}")
    if rows < 1:
        raise ValueError(f"rows: expected at least 1, got {rows}")
    check_missing(missing, modalities)
    names = [f"m{number}" for number in range(modalities)]

    def generate(split: str) -> Iterator[Row]:
        check_split(split)
        (path,) = locate(source, [MNIST])
        mnist, photos = read_arrays(path, IMAGES), photographs(source, modalities)
        number, share, most = (seed, missing, rows) if split == "train" else (0, 0.0, None)
        label = mnist[f"y_{split}"]
        place = f"polymnist/{split}"
        indices = permuted(dict.fromkeys(names, label), permutations=1, rng=generator(number, f"{place}/pairs"), limit=len(label))
        order = generator(number, f"{place}/order").permutation(len(label))[:most]
        corner = generator(number, f"{place}/crops").random((len(order), modalities, 2))
        observed = missing_at_random(len(order), modalities, share, generator(number, f"{place}/missing"))

        def row(number: int, shown: np.ndarray, where: np.ndarray) -> Row:
            held = [column for column in range(modalities) if shown[column]]
            images = {names[c]: composed(photos[c], mnist[f"x_{split}"][indices[names[c]][number]], where[c]) for c in held}
            return Row({name: torch.from_numpy(image) for name, image in images.items()}, int(label[indices[names[0]][number]]))

        return map(row, order, observed, corner)

    field = Field(kind="image", shape=(3, SIDE, SIDE), codec="npy", likelihood="laplace")
    keywords = {"modalities": modalities, "rows": rows, "missing": missing, "seed": seed}

    def files() -> list[Path]:
        return [*locate(source, [MNIST]), *_photograph_files(source, modalities)]

    return Dataset("polymnist", dict.fromkeys(names, field), generate, NAMES, keywords, files=files)


def composed(photograph: np.ndarray, digit: np.ndarray, corner: np.ndarray) -> np.ndarray:
    """A crop of the photograph [H, W, 3] with inverted colours where the digit [28, 28] is, as [3, 28, 28].

    `corner`: two numbers in [0, 1) that say where the crop lies, from the top and from the left.
    """
    top, left = (int(at * (size - SIDE + 1)) for at, size in zip(corner, photograph.shape, strict=False))
    crop = photograph[top : top + SIDE, left : left + SIDE]
    image = np.where(digit[:, :, None] > INK, 255 - crop, crop)
    return np.ascontiguousarray(image.transpose(2, 0, 1))


def photographs(source: Path, modalities: int) -> list[np.ndarray]:
    """A photograph [H, W, 3] of bytes for each modality. Raises ValueError where there are too few, or a file is too small or no PNG."""
    images = [_read(file) for file in _photograph_files(source, modalities)]
    return [_turned(images[number % len(images)], number // len(images)) for number in range(modalities)]


def _photograph_files(source: Path, modalities: int) -> list[Path]:
    folder = source / "photographs" if (source / "photographs").is_dir() else source
    files = sorted(folder.glob("*.png"))
    if TURNS * len(files) < modalities:
        need = -(-modalities // TURNS)
        raise ValueError(f"{folder}: {modalities} modalities need at least {need} photographs (.png), got {len(files)}; put some there")
    return files[:modalities]


def _turned(photograph: np.ndarray, turn: int) -> np.ndarray:
    return np.rot90(photograph if turn < TURNS // 2 else photograph[:, ::-1], turn % (TURNS // 2))


def _read(path: Path) -> np.ndarray:
    try:
        with Image.open(path, formats=["PNG"]) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError) as error:  # what pillow raises for broken files
        raise ValueError(f"{path}: expected a photograph as PNG ({error}); get the file again") from error
    if min(pixels.shape[:2]) < SIDE:
        raise ValueError(f"{path}: expected a photograph of {SIDE} x {SIDE} or more, got {pixels.shape[0]} x {pixels.shape[1]}")
    return pixels
