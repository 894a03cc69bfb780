"""A model of a cluster's network and of the training that runs on it. SIMULATED: nothing here is measured but the computing time put in.

Alpha-beta model of an all-reduce of n bytes. In one ring of W ranks, each message costing `alpha` and each byte 1 / beta,

    ring(n, W) = 2 (W - 1) alpha + 2 (W - 1) / W * n / beta.

Over M = W / G nodes of G GPUs the gradient is reduced within each node, its G pieces are all-reduced between the nodes, all at once, each
with a G-th of the node's line, and the result is gathered within each node:

    hierarchical(n, W) = ring(n, G; inside) + ring(n, M; between)

where the second term moves n / G bytes at beta / G, so n / beta. A step of data parallelism then takes

    step = compute + max(0, hierarchical(4 P, W) - overlap * compute),     efficiency = compute / step   (weak)

with P trained parameters. Left out: stragglers, congestion, the loader, the update. So a curve says what the network alone would cost.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Network:
    """A cluster of equal nodes. The defaults are assumptions, of the size of common machines, and no measurement."""

    gpus: int = 8
    """GPUs of a node (G)."""
    inside: float = 200e9
    """Bytes a second that a GPU sends to its neighbour in the node: NVLink, reached rather than peak."""
    between: float = 4 * 100e9 / 8
    """Bytes a second that a node sends to another: four lines of 100 Gb/s."""
    alpha: float = 10e-6
    """Seconds that a message takes however short it is, in a node and between two."""
    overlap: float = 0.5
    """Share of the computing time behind which communication can hide."""

    def __post_init__(self) -> None:
        if self.gpus < 1 or min(self.inside, self.between) <= 0 or self.alpha < 0 or not 0 <= self.overlap <= 1:
            raise ValueError(f"network: expected 1 GPU or more, speeds above 0, alpha from 0 and overlap from 0 to 1, got {self}")


def ring(size: float, ranks: int, *, alpha: float, beta: float) -> float:
    """Seconds of an all-reduce of `size` bytes in one ring: 2 (W - 1) alpha + 2 (W - 1) / W * size / beta."""
    return 2 * (ranks - 1) * (alpha + size / ranks / beta)


def all_reduce(size: float, world: int, network: Network) -> float:
    """Seconds of a hierarchical all-reduce. Raises ValueError for a world that is neither part of a node nor whole nodes."""
    inside = min(world, network.gpus)
    if world < 1 or world % inside:
        raise ValueError(f"world: expected up to {network.gpus} GPUs or a multiple of {network.gpus}, got {world}")
    within = ring(size, inside, alpha=network.alpha, beta=network.inside)
    return within + ring(size, world // inside, alpha=network.alpha, beta=network.between)


@dataclass(frozen=True)
class Step:
    """Seconds of one step on one rank."""

    compute: float
    communication: float
    exposed: float  # the part of it that does not hide behind computing

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.compute + self.exposed


def step(compute: float, size: float, world: int, network: Network) -> Step:
    """A step that computes so long and reduces `size` bytes of gradient over `world` ranks."""
    communication = all_reduce(size, world, network)
    return Step(compute, communication, max(0.0, communication - network.overlap * compute))


@dataclass(frozen=True)
class Compute:
    """Seconds that one rank computes on `rows` rows: fixed + per_row * rows."""

    fixed: float
    per_row: float

    def __call__(self, rows: float) -> float:
        """Of so many rows."""
        return self.fixed + self.per_row * rows


def line_through(few: tuple[float, float], many: tuple[float, float]) -> Compute:
    """From two measurements (rows, seconds). A slope or an offset that noise made negative becomes zero."""
    (rows, seconds), (more, longer) = few, many
    per_row = max(0.0, (longer - seconds) / (more - rows))
    return Compute(max(0.0, longer - per_row * more), per_row)
