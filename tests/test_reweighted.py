"""A reweighted prior is what its formula says: exact resampling, log Z of the same pass, a ratio that finds a known one."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import chisquare, kstest
from torch import Tensor

from meme_dist.distributions import Components, DiagLaplace, DiagNormal, Prior
from meme_dist.noise import Noise
from meme_dist.ratio import Contrast, LogRatio, Stage, _negatives, classification_loss, fit_ratio, untrained
from meme_dist.resampling import BLOCK, _log_exponential, normaliser, resample
from meme_dist.reweighted import Gain, Langevin, Resample, ReweightedPrior, caution, gain, normalised

SMALL = Contrast(width=32, depth=2, steps=400, batch_size=512, learning_rate=5e-3)


def standard(size: int = 1) -> Components:
    return Components(DiagNormal(torch.zeros(1, size), torch.ones(1, size)))


def mixture() -> Components:
    """Three components in the plane, not all alike."""
    mean = torch.tensor([[-1.0, 0.0], [1.0, 0.5], [0.0, 2.0]])
    return Components(DiagLaplace(mean, torch.tensor([[0.3, 1.0], [0.5, 0.5], [1.0, 0.2]])))


def rows(num: int, *, seed: int = 0) -> Noise:
    return Noise(seed, torch.arange(num))


def slope(z: Tensor) -> Tensor:
    """A log weight that is anything but even."""
    return 1.5 * z[:, 0] - 0.5 * z[:, -1].square()


def proposals_of(base: Prior, draw: int, num: int, purpose: str, seed: int = 0) -> Tensor:
    """What `resample` documents: proposal m of draw d is draw d M + m of the base."""
    return base.sample(Noise(seed, draw * num + torch.arange(num)), purpose, 1)[0]


class Fixed:
    """A prior whose draws run through 0, 1, ..., C - 1 again and again: proposals that are known."""

    def __init__(self, size: int):
        self.size = size

    def sample(self, noise: Noise, purpose: str, num: int) -> Tensor:
        return (noise.draw % self.size).float()[None, :, None].expand(num, -1, 1)

    def log_prob(self, z: Tensor) -> Tensor:
        return torch.full(z.shape[:-1], -math.log(self.size))


# ---- resampling -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ceiling", [math.inf, 0.5])
def test_streaming_has_the_law_of_categorical_resampling(ceiling: float) -> None:
    """Chi-square over seven known proposals, 20,000 draws; with a ceiling, of the clipped weights."""
    log_weight = torch.tensor([0.0, 1.0, -2.0, 3.0, 0.5, -6.0, 2.0])
    drawn = resample(Fixed(7), lambda z: log_weight[z[:, 0].long()], rows(20_000), "law", 1, proposals=7, ceiling=ceiling)
    counts = torch.bincount(drawn.z.flatten().long(), minlength=7).numpy()
    weight = log_weight.clamp(max=ceiling).double().softmax(0).numpy()
    assert chisquare(counts, weight * counts.sum()).pvalue > 0.01


def test_keys_are_exponential_numbers_finer_than_the_grid_of_one_uniform() -> None:
    """The smallest keys decide. From one uniform number they would lie on steps of 6e-8; here the digits below are even, too."""
    keys = _log_exponential(rows(200_000), "keys").exp()
    assert kstest(keys.numpy(), "expon").pvalue > 0.01
    below = (-torch.expm1(-keys[keys < 0.01]) * 2**24) % 1
    assert len(below) > 1500 and kstest(below.numpy(), "uniform").pvalue > 0.01


@pytest.mark.parametrize("edge", [2.0**-25, 1.0])
def test_keys_are_finite_at_the_edges_of_the_uniform(edge: float) -> None:
    class Edge(NamedTuple):
        seed: int
        draw: Tensor

        def uniform(self, purpose: str, num: int, size: int) -> Tensor:
            return torch.full((num, len(self.draw), size), edge)

    assert _log_exponential(Edge(0, torch.arange(3)), "edge").isfinite().all()  # type: ignore[arg-type]


@pytest.mark.parametrize("base", [standard(2), mixture()])
def test_no_draw_depends_on_the_chunk_or_on_the_rows_beside(base: Prior) -> None:
    """With these numbers of points not even a bit; with others a float32 network rounds by how many it is given."""
    network = untrained(2, SMALL)
    shaken(network)
    whole = resample(base, network, rows(5), "chunks", 2, proposals=1100)
    for chunk in (1, BLOCK, 3 * BLOCK, 2000):
        for found, expected in zip(resample(base, network, rows(5), "chunks", 2, proposals=1100, chunk=chunk), whole, strict=True):
            assert torch.equal(found, expected)
    alone = resample(base, network, Noise(0, torch.tensor([3])), "chunks", 2, proposals=1100)
    for found, expected in zip(alone, whole, strict=True):
        assert torch.equal(found[:, 0], expected[:, 3])
    whole = resample(base, network, rows(5), "chunks", 2, proposals=259)
    alone = resample(base, network, Noise(0, torch.tensor([3])), "chunks", 2, proposals=259)
    assert torch.equal(alone.z[:, 0], whole.z[:, 3])
    torch.testing.assert_close(alone.log_z[:, 0], whole.log_z[:, 3], rtol=0, atol=1e-5)


def shaken(network: torch.nn.Module) -> None:
    """Weights as after a training: none of them 0."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


@pytest.mark.parametrize("ceiling", [math.inf, 0.7])
def test_log_z_and_effective_size_are_those_of_direct_computation(ceiling: float) -> None:
    base, num = mixture(), 700
    drawn = resample(base, slope, rows(3), "direct", 1, proposals=num, ceiling=ceiling)
    for row in range(3):
        log_weight = slope(proposals_of(base, row, num, "direct")).double().numpy()
        weight = np.exp(np.minimum(log_weight, ceiling))
        assert drawn.log_z[0, row].item() == pytest.approx(math.log(np.exp(log_weight).mean()), abs=1e-12)
        assert drawn.effective[0, row].item() == pytest.approx(weight.sum() ** 2 / (weight**2).sum(), rel=1e-12)


def test_a_draw_is_one_of_its_own_proposals() -> None:
    base = mixture()
    drawn = resample(base, slope, rows(4), "own", 2, proposals=300)
    for sample, purpose in enumerate(("own", "own/1")):
        for row in range(4):
            assert (proposals_of(base, row, 300, purpose) == drawn.z[sample, row]).all(1).sum() == 1


def test_one_proposal_is_the_base_itself() -> None:
    base, noise = mixture(), rows(50)
    assert torch.equal(resample(base, slope, noise, "one", 1, proposals=1).z, base.sample(noise, "one", 1))


def test_log_weights_may_be_of_any_size_and_shifting_them_moves_log_z_alone() -> None:
    base = mixture()
    plain = resample(base, slope, rows(4), "shift", 1, proposals=300)
    far = resample(base, lambda z: slope(z) + 512.0, rows(4), "shift", 1, proposals=300)
    assert torch.equal(far.z, plain.z)
    torch.testing.assert_close(far.log_z, plain.log_z + 512, rtol=0, atol=1e-4)  # the weights came as float32
    torch.testing.assert_close(far.effective, plain.effective, rtol=1e-4, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_weights_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="log weights"):
        resample(standard(), lambda z: torch.full((len(z),), bad), rows(2), "bad", 1, proposals=10)
    with pytest.raises(ValueError, match="at least 1"):
        resample(standard(), slope, rows(2), "bad", 1, proposals=0)


# ---- the prior --------------------------------------------------------------------------------------------------------------------------


def test_a_ratio_of_one_is_the_base() -> None:
    base, z = mixture(), torch.randn(3, 4, 2)
    prior, found = normalised(base, LogRatio(), Resample(100), budget=10_000)
    assert torch.equal(prior.log_prob(z), base.log_prob(z))
    assert found.log_z == pytest.approx(0, abs=1e-12) and found.spread < 1e-12 and found.effective == pytest.approx(100, rel=1e-12)
    assert found.error == pytest.approx(0, abs=1e-7) and found.pooled == pytest.approx(10_000, rel=1e-9)
    draws = prior.sample(rows(2000), "one", 1)[0]
    mean, variance = torch.tensor([0.0, 2.5 / 3]), torch.tensor([(2 + 2 * (0.09 + 0.25 + 1)) / 3, 4.25 / 3 - 6.25 / 9 + 2 * 1.29 / 3])
    torch.testing.assert_close(draws.mean(0), mean, rtol=0, atol=0.1)
    torch.testing.assert_close(draws.var(0), variance, rtol=0, atol=0.25)


def test_a_normalised_prior_integrates_to_one() -> None:
    def log_ratio(z: Tensor) -> Tensor:
        return torch.sin(3 * z[:, 0]) + z[:, 0] / 2

    prior, found = normalised(standard(), log_ratio, Resample(10), budget=200_000)
    mass, _ = quad(lambda x: math.exp(prior.log_prob(torch.tensor([[[x]]], dtype=torch.float64)).item()), -9, 9, limit=200)
    assert mass == pytest.approx(1, abs=4 * found.error) and found.error < 0.005


def test_draws_of_a_tilted_normal_are_those_of_the_shifted_one() -> None:
    """N(0, 1) exp(a z) / Z = N(a, 1), log Z = a^2 / 2: by resampling, and by Langevin chains that begin somewhere else."""
    for sampler in (Resample(300), Langevin(budget=40, proposals=3)):
        prior, found = normalised(standard(), lambda z: 0.8 * z[:, 0], sampler, budget=5000)
        z = prior.sample(rows(2000), "tilt", 1)
        assert z.shape == (1, 2000, 1)
        assert z.mean().item() == pytest.approx(0.8, abs=0.07) and z.std().item() == pytest.approx(1, abs=0.05)
        assert found.log_z == pytest.approx(0.32, abs=0.08)


def test_clipping_changes_draws_and_not_the_density() -> None:
    base, z = standard(), torch.randn(1, 5, 1)
    plain, first = normalised(base, lambda z: 3 * z[:, 0], Resample(1000), budget=50_000)
    clipped, second = normalised(base, lambda z: 3 * z[:, 0], Resample(1000, clip=20), budget=50_000)
    assert clipped.log_z == plain.log_z and torch.equal(clipped.log_prob(z), plain.log_prob(z))
    assert second.spread == first.spread and second.effective > 2 * first.effective
    drawn = clipped.sample(rows(200), "clip", 1)
    ceiling = plain.log_z + math.log(20)
    assert torch.equal(drawn, resample(base, lambda z: 3 * z[:, 0], rows(200), "clip", 1, proposals=1000, ceiling=ceiling).z)
    assert drawn.mean() < plain.sample(rows(200), "clip", 1).mean()


def test_stages_add_and_a_reweighted_prior_can_be_reweighted() -> None:
    base, z = standard(2), torch.randn(2, 3, 2)
    first, second = untrained(2, Contrast(width=8, stages=2)).stages
    for stage in (first, second):
        shaken(stage)
    both = LogRatio([first, second])  # type: ignore[list-item]
    torch.testing.assert_close(both(z[0]), first(z[0]) + second(z[0]), rtol=0, atol=1e-6)
    nested = ReweightedPrior(ReweightedPrior(base, first, 0.25), second, 0.5)
    torch.testing.assert_close(nested.log_prob(z), ReweightedPrior(base, both, 0.75).log_prob(z), rtol=0, atol=1e-5)
    assert isinstance(nested, Prior)


# ---- the ratio --------------------------------------------------------------------------------------------------------------------------


def known(seed: int, num: int = 8000) -> tuple[Tensor, Callable[[Tensor], Tensor], float]:
    """Draws of q = N(m, diag(s^2)) in the plane, log q / p for p = N(0, I), and KL(q || p)."""
    q, p = DiagNormal(torch.tensor([0.8, -0.5]), torch.tensor([0.6, 0.8])), DiagNormal(torch.zeros(2), torch.ones(2))
    z = q.mean + q.scale * torch.randn(num, 2, generator=torch.Generator().manual_seed(seed))
    return z[None], lambda z: q.log_prob(z) - p.log_prob(z), q.kl(p).item()


@pytest.fixture(scope="module")
def fitted() -> LogRatio:
    return fit_ratio(standard(2), known(0)[0], SMALL)


def test_a_known_ratio_is_found_and_the_gain_is_the_divergence(fitted: LogRatio) -> None:
    latents, truth, divergence = known(1)
    prior, found = normalised(standard(2), fitted, Resample(1000), budget=100_000)
    rises = gain(prior, latents, error=found.error)
    assert (fitted(latents[0]) - prior.log_z - truth(latents[0])).square().mean().sqrt() < 0.12
    assert abs(found.log_z) < 0.05
    assert divergence - 0.05 < rises.value < divergence + 3 * rises.error


def test_the_gain_never_exceeds_the_divergence_and_the_exact_ratio_reaches_it() -> None:
    latents, truth, divergence = known(2)
    for factor in (0.3, 1.0, 2.0):
        prior, found = normalised(standard(2), lambda z, f=factor: f * truth(z), Resample(10), budget=200_000)
        rises = gain(prior, latents, error=found.error)
        assert rises.value <= divergence + 4 * rises.error
        assert factor != 1 or rises.value == pytest.approx(divergence, abs=4 * rises.error)


def peaks(size: int, scale: float, seed: int) -> tuple[Components, Callable[[Tensor], Tensor], Tensor]:
    """An even mixture of ten Normals of this scale with the moments of N(0, I), log q / p, and draws of q: one of 4000 rows each."""
    centres = math.sqrt(1 - scale**2) * Noise(seed, torch.arange(10)).normal("centres", 1, size)[0]
    q, p = Components(DiagNormal(centres, torch.full_like(centres, scale))), standard(size)
    return q, lambda z: (q.log_prob(z[None]) - p.log_prob(z[None]))[0], q.sample(rows(4000, seed=seed), "rows", 1)


@pytest.mark.parametrize(("size", "scale"), [(6, 0.2), (12, 0.3), (12, 0.2)])
def test_a_gain_beyond_the_divergence_comes_with_a_caution(size: int, scale: float) -> None:
    """KL 7, 12 and 17: with the exact ratio the gain is the KL. Base draws miss the peaks, and the error of log Z does not tell."""
    for seed in (0, 1):
        _, truth, latents = peaks(size, scale, seed)
        prior, found = normalised(standard(size), truth, Resample(10), seed=seed, budget=100_000)
        rises = gain(prior, latents, error=found.error)
        assert caution(found.pooled) or rises.value <= truth(latents[0]).mean() + 4 * rises.error


def test_the_error_of_log_z_is_its_spread_over_seeds_where_no_caution_comes_with_it() -> None:
    """Of an exact ratio log Z is 0."""
    _, truth, _ = peaks(4, 0.5, 0)
    found = [normalised(standard(4), truth, Resample(1), seed=seed, budget=20_000)[1] for seed in range(40)]
    assert not any(caution(one.pooled) for one in found)
    spread = math.sqrt(np.mean([(one.log_z / one.error) ** 2 for one in found]))
    assert 0.7 < spread < 1.4


def test_log_z_is_the_same_however_many_proposals_a_draw_has() -> None:
    one, many = (normalised(mixture(), slope, sampler, budget=20_000) for sampler in (Resample(1), Langevin(proposals=300)))
    assert one[1][:3] == many[1][:3] and one[1].proposals == 1 and many[1].proposals == 300


def test_the_gain_of_a_linear_ratio_is_closed_form() -> None:
    """log r = a z under q = N(m, .): E_q[log r] - log Z = a m - a^2 / 2; the error is over rows, not a row's draws, and of log Z."""
    z = torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]])  # two draws of two rows
    found = gain(ReweightedPrior(standard(), lambda z: 0.5 * z[:, 0], 0.125), z, error=0.3)
    over_rows = 0.5 * np.std([2, 3], ddof=1) / math.sqrt(2)
    assert found.value == pytest.approx(0.5 * 2.5 - 0.125) and found.error == pytest.approx(math.hypot(over_rows, 0.3))
    assert isinstance(found, Gain)


def test_a_bound_caps_every_log_ratio() -> None:
    wild = 100 * torch.randn(1000, 2)
    for bound, stages in ((0.5, 1), (3.0, 2)):
        network = untrained(2, Contrast(width=16, bound=bound, stages=stages))
        shaken(network)
        for parameter in network.parameters():
            parameter.data.mul_(10)
        assert network(wild).abs().max() <= bound * stages
        assert network(wild).abs().max() > 0.9 * bound


def test_a_bound_that_is_never_reached_changes_little() -> None:
    stage = Stage(2, width=8, depth=1, bound=math.inf)
    shaken(stage)
    z = torch.randn(50, 2)
    free, stage.bound = stage(z), 1e4
    torch.testing.assert_close(stage(z), free, rtol=1e-5, atol=1e-4)


def test_the_classification_loss_is_the_cross_entropy_with_smoothed_labels() -> None:
    posterior, prior = torch.randn(40).double(), torch.randn(30).double()
    entropy = torch.nn.functional.binary_cross_entropy_with_logits
    expected = entropy(posterior, torch.full_like(posterior, 0.9)) + entropy(prior, torch.full_like(prior, 0.1))
    expected = expected + 0.2 * (posterior.square().mean() + prior.square().mean()) / 2
    torch.testing.assert_close(classification_loss(posterior, prior, smoothing=0.1, penalty=0.2), expected)
    assert classification_loss(torch.zeros(3), torch.zeros(4)).item() == pytest.approx(2 * math.log(2))


def test_smoothed_labels_keep_logits_below_their_limit() -> None:
    """Draws that never overlap: without smoothing log ratios grow without end, with it they stop at log((1 - s) / s) = 2.94."""
    apart = 20 + torch.randn(1, 2000, 1, generator=torch.Generator().manual_seed(0))
    settings = {"width": 16, "depth": 1, "steps": 150, "batch_size": 128, "learning_rate": 1e-2, "held_out": 0.0}
    free, smooth = (fit_ratio(standard(), apart, Contrast(smoothing=s, **settings))(apart[0]).mean() for s in (0.0, 0.05))
    assert smooth.item() == pytest.approx(math.log(19), abs=0.3) and free > smooth + 1


def test_a_second_stage_is_fitted_to_what_the_first_one_left() -> None:
    """Under a bound of .6 one stage cannot reach log ratios of 1 and more; a second one, against its prior, adds what is missing."""
    latents, _, divergence = known(0)
    gains = []
    for stages in (1, 2):
        settings = replace(SMALL, steps=200, batch_size=256, bound=0.6, stages=stages, proposals=30, pool=2000)
        prior, _ = normalised(standard(2), fit_ratio(standard(2), latents, settings), Resample(500), budget=50_000)
        gains.append(gain(prior, known(1)[0], error=0.0).value)
    assert gains[1] > gains[0] + 0.05 and gains[1] < divergence + 0.02


def test_a_second_stage_adds_nothing_where_the_first_one_has_said_all() -> None:
    """Its negatives come from the prior as reweighted so far: told from the base's it would say everything again."""
    latents, truth, _ = known(0)
    settings = replace(SMALL, steps=200, batch_size=256, stages=2, proposals=100, pool=4000)
    z = known(1, 2000)[0][0]
    difference = fit_ratio(standard(2), latents, settings)(z) - truth(z)
    assert (difference - difference.mean()).square().mean().sqrt() < 0.3 < 0.5 * truth(z).std()


def test_a_later_stage_is_chosen_on_draws_that_no_step_was_shown() -> None:
    """Chosen on the pool that it learnt by heart, a stage would look better than none where nothing is to be found."""
    contrast = Contrast(proposals=20, pool=300, held_out=0.5)
    ratio = untrained(2, SMALL)
    shaken(ratio)
    negatives = _negatives(standard(2), ratio, contrast, torch.device("cpu"))
    shown = {tuple(z.tolist()) for step in range(1, 20) for z in negatives(step, 200)}
    hidden = {tuple(z.tolist()) for z in negatives(-1, 1000)}
    assert 250 < len(shown) <= 300 and 120 < len(hidden) <= 150 and not shown & hidden


def test_a_fit_depends_on_its_seed_alone_and_leaves_torchs_generator_as_it_was() -> None:
    latents, tiny = known(0)[0], Contrast(width=8, depth=1, steps=20, batch_size=64)
    state = torch.random.get_rng_state()
    one, two = fit_ratio(standard(2), latents, tiny), fit_ratio(standard(2), latents, tiny)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(one(latents[0]), two(latents[0]))
    other = fit_ratio(standard(2), latents, Contrast(width=8, depth=1, steps=20, batch_size=64, seed=1))
    assert not torch.equal(one(latents[0]), other(latents[0]))
    assert not any(parameter.requires_grad for parameter in one.parameters())


def test_the_step_with_the_best_held_out_loss_is_kept() -> None:
    """Thirty rows, learnt by heart: the last step is worse than no ratio at all on new ones, the step that held-out rows choose is not."""
    q, p = DiagNormal(torch.full((8,), 0.2), torch.ones(8)), standard(8)
    latents, fresh = q.sample(rows(30), "few", 1), q.sample(rows(2000), "new", 1)
    settings = Contrast(width=64, depth=2, steps=200, batch_size=128, learning_rate=1e-2)
    chosen, last = (fit_ratio(p, latents, replace(settings, held_out=share)) for share in (0.4, 0.0))
    gains = [gain(normalised(p, ratio, Resample(500), draws=20, budget=10_000)[0], fresh, error=0.0).value for ratio in (chosen, last)]
    assert gains[0] > -0.3 and gains[1] < -1


def test_latents_that_are_not_finite_are_refused() -> None:
    latents = known(0, 30)[0].clone()
    latents[0, 3, 1] = math.nan
    with pytest.raises(ValueError, match="1 of 30 are not finite"):
        fit_ratio(standard(2), latents, SMALL)
    with pytest.raises(ValueError, match="at least 2 rows"):
        fit_ratio(standard(2), torch.zeros(1, 1, 2), SMALL)


@pytest.mark.parametrize("bad", [{"bound": 0.0}, {"smoothing": 0.5}, {"penalty": -1.0}, {"stages": 0}, {"held_out": 1.0}, {"steps": 0}])
def test_settings_that_make_no_sense_are_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Contrast(**bad)


def test_the_normaliser_of_many_draws_is_the_log_of_the_mean() -> None:
    drawn = resample(standard(), slope, rows(20), "many", 2, proposals=100)
    found = normaliser(drawn, 100)
    assert found.log_z == pytest.approx(math.log(drawn.log_z.exp().mean()), abs=1e-12)
    made = [proposals_of(standard(), row, 100, purpose) for row in range(20) for purpose in ("many", "many/1")]
    weight = slope(torch.cat(made)).double().exp()
    pooled = (weight.sum().square() / weight.square().sum()).item()
    assert found.pooled == pytest.approx(pooled, rel=1e-6)
    assert found.error == pytest.approx((weight.std(correction=0) / weight.mean()).item() / math.sqrt(len(weight)), rel=1e-6)
    assert found.spread == pytest.approx(drawn.log_z.std().item()) and found.effective == pytest.approx(drawn.effective.mean().item())
