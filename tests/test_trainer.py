"""What a training computes: plain Adam's update, schedules and averages in closed form; and an interrupted run is an uninterrupted one."""

import json
import math
import time
from collections import deque
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from meme_dist.modalities.vector import mlp
from meme_dist.objectives.mopoe import MoPoE
from meme_dist.train.checkpoint import read
from meme_dist.train.ema import decay_at
from meme_dist.train.trainer import Report, Trainer, Training
from meme_dist.train.training import learning_rate, trajectory
from tests.ranks import forkserver
from tests.trainings import SHARDED, SIZES, Rows, build, mixed, shards, stream, weights

pytestmark = pytest.mark.repeats

SETTINGS: dict[str, Any] = {"steps": 20, "batch_size": 16, "log_every": 1, "ema": 0.9, "clip": 30.0, "schedule": "cosine", "warmup": 3}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shards(tmp_path_factory.mktemp("shards") / "linear_gaussian")


def trainer_on(sharded: Path, folder: Path | None = None, **settings: Any) -> Trainer:
    """A training of a MEME with dropout (so that torch's random state matters) on real shards with missing entries."""
    training = Training(**(SETTINGS | settings))
    layout = {"accumulate": training.accumulate, "workers": training.workers or 0}
    rows = stream(sharded, batch_size=training.batch_size, seed=training.seed, **layout)
    return Trainer(build(SHARDED, seed=training.seed, dropout=0.2), rows, training, folder=folder)


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Everything that a training is made of: weights, average, optimiser."""
    assert trainer._average is not None
    parts = {"": trainer.objective.state_dict(), "ema/": trainer._average.parts}
    parts |= {f"optimizer/{name}/": trainer.engine.moments(name) for name in trainer.engine.names()}
    return {prefix + name: tensor.clone() for prefix, part in parts.items() for name, tensor in part.items()}


def assert_equal_bit_by_bit(came: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert came.keys() == expected.keys() and len(came) > 50
    assert [name for name in came if not torch.equal(came[name], expected[name])] == []


def logged(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "rows_per_second"} for line in lines]


# ---- the update ---------------------------------------------------------------------------------------------------------------------


def test_updates_are_those_of_plain_adam_with_torchs_clipping_bit_by_bit() -> None:
    training = Training(steps=6, batch_size=8, clip=4.0, learning_rate=1e-2, weight_decay=0.1, betas=(0.8, 0.95), warmup=4)
    rows = Rows("ab", mixed("ab"), batch_size=8)
    trained, plain = build(), build()
    reports = list(Trainer(trained, rows, training))

    optimizer = torch.optim.AdamW(plain.parameters(), betas=training.betas, weight_decay=0.1, fused=not torch.cuda.is_available())
    rows.step = 0
    norms, source = [], iter(rows)
    for step in range(training.steps):
        optimizer.zero_grad()
        (plain(next(source)[0]).total / 8).backward()
        norms.append(float(nn.utils.clip_grad_norm_(plain.parameters(), 4.0)))
        optimizer.param_groups[0]["lr"] = 1e-2 * min(1, (step + 1) / 4)
        optimizer.step()

    assert all(torch.equal(p, q) for p, q in zip(trained.parameters(), plain.parameters(), strict=True))
    assert [report.gradient_norm for report in reports] == norms
    assert min(norms) < 4.0 < max(norms)  # some are clipped, some are not
    assert [report.learning_rate for report in reports] == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])


def test_four_micro_batches_of_8_give_the_update_of_one_of_32_to_1e_6() -> None:
    updates = []
    for accumulate in (1, 4):
        objective = build("abc")
        before = weights(objective)
        rows = Rows("abc", mixed("abc", 32), batch_size=32, accumulate=accumulate)
        trainer = Trainer(objective, rows, Training(steps=1, batch_size=32, accumulate=accumulate))
        list(trainer)
        moments = {name: trainer.engine.optimizer.state[p]["exp_avg"] for name, p in objective.named_parameters()}
        updates.append((moments, {name: p.detach() - before[name] for name, p in objective.named_parameters()}))
    (gradient, update), (split_gradient, split_update) = updates
    for name, expected in gradient.items():
        assert (split_gradient[name] - expected).abs().max() < 1e-6 * max(g.abs().max() for g in gradient.values()), name
        assert torch.allclose(split_update[name], update[name], rtol=1e-3, atol=1e-7), name


def test_schedules_are_torchs_and_rise_linearly() -> None:
    steps, rate = 50, 0.3
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=rate)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rates = {name: Training(steps=steps, learning_rate=rate, schedule=name) for name in ("constant", "cosine", "linear")}
    for step in range(steps):
        assert learning_rate(rates["cosine"], step) == pytest.approx(cosine.get_last_lr()[0])
        assert learning_rate(rates["linear"], step) == pytest.approx(rate * (1 - step / steps))
        assert learning_rate(rates["constant"], step) == rate
        optimizer.step()
        cosine.step()
    warm = Training(steps=50, learning_rate=rate, schedule="linear", warmup=10)
    assert [learning_rate(warm, s) / rate for s in (0, 4, 9, 10, 30, 49)] == pytest.approx([0.1, 0.5, 1.0, 1.0, 0.5, 0.025])


def test_the_moving_average_is_its_closed_form_and_gives_the_weights_back(sharded: Path) -> None:
    trainer = trainer_on(sharded, ema=0.8)
    trail = [weights(trainer.objective)]
    trail += [weights(trainer.objective) for _ in trainer]
    # sum_t (1 - d_t) prod_{u > t} d_u * weights_t, the initial weights with prod_u d_u; d rises to 0.8
    decays = [min(0.8, (1 + t) / (10 + t)) for t in range(1, 21)]
    assert decays[0] == decay_at(0.8, 1) < 0.8 and decay_at(0.8, 1000) == 0.8
    shares = [math.prod(decays)] + [(1 - d) * math.prod(decays[t:]) for t, d in enumerate(decays, 1)]
    assert sum(shares) == pytest.approx(1)
    live = weights(trainer.objective)
    with trainer.averaged():
        for name, p in trainer.objective.named_parameters():
            expected = sum(share * w[name].double() for share, w in zip(shares, trail, strict=True))
            assert torch.allclose(p.detach().double(), expected, rtol=0, atol=1e-6 * float(expected.abs().max())), name
            assert not torch.equal(p, live[name])
        with pytest.raises(ValueError, match="leave `averaged\\(\\)` before"):
            trainer.save(sharded / "never")
    assert all(torch.equal(p, live[name]) for name, p in trainer.objective.named_parameters())


def test_bf16_runs_the_networks_in_bf16_the_densities_in_float32_and_trains_within_3_percent_of_float32(sharded: Path) -> None:
    losses, seen = {}, {}
    for precision in ("float32", "bf16", "float32"):  # and back again: trainers of one process do not disturb each other
        trainer = trainer_on(sharded, precision=precision)
        linear = trainer.objective.modalities["x0"].decoder[0]
        linear.register_forward_hook(lambda _, __, output, precision=precision: seen.__setitem__(precision, output.dtype))
        losses[precision] = [report.loss for report in trainer]
        loss = trainer.engine.wrapped(next(iter(stream(sharded, batch_size=16)))[0])
        assert loss.total.dtype == torch.float32 and all(sums.total.dtype == torch.float32 for sums in loss.terms.values())
        assert {p.dtype for p in trainer.objective.parameters()} == {torch.float32}
    assert seen == {"float32": torch.float32, "bf16": torch.bfloat16}
    assert losses["bf16"] != losses["float32"]
    assert losses["bf16"] == pytest.approx(losses["float32"], rel=0.03)


def test_training_on_real_shards_with_missing_entries_lowers_the_loss_by_a_tenth(sharded: Path) -> None:
    training = Training(steps=60, batch_size=16, learning_rate=2e-2, log_every=1000)
    losses = [report.loss for report in Trainer(build(SHARDED), stream(sharded, batch_size=16), training)]
    assert np.mean(losses[-20:]) < 0.9 * np.mean(losses[:10]), losses


def test_annealed_divergences_rise_over_the_rows_that_a_training_has_seen_also_after_a_resume(sharded: Path, tmp_path: Path) -> None:
    """loss = -bound - (1 - weight) KL a row; a step's weight lies between those of its first and last row, and is 1 from step 10 on."""
    settings = {"steps": 14, "batch_size": 16, "log_every": 1}
    modalities = {name: mlp((SIZES[name],), latent_dim=2, hidden=(6,)) for name in SHARDED}

    def run(steps: int) -> None:
        torch.manual_seed(0)
        objective = MoPoE(deepcopy(modalities), beta=1.0)
        objective.anneal = 160
        trainer = Trainer(objective, stream(sharded, batch_size=16), Training(**settings | {"steps": steps}), folder=tmp_path)
        trainer.resume()
        deque(trainer, maxlen=0)
        trainer.save()

    run(7)
    run(14)
    found = [1 + (line["loss"] + line["bound"]) / line["kl"] for line in logged(tmp_path)]
    assert len(found) == 14 and found[10:] == pytest.approx([1.0] * 4, abs=1e-4)
    assert all(16 * step / 160 - 1e-4 < weight < (16 * step + 15) / 160 + 1e-4 for step, weight in enumerate(found[:10]))


def test_a_parameter_without_a_gradient_is_named_before_other_ranks_wait_for_it() -> None:
    objective = build()
    objective.spare = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="^spare: no part in the loss"):
        list(Trainer(objective, Rows("ab", mixed("ab"), batch_size=8), Training(steps=1, batch_size=8)))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [("steps", 0, "above 0"), ("ema", 1.0, "between 0 and 1"), ("clip", -1.0, "above 0"), ("precision", "fp16", "float32 or bf16")],
)
def test_settings_out_of_range_are_refused_with_what_came_and_what_was_expected(name: str, value: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected .*{expected}.*, got {value!r}"):
        Training(**{name: value})


# ---- the same again -----------------------------------------------------------------------------------------------------------------


def test_two_runs_of_one_seed_agree_bit_by_bit_and_of_another_do_not(sharded: Path) -> None:
    states, losses = [], []
    for seed in (0, 0, 1):
        objective = build(SHARDED, seed=seed, dropout=0.2)
        torch.manual_seed(time.time_ns())  # whatever happened before the trainer was made
        training = Training(**(SETTINGS | {"seed": seed}))
        trainer = Trainer(objective, stream(sharded, batch_size=16, seed=seed), training)
        losses.append([report.loss for report in trainer])
        states.append(state_of(trainer))
    assert_equal_bit_by_bit(states[1], states[0])
    assert losses[1] == losses[0] != losses[2]


def test_resumed_twice_and_with_loader_processes_is_uninterrupted_bit_by_bit(sharded: Path, tmp_path: Path) -> None:
    whole = trainer_on(sharded, tmp_path / "whole", accumulate=2)
    list(whole)
    for stop, workers in ((7, 0), (8, 1), (20, 0)):  # twice in a row: after one step, and with a loader that reads ahead
        part = trainer_on(sharded, tmp_path / "parts", accumulate=2, workers=workers)
        assert part.resume() == (stop > 7)
        for report in part:
            if report.step == stop:
                break
        part.save()
        part.close()
    assert_equal_bit_by_bit(state_of(part), state_of(whole))
    assert logged(tmp_path / "parts") == logged(tmp_path / "whole")
    assert [line["step"] for line in logged(tmp_path / "parts")] == list(range(1, 21))


def train_until_killed(sharded: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    trainer = trainer_on(sharded, folder, steps=36)
    trainer.resume()
    for report in trainer:
        if report.step % 4 == 0:
            trainer.save()


def kill_after(lines: int, sharded: Path, folder: Path) -> int:
    """Start the training in a process of its own, SIGKILL it once its log has so many lines; how many it had at last."""
    process = forkserver().Process(target=train_until_killed, args=(sharded, folder))
    process.start()
    log, deadline = folder / "metrics.jsonl", time.monotonic() + 60
    while time.monotonic() < deadline and process.is_alive() and not (log.exists() and log.read_bytes().count(b"\n") >= lines):
        time.sleep(0.001)
    process.kill()
    process.join()
    return log.read_bytes().count(b"\n")


def test_killed_at_arbitrary_steps_and_resumed_is_never_killed_bit_by_bit(sharded: Path, tmp_path: Path) -> None:
    whole = trainer_on(sharded, tmp_path / "whole", steps=36)
    list(whole)
    moments = np.random.default_rng(1).integers(5, 32, size=2)
    reached = [kill_after(int(lines), sharded, tmp_path / "killed") for lines in sorted(moments)]
    assert all(5 <= lines < 36 for lines in reached)
    survivor = trainer_on(sharded, tmp_path / "killed", steps=36)
    assert survivor.resume()
    resumed_at = survivor.step
    assert resumed_at % 4 == 0 and 0 < resumed_at <= reached[-1]
    assert len(list(survivor)) == 36 - resumed_at
    assert_equal_bit_by_bit(state_of(survivor), state_of(whole))
    assert logged(tmp_path / "killed") == logged(tmp_path / "whole")


def test_a_constant_schedule_may_be_continued_for_longer_and_equals_the_long_run(sharded: Path, tmp_path: Path) -> None:
    constant: dict[str, Any] = {"schedule": "constant"}
    long = trainer_on(sharded, tmp_path / "long", steps=12, **constant)
    list(long)
    short = trainer_on(sharded, tmp_path / "short", steps=5, **constant)
    list(short)
    short.save()
    longer = trainer_on(sharded, tmp_path / "short", steps=12, **constant)
    assert longer.resume() and len(list(longer)) == 7
    assert_equal_bit_by_bit(state_of(longer), state_of(long))
    assert "training.steps" not in trajectory(Training()) and "training.steps" in trajectory(Training(schedule="linear"))


# ---- the log ------------------------------------------------------------------------------------------------------------------------


def test_the_log_has_the_reports_of_its_steps_and_tensorboard_the_same_numbers(sharded: Path, tmp_path: Path) -> None:
    trainer = trainer_on(sharded, tmp_path, steps=7, log_every=3)
    reports: list[Report] = []
    for report in trainer:
        reports.append(report)
        if report.step == 4:
            trainer.log({"coherence/x0>x1": 0.5})
    trainer.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 4, 6, 7]  # every third, the caller's own, the last
    for report in reports:
        assert (report.terms == {}) == math.isnan(report.rows_per_second) == (report.step not in (3, 6, 7))
    assert lines[2] == {
        "step": 6,
        "loss": reports[5].loss,
        "gradient_norm": reports[5].gradient_norm,
        "learning_rate": reports[5].learning_rate,
        "rows_per_second": reports[5].rows_per_second,
        **reports[5].terms,
    }
    assert lines[1] == {"step": 4, "coherence/x0>x1": 0.5}
    assert tensorboard_scalars(tmp_path, "loss") == [(s, pytest.approx(reports[s - 1].loss)) for s in (3, 6, 7)]


def tensorboard_scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_resuming_drops_log_lines_past_the_checkpoint_and_a_cut_last_line(sharded: Path, tmp_path: Path) -> None:
    first = trainer_on(sharded, tmp_path, steps=9)
    for report in first:
        if report.step == 4:
            first.save()
    first.close()
    log = tmp_path / "metrics.jsonl"
    log.write_text(log.read_text() + '{"step": 3, "los')
    again = trainer_on(sharded, tmp_path, steps=9)
    again.resume()
    assert [line["step"] for line in logged(tmp_path)] == [1, 2, 3, 4]
    list(again)
    again.close()
    assert [line["step"] for line in logged(tmp_path)] == list(range(1, 10))
    assert [step for step, _ in tensorboard_scalars(tmp_path, "loss")] == list(range(1, 10))


def test_a_log_of_another_run_is_neither_overwritten_nor_mixed(sharded: Path, tmp_path: Path) -> None:
    list(trainer_on(sharded, tmp_path, steps=2))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="metrics.jsonl: the log of another run; resume that run, or give this one a folder"):
        list(trainer_on(sharded, tmp_path, steps=2))
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_run_without_a_checkpoint_resumes_from_the_beginning(sharded: Path, tmp_path: Path) -> None:
    list(trainer_on(sharded, tmp_path, steps=3))  # killed before its first checkpoint
    again = trainer_on(sharded, tmp_path, steps=3)
    assert not again.resume()
    assert [report.step for report in again] == [1, 2, 3]
    assert [line["step"] for line in logged(tmp_path)] == [1, 2, 3]


def test_a_run_without_a_folder_writes_nothing_and_says_so_when_asked_to_save(sharded: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = trainer_on(sharded, steps=2)
    list(trainer)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="no folder"):
        trainer.save()
    trainer.save(tmp_path / "somewhere")
    assert read(tmp_path / "somewhere").state["step"] == 2
