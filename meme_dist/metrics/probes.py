"""Latent accuracy: how well a linear classifier reads the class from samples of the posteriors (Joy et al. 2022, table 4).

The paper's protocol is the default, `fit_linear`: one linear layer on samples z ~ q(z | x_m), cross entropy, Adam at 1e-3 for 30 epochs;
tested on samples too. One difference: each row's sample is drawn once, not anew every epoch. `fit_logistic` is the converged alternative.
"""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from meme_dist.metrics.intervals import Estimate, proportion
from meme_dist.metrics.latents import Latents, Posterior
from meme_dist.metrics.rows import share

Fit = Callable[[Float[Tensor, "R D"], Int[Tensor, " R"], int], nn.Linear]
"""From samples, labels and the number of classes to a linear classifier."""


def shuffled(rows: int, epochs: int, batch_size: int, generator: torch.Generator) -> Iterator[Int[Tensor, " R"]]:
    """The numbers of the rows of each batch, all rows anew in every epoch."""
    for _ in range(epochs):
        yield from torch.randperm(rows, generator=generator).split(batch_size)


def descend(probe: nn.Module, optimizer: torch.optim.Optimizer, z: Float[Tensor, "R D"], label: Int[Tensor, " R"]) -> None:
    """One step down the cross entropy of these rows."""
    with torch.enable_grad():
        optimizer.zero_grad()
        cross_entropy(probe(z), label).backward()
        optimizer.step()


def fit_linear(
    z: Float[Tensor, "R D"],
    label: Int[Tensor, " R"],
    classes: int,
    *,
    epochs: int = 30,
    learning_rate: float = 1e-3,
    batch_size: int = 128,
    seed: int = 0,
) -> nn.Linear:
    """The paper's probe: stochastic, and not converged where rows are few. A pure function of its arguments."""
    generator = torch.Generator().manual_seed(seed)
    probe = _blank(z.shape[1], classes)
    optimizer = torch.optim.Adam(probe.parameters(), lr=learning_rate)
    for chosen in shuffled(len(z), epochs, batch_size, generator):
        descend(probe, optimizer, z[chosen], label[chosen])
    return probe.requires_grad_(False)


def fit_logistic(z: Float[Tensor, "R D"], label: Int[Tensor, " R"], classes: int, *, penalty: float = 1.0) -> nn.Linear:
    """Multinomial logistic regression to convergence: minimises sum of cross entropies + penalty / 2 ||weight||^2, in double precision."""
    probe = _blank(z.shape[1], classes).double()
    optimizer = torch.optim.LBFGS(
        probe.parameters(), max_iter=500, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (cross_entropy(probe(z.double()), label, reduction="sum") + penalty / 2 * probe.weight.square().sum()) / len(z)
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return probe.float().requires_grad_(False)


def _blank(size: int, classes: int) -> nn.Linear:
    """A convex problem needs no random start, and none is taken from the global generator."""
    probe = nn.Linear(size, classes, device="meta").to_empty(device="cpu")
    nn.init.zeros_(probe.weight)
    nn.init.zeros_(probe.bias)
    return probe


def latent_accuracy(train: Latents, test: Latents, *, classes: int, fit: Fit = fit_linear) -> dict[tuple[str, ...], Estimate]:
    """The probe's accuracy on the test rows, with Wilson's interval, for each set of sources that both tables hold.

    Rows without the sources or without a label count nowhere; where no such row is left to train or to test on, the count is 0. Raises
    ValueError where no training row has a label.
    """
    if not bool((train.label >= 0).any()):
        raise ValueError("latent accuracy needs class labels and no training row has one; write the shards with labels or leave it out")
    return {
        chosen: _accuracy(posterior, train.label, test.posteriors[chosen], test.label, classes, fit)
        for chosen, posterior in train.posteriors.items()
        if chosen in test.posteriors
    }


def _accuracy(train: Posterior, train_label: Tensor, test: Posterior, test_label: Tensor, classes: int, fit: Fit) -> Estimate:
    known, asked = train.observed & (train_label >= 0), test.observed & (test_label >= 0)
    if not bool(known.any()):
        return proportion(share(asked[:0]))
    probe = fit(train.sample[known], train_label[known], classes)
    return proportion(share(probe(test.sample[asked]).argmax(-1) == test_label[asked]))
