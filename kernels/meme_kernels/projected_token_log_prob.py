"""Log probability of token rows under a linear output layer whose logits are never all held:

    logits = hidden weight^T + bias       out[k, p] = sum over t with token != padding of log softmax(logits[k, p, t])[token]

Positions are taken some at a time: their logits are computed, reduced and dropped. Backward computes them again, turns them into their
gradient d and adds up

    hidden: d weight      weight: sum over chunks of d^T hidden      bias: sum of d

in the type sums are kept in, chunk after chunk in one order. 2 R V H flops forward and 6 R V H backward for R = K P T positions, in matrix
products; held are a few times `chunk` numbers, the log-sum-exps [R, 2] and the gradients. bf16 and fp16 products are summed and kept in
float32; on a GPU the gradient of the logits goes through them as two numbers of the narrow type, so that 16 of its bits are kept.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from meme_kernels._op import Case, Cost, FusedOp, Size, check_row, nbytes, opaque, sums_dtype, through_reference, uses_triton
from meme_kernels.token_log_prob import at_positions, check_ids, check_rows, gradients, log_probs
from meme_kernels.token_log_prob import naive as unprojected

_CHUNK = 2**25  # logits held at a time: 128 MiB in float32, and enough positions for large matrix products


def projected_token_log_prob(
    tokens: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, padding: int, *, row: Tensor | None = None, chunk: int = _CHUNK
) -> Tensor:
    """tokens int64 [X, T], hidden [K, P, T, H], weight [V, H], bias [V] or None -> [K, P], float32 (float64 for float64).

    `padding` is the id that is skipped: nothing in `hidden` there reaches value or gradients. The packed row p has the tokens of row[p],
    row int64 [P]; without `row` those of p. `chunk` is the number of logits held at a time, at least one position's. Autocast changes
    nothing here. Raises ValueError for other shapes and, on the CPU, for ids outside the vocabulary that are not padding and for numbers in
    `row` that name no row; on a GPU these give NaN.
    """
    _check(tokens, hidden, weight, bias, row)
    ids = _ids(tokens, hidden, row, padding)
    if not uses_triton(tokens, hidden, weight, bias, row):
        check_row(row, len(tokens), "projected_token_log_prob")
        check_ids(ids, padding, len(weight))
    values = _Projected.apply(ids.reshape(-1), hidden.flatten(0, -2), weight, bias, padding, max(chunk // max(len(weight), 1), 1))
    return values.view(ids.shape).sum(-1)


def reference(
    tokens: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, padding: int, *, row: Tensor | None = None, chunk: int = _CHUNK
) -> Tensor:
    """The specification, on any device and in any floating type; chunks are checkpointed."""
    check_row(row, len(tokens), "projected_token_log_prob")
    ids = _ids(tokens, hidden, row, padding)
    values = _specification(ids.reshape(-1), hidden.flatten(0, -2), weight, bias, padding, max(chunk // max(len(weight), 1), 1))
    return values.view(ids.shape).sum(-1)


def naive(
    tokens: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, padding: int, *, row: Tensor | None = None, chunk: int = _CHUNK
) -> Tensor:
    """As commonly written: all logits [K, P, T, V], then their table of log probabilities."""
    kept = (_ids(tokens, hidden, row, padding) != padding)[..., None]
    return unprojected(tokens, F.linear(torch.where(kept, hidden, 0.0), weight, bias), padding, row=row)


def _ids(tokens: Tensor, hidden: Tensor, row: Tensor | None, padding: int) -> Tensor:
    """The token at each position [K, P, T]; of a row that does not exist an id that is no token and not padding."""
    if row is not None:
        exists = (row >= 0) & (row < len(tokens))
        tokens = torch.where(exists[:, None], tokens[torch.where(exists, row, 0)], -1 if padding != -1 else -2)
    return tokens.expand(hidden.shape[:-1])


def _specification(ids: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, padding: int, step: int) -> Tensor:
    """Log probabilities [R] of ids [R] from hidden [R, H], `step` positions at a time."""
    wide = sums_dtype(hidden, weight)
    weight, bias = weight.to(wide), None if bias is None else bias.to(wide)

    def some(ids: Tensor, hidden: Tensor) -> Tensor:
        hidden = hidden.masked_fill((ids == padding)[:, None], 0.0).to(wide)
        return at_positions(ids, F.linear(hidden, weight, bias), padding)

    with _exact(hidden.device):
        pairs = zip(ids.split(step), hidden.split(step), strict=True)
        return torch.cat([checkpoint(some, i, h, use_reentrant=False, preserve_rng_state=False) for i, h in pairs])


def _exact(device: torch.device) -> Any:
    """Matrix products in the type of their factors, whatever autocast says."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _check(tokens: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, row: Tensor | None) -> None:
    shapes = tuple(hidden.shape), tuple(weight.shape), None if bias is None else tuple(bias.shape)
    if hidden.dim() != 4 or weight.dim() != 2 or hidden.shape[3] != weight.shape[1] or shapes[2] not in (None, shapes[1][:1]):
        raise ValueError(f"projected_token_log_prob: expected hidden [K, P, T, H], weight [V, H] and bias [V] or None, got {shapes}")
    check_rows(tokens, hidden.shape[:3], row, "projected_token_log_prob")


# ---- chunks, through the kernels where they run ---------------------------------------------------------------------------------------


def _fake_forward(ids: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, padding: int, step: int) -> tuple[Tensor, Tensor]:
    values = hidden.new_empty(ids.shape[0], dtype=sums_dtype(hidden, weight))
    return values, values.new_empty(ids.shape[0], 2)


@opaque(_fake_forward)
def _forward(ids: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, padding: int, step: int) -> tuple[Tensor, Tensor]:
    values, lse = _fake_forward(ids, hidden, weight, bias, padding, step)
    for start in range(0, len(ids), step):
        some = slice(start, start + step)
        values[some], lse[some] = _log_probs(ids[some], _logits(hidden[some], weight, bias), padding)
    return values, lse


def _fake_backward(
    g: Tensor, ids: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, lse: Tensor, padding: int, step: int
) -> tuple[Tensor, Tensor, Tensor]:
    whole = torch.contiguous_format
    no_bias = weight.new_empty(0) if bias is None else torch.empty_like(bias, memory_format=whole)
    return torch.empty_like(hidden, memory_format=whole), torch.empty_like(weight, memory_format=whole), no_bias


@opaque(_fake_backward)
def _backward(
    g: Tensor, ids: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, lse: Tensor, padding: int, step: int
) -> tuple[Tensor, Tensor, Tensor]:
    g_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    g_weight = torch.zeros_like(weight, dtype=g.dtype, memory_format=torch.contiguous_format)
    g_bias = g.new_zeros(0 if bias is None else len(bias))
    for start in range(0, len(ids), step):
        some = slice(start, start + step)
        d = _gradients(g[some], ids[some], _logits(hidden[some], weight, bias), lse[some], padding)
        g_hidden[some] = _times(d, weight)
        kept = hidden[some].masked_fill((ids[some] == padding)[:, None], 0.0)  # whatever padding holds, times 0
        g_weight += _times(d.T, kept)
        if bias is not None:
            g_bias += d.sum(0)
        del d  # before the next logits are made
    return g_hidden, g_weight.to(weight.dtype), g_bias.to(weight.dtype if bias is None else bias.dtype)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide = sums_dtype(hidden, weight)
    if hidden.dtype == weight.dtype != wide and hidden.device.type == "cuda":
        logits = torch.mm(hidden, weight.T, out_dtype=wide)
    else:
        logits = hidden.to(wide) @ weight.to(wide).T
    return logits if bias is None else logits.add_(bias)


def _log_probs(ids: Tensor, logits: Tensor, padding: int) -> tuple[Tensor, Tensor]:
    """What the kernel gives: log probabilities [C], and log-sum-exps [C, 2] as largest logit and rest."""
    if uses_triton(logits):
        return log_probs(ids[None], None, logits, padding)
    kept = (ids != padding)[:, None]
    logits = logits.masked_fill_(~kept, 0.0)
    top = logits.amax(-1, keepdim=True)
    chosen = logits.gather(-1, torch.where(kept, ids[:, None], 0)) - top
    rest = logits.sub_(top).exp_().sum(-1, keepdim=True).log()
    return torch.where(kept, chosen - rest, 0.0)[:, 0], torch.cat([top, rest], -1)


def _gradients(g: Tensor, ids: Tensor, logits: Tensor, lse: Tensor, padding: int) -> Tensor:
    """What the kernel gives: the gradient of the logits [C, V]."""
    if uses_triton(logits):
        return gradients(g, ids[None], None, logits, lse, padding)
    kept, g = (ids != padding)[:, None], g[:, None]
    d = logits.sub_(lse[:, :1]).sub_(lse[:, 1:]).exp_().mul_(-g)
    return d.scatter_add_(-1, torch.where(kept, ids[:, None], 0), g).masked_fill_(~kept, 0.0)


def _times(d: Tensor, x: Tensor) -> Tensor:
    """d x in d's type; on a GPU a narrow x stays narrow, and d goes in as two narrow parts."""
    if not _stays_narrow(x, d.dtype):
        return d @ x.to(d.dtype)
    if x.dtype != torch.float16:
        return _by_halves(d, x)
    # float16 ends at 2^16 and loses digits below 2^-14: the largest number of d goes to 2^14, whatever the upstream gradient
    exponent = torch.frexp(d.abs().amax()).exponent
    up = torch.exp2((14 - exponent).clamp(-100, 100).to(d.dtype))
    return _by_halves(d * up, x).div_(up)


def _stays_narrow(x: Tensor, wide: torch.dtype) -> bool:
    """Whether the device multiplies numbers of this type with a result of the wide one."""
    return x.dtype != wide and x.device.type == "cuda"


def _by_halves(d: Tensor, x: Tensor) -> Tensor:
    high = d.to(x.dtype)
    low = (d - high).to(x.dtype)
    return torch.mm(high, x, out_dtype=d.dtype).add_(torch.mm(low, x, out_dtype=d.dtype))


class _Projected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, padding: int, step: int) -> Tensor:
        with _exact(hidden.device):
            values, lse = _forward(ids, hidden, weight, bias, padding, step)
        ctx.save_for_backward(ids, hidden, weight, bias, lse)
        ctx.settings = padding, step
        return values

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> tuple[Tensor | None, ...]:
        ids, hidden, weight, bias, lse = ctx.saved_tensors
        if torch.is_grad_enabled():
            return (*through_reference(_specification, (ids, hidden, weight, bias, *ctx.settings), g),)
        with _exact(hidden.device):
            g_hidden, g_weight, g_bias = _backward(g[0], ids, hidden, weight, bias, lse, *ctx.settings)
        return None, g_hidden, g_weight, None if bias is None else g_bias, None, None


# ---- what the op says of itself --------------------------------------------------------------------------------------------------------

# samples, packed rows, tokens, width, vocabulary, rows of tokens (0: as many as packed rows, no `row`), bias, logits held at a time
_SIZES: dict[Size, list[tuple[int, int, int, int, int, int, bool, int]]] = {
    "tiny": [
        (1, 1, 1, 1, 2, 0, True, 1),
        (2, 3, 5, 4, 7, 0, True, 28),
        (1, 4, 3, 5, 27, 2, False, 100),
        (3, 2, 1, 3, 130, 0, True, 1000),
        (0, 2, 3, 4, 5, 0, True, 10),
        (2, 3, 0, 4, 5, 0, False, 10),
    ],
    "small": [(11, 128, 8, 128, 27, 0, True, _CHUNK)],
    "paper": [(11, 128, 32, 128, 1590, 0, True, _CHUNK)],
    "large": [(1, 256, 64, 1024, 32000, 0, True, _CHUNK)],
}


def _cases(size: Size, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    for num, rows, length, width, vocabulary, sources, biased, chunk in _SIZES[size]:
        tokens = torch.randint(vocabulary, (sources or rows, length), device=device)  # id 0 is padding
        row = torch.randint(sources, (rows,), device=device) if sources else None
        hidden = torch.randn(num, rows, length, width, device=device).to(dtype).requires_grad_()
        weight = (torch.randn(vocabulary, width, device=device) / width**0.5).to(dtype).requires_grad_()
        bias = torch.randn(vocabulary, device=device).to(dtype).requires_grad_() if biased else None
        label = f"K={num} P={rows} T={length} H={width} V={vocabulary}{' by row' if sources else ''}{' bias' if biased else ''}"
        yield Case(label, (tokens, hidden, weight, bias, 0), {"row": row, "chunk": chunk})


def _cost(
    tokens: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: int,
    *,
    row: Tensor | None = None,
    chunk: int = _CHUNK,
    backward: bool = False,
) -> Cost:
    """What the matrix products must read and write once, were everything held on chip; as if nothing were padding."""
    positions, products = hidden[..., 0].numel(), 2 * hidden.numel() * len(weight)
    layer = nbytes(hidden, weight, bias)
    read, each = layer + nbytes(tokens, row), positions * 3 * sums_dtype(hidden, weight).itemsize
    logits = positions * len(weight)
    return Cost(read + each, layer, 3 * products + 6 * logits) if backward else Cost(read, each, products + 6 * logits)


def _workspace(
    tokens: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: int,
    *,
    row: Tensor | None = None,
    chunk: int = _CHUNK,
) -> int:
    """A chunk of logits and their gradient; of a narrow type the gradient, scaled, its two halves and what the first one leaves."""
    wide = sums_dtype(hidden, weight)
    logits = min(hidden[..., 0].numel(), max(chunk // len(weight), 1)) * len(weight)
    return (2 if hidden.dtype == weight.dtype == wide else 4) * logits * wide.itemsize


OP = FusedOp(
    name="projected_token_log_prob",
    call=projected_token_log_prob,
    reference=reference,
    naive=naive,
    cases=_cases,
    cost=_cost,
    workspace=_workspace,
)
