"""Laws of the classifiers: they learn real data, are a pure function of what their cache's key says, and read only what is there."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from meme_dist.classifiers import Classifier, ClassifierTraining, paper_network, small_network, trained_classifiers
from meme_dist.data.fields import Field
from meme_dist.evaluate import evaluate, values
from meme_dist.metrics import classifier_accuracy
from meme_dist.types import Batch, pack_dense

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LETTERS = ("<pad>", "<unk>", "<eos>", *sorted(set("".join(NAMES))))
FIELDS = {
    "image": Field(kind="image", shape=(1, 8, 8), codec="npy", likelihood="laplace"),
    "pixels": Field(kind="vector", shape=(64,), codec="npy", likelihood="normal"),
    "ink": Field(kind="counts", shape=(8, 8), codec="npy", likelihood="poisson"),
    "name": Field(kind="text", shape=(6,), codec="txt", likelihood="categorical", vocabulary=LETTERS),
}
TRAINING = ClassifierTraining(epochs=8, batch_size=64)


def spell(name: str) -> str:
    return " ".join(name)


def digits(low: int, high: int, *, missing: float = 0.2, poison: bool = False, size: int = 200, labelled: bool = True) -> list[Batch]:
    """Real digits of scikit-learn: as an image, as a vector in odd units, as counts, and by name."""
    x, y = load_digits(return_X_y=True)
    x, y = torch.from_numpy(x[low:high]).float(), torch.from_numpy(y[low:high])
    data = {
        "image": (x / 16).view(-1, 1, 8, 8),
        "pixels": 1000 * x - 3000,
        "ink": x.view(-1, 8, 8),
        "name": torch.stack([FIELDS["name"].decode(spell(NAMES[int(label)]).encode()) for label in y]),
    }
    held = torch.from_numpy(np.random.default_rng(0).random((len(x), 4)) >= missing)
    if poison:
        data = {
            k: torch.where(held[:, i].view(-1, *[1] * (v.dim() - 1)), v, -7 if k == "name" else torch.nan)
            for i, (k, v) in enumerate(data.items())
        }
    parts = [slice(start, start + size) for start in range(0, len(x), size)]
    return [
        pack_dense(
            {name: values[part] for name, values in data.items()},
            {name: held[part, i] for i, name in enumerate(data)},
            label=y[part] if labelled else None,
        )
        for part in parts
    ]


class Passes:
    """Batches that count how often they are gone through."""

    def __init__(self, batches: list[Batch]):
        self.batches, self.count = batches, 0

    def __iter__(self) -> Iterator[Batch]:
        self.count += 1
        return iter(self.batches)


def weights(classifier: Classifier) -> torch.Tensor:
    return torch.cat([value.double().flatten() for value in classifier.network.state_dict().values()])


def trained(batches, *, fields=FIELDS, fingerprint="digits", cache=None, training=TRAINING, **keywords) -> dict[str, Classifier]:
    return trained_classifiers(fields, 10, batches, fingerprint=fingerprint, cache=cache, training=training, **keywords)


@pytest.fixture(scope="module")
def judges() -> dict[str, Classifier]:
    """Trained with poison where data are absent: it must not be read."""
    return trained(digits(0, 1400, poison=True))


def test_classifiers_of_every_kind_learn_real_digits_with_entries_missing(judges: dict[str, Classifier]) -> None:
    found = values(evaluate(nn.Module(), digits(1400, 1797), [classifier_accuracy(judges)]))  # type: ignore[arg-type]
    assert found["classifier/image"] > 0.93 and found["classifier/pixels"] > 0.88 and found["classifier/ink"] > 0.88
    assert found["classifier/name"] == 1.0


def test_training_is_a_pure_function_of_rows_network_and_seed_and_leaves_the_global_state(judges: dict[str, Classifier]) -> None:
    state = torch.random.get_rng_state()
    alone = trained(digits(0, 1400), fields={"pixels": FIELDS["pixels"]})  # without the others beside it, and without poison
    assert torch.equal(weights(alone["pixels"]), weights(judges["pixels"]))
    assert torch.equal(state, torch.random.get_rng_state())
    other = trained(digits(0, 1400), fields={"pixels": FIELDS["pixels"]}, training=ClassifierTraining(epochs=8, batch_size=64, seed=1))
    assert not torch.equal(weights(other["pixels"]), weights(judges["pixels"]))


def test_the_cache_gives_back_the_same_weights_without_a_pass_over_the_rows(tmp_path: Path) -> None:
    fields = {"pixels": FIELDS["pixels"], "name": FIELDS["name"]}
    rows = Passes(digits(0, 200))
    once = ClassifierTraining(epochs=2, rows=200)
    first = trained(rows, fields=fields, cache=tmp_path, training=once)
    assert rows.count == 2 and len(list(tmp_path.iterdir())) == 2
    second = trained(rows, fields=fields, cache=tmp_path, training=once)
    assert rows.count == 2 and all(torch.equal(weights(first[name]), weights(second[name])) for name in fields)
    next(tmp_path.glob("classifier-name-*")).unlink()
    third = trained(rows, fields=fields, cache=tmp_path, training=once)
    assert rows.count == 4 and torch.equal(weights(first["name"]), weights(third["name"]))


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": "other"},
        {"training": ClassifierTraining(epochs=1, rows=100)},
        {"training": ClassifierTraining(epochs=1, rows=200, seed=1)},
        {"build": paper_network},
        {"fields": {"pixels": Field(kind="vector", shape=(64,), codec="npy", likelihood="laplace")}},
    ],
)
def test_whatever_the_weights_depend_on_is_part_of_the_key(tmp_path: Path, change: dict) -> None:
    plain = {"fields": {"pixels": FIELDS["pixels"]}, "cache": tmp_path, "training": ClassifierTraining(epochs=1, rows=200)}
    rows = Passes(digits(0, 200))
    trained(rows, **plain)
    trained(rows, **{**plain, **change})
    assert rows.count == 2 and len(list(tmp_path.iterdir())) == 2


def test_no_more_rows_are_read_than_asked_for() -> None:
    seen = []
    batches = digits(0, 400, size=100, missing=0.0)

    class Watched:
        def __iter__(self):
            for batch in batches:
                seen.append(len(batch.observed))
                yield batch

    trained(Watched(), fields={"pixels": FIELDS["pixels"]}, training=ClassifierTraining(epochs=1, rows=200))
    assert sum(seen) <= 300


def test_small_sets_are_gone_through_until_the_visits_are_used_up_or_the_passes() -> None:
    for training, passes in ((ClassifierTraining(visits=900, epochs=9), 5), (ClassifierTraining(visits=9000, epochs=3), 3)):
        rows = Passes(digits(0, 200, missing=0.0))
        trained(rows, fields={"pixels": FIELDS["pixels"]}, training=training)
        assert rows.count == passes
    with pytest.raises(ValueError, match="batches that can be iterated again"):
        trained(iter(digits(0, 200)), fields={"pixels": FIELDS["pixels"]})


def test_a_damaged_cache_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    fields = {"pixels": FIELDS["pixels"]}
    once = ClassifierTraining(epochs=1, rows=200)
    trained(digits(0, 200), fields=fields, cache=tmp_path, training=once)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{file.name}.*delete it to train anew"):
        trained(digits(0, 200), fields=fields, cache=tmp_path, training=once)


def test_missing_labels_are_an_error_and_leave_no_cache_behind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs class labels and this data set has none"):
        trained(digits(0, 200, labelled=False), cache=tmp_path)
    unlabelled = [batch._replace(label=torch.full_like(batch.label, -1)) for batch in digits(0, 200)]
    with pytest.raises(ValueError, match="image, pixels, ink, name|image, ink, name, pixels"):
        trained(unlabelled, cache=tmp_path)
    with pytest.raises(ValueError, match="expected two or more classes, got 1"):
        trained_classifiers(FIELDS, 1, digits(0, 200), fingerprint="", cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_a_decoder_writes_after_the_end_of_a_sentence_is_not_read(judges: dict[str, Classifier]) -> None:
    field = FIELDS["name"]
    tokens = torch.stack([field.decode(spell(name).encode()) for name in NAMES])
    ended = (tokens == 2).cumsum(1) - (tokens == 2).long() > 0
    babble = torch.where(ended, torch.randint(3, len(LETTERS), tokens.shape), tokens)
    assert not torch.equal(babble, tokens)
    logits = judges["name"].network
    assert torch.equal(logits(babble), logits(tokens)) and judges["name"](babble).tolist() == list(range(10))


def test_a_row_is_judged_alike_alone_and_among_others(judges: dict[str, Classifier]) -> None:
    batch = digits(1400, 1450, missing=0.0)[0]
    for name, classifier in judges.items():
        x = batch.dense(name)
        assert torch.equal(torch.cat([classifier(row[None]) for row in x]), classifier(x))


def test_a_classifier_judges_in_evaluation_mode_and_gives_its_network_back_as_it_was() -> None:
    network = paper_network(Field(kind="image", shape=(1, 28, 28), codec="npy", likelihood="laplace"), 10).train()
    x = torch.rand(50, 1, 28, 28)
    first = Classifier(network)(x)
    assert network.training and torch.equal(first, Classifier(network)(x)) and torch.equal(first, network.eval()(x).argmax(-1))


def test_the_papers_network_has_its_320_and_500_inputs_to_50_units() -> None:
    for shape, inputs in (((1, 28, 28), 320), ((3, 32, 32), 500)):
        network = paper_network(Field(kind="image", shape=shape, codec="npy", likelihood="laplace"), 10)
        first = next(part for part in network.modules() if isinstance(part, nn.Linear))
        assert (first.in_features, first.out_features) == (inputs, 50)
        assert network(torch.zeros(2, *shape)).shape == (2, 10)
    with pytest.raises(ValueError, match="16 x 16 or more, got 8 x 8"):
        paper_network(FIELDS["image"], 10)


@pytest.mark.parametrize("shape", [(1, 4, 8), (3, 32, 20), (2, 1, 2)])
def test_the_small_network_takes_images_of_any_size(shape: tuple[int, ...]) -> None:
    field = Field(kind="image", shape=shape, codec="npy", likelihood="laplace")
    assert small_network(field, 7)(torch.rand(3, *shape)).shape == (3, 7)
