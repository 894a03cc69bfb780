"""The random state of a process (python, numpy, torch, its CUDA device) as tensors, to be gathered and stored without pickle."""

import random

import numpy as np
import torch
from torch import Tensor


def seed_everything(*key: int) -> None:
    """Seed this process from a few non-negative integers, such as (seed, rank): different keys give independent states."""
    words = np.random.SeedSequence(key).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]) << 32 | int(words[3]))


def capture() -> dict[str, Tensor]:
    """The state now; each tensor has the same shape on every rank."""
    _, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.tensor([*map(int, keys), position, has_gauss], dtype=torch.int64),
        "gauss": torch.tensor([gauss is not None, gauss or 0.0, cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def restore(state: dict[str, Tensor]) -> None:
    """Continue from a captured state. A CUDA state is ignored where there is no device."""
    has_gauss, gauss, cached = state["gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), gauss if has_gauss else None))
    *keys, position, has_cached = state["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_cached, cached))
    torch.set_rng_state(state["torch"].cpu().clone())  # of its own storage: torch 2.13 reads a view from the storage's start, and crashes
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu().clone())
