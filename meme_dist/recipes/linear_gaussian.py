"""Linear-Gaussian rows, whose evidence is known exactly: the smallest thing that trains, and a check of everything above it."""

from torch import nn

from meme_dist.data.index import Manifest
from meme_dist.data.sets import linear_gaussian as rows
from meme_dist.distributions import Diagonal
from meme_dist.evaluate import Measures
from meme_dist.likelihoods import Normal
from meme_dist.modality import Modality
from meme_dist.objectives.base import Objective
from meme_dist.recipes.base import Model, Recipe
from meme_dist.train.training import Training


def linear_gaussian(
    *,
    modalities: int = 3,
    rows_in_all: int = 2000,
    event: int = 4,
    missing: float = 0.3,
    model: Model = Model(
        latent_dim=2, cross_weight=1.0, log_ratio="sampled", estimator="rao_blackwell", combination="product_with_standard"
    ),
    training: Training = Training(steps=1000, learning_rate=5e-3, schedule="cosine"),
) -> Recipe:
    """Linear-Gaussian rows with exactly known evidence; seconds to train, no download.

    Args:
        modalities: How many there are.
        rows_in_all: Rows to train on; a quarter as many to test on.
        event: Size of each modality's vector.
        missing: Share of the training entries that are missing.
        model: The objective and its size; the latent size is also that of the data.
        training: How long and how fast.
    """
    dataset = rows.linear_gaussian(
        modalities=modalities, rows=rows_in_all, latent_dim=model.latent_dim, event=event, missing=missing, seed=training.seed
    )

    def build(manifest: Manifest) -> Objective:
        return model.build({name: linear(event, model.latent_dim, family=model.family) for name in manifest.fields})

    return Recipe(build, training, dataset, measures=Measures(seed=training.seed))


def linear(event: int, latent_dim: int, *, family: type[Diagonal]) -> Modality:
    """A linear encoder and a linear decoder with a learned scale: they can be exact here."""
    return Modality(
        encoder=nn.Linear(event, 2 * latent_dim),
        decoder=nn.Linear(latent_dim, event),
        likelihood=Normal(1.0, learned=True),
        latent_dim=latent_dim,
        feature=(event,),
        family=family,
    )
