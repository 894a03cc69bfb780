"""Latents of a modality's own in the metrics: unknown where others lead, known from the modality's data in its likelihood.

Linear-Gaussian data whose first coordinate of z all modalities share; the second is another one for each modality. Seen alone, a modality
has the evidence and the posterior that it has where both are shared, and so `TRUTH` knows them.
"""

import numpy as np
import pytest
import torch
from torch import nn

from meme_dist.distributions import Components, DiagNormal
from meme_dist.evaluate import evaluate, values
from meme_dist.likelihoods import Normal
from meme_dist.metrics import Query, evaluating, log_likelihood, mean
from meme_dist.metrics.coherence import cross_coherence, joint_coherence
from meme_dist.metrics.imputation import imputation
from meme_dist.metrics.rows import shown
from meme_dist.modality import Modality
from meme_dist.noise import Noise
from meme_dist.objectives.meme import MEME
from meme_dist.types import pack_dense
from tests.test_metrics import TRUTH, Exact, evidence


class Shared(MEME):
    """With the prior N(0, 1) of the coordinate that is shared."""

    def prior(self) -> Components:
        return Components(DiagNormal(torch.zeros(1, 1), torch.ones(1, 1)))


def model(spread: float = 1.0) -> Shared:
    modalities = {}
    for name, columns in TRUTH.weight.items():
        decoder = nn.Linear(2, 4)
        decoder.weight.data, decoder.bias.data = columns.float(), TRUTH.bias[name].float()
        likelihood = Normal(TRUTH.scale[name])
        modalities[name] = Modality(
            encoder=Exact(name, spread), decoder=decoder, likelihood=likelihood, latent_dim=2, private_dim=1, feature=(4,)
        )
    return Shared(modalities, pseudo_inputs=1)


def data(count: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(count, 1))
    x = {}
    for name, weight in TRUTH.weight.items():
        z = torch.from_numpy(np.concatenate([shared, rng.normal(size=(count, 1))], 1))
        x[name] = (z @ weight.T + TRUTH.bias[name] + TRUTH.scale[name] * torch.from_numpy(rng.normal(size=(count, 4)))).float()
    return pack_dense(x, {name: torch.ones(count, dtype=torch.bool) for name in x}), x


def test_the_bound_is_the_evidence_for_every_k_where_the_posterior_is_exact() -> None:
    batch, x = data(40)
    found = values(evaluate(model(), [batch], [log_likelihood([Query(("x0",)), Query(("x2",))], samples=(1, 5))]))
    for name in ("x0", "x2"):
        exact = evidence({name: x[name]}).mean()
        assert found[f"log_likelihood/{name}@1"] == pytest.approx(exact, abs=2e-4)
        assert found[f"log_likelihood/{name}@5"] == pytest.approx(exact, abs=2e-4)
    wide = values(evaluate(model(1.5), [batch], [log_likelihood([Query(("x0",))], samples=(1, 200), chunk=30)]))
    exact = evidence({"x0": x["x0"]}).mean()
    assert wide["log_likelihood/x0@1"] < exact - 0.1 < wide["log_likelihood/x0@200"] < exact + 0.05


def test_intervals_of_an_imputation_hold_what_they_say_since_unknown_own_latents_are_drawn() -> None:
    batch, _ = data(1500, seed=1)
    found = evaluate(model(), [batch], [imputation([("x0",)], rows=1500)])
    for level in (0.5, 0.8, 0.95):
        key = f"imputation/x0>x1/coverage@{level}"
        estimate = mean(found[key], found[f"{key}/square"])
        assert abs(estimate.value - level) < (estimate.high - estimate.low) < 0.04


def test_a_reconstruction_knows_its_own_latents_where_the_data_are_given() -> None:
    batch, x = data(300, seed=2)
    objective, noise = model(), Noise(0, torch.arange(300))
    with evaluating(objective):
        z = objective.infer(batch.only("x0")).sample(noise, "z", 1)
        blind, seeing = (shown(objective, "x0", z, noise, "w", given=given)[0] for given in (None, batch))
    assert float((seeing - x["x0"]).square().mean()) < 0.7 * float((blind - x["x0"]).square().mean())


def test_coherence_knows_own_latents_of_a_source_and_no_others() -> None:
    """The class is the sign of x0's own latent: its reconstruction shows it, one from x1 shows it by chance, and so do joint draws."""
    batch, x = data(2000, seed=3)
    coordinate = torch.linalg.pinv(TRUTH.weight["x0"])[1].float()

    def sign(values: torch.Tensor) -> torch.Tensor:
        return ((values - TRUTH.bias["x0"].float()) @ coordinate > 0).long()

    batch, objective = batch._replace(label=sign(x["x0"])), model()
    metric = cross_coherence({"x0": sign}, [("x0",), ("x1",)], own=True)
    found = values(evaluate(objective, [batch], [metric]))
    assert found["cross_coherence/x0>x0"] > 0.75
    assert abs(found["cross_coherence/x1>x0"] - 0.5) < 0.05
    with evaluating(objective):
        drawn = values(joint_coherence(objective, {"x0": sign, "x1": lambda x: torch.zeros(len(x), dtype=torch.long)}, num=2000))
    assert abs(drawn["joint_coherence/all"] - 0.5) < 0.05
