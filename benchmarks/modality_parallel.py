"""Bytes that modality parallelism and data parallelism send for the same step, counted on real gloo ranks beside what `placement` says.

Both train one model (N perceptrons each way, all rows complete) on batches of one size, on as many ranks. Every collective of forward,
backward and gradient averaging is counted at the dispatcher, with its size and its group, as the bytes that a ring sends for it. What the
rank's TCP connections really sent, over some more steps, says whether gloo sends as a ring does.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.ranks import run_ranks, sent_bytes
from benchmarks.record import CPU, keep
from meme_dist.modalities.vector import mlp
from meme_dist.objectives.meme import MEME, Estimator
from meme_dist.train.modality_parallel import ModalityParallel
from meme_dist.train.placement import Collective, Rates, break_even_parameters, data_parallel, modality_parallel, workload_of
from meme_dist.types import Batch, pack

ESTIMATORS: tuple[Estimator, ...] = ("released", "rao_blackwell", "resampled")
EVENT = 64  # numbers of one datum
STEPS = 5  # whose TCP bytes are averaged


def main(
    *,
    modalities: tuple[int, ...] = (4, 8, 16),
    ranks: tuple[int, ...] = (2, 4),
    rows: int = 64,
    samples: int = 11,
    latent: int = 16,
    hidden: int = 256,
    save: bool = True,
) -> None:
    """A table: bytes a rank sends in a step, counted and by formula, and the parameters at which both kinds would send as many.

    Args:
        modalities: Numbers of modalities (N).
        ranks: Numbers of ranks, all in one group.
        rows: Rows of a step over all ranks (B).
        samples: Posterior samples (K).
        latent: Latent size (D).
        hidden: Width of the two hidden layers of each network.
        save: Append the rows to benchmarks/results/modality_parallel.jsonl.
    """
    sizes = {"rows": rows, "samples": samples, "latent": latent, "hidden": hidden}
    results = [{"ranks": world, **sizes, **row} for world in ranks for row in run_ranks(measured, world, modalities, sizes)[0]]
    print(f"B = {rows}, K = {samples}, D = {latent}; megabytes (1e6) a rank sends in a step, counted (formula, TCP: over counted)")
    kinds = ("ddp", *ESTIMATORS)
    print(f"{'ranks':>5}{'N':>4}{'parameters':>12}" + "".join(f"{kind:>24}" for kind in kinds) + f"{'break-even P (resampled)':>26}")
    for r in results:
        cells = [f"{r[k] / 1e6:.3f} ({r[f'{k} by formula'] / r[k]:.4f}, {(r[f'{k} by TCP'] or 0) / r[k]:.3f})" for k in kinds]
        print(f"{r['ranks']:>5}{r['N']:>4}{r['parameters']:>12,}" + "".join(f"{c:>24}" for c in cells) + f"{r['break_even']:>26,.0f}")
    if save:
        print(f"\nkept in {keep('modality_parallel', results, device=CPU, threads=1)}")


class Counted(TorchDispatchMode):
    """Within it, every collective that this thread starts (DDP's too): its name and bytes sent, if by a ring."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, float]] = []

    @property
    def sent(self) -> float:
        """Bytes of all of them."""
        return sum(sent for _, sent in self.calls)

    def __torch_dispatch__(self, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: Any = None) -> Any:
        """Note what is a collective; everything runs as it would."""
        if function.namespace == "c10d":
            self.calls.append(_seen(function.__name__.partition(".")[0], arguments))
        return function(*arguments, **(keywords or {}))


def _seen(name: str, arguments: tuple[Any, ...]) -> tuple[str, float]:
    kinds = {"allreduce_": ("all_reduce", 0, 1), "allgather_": ("all_gather", 1, 2)}  # its kind, and where its tensors and its group stand
    if name not in kinds:
        raise ValueError(f"{name}: this collective is not counted here; expected one of {sorted(kinds)}")
    kind, tensors, group = kinds[name]
    size = sum(tensor.nbytes for tensor in arguments[tensors])
    return kind, Collective(kind, size / 4).sent(dist.ProcessGroup.unbox(arguments[group]).size())  # pyright: ignore[reportArgumentType]


# ---- on a rank --------------------------------------------------------------------------------------------------------------------------


def measured(rank: int, world: int, modalities: Sequence[int], sizes: dict[str, int]) -> list[dict[str, Any]]:
    """For each N the bytes of this rank."""
    return [_measured(rank, world, number, sizes) for number in modalities]


def _measured(rank: int, world: int, number: int, sizes: dict[str, int]) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (1, world), mesh_dim_names=("data", "modality"))
    whole = objective_of(number, "resampled", sizes)
    parameters = sum(p.numel() for p in whole.parameters())
    replica = DistributedDataParallel(whole)
    share = np.split(np.arange(sizes["rows"]), world)[rank]
    row: dict[str, Any] = {"N": number, "parameters": parameters, "ddp by formula": data_parallel(parameters, world).sent}
    row |= _sent("ddp", lambda: replica(batch_of(number, share)).total.backward())
    batch = batch_of(number, np.arange(sizes["rows"]))
    for estimator in ESTIMATORS:
        objective = objective_of(number, estimator, sizes)
        placed = ModalityParallel(objective, mesh)
        row |= _sent(estimator, lambda placed=placed: (placed(batch).total.backward(), placed.synchronise_gradients()))
        work = workload_of(objective, batch)
        row[f"{estimator} by formula"] = modality_parallel(work, placed.assignment).sent
        row["break_even"] = round(break_even_parameters(work, placed.assignment, Rates(bandwidth=1e9, latency=0.0)))
    return row


def _sent(kind: str, step: Callable[[], Any]) -> dict[str, float | None]:
    """Bytes of a step: counted at the dispatcher, and by the system, on the mean of STEPS more."""
    with Counted() as counted:
        step()
    step()  # DDP's second step arranges its buckets anew, and tells the others
    before = sent_bytes()
    for _ in range(STEPS):
        step()
    after = sent_bytes()
    return {kind: counted.sent, f"{kind} by TCP": None if before is None or after is None else (after - before) / STEPS}


def objective_of(number: int, estimator: Estimator, sizes: dict[str, int]) -> MEME:
    torch.manual_seed(0)
    width = (sizes["hidden"],) * 2
    modalities = {f"m{i}": mlp((EVENT,), latent_dim=sizes["latent"], hidden=width) for i in range(number)}
    return MEME(modalities, pseudo_inputs=1, samples=sizes["samples"], estimator=estimator)


def batch_of(number: int, rows: np.ndarray, *, observed: float = 1.0) -> Batch:
    """These rows of an endless data set of N modalities, of whose entries a share is observed (a row without any gets its first)."""
    mask = np.random.default_rng(0).random((int(rows.max()) + 1, number))[rows] < observed
    mask[:, 0] |= ~mask.any(1)
    data = {f"m{i}": torch.randn(int(column.sum()), EVENT, generator=torch.Generator().manual_seed(i)) for i, column in enumerate(mask.T)}
    return pack(data, mask, draw=rows, single=observed < 1)
