"""Planted evidence: whether a model pools what several noisy views say, against a ceiling that is known exactly."""

from pathlib import Path

from meme_dist.data.index import Manifest
from meme_dist.data.sets import planted as rows
from meme_dist.data.validation import with_validation
from meme_dist.evaluate import Measures
from meme_dist.objectives.base import Objective
from meme_dist.recipes.base import Model, Recipe
from meme_dist.recipes.networks import modalities_for
from meme_dist.train.training import Training

# One sample a row, for the best guess rather than all of the doubt; posteriors trained with mixtures and multiplied when asked; likelihoods
# that count 20 times (docs/results.md).
BEST = Model(latent_dim=16, samples=1, inference="product", likelihood_weight=20.0)


def planted(
    *,
    images: rows.Images = "digits",
    source: Path | None = None,
    sources: int = 3,
    noise: float = 0.3,
    rows_in_all: int = 20_000,
    missing: float = 0.0,
    data_seed: int = 0,
    validation: float = 0.0,
    scale: float = 0.3,
    model: Model = BEST,
    training: Training = Training(steps=2000, batch_size=128, learning_rate=1e-3, schedule="cosine", evaluate_every=500),
) -> Recipe:
    """Noisy views of a class and a clean one, with a known ceiling of coherence; no download.

    Each source shows an image of the class with probability 1 - noise, else of another one; the target is always right. From 1, 2, 3 and
    4 sources at noise 0.3 the best guess of ten classes is right with probability .700, .700, .840 and .915, and a draw from the exact
    posterior with .500, .658, .808 and .890 (`meme_dist.data.sets.planted`): no model's cross coherence of sources -> target can exceed
    the first, and one whose samples follow the posterior exactly has the second. 4,000 rows to test on.

    Args:
        images: What the views show: scikit-learn's digits (8 x 8, no file needed), or MNIST or Fashion-MNIST, averaged to 14 x 14.
        source: Folder with mnist.npz or fashion_subset_20000_4000.npz, for those two.
        sources: How many noisy views there are beside the target, 1 to 9.
        noise: Probability that a source shows another class.
        rows_in_all: Rows to train on.
        missing: Share of the training entries that are missing (each row keeps one view).
        data_seed: Seed of the rows and of what is missing in them; --seed leaves them as they are.
        validation: Share of the training rows held out as the split validation, to watch the training and choose settings on.
        scale: Where the learned scales of the Normal likelihoods start, for pixels in [0, 1].
        model: The objective and its size.
        training: How long and how fast.
    """
    dataset = rows.planted(images=images, source=source, sources=sources, noise=noise, rows=rows_in_all, missing=missing, seed=data_seed)
    dataset = with_validation(dataset, validation, seed=data_seed)

    def build(manifest: Manifest) -> Objective:
        return model.build(modalities_for(manifest.fields, model, scale=scale))

    numbers = range(1, sources + 1)
    ceilings = {"target": {number: rows.ceiling(number, noise=noise) for number in numbers}}
    sampling = {"target": {number: rows.sampling_ceiling(number, noise=noise) for number in numbers}}
    return Recipe(build, training, dataset, measures=Measures(seed=training.seed, ceilings=ceilings, sampling_ceilings=sampling))
