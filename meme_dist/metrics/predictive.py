"""Draws from a likelihood, and what a set of draws says about the value that came: its place among them, intervals, CRPS.

How many draws lie below it, the interval that they span, and their score:

    rank      how many of S draws lie below x, ties broken at random: uniform on 0..S where draws and x come from one density
    interval  between the i-th smallest and the i-th largest draw, i = (1 - level) (S + 1) / 2: holds x with probability `level`, exactly
    CRPS      E|X - x| - E|X - X'| / 2, its unbiased estimate from S draws (Gneiting and Raftery 2007)
"""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from meme_dist.likelihoods import SCALE_FLOOR, Laplace, Likelihood, NegativeBinomial, Normal, Poisson
from meme_dist.noise import Noise


def can_draw(likelihood: Likelihood) -> bool:
    """Whether `draw` knows this likelihood: Normal, Laplace, Poisson and negative binomial."""
    return isinstance(likelihood, Normal | Laplace | Poisson | NegativeBinomial)


def standard(likelihood: Likelihood, noise: Noise, purpose: str, num: int, size: int) -> Float[Tensor, "{num} B {size}"] | None:
    """The noise that `draw` scales and moves, to be made once for many parameters; None where draws are no such thing (counts)."""
    if isinstance(likelihood, Normal | Laplace):
        return (noise.normal if isinstance(likelihood, Normal) else noise.laplace)(purpose, num, size)
    return None


def draw(
    likelihood: Likelihood,
    params: Float[Tensor, "K R *event"],
    noise: Noise,
    purpose: str,
    made: Float[Tensor, "K R E"] | None = None,
) -> Float[Tensor, "K R *event"]:
    """One draw of the data for each set of parameters; row r's are a pure function of its noise. Raises ValueError for other likelihoods.

    `made`: the `standard` noise of these rows, where it is there already. Counts come from NumPy's generators, on the CPU, one generator a
    row, keyed as the row's noise is.
    """
    if isinstance(likelihood, Normal | Laplace):
        made = standard(likelihood, noise, purpose, len(params), params[0, 0].numel()) if made is None else made
        assert made is not None
        return params + likelihood.scale(params) * made.view_as(params)
    if isinstance(likelihood, Poisson):
        return _counts(likelihood.mean(params), None, noise, purpose)
    if isinstance(likelihood, NegativeBinomial):
        return _counts(likelihood.mean(params), F.softplus(likelihood.raw) + SCALE_FLOOR, noise, purpose)
    raise ValueError(f"draw: expected a Normal, Laplace, Poisson or NegativeBinomial likelihood, got {type(likelihood).__name__}")


def _counts(
    rate: Float[Tensor, "K R *event"], dispersion: Float[Tensor, "*event"] | None, noise: Noise, purpose: str
) -> Float[Tensor, "K R *event"]:
    """Poisson counts; with a dispersion r their rate is multiplied by a Gamma(r, 1/r), which makes them negative binomial."""
    rates, low, high = rate.detach().double().cpu().numpy(), *noise.keys([purpose])[0].tolist()
    shape = None if dispersion is None else np.broadcast_to(dispersion.detach().double().cpu().numpy(), rates[:, 0].shape)
    made = np.empty_like(rates)
    for row, number in enumerate(noise.draw.tolist()):
        generator = np.random.Generator(np.random.Philox(key=np.array([low | high << 32, number], dtype=np.uint64)))
        spread = 1.0 if shape is None else generator.standard_gamma(shape) / shape
        made[:, row] = generator.poisson(rates[:, row] * spread)
    return torch.from_numpy(made).to(rate)


def rank(draws: Float[Tensor, "S R E"], x: Float[Tensor, "R E"], noise: Noise, purpose: str) -> Int[Tensor, "R E"]:
    """The number of draws below x, plus, of those that equal it, a random number from none to all."""
    below, equal = (draws < x).sum(0), (draws == x).sum(0)
    if not bool(equal.any()):
        return below
    pick = noise.uniform(purpose, 1, x[0].numel()).view_as(x)
    return below + (pick * (equal + 1)).ceil().long().sub(1).clamp(min=0)


def covered(rank: Int[Tensor, "R E"], draws: int, level: float) -> Float[Tensor, "R E"]:
    """1 where the value of this rank among `draws` draws lies in their central interval. Raises ValueError where the level is no rank's."""
    edge = (1 - level) * (draws + 1) / 2
    if abs(edge - round(edge)) > 1e-9 or round(edge) < 1:
        raise ValueError(f"a central {level:.0%} interval of {draws} draws ends between two of them; take 39 or 199")
    return ((rank >= round(edge)) & (rank <= draws - round(edge))).double()


def crps(draws: Float[Tensor, "S R E"], x: Float[Tensor, "R E"]) -> Float[Tensor, "R E"]:
    """The continuous ranked probability score of each value, in the value's own unit; smaller is better. Two draws at least."""
    num = len(draws)
    # A tenth of the time that PyTorch's own takes for many short rows on a CPU.
    ordered = torch.from_numpy(np.sort(draws.numpy(force=True), 0)) if draws.device.type == "cpu" else draws.sort(0).values
    weight = 2 * torch.arange(1, num + 1, device=draws.device, dtype=draws.dtype) - num - 1
    spread = torch.einsum("s,s...->...", weight, ordered) / (num * (num - 1))  # half of the mean |X - X'| over different draws
    return (draws - x).abs().mean(0) - spread
