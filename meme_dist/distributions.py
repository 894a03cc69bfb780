"""Posteriors and their divergences: the one door to the kernels, with float32 inside whatever autocast does outside.

A posterior is a value: diagonal parameters [..., B, D] with `mean`, `stddev`, `sample` and `log_prob`. Sums over D happen here, means over
samples and rows in an objective.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from meme_dist.noise import Noise
from meme_kernels import cross_log_prob as _cross
from meme_kernels import mixture_log_prob as _mixture
from meme_kernels import pairwise_w2 as _w2
from meme_kernels import product_divergence as _product_divergence
from meme_kernels import product_of_experts as _product
from meme_kernels.log_likelihood import log_likelihood
from meme_kernels.meme_bound import Drawn, meme_bound, resample
from meme_kernels.pair_divergence import pair_divergence as _pair_divergence
from meme_kernels.token_log_prob import token_log_prob


@runtime_checkable
class Posterior(Protocol):
    """What inference returns: a density over z for each of B rows."""

    @property
    def mean(self) -> Float[Tensor, "B D"]: ...
    @property
    def stddev(self) -> Float[Tensor, "B D"]: ...
    def sample(self, noise: Noise, purpose: str, num: int) -> Float[Tensor, "num B D"]: ...
    def log_prob(self, z: Float[Tensor, "K B D"]) -> Float[Tensor, "K B"]: ...


@runtime_checkable
class Prior(Protocol):
    """What new rows are generated from: one density over z, the same for every row."""

    def sample(self, noise: Noise, purpose: str, num: int) -> Float[Tensor, "num B D"]: ...
    def log_prob(self, z: Float[Tensor, "K B D"]) -> Float[Tensor, "K B"]: ...


class DiagNormal(NamedTuple):
    """Independent Normals: prod_d N(z_d; mean_d, scale_d^2)."""

    mean: Float[Tensor, "*rows D"]
    scale: Float[Tensor, "*rows D"]

    @property
    def stddev(self) -> Float[Tensor, "*rows D"]:
        """Standard deviation: the scale."""
        return self.scale

    def reparameterise(self, noise: Noise, purpose: str, num: int) -> Float[Tensor, "num *rows D"]:
        """mean + scale * eps, eps ~ N(0, 1); the gradient flows into both."""
        return self.mean + self.scale * noise.normal(purpose, num, self.mean.shape[-1]).to(self.mean.dtype)

    sample = reparameterise

    def log_prob(self, z: Float[Tensor, "*samples D"]) -> Float[Tensor, "*samples"]:
        """Log density, summed over D; broadcasts over leading axes."""
        return _cross.normal(z, self.mean, self.scale)

    def mixture_log_prob(self, z: Float[Tensor, "rows D"]) -> Float[Tensor, " rows"]:
        """log of the even mixture of these M components [M, D] at each z."""
        return _mixture.mixture_log_prob(z, self.mean, self.scale)

    def kl(self, other: "DiagNormal") -> Float[Tensor, "*rows"]:
        """KL(self || other) = sum_d log(s2/s1) + (s1^2 + (m1 - m2)^2) / (2 s2^2) - 1/2, in nats."""
        ratio = self.scale / other.scale
        shift = (self.mean - other.mean) / other.scale
        return ((ratio.square() + shift.square() - 1) / 2 - ratio.log()).sum(-1)


class DiagLaplace(NamedTuple):
    """Independent Laplaces: prod_d exp(-|z_d - mean_d| / scale_d) / (2 scale_d)."""

    mean: Float[Tensor, "*rows D"]
    scale: Float[Tensor, "*rows D"]

    @property
    def stddev(self) -> Float[Tensor, "*rows D"]:
        """Standard deviation: sqrt(2) scale."""
        return math.sqrt(2) * self.scale

    def reparameterise(self, noise: Noise, purpose: str, num: int) -> Float[Tensor, "num *rows D"]:
        """mean + scale * eps, eps ~ Laplace(0, 1); the gradient flows into both."""
        return self.mean + self.scale * noise.laplace(purpose, num, self.mean.shape[-1]).to(self.mean.dtype)

    sample = reparameterise

    def log_prob(self, z: Float[Tensor, "*samples D"]) -> Float[Tensor, "*samples"]:
        """Log density, summed over D; broadcasts over leading axes."""
        return _cross.laplace(z, self.mean, self.scale)

    def mixture_log_prob(self, z: Float[Tensor, "rows D"]) -> Float[Tensor, " rows"]:
        """log of the even mixture of these M components [M, D] at each z."""
        return _mixture.mixture_log_prob(z, self.mean, self.scale, family="laplace")

    def kl(self, other: "DiagLaplace") -> Float[Tensor, "*rows"]:
        """KL(self || other) = sum_d log(s2/s1) + (s1 exp(-|m1 - m2| / s1) + |m1 - m2|) / s2 - 1, in nats."""
        shift = (self.mean - other.mean).abs()
        expected = (self.scale * torch.exp(-shift / self.scale) + shift) / other.scale
        return (expected - 1 - (self.scale / other.scale).log()).sum(-1)


Diagonal = DiagNormal | DiagLaplace


class Mixture(NamedTuple):
    """For each row an even mixture over the experts that are there: `components` [N, B, D], `present` [N, B].

    Of all of them where none is (which are then to be standard ones).
    """

    components: Diagonal
    present: Bool[Tensor, "N B"]

    @property
    def mean(self) -> Float[Tensor, "B D"]:
        """Mean of the mixture."""
        return (self._weight()[..., None] * self.components.mean).sum(0)

    @property
    def stddev(self) -> Float[Tensor, "B D"]:
        """Standard deviation of the mixture, coordinate by coordinate (law of total variance)."""
        second = self.components.stddev.square() + (self.components.mean - self.mean).square()
        return (self._weight()[..., None] * second).sum(0).sqrt()

    def sample(self, noise: Noise, purpose: str, num: int) -> Float[Tensor, "num B D"]:
        """Draw an expert, then draw from it (not reparameterised over the choice)."""
        edges = self._weight().cumsum(0).unsqueeze(1)  # [N, 1, B]
        pick = (noise.uniform(f"{purpose}/expert", num, 1)[..., 0].to(edges.dtype) > edges).sum(0)
        pick = pick.clamp(max=len(self.present) - 1)[None, ..., None].expand(1, -1, -1, self.components.mean.shape[-1])
        experts = zip(self.components.mean, self.components.scale, strict=True)
        draws = [type(self.components)(m, s).reparameterise(noise, f"{purpose}/{n}", num) for n, (m, s) in enumerate(experts)]
        return torch.stack(draws).gather(0, pick)[0]

    def log_prob(self, z: Float[Tensor, "K B D"]) -> Float[Tensor, "K B"]:
        """log sum_n weight_n q_n(z)."""
        experts = zip(self.components.mean, self.components.scale, strict=True)
        table = torch.stack([type(self.components)(mean, scale).log_prob(z) for mean, scale in experts])  # [N, K, B]
        return mixture_of(table, self._members().unsqueeze(1))

    def _members(self) -> Bool[Tensor, "N B"]:
        return self.present | ~self.present.any(0)

    def _weight(self) -> Float[Tensor, "N B"]:
        members = self._members().to(self.components.mean.dtype)
        return members / members.sum(0)


class Components(NamedTuple):
    """One even mixture of M components [M, D], the same for every row: a pseudo-input prior."""

    components: Diagonal

    def sample(self, noise: Noise, purpose: str, num: int) -> Float[Tensor, "num B D"]:
        """One independent draw for each sample and row."""
        size = len(self.components.mean)
        pick = (noise.uniform(f"{purpose}/component", num, 1)[..., 0] * size).long().clamp(max=size - 1)
        chosen = type(self.components)(self.components.mean[pick], self.components.scale[pick])
        return chosen.reparameterise(noise, purpose, num)

    def log_prob(self, z: Float[Tensor, "K B D"]) -> Float[Tensor, "K B"]:
        """log (1/M) sum_m q_m(z)."""
        return self.components.mixture_log_prob(z.flatten(0, -2)).view(z.shape[:-1])


def divergence(q: Diagonal, p: Diagonal) -> Float[Tensor, "*rows"]:
    """KL(q || p) of two posteriors of one family, in nats. Raises ValueError for two families: they have no closed form here."""
    if isinstance(q, DiagNormal) and isinstance(p, DiagNormal):
        return q.kl(p)
    if isinstance(q, DiagLaplace) and isinstance(p, DiagLaplace):
        return q.kl(p)
    raise ValueError(f"a closed-form KL needs one family, got {type(q).__name__} and {type(p).__name__}; use log_ratio='sampled'")


def sample_table(
    q: Diagonal, observed: Bool[Tensor, "N B"], noise: Noise, purposes: Sequence[str], num: int, *, path_gradient: bool = False
) -> tuple[Float[Tensor, "N {num} B D"], Float[Tensor, "N N {num} B"]]:
    """Samples z[i, k, b] of the stacked posteriors [N, B, D], and every sample under every posterior: Q[i, j, k, b] = log q_j(z[i, k, b]).

    0 where row b does not hold i, or not both; the noise is that of `reparameterise` with these purposes, one a posterior.
    `path_gradient` holds the densities' parameters fixed: Q has a gradient to z alone.
    """
    counter = _cross.Counter(noise.draw, noise.keys(purposes), num)
    return _cross.cross_log_prob(q.mean, q.scale, observed, counter, family=_family(q), path_gradient=path_gradient)


def _family(q: Diagonal) -> Literal["normal", "laplace"]:
    """Its name in the kernels."""
    return "laplace" if isinstance(q, DiagLaplace) else "normal"


def pair_divergence(q: Diagonal, observed: Bool[Tensor, "N B"]) -> Float[Tensor, "N B"]:
    """KL(q_i || q_j) in nats where row b holds i and j alone, 0 elsewhere; q stacked [N, B, D]."""
    return _pair_divergence(q.mean, q.scale, observed, family=_family(q))


def mixture_of(table: Float[Tensor, "N *rows"], present: Bool[Tensor, "N *mask"]) -> Float[Tensor, "*rows"]:
    """log of the even mixture over the present entries of a table of log densities; 0 where none is present.

    Selects on safe inputs: an absent entry reaches neither the value nor the gradient, whatever it holds.
    """
    count = present.sum(0)
    filled = torch.where(present | (count == 0), table, -torch.inf)
    mixed = torch.logsumexp(torch.where(count == 0, torch.zeros_like(filled), filled), 0) - count.clamp(min=1).to(table.dtype).log()
    return torch.where(count == 0, torch.zeros_like(mixed), mixed)


def product(experts: Diagonal, mask: Bool[Tensor, "S N B"], *, standard: bool = False) -> DiagNormal:
    """Products of the stacked Normal experts [N, B, D], one for each of S masks; `standard` adds a N(0, I) expert.

    Raises ValueError for Laplace experts: their product is not a Laplace and has no closed form here (use the mixture).
    """
    if not isinstance(experts, DiagNormal):
        raise ValueError(f"a product of experts needs Normal posteriors, got {type(experts).__name__}; use combination='mixture'")
    return DiagNormal(*_product.product_of_experts(experts.mean, experts.scale, mask, standard=standard))


def wide(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """At least float32: what autocast made bf16 or fp16 widens before any density; float64 stays."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def pairwise_w2(a: Diagonal, b: Diagonal) -> Float[Tensor, "S T"]:
    """Squared 2-Wasserstein distances of diagonal Normals (for Laplaces: of the Normals with their means and variances)."""
    return _w2.pairwise_w2(a.mean, a.stddev, b.mean, b.stddev)


# ---- mixtures and products over subsets of experts --------------------------------------------------------------------------------------

TABLE = 2**24  # numbers that a density of a mixture holds at once: 64 MiB in float32


class WeightedMixture(NamedTuple):
    """For each row a mixture of S components [S, B, D] whose weights sum to 1: `log_weight` [S, B], -inf for what the row has not."""

    components: Diagonal
    log_weight: Float[Tensor, "S B"]

    @property
    def mean(self) -> Float[Tensor, "B D"]:
        """Mean of the mixture."""
        return (self.log_weight.exp()[..., None] * self.components.mean).sum(0)

    @property
    def stddev(self) -> Float[Tensor, "B D"]:
        """Standard deviation of the mixture, coordinate by coordinate (law of total variance)."""
        second = self.components.stddev.square() + (self.components.mean - self.mean).square()
        return (self.log_weight.exp()[..., None] * second).sum(0).sqrt()

    def sample(self, noise: Noise, purpose: str, num: int) -> Float[Tensor, "num B D"]:
        """Draw a component, then draw from it (not reparameterised over the choice)."""
        edges = self.log_weight.exp().cumsum(0)[:, None]  # [S, 1, B]
        uniform = noise.uniform(f"{purpose}/component", num, 1)[..., 0].to(edges.dtype)
        pick = (uniform * edges[-1] > edges).sum(0).clamp(max=len(edges) - 1)[..., None].expand(-1, -1, self.components.mean.shape[-1])
        chosen = type(self.components)(self.components.mean.gather(0, pick), self.components.scale.gather(0, pick))
        return chosen.reparameterise(noise, purpose, num)

    def log_prob(self, z: Float[Tensor, "K B D"]) -> Float[Tensor, "K B"]:
        """log sum_s weight_s q_s(z), some components at a time: [S, K, B, D] is not held beyond `TABLE` numbers."""
        step, (mean, scale) = max(1, TABLE // max(1, z.numel())), self.components
        parts = zip(mean[:, None].split(step), scale[:, None].split(step), strict=True)
        table = torch.cat([type(self.components)(m, s).log_prob(z.expand(len(m), *z.shape)) for m, s in parts])
        return torch.logsumexp(table + self.log_weight[:, None], 0)


def even_mixture(components: Diagonal, present: Bool[Tensor, "S B"]) -> WeightedMixture:
    """The even mixture over each row's present components; over all of them where a row has none (which are then to be standard ones)."""
    some = torch.where(present.any(0), present, True)
    count = some.sum(0).to(components.mean.dtype)
    return WeightedMixture(components, torch.where(some, -count.log(), -torch.inf))


def product_divergence(experts: Diagonal, mask: Bool[Tensor, "S *rows"], *, standard: bool) -> tuple[DiagNormal, Float[Tensor, "S B"]]:
    """Products of the stacked Normal experts [N, B, D], one for each of S masks [S, N] or [S, N, B], and KL(product || N(0, I)) in nats.

    An empty product counts as N(0, I). Raises ValueError for Laplace experts, as `product` does.
    """
    mean, scale = _normal(experts)
    joint, deviation, kl = _product_divergence.product_divergence(mean, scale, mask, standard=standard)
    return DiagNormal(joint, deviation), kl


def expert_divergence(experts: Diagonal, mask: Bool[Tensor, "S N B"]) -> tuple[DiagNormal, Float[Tensor, "S N B"]]:
    """As `product_divergence` without a standard expert, with KL(product || expert n) instead: 0 for experts outside the mask."""
    mean, scale = _normal(experts)
    joint, deviation, kl = _product_divergence.product_divergence(mean, scale, mask, standard=False, against="experts")
    return DiagNormal(joint, deviation), kl


def _normal(experts: Diagonal) -> DiagNormal:
    if not isinstance(experts, DiagNormal):
        raise ValueError(f"a product of experts needs Normal posteriors, got {type(experts).__name__}: only theirs has a closed form")
    return experts


Pool = Literal["mixture", "product", "product_with_standard", "holder"]


def pool(q: Diagonal, observed: Bool[Tensor, "N B"], rule: Pool) -> Posterior:
    """What the posteriors [N, B, D] of each row's observed modalities say together; a standard density of a row with none.

    A row with one of them gets that one (by product_with_standard times N(0, I)), whatever columns stand beside it.
    """
    if len(q.mean) == 1 and rule != "product_with_standard":
        return type(q)(q.mean[0], q.scale[0])
    match rule:
        case "mixture":
            return Mixture(q, observed)
        case "holder":
            return holder_pool(q, observed)
        case _:
            joint = product(q, observed[None], standard=rule == "product_with_standard")
            return DiagNormal(joint.mean[0], joint.scale[0])


def holder_pool(experts: Diagonal, observed: Bool[Tensor, "N B"]) -> WeightedMixture:
    """Hoelder pooling at alpha = 1/2 of each row's observed Normal experts [N, B, D], exactly, with even weights of the experts:

        q(z) ~ (sum_i sqrt q_i)^2 = sum_i q_i + 2 sum_{i<j} sqrt(q_i q_j),    sqrt(q_i q_j) = BC_ij N(m_ij, s_ij^2)
        1 / s_ij^2 = (1 / s_i^2 + 1 / s_j^2) / 2,    m_ij = (m_i s_j^2 + m_j s_i^2) / (s_i^2 + s_j^2)
        log BC_ij  = sum_d  1/2 log (2 s_i s_j / (s_i^2 + s_j^2)) - (m_i - m_j)^2 / (4 (s_i^2 + s_j^2))

    Its N (N + 1) / 2 components come in the order of `pairs_of`: weight 1 for i = j and 2 BC_ij for i < j, divided by their sum. BC_ij is
    the Bhattacharyya coefficient: 1 where experts agree, 0 where they do not overlap, and then the pool is their even mixture. A row that
    observes nothing pools all its experts (which are then to be standard ones). Raises ValueError for Laplace experts.
    """
    mean, scale = _normal(experts)
    i, j = pairs_of(len(mean), mean.device)
    sum_of_squares = scale[i].square() + scale[j].square()
    shift = mean[j] - mean[i]
    components = DiagNormal(
        mean[i] + shift * scale[i].square() / sum_of_squares,  # exactly mean[i] for i = j
        scale[i] * scale[j] * (2 / sum_of_squares).sqrt(),
    )
    overlap = ((2 * scale[i] * scale[j] / sum_of_squares).log() / 2 - shift.square() / (4 * sum_of_squares)).sum(-1)
    some = torch.where(observed.any(0), observed, True)
    weight = torch.where(some[i] & some[j], overlap + (i != j)[:, None] * math.log(2), -torch.inf)
    return WeightedMixture(components, weight.log_softmax(0))


def pairs_of(count: int, device: torch.device) -> tuple[Int[Tensor, " C"], Int[Tensor, " C"]]:
    """The pairs i <= j below `count`, C = count (count + 1) / 2 of them, row by row."""
    i, j = torch.triu_indices(count, count, device=device)
    return i, j


__all__ = [
    "Components",
    "DiagLaplace",
    "DiagNormal",
    "Diagonal",
    "Drawn",
    "Mixture",
    "Posterior",
    "WeightedMixture",
    "divergence",
    "even_mixture",
    "expert_divergence",
    "holder_pool",
    "log_likelihood",
    "meme_bound",
    "mixture_of",
    "pair_divergence",
    "pairs_of",
    "pairwise_w2",
    "product",
    "product_divergence",
    "resample",
    "sample_table",
    "token_log_prob",
    "wide",
]
