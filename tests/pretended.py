"""Stands in for `python -m meme_dist train|evaluate` in tests of comparisons: the same files in the same places, in milliseconds.

Started as `python pretended.py -m meme_dist train RECIPE ... --run FOLDER`. What a run's keywords are it is told by `keywords.json` beside
the folder of runs; what it does by the environment: PRETEND_FAIL (runs whose name contains it fail), PRETEND_SLOW (seconds a step).
Every call is a line of `calls.txt` beside the folder of runs.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

STOPPED = 75


def main(words: list[str]) -> int:
    assert words[:2] == ["-m", "meme_dist"], words
    command, rest = words[2], words[3:]
    folder = Path(rest[0] if command == "evaluate" else rest[rest.index("--resume" if "--resume" in rest else "--run") + 1])
    home = folder.parents[1]
    judge = ["judge", Path(rest[-1]).name] if "--judge" in rest else []
    with open(home / "calls.txt", "a", encoding="utf-8") as file:
        file.write(" ".join([command, folder.name, *(flag for flag in ("pool", "split") if f"--{flag}" in rest), *judge]) + "\n")
    told = json.loads((home / "keywords.json").read_text(encoding="utf-8"))
    if os.environ.get("PRETEND_FAIL", "no run") in f"{command} {folder.name}":
        print("a line before\nValueError: out of luck", file=sys.stderr)
        return 1
    keywords = told["keywords"][folder.name]
    pool = f"pooled-{rest[rest.index('--pool') + 1]}" if "--pool" in rest else ""
    place = folder / pool / (f"on-{rest[rest.index('--split') + 1]}" if "--split" in rest else "")
    if command == "train" and not train(folder, keywords, told, resume="--resume" in rest):
        return STOPPED
    if command == "evaluate" or "--no-evaluate" not in rest:
        place.mkdir(parents=True, exist_ok=True)
        by = {"judge": rest[rest.index("--judge") + 1]} if judge else {}
        measure(place, keywords, better=0.05 if pool else 0.0, by=by)
        (place / "run.json").write_text((folder / "run.json").read_text())
    return 0


def train(folder: Path, keywords: dict, told: dict, *, resume: bool) -> bool:
    """Count to `steps`, remembering how far; False where SIGTERM came before."""
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    state = folder / "checkpoints" / "last" / "state.json"
    if not resume:
        state.parent.mkdir(parents=True)
        (folder / "run.json").write_text(
            json.dumps({"recipe": told["recipe"], "keywords": keywords, "shards": told["shards"], "command": [], "format": 1})
        )
    done = json.loads(state.read_text())["step"] if state.is_file() else 0
    for step in range(done + 1, keywords["steps"] + 1):
        time.sleep(float(os.environ.get("PRETEND_SLOW", "0")))
        part = state.with_suffix(".tmp")
        part.write_text(json.dumps({"step": step}))
        part.replace(state)
        with open(folder / "metrics.jsonl", "a", encoding="utf-8") as log:
            log.write(json.dumps({"step": step, "loss": 1.0, "rows_per_second": 100.0 * keywords["seed"] + step}) + "\n")
        if stop and step < keywords["steps"]:
            time.sleep(0.2)
            print(f"saved at step {step}", flush=True)
            return False
    return True


def measure(folder: Path, keywords: dict, *, better: float, by: dict) -> None:
    """Numbers that are a function of the keywords: better with more samples, different by seed, worse with missing entries."""
    value = better + 0.5 + 0.01 * keywords["samples"] + 0.03 * (keywords["seed"] * 7 % 5) - 0.2 * keywords["missing"]
    single = [
        {"sources": [s], "target": t, "value": value + k / 100, "low": 0.0, "high": 1.0, "count": 9}
        for k, (s, t) in enumerate(["ab", "ba"])
    ]
    likelihood = {"targets": ["a", "b"], "given": [], "samples": 1, "value": -100 * value, "low": None, "high": None, "count": 9}
    by_inputs = [
        {"inputs": n, "target": None, "pairs": 2, "value": value + n / 50, "low": 0.0, "high": 1.0, "count": 9, "ceiling": 0.9}
        for n in (1, 2)
    ]
    results = {"step": keywords["steps"], "cross_coherence": single, "log_likelihood": [likelihood], "coherence_by_inputs": by_inputs}
    (folder / "results.json").write_text(json.dumps(results | by))
    (folder / "report.md").write_text("measured\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
