"""Laws of graphs that are compared and searched: what counts as the same graph, and that nothing depends on how it is written down."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import graphs as benchmark
from meme_dist.data.graph_codec import canonical, check, to_array, to_graph
from meme_dist.data.sets import asia, dags
from meme_dist.data.shards import write_shards
from meme_dist.metrics import graphs
from meme_dist.recipes.base import Recipe
from tests.test_graph import every_graph
from tests.test_graph_data import batch_of, model_of


def reordered(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The same graph [G, 1 + G] in another topological order, drawn at random."""
    count, place = int((x[:, 0] > 0).sum()), {0: 0}
    while len(place) <= count:
        ready = [v for v in range(1, count + 1) if v not in place and set(np.flatnonzero(x[v - 1, 1:])) <= place.keys()]
        place[int(rng.choice(ready))] = len(place)
    made = np.zeros_like(x)
    for v, new in place.items():
        if v:
            made[new - 1, 0] = x[v - 1, 0]
            made[new - 1, [1 + place[u] for u in np.flatnonzero(x[v - 1, 1:]).tolist()]] = 1
    return made


def others(x: np.ndarray, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([reordered(one, rng) for one in x]) if len(x) else x


def smallest(x: np.ndarray) -> bytes:
    """What all numberings of its vertices have in common: the smallest matrix of types and edges over all permutations."""
    there = [0, *(1 + np.flatnonzero(x[:, 0])).tolist()]
    matrix = np.zeros((len(there), 1 + len(there)), dtype=np.uint8)
    matrix[1:, 0], matrix[1:, 1:-1] = x[: len(there) - 1, 0], x[: len(there) - 1, 1 : len(there)]
    orders = [(0, *order) for order in itertools.permutations(there[1:])]
    return min(matrix[list(o)][:, [0, *(1 + u for u in o), len(there)]].tobytes() for o in orders)


@pytest.mark.parametrize(("size", "types"), [(3, 2), (4, 1)])
def test_canonical_arrays_are_equal_exactly_where_the_graphs_are_the_same(size, types):
    """Of all graphs, by all permutations of their vertices."""
    x = every_graph(size, types).numpy()
    found = canonical(x)
    check(found, types)
    pairs = {(smallest(one), new.tobytes()) for one, new in zip(x, found, strict=True)}
    assert len(pairs) == len({old for old, _ in pairs}) == len({new for _, new in pairs}) < len(x)


def test_a_canonical_array_is_one_of_its_graph_and_stays():
    x = dags.drawn(4, 2, 8, 60, 0).x
    names, found = dags.vocabulary(4), canonical(x)
    assert np.array_equal(canonical(found), found) and np.array_equal(canonical(others(x)), found)
    assert np.array_equal([to_array(to_graph(one, names), names, 8) for one in found], found)
    assert np.allclose(dags.value(found, 2), dags.value(x, 2))
    assert len(canonical(x[:0])) == 0


@pytest.mark.parametrize("branches", [4, 20])
def test_vertices_that_others_tell_apart_are_ordered_without_a_trial(branches):
    """Inputs of one type that lead elsewhere each: branches! orders, and one by what follows."""
    x = np.zeros((2 * branches, 1 + 2 * branches), dtype=np.int64)
    for v in range(branches):
        x[v, :2] = 1
        x[branches + v, 0] = 2
        x[branches + v, 2 : 3 + v] = 1
    rng = np.random.default_rng(0)
    assert np.array_equal(*canonical(np.stack([reordered(x, rng) for _ in range(2)])))


def test_shares_of_new_graphs_do_not_depend_on_the_order_of_their_vertices():
    """Roots A and S of a network the other way around: neither a second graph nor a new one."""
    network = np.zeros((1, asia.SIZE, 1 + asia.SIZE), dtype=np.int64)
    network[0, :, 0], network[0, :2, 1], network[0, range(2, 8), range(2, 8)] = range(1, 9), 1, 1
    other = network.copy()
    other[0, :2, 0], other[0, 2, [2, 3]], other[0, 3, [2, 3]] = [2, 1], [0, 1], [1, 0]
    assert np.array_equal(asia.adjacency(other), asia.adjacency(network))
    assert graphs.novelty(np.concatenate([network, other]), network, asia.complete) == (1, 1 / 2, 0, 2)
    made, known = dags.drawn(3, 3, 4, 60, 0).x, dags.drawn(3, 3, 4, 30, 1).x
    found = graphs.novelty(made, known)
    assert 0 < found.novel < found.unique < 1
    assert graphs.novelty(others(made), known) == found == graphs.novelty(made, others(known))


class Wild:
    """A model of many graphs, whose decoder returns them in any order of their vertices that there is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, order: int | None = None):
        found = dags.drawn(3, 3, 4, 80, 0)
        torch.manual_seed(0)
        self.model = model_of(found.x, 3)
        self.table = graphs.table(self.model, [batch_of(found.x, found.value)], rows=60)
        with torch.no_grad():
            for p in self.model.modality("graph").parameters():
                p.mul_(3)
        real = self.model.reconstruct
        if order is not None:
            monkeypatch.setattr(self.model, "reconstruct", lambda *given: torch.from_numpy(others(real(*given)[0].numpy(), order))[None])

    def search(self, known: graphs.Table | None = None) -> tuple[graphs.Search, graphs.Search]:
        """Three rounds of three trials, and their control."""
        table = known or self.table
        guided = graphs.optimise(self.model, table, oracle, rounds=3, batch=3, candidates=60, spread=2.0)
        return guided, graphs.at_random(guided, table, oracle, batch=3)


def oracle(x: np.ndarray) -> np.ndarray:
    return dags.value(x, 3)


def same(one: graphs.Search, other: graphs.Search) -> bool:
    return one.best == other.best and np.array_equal(one.x, other.x) and np.array_equal(one.value, other.value)


def test_what_a_search_tries_does_not_depend_on_the_order_of_vertices(monkeypatch):
    plain, shuffled = Wild(monkeypatch), Wild(monkeypatch, order=1)
    both = plain.search()
    for again in (shuffled.search(), plain.search(plain.table._replace(x=others(plain.table.x)))):
        assert all(map(same, again, both))
    for search in both:
        tried = {one.tobytes() for one in canonical(search.x)}
        assert len(tried) == len(search.x) == 9 and not tried & {one.tobytes() for one in canonical(plain.table.x)}


def test_both_arms_of_a_search_have_the_same_candidates(monkeypatch):
    """In each round, whatever either has found."""
    guided, control = Wild(monkeypatch).search()
    assert control.pools == guided.pools and len(guided.pools) == 3 and not np.array_equal(guided.x, control.x)
    for search in (guided, control):
        for turn, pool in enumerate(guided.pools):
            there = {one.tobytes() for one in pool.x}
            assert {one.tobytes() for one in search.x[3 * turn : 3 * turn + 3]} <= there


def test_a_search_knows_no_value_but_those_of_its_known_graphs(monkeypatch, tmp_path):
    """Values that the other training graphs exchange change nothing, to the last bit."""
    case = benchmark.Case("search", "dags8", "embedding", 0, 2, 8, 2e-3, 0.0, "", 100, 3, 0.005)
    recipe_of, optimise, found = benchmark.recipe_of, graphs.optimise, list[graphs.Search]()

    def short(*given, **settings) -> graphs.Search:
        found.append(optimise(*given, rounds=1, batch=3, candidates=60, **settings))
        return found[-1]

    def exchanged(case: benchmark.Case) -> Recipe:
        recipe = recipe_of(case)
        assert recipe.dataset is not None
        train = list(recipe.dataset.rows("train"))
        values = [row.data["value"] for row in train]
        values[50:] = values[:49:-1]
        rows = [row._replace(data={**row.data, "value": value}) for row, value in zip(train, values, strict=True)]
        return replace(recipe, dataset=replace(recipe.dataset, rows={"train": rows, "test": rows}.__getitem__))

    monkeypatch.setattr(benchmark, "KNOWN", 50)
    monkeypatch.setattr(graphs, "optimise", short)
    for number, make in enumerate((recipe_of, exchanged)):
        monkeypatch.setattr(benchmark, "recipe_of", make)
        write_shards(benchmark._dataset(case), benchmark._shards(str(tmp_path / str(number)), case))
        benchmark.measured(case, str(tmp_path / str(number)))
    one, other = found
    assert same(one, other) and np.array_equal(one.pools[0].z, other.pools[0].z)
