"""Directed acyclic graphs with vertex types as one array of whole numbers: what a shard stores, an encoder reads and a sampler returns.

A graph of at most G vertices is x [G, 1 + G]. Row v is the v-th vertex in topological order: column 0 its type (1, 2, ... in the order of
a vocabulary; 0 where there is no vertex), column 1 + u whether the edge u -> v is there, where u = 0 is START and u = 1 .. v the vertices
before v. So x[v, 1 + u] = 0 for u > v, and no array can hold a cycle. START has no row. END has neither row nor column: it follows from
the rest, as the one place to which every vertex without a successor leads. Every vertex has a predecessor, START if no other.

`to_array` puts vertices into one topological order, so that numbering them otherwise gives the same array: always next, among those whose
predecessors are placed, the one of the lowest type, then of the lexicographically lowest places of predecessors. Vertices that agree in
both keep the order in which they were given; where their types differ (always in a Bayesian network) nothing depends on the numbering.

Graphs are the same if numbering vertices otherwise, types kept, makes one the other: vertices of one type have no names. A graph then has
as many arrays as topological orders, any of which a sampler may return; `canonical` puts the same one for all of them.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

START, END = "START", "END"


class Graph(NamedTuple):
    """Vertices in any order, by the names of their types; edges as pairs of numbers of vertices.

    There may be one vertex START and one END. Without START, it leads to the vertices that have no predecessor.
    """

    vertices: tuple[str, ...]
    edges: tuple[tuple[int, int], ...]


def to_array(graph: Graph, vocabulary: Sequence[str], size: int) -> np.ndarray:
    """The array int64 [size, 1 + size] of a graph. Raises ValueError for a graph that is none of at most `size` vertices: a cycle, an
    edge to a vertex that is not there, an unknown type, a second START, a vertex that nothing leads to though there is a START."""
    _check_ends(graph)
    inner = [v for v, name in enumerate(graph.vertices) if name not in (START, END)]
    number = _numbers(tuple(vocabulary))
    if unknown := sorted({graph.vertices[v] for v in inner} - number.keys()):
        raise ValueError(f"graph: expected types among {_few(vocabulary)}, got {unknown[0]!r}")
    if not 1 <= len(inner) <= size:
        raise ValueError(f"graph: expected 1 to {size} vertices beside START and END, got {len(inner)}")
    before = _predecessors(graph)
    place = _placed(graph, inner, before, number)
    x = np.zeros((size, 1 + size), dtype=np.int64)
    for v in inner:
        row = place[v] - 1
        x[row, 0] = number[graph.vertices[v]]
        x[row, [1 + place[u] for u in before[v]]] = 1
        if not before[v]:
            if START in graph.vertices:
                raise ValueError(f"graph: expected every vertex to have a predecessor beside a START, got none of vertex {v}")
            x[row, 1] = 1
    _check_end(graph, inner)
    return x


def to_graph(x: np.ndarray, vocabulary: Sequence[str]) -> Graph:
    """The graph of an array [G, 1 + G], START first and END last. Raises ValueError as `check` does."""
    check(x[None], len(vocabulary))
    count = int((x[:, 0] > 0).sum())
    edges = [(u, v + 1) for v in range(count) for u in range(v + 1) if x[v, 1 + u]]
    last = {v for v in range(1, count + 1)} - {u for u, _ in edges}
    names = tuple(vocabulary[int(x[v, 0]) - 1] for v in range(count))
    return Graph((START, *names, END), (*edges, *((v, count + 1) for v in sorted(last))))


def canonical(x: np.ndarray) -> np.ndarray:
    """Arrays [R, G, 1 + G] that are equal exactly where the graphs of x are the same: of each graph one of its arrays, the same for all.

    Its order is one that `to_array` gives. Exact: what neighbours do not tell apart is tried in each order, which takes long only for
    large graphs of many like branches (eight copies of one chain of vertices, say).
    """
    if not len(x):
        return x
    different, place = np.unique(x, axis=0, return_inverse=True)
    return np.stack([_reordered(one) for one in different])[place.reshape(-1)]


def check(x: np.ndarray, types: int) -> None:
    """Raise ValueError, naming row and vertex, unless these arrays [R, G, 1 + G] of whole numbers are graphs of so many types."""
    token, bit = x[..., 0], x[..., 1:]
    there = token > 0
    size = token.shape[1]
    _refuse((token < 0) | (token > types), f"a type from 1 to {types}, or 0 for none", token)
    _refuse(there & ~np.pad(there[:, :-1], ((0, 0), (1, 0)), constant_values=True), "no vertex after a row without one", token)
    _refuse(~there[:, :1], "one vertex at least", token[:, :1])
    _refuse(((bit != 0) & (bit != 1)).any(-1), "0 or 1 for each edge", bit.max(-1))
    late = np.triu(np.ones((size, size), dtype=bool), 1)
    _refuse((bit * late).any(-1), "edges from earlier vertices alone (a cycle, or no topological order)", token)
    _refuse(~there & bit.any(-1), "no edges where there is no vertex", token)
    _refuse(there & ~bit.any(-1), "a predecessor of every vertex, START if no other", token)


def _refuse(bad: np.ndarray | np.bool, expected: str, found: np.ndarray) -> None:
    if bad.any():
        row, vertex = np.argwhere(bad)[0]
        raise ValueError(f"graph: expected {expected}, got {found[row, vertex]} at row {row}, vertex {vertex}")


def _check_ends(graph: Graph) -> None:
    for name in (START, END):
        if (count := graph.vertices.count(name)) > 1:
            raise ValueError(f"graph: expected one {name} at most, got {count}")
    for u, v in graph.edges:
        if not (0 <= u < len(graph.vertices) and 0 <= v < len(graph.vertices)):
            raise ValueError(f"graph: expected edges between vertices 0 to {len(graph.vertices) - 1}, got {u} -> {v}")
        if graph.vertices[v] == START or graph.vertices[u] == END:
            raise ValueError(f"graph: expected no edge into START or out of END, got {u} -> {v}")


def _check_end(graph: Graph, inner: Sequence[int]) -> None:
    """END, where it is given, has to be where all loose ends lead and nothing else."""
    if END not in graph.vertices:
        return
    end = graph.vertices.index(END)
    loose = set(inner) - {u for u, v in graph.edges if v != end}
    if (given := {u for u, v in graph.edges if v == end}) != loose:
        raise ValueError(f"graph: expected END after the vertices without a successor, {sorted(loose)}, got it after {sorted(given)}")


def _predecessors(graph: Graph) -> dict[int, set[int]]:
    found: dict[int, set[int]] = {v: set() for v in range(len(graph.vertices))}
    for u, v in graph.edges:
        found[v].add(u)
    return found


@lru_cache(maxsize=8)
def _numbers(vocabulary: tuple[str, ...]) -> dict[str, int]:
    return {name: token for token, name in enumerate(vocabulary, 1)}


def _placed(graph: Graph, inner: Sequence[int], before: dict[int, set[int]], number: dict[str, int]) -> dict[int, int]:
    """The place of each vertex: 0 for START, then 1, 2, ... in the order that the head of this file says."""
    place = {v: 0 for v, name in enumerate(graph.vertices) if name == START}
    left = list(inner)
    while left:
        ready = [v for v in left if before[v] <= place.keys()]
        if not ready:
            raise ValueError(f"graph: expected no cycle, got one among the vertices {left}")
        chosen = min(ready, key=lambda v: (number[graph.vertices[v]], sorted(place[u] for u in before[v])))
        place[chosen] = 1 + len(inner) - len(left)
        left.remove(chosen)
    return place


def _reordered(x: np.ndarray) -> np.ndarray:
    """The array of one graph in its canonical order: next is the ready vertex of the lowest type, places of predecessors, and colour.

    Where vertices agree in all three, every way to go on is followed, and those that turn out to be higher are dropped.
    """
    token = [0, *x[x[:, 0] > 0, 0].tolist()]
    slots = range(1, len(token))
    before = {v: frozenset(np.flatnonzero(x[v - 1, 1:]).tolist()) for v in slots}
    after = {u: frozenset(v for v in slots if u in before[v]) for u in (0, *slots)}
    colour = _colours(token, before, after)
    needed, twin = {}, {}
    for v in slots:  # one after the other, as they are numbered, where type and neighbours are the same: to exchange them changes nothing
        own = (token[v], before[v], after[v])
        needed[v], twin[own] = before[v] | {twin.get(own, 0)}, v
    ways = [{0: 0}]  # from slot to place
    for place in slots:
        steps = [(way, v) for way in ways for v in slots if v not in way and needed[v] <= way.keys()]
        keys = [(token[v], sorted(way[u] for u in before[v]), colour[v]) for way, v in steps]
        least = min(keys)
        found = [way | {v: place} for (way, v), key in zip(steps, keys, strict=True) if key == least]
        ways = list({_open(way, after): way for way in found}.values())
    made = np.zeros_like(x)
    for v, place in ways[0].items():
        if v:
            made[place - 1, 0] = token[v]
            made[place - 1, [1 + ways[0][u] for u in before[v]]] = 1
    return made


def _open(way: dict[int, int], after: dict[int, frozenset[int]]) -> tuple[frozenset[int], frozenset[tuple[int, int]]]:
    """What the rest of the order depends on: which vertices are placed, and the places of those that still lead to others."""
    return frozenset(way), frozenset((u, place) for u, place in way.items() if not after[u] <= way.keys())


def _colours(token: list[int], before: dict[int, frozenset[int]], after: dict[int, frozenset[int]]) -> dict[int, int]:
    """A number for each slot, equal for those that look alike to any depth: by type, and by the colours before and after them (Weisfeiler
    and Leman 1968). It does not depend on how vertices are numbered."""
    colour, known = dict(enumerate(token)), 0
    while known < (count := len(set(colour.values()))) < len(colour):
        look = {v: (colour[v], *(tuple(sorted(colour[u] for u in near[v])) for near in (before, after))) for v in before}
        rank = {one: number for number, one in enumerate(sorted(set(look.values())), 1)}
        colour, known = {0: 0} | {v: rank[look[v]] for v in look}, count
    return colour


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
