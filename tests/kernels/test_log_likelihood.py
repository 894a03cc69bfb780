"""Log densities of data: against torch.distributions, closed forms and limits."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Laplace, NegativeBinomial, Normal, Poisson

from meme_kernels import log_likelihood as module
from meme_kernels._op import run
from meme_kernels._special import digamma_rest, log1p, sigmoid, softplus, stirling_rest
from meme_kernels._triton import jit, tl
from meme_kernels.log_likelihood import Family, log_likelihood, naive, reference
from tests.kernels.catalogue import LANE, Peak

FAMILIES: list[Family] = ["normal", "laplace", "bernoulli", "poisson", "negative_binomial"]
COUNTS: list[Family] = ["poisson", "negative_binomial"]

plain_only = pytest.mark.skipif(LANE != "plain", reason="a law of the reference: the plain lane has it")
kernels_only = pytest.mark.skipif(LANE == "plain", reason="a law of the kernels")


def independent(x: Tensor, parameter: Tensor, extra: Any, family: Family) -> Tensor:
    """The same sum by torch.distributions, in float64."""
    x, parameter = x.double(), parameter.double()
    density = {
        "normal": lambda: Normal(parameter, extra, validate_args=False),
        "laplace": lambda: Laplace(parameter, extra, validate_args=False),
        "bernoulli": lambda: Bernoulli(logits=parameter, validate_args=False),
        "poisson": lambda: Poisson(parameter, validate_args=False),
        "negative_binomial": lambda: NegativeBinomial(extra, logits=parameter.log() - extra.log(), validate_args=False),
    }[family]()
    return density.log_prob(x).flatten(2).sum(-1)


def drawn(family: Family, k: int, p: int, event: tuple[int, ...], kind: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """Data, parameter and extra in float64; the last two are leaves."""
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    x = uniform(p, *event) if family not in COUNTS else (uniform(p, *event) * 12).floor()
    parameter = 4 * uniform(k, p, *event) + 0.05 if family in COUNTS else 3 * uniform(k, p, *event) - 1.5
    extra = {"none": None, "scalar": uniform(1)[0], "element": uniform(*event), "full": uniform(k, p, *event)}[kind]
    leaves = [None if y is None else y.to(device).requires_grad_() for y in (parameter, None if extra is None else extra + 0.3)]
    assert leaves[0] is not None
    return x.to(device), leaves[0], leaves[1]


SHAPES = [(1, 1, (1,)), (3, 5, (2, 7)), (2, 3, (2200,)), (1, 130, (3,))]
CASES = [(f, k) for f in FAMILIES for k in (("none",) if f in ("bernoulli", "poisson") else ("scalar", "element", "full"))]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_value_and_gradients_are_those_of_torch_distributions(
    family: Family, kind: str, shape: tuple[int, int, tuple[int, ...]], device: torch.device
):
    k, p, event = shape
    x, parameter, extra = drawn(family, k, p, event, kind, device)
    leaves = [y for y in (parameter, extra) if y is not None]
    found, expected = log_likelihood(x, parameter, extra, family=family), independent(x, parameter, extra, family)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-10)
    upstream = torch.linspace(-1, 2, k * p, dtype=torch.float64, device=device).view(k, p)
    gradients = (torch.autograd.grad(y, leaves, upstream) for y in (found, expected))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dispersion", [1e-2, 1.0, 1e3, 1e8])
def test_float32_keeps_its_digits_for_large_counts_and_any_dispersion(dispersion: float, device: torch.device):
    """A plain float32 sum of log-gamma functions is off by 0.5 at a million, and by 100 where the dispersion is 1e8."""
    x = torch.tensor([[1.0, 10.0, 1e3, 1e5, 1e6]], device=device)
    rate = (x + torch.tensor([-0.9, 0.5, 2.0, -1.5, 3.0], device=device) * x.sqrt())[None].requires_grad_()
    r = torch.tensor(dispersion, device=device, requires_grad=True)
    for family, extra in (("poisson", None), ("negative_binomial", r)):
        leaves = [rate] if extra is None else [rate, extra]
        per_element = log_likelihood(x.T, rate[0].T[None], extra, family=family)  # the five counts as five rows
        expected = independent(x.T, rate[0].T[None], None if extra is None else extra.double(), family)
        torch.testing.assert_close(per_element.double(), expected, rtol=1e-6, atol=5e-4)
        found, wanted = (torch.autograd.grad(y.sum(), leaves) for y in (per_element, expected))
        torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_negative_binomial_becomes_poisson_as_its_dispersion_grows(dtype: torch.dtype, device: torch.device):
    x, rate, _ = drawn("poisson", 2, 3, (6,), "none", device)
    rate = rate.detach().to(dtype)
    poisson = log_likelihood(x.to(dtype), rate, family="poisson")
    gaps = []
    for dispersion in (1e4, 1e6, 1e8):
        extra = torch.tensor(dispersion, dtype=dtype, device=device)
        gaps.append((log_likelihood(x.to(dtype), rate, extra, family="negative_binomial") - poisson).abs().max().item())
    assert gaps[-1] < 3e-5 and (dtype == torch.float32 or gaps[0] > 50 * gaps[1] > 2500 * gaps[2])  # a gap of O(1 / dispersion)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_probabilities_of_all_counts_sum_to_one(dtype: torch.dtype, device: torch.device):
    x = torch.arange(4096, device=device)[:, None]
    for mean in (1e-3, 2.5, 700.0):
        rate = torch.full((1, 4096, 1), mean, dtype=dtype, device=device)
        total = log_likelihood(x, rate, family="poisson").double().exp().sum().item()
        assert total == pytest.approx(1, abs=3e-6)
        for dispersion in (0.5, 40.0) if mean < 100 else (40.0,):
            extra = torch.tensor(dispersion, dtype=dtype, device=device)
            total = log_likelihood(x, rate, extra, family="negative_binomial").double().exp().sum().item()
            assert total == pytest.approx(1, abs=3e-6)


def test_no_count_at_a_vanishing_rate_is_certain(device: torch.device):
    rate = torch.full((1, 1, 3), 1e-30, device=device, requires_grad=True)
    zero, r = torch.zeros(1, 3, device=device), torch.tensor(2.0, device=device)
    for family, extra in (("poisson", None), ("negative_binomial", r)):
        found = log_likelihood(zero, rate, extra, family=family)
        assert found.item() == pytest.approx(0, abs=1e-20)
        assert torch.autograd.grad(found.sum(), rate)[0].flatten().tolist() == pytest.approx([-1, -1, -1])


@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")  # NumPy's, in the branch that is not chosen
def test_no_count_at_rate_zero_is_certain_and_any_other_count_impossible(device: torch.device):
    x, r = torch.tensor([[0.0], [2.0]], device=device), torch.tensor(2.0, device=device)
    for family, extra in (("poisson", None), ("negative_binomial", r)):
        assert log_likelihood(x, torch.zeros(1, 2, 1, device=device), extra, family=family).tolist() == [[0.0, -math.inf]]


def test_extreme_logits_give_finite_values_and_gradients(device: torch.device):
    logits = torch.tensor([[[1e4, -1e4, 1e4, -1e4, 0.0]]], device=device, requires_grad=True)
    x = torch.tensor([[1.0, 0.0, 0.0, 1.0, 0.5]], device=device)
    found = log_likelihood(x, logits, family="bernoulli")
    assert found.item() == pytest.approx(-2e4 - math.log(2))
    assert torch.autograd.grad(found.sum(), logits)[0].flatten().tolist() == [0, 0, -1, 1, 0]


@pytest.mark.parametrize(("family", "kind"), [("laplace", "scalar"), ("negative_binomial", "element"), ("bernoulli", "none")])
def test_rows_are_looked_up_as_if_gathered(family: Family, kind: str, device: torch.device):
    x, parameter, extra = drawn(family, 2, 7, (5, 3), kind, device)
    leaves = [y for y in (parameter, extra) if y is not None]
    row = torch.tensor([6, 0, 0, 3, 6, 2, 6], device=device)
    for data in (x, x[:7].repeat(3, 1, 1)):  # as many rows as parameters have, and more
        found, gathered = (log_likelihood(d, parameter, extra, family=family, row=r) for d, r in ((data, row), (data[row], None)))
        assert torch.equal(found, gathered)
        for a, b in zip(*(torch.autograd.grad(y.sum(), leaves) for y in (found, gathered)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(("family", "kind"), CASES)
@pytest.mark.parametrize("wrong", [-1, 3, 2**40])
def test_rows_that_do_not_exist_do_not_pass_unnoticed(family: Family, kind: str, wrong: int, device: torch.device):
    x, parameter, extra = drawn(family, 2, 3, (5,), kind, device)
    row = torch.tensor([0, wrong, 2], device=device)
    if LANE == "plain":
        with pytest.raises(ValueError, match="log_likelihood: row: expected numbers of the 3 rows, from 0 to 2, got"):
            log_likelihood(x, parameter, extra, family=family, row=row)
        return
    value = log_likelihood(x, parameter, extra, family=family, row=row)
    assert bool(value[:, 1].isnan().all()) and bool(value[:, [0, 2]].isfinite().all())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_integer_data_are_scored_as_floats(family: Family, dtype: torch.dtype, device: torch.device):
    _, parameter, extra = drawn(family, 2, 3, (9,), "none" if family in ("bernoulli", "poisson") else "scalar", device)
    top = 1 if dtype == torch.bool else 255
    x = torch.linspace(0, top, 27, device=device).view(3, 9).to(dtype)
    assert torch.equal(*(log_likelihood(data, parameter, extra, family=family) for data in (x, x.double())))


def test_a_value_does_not_depend_on_the_other_rows_and_samples(device: torch.device):
    x, parameter, extra = drawn("negative_binomial", 3, 9, (150,), "element", device)
    whole = log_likelihood(x, parameter, extra, family="negative_binomial")
    for k, p in ((0, 0), (2, 8), (1, 4)):
        alone = log_likelihood(x[p : p + 1], parameter[k : k + 1, p : p + 1], extra, family="negative_binomial")
        torch.testing.assert_close(alone[0, 0], whole[k, p], rtol=1e-14, atol=0)


# ---- what is refused ----------------------------------------------------------------------------------------------------------------


def test_a_call_that_makes_no_sense_is_refused(device: torch.device):
    x, m, s = torch.zeros(3, 4, device=device), torch.zeros(2, 3, 4, device=device), torch.ones(4, device=device)
    row = torch.zeros(3, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="family: expected one of normal, laplace"):
        log_likelihood(x, m, s, family="gamma")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"got x \(3, 5\), parameter \(2, 3, 4\)"):
        log_likelihood(torch.zeros(3, 5, device=device), m, s, family="normal")
    with pytest.raises(ValueError, match="without row, expected as many rows"):
        log_likelihood(x[:2], m, s, family="normal")
    with pytest.raises(ValueError, match=r"row: expected int64 \[3\], got torch.int32 \(3,\)"):
        log_likelihood(x, m, s, family="normal", row=row.int())
    with pytest.raises(ValueError, match=r"extra: expected one number, \(4,\) or \(2, 3, 4\), got \(3, 4\)"):
        log_likelihood(x, m, s.expand(3, 4), family="laplace")
    with pytest.raises(ValueError, match="normal takes an extra"):
        log_likelihood(x, m, family="normal")
    with pytest.raises(ValueError, match="poisson takes no extra"):
        log_likelihood(x, m, s, family="poisson")
    with pytest.raises(ValueError, match="gather it first"):
        log_likelihood(x.requires_grad_(), m, s, family="normal", row=row)


# ---- the reference works in chunks --------------------------------------------------------------------------------------------------


@plain_only
@pytest.mark.parametrize("chunk", [1, 40, 170], ids=["one element", "some samples", "some rows"])
@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_change_neither_value_nor_first_and_second_derivatives(family: Family, chunk: int, monkeypatch: pytest.MonkeyPatch):
    for kind in [k for f, k in CASES if f == family]:
        x, parameter, extra = drawn(family, 4, 5, (17,), kind, torch.device("cpu"))
        row = torch.tensor([1, 1, 4, 0, 2])
        leaves = [y for y in (parameter, extra) if y is not None]

        def answers(row: Any = row, x: Any = x, parameter: Any = parameter, extra: Any = extra, leaves: Any = leaves) -> list[Tensor]:
            y = reference(x, parameter, extra, family=family, row=row)
            first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
            return [y, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)]

        monkeypatch.setattr(module, "CHUNK", 10**6)
        whole = answers()
        monkeypatch.setattr(module, "CHUNK", chunk)
        for a, b in zip(answers(), whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@plain_only
@pytest.mark.parametrize(("family", "kind"), [(f, k) for f, k in CASES if k != "full"])
def test_reference_holds_its_gradient_and_two_more_tensors_of_that_size(family: Family, kind: str, monkeypatch: pytest.MonkeyPatch):
    """Pieces of the gradient before they are joined; what a chunk needs comes on top. The naive formula holds four to eight in all."""
    monkeypatch.setattr(module, "CHUNK", 1 << 13)
    x, parameter, extra = (None if y is None else y.detach().float() for y in drawn(family, 8, 128, (512,), kind, torch.device("cpu")))
    leaves = [y.requires_grad_() for y in (parameter, extra) if y is not None]
    peaks = []
    for function in (reference, naive):
        with Peak() as peak:
            torch.autograd.grad(function(x, parameter, extra, family=family).sum(), leaves)
        peaks.append(peak.most / leaves[0].nbytes)
    assert peaks[0] < 3.5 < 4 < peaks[1], peaks


# ---- special functions of the kernels -----------------------------------------------------------------------------------------------


@jit
def _apply(x_ptr, out_ptr, n, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=1.0)
    if FUNCTION == "stirling_rest":
        y = stirling_rest(x)
    elif FUNCTION == "digamma_rest":
        y = digamma_rest(x)
    elif FUNCTION == "log1p":
        y = log1p(x)
    elif FUNCTION == "softplus":
        y = softplus(x)
    else:
        y = sigmoid(x)
    tl.store(out_ptr + i, y, mask=i < n)


def _series(z: Tensor, coefficients: list[float], power: int) -> Tensor:
    return sum((c / z ** (2 * i + power) for i, c in enumerate(coefficients)), torch.zeros_like(z))


def _exact(name: str, z: Tensor) -> Tensor:
    """In float64; by series where log-gamma functions cancel."""
    if name == "stirling_rest":
        tail = _series(z, [1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360, 1 / 156], 1)
        return torch.where(z < 16, z.lgamma() - z * z.log() + z, 0.5 * (2 * math.pi / z).log() + tail)
    if name == "digamma_rest":
        tail = _series(z, [-1 / 12, 1 / 120, -1 / 252, 1 / 240, -1 / 132, 691 / 32760, -1 / 12], 2)
        return torch.where(z < 16, z.digamma() - z.log(), -0.5 / z + tail)
    return {"log1p": torch.log1p, "sigmoid": torch.sigmoid, "softplus": lambda y: y.clamp(min=0) + torch.log1p((-y.abs()).exp())}[name](z)


@kernels_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["stirling_rest", "digamma_rest", "log1p", "softplus", "sigmoid"])
def test_special_functions_are_exact_to_a_few_units(name: str, dtype: torch.dtype, device: torch.device):
    z = torch.logspace(-6, 8, 20_001, dtype=torch.float64)
    if name == "log1p":
        z = torch.cat([z, -torch.logspace(-8, -1e-3, 999, dtype=torch.float64)])
    elif name in ("softplus", "sigmoid"):
        z = torch.linspace(-20, 100, 20_001, dtype=torch.float64)
    z = z.to(device, dtype)
    found, exact = torch.empty_like(z), _exact(name, z.double())
    run(_apply, (len(z) // 1024 + 1,), z, found, len(z), FUNCTION=name, BLOCK=1024)
    size = exact.abs().clamp(min=1.0) if name.endswith("rest") else exact.abs()
    assert ((found.double() - exact).abs() / size).max().item() < (1.1e-6 if dtype == torch.float32 else 1e-14)
