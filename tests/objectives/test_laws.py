"""Laws that every objective obeys, over one table of them: bounds, what may not matter, who takes part, what inference returns.

An objective that `TABLE` does not name fails the first test. What one objective alone promises is in a file of its own beside this one.
"""

import importlib
import inspect
import itertools
import math
import os
import pkgutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pytest
import torch
from scipy.linalg import block_diag
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from torch import Tensor, nn

import meme_dist.objectives
from meme_dist.distributions import DiagLaplace, DiagNormal
from meme_dist.likelihoods import Normal
from meme_dist.modality import Modality
from meme_dist.objectives.base import Objective
from meme_dist.pooled import Pooled
from meme_dist.train.trainer import Trainer, Training
from meme_dist.types import Batch, pack, pack_dense
from tests.objectives import test_meme as meme
from tests.ranks import run_ranks
from tests.test_engines import launched, needs
from tests.trainings import Rows, mixed

EVENT, D = 3, 2
NAMES = ("a", "b", "c")
PATTERNS = [p for p in itertools.product((0, 1), repeat=3) if any(p)]


class Case(NamedTuple):
    """Settings that make an objective the bound it claims to be, and what is known of it there."""

    keywords: Mapping[str, Any]
    tight: Literal["factors", "alone"] | None = None  # exact with encoders that are likelihood factors; or a lone modality's posterior
    private: int = 0
    evidence: Callable[..., float] | None = None  # of a row, where it is not log p(x) under the objective's prior; see `evidence`
    families: Sequence[type] = (DiagNormal,)


def _directions(objective: Any, x: Mapping[str, Tensor], observed: Sequence[int]) -> float:
    """MEME bounds the mean over the observed i of log p(x_i | x_T)."""
    return float(np.mean([meme.evidence(objective, x, observed, i) for i in np.flatnonzero(observed)]))


def _own_evidences(objective: Any, x: Mapping[str, Tensor], observed: Sequence[int]) -> float:
    """MMVM bounds the sum over the observed i of log of the integral of p_i(x_i | z) h(z | x), h the mixture that its docstring states."""
    names = [n for n, held in zip(x, observed, strict=True) if held]
    experts = [objective.modality(n).encode(x[n][None]) for n in names]
    experts = [DiagNormal(q.mean[0].detach(), q.scale[0].detach()) for q in experts] + [DiagNormal(torch.zeros(D), torch.ones(D))]
    weights = [(1 - objective.alpha) / len(names)] * len(names) + [objective.alpha]
    each = [logsumexp([meme.normal_log_prob(e, x[n], objective.modality(n)) for e in experts], b=weights) for n in names]
    return float(sum(each))


BOTH = (DiagNormal, DiagLaplace)
TABLE: dict[str, dict[str, Case]] = {
    "MEME": {
        "resampled": Case({"pseudo_inputs": 2, "samples": 3}, evidence=_directions, families=BOTH),  # tight: see test_meme.py
        "sampled": Case({"pseudo_inputs": 2, "samples": 3, "log_ratio": "sampled", "estimator": "rao_blackwell"}, evidence=_directions),
        "drawn": Case({"pseudo_inputs": 2, "samples": 1, "log_ratio": "sampled", "targets": 1}, evidence=_directions, families=BOTH),
    },
    "MMVAE": {
        "looser": Case({"samples": 3}, "alone", families=BOTH),
        "tight": Case({"samples": 3, "tight": True}, "alone"),
        "iwae": Case({"samples": 3, "gradient": "iwae", "resampled": False}, "alone"),
        "full_tight": Case({"samples": 3, "tight": True, "resampled": False}, "alone"),
        "unbiased": Case({"samples": 3, "gradient": "unbiased_dreg"}, families=BOTH),
        "unbiased_tight": Case({"samples": 3, "gradient": "unbiased_dreg", "tight": True}),
    },
    "MMVAEPlus": {
        "looser": Case({"samples": 3, "learned_auxiliary": False}, "alone", private=1, families=BOTH),
        "tight": Case({"samples": 3, "tight": True, "learned_auxiliary": False}, "alone", private=1),
        "full": Case({"samples": 3, "resampled": False}, private=1),
        "unbiased": Case({"samples": 3, "gradient": "unbiased_dreg"}, private=1),
    },
    "MVAE": {"one": Case({"beta": 1.0}, "factors"), "more": Case({"beta": 1.0, "subsets": 2}, "factors")},
    "MoPoE": {
        "all": Case({"beta": 1.0}, "alone"),
        "drawn": Case({"beta": 1.0, "standard": "never", "subsets": 2, "inference": "product"}, "alone"),
    },
    "MVTCAE": {"published": Case({}, "alone"), "elbo": Case({"alpha": 0.0, "beta": 1.0}, "alone")},
    "JMVAE": {"joint": Case({"hidden": 8}, families=BOTH), "product": Case({"hidden": 8, "several": "product"})},
    "MMVM": {
        "pairs": Case({"alpha": 0.0}, evidence=_own_evidences, families=BOTH),
        "mixture": Case({"alpha": 0.3, "divergence": "mixture"}, evidence=_own_evidences, families=BOTH),
        "standard": Case({"alpha": 1.0}, "alone", evidence=_own_evidences),
    },
    "CSVAE": {"no attributes": Case({"block_weight": 1.0}, "alone")},  # with attributes: test_csvae.py
    "Holder": {"resampled": Case({}, "alone"), "full": Case({"resampled": False}, "alone")},
}


RISING = dict.fromkeys(TABLE, ("beta",)) | {"JMVAE": ("beta", "alpha"), "MMVM": ("alpha",), "CSVAE": ("beta", "block_weight")}
"""What `anneal` lets rise; MMVM's alpha falls from 1."""


def objectives() -> dict[str, type[Objective]]:
    """Every objective of the package that can be built, by name."""
    for module in pkgutil.iter_modules(meme_dist.objectives.__path__):
        importlib.import_module(f"meme_dist.objectives.{module.name}")
    return {c.__name__: c for c in _below(Objective) if not inspect.isabstract(c) and c.__module__.startswith("meme_dist.objectives.")}


def _below(kind: type) -> Iterator[type]:
    for child in kind.__subclasses__():
        yield child
        yield from _below(child)


CLASSES = objectives()
CASES = [pytest.param(CLASSES[name], case, id=f"{name}-{label}") for name, row in TABLE.items() for label, case in row.items()]
FIRST = [pytest.param(CLASSES[name], next(iter(row.values())), id=name) for name, row in TABLE.items()]
VALUES = [c for c in CASES if c.values[1].keywords.get("resampled", True)]  # without resampling the value is the same: test_mmvae.py
every_case = pytest.mark.parametrize(("kind", "case"), CASES)
every_objective = pytest.mark.parametrize(("kind", "case"), FIRST)


def linear(private: int = 0) -> Modality:
    """x = W (z, w) + b + noise with any linear encoder: its evidence is known, and no bound is tight."""
    size, shape = D + private, {"dtype": torch.float64}
    decoder = nn.Linear(size, EVENT).double()
    gain, offset = 0.3 * torch.randn(size, EVENT, **shape), 0.3 * torch.randn(size, **shape)
    encoder = meme.LinearEncoder(gain, offset, 0.4 + torch.rand(size, **shape))
    keywords: dict[str, Any] = {"latent_dim": size, "private_dim": private, "feature": (EVENT,)}
    return Modality(encoder=encoder, decoder=decoder, likelihood=Normal(0.6 + torch.rand(1).item()), **keywords)


def network(private: int = 0, family: type = DiagNormal, shared: int = D) -> Modality:
    """Perceptrons, whose encoders do not see a quarter of the features: what holds of rows holds of what is hidden in them too."""
    size = shared + private
    encoder = nn.Sequential(nn.Linear(EVENT, 8), nn.Tanh(), nn.Linear(8, 2 * size))
    decoder = nn.Sequential(nn.Linear(size, 8), nn.Tanh(), nn.Linear(8, EVENT))
    keywords: dict[str, Any] = {"latent_dim": size, "private_dim": private, "feature": (EVENT,), "family": family, "dropout": 0.25}
    return Modality(encoder=encoder, decoder=decoder, likelihood=Normal(0.5), **keywords)


def build(kind: Any, case: Case, make: Callable[..., Modality] = network, names: Sequence[str] = NAMES, **shape: Any) -> Any:
    """The objective in float64, parameters that start at a constant (pseudo-inputs, prior scales) moved away from it."""
    objective = kind({name: make(case.private, **shape) for name in names}, **case.keywords).double()
    apart = [p for name, p in objective.named_parameters() if not name.startswith("modalities.")]
    for parameter in apart:
        parameter.data += 0.3 * torch.randn_like(parameter)
    return objective


def rows_of(pattern: Sequence[int], rows: int, **keywords: Any) -> Batch:
    present = {n: torch.randn(rows if held else 0, EVENT).double() for n, held in zip(NAMES, pattern, strict=True)}
    return pack(present, np.tile(pattern, (rows, 1)), **keywords)


def all_patterns(rows: int = 28) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Data and masks [rows] in which every pattern comes equally often."""
    masks = torch.tensor(PATTERNS).bool().repeat(-(-rows // len(PATTERNS)), 1)[:rows]
    return {n: torch.randn(rows, EVENT).double() for n in NAMES}, {n: masks[:, i] for i, n in enumerate(NAMES)}


def gradient(objective: Any, *batches: Batch) -> tuple[Tensor, Tensor]:
    objective.zero_grad()
    total = torch.stack([objective(batch).total for batch in batches]).sum()
    total.backward()
    return total.detach(), torch.cat([p.grad.flatten() for p in objective.parameters()])


@torch.no_grad()
def evidence(objective: Any, x: Mapping[str, Tensor], observed: Sequence[int]) -> float:
    """log p(x_observed) by scipy: a Normal in all observed numbers at once, for each component of the prior."""
    held = [(objective.modality(n), x[n]) for n, there in zip(x, observed, strict=True) if there]
    shared = np.concatenate([m.decoder.weight[:, :D].numpy() for m, _ in held])
    apart = [(m.decoder.weight[:, D:].numpy(), m.likelihood.fixed) for m, _ in held]
    own = block_diag(*[w @ w.T + noise**2 * np.eye(len(w)) for w, noise in apart])
    bias, values = np.concatenate([m.decoder.bias.numpy() for m, _ in held]), np.concatenate([v.numpy() for _, v in held])
    prior = objective.prior().components
    scores = [
        multivariate_normal.logpdf(values, bias + shared @ mean.numpy(), own + shared @ np.diag(scale.numpy() ** 2) @ shared.T)
        for mean, scale in zip(prior.mean, prior.scale, strict=True)
    ]
    return float(logsumexp(scores) - math.log(len(scores)))


@torch.no_grad()
def mean_bound(objective: Any, x: Mapping[str, Tensor], observed: Sequence[int], rows: int = 300) -> tuple[float, float]:
    """Mean of the reported bound over rows with noise of their own, and four standard errors of it."""
    terms = [objective(meme.replicate(x, observed, rows, seed=seed)).terms["bound"] for seed in range(5)]
    means = torch.stack([t.total / t.count for t in terms])
    return means.mean().item(), 4 * means.std().item() / math.sqrt(len(means))


def test_every_objective_is_in_the_table() -> None:
    assert set(CLASSES) - set(TABLE) == set()


@pytest.mark.repeats
@pytest.mark.parametrize(("kind", "case"), VALUES)
def test_the_bound_never_exceeds_the_exact_evidence(kind: Any, case: Case) -> None:
    """Encoders of any quality; good ones, which leave the bound no room: the next test."""
    for seed, observed in enumerate([(1, 1, 1), (1, 0, 1), (0, 1, 0)]):
        torch.manual_seed(seed)
        objective = build(kind, case, linear)
        x = {n: torch.randn(EVENT).double() for n in NAMES}
        mean, slack = mean_bound(objective, x, observed)
        assert mean <= (case.evidence or evidence)(objective, x, observed) + slack + 1e-9, observed


@every_case
def test_what_is_reported_is_a_bound_whatever_weights_the_divergences_have(kind: Any, case: Case) -> None:
    """`bound` compares objectives and their settings: a weight of training is no part of it."""
    objective, (x, observed) = build(kind, case), all_patterns()
    batch = pack_dense(x, observed)
    weights = [name for name in ("beta", "cross_weight", "block_weight") if hasattr(objective, name)]
    assert weights or kind.__name__ == "MMVM"
    for name in weights:
        reported, losses = [], []
        for value in (1.0, 0.3, 2.5):
            setattr(objective, name, value)
            loss = objective(batch)
            reported.append(loss.terms["bound"].total)
            losses.append(loss.total)
        assert torch.stack(reported[1:]).allclose(reported[0], rtol=1e-12) and (name != "beta" or losses[1] != losses[0])


@every_objective
def test_pooling_what_one_modality_says_is_what_it_says(kind: Any, case: Case) -> None:
    """Encoders that are no posteriors are not pooled at all."""
    objective, batch, z = build(kind, case), rows_of((1, 0, 0), 5), torch.randn(4, 5, D).double()
    for rule in ("mixture", "product", "holder"):
        if kind.__name__ in ("MVAE", "CSVAE"):
            with pytest.raises(ValueError, match="leave --pool out"):
                Pooled(objective, rule)
        else:
            torch.testing.assert_close(Pooled(objective, rule).infer(batch).log_prob(z), objective.infer(batch).log_prob(z))


@pytest.mark.parametrize(("kind", "case"), [c for c in FIRST if not c.values[1].evidence])
def test_hiding_features_from_the_encoders_leaves_a_bound(kind: Any, case: Case) -> None:
    """What is hidden makes another posterior, not another model. (Where encoders are priors too it makes another model.)"""
    objective, observed = build(kind, case, linear), (1, 0, 1)
    x = {n: torch.randn(EVENT).double() for n in NAMES}
    shown, _ = mean_bound(objective, x, observed)
    for modality in objective.modalities.values():
        modality.dropout = 0.4
    mean, slack = mean_bound(objective, x, observed)
    assert abs(mean - shown) > 1e-3 and mean <= evidence(objective, x, observed) + slack + 1e-9


@every_objective
def test_nothing_is_hidden_in_evaluation(kind: Any, case: Case) -> None:
    objective, (x, observed) = build(kind, case), all_patterns()
    batch = pack_dense(x, observed)
    training, evaluation = objective(batch).total, objective.eval()(batch).total
    for modality in objective.modalities.values():
        modality.dropout = 0.0
    assert torch.equal(evaluation, objective.train()(batch).total) and not torch.isclose(training, evaluation, rtol=1e-4)


@pytest.mark.parametrize(("kind", "case"), [case for case in CASES if not case.id.startswith("MEME-")])
def test_annealing_weighs_the_divergences_of_each_row_by_its_visits_so_far(kind: Any, case: Case) -> None:
    """A batch annealed over 8 visits is the sum of its rows with settings that are multiplied by min(1, visit / 8) by hand."""
    objective, (x, observed) = build(kind, case), all_patterns(14)
    visits = [0, 3, 10, 5, 40, 9, 1, 7, 2, 11, 8, 4, 6, 12]
    objective.anneal = 8
    batch = pack_dense(x, observed, draw=visits)
    annealed, told = gradient(objective, batch), objective(batch).terms["bound"].total
    objective.anneal = 0
    torch.testing.assert_close(told, objective(batch).terms["bound"].total, rtol=1e-12, atol=0)
    objective.anneal, weights = 0, {name: getattr(objective, name) for name in RISING[kind.__name__]}
    totals, gradients = [], []  # below: eighths are exact, but MMVM's alpha and its logarithm are float32 where it is annealed
    for row, visit in enumerate(visits):
        for name, value in weights.items():
            risen = min(1.0, visit / 8)
            setattr(objective, name, 1 - (1 - value) * risen if kind.__name__ == "MMVM" else value * risen)
        one = pack_dense({n: v[[row]] for n, v in x.items()}, {n: m[[row]] for n, m in observed.items()}, draw=[visit])
        total, slope = gradient(objective, one)
        totals.append(total)
        gradients.append(slope)
    torch.testing.assert_close(annealed[0], torch.stack(totals).sum(), rtol=1e-8 if kind.__name__ == "MMVM" else 1e-9, atol=1e-9)
    torch.testing.assert_close(annealed[1], torch.stack(gradients).sum(0), rtol=1e-6, atol=1e-7 if kind.__name__ == "MMVM" else 1e-9)


@pytest.mark.parametrize(("kind", "case"), [case for case in FIRST if case.id != "MEME"])
def test_nothing_is_annealed_in_evaluation(kind: Any, case: Case) -> None:
    objective, (x, observed) = build(kind, case), all_patterns()
    batch = pack_dense(x, observed)
    plain = objective.eval()(batch).total
    objective.anneal = 1000
    assert torch.equal(objective(batch).total, plain) and not torch.isclose(objective.train()(batch).total, plain, rtol=1e-4)


def test_each_modality_hides_features_of_its_own() -> None:
    objective, batch = build(CLASSES["MMVAE"], TABLE["MMVAE"]["looser"]), rows_of((1, 1, 1), 20)
    a, b, again = (objective.kept(batch, name) for name in "aba")
    assert torch.equal(a, again) and 0 < (a == b).float().mean() < 0.8


def lone_posterior(slope: Sequence[float], noise: float, private: int) -> Modality:
    """Diagonal x = slope (z, w) + noise eps, and an encoder that is its exact posterior under a standard prior."""
    size = D + private
    weight = torch.diag(torch.as_tensor(slope, dtype=torch.float64)[:size])
    precision = 1 + weight.diagonal().square() / noise**2
    zero = torch.zeros(size).double()
    modality = meme.linear(weight, zero, noise, torch.diag(weight.diagonal() / noise**2 / precision), zero, precision**-0.5)
    modality.private_dim = private
    return modality


@pytest.mark.repeats
@pytest.mark.parametrize(("kind", "case"), [c for c in VALUES if c.values[1].tight])
def test_the_bound_is_tight_when_the_joint_posterior_is_exact(kind: Any, case: Case) -> None:
    slopes, noises = [[1.0, -0.8, 0.9], [0.6, 1.2, -0.7], [-1.1, 0.9, 1.3]], [0.7, 0.9, 0.8]
    if case.tight == "factors":
        made = [meme.exact_linear(s[:D], n) for s, n in zip(slopes, noises, strict=True)]
    else:
        made = [lone_posterior(s, n, case.private) for s, n in zip(slopes, noises, strict=True)]
    objective = kind(dict(zip(NAMES, made, strict=True)), **case.keywords).double()
    x = {n: 0.7 * torch.randn(D + case.private).double() for n in NAMES}
    for observed in PATTERNS:
        (mean, slack), exact = mean_bound(objective, x, observed, rows=1000), (case.evidence or evidence)(objective, x, observed)
        assert mean <= exact + slack + 1e-6, observed
        if case.tight == "factors" or sum(observed) == 1:
            assert slack < 0.15 and mean >= exact - slack - 1e-6, observed


@pytest.mark.repeats
@pytest.mark.parametrize(("kind", "case"), [c for c in VALUES if "samples" in c.values[1].keywords and not c.values[1].evidence])
def test_an_importance_weighted_bound_does_not_fall_with_the_number_of_samples(kind: Any, case: Case) -> None:
    objective = build(kind, case, linear)
    x = {n: torch.randn(EVENT).double() for n in NAMES}
    for observed in [(1, 1, 1), (0, 1, 1)]:
        low, margin = -math.inf, 0.0
        for objective.samples in (1, 4, 16):
            mean, slack = mean_bound(objective, x, observed)
            assert mean >= low - math.hypot(slack, margin), (observed, objective.samples)
            low, margin = mean, slack
        assert low <= evidence(objective, x, observed) + margin


@every_case
def test_a_rows_loss_does_not_depend_on_the_other_rows(kind: Any, case: Case) -> None:
    objective, (x, observed) = build(kind, case), all_patterns(7)
    whole = objective(pack_dense(x, observed)).total
    one = [pack_dense({n: v[[b]] for n, v in x.items()}, {n: m[[b]] for n, m in observed.items()}, draw=[b]) for b in range(7)]
    torch.testing.assert_close(whole, torch.stack([objective(batch).total for batch in one]).sum(), rtol=1e-10, atol=1e-10)


@every_case
def test_a_batch_split_in_two_has_the_same_loss_and_gradient(kind: Any, case: Case) -> None:
    objective, (x, observed) = build(kind, case), all_patterns(28)
    parts = [slice(0, 9), slice(9, 28)]
    halves = [pack_dense({n: v[p] for n, v in x.items()}, {n: m[p] for n, m in observed.items()}, draw=np.arange(28)[p]) for p in parts]
    for came, want in zip(gradient(objective, *halves), gradient(objective, pack_dense(x, observed)), strict=True):
        torch.testing.assert_close(came, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", BOTH)
@every_case
def test_content_of_absent_entries_reaches_neither_loss_nor_gradient(kind: Any, case: Case, family: type) -> None:
    if family not in case.families:
        return
    objective, (x, observed) = build(kind, case, family=family), all_patterns()
    clean = gradient(objective, pack_dense(x, observed))
    for n in x:
        x[n][~observed[n]] = torch.nan
    dirty = gradient(objective, pack_dense(x, observed))
    assert torch.isfinite(dirty[1]).all() and torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1])


@every_case
def test_relabelling_the_modalities_with_their_modules_changes_nothing(kind: Any, case: Case) -> None:
    """Noise is keyed by name, so that the same rows get the same numbers in any order: turned, and with two that change places."""
    objective, (x, observed) = build(kind, case), all_patterns()
    before = objective(pack_dense(x, observed)).total
    for order in (["c", "a", "b"], ["b", "a", "c"]):
        relabelled = build(kind, case, names=order)
        relabelled.load_state_dict(objective.state_dict())
        batch = pack_dense({n: x[n] for n in order}, {n: observed[n] for n in order})
        for other in (objective, relabelled):  # the batch's order alone, and the objective's with it
            torch.testing.assert_close(other(batch).total, before, rtol=1e-12, atol=1e-12)


@every_case
def test_every_parameter_has_a_gradient_for_every_pattern(kind: Any, case: Case) -> None:
    objective = build(kind, case)
    for pattern, rows in itertools.product(PATTERNS, (1, 4)):
        objective.zero_grad()
        objective(rows_of(pattern, rows)).total.backward()
        missing = [n for n, p in objective.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
        assert missing == [], (pattern, rows)


@every_case
def test_a_row_that_observes_nothing_adds_nothing(kind: Any, case: Case) -> None:
    objective, (x, observed) = build(kind, case), all_patterns(7)
    empty = {n: torch.cat([v, torch.full((3, EVENT), torch.nan).double()]) for n, v in x.items()}
    longer = pack_dense(empty, {n: torch.cat([m, torch.zeros(3).bool()]) for n, m in observed.items()})
    with_empty, without = gradient(objective, longer), gradient(objective, pack_dense(x, observed))
    torch.testing.assert_close(with_empty, without, rtol=1e-10, atol=1e-10)
    counts = [objective(batch).terms["bound"].count for batch in (longer, pack_dense(x, observed))]
    assert counts[0] == counts[1] == 7


@every_objective
def test_work_follows_what_is_present(kind: Any, case: Case) -> None:
    """Encoders see the observed entries, decoders at most the observed share of what they see of complete rows; padding is under 10 %."""
    objective, rng = build(kind, case), np.random.default_rng(0)
    seen: Counter[str] = Counter()
    for m in objective.modalities.values():
        m.encoder.register_forward_hook(lambda _, args, out: seen.update(encoder=len(out)))
        m.decoder.register_forward_hook(lambda _, args, out: seen.update(decoder=len(out)))
    masks = rng.random((128, 3)) < 0.6
    masks[~masks.any(1), 0] = True
    work = []
    for mask in (masks, np.ones_like(masks)):
        seen.clear()
        objective(pack({n: torch.randn(int(mask[:, i].sum()), EVENT).double() for i, n in enumerate(NAMES)}, mask, single=False))
        work.append(dict(seen))
    some, every = work
    assert masks.sum() <= some["encoder"] <= 1.1 * masks.sum()
    assert some["decoder"] <= 1.1 * masks.mean() * every["decoder"]


@pytest.mark.parametrize("family", BOTH)
@every_case
def test_inference_is_a_density_for_every_pattern(kind: Any, case: Case, family: type) -> None:
    """Finite, and its integral over one latent is 1, in a batch where all patterns meet, with a row that observes nothing, and in batches
    that hold one modality alone."""
    if family not in case.families:
        return
    objective, (x, observed) = build(kind, case, family=family, shared=1), all_patterns(7)
    x = {n: torch.cat([v, v[:1]]) for n, v in x.items()}
    observed = {n: torch.cat([held, torch.tensor([False])]) for n, held in observed.items()}
    batch, z = pack_dense(x, observed), torch.linspace(-40, 40, 20_001).double()[:, None, None]
    asked = [(objective.infer(batch), list(range(8)))] + [
        (objective.infer(batch.only(n)), observed[n].nonzero()[:, 0].tolist()) for n in NAMES
    ]
    for q, rows in asked:
        density = q.log_prob(z.expand(-1, 8, 1))
        assert all(torch.isfinite(value).all() for value in (q.mean, q.stddev, density))
        integral = torch.trapezoid(density.exp(), dx=80 / 20_000, dim=0)[rows]
        torch.testing.assert_close(integral, torch.ones(len(rows)).double(), rtol=0, atol=1e-4)


def one_step(rank: int, world: int, names: Sequence[str], engine: str) -> list[tuple[np.ndarray, dict[str, float]]]:
    """For each objective the gradient of one optimiser step (first moment / (1 - beta)), and its terms."""
    os.environ.update(launched(engine))
    results = []
    for name in names:
        torch.manual_seed(0)
        case = next(iter(TABLE[name].values()))
        sizes = {"a": 3, "b": 2, "c": 4}
        modalities = {n: _sized(size, case.private) for n, size in sizes.items()}
        objective = CLASSES[name](modalities, **case.keywords)
        stream = Rows(NAMES, mixed(NAMES, 12), batch_size=12, rank=rank, world=world)
        trainer = Trainer(objective, stream, Training(steps=1, batch_size=12))
        (report,) = list(trainer)
        moments = [trainer.engine.moments(path)["exp_avg"].flatten() for path in trainer.engine.names()]
        results.append((torch.cat(moments).numpy() / 0.1, {"loss": report.loss, **report.terms}))
    return results


def _sized(event: int, private: int) -> Modality:
    size = D + private
    keywords: dict[str, Any] = {"latent_dim": size, "private_dim": private, "feature": (event,), "dropout": 0.25}
    return Modality(encoder=nn.Linear(event, 2 * size), decoder=nn.Linear(size, event), likelihood=Normal(0.5), **keywords)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero3"])
def test_two_ranks_make_the_step_of_one_process(engine: str) -> None:
    """All objectives in one start of two gloo processes; more ranks, micro batches and engines: test_engines.py."""
    needs(engine)
    names = list(TABLE)
    expected = one_step(0, 1, names, "ddp")
    for came in run_ranks(one_step, 2, names, engine):
        for name, (moments, terms), (true, true_terms) in zip(names, came, expected, strict=True):
            assert np.abs(moments - true).max() < 1e-5 * np.abs(true).max(), name
            assert terms == pytest.approx(true_terms, rel=1e-5, abs=1e-6), name
