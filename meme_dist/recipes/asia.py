"""Bayesian networks as graphs, and how well each fits a sample."""

from pathlib import Path

from meme_dist.data.index import Manifest
from meme_dist.data.sets import asia as rows
from meme_dist.evaluate import Measures
from meme_dist.objectives.base import Objective
from meme_dist.recipes.base import Model, Recipe
from meme_dist.recipes.graphs import Vertices, graph_and_value
from meme_dist.train.training import Training


def asia(
    *,
    source: Path,
    missing: float = 0.0,
    data_seed: int = 0,
    vertices: Vertices = "embedding",
    width: int = 16,
    hidden: int = 64,
    scale: float = 0.5,
    model: Model = Model(latent_dim=32, samples=5, pseudo_inputs=50),
    training: Training = Training(steps=3000, batch_size=128, learning_rate=2e-3, schedule="cosine", clip=100.0),
) -> Recipe:
    """Bayesian networks over eight variables as graphs, and the BIC of each; --source FOLDER.

    18,000 to train on and 2,000 to test on.

    Args:
        source: Folder with asia_bn_20000_regenerated.npz.
        missing: Share of the training entries that are missing, up to one half (each row keeps its graph or its value).
        data_seed: Seed of the rows' order and of what is missing in them; --seed leaves them as they are.
        vertices: How a vertex type enters the networks: one_hot, one_hot_x4 (four times as large: the control), embedding (standard normal
            at first), embedding_small (a quarter of it), tied (small, and also the output's weights).
        width: Numbers of a type's vector, where it is learned.
        hidden: Numbers of a vertex's state.
        scale: Where the learned scale of the value's Normal likelihood starts; values are standardised.
        model: The objective and its size.
        training: How long and how fast.
    """
    dataset = rows.asia(source=source, missing=missing, seed=data_seed)

    def build(manifest: Manifest) -> Objective:
        parts = graph_and_value(manifest.fields, model, vertices=vertices, width=width, hidden=hidden, scale=scale)
        return model.build(parts)

    return Recipe(build, training, dataset, measures=Measures(seed=training.seed))
