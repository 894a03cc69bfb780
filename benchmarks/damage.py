"""Damage to shards, done in the midst of a training: part of `python -m benchmarks faults`.

One process trains on 96 rows in three shards. Between two steps one shard is damaged while the training pauses, or vanishes while it runs.
It must stop with an error; with the shard back it goes on from its checkpoint, to the weights of the undisturbed run, bit by bit. Then the
whole training once more, on the damaged shard, with a budget for damage. Bytes are changed in place: all else in the tar is as it was.

Seconds: `detected` from the damage to the error, `again` from the error, since then somebody has to put the shard right, until one step is
trained again; both within a running process.
"""

import collections
import contextlib
import io
import itertools
import os
import pickle
import shutil
import tarfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from meme_dist.data.index import TAR_BLOCK, Manifest
from meme_dist.data.sets.linear_gaussian import linear_gaussian as rows_of
from meme_dist.data.shards import write_shards
from meme_dist.data.stream import Stream
from meme_dist.recipes.linear_gaussian import linear_gaussian
from meme_dist.train import checkpoint
from meme_dist.train.trainer import Trainer, Training

BROKEN, BUDGET = "train-000001.tar", 48
TRAINING = Training(steps=24, batch_size=16, damaged=BUDGET)  # four epochs
RANKS, WORKERS, FEW, EPOCHS = 2, 2, 23, 8  # of `uneven`: processes, rows and epochs
Row = dict[str, Any]


def measured(folder: Path) -> list[Row]:
    """One result for each damage, and one for more readers than shards."""
    write_shards(rows_of(rows=96, missing=0.3), folder / "good", rows_per_shard=32)
    expected, _ = _to_the_end(_trainer(folder / "good", folder / "whole"))
    return [*(damaged(name, folder, expected) for name in DAMAGES), uneven(folder)]


# ---- damages -----------------------------------------------------------------------------------------------------------------------------


class Target(NamedTuple):
    """A shard and a row in it: the name of its first modality's member, offset and size of the payload."""

    path: Path
    member: str
    offset: int
    size: int


def target(folder: Path) -> Target:
    """A row in the midst of the shard that is to be damaged; all of its modalities are there."""
    manifest = Manifest.load(folder)
    index, first, second = manifest.index("train"), *manifest.shards("train")[:2]
    low = first.rows + second.rows // 2
    row = low + int((index.records["size"][low:] >= 0).all(1).argmax())
    offset, size = (int(index.records[key][row][0]) for key in ("offset", "size"))
    return Target(folder / BROKEN, f"{index.key(row)}.{next(iter(manifest.fields))}.npy", offset, size)


def put(at: Target, place: int, content: bytes) -> None:
    """Other bytes at a place, counted from the payload on."""
    with at.path.open("r+b") as file:
        file.seek(at.offset + place)
        file.write(content)


def relabel(at: Target, *, name: str | None = None, size: bytes = b"") -> None:
    """Another name, or another size in octal digits, in the member's header, whose own checksum is right again."""
    header = bytearray(at.path.read_bytes()[at.offset - TAR_BLOCK : at.offset])
    if name is not None:
        header[:100] = name.encode().ljust(100, b"\0")
    header[124 : 124 + len(size)], header[148:156] = size, b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    put(at, -TAR_BLOCK, header)


def reshape(at: Target) -> None:
    """A well-formed array of another shape, as long as the right one."""
    out = io.BytesIO()
    np.save(out, np.zeros((2, 2), dtype=np.float32))
    put(at, 0, out.getvalue())


def plant(at: Target) -> None:
    """A pickle that makes a folder beside the shards if anybody loads it."""
    put(at, 0, pickle.dumps(Bomb(at.path.parent / "canary"))[: at.size])
    relabel(at, name=f"{at.member[:-4]}.pkl")


class Bomb:
    """Its pickle makes a folder."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


def repeat(at: Target) -> None:
    """The same name a second time, with another content."""
    with tarfile.open(at.path, "a") as tar:
        info = tarfile.TarInfo(at.member)
        info.size = at.size
        tar.addfile(info, io.BytesIO(b"x" * at.size))


VANISHES = "shard that vanishes in mid-epoch"
DAMAGES: Mapping[str, Callable[[Target], object]] = {
    "corrupt tar header": lambda at: put(at, 12 - TAR_BLOCK, b"?"),
    "truncated tar": lambda at: os.truncate(at.path, at.offset + at.size // 2),
    "wrong shape": reshape,
    "oversized member": lambda at: relabel(at, size=b"77777777777"),  # 8 GB
    "path traversal name": lambda at: relabel(at, name="../../canary"),
    "pickle member": plant,
    "duplicate keys": repeat,
    "empty shard": lambda at: os.truncate(at.path, 0),
    VANISHES: lambda at: at.path.unlink(),
}


# ---- trainings ---------------------------------------------------------------------------------------------------------------------------


def damaged(name: str, folder: Path, expected: str) -> Row:
    """Train two steps, do the damage, meet the error, put the shard right, go on to the end; then all with a budget for damage."""
    shards, run = folder / name / "shards", folder / name / "run"
    shutil.copytree(folder / "good", shards)
    first = _trainer(shards, run)
    steps = iter(first)
    next(steps), next(steps)
    first.save()
    happened = time.perf_counter()
    DAMAGES[name](target(shards))
    message = _error(lambda: _to_the_end(first, steps) if name == VANISHES else _to_the_end(_trainer(shards, run, resume=True)))
    told = time.perf_counter()
    shutil.copy(folder / "good" / BROKEN, shards)
    final, trained = _to_the_end(_trainer(shards, run, resume=True))
    DAMAGES[name](target(shards))
    lenient = _trainer(shards, folder / name / "lenient", budget=BUDGET)
    _to_the_end(lenient)
    lost = {"steps_again": first.step - 2, "same_end": final == expected, "rows_replaced": len(lenient.stream.damaged)}  # type: ignore[attr-defined]
    seconds = {"detected_s": round(told - happened, 3), "again_s": round(trained - told, 3)}
    executed = {"executed": (shards / "canary").exists()} if DAMAGES[name] is plant else {}
    return {
        "part": "shard",
        "fault": name,
        "message": message.replace(f"{shards}/", "").replace(str(shards), "SHARDS"),
        **lost,
        **executed,
        **seconds,
    }


def uneven(folder: Path) -> Row:
    """Two shards for four readers: how often each row came in eight epochs."""
    write_shards(rows_of(rows=FEW, missing=0.0), folder / "few", rows_per_shard=12, splits=["train"])
    seen: collections.Counter[bytes] = collections.Counter()
    start = time.perf_counter()
    for rank in range(RANKS):
        stream = Stream(folder / "few", "train", batch_size=EPOCHS, seed=0, rank=rank, world=RANKS, workers=WORKERS)
        with contextlib.closing(iter(stream)) as steps:  # type: ignore[type-var]
            for batch in itertools.chain.from_iterable(itertools.islice(steps, FEW)):
                seen.update(row.numpy().tobytes() for row in batch.dense("x0"))
    surplus = [count - EPOCHS for count in seen.values()] + [-EPOCHS] * (FEW - len(seen))
    name = f"uneven ranks: 2 shards of {FEW} rows, {RANKS} ranks with {WORKERS} workers each, {EPOCHS} epochs"
    lost = {"rows_lost": -sum(min(0, x) for x in surplus), "rows_doubled": sum(max(0, x) for x in surplus)}
    return {"part": "shard", "fault": name, "message": "", **lost, "whole_s": round(time.perf_counter() - start, 2)}


def _trainer(shards: Path, run: Path, *, budget: int = 0, resume: bool = False) -> Trainer:
    recipe = linear_gaussian(rows_in_all=96, training=TRAINING)
    torch.manual_seed(0)
    objective = recipe.build(Manifest.load(shards))
    trainer = Trainer(objective, Stream(shards, "train", batch_size=16, seed=0, streams=4, damaged=budget), TRAINING, folder=run)
    if resume:
        trainer.resume()
    return trainer


def _to_the_end(trainer: Trainer, steps: Any = None) -> tuple[str, float]:
    """Train all steps that are left; a fingerprint of the weights, and the time at which the first of these steps was made."""
    steps = iter(trainer) if steps is None else steps
    next(steps)
    made = time.perf_counter()
    collections.deque(steps, maxlen=0)
    return checkpoint.fingerprint(trainer.objective.state_dict()), made


def _error(call: Callable[[], object]) -> str:
    """The first line of the error; "no error" is a result too, and a bad one."""
    try:
        call()
    except ValueError as error:
        return str(error).splitlines()[0]
    return "no error"
