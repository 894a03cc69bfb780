"""What is asked of a distance table too large to hold: each row's nearest others, and a histogram. Forward only.

The table goes by in bands of rows, at most 2^24 entries at a time (64 MiB in float32; one row where it is longer), so memory is that band,
its sort or its counts, and the answer: (S + T) E + 2^24 numbers and never S T. Every band is made by pairwise_w2.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from meme_kernels.pairwise_w2 import pairwise_w2

ENTRIES = 2**24


def nearest(mean_a: Tensor, scale_a: Tensor, mean_b: Tensor, scale_b: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """The `num` smallest squared distances of each a [S, D] to all b [T, D], ascending, and which b: [S, num] and int64 [S, num].

    Of equal distances the lower index comes first. Raises ValueError unless 0 <= num <= T.
    """
    if not 0 <= num <= len(mean_b):
        raise ValueError(f"nearest: expected num between 0 and T = {len(mean_b)}, got {num}")
    found = [torch.sort(band, dim=-1, stable=True) for band in _bands(mean_a, scale_a, mean_b, scale_b)]
    return torch.cat([x.values[:, :num] for x in found]), torch.cat([x.indices[:, :num] for x in found])


def histogram(mean_a: Tensor, scale_a: Tensor, mean_b: Tensor, scale_b: Tensor, edges: Tensor) -> Tensor:
    """How many of the S T squared distances fall into each bin [edges_i, edges_i+1), the last one closed: int64 [len(edges) - 1].

    What lies outside is not counted. Raises ValueError unless edges are at least two, one-dimensional.
    """
    if edges.dim() != 1 or len(edges) < 2:
        raise ValueError(f"histogram: expected edges [bins + 1] with at least one bin, got {tuple(edges.shape)}")
    counts = torch.zeros(len(edges) + 1, dtype=torch.int64, device=edges.device)
    for band in _bands(mean_a, scale_a, mean_b, scale_b):
        inner = edges.to(band.dtype)
        place = torch.searchsorted(inner, band.flatten(), right=True)
        place = torch.where(band.flatten() == inner[-1], len(edges) - 1, place)
        counts += torch.bincount(place, minlength=len(edges) + 1)
    return counts[1:-1]


@torch.no_grad()
def _bands(mean_a: Tensor, scale_a: Tensor, mean_b: Tensor, scale_b: Tensor) -> Iterator[Tensor]:
    """The table, some rows at a time."""
    rows = max(1, ENTRIES // max(len(mean_b), 1))
    for mean, scale in zip(mean_a.split(rows), scale_a.split(rows), strict=True):
        yield pairwise_w2(mean, scale, mean_b, scale_b)
