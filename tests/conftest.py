"""Shared set-up: shapes and types are checked at run time in tests (and in tests only), seeds are fixed, figures need no display."""

import os

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import jaxtyping

try:  # an interpreter without beartype (a borrowed GPU machine) runs the same tests unchecked
    import beartype  # noqa: F401

    # The mathematics alone: there the shape annotations live, and there they are worth the time of a check.
    MATHS = ["distributions", "likelihoods", "modality", "modalities", "noise", "objectives", "priors", "types"]
    jaxtyping.install_import_hook([f"meme_dist.{name}" for name in MATHS], "beartype.beartype")
except ImportError:
    pass

import random
import signal
from collections.abc import Iterator

import numpy as np
import pytest
import torch

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background job, whose children would be deaf to it, too
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def fixed_seed() -> Iterator[None]:
    """Every test starts from the same random state, in any order and on any worker."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield


@pytest.fixture(autouse=True)
def shapes_checked(request: pytest.FixtureRequest) -> None:
    """Shapes and types are checked at every call, a third of the time, but where a test makes the same calls hundreds of times."""
    jaxtyping.config.update("jaxtyping_disable", request.node.get_closest_marker("repeats") is not None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where there is no CUDA device; files that start processes, and wait for them, are begun first.

    Files are dealt to workers whole (`--dist loadfile --no-loadscope-reorder`): the slow ones at the end would leave all but one idle.
    """
    started = {item.path for item in items if item.get_closest_marker("launch") or hasattr(getattr(item, "module", None), "run_ranks")}
    items.sort(key=lambda item: item.path not in started)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
