"""Text: token embedding, one-dimensional convolutions, a decoder that scores every position at once."""

from jaxtyping import Float
from torch import Tensor, nn

from meme_dist.distributions import DiagNormal, Diagonal
from meme_dist.likelihoods import Categorical
from meme_dist.modality import Modality


def conv_text(
    length: int,
    *,
    vocabulary: int,
    latent_dim: int,
    embedding: int = 64,
    hidden: int = 256,
    family: type[Diagonal] = DiagNormal,
    weight: float = 1.0,
    padding: int = 0,
) -> Modality:
    """Tokens [R, T] of a vocabulary; pseudo-inputs are embedded sentences [M, T, E]."""
    embed = nn.Embedding(vocabulary, embedding, padding_idx=padding)
    encoder = nn.Sequential(
        _ChannelsFirst(),
        nn.Conv1d(embedding, hidden, 3, padding=1),
        nn.SiLU(),
        nn.Conv1d(hidden, hidden, 3, padding=1),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(hidden * length, hidden),
        nn.SiLU(),
        nn.Linear(hidden, 2 * latent_dim),
    )
    return Modality(
        encoder=encoder,
        decoder=_TextDecoder(length, latent_dim, hidden, embedding, vocabulary),
        likelihood=Categorical(padding),
        latent_dim=latent_dim,
        feature=(length, embedding),
        embed=embed,
        family=family,
        weight=weight,
    )


class _ChannelsFirst(nn.Module):
    def forward(self, features: Float[Tensor, "R T E"]) -> Float[Tensor, "R E T"]:
        return features.transpose(1, 2)


class _TextDecoder(nn.Module):
    """z -> a state for each position -> convolutions between positions -> a score for every word of the vocabulary."""

    def __init__(self, length: int, latent_dim: int, hidden: int, width: int, vocabulary: int):
        super().__init__()
        self.spread = nn.Sequential(nn.Linear(latent_dim, hidden), nn.SiLU(), nn.Linear(hidden, length * width), nn.SiLU())
        self.mix = nn.Sequential(nn.Conv1d(width, hidden, 3, padding=1), nn.SiLU(), nn.Conv1d(hidden, width, 3, padding=1))
        self.score = nn.Linear(width, vocabulary)
        self.length = length

    def forward(self, z: Float[Tensor, "rows D"]) -> Float[Tensor, "rows T V"]:
        states = self.spread(z).unflatten(-1, (-1, self.length))
        return self.score((states + self.mix(states)).transpose(1, 2))
