"""What a GPU may not change: losses, gradients and inference of every objective, and a training; and that no step waits for the device."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from meme_dist.metrics.rows import on_device
from meme_dist.train.engines.captured import Captured
from meme_dist.train.engines.replicated import Replicated
from meme_dist.train.trainer import Trainer, Training
from meme_dist.types import Batch, pack_dense
from tests.objectives.test_laws import BOTH, Case, D, all_patterns, build, every_case
from tests.test_captured import sparse
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
    return {"loss": loss.total.detach(), **terms, **{name: p.grad.clone() for name, p in objective.named_parameters()}}


@pytest.mark.parametrize("family", BOTH)
@every_case
def test_loss_terms_and_gradients_are_those_of_a_cpu(kind: Any, case: Case, family: type) -> None:
    """In float64, with the same noise, but for the last digits of its float32: it is keyed by the row, not by a device's generator."""
    if family not in case.families:
        return
    objective, batch = build(kind, case, family=family), pack_dense(*all_patterns())
    here = gradients(objective, batch)
    there = gradients(objective.to(CUDA), on_device(batch, CUDA))
    assert here.keys() == there.keys()
    for name, value in here.items():
        torch.testing.assert_close(there[name].cpu(), value, rtol=1e-5, atol=1e-5, msg=lambda said, name=name: f"{name}: {said}")


@every_case
def test_inference_is_that_of_a_cpu(kind: Any, case: Case) -> None:
    objective, batch = build(kind, case), pack_dense(*all_patterns(7))
    z = torch.randn(4, 7, D).double()
    with torch.no_grad():
        here = objective.infer(batch).log_prob(z)
        there = objective.to(CUDA).infer(on_device(batch, CUDA)).log_prob(z.to(CUDA))
    torch.testing.assert_close(there.cpu(), here, rtol=1e-5, atol=1e-5)


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


# ---- passes as one CUDA graph -----------------------------------------------------------------------------------------------------------


@every_case
def test_a_replay_is_a_pass_over_the_batch_that_was_copied_in(kind: Any, case: Case) -> None:
    """Other rows, patterns, visits (so other noise) and weights than those of the recording; every objective."""
    objective = build(kind, case).to(CUDA)
    engine, recordings = Captured(objective, Training(batch_size=32), Accelerator()), 0
    for seed, share in enumerate((0.2, 0.5, 0.3, 0.6, 0.4)):
        batch, before = on_device(sparse(32, share, seed), CUDA), engine._replay
        engine.begin()
        loss = engine.forward(batch, last=True)
        recordings += engine._replay is not before
        found = {"loss": loss.total, **{f"term {name}": sums.total for name, sums in loss.terms.items()}}
        found |= {name: 32 * p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}
        objective.zero_grad(set_to_none=False)
        plain = objective(batch)
        expected = torch.autograd.grad(plain.total, list(objective.parameters()))
        torch.testing.assert_close(found["loss"], plain.total.detach(), rtol=1e-9, atol=1e-9)
        for name, sums in plain.terms.items():
            torch.testing.assert_close(found[f"term {name}"], sums.total.to(found["loss"].dtype), rtol=1e-6, atol=1e-6)
        for (name, _), gradient in zip(objective.named_parameters(), expected, strict=True):
            torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-9)
        with torch.no_grad():
            for p in objective.parameters():
                p += 0.01 * torch.randn_like(p)
        del plain, expected  # a recording refuses a graph that was made on another stream and still lives
    assert 1 <= recordings <= 4


@pytest.mark.parametrize("settings", [{}, {"accumulate": 2}, {"precision": "bf16"}], ids=str)
def test_a_recorded_training_is_one_kernel_by_kernel(settings: dict[str, Any]) -> None:
    losses = []
    for graph in (True, False):
        training = Training(**({"steps": 20, "batch_size": 16, "learning_rate": 1e-2, "clip": 30.0, "graph": graph} | settings))
        rows = Rows("abc", mixed("abc", 40), batch_size=16, accumulate=training.accumulate)
        trainer = Trainer(build_meme("abc"), rows, training)
        losses.append([report.loss for report in trainer])
        assert type(trainer.engine) is (Captured if graph else Replicated)
        assert not graph or trainer.engine._replay is not None  # type: ignore[attr-defined]
    assert losses[0] == pytest.approx(losses[1], rel=5e-2 if settings.get("precision") else 1e-3)


class Looking(nn.Module):
    """Looks at a number that it was given."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (2.0 if x.sum().item() > 0 else 2.0)


def test_a_model_that_waits_for_the_device_is_trained_kernel_by_kernel() -> None:
    losses = []
    for graph in (True, False):
        objective = build_meme("ab")
        objective.modality("a").encoder.append(Looking())
        trainer = Trainer(objective, Rows("ab", mixed("ab"), batch_size=8), Training(steps=5, batch_size=8, graph=graph))
        if graph:
            with pytest.warns(UserWarning, match=r"wait for the GPU \(.*test_gpu\.py:\d+\)"):
                losses.append([report.loss for report in trainer])
        else:
            losses.append([report.loss for report in trainer])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("graph", [True, False])
def test_resumed_is_uninterrupted(graph: bool, tmp_path: Path) -> None:
    """Bit by bit, with dropout: the device's generator is a part of a checkpoint, and so is the room that batches had."""
    folder = shards(tmp_path / "shards")
    whole = _trainer(folder, None, graph)
    list(whole)
    first = _trainer(folder, tmp_path / "run", graph)
    for report in first:
        if report.step == 7:
            break
    first.save()
    second = _trainer(folder, tmp_path / "run", graph)
    assert second.resume() and second.step == 7
    list(second)
    here, there = whole.objective.state_dict(), second.objective.state_dict()
    assert all(value.is_cuda for value in here.values())
    assert [name for name in here if not torch.equal(here[name], there[name])] == []


def _trainer(folder: Path, run: Path | None, graph: bool) -> Trainer:
    training = Training(steps=14, batch_size=16, log_every=1, graph=graph)
    return Trainer(build_meme(SHARDED, dropout=0.2), stream(folder, batch_size=16), training, folder=run)
