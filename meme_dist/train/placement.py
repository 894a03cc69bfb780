"""Which rank holds which modality, and when that pays: the cost of modality parallelism beside that of data parallelism and ZeRO.

N modalities, B rows of a group, K samples, D latent size, M pseudo-inputs, P parameters, W ranks = G groups of m members; R_j rows hold j,
P_j pairs (source, row) have j as their target (all rows complete: R_j = B, P_j = (N - 1) B). Numbers are float32, 4 bytes.

By rings over r ranks (Thakur et al. 2005) a rank sends 2 (r - 1) / r 4 n bytes in an all-reduce of n numbers, (r - 1) 4 n in an all-gather
of n numbers from each rank, (r - 1) / r 4 n in a reduce-scatter of n numbers. A step sends, per rank:

    DDP                 2 (W - 1) / W 4 P              all-reduce of gradients
    ZeRO-1, ZeRO-2      2 (W - 1) / W 4 P              reduce-scatter of gradients, all-gather of weights
    ZeRO-3, FSDP2       3 (W - 1) / W 4 P              all-gather of weights forward and backward, reduce-scatter (a module that runs
                                                       several times a step, as decoders do, may be gathered more often)
    modality parallel   4 (m - 1) max over members of (2 D sum R_j + 2 D M + K sum ...)      all-gathers, forward
                        2 (m - 1) / m 4 K (N B + 1) D                                        all-reduces, backward
                        2 (G - 1) / G 4 P_member                                             gradients across groups

with the passes through the decoders, and so K, as the estimator has them (`exchanges`). The first lines grow with the networks, N K B D
does not: above some P, `break_even_parameters`, modality parallelism sends less and is faster.

All of this is an estimate: bytes over a bandwidth plus a latency a collective, added to compute.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from meme_dist.objectives.meme import MEME, Estimator
from meme_dist.types import Batch

NUMBER = 4  # bytes of a float32
BUCKET = 25 * 2**20  # bytes of gradients in one all-reduce, as in DDP


def place(sizes: Mapping[str, float], members: int) -> dict[str, int]:
    """A member for each modality, sizes (parameters, or seconds measured) balanced: the largest first, each to the least loaded member.

    The largest load is at most 4/3 of the least possible (Graham 1969). No member stays without a modality; the same sizes give the same
    placement on every rank. Raises ValueError for more members than modalities.
    """
    if not 1 <= members <= len(sizes):
        raise ValueError(
            f"{members} members cannot share {len(sizes)} modalities; use 1 to {len(sizes)} members, and data parallelism beside"
        )
    loads = [(0.0, 0, member) for member in range(members)]
    owner: dict[str, int] = {}
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        load, count, member = min(loads)
        loads[member] = (load + sizes[name], count + 1, member)
        owner[name] = member
    return {name: owner[name] for name in sizes}


def imbalance(sizes: Mapping[str, float], assignment: Mapping[str, int]) -> float:
    """The largest member's load over the mean load: 1 where all are equal."""
    loads = [sum(size for name, size in sizes.items() if assignment[name] == member) for member in set(assignment.values())]
    return max(loads) * len(loads) / sum(loads)


# ---- bytes ------------------------------------------------------------------------------------------------------------------------------


class Traffic(NamedTuple):
    """What a rank sends in a step: bytes, in how many collectives."""

    sent: float
    collectives: float

    def seconds(self, bandwidth: float, latency: float) -> float:
        """At so many bytes per second and seconds a collective."""
        return self.sent / bandwidth + self.collectives * latency


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One micro batch of a group as the wire sees it. `pseudo_inputs` is 0 where no row can have one modality alone (`Batch.single`)."""

    own: Mapping[str, float]  # R_j
    cross: Mapping[str, float]  # P_j
    rows: int
    samples: int
    latent: int
    pseudo_inputs: int
    estimator: Estimator


def workload_of(objective: MEME, batch: Batch) -> Workload:
    """What this batch will exchange, to the byte (its index lists are padded)."""
    count = objective.targets_of(batch)
    return Workload(
        own={name: len(packed.row) for name, packed in batch.modalities.items()},
        cross={name: len(p.source) if count is None else count * len(p.row) for name, p in batch.modalities.items()},
        rows=len(batch.observed),
        samples=objective.samples,
        latent=objective.latent_dim,
        pseudo_inputs=objective.pseudo_inputs if batch.single else 0,
        estimator=objective.estimator,
    )


def expected_workload(
    names: Sequence[str], *, rows: int, samples: int, latent: int, pseudo_inputs: int, estimator: Estimator, observed: float = 1.0
) -> Workload:
    """What a batch exchanges on average where each entry is there with probability `observed`, without padding."""
    own = dict.fromkeys(names, rows * observed)
    cross = dict.fromkeys(names, (len(names) - 1) * rows * observed**2)
    return Workload(own=own, cross=cross, rows=rows, samples=samples, latent=latent, pseudo_inputs=pseudo_inputs, estimator=estimator)


class Collective(NamedTuple):
    """`numbers` that each rank gives to it."""

    kind: Literal["all_gather", "all_reduce"]
    numbers: float

    def sent(self, ranks: int) -> float:
        """Bytes that a rank sends, by a ring."""
        return NUMBER * self.numbers * (ranks - 1) * (1 if self.kind == "all_gather" else 2 / ranks)


class _Pass(NamedTuple):
    """One pass through the decoders."""

    samples: int
    own: bool
    cross: bool
    gradients: bool


def exchanges(work: Workload, assignment: Mapping[str, int]) -> list[Collective]:
    """The collectives within a group for one micro batch, in their order (the all-reduces are those of the backward pass, last first)."""
    posteriors = {name: 2 * work.latent * rows for name, rows in work.own.items()}
    pseudo = dict.fromkeys(work.own, 2 * work.latent * work.pseudo_inputs)
    passes = _passes(work.estimator, work.samples)
    tables = [{n: p.samples * (p.own * work.own[n] + p.cross * work.cross[n]) for n in work.own} for p in passes]
    gathered = [posteriors, *tables, *([pseudo] if work.pseudo_inputs else [])]
    places = len(work.own) * work.rows + 1
    forward = [Collective("all_gather", _widest(sizes, assignment)) for sizes in gathered]
    return forward + [Collective("all_reduce", p.samples * places * work.latent) for p in reversed(passes) if p.gradients]


def _passes(estimator: Estimator, samples: int) -> list[_Pass]:
    whole = _Pass(samples, own=True, cross=True, gradients=True)
    return {
        "rao_blackwell": [whole],
        "released": [whole._replace(own=False), whole._replace(samples=1, cross=False)],
        "resampled": [whole._replace(own=False, gradients=False), whole._replace(samples=1)],
    }[estimator]


def _widest(sizes: Mapping[str, float], assignment: Mapping[str, int]) -> float:
    """Numbers of the member that gives most: an all-gather takes as many from each."""
    return max(sum(size for name, size in sizes.items() if assignment[name] == member) for member in set(assignment.values()))


def data_parallel(parameters: float, world: int, *, volume: Literal[2, 3] = 2) -> Traffic:
    """DDP, ZeRO-1 and ZeRO-2 (`volume` 2), ZeRO-3 and FSDP2 (3), on so many ranks; a collective for each 25 MiB."""
    size = NUMBER * parameters
    return Traffic(volume * (world - 1) / world * size, size / BUCKET if world > 1 else 0)


def modality_parallel(
    work: Workload, assignment: Mapping[str, int], *, groups: int = 1, parameters: float = 0, micro_batches: int = 1
) -> Traffic:
    """Within a group for each micro batch, and across groups once a step for the `parameters` of the member that has most."""
    members = len(set(assignment.values()))
    within = exchanges(work, assignment) if members > 1 else []
    across = data_parallel(parameters, groups)
    sent = micro_batches * sum(collective.sent(members) for collective in within)
    return Traffic(sent + across.sent, micro_batches * len(within) + across.collectives)


# ---- seconds ----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a machine needs. Compute is given for all rows of a step on one rank, and shared by the ranks.

    `per_parameter`: seconds of forward and backward for each parameter of the networks; `tables`: seconds of what is not networks (samples,
    densities, bound), which the members of a group all do for the whole group. `exposed`: the share of data parallelism's communication
    that compute does not hide; what modality parallelism sends is waited for.
    """

    bandwidth: float  # bytes a second that a rank can send
    latency: float  # seconds a collective
    per_parameter: float = 0.0
    tables: float = 0.0
    exposed: float = 1.0


def data_parallel_seconds(parameters: float, world: int, rates: Rates, *, volume: Literal[2, 3] = 2) -> float:
    """Estimated seconds a step: (compute + tables) / W + exposed communication."""
    traffic = data_parallel(parameters, world, volume=volume)
    return (rates.per_parameter * parameters + rates.tables) / world + rates.exposed * traffic.seconds(rates.bandwidth, rates.latency)


def modality_parallel_seconds(
    parameters: float, work: Workload, assignment: Mapping[str, int], rates: Rates, *, groups: int = 1, imbalance: float = 1.0
) -> float:
    """Estimated seconds a step: imbalance * compute / W + tables / G + communication. `imbalance` is that of parameters and of compute."""
    members = len(set(assignment.values()))
    traffic = modality_parallel(work, assignment, groups=groups, parameters=imbalance * parameters / members)
    compute = imbalance * rates.per_parameter * parameters / (groups * members)
    return compute + rates.tables / groups + traffic.seconds(rates.bandwidth, rates.latency)


def break_even_parameters(
    work: Workload,
    assignment: Mapping[str, int],
    rates: Rates,
    *,
    groups: int = 1,
    imbalance: float = 1.0,
    volume: Literal[2, 3] = 2,
) -> float:
    """P above which modality parallelism is estimated to be faster than data parallelism on as many ranks; infinite where it never is.

    Both times are straight lines in P:  P* = (exchanges + latencies + tables (1 / G - 1 / W)) / (seconds a parameter costs the one - the
    other). With imbalance 1, no latency and no tables the bandwidth cancels: P* is where the bytes are equal.
    """
    world = groups * len(set(assignment.values()))

    def behind(parameters: float) -> float:
        ours = modality_parallel_seconds(parameters, work, assignment, rates, groups=groups, imbalance=imbalance)
        return ours - data_parallel_seconds(parameters, world, rates, volume=volume)

    unit = 1e6  # a step at which neither difference cancels
    gain = (behind(0) - behind(unit)) / unit
    return max(0.0, behind(0) / gain) if gain > 0 else float("inf")


def break_even_bandwidth(
    parameters: float, work: Workload, assignment: Mapping[str, int], rates: Rates, *, groups: int = 1, imbalance: float = 1.0
) -> float:
    """Bytes a second below which modality parallelism is estimated to be faster than DDP, for a model of P parameters.

    (bytes saved) / bandwidth = (seconds lost to imbalance, tables and latency); infinite where nothing is lost, 0 where no bytes are saved.
    `rates.bandwidth` is not used.
    """
    world = groups * len(set(assignment.values()))
    endless = Rates(**{**vars(rates), "bandwidth": float("inf")})
    ours = modality_parallel_seconds(parameters, work, assignment, endless, groups=groups, imbalance=imbalance)
    lost = ours - data_parallel_seconds(parameters, world, endless)
    share = imbalance * parameters / len(set(assignment.values()))
    saved = (
        rates.exposed * data_parallel(parameters, world).sent - modality_parallel(work, assignment, groups=groups, parameters=share).sent
    )
    if saved <= 0:
        return 0.0
    return saved / lost if lost > 0 else float("inf")
