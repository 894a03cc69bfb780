"""The kernel benchmark's rows as text: what a run prints, and results/kernels.md from the newest row of each figure."""

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import meme_kernels
from benchmarks.record import RESULTS

Row = dict[str, Any]
RESOURCES = Path(meme_kernels.__file__).parents[1] / "resources.json"
CPU_NOTE = (
    "On a CPU this compares the references with the naive forms, and their memory. It shows nothing of the Triton kernels: not their\n"
    "speed, share of the bandwidth, launches or registers. The copy bandwidth is that of the threads given; a cache can exceed it."
)
COLUMNS = {
    "case": "case",
    "mode": "mode",
    "provider": "provider",
    "ms": "ms (p20 .. p80)",
    "device_ms": "device ms",
    "cpu_ms": "CPU ms",
    "gb_s": "GB/s",
    "percent_of_copy": "% of copy",
    "gflop_s": "GFLOP/s",
    "peak_bytes": "peak MB",
    "host_us": "host us",
    "first_s": "first s",
    "registers": "registers",
    "spilled": "spilled B",
}


def newest() -> list[Row]:
    """The newest row of each figure: device and its threads, op, case, mode and provider."""
    path = RESULTS / "kernels.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    names = ("kind", "device", "threads", "op", "case", "mode", "provider")
    found = {tuple(row[name] for name in names): row for row in rows}
    return list(found.values())


def setups(rows: Iterable[Row]) -> Iterator[tuple[str, list[Row]]]:
    """The rows of each device and number of threads, with its title: only these may stand side by side."""
    return _grouped(rows, lambda row: f"{row['device']} ({row['kind']}, threads {row['threads']})")


def show(rows: list[Row]) -> None:
    """Print the rows of one op."""
    print(f"\n== {rows[0]['op']}")
    lines = list(_cells(rows))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        print("  ".join(line[i].ljust(widths[i]) if i < 3 else line[i].rjust(widths[i]) for i in range(len(line))))


def write() -> Path:
    """Write results/kernels.md anew."""
    rows, path = newest(), RESULTS / "kernels.md"
    parts = ["# Kernels\n\nThe newest row of each figure in `kernels.jsonl`, written by `python -m benchmarks kernels`.\n"]
    parts.append("How figures are taken, and what they do not show: `../README.md`.\n")
    if all(row["kind"] == "cpu" for row in rows):
        parts.append("\n**Not measured on a GPU yet.**\n")
    for title, own in setups(rows):
        parts += [f"\n## {title}\n\n{_provenance(own)}\n", *_side_by_side(own)]
        for op, some in _grouped([row for row in own if row["size"] != "sweep"], itemgetter("op")):
            parts.append(f"\n### {op}\n\n{_markdown(_cells(some))}")
    path.write_text("".join(parts), encoding="utf-8")
    return path


def resources(op: str, target: str) -> Row:
    """Registers a thread and spilled bytes of the op's float32 kernels for a target (sm_90), the most of any, as compiled ahead of time."""
    if not RESOURCES.is_file():
        return {}
    table = json.loads(RESOURCES.read_text(encoding="utf-8"))["rows"]
    rows = [row for row in table if (row["op"], row["target"], row["dtype"]) == (op, target, "float32")]
    return {"registers": max(row["registers"] for row in rows), "spilled": max(row["spilled"] for row in rows)} if rows else {}


def _grouped(rows: Iterable[Row], key: Callable[[Row], str]) -> Iterator[tuple[str, list[Row]]]:
    """In the order of the names; within a group as they were measured."""
    for name, group in groupby(sorted(rows, key=key), key=key):
        yield name, list(group)


def _provenance(rows: list[Row]) -> str:
    def said(key: str) -> str:
        return ", ".join(sorted({str(row[key]) for row in rows if row.get(key) is not None}))

    keys = ("driver", "cuda", "torch", "triton", "python", "commit", "date", "copy_gb_s")
    return "; ".join(f"{key.replace('copy_gb_s', 'copy GB/s')} {said(key)}" for key in keys if said(key))


def _cells(rows: list[Row]) -> Iterator[list[str]]:
    keys = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    yield [COLUMNS[key] for key in keys]
    for row in rows:
        yield [_cell(row, key) for key in keys]


def _cell(row: Row, key: str) -> str:
    value = row.get(key)
    if key == "ms":
        return f"{_short(row['ms'])} ({_short(row['ms_p20'])} .. {_short(row['ms_p80'])})"
    if key == "peak_bytes" and value is not None:
        return _short(value / 1e6)
    return "" if value is None else value if isinstance(value, str) else _short(value)


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def _markdown(lines: Iterable[list[str]], words: int = 3) -> str:
    """A table whose first columns are words, the others figures."""
    head, *body = lines
    aligned = ["---" if i < words else "---:" for i in range(len(head))]
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, aligned, *body))


def _side_by_side(rows: list[Row]) -> Iterator[str]:
    """Naive forms beside the references along the sweeps: forward and backward pass, CPU time where it was taken."""
    lines = [["op", "case", "naive ms", "reference ms", "ratio", "naive MB", "reference MB", "ratio"]]
    swept = [row for row in rows if row["size"] == "sweep"]
    pairs = {(row["op"], row["case"], row["mode"]): {} for row in swept}
    for row in swept:
        pairs[row["op"], row["case"], row["mode"]][row["provider"]] = row
    for (op, case, _), by in pairs.items():
        if {"naive", "reference"} <= by.keys():
            (a, b), (x, y) = ([by[name].get("cpu_ms") or by[name]["ms"] for name in ("naive", "reference")], _peaks(by))
            lines.append([op, case.split(": ")[1], *map(_short, (a, b, a / b, x / 1e6, y / 1e6, x / y))])
    if len(lines) > 1:
        yield f"\n### Naive forms beside the references, forward and backward\n\n{_markdown(lines, 2)}"


def _peaks(by: dict[str, Row]) -> tuple[int, int]:
    return by["naive"]["peak_bytes"], by["reference"]["peak_bytes"]
