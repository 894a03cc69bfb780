"""Processes that a launcher started together to use a trained model: they share the rows, and where one fails all end.

gloo joins them, with GPUs and without: what crosses is small (sums, a flag a shard), processes may share a GPU, and one that has ended is
noticed at once, where NCCL would wait for its time limit.

An error is told once, by the rank that has it. What a rank does on its own stands in `agreed`: at its end all learn whether one failed.
Anywhere else the rank that fails leaves, its connections close, and the others find that out where they next exchange something.
"""

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import cast

import torch
import torch.distributed as distributed
from torch import Tensor

from meme_dist.leave import naming

PATIENCE = timedelta(hours=1)  # a rank waits no longer for another: for its share of a shard, or while rank 0 trains the classifiers
TELLS = "meme_dist.ranks/tells"  # the store's key under which stands who tells the error


class Elsewhere(Exception):
    """Another rank failed, and tells why; this one has nothing to add. `rank` is None where it ended without a word to the others."""

    def __init__(self, rank: int | None = None):
        super().__init__("another process failed" if rank is None else f"rank {rank} failed")
        self.rank = rank


class Processes:
    """This process among those that infer together; alone without arguments.

    `reduce`, `from_main` and `agreed` are collective: every rank calls them, in the same order.
    """

    def __init__(self, rank: int = 0, world: int = 1, device: torch.device | None = None, group: distributed.ProcessGroup | None = None):
        self.rank, self.world, self.device, self._group = rank, world, device or torch.device("cpu"), group

    @property
    def is_main(self) -> bool:
        """Whether this rank prints, and writes what there is one of."""
        return self.rank == 0

    def shares(self, number: int) -> list[range]:
        """Each rank's contiguous part of `number` things: equally many on every rank, but fewer or none on the last ones."""
        each = -(-number // self.world)
        return [range(min(number, rank * each), min(number, (rank + 1) * each)) for rank in range(self.world)]

    def reduce(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, on every rank."""
        return self._all_reduce(tensor, distributed.ReduceOp.SUM)

    def from_main(self, number: int) -> int:
        """Rank 0's number, on every rank."""
        return int(self.reduce(torch.tensor(number if self.is_main else 0)))

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """A piece of work without an exchange in it, which has failed on all ranks where it failed on one.

        The lowest rank with an error raises it, the others raise `Elsewhere`.
        """
        problem = None
        try:
            yield
        except Exception as error:
            problem = error
        mine = torch.tensor(self.world if problem is None else self.rank)
        failed = int(self._all_reduce(mine, distributed.ReduceOp.MIN))
        if problem is not None and failed == self.rank:
            raise problem
        if failed < self.world:
            raise Elsewhere(failed) from problem

    def told(self, problem: Exception) -> Exception:
        """What this rank shall raise for an error that ends it: the error with the rank's number, or `Elsewhere`.

        The first rank to ask tells. The others wait here until it has left, for a launcher that sees one process end stops the rest.
        """
        if self.world == 1:
            return problem
        rank = problem.rank if isinstance(problem, Elsewhere) and problem.rank is not None else self._first_to_tell()
        if rank == self.rank:
            return _named(problem, f"rank {self.rank} of {self.world}")
        try:
            # nothing is ever sent: it ends when the other's connections close
            distributed.recv(torch.zeros(1), src=rank, group=self._group)
        except RuntimeError:
            pass
        return Elsewhere(rank)

    def _first_to_tell(self) -> int:
        try:
            store = distributed.distributed_c10d._get_default_store()
            return int(store.compare_set(TELLS, "", str(self.rank)))
        except RuntimeError:  # the process that kept the store has ended, so nobody knows what the others said
            return self.rank

    def _all_reduce(self, tensor: Tensor, operation: distributed.ReduceOp.RedOpType) -> Tensor:
        if self.world == 1:
            return tensor
        total = tensor.detach().cpu().clone()
        try:
            distributed.all_reduce(total, operation, group=self._group)
        except RuntimeError as error:
            raise Elsewhere from error
        return total.to(tensor.device)


ALONE = Processes()


@contextmanager
def joined(rank: int, local: int, world: int) -> Iterator[Processes]:
    """The processes of a launch, each with a GPU where there are some. All leave together: with success, or because of one error.

    `rank`, `local` (among those of one machine) and `world` are the launcher's numbers. Raises the error that ends the work on one rank,
    `Elsewhere` on the others; ValueError where the launcher does not say how to meet.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local % torch.cuda.device_count())
        torch.cuda.set_device(device)
    processes = Processes(rank, world, device, _group(rank, world) if world > 1 else None)
    try:
        yield processes
        with processes.agreed():
            pass  # none ends well before all have
    except Exception as problem:
        told = processes.told(problem)
        if told is problem:
            raise
        raise told from problem


@contextmanager
def hidden(folder: Path, processes: Processes = ALONE) -> Iterator[Path]:
    """A new hidden folder beside `folder`, for all processes to write into until rank 0 gives it its name: whole, or not there at all.

    It is gone at the end if it was not renamed. Only a process that is killed leaves one behind. Collective. Raises ValueError where a
    rank does not see what rank 0 made.
    """
    temporary = folder.with_name(f".{folder.name}.writing-{processes.from_main(uuid.uuid4().int % 2**32):08x}")
    try:
        with processes.agreed():
            if processes.is_main:
                with naming(folder):
                    folder.parent.mkdir(parents=True, exist_ok=True)
                    temporary.mkdir()
        with processes.agreed():
            if not temporary.is_dir():
                raise ValueError(f"{folder.parent}: what rank 0 writes here is not to be seen; choose storage that all processes share")
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # by each rank as it stops, so that the last one leaves nothing


def _group(rank: int, world: int) -> distributed.ProcessGroup | None:
    """A group over gloo with our patience: the process's only one, or beside one that is there already."""
    if distributed.is_initialized():
        return cast(distributed.ProcessGroup, distributed.new_group(backend="gloo", timeout=PATIENCE))
    distributed.init_process_group("gloo", rank=rank, world_size=world, timeout=PATIENCE)
    return distributed.group.WORLD


def _named(problem: Exception, who: str) -> Exception:
    """The same kind of error, with the rank in its message; of one that is not foreseen the rank stands below the traceback."""
    if isinstance(problem, Elsewhere):
        return OSError(f"{who}: another process ended or does not answer ({problem.__cause__}); the launcher's output says which")
    if isinstance(problem, OSError):
        named = OSError(f"{who}: {problem}")
        named.errno = problem.errno  # the exit status depends on it
        return named
    if isinstance(problem, ValueError):
        return ValueError(f"{who}: {problem}")
    problem.add_note(f"on {who}")
    return problem
