"""K-sample bounds of log-likelihoods, marginal and conditional (Burda et al. 2016, eq. 8).

    log p(x_T | x_G) >= E[ log 1/K sum_k  prod_{i in T} p(x_i | z_k) p(z_k | x_G) / q(z_k | x_T) ],     z_k ~ q(z | x_T)

T: the targets, G: what is given. Latents w_i that a target has of its own count as the rest: w_ik ~ q(w_i | x_i), times their prior over
their posterior. With nothing given, p(z | x_G) is the model's prior; else it is the inferred posterior of G, which is
the conditional prior of the generative model p(x_T | x_G) = E_{p(z | x_G)} p(x_T | z). A lower bound in expectation for every K, rising
with K. Units: nats a row, of the likelihood's own density: images in [0, 1] are scored as continuous values, so that bits per dimension
of 8-bit images, which would need dequantisation, are not to be had from it.
"""

import math
from collections.abc import Sequence
from itertools import permutations
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from meme_dist.distributions import wide
from meme_dist.metrics.rows import Metric, add_up, holds, joined, noise_of
from meme_dist.objectives.base import Objective
from meme_dist.types import Batch, Sums


class Query(NamedTuple):
    """Of which modalities the likelihood is asked, and what is given: `Query(("photo",), ("mnist",))` is log p(photo | mnist)."""

    targets: tuple[str, ...]
    given: tuple[str, ...] = ()


def queries(names: Sequence[str]) -> list[Query]:
    """Each modality alone, all together, each given each other one and, from three on, each given all the others."""
    alone = [Query((name,)) for name in names]
    pairs = [Query((target,), (given,)) for given, target in permutations(names, 2)]
    rest = [Query((name,), tuple(other for other in names if other != name)) for name in names] if len(names) > 2 else []
    return [*alone, Query(tuple(names)), *pairs, *rest]


def likelihood_key(query: Query, samples: int) -> str:
    """The name of a bound: `log_likelihood/photo|mnist@100`."""
    given = f"|{joined(query.given)}" if query.given else ""
    return f"log_likelihood/{joined(query.targets)}{given}@{samples}"


def log_likelihood(asked: Sequence[Query], *, samples: Sequence[int] = (1, 100), rows: int | None = None, chunk: int = 10) -> Metric:
    """The bounds for every query and K, each with its squares beside it (`KEY/square`), for the interval.

    A row counts where it holds all of the query's modalities and its index is below `rows`. Every bound uses all max(samples) draws: for a
    smaller K it is averaged over as many groups, so that it never falls as K grows, row by row and not only on average. At most `chunk`
    draws a row are decoded at a time. Queries of the same targets share draws and decodings, so that N^2 of them (`queries`) cost 2 N
    decodings a draw, and differences between them are of the same draws. Raises ValueError where a K does not divide the largest.
    """
    largest, limit = max(samples), rows if rows is not None else math.inf
    if min(samples) < 1 or any(largest % num for num in samples):
        raise ValueError(f"log likelihood: each number of samples must divide the largest, got {tuple(samples)}; try (1, 10, 100)")

    def metric(objective: Objective, batch: Batch) -> dict[str, Sums]:
        sums: dict[str, Sums] = {}
        for targets in dict.fromkeys(query.targets for query in asked):
            given = [query.given for query in asked if query.targets == targets]
            for condition, log_weight in _log_weights(objective, batch, targets, given, batch.draw < limit, largest, chunk).items():
                for num in samples:
                    key, bound = likelihood_key(Query(targets, condition), num), _bound(log_weight, num)
                    sums |= {key: add_up(bound), f"{key}/square": add_up(bound.square())}
        return sums

    return metric


def _log_weights(
    objective: Objective,
    batch: Batch,
    targets: tuple[str, ...],
    given: Sequence[tuple[str, ...]],
    wanted: Bool[Tensor, " B"],
    num: int,
    chunk: int,
) -> dict[tuple[str, ...], Float[Tensor, "K R"]]:
    """log of the importance weights of the wanted rows that hold targets and condition, for every condition.

    The draws come from q(z | x_T) whatever is given, so that all conditions share them, and what costs: their decodings.
    """
    counted = {condition: wanted & holds(batch, (*targets, *condition)) for condition in given}
    needed = torch.stack(list(counted.values())).any(0)
    if not bool(needed.any()):  # no decoder sees an empty batch
        return {condition: torch.zeros(num, 0, device=batch.draw.device) for condition in given}
    proposal, purpose = objective.infer(batch.only(*targets)), f"likelihood/{joined(targets)}"
    priors = {condition: objective.infer(batch.only(*condition)) if condition else objective.prior() for condition in given}
    data = {name: batch.dense(name)[needed] for name in targets}
    drawn = proposal.sample(noise_of(batch), purpose, num)
    own = {name: _own(objective, batch, name, f"{purpose}/private/{name}", num) for name in targets}
    parts: dict[tuple[str, ...], list[Tensor]] = {condition: [] for condition in given}
    for start in range(0, num, chunk):
        z, here = drawn[start : start + chunk], slice(start, start + chunk)
        log_weight = -proposal.log_prob(z)[:, needed]
        for name, x in data.items():
            w, ratio = own[name]
            log_weight = log_weight + ratio[here, needed] + _log_prob(objective, name, x, torch.cat([z, w[here]], -1)[:, needed])
        for condition, prior in priors.items():
            parts[condition].append((prior.log_prob(z)[:, needed] + log_weight)[:, counted[condition][needed]])
    return {condition: torch.cat(part) for condition, part in parts.items()}


def _own(
    objective: Objective, batch: Batch, name: str, purpose: str, num: int
) -> tuple[Float[Tensor, "{num} B P"], Float[Tensor, "{num} B"]]:
    """Draws of a modality's own latents from what its data say of them, and log prior - log posterior of each; without any, of size 0."""
    if not objective.modality(name).private_dim:
        return torch.zeros(num, len(batch.draw), 0, device=batch.draw.device), torch.zeros(num, len(batch.draw), device=batch.draw.device)
    posterior = objective.private_posterior(name, len(batch.draw), batch)
    w = posterior.sample(noise_of(batch), purpose, num)
    return w, objective.private_prior(name).log_prob(w) - posterior.log_prob(w)


def _log_prob(objective: Objective, name: str, x: Shaped[Tensor, "R *event"], z: Float[Tensor, "K R D"]) -> Float[Tensor, "K R"]:
    """log p(x | z) itself: a modality's weight, which may be 0, tempers training, and no likelihood."""
    modality = objective.modality(name)
    return modality.likelihood.log_prob(x, wide(modality.decoder(z.flatten(0, 1))).unflatten(0, z.shape[:2]))


def _bound(log_weight: Float[Tensor, "K R"], num: int) -> Float[Tensor, " R"]:
    """The mean over groups of logmeanexp over `num` draws, in double precision."""
    groups = log_weight.double().unflatten(0, (-1, num))
    return (groups.logsumexp(1) - math.log(num)).mean(0)
