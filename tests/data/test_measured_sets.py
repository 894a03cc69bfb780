"""Laws of mfeat, tcga and citeseq: which views belong together, who is held out, what standardisation may see."""

from collections import Counter

import numpy as np
import pytest
import torch

from meme_dist.data.sets import citeseq as cells
from meme_dist.data.sets import mfeat as views
from meme_dist.data.sets import tcga as tumours
from meme_dist.data.shards import Dataset, Row
from tests.data.small import REAL, array, citeseq_file, contents, mfeat_file, rows, shown, tcga_file

needs_real_data = pytest.mark.skipif(not (REAL / "mfeat_six_views.npz").is_file(), reason="no real data in ../shared/data")


def table(found: list[Row], name: str) -> np.ndarray:
    return np.stack([array(row, name) for row in found])


def alter(path, change) -> None:
    with np.load(path) as file:
        arrays = dict(file)
    change(arrays)
    np.savez(path, **arrays)


# ---- mfeat -------------------------------------------------------------------------------------------------------------------------


def test_the_six_views_of_a_row_are_of_one_digit_and_no_digit_is_in_both_splits(tmp_path):
    dataset = views.mfeat(source=mfeat_file(tmp_path))
    found = rows(dataset, "train") + rows(dataset, "test")
    ranks = np.stack([table(found, name)[:, 0].argsort().argsort() for name in views.VIEWS])  # column 0 is the file's row number
    assert (ranks == ranks[0]).all() and sorted(ranks[0]) == list(range(80))
    assert [row.label for row in found] == (ranks[0] % 10).tolist()
    assert Counter(row.label for row in rows(dataset, "test")) == dict.fromkeys(range(10), 2)


def test_mfeat_standardises_by_training_rows_alone(tmp_path):
    path = mfeat_file(tmp_path) / "mfeat_six_views.npz"
    before = rows(views.mfeat(source=tmp_path))
    for name in views.VIEWS:
        assert np.abs(table(before, name).mean(0)).max() < 1e-5 and np.abs(table(before, name).std(0) - 1).max() < 1e-5
    test = views.read(tmp_path)[2]
    alter(path, lambda arrays: arrays["fac"].__setitem__(test, 1e6))
    assert list(map(contents, rows(views.mfeat(source=tmp_path)))) == list(map(contents, before))


def test_digits_that_are_twice_in_the_file_are_never_held_out(tmp_path):
    def double(arrays: dict) -> None:  # of class 3, with four rows in five: all but rows 3 and 13 have a twin
        for name in views.VIEWS:
            arrays[name][[33, 43, 53, 63, 73]] = arrays[name][23]

    alter(mfeat_file(tmp_path) / "mfeat_six_views.npz", double)
    _, label, test = views.read(tmp_path)
    assert np.flatnonzero(test & (label == 3)).tolist() == [3, 13]


@needs_real_data
def test_real_mfeat_gives_150_and_50_rows_a_class_which_share_no_digit():
    dataset = views.mfeat(source=REAL, missing=0.3)
    assert abs(sum(len(row.data) for row in dataset.rows("train")) - 0.7 * 6 * 1500) <= 0.5
    train, test = (rows(views.mfeat(source=REAL), split) for split in ("train", "test"))
    assert Counter(row.label for row in train) == dict.fromkeys(range(10), 150)
    assert Counter(row.label for row in test) == dict.fromkeys(range(10), 50)
    known = {tuple(contents(row).values()) for row in train}
    assert len(known) == 1494 and not known & {tuple(contents(row).values()) for row in test}  # six digits are twice in the file


# ---- tcga --------------------------------------------------------------------------------------------------------------------------


def test_tumours_to_test_on_have_no_protein_and_the_omics_of_a_row_are_of_one_tumour(tmp_path):
    dataset = tumours.tcga(source=tcga_file(tmp_path))
    assert shown(dataset) == {("mrna", "mirna", "protein"): 30}
    assert shown(dataset, "test") == {("mrna", "mirna"): 12}
    for split in ("train", "test"):
        found = rows(dataset, split)
        ranks = [table(found, name)[:, 0].argsort().argsort() for name in found[0].data]
        assert all((rank == ranks[0]).all() for rank in ranks)
        assert [row.label for row in found] == (ranks[0] % 3).tolist()


def test_tcga_standardises_by_training_rows_alone(tmp_path):
    dataset = tumours.tcga(source=tcga_file(tmp_path))
    before, test = rows(dataset), rows(dataset, "test")
    for name in tumours.OMICS:
        assert np.abs(table(before, name).mean(0)).max() < 1e-5 and np.abs(table(before, name).std(0) - 1).max() < 1e-5
    with np.load(tmp_path / tumours.FILE) as file:
        train, raw = file["mrna_train"], file["mrna_test"]
    order = table(test, "mrna")[:, 0].argsort()
    assert np.allclose(table(test, "mrna")[order], (raw - train.mean(0)) / train.std(0), atol=1e-4)
    alter(tmp_path / tumours.FILE, lambda arrays: arrays["mrna_test"].__imul__(1000))
    assert list(map(contents, rows(dataset))) == list(map(contents, before))


@needs_real_data
def test_real_tumours_are_150_and_70_of_three_subtypes():
    dataset = tumours.tcga(source=REAL)
    with np.load(REAL / tumours.FILE) as file:
        assert tuple(file["classes"].tolist()) == dataset.classes
    assert shown(dataset) == {("mrna", "mirna", "protein"): 150} and shown(dataset, "test") == {("mrna", "mirna"): 70}
    assert Counter(row.label for row in dataset.rows("train")) == {0: 45, 1: 30, 2: 75}
    assert Counter(row.label for row in dataset.rows("test")) == {0: 21, 1: 14, 2: 35}


# ---- citeseq -----------------------------------------------------------------------------------------------------------------------


def test_both_counts_of_a_row_are_of_one_cell_and_exact(tmp_path):
    dataset = cells.citeseq(source=citeseq_file(tmp_path))
    with np.load(tmp_path / cells.FILE) as file:
        rna, protein = file["rna_hvg1000"], file["adt"]
    train, test = (rows(dataset, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (40, 10)
    seen = []
    for row in train + test:
        cell = int(array(row, "rna")[0])
        assert np.array_equal(array(row, "rna"), rna[cell]) and np.array_equal(array(row, "protein"), protein[cell])
        assert row.label is None and array(row, "rna").dtype == np.int32
        seen.append(cell)
    assert sorted(seen) == list(range(50)) and seen != sorted(seen)


@needs_real_data
def test_real_cells_are_400_and_100_and_keep_every_count():
    dataset: Dataset = cells.citeseq(source=REAL)
    found = {split: rows(dataset, split) for split in ("train", "test")}
    assert {split: len(part) for split, part in found.items()} == {"train": 400, "test": 100}
    with np.load(REAL / cells.FILE) as file:
        for name, key in cells.ARRAYS.items():
            total = sum((row.data[name].long() for part in found.values() for row in part), torch.zeros(1).long())  # type: ignore[union-attr]
            assert np.array_equal(total.numpy(), file[key].sum(0, dtype=np.int64))
