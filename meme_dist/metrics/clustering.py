"""Do the classes stand apart in the latent space without being asked for? k-means on the posterior means, k the number of classes.

ARI, the adjusted Rand index (Hubert and Arabie 1985): agreement of clusters and classes over pairs of rows, 0 expected by chance, 1 for
the same partition. NMI, normalised mutual information: 2 I(cluster; class) / (H(cluster) + H(class)), in [0, 1] and above 0 by chance.
"""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from meme_dist.metrics.intervals import Estimate, jackknife, within
from meme_dist.metrics.latents import Latents, Posterior

GROUPS = 10  # of rows, for the jackknife
STARTS = 10  # of k-means; the tightest one counts


class Clustering(NamedTuple):
    """How well clusters match classes. The intervals are over rows, the clusters held fixed: they know nothing of k-means' own spread."""

    ari: Estimate
    nmi: Estimate


def clustering(latents: Latents, *, classes: int, seed: int = 0) -> dict[tuple[str, ...], Clustering]:
    """ARI and NMI for each set of sources, over the labelled rows that hold it. Count 0 where those are fewer than the classes."""
    label = latents.label.numpy()
    return {chosen: _of_one(posterior, label, classes, seed) for chosen, posterior in latents.posteriors.items()}


def _of_one(posterior: Posterior, label: np.ndarray, classes: int, seed: int) -> Clustering:
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score  # half a second to import, and only here

    rows = np.flatnonzero(posterior.observed.numpy() & (label >= 0))
    if len(rows) < max(2, classes):
        nothing = jackknife(float("nan"), [], count=0)
        return Clustering(nothing, nothing)
    cluster = k_means(posterior.mean[torch.from_numpy(rows)].double().numpy(), classes, seed=seed)
    ari, nmi = (_estimate(score, label[rows], cluster, rows % GROUPS) for score in (adjusted_rand_score, normalized_mutual_info_score))
    return Clustering(within(ari, -1.0), within(nmi))


def k_means(points: np.ndarray, clusters: int, *, seed: int) -> np.ndarray:
    """The cluster of each point [R], scikit-learn's k-means: a pure function of its arguments."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different points than clusters: some stay empty
        return KMeans(clusters, n_init=STARTS, random_state=seed).fit_predict(points)  # type: ignore[arg-type]


def _estimate(score: Callable[[np.ndarray, np.ndarray], float], label: np.ndarray, cluster: np.ndarray, group: np.ndarray) -> Estimate:
    kept = [group != left_out for left_out in np.unique(group)]
    parts = [float(score(label[rows], cluster[rows])) for rows in kept if rows.any()]
    return jackknife(float(score(label, cluster)), parts, count=len(label))
