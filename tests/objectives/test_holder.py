"""Hoelder pooling: the pool against quadrature, its objective against a transcription, and the expected gradient."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch import distributions as reference

from meme_dist import distributions
from meme_dist.distributions import DiagLaplace, DiagNormal, WeightedMixture, even_mixture, holder_pool
from meme_dist.noise import Noise
from meme_dist.objectives.holder import Holder
from meme_dist.types import pack
from tests.objectives.rivals import COMPLETE, PATTERNS, Row, assert_transcribed, build, gradient, rows

GRID = torch.linspace(-30, 30, 60_001, dtype=torch.float64)
STEP = 60 / 60_000


def random_experts(count: int, patterns: int, spread: float) -> DiagNormal:
    return DiagNormal(spread * torch.randn(count, patterns, 1).double(), 0.3 + torch.rand(count, patterns, 1).double())


@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0])
def test_pool_is_the_squared_sum_of_roots_by_quadrature(spread: float) -> None:
    masks = torch.tensor(PATTERNS).bool().T
    experts = random_experts(3, len(PATTERNS), spread)
    pool = holder_pool(experts, masks)
    density = pool.log_prob(GRID[:, None, None].expand(-1, len(PATTERNS), 1)).exp()
    for b in range(len(PATTERNS)):
        roots = [reference.Normal(experts.mean[i, b], experts.scale[i, b]).log_prob(GRID).exp().sqrt() for i in range(3) if masks[i, b]]
        squared = sum(roots) ** 2
        expected = squared / torch.trapezoid(squared, dx=STEP)
        torch.testing.assert_close(density[:, b], expected, rtol=1e-9, atol=1e-10)
        mean = torch.trapezoid(GRID * expected, dx=STEP)
        torch.testing.assert_close(pool.mean[b, 0], mean, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(pool.stddev[b, 0], torch.trapezoid((GRID - mean) ** 2 * expected, dx=STEP).sqrt(), rtol=1e-7, atol=1e-9)


def test_pool_of_equal_experts_is_that_expert_and_of_distant_ones_their_mixture() -> None:
    every = torch.ones(3, 1).bool()
    same = DiagNormal(torch.full((3, 1, 2), 0.4).double(), torch.full((3, 1, 2), 0.7).double())
    z = torch.randn(50, 1, 2).double()
    torch.testing.assert_close(holder_pool(same, every).log_prob(z), DiagNormal(same.mean[0], same.scale[0]).log_prob(z))
    apart = DiagNormal(torch.tensor([-60.0, 0, 60]).double().view(3, 1, 1).expand(3, 1, 2), same.scale)
    torch.testing.assert_close(holder_pool(apart, every).log_prob(z), even_mixture(apart, every).log_prob(z))


def test_pool_with_a_gradient_where_experts_do_not_overlap_stays_finite() -> None:
    mean = torch.tensor([-1e4, 0.0, 1e4]).view(3, 1, 1).requires_grad_()
    scale = torch.full((3, 1, 1), 1e-3).requires_grad_()
    holder_pool(DiagNormal(mean, scale), torch.ones(3, 1).bool()).log_weight.exp().square().sum().backward()
    assert torch.isfinite(mean.grad).all() and torch.isfinite(scale.grad).all()


def test_a_weighted_mixture_samples_its_own_density_and_holds_few_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = random_experts(3, 1, 2.0)
    pool = holder_pool(experts, torch.tensor([[1], [0], [1]]).bool())
    rows_, noise = 20_000, Noise(3, torch.arange(20_000))
    wide = WeightedMixture(DiagNormal(*[x.expand(-1, rows_, -1) for x in pool.components]), pool.log_weight.expand(-1, rows_))
    drawn = wide.sample(noise, "z", 2).flatten()
    density = pool.log_prob(GRID[:, None, None]).exp()[:, 0]
    cumulative = np.interp(drawn.sort().values.numpy(), GRID.numpy(), (density.cumsum(0) * STEP).numpy())
    assert np.abs(cumulative - np.arange(1, 40_001) / 40_000).max() < 1.63 / 200  # Kolmogorov, 1 %
    z = torch.randn(4, 1, 1).double()
    whole = pool.log_prob(z)
    monkeypatch.setattr(distributions, "TABLE", 8)  # two components at a time
    assert torch.equal(pool.log_prob(z), whole)


def components(row: Row) -> tuple[list[tuple[str, str]], Tensor, list[reference.Normal]]:
    """Pairs, their weights and Normals: precisions averaged, weights by an integral over the grid of each coordinate."""
    pairs = list(itertools.combinations_with_replacement(row.names, 2))
    weights, normals = [], []
    for i, j in pairs:
        a, b = row.q[i], row.q[j]
        precision = (a.scale**-2 + b.scale**-2) / 2
        normals.append(reference.Normal((a.loc * a.scale**-2 + b.loc * b.scale**-2) / 2 / precision, precision**-0.5))
        points = GRID[:, None]
        overlap = torch.trapezoid(((a.log_prob(points) + b.log_prob(points)) / 2).exp(), dx=STEP, dim=0).prod()
        weights.append(overlap if i == j else 2 * overlap)
    weight = torch.stack(weights)
    return pairs, weight / weight.sum(), normals


@pytest.mark.parametrize("patterns", [COMPLETE, PATTERNS], ids=["complete", "incomplete"])
def test_loss_and_gradient_are_those_of_a_loop_over_rows_and_components(patterns: list[tuple[int, ...]]) -> None:
    beta = 1.7

    def loss(row: Row) -> Tensor:
        pairs, weight, normals = components(row)
        terms = []
        for (i, j), q in zip(pairs, normals, strict=True):
            z = row.draw(q, f"{i}+{j}")
            pool = sum(w * n.log_prob(z).sum().exp() for w, n in zip(weight, normals, strict=True)).log()
            explained = torch.stack([row.explains(n, z) for n in row.names]).sum()
            terms.append(explained + beta * (row.prior().log_prob(z).sum() - pool))
        return -(weight * torch.stack(terms)).sum()

    assert_transcribed(build(Holder, beta=beta, resampled=False), loss, patterns)


def test_resampled_has_the_value_and_the_expected_gradient_of_the_whole_sum() -> None:
    torch.manual_seed(4)
    full, resampled = build(Holder, resampled=False), build(Holder)
    resampled.load_state_dict(full.state_dict())
    x, few = rows([(1, 1, 1), (1, 0, 1)], 1)
    assert full(few).total.item() == pytest.approx(resampled(few).total.item(), rel=1e-12)
    difference = []
    for seed in range(40):
        copies = pack({n: v[~v[:, 0].isnan()].repeat(100, 1) for n, v in x.items()}, few.observed.repeat(100, 1).numpy(), seed=seed)
        difference.append(gradient(resampled, resampled(copies).total) - gradient(full, full(copies).total))
    table = torch.stack(difference)
    spread = table.std(0) / math.sqrt(len(table))
    score = (table.mean(0) / spread.clamp(min=1e-12)).abs()[spread > 1e-9]
    assert len(score) > 100 and score.max() < 4.5


def test_terms_are_the_elbo_whatever_beta_is() -> None:
    losses = [build(Holder, beta=beta) for beta in (1.0, 4.0)]
    losses[1].load_state_dict(losses[0].state_dict())
    _, batch = rows(PATTERNS)
    one, four = (objective(batch) for objective in losses)
    assert one.terms["bound"].total == four.terms["bound"].total
    assert -one.total.item() == pytest.approx(one.terms["bound"].total.item(), rel=1e-12)
    assert four.total.item() == pytest.approx(one.total.item() + 3 * one.terms["kl"].total.item(), rel=1e-9)


def test_laplace_posteriors_are_refused() -> None:
    with pytest.raises(ValueError, match="Holder multiplies posteriors"):
        build(Holder, DiagLaplace)
