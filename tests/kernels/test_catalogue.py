"""Laws of every op, for each of its tiny cases. They run in every lane: on the reference, on interpreted kernels and on a GPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.catalogue import (
    LANE,
    OPS,
    Pair,
    answer,
    assert_answers,
    assert_close,
    bits,
    change,
    double,
    drawn_like,
    every_case,
    leaves,
    outputs,
    replace,
    smallest_cases,
    tensors,
)

launches_kernels = pytest.mark.skipif(LANE == "plain", reason="the public function is the reference here")
runs_the_reference = pytest.mark.skipif(LANE == "interpreter", reason="no kernel runs: the plain lane has it")


def test_every_op_has_a_name_of_its_own() -> None:
    names = [op.name for op in OPS]
    assert names and len(set(names)) == len(names)


# ---- values and gradients -----------------------------------------------------------------------------------------------------------


OTHERS = [torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", [torch.float32, *OTHERS], ids=str)
@every_case
def test_value_and_gradients_equal_the_naive_formula_in_float64(pair: Pair, dtype: torch.dtype) -> None:
    if LANE == "interpreter" and dtype in OTHERS and dtype != OTHERS[pair.index % len(OTHERS)]:
        pytest.skip("interpreted, a case has float32 and one of the other types in turn: what differs is how numbers are read and written")
    case = pair.case(dtype)
    before = [bits(x).clone() for x in tensors(case)]
    found = answer(pair.op.call, case)
    assert all(torch.equal(bits(x), b) for x, b in zip(tensors(case), before, strict=True)), "an input was changed"
    assert_answers(pair.op, found, case)


@runs_the_reference
@every_case
def test_reference_equals_the_naive_formula_in_float64(pair: Pair) -> None:
    case = pair.case()
    assert_answers(pair.op, answer(pair.op.reference, case), case)


@every_case
def test_non_contiguous_inputs_give_the_same_answer(pair: Pair) -> None:
    case = change(pair.case(), strided)
    assert_answers(pair.op, answer(pair.op.call, case), case)


def strided(x: Tensor) -> Tensor:
    """The same numbers two apart, the first two axes in turn in memory; NaN (the opposite, the largest number) stands between them."""
    if x.dim() == 0:
        return x
    wide = x.repeat_interleave(2, -1)
    wide[..., 1::2] = torch.nan if x.is_floating_point() else ~x if x.dtype == torch.bool else torch.iinfo(x.dtype).max
    if x.dim() > 1:
        wide = wide.transpose(0, 1).contiguous().transpose(0, 1)
    return wide[..., ::2]


@pytest.mark.skipif(LANE == "interpreter", reason="test_sanitized repeats every case in another order of the programs")
@every_case
def test_repeated_calls_agree_bit_for_bit(pair: Pair) -> None:
    case = pair.case()
    first, second = answer(pair.op.call, case), answer(pair.op.call, case)
    for a, b in zip((*first.values, *first.gradients), (*second.values, *second.gradients), strict=True):
        assert torch.equal(bits(a), bits(b))


# ---- what autograd may ask for ------------------------------------------------------------------------------------------------------


@smallest_cases(2, stopped=False)
def test_gradients_pass_gradcheck_in_float64(pair: Pair) -> None:
    function, inputs = _finite(pair, pair.op.call)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


@runs_the_reference
@smallest_cases(3, stopped=False)
def test_second_derivatives_of_the_reference_pass_gradgradcheck_in_float64(pair: Pair) -> None:
    function, inputs = _finite(pair, pair.op.reference)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def _finite(pair: Pair, function: Callable[..., Any]) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    """A function of the leaves alone, zero where its value is infinite (difference quotients are of no use there)."""
    case = double(pair.case())
    inputs = leaves(case)

    def of_leaves(*given: Tensor) -> tuple[Tensor, ...]:
        replaced = iter(given)
        changed = replace(case, lambda x: next(replaced) if x.requires_grad else x)
        return tuple(torch.where(y.isfinite(), y, 0.0) for y in outputs(function, changed) if y.is_floating_point())

    return of_leaves, inputs


@launches_kernels
@smallest_cases(2)
def test_second_derivatives_equal_those_of_the_reference(pair: Pair) -> None:
    found, expected = (_second_derivatives(pair, function) for function in (pair.op.call, pair.op.reference))
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, length=10_000, what="second derivative", slack=1e-10)


def _second_derivatives(pair: Pair, function: Callable[..., Any]) -> list[Tensor]:
    """Derivatives of the first derivatives, each weighted with its own draws, by every input and every upstream gradient."""
    of_leaves, inputs = _finite(pair, function)
    values = of_leaves(*inputs)
    upstream = [g.to(y.dtype).requires_grad_() for g, y in zip(drawn_like(values), values, strict=True)]
    sent = [(y, g) for y, g in zip(values, upstream, strict=True) if y.requires_grad]
    first = torch.autograd.grad([y for y, _ in sent], inputs, [g for _, g in sent], create_graph=True, allow_unused=True)
    weighted = [(g * w).sum() for g, w in zip(first, drawn_like(inputs), strict=True) if g is not None and g.requires_grad]
    second = torch.autograd.grad(weighted, [*inputs, *upstream], allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(second, [*inputs, *upstream], strict=True)]


@smallest_cases(2)
def test_one_input_at_a_time_gets_the_gradient_it_gets_among_all(pair: Pair) -> None:
    case = pair.case()
    together = answer(pair.op.call, case).gradients
    for i, expected in enumerate(together):
        alone = change(case, lambda x: x)
        for j, x in enumerate(leaves(alone)):
            x.requires_grad_(i == j)
        torch.testing.assert_close(answer(pair.op.call, alone).gradients[0], expected)


@smallest_cases(2)
def test_one_output_at_a_time_sends_back_what_the_naive_formula_does(pair: Pair) -> None:
    case = pair.case()
    exact = double(case)
    for i in range(len(outputs(pair.op.naive, exact))):
        found = answer(lambda *a, i=i, **s: outputs(pair.op.call, case._replace(arguments=a, settings=s))[i], case)
        expected = answer(lambda *a, i=i, **s: outputs(pair.op.naive, case._replace(arguments=a, settings=s))[i], exact)
        for a, b in zip(found.gradients, expected.gradients, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


@smallest_cases(2)
def test_an_expanded_upstream_gradient_equals_a_dense_one(pair: Pair) -> None:
    case = pair.case()
    values = outputs(pair.op.call, case)
    expanded = answer(pair.op.call, case, [y.new_ones(()).expand(y.shape) for y in values])
    dense = answer(pair.op.call, case, [torch.ones_like(y) for y in values])
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(expanded.gradients, dense.gradients, strict=True))


@smallest_cases(2)
def test_a_call_without_gradients_has_the_same_value(pair: Pair) -> None:
    case = pair.case()
    with torch.no_grad():
        plain = outputs(pair.op.call, case)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(plain, answer(pair.op.call, case).values, strict=True))


@smallest_cases(1)
def test_tensors_on_two_devices_are_refused(pair: Pair) -> None:
    case = pair.case()
    if len(tensors(case)) < 2:
        pytest.skip("one tensor")
    moved = iter([True])
    split = replace(case, lambda x: x.to("meta") if next(moved, False) else x)
    with pytest.raises(ValueError, match="device"):
        pair.op.call(*split.arguments, **split.settings)
