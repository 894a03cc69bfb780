"""Every engine makes the update of one process: DDP, FSDP2 and DeepSpeed's ZeRO 1 to 3, on 1, 2 and 4 ranks, whatever a rank holds."""

import importlib.util
import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from meme_dist.modalities.graph import graph
from meme_dist.modalities.graph_types import OneHot
from meme_dist.objectives.meme import MEME
from meme_dist.train import checkpoint, keeper
from meme_dist.train.engines.base import Layout
from meme_dist.train.engines.placed import Placed
from meme_dist.train.engines.zero import Zero
from meme_dist.train.trainer import NonFiniteError, Trainer, Training
from tests.launching import environment_of
from tests.ranks import run_ranks
from tests.trainings import Rows, build, mixed

ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3", "modality")
SHARDING = ENGINES[1:]
BATCH = 8


def launched(engine: str) -> dict[str, str]:
    """What `accelerate launch` with the engine's file sets for a process; modalities are placed in any launch."""
    if engine == "modality":
        return {}
    return {name: value for name, value in environment_of(engine).items() if name.startswith(("ACCELERATE", "FSDP"))}


def needs(engine: str) -> None:
    if engine.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed: pip install -e '.[deepspeed]' in the project's folder")


def trainer_on(engine: str, rank: int, world: int, mask: np.ndarray, folder: Path | None = None, **settings: Any) -> Trainer:
    os.environ.update(launched(engine))
    if engine == "zero3":
        from meme_dist.train.engines import zero

        zero.PERSISTENT = 0  # else parameters as small as these are never sharded
    members = 2 if engine == "modality" else 1
    training = Training(
        **{"steps": 4, "members": members, "batch_size": BATCH, "ema": 0.9, "clip": 1.0, "weight_decay": 0.01, "log_every": 1} | settings
    )
    rows = Rows("abc", mask, batch_size=BATCH, rank=rank // members, world=max(1, world // members), accumulate=training.accumulate)
    return Trainer(build("abc"), rows, training, folder=folder)


def trajectory(rank: int, world: int, engine: str, mask: np.ndarray, **settings: Any) -> dict[str, Any]:
    """What a training did: losses, norms, and weights and their averages at the end."""
    trainer = trainer_on(engine, rank, world, mask, **settings)
    reports = list(trainer)
    return {"loss": [r.loss for r in reports], "norm": [r.gradient_norm for r in reports], "terms": reports[-1].terms, **whole(trainer)}


def patience_of(rank: int, world: int, engine: str, port: int) -> float:
    """Seconds that a rank of a real start-up, which makes the process group itself, waits for another in a collective."""
    torch.distributed.destroy_process_group()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    trainer = trainer_on(engine, rank, world, mixed("abc"))
    assert trainer.world == world
    group = torch.distributed.distributed_c10d._get_default_group()
    return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()


def whole(trainer: Trainer) -> dict[str, np.ndarray]:
    engine = trainer.engine
    average = trainer._average
    assert average is not None
    weights = {name: engine.whole(name, engine.part(name)).clone() for name in engine.names()}
    averages = {name: engine.whole(name, average.parts[name]).clone() for name in engine.names()}
    moments = {f"{name}/{key}": x.clone() for name in engine.names() for key, x in engine.moments(name).items()}
    with trainer.averaged() as module:
        evaluated = dict(module.named_parameters())
        assert all(torch.equal(evaluated[name], averages[name]) for name in averages)
    return {kind: flat(x) for kind, x in (("weights", weights), ("averages", averages), ("moments", moments))}


def flat(tensors: dict[str, torch.Tensor]) -> np.ndarray:
    return torch.cat([tensors[name].detach().float().flatten() for name in sorted(tensors)]).numpy()


def assert_same(came: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-5) -> None:
    assert came["loss"] == pytest.approx(expected["loss"], rel=tolerance)
    assert came["norm"] == pytest.approx(expected["norm"], rel=tolerance)
    assert came["terms"] == pytest.approx(expected["terms"], rel=tolerance, abs=tolerance)
    for kind in ("weights", "averages", "moments"):
        assert came[kind].shape == expected[kind].shape
        # Adam divides by the gradient's size: where that is rounding noise, so is the update (learning rate 5e-4, 4 steps)
        assert np.abs(came[kind] - expected[kind]).max() < 10 * tolerance * np.abs(expected[kind]).max(), kind


def unequal(world: int) -> np.ndarray:
    """Modality a is absent on rank 0 in the first step, c on all ranks in the second; the rest is mixed."""
    mask = mixed("abc", 4 * BATCH).copy()
    mask[: BATCH // world] = [False, True, True]
    mask[BATCH : 2 * BATCH] = [True, True, False]
    return mask


@pytest.mark.parametrize(("engine", "world"), [(e, w) for e in ENGINES for w in (1, 2, 4) if (e, w) not in (("ddp", 1), ("modality", 1))])
def test_every_engine_on_any_ranks_follows_the_trajectory_of_one_process(engine: str, world: int) -> None:
    needs(engine)
    mask = unequal(world)
    expected = trajectory(0, 1, "ddp", mask)
    assert min(expected["norm"]) > 1.0  # every step is clipped
    for came in run_ranks(trajectory, world, engine, mask):
        assert_same(came, expected)


@pytest.mark.parametrize(
    ("engine", "world", "accumulate"), [("fsdp2", 2, 2), ("zero1", 2, 2), ("zero2", 2, 4), ("zero3", 1, 4), ("modality", 4, 2)]
)
def test_any_split_into_micro_batches_follows_the_trajectory_of_one_batch(engine: str, world: int, accumulate: int) -> None:
    """Among the windows is one in which a modality is absent on all ranks."""
    needs(engine)
    mask = unequal(world)
    expected = trajectory(0, 1, "ddp", mask)
    for came in run_ranks(trajectory, world, engine, mask, accumulate=accumulate):
        assert_same(came, expected)


# ---- checkpoints ----------------------------------------------------------------------------------------------------------------------


def train_part(rank: int, world: int, engine: str, folder: Path, until: int) -> dict[str, Any]:
    """Resume where there is something to resume, train up to a step, save."""
    trainer = trainer_on(engine, rank, world, unequal(2), folder)
    resumed = trainer.resume()
    losses = []
    for report in trainer:
        losses.append(report.loss)
        if report.step == until:
            break
    trainer.save(wait=False)
    found = {"resumed": resumed, "loss": losses, **whole(trainer)}
    trainer.close()
    return found


MOVES = [("ddp", 1, "fsdp2", 2), ("fsdp2", 2, "zero1", 2), ("zero1", 2, "zero3", 4), ("zero3", 4, "zero2", 1), ("zero2", 2, "fsdp2", 4)]
MOVES += [("modality", 2, "fsdp2", 2), ("zero1", 2, "modality", 4)]
MOVES += [("fsdp2", 4, "ddp", 2), ("zero3", 2, "ddp", 1), ("zero1", 2, "zero1", 1)]


@pytest.mark.parametrize(("first", "ranks", "second", "others"), MOVES)
def test_saved_by_one_engine_on_n_ranks_a_training_goes_on_with_another_on_m(
    first: str, ranks: int, second: str, others: int, tmp_path: Path
) -> None:
    needs(first), needs(second)
    uninterrupted = train_part(0, 1, "ddp", tmp_path / "whole", 4)
    before = run_ranks(train_part, ranks, first, tmp_path / "parts", 2)[0]
    after = run_ranks(train_part, others, second, tmp_path / "parts", 4)[0]
    assert (before["resumed"], after["resumed"]) == (False, True)
    assert before["loss"] + after["loss"] == pytest.approx(uninterrupted["loss"], rel=1e-5)
    for kind in ("weights", "averages", "moments"):
        assert np.abs(after[kind] - uninterrupted[kind]).max() < 1e-4 * np.abs(uninterrupted[kind]).max(), kind
    assert checkpoint.export(tmp_path / "parts" / "checkpoints" / "last", tmp_path / "one.safetensors", averaged=False) == 4
    assert np.array_equal(flat(safetensors.torch.load_file(tmp_path / "one.safetensors")), after["weights"])
    files = {path.name for path in (tmp_path / "parts" / "checkpoints" / "last").iterdir()}
    shares = ["model.safetensors"] if others == 1 else [f"model-{r:05d}-of-{others:05d}.safetensors" for r in range(1, others + 1)]
    assert files >= {"state.json", *shares} and not [name for name in files if "rank" in name]


@pytest.mark.parametrize("engine", SHARDING)
def test_resumed_on_the_same_engine_and_ranks_is_uninterrupted_bit_by_bit(engine: str, tmp_path: Path) -> None:
    needs(engine)
    uninterrupted = run_ranks(train_part, 2, engine, tmp_path / "whole", 4)
    run_ranks(train_part, 2, engine, tmp_path / "parts", 2)
    for came, expected in zip(run_ranks(train_part, 2, engine, tmp_path / "parts", 4), uninterrupted, strict=True):
        assert came["loss"] == expected["loss"][2:]
        assert all(np.array_equal(came[kind], expected[kind]) for kind in ("weights", "averages", "moments"))


# ---- what is not finite ---------------------------------------------------------------------------------------------------------------


def broken_steps(rank: int, world: int, engine: str, what: str, skips: int) -> dict[str, Any]:
    """Modality b is broken on the last rank in step 3 alone: what the training says, and its weights after step 4 or where it stopped."""
    trainer = trainer_on(engine, rank, world, mixed("abc", 4 * BATCH), steps=4, skips=skips)
    if rank == world - 1:
        break_third_step(trainer, what)
    losses, error = [], None
    try:
        losses += [report.loss for report in trainer]
    except NonFiniteError as caught:
        error = (caught.modalities, caught.ranks, caught.step)
    return {"loss": losses, "error": error, "passed": trainer.passed, "step": trainer.step, **whole(trainer)}


def break_third_step(trainer: Trainer, what: str) -> None:
    rows = trainer.stream
    original = rows.batch

    def batch(positions: np.ndarray) -> Any:
        made = original(positions)
        if rows.step == 2 and what == "data":
            made.modalities["b"].data.fill_(torch.nan)
        return made

    rows.batch = batch
    if what == "gradient":

        def spoil(module: torch.nn.Module, _: Any, output: torch.Tensor) -> None:
            if rows.step == 2 and output.requires_grad:
                output.register_hook(lambda gradient: gradient * torch.inf)

        trainer.objective.modalities["b"].encoder.register_forward_hook(spoil)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_that_is_not_finite_on_one_rank_changes_no_weight_on_any_and_names_the_modality(engine: str) -> None:
    needs(engine)
    good = run_ranks(trajectory, 2, engine, mixed("abc", 4 * BATCH), steps=2, schedule="constant")[0]
    for came in run_ranks(broken_steps, 2, engine, "data", 0):
        assert came["error"] == (("b",), (1,), 3) or engine == "modality" and came["error"] == (("b",), (0, 1), 3)
        assert came["step"] == 2
        assert all(np.array_equal(came[kind], good[kind]) for kind in ("weights", "averages", "moments"))


@pytest.mark.parametrize("engine", ENGINES[:-1])
def test_a_gradient_that_is_not_finite_under_a_finite_loss_is_seen_before_the_update(engine: str) -> None:
    needs(engine)
    good = run_ranks(trajectory, 2, engine, mixed("abc", 4 * BATCH), steps=2)[0]
    for came in run_ranks(broken_steps, 2, engine, "gradient", 0):
        assert came["error"][0] == ("b",) and came["error"][2] == 3 and came["step"] == 2
        assert all(np.array_equal(came[kind], good[kind]) for kind in ("weights", "averages", "moments"))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_skipped_step_leaves_no_trace_and_the_next_rows_are_trained_on(engine: str) -> None:
    needs(engine)
    came = run_ranks(broken_steps, 2, engine, "data", 1)
    expected = run_ranks(without_third, 2)
    for mine, theirs in zip(came, expected, strict=True):
        assert (mine["error"], mine["passed"], mine["step"]) == (None, 1, 4)
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert np.abs(mine["weights"] - theirs["weights"]).max() < 1e-4 * np.abs(theirs["weights"]).max()


def overflowing(rank: int, world: int, engine: str) -> dict[str, Any]:
    """In step 3 each rank's gradient is finite and their sum over the ranks is not."""
    trainer = trainer_on(engine, rank, world, mixed("abc", 4 * BATCH), steps=4, skips=1)
    largest = torch.finfo(torch.float32).max

    def spoil(module: torch.nn.Module, _: Any, output: torch.Tensor) -> None:
        if trainer.stream.step == 2 and output.requires_grad:
            output.register_hook(lambda gradient: torch.zeros_like(gradient).index_fill_(0, torch.tensor([0]), 0.9 * largest))

    trainer.objective.modalities["b"].decoder[-1].register_forward_hook(spoil)
    return {"loss": [report.loss for report in trainer], "passed": trainer.passed, "step": trainer.step, **whole(trainer)}


@pytest.mark.parametrize("engine", ["fsdp2", "zero1", "zero2"])  # ZeRO-3 divides before it sums; one rank alone holds a modality
def test_a_gradient_that_overflows_in_the_sum_over_ranks_is_not_counted_as_a_step(engine: str) -> None:
    """DeepSpeed drops such a step by itself: were it counted, averages and learning rate would go on without an update."""
    needs(engine)
    expected = run_ranks(without_third, 2)
    for mine, theirs in zip(run_ranks(overflowing, 2, engine), expected, strict=True):
        assert (mine["passed"], mine["step"]) == (1, 4)
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert np.abs(mine["averages"] - theirs["averages"]).max() < 1e-4 * np.abs(theirs["averages"]).max()


def without_third(rank: int, world: int) -> dict[str, Any]:
    """A training whose stream does not have the rows of step 3."""
    trainer = trainer_on("ddp", rank, world, mixed("abc", 4 * BATCH), steps=4)
    rows, original = trainer.stream, trainer.stream.batch

    def batch(positions: np.ndarray) -> Any:
        if rows.step == 2:
            rows.step += 1
        return original(positions)

    rows.batch = batch
    return {"loss": [report.loss for report in trainer], **whole(trainer)}


# ---- what a rank does not hold, and what lies elsewhere -----------------------------------------------------------------------------


def graphs() -> MEME:
    """Two graph modalities, whose constants are buffers of equal names and shapes, and of other numbers."""
    torch.manual_seed(0)
    kinds = {"loud": OneHot(3, scale=4.0), "soft": OneHot(3, scale=1.0)}
    return MEME({name: graph(4, types=types, latent_dim=2, hidden=8) for name, types in kinds.items()}, pseudo_inputs=2, samples=2)


def evaluated_constants(rank: int, world: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The constants that a rank holds, and those of the whole module that it evaluates with."""
    objective = graphs()
    engine = Placed(objective, Training(members=2, batch_size=BATCH), torch.device("cpu"), world=world)
    engine.broadcast_buffers()
    with engine.evaluated(None) as module:
        return constants(objective), constants(module)


def constants(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: buffer.numpy() for name, buffer in module.named_buffers()}


def test_members_keep_the_constants_of_their_modalities_and_evaluate_with_all() -> None:
    expected = constants(graphs())
    found = run_ranks(evaluated_constants, 2)
    assert sorted(sorted({name.split(".")[1] for name in mine}) for mine, _ in found) == [["loud"], ["soft"]]
    for mine, evaluated in found:
        assert evaluated.keys() == expected.keys()
        assert all(np.array_equal(x, expected[name]) for came in (mine, evaluated) for name, x in came.items())


def test_parts_that_lie_in_host_memory_cross_the_ranks_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under zero3_offload on GPUs: NCCL sends nothing from the host. Here "meta" stands for the GPU."""
    sent: list[str] = []
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather", lambda into, x: sent.extend(part.device.type for part in (*into, x)))
    engine: Any = object.__new__(Zero)
    engine.stage, engine.wrapped = 3, SimpleNamespace(device=torch.device("meta"))
    engine.layout = Layout({"w": torch.empty(3, 2, device="meta")}, {"w": "w"})
    assert engine.whole("w", torch.zeros(3)).shape == (3, 2)
    assert sent == ["meta"] * 3


# ---- bf16 -------------------------------------------------------------------------------------------------------------------------------


def in_bf16(rank: int, world: int, engine: str) -> tuple[list[float], float, str]:
    """Losses of a training in bf16, the loss of rows that it is evaluated on, and the type that a decoder computed them in."""
    trainer = trainer_on(engine, rank, world, mixed("abc", 4 * BATCH), precision="bf16")
    losses, seen = [report.loss for report in trainer], []
    held_out = Rows("abc", mixed("abc", BATCH), batch_size=BATCH, seed=7)
    with trainer.averaged() as module:
        module.modalities["a"].decoder[0].register_forward_hook(lambda _, __, output: seen.append(str(output.dtype)))
        with torch.no_grad():
            loss = float(module(next(iter(held_out))[0]).total)
    return losses, loss, seen[0]


@pytest.mark.parametrize("engine", ["fsdp2", "zero2", "zero3", "modality"])
def test_in_bf16_every_engine_trains_and_evaluates_like_one_process_in_bf16(engine: str) -> None:
    needs(engine)
    losses, loss, _ = run_ranks(in_bf16, 1, "ddp")[0]
    for came in run_ranks(in_bf16, 2, engine):
        assert came[0] == pytest.approx(losses, rel=2e-3)
        assert came[1] == pytest.approx(loss, rel=2e-3) and came[2] == "torch.bfloat16"


# ---- waiting for one another ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2"])
def test_collectives_wait_longer_than_any_rank_takes_on_its_own(engine: str) -> None:
    """NCCL's own limit is 10 minutes: a checkpoint that takes rank 0 longer would end the others. gloo's is half an hour."""
    needs(engine)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert min(run_ranks(patience_of, 2, engine, port)) >= keeper.PATIENCE + 600
