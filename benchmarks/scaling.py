"""How a training scales: with the ranks of this machine (measured), with the number of modalities (measured), with GPUs (simulated).

real         1 and more ranks of this machine through the real trainer and stream, engine DDP. Ranks are processes of one thread; they share
             the machine's memory bandwidth, so an efficiency below 1 is not the network's alone. Bytes are those of the ranks' connections.
modalities   N = 2 .. 32 modalities in one process, two entries a row whatever N is: what an added modality costs when no entry is added.
simulated    8 .. 1024 GPUs from measured or assumed computing time and the network model of benchmarks/network.py.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import digits
from benchmarks.network import Compute, Network, line_through, step
from benchmarks.ranks import rank_device, run_ranks, sent_bytes
from benchmarks.record import CPU, interleaved, keep
from benchmarks.step import batch_of, counted, networks
from benchmarks.timing import peak_bytes
from meme_dist.modalities.vector import mlp
from meme_dist.objectives.base import Objective
from meme_dist.objectives.meme import MEME
from meme_dist.record import processor
from meme_dist.train.counting import count
from meme_dist.train.plan import traffic
from meme_dist.train.trainer import Training
from meme_dist.types import Batch, pack

Rows = list[dict[str, Any]]
WARM = 4  # steps before the clock runs
SIMULATED = "SIMULATED"
ASSUMED = Network()
EVENT, WIDTH = 32, 128  # of each modality's vector, and of its networks


def main(
    *,
    ranks: tuple[int, ...] = (1, 2),
    modalities: tuple[int, ...] = (2, 4, 8, 16, 32),
    gpus: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512, 1024),
    rows: int = 128,
    steps: int = 30,
    repeats: int = 7,
    flops_per_second: float = 20e12,
    network: Network = ASSUMED,
    save: bool = True,
) -> None:
    """Throughput, bytes and cost against ranks and modalities, and a simulated cluster.

    Args:
        ranks: Processes to train with (none: leave this part out).
        modalities: Numbers of modalities (none: leave this part out).
        gpus: GPUs of the simulated cluster (none: leave this part out).
        rows: Rows a rank, and with strong scaling rows of all ranks together.
        steps: Steps that are timed.
        repeats: How often a step is timed in the other parts.
        flops_per_second: Assumed speed of a simulated GPU: reached, not peak.
        network: The simulated network.
        save: Append the rows to benchmarks/results/scaling.jsonl.
    """
    torch.set_num_threads(1)
    parts = (
        (real, bool(ranks), {"ranks": ranks, "rows": rows, "steps": steps}),
        (against_modalities, bool(modalities), {"numbers": modalities, "rows": rows // 2, "repeats": repeats}),
        (
            simulated,
            bool(gpus),
            {"gpus": gpus, "rows": rows, "repeats": repeats, "flops_per_second": flops_per_second, "network": network},
        ),
    )
    for part, wanted, keywords in parts:
        found = part(**keywords) if wanted else []
        show(found)
        if save and found:
            for device, own in groupby(found, device_of):
                print(f"kept in {keep('scaling', list(own), device=device, threads=1)}\n")


def device_of(row: Mapping[str, Any]) -> torch.device:
    """Where a row was measured: ranks may each have a GPU, the other parts time a CPU."""
    return rank_device(row["world"]) if row["part"] == "real" else CPU


# ---- ranks of this machine --------------------------------------------------------------------------------------------------------------


def real(*, ranks: Sequence[int], rows: int, steps: int) -> Rows:
    """Weak scaling (`rows` on each rank) and strong scaling (`rows` in all). Efficiency is against the first number of ranks."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        shards = digits.write(Path(folder) / "digits")
        for kind in ("weak", "strong"):
            own: Rows = []
            for world in ranks:
                training = Training(steps=WARM + steps, batch_size=rows * (world if kind == "weak" else 1), log_every=10**6)
                own.append({"part": "real", "scaling": kind, **measured(world, shards, training)})
            found += [row | {"efficiency": _efficiency(row, own[0])} for row in own]
    return found


def measured(world: int, shards: Path, training: Training) -> dict[str, Any]:
    """One training on `world` ranks: wall and processor time of a step, bytes that a rank sent beside the plan's."""
    results = run_ranks(timed, world, shards, training)
    walls, cpus, sent = (list(column) for column in zip(*results, strict=True))
    low, middle, high = (1e3 * float(np.percentile(walls[0], percent)) for percent in (20, 50, 80))
    objective = digits.objective(shards)
    micro = next(iter(digits.stream(shards, training, 0, world)))[0]
    expected = traffic(count(objective, micro, training, repeats=1), training, "ddp").sent(world, backend="gloo")
    return {
        "world": world,
        "batch_size": training.batch_size,
        "ms": round(middle, 2),
        "ms_p20": round(low, 2),
        "ms_p80": round(high, 2),
        "cpu_ms": round(1e3 * statistics.mean(cpus), 2),
        "rows_per_second": round(1e3 * training.batch_size / middle),
        "sent_bytes": round(statistics.mean(sent)) if world > 1 else 0,
        "planned_bytes": round(expected),
        "load": round(os.getloadavg()[0], 1),
    }


def timed(rank: int, world: int, shards: Path, training: Training) -> tuple[list[float], float, float]:
    """On a rank: wall time of each step, mean processor time and mean bytes sent, in seconds and bytes a step, after the first steps."""
    walls, then, start = [], time.perf_counter(), (0.0, 0)
    reports = iter(digits.trainer(shards, training, rank, world))
    for number, _ in enumerate(reports, 1):
        now = time.perf_counter()
        walls.append(now - then)
        then = now
        if number == WARM:
            start = (time.process_time(), sent_bytes() or 0)
        if number == training.steps - 1:  # the last step writes the log
            break
    steps = training.steps - 1 - WARM
    return walls[WARM:], (time.process_time() - start[0]) / steps, ((sent_bytes() or 0) - start[1]) / steps


def _efficiency(row: dict[str, Any], first: dict[str, Any]) -> float:
    """Rows a second of a rank, over those of a rank of the first row."""
    return round(row["rows_per_second"] / row["world"] / (first["rows_per_second"] / first["world"]), 3)


# ---- modalities -------------------------------------------------------------------------------------------------------------------------


def against_modalities(*, numbers: Sequence[int], rows: int, repeats: int) -> Rows:
    """A step of `rows` rows that each observe two of N modalities: time, rows that networks see, memory."""
    built = {number: model(number) for number in numbers}
    batches = {number: sparse_batch(number, rows) for number in numbers}
    steps = {str(number): _step(built[number], batches[number]) for number in numbers}
    times = interleaved(steps, repeats)
    found = []
    for number in numbers:
        work = counted(steps[str(number)], {name: built[number].modality(name) for name in built[number].modalities})
        sizes = {"parameters": sum(p.numel() for p in built[number].parameters()), "peak_mb": _peak(steps[str(number)])}
        entries = int(batches[number].observed.sum())
        found.append({"part": "modalities", "modalities": number, "rows": rows, "entries": entries, **times[str(number)], **work, **sizes})
    return found


def model(number: int) -> Objective:
    """MEME over `number` equal modalities."""
    torch.manual_seed(0)
    names = [f"x{index:02d}" for index in range(number)]
    return MEME({name: mlp((EVENT,), latent_dim=8, hidden=(WIDTH, WIDTH)) for name in names}, pseudo_inputs=4, samples=11)


def sparse_batch(number: int, rows: int) -> Batch:
    """Rows that observe two modalities each: every modality in turn with one that is 1, 2, ... places on, so that all are seen alike."""
    row = np.arange(rows)
    first, apart = row % number, 1 + (row // number) % (number - 1)
    observed = np.zeros((rows, number), dtype=bool)
    observed[row, first] = observed[row, (first + apart) % number] = True
    generator = torch.Generator().manual_seed(1)
    return pack(
        {f"x{i:02d}": torch.randn(int(n), EVENT, generator=generator) for i, n in enumerate(observed.sum(0))}, observed, single=False
    )


def _step(objective: Objective, batch: Batch) -> Callable[[], None]:
    optimizer = torch.optim.Adam(objective.parameters(), 1e-3)

    def call() -> None:
        optimizer.zero_grad()
        (objective(batch).total / len(batch.observed)).backward()
        optimizer.step()

    return call


def _peak(call: Callable[[], Any]) -> float:
    return round(peak_bytes(call, torch.device("cpu")) / 1e6, 2)


# ---- simulated --------------------------------------------------------------------------------------------------------------------------


def simulated(*, gpus: Sequence[int], rows: int, repeats: int, flops_per_second: float, network: Network) -> Rows:
    """Weak and strong scaling of the MNIST and SVHN networks, from the computing time of this machine and from that of an assumed GPU."""
    sizes, timings, flops = (rows // 4, rows), {}, 0
    objective = MEME(networks(torch.device("cpu")), pseudo_inputs=1, samples=11)
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    for size in sizes:
        micro = batch_of(size, torch.device("cpu"))
        counts = count(objective, micro, Training(batch_size=size), repeats=1)
        cost = interleaved({"step": lambda micro=micro: objective(micro).total.backward()}, repeats)["step"]
        timings[size], flops = cost["cpu_ms"] / 1e3, counts.flops
    origins = {
        f"measured: {processor()}, 1 thread": line_through((sizes[0], timings[sizes[0]]), (rows, timings[rows])),
        f"assumed: {flops_per_second / 1e12:g} TFLOP/s": Compute(0.0, flops / rows / flops_per_second),
    }
    return [row for origin, compute in origins.items() for row in curve(compute, origin, 4 * trained, gpus, rows, network)]


def curve(compute: Compute, origin: str, size: int, gpus: Sequence[int], rows: int, network: Network) -> Iterator[dict[str, Any]]:
    """Weak scaling with `rows` rows a GPU, and strong scaling with as many rows in all as the first number of GPUs has at that."""
    alone = compute(rows) / rows  # seconds a row on one GPU that talks to nobody
    for kind in ("weak", "strong"):
        for world in gpus:
            share = rows if kind == "weak" else rows * gpus[0] / world
            if share < 1:
                continue
            taken = step(compute(share), size, world, network)
            yield {
                "part": "simulated",
                "label": SIMULATED,
                "scaling": kind,
                "world": world,
                "rows_per_gpu": share,
                "compute": origin,
                "compute_ms": round(1e3 * taken.compute, 3),
                "communication_ms": round(1e3 * taken.communication, 3),
                "exposed_ms": round(1e3 * taken.exposed, 3),
                "rows_per_second": round(world * share / taken.seconds),
                "efficiency": round(alone * share / taken.seconds, 3),
                "gradient_bytes": size,
                **{f"network_{name}": value for name, value in vars(network).items()},
            }


# ---- telling ----------------------------------------------------------------------------------------------------------------------------

COLUMNS = {
    "real": ("scaling", "world", "batch_size", "ms", "cpu_ms", "rows_per_second", "efficiency", "sent_bytes", "planned_bytes", "load"),
    "modalities": ("modalities", "entries", "ms", "cpu_ms", "encoder_rows", "decoder_rows", "saved_mb", "peak_mb", "parameters"),
    "simulated": ("label", "compute", "scaling", "world", "rows_per_gpu", "compute_ms", "communication_ms", "exposed_ms", "efficiency"),
}


def show(rows: Rows) -> None:
    """One part as a table; simulated rows say so in their first column."""
    if not rows:
        return
    columns = COLUMNS[rows[0]["part"]]
    lines = [columns, *(tuple(str(row[name]) for name in columns) for row in rows)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(columns))]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
