"""MMVM: its terms against a transcription, both divergences, and the evidence under its own prior."""

import math

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from torch import Tensor

from meme_dist.objectives.mmvm import MMVM
from tests.objectives import test_meme as meme
from tests.objectives.rivals import COMPLETE, FAMILIES, PATTERNS, Row, apart, assert_transcribed, build, rows


def mixture(row: Row, z: Tensor, alpha: float) -> Tensor:
    """log h(z | x)."""
    parts = [(1 - alpha) / len(row.names) * q.log_prob(z).sum().exp() for q in row.q.values()]
    return (sum(parts) + alpha * row.prior().log_prob(z).sum().exp()).log()


def divergence(row: Row, name: str, z: Tensor, alpha: float, kind: str) -> Tensor:
    q = row.q[name]
    if kind == "mixture":
        return q.log_prob(z).sum() - mixture(row, z, alpha)
    pairs = torch.stack([apart(q, other) for other in row.q.values()]).mean()
    return (1 - alpha) * pairs + alpha * apart(q, row.prior())


@pytest.mark.parametrize("patterns", [COMPLETE, PATTERNS], ids=["complete", "incomplete"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("kind", ["pairs", "mixture"])
def test_loss_and_gradient_are_those_of_a_loop_over_rows(kind: str, alpha: float, family: type, patterns: list[tuple[int, ...]]) -> None:
    beta = 1.7

    def loss(row: Row) -> Tensor:
        samples = {n: row.draw(q, n) for n, q in row.q.items()}
        terms = [beta * divergence(row, n, z, alpha, kind) - row.explains(n, z) for n, z in samples.items()]
        return torch.stack(terms).sum()

    assert_transcribed(build(MMVM, family, divergence=kind, alpha=alpha, beta=beta), loss, patterns)


@pytest.mark.parametrize("kind", ["pairs", "mixture"])
def test_each_modalitys_divergence_is_its_own(kind: str) -> None:
    """The sum of KL(q_i || q_j) over all pairs is that of KL(q_j || q_i): only its parts tell the direction."""
    objective = build(MMVM, divergence=kind, alpha=0.25)
    x, batch = rows(PATTERNS)
    terms, seen = objective(batch).terms, [Row(objective, x, batch, b) for b in range(len(batch.observed))]
    for name in "abc":
        parts = [divergence(row, name, row.draw(row.q[name], name), 0.25, kind) for row in seen if name in row.names]
        torch.testing.assert_close(terms[f"kl/{name}"].total, torch.stack(parts).sum().detach())
        assert terms[f"kl/{name}"].count == len(parts) == 12


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_the_pairs_divergence_is_at_least_that_from_the_mixture(alpha: float) -> None:
    torch.manual_seed(2)
    exact, bound = build(MMVM, divergence="mixture", alpha=alpha), build(MMVM, divergence="pairs", alpha=alpha)
    bound.load_state_dict(exact.state_dict())
    _, batch = rows(COMPLETE, 4000)
    for name in "abc":
        means = [objective(batch).terms[f"kl/{name}"].total.item() / 4000 for objective in (exact, bound)]
        assert means[0] < means[1] and means[0] < math.log(3 / (1 - alpha)) + 0.1  # q_i is one of the mixture's three parts


@pytest.mark.parametrize("kind", ["pairs", "mixture"])
def test_the_bound_never_exceeds_the_evidence_under_the_data_dependent_prior(kind: str) -> None:
    torch.manual_seed(3)
    names, alpha = ["a", "b", "c"], 0.2
    objective = MMVM({n: meme.random_linear() for n in names}, divergence=kind, alpha=alpha).double()
    x = {n: torch.randn(meme.EVENT).double() for n in names}
    for observed in ([1, 1, 1], [1, 0, 1], [0, 1, 0]):
        terms = [objective(meme.replicate(x, observed, 400, seed=seed)).terms["bound"] for seed in range(8)]
        means = torch.stack([t.total / t.count for t in terms])
        assert means.mean() <= own_evidence(objective, x, observed, alpha) + 4 * means.std() / math.sqrt(8)


@torch.no_grad()
def own_evidence(objective: MMVM, x: dict[str, Tensor], observed: list[int], alpha: float) -> float:
    """sum_i log of the integral of p_i(x_i | z) h(z | x), in closed form."""
    held = [n for n, there in zip(x, observed, strict=True) if there]
    experts = [objective.modality(n).encode(x[n][None]) for n in held]
    parts = [(q.mean[0], q.scale[0]) for q in experts] + [(torch.zeros(meme.D).double(), torch.ones(meme.D).double())]
    weights = np.log([(1 - alpha) / len(held)] * len(held) + [alpha])
    scores = [[meme.normal_log_prob(meme.DiagNormal(m, s), x[n], objective.modality(n)) for m, s in parts] for n in held]
    return float(logsumexp(weights + np.array(scores), axis=1).sum())


def test_a_row_of_one_modality_is_its_own_prior_at_alpha_zero() -> None:
    for kind in ("pairs", "mixture"):
        objective = build(MMVM, divergence=kind)
        _, batch = rows([(0, 1, 0)])
        assert objective(batch).terms["kl/b"].total.abs() < 1e-12


def test_inference_is_the_mixture_of_what_a_row_observes() -> None:
    objective = build(MMVM)
    x, batch = rows(PATTERNS)
    q, z = objective.infer(batch), torch.randn(4, 21, 2).double()
    for b in range(len(batch.observed)):
        row = Row(objective, x, batch, b)
        torch.testing.assert_close(q.log_prob(z)[:, b], torch.stack([mixture(row, point[b], 0.0) for point in z]))


def test_a_weight_outside_zero_and_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"alpha: expected 0 to 1, got -0\.1"):
        build(MMVM, alpha=-0.1)
