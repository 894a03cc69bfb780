"""`pytest benchmarks/`: each op, provider and mode at the op's small cases, comparable between commits.

pytest benchmarks/ --benchmark-autosave            once on one commit, then on the other:
pytest benchmarks/ --benchmark-compare --benchmark-compare-fail=median:10%
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import torch

from benchmarks.gate import Gate
from benchmarks.providers import GRAPH, MODES, differentiable, ops, prepare, providers
from benchmarks.timing import synchronize

pytest.importorskip("pytest_benchmark")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OPS = ops()


def _parameters() -> Iterator[Any]:
    for name, op in OPS.items():
        for index, case in enumerate(op.cases("small", torch.device("meta"), torch.float32)):
            for provider in providers(op, DEVICE, compiled=False).keys() - {GRAPH}:
                for mode in MODES if differentiable(case) else MODES[:1]:
                    yield pytest.param(name, index, provider, mode, id=f"{name}-{case.label}-{mode}-{provider}".replace(" ", ","))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.mark.parametrize("name", OPS)
def test_every_provider_gives_what_the_naive_form_gives_in_float64(name):
    gate = Gate(OPS[name], providers(OPS[name], DEVICE, compiled=False))
    assert gate.small(DEVICE), gate.faults


@pytest.mark.benchmark(max_time=0.1, min_rounds=3, warmup=True, warmup_iterations=2)
@pytest.mark.parametrize(("name", "index", "provider", "mode"), sorted(_parameters(), key=lambda parameter: parameter.id))
def test_kernel(benchmark, name, index, provider, mode):
    case = next(islice(OPS[name].cases("small", DEVICE, torch.float32), index, None))
    call = prepare(providers(OPS[name], DEVICE, compiled=False)[provider], case, mode)

    def timed() -> None:
        call()
        synchronize()

    benchmark.group = f"{name} {case.label} {mode}"
    benchmark(timed)
