"""A batch that stays in place: memory for as many rows and pairs as any batch so far had, which each further batch is copied into."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from meme_dist.types import Batch, Packed

MARGIN = 16  # room for batches that miss something has a sixteenth of the batch to spare, so that it soon stops growing
STEP = 16  # and is a multiple of this: Triton compiles a kernel anew for sizes that are none, which takes longer than the recording

Sizes = Mapping[str, tuple[int, int]]
"""How many rows and pairs there is room for in each modality; under "" the rows of one modality alone, and 0."""


class Room:
    """Batches of one number of rows, in memory whose addresses and shapes stay, until one comes that needs more.

    What a batch does not fill is padding, as `types.pack` makes it: index lists point to no row, data repeat the batch's first one, and
    none of it counts. So the loss is that of the batch, whatever the room (but for statistics over rows, which batch normalisation takes).
    """

    def __init__(self) -> None:
        self.sizes: dict[str, tuple[int, int]] = {}
        self.batch: Batch | None = None

    def furnish(self, batch: Batch) -> bool:
        """Copy a batch in; whether new memory had to be taken for it."""
        wanted = _needed(batch)
        fits = self.batch is not None and _same_kind(self.batch, batch) and all(_within(size, self.sizes[n]) for n, size in wanted.items())
        if not fits:
            self.sizes = {name: _larger(size, self.sizes.get(name, (0, 0)), batch.observed.shape) for name, size in wanted.items()}
            self.batch = _empty(batch, self.sizes)
        assert self.batch is not None
        _copy(batch, self.batch)
        return not fits

    def remember(self, sizes: Mapping[str, tuple[int, int]]) -> None:
        """Take the memory that another room had, for the next batch: rounding follows shapes, so a resumed run asks for the same ones."""
        self.sizes, self.batch = {name: (rows, pairs) for name, (rows, pairs) in sizes.items()}, None


def _needed(batch: Batch) -> dict[str, tuple[int, int]]:
    return {name: (len(p.row), len(p.source)) for name, p in batch.modalities.items()} | {"": (len(batch.alone), 0)}


def _within(size: tuple[int, int], room: tuple[int, int]) -> bool:
    return size[0] <= room[0] and size[1] <= room[1]


def _larger(size: tuple[int, int], room: tuple[int, int], batch: Sequence[int]) -> tuple[int, int]:
    """Room for this size and for somewhat larger ones, though not for more than complete batches of these rows have."""
    rows, number = batch
    spare, most = max(1, rows // MARGIN), (rows, rows * (number - 1))
    wanted = ((n, had if n <= had else -(-(n + spare) // STEP) * STEP, limit) for n, had, limit in zip(size, room, most, strict=True))
    a, b = (max(n, min(new, limit)) for n, new, limit in wanted)
    return a, b


def _same_kind(a: Batch, b: Batch) -> bool:
    """Whether they differ in lengths and contents alone."""
    kinds = [
        (batch.observed.shape, batch.seed, batch.single, {n: (p.data.shape[1:], p.data.dtype) for n, p in batch.modalities.items()})
        for batch in (a, b)
    ]
    return kinds[0] == kinds[1]


def _empty(batch: Batch, sizes: Sizes) -> Batch:
    """Memory for any batch of these sizes."""
    modalities = {}
    for name, packed in batch.modalities.items():
        rows, pairs = sizes[name]
        index = [torch.empty(size, dtype=torch.long, device=packed.row.device) for size in (rows, pairs, pairs)]
        modalities[name] = Packed(packed.data.new_empty((rows, *packed.data.shape[1:])), *index)
    alone = batch.alone.new_empty(sizes[""][0])
    observed, draw = torch.empty_like(batch.observed), torch.empty_like(batch.draw)
    return batch._replace(modalities=modalities, observed=observed, alone=alone, draw=draw, label=None)


def _copy(batch: Batch, place: Batch) -> None:
    rows, number = batch.observed.shape
    for name, packed in batch.modalities.items():
        own = place.modalities[name]
        own.data[: len(packed.data)].copy_(packed.data)
        # Not what an earlier batch left there: a NaN times a gradient of 0 is a NaN.
        own.data[len(packed.data) :].copy_(packed.data[:1].expand_as(own.data[len(packed.data) :]))
        fillers = (rows, number * rows, 0)
        for values, target, filler in zip(packed[1:], own[1:], fillers, strict=True):
            _fill(values, target, filler)
    _fill(batch.alone, place.alone, number * rows)
    place.observed.copy_(batch.observed)
    place.draw.copy_(batch.draw)


def _fill(values: Tensor, target: Tensor, filler: int) -> None:
    target[: len(values)].copy_(values)
    if len(values) < len(target):
        target[len(values) :].fill_(filler)
