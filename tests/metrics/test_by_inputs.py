"""Laws of coherence by the number of inputs: the mean of the entries, and an interval that knows that entries share rows."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from meme_dist import figures
from meme_dist.compare import tabulation
from meme_dist.compare.cells import Cell
from meme_dist.compare.figures import curves
from meme_dist.compare.tabulation import Run
from meme_dist.data.fields import Field
from meme_dist.evaluate import Measures, evaluate, flatten, measure
from meme_dist.metrics import cross_coherence, jackknife, proportion, source_sets
from meme_dist.metrics.by_inputs import GROUPS, coherence_by_inputs
from meme_dist.metrics.coherence import cross_key
from meme_dist.tables import tables
from meme_dist.types import Sums
from tests.planted import CLASSES, modality, planted, rows, shown

FIELD = Field(kind="vector", shape=(CLASSES,), codec="npy", likelihood="normal")


def sums_of(hits: np.ndarray, keys: list[str], held: np.ndarray | None = None) -> dict[str, Sums]:
    """The sums of `cross_coherence` with groups, for hits [pairs, rows] in rows that hold the pair."""
    held = np.ones_like(hits) if held is None else held
    found = {}
    for key, right, there in zip(keys, hits * held, held, strict=True):
        by_group = [np.bincount(np.arange(hits.shape[1]) % GROUPS, x, GROUPS) for x in (right, there)]
        found[key] = Sums(torch.tensor(float(right.sum())).double(), torch.tensor(float(there.sum())).double())
        found[f"{key}/groups"] = Sums(*(torch.from_numpy(x) for x in by_group))
    return found


def misread(count: int = 120) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """`a` misreads one row in four; entries are missing at random."""
    rng = np.random.default_rng(3)
    label = rng.integers(0, CLASSES, count)
    seen = {"a": np.where(rng.random(count) < 0.25, (label + 1) % CLASSES, label), "b": label, "c": label}
    return {name: np.where(rng.random(count) < 0.2, -1, x) for name, x in seen.items()}, label


def test_it_is_the_mean_over_pairs_of_a_size_and_its_jackknife_leaves_rows_out_of_all_pairs() -> None:
    seen, label = misread()
    objective, classifiers, sources = planted({name: modality() for name in "abc"}), dict.fromkeys("abc", shown), source_sets("abc")

    def by_inputs(kept: np.ndarray):
        part = {name: np.where(kept, x, -1) for name, x in seen.items()}
        found = evaluate(objective, [rows(part, label)], [cross_coherence(classifiers, sources, groups=GROUPS)])
        return found, {(line.inputs, line.target): line for line in coherence_by_inputs(found, sources, list("abc"))}

    sums, whole = by_inputs(np.ones(120, dtype=bool))
    assert sorted(key for key in whole if key[1] is None) == [(1, None), (2, None)] and len(whole) == 2 + 3 * 2
    shares = {key: float(s.total / s.count) for key, s in sums.items() if s.total.dim() == 0}
    assert whole[1, None].estimate.value == pytest.approx(np.mean([shares[cross_key((a,), b)] for a in "abc" for b in "abc" if a != b]))
    assert whole[2, None].estimate.value == pytest.approx(
        np.mean([shares[cross_key(p, t)] for p, t in ((("a", "b"), "c"), (("a", "c"), "b"), (("b", "c"), "a"))])
    )
    assert whole[1, "b"].estimate.value == pytest.approx((shares["cross_coherence/a>b"] + shares["cross_coherence/c>b"]) / 2)
    assert (whole[1, None].pairs, whole[2, None].pairs, whole[1, "b"].pairs) == (6, 3, 2)
    left = [by_inputs(np.arange(120) % GROUPS != group)[1] for group in range(GROUPS)]
    for key in [(1, None), (2, None), (1, "c")]:
        expected = jackknife(whole[key].estimate.value, [part[key].estimate.value for part in left], count=0)
        found = whole[key].estimate
        assert (found.low, found.high) == pytest.approx((expected.low, min(1.0, expected.high)), abs=1e-12)


def test_the_interval_covers_the_truth_where_pairs_share_rows() -> None:
    """Four pairs that are right in the same rows, mostly: as if they were independent the interval would be half as wide."""
    keys, covered, width = [cross_key((name,), "t") for name in "abcd"], [], []
    sources = [(name,) for name in "abcd"]
    for seed in range(200):
        rng = np.random.default_rng(seed)
        easy = rng.random((1, 100)) < 0.6
        hits = np.where(rng.random((4, 100)) < 0.9, easy, rng.random((4, 100)) < 0.6).astype(float)
        (line,) = coherence_by_inputs(sums_of(hits, keys), sources, ["t"])
        covered.append(line.estimate.low < 0.6 < line.estimate.high)
        width.append(line.estimate.high - line.estimate.low)
    assert 0.9 < np.mean(covered) <= 0.99
    assert np.mean(width) > 1.5 * 2 * 1.96 * math.sqrt(0.24 / 400)


def test_one_pair_keeps_wilsons_interval_and_pairs_that_no_row_holds_count_nowhere() -> None:
    hits, held = np.tile(np.arange(40) % 4 > 0, (2, 1)).astype(float), np.stack([np.ones(40), np.zeros(40)])
    keys = [cross_key(("a",), "t"), cross_key(("b",), "t")]
    (line,) = coherence_by_inputs(sums_of(hits, keys, held), [("a",), ("b",)], ["t"])
    assert line.pairs == 1 and line.estimate == proportion(Sums(torch.tensor(30.0), torch.tensor(40.0)))
    assert coherence_by_inputs(sums_of(hits, keys, 0 * held), [("a",), ("b",)], ["t"]) == []


def test_all_hits_are_not_certain() -> None:
    """The jackknife sees no spread where every row is right, or none: the interval is Wilson's for the rows of one pair."""
    keys = [cross_key((name,), "t") for name in "ab"]
    for share in (1.0, 0.0):
        (line,) = coherence_by_inputs(sums_of(np.full((2, 20), share), keys), [("a",), ("b",)], ["t"])
        assert line.estimate == proportion(Sums(torch.tensor(20 * share), torch.tensor(20.0)))


def test_ceilings_stand_beside_the_targets_that_have_one() -> None:
    seen, label = misread(40)
    data = [rows(seen, label)]
    measures = Measures(
        joint_draws=0,
        probe_rows=0,
        clustering_rows=0,
        relatedness_rows=0,
        likelihood_rows=0,
        imputation_rows=0,
        ceilings={"c": {1: 0.7, 2: 0.9}},
        sampling_ceilings={"c": {2: 0.8}},
    )
    objective, classifiers = planted({name: modality() for name in "abc"}), dict.fromkeys("abc", shown)
    results = measure(
        objective,
        train=data,
        test=data,
        fields=dict.fromkeys("abc", FIELD),
        classes=tuple("wxyz"),
        classifiers=classifiers,
        measures=measures,
    ).results
    entries = results["coherence_by_inputs"]
    assert {(e["inputs"], e["target"]): e["ceiling"] for e in entries if "ceiling" in e} == {(1, "c"): 0.7, (2, "c"): 0.9}
    assert {(e["inputs"], e["target"]): e["sampling_ceiling"] for e in entries if "sampling_ceiling" in e} == {(2, "c"): 0.8}
    assert re.search(r"\(of 0\.700\)", tables(results)) and re.search(r"\(of 0\.800, 0\.900\)", tables(results))
    assert flatten(results)["coherence_by_inputs/2>c"] == flatten(results)["cross_coherence/a+b>c"]
    assert {"coherence_by_inputs/1", "coherence_by_inputs/2", "coherence_by_inputs/1>a"} <= set(flatten(results))


@pytest.mark.parametrize("ceiling", ["ceiling", "sampling_ceiling"])
def test_the_curve_shows_every_target_and_its_ceilings(tmp_path: Path, ceiling: str) -> None:
    line = [{"inputs": n, "target": "c", "value": n / 5, "low": n / 5 - 0.1, "high": n / 5 + 0.1, ceiling: 0.9} for n in (1, 2, 3)]
    bare = [{name: value for name, value in entry.items() if name != ceiling} for entry in line]
    pictures = []
    for number, entries in enumerate((line, bare)):
        figures.inputs_curve(tmp_path / f"{number}.png", entries)
        pictures.append(np.asarray(Image.open(tmp_path / f"{number}.png").convert("RGB")).astype(int))
    with_ceiling, without = pictures
    rows_of_change = np.flatnonzero((with_ceiling != without).any((1, 2)))
    assert with_ceiling.shape == without.shape and 1 <= np.ptp(rows_of_change) < 6  # one level dashed line, and nothing else


def test_a_comparison_has_a_panel_for_every_target_with_a_known_ceiling(tmp_path: Path) -> None:
    values = {f"coherence_by_inputs/{n}{to}": n / 10 + len(to) / 4 for n in (1, 2) for to in ("", ">c", ">d")}
    measured = {name: {"models": {"m": {"value": x, "low": x, "high": x, "count": 3}}} for name, x in values.items()}
    table = {"settings": [{"setting": {"noise": 0.3}, "measurements": measured}]}
    entries = [{"inputs": n, "target": "c", "ceiling": 0.6 + n / 10, "sampling_ceiling": 0.5 + n / 10} for n in (1, 2)]
    cell = Cell("m", {"noise": 0.3}, 0, {}, "m", "m")
    run = Run(cell, {}, {"coherence_by_inputs": [*entries, {"inputs": 1, "target": "d"}, {"inputs": 1, "target": None}]}, tmp_path)
    known = tabulation.ceilings([run])
    assert known == {"noise=0.3, to c": {"ceiling": {1: 0.7, 2: 0.8}, "sampling_ceiling": {1: 0.6, 2: 0.7}}}
    panels = tabulation.by_inputs(table, known)
    lines = {panel: [(x, one.value) for x, one in line["m"]] for panel, line in panels.items()}
    assert lines == {"noise=0.3": [(1, 0.1), (2, 0.2)], "noise=0.3, to c": [(1, 0.6), (2, 0.7)]}
    curves(tmp_path / "a.png", panels, x="modalities given", ceilings=known)
    curves(tmp_path / "b.png", panels, x="modalities given")
    first, second = (np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")) for name in "ab")
    assert first.shape == second.shape and (first != second).any()
