"""Laws of attacks: they stay in the ball and in the range, move what the encoders say, and know what stands in their way."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Laplace, Normal, kl_divergence
from torch.nn.functional import cross_entropy

from meme_dist.attacks import (
    against_posterior,
    attack,
    forward_kl,
    misclassified,
    replaced,
    reverse_kl,
    squared_means,
    supervised,
    symmetric_kl,
    through_refinement,
    unsupervised,
)
from meme_dist.distributions import DiagLaplace, DiagNormal, Mixture
from meme_dist.mcmc import HMC, MALA
from meme_dist.objectives.meme import MEME
from meme_dist.objectives.mvae import MVAE
from meme_dist.refine import refine
from meme_dist.types import Batch, pack, pack_dense
from tests.objectives.rivals import EVENT, NAMES, PATTERNS, SPREAD, D, build

RADIUS = 0.2


def images(patterns: Any = PATTERNS, seed: int = 5) -> Batch:
    """Rows of data in [0, 1], some of it on the border; NaN where it is absent."""
    mask = torch.tensor(patterns).bool()
    x = {name: (1.5 * torch.rand(len(mask), EVENT).double() - 0.25).clamp(0, 1) for name in NAMES}
    shown = {name: torch.where(mask[:, i : i + 1], value, torch.nan) for i, (name, value) in enumerate(x.items())}
    return pack_dense(shown, dict(zip(NAMES, mask.T, strict=True)), draw=torch.arange(len(mask)).numpy(), seed=seed)


def sharp(kind: Any = MVAE, **keywords: Any) -> Any:
    """Encoders that react to small changes."""
    objective = build(kind, **keywords)
    for modality in objective.modalities.values():
        modality.encoder[0].weight.data *= 2
    return objective


def test_an_attack_stays_in_the_ball_and_in_the_range_and_moves_the_posterior() -> None:
    objective, batch = sharp(), images(PATTERNS * 3)
    gain = unsupervised(objective, batch)
    found = attack(objective, batch, "b", gain, radius=RADIUS, steps=10, restarts=2)
    before, after = batch.dense("b"), found.batch.dense("b")
    assert (after - before).abs().max() <= RADIUS + 1e-12 and after.min() >= 0 and after.max() <= 1
    held = batch.observed[:, 1]
    assert (found.gain[~held].abs() < 1e-12).all()
    torch.testing.assert_close(gain(found.batch).detach(), found.gain)
    random = replaced(batch, "b", (batch.modalities["b"].data + RADIUS * (2 * torch.rand(12, EVENT).double() - 1)).clamp(0, 1))
    assert (found.gain >= gain(random).detach()).all() and found.gain.mean() > 2 * gain(random).mean()
    for other in ("a", "c"):
        assert torch.equal(found.batch.modalities[other].data, batch.modalities[other].data)


def test_a_linear_encoder_is_moved_to_a_corner() -> None:
    """Where the answer is known: x + radius sign(w), cut to the range."""
    objective, batch = build(MVAE), images([(1, 1, 1)] * 6)
    weight = torch.tensor([2.0, -1.0, 0.5]).double()
    found = attack(objective, batch, "a", lambda moved: moved.dense("a") @ weight, radius=RADIUS, steps=20, restarts=1)
    best = (batch.dense("a") + RADIUS * weight.sign()).clamp(0, 1)
    torch.testing.assert_close(found.batch.dense("a"), best)


def test_more_restarts_are_never_worse() -> None:
    objective, batch = build(MVAE), images()

    def gain(moved: Batch) -> Tensor:
        return torch.sin(40 * moved.dense("a")).sum(-1)  # many peaks within the ball

    few, many = (attack(objective, batch, "a", gain, radius=RADIUS, steps=4, restarts=number).gain for number in (1, 4))
    assert (many >= few).all() and (many > few).any()


def test_a_supervised_attack_comes_nearer_to_its_target() -> None:
    objective, batch, towards = sharp(), images([(1, 0, 0)] * 8), images([(1, 0, 0)] * 8, seed=6)
    gain = supervised(objective, towards, distance=squared_means)
    found = attack(objective, batch, "a", gain, radius=RADIUS, steps=10, restarts=2)
    assert (found.gain > gain(batch).detach()).all() and (found.gain <= 0).all()
    whole = attack(objective, batch, "a", gain, radius=1.0, steps=40, restarts=3)  # the ball holds the target itself
    assert whole.gain.mean() > 0.1 * gain(batch).detach().mean()


def test_a_row_is_attacked_alike_in_any_batch() -> None:
    objective, batch = sharp(), images()
    whole = attack(objective, batch, "a", unsupervised(objective, batch), radius=RADIUS, steps=3, restarts=2).batch.dense("a")
    part = [4, 6]
    x, mask = batch.dense("a")[part], batch.observed[part].numpy()
    present = {name: batch.dense(name)[part][batch.observed[part][:, i]] for i, name in enumerate(NAMES)}
    alone = pack(present, mask, draw=batch.draw[part].numpy(), seed=batch.seed)
    found = attack(objective, alone, "a", unsupervised(objective, alone), radius=RADIUS, steps=3, restarts=2).batch.dense("a")
    assert not torch.allclose(found, x)
    torch.testing.assert_close(found, whole[part], rtol=1e-9, atol=1e-9)


def test_the_model_is_left_as_it_was() -> None:
    objective, batch = sharp(MEME, pseudo_inputs=2), images()
    objective(batch).total.backward()
    before = {name: p.grad.clone() for name, p in objective.named_parameters()}
    adaptive = through_refinement(objective, lambda z: z.square().sum(-1), budget=4)
    for gain in (unsupervised(objective, batch), adaptive):
        attack(objective, batch, "a", gain, radius=RADIUS, steps=2, restarts=1)
    assert all(torch.equal(p.grad, before[name]) and p.requires_grad for name, p in objective.named_parameters())
    assert objective.training


def test_distances_are_those_of_torch() -> None:
    mean, scale = torch.randn(2, 5, 3).double(), torch.rand(2, 5, 3).double() + 0.3
    for ours, theirs in ((DiagNormal, Normal), (DiagLaplace, Laplace)):
        q, p = (ours(m, s) for m, s in zip(mean, scale, strict=True))
        there, back = (kl_divergence(theirs(*a), theirs(*b)).sum(-1) for a, b in ((q, p), (p, q)))
        torch.testing.assert_close(forward_kl(q, p), there)
        torch.testing.assert_close(reverse_kl(q, p), back)
        torch.testing.assert_close(symmetric_kl(q, p), (there + back) / 2)
    mixture = Mixture(DiagNormal(mean, scale), torch.ones(2, 5).bool())
    moments = kl_divergence(Normal(mixture.mean, mixture.stddev), Normal(mean[0], scale[0])).sum(-1)
    torch.testing.assert_close(forward_kl(mixture, DiagNormal(mean[0], scale[0])), moments)


def linear() -> tuple[MVAE, Tensor]:
    """One modality's encoder is ten times as loud in the direction [E] that its decoder, x = W z, never uses."""
    objective = build(MVAE)
    modality = objective.modality("a")
    frame = torch.linalg.qr(torch.randn(EVENT, EVENT).double())[0]
    modality.decoder, modality.encoder = nn.Linear(D, EVENT).double(), nn.Linear(EVENT, 2 * D).double()
    modality.decoder.weight.data = 3 * frame[:, :D]
    modality.encoder.weight.data[:D] = frame[:, :D].T / 3 + 10 * frame[:, D]
    return objective, frame[:, D]


def test_refinement_undoes_what_the_likelihood_does_not_see() -> None:
    """The attack pushes the code far along a direction of the data that says nothing about z; the exact posterior does not follow."""
    objective, ignored = linear()
    batch = images([(1, 0, 0)] * 10)
    free = lambda moved: (moved.dense("a") @ ignored).abs()  # noqa: E731
    moved = attack(objective, batch, "a", free, radius=RADIUS, steps=10, restarts=1, low=-9.0, high=9.0).batch
    step = (moved.dense("a") - batch.dense("a")) @ ignored
    only = replaced(batch, "a", batch.dense("a") + step[:, None] * ignored)  # that direction alone
    clean, fooled = (objective.infer(x).mean.detach() for x in (batch, only))
    refined = [refine(objective, x, kernel=HMC(leapfrogs=3), budget=61, samples=50).z.mean(0) for x in (batch, only)]
    assert (fooled - clean).norm(dim=-1).min() > 1
    assert (refined[0] - refined[1]).norm(dim=-1).max() < 0.25


def test_the_attack_through_refinement_sees_the_refined_code() -> None:
    objective, batch = sharp(), images([(1, 1, 1)] * 6)
    z = refine(objective, batch, kernel=MALA, budget=9, samples=2, temper=0.5, purpose="adaptive/0").z
    loss = lambda code: (code - 1).square().sum(-1)  # noqa: E731
    gain = through_refinement(objective, loss, budget=9, chains=2, temper=0.5)
    data = batch.modalities["a"].data.clone().requires_grad_()
    value = gain(replaced(batch, "a", data))
    torch.testing.assert_close(value.detach(), loss(z).mean(0))
    (slope,) = torch.autograd.grad(value.sum(), data)
    mean = objective.infer(replaced(batch, "a", data)).mean
    (straight,) = torch.autograd.grad((2 * (z - 1).mean(0) * mean).sum(), data)
    torch.testing.assert_close(slope, straight)
    assert not torch.equal(gain(batch), value)  # other random numbers


def test_the_attack_against_the_posterior_finds_its_corner() -> None:
    """Normal likelihoods' log odds of two codes are linear in x: the best change is radius times the sign of the decodings' difference."""
    objective, batch = sharp(), images()
    clean, wrong = torch.randn(2, len(PATTERNS), D).double()
    found = attack(objective, batch, "c", against_posterior(objective, "c", clean=clean, wrong=wrong), radius=RADIUS, restarts=1)
    decode, held = objective.modality("c").decoder, batch.observed[:, 2]
    best = (batch.dense("c") + RADIUS * (decode(wrong) - decode(clean)).sign()).clamp(0, 1).detach()
    torch.testing.assert_close(found.batch.dense("c")[held], best[held])
    odds = [Normal(decode(z), SPREAD).log_prob(best).sum(-1).detach() for z in (wrong, clean)]
    torch.testing.assert_close(found.gain, torch.where(held, odds[0] - odds[1], 0.0))


def test_a_classifier_of_codes_is_misled() -> None:
    objective, batch, probe = sharp(), images([(1, 1, 1)] * 20), nn.Linear(D, 2).double()
    label = probe(objective.infer(batch).mean).argmax(-1)
    gain = misclassified(objective, probe, label)
    found = attack(objective, batch, "a", gain, radius=RADIUS, steps=10, restarts=2)
    assert (found.gain > gain(batch).detach()).all()
    torch.testing.assert_close(found.gain, cross_entropy(probe(objective.infer(found.batch).mean), label, reduction="none").detach())


def test_borders_are_checked() -> None:
    objective, batch = build(MVAE), images()
    gain = unsupervised(objective, batch)
    with pytest.raises(ValueError, match="expected radius > 0"):
        attack(objective, batch, "a", gain, radius=0.0)
    with pytest.raises(ValueError, match=r"a: expected data in \[0.3, 0.6\], got .* say low and high"):
        attack(objective, batch, "a", gain, radius=0.1, low=0.3, high=0.6)
    tokens = replaced(batch, "a", torch.zeros(len(batch.modalities["a"].data), EVENT, dtype=torch.long))
    with pytest.raises(ValueError, match="a: only real data"):
        attack(objective, tokens, "a", gain, radius=0.1)
