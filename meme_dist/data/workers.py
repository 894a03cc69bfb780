"""Worker processes that read ahead: each decodes its parts into shared memory, and the main process takes them in turn.

Workers of a `DataLoader` hand over every tensor in shared memory of its own: a file, its handle sent through a socket, and fresh pages to
fault in, a batch and a modality. Here the memory is there from the start and used again and again.
"""

import atexit
import contextlib
import itertools
import math
import os
import pickle
import shutil
import signal
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from meme_dist.data.collate import Part
from meme_dist.data.fields import Field

AHEAD = 4  # parts of a worker: one in use, the others waiting or being made
FREE = b"1"  # what a worker is told when a part is no longer in use
ALIGNMENT = 64  # bytes
SHARED = Path("/dev/shm")


class Work(Protocol):
    """What is to be made: parts of rows of `fields`, by any number of workers."""

    fields: Mapping[str, Field]

    def most(self, workers: int) -> int:
        """Rows of the largest part where there are so many workers."""
        ...

    def parts(self, worker: int, workers: int, rooms: Iterator[Mapping[str, Tensor] | None]) -> Iterator[Part]:
        """The parts of one of the workers, each decoded into the next room, or into memory of its own where that is None."""
        ...


def parts(work: Work, workers: int) -> Iterator[Part]:
    """What `work` makes, here or in worker processes, which take turns: one part of each.

    A part of a worker stands in shared memory until that worker's next one is asked for: `join` copies it. Workers come from a fork
    server: forking a process that has threads or a CUDA context may deadlock. A ValueError or OSError of a worker is raised here with its
    own words; RuntimeError where a worker dies.
    """
    if not workers:
        yield from work.parts(0, 1, itertools.repeat(None))
        return
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "webdataset", "meme_dist.data.stream"])  # imported once, not once a worker
    hands = [_Hand(context, work, number, workers) for number in range(workers)]
    try:
        for hand in itertools.cycle(hands):
            if (part := hand.take()) is None:
                return  # parts go round: where one worker is at its end, the others are too
            yield part
    finally:
        for hand in hands:
            hand.end()


class _Sent(NamedTuple):
    """A part on its way: tensors stand in the shared memory, `counts` rows of each modality."""

    counts: dict[str, int]
    rest: Part


class _Hand:
    """The main process's end of one worker."""

    def __init__(self, context: Any, work: Work, number: int, workers: int):
        self._slots = _Slots(work.fields, work.most(workers))
        self._taken = 0
        self._mine, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(work, number, workers, self._slots, theirs), daemon=True)
        self._process.start()
        theirs.close()
        atexit.register(self._process.kill)  # else an uncaught error waits for ever: multiprocessing asks by SIGTERM, then joins

    def take(self) -> Part | None:
        """The worker's next part, in the shared memory; None where there are no more. The one before is given up."""
        try:
            if self._taken:
                self._mine.send_bytes(FREE)
        except ConnectionError:  # it has made its last part and left
            pass
        try:
            message = pickle.loads(self._mine.recv_bytes())
        except (EOFError, ConnectionError):
            self._process.join()
            raise RuntimeError(f"a loader worker died with exit code {self._process.exitcode}; out of memory, perhaps") from None
        if isinstance(message, Exception):
            raise message
        if message is None:
            return None
        present = {name: x[: message.counts[name]] for name, x in self._slots.views(self._taken).items()}
        self._taken += 1
        return message.rest._replace(present=present)

    def end(self) -> None:
        """Closing the pipe is the signal; a worker in the midst of a part is not waited for."""
        atexit.unregister(self._process.kill)
        self._mine.close()
        self._process.kill()
        self._process.join()
        self._process.close()


class _Slots:
    """Shared memory for `AHEAD` parts, used in turn."""

    def __init__(self, fields: Mapping[str, Field], rows: int):
        self._places: list[tuple[str, torch.dtype, tuple[int, ...], int, int]] = []
        size = 0
        for name, field in fields.items():
            length = rows * math.prod(field.shape) * field.dtype.itemsize
            self._places.append((name, field.dtype, (rows, *field.shape), size, size + length))
            size += -(-length // ALIGNMENT) * ALIGNMENT
        _check_room(AHEAD * size)
        self.memory = torch.empty((AHEAD, size), dtype=torch.uint8).share_memory_()

    def views(self, number: int) -> dict[str, Tensor]:
        """Room for the `number`-th part: a tensor [rows, *event] for each modality."""
        slot = self.memory[number % AHEAD]
        return {name: slot[low:high].view(dtype).view(shape) for name, dtype, shape, low, high in self._places}


def _check_room(size: int) -> None:
    """Shared memory that is not there kills a process by SIGBUS, without a word."""
    if SHARED.is_dir() and (free := shutil.disk_usage(SHARED).free) < size:
        raise OSError(
            f"workers: expected {size / 1e6:.0f} MB of shared memory in {SHARED} for one, found {free / 1e6:.0f} MB; "
            "use fewer workers or 0, or give the container more (docker: --shm-size)"
        )


def _serve(work: Work, number: int, workers: int, slots: _Slots, pipe: Connection) -> None:
    """The life of a worker: it makes parts as long as there is room for them, and ends when nobody listens any more."""
    for told in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # the whole group hears these: the main process decides
        signal.signal(told, signal.SIG_IGN)
    torch.set_num_threads(1)
    try:
        for part in work.parts(number, workers, _rooms(slots, pipe)):
            counts = {name: len(x) for name, x in part.present.items()}
            _send(pipe, _Sent(counts, part._replace(present={})))
        _send(pipe, None)
    except ValueError as error:
        _send(pipe, ValueError(str(error)))
    except OSError as error:
        _send(pipe, OSError(str(error)))


def _rooms(slots: _Slots, pipe: Connection) -> Iterator[dict[str, Tensor]]:
    """Room for part after part; from the `AHEAD`-th on as the main process gives up earlier ones."""
    for number in itertools.count():
        if number >= AHEAD:
            with _while_heard():
                pipe.recv_bytes()
        yield slots.views(number)


def _send(pipe: Connection, message: Any) -> None:
    with _while_heard():
        pipe.send_bytes(pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL))


@contextlib.contextmanager
def _while_heard() -> Iterator[None]:
    """Leave without a word where the main process has gone, or has no more use for this worker."""
    try:
        yield
    except (EOFError, ConnectionError):
        os._exit(0)
