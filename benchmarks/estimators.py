"""Noise and cost of the three gradient estimators of MEME, at high and at low effective sample size.

They share one expected gradient; what differs is the spread around it and what a step costs. Measured on the upper and lower halves of
scikit-learn's real 8x8 digits: before training the weights are nearly even (high effective sample size), after some hundred steps they
are degenerate, which is where training spends its time. The spread is per row: sqrt(E |g - E g|^2) for one row, by network.
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from benchmarks.record import CPU, interleaved, keep
from meme_dist.likelihoods import Laplace
from meme_dist.modalities.vector import mlp
from meme_dist.objectives.meme import MEME
from meme_dist.types import Batch, pack_dense

ESTIMATORS = ("released", "rao_blackwell", "resampled")
SCALE = 0.05  # of the Laplace likelihood: sharp enough that weights degenerate as they do on full-size images


def main(*, rows: int = 64, draws: int = 200, steps: int = 400, samples: int = 11, threads: int = 1, save: bool = True) -> None:
    """Gradient spread by network and CPU time a step of each estimator.

    Args:
        rows: Rows of the batch whose gradient is drawn again and again.
        draws: How often.
        steps: Training steps between the two measurements.
        samples: Posterior samples (K).
        threads: CPU threads.
        save: Append the rows to benchmarks/results/estimators.jsonl.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    halves = torch.from_numpy(load_digits().images).float().div(16).flatten(1).split(32, 1)
    modalities = {name: mlp((32,), latent_dim=8, hidden=(128, 128), likelihood=Laplace(SCALE), bounded=True) for name in ("upper", "lower")}
    objective = MEME(modalities, pseudo_inputs=1, samples=samples)
    results = []
    for stage in (0, steps):
        _train(objective, halves, stage)
        results += _measure(objective, halves, rows, draws, stage)
    _show(results)
    if save:
        print(f"\nkept in {keep('estimators', results, device=CPU, threads=threads)}")


def _batch(halves: tuple[Tensor, ...], index: Tensor, draw: int) -> Batch:
    x = dict(zip(("upper", "lower"), (h[index] for h in halves), strict=True))
    present = torch.ones(len(index), dtype=torch.bool)
    return pack_dense(x, dict.fromkeys(x, present), draw=draw * len(index) + torch.arange(len(index)).numpy(), single=False)


def _train(objective: MEME, halves: tuple[Tensor, ...], steps: int) -> None:
    optimizer = torch.optim.Adam(objective.parameters(), 1e-3)
    objective.estimator = "resampled"
    for step in range(steps):
        optimizer.zero_grad()
        objective(_batch(halves, torch.randint(len(halves[0]), (128,)), step)).total.div(128).backward()
        optimizer.step()


def _measure(objective: MEME, halves: tuple[Tensor, ...], rows: int, draws: int, stage: int) -> list[dict]:
    index = torch.arange(rows)
    times = interleaved({e: lambda e=e: _gradient(objective, _batch(halves, index, 0), e) for e in ESTIMATORS}, 15)
    results = []
    for estimator in ESTIMATORS:
        gradients = [_gradient(objective, _batch(halves, index, 1 + d), estimator) for d in range(draws)]
        spread = {}
        for group in gradients[0]:
            g = torch.stack([x[group] for x in gradients])
            spread[group] = round(((g - g.mean(0)).square().sum(1).mean() / rows).sqrt().item(), 2)
        ess = objective(_batch(halves, index, 0)).terms["ess/upper"]
        results.append(
            {"estimator": estimator, "step": stage, "ess": round((ess.total / ess.count).item(), 2), **spread, **times[estimator]}
        )
    return results


def _gradient(objective: MEME, batch: Batch, estimator: str) -> dict[str, Tensor]:
    """Gradient of the summed loss by network; a row's spread is this sum's over the root of the number of rows."""
    objective.estimator = estimator
    objective.zero_grad()
    objective(batch).total.backward()
    groups: dict[str, list[Tensor]] = {}
    for name, parameter in objective.modalities.named_parameters():
        modality, network = name.split(".")[:2]
        groups.setdefault(f"{modality} {network}", []).append(parameter.grad.flatten().clone())
    return {name: torch.cat(parts) for name, parts in groups.items()}


def _show(results: list[dict]) -> None:
    groups = [key for key in results[0] if " " in key]
    print(f"{'estimator':<15}{'step':>6}{'ESS':>7}" + "".join(f"{g:>16}" for g in groups) + f"{'CPU ms':>9}")
    for r in results:
        spread = "".join(f"{r[g]:>16.2f}" for g in groups)
        print(f"{r['estimator']:<15}{r['step']:>6}{r['ess']:>7.2f}{spread}{r['cpu_ms']:>9.1f}")
