"""What `make gpu` runs: GPU tests, benchmarks and a short training, with this interpreter's own packages and nothing installed.

The most valuable parts come first, each under its own time limit, one after another and nothing beside them; the whole ends within nine
minutes. A part that this machine or this tree does not have is skipped with a line that says so; a part that fails or does not end in time
makes the exit status 1. Results go to benchmarks/results and, where the variable OUT names a folder, into OUT/results.tar.gz too.
"""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TRAINING = ["accelerate", "matplotlib", "rich", "safetensors", "sklearn", "tyro", "webdataset"]
TESTING = ["jaxtyping", "pytest", "scipy"]
# Seconds of each part: their sum stays under the nine minutes. On an H100 beside 16 cores, with nothing compiled yet, the laws took 49 and
# three quarters of the kernels' benchmark went by in comparing every op with float64 before the first figure.
LIMITS = {"laws": 60, "kernel tests": 100, "step": 50, "kernels": 140, "peers": 60, "training": 30, "engines": 60, "stream": 20}
STOPPING = 10  # more seconds for a part that was told to stop: pytest still says what failed


def missing(*modules: str) -> list[str]:
    """Those of the modules that this interpreter does not have."""
    return [name for name in modules if importlib.util.find_spec(name) is None]


def run(title: str, *command: str, limit: float | None = None, more: dict[str, str] | None = None) -> bool:
    """Run one part in the repository's root, interrupt it when its time is up, and say how it ended."""
    print(f"== {title}: {' '.join(command)}", flush=True)
    start, limit = time.monotonic(), LIMITS[title] if limit is None else limit
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env={**os.environ, **(more or {})})
    late = False
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        late = True
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOPPING)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    ended = "passed" if process.returncode == 0 else f"FAILED with status {process.returncode}"
    ended = f"STOPPED, not ended within {limit:.0f} s" if late else ended
    print(f"== {title}: {ended} in {time.monotonic() - start:.0f} s", flush=True)
    carry_out()
    return not late and process.returncode == 0


def skip(title: str, why: str) -> bool:
    """Say that a part is left out, and why; not a failure."""
    print(f"== {title}: skipped, {why}", flush=True)
    return True


def carry_out() -> None:
    """Leave all results so far in the folder that OUT names, where it does."""
    results = ROOT / "benchmarks" / "results"
    if os.environ.get("OUT") and results.is_dir():
        shutil.make_archive(str(Path(os.environ["OUT"]) / "results"), "gztar", results)


def tests(title: str, names: list[str], *, needs: list[str] = TESTING) -> bool:
    """Tests that run on the GPU, or that prove the mathematics on this interpreter's versions."""
    if absent := missing(*needs):
        return skip(title, f"this interpreter has no {', '.join(absent)}")
    if not (found := [name for name in names if (ROOT / name).exists()]):
        return skip(title, f"the tree has no {', '.join(names)}")
    return run(title, *pytest_on(found))


def pytest_on(names: list[str]) -> list[str]:
    """The words after the interpreter: several tests at a time where pytest can, each worker compiling kernels on a core of its own."""
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]
    words += ["-W", "default"]  # other versions than the constraints' warn of other things: here only what is wrong fails
    words += [f"--ignore=tests/kernels/test_{name}.py" for name in ("resources", "sanitizer")]  # they need no GPU
    if not missing("xdist"):
        words += ["-n", str(min(os.cpu_count() or 8, 16)), "--dist", "worksteal"]
    return [*words, *names]


def benchmark(title: str, keywords: str = "", *, needs: list[str] | None = None) -> bool:
    """One benchmark; the module itself, since the command line needs tyro."""
    if absent := missing(*(needs or [])):
        return skip(title, f"this interpreter has no {', '.join(absent)}")
    if not (ROOT / "benchmarks" / f"{title}.py").is_file():
        return skip(title, f"the tree has no benchmarks/{title}.py")
    return run(title, "-c", f"from benchmarks.{title} import main; main({keywords})")


def training() -> bool:
    """A short run of the default recipe, from shards to the coherence table."""
    if absent := missing(*TRAINING):
        return skip("training", f"this interpreter has no {', '.join(absent)}")
    with tempfile.TemporaryDirectory() as folder:
        where = ["--run", f"{folder}/run", "--data", f"{folder}/data"]
        return run("training", "-m", "meme_dist", "train", "digits", "--missing", "0.3", "--steps", "300", *where)


def engines() -> bool:
    """A few steps under each sharding engine on the one GPU: as a launch file would ask for it."""
    if absent := missing(*TRAINING):
        return skip("engines", f"this interpreter has no {', '.join(absent)}")
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
    asked = {"ddp": alone, "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}}
    if not missing("deepspeed"):
        zero = {"ACCELERATE_USE_DEEPSPEED": "true"}
        asked |= {f"zero{stage}": {**zero, "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)} for stage in (2, 3)}
    good = True
    for name, environment in asked.items():
        with tempfile.TemporaryDirectory() as folder:
            where = ["--run", f"{folder}/{name}", "--data", f"{folder}/data", "--no-evaluate"]
            words = ["-m", "meme_dist", "train", "digits", "--steps", "50", *where]
            good &= run("engines", *words, limit=LIMITS["engines"] / len(asked), more=environment)
    return good


def main() -> int:
    """Run all parts; 0 if none failed."""
    import torch

    own = [str(ROOT), str(ROOT / "kernels")]  # before whatever packages the caller brings by this variable
    os.environ["PYTHONPATH"] = os.pathsep.join([*own, *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ["PYTHONUNBUFFERED"] = "1"
    if not torch.cuda.is_available():
        skip("everything", f"torch {torch.__version__} of {sys.executable} sees no CUDA device")
        return 0
    print(f"== {torch.cuda.get_device_name(0)}, torch {torch.__version__}, Python {sys.version.split()[0]}", flush=True)
    # Nothing is begun some time before the limit, so that what runs then ends and the table and the plots are written.
    kernels = f"sizes=('paper', 'large', 'small', 'sweep'), limit={LIMITS['kernels'] - 40}"
    parts = [
        tests("laws", ["tests/test_gpu.py"], needs=[*TESTING, *TRAINING]),
        tests("kernel tests", ["tests/kernels"]),
        benchmark("step", "ranks=(1,)", needs=["jaxtyping", *TRAINING]),
        benchmark("kernels", kernels),
        benchmark("peers", "models=('mmvae', 'mopoe', 'meme'), missing=(0.0,), seconds=2, device='cuda'", needs=["jaxtyping", *TRAINING]),
        training(),
        engines(),
        benchmark("stream", needs=["PIL", "jaxtyping", "webdataset", "yaml"]),
    ]
    return 0 if all(parts) else 1


if __name__ == "__main__":
    sys.exit(main())
