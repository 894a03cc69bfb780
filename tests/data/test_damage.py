"""No damage to shards can pass as a missing modality: each is an error that names the place."""

import hashlib
import io
import json
import os
import pickle
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from meme_dist.data.fields import Field
from meme_dist.data.index import TAR_BLOCK, Manifest, digest, padded
from meme_dist.data.shards import Row, check_shards, write_shards
from meme_dist.data.stream import Evaluation, Stream
from tests.data.tiny import FIELDS, SIZES, dataset, datum


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(dataset(), tmp_path / "shards", rows_per_shard=8)
    return tmp_path / "shards"


BROKEN = "train-000001.tar"  # rows 8 to 15; row 12 holds all three modalities


def member(folder: Path, row: int, modality: str) -> tuple[int, int]:
    """Offset of a payload in its tar, and its size."""
    record = Manifest.load(folder).index("train").records[row]
    column = list(FIELDS).index(modality)
    return int(record["offset"][column]), int(record["size"][column])


def flip(path: Path, place: int, bits: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= bits
    path.write_bytes(data)


def rewrite(path: Path, *, without: str = "", extra: tuple[str, bytes] | None = None, rename: tuple[str, str] | None = None) -> None:
    """The same tar with a member less, more or of another name: intact by all that a tar reader can see."""
    with tarfile.open(path) as tar:
        members = {item.name: tar.extractfile(item).read() for item in tar}  # type: ignore[union-attr]
    members.pop(without, None)
    if extra:
        members[extra[0]] = extra[1]
    if rename:
        members = {rename[1] if name == rename[0] else name: data for name, data in members.items()}
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def cut_at_header(folder: Path) -> None:
    os.truncate(folder / BROKEN, member(folder, 12, "picture")[0] - TAR_BLOCK)


def cut_in_header(folder: Path) -> None:
    os.truncate(folder / BROKEN, member(folder, 12, "picture")[0] - 100)


def cut_in_payload(folder: Path) -> None:
    os.truncate(folder / BROKEN, member(folder, 12, "picture")[0] + 300)


def cut_in_payload_and_filled_up_with_zeros(folder: Path) -> None:
    size = (folder / BROKEN).stat().st_size
    cut_in_payload(folder)
    os.truncate(folder / BROKEN, size)


def flipped_payload(folder: Path) -> None:
    flip(folder / BROKEN, member(folder, 12, "picture")[0] + 500)


def flipped_name(folder: Path) -> None:
    flip(folder / BROKEN, member(folder, 12, "picture")[0] - TAR_BLOCK + 12)


def flipped_size(folder: Path) -> None:
    flip(folder / BROKEN, member(folder, 12, "picture")[0] - TAR_BLOCK + 130)


def flipped_clock(folder: Path) -> None:
    flip(folder / BROKEN, member(folder, 12, "picture")[0] - TAR_BLOCK + 140)


def removed_member(folder: Path) -> None:
    rewrite(folder / BROKEN, without="00000012.picture.npy")


def renamed_member(folder: Path) -> None:
    rewrite(folder / BROKEN, rename=("00000012.picture.npy", "00000012.painting.npy"))


def extra_member(folder: Path) -> None:
    rewrite(folder / BROKEN, extra=("00000012.smell.npy", b"x" * 5000))


def extra_member_in_the_filling_at_the_end(folder: Path) -> None:
    """A tar is filled up to 10 KiB: one more member fits in without a byte more."""
    path = folder / BROKEN
    size, data = path.stat().st_size, path.read_bytes()
    rewrite(path, extra=("00000012.smell.npy", b"x"))
    with tarfile.open(path) as tar:
        end = tar.getmembers()[-1].offset
    path.write_bytes((data[:end] + path.read_bytes()[end:])[:size])


def missing_shard(folder: Path) -> None:
    (folder / BROKEN).unlink()


def empty_shard(folder: Path) -> None:
    (folder / BROKEN).write_bytes(b"")


def swapped_shards(folder: Path) -> None:
    first, second = (folder / "train-000000.tar").read_bytes(), (folder / BROKEN).read_bytes()
    (folder / "train-000000.tar").write_bytes(second)
    (folder / BROKEN).write_bytes(first)


def pickled_member(folder: Path) -> None:
    rewrite(folder / BROKEN, without="00000012.picture.npy", extra=("00000012.picture.pkl", pickle.dumps(Bomb())))


def duplicated_member(folder: Path) -> None:
    """The same name twice, the second time with another content: which one would win is the reader's whim."""
    with tarfile.open(folder / BROKEN, "a") as tar:
        info = tarfile.TarInfo("00000012.picture.npy")
        info.size = 728
        tar.addfile(info, io.BytesIO(b"x" * 728))


def name_that_leaves_the_folder(folder: Path) -> None:
    rewrite(folder / BROKEN, rename=("00000012.picture.npy", "../../canary"))


def oversized_member(folder: Path) -> None:
    """A header that promises 8 GB, in a shard as long as ever: nobody may ask for that much memory."""
    path = folder / BROKEN
    place, data = member(folder, 12, "picture")[0] - TAR_BLOCK, bytearray(path.read_bytes())
    data[place + 124 : place + 136] = b"77777777777\0"
    header = data[place : place + TAR_BLOCK]
    header[148:156] = b" " * 8
    data[place + 148 : place + 156] = b"%06o\0 " % sum(header)
    path.write_bytes(data)


def wrong_shape(folder: Path) -> None:
    """A well-formed array of another shape, as long as the right one."""
    out = io.BytesIO()
    np.save(out, np.zeros((1, 30, 20), dtype=np.uint8))
    begin, size = member(folder, 12, "picture")
    assert len(out.getvalue()) == size
    data = bytearray((folder / BROKEN).read_bytes())
    data[begin : begin + size] = out.getvalue()
    (folder / BROKEN).write_bytes(data)


class Bomb:
    """Leaves a trace if anybody unpickles it: in this process, and a file that a worker process would leave too."""

    fired: list[str] = []

    def __init__(self, canary: Path | None = None):
        self.canary = canary

    def __reduce__(self) -> tuple:
        return (Bomb.fired.append, ("fired",)) if self.canary is None else (os.mkdir, (str(self.canary),))


ONE_MEMBER = "row 00000012, modality picture: expected '00000012.picture.npy' of 728 bytes"
DAMAGES = {
    cut_at_header: f"{BROKEN}, {ONE_MEMBER}, got none",
    cut_in_header: f"{BROKEN}, {ONE_MEMBER}, got none",
    cut_in_payload: f"{BROKEN}, {ONE_MEMBER}, got a tar that ends or breaks here",
    cut_in_payload_and_filled_up_with_zeros: f"{BROKEN}, row 00000012, modality",
    flipped_payload: f"{BROKEN}, {ONE_MEMBER}",
    flipped_name: f"{BROKEN}, {ONE_MEMBER}",
    flipped_size: f"{BROKEN}, {ONE_MEMBER}",
    flipped_clock: f"{BROKEN}, {ONE_MEMBER}",
    removed_member: f"{BROKEN}, {ONE_MEMBER}, got none",
    renamed_member: f"{BROKEN}, row 00000012, modality painting: expected no member '00000012.painting.npy'",
    extra_member: f"{BROKEN}, row 00000012, modality smell: expected no member '00000012.smell.npy', got 5000 bytes",
    extra_member_in_the_filling_at_the_end: f"{BROKEN}, row 00000012, modality smell: expected no member '00000012.smell.npy', got 1 bytes",
    missing_shard: f"{BROKEN}: expected a file of 20480 bytes, found none",
    empty_shard: f"{BROKEN}",
    swapped_shards: "train-00000",
    pickled_member: f"{BROKEN}, row 00000012, modality picture: expected no member '00000012.picture.pkl'",
    duplicated_member: f"{BROKEN}, row 00000012, modality picture: expected no member '00000012.picture.npy' a second time, got 728 bytes",
    name_that_leaves_the_folder: f"{BROKEN}: expected no member '../../canary', got 728 bytes",
    oversized_member: f"{BROKEN}, {ONE_MEMBER}, got a tar that ends or breaks here",
    wrong_shape: f"{BROKEN}, {ONE_MEMBER} with checksum",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_an_error_that_names_the_place_and_never_a_missing_modality(folder: Path, damage: Callable[[Path], None]) -> None:
    damage(folder)
    for read in (
        lambda: list(Evaluation(folder, "train", batch_size=4)),
        lambda: [next(batches) for batches in [iter(Stream(folder, "train", batch_size=4, seed=0))] for _ in range(8)],
    ):
        with pytest.raises(ValueError) as caught:
            read()
        assert DAMAGES[damage] in str(caught.value) and "shards check" in str(caught.value)
    assert Bomb.fired == []


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_the_check_finds_the_damage_in_the_shard_that_has_it(folder: Path, damage: Callable[[Path], None]) -> None:
    assert check_shards(folder) == (32, 5, ())
    damage(folder)
    report = check_shards(folder)
    broken = {"train-000000.tar", BROKEN} if damage is swapped_shards else {BROKEN}
    assert {problem.shard for problem in report.problems} == broken and not report.ok
    assert Bomb.fired == [] and f"{len(report.problems)} problems" in str(report)


def test_a_shard_that_is_cut_after_the_stream_began_is_an_error_too(folder: Path) -> None:
    evaluation = Evaluation(folder, "train", batch_size=4)
    cut_in_payload(folder)
    with pytest.raises(ValueError, match=BROKEN):
        list(evaluation)


def test_a_stream_over_one_split_does_not_care_about_the_other(folder: Path) -> None:
    missing_shard(folder)
    assert len(list(Evaluation(folder, "test", batch_size=4))) == 3


def test_a_datum_that_its_field_refuses_is_an_error_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Intact by all checksums, yet not a number: written by somebody who did not look."""

    def poisoned(split: str) -> Iterator[Row]:
        yield from (datum(number) for number in range(9))
        yield Row({"sound": torch.full((5,), float("nan"))})

    with monkeypatch.context() as patch:
        patch.setattr(Field, "_check_values", lambda *_: None)
        write_shards(dataset(poisoned), tmp_path / "shards", rows_per_shard=8)
    place = "train-000001.tar, row 00000009, modality sound: expected finite numbers, got 5"
    with pytest.raises(ValueError, match=place):
        list(Evaluation(tmp_path / "shards", "train", batch_size=4))
    with pytest.raises(ValueError, match=place):
        next(iter(Stream(tmp_path / "shards", "train", batch_size=64, seed=0)))
    assert place in str(check_shards(tmp_path / "shards"))


def test_an_index_that_is_missing_altered_or_of_another_split_is_an_error(folder: Path) -> None:
    index, good = folder / "train.index.npy", (folder / "train.index.npy").read_bytes()
    for change in (
        index.unlink,
        lambda: flip(index, len(good) - 3),
        lambda: index.write_bytes(good[:-1]),
        lambda: shutil.copy(folder / "test.index.npy", index),
    ):
        change()
        with pytest.raises(ValueError, match="train.index.npy: (the index|expected the index)"):
            Stream(folder, "train", batch_size=4, seed=0)
        report = check_shards(folder)
        assert {problem.shard for problem in report.problems} == {"train.index.npy"}
        index.write_bytes(good)
    assert check_shards(folder).ok


def test_an_index_of_pickles_is_an_error_and_never_run(folder: Path) -> None:
    """Even where somebody made the manifest agree with it."""
    with (folder / "train.index.npy").open("wb") as file:
        np.lib.format.write_array(file, np.array([Bomb()] * 23, dtype=object), allow_pickle=True)
    sha256 = hashlib.sha256((folder / "train.index.npy").read_bytes()).hexdigest()
    edit(folder, lambda content: content["splits"]["train"].update(index_sha256=sha256))
    with pytest.raises(ValueError, match="Python objects in dtype"):
        list(Evaluation(folder, "train", batch_size=4))
    assert Bomb.fired == []


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    """Change a manifest and seal it again, as somebody would who knows how."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    del content["checksum"]
    change(content)
    path.write_text(json.dumps({**content, "checksum": digest(content)}))


def test_a_manifest_of_other_shards_is_an_error(folder: Path, tmp_path: Path) -> None:
    def other(split: str) -> Iterator[Row]:
        return (datum(number + 100) for number in range(SIZES[split]))

    write_shards(dataset(other), tmp_path / "other", rows_per_shard=8)
    shutil.copy(tmp_path / "other" / "manifest.json", folder)
    with pytest.raises(ValueError, match="train.index.npy: expected the index with sha256"):
        Stream(folder, "train", batch_size=4, seed=0)
    for name in ("train.index.npy", "test.index.npy"):
        shutil.copy(tmp_path / "other" / name, folder)
    with pytest.raises(ValueError, match="train-00000"):  # now manifest and index agree, but the tars hold other rows
        list(Evaluation(folder, "train", batch_size=4))
    assert not check_shards(folder).ok


def test_a_manifest_that_was_edited_broken_or_lost_is_an_error(folder: Path) -> None:
    path = folder / "manifest.json"
    good = path.read_text()
    for text, message in [
        (good.replace('"laplace"', '"normal"'), "it was changed after it was written"),
        (good[:-20], "expected a manifest in JSON"),
        *((text, "expected a manifest in JSON") for text in ("[]", "5", "null", '"x"')),
        (good.replace('"format": 1', '"format": 2'), "expected format 1, got 2"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            Manifest.load(folder)
        assert [problem.shard for problem in check_shards(folder).problems] == ["manifest.json"]
    path.unlink()
    with pytest.raises(ValueError, match="found no manifest.json"):
        Stream(folder, "train", batch_size=4, seed=0)


def test_a_manifest_cannot_make_anybody_run_a_command_or_leave_the_folder(folder: Path) -> None:
    trace = folder.parent / "trace"
    for file in (f"pipe:touch {trace}", "../secret.tar", "/etc/passwd", "https://example.com/x.tar"):
        edit(folder, lambda content, file=file: content["splits"]["train"]["shards"][1].update(file=file))
        with pytest.raises(ValueError, match="expected the name of a file in the folder"):
            Manifest.load(folder)
    with pytest.raises(ValueError, match="expected a folder or an address .* no command is ever run"):
        Stream(f"pipe:touch {trace}", "train", batch_size=4, seed=0)
    assert not trace.exists()


def test_an_unknown_split_is_an_error_that_lists_the_known_ones(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a split among \['train', 'test'\], got 'valid'"):
        Stream(folder, "valid", batch_size=4, seed=0)


def test_a_row_that_is_resealed_with_a_pickle_is_refused_by_its_field_in_workers_and_budgets_too(folder: Path, tmp_path: Path) -> None:
    """Index and manifest agree with the bytes: only the codec is left to refuse them."""
    canary = tmp_path / "canary"
    begin, size = member(folder, 12, "picture")
    payload = io.BytesIO()
    np.lib.format.write_array(payload, np.array([Bomb(canary)], dtype=object), allow_pickle=True)
    data = bytearray((folder / BROKEN).read_bytes())
    data[begin : begin + size] = payload.getvalue().ljust(size, b"\0")
    (folder / BROKEN).write_bytes(data)
    records = np.load(folder / "train.index.npy")
    records["crc"][12, list(FIELDS).index("picture")] = zlib.crc32(data[begin - TAR_BLOCK : begin + padded(size)])
    np.save(folder / "train.index.npy", records)
    sha256 = hashlib.sha256((folder / "train.index.npy").read_bytes()).hexdigest()
    edit(folder, lambda content: content["splits"]["train"].update(index_sha256=sha256))
    for workers in (0, 1):
        with pytest.raises(ValueError, match=f"{BROKEN}, row 00000012, modality picture: "):
            list(Evaluation(folder, "train", batch_size=4, workers=workers))
        stream = Stream(folder, "train", batch_size=23, seed=0, damaged=1, workers=workers)
        assert len(next(iter(stream))[0].draw) == 23 and [problem.row for problem in stream.damaged] == ["00000012"]
    assert not check_shards(folder).ok and Bomb.fired == [] and not canary.exists()
    pickle.loads(pickle.dumps(Bomb(canary)))
    assert canary.exists()  # the bomb is real
