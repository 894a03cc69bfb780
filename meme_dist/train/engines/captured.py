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

from meme_dist.train.engines.replicated import Replicated
from meme_dist.train.engines.room import Room
from meme_dist.train.training import Training
from meme_dist.types import Batch, Loss, Sums

Pass = Callable[[], Tensor]
WARM = 2  # passes before the one that is recorded: kernels are compiled, workspaces and constants made


class Captured(Replicated):
    """`Replicated` on one process, with passes replayed. Needs a CUDA device.

    A model that makes the host wait for the device in a step (`.item()`, a copy from ordinary memory) cannot be recorded: the engine says
    so in a warning, and runs every step as `Replicated` does. Room for batches only grows; with it the graph is recorded anew, some ten
    times in a training whose rows miss modalities, once where they are complete.
    """

    def __init__(self, objective: nn.Module, training: Training, accelerator: Accelerator):
        super().__init__(objective, training, accelerator)
        self._device, self._scale = accelerator.device, self.groups / training.batch_size
        self._trained = {name: p for name, p in self._parameters.items() if p.requires_grad}
        self._room, self._terms = Room(), list[str]()
        self._replay: Pass | None = None
        self._refused = False

    def begin(self) -> None:
        if self._refused:
            super().begin()
        elif found := [p.grad for p in self._trained.values() if p.grad is not None]:
            torch._foreach_zero_(found)

    def forward(self, batch: Batch, *, last: bool) -> Loss:
        """The loss; its gradient is added up with it."""
        if not self._refused and (self._room.furnish(batch) or self._replay is None):
            self._replay = None  # its memory, before more is taken
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

    def _recorded(self) -> Pass | None:
        """The replay of both passes over the room's batch; None (and so from now on) for a model that cannot be recorded."""
        batch = self._room.batch
        assert batch is not None
        try:
            self._warm_up(batch)
        except RuntimeError as error:
            if "synchronizing CUDA operation" not in str(error):
                raise
            self._refuse(error)
            return None
        for p in self._trained.values():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        return self.record(lambda: self._both(batch, add=True))

    def _warm_up(self, batch: Batch) -> None:
        """Run both passes as they will be recorded, but for what they leave behind: gradients, running statistics, random state."""
        random, buffers = torch.get_rng_state(), {name: x.clone() for name, x in self.objective.named_buffers()}
        on_device = torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None
        try:
            self.warm(lambda: self._both(batch, add=False))
        finally:
            torch.set_rng_state(random)
            if on_device is not None:
                torch.cuda.set_rng_state(on_device, self._device)
            for name, x in self.objective.named_buffers():
                x.copy_(buffers[name])

    def warm(self, run: Pass) -> None:
        """Run it on a stream of its own, and once more with whatever makes the host wait an error."""
        side, mode = torch.cuda.Stream(self._device), torch.cuda.get_sync_debug_mode()
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(WARM):
                run()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")  # what it does not see, the recording does
                torch.cuda.set_sync_debug_mode("error")
            try:
                run()
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

    def _refuse(self, error: RuntimeError) -> None:
        self._refused = True
        where = _place(error)
        warnings.warn(
            f"steps run kernel by kernel: this model makes the host wait for the GPU{where}, so they cannot be recorded as a CUDA graph "
            "(--no-graph says so beforehand)",
            stacklevel=2,
        )


def _place(error: BaseException) -> str:
    """Where in the model it was, as far as the traceback tells."""
    frames = []
    trace = error.__traceback__
    while trace is not None:
        frames.append((trace.tb_frame.f_code.co_filename, trace.tb_lineno))
        trace = trace.tb_next
    return f" ({frames[-1][0]}:{frames[-1][1]})" if frames else ""
