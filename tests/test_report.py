"""Laws of figures and report: what stands in them is what was measured, and every link leads somewhere."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from sklearn.decomposition import PCA

from meme_dist import figures, report
from meme_dist.data.fields import Field
from meme_dist.evaluate import Measured, Measures, measure
from tests.planted import CLASSES, modality, planted, rows, shown

pytestmark = pytest.mark.repeats

VECTOR = Field(kind="vector", shape=(CLASSES,), codec="npy", likelihood="normal")
LETTERS = Field(kind="text", shape=(6,), codec="txt", likelihood="categorical", vocabulary=("<pad>", "<unk>", "<eos>", *"enosvz"))
WORDS = Field(kind="text", shape=(8,), codec="txt", likelihood="categorical", vocabulary=("<pad>", "<unk>", "<eos>", "a", "small", "bird"))
IMAGE = Field(kind="image", shape=(3, 6, 4), codec="png", likelihood="laplace")
RUN = {
    "recipe": "digits",
    "keywords": {"steps": 300, "latent_dim": 8},
    "command": ["meme-dist", "train", "digits", "--run", "two words"],
    "commit": "abc123",
    "versions": {"torch": "2.13.0"},
    "machine": {"cores": 2},
    "format": 1,
}
LOG = [
    {"step": s, "loss": 90.0 - s / 10, "bound/a": -40.0, "bound/b": -50.0 + s / 20, "rows_per_second": 900.0} for s in range(50, 301, 50)
]
EVALUATIONS = [{"step": s, "held_out/loss": 80.0, "cross_coherence/a>b": s / 400, "cross_coherence/b>a": s / 500} for s in (100, 200, 300)]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def drawn(path: Path) -> float:
    """The share of the picture that is not white."""
    return float((pixels(path) < 250).any(-1).mean())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder as training and evaluation leave it, of a planted model on incomplete rows."""
    path = tmp_path_factory.mktemp("run")
    label = np.arange(80) % CLASSES
    seen = {"a": np.where(np.arange(80) % 5 == 0, -1, label), "b": label}
    objective, batch = planted({"a": modality(), "b": modality([1, 0, 2, 3])}), rows(seen, label, padding=4)
    fields, classes, classifiers = dict.fromkeys("ab", VECTOR), tuple("wxyz"), dict.fromkeys("ab", shown)
    measures = Measures(joint_draws=100, probe_rows=80, relatedness_rows=80, likelihood_rows=40, likelihood_samples=(1, 4))
    measured = measure(objective, train=[batch], test=[batch], fields=fields, classes=classes, classifiers=classifiers, measures=measures)
    (path / "run.json").write_text(json.dumps(RUN))
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*LOG, *EVALUATIONS]))
    (path / "results.json").write_text(json.dumps({"step": 300, **measured.results}))
    report.illustrate(path, objective, batch, fields=fields, classes=classes, measured=measured)
    report.write_report(path)
    return path


def test_the_report_says_what_was_measured_and_what_ran(folder: Path) -> None:
    text = (folder / "report.md").read_text()
    assert re.search(r"\| a +\| +\| 0\.500 \[0\.\d{3}, 0\.\d{3}\] \|", text)  # `b` shows two of four classes wrongly
    assert re.search(r"\| b +\| 1\.000 \[", text) and re.search(r"\*real data\* \| 1\.000 \[0\.\d{3}, 1\.000\] \| 1\.000", text)
    assert "meme-dist train digits --run 'two words'" in text and "`abc123`" in text and "keywords: latent_dim" in text
    assert "trained to step 300, where the loss was 60.0" in text and "cross coherence 0.500 to 1.000" in text


def test_every_figure_of_the_report_is_there_is_shown_once_and_has_a_caption(folder: Path) -> None:
    text = (folder / "report.md").read_text()
    links = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    expected = {"cross_generation", "joint_generation", "imputation", "coherence", "loss", "latent_map", "relatedness"}
    assert {Path(link).stem for link in links} == expected == set(report.CAPTIONS) - {"coherence_by_inputs"} and len(links) == len(expected)
    for link in links:
        assert not Path(link).is_absolute() and 0.005 < drawn(folder / link) < 0.95
    assert all(caption in text for name, caption in report.CAPTIONS.items() if name in expected)


def test_a_report_of_what_is_there_so_far_leaves_the_rest_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a run folder, got one without run.json"):
        report.write_report(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"recipe": "digits"}))
    text = report.write_report(tmp_path).read_text()
    assert "Not evaluated yet." in text and "## Figures" not in text and "Recipe `digits`" in text


def test_a_log_that_a_kill_cut_off_is_read_up_to_the_cut_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert report.read_log(path) == [{"step": 1, "loss": 2.0}] and report.read_log(tmp_path / "none") == []
    path.write_text('{"step": 1, "lo\n{"step": 2, "loss": 2.0}\n')
    with pytest.raises(ValueError, match="line 1: expected a JSON object"):
        report.read_log(path)


def test_tables_are_aligned_markdown_and_show_a_dash_where_nothing_was_measured() -> None:
    none = {"value": None, "low": 0.0, "high": 1.0, "count": 0}
    results = {"latent_accuracy": [{"sources": ["a"], "value": 0.5, "low": 0.4, "high": 0.6, "count": 9}, {"sources": ["a", "b"], **none}]}
    results["left_out"] = {"cross_coherence": "needs class labels, and this data set has none"}
    text = report.tables(results)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1 and lines[2].split("|")[2].strip() == "0.500 [0.400, 0.600]"
    assert (
        lines[3].split("|")[1:3] == [" a + b        ", " –                    "] and "Left out: cross coherence (needs class labels" in text
    )


def test_a_report_says_of_what_and_how_it_measured_where_that_is_not_usual(folder: Path, tmp_path: Path) -> None:
    results = json.loads((folder / "results.json").read_text())
    assert (
        "evaluated at step 300; cross" in (folder / "report.md").read_text() and "Share of test rows" in (folder / "report.md").read_text()
    )
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    how = {"split": "validation", "checkpoint": "best", "pool": "product", "judge": "runs/other"}
    (tmp_path / "results.json").write_text(json.dumps(results | how))
    text = report.write_report(tmp_path).read_text()
    assert "evaluated at step 300 (split `validation`, checkpoint `best`, pool `product`, judge `runs/other`);" in text
    assert "Share of validation rows" in text and "test" not in text.split("## What ran")[0]


def test_runs_of_several_seeds_become_one_table_with_students_interval(tmp_path: Path) -> None:
    folders = [tmp_path / str(seed) for seed in range(3)]
    for folder, value in zip(folders, (0.71, 0.68, 0.74), strict=True):
        folder.mkdir()
        entry = {"sources": ["a"], "target": "b", "value": value, "low": 0.0, "high": 1.0, "count": 100}
        (folder / "results.json").write_text(json.dumps({"cross_coherence": [entry]}))
    low, high = stats.t.interval(0.95, 2, 0.71, stats.sem([0.71, 0.68, 0.74]))
    line = report.over_runs_table(folders).splitlines()[-1]
    assert f"`cross_coherence/a>b` | 0.710 [{low:.3f}, {high:.3f}] | 0.710, 0.680, 0.740" in line
    with pytest.raises(ValueError, match="without results.json; evaluate it first"):
        report.over_runs_table([*folders, tmp_path])


def test_a_sentence_ends_at_its_end_and_letters_make_words() -> None:
    assert figures.words(LETTERS, LETTERS.decode(b"s e v e n")) == "seven"
    assert figures.words(WORDS, WORDS.decode(b"a small bird")) == "a small bird"
    assert figures.words(WORDS, torch.tensor([3, 5, 2, 4, 4, 4, 4, 4])) == "a bird" and figures.words(WORDS, torch.tensor([2] * 8)) == ""


def test_a_grid_shows_its_images_in_their_colours_and_marks_what_was_missing(tmp_path: Path) -> None:
    red, blue = torch.zeros(1, 3, 6, 4), torch.zeros(1, 3, 6, 4)
    red[:, 0], blue[:, 2] = 1.0, 1.0
    figures.cross_grid(tmp_path / "grid.png", {"m": IMAGE, "n": IMAGE}, {"m": red}, {("m", "n"): blue})
    picture = pixels(tmp_path / "grid.png")
    of_red, of_blue = ((picture == colour).all(-1) for colour in ((255, 0, 0), (0, 0, 255)))
    assert of_red.sum() == pytest.approx(of_blue.sum(), rel=0.05) and of_red.sum() > 1000
    assert np.flatnonzero(of_red.any(1)).max() < np.flatnonzero(of_blue.any(1)).min()  # what was given stands above what was made
    tall, wide = np.ptp(np.flatnonzero(of_red.any(1))) + 1, np.ptp(np.flatnonzero(of_red.any(0))) + 1
    assert tall / wide == pytest.approx(6 / 4, rel=0.05)
    shown_data, ground = {"m": torch.cat([red, red]), "t": WORDS.decode(b"a bird").repeat(2, 1)}, np.array([243, 177, 131])
    for name, there in (("none.png", [True, True]), ("one.png", [True, False])):
        held = {"m": torch.tensor([True, True]), "t": torch.tensor(there)}
        figures.imputed_grid(tmp_path / name, {"m": IMAGE, "t": WORDS}, shown_data, held)
    assert not (pixels(tmp_path / "none.png") == ground).all(-1).any() and (pixels(tmp_path / "one.png") == ground).all(-1).sum() > 1000


@pytest.mark.parametrize(
    "field",
    [
        Field(kind="counts", shape=(40,), codec="npy", likelihood="poisson"),
        Field(kind="vector", shape=(1, 8, 9), codec="npy", likelihood="normal"),
        Field(kind="image", shape=(1, 2, 9), codec="npy", likelihood="laplace"),
    ],
)
def test_any_kind_of_data_finds_its_place_in_a_grid(tmp_path: Path, field: Field) -> None:
    figures.joint_grid(tmp_path / "grid.png", {"x": field, "t": WORDS}, {"x": torch.rand(3, *field.shape), "t": torch.full((3, 8), 5)})
    assert drawn(tmp_path / "grid.png") > 0.05


def test_what_a_grid_shows_below_a_datum_was_made_from_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Modalities that are missing in different rows: each source has columns of its own."""
    label = np.arange(24) % CLASSES
    seen = {"a": np.where(np.arange(24) < 9, -1, label), "b": np.where(np.arange(24) % 3 == 0, -1, label)}
    objective, caught = planted({"a": modality(), "b": modality([1, 0, 2, 3])}), {}
    monkeypatch.setattr(figures, "cross_grid", lambda path, fields, inputs, outputs: caught.update(inputs=inputs, outputs=outputs))
    monkeypatch.setattr(figures, "imputed_grid", lambda path, fields, data, observed: caught.update(data=data, observed=observed))
    report.illustrate(tmp_path, objective, rows(seen, label), fields=dict.fromkeys("ab", VECTOR), classes=(), measured=Measured({}, None))
    swapped = torch.tensor([1, 0, 2, 3])
    for source, given in caught["inputs"].items():
        assert len(given) == 10 and (given.sum(1) == 1).all()  # data that are there
        assert torch.equal(caught["outputs"][source, "a"].argmax(1), given.argmax(1))
        assert torch.equal(caught["outputs"][source, "b"].argmax(1), swapped[given.argmax(1)])
    filled, there = caught["data"], torch.stack([caught["observed"]["a"], caught["observed"]["b"]])
    assert (there.any(0) & ~there.all(0)).all()
    expected = torch.where(there[1], filled["a"].argmax(1), swapped[filled["a"].argmax(1)])  # `b` as observed, or as `a` makes it
    assert torch.equal(filled["b"].argmax(1), expected)


def test_columns_of_a_grid_are_the_first_row_of_each_class_in_their_order() -> None:
    label = np.array([3, 3, 1, 0, 1, 2, 0])
    batch = rows({"a": np.where(label == 0, -1, label), "b": label}, label)
    assert report._columns(batch, batch.observed[:, 1]).tolist() == [3, 6, 2, 4, 5, 0, 1]
    many = rows({"a": np.arange(60) % 3, "b": np.zeros(60, int)}, np.arange(60) % 3)
    assert {0, 1, 2} < set(report._columns(many, many.observed[:, 0]).tolist()) and len(report._columns(many, many.observed[:, 0])) == 10


def test_the_projection_is_scikit_learns_up_to_sign_and_the_same_for_mirrored_axes() -> None:
    points = np.random.default_rng(0).normal(size=(50, 6)) * [5, 3, 1, 1, 1, 1]
    expected = PCA(2).fit_transform(points)
    found = figures.pca(points)
    assert np.abs(np.abs(found) - np.abs(expected)).max() < 1e-9
    assert figures.pca(points[:, :1]).shape == (50, 2)


def test_curves_put_terms_of_a_kind_into_one_panel_and_leave_rates_out() -> None:
    log = [*LOG, *EVALUATIONS]
    panels = figures._by_kind(log, figures.is_loss)
    assert panels == {"loss": ["loss"], "bound": ["bound/a", "bound/b"], "held_out": ["held_out/loss"]}


def test_results_of_a_measured_model_survive_the_report_without_figures(folder: Path, tmp_path: Path) -> None:
    """A folder moved elsewhere, its figures lost: the report can be written again from what is left."""
    for name in ("run.json", "results.json", "metrics.jsonl"):
        (tmp_path / name).write_text((folder / name).read_text())
    text = report.write_report(tmp_path).read_text()
    assert "## Relatedness" in text and "![" not in text
    assert isinstance(Measured({}, None).results, dict)
