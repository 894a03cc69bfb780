"""Grids of runs and what they say together: `meme-dist compare` and `meme-dist ablate`."""
