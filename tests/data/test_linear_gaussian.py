"""Laws of the linear-Gaussian set: its densities equal dense linear algebra and quadrature, and its rows come from them."""

from math import sqrt

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from torch import Tensor

from meme_dist.data.sets.linear_gaussian import LinearGaussian, linear_gaussian, parameters
from meme_dist.data.shards import Dataset, Row


def rows(dataset: Dataset, split: str = "train") -> list[Row]:
    return list(dataset.rows(split))


def joint(truth: LinearGaussian, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the named modalities side by side, from the definition."""
    weight = torch.cat([truth.weight[name] for name in names])
    noise = torch.cat([torch.full_like(truth.bias[name], truth.scale[name] ** 2) for name in names])
    return torch.cat([truth.bias[name] for name in names]).numpy(), (weight @ weight.T + torch.diag(noise)).numpy()


def data(truth: LinearGaussian, count: int) -> dict[str, Tensor]:
    return {name: 2 * torch.randn(count, len(bias), dtype=torch.float64) for name, bias in truth.bias.items()}


PATTERNS = torch.tensor([[pattern >> column & 1 for column in range(3)] for pattern in range(1, 8)], dtype=torch.bool)


def test_evidence_equals_the_dense_normal_density_for_every_pattern_of_what_is_observed():
    truth = parameters(seed=3)
    x = data(truth, 7)
    found = truth.evidence(x, PATTERNS)
    for row, pattern in enumerate(PATTERNS):
        names = [name for name, there in zip(x, pattern, strict=True) if there]
        mean, covariance = joint(truth, names)
        expected = multivariate_normal(mean, covariance).logpdf(torch.cat([x[name][row] for name in names]).numpy())
        assert found[row].item() == pytest.approx(expected, abs=1e-10)


def test_evidence_equals_the_integral_of_likelihood_times_prior():
    truth = parameters(seed=4)
    x = {name: truth.bias[name][None] + 0.5 for name in truth.bias}
    axis = torch.linspace(-8, 8, 641, dtype=torch.float64)
    z = torch.cartesian_prod(axis, axis)
    log = -0.5 * z.square().sum(1) - np.log(2 * np.pi)
    for name in x:
        normal = torch.distributions.Normal(z @ truth.weight[name].T + truth.bias[name], truth.scale[name])
        log = log + normal.log_prob(x[name]).sum(1)
    integral = log.logsumexp(0) + 2 * torch.log(axis[1] - axis[0])
    assert truth.evidence(x).item() == pytest.approx(integral.item(), abs=1e-9)


def test_conditional_evidence_equals_gaussian_conditioning():
    truth = parameters(seed=5)
    x = data(truth, 5)
    target, given = {"x2": x["x2"]}, {"x0": x["x0"], "x1": x["x1"]}
    mean, covariance = joint(truth, ["x0", "x1", "x2"])
    known, wanted = slice(0, 8), slice(8, 12)
    gain = covariance[wanted, known] @ np.linalg.inv(covariance[known, known])
    spread = covariance[wanted, wanted] - gain @ covariance[known, wanted]
    found = truth.conditional_evidence(target, given)
    for row in range(5):
        shift = gain @ (torch.cat([x["x0"][row], x["x1"][row]]).numpy() - mean[known])
        expected = multivariate_normal(mean[wanted] + shift, spread).logpdf(x["x2"][row].numpy())
        assert found[row].item() == pytest.approx(expected, abs=1e-10)


def test_the_posterior_is_diagonal_and_equals_gaussian_conditioning_for_every_pattern():
    truth = parameters(seed=6, latent_dim=3, event=5)
    x = data(truth, 7)
    mean, stddev = truth.posterior(x, PATTERNS)
    for row, pattern in enumerate(PATTERNS):
        names = [name for name, there in zip(x, pattern, strict=True) if there]
        bias, covariance = joint(truth, names)
        gain = torch.cat([truth.weight[name] for name in names]).numpy().T @ np.linalg.inv(covariance)
        expected = np.eye(3) - gain @ torch.cat([truth.weight[name] for name in names]).numpy()
        assert np.allclose(mean[row], gain @ (torch.cat([x[name][row] for name in names]).numpy() - bias), atol=1e-12)
        assert np.allclose(torch.diag(stddev[row].square()), expected, atol=1e-12)


def test_nothing_observed_has_evidence_zero_and_the_prior_as_posterior():
    truth = parameters()
    x = data(truth, 2)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert truth.evidence(x, nothing).abs().max() < 1e-12
    assert torch.equal(truth.posterior(x, nothing)[1], torch.ones(2, 2, dtype=torch.float64))


def test_absent_content_cannot_reach_the_evidence():
    truth = parameters()
    x, mask = data(truth, 7), PATTERNS
    poisoned = {name: torch.where(mask[:, column, None], x[name], torch.nan) for column, name in enumerate(x)}
    assert torch.equal(truth.evidence(poisoned, mask), truth.evidence(x, mask))


def test_linear_gaussian_rows_come_from_the_density_that_evidence_knows():
    # For its own rows E[log p] = -entropy, with variance E/2 nats^2 of E dimensions.
    truth, dataset = parameters(seed=7), linear_gaussian(rows=4000, missing=0, seed=7)
    x = {name: torch.stack([row.data[name] for row in rows(dataset)]) for name in truth.bias}  # type: ignore[misc]
    entropy = multivariate_normal(*joint(truth, list(x))).entropy()
    assert abs(truth.evidence(x).mean().item() + entropy) < 4 * sqrt(12 / 2 / 4000)


def test_linear_gaussian_misses_the_asked_share_and_tests_on_complete_rows():
    dataset = linear_gaussian(rows=1000, missing=0.4)
    assert sum(3 - len(row.data) for row in dataset.rows("train")) == 1200
    assert [len(row.data) for row in dataset.rows("test")] == [3] * 250


def test_linear_gaussian_rows_follow_the_seed():
    def first(seed: int) -> list[dict[str, list[float]]]:
        return [{name: value.tolist() for name, value in row.data.items()} for row in rows(linear_gaussian(rows=50, seed=seed))]

    assert first(0) == first(0)
    assert first(0) != first(1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear_gaussian(latent_dim=5, event=4), "latent_dim <= event"),
        (lambda: linear_gaussian(rows=3), "at least 4, got 3"),
        (lambda: linear_gaussian(missing=-0.1), "missing: expected a share from 0 to 0.667"),
        (lambda: parameters().evidence({"y": torch.zeros(1, 4)}), "unknown modalities .'y'."),
        (lambda: parameters().conditional_evidence({"x0": torch.zeros(1, 4)}, {"x0": torch.zeros(1, 4)}), "expected different modalities"),
    ],
)
def test_impossible_keywords_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
