"""All measurements at once: of every kind of data, on any number of ranks, and with latents of a modality's own."""

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from meme_dist.classifiers import Classifier, small_network
from meme_dist.data.fields import Field
from meme_dist.evaluate import Learnt, Measures, alone, flatten, measure
from meme_dist.likelihoods import NegativeBinomial, Normal
from meme_dist.metrics.frechet import frechet_distance, moment_sums, moments
from meme_dist.metrics.rows import holds
from meme_dist.modalities.text import conv_text
from meme_dist.modalities.vector import mlp
from meme_dist.objectives.meme import MEME
from meme_dist.tables import on_screen, tables
from meme_dist.types import Batch, pack_dense
from tests.ranks import run_ranks
from tests.test_inference import leaves

pytestmark = pytest.mark.repeats

VOCABULARY = ("<pad>", "<unk>", "<eos>", *"abcdefg")
FIELDS = {
    "image": Field(kind="image", shape=(1, 6, 6), codec="png", likelihood="normal"),
    "counts": Field(kind="counts", shape=(7,), codec="npy", likelihood="negative_binomial"),
    "text": Field(kind="text", shape=(6,), codec="txt", likelihood="categorical", vocabulary=VOCABULARY),
}
CLASSES = tuple("xyz")
ROWS = 50
ROWS_EACH = {"image": 42, "counts": 43, "text": 44}
ALL = Measures(
    joint_draws=60,
    probe_rows=50,
    clustering_rows=40,
    relatedness_rows=30,
    frechet_rows=40,
    likelihood_rows=20,
    likelihood_samples=(1, 4),
    imputation_rows=30,
    correlation_components=3,
    information_rows=40,
    ceilings={"text": {1: 0.9}},
)


def objective() -> MEME:
    """Small networks with seeded weights, as they are before training."""
    torch.manual_seed(0)
    size = {"latent_dim": 3, "hidden": (8,)}
    modalities = {
        "image": mlp((1, 6, 6), likelihood=Normal(0.3), **size),
        "counts": mlp((7,), likelihood=NegativeBinomial((7,)), log_input=True, **size),
        "text": conv_text(6, vocabulary=len(VOCABULARY), latent_dim=3, embedding=4, hidden=8),
    }
    made = MEME(modalities, pseudo_inputs=3)
    made.initialise(batch(np.arange(8)))
    return made


def batch(numbers: np.ndarray, padding: int = 0) -> Batch:
    """Rows by their numbers, some entries missing, and empty rows behind them."""
    rng = np.random.default_rng(1)
    label = rng.integers(0, 3, ROWS)
    data = {
        "image": rng.random((ROWS, 1, 6, 6)) * 0.2 + label[:, None, None, None] / 4,
        "counts": rng.poisson(1 + 3 * label[:, None], size=(ROWS, 7)).astype(float),
        "text": np.concatenate([3 + (rng.integers(0, 3, (ROWS, 4)) + 2 * label[:, None]) % 7, np.full((ROWS, 2), 2)], 1),
    }
    held = rng.random((ROWS, 3)) < 0.85
    take = np.concatenate([numbers, np.zeros(padding, dtype=int)])
    there = np.concatenate([held[numbers], np.zeros((padding, 3), dtype=bool)])
    draw = np.concatenate([numbers, ROWS + 1000 * len(numbers) + np.arange(padding)])
    x = {name: torch.from_numpy(value[take]) for name, value in data.items()}
    x = {name: value if name == "text" else value.float() for name, value in x.items()}
    observed = {name: torch.from_numpy(there[:, column]) for column, name in enumerate(x)}
    return pack_dense(x, observed, draw=draw, label=torch.from_numpy(np.where(there.any(1), label[take], -1)))


def batches(rank: int, world: int) -> list[Batch]:
    """This rank's contiguous share in batches of 25, equally many on every rank: the last rank has the shortest share."""
    low, high = (-(-number * ROWS // world) for number in (rank, rank + 1))
    most = -(-ROWS // world)
    starts = range(low, low + most, 25)
    return [batch(np.arange(min(start, high), min(start + 25, high)), padding=25 - max(0, min(25, high - start))) for start in starts]


def seeded() -> dict[str, Classifier]:
    torch.manual_seed(0)
    return {name: Classifier(small_network(field, 3).eval()) for name, field in FIELDS.items()}


def asked(measures: Measures, judges: dict[str, Classifier], **keywords: Any) -> dict[str, Any]:
    """Some of the measurements of the model as it is, on one rank."""
    mine = batches(0, 1)
    keywords = {"objective": objective(), "train": mine, "test": mine, "learnt": Learnt(mine, ROWS_EACH)} | keywords
    model = keywords.pop("objective")
    return measure(model, fields=FIELDS, classes=CLASSES, classifiers=judges, measures=measures, **keywords).results


def everything(rank: int, world: int) -> dict[str, Any]:
    judges = seeded()

    def add(x: torch.Tensor) -> torch.Tensor:
        if world > 1:
            torch.distributed.all_reduce(x)
        return x

    mine = batches(rank, world)
    arguments = {"train": mine, "test": mine, "fields": FIELDS, "classes": CLASSES, "classifiers": judges, "measures": ALL}
    arguments["learnt"] = Learnt(mine, ROWS_EACH)
    embedders = {"image": lambda x: judges["image"].features(x)[:, :6]}  # fewer than there are rows
    return measure(objective(), **arguments, embedders=embedders, reduce=add if world > 1 else alone, rank=rank, world=world).results


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    return everything(0, 1)


@pytest.mark.parametrize("world", [2, 3])
def test_every_measurement_is_the_same_on_any_number_of_ranks(one: dict[str, Any], world: int) -> None:
    expected = dict(leaves(one))
    numbers = {place: value for place, value in expected.items() if isinstance(value, float)}
    for results in run_ranks(everything, world):
        found = dict(leaves(results))
        assert found.keys() == expected.keys()
        assert {place: found[place] for place in numbers} == pytest.approx(numbers, rel=2e-5, abs=2e-5)
        assert {p: v for p, v in found.items() if p not in numbers} == {p: v for p, v in expected.items() if p not in numbers}


def test_results_are_plain_json_with_every_entry_and_every_entry_has_its_table(one: dict[str, Any]) -> None:
    assert json.loads(json.dumps(one, allow_nan=False)) == one
    measured = {"cross_coherence", "coherence_by_inputs", "joint_coherence", "latent_accuracy", "clustering", "relatedness", "frechet"}
    measured |= {"log_likelihood", "imputation", "correlation", "information"}
    assert set(one) == {"classes", "seed", "classifiers", *measured}
    text = tables(one)
    assert text.count("\n## ") + 1 == len(measured)
    for line in text.splitlines():
        assert not line.startswith("|") or line.endswith("|")
    assert len(one["imputation"]) == 9 and on_screen(one) == text
    there = holds(batch(np.arange(ROWS)), ["image"])
    counts = {"clustering": one["clustering"][0]["ari"]["count"], "latent_accuracy": one["latent_accuracy"][0]["count"]}
    assert counts == {"clustering": int(there[: ALL.clustering_rows].sum()), "latent_accuracy": int(there.sum())}
    assert "(of 0.900)" in text and "RMSE" in text and "half of the real rows" in text
    flat = flatten(one)
    assert all(math.isfinite(value) for value in flat.values())
    named = ["frechet/counts>image", "frechet/prior>image", "frechet/real>image", "ari/image+counts+text", "information/real>text"]
    named += ["correlation/sif/counts-text/counts>text", "correlation/plain/image-counts/real", "coherence_by_inputs/2>text"]
    named += ["imputation/image+text>counts/crps", "imputation/image>text/accuracy", "imputation/text>image/coverage@80%"]
    assert set(named) <= set(flat) and not {"correlation/sif/image-counts/real", "correlation/average/image-counts/real"} & set(flat)


def test_a_long_table_of_imputation_is_left_to_the_report(one: dict[str, Any]) -> None:
    long = {**one, "imputation": 2 * one["imputation"]}
    assert "RMSE" in tables(long) and "RMSE" not in on_screen(long) and "Imputation: 18 lines, in the report." in on_screen(long)


def test_features_are_those_of_the_images_classifiers_and_too_few_rows_for_them_are_said() -> None:
    judges = seeded()
    little = {name: 0 for name in ("coherence_sources", "joint_draws", "probe_rows", "clustering_rows", "relatedness_rows")}
    measures = Measures(**little, likelihood_rows=0, imputation_rows=0, frechet_rows=40, correlation_components=2)
    found = asked(measures, judges)
    assert [(e["target"], e["from"]) for e in found["frechet"]] == [("image", name) for name in ["sources"] * 3 + ["prior", "real"]]
    held = holds(batch(np.arange(ROWS)), ["image"])[:40]
    real = judges["image"].features(batch(np.arange(ROWS)).dense("image")[:40][held])
    halves = [moments(moment_sums(real[np.flatnonzero(held) % 2 == parity])) for parity in (0, 1)]
    assert found["frechet"][-1]["value"] == pytest.approx(frechet_distance(*halves), rel=1e-4)
    assert set(found["left_out"]) == {"correlation of image and counts", "correlation of image and text"}
    assert "directions needs more than" in found["left_out"]["correlation of image and text"]
    assert {tuple(entry["modalities"]) for entry in found["correlation"]} == {("counts", "text")}


NONE = {name: 0 for name, value in dataclasses.asdict(Measures()).items() if isinstance(value, int)} | {"seed": 0}


def test_a_judge_gives_the_same_rows_the_same_score_whatever_the_run_was_trained_on() -> None:
    measures, judges = Measures(**NONE | {"information_rows": 40}), seeded()
    one, other = (asked(measures, judges, train=train)["information"] for train in (batches(0, 1), [batch(np.arange(7))]))
    assert one == other and one[0]["value"] > 0
    surer = asked(measures, judges, learnt=Learnt(batches(0, 1), {name: 100 * rows for name, rows in ROWS_EACH.items()}))["information"]
    assert sum(entry["value"] for entry in surer) < 0.8 * sum(entry["value"] for entry in one)
    unknown = asked(measures, judges, learnt=None)
    assert "information" not in unknown and unknown["left_out"] == {
        "information": "needs the rows that the classifiers learnt from, given to `measure`"
    }


@pytest.mark.parametrize(
    "end", [[nn.Conv2d(1, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()], [nn.Flatten(), nn.Linear(36, 3), nn.LogSoftmax(-1)]]
)
def test_a_judge_that_does_not_end_in_a_linear_layer_has_no_features_and_all_else_is_measured(end: list[nn.Module]) -> None:
    measures = Measures(**NONE | {"coherence_sources": 7, "information_rows": 40, "frechet_rows": 40})
    found = asked(measures, seeded() | {"image": Classifier(nn.Sequential(*end).eval())})
    assert {entry["target"] for entry in found["cross_coherence"] if entry["count"]} == set(FIELDS)
    assert {entry["target"] for entry in found["information"]} == {"counts", "text"} and "frechet" not in found
    assert found["left_out"].keys() == {"frechet", "information"}
    assert all(why.startswith("of image: needs a classifier that ends in a linear layer") for why in found["left_out"].values())


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_what_a_broken_network_makes_is_no_number_with_the_reason_and_all_else_is_measured(part: str) -> None:
    model = objective()
    with torch.no_grad():
        for parameter in getattr(model.modality("image"), part).parameters():
            parameter.fill_(math.nan)
    found = asked(dataclasses.replace(ALL, correlation_components=0, coherence_sources=0, joint_draws=0), seeded(), objective=model)
    json.dumps(found, allow_nan=False)
    assert ("4 of 5 values of frechet" if part == "decoder" else "latents of image") in found["left_out"]
    assert found["frechet"][-1]["from"] == "real" and found["frechet"][-1]["value"] > 0
    assert {tuple(entry["sources"]) for entry in found["clustering"]} >= {("counts",), ("text",)}
    known = [one for one in found["log_likelihood"] if one["given"] and "image" not in one["targets"] + one["given"]]
    assert known and all(one["value"] is not None for one in known)  # the prior, of pseudo-inputs, needs every encoder
    assert all(f"Left out: {name.replace('_', ' ')} (" in tables(found) for name in found["left_out"])
