"""One kind of observation: its encoder, its decoder and its likelihood."""

import copy
from collections.abc import Callable, Mapping
from math import prod

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from meme_dist.distributions import DiagNormal, Diagonal, wide
from meme_dist.likelihoods import Likelihood, Rows
from meme_dist.noise import Noise

SCALE_FLOOR = 1e-3  # of posterior scales; the released code clamps at the same value (MNIST) or 1e-4 (SVHN)


def softplus_scale(raw: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
    """softplus(raw) + 1e-3: each coordinate has a scale of its own."""
    return F.softplus(raw) + SCALE_FLOOR


def softmax_scale(raw: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
    """D softmax(raw) + 1e-3: the scales share a sum of D, so that no posterior can become sharp everywhere (Shi et al. 2019's code)."""
    return raw.shape[-1] * raw.softmax(-1) + SCALE_FLOOR


class Encoding(nn.Module):
    """An encoder with what makes a density of its outputs.

    `embed` maps data to features in which pseudo-inputs live (identity for images and vectors, token lookup for text), `encoder` maps
    features [R, *feature] to [R, 2 D] (`feature` is their shape).

    `latent_dim` is what the encoder gives. The last `private_dim` of it are latents that no other modality has: what the others cannot know
    of this one (Palumbo et al. 2023). `to_scale` makes the scales of the encoder's raw ones. `dropout` is the share of a training row's
    features that are hidden from the encoder (`kept`): what keeps it from knowing few rows by heart.
    """

    def __init__(
        self,
        *,
        encoder: nn.Module,
        latent_dim: int,
        feature: tuple[int, ...],
        embed: nn.Module | None = None,
        family: type[Diagonal] = DiagNormal,
        private_dim: int = 0,
        to_scale: Callable[[Tensor], Tensor] = softplus_scale,
        dropout: float = 0.0,
    ):
        super().__init__()
        if not 0 <= private_dim < latent_dim:
            raise ValueError(f"private_dim: expected 0 to {latent_dim - 1} of {latent_dim} latents, got {private_dim}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected a share from 0 to below 1, got {dropout}")
        self.embed, self.encoder = embed or nn.Identity(), encoder
        self.latent_dim, self.feature = latent_dim, feature
        self.family, self.private_dim, self.to_scale, self.dropout = family, private_dim, to_scale, dropout

    def twin(self) -> "Encoding":
        """A second encoder that begins as a copy of this one."""
        networks = {"embed": copy.deepcopy(self.embed), "encoder": copy.deepcopy(self.encoder)}
        sizes = {"latent_dim": self.latent_dim, "feature": self.feature, "private_dim": self.private_dim}
        return Encoding(**networks, **sizes, family=self.family, to_scale=self.to_scale, dropout=self.dropout)

    @property
    def shared_dim(self) -> int:
        """Size of the latents that all modalities share: the first ones."""
        return self.latent_dim - self.private_dim

    @property
    def hides(self) -> bool:
        """Whether features are hidden now: not for `dropout` 0, and not in evaluation."""
        return self.training and self.dropout > 0

    def kept(self, noise: Noise, purpose: str) -> Float[Tensor, "R *feature"] | None:
        """What to multiply a training row's features by: 0 with probability p = `dropout`, else 1 / (1 - p), so that their mean stays.

        None where nothing is hidden.
        """
        if not self.hides:
            return None
        shown = noise.uniform(purpose, 1, prod(self.feature))[0] > self.dropout
        return shown.unflatten(-1, self.feature) / (1 - self.dropout)

    def encode(self, x: Shaped[Tensor, "R *event"], kept: Float[Tensor, "R *feature"] | None = None) -> Diagonal:
        """q(z | x) for each row, float32; from the features times `kept` where that is given."""
        features = self.embed(x)
        return self.encode_features(features if kept is None else features * kept)

    def encode_features(self, features: Float[Tensor, "R *feature"]) -> Diagonal:
        """q(z | features): where pseudo-inputs enter."""
        mean, raw = wide(self.encoder(features)).chunk(2, -1)
        if mean.shape[-1] != self.latent_dim:
            raise ValueError(f"encoder: expected {2 * self.latent_dim} outputs (mean and raw scale), got {2 * mean.shape[-1]}")
        return self.family(mean, self.to_scale(raw))


class Modality(Encoding):
    """An encoder that is a posterior when it leads and a conditional prior when it supervises, and a decoder likewise in two roles.

    `decoder` maps latents [rows, D] to the likelihood's parameters [rows, ...]; everything about the encoder is `Encoding`'s.

    `weight` multiplies this modality's log-likelihood wherever it enters the objective. Its default is 1 (the evidence itself, as in the
    released code); `balanced_weights` gives the rule for modalities whose event sizes differ by orders of magnitude.
    """

    def __init__(
        self,
        *,
        encoder: nn.Module,
        decoder: nn.Module,
        likelihood: Likelihood,
        latent_dim: int,
        feature: tuple[int, ...],
        embed: nn.Module | None = None,
        family: type[Diagonal] = DiagNormal,
        weight: float = 1.0,
        private_dim: int = 0,
        to_scale: Callable[[Tensor], Tensor] = softplus_scale,
        dropout: float = 0.0,
    ):
        sizes = {"latent_dim": latent_dim, "feature": feature, "private_dim": private_dim}
        super().__init__(encoder=encoder, embed=embed, family=family, to_scale=to_scale, dropout=dropout, **sizes)
        self.decoder, self.likelihood, self.weight = decoder, likelihood, weight

    def log_prob(self, x: Shaped[Tensor, "X *event"], z: Float[Tensor, "K P D"], row: Rows = None) -> Float[Tensor, "K P"]:
        """weight * log p(x | z), float32, summed over the event."""
        params = wide(self.decoder(z.flatten(0, 1))).unflatten(0, z.shape[:2])
        log_prob = self.likelihood.log_prob(x, params, row)
        return log_prob if self.weight == 1 else self.weight * log_prob  # a product is a kernel, and one more in the backward pass

    def reconstruct(self, z: Float[Tensor, "*rows D"]) -> Shaped[Tensor, "*rows_event"]:
        """The likelihood's mean (for tokens: the most probable ones)."""
        params = wide(self.decoder(z.reshape(-1, z.shape[-1])))
        return self.likelihood.mean(params).unflatten(0, z.shape[:-1])


def balanced_weights(events: dict[str, int]) -> dict[str, float]:
    """The largest event size over each modality's own, so that every modality's log-likelihood counts alike (Shi et al. 2019).

    With it the objective is no longer a bound on the evidence, but on a tempered one: report likelihoods from unweighted terms.
    """
    largest = max(events.values())
    return {name: largest / size for name, size in events.items()}


def same_family(modalities: Mapping[str, Modality]) -> type[Diagonal]:
    """The posterior family that all modalities share; raises ValueError where they differ (their tables could not be compared)."""
    families = {name: m.family.__name__ for name, m in modalities.items()}
    if len(set(families.values())) != 1:
        raise ValueError(f"all modalities need one posterior family, got {families}")
    return next(iter(modalities.values())).family


def stack(posteriors: list[Diagonal]) -> Diagonal:
    """N posteriors [B, D] of one family -> one [N, B, D]."""
    return type(posteriors[0])(torch.stack([q.mean for q in posteriors]), torch.stack([q.scale for q in posteriors]))
