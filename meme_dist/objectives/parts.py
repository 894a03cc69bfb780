"""What several objectives share beside the tables of `base`: subsets of the modalities, and the terms of an evidence lower bound."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from meme_dist.distributions import DiagNormal
from meme_dist.noise import Noise
from meme_dist.objectives.base import Objective
from meme_dist.types import Batch, Sums


def needs_normal(objective: Objective) -> None:
    """Raises ValueError where posteriors are not Normal: products of others have no closed form."""
    if objective.family is not DiagNormal:
        name, family = type(objective).__name__, objective.family.__name__
        raise ValueError(f"{name} multiplies posteriors, which only DiagNormal allows, got {family}; take MMVAE, MMVM or JMVAE for it")


def all_subsets(count: int, device: torch.device) -> Bool[Tensor, "S {count}"]:
    """The 2^count - 1 subsets of that many things, without the empty one; the last is the full set."""
    return (torch.arange(1, 2**count, device=device)[:, None] >> torch.arange(count, device=device)) % 2 == 1


def random_subsets(batch: Batch, purpose: str, num: int) -> Bool[Tensor, "{num} N B"]:
    """Subsets of what each row observes, uniform over the non-empty ones, each independent of the others; empty where it observes nothing.

    Exact for any N. Of n things in a fixed order the first member is the i-th with probability 2^-i / (1 - 2^-n), and a fair coin decides
    each one after it. The order is that of the names, so that a row's subsets do not depend on the order of the modalities.
    """
    names = list(batch.modalities)
    order = sorted(range(len(names)), key=names.__getitem__)
    observed = torch.stack([batch.observed[:, n] for n in order], 1)
    uniform = Noise(batch.seed, batch.draw).uniform(purpose, num, len(names) + 1)
    reached = 1 - 0.5 ** observed.cumsum(1).to(uniform.dtype)  # (1 - 2^-n) times the probability that the first member is here or earlier
    before = (uniform[..., :1] * reached[:, -1:] > reached) & observed
    first = ~before & observed & (before.cumsum(-1) == observed.cumsum(1) - 1)
    members = first | (observed & ~before & ~first & (uniform[..., 1:] <= 0.5))
    return torch.stack([members[..., order.index(n)] for n in range(len(names))], 1)


def elbo_terms(batch: Batch, explained: Float[Tensor, "N B"], kl: Float[Tensor, " B"]) -> Mapping[str, Sums]:
    """The evidence lower bound and its parts, divergences with weight 1 whatever is optimised, likelihoods as the modalities weigh them.

    Means over rows, or over those that hold a modality.
    """
    explained, kl = explained.detach(), kl.detach()
    rows, held = batch.observed.any(1).sum().to(kl.dtype), batch.observed.sum(0).to(kl.dtype)
    terms = {f"reconstruction/{name}": Sums(explained[i].sum(), held[i]) for i, name in enumerate(batch.modalities)}
    return terms | {"bound": Sums((explained.sum(0) - kl).sum(), rows), "kl": Sums(kl.sum(), rows)}
