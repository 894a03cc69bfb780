"""The scaling figures say what is true: formulas by hand, counted bytes against known ones, and simulated rows never without that word."""

import itertools
import math
import random
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd import DeviceType

from benchmarks import breakdown, digits, scaling, targets
from benchmarks.breakdown import length, minus, union
from benchmarks.network import Compute, Network, all_reduce, line_through, ring, step
from benchmarks.ranks import run_ranks, sent_bytes
from benchmarks.step import counted
from meme_dist.train.trainer import Trainer, Training
from tests.trainings import Rows, build, mixed

GPUS = (8, 16, 64, 256, 1024)
MEASURED = Compute(1e-3, 1e-4)


# ---- the network model ------------------------------------------------------------------------------------------------------------------


def played(size: float, ranks: int, alpha: float, beta: float) -> float:
    """Seconds of a ring all-reduce played message by message: pieces are handed on until every rank has the whole sum of each."""
    holds = [{piece: {rank} for piece in range(ranks)} for rank in range(ranks)]  # whose summands a rank's piece contains
    seconds = 0.0
    while any(len(summands) < ranks for rank in holds for summands in rank.values()):
        turn = round(seconds / (alpha + size / ranks / beta))
        sent = [(rank, (rank - turn) % ranks) for rank in range(ranks)]
        moved = [((rank + 1) % ranks, piece, set(holds[rank][piece])) for rank, piece in sent]
        for rank, piece, summands in moved:
            holds[rank][piece] |= summands
        seconds += alpha + size / ranks / beta
    return seconds


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
def test_a_ring_takes_as_long_as_one_played_message_by_message(ranks: int) -> None:
    assert ring(1e6, ranks, alpha=1e-3, beta=1e9) == pytest.approx(played(1e6, ranks, 1e-3, 1e9))


def test_nodes_reduce_inside_then_between_then_gather_inside() -> None:
    network = Network(gpus=4, inside=100.0, between=10.0, alpha=1.0)
    # inside: 6 messages and 2 * 3/4 * 200 bytes at 100; between 3 nodes: 4 messages and 2 * 2/3 * 200 bytes at 10
    assert all_reduce(200, 12, network) == pytest.approx(6 + 3 + 4 + 26.6667, abs=1e-3)
    assert all_reduce(200, 4, network) == ring(200, 4, alpha=1.0, beta=100.0) == 9
    assert all_reduce(200, 1, network) == 0


def test_a_world_that_is_no_whole_number_of_nodes_is_refused() -> None:
    with pytest.raises(ValueError, match="expected up to 8 GPUs or a multiple of 8, got 12"):
        all_reduce(1.0, 12, Network())
    with pytest.raises(ValueError, match="speeds above 0"):
        Network(inside=0.0)


def test_communication_hides_behind_its_share_of_the_computing_and_no_more() -> None:
    network = Network(gpus=2, inside=100.0, alpha=0.0, overlap=0.25)
    hidden, shown = step(8.0, 200, 2, network), step(4.0, 200, 2, network)  # 2 s of communication
    assert (hidden.exposed, hidden.seconds) == (0, 8) and (shown.exposed, shown.seconds) == (1, 5)


def test_computing_time_is_the_line_through_two_measurements() -> None:
    assert line_through((10, 2.0), (30, 3.0)) == Compute(1.5, 0.05)
    assert line_through((10, 3.0), (30, 2.0)) == Compute(2.0, 0.0)  # noise
    assert line_through((10, 1.0), (30, 4.0)) == Compute(0.0, 0.15)


def curve(kind: str, network: Network = scaling.ASSUMED) -> list[dict[str, Any]]:
    return [row for row in scaling.curve(MEASURED, "measured: here", 4 * 10**8, GPUS, 128, network) if row["scaling"] == kind]


def test_every_simulated_row_says_so_in_the_file_and_in_the_table(capsys: Any) -> None:
    rows = curve("weak") + curve("strong")
    assert all(row["label"] == "SIMULATED" and row["part"] == "simulated" and row["network_alpha"] == 10e-6 for row in rows)
    scaling.show(rows)
    head, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(rows) and all(line.startswith("SIMULATED") for line in lines) and "label" in head


@pytest.mark.parametrize("kind", ["weak", "strong"])
def test_efficiency_only_falls_with_more_gpus_and_a_network_without_cost_keeps_weak_scaling_whole(kind: str) -> None:
    efficiencies = [row["efficiency"] for row in curve(kind)]
    assert 1 >= efficiencies[0] and all(a >= b for a, b in itertools.pairwise(efficiencies)) and efficiencies[-1] < efficiencies[0]
    free = [row["efficiency"] for row in curve(kind, Network(inside=math.inf, between=math.inf, alpha=0.0))]
    assert (set(free) == {1.0}) == (kind == "weak")  # strong scaling pays the fixed part of a step everywhere


def test_strong_scaling_divides_the_rows_and_ends_where_a_gpu_has_none() -> None:
    rows = {row["world"]: row for row in curve("strong")}
    assert {world: row["rows_per_gpu"] for world, row in rows.items()} == {8: 128, 16: 64, 64: 16, 256: 4, 1024: 1}
    assert rows[16]["compute_ms"] == pytest.approx(1 + 64 * 0.1)
    few = scaling.curve(MEASURED, "", 1, GPUS, 8, scaling.ASSUMED)
    assert [row["world"] for row in few if row["scaling"] == "strong"] == [8, 16, 64]


# ---- modalities -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [2, 4, 8, 16, 32])
def test_rows_observe_two_modalities_each_whatever_their_number(number: int) -> None:
    observed = scaling.sparse_batch(number, 64).observed
    assert observed.shape == (64, number) and bool((observed.sum(1) == 2).all())
    assert observed.sum(0).max() - observed.sum(0).min() <= 2
    pairs = {tuple(row.nonzero().flatten().tolist()) for row in observed}
    assert len(pairs) == min(number * (number - 1) // 2, 64) or number in (8, 16)


def test_decoders_see_equally_many_rows_whatever_the_number_of_modalities() -> None:
    work = {}
    for number in (2, 4, 8):
        model, batch = scaling.model(number), scaling.sparse_batch(number, 64)
        work[number] = counted(
            lambda model=model, batch=batch: model(batch).total.backward(), {n: model.modality(n) for n in batch.modalities}
        )
    assert {(w["encoder_rows"], w["decoder_rows"]) for w in work.values()} == {(128, 128 * 11 + 256)}


def test_decodings_of_complete_rows_grow_with_the_square_of_the_modalities_or_in_a_line_where_targets_are_drawn() -> None:
    found = {(row["form"], row["modalities"]): row["decoder_rows"] for number in (3, 5) for row in targets.measured(number, (1, 2), 4, 1)}
    expected = {("meme", n): 4 * n * n for n in (3, 5)} | {(name, n): 4 * n for name in ("mopoe", "mvtcae") for n in (3, 5)}
    drawn = {("meme, 1 drawn", 3): 4 * 3 * 2, ("meme, 1 drawn", 5): 4 * 5 * 2, ("meme, 2 drawn", 5): 4 * 5 * 3}
    assert found == expected | drawn


# ---- ranks ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sent_bytes() is None, reason="the system does not tell what a connection sent")
def test_sent_bytes_are_those_of_a_known_transfer_and_not_what_came_back() -> None:
    child = "import socket, sys; s = socket.create_connection(('127.0.0.1', int(sys.argv[1]))); "
    child += "[s.recv(12_345, socket.MSG_WAITALL) for _ in range(10)]; s.sendall(b'y' * 100); s.recv(1)"
    with socket.create_server(("127.0.0.1", 0)) as server:
        other = subprocess.Popen([sys.executable, "-c", child, str(server.getsockname()[1])])
        with server.accept()[0] as connection:
            before = sent_bytes()
            for _ in range(10):
                connection.sendall(b"x" * 12_345)
            connection.recv(100, socket.MSG_WAITALL)
            assert sent_bytes() - before == 10 * 12_345
        assert other.wait(30) == 0


def test_a_rank_that_fails_is_named_with_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="rank 0 of 2: (.|\n)*math domain error"):
        run_ranks(math.log, 2, timeout=60)  # of its rank, 0, to the base 2


@pytest.mark.skipif(sent_bytes() is None, reason="the system does not tell what a connection sent")
def test_two_ranks_send_the_bytes_of_the_plan(tmp_path: Path) -> None:
    shards = digits.write(tmp_path / "digits")
    row = scaling.measured(2, shards, Training(steps=scaling.WARM + 4, batch_size=16))
    assert row["sent_bytes"] == pytest.approx(row["planned_bytes"], rel=0.02) and row["planned_bytes"] > 10**6
    assert row["rows_per_second"] == pytest.approx(16e3 / row["ms"], rel=0.01) and row["ms_p20"] <= row["ms"] <= row["ms_p80"]


def test_efficiency_is_rows_a_second_of_a_rank_against_the_first() -> None:
    first = {"world": 1, "rows_per_second": 100}
    assert scaling._efficiency({"world": 4, "rows_per_second": 300}, first) == 0.75


# ---- breakdown --------------------------------------------------------------------------------------------------------------------------


def test_union_and_difference_of_intervals_are_those_of_their_points() -> None:
    draw = random.Random(0)
    for _ in range(200):
        left, right = ([(a, a + draw.randint(1, 4)) for a in draw.choices(range(20), k=draw.randint(0, 5))] for _ in range(2))
        points = [{x for a, b in side for x in range(a, b)} for side in (left, right)]
        assert length(union(left)) == len(points[0])
        rest = minus(union(left), union(right))
        assert {x for a, b in rest for x in range(int(a), int(b))} == points[0] - points[1] and length(rest) == len(points[0] - points[1])


def event(name: str, start: float, end: float, *, parent: Any = None, device: Any = DeviceType.CPU, annotation: bool = False) -> Any:
    span = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
    return SimpleNamespace(name=name, time_range=span, cpu_parent=parent, device_type=device, is_user_annotation=annotation)


def test_a_cpu_step_is_summed_up_by_range_and_gloo_is_exposed_where_no_operator_runs() -> None:
    forward, outer = event("meme/forward", 0, 4000), event("aten::linear", 0, 3000)
    events = [forward, outer, event("aten::addmm", 500, 2500, parent=outer), event("meme/backward", 4000, 8000)]
    events += [event("aten::mm", 5000, 6000), event("gloo:all_reduce", 5500, 7500), event("gloo:all_reduce", 7000, 7800)]
    found = breakdown.summary(events, 10.0)
    assert (found["forward_ms"], found["backward_ms"], found["update_ms"], found["other_ms"]) == (4, 4, 0, 2)
    assert found["collective_ms"] == pytest.approx(2.3) and found["exposed_ms"] == pytest.approx(1.8)
    assert found["operator_calls"] == 2 and found["kernel_launches"] == 0


def test_a_cuda_step_counts_launches_and_nccl_is_exposed_where_no_other_kernel_runs() -> None:
    events = [event("cudaLaunchKernel", 0, 10), event("cudaLaunchKernelExC", 10, 20), event("cudaMemcpyAsync", 20, 30)]
    events += [event("gemm", 0, 2000, device=DeviceType.CUDA), event("ncclDevKernel_AllReduce", 1000, 5000, device=DeviceType.CUDA)]
    events += [event("Memcpy HtoD (Pinned -> Device)", 3000, 4000, device=DeviceType.CUDA)]
    events += [event("meme/forward", 0, 9000, device=DeviceType.CUDA, annotation=True), event("meme/forward", 0, 1000)]
    events += [event("nccl:all_reduce", 900, 6000, device=DeviceType.CUDA, annotation=True)]
    found = breakdown.summary(events, 9.0)
    assert (found["collective_ms"], found["exposed_ms"], found["copy_ms"], found["forward_ms"]) == (4, 3, 1, 1)
    assert found["kernel_launches"] == 2


def test_ranges_of_a_real_training_fill_the_step_and_without_them_all_is_other(monkeypatch: Any) -> None:
    def profiled() -> dict[str, float]:
        stream = Rows("ab", mixed("ab"), batch_size=8)
        return breakdown.profiled(Trainer(build("ab"), stream, Training(steps=24, batch_size=8, log_every=100)), 3)

    found = profiled()
    spent = sum(found[f"{name}_ms"] for name in breakdown.RANGES)
    assert 0.5 * found["wall_ms"] < spent <= found["wall_ms"] + 0.01 and min(found["forward_ms"], found["backward_ms"]) > 0
    assert found["operator_calls"] > 50 and found["collective_ms"] == found["exposed_ms"] == 0
    monkeypatch.setattr(breakdown, "PREFIX", "absent/")
    found = profiled()
    assert found["other_ms"] == pytest.approx(found["wall_ms"], abs=0.01) and found["forward_ms"] == 0


def test_a_breakdown_is_told_in_a_line_for_each_number_of_ranks(capsys: Any) -> None:
    breakdown.show([{"part": "breakdown", "world": world, "wall_ms": 12.345, "data_ms": 0.0} for world in (1, 2)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].split() == ["1", "12.35", "0"] or lines[-2].split() == ["1", "12.34", "0"]
    assert lines[-3].split() == ["world", "wall", "data"]


def test_peak_memory_and_the_table_of_modalities(capsys: Any) -> None:
    rows = scaling.against_modalities(numbers=(2, 3), rows=16, repeats=1)
    assert [row["entries"] for row in rows] == [32, 32] and rows[1]["parameters"] == 1.5 * rows[0]["parameters"]
    assert all(row["peak_mb"] >= row["saved_mb"] > 0 for row in rows)
    scaling.show(rows)
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert torch.is_tensor(scaling.sparse_batch(2, 4).observed) and np.isfinite(rows[0]["ms"])
