"""What every metric does to a batch: which rows count, how their sums add up, and the evaluation mode of the model."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from meme_dist.data.fields import Field
from meme_dist.distributions import wide
from meme_dist.noise import Noise
from meme_dist.objectives.base import Objective
from meme_dist.types import Batch, Sums

Metric = Callable[[Objective, Batch], Mapping[str, Sums]]
"""A metric of a batch. Its keys depend on the modalities alone, never on the rows, so that all ranks add up the same sums.

A sum may have any shape (a table of outer products, a total for each group of rows), the same for every batch.
"""

Classify = Callable[[Shaped[Tensor, "R *event"]], Shaped[Tensor, " R"]]
"""The class index that a datum of one modality shows."""

Embed = Callable[[Shaped[Tensor, "R *event"]], Float[Tensor, "R E"]]
"""Features of data of one modality."""


@runtime_checkable
class Judge(Protocol):
    """A classifier whose last layer is linear: `meme_dist.classifiers.Classifier`."""

    def __call__(self, x: Shaped[Tensor, "R *event"]) -> Shaped[Tensor, " R"]: ...
    def features(self, x: Shaped[Tensor, "R *event"]) -> Float[Tensor, "R E"]: ...
    @property
    def head(self) -> nn.Linear: ...


def judges_of(classifiers: Mapping[str, Classify], fields: Mapping[str, Field]) -> dict[str, Judge]:
    """The classifiers whose features can be had, which one look at blank data tells."""
    found: dict[str, Judge] = {}
    for name, judge in classifiers.items():
        try:
            if isinstance(judge, Judge):  # which asks for its head
                judge.features(torch.zeros(2, *fields[name].shape, dtype=fields[name].dtype))
                found[name] = judge
        except ValueError:  # it has no linear layer, or none that gives its logits
            continue
    return found


def joined(names: Collection[str]) -> str:
    """How a set of modalities is written in a key: `mnist+photo`."""
    return "+".join(names)


def holds(batch: Batch, names: Sequence[str]) -> Bool[Tensor, " B"]:
    """The rows that hold all of these modalities. Padding rows hold none."""
    known = list(batch.modalities)
    if unknown := set(names) - set(known):
        raise ValueError(f"unknown modalities {sorted(unknown)}; this batch has {known}")
    return batch.observed[:, [known.index(name) for name in names]].all(1)


def labelled(batch: Batch, needed_by: str) -> Bool[Tensor, " B"]:
    """The rows with a class label. Raises ValueError where the batch has none at all to offer."""
    if batch.label is None:
        raise ValueError(f"{needed_by} needs class labels and this data set has none; write the shards with labels or leave it out")
    return batch.label >= 0


def noise_of(batch: Batch) -> Noise:
    """The noise of the batch's rows: the same for a row whatever the batch size, the rank and the order."""
    return Noise(batch.seed, batch.draw)


def share(hits: Bool[Tensor, " R"]) -> Sums:
    """Hits among the given rows."""
    return add_up(hits.double())


def add_up(values: Float[Tensor, " R"]) -> Sums:
    """The sum of the given rows and their count, in double precision: thousands of rows of hundreds of nats keep their digits."""
    values = values.detach().double()
    return Sums(values.sum(), torch.tensor(float(len(values)), dtype=torch.float64, device=values.device))


def with_square(key: str, values: Float[Tensor, " R"]) -> dict[str, Sums]:
    """The sum of the given rows under `key` and that of their squares under `key/square`: what the interval of a mean needs."""
    values = values.detach().double()
    return {key: add_up(values), f"{key}/square": add_up(values.square())}


def shown(
    objective: Objective, name: str, z: Float[Tensor, "K R D"], noise: Noise, purpose: str, *, given: Batch | None = None
) -> Shaped[Tensor, "K R *event"]:
    """The likelihood's mean of a modality at shared latents z; its own latents, where it has any, are drawn from their prior.

    `given`, R rows: where these hold the modality its own latents are drawn from what it says of them.
    """
    return objective.reconstruct(name, z, noise, purpose, given=given)


def decoded(objective: Objective, name: str, z: Float[Tensor, "K R D"], noise: Noise, purpose: str) -> Float[Tensor, "K R *outputs"]:
    """The likelihood's parameters where `shown` gives its mean."""
    modality = objective.modality(name)
    if modality.private_dim:
        own = objective.private_posterior(name, z.shape[1], None)
        z = torch.cat([z, own.sample(noise, f"{purpose}/private/{name}", len(z)).to(z)], -1)
    return wide(modality.decoder(z.flatten(0, 1))).unflatten(0, z.shape[:2])


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The same batch, held by the device."""
    return _moved(batch, device)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: _moved(part, device) for name, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_moved(part, device) for part in value))
    return value


def device_of(module: nn.Module) -> torch.device:
    """Where the module's first parameter or buffer stands; the CPU for a module without any."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every submodule gets its own mode back, also after an error."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for module in modules:
            module.eval()
        with torch.no_grad():
            yield
    finally:
        for part, training in modes:
            part.training = training
