"""The lanes: the same tests run on the reference (plain process), on interpreted kernels (TRITON_INTERPRET=1) and on a GPU."""

import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from meme_kernels._op import backend
from tests.kernels.catalogue import DEVICE, LANE


@pytest.fixture
def device() -> torch.device:
    """Where the tensors of a test go."""
    return DEVICE


@pytest.fixture(autouse=True)
def lane() -> Iterator[str]:
    """Every op runs what this process tests."""
    with backend("reference" if LANE == "plain" else "triton"):
        yield LANE


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory that an op allocates holds NaN (the largest number for integers), so that what a kernel forgets to write shows."""
    with (
        mock.patch.object(torch, "empty", _poisoned(torch.empty)),
        mock.patch.object(torch, "empty_like", _poisoned(torch.empty_like)),
        mock.patch.object(Tensor, "new_empty", _poisoned(Tensor.new_empty)),
    ):
        yield


def _poisoned(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def empty(*arguments: Any, **settings: Any) -> Tensor:
        made = real(*arguments, **settings)
        if not sys._getframe(1).f_globals.get("__name__", "").startswith("meme_kernels") or made.device.type == "meta":
            return made
        return made.fill_(torch.nan if made.is_floating_point() else made.dtype == torch.bool or torch.iinfo(made.dtype).max)

    return empty
