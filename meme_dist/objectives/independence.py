"""What makes latents z tell nothing of a label y: an adversary that tries to read it, or a measure of dependence.

Adversary (Klys, Snell and Zemel 2018, their M2 and N, for one optimiser and one loss a step):

    told    = log d(y | z)       z held fixed: its cross entropy trains the adversary d alone
    fooled  = log d(y | z)       d held fixed: what the encoder of z is trained on

The authors alternate two optimisers; here one loss holds both terms, each with a gradient to its own side only.

HSIC (Gretton et al. 2005), the unbiased estimator of Song et al. 2012 from n rows, K and L their kernel matrices with a zero diagonal:

    HSIC = ( tr K L  +  1'K1 1'L1 / ((n - 1)(n - 2))  -  2 / (n - 2) 1'K L1 ) / (n (n - 3))

Its mean over all permutations of the labels is 0, so that it is negative about half of the time where nothing is to be found.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from meme_dist.distributions import wide

HIDDEN = 64
FEWEST = 4  # rows of which HSIC is defined


class Adversary(nn.Module):
    """A perceptron d(y | z) with two hidden layers. Its parameters are its own, not those of layers within: engines that shard them
    gather them when the module is called, and `fooled` needs them without their gradient."""

    def __init__(self, size: int, values: int, hidden: int = HIDDEN):
        super().__init__()
        widths = [size, hidden, hidden, values]
        self.layers = len(widths) - 1
        for place, (a, b) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            layer = nn.Linear(a, b)
            self.register_parameter(f"weight{place}", nn.Parameter(layer.weight.detach()))
            self.register_parameter(f"bias{place}", nn.Parameter(layer.bias.detach()))

    def forward(self, z: Float[Tensor, "B Z"]) -> tuple[Float[Tensor, "B V"], Float[Tensor, "B V"]]:
        """log d(y | z) for every value: `told`, with a gradient to d alone, and `fooled`, with one to z alone."""
        parts = [(getattr(self, f"weight{place}"), getattr(self, f"bias{place}")) for place in range(self.layers)]
        told = _perceptron(z.detach(), parts)
        return told, _perceptron(z, [(weight.detach(), bias.detach()) for weight, bias in parts])


def _perceptron(x: Tensor, parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    for place, (weight, bias) in enumerate(parts):
        x = functional.linear(functional.silu(x) if place else x, weight, bias)
    return wide(x).log_softmax(-1)


def hsic(
    z: Float[Tensor, "B Z"],
    y: Float[Tensor, "B V"],
    block: Int[Tensor, " B"],
    counted: Bool[Tensor, " B"],
) -> Float[Tensor, " B"]:
    """Row by row: the unbiased HSIC of z and y within the row's block, over the rows that are `counted`; its sum over rows is
    sum over blocks of n * HSIC. 0 where a block has fewer than four of them.

    Rows are compared within their block alone, so that the sum over rows does not depend on how blocks are shared out between ranks and
    micro batches, as long as these are cut between blocks. z has the mean of three Gaussian kernels of bandwidth^2 Z / 4, Z and 4 Z (under
    N(0, I) the mean squared distance is 2 Z), labels (one-hot, or beliefs) have y . y'. Time and memory grow with the rows times those of
    the largest block.
    """
    table, place = _by_block(block)
    there, table = (table >= 0) & counted[table], table.clamp(min=0)
    z, y = z[table], y[table]
    pairs = there[:, :, None] & there[:, None] & ~torch.eye(table.shape[1], dtype=torch.bool, device=z.device)
    apart = (z[:, :, None] - z[:, None]).square().sum(-1) / (2 * z.shape[-1])
    kernel = torch.stack([torch.exp(-apart * factor) for factor in (4.0, 1.0, 0.25)]).mean(0)
    near, alike = torch.where(pairs, kernel, 0.0), torch.where(pairs, (y[:, :, None] * y[:, None]).sum(-1), 0.0)
    n = there.sum(1, keepdim=True).to(z.dtype)
    enough = n >= FEWEST
    n = torch.where(enough, n, FEWEST)
    of_row = near.sum(-1), alike.sum(-1)  # sums, not products of matrices, which autocast would round
    of_block = of_row[0].sum(1, keepdim=True) * of_row[1].sum(1, keepdim=True)
    share = (near * alike).sum(-1) + of_block / (n * (n - 1) * (n - 2)) - 2 / (n - 2) * of_row[0] * of_row[1]
    return torch.where(enough & there, share / (n - 3), 0.0).flatten()[place]


def _by_block(block: Int[Tensor, " B"]) -> tuple[Int[Tensor, "N M"], Int[Tensor, " B"]]:
    """The rows of each of N blocks, M at most, filled up with -1; and where in that table, read line by line, each row is."""
    _, group, rows = block.unique(return_inverse=True, return_counts=True)
    number, order, size = torch.arange(len(block), device=block.device), group.argsort(stable=True), int(rows.max())
    place = torch.empty_like(group)
    place[order] = group[order] * size + number - (rows.cumsum(0) - rows)[group[order]]
    table = group.new_full((len(rows), size), -1)
    table.view(-1)[place] = number
    return table, place
