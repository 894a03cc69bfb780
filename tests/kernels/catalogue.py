"""What the laws of every op quantify over: the ops, their tiny cases, and how far an answer may be from the float64 one."""

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import meme_kernels
from meme_kernels._op import Case, FusedOp
from meme_kernels._triton import INTERPRETED

LANE = "interpreter" if INTERPRETED else "gpu" if torch.cuda.is_available() else "plain"
DEVICE = torch.device("cuda" if LANE == "gpu" else "cpu")


def _ops() -> Iterator[FusedOp]:
    for module in pkgutil.iter_modules(meme_kernels.__path__):
        op = getattr(importlib.import_module(f"meme_kernels.{module.name}"), "OP", None)
        if op is not None:
            yield op


OPS = list(_ops())


class Pair(NamedTuple):
    """One op and one of its tiny cases, made anew for each test."""

    op: FusedOp
    index: int

    def case(self, dtype: torch.dtype = torch.float32, device: torch.device = DEVICE) -> Case:
        """The case's tensors, the same numbers each time."""
        torch.manual_seed(0)
        return list(self.op.cases("tiny", device, dtype))[self.index]


def _pairs() -> Iterator[tuple[Pair, str, int]]:
    for op in OPS:
        for index, case in enumerate(op.cases("tiny", DEVICE, torch.float32)):
            yield Pair(op, index), f"{op.name}: {case.label}", sum(x.numel() for x in tensors(case))


def tensors(case: Case) -> list[Tensor]:
    """Every tensor of a case, in arguments and settings."""
    return [x for x in tree_leaves((case.arguments, case.settings)) if isinstance(x, Tensor)]


def leaves(case: Case) -> list[Tensor]:
    """Those that require a gradient."""
    return [x for x in tensors(case) if x.requires_grad]


_ALL = sorted(_pairs(), key=lambda entry: entry[0].op.name)  # stable: cases stay in their order


def every_case(test: Callable[..., Any]) -> Callable[..., Any]:
    """Run a test for every op and tiny case, as `pair`."""
    return pytest.mark.parametrize("pair", [pytest.param(pair, id=name) for pair, name, _ in _ALL])(test)


def smallest_cases(count: int, *, stopped: bool = True) -> Callable[..., Any]:
    """Run a test for each op's smallest cases whose axes differ, as `pair`: for laws that call an op many times.

    Without `stopped`, only cases whose gradient is that of their value: none of it is stopped on purpose.
    """
    chosen = []
    for op in OPS:
        mine = [(size, name, pair) for pair, name, size in _ALL if pair.op is op and _telling(pair)]
        mine = [entry for entry in mine if stopped or not _stops(entry[2])]
        chosen += [pytest.param(pair, id=name) for _, name, pair in sorted(mine, key=lambda entry: entry[0])[:count]]
    return pytest.mark.parametrize("pair", chosen)


@cache
def _stops(pair: Pair) -> bool:
    """A gradient is stopped by the op's own definition, so difference quotients are not the gradient."""
    case = pair.case()
    weights = case.settings.get("estimator") in ("released", "rao_blackwell")
    return case.settings.get("path_gradient", False) or case.settings.get("stop_gradient", weights)


@cache
def _telling(pair: Pair) -> bool:
    """Two axes that could be confused would show: none is empty, and two lengths above 1 occur."""
    sizes = {size for x in tensors(pair.case()) for size in x.shape}
    return 0 not in sizes and len(sizes - {1}) > 1


# ---- calling --------------------------------------------------------------------------------------------------------------------


def replace(case: Case, function: Callable[[Tensor], Tensor]) -> Case:
    """The case with each tensor through `function`."""

    def one(x: Any) -> Any:
        return function(x) if isinstance(x, Tensor) else x

    return Case(case.label, tree_map(one, case.arguments), tree_map(one, case.settings))


def change(case: Case, function: Callable[[Tensor], Tensor]) -> Case:
    """The case with new leaves: each tensor through `function`, requiring a gradient where it did."""
    return replace(case, lambda x: function(x.detach()).requires_grad_(x.requires_grad))


def cast(case: Case, dtype: torch.dtype) -> Case:
    """The case with its floating numbers in another type."""
    return change(case, lambda x: x.to(dtype) if x.is_floating_point() else x)


def double(case: Case) -> Case:
    """The case with the same numbers in float64."""
    return cast(case, torch.float64)


def outputs(function: Callable[..., Any], case: Case) -> tuple[Tensor, ...]:
    """What a function gives for the case, always as a tuple."""
    values = function(*case.arguments, **case.settings)
    return values if isinstance(values, tuple) else (values,)


class Answer(NamedTuple):
    """Values, and the gradients of the leaves (zeros where nothing depends on one)."""

    values: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]


def answer(function: Callable[..., Any], case: Case, upstream: Sequence[Tensor] | None = None) -> Answer:
    """Value and gradients of a function; `upstream` are the gradients of its outputs, `drawn_like` them by default."""
    values = outputs(function, case)
    given = drawn_like(values) if upstream is None else upstream
    sent = [(y, g.to(y.dtype)) for y, g in zip(values, given, strict=True) if y.requires_grad]
    inputs = leaves(case)
    if not sent:
        return Answer(values, tuple(torch.zeros_like(x) for x in inputs))
    found = torch.autograd.grad([y for y, _ in sent], inputs, [g for _, g in sent], allow_unused=True)
    gradients = tuple(torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True))
    return Answer(tuple(y.detach() for y in values), gradients)


def drawn_like(values: Sequence[Tensor]) -> list[Tensor]:
    """Gradients to send back: the same in every call and in every type."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(y.shape, generator=generator).to(y.device) for y in values]


def bits(x: Tensor) -> Tensor:
    """A tensor's bits as integers, for comparisons in which NaN equals itself and -0 is not 0."""
    return x.detach().contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


# ---- memory -------------------------------------------------------------------------------------------------------------------------


class Peak(TorchDispatchMode):
    """Most bytes alive at a time among those that operations made."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), settings: Any = None) -> Any:
        made = function(*arguments, **(settings or {}))
        for y in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(y, Tensor):
                storage = y.untyped_storage()
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {at: entry for at, entry in self.alive.items() if not entry[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return made


def most_bytes(op: FusedOp, case: Case) -> int:
    """What a forward and a backward pass may hold: inputs, outputs and gradients once; the upstream gradient; as much again for copies,
    statistics and partial sums; and the workspace that the op states."""
    forward, backward = (op.cost(*case.arguments, **case.settings, backward=way) for way in (False, True))
    return 2 * (forward.read + forward.written + backward.written) + op.workspace(*case.arguments, **case.settings) + 2**20


# ---- how far an answer may be from the float64 one ----------------------------------------------------------------------------------


def tolerance(dtype: torch.dtype, length: int) -> tuple[float, float]:
    """The relative error of rounding once to `dtype`, and that of a sum of `length` terms in the type sums are kept in.

    Twice eps for the first, since the interpreter cuts where hardware rounds; four standard deviations of a random walk of roundings for
    the second.
    """
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    return 2 * torch.finfo(dtype).eps, 4 * torch.finfo(sums).eps * max(length, 1) ** 0.5


def assert_close(actual: Tensor, expected: Tensor, *, length: int, what: str, slack: float = 0.0) -> None:
    """Each element within tolerance of the float64 one: rounding relative to the element, summation to the size of its neighbours and to 1.

    `slack` is an absolute error that the formula itself makes in the type sums are kept in, however it is computed.
    """
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if not actual.numel():
        return
    rounding, summing = tolerance(actual.dtype, length)
    rounded = expected.to(actual.dtype).double()  # infinite where it leaves the type's range
    finite = rounded.isfinite()
    size = expected.where(finite, 0.0).abs()
    allowed = rounding * size + summing * (size + size.square().mean().sqrt()) + slack + _least(actual.dtype)
    error = (actual.double() - expected).abs().where(finite, 0.0)
    same = torch.where(finite, error <= allowed, (actual.double() == rounded) | (actual.isnan() & rounded.isnan()))
    if not bool(same.all()):
        worst = int(torch.where(same, -1.0, torch.nan_to_num(error / allowed, nan=torch.inf)).argmax())
        at = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), actual.shape))
        got, wanted, room = (x.flatten()[worst].item() for x in (actual, expected, allowed))
        raise AssertionError(f"{what}{list(at)}: {got}, expected {wanted} +- {room:.2e}; {int((~same).sum())} of {same.numel()} differ")


def _least(dtype: torch.dtype) -> float:
    """What terms of size 1 that cancel leave of a sum; a 16-bit type rounds to multiples of its own smallest number too."""
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.finfo(sums).eps + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def assert_answers(op: FusedOp, actual: Answer, case: Case) -> None:
    """Value and gradients equal those of the naive formula in float64 at the same (rounded) inputs."""
    wide = torch.float64 if any(x.dtype == torch.float64 for x in tensors(case)) else torch.float32
    exact, rough = answer(op.naive, double(case)), answer(op.naive, cast(case, wide))
    forward, backward = (op.cost(*case.arguments, **case.settings, backward=way).flops for way in (False, True))
    length = forward // max(sum(y.numel() for y in actual.values), 1)
    for i, (y, right, near) in enumerate(zip(actual.values, exact.values, rough.values, strict=True)):
        assert y.dtype == (wide if y.is_floating_point() else y.dtype), f"value {i}: {y.dtype}, expected {wide}"
        assert_close(y, right, length=length, what=f"value {i}", slack=_slack(near, right))
    for i, (x, g) in enumerate(zip(leaves(case), actual.gradients, strict=True)):
        assert g.dtype == x.dtype, f"gradient {i}: {g.dtype}, expected {x.dtype}"
        right, length = exact.gradients[i], backward // max(g.numel(), 1)
        assert_close(g, right, length=length, what=f"gradient {i}", slack=_slack(rough.gradients[i], right))


def _slack(near: Tensor, right: Tensor) -> float:
    """Four times the largest error that the naive formula itself makes in the type that sums are kept in."""
    error = (near.double() - right).abs()
    error = error[error.isfinite()]
    return 4 * error.max().item() if error.numel() else 0.0
