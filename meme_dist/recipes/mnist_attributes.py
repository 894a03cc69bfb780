"""MNIST with measured attributes: blocks of the latents for thickness and slant, the rest for everything else of a digit."""

from pathlib import Path

from meme_dist.data.fields import Field
from meme_dist.data.index import Manifest
from meme_dist.data.sets import mnist_attributes as rows
from meme_dist.evaluate import Measures
from meme_dist.likelihoods import Bernoulli
from meme_dist.modalities.attribute import Attribute
from meme_dist.modalities.vector import mlp
from meme_dist.modality import Modality
from meme_dist.objectives.base import Objective
from meme_dist.recipes.base import Model, Recipe
from meme_dist.recipes.networks import modality_for
from meme_dist.train.training import Training

# By HSIC: an adversary leaves z at .56 and .64 (base .48 and .47), and the heavier it weighs the more z tells (docs/results.md).
BEST = Model(objective="csvae", latent_dim=20, independence="hsic", independence_weight=10_000.0)


def mnist_attributes(
    *,
    source: Path,
    rows_in_all: int | None = None,
    unlabelled: float = 0.0,
    data_seed: int = 0,
    block: int = 2,
    label_weight: float = 30.0,
    hidden: int = 512,
    model: Model = BEST,
    training: Training = Training(steps=6000, batch_size=256, learning_rate=1e-3, schedule="cosine", evaluate_every=2000),
) -> Recipe:
    """MNIST digits with two attributes measured from their pixels: thick, and leaning to the right.

    Half of the training digits have each of them. 10,000 rows to test on.

    Args:
        source: Folder with mnist.npz.
        rows_in_all: Training images, at random; by default all 60,000.
        unlabelled: Share of the training rows that lack each attribute.
        data_seed: Seed of the rows and of what they lack; --seed leaves them as they are.
        block: How many latents each attribute has (csvae); the first of all are free of both.
        label_weight: How often log p(label | its latents) counts (csvae).
        hidden: Width of the networks' two layers.
        model: The objective and its size.
        training: How long and how fast.
    """
    dataset = rows.mnist_attributes(source=source, rows=rows_in_all, unlabelled=unlabelled, seed=data_seed)

    def build(manifest: Manifest) -> Objective:
        weights = model.weights(manifest.fields)
        digit = mlp(
            (1, 28, 28),
            latent_dim=model.latent_dim,
            hidden=(hidden, hidden),
            likelihood=Bernoulli(),
            family=model.family,
            weight=weights["digit"],
        )
        names = [name for name in manifest.fields if name != "digit"]
        first = model.latent_dim - block * len(names)
        label = dict.fromkeys(names, label_weight) if model.objective == "csvae" else weights
        flags = {name: _flag(manifest.fields[name], model, first + place * block, block, label[name]) for place, name in enumerate(names)}
        return model.build({"digit": digit, **flags})

    return Recipe(build, training, dataset, measures=Measures(seed=training.seed))


def _flag(field: Field, model: Model, start: int, size: int, weight: float) -> Modality:
    if model.objective != "csvae":
        return modality_for(field, latent_dim=model.latent_dim, family=model.family, weight=weight)
    return Attribute(start=start, size=size, latent_dim=model.latent_dim, weight=weight)
