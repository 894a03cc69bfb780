"""meme-dist: multimodal variational autoencoders by mutual supervision, trained at scale."""

__version__ = "0.1.0"
