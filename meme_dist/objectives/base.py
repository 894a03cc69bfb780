"""What an objective is, and the tables that all of them share."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from meme_dist.distributions import Components, Diagonal, Posterior
from meme_dist.modality import Modality, same_family, stack
from meme_dist.types import Batch, Loss, Packed

Shapes = Mapping[str, Sequence[tuple[int, ...]]]
Work = Callable[[str, Tensor | None], Sequence[Tensor]]
Each = Callable[[Shapes, Work, Tensor | None], list[Sequence[Tensor]]]


def in_turn(shapes: Shapes, work: Work, shared: Tensor | None) -> list[Sequence[Tensor]]:
    """`work(name, shared)` for each modality named in `shapes`, in that order: one process does it all.

    `shapes` says what each work returns, and `shared` is all that works need gradients to beside their own networks: enough for several
    ranks to share the works out (`train.modality_parallel`). So an objective calls `self.each`, which is this function on one process.
    """
    return [work(name, shared) for name in shapes]


class Objective(nn.Module, ABC):
    """A loss over partly observed rows, and the inference that goes with it.

    `forward` is what data-parallel wrappers call: a loss reached through another method would leave its gradients unsynchronised.
    Every parameter takes part in every loss, whatever the batch observes, so that no rank waits for a gradient that does not come.
    In it, networks run inside `self.each` and nowhere else.
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
        self.each: Each = in_turn

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
        shapes = {name: [(len(packed.row), self.latent_dim)] * 2 for name, packed in batch.modalities.items()}
        encoded = self.each(shapes, lambda name, _: self.modality(name).encode(batch.modalities[name].data), None)
        rows = [packed.row for packed in batch.modalities.values()]
        return stack([self._unpacked(q, row, len(batch.observed)) for q, row in zip(encoded, rows, strict=True)])

    def _unpacked(self, q: Sequence[Tensor], row: Tensor, rows: int) -> Diagonal:
        mean, scale = q
        return self.family(unpack(mean, row, rows, 0.0), unpack(scale, row, rows, 1.0))

    def reconstructions(
        self, batch: Batch, z: Float[Tensor, "N K B D"], *, own: bool = True, cross: bool = True
    ) -> Float[Tensor, "N N K B"]:
        """`reconstruction_table` of this objective's modalities."""
        modalities = {name: self.modality(name) for name in batch.modalities}
        return reconstruction_table(modalities, batch, z, own=own, cross=cross, each=self.each)


def unpack(values: Float[Tensor, "R D"], row: Tensor, rows: int, filler: float) -> Float[Tensor, "{rows} D"]:
    """Packed rows to their places; padding falls into an extra last row that is cut off."""
    full = torch.full((rows + 1, values.shape[-1]), filler, dtype=values.dtype, device=values.device)
    return full.index_copy(0, row, values)[:-1]


def reconstruction_table(
    modalities: Mapping[str, Modality],
    batch: Batch,
    z: Float[Tensor, "N K B D"],
    *,
    own: bool = True,
    cross: bool = True,
    each: Each = in_turn,
) -> Float[Tensor, "N N K B"]:
    """A[i, j, k, b] = log p_j(x_j | z[i, k, b]) where row b holds both i and j, 0 elsewhere.

    Decoder j runs once, on the rows that exist: its own (`own`) and those of every other source (`cross`). With neither own nor cross
    rows in the batch it still sees its padding, whose result is cut off.
    """
    sources, samples, rows, _ = z.shape
    places = sources * rows + 1
    asked = {name: _asked(packed, j, rows, places - 1, own, cross) for j, (name, packed) in enumerate(batch.modalities.items())}

    def decode(name: str, flat: Tensor | None) -> tuple[Tensor]:
        assert flat is not None
        source, target = asked[name]
        return (modalities[name].log_prob(batch.modalities[name].data, flat[:, source], target),)

    decoded = each({name: [(samples, len(source))] for name, (source, _) in asked.items()}, decode, by_place(z))
    columns = [a.new_zeros(samples, places).index_copy(1, source, a) for (a,), (source, _) in zip(decoded, asked.values(), strict=True)]
    return torch.stack([c[:, :-1].view(samples, sources, rows) for c in columns]).permute(2, 0, 1, 3)


def by_place(z: Float[Tensor, "N K B D"]) -> Float[Tensor, "K places D"]:
    """Samples where the index lists of a batch point to: source i of row b at i * B + b, zeros at N * B for padding."""
    return torch.cat([z.transpose(0, 1).flatten(1, 2), z.new_zeros(z.shape[1], 1, z.shape[3])], 1)


def _asked(packed: Packed, j: int, rows: int, bin_: int, own: bool, cross: bool) -> tuple[Tensor, Tensor]:
    """The places whose samples decoder j is given, and the datum of its modality that each of them is to explain."""
    place = torch.where(packed.row < rows, j * rows + packed.row, bin_)
    own_target = torch.arange(len(packed.row), device=place.device)
    source = torch.cat(([packed.source] if cross else []) + ([place] if own else []))
    target = torch.cat(([packed.target] if cross else []) + ([own_target] if own else []))
    return source, target


def pairs(observed: Bool[Tensor, "B N"]) -> Bool[Tensor, "N N B"]:
    """[i, j, b]: row b holds both i and j, and i is not j."""
    columns = observed.T
    both = columns[:, None] & columns[None]
    return both & ~torch.eye(len(columns), dtype=torch.bool, device=observed.device)[..., None]
