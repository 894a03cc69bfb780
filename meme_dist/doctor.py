"""`meme-dist doctor`: is this machine fit to train, alone and with others, and if not, what to do about it. Reads only; changes nothing."""

import importlib.metadata
import importlib.util
import itertools
import os
import platform
import resource
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from packaging.specifiers import SpecifierSet

SUPPORTED = {
    "torch": ">=2.11,<2.14",
    "accelerate": ">=1.10",
    "webdataset": ">=1.0",
    "numpy": ">=2.0",
    "safetensors": ">=0.5",
    "triton": ">=3.6,<3.10",
    "deepspeed": ">=0.18",
}
OPTIONAL = {
    "triton": "the fused kernels: pip install -e '.[triton]' in the project's folder (CUDA builds of torch bring it along)",
    "deepspeed": "the engines zero1, zero2, zero3 and zero3_offload: pip install -e '.[deepspeed]' in the project's folder",
}
PYTHONS = SpecifierSet(">=3.11,<3.13")
ENOUGH_DISK = 2.0  # GiB: the digits' shards take 4 MB, those of MNIST-SVHN about 400 MB; a checkpoint of theirs 5 and about 40 MB
ENOUGH_SHARED = 1.0  # GiB: loader workers hand their batches over in it; a container has 64 MiB unless told otherwise
ENOUGH_FILES = 4096  # descriptors: each rank holds a socket to every other, each loader worker some for every batch on its way
STALE = 600.0  # seconds: building DeepSpeed's Adam takes about one minute on an idle machine of two cores, and more on a busy one
PORT = 29500  # the launchers' own choice
SHARED = Path("/dev/shm")
DRIVER = Path("/proc/driver/nvidia/gpus")  # an entry a GPU, as the driver sees them


class Finding(NamedTuple):
    """One thing looked at. `wrong` stops training, `note` does not; `advice` says what to do about it."""

    status: Literal["ok", "note", "wrong"]
    what: str
    found: str
    advice: str = ""


def examine(folder: Path) -> list[Finding]:
    """All findings, in the order in which to mend them; `folder` is where runs shall be written."""
    alone = [_python(), *(_package(name) for name in SUPPORTED), *_devices(), _processors(), _compiler(), _disk(folder), _writable(folder)]
    together = [*_visible(), *_collectives(), *_offload(), *_locks(), _shared_memory(), _port(), _files(), _interfaces()]
    return alone + together


def _python() -> Finding:
    version = platform.python_version()
    if version in PYTHONS:
        return Finding("ok", "python", version)
    status = "wrong" if sys.version_info < (3, 11) else "note"
    return Finding(status, "python", version, f"tested with {PYTHONS}: create the environment with python3.11 or python3.12")


def _package(name: str) -> Finding:
    wanted = SpecifierSet(SUPPORTED[name])
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        if name in OPTIONAL:
            return Finding("note", name, "not installed", f"needed only for {OPTIONAL[name]}")
        return Finding("wrong", name, "not installed", f"pip install '{name}{wanted}', or `make install`")
    if wanted.contains(version, prereleases=True):
        return Finding("ok", name, version)
    status = "note" if name in OPTIONAL else "wrong"
    return Finding(status, name, version, f"supported: {wanted}; pip install '{name}{wanted}'")


def _devices() -> Iterator[Finding]:
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    if not torch.cuda.is_available():
        built = "this torch is built without CUDA" if torch.version.cuda is None else f"torch was built for CUDA {torch.version.cuda}"
        yield Finding("note", "CUDA", "no device", f"training runs on the CPU; {built}: if the machine has a GPU, look at nvidia-smi")
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info(index))
        found = f"{device.name}, compute capability {device.major}.{device.minor}, {free:.0f} of {total:.0f} GiB free"
        full = free < 0.5 * total
        advice = "more than half of its memory is taken: see nvidia-smi for the process that holds it" if full else ""
        yield Finding("note" if full else "ok", f"CUDA device {index}", found, advice)


def _processors() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdigit() and int(threads) > cores:
        advice = f"more threads than cores slow every step down: unset OMP_NUM_THREADS, or set it to {cores} at most"
        return Finding("note", "processor", f"{cores} cores, OMP_NUM_THREADS={threads}", advice)
    return Finding("ok", "processor", f"{cores} cores, OMP_NUM_THREADS={threads or 'unset'}")


def _compiler() -> Finding:
    found = next((path for name in (os.environ.get("CC", ""), "cc", "gcc", "clang") if name and (path := shutil.which(name))), None)
    if found:
        return Finding("ok", "C compiler", found)
    advice = "needed only for Triton on a GPU, torch.compile and DeepSpeed: install gcc (Debian: apt install build-essential)"
    return Finding("note", "C compiler", "none", advice)


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(_existing(folder)).free / 2**30
    if free >= ENOUGH_DISK:
        return Finding("ok", "disk", f"{free:.1f} GiB free for {folder}")
    return Finding(
        "wrong", "disk", f"{free:.1f} GiB free for {folder}", f"{ENOUGH_DISK:.0f} GiB hold shards and checkpoints: use another --run"
    )


def _writable(folder: Path) -> Finding:
    """Tried, not guessed: permissions, quotas and read-only mounts all show in a real write."""
    parent = _existing(folder)
    try:
        with tempfile.NamedTemporaryFile(dir=parent) as file:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return Finding("wrong", "run folder", f"cannot write in {parent}: {error.strerror}", "choose another with --run FOLDER")
    return Finding("ok", "run folder", f"{parent} can be written")


def _existing(folder: Path) -> Path:
    folder = folder.resolve()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


# ---- what several processes need --------------------------------------------------------------------------------------------------


def _visible() -> Iterator[Finding]:
    """GPUs that the machine has or the environment asks for, and torch does not see."""
    seen, asked = _count_devices(), os.environ.get("CUDA_VISIBLE_DEVICES")
    there = len(list(DRIVER.iterdir())) if DRIVER.is_dir() else 0
    wanted = there if asked is None else len(_asked_for(asked))
    if wanted <= seen:
        if seen:
            yield Finding("ok", "GPUs visible", f"{seen} of {max(there, seen)}")
        return
    told = f"the driver lists {there}" if asked is None else f"CUDA_VISIBLE_DEVICES={asked}"
    advice = "give numbers that nvidia-smi lists in CUDA_VISIBLE_DEVICES, or install a torch built for CUDA; `accelerate launch "
    yield Finding("wrong", "GPUs visible", f"{told}, torch sees {seen}", f"{advice}--num_processes {max(seen, 1)}` fits what torch sees")


def _asked_for(visible: str) -> list[str]:
    """The names in CUDA_VISIBLE_DEVICES, of which CUDA reads those before the first -1."""
    names = (name.strip() for name in visible.split(","))
    return [name for name in itertools.takewhile(lambda name: name != "-1", names) if name]


def _count_devices() -> int:
    if importlib.util.find_spec("torch") is None:
        return 0
    import torch

    return torch.cuda.device_count()


def _collectives() -> Iterator[Finding]:
    """What ranks talk through: NCCL between GPUs, gloo between CPUs. The engines ddp and fsdp2 need nothing else."""
    if importlib.util.find_spec("torch") is None:
        return
    import torch
    from torch import distributed
    from torch.cuda import nccl

    if not distributed.is_available():
        yield Finding("wrong", "collectives", "this torch has no torch.distributed", "only one process can train: install torch from PyPI")
        return
    if distributed.is_nccl_available():
        yield Finding("ok", "collectives between GPUs", "NCCL " + ".".join(map(str, nccl.version())))
    elif torch.cuda.is_available():
        advice = "more than one GPU cannot train together: install torch for CUDA from PyPI or download.pytorch.org"
        yield Finding("wrong" if torch.cuda.device_count() > 1 else "note", "collectives between GPUs", "this torch has no NCCL", advice)
    if distributed.is_gloo_available():
        yield Finding("ok", "collectives between CPUs", "gloo")
    else:
        yield Finding(
            "note", "collectives between CPUs", "this torch has no gloo", "several processes need GPUs; or install torch from PyPI"
        )


def _offload() -> Iterator[Finding]:
    """What zero3_offload compiles at its first use: DeepSpeed's Adam for the host."""
    if importlib.util.find_spec("deepspeed") is None:
        return
    tools = {"a C++ compiler": (os.environ.get("CXX", ""), "c++", "g++", "clang++"), "ninja": ("ninja",)}
    if _count_devices():
        tools["nvcc"] = ("nvcc", str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc"))
    lacking = [tool for tool, names in tools.items() if not any(name and shutil.which(name) for name in names)]
    if not lacking:
        yield Finding("ok", "zero3_offload", f"can compile DeepSpeed's Adam ({', '.join(tools)})")
        return
    advice = "the other engines need none of it. apt install build-essential; pip install ninja, and have the environment's bin in PATH"
    advice += "; set CUDA_HOME to a toolkit of the CUDA version that torch is built for" if "nvcc" in lacking else ""
    yield Finding("note", "zero3_offload", f"lacks {', '.join(lacking)}", advice)


def _locks() -> Iterator[Finding]:
    """A process that was killed while it compiled an extension left a lock, for which every later one waits without end or word."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions")
    for lock in sorted(folder.rglob("lock")) if folder.is_dir() else []:
        age = time.time() - lock.stat().st_mtime
        if age > STALE:
            advice = f"its next build waits for ever; unless one is under way right now (ps -e | grep ninja): rm '{lock}'"
            yield Finding("wrong", "lock of a build", f"{lock} is {age / 60:.0f} minutes old", advice)


def _shared_memory() -> Finding:
    if not SHARED.is_dir():
        return Finding("note", "shared memory", f"no {SHARED}", "loader workers cannot hand over batches in it: train with --workers 0")
    usage = shutil.disk_usage(SHARED)
    total, free = usage.total / 2**30, usage.free / 2**30
    if free >= ENOUGH_SHARED:
        return Finding("ok", "shared memory", f"{free:.1f} of {total:.1f} GiB free in {SHARED}")
    advice = "loader workers and NCCL need it: docker run --shm-size 8g (or --ipc host), remove what killed processes left, or --workers 0"
    return Finding("note", "shared memory", f"{free:.2f} of {total:.2f} GiB free in {SHARED}", advice)


def _port() -> Finding:
    """Tried, not guessed: whether a launcher could listen there now."""
    asked = os.environ.get("MASTER_PORT", str(PORT))
    if not asked.isdigit() or int(asked) >= 2**16:
        return Finding("wrong", "port", f"MASTER_PORT={asked}", "expected a number below 65536: unset it, or give it one")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", int(asked)))
        except OSError as error:
            advice = "launch with --main_process_port 0 (one machine) or another MASTER_PORT (several); who has it: ss -ltnp"
            return Finding("note", "port", f"{asked} cannot be had: {error.strerror}", advice)
    return Finding("ok", "port", f"{asked} is free")


def _files() -> Finding:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    found = "no limit" if limit == resource.RLIM_INFINITY else f"at most {limit}"
    if limit == resource.RLIM_INFINITY or limit >= ENOUGH_FILES:
        return Finding("ok", "open files", found)
    return Finding("note", "open files", found, "many loader workers or ranks need more: ulimit -n 65536 in the shell that launches")


def _interfaces() -> Finding:
    """The network interface that gloo binds to: the one named, or that of the machine's own name."""
    there, named = [name for _, name in socket.if_nameindex()], os.environ.get("GLOO_SOCKET_IFNAME")
    if named:
        if missing := [name for name in named.split(",") if name not in there]:
            advice = f"this machine has {', '.join(there)}: unset it, or name one of these"
            return Finding("wrong", "network interface", f"GLOO_SOCKET_IFNAME={named}: no {', '.join(missing)}", advice)
        return Finding("ok", "network interface", f"GLOO_SOCKET_IFNAME={named}")
    name = socket.gethostname()
    try:
        return Finding("ok", "network interface", f"{name} is {socket.gethostbyname(name)}")
    except OSError:
        advice = "gloo finds no address to bind to: export GLOO_SOCKET_IFNAME=lo on one machine, or the interface that the machines share"
        return Finding("note", "network interface", f"the machine's name {name} has no address", advice)
