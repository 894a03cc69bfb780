"""The numerical kernels of meme-dist: one file an operation, plain PyTorch references on any device."""

__version__ = "0.1.0"
