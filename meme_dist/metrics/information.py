"""The mutual-information score of Joy et al. 2022, appendix H.2: how strange does what the model makes look to a classifier?

    I(y; w | x) = H[ E_w p(y | x, w) ] - E_w H[ p(y | x, w) ]        w: weights of the classifier's last layer, given its training data

in nats, between 0 and log C: large where classifiers that all explain the training data disagree about x, as they do far from those data.
Lower is better. The paper takes a sparse variational Gaussian process for the last layer, without code; here it is a Laplace
approximation (MacKay 1992; Daxberger et al. 2021), so that numbers compare models judged by one classifier, not with the paper's table:

    p(w | data) = Normal(w_hat, H^-1),   H = sum_n (diag p_n - p_n p_n^T) (x) f_n f_n^T + precision I        f_n: features, and a 1

H is the generalised Gauss-Newton matrix, which for a linear layer is the Hessian. Its sum is over all the rows that the classifier learnt
from, estimated from some of them: it says how sure the classifier may be, which no number of rows that happen to be looked at changes.
The score is estimated from draws of the C logits, which are Normal given x; from S draws its bias is of order 1 / S.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from meme_dist.metrics.coherence import Sources
from meme_dist.metrics.frechet import few_sources
from meme_dist.metrics.rows import Judge, Metric, holds, joined, noise_of, shown, with_square
from meme_dist.noise import Noise
from meme_dist.objectives.base import Objective
from meme_dist.types import Batch, Sums

LARGEST = 2_048  # weights of a last layer whose full matrix is kept; beyond that its diagonal
SAMPLES = 200  # draws of the logits of a row
PRECISION = 1.0  # of the weights' Normal prior


class LastLayer(NamedTuple):
    """The Normal posterior of a linear layer's weights, bias in the last column: covariance of all weights, or their variances."""

    weight: Float[Tensor, "C F"]
    covariance: Float[Tensor, "CF CF"] | None
    variance: Float[Tensor, "C F"]

    def to(self, device: torch.device) -> "LastLayer":
        """The same, held by the device."""
        covariance = None if self.covariance is None else self.covariance.to(device)
        return LastLayer(self.weight.to(device), covariance, self.variance.to(device))

    def logits(self, features: Float[Tensor, "R E"]) -> tuple[Float[Tensor, "R C"], Float[Tensor, "R C C"]]:
        """Mean and covariance of the logits of each row."""
        f = _with_one(features)
        if self.covariance is None:
            return f @ self.weight.T, torch.diag_embed(f.square() @ self.variance.T)
        classes, size = self.weight.shape
        table = self.covariance.view(classes, size, classes, size)
        return f @ self.weight.T, torch.einsum("re,cedf,rf->rcd", f, table, f)

    def information(self, features: Float[Tensor, "R E"], noise: Noise, purpose: str, *, samples: int = SAMPLES) -> Float[Tensor, " R"]:
        """I(y; w | x) of each row, nats; NaN for features that are not finite."""
        mean, covariance = self.logits(features)
        known = covariance.isfinite().all(-1).all(-1)
        values, vectors = torch.linalg.eigh(torch.where(known[:, None, None], covariance, 0.0))
        root = vectors * values.clamp(min=0).sqrt()[:, None]
        standard = noise.normal(purpose, samples, mean.shape[1]).to(mean)
        log_p = (mean + torch.einsum("rcd,srd->src", root, standard)).log_softmax(-1)
        score = (entropy(log_p.exp().mean(0)) - entropy(log_p.exp()).mean(0)).clamp(min=0)
        return torch.where(known, score, torch.nan)


def entropy(p: Float[Tensor, "*rows C"]) -> Float[Tensor, "*rows"]:
    """-sum p log p, nats."""
    return -torch.xlogy(p, p).sum(-1)


def _with_one(features: Float[Tensor, "R E"]) -> Float[Tensor, "R F"]:
    return torch.cat([features.double(), torch.ones_like(features[:, :1], dtype=torch.float64)], 1)


def _weights(head: nn.Linear) -> Float[Tensor, "C F"]:
    bias = head.weight.new_zeros(len(head.weight)) if head.bias is None else head.bias
    return torch.cat([head.weight, bias[:, None]], 1).detach().double()


def curvature(features: Float[Tensor, "R E"], head: nn.Linear) -> Sums:
    """H of these rows without the prior: [C F, C F], or its diagonal [C, F] for more than LARGEST weights; adds over batches and ranks."""
    f, weight = _with_one(features), _weights(head).to(features.device)
    p = (f @ weight.T).softmax(-1)
    count = torch.tensor(float(len(f)), dtype=torch.float64, device=f.device)
    if weight.numel() > LARGEST:
        return Sums((p - p.square()).T @ f.square(), count)
    inner = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    table = (inner[..., None] * f[:, None, None]).flatten(1).T @ f  # rows (c, d, e) with e and the column f the features
    size = weight.numel()
    return Sums(table.unflatten(0, (len(weight), len(weight), f.shape[1])).permute(0, 2, 1, 3).reshape(size, size), count)


def last_layer(head: nn.Linear, sums: Sums, *, rows: float | None = None, precision: float = PRECISION) -> LastLayer:
    """The posterior of the layer's weights from the summed `curvature` of its training rows, on the CPU.

    `rows`: how many these are, where the sums are of some of them.
    """
    weight, count = _weights(head).cpu(), max(1.0, float(sums.count))
    total = sums.total.cpu() * ((count if rows is None else rows) / count)
    if total.shape == weight.shape:
        return LastLayer(weight, None, 1 / (total + precision))
    factor = torch.linalg.cholesky(total + precision * torch.eye(len(total), dtype=torch.float64))
    covariance = torch.cholesky_inverse(factor)
    return LastLayer(weight, covariance, covariance.diagonal().view_as(weight))


def curvatures(judges: Mapping[str, Judge], *, rows: int) -> Metric:
    """`information/curvature/NAME` of each judge on rows that it learnt from, those below `rows`."""

    def metric(objective: Objective, batch: Batch) -> dict[str, Sums]:
        sums = {}
        for name, judge in judges.items():
            there = holds(batch, [name]) & (batch.draw < rows)
            data = batch.dense(name)[there]
            features = judge.features(data) if len(data) else torch.zeros(0, judge.head.in_features, device=batch.draw.device)
            sums[f"information/curvature/{name}"] = curvature(features, judge.head)
        return sums

    return metric


def information_key(sources: Sources | None, target: str) -> str:
    """`information/mnist>photo`; with sources None `information/real>photo`."""
    return f"information/{'real' if sources is None else joined(sources)}>{target}"


def information_sources(names: Sequence[str], target: str) -> list[Sources]:
    """Its own data (the paper's reconstructions), then every other modality alone, then all others."""
    return [(target,), *few_sources(names, target)]


def information(judges: Mapping[str, Judge], layers: Mapping[str, LastLayer], names: Sequence[str], *, rows: int) -> Metric:
    """The score of what is made of each judged modality, one sample z a row, and of real data; each with its squares."""

    def metric(objective: Objective, batch: Batch) -> dict[str, Sums]:
        wanted = batch.draw < rows
        sums: dict[str, Sums] = {}
        for name, layer in layers.items():
            for sources in [None, *information_sources(names, name)]:
                counted = wanted & holds(batch, [name] if sources is None else sources)
                score = _score(objective, batch, sources, name, judges[name], layer, counted)
                sums |= with_square(information_key(sources, name), score)
        return sums

    return metric


def _score(
    objective: Objective,
    batch: Batch,
    sources: Sources | None,
    name: str,
    judge: Judge,
    layer: LastLayer,
    counted: Bool[Tensor, " B"],
) -> Float[Tensor, " R"]:
    if not bool(counted.any()):  # no decoder sees an empty batch
        return torch.zeros(0, device=batch.draw.device)
    noise, purpose = Noise(batch.seed, batch.draw[counted]), f"information/{'real' if sources is None else joined(sources)}"
    if sources is None:
        data = batch.dense(name)[counted]
    else:
        z = objective.infer(batch.only(*sources)).sample(noise_of(batch), purpose, 1)
        own = batch.only(name) if name in sources else None
        data = shown(objective, name, z, noise_of(batch), purpose, given=own)[0, counted]
    return layer.to(data.device).information(judge.features(data), noise, f"{purpose}>{name}/logits")
