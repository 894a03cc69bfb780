"""Correlation of two modalities, one of them generated: for data without classes, as captions and images have none.

Canonical correlation analysis of the training rows' embeddings x, y finds W_x, W_y whose projections have unit variance and correlate most,
component by component. A pair's correlation is the cosine (Joy et al. 2022, eq. 12; Shi et al. 2019; Massiceti et al. 2018)

    corr(x, y) = u . v / (|u| |v|),     u = W_x^T (x - mean x),  v = W_y^T (y - mean y)        means: of the training rows

averaged over test rows: of real pairs (the ground truth, to which the others compare), of a real and a generated side, and of both sides
decoded from one draw of the prior. The last says little alone: a model that makes one and the same pair for every draw can get any value
in it, while it gets 0 where a side is real. Shi et al. take 40 components, and leave each at the length that their solver gives it instead
of unit variance, which weighs components otherwise. Text is embedded by `meme_dist.metrics.sentences` in both papers' ways; images by
features that the caller gives; vectors and counts are their own embedding (counts: log(1 + x)).
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from math import prod
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.nn.functional import cosine_similarity

from meme_dist.data.fields import Field
from meme_dist.metrics.frechet import Moments, moment_sums, moments
from meme_dist.metrics.rows import Embed, Metric, holds, noise_of, shown, with_square
from meme_dist.metrics.sentences import Sentences, without
from meme_dist.noise import Noise
from meme_dist.objectives.base import Objective
from meme_dist.types import Batch, Sums

FLOOR = 1e-8  # of the largest variance of an embedding: directions below it do not vary, and have no correlation
LARGEST = 1_024  # elements of a modality that is its own embedding
Pair = tuple[str, str]


class Projection(NamedTuple):
    """CCA of one pair of embeddings: directions in columns, strongest first, and their correlations on the rows it was fitted to."""

    mean_x: Float[Tensor, " X"]
    mean_y: Float[Tensor, " Y"]
    weight_x: Float[Tensor, "X C"]
    weight_y: Float[Tensor, "Y C"]
    correlation: Float[Tensor, " C"]

    def __call__(self, x: Float[Tensor, "R X"], y: Float[Tensor, "R Y"]) -> Float[Tensor, " R"]:
        """corr(x, y) of each row, in [-1, 1]."""
        mean_x, mean_y, weight_x, weight_y = (part.to(x.device) for part in self[:4])
        return cosine_similarity((x.double() - mean_x) @ weight_x, (y.double() - mean_y) @ weight_y, dim=1, eps=1e-30)


def fit_cca(joint: Moments, size: int, *, components: int) -> Projection:
    """From the moments of [x, y], the first `size` coordinates x: whitened, then the singular value decomposition of what they share.

    Raises ValueError where embeddings are not finite, where a side does not vary at all, and where the rows are not more than the
    directions in which the sides vary: then some projections correlate perfectly, whatever the data.
    """
    covariance = joint.covariance if joint.count > 1 else torch.zeros_like(joint.covariance)
    if not bool(covariance.isfinite().all()):
        raise ValueError("CCA needs finite embeddings of the training rows, got some that are not")
    white_x, white_y = _whitening(covariance[:size, :size]), _whitening(covariance[size:, size:])
    if joint.count <= (varying := white_x.shape[1] + white_y.shape[1]):
        raise ValueError(f"CCA of embeddings that vary in {varying} directions needs more than {varying} rows, got {joint.count}")
    u, s, v = torch.linalg.svd(white_x.T @ covariance[:size, size:] @ white_y, full_matrices=False)
    kept = min(components, len(s))
    return Projection(joint.mean[:size], joint.mean[size:], white_x @ u[:, :kept], white_y @ v.T[:, :kept], s[:kept])


def _whitening(covariance: Float[Tensor, "E E"]) -> Float[Tensor, "E rank"]:
    values, vectors = torch.linalg.eigh(covariance)
    varies = values > FLOOR * values[-1]
    if not bool(varies.any()):
        raise ValueError("CCA needs embeddings that vary over the training rows, got the same one for all of them")
    return vectors[:, varies] / values[varies].sqrt()


def plain_views(fields: Mapping[str, Field], embedders: Mapping[str, Embed]) -> dict[str, Embed]:
    """The given embedders, and for modalities without one their own numbers (counts: log(1 + x)); none for text and for large images."""
    own = {name: field for name, field in fields.items() if name not in embedders and field.kind != "text"}
    small = {name: _counts if field.kind == "counts" else _flat for name, field in own.items() if prod(field.shape) <= LARGEST}
    return {**{name: embed for name, embed in embedders.items() if name in fields}, **small}


def _flat(x: Shaped[Tensor, "R *event"]) -> Float[Tensor, "R E"]:
    return x.flatten(1)


def _counts(x: Shaped[Tensor, "R *event"]) -> Float[Tensor, "R E"]:
    return x.flatten(1).log1p()


def pairs_of(views: Mapping[str, Embed], variant: str) -> list[Pair]:
    """Every two views; for the variant "sif" those with sentences, since it changes nothing for the others."""
    return [(a, b) for a, b in combinations(views, 2) if variant != "sif" or any(isinstance(views[n], Sentences) for n in (a, b))]


def joint_moments(views: Mapping[str, Embed], variant: str) -> Metric:
    """Moments of the embeddings over training rows: `cca/VARIANT/NAME` of each view, `cca/VARIANT/A-B` of the rows that hold both."""

    def metric(objective: Objective, batch: Batch) -> dict[str, Sums]:
        embedded = {name: embed(batch.dense(name)).double() for name, embed in views.items()}
        sums = {f"cca/{variant}/{name}": moment_sums(x[holds(batch, [name])]) for name, x in embedded.items()}
        for a, b in pairs_of(views, variant):
            sums[f"cca/{variant}/{a}-{b}"] = moment_sums(torch.cat([embedded[a], embedded[b]], 1)[holds(batch, [a, b])])
        return sums

    return metric


def final_views(sums: Mapping[str, Sums], views: Mapping[str, Embed], variant: str) -> dict[str, Embed]:
    """The same views, but SIF sentences lose the first principal component of the training sentences."""
    return {
        name: without(embed, moments(sums[f"cca/{variant}/{name}"]).covariance)
        if isinstance(embed, Sentences) and variant == "sif"
        else embed
        for name, embed in views.items()
    }


def fit_pairs(
    sums: Mapping[str, Sums], views: Mapping[str, Embed], variant: str, *, components: int
) -> tuple[dict[Pair, Projection], dict[Pair, str]]:
    """The projection of every pair of `final_views`, from the sums of `joint_moments` of the views as they were; why others have none.

    Taking a direction away is linear, so the moments need not be collected again.
    """
    removal = {name: _removal(embed, sums[f"cca/{variant}/{name}"].total.shape[1]) for name, embed in views.items()}
    found, left_out = {}, {}
    for a, b in pairs_of(views, variant):
        joint, taken = moments(sums[f"cca/{variant}/{a}-{b}"]), torch.block_diag(removal[a], removal[b])
        without_it = Moments(taken @ joint.mean, taken @ joint.covariance @ taken.T, joint.count)
        try:
            found[a, b] = fit_cca(without_it, len(removal[a]), components=components)
        except ValueError as error:
            left_out[a, b] = str(error)
    return found, left_out


def _removal(embed: Embed, size: int) -> Float[Tensor, "E E"]:
    whole = torch.eye(size, dtype=torch.float64)
    if isinstance(embed, Sentences) and embed.component is not None:
        return whole - torch.outer(embed.component, embed.component).cpu()
    return whole


def cca_key(variant: str, pair: Pair, made: str) -> str:
    """`cca/VARIANT/A-B/real`; made: `real`, `A>B` (B made from A), `B>A`, `prior`."""
    return f"cca/{variant}/{pair[0]}-{pair[1]}/{made}"


def makings(pair: Pair) -> list[str]:
    """What is compared of a pair: real, either side made from the other, both from the prior."""
    a, b = pair
    return ["real", f"{a}>{b}", f"{b}>{a}", "prior"]


def correlations(projections: Mapping[Pair, Projection], views: Mapping[str, Embed], variant: str) -> Metric:
    """The correlation of every pair, each of its `makings`, over test rows that hold both modalities; each with its squares."""

    def metric(objective: Objective, batch: Batch) -> dict[str, Sums]:
        sums: dict[str, Sums] = {}
        for pair, projection in projections.items():
            counted = holds(batch, pair)
            sides = _sides(objective, batch, pair, counted) if bool(counted.any()) else {}  # no decoder sees an empty batch
            for made in makings(pair):
                score = _of_sides(sides[made], pair, projection, views) if made in sides else torch.zeros(0, device=batch.draw.device)
                sums |= with_square(cca_key(variant, pair, made), score)
        return sums

    return metric


def _of_sides(sides: Sequence[Tensor], pair: Pair, projection: Projection, views: Mapping[str, Embed]) -> Float[Tensor, " R"]:
    x, y = (views[name](side) for name, side in zip(pair, sides, strict=True))
    return projection(x, y)


def _sides(objective: Objective, batch: Batch, pair: Pair, counted: Bool[Tensor, " B"]) -> dict[str, tuple[Shaped[Tensor, "R ..."], ...]]:
    """Data of both modalities for each of the pair's `makings`, one sample z a row."""
    noise, (a, b) = Noise(batch.seed, batch.draw[counted]), pair
    real = {name: batch.dense(name)[counted] for name in pair}

    def made(name: str, source: str | None) -> Shaped[Tensor, "R *event"]:
        purpose = f"cca/{source or 'prior'}"
        q = objective.prior() if source is None else objective.infer(batch.only(source))
        z = q.sample(noise_of(batch), purpose, 1)[:, counted]
        return shown(objective, name, z, noise, purpose)[0]

    sides = ((real[a], real[b]), (real[a], made(b, a)), (made(a, b), real[b]), (made(a, None), made(b, None)))
    return dict(zip(makings(pair), sides, strict=True))
