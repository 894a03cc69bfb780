"""Filling in what is missing: incomplete shards in; complete shards out, or a `.h5mu` file for people who work with cells.

What an entry becomes is told in `meme_dist.metrics.completion`. A file holds that number as it is. Shards hold what their fields do: bytes
for pixels, whole numbers for counts. A count is rounded up or down at random, up with probability x - floor(x), so that x is its
expectation: rounded to the nearest, whatever is expected less than once in two cells would never be there. The random numbers are the
row's own, the same on any rank.
"""

import errno
import math
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from meme_dist.data.adapters import new_h5mu
from meme_dist.data.collate import decode, fill, to_batch
from meme_dist.data.fields import Field
from meme_dist.data.files import sync
from meme_dist.data.index import Manifest
from meme_dist.data.names import FEATURES, feature_names, row_names
from meme_dist.data.reader import Reader
from meme_dist.data.shards import Dataset, Row, write_shards_together
from meme_dist.data.source import check_local
from meme_dist.metrics.completion import Predicted, predicted
from meme_dist.metrics.predictive import can_draw, covered
from meme_dist.metrics.rows import noise_of
from meme_dist.noise import Noise
from meme_dist.objectives.base import Objective
from meme_dist.pooled import Pooled
from meme_dist.ranks import ALONE, Processes, hidden
from meme_dist.refine import Refining
from meme_dist.train.checkpoint import fingerprint
from meme_dist.types import Batch

ROWS = 256  # of a batch
FILE = "whole.h5mu"
NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EACCES)  # what file systems without hard links answer


class Filled(NamedTuple):
    """How many entries of a split were there, and how many were filled in."""

    rows: int
    there: int
    filled: int


def impute(
    objective: Objective,
    fields: Mapping[str, Field],
    shards: Path | str,
    out: Path,
    *,
    draws: int = 1,
    seed: int = 0,
    processes: Processes = ALONE,
) -> dict[str, Filled]:
    """Write the rows of `shards` into new shards `out`, every missing entry filled in; each row once, in order, with key, name and label.

    An entry that is there is copied as it is. With one draw another seed gives another plausible completion. What was missing stands in
    the index of `shards`: the same row there lacks the member. Collective: each process fills in shards of its own, and `out` is the same,
    byte by byte, for any number of them.
    Raises ValueError where the shards' fields are not those that the model was trained on, and for an `out` that holds anything but the
    completions of the same rows by the same weights, asked in the same way.
    """
    with processes.agreed():
        manifest = _manifest(shards, fields, draws)
        filled = _Rows(objective, manifest, seed, draws)
        source = {**_source(objective, manifest), "draws": draws, "seed": seed}
        called = feature_names(manifest)
        dataset = Dataset(f"{manifest.name}_imputed", manifest.fields, filled, manifest.classes, source, features=called)
    rows = {name: split.rows for name, split in manifest.splits.items()}
    rows_per_shard = manifest.rows_per_shard
    write_shards_together(dataset, out, part=filled.part, rows=rows, rows_per_shard=rows_per_shard, processes=processes)
    return _counted(manifest)


def impute_h5mu(
    objective: Objective,
    fields: Mapping[str, Field],
    shards: Path | str,
    out: Path,
    *,
    draws: int = 1,
    interval: float | None = None,
    seed: int = 0,
    processes: Processes = ALONE,
) -> dict[str, Filled]:
    """Write the rows of `shards` into a new `.h5mu` file, every missing entry filled in, under the names of cells and features.

    Of each modality: X [cells, features], `obs["observed"]`, and with `interval` the layers lower and upper, which equal X where a cell was
    measured. `obs` of the whole has split and label. Rows without a name are called by split and number (train-00000012).
    Collective: each process fills in some hundred rows at a time and rank 0 writes them, so that memory does not grow with the rows, and
    the file gets its name when it is whole. Raises ValueError for an address, a file that exists, fields that are no vectors of numbers,
    and an interval that so many draws do not have; and, naming where the finished file is then, for a file that appeared meanwhile.
    """
    with processes.agreed():
        manifest = _manifest(shards, fields, draws)
        _check_file(out, objective, manifest, draws, interval)
        out = out.resolve()  # once: a link that is turned meanwhile leads nowhere else
        filled = _Rows(objective, manifest, seed, draws, interval)
        about = {**_source(objective, manifest), "draws": draws, "seed": seed, "interval": interval}
    with hidden(out, processes) as temporary:
        with processes.agreed():
            if processes.is_main:
                layers = () if interval is None else ("lower", "upper")
                new_h5mu.create(temporary / FILE, _cells(manifest), _features(manifest), layers, about)
        blocks = list(filled.blocks())
        for turn in range(0, len(blocks), processes.world):
            with processes.agreed():
                for split, rows, start in blocks[turn + processes.rank : turn + processes.rank + 1]:
                    np.savez(temporary / f"{start}.npz", **filled.matrices(split, rows))
            with processes.agreed():
                for _, _, start in blocks[turn : turn + processes.world] if processes.is_main else ():
                    with np.load(part := temporary / f"{start}.npz", allow_pickle=False) as matrices:
                        new_h5mu.put(temporary / FILE, start, matrices)
                    part.unlink()
        with processes.agreed():
            if processes.is_main:
                _publish(temporary / FILE, out)
    return _counted(manifest)


def _publish(made: Path, out: Path) -> None:
    """Give the finished file its name or, where something has that by now, another one beside it, which the ValueError tells."""
    sync(made)
    if not _named(made, out):
        kept = out.with_name(f"{out.stem}-{uuid.uuid4().hex[:8]}{out.suffix}")
        there = _named(made, kept)
        assert there, f"{kept} exists"
        raise ValueError(f"{out}: appeared during the work, and nothing is overwritten; the finished file is {kept}")


def _named(made: Path, out: Path) -> bool:
    """Move a file to a name that nothing has; False, and nothing is done, where something has it."""
    try:
        os.link(made, out)  # unlike a rename it fails where the name is taken
        made.unlink()
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        try:
            out.touch(exist_ok=False)  # the name is ours from here on
        except FileExistsError:
            return False
        made.replace(out)
    sync(out.parent)
    return True


def _manifest(shards: Path | str, fields: Mapping[str, Field], draws: int) -> Manifest:
    if draws < 1:
        raise ValueError(f"draws: expected at least 1, got {draws}")
    manifest = Manifest.load(shards)
    check_fields(manifest, fields)
    return manifest


def _source(objective: Objective, manifest: Manifest) -> dict[str, Any]:
    """What decides the completions, but for draws and seed: the rows, the weights, and how these are asked."""
    how: dict[str, Any] = {"kind": type(objective).__name__, "weights": fingerprint(objective.state_dict())}
    if isinstance(objective, Refining):
        temper = objective.temper
        how |= {"kernel": repr(objective.kernel), "budget": objective.budget}
        how |= {"temper": dict(temper) if isinstance(temper, Mapping) else temper}
    if isinstance(objective, Pooled):
        how |= {"pool": objective.rule}
    return {"imputed": manifest.address, "rows": manifest.fingerprint, "model": how}


def _counted(manifest: Manifest) -> dict[str, Filled]:
    there = {name: sum(split.present.values()) for name, split in manifest.splits.items()}
    rows = {name: split.rows for name, split in manifest.splits.items()}
    return {name: Filled(rows[name], there[name], rows[name] * len(manifest.fields) - there[name]) for name in rows}


def check_fields(manifest: Manifest, fields: Mapping[str, Field]) -> None:
    """Raise ValueError, naming the first differences, unless these shards have the fields that a model was trained on."""
    if list(manifest.fields) != list(fields):
        raise ValueError(f"{manifest.folder}: expected the modalities {list(fields)} that the model has, got {list(manifest.fields)}")
    for name, field in fields.items():
        theirs = manifest.fields[name].to_json()
        if different := [entry for entry, value in field.to_json().items() if theirs[entry] != value]:
            entry = different[0]
            raise ValueError(
                f"{manifest.folder}, modality {name}: expected {entry} {field.to_json()[entry]!r}, as the model was trained on, "
                f"got {theirs[entry]!r}; write the shards as the training set was"
            )


def check_features(manifest: Manifest, trained: Manifest) -> None:
    """Raise ValueError where features have names, and not those of the training set in its order. The training set need not be there."""
    if manifest.features_sha256 and trained.features_sha256 and manifest.features_sha256 != trained.features_sha256:
        raise ValueError(
            f"{manifest.folder}: expected features with the names of the training set, in its order, got others; compare {FEATURES} here "
            f"and in {trained.folder}, and write the shards anew"
        )


def _check_file(out: Path, objective: Objective, manifest: Manifest, draws: int, interval: float | None) -> None:
    """Raise ValueError for anything that would stop `impute_h5mu` later."""
    check_local(out)
    if out.suffix != ".h5mu":
        raise ValueError(f"{out}: expected the name of a .h5mu file")
    if out.exists():
        raise ValueError(f"{out}: exists already, and nothing is overwritten; choose another name or remove it")
    if out.is_symlink():
        raise ValueError(
            f"{out}: expected a new name, got a link to {out.readlink()}, which is not there; choose another name or remove it"
        )
    for name, field in manifest.fields.items():
        if field.kind not in ("vector", "counts"):
            raise ValueError(f"{out}: expected vectors and counts, got {name}, of kind {field.kind}; write shards (--out)")
        if interval is not None and not can_draw(objective.modality(name).likelihood):
            raise ValueError(
                f"interval: {name} has a {field.likelihood} likelihood, none that numbers are drawn from; leave --interval out"
            )
    if interval is not None:
        covered(torch.zeros(1, 1, dtype=torch.int64), draws, interval)


def _cells(manifest: Manifest) -> new_h5mu.Cells:
    """All rows, split after split."""
    indexes = {split: manifest.index(split) for split in manifest.splits}
    names = [name or f"{split}-{row:08d}" for split in manifest.splits for row, name in enumerate(row_names(manifest, split))]
    splits = np.repeat(np.arange(len(indexes)), [manifest.num_rows(split) for split in indexes])
    columns = {"split": (splits, list(indexes))}
    if manifest.classes:
        columns["label"] = (np.concatenate([index.label for index in indexes.values()]), list(manifest.classes))
    observed = np.concatenate([index.observed for index in indexes.values()])
    return new_h5mu.Cells(names, columns, dict(zip(manifest.fields, observed.T, strict=True)))


def _features(manifest: Manifest) -> dict[str, list[str]]:
    known = feature_names(manifest)
    return {name: known.get(name) or [f"{name}_{n}" for n in range(math.prod(field.shape))] for name, field in manifest.fields.items()}


class _Rows:
    """`Dataset.rows` of the filled-in set, and any part of them: batch by batch, so that memory does not grow with the rows.

    A part is cut into batches from its own first row, each filled up to the same size: what a row is filled in with may differ in the
    last bit by the rows around it, and is the same for the same part whoever asks for it.
    """

    def __init__(self, objective: Objective, manifest: Manifest, seed: int, draws: int = 1, interval: float | None = None):
        self.objective, self.manifest, self.seed, self.draws, self.interval = objective, manifest, seed, draws, interval
        self._readers: dict[str, Reader] = {}
        self._names: dict[str, list[str]] = {}

    def __call__(self, split: str) -> Iterator[Row]:
        for shard in self._shards(split):
            yield from self.part(split, shard)

    def part(self, split: str, rows: range) -> Iterator[Row]:
        if split not in self._names:
            self._names[split] = row_names(self.manifest, split)
        for mine in self._batches(split, rows):
            batch = self._batch(split, mine)
            columns = self._columns(batch)
            for place, row in enumerate(mine):
                label = -1 if batch.label is None else int(batch.label[place])
                data = {name: column[place] for name, column in columns.items()}
                yield Row(data, None if label < 0 else label, self._names[split][row] or None)

    def blocks(self) -> Iterator[tuple[str, range, int]]:
        """All rows, a batch at a time: the split, its rows, and how many rows of this and other splits are before them."""
        start = 0
        for split in self.manifest.splits:
            for rows in (rows for shard in self._shards(split) for rows in self._batches(split, shard)):
                yield split, rows, start
                start += len(rows)

    def matrices(self, split: str, rows: range) -> dict[str, Any]:
        """The numbers of a block for `new_h5mu.put`."""
        batch = self._batch(split, rows)
        made, found = predicted(self.objective, batch, draws=self.draws, interval=self.interval), {}
        for name, there in zip(self.manifest.fields, batch.observed.T, strict=True):
            x = batch.dense(name)
            own = made.get(name, Predicted(x[:0], (x[:0], x[:0])))
            layers = {"X": own.value} | (
                {} if self.interval is None else dict(zip(("layers/lower", "layers/upper"), own.ends or (), strict=True))
            )
            found |= {f"{name}/{layer}": _whole(x, there, value)[: len(rows)].flatten(1).numpy() for layer, value in layers.items()}
        return found

    def _shards(self, split: str) -> Iterator[range]:
        rows, size = self.manifest.num_rows(split), self.manifest.rows_per_shard
        return (range(start, min(rows, start + size)) for start in range(0, rows, size))

    def _size(self, split: str) -> int:
        return min(ROWS, self.manifest.rows_per_shard, self.manifest.num_rows(split))

    def _batches(self, split: str, rows: range) -> Iterator[range]:
        size = self._size(split)
        return (range(start, min(rows.stop, start + size)) for start in range(rows.start, rows.stop, size))

    def _batch(self, split: str, mine: range) -> Batch:
        """These rows, and behind them rows that observe nothing."""
        if split not in self._readers:
            self._readers[split] = Reader(self.manifest, split)
        reader, manifest, size, rows = self._readers[split], self.manifest, self._size(split), np.arange(mine.start, mine.stop)
        part = fill(decode(reader, rows.tolist(), reader.read(rows)), size)
        draw = np.concatenate([rows, manifest.num_rows(split) + np.arange(size - len(rows))])
        return to_batch(part, draw=draw, seed=self.seed, single=manifest.single(split), labelled=bool(manifest.classes))

    def _columns(self, batch: Batch) -> dict[str, Tensor]:
        made, noise, columns = predicted(self.objective, batch, draws=self.draws), noise_of(batch), {}
        for (name, field), there in zip(self.manifest.fields.items(), batch.observed.T, strict=True):
            x = batch.dense(name)
            whole = _whole(x, there, made[name].value) if name in made else x
            columns[name] = storable(field, whole, noise, f"imputation/whole/{name}")
        return columns


def _whole(x: Shaped[Tensor, "B *event"], there: Bool[Tensor, " B"], made: Shaped[Tensor, "R *event"]) -> Shaped[Tensor, "B *event"]:
    whole = x.clone()
    whole[~there] = made.to(x.dtype)
    return whole


def storable(field: Field, x: Shaped[Tensor, "B *event"], noise: Noise, purpose: str) -> Shaped[Tensor, "B *event"]:
    """Decoded or made-up data as the field is written: bytes for pixels, token ids; counts rounded at random, on average to themselves."""
    if field.kind == "image":
        return (x.clamp(0, 1) * 255).round().to(torch.uint8)
    if field.kind == "counts":
        low = x.clamp(min=0).floor()
        return low + (noise.uniform(purpose, 1, x[0].numel()).view_as(x) <= x - low)
    return x.clamp(0, 1) if field.likelihood == "bernoulli" else x
