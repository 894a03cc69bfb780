"""What recipes of graphs share: the networks of a graph and its value."""

from collections.abc import Mapping, Sequence
from typing import Literal

from meme_dist.data.fields import Field
from meme_dist.likelihoods import Normal
from meme_dist.modalities.graph import graph
from meme_dist.modalities.graph_types import Embedding, Factored, OneHot, Types
from meme_dist.modalities.vector import mlp
from meme_dist.modality import Modality
from meme_dist.recipes.base import Model

Vertices = Literal["one_hot", "one_hot_x4", "embedding", "embedding_small", "tied", "factored"]
LOUD, SMALL = 4.0, 0.25


def types_of(vertices: Vertices, types: int, *, width: int, properties: Sequence[Sequence[str]] | None = None) -> Types:
    """The table of vertex types of that name. Raises ValueError for factored ones of types without properties."""
    match vertices:
        case "one_hot":
            return OneHot(types)
        case "one_hot_x4":
            return OneHot(types, scale=LOUD)
        case "embedding":
            return Embedding(types, width)
        case "embedding_small" | "tied":
            return Embedding(types, width, scale=SMALL)
        case "factored":
            if properties is None:
                raise ValueError("vertices 'factored': these types have no properties; take one_hot, embedding or tied")
            return Factored(properties, width)


def graph_and_value(
    fields: Mapping[str, Field],
    model: Model,
    *,
    vertices: Vertices,
    width: int,
    hidden: int,
    scale: float,
    properties: Sequence[Sequence[str]] | None = None,
) -> dict[str, Modality]:
    """A graph's networks, and a perceptron with a learned scale for its value."""
    plan, weights = fields["graph"], model.weights(fields)
    made = graph(
        plan.shape[0],
        types=types_of(vertices, len(plan.vocabulary), width=width, properties=properties),
        latent_dim=model.latent_dim,
        hidden=hidden,
        tied=vertices == "tied",
        family=model.family,
        weight=weights["graph"],
    )
    value = mlp(
        fields["value"].shape,
        latent_dim=model.latent_dim,
        hidden=(64, 64),
        likelihood=Normal(scale, learned=True),
        family=model.family,
        weight=weights["value"],
    )
    return {"graph": made, "value": value}
