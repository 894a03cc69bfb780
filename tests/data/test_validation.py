"""Laws of held-out rows: three parts that share nothing and are everything together, the same ones for the same seed."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from meme_dist.data.index import Manifest
from meme_dist.data.sets.digits import digits
from meme_dist.data.sets.linear_gaussian import linear_gaussian
from meme_dist.data.sets.mfeat import mfeat
from meme_dist.data.sets.polymnist import polymnist
from meme_dist.data.shards import Dataset, write_shards
from meme_dist.data.validation import held_rows, with_validation
from meme_dist.recipes import RECIPES
from tests.data import small
from tests.data.test_sets import meter

SETS = {
    "digits": lambda folder: digits(missing=0.3),
    "mfeat": lambda folder: mfeat(source=small.mfeat_file(folder)),
    "polymnist": lambda folder: polymnist(source=small.gradients(small.signed_mnist(folder), 3), modalities=3, missing=0.2),
}


def rows(dataset: Dataset, split: str) -> list[tuple[object, ...]]:
    return [(row.label, *sorted(small.contents(row).items())) for row in dataset.rows(split)]


@pytest.mark.parametrize("name", SETS)
def test_the_three_parts_are_disjoint_and_together_everything(tmp_path: Path, name: str) -> None:
    """As rows, with how often each comes, and in the order in which they came."""
    whole = SETS[name](tmp_path)
    parted = with_validation(whole, 0.17, seed=5)
    train, validation, before = rows(parted, "train"), rows(parted, "validation"), rows(whole, "train")
    assert len(validation) == round(0.17 * len(before)) and Counter(train) + Counter(validation) == Counter(before)
    for part in (train, validation):
        rest = iter(before)
        assert all(row in rest for row in part)
    assert rows(parted, "test") == rows(whole, "test") and not set(validation) & set(rows(whole, "test"))
    again, other = (rows(with_validation(whole, 0.17, seed=seed), "validation") for seed in (5, 6))
    assert again == validation and other != validation
    with pytest.raises(ValueError, match="split: expected 'train' or 'test', got 'other'"):
        parted.rows("other")


def test_a_share_of_nought_changes_no_byte_and_another_share_is_another_set(tmp_path: Path) -> None:
    source = small.mfeat_file(tmp_path / "files")
    whole, recipe = mfeat(source=source), RECIPES["mfeat"]
    assert with_validation(whole, 0.0, seed=5) is whole and "validation" not in recipe(source=source).dataset.source
    found, some = {}, recipe(source=source, validation=0.1).dataset
    for name, dataset in (("before", whole), ("nought", recipe(source=source).dataset), ("some", some)):
        write_shards(dataset, tmp_path / name)
        found[name] = {path.name: path.read_bytes() for path in sorted((tmp_path / name).iterdir())}
    assert found["before"] == found["nought"]
    manifest = Manifest.load(tmp_path / "some")
    assert {name: split.rows for name, split in manifest.splits.items()} == {"train": 54, "validation": 6, "test": 20}
    assert manifest.watched == "validation" and [name for name in found["some"] if name.startswith("validation")]
    with pytest.raises(ValueError, match="it holds another data set"):
        write_shards(recipe(source=source, validation=0.2).dataset, tmp_path / "some")


@pytest.mark.parametrize("paired_fraction", [1.0, 0.5])
def test_all_rows_of_a_photograph_are_on_one_side(tmp_path: Path, paired_fraction: float) -> None:
    meter(tmp_path)
    source, digit = tmp_path, np.arange(100, dtype=np.uint8) % 10
    photos = np.random.default_rng(0).integers(256, size=(100, 32, 20, 3)).astype(np.uint8)
    np.savez(tmp_path / "meterdigits.npz", x=photos, y=digit, is_test=np.arange(100) >= 80)
    whole, parted = (
        RECIPES["mnist_meterdigits"](source=source, paired_fraction=paired_fraction, validation=share).dataset for share in (0.0, 0.2)
    )
    train, validation = ([small.contents(row) for row in parted.rows(split)] for split in ("train", "validation"))
    before = rows(whole, "train")
    assert Counter(rows(parted, "train")) + Counter(rows(parted, "validation")) == Counter(before)
    assert 0.2 * len(before) - 3 < len(validation) <= 0.2 * len(before) + 0.5
    seen = [{row["photo"] for row in part if "photo" in row} for part in (train, validation)]
    assert seen[0] and seen[1] and not seen[0] & seen[1]
    assert len(seen[1]) < len([row for row in validation if "photo" in row])  # several rows show one photograph


def test_shards_of_another_seed_or_grouping_are_another_set(tmp_path: Path) -> None:
    whole = linear_gaussian(rows=40)
    write_shards(with_validation(whole, 0.25, seed=1), tmp_path / "shards")
    for keywords, message in (({"seed": 2}, "validation_seed: 1 there, 2"), ({"seed": 1, "apart": "x0"}, "validation_apart: None there")):
        with pytest.raises(ValueError, match=message):
            write_shards(with_validation(whole, 0.25, **keywords), tmp_path / "shards")


def test_groups_are_held_out_whole_up_to_the_share_and_no_part_may_be_empty() -> None:
    group = np.random.default_rng(0).integers(40, size=400)
    out = held_rows(group, 0.25, np.random.default_rng(1))
    assert not set(group[out]) & set(group[~out]) and 100 - 12 < out.sum() <= 100
    chosen = sum(held_rows(np.arange(50), 0.2, np.random.default_rng(seed)).astype(int) for seed in range(400))
    assert abs(chosen - 80).max() < 4 * np.sqrt(400 * 0.2 * 0.8)  # every row is as likely
    for rows_, share in ((np.arange(4), 0.1), (np.arange(4), 0.9), (np.zeros(9), 0.5)):
        with pytest.raises(ValueError, match="leaves one of the two parts empty"):
            held_rows(rows_, share, np.random.default_rng(0))
    for share in (-0.1, 1.0):
        with pytest.raises(ValueError, match="validation: expected a share of the training rows from 0 to below 1"):
            with_validation(digits(), share, seed=0)


@pytest.mark.parametrize("name", ["digits", "planted", "mfeat", "polymnist", "mnist_meterdigits", "tcga", "citeseq"])
def test_every_recipe_whose_settings_are_chosen_has_the_keyword(name: str, tmp_path: Path) -> None:
    needs = {} if name in ("digits", "planted") else {"source": tmp_path}
    assert RECIPES[name](**needs).dataset.splits == ("train", "test")
    dataset = RECIPES[name](**needs, validation=0.1).dataset
    assert dataset.splits == ("train", "validation", "test") and dataset.source["validation"] == 0.1
