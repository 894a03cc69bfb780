"""Files that survive a power cut: what is renamed into its place is on the disk before it."""

import os
from pathlib import Path

from meme_dist.data.files import sync

UNFINISHED = ".tmp"  # what a process that is killed leaves behind ends with it


def replace(path: Path, text: str) -> None:
    """Write a file beside its place and move it there: a reader, also after a power cut, sees the old file or the new one, never half."""
    partial = path.with_name(f"{path.name}{UNFINISHED}")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync(path.parent)
