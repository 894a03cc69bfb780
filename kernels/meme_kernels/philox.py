"""Counter-based noise: each number is a pure function of (key, draw, sample, coordinate), the same in plain PyTorch and within a kernel.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") makes four 32-bit words of a counter and a key:

    counter = (sample * ceil(D / 4) + d // 4, 0, low half of draw, high half of draw),  key = (low half of seed, crc32(purpose) ^ high half)
    uniform = ((word >> 8) + 0.5) 2^-24, rounded to float32
    normal  = sqrt(-2 log u) cos(2 pi v) and sqrt(-2 log u) sin(2 pi v) for consecutive uniforms u, v (Box and Muller)
    laplace = -sign(u - 1/2) log(1 - 2 |u - 1/2|)

The device functions take four words a call, and polynomials of their own for log, sin and cos: the libraries' cost more, take a slow path
through local memory for large angles, or lose the digits of log u near u = 1, where the radius is small.

On a GPU numbers come from one launch, which reads 8 B bytes and writes 4 num B size; in plain PyTorch they take 130 small ones (ten rounds
of twelve), which were half of all launches of a training step. Uniforms are the reference's to the bit, Normals to 1e-6, Laplaces to two
roundings.
"""

import math
import zlib

import torch
from torch import Tensor

from meme_kernels._launch import block, cdiv
from meme_kernels._op import opaque, run, uses_triton
from meme_kernels._triton import jit, tl

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LEAST = 2.0**-24  # the smallest tail probability of a Laplace draw: u is rounded to 1 once in 2^24 draws, which would be an infinity

_TILE = 256  # Philox calls a program: 1024 numbers, 8 a thread

Key = tuple[int, int] | Tensor


def key(seed: int, purpose: str) -> tuple[int, int]:
    """The two key words of one use of a seed; `purpose` separates independent uses."""
    return seed & _WORD, zlib.crc32(purpose.encode()) ^ ((seed >> 32) & _WORD)


def uniform(draw: Tensor, key: Key, num: int, size: int) -> Tensor:
    """draw int64 [B], key two words (numbers, or int64 [2]) -> float32 [num, B, size] on (0, 1], on a grid of 2^-24 or finer."""
    return _made(draw, key, num, size, "uniform")


def normal(draw: Tensor, key: Key, num: int, size: int) -> Tensor:
    """draw int64 [B], key two words -> standard Normal, float32 [num, B, size]; |values| < 5.9 since u >= 2^-25."""
    return _made(draw, key, num, size, "normal")


def laplace(draw: Tensor, key: Key, num: int, size: int) -> Tensor:
    """draw int64 [B], key two words -> standard Laplace (scale 1, variance 2), float32 [num, B, size]; |values| < 16.7."""
    return _made(draw, key, num, size, "laplace")


def reference(draw: Tensor, key: Key, num: int, size: int, kind: str) -> Tensor:
    """The specification of all three, in plain PyTorch."""
    if kind == "normal":
        pairs = reference(draw, key, num, size + size % 2, "uniform").unflatten(-1, (-1, 2))
        radius, angle = (-2 * pairs[..., 0].log()).sqrt(), 2 * math.pi * pairs[..., 1]
        return torch.stack([radius * angle.cos(), radius * angle.sin()], -1).flatten(-2)[..., :size]
    u = ((_bits(draw, key, num, size) >> 8).float() + 0.5) * 2.0**-24
    if kind == "uniform":
        return u
    centred = u - 0.5
    return -centred.sign() * torch.log1p(-2 * centred.abs().clamp(max=(1 - _LEAST) / 2))


def _made(draw: Tensor, key: Key, num: int, size: int, kind: str) -> Tensor:
    if isinstance(key, Tensor) or not uses_triton(draw):
        return reference(draw, key, num, size, kind)
    first, second = (word - (1 << 32) if word >> 31 else word for word in key)  # one integer type, whatever the word
    return _drawn(draw, first, second, num, size, kind)


def _fake_drawn(draw: Tensor, first: int, second: int, num: int, size: int, kind: str) -> Tensor:
    return draw.new_empty(num, draw.shape[0], size, dtype=torch.float32)


@opaque(_fake_drawn)
def _drawn(draw: Tensor, first: int, second: int, num: int, size: int, kind: str) -> Tensor:
    out = _fake_drawn(draw, first, second, num, size, kind)
    calls = block(cdiv(size, 4), most=_TILE)
    rows = _TILE // calls
    grid = (cdiv(num * len(draw), rows) * cdiv(size, 4 * calls),)
    run(
        _noise_kernel,
        grid,
        draw.contiguous(),
        out,
        first,
        second,
        num * len(draw),
        len(draw),
        size,
        R=rows,
        Q=calls,
        KIND=kind,
        num_warps=4,
    )
    return out


def _bits(draw: Tensor, key: Key, num: int, size: int) -> Tensor:
    blocks = -(-size // 4)  # one Philox call makes four words
    count = torch.arange(num * blocks, device=draw.device).view(num, 1, blocks)
    row = draw.view(1, -1, 1)
    counter = [x.expand(num, len(draw), blocks) for x in (count, torch.zeros_like(count), row & _WORD, (row >> 32) & _WORD)]
    return torch.stack(philox(counter, key), -1).flatten(-2)[..., :size]


def philox(counter: list[Tensor], key: Key) -> list[Tensor]:
    """Four words of each counter of four words, as int64 tensors in [0, 2^32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key[0], key[1]
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


# ---- device functions ------------------------------------------------------------------------------------------------------------


@jit(do_not_specialize=["first_key", "second_key"])
def _noise_kernel(
    draw_ptr, out_ptr, first_key, second_key, rows, B, D,
    R: tl.constexpr, Q: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """A tile of R of the rows (sample, row of the batch) and 4 Q of their D numbers."""
    tiles = tl.cdiv(D, 4 * Q)
    program = tl.program_id(0).to(tl.int64)
    row = ((program // tiles) * R + tl.arange(0, R))[:, None]
    call = (program % tiles) * Q + tl.arange(0, Q)[None, :]
    draw = tl.load(draw_ptr + row % B, mask=row < rows, other=0)
    count = (row // B) * tl.cdiv(D, 4) + call
    if KIND == "uniform":
        a, b, c, e = _uniforms(first_key, second_key, count, draw)
        eps = tl.interleave(tl.interleave(a, c), tl.interleave(b, e))
    else:
        eps = device_noise(first_key, second_key, count, draw, KIND == "laplace")
    d = (program % tiles) * (4 * Q) + tl.arange(0, 4 * Q)[None, :]
    tl.store(out_ptr + row * D + d, eps, mask=(row < rows) & (d < D))


@jit
def device_noise(first_key, second_key, count, draw, LAPLACE: tl.constexpr):
    """float32 noise [..., 4 Q] of the Philox calls `count` [..., Q] for the rows `draw` int64 [..., 1]; keys integer scalars."""
    a, b, c, d = _uniforms(first_key, second_key, count, draw)
    if LAPLACE:
        a, b, c, d = _laplace(a), _laplace(b), _laplace(c), _laplace(d)
    else:
        a, b = _box_muller(a, b)
        c, d = _box_muller(c, d)
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@jit
def _uniforms(first_key, second_key, count, draw):
    """The four uniforms of each Philox call."""
    low, high = draw.to(tl.uint32), (draw >> 32).to(tl.uint32)
    a, b, c, d = tl.philox_impl(count.to(tl.uint32), low * 0, low, high, first_key.to(tl.uint32), second_key.to(tl.uint32))  # type: ignore[misc]
    return device_uniform(a), device_uniform(b), device_uniform(c), device_uniform(d)


@jit
def device_uniform(word):
    """The uniform of a uint32 word. The half is added in float32, as the reference does, ties to even."""
    return ((word >> 8).to(tl.int32).to(tl.float32) + 0.5) * 5.9604644775390625e-08


@jit
def _box_muller(u, v):
    radius = tl.sqrt(-2.0 * log(u))
    sine, cosine = _sine_cosine(v)
    return radius * cosine, radius * sine


@jit
def _laplace(u):
    """Both tails are exact: 1 - 2 |u - 1/2| is 2 u below the median and 2 - 2 u above."""
    tail = tl.where(u < 0.5, u, 1.0 - u) * 2.0
    size = log(tl.maximum(tail, 5.9604644775390625e-08))
    return tl.where(u < 0.5, size, -size)


@jit
def log(x):
    """log x for normal x > 0, relative error 2e-7 near 1: x = 2^e (1 + f), f in [-1/3, 1/3], log (1 + f) = f - f^2 Q(f), Q minimax."""
    bits = x.to(tl.int32, bitcast=True)
    shift = (bits - 0x3F2AAAAB) & -0x800000
    f = (bits - shift).to(tl.float32, bitcast=True) - 1.0
    q = 0.15388540923595428 + f * -0.14026351273059845
    q = -0.13995808362960815 + f * q
    q = 0.1641596108675003 + f * q
    q = -0.20011168718338013 + f * q
    q = 0.2500782012939453 + f * q
    q = -0.33333197236061096 + f * q
    q = 0.49999937415122986 + f * q
    return shift.to(tl.float32) * 8.262958294867817e-08 + (f - f * f * q)  # 2^-23 log 2: the exponent is still shifted


@jit
def _sine_cosine(v):
    """sin and cos of 2 pi v, v in (0, 1]: the angle is rounded to float32 as in the reference, then brought to [-pi/4, pi/4]."""
    turned = v * 4.0 + 12582912.0  # 1.5 * 2^23: the low bits now hold 4 v, rounded
    quarter = turned.to(tl.int32, bitcast=True)
    turns = turned - 12582912.0
    # pi / 2 in two parts, the first product exact. Written as fma, or the compiler may fuse the other product and not round the angle.
    t = tl.fma(turns, -4.838267923332751e-4, tl.fma(turns, -1.5703125, v * 6.2831854820251465))
    z = t * t
    sine = t + t * z * (-0.16666650772094727 + z * (0.008331977762281895 + z * -0.00019495567539706826))
    cosine = 1.0 + z * (-0.5 + z * (0.04166664555668831 + z * (-0.0013887366512790322 + z * 2.4438379114144482e-05)))
    odd = (quarter & 1) != 0
    sine, cosine = tl.where(odd, cosine, sine), tl.where(odd, sine, cosine)
    return _signed(sine, quarter & 2), _signed(cosine, (quarter + 1) & 2)


@jit
def _signed(x, two):
    """-x where `two` is 2, x where it is 0."""
    return (x.to(tl.int32, bitcast=True) ^ (two << 30)).to(tl.float32, bitcast=True)
