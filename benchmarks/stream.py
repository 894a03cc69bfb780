"""Rows a second out of tar shards: our stream beside plain webdataset, a loader over one file a datum, and the bounds of this machine.

Three sets without missing entries, whose batches all readers make from the same bytes by the same codecs: `small` (64 floats, 48 counts, a
sentence of 8 words), `png` (a 3 x 64 x 64 picture and a sentence) and `raw` (the same picture without compression). The page cache is warm.

The bound adds two times that nobody can avoid: reading the tars in order, without looking into them, and decoding bytes that are in
memory already, a batch at a time. Beside it: the same with one call a datum, as loaders usually do it; and with a CRC-32 of every member,
which our stream checks and the others do not. Our stream and the loader over files shuffle, webdataset reads in order.
"""

import multiprocessing
import os
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import webdataset
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.record import CPU, keep
from meme_dist.data.fields import SPECIAL, Field
from meme_dist.data.index import Manifest
from meme_dist.data.reader import Reader
from meme_dist.data.shards import Dataset as Rows
from meme_dist.data.shards import Row, write_shards
from meme_dist.data.stream import Stream
from meme_dist.data.workers import AHEAD

WORDS = (*SPECIAL, *(f"word{number}" for number in range(61)))
SENTENCE = Field("text", (16,), "txt", "categorical", WORDS)
PARTS = ("raw read", "decode, a batch at a time", "decode, one by one", "crc-32")  # what the bounds are made of
Key = tuple[str, int]  # a reader and its number of workers


def main(
    *,
    rows: int = 8192,
    pictures: int = 4096,
    batch_size: int = 128,
    workers: int = 2,
    repeats: int = 5,
    threads: int = 1,
    save: bool = True,
) -> None:
    """Time passes over whole sets, reader after reader in turn.

    Args:
        rows: Rows of the set of small rows.
        pictures: Rows of the two sets of pictures.
        batch_size: Rows a batch; both numbers of rows are multiples of it.
        workers: The most worker processes.
        repeats: How often each reader is timed.
        threads: CPU threads of each process.
        save: Append the rows to benchmarks/results/stream.jsonl.
    """
    if rows % batch_size or pictures % batch_size:
        raise ValueError(f"rows, pictures: expected multiples of batch_size {batch_size}, got {rows} and {pictures}")
    torch.set_num_threads(threads)
    for name, dataset in (("small", _small(rows)), ("png", _pictures(pictures, "png")), ("raw", _pictures(pictures, "npy"))):
        with tempfile.TemporaryDirectory() as folder:
            manifest = write_shards(dataset, Path(folder) / "shards", splits=["train"])
            passes = _passes(manifest, Path(folder) / "files", batch_size, workers)
            measured = _rows(name, manifest.num_rows("train"), batch_size, _timed(passes, repeats))
            del passes  # and with them the worker processes
        _show(measured)
        if save:
            print(f"kept in {keep('stream', measured, device=CPU, threads=threads)}\n", flush=True)


# ---- sets ------------------------------------------------------------------------------------------------------------------------------


def _small(rows: int) -> Rows:
    fields = {"sound": Field("vector", (64,), "npy", "normal"), "genes": Field("counts", (48,), "npy", "poisson"), "name": SENTENCE}

    def make(split: str) -> Iterator[Row]:
        generator = np.random.default_rng(0)
        for _ in range(rows):
            sound = torch.from_numpy(generator.standard_normal(64, dtype=np.float32))
            genes = torch.from_numpy(generator.integers(0, 99, 48))
            yield Row({"sound": sound, "genes": genes, "name": _sentence(generator)})

    return Rows("small", fields, make)


def _pictures(rows: int, codec: Any) -> Rows:
    fields = {"photo": Field("image", (3, 64, 64), codec, "laplace"), "name": SENTENCE}

    def make(split: str) -> Iterator[Row]:
        generator = np.random.default_rng(0)
        for _ in range(rows):
            blocks = generator.integers(0, 200, (3, 8, 8)).repeat(8, 1).repeat(8, 2)
            photo = torch.from_numpy((blocks + generator.integers(0, 16, (3, 64, 64))).astype(np.uint8))
            yield Row({"photo": photo, "name": _sentence(generator)})

    return Rows(f"pictures_{codec}", fields, make)


def _sentence(generator: np.random.Generator) -> str:
    return " ".join(WORDS[number] for number in generator.integers(len(SPECIAL), len(WORDS), 8))


# ---- readers ---------------------------------------------------------------------------------------------------------------------------


def _passes(manifest: Manifest, folder: Path, batch_size: int, workers: int) -> "dict[Key, Pass]":
    """Every reader of one set, by its name and its number of workers."""
    members = Reader(manifest, "train").read(np.arange(manifest.num_rows("train")))
    columns = {name: [bytes(row[column] or b"") for row in members] for column, name in enumerate(manifest.fields)}
    files = _write_files(manifest, columns, folder)
    parts = (lambda: _raw(manifest), lambda: _decode(manifest, columns, batch_size), lambda: _decode(manifest, columns, 1))
    passes = {(name, 0): _clocked(call) for name, call in zip(PARTS, (*parts, lambda: _checksums(manifest)), strict=True)}
    for number in range(workers + 1):
        passes["stream", number] = _stream(manifest, batch_size, number)
        passes["webdataset", number] = _loaded(_webdataset(manifest), batch_size, number, shuffle=None)
        passes["loader over files", number] = _loaded(files, batch_size, number, shuffle=True)
    return passes


def _raw(manifest: Manifest) -> None:
    for shard in manifest.shards("train"):
        with manifest.path(shard).open("rb", buffering=0) as file:
            while file.read(1 << 20):
                pass


def _decode(manifest: Manifest, columns: dict[str, list[bytes]], size: int) -> None:
    for low in range(0, manifest.num_rows("train"), size):
        for name, field in manifest.fields.items():
            field.decode_rows(columns[name][low : low + size])


def _checksums(manifest: Manifest) -> None:
    """Of every member with its header, as the index holds them; the tars are read whole for it."""
    records, start = manifest.index("train").records, 0
    for shard in manifest.shards("train"):
        data = memoryview(manifest.path(shard).read_bytes())
        own, start = records[start : start + shard.rows], start + shard.rows
        for low, size in zip(own["offset"].ravel().tolist(), own["size"].ravel().tolist(), strict=True):
            zlib.crc32(data[low - 512 : low + -(-size // 512) * 512])


def _stream(manifest: Manifest, batch_size: int, workers: int) -> "Pass":
    """An endless stream, opened once. What its workers prepared while others were timed is thrown away before the clock starts."""
    steps = iter(Stream(manifest.folder, "train", batch_size=batch_size, seed=0, workers=workers))

    def take(count: int) -> None:
        for _ in range(count):
            next(steps)

    return _clocked(lambda: take(manifest.num_rows("train") // batch_size), before=lambda: take(2 * AHEAD if workers else 1))


def _loaded(dataset: Any, batch_size: int, workers: int, *, shuffle: bool | None) -> "Pass":
    """A torch DataLoader whose workers stay."""
    loader = DataLoader(dataset, batch_size, shuffle=shuffle, num_workers=workers, persistent_workers=workers > 0)
    return _clocked(lambda: sum(1 for _ in loader))


def _webdataset(manifest: Manifest) -> Any:
    urls = [str(manifest.path(shard)) for shard in manifest.shards("train")]
    decode = _Decode(dict(manifest.fields))
    return webdataset.WebDataset(urls, shardshuffle=False, nodesplitter=None, empty_check=False).map(decode)


class _Decode:
    """One sample of webdataset to tensors."""

    def __init__(self, fields: dict[str, Field]):
        self.fields = fields

    def __call__(self, sample: dict[str, Any]) -> dict[str, Tensor]:
        return {name: field.decode(sample[f"{name}.{field.codec}"]) for name, field in self.fields.items()}


class _Files(Dataset):
    """One file a datum."""

    def __init__(self, folder: Path, fields: dict[str, Field], rows: int):
        self.folder, self.fields, self.rows = folder, fields, rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {name: field.decode((self.folder / name / f"{row}.{field.codec}").read_bytes()) for name, field in self.fields.items()}


def _write_files(manifest: Manifest, columns: dict[str, list[bytes]], folder: Path) -> _Files:
    for name, field in manifest.fields.items():
        (folder / name).mkdir(parents=True)
        for row, data in enumerate(columns[name]):
            (folder / name / f"{row}.{field.codec}").write_bytes(data)
    return _Files(folder, dict(manifest.fields), manifest.num_rows("train"))


# ---- figures ---------------------------------------------------------------------------------------------------------------------------


class Taken(NamedTuple):
    """One pass: seconds on the wall, and CPU seconds of the process that worked most, which is what bounds it on free cores."""

    wall: float
    busiest: float


Pass = Callable[[], Taken]  # one pass over all rows of a set


def _clocked(call: Callable[[], object], before: Callable[[], object] = lambda: None) -> Pass:
    def one() -> Taken:
        before()
        wall, cpu, workers = time.perf_counter(), time.process_time(), _workers()
        call()
        spent = [after - workers.get(pid, 0.0) for pid, after in _workers().items()]
        return Taken(time.perf_counter() - wall, max([time.process_time() - cpu, *spent]))

    return one


def _workers() -> dict[int, float]:
    """CPU seconds of each worker process so far, where the system tells them (Linux, to 10 ms)."""
    found = {}
    for process in multiprocessing.active_children():
        try:
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        found[process.pid or 0] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return found


def _timed(passes: dict[Key, Pass], repeats: int) -> dict[Key, list[Taken]]:
    """Each pass, taken in turn so that drift hits all alike; each was made once before."""
    for one in passes.values():
        one()
    taken: dict[Key, list[Taken]] = {key: [] for key in passes}
    for _ in range(repeats):
        for key, one in passes.items():
            taken[key].append(one())
    return taken


def _rows(name: str, rows: int, batch_size: int, taken: dict[Key, list[Taken]]) -> list[dict[str, Any]]:
    """One result row a reader, bounds included, each with its share of the bound on the wall and by the CPU time of its busiest process."""
    times = {key: np.array(passes) for key, passes in taken.items()}  # [repeats, 2]
    raw, whole, single, checked = (times.pop((part, 0)) for part in PARTS)
    bounds = {"raw read": raw, "bound": raw + whole, "bound, one by one": raw + single, "bound with crc-32": whole + checked}
    times = {**{(bound, 0): passes for bound, passes in bounds.items()}, **times}
    wall, cpu = np.median(raw + whole, axis=0)
    measured = []
    for (reader, workers), passes in times.items():
        slow, middle, fast = (round(rows / float(np.percentile(passes[:, 0], share))) for share in (80, 50, 20))
        speed = {
            "rows_per_s": middle,
            "rows_per_s_p20": slow,
            "rows_per_s_p80": fast,
            "cpu_us": round(1e6 * _median(passes[:, 1]) / rows, 2),
        }
        shares = {"of_bound": round(wall / _median(passes[:, 0]), 3), "of_bound_cpu": round(cpu / _median(passes[:, 1]), 3)}
        measured.append({"set": name, "reader": reader, "workers": workers, "rows": rows, "batch_size": batch_size, **speed, **shares})
    return measured


def _median(x: np.ndarray) -> float:
    return max(float(np.median(x)), 1e-9)


def _show(measured: list[dict[str, Any]]) -> None:
    print(f"{'set':<7}{'reader':<19}{'workers':>8}{'rows/s (p20 .. p80)':>34}{'of bound':>10}{'CPU us a row':>14}{'of bound':>10}")
    for r in measured:
        speed = f"{r['rows_per_s']:,} ({r['rows_per_s_p20']:,} .. {r['rows_per_s_p80']:,})"
        shares = f"{r['of_bound']:>10.2f}{r['cpu_us']:>14.1f}{r['of_bound_cpu']:>10.2f}"
        print(f"{r['set']:<7}{r['reader']:<19}{r['workers']:>8}{speed:>34}{shares}")
