"""`meme-dist doctor`: is this machine fit to train, and if not, what to do about it. Reads only; changes nothing."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
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
    "triton": "the fused kernels: pip install 'meme-dist[triton]' (CUDA builds of torch bring it along)",
    "deepspeed": "ZeRO: pip install 'meme-dist[deepspeed]'",
}
PYTHONS = SpecifierSet(">=3.11,<3.13")
ENOUGH_DISK = 2.0  # GiB: the digits' shards take 4 MB, those of MNIST-SVHN about 400 MB; a checkpoint of theirs 5 and about 40 MB


class Finding(NamedTuple):
    """One thing looked at. `wrong` stops training, `note` does not; `advice` says what to do about it."""

    status: Literal["ok", "note", "wrong"]
    what: str
    found: str
    advice: str = ""


def examine(folder: Path) -> list[Finding]:
    """All findings, in the order in which to mend them; `folder` is where runs shall be written."""
    return [_python(), *(_package(name) for name in SUPPORTED), *_devices(), _processors(), _compiler(), _disk(folder), _writable(folder)]


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
