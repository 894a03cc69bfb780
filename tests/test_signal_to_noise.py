"""Laws of the gradient's signal-to-noise ratio, and of what a training's cost counts."""

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from meme_dist import cost
from meme_dist.cost import Meter
from meme_dist.signal_to_noise import WHOLE, ratios, signal_to_noise
from tests.trainings import Rows, build, mixed


def noisy(signal: float, draws: int, size: int = 400) -> Iterator[dict[str, torch.Tensor]]:
    """Gradients whose every coordinate is `signal` plus unit noise, in one network, and in another twice as noisy."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(draws):
        yield {"one": signal + torch.randn(size, generator=generator), "two": signal + 2 * torch.randn(size, generator=generator)}


def test_the_ratio_is_mean_over_spread_and_pure_noise_has_none() -> None:
    found = ratios(noisy(0.5, 200))
    assert found["one"].pooled == pytest.approx(0.5, rel=0.03) and found["two"].pooled == pytest.approx(0.25, rel=0.06)
    assert found[WHOLE].pooled == pytest.approx(0.5 / math.sqrt((1 + 4) / 2), rel=0.04)
    nothing = ratios(noisy(0.0, 200))["one"]
    assert nothing.pooled < 0.03 and nothing.coordinates == pytest.approx(nothing.floor, rel=0.1)
    assert ratios(noisy(0.5, 20))["one"].pooled == pytest.approx(0.5, rel=0.1)  # few draws leave no bias
    with pytest.raises(ValueError, match="at least 2 draws, got 1"):
        ratios(noisy(0.5, 1))


def test_the_ratio_is_numpys_of_all_draws_at_once() -> None:
    drawn = np.stack([gradient["one"].double().numpy() for gradient in noisy(0.3, 30)])
    found = ratios(noisy(0.3, 30))["one"]
    assert found.coordinates == pytest.approx(np.mean(np.abs(drawn.mean(0)) / drawn.std(0, ddof=1)), rel=1e-9)


def test_a_gradient_of_meme_is_measured_for_every_k_with_and_without_the_weights_gradient() -> None:
    objective = build(samples=1, targets=1)
    batch = next(iter(Rows("ab", mixed("ab", 8), batch_size=8)))[0]
    before = (objective.samples, objective.stop_gradient, objective.estimator, objective.targets)
    found = signal_to_noise(objective, batch, draws=6, samples=(1, 4))
    assert (objective.samples, objective.stop_gradient, objective.estimator, objective.targets) == before
    assert all(parameter.grad is None for parameter in objective.parameters())
    networks = {entry["network"] for entry in found}
    assert networks == {WHOLE, "a encoder", "a decoder", "a pseudo", "b encoder", "b decoder", "b pseudo"}
    assert len(found) == 2 * 2 * len(networks)
    one = {
        stop: next(e for e in found if e["samples"] == 1 and e["network"] == WHOLE and e["stop_gradient"] == stop) for stop in (True, False)
    }
    assert one[True]["pooled"] == pytest.approx(one[False]["pooled"], rel=1e-4)  # the weight of a single sample is 1, and has no gradient
    four = {
        stop: next(e for e in found if e["samples"] == 4 and e["network"] == WHOLE and e["stop_gradient"] == stop) for stop in (True, False)
    }
    assert four[True]["pooled"] != pytest.approx(four[False]["pooled"], rel=1e-3)
    assert signal_to_noise(objective, batch, draws=6, samples=(1, 4)) == found


def test_a_network_that_learns_nothing_has_no_ratio_and_the_file_holds_numbers_alone() -> None:
    objective = build(samples=2)
    objective.modality("a").encoder.requires_grad_(False)
    for parameter in objective.modality("a").decoder.parameters():  # its gradient is 0 in all draws
        parameter.register_hook(torch.zeros_like)
    batch = next(iter(Rows("ab", mixed("ab", 8), batch_size=8)))[0]
    found = signal_to_noise(objective, batch, draws=3, samples=(2,))
    networks = {entry["network"] for entry in found}
    assert networks == {WHOLE, "a pseudo", "b encoder", "b decoder", "b pseudo"}
    json.dumps(found, allow_nan=False)


def test_a_training_counts_its_own_time_and_the_memory_since_it_began(tmp_path: Path) -> None:
    before = torch.ones(40_000_000)  # 160 MB that are gone before the training
    del before
    began = time.perf_counter()
    meter = Meter()
    with meter.paused():
        time.sleep(0.2)
    held = torch.ones(10_000_000)
    meter.write(tmp_path, step=3, parameters=7)
    took = time.perf_counter() - began
    meter.write(tmp_path, step=4, parameters=7)
    first, second = (json.loads(line) for line in (tmp_path / cost.FILE).read_text().splitlines())
    assert first["step"] == 3 and first["parameters"] == 7 and first["cpu_seconds"] >= 0
    assert 0 < first["seconds"] <= took - 0.2
    assert second["seconds"] >= first["seconds"] and first["device_peak_bytes"] is None or torch.cuda.is_available()
    resident = next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    assert held.nbytes < resident <= first["peak_bytes"] + 2**20 < resident + 100e6
