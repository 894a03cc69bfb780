"""`meme-dist reweight RUN`: fit the density ratio of a trained run's posteriors to its prior."""

from typing import Any, Literal

import tyro

from meme_dist.flags import PROGRAM, parsed
from meme_dist.run_commands import find, together

FEW = 0.01  # share of the proposals: below it resampled draws repeat a handful of them


def main(words: list[str]) -> int:
    """`reweight RUN`."""

    def command(
        run: tyro.conf.Positional[str],
        checkpoint: Literal["last", "best"] = "last",
        bound: float = float("inf"),
        stages: int = 1,
        smoothing: float = 0.0,
        penalty: float = 0.0,
        steps: int = 1000,
        width: int = 128,
        rows: int = 50_000,
        draws: int = 4,
        proposals: int = 1000,
        clip: float = float("inf"),
        seed: int = 0,
    ) -> int:
        """Fit a contrastive prior to a trained run: its prior, times the ratio that a classifier finds between posteriors and prior.

        `evaluate RUN --prior reweighted` and `generate RUN --prior reweighted` use it; the model itself is not changed.

        Args:
            run: Name of the run, or the path of its folder.
            checkpoint: The last weights, or those with the lowest held-out loss.
            bound: A stage's log ratio lies within it.
            stages: Classifiers, each against the draws of the prior before it: for priors that are far from the posteriors.
            smoothing: Of the classifier's labels.
            penalty: Weight of the mean squared log ratio.
            steps: Optimiser steps of a stage.
            width: Units of each hidden layer.
            rows: Training rows at most.
            draws: Latents of each row.
            proposals: Draws of the base prior from which one is resampled.
            clip: A proposal's weight counts at most as this many times the mean weight.
            seed: Seed of the draws and of the classifier's weights.
        """
        from meme_dist.ratio import Contrast
        from meme_dist.reweighted import Resample, checked
        from meme_dist.stored_ratio import fit_stored

        if rows < 2 or draws < 1:
            raise ValueError(f"reweight: expected --rows of at least 2 and --draws of at least 1, got {rows} and {draws}")
        sampler = checked(Resample(proposals, clip))
        contrast = Contrast(
            bound=bound, stages=stages, smoothing=smoothing, penalty=penalty, steps=steps, width=width, seed=seed, proposals=proposals
        )

        def work(processes: Any) -> None:
            found = find(run, checkpoint, processes)
            about = fit_stored(found, checkpoint, contrast, sampler, rows=rows, draws=draws, processes=processes)
            if processes.is_main:
                print(told(run, checkpoint, about))

        return together(work)

    return parsed(command, words, "reweight")


def told(run: str, checkpoint: str, about: dict[str, Any]) -> str:
    """What a fit reached, and what to do with it."""
    from meme_dist.reweighted import caution

    rises, found = about["gain"], about["normaliser"]
    share = found["effective"] / found["proposals"]
    lines = [
        f"bound on test rows  + {rises['value']:.2f} nats (standard error {rises['error']:.2f})",
        f"log Z               {found['log_z']:.2f} (standard error {found['error']:.2f}, of {found['pooled']:.0f} effective draws)",
        f"effective size      {found['effective']:.0f} of {found['proposals']} proposals, whose log Z spreads by {found['spread']:.2f}",
    ]
    if warning := caution(found["pooled"]):
        lines.append(f"bound, likelihoods  {warning}; a smaller ratio (--bound 5, --smoothing .05) is known better")
    if share < FEW:
        lines.append("below 1 % of the proposals: draw by Langevin chains (--prior reweighted_langevin), or clip weights (--clip 50)")
    which = "" if checkpoint == "last" else f" --checkpoint {checkpoint}"
    lines.append(f"next                {PROGRAM} evaluate {run}{which} --prior reweighted")
    return "\n".join(lines)
