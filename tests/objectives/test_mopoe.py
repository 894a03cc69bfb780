"""MoPoE: its terms against a transcription, the subsets it goes through or draws, and its inference."""

import pytest
import torch
from torch import Tensor

from meme_dist.distributions import DiagLaplace
from meme_dist.likelihoods import Normal
from meme_dist.modality import Modality
from meme_dist.objectives.mopoe import MoPoE
from meme_dist.types import pack
from tests.objectives.rivals import COMPLETE, NAMES, PATTERNS, Row, apart, assert_transcribed, build, rows, subsets


def member(row: Row, names: list[str] | tuple[str, ...], expert: str) -> object:
    return row.product(names, standard=expert == "full_set" and len(names) == len(NAMES))


@pytest.mark.parametrize("patterns", [COMPLETE, PATTERNS], ids=["complete", "incomplete"])
@pytest.mark.parametrize("expert", ["full_set", "never"])
@pytest.mark.parametrize("count", [None, 3])
def test_loss_and_gradient_are_those_of_a_loop_over_rows_and_subsets(
    count: int | None, expert: str, patterns: list[tuple[int, ...]]
) -> None:
    beta = 2.5

    def loss(row: Row) -> Tensor:
        z = row.draw(member(row, row.subset("subset", 0), expert), "joint")
        gone_through = subsets(row.names) if count is None else [row.subset("subset", k) for k in range(count)]
        kl = torch.stack([apart(member(row, names, expert), row.prior()) for names in gone_through]).mean()
        return beta * kl - torch.stack([row.explains(n, z) for n in row.names]).sum()

    assert_transcribed(build(MoPoE, beta=beta, standard=expert, subsets=count), loss, patterns)


def test_random_subsets_have_the_expected_divergence_of_all() -> None:
    torch.manual_seed(1)
    all_of_them, some = build(MoPoE), build(MoPoE, subsets=4)
    some.load_state_dict(all_of_them.state_dict())
    x, _ = rows([(1, 1, 1)], 1)
    copies = pack({n: v.expand(4000, -1) for n, v in x.items()}, torch.ones(4000, 3).numpy())
    exact, drawn = (objective(copies).terms["kl"].total.item() / 4000 for objective in (all_of_them, some))
    row = Row(all_of_them, x, rows([(1, 1, 1)], 1)[1], 0)
    spread = torch.stack([apart(member(row, names, "full_set"), row.prior()) for names in subsets(NAMES)]).std().item()
    assert abs(drawn - exact) < 4 * spread / (4 * 4000) ** 0.5


@pytest.mark.parametrize("expert", ["full_set", "never"])
def test_inference_is_the_mixture_over_the_products_of_what_a_row_observes(expert: str) -> None:
    objective = build(MoPoE, standard=expert, inference="mixture")
    x, batch = rows(PATTERNS)
    q, z = objective.infer(batch), torch.randn(5, 21, 2).double()
    for b in range(len(batch.observed)):
        row = Row(objective, x, batch, b)
        parts = [member(row, names, expert) for names in subsets(row.names)]
        expected = torch.stack([part.log_prob(z[:, b]).sum(-1) for part in parts]).exp().mean(0).log()
        torch.testing.assert_close(q.log_prob(z)[:, b], expected)
        torch.testing.assert_close(q.mean[b], torch.stack([part.loc for part in parts]).mean(0))


@pytest.mark.parametrize("expert", ["full_set", "never"])
def test_inference_by_the_product_takes_all_that_a_row_observes(expert: str) -> None:
    objective = build(MoPoE, standard=expert)
    x, batch = rows(PATTERNS)
    q = objective.infer(batch)
    for b in range(len(batch.observed)):
        row = Row(objective, x, batch, b)
        torch.testing.assert_close(q.mean[b], member(row, row.names, expert).loc)
    pair = objective.infer(batch.only("a", "b"))  # all that it is asked about, but not all that there is: no prior expert
    torch.testing.assert_close(pair.mean[5], Row(objective, x, batch, 5).product(["a", "b"], standard=False).loc)


@pytest.mark.parametrize("inference", ["product", "mixture"])
def test_a_row_of_nothing_gets_the_prior(inference: str) -> None:
    q, z = build(MoPoE, inference=inference).infer(rows([(0, 0, 0), (1, 0, 1)], 1)[1]), torch.randn(7, 2, 2).double()
    torch.testing.assert_close(q.log_prob(z)[:, 0], torch.distributions.Normal(0.0, 1.0).log_prob(z[:, 0]).sum(-1))


def many(count: int, **keywords: object) -> MoPoE:
    def linear() -> Modality:
        pair = {"encoder": torch.nn.Linear(1, 4), "decoder": torch.nn.Linear(2, 1)}
        return Modality(**pair, likelihood=Normal(1.0), latent_dim=2, feature=(1,))

    return MoPoE({f"m{i}": linear() for i in range(count)}, **keywords)


def test_more_than_twelve_modalities_need_random_subsets() -> None:
    with pytest.raises(ValueError, match=r"13 modalities have 8191 subsets, and 12 .*give subsets \(16, say\) .* inference='product'"):
        many(13)
    with pytest.raises(ValueError, match="inference='product'"):
        many(13, subsets=4, inference="mixture")
    objective = many(30, subsets=4)
    batch = pack({f"m{i}": torch.randn(6, 1) for i in range(30)}, torch.ones(6, 30).numpy())
    objective(batch).total.backward()
    assert all(torch.isfinite(p.grad).all() for p in objective.parameters())
    assert torch.isfinite(objective.infer(batch).mean).all()


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="MoPoE multiplies posteriors"):
        build(MoPoE, DiagLaplace)
    with pytest.raises(ValueError, match="subsets: expected at least 1, got 0"):
        build(MoPoE, subsets=0)
