"""The swiss roll: latents for where a point is on the roll, and a block of their own for which half of its width it is in."""

from torch import Tensor, nn

from meme_dist.data.index import Manifest
from meme_dist.data.sets import swiss_roll as rows
from meme_dist.evaluate import Measures
from meme_dist.likelihoods import Normal
from meme_dist.modalities.attribute import Attribute
from meme_dist.modalities.vector import layers
from meme_dist.modality import Modality
from meme_dist.objectives.base import Objective
from meme_dist.recipes.base import Model, Recipe
from meme_dist.recipes.networks import modality_for
from meme_dist.train.training import Training

UNIT = 10.0  # of a coordinate: networks see points of about 1


def swiss_roll(
    *,
    rows_in_all: int = 10_000,
    noise: float = 0.0,
    unlabelled: float = 0.0,
    data_seed: int = 0,
    block: int = 2,
    label_weight: float = 30.0,
    scale: float = 0.5,
    hidden: int = 64,
    model: Model = Model(objective="csvae", latent_dim=4),
    training: Training = Training(steps=5000, batch_size=256, learning_rate=2e-3, schedule="cosine", evaluate_every=1000),
) -> Recipe:
    """Points of a swiss roll and which half of its width they are in: the toy of CSVAE; no download.

    4,000 rows to test on. The points' likelihood is Normal with a fixed scale, in the units of the points (the roll's radius is 14).

    Args:
        rows_in_all: Rows to train on.
        noise: Standard deviation of what is added to each coordinate.
        unlabelled: Share of the training rows without a label.
        data_seed: Seed of the rows; --seed leaves them as they are.
        block: How many of the latents are the label's (csvae); the first ones are free of it.
        label_weight: How often log p(label | its latents) counts (csvae).
        scale: Of the points' likelihood.
        hidden: Width of the networks' three layers.
        model: The objective and its size.
        training: How long and how fast.
    """
    dataset = rows.swiss_roll(rows=rows_in_all, noise=noise, unlabelled=unlabelled, seed=data_seed)

    def build(manifest: Manifest) -> Objective:
        weights = model.weights(manifest.fields)
        point = points(model, scale=scale, hidden=hidden, weight=weights["point"])
        if model.objective != "csvae":
            settings = {"latent_dim": model.latent_dim, "family": model.family, "weight": weights["low"]}
            return model.build({"point": point, "low": modality_for(manifest.fields["low"], **settings)})
        low = Attribute(start=model.latent_dim - block, size=block, latent_dim=model.latent_dim, weight=label_weight)
        return model.build({"point": point, "low": low})

    return Recipe(build, training, dataset, measures=Measures(seed=training.seed))


def points(model: Model, *, scale: float, hidden: int, weight: float) -> Modality:
    """Perceptrons with three hidden layers, between points in units of 10 and the latents."""
    widths = (hidden, hidden, hidden)
    return Modality(
        encoder=nn.Sequential(Times(1 / UNIT), *layers([3, *widths]), nn.Linear(hidden, 2 * model.latent_dim)),
        decoder=nn.Sequential(*layers([model.latent_dim, *widths]), nn.Linear(hidden, 3), Times(UNIT)),
        likelihood=Normal(scale),
        latent_dim=model.latent_dim,
        feature=(3,),
        family=model.family,
        weight=weight,
    )


class Times(nn.Module):
    """A change of units."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """factor x."""
        return self.factor * x
