"""Laws of the data sets: counts, splits, what is missing, files that are absent, cut or altered."""

import gzip
import struct
from collections import Counter
from collections.abc import Callable
from math import sqrt
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import savemat
from torch import Tensor

from meme_dist.data.sets import _download, mnist_svhn
from meme_dist.data.sets._idx import read_idx
from meme_dist.data.sets._names import NAMES
from meme_dist.data.sets.digits import digits
from meme_dist.data.sets.linear_gaussian import linear_gaussian
from meme_dist.data.sets.mnist_meterdigits import mnist_meterdigits
from meme_dist.data.shards import Dataset
from tests.data.small import REAL, contents, cut, empty, mark, marked, rows, same, shown

needs_real_data = pytest.mark.skipif(not (REAL / "meterdigits.npz").is_file(), reason="no real data in ../shared/data")


# ---- digits ------------------------------------------------------------------------------------------------------------------------


def test_digits_have_1442_and_355_rows_and_miss_exactly_the_asked_share_of_entries():
    for missing in (0.0, 0.3, 0.5):
        train = rows(digits(missing=missing))
        absent = sum(3 - len(row.data) for row in train)
        assert len(train) == 1442
        assert abs(absent - missing * 3 * 1442) <= 0.5
        assert min(len(row.data) for row in train) >= 1
    assert shown(digits(), "test") == {("upper", "lower", "name"): 355}
    assert sum(3 - len(row.data) for row in digits(missing_in_test=0.4).rows("test")) == round(0.4 * 3 * 355)


def test_the_halves_and_the_name_of_a_row_belong_to_one_real_digit():
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    known = {np.rint(image * 255 / 16).astype(np.uint8).tobytes(): label for image, label in zip(pixels, labels, strict=True)}
    seen = set()
    for split in ("train", "test"):
        for row in digits(missing=0).rows(split):
            image = torch.cat([row.data["upper"], row.data["lower"]], 1).numpy().tobytes()  # type: ignore[list-item]
            assert known[image] == row.label
            assert row.data["name"] == " ".join(NAMES[row.label or 0])
            seen.add(image)
    assert len(seen) == 1797  # none twice, so the splits share no image


def test_digits_follow_the_seed_and_their_test_rows_do_not():
    assert same(digits(seed=1), digits(seed=1), "train")
    assert not same(digits(seed=1), digits(seed=2), "train")
    assert same(digits(seed=1, missing_in_test=0.2), digits(seed=2, missing=0.5, missing_in_test=0.2), "test")


def test_each_class_gives_its_share_of_test_rows():
    train, test = (Counter(row.label for row in digits().rows(split)) for split in ("train", "test"))
    assert all(test[value] == (train[value] + test[value]) // 5 for value in range(10))


def test_a_names_tokens_spell_it_and_end():
    field = digits().fields["name"]
    tokens = field.decode(field.encode("t h r e e"))
    assert [field.vocabulary[token] for token in tokens] == ["t", "h", "r", "e", "e", "<eos>"]


def test_every_datum_of_every_set_fits_its_field(tmp_path):
    for dataset in (digits(), linear_gaussian(), mnist_svhn.mnist_svhn(source=official(tmp_path)), meter(tmp_path, spoken=True, name=True)):
        for split in ("train", "test"):
            for row in rows(dataset, split)[:20]:
                for name, value in row.data.items():
                    field = dataset.fields[name]
                    decoded = field.decode(field.encode(value))
                    assert tuple(decoded.shape) == field.shape
                    if isinstance(value, Tensor):
                        assert torch.equal(decoded, value.float() / (255 if field.kind == "image" else 1))


# ---- MNIST-SVHN --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def any_checksum(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files here are small ones of the right formats."""
    monkeypatch.setattr(_download, "_check", lambda path, file: None)


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


def official(folder: Path, *, train: int = 300, test: int = 60) -> Path:
    """Tiny files in the official formats. Each image holds its class in its first pixel and its number in the next two."""
    folder.mkdir(exist_ok=True)
    for number, (split, prefix, count) in enumerate((("train", "train", train), ("test", "t10k", test))):
        rng = np.random.default_rng(number)
        digit = rng.integers(0, 10, count).astype(np.uint8)
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", marked(digit, (28, 28)))
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", digit)
        digit = rng.integers(0, 10, 2 * count).astype(np.uint8)
        x = marked(digit, (3, 32, 32)).transpose(2, 3, 1, 0)  # -> rows of the picture, columns, channels, images
        savemat(folder / f"{split}_32x32.mat", {"X": x, "y": np.where(digit == 0, 10, digit)[:, None]}, do_compression=True)
    return folder


@pytest.mark.parametrize(("pairing", "times"), [("one_to_one", 1), ("permutations", 1), ("permutations", 4)])
def test_mnist_svhn_pairs_equal_digits_as_often_as_the_rule_says(tmp_path, pairing, times):
    dataset = mnist_svhn.mnist_svhn(source=official(tmp_path), pairing=pairing, permutations=times)
    for split in ("train", "test"):
        labels = mnist_svhn.read(split, tmp_path).labels
        scarcest = np.minimum(np.bincount(labels["mnist"], minlength=10), np.bincount(labels["svhn"], minlength=10))
        pairs = [(mark(row.data["mnist"]), mark(row.data["svhn"]), row.label) for row in dataset.rows(split)]
        repeats = times if split == "train" else 1
        assert len(pairs) == repeats * scarcest.sum()
        assert all(first[0] == second[0] == label for first, second, label in pairs)  # svhn files say 10 for 0
        assert set(Counter(first for first, _, _ in pairs).values()) == {repeats}


def test_mnist_svhn_one_to_one_pairs_in_the_files_order(tmp_path):
    pairs = [(mark(row.data["mnist"]), mark(row.data["svhn"])) for row in rows(mnist_svhn.mnist_svhn(source=official(tmp_path)))]
    for digit in range(10):
        numbers = sorted((first[1], second[1]) for first, second in pairs if first[0] == digit)
        assert [second for _, second in numbers] == sorted(second for _, second in numbers)
    assert pairs != sorted(pairs)  # and shuffled once


@pytest.mark.parametrize("always", ["mnist", "svhn"])
def test_mnist_svhn_keeps_the_named_modality_of_every_unpaired_row(tmp_path, always):
    dataset = mnist_svhn.mnist_svhn(source=official(tmp_path), paired_fraction=0.25, always=always)
    total = len(rows(mnist_svhn.mnist_svhn(source=tmp_path)))
    paired = round(0.25 * total)
    assert shown(dataset) == {("mnist", "svhn"): paired, (always,): total - paired}
    pairs_only = mnist_svhn.mnist_svhn(source=tmp_path, paired_fraction=0.25, always=always, unpaired=False)
    assert shown(pairs_only) == {("mnist", "svhn"): paired}
    assert set(shown(dataset, "test")) == {("mnist", "svhn")}


def test_mnist_svhn_follows_the_seed_and_its_test_rows_do_not(tmp_path):
    official(tmp_path)

    def build(seed: int) -> Dataset:
        return mnist_svhn.mnist_svhn(source=tmp_path, pairing="permutations", permutations=2, paired_fraction=0.5, seed=seed)

    assert same(build(1), build(1), "train")
    assert not same(build(1), build(2), "train")
    assert same(build(1), build(2), "test")


def test_an_unpacked_file_serves_as_well_as_the_gzipped_one(tmp_path):
    packed = official(tmp_path) / "train-images-idx3-ubyte.gz"
    before = read_idx(packed, rank=3)
    packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
    packed.unlink()
    assert np.array_equal(mnist_svhn.read("train", tmp_path).data["mnist"][:, 0], before)  # type: ignore[call-overload]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))


def shorten(path: Path) -> None:
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1]))


def unlabel(path: Path) -> None:
    savemat(path, {"X": np.zeros((32, 32, 3, 4), dtype=np.uint8)})


def mislabel(path: Path) -> None:
    savemat(path, {"X": np.zeros((32, 32, 3, 2), dtype=np.uint8), "y": np.array([[0], [11]])})


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("train-images-idx3-ubyte.gz", cut, "cut or altered"),
        ("train-images-idx3-ubyte.gz", flip, "cut or altered"),
        ("train-labels-idx1-ubyte.gz", shorten, "its header says"),
        ("train-images-idx3-ubyte.gz", empty, "3 axes"),
        ("train_32x32.mat", cut, "no readable MATLAB file"),
        ("train_32x32.mat", empty, "no readable MATLAB file"),
        ("train_32x32.mat", unlabel, "expected X .* and y"),
        ("train_32x32.mat", mislabel, "labels from 1 to 10"),
    ],
)
def test_a_spoilt_file_is_named(tmp_path, name, spoil: Callable[[Path], None], message):
    spoil(official(tmp_path) / name)
    with pytest.raises(ValueError, match=message) as error:
        mnist_svhn.mnist_svhn(source=tmp_path).rows("train")
    assert name in str(error.value)


def test_labels_of_another_length_are_refused(tmp_path):
    write_idx(official(tmp_path) / "train-labels-idx1-ubyte.gz", np.zeros(299, dtype=np.uint8))
    with pytest.raises(ValueError, match="expected 299 images of 28x28"):
        mnist_svhn.mnist_svhn(source=tmp_path).rows("train")


def test_files_missing_from_the_source_are_all_named_with_their_addresses(tmp_path):
    (official(tmp_path) / "train_32x32.mat").unlink()
    (tmp_path / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(ValueError, match="--source FOLDER") as error:
        mnist_svhn.mnist_svhn(source=tmp_path).rows("train")
    for url in ("/housenumbers/train_32x32.mat", "/mnist/train-labels-idx1-ubyte.gz"):
        assert url in str(error.value)
    assert "train-images" not in str(error.value)


# ---- MNIST with meter digits -------------------------------------------------------------------------------------------------------


def meter(folder: Path, **keywords) -> Dataset:
    """The set from small files laid out as the real ones are; images marked as those of `official`."""
    digit = np.arange(400, dtype=np.uint8) % 10
    folder.mkdir(exist_ok=True)
    x = marked(digit, (28, 28))
    np.savez(folder / "mnist.npz", x_train=x[:300], y_train=digit[:300], x_test=x[300:], y_test=digit[300:])
    photos = np.full((100, 32, 20, 3), 255, dtype=np.uint8)
    photos[:, 0, 0, 0] = digit[:100]
    np.savez(folder / "meterdigits.npz", x=photos, y=digit[:100], is_test=np.arange(100) >= 80)
    speech = np.random.default_rng(0).normal(-4, 5, (60, 32, 32)).astype(np.float16)
    np.savez(folder / "fsdd_logmel_32x32.npz", x=speech, y=digit[:60], is_train=np.arange(60) < 40)
    return mnist_meterdigits(source=folder, **keywords)


def test_meter_digits_use_each_photo_three_times_and_no_mnist_image_twice(tmp_path):
    dataset = meter(tmp_path)
    pairs = [(mark(row.data["mnist"]), row.data["photo"], row.label) for row in dataset.rows("train")]
    assert len(pairs) == 10 * min(30, 3 * 8)
    assert len({first for first, _, _ in pairs}) == 240
    assert all(first[0] == int(photo[0, 0, 6]) == label for first, photo, label in pairs)  # type: ignore[call-overload]
    assert len(rows(dataset, "test")) == 20


def test_photos_stand_between_two_margins_of_zeros(tmp_path):
    photo = rows(meter(tmp_path))[0].data["photo"]
    assert isinstance(photo, Tensor)
    assert photo.shape == (3, 32, 32)
    assert not photo[:, :, :6].any()
    assert not photo[:, :, 26:].any()
    assert (photo[:, 1:, 6:26] == 255).all()


def test_speech_and_name_join_without_changing_the_pairs(tmp_path):
    two, four = meter(tmp_path, seed=5), meter(tmp_path, spoken=True, name=True, seed=5)
    assert list(four.fields) == ["mnist", "photo", "spoken", "name"]
    assert len(rows(two)) == len(rows(four))
    assert all(row.data["name"] == " ".join(NAMES[row.label or 0]) for row in four.rows("train"))


def test_partial_rows_of_four_modalities_keep_one_each(tmp_path):
    found = shown(meter(tmp_path, spoken=True, name=True, paired_fraction=0.5))
    assert found.pop(("mnist", "photo", "spoken", "name")) == 120
    assert sum(found.values()) == 120
    assert set(found) == {("mnist",), ("photo",), ("spoken",), ("name",)}


def test_files_missing_for_meter_digits_are_named(tmp_path):
    with pytest.raises(ValueError, match="missing mnist.npz, meterdigits.npz; name the folder that has them: --source FOLDER"):
        mnist_meterdigits(source=tmp_path).rows("train")


@pytest.mark.parametrize("spoil", [cut, empty, lambda path: np.savez(path, x=np.zeros(1))])
def test_a_spoilt_npz_is_named(tmp_path, spoil):
    dataset = meter(tmp_path)
    spoil(tmp_path / "meterdigits.npz")
    with pytest.raises(ValueError, match="meterdigits.npz: expected an .npz file with the arrays x, y, is_test"):
        dataset.rows("train")


@needs_real_data
def test_real_meter_digits_give_48502_and_3000_pairs_and_the_splits_share_no_image():
    known = {"mnist": {}, "photo": {}}
    with np.load(REAL / "mnist.npz") as mnist, np.load(REAL / "meterdigits.npz") as photos:
        for x, y in ((mnist["x_train"], mnist["y_train"]), (mnist["x_test"], mnist["y_test"])):
            known["mnist"].update({hash(image.tobytes()): digit for image, digit in zip(x, y, strict=True)})
        x, y = np.ascontiguousarray(photos["x"].transpose(0, 3, 1, 2)), photos["y"]
        known["photo"].update({hash(image.tobytes()): digit for image, digit in zip(x, y, strict=True)})
    seen: dict[str, list] = {}
    for split in ("train", "test"):
        seen[split] = []
        for row in mnist_meterdigits(source=REAL).rows(split):
            image, photo = row.data["mnist"].numpy(), row.data["photo"].numpy()[:, :, 6:26]  # type: ignore[union-attr]
            pair = hash(image.tobytes()), hash(np.ascontiguousarray(photo).tobytes())
            assert known["mnist"][pair[0]] == known["photo"][pair[1]] == row.label
            seen[split].append(pair)
    assert len(seen["train"]) == len(set(seen["train"])) == 48_502
    assert len(seen["test"]) == len({photo for _, photo in seen["test"]}) == 3_000
    for column in (0, 1):
        assert not {pair[column] for pair in seen["train"]} & {pair[column] for pair in seen["test"]}


@needs_real_data
def test_a_quarter_of_the_real_pairs_stay_and_split_keeps_each_modality_of_half_the_rest():
    found = shown(mnist_meterdigits(source=REAL, paired_fraction=0.25))
    paired, rest = round(0.25 * 48_502), 48_502 - round(0.25 * 48_502)
    assert found["mnist", "photo"] == paired
    assert found["mnist",] + found["photo",] == rest
    assert abs(found["mnist",] - rest / 2) < 4 * sqrt(rest) / 2


@needs_real_data
def test_real_spectrograms_are_standardised_to_three_digits_without_rounding():
    recordings = {contents(row)["spoken"]: row.data["spoken"] for row in mnist_meterdigits(source=REAL, spoken=True).rows("train")}
    x = torch.stack(list(recordings.values()))  # type: ignore[arg-type]
    assert x.shape == (2700, 1, 32, 32)
    assert abs(x.mean()) < 2e-3
    assert abs(x.std() - 1) < 2e-3


# ---- keywords ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: digits(missing=0.9), "missing: expected a share from 0 to 0.667"),
        (lambda: digits().rows("validation"), "split: expected 'train' or 'test', got 'validation'"),
        (lambda: mnist_svhn.mnist_svhn(paired_fraction=2), "paired_fraction: expected a number from 0 to 1"),
        (
            lambda: mnist_meterdigits(source=Path("."), always="spoken"),
            "always: expected 'split' or one of .'mnist', 'photo'., got 'spoken'",
        ),
    ],
)
def test_impossible_keywords_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
