"""Laws of paired comparisons: against SciPy, against plain enumeration, and under a null hypothesis that holds exactly."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from meme_dist.metrics import paired as module
from meme_dist.metrics.paired import holm, paired, sign_flip


def enumerated(differences: np.ndarray) -> float:
    """The definition, one pattern of signs at a time."""
    signs = np.array(list(itertools.product((1, -1), repeat=len(differences))))
    return float((np.abs(signs @ differences) >= abs(differences.sum()) - 1e-9).mean())


def test_the_interval_of_a_paired_difference_is_scipys() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.normal(1.0, 2.0, 7), generator.normal(0.0, 1.0, 7)
    found = paired(list(a), list(b)).difference
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert found.value == pytest.approx((a - b).mean()) and found.count == 7


def test_p_is_that_of_scipys_permutation_test() -> None:
    a, b = np.random.default_rng(1).normal(0.4, 1.0, (2, 9))
    result = stats.permutation_test(
        (a, b), lambda x, y, axis: (x - y).mean(axis), permutation_type="samples", n_resamples=np.inf, vectorized=True
    )
    assert paired(list(a), list(b)).p == pytest.approx(float(result.pvalue), abs=1e-12)


@pytest.mark.parametrize("count", [1, 2, 3, 6, 11])
def test_p_is_the_share_of_all_sign_patterns_that_reach_the_observed_sum(count: int) -> None:
    for seed in range(20):
        differences = np.random.default_rng(seed).normal(0.3, 1.0, count).round(1)  # rounded, so that there are ties
        assert sign_flip(list(differences)) == pytest.approx(enumerated(differences), abs=1e-12)


def test_p_is_uniform_where_every_sign_pattern_is_equally_likely() -> None:
    """Exactly: P(p <= k / 2^(n-1)) = k / 2^(n-1) over the whole null distribution, for sizes without ties."""
    sizes = [1.0, 2.1, 4.3, 8.7, 17.9, 0.37]
    found = sorted(sign_flip([s * d for s, d in zip(signs, sizes, strict=True)]) for signs in itertools.product((1, -1), repeat=6))
    assert found == pytest.approx(sorted(2 * [k / 32 for k in range(1, 33)]))


def test_p_has_its_smallest_value_where_all_differences_agree_and_is_one_without_any() -> None:
    result = paired([2.0, 3.0, 4.0, 9.0], [1.0, 1.0, 1.0, 1.0])
    assert result.p == result.smallest == 2 / 2**4
    assert sign_flip([0.0, 0.0, 0.0]) == 1.0 and sign_flip([1.0, -1.0]) == 1.0
    assert math.isnan(sign_flip([])) and math.isnan(paired([], []).smallest)


def test_p_of_many_pairs_is_exact_up_to_forty_and_close_beyond(monkeypatch: pytest.MonkeyPatch) -> None:
    differences = list(np.random.default_rng(3).normal(0.25, 1.0, 30))
    exact = sign_flip(differences)
    normal = 2 * stats.norm.sf(abs(sum(differences)) / math.sqrt(sum(d * d for d in differences)))
    assert exact == pytest.approx(normal, rel=0.05)
    monkeypatch.setattr(module, "EXACT", 29)
    monkeypatch.setattr(module, "DRAWS", 4_999)
    assert sign_flip(differences) == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 5_000))


def test_settings_of_a_seed_are_no_evidence_of_their_own() -> None:
    """A null hypothesis that holds, with what a seed does to a difference alike in all settings: p <= .05 at most as often as it says."""
    generator, studies, seeds, settings, alike = np.random.default_rng(0), 400, 6, 5, 0.4
    of_seed = generator.normal(size=(studies, seeds, 1)) * math.sqrt(alike)
    differences = of_seed + generator.normal(size=(studies, seeds, settings)) * math.sqrt(1 - alike)
    zeros, groups = [0.0] * seeds * settings, [seed for seed in range(seeds) for _ in range(settings)]
    found = [paired(list(study.ravel()), zeros, groups=groups) for study in differences]
    assert {one.difference.count for one in found} == {seeds} and found[0].smallest == 2 / 2**seeds
    assert np.mean([one.p <= 0.05 for one in found]) <= 0.05
    covered = np.mean([one.difference.low <= 0 <= one.difference.high for one in found])
    assert covered == pytest.approx(0.95, abs=3 * math.sqrt(0.05 * 0.95 / studies))
    assert np.mean([sign_flip(list(study.ravel())) <= 0.05 for study in differences[:100]]) > 0.15  # what each as a pair would reject


def test_a_value_that_is_missing_takes_its_pair_with_it_and_lengths_must_agree() -> None:
    found = paired([1.0, math.nan, 3.0], [0.5, 9.0, 1.0])
    assert found.difference.count == 2 and found.difference.value == pytest.approx(1.25)
    grouped = paired([1.0, math.nan, 3.0, math.nan], [0.5, 9.0, 1.0, 1.0], groups=["a", "a", "a", "b"])
    assert grouped.difference.count == 1 and grouped.difference.value == pytest.approx(1.25)
    with pytest.raises(ValueError, match="got 2 and 3"):
        paired([1.0, 2.0], [1.0, 2.0, 3.0])


def test_holm_rejects_what_the_step_down_procedure_rejects() -> None:
    """Its definition: reject the smallest p values in turn while p_(i) <= level / (m - i + 1)."""
    generator = np.random.default_rng(0)
    for _ in range(200):
        p, level = list(generator.uniform(0, 0.1, 5)), float(generator.uniform(0.01, 0.3))
        rejected = set()
        for number, index in enumerate(np.argsort(p)):
            if p[index] > level / (5 - number):
                break
            rejected.add(int(index))
        assert {number for number, value in enumerate(holm(p)) if value <= level} == rejected
    assert holm([0.02]) == [0.02] and holm([]) == []
    adjusted = holm([0.04, math.nan, 0.01])
    assert adjusted[0] == 0.04 and adjusted[2] == 0.02 and math.isnan(adjusted[1])
