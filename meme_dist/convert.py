"""`meme-dist shards convert`: single-cell files into shards."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from meme_dist.data.index import Manifest
from meme_dist.data.shards import write_shards


@dataclass(frozen=True)
class Convert:
    """MuData and AnnData files as shards: each modality of a .h5mu, and each .h5ad, is a modality; cells are matched by name.

    A cell that is in one modality and not in another lacks the other; an all-zero cell is there. Whole numbers become counts with a
    negative binomial likelihood, other numbers vectors with a normal one.
    """

    files: tyro.conf.Positional[tuple[Path, ...]]
    """Files to read, .h5mu or .h5ad."""
    out: Path
    """New folder for the shards."""
    layer: tuple[str, ...] = ()
    """What to read instead of X: a layer of all modalities, or MODALITY=LAYER for each that has one."""
    label: str | None = None
    """Column of obs with the classes."""
    features: str | None = None
    """For a .h5ad: column of var that says to which modality a feature belongs (in 10x files: feature_types)."""
    obsm: tuple[str, ...] = ()
    """For a .h5ad: arrays of obsm that are modalities too."""
    test_share: float = 0.2
    """Share of the cells to test on, drawn at random."""
    seed: int = 0
    """Seed of that draw, and of the order of the rows."""
    rows_per_shard: int = 1024
    """Rows of each tar file."""


def convert(options: Convert) -> Manifest:
    """Write the shards. Raises ValueError for files and options that do not fit, saying what there is."""
    from meme_dist.data.adapters.mudata import from_h5

    dataset = from_h5(
        *options.files,
        layers=_layers(options.layer),
        label=options.label,
        features=options.features,
        obsm=options.obsm,
        test_share=options.test_share,
        name=options.files[0].name.split(".")[0] if options.files else "none",
        seed=options.seed,
    )
    return write_shards(dataset, options.out, rows_per_shard=options.rows_per_shard)


def _layers(given: Sequence[str]) -> dict[str, str] | str:
    """One layer for all modalities, or one for each that is named. Raises ValueError for a mixture of both."""
    if not given:
        return "X"
    if len(given) == 1 and "=" not in given[0]:
        return given[0]
    pairs = [entry.partition("=") for entry in given]
    if bad := [name for name, sign, layer in pairs if not (name and sign and layer)]:
        raise ValueError(f"layer: expected one layer, or MODALITY=LAYER for each modality, got {bad[0]!r} among {list(given)}")
    return {name: layer for name, _, layer in pairs}
