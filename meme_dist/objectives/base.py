"""What an objective is, and the tables that all of them share."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import cast

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from meme_dist.distributions import Diagonal, Posterior, Prior
from meme_dist.modality import Encoding, Modality, same_family, stack
from meme_dist.noise import Noise
from meme_dist.types import Batch, Loss, Packed

Shapes = Mapping[str, Sequence[tuple[int, ...]]]
Work = Callable[[str, Tensor | None], Sequence[Tensor]]
Each = Callable[[Shapes, Work, Tensor | None], list[Sequence[Tensor]]]
Private = Mapping[str, Float[Tensor, "S K B Q"]]  # Q, not P: those are packed pairs
"""Samples of each modality's own latents, for each source of shared ones."""
Rise = Float[Tensor, " B"] | float
"""A weight of each row, or of all."""


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

    private_latents = False  # whether modalities may have latents of their own
    anneal = 0
    """Visits of rows during which the weight of the divergences rises, in a straight line, from 0 to what the objective gives them (KL
    annealing: Bowman et al. 2016; published for MVAE and JMVAE). 0: it is there at once. MEME has no such weight."""

    def __init__(self, modalities: Mapping[str, Modality]):
        super().__init__()
        if len(modalities) < 2:
            raise ValueError(f"an objective needs at least two modalities, got {list(modalities)}")
        sizes = {name: m.shared_dim for name, m in modalities.items()}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"all modalities need one latent size, got {sizes}")
        if not self.private_latents and any(m.private_dim for m in modalities.values()):
            raise ValueError(f"{type(self).__name__} has no private latents: leave private_dim at 0, or take MMVAEPlus or MEME")
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
    def prior(self) -> Prior:
        """The generative prior p(z), for joint samples and likelihoods."""

    @abstractmethod
    def initialise(self, batch: Batch) -> None:
        """Set data-dependent parameters from one batch, once, before training."""

    def risen(self, batch: Batch) -> Rise:
        """min(1, visit / anneal) for each row, 1 outside of training.

        A function of the row's visit as its noise is, so that ranks, micro batches and resumed runs agree and there is no state to save.
        """
        return (batch.draw / self.anneal).clamp(max=1) if self.anneal and self.training else 1.0

    def modality(self, name: str) -> Modality:
        """The modality of that name."""
        return cast(Modality, self.modalities[name])

    def posteriors(self, batch: Batch) -> Diagonal:
        """q_j(z | x_j) for the batch's modalities, stacked [N, B, D]; a standard density where x_j is absent."""
        return self.split(self.encodings(batch))[0]

    def encodings(self, batch: Batch, by: Callable[[str], Encoding] | None = None) -> dict[str, Diagonal]:
        """What each encoder says [B, shared and private latents], or that of `by`; a standard density where a row lacks the modality."""
        encoding = by or self.modality
        shapes = {name: [(len(packed.row), self.modality(name).latent_dim)] * 2 for name, packed in batch.modalities.items()}
        encoded = self.each(shapes, lambda name, _: encoding(name).encode(batch.modalities[name].data, self.kept(batch, name)), None)
        packs = batch.modalities.items()
        return {name: self._unpacked(q, p.row, len(batch.observed)) for (name, p), q in zip(packs, encoded, strict=True)}

    def kept(self, batch: Batch, name: str) -> Tensor | None:
        """What of a modality's features is shown to its encoders (`Encoding.kept`): all that read the batch see the same."""
        if not self.modality(name).hides:
            return None
        visit = batch.draw[batch.modalities[name].row.clamp(max=len(batch.draw) - 1)]  # of each packed row; padding is any row
        return self.modality(name).kept(Noise(batch.seed, visit), f"{name}/dropout")

    def split(self, encodings: Mapping[str, Diagonal]) -> tuple[Diagonal, dict[str, Diagonal]]:
        """q_j(z | x_j) of the shared latents, stacked [N, B, D], and q_j(w_j | x_j) of each modality's own [B, P]."""
        size = self.latent_dim
        shared = stack([self.family(q.mean[:, :size], q.scale[:, :size]) for q in encodings.values()])
        return shared, {name: self.family(q.mean[:, size:], q.scale[:, size:]) for name, q in encodings.items()}

    def private_prior(self, name: str) -> Diagonal:
        """p(w) of a modality's own latents [P]: a standard density."""
        device = next(self.parameters()).device  # and nothing else of a parameter: engines shard those
        mean = torch.zeros(self.modality(name).private_dim, device=device)
        return self.family(mean, torch.ones_like(mean))

    def private_posterior(self, name: str, rows: int, given: Batch | None) -> Diagonal:
        """q(w | x) [B, P] of a modality's own latents in the rows of `given` that hold it, and their prior in all others."""
        prior = self.private_prior(name)
        shape = (rows, len(prior.mean))
        if given is None or name not in given.modalities:
            return self.family(prior.mean.expand(shape), prior.scale.expand(shape))
        _, private = self.split(self.encodings(given.only(name)))
        held = given.observed[:, list(given.modalities).index(name)][:, None]
        q = private[name]
        return self.family(torch.where(held, q.mean, prior.mean), torch.where(held, q.scale, prior.scale))

    def private_samples(self, own: Mapping[str, Diagonal], batch: Batch, num: int, cross: Mapping[str, Diagonal]) -> Private:
        """A modality's own latents for every source of shared ones: its posterior's where it is the source, else draws of `cross` [P].

        Where another modality leads, this one's own latents are unknown. Empty where no modality has any.
        """
        noise, sources = Noise(batch.seed, batch.draw), torch.arange(len(own), device=batch.observed.device)
        samples: dict[str, Tensor] = {}
        for j, (name, q) in enumerate(own.items()):
            if not self.modality(name).private_dim:
                continue
            other = self.family(cross[name].mean.expand_as(q.mean), cross[name].scale.expand_as(q.scale))
            others = torch.stack([other.reparameterise(noise, f"{name}/from/{source}", num) for source in own])
            mine = q.reparameterise(noise, f"{name}/private", num)
            samples[name] = torch.where((sources == j)[:, None, None, None], mine, others)
        return samples

    def reconstruct(
        self, name: str, z: Float[Tensor, "K B D"], noise: Noise, purpose: str, *, given: Batch | None = None
    ) -> Shaped[Tensor, "K B *event"]:
        """The likelihood's mean at z; a modality's own latents are drawn from what `given` says of them (else from their prior)."""
        modality = self.modality(name)
        if modality.private_dim:
            private = self.private_posterior(name, z.shape[1], given)
            z = torch.cat([z, private.sample(noise, f"{purpose}/private/{name}", len(z)).to(z)], -1)
        return modality.reconstruct(z)

    def _unpacked(self, q: Sequence[Tensor], row: Tensor, rows: int) -> Diagonal:
        mean, scale = q
        return self.family(unpack(mean, row, rows, 0.0), unpack(scale, row, rows, 1.0))

    def reconstructions(
        self, batch: Batch, z: Float[Tensor, "N K B D"], *, own: bool = True, cross: bool = True, private: Private | None = None
    ) -> Float[Tensor, "N N K B"]:
        """`reconstruction_table` of this objective's modalities."""
        modalities = {name: self.modality(name) for name in batch.modalities}
        return reconstruction_table(modalities, batch, z, own=own, cross=cross, each=self.each, private=private)

    def explanations(
        self,
        batch: Batch,
        z: Float[Tensor, "S K B D"],
        targets: Sequence[Collection[str]] | None = None,
        *,
        private: Private | None = None,
    ) -> Float[Tensor, "S N K B"]:
        """[s, j, k, b] = log p_j(x_j | z[s, k, b]) where row b holds j and source s is to explain it, 0 elsewhere.

        A source is any density of z; `targets[s]` names what it explains (default: everything). For the objectives whose sources are the
        modalities themselves there is `reconstructions`, which also knows which rows hold the source.
        """
        modalities = {name: self.modality(name) for name in batch.modalities}
        wanted = targets or [list(modalities)] * len(z)
        asked = {name: _held(batch, name, [s for s, named in enumerate(wanted) if name in named], len(z)) for name in modalities}
        return explanation_table(modalities, batch, z, asked, each=self.each, private=private)


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
    private: Private | None = None,
) -> Float[Tensor, "N N K B"]:
    """A[i, j, k, b] = log p_j(x_j | z[i, k, b]) where row b holds both i and j, 0 elsewhere.

    Decoder j runs once, on the rows that exist: its own (`own`) and those of every other source (`cross`). With neither own nor cross
    rows in the batch it still sees its padding, whose result is cut off.
    """
    sources, _, rows, _ = z.shape
    asked = {name: _asked(packed, j, rows, sources * rows, own, cross) for j, (name, packed) in enumerate(batch.modalities.items())}
    return explanation_table(modalities, batch, z, asked, each=each, private=private)


def explanation_table(
    modalities: Mapping[str, Modality],
    batch: Batch,
    z: Float[Tensor, "S K B D"],
    asked: Mapping[str, tuple[Int[Tensor, " P"], Int[Tensor, " P"]]],
    *,
    each: Each = in_turn,
    private: Private | None = None,
) -> Float[Tensor, "S N K B"]:
    """What is asked of each modality's decoder, each of which runs once: places in z (S * B is padding), and the data to explain there.

    `private` has the samples of each modality's own latents, for each source and row as z; none where modalities have none.
    """
    sources, samples, rows, shared = z.shape
    places, private = sources * rows + 1, private or {}
    start, columns_of = shared, {}
    for name, own in private.items():
        columns_of[name] = slice(start, start := start + own.shape[-1])

    def decode(name: str, flat: Tensor | None) -> tuple[Tensor]:
        assert flat is not None
        place, target = asked[name]
        latents = torch.cat([flat[..., :shared], flat[..., columns_of[name]]], -1) if name in columns_of else flat[..., :shared]
        return (modalities[name].log_prob(batch.modalities[name].data, latents[:, place], target),)

    everything = by_place(torch.cat([z, *private.values()], -1) if private else z)
    decoded = each({name: [(samples, len(place))] for name, (place, _) in asked.items()}, decode, everything)
    columns = [a.new_zeros(samples, places).index_copy(1, place, a) for (a,), (place, _) in zip(decoded, asked.values(), strict=True)]
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


def _held(batch: Batch, name: str, sources: Sequence[int], count: int) -> tuple[Tensor, Tensor]:
    """The rows that hold the modality, once for each of these sources; padding where there is none, since every decoder takes part."""
    packed, rows = batch.modalities[name], len(batch.observed)
    row = packed.row if sources else torch.full_like(packed.row, rows)
    place = [torch.where(row < rows, s * rows + row, count * rows) for s in sources or [0]]
    return torch.cat(place), torch.arange(len(row), device=row.device).repeat(len(place))


def pairs(observed: Bool[Tensor, "B N"]) -> Bool[Tensor, "N N B"]:
    """[i, j, b]: row b holds both i and j, and i is not j."""
    columns = observed.T
    both = columns[:, None] & columns[None]
    return both & ~torch.eye(len(columns), dtype=torch.bool, device=observed.device)[..., None]
