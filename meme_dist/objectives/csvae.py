"""CSVAE: a block of the latents for each attribute, and the rest made independent of all of them (Klys, Snell and Zemel, NeurIPS 2018).

    p(x, y, z, w)  = p(z) prod_k p(y_k) p(w_k | y_k) prod_i p_i(x_i | z, w),      p(z) = N(0, I)
    q(z, w | x)    = prod_{i in A} q_i(z, w | x_i) / Z,      A a random subset of what the row observes

    loss = -E_q[ sum_{i observed} log p_i(x_i | z, w) ] + beta KL(q(z | x) || p(z))
           + sum_{k known}   block_weight KL(q(w_k | x) || p(w_k | y_k)) - log p(y_k) - (label weight - 1) E_q[ log p(y_k | w_k) ]
           + sum_{k unknown} block_weight E_q[ log q(w_k | x) - log p(w_k) ],       p(w_k) = sum_v p(v) p(w_k | v)
           + independence of z from y_k

An attribute is a modality (`meme_dist.modalities.attribute`) whose encoder is p(w_k | y_k): MEME's idea that an encoder is a conditional
prior. Its decoder is that encoder read by Bayes' rule, and the two lines above are then one: KL(q || p(w | y)) - log p(y) equals
KL(q || p(w)) - E_q[ log p(y | w) ]. So a label that a row lacks is a missing modality like any other: its term goes, which is to
marginalise over y, and it is inferred by p(y | w) at w ~ q(w | x).

What differs from the paper: q(w | x) does not see y (else w cannot be inferred where y is unknown); p(w | y) is learned, not fixed; the
adversary stands in the one loss (`meme_dist.objectives.independence`). The encoder of z is to make the adversary wrong ("reversal", Ganin
and Lempitsky 2015), or unsure ("entropy", the paper's M2: KL(d(y | z) || p(y)), their negative entropy where labels are even, and no wish
for even guesses where they are not).
With weights 1 and without the term of independence it is the ELBO of log p(x, y) of what a row observes; that value is reported as `bound`.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from meme_dist.distributions import Components, DiagNormal, Posterior, WeightedMixture, divergence, product
from meme_dist.modalities.attribute import Attribute, attributes_of
from meme_dist.modality import Modality, softplus_scale
from meme_dist.noise import Noise
from meme_dist.objectives.base import Objective, Work, unpack
from meme_dist.objectives.independence import Adversary, hsic
from meme_dist.objectives.parts import needs_normal, random_subsets
from meme_dist.priors import Standard
from meme_dist.types import Batch, Loss, Sums

Independence = Literal["reversal", "entropy", "hsic"]
BLOCK = 64  # consecutive rows of a step among which HSIC compares: whole on every rank whose share of the rows is a multiple of it


class Blocks(NamedTuple):
    """Independent blocks of the latents, one after the other, each a mixture [S, B, P] (B may be 1: the same for every row)."""

    parts: tuple[WeightedMixture, ...]

    @property
    def mean(self) -> Float[Tensor, "B D"]:
        """Mean of each block."""
        return torch.cat([part.mean for part in self.parts], -1)

    @property
    def stddev(self) -> Float[Tensor, "B D"]:
        """Standard deviation, coordinate by coordinate."""
        return torch.cat([part.stddev for part in self.parts], -1)

    def sample(self, noise: Noise, purpose: str, num: int) -> Float[Tensor, "num B D"]:
        """Each block's own draws."""
        parts = [_for_rows(part, len(noise.draw)) for part in self.parts]
        return torch.cat([part.sample(noise, f"{purpose}/block {place}", num) for place, part in enumerate(parts)], -1)

    def log_prob(self, z: Float[Tensor, "K B D"]) -> Float[Tensor, "K B"]:
        """The sum of the blocks' log densities."""
        pieces = z.split([part.components.mean.shape[-1] for part in self.parts], -1)
        each = [_for_rows(part, z.shape[1]).log_prob(piece) for part, piece in zip(self.parts, pieces, strict=True)]
        return torch.stack(each).sum(0)


def _for_rows(part: WeightedMixture, rows: int) -> WeightedMixture:
    mean, scale = (x.expand(-1, rows, -1) for x in part.components)
    return WeightedMixture(DiagNormal(mean, scale), part.log_weight.expand(-1, rows))


class _Told(NamedTuple):
    """What an attribute says in a batch: each row's label (a share for each value, zeros where unknown), p(w | y) and log p(y)."""

    label: Float[Tensor, "B V"]
    prior: DiagNormal  # [V, P]
    log_frequency: Float[Tensor, " V"]

    def marginal(self, rows: int) -> WeightedMixture:
        """p(w) for as many rows."""
        mean, scale = (x[:, None].expand(-1, rows, -1) for x in self.prior)
        return WeightedMixture(DiagNormal(mean, scale), self.log_frequency[:, None].expand(-1, rows))

    def joint(self, w: Float[Tensor, "B P"]) -> Float[Tensor, "B V"]:
        """log p(y) + log p(w | y) of every value."""
        return self.log_frequency + self.prior.log_prob(w[:, None].expand(-1, len(self.log_frequency), -1))


class _Block(NamedTuple):
    """An attribute's part of each row's bound [B]; 0 where it has none."""

    kl: Tensor
    frequency: Tensor  # log p(y)
    label: Tensor  # log p(y | w)
    hit: Tensor  # whether the most probable y at w is the label
    there: Tensor  # whether the row has both a label and an x


class CSVAE(Objective):
    """Conditional subspace VAE for one modality or more beside any number of attributes, with any pattern of missing ones of either.

    The latents are z first, then the attributes' blocks, in any order that leaves no gap; every modality's latent size is that of all.
    `beta`: weight of KL(q(z | x) || p(z)).
    `block_weight`: weight of the blocks' KL: what a block may know of x beyond its label costs this much a nat.
    `independence`: how z is kept from knowing the labels. `independence_weight` 0 leaves it to the conditional prior alone (the control).
      reversal  log d(y | z) of an adversary d that reads z, which learns to raise what the encoder of z learns to lower.
      entropy   KL(d(y | z) || p(y)) of such an adversary; in rows without the label too.
      hsic      n HSIC(z, y) over blocks of 64 rows with a known label.
    An attribute's `weight` is that of its label: log p(y | w) counts that often.
    Raises ValueError for posteriors that are not Normal, and blocks that overlap or leave a gap.
    """

    def __init__(
        self,
        modalities: Mapping[str, Modality],
        *,
        beta: float = 1.0,
        block_weight: float = 10.0,
        independence: Independence = "reversal",
        independence_weight: float = 10.0,
    ):
        super().__init__(modalities)
        needs_normal(self)
        self.beta, self.block_weight, self.independence_weight = beta, block_weight, independence_weight
        self.independence: Independence = independence
        self.attributes = list(attributes_of(modalities))
        if scaled := [name for name in self.attributes if self.attribute(name).to_scale is not softplus_scale]:
            raise ValueError(f"{', '.join(scaled)}: attributes have free scales; leave scales at softplus")
        self.observed = [name for name in modalities if name not in self.attributes]
        if not self.observed:
            raise ValueError(f"CSVAE needs a modality that is no attribute, got {list(modalities)}")
        self.free = self._free()
        self.standard = Standard(self.free, DiagNormal)
        watched = self.attributes if independence != "hsic" and independence_weight else []
        self.adversaries = nn.ModuleDict({name: Adversary(self.free, self.attribute(name).values) for name in watched})

    def _free(self) -> int:
        """How many latents are no attribute's: the first ones."""
        blocks = sorted((self.attribute(name).block for name in self.attributes), key=lambda block: block.start)
        free = blocks[0].start if blocks else self.latent_dim
        ends = [free, *(block.stop for block in blocks)]
        if free < 1 or [block.start for block in blocks] != ends[:-1] or ends[-1] != self.latent_dim:
            raise ValueError(f"expected z, then blocks without a gap up to latent {self.latent_dim}, got blocks {blocks}")
        return free

    def attribute(self, name: str) -> Attribute:
        """The attribute of that name."""
        return cast(Attribute, self.modalities[name])

    def blocks(self) -> list[str]:
        """The attributes in the order of their latents."""
        return sorted(self.attributes, key=lambda name: self.attribute(name).block.start)

    def initialise(self, batch: Batch) -> None:
        """Take the attributes' frequencies from the batch."""
        for name in self.attributes:
            packed = batch.modalities[name]
            self.attribute(name).initialise(packed.data[packed.row < len(batch.observed)])

    def prior(self) -> Components | Blocks:
        """N(0, I), then each block's mixture over the values of its attribute."""
        return self.given({}) if self.attributes else self.standard.components()

    def given(self, values: Mapping[str, int]) -> Blocks:
        """The prior where these attributes have these values."""
        density = self.standard.density()
        parts = [_lone(DiagNormal(density.mean[None], density.scale[None]))]
        for name in self.blocks():
            told = _Told(torch.empty(0), self.attribute(name).conditional_prior(), self.attribute(name).log_frequencies())
            if name in values:
                told = told._replace(log_frequency=torch.where(_places(told) == values[name], 0.0, -torch.inf))
            parts.append(told.marginal(1))
        return Blocks(tuple(parts))

    def edited(
        self, z: Float[Tensor, "K B D"], values: Mapping[str, int], noise: Noise | None = None, purpose: str = "edit"
    ) -> Float[Tensor, "K B D"]:
        """The same latents with these attributes set to these values, and nothing else changed.

        Their blocks become the mean of p(w | y), or with `noise` draws of it. Raises ValueError for an unknown attribute or value.
        """
        edited = z.clone()
        for name, value in values.items():
            self.check(name, value)
            prior = DiagNormal(*(x[value] for x in self.attribute(name).conditional_prior()))
            w = prior.mean if noise is None else prior.sample(noise, f"{purpose}/{name}", len(z))
            edited[..., self.attribute(name).block] = w.to(z)
        return edited

    def check(self, name: str, value: int) -> None:
        """Raise ValueError for an attribute or a value that there is not."""
        if name not in self.attributes:
            raise ValueError(f"unknown attribute {name!r}; this model has {', '.join(self.attributes) or 'none'}")
        if not 0 <= value < self.attribute(name).values:
            raise ValueError(f"{name}: expected a value from 0 to {self.attribute(name).values - 1}, got {value}")

    def infer(self, batch: Batch) -> Posterior:
        """Rows with an x: the product of what its modalities say. Others: N(0, I), and in each block p(w | y), or p(w) without a label."""
        seen, told = self._seen(batch), self._told(batch)
        held, q = seen.observed.any(1), self._product(seen, seen.observed.T)
        parts = [_lone(DiagNormal(q.mean[:, : self.free], q.scale[:, : self.free]))]
        for name in self.blocks():
            block, mixture = self.attribute(name).block, self._without_x(name, told, len(held))
            mean, scale = (torch.where(held[:, None], x[:, block], p) for x, p in zip(q, mixture.components, strict=True))
            parts.append(WeightedMixture(DiagNormal(mean, scale), mixture.log_weight))  # a mixture of equals where there is an x
        return Blocks(tuple(parts))

    def forward(self, batch: Batch) -> Loss:
        """The sum over rows of the loss above."""
        seen, told = self._seen(batch), self._told(batch)
        held = seen.observed.any(1)
        q = self._product(seen, random_subsets(seen, "subset", 1)[0])
        z = q.reparameterise(Noise(batch.seed, batch.draw), "joint", 1)
        explained = self.explanations(seen, z[None])[0, :, 0]
        kl = torch.where(held, divergence(DiagNormal(q.mean[:, : self.free], q.scale[:, : self.free]), self.standard.density()), 0.0)
        blocks = {name: self._block(name, told[name], q, z[0], held) for name in self.attributes}
        apart, terms = self._independence(batch, told, z[0, :, : self.free], held)
        risen = self.risen(batch)
        total = (self.beta * risen * kl).sum() - explained.sum() + apart
        for name, block in blocks.items():
            total = total + (self.block_weight * risen * block.kl).sum() - block.frequency.sum()
            total = total - (self.attribute(name).weight - 1) * block.label.sum()
        return Loss(total, {**self._terms(batch, seen, explained, kl, blocks), **terms})

    # ---- parts ------------------------------------------------------------------------------------------------------------------------

    def _seen(self, batch: Batch) -> Batch:
        """The batch without attributes."""
        return batch.only(*(name for name in batch.modalities if name not in self.attributes))

    def _product(self, seen: Batch, members: Bool[Tensor, "N B"]) -> DiagNormal:
        """The product of these posteriors in each row [B, D]; a standard density where there is none."""
        like = torch.as_tensor(self.standard.mean)
        zero = like.new_zeros(len(seen.observed), self.latent_dim)
        if not seen.modalities:
            return DiagNormal(zero, torch.ones_like(zero))
        joint = product(self.posteriors(seen), members[None])
        some = members.any(0)[:, None]
        return DiagNormal(torch.where(some, joint.mean[0], zero), torch.where(some, joint.scale[0], 1.0))

    def _told(self, batch: Batch) -> dict[str, _Told]:
        """What each attribute of the objective says of the batch's rows."""
        here = [name for name in self.attributes if name in batch.modalities]
        shapes: dict[str, list[tuple[int, ...]]] = {}
        for name in self.attributes:
            values, size = self.attribute(name).values, self.attribute(name).size
            labels = [(len(batch.modalities[name].row), values)] if name in here else []
            shapes[name] = [*labels, (values, size), (values, size), (values,)]
        told, rows = {}, len(batch.observed)
        for name, (*labels, mean, scale, frequency) in zip(shapes, self.each(shapes, self._work(batch), None), strict=True):
            label = unpack(labels[0], batch.modalities[name].row, rows, 0.0) if labels else frequency.new_zeros(rows, len(frequency))
            told[name] = _Told(label.to(frequency.dtype), DiagNormal(mean, scale), frequency)
        return told

    def _work(self, batch: Batch) -> Work:
        def work(name: str, _: Tensor | None) -> list[Tensor]:
            attribute = self.attribute(name)
            labels = [attribute.embed(batch.modalities[name].data)] if name in batch.modalities else []
            return [*labels, *attribute.conditional_prior(), attribute.log_frequencies()]

        return work

    def _without_x(self, name: str, told: Mapping[str, _Told], rows: int) -> WeightedMixture:
        """The block of rows without an x."""
        marginal, label = told[name].marginal(rows), told[name].label
        known = label.sum(-1) > 0
        return marginal._replace(log_weight=torch.where(known, label.log().T, marginal.log_weight))

    def _block(self, name: str, told: _Told, q: DiagNormal, z: Float[Tensor, "B D"], held: Bool[Tensor, " B"]) -> _Block:
        """An attribute's part of the bound, row by row."""
        block = self.attribute(name).block
        own, joint, known = DiagNormal(q.mean[:, block], q.scale[:, block]), told.joint(z[:, block]), told.label.sum(-1) > 0
        marginal = joint.logsumexp(-1)
        each = DiagNormal(own.mean[:, None], own.scale[:, None]).kl(told.prior)
        kl = torch.where(known, (told.label * each).sum(-1), own.log_prob(z[:, block]) - marginal)
        right = (told.label * (joint - marginal[:, None])).sum(-1)
        hit = (told.label * (joint.argmax(-1, keepdim=True) == _places(told))).sum(-1)
        there = held & known
        return _Block(
            torch.where(held, kl, 0.0),
            (told.label * told.log_frequency).sum(-1),
            torch.where(there, right, 0.0),
            torch.where(there, hit, 0.0).detach(),
            there,
        )

    def _independence(
        self, batch: Batch, told: Mapping[str, _Told], z: Float[Tensor, "B Z"], held: Bool[Tensor, " B"]
    ) -> tuple[Tensor, dict[str, Sums]]:
        """What is added to the loss for the independence of z, and how it stands."""
        there = {name: held & (told[name].label.sum(-1) > 0) for name in self.attributes}
        if self.independence == "hsic":
            shares = {name: hsic(z, told[name].label, batch.draw // BLOCK, there[name]) for name in self.attributes}
            terms = {f"dependence/{name}": _mean(share, there[name]) for name, share in shares.items()}
            return self.independence_weight * sum((share.sum() for share in shares.values()), z.new_zeros(())), terms
        total, terms = z.new_zeros(()), {}
        shapes: dict[str, list[tuple[int, ...]]] = {name: [(len(z), self.attribute(name).values)] * 2 for name in self.adversaries}
        guesses = self.each(shapes, lambda name, shared: self.adversaries[name](shared), z)
        for name, (honest, fooled) in zip(shapes, guesses, strict=True):
            label, known = told[name].label, there[name]
            guessed = torch.where(known, -(label * honest).sum(-1), 0.0)
            unsure = torch.where(held, (fooled.exp() * (fooled - told[name].log_frequency.detach())).sum(-1), 0.0)
            wrong = torch.where(known, (label * fooled).sum(-1), 0.0)
            game = guessed.sum() + self.independence_weight * (wrong if self.independence == "reversal" else unsure).sum()
            total = total + game - game.detach()  # its gradient alone: the value of a game says nothing of the model, and may fall for ever
            terms |= {f"adversary/{name}": _mean(guessed, known), f"dependence/{name}": _mean(unsure, held)}
        return total, terms

    def _terms(
        self,
        batch: Batch,
        seen: Batch,
        explained: Float[Tensor, "N B"],
        kl: Float[Tensor, " B"],
        blocks: Mapping[str, _Block],
    ) -> dict[str, Sums]:
        """The bound with divergences at weight 1 and its parts; of attributes their block's KL, log p(y | w), and how often it is right."""
        held = seen.observed.any(1)
        bound = explained.sum(0) - kl
        terms = {f"reconstruction/{name}": _mean(explained[i], seen.observed[:, i]) for i, name in enumerate(seen.modalities)}
        terms["kl"] = _mean(kl, held)
        for name, block in blocks.items():
            bound = bound - block.kl + block.frequency
            terms |= {f"kl/{name}": _mean(block.kl, held), f"label/{name}": _mean(block.label, block.there)}
            terms[f"accuracy/{name}"] = _mean(block.hit, block.there)
        return terms | {"bound": _mean(bound, batch.observed.any(1))}


def _lone(density: DiagNormal) -> WeightedMixture:
    """A mixture of one."""
    return WeightedMixture(DiagNormal(density.mean[None], density.scale[None]), density.mean.new_zeros(1, len(density.mean)))


def _places(told: _Told) -> Int[Tensor, " V"]:
    return torch.arange(len(told.log_frequency), device=told.log_frequency.device)


def _mean(values: Float[Tensor, " B"], counted: Bool[Tensor, " B"]) -> Sums:
    """A term: the sum of the rows' values, which are 0 in the others, over the rows that count."""
    values = values.detach()
    return Sums(values.sum(), counted.sum().to(values.dtype))
