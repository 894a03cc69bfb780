"""Evaluation: metrics over a finite stream, and all of the paper's measurements of a trained model as one JSON value.

The result of `measure` (every estimate is {"value", "low", "high", "count"}: a 95 % interval and what it was measured on; null where
nothing could be measured; entries that were not asked for are absent):

    classifiers        {modality: estimate}                      accuracy on real test data, which caps the coherence towards it
    cross_coherence    [{"sources": [...], "target", estimate}]
    joint_coherence    {"all": estimate, "pairs": [{"modalities": [a, b], estimate}]}
    latent_accuracy    [{"sources": [...], estimate}]
    relatedness        [{"modalities": [a, b], "auroc_class", "auroc_row": estimate, "histogram": {"edges", "paired", "unpaired"},
                         "class_matrix", "linkage"}]
    log_likelihood     [{"targets": [...], "given": [...], "samples": K, estimate in nats a row, "per_dimension"}]
    left_out           {name: why}                               what this data set cannot be asked
    rows, classes, seed
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from meme_dist.data.fields import Field
from meme_dist.metrics import intervals
from meme_dist.metrics.coherence import Sources, classifier_accuracy, cross_coherence, cross_key, joint_coherence, joint_key, source_sets
from meme_dist.metrics.latents import Latents, collect
from meme_dist.metrics.likelihood import Query, likelihood_key, log_likelihood, queries
from meme_dist.metrics.probes import Fit, fit_linear, latent_accuracy
from meme_dist.metrics.relatedness import Relatedness, linkage_json, relatedness
from meme_dist.metrics.rows import Classify, Metric, device_of, evaluating, on_device
from meme_dist.objectives.base import Objective
from meme_dist.types import Batch, Sums

Reduce = Callable[[Tensor], Tensor]
"""The sum of a tensor over all ranks; called equally often on each."""


def alone(tensor: Tensor) -> Tensor:
    """The `Reduce` of a single process."""
    return tensor


def evaluate(objective: Objective, batches: Iterable[Batch], metrics: Sequence[Metric], *, reduce: Reduce = alone) -> dict[str, Sums]:
    """The metrics' sums over all batches of all ranks, in double precision; the model's modes are as they were when it returns.

    The sums cross the ranks once, at the end. Every rank needs one batch at least (`Evaluation` gives all of them equally many), since
    the metrics' names come from batches; raises ValueError where there is none.
    """
    totals: dict[str, Tensor] = {}
    device = device_of(objective)
    with evaluating(objective):
        for batch in batches:
            batch = on_device(batch, device)
            for metric in metrics:
                for name, sums in metric(objective, batch).items():
                    pair = torch.stack([sums.total.detach().double(), sums.count.detach().double()])
                    totals[name] = totals[name] + pair if name in totals else pair
    if metrics and not totals:
        raise ValueError("evaluate: expected at least one batch, got none; check the split's number of rows")
    return reduce_sums({name: Sums(*pair) for name, pair in totals.items()}, reduce)


def reduce_sums(sums: Mapping[str, Sums], reduce: Reduce) -> dict[str, Sums]:
    """Add up every rank's sums in one exchange."""
    if not sums:
        return {}
    names = sorted(sums)
    table = reduce(torch.stack([torch.stack([sums[name].total, sums[name].count]) for name in names]))
    return {name: Sums(*row) for name, row in zip(names, table.cpu(), strict=True)}


def values(sums: Mapping[str, Sums]) -> dict[str, float]:
    """The means, for the log; what nothing was measured on is left out."""
    return {name: float(s.total / s.count) for name, s in sums.items() if s.count > 0 and not name.endswith("/square")}


@dataclass(frozen=True)
class Measures:
    """What `measure` measures. A 0 leaves a measurement out."""

    coherence_sources: int = 31  # sets of sources at most: beyond that they are sampled, of every size (N <= 5: all of them)
    own_coherence: bool = False  # also the coherence of reconstructions
    joint_draws: int = 10_000
    probe_rows: int = 10_000  # training rows for the linear probes
    relatedness_rows: int = 1_000  # test rows; distances grow with the square
    likelihood_rows: int = 500  # test rows
    likelihood_samples: tuple[int, ...] = (1, 100)  # K; each must divide the largest
    seed: int = 0


class Measured(NamedTuple):
    """The results as plain JSON, and the test latents for figures (None where neither probes nor relatedness were asked for)."""

    results: dict[str, Any]
    latents: Latents | None


def measure(
    objective: Objective,
    *,
    train: Iterable[Batch],
    test: Iterable[Batch],
    fields: Mapping[str, Field],
    classes: Sequence[str],
    classifiers: Mapping[str, Classify],
    measures: Measures,
    fit: Fit = fit_linear,
    reduce: Reduce = alone,
    rank: int = 0,
    world: int = 1,
) -> Measured:
    """Everything `measures` asks for; collective: each rank calls it with its part of `train` and `test` and gets the whole result.

    What needs labels is left out, with the reason, where the data set has no classes. Modalities without a classifier are no targets of
    coherence.
    """
    sources = source_sets(list(fields), most=measures.coherence_sources, seed=measures.seed) if measures.coherence_sources else []
    asked = queries(list(fields)) if measures.likelihood_rows else []
    left_out = {} if classes else _unlabelled(measures)
    classifiers = classifiers if classes else {}
    metrics = [log_likelihood(asked, samples=measures.likelihood_samples, rows=measures.likelihood_rows)] if asked else []
    if classifiers:
        metrics += [cross_coherence(classifiers, sources, own=measures.own_coherence), classifier_accuracy(classifiers)]
    sums = evaluate(objective, test, metrics, reduce=reduce) if metrics else {}
    if len(classifiers) > 1 and measures.joint_draws:
        with evaluating(objective):
            part = joint_coherence(objective, classifiers, num=measures.joint_draws, seed=measures.seed, rank=rank, world=world)
        sums |= reduce_sums(part, reduce)
    results = {
        "classes": list(classes),
        "seed": measures.seed,
        **_coherences(sums, classifiers, sources, measures),
        **_likelihoods(sums, asked, measures, fields),
    }
    latents, from_latents = _from_latents(objective, train, test, classes, measures, fit, reduce)
    return Measured({**results, **from_latents, **({"left_out": left_out} if left_out else {})}, latents)


def _unlabelled(measures: Measures) -> dict[str, str]:
    asked = {
        "cross_coherence": measures.coherence_sources,
        "joint_coherence": measures.joint_draws,
        "latent_accuracy": measures.probe_rows,
    }
    return {name: "needs class labels, and this data set has none" for name, wanted in asked.items() if wanted}


def _coherences(sums: Mapping[str, Sums], classifiers: Mapping[str, Classify], sources: Sequence[Sources], measures: Measures) -> dict:
    if not classifiers:
        return {}
    cross = [
        {"sources": list(chosen), "target": target, **intervals.proportion(sums[cross_key(chosen, target)]).json()}
        for chosen in sources
        for target in classifiers
        if measures.own_coherence or target not in chosen
    ]
    if cross and not any(entry["count"] for entry in cross):
        raise ValueError("cross coherence needs class labels and no test row that holds its sources has one; write the shards with labels")
    accuracy = {name: intervals.proportion(sums[f"classifier/{name}"]).json() for name in classifiers}
    found: dict[str, Any] = {"classifiers": accuracy} | ({"cross_coherence": cross} if cross else {})
    if "joint_coherence/all" in sums:
        names = list(classifiers)
        pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
        found["joint_coherence"] = {
            "all": intervals.proportion(sums["joint_coherence/all"]).json(),
            "pairs": [{"modalities": list(pair), **intervals.proportion(sums[joint_key(pair)]).json()} for pair in pairs],
        }
    return found


def _likelihoods(sums: Mapping[str, Sums], asked: Sequence[Query], measures: Measures, fields: Mapping[str, Field]) -> dict:
    found = []
    for query in asked:
        size = sum(math.prod(fields[name].shape) for name in query.targets)
        for num in measures.likelihood_samples:
            key = likelihood_key(query, num)
            estimate = intervals.mean(sums[key], sums[f"{key}/square"])
            per_dimension = estimate.value / size if estimate.count else None
            entry = {"targets": list(query.targets), "given": list(query.given), "samples": num, **estimate.json()}
            found.append({**entry, "per_dimension": per_dimension})
    return {"log_likelihood": found} if found else {}


def _from_latents(
    objective: Objective,
    train: Iterable[Batch],
    test: Iterable[Batch],
    classes: Sequence[str],
    measures: Measures,
    fit: Fit,
    reduce: Reduce,
) -> tuple[Latents | None, dict[str, Any]]:
    probed = bool(measures.probe_rows and classes)
    if not probed and not measures.relatedness_rows:
        return None, {}
    rows = max(measures.probe_rows if probed else 0, measures.relatedness_rows)
    latents = collect(objective, test, rows=rows, reduce=reduce)
    found: dict[str, Any] = {}
    if probed:
        learnt = collect(objective, train, rows=measures.probe_rows, reduce=reduce)
        accuracy = latent_accuracy(learnt, latents, classes=len(classes), fit=fit)
        found["latent_accuracy"] = [{"sources": list(names), **estimate.json()} for names, estimate in accuracy.items()]
    if measures.relatedness_rows:
        related = relatedness(latents.first(measures.relatedness_rows), classes=len(classes))
        found["relatedness"] = [{"modalities": list(pair), **_related_json(one)} for pair, one in related.items()]
    return latents, found


def _related_json(related: Relatedness) -> dict[str, Any]:
    histogram = {name: array.tolist() for name, array in related.histogram._asdict().items()}
    found: dict[str, Any] = {"auroc_row": related.auroc_row.json(), "histogram": histogram}
    if related.auroc_class is not None and related.class_matrix is not None:
        matrix = [[None if np.isnan(value) else float(value) for value in row] for row in related.class_matrix]
        found |= {"auroc_class": related.auroc_class.json(), "class_matrix": matrix, "linkage": linkage_json(related.linkage)}
    return found


def flatten(results: Mapping[str, Any]) -> dict[str, float]:
    """The values by name, as in the log: `cross_coherence/mnist>photo`, `auroc_class/mnist-photo`, `log_likelihood/photo|mnist@100`.

    What `meme_dist.metrics.aggregate` takes from each of several runs.
    """
    flat: dict[str, Any] = {f"classifier/{name}": entry["value"] for name, entry in results.get("classifiers", {}).items()}
    flat |= {cross_key(tuple(e["sources"]), e["target"]): e["value"] for e in results.get("cross_coherence", [])}
    joint = results.get("joint_coherence", {})
    flat |= {"joint_coherence/all": joint["all"]["value"]} if joint else {}
    flat |= {joint_key(e["modalities"]): e["value"] for e in joint.get("pairs", [])}
    flat |= {f"latent_accuracy/{'+'.join(e['sources'])}": e["value"] for e in results.get("latent_accuracy", [])}
    for entry in results.get("relatedness", []):
        pair = "-".join(entry["modalities"])
        flat |= {f"{name}/{pair}": entry[name]["value"] for name in ("auroc_class", "auroc_row") if name in entry}
    for entry in results.get("log_likelihood", []):
        flat[likelihood_key(Query(tuple(entry["targets"]), tuple(entry["given"])), entry["samples"])] = entry["value"]
    return {name: value for name, value in flat.items() if value is not None}
