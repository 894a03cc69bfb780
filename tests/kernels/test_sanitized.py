"""Every kernel under the checking interpreter: no race, no order dependence, no overflow, nothing out of bounds, no byte too many."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from meme_kernels import philox
from meme_kernels._op import Case, FusedOp
from meme_kernels.log_likelihood import log_likelihood
from tests.kernels.catalogue import LANE, OPS, Pair, answer, bits, every_case, leaves, outputs

if LANE != "interpreter":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from tests.kernels.sanitizer import Launch, Report, sanitize


@every_case
def test_programs_may_run_in_any_order(pair: Pair) -> None:
    """No program reads or writes where another one writes, by every address; nor does the other order change a bit."""
    case = pair.case()
    with sanitize() as report:
        expected = answer(pair.op.call, case)
    assert not report.faults
    with sanitize("reversed"):
        found = answer(pair.op.call, case)
    for a, b in zip((*expected.values, *expected.gradients), (*found.values, *found.gradients), strict=True):
        assert torch.equal(bits(a), bits(b))


@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 300, 2), (1, 2, 1027)], ids=str)
@pytest.mark.parametrize("kind", ["uniform", "normal", "laplace"])
def test_noise_is_written_once_and_nothing_else_is(kind: str, shape: tuple[int, int, int]) -> None:
    with sanitize() as report:
        expected = getattr(philox, kind)(torch.arange(shape[1]), (3, 5), shape[0], shape[2])
    assert not report.faults and expected.isfinite().all()
    with sanitize("reversed"):
        assert torch.equal(getattr(philox, kind)(torch.arange(shape[1]), (3, 5), shape[0], shape[2]), expected)


@pytest.mark.parametrize("wrong", [-1, 2, 10**6, 2**40])
def test_rows_that_do_not_exist_are_not_read(wrong: int) -> None:
    x, parameter = torch.rand(2, 8), torch.zeros(2, 3, 8, requires_grad=True)
    with sanitize():
        value = log_likelihood(x, parameter, torch.ones(()), family="normal", row=torch.tensor([0, wrong, 1]))
        value.sum().backward()


# ---- bytes: ops that read every number once and write every result once ---------------------------------------------------------------

STREAMS = {"log_likelihood", "product_divergence", "product_of_experts", "token_log_prob"}
ROWS = 8  # of the products: 32 subsets of each of 128 rows would take minutes here, and request 16 times the bytes


def _small() -> list:
    return [
        pytest.param(op, _fewer(case) if op.name.startswith("product") else case, id=f"{op.name}: {case.label}")
        for op in OPS
        if op.name in STREAMS
        for case in op.cases("small", torch.device("cpu"), torch.float32)
    ]


def _fewer(case: Case) -> Case:
    mean, scale, *rest = case.arguments
    return Case(
        f"{case.label}, {ROWS} of its rows", (*(x.detach()[:, :ROWS].requires_grad_() for x in (mean, scale)), *rest), case.settings
    )


@pytest.mark.parametrize(("op", "case"), _small())
def test_streaming_ops_request_five_percent_more_bytes_than_the_least_at_most(op: FusedOp, case: Case) -> None:
    with sanitize() as report:
        values = [y for y in outputs(op.call, case) if y.requires_grad]
    _within(report, op, case, backward=False)
    with sanitize() as report:
        torch.autograd.grad(values, leaves(case), [torch.ones_like(y) for y in values], allow_unused=True)
    _within(report, op, case, backward=True)


def _within(report: Report, op: FusedOp, case: Case, *, backward: bool) -> None:
    cost, requested = op.cost(*case.arguments, **case.settings, backward=backward), sum(report.requested)
    least = cost.read + cost.written
    what = "backward" if backward else "forward"
    assert requested <= 1.05 * least, f"{what}: {requested} bytes requested by {[x.kernel for x in report.launches]}, {least} needed"


# ---- more than 2**31 elements: tensors without memory, some programs at both ends of the grid -------------------------------------------


def _leaf(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta", requires_grad=True)


def _fixed(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


def _case(*arguments: Any, **settings: Any) -> Case:
    return Case("", arguments, settings)


def _bound(number: int, rows: int) -> Case:
    tables = (_leaf(number, 2, rows), _leaf(number, number, 2, rows), _leaf(number, number, 2, rows))
    return _case(*tables, _fixed(number, rows, dtype=torch.bool), estimator="rao_blackwell", cross_weight=1.0)


def _cross(number: int, rows: int, width: int) -> Case:
    parameters = (_leaf(number, rows, width), _leaf(number, rows, width), _fixed(number, rows, dtype=torch.bool))
    return _case(*parameters, _fixed(number, 2, rows, width))


# Axes that a program loops over are short, so what is large is the grid; rows are no power of two, so that the last block is cut. With
# three modalities the way to the last one's first row is beyond 2**31 itself.
_ROWS = 2**25 + 3
LARGE: dict[str, list[Callable[[], Case]]] = {
    "cross_log_prob": [lambda: _cross(2, _ROWS, 17), lambda: _cross(3, 2**30 + 3, 1)],
    "log_likelihood": [lambda: _case(_fixed(2**21 + 1, 1033), _leaf(1, 2**21 + 1, 1033), family="bernoulli")],
    "meme_bound": [lambda: _bound(2, 2**28 + 3), lambda: _bound(3, 2**29 + 3)],
    "mixture_log_prob": [lambda: _case(_leaf(4 * _ROWS, 17), _fixed(5, 17), _fixed(5, 17))],
    "pair_divergence": [lambda: _case(_leaf(2, _ROWS, 33), _leaf(2, _ROWS, 33), _fixed(2, _ROWS, dtype=torch.bool), family="normal")],
    "pairwise_w2": [
        lambda: _case(_leaf(_ROWS, 33), _leaf(_ROWS, 33), _fixed(9, 33), _fixed(9, 33)),
        lambda: _case(_fixed(9, 33), _fixed(9, 33), _leaf(_ROWS, 33), _leaf(_ROWS, 33)),
    ],
    "product_divergence": [lambda: _case(_leaf(2, _ROWS, 33), _leaf(2, _ROWS, 33), _fixed(1, 2, dtype=torch.bool), standard=True)],
    "product_of_experts": [lambda: _case(_leaf(2, _ROWS, 33), _leaf(2, _ROWS, 33), _fixed(1, 2, dtype=torch.bool), standard=True)],
    "token_log_prob": [lambda: _case(_fixed(2**20 + 1, 3, dtype=torch.int64), _leaf(1, 2**20 + 1, 3, 701), 0)],
    "projected_token_log_prob": [],  # holds `chunk` logits at a time: no kernel sees more
}


def _large() -> list:
    return [pytest.param(op, make, id=f"{op.name} {i}") for op in OPS for i, make in enumerate(LARGE.get(op.name, ()))]


@pytest.mark.parametrize(("op", "make"), _large())
def test_addresses_beyond_two_to_the_31_elements_are_right(op: FusedOp, make: Callable[[], Case]) -> None:
    case = make()
    with sanitize(virtual=True) as report:
        values = [y for y in outputs(op.call, case) if y.requires_grad]
        torch.autograd.grad(values, leaves(case), [torch.empty_like(y) for y in values], allow_unused=True)
    assert not report.faults
    assert max(_farthest(launch) for launch in report.launches) > 2**31, "no kernel went that far: the test says nothing"


def _farthest(launch: Launch) -> int:
    """The largest number of elements between the start of a storage and an access within it."""
    accesses = [x for x in (*launch.loads, *launch.stores) if x.addresses.size]
    return max((int(x.addresses.max()) % 2**44 // x.size for x in accesses), default=0)


def test_every_op_says_how_it_is_called_with_more_than_two_to_the_31_elements() -> None:
    assert {op.name for op in OPS} <= set(LARGE)
