"""What a training shows: a bar with rows a second and the loss terms on a terminal, plain lines anywhere else, nothing on other ranks."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from meme_dist.train.trainer import Report

SHOWN_TERMS = 4  # as many fit beside the bar
T = TypeVar("T")


def shown(reports: Iterable[Report], *, total: int, console: Console, visible: bool) -> Iterator[Report]:
    """The same reports, shown as they pass."""
    if not visible:
        yield from reports
    elif console.is_terminal:
        yield from _bar(reports, total, console)
    else:
        yield from _lines(reports, total, console)


@contextmanager
def stage(what: str, *, console: Console, visible: bool) -> Iterator[None]:
    """Something that takes a while and has no steps to count."""
    if not visible:
        yield
    elif console.is_terminal:
        with console.status(what):
            yield
    else:
        console.print(what, soft_wrap=True)
        yield


def _bar(reports: Iterable[Report], total: int, console: Console) -> Iterator[Report]:
    columns = (
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=total)
        for report in reports:
            if math.isfinite(report.rows_per_second):
                bar.update(task, completed=report.step, description=_told(report))
            else:
                bar.update(task, completed=report.step)
            yield report


def _lines(reports: Iterable[Report], total: int, console: Console) -> Iterator[Report]:
    for report in reports:
        if math.isfinite(report.rows_per_second):  # a logged step
            console.print(f"step {report.step}/{total}  {_told(report)}", soft_wrap=True, highlight=False)
        yield report


def _told(report: Report) -> str:
    parts = {"loss": report.loss, **_most_telling(report.terms)}
    numbers = "  ".join(f"{name} {value:.4g}" for name, value in parts.items())
    return f"{report.rows_per_second:,.0f} rows/s  {numbers}"


def _most_telling(terms: Mapping[str, float]) -> dict[str, float]:
    """The bound of each modality first, then their reconstructions."""
    order = sorted(terms, key=lambda name: (name != "bound", not name.startswith("bound/"), not name.startswith("reconstruction/"), name))
    return {name: terms[name] for name in order[:SHOWN_TERMS]}
