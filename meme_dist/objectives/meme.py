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

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from meme_dist.distributions import (
    Components,
    DiagNormal,
    Diagonal,
    Drawn,
    Posterior,
    divergence,
    meme_bound,
    mixture_of,
    pair_divergence,
    pool,
    product,
    resample,
    sample_table,
)
from meme_dist.modality import Encoding, Modality
from meme_dist.noise import Noise
from meme_dist.objectives.base import Objective, Private, by_place, explanation_table, pairs
from meme_dist.priors import PseudoInputs, join
from meme_dist.types import Batch, Loss, Sums

Estimator = Literal["released", "rao_blackwell", "resampled"]
Combination = Literal["mixture", "product", "product_with_standard"]
LogRatio = Literal["closed_form", "sampled"]
KINDS = ("bound", "reconstruction", "kl", "cross", "ess")  # as the kernel's metrics, with the log-ratio's sign turned


class MEME(Objective):
    """Mutually supErvised Multimodal VAE for any N >= 2 and any non-empty pattern of present modalities.

    `estimator`: three estimators of one expected gradient (all with the gradient of w stopped).
      released       one sample carries the weighted term, all K the marginal: what the authors' code does.
      rao_blackwell  the weighted sum over all K samples: lowest variance, every decoder runs K times with gradients.
      resampled      one sample drawn from w / K carries everything: K decodings without gradients, one with.
      With one sample, of weight 1, they are one and the same: it is decoded once, as `rao_blackwell` has it.
    `combination`: p(z | x_T) of several targets, app. E: even mixture, or product of their posteriors (with or without a N(0, I) expert).
    `inference`: how `infer` combines several observed modalities, by default as training does. Every posterior is trained to be the others'
      prior, so that those of a mixture may be multiplied afterwards without a further training (docs/results.md).
    `log_ratio`: the KL in closed form where p(z | x_T) is one expert or a product (the released code), else and with `sampled` the
      sample's log-ratio under w, which is the paper's bound.
    `cross_weight`: c. At 1 the gradient of the cross terms cancels exactly; the released code, and so its published numbers, use 10.
    Modalities may have latents of their own (`private_dim`): source i then explains itself with w_i ~ q_i(w_i | x_i) at the price of
    KL(q_i(w_i | x_i) || N(0, I)), and the others with draws of theirs from N(0, I), since it cannot know them. The bound stays one.
    `shared=False` is the ablation of weight sharing (section 3.2): each modality has a second encoder r_j that is p(z | x_j), for targets,
      pseudo-inputs and `infer`, and q_j only leads. It begins as a copy.
    `stop_gradient=False` keeps the gradient of w (the full estimator, eq. 7); not defined for `resampled`.
    `targets`: how many of the other modalities a source explains in one step, others in each row and visit; None: all. One sample (w = 1)
      is then all there may be, since L_i is linear in t there: with m of |T| targets t is estimated by (|T| / m) sum of theirs, without
      bias, and a row of n modalities costs n (1 + m) decodings instead of n^2 (so many also where it has fewer than m others). `bound`, in
      which t cancels, does not depend on it.
    """

    private_latents = True

    def __init__(
        self,
        modalities: Mapping[str, Modality],
        *,
        pseudo_inputs: int,
        samples: int = 11,
        estimator: Estimator = "resampled",
        cross_weight: float = 10.0,
        combination: Combination = "mixture",
        inference: Combination | None = None,
        log_ratio: LogRatio = "closed_form",
        stop_gradient: bool = True,
        shared: bool = True,
        targets: int | None = None,
    ):
        super().__init__(modalities)
        if samples < 1:
            raise ValueError(f"samples: expected at least 1, got {samples}")
        if estimator == "resampled" and samples > 1 and not stop_gradient:
            raise ValueError("stop_gradient=False needs estimator 'released' or 'rao_blackwell': a resampled index has no gradient")
        check_targets(targets, samples)
        self.samples, self.cross_weight, self.pseudo_inputs, self.targets = samples, cross_weight, pseudo_inputs, targets
        self.estimator: Estimator = estimator if samples > 1 else "rao_blackwell"
        self.combination, self.log_ratio, self.stop_gradient = combination, log_ratio, stop_gradient
        self.inference: Combination = inference or combination
        if self.family is not DiagNormal and {self.combination, self.inference} != {"mixture"}:
            raise ValueError(f"products need Normal posteriors, got {self.family.__name__}: take combination and inference 'mixture'")
        self.pseudo = torch.nn.ModuleDict({name: PseudoInputs(pseudo_inputs, m.feature) for name, m in modalities.items()})
        self.conditional = None if shared else torch.nn.ModuleDict({name: m.twin() for name, m in modalities.items()})

    def initialise(self, batch: Batch) -> None:
        """Take the pseudo-inputs from this batch's present rows, the same ones for the same batch and seed.

        Raises ValueError for a modality that none of them holds.
        """
        for name, packed in batch.modalities.items():
            data = packed.data[packed.row < len(batch.observed)]
            if len(data) == 0:
                raise ValueError(f"{name}: no training row holds it, and its pseudo-inputs are made of some; leave it out, or add rows")
            features = self.conditional_prior(name).embed(data)
            self._pseudo(name).initialise(features, torch.Generator().manual_seed(batch.seed))

    def conditional_prior(self, name: str) -> Encoding:
        """What gives p(z | x_j): the modality's own encoder, or its second one where they are not shared."""
        return cast(Encoding, self.modality(name) if self.conditional is None else self.conditional[name])

    def posteriors(self, batch: Batch) -> Diagonal:
        """p(z | x_j) for the batch's modalities, stacked [N, B, D]: their posteriors too, unless `shared=False`."""
        return self.split(self.encodings(batch, self.conditional_prior))[0]

    def infer(self, batch: Batch) -> Posterior:
        """q(z | what each row observes), pooled by `inference` (`distributions.pool`). A row with nothing gets a standard density."""
        return pool(self.posteriors(batch), batch.observed.T, self.inference)

    def prior(self) -> Components:
        """The even mixture of every modality's pseudo-input posteriors."""
        return Components(join(self._pseudo_posteriors(list(self.modalities))))

    def forward(self, batch: Batch) -> Loss:
        """-(sum over rows and observed i of L_i / |observed|), with each modality's terms as means over the rows that hold it."""
        (q, private), observed = self.split(self.encodings(batch)), batch.observed.T
        prior = q if self.conditional is None else self.posteriors(batch)
        z, density = sample_table(q, observed, Noise(batch.seed, batch.draw), list(batch.modalities), self.samples)
        if prior is not q:
            density = _supervised(density, prior, z, pairs(batch.observed))
        decode = {"released": self._released, "rao_blackwell": self._rao_blackwell, "resampled": self._resampled}[self.estimator]
        own, cross, drawn = decode(batch, z, self.private_samples(private, batch, self.samples, self._private_priors(batch)))
        if any(self.modality(name).private_dim for name in private):
            own = own - self._private_divergence(private).unsqueeze(1)
        bound = meme_bound(
            own,
            cross,
            density,
            observed,
            estimator=self.estimator,
            cross_weight=self.cross_weight,
            stop_gradient=self.stop_gradient,
            drawn=drawn,
            alone=self._pseudo_log_prob(batch, z) if batch.single else None,
            **self._log_ratio(q, prior, z, batch.observed),
        )
        return Loss(self._touch(batch) - bound.objective.sum(), self._terms(batch, bound.metrics))

    def _private_priors(self, batch: Batch) -> dict[str, Diagonal]:
        return {name: self.private_prior(name) for name in batch.modalities}

    def _private_divergence(self, private: Mapping[str, Diagonal]) -> Float[Tensor, "N B"]:
        """KL(q_i(w_i | x_i) || p(w_i)) of latents that a modality has for itself; 0 where it has none, and where it is absent."""
        return torch.stack([divergence(q, self.private_prior(name)) for name, q in private.items()])

    def _log_ratio(
        self, q: Diagonal, prior: Diagonal, z: Float[Tensor, "N K B D"], observed: Bool[Tensor, "B N"]
    ) -> dict[str, Tensor | None]:
        """What the bound needs of p(z | x_T) beside the table: a product's log density, and -KL where it has a closed form."""
        sampled = self.log_ratio == "sampled"
        if self.combination == "mixture":  # with one target the prior is one expert, with several it has no closed form
            divergences = pair_divergence(q, observed.T) if prior is q else _pair_divergence(q, prior, observed)
            return {"prior": None, "closed": None if sampled else -divergences}
        joint = product(prior, pairs(observed), standard=self.combination == "product_with_standard")
        density = _for_samples(joint).log_prob(z)
        return {"prior": density, "closed": None if sampled else -divergence(q, joint)}

    def _pseudo_log_prob(self, batch: Batch, z: Float[Tensor, "N K B D"]) -> Float[Tensor, "N K B"]:
        """log p_lambda(z[i, k, b]) where row b holds i alone, 0 elsewhere: only those rows are worked on."""
        sources, samples, rows, _ = z.shape
        flat = by_place(z)
        points = flat[:, batch.alone]
        components = self._pseudo_posteriors(list(batch.modalities))
        table = torch.stack([Components(q).log_prob(points) for q in components])  # [N, K, A]
        others = torch.arange(sources, device=z.device)[:, None] != (batch.alone // rows)[None]
        prior = mixture_of(table, others.unsqueeze(1))
        placed = prior.new_zeros(flat.shape[:2]).index_copy(1, batch.alone, prior)
        return placed[:, :-1].view(samples, sources, rows).transpose(0, 1)

    def _pseudo(self, name: str) -> PseudoInputs:
        return cast(PseudoInputs, self.pseudo[name])

    def _pseudo_posteriors(self, names: Sequence[str]) -> list[Diagonal]:
        shapes = {name: [(self.pseudo_inputs, self.modality(name).latent_dim)] * 2 for name in names}
        encoded = self.each(shapes, lambda name, _: self._pseudo(name).posterior(self.conditional_prior(name)), None)
        return [self.family(mean[:, : self.latent_dim], scale[:, : self.latent_dim]) for mean, scale in encoded]

    def _rao_blackwell(self, batch: Batch, z: Tensor, private: Private) -> "_Decoded":
        count = self.targets_of(batch)
        table = self.reconstructions(batch, z, private=private) if count is None else self._drawn_targets(batch, z, private, count)
        return _Decoded(_own(table), table)

    def targets_of(self, batch: Batch) -> int | None:
        """How many targets each source explains; None: all. Nothing that a row's neighbours hold decides it: ranks would differ."""
        return None if self.targets is None or self.targets >= len(batch.modalities) - 1 else self.targets

    def _drawn_targets(self, batch: Batch, z: Float[Tensor, "N 1 B D"], private: Private, count: int) -> Float[Tensor, "N N 1 B"]:
        """The table with `count` targets of each source, weighted so that the whole one is its mean; 0 elsewhere off the diagonal."""
        rows, held = len(batch.observed), batch.observed.sum(1)
        source, there = _sources(batch, count)
        asked = {}
        for j, (name, packed) in enumerate(batch.modalities.items()):
            real = packed.row < rows
            row = torch.where(real, packed.row, 0)
            own, theirs = j * rows + row, source[:, j, row] * rows + row
            place = torch.where(torch.cat([real[None], real & there[:, row]]), torch.cat([own[None], theirs]), len(z) * rows)
            asked[name] = place.flatten(), torch.arange(len(row), device=row.device).repeat(1 + count)
        modalities = {name: self.modality(name) for name in batch.modalities}
        table = explanation_table(modalities, batch, z, asked, each=self.each, private=private)
        weight = (held - 1).clamp(min=1).to(table.dtype) / (held - 1).clamp(min=1, max=count)
        own = torch.eye(len(z), dtype=torch.bool, device=z.device)[..., None, None]
        return torch.where(own, table, weight * table)

    def _released(self, batch: Batch, z: Tensor, private: Private) -> "_Decoded":
        cross = self.reconstructions(batch, z, own=False, private=private)
        first = {name: own[:, :1] for name, own in private.items()}
        return _Decoded(_own(self.reconstructions(batch, z[:, :1], cross=False, private=first)), cross)

    def _resampled(self, batch: Batch, z: Tensor, private: Private) -> "_Decoded":
        with torch.no_grad():
            cross = self.reconstructions(batch, z, own=False, private=private)
        noise = Noise(batch.seed, batch.draw)
        uniform = torch.stack([noise.uniform(f"{name}/resample", 1, 1)[0, :, 0] for name in batch.modalities])
        drawn = resample(cross, batch.observed.T, uniform)
        place = drawn.index[:, None, :, None]
        z, *own = (x.gather(1, place.expand(-1, -1, -1, x.shape[-1])) for x in (z, *private.values()))
        table = self.reconstructions(batch, z, private=dict(zip(private, own, strict=True)))
        return _Decoded(_own(table), table, drawn)

    def _touch(self, batch: Batch) -> Tensor:
        """Zero, with a (zero) gradient for pseudo-inputs and their scales when no row can need them: every parameter takes part."""
        idle = [] if batch.single else [self._pseudo(name).inputs for name in self.pseudo]
        return sum((0.0 * p.sum() for p in idle), start=torch.zeros((), device=batch.observed.device))

    def _terms(self, batch: Batch, metrics: Float[Tensor, "kinds N B"]) -> Mapping[str, Sums]:
        held = batch.observed.sum(1)
        observed = batch.observed.T
        counts = [mask.sum(1).to(metrics.dtype) for mask in (observed, observed & (held > 1))]
        totals = list(metrics.sum(-1))
        totals[KINDS.index("kl")] = -totals[KINDS.index("kl")]  # metrics have the log-ratio
        terms = {"bound": Sums((metrics[0].sum(0) / held.clamp(min=1)).sum(), (held > 0).sum().to(metrics.dtype))}
        for kind, total, count in zip(KINDS, totals, [counts[0]] * 3 + [counts[1]] * 2, strict=True):
            terms |= {f"{kind}/{name}": Sums(total[i], count[i]) for i, name in enumerate(batch.modalities)}
        return terms


class _Decoded(NamedTuple):
    """What an estimator decodes: A[i, i], A (its diagonal unread), and what it drew."""

    own: Float[Tensor, "N K B"]
    cross: Float[Tensor, "N N K B"]
    drawn: Drawn | None = None


def _supervised(
    table: Float[Tensor, "N N K B"], prior: Diagonal, z: Float[Tensor, "N K B D"], both: Bool[Tensor, "N N B"]
) -> Float[Tensor, "N N K B"]:
    """The table of densities with those of other modalities' conditional priors off its diagonal."""
    experts = zip(prior.mean, prior.scale, strict=True)
    crossed = torch.stack([_for_samples(type(prior)(mean, scale)).log_prob(z) for mean, scale in experts], 1)
    crossed = torch.where(both.unsqueeze(2), crossed, 0.0)
    own = torch.eye(len(table), dtype=torch.bool, device=table.device)[..., None, None]
    return torch.where(own, table, crossed)


def _pair_divergence(q: Diagonal, prior: Diagonal, observed: Bool[Tensor, "B N"]) -> Float[Tensor, "N B"]:
    """KL(q_i || p_j) where row b holds i and j alone; a sum that the bound does not read where it holds more, 0 where less."""
    experts = zip(prior.mean, prior.scale, strict=True)
    every = torch.stack([divergence(q, type(q)(mean.expand_as(q.mean), scale.expand_as(q.scale))) for mean, scale in experts], 1)
    return torch.where(pairs(observed), every, 0.0).sum(1)


def _for_samples(density: Diagonal) -> Diagonal:
    """[..., B, D] -> [..., 1, B, D], to be asked about K samples."""
    return type(density)(density.mean.unsqueeze(-3), density.scale.unsqueeze(-3))


def check_targets(targets: int | None, samples: int) -> None:
    """Raise ValueError for a number of targets below 1, or beside several samples: their weights need all targets."""
    if targets is not None and (targets < 1 or samples > 1):
        raise ValueError(
            f"targets: expected at least 1, and samples=1 (the weights of several need all targets), got {targets} with {samples}"
        )


def _sources(batch: Batch, count: int) -> tuple[Int[Tensor, "count N B"], Bool[Tensor, "count B"]]:
    """Which of a row's other modalities explain each that it holds, and whether there are so many.

    Its n modalities in the order of their names stand in a circle, in which each explains those `s` to `s + count - 1` places on, past
    itself: s is uniform on 1 to n - 1, so that each pair is as likely, and every decoder has `count` sources a row.
    """
    names, held = sorted(batch.modalities), batch.observed.sum(1)
    ranks = [names.index(name) for name in batch.modalities]
    key = torch.stack([torch.where(batch.observed[:, n], rank, rank + len(names)) for n, rank in enumerate(ranks)], 1)
    circle = key.argsort(1)  # what a row holds, first
    others = (held - 1).clamp(min=1)
    uniform = Noise(batch.seed, batch.draw).uniform("/targets", 1, 1)[0, :, 0]  # a purpose that is no modality's name
    step = torch.arange(count, device=held.device)[:, None]
    shift = 1 + ((uniform * others).ceil().long() - 1 + step) % others  # [count, B]
    place = (circle.argsort(1) - shift[..., None]) % held.clamp(min=1)[:, None]
    return circle.expand(count, -1, -1).gather(2, place).mT, step < held - 1


def _own(table: Float[Tensor, "N N K B"]) -> Float[Tensor, "N K B"]:
    return table.diagonal(dim1=0, dim2=1).permute(2, 0, 1)
