"""MVAE: its terms against a transcription, how it counts, and the subsets that it draws."""

from collections import Counter

import pytest
import torch
from torch import Tensor

from meme_dist.distributions import DiagLaplace
from meme_dist.objectives.mvae import MVAE
from meme_dist.objectives.parts import random_subsets
from tests.objectives.rivals import COMPLETE, NAMES, PATTERNS, Row, apart, assert_transcribed, build, network, rows, subsets


@pytest.mark.parametrize("patterns", [COMPLETE, PATTERNS], ids=["complete", "incomplete"])
@pytest.mark.parametrize("count", [0, 2])
def test_loss_and_gradient_are_those_of_a_loop_over_rows_and_subsets(count: int, patterns: list[tuple[int, ...]]) -> None:
    beta = 1.7

    def elbo(row: Row, members: list[str], purpose: str, k: int = 0) -> Tensor:
        q = row.product(members, standard=True)
        z = row.draw(q, purpose, k)
        return torch.stack([row.explains(n, z) for n in members]).sum() - beta * apart(q, row.prior())

    def loss(row: Row) -> Tensor:
        terms = [elbo(row, row.names, "joint"), *[elbo(row, [n], n) for n in row.names]]
        terms += [elbo(row, row.subset("subset", k), "subset/z", k) for k in range(count)]
        return -torch.stack(terms).sum()

    assert_transcribed(build(MVAE, subsets=count, beta=beta), loss, patterns)


def test_a_row_of_one_modality_counts_its_bound_as_joint_and_as_single() -> None:
    objective = build(MVAE, subsets=0)
    _, batch = rows([(0, 1, 0)], 400)
    loss = objective(batch)
    joint, single = loss.terms["bound"], loss.terms["bound/b"]
    assert -loss.total.item() == pytest.approx((joint.total + single.total).item(), rel=1e-9)
    assert (joint.total / 400).item() == pytest.approx((single.total / 400).item(), rel=0.1)  # two draws of one bound
    assert loss.terms["bound/a"].count == 0 and loss.terms["bound/a"].total == 0


def test_a_subset_explains_its_members_only() -> None:
    """With one modality's decoder moved, terms of subsets without it do not move."""
    objective = build(MVAE, subsets=3)
    _, batch = rows(PATTERNS)
    before = objective(batch).terms
    objective.modality("c").decoder[2].bias.data += 100.0
    after = objective(batch).terms
    assert before["bound/a"].total == after["bound/a"].total and before["bound/c"].total > after["bound/c"].total


def test_what_is_drawn_of_a_latent_does_not_depend_on_the_subset_drawn() -> None:
    """One stream of random words for both made the bound of a subset exceed its evidence: the coins were the noise's radii and angles."""
    objective, (_, batch) = build(MVAE, subsets=1), rows([(1, 1, 1)], 40_000)
    sources, noise = objective._sources(batch)[-1], objective._noise(batch)[-1]
    for subset in sources.T.unique(dim=0):
        own = noise[(sources.T == subset).all(1)]
        assert len(own) > 4000
        torch.testing.assert_close(own.mean(0), torch.zeros_like(own[0]), rtol=0, atol=5 / len(own) ** 0.5)
        torch.testing.assert_close(own.var(0), torch.ones_like(own[0]), rtol=0, atol=7 / len(own) ** 0.5)


def test_random_subsets_are_uniform_over_what_a_row_observes_in_any_order_of_modalities() -> None:
    copies = 4000
    _, batch = rows([*PATTERNS, (0, 0, 0)], copies)
    drawn = random_subsets(batch, "subset", 2)
    assert drawn.shape == (2, 3, 8 * copies)
    for r, pattern in enumerate([*PATTERNS, (0, 0, 0)]):
        held = [n for n, there in zip(NAMES, pattern, strict=True) if there]
        found = Counter(
            tuple(n for n, member in zip(NAMES, column, strict=True) if member)
            for column in drawn[..., r::8].permute(0, 2, 1).flatten(0, 1).tolist()
        )
        expected = subsets(held) or [()]
        assert set(found) == set(expected)
        share = 1 / len(expected)
        assert all(abs(n / (2 * copies) - share) < 5 * (share * (1 - share) / (2 * copies)) ** 0.5 + 1e-9 for n in found.values())
    turned = batch._replace(modalities={n: batch.modalities[n] for n in "cab"}, observed=batch.observed[:, [2, 0, 1]])
    assert torch.equal(random_subsets(turned, "subset", 2), drawn[:, [2, 0, 1]])
    assert not torch.equal(drawn[0], drawn[1])


def test_published_default_has_random_subsets_from_three_modalities_on() -> None:
    assert MVAE({n: network() for n in "ab"}).subsets == 0
    assert MVAE({n: network() for n in "abc"}).subsets == 1


def test_inference_is_the_product_with_the_prior_for_every_pattern() -> None:
    objective = build(MVAE)
    x, batch = rows(PATTERNS)
    q = objective.infer(batch)
    for b in range(len(batch.observed)):
        row = Row(objective, x, batch, b)
        expected = row.product(row.names, standard=True)
        torch.testing.assert_close(q.mean[b], expected.loc)
        torch.testing.assert_close(q.stddev[b], expected.scale)


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="MVAE multiplies posteriors.*DiagLaplace"):
        build(MVAE, DiagLaplace)
    with pytest.raises(ValueError, match="subsets: expected at least 0, got -1"):
        build(MVAE, subsets=-1)
