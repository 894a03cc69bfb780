"""The paper's metrics: functions of a batch that return sums, and functions of a table of latents that return estimates."""

from meme_dist.metrics.coherence import classifier_accuracy, cross_coherence, joint_coherence, source_sets
from meme_dist.metrics.generation import complete_rows, cross_generations, imputations, joint_generations
from meme_dist.metrics.intervals import Estimate, aggregate, jackknife, mean, over_runs, proportion
from meme_dist.metrics.latents import Latents, Posterior, collect
from meme_dist.metrics.likelihood import Query, log_likelihood, queries
from meme_dist.metrics.probes import fit_linear, fit_logistic, latent_accuracy
from meme_dist.metrics.relatedness import Relatedness, auroc, relatedness
from meme_dist.metrics.rows import Classify, Metric, evaluating

__all__ = [
    "Classify",
    "Estimate",
    "Latents",
    "Metric",
    "Posterior",
    "Query",
    "Relatedness",
    "aggregate",
    "auroc",
    "classifier_accuracy",
    "collect",
    "complete_rows",
    "cross_coherence",
    "cross_generations",
    "evaluating",
    "fit_linear",
    "fit_logistic",
    "imputations",
    "jackknife",
    "joint_coherence",
    "joint_generations",
    "latent_accuracy",
    "log_likelihood",
    "mean",
    "over_runs",
    "proportion",
    "queries",
    "relatedness",
    "source_sets",
]
