"""What the runs of a comparison say together: means over seeds, paired differences from a reference, costs. From the run folders alone.

`tabulated` makes table.json, a pure function of plan.json and the runs' results.json:

    runs      [{"run", "model", "setting", "seed", "values": {measurement: value} or null where the run has no results}]
    settings  [{"setting", "measurements": {name: {"models": {model: estimate}, "best": model or null}}}]    estimates over seeds
    tests     [{"measurement", "model", "against", estimate of the difference, "p", "holm", "smallest_p"}]   over seeds

Every estimate has "value", "low", "high" and "count"; an interval over one run is null. A difference is model minus reference, run by run
of the same seed and setting, averaged over the settings of a seed: a seed's rows and noise are in all of them, so that only seeds are
independent. `holm` corrects p for the several rivals of one measurement. The best model is named where its paired
difference from each of the others has an interval that excludes 0, and nowhere else.
"""

import itertools
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from meme_dist import cost, record
from meme_dist.compare import cells
from meme_dist.compare.cells import Cell, Plan
from meme_dist.compare.planned import RUNS, measured, otherwise, results_of
from meme_dist.evaluate import flatten
from meme_dist.figures import CEILINGS
from meme_dist.metrics.intervals import Estimate, over_runs
from meme_dist.metrics.paired import Paired, holm, paired
from meme_dist.report import LOG, read_log

LOGS = "logs"
LOWER = ("frechet", "rmse", "mae", "crps", "information")  # better when lower
NEITHER = ("classifier", "correlation", "coverage")  # neither high nor low is better
OF_DATA = ("frechet/real>", "information/real>")  # no model takes part
SHOWN = ("cross_coherence", "coherence_by_inputs", "joint_coherence", "latent_accuracy", "log_likelihood", "imputation", "frechet")
FEW = 8  # measurements of one kind that the report shows one by one
COSTS = ("rows_per_second", "seconds", "cpu_seconds", "peak_bytes", "device_peak_bytes", "parameters")


class Run(NamedTuple):
    """A cell and what its folder holds: measurements by name, the results as they are, and where these do not count, why (`otherwise`)."""

    cell: Cell
    values: Mapping[str, float] | None
    results: Mapping[str, Any]
    folder: Path
    otherwise: str = ""

    @property
    def trained(self) -> Path:
        """The folder that has its log: its own, or the one around it where another split than test was measured."""
        return self.folder if self.cell.split == "test" else self.folder.parent


# ---- reading ----------------------------------------------------------------------------------------------------------------------------


def read(folder: Path) -> tuple[Plan, list[Run]]:
    """The plan of a comparison's folder, and every run that it asks for. Raises ValueError where there is no plan."""
    plan = cells.load(folder / cells.FILE)
    return plan, [_run(plan, cell, folder) for cell in plan.cells()]


def _run(plan: Plan, cell: Cell, folder: Path) -> Run:
    place = folder / RUNS / cell.folder
    if not measured(place, cell.keywords["steps"]):
        return Run(cell, None, {}, place)
    if how := otherwise(plan, cell, folder):
        return Run(cell, None, {}, place, how)
    results = results_of(place)
    return Run(cell, {**derived(results), **flatten(results)}, results, place)


def derived(results: Mapping[str, Any]) -> dict[str, float]:
    """Means that stand for many numbers: over targets and single sources for coherences, latents and Frechet distances.

    `log_likelihood/joint` is that of the row's modalities together, and `log_likelihood/conditional` the mean of log p(target | sources)
    over single targets and all sets of sources that were asked for; both at the largest K.
    """
    single = [e for e in results.get("cross_coherence", []) if len(e["sources"]) == 1 and e["target"] not in e["sources"]]
    made = [e for e in results.get("frechet", []) if e["from"] == "sources" and len(e["sources"]) == 1 and e["target"] not in e["sources"]]
    drawn = [e for e in results.get("frechet", []) if e["from"] == "prior"]
    means = {"cross_coherence": single, "frechet": made, "frechet/prior": drawn}
    means["latent_accuracy"] = [e for e in results.get("latent_accuracy", []) if len(e["sources"]) == 1]
    found = {f"{name}/mean": _mean([entry["value"] for entry in entries]) for name, entries in means.items() if len(entries) > 1}
    joint = [e for e in results.get("log_likelihood", []) if not e["given"]]
    if joint:
        widest = max(joint, key=lambda entry: (len(entry["targets"]), entry["samples"]))
        found["log_likelihood/joint"] = widest["value"]
    given = [e for e in results.get("log_likelihood", []) if e["given"] and len(e["targets"]) == 1]
    if given:
        most = max(entry["samples"] for entry in given)
        found["log_likelihood/conditional"] = _mean([entry["value"] for entry in given if entry["samples"] == most])
    return {name: value for name, value in found.items() if value is not None}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if len(known) == len(values) else None


def direction(name: str) -> int:
    """1 where a higher value of the measurement is better, -1 where a lower one is, 0 where neither is."""
    kind, *_, last = [part.partition("@")[0] for part in name.split("/")]
    if {kind, last} & set(NEITHER) or name.startswith(OF_DATA):
        return 0
    return -1 if {kind, last} & set(LOWER) else 1


def main_measurements(names: Iterable[str]) -> list[str]:
    """Those for the report's tables: of each kind all where they are few, else the derived ones; a data set without labels has others."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(name.split("/")[0], []).append(name)
    if len(kinds.get("imputation", [])) > FEW:
        kinds["imputation"] = _best_informed(kinds["imputation"])
    chosen = [name for kind in SHOWN for name in _few(kinds.get(kind, []))]
    return chosen or [name for entries in kinds.values() for name in _few(entries)]


def _best_informed(names: Sequence[str]) -> list[str]:
    """The imputations from the most modalities, one quantity each: `imputation/a+b>c/rmse`, or `imputation/2 observed>c/rmse`."""
    asked = {name: name.split("/")[1].partition(">") for name in names if name.endswith(("/rmse", "/accuracy"))}
    sizes = {name: int(s.split()[0]) if s.endswith(" observed") else s.count("+") + 1 for name, (s, _, _) in asked.items()}
    return [name for name, size in sizes.items() if size == max(sizes.values())][:FEW]


def _few(names: Sequence[str]) -> list[str]:
    return [name for name in names if len(names) <= FEW or name.endswith(("/mean", "/joint", "/all")) or _inputs(name)]


def _inputs(name: str, target: str | None = None) -> int | None:
    """n of `coherence_by_inputs/n`, the mean over all targets, or of `coherence_by_inputs/n>target`; None of any other measurement."""
    kind, _, rest = name.partition("/")
    size, _, of = rest.partition(">")
    return int(size) if kind == "coherence_by_inputs" and size.isdigit() and of == (target or "") else None


# ---- statistics -------------------------------------------------------------------------------------------------------------------------


def tabulated(plan: Plan, runs: Sequence[Run]) -> dict[str, Any]:
    """Everything that table.json holds."""
    names = list(dict.fromkeys(name for run in runs for name in run.values or {}))
    groups = [(setting, [run for run in runs if run.cell.setting == setting]) for setting in plan.settings()]
    return {
        "recipe": plan.recipe,
        "models": list(plan.models),
        "reference": plan.against,
        "seeds": list(plan.seeds),
        "main": main_measurements(names),
        "runs": [_plain(run) for run in runs],
        "settings": [{"setting": dict(setting), "measurements": _measurements(plan, group, names)} for setting, group in groups],
        "tests": [test for name in names for test in _tests(plan, runs, name)],
    }


def _plain(run: Run) -> dict[str, Any]:
    about = {"run": run.cell.name, "model": run.cell.model, "setting": dict(run.cell.setting), "seed": run.cell.seed}
    return {**about, "values": None if run.values is None else dict(run.values)}


def _measurements(plan: Plan, runs: Sequence[Run], names: Sequence[str]) -> dict[str, Any]:
    found = {}
    for name in names:
        values = {model: _values(runs, model, name) for model in plan.models}
        estimates = {model: over_runs(list(of_model.values())).json() for model, of_model in values.items()}
        if any(entry["count"] for entry in estimates.values()):
            found[name] = {"models": estimates, "best": best(values, direction(name))}
    return found


def _values(runs: Iterable[Run], model: str, name: str) -> dict[tuple[str, int], float]:
    """By (setting, seed), which make pairs."""
    mine = [run for run in runs if run.cell.model == model and run.values is not None and name in run.values]
    return {(json.dumps(dict(run.cell.setting)), run.cell.seed): (run.values or {})[name] for run in mine}


def compared(model: Mapping[tuple[str, int], float], reference: Mapping[tuple[str, int], float]) -> Paired:
    """Paired by (setting, seed), each seed's settings averaged; what only one of them has is left out."""
    keys = [key for key in model if key in reference]
    return paired([model[key] for key in keys], [reference[key] for key in keys], groups=[seed for _, seed in keys])


def best(values: Mapping[str, Mapping[tuple[str, int], float]], better: int) -> str | None:
    """The model whose paired difference from every other one has an interval on the good side of 0; None where there is none."""
    if not better or sum(map(bool, values.values())) < 2:
        return None
    for model, own in values.items():
        others = [compared(own, other).difference for rival, other in values.items() if rival != model and other]
        if own and all(_beyond(difference, better) for difference in others):
            return model
    return None


def _beyond(difference: Estimate, better: int) -> bool:
    return difference.count > 1 and (difference.low > 0 if better > 0 else difference.high < 0)


def _tests(plan: Plan, runs: Sequence[Run], name: str) -> list[dict[str, Any]]:
    reference = _values(runs, plan.against, name)
    rivals = {model: compared(_values(runs, model, name), reference) for model in plan.models if model != plan.against}
    found = {model: result for model, result in rivals.items() if result.difference.count}
    adjusted = holm([result.p for result in found.values()])
    return [
        {
            "measurement": name,
            "model": model,
            "against": plan.against,
            **result.difference.json(),
            "p": result.p,
            "holm": corrected,
            "smallest_p": result.smallest,
        }
        for (model, result), corrected in zip(found.items(), adjusted, strict=True)
    ]


# ---- curves -----------------------------------------------------------------------------------------------------------------------------

Line = list[tuple[float, Estimate]]
"""Points of a curve."""


def curves(plan: Plan, table: Mapping[str, Any]) -> dict[str, dict[str, dict[str, dict[str, Line]]]]:
    """For each keyword that takes several numbers: {keyword: {rest of the setting: {measurement: {model: line}}}}, main measurements."""
    found: dict[str, dict[str, dict[str, dict[str, Line]]]] = {}
    for keyword, values in plan.vary.items():
        if len(values) < 2 or any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
            continue
        for entry in sorted(table["settings"], key=lambda entry: entry["setting"][keyword]):
            rest = cells.said({key: value for key, value in entry["setting"].items() if key != keyword})
            for name in (name for name in table["main"] if name in entry["measurements"]):
                panel = found.setdefault(keyword, {}).setdefault(rest, {}).setdefault(name, {})
                _add(panel, entry["setting"][keyword], entry["measurements"][name]["models"])
    return found


def by_inputs(table: Mapping[str, Any], known: Iterable[str] = ()) -> dict[str, dict[str, Line]]:
    """{panel: {model: line}} of cross coherence against the number of modalities given; nothing where it was not measured for two.

    A panel is a setting, over all targets, or a setting and one of the targets whose ceiling is `known`: the panels of `ceilings`.
    """
    found: dict[str, dict[str, Line]] = {}
    for entry in table["settings"]:
        for target in (None, *_targets(entry["measurements"])):
            panel = _panel(entry["setting"], target)
            sizes = sorted((size, name) for name in entry["measurements"] if (size := _inputs(name, target)) is not None)
            for size, name in sizes if len(sizes) > 1 and (target is None or panel in known) else ():
                _add(found.setdefault(panel, {}), size, entry["measurements"][name]["models"])
    return found


def ceilings(runs: Sequence[Run]) -> dict[str, dict[str, dict[int, float]]]:
    """{panel: {name of the ceiling: {number of inputs: coherence}}} where the data set's best is known; panels as for `by_inputs`."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for run in runs:
        for entry in run.results.get("coherence_by_inputs", []):
            for name in (name for name in CEILINGS if name in entry):
                panel = found.setdefault(_panel(run.cell.setting, entry["target"]), {})
                panel.setdefault(name, {})[entry["inputs"]] = entry[name]
    return found


def _panel(setting: Mapping[str, Any], target: str | None) -> str:
    return ", ".join(filter(None, [cells.said(setting), f"to {target}" if target else ""])) or "cross coherence"


def _targets(names: Iterable[str]) -> list[str]:
    """The targets of `coherence_by_inputs/n>target`."""
    return list(dict.fromkeys(name.partition(">")[2] for name in names if name.startswith("coherence_by_inputs/") and ">" in name))


def _add(lines: dict[str, Line], x: float, models: Mapping[str, Mapping[str, Any]]) -> None:
    for model, entry in models.items():
        if entry["count"]:
            low, high = (math.nan if entry[side] is None else entry[side] for side in ("low", "high"))
            lines.setdefault(model, []).append((x, Estimate(entry["value"], low, high, entry["count"])))


# ---- costs ------------------------------------------------------------------------------------------------------------------------------


def costs(plan: Plan, runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """{model: {cost: estimate over all its runs}}; costs.json. Apart from table.json, since no two runs take the same time."""
    done = [run for run in runs if run.values is not None]
    each = {model: [_cost(run.trained) for run in done if run.cell.model == model] for model in plan.models}
    spent = {model: {name: [entry[name] for entry in entries if name in entry] for name in COSTS} for model, entries in each.items()}
    return {model: {name: over_runs(values).json() for name, values in found.items() if values} for model, found in spent.items()}


def _cost(folder: Path) -> dict[str, float]:
    """Rows a second as the median over the log's lines; times added up over the attempts of a resumed run, memory their highest."""
    speeds = [line["rows_per_second"] for line in read_log(folder / LOG) if "rows_per_second" in line]
    attempts = read_log(folder / cost.FILE)
    found = {"rows_per_second": statistics.median(speeds)} if speeds else {}
    for name in ("seconds", "cpu_seconds"):
        found |= {name: math.fsum(line[name] for line in attempts)} if attempts else {}
    for name in ("peak_bytes", "device_peak_bytes", "parameters"):
        known = [line[name] for line in attempts if line[name] is not None]
        found |= {name: max(known)} if known else {}
    return found


def machines(runs: Sequence[Run]) -> list[str]:
    """What the runs ran on and with, each combination once: costs of different ones are not to be compared."""
    found = []
    for saved in (record.load(run.folder) for run in runs if run.values is not None):
        machine, versions = saved.machine, saved.versions
        devices = ", ".join(machine.get("devices") or []) or f"{machine.get('cores')} cores"
        software = ", ".join(f"{name} {versions[name]}" for name in ("torch", "meme-dist") if name in versions)
        processes = f"{machine.get('processes')} process(es)"
        found.append(f"{machine.get('processor')}, {devices}, {processes}; {software}, commit {saved.commit or 'unknown'}")
    return sorted(set(found))


def unmeasured(runs: Sequence[Run], folder: Path, *, lines: int = 8) -> dict[str, list[str]]:
    """{run: the last lines that it said} of those without results; no lines where it was never started."""
    lacking = [run.cell.name for run in runs if run.values is None and not run.otherwise]
    files = {name: folder / LOGS / f"{name}.log" for name in lacking}
    said = {name: path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else [] for name, path in files.items()}
    return {name: [line for line in text if line.strip()][-lines:] for name, text in said.items()}


def strangers(runs: Sequence[Run], folder: Path) -> list[str]:
    """Run folders that the plan does not ask for: those of an earlier plan, which no table counts."""
    asked = {run.cell.run for run in runs}
    return sorted(path.parent.name for path in (folder / RUNS).glob(f"*/{record.FILE}") if path.parent.name not in asked)


def grouped(runs: Sequence[Run], picture: str) -> dict[str, dict[str, Path]]:
    """{setting: {model: a picture of its first measured seed}}, where there is one."""
    found: dict[str, dict[str, Path]] = {}
    for setting, group in itertools.groupby(runs, key=lambda run: cells.said(run.cell.setting)):
        for run in group:
            path = run.folder / picture
            if run.values is not None and path.is_file():
                found.setdefault(setting, {}).setdefault(run.cell.model, path)
    return found
