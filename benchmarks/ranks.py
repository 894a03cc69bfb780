"""Ranks of one machine for a benchmark, and the bytes that each of them really sends.

Ranks are fresh processes, joined as `accelerate launch` would join them: by NCCL where each can have a GPU of its own, else by gloo on the
CPU, one thread each. What a rank sends is read from the system, which counts every TCP connection's bytes: whatever library sent them,
nothing is left out. (Between GPUs of one machine nothing passes over TCP, and nothing is counted.)
"""

import os
import queue
import socket
import struct
import tempfile
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch

PATIENCE = 120.0  # seconds a rank waits for the others
SENT = struct.Struct("=200xQQ")  # tcpi_bytes_sent and, of them, tcpi_bytes_retrans in Linux' struct tcp_info


def rank_device(world: int) -> torch.device:
    """Where each of `world` ranks of this machine computes: on a GPU of its own where there are as many, else on the CPU."""
    return torch.device("cuda" if torch.cuda.device_count() >= world else "cpu")


def run_ranks(function: Callable[..., Any], world: int, *arguments: Any, threads: int = 1, timeout: float = 600.0) -> list[Any]:
    """`function(rank, world, *arguments)` on each of `world` ranks; what each returned. Raises RuntimeError where one failed."""
    context = torch.multiprocessing.get_context("spawn")
    answers = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        calls = [(function, rank, world, folder, threads, answers, arguments) for rank in range(world)]
        processes = [context.Process(target=_enter, args=call, daemon=True) for call in calls]
        for process in processes:
            process.start()
        try:
            found = dict(_answers(answers, world, timeout))
        finally:
            for process in processes:
                process.kill()
                process.join()
    return [found[rank] for rank in range(world)]


def _answers(answers: Any, world: int, timeout: float) -> Iterator[tuple[int, Any]]:
    for _ in range(world):
        try:
            rank, failure, result = answers.get(timeout=timeout)
        except queue.Empty:
            raise RuntimeError(f"a rank of {world} gave no answer within {timeout:.0f} s") from None
        if failure is not None:
            raise RuntimeError(f"rank {rank} of {world}: {failure}")
        yield rank, result


def _enter(
    function: Callable[..., Any], rank: int, world: int, folder: str, threads: int, answers: Any, arguments: tuple[Any, ...]
) -> None:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "OMP_NUM_THREADS": threads}
    os.environ.update({name: str(number) for name, number in numbers.items()}, GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(threads)
    own_gpu = rank_device(world).type == "cuda"
    if own_gpu:
        torch.cuda.set_device(rank)
    else:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    store, patience = f"file://{folder}/rendezvous", timedelta(seconds=PATIENCE)
    try:
        torch.distributed.init_process_group(
            "nccl" if own_gpu else "gloo", init_method=store, rank=rank, world_size=world, timeout=patience
        )
        answers.put((rank, None, function(rank, world, *arguments)))
    except BaseException:
        answers.put((rank, traceback.format_exc(), None))
    answers.close()
    answers.join_thread()
    os._exit(0)  # DDP's destructors may hang once its process group is gone


def sent_bytes() -> int | None:
    """Payload bytes that this process has sent over its open TCP connections, each once; None where the system does not tell."""
    if not os.path.isdir("/proc/self/fd"):
        return None
    return sum(filter(None, map(_sent_by, os.listdir("/proc/self/fd"))))


def _sent_by(descriptor: str) -> int | None:
    try:
        if not os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket:"):
            return None
        with socket.socket(fileno=os.dup(int(descriptor))) as connection:
            if connection.type != socket.SOCK_STREAM or connection.family not in (socket.AF_INET, socket.AF_INET6):
                return None
            sent, again = SENT.unpack_from(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256))
            return sent - again  # a busy machine repeats what it thinks was lost
    except (OSError, struct.error):  # closed meanwhile; an older kernel, whose answer is shorter
        return None
