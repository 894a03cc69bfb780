"""Neural architectures that ENAS sampled, and what accuracy shared weights reach (Pham et al. 2018; as D-VAE distributes them, MIT)."""

import gzip
import json
import zlib
from functools import cache
from pathlib import Path

import numpy as np

from meme_dist.data.files import file_sha256
from meme_dist.data.graph_codec import check
from meme_dist.data.sets._arrays import locate
from meme_dist.data.sets._graphs import Graphs, check_graph_missing, fields_of, rows_of
from meme_dist.data.shards import Dataset

FILE = "final_structures6.txt.gz"
OPERATIONS = ("conv3", "sep3", "conv5", "sep5", "avg3", "max3")
PROPERTIES = (("conv", "3"), ("sep", "3"), ("conv", "5"), ("sep", "5"), ("avg", "3"), ("max", "3"))  # kind and size
SIZE = 6  # layers, each after the one before
DROPPED = 1000  # first lines, from a controller that had just begun (Zhang et al. 2019)


def enas(*, source: Path, missing: float = 0.0, seed: int = 0) -> Dataset:
    """19,020 architectures of six layers, each a graph, with its accuracy on CIFAR-10, standardised: 17,118 to train on, 1,902 to test on.

    A layer has one of six operations; the one before leads to it, and by skip connections any before that and the input (START).
    `source` holds `final_structures6.txt.gz`: lines `[[operation], [operation, skips ...], ...], accuracy`. A share of `missing` training
    entries is absent at random, each row keeps one. Raises ValueError for a missing or altered file, and for a share above one half.
    """
    check_graph_missing(missing)
    rows = rows_of("enas", lambda: read(source), missing=missing, seed=seed)
    keywords = {"missing": missing, "seed": seed}
    return Dataset("enas", fields_of(OPERATIONS, SIZE), rows, (), keywords, files=lambda: locate(source, [FILE]))


def read(source: Path) -> Graphs:
    """All graphs but the first thousand, and their accuracies in [0, 1]."""
    (path,) = locate(source, [FILE])
    return _read(path, file_sha256(path))


@cache
def _read(path: Path, sha256: str) -> Graphs:
    """The same file is read once; another one of that name, or a repaired one, is read again."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as stream:
            lines = [json.loads(f"[{line}]") for line in stream][DROPPED:]
        x = np.stack([_array(layers) for layers, _ in lines])
        value = np.array([accuracy for _, accuracy in lines], dtype=np.float64)
        check(x, len(OPERATIONS))
    except (OSError, EOFError, ValueError, TypeError, zlib.error) as error:
        raise ValueError(f"{path}: expected gzipped text of graphs of {SIZE} layers ({error}); get the file again") from error
    return Graphs(x, value)


def _array(layers: list[list[int]]) -> np.ndarray:
    if [len(layer) for layer in layers] != list(range(1, SIZE + 1)):
        raise ValueError(f"expected layers of 1 to {SIZE} numbers, got {[len(layer) for layer in layers]}")
    x = np.zeros((SIZE, 1 + SIZE), dtype=np.int64)
    for v, (operation, *skips) in enumerate(layers):
        x[v, 0], x[v, 1 + v], x[v, 1 : 1 + v] = 1 + operation, 1, skips
    return x
