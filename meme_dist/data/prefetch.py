"""Batches on their way to the device while the step before them computes."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from meme_dist.types import Batch, Packed


def prefetch(batches: Iterable[Sequence[Batch]], device: torch.device) -> Iterator[list[Batch]]:
    """The micro batches of step after step, on `device`.

    CUDA: those of step t + 1 are read and their copies enqueued on a stream of their own before step t is handed out, so that they run
    while it computes; the host waits for none. One step is read ahead: whoever saves a position counts the steps that were handed out, not
    those that were read. An error of the source comes when its turn does, after the steps before it. Elsewhere nothing is read ahead.
    """
    if device.type != "cuda":
        for step in batches:
            yield [moved(batch, device) for batch in step]
        return
    side, source = torch.cuda.Stream(device), iter(batches)
    coming = _enqueued(source, device, side)
    while not isinstance(coming, Exception):
        current = torch.cuda.current_stream(device)
        current.wait_stream(side)  # the device waits for these copies, and for no later ones
        for batch in coming:
            for x in tensors(batch):
                x.record_stream(current)  # allocated on the side stream: not to be reused before the step is through with it
        ready, coming = coming, _enqueued(source, device, side)
        yield ready
    if not isinstance(coming, StopIteration):
        raise coming


def moved(batch: Batch, device: torch.device) -> Batch:
    """The batch on `device`; the host does not wait for copies out of pinned memory."""
    modalities = {name: Packed(*(_to(x, device) for x in packed)) for name, packed in batch.modalities.items()}
    label = None if batch.label is None else _to(batch.label, device)
    observed, alone, draw = _to(batch.observed, device), _to(batch.alone, device), _to(batch.draw, device)
    return batch._replace(modalities=modalities, observed=observed, alone=alone, draw=draw, label=label)


def tensors(batch: Batch) -> list[Tensor]:
    """Every tensor of a batch."""
    packed = [x for entry in batch.modalities.values() for x in entry]
    return [*packed, batch.observed, batch.alone, batch.draw, *([] if batch.label is None else [batch.label])]


def _enqueued(source: Iterator[Sequence[Batch]], device: torch.device, side: torch.cuda.Stream) -> list[Batch] | Exception:
    """The next step's micro batches with their copies under way, or why there are none."""
    try:
        step = next(source)
    except Exception as error:
        return error
    with torch.cuda.stream(side):
        return [moved(batch, device) for batch in step]


def _to(x: Tensor, device: torch.device) -> Tensor:
    return x.to(device, non_blocking=True)
