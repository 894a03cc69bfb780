"""Nothing is written through an address: a folder `s3:` on the node would look like success, and go with the node."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from meme_dist.cli import main
from meme_dist.data.sets.digits import digits
from meme_dist.data.sets.linear_gaussian import linear_gaussian
from meme_dist.data.shards import write_shards, write_shards_together
from meme_dist.data.source import SCHEMES, check_local
from meme_dist.draws import save_draws
from meme_dist.impute import impute, impute_h5mu
from meme_dist.ranks import ALONE
from meme_dist.recipes.named import recipe_of
from meme_dist.run import Ranks, Where, prepare, run_folder, shards_of
from meme_dist.stored import Stored
from tests.trainings import SHARDED, build

NOTHING: Any = None
ONE = Ranks(0, 0, 1)
QUIET = Console(quiet=True)


def into(function: Callable[..., Any]) -> Callable[[Any, Path], None]:
    """`impute` or `impute_h5mu` of a tiny model's rows."""

    def write(place: Any, shards: Path) -> None:
        function(build(SHARDED), linear_gaussian(rows=4).fields, shards, place)

    return write


def together(place: Any, shards: Path) -> None:
    made = digits()
    write_shards_together(made, place, part=lambda split, rows: made.rows(split), rows={"train": 4}, rows_per_shard=4, processes=ALONE)


WRITERS: dict[str, Callable[[Any, Path], Any]] = {
    "write_shards": lambda place, shards: write_shards(digits(), place),
    "write_shards_together": together,
    "impute": into(impute),
    "impute_h5mu": into(impute_h5mu),
    "save_draws": lambda place, shards: save_draws(Stored(NOTHING, NOTHING, NOTHING, NOTHING, 0), place, num=1, seed=0),
    "data": lambda place, shards: shards_of(recipe_of("digits")(), place, ONE, console=QUIET),
    "train --data": lambda place, shards: prepare("auto", {"shards": str(shards)}, Where(run="r", data=place), ONE, console=QUIET),
    "train --run": lambda place, shards: prepare("digits", {}, Where(run=str(place)), ONE, console=QUIET),
    "run": lambda place, shards: run_folder(str(place)),
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("linear") / "shards"
    write_shards(linear_gaussian(rows=4), folder)
    return folder


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize("writer", WRITERS)
def test_no_writer_takes_an_address_and_nothing_is_made(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str, kind: type
) -> None:
    monkeypatch.chdir(tmp_path)
    for scheme in (*SCHEMES, "ftp", "simplecache::s3"):
        with pytest.raises(ValueError, match="expected a local folder or file to write to, got an address; write it on this machine"):
            WRITERS[writer](kind(f"{scheme}://bucket/set.h5mu"), shards)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ["shards", "write", "digits", "--out", "s3://bucket/set"],
        ["shards", "convert", "cells.h5mu", "--out", "s3://bucket/set"],
        ["train", "digits", "--data", "s3://bucket/data", "--run", "r"],
        ["train", "digits", "--run", "s3://bucket/run"],
        ["doctor", "--run", "s3://bucket/runs"],
        ["compare", "digits", "--models", "meme", "--out", "s3://bucket/compared"],
        ["compare", "digits", "--models", "meme", "--out", "compared", "--data", "s3://bucket/data"],
        ["export", "r", "--out", "s3://bucket/model.safetensors"],
    ],
    ids=" ".join,
)
def test_the_commands_say_what_to_do_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert "copy it there with the store's own tool" in " ".join("".join(capsys.readouterr()).split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["set", "./set", "/data/set", "a:b", "../x", "12:30/set", "runs/s3:/x"])
def test_a_path_of_this_machine_is_no_address(place: str) -> None:
    check_local(place)
    check_local(Path(place))
