"""The checking interpreter finds each kind of planted bug, and finds nothing in a kernel that has none."""

import pytest
import torch

from meme_kernels._triton import ABSENT, INTERPRETED, jit, tl

if ABSENT or not INTERPRETED:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from triton.runtime.errors import InterpreterError

from tests.kernels.sanitizer import Report, sanitize


@jit
def _copy(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n, other=0.0), mask=at < n)


@jit
def _copy_rows(x, y, stride, width, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    tl.store(y + row * BLOCK + at, tl.load(x + row * stride + at, mask=at < width, other=0.0))


@jit
def _copy_rows_with_int32(x, y, stride, width, BLOCK: tl.constexpr):
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    tl.store(y + row * BLOCK + at, tl.load(x + row * stride + at, mask=at < width, other=0.0))


@jit
def _store_without_mask(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n, other=0.0))


@jit
def _load_without_mask(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at), mask=at < n)


@jit
def _sum_without_other(x, y, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y, tl.sum(tl.load(x + at, mask=at < n), 0))


@jit
def _all_store_to_one_place(x, y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + tl.program_id(0) * BLOCK + at))


@jit
def _read_the_neighbour(y):
    at = y + tl.program_id(0)
    tl.store(at + 1, tl.load(at) + 1.0)


@jit
def _add_atomically(x, y):
    tl.atomic_add(y, tl.load(x + tl.program_id(0)))


def _faults(report: Report) -> dict[str, int]:
    """What the only kernel of a report did that it must not do."""
    (found,) = report.faults.values()
    return {name: count for name, count in found.items() if count}


def test_a_right_kernel_has_no_fault_and_moves_each_byte_once():
    x, y = torch.randn(37), torch.empty(37)
    for order in ("forward", "reversed", "shuffled"):
        y.zero_()
        with sanitize(order) as report:
            _copy[(3,)](x, y, 37, BLOCK=16)
        assert torch.equal(x, y) and not report.faults
        assert report.requested == report.distinct == (4 * 37, 4 * 37)
        assert [(launch.kernel, launch.programs) for launch in report.launches] == [("_copy", 3)]


def test_bytes_read_twice_are_requested_twice_and_distinct_once():
    x, y = torch.randn(16), torch.empty(3 * 16)
    with sanitize() as report:
        _copy_rows[(3,)](x, y, 0, 16, BLOCK=16)
    assert report.requested == (3 * 64, 192) and report.distinct == (64, 192)


def test_an_int32_product_that_overflows_is_found():
    far = torch.empty(2**31 + 16, dtype=torch.int8, device="meta")
    near = torch.empty(3 * 16, dtype=torch.int8, device="meta")
    with sanitize(virtual=True) as report:
        _copy_rows[(3,)](far, near, 2**30, 16, BLOCK=16)
    assert not report.faults and report.requested == (48, 48)
    with sanitize(virtual=True), pytest.raises(InterpreterError, match="int32 overflow detected for operation mul"):
        _copy_rows_with_int32[(3,)](far, near, 2**30, 16, BLOCK=16)


@pytest.mark.parametrize(("kernel", "what"), [(_store_without_mask, "store"), (_load_without_mask, "load")])
@pytest.mark.parametrize("virtual", [False, True])
def test_a_lane_outside_its_tensors_is_found(kernel, what, virtual):
    x, y = (torch.zeros(20, device="meta" if virtual else "cpu") for _ in range(2))
    with sanitize(virtual=virtual), pytest.raises(InterpreterError, match=f"{what} out of bounds in program 1: 12 of 16 active lanes"):
        kernel[(2,)](x, y, 20, BLOCK=16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.int64])
def test_a_masked_load_without_other_shows_in_the_result(dtype):
    x, y = torch.ones(10, dtype=dtype), torch.zeros(1, dtype=dtype)
    _sum_without_other[(1,)](x, y, 10, BLOCK=16)
    assert y.item() == 10  # as it looks without the sanitizer
    with sanitize() as report:
        _sum_without_other[(1,)](x, y, 10, BLOCK=16)
    assert y.item() != 10 and _faults(report) == {"without_other": 1}


def test_programs_that_store_to_one_place_are_races():
    with sanitize() as report:
        _all_store_to_one_place[(3,)](torch.ones(48), torch.zeros(16), BLOCK=16)
    assert _faults(report) == {"races": 32}


def test_a_read_of_what_another_program_wrote_is_found_and_depends_on_the_order():
    results = []
    for order in ("forward", "reversed"):
        y = torch.zeros(6)
        with sanitize(order) as report:
            _read_the_neighbour[(5,)](y)
        assert _faults(report) == {"order_dependent": 4}
        results.append(y.tolist())
    assert results == [[0.0, 1.0, 2.0, 3.0, 4.0, 5.0], [0.0, 1.0, 1.0, 1.0, 1.0, 1.0]]


def test_one_launch_may_read_what_an_earlier_one_wrote():
    y = torch.zeros(2)
    with sanitize() as report:
        for _ in range(2):
            _read_the_neighbour[(1,)](y)
    assert not report.faults


def test_atomics_are_counted():
    y = torch.zeros(1)
    with sanitize() as report:
        _add_atomically[(3,)](torch.ones(3), y)
    assert y.item() == 3 and _faults(report) == {"atomics": 3}


def test_nothing_is_watched_afterwards():
    with sanitize() as report:
        pass
    _all_store_to_one_place[(3,)](torch.ones(48), torch.zeros(16), BLOCK=16)
    assert not report.launches
