"""What every kernel file shares: which implementation runs, how a launch meets autograd and torch.compile, what an op says of itself.

The device switch stands outside the op, in Python: CPU tensors take the reference, which torch.compile can trace; CUDA tensors take the
Triton kernels, raw in eager mode and as one opaque node under torch.compile. No other arrangement works on a machine without a GPU too.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor

from meme_kernels._triton import ABSENT, INTERPRETED

Backend = Literal["auto", "reference", "triton"]
Size = Literal["tiny", "small", "paper", "large"]
F = TypeVar("F", bound=Callable[..., Any])

_backend: Backend = "auto"


@contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Within it every op runs this implementation: `auto` (Triton for CUDA tensors where it is installed), `reference` or `triton`.

    Raises ValueError for another name, RuntimeError for `triton` where it is not installed.
    """
    global _backend
    if name not in get_args(Backend):
        raise ValueError(f"backend: expected one of {', '.join(get_args(Backend))}, got {name!r}")
    if name == "triton" and ABSENT:
        raise RuntimeError(f"backend('triton'): Triton cannot be imported ({ABSENT}); pip install -e '.[triton]' in the project's folder")
    before, _backend = _backend, name
    try:
        yield
    finally:
        _backend = before


def uses_triton(*tensors: Tensor | None) -> bool:
    """Whether a call with these tensors launches kernels. Raises ValueError for tensors on two devices, RuntimeError for CPU tensors when
    Triton was asked for (unless TRITON_INTERPRET=1, where the real kernels run on them, slowly)."""
    devices = {x.device for x in tensors if x is not None}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, got {', '.join(sorted(map(str, devices)))}")
    kind = next(iter(devices)).type
    if _backend == "triton" and kind == "cpu" and not INTERPRETED:
        raise RuntimeError(
            "backend('triton'): the tensors are on the CPU; move them to a GPU, or set TRITON_INTERPRET=1 to test kernels there"
        )
    return _backend == "triton" or (_backend == "auto" and kind == "cuda" and ABSENT is None)


def run(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch on the device of the tensors, which need not be the current one; nothing is launched for an empty grid."""
    if 0 in grid:
        return
    options["enable_fp_fusion"] = True  # Triton's default so far; 3.9 warns that 3.10 has another
    device = next(x.device for x in arguments if isinstance(x, Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*arguments, **options)
    else:
        kernel[grid](*arguments, **options)


def opaque(fake: Callable[..., Any]) -> Callable[[F], F]:
    """Decorate a function of tensors and numbers that launches kernels: one graph node under torch.compile, called directly otherwise.

    `fake` has the same signature and allocates outputs of the right shapes and types.
    """

    def decorate(function: F) -> F:
        node = torch.library.custom_op(
            f"meme_kernels::{function.__module__.split('.')[-1]}_{function.__name__.strip('_')}", mutates_args=()
        )(function)
        node.register_fake(fake)

        def call(*arguments: Any) -> Any:
            return node(*arguments) if torch.compiler.is_compiling() else function(*arguments)

        call.node = node  # for opcheck
        return call  # type: ignore[return-value]

    return decorate


def through_reference(
    reference: Callable[..., Any], inputs: Sequence[Any], gradients: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """The reference's gradients, themselves differentiable: what a backward pass gives when a second derivative is asked for."""
    with torch.enable_grad():
        outputs = reference(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    pairs = [(y, g) for y, g in zip(outputs, gradients, strict=True) if g is not None and y.requires_grad]
    needed = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    found = iter(torch.autograd.grad([y for y, _ in pairs], needed, [g for _, g in pairs], create_graph=True, allow_unused=True))
    return tuple(next(found) if isinstance(x, Tensor) and x.requires_grad else None for x in inputs)


def sums_dtype(*tensors: Tensor) -> torch.dtype:
    """The type that sums are kept and returned in: float64 where an input is, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def check_row(row: Tensor | None, rows: int, what: str) -> None:
    """Raises ValueError for numbers that name none of so many rows, where looking at them does not stop a GPU or a compiler."""
    if row is not None and row.numel() and row.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (int(x) for x in row.aminmax())
        if low < 0 or high >= rows:
            raise ValueError(f"{what}: row: expected numbers of the {rows} rows, from 0 to {rows - 1}, got {low} to {high}")


def at_a_time(cached: int, device: torch.device) -> int:
    """How many elements a reference works on at a time: on a CPU what a core's cache holds, elsewhere what keeps a device busy."""
    return cached if device.type == "cpu" else 2**26


# ---- what an op says of itself: for the tests and benchmarks, which find every module's OP -----------------------------------------------


class Case(NamedTuple):
    """One call: tensors (leaves that require a gradient where the op has one) and keyword settings."""

    label: str
    arguments: tuple[Any, ...]
    settings: dict[str, Any]


class Cost(NamedTuple):
    """The least that one pass can cost: bytes read and written once, and floating point operations."""

    read: int
    written: int
    flops: int


def _no_workspace(*arguments: Any, **settings: Any) -> int:
    return 0


@dataclass(frozen=True, kw_only=True)
class FusedOp:
    """`call` is public and differentiable; `reference` the plain PyTorch specification with the same signature; `naive` the formula as
    it is commonly written, big tensors and all: the independent check and the baseline. `cases(size, device, dtype)` yields calls, `cost`
    prices one: cost(*arguments, backward=False, **settings). `workspace(*arguments, **settings)` is what the kernels' passes hold at most,
    in bytes, beyond twice what they read and write."""

    name: str
    call: Callable[..., Any]
    reference: Callable[..., Any]
    naive: Callable[..., Any]
    cases: Callable[[Size, torch.device, torch.dtype], Iterator[Case]]
    cost: Callable[..., Cost]
    workspace: Callable[..., int] = _no_workspace


def nbytes(*tensors: Tensor | None) -> int:
    """Bytes of these tensors, read or written once."""
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)
