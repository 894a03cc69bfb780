"""Laws of every data set, from small files: rows fit their fields, follow their seed, miss what was asked, and say what is broken."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from meme_dist.data.sets._arrays import held_out, read_arrays, standardised
from meme_dist.data.sets.citeseq import citeseq
from meme_dist.data.sets.cub import cub
from meme_dist.data.sets.mfeat import mfeat
from meme_dist.data.sets.planted import planted
from meme_dist.data.sets.polymnist import polymnist
from meme_dist.data.sets.tcga import tcga
from meme_dist.data.shards import Dataset
from tests.data import small

Make = Callable[..., Dataset]


def polymnist_of(folder: Path) -> Make:
    small.gradients(small.signed_mnist(folder), 3)
    return lambda **keywords: polymnist(source=folder, **keywords)


SETS: dict[str, Callable[[Path], Make]] = {
    "polymnist": polymnist_of,
    "planted": lambda folder: lambda **keywords: planted(rows=300, **keywords),
    "planted on mnist": lambda folder: (
        lambda **keywords: planted(images="mnist", source=small.signed_mnist(folder), rows=300, sources=2, **keywords)
    ),
    "mfeat": lambda folder: lambda **keywords: mfeat(source=small.mfeat_file(folder), **keywords),
    "cub": lambda folder: lambda **keywords: cub(source=small.cub_files(folder), **keywords),
    "tcga": lambda folder: lambda **keywords: tcga(source=small.tcga_file(folder), **keywords),
    "citeseq": lambda folder: lambda **keywords: citeseq(source=small.citeseq_file(folder), **keywords),
}
FILES = {
    "polymnist": ("mnist.npz",),
    "planted on mnist": ("mnist.npz",),
    "mfeat": ("mfeat_six_views.npz",),
    "cub": ("cub_test2933_parts_attrs.npz", "captions_testclasses.txt.gz"),
    "tcga": ("tcga_breast_mrna_mirna_protein.npz",),
    "citeseq": ("citeseq_pbmc_eccite.npz",),
}


@pytest.mark.parametrize("name", SETS)
def test_every_datum_fits_its_field(tmp_path, name):
    dataset = SETS[name](tmp_path)()
    for split in ("train", "test"):
        found = small.rows(dataset, split)
        assert len(found) > 3
        for row in found[:20]:
            assert row.label is None if not dataset.classes else 0 <= (row.label or 0) < len(dataset.classes)
            for key, value in row.data.items():
                field = dataset.fields[key]
                decoded = field.decode(field.encode(value))
                assert tuple(decoded.shape) == field.shape
                if isinstance(value, Tensor):
                    assert torch.equal(decoded, value.float() / (255 if field.kind == "image" else 1))


@pytest.mark.parametrize("name", SETS)
def test_training_rows_follow_the_seed_and_test_rows_do_not(tmp_path, name):
    make = SETS[name](tmp_path)
    assert small.same(make(seed=1), make(seed=1), "train")
    assert not small.same(make(seed=1), make(seed=2), "train")
    assert small.same(make(seed=1), make(seed=2), "test")
    with pytest.raises(ValueError, match="split: expected 'train' or 'test', got 'validation'"):
        list(make().rows("validation"))


@pytest.mark.parametrize("name", [name for name in SETS if name != "tcga"])
def test_exactly_the_asked_share_of_training_entries_is_missing_and_what_is_there_does_not_change(tmp_path, name):
    make = SETS[name](tmp_path)
    complete, partial = small.rows(make(missing=0)), small.rows(make(missing=0.3))
    entries = len(complete) * len(make().fields)
    assert abs(sum(len(row.data) for row in partial) - 0.7 * entries) <= 0.5
    assert min(len(row.data) for row in partial) >= 1
    for whole, part in zip(map(small.contents, complete), map(small.contents, partial), strict=True):
        assert part.items() <= whole.items()
    assert set(small.shown(make(missing=0.3), "test")) == {tuple(make().fields)}
    with pytest.raises(ValueError, match="missing: expected a share from 0 to"):
        make(missing=0.95)


@pytest.mark.parametrize("name", FILES)
def test_the_rows_depend_on_the_keywords_that_the_set_records(tmp_path, name):
    source = SETS[name](tmp_path)(seed=3).source
    assert source["seed"] == 3
    assert str(tmp_path) not in source.values()  # but the content of what lies there: test_contents.py


@pytest.mark.parametrize(("name", "file"), [(name, file) for name, files in FILES.items() for file in files])
def test_a_missing_file_is_named_and_so_is_what_to_do(tmp_path, name, file):
    dataset = SETS[name](tmp_path)()
    (tmp_path / file).unlink()
    with pytest.raises(ValueError, match=f"missing {file}; name the folder that has them: --source FOLDER"):
        _again(dataset, name, tmp_path)


@pytest.mark.parametrize("spoil", [small.cut, small.empty, lambda path: np.savez(path, x=np.zeros(1))])
@pytest.mark.parametrize(("name", "file"), [(name, file) for name, files in FILES.items() for file in files])
def test_a_spoilt_file_is_named(tmp_path, name, file, spoil):
    dataset = SETS[name](tmp_path)()
    if file.endswith(".npz"):
        spoil(tmp_path / file)
    else:
        small.cut(tmp_path / file)
    with pytest.raises(ValueError, match="expected (an .npz file with the arrays|gzipped text).*get the file again"):
        _again(dataset, name, tmp_path)


def _again(dataset: Dataset, name: str, folder: Path) -> None:
    """Read the files once more, without writing them anew: what is wrong with them is said before the first row is asked for."""
    cub(source=folder) if name == "cub" else dataset.rows("train")


# ---- what they share ---------------------------------------------------------------------------------------------------------------


def test_arrays_of_other_shapes_or_unequal_lengths_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, x=np.zeros((4, 3)), y=np.zeros(5))
    assert set(read_arrays(path, {"x": ("rows", 3)})) == {"x"}
    with pytest.raises(ValueError, match=r"a.npz: x: expected the shape \(rows 4, 2\), got \(4, 3\)"):
        read_arrays(path, {"x": ("rows", 2)})
    with pytest.raises(ValueError, match=r"a.npz: y: expected the shape \(rows 4\), got \(5,\)"):
        read_arrays(path, {"x": ("rows", 3), "y": ("rows",)})
    with pytest.raises(ValueError, match=r"a.npz: y: expected the shape \(rows, 1\), got \(5,\)"):
        read_arrays(path, {"y": ("rows", 1)})


def test_the_held_out_part_is_stratified_and_eligible():
    label = np.repeat([0, 1, 2], [40, 20, 11])
    eligible = np.arange(71) % 2 == 0
    test = held_out(label, one_in=4, eligible=eligible, rng=np.random.default_rng(0))
    assert np.bincount(label[test]).tolist() == [10, 5, 2]
    assert eligible[test].all()
    assert not np.array_equal(test, held_out(label, one_in=4, eligible=eligible, rng=np.random.default_rng(1)))


def test_standardisation_is_that_of_the_training_rows_and_leaves_constant_columns_finite():
    x = np.random.default_rng(0).normal(5, 3, (50, 3)).astype(np.float32)
    x[:30, 2] = 0.1
    train = np.arange(50) < 30
    z = standardised(x, train)
    assert z.dtype == np.float32
    assert np.abs(z[:30, :2].mean(0)).max() < 1e-6 and np.abs(z[:30, :2].std(0) - 1).max() < 1e-6
    assert np.abs(z[:30, 2]).max() < 1e-6 and np.allclose(z[30:, 2], x[30:, 2] - 0.1, atol=1e-5)
    assert np.allclose(z[30:, :2], (x[30:, :2] - x[:30, :2].mean(0)) / x[:30, :2].std(0), atol=1e-5)
