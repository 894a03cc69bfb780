"""Which images stand together in a row: three rules of pairing by class, for any number of modalities.

A rule takes each modality's labels and gives, for each modality, an index array [pairs] into its own data, class by class.
Each class gives as many pairs as the rule says; a class that one modality lacks gives none.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch

from meme_dist.data.sets._missing import partly_paired
from meme_dist.data.shards import Row

Labels = Mapping[str, np.ndarray]  # modality -> class of each datum
Indices = dict[str, np.ndarray]  # modality -> [pairs] which datum
Data = Mapping[str, np.ndarray | tuple[str, ...]]  # modality -> [data, *event], or its texts

MMVAE_CLASS_LIMIT = 10_000  # data of one class that MMVAE's script uses at most (never reached by MNIST-SVHN: the scarcer has 6,742)


class Split(NamedTuple):
    """One part of a set before pairing: each modality's data and their classes."""

    data: dict[str, np.ndarray | tuple[str, ...]]
    labels: dict[str, np.ndarray]


def generator(seed: int, purpose: str) -> np.random.Generator:
    """Random numbers of their own for each purpose, so that one choice (say the paired share) never moves another (the order)."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=tuple(purpose.encode())))


def one_to_one(labels: Labels) -> Indices:
    """Of each class the first datum with the first, the second with the second, until the scarcest modality has none left.

    The rule of the released MEME code (dataset_cached.join_datasets): every datum is used at most once.
    """
    return _by_class(labels, lambda members: {name: index[: _scarcest(members)] for name, index in members.items()})


def permuted(labels: Labels, *, permutations: int, rng: np.random.Generator, limit: int = MMVAE_CLASS_LIMIT) -> Indices:
    """Of each class the first n of every modality, n as in `one_to_one`, shuffled against each other `permutations` times.

    The rule of MMVAE (bin/make-mnist-svhn-idx.py): each datum is used exactly `permutations` times or never; two permutations may by
    chance repeat a pair. Raises ValueError for fewer than one permutation.
    """
    _check_positive("permutations", permutations)

    def pairs(members: Indices) -> Indices:
        count = min(limit, _scarcest(members))
        return {name: _permutations(index[:count], permutations, rng) for name, index in members.items()}

    return _by_class(labels, pairs)


def recycled(labels: Labels, *, uses: Mapping[str, int | None], rng: np.random.Generator) -> Indices:
    """Go through each modality in random order, again and again, at most `uses` times (None: as often as the others need).

    A class gives min over the limited modalities of uses * count pairs, so that a scarce modality is stretched over a plentiful one.
    Where one modality is used once, no pair comes twice. Raises ValueError where no modality is limited, or a limit is below one.
    """
    limits = {name: limit for name, limit in uses.items() if limit is not None}
    if not limits:
        raise ValueError(f"uses: expected a limit for at least one of {list(labels)}, got none")
    for name, limit in limits.items():
        _check_positive(f"uses of {name}", limit)

    def pairs(members: Indices) -> Indices:
        if _scarcest(members) == 0:
            return {name: index[:0] for name, index in members.items()}
        count = min(limit * len(members[name]) for name, limit in limits.items())
        return {name: _permutations(index, -(-count // len(index)), rng)[:count] for name, index in members.items()}

    return _by_class(labels, pairs)


def rows_of(data: Data, indices: Indices, observed: np.ndarray, label: np.ndarray) -> Iterator[Row]:
    """Rows in the order of `indices`, each with the modalities that `observed` [rows, N] marks (columns in the order of `indices`)."""
    for row, present in enumerate(observed):
        held = [name for name, there in zip(indices, present, strict=True) if there]
        yield Row({name: _datum(data[name][indices[name][row]]) for name in held}, int(label[row]))


class Rest(NamedTuple):
    """What becomes of pairs: a `paired_fraction` of them stays, the others lose all but one modality, or are dropped."""

    paired_fraction: float = 1.0
    always: str = "split"
    unpaired: bool = True


def partial_rows(data: Data, indices: Indices, label: np.ndarray, *, rest: Rest, seed: int, purpose: str) -> Iterator[Row]:
    """Pairs in one random order, of which the first share is complete and the others are as `rest` says.

    Raises ValueError as `partly_paired` does.
    """
    order = generator(seed, f"{purpose}/order").permutation(len(label))
    kept = generator(seed, f"{purpose}/kept")
    observed = partly_paired(len(label), list(indices), paired_fraction=rest.paired_fraction, always=rest.always, rng=kept)
    if not rest.unpaired:
        complete = observed.all(1)
        order, observed = order[complete], observed[complete]
    return rows_of(data, {name: index[order] for name, index in indices.items()}, observed, label[order])


def check_split(split: str) -> None:
    """Raise ValueError for a split that no set has."""
    if split not in ("train", "test"):
        raise ValueError(f"split: expected 'train' or 'test', got {split!r}")


def _by_class(labels: Labels, pairs: Callable[[Indices], Indices]) -> Indices:
    classes = np.unique(np.concatenate(list(labels.values())))
    parts = [pairs({name: np.flatnonzero(label == value) for name, label in labels.items()}) for value in classes]
    none = np.empty(0, dtype=np.int64)  # where there is no class at all
    return {name: np.concatenate([none, *(part[name] for part in parts)]) for name in labels}


def _scarcest(members: Indices) -> int:
    return min(len(index) for index in members.values())


def _permutations(index: np.ndarray, times: int, rng: np.random.Generator) -> np.ndarray:
    return np.concatenate([rng.permutation(index) for _ in range(times)])


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")


def _datum(value: np.ndarray | str) -> torch.Tensor | str:
    return value if isinstance(value, str) else torch.from_numpy(value)
