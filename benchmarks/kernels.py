"""Every kernel op: time, memory and share of the copy bandwidth of each way to compute it, side by side in one run.

A provider is timed only after its values and gradients were compared with the naive form in float64, at the op's small cases, and with the
reference at the case that is timed. An op with a wrong provider is not reported, and the exit status is 1.
"""

import sys
import time
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, Literal, TypeVar

import torch
from torch.utils._pytree import tree_leaves

from benchmarks import plots, sweeps, tables
from benchmarks.gate import Gate
from benchmarks.providers import GRAPH, MODES, Mode, copied, differentiable, ops, prepare, providers
from benchmarks.record import keep
from benchmarks.timing import MANY, Times, captured, copy_bandwidth, device_ms, fail_before_the_kernel_kills, peak_bytes, times
from meme_kernels._op import Case, Cost, FusedOp

Size = Literal["small", "paper", "large", "sweep"]
Row = dict[str, Any]
Functions = dict[str, Callable[..., Any]]
T = TypeVar("T")
SHORT = 0.1  # ms: a call that an event pair alone does not time well
WHOLE = 1 << 30  # bytes of inputs in a graph of many calls


def main(
    *,
    op: tuple[str, ...] = (),
    sizes: tuple[Size, ...] = ("small", "paper"),
    device: Literal["auto", "cpu", "cuda"] = "auto",
    repeats: int = 20,
    threads: int = 1,
    compiled: bool = False,
    limit: float = float("inf"),
    save: bool = True,
) -> None:
    """Forward, backward and both of every op by each provider; exit status 1 where a provider is wrong.

    Args:
        op: Which ops; all of them if none is named.
        sizes: Which of the ops' cases. `large` is for a GPU; `sweep` goes over N, K and M, at the sizes that are claimed for CPUs.
        device: Where; `auto` is CUDA where there is one.
        repeats: How often each call is timed, in turn; long calls less often.
        threads: CPU threads.
        compiled: Time torch.compile of the references too; it compiles for seconds at each case and pass, for minutes in all.
        limit: Seconds after which nothing more is begun; what was measured is kept.
        save: Append to benchmarks/results/kernels.jsonl, and write the table and the plots anew.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    where = torch.device("cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu"))
    if where.type == "cpu" and "large" in sizes:
        raise ValueError("the large cases are sized for a GPU; on a CPU say --sizes small, paper or sweep")
    if where.type == "cpu":
        fail_before_the_kernel_kills()
    deadline, ceiling = time.monotonic() + limit, copy_bandwidth(where)
    print(f"copy bandwidth of {where}: {ceiling:.1f} GB/s, read and written")
    gates = [Gate(chosen, providers(chosen, where, compiled=compiled)) for chosen in _chosen(op)]
    for size, gate in product(sizes, gates):  # sizes outside: when the time is up, every op has its first one
        if time.monotonic() > deadline:
            print(f"{gate.op.name}, {size}: left out, the time is up", file=sys.stderr)
            continue
        if not gate.small(where):  # just before the first figure: compiling what it compares takes longer than measuring
            continue
        rows: list[Row] = []
        try:
            for row in _rows(gate, size, where, repeats, deadline):
                rows.append(_priced(row, ceiling))
        finally:  # an interruption loses nothing that was measured
            if rows and not gate.faults:
                tables.show(rows)
                if save:
                    keep("kernels", rows, device=where, threads=threads)
    if save:
        print(f"\nkept in {tables.write()} and {plots.write()}")
    if where.type == "cpu":
        print(tables.CPU_NOTE)
    if faults := [fault for gate in gates for fault in gate.faults]:
        print("\nNOT reported, because a provider is wrong:", *faults, sep="\n  ")
        sys.exit(1)


def _chosen(names: tuple[str, ...]) -> list[FusedOp]:
    found = ops()
    if unknown := [name for name in names if name not in found]:
        raise ValueError(f"no op {', '.join(unknown)}; there are {', '.join(found)}")
    return [found[name] for name in names or found]


def _rows(gate: Gate, size: Size, device: torch.device, repeats: int, deadline: float) -> Iterator[Row]:
    op = gate.op
    for case in sweeps.cases(op.name, device) if size == "sweep" else op.cases(size, device, torch.float32):
        able = gate.measured(case) if time.monotonic() < deadline else {}
        for mode in _modes(case, size):
            if time.monotonic() > deadline:
                print(f"{op.name} {case.label}, {mode}: left out, the time is up", file=sys.stderr)
                continue
            about = {"op": op.name, "size": size, "case": case.label, "mode": mode}
            cost = _cost(op, case, mode)
            for row in _measured(able, case, mode, device, repeats, deadline):
                first = gate.first[row["provider"], case.label]
                yield about | row | {"bytes": cost.read + cost.written, "flops": cost.flops, "first_s": first}


def _modes(case: Case, size: Size) -> tuple[Mode, ...]:
    if not differentiable(case):
        return ("forward",)
    return ("both",) if size == "sweep" else MODES


def _measured(functions: Functions, case: Case, mode: Mode, device: torch.device, repeats: int, deadline: float) -> Iterator[Row]:
    what = f"{case.label}, {mode}"
    calls = _able(functions, what, deadline, lambda name, function: _call(name, function, case, mode))
    peaks = _able(calls, what, deadline, lambda _, call: peak_bytes(call, device))
    found = times({name: calls[name] for name in peaks}, device, repeats)
    alone = _device_times(found, functions, case, mode, repeats, deadline)
    for name, x in found.items():
        # A graph took its memory when it was captured: its replay's peak says nothing.
        row = {"provider": name, **_figures(x), "peak_bytes": None if name == GRAPH else peaks[name]}
        yield row | ({"device_ms": alone[name]} if name in alone else {})


def _call(name: str, function: Callable[..., Any], case: Case, mode: Mode) -> Callable[[], Any]:
    if name != GRAPH:
        return prepare(function, case, mode)
    # On inputs of its own: those of another provider's backward pass, kept for timing, belong to a stream that no capture may touch.
    return captured([lambda: prepare(function, copied(case), mode)])


def _able(of: dict[str, T], what: str, deadline: float, make: Callable[[str, T], Any]) -> dict[str, Any]:
    """What is made of each, but for those that there is too little memory or time for, or that cannot be captured: they are named."""
    made = {}
    for name in list(of):
        if time.monotonic() > deadline:
            print(f"{what}, {name}: left out, the time is up", file=sys.stderr)
            continue
        try:
            made[name] = make(name, of[name])
        except RuntimeError as error:
            print(f"{what}, {name}: left out, {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
    return made


def _device_times(found: dict[str, Times], functions: Functions, case: Case, mode: Mode, repeats: int, deadline: float) -> dict[str, float]:
    """Time without gaps of all short calls, where one of them is very short or spends its time on the host; nothing on a CPU."""
    own = {name: x for name, x in found.items() if name != GRAPH and x.host is not None}
    if not any(x.p50 < SHORT or (x.host or 0) > 500 * x.p50 for x in own.values()):
        return {}
    short = {name: functions[name] for name, x in own.items() if x.p50 < 10 * SHORT}
    what = f"{case.label}, {mode}, in a graph of many calls"
    return _able(short, what, deadline, lambda _, function: _without_gaps(function, case, mode, repeats))


def _without_gaps(function: Callable[..., Any], case: Case, mode: Mode, repeats: int) -> float:
    size = sum(x.nbytes for x in tree_leaves(case.arguments) if isinstance(x, torch.Tensor))
    copies = [copied(case) for _ in range(max(1, min(MANY, WHOLE // max(size, 1))))]
    return device_ms([lambda c=c: prepare(function, c, mode) for c in copies], repeats)


def _figures(found: Times) -> Row:
    figures = {"ms": found.p50, "ms_p20": found.p20, "ms_p80": found.p80, "samples": found.samples}
    return figures | ({"cpu_ms": found.cpu} if found.host is None else {"host_us": found.host})


def _cost(op: FusedOp, case: Case, mode: Mode) -> Cost:
    passes = {"forward": [False], "backward": [True], "both": [False, True]}[mode]
    costs = [op.cost(*case.arguments, backward=backward, **case.settings) for backward in passes]
    return Cost(*(sum(part) for part in zip(*costs, strict=True)))


def _priced(row: Row, ceiling: float) -> Row:
    """With what the time amounts to; every figure to four digits."""
    ms = row.get("device_ms") or row["ms"]
    rate = row["bytes"] / 1e6 / ms
    more = {"gb_s": rate, "percent_of_copy": 100 * rate / ceiling, "gflop_s": row["flops"] / 1e6 / ms, "copy_gb_s": ceiling}
    if row["provider"].startswith("triton"):
        more |= tables.resources(row["op"], "sm_{}{}".format(*torch.cuda.get_device_capability()))
    return {key: float(f"{x:.4g}") if isinstance(x, float) else x for key, x in (row | more).items()}
