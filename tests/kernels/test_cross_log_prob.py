"""Laws of the cross table that are its own; those of every op are in test_catalogue."""

import pytest
import torch
from torch import distributions

from meme_kernels import philox
from meme_kernels.cross_log_prob import Counter, cross_log_prob, table

FAMILIES = {"normal": distributions.Normal, "laplace": distributions.Laplace}
DRAWS = {"normal": philox.normal, "laplace": philox.laplace}


def drawn(n: int, b: int, d: int, device: torch.device, share: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean, scale [n, b, d] and observed [n, b]."""
    observed = (torch.rand(n, b) < share).to(device)
    return torch.randn(n, b, d).to(device).requires_grad_(), (torch.rand(n, b, d) + 0.2).to(device).requires_grad_(), observed


def counter(n: int, b: int, k: int, device: torch.device) -> Counter:
    keys = torch.tensor([philox.key(5, f"modality {i}") for i in range(n)])
    return Counter((torch.arange(b) + 2**33).to(device), keys.to(device), k)


@pytest.mark.parametrize("family", FAMILIES)
def test_z_and_q_equal_torch_distributions(device, family):
    """Absolute 1e-5: sums of 21 terms of size 1 to 100 in float32."""
    mean, scale, observed = drawn(3, 4, 21, device)
    eps = torch.randn(3, 2, 4, 21, device=device)
    z, q = cross_log_prob(mean, scale, observed, eps, family=family)
    torch.testing.assert_close(z, mean.unsqueeze(1) + scale.unsqueeze(1) * eps, rtol=1e-6, atol=1e-6)
    exact = FAMILIES[family](mean.double()[:, None], scale.double()[:, None])
    expected = torch.stack([exact.log_prob(source.double()).sum(-1) for source in z])
    torch.testing.assert_close(q.double(), expected, rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_those_through_torch_distributions(device, family):
    """Upstream gradients of both outputs; float64 autograd through the densities, relative 1e-5 of the largest."""
    mean, scale, observed = drawn(3, 2, 9, device)
    eps, h, g = (torch.randn(*shape).to(device) for shape in [(3, 2, 2, 9), (3, 2, 2, 9), (3, 3, 2, 2)])
    found = torch.autograd.grad(cross_log_prob(mean, scale, observed, eps, family=family), (mean, scale), (h, g))
    m, s = (x.detach().double().requires_grad_() for x in (mean, scale))
    z = m.unsqueeze(1) + s.unsqueeze(1) * eps.double()
    q = FAMILIES[family](m[:, None], s[:, None]).log_prob(z.unsqueeze(1)).sum(-1)
    for x, exact in zip(found, torch.autograd.grad((z, q), (m, s), (h.double(), g.double())), strict=True):
        torch.testing.assert_close(x.double(), exact, rtol=1e-5, atol=1e-5 * exact.abs().max().item())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_counter_stands_for_the_noise_that_the_generator_gives(device, family):
    """Within what the device's own normals differ by, 1e-6, times the scale; the gradients likewise."""
    mean, scale, observed = drawn(2, 3, 70, device, share=0.7)
    noise = counter(2, 3, 3, device)
    eps = torch.stack([DRAWS[family](noise.draw, key, 3, 70) for key in noise.key])
    results = []
    for given in (noise, eps):
        z, q = cross_log_prob(mean, scale, observed, given, family=family)
        results.append((z, q, *torch.autograd.grad(z.square().sum() + q.sum(), (mean, scale))))
    for made, told in zip(*results, strict=True):
        torch.testing.assert_close(made, told, rtol=1e-5, atol=2e-5)


def test_a_row_has_the_same_samples_in_any_batch_and_for_any_number_of_samples(device):
    """Bit for bit, though the two launches are cut into different programs."""
    mean, scale, observed = drawn(2, 9, 12, device)
    whole = counter(2, 9, 4, device)
    alone = Counter(whole.draw[6:7], whole.key, 2)
    z, q = cross_log_prob(mean, scale, observed, whole)
    z_alone, q_alone = cross_log_prob(mean[:, 6:7], scale[:, 6:7], observed[:, 6:7], alone)
    assert torch.equal(z[:, :2, 6:7], z_alone)
    torch.testing.assert_close(q[:, :, :2, 6:7], q_alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_path_gradient_of_a_posterior_at_itself_vanishes_with_its_score(device, family):
    """Sticking the landing: log q(z) - log p(z) has gradient zero, sample by sample, where q = p; the full gradient has not."""
    mean, scale, observed = drawn(1, 2, 6, device)
    with torch.no_grad():
        p = FAMILIES[family](mean[0].clone(), scale[0].clone())
    sizes = []
    for path_gradient in (True, False):
        z, q = cross_log_prob(mean, scale, observed, counter(1, 2, 1, device), family=family, path_gradient=path_gradient)
        gradients = torch.autograd.grad(q.sum() - p.log_prob(z[0]).sum(), (mean, scale))
        sizes.append(max(g.abs().max().item() for g in gradients))
    assert sizes[0] < 1e-4 < 0.5 < sizes[1]


def test_the_expected_score_is_zero_with_the_full_gradient(device):
    """E[grad log q(z)] over the density's parameters is 0: full minus path gradient, 64 samples, five standard errors."""
    mean, scale = (x.to(device).requires_grad_() for x in (torch.zeros(1, 32, 4), torch.ones(1, 32, 4)))
    observed, noise = torch.ones(1, 32, dtype=torch.bool, device=device), torch.randn(1, 2, 32, 4, device=device)
    found = []
    for path_gradient in (False, True):
        _, q = cross_log_prob(mean, scale, observed, noise, path_gradient=path_gradient)
        found.append(torch.autograd.grad(q.mean(), (mean, scale)))
    for full, path, deviation in zip(*found, (1.0, 2**0.5), strict=True):
        score = (full - path).sum(1)
        assert score.any() and (score.abs() < 5 * deviation / 64**0.5).all()


def test_absent_entries_are_zero_and_reach_nothing(device):
    """NaN in what is absent, in its noise and in the gradients sent back to it: value and gradient are those of the row without it."""
    mean, scale, _ = drawn(3, 2, 5, device)
    observed = torch.tensor([[True, True], [False, True], [True, False]], device=device)
    noise = torch.randn(3, 2, 2, 5, device=device)
    answers = []
    for filling in (torch.nan, 1.0):
        there = observed.unsqueeze(-1)
        m, s = (torch.where(there, x.detach(), filling).requires_grad_() for x in (mean, scale))
        z, q = cross_log_prob(m, s, observed, torch.where(there.unsqueeze(1), noise, filling))
        both = (observed[:, None] & observed).unsqueeze(2).expand(q.shape)
        h = torch.where(there.unsqueeze(1), torch.ones_like(z), filling)
        answers.append((z, q, *torch.autograd.grad((z, q), (m, s), (h, torch.where(both, torch.ones_like(q), filling)))))
    for x, y in zip(*answers, strict=True):
        assert torch.equal(x, y)
    z, q, grad_mean, grad_scale = answers[0]
    assert not z[1, :, 0].any() and not q[1, :, :, 0].any() and not q[:, 1, :, 0].any()
    assert not grad_mean[1, 0].any() and not grad_scale[1, 0].any()


def test_relabelling_the_posteriors_relabels_the_table(device):
    mean, scale, observed = drawn(4, 3, 6, device, share=0.7)
    noise, order = torch.randn(4, 2, 3, 6, device=device), torch.tensor([2, 0, 3, 1], device=device)
    z, q = cross_log_prob(mean, scale, observed, noise)
    z_moved, q_moved = cross_log_prob(mean[order], scale[order], observed[order], noise[order])
    torch.testing.assert_close(z_moved, z[order], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(q_moved, q[order][:, order], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_of_given_samples_equals_the_one_of_drawn_samples(device, family):
    mean, scale, observed = drawn(3, 2, 5, device)
    z, q = cross_log_prob(mean, scale, observed, counter(3, 2, 2, device), family=family)
    torch.testing.assert_close(table(z, mean, scale, family), q, rtol=1e-5, atol=1e-5)


def test_wrong_shapes_types_and_families_are_refused(device):
    mean, scale, observed = drawn(2, 3, 4, device)
    noise = counter(2, 3, 2, device)
    refused = [
        ((mean, scale[:, :2], observed, noise), "mean and scale"),
        ((mean, scale, observed.float(), noise), "bool observed"),
        ((mean, scale, observed, torch.randn(2, 2, 4, 3, device=device)), r"noise \[2, K, 3, 4\]"),
        ((mean, scale, observed, noise._replace(key=noise.key[:1])), r"key \[2, 2\]"),
        ((mean, scale, observed, noise._replace(draw=noise.draw.float())), "int64 draw"),
    ]
    for arguments, message in refused:
        with pytest.raises(ValueError, match=message):
            cross_log_prob(*arguments)
    with pytest.raises(ValueError, match="family"):
        cross_log_prob(mean, scale, observed, noise, family="cauchy")  # type: ignore[arg-type]
