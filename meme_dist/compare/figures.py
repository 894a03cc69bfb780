"""Figures of a comparison: curves over what was varied, differences from a reference, pictures side by side. One PNG each."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.image import imread
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, StrMethodFormatter

from meme_dist import figures
from meme_dist.compare.tabulation import Line
from meme_dist.figures import COLOURS, INK

WIDE = 3  # panels beside each other
RATIO = 8  # between the largest and the smallest x, from which the axis is logarithmic
DPI = 110  # of the runs' pictures


Panels = Mapping[str, Mapping[str, Line]]
"""For each panel's title the models' lines."""


def curves(path: Path, panels: Panels, *, x: str, ceilings: Mapping[str, Mapping[str, Mapping[int, float]]] | None = None) -> None:
    """A panel a measurement (or setting), a line a model, its interval over seeds as a band; `ceilings` of a panel, by name, are dashed."""
    colours = _colours(panels.values())
    wide = min(WIDE, len(panels))
    tall = -(-len(panels) // wide)
    with figures._figure(path, (5.2 * wide, 3.6 * tall)) as figure:
        grid = figure.subplots(tall, wide, squeeze=False).ravel()
        for axes, (title, lines) in zip(grid, panels.items(), strict=False):
            for model, line in lines.items():
                _line(axes, model, line, colours[model])
            for name, values in (ceilings or {}).get(title, {}).items():
                known, dashes = zip(*sorted(values.items()), strict=True), figures.CEILINGS[name]
                axes.plot(*known, color=INK, linestyle=dashes, linewidth=1.0, label=name.replace("_", " "))
            axes.set(title=_title(title), xlabel=x.replace("_", " "))
            _ticks(axes, sorted({point[0] for line in lines.values() for point in line}))
        drawn = {label: line for axes in grid for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        grid[0].legend(list(drawn.values()), list(drawn), loc="best")
        for axes in grid[len(panels) :]:
            axes.axis("off")


def differences(path: Path, tests: Sequence[Mapping[str, Any]], *, against: str) -> None:
    """A panel a measurement, a line a model: its difference from the reference with its interval; solid where that excludes 0."""
    names = list(dict.fromkeys(test["measurement"] for test in tests))
    models = list(dict.fromkeys(test["model"] for test in tests))
    wide = min(WIDE, len(names))
    tall = -(-len(names) // wide)
    with figures._figure(path, (2.2 + 3.4 * wide, tall * (1.0 + 0.26 * len(models)))) as figure:
        grid = figure.subplots(tall, wide, squeeze=False, sharey=True).ravel()
        for axes, name in zip(grid, names, strict=False):
            axes.axvline(0.0, color="#8a929a", linewidth=1.0)
            for test in (test for test in tests if test["measurement"] == name):
                _difference(axes, models.index(test["model"]), test)
            axes.set(title=_title(name), xlabel=f"minus {against}", ylim=(len(models) - 0.5, -0.5))
            axes.set_yticks(range(len(models)), models)
            axes.xaxis.set_major_locator(MaxNLocator(4))
        for axes in grid[len(names) :]:
            axes.axis("off")


def side_by_side(path: Path, pictures: Mapping[str, Path], *, title: str) -> None:
    """Pictures of several models at their own size, labelled: grids of the same rows can be compared column by column."""
    images = {model: imread(file) for model, file in pictures.items()}
    height = max(image.shape[0] for image in images.values()) / DPI
    widths = [image.shape[1] / DPI for image in images.values()]
    with figures._figure(path, (sum(widths), height + 0.7)) as figure:
        figure.suptitle(title, x=0.01, ha="left", weight="bold")
        grid = figure.subplots(1, len(images), squeeze=False, width_ratios=widths)[0]
        for axes, (model, image) in zip(grid, images.items(), strict=True):
            axes.imshow(image, interpolation="nearest")
            axes.set(title=model, anchor="N")
            axes.axis("off")


def signal_to_noise(path: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """Against K: the pooled ratio of all networks together, and of each, with the gradient of the weights stopped and not."""
    networks = list(dict.fromkeys(entry["network"] for entry in entries))
    networks.sort(key=lambda name: name != "all")
    wide = min(WIDE, len(networks))
    tall = -(-len(networks) // wide)
    with figures._figure(path, (4.4 * wide, 3.2 * tall)) as figure:
        grid = figure.subplots(tall, wide, squeeze=False).ravel()
        for axes, network in zip(grid, networks, strict=False):
            for stop, colour in ((True, COLOURS[0]), (False, COLOURS[1])):
                line = [entry for entry in entries if entry["network"] == network and entry["stop_gradient"] == stop]
                x, y = [entry["samples"] for entry in line], [entry["pooled"] for entry in line]
                axes.plot(x, y, color=colour, marker="o", markersize=3.5, label="stopped" if stop else "with the weights' gradient")
            axes.set(title=network, xlabel="samples K", ylabel="|mean| / spread")
            axes.set_ylim(bottom=0)
        grid[0].legend(loc="best")
        for axes in grid[len(networks) :]:
            axes.axis("off")


def _colours(panels: Iterable[Mapping[str, Line]]) -> dict[str, Any]:
    """A model has one colour in all panels."""
    models = list(dict.fromkeys(model for lines in panels for model in lines))
    return dict(zip(models, figures._palette(len(models)), strict=False))


def _line(axes: Axes, model: str, line: Line, colour: Any) -> None:
    x, value = [point[0] for point in line], np.array([point[1].value for point in line])
    low, high = (np.array([getattr(point[1], side) for point in line]) for side in ("low", "high"))
    axes.plot(x, value, color=colour, marker="o", markersize=3.5, label=model)
    axes.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)


def _difference(axes: Axes, place: int, test: Mapping[str, Any]) -> None:
    value, low, high = (np.nan if test[name] is None else float(test[name]) for name in ("value", "low", "high"))
    sure = low > 0 or high < 0
    colour = COLOURS[0] if sure else "#a9b1b8"
    axes.plot([low, high], [place, place], color=colour)
    axes.plot([value], [place], color=colour, marker="o", markersize=5, markerfacecolor=colour if sure else "white")


def _ticks(axes: Axes, values: Sequence[float]) -> None:
    if values and values[0] > 0 and values[-1] / values[0] >= RATIO:
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(FixedLocator(list(values)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def _title(name: str) -> str:
    return name.replace("_", " ").replace(">", " → ")
