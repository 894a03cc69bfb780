"""What `make gpu` runs: GPU tests, benchmarks and a short training, with this interpreter's own packages and nothing installed.

Each part that this machine or this tree does not have is skipped with a line that says so; a part that fails makes the exit status 1.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TRAINING = ["accelerate", "matplotlib", "rich", "safetensors", "sklearn", "tyro", "webdataset"]
TESTS = ["tests/gpu", "tests/kernels", "tests/objectives", "tests/test_distributions.py", "tests/test_noise.py"]


def missing(*modules: str) -> list[str]:
    """Those of the modules that this interpreter does not have."""
    return [name for name in modules if importlib.util.find_spec(name) is None]


def run(title: str, *command: str) -> bool:
    """Run one part in the repository's root and say how it ended."""
    print(f"== {title}: {' '.join(command)}", flush=True)
    start = time.monotonic()
    status = subprocess.run([sys.executable, *command], cwd=ROOT).returncode
    print(f"== {title}: {'passed' if status == 0 else f'FAILED with status {status}'} in {time.monotonic() - start:.0f} s", flush=True)
    return status == 0


def skip(title: str, why: str) -> bool:
    """Say that a part is left out, and why; not a failure."""
    print(f"== {title}: skipped, {why}", flush=True)
    return True


def tests() -> bool:
    """The GPU tests, and the tests of the mathematics on this interpreter's versions."""
    if absent := missing("pytest", "jaxtyping", "hypothesis"):
        return skip("tests", f"this interpreter has no {', '.join(absent)}")
    found = [name for name in TESTS if (ROOT / name).exists()]
    return run("tests", "-m", "pytest", "-q", "-p", "no:cacheprovider", *found)


def benchmarks() -> bool:
    """One training step of each estimator beside the released one; the module itself, since its command line needs tyro."""
    if not (ROOT / "benchmarks" / "step.py").is_file():
        return skip("benchmarks", "the tree has no benchmarks/step.py")
    return run("benchmarks", "-c", "from benchmarks.step import main; main()")


def training() -> bool:
    """A short run of the default recipe, from shards to the coherence table."""
    if absent := missing(*TRAINING):
        return skip("training", f"this interpreter has no {', '.join(absent)}")
    with tempfile.TemporaryDirectory() as folder:
        where = ["--run", f"{folder}/run", "--data", f"{folder}/data"]
        return run("training", "-m", "meme_dist", "train", "digits", "--missing", "0.3", "--steps", "300", *where)


def main() -> int:
    """Run all parts; 0 if none failed."""
    import torch

    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    if not torch.cuda.is_available():
        skip("everything", f"torch {torch.__version__} of {sys.executable} sees no CUDA device")
        return 0
    print(f"== {torch.cuda.get_device_name(0)}, torch {torch.__version__}, Python {sys.version.split()[0]}", flush=True)
    return 0 if all([tests(), benchmarks(), training()]) else 1


if __name__ == "__main__":
    sys.exit(main())
