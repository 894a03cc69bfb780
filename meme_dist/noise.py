"""Counter-based noise: every random number of a row is a pure function of (seed, draw, purpose, sample, coordinate).

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") in integer tensor operations, so that the same row gets
the same noise on any device, on any rank, in any micro batch and after any resume. There is no state to save.
"""

import math
import zlib
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


class Noise(NamedTuple):
    """The noise of B rows. `draw[b]` numbers the row's visit (step * batch + position); `purpose` separates independent uses."""

    seed: int
    draw: Int[Tensor, " B"]

    def uniform(self, purpose: str, num: int, size: int) -> Float[Tensor, "{num} B {size}"]:
        """Uniform on the open interval (0, 1), on a grid of 2^-24."""
        return ((self._bits(purpose, num, size) >> 8).float() + 0.5) * 2.0**-24

    def normal(self, purpose: str, num: int, size: int) -> Float[Tensor, "{num} B {size}"]:
        """Standard normal, by Box and Muller from consecutive pairs; |values| < 5.9 since u > 2^-25."""
        pairs = self.uniform(purpose, num, size + size % 2).unflatten(-1, (-1, 2))
        radius, angle = (-2 * pairs[..., 0].log()).sqrt(), 2 * math.pi * pairs[..., 1]
        return torch.stack([radius * angle.cos(), radius * angle.sin()], -1).flatten(-2)[..., :size]

    def laplace(self, purpose: str, num: int, size: int) -> Float[Tensor, "{num} B {size}"]:
        """Standard Laplace (scale 1, variance 2), by the inverse of its distribution function."""
        centred = self.uniform(purpose, num, size) - 0.5
        return -centred.sign() * torch.log1p(-2 * centred.abs())

    def _bits(self, purpose: str, num: int, size: int) -> Int[Tensor, "{num} B {size}"]:
        blocks = -(-size // 4)  # one Philox call makes four words
        count = torch.arange(num * blocks, device=self.draw.device).view(num, 1, blocks)
        draw = self.draw.view(1, -1, 1)
        counter = [x.expand(num, len(self.draw), blocks) for x in (count, torch.zeros_like(count), draw & _WORD, (draw >> 32) & _WORD)]
        key = (self.seed & _WORD, zlib.crc32(purpose.encode()) ^ ((self.seed >> 32) & _WORD))
        return torch.stack(_philox(counter, key), -1).flatten(-2)[..., :size]


def _philox(counter: list[Tensor], key: tuple[int, int]) -> list[Tensor]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return [c0, c1, c2, c3]


def _multiply(word: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product; an int64 product wraps, its bits are still right."""
    product = word * (constant - (1 << 64) if constant >> 63 else constant)
    return (product >> 32) & _WORD, product & _WORD
