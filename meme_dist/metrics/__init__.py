"""The paper's metrics: functions of a batch that return sums, and functions of a table of latents that return estimates."""

from meme_dist.metrics.by_inputs import ByInputs, coherence_by_inputs
from meme_dist.metrics.cca import fit_cca
from meme_dist.metrics.clustering import Clustering, clustering
from meme_dist.metrics.coherence import classifier_accuracy, cross_coherence, joint_coherence, source_sets
from meme_dist.metrics.frechet import Frechet, frechet, frechet_distance, frechet_distances
from meme_dist.metrics.generation import complete_rows, cross_generations, imputations, joint_generations
from meme_dist.metrics.imputation import imputation
from meme_dist.metrics.information import LastLayer, information, last_layer
from meme_dist.metrics.intervals import Estimate, aggregate, jackknife, mean, over_runs, proportion, within
from meme_dist.metrics.latents import Latents, Posterior, collect
from meme_dist.metrics.likelihood import Query, log_likelihood, queries
from meme_dist.metrics.probes import fit_linear, fit_logistic, latent_accuracy
from meme_dist.metrics.relatedness import Relatedness, auroc, relatedness
from meme_dist.metrics.rows import Classify, Embed, Judge, Metric, evaluating

__all__ = [
    "ByInputs",
    "Classify",
    "Clustering",
    "Embed",
    "Estimate",
    "Frechet",
    "Judge",
    "LastLayer",
    "Latents",
    "Metric",
    "Posterior",
    "Query",
    "Relatedness",
    "aggregate",
    "auroc",
    "classifier_accuracy",
    "clustering",
    "coherence_by_inputs",
    "collect",
    "complete_rows",
    "cross_coherence",
    "cross_generations",
    "evaluating",
    "fit_cca",
    "fit_linear",
    "fit_logistic",
    "frechet",
    "frechet_distance",
    "frechet_distances",
    "imputation",
    "imputations",
    "information",
    "jackknife",
    "joint_coherence",
    "joint_generations",
    "last_layer",
    "latent_accuracy",
    "log_likelihood",
    "mean",
    "over_runs",
    "proportion",
    "queries",
    "relatedness",
    "source_sets",
    "within",
]
