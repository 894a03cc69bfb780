"""Laws that only a GPU can break: repeats under load, CUDA graphs, memory, and tensors on another device than the current one."""

import pytest
import torch

from tests.kernels.catalogue import (
    DEVICE,
    OPS,
    Pair,
    answer,
    bits,
    change,
    every_case,
    leaves,
    most_bytes,
    outputs,
    smallest_cases,
    tensors,
)

pytestmark = pytest.mark.gpu


@every_case
def test_twenty_repeats_agree_bit_for_bit(pair: Pair) -> None:
    case = pair.case()
    first = answer(pair.op.call, case)
    for _ in range(20):
        again = answer(pair.op.call, case)
        for a, b in zip((*first.values, *first.gradients), (*again.values, *again.gradients), strict=True):
            assert torch.equal(bits(a), bits(b))


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # of a case without elements
@every_case
def test_a_replayed_cuda_graph_reads_its_inputs_anew(pair: Pair) -> None:
    """Noise too: a seed or counter is a tensor, so a replay with another one in its place gives other draws."""
    case, other = pair.case(), change(pair.case(), _other)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # compiled outside the capture
        for _ in range(2):
            answer(pair.op.call, case)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = answer(pair.op.call, case, [torch.ones_like(y) for y in outputs(pair.op.call, case)])
    for x, y in zip(tensors(case), tensors(other), strict=True):
        x.detach().copy_(y)
    graph.replay()
    expected = answer(pair.op.call, other, [torch.ones_like(y) for y in captured.values])
    for a, b in zip((*captured.values, *captured.gradients), (*expected.values, *expected.gradients), strict=True):
        assert torch.equal(bits(a), bits(b))


def _other(x: torch.Tensor) -> torch.Tensor:
    """Other numbers of the same kind: the rows in reverse."""
    return x.flip(-1) if x.dim() else x + 1 if not x.is_floating_point() and x.dtype != torch.bool else x


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_a_pass_holds_little_more_than_what_it_reads_and_writes_and_states(op) -> None:
    case = next(iter(op.cases("paper", DEVICE, torch.float32)))
    answer(op.call, case)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    answer(op.call, case)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= most_bytes(op, case)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
@smallest_cases(1)
def test_tensors_need_not_be_on_the_current_device(pair: Pair) -> None:
    torch.cuda.set_device(0)
    here, there = pair.case(), change(pair.case(), lambda x: x.to("cuda:1"))
    for a, b in zip(answer(pair.op.call, here), answer(pair.op.call, there), strict=True):
        assert all(torch.equal(bits(x), bits(y.to(x.device))) for x, y in zip(a, b, strict=True))
    assert torch.cuda.current_device() == 0 and all(x.is_cuda for x in leaves(there))
