"""What a model of graphs can do: get graphs back, make new ones, tell their value from z, and find better ones.

Measured by greedy decoding (the most probable choice at each step) unless it says sampled. D-VAE (Zhang et al. 2019) calls accuracy the
share of exact reconstructions, of the same array as here; of its other figures validity is 1 here by construction, since every decoded
array is a graph, so that `valid` says what a data set asks beyond that (each variable once, say); and novelty says little where a space
has 10^9 graphs. Graphs that are new, or tried already, are told by `canonical`: in whatever order their vertices come.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.ensemble import HistGradientBoostingRegressor
from torch import Tensor

from meme_dist.data.graph_codec import canonical
from meme_dist.metrics import gaussian_process
from meme_dist.metrics.gaussian_process import Predictivity, expected_improvement, predictivity
from meme_dist.metrics.rows import Metric, decoded, device_of, evaluating, holds, noise_of, on_device, with_square
from meme_dist.modalities.graph import GraphLikelihood, agreement
from meme_dist.noise import Noise
from meme_dist.objectives.base import Objective
from meme_dist.types import Batch, Sums

Valid = Callable[[Int[np.ndarray, "R G columns"]], np.ndarray]
"""Which graphs are what a data set asks for."""
Oracle = Callable[[Int[np.ndarray, "R G columns"]], np.ndarray]
"""The value of graphs."""

CHUNK = 1000  # draws that are decoded together
FEW = 32  # types that get a column each
_QUANTITIES = [f"{key}{square}" for key in ("exact", "exact_sampled", "agreement", "log_prob") for square in ("", "/square")]


def everything_valid(x: Int[np.ndarray, "R G columns"]) -> np.ndarray:
    """Every array is a graph: nothing more is asked."""
    return np.ones(len(x), dtype=bool)


# ---- getting graphs back --------------------------------------------------------------------------------------------------------------


def reconstruction(name: str = "graph") -> Metric:
    """Of test graphs: `exact` and `agreement` of the graph at the mean of q(z | graph), `exact_sampled` of a drawn graph at a drawn z, and
    `log_prob` in nats at the mean; each with its square.
    """

    def metric(objective: Objective, batch: Batch) -> dict[str, Sums]:
        held = holds(batch, [name])
        q, x, likelihood = objective.infer(batch.only(name)), batch.dense(name)[held], _likelihood(objective, name)
        if not len(x):
            return {f"{name}/{key}": Sums(*torch.zeros(2, dtype=torch.float64, device=x.device)) for key in _QUANTITIES}
        noise = Noise(batch.seed, batch.draw[held])
        mean = decoded(objective, name, q.mean[None, held], noise, f"{name}/at mean")
        drawn = q.sample(noise_of(batch), f"{name}/reconstruction", 1)[:, held]
        made = likelihood.mean(mean)[0]
        sampled = likelihood.sample(decoded(objective, name, drawn, noise, f"{name}/at draw"), noise, f"{name}/choices")[0]
        found = ((made == x).flatten(1).all(1), (sampled == x).flatten(1).all(1), agreement(made, x), likelihood.log_prob(x, mean)[0])
        sums: dict[str, Sums] = {}
        for key, values in zip(_QUANTITIES[::2], found, strict=True):
            sums |= with_square(f"{name}/{key}", values)
        return sums

    return metric


def type_accuracy(group: Int[Tensor, " types"], *, name: str = "graph") -> Metric:
    """The share of vertices whose type is the most probable one, given z at the mean and what comes before it in the graph.

    One number for each group of types, [groups]; `frequency_groups` makes tenths of them.
    """

    def metric(objective: Objective, batch: Batch) -> dict[str, Sums]:
        held, groups = holds(batch, [name]), int(group.max()) + 1
        x, noise = batch.dense(name)[held], Noise(batch.seed, batch.draw[held])
        if not len(x):
            return {f"{name}/types": Sums(*torch.zeros(2, groups, dtype=torch.float64, device=x.device))}
        mean = objective.infer(batch.only(name)).mean[None, held]
        params = decoded(objective, name, mean, noise, f"{name}/at mean")
        logits = _likelihood(objective, name).choices(x, params).type_logits[0]
        there = x[..., 0] > 0
        right = (logits.argmax(-1) == x[..., 0])[there].double()
        place = group.to(x.device)[x[..., 0][there] - 1]
        hits, count = (torch.zeros(groups, dtype=torch.float64, device=x.device).index_add(0, place, v) for v in (right, right * 0 + 1))
        return {f"{name}/types": Sums(hits, count)}

    return metric


def frequency_groups(x: Int[np.ndarray, "R G columns"], types: int, groups: int = 10) -> Int[Tensor, " types"]:
    """For each type its tenth: 0 for the tenth of the types that come most often in these graphs. Raises ValueError for too few types."""
    if types < groups:
        raise ValueError(f"frequency groups: expected {groups} types or more, got {types}")
    count = np.bincount(x[..., 0].ravel(), minlength=types + 1)[1:]
    order = np.argsort(-count, kind="stable")
    group = np.empty(types, dtype=np.int64)
    group[order] = np.arange(types) * groups // types
    return torch.from_numpy(group)


# ---- making new ones ------------------------------------------------------------------------------------------------------------------


class Made(NamedTuple):
    """Shares: of all graphs those that are valid, of the valid ones those that differ, of the valid ones those not among `known`."""

    valid: float
    unique: float
    novel: float
    count: int


def prior_graphs(objective: Objective, num: int, *, draws: int = 10, seed: int = 0, name: str = "graph") -> Int[np.ndarray, "R G columns"]:
    """`draws` sampled graphs at each of `num` draws of z from the prior: D-VAE takes 1000 and 10."""
    made = []
    with evaluating(objective):
        for start in range(0, num, CHUNK):
            noise = Noise(seed, torch.arange(start, min(num, start + CHUNK), device=device_of(objective)))
            z = objective.prior().sample(noise, "graphs", 1)
            params = decoded(objective, name, z, noise, "graphs").expand(draws, -1, -1)
            made.append(_likelihood(objective, name).sample(params, noise, "graphs/choices").flatten(0, 1).cpu().numpy())
    return np.concatenate(made)


def novelty(made: Int[np.ndarray, "R G columns"], known: Int[np.ndarray, "S G columns"], valid: Valid = everything_valid) -> Made:
    """What graphs are worth that a model made, beside those that it was trained on."""
    kept = made[valid(made)]
    names, old = _names(canonical(kept)), set(_names(canonical(known)))
    count = max(1, len(kept))
    return Made(len(kept) / max(1, len(made)), len(set(names)) / count, sum(n not in old for n in names) / count, len(made))


def _names(x: Int[np.ndarray, "R G columns"]) -> list[bytes]:
    return [one.tobytes() for one in x.astype(np.int64)]


# ---- telling their value --------------------------------------------------------------------------------------------------------------


class Table(NamedTuple):
    """Complete rows: mean of q(z | graph), the graph, its value."""

    z: Float[np.ndarray, "R D"]
    x: Int[np.ndarray, "R G columns"]
    value: Float[np.ndarray, " R"]


def table(objective: Objective, batches: Iterable[Batch], *, rows: int | None = None, name: str = "graph", value: str = "value") -> Table:
    """The first rows that hold both a graph and its value; on one process."""
    parts, count = [], 0
    with evaluating(objective):
        for batch in batches:
            batch = on_device(batch, device_of(objective))
            held = holds(batch, [name, value])
            mean = objective.infer(batch.only(name)).mean[held]
            parts.append([part.cpu().numpy() for part in (mean, batch.dense(name)[held], batch.dense(value)[held][:, 0])])
            count += int(held.sum())
            if rows is not None and count >= rows:
                break
    z, x, y = (np.concatenate(column)[:rows] for column in zip(*parts, strict=True))
    return Table(z, x, y)


def latent_predictivity(train: Table, test: Table, *, inducing: int = 500, seed: int = 0) -> Predictivity:
    """How well a Gaussian process of z tells the value of graphs that it has not seen."""
    mean, _ = gaussian_process.predict(gaussian_process.fit(train.z, train.value, inducing=inducing, seed=seed), test.z)
    return predictivity(mean, test.value, unit=float(train.value.std()))


def raw_predictivity(train: Table, test: Table, *, seed: int = 0, iterations: int = 500) -> Predictivity:
    """The same from the array itself, by gradient-boosted trees: what a latent has to beat before its figure says more than smoothness."""
    few = bool(train.x[..., 0].max() <= FEW)
    trees = HistGradientBoostingRegressor(max_iter=iterations, random_state=seed).fit(_features(train.x, few), train.value)
    return predictivity(trees.predict(_features(test.x, few)), test.value, unit=float(train.value.std()))


def _features(x: Int[np.ndarray, "R G columns"], few: bool) -> Float[np.ndarray, "R features"]:
    """Edges, and types: a column for each of a `few`, else their numbers."""
    types = x[..., 0]
    columns = types[..., None] == np.arange(1, FEW + 1) if few else types[..., None]
    return np.concatenate([columns.reshape(len(x), -1), x[..., 1:].reshape(len(x), -1)], 1).astype(np.float64)


# ---- finding better ones --------------------------------------------------------------------------------------------------------------


class Pool(NamedTuple):
    """What there is to try: latents, and the most probable graph at each, in its canonical order."""

    z: Float[np.ndarray, "R D"]
    x: Int[np.ndarray, "R G columns"]


class Search(NamedTuple):
    """The best value known after 0, 1, ... rounds; all that was tried, graphs and their values; what each round had to choose from."""

    best: tuple[float, ...]
    x: Int[np.ndarray, "R G columns"]
    value: Float[np.ndarray, " R"]
    pools: tuple[Pool, ...]


def optimise(
    objective: Objective,
    known: Table,
    oracle: Oracle,
    *,
    rounds: int = 5,
    batch: int = 20,
    candidates: int = 2000,
    spread: float = 0.3,
    valid: Valid = everything_valid,
    seed: int = 0,
    name: str = "graph",
) -> Search:
    """Bayesian optimisation in the latent space: in each round the `batch` new graphs of highest expected improvement are tried.

    Candidates are half draws from the prior, half the best latents known by then with `spread` times the latents' deviation as noise; the
    process is fitted to all that is known by then. `at_random` is its control.
    """
    rng = np.random.default_rng(seed)

    def propose(turn: int, z: np.ndarray, value: np.ndarray) -> tuple[Pool, np.ndarray]:
        top = z[np.argsort(-value)[: candidates // 20 + 1]]
        pool = _candidates(objective, name, top, candidates, spread * z.std(0), seed * rounds + turn, rng)
        mean, deviation = gaussian_process.predict(gaussian_process.fit(z, value, inducing=300, seed=seed), pool.z)
        return pool, expected_improvement(mean, deviation, float(value.max()))

    return _search(known, oracle, rounds, batch, valid, propose)


def at_random(search: Search, known: Table, oracle: Oracle, *, batch: int = 20, valid: Valid = everything_valid, seed: int = 0) -> Search:
    """The control of a search: in each round the same candidates, tried in random order.

    They are drawn around what that search had found, which random trials alone would not have: the difference is what the process's choice
    among candidates is worth, and nothing else.
    """
    rng = np.random.default_rng(seed)
    return _search(
        known, oracle, len(search.pools), batch, valid, lambda turn, *_: (search.pools[turn], rng.random(len(search.pools[turn].z)))
    )


def _search(
    known: Table,
    oracle: Oracle,
    rounds: int,
    batch: int,
    valid: Valid,
    propose: Callable[[int, np.ndarray, np.ndarray], tuple[Pool, np.ndarray]],
) -> Search:
    """`propose`: from the round's number, latents and values known by then, to candidates and what a trial of each is worth."""
    z, value, seen = known.z, known.value, set(_names(canonical(known.x)))
    best, tried, pools = [float(value.max())], [known.x[:0]], list[Pool]()
    for turn in range(rounds):
        pool, worth = propose(turn, z, value)
        pools.append(pool)
        chosen = _new(pool.x, np.argsort(-worth, kind="stable"), valid(pool.x), seen, batch)
        if chosen:
            tried.append(pool.x[chosen])
            z, value = np.concatenate([z, pool.z[chosen]]), np.concatenate([value, oracle(pool.x[chosen])])
        best.append(float(value.max()))
    return Search(tuple(best), np.concatenate(tried), value[len(known.value) :], tuple(pools))


def _candidates(
    objective: Objective, name: str, top: np.ndarray, num: int, deviation: np.ndarray, seed: int, rng: np.random.Generator
) -> Pool:
    near = top[rng.integers(len(top), size=num - num // 2)]
    near = near + deviation * rng.standard_normal(near.shape)
    with evaluating(objective):
        noise = Noise(seed, torch.arange(num, device=device_of(objective)))
        z = objective.prior().sample(noise, "candidates", 1)
        z[0, num // 2 :] = torch.from_numpy(near).to(z)
        return Pool(z[0].cpu().numpy(), canonical(objective.reconstruct(name, z, noise, "candidates")[0].cpu().numpy()))


def _new(graphs: np.ndarray, order: np.ndarray, valid: np.ndarray, seen: set[bytes], most: int) -> list[int]:
    """The first valid graphs in this order that nobody has tried; they count as tried now."""
    chosen, names = list[int](), _names(graphs)
    for place in order:
        if valid[place] and names[place] not in seen:
            seen.add(names[place])
            chosen.append(int(place))
        if len(chosen) == most:
            break
    return chosen


def _likelihood(objective: Objective, name: str) -> GraphLikelihood:
    modality, likelihood = objective.modality(name), objective.modality(name).likelihood
    if not isinstance(likelihood, GraphLikelihood):
        raise ValueError(f"{name}: expected a modality of graphs, got the likelihood {type(likelihood).__name__}")
    if modality.private_dim:
        raise ValueError(f"{name}: graphs are measured by shared latents alone, and this one has {modality.private_dim} of its own")
    return likelihood
