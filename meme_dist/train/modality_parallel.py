"""Modality parallelism: the ranks of a group see the same rows, and each of them holds the networks of some modalities only.

What crosses the wire is what an objective computes with, not the gradients of networks. In float32 numbers, for N modalities, B rows of the
group, K samples, D latent size, M pseudo-inputs, R_j rows that hold j and P_j pairs (source, row) with j as their target:

    forward   all-gather of posteriors            2 D sum_j R_j
              all-gather of pseudo posteriors     2 D M N             where rows with one modality alone may come
              all-gather of log-likelihoods       K sum_j (P_j + R_j) for each pass through the decoders
    backward  all-reduce of samples' gradients    K (N B + 1) D       for each pass that has gradients

Everything between is computed by every rank alike, from equal numbers: so the rank that made a gathered number knows its whole gradient
without asking, and only what flows from decoders into the samples has to be summed. Each exchange is a pair of autograd functions, which
Megatron (Shoeybi et al. 2019) calls f and g:

    shared  ->  _Enter (backward: all-reduce)  ->  my networks  ->  _Gather (forward: all-gather; backward: my part)  ->  objective

Ranks that see different rows are other groups: the mesh is (data, modality), gradients are averaged over data. What it costs, and when it
pays, stands in `train.placement`. The ranks of a group need devices of one model: they draw from equal tables and must draw the same.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.utils import get_total_norm

from meme_dist.objectives.base import Objective, Shapes, Work
from meme_dist.train.placement import BUCKET, place
from meme_dist.types import Batch, Loss


class ModalityParallel(nn.Module):
    """An objective of which this rank keeps the networks of its own modalities; `forward` gives every rank of a group the same loss.

    `mesh` has the dimensions ("data", "modality"): `init_device_mesh(device, (groups, members), mesh_dim_names=("data", "modality"))`. All
    ranks of a group (one data coordinate) must give `forward` the same rows, and all ranks must start from the same weights. `assignment`
    maps each modality to its member, 0 to members - 1 (default: `place` by parameter counts).

    The objective is changed in place: networks of other members leave it, and with them their memory. `parameters`, `state_dict`, an
    optimiser or an average built afterwards know the own ones alone. Build it before the objective goes to the device.

    Raises ValueError for a mesh, an assignment or an objective that cannot be shared out.
    """

    def __init__(self, objective: Objective, mesh: DeviceMesh, *, assignment: Mapping[str, int] | None = None):
        super().__init__()
        if mesh.mesh_dim_names != ("data", "modality"):
            raise ValueError(f"mesh: expected the dimensions ('data', 'modality'), got {mesh.mesh_dim_names}")
        self.groups, self.members = mesh.size(0), mesh.size(1)
        self.group, self.member = mesh.get_local_rank("data"), mesh.get_local_rank("modality")
        self.assignment = dict(place(parameter_counts(objective), self.members) if assignment is None else assignment)
        _check(objective, self.assignment, self.members)
        self._across = mesh.get_group("data")
        self._within = mesh.get_group("modality")
        self.objective = objective
        _vacate(objective, {name: owner for name, owner in self.assignment.items() if owner != self.member})
        self._exchange = Exchange(self.assignment, self._within, next(objective.parameters()))
        objective.each = self._exchange

    def forward(self, batch: Batch) -> Loss:
        """The loss of the group's rows, the same on each of its ranks. Collective, and so is its backward pass."""
        self._exchange.start()
        try:
            return self.objective(batch)
        finally:
            self._exchange.start()

    def needed(self, batch: Batch) -> Batch:
        """The batch without the data of other members' modalities: what has to go to this rank's device."""
        kept = {
            name: packed if self.assignment[name] == self.member else packed._replace(data=packed.data.new_empty(0, *packed.data.shape[1:]))
            for name, packed in batch.modalities.items()
        }
        return batch._replace(modalities=kept)

    def owned_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Name (as in the whole objective) and parameter of what this rank trains; every parameter is owned by one member of each group."""
        return [(name, p) for name, p in self.objective.named_parameters() if p.requires_grad]

    def synchronise_gradients(self) -> None:
        """The mean of the owned gradients over the groups, in place. Collective; call it once, after the last micro batch.

        Raises ValueError for a parameter without a gradient.
        """
        if idle := [name for name, p in self.owned_parameters() if p.grad is None]:
            raise ValueError(f"{', '.join(idle[:5])}: no part in the loss, so no gradient; every parameter must take part in every batch")
        if self.groups == 1:
            return
        for bucket in _buckets([p.grad for _, p in self.owned_parameters() if p.grad is not None]):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            dist.all_reduce(flat, group=self._across)
            parts = flat.div_(self.groups).split([gradient.numel() for gradient in bucket])
            torch._foreach_copy_(bucket, [part.view_as(gradient) for part, gradient in zip(parts, bucket, strict=True)])

    def synchronise_buffers(self) -> None:
        """Running statistics become those of group 0, as in a checkpoint that it writes. Collective."""
        for buffer in self.objective.buffers():
            dist.broadcast(buffer, group=self._across, group_src=0)

    def gradient_norm(self) -> Tensor:
        """The norm over the gradients of all modalities, on every rank. Collective; NaN and infinity on one rank reach all."""
        own = get_total_norm([p.grad for _, p in self.owned_parameters() if p.grad is not None])
        squared = own.to(self._exchange.like.device).square()  # without gradients it is a zero on the CPU
        dist.all_reduce(squared, group=self._within)
        return squared.sqrt()

    def full_state(self) -> Iterator[tuple[str, Tensor]]:
        """The whole objective's state, tensor by tensor, on every rank (see `union`)."""
        return self.union(self.objective.state_dict())

    def union(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """What the members of this rank's group hold under different names, member by member, each tensor on every rank for a moment.

        For weights, their averages or an optimiser's state. Collective: every rank must go through all of it. Tensors come on the device of
        the parameters; this rank's own may be the live ones.
        """
        told: list[dict[str, tuple[torch.Size, torch.dtype]]] = [{}] * self.members
        dist.all_gather_object(told, {name: (t.shape, t.dtype) for name, t in tensors.items()}, group=self._within)
        device = self._exchange.like.device
        for member, entries in enumerate(told):
            for name, (shape, dtype) in entries.items():
                own = member == self.member
                tensor = tensors[name].detach().to(device).contiguous() if own else torch.empty(shape, dtype=dtype, device=device)
                dist.broadcast(tensor, group=self._within, group_src=member)
                yield name, tensor


def parameter_counts(objective: nn.Module) -> dict[str, int]:
    """Parameters of each modality (its networks, pseudo-inputs and likelihood), by its name: "modalities.photo.encoder.0.weight"."""
    counts: dict[str, int] = {}
    for path, parameter in objective.named_parameters():
        name = _modality_of(path)
        counts[name] = counts.get(name, 0) + parameter.numel()
    return counts


# ---- what an objective calls ------------------------------------------------------------------------------------------------------------


class Exchange:
    """`Objective.each` where a group of ranks shares the modalities out: `owner` says who runs which. `like` gives device and type.

    Every rank makes the same collectives in the same order. Forward that is the program's. Backward, autograd picks it, so it is tied
    down: `_Enter` takes part wherever its `_Gather` does, on a rank without work too, and a later `_Enter` comes before an earlier one.
    """

    def __init__(self, owner: Mapping[str, int], group: dist.ProcessGroup, like: Tensor):
        self.owner, self.group, self.like = owner, group, like
        self.member, self.members = dist.get_rank(group), dist.get_world_size(group)
        self._before: Tensor | None = None  # the last `_Enter` of this forward pass

    def start(self) -> None:
        """Forget the last forward pass."""
        self._before = None

    def __call__(self, shapes: Shapes, work: Work, shared: Tensor | None) -> list[Sequence[Tensor]]:
        dtype = torch.promote_types(self.like.dtype, torch.float32)
        anchor = torch.zeros((), dtype=dtype, device=self.like.device, requires_grad=torch.is_grad_enabled())
        if shared is not None:
            shared, anchor = _Enter.apply(self.group, shared, anchor if self._before is None else self._before)
            self._before = anchor if anchor.requires_grad else self._before
        mine = [self._checked(name, work(name, shared), shapes[name]) for name in shapes if self.owner[name] == self.member]
        layout = _layout(shapes, self.owner, self.member, self.members)
        gathered = iter(_Gather.apply(self.group, layout, anchor, *[t.to(dtype) for result in mine for t in result]))
        return [[next(gathered) for _ in of_one] for of_one in shapes.values()]

    def _checked(self, name: str, result: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> Sequence[Tensor]:
        came = [tuple(t.shape) for t in result]
        if came != [tuple(shape) for shape in shapes]:  # else others would read their numbers from the wrong places
            raise ValueError(f"{name}: its networks gave tensors of shapes {came}, the objective said {list(shapes)}")
        return result


class _Layout(NamedTuple):
    """Where each tensor stands among what is gathered, in the order of the call: member, first number, shape. `width` numbers a member."""

    places: list[tuple[int, int, tuple[int, ...]]]
    width: int
    member: int
    members: int


def _layout(shapes: Shapes, owner: Mapping[str, int], member: int, members: int) -> _Layout:
    filled, places = [0] * members, []
    for name, of_one in shapes.items():
        for shape in of_one:
            places.append((owner[name], filled[owner[name]], shape))
            filled[owner[name]] += prod(shape)
    return _Layout(places, max(filled), member, members)


class _Enter(torch.autograd.Function):
    """What all ranks share goes into the networks of each; its gradients are summed over the ranks. Its second value holds places in the
    graph: one for the `_Gather` that follows, one for the next `_Enter`."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, shared: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        ctx.group = group
        return shared.view_as(shared), torch.zeros_like(before)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, after: Tensor) -> tuple[None, Tensor, Tensor]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return None, total, torch.zeros_like(after)


class _Gather(torch.autograd.Function):
    """The results of all ranks on each; what comes back to this rank's own is their whole gradient already."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, layout: _Layout, anchor: Tensor, *mine: Tensor) -> tuple[Tensor, ...]:
        ctx.layout = layout
        ctx.save_for_backward(anchor)
        sent = anchor.new_zeros(layout.width)
        if mine:
            flat = torch.cat([t.flatten() for t in mine])
            sent[: len(flat)] = flat
        received = sent.new_empty(layout.members, layout.width)
        dist.all_gather(list(received), sent, group=group)
        return tuple(received[member, first : first + prod(shape)].view(shape) for member, first, shape in layout.places)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (anchor,) = ctx.saved_tensors
        own = [g for g, (member, _, _) in zip(gradients, ctx.layout.places, strict=True) if member == ctx.layout.member]
        return None, None, torch.zeros_like(anchor), *own


# ---- sharing out ------------------------------------------------------------------------------------------------------------------------


class _Elsewhere(nn.Module):
    """Stands where another member's network was."""

    def __init__(self, name: str, member: int):
        super().__init__()
        self.name, self.member = name, member

    def forward(self, *_: Any) -> Tensor:
        """Raises ValueError: whoever calls it has not gone through the objective."""
        raise ValueError(
            f"{self.name}: its networks are on member {self.member} of the modality group; let the objective run them (Objective.each), or "
            "fill a whole objective from `full_state`"
        )


def _vacate(objective: nn.Module, absent: Mapping[str, int]) -> None:
    """Take the networks and parameters of these modalities out of every part of the objective that has one for each modality."""
    parts = [(path.split("."), module) for path, module in objective.named_modules()]
    for name, module in [(path[1], module) for path, module in parts if len(path) == 2 and path[1] in absent]:
        for child_name, child in list(module.named_children()):
            if any(True for _ in child.parameters()) or any(True for _ in child.buffers()):
                setattr(module, child_name, _Elsewhere(name, absent[name]))
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, leaf)
            setattr(module, leaf, torch.zeros(0, dtype=parameter.dtype))  # sums to 0 where an objective touches it


def _modality_of(path: str) -> str:
    """ "photo" of "modalities.photo.encoder.0.weight" and of "pseudo.photo.inputs"."""
    parts = path.split(".")
    return parts[1] if len(parts) > 2 else ""


def _check(objective: Objective, assignment: Mapping[str, int], members: int) -> None:
    names = list(objective.modalities)
    if set(assignment) != set(names) or set(assignment.values()) != set(range(members)):
        raise ValueError(
            f"assignment: expected each of {names} on one of {members} members (numbered from 0), none of them idle; got {dict(assignment)}"
        )
    shared = [path for path in objective.state_dict() if _modality_of(path) not in assignment]
    if shared:
        raise ValueError(
            f"{', '.join(shared[:5])}: belongs to no modality, so no member would own it; modality parallelism cannot train it"
        )
    owners: dict[Tensor, int] = {}
    for path, parameter in objective.named_parameters(remove_duplicate=False):
        if owners.setdefault(parameter, assignment[_modality_of(path)]) != assignment[_modality_of(path)]:
            raise ValueError(f"{path}: the same parameter as another modality's; assign modalities that share one to one member")


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive gradients of at most BUCKET bytes together (one larger than that comes alone)."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        if bucket and sum(g.nbytes for g in bucket) + gradient.nbytes > BUCKET:
            yield bucket
            bucket = []
        bucket.append(gradient)
    yield bucket
