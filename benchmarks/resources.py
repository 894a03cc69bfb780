"""What the kernels cost before any GPU runs them: registers, spills, shared memory, vector width and instructions, compiled ahead of time.

No signature is written by hand. Every op is called on the meta device, forward and backward; each launch is caught, and Triton's own binder
says what it would compile for a target: types, divisibility by 16, arguments that are 1. The table is kernels/resources.json, one kernel,
target and type a line, so that a change in a kernel is a change in a line.

`python -m benchmarks.resources` prints it, `--write` replaces the file; it holds for the Triton version it names.
"""

import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.utils._pytree import tree_leaves
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

import meme_kernels
from meme_kernels._op import Case, FusedOp, backend

TABLE = Path(meme_kernels.__file__).parents[1] / "resources.json"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class Launch(NamedTuple):
    """A kernel and what it was launched with."""

    kernel: JITFunction
    arguments: tuple[Any, ...]
    options: dict[str, Any]


# ---- from an op to its launches ------------------------------------------------------------------------------------------------------


def ops() -> list[FusedOp]:
    """Every op, by name."""
    modules = [importlib.import_module(f"meme_kernels.{found.name}") for found in pkgutil.iter_modules(meme_kernels.__path__)]
    return sorted((module.OP for module in modules if hasattr(module, "OP")), key=lambda op: op.name)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Within it launches are noted, not run."""
    launches: list[Launch] = []

    def note(kernel: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append(Launch(kernel, arguments, options))

    with mock.patch.object(JITFunction, "run", note), backend("triton"):
        yield launches


def launches(op: FusedOp, case: Case) -> list[Launch]:
    """What a forward and a backward pass of this call launch."""
    with recorded() as found:
        values = op.call(*case.arguments, **case.settings)
        values = [y for y in (values if isinstance(values, tuple) else (values,)) if y.requires_grad]
        inputs = [x for x in tree_leaves((case.arguments, case.settings)) if isinstance(x, Tensor) and x.requires_grad]
        if values:
            torch.autograd.grad(values, inputs, [torch.empty_like(y) for y in values], allow_unused=True)
    return found


def compiled(launch: Launch, target: GPUTarget) -> Any:
    """The launch as Triton would compile it on that target."""
    kernel, maker = launch.kernel, make_backend(target)
    bound, specialization, options = create_function_from_signature(kernel.signature, kernel.params, maker)(
        *launch.arguments, **launch.options
    )
    parsed, signature, constants, attributes = kernel._pack_args(maker, launch.options, bound, specialization, options)
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=parsed.__dict__)


# ---- from a kernel's code to numbers -------------------------------------------------------------------------------------------------


def read(kernel: Any) -> dict[str, int]:
    """Registers a thread, spilled bytes, shared bytes, global loads and stores (all, and of 16 bytes), instructions."""
    return _read_nvidia(kernel) if kernel.metadata.target.backend == "cuda" else _read_amd(kernel.asm["amdgcn"])


def _read_nvidia(kernel: Any) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _output(knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        code = _output(knobs.nvidia.nvdisasm.path, "-c", "-ndf", file.name)  # the analysis of jumps is a quarter of its time
    instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code)
    local = [name for name in instructions if name.startswith(("LDL", "STL"))]
    return {
        "registers": int(_first(r"REG:(\d+)", usage)),
        "spilled": _spilled(kernel) if local else 0,
        "shared": kernel.metadata.shared,
        **_widths(instructions, load=r"LDG\.", store=r"STG\.", wide=r".*\.128"),
        "instructions": sum(name != "NOP" for name in instructions),
    }


def _spilled(kernel: Any) -> int:
    """Bytes that ptxas says it spills: local memory alone is no spill, an indexed table lives there too."""
    ptxas = knobs.nvidia.ptxas_blackwell if kernel.metadata.target.arch >= 100 else knobs.nvidia.ptxas
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(kernel.asm["ptx"])
        file.flush()
        architecture = _first(r"\.target\s+(sm_\w+)", kernel.asm["ptx"])
        log = _output(ptxas.path, "-v", f"--gpu-name={architecture}", file.name, "-o", "/dev/null")
    return int(_first(r"(\d+) bytes spill stores", log)) + int(_first(r"(\d+) bytes spill loads", log))


def _read_amd(code: str) -> dict[str, int]:
    instructions = re.findall(r"^\s+([a-z]+_[a-z0-9_]+)\b", code, re.MULTILINE)
    return {
        "registers": int(_first(r"\.vgpr_count:\s+(\d+)", code)),
        "spilled": 4 * int(_first(r"\.vgpr_spill_count:\s+(\d+)", code)),  # scalar registers move to vector lanes, not to memory
        "shared": int(_first(r"\.group_segment_fixed_size:\s+(\d+)", code)),
        **_widths(instructions, load="(?:global|buffer)_load_", store="(?:global|buffer)_store_", wide=".*dwordx4"),
        "instructions": sum(name.startswith(("s_", "v_", "global_", "buffer_", "ds_", "flat_", "scratch_")) for name in instructions),
    }


def _widths(instructions: Sequence[str], *, load: str, store: str, wide: str) -> dict[str, int]:
    found = {"loads": [x for x in instructions if re.match(load, x)], "stores": [x for x in instructions if re.match(store, x)]}
    counts = {}
    for name, instructions in found.items():
        counts |= {name: len(instructions), f"wide_{name}": sum(bool(re.match(wide, x)) for x in instructions)}
    return counts


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    assert found, f"{pattern!r} is not in {text[:200]!r}"
    return found[1]


# ---- the table ----------------------------------------------------------------------------------------------------------------------


def rows(op: FusedOp, targets: Sequence[str] = tuple(TARGETS)) -> list[dict[str, Any]]:
    """What each kernel of an op costs: float32 on all `targets` at the first large case, on one a maker at others; bfloat16 on sm_90."""
    wanted = [(case, "float32", ("sm_90", "gfx942") if i else targets) for i, case in enumerate(_large(op, torch.float32))]
    wanted += [(case, "bfloat16", ("sm_90",)) for case in _large(op, torch.bfloat16)[:1]]
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for case, dtype, names in wanted:
        for launch in launches(op, case):
            for name in names:
                kernel = compiled(launch, TARGETS[name])
                if (kernel.hash, name) not in found:  # the same kernel may be launched again, and in another case too
                    label = {"op": op.name, "kernel": launch.kernel.__name__, "dtype": dtype, "case": case.label, "blocks": _blocks(launch)}
                    found[kernel.hash, name] = {**label, "target": name, "warps": kernel.metadata.num_warps, **read(kernel)}
    return sorted(found.values(), key=lambda row: [str(value) for value in row.values()])


def _large(op: FusedOp, dtype: torch.dtype) -> list[Case]:
    return list(op.cases("large", torch.device("meta"), dtype))


def _blocks(launch: Launch) -> str:
    """The whole numbers among a launch's compile-time constants."""
    named = {name: value for name, value in launch.options.items() if type(value) is int and name in launch.kernel.arg_names}
    return " ".join(f"{name}={value}" for name, value in named.items())


def written(table: Iterable[dict[str, Any]]) -> str:
    """The file's text: the version of Triton, then a line for each row."""
    lines = ",\n".join("  " + json.dumps(row) for row in table)
    return f'{{"triton": "{triton.__version__}", "rows": [\n{lines}\n]}}\n'


def committed() -> dict[str, Any]:
    """The file's content: `triton`, a version, and `rows`."""
    return json.loads(TABLE.read_text())


def main(arguments: Sequence[str]) -> None:
    """Print the table; with --write, replace the file as well."""
    table = [row for op in ops() for row in rows(op)]
    for row in table:
        print(" ".join(f"{name}={value}" if type(value) is int else str(value) for name, value in row.items()))
    if "--write" in arguments:
        TABLE.write_text(written(table))


if __name__ == "__main__":
    main(sys.argv[1:])
