"""The end of a program that may have trained with other ranks."""

import errno
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

FAILED, MISTAKE = 1, 2  # exit statuses: something went wrong, may work again; cannot do what was asked, and never will
WRITER = "checkpoint"  # the name of a thread that is to end before its process does
PATIENCE = 45.0  # seconds for that; a supervisor gives a launch 60 to end once a rank has failed
MISTAKES = (ValueError, FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError, IsADirectoryError)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def status_of(error: Exception) -> int:
    """The exit status for an error that was told: 2 where nothing but a person's doing will change it (a wrong input, a full disk).

    1 for every other one, such as an input/output error or a network file system that was gone for a moment: a supervisor tries again.
    """
    mistake = isinstance(error, MISTAKES) or isinstance(error, OSError) and error.errno in FULL
    return MISTAKE if mistake else FAILED


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An error of the file system within it names this path, the one that was asked for, not what was to be made on the way to it."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, f"{error.strerror}: cannot write {path}; choose another place") from error


def leave(status: int) -> NoReturn:
    """End this process with that exit status; with other ranks, at once and without Python's own shutdown.

    DDP keeps the threads of gloo alive past `destroy_process_group` (torch 2.13: with a bare group they end, after one backward pass of
    DDP they do not), and a thread that asks for the interpreter while it shuts down can abort the process after all its work was done:
    "terminate called without an active exception", seen once in some hundred launches. What a program writes is closed before it returns,
    but for a checkpoint that is being written while an error ends the training: it is waited for, within bounds.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        sys.exit(status)
    deadline = time.monotonic() + PATIENCE
    for thread in threading.enumerate():
        if thread.name == WRITER:
            thread.join(max(0.0, deadline - time.monotonic()))
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
