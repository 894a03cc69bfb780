"""Refinement of attacked codes by MCMC, against gradient evaluations: is Langevin as good as HMC, cheaper, and does either help at all?

Kuzina, Welling and Tomczak (NeurIPS 2022) run HMC from the code of an attacked image. A model of two views of a class (`planted` without
noise: each view an image of its own) is trained by its recipe; one view of test rows is attacked; its code is refined by each kernel with
each budget. Measured, over rows and seeds:

accuracy     share of rows whose class, by a linear classifier of codes (trained on draws of q of the same sources), is the clean code's
correct      share of rows whose class is the true one: what compares one view with two
log joint    mean of log p(x_a, z) in nats at the refined code, and at the clean one: where that is far lower, sampling cannot return there
MS-SSIM      between the decodings of the clean and of the refined code: 1 where nothing is left of the attack

then the same with tempered likelihoods, with the clean other view in the target, and under attacks that know the refinement; the effective
sample size per gradient; and whether MALA with a fifth of HMC's gradients is at most 2 points less accurate (paired bootstrap over rows).
"""

import itertools
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.record import CPU, keep
from meme_dist import run, stored
from meme_dist.attacks import against_posterior, attack, through_refinement, unsupervised
from meme_dist.data.sets._pairing import generator
from meme_dist.data.sets.planted import Images
from meme_dist.data.stream import Evaluation
from meme_dist.mcmc import HMC, MALA, MAP, ULA, Kernel, effective_size, start, walk
from meme_dist.metrics.latents import collect
from meme_dist.metrics.ms_ssim import ms_ssim
from meme_dist.metrics.probes import fit_logistic
from meme_dist.metrics.rows import evaluating, noise_of
from meme_dist.objectives.base import Objective
from meme_dist.recipes.base import Model, Name
from meme_dist.refine import Target, log_joint, refine
from meme_dist.train.training import Training
from meme_dist.types import Batch

ATTACKED, CLEAN = "source1", "target"  # the two views
KERNELS: Mapping[str, Kernel] = {"HMC L=20": HMC(20), "HMC L=5": HMC(5), "MALA": MALA, "ULA": ULA(), "MAP": MAP(rate=1.0)}
PROBE_ROWS, DRAWS, MARGIN = 4000, 10_000, 0.02
SHORT, LONG = 50, 500  # budgets of the adaptive attacker, and of all that is not a curve
CHAINS = 4  # of the adaptive attacker, a row: the mean over them is what it raises
Row = dict[str, Any]
Trial = tuple[str, str, str, int]  # experiment, attack, kernel, budget


class Case(NamedTuple):
    """A trained model, its clean rows, and how codes are judged."""

    objective: Objective
    batch: Batch
    probes: Mapping[tuple[str, ...], nn.Linear]
    label: Tensor  # of the clean codes, by the classifier of `ATTACKED` alone
    size: int  # side of the images
    seed: int


def main(
    *,
    images: Images = "digits",
    source: Path | None = None,
    objective: Name = "mvae",
    latent_dim: int = 16,
    seeds: tuple[int, ...] = (0, 1, 2),
    rows: int = 300,
    steps: int = 2000,
    radii: tuple[float, ...] = (0.1,),
    budgets: tuple[int, ...] = (20, 50, 100, 250, 400, 500, 2000),
    attack_steps: int = 50,
    restarts: int = 5,
    threads: int = 1,
    save: bool = True,
) -> None:
    """Accuracy under attack, log joint and MS-SSIM against gradient evaluations, for HMC, MALA, ULA, MAP and no refinement.

    Args:
        images: What the views show: scikit-learn's digits (8 x 8), or MNIST or Fashion-MNIST at 14 x 14 from --source.
        source: Folder with mnist.npz or fashion_subset_20000_4000.npz.
        objective: What is trained.
        latent_dim: Size of the latent space.
        seeds: Trainings, each attacked and refined.
        rows: Test rows of each seed.
        steps: Training steps.
        radii: Of the attacks, in pixel values of [0, 1].
        budgets: Gradient evaluations.
        attack_steps: Steps of an attack.
        restarts: Random starts of an attack.
        threads: CPU threads.
        save: Append the rows to benchmarks/results/refinement.jsonl.
    """
    torch.set_num_threads(threads)
    setting = {"images": images, "objective": objective, "latent_dim": latent_dim, "steps": steps, "rows": rows}
    found: list[Row] = []
    for radius in radii:
        hits: dict[Trial, list[np.ndarray]] = {}
        mine: list[Row] = []
        for seed in seeds:
            began = time.perf_counter()
            case = trained(images, source, objective, latent_dim, seed=seed, rows=rows, steps=steps)
            print(f"seed {seed}: trained in {time.perf_counter() - began:.0f} s", flush=True)
            mine += measured(case, radius, budgets, partial(attack, steps=attack_steps, restarts=restarts), hits)
            print(f"seed {seed}: measured after {time.perf_counter() - began:.0f} s", flush=True)
        found += [{"radius": radius, "seeds": len(seeds), **setting, **row} for row in [*averaged(mine), *compared(hits, budgets)]]
        show([row for row in found if row["radius"] == radius])
    if save:
        print(f"\nkept in {keep('refinement', found, device=CPU, threads=threads)}")


def trained(images: Images, source: Path | None, objective: Name, latent_dim: int, *, seed: int, rows: int, steps: int) -> Case:
    """Train by the recipe, in a folder that goes when this returns; then the judges of codes."""
    model, training = Model(objective, latent_dim), Training(steps=steps, learning_rate=1e-3, schedule="cosine", seed=seed)
    keywords = {"images": images, "source": source, "sources": 1, "noise": 0.0, "model": model, "training": training}
    with tempfile.TemporaryDirectory() as folder:
        where = run.Where(run=f"{folder}/run", data=Path(folder), evaluate=False)
        run.train("planted", keywords, where, console=Console(quiet=True))
        found = stored.load(Path(folder) / "run", device=torch.device("cpu"))  # CPU times are compared
        batch = next(iter(Evaluation(found.manifest.folder, "test", batch_size=rows, seed=seed)))
        train = Evaluation(found.manifest.folder, "train", batch_size=500, seed=seed)
        latents = collect(found.objective, train, rows=PROBE_ROWS, sources=[(ATTACKED,), (ATTACKED, CLEAN), (CLEAN,)])
    probes = {names: fit_logistic(q.sample, latents.label, 10) for names, q in latents.posteriors.items()}
    with evaluating(found.objective):
        label = probes[ATTACKED,](found.objective.infer(batch.only(ATTACKED)).mean).argmax(-1)
    return Case(found.objective, batch, probes, label, int(batch.dense(ATTACKED).shape[1] ** 0.5), seed)


def measured(case: Case, radius: float, budgets: Sequence[int], make: Any, hits: dict[Trial, list[np.ndarray]]) -> list[Row]:
    """All of one seed at one radius."""
    objective, alone = case.objective, case.batch.only(ATTACKED)
    attacked = make(objective, alone, ATTACKED, unsupervised(objective, alone), radius=radius).batch
    rows = [judged(case, alone, "curve", "no attack", "none", 0, hits), judged(case, attacked, "curve", "image", "none", 0, hits)]
    for name, kernel in KERNELS.items():
        affordable = [budget for budget in budgets if budget > (kernel.leapfrogs if isinstance(kernel, HMC) else 1)]
        rows += [judged(case, attacked, "curve", "image", name, budget, hits) for budget in affordable]
    rows += [judged(case, alone, "clean", "no attack", name, LONG, hits) for name in ("HMC L=20", "MALA", "MAP")]
    rows += [judged(case, attacked, f"temper {t}", "image", "MALA", LONG, hits, temper=t) for t in (0.3, 0.1, 0.03)]
    return rows + adaptive(case, radius, make, hits) + other_view(case, radius, make, hits) + efficiency(case, attacked)


def adaptive(case: Case, radius: float, make: Any, hits: dict[Trial, list[np.ndarray]]) -> list[Row]:
    """Attacks that know the refinement: through its chains, and on the posterior itself, towards the code of a row of another class."""
    objective, alone = case.objective, case.batch.only(ATTACKED)
    probe = case.probes[ATTACKED,]

    def loss(z: Tensor) -> Tensor:
        return torch.stack([cross_entropy(probe(code), case.label, reduction="none") for code in z])

    with evaluating(objective):
        clean = objective.infer(alone).mean
    rows = torch.arange(len(clean))
    other = torch.stack([(rows + shift) % len(rows) for shift in range(1, len(rows))])
    wrong = clean[other.gather(0, (case.label[other] != case.label).int().argmax(0, keepdim=True))[0]]
    gains = {
        "through the chains": through_refinement(objective, loss, budget=SHORT, chains=CHAINS),
        "on the posterior": against_posterior(objective, ATTACKED, clean=clean, wrong=wrong),
    }
    found = []
    for name, gain in gains.items():
        cheap = {"steps": 10, "restarts": 1} if name == "through the chains" else {}
        attacked = make(objective, alone, ATTACKED, gain, radius=radius, **cheap).batch
        found += [judged(case, attacked, "adaptive", name, kernel, budget, hits) for kernel, budget in (("none", 0), ("MALA", LONG))]
    return found


def other_view(case: Case, radius: float, make: Any, hits: dict[Trial, list[np.ndarray]]) -> list[Row]:
    """The attack is on what both views say together; the clean view stands beside the attacked one, or alone in the target."""
    objective, batch = case.objective, case.batch
    moved = make(objective, batch, ATTACKED, unsupervised(objective, batch), radius=radius).batch
    rows = [judged(case, batch, "two views", "no attack", "none", 0, hits), judged(case, moved, "two views", "image", "none", 0, hits)]
    rows += [judged(case, moved, "two views", "image", kernel, LONG, hits) for kernel in ("HMC L=20", "MALA", "MAP")]
    rows += [judged(case, moved, "two views, image at .1", "image", "MALA", LONG, hits, temper={ATTACKED: 0.1})]
    rows += [judged(case, moved, "two views, clean one in the target", "image", "MALA", LONG, hits, modalities=[CLEAN])]
    return rows + [judged(case, moved.only(CLEAN), "clean view alone", "no attack", "none", 0, hits)]


def judged(
    case: Case, batch: Batch, experiment: str, attacked: str, kernel: str, budget: int, hits: dict[Trial, list[np.ndarray]], **target: Any
) -> Row:
    """Refine what these rows say (not with a budget of 0) and judge the codes."""
    objective, began = case.objective, time.process_time()
    if budget:
        done = refine(objective, batch, kernel=KERNELS[kernel], budget=budget, **target)
        z, result = done.z, done.result
    else:
        with evaluating(objective):
            z, result = objective.infer(batch).sample(noise_of(batch), "refine/start/z", 1), None
    seconds = time.process_time() - began
    with evaluating(objective):
        clean, probe = objective.infer(case.batch.only(*batch.modalities)).mean[None], case.probes[tuple(batch.modalities)]
        seen, wanted = (probe(code[0]).argmax(-1) for code in (z, clean))
        shown = [_image(case, objective.modality(ATTACKED).reconstruct(code[0])) for code in (clean, z)]
    right = (seen == wanted).numpy()
    hits.setdefault((experiment, attacked, kernel, budget), []).append(right)
    row = {"experiment": experiment, "attack": attacked, "kernel": kernel, "budget": budget, "gradients": result.gradients if result else 0}
    return row | {
        "accuracy": right.mean(),
        "correct": (seen == case.batch.label).double().mean().item(),
        "log_joint": log_joint(objective, batch, z).mean().item(),
        "log_joint_clean_code": log_joint(objective, batch, clean).mean().item(),
        "ms_ssim": ms_ssim(*shown).mean().item(),
        "accept": result.accept.mean().item() if result else None,
        "cpu_s": seconds,
    }


def _image(case: Case, pixels: Tensor) -> Tensor:
    """A view's pixels in the order of the image: the data set scrambles them."""
    order = torch.from_numpy(generator(0, "planted/view 0").permutation(pixels.shape[1]))
    image = torch.empty_like(pixels).index_copy(1, order, pixels)
    return image.clamp(0, 1).view(-1, 1, case.size, case.size)


def efficiency(case: Case, attacked: Batch) -> list[Row]:
    """Effective sample size of each coordinate's mean per gradient, after LONG gradients of burn-in: median over rows, worst coordinate."""
    found, noise = [], noise_of(attacked)
    with evaluating(case.objective):
        target = Target(case.objective, attacked, [ATTACKED])
        point, scale = target.beginning(noise, "efficiency", 1, "sample")
        for name, kernel in KERNELS.items():
            if not isinstance(kernel, HMC):
                continue
            density, began = target.scaled(scale), time.process_time()
            chain, warm = start(point / scale, density), LONG // kernel.leapfrogs
            first = torch.full_like(chain.log_density, kernel.first_step)
            settings = {"kernel": kernel, "steps": 3 * warm, "burn_in": warm, "step_size": first}
            walked = walk(chain, density, noise=noise, purpose="efficiency", **settings)
            states = torch.stack([state.chain.z for state in itertools.islice(walked, warm, None)])
            worst = effective_size(states.flatten(1)).view(states.shape[1:]).min(-1).values.median().item()
            row = {"experiment": "efficiency", "attack": "image", "kernel": name, "budget": 2 * LONG, "cpu_s": time.process_time() - began}
            found.append(row | {"ess": worst, "ess_per_1000_gradients": 1000 * worst / (2 * LONG)})
    return found


# ---- over seeds ---------------------------------------------------------------------------------------------------------------------


def averaged(rows: Sequence[Row]) -> list[Row]:
    """Means over seeds of what was measured, and the range of the accuracy."""
    groups: dict[Trial, list[Row]] = {}
    for row in rows:
        groups.setdefault((row["experiment"], row["attack"], row["kernel"], row["budget"]), []).append(row)
    return [_mean(group) for group in groups.values()]


def _mean(group: Sequence[Row]) -> Row:
    found: Row = {}
    for key, value in group[0].items():
        number = isinstance(value, float | np.floating)
        found[key] = round(float(np.mean([row[key] for row in group])), 4) if number else value
    if "accuracy" in found:
        found |= {
            "accuracy_low": round(min(row["accuracy"] for row in group), 4),
            "accuracy_high": round(max(row["accuracy"] for row in group), 4),
        }
    return found


def compared(hits: Mapping[Trial, Sequence[np.ndarray]], budgets: Sequence[int]) -> list[Row]:
    """MALA at each budget against each HMC at five times as much; and every long run against none."""
    found = []
    for name in ("HMC L=20", "HMC L=5"):
        for budget in budgets:
            ours, theirs = ("curve", "image", "MALA", budget), ("curve", "image", name, 5 * budget)
            if ours in hits and theirs in hits:
                found.append(_difference(hits, ours, theirs))
    none = ("curve", "image", "none", 0)
    return found + [_difference(hits, trial, none) for trial in hits if trial[:2] == none[:2] and trial[3] == max(budgets)]


def _difference(hits: Mapping[Trial, Sequence[np.ndarray]], model: Trial, reference: Trial) -> Row:
    """Paired bootstrap over all rows of all seeds: percentiles 2.5 and 97.5 of the mean difference."""
    difference = np.concatenate(hits[model]).astype(float) - np.concatenate(hits[reference]).astype(float)
    counts = [int((difference == value).sum()) for value in (-1.0, 0.0, 1.0)]
    drawn = np.random.default_rng(0).multinomial(len(difference), np.array(counts) / len(difference), size=DRAWS)
    low, high = np.percentile((drawn[:, 2] - drawn[:, 0]) / len(difference), [2.5, 97.5])
    return {
        "experiment": "difference",
        "kernel": model[2],
        "budget": model[3],
        "reference": reference[2],
        "reference_budget": reference[3],
        "pairs": len(difference),
        "difference": round(float(difference.mean()), 4),
        "low": round(float(low), 4),
        "high": round(float(high), 4),
        "not_worse": bool(low > -MARGIN),
    }


def show(rows: Sequence[Row]) -> None:
    """Tables of one radius."""
    print(f"\nradius {rows[0]['radius']}\n{'experiment':<36}{'attack':<20}{'kernel':<10}{'budget':>7}{'accuracy':>9}{'correct':>9}", end="")
    print(f"{'log joint':>11}{'clean code':>12}{'MS-SSIM':>9}{'accept':>8}{'CPU s':>8}")
    for row in rows:
        if "accuracy" in row:
            accept = "" if row["accept"] is None else f"{row['accept']:.2f}"
            print(
                f"{row['experiment']:<36}{row['attack']:<20}{row['kernel']:<10}{row['budget']:>7}{row['accuracy']:>9.3f}{row['correct']:>9.3f}",
                end="",
            )
            print(f"{row['log_joint']:>11.1f}{row['log_joint_clean_code']:>12.1f}{row['ms_ssim']:>9.3f}{accept:>8}{row['cpu_s']:>8.2f}")
    for row in rows:
        if row["experiment"] == "efficiency":
            print(f"effective draws per 1,000 gradients, {row['kernel']}: {row['ess_per_1000_gradients']:.1f}")
    for row in rows:
        if row["experiment"] == "difference":
            ours, theirs = f"{row['kernel']} at {row['budget']}", f"{row['reference']} at {row['reference_budget']}"
            verdict = "within the margin" if row["not_worse"] else "not shown to be within the margin"
            print(f"{ours} - {theirs}: {row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}], {row['pairs']} pairs: {verdict}")
