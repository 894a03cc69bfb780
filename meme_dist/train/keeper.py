"""Checkpoints of a training on any number of ranks and any engine: each rank writes its share, in the background where that is wanted.

A save is (1) a copy to the host: parameters, moments and averages are put together one by one, and each rank keeps those that are its
share; (2) files, written and fsync'ed by a thread of each rank; (3) the commit, by rank 0's thread once every rank's files are there.
Only (1) holds up the next step. Ranks tell rank 0 of their files through the folder itself, which they share, not through collectives: a
thread that waits for a collective would meet those of the training.
"""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meme_dist.leave import WRITER
from meme_dist.train import checkpoint
from meme_dist.train.ema import Average
from meme_dist.train.engines.base import Engine

PATIENCE = 1800.0  # seconds that rank 0 waits for the files of the others, all together
GLANCE = 1.0  # seconds between two signs of life of a rank that waits for its own files
READS = 2  # of a checkpoint that the disk fails to read
Shares = dict[str, dict[str, Tensor]]
Note = Mapping[str, Any]  # what a rank tells rank 0: its files' checksums, or its error and that error's number


class Keeper:
    """Writes and reads checkpoints of one training. All methods are collective; `reduce` sums over ranks.

    `token` names this process's attempts: files that an earlier process left are never taken for this one's. It is equal on all ranks.
    `alive` is called now and then while a rank waits for files to be written, which slow storage takes minutes for.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        rank: int,
        world: int,
        token: str,
        reduce: Callable[[Tensor], Tensor],
        alive: Callable[[], object] = lambda: None,
    ):
        self.engine, self.rank, self.world, self.token, self.reduce, self._alive = engine, rank, world, token, reduce, alive
        self._owner = shares({name: x.nbytes for name, x in engine.layout.state.items() if name in engine.names()}, world)
        self._writing: threading.Thread | None = None
        self._problem: BaseException | None = None
        self._saves = 0
        self._folder = Path()

    def save(self, folder: Path, state: Mapping[str, Any], *, average: Average | None, random: Mapping[str, Tensor], keep: int) -> None:
        """Copy everything, then write in the background; `wait` says how it ended. Waits for the save before it."""
        self.wait()
        self._begin(folder)
        tensors, needed = self._share(average)
        if self.rank == 0:
            tensors["random"] = dict(random)
        needed += checkpoint.size_of({"random": random})
        self._writing = threading.Thread(target=self._guarded, args=(folder, dict(state), tensors, keep, needed), name=WRITER)
        self._writing.start()

    def wait(self) -> None:
        """End the save that is under way. Raises OSError on all ranks where one of them could not write: the one before it is intact."""
        if self._writing is None:
            return
        deadline = time.monotonic() + PATIENCE
        while self._writing.is_alive():
            if time.monotonic() < deadline:  # past it the storage hangs, and a watchdog may say so
                self._alive()
            self._writing.join(GLANCE)
        self._writing = None
        self._agree("could not write this checkpoint")

    def _agree(self, what: str) -> None:
        """Raise on all ranks where one has a problem: its own, or that of the first that has one."""
        problem, self._problem = self._problem, None
        if not self.reduce(torch.tensor(float(problem is not None))).item():
            return
        said: list[Any] = [None if problem is None else {**_told(problem), "mistake": isinstance(problem, ValueError)}]
        if self.world > 1:  # each rank says it: one that ends first may have the others ended before they can
            said *= self.world
            torch.distributed.all_gather_object(said, said[0])
        if problem is not None:
            raise problem
        rank, first = next((rank, entry) for rank, entry in enumerate(said) if entry is not None)
        text = f"{self._folder}: rank {rank} {what}: {first['error']}"
        raise ValueError(text) if first["mistake"] else _numbered(text, first["errno"])

    def _begin(self, folder: Path) -> None:
        self._saves += 1
        self._folder = folder
        if self.rank == 0:
            try:
                checkpoint.begin(folder, self._attempt)
            except Exception as error:  # whatever it is, the other ranks must not wait for it
                self._problem = error
        self._agree("could not write this checkpoint")  # and the barrier: the folder is there

    @property
    def _attempt(self) -> str:
        return f"{self.token}-{self._saves}"

    # ---- (1) the copy -----------------------------------------------------------------------------------------------------------------

    def _share(self, average: Average | None) -> tuple[Shares, int]:
        """What this rank writes, copied to the host, and the bytes of what all ranks write."""
        found: Shares = {"model": {}, "optimizer": {}} | ({} if average is None else {"ema": {}})
        needed = 0
        for stem, parameter, name, tensor in self._wholes(average):
            needed += tensor.nbytes
            if self._owner[parameter] == self.rank:
                found[stem][name] = tensor.detach().to("cpu", copy=True).contiguous()
        if self.rank == 0:
            state, names = self.engine.objective.state_dict(), self.engine.layout.buffers
            buffers = {name: state[name].detach().to("cpu", copy=True) for name in names}
            for stem in found.keys() - {"optimizer"}:
                found[stem] |= buffers
        needed += sum(self.engine.layout.state[name].nbytes for name in self.engine.layout.buffers) * (len(found) - 1)
        return {stem: tensors for stem, tensors in found.items() if tensors or self.rank == 0}, needed

    def _wholes(self, average: Average | None) -> Iterator[tuple[str, str, str, Tensor]]:
        """(stem, parameter, entry, whole tensor), one at a time: no rank ever holds all of a sharded model."""
        engine = self.engine
        aliases: dict[str, list[str]] = {}
        for entry, parameter in engine.layout.owner.items():
            aliases.setdefault(parameter, []).append(entry)
        for parameter, entries in aliases.items():
            value = engine.whole(parameter, engine.part(parameter))
            yield from (("model", parameter, entry, value) for entry in entries)
            if average is not None:
                value = engine.whole(parameter, average.parts[parameter])
                yield from (("ema", parameter, entry, value) for entry in entries)
            yield from (("optimizer", parameter, f"{parameter}/{key}", x) for key, x in engine.moments(parameter).items())

    # ---- (2) and (3) files and commit ---------------------------------------------------------------------------------------------------

    def _guarded(self, folder: Path, state: Mapping[str, Any], tensors: Shares, keep: int, needed: int) -> None:
        partial = folder.with_name(f"{folder.name}.{self._attempt}.partial")
        try:
            if self.rank == 0:
                self._lead(folder, partial, state, tensors, keep)
            else:
                self._follow(partial, tensors)
        except OSError as error:
            self._problem = checkpoint.explained(error, folder, needed)
        except Exception as error:
            self._problem = error

    def _follow(self, partial: Path, tensors: Shares) -> None:
        """Write this rank's files and tell rank 0 that they are there, or why not."""
        try:
            self._tell(partial, self._write(partial, tensors))
        except Exception as error:
            self._make_room(partial)
            with contextlib.suppress(OSError):  # rank 0 will not hear of it, and gives up waiting
                self._tell(partial, _told(error))
            raise

    def _lead(self, folder: Path, partial: Path, state: Mapping[str, Any], tensors: Shares, keep: int) -> None:
        """Write rank 0's files and, once those of all ranks are there, make them the checkpoint; else take them all away."""
        try:
            try:
                sums = self._write(partial, tensors)
            except BaseException:
                self._make_room(partial)
                raise
            finally:  # in any case: until they have told, other ranks write into this folder
                notes = self._heard(partial)
            for rank, note in notes.items():
                if "error" in note:
                    raise _numbered(f"rank {rank} could not write its share: {note['error']}", note["errno"])
                sums |= note
            for path in partial.glob("rank-*"):
                path.unlink()
            checkpoint.commit(folder, partial, {**state, "sha256": sums}, keep=keep)
        except BaseException:
            checkpoint.abandon(partial)
            raise

    @property
    def _suffix(self) -> str:
        return f"-{self.rank + 1:05d}-of-{self.world:05d}" if self.world > 1 else ""

    def _write(self, partial: Path, tensors: Shares) -> dict[str, str]:
        return checkpoint.write_tensors(partial, tensors, self._suffix)

    def _make_room(self, partial: Path) -> None:
        """Take away this rank's files: while they fill the disk, no rank can even tell that it is full."""
        for path in partial.glob(f"*{self._suffix}.safetensors"):
            path.unlink(missing_ok=True)

    def _tell(self, partial: Path, note: Note) -> None:
        part = partial / f"rank-{self.rank}.tmp"
        part.write_text(json.dumps(note), encoding="utf-8")
        part.rename(part.with_suffix(".json"))

    def _heard(self, partial: Path) -> dict[int, Note]:
        """What each of the other ranks told; all of them together have `PATIENCE`."""
        notes, deadline = {}, time.monotonic() + PATIENCE
        for rank in range(1, self.world):
            path = partial / f"rank-{rank}.json"
            while not (there := path.is_file()) and time.monotonic() < deadline:
                time.sleep(0.005)
            notes[rank] = json.loads(path.read_text(encoding="utf-8")) if there else _silent()
        return notes

    # ---- reading ----------------------------------------------------------------------------------------------------------------------

    def find(self, folder: Path) -> tuple[Path | None, list[str]]:
        """The newest checkpoint that is whole, and what is wrong with those that are newer; None where there never was one.

        Rank 0 reads every byte and decides, and what the others hear is a name: in their own list, where a network file system is late to
        show a change, the same place may be another checkpoint. Raises ValueError on all ranks where there are checkpoints and none of
        them is whole, or where ranks do not see the same.
        """
        self.wait()
        self._folder = folder
        found: Path | None = None
        problems: list[str] = []
        if self.rank == 0:
            try:
                found, problems = newest_whole(folder)
            except Exception as error:  # whatever it is, the other ranks must not wait for it
                self._problem = error
        self._agree("found no checkpoint to go on from")
        names: list[Any] = [None if found is None else found.name]
        if self.world > 1:
            torch.distributed.broadcast_object_list(names, 0)
        found = None if names[0] is None else folder.with_name(names[0])
        places = [folder, *checkpoint.older(folder)] if found is None else [found]
        seen = self.reduce(torch.tensor(float(any((place / checkpoint.STATE).is_file() for place in places)))).item()
        if seen != (0 if found is None else self.world):
            raise ValueError(
                f"{folder}: {seen:.0f} of {self.world} ranks see a checkpoint here; it must be on storage that all of them share"
            )
        return found, problems

    def restore(self, folder: Path, saved: checkpoint.Checkpoint, average: Average | None) -> None:
        """Fill weights, moments, buffers and averages from a checkpoint that was found to fit."""
        engine, tensors = self.engine, saved.tensors
        moments: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors["optimizer"].items():
            parameter, _, key = name.rpartition("/")
            moments.setdefault(parameter, {})[key] = tensor
        names = engine.names()
        if strangers := sorted(set(moments) - set(names)):
            raise ValueError(f"{folder}: optimiser state of other parameters, {', '.join(strangers[:4])}")
        for name in names:
            engine.load(name, tensors["model"][name], moments.get(name, {}))
            if average is not None:
                average.load(name, tensors["ema"][name])
        engine.load_buffers(tensors["model"])


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and what is wrong with those that are newer.

    Raises ValueError where none of them is whole, OSError where that may be a disk's moment of weakness.
    """
    problems: list[Exception] = []
    for path in checkpoint.candidates(folder):
        if (problem := _damage(path)) is None:
            return path, [str(problem) for problem in problems]
        problems.append(problem)
    if problems:
        raise next((problem for problem in problems if _unreadable(problem)), ValueError(str(problems[0])))
    return None, []


def _damage(path: Path, reads: int = READS) -> Exception | None:
    """What is wrong with a checkpoint; a disk that cannot read it is asked again."""
    try:
        checkpoint.verify(path)
    except (ValueError, FileNotFoundError) as error:
        return error
    except OSError as error:
        if not _unreadable(error):
            raise
        return error if reads == 1 else _damage(path, reads - 1)
    return None


def _unreadable(problem: Exception) -> bool:
    return isinstance(problem, OSError) and problem.errno in checkpoint.UNREADABLE


def shares(sizes: Mapping[str, int], world: int) -> dict[str, int]:
    """Which rank writes which tensor: the largest first, each to the rank that has least so far; the same on every rank."""
    load, owner = [0] * world, {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owner[name] = rank = load.index(min(load))
        load[rank] += sizes[name]
    return owner


def _told(problem: BaseException) -> dict[str, Any]:
    """A problem as another rank hears of it."""
    return {"error": str(problem), "errno": getattr(problem, "errno", None)}


def _silent() -> dict[str, Any]:
    return {"error": f"nothing came of it in {PATIENCE / 60:.0f} minutes; do all ranks share this storage?", "errno": None}


def _numbered(text: str, number: int | None) -> OSError:
    """An error with the number of its cause, by which the program's end tells a full disk from one that may work again."""
    error = OSError(text)
    error.errno = number
    return error
