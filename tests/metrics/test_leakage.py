"""Leakage: a probe finds what is there and nothing else, and edits are judged by what they change and what they leave alone."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor, nn

from meme_dist.evaluate import evaluate
from meme_dist.likelihoods import Normal
from meme_dist.metrics.leakage import FREE, edits, estimates, leakage, parts_of
from meme_dist.metrics.perceptrons import fit_perceptron
from meme_dist.modalities.attribute import Attribute
from meme_dist.modality import Modality
from meme_dist.objectives.csvae import CSVAE
from meme_dist.types import pack

ROWS = 600


class Copy(nn.Module):
    """x = (z, w): the encoder copies its input, nearly without noise."""

    def __init__(self, leak: float):
        super().__init__()
        self.leak = leak

    def forward(self, x: Tensor) -> Tensor:
        mean = torch.cat([x[:, :1] + self.leak * x[:, 1:], x[:, 1:]], -1)
        return torch.cat([mean, torch.full_like(mean, -6.0)], -1)


class Mix(nn.Module):
    """The decoder: the second coordinate is w, and so much of w is in the first too."""

    def __init__(self, impurity: float):
        super().__init__()
        self.impurity = impurity

    def forward(self, z: Tensor) -> Tensor:
        return torch.stack([z[:, 0] + self.impurity * z[:, 1], z[:, 1]], -1)


def planted(*, leak: float = 0.0, impurity: float = 0.0) -> CSVAE:
    x = Modality(encoder=Copy(leak), decoder=Mix(impurity), likelihood=Normal(1.0), latent_dim=2, feature=(2,))
    return CSVAE({"x": x, "on": Attribute(start=1, size=1, latent_dim=2)})


def batches(seed: int, label_missing: float = 0.0, share: float = 0.4) -> list:
    rng = np.random.default_rng(seed)
    on = rng.random(ROWS) < share
    x = np.stack([rng.standard_normal(ROWS), np.where(on, 3.0, 0.0) + 0.3 * rng.standard_normal(ROWS)], 1).astype("float32")
    observed = np.stack([np.ones(ROWS, dtype=bool), rng.random(ROWS) >= label_missing], 1)
    made = []
    for part in np.arange(ROWS).reshape(4, -1):
        seen = observed[part]
        labels = torch.from_numpy(on[part][seen[:, 1]].astype("float32"))[:, None]
        made.append(pack({"x": torch.from_numpy(x[part]), "on": labels}, seen, draw=part))
    return made


def test_a_probe_finds_a_planted_rule_and_only_the_base_rate_in_noise() -> None:
    torch.manual_seed(0)
    z = torch.randn(2000, 2)
    ring = (z.norm(dim=-1) > 1.18).long()  # no line separates it
    probe = fit_perceptron(z[:1000], ring[:1000], 2, epochs=25)
    assert (probe(z[1000:]).argmax(-1) == ring[1000:]).double().mean() > 0.95


def shifted(rows: int, bayes: float, seed: int) -> tuple[Tensor, Tensor]:
    """Normals in 16 latents, a label that moves their mean, so far that the best rule is right that often, and three labels in ten."""
    generator = torch.Generator().manual_seed(seed)
    z, label = torch.randn(rows, 16, generator=generator), torch.rand(rows, generator=generator)
    label = (label < (0.5 if bayes > 0.5 else 0.3)).long()
    return z + label[:, None] * 2 * float(norm.ppf(max(bayes, 0.5))) / 4, label


@pytest.mark.parametrize("bayes", [0.585, 0.56])
def test_a_probe_reads_a_weak_leak_nearly_as_well_as_the_best_rule(bayes: float) -> None:
    probe, (z, label) = fit_perceptron(*shifted(4000, bayes, 0), 2), shifted(20_000, bayes, 1)
    assert bayes - 0.02 < (probe(z).argmax(-1) == label).double().mean() < bayes + 0.01


def test_a_probe_of_noise_is_as_right_as_the_base_rate() -> None:
    probe, (z, label) = fit_perceptron(*shifted(4000, 0.5, 0), 2), shifted(20_000, 0.5, 1)
    base = 1 - label.double().mean()
    assert (probe(z).argmax(-1) == label).double().mean() > base - 3 * (base * (1 - base) / 20_000).sqrt()


def test_a_probe_of_one_row_is_the_frequencies() -> None:
    probe = fit_perceptron(torch.randn(1, 2), torch.tensor([2]), 3)
    assert torch.equal(*probe(torch.randn(2, 2)))


def test_a_probe_is_a_pure_function_of_its_arguments() -> None:
    z = torch.randn(300, 2)
    label = (z[:, 0] > 0).long()
    first = fit_perceptron(z, label, 2, epochs=2)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    second = fit_perceptron(z, label, 2, epochs=2)
    assert torch.equal(first(z), second(z)) and torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first(z), fit_perceptron(z, label, 2, epochs=2, seed=1)(z))
    torch.testing.assert_close(fit_perceptron(100 + 1e3 * z, label, 2, epochs=2)(100 + 1e3 * z), first(z), rtol=1e-2, atol=1e-2)


def test_the_matrix_tells_where_a_label_is() -> None:
    clean = leakage(planted(), batches(0), batches(1), rows=ROWS)
    assert clean.base["on"].value == pytest.approx(0.6, abs=0.05) and clean.base["on"].count == ROWS
    assert clean.accuracy["on", "on"].value > 0.99
    assert clean.accuracy["on", FREE].value < clean.base["on"].value + 0.04
    leaking = leakage(planted(leak=2.0), batches(0), batches(1), rows=ROWS)
    assert leaking.accuracy["on", FREE].value > 0.95
    assert parts_of(planted()) == {FREE: slice(0, 1), "on": slice(1, 2)}
    few = leakage(planted(), batches(0, 0.5), batches(1, 0.5), rows=ROWS)
    assert 250 < few.base["on"].count < 350 and few.accuracy["on", "on"].value > 0.99


def test_the_base_rate_is_never_below_chance_whatever_the_values_are_called() -> None:
    """It is that of the rows asked, whichever value is the commonest among those trained on."""
    few = batches(0)[:1]
    found = [leakage(planted(), few, batches(1, share=share), rows=ROWS).base["on"] for share in (0.3, 0.7)]
    assert [base.value for base in found] == [pytest.approx(0.7, abs=0.05)] * 2


def test_without_a_labelled_row_to_train_on_nothing_is_measured() -> None:
    none = leakage(planted(), batches(0, 1.0), batches(1), rows=ROWS)
    assert none.accuracy["on", FREE].count == 0 and math.isnan(none.accuracy["on", FREE].value) and none.base["on"].count == ROWS
    assert leakage(planted(), batches(0)[:1], batches(1, 1.0), rows=ROWS).base["on"].count == 0


def test_batches_that_come_once_keep_their_labels() -> None:
    again = leakage(planted(), iter(batches(0)), iter(batches(1)), rows=ROWS)
    assert again == leakage(planted(), batches(0), batches(1), rows=ROWS) and again.base["on"].count == ROWS


def test_an_attribute_without_a_rule_is_named() -> None:
    with pytest.raises(ValueError, match="a rule for each attribute, got none for on"):
        edits(planted(), batches(0)[0], "x", {})


def test_edits_are_judged_by_the_rule_and_purity_by_how_far_the_rest_moves() -> None:
    def rule(x: Tensor) -> Tensor:
        return (x[..., 1] > 1.5).long()

    def asked(objective: CSVAE) -> dict:
        metric = [lambda o, b: edits(o, b, "x", {"on": rule, "first": lambda x: (x[..., 0] > 0).long()}, rest=lambda x: x[:, :1])]
        sums = evaluate(objective, batches(1), metric)
        if objective.modality("x").decoder.impurity == 0:  # the mean distance of two standard normal numbers
            assert sums["spread/on"].total / sums["spread/on"].count == pytest.approx(2 / math.sqrt(math.pi), rel=0.15)
        return estimates(sums)

    pure, impure = asked(planted()), asked(planted(impurity=0.5))
    assert pure["reconstructed/on"].value > 0.99 and pure["success/on"].value == 1.0 and pure["success/on"].count == ROWS
    assert pure["kept/on>first"].value == 1.0 and pure["shift/on"].value == pytest.approx(0, abs=1e-5)
    assert impure["success/on"].value == 1.0 and impure["kept/on>first"].value < 0.8
    assert impure["shift/on"].value == pytest.approx(1.5, rel=0.1) and impure["shift/on"].low < 1.5 < impure["shift/on"].high + 0.1
    dead = planted()
    dead.attribute("on").encoder.mean.data.zero_()  # an attribute whose values have one block
    found = asked(dead)
    assert found["success/on"].value == pytest.approx(0.4, abs=0.06)  # right only where off is asked for
