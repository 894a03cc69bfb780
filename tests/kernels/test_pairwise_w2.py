"""Laws of pairwise_w2, and of what streams over its table."""

import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from meme_kernels import _pairwise_w2_streams as streams
from meme_kernels.pairwise_w2 import pairwise_w2


def draw(s: int, t: int, d: int, device: torch.device) -> list[Tensor]:
    return [x.to(device) for n in (s, t) for x in (torch.randn(n, d), torch.rand(n, d) + 0.1)]


def test_it_is_the_wasserstein_distance_of_general_normals(device):
    mean_a, scale_a, mean_b, scale_b = draw(3, 2, 4, device)
    found = pairwise_w2(mean_a, scale_a, mean_b, scale_b)
    for s in range(3):
        for t in range(2):
            one, two = (torch.diag(x.square()).double().cpu().numpy() for x in (scale_a[s], scale_b[t]))
            root = sqrtm(two)
            exact = (one + two - 2 * sqrtm(root @ one @ root)).trace().real + (mean_a[s] - mean_b[t]).square().sum().item()
            assert found[s, t].item() == pytest.approx(exact, rel=1e-5)


def test_a_set_is_at_distance_zero_from_itself_however_far_from_the_origin(device):
    mean, scale, _, _ = draw(20, 1, 5, device)
    table = pairwise_w2(mean + 1e4, scale, mean + 1e4, scale)
    assert table.diagonal().eq(0).all() and torch.equal(table, table.T)


def test_close_rows_far_from_the_origin_keep_their_digits_in_value_and_gradient(device):
    """A thousand from the origin and 1/128 apart: the expanded square would have no digit left."""
    mean, scale, step, _ = draw(6, 6, 3, device)
    mean = mean.round() + 1000
    given = [x.requires_grad_() for x in (mean, scale, mean + step.round() / 128, scale.clone())]
    wide = [x.detach().double().requires_grad_() for x in given]
    out = pairwise_w2(*given)
    want = (wide[0][:, None] - wide[2]).square().sum(-1) + (wide[1][:, None] - wide[3]).square().sum(-1)
    torch.testing.assert_close(out.double(), want, rtol=1e-6, atol=1e-9)
    for found, expected in zip(torch.autograd.grad(out.sum(), given), torch.autograd.grad(want.sum(), wide), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_second_derivative_is_that_of_the_formula(device):
    given = [x.double().requires_grad_() for x in draw(4, 3, 2, device)]
    g, v = torch.randn(4, 3, device=device).double(), [torch.randn_like(x) for x in given]

    def second(out: Tensor) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(out.square(), given, g, create_graph=True)
        return torch.autograd.grad(sum((a * b).sum() for a, b in zip(first, v, strict=True)), given)

    a, b, c, d = given
    formula = (a[:, None] - c).square().sum(-1) + (b[:, None] - d).square().sum(-1)
    for found, want in zip(second(pairwise_w2(*given)), second(formula), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("entries", [1, 40, 10**6])
def test_the_nearest_are_those_of_the_whole_table_ties_by_lower_index(entries, device, monkeypatch):
    monkeypatch.setattr(streams, "ENTRIES", entries)
    mean_a, scale_a, mean_b, scale_b = draw(7, 9, 2, device)
    mean_b[6], scale_b[6] = mean_b[1], scale_b[1]
    distance, index = streams.nearest(mean_a, scale_a, mean_b, scale_b, 9)
    table = pairwise_w2(mean_a, scale_a, mean_b, scale_b)
    assert torch.equal(table.gather(1, index), distance) and distance.diff(dim=1).ge(0).all()
    assert all(row.index(1) + 1 == row.index(6) for row in index.tolist())
    short = streams.nearest(mean_a, scale_a, mean_b, scale_b, 2)
    assert torch.equal(short[0], distance[:, :2]) and torch.equal(short[1], index[:, :2])


@pytest.mark.parametrize("entries", [1, 40, 10**6])
def test_the_histogram_is_torchs_of_the_whole_table(entries, device, monkeypatch):
    monkeypatch.setattr(streams, "ENTRIES", entries)
    given = draw(13, 8, 3, device)
    table = pairwise_w2(*given)
    edges = torch.linspace(0.5, float(table.max()), 12, device=device)  # some lie below, and one on the last edge
    expected = torch.histogram(table.cpu(), edges.cpu()).hist.long()
    assert torch.equal(streams.histogram(*given, edges).cpu(), expected) and 0 < expected.sum() < table.numel()


def test_wrong_calls_are_told_what_came_and_what_was_expected(device):
    given = draw(3, 4, 2, device)
    with pytest.raises(ValueError, match=r"expected mean and scale \[S, D\] and \[T, D\] of one D, got"):
        pairwise_w2(given[0], given[1], given[2][:, :1], given[3])
    with pytest.raises(ValueError, match="expected num between 0 and T = 4, got 5"):
        streams.nearest(*given, 5)
    with pytest.raises(ValueError, match=r"expected edges \[bins \+ 1\]"):
        streams.histogram(*given, torch.ones(1, device=device))
