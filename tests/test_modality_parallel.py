"""Modalities on different ranks change nothing: gradients of one process, a share of the memory, and the bytes that the formulas say."""

import gc
import itertools
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from benchmarks import modality_parallel as benchmark
from benchmarks.modality_parallel import Counted
from meme_dist.objectives.meme import MEME
from meme_dist.train import modality_parallel as module
from meme_dist.train.modality_parallel import ModalityParallel, parameter_counts
from meme_dist.train.placement import (
    Rates,
    break_even_bandwidth,
    break_even_parameters,
    data_parallel,
    data_parallel_seconds,
    expected_workload,
    imbalance,
    modality_parallel,
    modality_parallel_seconds,
    place,
    workload_of,
)
from meme_dist.types import Batch
from tests.ranks import run_ranks
from tests.trainings import Rows, build, mixed

ESTIMATORS = ("released", "rao_blackwell", "resampled")
BATCH = 24
FOUR = ("a", "b", "c", "x0")


def grid(groups: int, members: int) -> DeviceMesh:
    return init_device_mesh("cpu", (groups, members), mesh_dim_names=("data", "modality"))


def rows_of(names: Sequence[str], mask: np.ndarray, *, part: int = 0, parts: int = 1, step: int = 0) -> Batch:
    rows = Rows(names, mask, batch_size=BATCH)
    rows.step = step
    return rows.batch(np.split(np.arange(BATCH), parts)[part])


def constant(names: Sequence[str]) -> list[np.ndarray]:
    """For each pattern of present modalities a mask in which all rows have it: the others are absent on the whole batch."""
    patterns = [p for p in itertools.product((False, True), repeat=len(names)) if any(p)]
    return [np.tile(np.array(p), (BATCH, 1)) for p in patterns]


def furthest(named: Sequence[tuple[str, nn.Parameter]], whole: nn.Module) -> float:
    """The largest difference of these gradients from those of the whole objective, over its largest gradient."""
    expected = {name: p.grad for name, p in whole.named_parameters()}
    scale = max(float(g.abs().max()) for g in expected.values())
    return max(float((p.grad - expected[name]).abs().max()) for name, p in named) / scale


# ---- the same numbers -------------------------------------------------------------------------------------------------------------------


def differences(
    rank: int, world: int, groups: int, names: Sequence[str], cases: list[dict[str, Any]], masks: list[np.ndarray]
) -> list[Any]:
    """For each case and mask: differences of gradients, of the group's loss and of the gradient norm from one process, and coverage."""
    module.BUCKET = 100  # bytes: several buckets even here
    mesh, found = grid(groups, world // groups), []
    for case in cases:
        for mask in masks:
            whole, objective = build(names, **case), build(names, **case)
            placed = ModalityParallel(objective, mesh)
            batch = rows_of(names, mask, part=placed.group, parts=groups)
            loss = placed(placed.needed(batch))
            (loss.total * groups).backward()  # gradients are averaged over groups, rows are summed
            placed.synchronise_gradients()
            alone = whole(batch).total.item()
            whole(rows_of(names, mask)).total.backward()
            norm = get_total_norm([p.grad for p in whole.parameters()])
            found.append(
                (
                    furthest(placed.owned_parameters(), whole),
                    abs(loss.total.item() / alone - 1),
                    abs(float(placed.gradient_norm() / norm) - 1),
                    {name for name, _ in placed.owned_parameters()},
                )
            )
    return found


def assert_none(came: list[Any], members: int, names: Sequence[str]) -> None:
    expected = {name for name, _ in build(names).named_parameters()}
    for case in zip(*came, strict=True):
        assert max(max(gradient, loss, norm) for gradient, loss, norm, _ in case) < 1e-6
        assert set.union(*(owned for *_, owned in case[:members])) == expected
        assert sum(len(owned) for *_, owned in case[:members]) == len(expected)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_two_ranks_with_different_modalities_give_the_gradients_of_one_process_for_every_pattern_of_absence(estimator: str) -> None:
    masks = [mixed("abc", BATCH), *constant("abc")]
    assert_none(run_ranks(differences, 2, 1, "abc", [{"estimator": estimator}], masks), 2, "abc")


def in_precision(rank: int, world: int, dtype: torch.dtype) -> list[float]:
    """Differences from one process in double precision, or under autocast."""
    found = []
    for settings in [{"estimator": e, "combination": "product"} for e in ESTIMATORS]:
        whole, objective = build("abc", **settings), build("abc", **settings)
        batch = rows_of("abc", mixed("abc", BATCH))
        if dtype == torch.float64:
            whole.double(), objective.double()
            batch = batch._replace(modalities={n: p._replace(data=p.data.double()) for n, p in batch.modalities.items()})
        placed = ModalityParallel(objective, grid(1, world))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            losses = [model(batch).total for model in (whole, placed)]
        for loss in losses:
            loss.backward()
        found.append(furthest(placed.owned_parameters(), whole))
    return found


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.bfloat16, 1e-6)])
def test_a_product_of_posteriors_in_double_precision_and_under_autocast_has_the_gradients_of_one_process(
    dtype: torch.dtype, tolerance: float
) -> None:
    assert np.max(run_ranks(in_precision, 2, dtype)) < tolerance


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_four_ranks_in_any_mesh_give_the_gradients_of_one_process(groups: int) -> None:
    uneven = np.concatenate([np.tile([True, False, False, False], (BATCH // 2, 1)), np.tile([False, True, True, False], (BATCH // 2, 1))])
    cases = [{"estimator": estimator} for estimator in ESTIMATORS]
    came = run_ranks(differences, 4, groups, FOUR, cases, [mixed(FOUR, BATCH), uneven, np.ones((BATCH, 4), dtype=bool)])
    assert_none(came, 4 // groups, FOUR)


def test_three_members_the_sampled_ratio_and_the_full_gradient_give_the_gradients_of_one_process() -> None:
    cases = [{"estimator": e, "stop_gradient": False, "log_ratio": "sampled", "cross_weight": 1.0} for e in ESTIMATORS[:2]]
    assert_none(run_ranks(differences, 3, 1, "abc", cases, [mixed("abc", BATCH)]), 3, "abc")


def test_drawn_targets_give_two_ranks_the_gradients_of_one_process() -> None:
    cases = [{"samples": 1, "targets": count} for count in (1, 2)]
    assert_none(run_ranks(differences, 2, 1, FOUR, cases, [mixed(FOUR, BATCH), np.ones((BATCH, 4), dtype=bool)]), 2, FOUR)


def trained(
    rank: int, world: int, groups: int, steps: int, clip: float
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], list[float]]:
    """Weights, optimiser state and gradient norms of some steps of AdamW, two micro batches each."""
    objective = build("abc")
    placed = ModalityParallel(objective, grid(groups, world // groups)) if world > 1 else None
    parameters = list(objective.parameters())
    optimizer = torch.optim.AdamW(parameters, 1e-2)
    norms = []
    for step in range(steps):
        optimizer.zero_grad()
        for micro in range(2):
            part = micro if placed is None else 2 * placed.group + micro
            batch = rows_of("abc", mixed("abc", BATCH), part=part, parts=2 * groups if placed else 2, step=step)
            ((placed or objective)(batch).total * groups / BATCH).backward()
        if placed is not None:
            placed.synchronise_gradients()
        norm = placed.gradient_norm() if placed else get_total_norm([p.grad for p in parameters])
        clip_grads_with_norm_(parameters, clip, norm)
        optimizer.step()
        norms.append(float(norm))
    state, moments = objective.state_dict(), moments_of(optimizer, objective)
    if placed is not None:
        state, moments = {n: t.clone() for n, t in placed.full_state()}, {n: t.clone() for n, t in placed.union(moments)}
    return {n: t.numpy() for n, t in state.items()}, {n: t.numpy() for n, t in moments.items()}, norms


def moments_of(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, torch.Tensor]:
    names = {id(p): name for name, p in module.named_parameters()}
    return {f"{names[id(p)]}/{key}": value for p, entry in optimizer.state.items() for key, value in entry.items()}


@pytest.mark.parametrize(("world", "groups"), [(2, 1), (4, 2)])
def test_adamw_over_owned_parameters_with_clipping_and_accumulation_follows_the_trajectory_of_one_process(world: int, groups: int) -> None:
    state, moments, norms = trained(0, 1, 1, 3, 0.5)
    assert min(norms) > 0.5  # so that every step is clipped
    for came_state, came_moments, came_norms in run_ranks(trained, world, groups, 3, 0.5):
        assert came_norms == pytest.approx(norms, rel=1e-6)
        assert set(came_state) == set(state) and set(came_moments) == set(moments)
        size = max(np.abs(v).max() for n, v in moments.items() if n.endswith("exp_avg"))
        for name, value in moments.items():
            assert np.abs(came_moments[name] - value).max() <= (1e-6 * size if name.endswith("exp_avg") else 1e-5 * np.abs(value).max()), (
                name
            )
        for name, value in state.items():
            assert np.abs(came_state[name] - value).max() < 1e-5, name  # AdamW divides by the gradient's size: rounding is 1e-3 of a step


def without_work(rank: int, world: int) -> tuple[float, float, list[list[str]]]:
    """Member 1 holds c alone, which no batch has: it runs no network. Difference in gradients and inference, and the collectives."""
    orders, worst = [], 0.0
    for estimator in ESTIMATORS:
        whole, objective = build("abc", estimator=estimator), build("abc", estimator=estimator)
        placed = ModalityParallel(objective, grid(1, world), assignment={"a": 0, "b": 0, "c": 1})
        batch = rows_of("ab", mixed("ab", BATCH))
        whole(batch).total.backward()
        with Counted() as counted:
            placed(batch).total.backward()
        orders.append([kind for kind, _ in counted.calls])
        if rank == 0:
            worst = max(worst, furthest([(n, p) for n, p in placed.owned_parameters() if p.grad is not None], whole_without_c(whole)))
        came, expected = objective.infer(batch.only("a")), whole.infer(batch.only("a"))
        inferred = float((came.mean - expected.mean).abs().max())
    return worst, inferred, orders


def whole_without_c(whole: MEME) -> nn.Module:
    del whole.modalities["c"], whole.pseudo["c"]
    return whole


def test_a_rank_without_work_takes_part_in_every_exchange_in_the_same_order() -> None:
    (worst, inferred, orders), (_, idle_inferred, idle_orders) = run_ranks(without_work, 2)
    assert worst < 1e-6 and inferred == idle_inferred == 0
    assert orders == idle_orders
    gathers = ["all_gather"] * 3  # posteriors, log-likelihoods, pseudo posteriors
    passes = {"released": (1, 2), "rao_blackwell": (0, 1), "resampled": (1, 1)}  # gathers more, all-reduces
    assert orders == [gathers + ["all_gather"] * passes[e][0] + ["all_reduce"] * passes[e][1] for e in ESTIMATORS]


class SecondInThread(nn.Module):
    """Every second call runs in a thread of its own. Autograd numbers nodes by thread, and takes the highest number first."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.calls = network, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls % 2:
            return self.network(x)
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(self.network, x).result()


def backward_sizes(rank: int, world: int) -> tuple[float, list[float]]:
    """Difference in gradients, and the all-reduces in their order, where rank 1 alone has reason to come back in another order."""
    whole, objective = build("abc", estimator="released"), build("abc", estimator="released")
    objective.modalities["c"].decoder = SecondInThread(objective.modalities["c"].decoder)
    placed = ModalityParallel(objective, grid(1, world), assignment={"a": 0, "b": 0, "c": 1})
    batch = rows_of("abc", mixed("abc", BATCH))
    whole(batch).total.backward()
    with Counted() as counted:
        placed(batch).total.backward()
    own = [(name.replace(".network", ""), p) for name, p in placed.owned_parameters()]
    return furthest(own, whole), [sent for kind, sent in counted.calls if kind == "all_reduce"]


def test_the_last_exchange_comes_back_first_on_every_rank_whatever_order_autograd_would_choose() -> None:
    for difference, (first, last) in run_ranks(backward_sizes, 2):
        assert difference < 1e-6
        assert last == 3 * first  # the marginal's three samples were decoded before the outer one


# ---- what a rank holds ------------------------------------------------------------------------------------------------------------------


def held(rank: int, world: int) -> dict[str, Any]:
    objective = build("abc")
    objective.modalities["a"].encoder.append(nn.BatchNorm1d(4))  # a buffer, for the state
    counts, state = parameter_counts(objective), {name: t.clone() for name, t in objective.state_dict().items()}
    networks = {name: weakref.ref(objective.modalities[name].encoder[1].weight) for name in "abc"}
    placed = ModalityParallel(objective, grid(1, world))
    gc.collect()
    batch = rows_of("abc", mixed("abc", BATCH))
    needed = placed.needed(batch)
    message = ""
    for name in placed.assignment:
        if placed.assignment[name] != placed.member:
            try:
                objective.modalities[name].encode(batch.modalities[name].data)
            except ValueError as error:
                message = str(error)
    return {
        "alive": {name for name, network in networks.items() if network() is not None},
        "own": {name for name, member in placed.assignment.items() if member == placed.member},
        "parameters": sum(p.numel() for p in placed.parameters()),
        "counts": counts,
        "data": {name for name, packed in needed.modalities.items() if len(packed.data)},
        "same": all(torch.equal(t, state.pop(name)) for name, t in placed.full_state()) and not state,
        "message": message,
    }


def test_networks_and_data_of_other_members_are_gone_and_the_whole_state_can_still_be_had() -> None:
    ranks = run_ranks(held, 2)
    assert ranks[0]["own"] | ranks[1]["own"] == set("abc") and not ranks[0]["own"] & ranks[1]["own"]
    for rank in ranks:
        assert rank["alive"] == rank["data"] == rank["own"]
        assert rank["parameters"] == sum(rank["counts"][name] for name in rank["own"])
        assert rank["same"]
        assert "its networks are on member" in rank["message"] and "full_state" in rank["message"]


def statistics(rank: int, world: int) -> tuple[list[float], list[float]]:
    objective = build("ab")
    objective.modalities["a"].encoder.append(nn.BatchNorm1d(4))
    placed = ModalityParallel(objective, grid(world, 1))
    placed(rows_of("ab", mixed("ab", BATCH), part=placed.group, parts=world))
    before = next(placed.objective.buffers()).tolist()
    placed.synchronise_buffers()
    return before, next(placed.objective.buffers()).tolist()


def test_running_statistics_can_be_made_those_of_the_first_group() -> None:
    (first, first_after), (second, second_after) = run_ranks(statistics, 2)
    assert first != second and first_after == second_after == first


def not_finite(rank: int, world: int, value: float) -> float:
    placed = ModalityParallel(build("ab"), grid(1, world))
    placed(rows_of("ab", mixed("ab", BATCH))).total.backward()
    gradient = placed.owned_parameters()[0][1].grad
    assert gradient is not None
    if rank == 1:
        gradient.fill_(value)
    return float(placed.gradient_norm())


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_gradient_of_one_member_that_is_not_finite_is_seen_by_all(value: float) -> None:
    assert not np.isfinite(run_ranks(not_finite, 2, value)).any()


def refusals(rank: int, world: int) -> list[str]:
    tied, free, lying = build("abc"), build("abc"), build("ab")
    tied.modalities["a"].decoder = tied.modalities["b"].decoder
    free.temperature = nn.Parameter(torch.zeros(()))
    apart = {"a": 0, "b": 1, "c": 0}
    attempts = [
        lambda: ModalityParallel(build("ab"), init_device_mesh("cpu", (world,), mesh_dim_names=("data",))),
        lambda: ModalityParallel(build("ab"), grid(1, world), assignment={"a": 0, "b": 0}),
        lambda: ModalityParallel(tied, grid(1, world), assignment=apart),
        lambda: ModalityParallel(free, grid(1, world), assignment=apart),
        lambda: ModalityParallel(build("ab"), grid(1, world)).synchronise_gradients(),
        lambda: (ModalityParallel(lying, grid(1, world)), lying.each({"a": [(2,)], "b": [(2,)]}, lambda *_: [torch.zeros(3)], None)),
    ]
    messages = []
    for attempt in attempts:
        with pytest.raises(ValueError) as error:
            attempt()
        messages.append(str(error.value))
    return messages


def test_what_cannot_be_shared_out_is_refused_with_a_reason() -> None:
    reasons = ["('data', 'modality')", "none of them idle", "same parameter as another modality's", "temperature: belongs to no modality"]
    reasons += ["no part in the loss", "gave tensors of shapes [(3,)], the objective said [(2,)]"]
    for messages in run_ranks(refusals, 2):
        assert all(reason in message for reason, message in zip(reasons, messages, strict=True)), messages


# ---- placement --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("members", [1, 2, 3, 5])
def test_placement_leaves_no_member_idle_and_its_largest_load_is_within_four_thirds_of_the_least_possible(members: int) -> None:
    generator = np.random.default_rng(0)
    for _ in range(5):
        sizes = {f"m{i}": float(size) for i, size in enumerate(generator.integers(1, 50, size=6))}
        owner = place(sizes, members)
        assert list(owner) == list(sizes) and set(owner.values()) == set(range(members))
        loads = [
            max(sum(s for s, m in zip(sizes.values(), choice, strict=True) if m == member) for member in range(members))
            for choice in itertools.product(range(members), repeat=len(sizes))
        ]
        assert imbalance(sizes, owner) * sum(sizes.values()) / members <= min(loads) * 4 / 3 + 1e-9


def test_equal_sizes_and_sizes_of_nothing_are_spread_evenly_and_too_many_members_are_refused() -> None:
    assert place(dict.fromkeys("abcdef", 1.0), 3) == {"a": 0, "b": 1, "c": 2, "d": 0, "e": 1, "f": 2}
    assert sorted(place(dict.fromkeys("abc", 0.0), 3).values()) == [0, 1, 2]
    with pytest.raises(ValueError, match="3 members cannot share 2 modalities"):
        place({"a": 1.0, "b": 2.0}, 3)


# ---- bytes ------------------------------------------------------------------------------------------------------------------------------


SMALL = {"rows": 16, "samples": 3, "latent": 4, "hidden": 8}


def counted(
    rank: int, world: int, groups: int, numbers: Sequence[int], observed: float, targets: int | None = None
) -> list[tuple[float, float, int, int]]:
    """For each N and estimator what this rank sends in one step: bytes counted and by formula, collectives likewise."""
    found = []
    for number, estimator in itertools.product(numbers, ESTIMATORS):
        objective = benchmark.objective_of(number, estimator, SMALL if targets is None else SMALL | {"samples": 1})
        objective.targets = targets
        placed = ModalityParallel(objective, grid(groups, world // groups))
        batch = benchmark.batch_of(number, np.arange(SMALL["rows"]), observed=observed)
        with Counted() as seen:
            placed(batch).total.backward()
            placed.synchronise_gradients()
        own = sum(p.numel() for _, p in placed.owned_parameters())
        told = modality_parallel(workload_of(objective, batch), placed.assignment, groups=groups, parameters=own)
        found.append((seen.sent, told.sent, len(seen.calls), len(seen.calls) - (groups > 1) - told.collectives // 1))
    return found


@pytest.mark.parametrize(
    ("world", "groups", "observed", "targets"), [(2, 1, 1.0, None), (4, 1, 1.0, None), (4, 2, 0.5, None), (2, 1, 0.5, 2)]
)
def test_bytes_counted_on_every_rank_are_those_of_the_formula_at_4_8_and_16_modalities(
    world: int, groups: int, observed: float, targets: int | None
) -> None:
    for rank in run_ranks(counted, world, groups, (4, 8, 16), observed, targets):
        for sent, told, _, unexplained in rank:
            assert sent == pytest.approx(told, rel=1e-12) and unexplained == 0


def replicated(rank: int, world: int) -> tuple[float, float]:
    objective = benchmark.objective_of(4, "resampled", SMALL)
    replica = DistributedDataParallel(objective)
    with Counted() as seen:
        replica(benchmark.batch_of(4, np.arange(SMALL["rows"]))).total.backward()
    return seen.sent, data_parallel(sum(p.numel() for p in objective.parameters()), world).sent


@pytest.mark.parametrize("world", [2, 4])
def test_bytes_that_ddp_sends_are_those_of_the_formula(world: int) -> None:
    for sent, told in run_ranks(replicated, world):
        assert sent == pytest.approx(told, rel=1e-12)


def test_the_formula_is_the_sum_one_does_by_hand() -> None:
    settings = {"rows": 64, "samples": 11, "latent": 16, "pseudo_inputs": 0}
    halves = {"m0": 0, "m1": 1, "m2": 0, "m3": 1}
    gathered = 2 * (2 * 16 * 64) + 2 * (11 * 3 * 64) + 2 * (1 * 4 * 64)  # posteriors, cross table without gradients, drawn table
    by_hand = 4 * gathered + 4 * (4 * 64 + 1) * 16  # 2 ranks: (m - 1) = 1 and 2 (m - 1) / m = 1
    assert modality_parallel(expected_workload(list(halves), **settings, estimator="resampled"), halves) == (by_hand, 4)
    assert data_parallel(1000, 4) == (2 * 3 / 4 * 4000, pytest.approx(4000 / 2**20 / 25))
    assert data_parallel(1000, 4, volume=3).sent == 3 * 3 / 4 * 4000
    rates = Rates(bandwidth=1e9, latency=1e-5, per_parameter=1e-9, tables=1e-3, exposed=0.5)
    work = expected_workload(list(halves), **settings, estimator="resampled")
    ours = modality_parallel_seconds(1e6, work, halves, rates, imbalance=1.2)
    assert ours == pytest.approx(1.2 * 1e-3 / 2 + 1e-3 + by_hand / 1e9 + 4e-5)  # the tables are made by both
    assert data_parallel_seconds(1e6, 2, rates) == pytest.approx((1e-3 + 1e-3) / 2 + 0.5 * (4e6 / 1e9 + 4e6 / 2**20 / 25 * 1e-5))
    sparse = expected_workload(list(halves), **settings, estimator="resampled", observed=0.5)
    assert sparse.own["m0"] == 32 and sparse.cross["m0"] == 3 * 64 / 4


# ---- break-even -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("groups", [1, 4])
def test_at_the_break_even_both_ways_take_as_long_and_above_it_modality_parallelism_is_faster(groups: int, estimator: Any) -> None:
    names = [f"m{i}" for i in range(8)]
    owner, rates = place(dict.fromkeys(names, 1.0), 4), Rates(bandwidth=1e10, latency=2e-5, per_parameter=1e-10, tables=1e-4)
    work = expected_workload(names, rows=256, samples=11, latent=16, pseudo_inputs=10, estimator=estimator)
    even = break_even_parameters(work, owner, rates, groups=groups, imbalance=1.2)
    assert 0 < even < float("inf")

    def ratio(parameters: float) -> float:
        ours = modality_parallel_seconds(parameters, work, owner, rates, groups=groups, imbalance=1.2)
        return ours / data_parallel_seconds(parameters, 4 * groups, rates)

    assert ratio(even) == pytest.approx(1)
    assert ratio(2 * even) < 1 < ratio(even / 2)
    slow = Rates(
        bandwidth=break_even_bandwidth(2 * even, work, owner, rates, groups=groups, imbalance=1.2),
        latency=2e-5,
        per_parameter=1e-10,
        tables=1e-4,
    )
    ours = modality_parallel_seconds(2 * even, work, owner, slow, groups=groups, imbalance=1.2)
    assert ours == pytest.approx(data_parallel_seconds(2 * even, 4 * groups, slow)) and slow.bandwidth > rates.bandwidth


def test_without_latency_tables_and_imbalance_the_break_even_is_where_the_bytes_are_equal_at_any_bandwidth() -> None:
    names = [f"m{i}" for i in range(4)]
    owner, work = (
        place(dict.fromkeys(names, 1.0), 2),
        expected_workload(names, rows=64, samples=11, latent=16, pseudo_inputs=0, estimator="resampled"),
    )
    for bandwidth in (1e8, 1e11):
        even = break_even_parameters(work, owner, Rates(bandwidth=bandwidth, latency=0.0))
        assert data_parallel(even, 2).sent == pytest.approx(modality_parallel(work, owner).sent)
    assert even == pytest.approx(51776 / 4)  # the sum by hand of the test above, over 4 bytes a parameter
    assert break_even_parameters(work, owner, Rates(bandwidth=1e9, latency=0.0), volume=3) == pytest.approx(even * 2 / 3)
    assert break_even_bandwidth(2 * even, work, owner, Rates(bandwidth=1.0, latency=0.0)) == float("inf")
    assert break_even_bandwidth(even / 2, work, owner, Rates(bandwidth=1.0, latency=0.0)) == 0


def test_where_imbalance_costs_more_than_gradients_modality_parallelism_never_pays() -> None:
    names = [f"m{i}" for i in range(4)]
    owner, work = (
        place(dict.fromkeys(names, 1.0), 4),
        expected_workload(names, rows=64, samples=11, latent=16, pseudo_inputs=0, estimator="resampled"),
    )
    fast = Rates(bandwidth=1e12, latency=0.0, per_parameter=1e-9)
    assert break_even_parameters(work, owner, fast, imbalance=1.5) == float("inf")
    assert break_even_parameters(work, owner, fast) < float("inf")
