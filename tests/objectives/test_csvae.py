"""What CSVAE promises beside the laws of every objective: exact bounds with enumerable labels, missing labels, independence, edits."""

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import norm
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from meme_dist.likelihoods import Normal
from meme_dist.modalities.attribute import Attribute, _apart
from meme_dist.modality import Modality, softmax_scale
from meme_dist.noise import Noise
from meme_dist.objectives.csvae import CSVAE
from meme_dist.objectives.independence import Adversary, hsic
from meme_dist.pooled import Pooled
from meme_dist.train.trainer import Trainer, Training
from meme_dist.types import Batch, pack, pack_dense
from tests.objectives.test_meme import LinearEncoder
from tests.ranks import run_ranks
from tests.test_engines import launched, needs
from tests.trainings import Rows, mixed

NAMES = ("a", "b", "thick", "kind")
PATTERNS = [p for p in itertools.product((0, 1), repeat=4) if any(p)]
INDEPENDENCE = ("reversal", "entropy", "hsic")


def network(event: int, latent_dim: int) -> Modality:
    encoder = nn.Sequential(nn.Linear(event, 8), nn.Tanh(), nn.Linear(8, 2 * latent_dim))
    decoder = nn.Sequential(nn.Linear(latent_dim, 8), nn.Tanh(), nn.Linear(8, event))
    return Modality(encoder=encoder, decoder=decoder, likelihood=Normal(0.5), latent_dim=latent_dim, feature=(event,))


def build(independence: str = "reversal", names: Sequence[str] = NAMES, **keywords: Any) -> CSVAE:
    """z [2], a flag's block [2], a word's of three values [1]."""
    torch.manual_seed(0)
    made = {
        "a": network(3, 5),
        "b": network(2, 5),
        "thick": Attribute(start=2, size=2, latent_dim=5, weight=3.0),
        "kind": Attribute(start=4, size=1, latent_dim=5, values=3, kind="word"),
    }
    objective = CSVAE({name: made[name] for name in names}, independence=independence, independence_weight=2.0, **keywords).double()  # type: ignore[arg-type]
    for name in objective.attributes:
        table = objective.attribute(name).encoder
        for parameter in table.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    return objective


def some_rows(rows: int = 30) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Data and masks [rows] in which every pattern comes equally often."""
    torch.manual_seed(1)
    masks = torch.tensor(PATTERNS).bool().repeat(-(-rows // len(PATTERNS)), 1)[:rows]
    data = {
        "a": torch.randn(rows, 3).double(),
        "b": torch.randn(rows, 2).double(),
        "thick": torch.randint(0, 2, (rows, 1)).double(),
        "kind": torch.randint(3, 6, (rows, 1)),
    }
    return data, {name: masks[:, i] for i, name in enumerate(NAMES)}


def of_rows(data: Mapping[str, Tensor], observed: Mapping[str, Tensor], chosen: slice, start: int = 0) -> Batch:
    part = {n: x[chosen] for n, x in data.items()}, {n: m[chosen] for n, m in observed.items()}
    return pack_dense(*part, draw=start + np.arange(len(next(iter(data.values()))))[chosen])


def gradient(objective: CSVAE, *batches: Batch) -> tuple[Tensor, Tensor]:
    objective.zero_grad()
    total = torch.stack([objective(batch).total for batch in batches]).sum()
    total.backward()
    return total.detach(), torch.cat([p.grad.flatten() for p in objective.parameters() if p.grad is not None])


# ---- the bound, where everything is known -----------------------------------------------------------------------------------------------

SLOPE, NOISE = (1.3, -0.9), 0.7  # x = (1.3 z, -0.9 w) + .7 eps


def exact_evidence(objective: CSVAE, x: np.ndarray | None, y: int | None) -> float:
    """log p of what a row holds, by summing over y."""
    attribute = objective.attribute("y")
    prior, frequency = attribute.conditional_prior(), attribute.log_frequencies().detach().numpy()
    mean, scale = prior.mean[:, 0].detach().numpy(), prior.scale[:, 0].detach().numpy()
    terms = frequency.copy()
    if x is not None:
        terms = (
            terms
            + norm.logpdf(x[0], 0, math.hypot(SLOPE[0], NOISE))
            + norm.logpdf(x[1], SLOPE[1] * mean, np.hypot(SLOPE[1] * scale, NOISE))
        )
    return float(logsumexp(terms) if y is None else terms[y])


def linear(gain: Tensor, offset: Tensor, scale: Tensor) -> CSVAE:
    decoder = nn.Linear(2, 2, bias=False).double()
    decoder.weight.data = torch.diag(torch.tensor(SLOPE)).double()
    x = Modality(encoder=LinearEncoder(gain, offset, scale), decoder=decoder, likelihood=Normal(NOISE), latent_dim=2, feature=(2,))
    objective = CSVAE({"x": x, "y": Attribute(start=1, size=1, latent_dim=2)}).double()
    attribute = objective.attribute("y")
    attribute.encoder.mean.data = torch.tensor([[-0.4], [0.8]]).double()
    attribute.encoder.raw.data = torch.tensor([[0.2], [0.9]]).double()
    attribute.frequencies.logit.data = torch.tensor([0.5, -0.4]).double()
    return objective


def exact_for(value: int) -> CSVAE:
    """The posterior of a row whose label is known to be `value`."""
    table = linear(torch.zeros(2, 2).double(), torch.zeros(2).double(), torch.ones(2).double()).attribute("y").conditional_prior()
    mean, scale = torch.tensor([0.0, table.mean[value, 0].item()]), torch.tensor([1.0, table.scale[value, 0].item()])
    slope = torch.tensor(SLOPE)
    precision = scale**-2 + slope**2 / NOISE**2
    gain, offset = torch.diag(slope / NOISE**2 / precision), mean / scale**2 / precision
    return linear(gain.double(), offset.double(), (precision**-0.5).double())


def bound_of(objective: CSVAE, x: np.ndarray | None, y: int | None, rows: int = 1500) -> tuple[float, float]:
    """Its mean over draws, and four standard errors."""
    held = np.tile([x is not None, y is not None], (rows, 1))
    data = {
        "x": torch.zeros(0, 2).double() if x is None else torch.from_numpy(x).expand(rows, 2),
        "y": torch.zeros(0, 1).double() if y is None else torch.full((rows, 1), float(y)).double(),
    }
    with torch.no_grad():
        found = [objective(pack(data, held, seed=seed)).terms["bound"] for seed in range(4)]
    means = torch.stack([t.total / t.count for t in found])
    return means.mean().item(), 4 * means.std().item() / math.sqrt(len(means)) + 1e-9


@pytest.mark.parametrize("seed", range(3))
def test_the_bound_never_exceeds_the_evidence_with_the_label_summed_out(seed: int) -> None:
    torch.manual_seed(seed)
    objective = linear(0.5 * torch.randn(2, 2).double(), 0.3 * torch.randn(2).double(), 0.4 + torch.rand(2).double())
    x = np.array([0.6, -1.1])
    for y in (0, 1, None):
        mean, slack = bound_of(objective, x, y)
        assert mean <= exact_evidence(objective, x, y) + slack, y
    for y in (0, 1):
        assert bound_of(objective, None, y)[0] == pytest.approx(exact_evidence(objective, None, y), abs=1e-9)


@pytest.mark.parametrize("value", [0, 1])
def test_the_bound_is_tight_where_the_posterior_is_exact(value: int) -> None:
    objective, x = exact_for(value), np.array([0.6, -1.1])
    mean, slack = bound_of(objective, x, value)
    assert slack < 0.2 and mean == pytest.approx(exact_evidence(objective, x, value), abs=slack)
    assert bound_of(objective, x, 1 - value)[0] < exact_evidence(objective, x, 1 - value) - 0.05
    table = objective.attribute("y").encoder
    table.mean.data[1 - value], table.raw.data[1 - value] = table.mean.data[value], table.raw.data[value]  # a label that tells nothing of w
    mean, slack = bound_of(objective, x, None)
    assert slack < 0.2 and mean == pytest.approx(exact_evidence(objective, x, None), abs=slack)


def test_the_expected_loss_of_a_row_without_its_label_is_the_label_summed_out() -> None:
    """Against quadrature over w of q(w) (log q(w) - log sum_v p(v) p(w | v)); everything else in the loss is the same."""
    objective = linear(torch.diag(torch.tensor([0.5, -0.6])).double(), torch.zeros(2).double(), torch.tensor([0.5, 0.8]).double())
    x = np.array([0.6, -1.1])
    w = np.linspace(-12, 12, 200_001)
    q = norm(-0.6 * x[1], 0.8)
    prior, frequency = objective.attribute("y").conditional_prior(), objective.attribute("y").log_frequencies().detach().numpy()
    pairs = zip(prior.mean[:, 0].tolist(), prior.scale[:, 0].tolist(), frequency, strict=True)
    mixture = logsumexp([f + norm.logpdf(w, m, s) for m, s, f in pairs], axis=0)
    expected = np.trapezoid(q.pdf(w) * (q.logpdf(w) - mixture), w)
    with torch.no_grad():
        batch = pack({"x": torch.from_numpy(x).expand(20_000, 2), "y": torch.zeros(0, 1).double()}, np.tile([True, False], (20_000, 1)))
        kl = objective(batch).terms["kl/y"]
    assert (kl.total / kl.count).item() == pytest.approx(expected, abs=0.03)


def test_the_decoder_of_an_attribute_is_its_encoder_by_bayes_rule() -> None:
    """log p(y | w) + log p(w) = log p(y) + log p(w | y) at every point, for flags and for words."""
    objective = build()
    z = torch.randn(1, 50, 5).double()
    for name, labels in (("thick", torch.tensor([[0.0], [1.0]]).double()), ("kind", torch.tensor([[3], [4], [5]]))):
        attribute = objective.attribute(name)
        attribute.frequencies.logit.data = torch.randn(attribute.values).double()
        attribute.weight = 1.0
        prior, w = attribute.conditional_prior(), z[0, :, attribute.block]
        joint = attribute.log_frequencies() + prior.log_prob(w[:, None].expand(-1, attribute.values, -1))
        told = torch.stack([attribute.log_prob(label[None].expand(50, 1), z)[0] for label in labels], -1)
        torch.testing.assert_close(told + joint.logsumexp(-1, keepdim=True), joint, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(told.exp().sum(-1), torch.ones(50).double())


def test_a_known_label_costs_the_same_by_either_of_the_two_lines() -> None:
    """KL(q || p(w | y)) - log p(y) = E[ log q(w) - log p(w) - log p(y | w) ]: labels as a mixture's components, or as a likelihood."""
    objective = linear(torch.diag(torch.tensor([0.5, -0.6])).double(), torch.zeros(2).double(), torch.tensor([0.5, 0.8]).double())
    x = torch.tensor([0.6, -1.1]).double().expand(40_000, 2)
    with torch.no_grad():
        known = objective(pack({"x": x, "y": torch.ones(40_000, 1).double()}, np.ones((40_000, 2), dtype=bool))).terms
        none = np.tile([True, False], (40_000, 1))
        unknown = objective(pack({"x": x, "y": torch.zeros(0, 1).double()}, none)).terms
    frequency = objective.attribute("y").log_frequencies()[1]
    first = known["kl/y"].total / known["kl/y"].count - frequency
    second = unknown["kl/y"].total / unknown["kl/y"].count - known["label/y"].total / known["label/y"].count
    assert first.item() == pytest.approx(second.item(), abs=0.02)


# ---- independence -----------------------------------------------------------------------------------------------------------------------


def transcription(z: np.ndarray, y: np.ndarray) -> float:
    """Song et al. 2012, eq. 4, loop by loop."""
    n = len(z)
    k, l = np.zeros((n, n)), np.zeros((n, n))  # noqa: E741
    for i in range(n):
        for j in range(n):
            if i != j:
                squared = ((z[i] - z[j]) ** 2).sum()
                k[i, j] = np.mean([math.exp(-squared / (2 * factor * z.shape[1])) for factor in (0.25, 1, 4)])
                l[i, j] = y[i] @ y[j]
    one = np.ones(n)
    total = np.trace(k @ l) + (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ l @ one)
    return float(total / (n * (n - 3)))


def test_hsic_equals_its_transcription_block_by_block_over_the_rows_that_count() -> None:
    torch.manual_seed(0)
    z, y = torch.randn(40, 3).double(), nn.functional.one_hot(torch.randint(0, 3, (40,))).double()
    block, counted = torch.tensor([5] * 20 + [2] * 17 + [9] * 3), torch.rand(40) < 0.8
    found = hsic(z, y, block, counted)
    for number in (5, 2):
        rows = (block == number) & counted
        assert found[rows].sum().item() == pytest.approx(rows.sum().item() * transcription(z[rows].numpy(), y[rows].numpy()), rel=1e-9)
    assert (found[~counted] == 0).all() and (found[block == 9] == 0).all()  # too few to say anything
    order = torch.randperm(40)
    torch.testing.assert_close(hsic(z[order], y[order], block[order], counted[order]), found[order], rtol=1e-9, atol=1e-12)


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor has that was made."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.size = max([self.size, *(x.numel() for x in (made if isinstance(made, tuple) else (made,)) if isinstance(x, Tensor))])
        return made


def test_hsic_takes_memory_that_is_linear_in_the_rows() -> None:
    sizes = []
    for rows in (128, 512):
        z, y = torch.randn(rows, 3), torch.eye(2)[torch.randint(2, (rows,))]
        with Largest() as made:
            hsic(z, y, torch.arange(rows) // 64, torch.ones(rows).bool())
        sizes.append(made.size)
    assert sizes[1] <= 4 * sizes[0]


def test_hsic_is_as_exact_under_autocast() -> None:
    z, y, block, counted = torch.randn(128, 3), torch.eye(4)[torch.randint(4, (128,))], torch.arange(128) // 64, torch.rand(128) < 0.9
    plain = hsic(z, y, block, counted)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(hsic(z, y, block, counted), plain, rtol=0, atol=0)


def test_the_mean_of_hsic_over_all_permutations_of_the_labels_is_zero() -> None:
    torch.manual_seed(0)
    z, y = torch.randn(5, 2).double(), nn.functional.one_hot(torch.tensor([0, 0, 1, 1, 2])).double()
    block, counted = torch.zeros(5).long(), torch.ones(5).bool()
    values = [hsic(z, y[list(order)], block, counted).sum().item() for order in itertools.permutations(range(5))]
    assert np.mean(values) == pytest.approx(0, abs=1e-12) and np.std(values) > 1e-3


def test_the_adversary_learns_to_tell_and_the_encoder_gets_that_gradient_reversed() -> None:
    torch.manual_seed(0)
    adversary, z = Adversary(2, 3).double(), torch.randn(20, 2).double().requires_grad_()
    label = torch.randint(0, 3, (20,))
    told, fooled = adversary(z)
    torch.testing.assert_close(told, fooled)
    honest = torch.autograd.grad(cross_entropy(told, label), list(adversary.parameters()), retain_graph=True)
    assert all(g.abs().sum() > 0 for g in honest)
    assert torch.autograd.grad(told.sum(), z, allow_unused=True)[0] is None
    assert all(g is None for g in torch.autograd.grad(fooled.sum(), list(adversary.parameters()), allow_unused=True, retain_graph=True))
    assert torch.autograd.grad(cross_entropy(fooled, label), z)[0].abs().sum() > 0


@pytest.mark.parametrize("independence", ["reversal", "entropy"])
def test_each_side_of_the_game_gets_its_own_term_alone(independence: str) -> None:
    """The adversary the gradient of its cross entropy, whatever the weight; the encoder the weight times its term, reversed or not."""
    (data, _), objective = some_rows(), build(independence)
    batch = pack_dense({n: data[n] for n in NAMES}, {n: torch.ones(30).bool() for n in NAMES})
    gradients, weights = [], (0.5, 2.0, 3.5)
    for objective.independence_weight in weights:
        objective.zero_grad()
        objective(batch).total.backward()
        gradients.append({n: p.grad.clone() for n, p in objective.named_parameters() if p.grad is not None})
    for name, first in gradients[0].items():
        if name.startswith("adversaries"):
            torch.testing.assert_close(gradients[2][name], first, rtol=1e-12, atol=1e-12)
        else:  # linear in the weight
            torch.testing.assert_close(gradients[2][name] - first, 2 * (gradients[1][name] - first), rtol=1e-8, atol=1e-10)
    slope = (gradients[2]["modalities.a.encoder.2.bias"] - gradients[0]["modalities.a.encoder.2.bias"]) / 3
    torch.testing.assert_close(slope, _by_hand(objective, batch, independence), rtol=1e-8, atol=1e-10)
    assert slope.abs().max() > 1e-4


def _by_hand(objective: CSVAE, batch: Batch, independence: str) -> Tensor:
    """Gradient of what the encoder of a should minimise, through a plain forward pass of both adversaries."""
    from meme_dist.distributions import product
    from meme_dist.objectives.parts import random_subsets

    seen = batch.only("a", "b")
    joint = product(objective.posteriors(seen), random_subsets(seen, "subset", 1)[0][None])
    z = joint.mean[0] + joint.scale[0] * Noise(batch.seed, batch.draw).normal("joint", 1, 5)[0]
    total = z.new_zeros(())
    for name in objective.attributes:
        attribute = objective.attribute(name)
        guess = objective.adversaries[name](z[:, :2])[1]
        label = attribute.embed(batch.dense(name)).double()
        unsure = (guess.exp() * (guess - attribute.log_frequencies().detach())).sum()
        total = total + ((label * guess).sum() if independence == "reversal" else unsure)
    return torch.autograd.grad(total, dict(objective.named_parameters())["modalities.a.encoder.2.bias"])[0]


@pytest.mark.parametrize("independence", ["reversal", "entropy"])
def test_the_value_of_the_game_is_no_part_of_the_loss(independence: str) -> None:
    """Only its gradient is: a checkpoint is chosen by the held-out loss, which a fooled adversary must not lower."""
    x, observed = some_rows()
    batch = of_rows(x, observed, slice(None))
    losses = []
    objective = build(independence)
    for weight in (0.0, 10.0):
        objective.independence_weight = weight
        losses.append(objective(batch).total.detach())
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=1e-9)


def test_an_adversary_that_is_told_nothing_ends_at_the_entropy_of_the_base_rate() -> None:
    torch.manual_seed(0)
    adversary = Adversary(2, 2)
    z, label = torch.randn(1000, 2), (torch.rand(1000) < 0.3).long()
    optimizer = torch.optim.Adam(adversary.parameters(), 3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        loss = cross_entropy(adversary(z)[0], label)
        loss.backward()
        optimizer.step()
    share = label.double().mean().item()
    entropy = -(share * math.log(share) + (1 - share) * math.log(1 - share))
    assert entropy - 0.03 < loss.item() < entropy + 0.003


# ---- the laws of every objective, with attributes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("independence", INDEPENDENCE)
def test_every_parameter_has_a_gradient_for_every_pattern(independence: str) -> None:
    objective, (data, _) = build(independence), some_rows(4)
    for pattern in PATTERNS:
        held = {n: torch.full((4,), bool(p)) for n, p in zip(NAMES, pattern, strict=True)}
        objective.zero_grad()
        objective(pack_dense(data, held)).total.backward()
        missing = [n for n, p in objective.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
        assert missing == [], pattern


@pytest.mark.parametrize("weight", ["beta", "block_weight", "independence_weight"])
@pytest.mark.parametrize("independence", INDEPENDENCE)
def test_every_weight_that_can_be_set_changes_the_gradient(independence: str, weight: str) -> None:
    objective, (data, observed) = build(independence), some_rows(30)
    grads = []
    for value in (0.2, 0.9):
        setattr(objective, weight, value)
        grads.append(gradient(objective, of_rows(data, observed, slice(0, 30)))[1])
    assert (grads[1] - grads[0]).norm() > 1e-6 * grads[0].norm()  # the blocks' terms are large here; rounding is 1e-16


@pytest.mark.parametrize("independence", INDEPENDENCE)
def test_a_batch_split_in_two_has_the_same_loss_and_gradient(independence: str) -> None:
    """HSIC too, where its blocks of 64 rows stay whole: here the border is row 64 of the step."""
    objective, (data, observed) = build(independence), some_rows(60)
    halves = [of_rows(data, observed, part, start=28) for part in (slice(0, 36), slice(36, 60))]
    whole = of_rows(data, observed, slice(0, 60), start=28)
    for came, want in zip(gradient(objective, *halves), gradient(objective, whole), strict=True):
        torch.testing.assert_close(came, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("independence", INDEPENDENCE)
def test_content_of_absent_entries_and_empty_rows_change_nothing(independence: str) -> None:
    objective, (data, observed) = build(independence), some_rows()
    clean = gradient(objective, pack_dense(data, observed))
    for name in ("a", "b", "thick"):
        data[name][~observed[name]] = torch.nan
    longer = {n: torch.cat([x, x[:2]]) for n, x in data.items()}
    masks = {n: torch.cat([m, torch.zeros(2).bool()]) for n, m in observed.items()}
    for came, want in zip(gradient(objective, pack_dense(longer, masks)), clean, strict=True):
        torch.testing.assert_close(came, want, rtol=1e-10, atol=1e-10)
    other = build(independence, names=("kind", "b", "thick", "a"))
    other.load_state_dict(objective.state_dict())
    batch = pack_dense({n: data[n] for n in other.modalities}, {n: observed[n] for n in other.modalities})
    torch.testing.assert_close(other(batch).total.detach(), clean[0], rtol=1e-11, atol=1e-11)


def test_inference_and_prior_are_densities_whatever_a_row_holds() -> None:
    """log q by scipy, one mixture a block; and moments as the samples have them."""
    objective, (data, observed) = build(), some_rows(15)
    batch = pack_dense({n: torch.cat([x, x[:1]]) for n, x in data.items()}, {n: torch.cat([m, m[:1] & False]) for n, m in observed.items()})
    noise, blocks = Noise(3, torch.arange(16)), (slice(0, 2), slice(2, 4), slice(4, 5))
    with torch.no_grad():
        for q in (objective.infer(batch), objective.infer(batch.only("thick")), objective.prior()):
            z = q.sample(noise, "here", 1000)
            mean, stddev = q.mean.expand(16, 5), q.stddev.expand(16, 5)
            assert ((z.mean(0) - mean).abs() < 0.17 * stddev).all() and ((z.std(0) / stddev - 1).abs() < 0.15).all()
            expected = np.zeros((3, 16))
            for part, block in zip(q.parts, blocks, strict=True):
                weight = part.log_weight.exp().expand(-1, 16).numpy()
                table = norm.pdf(z[:3, None, :, block].numpy(), part.components.mean.numpy(), part.components.scale.numpy()).prod(-1)
                assert weight.sum(0) == pytest.approx(1)
                expected += np.log((weight * table).sum(1))
            np.testing.assert_allclose(q.log_prob(z[:3]).numpy(), expected, rtol=1e-8)


def test_an_unknown_attribute_is_inferred_and_a_known_one_sets_the_prior_of_its_block() -> None:
    objective = build()
    batch = pack({"thick": torch.ones(2, 1).double(), "kind": torch.zeros(0, 1).long()}, np.array([[True, False]] * 2))
    q = objective.infer(batch)
    prior = objective.attribute("thick").conditional_prior()
    torch.testing.assert_close(q.mean[:, 2:4], prior.mean[1].expand(2, 2))
    torch.testing.assert_close(q.stddev[:, 2:4], prior.scale[1].expand(2, 2))
    torch.testing.assert_close(q.mean[:, :2], torch.zeros(2, 2).double())
    weights = objective.attribute("kind").log_frequencies().exp()
    torch.testing.assert_close(q.mean[:, 4], (weights @ objective.attribute("kind").conditional_prior().mean[:, 0]).expand(2))
    sharp = objective.attribute("thick").reconstruct(objective.edited(torch.zeros(1, 1, 5).double(), {"thick": 1}))
    assert sharp.item() > 0.5


def test_initialisation_takes_the_labels_frequencies() -> None:
    objective, (data, _) = build(), some_rows(30)
    objective.initialise(pack_dense(data, {n: torch.ones(30).bool() for n in NAMES}))
    share = (data["thick"].sum().item() + 1) / 32
    assert objective.attribute("thick").log_frequencies()[1].exp().item() == pytest.approx(share)
    count = (data["kind"] == 4).sum().item()
    assert objective.attribute("kind").log_frequencies()[1].exp().item() == pytest.approx((count + 1) / 33)


# ---- edits ------------------------------------------------------------------------------------------------------------------------------


def test_an_edit_changes_the_attributes_block_and_nothing_else() -> None:
    objective, z = build(), torch.randn(3, 400, 5).double()
    with torch.no_grad():
        edited = objective.edited(z, {"thick": 1, "kind": 2})
        drawn = objective.edited(z, {"thick": 0}, Noise(0, torch.arange(400)))
        thick, kind = (objective.attribute(name).conditional_prior() for name in ("thick", "kind"))
    assert torch.equal(edited[..., :2], z[..., :2]) and torch.equal(drawn[..., :2], z[..., :2]) and torch.equal(drawn[..., 4], z[..., 4])
    torch.testing.assert_close(edited[..., 2:4], thick.mean[1].expand(3, 400, 2))
    torch.testing.assert_close(edited[..., 4], kind.mean[2].expand(3, 400))
    apart = (drawn[..., 2:4] - thick.mean[0]) / thick.scale[0]
    assert apart.mean().abs() < 0.1 and (apart.std() - 1).abs() < 0.1
    with pytest.raises(ValueError, match="unknown attribute 'thin'; this model has thick, kind"):
        objective.edited(z, {"thin": 1})
    with pytest.raises(ValueError, match="kind: expected a value from 0 to 2, got 3"):
        objective.edited(z, {"kind": 3})


def test_a_given_prior_has_the_value_in_its_block_and_is_the_prior_elsewhere() -> None:
    objective = build()
    with torch.no_grad():
        prior, given = objective.prior(), objective.given({"kind": 1})
        want = objective.attribute("kind").conditional_prior()
    torch.testing.assert_close(given.mean[:, :4], prior.mean[:, :4])
    torch.testing.assert_close((given.mean[0, 4:], given.stddev[0, 4:]), (want.mean[1], want.scale[1]))


def test_values_start_apart_in_a_block_of_any_size() -> None:
    for values, size in ((2, 1), (6, 1), (2, 3), (6, 2)):
        apart = torch.cdist(*[_apart(values, size)] * 2) + 9 * torch.eye(values)
        assert apart.min() > 0.2


def test_what_does_not_fit_together_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be pooled"):
        Pooled(build(), "product")
    x = network(3, 5)
    with pytest.raises(ValueError, match="both own latent 3"):
        CSVAE({"x": x, "p": Attribute(start=3, size=2, latent_dim=5), "q": Attribute(start=2, size=2, latent_dim=5)})
    with pytest.raises(ValueError, match="without a gap"):
        CSVAE({"x": x, "p": Attribute(start=2, size=2, latent_dim=5)})
    with pytest.raises(ValueError, match="needs a modality that is no attribute"):
        CSVAE({"p": Attribute(start=1, size=2, latent_dim=5), "q": Attribute(start=3, size=2, latent_dim=5)})
    with pytest.raises(ValueError, match="expected a block within 5 latents, got 3 from 3 on"):
        Attribute(start=3, size=3, latent_dim=5)
    with pytest.raises(ValueError, match="expected 2 values of a flag"):
        Attribute(start=3, size=2, latent_dim=5, values=3)
    scaled = Attribute(start=3, size=2, latent_dim=5)
    scaled.to_scale = softmax_scale
    with pytest.raises(ValueError, match="p: attributes have free scales"):
        CSVAE({"x": x, "p": scaled})


# ---- ranks ------------------------------------------------------------------------------------------------------------------------------


def one_step(rank: int, world: int, engine: str) -> list[tuple[np.ndarray, dict[str, float]]]:
    """For each way to independence the gradient of one optimiser step, and its terms."""
    os.environ.update(launched(engine))
    results = []
    for independence in INDEPENDENCE:
        torch.manual_seed(0)
        made = {"a": network(3, 4), "low": Attribute(start=2, size=2, latent_dim=4)}
        objective = CSVAE(made, independence=independence)
        stream = Rows("ab", mixed("ab", 128), batch_size=128, rank=rank, world=world)
        stream.names, stream.data = ("a", "low"), {"a": stream.data["a"], "low": (stream.data["b"][:, :1] > 0).astype("float32")}
        trainer = Trainer(objective, stream, Training(steps=1, batch_size=128))
        (report,) = list(trainer)
        moments = [trainer.engine.moments(path)["exp_avg"].flatten() for path in trainer.engine.names()]
        results.append((torch.cat(moments).numpy() / 0.1, {"loss": report.loss, **report.terms}))
    return results


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero3"])
def test_two_ranks_make_the_step_of_one_process(engine: str) -> None:
    needs(engine)
    expected = one_step(0, 1, "ddp")
    for came in run_ranks(one_step, 2, engine):
        for (moments, terms), (true, true_terms) in zip(came, expected, strict=True):
            assert np.abs(moments - true).max() < 1e-5 * np.abs(true).max()
            assert terms == pytest.approx(true_terms, rel=1e-5, abs=1e-6)
