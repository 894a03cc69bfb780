"""The comparison with MultiVae as text: a row as it comes, and the table of all."""

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
CPU_CLOCK = ("cpu_ms", "cpu_ms_min", "rows_per_cpu_second")
GPU_CLOCK = ("ms", "ms_min", "rows_per_second")
COLUMNS = ("peak_mb", "saved_mb", "gflop", "encoder_rows", "decoder_rows")


def told(row: Row) -> str:
    """One row, as it comes."""
    what = f"{row['form']}: {row['model']}, N = {row['modalities']}, {row['missing']:.0%} missing, B = {row['batch_size']}"
    return f"{what}: {row['error'] if 'error' in row else ', '.join(f'{name} {row[name]}' for name in columns(row)[:4])}"


def columns(row: Row) -> tuple[str, ...]:
    """The figures of a row that are told."""
    clock = CPU_CLOCK if row["device"] == "cpu" else GPU_CLOCK
    return (clock[0], clock[2], *COLUMNS)


def show(rows: Sequence[Row]) -> None:
    """All rows as a table; `times` is rows a second over those of MultiVae in the same cell of the grid."""
    lines = [("model", "N", "missing", "B", "form", *(columns(rows[0]) if rows else ()), "times")]
    for row in rows:
        own = tuple("-" if "error" in row else f"{row[name]:g}" for name in columns(row))
        lines.append(
            (row["model"], *(f"{row[key]:g}" for key in ("modalities", "missing", "batch_size")), row["form"], *own, times(row, rows))
        )
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    print()
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def times(row: Row, rows: Sequence[Row]) -> str:
    """Rows a second over MultiVae's (a CPU's: of processor time); empty where one of the two is not there."""
    same = ("model", "modalities", "missing", "batch_size", "samples")
    peers = [
        other for other in rows if other["form"] == "multivae" and all(other[key] == row[key] for key in same) and "error" not in other
    ]
    rate = columns(row)[1]
    return f"{row[rate] / peers[-1][rate]:.2f}" if peers and "error" not in row else ""
