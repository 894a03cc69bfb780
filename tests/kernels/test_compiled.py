"""torch.compile, torch.export, autocast and opcheck of every op: one graph, no recompiles, the same numbers.

In a plain process the reference is traced; where kernels launch (interpreted or on a GPU) each launch function is an opaque node.
"""

import importlib
import pkgutil
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_map

import meme_kernels
from tests.kernels.catalogue import LANE, OPS, Pair, answer, bits, change, outputs, smallest_cases, tensors

# Dynamo itself instantiates an autograd.Function while it traces one.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.fixture(autouse=True)
def poisoned_memory() -> None:
    """Not here: tracing would follow the patched functions. Nor may a test see what another one compiled."""
    torch.compiler.reset()


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@smallest_cases(1)
def test_compiled_values_and_gradients_equal_eager_ones(pair: Pair, dynamic: bool) -> None:
    case = pair.case()
    expected = answer(pair.op.call, case)
    found = answer(torch.compile(pair.op.call, fullgraph=True, dynamic=dynamic, backend="aot_eager"), case)
    for a, b in zip((*found.values, *found.gradients), (*expected.values, *expected.gradients), strict=True):
        torch.testing.assert_close(a, b)


def _rowed() -> Iterator[Any]:
    """Each op with a case whose number of rows no other axis shares, and that number."""
    for op in OPS:
        for index, case in enumerate(op.cases("tiny", torch.device("cpu"), torch.float32)):
            sizes = dict(re.findall(r"\b([A-Z])=(\d+)", case.label))
            rows = next((sizes[letter] for letter in "BPST" if letter in sizes), "0")
            others = {size for x in tensors(case) for size in x.shape} - {int(rows)}
            if int(rows) > 1 and sum(value == rows for letter, value in sizes.items() if letter != "X") == 1 and others:
                yield pytest.param(Pair(op, index), int(rows), id=f"{op.name}: {case.label}")
                break


@pytest.mark.parametrize(("pair", "rows"), list(_rowed()))
def test_a_new_number_of_rows_compiles_at_most_once_more(pair: Pair, rows: int) -> None:
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(pair.op.call, fullgraph=True, backend=counter)
    for wanted in (rows, rows + 2, rows + 3, rows + 7):
        case = change(pair.case(), lambda x, wanted=wanted: _with_rows(x, rows, wanted))
        for a, b in zip(outputs(compiled, case), outputs(pair.op.call, case), strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count <= 2


def _with_rows(x: Tensor, rows: int, wanted: int) -> Tensor:
    """The first rows again after the last, in every axis as long as the number of rows."""
    for axis in (axis for axis, size in enumerate(x.shape) if size == rows):
        x = x.index_select(axis, torch.arange(wanted, device=x.device) % rows)
    return x


@smallest_cases(1)
def test_exported_programs_give_eager_values(pair: Pair) -> None:
    case = change(pair.case(), lambda x: x)
    for x in tensors(case):
        x.requires_grad_(False)

    class Module(torch.nn.Module):
        def forward(self, *arguments: Any) -> tuple[Tensor, ...]:
            return tuple(outputs(pair.op.call, case._replace(arguments=arguments)))

    program = torch.export.export(Module(), case.arguments).module()
    for a, b in zip(program(*case.arguments), outputs(pair.op.call, case), strict=True):
        torch.testing.assert_close(a, b)


@smallest_cases(1)
def test_autocast_changes_no_bit(pair: Pair) -> None:
    case = pair.case()
    expected = answer(pair.op.call, case)
    with torch.autocast(tensors(case)[0].device.type, torch.bfloat16):
        found = answer(pair.op.call, case)
    for a, b in zip((*found.values, *found.gradients), (*expected.values, *expected.gradients), strict=True):
        assert a.dtype == b.dtype and torch.equal(bits(a), bits(b))


# ---- the opaque nodes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(LANE == "plain", reason="no kernel is launched here")
@smallest_cases(1)
def test_every_opaque_node_passes_opcheck(pair: Pair) -> None:
    with _noted() as calls:
        answer(pair.op.call, pair.case())
    assert calls
    for node, arguments in calls:
        torch.library.opcheck(node, tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, arguments))


@contextmanager
def _noted() -> Iterator[list[tuple[Any, tuple[Any, ...]]]]:
    """Within it every call of a launch function is noted: its node and its arguments."""
    calls: list[tuple[Any, tuple[Any, ...]]] = []

    def noting(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            calls.append((function.node, arguments))
            return function(*arguments)

        return call

    with ExitStack() as patches:
        for found in pkgutil.iter_modules(meme_kernels.__path__):
            module = importlib.import_module(f"meme_kernels.{found.name}")
            for name, function in vars(module).copy().items():
                if hasattr(function, "node"):
                    patches.enter_context(mock.patch.object(module, name, noting(function)))
        yield calls
