"""What every figure comes with: machine, versions, commit; and how a time is taken."""

import importlib.metadata
import json
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from meme_dist.record import commit, processor

RESULTS = Path(__file__).parent / "results"
CPU = torch.device("cpu")


def machine(device: torch.device, threads: int) -> dict[str, Any]:
    """Device, threads, versions and commit; of a GPU its driver and clocks too. The caller tells what it measured on: this process sees
    neither that it left a GPU alone, nor how many threads its children had."""
    head, changed, _ = commit().partition("+")
    here = {
        "kind": device.type,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": head[:12] + changed or "unknown",
    }
    return here | _accelerator() if device.type == "cuda" else here


def _accelerator() -> dict[str, Any]:
    """Versions that a GPU's figures depend on, and its clocks now, as far as the system tells them."""
    found: dict[str, Any] = {"cuda": torch.version.cuda or torch.version.hip}
    try:
        found["triton"] = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        found["triton"] = None
    fields = ("driver_version", "clocks.sm", "clocks.mem")
    try:
        query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
        told = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return found
    return found | dict(zip(("driver", "sm_clock", "memory_clock"), map(str.strip, told.split(",")), strict=False))


def keep(name: str, rows: Sequence[Mapping[str, Any]], *, device: torch.device, threads: int) -> Path:
    """Append the rows, each with the device and the threads that it was measured with, to results/NAME.jsonl."""
    path, here = RESULTS / f"{name}.jsonl", machine(device, threads)
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps({**row, **here, "date": time.strftime("%Y-%m-%d")}) + "\n" for row in rows)
    return path


def interleaved(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, float]]:
    """Median, p20 and p80 of wall time and median CPU time of each call, in ms; taken in turn, so that drift hits all alike."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            _wait()
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            _wait()
            times[name].append((1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)))
    return {name: _summary(np.array(pairs)) for name, pairs in times.items()}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _summary(pairs: np.ndarray) -> dict[str, float]:
    low, middle, high = np.percentile(pairs[:, 0], [20, 50, 80])
    return {"ms": round(middle, 2), "ms_p20": round(low, 2), "ms_p80": round(high, 2), "cpu_ms": round(float(np.median(pairs[:, 1])), 2)}
