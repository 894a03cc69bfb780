"""Evaluation: metrics over a finite stream, and all of the paper's measurements of a trained model as one JSON value.

The result of `measure` (every estimate is {"value", "low", "high", "count"}: a 95 % interval and what it was measured on; null where
nothing could be measured; entries that were not asked for are absent):

    classifiers          {modality: estimate}                    accuracy on real test data: a reference of coherence, no bound
    cross_coherence      [{"sources": [...], "target", estimate}]
    coherence_by_inputs  [{"inputs": n, "target" (null: all), "pairs", estimate, "ceiling", "sampling_ceiling" where they are known}]
                         means over pairs of n sources and a target; the interval knows that pairs share rows
                         (`meme_dist.metrics.by_inputs`); ceilings: of any model, and of one draw from the exact posterior
    joint_coherence      {"all": estimate, "pairs": [{"modalities": [a, b], estimate}]}
    latent_accuracy      [{"sources": [...], estimate}]
    clustering           [{"sources": [...], "ari": estimate, "nmi": estimate}]
    relatedness          [{"modalities": [a, b], "auroc_class", "auroc_row": estimate, "histogram": {"edges", "paired", "unpaired"},
                           "class_matrix", "linkage"}]
    frechet              [{"from": "sources" | "prior" | "real" (one half from the other), "sources": [...], "target", "value", "count",
                           "real": count of real rows}]          intervals over rows, null for features of more than 512 numbers
    log_likelihood       [{"targets": [...], "given": [...], "samples": K, estimate in nats a row, "per_dimension"}]
    imputation           [{"observed": [...] (null: any), "inputs": n, "target", "count", then estimates, as its likelihood allows: "rmse",
                           "mae", "accuracy", "log_likelihood" in nats a row, "crps", "coverage": {"50%", "80%", "95%"}}]
    correlation          [{"embedding": "plain" | "average" | "sif", "modalities": [a, b], "components", "canonical": the strongest on
                           training rows, and estimates "real", "a>b" (b made from a), "b>a", "prior"}]
    information          [{"sources": [...] (null: real data), "target", estimate in nats}]
    left_out             {name: why}                             what this data set cannot be asked, and what came out as no number
    step, split, classes, seed
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from meme_dist import results
from meme_dist.data.fields import Field
from meme_dist.data.stream import Evaluation
from meme_dist.metrics import cca
from meme_dist.metrics.clustering import clustering
from meme_dist.metrics.coherence import cross_key, joint_coherence, joint_key, source_sets
from meme_dist.metrics.information import curvatures, last_layer
from meme_dist.metrics.latents import Latents, collect
from meme_dist.metrics.likelihood import Query, likelihood_key, queries
from meme_dist.metrics.probes import Fit, fit_linear, latent_accuracy
from meme_dist.metrics.relatedness import relatedness
from meme_dist.metrics.rows import Classify, Embed, Judge, Metric, device_of, evaluating, joined, judges_of, on_device
from meme_dist.metrics.sentences import Sentences, average, captions, sif
from meme_dist.objectives.base import Objective
from meme_dist.results import Ceilings
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
    totals: dict[str, Sums] = {}
    device = device_of(objective)
    with evaluating(objective):
        for batch in batches:
            batch = on_device(batch, device)
            for metric in metrics:
                for name, (total, count) in metric(objective, batch).items():
                    new = Sums(total.detach().double(), count.detach().double())
                    old = totals.get(name)
                    totals[name] = new if old is None else Sums(old.total + new.total, old.count + new.count)
    if metrics and not totals:
        raise ValueError("evaluate: expected at least one batch, got none; check the split's number of rows")
    return reduce_sums(totals, reduce)


def reduce_sums(sums: Mapping[str, Sums], reduce: Reduce) -> dict[str, Sums]:
    """Add up every rank's sums, of any shapes, in one exchange; the result is on the CPU."""
    if not sums:
        return {}
    names = sorted(sums)
    parts = [part for name in names for part in sums[name]]
    added = reduce(torch.cat([part.flatten() for part in parts])).cpu().split([part.numel() for part in parts])
    shaped = [flat.view(part.shape) for flat, part in zip(added, parts, strict=True)]
    return {name: Sums(*pair) for name, *pair in zip(names, shaped[::2], shaped[1::2], strict=True)}


def values(sums: Mapping[str, Sums]) -> dict[str, float]:
    """The means, for the log; what nothing was measured on is left out, and so are tables and squares, which only intervals need."""
    plain = {name: s for name, s in sums.items() if s.total.dim() == 0 and not name.endswith("/square")}
    return {name: float(s.total / s.count) for name, s in plain.items() if s.count > 0}


@dataclass(frozen=True)
class Measures:
    """What `measure` measures. A 0 leaves a measurement out."""

    coherence_sources: int = 31  # sets of sources at most: beyond that they are sampled, of every size (N <= 5: all of them)
    own_coherence: bool = False  # also the coherence of reconstructions
    ceilings: Ceilings = field(default_factory=dict)  # {target: {number of inputs: coherence}} where the data set's best is known
    sampling_ceilings: Ceilings = field(default_factory=dict)  # the same for one draw from the exact posterior
    joint_draws: int = 10_000
    probe_rows: int = 10_000  # training rows for the linear probes
    clustering_rows: int = 2_000  # test rows
    relatedness_rows: int = 1_000  # test rows; distances grow with the square
    frechet_rows: int = 2_000  # test rows, of images and whatever else has an embedder
    likelihood_rows: int = 500  # test rows
    likelihood_samples: tuple[int, ...] = (1, 100)  # K; each must divide the largest
    imputation_rows: int = 100  # test rows
    imputation_draws: int = 39  # a row: 39 or 199, whose intervals end at a draw
    correlation_components: int = 0  # of CCA between modalities; 40 in Shi et al. 2019
    information_rows: int = 0  # rows that the classifiers learnt from, for their last layers, and test rows
    seed: int = 0


class Learnt(NamedTuple):
    """What classifiers learnt from: batches of those rows, and how many of them hold each modality."""

    batches: Iterable[Batch]
    rows: Mapping[str, float]


class Measured(NamedTuple):
    """The results as plain JSON, and the test latents for figures (None where nothing was asked of them)."""

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
    learnt: Learnt | None = None,
    embedders: Mapping[str, Embed] | None = None,
    fit: Fit = fit_linear,
    reduce: Reduce = alone,
    rank: int = 0,
    world: int = 1,
) -> Measured:
    """Everything `measures` asks for; collective: each rank calls it with its part of `train` and `test` and gets the whole result.

    What needs labels is left out, with the reason, where the data set has less than two classes. Modalities without a classifier are no
    targets of coherence. `learnt`: what the classifiers learnt from, which mutual information needs. `embedders`: features for Frechet
    distances and correlations, by default those of the images' classifiers.
    """
    classifiers = classifiers if len(classes) > 1 else {}
    judges = judges_of(classifiers, fields)
    if embedders is None:
        embedders = {name: judge.features for name, judge in judges.items() if fields[name].kind == "image"}
    parts = _parts(objective, list(fields), fields, classifiers, embedders, measures)
    if measures.information_rows and judges and learnt:
        parts.append(_information(objective, learnt, list(fields), judges, measures.information_rows, reduce))
    left_out = _left_out(measures, fields, classes, classifiers, judges, embedders) | _unlearnt(measures, classifiers, judges, learnt)
    if measures.correlation_components:
        part, unfit = _correlation(objective, train, fields, embedders, measures.correlation_components, reduce)
        parts.append(part)
        left_out |= unfit
    metrics = [metric for part in parts for metric in part.metrics]
    sums = evaluate(objective, test, metrics, reduce=reduce) if metrics else {}
    entries = [part.entries(sums) for part in parts]
    if len(classifiers) > 1 and measures.joint_draws:
        with evaluating(objective):
            part = joint_coherence(objective, classifiers, num=measures.joint_draws, seed=measures.seed, rank=rank, world=world)
        entries.append(results.joint_entries(reduce_sums(part, reduce), classifiers))
    latents, from_latents = _from_latents(objective, train, test, classes, measures, fit, reduce)
    found: dict[str, Any] = {"classes": list(classes), "seed": measures.seed}
    for entry in (*entries, from_latents):
        left_out |= entry.pop("left_out", {})
        found |= entry
    left_out |= results.not_finite(found)
    return Measured(found | ({"left_out": left_out} if left_out else {}), latents)


def _parts(
    objective: Objective,
    names: Sequence[str],
    fields: Mapping[str, Field],
    classifiers: Mapping[str, Classify],
    embedders: Mapping[str, Embed],
    measures: Measures,
) -> list[results.Part]:
    """What the test rows alone are asked."""
    sources = source_sets(names, most=measures.coherence_sources) if measures.coherence_sources else []
    parts = []
    if measures.likelihood_rows:
        samples, rows = measures.likelihood_samples, measures.likelihood_rows
        parts.append(results.likelihoods(queries(names), fields, samples=samples, rows=rows))
    if classifiers:
        known = {"ceiling": measures.ceilings, "sampling_ceiling": measures.sampling_ceilings}
        parts.append(results.coherence(classifiers, sources, known, own=measures.own_coherence))
    if measures.frechet_rows and embedders:
        parts.append(results.frechets(embedders, names, rows=measures.frechet_rows))
    if measures.imputation_rows:
        patterns = sources or source_sets(names)
        parts.append(results.imputations(objective, patterns, rows=measures.imputation_rows, draws=measures.imputation_draws))
    return parts


def _first(batches: Iterable[Batch], rows: int) -> Iterable[Batch]:
    """What holds the first rows; a split need not be read to its end."""
    return batches.first(rows) if isinstance(batches, Evaluation) else batches


def _information(
    objective: Objective, learnt: Learnt, names: Sequence[str], judges: Mapping[str, Judge], rows: int, reduce: Reduce
) -> results.Part:
    sums = evaluate(objective, _first(learnt.batches, rows), [curvatures(judges, rows=rows)], reduce=reduce)
    of = {name: sums[f"information/curvature/{name}"] for name in judges}
    layers = {name: last_layer(judge.head, of[name], rows=learnt.rows[name]) for name, judge in judges.items()}
    return results.informations(judges, layers, names, rows=rows)


def _correlation(
    objective: Objective,
    train: Iterable[Batch],
    fields: Mapping[str, Field],
    embedders: Mapping[str, Embed],
    components: int,
    reduce: Reduce,
) -> tuple[results.Part, dict[str, str]]:
    """Two passes over the training rows: words and their neighbours, then the moments of the embeddings. And what cannot be measured."""
    texts = {name: len(one.vocabulary) for name, one in fields.items() if one.kind == "text" and name not in embedders}
    learnt = evaluate(objective, train, [captions(texts)], reduce=reduce) if texts else {}
    plain = cca.plain_views(fields, embedders)
    kinds: dict[str, Callable[[Sums], Sentences] | None] = {"average": average, "sif": sif} if texts else {"plain": None}
    known = [name for name in fields if name in plain or name in texts]
    views = {kind: {n: make(learnt[f"words/{n}"]) if make and n in texts else plain[n] for n in known} for kind, make in kinds.items()}
    sums = evaluate(objective, train, [cca.joint_moments(view, kind) for kind, view in views.items()], reduce=reduce)
    final = {kind: cca.final_views(sums, view, kind) for kind, view in views.items()}
    fitted = {kind: cca.fit_pairs(sums, view, kind, components=components) for kind, view in final.items()}
    unfit = {f"correlation of {a} and {b}": why for _, missing in fitted.values() for (a, b), why in missing.items()}
    return results.correlated({kind: (fitted[kind][0], view) for kind, view in final.items()}), unfit


def _left_out(
    measures: Measures,
    fields: Mapping[str, Field],
    classes: Sequence[str],
    classifiers: Mapping[str, Classify],
    judges: Mapping[str, Judge],
    embedders: Mapping[str, Embed],
) -> dict[str, str]:
    labels = {
        "cross_coherence": measures.coherence_sources,
        "joint_coherence": measures.joint_draws,
        "latent_accuracy": measures.probe_rows,
        "clustering": measures.clustering_rows,
        "information": measures.information_rows,
    }
    why = "two classes or more, and this data set has one" if classes else "class labels, and this data set has none"
    found = {name: f"needs {why}" for name, wanted in labels.items() if wanted and len(classes) < 2}
    unseen = [name for name, one in fields.items() if one.kind == "image" and name not in embedders]
    if measures.frechet_rows and unseen:
        found["frechet"] = (
            f"of {', '.join(unseen)}: needs a classifier that ends in a linear layer, or an embedder given to `measure`"
            if classifiers
            else "needs features of images: labels, so that classifiers can be trained, or embedders given to `measure`"
        )
    return found


def _unlearnt(
    measures: Measures, classifiers: Mapping[str, Classify], judges: Mapping[str, Judge], learnt: Learnt | None
) -> dict[str, str]:
    """Why mutual information is not measured of some of these classifiers, or of none."""
    headless = [name for name in classifiers if name not in judges]
    if not classifiers or not measures.information_rows:
        return {}
    if headless:
        return {"information": f"of {', '.join(headless)}: needs a classifier that ends in a linear layer"}
    return {} if learnt else {"information": "needs the rows that the classifiers learnt from, given to `measure`"}


def _from_latents(
    objective: Objective,
    train: Iterable[Batch],
    test: Iterable[Batch],
    classes: Sequence[str],
    measures: Measures,
    fit: Fit,
    reduce: Reduce,
) -> tuple[Latents | None, dict[str, Any]]:
    probed, clustered = (rows if len(classes) > 1 else 0 for rows in (measures.probe_rows, measures.clustering_rows))
    rows = max(probed, clustered, measures.relatedness_rows)
    if not rows:
        return None, {}
    alone = [(name,) for name in objective.modalities]
    sources = [*alone, *([tuple(objective.modalities)] if clustered else [])]
    table = collect(objective, _first(test, rows), rows=rows, sources=sources, reduce=reduce)
    latents, why = table.finite(), "some are not finite; is the model trained?"
    left_out = {f"latents of {joined(names)}": why for names in table.posteriors if names not in latents.posteriors}
    found: dict[str, Any] = {"left_out": left_out}
    if probed:
        learnt = collect(objective, _first(train, probed), rows=probed, reduce=reduce).finite()
        if bool((learnt.label >= 0).any()):
            accuracy = latent_accuracy(learnt, latents, classes=len(classes), fit=fit)
            found["latent_accuracy"] = [{"sources": list(names), **estimate.json()} for names, estimate in accuracy.items()]
        else:
            left_out["latent_accuracy"] = "needs class labels, and no training row has one"
    if clustered:
        found |= results.clustered(clustering(latents.first(clustered), classes=len(classes), seed=measures.seed))
    if measures.relatedness_rows:
        found |= results.related(relatedness(latents.first(measures.relatedness_rows), classes=len(classes)))
    return latents, found


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
    flat |= {_by_inputs(e): e["value"] for e in results.get("coherence_by_inputs", [])}
    for entry in results.get("clustering", []):
        flat |= {f"{name}/{'+'.join(entry['sources'])}": entry[name]["value"] for name in ("ari", "nmi")}
    for entry in results.get("frechet", []):
        flat[f"frechet/{'+'.join(entry['sources']) or entry['from']}>{entry['target']}"] = entry["value"]
    for entry in results.get("information", []):
        flat[f"information/{'real' if entry['sources'] is None else '+'.join(entry['sources'])}>{entry['target']}"] = entry["value"]
    for entry in results.get("correlation", []):
        name = f"correlation/{entry['embedding']}/{'-'.join(entry['modalities'])}"
        flat |= {f"{name}/{made}": entry[made]["value"] for made in cca.makings(tuple(entry["modalities"]))}
    for entry in results.get("imputation", []):
        flat |= _imputed(entry)
    for entry in results.get("log_likelihood", []):
        flat[likelihood_key(Query(tuple(entry["targets"]), tuple(entry["given"])), entry["samples"])] = entry["value"]
    return {name: value for name, value in flat.items() if value is not None}


def _by_inputs(entry: Mapping[str, Any]) -> str:
    return f"coherence_by_inputs/{entry['inputs']}" + (f">{entry['target']}" if entry["target"] else "")


def _imputed(entry: Mapping[str, Any]) -> dict[str, Any]:
    observed = f"{entry['inputs']} observed" if entry["observed"] is None else "+".join(entry["observed"])
    measured = {name: entry[name] for name in ("rmse", "mae", "accuracy", "log_likelihood", "crps") if name in entry}
    measured |= {f"coverage@{level}": estimate for level, estimate in entry.get("coverage", {}).items()}
    return {f"imputation/{observed}>{entry['target']}/{name}": estimate["value"] for name, estimate in measured.items()}
