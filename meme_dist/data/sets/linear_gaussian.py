"""Linear-Gaussian rows: every density that a multimodal VAE approximates is known exactly.

    z ~ N(0, I);   x_j = W_j z + b_j + s_j eps_j   for each modality j, the columns of W_j orthogonal

Orthogonal columns make every posterior p(z | any subset of x) a DIAGONAL Gaussian, so that a diagonal encoder can be exact and a bound
tight.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from meme_dist.data.fields import Field
from meme_dist.data.sets._missing import check_missing, missing_at_random
from meme_dist.data.sets._pairing import check_split, generator
from meme_dist.data.shards import Dataset, Row

TEST_SHARE = 4  # a test row for four training rows


@dataclass(frozen=True)
class LinearGaussian:
    """The parameters, in float64, and the exact densities that follow from them."""

    weight: Mapping[str, Float[Tensor, "E D"]]  # W_j, columns orthogonal
    bias: Mapping[str, Float[Tensor, " E"]]
    scale: Mapping[str, float]  # s_j

    def posterior(
        self, x: Mapping[str, Float[Tensor, "B E"]], observed: Bool[Tensor, "B N"] | None = None
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B D"]]:
        """Mean and standard deviation of p(z | what each row observes); the prior's where that is nothing.

            precision = 1 + sum_j |W_j column|^2 / s_j^2;   mean = sum_j W_j^T (x_j - b_j) / s_j^2 / precision

        `observed`: columns in the order of `x`, None for all; absent entries of x are never read.
        """
        shown = self._shown(x, observed)
        rows, latent_dim = len(next(iter(x.values()))), next(iter(self.weight.values())).shape[1]
        precision, shift = torch.ones(rows, latent_dim, dtype=torch.float64), torch.zeros(rows, latent_dim, dtype=torch.float64)
        for name, (value, there) in shown.items():
            gain = there[:, None] / self.scale[name] ** 2
            precision = precision + gain * self.weight[name].square().sum(0)
            shift = shift + gain * ((value - self.bias[name]) @ self.weight[name])
        return shift / precision, precision**-0.5

    def evidence(self, x: Mapping[str, Float[Tensor, "B E"]], observed: Bool[Tensor, "B N"] | None = None) -> Float[Tensor, " B"]:
        """log p(x_observed) of each row, in nats; 0 for a row that observes nothing. Arguments as for `posterior`.

        By Bayes' rule at any z, here the posterior's mean m:  sum_j log p(x_j | m) + log p(m) - log p(m | x).
        """
        mean, stddev = self.posterior(x, observed)
        total = _log_normal(mean, 0.0, torch.ones_like(mean)) - _log_normal(mean, mean, stddev)
        for name, (value, there) in self._shown(x, observed).items():
            scale = torch.full_like(value, self.scale[name])
            total = total + there * _log_normal(value, mean @ self.weight[name].T + self.bias[name], scale)
        return total

    def conditional_evidence(
        self, target: Mapping[str, Float[Tensor, "B E"]], given: Mapping[str, Float[Tensor, "B E"]]
    ) -> Float[Tensor, " B"]:
        """log p(x_target | x_given) of each row, in nats: log p(both) - log p(given).

        Raises ValueError for a modality on both sides.
        """
        if both := sorted(set(target) & set(given)):
            raise ValueError(f"target and given: expected different modalities, got {both} in both")
        return self.evidence({**target, **given}) - self.evidence(given)

    def _shown(self, x: Mapping[str, Tensor], observed: Tensor | None) -> dict[str, tuple[Tensor, Tensor]]:
        """Each modality's data in float64, zeros where absent, beside its column of the mask (1.0 where present)."""
        if unknown := sorted(set(x) - set(self.weight)):
            raise ValueError(f"unknown modalities {unknown}; expected some of {list(self.weight)}")
        rows = len(next(iter(x.values())))
        mask = torch.ones(rows, len(x), dtype=torch.bool) if observed is None else observed.bool()
        return {name: (torch.where(there[:, None], x[name].double(), 0.0), there.double()) for name, there in zip(x, mask.T, strict=True)}


def parameters(*, modalities: int = 3, latent_dim: int = 2, event: int = 4, seed: int = 0) -> LinearGaussian:
    """The parameters of `linear_gaussian` of the same keywords: column lengths 1 to 2, biases N(0, 1), noise scales 0.5 to 1.

    Raises ValueError for fewer than two modalities, or an event too short for orthogonal columns.
    """
    if modalities < 2 or not 1 <= latent_dim <= event:
        raise ValueError(f"expected at least 2 modalities and 1 <= latent_dim <= event, got {modalities}, {latent_dim} and {event}")
    rng = generator(seed, "linear_gaussian/parameters")
    names = [f"x{number}" for number in range(modalities)]
    columns = {name: np.linalg.qr(rng.standard_normal((event, latent_dim)))[0] for name in names}
    weight = {name: torch.from_numpy(columns[name] * rng.uniform(1, 2, latent_dim)) for name in names}
    bias = {name: torch.from_numpy(rng.standard_normal(event)) for name in names}
    return LinearGaussian(weight, bias, {name: float(rng.uniform(0.5, 1)) for name in names})


def linear_gaussian(
    *, modalities: int = 3, rows: int = 2000, latent_dim: int = 2, event: int = 4, missing: float = 0.3, seed: int = 0
) -> Dataset:
    """Vectors `x0`, `x1`, ... [event]: `rows` to train, a share of `missing` entries absent, and a quarter as many, complete, to test.

    The rows are unlabelled. Both splits follow the seed, since it also draws the parameters. Raises ValueError as `parameters` does, for
    fewer than four rows, and for a share below 0 or above (N - 1) / N.
    """
    truth = parameters(modalities=modalities, latent_dim=latent_dim, event=event, seed=seed)
    check_missing(missing, modalities)
    if rows < TEST_SHARE:
        raise ValueError(f"rows: expected at least {TEST_SHARE}, got {rows}")

    def generate(split: str) -> Iterator[Row]:
        check_split(split)
        count, share = (rows, missing) if split == "train" else (rows // TEST_SHARE, 0.0)
        x = _draw(truth, count, generator(seed, f"linear_gaussian/{split}/rows"))
        observed = missing_at_random(count, modalities, share, generator(seed, f"linear_gaussian/{split}/missing"))
        return (
            Row({name: x[name][row] for name, there in zip(x, shown, strict=True) if there}, None) for row, shown in enumerate(observed)
        )

    field = Field(kind="vector", shape=(event,), codec="npy", likelihood="normal")
    keywords = {"modalities": modalities, "rows": rows, "latent_dim": latent_dim, "event": event, "missing": missing, "seed": seed}
    return Dataset("linear_gaussian", dict.fromkeys(truth.weight, field), generate, (), keywords)


def _draw(truth: LinearGaussian, count: int, rng: np.random.Generator) -> dict[str, Float[Tensor, "B E"]]:
    latent_dim = next(iter(truth.weight.values())).shape[1]
    z = torch.from_numpy(rng.standard_normal((count, latent_dim)))
    noise = {name: torch.from_numpy(rng.standard_normal((count, len(bias)))) for name, bias in truth.bias.items()}
    return {name: (z @ truth.weight[name].T + truth.bias[name] + truth.scale[name] * noise[name]).float() for name in truth.weight}


def _log_normal(x: Tensor, mean: Tensor | float, stddev: Tensor) -> Float[Tensor, " B"]:
    """log N(x; mean, stddev^2), summed over the event."""
    return (-0.5 * ((x - mean) / stddev).square() - stddev.log() - 0.5 * math.log(2 * math.pi)).sum(-1)
