"""MNIST digits over photographs, 2 to 10 modalities: how a model scales with their number, and whether it pools what several say."""

from pathlib import Path

from meme_dist.data.index import Manifest
from meme_dist.data.sets import polymnist as rows
from meme_dist.data.validation import with_validation
from meme_dist.evaluate import Measures
from meme_dist.likelihoods import Laplace
from meme_dist.modalities.image import conv
from meme_dist.objectives.base import Objective
from meme_dist.recipes.base import Model, Recipe
from meme_dist.train.training import Training

IMAGE = (3, rows.SIDE, rows.SIDE)


def polymnist(
    *,
    source: Path,
    modalities: int = 5,
    rows_in_all: int = 20_000,
    missing: float = 0.0,
    data_seed: int = 0,
    validation: float = 0.0,
    channels: tuple[int, ...] = (16, 32, 64),
    scale: float = 0.1,
    model: Model = Model(latent_dim=32, samples=1, inference="product"),
    training: Training = Training(steps=1000, batch_size=32, learning_rate=1e-3, schedule="cosine", warmup=100, evaluate_every=500),
) -> Recipe:
    """MNIST digits over photographs in 2 to 10 modalities, made as PolyMNIST is; --source FOLDER.

    The same digit in every modality, each in another hand and over its own photograph. 10,000 rows to test on.

    Args:
        source: Folder with mnist.npz and photographs (.png, there or in its folder photographs): one a modality, or they come again turned.
        modalities: How many there are, 2 to 10.
        rows_in_all: Rows to train on, up to 60,000 (then five modalities fill 0.9 GB of shards).
        missing: Share of the training entries that are missing (each row keeps one modality).
        data_seed: Seed of the rows and of what is missing in them; --seed leaves them as they are.
        validation: Share of the training rows held out as the split validation, to watch the training and choose settings on.
        channels: Of the convolutions, each of which halves the image; 32 64 128 is usual, and costs several times as much.
        scale: Scale of the images' Laplace likelihood, for pixels in [0, 1].
        model: The objective and its size.
        training: How long and how fast.
    """
    dataset = rows.polymnist(source=source, modalities=modalities, rows=rows_in_all, missing=missing, seed=data_seed)
    dataset = with_validation(dataset, validation, seed=data_seed)

    def build(manifest: Manifest) -> Objective:
        weights = model.weights(manifest.fields)
        size, family = model.latent_dim, model.family
        networks = {
            name: conv(IMAGE, latent_dim=size, channels=channels, likelihood=Laplace(scale), family=family, weight=weight)
            for name, weight in weights.items()
        }
        return model.build(networks)

    return Recipe(build, training, dataset, measures=Measures(seed=training.seed))
