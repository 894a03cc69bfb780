"""Six real views of handwritten digits: views of unequal information, down to six numbers."""

from pathlib import Path

from meme_dist.data.index import Manifest
from meme_dist.data.sets import mfeat as rows
from meme_dist.data.validation import with_validation
from meme_dist.evaluate import Measures
from meme_dist.objectives.base import Objective
from meme_dist.recipes.base import Model, Recipe
from meme_dist.recipes.networks import modalities_for
from meme_dist.train.training import Training


def mfeat(
    *,
    source: Path,
    missing: float = 0.0,
    data_seed: int = 0,
    validation: float = 0.0,
    scale: float = 1.0,
    model: Model = Model(latent_dim=16, samples=5, combination="product"),
    training: Training = Training(steps=1000, batch_size=64, learning_rate=1e-3, schedule="cosine", evaluate_every=200),
) -> Recipe:
    """Six real views of 2,000 handwritten digits (UCI Multiple Features); --source FOLDER.

    Views of 6 to 240 numbers. 1,500 rows to train on and 500 to test on.

    Args:
        source: Folder with mfeat_six_views.npz.
        missing: Share of the training entries that are missing, up to 5/6 (each row keeps one view).
        data_seed: Seed of the rows' order and of what is missing in them; --seed leaves them as they are.
        validation: Share of the training rows held out as the split validation, to watch the training and choose settings on.
        scale: Where the learned scales of the Normal likelihoods start, for standardised features.
        model: The objective and its size.
        training: How long and how fast.
    """
    dataset = rows.mfeat(source=source, missing=missing, seed=data_seed)
    dataset = with_validation(dataset, validation, seed=data_seed)

    def build(manifest: Manifest) -> Objective:
        return model.build(modalities_for(manifest.fields, model, scale=scale))

    return Recipe(build, training, dataset, measures=Measures(seed=training.seed))
