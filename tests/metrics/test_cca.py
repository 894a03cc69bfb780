"""Laws of the correlation of modalities: canonical correlations that are known, sentence vectors as the papers define them."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import eigh
from torch import Tensor

from meme_dist.data.fields import Field
from meme_dist.evaluate import Measures, evaluate, measure
from meme_dist.metrics.cca import final_views, fit_cca, fit_pairs, joint_moments, plain_views
from meme_dist.metrics.frechet import Moments, moment_sums, moments
from meme_dist.metrics.sentences import Sentences, average, captions, co_occurrences, sif, word_vectors, words
from meme_dist.types import Sums, pack_dense
from tests.planted import CLASSES, modality, planted, rows

CORRELATIONS = torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64)
CORPUS = torch.tensor([[3, 4, 5, 4, 2, 0], [4, 3, 2, 0, 0, 0], [5, 5, 6, 3, 4, 3], [6, 2, 0, 0, 0, 0], [1, 4, 3, 2, 0, 0]])


def known(seed: int = 0) -> tuple[Moments, Tensor, Tensor]:
    """x = A u (4 of 3), y = B v (3 of 3), u and v standard with these correlations, coordinate by coordinate."""
    rng = np.random.default_rng(seed)
    a, b = (torch.from_numpy(rng.normal(size=shape)) for shape in ((4, 4), (3, 3)))
    inner = torch.eye(7, dtype=torch.float64)
    inner[:3, 4:] = inner[4:, :3] = torch.diag(CORRELATIONS)
    outer = torch.block_diag(a, b)
    return Moments(torch.from_numpy(rng.normal(size=7)), outer @ inner @ outer.T, 100), a, b


def test_canonical_correlations_of_joint_normals_are_the_known_ones() -> None:
    joint, _, _ = known()
    found = fit_cca(joint, 4, components=40)
    assert torch.allclose(found.correlation, CORRELATIONS, atol=1e-9)
    xx, xy, yy = joint.covariance[:4, :4], joint.covariance[:4, 4:], joint.covariance[4:, 4:]
    assert torch.allclose(found.weight_x.T @ xx @ found.weight_x, torch.eye(3).double(), atol=1e-8)
    assert torch.allclose(found.weight_y.T @ yy @ found.weight_y, torch.eye(3).double(), atol=1e-8)
    assert torch.allclose(found.weight_x.T @ xy @ found.weight_y, torch.diag(CORRELATIONS), atol=1e-8)
    zero, both = np.zeros((4, 4)), np.block([[np.zeros((4, 4)), xy.numpy()], [xy.numpy().T, np.zeros((3, 3))]])
    general = eigh(both, np.block([[xx.numpy(), zero[:, :3]], [zero[:3], yy.numpy()]]), eigvals_only=True)
    assert np.allclose(general[::-1][:3], CORRELATIONS.numpy(), atol=1e-8)  # the papers' generalised eigenproblem
    assert len(fit_cca(joint, 4, components=2).correlation) == 2


def test_the_mean_correlation_of_normal_pairs_is_the_arcsine_law_in_one_dimension() -> None:
    """One component: the cosine is a sign, and E sign(u v) = 2 / pi arcsin(rho)."""
    joint, a, b = known(1)
    projection = fit_cca(joint, 4, components=1)
    rng = np.random.default_rng(2)
    u = torch.from_numpy(rng.normal(size=(40_000, 4)))
    v = CORRELATIONS * u[:, :3] + (1 - CORRELATIONS.square()).sqrt() * torch.from_numpy(rng.normal(size=(40_000, 3)))
    x, y = u @ a.T + joint.mean[:4], v @ b.T + joint.mean[4:]
    assert float(projection(x, y).mean()) == pytest.approx(2 / math.pi * math.asin(0.9), abs=0.02)
    assert abs(float(projection(x, y[torch.randperm(40_000)]).mean())) < 0.02
    assert projection(x, y).abs().max() <= 1 + 1e-12


def test_embeddings_that_are_not_finite_have_no_correlation() -> None:
    x = torch.randn(30, 4).double()
    x[3, 1] = torch.nan
    with pytest.raises(ValueError, match="CCA needs finite embeddings"):
        fit_cca(moments(moment_sums(x)), 2, components=1)


def test_directions_that_do_not_vary_have_no_part_in_it() -> None:
    joint, _, _ = known(3)
    lift = torch.block_diag(torch.eye(4).double(), torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 0, 0]]).double())
    singular = Moments(lift @ joint.mean, lift @ joint.covariance @ lift.T, 100)
    assert torch.allclose(fit_cca(singular, 4, components=40).correlation, CORRELATIONS, atol=1e-7)
    with pytest.raises(ValueError, match="embeddings that vary"):
        fit_cca(Moments(torch.zeros(3), torch.zeros(3, 3), 9), 1, components=1)
    with pytest.raises(ValueError, match="vary in 7 directions needs more than 7 rows, got 7"):
        fit_cca(joint._replace(count=7), 4, components=1)


# ---- sentences --------------------------------------------------------------------------------------------------------------------------


def test_co_occurrences_are_those_of_a_loop_over_sentences_up_to_their_end() -> None:
    for window in (1, 3):
        loop = np.zeros((7, 7))
        for sentence in CORPUS.tolist():
            spoken = sentence[: sentence.index(2)] if 2 in sentence else sentence
            for i, first in enumerate(spoken):
                for j, second in enumerate(spoken):
                    loop[first, second] += 0 < abs(i - j) <= window
        assert np.array_equal(co_occurrences(CORPUS, 7, window=window).numpy(), loop)
    assert words(torch.tensor([[3, 2, 4, 2, 3]])).tolist() == [[True, False, False, False, False]]


def test_word_vectors_factorise_the_positive_pointwise_mutual_information() -> None:
    table = co_occurrences(CORPUS, 7).numpy()
    p, single = table / table.sum(), table.sum(1) / table.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        information = np.nan_to_num(np.maximum(0, np.log(p / np.outer(single, single))), neginf=0.0)
    vectors = word_vectors(torch.from_numpy(table)).numpy()
    _, magnitude, right = np.linalg.svd(information)
    assert np.allclose(vectors @ vectors.T, right.T * magnitude @ right, atol=1e-9)  # (M^T M)^1/2: symmetric M has negative values too
    assert word_vectors(torch.from_numpy(table), size=2).shape == (7, 2)
    assert np.allclose(word_vectors(torch.zeros(4, 4)).numpy(), 0)


def loop(sentences: Sentences, weights: np.ndarray) -> np.ndarray:
    """Sentence by sentence, word by word."""
    found = []
    for sentence in CORPUS.tolist():
        spoken = sentence[: sentence.index(2)] if 2 in sentence else sentence
        found.append(sum(weights[word] * sentences.vectors[word].numpy() for word in spoken) / len(spoken))
    return np.stack(found)


def collected() -> Sums:
    batch = pack_dense({"t": CORPUS, "v": torch.zeros(5, 2)}, dict.fromkeys("tv", torch.ones(5, dtype=torch.bool)))
    return evaluate(planted({"t": modality(), "v": modality()}), [batch], [captions({"t": 7})])["words/t"]


def test_a_sentence_is_the_mean_of_its_words_plain_or_weighed_by_rarity() -> None:
    sums = collected()
    count = np.bincount(CORPUS[words(CORPUS)].numpy(), minlength=7)
    assert np.array_equal(sums.total[0].numpy(), count) and sums.count == 5
    assert np.allclose(average(sums)(CORPUS).numpy(), loop(average(sums), np.ones(7)), atol=1e-12)
    weighed = 1e-3 / (1e-3 + count / count.sum())
    assert np.allclose(sif(sums)(CORPUS).numpy(), loop(sif(sums), weighed), atol=1e-12)
    assert average(sums)(torch.tensor([[2, 3, 3, 3]])).abs().sum() == 0  # no word before its end


def test_sif_loses_the_first_principal_component_of_the_training_sentences_and_nothing_else() -> None:
    embed, rng = sif(collected()), np.random.default_rng(4)
    spoken = torch.from_numpy(np.concatenate([rng.integers(3, 7, (40, 5)), np.full((40, 1), 2)], 1))
    raw = embed(spoken).numpy()
    first = np.linalg.svd(raw - raw.mean(0), full_matrices=False)[2][0]
    expected = raw - np.outer(raw @ first, first)
    views = {"t": embed, "v": lambda x: x.flatten(1)}
    data = {"t": spoken, "v": torch.from_numpy(rng.normal(size=(40, 2)) + raw[:, :2]).float()}
    batch = pack_dense(data, dict.fromkeys("tv", torch.ones(40, dtype=torch.bool)))
    sums = evaluate(planted({"t": modality(), "v": modality()}), [batch], [joint_moments(views, "sif")])
    final = final_views(sums, views, "sif")
    assert np.allclose(final["t"](spoken).numpy(), expected, atol=1e-9)
    (found,), _ = (list(part.values()) for part in fit_pairs(sums, final, "sif", components=2))
    joined = torch.cat([final["t"](spoken), data["v"].double()], 1)
    direct = fit_cca(moments(moment_sums(joined)), embed.vectors.shape[1], components=2)
    assert torch.allclose(found.correlation, direct.correlation, atol=1e-7)
    assert final_views(sums, views, "average")["t"] is embed


def test_vocabularies_too_large_for_a_table_are_refused_and_large_images_need_features() -> None:
    with pytest.raises(ValueError, match="at most 4,096 words, got a vocabulary of 5,000"):
        captions({"t": 5000})
    fields = {
        "image": Field(kind="image", shape=(3, 32, 32), codec="png", likelihood="laplace"),
        "counts": Field(kind="counts", shape=(2, 3), codec="npy", likelihood="poisson"),
    }
    assert list(plain_views(fields, {})) == ["counts"] and plain_views(fields, {"image": abs})["image"] is abs
    assert torch.allclose(plain_views(fields, {})["counts"](torch.ones(4, 2, 3)), torch.full((4, 6), math.log(2)))


# ---- all of it --------------------------------------------------------------------------------------------------------------------------

VECTOR = Field(kind="vector", shape=(CLASSES,), codec="npy", likelihood="normal")
NOTHING_ELSE = {
    name: 0 for name in ("probe_rows", "clustering_rows", "relatedness_rows", "likelihood_rows", "imputation_rows", "frechet_rows")
}


def test_a_model_that_translates_reaches_the_real_correlation_and_one_that_rotates_classes_does_not() -> None:
    label = np.random.default_rng(5).integers(0, CLASSES, 300)
    seen = {"a": label, "b": np.where(np.arange(300) % 7 == 0, -1, label), "c": label}
    objective = planted({"a": modality(), "b": modality(), "c": modality([1, 2, 3, 0])})
    data = [rows(seen, None)]
    measures = Measures(correlation_components=2, **NOTHING_ELSE)
    results = measure(
        objective, train=data, test=data, fields=dict.fromkeys("abc", VECTOR), classes=(), classifiers={}, measures=measures
    ).results
    found = {tuple(entry["modalities"]): entry for entry in results["correlation"]}
    good, bad = found["a", "b"], found["a", "c"]
    assert good["real"]["value"] == pytest.approx(1, abs=1e-6) and good["real"]["count"] == int((seen["b"] >= 0).sum())
    assert good["a>b"]["value"] == pytest.approx(1, abs=1e-6) and good["prior"]["value"] == pytest.approx(1, abs=1e-6)
    assert bad["real"]["value"] == pytest.approx(1, abs=1e-6) and bad["a>c"]["value"] < 0.5
    assert bad["c>a"]["value"] == pytest.approx(1, abs=1e-6)  # `a` shows what `c` holds
    assert good["embedding"] == "plain" and good["canonical"] == pytest.approx(1) and good["components"] == 2
