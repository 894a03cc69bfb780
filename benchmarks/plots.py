"""Three pictures of the newest rows: share of the copy bandwidth against size, cost against N, K and M, what the host spends a call."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS
from benchmarks.tables import newest, setups

Row = dict[str, Any]
COLOURS = {"naive": "#b4593b", "reference": "#4c78a8", "compiled": "#72a98f", "triton": "#222222", "triton graph": "#9a7fb8"}


def write() -> Path:
    """Draw all that there are rows for, one file a setup and picture, into results/plots."""
    folder, rows = RESULTS / "plots", newest()
    folder.mkdir(parents=True, exist_ok=True)
    for title, own in setups(rows):
        stem = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
        _roofline([row for row in own if row["size"] != "sweep" and row["mode"] == "both"], title, folder / f"{stem}-roofline.png")
        _sweep([row for row in own if row["size"] == "sweep"], title, folder / f"{stem}-sweep.png")
        _host([row for row in own if row.get("host_us") and row["mode"] == "both"], title, folder / f"{stem}-host.png")
    return folder


def _roofline(rows: list[Row], title: str, path: Path) -> None:
    def draw(axes: Any, panel: str) -> None:
        _lines(axes, [row for row in rows if row["op"] == panel], lambda row: row["bytes"], lambda row: row["percent_of_copy"])
        axes.axhline(100, color="#999999", linewidth=0.8)
        axes.set(title=panel, xlabel="bytes (least)", ylabel="% of copy bandwidth", xscale="log", yscale="log")

    _panels(sorted({row["op"] for row in rows}), draw, f"Forward and backward, {title}", path)


def _sweep(rows: list[Row], title: str, path: Path) -> None:
    names = sorted({(row["op"], row["case"].split(":")[0]) for row in rows})

    def draw(axes: Any, panel: str) -> None:
        op, axis, what = panel.split(" / ")
        own = [row for row in rows if row["op"] == op and row["case"].startswith(f"{axis}:")]
        _lines(axes, own, lambda row: _point(row["case"], axis), _ms if what == "ms" else _peak)
        axes.set(title=op, xlabel=axis, ylabel=what, xscale="log", yscale="log")
        points = sorted({_point(row["case"], axis) for row in own})
        axes.set_xticks(points, [str(point) for point in points], minor=False)
        axes.minorticks_off()

    _panels([f"{op} / {axis} / {what}" for what in ("ms", "peak MB") for op, axis in names], draw, f"Forward and backward, {title}", path)


def _host(rows: list[Row], title: str, path: Path) -> None:
    def draw(axes: Any, panel: str) -> None:
        _lines(axes, [row for row in rows if row["op"] == panel], lambda row: row["bytes"], lambda row: row["host_us"])
        axes.set(title=panel, xlabel="bytes (least)", ylabel="host us a call", xscale="log", yscale="log")

    _panels(sorted({row["op"] for row in rows}), draw, f"What the host spends to enqueue forward and backward, {title}", path)


def _ms(row: Row) -> float:
    return row.get("cpu_ms") or row["ms"]


def _peak(row: Row) -> float | None:
    return row["peak_bytes"] and row["peak_bytes"] / 1e6


def _point(case: str, axis: str) -> int:
    return next(int(part.removeprefix(f"{axis}=")) for part in case.split(": ")[1].split() if part.startswith(f"{axis}="))


def _lines(axes: Any, rows: Iterable[Row], x: Callable[[Row], float], y: Callable[[Row], float | None]) -> None:
    for provider, colour in COLOURS.items():
        points = sorted((x(row), value) for row in rows if row["provider"] == provider and (value := y(row)))
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, linewidth=1.4, color=colour, label=provider)


def _panels(names: list[str], draw: Callable[[Any, str], None], title: str, path: Path) -> None:
    """One panel a name, four in a row; no file where there is nothing to draw."""
    if not names:
        return
    from matplotlib.figure import Figure

    columns = min(4, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.7 * lines + 0.5), layout="constrained", dpi=90)
    figure.suptitle(title, fontsize=11)
    for index, name in enumerate(names):
        axes = figure.add_subplot(lines, columns, index + 1)
        draw(axes, name)
        axes.title.set_fontsize(9)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=7)
    figure.savefig(path)
