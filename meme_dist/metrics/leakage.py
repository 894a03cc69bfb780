"""Whether attributes are where they should be in the latents, and nowhere else: probes, edits, and what an edit should leave alone.

    leakage   accuracy of a fresh probe that reads attribute j from samples of one part of the latents: the free ones, or the block of k
    success   share of rows that show the other value of k after k's block is set to it, by a rule that knows the data
    kept      share of rows in which attribute j still shows what it showed, when k was edited
    shift     mean distance that an edit moves what it should leave alone: how pure the block is

An adversary in the training is always fooled: the probe here is trained afterwards, on samples of a model that no longer moves. An accuracy
means something beside the base rate only, that of always guessing the commonest value among the test rows. Below it nothing was read: where
a probe finds nothing it guesses the commonest value among the training rows.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from meme_dist.metrics.intervals import Estimate, mean, proportion
from meme_dist.metrics.latents import collect
from meme_dist.metrics.perceptrons import fit_perceptron
from meme_dist.metrics.rows import add_up, device_of, evaluating, noise_of, on_device, share, with_square
from meme_dist.modalities.attribute import Attribute
from meme_dist.objectives.csvae import CSVAE
from meme_dist.types import Batch, Sums

Rule = Callable[[Shaped[Tensor, "R *event"]], Int[Tensor, " R"]]
"""The value of an attribute that data show."""

Rest = Callable[[Shaped[Tensor, "R *event"]], Float[Tensor, "R E"]]
"""What an edit of an attribute should leave alone."""

FREE = "free"  # the latents that are no attribute's


class Leakage(NamedTuple):
    """Accuracy of attribute (first name) from a part of the latents (second name), and each attribute's base rate, on the test rows."""

    accuracy: Mapping[tuple[str, str], Estimate]
    base: Mapping[str, Estimate]


def parts_of(objective: CSVAE) -> dict[str, slice]:
    """Where the free latents and each attribute's block are."""
    return {FREE: slice(0, objective.free), **{name: objective.attribute(name).block for name in objective.blocks()}}


def leakage(
    objective: CSVAE,
    train: Iterable[Batch],
    test: Iterable[Batch],
    *,
    rows: int,
    seed: int = 0,
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> Leakage:
    """Every attribute probed from every part of the latents: samples of q(z, w | x) of the first `rows` rows of either split.

    Rows that lack one of the x, or the label, count nowhere: where none is left to train or to test on, the count is 0. Batches number
    their rows, as `Evaluation`'s do; `reduce` is the sum over ranks.
    """
    learnt, asked = (_table(objective, batches, rows, reduce) for batches in (train, test))
    accuracy, base = {}, {}
    for name, known in learnt.labels.items():
        mine, theirs = known >= 0, asked.labels[name] >= 0
        truth, values = asked.labels[name][theirs], objective.attribute(name).values
        base[name] = proportion(_commonest(truth))
        for part, place in parts_of(objective).items():
            z, asking = learnt.sample[mine][:, place], asked.sample[theirs][:, place]
            accuracy[name, part] = proportion(_hits(z, known[mine], asking, truth, values, seed))
    return Leakage(accuracy, base)


def _commonest(label: Int[Tensor, " R"]) -> Sums:
    """The commonest value's rows."""
    most = label.bincount(minlength=1).max().double()
    return Sums(most, torch.full_like(most, len(label)))


def _hits(z: Tensor, label: Tensor, asked: Tensor, truth: Tensor, values: int, seed: int) -> Sums:
    """The rows asked that a probe fitted to the others gets right; none count where there are no others."""
    if not len(label):
        return share(truth[:0] == 0)
    return share(fit_perceptron(z, label, values, seed=seed)(asked).argmax(-1) == truth)


class _Table(NamedTuple):
    sample: Float[Tensor, "R D"]
    labels: Mapping[str, Int[Tensor, " R"]]  # -1: none, or no x


def _table(objective: CSVAE, batches: Iterable[Batch], rows: int, reduce: Callable[[Tensor], Tensor]) -> _Table:
    names, device = tuple(objective.observed), device_of(objective)
    labels = {name: torch.zeros(rows, dtype=torch.int64, device=device) for name in objective.attributes}

    def noted() -> Iterator[Batch]:  # `batches` may be a generator, which comes once
        for batch in batches:
            batch = on_device(batch, device)
            for name, label in labels.items():
                value = value_of(objective.attribute(name), batch.dense(name))
                there = batch.observed[:, list(batch.modalities).index(name)] & (batch.draw < rows) & (value >= 0)
                label[batch.draw[there]] = value[there] + 1
            yield batch

    found = collect(objective, noted(), rows=rows, sources=[names], reduce=reduce).posteriors[names]
    told = {name: torch.where(found.observed, reduce(label).cpu() - 1, -1) for name, label in labels.items()}
    return _Table(found.sample, told)


def value_of(attribute: Attribute, x: Shaped[Tensor, "R 1"]) -> Int[Tensor, " R"]:
    """The value's number of each label; -1 for a word that is none of the values."""
    told = attribute.embed(x)
    return torch.where(told.sum(-1) > 0, told.argmax(-1), -1)


# ---- edits ------------------------------------------------------------------------------------------------------------------------------


def edits(objective: CSVAE, batch: Batch, target: str, rules: Mapping[str, Rule], rest: Rest | None = None) -> dict[str, Sums]:
    """What happens to `target` when one attribute after the other is set to another value, its block to the mean of p(w | y').

    Latents are a draw of q(z, w | x) of each row that holds the target and the edited label; the other value is the next one. Judged by
    `rules` beside the row's own reconstruction; `rest` gives what should stay where it is. A metric: its sums add up over batches.
    Raises ValueError where an attribute has no rule.
    """
    if unruled := [name for name in objective.attributes if name not in rules]:
        raise ValueError(f"edits: expected a rule for each attribute, got none for {', '.join(unruled)}; give what tells it from {target}")
    batch = on_device(batch, device_of(objective))
    found: dict[str, Sums] = {}
    with evaluating(objective):
        z = objective.infer(batch.only(*objective.observed)).sample(noise_of(batch), "edits", 1)
        own = objective.modality(target).reconstruct(z)[0]
        held = batch.observed[:, list(batch.modalities).index(target)]
        before = {name: rule(own) for name, rule in rules.items()}
        for name in objective.attributes:
            value = value_of(objective.attribute(name), batch.dense(name))
            asked = held & batch.observed[:, list(batch.modalities).index(name)] & (value >= 0)
            other = (value + 1) % objective.attribute(name).values
            made = _set(objective, target, z, name, other)
            found[f"reconstructed/{name}"] = share((before[name] == value)[asked])
            for judged, rule in rules.items():
                same = rule(made) == (other if judged == name else before[judged])
                found[f"success/{name}" if judged == name else f"kept/{name}>{judged}"] = share(same[asked])
            if rest is not None:
                found |= _shifts(name, rest(made)[asked], rest(own)[asked])
    return found


def _set(objective: CSVAE, target: str, z: Tensor, name: str, other: Tensor) -> Tensor:
    """Each row with its other value."""
    made = torch.stack([objective.modality(target).reconstruct(objective.edited(z, {name: v}))[0] for v in range(other.max() + 1)])
    return made[other, torch.arange(len(other), device=other.device)]


def _shifts(name: str, made: Float[Tensor, "R E"], own: Float[Tensor, "R E"]) -> dict[str, Sums]:
    return {
        **with_square(f"shift/{name}", (made - own).norm(dim=-1)),
        f"spread/{name}": add_up((own - own.roll(1, 0)).norm(dim=-1)),  # of two different rows: what a shift can be compared with
    }


def estimates(sums: Mapping[str, Sums]) -> dict[str, Estimate]:
    """`edits` as values with intervals."""
    found = {}
    for key, value in sums.items():
        if key.startswith("shift/") and not key.endswith("/square"):
            found[key] = mean(value, sums[f"{key}/square"])
        elif not key.startswith(("shift/", "spread/")):
            found[key] = proportion(value)
    return found
