"""Cases along one axis: cost against N, K and M, at the sizes that the claims about CPUs are made for."""

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from meme_kernels._op import Case

D = 64


def cases(op: str, device: torch.device) -> Iterator[Case]:
    """The op's cases, none for an op without a sweep. A label begins with the axis that it lies on."""
    if op == "cross_log_prob":
        points = [("N", n, 10, 256) for n in (2, 5, 10)] + [("K", 5, k, 256) for k in (2, 5, 20)]
        yield from (_cross(*point, device) for point in points)
    if op == "mixture_log_prob":
        yield from (_mixture(256, m, device) for m in (500, 1500, 5000))
    if op in ("product_of_experts", "product_divergence"):  # the latter is what MoPoE takes of every batch
        # The batches that a peer library's loop over subsets was measured with: for N = 10 and 16 rows it takes seconds.
        yield from (_subsets(n, b, device) for n, b in ((5, 64), (8, 16), (10, 16)))


def _cross(axis: str, n: int, k: int, b: int, device: torch.device) -> Case:
    mean, scale = _experts((n, b, D), device)
    observed = torch.ones(n, b, dtype=torch.bool, device=device)
    noise = torch.randn(n, k, b, D, device=device)
    return Case(f"{axis}: N={n} K={k} B={b} D={D}", (mean, scale, observed, noise), {"family": "normal", "path_gradient": True})


def _mixture(rows: int, m: int, device: torch.device) -> Case:
    mean, scale = _experts((m, D), device)
    z = torch.randn(rows, D, device=device).requires_grad_()
    return Case(f"M: rows={rows} M={m} D={D}", (z, mean, scale), {"family": "normal"})


def _subsets(n: int, b: int, device: torch.device) -> Case:
    """All 2^N - 1 products of some of the experts, as in MoPoE."""
    mean, scale = _experts((n, b, D), device)
    mask = torch.tensor([chosen for chosen in product((False, True), repeat=n) if any(chosen)], device=device)
    return Case(f"N: N={n} S={len(mask)} B={b} D={D}", (mean, scale, mask), {"standard": False})


def _experts(shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.randn(shape, device=device).requires_grad_(), (torch.rand(shape, device=device) + 0.5).requires_grad_()
