"""Measurements as Markdown tables that also read well as plain text: what the report and the screen show of results.json."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

MOST_ON_SCREEN = 12  # lines of the imputation's table


def tables(results: Mapping[str, Any]) -> str:
    """Every measurement of `meme_dist.evaluate.measure`, a section each."""
    made: list[tuple[str, Callable[[Mapping[str, Any]], str]]] = [
        ("cross_coherence", _cross_table),
        ("coherence_by_inputs", _by_inputs_table),
        ("joint_coherence", _joint_table),
        ("latent_accuracy", _latent_table),
        ("clustering", _clustering_table),
        ("relatedness", _relatedness_table),
        ("frechet", _frechet_table),
        ("log_likelihood", _likelihood_table),
        ("imputation", _imputation_table),
        ("correlation", _correlation_table),
        ("information", _information_table),
    ]
    parts = [make(results) for name, make in made if results.get(name)]
    parts += [f"Left out: {name.replace('_', ' ')} ({why})." for name, why in results.get("left_out", {}).items()]
    return "\n\n".join(parts)


def on_screen(results: Mapping[str, Any]) -> str:
    """The same without the imputation's table where that is long: it has a line for every set of observed modalities and target."""
    lines = len(results.get("imputation", []))
    if lines <= MOST_ON_SCREEN:
        return tables(results)
    shown = {name: entry for name, entry in results.items() if name != "imputation"}
    return f"{tables(shown)}\n\nImputation: {lines} lines, in the report."


def _cross_table(results: Mapping[str, Any]) -> str:
    entries, real = results["cross_coherence"], results.get("classifiers", {})
    targets = list(dict.fromkeys([*real, *(entry["target"] for entry in entries)]))
    cells = {(tuple(entry["sources"]), entry["target"]): estimate(entry) for entry in entries}
    lines = [[" + ".join(chosen), *(cells.get((chosen, t), "") for t in targets)] for chosen in dict.fromkeys(s for s, _ in cells)]
    reference = [["*real data*", *(estimate(real[t]) if t in real else "" for t in targets)]]
    return (
        f"## Cross coherence\n\nShare of {_rows(results)} in which the generated modality shows the row's class, as a classifier of real "
        "data sees it. The last line is that classifier on the real data of those rows: a reference and no bound, since what is made can "
        "be more typical of its class than what is real.\n\n" + table(["from", *(f"to {t}" for t in targets)], lines + reference)
    )


def _joint_table(results: Mapping[str, Any]) -> str:
    joint = results["joint_coherence"]
    lines = [["all modalities", estimate(joint["all"])]]
    if len(joint["pairs"]) > 1:
        lines += [[" and ".join(entry["modalities"]), estimate(entry)] for entry in joint["pairs"]]
    said = f"Share of {joint['all']['count']:,} draws from the prior in which all the generated modalities show one class."
    return f"## Joint coherence\n\n{said}\n\n" + table(["agree", "share"], lines)


def _latent_table(results: Mapping[str, Any]) -> str:
    lines = [[" + ".join(entry["sources"]), estimate(entry)] for entry in results["latent_accuracy"]]
    said = f"Accuracy of a linear classifier on samples of the posteriors of {_rows(results)}."
    return f"## Latent accuracy\n\n{said}\n\n" + table(["posterior of", "accuracy"], lines)


def _relatedness_table(results: Mapping[str, Any]) -> str:
    lines = [
        [" and ".join(e["modalities"]), estimate(e["auroc_class"]) if "auroc_class" in e else "", estimate(e["auroc_row"])]
        for e in results["relatedness"]
    ]
    said = "Chance that the posteriors of a related pair lie closer (2-Wasserstein distance) than those of an unrelated one; 0.5 is none."
    return f"## Relatedness\n\n{said}\n\n" + table(["modalities", "same class", "same row"], lines)


def _likelihood_table(results: Mapping[str, Any]) -> str:
    entries = results["log_likelihood"]
    samples = list(dict.fromkeys(entry["samples"] for entry in entries))
    cells: dict[tuple[str, str], dict[int, str]] = {}
    for entry in entries:
        key = (" + ".join(entry["targets"]), " + ".join(entry["given"]) or "–")
        cells.setdefault(key, {})[entry["samples"]] = estimate(entry, digits=1)
    lines = [[*key, *(found.get(num, "") for num in samples)] for key, found in cells.items()]
    said = f"Lower bounds of the log-likelihood of {_rows(results)}, nats a row, importance-weighted with K samples (higher is better)."
    said += f" Under this prior they are {results['likelihoods']}." if "likelihoods" in results else ""
    return f"## Log-likelihood\n\n{said}\n\n" + table(["of", "given", *(f"K = {num}" for num in samples)], lines)


def _by_inputs_table(results: Mapping[str, Any]) -> str:
    entries = results["coherence_by_inputs"]
    targets, sizes = (list(dict.fromkeys(entry[name] for entry in entries)) for name in ("target", "inputs"))
    cells = {(entry["inputs"], entry["target"]): _with_ceiling(entry) for entry in entries}
    lines = [[size, *(cells.get((size, target), "") for target in targets)] for size in sizes]
    said = (
        "Mean cross coherence over sets of that many modalities; in brackets behind the interval, where they are known, what one draw "
        "from the exact posterior reaches, and the best that any model could do."
    )
    header = ["inputs", *("all targets" if target is None else f"to {target}" for target in targets)]
    return f"## Coherence by number of inputs\n\n{said}\n\n" + table(header, lines)


def _with_ceiling(entry: Mapping[str, Any]) -> str:
    known = [f"{entry[name]:.3f}" for name in ("sampling_ceiling", "ceiling") if name in entry]
    return estimate(entry) + (f" (of {', '.join(known)})" if known else "")


def _clustering_table(results: Mapping[str, Any]) -> str:
    lines = [[" + ".join(entry["sources"]), estimate(entry["ari"]), estimate(entry["nmi"])] for entry in results["clustering"]]
    said = "Clusters of posterior means (k-means, as many as there are classes) against classes: adjusted Rand index, 0 by chance, and NMI."
    return f"## Clustering\n\n{said}\n\n" + table(["posterior of", "ARI", "NMI"], lines)


def _frechet_table(results: Mapping[str, Any]) -> str:
    entries = results["frechet"]
    targets = list(dict.fromkeys(entry["target"] for entry in entries))
    cells = {(_origin(entry), entry["target"]): f"{estimate(entry, digits=2)} ({entry['count']:,})" for entry in entries}
    origins = dict.fromkeys(_origin(entry) for entry in sorted(entries, key=lambda entry: ORIGINS.index(entry["from"])))
    lines = [[origin, *(cells.get((origin, target), "") for target in targets)] for origin in origins]
    said = (
        f"Distance of what is made from {_rows(results)} in the features of a classifier, and how many rows were made; lower is better. "
        "Too large by an amount that falls as one over the number of rows, which the two halves of the real rows show; the interval, over "
        "rows, is around the value with that amount in it."
    )
    return f"## Frechet distance\n\n{said}\n\n" + table(["made from", *targets], lines)


ORIGINS = ("sources", "prior", "real")


def _origin(entry: Mapping[str, Any]) -> str:
    return {"real": "*half of the real rows*", "prior": "the prior"}.get(entry["from"], " + ".join(entry["sources"]))


QUANTITIES = {"rmse": "RMSE", "mae": "MAE", "accuracy": "accuracy", "log_likelihood": "log p, nats", "crps": "CRPS"}


def _imputation_table(results: Mapping[str, Any]) -> str:
    entries = results["imputation"]
    shown = {name: title for name, title in QUANTITIES.items() if any(name in entry for entry in entries)}
    levels = list(dict.fromkeys(level for entry in entries for level in entry.get("coverage", {})))
    lines = []
    for entry in entries:
        observed = f"any {entry['inputs']}" if entry["observed"] is None else " + ".join(entry["observed"])
        measured = [(estimate if name == "accuracy" else _significant)(entry[name]) if name in entry else "" for name in shown]
        covered = [estimate(entry["coverage"][level]) if "coverage" in entry else "" for level in levels]
        lines.append([observed, entry["target"], *measured, *covered])
    said = (
        f"Modalities of {_rows(results)} filled in from others. Error of the point estimate over all elements, log-likelihood a row, and "
        "the share of values that central predictive intervals of each level hold: a calibrated model's share is the level."
    )
    return f"## Imputation\n\n{said}\n\n" + table(["observed", "filled in", *shown.values(), *levels], lines)


def _correlation_table(results: Mapping[str, Any]) -> str:
    lines = []
    for entry in results["correlation"]:
        a, b = entry["modalities"]
        made = [estimate(entry[name]) for name in ("real", f"{a}>{b}", f"{b}>{a}", "prior")]
        lines.append([f"{a} and {b}", entry["embedding"], *made])
    said = (
        f"Mean correlation of pairs of {_rows(results)} under canonical correlation analysis of the training rows: real pairs, and pairs "
        "of which the second, the first or both sides are generated."
    )
    header = ["modalities", "embedding", "real", "second from first", "first from second", "from the prior"]
    return f"## Correlation\n\n{said}\n\n" + table(header, lines)


def _information_table(results: Mapping[str, Any]) -> str:
    entries = results["information"]
    targets = list(dict.fromkeys(entry["target"] for entry in entries))
    made = [("*real data*" if e["sources"] is None else " + ".join(e["sources"]), e["target"], e) for e in entries]
    cells = {(origin, target): estimate(entry, digits=4) for origin, target, entry in made}
    lines = [[origin, *(cells.get((origin, target), "") for target in targets)] for origin in dict.fromkeys(o for o, _, _ in made)]
    said = "What a label of generated data would tell about a classifier's weights, nats: the lower, the more they look like real data."
    return f"## Mutual information\n\n{said}\n\n" + table(["made from", *targets], lines)


def _rows(results: Mapping[str, Any]) -> str:
    return f"{results.get('split', 'test')} rows"


def estimate(entry: Mapping[str, Any], *, digits: int = 3) -> str:
    """`0.452 [0.434, 0.470]`; a dash where nothing was measured."""
    value, low, high = (entry.get(name) for name in ("value", "low", "high"))
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.{digits}f}" + (f" [{low:.{digits}f}, {high:.{digits}f}]" if low is not None and high is not None else "")


def _significant(entry: Mapping[str, Any]) -> str:
    """`estimate` with four significant digits, for values of any size."""
    value = entry["value"]
    if value is None or not math.isfinite(value):
        return "–"
    return estimate(entry, digits=max(0, 3 - math.floor(math.log10(max(abs(value), 1e-9)))))


def table(header: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """A Markdown table whose columns are padded, so that it reads as text too."""
    body = [[str(cell).replace("|", "\\|") for cell in line] for line in lines]
    widths = [max(len(line[column]) for line in [list(header), *body]) for column in range(len(header))]
    made = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in [list(header), *body]]
    return "\n".join([made[0], "| " + " | ".join("-" * width for width in widths) + " |", *made[1:]])
