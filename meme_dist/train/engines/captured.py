"""One process on one GPU: the forward and backward pass of a step are one CUDA graph, launched at once.

A step of a multimodal VAE is a thousand small kernels, each of which takes the host longer to launch (5 to 10 us) than the device to run
(2 to 5 us). A graph is recorded once and launched as a whole. What makes it possible: no objective looks at a result in a step, every
random number of a row is a function of a counter that is a tensor, and batches come in memory that stays in place (`Room`).
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from meme_dist.train import randomness
from meme_dist.train.engines.replicated import Replicated
from meme_dist.train.engines.room import Room
from meme_dist.train.training import Training
from meme_dist.types import Batch, Loss, Sums

Pass = Callable[[], Tensor]
WARM = 2  # passes before the one that is recorded: kernels are compiled, workspaces and constants made


class Captured(Replicated):
    """`Replicated` on one process, with passes replayed. Needs a CUDA device.

    Some models cannot be recorded: those that make the host wait for the device in a step (`.item()`, a copy from ordinary memory), that
    draw random numbers on the host, or that normalise over rows of which some are padding. The engine says so in a warning, and runs every
    step as `Replicated` does; so too where a recording takes more memory than there is. What else a model decides in Python (by a counter
    of its own, say) stays as it was decided when it was recorded.

    Room for batches only grows; with it the graph is recorded anew, a few times in a training whose rows miss modalities, once where they
    are complete; so too where a parameter is frozen or a module changes its mode.
    """

    def __init__(self, objective: nn.Module, training: Training, accelerator: Accelerator):
        super().__init__(objective, training, accelerator)
        self._device, self._scale = accelerator.device, self.groups / training.batch_size
        self._trained = {name: p for name, p in self._parameters.items() if p.requires_grad}
        self._room, self._terms = Room(), list[str]()
        self._replay: Pass | None = None
        self._modes: tuple[bool, ...] = ()  # of the recording
        self._refused = False

    def begin(self) -> None:
        if self._refused:
            super().begin()
        elif found := [p.grad for p in self._trained.values() if p.grad is not None]:
            torch._foreach_zero_(found)

    def forward(self, batch: Batch, *, last: bool) -> Loss:
        """The loss; its gradient is added up with it."""
        if not self._refused and not _complete(batch) and self._normalises():
            self._refuse("it normalises over rows, of which padding would be some")
        if not self._refused:
            grown, modes = self._room.furnish(batch), self._modes_now()
            if grown or modes != self._modes or self._replay is None:
                self._replay, self._modes = None, modes  # its memory goes before more is taken
                self._replay = self._recorded()
        if self._replay is None:
            return super().forward(batch, last=last)
        total, *rest = self._replay().clone().unbind()  # of accumulated micro batches each has its own
        return Loss(total, {name: Sums(*rest[2 * i : 2 * i + 2]) for i, name in enumerate(self._terms)})

    def backward(self, loss: Tensor, *, last: bool) -> None:
        if self._refused:
            super().backward(loss, last=last)

    @property
    def remembered(self) -> dict[str, Any]:
        return {"room": self._room.sizes}

    def remember(self, state: Mapping[str, Any]) -> None:
        self._room.remember(state.get("room", {}))
        self._replay = None

    def _modes_now(self) -> tuple[bool, ...]:
        """What a recording cannot follow: which parameters are trained, and the modules' modes."""
        return *(p.requires_grad for p in self._parameters.values()), *(m.training for m in self.objective.modules())

    def _normalises(self) -> bool:
        return any(isinstance(m, _BatchNorm) and m.training for m in self.objective.modules())

    def _recorded(self) -> Pass | None:
        """The replay of both passes over the room's batch; None (and so from now on) for a model that cannot be recorded."""
        batch = self._room.batch
        assert batch is not None
        self._trained = {name: p for name, p in self._parameters.items() if p.requires_grad}
        try:
            if self._warm_up(batch):
                return self._refuse("it draws random numbers on the host")
            for p in self._parameters.values():
                p.grad = None if not p.requires_grad else torch.zeros_like(p) if p.grad is None else p.grad
            return self.record(lambda: self._both(batch, add=True))
        except torch.OutOfMemoryError:
            return self._refuse("a recording takes more memory than there is")
        except RuntimeError as error:
            if "synchronizing CUDA operation" in str(error):
                return self._refuse(f"it makes the host wait for the GPU{_place(error)}")
            error.add_note("It happened while a step was recorded as a CUDA graph; --no-graph trains kernel by kernel.")
            raise

    def _warm_up(self, batch: Batch) -> bool:
        """Run both passes as they will be recorded, but for what they leave behind: gradients, running statistics, random state. Returns
        whether they drew on the host, which a replay would not."""
        with self.undisturbed():
            return self.warm(lambda: self._both(batch, add=False))

    def warm(self, run: Pass) -> bool:
        """Run it on a stream of its own, and once more with whatever makes the host wait an error; whether that drew on the host."""
        side, mode = torch.cuda.Stream(self._device), torch.cuda.get_sync_debug_mode()
        side.wait_stream(torch.cuda.current_stream(self._device))
        try:
            with torch.cuda.stream(side):
                for _ in range(WARM):
                    run()
                before = _on_the_host()
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")  # what it misses, the recording meets
                    torch.cuda.set_sync_debug_mode("error")
                run()
            return not all(map(torch.equal, before, _on_the_host()))
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            torch.cuda.current_stream(self._device).wait_stream(side)

    def record(self, run: Pass) -> Pass:
        """Capture it; loader threads may meanwhile talk to the device."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            values = run()

        def replay() -> Tensor:
            graph.replay()
            return values

        return replay

    def _both(self, batch: Batch, *, add: bool) -> Tensor:
        """Loss, and total and count of each term, in one tensor; `add` adds the gradient of the step's mean loss to what is there."""
        loss = self.wrapped(batch)
        found = torch.autograd.grad(loss.total * self._scale, list(self._trained.values()), allow_unused=True)
        self._terms = list(loss.terms)
        if add:
            for p, g in zip(self._trained.values(), found, strict=True):
                p.grad = None if g is None else p.grad  # `idle` tells of those without one
            pairs = [(p.grad, g) for p, g in zip(self._trained.values(), found, strict=True) if p.grad is not None and g is not None]
            torch._foreach_add_([total for total, _ in pairs], [g for _, g in pairs])
        values = [loss.total.detach(), *(x.detach() for sums in loss.terms.values() for x in sums)]
        wide = torch.float64 if any(x.dtype == torch.float64 for x in values) else torch.float32
        return torch.stack([x.to(wide) for x in values])

    def _refuse(self, why: str) -> None:
        self._refused, self._replay, self._room = True, None, Room()
        told = f"steps run kernel by kernel, since this model cannot be recorded as a CUDA graph: {why} (--no-graph says so beforehand)"
        warnings.warn(told, stacklevel=2)


def _on_the_host() -> list[Tensor]:
    """The state of the host's generators that a model might draw from."""
    return [x for name, x in randomness.capture().items() if name != "cuda"]


def _complete(batch: Batch) -> bool:
    """Whether every row holds everything, by the lengths that the host knows."""
    return all(len(packed.row) == len(batch.observed) for packed in batch.modalities.values())


def _place(error: BaseException) -> str:
    """Where in the model it was, as far as the traceback tells."""
    frames = []
    trace = error.__traceback__
    while trace is not None:
        frames.append((trace.tb_frame.f_code.co_filename, trace.tb_lineno))
        trace = trace.tb_next
    return f" ({frames[-1][0]}:{frames[-1][1]})" if frames else ""
