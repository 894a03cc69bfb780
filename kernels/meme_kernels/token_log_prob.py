"""Log probability of token rows under categorical logits; padding counts nowhere:

    out[k, p] = sum over t with token != padding of  logit[k, p, t, token] - log sum_v exp(logit[k, p, t, v])

Forward reads the logits once, in chunks of the vocabulary with a running maximum, and saves at each position that maximum and the
logarithm of the remaining sum, apart, so that a large number common to all logits costs no digits; 6 flops a logit. Backward reads the
logits once more and writes

    gradient of a logit:  g[k, p] (1[v = token] - exp(logit - lse)),   0 at padding

5 flops a logit. Nothing at padding is read, so whatever stands there reaches nothing. No table of probabilities is held, every sum is
taken in one order: no atomics, bitwise repeatable.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from meme_kernels._launch import block, cdiv
from meme_kernels._math import exp
from meme_kernels._op import Case, Cost, FusedOp, Size, check_row, nbytes, opaque, run, sums_dtype, through_reference, uses_triton
from meme_kernels._triton import jit, tl


def token_log_prob(tokens: Tensor, logits: Tensor, padding: int, *, row: Tensor | None = None) -> Tensor:
    """tokens int64 [X, T], logits [K, P, T, V] -> [K, P], float32 (float64 for float64); `padding` is the id that is skipped.

    The packed row p has the tokens of row[p], row int64 [P]; without `row` those of p. A logit of -inf forbids its entry. Raises ValueError
    for other shapes and, on the CPU, for ids outside the vocabulary that are not padding and for numbers in `row` that name no row; on a
    GPU these give NaN.
    """
    _check(tokens, logits, row)
    if not uses_triton(tokens, logits, row):
        return reference(tokens, logits, padding, row=row)
    return _Token.apply(tokens, row, logits, padding).sum(-1)


def reference(tokens: Tensor, logits: Tensor, padding: int, *, row: Tensor | None = None) -> Tensor:
    """The specification, on any device and in any floating type."""
    check_row(row, len(tokens), "token_log_prob")
    ids = (tokens if row is None else tokens[row]).expand(logits.shape[:-1])
    return at_positions(ids.reshape(-1), logits.flatten(0, -2), padding).view(ids.shape).sum(-1)


def naive(tokens: Tensor, logits: Tensor, padding: int, *, row: Tensor | None = None) -> Tensor:
    """As commonly written: a table of log probabilities, one entry of each row picked, padding masked."""
    ids = (tokens if row is None else tokens[row]).expand(logits.shape[:-1])
    kept = ids != padding
    table = torch.log_softmax(torch.where(kept[..., None], logits, 0.0), -1)
    return torch.where(kept, table.gather(-1, torch.where(kept, ids, 0)[..., None])[..., 0], 0.0).sum(-1)


def at_positions(ids: Tensor, logits: Tensor, padding: int) -> Tensor:
    """Log probabilities [C] of ids [C] under logits [C, V], 0 at padding, in plain PyTorch."""
    check_ids(ids, padding, logits.shape[-1])
    kept = ids != padding
    logits = logits.to(sums_dtype(logits)).masked_fill(~kept[:, None], 0.0)
    return -F.cross_entropy(logits, ids, ignore_index=padding, reduction="none")


def check_ids(ids: Tensor, padding: int, vocabulary: int) -> None:
    """Raises ValueError for ids outside the vocabulary that are not padding, where looking at them does not stop a GPU or a compiler."""
    if ids.device.type == "cpu" and not torch.compiler.is_compiling():
        ids = ids[ids != padding]
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            raise ValueError(f"expected ids from 0 to {vocabulary - 1} or padding, got {int(ids.min())} to {int(ids.max())}")


def check_rows(tokens: Tensor, lead: torch.Size, row: Tensor | None, what: str) -> None:
    """Raises ValueError unless tokens [X, T] and row [P] give tokens for leading axes [K, P, T]."""
    packed = tuple(tokens.shape[:1]) if row is None else tuple(row.shape)
    integers = tokens.dtype == torch.int64 and (row is None or row.dtype == torch.int64)
    if tokens.dim() != 2 or len(lead) != 3 or packed != tuple(lead[1:2]) or tokens.shape[1] != lead[2] or not integers:
        got = f"tokens {tuple(tokens.shape)} {tokens.dtype}, row {None if row is None else (tuple(row.shape), row.dtype)}, {tuple(lead)}"
        raise ValueError(f"{what}: expected int64 tokens [X, T], int64 row [P] (without it X = P) and leading axes [K, P, T], got {got}")


def _check(tokens: Tensor, logits: Tensor, row: Tensor | None) -> None:
    if logits.dim() != 4:
        raise ValueError(f"token_log_prob: expected logits [K, P, T, V], got {tuple(logits.shape)}")
    check_rows(tokens, logits.shape[:3], row, "token_log_prob")


# ---- kernels ----------------------------------------------------------------------------------------------------------------------------


@jit
def _token_at(position, tokens_ptr, row_ptr, padding, X, P, T, inside):
    """The token of each position (k, p, t), and whether there is one; -1 for a row that does not exist."""
    row = (position // T) % P
    if row_ptr is not None:
        row = tl.load(row_ptr + row, mask=inside, other=0)
    exists = (row >= 0) & (row < X)
    token = tl.load(tokens_ptr + row * T + position % T, mask=inside & exists, other=-1)
    return token, inside & ((token != padding) | (row < 0) | (row >= X))


@jit
def _forward_kernel(
    tokens_ptr, row_ptr, logits_ptr, values_ptr, lse_ptr, padding, X, P, T, C, V,
    BC: tl.constexpr, BV: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Log probabilities and the two parts of the log-sum-exps [C, 2], largest logit and rest, at BC of the C positions; logits [C, V]."""
    c = tl.program_id(0).to(tl.int64) * BC + tl.arange(0, BC)
    token, kept = _token_at(c, tokens_ptr, row_ptr, padding, X, P, T, c < C)
    top = tl.full((BC,), float("-inf"), ACC)
    total = tl.zeros((BC, BV), ACC)  # a sum and a token's logit in each lane: one reduction after the loop
    chosen = tl.zeros((BC, BV), ACC)
    v = tl.arange(0, BV)
    for start in range(0, V, BV):
        entry = start + v[None, :]
        x = tl.load(logits_ptr + c[:, None] * V + entry, mask=kept[:, None] & (entry < V), other=float("-inf")).to(ACC)
        new = tl.maximum(top, tl.max(x, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        total = total * exp(top - safe)[:, None] + exp(x - safe[:, None])
        chosen = tl.where(entry == token[:, None], x, chosen)
        top = new
    total = tl.sum(total, 1)
    known = (token >= 0) & (token < V)
    rest = tl.where(total == 0.0, float("-inf"), tl.log(tl.where(total == 0.0, 1.0, total)))
    value = tl.where(known, (tl.sum(chosen, 1) - tl.where(kept, top, 0.0)) - tl.where(kept, rest, 0.0), float("nan"))
    tl.store(lse_ptr + 2 * c, top, mask=c < C)
    tl.store(lse_ptr + 2 * c + 1, rest, mask=c < C)
    tl.store(values_ptr + c, tl.where(kept, value, 0.0), mask=c < C)


@jit
def _backward_kernel(
    g_ptr, tokens_ptr, row_ptr, logits_ptr, lse_ptr, out_ptr, padding, X, P, T, C, V,
    BC: tl.constexpr, BV: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile [BC, BV] of logits."""
    tiles = tl.cdiv(V, BV)
    program = tl.program_id(0).to(tl.int64)
    # Columns of the tile throughout: for vectors whose masks are loaded, Triton 3.6 and 3.7 can mix up layouts (float64, BC 32 or 64).
    c = ((program // tiles) * BC + tl.arange(0, BC))[:, None]
    entry = ((program % tiles) * BV + tl.arange(0, BV))[None, :]
    token, kept = _token_at(c, tokens_ptr, row_ptr, padding, X, P, T, c < C)
    g = tl.load(g_ptr + c, mask=kept, other=0.0).to(ACC)
    top = tl.load(lse_ptr + 2 * c, mask=kept, other=0.0)
    rest = tl.load(lse_ptr + 2 * c + 1, mask=kept, other=0.0)
    at, inside = c * V + entry, (c < C) & (entry < V)
    x = tl.load(logits_ptr + at, mask=kept & inside, other=float("-inf")).to(ACC)
    gradient = g * (tl.where(entry == token, 1.0, 0.0) - exp(x - top - rest))
    tl.store(out_ptr + at, gradient.to(out_ptr.dtype.element_ty), mask=inside)  # at padding 0 (0 - exp(-inf))


# ---- launch and binding -----------------------------------------------------------------------------------------------------------------


def _fake_log_probs(tokens: Tensor, row: Tensor | None, logits: Tensor, padding: int) -> tuple[Tensor, Tensor]:
    values = logits.new_empty(logits.shape[0], dtype=sums_dtype(logits))
    return values, values.new_empty(logits.shape[0], 2)


@opaque(_fake_log_probs)
def log_probs(tokens: Tensor, row: Tensor | None, logits: Tensor, padding: int) -> tuple[Tensor, Tensor]:
    """Log probabilities [C] and log-sum-exps [C, 2] in two parts at the positions (k, p, t), in that order, from their logits [C, V]."""
    values, lse = _fake_log_probs(tokens, row, logits, padding)
    bc, bv = _blocks(*logits.shape)
    run(
        _forward_kernel, (cdiv(len(logits), bc),), *_contiguous(tokens, row, logits), values, lse, padding,
        *_sizes(tokens, row, logits), BC=bc, BV=bv, ACC=_accumulator(values), num_warps=4,
    )  # fmt: skip
    return values, lse


def _fake_gradients(g: Tensor, tokens: Tensor, row: Tensor | None, logits: Tensor, lse: Tensor, padding: int) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@opaque(_fake_gradients)
def gradients(g: Tensor, tokens: Tensor, row: Tensor | None, logits: Tensor, lse: Tensor, padding: int) -> Tensor:
    """The gradient of the logits [C, V] from that of the log probabilities [C]."""
    out = _fake_gradients(g, tokens, row, logits, lse, padding)
    bc, bv = _blocks(*logits.shape)
    run(
        _backward_kernel, (cdiv(len(logits), bc) * cdiv(logits.shape[1], bv),), g.contiguous(), *_contiguous(tokens, row, logits), lse, out,
        padding, *_sizes(tokens, row, logits), BC=bc, BV=bv, ACC=_accumulator(lse), num_warps=4,
    )  # fmt: skip
    return out


def _blocks(positions: int, vocabulary: int) -> tuple[int, int]:
    """2048 logits a program, 16 a thread: whole rows of small vocabularies, a chunk of a row of large ones."""
    entries = block(vocabulary, least=16, most=2048)
    return block(positions, most=2048 // entries), entries


def _contiguous(tokens: Tensor, row: Tensor | None, logits: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    return tokens.contiguous(), None if row is None else row.contiguous(), logits.contiguous()


def _sizes(tokens: Tensor, row: Tensor | None, logits: Tensor) -> tuple[int, ...]:
    return len(tokens), len(tokens) if row is None else len(row), tokens.shape[1], *logits.shape


def _accumulator(like: Tensor) -> Any:
    return tl.float64 if like.dtype == torch.float64 else tl.float32


class _Token(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, row: Tensor | None, logits: Tensor, padding: int) -> Tensor:
        values, lse = log_probs(tokens, row, logits.flatten(0, -2), padding)
        ctx.save_for_backward(tokens, row, logits, lse)
        ctx.padding = padding
        return values.view(logits.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> tuple[Tensor | None, ...]:
        tokens, row, logits, lse = ctx.saved_tensors
        if torch.is_grad_enabled():
            ids = (tokens if row is None else tokens[row]).expand(logits.shape[:-1])
            flat = [g[0].reshape(-1)]
            return (
                None,
                None,
                *through_reference(lambda x: at_positions(ids.reshape(-1), x.flatten(0, -2), ctx.padding), [logits], flat),
                None,
            )
        return None, None, gradients(g[0].reshape(-1), tokens, row, logits.flatten(0, -2), lse, ctx.padding).view(logits.shape), None


# ---- what the op says of itself ---------------------------------------------------------------------------------------------------------

# samples, packed rows, tokens, vocabulary, rows of tokens (0: as many as packed rows, no `row`)
_SIZES: dict[Size, list[tuple[int, int, int, int, int]]] = {
    "tiny": [
        (1, 1, 1, 2, 0),
        (2, 3, 5, 7, 0),
        (1, 4, 3, 27, 2),
        (3, 2, 1, 130, 0),
        (1, 2, 3, 2050, 0),
        (2, 17, 9, 16, 5),
        (0, 2, 3, 4, 0),
        (2, 0, 3, 4, 2),
        (2, 3, 0, 4, 0),
    ],
    "small": [(11, 128, 8, 27, 0)],
    "paper": [(11, 128, 32, 1590, 0)],
    "large": [(1, 256, 64, 32000, 0), (8, 1024, 64, 256, 512), (1, 16, 64, 200000, 0)],
}


def _cases(size: Size, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    for num, rows, length, vocabulary, sources in _SIZES[size]:
        tokens = torch.randint(vocabulary, (sources or rows, length), device=device)  # id 0 is padding
        row = torch.randint(sources, (rows,), device=device) if sources else None
        logits = torch.randn(num, rows, length, vocabulary, device=device).to(dtype).requires_grad_()
        yield Case(f"K={num} P={rows} T={length} V={vocabulary}{' by row' if sources else ''}", (tokens, logits, 0), {"row": row})


def _cost(tokens: Tensor, logits: Tensor, padding: int, *, row: Tensor | None = None, backward: bool = False) -> Cost:
    """Logits and each position's token and row read, its log probability and log-sum-exp in two parts written; as if none were padding."""
    positions = logits[..., 0].numel()
    item = sums_dtype(logits).itemsize
    read, each = nbytes(logits) + 8 * positions * (1 if row is None else 2), positions * 3 * item
    return Cost(read + each, nbytes(logits), 5 * logits.numel()) if backward else Cost(read, each, 6 * logits.numel())


OP = FusedOp(name="token_log_prob", call=token_log_prob, reference=reference, naive=naive, cases=_cases, cost=_cost)
