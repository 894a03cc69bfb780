"""Laws of clustering: k-means finds classes that stand apart, and its scores are the indices' own formulas."""

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import comb

from meme_dist.metrics import Latents, Posterior
from meme_dist.metrics.clustering import GROUPS, clustering, k_means
from meme_dist.metrics.intervals import jackknife


def table(mean: np.ndarray, label: np.ndarray, observed: np.ndarray | None = None) -> Latents:
    x = torch.from_numpy(mean).float()
    there = torch.ones(len(x), dtype=torch.bool) if observed is None else torch.from_numpy(observed)
    return Latents({("a",): Posterior(x, torch.ones_like(x), x, there)}, torch.from_numpy(label))


def rand_index(label: np.ndarray, cluster: np.ndarray) -> float:
    """Hubert and Arabie's formula, from the contingency table."""
    counts = np.array([[((label == i) & (cluster == j)).sum() for j in np.unique(cluster)] for i in np.unique(label)])
    index, rows, columns, pairs = (comb(x, 2).sum() for x in (counts, counts.sum(1), counts.sum(0), counts.sum()))
    expected = rows * columns / pairs
    return (index - expected) / ((rows + columns) / 2 - expected)


def shared_information(label: np.ndarray, cluster: np.ndarray) -> float:
    joint = np.array([[((label == i) & (cluster == j)).mean() for j in np.unique(cluster)] for i in np.unique(label)])

    def entropy(p: np.ndarray) -> float:
        return float(-(p[p > 0] * np.log(p[p > 0])).sum())

    first, second, both = entropy(joint.sum(1)), entropy(joint.sum(0)), entropy(joint.ravel())
    return 2 * (first + second - both) / (first + second)


def cloud(rng: np.random.Generator, label: np.ndarray, pull: float) -> np.ndarray:
    return rng.normal(size=(len(label), 4)) + pull * np.eye(4)[label]


def test_scores_are_the_formulas_over_labelled_rows_that_are_there_with_the_jackknife() -> None:
    rng = np.random.default_rng(0)
    label, there = rng.integers(0, 3, 150), rng.random(150) < 0.8
    label[:10] = -1
    mean = cloud(rng, label, 1.8)
    found = clustering(table(mean, label, there), classes=3, seed=5)["a",]
    kept = np.flatnonzero(there & (label >= 0))
    cluster, label = k_means(mean[kept].astype(np.float32).astype(float), 3, seed=5), label[kept]
    for estimate, score in ((found.ari, rand_index), (found.nmi, shared_information)):
        parts = [score(label[kept % GROUPS != g], cluster[kept % GROUPS != g]) for g in range(GROUPS)]
        assert estimate[:3] == pytest.approx(jackknife(score(label, cluster), parts, count=0)[:3], abs=1e-9)
        assert estimate.count == len(kept) and 0.1 < estimate.value < 0.95 and estimate.high < 1


def test_classes_apart_score_one_and_labels_of_chance_nothing() -> None:
    rng = np.random.default_rng(1)
    label = rng.integers(0, 4, 400)
    apart = clustering(table(cloud(rng, label, 30.0), label), classes=4)["a",]
    assert [apart.ari.value, apart.ari.high, apart.nmi.value, apart.nmi.high] == pytest.approx([1.0] * 4)
    wilson = 400 / (400 + stats.norm.ppf(0.975) ** 2)
    assert (apart.nmi.low, apart.ari.low) == pytest.approx((wilson, 2 * wilson - 1))
    chance = clustering(table(rng.normal(size=(400, 4)), label), classes=4)["a",]
    assert abs(chance.ari.value) < 0.02 and chance.nmi.value < 0.05


def test_the_same_table_gives_the_same_clusters_and_too_few_rows_give_none() -> None:
    rng = np.random.default_rng(2)
    label = rng.integers(0, 4, 80)
    latents = table(cloud(rng, label, 1.0), label)
    state = np.random.get_state()[1].copy()
    assert clustering(latents, classes=4, seed=1) == clustering(latents, classes=4, seed=1)
    assert np.array_equal(state, np.random.get_state()[1])
    assert clustering(latents.first(3), classes=4)["a",].ari.count == 0
    equal = clustering(table(np.zeros((20, 4)), label[:20]), classes=4)["a",]  # one point, four clusters asked for
    assert equal.ari.value == 0.0 and equal.ari.count == 20
