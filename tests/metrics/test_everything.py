"""All measurements at once: of every kind of data, on any number of ranks, and with latents of a modality's own."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from meme_dist.classifiers import Classifier, small_network
from meme_dist.data.fields import Field
from meme_dist.evaluate import Measures, alone, flatten, measure
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

VOCABULARY = ("<pad>", "<unk>", "<eos>", *"abcdefg")
FIELDS = {
    "image": Field(kind="image", shape=(1, 6, 6), codec="png", likelihood="normal"),
    "counts": Field(kind="counts", shape=(7,), codec="npy", likelihood="negative_binomial"),
    "text": Field(kind="text", shape=(6,), codec="txt", likelihood="categorical", vocabulary=VOCABULARY),
}
CLASSES = tuple("xyz")
ROWS = 50
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


def everything(rank: int, world: int) -> dict[str, Any]:
    torch.manual_seed(0)
    judges = {name: Classifier(small_network(field, 3).eval()) for name, field in FIELDS.items()}

    def add(x: torch.Tensor) -> torch.Tensor:
        if world > 1:
            torch.distributed.all_reduce(x)
        return x

    mine = batches(rank, world)
    arguments = {"train": mine, "test": mine, "fields": FIELDS, "classes": CLASSES, "classifiers": judges, "measures": ALL}
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
    judges = {name: Classifier(small_network(field, 3).eval()) for name, field in FIELDS.items()}
    little = {name: 0 for name in ("coherence_sources", "joint_draws", "probe_rows", "clustering_rows", "relatedness_rows")}
    measures = Measures(**little, likelihood_rows=0, imputation_rows=0, frechet_rows=40, correlation_components=2)
    mine = batches(0, 1)
    found = measure(objective(), train=mine, test=mine, fields=FIELDS, classes=CLASSES, classifiers=judges, measures=measures).results
    assert [(e["target"], e["from"]) for e in found["frechet"]] == [("image", name) for name in ["sources"] * 3 + ["prior", "real"]]
    held = holds(batch(np.arange(ROWS)), ["image"])[:40]
    real = judges["image"].features(batch(np.arange(ROWS)).dense("image")[:40][held])
    halves = [moments(moment_sums(real[np.flatnonzero(held) % 2 == parity])) for parity in (0, 1)]
    assert found["frechet"][-1]["value"] == pytest.approx(frechet_distance(*halves), rel=1e-4)
    assert set(found["left_out"]) == {"correlation of image and counts", "correlation of image and text"}
    assert "directions needs more than" in found["left_out"]["correlation of image and text"]
    assert {tuple(entry["modalities"]) for entry in found["correlation"]} == {("counts", "text")}
