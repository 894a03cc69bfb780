"""Shards belong to the content of the files that they were made from: never to a path, which may mean other files elsewhere or later."""

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from meme_dist.data.index import Manifest
from meme_dist.data.sets.asia import VARIABLES, asia
from meme_dist.data.shards import Dataset, Row, write_shards
from meme_dist.recipes.keywords import unflatten
from meme_dist.recipes.named import recipe_of
from meme_dist.run import Prepared, Ranks, Where, prepare, shards_of
from meme_dist.stored import arguments_of
from tests.data import small
from tests.data.test_every_set import FILES, SETS
from tests.data.tiny import dataset, datum

ONE = Ranks(0, 0, 1)
QUIET = Console(file=io.StringIO())


def shards(source: Path, data: Path) -> Manifest:
    return shards_of(recipe_of("tcga")(source=source), data, ONE, console=QUIET)


def other(path: Path) -> None:
    """The same arrays, of which the first is turned round: a file of the same size that gives other rows."""
    with np.load(path) as file:
        arrays = dict(file)
    first = next(iter(arrays))
    np.savez(path, **{**arrays, first: arrays[first][::-1]})


@pytest.mark.parametrize("place", [lambda folder: Path("raw"), lambda folder: folder / "raw"], ids=["relative", "absolute"])
def test_files_of_another_content_never_give_the_same_shards_and_the_same_content_always_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Callable[[Path], Path]
) -> None:
    for name in ("a", "b", "copy"):
        (tmp_path / name / "raw").mkdir(parents=True)
        file = small.tcga_file(tmp_path / name / "raw") / FILES["tcga"][0]
        if name == "b":
            other(file)
    found = {}
    for name in ("a", "b", "copy"):
        monkeypatch.chdir(tmp_path / name)
        found[name] = shards(place(tmp_path / name), tmp_path / "data")
    assert found["a"].folder != found["b"].folder and found["a"].fingerprint != found["b"].fingerprint
    assert found["a"].folder == found["copy"].folder
    assert shards(place(tmp_path / "copy"), tmp_path / "data").folder == found["a"].folder


def test_a_replaced_file_gives_new_shards_and_one_that_is_put_back_the_old_ones(tmp_path: Path) -> None:
    source = small.tcga_file(tmp_path)
    file = source / FILES["tcga"][0]
    first, kept = shards(source, tmp_path / "data"), shutil.copy2(file, tmp_path / "kept")
    other(file)
    assert shards(source, tmp_path / "data").fingerprint != first.fingerprint
    shutil.copy2(kept, file)
    assert shards(source, tmp_path / "data").folder == first.folder


@pytest.mark.parametrize(("name", "file"), [(name, file) for name, files in FILES.items() for file in files])
def test_every_file_of_every_set_is_part_of_what_the_set_is(tmp_path: Path, name: str, file: str) -> None:
    made = SETS[name](tmp_path)()
    before = made.sealed().source
    assert set(FILES[name]) <= set(before["sha256"])
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes() + b"0")
    after = made.sealed().source
    assert [entry for entry in before["sha256"] if before["sha256"][entry] != after["sha256"][entry]] == [file]
    (tmp_path / file).unlink()
    with pytest.raises(ValueError, match=f"missing {file}; name the folder that has them: --source FOLDER"):
        made.sealed()


def test_written_shards_are_not_taken_for_those_of_a_file_that_was_replaced(tmp_path: Path) -> None:
    file = tmp_path / "numbers"
    made = replace(dataset(lambda split: iter([datum(len(file.read_text()))])), files=lambda: [file])
    file.write_text("1")
    first = write_shards(made, tmp_path / "shards")
    assert write_shards(made, tmp_path / "shards") == first
    file.write_text("22")
    with pytest.raises(ValueError, match="it holds another data set .source.sha256.numbers: .* choose another folder or remove it"):
        write_shards(made, tmp_path / "shards")


def test_graphs_of_a_replaced_file_are_read_anew_in_the_same_process(tmp_path: Path) -> None:
    def write(sign: int) -> None:
        bic = sign * np.arange(1.0, 21.0)
        np.savez(tmp_path / "asia_bn_20000_regenerated.npz", adjacency=np.zeros((20, len(VARIABLES), len(VARIABLES)), int), bic=bic)

    def values(made: Dataset) -> list[Any]:
        return [small.array(row, "value").item() for row in made.rows("test") if isinstance(row, Row)]

    write(1)
    first = values(asia(source=tmp_path))
    write(-1)
    assert values(asia(source=tmp_path)) == [-value for value in first]


def test_a_run_is_resumed_on_its_own_shards_whatever_became_of_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one from before, the folder of whose shards has another name."""
    monkeypatch.chdir(tmp_path)
    source = small.tcga_file(tmp_path)
    file = source / FILES["tcga"][0]
    content = file.read_bytes()
    prepared = prepare("tcga", unflatten(recipe_of("tcga"), {"source": "."}), Where(run="r", data=Path("data")), ONE, console=QUIET)
    assert prepared.keywords["source"] == str(tmp_path)

    def resumed() -> Prepared:
        return prepare(*arguments_of(Path("runs/r")), Where(resume="r", data=Path("data")), ONE, console=QUIET)

    old = Path(prepared.manifest.folder).rename("data/tcga-01234567").absolute()
    Path("runs/r").mkdir(parents=True)
    run = {"recipe": "tcga", "keywords": prepared.keywords, "shards": str(old), "format": 1, "command": []}
    Path("runs/r/run.json").write_text(json.dumps(run))
    other(file)
    assert Path(resumed().manifest.folder) == old
    file.unlink()
    assert Path(resumed().manifest.folder) == old
    shutil.rmtree(old)
    with pytest.raises(ValueError, match=f"missing {file.name}; name the folder that has them: --source FOLDER"):
        resumed()
    file.write_bytes(content)
    assert resumed().manifest.fingerprint == prepared.manifest.fingerprint
