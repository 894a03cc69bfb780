"""Checkpoints of a training on any number of ranks and any engine: each rank writes its share, in the background where that is wanted.

A save is (1) a copy to the host: parameters, moments and averages are put together one by one, and each rank keeps those that are its
share; (2) files, written and fsync'ed by a thread of each rank; (3) the commit, by rank 0's thread once every rank's files are there.
Only (1) holds up the next step. Ranks tell rank 0 of their files through the folder itself, which they share, not through collectives: a
thread that waits for a collective would meet those of the training.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meme_dist.train import checkpoint
from meme_dist.train.ema import Average
from meme_dist.train.engines.base import Engine

PATIENCE = 1800.0  # seconds that rank 0 waits for the files of the others
Shares = dict[str, dict[str, Tensor]]


class Keeper:
    """Writes and reads checkpoints of one training. All methods are collective; `reduce` sums over ranks.

    `token` names this process's attempts: files that an earlier process left are never taken for this one's. It is equal on all ranks.
    """

    def __init__(self, engine: Engine, *, rank: int, world: int, token: str, reduce: Callable[[Tensor], Tensor]):
        self.engine, self.rank, self.world, self.token, self.reduce = engine, rank, world, token, reduce
        self._owner = shares({name: x.nbytes for name, x in engine.layout.state.items() if name in engine.names()}, world)
        self._writing: threading.Thread | None = None
        self._problem: BaseException | None = None
        self._saves = 0
        self._folder = Path()

    def save(self, folder: Path, state: Mapping[str, Any], *, average: Average | None, random: Mapping[str, Tensor], keep: int) -> None:
        """Copy everything, then write in the background; `wait` says how it ended. Waits for the save before it."""
        self.wait()
        self._begin(folder)
        tensors = self._share(average)
        if self.rank == 0:
            tensors["random"] = dict(random)
        self._writing = threading.Thread(target=self._guarded, args=(folder, dict(state), tensors, keep), name="checkpoint")
        self._writing.start()

    def wait(self) -> None:
        """End the save that is under way. Raises OSError on all ranks where one of them could not write: the one before it is intact."""
        if self._writing is None:
            return
        self._writing.join()
        self._writing = None
        self._agree()

    def _agree(self) -> None:
        problem, self._problem = self._problem, None
        if not self.reduce(torch.tensor(float(problem is not None))).item():
            return
        said: list[Any] = [str(problem) if problem is not None else None]
        if self.world > 1:  # each rank says it: one that ends first may have the others ended before they can
            said *= self.world
            torch.distributed.all_gather_object(said, said[0])
        if problem is not None:
            raise problem
        rank, why = next((rank, why) for rank, why in enumerate(said) if why is not None)
        raise OSError(f"{self._folder}: rank {rank} could not write this checkpoint: {why}")

    def _begin(self, folder: Path) -> None:
        self._saves += 1
        self._folder = folder
        if self.rank == 0:
            try:
                checkpoint.begin(folder, self._attempt)
            except Exception as error:  # whatever it is, the other ranks must not wait for it
                self._problem = error
        self._agree()  # and the barrier: the folder is there

    @property
    def _attempt(self) -> str:
        return f"{self.token}-{self._saves}"

    # ---- (1) the copy -----------------------------------------------------------------------------------------------------------------

    def _share(self, average: Average | None) -> Shares:
        """What this rank writes, copied to the host."""
        found: Shares = {"model": {}, "optimizer": {}} | ({} if average is None else {"ema": {}})
        for stem, parameter, name, tensor in self._wholes(average):
            if self._owner[parameter] == self.rank:
                found[stem][name] = tensor.detach().to("cpu", copy=True).contiguous()
        if self.rank == 0:
            state, names = self.engine.objective.state_dict(), self.engine.layout.buffers
            buffers = {name: state[name].detach().to("cpu", copy=True) for name in names}
            for stem in found.keys() - {"optimizer"}:
                found[stem] |= buffers
        return {stem: tensors for stem, tensors in found.items() if tensors or self.rank == 0}

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

    def _guarded(self, folder: Path, state: dict[str, Any], tensors: Shares, keep: int) -> None:
        partial = folder.with_name(f"{folder.name}.{self._attempt}.partial")
        try:
            self._write(folder, partial, state, tensors, keep)
        except OSError as error:
            self._problem = checkpoint.explained(error, folder, checkpoint.size_of(tensors))
        except Exception as error:
            self._problem = error
        if self._problem is not None:
            self._tell(partial, {"error": str(self._problem)})
            self._give_up(partial)

    def _give_up(self, partial: Path) -> None:
        """Rank 0 takes an unfinished checkpoint away, when no other rank writes into it any more."""
        if self.rank == 0:
            for rank in range(1, self.world):
                self._heard(partial, rank)
            checkpoint.abandon(partial)

    def _write(self, folder: Path, partial: Path, state: dict[str, Any], tensors: Shares, keep: int) -> None:
        share = f"-{self.rank + 1:05d}-of-{self.world:05d}" if self.world > 1 else ""
        sums = checkpoint.write_tensors(partial, tensors, share)
        if self.rank > 0:
            self._tell(partial, sums)
            return
        for rank in range(1, self.world):
            heard = self._heard(partial, rank)
            if "error" in heard:
                raise OSError(f"rank {rank} could not write its share: {heard['error']}")
            sums |= heard
        for told in partial.glob("rank-*.json"):
            told.unlink()
        checkpoint.commit(folder, partial, {**state, "sha256": sums}, keep=keep)

    def _tell(self, partial: Path, content: Mapping[str, str]) -> None:
        """Say to rank 0 that the files are there, or why not."""
        if self.rank == 0:
            return
        part = partial / f"rank-{self.rank}.tmp"
        try:
            part.write_text(json.dumps(content), encoding="utf-8")
            part.rename(part.with_suffix(".json"))
        except OSError:  # no room for a line either: rank 0 gives up waiting
            return

    def _heard(self, partial: Path, rank: int) -> dict[str, str]:
        """What another rank told: its files' checksums, or its error."""
        path, deadline = partial / f"rank-{rank}.json", time.monotonic() + PATIENCE
        while not path.is_file():
            if time.monotonic() > deadline:
                return {"error": f"nothing came of it in {PATIENCE / 60:.0f} minutes; do all ranks share this storage?"}
            time.sleep(0.005)
        return json.loads(path.read_text(encoding="utf-8"))

    # ---- reading ----------------------------------------------------------------------------------------------------------------------

    def find(self, folder: Path) -> tuple[Path | None, list[str]]:
        """The newest checkpoint that is whole, and what is wrong with those that are newer; None where there never was one.

        Rank 0 reads every byte and decides. Raises ValueError on all ranks where there are checkpoints and none of them is whole.
        """
        self.wait()
        problems: list[str] = []
        place, candidates = -1, candidates_of(folder)
        if self.rank == 0:
            for number, path in enumerate(candidates):
                try:
                    checkpoint.verify(path)
                except ValueError as error:
                    problems.append(str(error))
                else:
                    place = number
                    break
        place = int(self.reduce(torch.tensor(float(place if self.rank == 0 else 0))).item())
        if place >= 0:
            return candidates[place], problems
        if candidates:
            raise ValueError(problems[0] if problems else f"{folder}: no checkpoint here is whole; rank 0 says what is wrong")
        return None, problems

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


def candidates_of(folder: Path) -> list[Path]:
    """The checkpoints that may stand for `folder`, newest first. Raises ValueError where it holds something else."""
    found = checkpoint.locate(folder)
    return [] if found is None else [found, *(path for path in checkpoint.older(folder) if path != found)]


def shares(sizes: Mapping[str, int], world: int) -> dict[str, int]:
    """Which rank writes which tensor: the largest first, each to the rank that has least so far; the same on every rank."""
    load, owner = [0] * world, {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owner[name] = rank = load.index(min(load))
        load[rank] += sizes[name]
    return owner
