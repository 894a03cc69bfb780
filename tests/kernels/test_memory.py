"""What a forward and a backward pass hold at a time, counted without a GPU: on the meta device, where launches are noted and not run.

A process that interprets kernels has no launches to leave out, so these run in the plain lane.
"""

from unittest import mock

import pytest
import torch

from meme_kernels._op import FusedOp, backend
from meme_kernels._triton import ABSENT, INTERPRETED
from tests.kernels.catalogue import OPS, Peak, leaves, most_bytes, outputs

if ABSENT:
    pytest.skip(f"Triton cannot be imported: {ABSENT}", allow_module_level=True)
if INTERPRETED:
    pytest.skip("a process with TRITON_INTERPRET=1 has no launches to leave out", allow_module_level=True)

from triton.runtime.jit import JITFunction


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_a_pass_holds_little_more_than_what_it_reads_and_writes_and_states(op: FusedOp) -> None:
    for size in ("paper", "large"):
        for case in op.cases(size, torch.device("meta"), torch.float32):
            with mock.patch.object(JITFunction, "run", lambda *_, **__: None), backend("triton"), Peak() as peak:
                values = [y for y in outputs(op.call, case) if y.requires_grad]
                torch.autograd.grad(values, leaves(case), [torch.empty_like(y) for y in values], allow_unused=True)
            assert peak.most <= most_bytes(op, case), f"{size}: {case.label}"
