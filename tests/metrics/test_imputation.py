"""Laws of imputation: exact posteriors are calibrated, errors are what linear Normals must have, draws follow their likelihood."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from meme_dist.evaluate import evaluate, values
from meme_dist.likelihoods import Bernoulli, Categorical, Laplace, NegativeBinomial, Normal, Poisson
from meme_dist.metrics import mean, source_sets
from meme_dist.metrics.imputation import imputation, pattern_of
from meme_dist.metrics.predictive import can_draw, covered, crps, draw, rank
from meme_dist.modality import Modality
from meme_dist.noise import Noise
from meme_dist.objectives.meme import MEME
from meme_dist.types import pack_dense
from tests.planted import CLASSES, modality, planted, rows
from tests.test_metrics import TRUTH, linear_data, linear_model

SINGLE = [("x0",), ("x1",), ("x2",)]


def measured(objective, x, observed, sources, **keywords):
    found = evaluate(objective, [pack_dense(x, observed)], [imputation(sources, **keywords)])
    return {name.removeprefix("imputation/"): mean(s, found[f"{name}/square"]) for name, s in found.items() if not name.endswith("/square")}


# ---- an exact posterior -----------------------------------------------------------------------------------------------------------------


def test_intervals_of_an_exact_posterior_hold_what_they_say_and_those_of_a_wrong_one_do_not() -> None:
    x, observed = linear_data(1500, seed=4)
    exact = measured(linear_model(), x, observed, SINGLE, rows=1500)
    for source, target in (("x0", "x1"), ("x1", "x2"), ("x2", "x0")):
        for level in (0.5, 0.8, 0.95):
            found = exact[f"{source}>{target}/coverage@{level}"]
            error = (found.high - found.low) / 2 / 1.96
            assert abs(found.value - level) < 4 * error < 0.06 and found.count == 1500
    narrow, wide = (measured(linear_model(spread), x, observed, [("x0",)], rows=400)["x0>x1/coverage@0.8"] for spread in (0.01, 4.0))
    assert narrow.high < 0.78 and wide.low > 0.85
    best = exact["x0>x1/crps"].value
    assert all(measured(linear_model(s), x, observed, [("x0",)], rows=1500)["x0>x1/crps"].value > best for s in (0.05, 3.0))


def test_errors_are_those_of_the_mean_of_k_draws() -> None:
    """E (x_j - mean_k)^2 = noise^2 + (1 + 1/K) W S W^T on the diagonal, S the posterior's covariance."""
    x, observed = linear_data(3000, seed=5)
    _, stddev = TRUTH.posterior({"x0": x["x0"]})
    spread = (TRUTH.weight["x1"] * stddev[0]).square().sum(1)
    for draws in (39, 199):
        found = measured(linear_model(), x, observed, [("x0",)], rows=3000, draws=draws)
        expected = float((TRUTH.scale["x1"] ** 2 + (1 + 1 / draws) * spread).mean())
        square = found["x0>x1/squared_error"]
        assert abs(square.value - expected) < 2 * (square.high - square.low)
        normal_mean = float((2 / math.pi * (TRUTH.scale["x1"] ** 2 + (1 + 1 / draws) * spread)).sqrt().mean())
        assert found["x0>x1/absolute_error"].value == pytest.approx(normal_mean, rel=0.03)


def test_the_predictive_likelihood_stays_below_the_exact_one_and_comes_near() -> None:
    x, observed = linear_data(400, seed=6)
    exact = float(TRUTH.conditional_evidence({"x1": x["x1"]}, {"x0": x["x0"]}).mean())
    few, many = (
        measured(linear_model(), x, observed, [("x0",)], rows=400, draws=draws)["x0>x1/log_likelihood"].value for draws in (39, 399)
    )
    assert exact - 0.25 < few < many < exact + 0.01 and exact - many < 0.03


def test_a_row_counts_where_it_holds_sources_and_target_whatever_batch_it_comes_in() -> None:
    x, observed = linear_data(60, missing=0.4, seed=7)
    x = {name: torch.where(observed[name][:, None], value, torch.nan) for name, value in x.items()}
    sources = source_sets(list(x))
    whole = evaluate(linear_model(), [pack_dense(x, observed)], [imputation(sources, rows=50)])
    cuts = [slice(0, 13), slice(13, 45), slice(45, 60)]
    batches = [
        pack_dense({n: v[cut] for n, v in x.items()}, {n: v[cut] for n, v in observed.items()}, draw=np.arange(60)[cut]) for cut in cuts
    ]
    parts = evaluate(linear_model(), batches, [imputation(sources, rows=50)])
    assert whole.keys() == parts.keys() and len([key for key in whole if key.endswith("coverage@0.8")]) == 9
    for name, (total, count) in whole.items():
        assert parts[name].count == count and float(parts[name].total) == pytest.approx(float(total), rel=1e-4, abs=1e-5)
    both = (observed["x0"] & observed["x1"] & observed["x2"])[:50].sum()
    assert whole["imputation/x0+x2>x1/crps"].count == both > 0
    for chosen in sources[:-1]:  # patterns share the noise of a target's draws, and each has what it has alone
        for name, (total, count) in evaluate(linear_model(), [pack_dense(x, observed)], [imputation([chosen], rows=50)]).items():
            assert whole[name].count == count and float(whole[name].total) == pytest.approx(float(total), rel=1e-9)


def test_up_to_five_modalities_patterns_stand_apart_and_beyond_together_by_their_size() -> None:
    assert pattern_of(("a", "b"), 5) == (2, ("a", "b")) and pattern_of(("a", "b"), 6) == (2, None)
    names, label = "abcdef", np.arange(12) % CLASSES
    objective = planted({name: modality() for name in names})
    found = evaluate(objective, [rows(dict.fromkeys(names, label), None)], [imputation([("a",), ("b",), ("a", "c")], rows=10)])
    assert found["imputation/1 observed>f/squared_error"].count == 10 and found["imputation/1 observed>b/squared_error"].count == 10
    assert found["imputation/2 observed>b/squared_error"].count == 10 and not any("a+c" in name for name in found)
    assert found["imputation/1 observed>f/squared_error"].total == 0


def test_a_row_counts_once_among_the_patterns_of_one_size() -> None:
    """Six modalities: a row's error is the same from any of five sources, and the interval is as wide as that of its rows."""
    names, label = "abcdef", np.arange(24) % CLASSES
    objective, seen = planted({name: modality() for name in names}), dict.fromkeys(names, label)
    seen["f"] = np.where(np.arange(24) % 2, label, (label + 1) % CLASSES)  # wrong in every other row, whatever asks
    seen["e"] = np.where(np.arange(24) < 12, label, -1)  # missing: those rows have four sources
    found = evaluate(objective, [rows(seen, label)], [imputation([(name,) for name in names], rows=24)])
    key = "imputation/1 observed>f/squared_error"
    assert found[key].count == 24
    one = float(found[key].total) / 12
    assert float(found[f"{key}/square"].total) == pytest.approx(12 * one**2)


# ---- other kinds of data ----------------------------------------------------------------------------------------------------------------


class Fixed(nn.Module):
    """Says the same whatever it is given."""

    def __init__(self, value: Tensor):
        super().__init__()
        self.register_buffer("value", value)

    def forward(self, x: Tensor) -> Tensor:
        return self.value.expand(len(x), *self.value.shape)


def fixed(params: Tensor, likelihood: nn.Module, event: tuple[int, ...]) -> MEME:
    """`y` has these parameters whatever z; `x` is there to start from."""
    blank = Modality(encoder=Fixed(torch.zeros(4)), decoder=Fixed(torch.zeros(2)), likelihood=Normal(), latent_dim=2, feature=(2,))
    target = Modality(encoder=Fixed(torch.zeros(4)), decoder=Fixed(params), likelihood=likelihood, latent_dim=2, feature=event)
    return MEME({"x": blank, "y": target}, pseudo_inputs=1)


def test_words_are_scored_by_place_without_padding() -> None:
    """The decoder says 3 4 2 2: of 3 4 2 0 all three words, of 3 3 4 2 the first and the last, of 5 2 0 0 none."""
    params = torch.zeros(4, 6)
    params[torch.arange(4), torch.tensor([3, 4, 2, 2])] = 3.0
    params[:, 0] = 9.0  # padding is never chosen
    y = torch.tensor([[3, 4, 2, 0], [3, 3, 4, 2], [5, 2, 0, 0]])
    there = torch.ones(3, dtype=torch.bool)
    found = measured(fixed(params, Categorical(), (4,)), {"x": torch.zeros(3, 2), "y": y}, {"x": there, "y": there}, [("x",)], rows=3)
    assert found["x>y/accuracy"].value == pytest.approx((1 + 0.5 + 0) / 3)
    assert not {"x>y/crps", "x>y/squared_error"} & found.keys()
    scores = params.log_softmax(-1)
    expected = [sum(float(scores[t, w]) for t, w in enumerate(sentence) if w) for sentence in y.tolist()]
    assert found["x>y/log_likelihood"].value == pytest.approx(np.mean(expected), rel=1e-5)


@pytest.mark.parametrize("kind", ["poisson", "negative_binomial"])
def test_counts_of_the_models_own_likelihood_are_calibrated_and_scored_by_it(kind: str) -> None:
    """Small counts, which equal many draws: ties broken at random keep every level exact."""
    rng, rate, dispersion = np.random.default_rng(8), np.array([0.3, 2.0, 40.0]), 1 + 1e-4
    params = torch.from_numpy(np.log(np.expm1(rate - 1e-4))).float()
    law = stats.poisson(rate) if kind == "poisson" else stats.nbinom(dispersion, dispersion / (dispersion + rate))
    y = law.rvs(size=(1500, 3), random_state=rng)
    there = torch.ones(1500, dtype=torch.bool)
    likelihood = Poisson() if kind == "poisson" else NegativeBinomial((3,))
    data = {"x": torch.zeros(1500, 2), "y": torch.from_numpy(y).float()}
    found = measured(fixed(params, likelihood, (3,)), data, {"x": there, "y": there}, [("x",)], rows=1500)
    for level in (0.5, 0.8, 0.95):
        estimate = found[f"x>y/coverage@{level}"]
        assert abs(estimate.value - level) < (estimate.high - estimate.low) < 0.05
    mass = law.logpmf if hasattr(law, "logpmf") else None
    assert mass is not None and found["x>y/log_likelihood"].value == pytest.approx(mass(y).sum(1).mean(), rel=1e-4)


# ---- draws ------------------------------------------------------------------------------------------------------------------------------

BIG = torch.tensor([-2.0, 0.5, 3.0])
DISPERSION = 3.0


def overdispersed() -> NegativeBinomial:
    likelihood = NegativeBinomial((3,))
    likelihood.raw.data.fill_(math.log(math.expm1(DISPERSION - 1e-4)))
    return likelihood


@pytest.mark.parametrize(
    ("likelihood", "law"),
    [
        (Normal(0.7), stats.norm(BIG.numpy(), 0.7)),
        (Laplace(0.7), stats.laplace(BIG.numpy(), 0.7)),
        (Poisson(), stats.poisson(np.log1p(np.exp(BIG.numpy())) + 1e-4)),
        (overdispersed(), stats.nbinom(DISPERSION, DISPERSION / (DISPERSION + np.log1p(np.exp(BIG.numpy())) + 1e-4))),
    ],
)
def test_draws_have_the_moments_of_their_likelihood_and_belong_to_their_row(likelihood, law) -> None:
    noise = Noise(3, torch.arange(1000))
    made = draw(likelihood, BIG.expand(20, 1000, 3), noise, "test").detach()
    flat = made.flatten(0, 1).double().numpy()
    assert np.all(np.abs(flat.mean(0) - law.mean()) < 4.5 * law.std() / np.sqrt(20_000))
    assert flat.var(0) == pytest.approx(law.var(), rel=0.1)
    assert abs(np.corrcoef(flat.T)[0, 1]) < 0.03 and abs(np.corrcoef(made[:, :, 2].double().numpy())[0, 1]) < 0.15
    some = Noise(3, torch.tensor([700, 5, 999]))
    assert torch.equal(draw(likelihood, BIG.expand(20, 3, 3), some, "test"), made[:, [700, 5, 999]])
    assert not torch.equal(draw(likelihood, BIG.expand(20, 3, 3), some, "other"), made[:, [700, 5, 999]])


def test_other_likelihoods_are_not_drawn_from() -> None:
    assert not can_draw(Bernoulli()) and not can_draw(Categorical())
    with pytest.raises(ValueError, match="expected a Normal, Laplace, Poisson or NegativeBinomial likelihood, got Bernoulli"):
        draw(Bernoulli(), torch.zeros(1, 1, 2), Noise(0, torch.arange(1)), "x")


def test_ranks_are_uniform_also_of_ties() -> None:
    rng = np.random.default_rng(9)
    for values_of in (rng.normal(size=(40, 500, 8)), rng.poisson(0.7, size=(40, 500, 8)), np.zeros((40, 500, 8))):
        x = torch.from_numpy(values_of).float()
        place = rank(x[1:], x[0], Noise(1, torch.arange(500)), "ties")
        seen = np.bincount(place.flatten().numpy(), minlength=40)
        assert len(seen) == 40 and stats.chisquare(seen).pvalue > 1e-3
    assert covered(torch.arange(40), 39, 0.95).sum() == 38 and covered(torch.arange(40), 39, 0.5).sum() == 20
    with pytest.raises(ValueError, match="take 39 or 199"):
        imputation([("a",)], rows=5, draws=50)


def test_crps_is_the_double_sum_and_of_many_normal_draws_the_closed_form() -> None:
    rng = np.random.default_rng(10)
    few, x = rng.normal(size=(7, 3, 2)), rng.normal(size=(3, 2))
    double = np.abs(few - x).mean(0) - np.abs(few[:, None] - few[None]).sum((0, 1)) / (2 * 7 * 6)
    assert np.allclose(crps(torch.from_numpy(few), torch.from_numpy(x)).numpy(), double, atol=1e-12)
    value = np.array([[0.0, 1.3, -2.0]])
    closed = value * (2 * stats.norm.cdf(value) - 1) + 2 * stats.norm.pdf(value) - 1 / math.sqrt(math.pi)
    many = torch.from_numpy(rng.normal(size=(20_000, 1, 3)))
    assert np.abs(crps(many, torch.from_numpy(value)).numpy() - closed).max() < 0.02


def test_likelihood_weights_of_the_training_leave_imputation_alone() -> None:
    x, observed = linear_data(30, seed=11)
    plain, weighted = (
        values(evaluate(linear_model(weight=w), [pack_dense(x, observed)], [imputation(SINGLE, rows=30)])) for w in (1.0, 7.0)
    )
    assert plain == pytest.approx(weighted)
