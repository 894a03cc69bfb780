"""Importance resampling of a prior in one pass: draws of p(z) w(z) / Z from M proposals each, of which none is kept.

With z_m ~ p, weights w_m and standard exponential numbers e_m (-log e_m are Gumbel numbers), the proposal

    argmax_m  log w_m - log e_m

is number m with probability w_m / sum_m w_m, exactly (Yellott 1977, "Luce's choice axiom"; as a stream of keys: Efraimidis and Spirakis
2006). Only the winner's number is kept, and its z is made again from its counter (`meme_dist.noise`): memory does not grow with M. The
same pass gives, for each draw,

    log Z = log (1/M) sum_m w_m,   and the effective sample size (sum w)^2 / sum w^2

The law of a draw is that of p w / Z as M grows: the bias falls as (1 + variance of w / Z^2) / M. With M = 1 a draw is p's own.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from meme_dist.distributions import Prior
from meme_dist.noise import Noise

LogWeight = Callable[[Float[Tensor, "R D"]], Float[Tensor, " R"]]

BLOCK = 256  # proposals whose weights are added up together: sums do not depend on how many blocks are scored at once
POINTS = (
    2**15
)  # proposals of all rows that are scored at once, at most; twice as many take twice as long on a CPU: activations leave its caches
GRID = 2.0**-24  # of `Noise.uniform`


class Resampled(NamedTuple):
    """A draw for each sample and row, with what its own M proposals say of Z; double precision where weights are concerned."""

    z: Float[Tensor, "K B D"]
    log_z: Float[Tensor, "K B"]
    effective: Float[Tensor, "K B"]  # of the weights that were drawn by, 1 .. M


class _Running(NamedTuple):
    """What is kept of the proposals so far."""

    key: Float[Tensor, " B"]
    winner: Int[Tensor, " B"]
    total: Float[Tensor, " B"]  # log sum w, as it is
    clipped: Float[Tensor, " B"]  # log sum w, w at most the ceiling
    squares: Float[Tensor, " B"]  # log sum w^2, w at most the ceiling


@torch.no_grad()
def resample(
    base: Prior,
    log_weight: LogWeight,
    noise: Noise,
    purpose: str,
    num: int,
    *,
    proposals: int,
    ceiling: float = math.inf,
    chunk: int = BLOCK,
) -> Resampled:
    """`num` draws for each row of `noise`, each from `proposals` of its own.

    Log weights above `ceiling` are drawn by as if they were `ceiling`; log_z takes them as they are. `chunk` proposals of a row are scored
    at once (rounded up to whole blocks): it changes memory and speed, and the result by no more than a ratio's own rounding, which for
    float32 networks depends on how many points they are given. Proposal m of draw d is draw d M + m of the base. Raises ValueError for
    less than one proposal, and where weights are NaN, infinite, or all of them 0.
    """
    if proposals < 1:
        raise ValueError(f"proposals: expected at least 1, got {proposals}")
    chunk = BLOCK * -(-chunk // BLOCK)
    rows = max(1, POINTS // min(chunk, proposals))
    drawn = []
    for sample in range(num):
        keyed = f"{purpose}/{sample}" if sample else purpose  # one draw from one proposal is the base's own draw
        parts = [Noise(noise.seed, draw) for draw in noise.draw.split(rows)]
        each = [_resample(base, log_weight, part, keyed, proposals, ceiling, chunk) for part in parts]
        drawn.append(Resampled(*(torch.cat(pieces) for pieces in zip(*each, strict=True))))
    together = Resampled(*(torch.stack(pieces) for pieces in zip(*drawn, strict=True)))
    if not bool(together.log_z.isfinite().all()):
        raise ValueError(
            "log weights: expected finite ones, got NaN, infinities, or a draw all of whose weights are 0; is the ratio trained?"
        )
    return together


def _resample(base: Prior, log_weight: LogWeight, noise: Noise, purpose: str, proposals: int, ceiling: float, chunk: int) -> Resampled:
    none = torch.full(noise.draw.shape, -torch.inf, dtype=torch.float64, device=noise.draw.device)
    state = _Running(none, torch.zeros_like(noise.draw), none, none, none)
    for first in range(0, proposals, chunk):
        last = min(proposals, first + chunk)
        numbers = (noise.draw[:, None] * proposals + torch.arange(first, last, device=noise.draw.device)).flatten()
        at = Noise(noise.seed, numbers)
        weight = log_weight(base.sample(at, purpose, 1)[0]).double()
        shape = (len(noise.draw), last - first)
        state = _scored(state, weight.view(shape), _log_exponential(at, purpose).view(shape), first, ceiling)
    winners = Noise(noise.seed, noise.draw * proposals + state.winner)
    z = base.sample(winners, purpose, 1)[0]
    return Resampled(z, state.total - math.log(proposals), (2 * state.clipped - state.squares).exp())


def _scored(
    state: _Running, log_weight: Float[Tensor, "B C"], log_exponential: Float[Tensor, "B C"], first: int, ceiling: float
) -> _Running:
    low = log_weight.clamp(max=ceiling)
    key, place = (low - log_exponential).max(1)
    better = key > state.key
    total, clipped, squares = state.total, state.clipped, state.squares
    for block, cut in zip(log_weight.split(BLOCK, 1), low.split(BLOCK, 1), strict=True):
        total = torch.logaddexp(total, block.logsumexp(1))
        clipped = torch.logaddexp(clipped, cut.logsumexp(1))
        squares = torch.logaddexp(squares, (2 * cut).logsumexp(1))
    return _Running(torch.where(better, key, state.key), torch.where(better, place + first, state.winner), total, clipped, squares)


def _log_exponential(noise: Noise, purpose: str) -> Float[Tensor, " R"]:
    """log of standard exponential numbers, one a draw, in double precision.

    The smallest of M decide, and one uniform number has 2^-24 as its smallest step: a second one gives the digits below.
    """
    coarse, fine = noise.uniform(f"{purpose}/exponential", 1, 2)[0].double().unbind(-1)
    return torch.log(-torch.log1p(-(coarse + (fine - 0.5) * GRID).clamp(max=1 - GRID / 2)))


class Normaliser(NamedTuple):
    """What base draws say of Z, and how well draws of `proposals` each can be resampled.

    log Z is skewed: as long as the draws have missed the points with the largest weights it is too low, and its error too small. Where it
    rests on few effective draws it is no more than a lower guess.
    """

    log_z: float
    error: float  # standard error of log_z
    pooled: float  # effective number of the base draws that log_z rests on
    spread: float  # standard deviation of one draw's log Z
    effective: float  # mean effective sample size of a draw, out of `proposals`
    proposals: int


def normaliser(drawn: Resampled, proposals: int) -> Normaliser:
    """log of the mean Z over all draws, its error by the delta method, and how far the log Z of single draws spread."""
    log_z, effective = drawn.log_z.flatten(), drawn.effective.flatten()
    together = float(log_z.logsumexp(0)) - math.log(len(log_z))
    pooled = float((2 * log_z.logsumexp(0) - (2 * log_z - effective.log()).logsumexp(0)).exp())
    error = math.sqrt(max(0.0, 1 / pooled - 1 / (len(log_z) * proposals)))
    return Normaliser(together, error, pooled, float(log_z.std(correction=min(1, len(log_z) - 1))), float(effective.mean()), proposals)
