"""The command line as a person meets it: what works, what a wrong input says, and that nothing is ever lost."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from meme_dist import refine_command
from meme_dist.cli import main
from meme_dist.data.fields import Field
from meme_dist.data.index import Manifest
from meme_dist.data.shards import Dataset, Row, write_shards
from meme_dist.data.stream import Evaluation
from meme_dist.doctor import examine
from meme_dist.train import checkpoint

ROOT = Path(__file__).resolve().parents[1]
FIELDS = {
    "scan": Field(kind="image", shape=(1, 4, 4), codec="png", likelihood="laplace"),
    "word": Field(kind="text", shape=(3,), codec="txt", likelihood="categorical", vocabulary=("<pad>", "<unk>", "<eos>", "a", "b")),
}
TINY = ["--samples", "2", "--pseudo-inputs", "4", "--latent-dim", "3", "--batch-size", "8", "--log-every", "2"]
QUIET = ["--schedule", "constant", "--no-evaluate"]
LINEAR = ["linear_gaussian", "--rows-in-all", "40", *TINY, "--latent-dim", "2"]


def rows(split: str) -> Iterator[Row]:
    """Bright scans are called b, dark ones a; every third row lacks its scan, every third its word."""
    for row in range(40 if split == "train" else 21):
        label = row % 2
        scan = torch.full((1, 4, 4), 40 + 150 * label + row, dtype=torch.uint8)
        data = {"scan": scan, "word": "ab"[label]}
        yield Row({name: x for name, x in data.items() if name != {1: "scan", 2: "word"}.get(row % 3)}, label)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with labelled shards, and a run of `auto` on them: 6 steps, evaluated."""
    folder = tmp_path_factory.mktemp("home")
    write_shards(Dataset("scans", FIELDS, rows, ("dark", "bright")), folder / "shards")
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert main(["train", "auto", "--shards", "shards", *TINY, "--steps", "6", "--evaluate-every", "3", "--run", "first"]) == 0
        yield folder
    finally:
        os.chdir(before)


@pytest.fixture(autouse=True)
def at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)


def digest(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def said(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    return " ".join((out + err).split())


# ---- what works -------------------------------------------------------------------------------------------------------------------


def test_the_test_rows_stay_untouched_until_the_end_where_there_is_a_validation_split(home: Path) -> None:
    def dark_only(split: str) -> Iterator[Row]:
        for row in rows(split):
            yield row if split != "validation" else Row({"scan": torch.full((1, 4, 4), 40, dtype=torch.uint8), "word": "a"}, 0)

    manifest = write_shards(Dataset("scans", FIELDS, dark_only, ("dark", "bright")), home / "three", splits=("train", "validation", "test"))
    for shard in manifest.shards("test"):
        manifest.path(shard).unlink()  # read on the way, they would be missed
    words = ["train", "auto", "--shards", "three", *TINY, "--steps", "4", "--evaluate-every", "2", "--run", "watched", "--no-evaluate"]
    assert main(words) == 0
    log = [json.loads(line) for line in (home / "runs" / "watched" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "held_out/loss" in line] == [2, 4]
    assert (home / "runs" / "watched" / "checkpoints" / "best").exists()


def test_a_run_leaves_record_log_checkpoints_results_figures_and_report(home: Path) -> None:
    run = home / "runs" / "first"
    record = json.loads((run / "run.json").read_text())
    assert record["recipe"] == "auto" and record["keywords"]["steps"] == 6 and record["keywords"]["samples"] == 2
    assert record["versions"]["torch"] == torch.__version__ and record["command"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines if "loss" in line} == {2, 4, 6}
    assert {line["step"] for line in lines if "held_out/loss" in line} == {3, 6}
    results = json.loads((run / "results.json").read_text())
    assert results["step"] == 6 and len(results["cross_coherence"]) == 2
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["best", "last"]
    shown = (run / "report.md").read_text()
    for name in ("cross_generation", "coherence", "loss", "latent_map", "relatedness"):
        assert (run / "figures" / f"{name}.png").stat().st_size > 1000
        assert f"figures/{name}.png" in shown


def test_evaluating_twice_gives_the_same_results(home: Path) -> None:
    first = json.loads((home / "runs/first/results.json").read_text())
    assert main(["evaluate", "first"]) == 0
    assert json.loads((home / "runs/first/results.json").read_text()) == first


def test_results_and_report_of_an_unusual_evaluation_say_what_is_unusual(home: Path) -> None:
    shutil.copytree("runs/first", "runs/asked")
    assert main(["evaluate", "asked", "--checkpoint", "best", "--judge", "first", "--pool", "mixture"]) == 0
    results = json.loads(Path("runs/asked/pooled-mixture/results.json").read_text())
    assert {name: results.get(name) for name in ("checkpoint", "pool", "prior", "judge")} == {
        **{"checkpoint": "best", "pool": "mixture", "prior": None, "judge": "first"}
    }
    assert "(checkpoint `best`, pool `mixture`, judge `first`)" in Path("runs/asked/pooled-mixture/report.md").read_text()


def test_whatever_changes_the_figures_has_a_file_of_its_own() -> None:
    usual = {"kernel": "hmc", "budget": 20, "leapfrogs": 5, "temper": {}, "rows": 256, "seed": 0}
    changed = [{}, {"kernel": "mala"}, {"budget": 21}, {"leapfrogs": 6}, {"temper": {"rows": 0.5}}, {"rows": 1000}, {"seed": 3}]
    names = [refine_command._file(usual | change, "last") for change in changed] + [refine_command._file(usual, "best")]
    assert len(set(names)) == len(names) and names[0] == "refined-hmc5-20.json" and names[5] == "refined-hmc5-20-rows1000.json"


def test_generated_rows_do_not_depend_on_how_many_there_are(home: Path) -> None:
    assert main(["generate", "first", "--num", "5", "--out", "five"]) == 0
    assert main(["generate", "first", "--num", "9", "--out", "nine"]) == 0
    five, nine = load_file("five/draws.safetensors"), load_file("nine/draws.safetensors")
    assert set(five) == set(FIELDS) and nine["scan"].shape == (9, 1, 4, 4)
    for name in five:
        torch.testing.assert_close(five[name], nine[name][:5], rtol=0, atol=1e-6)
    assert (home / "five/draws.png").stat().st_size > 1000


def test_imputation_fills_every_missing_entry_once_and_leaves_the_others_alone(home: Path) -> None:
    assert main(["impute", "first", "--shards", "shards", "--out", "whole"]) == 0
    before, after = Manifest.load("shards"), Manifest.load("whole")
    for split in ("train", "test"):
        assert before.num_rows(split) == after.num_rows(split)
        mask = before.index(split).observed
        assert not mask.all() and after.index(split).observed.all()
        assert [before.index(split).key(row) for row in range(len(mask))] == [after.index(split).key(row) for row in range(len(mask))]
        np.testing.assert_array_equal(before.index(split).label, after.index(split).label)
        old, new = (next(iter(Evaluation(folder, split, batch_size=len(mask)))) for folder in ("shards", "whole"))
        for column, name in enumerate(FIELDS):
            kept = torch.from_numpy(mask[:, column].copy())
            torch.testing.assert_close(new.dense(name)[kept], old.dense(name)[kept], rtol=0, atol=0)
    assert main(["shards", "check", "whole"]) == 0


def test_resuming_a_finished_run_changes_no_weight(home: Path) -> None:
    before = load_file("runs/first/checkpoints/last/model.safetensors")
    assert main(["train", "--resume", "first", "--no-evaluate"]) == 0
    after = load_file("runs/first/checkpoints/last/model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_interrupted_run_continues_to_the_same_weights(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """More steps of a constant schedule are the one thing that a resumed run may ask for."""
    assert main(["train", *LINEAR, *QUIET, "--steps", "6", "--run", "whole_way"]) == 0
    assert main(["train", *LINEAR, *QUIET, "--steps", "3", "--run", "half_way"]) == 0
    assert main(["train", "--resume", "half_way", "--steps", "6", "--no-evaluate"]) == 0
    one, two = (load_file(f"runs/{run}/checkpoints/last/model.safetensors") for run in ("whole_way", "half_way"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    before = digest(home / "runs" / "half_way" / "checkpoints")
    assert main(["train", "--resume", "half_way", "--steps", "4", "--no-evaluate"]) == 2  # and no less than it has
    assert "half_way: was trained for 6 steps, more than the 4 it is asked for; give --steps 6 or more" in said(capsys)
    assert digest(home / "runs" / "half_way" / "checkpoints") == before


def test_resuming_one_run_under_the_name_of_another_is_refused(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--resume", "first", "--run", "other", "--no-evaluate"]) == 2
    assert "--resume goes on in runs/first, got --run other with it" in said(capsys) and not Path("runs/other").exists()
    assert main(["train", "--resume", "first", "--run", "runs/first", "--no-evaluate"]) == 0


def test_a_new_run_takes_the_settings_of_an_old_one(home: Path) -> None:
    assert main(["train", "--like", "first", "--run", "second", "--seed", "3", "--steps", "2", "--no-evaluate"]) == 0
    first, second = (json.loads((home / "runs" / run / "run.json").read_text()) for run in ("first", "second"))
    changed = {name for name in first["keywords"] if first["keywords"][name] != second["keywords"][name]}
    assert changed == {"seed", "steps"} and first["recipe"] == second["recipe"]


def test_a_dry_run_prices_every_engine_and_trains_nothing(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(path.name for path in (home / "runs").iterdir())
    assert main(["train", *LINEAR, "--batch-size", "64", "--dry-run", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = {
        line.split()[0]: line.split()
        for line in lines
        if line.split()[:1] and line.split()[0] in ("ddp", "fsdp2", "zero1", "zero2", "zero3")
    }
    assert len(table) == 5 and table["ddp"][1:3] == table["zero1"][1:3] and table["ddp"][1] != table["zero3"][1]
    assert any("64 rows: 4 ranks x 1 x 16" in line for line in lines)
    assert sorted(path.name for path in (home / "runs").iterdir()) == before
    assert main(["train", *LINEAR, "--batch-size", "62", "--dry-run", "4"]) == 2


def test_shards_written_by_a_recipe_pass_the_check_and_a_flipped_byte_does_not(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shards", "write", "linear_gaussian", "--rows-in-all", "20", "--out", "written"]) == 0
    assert main(["shards", "check", "written"]) == 0
    tar = home / "written" / "train-000000.tar"
    content = bytearray(tar.read_bytes())
    content[700] ^= 1
    tar.write_bytes(content)
    assert main(["shards", "check", "written"]) == 1
    assert "train-000000.tar" in said(capsys)


def test_help_names_every_command_and_recipes_lists_every_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    from meme_dist.recipes import RECIPES

    for words in ([], ["--help"]):
        assert main(words) == 0
        shown = said(capsys)
        assert all(command in shown for command in ("train", "evaluate", "generate", "impute", "shards check", "recipes", "doctor"))
    assert main(["recipes"]) == 0
    shown = said(capsys)
    assert all(name in shown for name in RECIPES)


def test_the_doctor_finds_this_machine_fit_and_an_unwritable_folder_wrong(home: Path) -> None:
    assert [finding for finding in examine(home) if finding.status == "wrong"] == []
    assert main(["doctor"]) == 0
    file = home / "a_file"
    file.write_text("")
    findings = {finding.what: finding for finding in examine(Path("/proc/1/nowhere"))}
    assert findings["run folder"].status == "wrong" and "--run" in findings["run folder"].advice


# ---- what a wrong input says ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["trian"], ["unknown command 'trian'", "did you mean 'train'"]),
        (["train", "digit"], ["unknown recipe 'digit'", "did you mean 'digits'", "linear_gaussian"]),
        (["train", "--steps", "3"], ["which recipe"]),
        (["train", *LINEAR, "--missing", "0.9"], ["missing", "0.9"]),
        (["train", "auto", "--shards", "nowhere"], ["nowhere", "manifest.json"]),
        (["evaluate", "frist"], ["frist", "no run there", "first"]),
        (["generate", "first", "--num", "0"], ["num", "got 0"]),
        (["train", "--resume", "frist"], ["no run there"]),
        (["train", "digits", "--resume", "first"], ["recipe 'auto'", "not of 'digits'"]),
        (["shards", "wirte"], ["unknown action 'wirte'", "write"]),
        (["shards", "write", "auto", "--shards", "shards", "--out", "x"], ["nothing to write"]),
        (["shards", "check", "nowhere"], ["nowhere"]),
    ],
)
def test_a_wrong_input_is_named_with_what_to_do(words: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) in (1, 2)
    shown = said(capsys)
    assert [part for part in parts if part not in shown] == []


def test_a_setting_out_of_range_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", *LINEAR, "--steps", "0"])
    assert stopped.value.code == 2
    assert "steps: expected a number above 0, got 0" in said(capsys)


def test_a_misspelt_flag_is_refused_with_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", "linear_gaussian", "--latentdim", "3"])
    assert stopped.value.code == 2
    assert "--latent-dim" in said(capsys)
    assert not Path("runs").joinpath("linear_gaussian").exists()


def test_an_existing_run_folder_is_refused_and_stays_as_it_is(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = digest(home / "runs" / "first")
    assert main(["train", *LINEAR, "--run", "first"]) == 2
    shown = said(capsys)
    assert "exists already" in shown and "--resume" in shown and "--run NAME" in shown
    (home / "runs" / "mine").mkdir()
    (home / "runs" / "mine" / "thesis.txt").write_text("precious")
    assert main(["train", *LINEAR, "--run", "mine"]) == 2
    assert digest(home / "runs" / "first") == before and digest(home / "runs" / "mine") == {"thesis.txt": b"precious"}


def test_resuming_into_changed_keywords_names_each_and_changes_nothing(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = digest(home / "runs" / "first")
    assert main(["train", "auto", "--shards", "shards", "--resume", "first", "--samples", "5", "--learning-rate", "0.1"]) == 2
    shown = said(capsys)
    assert "--samples: 2 in the run, 5 now" in shown and "--learning-rate" in shown and "--like" in shown
    assert digest(home / "runs" / "first") == before


def test_a_run_older_than_a_keyword_had_its_default(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("runs/first", "runs/older")
    record = json.loads(Path("runs/older/run.json").read_text())
    assert record["keywords"].pop("shared") is True
    Path("runs/older/run.json").write_text(json.dumps(record))
    for path in Path("runs/older/checkpoints").glob("last*/state.json"):
        state = json.loads(path.read_text())
        assert state["settings"].pop("shared") is True and state.pop("digest")
        path.write_text(json.dumps({**state, "digest": checkpoint._digest_of(state)}))
    assert main(["train", "--resume", "older", "--no-shared", "--no-evaluate"]) == 2
    assert "--shared: True in the run, False now" in said(capsys)
    assert main(["train", "--resume", "older", "--no-evaluate"]) == 0


def test_a_checkpoint_of_another_model_is_refused(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("runs/first", "runs/mixed")
    record = json.loads(Path("runs/mixed/run.json").read_text())
    record["keywords"]["latent_dim"] = 5
    Path("runs/mixed/run.json").write_text(json.dumps(record))
    before = digest(home / "runs" / "mixed")
    for words in (["evaluate", "mixed"], ["train", "--resume", "mixed"]):
        assert main(words) == 2
        assert digest(home / "runs" / "mixed") == before
    shown = said(capsys)
    assert "another model" in shown and "latent_dim" in shown


def test_a_run_of_a_recipe_or_format_that_is_not_known_says_so(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads(Path("runs/first/run.json").read_text())
    for name, change, part in (
        ("old", {"recipe": "poly"}, "recipe 'poly'"),
        ("new", {"format": 9}, "format 9"),
        ("odd", {"colour": 1}, "not a record"),
    ):
        Path("runs", name).mkdir()
        Path("runs", name, "run.json").write_text(json.dumps(record | change))
        assert main(["evaluate", name]) == 2
        assert part in said(capsys)
    Path("runs/new/run.json").write_text('{"recipe": "au')
    assert main(["evaluate", "new"]) == 2
    assert "not a record" in said(capsys)


def test_imputing_shards_of_other_fields_names_the_difference(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = {**FIELDS, "word": Field(kind="text", shape=(4,), codec="txt", likelihood="categorical", vocabulary=FIELDS["word"].vocabulary)}
    write_shards(Dataset("other", other, rows, ("dark", "bright")), home / "other")
    assert main(["impute", "first", "--shards", "other", "--out", "filled"]) == 2
    assert "modality word: expected shape [3]" in said(capsys)
    assert not Path("filled").exists()


def test_without_a_network_the_download_says_where_to_put_the_files(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("network is unreachable")

    monkeypatch.setattr("meme_dist.data.sets._download.urlopen", offline)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    assert main(["train", "mnist_svhn", "--run", "offline"]) == 2
    shown = said(capsys)
    assert "network is unreachable" in shown and "--source FOLDER" in shown
    assert not Path("runs/offline").exists()


def test_missing_source_files_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "mnist_meterdigits", "--source", "nowhere", "--run", "sourceless"]) == 2
    assert "mnist.npz" in said(capsys)
    assert not Path("runs/sourceless").exists()


# ---- through a launcher -----------------------------------------------------------------------------------------------------------


@pytest.mark.launch
@pytest.mark.timeout(180)
def test_two_launched_processes_write_one_run_and_train_the_same_weights_as_one(home: Path) -> None:
    """Shards not yet written: one process writes, the other waits."""
    settings = [*LINEAR, "--steps", "4", "--seed", "5"]
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "meme_dist"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "PYTHONPATH": path, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *launch, "train", *settings, "--run", "pair", "--data", "pair_data"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(Path("runs/pair/run.json").read_text())["machine"]["processes"] == 2
    assert done.stdout.count("report.md") == 1 and len(list(Path("pair_data").glob("linear_gaussian-*"))) == 1
    assert main(["train", *settings, "--run", "single", "--no-evaluate"]) == 0
    for run in ("single", "pair"):
        assert main(["export", run, "--out", f"{run}.safetensors"]) == 0
    one, two = (load_file(f"{run}.safetensors") for run in ("single", "pair"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)
