"""What the trainer asks of an engine, and what all engines share."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from meme_dist.train.training import Training
from meme_dist.types import Batch, Loss

Moments = Mapping[str, Tensor]


class Layout(NamedTuple):
    """What a module holds, written down before an engine takes its tensors apart: shapes and types as tensors without memory."""

    state: Mapping[str, Tensor]  # every entry of its state_dict, on the meta device
    owner: Mapping[str, str]  # entry -> the parameter that it is, by its first name (tied parameters have several)

    @property
    def buffers(self) -> list[str]:
        """The entries that are no parameters."""
        return [name for name in self.state if name not in self.owner]


def layout_of(module: nn.Module) -> Layout:
    """Names, shapes and types of a module's state."""
    names = {id(p): name for name, p in module.named_parameters()}
    state = module.state_dict(keep_vars=True)
    owner = {name: names[id(x)] for name, x in state.items() if id(x) in names}
    return Layout({name: torch.empty_like(x, device="meta", requires_grad=False) for name, x in state.items()}, owner)


def adam(module: nn.Module, training: Training, *, fused: bool | None = None) -> Optimizer:
    """AdamW over all parameters; the trainer sets its learning rate at every step."""
    # On a CPU the default goes tensor by tensor, in four times the fused form's time. On a GPU it takes a dozen kernels where the fused
    # form takes one, but keeps its counts of steps on the host, which the sharding engines rely on.
    fused = not torch.cuda.is_available() if fused is None else fused
    settings = {"betas": training.betas, "weight_decay": training.weight_decay, "fused": fused}
    return torch.optim.AdamW(module.parameters(), training.learning_rate, **settings)


class Engine(ABC):
    """An objective on its ranks, and its optimiser. Every method is called by all ranks, in the same order.

    A parameter lies on a rank as its `part`: the whole tensor, or this rank's shard. `whole` puts parts together (collective).
    """

    name: str
    objective: nn.Module
    layout: Layout
    optimizer: Optimizer  # whose groups' learning rate the trainer sets
    groups: int  # shares of a step's rows, and how many ranks have each of them
    members: int = 1

    @abstractmethod
    def forward(self, batch: Batch, *, last: bool) -> Loss:
        """The loss of one micro batch, through the wrapper that synchronises ranks; `last` as for `backward`, which follows."""

    @abstractmethod
    def begin(self) -> None:
        """Forget the gradient of the step before."""

    @abstractmethod
    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of this micro batch; with the `last` one of a step, gradients become the mean over ranks."""

    @abstractmethod
    def squared_norm(self) -> Tensor:
        """This rank's summand of the squared gradient norm, float64. It is not finite where a gradient is not.

        An engine that learns the norm in its update alone gives 0 or NaN here.
        """

    @abstractmethod
    def update(self, norm: float, clip: float | None) -> float:
        """One optimiser step, with the gradient scaled down to the norm `clip`; returns the norm before that.

        NaN says that the gradient overflowed in the sum over the ranks, where only the engine sees it: nothing was updated.
        """

    @abstractmethod
    def discard(self) -> None:
        """Give up this step: no update, weights and moments stay as they are."""

    @abstractmethod
    def idle(self) -> list[str]:
        """The trained parameters that got no gradient in this step."""

    def require_gradients(self) -> None:
        """Raise ValueError where a trained parameter got no gradient in this step."""
        if idle := self.idle():
            raise ValueError(
                f"{', '.join(idle[:5])}: no part in the loss, so no gradient; every parameter must take part in every batch, with zero "
                "weight if need be (or set requires_grad to False)"
            )

    @abstractmethod
    def gradients(self) -> Iterator[tuple[str, bool]]:
        """Each trained parameter's name and whether its gradient is finite on this rank; those without one are left out."""

    @abstractmethod
    def part(self, name: str) -> Tensor:
        """What this rank holds of a parameter, sharing its memory."""

    @abstractmethod
    def whole(self, name: str, part: Tensor) -> Tensor:
        """The tensor of the parameter's shape of which every rank holds a `part`. Collective."""

    @abstractmethod
    def cut(self, name: str, value: Tensor) -> Tensor:
        """This rank's part of a whole tensor of the parameter's shape: the inverse of `whole`."""

    @abstractmethod
    def moments(self, name: str) -> dict[str, Tensor]:
        """The optimiser's state of a parameter, whole: "step", "exp_avg", "exp_avg_sq"; empty before the first update. Collective."""

    @abstractmethod
    def load(self, name: str, value: Tensor, moments: Moments) -> None:
        """Set a parameter and, unless empty, its optimiser state from whole tensors that every rank gives."""

    @abstractmethod
    def evaluated(self, parts: Mapping[str, Tensor] | None) -> AbstractContextManager[nn.Module]:
        """Within it, an ordinary module with these parts as its parameters (None: the live ones), whole on every rank. Collective."""

    @property
    def remembered(self) -> dict[str, Any]:
        """What else a resumed run must know to compute the same bits, as JSON can hold it."""
        return {}

    def remember(self, state: Mapping[str, Any]) -> None:  # noqa: B027  # an engine that remembers nothing
        """Continue with what an engine `remembered`; one of another kind is not understood, and changes rounding alone."""

    def names(self) -> list[str]:
        """The parameters, tied ones once."""
        return list(dict.fromkeys(self.layout.owner.values()))

    def load_buffers(self, state: Mapping[str, Tensor]) -> None:
        """Set running statistics and other state that is not trained."""
        live: dict[str, Any] = dict(self.objective.named_buffers())
        for name in self.layout.buffers:
            live[name].copy_(state[name])

    def broadcast_buffers(self) -> None:
        """Running statistics of rank 0 on all ranks: each rank's are those of its own rows. Collective."""
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            for buffer in self.objective.buffers():
                torch.distributed.broadcast(buffer, 0)


class TorchEngine(Engine):
    """An engine whose gradients stay with the parameters, and whose optimiser torch steps."""

    _parameters: dict[str, nn.Parameter]  # those that this rank holds, or holds a part of

    def begin(self) -> None:
        self.optimizer.zero_grad()

    def discard(self) -> None:
        """The gradient is forgotten as the next step begins, anyway."""

    def idle(self) -> list[str]:
        return [name for name, p in self._parameters.items() if p.requires_grad and p.grad is None]

    def gradients(self) -> Iterator[tuple[str, bool]]:
        for name, gradient in self.own_gradients():
            yield name, bool(gradient.isfinite().all())

    def own_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """What this rank holds of each gradient."""
        return ((name, own(p.grad)) for name, p in self._parameters.items() if p.grad is not None)


def own(x: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return x.to_local() if isinstance(x, DTensor) else x


def autocast_forward(module: nn.Module, device: torch.device, precision: str) -> None:
    """Make the module's forward run under bf16 autocast where the precision says so, whichever wrapper calls it.

    Inside and not around the wrapper: DeepSpeed switches off an autocast that it meets outside. Without autocast's cache of bf16 weights:
    a sharding engine gives weights up after a module has run, and a copy cached while a decoder ran without gradients (the resampled
    estimator) was taken for its run with gradients under FSDP2, so that the decoder got none (torch 2.13).
    """
    if precision == "bf16":
        module.forward = torch.autocast(device.type, torch.bfloat16, cache_enabled=False)(module.forward)
