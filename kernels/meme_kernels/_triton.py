"""Triton where it is installed. Where it is not, names that let the kernel files be imported: nothing is launched then."""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import triton
    import triton.language as tl

    ABSENT: str | None = None
    jit: Any = None  # untyped on purpose: a kernel's body is Triton's language, which only looks like Python
else:
    try:
        import triton
        import triton.language as tl

        ABSENT, jit = None, triton.jit
    except ImportError as _error:  # no wheel for this platform, or a CPU build of PyTorch, which does not bring it

        class _Language:
            """Stands in for triton.language in annotations and module constants."""

            float32 = float64 = None

            @staticmethod
            def constexpr(value):
                return value

        def _undecorated(function=None, **settings):
            return function or _undecorated

        ABSENT, triton, tl, jit = str(_error), None, _Language, _undecorated

# Decided when the kernels are decorated, so once, at import.
INTERPRETED = ABSENT is None and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")

__all__ = ["ABSENT", "INTERPRETED", "jit", "tl", "triton"]
