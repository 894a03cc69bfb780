"""Batches in memory that stays in place, and passes that are recorded once: nothing of it changes what a training computes.

What a CUDA graph itself does is tested on a GPU (test_gpu.py); here a recording runs its passes again.
"""

import json
import math
import random
import warnings
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from meme_dist.train.engines.captured import Captured, Pass, _on_the_host
from meme_dist.train.engines.replicated import Replicated
from meme_dist.train.engines.room import Room
from meme_dist.train.training import Training
from meme_dist.types import Batch, pack, pack_dense
from tests.objectives.test_laws import NAMES, Case, all_patterns, every_case, gradient
from tests.objectives.test_laws import build as build_objective
from tests.trainings import Rows, build, mixed

pytestmark = pytest.mark.repeats


def sparse(rows: int, share: float, seed: int = 0) -> Batch:
    """Rows of three modalities of three numbers, a share of the entries missing."""
    generator = np.random.default_rng(seed)
    mask = generator.random((rows, 3)) >= share
    mask[~mask.any(1), seed % 3] = True
    x = {n: torch.from_numpy(generator.normal(size=(int(mask[:, i].sum()), 3))) for i, n in enumerate(NAMES)}
    return pack(x, mask, draw=1000 * seed + np.arange(rows), seed=3)


def places(batch: Batch) -> list[int]:
    packed = [x for p in batch.modalities.values() for x in p]
    return [x.data_ptr() for x in (*packed, batch.observed, batch.alone, batch.draw)]


# ---- room -------------------------------------------------------------------------------------------------------------------------------


@every_case
def test_room_for_more_rows_changes_neither_loss_nor_gradient_of_any_objective(kind: Any, case: Case) -> None:
    objective, batch = build_objective(kind, case), sparse(32, 0.5)
    room = Room()
    room.furnish(pack_dense(*all_patterns(32), seed=3))
    room.furnish(sparse(32, 0.1, seed=1))
    assert not room.furnish(batch) and room.batch is not None
    sizes = [(len(there.row), len(here.row)) for there, here in zip(room.batch.modalities.values(), batch.modalities.values(), strict=True)]
    assert all(more > own for more, own in sizes)
    for a, b in zip(gradient(objective, room.batch), gradient(objective, batch), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    there, here = objective(room.batch).terms, objective(batch).terms
    assert there.keys() == here.keys()
    for name in here:
        torch.testing.assert_close(there[name], here[name], rtol=1e-11, atol=1e-11)


def test_memory_stays_in_place_until_a_batch_needs_more_and_soon_nothing_grows() -> None:
    room = Room()
    assert room.furnish(sparse(64, 0.5))
    where, grown = places(room.batch), 0  # type: ignore[arg-type]
    for seed in range(1, 60):
        grown += room.furnish(sparse(64, 0.5, seed))
        assert room.batch is not None and (grown or places(room.batch) == where)
    assert 0 < grown <= 10
    assert all(rows <= 64 and pairs <= 128 for rows, pairs in room.sizes.values())
    assert room.furnish(sparse(64, 0.0)) and not room.furnish(sparse(64, 0.5))
    assert {name: size for name, size in room.sizes.items() if name} == dict.fromkeys(NAMES, (64, 128))


@pytest.mark.parametrize("other", [{"rows": 32}, {"seed": 4}, {"single": False}, {"dtype": torch.float32}])
def test_a_batch_of_another_kind_gets_memory_of_its_own(other: dict[str, Any]) -> None:
    room, batch = Room(), sparse(48, 0.0)
    room.furnish(batch)
    if "rows" in other:
        batch = sparse(32, 0.0)
    elif "dtype" in other:
        batch = batch._replace(modalities={n: p._replace(data=p.data.float()) for n, p in batch.modalities.items()})
    else:
        batch = batch._replace(**other)
    assert room.furnish(batch) and room.batch is not None
    assert room.batch.observed.shape == batch.observed.shape and (room.batch.seed, room.batch.single) == (batch.seed, batch.single)
    assert all(torch.equal(room.batch.modalities[n].data[: len(p.data)], p.data) for n, p in batch.modalities.items())


def test_fewer_rows_a_micro_batch_take_less_room() -> None:
    """Who resumes with more micro batches is short of memory."""
    room = Room()
    room.furnish(sparse(64, 0.3))
    room.remember(room.sizes)
    room.furnish(sparse(16, 0.3))
    assert all(rows <= 16 and pairs <= 32 for rows, pairs in room.sizes.values())


def test_what_is_remembered_is_the_room_that_a_resumed_run_takes() -> None:
    room = Room()
    for seed in range(5):
        room.furnish(sparse(64, 0.4, seed))
    again = Room()
    again.remember(json.loads(json.dumps(room.sizes)))
    assert again.furnish(sparse(64, 0.4, 2)) and again.sizes == room.sizes


# ---- passes -----------------------------------------------------------------------------------------------------------------------------


class Repeated(Captured):
    """Records nothing: a replay is another pass over what is in the room then, and its values are where those of the last one were."""

    recordings = 0

    drew = False

    def warm(self, run: Pass) -> bool:
        run()
        return self.drew

    def record(self, run: Pass) -> Pass:
        self.recordings += 1
        place: list[Tensor] = []

        def replay() -> Tensor:
            values = run()
            place[:] = place or [values.clone()]
            return place[0].copy_(values)

        return replay


def engine_of(kind: type[Replicated], objective: nn.Module | None = None, **settings: Any) -> Any:
    training = Training(**({"steps": 12, "batch_size": 24, "clip": 3.0, "ema": None} | settings))
    return kind(objective or build("abc"), training, Accelerator(cpu=True))


def trained(engine: Any, accumulate: int = 1, steps: int = 12) -> tuple[list[float], list[dict[str, float]]]:
    rows = iter(Rows("abc", _mask(), batch_size=24, accumulate=accumulate))
    losses, terms = [], []
    for _ in range(steps):
        batches = next(rows)
        engine.begin()
        found = []
        for position, batch in enumerate(batches, 1):
            loss = engine.forward(batch, last=position == len(batches))
            engine.backward(loss.total / 24, last=position == len(batches))
            found.append(loss)
        assert engine.idle() == []
        norm = float(engine.squared_norm()) ** 0.5
        engine.update(norm, 3.0)
        losses.append(float(sum(loss.total.detach() for loss in found)))
        terms.append({name: float(sum(loss.terms[name].total for loss in found)) for name in found[0].terms})
    return losses, terms


def _mask() -> np.ndarray:
    rows = np.random.default_rng(1).random((60, 3)) < 0.6
    rows[:, 0] |= ~rows.any(1)
    return rows


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_training_by_replays_is_that_of_ordinary_passes(accumulate: int) -> None:
    """Also where micro batches add up, whose losses must not be those of the last one."""
    plain, replayed = engine_of(Replicated), engine_of(Repeated)
    (losses, terms), (again, more) = trained(plain, accumulate), trained(replayed, accumulate)
    assert again == pytest.approx(losses, rel=1e-4) and losses[-1] != losses[0]
    assert all(b == pytest.approx(a, rel=1e-3, abs=1e-3) for a, b in zip(terms, more, strict=True))
    for p, q in zip(plain.objective.parameters(), replayed.objective.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-3, atol=1e-4)
    assert 1 <= replayed.recordings < 12


def test_a_gradient_is_that_of_its_own_step_and_stays_in_place() -> None:
    engine, plain = engine_of(Repeated), engine_of(Replicated)
    rows, where = iter(Rows("abc", mixed("abc"), batch_size=24)), []
    for _ in range(3):
        batch = next(rows)[0]
        for one in (engine, plain):
            one.begin()
            one.backward(one.forward(batch, last=True).total / 24, last=True)
        where.append([p.grad.data_ptr() for p in engine.objective.parameters()])
        for p, q in zip(engine.objective.parameters(), plain.objective.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)
    assert where[0] == where[1] == where[2]


def test_passes_before_the_recording_leave_nothing_behind() -> None:
    """Neither running statistics, nor random numbers, nor a gradient."""
    objective = build("abc")
    for modality in objective.modalities.values():
        modality.encoder.append(nn.BatchNorm1d(4))
        modality.encoder.append(nn.Dropout(0.5))
    engine, batch = engine_of(Repeated, objective), next(iter(Rows("abc", np.ones((24, 3), dtype=bool), batch_size=24)))[0]
    engine._room.furnish(batch)
    before, random = {n: x.clone() for n, x in objective.named_buffers()}, torch.get_rng_state()
    engine._warm_up(engine._room.batch)
    assert torch.equal(torch.get_rng_state(), random) and len(before) >= 9
    assert all(torch.equal(x, before[n]) for n, x in objective.named_buffers())
    assert all(p.grad is None for p in objective.parameters())
    engine.forward(batch, last=True)
    assert not torch.equal(torch.get_rng_state(), random)  # the recorded pass draws


class Waiting(Repeated):
    """A model that looks at a result, as PyTorch says it of a GPU."""

    def warm(self, run: Pass) -> bool:
        raise RuntimeError("called a synchronizing CUDA operation")


class Drawing(Repeated):
    """A model that draws on the host, which `warm` tells."""

    drew = True


class Large(Repeated):
    """A recording for which there is no memory."""

    def record(self, run: Pass) -> Pass:
        raise torch.OutOfMemoryError("CUDA out of memory")


REASONS = [
    (Waiting, r"wait for the GPU \(.*test_captured\.py:\d+\)"),
    (Drawing, "draws random numbers on the host"),
    (Large, "more memory than there is"),
]


@pytest.mark.parametrize(("kind", "why"), REASONS, ids=lambda x: getattr(x, "__name__", None))
def test_a_model_that_cannot_be_recorded_is_trained_all_the_same_and_the_reason_is_said_once(kind: type[Captured], why: str) -> None:
    engine, plain = engine_of(kind), engine_of(Replicated)
    with pytest.warns(UserWarning, match=why + ".*--no-graph") as told:
        losses, _ = trained(engine)
    assert len(told) == 1 and engine._room.batch is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert losses == trained(plain)[0]


def test_another_error_of_the_model_is_its_own() -> None:
    class Broken(Repeated):
        def warm(self, run: Pass) -> bool:
            raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match") as error:
        trained(engine_of(Broken))
    assert "--no-graph" in error.value.__notes__[0]


def test_draws_on_the_host_are_noticed() -> None:
    for draw in (lambda: torch.rand(1), random.random, np.random.rand):
        before = _on_the_host()
        assert all(map(torch.equal, before, _on_the_host()))
        draw()
        assert not all(map(torch.equal, before, _on_the_host()))


@pytest.mark.parametrize("position", range(4))
def test_a_broken_row_breaks_its_own_step_alone(position: int) -> None:
    """Its NaN must not stay in the padding of later batches: 0 times NaN is NaN."""
    rows, norms = iter(Rows("abc", _mask(), batch_size=24)), []
    engine = engine_of(Repeated)
    for step in range(6):
        batch = next(rows)[0]
        if step == 2:
            for packed in batch.modalities.values():
                packed.data[-1 - position] = torch.nan
        engine.begin()
        engine.forward(batch, last=True)
        norms.append(float(engine.squared_norm()))
    assert [step for step, norm in enumerate(norms) if not math.isfinite(norm)] == [2]


def test_a_model_that_normalises_over_rows_is_recorded_for_complete_rows_alone() -> None:
    def normalising() -> nn.Module:
        objective = build("abc")
        for modality in objective.modalities.values():
            modality.encoder.append(nn.BatchNorm1d(4))
        return objective

    complete, missing = np.ones((60, 3), dtype=bool), _mask()
    for mask, recorded in ((complete, True), (missing, False)):
        engine, plain = engine_of(Repeated, normalising()), engine_of(Replicated, normalising())
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for rows, one in ((Rows("abc", mask, batch_size=24), engine), (Rows("abc", mask, batch_size=24), plain)):
                batch = next(iter(rows))[0]
                one.begin()
                one.backward(one.forward(batch, last=True).total / 24, last=True)
        assert bool(engine.recordings) == recorded and len(told) == (not recorded)
        assert recorded or "normalises over rows" in str(told[0].message)
        for (name, x), y in zip(plain.objective.named_buffers(), engine.objective.buffers(), strict=True):
            torch.testing.assert_close(y, x, msg=name)


def test_a_parameter_frozen_or_a_mode_changed_on_the_way_is_recorded_anew() -> None:
    engine, rows = engine_of(Repeated), iter(Rows("abc", mixed("abc"), batch_size=24))

    def step() -> None:
        engine.begin()
        engine.forward(next(rows)[0], last=True)
        engine.update(1.0, None)

    step(), step()
    assert engine.recordings == 1
    frozen = next(engine.objective.parameters())
    frozen.requires_grad_(False)
    before = frozen.clone()
    step(), step()
    assert engine.recordings == 2 and torch.equal(frozen, before) and frozen.grad is None
    frozen.requires_grad_(True)
    step()
    assert engine.recordings == 3 and not torch.equal(frozen, before)
    engine.objective.eval()
    step()
    assert engine.recordings == 4


def test_one_process_under_a_launcher_is_not_wrapped() -> None:
    """DistributedDataParallel has nothing to exchange there, and its hooks wait for the device."""
    accelerator = Accelerator(cpu=True)
    wrapping = mock.patch.object(accelerator, "prepare", side_effect=lambda module: nn.Sequential(module))
    with wrapping:
        engine = Replicated(build("abc"), Training(batch_size=24), accelerator)
    assert engine.wrapped is engine.objective


def test_a_parameter_that_takes_no_part_is_told() -> None:
    objective = build("abc")
    objective.register_parameter("spare", nn.Parameter(torch.ones(2)))
    engine = engine_of(Repeated, objective)
    engine.begin()
    engine.forward(next(iter(Rows("abc", mixed("abc"), batch_size=24)))[0], last=True)
    assert engine.idle() == ["spare"]


def test_frozen_parameters_stay() -> None:
    objective = build("abc")
    frozen = next(objective.parameters())
    frozen.requires_grad_(False)
    before: Tensor = frozen.clone()
    trained(engine_of(Repeated, objective), steps=2)
    assert torch.equal(frozen, before) and frozen.grad is None
