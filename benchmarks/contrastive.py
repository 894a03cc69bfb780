"""Contrastive priors: does bounding the log ratio make them stable, and do their draws fit together better?

known     q is an even mixture of ten Normals of scale s in d dimensions around centres from N(0, 1 - s^2), the base prior is N(0, I):
          log q / p and KL(q || p) are known. Fits to few and to many draws of q, with bounds B and other ways to keep log ratios small.
latents   a multimodal model is trained by its recipe; its prior is reweighted. Joint coherence, as judged by classifiers of real data, and
          Frechet distance of prior draws, before and after.

The hypothesis: a bound stabilises a contrastive prior and costs it nothing. It is confirmed where for every KL level some B has 98 % of the
unbounded ratio's gain and twice its effective sample size. Resampling fails where that size is below 5, or anything is not finite. Where
log Z rests on fewer than 200 effective draws of the base prior (`pooled`) a gain is an upper guess.
"""

import io
import math
import multiprocessing
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any, Literal, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.record import CPU, keep
from meme_dist import record, run, stored
from meme_dist.assess import Place, classifiers_of, evaluation
from meme_dist.classifiers import Classifier
from meme_dist.distributions import Components, DiagNormal, Prior
from meme_dist.metrics.coherence import joint_coherence
from meme_dist.metrics.frechet import Moments, frechet_distance, moment_sums, moments
from meme_dist.metrics.rows import evaluating
from meme_dist.noise import Noise
from meme_dist.objectives.base import Objective
from meme_dist.ratio import Contrast, LogRatio, fit_ratio
from meme_dist.recipes import RECIPES
from meme_dist.recipes.base import Model, Name
from meme_dist.recipes.keywords import flatten, unflatten
from meme_dist.reweighted import Langevin, Resample, Reweighted, gain, normalised, posterior_draws
from meme_dist.supervise import progress
from meme_dist.train.training import Training

Row = dict[str, Any]
KNOWN = ("gain", "gain_error", "pooled", "effective", "spread", "rmse", "largest", "on_mode", "energy", "fit_s")
MODES, TEST, CLIP, FEWEST = 10, 20_000, 50.0, 5.0
QUIET = Console(file=io.StringIO())


class Variant(NamedTuple):
    """A way to fit, and how to draw from what was fitted."""

    name: str
    contrast: Contrast
    clip: float = math.inf
    langevin: bool = False


def main(
    *,
    parts: tuple[Literal["known", "latents"], ...] = ("known", "latents"),
    seeds: tuple[int, ...] = (0,),
    sizes: tuple[int, ...] = (6, 12),
    scales: tuple[float, ...] = (0.5, 0.3, 0.2),
    train: tuple[int, ...] = (500, 20_000),
    bounds: tuple[float, ...] = (3, 5, 8, 12, math.inf),
    steps: int = 1000,
    proposals: int = 5000,
    draws: int = 100,
    objectives: tuple[Name, ...] = ("mmvae", "mopoe", "meme"),
    images: Literal["digits", "mnist", "fashion"] = "digits",
    source: Path | None = None,
    model_steps: int = 1000,
    judged: int = 1000,
    folder: Path = Path("data/contrastive"),
    processes: int = 2,
    save: bool = True,
) -> None:
    """Contrastive priors on known ratios and on the latents of trained models.

    Args:
        parts: What to measure.
        seeds: Of centres, draws, networks and trainings.
        sizes: d of the known ratios.
        scales: s of the known ratios: the smaller, the larger the divergence.
        train: Draws of q that a known ratio is fitted to.
        bounds: B, with inf for none.
        steps: Optimiser steps of a ratio's stage.
        proposals: From which one is resampled, on known ratios, and each chain's start; 1000 on latents.
        draws: Resampled draws, and Langevin chains, on known ratios.
        objectives: Models whose prior is reweighted, trained on planted evidence.
        images: What planted evidence shows.
        source: Folder with the images' file, for mnist and fashion.
        model_steps: Training steps of a model.
        judged: Prior draws that are judged.
        folder: Where runs and data are kept; a run that is there goes on from its last step, if any are left.
        processes: That work side by side, one thread each.
        save: Append the rows to benchmarks/results/contrastive.jsonl.
    """
    tasks: list[Callable[[], list[Row]]] = []
    if "known" in parts:
        if math.inf not in bounds:
            raise SystemExit("contrastive: the known ratios compare bounds with none: add inf to --bounds")
        levels = product(sizes, scales, train, seeds)
        tasks += [partial(known, *level, bounds=bounds, steps=steps, proposals=proposals, draws=draws) for level in levels]
    if "latents" in parts:
        shared = {"images": images, "source": source}
        prepare(shared, folder)
        models = product(objectives, seeds)
        more = {"bounds": bounds, "steps": steps, "model_steps": model_steps, "judged": judged, "folder": folder}
        tasks += [partial(latents, *model, shared=shared, **more) for model in models]
    rows: list[Row] = []
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for done in pool.map(_called, tasks):
            rows += done
            if save:
                keep("contrastive", done, device=CPU, threads=1)
    show(rows)


def _called(task: Callable[[], list[Row]]) -> list[Row]:
    torch.set_num_threads(1)
    return task()


def variants(bounds: Sequence[float], contrast: Contrast) -> list[Variant]:
    """Bounds, the other regularisers, two stages; and clipping and Langevin, which leave the fit as it is."""
    plain = [Variant(f"B = {bound:g}", replace(contrast, bound=bound)) for bound in bounds]
    return [
        *plain,
        Variant(f"clipped at {CLIP:g} x the mean", contrast, clip=CLIP),
        Variant("unbounded, Langevin", contrast, langevin=True),
        Variant("smoothing .05", replace(contrast, smoothing=0.05)),
        Variant("penalty .01", replace(contrast, penalty=0.01)),
        Variant("two stages", replace(contrast, stages=2, pool=4000)),
        Variant("two stages, Langevin", replace(contrast, stages=2, pool=4000), langevin=True),
    ]


class Fits:
    """Each ratio fitted once, however many variants draw from it."""

    def __init__(self, base: Prior, latents: Tensor):
        self.base, self.latents, self._fitted = base, latents, dict[Contrast, tuple[LogRatio, float]]()

    def __call__(self, contrast: Contrast) -> tuple[LogRatio, float]:
        """The ratio, and the seconds that its fit took."""
        if contrast not in self._fitted:
            start = time.perf_counter()
            self._fitted[contrast] = (fit_ratio(self.base, self.latents, contrast), time.perf_counter() - start)
        return self._fitted[contrast]


# ---- known ratios -----------------------------------------------------------------------------------------------------------------------


def known(size: int, scale: float, train: int, seed: int, *, bounds: Sequence[float], steps: int, proposals: int, draws: int) -> list[Row]:
    """Every variant at one level."""
    base = Components(DiagNormal(torch.zeros(1, size), torch.ones(1, size)))
    centres = math.sqrt(1 - scale**2) * Noise(seed, torch.arange(MODES)).normal("centres", 1, size)[0]
    q = Components(DiagNormal(centres, torch.full_like(centres, scale)))
    fits = Fits(base, q.sample(Noise(seed, torch.arange(train)), "train", 1))
    test = q.sample(Noise(seed, torch.arange(TEST)), "test", 1)
    truth = (q.log_prob(test) - base.log_prob(test))[0]
    level = {"part": "known", "size": size, "scale": scale, "train": train, "seed": seed, "kl": float(truth.mean())}
    rows = []
    for variant in variants(bounds, Contrast(steps=steps, seed=seed)):
        try:
            ratio, seconds = fits(variant.contrast)
            prior, weights = normalised(base, ratio, Resample(proposals, variant.clip), seed=seed, draws=draws)
        except ValueError as error:  # a fit, or weights, that are not finite
            rows.append({**level, "variant": variant.name, **dict.fromkeys(KNOWN, math.nan), "failed": True, "note": str(error)})
            continue
        judged = prior._replace(sampler=Langevin(proposals=proposals)) if variant.langevin else prior
        rises = gain(prior, test, error=weights.error)
        z = judged.sample(Noise(seed, torch.arange(draws)), "judged", 1)[0]
        found = ratio(test[0])
        rows.append(
            {
                **level,
                "variant": variant.name,
                "gain": rises.value,
                "gain_error": rises.error,
                "pooled": weights.pooled,
                "effective": weights.effective,
                "spread": weights.spread,
                "failed": failed(weights.effective, weights.spread, z),
                "rmse": float((found - prior.log_z - truth).square().mean().sqrt()),
                "largest": float(found.abs().max()),
                "on_mode": float(torch.cdist(z, centres).amin(1).mean() / (scale * math.sqrt(size))),
                "energy": energy(z, test[0, :2000]),
                "fit_s": round(seconds, 1),
            }
        )
    return rows


def failed(effective: float, spread: float, z: Tensor) -> bool:
    """Whether a prior cannot be drawn from."""
    return not (effective >= FEWEST and math.isfinite(spread) and bool(z.isfinite().all()))


def energy(a: Tensor, b: Tensor) -> float:
    """Energy distance 2 E|a - b| - E|a - a'| - E|b - b'| (Szekely and Rizzo 2013), without bias: pairs of different draws."""
    within = [torch.cdist(x, x).sum() / (len(x) * (len(x) - 1)) for x in (a, b)]
    return float(2 * torch.cdist(a, b).mean() - within[0] - within[1])


# ---- latents of trained models ----------------------------------------------------------------------------------------------------------


def prepare(shared: Mapping[str, Any], folder: Path) -> None:
    """Shards and classifiers, before processes need them."""
    recipe = RECIPES["planted"](**shared)
    manifest = run.shards_of(recipe, folder, run.ranks(), console=QUIET)
    classifiers_of(recipe, manifest, folder / "classifiers", console=QUIET)


def latents(
    objective: Name,
    seed: int,
    *,
    shared: Mapping[str, Any],
    bounds: Sequence[float],
    steps: int,
    model_steps: int,
    judged: int,
    folder: Path,
) -> list[Row]:
    """Every variant on one trained model, and the model's own prior."""
    place = folder / f"{shared['images']}-{objective}-{model_steps}-{seed}"
    model = Model(objective=objective, latent_dim=16, samples=5, combination="product")
    training = Training(steps=model_steps, batch_size=128, learning_rate=1e-3, schedule="cosine", evaluate_every=model_steps, seed=seed)
    trained(place, {**shared, "model": model, "training": training}, data=folder)
    found = stored.load(place, device=torch.device("cpu"))
    judges = classifiers_of(found.recipe, found.manifest, folder / "classifiers", console=QUIET)
    table = {
        split: posterior_draws(found.objective, evaluation(found.manifest, split, Place(), seed=seed), rows=10_000, draws=4)
        for split in ("train", "test")
    }
    base = found.objective.prior()
    fits, real = Fits(base, table["train"]), real_moments(found, judges, judged)
    about = {"part": "latents", "images": shared["images"], "objective": objective, "seed": seed, "steps": model_steps}
    rows: list[Row] = [{**about, "variant": "own prior", **judge(found.objective, judges, real, judged, seed)}]
    for variant in variants(bounds, Contrast(steps=steps, seed=seed)):
        ratio, seconds = fits(variant.contrast)
        prior, weights = normalised(base, ratio, Resample(clip=variant.clip), seed=seed)
        sampler = Langevin(proposals=prior.sampler.proposals) if variant.langevin else prior.sampler
        asked = Reweighted(found.objective, ratio, prior.log_z, sampler)
        rises = gain(prior, table["test"], error=weights.error)
        rows.append(
            {
                **about,
                "variant": variant.name,
                "gain": rises.value,
                "gain_error": rises.error,
                "pooled": weights.pooled,
                "effective": weights.effective,
                "spread": weights.spread,
                **judge(asked, judges, real, judged, seed),
                "fit_s": round(seconds, 1),
            }
        )
    return rows


def trained(place: Path, keywords: Mapping[str, Any], *, data: Path) -> None:
    """Begin the run, go on with it, or leave it as it is: it has all of its steps then.

    Raises RuntimeError where it was told to stop before the last one: a half-trained model is not to be judged.
    """
    steps = keywords["training"].steps
    if progress(place) >= steps:
        return
    begun = str(place) if (place / record.FILE).is_file() else None
    every = unflatten(RECIPES["planted"], flatten(keywords))  # a run goes on only under all the keywords that it began with
    if not run.train("planted", every, run.Where(str(place), resume=begun, data=data, evaluate=False), console=QUIET):
        raise RuntimeError(f"{place}: stopped at step {progress(place)} of {steps}; start the benchmark again to go on with it")


def judge(objective: Objective, judges: Mapping[str, Classifier], real: Mapping[str, Moments], num: int, seed: int) -> Row:
    """Joint coherence and the mean Frechet distance over modalities, of `num` draws each."""
    with evaluating(objective):
        coherent = joint_coherence(objective, judges, num=num, seed=seed)["joint_coherence/all"]
        parts = objective.prior().sample(Noise(seed, torch.arange(num)), "frechet", 1)
        made = {name: one.features(objective.modality(name).reconstruct(parts[0])) for name, one in judges.items()}
    distances = [frechet_distance(moments(moment_sums(x)), real[name]) for name, x in made.items()]
    return {"coherence": float(coherent.total / coherent.count), "frechet": mean(distances), "judged": num}


def real_moments(found: stored.Stored, judges: Mapping[str, Classifier], rows: int) -> dict[str, Moments]:
    """Features of the first test rows."""
    seen: dict[str, list[Tensor]] = {name: [] for name in judges}
    for batch in evaluation(found.manifest, "test", Place(), seed=0):
        for name, one in judges.items():
            seen[name].append(one.features(batch.modalities[name].data))
    return {name: moments(moment_sums(torch.cat(parts)[:rows])) for name, parts in seen.items()}


# ---- what is printed --------------------------------------------------------------------------------------------------------------------

COLUMNS = ("gain", "gain_error", "pooled", "effective", "spread", "failed", "rmse", "on_mode", "energy", "coherence", "frechet")


def show(rows: Sequence[Row]) -> None:
    """A table for each level or model, means over seeds, and the verdict of the known ratios."""
    for level, members in grouped(rows, ("part", "size", "scale", "train", "images", "objective")):
        columns = [name for name in COLUMNS if any(name in row for row in members)]
        kl = f", KL {mean(row['kl'] for row in members):.2f} nats" if "kl" in members[0] else ""
        print(f"\n{', '.join(str(x) for x in level if x is not None)}{kl}\n{'':<26}" + "".join(f"{name:>11}" for name in columns))
        for (variant,), same in grouped(members, ("variant",)):
            values = [mean([float(row[name]) for row in same]) if name in same[0] else math.nan for name in columns]
            print(f"{variant:<26}" + "".join(f"{value:>11.3f}" if not math.isnan(value) else f"{'':>11}" for value in values))
    levels = verdicts(rows)
    for level, bounded in levels.items():
        print(
            f"d = {level[0]}, s = {level[1]}, {level[2]} draws: " + (f"B = {', '.join(bounded)} will do" if bounded else "no bound will do")
        )
    if levels:
        print("hypothesis", "confirmed" if all(levels.values()) else "refuted")


def verdicts(rows: Iterable[Row]) -> dict[tuple[Any, ...], list[str]]:
    """For each level the bounds that keep 98 % of the unbounded gain at twice its effective sample size or more; means over seeds.

    An unbounded fit that is not finite has gained nothing that a bound could lose.
    """
    found = {}
    for level, members in grouped([row for row in rows if row["part"] == "known"], ("size", "scale", "train")):
        means = {v: (mean(r["gain"] for r in same), mean(r["effective"] for r in same)) for (v,), same in grouped(members, ("variant",))}
        rises, effective = (-math.inf, 0.0) if math.isnan(means["B = inf"][0]) else means["B = inf"]
        bounded = {name.removeprefix("B = "): value for name, value in means.items() if name.startswith("B = ") and name != "B = inf"}
        enough = rises - 0.02 * abs(rises)
        found[level] = [name for name, value in bounded.items() if value[0] >= enough and value[1] >= 2 * effective]
    return found


def grouped(rows: Iterable[Row], names: Sequence[str]) -> list[tuple[tuple[Any, ...], list[Row]]]:
    """Rows with equal entries of these names, in the order in which they first come."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(name) for name in names), []).append(row)
    return list(groups.items())
