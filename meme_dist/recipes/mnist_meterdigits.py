"""MNIST with photographed meter digits, up to four modalities: the experiment of the paper where SVHN cannot be had."""

from pathlib import Path
from typing import Literal

from meme_dist.data.fields import Field
from meme_dist.data.index import Manifest
from meme_dist.data.sets import mnist_meterdigits as rows
from meme_dist.data.validation import with_validation
from meme_dist.evaluate import Measures
from meme_dist.likelihoods import Normal
from meme_dist.modalities.image import conv
from meme_dist.modality import Modality
from meme_dist.objectives.base import Objective
from meme_dist.recipes.base import Model, Recipe
from meme_dist.recipes.mnist_svhn import RELEASED_MODEL, RELEASED_TRAINING, Networks, digit, photo
from meme_dist.recipes.networks import modality_for
from meme_dist.train.training import Training


def mnist_meterdigits(
    *,
    source: Path,
    spoken: bool = False,
    name: bool = False,
    permutations: int = 3,
    paired_fraction: float = 1.0,
    always: Literal["split", "mnist", "photo", "spoken", "name"] = "split",
    unpaired: bool = True,
    pairing_seed: int = 0,
    validation: float = 0.0,
    networks: Networks = "released",
    model: Model = RELEASED_MODEL,
    training: Training = RELEASED_TRAINING,
) -> Recipe:
    """MNIST with photographed meter digits, paired by digit, and two more modalities if wanted.

    `mnist_meterdigits` is the setting of the authors' MNIST-SVHN code, `mnist_meterdigits:paper` that of the paper's text.

    Args:
        source: Folder with mnist.npz and meterdigits.npz (and fsdd_logmel_32x32.npz for --spoken).
        spoken: Add spoken digits, as log-mel spectrograms.
        name: Add the digit's English name, letter by letter.
        permutations: How often each photograph is used at most.
        paired_fraction: Share of the training rows that stay whole.
        always: Which modality the other rows keep: one of them always, or any with equal probability (split).
        unpaired: Train on those rows too; without them it is the control, pairs only.
        pairing_seed: Seed of the pairs and of their order in the shards; --seed leaves them as they are.
        validation: Share of the training rows held out as the split validation, to watch the training and choose settings on; all rows of a
            photograph are on one side.
        networks: For the two images: the networks of the released code, of the paper's appendix K, or with group norm for the photographs.
        model: The objective and its size.
        training: How long and how fast.
    """
    dataset = rows.mnist_meterdigits(
        source=source,
        spoken=spoken,
        name=name,
        permutations=permutations,
        paired_fraction=paired_fraction,
        always=always,
        unpaired=unpaired,
        seed=pairing_seed,
    )
    dataset = with_validation(dataset, validation, seed=pairing_seed, apart="photo")

    def build(manifest: Manifest) -> Objective:
        weights = model.weights(manifest.fields)
        return model.build({key: _modality(key, field, networks, model, weights[key]) for key, field in manifest.fields.items()})

    return Recipe(build, training, dataset, measures=Measures(seed=training.seed))


def _modality(key: str, field: Field, networks: Networks, model: Model, weight: float) -> Modality:
    match key:
        case "mnist":
            return digit(networks, model, weight)
        case "photo":
            return photo(networks, model, weight)
        case "spoken":  # standardised energies, of any sign
            likelihood = Normal(1.0, learned=True)
            return conv((1, 32, 32), latent_dim=model.latent_dim, likelihood=likelihood, family=model.family, weight=weight, bounded=False)
        case _:
            return modality_for(field, latent_dim=model.latent_dim, family=model.family, weight=weight)
