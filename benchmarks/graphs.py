"""Graphs: does a learned vector for each vertex type beat one-hot; what all states at once save; graphs among missing entries; a search.

types     Each way to tell the networks a vertex's type, trained through the recipes and the trainer on graphs and their values (MVAE, the
          divergence weighted by beta; the graph's own term is D-VAE's loss), several seeds. The control is one-hot times four: a louder
          beginning alone learns faster. `learnt` says how far from convergence a run is: what
          log p(graph | z) of training rows gained over its last tenth.
speed     log p(graph | z) and its gradient, all states of a vertex at once beside one choice after the other.
missing   MEME of graph and value with more and more entries missing: either from the other, and what graphs that were asked for by value
          are really worth (made-up graphs, whose value is known for any graph).
search    Bayesian optimisation in the latent space beside random trials of the same candidates, from 300 values: training has all graphs
          and those values alone. Bayesian networks scored by BIC where --source has them, made-up graphs otherwise.
"""

import contextlib
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from rich.console import Console

from benchmarks.record import CPU, interleaved, keep
from meme_dist.data.index import Manifest
from meme_dist.data.sets import asia, dags
from meme_dist.data.sets._graphs import parts as splits_of
from meme_dist.data.shards import Dataset, write_shards
from meme_dist.data.shards import Row as Example
from meme_dist.data.stream import Evaluation, Stream
from meme_dist.evaluate import evaluate
from meme_dist.metrics import graphs
from meme_dist.metrics.imputation import imputation
from meme_dist.metrics.intervals import over_runs
from meme_dist.metrics.likelihood import Query, log_likelihood
from meme_dist.metrics.rows import device_of, evaluating, on_device
from meme_dist.modalities.graph import graph
from meme_dist.modalities.graph_types import Embedding
from meme_dist.noise import Noise
from meme_dist.objectives.base import Objective
from meme_dist.recipes.asia import asia as asia_recipe
from meme_dist.recipes.base import Model, Recipe
from meme_dist.recipes.dags import dags as dags_recipe
from meme_dist.recipes.enas import enas as enas_recipe
from meme_dist.recipes.graphs import Vertices
from meme_dist.run import initial_objective
from meme_dist.train.startup import device
from meme_dist.train.trainer import Trainer
from meme_dist.train.training import Training

Part = Literal["types", "speed", "missing", "search"]
Set = Literal["enas", "asia", "dags8", "dags512"]
VERTICES: tuple[Vertices, ...] = ("one_hot", "one_hot_x4", "embedding", "tied")
CONTROL = "one_hot"
INDUCING = 500
KNOWN = 300  # values from which a search begins
ROWS, SIZE = 20_000, 8  # made-up graphs, and their vertices at most
Row = dict[str, Any]


class Case(NamedTuple):
    """One training and what is measured of it."""

    part: Part
    data: Set
    vertices: Vertices
    seed: int
    steps: int
    hidden: int
    learning_rate: float
    missing: float
    source: str
    rows: int
    size: int
    beta: float


def main(
    *,
    parts: tuple[Part, ...] = ("types", "speed", "missing", "search"),
    source: Path | None = None,
    sets: tuple[Set, ...] = ("dags8", "dags512"),
    vertices: tuple[Vertices, ...] = VERTICES,
    seeds: tuple[int, ...] = (0, 1),
    steps: int = 200,
    hidden: int = 64,
    learning_rate: float = 2e-3,
    missing: tuple[float, ...] = (0.0, 0.3, 0.5),
    beta: float = 0.005,
    rows: int = ROWS,
    size: int = SIZE,
    jobs: int = 2,
    save: bool = True,
) -> None:
    """Vertex types, the speed of the batched form, missing entries, and a search in latent space.

    Args:
        parts: What to measure.
        source: Folder with final_structures6.txt.gz (enas), asia_bn_20000_regenerated.npz and asia_5000.npz (asia).
        sets: Data for `types`: enas and asia (from --source), made-up graphs of 8 or 512 types.
        vertices: Ways to tell a type; one_hot is what the others are compared with.
        seeds: Of weights, order and noise; the graphs stay the same.
        steps: Of each training; 20,000 and more for convergence.
        hidden: Numbers of a vertex's state; 501 in D-VAE.
        learning_rate: The highest of a cosine.
        missing: Shares of entries for `missing`.
        beta: Weight of the divergence for `types` and `search`; .005 in D-VAE.
        rows: Made-up graphs, those to test on included.
        size: Vertices of a made-up graph, at most; small ones converge within minutes of a CPU.
        jobs: Trainings at a time, each on one thread.
        save: Append the rows to benchmarks/results/graphs.jsonl.
    """
    common = {"steps": steps, "hidden": hidden, "learning_rate": learning_rate, "source": str(source or "")}
    common |= {"rows": rows, "size": size, "beta": beta}
    cases = [Case("types", d, v, s, missing=0.0, **common) for d in sets for v in vertices for s in seeds] if "types" in parts else []
    cases += [Case("missing", "dags8", "embedding", s, missing=m, **common) for m in missing for s in seeds] if "missing" in parts else []
    searched: Set = "dags8" if source is None else "asia"
    cases += [Case("search", searched, "embedding", s, missing=0.0, **common) for s in seeds] if "search" in parts else []
    timed, fitted = speeds() if "speed" in parts else [], list(trained(cases, jobs))
    show([*timed, *fitted])
    if save:
        keep("graphs", timed, device=CPU, threads=1)
        print(f"\nkept in {keep('graphs', fitted, device=device(), threads=1)}")


def trained(cases: Sequence[Case], jobs: int) -> Iterator[Row]:
    """Each case in a process of its own, several at a time; the rows come in the order of the cases."""
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(max(1, jobs), mp_context=get_context("spawn")) as pool:
        for shards, case in {_shards(folder, case): case for case in cases}.items():  # once, before two processes want it
            write_shards(_dataset(case), shards)
        for case, row in zip(cases, pool.map(measured, cases, [folder] * len(cases)), strict=True):
            print(told(row), flush=True)
            about = {name: value for name, value in case._asdict().items() if name != "source"}  # a folder of this machine
            yield {**about, **row}


# ---- one training -----------------------------------------------------------------------------------------------------------------------


def recipe_of(case: Case) -> Recipe:
    """The recipe of the case: its data, its networks, its objective."""
    model = Model(latent_dim=32, objective="mvae", beta=case.beta)
    if case.part == "missing":
        model = Model(latent_dim=16, samples=5, pseudo_inputs=50)
    training = Training(steps=case.steps, learning_rate=case.learning_rate, schedule="cosine", clip=1000.0, seed=case.seed)
    shared: dict[str, Any] = {
        "vertices": case.vertices,
        "hidden": case.hidden,
        "missing": case.missing,
        "model": model,
        "training": training,
    }
    match case.data:
        case "enas":
            return enas_recipe(source=Path(case.source), **shared)
        case "asia":
            return asia_recipe(source=Path(case.source), **shared)
        case "dags8" | "dags512":
            return dags_recipe(types=int(case.data.removeprefix("dags")), rows_in_all=case.rows, size=case.size, **shared)


def measured(case: Case, folder: str) -> Row:
    """Train it, and measure what its part asks for; on one thread."""
    torch.set_num_threads(1)
    recipe, shards = recipe_of(case), _shards(folder, case)
    manifest = Manifest.load(shards)
    objective = initial_objective(recipe, manifest)
    stream = Stream(shards, "train", batch_size=recipe.training.batch_size, seed=case.seed)
    start, bounds = time.process_time(), []
    for report in Trainer(objective, stream, replace(recipe.training, log_every=max(1, case.steps // 10))):
        if report.terms:
            bounds.append(report.terms.get("reconstruction/graph", float("nan")))
    row: Row = {"cpu_s": round(time.process_time() - start, 1), "parameters": sum(p.numel() for p in objective.parameters())}
    row |= {"learnt": round(bounds[-1] - bounds[-2], 3)} if len(bounds) > 1 else {}
    match case.part:
        case "missing":
            return row | _either_way(objective, shards)
        case "search":
            return row | _searched(case, objective, shards)
        case _:
            return row | _reconstructed(case, objective, manifest, shards)


def _reconstructed(case: Case, objective: Objective, manifest: Manifest, shards: Path) -> Row:
    train, test = (graphs.table(objective, _rows(shards, split)) for split in ("train", "test"))
    types = len(manifest.fields["graph"].vocabulary)
    group = graphs.frequency_groups(train.x, types, min(10, types))
    sums = evaluate(objective, _rows(shards, "test"), [graphs.reconstruction(), graphs.type_accuracy(group)])
    share = {name: (s.total / s.count.clamp(min=1)) for name, s in sums.items()}
    latent, raw = graphs.latent_predictivity(train, test, inducing=INDUCING), graphs.raw_predictivity(train, test)
    made = graphs.novelty(graphs.prior_graphs(objective, 200), train.x, asia.complete if case.data == "asia" else graphs.everything_valid)
    return {
        "log_prob": round(share["graph/log_prob"].item(), 3),
        "exact": round(share["graph/exact"].item(), 4),
        "exact_sampled": round(share["graph/exact_sampled"].item(), 4),
        "agreement": round(share["graph/agreement"].item(), 4),
        "types_by_frequency": [round(v, 4) for v in share["graph/types"].tolist()],
        "rmse": round(latent.rmse, 4),
        "r": round(latent.correlation, 4),
        "raw_rmse": round(raw.rmse, 4),
        "raw_r": round(raw.correlation, 4),
        **{name: round(v, 4) for name, v in zip(("valid", "unique", "novel"), made[:3], strict=True)},
    }


def _either_way(objective: Objective, shards: Path) -> Row:
    """Value from graph, graph from value; and the true values of graphs that were drawn for a value."""
    queries = [Query(("graph",), ("value",)), Query(("value",), ("graph",))]
    metrics = [imputation([("graph",), ("value",)], rows=500), log_likelihood(queries, samples=(1, 20), rows=500)]
    sums = evaluate(objective, _rows(shards, "test"), metrics)
    mean = {name: (s.total / s.count).item() for name, s in sums.items()}
    asked, got = _asked(objective, shards)
    return {
        "value_rmse": round(mean["imputation/graph>value/squared_error"] ** 0.5, 4),
        "coverage80": round(mean["imputation/graph>value/coverage@0.8"], 3),
        "graph_agreement": round(mean["imputation/value>graph/accuracy"], 4),
        "log_p_graph_given_value": round(mean["log_likelihood/graph|value@20"], 3),
        "log_p_value_given_graph": round(mean["log_likelihood/value|graph@20"], 3),
        "asked_got_r": round(float(np.corrcoef(asked, got)[0, 1]), 4),
    }


def _asked(objective: Objective, shards: Path) -> tuple[np.ndarray, np.ndarray]:
    batch = on_device(next(iter(_rows(shards, "test"))), device_of(objective))
    with evaluating(objective):
        noise = Noise(0, batch.draw)
        z = objective.infer(batch.only("value")).sample(noise, "asked", 1)
        made = objective.modality("graph").likelihood.sample(objective.modality("graph").decoder(z[0])[None], noise, "made")[0]  # type: ignore[attr-defined]
    return batch.dense("value")[:, 0].cpu().numpy(), dags.value(made.cpu().numpy(), 8)


def _searched(case: Case, objective: Objective, shards: Path) -> Row:
    """From the known graphs, the best value after each round; in standard deviations of the training values."""
    known = graphs.table(objective, _rows(shards, "train"), rows=KNOWN)
    valid = asia.complete if case.data == "asia" else graphs.everything_valid
    oracle, every = _oracle(case)
    row: Row = {"known_best": round(float(known.value.max()), 3), "set_best": round(every, 3)}
    guided = graphs.optimise(objective, known, oracle, seed=case.seed, valid=valid)
    random = graphs.at_random(guided, known, oracle, seed=case.seed, valid=valid)
    for name, search in {"guided": guided, "random": random}.items():
        row |= {name: [round(v, 3) for v in search.best], f"{name}_tried_mean": round(float(search.value.mean()), 3)}
    return row


def _oracle(case: Case) -> tuple[graphs.Oracle, float]:
    """The standardised value of any valid graph, and the highest in the data set."""
    if case.data == "asia":
        found, sample = asia.read(Path(case.source)), asia.sample(Path(case.source))
        raw: graphs.Oracle = lambda x: asia.bic(asia.adjacency(x), sample)  # noqa: E731
    else:
        types = int(case.data.removeprefix("dags"))
        found, raw = dags.drawn(types, 8, case.size, case.rows, 0), lambda x: dags.value(x, 8)
    seen = found.value[splits_of(case.data if case.data == "asia" else "dags", len(found.value))["train"]]  # as the known values
    low, unit = float(seen.mean()), float(seen.std())
    return lambda x: (raw(x) - low) / unit, float((found.value.max() - low) / unit)


def _rows(shards: Path, split: str) -> Evaluation:
    return Evaluation(shards, split, batch_size=500)


def _dataset(case: Case) -> Dataset:
    """The recipe's rows; for a search, values of the first `KNOWN` training rows alone, which so are the ones that it begins with."""
    dataset = recipe_of(case).dataset
    assert dataset is not None

    def partly(split: str) -> Iterator[Example]:
        for number, row in enumerate(dataset.rows(split)):
            yield row if split == "test" or number < KNOWN else Example({"graph": row.data["graph"]})

    return replace(dataset, rows=partly, source={**dataset.source, "known": KNOWN}) if case.part == "search" else dataset


def _shards(folder: str, case: Case) -> Path:
    return Path(folder) / f"{case.data}-{case.missing}{'-known' if case.part == 'search' else ''}"


# ---- speed ------------------------------------------------------------------------------------------------------------------------------


def speeds(sizes: Sequence[int] = (6, 8, 12), rows: int = 128, hidden: int = 64, repeats: int = 9) -> list[Row]:
    """Milliseconds of log p and its gradient; the two forms in turn, checked to agree."""
    torch.set_num_threads(1)
    found = []
    for size in sizes:
        torch.manual_seed(0)
        modality, x = graph(size, types=Embedding(8, 16), latent_dim=32, hidden=hidden), _some(rows, size)
        z = torch.randn(1, rows, 32)
        forms = {"at once": lambda m=modality, x=x, z=z: m.log_prob(x, z)[0], "in turn": lambda m=modality, x=x, z=z: _in_turn(m, x, z)}
        torch.testing.assert_close(*(form() for form in forms.values()), rtol=1e-4, atol=1e-3)
        times = interleaved({name: lambda form=form: form().sum().backward() for name, form in forms.items()}, repeats)
        cells = {"at once": 1 + size, "in turn": (size + 1) * (size + 2) // 2}
        found += [
            {"part": "speed", "form": name, "vertices": size, "rows": rows, "hidden": hidden, "cells": cells[name], **t}
            for name, t in times.items()
        ]
    return found


def _in_turn(modality, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    start = modality.decoder(z[0])
    return modality.likelihood.walk(start, lambda v, _: x[:, v, 0], lambda v, u, _: x[:, v, 1 + u] > 0).log_prob


def _some(rows: int, size: int) -> torch.Tensor:
    bits = torch.randint(2, (rows, size, size)).tril()
    bits[:, range(size), range(size)] = 1
    return torch.cat([torch.randint(1, 9, (rows, size, 1)), bits], -1)


# ---- tables -----------------------------------------------------------------------------------------------------------------------------

SHOWN = {
    "speed": ("form", "vertices", "cells", "cpu_ms", "ms"),
    "missing": (
        "missing",
        "value_rmse",
        "coverage80",
        "graph_agreement",
        "log_p_graph_given_value",
        "log_p_value_given_graph",
        "asked_got_r",
    ),
    "search": ("data", "seed", "known_best", "set_best", "guided", "random", "guided_tried_mean", "random_tried_mean"),
    "types": (
        "data",
        "vertices",
        "seed",
        "parameters",
        "log_prob",
        "exact",
        "agreement",
        "rmse",
        "r",
        "raw_rmse",
        "unique",
        "cpu_s",
        "learnt",
    ),
}


def told(row: Mapping[str, Any]) -> str:
    """A row in a line, as it comes."""
    return "  ".join(f"{name} {value}" for name, value in row.items())


def show(rows: Sequence[Row]) -> None:
    """A table for each part, and for `types` the differences to one-hot with their intervals over seeds."""
    console = Console(width=200)
    for part, columns in SHOWN.items():
        if mine := [row for row in rows if row["part"] == part]:
            console.print(f"\n{part}\n" + "".join(f"{name:>{_width(mine, name)}}" for name in columns), soft_wrap=True)
            for row in mine:
                console.print("".join(f"{row.get(name, '')!s:>{_width(mine, name)}}" for name in columns), soft_wrap=True)
    for line in differences([row for row in rows if row["part"] == "types"]):
        console.print(line, soft_wrap=True)


def differences(rows: Sequence[Row]) -> Iterator[str]:
    """What each way to tell a type gains over one-hot, seed by seed; types by frequency are the mean over the rarer half."""
    for data in dict.fromkeys(row["data"] for row in rows):
        base = {row["seed"]: row for row in rows if row["data"] == data and row["vertices"] == CONTROL}
        for vertices in dict.fromkeys(row["vertices"] for row in rows if row["vertices"] != CONTROL):
            pairs = [(row, base[row["seed"]]) for row in rows if (row["data"], row["vertices"]) == (data, vertices) and row["seed"] in base]
            gains = {name: over_runs([a[name] - b[name] for a, b in pairs]) for name in ("log_prob", "exact", "rmse") if pairs}
            with contextlib.suppress(KeyError, ZeroDivisionError):
                gains["rare types"] = over_runs([_rare(a) - _rare(b) for a, b in pairs])
            yield f"{data}: {vertices} - {CONTROL}: " + ", ".join(
                f"{n} {g.value:+.3f} [{g.low:+.3f}, {g.high:+.3f}]" for n, g in gains.items()
            )


def _rare(row: Row) -> float:
    own = row["types_by_frequency"]
    return sum(own[len(own) // 2 :]) / len(own[len(own) // 2 :])


def _width(rows: Sequence[Row], name: str) -> int:
    return 2 + max(len(name), *(len(str(row.get(name, ""))) for row in rows))
