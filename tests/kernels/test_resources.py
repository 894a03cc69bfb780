"""What kernels cost, compiled ahead of time for GPUs that are not here: nothing spills, registers stay in budget, the table holds.

A process that interprets kernels cannot compile them, so these run in the plain lane. The oldest and the newest NVIDIA target take turns
among the ops: half a second of disassembling a kernel.
"""

from typing import Any

import pytest

from meme_kernels._triton import ABSENT, INTERPRETED

if ABSENT:
    pytest.skip(f"Triton cannot be imported: {ABSENT}", allow_module_level=True)
if INTERPRETED:
    pytest.skip("a process with TRITON_INTERPRET=1 cannot compile", allow_module_level=True)

import torch
import triton

from benchmarks.resources import TARGETS, committed, launches, ops, read, recorded, rows
from benchmarks.resources import compiled as compile_for
from meme_kernels import philox
from meme_kernels._op import Case, FusedOp
from meme_kernels.meme_bound import OP as MEME_BOUND
from meme_kernels.token_log_prob import OP as TOKEN_LOG_PROB

REGISTERS = 128  # of 255: two programs of four warps on every quarter of an SM's register file
ABOVE = {  # (op, kernel) -> its own budget, where more registers were worth it
    ("cross_log_prob", "forward_kernel"): 180,  # all N posteriors stay in registers: parameters are read once
    ("cross_log_prob", "backward_kernel"): 220,
    ("mixture_log_prob", "component_gradient_kernel"): 168,  # a patch of 4 x 8 a thread: fewer loads for each multiplication
}

each_op = pytest.mark.parametrize("op", ops(), ids=lambda op: op.name)
_compiled: dict[str, list[dict[str, Any]]] = {}


def targets(op: FusedOp) -> tuple[str, ...]:
    """Those that the op is compiled for here."""
    return ("sm_90", "gfx942", ("sm_80", "sm_100")[[each.name for each in ops()].index(op.name) % 2])


def compiled(op: FusedOp) -> list[dict[str, Any]]:
    """The op's rows, compiled once a process."""
    if op.name not in _compiled:
        _compiled[op.name] = rows(op, targets(op))
    return _compiled[op.name]


@each_op
def test_no_kernel_spills(op: FusedOp) -> None:
    assert not [row for row in compiled(op) if row["spilled"]]


def test_a_thousand_samples_of_a_source_do_not_spill() -> None:
    """They are one tile, of fewer rows: with 16 rows as for few samples 5,216 and 3,696 bytes."""
    device = torch.device("meta")
    table = torch.empty(2, 2, 1024, 256, device=device, requires_grad=True)
    present = torch.empty(2, 256, dtype=torch.bool, device=device)
    settings = {"estimator": "rao_blackwell", "cross_weight": 1.0}
    found = launches(MEME_BOUND, Case("", (table[0], table, table, present), settings))
    assert len(found) == 2 and not any(read(compile_for(launch, TARGETS["sm_90"]))["spilled"] for launch in found)


@pytest.mark.parametrize(("positions", "vocabulary"), [(32, 16), (64, 16), (128, 16), (64, 32), (32, 64), (16, 128), (1, 2048)])
def test_token_log_probs_by_row_compile_in_float64(positions: int, vocabulary: int) -> None:
    """The compiler gave 32 and 64 positions' masks, which come from two loads in turn, another layout than their pointers."""
    device = torch.device("meta")
    tokens = torch.empty(5, positions, dtype=torch.int64, device=device)
    row = torch.empty(1, dtype=torch.int64, device=device)
    logits = torch.empty(1, 1, positions, vocabulary, dtype=torch.float64, device=device, requires_grad=True)
    _, backward = launches(TOKEN_LOG_PROB, Case("", (tokens, logits, 0), {"row": row}))
    assert (backward.options["BC"], backward.options["BV"]) == (positions, vocabulary)
    compile_for(backward, TARGETS["sm_90"])


@each_op
def test_every_kernel_stays_within_its_registers(op: FusedOp) -> None:
    assert not [row for row in compiled(op) if row["registers"] > min(255, ABOVE.get((op.name, row["kernel"]), REGISTERS))]


@each_op
def test_the_committed_table_is_what_the_compiler_gives(op: FusedOp) -> None:
    table = committed()
    if triton.__version__ != table["triton"]:
        pytest.skip(f"the table is Triton {table['triton']}'s, this is {triton.__version__}")
    mine = [row for row in table["rows"] if row["op"] == op.name and row["target"] in targets(op)]
    assert mine == compiled(op), "kernels changed: look at the difference, then `python -m benchmarks.resources --write`"


@pytest.mark.parametrize("kind", ["uniform", "normal", "laplace"])
def test_noise_of_any_shape_is_one_launch_that_spills_nothing(kind: str) -> None:
    for size, target in ((1, "sm_90"), (20, "gfx942"), (5000, "sm_90")):
        with recorded() as found:
            getattr(philox, kind)(torch.empty(128, dtype=torch.int64, device="meta"), (3, 2**31 + 5), 11, size)
        read_off = read(compile_for(found[0], TARGETS[target]))
        assert len(found) == 1 and not read_off["spilled"] and read_off["registers"] <= REGISTERS
