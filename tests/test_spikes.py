"""The spike detector: no alarm without a jump, one with it, the same on every machine that sees the same losses."""

import json
import math

import numpy as np
import pytest

from meme_dist.train.spikes import SpikeDetector


def alarms(losses: np.ndarray, **settings: float) -> list[int]:
    detector = SpikeDetector(**settings)
    return [step for step, loss in enumerate(losses.tolist()) if detector.observe(loss)]


def noise(steps: int, *, kind: str = "normal", seed: int = 0) -> np.ndarray:
    """Stationary losses of mean 80 and standard deviation 2."""
    generator = np.random.default_rng(seed)
    draws = generator.normal(size=steps) if kind == "normal" else generator.laplace(size=steps) / math.sqrt(2)
    return 80 + 2 * draws


@pytest.mark.parametrize(("kind", "most"), [("normal", 0), ("laplace", 20)])
def test_false_alarms_on_stationary_noise_are_fewer_than_one_in_ten_thousand_steps(kind: str, most: int) -> None:
    """Over 200,000 steps. The normal's own share beyond 8 deviations is 6e-16, that of the double exponential 6e-6."""
    assert len(alarms(noise(200_000, kind=kind))) <= most


def test_a_threshold_of_three_deviations_gives_the_false_alarms_of_the_normal_tail() -> None:
    """The tail beyond 3 deviations holds 1.35e-3; the deviation's own error at a memory of 100 steps makes it a little more."""
    share = len(alarms(noise(200_000), threshold=3.0)) / 200_000
    assert 1.35e-3 < share < 3e-3, share


@pytest.mark.parametrize("size", [10, 30, 1000])
def test_a_jump_is_noticed_in_its_first_step(size: float) -> None:
    for seed in range(20):
        losses = noise(1000, seed=seed)
        losses[700] = 80 + size * 2
        assert 700 in alarms(losses) and min(alarms(losses)) == 700


def test_a_single_spike_does_not_hide_the_next() -> None:
    losses = noise(1000)
    losses[[600, 610, 700]] = [1e6, 130, 130]
    assert alarms(losses) == [600, 610, 700]


@pytest.mark.parametrize("rate", [3e-4, 3e-3, 3e-2])
def test_a_steady_fall_gives_no_alarm(rate: float) -> None:
    """From 1000 to 80, within about 10,000, 1,000 or 100 steps."""
    steps = np.arange(20_000)
    assert alarms(80 + 920 * np.exp(-rate * steps) + noise(20_000) - 80) == []


def test_a_lasting_higher_level_is_accepted_within_a_memory() -> None:
    losses = noise(3000)
    losses[1000:] += 60
    found = alarms(losses)
    assert found[0] == 1000 and found[-1] < 1100, found


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_an_alarm_from_the_first_step_and_leaves_no_trace(value: float) -> None:
    detector = SpikeDetector()
    assert detector.observe(value) and detector.state_dict() == SpikeDetector().state_dict()
    for loss in noise(300).tolist():
        detector.observe(loss)
    before = detector.state_dict()
    assert detector.observe(value) and detector.state_dict() == before


def test_nothing_but_a_broken_number_is_an_alarm_in_the_warm_up() -> None:
    assert alarms(np.array([1.0, 1e9, 1.0, 1e12]), warmup=100) == []


def test_mean_and_deviation_are_those_of_the_losses() -> None:
    """The first ones weighted by age; a long memory comes near to mean and standard deviation of the distribution."""
    detector = SpikeDetector(memory=1000)
    assert math.isnan(detector.mean) and math.isnan(detector.deviation)
    for loss in (1.0, 2.0, 3.0, 6.0):
        detector.observe(loss)
    weights = 0.999 ** np.arange(3, -1, -1)
    assert detector.mean == pytest.approx((weights * [1, 2, 3, 6]).sum() / weights.sum(), rel=1e-12)
    before = [(weights[-n:] * [1, 2, 3, 6][:n]).sum() / weights[-n:].sum() for n in (1, 2, 3)]
    surprises = np.square(np.array([2, 3, 6]) - before)
    assert detector.deviation == pytest.approx(math.sqrt((weights[1:] * surprises).sum() / weights[1:].sum()), rel=1e-9)
    wide = SpikeDetector(memory=5000)
    for loss in noise(20_000).tolist():
        wide.observe(loss)
    assert wide.deviation == pytest.approx(2.0, rel=0.05) and wide.mean == pytest.approx(80.0, rel=0.005)


def test_rounding_of_a_constant_loss_is_no_alarm() -> None:
    generator = np.random.default_rng(0)
    assert alarms(5 * (1 + 1e-7 * generator.integers(0, 2, 5000) * (np.arange(5000) > 1000))) == []
    assert alarms(np.where(np.arange(500) == 400, 5.001, 5.0)) == [400]


def test_a_detector_from_a_checkpoint_goes_on_exactly() -> None:
    losses = noise(2000).tolist()
    losses[1500] = 200.0
    whole, first = SpikeDetector(), SpikeDetector()
    expected = [whole.observe(loss) for loss in losses]
    found = [first.observe(loss) for loss in losses[:1490]]
    second = SpikeDetector()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    found += [second.observe(loss) for loss in losses[1490:]]
    assert found == expected and sum(found) == 1 and second.state_dict() == whole.state_dict()


@pytest.mark.parametrize("settings", [{"threshold": 0.0}, {"memory": 1}, {"warmup": 0}])
def test_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(settings.values())))):
        SpikeDetector(**settings)
