"""Laws of MEME: its bound, its gradients, and what may not matter."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from torch import distributions as reference
from torch import nn

from meme_dist.distributions import DiagLaplace, DiagNormal
from meme_dist.likelihoods import Normal
from meme_dist.modality import Modality
from meme_dist.noise import Noise
from meme_dist.objectives.meme import MEME, _sources
from meme_dist.pooled import Pooled
from meme_dist.types import pack, pack_dense

EVENT, D = 3, 2
ESTIMATORS = ["released", "rao_blackwell", "resampled"]
COMBINATIONS = ["mixture", "product", "product_with_standard"]


class LinearEncoder(nn.Module):
    """mean = G x + h, and a raw scale that does not depend on x."""

    def __init__(self, gain, offset, scale):
        super().__init__()
        self.gain, self.offset = nn.Parameter(gain), nn.Parameter(offset)
        self.raw = nn.Parameter(torch.log(torch.expm1(scale - 1e-3)))

    def forward(self, x):
        mean = x @ self.gain.T + self.offset
        return torch.cat([mean, self.raw.expand_as(mean)], -1)


def linear(weight, bias, noise, gain, offset, scale):
    """x = W z + b + noise * eps with the encoder N(G x + h, scale^2)."""
    decoder = nn.Linear(weight.shape[1], weight.shape[0]).double()
    decoder.weight.data, decoder.bias.data = weight.clone(), bias.clone()
    encoder = LinearEncoder(gain, offset, scale)
    return Modality(encoder=encoder, decoder=decoder, likelihood=Normal(noise), latent_dim=len(scale), feature=(len(bias),))


def random_linear():
    shape = dict(dtype=torch.float64)
    return linear(
        torch.randn(EVENT, D, **shape), torch.randn(EVENT, **shape), 0.6 + torch.rand(1).item(),
        0.3 * torch.randn(D, EVENT, **shape), 0.3 * torch.randn(D, **shape), 0.4 + torch.rand(D, **shape),
    )  # fmt: skip


def exact_linear(slope, noise, spread=1.0):
    """A modality whose encoder is its exact likelihood in z (flat prior): q(z | x) ~ p(x | z)^(1 / spread^2)."""
    weight = torch.diag(torch.as_tensor(slope, dtype=torch.float64))
    inverse = weight.inverse()
    return linear(weight, torch.zeros(D).double(), noise, inverse, torch.zeros(D).double(), noise * spread * inverse.diagonal().abs())


def replicate(x, observed, copies, **keywords):
    """`copies` rows with the same data and pattern, each with noise of its own."""
    kept = {name: value.expand(copies if held else 0, -1) for (name, value), held in zip(x.items(), observed, strict=True)}
    return pack(kept, np.tile(observed, (copies, 1)), **keywords)


def normal_log_prob(q, x, modality):
    """log of the integral of p(x | z) q(z) for a Normal q [D]: an independent closed form by scipy."""
    weight, noise = modality.decoder.weight.detach().numpy(), modality.likelihood.fixed
    covariance = weight @ np.diag(q.scale.numpy() ** 2) @ weight.T + noise**2 * np.eye(len(weight))
    return multivariate_normal.logpdf(x.numpy(), weight @ q.mean.numpy() + modality.decoder.bias.detach().numpy(), covariance)


@torch.no_grad()
def evidence(objective, x, observed, i):
    """log p(x_i | x_T) under the conditional prior that the objective states, mixture member by member."""
    names = list(x)
    targets = [j for j, held in enumerate(observed) if held and j != i]
    q = {j: objective.conditional_prior(names[j]).encode(x[names[j]][None]) for j in targets}
    lead = objective.modalities[names[i]]
    if not targets:
        parts = [objective.pseudo[n].posterior(objective.conditional_prior(n)) for n in names if n != names[i]]
        experts = [DiagNormal(m, s) for p in parts for m, s in zip(p.mean, p.scale, strict=True)]
    elif objective.combination == "mixture":
        experts = [DiagNormal(q[j].mean[0], q[j].scale[0]) for j in targets]
    else:
        standard = objective.combination == "product_with_standard"
        precision = sum(q[j].scale[0] ** -2 for j in targets) + standard
        experts = [DiagNormal(sum(q[j].mean[0] * q[j].scale[0] ** -2 for j in targets) / precision, precision**-0.5)]
    return logsumexp([normal_log_prob(e, x[names[i]], lead) for e in experts]) - math.log(len(experts))


@pytest.mark.repeats
@pytest.mark.parametrize(
    "estimator, combination, shared",
    [*((e, c, True) for e in ESTIMATORS for c in COMBINATIONS), *(("resampled", c, False) for c in COMBINATIONS)],
)
def test_bound_never_exceeds_the_exact_evidence_for_any_number_of_samples(estimator, combination, shared):
    names, copies = ["a", "b", "c"], 4000
    for seed in range(4):
        torch.manual_seed(seed)
        keywords = dict(pseudo_inputs=2, estimator=estimator, combination=combination, samples=2 + seed, shared=shared)
        objective = MEME({n: random_linear() for n in names}, **keywords).double()
        if not shared:
            disturb(objective.conditional)
        for p in objective.pseudo.values():
            p.inputs.data = torch.randn_like(p.inputs)
        x = {n: torch.randn(EVENT, dtype=torch.float64) for n in names}
        for observed in ([1, 1, 1], [1, 1, 0], [0, 1, 0]):
            with torch.no_grad():
                rows = [objective(replicate(x, observed, copies // 8, seed=s)).terms for s in range(8)]
            for i in np.flatnonzero(observed):
                means = torch.stack([r[f"bound/{names[i]}"].total / r[f"bound/{names[i]}"].count for r in rows])
                slack = 4 * means.std() / math.sqrt(len(means)) + 1e-9
                assert means.mean() <= evidence(objective, x, observed, i) + slack


def disturb(networks):
    """Other parameters, so that nothing agrees by its beginning."""
    for p in networks.parameters():
        p.data += 0.3 * torch.randn_like(p)


def mean_bounds(objective, x, observed, *names):
    """Mean of each direction's bound over rows with noise of their own, and its standard error.

    `released` weighs one sample by w in [0, K], so its value needs many rows; the others put their trust in many samples.
    """
    released = objective.estimator == "released"
    objective.samples, rows, repeats = (100, 2000, 20) if released else (4000, 4, 8)
    with torch.no_grad():
        terms = [objective(replicate(x, observed, rows, seed=s)).terms for s in range(repeats)]
    means = [torch.stack([t[f"bound/{name}"].total / t[f"bound/{name}"].count for t in terms]) for name in names]
    return [(own.mean().item(), (own.std() / math.sqrt(repeats)).item()) for own in means]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("combination", ["mixture", "product"])
def test_bound_is_tight_when_the_posterior_is_exact(estimator, combination):
    """q_j(z|x_j) ~ p(x_j|z) makes A + log p(z|x_T) - Q - t constant in z, so only log q(x_T|x_i) is left to estimate."""
    modalities = {"a": exact_linear([1.0, -0.8], 0.7), "b": exact_linear([0.6, 1.2], 0.9)}
    if combination == "product":
        modalities["c"] = exact_linear([-1.1, 0.9], 0.8)
    x = {n: 0.5 * torch.randn(D, dtype=torch.float64) for n in modalities}
    objective = MEME(modalities, pseudo_inputs=1, estimator=estimator, combination=combination).double()
    for i, (mean, error) in enumerate(mean_bounds(objective, x, [1] * len(x), *x)):
        assert mean == pytest.approx(evidence(objective, x, [1] * len(x), i), abs=0.02 + 4 * error)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_mixture_of_three_is_tight_when_its_experts_agree(estimator):
    """Two targets with equal posteriors q and likelihoods p ~ q^(1/2): their mixture is q and their joint likelihood is q."""
    twin = dict(slope=[0.9, 1.1], noise=0.8, spread=1 / math.sqrt(2))
    modalities = {"a": exact_linear([1.0, -0.8], 0.7), "b": exact_linear(**twin), "c": exact_linear(**twin)}
    x = {"a": 0.5 * torch.randn(D).double(), "b": 0.3 * torch.ones(D).double(), "c": 0.3 * torch.ones(D).double()}
    objective = MEME(modalities, pseudo_inputs=1, estimator=estimator).double()
    [(mean, error)] = mean_bounds(objective, x, [1, 1, 1], "a")
    assert mean == pytest.approx(evidence(objective, x, [1, 1, 1], 0), abs=0.02 + 4 * error)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_bound_of_a_lone_modality_is_tight_when_the_posterior_is_exact(estimator):
    """One pseudo-input: p_lambda is one Normal N(m, s^2), and the exact posterior of x = w z + noise is Normal and linear in x."""
    other = random_linear()
    objective = MEME({"a": exact_linear([1.0, 1.0], 1.0), "b": other}, pseudo_inputs=1, estimator=estimator, samples=3).double()
    prior = objective.pseudo["b"].posterior(other)
    precision = prior.scale[0].detach() ** -2 + 1.0  # unit slope and noise
    exact = linear(
        torch.eye(D).double(), torch.zeros(D).double(), 1.0,
        torch.diag(1 / precision), prior.mean[0].detach() * prior.scale[0].detach() ** -2 / precision, precision**-0.5,
    )  # fmt: skip
    objective.modalities["a"] = exact
    x = {"a": torch.randn(D).double(), "b": torch.zeros(EVENT).double()}
    terms = objective(replicate(x, [1, 0], 20_000)).terms["bound/a"]
    # own and log-ratio at one sample cancel to the last bit; `resampled` averages the log-ratio over all samples instead
    tolerance = 0.03 if estimator == "resampled" else 1e-9
    assert terms.total.item() / 20_000 == pytest.approx(evidence(objective, x, [1, 0], 0), abs=tolerance)


def random_network(event=EVENT, family=DiagNormal):
    encoder = nn.Sequential(nn.Linear(event, 8), nn.Tanh(), nn.Linear(8, 2 * D))
    decoder = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, event))
    return Modality(encoder=encoder, decoder=decoder, likelihood=Normal(0.5), latent_dim=D, feature=(event,), family=family)


def network_objective(num=2, family=DiagNormal, **keywords):
    objective = MEME({f"m{i}": random_network(family=family) for i in range(num)}, pseudo_inputs=3, **keywords).double()
    for p in objective.pseudo.values():
        p.inputs.data = torch.randn_like(p.inputs)
    return objective


def gradient(objective, batch):
    objective.zero_grad()
    objective(batch).total.backward()
    return torch.cat([p.grad.flatten() for p in objective.parameters()])


def bimodal_transcription(objective, x, noise, *, cross_weight, stop_gradient, log_ratio):
    """Equations 1, 2, 8 and appendix D for two modalities, row by row and sample by sample with torch.distributions."""
    s, t = objective.modalities.values()
    total = 0.0
    for row in range(len(noise.draw)):
        value = 0.0
        for (lead, lead_name), (other, other_name) in [((s, "m0"), (t, "m1")), ((t, "m1"), (s, "m0"))]:
            q = lead.encode(x[lead_name][row : row + 1])
            p = objective.conditional_prior(other_name).encode(x[other_name][row : row + 1])
            q, p = reference.Normal(q.mean[0], q.scale[0]), reference.Normal(p.mean[0], p.scale[0])
            z = q.loc + q.scale * noise.normal(lead_name, objective.samples, D)[:, row].double()
            log_x = [reference.Normal(lead.decoder(zk), 0.5).log_prob(x[lead_name][row]).sum() for zk in z]
            log_t = torch.stack([reference.Normal(other.decoder(zk), 0.5).log_prob(x[other_name][row]).sum() for zk in z])
            marginal = torch.log(torch.exp(log_t - log_t.max()).mean()) + log_t.max()
            for k, zk in enumerate(z):
                w = torch.exp(log_t[k] - marginal)
                w = w.detach() if stop_gradient else w
                ratio = p.log_prob(zk).sum() - q.log_prob(zk).sum()
                fit = log_x[k] - log_t[k] + (ratio if log_ratio == "sampled" else 0.0)
                value = value + w * fit / len(z)
            if log_ratio == "closed_form":
                value = value - reference.kl_divergence(q, p).sum()
            value = value + cross_weight * marginal
        total = total - value / 2
    return total


@pytest.mark.parametrize("log_ratio", ["closed_form", "sampled"])
@pytest.mark.parametrize("stop_gradient", [True, False])
@pytest.mark.parametrize("combination", ["mixture", "product"])
@pytest.mark.parametrize("shared", [True, False])
def test_two_modalities_equal_an_independent_transcription_of_the_bimodal_formula(shared, combination, stop_gradient, log_ratio):
    keywords = dict(cross_weight=10.0, stop_gradient=stop_gradient, log_ratio=log_ratio)
    objective = network_objective(samples=4, estimator="rao_blackwell", combination=combination, shared=shared, **keywords)
    if not shared:
        disturb(objective.conditional)
    x = {n: torch.randn(5, EVENT).double() for n in ("m0", "m1")}
    batch = pack_dense(x, {n: torch.ones(5, dtype=torch.bool) for n in x}, seed=3, single=False)
    got = gradient(objective, batch)
    objective.zero_grad()
    value = bimodal_transcription(objective, x, Noise(3, batch.draw), **keywords)
    value.backward()
    want = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in objective.parameters()])
    torch.testing.assert_close(objective(batch).total, value, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


def paired_batch(copies, num=2, seed=0):
    torch.manual_seed(11)
    x = {f"m{i}": torch.randn(EVENT).double() for i in range(num)}
    return replicate(x, [1] * num, copies, seed=seed, single=False)


def gradient_of(objective, batch, parameters):
    return torch.cat([g.flatten() for g in torch.autograd.grad(objective(batch).total, parameters)])


def test_cross_terms_have_no_gradient_at_weight_one():
    """-(1/K) sum_k w_k grad t_k + sum_k softmax_k grad t_k = 0: decoder 1 then learns from its own samples alone."""
    objective, batch = network_objective(samples=5, estimator="rao_blackwell", cross_weight=1.0), paired_batch(3)
    decoder = list(objective.modalities["m1"].decoder.parameters())
    got = torch.cat([g.flatten() for g in torch.autograd.grad(objective(batch).total, decoder)])
    noise, x = Noise(batch.seed, batch.draw), {n: p.data[:3] for n, p in batch.modalities.items()}
    q, lead = objective.modalities["m1"].encode(x["m1"]), objective.modalities["m0"]
    z = q.reparameterise(noise, "m1", 5).detach()
    weight = lead.log_prob(x["m0"], z).softmax(0).detach()
    own = -(weight * objective.modalities["m1"].log_prob(x["m1"], z)).sum() / 2
    want = torch.cat([g.flatten() for g in torch.autograd.grad(own, decoder)])
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_cross_terms_weigh_nine_times_the_marginal_at_ten(estimator):
    """In expectation: gradient at c = 10 minus gradient at c = 1 is 9 times grad E log q(x_T | x_i)."""
    copies = 40_000
    objective = network_objective(samples=3, estimator=estimator, cross_weight=10.0)
    batch = paired_batch(copies)
    decoder = list(objective.modalities["m1"].decoder.parameters())
    at_ten = gradient_of(objective, batch, decoder) / copies
    objective.cross_weight = 1.0
    at_one = gradient_of(objective, batch, decoder) / copies
    x = {n: p.data[:copies] for n, p in batch.modalities.items()}
    z = objective.modalities["m0"].encode(x["m0"]).reparameterise(Noise(77, batch.draw), "m0", 3)
    marginal = (objective.modalities["m1"].log_prob(x["m1"], z).logsumexp(0) - math.log(3)).mean()
    want = torch.cat([g.flatten() for g in torch.autograd.grad(-marginal / 2, decoder)])
    assert torch.linalg.norm(at_ten - at_one - 9 * want) < 0.03 * torch.linalg.norm(9 * want)


@pytest.mark.parametrize("log_ratio", ["closed_form", "sampled"])
@pytest.mark.parametrize("num, combination", [(2, "mixture"), (3, "mixture"), (3, "product")])
def test_the_three_estimators_have_one_expected_gradient(num, combination, log_ratio):
    batch = paired_batch(60_000, num)
    grads = {}
    for estimator in ESTIMATORS:
        torch.manual_seed(5)
        objective = network_objective(num, samples=4, estimator=estimator, combination=combination, log_ratio=log_ratio)
        grads[estimator] = gradient(objective, batch)
    for estimator in ("released", "resampled"):
        assert torch.cosine_similarity(grads[estimator], grads["rao_blackwell"], dim=0) > 0.999
        assert torch.linalg.norm(grads[estimator]) == pytest.approx(torch.linalg.norm(grads["rao_blackwell"]).item(), rel=0.03)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("family, combination", [(DiagNormal, "mixture"), (DiagNormal, "product"), (DiagLaplace, "mixture")])
def test_content_of_absent_entries_reaches_neither_loss_nor_gradient(estimator, family, combination):
    objective = network_objective(3, family, samples=3, estimator=estimator, combination=combination)
    observed = {f"m{i}": torch.rand(40) < 0.6 for i in range(3)}
    observed["m0"] |= ~(observed["m1"] | observed["m2"])
    x = {n: torch.randn(40, EVENT).double() for n in observed}
    clean = gradient(objective, pack_dense(x, observed))
    for n in x:
        x[n][~observed[n]] = float("nan")
    dirty = gradient(objective, pack_dense(x, observed))
    assert torch.isfinite(dirty).all() and torch.equal(clean, dirty)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_relabelling_the_modalities_changes_nothing(estimator, combination):
    objective = network_objective(3, samples=3, estimator=estimator, combination=combination)
    observed = {f"m{i}": torch.rand(30) < 0.7 for i in range(3)}
    observed["m1"] |= ~(observed["m0"] | observed["m2"])
    x = {n: torch.randn(30, EVENT).double() for n in observed}
    before = objective(pack_dense(x, observed)).total
    order = ["m2", "m0", "m1"]
    after = objective(pack_dense({n: x[n] for n in order}, {n: observed[n] for n in order})).total
    torch.testing.assert_close(before, after, rtol=1e-12, atol=0)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_loss_of_a_batch_is_the_sum_of_its_rows_alone(estimator):
    objective = network_objective(3, samples=3, estimator=estimator)
    x = {f"m{i}": torch.randn(6, EVENT).double() for i in range(3)}
    masks = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 0, 1], [0, 1, 0], [1, 1, 0], [1, 0, 0]]).bool()
    observed = {n: masks[:, i] for i, n in enumerate(x)}
    whole = objective(pack_dense(x, observed)).total
    rows = [
        objective(pack_dense({n: v[b : b + 1] for n, v in x.items()}, {n: m[b : b + 1] for n, m in observed.items()}, draw=[b])).total
        for b in range(6)
    ]
    torch.testing.assert_close(whole, sum(rows), rtol=1e-10, atol=0)


@pytest.mark.parametrize("log_ratio", ["closed_form", "sampled"])
@pytest.mark.parametrize("family, combination", [(DiagNormal, "mixture"), (DiagLaplace, "mixture"), (DiagNormal, "product")])
def test_second_encoders_that_are_copies_share_out_the_gradient_of_the_shared_ones(family, combination, log_ratio):
    """Joy et al. 2022, section 3.2: sharing weights adds the gradients of an encoder's two roles, and nothing else changes."""
    settings = dict(samples=3, combination=combination, log_ratio=log_ratio)
    objective = network_objective(3, family, **settings)
    apart = MEME(dict(objective.modalities.items()), pseudo_inputs=len(objective.pseudo["m0"].inputs), shared=False, **settings).double()
    for name, pseudo in objective.pseudo.items():
        apart.pseudo[name].inputs.data = pseudo.inputs.data.clone()
    masks = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 0, 1], [0, 1, 0], [1, 1, 0], [1, 0, 0]] * 5).bool()
    batch = pack_dense({f"m{i}": torch.randn(30, EVENT).double() for i in range(3)}, {f"m{i}": masks[:, i] for i in range(3)})
    found, losses = [], []
    for one in (objective, apart):
        one.zero_grad()
        losses.append(one(batch).total)
        losses[-1].backward()
        found.append({n: p.grad.clone() for n, p in one.named_parameters()})
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=0)
    for name, whole in found[0].items():
        other = found[1].get(name.replace("modalities.", "conditional."), torch.zeros(())) if "modalities." in name else 0.0
        torch.testing.assert_close(found[1][name] + other, whole, rtol=1e-9, atol=1e-12)


def test_second_encoders_are_what_is_asked_and_the_first_ones_lead():
    """p(z | x_j) is the second encoder's wherever it stands for knowledge of what is given; the first leads in training alone."""
    objective = network_objective(2, samples=3, shared=False)
    batch = pack_dense({f"m{i}": torch.randn(8, EVENT).double() for i in range(2)}, {f"m{i}": torch.ones(8).bool() for i in range(2)})
    asked, pooled, prior = (f(batch) for f in (objective.infer, Pooled(objective, "product").infer, lambda _: objective.prior()))
    disturb(torch.nn.ModuleList([m.encoder for m in objective.modalities.values()]))
    for before, after in ((asked, objective.infer(batch)), (pooled, Pooled(objective, "product").infer(batch)), (prior, objective.prior())):
        z = torch.randn(4, 8, objective.latent_dim).double()
        torch.testing.assert_close(after.log_prob(z), before.log_prob(z), rtol=0, atol=0)
    disturb(objective.conditional)
    z = torch.randn(4, 8, objective.latent_dim).double()
    assert not torch.allclose(objective.infer(batch).log_prob(z), asked.log_prob(z))
    lead = objective.modality("m0").encode(batch.modalities["m0"].data[:8])
    torch.testing.assert_close(objective.split(objective.encodings(batch))[0].mean[0], lead.mean)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_parameter_has_a_gradient_for_every_pattern(estimator, single, shared):
    objective = network_objective(3, samples=2, estimator=estimator, shared=shared)
    for pattern in range(1, 8):
        mask = [bool(pattern >> i & 1) for i in range(3)]
        if sum(mask) == 1 and not single:
            continue
        observed = {f"m{i}": torch.full((4,), held) for i, held in enumerate(mask)}
        objective.zero_grad()
        objective(pack_dense({n: torch.randn(4, EVENT).double() for n in observed}, observed, single=single)).total.backward()
        assert [n for n, p in objective.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()] == []


@pytest.mark.parametrize("inference", COMBINATIONS)
def test_inference_may_combine_otherwise_than_training_does(inference):
    """Asked with several inputs the model pools its posteriors as it is told to; its loss is that of its combination."""
    torch.manual_seed(0)
    asked = network_objective(3, samples=3, inference=inference)
    trained = network_objective(3, samples=3)
    trained.load_state_dict(asked.state_dict())
    observed = {f"m{i}": torch.rand(30) < 0.7 for i in range(3)}
    observed["m1"] |= ~(observed["m0"] | observed["m2"])
    batch = pack_dense({n: torch.randn(30, EVENT).double() for n in observed}, observed)
    z, expected = torch.randn(2, 30, asked.latent_dim).double(), Pooled(trained, inference).infer(batch)
    torch.testing.assert_close(asked.infer(batch).log_prob(z), expected.log_prob(z), rtol=0, atol=1e-12)
    torch.testing.assert_close(asked(batch).total, trained(batch).total, rtol=0, atol=0)


@pytest.mark.parametrize("rule", COMBINATIONS)
def test_a_row_is_asked_alike_whatever_else_its_batch_has(rule):
    """A row that holds one modality gets the same density from a batch with columns for all of them and from one with its own alone."""
    objective = network_objective(3, inference=rule)
    observed = {"m0": torch.ones(6).bool(), "m1": torch.arange(6) > 2, "m2": torch.zeros(6).bool()}
    batch = pack_dense({n: torch.randn(6, EVENT).double() for n in observed}, observed)
    z = torch.randn(2, 6, D).double()
    for asked in (objective, Pooled(network_objective(3), rule)):
        whole, alone = asked.infer(batch).log_prob(z), asked.infer(batch.only("m0")).log_prob(z)
        torch.testing.assert_close(whole[:, :3], alone[:, :3], rtol=0, atol=1e-12)
        assert not torch.isclose(whole[:, 3:], alone[:, 3:]).any()


def test_products_are_refused_for_laplaces_when_the_model_is_made():
    for keywords in ({"combination": "product"}, {"inference": "product"}):
        with pytest.raises(ValueError, match="products need Normal posteriors, got DiagLaplace"):
            network_objective(3, DiagLaplace, **keywords)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_rows_loss_is_minus_the_mean_bound_of_the_modalities_it_holds(estimator):
    """At cross weight 1 with the sampled log-ratio what is optimised is the bound itself."""
    objective = network_objective(3, samples=3, estimator=estimator, cross_weight=1.0, log_ratio="sampled")
    x = {f"m{i}": torch.randn(EVENT).double() for i in range(3)}
    for observed in ([1, 1, 1], [1, 0, 1], [0, 1, 0]):
        loss = objective(replicate(x, observed, 1))
        bounds = [loss.terms[f"bound/m{i}"].total for i in np.flatnonzero(observed)]
        torch.testing.assert_close(loss.total, -sum(bounds) / len(bounds), rtol=1e-12, atol=0)


def test_a_row_that_observes_nothing_adds_nothing():
    objective = network_objective(2, samples=2)
    x = {n: torch.randn(4, EVENT).double() for n in ("m0", "m1")}
    held = torch.tensor([True, True, False, False])
    with_empty = objective(pack_dense(x, {n: held for n in x}))
    without = objective(pack_dense({n: v[:2] for n, v in x.items()}, {n: held[:2] for n in x}))
    torch.testing.assert_close(with_empty.total, without.total)
    assert with_empty.terms["bound"].count == 2


def test_effective_sample_size_lies_between_one_and_all_samples():
    objective = network_objective(3, samples=6)
    ess = objective(paired_batch(50, 3)).terms["ess/m0"]
    assert 1 <= ess.total / ess.count <= 6


def test_work_follows_what_is_present():
    """Half of the entries missing: encoder and decoder rows are those of the observed entries and pairs, plus padding under 10 %."""
    for num in (2, 3, 5):
        objective = network_objective(num, samples=3, estimator="resampled")
        rng = np.random.default_rng(num)
        masks = rng.random((128, num)) < 0.5
        masks[~masks.any(1), 0] = True
        counted = Counter()
        for m in objective.modalities.values():
            m.encoder.register_forward_hook(lambda _, args, out, c=counted: c.update(encoder=len(out)))
            m.decoder.register_forward_hook(lambda _, args, out, c=counted: c.update(decoder=len(out)))
        data = {f"m{i}": torch.randn(int(masks[:, i].sum()), EVENT).double() for i in range(num)}
        objective(pack(data, masks, single=False))
        held = masks.sum()
        both = sum((masks[:, i] & masks[:, j]).sum() for i in range(num) for j in range(num) if i != j)
        assert held <= counted["encoder"] <= 1.1 * held
        assert 3 * both + both + held <= counted["decoder"] <= 1.1 * (3 * both + both + held)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_one_sample_is_decoded_once_whichever_estimator_and_gives_the_formula_to_all(estimator):
    """Its weight is 1 whatever it explains, so there is nothing to weigh or draw: it is decoded with gradients alone, n^2 times a row."""
    objective, decoded = network_objective(samples=1, estimator=estimator), Counter()
    for m in objective.modalities.values():
        m.decoder.register_forward_hook(lambda _, args, out: decoded.update({out.requires_grad: len(out)}))
    x = {n: torch.randn(5, EVENT).double() for n in ("m0", "m1")}
    batch = pack_dense(x, {n: torch.ones(5, dtype=torch.bool) for n in x}, seed=3, single=False)
    got = gradient(objective, batch)
    assert decoded == {True: 2 * 2 * 5}
    objective.zero_grad()
    value = bimodal_transcription(
        objective, x, Noise(3, batch.draw), cross_weight=objective.cross_weight, stop_gradient=True, log_ratio="closed_form"
    )
    value.backward()
    want = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in objective.parameters()])
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


def shifted(monkeypatch, batch, objective, number, count):
    """Total, gradient and bound where the first source of each target stands `number` of `count` places before it."""
    draw = Noise.uniform

    def fixed(self, purpose, *size):
        return torch.full_like(draw(self, purpose, *size), number / count) if purpose == "/targets" else draw(self, purpose, *size)

    with monkeypatch.context() as patch:
        patch.setattr(Noise, "uniform", fixed)
        slope = gradient(objective, batch)
        loss = objective(batch)
    return loss.total.detach(), slope, loss.terms["bound"].total


@pytest.mark.parametrize("targets", [1, 2, 3, 9])
def test_drawn_targets_give_loss_and_gradient_of_all_on_average_over_the_draws(monkeypatch, targets):
    """Exactly: over the n - 1 places at which a row's circle of sources may begin. The bound, in which they cancel, does not see them."""
    objective = network_objective(4, samples=1, targets=targets)
    masks = np.array([[1, 1, 1, 1]] * 3 + [[0, 1, 1, 1], [1, 0, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]], dtype=bool)
    batch = pack({f"m{i}": torch.randn(int(masks[:, i].sum()), EVENT).double() for i in range(4)}, masks)
    assert objective.targets_of(batch) == (targets if targets < 3 else None)
    found = [shifted(monkeypatch, batch, objective, s, 6) for s in range(1, 7)]  # six places are two of three, three of two, six of one
    objective.targets = None
    want, slope = objective(batch), gradient(objective, batch)
    torch.testing.assert_close(torch.stack([total for total, _, _ in found]).mean(), want.total, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.stack([grad for _, grad, _ in found]).mean(0), slope, rtol=1e-5, atol=1e-5)
    for total, _, bound in found:
        torch.testing.assert_close(bound, want.terms["bound"].total, rtol=1e-9, atol=1e-9)
        assert torch.isclose(total, want.total, rtol=1e-6) == (targets >= 3)


def test_targets_beyond_all_others_are_all():
    for targets, expected in ((2, 3), (3, 4), (9, 4)):
        objective, counted = network_objective(4, samples=1, targets=targets), Counter()
        for m in objective.modalities.values():
            m.decoder.register_forward_hook(lambda _, args, out, c=counted: c.update(rows=len(out)))
        objective(replicate({f"m{i}": torch.randn(EVENT).double() for i in range(4)}, [1, 1, 1, 1], 40))
        assert counted["rows"] == 40 * 4 * expected


def test_the_draw_of_targets_is_independent_of_a_modality_of_any_name():
    """A modality's samples are keyed by its name, so which targets are drawn must be keyed by what is no name."""
    batch = paired_batch(2000, 3)
    renamed = batch._replace(modalities=dict(zip(["targets", "b", "a"], batch.modalities.values(), strict=True)))
    source, _ = _sources(renamed, 1)
    norm = Noise(renamed.seed, renamed.draw).normal("targets", 1, D)[0].norm(dim=-1)
    explains = source[0, 2] == 0
    assert abs(norm[explains].mean() - norm[~explains].mean()) < 0.1


def test_drawn_targets_are_as_likely_each_and_every_decoder_has_so_many_sources_a_row():
    counted = Counter()
    objective = network_objective(4, samples=1, targets=2)
    masks = np.array([[1, 1, 1, 1], [1, 1, 0, 1], [1, 0, 0, 1], [0, 0, 1, 0]] * 500, dtype=bool)
    for m in objective.modalities.values():
        m.decoder.register_forward_hook(lambda _, args, out: counted.update(rows=len(out)))
    masks = np.concatenate([masks, np.ones((500, 4), dtype=bool)])
    batch = pack({f"m{i}": torch.randn(int(masks[:, i].sum()), EVENT).double() for i in range(4)}, masks)
    objective(batch)
    assert objective.targets_of(batch) == 2 and 3 * masks.sum() <= counted["rows"] <= 1.1 * 3 * masks.sum()
    source, there = _sources(batch, 2)
    source, there = source[..., :2000], there[:, :2000]
    assert there.sum(0).tolist() == [2, 2, 1, 0] * 500
    for pattern, held in enumerate(([0, 1, 2, 3], [0, 1, 3], [0, 3])):
        for target in held:
            rows = source[:, target, pattern::4][there[:, pattern::4]].tolist()
            assert set(rows) == set(held) - {target}
            share = np.bincount(rows, minlength=4)[[i for i in held if i != target]] / 500
            assert np.allclose(share, min(2, len(held) - 1) / (len(held) - 1), atol=0.1)


@pytest.mark.parametrize("targets, samples", [(0, 1), (1, 2)])
def test_drawn_targets_need_one_sample_and_at_least_one_of_them(targets, samples):
    with pytest.raises(ValueError, match=f"targets: expected at least 1, and samples=1 .* got {targets} with {samples}"):
        network_objective(3, samples=samples, targets=targets)


def test_resampling_refuses_a_gradient_that_it_does_not_have():
    with pytest.raises(ValueError, match="stop_gradient=False needs estimator"):
        network_objective(estimator="resampled", stop_gradient=False)


def test_modalities_of_different_families_or_sizes_are_refused():
    with pytest.raises(ValueError, match="one posterior family"):
        MEME({"a": random_network(), "b": random_network(family=DiagLaplace)}, pseudo_inputs=1)
    with pytest.raises(ValueError, match="at least two modalities"):
        MEME({"a": random_network()}, pseudo_inputs=1)


def perceptron(private=0):
    size = D + private
    encoder = nn.Sequential(nn.Linear(EVENT, 8), nn.Tanh(), nn.Linear(8, 2 * size))
    decoder = nn.Sequential(nn.Linear(size, 8), nn.Tanh(), nn.Linear(8, EVENT))
    settings = {"latent_dim": size, "private_dim": private, "feature": (EVENT,)}
    return Modality(encoder=encoder, decoder=decoder, likelihood=Normal(0.5), **settings)


@pytest.mark.parametrize("settings", [{}, {"log_ratio": "sampled"}], ids=str)
def test_latents_of_a_modality_s_own_cost_their_divergence(settings):
    """Where decoders do not read them: whatever posterior they have, the loss is the same but for KL(q(w | x) || N(0, I)) a row."""
    objective = MEME({n: perceptron(private=1) for n in "ab"}, pseudo_inputs=2, samples=3, **settings).double()
    for modality in objective.modalities.values():
        modality.decoder[0].weight.data[:, D:] = 0
    batch, found = pack_dense({n: torch.randn(9, 3).double() for n in "ab"}, dict.fromkeys("ab", torch.ones(9).bool())), []
    for _ in range(2):
        _, private = objective.split(objective.encodings(batch))
        cost = sum(reference.kl_divergence(reference.Normal(*q), reference.Normal(0.0, 1.0)).sum() for q in private.values()) / 2
        loss = objective(batch)
        found.append((loss.total - cost, loss.terms["bound"].total + cost, cost))
        for modality in objective.modalities.values():  # another posterior of the private latent
            for row in (D, 2 * D + 1):
                modality.encoder[-1].bias.data[row] += 0.7
    torch.testing.assert_close(found[0][:2], found[1][:2], rtol=1e-10, atol=1e-10)
    assert abs(found[0][2] - found[1][2]) > 0.1


def test_the_divergence_is_told_as_one():
    """kl/a of rows that hold two modalities is the mean of KL(q_a || q_b), which is not negative."""
    objective = MEME({n: perceptron() for n in "ab"}, pseudo_inputs=2, samples=3).double()
    batch = pack_dense({n: torch.randn(9, 3).double() for n in "ab"}, dict.fromkeys("ab", torch.ones(9).bool()))
    a, b = (reference.Normal(*objective.modality(n).encode(batch.modalities[n].data)) for n in "ab")
    told = objective(batch).terms["kl/a"]
    torch.testing.assert_close(told.total.double(), reference.kl_divergence(a, b).sum(), rtol=1e-5, atol=1e-5)
    assert told.count == 9
