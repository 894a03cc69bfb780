"""Any trained objective, asked what several modalities say together by pooling what each of them says alone: nothing is trained for it.

What a pool of the posteriors q_j(z | x_j) of a row's n observed modalities means:

    mixture                even mixture: one of the experts is right, which one is unknown; several inputs never say more than one
    product                prod_j q_j / Z: independent pieces of evidence, each with a flat prior; sharper with every input
    product_with_standard  N(0, I) prod_j q_j / Z: independent pieces of evidence under that prior
    holder                 (sum_j sqrt q_j)^2 / Z: between the two; what experts agree on counts more than what one of them says

A product is what a model trained with products does by itself (MoPoE, MVTCAE). For one trained with a mixture it is a free rival at
test time: its experts were never multiplied in training, so nothing made them sharp in the same directions.
"""

from typing import get_args

from meme_dist.around import Around
from meme_dist.distributions import DiagNormal, Pool, Posterior, pool
from meme_dist.objectives.base import Objective
from meme_dist.objectives.csvae import CSVAE
from meme_dist.objectives.mvae import MVAE
from meme_dist.types import Batch

POOLS: tuple[Pool, ...] = get_args(Pool)


class Pooled(Around):
    """`objective` with another `infer`; everything else (networks, prior, loss) is its own.

    A row with one modality gets that encoder's posterior (by product_with_standard times N(0, I)). Raises ValueError where posteriors are
    Laplaces and the pool is not a mixture, since the others have no closed form; for CSVAE, whose encoders of labels say nothing of the
    other latents; and for MVAE, whose encoders are no posteriors but factors beside N(0, I) (Wu and Goodman 2018, eq. 4).
    """

    def __init__(self, objective: Objective, rule: Pool):
        super().__init__(objective)
        if isinstance(objective, CSVAE):
            raise ValueError("csvae infers the latents of labels by itself: what its encoders say cannot be pooled; leave --pool out")
        if isinstance(objective, MVAE):
            raise ValueError("mvae multiplies N(0, I) and its encoders by itself; alone they are no posteriors to pool; leave --pool out")
        if rule != "mixture" and self.family is not DiagNormal:
            raise ValueError(f"pool {rule!r} needs Normal posteriors, this model's are {self.family.__name__}; 'mixture' works with them")
        self.rule: Pool = rule

    def infer(self, batch: Batch) -> Posterior:
        """The pool of what each observed modality says alone."""
        return pool(self.posteriors(batch), batch.observed.T, self.rule)
