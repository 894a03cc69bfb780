"""Engines: how one optimiser step is spread over ranks. One file each; the trainer above them does not know which one it drives."""
