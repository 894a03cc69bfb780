"""Birds in captions, part locations, visible parts and attributes: text with vectors, where no modality is an image."""

from pathlib import Path

from meme_dist.data.index import Manifest
from meme_dist.data.sets import cub as rows
from meme_dist.evaluate import Measures
from meme_dist.objectives.base import Objective
from meme_dist.recipes.base import Model, Recipe
from meme_dist.recipes.networks import modalities_for
from meme_dist.train.training import Training

COMPONENTS = 40  # of canonical correlations between captions and the rest: Shi et al. 2019, Joy et al. 2022


def cub(
    *,
    source: Path,
    captions: int = 10,
    missing: float = 0.0,
    data_seed: int = 0,
    scale: float = 1.0,
    model: Model = Model(latent_dim=32, samples=3, combination="product"),
    training: Training = Training(steps=1000, batch_size=32, learning_rate=1e-3, schedule="cosine", warmup=100, evaluate_every=500),
) -> Recipe:
    """Birds in four modalities: caption, part locations, visible parts, attributes (CUB); --source FOLDER.

    1,923 images, without their pixels, to train on and 470 to test on, of 41 kinds of bird. The files are read whenever the recipe is
    built, also to continue or evaluate a run: the vocabulary comes from them.

    Args:
        source: Folder with cub_test2933_parts_attrs.npz and captions_testclasses.txt.gz.
        captions: Training rows of an image, each with another of its ten captions.
        missing: Share of the training entries that are missing, up to 3/4 (each row keeps one modality).
        data_seed: Seed of the rows, their captions and what is missing in them; --seed leaves them as they are.
        scale: Where the learned scale of the part locations' Normal likelihood starts; they are standardised.
        model: The objective and its size.
        training: How long and how fast.
    """
    dataset = rows.cub(source=source, captions=captions, missing=missing, seed=data_seed)

    def build(manifest: Manifest) -> Objective:
        return model.build(modalities_for(manifest.fields, model, scale=scale))

    return Recipe(build, training, dataset, measures=Measures(seed=training.seed, correlation_components=COMPONENTS))
