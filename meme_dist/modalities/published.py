"""The networks of Joy et al. 2022, by name: of the paper (appendix K, tables 8 to 10) and of the code its authors released.

The released SVHN encoder has batch norm. It is kept, because the published numbers belong to it; everything else in this library uses
norms that keep rows independent.
"""

from torch import nn

from meme_dist.distributions import DiagNormal, Diagonal
from meme_dist.likelihoods import Categorical, Laplace
from meme_dist.modalities.image import ChannelsLast
from meme_dist.modality import Modality


def mnist_released(latent_dim: int = 64, *, family: type[Diagonal] = DiagNormal, weight: float = 1.0) -> Modality:
    """784-512-512 with ELU then softplus; decoder 512-512 ReLU, sigmoid; Laplace(scale 1)."""
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(784, 512), nn.ELU(), nn.Linear(512, 512), nn.Softplus(), nn.Linear(512, 2 * latent_dim))
    decoder = nn.Sequential(nn.Linear(latent_dim, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 784), nn.Sigmoid())
    return _image(encoder, nn.Sequential(*decoder, nn.Unflatten(-1, (1, 28, 28))), (1, 28, 28), latent_dim, family, weight)


def mnist_paper(latent_dim: int = 64, *, family: type[Diagonal] = DiagNormal, weight: float = 1.0) -> Modality:
    """Table 8a: 784-400 ReLU both ways, sigmoid; Laplace(scale 1)."""
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 2 * latent_dim))
    decoder = nn.Sequential(nn.Linear(latent_dim, 400), nn.ReLU(), nn.Linear(400, 784), nn.Sigmoid(), nn.Unflatten(-1, (1, 28, 28)))
    return _image(encoder, decoder, (1, 28, 28), latent_dim, family, weight)


def svhn_released(latent_dim: int = 64, *, family: type[Diagonal] = DiagNormal, weight: float = 1.0) -> Modality:
    """4x4 convolutions of stride 2 (32, 64, 128), then 512, batch norm after each; transposed back; Laplace(scale 1)."""
    encoder = nn.Sequential(
        ChannelsLast(), *_down(3, 32), nn.BatchNorm2d(32), nn.ReLU(),
        *_down(32, 64), nn.BatchNorm2d(64), nn.ReLU(),
        *_down(64, 128), nn.BatchNorm2d(128), nn.ReLU(),
        nn.Conv2d(128, 512, 4), nn.BatchNorm2d(512), nn.Flatten(), nn.Linear(512, 2 * latent_dim),
    )  # fmt: skip
    return _image(encoder, _svhn_decoder(latent_dim, [128, 64, 32]), (3, 32, 32), latent_dim, family, weight)


def svhn_paper(latent_dim: int = 64, *, family: type[Diagonal] = DiagNormal, weight: float = 1.0) -> Modality:
    """Table 8b: the same convolutions without batch norm, the last one straight to the posterior's parameters; Laplace(scale 1)."""
    encoder = nn.Sequential(
        ChannelsLast(), *_down(3, 32), nn.ReLU(), *_down(32, 64), nn.ReLU(), *_down(64, 128), nn.ReLU(),
        nn.Conv2d(128, 2 * latent_dim, 4), nn.Flatten(),
    )  # fmt: skip
    return _image(encoder, _svhn_decoder(latent_dim, [128, 64, 32]), (3, 32, 32), latent_dim, family, weight)


def cub_image_paper(latent_dim: int = 64, *, scale: float = 0.01, family: type[Diagonal] = DiagNormal, weight: float = 1.0) -> Modality:
    """2048 ResNet features: 1024-512-256 ELU and back, linear output; Laplace (its scale is not published: MMVAE's 0.01)."""
    encoder = nn.Sequential(*_elu([2048, 1024, 512, 256]), nn.Linear(256, 2 * latent_dim))
    decoder = nn.Sequential(*_elu([latent_dim, 256, 512, 1024]), nn.Linear(1024, 2048))
    return Modality(
        encoder=encoder, decoder=decoder, likelihood=Laplace(scale), latent_dim=latent_dim, feature=(2048,), family=family, weight=weight
    )  # fmt: skip


def cub_text_paper(
    latent_dim: int = 64, *, vocabulary: int = 1590, embedding: int = 256, family: type[Diagonal] = DiagNormal, weight: float = 1.0
) -> Modality:
    """Sentences of 32 words as a 1 x 32 x E picture: five strided convolutions to 4 x 4, and back to a score for each word."""
    encoder = nn.Sequential(
        nn.Unflatten(-2, (1, 32)),
        *_stage(1, 32), *_stage(32, 64), *_stage(64, 128), *_stage(128, 256, tall=True), *_stage(256, 512, tall=True),
        nn.Conv2d(512, 2 * latent_dim, (4, embedding // 32), stride=1), nn.Flatten(),
    )  # fmt: skip
    decoder = nn.Sequential(
        nn.Unflatten(-1, (latent_dim, 1, 1)),
        nn.ConvTranspose2d(latent_dim, 512, (4, embedding // 32)), nn.BatchNorm2d(512), nn.ReLU(),
        *_unstage(512, 256, tall=True), *_unstage(256, 128, tall=True), *_unstage(128, 64), *_unstage(64, 32),
        nn.ConvTranspose2d(32, 1, 4, 2, 1), nn.Flatten(1, 2), nn.Linear(embedding, vocabulary),
    )  # fmt: skip
    return Modality(
        encoder=encoder,
        decoder=decoder,
        likelihood=Categorical(),
        latent_dim=latent_dim,
        feature=(32, embedding),
        embed=nn.Embedding(vocabulary, embedding, padding_idx=0),
        family=family,
        weight=weight,
    )


def _image(
    encoder: nn.Module, decoder: nn.Module, event: tuple[int, ...], latent_dim: int, family: type[Diagonal], weight: float
) -> Modality:
    return Modality(
        encoder=encoder, decoder=decoder, likelihood=Laplace(1.0), latent_dim=latent_dim, feature=event, family=family, weight=weight
    )  # fmt: skip


def _down(a: int, b: int) -> list[nn.Module]:
    return [nn.Conv2d(a, b, 4, stride=2, padding=1)]


def _svhn_decoder(latent_dim: int, widths: list[int]) -> nn.Module:
    first, *rest = [*widths, 3]
    layers: list[nn.Module] = [nn.Unflatten(-1, (latent_dim, 1, 1)), ChannelsLast(), nn.ConvTranspose2d(latent_dim, first, 4)]
    for a, b in zip(widths, rest, strict=True):
        layers += [nn.ReLU(), nn.ConvTranspose2d(a, b, 4, stride=2, padding=1)]
    return nn.Sequential(*layers, nn.Sigmoid())


def _elu(sizes: list[int]) -> list[nn.Module]:
    return [layer for a, b in zip(sizes[:-1], sizes[1:], strict=True) for layer in (nn.Linear(a, b), nn.ELU())]


def _stage(a: int, b: int, *, tall: bool = False) -> list[nn.Module]:
    """Halve both axes, or (`tall`) the embedding's alone, as the released CUB text network does once 4 positions are left."""
    conv = nn.Conv2d(a, b, (1, 4), (1, 2), (0, 1)) if tall else nn.Conv2d(a, b, 4, 2, 1)
    return [conv, nn.BatchNorm2d(b), nn.ReLU()]


def _unstage(a: int, b: int, *, tall: bool = False) -> list[nn.Module]:
    conv = nn.ConvTranspose2d(a, b, (1, 4), (1, 2), (0, 1)) if tall else nn.ConvTranspose2d(a, b, 4, 2, 1)
    return [conv, nn.BatchNorm2d(b), nn.ReLU()]
