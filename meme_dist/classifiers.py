"""Classifiers of real data, which judge what a model generates: small, trained once a data set, cached.

What a classifier is made of is a function `(Field, classes) -> nn.Module` whose name stands in the cache's key: `small_network` fits any
kind of modality, `paper_network` is what Shi et al. 2019 (and after them Joy et al. 2022) judge images with.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int, Shaped
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from meme_dist.data.fields import END, PAD, Field
from meme_dist.metrics.rows import device_of, evaluating, holds, labelled, on_device
from meme_dist.types import Batch

Build = Callable[[Field, int], nn.Module]
"""From a field and the number of classes to a network of logits."""


@dataclass(frozen=True)
class ClassifierTraining:
    """How classifiers are trained: Adam, its learning rate falling to zero in a straight line, until `visits` rows went by.

    The defaults take about 40 s of one core for two modalities of 28 x 28 and 3 x 32 x 32 pixels, and a few seconds for small sets.
    """

    visits: int = 75_000  # rows in all, each as often as it comes by
    rows: int = 25_000  # different ones, at most
    epochs: int = 30  # at most: passes over a small set
    batch_size: int = 128
    learning_rate: float = 3e-3
    seed: int = 0


class Classifier:
    """Names the class of data of one modality, on whatever device they come; a metric's `Classify` and `Judge`."""

    def __init__(self, network: nn.Module):
        self.network = network

    def __call__(self, x: Shaped[Tensor, "R *event"]) -> Int[Tensor, " R"]:
        with evaluating(self.network):
            return self.network.to(x.device)(x).argmax(-1)

    @property
    def head(self) -> nn.Linear:
        """The last layer. Raises ValueError for a network that has no linear one."""
        linear = [part for part in self.network.modules() if isinstance(part, nn.Linear)]
        if not linear:
            raise ValueError(f"features need a network that ends in a linear layer, got {type(self.network).__name__} without one")
        return linear[-1]

    def features(self, x: Shaped[Tensor, "R *event"]) -> Float[Tensor, "R E"]:
        """What goes into the last layer. Raises ValueError where what comes out of it are not the logits."""
        seen: list[tuple[Tensor, Tensor]] = []

        def watched(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen.append((inputs[0], output))

        watch = self.head.register_forward_hook(watched)
        try:
            with evaluating(self.network):
                logits = self.network.to(x.device)(x)
        finally:
            watch.remove()
        if len(seen) != 1 or seen[0][1] is not logits:
            raise ValueError(f"features need a network whose last linear layer gives its logits, {type(self.network).__name__} does not")
        return seen[0][0]


def trained_classifiers(
    fields: Mapping[str, Field],
    classes: int,
    train: Iterable[Batch],
    *,
    fingerprint: str,
    cache: Path | None,
    build: Build | None = None,
    training: ClassifierTraining = ClassifierTraining(),  # noqa: B008 (frozen)
    device: torch.device | None = None,
) -> dict[str, Classifier]:
    """A classifier for each modality: from the cache where it is there, else trained on the rows of `train` and put into it.

    `train` is iterated several times and must bring the same rows each time, as `Evaluation` over the training split does; `fingerprint`
    says what rows those are (the data set's and the split's hash). The result is a pure function of all that but the cache, on one device
    type. Raises ValueError for unlabelled data, for fewer than two classes, and for a cache file that is damaged.
    """
    if classes < 2:
        raise ValueError(f"classifiers need class labels: expected two or more classes, got {classes}; write the shards with labels")
    build = build or small_network
    networks = {name: _seeded(build, field, classes, training.seed) for name, field in fields.items()}
    files = {name: _cache_file(cache, fingerprint, name, fields[name], build, classes, training) for name in fields} if cache else {}
    missing = {name: network for name, network in networks.items() if not _restore(network, files.get(name))}
    if missing:
        _train({name: network.to(device or "cpu") for name, network in missing.items()}, train, training)
        for name in missing.keys() & files.keys():
            _store(missing[name], files[name])
    return {name: Classifier(network.requires_grad_(False).eval()) for name, network in networks.items()}


# ---- networks ---------------------------------------------------------------------------------------------------------------------------


def small_network(field: Field, classes: int) -> nn.Module:
    """The default: two strided convolutions for images, a perceptron for vectors and counts, an embedding and a convolution for text."""
    if field.kind == "image":
        return _small_image(field.shape, classes)
    if field.kind == "text":
        return _Text(len(field.vocabulary), classes)
    size = int(torch.Size(field.shape).numel())
    scale = nn.BatchNorm1d(size, affine=False)  # features come in any unit
    count = [_Log1p()] if field.kind in ("counts", "graph") else []
    return nn.Sequential(nn.Flatten(), *count, scale, nn.Linear(size, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, classes))


def paper_network(field: Field, classes: int) -> nn.Module:
    """For images the network that the paper's scores were judged with; for all else the small one.

    Convolutions 5x5 of 10 and 20 channels, each with max-pooling, dropout on the second, then 50 hidden units with dropout (Shi et al.
    2019, `src/report`). Raises ValueError for images below 16 x 16, of which the pooling would leave nothing.
    """
    if field.kind != "image":
        return small_network(field, classes)
    channels, height, width = field.shape
    if min(height, width) < 16:
        raise ValueError(f"paper_network needs images of 16 x 16 or more, got {height} x {width}; use small_network")
    left = [((size - 4) // 2 - 4) // 2 for size in (height, width)]
    return nn.Sequential(
        *(nn.Conv2d(channels, 10, 5), nn.MaxPool2d(2), nn.ReLU()),
        *(nn.Conv2d(10, 20, 5), nn.Dropout2d(), nn.MaxPool2d(2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(20 * left[0] * left[1], 50), nn.ReLU(), nn.Dropout(), nn.Linear(50, classes)),
    )


def _small_image(shape: tuple[int, ...], classes: int) -> nn.Module:
    channels, height, width = shape
    left = [(size + 3) // 4 for size in (height, width)]  # halved twice, each time rounded up
    return nn.Sequential(
        nn.InstanceNorm2d(channels),  # light and contrast say nothing about the class: 8 points on photographed digits
        *(nn.Conv2d(channels, 24, 5, stride=2, padding=2), nn.BatchNorm2d(24), nn.ReLU()),
        *(nn.Conv2d(24, 48, 3, stride=2, padding=1), nn.BatchNorm2d(48), nn.ReLU()),
        *(nn.Flatten(), nn.Dropout(0.3), nn.Linear(48 * left[0] * left[1], 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, classes)),
    )


class _Text(nn.Module):
    """Bag of trigrams. What stands after `<eos>` is not read: a decoder is free to babble there."""

    def __init__(self, words: int, classes: int):
        super().__init__()
        self.embedding = nn.Embedding(words, 32, padding_idx=PAD)
        self.convolution = nn.Conv1d(32, 64, 3, padding=1)
        self.head = nn.Linear(64, classes)

    def forward(self, tokens: Int[Tensor, "R T"]) -> Float[Tensor, "R classes"]:
        after = (tokens == END).cumsum(1) - (tokens == END).long() > 0
        h = self.embedding(tokens.masked_fill(after, PAD)).transpose(1, 2)
        return self.head(self.convolution(h).relu().amax(-1))


class _Log1p(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.log1p()


# ---- training ---------------------------------------------------------------------------------------------------------------------------


def _seeded(build: Build, field: Field, classes: int, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)  # and not those of GPUs, which the fork would not give back
        return build(field, classes)


def _train(networks: Mapping[str, nn.Module], train: Iterable[Batch], training: ClassifierTraining) -> None:
    """All networks in one pass over the rows, so that each row is read and decoded once an epoch."""
    fits = {name: _Fit(name, network, training) for name, network in networks.items()}
    cuda = {device.index or 0 for device in map(device_of, networks.values()) if device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(cuda)), torch.enable_grad():
        for batch, share in _schedule(train, training):
            for fit in fits.values():
                fit.see(batch, training.learning_rate * (1 - share))
    if unseen := sorted(name for name, fit in fits.items() if fit.steps == 0):
        raise ValueError(f"classifiers need labelled rows to learn from, and {', '.join(unseen)} have none; write the shards with labels")


class _Fit:
    """One network being trained: takes what a batch has of its modality, in steps of at most `batch_size` rows."""

    def __init__(self, name: str, network: nn.Module, training: ClassifierTraining):
        self.name, self.network, self.training = name, network.train(), training
        self.optimizer = torch.optim.Adam(network.parameters(), weight_decay=1e-5)
        self.steps = 0

    def see(self, batch: Batch, learning_rate: float) -> None:
        batch = on_device(batch, device_of(self.network))
        chosen = holds(batch, [self.name]) & labelled(batch, "training a classifier")
        x, label = batch.dense(self.name)[chosen], (batch.draw if batch.label is None else batch.label)[chosen]
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        for rows in torch.arange(len(label), device=label.device).split(self.training.batch_size):
            if len(rows) > 1:  # a single row has no batch statistics
                self._step(x[rows], label[rows])

    def _step(self, x: Shaped[Tensor, "R *event"], label: Int[Tensor, " R"]) -> None:
        torch.manual_seed(self.training.seed + self.steps)  # dropout: whichever other networks are trained beside this one
        self.optimizer.zero_grad()
        cross_entropy(self.network(x), label).backward()
        self.optimizer.step()
        self.steps += 1


def _schedule(train: Iterable[Batch], training: ClassifierTraining) -> Iterator[tuple[Batch, float]]:
    """Batches, pass by pass, each with the share of all visits that went before it; how many those are, the first pass tells."""
    total, seen = training.visits, 0
    while seen < total:
        before = seen
        for batch in train:
            if seen - before >= training.rows or seen >= total:
                break
            yield batch, seen / total
            seen += int(batch.observed.any(1).sum())
        if before == 0:
            total = min(total, seen * training.epochs)
        elif seen == before:
            raise ValueError("classifiers: expected rows on every pass, got none on a later one; give batches that can be iterated again")


# ---- cache ------------------------------------------------------------------------------------------------------------------------------


def _cache_file(cache: Path, fingerprint: str, name: str, field: Field, build: Build, classes: int, training: ClassifierTraining) -> Path:
    """A file name that says everything the weights depend on."""
    network = f"{build.__module__}.{build.__qualname__}"
    key = {"data": fingerprint, "modality": name, "field": field.to_json(), "network": network, "classes": classes, **asdict(training)}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache / f"classifier-{name}-{digest[:16]}.safetensors"


def _restore(network: nn.Module, file: Path | None) -> bool:
    if file is None or not file.exists():
        return False
    try:
        network.load_state_dict(load_file(file))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"{file}: expected a cached classifier, got a file that does not fit ({error}); delete it to train anew"
        ) from error
    return True


def _store(network: nn.Module, file: Path) -> None:
    """Written beside and renamed: two processes that train the same classifier at once leave one whole file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
    os.close(handle)
    try:
        save_file({name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()}, temporary)
        os.replace(temporary, file)
    finally:
        Path(temporary).unlink(missing_ok=True)
