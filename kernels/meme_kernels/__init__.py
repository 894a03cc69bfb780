"""The numerical kernels of meme-dist: one file an operation, Triton on a GPU and plain PyTorch references on any device."""

from meme_kernels._op import backend

__version__ = "0.1.0"
__all__ = ["backend"]
