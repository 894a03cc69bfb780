"""Several ranks on this machine in a fraction of a second: gloo processes forked from a server that has torch and Accelerate loaded.

Launching `accelerate launch` takes 6 to 12 s a test, this 0.2 s. A run that hangs is killed, and the error names the ranks that did not
answer. Ranks leave by `os._exit`: destructors of DDP and gloo hung in 2 to 3 % of the runs when a DDP model died after its process group.
"""

import functools
import importlib.util
import multiprocessing
import os
import queue
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.forkserver import ensure_running
from typing import Any

TIMEOUT = 60.0  # seconds, for a whole run
GRACE = 2.0  # seconds, for the other ranks once one has failed
PRELOAD = [
    "torch",
    "torch.distributed",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "accelerate",
    "tests.launching",
    "tests.trainings",
    "meme_dist.train.trainer",
    "pytest",
    "meme_dist.run",
    "meme_dist.impute",
    "meme_dist.draws",
]
if importlib.util.find_spec("deepspeed"):  # the second of these imports torch's compiler: seconds for each rank otherwise
    PRELOAD += ["deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer", "meme_dist.train.engines.zero"]
_ALIVE: list[Any] = []  # DDP models, kept from their destructors


def forkserver() -> Any:
    """The process context whose server has the heavy imports done."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def run_ranks(function: Callable[..., Any], world: int, *arguments: Any, timeout: float = TIMEOUT, **keywords: Any) -> list[Any]:
    """`function(rank, world, *arguments, **keywords)` on each of `world` gloo ranks; what each returned (values and arrays, no tensors).

    Raises AssertionError with the traceback of a rank that failed, or with the ranks that hung.
    """
    context = forkserver()
    with tempfile.TemporaryDirectory() as folder:  # rendezvous through a file: no port to find free, and to lose again
        answers = context.Queue()
        call = functools.partial(function, **keywords)
        processes = [context.Process(target=_enter, args=(call, rank, world, folder, answers, arguments)) for rank in range(world)]
        for process in processes:
            process.start()
        try:
            return _collect(answers, processes, time.monotonic() + timeout)
        finally:
            _end(processes)


def _collect(answers: Any, processes: list[Any], deadline: float) -> list[Any]:
    world, results, failures = len(processes), {}, {}
    while len(results) + len(failures) < world and time.monotonic() < deadline:
        try:
            rank, failure, result = answers.get(timeout=0.1)
        except queue.Empty:
            silent = [r for r, p in enumerate(processes) if p.exitcode not in (None, 0) and r not in failures]
            failures |= {r: f"died with exit code {processes[r].exitcode}" for r in silent}
        else:
            (results if failure is None else failures)[rank] = result if failure is None else failure
        if failures:  # the others may fail for want of this one, or hang: a moment to hear the real cause
            deadline = min(deadline, time.monotonic() + GRACE)
    assert not failures, "\n".join(f"rank {rank} of {world}: {failures[rank]}" for rank in sorted(failures))
    assert len(results) == world, f"hung: no answer from ranks {sorted(set(range(world)) - set(results))} of {world}"
    return [results[rank] for rank in range(world)]


def _end(processes: list[Any]) -> None:
    for process in processes:
        process.join(2)
        if process.is_alive():
            process.kill()
            process.join()
        process.close()


def _enter(function: Callable[..., Any], rank: int, world: int, folder: str, answers: Any, arguments: tuple[Any, ...]) -> None:
    try:
        _join(rank, world, folder)
        answers.put((rank, None, function(rank, world, *arguments)))
    except BaseException:
        answers.put((rank, traceback.format_exc(), None))
    answers.close()
    answers.join_thread()
    sys.stdout.flush()
    os._exit(0)


def _join(rank: int, world: int, folder: str) -> None:
    import torch
    from torch.nn.parallel import DistributedDataParallel

    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "OMP_NUM_THREADS": 1}
    os.environ.update({name: str(number) for name, number in numbers.items()}, ACCELERATE_USE_CPU="true", GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    construct = DistributedDataParallel.__init__

    def construct_and_keep(self: Any, *values: Any, **keywords: Any) -> None:
        _ALIVE.append(self)
        construct(self, *values, **keywords)

    DistributedDataParallel.__init__ = construct_and_keep
    store = f"file://{folder}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=30))


# A process has one fork server, which imports what was asked for before its first fork; the loader's workers ask for less. So it is started
# here, while tests are collected and before any of them may start a loader.
if multiprocessing.current_process().name == "MainProcess":
    forkserver()
    ensure_running()
