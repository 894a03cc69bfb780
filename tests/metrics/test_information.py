"""Laws of the mutual-information score: the Hessian's, Monte Carlo over weights, and what must be strange to a classifier."""

import importlib
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from meme_dist.classifiers import Classifier, paper_network, small_network
from meme_dist.data.fields import Field
from meme_dist.evaluate import evaluate
from meme_dist.metrics import fit_logistic
from meme_dist.metrics.information import LastLayer, curvature, curvatures, entropy, information, last_layer
from meme_dist.metrics.rows import Judge
from meme_dist.noise import Noise
from tests.planted import CLASSES, modality, planted, rows

WORDS = ("<pad>", "<unk>", "<eos>", "red", "blue")
FIELDS = [
    Field(kind="image", shape=(3, 16, 20), codec="png", likelihood="laplace"),
    Field(kind="vector", shape=(5,), codec="npy", likelihood="normal"),
    Field(kind="counts", shape=(6,), codec="npy", likelihood="poisson"),
    Field(kind="text", shape=(7,), codec="txt", likelihood="categorical", vocabulary=WORDS),
]


def data(seed: int = 0, count: int = 200) -> tuple[Tensor, Tensor, nn.Linear]:
    """Features of three classes that vary in three of four directions, and the layer that was fitted to them."""
    rng = np.random.default_rng(seed)
    label = torch.from_numpy(rng.integers(0, 3, count))
    x = torch.from_numpy(rng.normal(size=(count, 4))).float() + 1.5 * torch.eye(3, 4)[label]
    x[:, 3] = 0.0
    return x, label, fit_logistic(x, label, 3)


def noise(count: int) -> Noise:
    return Noise(0, torch.arange(count))


def test_the_curvature_is_the_hessian_of_the_cross_entropy() -> None:
    x, label, head = data(count=30)
    weight = torch.cat([head.weight, head.bias[:, None]], 1).double()
    with_one = torch.cat([x, torch.ones(30, 1)], 1).double()

    def loss(flat: Tensor) -> Tensor:
        return cross_entropy(with_one @ flat.view_as(weight).T, label, reduction="sum")

    expected = torch.autograd.functional.hessian(loss, weight.flatten())
    assert torch.allclose(curvature(x, head).total, expected, atol=1e-10)
    parts = [curvature(part, head) for part in x.split([1, 20, 9])]
    assert torch.allclose(sum(part.total for part in parts), expected, atol=1e-10) and sum(part.count for part in parts) == 30


def test_the_posterior_has_the_inverse_of_the_curvature_with_the_priors_precision() -> None:
    x, _, head = data(count=30)
    sums = curvature(x, head)
    layer = last_layer(head, sums, precision=0.3)
    assert torch.allclose(layer.covariance @ (sums.total + 0.3 * torch.eye(15).double()), torch.eye(15).double(), atol=1e-8)
    assert torch.allclose(layer.variance.flatten(), layer.covariance.diagonal())
    unseen = last_layer(head, curvature(x[:0], head), precision=4.0)
    assert torch.allclose(unseen.variance, torch.full((3, 5), 0.25).double())


def test_beyond_its_size_limit_the_diagonal_stands_for_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _, head = data()
    full = curvature(x, head)
    monkeypatch.setattr(importlib.import_module("meme_dist.metrics.information"), "LARGEST", 14)  # of 15 weights
    diagonal = curvature(x, head)
    assert torch.allclose(diagonal.total.flatten(), full.total.diagonal(), rtol=1e-10)
    layer = last_layer(head, diagonal)
    assert layer.covariance is None
    same = LastLayer(layer.weight, torch.diag(layer.variance.flatten()), layer.variance)
    assert all(torch.allclose(a, b) for a, b in zip(layer.logits(x), same.logits(x), strict=True))


def test_without_doubt_about_the_weights_there_is_nothing_to_learn() -> None:
    x, _, head = data()
    layer = last_layer(head, curvature(x, head))
    sure = LastLayer(layer.weight, torch.zeros_like(layer.covariance), torch.zeros_like(layer.variance))
    assert float(sure.information(x, noise(len(x)), "a").max()) < 1e-12
    assert float(sure._replace(covariance=None).information(x, noise(len(x)), "a").max()) < 1e-12


def test_the_score_is_monte_carlo_over_the_weights() -> None:
    x, _, head = data(count=60)
    layer = last_layer(head, curvature(x, head), precision=0.3)
    found = layer.information(3 * x, noise(60), "a", samples=4000)
    generator = torch.Generator().manual_seed(0)
    standard = torch.randn(20_000, layer.weight.numel(), generator=generator, dtype=torch.float64)
    weights = layer.weight.flatten() + standard @ torch.linalg.cholesky(layer.covariance).T
    with_one = torch.cat([3 * x, torch.ones(60, 1)], 1).double()
    log_p = torch.einsum("re,sce->src", with_one, weights.view(-1, *layer.weight.shape)).log_softmax(-1)
    expected = entropy(log_p.exp().mean(0)) - entropy(log_p.exp()).mean(0)
    assert float(expected.max()) > 0.05 and torch.allclose(found, expected, atol=0.012)
    assert float((found - expected).mean().abs()) < 0.001


def test_it_grows_away_from_the_data_and_stays_below_the_log_of_the_classes() -> None:
    """The fourth direction never varied: there the weights are as unknown as before any data."""
    x, _, head = data()
    layer = last_layer(head, curvature(x, head))
    scores = []
    for far in (0.0, 1.0, 3.0, 10.0, 100.0):
        away = x.clone()
        away[:, 3] = far
        scores.append(float(layer.information(away, noise(len(x)), "a", samples=500).mean()))
    assert scores == sorted(scores) and scores[0] < 0.02 and scores[2] > 10 * scores[0] and 0.7 < scores[-1] < math.log(3)
    fewer = last_layer(head, curvature(x, head), rows=20)
    assert float(fewer.information(x, noise(len(x)), "a").mean()) > 2 * scores[0]  # the fewer the data the more there is to learn


def test_how_many_of_the_rows_that_it_learnt_from_are_looked_at_does_not_change_how_sure_a_classifier_is() -> None:
    x, _, head = data(count=800)
    half, whole, few = (last_layer(head, curvature(x[:rows], head), rows=800) for rows in (400, 800, 200))
    scores = [float(layer.information(2 * x, noise(800), "a", samples=500).mean()) for layer in (half, whole, few)]
    assert scores == pytest.approx([scores[1]] * 3, rel=0.15)
    unscaled = last_layer(head, curvature(x[:400], head))
    assert float(unscaled.information(2 * x, noise(800), "a", samples=500).mean()) > 1.4 * scores[1]


def test_what_is_not_finite_has_no_score_and_takes_none_from_others() -> None:
    x, _, head = data(count=20)
    layer, broken = last_layer(head, curvature(x, head)), x.clone()
    broken[3, 1] = math.nan
    found = layer.information(broken, noise(20), "a")
    assert found.isnan().nonzero().tolist() == [[3]]
    assert torch.equal(found[4:], layer.information(x, noise(20), "a")[4:])


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.kind)
@pytest.mark.parametrize("build", [small_network, paper_network])
def test_features_are_what_the_last_layer_makes_logits_of(field: Field, build) -> None:
    judge = Classifier(build(field, 4).eval())
    x = torch.randint(0, 5, (6, *field.shape)) if field.kind == "text" else torch.rand(6, *field.shape)
    features = judge.features(x)
    assert isinstance(judge, Judge) and features.dim() == 2 and judge.head.out_features == 4
    assert torch.equal(judge.head(features).argmax(-1), judge(x)) and torch.allclose(judge.head(features), judge.network(x))
    assert not judge.head._forward_hooks


def test_a_network_without_a_linear_end_has_no_features() -> None:
    ends_otherwise = Classifier(nn.Sequential(nn.Linear(5, 4), nn.Tanh()))
    with pytest.raises(ValueError, match="whose last linear layer gives its logits, Sequential does not"):
        ends_otherwise.features(torch.rand(2, 5))
    with pytest.raises(ValueError, match="ends in a linear layer, got Flatten without one"):
        Classifier(nn.Flatten()).features(torch.rand(2, 5))


def test_made_and_real_data_are_scored_in_the_rows_that_hold_what_is_needed() -> None:
    """`b` is shown as it is: the same score as the real `b`; `a` misses rows."""
    label = np.arange(40) % CLASSES
    seen = {"a": np.where(np.arange(40) % 5 == 0, -1, label), "b": label}
    objective, batch = planted({"a": modality(), "b": modality()}), rows(seen, label, padding=6)
    torch.manual_seed(1)
    judges = {"b": Classifier(nn.Sequential(nn.Linear(CLASSES, 6), nn.Tanh(), nn.Linear(6, CLASSES)))}
    learnt = evaluate(objective, [batch], [curvatures(judges, rows=30)])
    assert learnt["information/curvature/b"].count == 30
    layers = {"b": last_layer(judges["b"].head, learnt["information/curvature/b"])}
    found = evaluate(objective, [batch], [information(judges, layers, list("ab"), rows=35)])
    counts = {name: float(s.count) for name, s in found.items() if not name.endswith("square")}
    assert counts == {"information/real>b": 35, "information/b>b": 35, "information/a>b": 28}
    real, own = (float(found[f"information/{source}>b"].total / 35) for source in ("real", "b"))
    assert own == pytest.approx(real, rel=0.1) and real > 0.01
