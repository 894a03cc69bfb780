"""What a vertex type looks like to the networks of a graph: a table [types, E] that encoder, decoder and (`tied`) output share.

A one-hot type that enters a linear map picks a column of its weights, so `OneHot` already learns a vector for each type; the others share
theirs between the networks, and are `width` numbers instead of as many as there are types. How large the rows are sets how fast they
learn: `OneHot(types, scale=4)` is the control for an `Embedding` of standard normal rows, which are about as long as that for E = 16.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn


class OneHot(nn.Module):
    """scale times the unit vectors; nothing is learnt here."""

    def __init__(self, types: int, *, scale: float = 1.0):
        super().__init__()
        self.width = types
        self.register_buffer("table", scale * torch.eye(types), persistent=False)

    def forward(self) -> Float[Tensor, "types E"]:
        return torch.as_tensor(self.table)


class Embedding(nn.Module):
    """A learned vector for each type, drawn from N(0, scale^2)."""

    def __init__(self, types: int, width: int, *, scale: float = 1.0):
        super().__init__()
        self.width = width
        self.table = nn.Parameter(scale * torch.randn(types, width))

    def forward(self) -> Float[Tensor, "types E"]:
        return self.table.clone()  # engines that shard weights take them back after a module's forward: give no weight itself away


class Factored(nn.Module):
    """The sum of a learned vector for each property of a type, say its kind and its size: types that share a property share a vector.

    `properties` names those of each type. Raises ValueError where types have none, or differing numbers of them.
    """

    def __init__(self, properties: Sequence[Sequence[str]], width: int, *, scale: float = 1.0):
        super().__init__()
        if not properties or not properties[0] or len({len(own) for own in properties}) != 1:
            raise ValueError(f"properties: expected as many for each type, one at least, got {[len(own) for own in properties]}")
        columns = [sorted(set(column)) for column in zip(*properties, strict=True)]
        start = [sum(map(len, columns[:c])) for c in range(len(columns))]
        places = [[start[c] + columns[c].index(name) for c, name in enumerate(own)] for own in properties]
        self.width = width
        self.vectors = nn.Parameter(scale * len(columns) ** -0.5 * torch.randn(sum(map(len, columns)), width))
        self.register_buffer("places", torch.tensor(places), persistent=False)

    def forward(self) -> Float[Tensor, "types E"]:
        return self.vectors[torch.as_tensor(self.places)].sum(1)


Types = OneHot | Embedding | Factored
