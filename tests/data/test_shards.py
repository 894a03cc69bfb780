"""Writing shards: the index says what is there, nothing is half written, and nothing that was there is touched."""

import dataclasses
import errno
import os
import resource
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from webdataset.tariterators import group_by_keys, tar_file_expander

from meme_dist.data.fields import Field
from meme_dist.data.files import Shard
from meme_dist.data.index import Manifest
from meme_dist.data.shards import Row, check_shards, write_shards
from meme_dist.data.stream import Evaluation
from tests.data.tiny import FIELDS, SIZES, dataset, datum


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(dataset(), tmp_path / "shards", rows_per_shard=8)
    return tmp_path / "shards"


def same(a: torch.Tensor | str, b: torch.Tensor | str) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b


def test_the_index_says_exactly_what_tarfile_finds_and_a_missing_modality_is_a_missing_member(folder: Path) -> None:
    manifest = Manifest.load(folder)
    for split, size in SIZES.items():
        records, found = manifest.index(split).records, {}
        for shard in manifest.shards(split):
            with tarfile.open(folder / shard.file) as tar:
                for member in tar:
                    found[member.name] = (member.offset_data, member.size)
        listed = {
            f"{record['key'].decode()}.{name}.{field.codec}": (record["offset"][column], record["size"][column])
            for record in records
            for column, (name, field) in enumerate(FIELDS.items())
            if record["size"][column] >= 0
        }
        assert listed == found and len(records) == size
        expected = [[name in datum(number).data for name in FIELDS] for number in range(size)]
        assert manifest.index(split).observed.tolist() == expected
        assert manifest.index(split).label.tolist() == [
            -1 if datum(number).label is None else datum(number).label for number in range(size)
        ]
    assert [shard.rows for shard in manifest.shards("train")] == [8, 8, 7]
    assert manifest.splits["train"].present == {name: sum(name in datum(number).data for number in range(23)) for name in FIELDS}


def test_webdataset_alone_reads_the_same_rows(folder: Path) -> None:
    files = [(folder / shard.file).open("rb") for shard in Manifest.load(folder).shards("train")]
    samples = list(group_by_keys(tar_file_expander({"url": file.name, "stream": file} for file in files)))
    for file in files:
        file.close()
    assert len(samples) == SIZES["train"]
    for number, sample in enumerate(samples):
        row = datum(number)
        assert {name for name in sample if name[0] != "_"} == {f"{name}.{FIELDS[name].codec}" for name in row.data}
        assert all(sample[f"{name}.{FIELDS[name].codec}"] == FIELDS[name].encode(x) for name, x in row.data.items())


def test_the_same_rows_make_the_same_bytes_and_any_other_row_another_fingerprint(folder: Path, tmp_path: Path) -> None:
    again = write_shards(dataset(), tmp_path / "again", rows_per_shard=8)
    assert again.fingerprint == Manifest.load(folder).fingerprint
    for file in folder.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()

    def changed(split: str) -> Iterator[Row]:
        return (datum(number + (number == 7 and split == "train")) for number in range(SIZES[split]))

    assert write_shards(dataset(changed), tmp_path / "changed", rows_per_shard=8).fingerprint != again.fingerprint
    assert write_shards(dataset(source={}), tmp_path / "moved", rows_per_shard=8).fingerprint == again.fingerprint
    fields = {**FIELDS, "sound": Field("vector", (5,), "npy", "laplace")}
    assert write_shards(dataset(fields=fields), tmp_path / "other", rows_per_shard=8).fingerprint != again.fingerprint


def test_single_says_whether_any_row_holds_one_modality_only(folder: Path, tmp_path: Path) -> None:
    assert Manifest.load(folder).single("train")
    full = write_shards(dataset(lambda split: (datum(5 * number + 2) for number in range(4))), tmp_path / "full")
    assert not full.single("train") and full.num_rows("train") == 4


def test_shards_are_on_disk_before_the_rows_of_the_next_are_asked_for(tmp_path: Path) -> None:
    seen = []

    def watched(split: str) -> Iterator[Row]:
        for number in range(12):
            seen.append(sum(path.stat().st_size > 0 for path in tmp_path.rglob(f"{split}-*.tar")))
            yield datum(number)

    write_shards(dataset(watched), tmp_path / "shards", rows_per_shard=4, splits=("train",))
    assert [seen[4], seen[8]] == [1, 2]


def test_a_folder_that_holds_the_same_set_is_returned_untouched(folder: Path) -> None:
    def forbidden(split: str) -> Iterator[Row]:
        raise AssertionError("nothing has to be written")

    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert write_shards(dataset(forbidden), folder, rows_per_shard=8).fingerprint == Manifest.load(folder).fingerprint
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": {"noise": 0.7}}, "source.noise: 0.5 there, 0.7 wanted"),
        ({"source": {"noise": 0.5, "seed": 1}}, "source.seed: None there, 1 wanted"),
        ({"name": "other"}, "name: 'tiny' there, 'other' wanted"),
        ({"fields": {**FIELDS, "sound": Field("vector", (6,), "npy", "normal")}}, r"fields.sound.shape: \[5\] there, \[6\] wanted"),
        ({"fields": dict(reversed(FIELDS.items()))}, "order of fields: .'picture'"),
    ],
)
def test_a_folder_that_holds_another_set_is_left_alone_and_the_error_says_how_they_differ(
    folder: Path, changes: dict, message: str
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=message):
        write_shards(dataset(**changes), folder, rows_per_shard=8)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_with_anything_else_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="found thesis.txt; nothing was touched"):
        write_shards(dataset(), tmp_path)
    with pytest.raises(ValueError, match="expected a folder, found a file"):
        write_shards(dataset(), tmp_path / "thesis.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_link_is_written_where_it_leads_and_what_cannot_be_replaced_is_refused_before_a_row_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    for name, target in (("empty", tmp_path / "here"), ("nowhere", tmp_path / "there")):
        (tmp_path / name).symlink_to(target)
        write_shards(dataset(), tmp_path / name)
        assert (tmp_path / name).is_symlink() and check_shards(target).ok
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(ValueError, match="work: expected a folder that can be replaced, got the working folder or a mount; name a new"):
        write_shards(dataset(lambda split: iter([Row({})])), ".")
    monkeypatch.chdir(tmp_path / "here")
    assert write_shards(dataset(), ".").fingerprint == Manifest.load("../there").fingerprint  # it is there already


def test_a_cut_shard_is_not_returned_as_the_same_set(folder: Path) -> None:
    os.truncate(folder / "train-000001.tar", 1000)
    with pytest.raises(ValueError, match="train-000001.tar: expected 20480 bytes, got 1000"):
        write_shards(dataset(), folder, rows_per_shard=8)


def test_when_the_disk_is_full_nothing_is_left_behind(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, hard))  # a real error of the file system, at 15 kB a file
    try:
        with pytest.raises(OSError, match="shards was not written, nothing is left of it; make room") as caught:
            write_shards(dataset(), tmp_path / "shards")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG and list(tmp_path.iterdir()) == []


def test_when_the_source_fails_half_way_nothing_is_left_behind(tmp_path: Path) -> None:
    def broken(split: str) -> Iterator[Row]:
        yield from (datum(number) for number in range(10))
        raise ConnectionError("the source is gone")

    with pytest.raises(ConnectionError, match="the source is gone"):
        write_shards(dataset(broken), tmp_path / "shards", rows_per_shard=4)
    assert list(tmp_path.iterdir()) == []


def test_processes_that_write_at_once_all_get_one_complete_folder(tmp_path: Path) -> None:
    results: list[object] = []

    def write() -> None:
        try:
            results.append(write_shards(dataset(), tmp_path / "shards", rows_per_shard=8).fingerprint)
        except Exception as error:
            results.append(error)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(results)) == 1 and isinstance(results[0], str), results
    assert [path.name for path in tmp_path.iterdir()] == ["shards"] and check_shards(tmp_path / "shards").ok


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (Row({}), "split 'train', row 2: expected one modality or more, got nothing"),
        (Row({"smell": "rose"}), r"row 2: unknown modalities \['smell'\]; the fields are \['picture', 'name', 'sound'\]"),
        (Row({"sound": torch.zeros(4)}), r"row 2, modality sound: expected float32 \(5,\), got float32 \(4,\)"),
        (Row({"sound": torch.zeros(5).double()}), r"row 2, modality sound: expected float32 \(5,\), got float64 \(5,\)"),
        (Row({"sound": torch.full((5,), float("nan"))}), "row 2, modality sound: expected finite numbers, got 5"),
        (Row({"picture": torch.zeros(20, 30, 1, dtype=torch.uint8)}), r"row 2, modality picture: expected uint8 \(1, 20, 30\)"),
        (Row({"name": "one"}, 3), "row 2: expected a label from 0 to 2"),
        (Row({"name": "one"}, "1"), "row 2: expected a label from 0 to 2 .*, got '1'"),  # type: ignore[arg-type]
        (Row({"name": "one"}, 1.7), "row 2: expected a label from 0 to 2 .*, got 1.7"),  # type: ignore[arg-type]
        (Row({"name": "one"}, torch.tensor(1.7)), "row 2: expected a label from 0 to 2"),  # type: ignore[arg-type]
        (Row({"name": None}), r"row 2, modality name: expected a sentence \(str\) or int64 token ids \(3,\), got NoneType"),  # type: ignore[dict-item]
        (Row({"name": b"one"}), "row 2, modality name: expected a sentence .* got bytes"),  # type: ignore[dict-item]
        (Row({"name": 3}), "row 2, modality name: expected a sentence .* got int"),  # type: ignore[dict-item]
        (
            Row({"sound": torch.zeros(5).to_sparse()}),
            r"row 2, modality sound: expected a dense tensor .*, got torch.sparse_coo",
        ),
    ],
)
def test_a_row_that_does_not_fit_is_refused_with_its_place(tmp_path: Path, bad: Row, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_shards(dataset(lambda split: iter([datum(0), datum(1), bad])), tmp_path / "shards")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shards", [6, 12])
def test_checking_a_folder_takes_time_in_proportion_to_its_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int) -> None:
    asked = []

    class Counting(Shard):
        def __getattribute__(self, name: str) -> Any:
            asked.append(name)
            return super().__getattribute__(name)

    write_shards(dataset(lambda split: map(datum, range(shards))), tmp_path / "shards", rows_per_shard=1, splits=["train"])
    manifest = Manifest.load(tmp_path / "shards")
    split = manifest.splits["train"]
    counting = dataclasses.replace(split, shards=tuple(Counting(*shard) for shard in split.shards))
    monkeypatch.setattr(Manifest, "load", lambda folder: dataclasses.replace(manifest, splits={"train": counting}))
    assert check_shards(tmp_path / "shards").ok
    assert asked.count("rows") <= 3 * shards


def test_empty_splits_and_sources_that_are_no_json_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="split 'train' has no rows"):
        write_shards(dataset(lambda split: iter([])), tmp_path / "shards")
    with pytest.raises(ValueError, match="source: expected JSON values"):
        write_shards(dataset(source={"path": tmp_path}), tmp_path / "shards")
    with pytest.raises(ValueError, match="two or more modalities"):
        dataset(fields={"sound": FIELDS["sound"]})


def test_rows_that_were_written_come_back(folder: Path) -> None:
    """The whole way: encode, tar, offsets, checksums, decode."""
    seen = 0
    for batch in Evaluation(folder, "train", batch_size=5):
        for place, number in enumerate(batch.draw.tolist()):
            if number >= SIZES["train"]:
                continue
            row, seen = datum(number), seen + 1
            assert batch.observed[place].tolist() == [name in row.data for name in FIELDS]
            for name, x in row.data.items():
                assert same(batch.dense(name)[place], FIELDS[name].decode(FIELDS[name].encode(x)))
            assert batch.label is not None and batch.label[place] == (-1 if row.label is None else row.label)
    assert seen == SIZES["train"]
