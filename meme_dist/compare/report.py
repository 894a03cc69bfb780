"""The report of a comparison: table.json, costs.json, measurements, figures and report.md, all from plan.json and the run folders.

Written again from the same folders, all but the figures are the same byte by byte.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from meme_dist import signal_to_noise
from meme_dist.assess import GRID
from meme_dist.compare import cells, figures, measurements, tabulation
from meme_dist.compare.cells import Plan
from meme_dist.compare.measurements import CSV, LATEX, MARKDOWN, markdown
from meme_dist.compare.tabulation import Run
from meme_dist.record import write_json
from meme_dist.report import FIGURES, REPORT
from meme_dist.tables import estimate, table

TABLE, COSTS = "table.json", "costs.json"
AGAIN = "running the comparison again measures it as planned"
UNITS = {
    "rows_per_second": ("rows / s", 1.0, 0),
    "seconds": ("seconds", 1.0, 1),
    "cpu_seconds": ("CPU seconds", 1.0, 1),
    "peak_bytes": ("memory, MiB", 2.0**20, 0),
    "device_peak_bytes": ("GPU memory, MiB", 2.0**20, 0),
    "parameters": ("parameters", 1.0, 0),
}


def write_report(folder: Path) -> Path:
    """Write everything that the folder of a comparison says about its runs; returns the path of report.md.

    Raises ValueError where there is no plan, and for a run whose results cannot be read.
    """
    plan, runs = tabulation.read(folder)
    found, spent = tabulation.tabulated(plan, runs), tabulation.costs(plan, runs)
    write_json(folder / TABLE, found)
    write_json(folder / COSTS, spent)
    _write(folder / MARKDOWN, f"# {plan.recipe}: every measurement", *markdown(found, list(measurements.names(found))))
    _write(folder / CSV, measurements.comma_separated(found))
    _write(folder / LATEX, measurements.latex(found))
    tests = [test for test in found["tests"] if test["measurement"] in found["main"]]
    parts = [
        f"# {plan.recipe}: {plan.kind}",
        _summary(plan, runs),
        _unmeasured(runs, folder),
        *([] if plan.kind == "ablation" else markdown(found, found["main"])),
        _differences(plan, tests),
        *([] if plan.kind == "comparison" else markdown(found, found["main"])),
        *_figures(plan, runs, found, tests, folder),
        _signal_to_noise(folder),
        _costs(spent, tabulation.machines(runs)),
        _what_ran(plan),
    ]
    return _write(folder / REPORT, *parts)


def _write(path: Path, *parts: str) -> Path:
    part = path.with_name(f"{path.name}.tmp")
    part.write_text("\n\n".join(text for text in parts if text).rstrip("\n") + "\n", encoding="utf-8")
    return part.replace(path)


def _summary(plan: Plan, runs: Sequence[Run]) -> str:
    there = sum(run.values is not None for run in runs)
    sizes = f"{len(plan.models)} models, {len(plan.settings())} settings, {len(plan.seeds)} seeds: {there} of {len(runs)} runs are measured"
    measured = "" if plan.split == "test" else f" Measured on the split `{plan.split}`: no test row was looked at."
    return (
        f"Recipe `{plan.recipe}`; {sizes}. The reference is `{plan.against}`.{measured}\n\n"
        "Values are means over seeds with Student's 95 % interval (none for one seed). **Bold** is the model whose difference from each of "
        "the others, paired by seed, has an interval on the good side of 0; where none has, none is bold. "
        f"Measurements: `{TABLE}`; all of them to read: [{MARKDOWN}]({MARKDOWN}); for a paper: `{CSV}`, `{LATEX}`.{_judged(plan, runs)}"
    )


def _judged(plan: Plan, runs: Sequence[Run]) -> str:
    """Whose rows made the classifiers, as each evaluation says: not all runs have modalities that one run's can judge."""
    judges = Counter(Path(run.results.get("judge", run.cell.run)).name for run in runs if run.values is not None)
    if plan.judge == "own" or not judges:
        return ""
    if len(judges) == 1:
        return f"\n\nThe classifiers of one run's rows judge all runs: of `{next(iter(judges))}`."
    rows = ", ".join(f"`{judge}` ({count} run{'s'[: count > 1]})" for judge, count in judges.items())
    return f"\n\nThe classifiers that judge are of the rows of {rows}; what different ones say is not quite comparable."


def _unmeasured(runs: Sequence[Run], folder: Path) -> str:
    parts = [f"`{run.cell.name}` was measured otherwise than the rest: {run.otherwise}; {AGAIN}." for run in runs if run.otherwise]
    for name, lines in tabulation.unmeasured(runs, folder).items():
        parts.append(f"`{name}`" + (f" ended with:\n\n```\n{chr(10).join(lines)}\n```" if lines else ": not started"))
    strangers = tabulation.strangers(runs, folder)
    text = "## Runs without results\n\nThey are in no table.\n\n" + "\n\n".join(parts) if parts else ""
    left = f"Runs of an earlier plan, in no table: {', '.join(f'`{name}`' for name in strangers)}." if strangers else ""
    return "\n\n".join(part for part in (text, left) if part)


# ---- tables -----------------------------------------------------------------------------------------------------------------------------


def _differences(plan: Plan, tests: Sequence[Mapping[str, Any]]) -> str:
    if not tests:
        return ""
    said = (
        f"Model minus `{plan.against}` in runs of the same seed and setting, averaged over the settings of a seed, with Student's interval "
        "of the mean over seeds. p: exact sign-flip test over seeds, two-sided; Holm: corrected for the rivals of a measurement. With n "
        "seeds no p can be below 2 / 2^n."
    )
    header = ["measurement", "model", "difference", "p", "Holm", "seeds"]
    lines = [[f"`{t['measurement']}`", t["model"], _difference(t), f"{t['p']:.2g}", f"{t['holm']:.2g}", t["count"]] for t in tests]
    return f"## Against {plan.against}\n\n{said}\n\n" + table(header, lines)


def _difference(test: Mapping[str, Any]) -> str:
    text = estimate(test, digits=measurements.digits(test["measurement"]))
    return text if text.startswith("-") else f"+{text}"


def _costs(spent: Mapping[str, Mapping[str, Mapping[str, Any]]], machines: Sequence[str]) -> str:
    names = [name for name in UNITS if any(name in entry for entry in spent.values())]
    if not names:
        return ""
    lines = [[model, *(_cost(entry.get(name), name) for name in names)] for model, entry in spent.items() if entry]
    said = (
        "Means over all runs of a model, with their interval. Seconds are those of the training loop, without evaluations; rows a second "
        "the median over the log. Runs that shared a machine, or ran on different ones, are not comparable."
    )
    ran = "\n".join(f"- {machine}" for machine in machines)
    return f"## Time and memory\n\n{said}\n\n{table(['model', *(UNITS[name][0] for name in names)], lines)}\n\n{ran}"


def _cost(entry: Mapping[str, Any] | None, name: str) -> str:
    _, unit, digits = UNITS[name]
    scaled = {key: value if value is None or key == "count" else value / unit for key, value in (entry or {}).items()}
    same = scaled.get("low") == scaled.get("high")
    return estimate({**scaled, "low": None} if same else scaled, digits=digits)


def _what_ran(plan: Plan) -> str:
    known = cells.defaults(plan.recipe)
    own = {name: value for name, value in plan.common.items() if known.get(name) != value}
    lines = [["all", cells.said(own) or "the recipe's own settings"]] + [[model, cells.said(own)] for model, own in plan.models.items()]
    again = (
        f"`{cells.FILE}` is the whole plan; `meme-dist compare {cells.FILE} --out FOLDER` runs it again, `--report-only` writes this again."
    )
    return f"## What ran\n\n{again}\n\n" + table(["model", "settings"], lines)


# ---- figures ----------------------------------------------------------------------------------------------------------------------------


def _figures(plan: Plan, runs: Sequence[Run], found: Mapping[str, Any], tests: Sequence[Mapping[str, Any]], folder: Path) -> Iterator[str]:
    place = folder / FIGURES
    if plan.kind == "ablation" and tests:
        figures.differences(place / "differences.png", tests, against=plan.against)
        yield _picture("Differences", "differences.png")
    for keyword, rest in tabulation.curves(plan, found).items():
        for setting, panels in rest.items():
            name = f"against-{cells.slug(keyword)}{f'-{cells.slug(setting)}' if setting else ''}.png"
            figures.curves(place / name, panels, x=keyword)
            yield _picture(f"Over {keyword}{f' ({setting})' if setting else ''}", name)
    ceilings = tabulation.ceilings(runs)
    if panels := tabulation.by_inputs(found, ceilings):
        figures.curves(place / "by-inputs.png", panels, x="modalities given", ceilings=ceilings)
        yield _picture("Cross coherence against the number of modalities given", "by-inputs.png")
    for setting, pictures in tabulation.grouped(runs, str(GRID)).items():
        name = f"cross-generation{f'-{cells.slug(setting)}' if setting else ''}.png"
        figures.side_by_side(place / name, pictures, title=setting)
        yield _picture(f"Cross generation{f', {setting}' if setting else ''}: the first seed of each model, the same rows", name)


def _signal_to_noise(folder: Path) -> str:
    path = folder / signal_to_noise.FILE
    if not path.is_file():
        return ""
    held = json.loads(path.read_text(encoding="utf-8"))
    figures.signal_to_noise(folder / FIGURES / "signal-to-noise.png", held["entries"])
    whole = [entry for entry in held["entries"] if entry["network"] == signal_to_noise.WHOLE]
    lines = [
        [e["samples"], "stopped" if e["stop_gradient"] else "kept", f"{e['pooled']:.3f}", f"{e['coordinates']:.3f}", f"{e['floor']:.3f}"]
        for e in whole
    ]
    said = (
        f"MEME's gradient at the weights of `{held['run']}` (step {held['step']:,}) on one batch of {held['rows']} rows, over "
        f"{held['draws']} draws of the noise, with the gradient of the importance weights stopped and kept. Pooled: |mean| / spread of the "
        "whole gradient, corrected for the finite number of draws; by coordinate: the mean of |mean| / standard deviation, of which pure "
        "noise gives the floor."
    )
    header = ["K", "gradient of the weights", "pooled", "by coordinate", "floor"]
    return f"## Signal-to-noise ratio of the gradient\n\n{said}\n\n{table(header, lines)}\n\n![]({FIGURES}/signal-to-noise.png)"


def _picture(title: str, name: str) -> str:
    return f"## {title}\n\n![{title}]({FIGURES}/{name})"
