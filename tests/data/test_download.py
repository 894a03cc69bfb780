"""Laws of downloading: whole or not at all, from any mirror, and a clear way out where there is no network."""

import hashlib
from pathlib import Path
from urllib.error import URLError

import pytest

from meme_dist.data.sets import _download, mnist_svhn
from meme_dist.data.sets._download import Remote, cache_folder, fetch, find


def remote(folder: Path, *urls: str, content: bytes = b"the real content") -> Remote:
    folder.mkdir(exist_ok=True)
    (folder / "file.bin").write_bytes(content)
    sha256 = hashlib.sha256(b"the real content").hexdigest()
    return Remote("file.bin", (*urls, (folder / "file.bin").as_uri()), 16, sha256)


def test_without_a_network_the_error_names_the_file_its_addresses_and_the_way_out(tmp_path, monkeypatch):
    def offline(url: str, timeout: float) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setattr(_download, "urlopen", offline)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="Name or service not known") as error:
        mnist_svhn.mnist_svhn().rows("train")
    for part in ("train-images-idx3-ubyte.gz", *mnist_svhn.MNIST_MIRRORS, "--source FOLDER"):
        assert part in str(error.value)
    assert list(cache_folder().iterdir()) == []


def test_a_download_lands_whole_in_the_cache_and_is_made_once(tmp_path, monkeypatch):
    file = remote(tmp_path / "net")
    found = find([file], source=None, cache=tmp_path / "cache")["file.bin"]
    assert found.read_bytes() == b"the real content"
    monkeypatch.setattr(_download, "urlopen", None)  # would fail
    assert find([file], source=None, cache=tmp_path / "cache") == {"file.bin": found}
    assert list(found.parent.iterdir()) == [found]


def test_the_next_mirror_is_tried_when_one_fails(tmp_path):
    file = remote(tmp_path / "net", (tmp_path / "nowhere").as_uri())
    assert fetch(file, tmp_path).read_bytes() == b"the real content"


def test_a_download_with_another_checksum_is_refused_and_removed(tmp_path):
    file = remote(tmp_path / "net", content=b"<html>please log in</html>")
    (tmp_path / "cache").mkdir()
    with pytest.raises(ValueError, match=f"expected 16 bytes with sha256 {file.sha256}, got 26"):
        fetch(file, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cached_file_that_was_altered_is_fetched_again(tmp_path):
    file = remote(tmp_path / "net")
    (tmp_path / "file.bin").write_bytes(b"altered")
    assert fetch(file, tmp_path).read_bytes() == b"the real content"


def test_an_altered_cached_file_is_gone_even_when_it_cannot_be_fetched_again(tmp_path):
    file = remote(tmp_path / "net")
    (tmp_path / "net" / "file.bin").unlink()
    (tmp_path / "file.bin").write_bytes(b"altered")
    with pytest.raises(ValueError, match="could not be downloaded"):
        fetch(file, tmp_path)
    assert not (tmp_path / "file.bin").exists()


def test_a_file_of_the_users_folder_is_believed_by_its_checksum_looked_at_once(tmp_path, monkeypatch):
    file = remote(tmp_path / "mine")
    good = find([file], source=tmp_path / "mine")
    assert good["file.bin"].read_bytes() == b"the real content"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file.bin").write_bytes(b"anything")
    with pytest.raises(ValueError, match=f"other/file.bin: expected 16 bytes with sha256 {file.sha256}, got 8 with .*get it again"):
        find([file], source=tmp_path / "other")
    monkeypatch.setattr(_download, "_sha256", None)  # would fail
    assert find([file], source=tmp_path / "mine") == good
    packed = file._replace(name="file.bin.gz")  # unpacked, it has no checksum that is known
    assert find([packed], source=tmp_path / "other")["file.bin.gz"] == tmp_path / "other" / "file.bin"
