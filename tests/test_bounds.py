"""Laws of the importance-weighted bounds, against loops over rows, strata and samples."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from torch import Tensor

from meme_dist.bounds import drawn, importance_weighted, scale_gradient, surrogate

STRATA, K, ROWS = 3, 4, 16
both = pytest.mark.parametrize("tight", [False, True])


def weights_and_presence() -> tuple[Tensor, Tensor]:
    """Log weights of every size, and rows of every pattern: among them one with all strata and two with none."""
    present = torch.tensor([[row >> s & 1 for row in range(ROWS)] for s in range(STRATA)]).bool()
    return 3 * torch.randn(STRATA, K, ROWS, dtype=torch.float64), present


def by_loops(log_weight: np.ndarray, present: np.ndarray, tight: bool) -> float:
    """One row: the formulas of the module's docstring."""
    held = [log_weight[s] for s in range(STRATA) if present[s]]
    if not held:
        return 0.0
    if tight:
        return float(logsumexp(np.concatenate(held)) - math.log(len(held) * K))
    return float(np.mean([logsumexp(w) - math.log(K) for w in held]))


@both
def test_bounds_are_those_of_loops_over_strata_and_samples(tight: bool) -> None:
    log_weight, present = weights_and_presence()
    got = importance_weighted(log_weight, present, tight=tight).bound
    want = [by_loops(log_weight[:, :, b].numpy(), present[:, b].numpy(), tight) for b in range(ROWS)]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-13, atol=1e-13)


@both
def test_a_weight_is_the_derivative_of_its_bound_and_a_rows_weights_sum_to_one(tight: bool) -> None:
    log_weight, present = weights_and_presence()
    weighted = importance_weighted(log_weight.requires_grad_(), present, tight=tight)
    (slope,) = torch.autograd.grad(weighted.bound.sum(), log_weight)
    torch.testing.assert_close(weighted.weight, slope, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(weighted.weight.sum((0, 1)), present.any(0).double(), rtol=1e-12, atol=1e-15)
    assert not weighted.weight.requires_grad


@both
def test_log_weights_of_absent_strata_are_never_read(tight: bool) -> None:
    log_weight, present = weights_and_presence()
    dirty = torch.where(present[:, None], log_weight, torch.nan).requires_grad_()
    clean, broken = (importance_weighted(w, present, tight=tight) for w in (log_weight, dirty))
    (slope,) = torch.autograd.grad(broken.bound.sum(), dirty)
    assert torch.equal(clean.bound, broken.bound.detach()) and torch.equal(clean.weight, broken.weight)
    torch.testing.assert_close(slope, clean.weight, rtol=1e-12, atol=1e-15)


def test_the_looser_bound_is_at_most_the_tight_one_and_equals_it_for_one_stratum() -> None:
    log_weight, present = weights_and_presence()
    looser, tight = (importance_weighted(log_weight, present, tight=which).bound for which in (False, True))
    one = present.sum(0) == 1
    assert (looser <= tight + 1e-12).all() and (looser < tight - 1e-3)[present.sum(0) > 1].all()
    torch.testing.assert_close(looser[one], tight[one], rtol=1e-12, atol=1e-12)


@both
def test_a_bound_of_k_samples_is_at_least_the_mean_over_its_parts(tight: bool) -> None:
    """Burda et al. 2016, theorem 1, without any noise: log of a mean of K is at least the mean over all subsets of size k."""
    log_weight, present = weights_and_presence()
    parts = [[log_weight[:, list(part)] for part in combinations(range(K), size)] for size in range(1, K + 1)]
    means = [torch.stack([importance_weighted(w, present, tight=tight).bound for w in some]).mean(0) for some in parts]
    for fewer, more in zip(means, means[1:], strict=False):
        assert (more >= fewer - 1e-12).all()


def test_log_weights_of_minus_ten_thousand_nats_keep_their_digits() -> None:
    log_weight, present = weights_and_presence()
    for tight in (False, True):
        near, far = (importance_weighted(log_weight - shift, present, tight=tight) for shift in (0.0, 1e4))
        torch.testing.assert_close(far.bound + 1e4 * present.any(0), near.bound, rtol=0, atol=1e-10)
        torch.testing.assert_close(far.weight, near.weight, rtol=1e-9, atol=1e-15)


@both
def test_a_sample_is_drawn_as_often_as_it_weighs(tight: bool) -> None:
    """Over an even grid of 4,000 uniforms: the share of each sample is its weight to one part in the grid."""
    log_weight, present = weights_and_presence()
    weighted, points = importance_weighted(log_weight, present, tight=tight), 4000
    groups = 1 if tight else STRATA
    grid = (torch.arange(points) + 0.5) / points
    index = torch.stack([drawn(weighted, u.expand(groups, ROWS)) for u in grid])  # [points, G, B]
    share = torch.stack([(index == k).double().mean(0) for k in range(STRATA * K if tight else K)], 1)  # [G, K, B]
    want = weighted.weight.flatten(0, 1)[None] if tight else weighted.weight * present.sum(0).clamp(min=1)
    there = present.any(0).expand(1, ROWS) if tight else present
    error = (share - want).abs().amax(1)[there]
    assert error.max() <= 2.01 / points


@both
def test_the_largest_uniform_number_and_the_smallest_draw_a_present_sample(tight: bool) -> None:
    """The generator gives (0, 1]: 1 itself may not run over the end, and the smallest may not fall on an absent stratum."""
    log_weight, present = weights_and_presence()
    weighted = importance_weighted(log_weight, present, tight=tight)
    for number in (2.0**-25, 1.0):
        index = drawn(weighted, torch.full((1 if tight else STRATA, ROWS), number))
        assert index.min() >= 0 and index.max() < (STRATA * K if tight else K)
        if tight:
            some = present.any(0)
            assert present.gather(0, index // K)[0][some].all()


def test_a_surrogate_has_the_value_of_one_and_the_gradient_of_the_other() -> None:
    value, through = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    made = surrogate(value, 3 * through)
    assert torch.equal(made.detach(), value.detach() + 3 * through.detach() - 3 * through.detach())
    to_value, to_through = torch.autograd.grad(made.sum(), [value, through], allow_unused=True)
    assert to_value is None and torch.equal(to_through, torch.full((5,), 3.0).double())


def test_a_scaled_gradient_is_multiplied_on_every_path_and_a_constant_is_left_alone() -> None:
    source = torch.randn(4, dtype=torch.float64, requires_grad=True)
    x, factor = 2 * source, torch.rand(4, dtype=torch.float64)
    scale_gradient(x, factor)
    (got,) = torch.autograd.grad((x.square() + 5 * x).sum(), source)
    torch.testing.assert_close(got, 2 * factor * (2 * x.detach() + 5), rtol=1e-14, atol=0)
    scale_gradient(x.detach(), factor)
