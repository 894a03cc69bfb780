"""The parts of an evaluation: for each kind of measurement the metrics that add up its sums, and what its sums become in results.json.

`meme_dist.evaluate` says what the entries mean, chooses the parts and runs their metrics in one pass over the test rows.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from meme_dist.data.fields import Field
from meme_dist.metrics import intervals
from meme_dist.metrics.by_inputs import GROUPS, coherence_by_inputs
from meme_dist.metrics.cca import Pair, Projection, cca_key, correlations, makings
from meme_dist.metrics.clustering import Clustering
from meme_dist.metrics.coherence import Sources, classifier_accuracy, cross_coherence, cross_key, joint_key
from meme_dist.metrics.frechet import frechet, frechet_distances
from meme_dist.metrics.imputation import LEVELS, Pattern, imputation, imputation_key, pattern_of, quantities
from meme_dist.metrics.information import LastLayer, information, information_key, information_sources
from meme_dist.metrics.intervals import Estimate
from meme_dist.metrics.likelihood import Query, likelihood_key, log_likelihood
from meme_dist.metrics.relatedness import Relatedness, linkage_json
from meme_dist.metrics.rows import Classify, Embed, Judge, Metric
from meme_dist.metrics.sentences import Sentences
from meme_dist.objectives.base import Objective
from meme_dist.types import Sums

Ceilings = Mapping[str, Mapping[int, float]]
"""For a target and a number of inputs: the coherence that no model can exceed, or that one draw from the exact posterior has."""


class Part(NamedTuple):
    """Metrics of the test rows, and what their sums, over all ranks, say as plain JSON; `left_out`, with the reason, what they cannot."""

    metrics: Sequence[Metric]
    entries: Callable[[Mapping[str, Sums]], dict[str, Any]]


def _mean(sums: Mapping[str, Sums], key: str) -> Estimate:
    return intervals.mean(sums[key], sums[f"{key}/square"])


# ---- coherence --------------------------------------------------------------------------------------------------------------------------


def coherence(classifiers: Mapping[str, Classify], sources: Sequence[Sources], ceilings: Mapping[str, Ceilings], *, own: bool) -> Part:
    """`classifiers`, `cross_coherence` and `coherence_by_inputs` with these ceilings by name; without sources the first alone."""
    metrics = [classifier_accuracy(classifiers), *([cross_coherence(classifiers, sources, own=own, groups=GROUPS)] if sources else [])]

    def entries(sums: Mapping[str, Sums]) -> dict[str, Any]:
        found = {"classifiers": {name: intervals.proportion(sums[f"classifier/{name}"]).json() for name in classifiers}}
        return found | (_crosses(sums, classifiers, sources, ceilings, own) if sources else {})

    return Part(metrics, entries)


def _crosses(
    sums: Mapping[str, Sums], classifiers: Mapping[str, Classify], sources: Sequence[Sources], ceilings: Mapping[str, Ceilings], own: bool
) -> dict[str, Any]:
    pairs = [(chosen, target) for chosen in sources for target in classifiers if own or target not in chosen]
    cross = [{"sources": list(s), "target": t, **intervals.proportion(sums[cross_key(s, t)]).json()} for s, t in pairs]
    if cross and not any(entry["count"] for entry in cross):
        return {"left_out": {"cross_coherence": "needs class labels, and no test row that holds its sources has one"}}
    found: dict[str, Any] = {"cross_coherence": cross} if cross else {}
    by_inputs = []
    for line in coherence_by_inputs(sums, sources, list(classifiers)):
        entry = {"inputs": line.inputs, "target": line.target, "pairs": line.pairs, **line.estimate.json()}
        known = {name: values.get(line.target or "", {}) for name, values in ceilings.items()}
        by_inputs.append(entry | {name: values[line.inputs] for name, values in known.items() if line.inputs in values})
    return found | ({"coherence_by_inputs": by_inputs} if by_inputs else {})


def joint_entries(sums: Mapping[str, Sums], classifiers: Mapping[str, Classify]) -> dict[str, Any]:
    """`joint_coherence`, from the sums of `meme_dist.metrics.joint_coherence`."""
    names = list(classifiers)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    together = intervals.proportion(sums["joint_coherence/all"]).json()
    apart = [{"modalities": list(pair), **intervals.proportion(sums[joint_key(pair)]).json()} for pair in pairs]
    return {"joint_coherence": {"all": together, "pairs": apart}}


# ---- likelihood and imputation ----------------------------------------------------------------------------------------------------------


def likelihoods(asked: Sequence[Query], fields: Mapping[str, Field], *, samples: Sequence[int], rows: int) -> Part:
    """`log_likelihood`."""

    def entries(sums: Mapping[str, Sums]) -> dict[str, Any]:
        return {"log_likelihood": [_likelihood(sums, query, num, fields) for query in asked for num in samples]}

    return Part([log_likelihood(asked, samples=samples, rows=rows)], entries)


def _likelihood(sums: Mapping[str, Sums], query: Query, num: int, fields: Mapping[str, Field]) -> dict[str, Any]:
    estimate = _mean(sums, likelihood_key(query, num))
    size = sum(math.prod(fields[name].shape) for name in query.targets)
    entry = {"targets": list(query.targets), "given": list(query.given), "samples": num, **estimate.json()}
    return {**entry, "per_dimension": estimate.value / size if math.isfinite(estimate.value) else None}


def imputations(objective: Objective, sources: Sequence[Sources], *, rows: int, draws: int) -> Part:
    """`imputation`."""
    names = list(objective.modalities)
    lines = dict.fromkeys((pattern_of(s, len(names)), target) for s in sources for target in names if target not in s)

    def entries(sums: Mapping[str, Sums]) -> dict[str, Any]:
        return {"imputation": [_imputed(sums, pattern, target, quantities(objective, target)) for pattern, target in lines]}

    return Part([imputation(sources, rows=rows, draws=draws)], entries)


def _imputed(sums: Mapping[str, Sums], pattern: Pattern, target: str, measured: Sequence[str]) -> dict[str, Any]:
    estimates = {quantity: _mean(sums, imputation_key(pattern, target, quantity)) for quantity in measured}
    observed = None if pattern.sources is None else list(pattern.sources)
    entry: dict[str, Any] = {"observed": observed, "inputs": pattern.inputs, "target": target}
    entry["count"] = next(iter(estimates.values())).count
    if "squared_error" in estimates:
        entry |= {"rmse": _root(estimates["squared_error"]).json(), "mae": estimates["absolute_error"].json()}
    entry |= {"accuracy": intervals.within(estimates["accuracy"]).json()} if "accuracy" in estimates else {}
    entry |= {name: estimates[name].json() for name in ("log_likelihood", "crps") if name in estimates}
    shares = {level: estimates[f"coverage@{level}"] for level in LEVELS if f"coverage@{level}" in estimates}
    covered = {f"{level:.0%}": intervals.within(share).json() for level, share in shares.items()}
    return entry | ({"coverage": covered} if covered else {})


def _root(square: Estimate) -> Estimate:
    value, low, high = (bound if math.isnan(bound) else math.sqrt(max(0.0, bound)) for bound in square[:3])
    return Estimate(value, low, high, square.count)


# ---- in the features of a network -------------------------------------------------------------------------------------------------------


def frechets(embedders: Mapping[str, Embed], names: Sequence[str], *, rows: int) -> Part:
    """`frechet`."""

    def entries(sums: Mapping[str, Sums]) -> dict[str, Any]:
        found = []
        for one in frechet_distances(sums, names, list(embedders)):
            made_from = "real" if one.sources is None else "sources" if one.sources else "prior"
            estimate = Estimate(one.value, one.low, one.high, one.count).json()
            found.append({"from": made_from, "sources": list(one.sources or ()), "target": one.target, **estimate, "real": one.real})
        return {"frechet": found}

    return Part([frechet(embedders, names, rows=rows)], entries)


def informations(judges: Mapping[str, Judge], layers: Mapping[str, LastLayer], names: Sequence[str], *, rows: int) -> Part:
    """`information`."""
    lines = [(sources, target) for target in layers for sources in [None, *information_sources(names, target)]]

    def entries(sums: Mapping[str, Sums]) -> dict[str, Any]:
        scores = [(sources, target, _mean(sums, information_key(sources, target)).json()) for sources, target in lines]
        return {"information": [{"sources": None if s is None else list(s), "target": t, **score} for s, t, score in scores]}

    return Part([information(judges, layers, names, rows=rows)], entries)


def correlated(fitted: Mapping[str, tuple[Mapping[Pair, Projection], Mapping[str, Embed]]]) -> Part:
    """`correlation`, for each variant of the embedding its projections and views."""
    metrics = [correlations(projections, views, variant) for variant, (projections, views) in fitted.items()]

    def entries(sums: Mapping[str, Sums]) -> dict[str, Any]:
        found = []
        for variant, (projections, views) in fitted.items():
            for pair, projection in projections.items():
                estimates = {made: intervals.within(_mean(sums, cca_key(variant, pair, made)), -1.0).json() for made in makings(pair)}
                strongest = float(projection.correlation[0]) if len(projection.correlation) else None
                embedding = variant if any(isinstance(views[name], Sentences) for name in pair) else "plain"
                about = {"embedding": embedding, "modalities": list(pair), "components": len(projection.correlation)}
                found.append({**about, "canonical": strongest, **estimates})
        return {"correlation": found}

    return Part(metrics, entries)


# ---- of latents -------------------------------------------------------------------------------------------------------------------------


def clustered(found: Mapping[Sources, Clustering]) -> dict[str, Any]:
    """`clustering`."""
    return {"clustering": [{"sources": list(s), "ari": one.ari.json(), "nmi": one.nmi.json()} for s, one in found.items()]}


def related(found: Mapping[tuple[str, str], Relatedness]) -> dict[str, Any]:
    """`relatedness`."""
    return {"relatedness": [{"modalities": list(pair), **_related(one)} for pair, one in found.items()]}


def _related(one: Relatedness) -> dict[str, Any]:
    histogram = {name: array.tolist() for name, array in one.histogram._asdict().items()}
    found: dict[str, Any] = {"auroc_row": one.auroc_row.json(), "histogram": histogram}
    if one.auroc_class is not None and one.class_matrix is not None:
        matrix = [[None if np.isnan(value) else float(value) for value in row] for row in one.class_matrix]
        found |= {"auroc_class": one.auroc_class.json(), "class_matrix": matrix, "linkage": linkage_json(one.linkage)}
    return found


# ---- what came out as no number ---------------------------------------------------------------------------------------------------------


def not_finite(found: Mapping[str, Any]) -> dict[str, str]:
    """Why values are null although there were rows to measure them on: a line for each measurement that has such, as in `left_out`."""
    told = {}
    for name, entry in found.items():
        values = [estimate["value"] for estimate in _estimates(entry)]
        if missing := values.count(None):
            told[f"{missing} of {len(values)} values of {name}"] = "they are not finite; is the model trained?"
    return told


def _estimates(entry: Any) -> Iterator[Mapping[str, Any]]:
    """Every estimate in plain JSON that had rows enough for a value: one, or for a distance two on either side."""
    if isinstance(entry, Mapping):
        if "value" in entry and min(entry["count"], entry.get("real", 2) - 1) > 0:
            yield entry
        entry = list(entry.values())
    if isinstance(entry, list):
        for part in entry:
            yield from _estimates(part)
