"""Codecs: what goes in comes out, what does not fit is refused, and no byte of a shard can run code or ask for memory."""

import io
import json
import pickle
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from meme_dist.data.fields import END, LARGEST_COUNT, PAD, SPECIAL, UNKNOWN, Field, check_modality_names, member_name

WORDS = (*SPECIAL, "red", "bird", "größer", "a.b")
TEXT = Field("text", (5,), "txt", "categorical", WORDS)
sizes = st.integers(1, 9)
shapes = st.lists(sizes, min_size=1, max_size=3).map(tuple)


def refused(field: Field, x: object) -> str:
    with pytest.raises(ValueError) as caught:
        field.encode(x)
    return str(caught.value)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_images_come_back_exactly_in_units_of_one_255th(data: st.DataObject) -> None:
    codec = data.draw(st.sampled_from(["npy", "png"]))
    shape = (data.draw(st.sampled_from([1, 3])), data.draw(sizes), data.draw(sizes))
    pixels = torch.from_numpy(data.draw(hnp.arrays(np.uint8, shape)))
    field = Field("image", shape, codec, "laplace")
    assert torch.equal(field.decode(field.encode(pixels)), pixels.float() / 255)


@settings(max_examples=60, deadline=None)
@given(shapes.flatmap(lambda shape: hnp.arrays(np.float32, shape, elements=st.floats(width=32, allow_nan=False, allow_infinity=False))))
def test_vectors_come_back_bit_by_bit(array: np.ndarray) -> None:
    field = Field("vector", array.shape, "npy", "normal")
    assert field.decode(field.encode(torch.from_numpy(array))).numpy().tobytes() == array.tobytes()


@settings(max_examples=60, deadline=None)
@given(shapes.flatmap(lambda shape: hnp.arrays(np.int64, shape, elements=st.integers(0, LARGEST_COUNT))), st.booleans())
def test_counts_come_back_exactly_whether_given_as_integers_or_as_whole_floats(array: np.ndarray, floating: bool) -> None:
    field = Field("counts", array.shape, "npy", "poisson")
    x = torch.from_numpy(array)
    assert torch.equal(field.decode(field.encode(x.float() if floating else x)).long(), x)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(len(SPECIAL), len(WORDS) - 1) | st.just(UNKNOWN), max_size=8))
def test_sentences_and_their_token_ids_come_back_and_long_ones_are_cut(numbers: list[int]) -> None:
    ids = torch.tensor((numbers + [END] + [PAD] * 5)[:5])
    sentence = "  ".join(WORDS[number] for number in numbers)
    assert torch.equal(TEXT.decode(TEXT.encode(sentence)), ids)
    assert torch.equal(TEXT.decode(TEXT.encode(ids)), ids)


def test_a_word_that_the_vocabulary_lacks_is_unknown() -> None:
    assert TEXT.decode(TEXT.encode("red fish")).tolist() == [3, UNKNOWN, END, PAD, PAD]


def test_sentences_of_any_lengths_read_together_stay_in_their_rows() -> None:
    sentences = ["red", "", "bird red a.b red bird", "red red red bird fish red größer", "  fish\n größer "]
    assert TEXT.decode_rows([sentence.encode() for sentence in sentences]).tolist() == [
        [3, END, PAD, PAD, PAD],
        [END, PAD, PAD, PAD, PAD],
        [4, 3, 6, 3, 4],
        [3, 3, 3, 4, UNKNOWN],
        [UNKNOWN, 5, END, PAD, PAD],
    ]


FIELDS = [
    Field("image", (3, 4, 5), "png", "laplace"),
    Field("image", (1, 4, 5), "npy", "bernoulli"),
    Field("vector", (7,), "npy", "laplace"),
    Field("counts", (2, 3), "npy", "negative_binomial"),
    TEXT,
]


def example(field: Field, seed: int) -> torch.Tensor | str:
    generator = torch.Generator().manual_seed(seed)
    if field.kind == "text":
        return " ".join(WORDS[3 + seed % 3 :])
    if field.kind == "image":
        return torch.randint(0, 256, field.shape, dtype=torch.uint8, generator=generator)
    if field.kind == "counts":
        return torch.randint(0, 99, field.shape, generator=generator)
    return torch.randn(field.shape, generator=generator)


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: f"{field.kind}-{field.codec}")
@pytest.mark.parametrize("rows", [0, 1, 4])
def test_many_rows_decode_as_each_of_them_alone(field: Field, rows: int) -> None:
    encoded = [field.encode(example(field, seed)) for seed in range(rows)]
    decoded = field.decode_rows([memoryview(data) for data in encoded])
    assert decoded.shape == (rows, *field.shape) and decoded.dtype == (torch.int64 if field.kind == "text" else torch.float32)
    assert all(torch.equal(decoded[row], field.decode(data)) for row, data in enumerate(encoded))


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: f"{field.kind}-{field.codec}")
def test_a_field_survives_json(field: Field) -> None:
    again = Field.from_json(json.loads(json.dumps(field.to_json())))
    assert again == field and again.decode(field.encode(example(field, 3))).shape == field.shape


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: f"{field.kind}-{field.codec}")
def test_a_field_survives_pickling_into_a_worker(field: Field) -> None:
    field.decode(field.encode(example(field, 0)))
    assert pickle.loads(pickle.dumps(field)) == field


def test_numpy_reads_what_a_field_writes_and_a_field_reads_other_forms_of_the_same_array() -> None:
    field = Field("vector", (3, 4), "npy", "normal")
    x = torch.randn(3, 4)
    assert np.array_equal(np.load(io.BytesIO(field.encode(x)), allow_pickle=False), x.numpy())
    for array, version in ((np.asfortranarray(x.numpy()), (1, 0)), (x.numpy(), (2, 0))):
        out = io.BytesIO()
        np.lib.format.write_array(out, array, version=version, allow_pickle=False)
        assert torch.equal(field.decode(out.getvalue()), x)


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array(out, array, allow_pickle=True)
    return out.getvalue()


def test_wrong_arrays_are_refused_with_what_was_expected_and_what_came() -> None:
    field = Field("vector", (3,), "npy", "normal")
    good = field.encode(torch.ones(3))
    for data, message in [
        (npy(np.ones((4,), np.float32)), r"expected float32 \(3,\), got float32 \(4,\)"),
        (npy(np.ones((3,), np.float64)), r"expected float32 \(3,\), got float64 \(3,\)"),
        (npy(np.ones((3,), ">f4")), r"expected float32 \(3,\), got >f4 \(3,\)"),
        (good[:-1], "expected 12 bytes of float32, got 11"),
        (good + b"x", "expected 12 bytes of float32, got 13"),
        (b"", "magic"),
        (b"not an array", "magic"),
    ]:
        with pytest.raises(ValueError, match=message):
            field.decode(data)
    with pytest.raises(ValueError, match="expected finite numbers, got 1"):
        field.decode(npy(np.array([1, np.nan, 2], np.float32)))


class Bomb:
    """Leaves a trace if anybody unpickles it."""

    fired: list[str] = []

    def __reduce__(self) -> tuple:
        return (Bomb.fired.append, ("fired",))


def test_a_pickled_array_is_refused_and_never_run() -> None:
    with pytest.raises(ValueError, match="expected float32"):
        Field("vector", (1,), "npy", "normal").decode(npy(np.array([Bomb()], dtype=object)))
    assert Bomb.fired == []


def test_a_header_that_promises_a_terabyte_costs_nothing() -> None:
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": "<f4", "fortran_order": False, "shape": (2**40,)})
    with pytest.raises(ValueError, match="got float32"):
        Field("vector", (3,), "npy", "normal").decode(out.getvalue())


def picture(mode: str, size: tuple[int, int], form: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.new(mode, size).save(out, format=form)
    return out.getvalue()


def test_wrong_pictures_are_refused_with_what_was_expected_and_what_came() -> None:
    field = Field("image", (3, 4, 5), "png", "laplace")
    good = field.encode(torch.randint(0, 256, (3, 4, 5), dtype=torch.uint8))
    for data, message in [
        (picture("RGB", (4, 5)), "expected a RGB png of 5 x 4, got RGB 4 x 5"),
        (picture("L", (5, 4)), "got L 5 x 4"),
        (picture("RGBA", (5, 4)), "got RGBA 5 x 4"),
        (picture("RGB", (5, 4), "BMP"), "bytes that are none"),
        (good[:50], "bytes that are none"),
        (b"", "bytes that are none"),
    ]:
        with pytest.raises(ValueError, match=message):
            field.decode(data)


def chunk(name: bytes, content: bytes) -> bytes:
    """One chunk of a png, as its standard (ISO 15948, 5.3) spells it."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


PICTURE = Field("image", (3, 12, 9), "png", "laplace")
PIXELS = torch.randint(0, 256, PICTURE.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)) // 16
FILE = PICTURE.encode(PIXELS)
HEAD, PACKED, TAIL = FILE[:33], FILE[41:-16], FILE[-12:]  # signature and size; what is packed; the end


def by_pillow(data: bytes) -> torch.Tensor | None:
    """The pixels as Pillow finds them without our help, None where it finds none."""
    try:
        array = np.array(Image.open(io.BytesIO(data), formats=["PNG"]))
    except (OSError, SyntaxError, ValueError):
        return None
    return torch.from_numpy(array).permute(2, 0, 1) if array.shape == (12, 9, 3) else None


def by_field(data: bytes) -> torch.Tensor | None:
    try:
        return (PICTURE.decode(data) * 255).round().byte()
    except ValueError as error:
        assert "bytes that are none" in str(error) or "expected a RGB png" in str(error)
        return None


def test_a_png_that_was_written_here_is_unpacked_without_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = HEAD + chunk(b"IDAT", PACKED[:20]) + chunk(b"IDAT", b"") + chunk(b"IDAT", PACKED[20:]) + TAIL
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("pillow was asked what the file is"))
    assert torch.equal(PICTURE.decode(FILE), PICTURE.decode(pieces)) and torch.equal(PICTURE.decode(FILE), PIXELS.float() / 255)


def test_a_png_may_come_in_pieces_and_hold_more_than_pixels() -> None:
    assert HEAD + chunk(b"IDAT", PACKED) + TAIL == FILE
    for body in (
        chunk(b"IDAT", PACKED[:20]) + chunk(b"IDAT", b"") + chunk(b"IDAT", PACKED[20:]),
        chunk(b"tEXt", b"a\0b") + chunk(b"IDAT", PACKED),
        chunk(b"IDAT", PACKED) + chunk(b"tIME", bytes(7)),
    ):
        assert torch.equal(PICTURE.decode(HEAD + body + TAIL), PIXELS.float() / 255)


def cut(file: bytearray, random: np.random.Generator) -> bytes:
    return bytes(file[: random.integers(len(file))])


def flipped(file: bytearray, random: np.random.Generator) -> bytes:
    file[random.integers(len(file))] ^= 1 << random.integers(8)
    return bytes(file)


def repacked(file: bytearray, random: np.random.Generator) -> bytes:
    """Sealed by all checksums, but with rows too many or too few, or a filter that there is not."""
    rows = bytearray(zlib.decompress(PACKED))
    rows[28 * random.integers(12)] = random.integers(8)
    rows += bytes(60)
    return HEAD + chunk(b"IDAT", zlib.compress(bytes(rows[: 12 * 28 + random.integers(-30, 60)]))) + TAIL


def misplaced(file: bytearray, random: np.random.Generator) -> bytes:
    """A chunk that promises more or less than it holds."""
    file[33:37] = struct.pack(">I", random.choice([0, len(PACKED) - 1, len(PACKED) + 1, 2**31, 2**32 - 1]))
    return bytes(file)


def followed(file: bytearray, random: np.random.Generator) -> bytes:
    """Pixels as they should be, and behind them a chunk with another bit."""
    extra = bytearray(chunk(b"tIME", bytes(7)))
    extra[random.integers(len(extra))] ^= 1 << random.integers(8)
    return bytes(file[:-12] + extra + file[-12:])


@pytest.mark.parametrize("damage", [cut, flipped, repacked, misplaced, followed], ids=lambda damage: damage.__name__)
def test_a_damaged_png_is_refused_wherever_pillow_refuses_it(damage: Callable[[bytearray, np.random.Generator], bytes]) -> None:
    random, refusals = np.random.default_rng(0), 0
    for _ in range(200):
        data = damage(bytearray(FILE), random)
        expected, found = by_pillow(data), by_field(data)
        assert (expected is None) == (found is None) and (expected is None or torch.equal(expected, found))
        refusals += expected is None
    assert refusals > 30


def test_numbers_out_of_range_are_refused_when_they_are_read() -> None:
    counts, shares = Field("counts", (2,), "npy", "poisson"), Field("vector", (2,), "npy", "bernoulli")
    for bad in (-1, LARGEST_COUNT + 1):
        rows = [counts.encode(torch.tensor([0, 3])), npy(np.array([bad, 1], np.int32))]
        with pytest.raises(ValueError, match=f"expected counts from 0 to {LARGEST_COUNT}, got .*{bad}"):
            counts.decode_rows(rows)
    for bad in (-0.5, 1.5, np.inf):
        with pytest.raises(ValueError, match="expected (finite )?numbers"):
            shares.decode_rows([shares.encode(torch.tensor([0.0, 1.0])), npy(np.array([bad, 1], np.float32))])


def test_text_that_is_no_utf8_is_refused() -> None:
    with pytest.raises(ValueError, match="expected UTF-8 text"):
        TEXT.decode(b"red \xff")


def test_data_that_do_not_fit_are_refused_before_they_are_written() -> None:
    image, vector = Field("image", (3, 4, 5), "npy", "laplace"), Field("vector", (2,), "npy", "normal")
    counts, shares = Field("counts", (2,), "npy", "poisson"), Field("vector", (2,), "npy", "bernoulli")
    assert refused(image, torch.zeros(4, 5, 3, dtype=torch.uint8)) == "expected uint8 (3, 4, 5), got uint8 (4, 5, 3)"
    assert refused(image, torch.zeros(3, 4, 5)) == "expected uint8 (3, 4, 5), got float32 (3, 4, 5)"
    assert refused(vector, torch.zeros(2, dtype=torch.float64)) == "expected float32 (2,), got float64 (2,)"
    assert "expected a dense tensor of shape (2,), got str" == refused(vector, "two")
    assert "1 that are NaN or infinite" in refused(vector, torch.tensor([0.0, float("nan")]))
    assert "1 that are NaN or infinite" in refused(vector, torch.tensor([0.0, float("inf")]))
    assert "expected whole numbers" in refused(counts, torch.tensor([0.5, 1]))
    assert "expected whole numbers" in refused(counts, torch.tensor([float("nan"), 1]))
    assert f"expected counts from 0 to {LARGEST_COUNT}, got -1 to 1" == refused(counts, torch.tensor([-1, 1]))
    assert f"got 1 to {LARGEST_COUNT + 1}" in refused(counts, torch.tensor([LARGEST_COUNT + 1, 1]))
    assert "expected numbers in [0, 1]" in refused(shares, torch.tensor([0.5, 1.5]))
    assert refused(TEXT, torch.zeros(4, dtype=torch.int64)) == "expected a sentence or int64 token ids (5,), got int64 (4,)"
    assert "expected token ids below 7, got 7" == refused(TEXT, torch.tensor([3, 4, 7, 0, 0]))


def test_counts_may_be_of_any_type_of_whole_numbers_but_complex_ones() -> None:
    counts = Field("counts", (2,), "npy", "poisson")
    for dtype in (torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.bfloat16, torch.int8):
        assert counts.decode(counts.encode(torch.tensor([0, 1], dtype=dtype))).tolist() == [0, 1]
    assert f"expected counts from 0 to {LARGEST_COUNT}" in refused(counts, torch.tensor([2**64 - 1, 1], dtype=torch.uint64))
    assert refused(counts, torch.tensor([1j, 2])) == "expected whole numbers, got complex64"


def test_a_word_that_is_spelt_like_the_end_or_the_padding_is_neither() -> None:
    for word in ("<pad>", "<eos>", "<unk>"):
        assert TEXT.decode(TEXT.encode(f"red {word} bird")).tolist() == [3, UNKNOWN, 4, END, PAD]


def test_a_header_that_no_python_can_be_read_from_is_a_value_error() -> None:
    vector = Field("vector", (2,), "npy", "normal")
    data = vector.encode(torch.zeros(2))
    for broken in (data.replace(b"{", b"("), data.replace(b"'descr'", b'"""esc"'), data.replace(b"}", b"\\")):
        with pytest.raises(ValueError):
            vector.decode(broken)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sound", (1,), "npy", "normal"), "kind: expected one of image, vector, counts, text, graph, got 'sound'"),
        (("vector", (1,), "png", "normal"), "codec of vector: expected one of npy, got 'png'"),
        (("image", (1, 2, 2), "npy", "poisson"), "likelihood of image: expected one of normal, laplace, bernoulli, got 'poisson'"),
        (("image", (28, 28), "npy", "normal"), r"expected 3 axes, got \(28, 28\)"),
        (("vector", (0,), "npy", "normal"), r"expected positive sizes, got \(0,\)"),
        (("image", (2, 4, 4), "png", "normal"), "expected 1 or 3 channels first"),
        (("vector", (1,), "npy", "normal", ("a",)), "only text and graphs have one"),
        (("text", (4,), "txt", "categorical", ("a", "b")), "expected it to start with"),
        (("text", (4,), "txt", "categorical", (*SPECIAL, "a", "a")), "each word once"),
        (("text", (4,), "txt", "categorical", (*SPECIAL, "a b")), "without white space, got 'a b'"),
    ],
)
def test_parts_of_a_field_that_do_not_fit_together_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Field(*arguments)


def test_entries_that_a_field_does_not_know_are_refused() -> None:
    with pytest.raises(ValueError, match="'colour'"):
        Field.from_json({**FIELDS[0].to_json(), "colour": "red"})


def test_modality_names_become_file_names_and_are_checked_as_such() -> None:
    check_modality_names(["mnist", "svhn_2"])
    for names in (["mnist"], ["mnist", "../x"], ["mnist", "a.b"], ["mnist", "SVHN"], ["mnist", ""], ["mnist", "2d"]):
        with pytest.raises(ValueError, match="modalit"):
            check_modality_names(names)
    assert member_name("00000007", "svhn", FIELDS[0]) == "00000007.svhn.png"
