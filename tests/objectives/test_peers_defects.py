"""Defects found in other libraries of multimodal VAEs, each as a law here: MultiVae (1.0.3, and its head of 2026), multi-view-AE and more.

Laws that other files state already:
  absent entries filled with NaN are harmless, patterns may be mixed (MultiVae raises on both): test_laws.py, data/test_adapters.py
  clipping clips, and a learning-rate schedule runs (at MultiVae's head neither does): test_trainer.py,
    test_updates_are_those_of_plain_adam_with_torchs_clipping_bit_by_bit, test_schedules_are_torchs_and_rise_linearly
  rows come in another order each epoch (multi-view-AE does not shuffle, MultiVae's ranks repeat one order): data/test_stream.py,
    test_order_differs_between_epochs_and_seeds_and_leaves_no_neighbours_together
  an evaluation's sums cross the ranks (each of MultiVae's ranks has its own): test_inference.py
  several processes on CPUs (MultiVae starts a process group on CUDA alone): test_laws.py, test_distributed.py
"""

import inspect
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from meme_dist.distributions import DiagNormal
from meme_dist.evaluate import evaluate, values
from meme_dist.metrics import Query, log_likelihood
from meme_dist.noise import Noise
from meme_dist.objectives.base import Objective
from meme_dist.objectives.mmvae import MMVAE
from meme_dist.run import held_out_loss
from meme_dist.train.trainer import Trainer, Training
from meme_dist.types import Batch, pack_dense
from tests.objectives.test_laws import CLASSES, EVENT, FIRST, NAMES, TABLE, Case, all_patterns, build, every_objective
from tests.objectives.test_mmvae import X, near
from tests.ranks import run_ranks
from tests.trainings import PATTERNS, Rows
from tests.trainings import build as build_tiny

MIXTURES = [p for p in FIRST if p.id in ("MEME", "MMVAE", "MMVAEPlus", "MMVM")]
OF_ATTRIBUTES = [
    ("CSVAE", "block_weight"),
    ("CSVAE", "independence_weight"),
]  # the table has none: tests/objectives/test_csvae.py has the law
NUMBERS = [
    (name, keyword)
    for name, kind in CLASSES.items()
    for keyword, parameter in inspect.signature(kind).parameters.items()
    if isinstance(parameter.default, float) and (name, keyword) not in OF_ATTRIBUTES
]


def complete(rows: int = 6) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return {n: torch.randn(rows, EVENT).double() for n in NAMES}, {n: torch.ones(rows, dtype=torch.bool) for n in NAMES}


def likelihood(objective: Any, *batches: Batch) -> tuple[float, float]:
    """The joint bound of log p(x) and the number of its rows."""
    (joint,) = [
        found for name, found in evaluate(objective, batches, [log_likelihood([Query(NAMES)], samples=(4,))]).items() if name[-1] == "4"
    ]
    return (joint.total / joint.count).item(), joint.count.item()


# MultiVae, mmvaePlus_model.py:496: `inputs.data.popitem()` drops one modality from the joint likelihood of MMVAE+.
@every_objective
def test_the_joint_likelihood_counts_every_modality(kind: type[Objective], case: Case) -> None:
    objective, (x, observed) = build(kind, case), complete()
    before, _ = likelihood(objective, pack_dense(x, observed))
    for name in NAMES:
        after, _ = likelihood(objective, pack_dense({**x, name: x[name] + 100}, observed))
        assert after < before - 1000, name


# MultiVae raises on it, for every model.
@every_objective
def test_the_joint_likelihood_of_incomplete_rows_is_that_of_the_rows_that_hold_everything(kind: type[Objective], case: Case) -> None:
    objective, (x, observed) = build(kind, case), all_patterns(14)
    whole = torch.stack(list(observed.values())).all(0)
    x = {n: torch.where(observed[n][:, None], v, torch.nan) for n, v in x.items()}
    numbers = torch.arange(14)[whole].numpy()
    alone = pack_dense({n: v[whole] for n, v in x.items()}, {n: m[whole] for n, m in observed.items()}, draw=numbers)
    mixed, rows = likelihood(objective, pack_dense(x, observed))
    assert rows == 2 and mixed == pytest.approx(likelihood(objective, alone)[0], rel=1e-9)


# MultiVae's MMVAEConfig.beta is documented and never read: its loss is the same at 1 and 100.
@pytest.mark.parametrize(("name", "keyword"), NUMBERS)
def test_every_weight_that_can_be_set_changes_the_gradient(name: str, keyword: str) -> None:
    case, grads = next(iter(TABLE[name].values())), []
    for value in (0.2, 0.9):
        torch.manual_seed(0)
        objective, (x, observed) = build(CLASSES[name], case._replace(keywords={**case.keywords, keyword: value})), complete()
        objective(pack_dense(x, observed)).total.backward()
        grads.append(torch.cat([p.grad.flatten() for p in objective.parameters()]))
    assert (grads[1] - grads[0]).norm() > 1e-3 * grads[0].norm()


# mm-vae-comparison (mmvae_models.py:116) overwrites its cross reconstructions: for N > 2 the last one alone counts.
@pytest.mark.parametrize("kind, case", [p for p in FIRST if p.id in ("MEME", "MMVAE", "MMVAEPlus")])
def test_every_cross_reconstruction_counts(kind: type[Objective], case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the N (N - 1) entries log p_j(x_j | z_i) moves the loss, and up: better explained is never worse."""
    keywords = {**case.keywords, "samples": 1} | ({"resampled": False} if kind is not CLASSES["MEME"] else {"estimator": "rao_blackwell"})
    objective, (x, observed) = build(kind, case._replace(keywords=keywords)), complete()
    batch, whole = pack_dense(x, observed, single=False), objective.reconstructions
    before = objective(batch).total
    for i, j in itertools.permutations(range(3), 2):

        def better(*values: Any, place: tuple[int, int] = (i, j), **settings: Any) -> Tensor:
            table, bonus = whole(*values, **settings), torch.zeros(3, 3).double()
            bonus[place] = 0.5
            return table + bonus[..., None, None]

        monkeypatch.setattr(objective, "reconstructions", better)
        assert objective(batch).total < before - 0.1, (i, j)


# multi-view-AE (mmvae.py:105 and :182) weighs one draw and decodes another.
def test_what_is_decoded_is_what_is_weighed(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, (x, observed) = build(MMVAE, TABLE["MMVAE"]["iwae"]), complete()
    decoded: list[Tensor] = []
    weighed: list[Tensor] = []
    reconstructions, log_ratio = objective.reconstructions, objective._log_ratio
    monkeypatch.setattr(objective, "reconstructions", lambda batch, z, **k: (decoded.append(z), reconstructions(batch, z, **k))[1])
    monkeypatch.setattr(objective, "_log_ratio", lambda samples, batch: (weighed.append(samples.z), log_ratio(samples, batch))[1])
    objective(pack_dense(x, observed))
    assert len(decoded) == len(weighed) == 1 and torch.equal(decoded[0], weighed[0])


# multigrate's mixture is the average of the Gaussians, MultiVI's averages their means and variances: neither is a mixture.
@pytest.mark.parametrize(("kind", "case"), MIXTURES)
def test_a_mixture_is_a_mixture_and_no_average(kind: type[Objective], case: Case) -> None:
    """Its density is the mean of the experts', by quadrature too, where the Normal of the same moments is far from it."""
    objective, (x, observed) = build(kind, case, shared=1), complete(1)
    for shift, modality in zip((-6.0, 0.0, 6.0), objective.modalities.values(), strict=True):
        modality.encoder[-1].bias.data[0] += shift
    batch, z = pack_dense(x, observed), torch.linspace(-12, 12, 4001).double()[:, None, None]
    q, experts = objective.infer(batch), [objective.infer(batch.only(name)) for name in NAMES]
    density, mean_of_experts = q.log_prob(z).exp(), torch.stack([e.log_prob(z).exp() for e in experts]).mean(0)
    torch.testing.assert_close(density, mean_of_experts, rtol=1e-9, atol=1e-12)
    moments = [torch.trapezoid(density[:, 0] * z[:, 0, 0] ** power, dx=24 / 4000) for power in range(3)]
    assert moments[0].item() == pytest.approx(1, abs=1e-6) and moments[1].item() == pytest.approx(q.mean.item(), abs=1e-6)
    assert math.sqrt(moments[2].item() - moments[1].item() ** 2) == pytest.approx(q.stddev.item(), abs=1e-5)
    averaged = DiagNormal(q.mean, q.stddev).log_prob(z).exp()
    assert torch.trapezoid((averaged - density).abs()[:, 0], dx=24 / 4000) > 0.5  # of at most 2
    draws = q.sample(Noise(0, torch.zeros(1, dtype=torch.long)), "draws", 2000)[:, 0, 0]
    near_one = (draws[:, None] - torch.stack([e.mean[0, 0] for e in experts])).abs().amin(1) < 4 * max(e.stddev[0, 0] for e in experts)
    assert near_one.all()


# MultiVI and multigrate take a row of zeros for one that is missing.
@every_objective
def test_a_row_of_zeros_is_present(kind: type[Objective], case: Case) -> None:
    objective, (x, observed) = build(kind, case), complete(1)
    x["b"] = torch.zeros(1, EVENT).double()
    zeros, missing = (pack_dense(x, {**observed, "b": torch.tensor([there])}) for there in (True, False))
    assert abs(objective(zeros).total - objective(missing).total) > 0.1
    alone = pack_dense(x, {n: torch.tensor([n == "b"]) for n in NAMES})
    assert objective(alone).terms["bound"].count == 1 and objective.infer(alone.only("b")).stddev.sum() > 0


# MMVAE+'s first code (objectives.py:67-70) builds detached posteriors for DReG, then reads the attached ones.
def test_dreg_stops_the_posteriors_parameters() -> None:
    """Where the posterior is exact, log w is constant in z: the path's gradient is 0 for each single row, and the score is what is left."""
    path = near(X, [1, 0], error=0.0, rows=50, gradient="dreg", samples=2)
    score = near(X, [1, 0], error=0.0, rows=50, gradient="iwae", samples=2)
    assert path.abs().max() < 1e-9 and score.abs().mean() > 0.1


# MultiVae's development version logs the metrics of training under the names of the evaluation.
def test_what_is_evaluated_is_the_held_out_rows() -> None:
    objective, (x, observed) = build(MMVAE, TABLE["MMVAE"]["looser"]), complete()
    own, far = (
        values(evaluate(objective, [pack_dense({n: scale * v for n, v in x.items()}, observed)], [held_out_loss])) for scale in (1, 100)
    )
    assert far["held_out/loss"] > 100 * own["held_out/loss"]
    assert own["held_out/loss"] == pytest.approx(objective.eval()(pack_dense(x, observed)).total.item() / 6, rel=1e-9)


def best_of(rank: int, world: int, folder: str) -> list[bool]:
    """Three evaluations, of which the second is the best: on rank 0's rows alone the third would be."""
    objective = build_tiny()
    stream = Rows("ab", np.repeat(np.array(PATTERNS["ab"], dtype=bool)[None], 8, 0), batch_size=8, rank=rank, world=world)
    trainer = Trainer(objective, stream, Training(steps=1, batch_size=8), folder=Path(folder))
    own = {0: (5.0, 4.0, 1.0), 1: (5.0, 2.0, 9.0)}[rank]
    losses = [trainer.reduce(torch.tensor([loss, 1.0])) for loss in own]
    return [trainer.save_best(-(total / count).item()) for total, count in losses]


# Each of MultiVae's ranks divides its own loss by the length of the whole set, and keeps what is best by that.
def test_ranks_agree_on_the_best(tmp_path: Path) -> None:
    assert run_ranks(best_of, 2, str(tmp_path)) == [[True, True, False]] * 2
