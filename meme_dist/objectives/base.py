"""What an objective is, and the tables that all of them share."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from meme_dist.distributions import Components, Diagonal, Posterior
from meme_dist.modality import Modality, same_family, stack
from meme_dist.types import Batch, Loss, Packed


class Objective(nn.Module, ABC):
    """A loss over partly observed rows, and the inference that goes with it.

    `forward` is what data-parallel wrappers call: a loss reached through another method would leave its gradients unsynchronised.
    Every parameter takes part in every loss, whatever the batch observes, so that no rank waits for a gradient that does not come.
    """

    modalities: nn.ModuleDict

    def __init__(self, modalities: Mapping[str, Modality]):
        super().__init__()
        if len(modalities) < 2:
            raise ValueError(f"an objective needs at least two modalities, got {list(modalities)}")
        sizes = {name: m.latent_dim for name, m in modalities.items()}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"all modalities need one latent size, got {sizes}")
        self.modalities = nn.ModuleDict(modalities)
        self.latent_dim = next(iter(sizes.values()))
        self.family = same_family(modalities)

    @abstractmethod
    def forward(self, batch: Batch) -> Loss:
        """The summed negative bound of the batch's rows."""

    @abstractmethod
    def infer(self, batch: Batch) -> Posterior:
        """q(z | what each row observes)."""

    @abstractmethod
    def prior(self) -> Components:
        """The generative prior p(z), for joint samples and likelihoods."""

    @abstractmethod
    def initialise(self, batch: Batch) -> None:
        """Set data-dependent parameters from one batch, once, before training."""

    def modality(self, name: str) -> Modality:
        """The modality of that name."""
        return cast(Modality, self.modalities[name])

    def posteriors(self, batch: Batch) -> Diagonal:
        """q_j(z | x_j) for the batch's modalities, stacked [N, B, D]; a standard density where x_j is absent."""
        return stack([self._posterior(name, packed, len(batch.observed)) for name, packed in batch.modalities.items()])

    def _posterior(self, name: str, packed: Packed, rows: int) -> Diagonal:
        q = self.modality(name).encode(packed.data)
        return type(q)(unpack(q.mean, packed.row, rows, 0.0), unpack(q.scale, packed.row, rows, 1.0))


def unpack(values: Float[Tensor, "R D"], row: Tensor, rows: int, filler: float) -> Float[Tensor, "{rows} D"]:
    """Packed rows to their places; padding falls into an extra last row that is cut off."""
    full = torch.full((rows + 1, values.shape[-1]), filler, dtype=values.dtype, device=values.device)
    return full.index_copy(0, row, values)[:-1]


def reconstruction_table(
    modalities: Mapping[str, Modality], batch: Batch, z: Float[Tensor, "N K B D"], *, own: bool = True, cross: bool = True
) -> Float[Tensor, "N N K B"]:
    """A[i, j, k, b] = log p_j(x_j | z[i, k, b]) where row b holds both i and j, 0 elsewhere.

    Decoder j runs once, on the rows that exist: its own (`own`) and those of every other source (`cross`). With neither own nor cross
    rows in the batch it still sees its padding, whose result is cut off.
    """
    sources, samples, rows, _ = z.shape
    flat = by_place(z)
    columns = [_column(modalities[name], packed, flat, j, rows, own, cross) for j, (name, packed) in enumerate(batch.modalities.items())]
    return torch.stack([c[:, :-1].view(samples, sources, rows) for c in columns]).permute(2, 0, 1, 3)


def by_place(z: Float[Tensor, "N K B D"]) -> Float[Tensor, "K places D"]:
    """Samples where the index lists of a batch point to: source i of row b at i * B + b, zeros at N * B for padding."""
    return torch.cat([z.transpose(0, 1).flatten(1, 2), z.new_zeros(z.shape[1], 1, z.shape[3])], 1)


def _column(modality: Modality, packed: Packed, flat: Tensor, j: int, rows: int, own: bool, cross: bool) -> Float[Tensor, "K places"]:
    bin_ = flat.shape[1] - 1
    place = torch.where(packed.row < rows, j * rows + packed.row, bin_)
    own_target = torch.arange(len(packed.data), device=place.device)
    source = torch.cat(([packed.source] if cross else []) + ([place] if own else []))
    target = torch.cat(([packed.target] if cross else []) + ([own_target] if own else []))
    log_prob = modality.log_prob(packed.data, flat[:, source], target)
    return log_prob.new_zeros(flat.shape[:2]).index_copy(1, source, log_prob)


def pairs(observed: Bool[Tensor, "B N"]) -> Bool[Tensor, "N N B"]:
    """[i, j, b]: row b holds both i and j, and i is not j."""
    columns = observed.T
    both = columns[:, None] & columns[None]
    return both & ~torch.eye(len(columns), dtype=torch.bool, device=observed.device)[..., None]
