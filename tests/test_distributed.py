"""Ranks change nothing: one, two and three gloo processes make the same update, see the same error and resume the same run."""

import importlib.util
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from meme_dist.train import startup
from meme_dist.train.trainer import NonFiniteError, Trainer, Training
from tests.ranks import run_ranks
from tests.trainings import PATTERNS, Rows, build, mixed, weights

ROOT = Path(__file__).resolve().parents[1]
BATCH = 12  # rows of a step: divides among 1, 2, 3 ranks and 2 micro batches each


def flat(tensors: Any) -> np.ndarray:
    return torch.cat([t.detach().flatten() for t in tensors]).numpy()


def one_step(
    rank: int, world: int, names: Sequence[str], masks: Sequence[np.ndarray], accumulate: int = 1, **settings: Any
) -> list[tuple[np.ndarray, np.ndarray, dict[str, float]]]:
    """For each mask of a global batch: gradient (first moment / (1 - beta)), update, and loss with its terms, of one optimiser step."""
    results = []
    for mask in masks:
        objective = build(names, **settings)
        stream = Rows(names, mask, batch_size=BATCH, rank=rank, world=world, accumulate=accumulate)
        trainer = Trainer(objective, stream, Training(steps=1, batch_size=BATCH, accumulate=accumulate))
        before = flat(objective.parameters())
        (report,) = list(trainer)
        moments = flat(trainer.engine.optimizer.state[p]["exp_avg"] for p in objective.parameters())
        results.append((moments / 0.1, flat(objective.parameters()) - before, {"loss": report.loss, **report.terms}))
    return results


def relative(came: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(came - expected).max() / np.abs(expected).max())


def assert_same(came: list[Any], expected: list[Any], tolerance: float = 1e-6) -> None:
    assert len(came) == len(expected) > 0
    for (gradient, update, terms), (true_gradient, true_update, true_terms) in zip(came, expected, strict=True):
        assert relative(gradient, true_gradient) < tolerance
        assert terms == pytest.approx(true_terms, rel=tolerance, abs=tolerance)
        # Adam divides by the gradient's size: where that is rounding noise, so is the update
        solid = np.abs(true_gradient) > 1e-3 * np.abs(true_gradient).max()
        assert np.abs(update - true_update)[solid].max() < 1e-4 * np.abs(true_update).max()


@pytest.mark.parametrize(("world", "estimator"), [(2, "rao_blackwell"), (2, "resampled"), (3, "resampled")])
def test_every_assignment_of_patterns_to_ranks_gives_the_update_of_one_process_to_1e_6(world: int, estimator: str) -> None:
    assignments = list(itertools.product(PATTERNS.values(), repeat=world))  # among them: a absent on one rank, on all ranks
    masks = [np.repeat(np.array(patterns, dtype=bool), BATCH // world, axis=0) for patterns in assignments]
    expected = one_step(0, 1, ("a", "b"), masks, estimator=estimator)
    for came in run_ranks(one_step, world, ("a", "b"), masks, estimator=estimator):
        assert_same(came, expected)


def test_three_modalities_of_which_any_may_be_absent_on_a_rank_or_on_all_give_the_update_of_one_process_to_1e_6() -> None:
    patterns = [p for p in itertools.product((0, 1), repeat=3) if any(p)]
    masks = [np.repeat(np.array(pair, dtype=bool), BATCH // 2, axis=0) for pair in itertools.combinations_with_replacement(patterns, 2)]
    expected = one_step(0, 1, ("a", "b", "c"), masks)
    for came in run_ranks(one_step, 2, ("a", "b", "c"), masks):
        assert_same(came, expected)


@pytest.mark.parametrize(("world", "accumulate"), [(1, 4), (2, 2), (2, 3), (3, 2)])
def test_ranks_times_micro_batches_give_the_update_of_one_batch_to_1e_6(world: int, accumulate: int) -> None:
    masks = [mixed("abc", BATCH), np.repeat(np.array([[1, 0, 0], [0, 1, 1]], dtype=bool), BATCH // 2, axis=0)]
    expected = one_step(0, 1, ("a", "b", "c"), masks)
    if world == 1:
        assert_same(one_step(0, 1, ("a", "b", "c"), masks, accumulate), expected)
    else:
        for came in run_ranks(one_step, world, ("a", "b", "c"), masks, accumulate):
            assert_same(came, expected)


def synchronisations(rank: int, world: int, accumulate: int) -> int:
    """How many gradient reductions two optimiser steps take, after the pass that lays out the buckets."""
    stream = Rows("ab", mixed("ab"), batch_size=BATCH, rank=rank, world=world, accumulate=accumulate)
    trainer = Trainer(build(), stream, Training(steps=2, batch_size=BATCH, accumulate=accumulate))
    wrapped = trainer.engine.wrapped
    assert isinstance(wrapped, DistributedDataParallel) and not wrapped.find_unused_parameters
    calls = []

    def counting(_: Any, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
        calls.append(bucket.index())
        return torch.distributed.all_reduce(bucket.buffer().div_(world), async_op=True).get_future().then(lambda f: f.value()[0])

    wrapped.register_comm_hook(None, counting)
    list(trainer)
    return calls.count(0) - 1


def test_gradients_cross_the_ranks_once_a_step_whatever_the_micro_batches() -> None:
    assert run_ranks(synchronisations, 2, 3) == [2, 2]


def idle(rank: int, world: int) -> str:
    objective = build()
    objective.register_parameter("spare", torch.nn.Parameter(torch.ones(2)))
    stream = Rows("ab", mixed("ab"), batch_size=BATCH, rank=rank, world=world)
    with pytest.raises(ValueError) as error:
        list(Trainer(objective, stream, Training(steps=2, batch_size=BATCH)))
    return str(error.value)


def test_a_parameter_that_takes_no_part_is_named_on_every_rank() -> None:
    assert all(said.startswith("spare: no part in the loss") for said in run_ranks(idle, 2))


# ---- what is not finite -------------------------------------------------------------------------------------------------------------


def broken(rank: int, world: int, what: str) -> tuple[bool, tuple[str, ...], tuple[int, ...], int, int, str]:
    """Break modality b on the last rank after two good steps; whether the weights stayed, and what the error says."""
    stream = Rows("ab", np.ones((24, 2)), batch_size=BATCH, rank=rank, world=world)
    objective = build()
    trainer = Trainer(objective, stream, Training(steps=9, batch_size=BATCH, ema=0.9))
    steps = iter(trainer)
    next(steps), next(steps)
    if rank == world - 1:
        if what == "data":
            stream.data["b"][:] = np.nan
        elif what == "loss":
            stream.data["b"][:] = 1e38  # finite, its density is not
        else:
            objective.modalities["b"].encoder[-1].bias.register_hook(lambda gradient: gradient * torch.inf)
    before, average = weights(objective), trainer._average.parts["modalities.b.encoder.1.weight"].clone()
    try:
        next(steps)
    except NonFiniteError as error:
        stayed = all(torch.equal(p, before[name]) for name, p in objective.named_parameters())
        stayed &= torch.equal(average, trainer._average.parts["modalities.b.encoder.1.weight"])
        return stayed, error.modalities, error.ranks, error.step, trainer.step, str(error)
    raise AssertionError("no error")


@pytest.mark.parametrize("what", ["data", "loss", "gradient"])
@pytest.mark.parametrize("world", [1, 2])
def test_what_is_not_finite_on_one_rank_leaves_all_weights_of_all_ranks_and_names_modality_and_step(world: int, what: str) -> None:
    results = [broken(0, 1, what)] if world == 1 else run_ranks(broken, world, what)
    assert len({result[-1] for result in results}) == 1  # every rank says the same
    for stayed, modalities, ranks, step, done, message in results:
        assert stayed
        assert modalities == ("b",)
        assert ranks == (tuple(range(world)) if what == "gradient" else (world - 1,))  # a gradient is already averaged over ranks
        assert (step, done) == (3, 2)
        assert "step 3" in message and " of b not finite" in message


# ---- start-up -----------------------------------------------------------------------------------------------------------------------


def disagree(rank: int, world: int, what: str) -> str:
    objective = build(seed=rank if what == "weights" else 0)
    rate = 1e-3 * (1 + rank) if what == "settings" else 1e-3
    stream = Rows("ab", mixed("ab"), batch_size=BATCH, rank=rank, world=world)
    try:
        Trainer(objective, stream, Training(batch_size=BATCH, learning_rate=rate))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("what", ["weights", "settings"])
def test_ranks_that_disagree_on_weights_or_settings_are_refused_on_every_rank(what: str) -> None:
    for message in run_ranks(disagree, 2, what):
        assert message.startswith(f"{what} differ between rank 0 and rank 1; ")


def test_a_launch_whose_processes_do_not_train_together_is_refused() -> None:
    trainer = Trainer(build(), Rows("ab", mixed("ab"), batch_size=8), Training(batch_size=8))
    with pytest.raises(ValueError, match=r"launcher started 2 processes \(WORLD_SIZE\), but 1 train together .*cpu2.yaml"):
        startup.check_world(trainer.accelerator, {"WORLD_SIZE": "2"})


LAUNCH = ["/usr/bin/python", "/usr/bin/accelerate", "launch"]


@pytest.mark.parametrize("words", [["--cpu", "--num_processes", "2"], ["--cpu", "--num_processes=2"], ["--config_file", "FILE"]])
def test_a_launcher_that_was_asked_for_two_processes_and_started_one_is_refused(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "cpu.yaml").write_text("distributed_type: MULTI_CPU\nnum_processes: 2\n")
    words = [str(tmp_path / "cpu.yaml") if word == "FILE" else word for word in words] + ["-m", "meme_dist", "train", "digits"]
    for command in (LAUNCH, ["python", "-m", "accelerate.commands.launch"]):
        with pytest.raises(ValueError, match="asked for 2 processes and started one; .* without --cpu"):
            startup.check_launcher([*command, *words], {})
        startup.check_launcher([*command, *words], {"WORLD_SIZE": "2"})
    startup.check_launcher([*LAUNCH, "--cpu", "--num_processes", "1"], {})
    startup.check_launcher(["bash", "launch", "--num_processes", "2"], {})
    startup.check_launcher([], {})


@pytest.mark.launch
def test_the_launch_that_would_train_one_process_for_two_stops_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "tests.launched", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode != 0 and "asked for 2 processes and started one" in done.stdout + done.stderr


def unwrapped(rank: int, world: int) -> str:
    trainer = Trainer(build(), Rows("ab", mixed("ab"), batch_size=8, rank=rank, world=world), Training(batch_size=8))
    trainer.engine.wrapped = trainer.objective
    try:
        startup.check_engine("ddp", trainer.engine, world)
    except ValueError as error:
        return str(error)
    return ""


def test_replicas_that_would_drift_apart_are_refused() -> None:
    assert all("expected the engine ddp, as the launch configuration says, got ddp around MEME" in x for x in run_ranks(unwrapped, 2))


def test_a_batch_that_does_not_divide_among_ranks_and_micro_batches_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size: 10 rows do not divide among 2 processes with 3 micro batches each; .* such as 12"):
        startup.check_batch(Training(batch_size=10, accumulate=3), 2)


# ---- keeping ------------------------------------------------------------------------------------------------------------------------


def train_and_save(rank: int, world: int, folder: Path, steps: int) -> tuple[np.ndarray, list[float], float]:
    """Resume if there is something to resume, train up to `steps`, save; rank's own random state must come back too."""
    stream = Rows("ab", mixed("ab"), batch_size=BATCH, rank=rank, world=world)
    trainer = Trainer(build(), stream, Training(steps=9, batch_size=BATCH, ema=0.9, log_every=1), folder=folder)
    trainer.resume()
    losses = []
    for report in trainer:
        losses.append(report.loss)
        random = torch.rand(()).item()
        if report.step == steps:
            break
    trainer.save()
    trainer.close()
    return flat(trainer._average.parts.values()), losses, random


def test_three_ranks_resume_bit_by_bit_each_with_its_own_random_state(tmp_path: Path) -> None:
    whole = run_ranks(train_and_save, 3, tmp_path / "whole", 6)
    first = run_ranks(train_and_save, 3, tmp_path / "parts", 4)
    second = run_ranks(train_and_save, 3, tmp_path / "parts", 6)
    for rank in range(3):
        assert np.array_equal(whole[rank][0], second[rank][0])
        assert whole[rank][1] == first[rank][1] + second[rank][1]
        assert whole[rank][2] == second[rank][2]
    assert len({result[2] for result in whole}) == 3
    whole_log, parts_log = (logged(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts"))
    assert whole_log == parts_log and len(whole_log) == 6


def logged(path: Path) -> list[str]:
    """The lines of the log but for what a busy machine changes: speeds, and who is named a straggler."""
    return [without_speed(line) for line in path.read_text().splitlines() if "straggler" not in line]


def without_speed(line: str) -> str:
    head, _, tail = line.partition('"rows_per_second": ')
    return head + tail.partition(",")[2]


def test_a_run_of_two_ranks_resumes_on_one_to_1e_5(tmp_path: Path) -> None:
    whole = run_ranks(train_and_save, 2, tmp_path / "whole", 6)[0]
    run_ranks(train_and_save, 2, tmp_path / "parts", 4)
    second = train_and_save(0, 1, tmp_path / "parts", 6)
    assert np.allclose(second[0], whole[0], rtol=0, atol=1e-5)
    assert np.allclose(second[1], whole[1][4:], rtol=1e-5)


def full_disk(rank: int, world: int, folder: Path) -> str:
    from meme_dist.train import checkpoint

    trainer = Trainer(build(), Rows("ab", mixed("ab"), batch_size=8, rank=rank, world=world), Training(batch_size=8), folder=folder)
    if rank == 0:
        checkpoint._write_file = refuse
    try:
        trainer.save()
    except OSError as error:
        return str(error)
    return ""


def refuse(*_: Any) -> str:
    raise OSError(28, "No space left on device")


def test_when_rank_0_cannot_save_no_rank_waits_for_it(tmp_path: Path) -> None:
    first, second = run_ranks(full_disk, 2, tmp_path)
    assert "no space left" in first and "rank 0 could not write this checkpoint" in second and "no space left" in second


# ---- the harness, and the real launcher ---------------------------------------------------------------------------------------------


def hang(rank: int, world: int) -> None:
    if rank == 1:
        time.sleep(60)


def test_a_hanging_rank_is_named_within_the_time_limit() -> None:
    start = time.monotonic()
    with pytest.raises(AssertionError, match=r"hung: no answer from ranks \[1\] of 2"):
        run_ranks(hang, 2, timeout=2)
    assert time.monotonic() - start < 10


@pytest.mark.launch
@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_accelerate_launch_gives_the_updates_of_one_process_to_1e_6(engine: str, tmp_path: Path) -> None:
    """One of each of Accelerate's two kinds of launch; tests/test_engines.py trains in the environment that every file makes."""
    if engine.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed: pip install -e '.[deepspeed]' in the project's folder")
    config = ROOT / "launch" / "accelerate" / f"{engine}.yaml"
    command = [
        "accelerate.commands.launch",
        "--config_file",
        str(config),
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
        "-m",
        "tests.launched",
        str(tmp_path),
    ]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    came = np.load(tmp_path / "result.npz")
    from tests.launched import train

    expected = train(None)
    assert (came["world"], came["engine"]) == (2, engine)
    assert relative(came["weights"], expected["weights"]) < (1e-6 if engine == "ddp" else 1e-5)
    assert np.allclose(came["losses"], expected["losses"], rtol=1e-6 if engine == "ddp" else 1e-5)


@pytest.mark.launch
def test_leaving_with_other_ranks_skips_the_shutdown_that_aborted_after_all_work_was_done(tmp_path: Path) -> None:
    """The threads of gloo outlive DDP; what runs at Python's shutdown must not run beside them. Output is kept, so is the exit status."""
    program = "\n".join(
        [
            "import atexit, torch",
            "from meme_dist.leave import leave",
            "atexit.register(print, 'shut down')",
            f"torch.distributed.init_process_group('gloo', init_method='file://{tmp_path}/store', rank=0, world_size=1)",
            "print('work done')",
            "leave(3)",
        ]
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (3, "work done\n"), done.stderr
