"""Made-up graphs of many vertex types: which type it is matters to the eye, which group of types to the graph.

    group of vertex v     the one after that of v - 1 with probability .6, else any; the first: any
    type of vertex v      of its group, the r-th most frequent with probability proportional to 1 / r (Zipf)
    edge u -> v, u < v    with probability .7 where v's group is the next or next but one after u's, else .1
    value                 sum over vertices of a[group] + sum over edges of w[group, group]; a and w fixed standard normal numbers

Types are all that the data show. Groups take turns over the vocabulary: type t (counted from 0) is of group t mod groups.
"""

from functools import cache

import numpy as np

from meme_dist.data.graph_codec import Graph, to_array
from meme_dist.data.sets._graphs import Graphs, check_graph_missing, fields_of, rows_of
from meme_dist.data.sets._pairing import generator
from meme_dist.data.shards import Dataset

FOLLOWS, LIKELY, UNLIKELY = 0.6, 0.7, 0.1


def dags(
    *, types: int = 512, groups: int = 8, size: int = 8, rows: int = 20_000, missing: float = 0.0, seed: int = 0, draw: int = 0
) -> Dataset:
    """`rows` graphs of size / 2 to `size` vertices, one in ten of them to test on, each with its value, standardised.

    `draw` chooses the graphs, `seed` the order of the training rows and what is missing in them: a share of `missing` entries, each row
    keeps one. Raises ValueError for a number of types that its groups do not divide, for fewer than 2 vertices, and for a share above one
    half.
    """
    if groups < 1 or types < groups or types % groups:
        raise ValueError(f"types: expected a multiple of groups, {groups}, got {types}")
    if size < 2 or rows < 10:
        raise ValueError(f"expected a size of 2 or more and 10 rows or more, got {size} and {rows}")
    check_graph_missing(missing)
    made = rows_of("dags", lambda: drawn(types, groups, size, rows, draw), missing=missing, seed=seed)
    source = {"types": types, "groups": groups, "size": size, "rows": rows, "missing": missing, "seed": seed, "draw": draw}
    return Dataset("dags", fields_of(vocabulary(types), size), made, (), source)


def vocabulary(types: int) -> tuple[str, ...]:
    """Names t000, t001, ... of the types."""
    return tuple(f"t{number:03d}" for number in range(types))


@cache
def drawn(types: int, groups: int, size: int, rows: int, draw: int) -> Graphs:
    """The graphs and their values in their own unit."""
    rng, names = generator(draw, "dags/graphs"), vocabulary(types)
    count = rng.integers(max(1, size // 2), size + 1, size=rows)
    group = _groups(rng, rows, size, groups)
    frequency = 1 / np.arange(1, types // groups + 1)
    token = group + groups * rng.choice(len(frequency), size=(rows, size), p=frequency / frequency.sum())
    step = (group[:, None] - group[..., None]) % groups  # [row, u, v]
    edge = rng.random(step.shape) < np.where((step == 1) | (step == 2), LIKELY, UNLIKELY)
    pairs = [(u, v) for v in range(size) for u in range(v)]
    arrays = []
    for row in range(rows):
        edges = tuple((u, v) for u, v in pairs if v < count[row] and edge[row, u, v])
        arrays.append(to_array(Graph(tuple(names[t] for t in token[row, : count[row]]), edges), names, size))
    x = np.stack(arrays)
    return Graphs(x, value(x, groups))


def value(x: np.ndarray, groups: int) -> np.ndarray:
    """The value of any graphs [R, G, 1 + G] of these types, in its own unit."""
    rng = generator(0, "dags/value")
    own, between = rng.standard_normal(groups), rng.standard_normal((groups, groups))
    group, there = (x[..., 0] - 1) % groups, x[..., 0] > 0
    edges = between[group[:, None, :-1], group[:, :, None]] * x[..., 2:]
    return np.where(there, own[group], 0).sum(1) + edges.sum((1, 2))


def _groups(rng: np.random.Generator, rows: int, size: int, groups: int) -> np.ndarray:
    group = rng.integers(groups, size=(rows, size))
    follows = rng.random((rows, size)) < FOLLOWS
    for v in range(1, size):
        group[:, v] = np.where(follows[:, v], (group[:, v - 1] + 1) % groups, group[:, v])
    return group
