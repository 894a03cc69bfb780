"""`meme-dist refine RUN`: what refinement does to a trained run's codes, and missing entries filled in from refined codes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from meme_dist.data.index import Manifest
from meme_dist.data.stream import Evaluation
from meme_dist.evaluate import Reduce, alone, evaluate
from meme_dist.flags import parsed
from meme_dist.impute import check_features, impute
from meme_dist.mcmc import HMC, MALA, MAP, ULA, Kernel
from meme_dist.metrics.coherence import Sources, source_sets
from meme_dist.metrics.intervals import mean
from meme_dist.metrics.rows import Metric, holds, joined, on_device, with_square
from meme_dist.objectives.base import Objective
from meme_dist.record import write_json
from meme_dist.refine import Refining, check_tempers, refine
from meme_dist.run_commands import find, together
from meme_dist.tables import estimate, table
from meme_dist.types import Batch, Sums, pack

ROWS = 256  # of a batch at most, and measured by default
WHEN = ("before", "after", "gain")


def main(words: list[str]) -> int:
    """`refine RUN`."""
    from tyro.conf import Positional

    def command(
        run: Positional[str],
        kernel: Literal["mala", "hmc", "ula", "map"] = "mala",
        budget: int = 200,
        leapfrogs: int = 5,
        temper: dict[str, float] | None = None,
        rows: int = ROWS,
        shards: str | None = None,
        out: Path | None = None,
        seed: int = 0,
        checkpoint: Literal["last", "best"] = "last",
    ) -> int:
        """Move codes towards the model's exact posterior by Markov chains, and measure what that does to test rows: to their log joint, and
        to what their codes say of the other modalities. With --shards and --out missing entries are filled in from refined codes, too.

        Args:
            run: Name of the run, or the path of its folder.
            kernel: Langevin with a test (mala), Hamiltonian (hmc), Langevin without (ula), or ascent to the mode (map).
            budget: Gradient evaluations of each row.
            leapfrogs: Gradients of a step of hmc.
            temper: Below 1 to trust a modality less, by name: --temper photo 0.1.
            rows: Test rows that are measured.
            shards: Folder, or address, of shards to fill in.
            out: New folder for the completed shards.
            seed: Seed of the draws.
            checkpoint: The last weights, or those with the lowest held-out loss.
        """
        if rows < 1:
            raise ValueError(f"refine: expected --rows of at least 1, got {rows}")
        if (shards is None) != (out is None):
            raise ValueError("refine: --shards and --out go together: what to fill in, and where to write it")
        chosen: Kernel = {"mala": MALA, "hmc": HMC(leapfrogs), "ula": ULA(), "map": MAP(rate=1.0)}[kernel]

        def work(processes: Any) -> None:
            stored = find(run, checkpoint, processes)
            with processes.agreed():
                if shards is not None:
                    check_features(Manifest.load(shards), stored.manifest)
            split = first_rows(stored.manifest, rows, seed=seed, rank=processes.rank, world=processes.world)
            check_tempers(list(stored.manifest.fields), temper or {})
            sources = source_sets(list(stored.manifest.fields))
            metric = refinement(sources, rows=rows, kernel=chosen, budget=budget, temper=temper or {})
            entries = measured(stored.objective, split, metric, reduce=processes.reduce)
            if processes.is_main:
                settings = {"kernel": kernel, "budget": budget, "leapfrogs": leapfrogs, "temper": temper or {}, "rows": rows, "seed": seed}
                told = {"checkpoint": checkpoint, "step": stored.step, "settings": settings, "refinement": entries}
                write_json(stored.folder / _file(settings, checkpoint), told)
                print(shown(entries))
            if shards is not None and out is not None:
                model = Refining(stored.objective, kernel=chosen, budget=budget, temper=temper or {})
                filled = impute(model, stored.manifest.fields, shards, out, seed=seed, processes=processes)
                if processes.is_main:
                    print(
                        "\n".join(f"{out}: {name}, {part.rows:,} rows: {part.filled:,} entries filled in" for name, part in filled.items())
                    )

        return together(work)

    return parsed(command, words, "refine")


def _file(settings: Mapping[str, Any], checkpoint: str) -> str:
    """A name of its own for whatever changes the figures."""
    kernel = settings["kernel"]
    parts = ["refined", f"hmc{settings['leapfrogs']}" if kernel == "hmc" else kernel, str(settings["budget"])]
    parts += [f"{name}={value:g}" for name, value in sorted(settings["temper"].items())]
    parts += [f"{name}{settings[name]}" for name, usual in (("rows", ROWS), ("seed", 0)) if settings[name] != usual]
    return "-".join([*parts, *([] if checkpoint == "last" else [checkpoint])]) + ".json"


def first_rows(manifest: Manifest, rows: int, *, seed: int, rank: int, world: int) -> Evaluation:
    """The first test rows, in batches small enough that every rank has its share of the chains."""
    rows = min(rows, manifest.num_rows("test"))
    size = min(ROWS, -(-rows // world))
    return Evaluation(manifest.folder, "test", batch_size=size, rank=rank, world=world, seed=seed).first(rows)


def refinement(sources: Sequence[Sources], *, rows: int, kernel: Kernel, budget: int, temper: Mapping[str, float]) -> Metric:
    """Before and after refinement, from each set of sources: the log target, and log p(x_target | z) of each modality outside.

    One chain for each row below `rows` that holds the sources, and none for others. Targets with latents of their own are left out: what
    the sources say of those is their prior, refined or not.
    """

    def metric(objective: Objective, batch: Batch) -> dict[str, Sums]:
        sums: dict[str, Sums] = {}
        for chosen in sources:
            own = {name: value for name, value in temper.items() if name in chosen}
            wanted = holds(batch, chosen) & (batch.draw < rows)
            others = [name for name in batch.modalities if name not in chosen and not objective.modality(name).private_dim]
            if not bool(wanted.any()):
                nothing = torch.zeros(0, device=batch.draw.device)
                for key in (joined(chosen), *(f"{joined(chosen)}>{name}" for name in others)):
                    sums |= _compared(key, nothing, nothing)
                continue
            part = _part(batch, wanted)  # chains are dear
            found = refine(objective, part.only(*chosen), kernel=kernel, budget=budget, temper=own)
            sums |= _compared(joined(chosen), found.before[0], found.after[0])
            for name in others:
                both = torch.cat([found.first, found.z])[None]
                before, after = objective.explanations(part.only(name), both)[0, 0] / objective.modality(name).weight
                counted = holds(part, [name])
                sums |= _compared(f"{joined(chosen)}>{name}", before[counted], after[counted])
        return sums

    return metric


def _part(batch: Batch, rows: Bool[Tensor, " B"]) -> Batch:
    """These rows alone, packed anew: each keeps its noise."""
    observed = batch.observed[rows]
    present = {name: batch.dense(name)[rows][there] for name, there in zip(batch.modalities, observed.T, strict=True)}
    draw, label = batch.draw[rows].cpu().numpy(), None if batch.label is None else batch.label[rows]
    part = pack(present, observed.cpu().numpy(), draw=draw, seed=batch.seed, single=batch.single, label=label)
    return on_device(part, batch.draw.device)


def _compared(key: str, before: Tensor, after: Tensor) -> dict[str, Sums]:
    pairs = zip(WHEN, (before, after, after - before), strict=True)
    return {name: sums for when, values in pairs for name, sums in with_square(f"{key}/{when}", values).items()}


def measured(objective: Objective, batches: Evaluation, metric: Metric, *, reduce: Reduce = alone) -> list[dict[str, Any]]:
    """[{"sources", "target" (null: the log target itself), "before", "after", "gain": estimates in nats a row}]. Collective."""
    sums = evaluate(objective, batches, [metric], reduce=reduce)
    keys = dict.fromkeys(name.rpartition("/before")[0] for name in sums if name.endswith("/before"))
    entries = []
    for key in keys:
        sources, _, target = key.partition(">")
        values = {when: mean(sums[f"{key}/{when}"], sums[f"{key}/{when}/square"]).json() for when in WHEN}
        entries.append({"sources": sources.split("+"), "target": target or None, **values})
    return entries


def shown(entries: Sequence[Mapping[str, Any]]) -> str:
    """The entries as a table."""
    lines = [
        [" + ".join(entry["sources"]), entry["target"] or "*log target*", *(estimate(entry[when], digits=1) for when in WHEN)]
        for entry in entries
    ]
    said = "Nats a row: the log target that the chains climb, and log p(x | z) of modalities that were not shown."
    return f"{said}\n\n{table(['from', 'of', *WHEN], lines)}"
