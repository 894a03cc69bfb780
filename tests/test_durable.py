"""What is renamed into its place is on the disk before: a power cut leaves the old file or the new one."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate import Accelerator

from meme_dist import record
from meme_dist.train.log import FILE, Log


def rewind(path: Path) -> None:
    path.write_text('{"step": 1}\n{"step": 2}\n')
    Log(path.parent, Accelerator(cpu=True)).rewind(1)


@pytest.mark.parametrize(
    ("write", "name", "expected"),
    [(lambda path: record.write_json(path, {"step": 1}), "run.json", {"step": 1}), (rewind, FILE, {"step": 1})],
)
def test_content_is_on_the_disk_before_it_has_its_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None], name: str, expected: dict[str, int]
) -> None:
    done, fsync, replace = [], os.fsync, os.replace

    def synced(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        done.append("folder" if path.is_dir() else f"{path.stat().st_size > 0} content")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("name"), replace(*names)))
    monkeypatch.setattr(Path, "replace", lambda path, target: os.replace(path, target))
    write(tmp_path / name)
    assert done == ["True content", "name", "folder"]
    assert json.loads((tmp_path / name).read_text()) == expected and [path.name for path in tmp_path.iterdir()] == [name]
