"""What happens when a loss or a gradient is NaN or infinite: nothing is updated, and the error names the modality to look at."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from meme_dist.train.engines.base import Engine
from meme_dist.types import Batch, Loss

PLACES = ("data", "weights", "loss terms", "gradient")  # from cause to consequence: the first that is not finite is to blame


class NonFiniteError(ValueError):
    """A loss or gradient that is not finite, on any rank. The weights are those of before the step, on all ranks.

    `step` is the optimiser step (from 1), `modalities` the names to blame (empty where nothing points at one), `ranks` where it arose.
    """

    def __init__(self, message: str, *, step: int, modalities: tuple[str, ...], ranks: tuple[int, ...]):
        super().__init__(message)
        self.step, self.modalities, self.ranks = step, modalities, ranks


def diagnose(
    engine: Engine,
    batches: Sequence[Batch],
    losses: Sequence[Loss],
    *,
    step: int,
    total: float,
    norm: float,
    gather: Callable[[Tensor], Tensor],
) -> NonFiniteError:
    """Find the modality. Collective: every rank calls it and gets the same error. `gather` stacks a tensor over the ranks.

    Modalities whose data are not finite are named first; else those with such weights, then such loss terms, then such gradients.
    """
    names = list(batches[0].modalities)
    found = (_bad_data(batches), _bad_weights(engine, names), _bad_terms(losses, names), _bad_gradients(engine, names))
    device = losses[0].total.device
    flags = torch.tensor([[name in place for name in names] for place in found], dtype=torch.float32, device=device)
    table = gather(flags) > 0  # [world, place, modality]
    place = next((i for i in range(len(PLACES)) if bool(table[:, i].any())), None)
    what = f"step {step}: loss per row {total}, gradient norm {norm}"
    advice = "No weight was changed. Look at the data and the scales of that modality; a lower learning rate, `clip` or float32 may help"
    if place is None:
        return NonFiniteError(f"{what}; no single modality stands out. {advice}", step=step, modalities=(), ranks=())
    blamed = tuple(name for name, bad in zip(names, table[:, place].any(0).tolist(), strict=True) if bad)
    ranks = tuple(torch.nonzero(table[:, place].any(-1)).flatten().tolist())
    message = f"{what}: {PLACES[place]} of {', '.join(blamed)} not finite (rank {', '.join(map(str, ranks))}). {advice}"
    return NonFiniteError(message, step=step, modalities=blamed, ranks=ranks)


def _bad_data(batches: Sequence[Batch]) -> set[str]:
    packed = ((name, p.data) for batch in batches for name, p in batch.modalities.items())
    return {name for name, data in packed if not bool(data.isfinite().all())}


def _bad_weights(engine: Engine, names: Sequence[str]) -> set[str]:
    return _owners((name for name in engine.names() if not bool(engine.part(name).isfinite().all())), names)


def _bad_gradients(engine: Engine, names: Sequence[str]) -> set[str]:
    return _owners((name for name, finite in engine.gradients() if not finite), names)


def _bad_terms(losses: Sequence[Loss], names: Sequence[str]) -> set[str]:
    """Modalities whose "reconstruction/<name>" is not finite; failing that, those named in any such term.

    A modality's own reconstruction depends on it alone; every other term mixes modalities, since each supervises the others.
    """
    bad = {term.partition("/")[::2] for loss in losses for term, sums in loss.terms.items() if not bool(sums.total.isfinite())}
    own = {name for kind, name in bad if kind == "reconstruction"}
    return (own or {part for _, name in bad for part in name.split(">")}) & set(names)


def _owners(paths: Iterable[str], names: Sequence[str]) -> set[str]:
    """The modalities that parameters belong to, which stand in their names: "modalities.photo.encoder.0.weight"."""
    return {part for path in paths for part in path.split(".")[1:] if part in names}
