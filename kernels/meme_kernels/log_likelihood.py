"""Log densities of data under a decoder's parameters, summed over the event: data against K parameter sets a row.

    out[k, p] = sum_e log p(x[row(p), e] | parameter[k, p, e], extra)

    normal             - (x - m)^2 / (2 s^2) - log s - log(2 pi) / 2                   parameter m, extra s (scale)
    laplace            - |x - m| / s - log (2 s)                                       parameter m, extra s (scale)
    bernoulli          x l - softplus(l)                                               parameter l (logits), x in [0, 1]
    poisson            x log m - m - log x!                                            parameter m (rate)
    negative_binomial  lgamma(x + r) - lgamma(r) - log x! - (x + r) log(1 + m / r) + x log(m / r)
                                                                                       parameter m (mean), extra r (dispersion)

Gradients: normal (x - m) / s^2 and ((x - m)^2 / s^2 - 1) / s; laplace sign(x - m) / s and (|x - m| / s - 1) / s; bernoulli
x - sigmoid(l); poisson (x - m) / m; negative binomial (variance m + m^2 / r) r (x - m) / (m (r + m)) and
digamma(x + r) - digamma(r) - log(1 + m / r) + (m - x) / (r + m).

The kernels score counts against their own best rate (`_special` says why), so that float32 keeps its digits for any count and dispersion;
the reference takes those sums in float64. Forward reads P E + K P E numbers (and extra), writes K P. Backward reads those and K P
gradients, writes K P E (and the gradients of extra and x that are asked for). Nothing of size K P E is held but the parameter's gradient.
Flops of one term: normal and laplace 4, bernoulli 25, poisson 30, negative binomial 55. Every sum is taken in one order: no atomics,
bitwise repeatable.
"""

import math
from collections.abc import Iterator
from functools import partial
from itertools import repeat
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from meme_kernels._launch import block, cdiv
from meme_kernels._log_likelihood_kernels import backward_kernel, forward_kernel
from meme_kernels._op import (
    Case,
    Cost,
    FusedOp,
    Size,
    at_a_time,
    check_row,
    nbytes,
    opaque,
    run,
    sums_dtype,
    through_reference,
    uses_triton,
)
from meme_kernels._triton import tl

Family = Literal["normal", "laplace", "bernoulli", "poisson", "negative_binomial"]
COUNTS = ("poisson", "negative_binomial")
WITHOUT_EXTRA = ("bernoulli", "poisson")
CHUNK = 1 << 18  # elements of a parameter that the reference works on at a time on a CPU: they stay in its cache


def log_likelihood(x: Tensor, parameter: Tensor, extra: Tensor | None = None, *, family: Family, row: Tensor | None = None) -> Tensor:
    """x [X, *event] of any number type, parameter [K, P, *event] -> [K, P], float32 (float64 where an input is).

    `extra` (> 0; none for bernoulli and poisson) holds one number, one for each element [*event], or one for each of the parameter's.
    `row` int64 [P] says which row of x each packed row is; without it X = P. Raises ValueError for other shapes and families, where x
    requires a gradient together with `row` (its sum over repeated rows would have no fixed order), and on the CPU for a number in `row`
    that names no row; on a GPU it gives NaN.
    """
    _check(x, parameter, extra, family, row)
    if not uses_triton(x, parameter, extra, row):
        return reference(x, parameter, extra, family=family, row=row)
    return _LogLikelihood.apply(*_flat(x, parameter, extra), row, family)


def reference(x: Tensor, parameter: Tensor, extra: Tensor | None = None, *, family: Family, row: Tensor | None = None) -> Tensor:
    """The specification, on any device and in any floating type; counts are summed in float64. Rows go in chunks, and a chunk keeps nothing
    for the backward pass but its inputs."""
    check_row(row, len(x), "log_likelihood")
    x, parameter, extra = _flat(x, parameter, extra)
    k, _, e = parameter.shape
    score = partial(_sums, family=family, dtype=_sums_dtype(x, parameter, extra))
    chunk = at_a_time(CHUNK, parameter.device)
    if torch.compiler.is_compiling() or parameter.numel() <= chunk:  # Inductor fuses the terms: nothing to keep small
        return score(x if row is None else x[row], parameter, extra)
    rows, samples = max(chunk // (k * e), 1), max(chunk // e, 1)
    data = x.split(rows) if row is None else (x[r] for r in row.split(rows))
    blocks = []
    for x_, parameter_, extra_ in zip(data, parameter.split(rows, 1), _split(extra, rows, 1), strict=False):
        parts = zip(parameter_.split(samples), _split(extra_, samples, 0), strict=False)
        blocks.append(torch.cat([_forgetful(score, x_, m, s) for m, s in parts]))
    return torch.cat(blocks, 1)


def naive(x: Tensor, parameter: Tensor, extra: Tensor | None = None, *, family: Family, row: Tensor | None = None) -> Tensor:
    """As commonly written: several [K, P, E] tensors, in the type of the inputs."""
    x, parameter, extra = _flat(x, parameter, extra)
    return _terms(x if row is None else x[row], parameter, extra, family).sum(-1)


def _terms(x: Tensor, m: Tensor, s: Any, family: Family) -> Tensor:
    """Log densities element by element: x [P, E], m [K, P, E]."""
    x = x if x.is_floating_point() else x.to(m.dtype)
    if family == "normal":
        return -((x - m) / s).square() / 2 - s.log() - 0.5 * math.log(2 * math.pi)
    if family == "laplace":
        return -(x - m).abs() / s - s.log() - math.log(2)
    if family == "bernoulli":
        return x * m - F.softplus(m)
    if family == "poisson":
        return torch.xlogy(x, m) - m - torch.lgamma(x + 1)
    return torch.lgamma(x + s) - torch.lgamma(s) - torch.lgamma(x + 1) - (x + s) * torch.log1p(m / s) + torch.xlogy(x, m / s)


def _sums(x: Tensor, m: Tensor, s: Tensor | None, *, family: Family, dtype: torch.dtype) -> Tensor:
    wide = torch.float64 if family in COUNTS else dtype  # log-gamma functions cancel
    x, m, s = x.to(wide), m.to(wide), None if s is None else s.to(wide)
    if s is not None and s.dim() == 0 and family not in COUNTS:  # one scale leaves the sum: a third of the time on a CPU
        number = m.shape[-1]
        if family == "normal":
            return -(x - m).square().sum(-1) / (2 * s.square()) - number * (s.log() + 0.5 * math.log(2 * math.pi))
        return -(x - m).abs().sum(-1) / s - number * (s.log() + math.log(2))
    return _terms(x, m, s, family).sum(-1).to(dtype)


def _forgetful(score: Any, *tensors: Tensor | None) -> Tensor:
    """score(*tensors), computed a second time in the backward pass in place of keeping its intermediate values."""
    found = checkpoint(score, *tensors, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(found, Tensor)
    return found


def _split(extra: Tensor | None, size: int, axis: int) -> Iterator[Tensor | None]:
    """A full extra in pieces along an axis; any other extra, whole, as often as asked."""
    return iter(extra.split(size, axis)) if extra is not None and extra.dim() == 3 else repeat(extra)


def _flat(x: Tensor, parameter: Tensor, extra: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """x [X, E], parameter [K, P, E], extra [], [E] or [K, P, E]."""
    event = math.prod(parameter.shape[2:])
    if extra is not None:
        lead = () if extra.numel() == 1 else (event,) if extra.shape == parameter.shape[2:] else (*parameter.shape[:2], event)
        extra = extra.reshape(lead)
    return x.reshape(x.shape[0], event), parameter.reshape(*parameter.shape[:2], event), extra


def _sums_dtype(x: Tensor, parameter: Tensor, extra: Tensor | None) -> torch.dtype:
    return sums_dtype(x, parameter, parameter if extra is None else extra)


def _check(x: Tensor, parameter: Tensor, extra: Tensor | None, family: Family, row: Tensor | None) -> None:
    if family not in get_args(Family):
        raise ValueError(f"log_likelihood: family: expected one of {', '.join(get_args(Family))}, got {family!r}")
    shapes = f"got x {tuple(x.shape)}, parameter {tuple(parameter.shape)}"
    if parameter.dim() < 2 or x.dim() < 1 or x.shape[1:] != parameter.shape[2:] or not parameter.is_floating_point():
        raise ValueError(f"log_likelihood: expected x [X, *event] and a floating parameter [K, P, *event], {shapes}, {parameter.dtype}")
    rows = parameter.shape[1]
    if row is None and x.shape[0] != rows:
        raise ValueError(f"log_likelihood: without row, expected as many rows of x as of parameter, {shapes}")
    if row is not None and (row.dtype != torch.int64 or row.shape != (rows,)):
        raise ValueError(f"log_likelihood: row: expected int64 [{rows}], got {row.dtype} {tuple(row.shape)}")
    if row is not None and x.requires_grad:
        raise ValueError("log_likelihood: x requires a gradient and comes with row; gather it first (x[row], and no row)")
    if (extra is None) != (family in WITHOUT_EXTRA):
        raise ValueError(f"log_likelihood: {family} takes {'no' if family in WITHOUT_EXTRA else 'an'} extra")
    if extra is not None and extra.numel() != 1 and extra.shape not in (parameter.shape[2:], parameter.shape):
        expected = f"one number, {tuple(parameter.shape[2:])} or {tuple(parameter.shape)}"
        raise ValueError(f"log_likelihood: extra: expected {expected}, got {tuple(extra.shape)}")


# ---- launch and binding ----------------------------------------------------------------------------------------------------------------


class _Tiles(NamedTuple):
    """A program's share: `depth` times [rows, event] elements."""

    rows: int
    event: int
    depth: int
    warps: int

    @classmethod
    def of(cls, parameter: Tensor, extra: Tensor | None, family: str) -> "_Tiles":
        """A warp holds 512 elements at a time, 16 a thread; fewer where a family needs more registers for each. One row a tile for events
        from there on: several warps share an event of up to four times that, so that it needs no second sum. With one extra for each
        element, rows enough to make its share of the traffic at most 4 %."""
        k, p, e = parameter.shape
        each = extra is not None and extra.dim() == 1
        elements = 128 if family == "negative_binomial" else 256 if each or family == "poisson" else 512
        event = block(e, most=4 * elements if e <= 4 * elements else elements)
        rows = block(p, most=max(elements // event, 1))
        depth = max(min(cdiv(25, max(k, 1) * rows), cdiv(p, rows)), 1) if each else 1
        return cls(rows, event, depth, max(rows * event // elements, 1))

    def grid(self, parameter: Tensor) -> tuple[int, int]:
        """Programs along the rows, and along the event."""
        return cdiv(parameter.shape[1], self.rows * self.depth), cdiv(parameter.shape[2], self.event)


def _constants(tiles: _Tiles, extra: Tensor | None, row: Tensor | None, family: str, dtype: torch.dtype) -> dict[str, Any]:
    kind = "none" if extra is None else {0: "scalar", 1: "element", 3: "full"}[extra.dim()]
    accumulator = tl.float64 if dtype == torch.float64 else tl.float32
    blocks = {"BP": tiles.rows, "BE": tiles.event, "ACC": accumulator, "num_warps": tiles.warps}
    return {"FAMILY": family, "EXTRA": kind, "HAS_ROW": row is not None, **blocks}


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _fake_forward(x: Tensor, parameter: Tensor, extra: Tensor | None, row: Tensor | None, family: str) -> Tensor:
    return parameter.new_empty(parameter.shape[:2], dtype=_sums_dtype(x, parameter, extra))


@opaque(_fake_forward)
def _forward(x: Tensor, parameter: Tensor, extra: Tensor | None, row: Tensor | None, family: str) -> Tensor:
    x, parameter, extra, row = x.contiguous(), parameter.contiguous(), _contiguous(extra), _contiguous(row)
    (k, p, e), dtype = parameter.shape, _sums_dtype(x, parameter, extra)
    tiles = _Tiles.of(parameter, extra, family)
    row_programs, event_programs = tiles.grid(parameter)
    parts = parameter.new_empty(event_programs, k, p, dtype=dtype)
    sizes = (len(x), k, p, e, p * e, tiles.depth)
    run(
        forward_kernel,
        (row_programs * event_programs,),
        x,
        parameter,
        extra,
        row,
        parts,
        *sizes,
        **_constants(tiles, extra, row, family, dtype),
    )
    return parts[0] if event_programs == 1 else parts.sum(0)


def _fake_backward(
    g: Tensor, x: Tensor, parameter: Tensor, extra: Tensor | None, row: Tensor | None, family: str, want_extra: bool, want_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    of_parameter = torch.empty_like(parameter, memory_format=torch.contiguous_format)
    of_extra = (
        torch.empty_like(extra, memory_format=torch.contiguous_format) if want_extra and extra is not None else parameter.new_empty(0)
    )
    return of_parameter, of_extra, torch.empty_like(x, memory_format=torch.contiguous_format) if want_x else parameter.new_empty(0)


@opaque(_fake_backward)
def _backward(
    g: Tensor, x: Tensor, parameter: Tensor, extra: Tensor | None, row: Tensor | None, family: str, want_extra: bool, want_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of parameter, extra and x; empty where not wanted."""
    of_parameter, of_extra, of_x = _fake_backward(g, x, parameter, extra, row, family, want_extra, want_x)
    x, parameter, extra, row = x.contiguous(), parameter.contiguous(), _contiguous(extra), _contiguous(row)
    k, p, e = parameter.shape
    tiles = _Tiles.of(parameter, extra, family)
    row_programs, event_programs = tiles.grid(parameter)
    parts = of_extra
    if want_extra and extra is not None and extra.dim() < 3:
        parts = g.new_empty((row_programs * event_programs,) if extra.dim() == 0 else (row_programs, e))
    tensors = (g.contiguous(), x, parameter, extra, row, of_parameter, parts, of_x)
    settings = {"WANT_EXTRA": want_extra, "WANT_X": want_x, **_constants(tiles, extra, row, family, g.dtype)}
    run(backward_kernel, (row_programs * event_programs,), *tensors, len(x), k, p, e, p * e, tiles.depth, **settings)
    return of_parameter, of_extra if parts is of_extra else parts.sum(0).to(of_extra.dtype), of_x


class _LogLikelihood(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, parameter: Tensor, extra: Tensor | None, row: Tensor | None, family: str) -> Tensor:
        ctx.save_for_backward(x, parameter, extra, row)
        ctx.family = family
        return _forward(x, parameter, extra, row, family)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, parameter, extra, row = ctx.saved_tensors
        if torch.is_grad_enabled():
            score = partial(reference, family=ctx.family, row=row)
            return *through_reference(score, (x, parameter, extra), gradients), None, None
        want_x, want_parameter, want_extra = ctx.needs_input_grad[:3]
        of_parameter, of_extra, of_x = _backward(gradients[0], x, parameter, extra, row, ctx.family, want_extra, want_x)
        return of_x if want_x else None, of_parameter if want_parameter else None, of_extra if want_extra else None, None, None


# ---- what the op says of itself --------------------------------------------------------------------------------------------------------

# family, rows of x, K, P, event, kind of extra, type of x (None: the parameter's), whether rows are packed
_SIZES: dict[Size, list[tuple[Family, int, int, int, tuple[int, ...], str, torch.dtype | None, bool]]] = {
    "tiny": [
        ("normal", 3, 2, 3, (5,), "scalar", None, False),
        ("normal", 4, 3, 7, (2, 17), "element", torch.uint8, True),
        ("normal", 2, 2, 2, (3,), "full", None, False),
        ("laplace", 1, 1, 1, (), "scalar", None, False),
        ("laplace", 6, 2, 5, (3, 5, 7), "element", None, True),
        ("laplace", 2, 3, 2, (2100,), "scalar", None, False),
        ("bernoulli", 5, 4, 5, (31,), "none", None, False),
        ("bernoulli", 3, 2, 65, (1,), "none", torch.uint8, True),
        ("poisson", 4, 3, 4, (33,), "none", torch.int64, False),
        ("poisson", 3, 2, 3, (6,), "none", None, False),
        ("negative_binomial", 5, 2, 9, (13,), "element", torch.uint8, True),
        ("negative_binomial", 2, 3, 2, (5,), "full", None, False),
        ("negative_binomial", 3, 2, 3, (4,), "scalar", torch.int32, False),
        ("normal", 0, 2, 0, (4,), "scalar", None, False),
        ("negative_binomial", 3, 0, 3, (4,), "element", torch.uint8, False),
        ("negative_binomial", 0, 3, 0, (4,), "element", torch.uint8, False),
    ],
    "small": [
        ("laplace", 128, 11, 128, (784,), "scalar", None, False),
        ("negative_binomial", 128, 11, 128, (256,), "element", torch.int32, False),
    ],
    "paper": [("laplace", 128, 11, 128, (3, 32, 32), "scalar", None, False), ("laplace", 128, 11, 128, (784,), "scalar", None, False)],
    "large": [
        ("laplace", 1024, 11, 1024, (3, 64, 64), "scalar", torch.uint8, True),
        ("normal", 1024, 11, 1024, (3, 64, 64), "scalar", None, False),
        ("bernoulli", 4096, 11, 4096, (784,), "none", None, False),
        ("poisson", 1024, 1, 1024, (20_000,), "none", torch.int32, False),
        ("negative_binomial", 512, 4, 512, (20_000,), "element", torch.int32, True),
    ],
}


def _cases(size: Size, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    for family, x_rows, k, p, event, kind, x_type, packed in _SIZES[size]:
        counts, full = family in COUNTS, (k, p, *event)
        x = torch.rand((x_rows, *event), device=device) * (9 if counts else 1)
        x = (x if x_type is None else x.round()).to(x_type or dtype)
        parameter = torch.rand(full, device=device) * 5 + 0.1 if counts else torch.randn(full, device=device)
        parameter = parameter.to(dtype).requires_grad_()
        shape = {"none": None, "scalar": (), "element": event, "full": full}[kind]
        extra = None if shape is None else (torch.rand(shape, device=device) + 0.5).to(dtype).requires_grad_()
        row = torch.arange(p, device=device) * 5 % max(x_rows, 1) if packed else None
        x.requires_grad_(x_type is None and not packed and size == "tiny")  # data, which has no gradient in training
        label = f"{family} X={x_rows} K={k} P={p} event={event} extra={kind} x={x.dtype}{' packed' if packed else ''}"
        yield Case(label, (x, parameter, extra), {"family": family, "row": row})


_FLOPS = {"normal": 4, "laplace": 4, "bernoulli": 25, "poisson": 30, "negative_binomial": 55}  # a term; a logarithm counted as 15


def _cost(
    x: Tensor, parameter: Tensor, extra: Tensor | None = None, *, family: Family, row: Tensor | None = None, backward: bool = False
) -> Cost:
    k, p = parameter.shape[:2]
    out = k * p * _sums_dtype(x, parameter, extra).itemsize
    read = p * math.prod(x.shape[1:]) * x.element_size() + nbytes(parameter, extra, row)
    flops = _FLOPS[family] * parameter.numel()
    if not backward:
        return Cost(read, out, flops)
    return Cost(read + out, nbytes(*(y for y in (x, parameter, extra) if y is not None and y.requires_grad)), flops)


OP = FusedOp(name="log_likelihood", call=log_likelihood, reference=reference, naive=naive, cases=_cases, cost=_cost)
