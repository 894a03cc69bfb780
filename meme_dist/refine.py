"""Posterior refinement: Markov chains from q(z | x) towards p(z | x), for any objective and any pattern of missing modalities.

    log target(z) = log p(z) + sum over chosen m that the row holds of temper_m log p(x_m | z)

(Kuzina, Welling and Tomczak, NeurIPS 2022, who refine the code of an attacked image before it is used.) At temper 1 this is the model's
exact posterior; below 1 the modality is trusted less, as one that may have been tampered with. Weights of likelihoods that the training
used do not enter: to refine towards what was trained give them as temper. A modality left out of the target still has its say in where the
chains start. Chains move in the coordinates u = z / stddev of q, in which the target is of about unit scale: a step is as long as each
coordinate is uncertain.

A chosen modality with latents of its own is refined together with them: the chain is over (z, w_m, ...) with p(w_m) in the target.
"""

from collections.abc import Collection, Mapping
from typing import Any, Literal, NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from meme_dist.around import Around
from meme_dist.distributions import Posterior, wide
from meme_dist.mcmc import MALA, Kernel, LogDensity, Result, sample, start
from meme_dist.metrics.rows import device_of, evaluating, on_device
from meme_dist.noise import Noise
from meme_dist.objectives.base import Objective
from meme_dist.types import Batch

Start = Literal["sample", "mean"]
AT_ONCE = 2048  # chains whose activations are kept for a gradient at one time: those of a large training batch
MOMENTS = 16  # chains a row behind the mean and the standard deviation of refined draws


class Density(Protocol):
    """Whatever can stand in for the prior."""

    def log_prob(self, z: Float[Tensor, "K B D"]) -> Float[Tensor, "K B"]: ...


class Refined(NamedTuple):
    """The last state of every chain; `private` has the own latents of the chosen modalities that have some.

    `first`: where the chains started. `before` and `after`: the log target there and at z, in nats up to the same constant of each row.
    """

    z: Float[Tensor, "K B D"]
    first: Float[Tensor, "K B D"]
    private: Mapping[str, Float[Tensor, "K B Q"]]
    before: Float[Tensor, "K B"]
    after: Float[Tensor, "K B"]
    result: Result


def refine(
    objective: Objective,
    batch: Batch,
    *,
    kernel: Kernel = MALA,
    budget: int = 200,
    modalities: Collection[str] | None = None,
    temper: float | Mapping[str, float] = 1.0,
    prior: Density | None = None,
    first: Start = "sample",
    samples: int = 1,
    purpose: str = "refine",
) -> Refined:
    """`samples` chains for each row, from q(z | what it observes), of at most `budget` gradient evaluations each.

    `modalities`: whose likelihoods are in the target, by default all that `batch` has; `batch.only` takes one out of the start too.
    `temper`: one for all of them, or by name (1 where it has none). `prior`: instead of `objective.prior()`. `first`: where a chain starts,
    a draw of q or its mean. A row with none of the modalities is drawn towards the prior. The model is in evaluation mode meanwhile, and
    its parameters' gradients are untouched. Raises ValueError for unknown modalities and for a temper below 0.
    """
    batch = on_device(batch, device_of(objective))
    with evaluating(objective):
        noise = Noise(batch.seed, batch.draw)
        target = Target(objective, batch, list(batch.modalities) if modalities is None else modalities, temper, prior)
        point, scale = target.beginning(noise, purpose, samples, first)
        found = sample(target.scaled(scale), point / scale, kernel=kernel, budget=budget, noise=noise, purpose=purpose)
        before, shape = target(point), (samples, len(batch.draw))
    (began, _), (z, private) = (target.parts(x.unflatten(0, shape)) for x in (point, found.chain.z * scale))
    return Refined(z, began, private, before.view(shape), found.chain.log_density.view(shape), found)


class Target:
    """The log target as a function of all chains at once, [C, W] -> [C]: C = K B, laid out as [K, B], and W = D and own latents."""

    def __init__(
        self,
        objective: Objective,
        batch: Batch,
        modalities: Collection[str],
        temper: float | Mapping[str, float] = 1.0,
        prior: Density | None = None,
    ):
        if unknown := sorted(set(modalities) - set(batch.modalities)):
            raise ValueError(f"modalities: expected some of {list(batch.modalities)}, which the batch has, got {unknown}")
        self.objective, self.given = objective, batch
        self.batch = batch.only(*(name for name in batch.modalities if name in modalities))
        self.prior = objective.prior() if prior is None else prior
        self.sizes = {name: size for name in self.batch.modalities if (size := objective.modality(name).private_dim)}
        self.own = {name: objective.private_prior(name) for name in self.sizes}
        self.weight = _weights(objective, list(self.batch.modalities), temper)
        rows = max(1, len(batch.draw))
        self.at_once = rows * max(1, AT_ONCE // rows)

    def __call__(self, point: Float[Tensor, "C W"]) -> Float[Tensor, " C"]:
        """log p(z) + sum of log p(w_m) + sum of temper_m log p(x_m | z, w_m), in nats."""
        return torch.cat([self._value(piece) for piece in point.split(self.at_once)])

    def _value(self, point: Float[Tensor, "C W"]) -> Float[Tensor, " C"]:
        z, private = self.parts(point.unflatten(0, (-1, len(self.batch.draw))))
        total = self.prior.log_prob(z)
        for name, w in private.items():
            total = total + self.own[name].log_prob(w)
        if self.weight:
            explained = self.objective.explanations(self.batch, z[None], private={name: w[None] for name, w in private.items()})[0]
            total = total + sum(weight * x for weight, x in zip(self.weight, explained, strict=True))
        return total.flatten()

    def scaled(self, scale: Float[Tensor, "C W"]) -> LogDensity:
        """The same in the coordinates point / scale, with gradients, `at_once` chains at a time. A row's chains have one scale."""
        return lambda point: _InPieces.apply(point, lambda piece: self._value(piece * scale[: len(piece)]), self.at_once)

    def parts(self, point: Float[Tensor, "K B W"]) -> tuple[Float[Tensor, "K B D"], dict[str, Float[Tensor, "K B Q"]]]:
        """The shared latents, and each chosen modality's own."""
        z, *private = point.split([self.objective.latent_dim, *self.sizes.values()], -1)
        return z, dict(zip(self.sizes, private, strict=True))

    def beginning(self, noise: Noise, purpose: str, samples: int, first: Start) -> tuple[Float[Tensor, "C W"], Float[Tensor, "C W"]]:
        """Draws of q (or its mean), and its standard deviations."""
        rows = len(self.batch.draw)
        posteriors: list[tuple[str, Posterior]] = [("z", self.objective.infer(self.given))]
        posteriors += [(name, self.objective.private_posterior(name, rows, self.batch)) for name in self.sizes]
        points = [_first(q, noise, f"{purpose}/start/{name}", samples, first) for name, q in posteriors]
        scales = [wide(q.stddev).expand(samples, *q.stddev.shape) for _, q in posteriors]
        return torch.cat(points, -1).flatten(0, 1), torch.cat(scales, -1).flatten(0, 1)


class _InPieces(torch.autograd.Function):
    """A log density whose gradient is taken at once, piece by piece: many chains through a large decoder need no more room than few."""

    @staticmethod
    def forward(ctx: Any, point: Tensor, log_density: LogDensity, size: int) -> Tensor:
        pieces = [start(piece, log_density) for piece in point.split(size)]
        ctx.save_for_backward(torch.cat([piece.grad for piece in pieces]))
        return torch.cat([piece.log_density for piece in pieces])

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None]:
        return slopes[0][:, None] * ctx.saved_tensors[0], None, None


def _first(q: Posterior, noise: Noise, purpose: str, samples: int, first: Start) -> Float[Tensor, "K B D"]:
    return wide(q.sample(noise, purpose, samples) if first == "sample" else q.mean.expand(samples, *q.mean.shape))


def check_tempers(names: Collection[str], tempers: Mapping[str, float]) -> None:
    """Raise ValueError for tempers of other modalities than `names`, and for numbers below 0."""
    if unknown := sorted(set(tempers) - set(names)):
        raise ValueError(f"temper: expected some of {list(names)}, whose likelihoods are in the target, got {unknown}")
    if bad := {name: value for name, value in tempers.items() if not value >= 0}:
        raise ValueError(f"temper: expected numbers of at least 0, got {bad}")


def _weights(objective: Objective, names: list[str], temper: float | Mapping[str, float]) -> list[float]:
    """What multiplies each modality's weighted log-likelihood, so that its own weight drops out.

    Raises ValueError for a modality whose weight is 0: its decoder was not trained, so nothing is known of its likelihood.
    """
    tempers = temper if isinstance(temper, Mapping) else dict.fromkeys(names, temper)
    check_tempers(names, tempers)
    if untrained := [name for name in names if not objective.modality(name).weight]:
        raise ValueError(f"{', '.join(untrained)}: trained with weight 0, so its likelihood cannot refine; leave it out of modalities")
    return [tempers.get(name, 1.0) / objective.modality(name).weight for name in names]


# ---- a model whose every inference is refined ---------------------------------------------------------------------------------------


class Refining(Around):
    """`objective` whose `infer` is refined before it is used: any metric, and `impute`, of what the chains find.

    Everything else (networks, prior, loss) is its own. What `infer` returns draws by running chains, a chain a draw.
    """

    def __init__(self, objective: Objective, *, kernel: Kernel = MALA, budget: int = 200, temper: float | Mapping[str, float] = 1.0):
        super().__init__(objective)
        if isinstance(temper, Mapping):
            check_tempers(list(objective.modalities), temper)
        self.kernel, self.budget, self.temper = kernel, budget, temper

    def infer(self, batch: Batch) -> "Walked":
        """Draws of what each row observes, refined."""
        return Walked(self, batch)


class Walked(NamedTuple):
    """The law of the last states of chains: it can be drawn from, but has no density that is known."""

    model: Refining
    batch: Batch

    def sample(self, noise: Noise, purpose: str, num: int) -> Float[Tensor, "num B D"]:
        """A chain for each draw, with the batch's noise under that purpose."""
        model, batch = self.model, self.batch._replace(seed=noise.seed, draw=noise.draw)
        temper = model.temper
        if isinstance(temper, Mapping):
            temper = {name: value for name, value in temper.items() if name in batch.modalities}
        return refine(model.objective, batch, kernel=model.kernel, budget=model.budget, temper=temper, samples=num, purpose=purpose).z

    @property
    def mean(self) -> Float[Tensor, "B D"]:
        """Mean of 16 draws."""
        return self._moments()[1]

    @property
    def stddev(self) -> Float[Tensor, "B D"]:
        """Standard deviation of 16 draws."""
        return self._moments()[0]

    def log_prob(self, z: Float[Tensor, "K B D"]) -> Float[Tensor, "K B"]:
        """Raises ValueError: the law of a chain's last state has no density that can be computed."""
        raise ValueError("refined draws have no density: measure likelihoods with the model's own posterior")

    def _moments(self) -> tuple[Tensor, Tensor]:
        draws = self.sample(Noise(self.batch.seed, self.batch.draw), "moments", MOMENTS)
        deviation, mean = torch.std_mean(draws, 0)
        return deviation, mean


def log_joint(objective: Objective, batch: Batch, z: Float[Tensor, "K B D"]) -> Float[Tensor, "K B"]:
    """log p(x, z) in nats of what each row observes, at untempered likelihoods.

    Raises ValueError where a modality has latents of its own: then there is no such number without them.
    """
    if private := [name for name in batch.modalities if objective.modality(name).private_dim]:
        raise ValueError(f"{', '.join(private)}: latents of their own are part of the joint density; `refine` gives it as before and after")
    batch = on_device(batch, device_of(objective))
    with evaluating(objective):
        return Target(objective, batch, list(batch.modalities))(z.flatten(0, 1)).view(z.shape[:2])
