"""What a GPU may not change: losses, gradients and inference of every objective, and a training; and that no step waits for the device."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from meme_dist.metrics.rows import on_device
from meme_dist.train.trainer import Trainer, Training
from meme_dist.types import Batch, pack_dense
from tests.objectives.test_laws import BOTH, Case, D, all_patterns, build, every_case
from tests.trainings import SHARDED, Rows, mixed, shards, stream
from tests.trainings import build as build_meme

pytestmark = [pytest.mark.gpu, pytest.mark.repeats]
CUDA = torch.device("cuda")


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def gradients(objective: Any, batch: Batch) -> dict[str, Tensor]:
    objective.zero_grad()
    loss = objective(batch)
    loss.total.backward()
    terms = {f"term {name}": sums.total for name, sums in loss.terms.items()}
    return {"loss": loss.total.detach(), **terms, **{name: p.grad for name, p in objective.named_parameters()}}


@pytest.mark.parametrize("family", BOTH)
@every_case
def test_loss_terms_and_gradients_are_those_of_a_cpu(kind: Any, case: Case, family: type) -> None:
    """In float64, with the same noise: it is keyed by the row, not by a device's generator."""
    if family not in case.families:
        return
    objective, batch = build(kind, case, family=family), pack_dense(*all_patterns())
    here = gradients(objective, batch)
    there = gradients(objective.to(CUDA), on_device(batch, CUDA))
    assert here.keys() == there.keys()
    for name, value in here.items():
        torch.testing.assert_close(there[name].cpu(), value, rtol=1e-8, atol=1e-8, msg=lambda said, name=name: f"{name}: {said}")


@every_case
def test_inference_is_that_of_a_cpu(kind: Any, case: Case) -> None:
    objective, batch = build(kind, case), pack_dense(*all_patterns(7))
    z = torch.randn(4, 7, D).double()
    with torch.no_grad():
        here = objective.infer(batch).log_prob(z)
        there = objective.to(CUDA).infer(on_device(batch, CUDA)).log_prob(z.to(CUDA))
    torch.testing.assert_close(there.cpu(), here, rtol=1e-8, atol=1e-8)


@every_case
def test_a_step_never_waits_for_the_device(kind: Any, case: Case) -> None:
    """Rows are counted on the host, by the loader: a step of a thousand launches is enqueued without a look at any result."""
    objective, batch = build(kind, case).to(CUDA), on_device(pack_dense(*all_patterns()), CUDA)
    gradients(objective, batch)  # kernels are compiled, constants copied
    torch.cuda.synchronize()
    with no_waiting():
        gradients(objective, batch)


def test_a_training_follows_that_of_a_cpu() -> None:
    """Steps of Adam in float32, beside a plain loop on the CPU."""
    training = Training(steps=24, batch_size=8, learning_rate=1e-2, clip=30.0)
    reports = list(Trainer(build_meme(), Rows("ab", mixed("ab"), batch_size=8), training))
    plain, source = build_meme(), iter(Rows("ab", mixed("ab"), batch_size=8))
    optimizer = torch.optim.Adam(plain.parameters(), 1e-2, betas=training.betas)
    losses = []
    for _ in range(training.steps):
        optimizer.zero_grad()
        loss = plain(next(source)[0]).total / 8
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 30.0)
        optimizer.step()
        losses.append(loss.item())
    assert [report.loss for report in reports] == pytest.approx(losses, rel=1e-3)
    moved = max(float((p - q).abs().max().detach()) for p, q in zip(plain.parameters(), build_meme().parameters(), strict=True))
    assert moved > 0.1


def test_resumed_is_uninterrupted(tmp_path: Path) -> None:
    """Bit by bit, with dropout: the device's generator is a part of a checkpoint."""
    folder = shards(tmp_path / "shards")
    whole = _trainer(folder, None)
    list(whole)
    first = _trainer(folder, tmp_path / "run")
    for report in first:
        if report.step == 7:
            break
    first.save()
    second = _trainer(folder, tmp_path / "run")
    assert second.resume() and second.step == 7
    list(second)
    here, there = whole.objective.state_dict(), second.objective.state_dict()
    assert all(value.is_cuda for value in here.values())
    assert [name for name in here if not torch.equal(here[name], there[name])] == []


def _trainer(folder: Path, run: Path | None) -> Trainer:
    training = Training(steps=14, batch_size=16, log_every=1)
    return Trainer(build_meme(SHARDED, dropout=0.2), stream(folder, batch_size=16), training, folder=run)
