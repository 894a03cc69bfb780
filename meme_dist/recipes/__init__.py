"""Recipes: an experiment is a typed function whose keywords are the command line. One file each; this table is all their names.

A name `recipe:setting` is the same function with other defaults.
"""

from collections.abc import Callable, Mapping

from meme_dist.recipes.auto import auto
from meme_dist.recipes.base import Recipe
from meme_dist.recipes.digits import digits
from meme_dist.recipes.keywords import with_defaults
from meme_dist.recipes.linear_gaussian import linear_gaussian
from meme_dist.recipes.mnist_meterdigits import mnist_meterdigits
from meme_dist.recipes.mnist_svhn import BEST_MODEL, BEST_TRAINING, PAPER_MODEL, mnist_svhn

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
    "linear_gaussian": linear_gaussian,
}
