"""JMVAE: a joint encoder, and one for each modality that is drawn to it (Suzuki, Nakayama, Matsuo, 2016, JMVAE-kl).

    loss = -E_{q(z|x)}[ sum_{i observed} log p_i(x_i | z) ] + beta KL(q(z | x) || p(z))
           + alpha sum_{i observed} KL(q(z | x) || q_i(z | x_i))

The joint encoder has a branch for each modality, a copy of its encoder with weights of its own, and a perceptron on all of them:

    h = sum_{i observed} W_i branch_i(x_i) + c_i,     q(z | x) from (relu, linear, relu, linear)(h)

which is a first layer over all branches' outputs, zero where a row lacks one, and the mask, whose weights the c_i are. So it trains with
missing entries as it does with all of them, where MultiVae's joint encoder refuses them. KL annealing is not part of this file.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Literal

import torch
from torch import Tensor, nn

from meme_dist.distributions import Components, Diagonal, Posterior, divergence, product, wide
from meme_dist.modality import Modality, softplus_scale
from meme_dist.noise import Noise
from meme_dist.objectives.base import Objective, unpack
from meme_dist.objectives.parts import elbo_terms, needs_normal
from meme_dist.priors import Standard
from meme_dist.types import Batch, Loss, Sums


class JMVAE(Objective):
    """Joint multimodal VAE for any N >= 2 and any non-empty pattern of present modalities.

    `alpha`: weight of the divergences from the modalities' encoders (published: .1).
    `beta`: weight of the KL (published: 1).
    `hidden`: width of the joint encoder's two layers (MultiVae: 512).
    `several`: inference from several modalities, but not all N, is the joint encoder's, or the product of theirs (MultiVae). The joint
      encoder knows no such row if training had none: take the product then.
    """

    def __init__(
        self,
        modalities: Mapping[str, Modality],
        *,
        alpha: float = 0.1,
        beta: float = 1.0,
        hidden: int = 512,
        several: Literal["joint", "product"] = "joint",
    ):
        super().__init__(modalities)
        if several == "product":
            needs_normal(self)
        self.alpha, self.beta, self.hidden = alpha, beta, hidden
        self.several: Literal["joint", "product"] = several
        self.branches = nn.ModuleDict({name: _Branch(m, hidden, len(modalities)) for name, m in modalities.items()})
        # One modality owns what follows the branches, so that modality parallelism can place it: the first by name, in any order of them.
        self.trunk = nn.ModuleDict({min(modalities): _trunk(hidden, self.latent_dim)})
        self.standard = Standard(self.latent_dim, self.family)

    def initialise(self, batch: Batch) -> None:
        """Nothing depends on the data."""

    def prior(self) -> Components:
        """The standard density."""
        return self.standard.components()

    def infer(self, batch: Batch) -> Posterior:
        """A row of one modality has that encoder's posterior, one of several the joint encoder's, one of nothing the standard density."""
        q, observed = self.posteriors(batch), batch.observed.T
        if len(observed) == 1:
            return self.family(q.mean[0], q.scale[0])
        joint, count = self._joint(batch), observed.sum(0)[:, None]
        if self.several == "product":
            both, partial = product(q, observed[None]), count < len(self.modalities)
            joint = self._where(partial, self.family(both.mean[0], both.scale[0]), joint)
        lone = [torch.where(observed[..., None], x, 0.0).sum(0) for x in q]
        nothing = self.family(torch.zeros_like(lone[0]), torch.ones_like(lone[1]))
        return self._where(count == 0, nothing, self._where(count == 1, self.family(*lone), joint))

    def forward(self, batch: Batch) -> Loss:
        """The sum over rows of the loss above."""
        q, joint, observed = self.posteriors(batch), self._joint(batch), batch.observed.T
        z = joint.reparameterise(Noise(batch.seed, batch.draw), "joint", 1)
        explained = self.explanations(batch, z[None])[0, :, 0]
        kl = torch.where(observed.any(0), divergence(joint, self.standard.density()), 0.0)
        apart = torch.where(observed, divergence(self.family(joint.mean[None], joint.scale[None]), q), 0.0)
        total = (self.risen(batch) * (self.beta * kl + self.alpha * apart.sum(0))).sum() - explained.sum()
        each, held = apart.detach().sum(1), batch.observed.sum(0).to(kl.dtype)
        parts = {f"kl/{name}": Sums(each[i], held[i]) for i, name in enumerate(batch.modalities)}
        return Loss(total, {**elbo_terms(batch, explained, kl), **parts})

    def _joint(self, batch: Batch) -> Diagonal:
        """q(z | x) from all that each row observes [B, D]."""
        packs, rows = batch.modalities, len(batch.observed)
        shapes: dict[str, list[tuple[int, ...]]] = {name: [(len(p.row), self.hidden)] for name, p in packs.items()}
        branches = self.each(shapes, lambda name, _: (wide(self.branches[name](packs[name].data, self.kept(batch, name))),), None)
        placed = [unpack(h, p.row, rows, 0.0) for (h,), p in zip(branches, packs.values(), strict=True)]
        (owner,) = self.trunk
        shapes = {owner: [(rows, 2 * self.latent_dim)]}
        ((raw,),) = self.each(shapes, lambda name, h: (wide(self.trunk[name](h)),), torch.stack(placed).sum(0))
        mean, scale = raw.chunk(2, -1)
        return self.family(mean, softplus_scale(scale))

    def _where(self, condition: Tensor, a: Diagonal, b: Diagonal) -> Diagonal:
        return self.family(torch.where(condition, a.mean, b.mean), torch.where(condition, a.scale, b.scale))


class _Branch(nn.Module):
    """The modality's embedding and encoder with new weights, and its part of the first layer. Modules that have no `reset_parameters` keep
    the weights that they were copied with."""

    def __init__(self, modality: Modality, hidden: int, count: int):
        super().__init__()
        self.embed, self.encoder = deepcopy(modality.embed), deepcopy(modality.encoder)
        for module in self.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
        self.first = nn.Linear(2 * modality.latent_dim, hidden)
        with torch.no_grad():
            self.first.weight /= count**0.5  # as one layer over all branches starts

    def forward(self, x: Tensor, kept: Tensor | None) -> Tensor:
        """Its part of h [R, hidden], from the features times `kept` where that is given."""
        features = self.embed(x)
        return self.first(self.encoder(features if kept is None else features * kept))


def _trunk(hidden: int, latent_dim: int) -> nn.Module:
    return nn.Sequential(nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 2 * latent_dim))
