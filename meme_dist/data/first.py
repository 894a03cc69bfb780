"""The rows from which data-dependent parameters are set: the first of the stream, and others of a modality that these hardly hold."""

from collections.abc import Sequence

import numpy as np

from meme_dist.data.collate import decode
from meme_dist.data.index import Index, Manifest
from meme_dist.data.order import permutation
from meme_dist.data.reader import Reader
from meme_dist.data.stream import Stream
from meme_dist.data.substitute import decode_intact
from meme_dist.types import Batch, pack

ENOUGH = 2  # rows of a modality: one alone has no spread
MORE = 32  # rows that are looked up of a modality with fewer


def first_batch(manifest: Manifest, split: str, *, rows: int, seed: int, damaged: int = 0) -> Batch:
    """The first rows of the training stream. A modality that fewer than ENOUGH of them hold comes from rows of its own, behind them.

    The index says where those are, so that nothing else is read for them, and the seed which are taken: every rank has the same batch. A
    modality may still be without a row where the whole split is. `damaged`: as in `Stream`.
    """
    rows = min(rows, manifest.num_rows(split))
    (batch,) = next(iter(Stream(manifest.folder, split, batch_size=rows, seed=seed, damaged=damaged)))
    held, there = batch.observed.sum(0).tolist(), manifest.splits[split].present
    rare = [name for name, count in zip(manifest.fields, held, strict=True) if count < min(ENOUGH, there[name])]
    return _with_more(batch, rare, Reader(manifest, split, lenient=damaged > 0), seed) if rare else batch


def _with_more(batch: Batch, rare: Sequence[str], reader: Reader, seed: int) -> Batch:
    """The batch, with what it holds of the rare modalities replaced by rows behind it, each of which has one of them alone."""
    present = {name: packed.data[packed.row < len(batch.observed)] for name, packed in batch.modalities.items()}
    observed = [batch.observed.numpy() & ~np.isin(list(present), rare)]
    for column, name in enumerate(present):
        if name in rare:
            holding = _holding(reader.index, column)
            rows = np.sort(holding[permutation(len(holding), seed, "first rows", name)[:MORE]])
            if reader.lenient:
                part = decode_intact(reader, rows.tolist(), reader.attempt(rows), seed)
            else:
                part = decode(reader, rows.tolist(), reader.read(rows))
            present[name] = part.present[name]
            observed.append(np.arange(len(present)) == np.full((len(present[name]), 1), column))
    return pack(present, np.concatenate(observed), seed=seed)


def _holding(index: Index, column: int) -> np.ndarray:
    """The numbers of the rows that hold a modality."""
    starts = np.cumsum([0, *map(len, index.maps)])
    return np.concatenate([start + np.flatnonzero(part["size"][:, column] >= 0) for start, part in zip(starts, index.maps, strict=False)])
