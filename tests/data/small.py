"""Small files laid out as the real ones are, of which every datum says where it comes from; and what tests ask of a data set's rows."""

import gzip
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from meme_dist.data.sets.citeseq import SIZES
from meme_dist.data.sets.mfeat import VIEWS
from meme_dist.data.sets.tcga import OMICS
from meme_dist.data.shards import Dataset, Row

REAL = Path(__file__).resolve().parents[2].parent / "shared" / "data"

# ---- rows --------------------------------------------------------------------------------------------------------------------------


def rows(dataset: Dataset, split: str = "train") -> list[Row]:
    return list(dataset.rows(split))


def contents(row: Row) -> dict[str, object]:
    return {name: value if isinstance(value, str) else value.numpy().tobytes() for name, value in row.data.items()}


def same(first: Dataset, second: Dataset, split: str) -> bool:
    return [(contents(row), row.label) for row in rows(first, split)] == [(contents(row), row.label) for row in rows(second, split)]


def shown(dataset: Dataset, split: str = "train") -> Counter:
    return Counter(tuple(row.data) for row in dataset.rows(split))


def marked(digit: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    images = np.zeros((len(digit), *shape), dtype=np.uint8)
    flat = images.reshape(len(digit), -1)
    flat[:, 0], flat[:, 1], flat[:, 2] = digit, np.arange(len(digit)) // 256, np.arange(len(digit)) % 256
    return images


def mark(image: Tensor | str) -> tuple[int, int]:
    assert isinstance(image, Tensor)
    digit, high, low = image.flatten()[:3].tolist()
    return digit, 256 * high + low


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def array(row: Row, name: str) -> np.ndarray:
    value = row.data[name]
    assert isinstance(value, Tensor)
    return value.numpy()


# ---- files -------------------------------------------------------------------------------------------------------------------------

BITS = 9  # that number an image


def signed(label: np.ndarray) -> np.ndarray:
    """Images [rows, 28, 28] in which bright pixels spell, in binary, the class (4 bits) and the number (9) of each."""
    code = 2**BITS * label.astype(np.int64) + np.arange(len(label))
    images = np.full((len(label), 28, 28), 90, dtype=np.uint8)  # dark enough to be no ink
    images[:, 5, 3 : 3 + 4 + BITS] = np.where(code[:, None] >> np.arange(4 + BITS) & 1, 255, 128)
    return images


def read_sign(ink: np.ndarray) -> tuple[int, int]:
    """Class and number, from where [28, 28] there is ink."""
    code = int((ink[5, 3 : 3 + 4 + BITS] * 2 ** np.arange(4 + BITS)).sum())
    return code >> BITS, code % 2**BITS


def signed_mnist(folder: Path, name: str = "mnist.npz") -> Path:
    """300 training images, numbers 0 to 299, and 100 test images, of which number n is n + 300 in its sign."""
    folder.mkdir(parents=True, exist_ok=True)
    label = np.arange(400, dtype=np.uint8) % 10
    x = signed(label)
    np.savez(folder / name, x_train=x[:300], y_train=label[:300], x_test=x[300:], y_test=label[300:])
    return folder


def gradients(folder: Path, number: int, shape: tuple[int, int] = (60, 47)) -> Path:
    """Photographs whose red says how far down a pixel is, its green how far across, its blue which photograph."""
    folder.mkdir(parents=True, exist_ok=True)
    down, across = np.indices(shape)
    for photo in range(number):
        pixels = np.stack([down, across, np.full(shape, 10 * photo)], -1).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{photo}.png")
    return folder


def numbered(rows: int, columns: int, seed: int) -> np.ndarray:
    """Random numbers, but the first column is that of the row: after any increasing map it still says which row this was."""
    x = np.random.default_rng(seed).normal(3, 2, (rows, columns)).astype(np.float32)
    x[:, 0] = np.arange(rows)
    return x


def mfeat_file(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    views = {name: numbered(80, size, seed) for seed, (name, size) in enumerate(VIEWS.items())}
    np.savez(folder / "mfeat_six_views.npz", y=np.arange(80, dtype=np.uint8) % 10, **views)
    return folder


def tcga_file(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {f"{name}_train": numbered(30, size, seed) for seed, (name, size) in enumerate(OMICS.items())}
    arrays |= {f"{name}_test": numbered(12, OMICS[name], 7) for name in ("mrna", "mirna")}
    np.savez(folder / "tcga_breast_mrna_mirna_protein.npz", y_train=np.arange(30) % 3, y_test=np.arange(12) % 3, **arrays)
    return folder


def citeseq_file(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rna, protein = (np.random.default_rng(seed).poisson(2, (50, size)) for seed, size in enumerate(SIZES.values()))
    rna[:, 0] = protein[:, 0] = np.arange(50)
    np.savez(folder / "citeseq_pbmc_eccite.npz", rna_hvg1000=rna.astype(np.uint16), adt=protein.astype(np.int32))
    return folder


def cub_files(folder: Path) -> Path:
    """Thirty images of three kinds, the second kind paired weakly throughout. Caption k of image i says so: `image i caption k`."""
    folder.mkdir(parents=True, exist_ok=True)
    kind, rng = np.arange(30) % 3, np.random.default_rng(0)
    box = np.concatenate([rng.uniform(0, 100, (30, 2)), rng.uniform(50, 90, (30, 2))], 1)
    place = box[:, None, :2] + rng.uniform(0, 1, (30, 15, 2)) * box[:, None, 2:]
    visible = rng.random((30, 15)) < 0.8
    parts = np.concatenate([place, np.ones((30, 15, 1))], 2) * visible[..., None]  # the real file, too, has zeros for hidden parts
    attributes = rng.uniform(0, 100, (3, 312))
    np.savez(
        folder / "cub_test2933_parts_attrs.npz",
        pairing_strong=kind != 1,
        class_index=kind.astype(np.uint8),
        class_names=np.array(["auk", "bunting", "crow"]),
        bbox=box.astype(np.float32),
        parts=parts.astype(np.float32),
        class_attributes=attributes.astype(np.float32),
    )
    lines = [f"Image {image}, caption {number}: a {'red' if kind[image] else 'green'} bird." for image in range(30) for number in range(10)]
    (folder / "captions_testclasses.txt.gz").write_bytes(gzip.compress(("\n".join(lines) + "\n").encode()))
    return folder
