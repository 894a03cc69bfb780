"""The table of all measurements of a comparison, three times: to read (Markdown), to compute with (CSV) and to print (LaTeX).

Each is a pure function of what table.json holds. The CSV has one line for each setting, measurement and model, with all digits; the texts
have a mean with its interval, and in bold the model that `tabulation.best` names.
"""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from meme_dist.compare import cells
from meme_dist.recipes.named import short
from meme_dist.tables import estimate, table

MARKDOWN, CSV, LATEX = "measurements.md", "measurements.csv", "measurements.tex"
NUMBERS = ("value", "low", "high", "count")
MINUS = "\N{MINUS SIGN}"
SPECIAL = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}"}
    | {"|": r"\textbar{}", "–": "--", MINUS: "$-$"}
)
SAID = "Means over seeds, in brackets Student's 95\\,\\% interval; bold is surely better than each of the others, paired by seed."


def digits(name: str) -> int:
    """Behind the point, of a measurement."""
    return 1 if name.startswith(("log_likelihood", "frechet")) else 3


def markdown(found: Mapping[str, Any], names: Sequence[str]) -> Iterator[str]:
    """A section with a table for each setting, of these measurements."""
    for entry in found["settings"]:
        if lines := list(_lines(entry, found["models"], names)):
            body = [[f"`{name}`", *(f"**{text}**" if bold else text for text, bold in line)] for name, line in lines]
            yield f"## {cells.said(entry['setting']) or 'Measurements'}\n\n" + table(["measurement", *found["models"]], body)


def comma_separated(found: Mapping[str, Any]) -> str:
    """The varied keywords, measurement, model, value, low, high, count, and whether it is the best; empty where table.json has null."""
    varied = list(found["settings"][0]["setting"])
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*varied, "measurement", "model", *NUMBERS, "best"])
    for entry in found["settings"]:
        setting = [cells.shown(entry["setting"][keyword]) for keyword in varied]
        for name, measured in entry["measurements"].items():
            for model, one in measured["models"].items():
                writer.writerow([*setting, name, model, *(one[number] for number in NUMBERS), int(model == measured["best"])])
    return text.getvalue()


def latex(found: Mapping[str, Any]) -> str:
    """A table for each setting, with rules of the package booktabs."""
    return "\n".join(["% needs \\usepackage{booktabs}", *(_table(found, entry) for entry in found["settings"] if entry["measurements"])])


def _table(found: Mapping[str, Any], entry: Mapping[str, Any]) -> str:
    models = found["models"]
    rows = [[_escaped(text) for text in ["measurement", *models]]]
    for name, line in _lines(entry, models, list(entry["measurements"])):
        shown = [(_escaped(text.replace("-", MINUS)), bold) for text, bold in line]
        rows.append([_escaped(name), *(f"\\textbf{{{text}}}" if bold else text for text, bold in shown)])
    head, *body = (f"{' & '.join(row)} \\\\" for row in rows)
    about = ", ".join(filter(None, [short(found["recipe"]), cells.said(entry["setting"])]))
    lines = [
        *("", "\\begin{table}", "\\centering", f"\\caption{{{_escaped(about)}. {SAID}}}", f"\\begin{{tabular}}{{l{'r' * len(models)}}}"),
        *("\\toprule", head, "\\midrule", *body, "\\bottomrule", "\\end{tabular}", "\\end{table}", ""),
    ]
    return "\n".join(lines)


def names(found: Mapping[str, Any]) -> dict[str, None]:
    """The names of all measurements, in order."""
    return dict.fromkeys(name for entry in found["settings"] for name in entry["measurements"])


def _lines(entry: Mapping[str, Any], models: Sequence[str], names: Sequence[str]) -> Iterator[tuple[str, list[tuple[str, bool]]]]:
    """For each measurement of a setting its name and, of every model, the text and whether it is the best."""
    for name in names:
        if (one := entry["measurements"].get(name)) is not None:
            yield name, [(estimate(one["models"][model], digits=digits(name)), model == one["best"]) for model in models]


def _escaped(text: str) -> str:
    return text.translate(SPECIAL)
