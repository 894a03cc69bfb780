"""The numerical kernels of meme-dist: one file an operation, Triton on a GPU and plain PyTorch references on any device."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meme_kernels._op import backend

__version__ = "0.1.0"
__all__ = ["backend"]


def __getattr__(name: str) -> Any:
    """`backend`, on demand: importing the package loads neither torch nor Triton."""
    if name == "backend":
        from meme_kernels._op import backend

        return backend
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
