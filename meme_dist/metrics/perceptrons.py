"""A probe that reads a label from latents however it is written there, and says nothing where there is nothing to read.

A perceptron that is trained on and on learns noise by heart and reads a weak leak the worse. Here five are trained, each on four fifths of
the rows, and all are left as they were after the epoch in which the rows that each was not shown were told best. (16 latents of 4,000 rows
whose label the best rule tells in .585: .53 to .54 after 40 epochs, .575 to .58 so. With one perceptron and a tenth held out too few rows
choose the epoch: .57 to .58, and once in twenty .50.)
"""

import copy
import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, silu

HIDDEN = 64
MEMBERS = 5
FLOOR = 1e-6  # of the spread that inputs are divided by: a latent that never moves stays 0


class Perceptrons(nn.Module):
    """Perceptrons side by side with two hidden layers, which start as the classes' frequencies whatever they are shown."""

    def __init__(self, z: Float[Tensor, "R D"], label: Int[Tensor, " R"], classes: int, generator: torch.Generator):
        super().__init__()
        self.middle, self.spread = z.mean(0), z.std(0, correction=0).clamp(min=FLOOR)
        widths = [z.shape[1], HIDDEN, HIDDEN]
        inner = [torch.randn(MEMBERS, a, b, generator=generator) / a**0.5 for a, b in zip(widths, widths[1:], strict=False)]
        frequencies = (label.bincount(minlength=classes) + 1) / (len(label) + classes)
        self.weights = nn.ParameterList([*inner, torch.zeros(MEMBERS, HIDDEN, classes)])
        self.biases = nn.ParameterList([*(torch.zeros(MEMBERS, 1, HIDDEN) for _ in inner), frequencies.log().repeat(MEMBERS, 1, 1)])

    def each(self, z: Float[Tensor, "M R D"]) -> Float[Tensor, "M R C"]:
        """What every one says of rows of its own."""
        x = (z - self.middle) / self.spread
        for place, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, silu(x) if place else x, weight)
        return x.log_softmax(-1)

    def forward(self, z: Float[Tensor, "R D"]) -> Float[Tensor, "R C"]:
        """The mean of their log probabilities."""
        return self.each(z.expand(MEMBERS, -1, -1)).mean(0)

    def loss(self, z: Float[Tensor, "M R D"], label: Int[Tensor, "M R"]) -> Float[Tensor, ""]:
        """Their mean cross entropy, on rows of their own."""
        return cross_entropy(self.each(z).flatten(0, 1), label.flatten())


def fit_perceptron(
    z: Float[Tensor, "R D"],
    label: Int[Tensor, " R"],
    classes: int,
    *,
    epochs: int = 40,
    learning_rate: float = 5e-3,
    batch_size: int = 256,
    seed: int = 0,
) -> Perceptrons:
    """The probe, fitted by Adam with a rate that falls to zero; the frequencies of fewer than five rows. Its arguments alone decide it."""
    generator = torch.Generator().manual_seed(seed)
    probe = Perceptrons(z, label, classes, generator)
    order, part = torch.randperm(len(z), generator=generator), len(z) // MEMBERS
    hidden, shown = torch.stack([order.roll(-part * member) for member in range(MEMBERS)]).tensor_split([part], 1)
    optimizer = torch.optim.Adam(probe.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    best, kept = _loss(probe, z[hidden], label[hidden]), copy.deepcopy(probe.state_dict())
    for _ in range(epochs if part else 0):
        mixed = shown.gather(1, torch.rand(shown.shape, generator=generator).argsort(1))
        for chosen in mixed.split(batch_size, 1):
            _descend(probe, optimizer, z[chosen], label[chosen])
        schedule.step()
        if (loss := _loss(probe, z[hidden], label[hidden])) < best:
            best, kept = loss, copy.deepcopy(probe.state_dict())
    probe.load_state_dict(kept)
    return probe.requires_grad_(False)


@torch.no_grad()
def _loss(probe: Perceptrons, z: Float[Tensor, "M R D"], label: Int[Tensor, "M R"]) -> float:
    return float(probe.loss(z, label)) if label.numel() else math.inf


def _descend(probe: Perceptrons, optimizer: torch.optim.Optimizer, z: Float[Tensor, "M R D"], label: Int[Tensor, "M R"]) -> None:
    """One step of all of them."""
    with torch.enable_grad():
        optimizer.zero_grad()
        probe.loss(z, label).backward()
        optimizer.step()
