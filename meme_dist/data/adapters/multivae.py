"""MultiVae's data sets (`MultimodalBaseDataset`, `IncompleteDataset` and classes derived from them): masks become missing members.

Nothing of MultiVae is imported. A row is read as its loaders read it, `dataset[number]`, so that classes with a `__getitem__` of their own
(PolyMNIST, MNIST-SVHN, the user's) go through as well.
"""

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from math import prod
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from meme_dist.data.adapters._common import COUNT_LIKELIHOODS, Values, check_split, generator, held_out, modality_names
from meme_dist.data.fields import SPECIAL, Field, Likelihood
from meme_dist.data.shards import Dataset, Row

TYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64)


class Rows(Protocol):
    """What is needed of a data set. A row has `data` (a tensor for each modality) and, where there are any, `masks` and `labels`."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


def whole_number(label: Any) -> int:
    """The class of a row from its `labels`. Raises ValueError for anything but one whole number."""
    array = np.asarray(label)
    if array.size != 1 or not float(array.item()).is_integer():
        got = array.item() if array.size == 1 else f"shape {array.shape}"
        raise ValueError(f"labels: expected one whole number, got {got}; say what a row's class is: label=lambda y: ...")
    return int(array.item())


def from_incomplete_dataset(
    dataset: Rows,
    *,
    test: Rows | None = None,
    test_share: float = 0.2,
    likelihoods: Mapping[str, Likelihood] | None = None,
    label: Callable[[Any], int | None] = whole_number,
    classes: tuple[str, ...] = (),
    name: str = "multivae",
    seed: int = 0,
) -> Dataset:
    """The same rows, in random order; an entry whose mask is False is absent, whatever it was filled with (NaN too).

    `test` is tested on, or else a share of `dataset`, drawn at random. Modalities are named by `modality_names`. What one becomes:

      three axes, uint8 or floats in [0, 1]   image (laplace), kept as bytes: floats are rounded to 1/255
      other floats; booleans                  vector (normal; bernoulli); three axes are warned of
      other whole-number types                counts (negative_binomial)

    `likelihoods` overrides the likelihood by MultiVae's name of the modality, so that a model's `decoders_dist` can be given as it is;
    where it asks for counts, the modality becomes counts. "categorical" is for one-hot vectors: they become text of one word, the class.
    `label` turns a row's `labels` into its class (`lambda y: None`: into none), and `classes` names them. All rows are read once here.
    Raises ValueError for rows without any modality, modalities without any row, for NaN or infinity in an entry that is there, for other
    types, and where there is no row.
    """
    parts = {"train": dataset} if test is None else {"train": dataset, "test": test}
    seen: dict[str, _Seen] = {}
    digest, wanted = hashlib.sha256(), likelihoods or {}
    highest = max([_scan(split, part, seen, label, digest) for split, part in parts.items()])
    if unseen := [key for key in dataset[0].data if key not in seen]:
        raise ValueError(f"modality {unseen[0]}: expected rows that have it, its mask is False in all; mend the masks, or leave it out")
    seen = {key: seen[key] for key in dict.fromkeys([*dataset[0].data, *seen])}  # in the order of the data set
    if unknown := set(wanted) - set(seen):
        raise ValueError(f"likelihoods: unknown modalities {sorted(unknown)}; the data set has {list(seen)}")
    names = modality_names(seen)
    stored = {key: _stored(key, entry, wanted.get(key)) for key, entry in seen.items()}
    whole = {split: np.arange(len(part)) for split, part in parts.items()}
    numbers = held_out(len(dataset), test_share, seed) if test is None else whole

    def rows(split: str) -> Iterator[Row]:
        check_split(split)
        part = parts.get(split, dataset)
        for number in generator(seed, f"adapters/{split}/order").permutation(numbers[split]).tolist():
            row = part[number]
            present = _present(row)
            yield Row({names[key]: stored[key].convert(x) for key, x in present.items()}, _label(row, label))

    keywords = {"sha256": digest.hexdigest(), "test_share": test_share if test is None else None, "seed": seed}
    classes = classes or tuple(map(str, range(highest + 1)))
    return Dataset(name, {names[key]: entry.field for key, entry in stored.items()}, rows, classes, keywords)


class _Seen(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype
    values: Values


class _Stored(NamedTuple):
    field: Field
    convert: Callable[[Tensor], Tensor | str]


def _scan(split: str, part: Rows, seen: dict[str, _Seen], label: Callable[[Any], int | None], digest: Any) -> int:
    """Look at every entry that is there; the highest label, -1 without any."""
    highest = -1
    if not len(part):
        raise ValueError(f"{split}: expected rows, got an empty data set")
    for number in range(len(part)):
        row = part[number]
        present = _present(row)
        if not present:
            raise ValueError(f"{split} row {number}: expected one modality or more, got nothing; leave the row out")
        for key, x in present.items():
            try:
                _look(key, x, seen)
            except ValueError as error:
                raise ValueError(f"{split} row {number}, modality {key}: {error}") from error
            digest.update(f"{split}/{number}/{key}".encode())
            digest.update(np.ascontiguousarray(x.numpy()).tobytes())
        highest = max(highest, -1 if (found := _label(row, label)) is None else found)
        digest.update(str(found).encode())
    return highest


def _present(row: Any) -> dict[str, Tensor]:
    """The entries that are there. A scalar entry becomes a vector of one."""
    masks = getattr(row, "masks", None) or {}
    return {key: torch.atleast_1d(_tensor(key, x)) for key, x in row.data.items() if bool(masks.get(key, True))}


def _tensor(key: str, x: Any) -> Tensor:
    if isinstance(x, Tensor):
        return x.detach().cpu()
    if isinstance(x, np.ndarray | np.number):
        return torch.as_tensor(x)
    raise ValueError(f"modality {key}: expected a tensor or an array, got {type(x).__name__}; text is written by `write_shards` (README)")


def _label(row: Any, label: Callable[[Any], int | None]) -> int | None:
    found = getattr(row, "labels", None)
    return None if found is None else label(found)


def _look(key: str, x: Tensor, seen: dict[str, _Seen]) -> None:
    first = seen.setdefault(key, _Seen(tuple(x.shape), x.dtype, Values()))
    if (tuple(x.shape), x.dtype) != first[:2]:
        raise ValueError(f"expected {first.dtype} {first.shape} as in rows before it, got {x.dtype} {tuple(x.shape)}")
    if x.dtype not in TYPES or x.layout != torch.strided:
        raise ValueError(f"expected a dense tensor of a type that numpy has, got {x.dtype}, {x.layout}; convert it (float, to_dense)")
    if not (finite := torch.isfinite(x)).all():
        raise ValueError(f"expected finite numbers, got {int((~finite).sum())} that are NaN or infinite; mask the entry, or mend it")
    first.values.add(x.numpy())


def _stored(key: str, seen: _Seen, wanted: Likelihood | None) -> _Stored:
    """Kind and conversion by type, shape and range; see `from_incomplete_dataset`."""
    try:
        if wanted == "categorical":
            return _categorical(seen)
        if _is_image(seen) and wanted not in COUNT_LIKELIHOODS:
            convert = _as_bytes if seen.dtype.is_floating_point else torch.Tensor.contiguous
            return _Stored(Field("image", seen.shape, "npy", wanted or "laplace"), convert)
        if len(seen.shape) == 3 and seen.dtype.is_floating_point and wanted is None:
            low, high = seen.values.lowest, seen.values.highest
            what = f"three axes of floats from {low:g} to {high:g} become a vector, since those of images are in [0, 1]"
            warnings.warn(f"modality {key}: {what}; if these are images, scale them to [0, 1]", stacklevel=3)
        counted = not (seen.dtype.is_floating_point or seen.dtype == torch.bool)
        likelihood = wanted or ("negative_binomial" if counted else "bernoulli" if seen.dtype == torch.bool else "normal")
        if likelihood in COUNT_LIKELIHOODS and not seen.values.counts:
            raise ValueError(f"expected counts, got numbers from {seen.values.lowest:g} to {seen.values.highest:g}, or fractions")
        if likelihood in COUNT_LIKELIHOODS:
            return _Stored(Field("counts", seen.shape, "npy", likelihood), partial(torch.Tensor.to, dtype=torch.int32))
        return _Stored(Field("vector", seen.shape, "npy", likelihood), partial(torch.Tensor.to, dtype=torch.float32))
    except ValueError as error:
        raise ValueError(f"modality {key}: {error}; give another likelihood in `likelihoods`, or convert the tensor") from error


def _is_image(seen: _Seen) -> bool:
    if seen.dtype == torch.uint8 and len(seen.shape) == 2:
        raise ValueError(f"uint8 {seen.shape} is no image without channels first (x[:, None]), and counts would be of a longer type")
    return len(seen.shape) == 3 and (seen.dtype == torch.uint8 or (seen.dtype.is_floating_point and seen.values.unit))


def _as_bytes(x: Tensor) -> Tensor:
    return (x * 255).round().to(torch.uint8)


def _categorical(seen: _Seen) -> _Stored:
    """One-hot [V] or [1, V] -> one word of V, "0" to "V - 1"."""
    if prod(seen.shape) != seen.shape[-1] or not (seen.values.unit and seen.values.whole):
        raise ValueError(f"expected one-hot vectors for a categorical likelihood, got shape {seen.shape} with other numbers or axes")
    words = tuple(map(str, range(seen.shape[-1])))

    def convert(x: Tensor) -> str:
        if int(x.sum()) != 1:
            raise ValueError(f"expected a one-hot vector for a categorical likelihood, got one that sums to {float(x.sum()):g}")
        return words[int(x.flatten().int().argmax())]

    return _Stored(Field("text", (1,), "txt", "categorical", (*SPECIAL, *words)), convert)
