"""Attributes of a trained CSVAE, set to what one wants: in rows that are there, whose free latents stay, and in new rows from the prior."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from jaxtyping import Shaped
from safetensors.torch import save_file
from torch import Tensor

from meme_dist import figures
from meme_dist.data.fields import SPECIAL, Field
from meme_dist.data.source import check_local
from meme_dist.leave import naming
from meme_dist.metrics.rows import device_of, evaluating, noise_of, on_device
from meme_dist.modality import Modality
from meme_dist.objectives.base import Objective
from meme_dist.objectives.csvae import CSVAE, Blocks
from meme_dist.stored import Stored
from meme_dist.types import Batch, Loss


class Given(Objective):
    """A CSVAE whose prior knows that some attributes have these values; all else is the objective's own."""

    private_latents = True

    def __init__(self, objective: CSVAE, values: Mapping[str, int]):
        super().__init__(cast(Mapping[str, Modality], dict(objective.modalities.items())))
        self.objective, self.values = objective, dict(values)

    def forward(self, batch: Batch) -> Loss:
        """The objective's."""
        return self.objective(batch)

    def infer(self, batch: Batch) -> Any:
        """The objective's."""
        return self.objective.infer(batch)

    def prior(self) -> Blocks:
        """p(z) times p(w | y) of the attributes that are given, and p(w) of the others."""
        return cast(CSVAE, self.objective).given(self.values)

    def initialise(self, batch: Batch) -> None:
        """It was trained."""


def wanted(stored: Stored, words: Sequence[str]) -> dict[str, int]:
    """The attributes' values that words such as "thick=1" or "name=seven" ask for, each as its number.

    Raises ValueError for a model without attributes, an unknown attribute or value, one that comes twice, and where nothing is asked for.
    """
    objective, values = csvae(stored.objective), {}
    if not words:
        raise ValueError(f"--set: expected ATTRIBUTE=VALUE once or more, got none; for example --set {objective.attributes[0]}=1")
    for word in words:
        name, there, value = word.partition("=")
        if not there:
            raise ValueError(f"--set {word}: expected ATTRIBUTE=VALUE, for example --set {objective.attributes[0]}=1")
        if name not in objective.attributes:
            raise ValueError(f"--set {word}: no attribute {name!r}{_close(name, objective.attributes)}")
        if name in values:
            raise ValueError(f"--set {word}: {name} is set twice")
        known = named(stored.manifest.fields[name])
        if value not in known:
            raise ValueError(f"--set {word}: {name} has no value {value!r}{_close(value, known)}")
        values[name] = known.index(value)
    return values


def _close(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return (f"; did you mean {close[0]!r}?" if close else "") + f" (there are {', '.join(known)})"


def named(field: Field) -> list[str]:
    """What an attribute's values are called: 0 and 1 of a flag, the words of a vocabulary."""
    return list(field.vocabulary[len(SPECIAL) :]) if field.kind == "text" else ["0", "1"]


def csvae(objective: Objective) -> CSVAE:
    """The objective, if it is a CSVAE with attributes. Raises ValueError where it is another one."""
    if not isinstance(objective, CSVAE) or not objective.attributes:
        raise ValueError(f"this run's objective, {type(objective).__name__}, has no attributes to set; train one: --objective csvae")
    return objective


def given(stored: Stored, values: Mapping[str, int]) -> Stored:
    """The run with a prior that knows these values: what `generate` draws from."""
    return stored._replace(objective=Given(csvae(stored.objective), values))


def edit(
    objective: CSVAE, batch: Batch, values: Mapping[str, int], *, draw: bool = False
) -> dict[str, dict[str, Shaped[Tensor, "B *event"]]]:
    """Every modality that is no attribute: "own" as the rows' latents give it, "edited" with these attributes set. On the CPU.

    z and w are a draw of q(z, w | what the row observes), the same for both; the blocks of `values` become the mean of p(w | y), or with
    `draw` a draw of it (another variant of the attribute in every row). Rows without an x are new ones.
    """
    batch = on_device(batch, device_of(objective))
    with evaluating(objective):
        noise = noise_of(batch)
        z = objective.infer(batch).sample(noise, "edit", 1)
        made = {"own": z, "edited": objective.edited(z, values, noise if draw else None)}
        return {what: {name: objective.modality(name).reconstruct(at)[0].cpu() for name in objective.observed} for what, at in made.items()}


def save_edits(stored: Stored, batch: Batch, values: Mapping[str, int], folder: Path, *, draw: bool) -> list[Path]:
    """Write the rows of a batch, reconstructed and edited, into a new folder: a safetensors file and a picture. Raises ValueError for a
    folder that exists, and for an address."""
    check_local(folder)
    if folder.exists():
        raise ValueError(f"{folder}: exists already, and nothing is overwritten; choose another folder (--out)")
    made = edit(csvae(stored.objective), batch, values, draw=draw)
    with naming(folder):
        folder.mkdir(parents=True)
    flat = {f"{name}/{what}": x.contiguous() for what, of_one in made.items() for name, x in of_one.items()}
    save_file(flat, folder / "edits.safetensors")
    shown = {f"{name}, {what}": x for what, of_one in made.items() for name, x in of_one.items()}
    fields = {title: stored.manifest.fields[title.partition(",")[0]] for title in shown}
    few = {title: x[: min(12, len(x))] for title, x in shown.items()}
    told = ", ".join(f"{name} = {value}" for name, value in values.items())
    figures.joint_grid(folder / "edits.png", fields, few, f"Test rows, one a column, as they are and with {told}")
    return [folder / "edits.png", folder / "edits.safetensors"]


def first_rows(stored: Stored, rows: int, *, seed: int) -> Batch:
    """The first test rows of the run's data, in one batch."""
    from meme_dist.data.stream import Evaluation

    return next(iter(Evaluation(stored.manifest.folder, "test", batch_size=min(rows, stored.manifest.num_rows("test")), seed=seed)))
