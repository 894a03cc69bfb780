"""One modality of a data set: how a datum is stored in a shard, what tensor it becomes, and how it is modelled.

Codecs are a fixed table and none of them can run code: `npy` without pickle, `png` without any other image format, `txt` as UTF-8 words.
"""

import contextlib
import functools
import io
import itertools
import math
import re
import struct
import tokenize
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Shaped
from PIL import Image
from torch import Tensor

from meme_dist.data import graph_codec

Kind = Literal["image", "vector", "counts", "text", "graph"]
Codec = Literal["npy", "png", "txt"]
Likelihood = Literal["normal", "laplace", "bernoulli", "categorical", "poisson", "negative_binomial"]

SPECIAL = ("<pad>", "<unk>", "<eos>")  # token ids 0, 1 and 2 of every vocabulary
PAD, UNKNOWN, END = range(3)
LARGEST_COUNT = 2**24  # the last integer up to which float32 is exact

_CODECS = {"image": ("npy", "png"), "vector": ("npy",), "counts": ("npy",), "text": ("txt",), "graph": ("npy",)}
_LIKELIHOODS = {
    "image": ("normal", "laplace", "bernoulli"),
    "vector": ("normal", "laplace", "bernoulli"),
    "counts": ("poisson", "negative_binomial"),
    "text": ("categorical",),
    "graph": ("categorical",),
}
_STORED = {"image": (torch.uint8, "|u1"), "vector": (torch.float32, "<f4"), "counts": (torch.int32, "<i4"), "graph": (torch.int64, "<i4")}
_DIMENSIONS = {"image": (3,), "text": (1,), "graph": (2,)}  # vectors and counts may have any number
_MODES = {1: "L", 3: "RGB"}  # of a png, by the number of channels
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True)
class Field:
    """How one modality is stored, read and modelled.

    `shape` is that of the decoded tensor: (C, H, W) for an image, (T,) token ids for text, (G, 1 + G) for a graph of at most G vertices
    (`meme_dist.data.graph_codec`). A member of the tar is called
    `KEY.MODALITY.CODEC`. Raises ValueError where kind, shape, codec, likelihood and vocabulary do not fit together.
    """

    kind: Kind
    shape: tuple[int, ...]
    codec: Codec
    likelihood: Likelihood
    vocabulary: tuple[str, ...] = ()  # of text, starting with "<pad>", "<unk>", "<eos>"; the vertex types of a graph

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        object.__setattr__(self, "vocabulary", tuple(self.vocabulary))
        _one_of("kind", self.kind, get_args(Kind))
        _one_of(f"codec of {self.kind}", self.codec, _CODECS[self.kind])
        _one_of(f"likelihood of {self.kind}", self.likelihood, _LIKELIHOODS[self.kind])
        _check_shape(self)
        _check_vocabulary(self)

    def encode(self, x: Shaped[Tensor, "*event"] | str) -> bytes:
        """The bytes of one datum: uint8 [C, H, W], float32, whole numbers >= 0, a graph's int64 array, a sentence (or its token ids).

        Raises ValueError for a wrong type, shape or dtype, NaN or infinity, counts that float32 cannot hold, and what is no graph.
        """
        if self.kind == "text":
            return self._sentence(x).encode()
        if not isinstance(x, Tensor) or x.layout != torch.strided:
            raise ValueError(f"expected a dense tensor of shape {self.shape}, got {_sort(x)}")
        if self.kind == "counts":
            x = _whole_numbers(x)
        dtype, descr = _STORED[self.kind]
        if tuple(x.shape) != self.shape or x.dtype != dtype:
            raise ValueError(f"expected {_name(dtype)} {self.shape}, got {_name(x.dtype)} {tuple(x.shape)}")
        self._check_values(x)
        array = x.detach().cpu().contiguous().numpy()
        return _to_png(array) if self.codec == "png" else self._layout[0] + array.astype(descr).tobytes()

    def decode(self, data: Buffer) -> Shaped[Tensor, "*event"]:
        """One datum: an image as float32 in [0, 1], a vector or counts as float32, text as int64 [T] padded with 0, a graph as int64.

        A sentence of T words or more keeps the first T and has no "<eos>". Raises ValueError as `encode` does.
        """
        return self.decode_rows([data])[0]

    def decode_rows(self, data: Sequence[Buffer], out: Shaped[Tensor, "S *event"] | None = None) -> Shaped[Tensor, "R *event"]:
        """`decode` for many rows at once: one copy and one conversion for all of them; into the first rows of `out` where that is given."""
        x = torch.empty((len(data), *self.shape), dtype=self.dtype) if out is None else out[: len(data)]
        if not data:
            return x
        if self.kind == "text":
            x.numpy()[:] = self._tokens(data)
            return x
        array = self._stored(data)
        if self.kind == "counts" and (array.min() < 0 or array.max() > LARGEST_COUNT):
            raise ValueError(f"expected counts from 0 to {LARGEST_COUNT}, got {array.min()} to {array.max()}")
        if self.kind == "image":
            np.divide(array, np.float32(255), out=x.numpy())
            return x
        np.copyto(x.numpy(), array, casting="unsafe")
        if self.kind in ("vector", "graph"):
            self._check_values(x)
        return x

    @property
    def dtype(self) -> torch.dtype:
        """That of a decoded tensor."""
        return torch.int64 if self.kind in ("text", "graph") else torch.float32

    def to_json(self) -> dict[str, Any]:
        """Everything that a manifest has to keep; `from_json` inverts it."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Field":
        """Inverse of `to_json`. Raises ValueError for unknown or missing entries."""
        names = {entry.name for entry in fields(cls)}
        if set(data) != names:
            raise ValueError(f"field: expected the entries {sorted(names)}, got {sorted(data)}")
        return cls(**data)

    @cached_property
    def _ids(self) -> dict[str, int]:
        """Of words; one that is spelt like the padding or the end of a sentence is neither."""
        return {word: number for number, word in enumerate(self.vocabulary) if number not in (PAD, END)}

    def _sentence(self, x: Tensor | str) -> str:
        if isinstance(x, str):
            return " ".join(x.split())
        if not isinstance(x, Tensor) or x.layout != torch.strided:
            raise ValueError(f"expected a sentence (str) or int64 token ids {self.shape}, got {_sort(x)}")
        if tuple(x.shape) != self.shape or x.dtype != torch.int64:
            raise ValueError(f"expected a sentence or int64 token ids {self.shape}, got {_name(x.dtype)} {tuple(x.shape)}")
        ids = x.tolist()
        if bad := [number for number in ids if not 0 <= number < len(self.vocabulary)]:
            raise ValueError(f"expected token ids below {len(self.vocabulary)}, got {bad[0]}")
        stop = next((place for place, number in enumerate(ids) if number in (PAD, END)), len(ids))
        return " ".join(self.vocabulary[number] for number in ids[:stop])

    def _tokens(self, data: Sequence[Buffer]) -> np.ndarray:
        """Ids of the words of some sentences, [R, T]: one list of all, since numpy takes long to look into lists of lists."""
        length = self.shape[0]
        filling, ids = [END, *[PAD] * (length - 1)], []
        for sentence in data:
            words = _words(sentence)[:length]
            ids += map(self._ids.get, words, itertools.repeat(UNKNOWN))
            ids += filling[: length - len(words)]
        return np.fromiter(ids, np.int64, len(ids)).reshape(len(data), length)

    def _stored(self, data: Sequence[Buffer]) -> np.ndarray:
        """The arrays of some rows as they are stored, [R, *event]; read only."""
        descr = _STORED[self.kind][1]
        header, size = self._layout
        if self.codec == "npy" and all([len(datum) == size for datum in data]):
            files = np.frombuffer(b"".join(data), dtype=np.uint8).reshape(len(data), size)
            if (files[:, : len(header)] == np.frombuffer(header, dtype=np.uint8)).all():  # what `encode` writes: no parsing
                return files[:, len(header) :].view(descr).reshape(len(data), *self.shape)
        if self.codec == "png":
            channels, height, width = self.shape
            pixels = b"".join([_from_png(datum, self.shape) for datum in data])
            return np.frombuffer(pixels, dtype=np.uint8).reshape(len(data), height, width, channels).transpose(0, 3, 1, 2)
        return np.frombuffer(b"".join([_from_npy(descr, datum, self.shape) for datum in data]), dtype=descr).reshape(len(data), *self.shape)

    @cached_property
    def _layout(self) -> tuple[bytes, int]:
        """The header that `encode` gives an npy file, and the size of the whole file."""
        descr = _STORED[self.kind][1]
        out = io.BytesIO()
        np.lib.format.write_array_header_1_0(out, {"descr": descr, "fortran_order": False, "shape": self.shape})
        return out.getvalue(), out.tell() + math.prod(self.shape) * np.dtype(descr).itemsize

    def _check_values(self, x: Tensor) -> None:
        if self.kind == "vector" and not np.isfinite(x.numpy(force=True)).all():
            raise ValueError(f"expected finite numbers, got {int((~torch.isfinite(x)).sum())} that are NaN or infinite")
        if self.kind == "vector" and self.likelihood == "bernoulli" and ((x < 0) | (x > 1)).any():
            raise ValueError(f"expected numbers in [0, 1] for a bernoulli likelihood, got {float(x.min())} to {float(x.max())}")
        if self.kind == "counts" and ((x < 0) | (x > LARGEST_COUNT)).any():
            raise ValueError(f"expected counts from 0 to {LARGEST_COUNT}, got {int(x.min())} to {int(x.max())}")
        if self.kind == "graph":
            graph_codec.check(x.numpy(force=True).reshape(-1, *self.shape), len(self.vocabulary))


def member_name(key: str, modality: str, field: Field) -> str:
    """What a datum is called in the tar: `KEY.MODALITY.CODEC`."""
    return f"{key}.{modality}.{field.codec}"


def check_modality_names(names: Sequence[str]) -> None:
    """Raise ValueError unless there are two or more names, each a word in lower case (it becomes part of a file name)."""
    if len(names) < 2:
        raise ValueError(f"fields: expected two or more modalities, got {list(names)}")
    for name in names:
        if not re.fullmatch(r"[a-z][a-z0-9_]{0,39}", name):
            raise ValueError(f"modality {name!r}: expected a lower-case letter, then up to 39 letters, digits or _")


def _one_of(what: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{what}: expected one of {', '.join(allowed)}, got {value!r}")


def _check_shape(field: Field) -> None:
    if not field.shape or any(not isinstance(size, int) or size < 1 for size in field.shape):
        raise ValueError(f"shape: expected positive sizes, got {field.shape}")
    if len(field.shape) not in _DIMENSIONS.get(field.kind, (len(field.shape),)):
        raise ValueError(f"shape of {field.kind}: expected {_DIMENSIONS[field.kind][0]} axes, got {field.shape}")
    if field.kind == "graph" and field.shape[1] != 1 + field.shape[0]:
        raise ValueError(f"shape of a graph: expected (G, 1 + G), got {field.shape}")
    if field.codec == "png" and field.shape[0] not in _MODES:
        raise ValueError(f"shape of a png: expected 1 or 3 channels first, got {field.shape}")


def _check_vocabulary(field: Field) -> None:
    words = field.vocabulary
    if field.kind not in ("text", "graph"):
        if words:
            raise ValueError(f"vocabulary: only text and graphs have one, got {len(words)} words for {field.kind}")
        return
    if field.kind == "graph":
        if not words or {graph_codec.START, graph_codec.END} & set(words):
            raise ValueError(f"vocabulary of a graph: expected its vertex types, without START and END, got {words[:8]}")
    elif words[: len(SPECIAL)] != SPECIAL:
        raise ValueError(f"vocabulary: expected it to start with {SPECIAL}, got {words[: len(SPECIAL)]}")
    if len(set(words)) != len(words):
        raise ValueError("vocabulary: expected each word once")
    if bad := [word for word in words if word.split() != [word]]:
        raise ValueError(f"vocabulary: expected words without white space, got {bad[0]!r}")


def _words(data: Buffer) -> list[str]:
    try:
        return str(data, "utf-8").split()
    except UnicodeDecodeError as error:
        raise ValueError(f"expected UTF-8 text, got a byte that is none ({error.reason} at byte {error.start})") from error


def _whole_numbers(x: Tensor) -> Tensor:
    if x.is_complex():
        raise ValueError(f"expected whole numbers, got {_name(x.dtype)}")
    x = x if x.is_floating_point() else x.to(torch.int64)  # torch does not compare all unsigned types
    if not torch.isfinite(x).all() or (x != x.round() if x.is_floating_point() else x != x).any():
        raise ValueError(f"expected whole numbers, got {_name(x.dtype)} with fractions, NaN or infinity")
    if x.numel() and (x.min() < 0 or x.max() > LARGEST_COUNT):
        raise ValueError(f"expected counts from 0 to {LARGEST_COUNT}, got {x.min().item()} to {x.max().item()}")
    return x.to(torch.int32)


def _from_npy(descr: str, data: Buffer, shape: tuple[int, ...]) -> bytes:
    """Any other way of writing the same array; the header is read on its own, so that it cannot ask for memory or for pickle."""
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"expected npy of version 1 or 2, got {version}")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        found, fortran, dtype = read(stream)
    except (SyntaxError, tokenize.TokenError) as error:  # numpy's second look, as Python of old times
        raise ValueError(f"expected the header of an npy file, got something else ({error})") from error
    if found != shape or dtype != np.dtype(descr):
        raise ValueError(f"expected {np.dtype(descr)} {shape}, got {dtype} {found}")
    body = stream.read()
    if len(body) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"expected {math.prod(shape) * dtype.itemsize} bytes of {dtype}, got {len(body)}")
    return np.frombuffer(body, dtype).reshape(shape, order="F" if fortran else "C").tobytes()


def _to_png(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(array[0] if len(array) == 1 else np.ascontiguousarray(array.transpose(1, 2, 0))).save(out, format="PNG")
    return out.getvalue()


def _from_png(data: Buffer, shape: tuple[int, ...]) -> bytes:
    """The pixels, [H, W, C]. Pillow unpacks them; to have it look for all else that a file may hold takes half as long again."""
    channels, height, width = shape
    mode = _MODES[channels]
    if (packed := _packed_pixels(data, _png_head(shape))) is not None:
        with contextlib.suppress(OSError, ValueError):  # whatever is wrong with it: said below
            return Image.frombytes(mode, (width, height), packed, "zip", mode).tobytes()
    try:
        image = Image.open(io.BytesIO(data), formats=["PNG"])
        if image.size != (width, height) or image.mode != mode:  # before the pixels are unpacked
            raise ValueError(f"expected a {mode} png of {width} x {height}, got {image.mode} {image.size[0]} x {image.size[1]}")
        return image.tobytes()
    except (OSError, SyntaxError) as error:  # what pillow raises for broken files
        raise ValueError(f"expected a png of shape {shape}, got {len(data)} bytes that are none ({error})") from error


def _packed_pixels(data: Buffer, head: bytes) -> bytes | None:
    """What the file packs, if it is one that begins with `head` and holds nothing else: what `encode` writes."""
    view, place, found = memoryview(data), len(head), []
    if view[:place] != head:
        return None
    while view[place + 4 : place + 8] == b"IDAT":
        size = int.from_bytes(view[place : place + 4])
        found.append(view[place + 8 : place + 8 + size])
        place += size + 12  # a chunk is its size, its name, so many bytes, and a checksum
    return b"".join(found) if view[place:] == _PNG_END else None


@functools.cache
def _png_head(shape: tuple[int, ...]) -> bytes:
    """Signature and first chunk of a png of 8 bits a channel, not interlaced."""
    channels, height, width = shape
    chunk = struct.pack(">4sIIBBBBB", b"IHDR", width, height, 8, 2 if channels == 3 else 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))


def _sort(x: object) -> str:
    """What came in the place of a dense tensor, for messages."""
    return str(x.layout) if isinstance(x, Tensor) else type(x).__name__


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
