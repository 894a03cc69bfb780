"""Three omics of breast tumours, one of which nobody measured in the test part: few rows, many features, truly missing data."""

from pathlib import Path

from meme_dist.data.index import Manifest
from meme_dist.data.sets import tcga as rows
from meme_dist.data.validation import with_validation
from meme_dist.evaluate import Measures
from meme_dist.objectives.base import Objective
from meme_dist.recipes.base import Model, Recipe
from meme_dist.recipes.networks import modalities_for
from meme_dist.train.training import Training


def tcga(
    *,
    source: Path,
    data_seed: int = 0,
    validation: float = 0.0,
    scale: float = 1.0,
    model: Model = Model(latent_dim=8, pseudo_inputs=50, samples=5, combination="product", dropout=0.6),
    training: Training = Training(steps=400, batch_size=50, learning_rate=1e-3, schedule="cosine", weight_decay=0.01, evaluate_every=50),
) -> Recipe:
    """mRNA, miRNA and protein of breast tumours; the test part truly lacks protein; --source FOLDER.

    150 tumours to train on and 70 to test on, of three subtypes.

    Args:
        source: Folder with tcga_breast_mrna_mirna_protein.npz.
        data_seed: Seed of the rows' order; --seed leaves it as it is.
        validation: Share of the training rows held out as the split validation, to watch the training and choose settings on.
        scale: Where the learned scales of the Normal likelihoods start, for standardised features.
        model: The objective and its size.
        training: How long and how fast.
    """
    dataset = rows.tcga(source=source, seed=data_seed)
    dataset = with_validation(dataset, validation, seed=data_seed)

    def build(manifest: Manifest) -> Objective:
        return model.build(modalities_for(manifest.fields, model, scale=scale))

    return Recipe(build, training, dataset, measures=Measures(seed=training.seed))
