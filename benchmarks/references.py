"""Loss and gradient of each rival objective beside MultiVae's own code: the same networks, weights, data and noise, in float64.

MultiVae is never a dependency: where it cannot be imported there is nothing to compare, and the run says so. It and pythae are enough,
installed or unpacked (`pip download multivae==1.0.3 pythae --no-deps`, unzip both, name the folder with `--source`); what else it imports
and does not need here (torchvision, nltk, imageio) is replaced by an empty package where it is missing.

Its models are given our networks as their encoders and decoders, and our noise in place of theirs: draws of Normal and Laplace are taken
from a list, the subset of MoPoE from ours. So what is left of a difference is a difference of formulas.
"""

import contextlib
import importlib
import importlib.metadata
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.record import CPU, RESULTS, machine
from benchmarks.stand_in import Empty
from meme_dist.bounds import importance_weighted
from meme_dist.distributions import DiagLaplace, DiagNormal, Diagonal
from meme_dist.likelihoods import Normal
from meme_dist.modalities.vector import mlp
from meme_dist.modality import softplus_scale
from meme_dist.noise import Noise
from meme_dist.objectives import mmvae
from meme_dist.objectives.base import Objective
from meme_dist.objectives.jmvae import JMVAE
from meme_dist.objectives.mmvae import MMVAE
from meme_dist.objectives.mmvaeplus import MMVAEPlus
from meme_dist.objectives.mopoe import MoPoE
from meme_dist.objectives.mvae import MVAE
from meme_dist.objectives.mvtcae import MVTCAE
from meme_dist.objectives.parts import random_subsets
from meme_dist.types import Batch, pack_dense

EVENTS = {"a": 4, "b": 3, "c": 5}
SHARED, PRIVATE, ROWS, SAMPLES, SCALE = 3, 2, 14, 4, 0.75
UNNEEDED = ("torchvision", "nltk", "imageio")
SUM, WEIGHED, MEAN, SUBSETS = "a", "b", "c", "d"
NOTES = {
    SUM: "none: both are sums over rows",
    WEIGHED: "MultiVae reports sum_k v_k log w_k, v = softmax(log w): the bound plus log K minus the entropy of v; compared as such",
    MEAN: "ours is a sum over rows, MultiVae's the mean: times the rows",
    SUBSETS: "as c, subset by subset: with missing entries it averages each over the rows that have it, and so weighs rows unequally",
}
REST = (
    "What is left: MultiVae takes log n of an integer in float32 (MMVAE: 1e-9), adds 1e-6 to a Laplace prior's scales (1e-8 in the\n"
    "loss, 1e-6 in the gradient), and 1e-8 to the variances of a product (MoPoE, MVTCAE)."
)


class Reference(NamedTuple):
    """One objective of ours, MultiVae's class and settings for it, and what to do about the loss that it reports."""

    objective: type[Objective]
    keywords: Mapping[str, Any]
    settings: Mapping[str, Any]
    constant: str
    family: type[Diagonal] = DiagNormal
    private: int = 0
    incomplete: bool = True

    @property
    def name(self) -> str:
        """What the table calls it."""
        words = [self.settings.get("loss", ""), "laplace" if self.family is DiagLaplace else ""]
        return " ".join([self.objective.__name__, *filter(None, words)])


def _mixtures() -> Iterator[Reference]:
    for kind, extra in ((MMVAE, {}), (MMVAEPlus, {"learned_auxiliary": False})):
        for family, word in ((DiagNormal, "normal"), (DiagLaplace, "laplace_with_softmax")):
            for gradient in ("iwae", "dreg"):
                private = PRIVATE if kind is MMVAEPlus else 0
                learned = kind is MMVAE and family is DiagLaplace  # MultiVae's Normal prior has other free scales than ours
                keywords = {"samples": SAMPLES, "gradient": gradient, "resampled": False, "learned_prior": learned, **extra}
                settings = {"K": SAMPLES, "loss": f"{gradient}_looser", "prior_and_posterior_dist": word}
                settings |= {"modalities_specific_dim": PRIVATE} if private else {"learn_prior": learned}
                yield Reference(kind, keywords, settings, SUM if gradient == "iwae" else WEIGHED, family, private)


REFERENCES = (
    *_mixtures(),
    Reference(MVAE, {"subsets": 0}, {"warmup": 0}, SUBSETS),
    Reference(MoPoE, {"beta": 2.5}, {"beta": 2.5}, MEAN),
    Reference(MVTCAE, {"alpha": 0.9}, {"alpha": 0.9}, MEAN),
    Reference(JMVAE, {"hidden": 16}, {"warmup": 0}, MEAN, incomplete=False),
)


def main(*, source: tuple[Path, ...] = (), save: bool = True) -> None:
    """Compare every objective that MultiVae has, complete and with missing entries, and print the differences.

    Args:
        source: Folders with multivae and pythae unpacked; none where they are installed.
        save: Write benchmarks/results/references.json.
    """
    try:
        with _importable(source):
            peer = importlib.import_module("multivae.models")
            datasets = importlib.import_module("multivae.data.datasets.base")
            version = importlib.metadata.version("multivae")
    except ImportError as error:
        print(f"nothing to compare: {error}. Unpack multivae==1.0.3 and pythae, and name the folder with --source.")
        return
    rows = [_compare(reference, peer, datasets, missing) for reference in REFERENCES for missing in (False, True)]
    _show(rows, version)
    if save:
        path = RESULTS / "references.json"
        here = machine(CPU, torch.get_num_threads()) | {"multivae": version}
        path.write_text(json.dumps({"machine": here, "notes": NOTES, "rows": rows}, indent=1) + "\n", encoding="utf-8")
        print(f"\nkept in {path}")


def _show(rows: Sequence[Mapping[str, Any]], version: str) -> None:
    print(f"differences from MultiVae {version}, relative; float64, {ROWS} rows, {len(EVENTS)} modalities, K = {SAMPLES}")
    print(f"{'objective':32} {'entries':10} {'loss':>14} {'loss off by':>12} {'gradient off by':>16}  note")
    for row in rows:
        figures = f"{row['loss']:14.6f} {row['loss_difference']:12.1e} {row['gradient_difference']:16.1e}" if "loss" in row else ""
        print(f"{row['objective']:32} {row['entries']:10} {figures or '  refused: ' + row['refused']:44}  {row.get('note', '')}")
    print("\nconstants by which the losses differ, taken out above:", *(f"  {key}  {note}" for key, note in NOTES.items()), REST, sep="\n")


def _compare(reference: Reference, peer: Any, datasets: Any, missing: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    told = {"objective": reference.name, "entries": "30 % out" if missing else "complete"}
    if missing and not reference.incomplete:
        return {**told, "refused": "MultiVae's has no training with missing entries"}
    objective = reference.objective(_modalities(reference), **reference.keywords).double()
    for name, parameter in objective.named_parameters():
        if name.startswith("standard"):
            parameter.data += 0.3 * torch.randn_like(parameter)
    x, observed, batch = _data(missing)
    model, prior = _peer_model(reference, objective, peer)
    inputs = datasets.IncompleteDataset(data=x, masks=observed) if missing else datasets.MultimodalBaseDataset(data=x)
    with _noise_of(_draws(reference, objective, batch)), _subsets_of(model, batch):
        output = model(inputs)
    theirs = _in_our_units(reference, output, observed)
    with _weights() as seen:
        ours = objective(batch).total
    value = _weighed(*seen, batch) if reference.constant == WEIGHED else ours
    parameters = list(objective.parameters())
    apart = [
        torch.cat([_flat(g, p) for g, p in zip(grads, parameters, strict=True)]) for grads in _gradients(ours, theirs, parameters, prior)
    ]
    return {
        **told,
        "loss": ours.item(),
        "loss_difference": abs((theirs - value) / theirs).item(),
        "gradient_difference": ((apart[1] - apart[0]).norm() / apart[1].norm()).item(),
        "raw_ratio": (ours / output.loss).item(),
        "note": reference.constant,
    }


def _gradients(ours: Tensor, theirs: Tensor, parameters: list[nn.Parameter], prior: Mapping[int, Tensor]) -> Iterator[list[Tensor | None]]:
    """Ours and theirs, by our parameters; `prior` says which of theirs stands for one of ours (by its place)."""
    yield list(torch.autograd.grad(ours, parameters, allow_unused=True))
    matching = [prior.get(i, p) for i, p in enumerate(parameters)]
    yield list(torch.autograd.grad(theirs, matching, allow_unused=True))


def _flat(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    return (torch.zeros_like(parameter) if gradient is None else gradient).flatten()


def _modalities(reference: Reference) -> dict[str, Any]:
    """Perceptrons whose raw scales mean what they mean in MultiVae: a log variance, or a softmax for Laplaces."""
    made = {}
    for name, event in EVENTS.items():
        size = SHARED + reference.private
        modality = mlp((event,), latent_dim=size, hidden=(8,), likelihood=Normal(SCALE), family=reference.family)
        modality.private_dim = reference.private
        modality.to_scale = _softmax if reference.family is DiagLaplace else _half_exp
        made[name] = modality
    return made


def _half_exp(raw: Tensor) -> Tensor:
    return (raw / 2).exp()


def _softmax(raw: Tensor) -> Tensor:
    """Shared and own latents each by themselves."""
    return torch.cat([part.shape[-1] * part.softmax(-1) + 1e-6 for part in (raw[..., :SHARED], raw[..., SHARED:])], -1)


def _data(missing: bool) -> tuple[dict[str, Tensor], dict[str, Tensor], Batch]:
    rng = np.random.default_rng(0)
    held = rng.random((ROWS, len(EVENTS))) > (0.3 if missing else -1)
    held[~held.any(1), 0] = True
    observed = {name: torch.from_numpy(held[:, i]) for i, name in enumerate(EVENTS)}
    x = {name: torch.from_numpy(rng.standard_normal((ROWS, event))) * observed[name][:, None] for name, event in EVENTS.items()}
    return x, observed, pack_dense(x, observed, seed=3)


def _peer_model(reference: Reference, objective: Any, peer: Any) -> tuple[Any, dict[int, Tensor]]:
    """MultiVae's model around our networks, and which of its parameters stands for our prior's."""
    name, shared = reference.objective.__name__, {"n_modalities": len(EVENTS), "latent_dim": SHARED}
    shared |= {"decoders_dist": dict.fromkeys(EVENTS, "normal"), "decoder_dist_params": {n: {"scale": SCALE} for n in EVENTS}}
    if reference.private:
        shared["input_dims"] = {n: (event,) for n, event in EVENTS.items()}
    config = getattr(peer, f"{name}Config")(**shared, **reference.settings)
    encoders, decoders, joint = _wrapped(objective, reference.private)
    model = getattr(peer, name)(config, encoders, decoders, **({"joint_encoder": joint} if isinstance(objective, JMVAE) else {})).double()
    raw = objective.standard.raw
    if raw is None:
        return model, {}
    model.prior_log_var.data = raw.data[None].clone()
    return model, {[id(p) for p in objective.parameters()].index(id(raw)): model.prior_log_var}


def _wrapped(objective: Any, private: int) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """Our encoders, decoders and joint encoder behind MultiVae's interface."""
    base = importlib.import_module("pythae.models.nn.base_architectures")
    output = importlib.import_module("pythae.models.base.base_utils").ModelOutput
    peer = importlib.import_module("multivae.models.nn.base_architectures")

    class Encoder(peer.BaseMultilatentEncoder if private else base.BaseEncoder):
        def __init__(self, network: nn.Module):
            super().__init__()
            self.network, self.latent_dim, self.style_dim = network, SHARED, private

        def forward(self, x: Tensor) -> Any:
            mean, raw = (part.clone() for part in self.network(x).chunk(2, -1))  # MultiVae writes into what it is given
            own = {"style_embedding": mean[:, SHARED:], "style_log_covariance": raw[:, SHARED:]} if private else {}
            return output(embedding=mean[:, :SHARED].clone(), log_covariance=raw[:, :SHARED].clone(), **own)

    class Decoder(base.BaseDecoder):
        def __init__(self, network: nn.Module):
            super().__init__()
            self.network, self.latent_dim = network, SHARED + private

        def forward(self, z: Tensor) -> Any:
            return output(reconstruction=self.network(z))

    class Joint(peer.BaseJointEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.branches, self.trunk, self.latent_dim = objective.branches, objective.trunk, SHARED

        def forward(self, x: dict[str, Tensor]) -> Any:
            (trunk,) = self.trunk.values()
            mean, raw = trunk(torch.stack([self.branches[n](x[n]) for n in EVENTS]).sum(0)).chunk(2, -1)
            return output(embedding=mean, log_covariance=2 * softplus_scale(raw).log())

    modalities = objective.modalities
    joint = Joint() if isinstance(objective, JMVAE) else None
    return {n: Encoder(m.encoder) for n, m in modalities.items()}, {n: Decoder(m.decoder) for n, m in modalities.items()}, joint


def _in_our_units(reference: Reference, output: Any, observed: Mapping[str, Tensor]) -> Tensor:
    if reference.constant in (SUM, WEIGHED):
        return output.loss
    if reference.objective is MVAE:  # each subset's mean, times the rows of which it is the mean
        held = {"_".join(observed): ROWS, **{n: int(mask.sum()) for n, mask in observed.items()}}
        return torch.stack([output.metrics[subset] * rows for subset, rows in held.items()]).sum()
    return output.loss * ROWS


@contextlib.contextmanager
def _weights() -> Iterator[list[Tensor]]:
    """The log weights that ours bounds [S, K, B]."""
    seen: list[Tensor] = []

    def watched(log_weight: Tensor, *values: Any, **keywords: Any) -> Any:
        seen.append(log_weight.detach())
        return importance_weighted(log_weight, *values, **keywords)

    mmvae.importance_weighted = watched
    try:
        yield seen
    finally:
        mmvae.importance_weighted = importance_weighted


def _weighed(log_weight: Tensor, batch: Batch) -> Tensor:
    """-(the sum over rows of the mean over sources of sum_k w_k log w_k), the weights normalised for each source."""
    each, held = (log_weight.softmax(1) * log_weight).sum(1), batch.observed.T
    return -(torch.where(held, each, 0.0).sum(0) / held.sum(0)).sum()


def _draws(reference: Reference, objective: Any, batch: Batch) -> list[Tensor]:
    """Our standard noise in the order in which MultiVae draws."""
    noise, held = Noise(batch.seed, batch.draw), batch.observed
    draw = noise.laplace if reference.family is DiagLaplace else noise.normal
    if reference.objective is MVAE:
        return [noise.normal("joint", 1, SHARED)[0], *[noise.normal(n, 1, SHARED)[0][held[:, i]] for i, n in enumerate(EVENTS)]]
    if reference.objective not in (MMVAE, MMVAEPlus):
        return [noise.normal("joint", 1, SHARED)[0]]
    drawn = [draw(name, SAMPLES, SHARED) for name in EVENTS]
    if not reference.private:
        return drawn
    _, own = objective.split(objective.encodings(batch))
    samples = objective.private_samples(own, batch, SAMPLES, {n: objective.private_prior(n) for n in EVENTS})
    ordered = []
    for i, (name, q) in enumerate(own.items()):  # the source's shared ones, its own, and a prior's draw for each other
        mine = ((samples[name][i] - q.mean) / q.scale).detach()
        ordered += [drawn[i], mine, *[samples[other][i].detach() for other in EVENTS if other != name]]
    return ordered


@contextlib.contextmanager
def _noise_of(draws: list[Tensor]) -> Iterator[None]:
    """`rsample` takes the next of these draws; all of them, or the comparison is off."""
    queue = iter(draws)

    def rsample(self: Any, sample_shape: Any = ()) -> Tensor:
        eps = next(queue).to(self.loc)
        expected = (*sample_shape, *self.loc.shape)
        if eps.shape != expected:
            raise ValueError(f"MultiVae draws {tuple(expected)} where ours is {tuple(eps.shape)}: the order of its draws has changed")
        return self.loc + self.scale * eps

    families = (torch.distributions.Normal, torch.distributions.Laplace)
    kept = [family.rsample for family in families]
    for family in families:
        family.rsample = rsample
    try:
        yield
    finally:
        for family, original in zip(families, kept, strict=True):
            family.rsample = original
    if left := len(list(queue)):
        raise ValueError(f"MultiVae left {left} of our draws: the order of its draws has changed")


@contextlib.contextmanager
def _subsets_of(model: Any, batch: Batch) -> Iterator[None]:
    """MoPoE's sample comes from the subset that ours draws for the row."""
    if not hasattr(model, "random_mixture_component_selection"):
        yield
        return
    members = random_subsets(batch, "subset", 1)[0].T.tolist()
    subsets = [set(mods) for key, mods in model.subsets.items() if key]
    index = torch.tensor([subsets.index({n for n, member in zip(EVENTS, row, strict=True) if member}) for row in members])

    def choose(mean: Tensor, log_variance: Tensor, _: Tensor) -> list[Tensor]:
        place = index[None, :, None].expand(1, -1, SHARED)
        return [mean.gather(0, place)[0], log_variance.gather(0, place)[0]]

    model.random_mixture_component_selection = model.deterministic_mixture_component_selection = choose
    yield


@contextlib.contextmanager
def _importable(source: Sequence[Path]) -> Iterator[None]:
    finder = Empty(UNNEEDED)
    sys.path[:0] = [str(folder) for folder in source]
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        del sys.path[: len(source)]
