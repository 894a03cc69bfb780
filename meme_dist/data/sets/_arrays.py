"""Arrays in .npz files that the user has: found, read, checked, held out, standardised."""

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

Shape = tuple[int | str, ...]  # a word stands for a size that all arrays of the file which say it share

MNIST = "mnist.npz"
IMAGES: Mapping[str, Shape] = {  # MNIST, and whatever has its format
    "x_train": ("train", 28, 28),
    "y_train": ("train",),
    "x_test": ("test", 28, 28),
    "y_test": ("test",),
}


def locate(source: Path, names: Sequence[str]) -> list[Path]:
    """Where the files lie in `source`. Raises ValueError that names all which do not."""
    if missing := [name for name in names if not (source / name).is_file()]:
        raise ValueError(f"{source}: missing {', '.join(missing)}; name the folder that has them: --source FOLDER")
    return [source / name for name in names]


def read_arrays(path: Path, shapes: Mapping[str, Shape]) -> dict[str, np.ndarray]:
    """The arrays that `shapes` names. Raises ValueError, naming the file, where it is cut, altered, or lacks one of that shape."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:  # given a path, numpy leaves broken files open
            arrays = {name: file[name] for name in shapes}
    except (BadZipFile, EOFError, KeyError, ValueError, zlib.error) as error:
        raise ValueError(f"{path}: expected an .npz file with the arrays {', '.join(shapes)} ({error}); get the file again") from error
    sizes: dict[str, int] = {}
    for name, shape in shapes.items():
        if not _fits(arrays[name].shape, shape, sizes):
            wanted = ", ".join(f"{size} {sizes[size]}" if size in sizes else str(size) for size in shape)
            raise ValueError(f"{path}: {name}: expected the shape ({wanted}), got {arrays[name].shape}; get the file again")
    return arrays


def held_out(label: np.ndarray, *, one_in: int, eligible: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Which rows [rows] are the test part: of each class of n rows n // `one_in` at random, all of them `eligible`."""
    test = np.zeros(len(label), dtype=bool)
    for value in np.unique(label):
        members = np.flatnonzero(label == value)
        test[rng.permutation(members[eligible[members]])[: len(members) // one_in]] = True
    return test


def standardised(x: np.ndarray, train: np.ndarray) -> np.ndarray:
    """(x - mean) / stddev of each column as float32, both taken from the rows `train` [rows]; a column constant there is only shifted."""
    known = x[train].astype(np.float64)
    stddev = np.where(np.ptp(known, axis=0) > 0, known.std(0), 1)
    return ((x - known.mean(0)) / stddev).astype(np.float32)


def _fits(shape: tuple[int, ...], wanted: Shape, sizes: dict[str, int]) -> bool:
    """Whether it does, entering the sizes of words that come for the first time."""
    if len(shape) != len(wanted):
        return False
    return all(size == (sizes.setdefault(want, size) if isinstance(want, str) else want) for size, want in zip(shape, wanted, strict=True))
