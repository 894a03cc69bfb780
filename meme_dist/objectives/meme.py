"""MEME: mutual supervision of N modalities from partly observed rows (Joy, Shi, Torr, Rainforth, Schmon, Siddharth, ICLR 2022).

One direction, source i with samples z[i, k] ~ q_i(z | x_i), targets T = the other modalities that the row holds (eq. 1, 6, 8, app. D):

    t[k]           = sum_{j in T} log p_j(x_j | z[i, k])
    log q(x_T|x_i) = logsumexp_k t[k] - log K
    w[k]           = K softmax_k t[k], its gradient stopped (app. B)
    L_i            = (1/K) sum_k w[k] (A[i,i,k] + log p(z[i,k] | x_T) - Q[i,i,k] - t[k]) + c log q(x_T | x_i)

and with T empty (eq. 4)  L_i = (1/K) sum_k A[i,i,k] + log p_lambda(z[i,k]) - Q[i,i,k],  p_lambda the even mixture of the other modalities'
pseudo-input posteriors. A row's loss is -(1 / |observed|) sum_i L_i (eq. 2, 5, 11).

At c = 1 (`cross_weight`) and the sampled log-ratio, E[L_i] is at most the K-sample importance-weighted bound of log p(x_i | x_T) (insert
t = log(w/K) + logsumexp t and use Jensen), so it never exceeds the evidence for any K, and is tight where q_i(z|x_i) p(x_T|z) is
proportional to p(x_i|z) p(z|x_T) p(x_T|z). That value is reported as `bound` whatever is optimised.
"""

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from meme_dist.distributions import Components, Diagonal, Mixture, Posterior, divergence, mixture_of, product
from meme_dist.modality import Modality
from meme_dist.noise import Noise
from meme_dist.objectives.base import Objective, by_place, masked_sums, pairs, reconstruction_table
from meme_dist.priors import PseudoInputs, join
from meme_dist.types import Batch, Loss, Sums

Estimator = Literal["released", "rao_blackwell", "resampled"]
Combination = Literal["mixture", "product", "product_with_standard"]
LogRatio = Literal["closed_form", "sampled"]


class MEME(Objective):
    """Mutually supErvised Multimodal VAE for any N >= 2 and any non-empty pattern of present modalities.

    `estimator`: three estimators of one expected gradient (all with the gradient of w stopped).
      released       one sample carries the weighted term, all K the marginal: what the authors' code does.
      rao_blackwell  the weighted sum over all K samples: lowest variance, every decoder runs K times with gradients.
      resampled      one sample drawn from w / K carries everything: K decodings without gradients, one with.
    `combination`: p(z | x_T) of several targets, app. E: even mixture, or product of their posteriors (with or without a N(0, I) expert).
    `log_ratio`: the KL in closed form where p(z | x_T) is one expert or a product (the released code), else and with `sampled` the
      sample's log-ratio under w, which is the paper's bound.
    `cross_weight`: c. At 1 the gradient of the cross terms cancels exactly; the released code, and so its published numbers, use 10.
    `stop_gradient=False` keeps the gradient of w (the full estimator, eq. 7); not defined for `resampled`.
    """

    def __init__(
        self,
        modalities: Mapping[str, Modality],
        *,
        pseudo_inputs: int,
        samples: int = 11,
        estimator: Estimator = "resampled",
        cross_weight: float = 10.0,
        combination: Combination = "mixture",
        log_ratio: LogRatio = "closed_form",
        stop_gradient: bool = True,
    ):
        super().__init__(modalities)
        if samples < 1:
            raise ValueError(f"samples: expected at least 1, got {samples}")
        if estimator == "resampled" and not stop_gradient:
            raise ValueError("stop_gradient=False needs estimator 'released' or 'rao_blackwell': a resampled index has no gradient")
        self.samples, self.estimator, self.cross_weight = samples, estimator, cross_weight
        self.combination, self.log_ratio, self.stop_gradient = combination, log_ratio, stop_gradient
        self.pseudo = torch.nn.ModuleDict({name: PseudoInputs(pseudo_inputs, m.feature) for name, m in modalities.items()})

    def initialise(self, batch: Batch) -> None:
        """Take the pseudo-inputs from this batch's present rows, the same ones for the same batch and seed."""
        for name, packed in batch.modalities.items():
            features = self.modality(name).embed(packed.data[packed.row < len(batch.observed)])
            self._pseudo(name).initialise(features, torch.Generator().manual_seed(batch.seed))

    def infer(self, batch: Batch) -> Posterior:
        """q(z | what each row observes): the only posterior, or the combination of several. A row with nothing gets a standard density."""
        q = self.posteriors(batch)
        if len(batch.modalities) == 1:
            return type(q)(q.mean[0], q.scale[0])
        observed = batch.observed.T
        if self.combination == "mixture":
            return Mixture(q, observed)
        joint = product(q, observed[None], standard=self.combination == "product_with_standard")
        return type(joint)(joint.mean[0], joint.scale[0])

    def prior(self) -> Components:
        """The even mixture of every modality's pseudo-input posteriors."""
        return Components(join([self._pseudo(name).posterior(self.modality(name)) for name in self.modalities]))

    def forward(self, batch: Batch) -> Loss:
        """-(sum over rows and observed i of L_i / |observed|), with each modality's terms as means over the rows that hold it."""
        noise = Noise(batch.seed, batch.draw)
        q = self.posteriors(batch)
        z = torch.stack([_member(q, i).reparameterise(noise, name, self.samples) for i, name in enumerate(batch.modalities)])
        both = pairs(batch.observed)
        ratio = self._log_ratio(batch, q, z, both)
        estimate = {"released": self._released, "rao_blackwell": self._rao_blackwell, "resampled": self._resampled}[self.estimator]
        direction = estimate(batch, z, ratio, both)
        closed = self._closed_log_ratio(q, both)
        log_ratio = direction.log_ratio
        if closed is not None:
            log_ratio = torch.where(closed.exact, direction.weight * closed.value, log_ratio)
        objective = direction.fit + log_ratio + self.cross_weight * direction.marginal
        bound = direction.fit + direction.log_ratio + direction.marginal
        total = _row_mean(objective, batch.observed).sum()
        return Loss(self._touch(batch) - total, self._terms(batch, direction, log_ratio, bound, both))

    def _log_ratio(self, batch: Batch, q: Diagonal, z: Float[Tensor, "N K B D"], both: Tensor) -> Float[Tensor, "N K B"]:
        """log p(z[i, k] | x_T) - log q_i(z[i, k]); with T empty the pseudo-input prior takes the place of the conditional one."""
        if self.combination == "mixture":
            table = q.cross_log_prob(z)
            own = table.diagonal(dim1=0, dim2=1).permute(2, 0, 1)
            prior = mixture_of(table.transpose(0, 1), both.transpose(0, 1).unsqueeze(2))
        else:
            own = _member(q, slice(None), None).log_prob(z)
            prior = _member(self._product(q, both), slice(None), None).log_prob(z)
        if batch.single:
            alone = (batch.observed.T & ~both.any(1)).unsqueeze(1)
            prior = torch.where(alone, self._pseudo_log_prob(batch, z), prior)
        return prior - own

    def _pseudo_log_prob(self, batch: Batch, z: Float[Tensor, "N K B D"]) -> Float[Tensor, "N K B"]:
        """log p_lambda(z[i, k, b]) where row b holds i alone, 0 elsewhere: only those rows are worked on."""
        sources, samples, rows, _ = z.shape
        flat = by_place(z)
        points = flat[:, batch.alone]
        components = [Components(self._pseudo(name).posterior(self.modality(name))) for name in batch.modalities]
        table = torch.stack([c.log_prob(points) for c in components])  # [N, K, A]
        others = torch.arange(sources, device=z.device)[:, None] != (batch.alone // rows)[None]
        prior = mixture_of(table, others.unsqueeze(1))
        placed = prior.new_zeros(flat.shape[:2]).index_copy(1, batch.alone, prior)
        return placed[:, :-1].view(samples, sources, rows).transpose(0, 1)

    def _closed_log_ratio(self, q: Diagonal, both: Bool[Tensor, "N N B"]) -> "_Closed | None":
        """-KL(q_i || p(z | x_T)) and where it has a closed form: T is one expert, or the combination is a product."""
        if self.log_ratio == "sampled":
            return None
        if self.combination == "mixture":
            kl = torch.stack([divergence(q, _member(q, slice(j, j + 1))) for j in range(len(both))], 1)  # [i, j, b]
            return _Closed(-torch.where(both, kl, torch.zeros_like(kl)).sum(1), both.sum(1) == 1)
        return _Closed(-divergence(q, self._product(q, both)), both.any(1))

    def _pseudo(self, name: str) -> PseudoInputs:
        return cast(PseudoInputs, self.pseudo[name])

    @property
    def _by_name(self) -> dict[str, Modality]:
        return {name: self.modality(name) for name in self.modalities}

    def _product(self, q: Diagonal, mask: Bool[Tensor, "S N B"]) -> Diagonal:
        return product(q, mask, standard=self.combination == "product_with_standard")

    def _rao_blackwell(self, batch: Batch, z: Tensor, ratio: Tensor, both: Tensor) -> "_Direction":
        table = reconstruction_table(self._by_name, batch, z)
        own, cross = _split(table, both)
        weight = cross.softmax(1)
        weight = weight.detach() if self.stop_gradient else weight
        fit, log_ratio = (weight * (own - cross)).sum(1), (weight * ratio).sum(1)
        return _Direction(fit, log_ratio, torch.ones_like(fit), _log_mean_exp(cross), (weight * own).sum(1), _ess(cross))

    def _released(self, batch: Batch, z: Tensor, ratio: Tensor, both: Tensor) -> "_Direction":
        cross = _split(reconstruction_table(self._by_name, batch, z, own=False), both)[1]
        own = _split(reconstruction_table(self._by_name, batch, z[:, :1], cross=False), both)[0][:, 0]
        weight = self.samples * cross.softmax(1)[:, 0]
        weight = weight.detach() if self.stop_gradient else weight
        fit = weight * (own - cross[:, 0])
        return _Direction(fit, weight * ratio[:, 0], weight, _log_mean_exp(cross), own, _ess(cross))

    def _resampled(self, batch: Batch, z: Tensor, ratio: Tensor, both: Tensor) -> "_Direction":
        with torch.no_grad():
            cross = _split(reconstruction_table(self._by_name, batch, z, own=False), both)[1]
        chosen = self._resample(batch, cross)  # [N, 1, B]
        z = z.gather(1, chosen.unsqueeze(-1).expand(-1, -1, -1, z.shape[-1]))
        own, fresh = (x[:, 0] for x in _split(reconstruction_table(self._by_name, batch, z), both))
        picked = ratio.gather(1, chosen)[:, 0]
        log_ratio = torch.where(both.any(1), picked, ratio.mean(1))
        marginal = fresh + (_log_mean_exp(cross) - cross.gather(1, chosen)[:, 0])  # value log q(x_T|x_i), gradient that of t[k]
        return _Direction(own - fresh, log_ratio, torch.ones_like(own), marginal, own, _ess(cross))

    def _resample(self, batch: Batch, cross: Float[Tensor, "N K B"]) -> Tensor:
        """One index k ~ softmax_k t[i, k] for each source and row, [N, 1, B]."""
        noise = Noise(batch.seed, batch.draw)
        uniform = torch.stack([noise.uniform(f"{name}/resample", 1, 1)[..., 0] for name in batch.modalities])
        edges = cross.softmax(1).cumsum(1)
        return (uniform * edges[:, -1:] > edges).sum(1, keepdim=True).clamp(max=cross.shape[1] - 1)

    def _touch(self, batch: Batch) -> Tensor:
        """Zero, with a (zero) gradient for pseudo-inputs and their scales when no row can need them: every parameter takes part."""
        idle = [] if batch.single else [self._pseudo(name).inputs for name in self.pseudo]
        return sum((0.0 * p.sum() for p in idle), start=torch.zeros((), device=batch.observed.device))

    def _terms(self, batch: Batch, direction: "_Direction", log_ratio: Tensor, bound: Tensor, both: Tensor) -> Mapping[str, Sums]:
        observed, paired = batch.observed.T, both.any(1)
        held = batch.observed.any(1)
        terms = {"bound": Sums(*masked_sums(_row_mean(bound, batch.observed), held))}
        kinds = {
            "bound": (bound, observed),
            "reconstruction": (direction.own, observed),
            "kl": (-log_ratio, observed),
            "cross": (direction.marginal, paired),
            "ess": (direction.ess, paired),
        }
        for kind, (values, mask) in kinds.items():
            total, count = masked_sums(values, mask)
            terms |= {f"{kind}/{name}": Sums(total[i], count[i]) for i, name in enumerate(batch.modalities)}
        return terms


class _Closed(NamedTuple):
    value: Float[Tensor, "N B"]
    exact: Bool[Tensor, "N B"]


class _Direction(NamedTuple):
    """One estimator's parts of every L_i: L = fit + log-ratio + c * marginal."""

    fit: Float[Tensor, "N B"]  # E_w[A_ii - t]
    log_ratio: Float[Tensor, "N B"]  # E_w[log p(z|x_T) - log q_i(z)], sampled
    weight: Float[Tensor, "N B"]  # what multiplies a closed-form log-ratio
    marginal: Float[Tensor, "N B"]  # log q(x_T | x_i)
    own: Float[Tensor, "N B"]
    ess: Float[Tensor, "N B"]


def _member(q: Diagonal, *index) -> Diagonal:
    return type(q)(q.mean[index], q.scale[index])


def _split(table: Float[Tensor, "N N K B"], both: Bool[Tensor, "N N B"]) -> tuple[Float[Tensor, "N K B"], Float[Tensor, "N K B"]]:
    """A[i, i] and t[i] = sum of A[i, j] over the targets."""
    own = table.diagonal(dim1=0, dim2=1).permute(2, 0, 1)
    return own, torch.where(both.unsqueeze(2), table, torch.zeros_like(table)).sum(1)


def _log_mean_exp(cross: Float[Tensor, "N K B"]) -> Float[Tensor, "N B"]:
    return torch.logsumexp(cross, 1) - math.log(cross.shape[1])


def _ess(cross: Float[Tensor, "N K B"]) -> Float[Tensor, "N B"]:
    """Effective sample size 1 / sum_k (w_k / K)^2, between 1 and K."""
    return cross.detach().softmax(1).square().sum(1).reciprocal()


def _row_mean(values: Float[Tensor, "N B"], observed: Bool[Tensor, "B N"]) -> Float[Tensor, " B"]:
    """Mean over the modalities that the row holds; 0 for a row that holds none."""
    chosen = torch.where(observed.T, values, torch.zeros_like(values))
    return chosen.sum(0) / observed.sum(1).clamp(min=1)
