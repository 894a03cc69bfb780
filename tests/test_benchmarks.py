"""The benchmarks say what is true: they time only what is right, count every byte, and show the newest figures."""

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import meme_dist
from benchmarks import contrastive, kernels, ranks, record, scaling, sweeps, tables
from benchmarks.gate import Gate
from benchmarks.providers import MODES, copied, ops, prepare
from benchmarks.timing import peak_bytes, rounds, times
from launch import gpu
from meme_dist.data.index import Manifest
from meme_dist.recipes import RECIPES
from meme_dist.recipes.keywords import defaults, flatten
from meme_dist.record import Record, check_unchanged, commit, create, load
from meme_dist.supervise import progress
from meme_dist.train.training import Training
from meme_kernels._op import FusedOp

CPU = torch.device("cpu")
OPS = ops()
MIB = 1 << 20


@pytest.fixture
def distances() -> FusedOp:
    return OPS["pairwise_w2"]


# ---- gate -------------------------------------------------------------------------------------------------------------------------------


def _doubled_gradient(right: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *tensors: 2 * right(*tensors) - right(*tensors).detach()


def _nan(right: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *tensors: right(*tensors) / torch.where(torch.arange(128) == 5, 0.0, 1.0) * torch.where(torch.arange(128) == 5, 0.0, 1.0)


WRONG = {
    "value 0 is off by": lambda right: lambda *tensors: right(*tensors) * 1.001,
    "gradient 3 is off by": _doubled_gradient,
    "value 0 is off by nan": _nan,
    "value 0 has shape (128, 127)": lambda right: lambda *tensors: right(*tensors)[:, 1:],
    "gives value 0, expected value 0, gradient 0": lambda right: lambda *tensors: right(*tensors).detach(),
    "raised RuntimeError: broken": lambda right: lambda *tensors: (_ for _ in ()).throw(RuntimeError("broken")),
}


@pytest.mark.parametrize("what", WRONG)
def test_gate_names_the_provider_and_what_it_gets_wrong(distances, what):
    gate = Gate(distances, {"reference": distances.reference, "planted": WRONG[what](distances.reference)})
    assert not gate.small(CPU)
    assert all("planted: " in fault for fault in gate.faults)
    assert any(what in fault for fault in gate.faults), gate.faults


def test_gate_is_green_for_the_reference_and_the_naive_form_in_float32(distances):
    gate = Gate(distances, {"naive": distances.naive, "reference": distances.reference})
    assert gate.small(CPU), gate.faults


def test_an_op_with_a_wrong_provider_is_not_reported_and_the_exit_status_is_1(distances, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(kernels, "copy_bandwidth", lambda device: 10.0)
    planted = {"naive": distances.naive, "reference": WRONG["value 0 is off by"](distances.reference)}
    monkeypatch.setattr(kernels, "providers", lambda op, device, compiled: planted)
    with pytest.raises(SystemExit) as status:
        kernels.main(op=("pairwise_w2",), sizes=("small",), device="cpu", repeats=1, save=False)
    out = capsys.readouterr().out
    assert status.value.code == 1 and "NOT reported" in out and "== pairwise_w2" not in out


def test_what_is_wrong_at_the_measured_case_only_is_not_reported_either(distances):
    def wrong_when_large(*tensors: Tensor) -> Tensor:
        return distances.reference(*tensors) * (1.01 if len(tensors[0]) > 500 else 1.0)

    gate = Gate(distances, {"planted": wrong_when_large})
    assert gate.small(CPU)
    gate.measured(next(distances.cases("paper", CPU, torch.float32)))
    assert "planted: value 0 is off by 1.0e-02" in gate.faults[0]


# ---- memory and time --------------------------------------------------------------------------------------------------------------------


def test_peak_memory_is_exact_to_the_byte():
    def call() -> Tensor:
        a = torch.empty(4 * MIB, dtype=torch.int8)
        b = torch.empty(2 * MIB, dtype=torch.int8)
        del a
        c = torch.empty(3 * MIB, dtype=torch.int8)
        del b
        return c

    assert peak_bytes(call, CPU) == 6 * MIB


def test_peak_memory_counts_temporaries_inside_an_operator_and_frees_of_what_was_made_inside():
    x = torch.ones(MIB // 4)
    assert peak_bytes(lambda: [x.exp() for _ in range(5)] and None, CPU) == 5 * MIB
    assert peak_bytes(lambda: [None for _ in range(5) if x.exp() is None] and None, CPU) == MIB
    assert peak_bytes(lambda: None, CPU) == 0


def test_peak_memory_of_a_forward_pass_holds_what_its_gradient_needs():
    x = torch.ones(MIB // 4, requires_grad=True)
    assert peak_bytes(lambda: x.exp().exp().sum(), CPU) == 2 * MIB + 4
    with torch.no_grad():
        assert peak_bytes(lambda: x.exp().exp().exp().exp().sum(), CPU) == 2 * MIB


def test_long_calls_are_timed_less_often_but_at_least_three_times():
    assert [rounds(seconds, 20) for seconds in (1e-6, 0.1, 1.0, 60.0)] == [20, 20, 4, 3]
    assert rounds(60.0, 2) == 2


def test_calls_are_taken_in_turn():
    order = []

    def call(name: str) -> Callable[[], None]:
        return lambda: order.append(name) or time.sleep(0.002)  # long enough to be a sample alone

    times({"a": call("a"), "b": call("b")}, CPU, 3)
    assert "".join(order) == "ab" + "ababab"


def test_nothing_is_begun_when_the_time_is_up(capsys):
    begun = []

    def make(name: str, _: int) -> int:
        begun.append(name)
        time.sleep(0.02)
        return 1

    assert kernels._able({"a": 0, "b": 0}, "case", time.monotonic() + 0.01, make) == {"a": 1}
    assert begun == ["a"] and "case, b: left out, the time is up" in capsys.readouterr().err


def test_what_was_measured_before_an_interruption_is_kept(monkeypatch, tmp_path):
    def measured(*words: object):
        yield {"provider": "naive", "ms": 1.0}
        raise KeyboardInterrupt

    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(kernels, "copy_bandwidth", lambda device: 10.0)
    monkeypatch.setattr(kernels, "fail_before_the_kernel_kills", lambda: None)
    monkeypatch.setattr(kernels, "_measured", measured)
    monkeypatch.setattr(tables, "show", lambda rows: None)
    with pytest.raises(KeyboardInterrupt):
        kernels.main(op=("pairwise_w2",), sizes=("small",), device="cpu", repeats=1)
    assert [json.loads(line)["ms"] for line in (tmp_path / "kernels.jsonl").read_text().splitlines()] == [1.0]


# ---- ops --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["small", "paper", "large"])
@pytest.mark.parametrize("name", OPS)
def test_an_op_has_cases_of_every_size_and_each_has_a_price(name, size):
    cases = list(OPS[name].cases(size, torch.device("meta"), torch.float32))
    assert cases
    for case in cases:
        forward, backward, both = (kernels._cost(OPS[name], case, mode) for mode in MODES)
        assert all(part > 0 for part in (*forward, *backward)), case.label
        assert both == tuple(a + b for a, b in zip(forward, backward, strict=True))


@pytest.mark.parametrize("name", OPS)
def test_a_call_costs_at_least_its_inputs_and_outputs(name):
    for case in OPS[name].cases("small", CPU, torch.float32):
        cost = kernels._cost(OPS[name], case, "forward")
        outputs = OPS[name].reference(*case.arguments, **case.settings)
        written = sum(y.nbytes for y in (outputs if isinstance(outputs, tuple) else (outputs,)) if isinstance(y, Tensor))
        assert cost.written >= 0.9 * written, case.label


@pytest.mark.parametrize("name", ["log_likelihood", "mixture_log_prob"])
def test_a_reference_goes_through_a_large_case_in_some_hundred_blocks_at_most(name, monkeypatch):
    """Elsewhere than on a CPU, where a block of one row is a dozen launches for little work. Only the first block is computed here."""
    blocks, split = [0], Tensor.split

    def first(x: Tensor, *words: int) -> tuple[Tensor, ...]:
        blocks.append(len(split(x, *words)))
        return split(x, *words)[:1]

    monkeypatch.setattr(Tensor, "split", first)
    for case in OPS[name].cases("large", torch.device("meta"), torch.float32):
        OPS[name].reference(*case.arguments, **case.settings)
    assert max(blocks) <= 1000


@pytest.mark.parametrize("name", OPS)
def test_both_passes_of_a_copied_case_give_the_gradients_of_the_case(name):
    case, reference = next(OPS[name].cases("small", CPU, torch.float32)), OPS[name].reference
    for mine, other in zip(prepare(reference, case, "both")(), prepare(reference, copied(case), "backward")(), strict=True):
        assert mine is other is None or torch.equal(mine, other)


def test_a_case_copied_into_float64_is_the_same_in_other_leaves(distances):
    case = next(distances.cases("small", CPU, torch.float32))
    for mine, other in zip(case.arguments, copied(case, torch.float64).arguments, strict=True):
        assert other.dtype == torch.float64 and other.is_leaf and other.requires_grad and torch.equal(mine.double(), other)


@pytest.mark.parametrize("name", OPS)
def test_an_op_accepts_the_cases_of_its_sweep_and_they_lie_on_an_axis(name):
    for index, case in enumerate(sweeps.cases(name, CPU)):
        axis = case.label.split(":")[0]
        assert f" {axis}=" in case.label
        if index == 0:  # the others differ in size alone
            assert prepare(OPS[name].call, case, "both")()


# ---- what a row says of itself ----------------------------------------------------------------------------------------------------------


def test_a_row_says_what_it_was_measured_on_whatever_else_the_machine_has(monkeypatch, tmp_path):
    """A GPU machine whose processor was measured, in children of one thread each; and then its GPU."""
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(record, "_accelerator", lambda: {"driver": "1"})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    record.keep("some", [{"ms": 1.0}], device=CPU, threads=1)
    record.keep("some", [{"ms": 1.0}], device=torch.device("cuda"), threads=4)
    cpu, gpu_row = map(json.loads, (tmp_path / "some.jsonl").read_text().splitlines())
    assert (cpu["kind"], cpu["device"], cpu["threads"]) == ("cpu", record.processor(), 1) and "driver" not in cpu
    assert (gpu_row["kind"], gpu_row["device"], gpu_row["threads"], gpu_row["driver"]) == ("cuda", "a GPU", 4, "1")


def test_a_row_says_that_sources_were_changed_and_counts_no_figures_as_such(monkeypatch, tmp_path):
    sources, figures = tmp_path / "meme_dist" / "__init__.py", tmp_path / "benchmarks" / "results" / "step.jsonl"
    for path in (sources, figures):
        path.parent.mkdir(parents=True)
        path.write_text("\n")
    who = ["-c", "user.name=one", "-c", "user.email=one@example.org"]
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    monkeypatch.setattr(meme_dist, "__file__", str(sources))
    head = subprocess.run(["git", "-C", str(tmp_path), "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    figures.write_text("a row\n")
    assert commit() == head
    sources.write_text("changed = True\n")
    assert commit() == f"{head}+changes"


def test_ranks_that_share_a_gpu_are_measured_on_the_processor(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert [ranks.rank_device(world).type for world in (1, 2)] == ["cuda", "cpu"]
    parts = [("real", 1), ("real", 2), ("modalities", 1), ("simulated", 1)]
    assert [scaling.device_of({"part": part, "world": world}).type for part, world in parts] == ["cuda", "cpu", "cpu", "cpu"]


# ---- trainings that are judged ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("there", "resume"), [(None, False), (-1, True), (500, True), (1000, None)])
def test_a_model_has_made_all_of_its_steps_before_it_is_judged(monkeypatch, tmp_path, there, resume):
    """No run, one without a checkpoint, one that was ended after its first: begun or gone on with; one that is done: left as it is."""
    place, given, asked = tmp_path / "run", {"images": "digits", "training": Training(steps=1000)}, []

    def reach(step: int) -> None:
        (place / "checkpoints" / "last").mkdir(parents=True, exist_ok=True)
        (place / "checkpoints" / "last" / "state.json").write_text(json.dumps({"step": step}))

    def train(name, keywords, where, *, console):
        if where.resume is not None:  # as the real one does
            check_unchanged(place, load(place), name, flatten(keywords), defaults(RECIPES[name]))
        asked.append((where.run, where.resume))
        reach(keywords["training"].steps)
        return True

    if there is not None:
        create(place, Record("planted", flatten(given), "shards"), Manifest("shards", "planted", {}, (), {}, 0, {}))
        if there >= 0:
            reach(there)
    monkeypatch.setattr(contrastive.run, "train", train)
    contrastive.trained(place, given, data=tmp_path)
    assert asked == ([] if resume is None else [(str(place), str(place) if resume else None)])
    assert progress(place) == 1000


def test_a_model_whose_training_was_told_to_stop_is_not_judged(monkeypatch, tmp_path):
    monkeypatch.setattr(contrastive.run, "train", lambda *words, console: False)
    with pytest.raises(RuntimeError, match="stopped at step -1 of 1000; start the benchmark again"):
        contrastive.trained(tmp_path / "run", {"training": Training(steps=1000)}, data=tmp_path)


def test_a_bound_that_is_finite_beats_an_unbounded_fit_that_is_not():
    level = {"part": "known", "size": 6, "scale": 0.2, "train": 500}
    rows = [level | {"variant": "B = inf", "gain": math.nan, "effective": math.nan}]
    rows += [level | {"variant": "B = 5", "gain": 1.0, "effective": 9.0}]
    assert contrastive.verdicts(rows) == {(6, 0.2, 500): ["5"]}
    rows[0] |= {"gain": 2.0, "effective": 1.0}
    assert contrastive.verdicts(rows) == {(6, 0.2, 500): []}


# ---- tables -----------------------------------------------------------------------------------------------------------------------------


def _row(**more: object) -> dict:
    row = {"op": "o", "size": "sweep", "case": "N: N=2", "mode": "both", "provider": "naive", "kind": "cpu", "device": "d", "threads": 1}
    return row | {"ms": 1.0, "ms_p20": 1.0, "ms_p80": 1.0, "cpu_ms": 20.0, "peak_bytes": 8_000_000} | more


def test_the_table_shows_the_newest_row_of_each_figure_and_naive_over_reference(monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    rows = [_row(cpu_ms=77.0), _row(), _row(size="small", case="B=3", cpu_ms=55.0), _row(size="small", case="B=3", cpu_ms=44.0)]
    rows += [_row(provider="reference", cpu_ms=4.0, peak_bytes=1_000_000)]
    (tmp_path / "kernels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = tables.write().read_text()
    assert "| o | N=2 | 20 | 4 | 5 | 8 | 1 | 8 |" in text and "| B=3 | both | naive | 1 (1 .. 1) | 44 |" in text
    assert "77" not in text and "55" not in text
    assert "Not measured on a GPU yet." in text


@pytest.mark.parametrize("other", [{"kind": "cuda"}, {"device": "e"}, {"threads": 2}])
def test_a_row_replaces_none_of_another_device_or_number_of_threads_and_stands_in_no_table_with_it(monkeypatch, tmp_path, other):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    rows = [_row(), _row(**other)]
    (tmp_path / "kernels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *rows]))
    assert tables.newest() == rows
    assert [own for _, own in tables.setups(rows)] in ([rows[:1], rows[1:]], [rows[1:], rows[:1]])


def test_registers_are_the_most_of_any_float32_kernel_of_the_op_on_that_target(monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "RESOURCES", tmp_path / "resources.json")
    assert tables.resources("o", "sm_90") == {}
    keys = ("op", "target", "dtype", "registers", "spilled")
    table = [("o", "sm_90", "float32", 40, 0), ("o", "sm_90", "float32", 32, 8), ("o", "sm_80", "float32", 90, 0)]
    table += [("x", "sm_90", "float32", 99, 9), ("o", "sm_90", "bfloat16", 70, 0)]
    rows = [dict(zip(keys, row, strict=True)) for row in table]
    (tmp_path / "resources.json").write_text(json.dumps({"triton": "3", "rows": rows}))
    assert tables.resources("o", "sm_90") == {"registers": 40, "spilled": 8}


# ---- the one call on a GPU machine ------------------------------------------------------------------------------------------------------


def test_the_parts_of_make_gpu_end_within_nine_minutes():
    assert sum(gpu.LIMITS.values()) <= 9 * 60 - gpu.STOPPING


def test_the_tests_of_make_gpu_start_without_the_plugins_that_a_machine_may_lack(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "missing", lambda *names: list(names))
    (tmp_path / "test_one.py").write_text("def test_one(): pass\n")
    command = [
        sys.executable,
        *gpu.pytest_on([str(tmp_path / "test_one.py")]),
        "-c",
        "pyproject.toml",
        "-p",
        "no:timeout",
        "-p",
        "no:xdist",
    ]
    done = subprocess.run(command, cwd=gpu.ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("absent", ["pytest", "scipy", "jaxtyping"])
def test_a_part_whose_packages_are_missing_is_skipped_and_says_which(monkeypatch, capsys, absent):
    monkeypatch.setattr(gpu, "missing", lambda *names: [name for name in names if name == absent])
    monkeypatch.setattr(gpu, "run", lambda *words, **more: pytest.fail(f"ran {words}"))
    assert gpu.tests("kernel tests", ["tests/kernels"])
    assert f"kernel tests: skipped, this interpreter has no {absent}" in capsys.readouterr().out


def test_a_part_that_does_not_end_is_stopped_and_fails(monkeypatch, capsys):
    monkeypatch.delenv("OUT", raising=False)
    start = time.monotonic()
    assert not gpu.run("sleep", "-c", "import time; time.sleep(60)", limit=1.0)
    assert time.monotonic() - start < 1.0 + gpu.STOPPING + 10
    assert "STOPPED, not ended within 1 s" in capsys.readouterr().out
    assert gpu.run("nothing", "-c", "", limit=60.0)
    assert not gpu.run("failure", "-c", "raise SystemExit(3)", limit=60.0)


def test_results_are_left_where_OUT_says(monkeypatch, tmp_path):
    monkeypatch.setenv("OUT", str(tmp_path))
    gpu.carry_out()
    assert (tmp_path / "results.tar.gz").stat().st_size > 0
