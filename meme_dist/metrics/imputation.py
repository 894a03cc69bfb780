"""How well missing modalities are filled in, by what was observed; and whether the model knows how sure it can be.

For a row that holds the sources S and the target j: z_k ~ q(z | x_S), K draws, and of the predictive density p(x_j | x_S) = E p(x_j | z)

    point estimate   mean over k of the likelihood's mean (tokens: the most probable word under the mean of the probabilities)
    rmse, mae        of the point estimate, over all elements of x_j (root of the mean over rows of the mean square)
    accuracy         share of the target's words that the point estimate names, padding left out; of a graph's types and edges that the
                     most probable graph at a draw has, over draws
    log_likelihood   log 1/K sum_k p(x_j | z_k) in nats a row: a lower bound in expectation (counts: their held-out likelihood)
    coverage, crps   of one x_k ~ p(x | z_k) for each z_k (`meme_dist.metrics.predictive`): intervals that hold the value as often as
                     they say are calibrated. For Normal, Laplace, Poisson and negative binomial likelihoods.

Up to five modalities every pattern is told apart, beyond that the patterns of one size are taken together: a row counts once, with its
mean over those that it holds.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from meme_dist.likelihoods import Categorical, Likelihood
from meme_dist.metrics.coherence import Sources
from meme_dist.metrics.predictive import can_draw, covered, crps, draw, rank, standard
from meme_dist.metrics.rows import Metric, decoded, holds, joined, noise_of, with_square
from meme_dist.modalities.graph import GraphLikelihood, agreement
from meme_dist.noise import Noise
from meme_dist.objectives.base import Objective
from meme_dist.types import Batch, Sums

LEVELS = (0.5, 0.8, 0.95)  # of the central intervals
APART = 5  # modalities up to which every pattern stands alone
CHUNK = 10  # draws that are decoded together


class Pattern(NamedTuple):
    """What was observed: a set of modalities, or (None) any of `inputs` modalities."""

    inputs: int
    sources: Sources | None


def pattern_of(sources: Sources, modalities: int) -> Pattern:
    """The line of the table in which these sources stand, for a data set of so many modalities."""
    return Pattern(len(sources), sources if modalities <= APART else None)


def imputation_key(pattern: Pattern, target: str, quantity: str) -> str:
    """`imputation/mnist+name>photo/squared_error`, or `imputation/3 observed>photo/...`."""
    observed = f"{pattern.inputs} observed" if pattern.sources is None else joined(pattern.sources)
    return f"imputation/{observed}>{target}/{quantity}"


def quantities(objective: Objective, target: str) -> list[str]:
    """What is measured of a target, by its likelihood."""
    likelihood = objective.modality(target).likelihood
    if isinstance(likelihood, Categorical | GraphLikelihood):
        return ["accuracy", "log_likelihood"]
    calibration = ["crps", *(f"coverage@{level}" for level in LEVELS)] if can_draw(likelihood) else []
    return ["squared_error", "absolute_error", "log_likelihood", *calibration]


def imputation(sources: Sequence[Sources], *, rows: int, draws: int = 39) -> Metric:
    """Every quantity of every pattern and target outside it, each with its squares, summed over rows below `rows` that hold them all.

    Raises ValueError for a number of draws whose intervals end between two of them (39 and 199 do not).
    """
    for level in LEVELS:
        covered(torch.zeros(1, 1, dtype=torch.int64), draws, level)

    def metric(objective: Objective, batch: Batch) -> dict[str, Sums]:
        names, wanted = list(batch.modalities), batch.draw < rows
        totals: dict[str, Float[Tensor, "2 B"]] = {}  # of each row over the sets that share a line, and of how many
        latents: dict[Sources, Float[Tensor, "K B D"]] = {}
        for target in names:
            held = wanted & holds(batch, [target])
            standards = _standards(objective, batch, target, held, draws)
            for chosen in sources:
                if target in chosen:
                    continue
                counted = held & holds(batch, chosen)
                asked = bool(counted.any())
                if asked and chosen not in latents:
                    z = objective.infer(batch.only(*chosen)).sample(noise_of(batch), f"imputation/{joined(chosen)}", draws)
                    latents[chosen] = z[:, wanted]  # of the rows that are asked for alone: there are as many of these as source sets
                z = latents[chosen][:, counted[wanted]] if asked else None
                values = _from_latents(objective, batch, target, z, counted, standards, counted[held])
                for quantity in quantities(objective, target):
                    key = imputation_key(pattern_of(chosen, len(names)), target, quantity)
                    own = values[quantity].detach().double()
                    totals.setdefault(key, own.new_zeros(2, len(counted)))[:, counted] += torch.stack([own, torch.ones_like(own)])
        sums: dict[str, Sums] = {}
        for key, (total, count) in totals.items():
            sums |= with_square(key, total[count > 0] / count[count > 0])
        return sums

    return metric


def _standards(objective: Objective, batch: Batch, target: str, held: Bool[Tensor, " B"], draws: int) -> list[Float[Tensor, "C R E"]]:
    """The noise of a target's draws, a chunk of draws each, the same whatever was observed; none where draws have no such noise."""
    likelihood, noise = objective.modality(target).likelihood, Noise(batch.seed, batch.draw[held])
    if not bool(held.any()):
        return []
    size = batch.modalities[target].data[0].numel()
    chunks = enumerate(torch.arange(draws).split(CHUNK))
    made = [standard(likelihood, noise, f"{_purpose(target)}/{number}", len(chunk), size) for number, chunk in chunks]
    return [one for one in made if one is not None]


def _purpose(target: str) -> str:
    return f"imputation/>{target}"


def _from_latents(
    objective: Objective,
    batch: Batch,
    target: str,
    z: Float[Tensor, "K R D"] | None,
    counted: Bool[Tensor, " B"],
    standards: Sequence[Float[Tensor, "C H E"]],
    within: Bool[Tensor, " H"],
) -> dict[str, Float[Tensor, " R"]]:
    if z is None:  # no decoder sees an empty batch
        return {quantity: torch.zeros(0, device=batch.draw.device) for quantity in quantities(objective, target)}
    noise, x = Noise(batch.seed, batch.draw[counted]), batch.dense(target)[counted]
    return _scores(objective, target, x, z, noise, _purpose(target), standards, within)


def _scores(
    objective: Objective,
    target: str,
    x: Shaped[Tensor, "R *event"],
    z: Float[Tensor, "K R D"],
    noise: Noise,
    purpose: str,
    standards: Sequence[Float[Tensor, "C H E"]],
    within: Bool[Tensor, " H"],
) -> dict[str, Float[Tensor, " R"]]:
    """Each quantity of each row, decoding a few draws at a time."""
    likelihood = objective.modality(target).likelihood
    sampled = can_draw(likelihood)
    log_prob, made, total = [], [], None
    for number, part in enumerate(z.split(CHUNK)):
        params = decoded(objective, target, part, noise, f"{purpose}/{number}")
        log_prob.append(likelihood.log_prob(x, params).double())
        point = _point(likelihood, params, x)
        total = point.sum(0) if total is None else total + point.sum(0)
        known = standards[number][:, within] if standards else None
        made += [draw(likelihood, params.nan_to_num(0.0, 0.0, 0.0), noise, f"{purpose}/{number}", known)] if sampled else []
    assert total is not None
    scores = {"log_likelihood": torch.cat(log_prob).logsumexp(0) - math.log(len(z))}
    if isinstance(likelihood, Categorical):
        return scores | {"accuracy": _accuracy(total.argmax(-1), x, likelihood.padding)}
    if isinstance(likelihood, GraphLikelihood):
        return scores | {"accuracy": total.double() / len(z)}
    calibration = _calibration(torch.cat(made), x, noise, purpose) if sampled else {}
    unknown = scores["log_likelihood"].isnan()  # there are draws of what has parameters alone
    return scores | _errors(total / len(z), x) | {name: torch.where(unknown, torch.nan, value) for name, value in calibration.items()}


def _point(likelihood: Likelihood, params: Float[Tensor, "K R *outputs"], x: Shaped[Tensor, "R *event"]) -> Float[Tensor, "K R *values"]:
    """What is averaged over draws."""
    if isinstance(likelihood, GraphLikelihood):
        return agreement(likelihood.mean(params), x)
    return _probabilities(params, likelihood.padding) if isinstance(likelihood, Categorical) else likelihood.mean(params)


def _probabilities(params: Float[Tensor, "K R T V"], padding: int) -> Float[Tensor, "K R T V"]:
    probability = params.softmax(-1)
    probability[..., padding] = 0.0
    return probability


def _accuracy(named: Shaped[Tensor, "R T"], x: Shaped[Tensor, "R T"], padding: int) -> Float[Tensor, " R"]:
    words = x != padding
    return ((named == x) & words).sum(1).double() / words.sum(1).clamp(min=1)


def _errors(point: Float[Tensor, "R *event"], x: Float[Tensor, "R *event"]) -> dict[str, Float[Tensor, " R"]]:
    difference = (point - x).flatten(1).double()
    return {"squared_error": difference.square().mean(1), "absolute_error": difference.abs().mean(1)}


def _calibration(
    draws: Float[Tensor, "K R *event"], x: Float[Tensor, "R *event"], noise: Noise, purpose: str
) -> dict[str, Float[Tensor, " R"]]:
    draws, x = draws.flatten(2), x.flatten(1)
    place = rank(draws, x, noise, f"{purpose}/ties")
    shares = {f"coverage@{level}": covered(place, len(draws), level).mean(1) for level in LEVELS}
    return {"crps": crps(draws, x).double().mean(1), **shares}
