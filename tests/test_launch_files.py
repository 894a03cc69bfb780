"""The launch files ask for what they are named after and for nothing that belongs to the run, and the scripts pass everything on."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from meme_dist.train.engines.strategy import Strategy, requested
from tests.launching import environment_of

LAUNCH = Path(__file__).resolve().parents[1] / "launch"
ENGINES = {
    "cpu2": Strategy("ddp"),
    "ddp": Strategy("ddp"),
    "fsdp2": Strategy("fsdp2"),
    "zero1": Strategy("zero1"),
    "zero2": Strategy("zero2"),
    "zero3": Strategy("zero3"),
    "zero3_offload": Strategy("zero3", offload_optimizer=True, offload_parameters=True),
}
SCRIPTS = ["elastic.sh", "node.sh", "slurm.sbatch", "train.sh"]
RUNS_OWN = ("batch", "accumulation", "clipping", "precision", "learning_rate")

# In place of Python: says how many GPUs there are, and otherwise what it was asked to run, in which environment; ends with STATUS.
PYTHON = """#!/usr/bin/env bash
if [[ $1 == -c ]]; then echo "$GPUS"; exit; fi
printf '%s\\n' "$@"
env | grep -E '^(ACCELERATE|DS_|OMP|TORCH|PET|FSDP|MASTER)' | sort
if [[ -n ${WAIT:-} ]]; then trap 'echo told; exit 75' TERM; touch "$WAIT"; while true; do sleep 0.05; done; fi
exit "${STATUS:-0}"
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then printf 'first\\nsecond\\n'; else echo "scontrol $*"; fi
"""


@pytest.fixture
def machine(tmp_path: Path) -> dict[str, str]:
    """An environment in which Python and Slurm's commands are fakes."""
    for name, text in (("python3", PYTHON), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE", "OMP", "SLURM", "MASTER", "PYTHON"))}
    return {**kept, "PATH": f"{tmp_path}:{os.environ['PATH']}", "GPUS": "0"}


def run(script: str, *words: str, **environment: str) -> tuple[int, list[str]]:
    """Exit status and the lines said."""
    done = subprocess.run(["bash", str(LAUNCH / script), *words], capture_output=True, text=True, timeout=30, env=environment)
    return done.returncode, (done.stdout + done.stderr).splitlines()


# ---- configurations of Accelerate -------------------------------------------------------------------------------------------------


def test_every_engine_has_a_file_and_every_file_an_engine() -> None:
    assert sorted(path.stem for path in (LAUNCH / "accelerate").iterdir()) == sorted(ENGINES)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_file_asks_for_the_engine_that_it_is_named_after(engine: str) -> None:
    environment = environment_of(engine)
    assert requested(environment) == ENGINES[engine]
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"


@pytest.mark.parametrize("engine", ENGINES)
def test_a_file_says_nothing_that_the_run_decides(engine: str) -> None:
    settings = yaml.safe_load((LAUNCH / "accelerate" / f"{engine}.yaml").read_text())
    assert settings.pop("mixed_precision") == "no"
    names = [*settings, *settings.get("deepspeed_config", {}), *settings.get("fsdp_config", {})]
    assert [name for name in names if any(part in name for part in RUNS_OWN)] == []
    assert settings["num_processes"] == 2 and settings["num_machines"] == 1


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2"])
def test_processes_are_as_many_as_the_command_line_says(engine: str) -> None:
    parser = launch_command_parser()
    words = ["--config_file", str(LAUNCH / "accelerate" / f"{engine}.yaml"), "--num_processes", "8", "-m", "meme_dist"]
    parsed, _, _ = _validate_launch_command(parser.parse_args(words))
    assert parsed.num_processes == 8


# ---- scripts ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_sound_bash_and_explains_itself(script: str, machine: dict[str, str]) -> None:
    assert subprocess.run(["bash", "-n", str(LAUNCH / script)], capture_output=True).returncode == 0
    assert os.access(LAUNCH / script, os.X_OK)
    assert "set -euo pipefail" in (LAUNCH / script).read_text()
    if script != "node.sh":
        status, lines = run(script, **machine)
        assert status == 2 and any("NAME" in line for line in lines), lines


def test_train_starts_a_supervised_launch_on_all_gpus_and_passes_every_word_on(machine: dict[str, str]) -> None:
    status, lines = run(
        "train.sh", "zero2", "digits", "--run", "a name", **(machine | {"GPUS": "4", "STATUS": "75", "SUPERVISE": "--again --budget 1"})
    )
    assert status == 75
    assert lines[:6] == ["-m", "meme_dist.supervise", "--again", "--budget", "1", "--"]
    assert lines[lines.index("--config_file") + 1] == str(LAUNCH / "accelerate" / "zero2.yaml")
    assert lines[lines.index("--num_processes") + 1] == "4"
    train = lines.index("train")
    assert lines[train - 2 : train + 4] == ["-m", "meme_dist", "train", "digits", "--run", "a name"]
    assert not any(line.startswith(("ACCELERATE_USE_CPU", "DS_ACCELERATOR")) for line in lines)


def test_train_on_a_machine_without_gpus_wants_to_know_how_many_processes(machine: dict[str, str]) -> None:
    status, lines = run("train.sh", "ddp", "digits", "--run", "a", **machine)
    assert status == 2 and "PROCESSES=2" in lines[-1]
    status, lines = run("train.sh", "ddp", "digits", "--run", "a", **(machine | {"PROCESSES": "2", "OMP_NUM_THREADS": "1"}))
    assert status == 0 and lines[lines.index("--num_processes") + 1] == "2"
    assert {"ACCELERATE_USE_CPU=true", "DS_ACCELERATOR=cpu", "OMP_NUM_THREADS=1"} <= set(lines)


@pytest.mark.parametrize("script", ["train.sh", "elastic.sh"])
def test_an_unknown_engine_is_answered_with_the_known_ones(script: str, machine: dict[str, str]) -> None:
    status, lines = run(script, "zero4", "digits", **(machine | {"GPUS": "1"}))
    assert status == 2 and "zero4" in lines[-1] and all(name in lines[-1] for name in ENGINES if name != "cpu2")


def test_a_node_joins_the_launch_of_all_machines(machine: dict[str, str]) -> None:
    slurm = {"SLURM_NNODES": "4", "SLURM_NODEID": "3", "SLURM_CPUS_PER_TASK": "32", "MASTER_ADDR": "first", "MASTER_PORT": "20001"}
    status, lines = run("node.sh", "fsdp2", "digits", "--run", "a", **(machine | slurm | {"GPUS": "8"}))
    options = {
        flag: lines[lines.index(flag) + 1]
        for flag in ("--num_machines", "--machine_rank", "--num_processes", "--main_process_ip", "--main_process_port")
    }
    assert status == 0 and list(options.values()) == ["4", "3", "32", "first", "20001"]
    assert "OMP_NUM_THREADS=4" in lines and lines[lines.index("train") :][:4] == ["train", "digits", "--run", "a"]


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (75, True), (2, False), (1, False)])
def test_slurm_requeues_a_run_that_was_saved_and_no_other(machine: dict[str, str], status: int, requeued: bool) -> None:
    slurm = {"SLURM_JOB_NODELIST": "first,second", "SLURM_JOB_ID": "12345", "STATUS": str(status)}
    came, lines = run("slurm.sbatch", "ddp", "digits", "--run", "a", **(machine | slurm))
    assert came == status and ("scontrol requeue 12345" in lines) == requeued
    assert lines[:4] == ["-m", "meme_dist.supervise", "--", "srun"] and {"MASTER_ADDR=first", "MASTER_PORT=32345"} <= set(lines)
    assert lines[lines.index("launch/node.sh") :][:5] == ["launch/node.sh", "ddp", "digits", "--run", "a"]


def test_a_job_that_slurm_starts_again_goes_on_with_its_run(machine: dict[str, str]) -> None:
    slurm = {"SLURM_JOB_NODELIST": "first", "SLURM_JOB_ID": "1", "SLURM_RESTART_COUNT": "1"}
    assert run("slurm.sbatch", "ddp", "digits", "--run", "a", **(machine | slurm))[1][2:4] == ["--again", "--"]


def test_slurms_sigterm_reaches_the_supervisor_and_the_job_waits_for_it(machine: dict[str, str], tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    slurm = {"SLURM_JOB_NODELIST": "first", "SLURM_JOB_ID": "7", "WAIT": str(ready)}
    words = ["bash", str(LAUNCH / "slurm.sbatch"), "ddp", "digits", "--run", "a"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=machine | slurm) as job:
        deadline = time.monotonic() + 20
        while not ready.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.2)  # the shell is at its `wait`
        job.send_signal(signal.SIGTERM)
        said, _ = job.communicate(timeout=20)
    assert job.returncode == 75 and "told\n" in said and "scontrol requeue 7\n" in said


def test_the_job_asks_for_a_signal_before_its_end_and_may_be_requeued() -> None:
    directives = [line for line in (LAUNCH / "slurm.sbatch").read_text().splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --signal=USR1@300" in directives and "#SBATCH --requeue" in directives and "#SBATCH --open-mode=append" in directives
    assert "#SBATCH --ntasks-per-node=1" in directives  # one launcher a machine


@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine != "cpu2"])
def test_the_elastic_form_asks_for_the_same_engine_as_the_file(engine: str, machine: dict[str, str]) -> None:
    status, lines = run("elastic.sh", engine, "runs/a", "--workers", "2", **(machine | {"GPUS": "2", "MACHINES": "1:4"}))
    assert (
        status == 0 and requested(dict(line.split("=", 1) for line in lines if line.startswith(("ACCELERATE", "FSDP")))) == ENGINES[engine]
    )
    assert lines[lines.index("--nnodes") + 1] == "1:4" and "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in lines
    assert lines[lines.index("train") :][:5] == ["train", "--resume", "runs/a", "--workers", "2"]
    assert lines[lines.index("meme_dist") - 2 :][:2] == ["-m", "--"]  # torchrun would take --run for its own --run-path


def test_the_readme_speaks_of_every_file_and_every_file_that_it_speaks_of_exists() -> None:
    text = (LAUNCH / "README.md").read_text()
    for name in [*SCRIPTS, *(f"{engine}.yaml" for engine in ENGINES), "gpu.py"]:
        assert name.removesuffix(".yaml") in text, name
