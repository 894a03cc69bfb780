"""Handwritten digits in three modalities, without a download: the default, and what `make demo` trains."""

from meme_dist.data.index import Manifest
from meme_dist.data.sets import digits as rows
from meme_dist.data.validation import with_validation
from meme_dist.evaluate import Measures
from meme_dist.objectives.base import Objective
from meme_dist.recipes.base import Model, Recipe
from meme_dist.recipes.networks import modalities_for
from meme_dist.train.training import Training


def digits(
    *,
    missing: float = 0.3,
    missing_in_test: float = 0.0,
    validation: float = 0.0,
    scale: float = 0.3,
    model: Model = Model(latent_dim=16, combination="product"),
    training: Training = Training(steps=1000, learning_rate=1e-3, schedule="cosine", evaluate_every=200),
) -> Recipe:
    """Real handwritten digits in three modalities: upper half, lower half, name; no download.

    1,442 images to train on and 355, mostly by other writers, to test on. A share of the training entries is taken away at random.

    Args:
        missing: Share of the training entries that are missing, up to 2/3 (each row keeps one modality).
        missing_in_test: The same for the test rows.
        validation: Share of the training rows held out as the split validation, to watch the training and choose settings on.
        scale: Scale of the images' Laplace likelihood, for pixels in [0, 1].
        model: The objective and its size.
        training: How long and how fast.
    """
    dataset = rows.digits(missing=missing, missing_in_test=missing_in_test, seed=training.seed)
    dataset = with_validation(dataset, validation, seed=training.seed)

    def build(manifest: Manifest) -> Objective:
        return model.build(modalities_for(manifest.fields, model, scale=scale))

    return Recipe(build, training, dataset, measures=Measures(seed=training.seed))
