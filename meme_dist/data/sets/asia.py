"""Bayesian networks over the eight variables of Lauritzen and Spiegelhalter's "Asia", with how well each fits a sample of the true one."""

from functools import cache
from pathlib import Path

import numpy as np

from meme_dist.data.files import file_sha256
from meme_dist.data.graph_codec import Graph, to_array
from meme_dist.data.sets._arrays import locate, read_arrays
from meme_dist.data.sets._graphs import Graphs, check_graph_missing, fields_of, rows_of
from meme_dist.data.shards import Dataset

FILE, SAMPLE = "asia_bn_20000_regenerated.npz", "asia_5000.npz"
VARIABLES = ("A", "S", "T", "L", "B", "E", "X", "D")
SIZE = len(VARIABLES)


def asia(*, source: Path, missing: float = 0.0, seed: int = 0) -> Dataset:
    """20,000 random graphs of eight vertices, each of a type of its own, with the BIC on a sample of 5,000, standardised.

    One in ten is held out. `source` holds `asia_bn_20000_regenerated.npz` (made again as D-VAE's were, whose own are not distributed).
    A share of `missing` training entries is absent at random, each row keeps one. Raises ValueError for a missing or altered file, and for
    a share above one half.
    """
    check_graph_missing(missing)
    rows = rows_of("asia", lambda: read(source), missing=missing, seed=seed)
    keywords = {"missing": missing, "seed": seed}
    return Dataset("asia", fields_of(VARIABLES, SIZE), rows, (), keywords, files=lambda: locate(source, [FILE]))


def read(source: Path) -> Graphs:
    """All graphs, and their BIC in nats."""
    (path,) = locate(source, [FILE])
    return _read(path, file_sha256(path))


@cache
def _read(path: Path, sha256: str) -> Graphs:
    """The same file is read once; another one of that name, or a repaired one, is read again."""
    arrays = read_arrays(path, {"adjacency": ("rows", SIZE, SIZE), "bic": ("rows",)})
    try:
        x = np.stack([to_array(Graph(VARIABLES, _edges(one)), VARIABLES, SIZE) for one in arrays["adjacency"]])
    except ValueError as error:
        raise ValueError(f"{path}: {error}; get the file again") from error
    return Graphs(x, arrays["bic"])


def adjacency(x: np.ndarray) -> np.ndarray:
    """[R, 8, 8] of 0 and 1, from variable to variable, of arrays in which every variable stands once. Raises ValueError for others."""
    if not complete(x).all():
        raise ValueError(f"expected every variable once in each graph, got others in {int((~complete(x)).sum())} of {len(x)}")
    made = np.zeros((len(x), SIZE, SIZE), dtype=np.int64)
    row, v, u = np.nonzero(x[:, :, 2:])
    made[row, x[row, u, 0] - 1, x[row, v, 0] - 1] = 1
    return made


def complete(x: np.ndarray) -> np.ndarray:
    """Which of these arrays [R, 8, 9] have every variable once, and START before roots alone: which are Bayesian networks of the eight."""
    roots_alone = x[:, :, 1] == (x[:, :, 2:].sum(-1) == 0)
    return (np.sort(x[:, :, 0], 1) == np.arange(1, SIZE + 1)).all(1) & roots_alone.all(1)


def bic(graphs: np.ndarray, sample: np.ndarray) -> np.ndarray:
    """log likelihood of the sample [n, 8] at its maximum - log(n) / 2 for each free probability, of adjacencies [R, 8, 8]; in nats."""
    known: dict[tuple[int, bytes], float] = {}
    total = np.zeros(len(graphs))
    for row, graph in enumerate(graphs):
        for v in range(SIZE):
            key = (v, graph[:, v].astype(np.uint8).tobytes())
            if key not in known:
                known[key] = _score(sample[:, v], sample[:, graph[:, v] > 0])
            total[row] += known[key]
    return total


def sample(source: Path) -> np.ndarray:
    """The 5,000 rows [n, 8] of 0 and 1 on which graphs are scored."""
    (path,) = locate(source, [SAMPLE])
    return read_arrays(path, {"x": ("rows", SIZE)})["x"].astype(np.int64)


def _score(child: np.ndarray, parents: np.ndarray) -> float:
    case = parents @ (1 << np.arange(parents.shape[1]))
    counts = np.bincount(2 * case + child, minlength=2 << parents.shape[1]).reshape(-1, 2).astype(np.float64)
    share = counts / counts.sum(1, keepdims=True).clip(1)
    return float((counts * np.log(np.where(counts > 0, share, 1))).sum() - 0.5 * np.log(len(child)) * len(counts))


def _edges(matrix: np.ndarray) -> tuple[tuple[int, int], ...]:
    return tuple((int(u), int(v)) for u, v in np.argwhere(matrix))
