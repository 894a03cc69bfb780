"""Triton where it is installed. Where it is not, names that let the kernel files be imported: nothing is launched then."""

import os
from typing import Any

try:
    import triton
    import triton.language as tl
    from triton import jit

    ABSENT = None
except ImportError as _error:  # no wheel for this platform, or a CPU build of PyTorch, which does not bring it
    ABSENT = str(_error)
    triton: Any = None

    class tl:  # noqa: N801
        """Stands in for triton.language in annotations and module constants."""

        constexpr = staticmethod(lambda value: value)
        float32 = float64 = None

    def jit(function: Any) -> Any:
        """Leave a kernel as it is; it is never launched."""
        return function


# Decided when the kernels are decorated, so once, at import.
INTERPRETED = ABSENT is None and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")

__all__ = ["ABSENT", "INTERPRETED", "jit", "tl", "triton"]
