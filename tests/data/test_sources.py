"""Shards may lie in several folders and behind addresses: the same rows, kept in a bounded cache, whatever the source does for a while."""

import errno
import hashlib
import itertools
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
from braceexpand import braceexpand
from fsspec.implementations.memory import MemoryFileSystem

from meme_dist.data import cache as cache_module
from meme_dist.data import retry
from meme_dist.data.cache import Cache
from meme_dist.data.index import Manifest
from meme_dist.data.shards import check_shards, write_shards
from meme_dist.data.source import absolute
from meme_dist.data.stream import Evaluation, Stream
from tests.data.tiny import COUNTED, counted, dataset, row_numbers

ADDRESS = "memory://bucket/set"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(counted(0, 24), tmp_path / "set", rows_per_shard=8)
    return tmp_path / "set"


@pytest.fixture
def remote(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The same set at ADDRESS; the cache that readers will use."""
    MemoryFileSystem.store.clear()
    system = fsspec.filesystem("memory")
    for path in folder.iterdir():
        system.pipe_file(f"/bucket/set/{path.name}", path.read_bytes())
    monkeypatch.setenv("MEME_DIST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(retry.time, "sleep", lambda seconds: None)
    yield tmp_path / "cache"
    MemoryFileSystem.store.clear()


def rows(address: Path | str, steps: int = 6, **keywords) -> list[list[int]]:
    stream = Stream(address, "train", batch_size=8, streams=4, seed=0, **keywords)
    return [row_numbers(step[0]) for step in itertools.islice(stream, steps)]


def evaluated(address: Path | str, split: str = "train", **keywords) -> list[int]:
    return [number for batch in Evaluation(address, split, batch_size=5, **keywords) for number in row_numbers(batch) if number >= 0]


# ---- several folders ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path) -> str:
    for number, (low, high) in enumerate([(0, 10), (10, 11), (11, 24)]):
        write_shards(counted(low, high), tmp_path / f"mine-{number:03}", rows_per_shard=4)
    return str(tmp_path / "mine-{000..002}")


def test_folders_of_a_pattern_are_one_set_in_their_order(folders: str) -> None:
    assert evaluated(folders) == evaluated(Path(folders), workers=2) == list(range(24))
    manifest = Manifest.load(folders)
    assert manifest.num_rows("train") == 24 and len(manifest.shards("train")) == 3 + 1 + 4
    assert manifest.index("train").observed.tolist() == [[number % 4 != 0, number % 4 != 2] for number in range(24)]
    assert manifest.index("train").label.tolist() == [-1] * 24 and len(manifest.index("train").records) == 24
    assert manifest.splits["train"].present == {"left": 18, "right": 18} and manifest.single("train")
    assert check_shards(folders) == (48, 16, ())


def test_what_a_manifest_calls_its_folder_loads_the_same_set(
    folders: str, folder: Path, remote: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for address in (
        folders,
        Path(folders),
        folder,
        str(folder),
        ADDRESS,
        Path(ADDRESS),
        f"{ADDRESS}/",
        "memory://bucket/s{e..e}t",
    ):
        manifest = Manifest.load(address)
        for again in (manifest.folder, str(manifest.folder), manifest.address):
            assert Manifest.load(again).fingerprint == manifest.fingerprint
    monkeypatch.chdir(folder.parent)
    here = Manifest.load("mine-{000..002}").address
    monkeypatch.chdir("/")
    assert Manifest.load(here).num_rows("train") == 24


def test_alternatives_that_are_absolute_paths_mean_the_same_in_every_working_folder(
    folders: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for pattern in (
        f"{{{tmp_path}/mine-000,mine-001}}",
        "{mine-000,./mine-001}",
        "sets/{../mine-000,../mine-001}",
        "{a/../mine-000,mine-001}",
    ):
        assert list(braceexpand(absolute(pattern))) == [f"{tmp_path}/mine-000", f"{tmp_path}/mine-001"]
    assert absolute("mine-{000..002}") == folders and absolute("{/a,/b}") == "{/a,/b}"
    assert list(braceexpand(absolute("{/a{1..2},memory://b/c}/d\\,e"))) == ["/a1/d,e", "/a2/d,e", "memory://b/c/d,e"]


def test_a_folder_is_the_same_by_whatever_name(folders: str, remote: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "mine-000")
    for name in ("mine-000/", "./mine-000", "link"):
        with pytest.raises(ValueError, match="expected each folder once, got .*mine-000 twice: its rows would count double"):
            Manifest.load(f"{tmp_path}/{{mine-000,{name}}}")
    with pytest.raises(ValueError, match=f"got {ADDRESS} twice"):
        Manifest.load(f"{{{ADDRESS},{ADDRESS}/}}")


def test_the_fingerprint_covers_every_folder_and_not_where_they_lie(folders: str, folder: Path, tmp_path: Path) -> None:
    whole = Manifest.load(folders).fingerprint
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for number in range(3):
        (tmp_path / f"mine-{number:03}").rename(moved / f"mine-{number:03}")
    assert Manifest.load(str(moved / "mine-{000..002}")).fingerprint == whole
    for other in ("mine-{000..001}", "mine-{001,000,002}", "mine-000"):
        assert Manifest.load(str(moved / other)).fingerprint != whole


def test_a_split_that_some_folders_lack_is_that_of_the_others(tmp_path: Path) -> None:
    write_shards(counted(0, 5), tmp_path / "a", splits=["train"])
    write_shards(counted(5, 9), tmp_path / "b", splits=["train", "test"])
    assert evaluated(str(tmp_path / "{a,b}")) == list(range(9)) and evaluated(str(tmp_path / "{a,b}"), "test") == list(range(5, 9))


def test_damage_in_one_of_the_folders_names_that_folder(folders: str, tmp_path: Path) -> None:
    (tmp_path / "mine-002" / "train-000001.tar").unlink()
    with pytest.raises(ValueError, match=f"{tmp_path}/mine-002/train-000001.tar: expected a file of 10240 bytes, found none"):
        evaluated(folders)
    assert [problem.shard for problem in check_shards(folders).problems] == [f"{tmp_path}/mine-002/train-000001.tar"]


def test_folders_that_do_not_agree_are_refused(folders: str, tmp_path: Path) -> None:
    write_shards(dataset(), tmp_path / "other")
    with pytest.raises(ValueError, match="other: expected the fields of .*mine-000, got others"):
        Manifest.load(str(tmp_path / "{mine-000,other}"))
    reordered = counted(0, 4)
    object.__setattr__(reordered, "fields", dict(reversed(COUNTED.items())))
    write_shards(reordered, tmp_path / "reordered")
    with pytest.raises(ValueError, match="expected the fields of"):
        Manifest.load(str(tmp_path / "{mine-000,reordered}"))
    object.__setattr__(reordered, "fields", COUNTED)
    object.__setattr__(reordered, "classes", ("a", "b"))
    write_shards(reordered, tmp_path / "classes")
    with pytest.raises(ValueError, match="expected the classes of"):
        Manifest.load(str(tmp_path / "{mine-000,classes}"))


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("mine-{000..000}{,}", "expected each folder once, got mine-000 twice"),
        ("mine-{000", "expected a brace pattern such as"),
        ("mine-{0..99999}", "expected at most 4096 folders"),
        ("mine-{003..004}", "mine-003: expected a folder of shards, found no manifest.json"),
        ("pipe:touch trace", "expected a folder or an address such as s3://bucket/set, got neither; no command is ever run"),
        ("{mine-000,pipe:touch trace}", "pipe:touch trace: expected a folder or an address"),
        ("pipe://touch trace", "expected a plain address with one of s3, .*, got 'pipe'; no command is ever run"),
        ("reference://spec.json", "got 'reference'"),
        ("simplecache::memory://bucket/set", "expected a plain address"),
        ("memory::memory://bucket/set", "expected a plain address"),
        ("memory://bucket/set::memory://bucket/set", "expected a plain address"),
        ("https://user:secret@host/set", "expected the address of a folder without query or password"),
        ("https://host/set?token=secret", "expected the address of a folder without query or password"),
        (" mine-000", "expected a folder, a brace pattern or an address, got ' mine-000'"),
        ("mine-000\n", "expected a folder, a brace pattern or an address"),
        ("", "expected a folder, a brace pattern or an address, got ''"),
        ("s3:bucket/set", "got neither; no command is ever run"),
    ],
)
def test_anything_but_paths_patterns_and_known_addresses_is_refused(
    folders: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message) as caught:
        Stream(address, "train", batch_size=4, seed=0)
    assert "secret" not in str(caught.value) and sorted(tmp_path.iterdir()) == before


def test_a_driver_that_is_not_installed_is_asked_for(remote: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(address: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(ValueError, match="s3://bucket/set: expected the driver for such addresses .*Install s3fs"):
        Manifest.load("s3://bucket/set")


def test_a_folder_with_braces_in_its_name_is_taken_by_its_name(tmp_path: Path) -> None:
    write_shards(counted(0, 3), tmp_path / "odd{a,b}")
    assert evaluated(tmp_path / "odd{a,b}") == [0, 1, 2]


# ---- addresses and the cache --------------------------------------------------------------------------------------------------------


def copies(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir()}


def test_a_set_behind_an_address_holds_the_same_rows(folder: Path, remote: Path) -> None:
    assert rows(ADDRESS) == rows(folder) and evaluated(ADDRESS) == list(range(24))
    assert Manifest.load(ADDRESS).fingerprint == Manifest.load(folder).fingerprint
    assert check_shards(ADDRESS) == (48, 6, ())
    assert copies(remote) == {f"{shard.sha256}.tar" for shard in Manifest.load(folder).shards("train")} | {
        f"{Manifest.load(folder).splits[split].index_sha256}.npy" for split in ("train", "test")
    }


def test_patterns_of_addresses_are_one_set(folders: str, remote: Path, tmp_path: Path) -> None:
    for path in tmp_path.glob("mine-*/*"):
        fsspec.filesystem("memory").pipe_file(f"/bucket/{path.parent.name}/{path.name}", path.read_bytes())
    assert evaluated("memory://bucket/mine-{000..002}") == evaluated(f"{{{tmp_path}/mine-000,memory://bucket/mine-001}}") + list(
        range(11, 24)
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_and_ranks_share_one_cache(folder: Path, remote: Path, workers: int) -> None:
    """`file://` is an address too, and one that worker processes can reach."""
    address = f"file://{folder}"
    for rank in range(2):
        stream = Stream(address, "train", batch_size=8, streams=4, seed=0, rank=rank, world=2, workers=workers)
        local = Stream(folder, "train", batch_size=8, streams=4, seed=0, rank=rank, world=2)
        for a, b in itertools.islice(zip(stream, local, strict=True), 4):
            assert row_numbers(a[0]) == row_numbers(b[0])
    assert sum(name.endswith(".tar") for name in copies(remote)) == 3


def test_a_second_run_fetches_nothing_but_the_manifest(remote: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = rows(ADDRESS)
    for name in list(MemoryFileSystem.store):
        if not name.endswith("manifest.json"):
            del MemoryFileSystem.store[name]
    assert rows(ADDRESS) == first


def test_a_cache_folder_can_be_given(folder: Path, remote: Path, tmp_path: Path) -> None:
    assert rows(ADDRESS, cache=tmp_path / "mine") == rows(folder) and not remote.exists()
    assert len(copies(tmp_path / "mine")) == 4


@pytest.mark.parametrize("spoil", [lambda data: data[:-1], lambda data: bytes([*data[:700], data[700] ^ 1, *data[701:]]), lambda data: b""])
def test_a_copy_that_went_bad_is_fetched_again(folder: Path, remote: Path, spoil: Callable[[bytes], bytes]) -> None:
    first = rows(ADDRESS)
    for path in remote.iterdir():
        path.write_bytes(spoil(path.read_bytes()))
    assert rows(ADDRESS) == first
    for path in remote.iterdir():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.stem


def test_a_shard_that_is_altered_at_its_source_is_never_kept_and_names_the_row(folder: Path, remote: Path) -> None:
    manifest = Manifest.load(folder)
    record, name = manifest.index("train").records[13], manifest.shards("train")[1].file
    data = bytearray((folder / name).read_bytes())
    data[int(record["offset"][0]) + 130] ^= 1
    fsspec.filesystem("memory").pipe_file(f"/bucket/set/{name}", bytes(data))
    with pytest.raises(ValueError, match=f"{name}, row 00000013, modality left: expected .*shards check {ADDRESS}"):
        evaluated(ADDRESS)
    assert f"{manifest.shards('train')[1].sha256}.tar" not in copies(remote)
    stream = Stream(ADDRESS, "train", batch_size=8, streams=4, seed=0, damaged=1)  # one byte costs one row, not the shard
    found = [number for step in itertools.islice(stream, 3) for number in row_numbers(step[0])]
    assert len(stream.damaged) == 1 and stream.damaged[0].row == "00000013" and set(range(24)) - set(found) == {13}


def test_a_shard_or_an_index_that_is_missing_at_its_source_is_an_error_at_once(
    folder: Path, remote: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(retry.time, "sleep", slept.append)
    system = fsspec.filesystem("memory")
    system.rm("/bucket/set/train-000001.tar")
    with pytest.raises(ValueError, match="train-000001.tar: expected a file of 20480 bytes, found none"):
        evaluated(ADDRESS)
    system.rm("/bucket/set/train.index.npy")
    for path in remote.glob("*.npy"):
        path.unlink()
    with pytest.raises(ValueError, match=f"{ADDRESS}/train.index.npy: the index is missing"):
        evaluated(ADDRESS)
    system.rm("/bucket/set/manifest.json")
    with pytest.raises(ValueError, match=f"{ADDRESS}: expected a folder of shards, found no manifest.json"):
        evaluated(ADDRESS)
    assert slept == []


def test_a_set_that_does_not_fit_into_the_cache_is_read_by_range(folder: Path, remote: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEME_DIST_CACHE_GB", "0.00005")  # 50 kB; the set has 6 shards of 20 kB
    fetched: list[int] = []
    cat_file = MemoryFileSystem.cat_file

    def counted_cat(self, path, start=None, end=None, **keywords):
        fetched.append((end or 0) - (start or 0))
        return cat_file(self, path, start=start, end=end, **keywords)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", counted_cat)
    assert rows(ADDRESS) == rows(folder)
    assert not any(name.endswith(".tar") for name in copies(remote)) and max(fetched) < 20480
    os.truncate(folder / "train-000002.tar", 15_000)
    fsspec.filesystem("memory").pipe_file("/bucket/set/train-000002.tar", (folder / "train-000002.tar").read_bytes())
    with pytest.raises(ValueError, match="train-000002.tar: expected a file of 20480 bytes, got 15000"):
        evaluated(ADDRESS)


def test_a_server_that_knows_no_ranges_is_read_all_the_same_and_one_that_sends_something_else_is_told(
    folder: Path, remote: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEME_DIST_CACHE_GB", "0")
    cat_file, extra = MemoryFileSystem.cat_file, 0

    def whole(self, path, start=None, end=None, **keywords):
        return cat_file(self, path, **keywords) if not extra else cat_file(self, path, start=start, end=(end or 0) + extra)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", whole)
    assert rows(ADDRESS) == rows(folder)
    stream, extra = Stream(ADDRESS, "train", batch_size=8, streams=4, seed=0), 1
    with pytest.raises(OSError, match=r"train-00000\d.tar: expected \d+ bytes from byte \d+ on, got \d+; let the server answer"):
        next(iter(stream))


def test_the_least_recently_used_shards_go_and_none_that_is_new_or_being_written(tmp_path: Path) -> None:
    cache = Cache(tmp_path, bound=250)

    def add(content: bytes) -> str:
        name = hashlib.sha256(content).hexdigest()
        assert cache.add(f"{name}.tar", name, lambda path: path.write_bytes(content))
        return f"{name}.tar"

    first, second = add(b"1" * 100), add(b"2" * 100)
    for age, name in ((30, first), (20, second)):
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    (tmp_path / "x.tar.1-a.part").write_bytes(b"x" * 1000)
    (tmp_path / "index.npy").write_bytes(b"x" * 1000)
    (tmp_path / "old.tar.1-b.part").write_bytes(b"x" * 1000)
    os.utime(tmp_path / "old.tar.1-b.part", (time.time() - 7200,) * 2)
    assert cache.find(first, 100) == tmp_path / first  # used: now the second is older
    third = add(b"3" * 100)
    assert copies(tmp_path) == {first, third, "x.tar.1-a.part", "index.npy"}
    huge = add(b"4" * 1000)
    assert copies(tmp_path) == {huge, "x.tar.1-a.part", "index.npy"}


def test_a_copy_with_another_content_is_not_kept(tmp_path: Path) -> None:
    cache = Cache(tmp_path, bound=10**6)
    assert cache.add("a.tar", "0" * 64, lambda path: path.write_bytes(b"other")) is None
    with pytest.raises(ConnectionError):
        cache.add("a.tar", "0" * 64, lambda path: (path.write_bytes(b"half"), (_ for _ in ()).throw(ConnectionError())))
    assert copies(tmp_path) == set() and cache.find("a.tar") is None and not cache.discard("a.tar")


def _read_all(address: str, cache: str, answers) -> None:
    os.environ["MEME_DIST_CACHE"] = cache
    answers.put(evaluated(address))


def test_processes_that_fill_the_cache_at_once_all_read_the_same(folder: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    answers = context.Queue()
    processes = [context.Process(target=_read_all, args=(f"file://{folder}", str(tmp_path / "cache"), answers)) for _ in range(4)]
    for process in processes:
        process.start()
    assert [answers.get(timeout=60) for _ in processes] == [list(range(24))] * 4
    for process in processes:
        process.join()
    assert len(copies(tmp_path / "cache")) == 4


def _fetch(folder: str, number: int, answers) -> None:
    """Ask for one copy after another; how often this process had to fetch, and whether all came."""
    cache, fetched, came = Cache(Path(folder), bound=10**6), 0, True

    def fetch(path: Path) -> None:
        nonlocal fetched
        fetched += 1
        time.sleep(0.05)
        path.write_bytes(content)

    for content in (str(place).encode() for place in range(number)):
        name = hashlib.sha256(content).hexdigest()
        came &= cache.add(f"{name}.tar", name, fetch) == Path(folder) / f"{name}.tar"
    answers.put((fetched, came))


def test_processes_on_a_cold_cache_fetch_each_shard_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    answers = context.Queue()
    processes = [context.Process(target=_fetch, args=(str(tmp_path / "cache"), 8, answers)) for _ in range(4)]
    for process in processes:
        process.start()
    fetched, came = zip(*(answers.get(timeout=60) for _ in processes), strict=True)
    for process in processes:
        process.join()
    assert sum(fetched) == 8 and all(came)
    assert len(copies(tmp_path / "cache")) == 8 and all(name.endswith(".tar") for name in copies(tmp_path / "cache"))


def _hold(folder: str, name: str, told) -> None:
    Cache(Path(folder), bound=10**6).add(name, "0" * 64, lambda path: (told.put(1), time.sleep(60)))


CONTENT = b"bytes"
KEPT = hashlib.sha256(CONTENT).hexdigest()


@pytest.mark.parametrize("killed", [True, False])
def test_a_process_that_is_killed_or_hangs_while_it_fetches_holds_up_nobody_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    monkeypatch.setattr(cache_module, "STALLED", 60.0 if killed else 0.3)
    context = multiprocessing.get_context("forkserver")
    told = context.Queue()
    holder = context.Process(target=_hold, args=(str(tmp_path), f"{KEPT}.tar", told))
    holder.start()
    told.get(timeout=60)
    if killed:
        holder.kill()
        holder.join()
    start = time.monotonic()
    assert Cache(tmp_path, bound=10**6).add(f"{KEPT}.tar", KEPT, lambda path: path.write_bytes(CONTENT)) == tmp_path / f"{KEPT}.tar"
    assert time.monotonic() - start < 10
    holder.kill()
    holder.join()


def test_where_the_file_system_has_no_locks_copies_are_kept_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(cache_module.fcntl, "flock", refuse)
    assert Cache(tmp_path, bound=10**6).add(f"{KEPT}.tar", KEPT, lambda path: path.write_bytes(CONTENT))
    assert f"{KEPT}.tar" in copies(tmp_path)


def test_locks_left_behind_are_no_shards_and_go_after_a_while(tmp_path: Path) -> None:
    for name, age in (("old.tar.lock", 7200), ("new.tar.lock", 0), (f"{KEPT}.tar.lock", 7200)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    assert Cache(tmp_path, bound=10**6).add(f"{KEPT}.tar", KEPT, lambda path: path.write_bytes(CONTENT))
    assert copies(tmp_path) == {f"{KEPT}.tar", "new.tar.lock"}


def test_a_copy_that_is_not_what_it_should_be_is_fetched_anew(tmp_path: Path) -> None:
    (tmp_path / f"{KEPT}.tar").write_bytes(b"other")
    assert Cache(tmp_path, bound=10**6).add(f"{KEPT}.tar", KEPT, lambda path: path.write_bytes(CONTENT))
    assert (tmp_path / f"{KEPT}.tar").read_bytes() == CONTENT


def test_readers_survive_that_others_empty_the_cache_under_them(folder: Path, remote: Path) -> None:
    stop = threading.Event()

    def empty() -> None:
        while not stop.wait(0.002):
            for path in remote.glob("*.tar"):
                path.unlink(missing_ok=True)

    thread = threading.Thread(target=empty)
    thread.start()
    try:
        assert all(evaluated(ADDRESS) == list(range(24)) for _ in range(10))
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("wanted", ["much", "-1", "nan"])
def test_a_bound_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch, wanted: str) -> None:
    monkeypatch.setenv("MEME_DIST_CACHE_GB", wanted)
    with pytest.raises(ValueError, match=f"MEME_DIST_CACHE_GB: expected gigabytes, a number of 0 or more, got '{wanted}'"):
        Cache.of()


def test_the_cache_is_in_the_users_cache_folder_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("MEME_DIST_CACHE", "MEME_DIST_CACHE_GB"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Cache.of() == Cache(tmp_path / "meme-dist" / "shards", 50_000_000_000)
    monkeypatch.setenv("MEME_DIST_CACHE", str(tmp_path / "a"))
    assert Cache.of().folder == tmp_path / "a" and Cache.of(tmp_path / "b").folder == tmp_path / "b"


# ---- sources that fail for a while --------------------------------------------------------------------------------------------------


def flaky(monkeypatch: pytest.MonkeyPatch, error: Exception, failures: int) -> list[str]:
    """Each file fails so often before it can be had; the list of all that was asked for."""
    asked: list[str] = []
    for name in ("cat_file", "get_file"):
        original = getattr(MemoryFileSystem, name)

        def call(self, path, *arguments, original=original, **keywords):
            asked.append(path)
            if asked.count(path) <= failures:
                raise error
            return original(self, path, *arguments, **keywords)

        monkeypatch.setattr(MemoryFileSystem, name, call)
    return asked


class DriverError(Exception):
    """What a driver raises that has errors of its own."""


@pytest.mark.parametrize("error", [OSError("reset"), TimeoutError("slow"), ConnectionResetError("gone"), DriverError("503")], ids=repr)
def test_a_source_that_fails_for_a_while_is_asked_again(
    folder: Path, remote: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(retry.time, "sleep", slept.append)
    asked = flaky(monkeypatch, error, failures=2)
    assert rows(ADDRESS) == rows(folder)
    assert len(asked) == 3 * 5 and len(slept) == 2 * 5  # manifest, index, three shards
    for short, long in zip(slept[::2], slept[1::2], strict=True):
        assert 0.25 <= short <= 0.5 <= long <= 1.0


def test_a_source_that_cannot_be_reached_ends_in_an_error_that_says_so(folder: Path, remote: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(ADDRESS, "train", batch_size=8, streams=4, seed=0, damaged=12)
    flaky(monkeypatch, TimeoutError("no answer"), failures=99)
    with pytest.raises(OSError, match=rf"{ADDRESS}/train-00000..tar: tried 6 times, the last time: TimeoutError: no answer; see that"):
        next(iter(stream))
    assert stream.damaged == ()  # an outage is no damage
    with pytest.raises(OSError, match=rf"{ADDRESS}/manifest.json: tried 6 times"):
        Manifest.load(ADDRESS)


@pytest.mark.parametrize(
    "error", [PermissionError(13, "denied"), FileNotFoundError(2, "none"), OSError(28, "no room"), ValueError("bad")], ids=repr
)
def test_an_error_that_lasts_is_raised_at_once(error: Exception) -> None:
    calls: list[int] = []

    def call() -> None:
        calls.append(1)
        raise error

    with pytest.raises(type(error)) as caught:
        retry.retried("it", call)
    assert caught.value is error and len(calls) == 1


def test_a_drivers_own_error_that_lasts_is_an_oserror_at_once() -> None:
    calls: list[int] = []

    def call() -> None:
        calls.append(1)
        refusal = DriverError("Forbidden")
        refusal.status = 403  # type: ignore[attr-defined]
        raise refusal

    with pytest.raises(OSError, match="it: DriverError: Forbidden; see that it is there and may be read"):
        retry.retried("it", call)
    assert len(calls) == 1


def test_the_size_of_a_shard_on_a_disk_that_fails_for_a_while_is_asked_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry.time, "sleep", lambda seconds: None)
    manifest, failures = Manifest.load(folder), [OSError(errno.ESTALE, "Stale file handle")]
    stat = os.stat

    def once(path, *arguments, **keywords):
        if str(path).endswith(".tar") and failures:
            raise failures.pop()
        return stat(path, *arguments, **keywords)

    monkeypatch.setattr(os, "stat", once)
    shard = manifest.shards("train")[0]
    assert manifest.size(shard) == shard.bytes and not failures


def test_waits_double_are_repeatable_differ_between_sources_and_are_bounded() -> None:
    waits = [[retry.wait(name, number) for number in range(1, retry.TRIES)] for name in ("a", "b")]
    assert waits[0] != waits[1] and waits == [[retry.wait(name, number) for number in range(1, retry.TRIES)] for name in ("a", "b")]
    for own in waits:
        assert all(0.25 * 2**number <= wait <= 0.5 * 2**number for number, wait in enumerate(own)) and sum(own) < 16


def test_an_error_of_the_disk_in_a_worker_arrives_as_what_it_was(folder: Path, remote: Path) -> None:
    stream = Stream(f"file://{folder}", "train", batch_size=8, streams=4, seed=0, workers=1)
    shutil.rmtree(remote)
    remote.write_text("no folder")
    with pytest.raises(OSError, match=f"Not a directory: '{remote}/"):
        next(iter(stream))
