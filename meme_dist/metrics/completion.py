"""What a model says of the entries that rows lack: a value, and how sure it is of it.

Of an entry x_j that a row lacks, with z_k ~ q(z | what the row observes), K draws, and m_k the mean of p(x_j | z_k):

    value     the mean over k of m_k (words: the most probable under the mean of the probabilities; a graph: the first draw's)
    interval  between the i-th smallest and the i-th largest of one x_k ~ p(x_j | z_k) for each k, i = (1 - level) (K + 1) / 2: where the
              model is right it holds x_j with probability `level` (`meme_dist.metrics.predictive`)
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from meme_dist.likelihoods import Categorical, Likelihood
from meme_dist.metrics.predictive import draw
from meme_dist.metrics.rows import decoded, device_of, evaluating, joined, noise_of, on_device
from meme_dist.modalities.graph import GraphLikelihood
from meme_dist.noise import Noise
from meme_dist.objectives.base import Objective
from meme_dist.types import Batch

AT_ONCE = 1024  # rows times draws that are decoded together


class Predicted(NamedTuple):
    """What a model says of one modality in the R rows that lack it."""

    value: Shaped[Tensor, "R *event"]
    ends: tuple[Float[Tensor, "R *event"], Float[Tensor, "R *event"]] | None = None  # of the interval, where one is asked for


def predicted(objective: Objective, batch: Batch, *, draws: int = 1, interval: float | None = None) -> dict[str, Predicted]:
    """Of each modality that some rows lack, what the model says of it there, on the CPU: from `draws` codes of what each row observes.

    A row's numbers are its noise's alone. `AT_ONCE` rows times draws are decoded together, or one row, if it has more draws than that.
    """
    batch = on_device(batch, device_of(objective))
    found = {}
    with evaluating(objective):
        purpose = f"imputation/{joined(batch.modalities)}"
        z = objective.infer(batch).sample(noise_of(batch), purpose, draws)
        for name, there in zip(batch.modalities, batch.observed.T, strict=True):
            rows = (~there).nonzero()[:, 0].split(max(1, AT_ONCE // draws))
            parts = [
                _predicted(objective, name, z[:, some], Noise(batch.seed, batch.draw[some]), purpose, interval)
                for some in rows
                if len(some)
            ]
            if parts:
                found[name] = _together(parts)
    return found


def _predicted(objective: Objective, name: str, z: Float[Tensor, "K R D"], noise: Noise, purpose: str, interval: float | None) -> Predicted:
    likelihood = objective.modality(name).likelihood
    params = decoded(objective, name, z, noise, purpose)
    value = _value(likelihood, params).cpu()
    if interval is None:
        return Predicted(value)
    ordered = draw(likelihood, params, noise, f"{purpose}>{name}").sort(0).values
    edge = round((1 - interval) * (len(z) + 1) / 2)
    return Predicted(value, (ordered[edge - 1].cpu(), ordered[-edge].cpu()))


def _value(likelihood: Likelihood, params: Float[Tensor, "K R *outputs"]) -> Shaped[Tensor, "R *event"]:
    if isinstance(likelihood, Categorical):
        return likelihood.mean(params.softmax(-1).mean(0))
    if isinstance(likelihood, GraphLikelihood):
        return likelihood.mean(params[0])
    return likelihood.mean(params).mean(0)


def _together(parts: list[Predicted]) -> Predicted:
    lower, upper = ([part.ends[end] for part in parts if part.ends] for end in (0, 1))
    return Predicted(torch.cat([part.value for part in parts]), (torch.cat(lower), torch.cat(upper)) if lower else None)
