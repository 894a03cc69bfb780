"""RNA and protein counts of the same cells: two modalities of counts, 1,000 against 49, without labels."""

from pathlib import Path

from meme_dist.data.index import Manifest
from meme_dist.data.sets import citeseq as rows
from meme_dist.data.validation import with_validation
from meme_dist.evaluate import Measures
from meme_dist.objectives.base import Objective
from meme_dist.recipes.base import Model, Recipe
from meme_dist.recipes.networks import modalities_for
from meme_dist.train.training import Training


def citeseq(
    *,
    source: Path,
    missing: float = 0.0,
    data_seed: int = 0,
    validation: float = 0.0,
    model: Model = Model(latent_dim=16, pseudo_inputs=50, samples=5, combination="product"),
    training: Training = Training(steps=300, batch_size=64, learning_rate=1e-3, schedule="cosine", weight_decay=0.01, evaluate_every=50),
) -> Recipe:
    """RNA and surface-protein counts of 500 blood cells, negative binomial; --source FOLDER.

    400 cells to train on and 100 to test on; they have no labels.

    Args:
        source: Folder with citeseq_pbmc_eccite.npz.
        missing: Share of the training entries that are missing, up to 1/2 (each cell keeps one modality).
        data_seed: Seed of the rows' order and of what is missing in them; --seed leaves them as they are.
        validation: Share of the training rows held out as the split validation, to watch the training and choose settings on.
        model: The objective and its size.
        training: How long and how fast.
    """
    dataset = rows.citeseq(source=source, missing=missing, seed=data_seed)
    dataset = with_validation(dataset, validation, seed=data_seed)

    def build(manifest: Manifest) -> Objective:
        return model.build(modalities_for(manifest.fields, model, scale=1.0))

    return Recipe(build, training, dataset, measures=Measures(seed=training.seed))
