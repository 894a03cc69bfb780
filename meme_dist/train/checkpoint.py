"""Checkpoints: folders of safetensors files and one state.json with their checksums, replaced atomically. No pickle anywhere.

`last` is replaced in three steps: all of the new one is written and fsync'ed as `last.TOKEN.partial`; `last` becomes `last-00000500`, after
its step; `last.TOKEN.partial` becomes `last`. Whenever the process dies, one of them is whole, and `locate` finds it.

A file of a stem ("model", "optimizer", ...) holds whole tensors, whichever engine trained them; where several ranks write, each has a file
of its own (`model-00002-of-00004.safetensors`). So a checkpoint of any number of ranks and any engine is one for any other.
"""

import errno
import glob
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

from meme_dist.data.files import sync
from meme_dist.leave import naming

FORMAT = 1
STATE = "state.json"
ATTEMPTS = 3  # at reading what may be replaced meanwhile
SHOWN = 4  # differences of a kind that an error lists
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
UNREADABLE = (errno.EIO, errno.EBADMSG, getattr(errno, "EUCLEAN", errno.EIO))  # of a disk that has lost what it held; the last is Linux's

Tensors = Mapping[str, Tensor]


class Checkpoint(NamedTuple):
    """`tensors` maps the stem of each safetensors file ("model", "optimizer", ...) to what is in it; `state` is plain JSON."""

    tensors: Mapping[str, Tensors]
    state: Mapping[str, Any]


# ---- files ------------------------------------------------------------------------------------------------------------------------


def write(folder: Path, checkpoint: Checkpoint, *, keep: int = 1) -> None:
    """Replace the checkpoint in `folder`, or create it. Until the new one is whole and on the disk, the old one stays.

    Of those replaced, the newest `keep` - 1 stay beside it. Raises OSError with the folder, the bytes needed and the bytes free where the
    disk is full; the old checkpoint is then untouched. Raises ValueError, and touches nothing, where the folder holds something else.
    """
    partial = begin(folder, "0")
    try:
        sums = write_tensors(partial, checkpoint.tensors)
        commit(folder, partial, {**checkpoint.state, "sha256": sums}, keep=keep)
    except OSError as error:
        abandon(partial)
        raise explained(error, folder, size_of(checkpoint.tensors)) from error


def begin(folder: Path, token: str) -> Path:
    """The empty folder in which a new checkpoint for `folder` is made; what an earlier process left unfinished there is removed.

    Raises ValueError, and touches nothing, where `folder` holds something else than a checkpoint.
    """
    folder = Path(folder)
    candidates(folder)
    for stale in folder.parent.glob(f"{glob.escape(folder.name)}.*partial"):
        shutil.rmtree(stale, ignore_errors=True)
    partial = _beside(folder, f"{token}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    return partial


def write_tensors(partial: Path, tensors: Mapping[str, Tensors], share: str = "") -> dict[str, str]:
    """Write and fsync one file a stem, `share` in its name ("-00002-of-00004"); returns each file's sha256."""
    return {f"{stem}{share}.safetensors": _write_file(partial / f"{stem}{share}.safetensors", _packed(t)) for stem, t in tensors.items()}


def commit(folder: Path, partial: Path, state: Mapping[str, Any], *, keep: int) -> None:
    """Make the finished folder `partial` the checkpoint `folder`: its state is written last, then it takes the name."""
    state = {**state, "format": FORMAT}
    _write_file(partial / STATE, json.dumps({**state, "digest": _digest_of(state)}, indent=1).encode())
    sync(partial)
    if folder.exists():  # else an older one, where there is one, is the only checkpoint: it stays until the new one has its name
        old = folder.with_name(f"{folder.name}-{_step_in(folder):08d}")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
    os.rename(partial, folder)
    sync(folder.parent)
    replaced = older(folder)
    kept = [old for old in replaced if _number(old, folder) < int(state.get("step", 0))][: keep - 1]
    for old in replaced:  # a step that a run went back from is none to resume at, and takes up no place
        if old not in kept:
            shutil.rmtree(old, ignore_errors=True)


def abandon(partial: Path) -> None:
    """Give back the space of a checkpoint that could not be finished."""
    shutil.rmtree(partial, ignore_errors=True)


def size_of(tensors: Mapping[str, Tensors]) -> int:
    """Bytes of all tensors."""
    return sum(t.numel() * t.element_size() for entries in tensors.values() for t in entries.values())


def explained(error: OSError, folder: Path, needed: int) -> OSError:
    """The error itself, or where the disk is full one that says how much is needed and how much is free."""
    if error.errno not in NO_SPACE:
        return error
    free = shutil.disk_usage(folder.parent).free
    return OSError(
        error.errno,
        f"{folder}: no space left: this checkpoint needs {needed:,} bytes, {free:,} are free there; the checkpoint before it is intact. "
        "Free some space, or move the run to another disk, and resume",
    )


def older(folder: Path) -> list[Path]:
    """The checkpoints that `folder` replaced and that are still there, newest first."""
    found = [
        path for path in folder.parent.glob(f"{glob.escape(folder.name)}-*") if re.fullmatch(r"\d{8,}", path.name[len(folder.name) + 1 :])
    ]
    return sorted(found, key=lambda path: _number(path, folder), reverse=True)


def _number(old: Path, folder: Path) -> int:
    return int(old.name[len(folder.name) + 1 :])


def _step_in(folder: Path) -> int:
    try:
        return int(read_state(folder).get("step", 0))
    except (ValueError, OSError):  # damaged: kept as the oldest, and never taken for a good one
        return 0


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
    stems = list(dict.fromkeys(map(_stem, state["sha256"]))) if only is None else only
    return Checkpoint({stem: _read_stem(found, stem, state["sha256"]) for stem in stems}, state)


def verify(folder: Path) -> dict[str, Any]:
    """Read every byte of a checkpoint and compare it with its checksums; returns its state. Raises ValueError as `read` does."""
    state = read_state(folder)
    for name in state["sha256"]:
        path = folder / name
        if not path.is_file():
            raise ValueError(_missing(path, state["sha256"]))
        with path.open("rb") as file:
            came = hashlib.file_digest(file, "sha256").hexdigest()
        if came != state["sha256"][name]:
            raise ValueError(_altered(path, came, path.stat().st_size, state["sha256"][name]))
    return state


def _stem(name: str) -> str:
    return re.sub(r"(-\d{5}-of-\d{5})?\.safetensors$", "", name)


def _read_stem(folder: Path, stem: str, sums: Mapping[str, str]) -> dict[str, Tensor]:
    names = [name for name in sums if _stem(name) == stem] or [f"{stem}.safetensors"]
    return {key: tensor for name in names for key, tensor in _read_tensors(folder, name, sums).items()}


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


def value_of(folder: Path) -> float:
    """The "value" with which `Trainer.save_best` wrote a checkpoint; -inf where there is none, or none that can be read."""
    try:
        found = locate(folder)
        return -math.inf if found is None else float(read_state(found)["value"])
    except (ValueError, KeyError, OSError):
        return -math.inf


def locate(folder: Path) -> Path | None:
    """The checkpoint that stands for `folder`: itself, or the newest that it replaced where it was killed meanwhile; None without any.

    Raises ValueError where the folder holds something, but no checkpoint.
    """
    folder = Path(folder)
    if (folder / STATE).is_file():
        return folder
    if folder.is_file() or folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder}: not a whole checkpoint ({STATE} is missing); nothing was touched. Restore it, or move it away")
    return next((path for path in older(folder) if (path / STATE).is_file()), None)


def candidates(folder: Path) -> list[Path]:
    """The checkpoints that may stand for `folder`, newest first, damaged ones among them. Raises ValueError where it holds something else.

    What has lost its state and is tensors alone is damaged where one that it replaced has its own, and else something else.
    """
    replaced = older(folder)
    if _lost_its_state(folder) and any((path / STATE).is_file() for path in replaced):
        return [folder, *replaced]
    found = locate(folder)
    return [] if found is None else [found, *(path for path in replaced if path != found)]


def _lost_its_state(folder: Path) -> bool:
    files = list(folder.iterdir()) if folder.is_dir() else []
    return bool(files) and all(path.suffix == ".safetensors" for path in files)


def _found(folder: Path) -> Path:
    found = locate(folder)
    if found is None:
        raise FileNotFoundError(f"{folder}: no checkpoint here; expected a folder with {STATE} in it")
    return found


def _beside(folder: Path, suffix: str) -> Path:
    return folder.with_name(f"{folder.name}.{suffix}")


def _packed(tensors: Tensors) -> bytes:
    return safetensors.torch.save({name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()})


def _write_file(path: Path, content: bytes) -> str:
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(content).hexdigest()


def _read_tensors(folder: Path, name: str, sums: Mapping[str, str]) -> dict[str, Tensor]:
    path = folder / name
    if name not in sums or not path.is_file():
        raise ValueError(_missing(path, sums))
    content = path.read_bytes()
    if (came := hashlib.sha256(content).hexdigest()) != sums[name]:
        raise ValueError(_altered(path, came, len(content), sums[name]))
    return safetensors.torch.load(content)


def _missing(path: Path, sums: Mapping[str, str]) -> str:
    return f"{path}: this file of the checkpoint is missing; it holds {sorted(sums)}"


def _altered(path: Path, came: str, size: int, expected: str) -> str:
    return f"{path}: cut or altered: sha256 {came[:12]} of {size} bytes, {STATE} says {expected[:12]}"


def _digest_of(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


# ---- what is in them --------------------------------------------------------------------------------------------------------------


def load_weights(module: nn.Module, folder: Path, *, averaged: bool = True) -> int:
    """Fill a module from a checkpoint, with the averaged weights where there are some and they are wanted. Returns the step.

    Raises ValueError listing the first differences where the checkpoint is another model's.
    """
    stem = "ema" if averaged and "ema" in map(_stem, read_state(_found(folder))["sha256"]) else "model"
    checkpoint = read(folder, only=[stem])
    check_tensors(checkpoint.tensors[stem], module.state_dict(), Path(folder) / f"{stem}.safetensors")
    module.load_state_dict(dict(checkpoint.tensors[stem]))
    return int(checkpoint.state["step"])


def export(folder: Path, out: Path, *, averaged: bool = True) -> int:
    """Write a checkpoint's weights as one safetensors file, the averaged ones where there are some and they are wanted; returns the step.

    From checkpoints of any engine and number of ranks. Raises ValueError for a damaged checkpoint and for a file that exists.
    """
    if out.exists():
        raise ValueError(f"{out}: exists already, and nothing is overwritten; choose another name (--out)")
    found = _found(folder)
    stem = "ema" if averaged and "ema" in map(_stem, read_state(found)["sha256"]) else "model"
    checkpoint = read(found, only=[stem])
    partial = out.with_name(f"{out.name}.partial")
    with naming(out):
        partial.unlink(missing_ok=True)
        _write_file(partial, _packed(checkpoint.tensors[stem]))
        partial.rename(out)
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


def check_settings(came: Mapping[str, Any], expected: Mapping[str, Any], where: Path, *, defaults: Mapping[str, Any] | None = None) -> None:
    """Raise ValueError that names every changed setting with both values (first few).

    A setting that there was not yet when the checkpoint was written counts as having had its default, where it has one.
    """
    expected, former = (json.loads(json.dumps(x, default=str)) for x in (expected, defaults or {}))  # as from a file: tuples are lists
    came = {**{name: value for name, value in former.items() if name in expected}, **came}
    absent = "(absent)"
    names = [name for name in {**came, **expected} if came.get(name, absent) != expected.get(name, absent)]
    if names:
        changes = [f"{name}: {came.get(name, absent)} in the checkpoint, {expected.get(name, absent)} now" for name in names]
        raise ValueError(f"{where}: cannot resume into changed settings, {_listed(changes)}. Give the old values, or start a new run")


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
