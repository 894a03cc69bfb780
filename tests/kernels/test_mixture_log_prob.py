"""Laws of mixture_log_prob: against torch.distributions in float64, and where float32 formulas usually break."""

import math

import pytest
import torch
import torch.distributions as td
from torch import Tensor

from meme_kernels.mixture_log_prob import OP, Family, mixture_log_prob

FAMILIES: list[Family] = ["normal", "laplace"]


def draw(r: int, m: int, d: int, device: torch.device) -> tuple[Tensor, ...]:
    return tuple(x.to(device) for x in (torch.randn(r, d), torch.randn(m, d), torch.rand(m, d) + 0.3, torch.randn(m)))


def exact(z: Tensor, mean: Tensor, scale: Tensor, log_weight: Tensor, family: Family) -> Tensor:
    """torch.distributions in float64, with the weights' sum put back."""
    z, mean, scale, log_weight = (x.double() for x in (z, mean, scale, log_weight))
    base = td.Normal if family == "normal" else td.Laplace
    mixture = td.MixtureSameFamily(td.Categorical(logits=log_weight), td.Independent(base(mean, scale), 1))
    return mixture.log_prob(z) + torch.logsumexp(log_weight, -1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [(33, 70, 5), (2, 17, 65)])
def test_value_and_gradients_are_those_of_torch_distributions_to_1e_5(family, shape, device):
    given = [x.requires_grad_() for x in draw(*shape, device)]
    wide = [x.detach().double().requires_grad_() for x in given]
    g = torch.randn(shape[0], device=device)
    out, want = mixture_log_prob(*given, family=family), exact(*wide, family)
    torch.testing.assert_close(out.double(), want, rtol=2e-6, atol=2e-6)
    for found, expected in zip(torch.autograd.grad(out, given, g), torch.autograd.grad(want, wide, g.double()), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("family", FAMILIES)
def test_without_weights_every_component_weighs_one_over_m(family, device):
    z, mean, scale, _ = draw(9, 21, 4, device)
    even = torch.full((21,), -math.log(21), device=device)
    torch.testing.assert_close(
        mixture_log_prob(z, mean, scale, family=family).double(), exact(z, mean, scale, even, family), rtol=2e-6, atol=2e-6
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_one_component_is_that_component(family, device):
    z, mean, scale, _ = draw(7, 1, 12, device)
    base = td.Normal if family == "normal" else td.Laplace
    torch.testing.assert_close(mixture_log_prob(z, mean, scale, family=family), base(mean, scale).log_prob(z).sum(-1), rtol=2e-6, atol=1e-5)


def test_permuting_components_and_splitting_one_in_two_halves_changes_nothing(device):
    z, mean, scale, log_weight = draw(11, 19, 6, device)
    out = mixture_log_prob(z, mean, scale, log_weight)
    order = torch.randperm(19).to(device)
    torch.testing.assert_close(mixture_log_prob(z, mean[order], scale[order], log_weight[order]), out, rtol=2e-6, atol=2e-6)
    twice = [torch.cat([x[:1], x]) for x in (mean, scale, log_weight)]
    twice[2][:2] -= math.log(2)
    torch.testing.assert_close(mixture_log_prob(z, *twice), out, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_points_100_scales_away_keep_seven_digits_and_shares_that_sum_to_one(family, device):
    z, mean, scale, log_weight = (x.requires_grad_() for x in draw(6, 40, 8, device))
    far = (z.detach() + 100).requires_grad_()
    out = mixture_log_prob(far, mean, scale, log_weight, family=family)
    torch.testing.assert_close(out.double(), exact(far, mean, scale, log_weight, family).detach(), rtol=1e-6, atol=0)
    g = torch.randn(6, device=device)
    (shares,) = torch.autograd.grad(out, [log_weight], g)
    assert shares.sum().item() == pytest.approx(g.sum().item(), abs=2e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("exponent", [-30.0, 30.0])
def test_scales_of_e_to_the_30_either_way_are_right_in_value_and_gradient(family, exponent, device):
    """Points lie on components (where an expanded square loses everything), or a few scales from one at the origin."""
    _, mean, _, log_weight = draw(1, 5, 3, device)
    mean[0] = 0.0
    scale = torch.full_like(mean, math.exp(exponent))
    z = torch.cat([mean, 2 * scale[:1] * torch.tensor([[0.3, -1.1, 1.7]], device=device)])
    given = [x.requires_grad_() for x in (z, mean, scale, log_weight)]
    wide = [x.detach().double().requires_grad_() for x in given]
    out, want = mixture_log_prob(*given, family=family), exact(*wide, family)
    torch.testing.assert_close(out.double(), want, rtol=1e-6, atol=1e-5)
    for found, expected in zip(torch.autograd.grad(out.sum(), given), torch.autograd.grad(want.sum(), wide), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_a_component_of_weight_zero_reaches_nothing_whatever_it_holds(device):
    z, mean, scale, log_weight = draw(9, 6, 4, device)
    kept = torch.tensor([0, 1, 3, 4], device=device)
    short = [x[kept].requires_grad_() for x in (mean, scale, log_weight)]
    mean[2], scale[2], log_weight[2] = torch.nan, torch.nan, -torch.inf
    mean[5], scale[5], log_weight[5] = 3.0, 0.0, -torch.inf
    full = [x.requires_grad_() for x in (mean, scale, log_weight)]
    out, want = mixture_log_prob(z, *full), mixture_log_prob(z, *short)
    torch.testing.assert_close(out, want)
    for found, expected in zip(torch.autograd.grad(out.sum(), full), torch.autograd.grad(want.sum(), short), strict=True):
        torch.testing.assert_close(found[kept], expected)
        assert found[[2, 5]].eq(0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_where_no_component_has_weight_the_value_is_minus_infinity_and_every_gradient_zero(family, device):
    z, mean, scale, log_weight = draw(3, 18, 2, device)
    given = [x.requires_grad_() for x in (z, mean, scale, torch.full_like(log_weight, -torch.inf))]
    out = mixture_log_prob(*given, family=family)
    assert out.eq(-torch.inf).all()
    assert all(x.eq(0).all() for x in torch.autograd.grad(out.sum(), given))


def test_many_rows_in_several_chunks_give_the_gradients_of_one(device, monkeypatch):
    from meme_kernels import mixture_log_prob as module

    given = [x.requires_grad_() for x in draw(130, 3, 2, device)]
    once = torch.autograd.grad(mixture_log_prob(*given).sum(), given)
    monkeypatch.setattr(module, "SHARES", 1)
    monkeypatch.setattr(module, "ELEMENTS", 100)
    for found, expected in zip(torch.autograd.grad(mixture_log_prob(*given).sum(), given), once, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_program_that_meets_several_tiles_of_components_keeps_its_sum(family, device, monkeypatch):
    from meme_kernels import mixture_log_prob as module

    monkeypatch.setattr(module, "PROGRAMS", 1)
    given = [x.requires_grad_() for x in draw(5, 200, 3, device)]
    given[3].data += torch.linspace(-30, 30, 200, device=device)  # so that the maximum rises from tile to tile
    out, want = mixture_log_prob(*given, family=family), exact(*given, family)
    torch.testing.assert_close(out.double(), want, rtol=2e-6, atol=2e-6)
    (found,), (expected,) = (torch.autograd.grad(x.sum(), given[:1]) for x in (out, want))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_same_call_gives_the_same_bits(device):
    given = [x.requires_grad_() for x in draw(40, 90, 3, device)]
    first, second = ([out, *torch.autograd.grad(out.sum(), given)] for out in (mixture_log_prob(*given) for _ in range(2)))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_second_derivatives_are_those_of_torch_distributions(family, device):
    given = [x.double().requires_grad_() for x in draw(4, 5, 3, device)]
    g, v = torch.randn(4, device=device).double(), [torch.randn_like(x) for x in given]

    def second(out: Tensor) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(out, given, g, create_graph=True)
        return torch.autograd.grad(sum((a * b).sum() for a, b in zip(first, v, strict=True)), given)

    for found, want in zip(second(mixture_log_prob(*given, family=family)), second(exact(*given, family)), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-10)


def test_the_reference_saves_its_inputs_alone():
    given = [x.requires_grad_() for x in draw(50, 20, 7, torch.device("cpu"))]
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        OP.reference(*given)
    assert sum(saved) <= sum(x.numel() for x in given) + 2 * 20 * 7 + 3 * 20  # and the masks of _weighted


@pytest.mark.parametrize(
    ("shapes", "family", "message"),
    [
        (([3, 2], [4, 2], [4, 3]), "normal", r"expected z \[R, D\], mean and scale \[M, D\] with M > 0, got"),
        (([3, 2], [0, 2], [0, 2]), "normal", "M > 0"),
        (([3, 2], [4, 2], [4, 2], [3]), "normal", r"expected log_weight \[4\], got \(3,\)"),
        (([3, 2], [4, 2], [4, 2]), "cauchy", "expected family 'normal' or 'laplace', got 'cauchy'"),
    ],
)
def test_wrong_calls_are_told_what_came_and_what_was_expected(shapes, family, message):
    with pytest.raises(ValueError, match=message):
        mixture_log_prob(*(torch.ones(x) for x in shapes), family=family)
