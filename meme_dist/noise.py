"""Counter-based noise: every random number of a row is a pure function of (seed, draw, purpose, sample, coordinate).

The same row gets the same noise on any device, on any rank, in any micro batch and after any resume; there is no state to save.
The generator and the kernels' own copy of it are `meme_kernels.philox`.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from meme_kernels import philox


class Noise(NamedTuple):
    """The noise of B rows. `draw[b]` numbers the row's visit (step * batch + position); `purpose` separates independent uses."""

    seed: int
    draw: Int[Tensor, " B"]

    def uniform(self, purpose: str, num: int, size: int) -> Float[Tensor, "{num} B {size}"]:
        """Uniform on (0, 1], on a grid of 2^-24 or finer; 1 itself comes once in 2^24 draws."""
        return philox.uniform(self.draw, philox.key(self.seed, purpose), num, size)

    def normal(self, purpose: str, num: int, size: int) -> Float[Tensor, "{num} B {size}"]:
        """Standard normal, by Box and Muller from consecutive pairs; |values| < 5.9 since u >= 2^-25."""
        return philox.normal(self.draw, philox.key(self.seed, purpose), num, size)

    def laplace(self, purpose: str, num: int, size: int) -> Float[Tensor, "{num} B {size}"]:
        """Standard Laplace (scale 1, variance 2), by the inverse of its distribution function; |values| < 16.7."""
        return philox.laplace(self.draw, philox.key(self.seed, purpose), num, size)

    def keys(self, purposes: Sequence[str]) -> Int[Tensor, "N 2"]:
        """The key words of each purpose, on the device of `draw`: what a kernel needs to make the same numbers itself."""
        return _keys(self.seed, tuple(purposes), self.draw.device)


@functools.cache  # one copy to the device, not one a step; and a recorded step reads it where it lies
def _keys(seed: int, purposes: tuple[str, ...], device: torch.device) -> Tensor:
    return torch.tensor([philox.key(seed, purpose) for purpose in purposes], dtype=torch.int64, device=device).view(-1, 2)
