"""The values that cross layers: a batch of partly observed rows, a loss, a metric's sums.

Axis letters, the same everywhere: **N** modalities, **B** rows, **K** samples a row, **D** latent size, **M** pseudo-inputs or
mixture components, **R** packed rows of one modality, **P** packed (source, row) pairs; `*event` the axes of one datum, `*feature`
those of its embedding.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

PADDING_SHARE = 32  # packed sizes are multiples of B / 32: few shapes to compile, and padding stays under 10 % of half a batch


class Packed(NamedTuple):
    """The rows of one modality that are really there, and the pairs in which it is a target.

    Absence costs nothing: an encoder sees `data` alone, a decoder the own rows and the `source` pairs alone. The lists are made on
    the host, from the mask that the loader knows, so that no step waits for the device to count.
    """

    data: Shaped[Tensor, "R *event"]
    row: Int[Tensor, " R"]  # the row of the batch; B where it is padding
    source: Int[Tensor, " P"]  # i * B + b for every other modality i that row b holds too; N * B where it is padding
    target: Int[Tensor, " P"]  # where in `data` that row's datum stands


class Batch(NamedTuple):
    """B rows, each with some of N modalities.

    `draw` and `seed` key every random number of a row (see `meme_dist.noise`), so that results depend neither on the rank nor on the
    split into micro batches. `single` says whether the data set may hold rows with one modality only: a host fact, equal on all ranks.
    """

    modalities: Mapping[str, Packed]
    observed: Bool[Tensor, "B N"]  # columns in the order of `modalities`
    alone: Int[Tensor, " A"]  # i * B + b for each row b that holds modality i and no other; N * B where it is padding
    draw: Int[Tensor, " B"]
    seed: int
    single: bool
    label: Int[Tensor, " B"] | None = None  # for metrics; an objective never reads it

    def only(self, *names: str) -> "Batch":
        """The same rows seeing these modalities alone: what inference and cross generation start from (it carries no pairs).

        Raises ValueError for a modality that the batch does not have.
        """
        known = list(self.modalities)
        if unknown := set(names) - set(known):
            raise ValueError(f"unknown modalities {sorted(unknown)}; this batch has {known}")
        columns = [known.index(name) for name in names]
        none = torch.zeros(0, dtype=torch.long, device=self.observed.device)
        kept = {name: self.modalities[name]._replace(source=none, target=none) for name in names}
        # A list as an index would be copied to the device, and the host would wait for it.
        observed = torch.stack([self.observed[:, i] for i in columns], 1) if columns else self.observed[:, :0]
        return self._replace(modalities=kept, observed=observed, alone=none)

    def dense(self, name: str) -> Shaped[Tensor, "B *event"]:
        """One modality with a row for each row of the batch, zeros where it is absent."""
        packed = self.modalities[name]
        full = packed.data.new_zeros((len(self.observed) + 1, *packed.data.shape[1:]))
        return full.index_copy(0, packed.row, packed.data)[:-1]


class Loss(NamedTuple):
    """`total` is a SUM over rows: the trainer divides by the count of rows in the whole step, on all ranks (means of means drift)."""

    total: Float[Tensor, ""]
    terms: Mapping[str, "Sums"]  # detached, for the log


class Sums(NamedTuple):
    """A mean in the making, or a table of them: adds across batches, micro batches and ranks."""

    total: Float[Tensor, "*shape"]
    count: Float[Tensor, "*counts"]


def pack(
    present: Mapping[str, Shaped[Tensor, "R *event"]],
    observed: np.ndarray,
    *,
    draw: Sequence[int] | np.ndarray | None = None,
    seed: int = 0,
    single: bool = True,
    label: Int[Tensor, " B"] | None = None,
) -> Batch:
    """Build a batch from the rows that are present, in row order, and the mask [B, N] that says where they belong.

    A modality without rows is given as an empty tensor [0, *event]. Padding repeats real rows, never invents content, and counts nowhere.
    Raises ValueError where the mask and the data disagree.
    """
    observed = np.asarray(observed, dtype=bool)
    if observed.shape[1:] != (len(present),):
        raise ValueError(f"observed: expected shape (B, {len(present)}), got {observed.shape}")
    granule = max(1, len(observed) // PADDING_SHARE)
    modalities = {name: _packed(name, data, observed, column, granule) for column, (name, data) in enumerate(present.items())}
    rows, source = np.nonzero(observed & (observed.sum(1, keepdims=True) == 1))
    alone = torch.from_numpy(_padded(source * len(observed) + rows, granule, observed.size))
    numbers = torch.as_tensor(np.arange(len(observed)) if draw is None else np.asarray(draw, dtype=np.int64))
    return Batch(modalities, torch.from_numpy(observed), alone, numbers, seed, single, label)


def pack_dense(data: Mapping[str, Shaped[Tensor, "B *event"]], observed: Mapping[str, Bool[Tensor, " B"]], **keywords) -> Batch:
    """`pack` from dense tensors and one mask a modality; the content of absent rows is never read."""
    masks = {name: observed[name].bool() for name in data}
    return pack({name: x[masks[name]] for name, x in data.items()}, torch.stack(list(masks.values()), 1).numpy(), **keywords)


def _packed(name: str, data: Tensor, observed: np.ndarray, column: int, granule: int) -> Packed:
    rows_in_batch, num_modalities = observed.shape
    rows = np.flatnonzero(observed[:, column])
    if len(rows) != len(data):
        raise ValueError(f"{name}: the mask names {len(rows)} present rows, the data has {len(data)}")
    position = np.zeros(rows_in_batch, dtype=np.int64)
    position[rows] = np.arange(len(rows))
    others = observed & observed[:, column : column + 1]
    others[:, column] = False
    row, source = np.nonzero(others)
    order = np.lexsort((row, source))  # source by source, so that a decoder's rows keep their neighbours
    source, target = source[order] * rows_in_batch + row[order], position[row[order]]
    return Packed(
        repeated(data, _round_up(len(data), granule)),
        torch.from_numpy(_padded(rows, granule, rows_in_batch)),
        torch.from_numpy(_padded(source, granule, num_modalities * rows_in_batch)),
        torch.from_numpy(_padded(target, granule, 0)),
    )


def _round_up(count: int, granule: int) -> int:
    return max(1, -(-count // granule)) * granule


def _padded(index: np.ndarray, granule: int, filler: int) -> np.ndarray:
    full = np.full(_round_up(len(index), granule), filler, dtype=np.int64)
    full[: len(index)] = index
    return full


def repeated(data: Shaped[Tensor, "R *event"], size: int) -> Shaped[Tensor, "{size} *event"]:
    """So many rows: the given ones again and again, zeros where there is none."""
    if len(data) == size:
        return data
    if len(data) == 0:
        return data.new_zeros((size, *data.shape[1:]))
    more = torch.arange(size - len(data), device=data.device) % len(data)
    return torch.cat([data, data[more]])
