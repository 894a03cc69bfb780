"""A sensible network for any field: by its kind, its shape and its likelihood."""

from collections.abc import Mapping
from math import prod

from meme_dist.data.fields import PAD, Field
from meme_dist.distributions import Diagonal
from meme_dist.likelihoods import Bernoulli, Laplace, Likelihood, NegativeBinomial, Normal, Poisson
from meme_dist.modalities.graph import graph
from meme_dist.modalities.graph_types import Embedding
from meme_dist.modalities.image import conv
from meme_dist.modalities.text import conv_text
from meme_dist.modalities.vector import mlp
from meme_dist.modality import Modality
from meme_dist.recipes.base import Model

SMALLEST_CONV = 16  # pixels: below it a perceptron sees the whole image at once for less
SMALL_VOCABULARY = 100
TYPE_WIDTH = 16  # of a vertex type's vector


def modalities_for(fields: Mapping[str, Field], model: Model, *, scale: float) -> dict[str, Modality]:
    """A modality for each field, with the weights of `model`; `scale` is that of Normal and Laplace likelihoods."""
    weights = model.weights(fields)
    return {
        name: modality_for(field, latent_dim=model.latent_dim, family=model.family, weight=weights[name], scale=scale)
        for name, field in fields.items()
    }


def modality_for(field: Field, *, latent_dim: int, family: type[Diagonal], weight: float = 1.0, scale: float = 1.0) -> Modality:
    """Images of 16 pixels and more: convolutions down to about 4; text: convolutions over tokens; graphs: messages; all else: a perceptron.

    Images have a fixed scale (their pixels have a known unit), vectors learn theirs, starting from `scale`.
    """
    if field.kind == "text":
        return _text(field, latent_dim=latent_dim, family=family, weight=weight)
    if field.kind == "graph":
        types = Embedding(len(field.vocabulary), TYPE_WIDTH)
        return graph(field.shape[0], types=types, latent_dim=latent_dim, family=family, weight=weight)
    likelihood, image = _likelihood(field, scale), field.kind == "image"
    bounded = image and field.likelihood != "bernoulli"
    if image and min(field.shape[1:]) >= SMALLEST_CONV:
        channels = _channels(min(field.shape[1:]))
        event = (field.shape[0], field.shape[1], field.shape[2])
        return conv(event, latent_dim=latent_dim, channels=channels, likelihood=likelihood, family=family, weight=weight, bounded=bounded)
    hidden = (256, 256) if prod(field.shape) < 256 else (512, 512)
    counts = field.kind == "counts"
    return mlp(
        field.shape,
        latent_dim=latent_dim,
        hidden=hidden,
        likelihood=likelihood,
        family=family,
        weight=weight,
        log_input=counts,
        bounded=bounded,
    )


def _text(field: Field, *, latent_dim: int, family: type[Diagonal], weight: float) -> Modality:
    """Letters and other small vocabularies need a quarter of the width that words do."""
    words = len(field.vocabulary)
    embedding, hidden = (32, 64) if words <= SMALL_VOCABULARY else (64, 256)
    return conv_text(
        field.shape[0],
        vocabulary=words,
        latent_dim=latent_dim,
        embedding=embedding,
        hidden=hidden,
        family=family,
        weight=weight,
        padding=PAD,
    )


def _likelihood(field: Field, scale: float) -> Likelihood:
    learned = field.kind != "image"
    match field.likelihood:
        case "normal":
            return Normal(scale, learned=learned)
        case "laplace":
            return Laplace(scale, learned=learned)
        case "bernoulli":
            return Bernoulli()
        case "poisson":
            return Poisson()
        case "negative_binomial":
            return NegativeBinomial(field.shape)
        case "categorical":
            raise ValueError(f"{field.kind} with a categorical likelihood: only text and graphs have one")


def _channels(smallest: int) -> tuple[int, ...]:
    """A halving for each factor of two above 4 pixels, five at most: 32, 64, 128, 256, 256."""
    halvings = max(1, min(5, (smallest - 1).bit_length() - 2))
    return (32, 64, 128, 256, 256)[:halvings]
