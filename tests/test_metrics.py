"""Laws of the metrics: planted models with known coherence, exact evidences, and independent implementations."""

import json
import math
import re
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import nn

from meme_dist.data.fields import Field
from meme_dist.data.sets.linear_gaussian import parameters
from meme_dist.distributions import Components, DiagNormal
from meme_dist.evaluate import Measures, evaluate, flatten, measure, values
from meme_dist.likelihoods import Normal
from meme_dist.metrics import (
    Latents,
    Posterior,
    Query,
    aggregate,
    auroc,
    classifier_accuracy,
    collect,
    cross_coherence,
    evaluating,
    fit_linear,
    fit_logistic,
    imputations,
    jackknife,
    joint_coherence,
    latent_accuracy,
    log_likelihood,
    mean,
    over_runs,
    proportion,
    queries,
    relatedness,
    source_sets,
    within,
)
from meme_dist.metrics.relatedness import class_linkage, class_means
from meme_dist.modality import Modality
from meme_dist.noise import Noise
from meme_dist.objectives.meme import MEME
from meme_dist.types import Sums, pack_dense
from tests.planted import CLASSES, modality, planted, rows, shown

pytestmark = pytest.mark.repeats

ROTATED = [1, 2, 3, 0]


def sums(total: float, count: float) -> Sums:
    return Sums(torch.tensor(total, dtype=torch.float64), torch.tensor(count, dtype=torch.float64))


# ---- intervals --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hits", "count"), [(0, 7), (7, 7), (1, 3), (450, 1000), (9999, 10000)])
def test_the_interval_of_a_share_is_wilsons(hits: int, count: int) -> None:
    expected = stats.binomtest(hits, count).proportion_ci(0.95, method="wilson")
    found = proportion(sums(hits, count))
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert found.value == hits / count and found.count == count


@pytest.mark.parametrize("count", [2, 5, 500])
def test_the_interval_of_a_mean_is_students(count: int) -> None:
    x = np.random.default_rng(0).normal(-700, 30, size=count)
    expected = stats.t.interval(0.95, count - 1, x.mean(), stats.sem(x))
    found = mean(sums(x.sum(), count), sums((x**2).sum(), count))
    assert (found.low, found.high) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_interval_of_a_mean_of_few_rows_covers_it_as_often_as_it_says(count: int) -> None:
    drawn = np.random.default_rng(1).normal(3, 2, size=(1500, count))
    found = [mean(sums(x.sum(), count), sums((x**2).sum(), count)) for x in drawn]
    assert 0.93 < np.mean([one.low < 3 < one.high for one in found]) < 0.97


def test_no_share_of_finitely_many_rows_is_certain_and_none_leaves_its_range() -> None:
    for share, count in ((1.0, 5), (0.0, 5), (0.8, 5), (1.0, 10_000)):
        found = within(mean(sums(share * count, count), sums(share**2 * count, count)))
        expected = stats.binomtest(round(share * count), count).proportion_ci(0.95, method="wilson")
        assert found.value == pytest.approx(share) and (found.low, found.high) == pytest.approx((expected.low, expected.high))
        assert 0 <= found.low < found.high <= 1
    wide = within(mean(sums(4.9, 5), sums(4.81, 5)))
    assert wide.high == 1 and 0.9 < wide.low < 0.98
    assert within(jackknife(1.0, [1.0, 1.0], count=4), -1.0)[:3] == pytest.approx((1, 2 * proportion(sums(4, 4)).low - 1, 1))
    assert within(proportion(sums(0, 0))).count == 0


def test_the_interval_over_runs_is_students() -> None:
    runs = [0.71, 0.68, 0.74]
    expected = stats.t.interval(0.95, 2, np.mean(runs), stats.sem(runs))
    assert over_runs(runs)[:3] == pytest.approx((np.mean(runs), *expected), rel=1e-12)
    assert over_runs([0.5])[1:] == (-math.inf, math.inf, 1)


def test_nothing_measured_is_no_number_and_no_nan_in_json() -> None:
    for estimate in (proportion(sums(0, 0)), mean(sums(0, 0), sums(0, 0)), over_runs([])):
        assert estimate.count == 0 and math.isnan(estimate.value)
        assert json.loads(json.dumps(estimate.json(), allow_nan=False))["value"] is None


def test_the_jackknife_of_a_mean_leaving_one_out_is_its_standard_error() -> None:
    x = np.random.default_rng(1).exponential(size=25)
    parts = [np.delete(x, i).mean() for i in range(25)]
    half = stats.t.ppf(0.975, 24) * stats.sem(x)
    assert jackknife(x.mean(), parts, count=25)[:3] == pytest.approx((x.mean(), x.mean() - half, x.mean() + half), rel=1e-9)


def test_runs_are_aggregated_by_what_all_of_them_measured() -> None:
    found = aggregate([{"a": 1.0, "b": 5.0}, {"a": 3.0}])
    assert list(found) == ["a"] and found["a"].value == 2.0 and found["a"].count == 2
    with pytest.raises(ValueError, match="share no measured value"):
        aggregate([{"a": 1.0}, {"b": 1.0}])


# ---- coherence --------------------------------------------------------------------------------------------------------------------------


def test_cross_coherence_is_the_planted_one_for_every_source_set_of_incomplete_rows() -> None:
    """`a` misreads 30 rows of 100 by one class down, `c` shows every class one up; rows lack modalities at random, some hold nothing."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, CLASSES, 100)
    seen = {"a": np.where(np.arange(100) < 30, (label - 1) % CLASSES, label), "b": label, "c": label}
    held = rng.random((100, 3)) < 0.7
    held[held.sum(1) == 0] = True
    seen = {name: np.where(held[:, i], x, -1) for i, (name, x) in enumerate(seen.items())}
    objective = planted({"a": modality(), "b": modality(), "c": modality(ROTATED)}).train()
    sources = source_sets("abc")
    found = evaluate(objective, [rows(seen, label, padding=13)], [cross_coherence(dict.fromkeys("abc", shown), sources, own=True)])
    assert len(sources) == 7 and len(found) == 21
    for name in "ab":
        for target in "abc":
            there = seen[name] >= 0
            hits = there & ((seen[name] if target != "c" else (seen[name] + 1) % CLASSES) == label)
            assert found[f"cross_coherence/{name}>{target}"] == (hits.sum(), there.sum())
    both = (seen["b"] >= 0) & (seen["c"] >= 0)
    assert found["cross_coherence/b+c>a"] == (both.sum(), both.sum())  # two right readers: right whichever expert is drawn
    mixed = (seen["a"] >= 0) & (seen["b"] >= 0)
    misread = (mixed & (np.arange(100) < 30)).sum()
    hits, count = found["cross_coherence/a+b>c"]
    assert count == mixed.sum() and 0.2 * misread < hits < 0.8 * misread  # right by two wrongs, where the expert drawn is `a`
    assert found["cross_coherence/a+b+c>b"].count == held.all(1).sum()


def test_a_target_inside_the_sources_is_left_out_unless_asked_for() -> None:
    label = np.arange(8) % CLASSES
    objective = planted({"a": modality(), "b": modality()})
    found = evaluate(objective, [rows({"a": label, "b": label}, label)], [cross_coherence({"a": shown, "b": shown}, source_sets("ab"))])
    assert sorted(found) == ["cross_coherence/a>b", "cross_coherence/b>a"]


def test_sums_are_the_same_for_any_split_into_batches_and_ranks() -> None:
    """A model whose answers are a matter of the draw: only noise keyed to rows survives re-batching."""
    rng = np.random.default_rng(2)
    label = rng.integers(0, CLASSES, 60)
    seen = {name: np.where(rng.random(60) < 0.3, -1, label) for name in "ab"} | {"c": label}
    objective = planted({name: modality(raw=12.0) for name in "abc"})
    metrics = [
        cross_coherence(dict.fromkeys("abc", shown), source_sets("abc")),
        log_likelihood(queries("abc"), samples=(1, 4), rows=50),
        classifier_accuracy(dict.fromkeys("abc", shown)),
    ]

    def part(low: int, high: int, padding: int):
        return rows({name: x[low:high] for name, x in seen.items()}, label[low:high], first=low, padding=padding)

    whole = evaluate(objective, [part(0, 60, 0)], metrics)
    assert 0.3 < values(whole)["cross_coherence/a>b"] < 0.9  # the draws do matter
    ranks = [[part(0, 7, 9), part(7, 20, 3)], [part(20, 36, 0), part(36, 41, 11)], [part(41, 57, 0), part(57, 60, 13)]]
    parts = [evaluate(objective, rank, metrics) for rank in ranks]
    for name, (total, count) in whole.items():
        assert sum(float(p[name].count) for p in parts) == count
        assert sum(float(p[name].total) for p in parts) == pytest.approx(float(total), rel=1e-5)


def test_reduce_is_called_once_and_adds_up_all_sums() -> None:
    label = np.arange(8) % CLASSES
    objective, batch = planted({"a": modality(), "b": modality()}), rows({"a": np.arange(8) % CLASSES, "b": np.arange(8) % CLASSES}, label)
    metrics = [cross_coherence({"a": shown, "b": shown}, source_sets("ab")), classifier_accuracy({"a": shown})]
    seen = []
    found = evaluate(objective, [batch], metrics, reduce=lambda table: seen.append(table.shape) or 3 * table)
    assert seen == [(6,)] and found["cross_coherence/a>b"] == (24, 24)


def test_modes_come_back_part_by_part_even_after_an_error() -> None:
    objective = planted({"a": modality(), "b": modality()}).train()
    objective.modalities["a"].eval()
    before = [part.training for part in objective.modules()]
    evaluate(objective, [rows({"a": np.zeros(3, int), "b": np.zeros(3, int)}, np.zeros(3, int))], [classifier_accuracy({"a": shown})])
    assert [part.training for part in objective.modules()] == before
    with pytest.raises(ZeroDivisionError), evaluating(objective):
        assert not any(part.training for part in objective.modules()) and not torch.is_grad_enabled()
        raise ZeroDivisionError
    assert [part.training for part in objective.modules()] == before and torch.is_grad_enabled()


def test_missing_labels_unknown_modalities_and_empty_streams_are_errors() -> None:
    objective, batch = planted({"a": modality(), "b": modality()}), rows({"a": np.zeros(3, int), "b": np.zeros(3, int)}, None)
    for metric in (cross_coherence({"a": shown, "b": shown}, [("a",)]), classifier_accuracy({"a": shown})):
        with pytest.raises(ValueError, match="needs class labels and this data set has none"):
            evaluate(objective, [batch], [metric])
    with pytest.raises(ValueError, match=r"unknown modalities \['x'\]; this batch has \['a', 'b'\]"):
        evaluate(objective, [batch], [log_likelihood([Query(("x",))])])
    with pytest.raises(ValueError, match="expected at least one batch"):
        evaluate(objective, [], [classifier_accuracy({"a": shown})])
    with pytest.raises(ValueError, match="two or more classifiers"):
        joint_coherence(objective, {"a": shown})


def test_source_sets_are_all_subsets_or_an_even_sample_of_every_size() -> None:
    assert source_sets("abc") == [tuple(c) for size in (1, 2, 3) for c in combinations("abc", size)]
    names = [f"m{i}" for i in range(40)]
    chosen = source_sets(names, most=200)
    sizes = [len(c) for c in chosen]
    assert len(set(chosen)) == 200 and chosen == source_sets(names, most=200)
    assert sizes.count(1) == 40 and {sizes.count(size) for size in range(2, 40)} == {4, 5} and sizes.count(40) == 1
    assert all(list(c) == sorted(c, key=names.index) for c in chosen)
    assert [sum(len(c) == size for c in source_sets("abcde", most=20)) for size in range(1, 6)] == [5, 5, 5, 4, 1]


def test_joint_coherence_is_the_planted_one_and_adds_over_ranks() -> None:
    """The prior draws classes 0 and 1 evenly; `c` shows 0 as 1: it agrees on class 1 alone."""
    objective = planted({"a": modality(), "b": modality(), "c": modality([1, 1, 2, 3])}, prior=2)
    classifiers = dict.fromkeys("abc", shown)
    with evaluating(objective):
        whole = joint_coherence(objective, classifiers, num=2000, seed=3, chunk=300)
        parts = [joint_coherence(objective, classifiers, num=2000, seed=3, rank=rank, world=3) for rank in range(3)]
        z = objective.prior().sample(Noise(3, torch.arange(2000)), "joint coherence", 1)[0]
    ones = int((z.argmax(-1) == 1).sum())
    assert whole["joint_coherence/a=b"] == (2000, 2000)
    assert whole["joint_coherence/a=c"] == whole["joint_coherence/all"] == (ones, 2000)
    low, high = proportion(whole["joint_coherence/all"])[1:3]
    assert low < 0.5 < high
    for name, (total, count) in whole.items():
        assert (sum(float(p[name].total) for p in parts), sum(float(p[name].count) for p in parts)) == (total, count)


def test_imputation_shows_the_class_that_the_observed_modalities_show() -> None:
    label = np.array([0, 1, 2, 3])
    made = imputations(planted({"a": modality(), "b": modality()}), rows({"a": label, "b": np.full(4, -1)}, None), samples=2)
    assert made["b"].argmax(-1).tolist() == [label.tolist()] * 2


# ---- likelihood -------------------------------------------------------------------------------------------------------------------------

TRUTH = parameters(modalities=3, latent_dim=2, event=4, seed=5)


class Exact(nn.Module):
    """The posterior p(z | x_j) of linear-Gaussian data, its scale multiplied by `spread`."""

    def __init__(self, name: str, spread: float):
        super().__init__()
        self.name, self.spread = name, spread

    def forward(self, x):
        posterior_mean, stddev = TRUTH.posterior({self.name: x})
        raw = torch.log(torch.expm1(self.spread * stddev - 1e-3))
        return torch.cat([posterior_mean, raw], -1).float()


class Standard(MEME):
    """With the prior N(0, I) that the data were made with."""

    def prior(self):
        return Components(DiagNormal(torch.zeros(1, 2), torch.ones(1, 2)))


def linear_model(spread: float = 1.0, weight: float = 1.0) -> Standard:
    modalities = {}
    for name, columns in TRUTH.weight.items():
        decoder = nn.Linear(2, 4)
        decoder.weight.data, decoder.bias.data = columns.float(), TRUTH.bias[name].float()
        likelihood = Normal(TRUTH.scale[name])
        modalities[name] = Modality(
            encoder=Exact(name, spread), decoder=decoder, likelihood=likelihood, latent_dim=2, feature=(4,), weight=weight
        )
    return Standard(modalities, pseudo_inputs=1)


def linear_data(count: int, *, missing: float = 0.0, seed: int = 0):
    rng = np.random.default_rng(seed)
    z = torch.from_numpy(rng.normal(size=(count, 2)))
    x = {
        n: (z @ w.T + TRUTH.bias[n] + TRUTH.scale[n] * torch.from_numpy(rng.normal(size=(count, 4)))).float()
        for n, w in TRUTH.weight.items()
    }
    observed = {name: torch.from_numpy(rng.random(count) >= missing) for name in x}
    return x, observed


def evidence(x: dict) -> np.ndarray:
    """log p(x) of these modalities by scipy's multivariate Normal: independent of the set's own formula."""
    w, bias = (torch.cat([table[name] for name in x]).numpy() for table in (TRUTH.weight, TRUTH.bias))
    noise = np.concatenate([np.full(4, TRUTH.scale[name] ** 2) for name in x])
    return multivariate_normal.logpdf(torch.cat(list(x.values()), 1).numpy(), bias, w @ w.T + np.diag(noise))


def bounds(objective, x, observed, asked, **keywords) -> dict[str, Sums]:
    return evaluate(objective, [pack_dense(x, observed)], [log_likelihood(asked, **keywords)])


def test_the_bound_is_the_evidence_for_every_k_where_the_posterior_is_exact() -> None:
    x, observed = linear_data(40)
    found = values(bounds(linear_model(), x, observed, [Query(("x0",)), Query(("x2",))], samples=(1, 5)))
    for name in ("x0", "x2"):
        exact = evidence({name: x[name]}).mean()
        assert found[f"log_likelihood/{name}@1"] == pytest.approx(exact, abs=2e-4)
        assert found[f"log_likelihood/{name}@5"] == pytest.approx(exact, abs=2e-4)


@pytest.mark.parametrize("query", [Query(("x0",)), Query(("x0", "x1", "x2")), Query(("x1",), ("x0",)), Query(("x2",), ("x0", "x1"))])
def test_the_bound_stays_below_the_exact_evidence_rises_with_k_and_comes_near(query: Query) -> None:
    """Posteriors half as wide again as they should be; (x1 | x0) also starts from a posterior that has not seen x0."""
    x, observed = linear_data(400, seed=1)
    objective = linear_model(spread=1.5)
    found = bounds(objective, x, observed, [query], samples=(1, 10, 200))
    keys = [key for key in found if not key.endswith("/square")]
    estimates = {int(key.split("@")[1]): mean(found[key], found[f"{key}/square"]) for key in keys}
    exact = conditional(x, query) if query.given else evidence({name: x[name] for name in query.targets})
    gaps = {num: exact.mean() - estimate.value for num, estimate in estimates.items()}
    error = {num: monte_carlo_error(objective, x, query, num) for num in estimates}
    assert all(gaps[num] > -4 * error[num] for num in gaps)
    assert gaps[1] > 0.1 and gaps[200] < max(0.02, 4 * error[200])
    assert estimates[1].value < estimates[10].value < estimates[200].value


def conditional(x, query: Query) -> np.ndarray:
    """log of the integral of p(x_i | z) under the even mixture of the widened q(z | x_j), j given: Normals, by scipy."""
    (target,), parts = query.targets, []
    w, b, noise = TRUTH.weight[target].numpy(), TRUTH.bias[target].numpy(), TRUTH.scale[target] ** 2
    for given in query.given:
        posterior_mean, stddev = TRUTH.posterior({given: x[given]})
        covariance = w @ np.diag((1.5 * stddev[0].numpy()) ** 2) @ w.T + noise * np.eye(4)
        parts.append(multivariate_normal.logpdf(x[target].numpy() - posterior_mean.numpy() @ w.T - b, np.zeros(4), covariance))
    return logsumexp(parts, axis=0) - math.log(len(parts))


def monte_carlo_error(objective, x, query: Query, num: int) -> float:
    """The spread of the mean bound over draws of the noise alone."""
    batches = [pack_dense(x, {n: torch.ones(len(v), dtype=torch.bool) for n, v in x.items()}, seed=seed) for seed in range(1, 6)]
    runs = [values(evaluate(objective, [b], [log_likelihood([query], samples=(num,))])) for b in batches]
    return float(np.std([next(iter(run.values())) for run in runs], ddof=1))


def test_a_larger_k_never_lowers_the_bound_of_any_row() -> None:
    x, observed = linear_data(30, seed=2)
    for row in range(30):
        one = {name: value[row : row + 1] for name, value in x.items()}
        there = {name: held[:1] for name, held in observed.items()}
        found = values(bounds(linear_model(spread=2.0), one, there, [Query(("x1",), ("x0",))], samples=(1, 2, 6, 12)))
        rising = [found[f"log_likelihood/x1|x0@{num}"] for num in (1, 2, 6, 12)]
        assert rising == sorted(rising) and rising[0] < rising[-1]


def test_likelihoods_ignore_training_weights_chunks_and_absent_content() -> None:
    x, observed = linear_data(50, missing=0.4, seed=3)
    asked = queries(list(x))
    plain = bounds(linear_model(1.3), x, observed, asked, samples=(1, 20))
    poisoned = {name: torch.where(observed[name][:, None], value, torch.nan) for name, value in x.items()}
    for other in (
        bounds(linear_model(1.3, weight=7.0), x, observed, asked, samples=(1, 20)),
        bounds(linear_model(1.3, weight=0.0), x, observed, asked, samples=(1, 20)),
        bounds(linear_model(1.3), x, observed, asked, samples=(1, 20), chunk=3),
        bounds(linear_model(1.3), poisoned, observed, asked, samples=(1, 20)),
    ):
        for name, (total, count) in plain.items():
            assert float(other[name].total) == pytest.approx(float(total), rel=1e-4) and other[name].count == count
    both = observed["x0"] & observed["x1"]
    assert plain["log_likelihood/x1|x0@20"].count == both.sum()
    assert plain["log_likelihood/x0+x1+x2@20"].count == (both & observed["x2"]).sum()
    limited = bounds(linear_model(1.3), x, observed, asked, samples=(1,), rows=10)
    assert limited["log_likelihood/x1|x0@1"].count == both[:10].sum()


def test_what_is_asked_together_shares_decodings_and_is_what_is_asked_alone() -> None:
    """N modalities have N^2 + N + 1 queries of 2 N targets in all: each target alone, whatever is given, and all at once."""
    (x, observed), counted = linear_data(50, missing=0.4, seed=3), []
    objective, asked = linear_model(1.3), queries(list(x))
    for name in x:
        objective.modality(name).decoder.register_forward_hook(lambda _, args, out: counted.append(len(out)))
    together = bounds(objective, x, observed, asked, samples=(1, 20))
    held = torch.stack(list(observed.values()), 1)
    assert sum(counted) == 20 * (int(held.sum()) + 3 * int(held.all(1).sum()))
    for query in asked:
        for name, sums in bounds(objective, x, observed, [query], samples=(1, 20)).items():
            assert float(together[name].total) == pytest.approx(float(sums.total), rel=1e-6) and together[name].count == sums.count


def test_numbers_of_samples_must_divide_the_largest() -> None:
    with pytest.raises(ValueError, match=r"must divide the largest, got \(3, 10\)"):
        log_likelihood([Query(("a",))], samples=(3, 10))
    assert len(queries("abc")) == 3 + 1 + 6 + 3 and len(queries("ab")) == 2 + 1 + 2


# ---- latents and probes -----------------------------------------------------------------------------------------------------------------


def test_latents_are_the_same_table_from_any_ranks_and_hold_what_is_observed() -> None:
    rng = np.random.default_rng(4)
    label = rng.integers(0, CLASSES, 40)
    seen = {"a": np.where(rng.random(40) < 0.3, -1, label), "b": label}
    objective = planted({"a": modality(raw=1.0), "b": modality()})
    parts = [(0, 15), (15, 28), (28, 40)]
    batches = [rows({n: x[low:high] for n, x in seen.items()}, label[low:high], first=low, padding=2) for low, high in parts]
    whole = collect(objective, batches, rows=30, sources=[("a",), ("b",), ("a", "b")])
    tables: list[list[torch.Tensor]] = [[], [], []]
    for rank, batch in enumerate(batches):
        collect(objective, [batch], rows=30, sources=[("a",), ("b",), ("a", "b")], reduce=lambda t, r=rank: tables[r].append(t) or t)
    added = [sum(parts) for parts in zip(*tables, strict=True)]
    assert torch.equal(added[-1] - 1, whole.label) and torch.equal(whole.label, torch.from_numpy(label[:30]))
    for table, posterior in zip(added, whole.posteriors.values(), strict=False):
        assert torch.equal(table[:, :CLASSES], posterior.mean) and torch.equal(table[:, -1] > 0, posterior.observed)
    assert torch.equal(whole.posteriors["a",].observed, torch.from_numpy(seen["a"][:30] >= 0))
    at = whole.posteriors["b",]
    assert torch.equal(at.mean.argmax(-1), whole.label) and float((at.sample - at.mean).abs().max()) < 0.01
    wide = Posterior(*(x[whole.posteriors["a",].observed] for x in whole.posteriors["a",]))
    assert 0.75 < float(((wide.sample - wide.mean) / wide.stddev).std()) < 1.25  # samples, not means
    unlabelled = collect(objective, [rows(seen, None)], rows=50)
    assert (unlabelled.label == -1).all() and not unlabelled.posteriors["b",].observed[40:].any()


def test_the_logistic_probe_is_scikit_learns() -> None:
    rng = np.random.default_rng(5)
    label = rng.integers(0, 3, 300)
    z = rng.normal(size=(300, 5)) + 1.2 * np.eye(3, 5)[label]
    reference = LogisticRegression(C=1 / 0.7, tol=1e-10, max_iter=5000).fit(z, label)
    probe = fit_logistic(torch.from_numpy(z), torch.from_numpy(label), 3, penalty=0.7)
    probability = probe(torch.from_numpy(z).float()).softmax(-1).numpy()
    assert np.abs(probability - reference.predict_proba(z)).max() < 1e-4
    assert np.abs(probe.weight.numpy() - reference.coef_).max() < 1e-4


@pytest.mark.parametrize("fit", [fit_linear, fit_logistic])
def test_probes_reach_the_bayes_accuracy_of_two_normal_classes(fit) -> None:
    """N(-1, 1) against N(1, 1) in one coordinate of three: Phi(1) = .841 at best."""
    rng = np.random.default_rng(6)
    tables = []
    for _ in range(2):
        label = torch.from_numpy(rng.integers(0, 2, 4000))
        z = torch.from_numpy(rng.normal(size=(4000, 3))).float()
        z[:, 0] += 2 * label - 1
        tables.append(Latents({("a",): Posterior(z, torch.ones_like(z), z, torch.ones(4000, dtype=torch.bool))}, label))
    state = torch.random.get_rng_state()
    found = latent_accuracy(*tables, classes=2, fit=fit)["a",]
    assert found.low < stats.norm.cdf(1) < found.high and found.count == 4000
    assert torch.equal(state, torch.random.get_rng_state())
    assert found == latent_accuracy(*tables, classes=2, fit=fit)["a",]


def test_probes_judge_unseen_rows_and_count_only_those_with_source_and_label() -> None:
    """Labels that have nothing to do with z: learnt by heart they would be right, on new rows they are not."""
    rng = np.random.default_rng(7)
    z = torch.from_numpy(rng.normal(size=(60, 40))).float()
    label, there = torch.from_numpy(rng.integers(0, 2, 60)), torch.from_numpy(rng.random(60) < 0.8)
    train = Latents({("a",): Posterior(z, z, z, there)}, label)
    fresh = torch.from_numpy(rng.normal(size=(60, 40))).float()
    test = Latents({("a",): Posterior(fresh, fresh, fresh, there)}, torch.where(torch.arange(60) < 10, -1, label))
    found = latent_accuracy(train, test, classes=2, fit=fit_logistic)["a",]
    assert found.count == int(there[10:].sum()) and found.low < 0.5 < found.high
    assert latent_accuracy(train, train, classes=2, fit=fit_logistic)["a",].value > 0.95
    with pytest.raises(ValueError, match="latent accuracy needs class labels"):
        latent_accuracy(train._replace(label=torch.full((60,), -1)), test, classes=2)


# ---- relatedness ------------------------------------------------------------------------------------------------------------------------


def test_auroc_is_scikit_learns_ties_included() -> None:
    rng = np.random.default_rng(8)
    for count, levels in ((50, 4), (200, 10**6), (7, 2)):
        score, positive = rng.integers(0, levels, count).astype(float), rng.random(count) < 0.3
        positive[:2] = True, False
        assert auroc(score, positive) == pytest.approx(roc_auc_score(positive, score), abs=1e-12)
    assert math.isnan(auroc(np.ones(3), np.ones(3, dtype=bool)))


def cloud(rng, count: int, label: np.ndarray, pull: float, missing: float = 0.0) -> Posterior:
    posterior_mean = torch.from_numpy(rng.normal(size=(count, 4)) + pull * np.eye(CLASSES)[label]).float()
    stddev = torch.from_numpy(rng.uniform(0.2, 1.5, size=(count, 4))).float()
    return Posterior(posterior_mean, stddev, posterior_mean, torch.from_numpy(rng.random(count) >= missing))


def general_w2(mean_a, scale_a, mean_b, scale_b) -> float:
    """For any Normals: ||m||^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), by matrix square roots."""
    from scipy.linalg import sqrtm

    a, b = np.diag(scale_a**2), np.diag(scale_b**2)
    root = sqrtm(a)
    return math.sqrt(max(0.0, ((mean_a - mean_b) ** 2).sum() + np.trace(a + b - 2 * np.real(sqrtm(root @ b @ root)))))


def test_relatedness_is_the_auroc_of_the_general_wasserstein_distance_on_rows_that_are_there() -> None:
    rng = np.random.default_rng(9)
    label = rng.integers(0, CLASSES, 25)
    a, b = cloud(rng, 25, label, 2.0, missing=0.3), cloud(rng, 25, label, 2.0, missing=0.3)
    label[3] = -1
    found = relatedness(Latents({("a",): a, ("b",): b}, torch.from_numpy(label)), classes=CLASSES)["a", "b"]
    rows_a, rows_b = np.flatnonzero(a.observed.numpy()), np.flatnonzero(b.observed.numpy())
    distance = np.array(
        [
            [general_w2(*(x.numpy()[i].astype(float) for x in a[:2]), *(x.numpy()[j].astype(float) for x in b[:2])) for j in rows_b]
            for i in rows_a
        ]
    )
    same_row = rows_a[:, None] == rows_b
    assert found.auroc_row.value == pytest.approx(roc_auc_score(same_row.ravel(), -distance.ravel()), abs=1e-9)
    known = (label[rows_a][:, None] >= 0) & (label[rows_b] >= 0)
    same = label[rows_a][:, None] == label[rows_b]
    assert found.auroc_class is not None and found.class_matrix is not None
    assert found.auroc_class.value == pytest.approx(roc_auc_score(same[known], -distance[known]), abs=1e-9)
    assert found.class_matrix[1, 2] == pytest.approx(distance[(label[rows_a] == 1)[:, None] & (label[rows_b] == 2)].mean(), rel=1e-5)
    assert found.histogram.paired.sum() == same[known].sum() and found.histogram.unpaired.sum() == (~same & known).sum()


def test_relatedness_is_one_for_equal_classes_and_a_half_for_strangers() -> None:
    rng = np.random.default_rng(10)
    label = rng.integers(0, CLASSES, 200)
    near = relatedness(
        Latents({("a",): cloud(rng, 200, label, 60.0), ("b",): cloud(rng, 200, label, 60.0)}, torch.from_numpy(label)), classes=4
    )
    far = relatedness(
        Latents({("a",): cloud(rng, 200, label, 0.0), ("b",): cloud(rng, 200, label, 0.0)}, torch.from_numpy(label)), classes=4
    )
    assert near["a", "b"].auroc_class == pytest.approx(proportion(sums(200, 200)))
    strangers = far["a", "b"].auroc_class
    assert strangers is not None and strangers.low < 0.5 < strangers.high and strangers.high - strangers.low < 0.06
    unlabelled = relatedness(
        Latents({("a",): cloud(rng, 30, label[:30], 1.0), ("b",): cloud(rng, 30, label[:30], 1.0)}, torch.full((30,), -1))
    )
    assert unlabelled["a", "b"].auroc_class is None and unlabelled["a", "b"].histogram.paired.sum() == 30


def test_the_interval_of_relatedness_covers_the_truth_in_nine_of_ten_repetitions() -> None:
    """Same-row AUROC of independent rows, the truth from a run ten times as large; pairs that share rows are far from independent."""

    def one(count: int, seed: int):
        rng = np.random.default_rng(seed)
        shared = rng.normal(size=(count, 2))
        pair = [torch.from_numpy(shared + 0.7 * rng.normal(size=(count, 2))).float() for _ in range(2)]
        there = torch.ones(count, dtype=torch.bool)
        table = {(n,): Posterior(m, torch.ones_like(m), m, there) for n, m in zip("ab", pair, strict=True)}
        return relatedness(Latents(table, torch.full((count,), -1)))["a", "b"].auroc_row

    truth = np.mean([one(800, 1000 + seed).value for seed in range(4)])
    covered = [(e := one(80, seed)).low < truth < e.high for seed in range(60)]
    assert np.mean(covered) > 0.85


def test_the_interval_of_relatedness_leaves_groups_of_rows_out_of_both_modalities() -> None:
    rng = np.random.default_rng(13)
    label = rng.integers(0, CLASSES, 60)
    table = {("a",): cloud(rng, 60, label, 1.0, missing=0.2), ("b",): cloud(rng, 60, label, 1.0, missing=0.2)}

    def without(group: int) -> float:
        kept = torch.arange(60) % 10 != group
        fewer = {names: posterior._replace(observed=posterior.observed & kept) for names, posterior in table.items()}
        found = relatedness(Latents(fewer, torch.from_numpy(label)), classes=CLASSES)["a", "b"].auroc_class
        assert found is not None
        return found.value

    whole = relatedness(Latents(table, torch.from_numpy(label)), classes=CLASSES)["a", "b"].auroc_class
    assert whole is not None
    assert whole[:3] == pytest.approx(jackknife(whole.value, [without(group) for group in range(10)], count=0)[:3], abs=1e-9)


def test_class_means_are_those_of_a_double_loop_and_the_tree_is_scipys() -> None:
    rng = np.random.default_rng(11)
    distance, a, b = rng.random((30, 20)), rng.integers(0, 3, 30), rng.integers(0, 3, 20)
    matrix = class_means(distance, a, b, 3)
    loop = np.array([[distance[a == i][:, b == j].mean() for j in range(3)] for i in range(3)])
    assert np.abs(matrix - loop).max() < 1e-12
    symmetric = (loop + loop.T) / 2 * (1 - np.eye(3))
    tree = class_linkage(matrix)
    assert tree is not None and np.allclose(tree, linkage(squareform(symmetric), "average"))
    empty = class_means(distance, a, b, 4)
    assert np.isnan(empty[3]).all() and np.isnan(empty[:, 3]).all() and class_linkage(empty) is None


# ---- all of it --------------------------------------------------------------------------------------------------------------------------

FIELD = Field(kind="vector", shape=(CLASSES,), codec="npy", likelihood="normal")
SMALL = Measures(joint_draws=200, probe_rows=100, relatedness_rows=60, likelihood_rows=20, likelihood_samples=(1, 4))


def measured(label: np.ndarray | None, classes: tuple[str, ...], **keywords):
    rng = np.random.default_rng(12)
    kept = np.arange(80) % CLASSES
    seen = {"a": np.where(rng.random(80) < 0.25, -1, kept), "b": kept, "c": kept}
    objective = planted({"a": modality(), "b": modality(ROTATED), "c": modality()})
    data = [rows(seen, label, padding=16)]
    classifiers = dict.fromkeys("abc", shown) if classes else {}
    return measure(
        objective,
        train=data,
        test=data,
        fields=dict.fromkeys("abc", FIELD),
        classes=classes,
        classifiers=classifiers,
        measures=SMALL,
        **keywords,
    )


def test_everything_is_measured_at_once_as_plain_json_with_the_planted_values() -> None:
    results = measured(np.arange(80) % CLASSES, tuple("wxyz")).results
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    flat = flatten(results)
    assert flat["cross_coherence/a>c"] == 1.0 and flat["cross_coherence/a+c>b"] == 0.0 and flat["classifier/b"] == 1.0
    assert flat["joint_coherence/a=c"] == 1.0 and flat["joint_coherence/all"] == flat["joint_coherence/a=b"] == 0.0
    assert flat["latent_accuracy/a"] == flat["latent_accuracy/b"] == 1.0 and flat["auroc_class/a-b"] == 1.0
    assert flat["log_likelihood/a@1"] <= flat["log_likelihood/a@4"]
    assert results["cross_coherence"][0]["count"] == results["latent_accuracy"][0]["count"] < 80
    per_row, per_dimension = (results["log_likelihood"][0][name] for name in ("value", "per_dimension"))
    assert per_row / CLASSES == pytest.approx(per_dimension) and "left_out" not in results


def test_without_classes_what_needs_them_is_left_out_with_the_reason() -> None:
    results = measured(None, ()).results
    assert set(results["left_out"]) == {"cross_coherence", "joint_coherence", "latent_accuracy", "clustering"}
    assert not {"cross_coherence", "coherence_by_inputs", "joint_coherence", "latent_accuracy", "clustering", "classifiers"} & set(results)
    assert len(results["relatedness"]) == 3 and "auroc_class" not in results["relatedness"][0] and results["log_likelihood"]


def test_without_a_single_labelled_row_all_else_is_measured() -> None:
    results = measured(np.full(80, -1), tuple("wxyz")).results
    assert results["left_out"]["cross_coherence"] == "needs class labels, and no test row that holds its sources has one"
    assert results["left_out"]["latent_accuracy"] == "needs class labels, and no training row has one"
    assert not {"cross_coherence", "coherence_by_inputs", "latent_accuracy"} & set(results) and results["imputation"]


def test_one_class_says_nothing_about_classes() -> None:
    results = measured(np.zeros(80, dtype=int), ("w",)).results
    expected = dict.fromkeys(("cross_coherence", "joint_coherence", "latent_accuracy", "clustering"), "two classes or more, .* has one")
    assert results["left_out"].keys() == expected.keys() and not expected.keys() & results.keys()
    assert all(re.search(pattern, results["left_out"][name]) for name, pattern in expected.items())


def test_every_measured_share_has_a_width_inside_its_range() -> None:
    """The planted model is right in every row that it can be: nothing but certainty, were it not for the number of rows."""
    results = measured(np.arange(80) % CLASSES, tuple("wxyz")).results
    shares = [*results["classifiers"].values(), *results["cross_coherence"], *results["coherence_by_inputs"], *results["latent_accuracy"]]
    shares += [results["joint_coherence"]["all"], *(one["nmi"] for one in results["clustering"])]
    shares += [one[name] for one in results["relatedness"] for name in ("auroc_class", "auroc_row")]
    shares += [share for one in results["imputation"] for share in one["coverage"].values()]
    assert {one["value"] for one in shares} >= {0.0, 1.0}
    assert all(0 <= one["low"] < one["high"] <= 1 for one in shares)
    assert all(-1 <= one["ari"]["low"] < one["ari"]["high"] <= 1 for one in results["clustering"])


def test_relatedness_of_rows_that_are_no_pairs_counts_none() -> None:
    there, mean = torch.arange(6) < 3, torch.arange(12.0).view(6, 2)
    table = {(name,): Posterior(mean, torch.ones(6, 2), mean, seen) for name, seen in (("a", there), ("b", ~there))}
    found = relatedness(Latents(table, torch.full((6,), -1)))["a", "b"].auroc_row
    assert math.isnan(found.value) and found.count == 0
