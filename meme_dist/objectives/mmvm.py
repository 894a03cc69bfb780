"""MMVM: each modality has a latent of its own, drawn to the others' by a data-dependent prior (Sutter et al., NeurIPS 2024, "Unity by
Diversity").

    h(z | x) = (1 - alpha) (1/n) sum_{j observed} q_j(z | x_j) + alpha p(z),      p a standard density
    loss     = sum_{i observed} ( -E_{q_i}[ log p_i(x_i | z) ] + beta D_i )
    D_i      = KL(q_i || h)                                                              `divergence="mixture"`, by one sample: the paper
    D_i      = (1 - alpha) (1/n) sum_{j observed} KL(q_i || q_j) + alpha KL(q_i || p)    `divergence="pairs"`: the authors' code

The second is at least the first, since KL is convex. Nothing is decoded across modalities in training: n decodings a row.

What is bounded is not log p(x) but sum_i log of the integral of p_i(x_i | z) h(z | x): the prior knows the row. At alpha = 0 a row of one
modality is its own prior, D_i = 0: rows of one modality train a plain auto-encoder then, and give p(z) no meaning.
"""

from collections.abc import Mapping
from functools import partial
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from meme_dist.distributions import Components, Diagonal, Posterior, divergence, even_mixture, mixture_of, sample_table
from meme_dist.modality import Modality
from meme_dist.noise import Noise
from meme_dist.objectives.base import Objective, Rise
from meme_dist.priors import Standard
from meme_dist.types import Batch, Loss, Sums


class MMVM(Objective):
    """VAEs of N >= 2 modalities under a mixture-of-experts prior, for any non-empty pattern of present modalities.

    `divergence`: pairs (published code), or mixture (the paper's formula).
    `alpha`: weight of the standard density in the prior. The authors' code ends at 0, to which it falls from 1 over 300,000 steps; with
      `anneal` it falls from 1 so too, and the divergences count in full from the start.
    `beta`: weight of the divergences (published: 1; the paper's experiments go from .25 to 4).
    """

    def __init__(
        self,
        modalities: Mapping[str, Modality],
        *,
        divergence: Literal["pairs", "mixture"] = "pairs",
        alpha: float = 0.0,
        beta: float = 1.0,
    ):
        super().__init__(modalities)
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha: expected 0 to 1, got {alpha}")
        self.divergence: Literal["pairs", "mixture"] = divergence
        self.alpha, self.beta = alpha, beta
        self.standard = Standard(self.latent_dim, self.family)

    def initialise(self, batch: Batch) -> None:
        """Nothing depends on the data."""

    def prior(self) -> Components:
        """The standard density, which training knows as far as `alpha` goes."""
        return self.standard.components()

    def infer(self, batch: Batch) -> Posterior:
        """The even mixture of the posteriors of what each row observes: h without p. A row with nothing gets a standard density."""
        return even_mixture(self.posteriors(batch), batch.observed.T)

    def forward(self, batch: Batch) -> Loss:
        """The sum over rows of the loss above."""
        q, observed = self.posteriors(batch), batch.observed.T
        z, density = sample_table(q, observed, Noise(batch.seed, batch.draw), list(batch.modalities), 1)
        own = self.reconstructions(batch, z, cross=False).diagonal(dim1=0, dim2=1)[0].T
        apart = partial(self._pairs, q, observed) if self.divergence == "pairs" else partial(self._sampled, z, density, observed)
        kl = torch.where(observed, apart(1 - (1 - self.alpha) * self.risen(batch)), 0.0)
        with torch.no_grad():  # what is told knows nothing of annealing
            told = torch.where(observed, apart(self.alpha), 0.0) if self.anneal else kl
        return Loss(self.beta * kl.sum() - own.sum(), self._terms(batch, own.detach(), told.detach()))

    def _pairs(self, q: Diagonal, observed: Bool[Tensor, "N B"], alpha: Rise) -> Float[Tensor, "N B"]:
        table = divergence(type(q)(q.mean[:, None], q.scale[:, None]), type(q)(q.mean[None], q.scale[None]))
        mean = torch.where(observed, table, 0.0).sum(1) / observed.sum(0).clamp(min=1)
        return (1 - alpha) * mean + alpha * divergence(q, self.standard.density())

    def _sampled(
        self, z: Float[Tensor, "N 1 B D"], density: Float[Tensor, "N N 1 B"], observed: Bool[Tensor, "N B"], alpha: Rise
    ) -> Float[Tensor, "N B"]:
        mixture = mixture_of(density.transpose(0, 1), observed[:, None, None])[:, 0]
        standard = self.standard.density().log_prob(z)[:, 0]
        weight = mixture.new_zeros(()) + alpha  # whose logarithm may be -inf, which a number's may not
        mixture = torch.logaddexp(mixture + (1 - weight).log(), standard + weight.log())
        return density.diagonal(dim1=0, dim2=1)[0].T - mixture

    def _terms(self, batch: Batch, own: Float[Tensor, "N B"], kl: Float[Tensor, "N B"]) -> Mapping[str, Sums]:
        held, rows = batch.observed.sum(0).to(own.dtype), batch.observed.any(1).sum().to(own.dtype)
        terms = {"bound": Sums((own - kl).sum(), rows)}
        for i, name in enumerate(batch.modalities):
            terms |= {f"reconstruction/{name}": Sums(own[i].sum(), held[i]), f"kl/{name}": Sums(kl[i].sum(), held[i])}
        return terms
