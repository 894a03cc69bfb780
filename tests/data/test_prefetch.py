"""Copies to the device run beside the step before them; on a CPU there is nothing to copy and nothing is read ahead."""

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from meme_dist.data.prefetch import moved, prefetch, tensors
from meme_dist.data.shards import write_shards
from meme_dist.data.stream import Stream
from meme_dist.types import Batch
from tests.data.tiny import dataset


@pytest.fixture
def steps(tmp_path: Path) -> list[list[Batch]]:
    write_shards(dataset(), tmp_path / "tiny", rows_per_shard=8)
    return list(itertools.islice(Stream(tmp_path / "tiny", "train", batch_size=8, accumulate=2, seed=0), 5))


def test_on_a_cpu_the_batches_pass_through_and_none_is_read_before_its_turn(steps: list[list[Batch]]) -> None:
    read: list[int] = []

    def source() -> Iterator[list[Batch]]:
        for number, step in enumerate(steps):
            read.append(number)
            yield step

    for number, (step, given) in enumerate(zip(prefetch(source(), torch.device("cpu")), steps, strict=True)):
        assert read == list(range(number + 1))
        for batch, other in zip(step, given, strict=True):
            assert all(a is b for a, b in zip(tensors(batch), tensors(other), strict=True))


class Device:
    """Stands in for CUDA and writes down what it is told, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.told: list[tuple[Any, ...]] = []
        self.stream, self.current, self.side = "main", self, "side"
        to = torch.Tensor.to

        def copy(x: torch.Tensor, device: torch.device, non_blocking: bool = False) -> torch.Tensor:
            assert device.type == "cuda" and non_blocking
            self.told.append(("copy", self.stream, len(x)))
            return to(x, "cpu", copy=True)

        monkeypatch.setattr(torch.cuda, "Stream", lambda device: "side")
        monkeypatch.setattr(torch.cuda, "stream", self.on)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self)
        monkeypatch.setattr(torch.Tensor, "to", copy)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, stream: self.told.append(("record", id(x), stream)))

    def wait_stream(self, side: str) -> None:
        self.told.append(("wait", side))

    @contextlib.contextmanager
    def on(self, stream: str) -> Iterator[None]:
        self.stream = stream
        yield
        self.stream = "main"


def test_the_next_step_is_copied_on_the_side_before_a_step_is_handed_out_and_waited_for_in_its_turn(
    steps: list[list[Batch]], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(monkeypatch)
    copies = [sum(len(tensors(batch)) for batch in step) for step in steps]
    seen = 0
    for number, step in enumerate(prefetch(iter(steps), torch.device("cuda"))):
        kinds = [entry[0] for entry in device.told]
        device.told, told = [], device.told
        mine = copies[number] if number == 0 else 0
        following = copies[number + 1] if number + 1 < len(steps) else 0
        assert kinds == ["copy"] * mine + ["wait"] + ["record"] * copies[number] + ["copy"] * following
        assert {entry[1] for entry in told if entry[0] == "copy"} <= {"side"} and {e[1] for e in told if e[0] == "wait"} == {"side"}
        assert {entry[1] for entry in told if entry[0] == "record"} == {id(x) for batch in step for x in tensors(batch)}
        assert {entry[2] for entry in told if entry[0] == "record"} == {device}
        for batch, given in zip(step, steps[number], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(tensors(batch), tensors(given), strict=True))
            assert (batch.seed, batch.single) == (given.seed, given.single)
        seen += 1
    assert seen == len(steps)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_an_error_of_the_source_comes_after_the_steps_before_it(
    steps: list[list[Batch]], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    if kind == "cuda":
        Device(monkeypatch)

    def source() -> Iterator[list[Batch]]:
        yield from steps[:3]
        raise ValueError("a damaged row")

    seen = 0
    with pytest.raises(ValueError, match="a damaged row"):
        for _ in prefetch(source(), torch.device(kind)):
            seen += 1
    assert seen == 3


def test_every_tensor_of_a_batch_is_moved(steps: list[list[Batch]]) -> None:
    batch = moved(steps[0][0], torch.device("meta"))
    assert {x.device.type for x in tensors(batch)} == {"meta"}
    assert len(tensors(batch)) == 4 * 3 + 4
    assert len(tensors(batch._replace(label=None))) == 4 * 3 + 3


@pytest.mark.gpu
def test_on_a_gpu_the_prefetched_batches_are_those_of_the_source(steps: list[list[Batch]]) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    for step, given in zip(prefetch(iter(steps), device), steps, strict=True):
        torch.cuda._sleep(10_000_000)
        for batch, other in zip(step, given, strict=True):
            assert all(a.device == device and torch.equal(a.cpu(), b.cpu()) for a, b in zip(tensors(batch), tensors(other), strict=True))
