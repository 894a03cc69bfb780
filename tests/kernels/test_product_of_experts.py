"""Laws of products of diagonal Normals and of their divergences."""

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from meme_kernels._op import FusedOp
from meme_kernels._products import Against, products
from meme_kernels.product_divergence import OP as DIVERGENCE
from meme_kernels.product_divergence import product_divergence
from meme_kernels.product_of_experts import OP as PRODUCT
from meme_kernels.product_of_experts import product_of_experts, subsets

WIDE = torch.float64


def experts(n: int, b: int, d: int, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(n, b, d, generator=generator, dtype=WIDE)
    return mean.to(device), (torch.rand(n, b, d, generator=generator, dtype=WIDE) + 0.4).to(device)


@pytest.mark.parametrize("standard", [False, True])
def test_product_is_the_normalised_product_of_the_densities(device: torch.device, standard: bool) -> None:
    mean, scale = experts(3, 2, 2, device)
    mask = subsets(3, "all", device)[1:]
    joint, deviation = product_of_experts(mean, scale, mask, standard=standard)
    z = torch.linspace(-12, 12, 4001, dtype=WIDE, device=device).view(-1, 1, 1, 1)
    log_prob = Normal(mean, scale).log_prob(z)  # [grid, N, B, D]
    for s, subset in enumerate(mask):
        total = log_prob[:, subset].sum(1)
        if standard:
            total = total + Normal(0.0, 1.0).log_prob(z[:, 0])
        weight = torch.softmax(total, 0)
        first = (weight * z[:, 0]).sum(0)
        torch.testing.assert_close(joint[s], first, rtol=0, atol=1e-9)
        torch.testing.assert_close(deviation[s], (weight * (z[:, 0] - first) ** 2).sum(0).sqrt(), rtol=0, atol=1e-9)


def test_precisions_add_and_a_product_of_one_is_the_expert(device: torch.device) -> None:
    mean, scale = experts(4, 3, 5, device)
    mask = subsets(4, "all", device)
    _, deviation = product_of_experts(mean, scale, mask, standard=True)
    precision = mask.to(WIDE) @ scale.pow(-2).flatten(1) + 1
    torch.testing.assert_close(deviation.pow(-2).flatten(1), precision)
    alone = product_of_experts(mean, scale, torch.eye(4, dtype=torch.bool, device=device), standard=False)
    torch.testing.assert_close(alone, (mean, scale))


def test_the_order_of_experts_does_not_matter(device: torch.device) -> None:
    mean, scale = experts(5, 3, 4, device)
    mask, order = subsets(5, "all", device), torch.tensor([3, 0, 4, 2, 1], device=device)
    straight = product_divergence(mean, scale, mask, standard=False, against="experts")
    mixed = product_divergence(mean[order], scale[order], mask[:, order], standard=False, against="experts")
    torch.testing.assert_close(mixed[:2], straight[:2])
    torch.testing.assert_close(mixed[2], straight[2][:, order])


def test_a_mask_by_row_equals_one_for_all_rows(device: torch.device) -> None:
    mean, scale = experts(4, 5, 7, device)
    mask = subsets(4, "all", device)
    for against in ("standard", "experts"):
        wide = product_divergence(mean, scale, mask[:, :, None].expand(-1, -1, 5), standard=True, against=against)
        torch.testing.assert_close(wide, product_divergence(mean, scale, mask, standard=True, against=against))


def test_divergences_equal_the_closed_forms_of_torch_distributions(device: torch.device) -> None:
    mean, scale = experts(4, 3, 5, device)
    mask = subsets(4, "all", device)[1:]
    joint, deviation, kl = product_divergence(mean, scale, mask, standard=False)
    torch.testing.assert_close(kl, kl_divergence(Normal(joint, deviation), Normal(0.0, torch.ones_like(joint))).sum(-1))
    assert bool((kl >= 0).all())
    *_, cross = product_divergence(mean, scale, mask, standard=False, against="experts")
    expected = kl_divergence(Normal(joint[:, None], deviation[:, None]), Normal(mean, scale)).sum(-1)
    torch.testing.assert_close(cross, torch.where(mask[:, :, None], expected, 0.0))
    assert bool((cross >= -1e-14).all())
    assert float(cross[mask.sum(1) == 1].abs().max()) < 1e-14  # one expert: the product is that expert


@pytest.mark.parametrize("op", [PRODUCT, DIVERGENCE], ids=lambda op: op.name)
def test_an_empty_product_is_standard_normal_without_gradient(device: torch.device, op: FusedOp) -> None:
    mean, scale = (x.requires_grad_() for x in experts(3, 2, 4, device))
    values = op.call(mean, scale, torch.zeros(2, 3, dtype=torch.bool, device=device), standard=False)
    assert bool((values[0] == 0).all()) and bool((values[1] == 1).all()) and all(bool((x == 0).all()) for x in values[2:])
    for g in torch.autograd.grad([x.sum() for x in values], (mean, scale)):
        assert bool((g == 0).all())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, at the interpreter's arithmetic with the garbage
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, 0.0, 1e-30, 1e30])
@pytest.mark.parametrize("against", ["nothing", "standard", "experts"])
@pytest.mark.parametrize("by_row", [False, True])
def test_an_expert_outside_a_subset_reaches_neither_value_nor_gradient(
    device: torch.device, garbage: float, against: Against, by_row: bool
) -> None:
    clean = experts(3, 2, 5, device)
    mask = torch.tensor([[True, True, False], [True, False, False]], device=device)
    mask = mask[:, :, None].expand(-1, -1, 2) if by_row else mask
    answers = []
    for content in (1.0, garbage):
        mean, scale = (x.clone().float() for x in clean)
        mean[2], scale[2] = content, content
        inputs = mean.requires_grad_(), scale.requires_grad_()
        values = products(mean, scale, mask, standard=False, against=against)
        answers.append((*values, *torch.autograd.grad([x.sin().sum() for x in values], inputs)))
    torch.testing.assert_close(answers[1], answers[0], rtol=0, atol=0)
    assert bool((answers[1][-1][2] == 0).all()) and bool((answers[1][-2][2] == 0).all())
    assert all(bool(x.isfinite().all()) for x in answers[1])


def test_a_member_that_is_not_a_number_shows(device: torch.device) -> None:
    mean, scale = experts(2, 3, 4, device)
    mean[0, 1] = torch.nan
    joint, _ = product_of_experts(mean, scale, torch.tensor([[True, True], [False, True]], device=device), standard=True)
    assert bool(joint[0, 1].isnan().all()) and bool(joint[0, [0, 2]].isfinite().all()) and bool(joint[1].isfinite().all())


def test_a_product_that_is_not_used_sends_nothing_back(device: torch.device) -> None:
    mean, scale = experts(2, 3, 4, device)
    mean[1] = torch.nan
    inputs = mean.requires_grad_(), scale.requires_grad_()
    joint, deviation = product_of_experts(mean, scale, torch.eye(2, dtype=torch.bool, device=device), standard=True)
    for g in torch.autograd.grad(joint[0].sum() + deviation[0].sum(), inputs):
        assert bool(g[0].isfinite().all()) and bool((g[0] != 0).all())


def test_subsets_split_over_the_grid_add_up(device: torch.device) -> None:
    """With few rows more than 64 subsets are shared out over programs; their gradients are summed."""
    mean, scale = (x[:, :, :3] for x in experts(4, 1, 3, device))
    mask = subsets(4, "all", device).repeat(10, 1)[:150]
    for against in ("standard", "experts"):
        mean, scale = mean.detach().requires_grad_(), scale.detach().requires_grad_()
        settings = {"standard": False, "against": against}
        found, expected = DIVERGENCE.call(mean, scale, mask, **settings), DIVERGENCE.naive(mean, scale, mask, **settings)
        torch.testing.assert_close(found, expected)
        sums = [torch.cat([x.flatten() for x in values]).square().sum() for values in (found, expected)]
        torch.testing.assert_close(*(torch.autograd.grad(x, (mean, scale)) for x in sums))


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_extreme_scales_keep_the_digits(device: torch.device, scale: float) -> None:
    mean, narrow = (x.float() for x in experts(3, 2, 4, device))
    narrow = narrow * scale
    narrow[0] = 1.0
    mask = subsets(3, "all", device)[1:]
    exact = DIVERGENCE.naive(mean.double(), narrow.double(), mask, standard=False)
    found = product_divergence(mean, narrow, mask, standard=False)
    torch.testing.assert_close([x.double() for x in found], list(exact), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("scale", "tolerance"), [(1e-14, 0.1), (1e-13, 1e-3), (1e12, 1e-5)])
def test_gradients_in_float32_are_those_in_float64_whatever_the_unit(device: torch.device, scale: float, tolerance: float) -> None:
    """A precision to the power 3/2 is beyond float32's range where the gradient is not; the gradient by a precision is subnormal."""
    given = [x * scale for x in experts(3, 2, 4, device)]
    mask, gradients = subsets(3, "all", device)[1:], []
    for function, dtype in ((PRODUCT.call, torch.float32), (PRODUCT.reference, WIDE)):
        mean, deviation = (x.to(dtype).requires_grad_() for x in given)
        values = function(mean, deviation, mask, standard=False)
        gradients.append(torch.autograd.grad([x.sum() for x in values], (mean, deviation)))
    found, exact = gradients
    torch.testing.assert_close([x.double() for x in found], list(exact), rtol=tolerance, atol=tolerance)


def test_wrong_shapes_and_masks_are_refused(device: torch.device) -> None:
    mean, scale = experts(3, 2, 4, device)
    mask = torch.ones(1, 3, dtype=torch.bool, device=device)
    for arguments in ((mean, scale[:2], mask), (mean, scale, mask[:, :2]), (mean, scale, mask.float()), (mean[0], scale[0], mask)):
        with pytest.raises(ValueError, match=r"\[N, B, D\]"):
            product_of_experts(*arguments, standard=False)
    with pytest.raises(ValueError, match="against"):
        product_divergence(mean, scale, mask, standard=False, against="prior")  # type: ignore[arg-type]
