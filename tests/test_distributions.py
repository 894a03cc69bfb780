"""Laws of the posteriors and likelihoods, against torch.distributions, scipy and Monte Carlo."""

import math
import sys

import numpy as np
import pytest
import torch
from scipy import linalg, stats
from torch import distributions as reference

from meme_dist.distributions import Components, DiagLaplace, DiagNormal, Mixture, mixture_of, pairwise_w2, product
from meme_dist.likelihoods import Bernoulli, Categorical, Laplace, NegativeBinomial, Normal, Poisson
from meme_dist.noise import Noise

FAMILIES = {DiagNormal: reference.Normal, DiagLaplace: reference.Laplace}


def draw_posterior(family, *shape):
    return family(torch.randn(*shape, dtype=torch.float64), torch.rand(*shape, dtype=torch.float64) + 0.2)


@pytest.mark.parametrize("family", FAMILIES)
def test_log_prob_equals_torch(family):
    q, z = draw_posterior(family, 5, 3), torch.randn(4, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(q.log_prob(z), FAMILIES[family](q.mean, q.scale).log_prob(z).sum(-1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(q.stddev, FAMILIES[family](q.mean, q.scale).stddev)


@pytest.mark.parametrize("family", FAMILIES)
def test_kl_equals_monte_carlo_and_is_zero_only_for_equals(family):
    q, p = draw_posterior(family, 6, 2), draw_posterior(family, 6, 2)
    z = FAMILIES[family](q.mean, q.scale).sample((200_000,))
    terms = q.log_prob(z) - p.log_prob(z)
    assert ((q.kl(p) - terms.mean(0)).abs() < 5 * terms.std(0) / math.sqrt(len(z))).all()
    assert (q.kl(p) > 0).all() and (q.kl(q).abs() < 1e-12).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_component_mixture_equals_torch_also_at_tiny_scales(family):
    q = draw_posterior(family, 70, 3)
    q = family(q.mean.float(), torch.where(torch.rand(70, 3) < 0.3, 1e-3, q.scale.float()))
    z = (q.mean[:50] + q.scale[:50] * torch.randn(50, 3)).view(5, 10, 3)
    wide = FAMILIES[family](q.mean.double(), q.scale.double())
    even = reference.MixtureSameFamily(reference.Categorical(logits=torch.zeros(70)), reference.Independent(wide, 1))
    torch.testing.assert_close(Components(q).log_prob(z).double(), even.log_prob(z.double()), rtol=1e-4, atol=1e-3)


def test_row_mixture_moments_density_and_draws_agree():
    q = DiagNormal(torch.randn(3, 2, 2), torch.rand(3, 2, 2) + 0.3)
    present = torch.tensor([[True, True], [False, True], [True, True]])
    mixture = Mixture(q, present)
    z = mixture.sample(Noise(0, torch.arange(2)), "z", 60_000)
    assert (z.mean(0) - mixture.mean).abs().max() < 0.03 and (z.std(0) - mixture.stddev).abs().max() < 0.03
    for row in range(2):
        kept = present[:, row]
        parts = reference.Independent(reference.Normal(q.mean[kept, row], q.scale[kept, row]), 1)
        even = reference.MixtureSameFamily(reference.Categorical(logits=torch.zeros(int(kept.sum()))), parts)
        torch.testing.assert_close(mixture.log_prob(z[:50])[:, row], even.log_prob(z[:50, row]))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixture_of_n_experts_evaluates_n_densities_those_of_the_whole_table(family, monkeypatch):
    experts, z, asked = draw_posterior(family, 5, 4, 3), torch.randn(6, 4, 3, dtype=torch.float64), []
    mixture = Mixture(experts, torch.rand(5, 4) < 0.7)
    name = "normal" if family is DiagNormal else "laplace"
    kernels, density = sys.modules["meme_kernels.cross_log_prob"], getattr(sys.modules["meme_kernels.cross_log_prob"], name)
    table = kernels.table(z[None].expand(5, *z.shape), *experts, name)[0]
    counted = lambda z, *parameters: asked.append(z.numel()) or density(z, *parameters)  # noqa: E731
    monkeypatch.setattr(kernels, name, counted)
    monkeypatch.setitem(kernels._DENSITIES, name, counted)
    found = mixture.log_prob(z)
    assert sum(asked) == 5 * z.numel()
    assert torch.equal(found, mixture_of(table, (mixture.present | ~mixture.present.any(0)).unsqueeze(1)))


def test_a_mixture_of_equals_is_its_component_to_the_last_digit_of_float64():
    """The number of components was once logged in float32: an error of 1e-9 nats in float64."""
    table = torch.randn(1, 2, 5, dtype=torch.float64).expand(3, -1, -1)
    torch.testing.assert_close(mixture_of(table, torch.ones(3, 1, 5, dtype=torch.bool)), table[0], rtol=1e-15, atol=1e-15)


def test_a_mixture_of_one_is_its_component_and_an_absent_entry_reaches_nothing():
    table = torch.tensor([[1.0, -2.0], [float("nan"), 3.0]], requires_grad=True)
    present = torch.tensor([[True, True], [False, True]])
    mixed = mixture_of(table, present)
    assert mixed[0] == 1.0
    torch.testing.assert_close(mixed[1], torch.tensor([-2.0, 3.0]).logsumexp(0) - math.log(2))
    mixed.sum().backward()
    assert table.grad[1, 0] == 0 and torch.isfinite(table.grad).all()
    assert mixture_of(table.detach(), torch.zeros_like(present)).eq(0).all()


@pytest.mark.parametrize("standard", [False, True])
def test_product_is_the_normalised_product_of_densities_in_any_order(standard):
    q = draw_posterior(DiagNormal, 3, 4, 2)
    mask = torch.tensor([[True, True, True], [True, False, True]])[..., None].expand(2, 3, 4)
    joint = product(q, mask, standard=standard)
    z = torch.randn(7, 4, 2, dtype=torch.float64)
    for s in range(2):
        logs = sum(DiagNormal(q.mean[n], q.scale[n]).log_prob(z) for n in range(3) if mask[s, n, 0])
        logs = logs + (reference.Normal(0, 1).log_prob(z).sum(-1) if standard else 0)
        gap = DiagNormal(joint.mean[s], joint.scale[s]).log_prob(z) - logs  # constant in z: the normaliser
        assert (gap - gap[:1]).abs().max() < 1e-9
    flipped = product(DiagNormal(q.mean.flip(0), q.scale.flip(0)), mask.flip(1), standard=standard)
    torch.testing.assert_close(flipped.mean, joint.mean)


def test_laplace_experts_have_no_product():
    with pytest.raises(ValueError, match="product of experts needs Normal posteriors, got DiagLaplace"):
        product(draw_posterior(DiagLaplace, 2, 3, 1), torch.ones(1, 2, 3, dtype=torch.bool))


def test_w2_equals_the_general_formula_with_matrix_square_roots():
    a, b = draw_posterior(DiagNormal, 3, 4), draw_posterior(DiagNormal, 5, 4)
    for s in range(3):
        for t in range(5):
            A, C = np.diag(a.scale[s].numpy() ** 2), np.diag(b.scale[t].numpy() ** 2)
            root = linalg.sqrtm(linalg.sqrtm(C) @ A @ linalg.sqrtm(C)).real
            exact = ((a.mean[s] - b.mean[t]) ** 2).sum().item() + np.trace(A + C - 2 * root)
            assert pairwise_w2(a, b)[s, t].item() == pytest.approx(exact, rel=1e-5)


PARAMS = torch.randn(3, 4, 2, 5, dtype=torch.float64)
COUNTS = torch.randint(0, 9, (4, 2, 5)).double()


def softplus(x):
    return torch.nn.functional.softplus(x) + 1e-4


@pytest.mark.parametrize(
    "likelihood, x, exact",
    [
        (Normal(0.7), torch.randn(4, 2, 5).double(), lambda x: reference.Normal(PARAMS, 0.7).log_prob(x)),
        (Normal(0.7, learned=True), torch.randn(4, 2, 5).double(), lambda x: reference.Normal(PARAMS, 0.7).log_prob(x)),
        (Laplace(0.3), torch.randn(4, 2, 5).double(), lambda x: reference.Laplace(PARAMS, 0.3).log_prob(x)),
        (Bernoulli(), (COUNTS > 4).double(), lambda x: reference.Bernoulli(logits=PARAMS).log_prob(x)),
        (Poisson(), COUNTS, lambda x: reference.Poisson(softplus(PARAMS)).log_prob(x)),
        (
            NegativeBinomial((2, 5)),
            COUNTS,
            lambda x: torch.from_numpy(stats.nbinom.logpmf(x.numpy(), 1.0001, (1.0001 / (1.0001 + softplus(PARAMS))).numpy())),
        ),
    ],
    ids=["normal", "normal-learned", "laplace", "bernoulli", "poisson", "negative-binomial"],
)
def test_likelihood_equals_its_reference_and_differentiates(likelihood, x, exact):
    params = PARAMS.clone().requires_grad_()
    value = likelihood.double().log_prob(x, params)
    torch.testing.assert_close(value.detach(), exact(x).sum((-1, -2)), rtol=1e-6, atol=1e-6)
    assert torch.autograd.gradcheck(lambda p: likelihood.log_prob(x, p), (params,))


def test_tokens_are_scored_up_to_the_padding_only():
    logits = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    tokens = torch.tensor([[1, 5, 2, 0], [2, 0, 0, 0], [3, 4, 5, 2]])
    value = Categorical().log_prob(tokens, logits)
    exact = reference.Categorical(logits=logits).log_prob(tokens.expand(2, 3, 4))
    torch.testing.assert_close(value, torch.where(tokens != 0, exact, 0.0).sum(-1))


@pytest.mark.parametrize("likelihood", [Poisson(), NegativeBinomial((6,))])
def test_count_likelihoods_sum_to_one(likelihood):
    params = torch.tensor([-3.0, 0.0, 1.0, 2.0, 3.0, 4.0]).double().view(1, 1, 6)
    counts = torch.arange(4000).double().view(-1, 1).expand(-1, 6)
    total = torch.zeros(6).double()
    for column in range(6):
        one = NegativeBinomial((1,)) if isinstance(likelihood, NegativeBinomial) else Poisson()
        log_prob = one.double().log_prob(counts[:, column : column + 1], params[..., column : column + 1].expand(1, 4000, 1))
        total[column] = log_prob.exp().sum()
    torch.testing.assert_close(total, torch.ones(6).double(), rtol=1e-6, atol=0)


def test_densities_stay_finite_at_extreme_scales():
    for scale in (math.exp(-30), math.exp(30)):
        q = DiagNormal(torch.zeros(2, 3), torch.full((2, 3), scale))
        assert torch.isfinite(q.log_prob(scale * torch.randn(4, 2, 3))).all()
