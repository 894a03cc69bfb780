"""Markov chains over z, many at once: Hamiltonian and Langevin kernels on any differentiable log density, on a budget of gradients.

A chain is a value: its point with the log density and the gradient there, so that no gradient is ever taken twice. One trajectory of HMC
(Duane et al. 1987; Neal 2011, "MCMC using Hamiltonian dynamics", fig. 2) with momentum p ~ N(0, I), step size h and L leapfrogs:

    p <- p + h/2 grad log pi(z);   z <- z + h p;   p <- p + h/2 grad log pi(z)         L times, one new gradient each
    accept with probability min(1, exp(H(z, p) - H(z', p'))),   H = -log pi(z) + |p|^2 / 2

On N(0, I) trajectories have the period 2 pi: at h L = 2 pi they end where they began, accepted and in vain. So each has a step of its own,
h (1 + jitter u) with u uniform on (-1, 1) and drawn beside the state, which keeps detailed balance (Neal 2011, sec. 3.2).

L = 1 is MALA (Roberts and Tweedie 1996) with proposal N(z + h^2/2 grad log pi(z), h^2 I); ULA is the same proposal, always accepted. A
proposal that is not finite (its point, density or gradient) is refused and counted. Gradients are taken with respect to z alone: whatever
the density is made of keeps its own `.grad`. Random numbers are those of `meme_dist.noise`, keyed by chain, step and purpose: a chain's
path does not depend on the chains beside it.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from meme_dist.noise import Noise

LogDensity = Callable[[Float[Tensor, "C D"]], Float[Tensor, " C"]]
"""log pi(z) of each chain up to a constant, differentiable in z; a chain's value depends on its own z alone."""

FIRST = 0.3  # of a Langevin kernel, where the target is about N(0, I): on the safe side for 16 to 64 coordinates, and adapted from there
BLOCK = 16  # steps whose random numbers are drawn together: a generator of counters costs as much for one step as for many
SHRINKAGE, DELAY, DECAY = 0.2, 10.0, 0.75  # gamma, t_0 and kappa of dual averaging; published: gamma 0.05, which 200 steps do not settle
ADAM = (0.9, 0.99, 1e-8)  # decay of the first and the second moment, floor of the root


class Chain(NamedTuple):
    """Where each chain is, and what is known there."""

    z: Float[Tensor, "C D"]
    log_density: Float[Tensor, " C"]
    grad: Float[Tensor, "C D"]


class Draws(NamedTuple):
    """The random numbers of one step: standard Normal momenta, uniforms on (0, 1] for the test, and on (-1, 1] for the size of the step."""

    momentum: Float[Tensor, "C D"]
    uniform: Float[Tensor, " C"]
    stretch: Float[Tensor, " C"]


class Info(NamedTuple):
    """What became of a proposal: its probability of being accepted, and H(z', p') - H(z, p), infinite where it was not finite."""

    accept: Float[Tensor, " C"]
    energy_error: Float[Tensor, " C"]


class HMC(NamedTuple):
    """Hamiltonian Monte Carlo: `leapfrogs` gradients a step, step sizes adapted to accept a share of `target`.

    A trajectory's own step is longer or shorter by up to the share `jitter`. Measured on Normals of 16 coordinates with 5 to 20 leapfrogs,
    effective draws of the worst decile of 100 chains: at .3 0.8 to 5 times those of no jitter; at .5 0.8 to 1.7 times those of .3, but a
    start from afar is forgotten later.
    """

    leapfrogs: int = 5
    target: float = 0.8
    jitter: float = 0.3

    @property
    def first_step(self) -> float:
        """Where the target is about N(0, I): at most a quarter of a period a trajectory, which forgets where it began."""
        return min(FIRST, math.pi / (2 * self.leapfrogs))


class ULA(NamedTuple):
    """Unadjusted Langevin: every finite proposal is taken. Its step sizes are those at which MALA would accept a share of `target`."""

    target: float = 0.8

    @property
    def first_step(self) -> float:
        """Where the target is about N(0, I)."""
        return FIRST


class MAP(NamedTuple):
    """Ascent to a mode by Adam (Kingma and Ba 2015): steps of about `rate`, which falls to 0 along a half cosine. Keeps the best point."""

    rate: float = 0.1


MALA = HMC(leapfrogs=1, target=0.574, jitter=0.0)  # the target is optimal for many independent coordinates (Roberts and Rosenthal 1998)
Kernel = HMC | ULA | MAP


class State(NamedTuple):
    """A step of `walk`: the chains after it, the step sizes it was made with but for the jitter, and what became of its proposals."""

    chain: Chain
    step_size: Float[Tensor, " C"]
    info: Info


class Result(NamedTuple):
    """The last state of each chain and how it got there; `gradients` counts the evaluations that each chain made.

    `accept` is the mean acceptance probability after the burn-in (for ULA that of MALA's test; 1 for MAP); `failed` the number of
    proposals that were not finite.
    """

    chain: Chain
    step_size: Float[Tensor, " C"]
    accept: Float[Tensor, " C"]
    failed: Int[Tensor, " C"]
    gradients: int


# ---- kernels ------------------------------------------------------------------------------------------------------------------------


def start(z: Float[Tensor, "C D"], log_density: LogDensity) -> Chain:
    """Chains at z: one evaluation of the density and its gradient, with respect to z alone."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        value = log_density(z)
        (grad,) = torch.autograd.grad(value.sum(), z)
    return Chain(z.detach(), value.detach(), grad)


def leapfrog(
    chain: Chain, momentum: Float[Tensor, "C D"], log_density: LogDensity, *, step_size: Float[Tensor, " C"], leapfrogs: int
) -> tuple[Chain, Float[Tensor, "C D"]]:
    """Follow Hamilton's equations for `leapfrogs` steps: reversible, and it keeps volumes. One evaluation a step."""
    step = step_size[:, None]
    for _ in range(leapfrogs):
        momentum = momentum + step / 2 * chain.grad
        chain = start(chain.z + step * momentum, log_density)
        momentum = momentum + step / 2 * chain.grad
    return chain, momentum


def hmc(chain: Chain, log_density: LogDensity, *, step_size: Float[Tensor, " C"], leapfrogs: int, draws: Draws) -> tuple[Chain, Info]:
    """One trajectory and its test; MALA with `leapfrogs` = 1."""
    proposal, info = _propose(chain, log_density, step_size, leapfrogs, draws.momentum)
    return _chosen(draws.uniform <= info.accept, proposal, chain), info


def ula(chain: Chain, log_density: LogDensity, *, step_size: Float[Tensor, " C"], draws: Draws) -> tuple[Chain, Info]:
    """One Langevin step without a test: z + h^2/2 grad log pi(z) + h xi. `info` says what MALA's test would have done."""
    proposal, info = _propose(chain, log_density, step_size, 1, draws.momentum)
    return _chosen(info.energy_error.isfinite(), proposal, chain), info


def _propose(chain: Chain, log_density: LogDensity, step_size: Tensor, leapfrogs: int, momentum: Tensor) -> tuple[Chain, Info]:
    proposal, end = leapfrog(chain, momentum, log_density, step_size=step_size, leapfrogs=leapfrogs)
    kinetic = (end.square() - momentum.square()).sum(-1) / 2
    error = chain.log_density - proposal.log_density + kinetic
    finite = error.isfinite() & proposal.grad.isfinite().all(-1) & proposal.z.isfinite().all(-1)
    error = torch.where(finite, error, torch.inf)
    return proposal, Info(torch.exp(-error.clamp(min=0)), error)


def _chosen(accepted: Bool[Tensor, " C"], proposal: Chain, chain: Chain) -> Chain:
    wide = accepted[:, None]
    return Chain(
        torch.where(wide, proposal.z, chain.z),
        torch.where(accepted, proposal.log_density, chain.log_density),
        torch.where(wide, proposal.grad, chain.grad),
    )


def draws(noise: Noise, purpose: str, like: Float[Tensor, "C D"]) -> Iterator[Draws]:
    """The random numbers of step after step, without an end, for chains as many and as wide as `like`.

    `noise` has as many draws as there are chains, or one for each of B rows with K chains: C = K B, laid out as [K, B]. Raises ValueError
    for any other number.
    """
    copies, rest = divmod(len(like), len(noise.draw))
    if rest:
        raise ValueError(f"noise: expected as many draws as chains, or a divisor of them, got {len(noise.draw)} for {len(like)} chains")
    for block in itertools.count():
        normal = noise.normal(f"{purpose}/{block}/momentum", copies * BLOCK, like.shape[-1])
        uniform = noise.uniform(f"{purpose}/{block}/accept", copies * BLOCK, 2)  # for the test and the size: one call of the generator
        by_step = (x.to(like.dtype).unflatten(0, (copies, BLOCK)).transpose(0, 1).flatten(1, 2) for x in (normal, uniform))
        yield from (Draws(momentum, level[:, 0], 2 * level[:, 1] - 1) for momentum, level in zip(*by_step, strict=True))


# ---- step sizes ---------------------------------------------------------------------------------------------------------------------


class Averaging(NamedTuple):
    """Dual averaging of each chain's step size (Hoffman and Gelman 2014, sec. 3.2): `step_size` explores, exp(`log_mean`) is kept."""

    step_size: Float[Tensor, " C"]
    log_mean: Float[Tensor, " C"]
    error: Float[Tensor, " C"]
    centre: Float[Tensor, " C"]
    count: int


def averaging(step_size: Float[Tensor, " C"]) -> Averaging:
    """Before the first step. It is drawn to the first step size itself, not to the published tenfold: budgets here are short."""
    return Averaging(step_size, step_size.log(), torch.zeros_like(step_size), step_size.log(), 0)


def averaged(state: Averaging, accept: Float[Tensor, " C"], *, target: float) -> Averaging:
    """After a step that was accepted with this probability, chain by chain."""
    count = state.count + 1
    error = state.error + (target - accept - state.error) / (count + DELAY)
    log_step = state.centre - math.sqrt(count) / SHRINKAGE * error
    log_mean = state.log_mean + count**-DECAY * (log_step - state.log_mean)
    return Averaging(log_step.exp(), log_mean, error, state.centre, count)


# ---- chains -------------------------------------------------------------------------------------------------------------------------


def walk(
    chain: Chain,
    log_density: LogDensity,
    *,
    kernel: HMC | ULA,
    steps: int,
    burn_in: int,
    step_size: Float[Tensor, " C"],
    noise: Noise,
    purpose: str,
) -> Iterator[State]:
    """Step by step: step sizes adapt, each chain's own, for `burn_in` steps and are frozen from then on. `noise` as for `draws`."""
    adapted = averaging(step_size)
    for step, drawn in enumerate(itertools.islice(draws(noise, purpose, chain.z), steps)):
        size = adapted.step_size if step < burn_in else adapted.log_mean.exp()
        if isinstance(kernel, HMC):
            own = size * (1 + kernel.jitter * drawn.stretch)
            chain, info = hmc(chain, log_density, step_size=own, leapfrogs=kernel.leapfrogs, draws=drawn)
        else:
            chain, info = ula(chain, log_density, step_size=size, draws=drawn)
        if step < burn_in:
            adapted = averaged(adapted, info.accept, target=kernel.target)
        yield State(chain, size, info)


def sample(
    log_density: LogDensity,
    z: Float[Tensor, "C D"],
    *,
    kernel: Kernel,
    budget: int,
    noise: Noise,
    purpose: str = "mcmc",
    step_size: float | None = None,
    burn_in: float = 0.5,
) -> Result:
    """Chains from z until the next step would take more than `budget` gradient evaluations a chain, the one at z included.

    `step_size`: of the first step, by default the kernel's `first_step`, for targets of about unit scale. `burn_in`: the share of the steps
    in which step sizes adapt, below 1. MAP reads neither, nor the noise. Raises ValueError for a budget without a single step, and where
    the density or its gradient is not finite at z.
    """
    cost = kernel.leapfrogs if isinstance(kernel, HMC) else 1
    if cost < 1:
        raise ValueError(f"leapfrogs: expected at least 1, got {cost}")
    if budget < 1 + cost:
        raise ValueError(f"budget: {kernel} needs at least {1 + cost} gradients (one at the start, one a leapfrog), got {budget}")
    if isinstance(kernel, HMC) and not 0 <= kernel.jitter < 1:
        raise ValueError(f"jitter: expected a share of the step from 0 to below 1, got {kernel.jitter}")
    if not 0 <= burn_in < 1 or not (step_size is None or step_size > 0):
        raise ValueError(f"expected a step size above 0 and a burn-in from 0 to below 1, got {step_size} and {burn_in}")
    chain, steps = start(z, log_density), (budget - 1) // cost
    if bad := int((~(chain.log_density.isfinite() & chain.grad.isfinite().all(-1))).sum()):
        raise ValueError(f"{bad} of {len(z)} chains start where the log density or its gradient is not finite; start them elsewhere")
    if isinstance(kernel, MAP):
        return _ascended(chain, log_density, kernel.rate, steps)
    adapting = int(burn_in * steps)
    first = torch.full_like(chain.log_density, kernel.first_step if step_size is None else step_size)
    states = walk(chain, log_density, kernel=kernel, steps=steps, burn_in=adapting, step_size=first, noise=noise, purpose=purpose)
    accept, failed, last = torch.zeros_like(first), torch.zeros_like(first, dtype=torch.long), None
    for step, last in enumerate(states):
        failed = failed + last.info.energy_error.isinf()
        accept = accept + (last.info.accept if step >= adapting else 0.0)
    assert last is not None
    return Result(last.chain, last.step_size, accept / (steps - adapting), failed, 1 + steps * cost)


def _ascended(chain: Chain, log_density: LogDensity, rate: float, steps: int) -> Result:
    """Adam on each coordinate of each chain; where the next point is not finite the chain tries again, in a smaller step."""
    slow, fast, floor = ADAM
    best, here = chain, chain
    first, second = torch.zeros_like(chain.z), torch.zeros_like(chain.z)
    failed = torch.zeros_like(chain.log_density, dtype=torch.long)
    for step in range(1, steps + 1):
        first, second = slow * first + (1 - slow) * here.grad, fast * second + (1 - fast) * here.grad.square()
        size = rate * (1 + math.cos(math.pi * (step - 1) / steps)) / 2
        move = size * (first / (1 - slow**step)) / ((second / (1 - fast**step)).sqrt() + floor)
        there = start(here.z + move, log_density)
        finite = there.log_density.isfinite() & there.grad.isfinite().all(-1)
        failed = failed + ~finite
        here = _chosen(finite, there, here)
        best = _chosen(here.log_density > best.log_density, here, best)
    rates = torch.full_like(chain.log_density, rate)
    return Result(best, rates, torch.ones_like(rates), failed, 1 + steps)


def effective_size(x: Float[Tensor, "S C"]) -> Float[Tensor, " C"]:
    """How many independent draws S states of each chain are worth for the mean of x: S / (1 + 2 sum of autocorrelations).

    The sum ends where two neighbours first add up to less than 0 (Geyer 1992: initial positive sequence). At most S log10 S, so that chains
    that swing about the mean are not worth without bound (as Stan has it); 1 for a chain that never moves.
    """
    count, centred = len(x), x - x.mean(0)
    spectrum = torch.fft.rfft(centred, 2 * count, dim=0)
    covariance = torch.fft.irfft(spectrum * spectrum.conj(), 2 * count, dim=0)[:count]
    moved = covariance[0] > 0
    correlation = covariance / torch.where(moved, covariance[0], 1.0)
    pairs = correlation[: count // 2 * 2].unflatten(0, (-1, 2)).sum(1)
    kept = torch.where((pairs > 0).cumprod(0).bool(), pairs, 0.0).sum(0)
    size = count / (2 * kept - 1).clamp(min=1 / math.log10(max(count, 11)))
    return torch.where(moved, size, 1.0)
