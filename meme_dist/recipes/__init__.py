"""Recipes: an experiment is a typed function whose keywords are the command line. One file each; this table is all their names.

A name `recipe:setting` is the same function with other defaults, and so is `digits4`.
"""

from collections.abc import Callable, Mapping

from meme_dist.recipes.asia import asia
from meme_dist.recipes.auto import auto
from meme_dist.recipes.base import Recipe
from meme_dist.recipes.citeseq import citeseq
from meme_dist.recipes.cub import cub
from meme_dist.recipes.dags import dags
from meme_dist.recipes.digits import digits
from meme_dist.recipes.enas import enas
from meme_dist.recipes.keywords import with_defaults
from meme_dist.recipes.linear_gaussian import linear_gaussian
from meme_dist.recipes.mfeat import mfeat
from meme_dist.recipes.mnist_attributes import mnist_attributes
from meme_dist.recipes.mnist_meterdigits import mnist_meterdigits
from meme_dist.recipes.mnist_svhn import BEST_MODEL, BEST_TRAINING, PAPER_MODEL, mnist_svhn
from meme_dist.recipes.planted import planted
from meme_dist.recipes.polymnist import polymnist
from meme_dist.recipes.swiss_roll import swiss_roll
from meme_dist.recipes.tcga import tcga

RECIPES: Mapping[str, Callable[..., Recipe]] = {
    "digits": digits,
    "auto": auto,
    "mnist_svhn": mnist_svhn,
    "mnist_svhn:paper": with_defaults(
        mnist_svhn,
        "MNIST with SVHN, in the setting of the paper's text: its networks, cross weight 1.",
        networks="paper",
        model=PAPER_MODEL,
    ),
    "mnist_meterdigits": mnist_meterdigits,
    "mnist_meterdigits:paper": with_defaults(
        mnist_meterdigits, "MNIST with meter digits, in the setting of the paper's text.", networks="paper", model=PAPER_MODEL
    ),
    "mnist_meterdigits:best": with_defaults(
        mnist_meterdigits,
        "MNIST with meter digits, in the setting that went furthest in minutes on a CPU.",
        networks="group_norm",
        model=BEST_MODEL,
        training=BEST_TRAINING,
    ),
    "digits4": with_defaults(
        mnist_meterdigits,
        "One digit four ways: MNIST, meter photograph, spoken, and its name in letters.",
        spoken=True,
        name=True,
        networks="group_norm",
        model=BEST_MODEL,
        training=BEST_TRAINING,
    ),
    "polymnist": polymnist,
    "planted": planted,
    "mfeat": mfeat,
    "cub": cub,
    "tcga": tcga,
    "citeseq": citeseq,
    "enas": enas,
    "asia": asia,
    "dags": dags,
    "linear_gaussian": linear_gaussian,
    "swiss_roll": swiss_roll,
    "mnist_attributes": mnist_attributes,
}
