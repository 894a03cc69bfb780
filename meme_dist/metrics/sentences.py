"""Sentences as vectors, learned from the captions at hand: what the correlation of text with another modality is measured in.

The papers use FastText vectors fitted to the captions (Bojanowski et al. 2017), which need a library of their own. Here words are embedded
by their co-occurrence: positive pointwise mutual information within a window, factorised (Levy and Goldberg 2014), which is what such
models factorise implicitly. Correlations in another embedding have another scale: compare them with their own ground truth only.

    average   mean of the word vectors                                                        (Joy et al. 2022, appendix G)
    sif       mean of a / (a + p(word)) word vectors, minus its part along the first principal component of the training sentences
                                                                    (Arora et al. 2017, as Shi et al. 2019 use it; a = 1e-3)

A sentence ends at `<eos>`; padding is no word, `<unk>` is one.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from meme_dist.metrics.rows import Metric, holds
from meme_dist.objectives.base import Objective
from meme_dist.types import Batch, Sums

PAD, END = 0, 2  # of every vocabulary (`meme_dist.data.fields`)
WINDOW = 3  # words on either side, as the papers' FastText
SIZE = 300  # of a word vector, at most
COMMON = 1e-3  # a of the SIF weights
LARGEST = 4_096  # words of a vocabulary whose table of co-occurrences is kept


def words(tokens: Int[Tensor, "R T"]) -> Bool[Tensor, "R T"]:
    """Which positions hold a word: those before `<eos>` that are no padding."""
    return ((tokens == END).cumsum(1) == 0) & (tokens != PAD)


def co_occurrences(tokens: Int[Tensor, "R T"], vocabulary: int, *, window: int = WINDOW) -> Float[Tensor, "V V"]:
    """How often two words stand at most `window` places apart in a sentence; symmetric, whole numbers."""
    there, flat = words(tokens), torch.zeros(vocabulary * vocabulary, dtype=torch.float64, device=tokens.device)
    for apart in range(1, min(window, tokens.shape[1] - 1) + 1):
        both = there[:, apart:] & there[:, :-apart]
        pair = (tokens[:, :-apart] * vocabulary + tokens[:, apart:])[both]
        flat += torch.bincount(pair, minlength=vocabulary * vocabulary).double()
    table = flat.view(vocabulary, vocabulary)
    return table + table.T


def captions(vocabularies: Mapping[str, int]) -> Metric:
    """`words/NAME` [1 + V, V] of each text modality: how often each word comes, above the table of co-occurrences; count: sentences.

    Raises ValueError for a vocabulary of more than LARGEST words.
    """
    for name, size in vocabularies.items():
        if size > LARGEST:
            raise ValueError(f"{name}: sentence vectors need at most {LARGEST:,} words, got a vocabulary of {size:,}; give an embedder")

    def metric(objective: Objective, batch: Batch) -> dict[str, Sums]:
        sums = {}
        for name, size in vocabularies.items():
            tokens = batch.dense(name)[holds(batch, [name])]
            count = torch.bincount(tokens[words(tokens)], minlength=size).double()
            total = torch.cat([count[None], co_occurrences(tokens, size)])
            sums[f"words/{name}"] = Sums(total, torch.tensor(float(len(tokens)), dtype=torch.float64, device=tokens.device))
        return sums

    return metric


def word_vectors(table: Float[Tensor, "V V"], *, size: int = SIZE) -> Float[Tensor, "V E"]:
    """Rows of U S^1/2 of the positive pointwise mutual information max(0, log p(a, b) / (p(a) p(b))) of co-occurrences."""
    table = table.double()
    total, single = table.sum(), table.sum(1)
    expected = torch.outer(single, single) / total.clamp(min=1)
    shared = table > 0
    information = torch.where(shared, (torch.where(shared, table, 1.0) / torch.where(shared, expected, 1.0)).log().clamp(min=0), 0.0)
    values, vectors = torch.linalg.eigh(information)  # symmetric: its singular values are the magnitudes
    order = values.abs().argsort(descending=True, stable=True)[:size]
    return vectors[:, order] * values[order].abs().sqrt()


class Sentences(NamedTuple):
    """Embeds token ids: the mean over a sentence's words of weight times vector, minus its part along `component`."""

    vectors: Float[Tensor, "V E"]
    weight: Float[Tensor, " V"]
    component: Float[Tensor, " E"] | None = None

    def __call__(self, tokens: Int[Tensor, "R T"]) -> Float[Tensor, "R E"]:
        """[R, E], zeros for a sentence without words."""
        there = words(tokens).double()
        table = (self.vectors * self.weight[:, None]).to(tokens.device)
        mean = (table[tokens] * there[..., None]).sum(1) / there.sum(1, keepdim=True).clamp(min=1)
        if self.component is None:
            return mean
        component = self.component.to(mean)
        return mean - torch.outer(mean @ component, component)


def average(sums: Sums) -> Sentences:
    """The plain mean of the word vectors, from the sums of `captions`."""
    vectors = word_vectors(sums.total[1:])
    return Sentences(vectors, torch.ones(len(vectors), dtype=torch.float64))


def sif(sums: Sums) -> Sentences:
    """The same with SIF weights; `without` takes the first principal component away once it is known."""
    count = sums.total[0].double()
    return Sentences(word_vectors(sums.total[1:]), COMMON / (COMMON + count / count.sum().clamp(min=1)))


def without(sentences: Sentences, covariance: Float[Tensor, "E E"]) -> Sentences:
    """These sentences without the direction in which training sentences, of this covariance, vary most."""
    return sentences._replace(component=torch.linalg.eigh(covariance.double()).eigenvectors[:, -1])
