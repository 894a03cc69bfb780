"""The plan's arithmetic: against numbers worked out by hand, and against what engines really hold and really send."""

import os
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.ranks import sent_bytes
from meme_dist.modalities.vector import mlp
from meme_dist.objectives.meme import MEME
from meme_dist.recipes.linear_gaussian import linear
from meme_dist.train import plan
from meme_dist.train.counting import Counts, Unit, count
from meme_dist.train.engines.zero import BUCKET, PERSISTENT
from meme_dist.train.plan import STRATEGIES, Machine, Traffic, chunk, machine_of, memory, rows_per_second, traffic
from meme_dist.train.trainer import Trainer
from meme_dist.train.training import Training
from meme_dist.types import Batch, Loss, pack
from tests.ranks import run_ranks
from tests.test_engines import launched, needs
from tests.trainings import SIZES, Rows, build, mixed

ROWS = 6
TRAINING = Training(batch_size=4 * ROWS)
MACHINE = Machine(seconds=0.1, bandwidth=1e9)


class Summed(nn.Module):
    """A network of one modality whose outputs' sum is the loss."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, batch: Batch) -> Loss:
        return Loss(self.layers(batch.modalities["x"].data).sum(), {})


def batch(rows: int = ROWS, *, names: tuple[str, ...] = ("x", "y"), event: int = 3, single: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(0)
    data = {name: torch.randn(rows, event, generator=generator) for name in names}
    return pack(data, np.ones((rows, len(names)), dtype=bool), single=single)


def meme(hidden: int = 8, **settings: Any) -> MEME:
    torch.manual_seed(0)
    return MEME({name: mlp((3,), latent_dim=2, hidden=(hidden,)) for name in "xy"}, **({"pseudo_inputs": 2, "samples": 3} | settings))


# ---- counting ---------------------------------------------------------------------------------------------------------------------------


def test_saved_activations_of_two_layers_are_the_input_and_the_hidden_units_once() -> None:
    """tanh and the second layer both save the hidden units: one storage. Weights are saved too, and are no activations."""
    found = count(Summed(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)), batch(), TRAINING)
    assert found.activations == 4 * ROWS * (3 + 5)


def test_flops_of_two_layers_are_those_of_five_products() -> None:
    """Two forwards, two gradients of weights, and one of the hidden units: the input needs none."""
    found = count(Summed(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)), batch(), TRAINING)
    assert found.flops == 2 * ROWS * (2 * (3 * 5 + 5 * 1) + 5 * 1)


def test_activations_and_flops_are_proportional_to_the_rows_and_bf16_saves_less() -> None:
    model = meme(hidden=64)
    half, whole = count(model, batch(64), TRAINING), count(model, batch(128), TRAINING)
    assert whole.activations == pytest.approx(2 * half.activations, rel=0.02) and whole.flops == 2 * half.flops
    assert count(model, batch(64), replace(TRAINING, precision="bf16")).activations < 0.9 * half.activations


def test_parameters_are_those_of_each_modality_with_its_pseudo_inputs() -> None:
    model = MEME({name: linear(4, 2, family=build().family) for name in "xy"}, pseudo_inputs=5)
    networks = (4 * 4 + 4) + (2 * 4 + 4) + 1  # encoder, decoder, the likelihood's scale
    found = count(model, batch(event=4), TRAINING)
    assert found.parameters == {"x": networks + 5 * 4, "y": networks + 5 * 4}
    assert found.total == found.trainable == sum(p.numel() for p in model.parameters()) == sum(unit.size for unit in found.units)


def test_frozen_parameters_are_held_and_not_trained() -> None:
    model = meme()
    model.modality("x").encoder.requires_grad_(False)
    found = count(model, batch(), TRAINING)
    assert found.total - found.trainable == sum(p.numel() for p in model.modality("x").encoder.parameters())


RUNS = {  # estimator -> runs of a decoder, and those with gradients
    "resampled": (2, 1),
    "rao_blackwell": (1, 1),
    "released": (2, 2),
}


@pytest.mark.parametrize("estimator", RUNS)
def test_runs_of_each_network_are_counted_with_and_without_gradients(estimator: Any) -> None:
    units = {unit.name: (unit.forwards, unit.backwards) for unit in count(meme(estimator=estimator), batch(), TRAINING).units}
    assert units["modalities.x.decoder"] == RUNS[estimator] and units["modalities.y.encoder"] == (1, 1)
    units = {unit.name: (unit.forwards, unit.backwards) for unit in count(meme(estimator=estimator), batch(single=True), TRAINING).units}
    assert units["modalities.y.encoder"] == (2, 2)  # pseudo-inputs are encoded too


def test_counting_leaves_everything_as_it_was() -> None:
    model = Summed(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(), nn.Linear(5, 1)).eval()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before, random = {name: x.clone() for name, x in model.state_dict().items()}, torch.get_rng_state()
    found = count(model, batch(), TRAINING)
    assert found.buffers == 4 * (5 + 5) + 8  # two statistics and a count
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters()) and not model.training
    assert torch.equal(torch.get_rng_state(), random)


# ---- memory -----------------------------------------------------------------------------------------------------------------------------

COUNTS = Counts(
    rows=ROWS,
    parameters={"x": 70, "y": 50},
    trainable=120,
    units=(Unit("x.encoder", ((7, 10),), 1, 1), Unit("y.decoder", ((5, 8), (6,)), 2, 1), Unit("rest", ((4,),), 1, 0)),
    buffers=8,
    activations=600,
    flops=1000,
    seconds=0.1,
)
BY_HAND = {  # W = 4, ema, one micro batch: weights + buffers, gradients, moments, copy, average, gathered, activations, host
    "ddp": (480 + 8, 480, 960, 0, 480, 480, 600, 0),
    "zero1": (480 + 8, 480, 240, 120, 480, 480, 600, 0),  # 30 numbers a rank
    "zero2": (480 + 8, 120, 240, 120, 480, 480, 600, 0),
    # rows of 10, 8, 1 and 1 numbers: 2, 2, 2 and 1 of them on rank 0
    "fsdp2": (4 * 39 + 8, 4 * 39, 8 * 39, 0, 4 * 39, 4 * (4 + 2 * 70 + 46), 600, 0),
    # ceil(70 / 4) + ceil(40 / 4) + ceil(6 / 4) + ceil(4 / 4) = 18 + 10 + 2 + 1
    "zero3": (4 * 31 + 8, 4 * 31, 8 * 31, 0, 4 * 31, 4 * (120 + 120), 600, 0),
    "zero3_offload": (4 * 31 + 8, 4 * 31, 8 * 31, 4 * 31, 4 * 31, 4 * (120 + 120), 600, 4 * 31 * (1 + 1 + 2 + 1)),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_memory_of_each_strategy_is_what_one_counts_by_hand(strategy: Any) -> None:
    found = memory(COUNTS, replace(TRAINING, ema=0.9), strategy, world=4)
    assert tuple(found) == BY_HAND[strategy]
    assert found.device == sum(BY_HAND[strategy][:-1]) - found.host


def test_without_an_average_it_takes_no_memory_and_one_process_alone_needs_no_bucket() -> None:
    assert memory(COUNTS, TRAINING, "ddp", world=1)[2:6] == (960, 0, 0, 0)
    assert memory(COUNTS, TRAINING, "ddp", world=1, recorded=True).gathered == 4 * 120  # a pass's gradient beside the sum of them


def test_fsdp2_holds_whole_gradients_while_it_accumulates() -> None:
    assert memory(COUNTS, replace(TRAINING, accumulate=2), "fsdp2", world=2).gradients == 4 * 120 + 4 * (40 + 24 + 3 + 2)


@pytest.mark.parametrize("world", [1, 2, 3, 5, 7, 200])
@pytest.mark.parametrize("strategy", STRATEGIES[1:])
def test_shards_of_all_ranks_together_are_the_whole(strategy: Any, world: int) -> None:
    parts = [memory(COUNTS, TRAINING, strategy, world=world, rank=rank) for rank in range(world)]
    assert sum(part.moments for part in parts) == 8 * 120
    assert parts[0].moments == max(part.moments for part in parts)
    if strategy in ("fsdp2", "zero3"):
        assert sum(part.weights - COUNTS.buffers for part in parts) == sum(part.gradients for part in parts) == 4 * 120
    assert [chunk(7, 3, rank) for rank in range(3)] == [3, 3, 1]


# ---- against the engines ----------------------------------------------------------------------------------------------------------------


def objective() -> MEME:
    """Large enough that ZeRO-3 shards its inner layers, and that messages are mostly content."""
    torch.manual_seed(0)
    return MEME({name: mlp((SIZES[name],), latent_dim=2, hidden=(256, 256)) for name in "abc"}, pseudo_inputs=4, samples=3)


def settings(world: int, accumulate: int) -> Training:
    return Training(steps=6, batch_size=8 * world * accumulate, accumulate=accumulate, log_every=100)


def trainer_of(engine: str, rank: int, world: int, accumulate: int) -> Trainer:
    os.environ.update(launched(engine))
    training = settings(world, accumulate)
    rows = Rows("abc", mixed("abc"), batch_size=training.batch_size, rank=rank, world=world, accumulate=accumulate)
    return Trainer(objective(), rows, training)


def trained(rank: int, world: int, engine: str, accumulate: int) -> tuple[int, float, int]:
    """What a rank holds (numbers) and sends (bytes a step, counted by the kernel), and how many bytes of gradient DDP reduces."""
    trainer = trainer_of(engine, rank, world, accumulate)
    held = sum(trainer.engine.part(name).numel() for name in trainer.engine.names())
    reduced = [0]
    if engine == "ddp":

        def hook(_, bucket):  # DDP accepts no other annotations than its own
            reduced[0] += bucket.buffer().nbytes
            return torch.distributed.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda future: future.value()[0])

        trainer.engine.wrapped.register_comm_hook(None, hook)
    sent, summed = [], []
    for _ in trainer:
        torch.distributed.barrier()
        sent.append(sent_bytes() or 0)
        summed.append(reduced[0])
    # The first step has the pass before it that lays out DDP's buckets, the last one writes the log.
    return held, (sent[-2] - sent[1]) / (len(sent) - 3), (summed[-1] - summed[0]) // (len(summed) - 1)


def counted(world: int, accumulate: int) -> Counts:
    training = settings(world, accumulate)
    micro = next(iter(Rows("abc", mixed("abc"), batch_size=training.batch_size, world=world, accumulate=accumulate)))[0]
    return count(objective(), micro, training, repeats=1)


@pytest.mark.skipif(sent_bytes() is None, reason="the system does not tell what a connection sent")
@pytest.mark.parametrize(
    ("engine", "world", "accumulate"),
    [("ddp", 3, 1), ("ddp", 2, 2), ("fsdp2", 3, 1), ("fsdp2", 2, 2), ("zero1", 2, 2), ("zero2", 2, 2), ("zero3", 2, 2)],
)
def test_a_rank_holds_and_sends_what_the_plan_says(engine: Any, world: int, accumulate: int) -> None:
    needs(engine)
    found = run_ranks(trained, world, engine, accumulate)
    counts, training = counted(world, accumulate), settings(world, accumulate)
    expected = traffic(counts, training, engine)
    for _, sent, reduced in found:
        assert sent == pytest.approx(expected.sent(world, backend="gloo"), rel=0.02)
        assert reduced == (expected.all_reduce if engine == "ddp" else 0)
    assert 4 * found[0][0] == memory(counts, training, engine, world=world).weights


def test_zero3_counts_small_parameters_as_kept() -> None:
    assert any(prod(shape) < PERSISTENT for unit in counted(2, 1).units for shape in unit.shapes)
    assert any(prod(shape) >= PERSISTENT for unit in counted(2, 1).units for shape in unit.shapes)


# ---- traffic and speed ------------------------------------------------------------------------------------------------------------------


def test_traffic_is_three_times_the_weights_where_each_network_runs_once() -> None:
    units = (Unit("x.encoder", ((100, 10),), 1, 1), Unit("x.decoder", ((10, 100),), 1, 1))
    once = replace(COUNTS, parameters={"x": 2000}, trainable=2000, units=units)
    for world in (2, 8, 64):
        ring = (world - 1) / world * 4 * 2000
        assert traffic(once, TRAINING, "fsdp2").sent(world) == pytest.approx(3 * ring)
        assert traffic(once, TRAINING, "ddp").sent(world) == pytest.approx(2 * ring)
    assert Traffic(10, 10, 10).sent(1) == 0


def test_a_model_too_large_to_stay_gathered_is_gathered_again_by_zero3() -> None:
    large = replace(COUNTS, parameters={"x": 2 * 10**9}, trainable=2 * 10**9, units=(Unit("x.decoder", ((2 * 10**9,),), 2, 1),))
    assert traffic(large, TRAINING, "zero3").all_gather == 3 * 8 * 10**9
    assert memory(large, TRAINING, "zero3", world=8).gathered == 4 * (BUCKET + 10**9)


def test_rows_a_second_by_hand() -> None:
    """A step of 24 rows on 2 ranks: 12 rows each take .2 s; 480 bytes at 1,000 a second take .48 s, of which half of .2 s is hidden."""
    slow = Machine(seconds=0.1, bandwidth=1000)
    assert rows_per_second(COUNTS, TRAINING, "ddp", world=2, machine=slow) == pytest.approx(24 / (0.2 + 0.48 - 0.1))
    assert rows_per_second(COUNTS, TRAINING, "ddp", world=1, machine=slow) == pytest.approx(24 / 0.4)
    two = replace(TRAINING, accumulate=2)  # DDP hides behind the last of two micro batches alone, FSDP2 behind both
    assert rows_per_second(COUNTS, two, "ddp", world=2, machine=slow) == pytest.approx(24 / (0.2 + 0.48 - 0.05))
    sent = traffic(COUNTS, two, "fsdp2").sent(2) / 1000
    assert rows_per_second(COUNTS, two, "fsdp2", world=2, machine=slow) == pytest.approx(24 / (0.2 + sent - 0.1))
    computed = machine_of(COUNTS, bandwidth=1000, flops_per_second=1e4)
    assert (computed.seconds, computed.measured, machine_of(COUNTS, bandwidth=1000).measured) == (0.1, False, True)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_more_ranks_never_train_slower_hold_more_or_send_less_at_a_fixed_share_of_rows(strategy: Any) -> None:
    plans = [plan.plan(COUNTS, Training(batch_size=ROWS * world), world=world, machine=Machine(1e-3, 1e6)) for world in (2, 4, 8, 64, 512)]
    lines = [next(line for line in planned.lines if line.strategy == strategy) for planned in plans]
    for few, many in zip(lines[:-1], lines[1:], strict=True):
        assert many.rows_per_second > few.rows_per_second and many.sent > few.sent and many.memory.device <= few.memory.device
    alone = rows_per_second(COUNTS, Training(batch_size=ROWS), strategy, world=1, machine=Machine(1e-3, 1e6))
    assert lines[-1].rows_per_second <= 512 * alone


@pytest.mark.parametrize("wrong", [{"seconds": 0.0}, {"bandwidth": -1.0}, {"overlap": 1.5}])
def test_a_machine_without_speed_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected seconds and bandwidth above 0"):
        Machine(**{"seconds": 1.0, "bandwidth": 1.0} | wrong)
    with pytest.raises(ValueError, match="world: expected at least 1 rank, got 0"):
        plan.plan(COUNTS, TRAINING, world=0, machine=MACHINE)


def test_the_table_has_a_line_for_each_strategy_and_the_notes_say_what_it_rests_on() -> None:
    planned = plan.plan(COUNTS, TRAINING, world=4, machine=MACHINE)
    head, *lines = plan.table(planned)
    assert [line[0] for line in lines] == list(STRATEGIES) and {len(line) for line in lines} == {len(head)}
    assert dict(zip(head, lines[0], strict=True))["sent a step"] == "720 B"
    told = dict(plan.notes(planned))
    assert told["parameters"] == "120 (x 70, y 50), 120 trained" and told["step"] == "24 rows: 4 ranks x 1 x 6"
    assert "estimate" in told["rows/s"] and "timed on this machine" in told["rows/s"]
    assert planned.flops == 4000


def test_bytes_are_written_for_people() -> None:
    cases: dict[float, str] = {
        0: "-",
        950: "950 B",
        1234: "1.2 kB",
        123_456: "123 kB",
        9.96e8: "996 MB",
        1.5e9: "1.5 GB",
        2.5e13: "25.0 TB",
    }
    assert {number: plan.size(number) for number in cases} == cases
