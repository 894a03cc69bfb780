"""Attributes: a label that is a modality of its own, whose encoder is the conditional prior of a block of the latents.

    p(w | y) = N(w; mean_y, diag scale_y^2)      a learned row of a table for each value y: what the encoder gives in its block
    p(y)     = softmax(logit)_y                  learned too
    p(y | w) = p(y) p(w | y) / sum_v p(v) p(w | v)      the decoder, by Bayes' rule: it has no parameters of its own

Outside its block an attribute says nothing: its encoder gives a standard Normal there, and its decoder does not look. Values start apart:
"off" at the origin, as in Klys, Snell and Zemel 2018, and every other value at a distance of 3 along each coordinate, or around, all of
scale .3.
"""

import math
from collections.abc import Mapping
from typing import Literal, cast

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from meme_dist.distributions import DiagNormal
from meme_dist.likelihoods import Bernoulli, Categorical
from meme_dist.modality import SCALE_FLOOR, Modality

SEPARATION, SPREAD = 3.0, 0.3  # between the values' means, and their scale, in each coordinate at the start
FIRST_WORD = 3  # of a text's vocabulary: padding, unknown and the end come before it
NEVER = -1e4  # a logit of words that no attribute has: finite, so that no difference of two is NaN
UNIT, NARROW = (math.log(math.expm1(scale - SCALE_FLOOR)) for scale in (1.0, SPREAD))  # the raw scales that softplus makes those


class Attribute(Modality):
    """A label with `values` values that owns the latents `start` to `start + size` of `latent_dim`.

    `kind`: "flag" is one number in [0, 1] [R, 1] under a Bernoulli likelihood (between 0 and 1: a belief), "word" one token [R, 1] of a
    vocabulary of 3 + `values` words under a categorical one; an unknown word is no value (its log-likelihood is about -1e4): leave it out.
    `weight` is what log p(y | w) counts in the objective: above 1 it makes the block a better classifier than the bound asks for.
    """

    def __init__(
        self,
        *,
        start: int,
        size: int,
        latent_dim: int,
        values: int = 2,
        kind: Literal["flag", "word"] = "flag",
        weight: float = 1.0,
    ):
        if size < 1 or start < 0 or start + size > latent_dim:
            raise ValueError(f"attribute: expected a block within {latent_dim} latents, got {size} from {start} on")
        if values < 2 or (kind == "flag" and values != 2):
            raise ValueError(f"attribute: expected 2 values of a flag, or 2 and more of a word, got {values} of a {kind}")
        table, frequencies = _Table(values, start, size, latent_dim), _Frequencies(values)
        super().__init__(
            embed=_Flag() if kind == "flag" else _Word(values),
            encoder=table,
            decoder=_Bayes(table, frequencies, kind),
            likelihood=Bernoulli() if kind == "flag" else Categorical(),
            latent_dim=latent_dim,
            feature=(values,),
            weight=weight,
        )
        self.frequencies = frequencies
        self.values, self.size, self.block = values, size, slice(start, start + size)

    def conditional_prior(self) -> DiagNormal:
        """p(w | y) for each value y, [V, P]."""
        return self.conditional_prior_of(torch.eye(self.values, device=next(self.parameters()).device))

    def conditional_prior_of(self, features: Float[Tensor, "R V"]) -> DiagNormal:
        """The encoder's block for these values (one-hot rows), [R, P]."""
        mean, scale = self.encode_features(features)
        return DiagNormal(mean[:, self.block], scale[:, self.block])

    def log_frequencies(self) -> Float[Tensor, " V"]:
        """log p(y)."""
        return self.frequencies()

    @torch.no_grad()
    def initialise(self, x: Shaped[Tensor, "R 1"]) -> None:
        """Take p(y) from these labels, each value counted once more than it comes."""
        count = self.embed(x).sum(0) + 1
        cast(_Frequencies, self.frequencies).logit.copy_((count / count.sum()).log())


class _Table(nn.Module):
    """Mean and raw scale of each value's block, within a standard Normal over all latents."""

    def __init__(self, values: int, start: int, size: int, latent_dim: int):
        super().__init__()
        self.mean, self.raw = nn.Parameter(_apart(values, size)), nn.Parameter(torch.full((values, size), NARROW))
        self.around = (start, latent_dim - start - size)

    def forward(self, features: Float[Tensor, "R V"]) -> Float[Tensor, "R outputs"]:
        """A value's row, or what a belief mixes of them. A sum rather than a product of matrices: autocast would round a lookup."""
        mean, raw = ((features[:, :, None].to(table.dtype) * table).sum(1) for table in (self.mean, self.raw))
        return torch.cat([nn.functional.pad(mean, self.around), nn.functional.pad(raw, self.around, value=UNIT)], -1)


def _apart(values: int, size: int) -> Float[Tensor, "V P"]:
    """The first value at the origin, a second one at (3, 3, ...), more of them on a sphere about as far away, or one after the other."""
    if values == 2 or size == 1:
        return SEPARATION * torch.arange(float(values))[:, None].expand(values, size).clone()
    around = torch.randn(values - 1, size)
    around = SEPARATION * size**0.5 * around / around.norm(dim=-1, keepdim=True)
    return torch.cat([torch.zeros(1, size), around])


class _Frequencies(nn.Module):
    def __init__(self, values: int):
        super().__init__()
        self.logit = nn.Parameter(torch.zeros(values))

    def forward(self) -> Float[Tensor, " V"]:
        return self.logit.log_softmax(-1)


class _Flag(nn.Module):
    def forward(self, x: Float[Tensor, "R 1"]) -> Float[Tensor, "R 2"]:
        return torch.cat([1 - x, x], -1)


class _Word(nn.Module):
    def __init__(self, values: int):
        super().__init__()
        self.values = values

    def forward(self, x: Int[Tensor, "R 1"]) -> Float[Tensor, "R V"]:
        words = FIRST_WORD + torch.arange(self.values, device=x.device)
        return (x == words).to(torch.get_default_dtype())


class _Bayes(nn.Module):
    """The likelihood's parameters at z. What it reads belongs to the encoder and to the modality: in a tuple `nn.Module` does not register
    it a second time. Both are called as modules, which is when engines gather what they shard."""

    def __init__(self, table: _Table, frequencies: _Frequencies, kind: Literal["flag", "word"]):
        super().__init__()
        self._known, self.kind = (table, frequencies), kind

    def forward(self, z: Float[Tensor, "rows D"]) -> Float[Tensor, "rows ..."]:
        table, frequencies = self._known
        prior = frequencies()
        mean, raw = table(torch.eye(len(prior), device=z.device)).chunk(2, -1)
        block = slice(table.around[0], mean.shape[-1] - table.around[1])
        scale = nn.functional.softplus(raw[:, block]) + SCALE_FLOOR
        score = prior + DiagNormal(mean[:, block], scale).log_prob(z[:, None, block].expand(-1, len(prior), -1))
        if self.kind == "flag":
            return score[:, 1:] - score[:, :1]
        return nn.functional.pad(score.log_softmax(-1), (FIRST_WORD, 0), value=NEVER)[:, None]


def attributes_of(modalities: Mapping[str, nn.Module]) -> dict[str, Attribute]:
    """Those of the modalities that are attributes, in their order. Raises ValueError where two of them own the same latents."""
    found = {name: m for name, m in modalities.items() if isinstance(m, Attribute)}
    owner: dict[int, str] = {}
    for name, attribute in found.items():
        for place in range(attribute.block.start, attribute.block.stop):
            if owner.setdefault(place, name) != name:
                raise ValueError(f"{owner[place]} and {name}: both own latent {place}; give each attribute a block of its own")
    return found
