"""MVTCAE: its terms against a transcription, and the ends of alpha."""

import pytest
import torch
from torch import Tensor

from meme_dist.distributions import DiagLaplace
from meme_dist.objectives.mvtcae import MVTCAE
from tests.objectives.rivals import COMPLETE, PATTERNS, Row, apart, assert_transcribed, build, rows


@pytest.mark.parametrize("patterns", [COMPLETE, PATTERNS], ids=["complete", "incomplete"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9, 1.0])
def test_loss_and_gradient_are_those_of_a_loop_over_rows(alpha: float, patterns: list[tuple[int, ...]]) -> None:
    beta, count = 2.5, 3

    def loss(row: Row) -> Tensor:
        q = row.product(row.names, standard=False)
        z = row.draw(q, "joint")
        explained = torch.stack([row.explains(n, z) for n in row.names]).sum()
        views = torch.stack([apart(q, row.q[n]) for n in row.names]).sum()
        return -(count - alpha) / count * explained + beta * ((1 - alpha) * apart(q, row.prior()) + alpha / count * views)

    assert_transcribed(build(MVTCAE, alpha=alpha, beta=beta), loss, patterns)


def test_terms_are_the_elbo_of_the_product_and_the_divergences_from_each_view() -> None:
    objective = build(MVTCAE)
    x, batch = rows(PATTERNS)
    seen = [Row(objective, x, batch, b) for b in range(len(batch.observed))]
    products = [row.product(row.names, standard=False) for row in seen]
    terms = objective(batch).terms
    kl = sum(apart(q, row.prior()) for q, row in zip(products, seen, strict=True))
    torch.testing.assert_close(terms["kl"].total, kl.detach())
    explained = sum(terms[f"reconstruction/{n}"].total for n in "abc")
    torch.testing.assert_close(terms["bound"].total, explained - kl.detach())
    views = sum(apart(q, row.q["b"]) for q, row in zip(products, seen, strict=True) if "b" in row.names)
    torch.testing.assert_close(terms["kl/b"].total, views.detach())
    assert terms["kl/b"].count == 12 and terms["bound"].count == 21


def test_inference_is_the_product_without_the_prior_for_every_pattern() -> None:
    objective = build(MVTCAE)
    x, batch = rows([*PATTERNS, (0, 0, 0)])
    q = objective.infer(batch)
    for b in range(len(batch.observed)):
        row = Row(objective, x, batch, b)
        expected = row.product(row.names, standard=not row.names)
        torch.testing.assert_close(q.mean[b], expected.loc)
        torch.testing.assert_close(q.stddev[b], expected.scale)


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="MVTCAE multiplies posteriors"):
        build(MVTCAE, DiagLaplace)
    with pytest.raises(ValueError, match=r"alpha: expected 0 to 1, got 1\.5"):
        build(MVTCAE, alpha=1.5)
