"""Patience with sources that fail for a moment: few tries, longer and longer waits, then an error that tells the whole story."""

import time
import zlib
from collections.abc import Callable
from errno import EACCES, EDQUOT, EFBIG, ENOSPC, EROFS
from typing import TypeVar

TRIES = 6
FIRST_WAIT = 0.5  # seconds; doubled with each try, so that all waits together stay below 16 s
T = TypeVar("T")

# What no second try can mend. Everything else that a driver raises is taken for a moment's weakness: drivers have errors of their own.
_LASTING = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    ImportError,
    NotImplementedError,
    ValueError,
    TypeError,
    AttributeError,
)
_LASTING_NUMBERS = (ENOSPC, EDQUOT, EFBIG, EACCES, EROFS)
_LASTING_STATUS = (400, 401, 403, 404, 405, 410)  # of HTTP, as drivers attach it to their errors


def retried(what: str, call: Callable[[], T], *, tries: int = TRIES) -> T:
    """The result of `call`, tried again after OSErrors, timeouts and errors of a driver's own.

    The waits are .5, 1, 2, 4 and 8 s, each shortened by up to a half: by how much follows from `what` and the try alone, so that sources
    spread out and a run stays repeatable. Errors that last (missing, forbidden, no room) are raised at once: OSError, ValueError and
    ImportError as they are, a driver's own as OSError. Raises OSError, naming `what`, the tries and the last cause, where every try failed.
    """
    for number in range(1, tries + 1):
        try:
            return call()
        except Exception as error:
            kind = type(error).__name__
            if lasting(error):
                if isinstance(error, OSError | ValueError | ImportError):
                    raise
                raise OSError(f"{what}: {kind}: {error}; see that it is there and may be read, then resume") from error
            if number == tries:
                raise OSError(
                    f"{what}: tried {tries} times, the last time: {kind}: {error}; see that it can be reached, then resume"
                ) from error
        time.sleep(wait(what, number))
    raise ValueError(f"tries: expected 1 or more, got {tries}")


def wait(what: str, number: int) -> float:
    """Seconds to wait after the `number`-th failure."""
    share = zlib.crc32(f"{what} {number}".encode()) / 2**32
    return FIRST_WAIT * 2 ** (number - 1) * (1 - share / 2)


def lasting(error: Exception) -> bool:
    """Would the next try end in the same way?"""
    number, status = getattr(error, "errno", None), getattr(error, "status", None)
    return isinstance(error, _LASTING) or number in _LASTING_NUMBERS or status in _LASTING_STATUS
