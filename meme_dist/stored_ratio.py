"""The density ratio of a run that was trained: fitted to its training rows, kept beside it, and found again for the weights it belongs to.

`RUN/ratio/last` (and `best`) is a checkpoint of its own: `ratio.safetensors`, and `state.json` with how it was fitted, what it reaches and
the fingerprint of the model's weights.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from meme_dist.assess import Place, evaluation
from meme_dist.metrics.rows import device_of
from meme_dist.ranks import ALONE, Processes
from meme_dist.ratio import Contrast, fit_ratio, untrained
from meme_dist.reweighted import Langevin, Resample, Reweighted, Sampler, gain, normalised, posterior_draws
from meme_dist.stored import Stored, within
from meme_dist.train import checkpoint as checkpoints

FOLDER = "ratio"
STEM = "ratio"


def fit_stored(
    stored: Stored, checkpoint: str, contrast: Contrast, sampler: Resample, *, rows: int, draws: int, processes: Processes = ALONE
) -> dict[str, Any]:
    """Fit the ratio to `draws` latents of each of the first `rows` training rows and keep it; what it reaches on test rows. Collective.

    All processes encode rows; rank 0 fits and writes. Raises ValueError where latents or log ratios are not finite.
    """
    seed = contrast.seed
    place = Place(processes.rank, processes.world, processes.reduce)
    train = evaluation(stored.manifest, "train", place, seed=seed, damaged=stored.recipe.training.damaged)
    splits = {"train": train, "test": evaluation(stored.manifest, "test", place, seed=seed + 1)}
    most = {name: min(rows, stored.manifest.num_rows(name)) for name in splits}
    latents = {
        name: posterior_draws(stored.objective, batches.first(most[name]), rows=most[name], draws=draws, reduce=processes.reduce)
        for name, batches in splits.items()
    }
    about: dict[str, Any] = {}
    with processes.agreed():
        if processes.is_main:
            base, device = stored.objective.prior(), device_of(stored.objective)
            ratio = fit_ratio(base, latents["train"], contrast)
            prior, found = normalised(base, ratio, sampler, seed=seed, device=device)
            rises = gain(prior, latents["test"], error=found.error)
            about = {
                "step": stored.step,
                "model": _fingerprint(stored),
                "contrast": _plain(asdict(contrast)),
                "sampler": _plain(sampler._asdict()),
                "rows": latents["train"].shape[1],
                "gain": rises._asdict(),
                "normaliser": found._asdict(),
            }
            checkpoints.write(_place(stored, checkpoint), checkpoints.Checkpoint({STEM: ratio.state_dict()}, about))
    return about


def load_ratio(stored: Stored, checkpoint: str, *, langevin: bool = False) -> Reweighted:
    """The run's objective with its reweighted prior: resampled as it was when the ratio was fitted, or by Langevin chains.

    Chains start at draws that are resampled from as many proposals. Raises ValueError where there is none, where it was fitted to other
    weights of the model or by a version that did not know how well log Z is known, and where its files are altered.
    """
    place = _place(stored, checkpoint)
    again = f"meme-dist reweight {stored.folder} --checkpoint {checkpoint}"
    try:
        found = checkpoints.read(place, only=[STEM])
    except FileNotFoundError:
        raise ValueError(f"{place}: this run has no ratio for that checkpoint; fit one: {again}") from None
    state = found.state
    if state["model"] != _fingerprint(stored):
        raise ValueError(
            f"{place}: fitted to the model's weights of step {state['step']}, and these, of step {stored.step}, are others; again: {again}"
        )
    if "pooled" not in state["normaliser"]:
        raise ValueError(f"{place}: fitted by an earlier version, whose log Z came without its error; again: {again}")
    ratio = untrained(stored.objective.latent_dim, Contrast(**_numbers(state["contrast"])))
    checkpoints.check_tensors(found.tensors[STEM], ratio.state_dict(), place / f"{STEM}.safetensors")
    ratio.load_state_dict(dict(found.tensors[STEM]))
    resampled = Resample(**_numbers(state["sampler"]))
    sampler: Sampler = Langevin(proposals=resampled.proposals) if langevin else resampled
    ratio.to(device_of(stored.objective)).eval().requires_grad_(False)
    return Reweighted(stored.objective, ratio, state["normaliser"]["log_z"], sampler, pooled=state["normaliser"]["pooled"])


def reweighted(stored: Stored, checkpoint: str, *, langevin: bool = False, processes: Processes = ALONE) -> Stored:
    """The same run with its reweighted prior, in a folder of its own within the run's (with the run's run.json). Collective."""
    with processes.agreed():
        objective = load_ratio(stored, checkpoint, langevin=langevin)
    return within(stored, "reweighted-langevin" if langevin else "reweighted", processes)._replace(objective=objective)


def _place(stored: Stored, checkpoint: str) -> Path:
    return stored.folder / FOLDER / checkpoint


def _fingerprint(stored: Stored) -> str:
    return checkpoints.fingerprint(stored.objective.state_dict())


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no infinity."""
    return {name: None if value == math.inf else value for name, value in values.items()}


def _numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: math.inf if value is None else value for name, value in values.items()}
