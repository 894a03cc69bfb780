"""What a training would take before it is started: memory, traffic and rows a second under each strategy, for any number of ranks.

All of it is arithmetic on `counting.Counts`, one counted micro batch. P trained parameters of 4 bytes (float32 masters, also under
bf16 autocast), W ranks, a micro batches a step. Per rank:

                 weights   gradients   AdamW's moments   DeepSpeed's copy   average
    ddp          4 P       4 P         8 P               -                  4 P
    fsdp2        4 P / W   4 P / W *   8 P / W           -                  4 P / W
    zero1        4 P       4 P         8 P / W           4 P / W            4 P
    zero2        4 P       4 P / W     8 P / W           4 P / W            4 P
    zero3        4 P / W   4 P / W     8 P / W           -                  4 P / W
    ..._offload  the same (and DeepSpeed's copy) in host memory

    * and 4 P unsharded where a > 1: gradients are reduced with the last micro batch.

Numbers that a ring of W ranks carries a step, each rank sending (W - 1) / W times these bytes (an all-reduce twice):

    ddp          all-reduce 4 P
    zero1        all-reduce 4 P, all-gather 4 P        DeepSpeed reduces a bucket to all ranks, then keeps a share of it
    zero2        a times all-reduce 4 P, all-gather 4 P
    zero3        a times (all-gather and reduce-scatter 4 P); parameters under 10,000 numbers are gathered once, in the update
    fsdp2        reduce-scatter 4 P (a > 1: of each unit for each of its runs backwards), and in each of a micro batches an all-gather of
                 each unit for each of its runs, forwards and backwards

so fsdp2 sends 3 (W - 1) / W 4 P where each network runs once, and more where a decoder also runs without gradients (its prefetch then
gathers the last such decoder once more for nothing: torch 2.13, counted). Left out: padding, the loss and the gradient norm (some bytes),
temporaries of single operators. Counted bytes on 2 and 3 ranks agree with these to 2 % (tests/test_plan.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal, NamedTuple

from meme_dist.train.counting import REST, Counts, Unit
from meme_dist.train.engines.zero import BUCKET, PERSISTENT
from meme_dist.train.training import Training

Strategy = Literal["ddp", "fsdp2", "zero1", "zero2", "zero3", "zero3_offload"]
STRATEGIES: tuple[Strategy, ...] = ("ddp", "fsdp2", "zero1", "zero2", "zero3", "zero3_offload")
NUMBER = 4  # bytes of a parameter, of its gradient and of each of AdamW's two moments
MOMENTS = 2
LIVE = 1_000_000_000  # numbers that ZeRO-3 keeps gathered between forward and backward pass (stage3_max_live_parameters)


class Memory(NamedTuple):
    """Bytes of one rank. `gathered` is what communication needs beside: buckets, and shards put together while they are in use."""

    weights: int
    gradients: int
    moments: int
    copy: int  # DeepSpeed's own float32 copy of the shard that it updates
    average: int
    gathered: int
    activations: int
    host: int = 0  # of all these, what lies in host memory instead: offloaded

    @property
    def device(self) -> int:
        """Bytes on the device."""
        return sum(self[:-1]) - self.host


class Traffic(NamedTuple):
    """Bytes of the whole tensors that pass through each kind of collective in one optimiser step."""

    all_reduce: int = 0
    all_gather: int = 0
    reduce_scatter: int = 0

    def sent(self, world: int, *, backend: Literal["nccl", "gloo"] = "nccl") -> float:
        """Bytes that each of `world` ranks sends in rings: 2 (W - 1) / W for an all-reduce, (W - 1) / W for the others.

        gloo (torch 2.13) has no reduce-scatter of its own: it reduces to all.
        """
        scatter = 2 if backend == "gloo" else 1
        return (world - 1) / world * (2 * self.all_reduce + self.all_gather + scatter * self.reduce_scatter)


@dataclass(frozen=True)
class Machine:
    """Speeds of one rank, the ground of an estimate.

    Communication hides behind `overlap` of the computing time of the micro batches that it goes with (ddp and zero1: the last one;
    the others: all). The default is a guess on the careful side, not a measurement.
    """

    seconds: float  # forward and backward pass of one counted micro batch
    bandwidth: float  # bytes a second that a rank sends
    overlap: float = 0.5
    measured: bool = True  # seconds were timed here, not computed from FLOPs

    def __post_init__(self) -> None:
        if not (self.seconds > 0 and self.bandwidth > 0 and 0 <= self.overlap <= 1):
            raise ValueError(f"expected seconds and bandwidth above 0 and an overlap from 0 to 1, got {self}")


def machine_of(counts: Counts, *, bandwidth: float, flops_per_second: float | None = None, overlap: float = 0.5) -> Machine:
    """The machine that the micro batch was counted on, or one of `flops_per_second` (reached, not peak)."""
    if flops_per_second is None:
        return Machine(counts.seconds, bandwidth, overlap)
    return Machine(counts.flops / flops_per_second, bandwidth, overlap, measured=False)


class Line(NamedTuple):
    """One strategy of a plan."""

    strategy: Strategy
    memory: Memory
    sent: float  # bytes a rank sends in a step
    rows_per_second: float  # all ranks together


@dataclass(frozen=True)
class Plan:
    """What `training` would take on `world` ranks."""

    counts: Counts
    training: Training
    world: int
    machine: Machine
    lines: tuple[Line, ...]

    @property
    def micro_rows(self) -> float:
        """Rows of a micro batch on one rank."""
        return self.training.batch_size / (self.world * self.training.accumulate)

    @property
    def flops(self) -> float:
        """FLOPs of an optimiser step, on all ranks together."""
        return self.counts.flops / self.counts.rows * self.training.batch_size


def plan(counts: Counts, training: Training, *, world: int, machine: Machine, gpu: bool = False) -> Plan:
    """Price every strategy; on a `gpu` the step of one process alone is recorded. Raises ValueError for less than one rank."""
    if world < 1:
        raise ValueError(f"world: expected at least 1 rank, got {world}")
    lines = []
    for strategy in STRATEGIES:
        moved = traffic(counts, training, strategy)
        speed = rows_per_second(counts, training, strategy, world=world, machine=machine)
        lines.append(
            Line(strategy, memory(counts, training, strategy, world=world, recorded=gpu and training.graph), moved.sent(world), speed)
        )
    return Plan(counts, training, world, machine, tuple(lines))


def chunk(number: int, world: int, rank: int) -> int:
    """What rank `rank` of `world` holds of so many rows: ceil(number / world) each while they last, as torch and DeepSpeed cut."""
    size = -(-number // world)
    return max(0, min(size, number - rank * size))


def memory(counts: Counts, training: Training, strategy: Strategy, *, world: int, rank: int = 0, recorded: bool = False) -> Memory:
    """Bytes of one rank while it trains; rank 0 has the most. Activations are those counted, in proportion to the rows. `recorded`: on a
    GPU, where the step of one process alone is a CUDA graph.

    Frozen parameters count as weights alone. A share of the parameters is cut row by row (fsdp2), from one flat tensor (zero1, zero2) or
    tensor by tensor (zero3).
    """
    whole, part = counts.total, _part(counts, strategy, world, rank)
    trained = counts.trainable / max(1, whole)
    sharded_weights = strategy in ("fsdp2", "zero3", "zero3_offload")
    copied = strategy in ("zero1", "zero2", "zero3_offload")
    rows = training.batch_size / (world * training.accumulate)
    weights = NUMBER * (part if sharded_weights else whole)
    here = Memory(
        weights=weights + counts.buffers,
        gradients=_gradients(counts, training, strategy, part),
        moments=round(MOMENTS * NUMBER * trained * part),
        copy=round(NUMBER * trained * part) if copied else 0,
        average=weights if training.ema is not None else 0,
        gathered=_gathered(counts, strategy, world, recorded),
        activations=round(counts.activations * rows / counts.rows),
    )
    offloaded = here.weights - counts.buffers + here.gradients + here.moments + here.copy
    return here._replace(host=offloaded) if strategy == "zero3_offload" else here


def _part(counts: Counts, strategy: Strategy, world: int, rank: int) -> int:
    """Numbers that a rank updates."""
    shapes = [shape for unit in counts.units for shape in unit.shapes]
    if strategy == "ddp":
        return counts.total
    if strategy == "fsdp2":
        return sum(chunk(shape[0], world, rank) * prod(shape[1:]) for shape in shapes)
    if strategy in ("zero1", "zero2"):
        return chunk(counts.total, world, rank)
    return sum(chunk(prod(shape), world, rank) for shape in shapes)


def _gradients(counts: Counts, training: Training, strategy: Strategy, part: int) -> int:
    trained = counts.trainable / max(1, counts.total)
    shard = round(NUMBER * trained * part)
    if strategy in ("ddp", "zero1"):
        return NUMBER * counts.trainable
    return shard + NUMBER * counts.trainable if strategy == "fsdp2" and training.accumulate > 1 else shard


def _gathered(counts: Counts, strategy: Strategy, world: int, recorded: bool) -> int:
    """Buckets of gradients (ddp, ZeRO), and weights that are whole for a while: the unit in use and the next (fsdp2), all (zero3). A
    recorded step keeps the gradient of its pass beside the sum over passes."""
    if strategy == "ddp":
        return NUMBER * counts.trainable if world > 1 or recorded else 0
    if strategy == "fsdp2":
        first, second, *_ = [*sorted((unit.size for unit in counts.units if unit.name != REST), reverse=True), 0, 0]
        rest = sum(unit.size for unit in counts.units if unit.name == REST)
        return NUMBER * (rest + 2 * first + second)  # the largest one's gradient is whole too
    bucket = min(BUCKET, counts.trainable)
    live = min(LIVE, counts.total) if strategy.startswith("zero3") else 0
    return NUMBER * (bucket + live)


def traffic(counts: Counts, training: Training, strategy: Strategy) -> Traffic:
    """What the collectives of one optimiser step carry: the formulas at the top of this file."""
    trained, micro_batches = NUMBER * counts.trainable, training.accumulate
    if strategy == "ddp":
        return Traffic(all_reduce=trained)
    if strategy == "zero1":
        return Traffic(all_reduce=trained, all_gather=trained)
    if strategy == "zero2":
        return Traffic(all_reduce=micro_batches * trained, all_gather=trained)
    if strategy == "fsdp2":
        gathered = sum(unit.size * (unit.forwards + unit.backwards) for unit in counts.units)
        in_vain = next((unit.size for unit in reversed(counts.units) if unit.forwards > unit.backwards > 0), 0)
        backwards = sum(unit.size * max(1, unit.backwards) for unit in counts.units) if micro_batches > 1 else counts.total
        return Traffic(0, NUMBER * (micro_batches * gathered + in_vain), round(trained * backwards / counts.total))
    small, gathered = _gathers_of_zero3(counts.units, counts.total)
    return Traffic(all_gather=NUMBER * (micro_batches * gathered + small), reduce_scatter=micro_batches * trained)


def _gathers_of_zero3(units: tuple[Unit, ...], total: int) -> tuple[int, int]:
    """Numbers gathered in the update, and in each micro batch: once where all can stay until the backward pass, else for each run."""
    small = gathered = 0
    for unit in units:
        kept = sum(size for size in map(prod, unit.shapes) if size < PERSISTENT)
        small += kept
        gathered += (unit.size - kept) * (1 if total <= LIVE else unit.forwards + unit.backwards)
    return small, gathered


def rows_per_second(counts: Counts, training: Training, strategy: Strategy, *, world: int, machine: Machine) -> float:
    """Rows of all ranks a second: batch_size / (computing + what of the communication does not hide behind it).

    computing = a * seconds in proportion to the rows; communication = bytes sent / bandwidth; hidden is at most `overlap` of the computing
    time that the communication goes with. The update itself and the loader are not in it.
    """
    micro = machine.seconds * training.batch_size / (world * training.accumulate) / counts.rows
    computing = training.accumulate * micro
    covered = micro if strategy in ("ddp", "zero1") else computing
    communication = traffic(counts, training, strategy).sent(world) / machine.bandwidth
    return training.batch_size / (computing + max(0.0, communication - machine.overlap * covered))


# ---- telling ----------------------------------------------------------------------------------------------------------------------------

SIZES = ("weights", "gradients", "moments", "copy", "average", "gathered", "activations", "device", "host")  # of `Memory`


def table(planned: Plan) -> list[tuple[str, ...]]:
    """The plan as rows of text, the names of the columns first: bytes of one rank, then speed."""
    lines: list[tuple[str, ...]] = [("strategy", *SIZES, "sent a step", "rows/s")]
    for line in planned.lines:
        sizes = (getattr(line.memory, name) for name in SIZES)
        lines.append((line.strategy, *map(size, sizes), size(line.sent), f"{line.rows_per_second:,.0f}"))
    return lines


def notes(planned: Plan) -> Iterator[tuple[str, str]]:
    """What the table rests on, as pairs of a name and a text."""
    counts, machine = planned.counts, planned.machine
    each = ", ".join(f"{name} {number:,}" for name, number in counts.parameters.items())
    origin = "timed on this machine" if machine.measured else "computed from its FLOPs"
    yield "parameters", f"{counts.total:,} ({each}), {counts.trainable:,} trained"
    yield "step", f"{planned.training.batch_size} rows: {planned.world} ranks x {planned.training.accumulate} x {planned.micro_rows:g}"
    yield "FLOPs a step", f"{planned.flops:.3g} (matrix products and convolutions, forwards and backwards)"
    estimate = (
        f"an estimate: a micro batch of {counts.rows} rows takes {1e3 * machine.seconds:.3g} ms ({origin}), a rank sends up to "
        f"{machine.bandwidth / 1e9:g} GB/s, {machine.overlap:.0%} of the computing time can hide it; loader and update left out"
    )
    yield "rows/s", estimate


def size(number: float) -> str:
    """Bytes for people: 950 B, 1.2 MB; powers of ten. Nothing is written as a dash."""
    if not number:
        return "-"
    for unit in ("B", "kB", "MB", "GB"):
        if number < 999.5:
            return f"{number:.0f} {unit}" if number >= 99.5 or unit == "B" else f"{number:.2g} {unit}"
        number /= 1000
    return f"{number:,.1f} TB"
