"""Laws of the bound's op: row by row it is the formula, absent entries reach nothing, and no range of log-likelihoods breaks it."""

import math
from typing import Any

import pytest
import torch

from meme_kernels.meme_bound import ESTIMATORS, Drawn, meme_bound, resample


def tables(n: int, k: int, b: int, device: torch.device, *, estimator: str, spread: float = 1.0):
    owns, decoded = k if estimator == "rao_blackwell" else 1, 1 if estimator == "resampled" else k
    own, cross, density = (
        spread * torch.randn(s, device=device, dtype=torch.float64) for s in [(n, owns, b), (n, n, decoded, b), (n, n, k, b)]
    )
    observed = torch.rand(n, b, device=device) > 0.4
    settings = {"estimator": estimator, "cross_weight": 10.0}
    if estimator == "resampled":
        index = torch.randint(k, (n, b), device=device)
        settings["drawn"] = Drawn(
            index, torch.rand(n, b, device=device, dtype=torch.float64), torch.ones(n, b, device=device, dtype=torch.float64)
        )
    return own, cross, density, observed, settings


def row_by_row(own, cross, density, observed, estimator, cross_weight, drawn=None):
    """The docstring's formula in Python floats, one row and one source at a time; T empty counts only A_ii - Q_ii."""
    n, _, samples, rows = density.shape
    out = torch.zeros(n, rows, dtype=torch.float64)
    for b in range(rows):
        held = [i for i in range(n) if observed[i, b]]
        for i in held:
            targets = [j for j in held if j != i]
            t = [sum(float(cross[i, j, k, b]) for j in targets) for k in range(cross.shape[2])]
            prior = [
                math.log(sum(math.exp(density[i, j, k, b]) for j in targets) / len(targets)) if targets else 0.0 for k in range(samples)
            ]
            ratio = [prior[k] - float(density[i, i, k, b]) for k in range(samples)]
            total = sum(math.exp(x) for x in t)
            if estimator == "rao_blackwell":
                value = sum(math.exp(t[k]) / total * (float(own[i, k, b]) - t[k] + ratio[k]) for k in range(samples))
            elif estimator == "released":
                value = samples * math.exp(t[0]) / total * (float(own[i, 0, b]) - t[0] + ratio[0])
            else:
                chosen = ratio[int(drawn.index[i, b])] if targets else sum(ratio) / samples
                value = float(own[i, 0, b]) - t[0] + chosen
            marginal = t[0] + float(drawn.gap[i, b]) if estimator == "resampled" else math.log(total / samples)
            out[i, b] = (value + cross_weight * marginal) / len(held)
    return out


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_entry_is_the_formula_written_out_row_by_row(estimator, device):
    own, cross, density, observed, settings = tables(4, 3, 9, device, estimator=estimator)
    came = meme_bound(own, cross, density, observed, **settings).objective
    expected = row_by_row(own, cross, density, observed.cpu(), **settings)
    torch.testing.assert_close(came.cpu(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_absent_entries_reach_neither_value_nor_gradient_even_as_nan(estimator, device):
    own, cross, density, observed, settings = tables(3, 4, 17, device, estimator=estimator)
    pairs = observed[:, None] & observed[None]
    results = []
    for filler in (0.0, math.nan):
        inputs = [own.where(observed[:, None], filler), cross.where(pairs[:, :, None], filler), density.where(pairs[:, :, None], filler)]
        inputs = [x.requires_grad_() for x in inputs]
        bound = meme_bound(*inputs, observed, **settings)
        gradients = torch.autograd.grad(bound.objective.sum(), inputs)
        results.append([bound.objective.detach(), bound.metrics, *gradients])
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned)
        assert clean.isfinite().all()


def test_cross_terms_have_no_gradient_at_cross_weight_one_and_nine_times_it_at_ten(device):
    """Joy et al. 2022, app. B: -w grad t and softmax grad t cancel exactly."""
    own, cross, density, observed, _ = tables(3, 5, 12, device, estimator="rao_blackwell")
    gradient = {}
    for weight in (1.0, 10.0):
        leaf = cross.clone().requires_grad_()
        bound = meme_bound(own, leaf, density, observed, estimator="rao_blackwell", cross_weight=weight)
        (gradient[weight],) = torch.autograd.grad(bound.objective.sum(), leaf)
    pairs = (observed[:, None] & observed[None]) & ~torch.eye(3, dtype=torch.bool, device=device)[..., None]
    share = cross.where(pairs[:, :, None], 0.0).sum(1).softmax(1) / observed.sum(0).clamp(min=1)
    assert gradient[1.0].abs().max() < 1e-15
    torch.testing.assert_close(gradient[10.0], (9 * share)[:, None].where(pairs[:, :, None], 0.0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("estimator", ["rao_blackwell", "released"])
def test_log_likelihoods_of_ten_thousand_nats_stay_finite(estimator, device):
    """Where exp(t) is 0 or infinite the weights are still those of the largest t."""
    own, cross, density, observed, settings = tables(2, 6, 8, device, estimator=estimator, spread=1e4)
    observed = torch.ones_like(observed)
    inputs = [x.float().requires_grad_() for x in (own, cross, density)]
    bound = meme_bound(*inputs, observed, **settings)
    gradients = torch.autograd.grad(bound.objective.sum(), inputs)
    assert all(x.isfinite().all() for x in (bound.objective, bound.metrics, *gradients))
    wide = meme_bound(own, cross, density, observed, **settings)
    torch.testing.assert_close(bound.objective.double(), wide.objective, rtol=1e-5, atol=1.0)


def test_relabelling_the_modalities_relabels_the_result(device):
    own, cross, density, observed, settings = tables(4, 3, 9, device, estimator="rao_blackwell")
    order = torch.tensor([2, 0, 3, 1], device=device)
    straight = meme_bound(own, cross, density, observed, **settings)
    turned = meme_bound(own[order], cross[order][:, order], density[order][:, order], observed[order], **settings)
    torch.testing.assert_close(turned.objective, straight.objective[order], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(turned.metrics, straight.metrics[:, order], rtol=1e-13, atol=1e-13)


def test_samples_are_drawn_by_their_weights(device):
    """4,000 rows with one weight vector: frequencies within 4 standard errors of softmax t; gap and effective sample size as defined."""
    t = torch.tensor([0.3, -1.0, 1.2], dtype=torch.float64, device=device)
    rows = 4000
    cross = torch.full((2, 2, 3, rows), math.nan, dtype=torch.float64, device=device)
    cross[0, 1] = cross[1, 0] = t[:, None]
    observed = torch.ones(2, rows, dtype=torch.bool, device=device)
    drawn = resample(cross, observed, torch.rand(2, rows, dtype=torch.float64, device=device))
    share = t.softmax(0)
    for k in range(3):
        frequency = (drawn.index == k).double().mean()
        assert abs(frequency - share[k]) < 4 * (share[k] * (1 - share[k]) / (2 * rows)).sqrt()
    torch.testing.assert_close(drawn.gap, torch.logsumexp(t, 0) - math.log(3) - t[drawn.index])
    torch.testing.assert_close(drawn.ess, (1 / share.square().sum()).expand(2, rows))


@pytest.mark.parametrize("samples", [5, 64])
def test_a_sample_without_weight_is_never_drawn_however_near_the_number_is_to_one(samples, device):
    rows = 100
    cross = torch.randn(2, 2, samples, rows, device=device)
    cross[:, :, -1] = -1e4
    observed = torch.ones(2, rows, dtype=torch.bool, device=device)
    nearly = torch.full((2, rows), 1 - 2**-24, device=device)
    assert int(resample(cross, observed, nearly).index.max()) < samples - 1


def test_a_row_that_holds_one_modality_takes_the_pseudo_input_prior(device):
    own, cross, density, observed, settings = tables(3, 4, 10, device, estimator="rao_blackwell")
    observed = torch.zeros_like(observed)
    observed[1] = True
    alone = torch.randn(3, 4, 10, dtype=torch.float64, device=device)
    came = meme_bound(own, cross, density, observed, alone=alone, **settings)
    torch.testing.assert_close(came.objective[1], (own[1] + alone[1] - density[1, 1]).mean(0), rtol=1e-12, atol=1e-12)
    assert (came.objective[[0, 2]] == 0).all() and (came.metrics[3:] == 0).all()


def test_wrong_shapes_and_combinations_are_refused(device):
    own, cross, density, observed, settings = tables(3, 4, 10, device, estimator="released")
    with pytest.raises(ValueError, match=r"cross: for density \(3, 3, 4, 10\) expected \(3, 3, 4, 10\), got \(3, 3, 2, 10\)"):
        meme_bound(own, cross[:, :, :2], density, observed, **settings)
    with pytest.raises(ValueError, match=r"expected density \[N, N, K, B\]"):
        meme_bound(own, cross, density[0], observed, **settings)
    with pytest.raises(ValueError, match="goes with `drawn`"):
        meme_bound(own, cross, density, observed, estimator="resampled", cross_weight=1.0)
    with pytest.raises(ValueError, match="expected one of"):
        meme_bound(own, cross, density, observed, estimator="best", cross_weight=1.0)


@pytest.mark.parametrize("name", ["prior", "alone", "closed"])
def test_a_table_of_fewer_sources_is_refused_before_a_kernel_reads_beyond_its_end(name, device):
    own, cross, density, observed, settings = tables(3, 4, 10, device, estimator="released")
    given: dict[str, Any] = settings | {name: own.new_zeros((1, 10) if name == "closed" else (1, 4, 10))}
    with pytest.raises(ValueError, match=rf"{name}: .* expected \(3, .*10\), got \(1, .*10\)"):
        meme_bound(own, cross, density, observed, **given)


@pytest.mark.parametrize("name", Drawn._fields)
def test_what_was_drawn_for_fewer_rows_is_refused(name, device):
    own, cross, density, observed, settings = tables(3, 4, 10, device, estimator="resampled")
    settings["drawn"] = settings["drawn"]._replace(**{name: getattr(settings["drawn"], name)[:, :9]})
    with pytest.raises(ValueError, match=rf"{name}: .* expected \(3, 10\), got \(3, 9\)"):
        meme_bound(own, cross, density, observed, **settings)


def test_masks_and_indices_of_another_type_are_refused(device):
    own, cross, density, observed, settings = tables(3, 4, 10, device, estimator="resampled")
    with pytest.raises(ValueError, match="observed: expected torch.bool, got torch.uint8"):
        meme_bound(own, cross, density, observed.byte(), **settings)
    settings["drawn"] = settings["drawn"]._replace(index=settings["drawn"].index.double())
    with pytest.raises(ValueError, match="index: expected torch.int64, got torch.float64"):
        meme_bound(own, cross, density, observed, **settings)


def test_one_number_is_drawn_for_every_source_and_row_or_none(device):
    _, cross, _, observed, _ = tables(3, 4, 10, device, estimator="released")
    uniform = torch.rand(3, 10, dtype=torch.float64, device=device)
    assert resample(cross, observed, uniform).index.shape == (3, 10)
    wrong = [(x, observed, uniform) for x in (cross[:, :2], cross[0], cross[:, :, :0])]
    wrong += [(cross, x, uniform) for x in (observed[:1], observed.long())] + [(cross, observed, x) for x in (uniform[:1], uniform[0])]
    for arguments in wrong:
        with pytest.raises(ValueError, match="resample: expected cross"):
            resample(*arguments)
