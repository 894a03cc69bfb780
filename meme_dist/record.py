"""A run's folder and its `run.json`: what was run, with which keywords, on what; enough to run it again, or to go on with it."""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import meme_dist
from meme_dist.leave import naming
from meme_dist.train.durable import replace
from meme_dist.train.training import FREE

if TYPE_CHECKING:  # the supervisor reads records, and does without the seconds that torch takes
    from meme_dist.data.index import Manifest

FILE = "run.json"
ROWS = "shards.json"  # beside it: the shards' manifest, from which the model is built when they are elsewhere
FORMAT = 1
FIGURES = ":(exclude)benchmarks/results"  # what git leaves out
PACKAGES = ("torch", "accelerate", "webdataset", "numpy", "safetensors", "triton", "deepspeed")
# What a resumed run may change beside what `train` allows: where files lie (the shards' own hash says whether they are the same).
PLACES = frozenset({"source", "shards"})


@dataclass(frozen=True)
class Record:
    """The content of `run.json`. `keywords` are the recipe's, flat and as JSON values; the rest is provenance."""

    recipe: str
    keywords: Mapping[str, Any]
    shards: str  # the folder that the run reads
    command: tuple[str, ...] = ()
    commit: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    started: str = ""
    recipe_sha256: str = ""  # of the file of a recipe of one's own, without what it imports; empty for the library's and in older runs
    format: int = FORMAT


def describe(recipe: str, keywords: Mapping[str, Any], shards: str, *, world: int, sha256: str) -> Record:
    """A record of this run on this machine; `sha256` is of the file of a recipe of one's own, as it was read (`named.fingerprint`)."""
    machine = {"system": platform.platform(), "processor": processor(), "cores": os.cpu_count(), "processes": world, "devices": _devices()}
    return Record(
        recipe=recipe,
        keywords=dict(keywords),
        shards=shards,
        command=tuple(sys.argv),
        commit=commit(),
        versions={"python": platform.python_version(), "meme-dist": meme_dist.__version__} | _versions(),
        machine=machine,
        started=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        recipe_sha256=sha256,
    )


def check_new(folder: Path) -> None:
    """Raise ValueError where a new run's folder exists already, OSError where it could not be made; nothing is left of the attempt."""
    if folder.exists():
        raise ValueError(taken(folder))
    above = next(path for path in folder.absolute().parents if path.exists())
    with naming(folder), tempfile.TemporaryDirectory(dir=above):
        pass


def create(folder: Path, record: Record, rows: "Manifest") -> None:
    """Make a new run folder. Raises ValueError, and touches nothing, where the folder exists already."""
    try:
        with naming(folder):
            folder.mkdir(parents=True)
    except FileExistsError:
        raise ValueError(taken(folder)) from None
    write_json(folder / FILE, dataclasses.asdict(record))
    write_json(folder / ROWS, rows.described())


def move(folder: Path, rows: "Manifest", keywords: Mapping[str, Any] | None = None) -> None:
    """Note where a run's shards, and with `keywords` the source of its rows, lie now; the rows themselves are the same."""
    old = load(folder)
    places = {"shards": rows.address, **{name: value for name, value in (keywords or {}).items() if name in PLACES}}
    moved = {name: places[name] for name in old.keywords if name in places}
    new = dataclasses.replace(old, shards=rows.address, keywords={**old.keywords, **moved})
    if new != old:
        write_json(folder / FILE, dataclasses.asdict(new))
    if not (folder / ROWS).is_file():  # a run from before it was kept
        write_json(folder / ROWS, rows.described())


def taken(folder: Path) -> str:
    """What to tell someone who would start a run where something is already."""
    return (
        f"{folder}: exists already, and no run is ever overwritten. Continue it with --resume {folder}, or choose another name: --run NAME"
    )


def load(folder: Path) -> Record:
    """The record of an existing run, from its folder or from the path of its run.json. Raises ValueError where there is none."""
    file = folder if folder.name == FILE else folder / FILE
    if not file.is_file():
        raise ValueError(f"{folder}: no run there (no {FILE}){_others(folder)}")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if data.get("format") != FORMAT:
            raise ValueError(
                f"{file}: format {data.get('format')!r}, this version reads {FORMAT}; use the version of meme-dist that wrote it"
            )
        return Record(**data | {"command": tuple(data["command"])})
    except (json.JSONDecodeError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file}: not a record of a run ({error}); restore the file, or train anew with --run NAME") from error


def check_unchanged(folder: Path, old: Record, recipe: str, keywords: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raise ValueError, naming every difference, where a resumed run would train something else than it began with.

    A keyword that the recipe did not have then counts as having had its default. The file of a recipe of one's own has to be as it was.
    """
    if recipe != old.recipe:
        raise ValueError(
            f"{folder}: is a run of recipe {old.recipe!r}, not of {recipe!r}; say --resume without a recipe, or use another --run"
        )
    check_recipe(folder, old)
    free = PLACES | set(FREE) | ({"steps"} if keywords.get("schedule") == "constant" else set())
    began = {**defaults, **old.keywords}
    names = sorted(name for name in {*began, *keywords} - free if began.get(name) != keywords.get(name))
    if names:
        changes = "; ".join(f"--{_flag(name)}: {began.get(name)!r} in the run, {keywords.get(name)!r} now" for name in names)
        raise ValueError(
            f"{folder}: cannot be resumed with other keywords ({changes}). Leave them out to go on as it began, "
            f"or start a new run from its settings: --like {folder} --run NAME"
        )


def check_recipe(folder: Path, old: Record) -> None:
    """Raise ValueError where the file of a run's own recipe was changed since the run began; what that file imports is not covered."""
    if not old.recipe_sha256:
        return
    file = Path(old.recipe.rpartition(":")[0])
    now = hashlib.sha256(file.read_bytes()).hexdigest()
    if now != old.recipe_sha256:
        raise ValueError(
            f"{file}: was changed since {folder} began with it (sha256 {old.recipe_sha256[:12]} then, {now[:12]} now). "
            f"Put the file back as it was, or start a new run from its settings: meme-dist train --like {folder} --run NAME"
        )


def write_json(path: Path, data: Any) -> None:
    """As `durable.replace` does: without run.json nothing could go on from a run's checkpoints."""
    replace(path, json.dumps(data, indent=2, default=str) + "\n")


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _others(folder: Path) -> str:
    parent = folder.parent
    names: Iterable[Path] = parent.glob(f"*/{FILE}") if parent.is_dir() else ()
    found = sorted(path.parent.name for path in names)[:8]
    return f"; runs in {parent}: {', '.join(found)}" if found else "; train one first: meme-dist train digits --run NAME"


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit of the sources, with a mark where they were changed since (figures that a benchmark wrote are no sources); empty outside a
    git checkout."""
    root = Path(meme_dist.__file__).parents[1]
    if not (root / ".git").exists():
        return ""
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        asked = [*git, "status", "--porcelain", "--untracked-files=no", "--", ".", FIGURES]
        status = subprocess.run(asked, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return head.stdout.strip() + ("+changes" if status.stdout.strip() else "") if head.returncode == 0 else ""


def processor() -> str:
    """The processor's name, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _devices() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
