"""Laws of the closed-form divergence of a row's only pair."""

import math

import pytest
import torch
from torch import distributions

from meme_kernels.pair_divergence import FAMILIES, pair_divergence

TORCH = {"normal": distributions.Normal, "laplace": distributions.Laplace}


def posteriors(n: int, b: int, d: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    mean, scale = torch.randn(n, b, d, dtype=torch.float64), torch.rand(n, b, d, dtype=torch.float64) * 3 + 0.05
    return mean.to(device), scale.to(device)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_divergence_of_torch_where_a_row_holds_two_and_zero_elsewhere(family, device):
    mean, scale = posteriors(3, 8, 5, device)
    held = [(0, 1), (0, 2), (1, 2), (0,), (1,), (), (0, 1, 2), (2, 0)]
    observed = torch.tensor([[i in row for row in held] for i in range(3)], device=device)
    came = pair_divergence(mean, scale, observed, family=family)
    for b, row in enumerate(held):
        for i in range(3):
            expected = 0.0
            if len(row) == 2 and i in row:
                (j,) = set(row) - {i}
                q, p = (TORCH[family](mean[x, b], scale[x, b]) for x in (i, j))
                expected = float(distributions.kl_divergence(q, p).sum())
            assert float(came[i, b]) == pytest.approx(expected, rel=1e-12, abs=1e-13)


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_posteriors_have_none_and_no_gradient(family, device):
    mean, scale = (x[:1].repeat(2, 1, 1).requires_grad_() for x in posteriors(1, 6, 9, device))
    observed = torch.ones(2, 6, dtype=torch.bool, device=device)
    value = pair_divergence(mean, scale, observed, family=family)
    assert value.abs().max() < 1e-14
    assert all(g.abs().max() < 1e-13 for g in torch.autograd.grad(value.sum(), (mean, scale)))


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_posteriors_reach_nothing_even_as_nan(family, device):
    mean, scale = posteriors(4, 11, 3, device)
    observed = torch.rand(4, 11, device=device) > 0.4
    found = []
    for filler in (1.0, math.nan):
        leaves = [x.where(observed[..., None], filler).requires_grad_() for x in (mean, scale)]
        value = pair_divergence(*leaves, observed, family=family)
        found.append([value.detach(), *torch.autograd.grad(value.sum(), leaves)])
    for clean, poisoned in zip(*found, strict=True):
        assert torch.equal(clean, poisoned) and clean.isfinite().all()


def test_tiny_scales_neither_underflow_nor_overflow_in_float32(device):
    """Scales of e^-50 and e^-45: their squares are 0 in float32, their ratio is not."""
    scale = torch.tensor([-50.0, -45.0], device=device).exp().view(2, 1, 1)
    observed = torch.ones(2, 1, dtype=torch.bool, device=device)
    came = pair_divergence(torch.zeros(2, 1, 1, device=device), scale, observed, family="normal")
    assert float(came[0, 0]) == pytest.approx((math.exp(-10) - 1) / 2 + 5, rel=1e-6)
    assert float(came[1, 0]) == pytest.approx((math.exp(10) - 1) / 2 - 5, rel=1e-5)


def test_only_a_bool_mask_of_every_posterior_is_taken(device):
    """Numbers would be a mask to the kernel, and an error of PyTorch's to the reference."""
    mean, scale = posteriors(2, 6, 3, device)
    observed = torch.ones(2, 6, dtype=torch.bool, device=device)
    for wrong in (observed.int(), observed.byte(), observed[:1]):
        with pytest.raises(ValueError, match="expected mean and scale .* and bool observed"):
            pair_divergence(mean, scale, wrong, family="normal")
