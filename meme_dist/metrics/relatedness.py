"""Relatedness: do the posteriors of related data of two modalities lie close together? (Joy et al. 2022, section 4.2)

    d[i, j] = W2( q(z | x_i of modality a), q(z | x_j of modality b) )                 2-Wasserstein, closed form for diagonal Normals

The paper shows histograms of d for paired and unpaired data, the mean of d by class, and a dendrogram. As one number: the AUROC of -d, the
chance that a random paired d is smaller than a random unpaired one (1/2: unrelated, 1: perfectly related), with ties counted half.
"""

import math
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform

from meme_dist.distributions import DiagNormal, pairwise_w2
from meme_dist.metrics.intervals import Estimate, jackknife, within
from meme_dist.metrics.latents import Latents, Posterior

BINS = 60
GROUPS = 10  # of the jackknife


class Histogram(NamedTuple):
    """Counts of distances between related and unrelated data on shared bins."""

    edges: np.ndarray
    paired: np.ndarray
    unpaired: np.ndarray


class Relatedness(NamedTuple):
    """Of two modalities a and b. What needs labels is None without them."""

    auroc_row: Estimate  # paired: the two halves of one row
    auroc_class: Estimate | None  # paired: the same class
    histogram: Histogram  # by class where there are labels, else by row
    class_matrix: np.ndarray | None  # [class of a, class of b]: mean W2; NaN where a class has no rows
    linkage: np.ndarray | None  # scipy's linkage matrix of the classes


def relatedness(latents: Latents, *, classes: int = 0) -> dict[tuple[str, str], Relatedness]:
    """Relatedness of every two modalities of a table of single-modality posteriors, over all its pairs of rows.

    R rows make R^2 distances: a thousand rows take a few seconds. Modalities of which fewer than two rows are there are left out.
    """
    single = {names[0]: posterior for names, posterior in latents.posteriors.items() if len(names) == 1}
    enough = [name for name, posterior in single.items() if int(posterior.observed.sum()) > 1]
    label = latents.label.numpy()
    return {(a, b): _between(single[a], single[b], label, classes) for a, b in combinations(enough, 2)}


def _between(a: Posterior, b: Posterior, label: np.ndarray, classes: int) -> Relatedness:
    rows_a, rows_b = np.flatnonzero(a.observed.numpy()), np.flatnonzero(b.observed.numpy())
    normals = [DiagNormal(posterior.mean[rows], posterior.stddev[rows]) for posterior, rows in ((a, rows_a), (b, rows_b))]
    distance = pairwise_w2(*normals).sqrt().double().numpy()
    same_row = rows_a[:, None] == rows_b[None, :]
    by_row = _auroc_estimate(distance, same_row, rows_a, rows_b)
    class_a, class_b = label[rows_a], label[rows_b]
    if classes < 2 or (class_a >= 0).sum() < 2 or (class_b >= 0).sum() < 2:
        return Relatedness(by_row, None, _histogram(distance, same_row), None, None)
    known_a, known_b = class_a >= 0, class_b >= 0
    rows_a, rows_b, class_a, class_b = rows_a[known_a], rows_b[known_b], class_a[known_a], class_b[known_b]
    distance = distance[np.ix_(known_a, known_b)]
    same = class_a[:, None] == class_b[None, :]
    matrix = class_means(distance, class_a, class_b, classes)
    return Relatedness(by_row, _auroc_estimate(distance, same, rows_a, rows_b), _histogram(distance, same), matrix, class_linkage(matrix))


def auroc(score: np.ndarray, positive: np.ndarray) -> float:
    """The chance that a positive scores above a negative, ties half (Mann and Whitney 1947), exactly; NaN without both kinds."""
    order = np.argsort(score, axis=None, kind="stable")
    return _auroc_sorted(score.ravel()[order], positive.ravel()[order])


def _auroc_sorted(score: np.ndarray, positive: np.ndarray) -> float:
    num_positive = int(positive.sum())
    num_negative = len(positive) - num_positive
    if num_positive == 0 or num_negative == 0:
        return float("nan")
    starts = np.flatnonzero(np.concatenate([[True], score[1:] != score[:-1]]))
    hits = np.add.reduceat(positive.astype(np.int64), starts)
    misses = np.diff(np.append(starts, len(score))) - hits
    below = np.cumsum(misses) - misses
    return float((hits * (below + misses / 2)).sum() / (num_positive * num_negative))


def _auroc_estimate(distance: np.ndarray, paired: np.ndarray, rows_a: np.ndarray, rows_b: np.ndarray) -> Estimate:
    """Sorted once; leaving a group of rows out of both sides keeps the order of what is left. Count 0 without pairs of both kinds."""
    order = np.argsort(-distance, axis=None, kind="stable")
    score, positive = -distance.ravel()[order], paired.ravel()[order]
    i, j = np.divmod(order, distance.shape[1])
    group_a, group_b = rows_a[i] % GROUPS, rows_b[j] % GROUPS
    whole = _auroc_sorted(score, positive)
    if math.isnan(whole):
        return jackknife(whole, [], count=0)
    parts = []
    for group in np.union1d(rows_a % GROUPS, rows_b % GROUPS):
        kept = (group_a != group) & (group_b != group)
        parts.append(_auroc_sorted(score[kept], positive[kept]))
    return within(jackknife(whole, parts, count=len(np.union1d(rows_a, rows_b))))


def _histogram(distance: np.ndarray, paired: np.ndarray) -> Histogram:
    edges = np.linspace(distance.min(), max(float(np.quantile(distance, 0.999)), distance.min() + 1e-6), BINS + 1)
    inside = np.minimum(distance, edges[-1])
    return Histogram(edges, np.histogram(inside[paired], edges)[0], np.histogram(inside[~paired], edges)[0])


def class_means(distance: np.ndarray, class_a: np.ndarray, class_b: np.ndarray, classes: int) -> np.ndarray:
    """K[i, j]: the mean distance between class i of the first and class j of the second modality."""
    of_a, of_b = np.eye(classes)[class_a], np.eye(classes)[class_b]
    count = np.outer(of_a.sum(0), of_b.sum(0))
    with np.errstate(invalid="ignore"):
        return np.where(count > 0, of_a.T @ distance @ of_b / count, np.nan)


def class_linkage(matrix: np.ndarray) -> np.ndarray | None:
    """Average linkage of the classes by the mean of K and its transpose; None where a class is missing or there is one class only."""
    if len(matrix) < 2 or not np.isfinite(matrix).all():
        return None
    symmetric = (matrix + matrix.T) / 2
    np.fill_diagonal(symmetric, 0.0)
    return linkage(squareform(symmetric, checks=False), "average")


def linkage_json(tree: np.ndarray | None) -> Sequence[Sequence[float]] | None:
    """A linkage matrix as plain lists."""
    return None if tree is None else torch.from_numpy(tree).tolist()
