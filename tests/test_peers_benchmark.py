"""The comparison with MultiVae compares like with like: the same rows, networks and accounting, and a row that failed says so."""

import importlib
import importlib.util
import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import peers, peers_told, record
from benchmarks.peers import Built, Case, apart, cases, importable, network, rows_of, show, work
from benchmarks.peers_told import times
from benchmarks.stand_in import stand_in

CASE = Case("meme_dist", "mmvae", 2, 0.5, 8, 3, 1, 5.0)


def row(form: str, **more: Any) -> dict[str, Any]:
    found = (
        CASE._replace(form=form)._asdict()
        | dict.fromkeys((*peers_told.CPU_CLOCK, *peers_told.COLUMNS), 1.0)
        | {"rows_per_cpu_second": 10.0}
    )
    return found | more


def test_the_grid_has_both_systems_side_by_side_and_few_rows_where_multivae_has_no_memory_for_more() -> None:
    grid = list(cases(["mmvae", "mopoe", "meme"], [2, 10], [0.0, 0.5], 64, 10, 5, 60.0))
    assert len(grid) == 4 * 5 + 4 * 3 + 4 * 2
    assert {case.form for case in grid if case.model == "meme"} == {"meme_dist", "meme_dist, as trained"}
    both = ["multivae", "meme_dist", "meme_dist, all K"]
    assert [case.form for case in grid[:5]] == both + [f"{form}, as trained" for form in both[1:]]
    on_gpu = list(cases(["mmvae"], [2], [0.0], 64, 10, 5, 60.0, "cuda"))
    assert [case.form for case in on_gpu] == both + [f"{form}, recorded" for form in both[1:]]
    assert {case.device for case in grid} == {"cpu"} and {case.device for case in on_gpu} == {"cuda"}
    assert {(case.model, case.modalities): (case.batch_size, case.samples) for case in grid if case.model != "meme"} == {
        ("mmvae", 2): (64, 10),
        ("mmvae", 10): (64, 10),
        ("mopoe", 2): (64, 1),
        ("mopoe", 10): (16, 1),
    }


def test_rows_keep_one_modality_at_least_and_the_share_that_is_asked_for() -> None:
    data, masks = rows_of(CASE._replace(modalities=5, batch_size=2000))
    observed = torch.stack(list(masks.values()), 1)
    assert all(x.shape == (2000, 1, 28, 28) for x in data.values()) and bool(observed.any(1).all())
    assert float(observed[:, 1:].float().mean()) == pytest.approx(0.5, abs=0.02)
    assert float(observed[:, 0].float().mean()) == pytest.approx(0.5 + 0.5 / 32, abs=0.03)
    assert all(bool(mask.all()) for mask in rows_of(CASE._replace(missing=0.0))[1].values())


def test_networks_have_the_sizes_of_multivae_s_defaults() -> None:
    """Counted by hand: 784-512-512-(64, 64), 64-512-784, and with latents of their own 784-512-(64, 64, 64, 64), 128-512-784."""
    sizes = [sum(p.numel() for p in network(private=private).parameters()) for private in (0, 64)]
    assert sizes[0] == 785 * 512 + 513 * 512 + 2 * 513 * 64 + 65 * 512 + 513 * 784
    assert sizes[1] == 785 * 512 + 4 * 513 * 64 + 129 * 512 + 513 * 784


@pytest.mark.parametrize("model", peers.MODELS)
def test_every_objective_is_built_over_those_networks_and_sees_the_rows_that_are_there(model: str) -> None:
    case = CASE._replace(model=model, modalities=3)
    masks = rows_of(case)[1]
    entries = sum(int(mask.sum()) for mask in masks.values())
    found = peers.ours(case)
    rows = work(found)["encoder_rows"]
    assert len(found.encoders) == 3 and entries <= rows <= entries + (3 * peers.PSEUDO_INPUTS if model == "meme" else 0)
    assert float(found.loss().detach()) > 0


def test_work_is_counted_exactly_on_a_model_that_is_known() -> None:
    encoder, decoder, x = nn.Linear(3, 4, bias=False), nn.Linear(4, 5, bias=False), torch.ones(6, 3)
    model = nn.ModuleList([encoder, decoder])
    found = work(Built(model, lambda: decoder(encoder(x).expand(7, 6, 4)).exp().sum(), [encoder], [decoder]))
    assert (found["encoder_rows"], found["decoder_rows"]) == (6, 42)
    assert found["gflop"] == round((2 * 6 * 3 * 4 * 2 + 2 * 42 * 4 * 5 * 3) / 1e9, 3)
    big = nn.Linear(1, 1, bias=False)
    y = torch.ones(250_000, 1)
    assert work(Built(big, lambda: (big(y) * y).exp().sum(), [big], []))["saved_mb"] == 2.0  # y once, and the exponential
    deep = nn.Sequential(nn.Linear(1, 1000), nn.Linear(1000, 1000))  # whose weight of 4 MB is a parameter
    assert work(Built(deep, lambda: deep(torch.ones(1, 1)).sum(), [deep], []))["saved_mb"] == 0.0


def test_a_row_is_measured_in_a_process_of_its_own_and_its_memory_is_not_that_of_another() -> None:
    found = apart(CASE)
    assert "error" not in found, found
    assert found["timed"] == 1 and found["rows_per_cpu_second"] == pytest.approx(8e3 / found["cpu_ms"], rel=0.01)
    assert found["encoder_rows"] < 16 and 0 < found["peak_mb"] < 200 and json.dumps(found)


def test_the_step_as_trained_is_the_step_beside_it_up_to_rounding() -> None:
    """AdamW without decay is Adam, its fused form rounds otherwise, and the trainer's engine adds nothing to the loss."""
    trained = []
    for form in ("meme_dist", "meme_dist, as trained"):
        torch.manual_seed(0)
        case = CASE._replace(form=form, model="mopoe", modalities=3)
        built = peers.ours(case)
        before = nn.utils.parameters_to_vector(built.model.parameters()).detach().clone()
        once = peers._update(built, case)
        for _ in range(3):
            once()
        trained.append(nn.utils.parameters_to_vector(built.model.parameters()).detach())
        assert float((trained[-1] - before).abs().max()) == pytest.approx(3e-4, rel=0.01)  # Adam's first steps are its rate long
    torch.testing.assert_close(*trained, rtol=0, atol=1e-6)


def ended(code: int, error: str) -> Any:
    return lambda *words, **keywords: subprocess.CompletedProcess(words, code, stdout="a line of its own\n", stderr=error)


def test_a_row_that_fails_says_why(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(subprocess, "run", ended(1, "Traceback\n  somewhere\nRuntimeError: no memory"))
    found = apart(CASE)
    show([found])
    assert found["error"] == "ended with 1: RuntimeError: no memory" and "no memory" in peers.told(found)
    assert capsys.readouterr().out.splitlines()[-1].split()[-1] == "-"
    monkeypatch.setattr(subprocess, "run", ended(-9, ""))
    assert apart(CASE)["error"] == "ended with -9: nothing said"


def test_why_multivae_cannot_be_imported_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", ended(1, "Traceback\nModuleNotFoundError: No module named 'multivae'\n"))
    assert importable() == "ModuleNotFoundError: No module named 'multivae'"
    monkeypatch.setattr(subprocess, "run", ended(0, "some warning"))
    assert importable() == ""


def test_times_are_rows_a_second_over_multivae_s_in_the_same_cell() -> None:
    theirs, ours, elsewhere = row("multivae"), row("meme_dist", rows_per_cpu_second=25.0), row("meme_dist", modalities=5)
    rows = [theirs, ours, elsewhere]
    assert [times(one, rows) for one in rows] == ["1.00", "2.50", ""]
    failed = [row("multivae", error="no memory"), ours]
    assert [times(one, failed) for one in failed] == ["", ""]


def test_without_multivae_the_library_is_measured_alone_and_the_message_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(peers, "importable", lambda: "No module named 'multivae'")
    monkeypatch.setattr(peers, "apart", lambda case: row(case.form, modalities=case.modalities))
    peers.main(models=("mvae",), modalities=(2,), missing=(0.0,))
    told = capsys.readouterr().out
    assert "pip install --no-deps multivae==1.0.3" in told and "No module named 'multivae'" in told
    kept = [json.loads(line) for line in (tmp_path / "peers.jsonl").read_text().splitlines()]
    assert [one["form"] for one in kept] == ["meme_dist", "meme_dist, as trained"] and {"device", "torch", "commit"} <= set(kept[0])


def test_empty_modules_stand_in_for_what_is_absent_and_for_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "nltk" else object())
    for name in [name for name in sys.modules if name.partition(".")[0] == "nltk"]:
        monkeypatch.delitem(sys.modules, name)
    stand_in()
    finder = sys.meta_path[-1]
    assert finder.find_spec("nltk.tokenize") is not None and finder.find_spec("torchvision") is None and finder.find_spec("torch") is None
    module = importlib.import_module("nltk.tokenize")
    assert module.sent_tokenize.anything.at_all is module.word_tokenize
    for name in ("nltk", "nltk.tokenize"):
        sys.modules.pop(name)
