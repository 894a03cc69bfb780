"""A checking mode of the Triton interpreter: within `sanitize()` every launch on CPU tensors is watched, and what it did is reported.

It raises for int32 overflow, for a failed device_assert and for an active lane outside the storages that were passed. It fills the lanes
that a mask switches off with NaN (the largest number for integers) where a load gives no `other`, and counts such loads. It records races
between programs, reads of what another program wrote, atomics, and the bytes that loads and stores requested. `order` runs a launch's
programs in another order. `virtual=True` takes tensors on the meta device: addresses are checked, no memory is touched, and only some
programs run, so that tensors beyond 2**31 elements cost nothing.

TRITON_INTERPRET=1 must be set before the kernels are imported. Works with Triton 3.6 to 3.9.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple
from unittest import mock

import numpy as np
import torch
from triton.runtime import interpreter

Order = Literal["forward", "reversed", "shuffled"]
FAULTS = ("races", "order_dependent", "atomics", "without_other")
SOME = 2  # programs at each end of the grid that a virtual launch runs


class Access(NamedTuple):
    """One load or store instruction of one program: the addresses of its active lanes."""

    addresses: np.ndarray
    size: int
    program: int


@dataclasses.dataclass
class Launch:
    """What one launch did."""

    kernel: str
    storages: list[tuple[int, int]]
    loads: list[Access] = dataclasses.field(default_factory=list)
    stores: list[Access] = dataclasses.field(default_factory=list)
    atomics: int = 0
    without_other: int = 0  # loads that a mask cut and that say nothing of the lanes it cut
    programs: int = 0

    @property
    def races(self) -> int:
        """How often a program stored where another one had stored."""
        addresses, programs = _flat(self.stores)
        order = np.lexsort((programs, addresses))
        addresses, programs = addresses[order], programs[order]
        return int(((addresses[1:] == addresses[:-1]) & (programs[1:] != programs[:-1])).sum())

    @property
    def order_dependent(self) -> int:
        """How many loads were from where another program stored, before or after."""
        read, reader = _flat(self.loads)
        written, writer = _flat(self.stores)
        places, owner = np.unique(written, return_inverse=True)
        if not len(places):
            return 0
        first, last = np.full(len(places), np.iinfo(np.int64).max), np.full(len(places), -1)
        np.minimum.at(first, owner, writer)
        np.maximum.at(last, owner, writer)
        at = np.minimum(np.searchsorted(places, read), len(places) - 1)
        return int(((places[at] == read) & ((first[at] != reader) | (last[at] != reader))).sum())


@dataclasses.dataclass
class Report:
    """The launches within one `sanitize()`, in order."""

    launches: list[Launch] = dataclasses.field(default_factory=list)

    @property
    def faults(self) -> dict[str, dict[str, int]]:
        """Kernel -> what it must not do and did; empty where all is well."""
        found = {}
        for launch in self.launches:
            counts = {name: getattr(launch, name) for name in FAULTS}
            if any(counts.values()):
                found[launch.kernel] = counts
        return found

    @property
    def requested(self) -> tuple[int, int]:
        """Bytes that loads asked for and stores wrote, counting each time."""
        return tuple(sum(a.addresses.size * a.size for launch in self.launches for a in accesses(launch)) for accesses in _BOTH)  # type: ignore[return-value]

    @property
    def distinct(self) -> tuple[int, int]:
        """Bytes read and written, counting each address once a launch."""
        return tuple(sum(_distinct(accesses(launch)) for launch in self.launches) for accesses in _BOTH)  # type: ignore[return-value]


_BOTH: Sequence[Callable[[Launch], list[Access]]] = (lambda launch: launch.loads, lambda launch: launch.stores)


def _flat(accesses: Sequence[Access]) -> tuple[np.ndarray, np.ndarray]:
    addresses = [a.addresses for a in accesses] or [np.empty(0, np.uint64)]
    programs = [np.full(a.addresses.size, a.program, np.int64) for a in accesses] or [np.empty(0, np.int64)]
    return np.concatenate(addresses), np.concatenate(programs)


def _distinct(accesses: Sequence[Access]) -> int:
    sizes = {a.size for a in accesses}
    return sum(np.unique(np.concatenate([a.addresses for a in accesses if a.size == size])).size * size for size in sizes)


@contextmanager
def sanitize(order: Order = "forward", virtual: bool = False) -> Iterator[Report]:
    """Watch every launch within. Raises (as an InterpreterError of Triton) at the first fault that has a place in the code."""
    watch = _Watch(order, virtual)
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    patches = {name: getattr(watch, name) for name in ("create_masked_load", "create_masked_store", "set_grid_dim", "set_grid_idx")}
    patches |= {name: watch.atomic(getattr(builder, name)) for name in dir(builder) if name.startswith("create_atomic")}
    with mock.patch.multiple(builder, **{name: _method(patch) for name, patch in patches.items()}):
        with mock.patch.multiple(
            executor, __call__=_method(watch.run), _init_args_hst=_method(watch.arguments), _restore_args_dev=_method(watch.restore)
        ):
            # debug: device_assert is live, and integer arithmetic asserts that it does not overflow
            options = dataclasses.replace(interpreter.interpreter_builder.options, debug=True)
            with mock.patch.object(interpreter.interpreter_builder, "options", options):
                yield watch.report


def _method(function: Callable[..., Any]) -> Callable[..., Any]:
    """A bound method as a plain function, so that it receives the patched class's instance too."""
    return lambda *arguments, **settings: function(*arguments, **settings)


class _Watch:
    def __init__(self, order: Order, virtual: bool) -> None:
        self.report, self.order, self.virtual = Report(), order, virtual
        self.grid: tuple[int, ...] = ()
        self.chosen: Sequence[int] = ()
        self.program = 0
        builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
        self.real_load, self.real_store = builder.create_masked_load, builder.create_masked_store
        self.real_run, self.real_arguments, self.real_restore = executor.__call__, executor._init_args_hst, executor._restore_args_dev

    # ---- a launch: its arguments, and its programs in the order asked for --------------------------------------------------------

    def run(self, executor: Any, *arguments: Any, **settings: Any) -> None:
        """The executor walks a grid as long as the programs to run; set_grid_idx below turns its place in it into a program."""
        self.grid = (*executor.grid, 1, 1)[:3]
        self.chosen = self._choose(int(np.prod(self.grid, dtype=np.int64)))
        executor.grid = (len(self.chosen),)
        self.real_run(executor, *arguments, **settings)

    def _choose(self, programs: int) -> Sequence[int]:
        if self.virtual:
            return sorted({*range(min(SOME, programs)), *range(max(programs - SOME, 0), programs)})
        if self.order == "shuffled":
            return np.random.default_rng(programs).permutation(programs).tolist()
        return range(programs)[::-1] if self.order == "reversed" else range(programs)

    def set_grid_dim(self, builder: Any, *_: int) -> None:
        builder.grid_dim = self.grid

    def set_grid_idx(self, builder: Any, place: int, *_: int) -> None:
        self.program = self.chosen[place]
        builder.grid_idx = tuple(int(i) for i in np.unravel_index(self.program, self.grid))
        self.report.launches[-1].programs += 1

    def arguments(self, executor: Any, arguments: Sequence[Any], settings: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        launch = Launch(executor.fn.__name__, [])
        self.report.launches.append(launch)
        if self.virtual:
            base = _Addresses(launch.storages)
            return [base(x) for x in arguments], {name: base(x) for name, x in settings.items()}
        for x in (*arguments, *settings.values()):
            for y in x if isinstance(x, tuple) else (x,):
                if isinstance(y, torch.Tensor):
                    storage = y.untyped_storage()
                    launch.storages.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
        return self.real_arguments(executor, arguments, settings)

    def restore(self, executor: Any, *arguments: Any) -> None:
        if not self.virtual:
            self.real_restore(executor, *arguments)

    # ---- what a program does to memory ---------------------------------------------------------------------------------------

    def create_masked_load(self, builder: Any, pointers: Any, mask: Any, other: Any, *rest: Any) -> Any:
        self.report.launches[-1].loads.append(self._access("load", pointers, mask))
        cut = not mask.data.all()
        # Of one number, `other=0.0` is false to Triton's own `if other`, so it gets here as none at all.
        silent = other is None and pointers.data.size > 1
        self.report.launches[-1].without_other += silent and cut
        kind = pointers.get_element_ty()
        dtype = interpreter._get_np_dtype(kind)
        if self.virtual:  # ones stand for what memory would hold
            shape = np.broadcast_shapes(pointers.data.shape, mask.data.shape)
            off = _poison(dtype, kind) if other is None else other.data.view(dtype)
            return interpreter.TensorHandle(np.where(np.broadcast_to(mask.data, shape), np.ones((), dtype), off), kind)
        loaded = self.real_load(builder, pointers, mask, other, *rest)
        if silent and cut:
            off = ~np.broadcast_to(mask.data.astype(bool), loaded.data.shape)
            loaded = interpreter.TensorHandle(np.where(off, _poison(dtype, kind), loaded.data), kind)
        return loaded

    def create_masked_store(self, builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        self.report.launches[-1].stores.append(self._access("store", pointers, mask))
        return None if self.virtual else self.real_store(builder, pointers, value, mask, *rest)

    def atomic(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            self.report.launches[-1].atomics += 1
            return real(*arguments)

        return counted

    def _access(self, what: str, pointers: Any, mask: Any) -> Access:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        shape = np.broadcast_shapes(pointers.data.shape, mask.data.shape)
        addresses = np.broadcast_to(pointers.data, shape)[np.broadcast_to(mask.data.astype(bool), shape)]
        launch = self.report.launches[-1]
        inside = np.zeros(addresses.shape, bool)
        for start, end in launch.storages:
            inside |= (addresses >= np.uint64(start)) & (addresses + np.uint64(size) <= np.uint64(end))
        if not inside.all():
            lanes = int((~inside).sum())
            raise IndexError(f"{launch.kernel}: {what} out of bounds in program {self.program}: {lanes} of {addresses.size} active lanes")
        return Access(addresses, size, self.program)


def _poison(dtype: Any, kind: Any) -> np.ndarray:
    """What a masked load without `other` gives."""
    if kind.name == "bf16":  # the interpreter keeps its bits in uint16
        return np.array(0x7FC0, dtype)
    if np.dtype(dtype).kind in "iu":
        return np.array(np.iinfo(dtype).max, dtype)
    return np.array(np.nan, dtype)  # True for booleans


class _Pointer:
    """What the interpreter needs of a tensor: an address and a type."""

    def __init__(self, address: int, dtype: torch.dtype) -> None:
        self.address, self.dtype = address, dtype

    def data_ptr(self) -> int:
        return self.address


class _Addresses:
    """Gives each storage of a launch on the meta device an address range of its own, far from every other."""

    def __init__(self, ranges: list[tuple[int, int]]) -> None:
        self.ranges, self.known = ranges, {}

    def __call__(self, x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(self(y) for y in x)
        if not isinstance(x, torch.Tensor):
            return x
        storage = x.untyped_storage()
        start = self.known.setdefault(storage._cdata, (len(self.known) + 1) << 44)
        self.ranges.append((start, start + storage.nbytes()))
        return _Pointer(start + x.storage_offset() * x.element_size(), x.dtype)
