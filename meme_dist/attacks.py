"""Latent attacks: the smallest change of one modality's data that moves what the encoders say, in an l_inf ball and the data's range.

    unsupervised   max over |e| <= radius of  distance(q(z | x + e), q(z | x))
    supervised     min over |e| <= radius of  distance(q(z | x + e), q(z | x_target))          (Kuzina, Welling and Tomczak, NeurIPS 2022)
    misclassified  max of the cross entropy of a classifier of codes at the posterior's mean

Refinement is a defence, so what is attacked has to include it. Two adaptive attacks need no second derivatives:

    through_refinement   max of any loss of the refined code, gradients passed straight through the chains as if they were a constant shift
                         of the code, and averaged over chains (Athalye, Carlini and Wagner 2018: BPDA and EOT)
    against_posterior    max of log p(x + e | z_wrong) - log p(x + e | z_clean): moves the posterior itself, and so any sampler of it

All are ascents by signed gradients (Madry et al. 2018) from random points of the ball, the best of several restarts for each row; the
published code takes plain gradient steps of length 1 with a falling rate instead. What they find is a lower bound of what can be done.
"""

import itertools
from collections.abc import Callable, Collection, Mapping
from math import prod
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn.functional import cross_entropy

from meme_dist.distributions import DiagLaplace, DiagNormal, Diagonal, Posterior
from meme_dist.mcmc import MALA, Kernel
from meme_dist.metrics.rows import device_of, evaluating, on_device
from meme_dist.noise import Noise
from meme_dist.objectives.base import Objective, unpack
from meme_dist.refine import refine
from meme_dist.types import Batch

Gain = Callable[[Batch], Float[Tensor, " B"]]
"""What an attack raises, row by row, as a differentiable function of the attacked batch."""

Distance = Callable[[Posterior, Posterior], Float[Tensor, " B"]]
"""How far the attacked posterior (first) is from another one (second)."""

Loss = Callable[[Float[Tensor, "K B D"]], Float[Tensor, "K B"]]
"""A loss of codes."""

STRIDE = 2.5  # of a step, in radii over the number of steps: enough to cross the ball and come back (Madry et al.)


class Attacked(NamedTuple):
    """The batch with the attacked modality in place, and each row's gain there: the best of all restarts."""

    batch: Batch
    gain: Float[Tensor, " B"]


# ---- distances ----------------------------------------------------------------------------------------------------------------------


def forward_kl(q: Posterior, other: Posterior) -> Float[Tensor, " B"]:
    """KL(q || other) in nats; for posteriors without a closed form, that of Normals with their moments."""
    a, b = _diagonal(q), _diagonal(other)
    if isinstance(a, DiagLaplace) and isinstance(b, DiagLaplace):
        return a.kl(b)
    return DiagNormal(a.mean, a.stddev).kl(DiagNormal(b.mean, b.stddev))


def reverse_kl(q: Posterior, other: Posterior) -> Float[Tensor, " B"]:
    """KL(other || q)."""
    return forward_kl(other, q)


def symmetric_kl(q: Posterior, other: Posterior) -> Float[Tensor, " B"]:
    """(KL(q || other) + KL(other || q)) / 2."""
    return (forward_kl(q, other) + forward_kl(other, q)) / 2


def squared_means(q: Posterior, other: Posterior) -> Float[Tensor, " B"]:
    """The squared Euclidean distance of the means."""
    return (q.mean - other.mean).square().sum(-1)


def _diagonal(q: Posterior) -> Diagonal:
    return q if isinstance(q, DiagNormal | DiagLaplace) else DiagNormal(q.mean, q.stddev)


# ---- what is raised -----------------------------------------------------------------------------------------------------------------


def unsupervised(objective: Objective, clean: Batch, *, distance: Distance = symmetric_kl) -> Gain:
    """The distance from what the clean rows say."""
    reference = _fixed(objective, clean)
    return lambda batch: distance(objective.infer(batch), reference)


def supervised(objective: Objective, towards: Batch, *, distance: Distance = symmetric_kl) -> Gain:
    """Minus the distance to what the rows of another batch say."""
    reference = _fixed(objective, towards)
    return lambda batch: -distance(objective.infer(batch), reference)


def misclassified(objective: Objective, classify: Callable[[Tensor], Tensor], label: Int[Tensor, " B"]) -> Gain:
    """The cross entropy of the classes `label` under the logits that `classify` gives at the posterior's mean."""
    return lambda batch: cross_entropy(classify(objective.infer(batch).mean), label, reduction="none")


def through_refinement(
    objective: Objective,
    loss: Loss,
    *,
    kernel: Kernel = MALA,
    budget: int = 50,
    chains: int = 1,
    modalities: Collection[str] | None = None,
    temper: float | Mapping[str, float] = 1.0,
    purpose: str = "adaptive",
) -> Gain:
    """The mean loss of `chains` refined codes of each row, with new random numbers at every call.

    `attack` keeps the best of such noisy values: with few chains what is kept owes something to luck, and is weaker than its gain says.
    """
    calls = itertools.count()

    def gain(batch: Batch) -> Tensor:
        seen = f"{purpose}/{next(calls)}"
        settings = {"kernel": kernel, "budget": budget, "modalities": modalities, "temper": temper}
        z = refine(objective, detached(batch), samples=chains, purpose=seen, **settings).z
        mean = objective.infer(batch).mean
        return loss(mean + (z - mean).detach()).mean(0)

    return gain


def against_posterior(objective: Objective, name: str, *, clean: Float[Tensor, "B D"], wrong: Float[Tensor, "B D"]) -> Gain:
    """log p(x | wrong) - log p(x | clean) of one modality, in nats: how far its data speak for another code; 0 in rows without it.

    Raises ValueError for a modality with latents of its own.
    """
    modality = objective.modality(name)
    if modality.private_dim:
        raise ValueError(f"{name}: has latents of its own, and these codes are the shared ones alone")

    def gain(batch: Batch) -> Tensor:
        packed, rows = batch.modalities[name], len(batch.draw)
        codes = torch.stack([wrong, clean])[:, packed.row.clamp(max=rows - 1)]
        log_prob = torch.stack([modality.log_prob(packed.data, z[None])[0] for z in codes]) / modality.weight
        return unpack((log_prob[0] - log_prob[1])[:, None], packed.row, rows, 0.0)[:, 0]

    return gain


def _fixed(objective: Objective, batch: Batch) -> Diagonal:
    """What the batch says, as a value."""
    with evaluating(objective):
        return _diagonal(objective.infer(batch))


# ---- the attack ---------------------------------------------------------------------------------------------------------------------


def attack(
    objective: Objective,
    batch: Batch,
    name: str,
    gain: Gain,
    *,
    radius: float,
    steps: int = 50,
    restarts: int = 10,
    low: float = 0.0,
    high: float = 1.0,
    purpose: str = "attack",
) -> Attacked:
    """Raise `gain` over the data of one modality within `radius` of each element and within [low, high].

    Rows that lack the modality stay as they are. Each row's random starts are its own (`batch.seed`, `batch.draw`). The model is in
    evaluation mode meanwhile and keeps its parameters' gradients. Raises ValueError for tokens and other data that are no real numbers,
    and for data outside [low, high].
    """
    batch = on_device(batch, device_of(objective))
    packed = batch.modalities[name]
    if not packed.data.is_floating_point():
        raise ValueError(f"{name}: only real data can be moved a little, this modality has {packed.data.dtype}")
    if not radius > 0 or steps < 1 or restarts < 1 or not low < high:
        raise ValueError(
            f"attack: expected radius > 0, steps and restarts of at least 1 and low < high, got {(radius, steps, restarts, low, high)}"
        )
    held = packed.data[packed.row < len(batch.draw)]
    if held.numel() and not (low <= held.min() and held.max() <= high):
        raise ValueError(f"{name}: expected data in [{low}, {high}], got {held.min():.3g} to {held.max():.3g}; say low and high")
    lower, upper = (packed.data - radius).clamp(min=low, max=high), (packed.data + radius).clamp(min=low, max=high)
    best, most = packed.data, torch.full((len(batch.draw),), -torch.inf, dtype=packed.data.dtype, device=packed.data.device)
    with evaluating(objective):
        for restart in range(restarts):
            data = torch.lerp(lower, upper, _uniform(batch, name, f"{purpose}/{restart}"))
            for _ in range(steps):
                value, slope = _slope(batch, name, data, gain)
                best, most = _better(batch, name, best, most, data, value)
                data = (data + STRIDE * radius / steps * slope.sign()).clamp(lower, upper)
            best, most = _better(batch, name, best, most, data, _slope(batch, name, data, gain)[0])
    return Attacked(replaced(batch, name, best), most)


def replaced(batch: Batch, name: str, data: Shaped[Tensor, "R *event"]) -> Batch:
    """The same batch with other data of one modality, packed as `batch.modalities[name].data` is."""
    return batch._replace(modalities={**batch.modalities, name: batch.modalities[name]._replace(data=data)})


def detached(batch: Batch) -> Batch:
    """The same batch, whose data carry no gradient."""
    modalities = {name: packed._replace(data=packed.data.detach()) for name, packed in batch.modalities.items()}
    return batch._replace(modalities=modalities)


def _slope(batch: Batch, name: str, data: Tensor, gain: Gain) -> tuple[Float[Tensor, " B"], Float[Tensor, "R *event"]]:
    with torch.enable_grad():
        data = data.detach().requires_grad_()
        value = gain(replaced(batch, name, data))
        (slope,) = torch.autograd.grad(value.sum(), data)
    return value.detach(), slope


def _better(batch: Batch, name: str, best: Tensor, most: Tensor, data: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The better of two attacks of each row, and its gain."""
    higher = value > most
    packed = torch.cat([higher, higher.new_zeros(1)])[batch.modalities[name].row]
    return torch.where(packed.view(-1, *[1] * (data.dim() - 1)), data, best), torch.where(higher, value.to(most.dtype), most)


def _uniform(batch: Batch, name: str, purpose: str) -> Float[Tensor, "R *event"]:
    """On (0, 1], keyed by the row."""
    packed = batch.modalities[name]
    draw = torch.cat([batch.draw, batch.draw.new_zeros(1)])[packed.row]
    return Noise(batch.seed, draw).uniform(purpose, 1, prod(packed.data.shape[1:])).view(packed.data.shape).to(packed.data.dtype)
