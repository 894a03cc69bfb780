"""Where rows lie in the latent space: collected once, the same table on every rank."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from meme_dist.metrics.rows import device_of, evaluating, holds, joined, noise_of, on_device
from meme_dist.objectives.base import Objective
from meme_dist.types import Batch


class Posterior(NamedTuple):
    """q(z | x_S) of every row, for one set of sources: moments, one sample, and the rows that hold the sources (else zeros)."""

    mean: Float[Tensor, "R D"]
    stddev: Float[Tensor, "R D"]
    sample: Float[Tensor, "R D"]
    observed: Bool[Tensor, " R"]


class Latents(NamedTuple):
    """The posteriors of the first rows of a split, by set of sources, and their labels (-1: none)."""

    posteriors: Mapping[tuple[str, ...], Posterior]
    label: Int[Tensor, " R"]

    def first(self, rows: int) -> "Latents":
        """The table's first rows."""
        return Latents({names: Posterior(*(x[:rows] for x in q)) for names, q in self.posteriors.items()}, self.label[:rows])

    def finite(self) -> "Latents":
        """Without the sets of sources of which a posterior is not finite."""
        kept = {names: q for names, q in self.posteriors.items() if all(bool(x.isfinite().all()) for x in q)}
        return self._replace(posteriors=kept)


def collect(
    objective: Objective,
    batches: Iterable[Batch],
    *,
    rows: int,
    sources: Sequence[tuple[str, ...]] | None = None,
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> Latents:
    """Posteriors of the rows 0 .. rows - 1 of a split, for each set of sources (default: each modality alone), on the CPU.

    `batches` number their rows in `draw`, as `Evaluation` does. Each rank fills in the rows that it has and `reduce`, the sum over ranks,
    completes the table; it is called the same number of times everywhere. Rows that no batch brings are unobserved and unlabelled.
    """
    device = device_of(objective)
    names = [(name,) for name in objective.modalities] if sources is None else list(sources)
    tables = {chosen: torch.zeros(rows, 3 * objective.latent_dim + 1, device=device) for chosen in names}
    label = torch.zeros(rows, dtype=torch.int64, device=device)
    with evaluating(objective):
        for batch in batches:
            batch = on_device(batch, device)
            wanted = (batch.draw < rows) & batch.observed.any(1)
            if batch.label is not None:
                label[batch.draw[wanted]] = batch.label[wanted] + 1  # 0: nobody said
            for chosen, table in tables.items():
                _fill(objective, batch, chosen, table, wanted)
    posteriors = {chosen: _unpack(reduce(table).cpu(), objective.latent_dim) for chosen, table in tables.items()}
    return Latents(posteriors, reduce(label).cpu() - 1)


def _fill(
    objective: Objective, batch: Batch, sources: tuple[str, ...], table: Float[Tensor, "rows width"], wanted: Bool[Tensor, " B"]
) -> None:
    counted = holds(batch, sources) & wanted
    if not bool(counted.any()):
        return
    posterior = objective.infer(batch.only(*sources))
    sample = posterior.sample(noise_of(batch), f"latents/{joined(sources)}", 1)[0]
    present = torch.ones_like(sample[:, :1])
    table[batch.draw[counted]] = torch.cat([posterior.mean, posterior.stddev, sample, present], -1)[counted].float()


def _unpack(table: Float[Tensor, "rows width"], size: int) -> Posterior:
    mean, stddev, sample, present = table.split([size, size, size, 1], -1)
    return Posterior(mean, stddev, sample, present[:, 0] > 0)
