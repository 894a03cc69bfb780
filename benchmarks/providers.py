"""Who computes an op in a benchmark, and what one call of each is."""

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch._functorch.config
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import meme_kernels
from meme_kernels._op import Case, FusedOp, uses_triton

Mode = Literal["forward", "backward", "both"]
MODES: tuple[Mode, ...] = get_args(Mode)
GRAPH = "triton graph"


def ops() -> dict[str, FusedOp]:
    """Every op, from its file; modules without one (helpers) are passed over."""
    modules = (importlib.import_module(f"meme_kernels.{found.name}") for found in pkgutil.iter_modules(meme_kernels.__path__))
    return {module.OP.name: module.OP for module in modules if hasattr(module, "OP")}


def providers(op: FusedOp, device: torch.device, *, compiled: bool) -> dict[str, Callable[..., Any]]:
    """Name -> function of the op's arguments. The kernels run on CUDA tensors only; in a graph they are the same function, replayed.

    On a CPU the op is its reference's values, some with a gradient in closed form where autograd would hold more.
    """
    found = {"naive": op.naive, "reference": op.reference}
    if compiled:
        torch._functorch.config.donated_buffer = False  # the backward pass is timed on one retained graph
        torch._dynamo.config.recompile_limit = 64  # a compilation for each case, as for a fixed shape
        found["compiled"] = torch.compile(op.reference, dynamic=False)
    if uses_triton(torch.empty(0, device=device)):
        found |= {"triton": op.call, GRAPH: op.call}
    else:
        found["op"] = op.call
    return found


def differentiable(case: Case) -> list[Tensor]:
    """The arguments that a gradient is taken of."""
    return [x for x in tree_leaves(case.arguments) if isinstance(x, Tensor) and x.requires_grad]


def prepare(function: Callable[..., Any], case: Case, mode: Mode) -> Callable[[], Any]:
    """One call in this mode. A forward pass keeps what its gradient needs; a backward pass is taken from one forward pass each time."""
    inputs = differentiable(case)

    def forward() -> tuple[Any, ...]:
        return outputs_of(function(*case.arguments, **case.settings))

    def backward(outputs: tuple[Any, ...], cotangents: list[Tensor], keep: bool) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(smooth(outputs), inputs, cotangents, retain_graph=keep, allow_unused=True)

    if mode == "forward":
        return forward
    outputs = forward()
    cotangents = cotangents_of(outputs)
    if mode == "backward":
        return lambda: backward(outputs, cotangents, True)
    del outputs
    return lambda: backward(forward(), cotangents, False)


def copied(case: Case, dtype: torch.dtype | None = None) -> Case:
    """The same case in memory of its own, its floating tensors in this type."""

    def copy(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        other = x.detach().clone() if dtype is None or not x.is_floating_point() else x.detach().to(dtype, copy=True)
        return other.requires_grad_(x.requires_grad)

    return case._replace(arguments=tree_map(copy, case.arguments))


def outputs_of(found: Any) -> tuple[Any, ...]:
    """What a function returned, as a tuple."""
    return tuple(found) if isinstance(found, tuple) else (found,)


def smooth(outputs: tuple[Any, ...]) -> list[Tensor]:
    """The outputs that have a gradient."""
    return [y for y in outputs if isinstance(y, Tensor) and y.requires_grad]


def cotangents_of(outputs: tuple[Any, ...]) -> list[Tensor]:
    """Random, and the same for every provider and type."""
    ys = smooth(outputs)
    generator = torch.Generator(ys[0].device if ys else "cpu").manual_seed(0)
    return [torch.randn(y.shape, generator=generator, dtype=torch.float64, device=y.device).to(y.dtype) for y in ys]
