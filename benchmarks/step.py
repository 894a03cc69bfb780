"""One training step of each estimator beside a plain transcription of the authors' released one, on the same networks and rows; and where
the time of a step goes that the real trainer makes (`breakdown.py`).

The transcription does what the released code does (Joy et al. 2022, their `run_match`): each encoder runs three times a step, the outer
sample is decoded again inside the marginal, torch.distributions evaluates every density, and all 1664 decoder rows carry gradients.
"""

import math
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor
from torch import distributions as td

from benchmarks.ranks import rank_device
from benchmarks.record import interleaved, keep
from meme_dist.modalities.published import mnist_released, svhn_released
from meme_dist.modality import Modality
from meme_dist.objectives.meme import MEME
from meme_dist.train.engines.captured import Captured
from meme_dist.train.training import Training
from meme_dist.types import Batch, pack

FRESH = 10  # samples of the marginal beside the outer one, as released
CROSS_WEIGHT = 10.0


def main(
    *, batch_size: int = 128, repeats: int = 7, threads: int = 1, ranks: tuple[int, ...] = (1, 2), forms: bool = True, save: bool = True
) -> None:
    """Time, decoder rows and memory saved for the backward pass, of one step; then a breakdown of the trainer's steps.

    Args:
        batch_size: Pairs a step.
        repeats: How often each form is timed, in turn.
        threads: CPU threads (1: CPU time is then the cost itself).
        ranks: Numbers of processes for the breakdown (none: leave it out).
        forms: Compare the estimators with the transcription.
        save: Append the rows to benchmarks/results/step.jsonl.
    """
    torch.set_num_threads(threads)
    device = rank_device(1)
    if forms:
        compared = _forms(batch_size, repeats, device)
        if save:
            print(f"kept in {keep('step', compared, device=device, threads=threads)}", flush=True)
    for row in _broken_down(batch_size, ranks) if ranks else []:  # one rank is this process, several have a thread each
        if save:
            keep("step", [row], device=rank_device(row["world"]), threads=threads if row["world"] == 1 else 1)


def _broken_down(batch_size: int, ranks: tuple[int, ...]) -> list[dict]:
    from benchmarks import breakdown  # it needs what the trainer needs, the comparison above torch alone

    layouts = [(world, graph) for world in ranks for graph in (True, False) if graph or rank_device(world).type == "cuda"]
    rows = [row for world, graph in layouts for row in breakdown.breakdown(world=world, batch_size=batch_size, graph=graph)]
    breakdown.show(rows)
    return rows


def _forms(batch_size: int, repeats: int, device: torch.device) -> list[dict]:
    steps = {"transcription": _transcription(batch_size, device)}
    steps |= {name: _ours(name, batch_size, device) for name in ("released", "rao_blackwell", "resampled")}
    counts = {name: counted(step, modalities) for name, (step, modalities) in steps.items()}
    if device.type == "cuda":  # what a replay runs was counted above
        steps |= {f"{name}, recorded": _ours(name, batch_size, device, recorded=True) for name in counts if name != "transcription"}
        counts |= {f"{name}, recorded": counted for name, counted in counts.items()}
    times = interleaved({name: step for name, (step, _) in steps.items()}, repeats)
    base = times["transcription"]["cpu_ms" if device.type == "cpu" else "ms"]
    rows = []
    for name in steps:
        own = times[name]["cpu_ms" if device.type == "cpu" else "ms"]
        rows.append({"form": name, "batch_size": batch_size, **times[name], "ratio": round(own / base, 3), **counts[name]})
    _show(rows)
    return rows


def networks(device: torch.device) -> dict[str, Modality]:
    """The released networks of both modalities, the same every time."""
    torch.manual_seed(0)
    return {"mnist": mnist_released().to(device), "svhn": svhn_released().to(device)}


def _ours(estimator: str, size: int, device: torch.device, *, recorded: bool = False) -> tuple[Callable[[], None], dict[str, Modality]]:
    modalities = networks(device)
    objective = MEME(modalities, pseudo_inputs=1, samples=FRESH + 1, estimator=estimator, cross_weight=CROSS_WEIGHT).to(device)
    optimizer = torch.optim.Adam(objective.parameters(), 5e-4)
    batch = batch_of(size, device)
    if recorded:
        engine = Captured(objective, Training(batch_size=size, learning_rate=5e-4), Accelerator())

        def replayed() -> None:
            engine.begin()
            engine.forward(batch, last=True)
            engine.optimizer.step()

        return replayed, modalities

    def step() -> None:
        optimizer.zero_grad()
        (objective(batch).total / size).backward()
        optimizer.step()

    return step, modalities


def batch_of(size: int, device: torch.device) -> Batch:
    """Random images of both modalities, none missing."""
    generator = torch.Generator().manual_seed(1)
    data = {"mnist": torch.rand(size, 1, 28, 28, generator=generator), "svhn": torch.rand(size, 3, 32, 32, generator=generator)}
    batch = pack(data, torch.ones(size, 2, dtype=torch.bool).numpy(), single=False)
    moved = {name: type(p)(*(x.to(device) for x in p)) for name, p in batch.modalities.items()}
    return batch._replace(modalities=moved, observed=batch.observed.to(device), alone=batch.alone.to(device), draw=batch.draw.to(device))


def _transcription(size: int, device: torch.device) -> tuple[Callable[[], None], dict[str, Modality]]:
    modalities = networks(device)
    optimizer = torch.optim.Adam([p for m in modalities.values() for p in m.parameters()], 5e-4)
    x = {name: packed.data for name, packed in batch_of(size, device).modalities.items()}

    def step() -> None:
        optimizer.zero_grad()
        loss = _direction(modalities, x, "mnist", "svhn") + _direction(modalities, x, "svhn", "mnist")
        loss.backward()
        optimizer.step()

    return step, modalities


def _direction(modalities: dict[str, Modality], x: dict[str, Tensor], source: str, target: str) -> Tensor:
    lead, other = modalities[source], modalities[target]
    posterior = td.Normal(*lead.encode(x[source]))
    prior = td.Normal(*other.encode(x[target]))
    z = posterior.rsample()
    log_own = _log_likelihood(lead, x[source], z)
    log_target = _log_likelihood(other, x[target], z)
    fresh = td.Normal(*lead.encode(x[source])).rsample((FRESH,))
    samples = torch.cat([fresh, z[None]])
    decoded = other.decoder(samples.flatten(0, 1)).unflatten(0, samples.shape[:2])
    log_samples = td.Laplace(decoded, torch.ones_like(decoded)).log_prob(x[target]).flatten(2).sum(-1)
    marginal = torch.logsumexp(log_samples, 0) - math.log(FRESH + 1)
    weight = torch.exp(log_target - marginal).detach()
    kl = td.kl_divergence(posterior, prior).sum(-1)
    return -(weight * (log_own - log_target - kl) + CROSS_WEIGHT * marginal).mean()


def _log_likelihood(modality: Modality, x: Tensor, z: Tensor) -> Tensor:
    mean = modality.decoder(z)
    return td.Laplace(mean, torch.ones_like(mean)).log_prob(x).flatten(1).sum(-1)


def counted(step: Callable[[], None], modalities: dict[str, Modality]) -> dict[str, float]:
    """Rows that the networks see in a step, and the distinct bytes that autograd keeps for the backward pass (parameters apart)."""
    rows = {"encoder_rows": 0, "decoder_rows": 0}
    parameters = {p.untyped_storage().data_ptr() for m in modalities.values() for p in m.parameters()}
    saved: dict[int, int] = {}

    def hook(kind: str):
        return lambda _module, _inputs, out: rows.__setitem__(kind, rows[kind] + len(out))

    def pack_hook(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    handles = [m.encoder.register_forward_hook(hook("encoder_rows")) for m in modalities.values()]
    handles += [m.decoder.register_forward_hook(hook("decoder_rows")) for m in modalities.values()]
    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
        step()
    for handle in handles:
        handle.remove()
    return {**rows, "saved_mb": round(sum(saved.values()) / 1e6, 1)}


def _show(rows: list[dict]) -> None:
    print(f"{'form':<24}{'wall ms (p20 .. p80)':>26}{'CPU ms':>10}{'ratio':>8}{'encoder rows':>14}{'decoder rows':>14}{'saved MB':>10}")
    for r in rows:
        wall = f"{r['ms']:.3g} ({r['ms_p20']:.3g} .. {r['ms_p80']:.3g})"
        print(
            f"{r['form']:<24}{wall:>26}{r['cpu_ms']:>10.3g}{r['ratio']:>8.2f}{r['encoder_rows']:>14}{r['decoder_rows']:>14}{r['saved_mb']:>10.1f}"
        )
