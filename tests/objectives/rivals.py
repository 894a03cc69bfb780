"""Tiny objectives, and a row as the rivals' tests transcribe it: loops over names of modalities, torch.distributions."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributions as reference
from torch.distributions import kl_divergence as kl

from meme_dist.distributions import DiagLaplace, DiagNormal
from meme_dist.likelihoods import Normal
from meme_dist.modality import Modality
from meme_dist.noise import Noise
from meme_dist.types import Batch, pack_dense

EVENT, D, NAMES = 3, 2, ("a", "b", "c")
PATTERNS = [p for p in itertools.product((0, 1), repeat=len(NAMES)) if any(p)]
COMPLETE = [(1, 1, 1)]
SPREAD = 0.7  # of the likelihoods


def network(family: type = DiagNormal) -> Modality:
    encoder = nn.Sequential(nn.Linear(EVENT, 6), nn.Tanh(), nn.Linear(6, 2 * D))
    decoder = nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, EVENT))
    return Modality(encoder=encoder, decoder=decoder, likelihood=Normal(SPREAD), latent_dim=D, feature=(EVENT,), family=family)


def build(kind: Any, family: type = DiagNormal, **keywords: Any) -> Any:
    """In float64, with posteriors that are far from one another and from the prior."""
    objective = kind({name: network(family) for name in NAMES}, **keywords).double()
    for modality in objective.modalities.values():
        modality.encoder[2].bias.data += torch.randn(2 * D).double()
    return objective


def rows(patterns: Sequence[Sequence[int]], copies: int = 3, *, seed: int = 5) -> tuple[dict[str, Tensor], Batch]:
    """`copies` rows of each pattern, and their data with NaN where a row lacks it."""
    masks = torch.tensor(patterns).bool().repeat(copies, 1)
    observed = {n: masks[:, i] for i, n in enumerate(NAMES)}
    x = {n: torch.where(observed[n][:, None], torch.randn(len(masks), EVENT).double(), torch.nan) for n in NAMES}
    return x, pack_dense(x, observed, draw=torch.arange(len(masks)).numpy() + 100, seed=seed)


class Row:
    """One row as a transcription sees it: the posteriors of what it observes, log-likelihoods at a z, its noise."""

    def __init__(self, objective: Any, x: Mapping[str, Tensor], batch: Batch, b: int):
        self.objective, self.x, self.b = objective, {n: v[b] for n, v in x.items()}, b
        self.names = [n for n, there in zip(NAMES, batch.observed[b].tolist(), strict=True) if there]
        self.noise = Noise(batch.seed, batch.draw)
        normal = objective.family is DiagNormal
        self.family = reference.Normal if normal else reference.Laplace
        self.q = {n: self.posterior(*objective.modality(n).encoder(self.x[n][None])[0].chunk(2)) for n in self.names}

    def posterior(self, mean: Tensor, raw: Tensor) -> Any:
        return self.family(mean, F.softplus(raw) + 1e-3)

    def prior(self) -> Any:
        return self.family(torch.zeros(D).double(), torch.ones(D).double())

    def explains(self, name: str, z: Tensor) -> Tensor:
        return reference.Normal(self.objective.modality(name).decoder(z), SPREAD).log_prob(self.x[name]).sum()

    def draw(self, q: Any, purpose: str, k: int = 0) -> Tensor:
        """The k-th sample under a purpose, from the row's own noise."""
        kind = self.noise.normal if self.family is reference.Normal else self.noise.laplace
        return q.loc + q.scale * kind(purpose, k + 1, D)[k, self.b].double()

    def product(self, members: Sequence[str], *, standard: bool) -> Any:
        """Expert by expert, as precisions add."""
        experts = [self.q[n] for n in members] + [self.prior()] * standard
        precision = sum(q.scale**-2 for q in experts)
        return reference.Normal(sum(q.loc * q.scale**-2 for q in experts) / precision, precision**-0.5)

    def subset(self, purpose: str, k: int) -> list[str]:
        """The k-th random subset: its first member in the order of names, then a coin for each one after it."""
        u = self.noise.uniform(purpose, k + 1, len(NAMES) + 1)[k, self.b].tolist()
        total, place = 1 - 0.5 ** len(self.names), 1
        while u[0] * total > 1 - 0.5**place:
            place += 1
        later = [n for n in self.names[place:] if u[1 + NAMES.index(n)] <= 0.5]
        return [self.names[place - 1], *later]


def subsets(names: Sequence[str]) -> list[tuple[str, ...]]:
    return [s for size in range(1, len(names) + 1) for s in itertools.combinations(names, size)]


def apart(q: Any, p: Any) -> Tensor:
    """KL(q || p)."""
    return kl(q, p).sum()


def gradient(objective: Any, total: Tensor) -> Tensor:
    objective.zero_grad()
    total.backward()
    return torch.cat([torch.zeros(p.numel()).double() if p.grad is None else p.grad.flatten() for p in objective.parameters()])


def assert_transcribed(objective: Any, loss: Callable[[Row], Tensor], patterns: Sequence[Sequence[int]]) -> None:
    """The objective's loss and gradient are those of a loop over rows."""
    x, batch = rows(patterns)
    total = torch.stack([loss(Row(objective, x, batch, b)) for b in range(len(batch.observed))]).sum()
    came = objective(batch).total
    torch.testing.assert_close(came, total, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(gradient(objective, came), gradient(objective, total), rtol=1e-6, atol=1e-8)


FAMILIES = [DiagNormal, DiagLaplace]
