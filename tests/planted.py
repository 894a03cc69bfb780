"""A MEME whose coherence is known before it is measured: encoders read a one-hot class, decoders show one, by tables set by hand."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from meme_dist.likelihoods import Normal
from meme_dist.modality import Modality
from meme_dist.objectives.meme import MEME
from meme_dist.types import Batch, pack

CLASSES = 4
REACH = 20.0  # of a class's place in the latent space: far beyond the posterior's scale, so that a sample never strays


class Reader(nn.Module):
    """q(z | x): at REACH times what is seen, with a fixed raw scale."""

    def __init__(self, raw: float):
        super().__init__()
        self.raw = raw
        self.own = nn.Dropout(0.5)  # noise in training mode: an evaluation that forgets eval() is wrong

    def forward(self, x):
        return torch.cat([REACH * self.own(x), torch.full_like(x, self.raw)], -1)


class Painter(nn.Module):
    """Shows the class table[argmax z]."""

    def __init__(self, table):
        super().__init__()
        self.register_buffer("table", torch.eye(CLASSES)[torch.tensor(table)])

    def forward(self, z):
        return self.table[z.argmax(-1)]


def modality(table=range(CLASSES), raw=-20.0) -> Modality:
    """Encodes the class that x shows, decodes class c as table[c]."""
    return Modality(encoder=Reader(raw), decoder=Painter(list(table)), likelihood=Normal(), latent_dim=CLASSES, feature=(CLASSES,))


def planted(modalities: Mapping[str, Modality], *, prior: int = CLASSES) -> MEME:
    """The prior draws the first `prior` classes evenly, from every modality's pseudo-inputs."""
    objective = MEME(modalities, pseudo_inputs=prior)
    for pseudo in objective.pseudo.values():
        pseudo.inputs.data.copy_(torch.eye(CLASSES)[:prior])
    return objective


def shown(x: torch.Tensor) -> torch.Tensor:
    """A perfect classifier of one-hot data."""
    return x.argmax(-1)


def rows(seen: Mapping[str, np.ndarray], label: np.ndarray | None, *, padding: int = 0, first: int = 0, seed: int = 0) -> Batch:
    """A batch in which modality m of row r shows class seen[m][r], or is missing where that is -1, and `padding` empty rows at its end."""
    held = {name: np.concatenate([values, np.full(padding, -1)]) for name, values in seen.items()}
    observed = np.stack([values >= 0 for values in held.values()], 1)
    data = {name: torch.eye(CLASSES)[values[values >= 0]] for name, values in held.items()}
    labels = None if label is None else torch.from_numpy(np.concatenate([label, np.full(padding, -1)]))
    draw = np.concatenate([first + np.arange(len(observed) - padding), 10**6 + first + np.arange(padding)])
    return pack(data, observed, draw=draw, label=labels, seed=seed)
