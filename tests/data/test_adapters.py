"""Rows of other libraries arrive as they were: masks and names say what is missing, never a zero."""

import errno
import os
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from scipy import sparse
from torch import Tensor

from meme_dist import run
from meme_dist.convert import Convert, convert
from meme_dist.data.adapters import _h5, mudata
from meme_dist.data.adapters._common import held_out, modality_names
from meme_dist.data.adapters.mudata import from_h5
from meme_dist.data.adapters.multivae import from_incomplete_dataset
from meme_dist.data.fields import Field
from meme_dist.data.index import Manifest
from meme_dist.data.names import feature_names, row_names
from meme_dist.data.shards import Dataset, Row, check_shards, write_shards
from meme_dist.data.stream import Evaluation
from meme_dist.recipes import RECIPES
from meme_dist.recipes.base import Model
from meme_dist.recipes.keywords import names

NAN = float("nan")


def everything(dataset: Dataset) -> list[Row]:
    return [row for split in ("train", "test") for row in dataset.rows(split)]


# ---- MultiVae ---------------------------------------------------------------------------------------------------------------------------


class Incomplete:
    """MultiVae's `IncompleteDataset` as it is: attributes, and rows as objects with data, masks and labels."""

    def __init__(self, data: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None = None, labels: Tensor | None = None) -> None:
        self.data, self.masks, self.labels = data, masks, labels

    def __len__(self) -> int:
        return len(next(iter(self.data.values())))

    def __getitem__(self, index: int) -> Any:
        row = {"data": {name: x[index] for name, x in self.data.items()}}
        row |= {} if self.masks is None else {"masks": {name: mask[index] for name, mask in self.masks.items()}}
        return SimpleNamespace(**row, **({} if self.labels is None else {"labels": self.labels[index]}))


def drawn(rows: int = 30) -> dict[str, Tensor]:
    """One modality of each sort; every entry is its own."""
    generator = torch.Generator().manual_seed(0)
    return {
        "Photo": torch.randint(0, 256, (rows, 3, 4, 5), dtype=torch.uint8, generator=generator),
        "m1": torch.rand(rows, 1, 6, 6, generator=generator),
        "DNA methylation": torch.randn(rows, 7, generator=generator),
        "counts": torch.randint(0, 9, (rows, 4), generator=generator),
    }


def incomplete(**changes: Tensor) -> Incomplete:
    generator = torch.Generator().manual_seed(1)
    data = drawn() | changes
    masks = {name: torch.rand(30, generator=generator) < 0.6 for name in data}
    masks["Photo"][0] = False
    masks["m1"] |= ~torch.stack(list(masks.values())).any(0)
    return Incomplete(data, masks, torch.arange(30) % 3)


def test_every_row_of_an_incomplete_dataset_arrives_once_with_what_its_masks_mark_and_its_label() -> None:
    source = incomplete()
    dataset = from_incomplete_dataset(source, test_share=0.2)
    assert {name: (f.kind, f.shape, f.likelihood) for name, f in dataset.fields.items()} == {
        "photo": ("image", (3, 4, 5), "laplace"),
        "m1": ("image", (1, 6, 6), "laplace"),
        "dna_methylation": ("vector", (7,), "normal"),
        "counts": ("counts", (4,), "negative_binomial"),
    }
    assert list(dataset.fields) == ["photo", "m1", "dna_methylation", "counts"]  # whatever the first row lacks
    assert [len(list(dataset.rows(split))) for split in ("train", "test")] == [24, 6] and dataset.classes == ("0", "1", "2")
    data = {
        "photo": source.data["Photo"],
        "m1": (source.data["m1"] * 255).round().byte(),
        "dna_methylation": source.data["DNA methylation"],
    }
    data["counts"] = source.data["counts"].int()
    masks = dict(zip(data, source.masks.values(), strict=True))  # type: ignore[union-attr]
    expected = [({name: x[row] for name, x in data.items() if masks[name][row]}, row % 3) for row in range(30)]
    found = everything(dataset)
    for present, label in expected:
        same = [
            r
            for r in found
            if r.label == label and set(r.data) == set(present) and all(torch.equal(present[k], r.data[k]) for k in present)
        ]
        assert len(same) == 1
    assert sum(len(r.data) for r in found) == sum(int(mask.sum()) for mask in masks.values())


def test_shards_of_an_incomplete_dataset_pass_their_check_and_stream_with_its_pattern(tmp_path: Path) -> None:
    dataset = from_incomplete_dataset(incomplete())
    manifest = write_shards(dataset, tmp_path / "shards", rows_per_shard=8)
    assert check_shards(tmp_path / "shards").ok
    batch = next(iter(Evaluation(tmp_path / "shards", "test", batch_size=6)))
    assert batch.observed.tolist() == [[name in row.data for name in dataset.fields] for row in dataset.rows("test")]
    assert manifest.splits["train"].rows == 24


def test_what_a_masked_entry_is_filled_with_changes_nothing_nan_included() -> None:
    plain, filled = incomplete(), incomplete()
    for name in ("m1", "DNA methylation"):
        filled.data[name][~filled.masks[name]] = NAN  # type: ignore[index]
    one, other = from_incomplete_dataset(plain), from_incomplete_dataset(filled)
    assert one.source == other.source and one.fields == other.fields
    for a, b in zip(everything(one), everything(other), strict=True):
        assert a.label == b.label and all(torch.equal(a.data[name], b.data[name]) for name in {**a.data, **b.data})  # type: ignore[arg-type]


def test_nan_in_an_entry_that_is_there_is_an_error_that_names_row_and_modality() -> None:
    source = incomplete()
    row = int(source.masks["DNA methylation"].nonzero()[5])  # type: ignore[index]
    source.data["DNA methylation"][row, 2] = NAN
    with pytest.raises(ValueError, match=rf"train row {row}, modality DNA methylation: expected finite numbers, got 1"):
        from_incomplete_dataset(source)


def test_another_content_or_another_mask_is_another_source_so_that_no_old_shards_are_taken_for_it() -> None:
    sources = [incomplete(), incomplete(counts=drawn()["counts"] + 1), incomplete(), incomplete()]
    sources[2].masks["m1"][:] = True  # type: ignore[index]
    sources[3].labels += 1  # type: ignore[operator]
    assert len({from_incomplete_dataset(source).source["sha256"] for source in sources}) == 4
    assert from_incomplete_dataset(incomplete()).source == from_incomplete_dataset(incomplete()).source
    ones, whole, part = dict.fromkeys("ab", torch.ones(4, 2)), torch.ones(4, dtype=torch.bool), torch.arange(4) == 1
    lone = [
        Incomplete(ones, masks) for masks in ({"a": whole, "b": part}, {"a": part, "b": whole})
    ]  # the same numbers, of another modality
    assert len({from_incomplete_dataset(source).source["sha256"] for source in lone}) == 2


def test_a_second_dataset_is_the_test_split_and_masks_and_labels_may_be_absent() -> None:
    data = {"a": torch.arange(8.0)[:, None], "b": torch.arange(8.0)}
    dataset = from_incomplete_dataset(Incomplete(data), test=Incomplete({name: x[:3] + 100 for name, x in data.items()}))
    for split, numbers in {"train": range(8), "test": range(100, 103)}.items():
        rows = list(dataset.rows(split))
        assert sorted(float(row.data["a"]) for row in rows) == list(numbers)  # type: ignore[arg-type]
        assert all(torch.equal(row.data["a"], row.data["b"]) and row.label is None for row in rows)  # type: ignore[arg-type]
    assert dataset.classes == () and dataset.fields["b"].shape == (1,)


def test_likelihoods_choose_the_kind_and_one_hot_vectors_become_words() -> None:
    classes = torch.arange(30) % 4
    data = {"digit": torch.eye(4)[classes][:, None], "peaks": (torch.arange(60.0).view(30, 2) % 2), "x": torch.rand(30, 1, 2, 2)}
    likelihoods = {"digit": "categorical", "peaks": "poisson", "x": "bernoulli"}
    dataset = from_incomplete_dataset(
        Incomplete(data, labels=classes), likelihoods=likelihoods, label=lambda y: int(y) % 2, classes=("e", "o")
    )
    assert [dataset.fields[name].kind for name in data] == ["text", "counts", "image"] and dataset.fields["x"].likelihood == "bernoulli"
    assert dataset.fields["digit"].vocabulary[3:] == ("0", "1", "2", "3")
    assert sorted(row.data["digit"] for row in everything(dataset)) == sorted(str(int(c)) for c in classes)
    assert all(int(row.data["digit"]) % 2 == row.label for row in everything(dataset))  # type: ignore[arg-type]


def test_pictures_beyond_the_unit_interval_become_vectors_with_a_warning_and_not_where_that_was_asked_for(
    recwarn: pytest.WarningsRecorder,
) -> None:
    bright = incomplete(m1=drawn()["m1"] * 2 - 1)
    with pytest.warns(
        UserWarning, match=r"modality m1: three axes of floats from -0.99\d* to 0.99\d* become a vector.* scale them to \[0, 1\]"
    ):
        assert from_incomplete_dataset(bright).fields["m1"].kind == "vector"
    assert from_incomplete_dataset(incomplete()).fields["m1"].kind == "image"
    assert from_incomplete_dataset(bright, likelihoods={"m1": "normal"}).fields["m1"].kind == "vector"
    assert not recwarn.list


@pytest.mark.parametrize(
    ("change", "keywords", "message"),
    [
        ({"counts": torch.full((30, 4), -1)}, {}, "modality counts: expected counts, got numbers from -1"),
        ({"m1": torch.zeros(30, 4, 4, dtype=torch.uint8)}, {}, r"modality m1: uint8 \(4, 4\) is no image without channels first"),
        ({}, {"likelihoods": {"sound": "normal"}}, r"unknown modalities \['sound'\]; the data set has"),
        ({}, {"likelihoods": {"DNA methylation": "poisson"}}, "expected counts, got numbers from -"),
        ({}, {"likelihoods": {"counts": "categorical"}}, "modality counts: expected one-hot vectors"),
        ({"M1": torch.randn(30, 2)}, {}, "expected names that differ"),
        ({}, {"test_share": 1.0}, "test_share: expected a share between 0 and 1"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_reason(change: dict[str, Tensor], keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_incomplete_dataset(incomplete(**change), **keywords)


def test_rows_without_any_modality_labels_that_are_vectors_and_rows_of_another_shape_are_refused() -> None:
    empty = incomplete()
    for mask in empty.masks.values():  # type: ignore[union-attr]
        mask[4] = False
    with pytest.raises(ValueError, match="train row 4: expected one modality or more, got nothing"):
        from_incomplete_dataset(empty)
    data = {"a": torch.zeros(3, 2), "b": torch.zeros(3, 2)}
    with pytest.raises(ValueError, match=r"labels: expected one whole number, got shape \(40,\)"):
        from_incomplete_dataset(Incomplete(data, labels=torch.zeros(3, 40)))
    with pytest.raises(ValueError, match="labels: expected one whole number, got 1.5"):
        from_incomplete_dataset(Incomplete(data, labels=torch.full((3,), 1.5)))
    ragged = Incomplete(data | {"b": [torch.zeros(2), torch.zeros(2), torch.zeros(3)]})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"train row 2, modality b: expected torch.float32 \(2,\) as in rows before it"):
        from_incomplete_dataset(ragged)
    with pytest.raises(ValueError, match="modality b: expected a tensor or an array, got dict"):
        from_incomplete_dataset(Incomplete(data | {"b": [{}, {}, {}]}))  # type: ignore[dict-item]


def test_what_multivae_would_carry_and_shards_cannot_is_refused_by_name() -> None:
    data = {"a": torch.randn(6, 2), "b": torch.randn(6, 2)}
    masks = {"a": torch.ones(6, dtype=torch.bool), "b": torch.zeros(6, dtype=torch.bool)}
    with pytest.raises(ValueError, match="modality b: expected rows that have it, its mask is False in all"):
        from_incomplete_dataset(Incomplete(data, masks))
    none = Incomplete({name: x[:0] for name, x in data.items()})
    for parts, split in (((none, None), "train"), ((Incomplete(data), none), "test")):
        with pytest.raises(ValueError, match=f"{split}: expected rows, got an empty data set"):
            from_incomplete_dataset(parts[0], test=parts[1])
    for x in (data["b"].bfloat16(), data["b"].to_sparse(), data["b"].to(torch.complex64)):
        with pytest.raises(ValueError, match="train row 0, modality b: expected a dense tensor of a type that numpy has, got"):
            from_incomplete_dataset(Incomplete(data | {"b": x}))
    with pytest.raises(ValueError, match="labels: expected one whole number"):
        from_incomplete_dataset(Incomplete(data, labels=torch.full((6,), NAN)))


def test_one_hot_vectors_may_be_booleans() -> None:
    hot = torch.eye(3, dtype=torch.bool)[torch.arange(6) % 3]
    dataset = from_incomplete_dataset(Incomplete({"digit": hot, "x": torch.randn(6, 2)}), likelihoods={"digit": "categorical"})
    assert sorted(str(row.data["digit"]) for row in everything(dataset)) == ["0", "0", "1", "1", "2", "2"]


def test_names_become_words_that_a_file_may_have() -> None:
    assert modality_names(["Gene Expression", "m0", "5mC", "x" * 60]) == {
        "Gene Expression": "gene_expression",
        "m0": "m0",
        "5mC": "m5mc",
        "x" * 60: "x" * 40,
    }


def test_held_out_rows_and_the_others_are_all_rows_once() -> None:
    parts = held_out(101, 0.25, seed=3)
    assert len(parts["test"]) == 25 and sorted([*parts["train"], *parts["test"]]) == list(range(101))
    assert not np.array_equal(parts["test"], held_out(101, 0.25, seed=4)["test"])


# ---- MuData and AnnData -----------------------------------------------------------------------------------------------------------------


def write_matrix(group: Any, name: str, x: np.ndarray, layout: str) -> None:
    """As anndata does: a dataset, or a group with data, indices, indptr and shape."""
    if layout == "array":
        group[name] = x
        return
    form = (sparse.csr_matrix if layout == "csr" else sparse.csc_matrix)(x)
    node = group.create_group(name)
    node.attrs["encoding-type"], node.attrs["shape"] = f"{layout}_matrix", x.shape
    for part in ("data", "indices", "indptr"):
        node[part] = getattr(form, part)


def write_frame(group: Any, name: str, index: list[str], **columns: Any) -> None:
    """A data frame: its index, text columns as categories (None: no value), others as they are."""
    h5py = pytest.importorskip("h5py")
    frame = group.create_group(name)
    frame.attrs["_index"], frame.attrs["column-order"], frame.attrs["encoding-type"] = "_index", list(columns), "dataframe"
    frame.create_dataset("_index", data=index, dtype=h5py.string_dtype())
    for column, values in columns.items():
        if isinstance(values, np.ndarray):
            frame[column] = values
            continue
        categories = sorted({value for value in values if value is not None})
        node = frame.create_group(column)
        node.create_dataset("categories", data=categories, dtype=h5py.string_dtype())
        node["codes"] = np.array([-1 if value is None else categories.index(value) for value in values], dtype=np.int8)


RNA = [f"c{number}" for number in range(200)]
PROTEIN = [f"c{number}" for number in reversed(range(150, 250))]  # 50 in common, in another order


def counts() -> np.ndarray:
    """All-zero cells among them, and no two others alike."""
    x = np.random.default_rng(0).poisson(0.7, (200, 6)).astype(np.float32)
    x[:, 0] = np.arange(200)
    x[[0, 60, 160]] = 0
    return x


def levels() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(100, 3))


@pytest.fixture(params=["array", "csr", "csc"])
def layout(request: pytest.FixtureRequest) -> str:
    return request.param


def write_h5mu(path: Path, layout: str = "csr", *, rna: np.ndarray | None = None) -> Path:
    with pytest.importorskip("h5py").File(path, "w") as file:
        file.attrs["axis"] = 0
        file.create_group("mod").attrs["mod-order"] = ["RNA", "protein"]
        for name, names, x in (("RNA", RNA, counts() if rna is None else rna), ("protein", PROTEIN, levels())):
            group = file["mod"].create_group(name)
            write_matrix(group, "X", x, layout if name == "RNA" else "array")
            kinds = {"type": ["B" if int(cell[1:]) % 3 else None if cell == "c3" else "A" for cell in names]} if name == "RNA" else {}
            write_frame(group, "obs", names, **kinds)
            write_frame(group, "var", [f"v{number}" for number in range(x.shape[1])])
        write_matrix(file["mod/RNA"].create_group("layers"), "log", np.log1p(counts()), layout)
        write_frame(file, "obs", RNA + [name for name in PROTEIN if name not in RNA], site=np.arange(250) // 125)
    return path


def by_cell(dataset: Dataset) -> list[tuple[dict[str, list[float]], int | None]]:
    return [({name: np.asarray(x).tolist() for name, x in row.data.items()}, row.label) for row in everything(dataset)]


def expected(rna: np.ndarray, protein: np.ndarray, label: Any) -> list[tuple[dict[str, list[float]], int | None]]:
    rows = {name: {"rna": rna[number].tolist()} for number, name in enumerate(RNA)}
    for number, name in enumerate(PROTEIN):
        rows.setdefault(name, {})["protein"] = protein[number].astype(np.float32).tolist()
    return [(data, label(name)) for name, data in rows.items()]


def ordered(rows: list[tuple[dict[str, list[float]], int | None]]) -> list[Any]:
    return sorted((sorted(data.items()), -1 if label is None else label) for data, label in rows)


@pytest.mark.parametrize("window", [1 << 27, 2500])
def test_cells_are_matched_by_name_and_a_cell_of_one_obs_alone_lacks_the_other(
    tmp_path: Path, layout: str, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mudata, "WINDOW", window)
    monkeypatch.setattr(_h5, "ENTRIES", 100)
    dataset = from_h5(write_h5mu(tmp_path / "m.h5mu", layout), label="type")
    assert {name: (f.kind, f.shape, f.likelihood) for name, f in dataset.fields.items()} == {
        "rna": ("counts", (6,), "negative_binomial"),
        "protein": ("vector", (3,), "normal"),
    }
    assert dataset.classes == ("A", "B")
    classes = {name: None if name == "c3" or name not in RNA else int(int(name[1:]) % 3 > 0) for name in RNA + PROTEIN}
    assert ordered(by_cell(dataset)) == ordered(expected(counts().astype(int), levels(), classes.get))
    assert [len(list(dataset.rows(split))) for split in ("train", "test")] == [200, 50]


def test_a_cell_whose_counts_are_all_zero_is_there(tmp_path: Path, layout: str) -> None:
    write_shards(from_h5(write_h5mu(tmp_path / "m.h5mu", layout)), tmp_path / "shards")
    manifest = Manifest.load(tmp_path / "shards")
    assert sum(split.present["rna"] for split in manifest.splits.values()) == 200
    rows = everything(from_h5(tmp_path / "m.h5mu"))
    assert sum("rna" in row.data and not np.asarray(row.data["rna"]).any() for row in rows) == 3
    assert sum("rna" in row.data and "protein" in row.data for row in rows) == 50


def test_cells_and_features_keep_their_names_in_shards_and_an_altered_file_of_names_is_told(tmp_path: Path, layout: str) -> None:
    dataset = from_h5(write_h5mu(tmp_path / "m.h5mu", layout))
    manifest = write_shards(dataset, tmp_path / "shards", rows_per_shard=64)
    assert feature_names(manifest) == {"rna": [f"v{n}" for n in range(6)], "protein": [f"v{n}" for n in range(3)]}
    rna, protein = counts(), levels().astype(np.float32)
    for split in ("train", "test"):
        names = row_names(manifest, split)
        batch = next(iter(Evaluation(tmp_path / "shards", split, batch_size=len(names))))
        assert batch.observed.tolist() == [[cell in RNA, cell in PROTEIN] for cell in names]
        for name, own, x in (("rna", RNA, rna), ("protein", PROTEIN, protein)):
            rows = [row for row, cell in enumerate(names) if cell in own]
            np.testing.assert_array_equal(batch.dense(name)[rows], x[[own.index(names[row]) for row in rows]])
    path = tmp_path / "shards" / "train.names.txt"
    path.write_text(path.read_text().replace("c1\n", "c9\n"))
    problem = next(iter(check_shards(tmp_path / "shards").problems))
    assert problem.shard == path.name and "expected the names of rows with sha256" in problem.message


def test_shards_of_rows_without_names_are_what_they_were_before_there_were_names(tmp_path: Path) -> None:
    manifest = write_shards(from_incomplete_dataset(incomplete()), tmp_path / "shards")
    assert not [path for path in (tmp_path / "shards").iterdir() if path.suffix not in (".tar", ".npy") and path.name != "manifest.json"]
    entry = manifest.to_json()
    assert set(entry) == {"format", "name", "fields", "classes", "source", "rows_per_shard", "splits"}
    assert set(entry["splits"]["test"]) == {"rows", "single", "present", "index_file", "index_sha256", "shards"}
    assert feature_names(manifest) == {} and row_names(manifest, "test") == [""] * 6


def test_folders_are_one_set_where_their_features_have_the_same_names_in_one_order(tmp_path: Path) -> None:
    data = {"a": torch.zeros(2), "b": torch.zeros(1)}
    described = {name: Field("vector", tuple(x.shape), "npy", "normal") for name, x in data.items()}
    for folder, called in (("x", ["g", "h"]), ("y", ["g", "h"]), ("z", ["h", "g"]), ("none", None)):
        rows = [Row(data, None, f"{folder}{n}" if called else None) for n in range(2)]
        features = {} if called is None else {"a": called}
        write_shards(Dataset("set", described, lambda split, rows=rows: iter(rows), features=features), tmp_path / folder)
    whole = Manifest.load(f"{tmp_path}/{{none,x,y}}")
    assert row_names(whole, "train") == ["", "", "x0", "x1", "y0", "y1"] and feature_names(whole) == {"a": ["g", "h"]}
    with pytest.raises(ValueError, match="the same names of features in all folders"):
        Manifest.load(f"{tmp_path}/{{x,z}}")
    with pytest.raises(ValueError, match="features of a: expected 2 names, one for each element of the field, got 1"):
        Dataset("set", described, lambda split: iter(()), features={"a": ["g"]})
    with pytest.raises(ValueError, match="row 0: expected a name of one line"):
        write_shards(Dataset("set", described, lambda split: iter([Row(data, None, "a\nb")])), tmp_path / "broken")


def test_rows_come_in_a_random_order_that_the_seed_decides(tmp_path: Path) -> None:
    path = write_h5mu(tmp_path / "m.h5mu")
    first, again, other = (by_cell(from_h5(path, seed=seed)) for seed in (0, 0, 1))
    assert first == again and first != other
    ids = [row["rna"][0] for row, _ in first if "rna" in row]
    assert abs(np.corrcoef(ids, range(len(ids)))[0, 1]) < 0.25


def test_no_more_rows_than_a_window_are_in_memory_and_each_is_read_once_or_nearly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_h5mu(tmp_path / "m.h5mu", "array")
    dataset, taken = from_h5(path, test_share=0.1), []
    monkeypatch.setattr(mudata, "WINDOW", 64 * (6 * 4 + 3 * 8))
    monkeypatch.setattr(_h5.Dense, "read", lambda self, low, high: (taken.append(high - low), self.data[low:high])[1])
    assert len(list(dataset.rows("train"))) == 225
    assert max(taken) <= 64 + _h5.GAP and sum(taken) <= 300 * 1.5  # rows held out lie between those that are read


def test_layers_are_read_where_they_are_named(tmp_path: Path, layout: str) -> None:
    path = write_h5mu(tmp_path / "m.h5mu", layout)
    dataset = from_h5(path, layers={"rna": "log"}, label="site")
    assert dataset.fields["rna"].kind == "vector" and dataset.classes == ("0", "1")
    place = {name: number for number, name in enumerate(dict.fromkeys(RNA + PROTEIN))}
    rna = np.log1p(counts())
    assert ordered(by_cell(dataset)) == ordered(expected(rna, levels(), lambda name: place[name] // 125))
    with pytest.raises(ValueError, match=r"protein: no layer 'log'; there are \['X'\]"):
        from_h5(path, layers="log")
    with pytest.raises(ValueError, match=r"layers: unknown modalities \['atac'\]"):
        from_h5(path, layers={"atac": "log"})


def test_nan_is_an_error_that_names_modality_and_cell(tmp_path: Path, layout: str) -> None:
    x = counts()
    x[77, 3] = NAN
    with pytest.raises(ValueError, match=r"rna, cell 'c77' \(row 77\): expected finite numbers"):
        from_h5(write_h5mu(tmp_path / "m.h5mu", layout, rna=x))


def write_h5ad(path: Path, names: list[str], x: np.ndarray, **columns: Any) -> Path:
    with pytest.importorskip("h5py").File(path, "w") as file:
        write_matrix(file, "X", x, "csr")
        write_frame(file, "obs", names, **columns)
        kinds = ["Gene Expression" if number % 2 else "Peaks" for number in range(x.shape[1])]
        write_frame(file, "var", [f"v{number}" for number in range(x.shape[1])], feature_types=kinds)
        write_frame(file.create_group("obsm"), "protein", names, a=np.arange(len(names)), b=np.arange(len(names)) + 0.5)
        file["obsm/pca"] = np.ones((len(names), 2))
    return path


def test_two_files_are_two_modalities_matched_by_name_and_labels_are_joined(tmp_path: Path) -> None:
    first = write_h5ad(tmp_path / "rna.h5ad", ["a", "b", "c"], np.eye(3, 4), kind=["x", None, None])
    second = write_h5ad(tmp_path / "atac.v2.h5ad", ["d", "b", "a"], 2 * np.eye(3, 4), kind=["z", "y", "y"])
    rows = by_cell(from_h5(first, second, label="kind", test_share=0.5))
    wanted = [({"rna": [1, 0, 0, 0], "atac": [0, 0, 2, 0]}, 0), ({"rna": [0, 1, 0, 0], "atac": [0, 2, 0, 0]}, 1)]
    assert ordered(rows) == ordered([*wanted, ({"rna": [0, 0, 1, 0]}, None), ({"atac": [2, 0, 0, 0]}, 2)])


def test_features_and_arrays_of_one_file_are_modalities(tmp_path: Path) -> None:
    path = write_h5ad(tmp_path / "one.h5ad", ["a", "b", "c"], np.arange(12.0).reshape(3, 4))
    dataset = from_h5(path, features="feature_types", obsm=["protein", "pca"], test_share=0.4)
    assert dataset.features == {"gene_expression": ["v1", "v3"], "peaks": ["v0", "v2"], "protein": ["a", "b"], "pca": ["pca_0", "pca_1"]}
    rows = by_cell(dataset)
    data = [
        ({"gene_expression": [4 * n + 1, 4 * n + 3], "peaks": [4 * n, 4 * n + 2], "protein": [n, n + 0.5], "pca": [1, 1]}, None)
        for n in range(3)
    ]
    assert ordered(rows) == ordered(data)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"one.h5ad: expected two modalities or more, got \['one'\]; give the files"):
        from_h5(path)
    with pytest.raises(ValueError, match=r"var: no column 'kind'; there are \['feature_types'\]"):
        from_h5(path, features="kind")


def test_categories_of_old_files_masked_columns_and_whole_floats_are_classes(tmp_path: Path) -> None:
    with pytest.importorskip("h5py").File(tmp_path / "f.h5", "w") as file:
        frame = file.create_group("obs")
        frame["old"], frame["__categories/old"] = np.array([1, -1, 0]), np.array([b"x", b"y"], dtype="S1")
        frame["masked/values"], frame["masked/mask"] = np.array([7, 8, 9]), np.array([False, True, False])
        frame["float"], frame["share"] = np.array([2.0, NAN, 1.0]), np.array([0.5, 1, 1])
        found = {name: _h5.classes(frame, name, "obs") for name in ("old", "masked", "float")}
        with pytest.raises(ValueError, match="'share' has fractions"):
            _h5.classes(frame, "share", "obs")
    assert {name: (codes.tolist(), names) for name, (codes, names) in found.items()} == {
        "old": ([1, -1, 0], ("x", "y")),
        "masked": ([0, -1, 1], ("7", "9")),
        "float": ([1, -1, 0], ("1", "2")),
    }


def test_categories_of_numbers_stay_apart_and_two_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.importorskip("h5py").File(tmp_path / "f.h5", "w") as file:
        frame = file.create_group("obs")
        frame["dose/categories"], frame["dose/codes"] = np.array([0.5, 1.0, 1.5]), np.array([0, 1, 2, 1, -1])
        frame["twice/categories"], frame["twice/codes"] = np.array([1.0, 2.0, 1.0]), np.array([0, 1, 2])
        codes, names = _h5.classes(frame, "dose", "obs")
        with pytest.raises(ValueError, match="obs: 'twice': expected categories with names of their own, got '1' for two"):
            _h5.classes(frame, "twice", "obs")
    assert codes.tolist() == [0, 1, 2, 1, -1] and names == ("0.5", "1", "1.5")


def test_a_full_scratch_disk_is_an_error_that_says_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_h5mu(tmp_path / "m.h5mu", "csc")

    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left on device: expected room for .* MB of scratch files in .*; name a folder .*TMPDIR"):
        from_h5(path)


def test_what_would_be_ignored_or_is_no_number_is_refused(tmp_path: Path) -> None:
    path = write_h5mu(tmp_path / "m.h5mu")
    for keywords in ({"features": "feature_types"}, {"obsm": ["pca"]}):
        with pytest.raises(ValueError, match="m.h5mu: expected a .h5ad file for features or obsm, got a .h5mu"):
            from_h5(path, **keywords)
    one = write_h5ad(tmp_path / "one.h5ad", ["a", "b", "c"], np.eye(3, 4))
    with pytest.importorskip("h5py").File(one, "a") as file:
        write_frame(file["obsm"], "mixed", ["a", "b", "c"], size=np.arange(3), kind=["x", "y", "x"])
    with pytest.raises(ValueError, match="/obsm/mixed: expected columns of numbers without gaps, got 'kind'"):
        from_h5(one, obsm=["mixed"])


def test_matrices_without_a_number_are_rows_of_zeros(tmp_path: Path) -> None:
    files = [write_h5ad(tmp_path / f"{name}.h5ad", ["a", "b", "c"], np.zeros((3, 4))) for name in ("left", "right")]
    rows = by_cell(from_h5(*files, test_share=0.4))
    assert rows == [({"left": [0] * 4, "right": [0] * 4}, None)] * 3


def test_files_that_are_none_names_that_occur_twice_and_modalities_that_share_genes_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("h5py")
    with pytest.raises(ValueError, match="expected a .h5mu or .h5ad file, found none"):
        from_h5(tmp_path / "none.h5mu")
    (tmp_path / "text.h5mu").write_text("no")
    with pytest.raises(ValueError, match="which is HDF5"):
        from_h5(tmp_path / "text.h5mu")
    twice = write_h5ad(tmp_path / "twice.h5ad", ["a", "b", "a"], np.eye(3, 4))
    with pytest.raises(ValueError, match="twice: obs: expected each name once, got 'a' 2 times"):
        from_h5(twice, obsm=["pca"])
    path = write_h5mu(tmp_path / "m.h5mu")
    with pytest.importorskip("h5py").File(path, "a") as file:
        file.attrs["axis"] = 1
    with pytest.raises(ValueError, match=r"share cells \(axis 0\), got axis 1"):
        from_h5(path)


def test_the_command_writes_shards_that_pass_their_check_and_another_file_is_another_set(tmp_path: Path) -> None:
    path, out = write_h5mu(tmp_path / "cells.h5mu"), tmp_path / "shards"
    options = Convert(files=(path,), out=out, layer=("rna=log",), label="type", rows_per_shard=64)
    manifest = convert(options)
    assert (manifest.name, manifest.classes) == ("cells", ("A", "B")) and check_shards(out).ok
    assert [len(manifest.shards(split)) for split in ("train", "test")] == [4, 1]
    assert convert(options).fingerprint == manifest.fingerprint  # the same again: taken as it is
    write_h5mu(path, rna=counts() + 1)
    with pytest.raises(ValueError, match="it holds another data set"):
        convert(options)
    with pytest.raises(ValueError, match="expected one layer, or MODALITY=LAYER for each"):
        convert(Convert(files=(path,), out=out, layer=("rna=log", "X")))


# ---- the page about it ------------------------------------------------------------------------------------------------------------------


def test_every_flag_that_the_migration_page_names_exists() -> None:
    page = (Path(__file__).parents[2] / "docs" / "migration.md").read_text(encoding="utf-8")
    ours = [line.split("|")[2] if line.startswith("|") else line for line in page.splitlines()]  # the left column of a table is theirs
    named = {flag.removeprefix("no-") for line in ours if "pip " not in line for flag in re.findall(r"--([a-z][a-z-]+)", line)}
    known = {entry.name for options in (Convert, run.Where, run.WriteTo) for entry in fields(options)} | {
        "num",
        "shards",
        "help",
        "draws",
        "interval",
    }
    for recipe in ("auto", "mnist_svhn"):
        known |= set(names(RECIPES[recipe]))
    assert len(named) > 20 and {flag.replace("-", "_") for flag in named} - known == set()
    rivals = set(re.findall(r"--objective ([a-z]+)", page))
    assert rivals <= set(get_args(get_type_hints(Model)["objective"])) and len(rivals) == 7
