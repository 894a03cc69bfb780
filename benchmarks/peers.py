"""One training step of each objective beside MultiVae's (1.0.3): the same networks, rows and clock.

On a CPU each figure comes from a process of its own, whose memory is that row's alone; on a GPU, whose allocator counts, all from one.

Networks are MultiVae's defaults for 1 x 28 x 28: encoders 784-512-512 (784-512 for MMVAE+), decoders 512-784 with a sigmoid, ReLU, Normal
likelihood of scale 1. A step is forward, backward and Adam. MultiVae is never a dependency of the library. Where it cannot be imported, the
script says so and measures the library alone; where torchvision or nltk are absent, which it imports for its own data sets only, empty
modules stand in for them. Forms:

multivae            the class as it is, its masks dense and its rows zero-filled
meme_dist           the objective with its defaults (MMVAE and MMVAE+ differentiate one drawn sample a modality); also others
meme_dist, all K    MMVAE and MMVAE+ that differentiate all K samples, as MultiVae's do: the same computation
..., as trained     on a CPU: passes and optimiser of `meme-dist train`, which takes the fused form of Adam; the forms before, and that of
                    MultiVae's own trainer, have PyTorch's default, which goes tensor by tensor
..., recorded       on a GPU: as trained there, both passes replayed as one CUDA graph (`engines/captured.py`)
"""

import importlib
import importlib.util
import json
import logging
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.peers_told import CPU_CLOCK, GPU_CLOCK, Row, show, told
from benchmarks.record import keep
from benchmarks.stand_in import stand_in
from benchmarks.timing import synchronize
from meme_dist.likelihoods import Normal
from meme_dist.metrics.rows import on_device
from meme_dist.modality import Modality
from meme_dist.objectives.base import Objective
from meme_dist.train.engines.captured import Captured
from meme_dist.train.engines.replicated import Replicated
from meme_dist.train.training import Training
from meme_dist.types import Batch, pack_dense

INSTALL = (
    "multivae cannot be imported ({error}): the library is measured alone. For the comparison, in an environment of its own:\n"
    "  pip install --no-deps multivae==1.0.3 pythae==0.1.2 dill marshmallow mypy_extensions typing_inspect"
)
MODELS = ("mmvae", "mvae", "mopoe", "mvtcae", "mmvaeplus", "jmvae", "mmvm", "holder", "meme")
IMPORTANCE = ("mmvae", "mmvaeplus")  # those with K samples that MultiVae has too
ALONE = ("mmvm", "holder", "meme")  # MultiVae has no such model
AS_TRAINED = {"cpu": "as trained", "cuda": "recorded"}  # the form whose step is the trainer's own
EVENT, WIDTH, LATENT, PSEUDO_INPUTS = (1, 28, 28), 512, 64, 64
WARM = 2  # steps before the clock runs
ROOM = 12 << 30  # bytes of data that a row may take: beyond it an allocation fails, and the row says so
FEW = {("mopoe", 10): 16}  # rows a step where MultiVae's subsets leave no memory for more


class Case(NamedTuple):
    """What one row measures."""

    form: str
    model: str
    modalities: int
    missing: float
    batch_size: int
    samples: int
    steps: int
    seconds: float
    device: str = "cpu"


class Built(NamedTuple):
    """A model to be timed: `loss` is the mean over the rows of a batch that is made already."""

    model: nn.Module
    loss: Callable[[], Tensor]
    encoders: Sequence[nn.Module]
    decoders: Sequence[nn.Module]
    batch: Batch | None = None


def main(
    *,
    models: tuple[str, ...] = MODELS,
    modalities: tuple[int, ...] = (2, 5, 8, 10),
    missing: tuple[float, ...] = (0.0, 0.5),
    batch_size: int = 64,
    samples: int = 10,
    steps: int = 10,
    seconds: float = 60.0,
    device: Literal["cpu", "cuda"] = "cpu",
    save: bool = True,
) -> None:
    """Time of a step (a CPU's: processor time on one thread; a GPU's: from an idle device to an idle device), peak memory, and bytes kept
    for the backward pass.

    Args:
        models: Which of the objectives.
        modalities: Numbers of modalities.
        missing: Shares of entries that are missing; each row keeps one at least.
        batch_size: Rows a step (MoPoE of 10 modalities: 16).
        samples: K of MMVAE and MMVAE+.
        steps: Steps that are timed, after two that are not.
        seconds: No further step is begun after so long.
        device: Where.
        save: Append the rows to benchmarks/results/peers.jsonl.
    """
    error = importable()
    if error:
        print(INSTALL.format(error=error), flush=True)
    rows = []
    for case in cases(models, modalities, missing, batch_size, samples, steps, seconds, device):
        if error and case.form == "multivae":
            continue
        rows.append(apart(case) if device == "cpu" else here(case))
        print(told(rows[-1]), flush=True)
    show(rows)
    if save and rows:
        print(f"\nkept in {keep('peers', rows, device=torch.device(device), threads=1)}")


def cases(
    models: Sequence[str],
    modalities: Sequence[int],
    missing: Sequence[float],
    batch_size: int,
    samples: int,
    steps: int,
    seconds: float,
    device: str = "cpu",
) -> Iterator[Case]:
    """The grid, both systems one after the other for each point of it."""
    for model in models:
        forms = ("multivae", "meme_dist", "meme_dist, all K")[model in ALONE : 3 if model in IMPORTANCE else 2]
        forms += tuple(f"{form}, {AS_TRAINED[device]}" for form in forms if form != "multivae")
        for number in modalities:
            for share in missing:
                size, draws = FEW.get((model, number), batch_size), samples if model in (*IMPORTANCE, "meme") else 1
                yield from (Case(form, model, number, share, size, draws, steps, seconds, device) for form in forms)


def importable() -> str:
    """Why MultiVae cannot be imported, in a process of its own; empty where it can."""
    script = "from benchmarks.peers import stand_in; stand_in(); import multivae.models"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


def apart(case: Case) -> Row:
    """`measure` in a fresh process: its memory is that of this row alone. A row that fails says why."""
    script = f"import json; from benchmarks.peers import Case, measure; print('ROW', json.dumps(measure(Case(*{tuple(case)!r}))))"
    command = [sys.executable, "-W", "ignore", "-c", script]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=60 + 6 * case.seconds)
    except subprocess.TimeoutExpired:
        return {**case._asdict(), "error": f"not ended within {60 + 6 * case.seconds:.0f} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("ROW ")]
    if lines:
        return {**case._asdict(), **json.loads(lines[0][4:])}
    last = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
    return {**case._asdict(), "error": f"ended with {done.returncode}: {last[:300]}"}


def here(case: Case) -> Row:
    """`measure` in this process, which leaves nothing on the device. A row that fails says why."""
    try:
        return {**case._asdict(), **measure(case)}
    except Exception as error:
        return {**case._asdict(), "error": f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"}
    finally:
        torch.cuda.empty_cache()


# ---- one row ----------------------------------------------------------------------------------------------------------------------------


def measure(case: Case) -> Row:
    """Time, memory and work of a step, in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    on_cpu = case.device == "cpu"
    if on_cpu:
        resource.setrlimit(resource.RLIMIT_DATA, (ROOM, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    held = 0 if on_cpu else torch.cuda.memory_allocated()  # an earlier row's, were there any: the peak of a GPU holds the weights, too
    built = _multivae(case) if case.form == "multivae" else ours(case)
    built.model.train()
    once = _update(built, case)
    before = _memory("VmRSS:")
    clock = time.process_time if on_cpu else time.perf_counter

    def step() -> float:
        synchronize()
        start = clock()
        once()
        synchronize()
        return clock() - start

    first, taken = time.monotonic(), []
    if not on_cpu:
        torch.cuda.reset_peak_memory_stats()
    while len(taken) < WARM + case.steps and (len(taken) <= WARM or time.monotonic() - first < case.seconds):
        taken.append(step())
    timed = taken[WARM:]
    middle, peak = statistics.median(timed), _memory("VmHWM:") - before if on_cpu else torch.cuda.max_memory_allocated() - held
    figures = (1e3 * middle, 1e3 * min(timed), case.batch_size / middle)
    return {
        **dict(zip(CPU_CLOCK if on_cpu else GPU_CLOCK, (round(x, 3) for x in figures), strict=True)),
        "timed": len(timed),
        "peak_mb": round(peak / 1e6, 1),
        "loss": round(float(built.loss().detach()), 2),
        "parameters": sum(p.numel() for p in built.model.parameters()),
        **work(built),
    }


def _update(built: Built, case: Case) -> Callable[[], None]:
    """Forward, backward and Adam; the optimiser is PyTorch's default for both systems, and as trained what the trainer takes."""
    if case.form.endswith(AS_TRAINED[case.device]):
        batch, kind = built.batch, Replicated if case.device == "cpu" else Captured
        assert batch is not None
        engine = kind(built.model, Training(batch_size=case.batch_size, learning_rate=1e-4), Accelerator(cpu=case.device == "cpu"))

        def trained() -> None:
            engine.begin()
            engine.backward(engine.forward(batch, last=True).total / case.batch_size, last=True)
            engine.optimizer.step()

        return trained
    optimizer = torch.optim.Adam(built.model.parameters(), 1e-4)

    def plain() -> None:
        optimizer.zero_grad(set_to_none=True)
        built.loss().backward()
        optimizer.step()

    return plain


def work(built: Built) -> Row:
    """What does not depend on the machine: rows through the networks, distinct bytes kept for the backward pass, matrix FLOPs."""
    rows, saved = {"encoder_rows": 0, "decoder_rows": 0}, {}

    def hook(kind: str) -> Callable[..., None]:
        def count(_module: nn.Module, inputs: tuple[Tensor, ...], _out: Any) -> None:
            x = inputs[0]
            rows[kind] += len(x) if kind == "encoder_rows" else x.numel() // x.shape[-1]

        return count

    def packed(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    handles = [m.register_forward_hook(hook("encoder_rows")) for m in built.encoders]
    handles += [m.register_forward_hook(hook("decoder_rows")) for m in built.decoders]
    with torch.autograd.graph.saved_tensors_hooks(packed, lambda x: x):
        held = built.loss()
    for handle in handles:
        handle.remove()
    parameters = {p.untyped_storage().data_ptr() for p in built.model.parameters()}
    kept = sum(size for place, size in saved.items() if place not in parameters)
    del held
    with FlopCounterMode(display=False) as flops:
        built.loss().backward()
    return {**rows, "saved_mb": round(kept / 1e6, 1), "gflop": round(flops.get_total_flops() / 1e9, 3)}


def _memory(entry: str) -> int:
    """Bytes, as Linux counts them for this process; unlike `ru_maxrss`, nothing of the process that started it."""
    return 1024 * next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(entry))


# ---- rows and masks, the same for both --------------------------------------------------------------------------------------------------


def rows_of(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Random images, and a mask for each modality: independent entries, and the first modality where a row would be empty."""
    generator, names = torch.Generator().manual_seed(0), [f"m{index}" for index in range(case.modalities)]
    data = {name: torch.rand(case.batch_size, *EVENT, generator=generator) for name in names}
    masks = {name: torch.rand(case.batch_size, generator=generator) >= case.missing for name in names}
    masks["m0"] |= ~torch.stack(list(masks.values())).any(0)
    return data, masks


# ---- MultiVae ---------------------------------------------------------------------------------------------------------------------------


def _multivae(case: Case) -> Built:
    stand_in()
    logging.disable(logging.INFO)
    models = importlib.import_module("multivae.models")
    Output = importlib.import_module("multivae.data.datasets.base").DatasetOutput
    name, more = {
        "mmvae": ("MMVAE", {"K": case.samples, "prior_and_posterior_dist": "normal", "loss": "dreg_looser"}),
        "mvae": ("MVAE", {"use_subsampling": True, "k": 0, "warmup": 0}),
        "mopoe": ("MoPoE", {}),
        "mvtcae": ("MVTCAE", {}),
        "mmvaeplus": (
            "MMVAEPlus",
            {"K": case.samples, "prior_and_posterior_dist": "normal", "loss": "dreg_looser", "modalities_specific_dim": LATENT},
        ),
        "jmvae": ("JMVAE", {"warmup": 0}),
    }[case.model]
    data, masks = rows_of(case)
    if case.missing:
        data = {key: torch.where(masks[key][:, None, None, None], x, 0.0) for key, x in data.items()}
    data, masks = ({key: x.to(case.device) for key, x in part.items()} for part in (data, masks))
    config = getattr(models, f"{name}Config")(
        n_modalities=case.modalities, latent_dim=LATENT, input_dims=dict.fromkeys(data, EVENT), **more
    )
    model = getattr(models, name)(config).to(case.device)
    model.device = case.device
    rows = case.batch_size if case.model in IMPORTANCE else 1  # their losses are sums over rows, the others' are means

    def loss() -> Tensor:  # the inputs anew: some models take modalities out of them
        given = {"masks": dict(masks)} if case.missing else {}
        return model(Output(data=dict(data), **given), epoch=1).loss / rows

    return Built(model, loss, list(model.encoders.values()), list(model.decoders.values()))


# ---- this library -----------------------------------------------------------------------------------------------------------------------


def ours(case: Case) -> Built:
    """The objective of that name, on the packed rows that its loader would give it."""
    data, masks = rows_of(case)
    objective = built(case).to(case.device)
    batch = on_device(pack_dense(data, masks, single=case.missing > 0), torch.device(case.device))
    objective.initialise(batch)
    parts = [objective.modality(name) for name in data]
    encoders, decoders = [m.encoder for m in parts], [m.decoder for m in parts]
    return Built(objective, lambda: objective(batch).total / case.batch_size, encoders, decoders, batch)


def built(case: Case) -> Objective:
    """The class whose file is `meme_dist/objectives/MODEL.py`, set as MultiVae's is."""
    module = importlib.import_module(f"meme_dist.objectives.{case.model}")
    names: Mapping[str, str] = {"mmvaeplus": "MMVAEPlus", "mopoe": "MoPoE", "holder": "Holder"}
    return getattr(module, names.get(case.model, case.model.upper()))(networks(case), **settings(case))


def settings(case: Case) -> dict[str, Any]:
    """What differs from the objective's defaults."""
    match case.model:
        case "mvae":
            return {"subsets": 0}
        case "meme":
            return {"samples": case.samples, "pseudo_inputs": PSEUDO_INPUTS}
        case "mmvae" | "mmvaeplus":
            return {"samples": case.samples, "resampled": "all K" not in case.form}
        case _:
            return {}


def networks(case: Case) -> dict[str, Modality]:
    """MultiVae's default networks, one pair for each modality."""
    return {f"m{index}": network(private=LATENT if case.model == "mmvaeplus" else 0) for index in range(case.modalities)}


def network(*, private: int) -> Modality:
    """784-512-512 ReLU (with latents of its own: 784-512), and 512-784 with a sigmoid back."""
    pixels, latent = EVENT[0] * EVENT[1] * EVENT[2], LATENT + private
    deep = [] if private else [nn.Linear(WIDTH, WIDTH), nn.ReLU()]
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(pixels, WIDTH), nn.ReLU(), *deep, nn.Linear(WIDTH, 2 * latent))
    decoder = nn.Sequential(nn.Linear(latent, WIDTH), nn.ReLU(), nn.Linear(WIDTH, pixels), nn.Sigmoid(), nn.Unflatten(-1, EVENT))
    return Modality(encoder=encoder, decoder=decoder, likelihood=Normal(1.0), latent_dim=latent, feature=EVENT, private_dim=private)
