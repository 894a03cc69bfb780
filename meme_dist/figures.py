"""Figures of a run: grids of what the model makes, latent maps, curves over steps, relatedness. Each function writes one PNG.

They take arrays and plain values only, no model; `meme_dist.metrics.generation` and `meme_dist.evaluate` make those.
"""

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from cycler import cycler
from jaxtyping import Shaped
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from scipy.cluster.hierarchy import dendrogram
from torch import Tensor

from meme_dist.data.fields import END, PAD, Field

COLOURS = ("#2f6db5", "#d9622b", "#2a8a57", "#8256a8", "#c23b4b", "#7a5c3e", "#cf6ab0", "#5d6a74", "#a09a22", "#1f9aa6")
INK = "#222831"
STYLE: dict[Any, Any] = {
    "figure.dpi": 110,
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#8a929a",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=COLOURS),
    "grid.color": "#e3e6e9",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
}

Project = Callable[[np.ndarray], np.ndarray]
"""From points [R, D] to the plane [R, 2]."""


# ---- grids of data ----------------------------------------------------------------------------------------------------------------------


def cross_grid(
    path: Path,
    fields: Mapping[str, Field],
    inputs: Mapping[str, Shaped[Tensor, "R *event"]],
    outputs: Mapping[tuple[str, str], Shaped[Tensor, "R *event"]],
) -> None:
    """For each source a block: its data above, and below them what the model makes of them in every modality, column by column."""
    blocks = []
    for source in inputs:
        made = [(target, outputs[source, target]) for target in fields if (source, target) in outputs]
        labelled = [(f"reconstructed {target}" if target == source else f"made {target}", fields[target], data) for target, data in made]
        blocks.append([(f"given {source}", fields[source], inputs[source]), *labelled])
    _grid(path, blocks, "Cross generation: one sample each")


def joint_grid(
    path: Path,
    fields: Mapping[str, Field],
    drawn: Mapping[str, Shaped[Tensor, "R *event"]],
    title: str = "Draws from the prior: each column is one draw",
) -> None:
    """One draw, or row, a column, decoded into every modality."""
    _grid(path, [[(name, fields[name], data) for name, data in drawn.items()]], title)


def imputed_grid(
    path: Path,
    fields: Mapping[str, Field],
    shown: Mapping[str, Shaped[Tensor, "R *event"]],
    observed: Mapping[str, Shaped[Tensor, " R"]],
) -> None:
    """Rows of data, one a column; what was missing and is the model's stands on a coloured ground."""
    rows = [(name, fields[name], data) for name, data in shown.items()]
    marks = [[not bool(there) for there in observed[name]] for name in shown]
    _grid(path, [rows], "Imputation: what was missing stands on colour", marks=[marks])


def words(field: Field, tokens: Shaped[Tensor, " T"]) -> str:
    """A sentence up to its `<eos>`; a vocabulary of single characters is spelled without spaces."""
    ids = [int(token) for token in tokens]
    ids = ids[: ids.index(END)] if END in ids else ids
    spoken = [field.vocabulary[number] for number in ids if number != PAD]
    letters = all(len(word) == 1 for word in field.vocabulary[3:])
    return ("" if letters else " ").join(spoken)


def _grid(path: Path, blocks: Sequence[Sequence[tuple[str, Field, Tensor]]], title: str, *, marks: Sequence | None = None) -> None:
    columns = max(len(data) for block in blocks for _, _, data in block)
    height = sum(_tall(field) for block in blocks for _, field, _ in block) + 0.35 * (len(blocks) - 1)
    with _figure(path, (0.78 * (columns + 2.1), 0.78 * height + 0.45)) as figure:
        axes = figure.add_subplot()
        axes.set(xlim=(-2.1, columns), ylim=(height, 0), aspect="equal")
        axes.axis("off")
        axes.set_title(title)
        top = 0.0
        for number, block in enumerate(blocks):
            for line, (label, field, data) in enumerate(block):
                axes.text(
                    -0.12, top + _tall(field) / 2, label, ha="right", va="center", weight="bold" if label.startswith("given") else "normal"
                )
                limits = _limits(field, data)
                for column, datum in enumerate(data):
                    _cell(axes, field, datum, column, top, limits=limits, marked=bool(marks and marks[number][line][column]))
                top += _tall(field)
            top += 0.35


def _cell(axes: Axes, field: Field, datum: Tensor, x: float, y: float, *, limits: tuple[float, float], marked: bool) -> None:
    if marked:
        axes.add_patch(Rectangle((x, y), 1, _tall(field), color="#f3b183", linewidth=0, zorder=-1))
    if field.kind == "text":
        _text(axes, words(field, datum), x + 0.5, y + _tall(field) / 2)
        return
    pixels = _pixels(field, datum)
    tall, wide = pixels.shape[:2] if pixels.shape[0] > 1 else (2, 3)  # a vector is a band, whatever its length
    half_x, half_y = 0.45 * wide / max(tall, wide), 0.45 * tall / max(tall, wide)
    extent = (x + 0.5 - half_x, x + 0.5 + half_x, y + 0.5 + half_y, y + 0.5 - half_y)
    axes.imshow(pixels, extent=extent, cmap="viridis", vmin=limits[0], vmax=limits[1], interpolation="nearest", aspect="equal")


def _tall(field: Field) -> float:
    """The height of a line of the grid: a word or two need less than a picture."""
    return 0.5 if field.kind == "text" and field.shape[0] <= 8 else 1.0


def _text(axes: Axes, text: str, x: float, y: float) -> None:
    lines = textwrap.wrap(text, width=9 if len(text) < 40 else 16)[:7] or ["(empty)"]
    size = min(9.0, 60 / max(5, *(len(line) + 1 for line in lines)), 42 / len(lines))
    axes.text(x, y, "\n".join(lines), ha="center", va="center", fontsize=size, linespacing=1.0)


def _pixels(field: Field, datum: Tensor) -> np.ndarray:
    """An image as itself in [0, 1]; the numbers of a vector as a band, of a matrix (a spectrogram) as a plane."""
    x = datum.detach().float().cpu().numpy()
    if field.kind == "image":
        x = np.moveaxis(x, 0, -1)[..., : 3 if x.shape[0] >= 3 else 1]
        return x.clip(0, 1).repeat(1 if x.shape[-1] == 3 else 3, -1)
    x = np.log1p(x.clip(0)) if field.kind == "counts" else x
    return x.reshape(-1, x.shape[-1])


def _limits(field: Field, data: Tensor) -> tuple[float, float]:
    """The colours' range of a line of the grid: all data in it are painted alike."""
    if field.kind in ("image", "text") or len(data) == 0:
        return 0.0, 1.0
    low, high = np.quantile(np.stack([_pixels(field, datum) for datum in data]), (0.01, 0.99))
    return float(low), max(float(high), float(low) + 1e-6)


# ---- latent space -----------------------------------------------------------------------------------------------------------------------


def pca(points: np.ndarray) -> np.ndarray:
    """The two directions of largest variance, their signs fixed so that a figure does not flip from run to run."""
    centred = points - points.mean(0)
    axes = np.linalg.svd(centred, full_matrices=False)[2][:2]
    axes *= np.where(axes[np.arange(len(axes)), np.abs(axes).argmax(1)] < 0, -1, 1)[:, None]
    plane = centred @ axes.T
    return np.pad(plane, ((0, 0), (0, 2 - plane.shape[1])))


def tsne(points: np.ndarray) -> np.ndarray:
    """t-SNE from a fixed start; a few seconds for a thousand points. Distances between far clusters mean nothing in it."""
    from sklearn.manifold import TSNE  # half a second to import, and only here

    return TSNE(perplexity=min(30.0, (len(points) - 1) / 4), init="pca", random_state=0).fit_transform(points)


def latent_map(
    path: Path,
    points: Mapping[str, np.ndarray],
    label: Mapping[str, np.ndarray],
    classes: Sequence[str],
    *,
    project: Project = pca,
) -> None:
    """Posterior means of every modality on one plane: coloured by class (where there are classes) and by modality.

    `points[name]` [R, D] and `label[name]` [R], -1 where unlabelled.
    """
    plane = project(np.concatenate(list(points.values())))
    owner = np.repeat(np.arange(len(points)), [len(p) for p in points.values()])
    known = np.concatenate([label[name] for name in points])
    panels: list[tuple[str, np.ndarray, list[str], Sequence[Any]]] = [("By modality", owner, list(points), COLOURS)]
    if classes and (known >= 0).any():
        panels.insert(0, ("By class", known, list(classes), _palette(len(classes))))
    with _figure(path, (6.2 * len(panels), 5.6)) as figure:
        for axes, (title, group, names, colours) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            _scatter(axes, plane, group, names, colours)
            axes.set(title=title, xticks=[], yticks=[])
        figure.supxlabel(f"posterior means, {getattr(project, '__name__', 'projected')}", fontsize=9)


def _scatter(axes: Axes, plane: np.ndarray, group: np.ndarray, names: Sequence[str], colours: Sequence[Any]) -> None:
    if (group < 0).any():
        axes.scatter(*plane[group < 0].T, s=6, color="#c9ced3", label="unlabelled")
    for number, name in enumerate(names):
        axes.scatter(*plane[group == number].T, s=9, alpha=0.75, linewidths=0, color=colours[number % len(colours)], label=name)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), markerscale=2, handletextpad=0.2) if len(names) <= 20 else None


def _palette(count: int) -> Sequence[Any]:
    return COLOURS if count <= len(COLOURS) else list(mpl.colormaps["turbo"](np.linspace(0.05, 0.95, count)))


# ---- relatedness ------------------------------------------------------------------------------------------------------------------------


def relatedness_panels(path: Path, related: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> None:
    """For every two modalities, from `results["relatedness"]`: distances of paired and unpaired data, the class matrix, the dendrogram."""
    wide = any("class_matrix" in entry for entry in related)
    with _figure(path, (14 if wide else 5.5, 4.1 * len(related))) as figure:
        for line, entry in zip(figure.subplots(len(related), 3 if wide else 1, squeeze=False), related, strict=True):
            _histogram(line[0], entry)
            if wide:
                _class_matrix(line[1], entry, classes)
                _dendrogram(line[2], entry, classes)


def _histogram(axes: Axes, entry: Mapping[str, Any]) -> None:
    kind = "auroc_class" if "auroc_class" in entry else "auroc_row"
    edges = np.asarray(entry["histogram"]["edges"])
    for name, colour in (("unpaired", "#8a929a"), ("paired", COLOURS[1])):
        counts = np.asarray(entry["histogram"][name], dtype=float)
        axes.stairs(counts / max(1.0, counts.sum()) / np.diff(edges), edges, fill=True, alpha=0.55, color=colour, label=name)
    value = entry[kind]["value"]
    meaning = "same class" if kind == "auroc_class" else "same row"
    axes.set(title=" and ".join(entry["modalities"]), xlabel="W2 distance of posteriors", ylabel="density")
    axes.legend(title=f"paired: {meaning}\nAUROC {'–' if value is None else f'{value:.3f}'}", loc="upper right", title_fontsize=9)


def _class_matrix(axes: Axes, entry: Mapping[str, Any], classes: Sequence[str]) -> None:
    if "class_matrix" not in entry:
        axes.axis("off")
        return
    matrix = np.array(entry["class_matrix"], dtype=float)
    image = axes.imshow(matrix, cmap="viridis_r")
    first, second = entry["modalities"]
    axes.set(title="mean W2 by class", xlabel=second, ylabel=first)
    axes.grid(False)
    if len(classes) <= 20:
        axes.set_xticks(range(len(classes)), classes, rotation=45 if max(map(len, classes)) > 2 else 0)
        axes.set_yticks(range(len(classes)), classes)
    assert axes.figure is not None
    axes.figure.colorbar(image, ax=axes, shrink=0.85)


def _dendrogram(axes: Axes, entry: Mapping[str, Any], classes: Sequence[str]) -> None:
    tree = entry.get("linkage")
    if tree is None:
        axes.axis("off")
        return
    dendrogram(np.asarray(tree), labels=list(classes), ax=axes, color_threshold=0, above_threshold_color=COLOURS[0], leaf_font_size=10)
    axes.set(title="classes by mean W2", ylabel="W2")
    axes.grid(False)
    axes.tick_params(axis="x", rotation=45 if max(map(len, classes)) > 2 else 0)
    low = min(row[2] for row in tree)
    axes.set_ylim(bottom=max(0.0, low - 0.15 * (max(row[2] for row in tree) - low) - 1e-6))


# ---- coherence by inputs ----------------------------------------------------------------------------------------------------------------

CEILINGS = {"ceiling": (0, (5, 3)), "sampling_ceiling": (0, (1, 2))}  # how known ceilings are drawn


def inputs_curve(path: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """Coherence against the number of inputs, from `results["coherence_by_inputs"]`: over all targets, and each target.

    Known ceilings are dashed, and those of one draw from the exact posterior dotted.
    """
    targets = list(dict.fromkeys(entry["target"] for entry in entries))
    with _figure(path, (6.4, 4.2)) as figure:
        axes = figure.subplots()
        for target, colour in zip(targets, [INK, *_palette(len(targets))], strict=False):
            line = [entry for entry in entries if entry["target"] == target]
            x, value = [entry["inputs"] for entry in line], np.array([entry["value"] for entry in line], dtype=float)
            low, high = (np.array([entry[name] for entry in line], dtype=float) for name in ("low", "high"))
            axes.plot(x, value, color=colour, marker="o", markersize=3.5, label="all targets" if target is None else f"to {target}")
            axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
            for name, dashes in CEILINGS.items():
                known = [(entry["inputs"], entry[name]) for entry in line if name in entry]
                axes.plot(*zip(*known, strict=True), color=colour, linestyle=dashes, linewidth=1.0) if known else None
        axes.set(xlabel="modalities given", ylabel="cross coherence", ylim=(0, 1.02), xticks=sorted({e["inputs"] for e in entries}))
        axes.legend(loc="best")


# ---- curves over steps ------------------------------------------------------------------------------------------------------------------


def loss_curves(path: Path, log: Sequence[Mapping[str, float]]) -> None:
    """The loss and its terms over steps, one panel a kind of term (`bound/photo` and `bound/mnist` share one)."""
    _curves(path, log, _by_kind(log, is_loss))


def coherence_curves(path: Path, log: Sequence[Mapping[str, float]], real: Mapping[str, float] | None = None) -> None:
    """Every coherence over steps, with the accuracy of each target's classifier on real data as a dashed reference."""
    _curves(path, log, _by_kind(log, is_coherence), real=real or {}, unit=True)


COHERENCES = ("cross_coherence", "joint_coherence")
NO_TERMS = (*COHERENCES, "classifier", "latent_accuracy", "log_likelihood", "auroc_class", "auroc_row")
RATES = ("step", "rows_per_second", "gradient_norm", "learning_rate")


def is_loss(name: str) -> bool:
    """Whether a name in the log is the loss or one of its terms."""
    return _kind(name) not in NO_TERMS + RATES


def is_coherence(name: str) -> bool:
    """Whether a name in the log is a coherence."""
    return _kind(name) in COHERENCES


def _kind(name: str) -> str:
    return name.split("/")[0]


def _by_kind(log: Sequence[Mapping[str, float]], keep: Callable[[str], bool]) -> dict[str, list[str]]:
    panels: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for line in log for name in line):
        if keep(name):
            panels.setdefault(_kind(name), []).append(name)
    return panels


def _curves(
    path: Path,
    log: Sequence[Mapping[str, float]],
    panels: Mapping[str, Sequence[str]],
    *,
    real: Mapping[str, float] | None = None,
    unit: bool = False,
) -> None:
    """One panel a kind, one line a name; lines without a number at a step are drawn through it."""
    wide = min(3, max(1, len(panels)))
    tall = -(-max(1, len(panels)) // wide)
    with _figure(path, (5.4 * wide, 3.5 * tall)) as figure:
        grid = figure.subplots(tall, wide, squeeze=False).ravel()
        for axes, (kind, names) in zip(grid, panels.items(), strict=False):
            for number, name in enumerate(sorted(names)):
                _curve(axes, log, name, colour=_palette(len(names))[number])
            patterns = cycle([(0, (5, 3)), (0, (1, 2)), (0, (5, 2, 1, 2))])
            for target in sorted({name.split(">")[-1] for name in names if ">" in name} & set(real or {})):
                dashes = next(patterns)
                axes.axhline((real or {})[target], color="#8a929a", linestyle=dashes, linewidth=1.0, label=f"classifier of real {target}")
            axes.set(title=kind.replace("_", " "), xlabel="step", **({"ylim": (0, 1.02)} if unit else {}))
            axes.legend(loc="best", ncols=1 + len(names) // 9) if len(names) > 1 or "/" in names[0] else None
        for axes in grid[len(panels) :]:
            axes.axis("off")


def _curve(axes: Axes, log: Sequence[Mapping[str, float]], name: str, *, colour: Any) -> None:
    points = [(line["step"], line[name]) for line in log if line.get(name) is not None]
    label = name.split("/", 1)[-1].replace(">", " → ").replace("=", " = ")
    axes.plot(*zip(*points, strict=True), color=colour, label=label, marker="o" if len(points) < 12 else "", markersize=3.5)


@contextmanager
def _figure(path: Path, size: tuple[float, float]) -> Iterator[Figure]:
    """A figure of its own, without pyplot's global state, written when the block ends."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110, facecolor="white")
