"""Samples of N diagonal posteriors, and every sample under every posterior:

    z[i, k, b]    = mean[i, b] + scale[i, b] eps[i, k, b]
    Q[i, j, k, b] = log q_j(z[i, k, b]) = level_j - sum_d f((z - mean_j) / scale_j)
    Normal:  f(u) = u^2 / 2, level_j = - sum_d log scale_j - (D / 2) log 2 pi
    Laplace: f(u) = |u|,     level_j = - sum_d log scale_j - D log 2

z is 0 where row b does not hold i, Q where it does not hold both i and j; what such entries contain (NaN too) reaches neither value nor
gradient. With f' the score, u_j the standardised z[i, k], h the gradient of z and g that of Q:

    slope   = h - sum_j g_j f'(u_j) / scale_j            the gradient that arrives at z[i, k]
    mean_i  gets sum_k slope,  scale_i gets sum_k slope eps
    mean_j  gets sum_ik g_j f'(u_j) / scale_j,  scale_j gets sum_ik g_j (f'(u_j) u_j - 1) / scale_j;  neither with path_gradient

`path_gradient=True` is sticking the landing (Roeder, Wu, Duvenaud 2017): the density's parameters are held fixed.

Forward reads 2 N B D parameters (and N K B D of noise where it is given), writes N K B D and N^2 K B numbers; about 4 N^2 K B D flops and
40 instructions for each number of noise made. Backward reads those, the noise again made anew, writes 2 N B D; 8 N^2 K B D flops.
Neither a tensor [N, N, K, B, D] nor, with a Counter, one of noise [N, K, B, D] is ever held.
No atomics; every sum is taken in one order that depends on the shapes alone: bitwise repeatable.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from meme_kernels import philox
from meme_kernels._cross_log_prob_kernels import backward_kernel, forward_kernel
from meme_kernels._launch import block, cdiv, power_of_two
from meme_kernels._op import Case, Cost, FusedOp, Size, nbytes, opaque, run, sums_dtype, through_reference, uses_triton
from meme_kernels._triton import tl

Family = Literal["normal", "laplace"]


class Counter(NamedTuple):
    """Noise by number (see `philox`): draw int64 [B] numbers the rows, key int64 [N, 2] holds the two key words of each posterior."""

    draw: Tensor
    key: Tensor
    samples: int


Noise = Tensor | Counter


def cross_log_prob(
    mean: Tensor, scale: Tensor, observed: Tensor, noise: Noise, *, family: Family = "normal", path_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """mean, scale [N, B, D], observed bool [N, B], noise [N, K, B, D] or a Counter -> z [N, K, B, D] and Q [N (source), N (density), K, B].

    Both are float32 (float64 for float64). No gradient flows to noise. Raises ValueError for other shapes or families.
    """
    _check(mean, scale, observed, noise, family)
    given, draw, key, samples = _flat(noise)
    if not uses_triton(mean, scale, observed, given, draw, key):
        return reference(mean, scale, observed, noise, family=family, path_gradient=path_gradient)
    return _Cross.apply(mean, scale, observed, given, draw, key, samples, family, path_gradient)


def reference(
    mean: Tensor, scale: Tensor, observed: Tensor, noise: Noise, *, family: Family = "normal", path_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """The specification, on any device and in any floating type; posterior by posterior."""
    z, mean, scale = _samples(mean, scale, observed, noise, family)
    if path_gradient:
        mean, scale = mean.detach(), scale.detach()
    both = (observed[:, None] & observed).unsqueeze(2)
    columns = [torch.where(both[:, j], _DENSITIES[family](z, m, s), 0.0) for j, (m, s) in enumerate(zip(mean, scale, strict=True))]
    return z, torch.stack(columns, 1)


def naive(
    mean: Tensor, scale: Tensor, observed: Tensor, noise: Noise, *, family: Family = "normal", path_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """As commonly written: torch.distributions on a tensor [N, N, K, B, D]."""
    z, mean, scale = _samples(mean, scale, observed, noise, family)
    if path_gradient:
        mean, scale = mean.detach(), scale.detach()
    density = {"normal": torch.distributions.Normal, "laplace": torch.distributions.Laplace}[family]
    both = (observed[:, None] & observed).unsqueeze(2)
    return z, density(mean[:, None], scale[:, None], validate_args=False).log_prob(z.unsqueeze(1)).sum(-1) * both


def table(z: Tensor, mean: Tensor, scale: Tensor, family: Family) -> Tensor:
    """Every given z [N, K, B, D] under every posterior [N, B, D] -> [N (source), N (density), K, B], in plain PyTorch."""
    return torch.stack([_DENSITIES[family](z, m, s) for m, s in zip(mean, scale, strict=True)], 1)


def normal(z: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """z [..., D], mean and scale broadcast against it -> [...]."""
    return -((z - mean) / scale).square().sum(-1) / 2 - scale.log().sum(-1) - 0.5 * math.log(2 * math.pi) * z.shape[-1]


def laplace(z: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """z [..., D], mean and scale broadcast against it -> [...]."""
    return -((z - mean) / scale).abs().sum(-1) - scale.log().sum(-1) - math.log(2) * z.shape[-1]


_DENSITIES = {"normal": normal, "laplace": laplace}
_DRAWS = {"normal": philox.normal, "laplace": philox.laplace}


def _samples(mean: Tensor, scale: Tensor, observed: Tensor, noise: Noise, family: Family) -> tuple[Tensor, Tensor, Tensor]:
    """z, and mean and scale of a standard density where nothing is observed: selected before any arithmetic."""
    wide, there = sums_dtype(mean, scale), observed.unsqueeze(-1)
    mean, scale = torch.where(there, mean.to(wide), 0.0), torch.where(there, scale.to(wide), 1.0)
    eps = _drawn(noise.draw, noise.key, noise.samples, mean, family) if isinstance(noise, Counter) else noise.detach()
    return mean.unsqueeze(1) + scale.unsqueeze(1) * torch.where(there.unsqueeze(1), eps.to(wide), 0.0), mean, scale


def _drawn(draw: Tensor, key: Tensor, samples: int, mean: Tensor, family: str) -> Tensor:
    """The noise [N, K, B, D] that a Counter stands for."""
    return torch.stack([_DRAWS[family](draw, words, samples, mean.shape[-1]) for words in key])


def _flat(noise: Noise) -> tuple[Tensor | None, Tensor | None, Tensor | None, int]:
    return (None, noise.draw, noise.key, noise.samples) if isinstance(noise, Counter) else (noise, None, None, noise.shape[1])


def _check(mean: Tensor, scale: Tensor, observed: Tensor, noise: Noise, family: str) -> None:
    if family not in _DENSITIES:
        raise ValueError(f"cross_log_prob: expected family 'normal' or 'laplace', got {family!r}")
    if mean.dim() != 3 or not len(mean) or scale.shape != mean.shape or observed.shape != mean.shape[:2] or observed.dtype != torch.bool:
        got = f"{tuple(mean.shape)}, {tuple(scale.shape)} and {observed.dtype} {tuple(observed.shape)}"
        raise ValueError(f"cross_log_prob: expected mean and scale [N, B, D] with N >= 1 and bool observed [N, B], got {got}")
    n, b, d = mean.shape
    if isinstance(noise, Counter):
        if noise.draw.shape != (b,) or noise.key.shape != (n, 2) or {noise.draw.dtype, noise.key.dtype} != {torch.int64}:
            got = f"{noise.draw.dtype} {tuple(noise.draw.shape)} and {noise.key.dtype} {tuple(noise.key.shape)}"
            raise ValueError(f"cross_log_prob: expected int64 draw [{b}] and key [{n}, 2], got {got}")
    elif noise.dim() != 4 or (noise.shape[0], *noise.shape[2:]) != (n, b, d):
        raise ValueError(f"cross_log_prob: expected noise [{n}, K, {b}, {d}], got {tuple(noise.shape)}")


# ---- launch and binding ----------------------------------------------------------------------------------------------------------

_PLACES = 128  # (row, coordinate) pairs a warp: 4 coordinates a thread, which is one Philox call
_FORWARD, _BACKWARD = 32, 16  # entries of a tile [N, rows, D] a thread holds: two tiles forward, four backward
_ENOUGH = 1024  # warps that fill a GPU; below it the samples of a row are spread over several programs


class _Tiling(NamedTuple):
    """Block sizes of N, B and D, chunks of D, parts of the samples, and warps of a program."""

    bn: int
    bb: int
    bd: int
    chunks: int
    parts: int
    warps: int


def _tiling(n: int, k: int, b: int, d: int, *, held: int, warps: int) -> _Tiling:
    """All N in registers, `held` entries a thread; a program takes up to `warps` warps side by side along D."""
    bn = power_of_two(n)
    places = max(min(_PLACES, 32 * held // bn), 4)
    bd = block(d, least=4, most=warps * places)
    bb = block(b, most=max(places // bd, 1))
    chunks, warps = max(cdiv(d, bd), 1), max(bd // places, 1)
    parts = _ENOUGH // max(cdiv(b, bb) * chunks * warps, 1)
    return _Tiling(bn, bb, bd, chunks, max(min(parts, k // 2), 1), warps)


def _constants(tiling: _Tiling, family: str, wide: torch.dtype) -> dict[str, Any]:
    accumulator = tl.float64 if wide == torch.float64 else tl.float32
    sizes = {"BN": tiling.bn, "BB": tiling.bb, "BD": tiling.bd}
    return {**sizes, "LAPLACE": family == "laplace", "ACC": accumulator, "num_warps": tiling.warps}


def _inputs(
    mean: Tensor, scale: Tensor, observed: Tensor, noise: Tensor | None, draw: Tensor | None, key: Tensor | None, samples: int, family: str
) -> tuple[Tensor | None, ...]:
    """What both kernels read. In float64, which is for checking gradients, noise is the reference's own: a kernel makes it in float32."""
    if draw is not None and key is not None and sums_dtype(mean, scale) == torch.float64:
        noise, draw, key = _drawn(draw, key, samples, mean, family), None, None
    return tuple(x if x is None else x.contiguous() for x in (mean, scale, observed, noise, draw, key))


def _fake_forward(
    mean: Tensor, scale: Tensor, observed: Tensor, noise: Tensor | None, draw: Tensor | None, key: Tensor | None, samples: int, family: str
) -> tuple[Tensor, Tensor]:
    (n, b, d), wide = mean.shape, sums_dtype(mean, scale)
    return mean.new_empty(n, samples, b, d, dtype=wide), mean.new_empty(n, n, samples, b, dtype=wide)


@opaque(_fake_forward)
def _forward(
    mean: Tensor, scale: Tensor, observed: Tensor, noise: Tensor | None, draw: Tensor | None, key: Tensor | None, samples: int, family: str
) -> tuple[Tensor, Tensor]:
    z, out = _fake_forward(mean, scale, observed, noise, draw, key, samples, family)
    n, b, d = mean.shape
    t = _tiling(n, samples, b, d, held=_FORWARD, warps=4)
    partial = out if t.chunks == 1 else out.new_empty(t.chunks, *out.shape)
    grid = (cdiv(b, t.bb) * t.chunks * t.parts,)
    inputs = _inputs(mean, scale, observed, noise, draw, key, samples, family)
    run(forward_kernel, grid, *inputs, z, partial, n, samples, b, d, t.parts, **_constants(t, family, z.dtype))
    return z, (out if t.chunks == 1 else partial.sum(0))


def _fake_backward(
    h: Tensor, g: Tensor, mean: Tensor, scale: Tensor, observed: Tensor, noise: Tensor | None, draw: Tensor | None, key: Tensor | None,
    samples: int, family: str, path_gradient: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return mean.new_empty(mean.shape), scale.new_empty(scale.shape)


@opaque(_fake_backward)
def _backward(
    h: Tensor, g: Tensor, mean: Tensor, scale: Tensor, observed: Tensor, noise: Tensor | None, draw: Tensor | None, key: Tensor | None,
    samples: int, family: str, path_gradient: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    n, b, d = mean.shape
    t = _tiling(n, samples, b, d, held=_BACKWARD, warps=1)
    grads = _fake_backward(h, g, mean, scale, observed, noise, draw, key, samples, family, path_gradient)
    direct = t.parts == 1
    outs = grads if direct else tuple(h.new_empty(t.parts, n, b, d, dtype=sums_dtype(h)) for _ in grads)
    grid = (cdiv(b, t.bb) * t.chunks * t.parts,)
    inputs = _inputs(mean, scale, observed, noise, draw, key, samples, family)
    constants = _constants(t, family, sums_dtype(mean, scale))
    run(backward_kernel, grid, *inputs, h.contiguous(), g.contiguous(), *outs, n, samples, b, d, t.parts, PATH=path_gradient, **constants)
    return (outs[0], outs[1]) if direct else (outs[0].sum(0).to(mean.dtype), outs[1].sum(0).to(scale.dtype))


class _Cross(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        mean: Tensor,
        scale: Tensor,
        observed: Tensor,
        noise: Tensor | None,
        draw: Tensor | None,
        key: Tensor | None,
        samples: int,
        family: Family,
        path: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(mean, scale, observed, noise, draw, key)
        ctx.settings = samples, family, path
        return _forward(mean, scale, observed, noise, draw, key, samples, family)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        mean, scale, observed, noise, draw, key = ctx.saved_tensors
        samples, family, path = ctx.settings
        rest: tuple[None, ...] = (None,) * 7
        if torch.is_grad_enabled():
            noise = Counter(draw, key, samples) if noise is None else noise

            def specification(m: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
                return reference(m, s, observed, noise, family=family, path_gradient=path)

            return (*through_reference(specification, (mean, scale), gradients), *rest)
        h, g = gradients
        return (*_backward(h, g, mean, scale, observed, noise, draw, key, samples, family, path), *rest)


# ---- what the op says of itself --------------------------------------------------------------------------------------------------

_Shape = tuple[int, int, int, int]
_SIZES: dict[Size, list[tuple[_Shape, bool, Family, bool]]] = {  # (N, K, B, D), whether noise is given, family, path gradient
    "tiny": [
        ((1, 1, 1, 1), False, "normal", False),
        ((2, 3, 5, 7), False, "normal", False),
        ((2, 2, 2, 3), True, "normal", False),
        ((3, 2, 3, 12), True, "normal", True),
        ((2, 5, 3, 33), False, "laplace", False),
        ((5, 2, 4, 17), True, "laplace", False),
        ((3, 4, 2, 20), False, "laplace", True),
        ((2, 1, 2, 515), False, "normal", True),
        ((9, 1, 1, 33), True, "normal", False),
        ((17, 1, 1, 9), False, "normal", False),
        ((2, 2, 0, 4), False, "normal", False),
        ((2, 0, 3, 4), True, "normal", False),
        ((2, 2, 3, 0), False, "laplace", False),
    ],
    "small": [((8, 10, 32, 64), False, "normal", False)],
    "paper": [((2, 11, 128, 64), False, "laplace", False), ((8, 10, 128, 512), False, "normal", False)],
    "large": [
        ((8, 10, 8192, 64), False, "normal", False),
        ((8, 10, 2048, 512), False, "normal", False),
        ((8, 10, 2048, 512), True, "normal", False),
    ],
}


def _cases(size: Size, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    for (n, k, b, d), given, family, path_gradient in _SIZES[size]:
        mean, scale = torch.randn(n, b, d, device=device), torch.rand(n, b, d, device=device) + 0.2
        observed = torch.rand(n, b, device=device) < 0.8
        key = torch.arange(2 * n, device=device).view(n, 2) * 0x9E3779B1 % 2**32
        noise = torch.randn(n, k, b, d, device=device).to(dtype) if given else Counter(torch.arange(b, device=device) + 2**33, key, k)
        label = f"N={n} K={k} B={b} D={d} {family}{' given' * given}{' path' * path_gradient}"
        arguments = (mean.to(dtype).requires_grad_(), scale.to(dtype).requires_grad_(), observed, noise)
        yield Case(label, arguments, {"family": family, "path_gradient": path_gradient})


def _cost(mean: Tensor, scale: Tensor, observed: Tensor, noise: Noise, *, path_gradient: bool, backward: bool = False, **_: Any) -> Cost:
    given, draw, key, k = _flat(noise)
    n, b, d = mean.shape
    inputs = nbytes(mean, scale, observed, given, draw, key)
    outputs = n * k * b * (d + n) * sums_dtype(mean, scale).itemsize
    each = n * k * b * d
    if backward:
        return Cost(inputs + outputs, nbytes(mean, scale), each * ((5 if path_gradient else 8) * n + 6))
    return Cost(inputs, outputs, each * (4 * n + 2))


OP = FusedOp(name="cross_log_prob", call=cross_log_prob, reference=reference, naive=naive, cases=_cases, cost=_cost)
