"""Any shards with a manifest: networks by the kind and shape of each field. No Python to write."""

from meme_dist.data.index import Manifest
from meme_dist.evaluate import Measures
from meme_dist.objectives.base import Objective
from meme_dist.recipes.base import Model, Recipe
from meme_dist.recipes.networks import modalities_for
from meme_dist.train.training import Training


def auto(
    *,
    shards: str,
    scale: float = 0.5,
    model: Model = Model(latent_dim=32, balance=True),
    training: Training = Training(steps=5000),
) -> Recipe:
    """Your own shards: any number of modalities, any of them missing anywhere.

    The folder needs a manifest, as `write_shards` makes it, and the splits "train" and "test". Each field's kind, shape and likelihood
    choose its network: convolutions for images, token convolutions for text, perceptrons for vectors and counts.

    Args:
        shards: Folder with manifest.json, index and tar files; or an address of one (s3://bucket/set), or several of either by a brace
            pattern (/data/mine-{000..003}).
        scale: Scale of Normal and Laplace likelihoods: fixed for images (pixels in [0, 1]), the start of a learned one for vectors.
        model: The objective and its size.
        training: How long and how fast.
    """

    def build(manifest: Manifest) -> Objective:
        return model.build(modalities_for(manifest.fields, model, scale=scale))

    return Recipe(build, training, shards=shards, measures=Measures(seed=training.seed))
