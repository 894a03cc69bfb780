"""MMVAE+: MMVAE whose modalities also have latents of their own (Palumbo, Daunhawer, Vogt, ICLR 2023).

    q(z, w_i | x)  z from the even mixture of q_j(z | x_j),  w_i ~ q_i(w_i | x_i)
    log w[i, k] = log p_i(x_i | z, w_i) + sum_{j != i} log p_j(x_j | z, w~_j)
                  + beta (log p(z) + log p(w_i) - log q(z | x) - log q_i(w_i | x_i)),      z, w_i = the k-th of source i

w~_j ~ r_j, an auxiliary density with learned scales: a target's own latents are unknown to the source, so they must not be a shortcut
through which it is reconstructed. At beta = 1 and r_j = p(w_j) it never exceeds log p(x); with a learned r_j it is a bound on the evidence
of a model in which the targets' own latents follow r_j.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from meme_dist.bounds import scale_gradient
from meme_dist.distributions import Diagonal
from meme_dist.modality import Modality
from meme_dist.objectives.base import Private, Rise
from meme_dist.objectives.mmvae import MMVAE, Gradient, Samples
from meme_dist.priors import Standard
from meme_dist.types import Batch


class MMVAEPlus(MMVAE):
    """Mixture of experts over shared latents, with private ones: every modality needs a `private_dim`. Keywords as MMVAE's.

    `learned_auxiliary`: the scales of r_j are trained (published). Generation draws a modality's own latents from p(w), as the paper does.
    """

    private_latents = True

    def __init__(
        self,
        modalities: Mapping[str, Modality],
        *,
        samples: int = 10,
        gradient: Gradient = "dreg",
        tight: bool = False,
        resampled: bool = True,
        beta: float = 1.0,
        learned_prior: bool = False,
        learned_auxiliary: bool = True,
    ):
        keywords = {"samples": samples, "gradient": gradient, "tight": tight, "resampled": resampled, "beta": beta}
        super().__init__(modalities, learned_prior=learned_prior, **keywords)
        if without := [name for name, m in modalities.items() if not m.private_dim]:
            raise ValueError(f"{', '.join(without)}: no latents of their own; give private_dim, or take MMVAE")
        auxiliary = {name: Standard(m.private_dim, self.family, learned=learned_auxiliary) for name, m in modalities.items()}
        self.auxiliary = nn.ModuleDict(auxiliary)

    def _private(self, own: Mapping[str, Diagonal], batch: Batch) -> tuple[Private, Tensor | None]:
        samples = self.private_samples(own, batch, self.samples, {name: self._auxiliary(name).density() for name in own})
        ratios = []
        for i, (name, q) in enumerate(own.items()):
            mine = samples[name][i]
            if self.gradient != "iwae":
                q = self.family(q.mean.detach(), q.scale.detach())
            ratios.append(self.private_prior(name).log_prob(mine) - q.log_prob(mine))
        apart = {name: own.view_as(own) for name, own in samples.items()}  # nodes of their own, as z: dreg weighs the ratio by itself
        return apart, torch.stack(ratios)

    def _double(self, samples: Samples, weight: Tensor, beta: Rise) -> None:
        super()._double(samples, weight, beta)
        if self.gradient == "iwae":
            return
        weight = self._factor(weight, beta)  # own latents come from the very density whose score is dropped: no other expert is involved
        scale_gradient(samples.ratio, weight)
        for j, private in enumerate(samples.private.values()):  # draws of r_j are not reparameterised posteriors: theirs stays as it is
            scale_gradient(private, torch.where(samples.source == j, weight, 1.0)[..., None])

    def _auxiliary(self, name: str) -> Standard:
        part = self.auxiliary[name]
        assert isinstance(part, Standard)
        return part
