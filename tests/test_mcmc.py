"""Laws of the Markov chains: mechanics, stationarity, step sizes, budgets, and what they leave alone."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal

from meme_dist.mcmc import HMC, MALA, MAP, ULA, Draws, Kernel, draws, effective_size, hmc, leapfrog, sample, start, walk
from meme_dist.noise import Noise

COVARIANCE = torch.tensor([[1.0, 0.8, 0.0], [0.8, 2.0, -0.3], [0.0, -0.3, 0.5]]).double()
MEAN = torch.tensor([1.0, -2.0, 0.5]).double()
CORRELATED = MultivariateNormal(MEAN, COVARIANCE)
KERNELS = pytest.mark.parametrize("kernel", [HMC(leapfrogs=4), MALA, ULA(), MAP()], ids=["hmc", "mala", "ula", "map"])


def quartic(z: Tensor) -> Tensor:
    """Neither Gaussian nor symmetric in its coordinates."""
    return -(z**4).sum(-1) / 4 - (z[:, 0] * z[:, 1] - 1).square() / 2


def chains(count: int, size: int) -> tuple[Tensor, Noise]:
    return torch.randn(count, size).double(), Noise(3, torch.arange(count))


def steps_of(count: int, size: float) -> Tensor:
    return torch.full((count,), size, dtype=torch.float64)


def drawn(noise: Noise, z: Tensor) -> Draws:
    """Those of a first step."""
    return next(draws(noise, "test", z))


def standard(z: Tensor) -> Tensor:
    return -z.square().sum(-1) / 2


# ---- mechanics ----------------------------------------------------------------------------------------------------------------------


def test_a_trajectory_is_reversible() -> None:
    """With the momentum turned round and the step that was drawn for it."""
    z, noise = chains(7, 3)
    momentum, _, stretch = drawn(noise, z)
    size = 0.1 * (1 + HMC().jitter * stretch)
    there, at_end = leapfrog(start(z, quartic), momentum, quartic, step_size=size, leapfrogs=20)
    back, returned = leapfrog(there, -at_end, quartic, step_size=size, leapfrogs=20)
    assert (there.z - z).abs().min() > 1e-3
    torch.testing.assert_close(back.z, z, rtol=0, atol=1e-10)
    torch.testing.assert_close(-returned, momentum, rtol=0, atol=1e-10)


def test_leapfrog_keeps_volumes() -> None:
    """The determinant of the map (z, p) -> (z', p'), by central differences: one chain for each shifted coordinate."""
    point, shift = torch.tensor([0.3, -1.1, 0.7, 0.2, 0.9, -0.4]).double(), 1e-5
    columns = torch.cat([point + shift * torch.eye(6).double(), point - shift * torch.eye(6).double()])
    end, momentum = leapfrog(start(columns[:, :3], quartic), columns[:, 3:], quartic, step_size=steps_of(12, 0.2), leapfrogs=5)
    plus, minus = torch.cat([end.z, momentum], -1).chunk(2)
    assert torch.linalg.det((plus - minus) / (2 * shift)).item() == pytest.approx(1, abs=1e-7)


def test_energy_error_falls_fourfold_as_the_step_halves() -> None:
    z, noise = chains(50, 3)
    errors = []
    for halvings in range(4):
        size, leapfrogs = 0.04 / 2**halvings, 10 * 2**halvings
        _, info = hmc(start(z, quartic), quartic, step_size=steps_of(50, size), leapfrogs=leapfrogs, draws=drawn(noise, z))
        errors.append(info.energy_error.abs().median().item())
    assert [a / b for a, b in zip(errors, errors[1:], strict=False)] == pytest.approx([4] * 3, rel=0.1)


def test_one_leapfrog_is_mala() -> None:
    """Against the Metropolis-Hastings ratio of the Langevin proposal, written with densities."""
    z, noise = chains(40, 3)
    size = steps_of(40, 0.5) * torch.linspace(0.5, 2, 40).double()
    chain, info = hmc(start(z, quartic), quartic, step_size=size, leapfrogs=1, draws=drawn(noise, z))

    def drift(at: Tensor) -> Tensor:
        at = at.clone().requires_grad_()
        return (at + size[:, None] ** 2 / 2 * torch.autograd.grad(quartic(at).sum(), at)[0]).detach()

    proposal = drift(z) + size[:, None] * drawn(noise, z).momentum
    forward = Normal(drift(z), size[:, None]).log_prob(proposal).sum(-1)
    backward = Normal(drift(proposal), size[:, None]).log_prob(z).sum(-1)
    ratio = (quartic(proposal) + backward - quartic(z) - forward).exp().clamp(max=1)
    torch.testing.assert_close(info.accept, ratio, rtol=1e-10, atol=1e-12)
    taken = drawn(noise, z).uniform <= ratio
    assert taken.any() and not taken.all()
    torch.testing.assert_close(chain.z, torch.where(taken[:, None], proposal, z))


# ---- stationarity -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [HMC(leapfrogs=4), HMC(leapfrogs=4, jitter=0.9), MALA], ids=["hmc", "jitter", "mala"])
def test_the_target_is_stationary(kernel: HMC) -> None:
    """Moments of a correlated Gaussian over 4,000 chains that start at one point, each within 4.5 standard errors."""
    count = 4000
    z = torch.zeros(count, 3).double()
    found = sample(CORRELATED.log_prob, z, kernel=kernel, budget=241, noise=Noise(1, torch.arange(count)), step_size=0.5).chain.z
    assert ((found.mean(0) - MEAN).abs() < 4.5 * (COVARIANCE.diagonal() / count).sqrt()).all()
    spread = (COVARIANCE.diagonal()[:, None] * COVARIANCE.diagonal() + COVARIANCE.square()) / count  # of a sample covariance's entries
    assert ((found.T.cov() - COVARIANCE).abs() < 4.5 * spread.sqrt()).all()


def test_unadjusted_langevin_has_its_known_bias() -> None:
    """On N(0, 1 / a) the chain is autoregressive: its variance is 1 / (a (1 - h^2 a / 4)) instead of 1 / a."""
    count, precision, size = 4000, torch.tensor([0.5, 1.0, 2.0]).double(), 0.9
    z, noise = chains(count, 3)
    found = sample(lambda x: -(precision * x * x).sum(-1) / 2, z, kernel=ULA(), budget=41, noise=noise, step_size=size, burn_in=0).chain.z
    variance = 1 / (precision * (1 - size**2 * precision / 4))
    assert ((found.var(0) / variance - 1).abs() < 4.5 * math.sqrt(2 / count)).all()


# ---- periods ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [MALA, *(HMC(leapfrogs) for leapfrogs in (2, 5, 10, 20))], ids=lambda kernel: f"{kernel.leapfrogs}")
def test_chains_from_afar_arrive_within_sixty_gradients(kernel: HMC) -> None:
    """From 4 standard deviations off on N(0, I), by the kernel's first step: a trajectory of a whole period would end where it began."""
    z = torch.full((300, 16), 4.0)
    found = sample(standard, z, kernel=kernel, budget=61, noise=Noise(1, torch.arange(300)))
    assert found.chain.z.square().mean().item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("leapfrogs", [2, 5, 10, 20])
@pytest.mark.parametrize("least, floor", [(1.0, 10), (0.2, 6)], ids=["equal", "unequal"])
def test_no_chain_is_caught_in_a_period(leapfrogs: int, least: float, floor: float) -> None:
    """On Normals of equal and of unequal scales: the worst decile of chains has draws worth at least `floor` per 1,000 gradients."""
    scale, kernel, warm = torch.linspace(least, 1, 16), HMC(leapfrogs), 500 // leapfrogs
    z, noise = scale * torch.randn(60, 16), Noise(2, torch.arange(60))
    first = torch.full((60,), kernel.first_step)
    density = lambda z: standard(z / scale)  # noqa: E731
    states = walk(start(z, density), density, kernel=kernel, steps=3 * warm, burn_in=warm, step_size=first, noise=noise, purpose="walk")
    kept = torch.stack([state.chain.z for state in states][warm:])
    worst = effective_size(kept.flatten(1)).view(60, 16).min(-1).values / (len(kept) * leapfrogs / 1000)
    assert worst.quantile(0.1) > floor


def test_stretches_are_uniform_and_know_nothing_of_the_test() -> None:
    """A chain's own at every step; within 4.5 standard errors of the moments of U(-1, 1)."""
    z, noise = chains(500, 3)
    steps = list(itertools.islice(draws(noise, "test", z), 20))
    stretch, uniform = torch.stack([d.stretch for d in steps]).flatten(), torch.stack([d.uniform for d in steps]).flatten()
    count = len(stretch)
    assert len(stretch.unique()) > 0.99 * count and -1 < stretch.min() and stretch.max() <= 1
    assert abs(stretch.mean()) < 4.5 / math.sqrt(3 * count)
    assert abs(stretch.square().mean() - 1 / 3) < 4.5 * math.sqrt(4 / 45 / count)
    assert abs((stretch * (uniform - 0.5)).mean()) < 4.5 / math.sqrt(36 * count)


# ---- step sizes ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [HMC(leapfrogs=4, target=0.8), MALA, ULA(target=0.7)], ids=["hmc", "mala", "ula"])
def test_every_chain_reaches_the_acceptance_target(kernel: HMC | ULA) -> None:
    """Chains whose targets differ in scale by 1,000 find step sizes in that proportion."""
    scale = torch.logspace(-1.5, 1.5, 16).double().repeat(4)
    z, noise = scale[:, None] * torch.randn(64, 5).double(), Noise(0, torch.arange(64))
    budget = 1 + (600 if isinstance(kernel, ULA) else 600 * kernel.leapfrogs)
    found = sample(lambda x: -(x / scale[:, None]).square().sum(-1) / 2, z, kernel=kernel, budget=budget, noise=noise, step_size=0.3)
    assert found.accept.mean().item() == pytest.approx(kernel.target, abs=0.04)
    assert ((found.accept - kernel.target).abs() < 0.15).all()
    ratio = found.step_size / scale
    assert (ratio.max() / ratio.min()).item() < 2


def test_step_sizes_are_frozen_after_the_burn_in() -> None:
    z, noise = chains(5, 3)
    states = list(
        walk(start(z, quartic), quartic, kernel=MALA, steps=20, burn_in=12, step_size=steps_of(5, 0.1), noise=noise, purpose="walk")
    )
    sizes = torch.stack([state.step_size for state in states])
    assert (sizes[:12].diff(dim=0) != 0).any(0).all()  # while it adapts every chain's own moves
    assert (sizes[12:] == sizes[12]).all()
    assert len(set(sizes[-1].tolist())) == 5


# ---- budget, cache and what is left alone -------------------------------------------------------------------------------------------


@KERNELS
@pytest.mark.parametrize("budget", [5, 50, 63])
def test_the_budget_counts_every_evaluation(kernel: Kernel, budget: int) -> None:
    calls = []

    def counted(z: Tensor) -> Tensor:
        calls.append(len(z))
        return quartic(z)

    z, noise = chains(3, 3)
    found = sample(counted, z, kernel=kernel, budget=budget, noise=noise)
    cost = kernel.leapfrogs if isinstance(kernel, HMC) else 1
    assert found.gradients == len(calls) and budget - cost < found.gradients <= budget


@KERNELS
def test_what_a_chain_remembers_is_what_is_there(kernel: Kernel) -> None:
    z, noise = chains(30, 3)
    found = sample(quartic, z, kernel=kernel, budget=41, noise=noise, step_size=0.9, burn_in=0)
    fresh = start(found.chain.z, quartic)
    torch.testing.assert_close(found.chain.log_density, fresh.log_density)
    torch.testing.assert_close(found.chain.grad, fresh.grad)
    assert not found.chain.z.requires_grad


@KERNELS
def test_a_chain_does_not_know_the_others(kernel: Kernel) -> None:
    z, noise = chains(6, 3)
    together = sample(quartic, z, kernel=kernel, budget=30, noise=noise).chain.z
    parts = [sample(quartic, z[part], kernel=kernel, budget=30, noise=Noise(3, torch.arange(6)[part])).chain.z for part in ([4, 1], [0, 5])]
    torch.testing.assert_close(torch.cat(parts), together[[4, 1, 0, 5]], rtol=1e-12, atol=1e-12)
    other = sample(quartic, z, kernel=kernel, budget=30, noise=Noise(4, torch.arange(6))).chain.z
    assert isinstance(kernel, MAP) == torch.equal(other, together)


def test_chains_of_one_draw_are_different() -> None:
    """K B chains over B draws, laid out as [K, B]: each has noise of its own, and the first B are those of K = 1."""
    z = torch.zeros(6, 3).double()
    many = sample(quartic, z, kernel=MALA, budget=20, noise=Noise(3, torch.arange(2))).chain.z
    few = sample(quartic, z[:2], kernel=MALA, budget=20, noise=Noise(3, torch.arange(2))).chain.z
    assert len(many.unique(dim=0)) == 6
    torch.testing.assert_close(many[:2], few)


@KERNELS
def test_gradients_reach_z_alone(kernel: Kernel) -> None:
    network = nn.Linear(3, 2).double()
    network.weight.grad = torch.full_like(network.weight, 7.0)
    z, noise = chains(4, 3)
    with torch.no_grad():
        sample(lambda x: -network(x).square().sum(-1), z, kernel=kernel, budget=20, noise=noise)
    assert (network.weight.grad == 7).all() and network.bias.grad is None
    assert all(p.requires_grad for p in network.parameters())


@KERNELS
def test_proposals_that_are_not_finite_are_refused_and_counted(kernel: Kernel) -> None:
    """The density is NaN beyond radius 1, its gradient infinite on the way: no chain leaves, and chains that never try count none."""

    def bounded(z: Tensor) -> Tensor:
        radius = z.square().sum(-1)
        return torch.where(radius < 1, 4 * radius, torch.nan)

    z = torch.full((8, 2), 0.1).double()
    kernel = MAP(rate=1.0) if isinstance(kernel, MAP) else kernel
    found = sample(bounded, z, kernel=kernel, budget=81, noise=Noise(0, torch.arange(8)), step_size=0.5, burn_in=0)
    assert (found.failed > 0).all() and (found.chain.z.square().sum(-1) < 1).all()
    assert found.chain.log_density.isfinite().all()
    gaussian = MultivariateNormal(MEAN[:2], COVARIANCE[:2, :2])
    assert (sample(gaussian.log_prob, z, kernel=kernel, budget=81, noise=Noise(0, torch.arange(8))).failed == 0).all()


def test_ascent_reaches_the_mode_and_never_falls() -> None:
    z, noise = chains(20, 3)
    found = sample(CORRELATED.log_prob, z, kernel=MAP(), budget=200, noise=noise).chain
    torch.testing.assert_close(found.z, MEAN.expand(20, 3), rtol=0, atol=0.05)
    wild = sample(CORRELATED.log_prob, z, kernel=MAP(rate=30.0), budget=3, noise=noise).chain
    assert (wild.log_density >= CORRELATED.log_prob(z)).all()


def test_the_effective_size_of_an_autoregression_is_known() -> None:
    """x' = a x + noise: n (1 - a) / (1 + a) independent draws; and its extremes."""
    count, weight = 4000, torch.tensor([0.0, 0.5, 0.9, -0.5]).double().repeat(8)
    x = [torch.randn(32).double()]
    for _ in range(count - 1):
        x.append(weight * x[-1] + (1 - weight**2).sqrt() * torch.randn(32).double())
    ratio = effective_size(torch.stack(x)) / (count * (1 - weight) / (1 + weight))
    assert ratio.view(8, 4).mean(0).tolist() == pytest.approx([1, 1, 1, 1], rel=0.15)
    assert effective_size(torch.ones(50, 2)).tolist() == [1, 1]
    assert effective_size(torch.tensor([1.0, -1.0]).repeat(100)[:, None]).item() == pytest.approx(200 * math.log10(200))


def test_borders_are_checked() -> None:
    z, noise = chains(4, 3)
    with pytest.raises(ValueError, match="needs at least 21 gradients"):
        sample(quartic, z, kernel=HMC(leapfrogs=20), budget=20, noise=noise)
    with pytest.raises(ValueError, match="4 of 4 chains start where"):
        sample(lambda x: quartic(x) + torch.inf, z, kernel=MALA, budget=20, noise=noise)
    with pytest.raises(ValueError, match="a divisor of them, got 3 for 4"):
        sample(quartic, z, kernel=MALA, budget=20, noise=Noise(0, torch.arange(3)))
    with pytest.raises(ValueError, match="jitter: expected a share of the step from 0 to below 1, got 1.0"):
        sample(quartic, z, kernel=HMC(jitter=1.0), budget=20, noise=noise)
    with pytest.raises(ValueError, match="a step size above 0"):
        sample(quartic, z, kernel=MALA, budget=20, noise=noise, step_size=0.0)
