"""The gate before the clock: a provider that gives other values or gradients than it should is not timed, nor is its op reported."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.providers import copied, cotangents_of, differentiable, outputs_of, smooth
from benchmarks.timing import seconds
from meme_kernels._op import Case, FusedOp

EXACT = 1e-4  # of the largest entry, against float64: float32 sums of some thousand terms
MEASURED = 1e-3  # between two float32 computations of up to some million terms, each in its own order


@dataclass
class Gate:
    """The providers of one op as they are tried: what was wrong, and how long each one's first call took, compiling included."""

    op: FusedOp
    functions: dict[str, Callable[..., Any]]
    faults: list[str] = field(default_factory=list)
    first: dict[tuple[str, str], float] = field(default_factory=dict)  # (provider, case) -> seconds of its forward and backward pass
    compared: bool = False

    def small(self, device: torch.device) -> bool:
        """Whether all providers agree with the naive form in float64 at the op's small cases; they are compared once."""
        if not self.compared:
            for case in self.op.cases("small", device, torch.float32):
                self._try(case, results(self.op.naive, copied(case, torch.float64)), EXACT)
            self.compared = True
        return not self.faults

    def measured(self, case: Case) -> dict[str, Callable[..., Any]]:
        """The providers that can compute this case, each compared with the reference."""
        return self._try(case, results(self.op.reference, case), MEASURED)

    def _try(self, case: Case, expected: dict[str, Tensor], tolerance: float) -> dict[str, Callable[..., Any]]:
        able = {}
        for name, function in self.functions.items():
            found: dict[str, Tensor] = {}
            title = f"{self.op.name} {case.label}, {name}"
            try:
                taken = seconds(lambda function=function, found=found: found.update(results(function, case)))
            except Exception as error:
                self._raised(title, name, error)
                continue
            able[name] = function
            self.first.setdefault((name, case.label), taken)
            self.faults += [f"{title}: {fault}" for fault in differences(found, expected, tolerance)]
        return able

    def _raised(self, title: str, name: str, error: Exception) -> None:
        """Too little memory, or a compiler that gives up, is a figure that is missing; anything else is a fault."""
        no_room = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        if name == "compiled" or no_room:
            print(f"{title}: left out, {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
        else:
            self.faults.append(f"{title}: raised {type(error).__name__}: {error}")


def results(function: Callable[..., Any], case: Case) -> dict[str, Tensor]:
    """Values and gradients of one call."""
    outputs = outputs_of(function(*case.arguments, **case.settings))
    found = {f"value {i}": y.detach() for i, y in enumerate(outputs) if isinstance(y, Tensor)}
    if ys := smooth(outputs):
        inputs = differentiable(case)
        gradients = torch.autograd.grad(ys, inputs, cotangents_of(outputs), allow_unused=True, materialize_grads=True)
        found |= {f"gradient {i}": g for i, g in enumerate(gradients)}
    return found


def differences(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> Iterator[str]:
    """One sentence for each value or gradient that is not the expected one."""
    if found.keys() != expected.keys():
        yield f"gives {', '.join(found)}, expected {', '.join(expected)}"
        return
    for name, x in found.items():
        y = expected[name]
        if x.shape != y.shape:
            yield f"{name} has shape {tuple(x.shape)}, expected {tuple(y.shape)}"
        elif not (error := _error(x.double(), y.double())) <= tolerance:  # NaN is a difference too
            yield f"{name} is off by {error:.1e} of its largest entry, allowed {tolerance:.0e}"


def _error(x: Tensor, y: Tensor) -> float:
    if not x.numel():
        return 0.0
    largest = torch.where(y.isfinite(), y, 0.0).abs().max().clamp_min(1e-30)
    return (torch.where(x == y, 0.0, (x - y).abs()).max() / largest).item()  # equal infinities are equal
