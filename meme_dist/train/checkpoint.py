"""Checkpoints: folders of safetensors files and one state.json with their checksums, replaced atomically. No pickle anywhere.

`last` is replaced in three steps: all of the new one is written and fsync'ed as `last.partial`; `last` becomes `last.previous`;
`last.partial` becomes `last`. Whenever the process dies, `last` or `last.previous` is whole, and `locate` finds it.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

FORMAT = 1
STATE = "state.json"
ATTEMPTS = 3  # at reading what may be replaced meanwhile
SHOWN = 4  # differences of a kind that an error lists
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)

Tensors = Mapping[str, Tensor]


class Checkpoint(NamedTuple):
    """`tensors` maps the stem of each safetensors file ("model", "optimizer", ...) to what is in it; `state` is plain JSON."""

    tensors: Mapping[str, Tensors]
    state: Mapping[str, Any]


# ---- files ------------------------------------------------------------------------------------------------------------------------


def write(folder: Path, checkpoint: Checkpoint) -> None:
    """Replace the checkpoint in `folder`, or create it. Until the new one is whole and on the disk, the old one stays.

    Raises OSError with the folder, the bytes needed and the bytes free where the disk is full; the old checkpoint is then untouched.
    Raises ValueError, and touches nothing, where the folder holds something else than a checkpoint.
    """
    folder = Path(folder)
    locate(folder)
    partial, previous = _beside(folder, "partial"), _beside(folder, "previous")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _write_files(partial, checkpoint)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        if error.errno not in NO_SPACE:
            raise
        raise OSError(error.errno, _no_space(folder, checkpoint)) from error
    if folder.exists():  # else `previous`, where there is one, is the only checkpoint: it stays until the new one has its name
        shutil.rmtree(previous, ignore_errors=True)
        os.rename(folder, previous)
    os.rename(partial, folder)
    _sync_folder(folder.parent)
    shutil.rmtree(previous, ignore_errors=True)


def read(folder: Path, *, only: Iterable[str] | None = None) -> Checkpoint:
    """Read a checkpoint (or `only` some of its files) and verify the checksum of everything that is read.

    Raises FileNotFoundError where there is none, and ValueError naming the file that is missing, cut or altered.
    """
    for _ in range(ATTEMPTS - 1):
        try:
            return _read(Path(folder), only)
        except (ValueError, FileNotFoundError):
            continue  # a running training may have replaced it meanwhile; what is truly wrong will be wrong again
    return _read(Path(folder), only)


def _read(folder: Path, only: Iterable[str] | None) -> Checkpoint:
    found = _found(folder)
    state = read_state(found)
    stems = [Path(name).stem for name in state["sha256"]] if only is None else only
    return Checkpoint({stem: _read_tensors(found, f"{stem}.safetensors", state["sha256"]) for stem in stems}, state)


def read_state(folder: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint: step, settings, checksums. Raises ValueError where it is damaged or of another format."""
    path = Path(folder) / STATE
    try:
        state = json.loads(path.read_bytes())
        digest = state.pop("digest")
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: cut or altered ({error}); restore it from a copy, or continue from another checkpoint") from error
    if digest != _digest_of(state):
        raise ValueError(f"{path}: its content does not match its own checksum; it was altered after it was written")
    if state["format"] != FORMAT:
        raise ValueError(f"{path}: checkpoint format {state['format']}, this version reads format {FORMAT}")
    return state


def locate(folder: Path) -> Path | None:
    """The whole checkpoint that stands for `folder`: itself, or the one that a killed replacement left beside it; None without any.

    Raises ValueError where the folder holds something, but no checkpoint.
    """
    folder = Path(folder)
    if (folder / STATE).is_file():
        return folder
    if folder.is_file() or folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder}: not a whole checkpoint ({STATE} is missing); nothing was touched. Restore it, or move it away")
    previous = _beside(folder, "previous")
    return previous if (previous / STATE).is_file() else None


def _found(folder: Path) -> Path:
    found = locate(folder)
    if found is None:
        raise FileNotFoundError(f"{folder}: no checkpoint here; expected a folder with {STATE} in it")
    return found


def _beside(folder: Path, suffix: str) -> Path:
    return folder.with_name(f"{folder.name}.{suffix}")


def _write_files(folder: Path, checkpoint: Checkpoint) -> None:
    folder.mkdir(parents=True)
    sums = {f"{stem}.safetensors": _write_file(folder / f"{stem}.safetensors", _packed(t)) for stem, t in checkpoint.tensors.items()}
    state = {**checkpoint.state, "format": FORMAT, "sha256": sums}
    text = json.dumps({**state, "digest": _digest_of(state)}, indent=1)
    _write_file(folder / STATE, text.encode())
    _sync_folder(folder)


def _packed(tensors: Tensors) -> bytes:
    return safetensors.torch.save({name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()})


def _write_file(path: Path, content: bytes) -> str:
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(content).hexdigest()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read_tensors(folder: Path, name: str, sums: Mapping[str, str]) -> dict[str, Tensor]:
    path = folder / name
    if name not in sums or not path.is_file():
        raise ValueError(f"{path}: this file of the checkpoint is missing; it holds {sorted(sums)}")
    content = path.read_bytes()
    if (came := hashlib.sha256(content).hexdigest()) != sums[name]:
        raise ValueError(f"{path}: cut or altered: sha256 {came[:12]} of {len(content)} bytes, {STATE} says {sums[name][:12]}")
    return safetensors.torch.load(content)


def _digest_of(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _no_space(folder: Path, checkpoint: Checkpoint) -> str:
    needed = sum(t.numel() * t.element_size() for tensors in checkpoint.tensors.values() for t in tensors.values())
    free = shutil.disk_usage(folder.parent).free
    return (
        f"{folder}: no space left: this checkpoint needs {needed:,} bytes, {free:,} are free there; the checkpoint before it is intact. "
        "Free some space, or move the run to another disk, and resume"
    )


# ---- what is in them --------------------------------------------------------------------------------------------------------------


def load_weights(module: nn.Module, folder: Path, *, averaged: bool = True) -> int:
    """Fill a module from a checkpoint, with the averaged weights where there are some and they are wanted. Returns the step.

    Raises ValueError listing the first differences where the checkpoint is another model's.
    """
    stem = "ema" if averaged and "ema.safetensors" in read_state(_found(folder))["sha256"] else "model"
    checkpoint = read(folder, only=[stem])
    check_tensors(checkpoint.tensors[stem], module.state_dict(), Path(folder) / f"{stem}.safetensors")
    module.load_state_dict(dict(checkpoint.tensors[stem]))
    return int(checkpoint.state["step"])


def check_tensors(came: Tensors, expected: Tensors, where: Path) -> None:
    """Raise ValueError with the first few names that are missing, too many, or of another shape or type."""
    both = [name for name in expected if name in came]
    differences = {
        "missing": [name for name in expected if name not in came],
        "unexpected": sorted(name for name in came if name not in expected),  # safetensors keeps no order
        "different": [
            f"{name} {_described(came[name])} where the model has {_described(expected[name])}"
            for name in both
            if _described(came[name]) != _described(expected[name])
        ],
    }
    found = [f"{len(names)} {kind}: {_listed(names)}" for kind, names in differences.items() if names]
    if found:
        raise ValueError(f"{where}: checkpoint of another model; {' | '.join(found)}. Build the model that it was saved from")


def check_settings(came: Mapping[str, Any], expected: Mapping[str, Any], where: Path) -> None:
    """Raise ValueError that names every changed setting with both values (first few)."""
    expected = json.loads(json.dumps(expected, default=str))  # as it comes back from a file: tuples are lists
    absent = "(absent)"
    names = [name for name in {**came, **expected} if came.get(name, absent) != expected.get(name, absent)]
    if names:
        changes = [f"{name}: {came.get(name, absent)} in the checkpoint, {expected.get(name, absent)} now" for name in names]
        raise ValueError(f"{where}: cannot resume into changed settings, {_listed(changes)}. Give the old values, or start a new run")


def optimizer_state(optimizer: Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """An optimiser's state as tensors by parameter name: "modalities.a.weight/exp_avg"."""
    names = {id(p): name for name, p in module.named_parameters()}
    return {f"{names[id(p)]}/{key}": value for p, entry in optimizer.state.items() for key, value in entry.items()}


def load_optimizer(optimizer: Optimizer, module: nn.Module, state: Tensors, where: Path) -> None:
    """Fill an optimiser from what `optimizer_state` gave; raises ValueError where it belongs to other parameters."""
    entries: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        parameter, _, key = name.rpartition("/")
        entries.setdefault(parameter, {})[key] = tensor
    names = {id(p): name for name, p in module.named_parameters()}
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    if entries and set(entries) != set(order):
        raise ValueError(f"{where}: optimiser state of other parameters, {_listed(sorted(set(entries) ^ set(order)))}")
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": {i: entries[name] for i, name in enumerate(order) if entries}, "param_groups": groups})


def _described(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _listed(items: list[str]) -> str:
    return "; ".join(items[:SHOWN]) + (f"; and {len(items) - SHOWN} more" if len(items) > SHOWN else "")


def fingerprint(tensors: Tensors) -> str:
    """sha256 over names and bytes: equal exactly where two models are equal bit by bit."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
