"""Laws of refinement: it reaches exact posteriors whatever is missing, follows what the target says, and touches nothing else."""

import contextlib
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal as Gaussian

import meme_dist.refine as module_of_refine
from meme_dist import refine_command
from meme_dist.attacks import replaced
from meme_dist.cli import main as cli
from meme_dist.data.index import Manifest
from meme_dist.data.sets.linear_gaussian import LinearGaussian, linear_gaussian, parameters
from meme_dist.data.shards import write_shards
from meme_dist.data.stream import Evaluation
from meme_dist.distributions import DiagNormal
from meme_dist.likelihoods import Normal
from meme_dist.mcmc import HMC, MALA, MAP, ULA, Kernel
from meme_dist.metrics.rows import holds, noise_of
from meme_dist.modality import Modality
from meme_dist.objectives.base import Objective
from meme_dist.objectives.holder import Holder
from meme_dist.objectives.jmvae import JMVAE
from meme_dist.objectives.meme import MEME
from meme_dist.objectives.mmvae import MMVAE
from meme_dist.objectives.mmvaeplus import MMVAEPlus
from meme_dist.objectives.mmvm import MMVM
from meme_dist.objectives.mopoe import MoPoE
from meme_dist.objectives.mvae import MVAE
from meme_dist.objectives.mvtcae import MVTCAE
from meme_dist.refine import Refining, Target, log_joint, refine
from meme_dist.refine_command import main
from meme_dist.types import Batch, pack, pack_dense
from tests.objectives.rivals import EVENT, NAMES, PATTERNS, SPREAD, D, build, rows

pytestmark = pytest.mark.repeats

KERNELS = pytest.mark.parametrize("kernel", [HMC(leapfrogs=4), MALA, ULA(), MAP(rate=0.4)], ids=["hmc", "mala", "ula", "map"])
KINDS: dict[type[Objective], dict[str, Any]] = {
    MEME: {"pseudo_inputs": 3},
    MVAE: {},
    MMVAE: {},
    MoPoE: {},
    MVTCAE: {},
    JMVAE: {"hidden": 4},
    MMVM: {},
    Holder: {},
}


# ---- exact posteriors ---------------------------------------------------------------------------------------------------------------


def planted(truth: LinearGaussian, weight: float = 1.0) -> MVAE:
    """Decoders that are the truth, encoders that know nothing: q = N(1, 0.5^2) whatever the data."""
    modalities = {}
    for name, matrix in truth.weight.items():
        event, size = matrix.shape
        decoder, encoder = nn.Linear(size, event), nn.Linear(event, 2 * size)
        decoder.weight.data, decoder.bias.data = matrix.clone(), truth.bias[name].clone()
        encoder.weight.data.zero_()
        encoder.bias.data[:size], encoder.bias.data[size:] = 1.0, -0.43
        likelihood = Normal(truth.scale[name])
        modalities[name] = Modality(
            encoder=encoder, decoder=decoder, likelihood=likelihood, latent_dim=size, feature=(event,), weight=weight
        )
    return MVAE(modalities).double()


def data(truth: LinearGaussian, patterns: Sequence[Sequence[int]]) -> tuple[dict[str, Tensor], Tensor, Batch]:
    mask = torch.tensor(patterns).bool()
    x = {name: torch.randn(len(mask), len(bias)).double() for name, bias in truth.bias.items()}
    shown = {name: torch.where(mask[:, i : i + 1], value, torch.nan) for i, (name, value) in enumerate(x.items())}
    return x, mask, pack_dense(shown, dict(zip(x, mask.T, strict=True)), draw=torch.arange(len(mask)).numpy(), seed=11)


def assert_posterior(z: Tensor, mean: Tensor, stddev: Tensor) -> None:
    """Moments of K chains a row, each within 4.5 standard errors."""
    count = len(z)
    assert ((z.mean(0) - mean).abs() < 4.5 * stddev / count**0.5).all()
    assert ((z.std(0) / stddev - 1).abs() < 4.5 / (2 * count) ** 0.5).all()


@pytest.mark.parametrize("kernel", [HMC(leapfrogs=2), MALA], ids=["hmc", "mala"])
def test_refinement_reaches_the_exact_posterior_of_every_pattern(kernel: Kernel) -> None:
    truth = parameters()
    x, mask, batch = data(truth, [(0, 0, 0), *PATTERNS])
    found = refine(planted(truth), batch, kernel=kernel, budget=101, samples=200)
    assert_posterior(found.z, *truth.posterior(x, mask))


def test_temper_and_choice_are_in_the_target() -> None:
    """A tempered Normal likelihood is one of a larger scale, a modality left out is one that is missing, a weight of training drops out."""
    truth = parameters()
    x, mask, batch = data(truth, PATTERNS)
    tempered = LinearGaussian(truth.weight, truth.bias, {**truth.scale, "x1": truth.scale["x1"] / 0.3**0.5})
    found = refine(planted(truth, weight=5.0), batch, budget=101, samples=200, modalities=["x2", "x1"], temper={"x1": 0.3})
    assert_posterior(found.z, *tempered.posterior(x, mask & torch.tensor([False, True, True])))


def test_any_density_can_be_the_prior() -> None:
    truth = parameters()
    _, _, batch = data(truth, PATTERNS)
    prior = DiagNormal(torch.tensor([3.0, -2.0]).double(), torch.tensor([0.2, 0.4]).double())
    found = refine(planted(truth), batch, budget=101, samples=200, modalities=[], prior=prior)
    assert_posterior(found.z, prior.mean, prior.scale)


@KERNELS
def test_refinement_raises_the_log_target(kernel: Kernel) -> None:
    truth = parameters()
    x, mask, batch = data(truth, PATTERNS * 3)
    objective = planted(truth)
    found = refine(objective, batch, kernel=kernel, budget=61 if isinstance(kernel, MAP) else 25, first="mean")
    exact = log_joint(objective, batch, truth.posterior(x, mask)[0][None])
    torch.testing.assert_close(found.first, objective.infer(batch).mean.detach()[None])
    torch.testing.assert_close(found.before, log_joint(objective, batch, found.first))
    torch.testing.assert_close(found.after, log_joint(objective, batch, found.z))
    assert found.after.mean() > found.before.mean() + 1 and (found.after <= exact + 1e-9).all()
    if isinstance(kernel, MAP):
        torch.testing.assert_close(found.after, exact, rtol=0, atol=0.06)


# ---- any objective ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_target_is_what_it_says_for_every_objective(kind: type[Objective]) -> None:
    """A loop over rows and names; NaN in the place of what is absent."""
    objective = build(kind, **KINDS[kind])
    x, batch = rows(PATTERNS)
    found = refine(objective, batch, budget=4, samples=2, temper={"b": 0.5})
    prior = objective.prior().log_prob(found.z)
    for k, b in itertools.product(range(2), range(len(batch.draw))):
        total, z = prior[k, b], found.z[k, b]
        for i, name in enumerate(NAMES):
            if batch.observed[b, i]:
                explained = Gaussian(objective.modality(name).decoder(z), SPREAD).log_prob(x[name][b]).sum()
                total = total + (0.5 if name == "b" else 1.0) * explained
        torch.testing.assert_close(found.after[k, b], total)


def test_many_chains_are_evaluated_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoders see no more chains at once than there is room for, or one of each row; what is found is the same."""
    objective = build(MVAE)
    _, batch = rows(PATTERNS)
    settings: dict[str, Any] = {"budget": 6, "samples": 5, "temper": 0.5}
    seen: list[int] = []
    objective.modality("a").decoder.register_forward_hook(lambda module, given, out: seen.append(given[0].shape[:-1].numel()))
    whole, most = refine(objective, batch, **settings), max(seen)
    for room, copies in ((1, 1), (2 * len(batch.draw), 2)):
        seen.clear()
        monkeypatch.setattr(module_of_refine, "AT_ONCE", room)
        parts = refine(objective, batch, **settings)
        assert max(seen) == copies * most / 5
        for ours, theirs in zip((parts.z, parts.before, parts.after), (whole.z, whole.before, whole.after), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def private(names: Mapping[str, int]) -> dict[str, Modality]:
    def modality(own: int) -> Modality:
        encoder, decoder = nn.Linear(EVENT, 2 * (D + own)), nn.Sequential(nn.Linear(D + own, 6), nn.Tanh(), nn.Linear(6, EVENT))
        keywords: dict[str, Any] = {"latent_dim": D + own, "private_dim": own, "feature": (EVENT,)}
        return Modality(encoder=encoder, decoder=decoder, likelihood=Normal(SPREAD), **keywords)

    return {name: modality(own) for name, own in names.items()}


def test_own_latents_are_refined_with_the_shared_ones() -> None:
    objective = MEME(private({"a": 1, "b": 0, "c": 3}), pseudo_inputs=2).double()
    x, batch = rows(PATTERNS)
    x = {name: value.nan_to_num() for name, value in x.items()}
    found = refine(objective, batch, budget=30, modalities=["c", "b"])
    assert {name: w.shape[-1] for name, w in found.private.items()} == {"c": 3}
    total = objective.prior().log_prob(found.z)[0] + Gaussian(0, 1).log_prob(found.private["c"]).sum(-1)[0]
    for i, name in ((1, "b"), (2, "c")):
        z = found.z[0] if name == "b" else torch.cat([found.z[0], found.private[name][0]], -1)
        explained = Gaussian(objective.modality(name).decoder(z), SPREAD).log_prob(x[name]).sum(-1)
        total = total + torch.where(batch.observed[:, i], explained, 0.0)
    torch.testing.assert_close(found.after[0], total)
    with pytest.raises(ValueError, match="a, c: latents of their own are part"):
        log_joint(objective, batch, found.z)
    assert refine(MMVAEPlus(private(dict.fromkeys(NAMES, 2))).double(), batch, budget=3).private.keys() == set(NAMES)


@KERNELS
def test_a_row_is_refined_alike_in_any_batch(kernel: Kernel) -> None:
    objective = build(MVAE)
    x, batch = rows(PATTERNS)
    whole = refine(objective, batch, kernel=kernel, budget=13, samples=2)
    for part in ([3], [20, 4, 7]):
        mask = batch.observed[part].numpy()
        present = {name: x[name][part][batch.observed[part][:, i]] for i, name in enumerate(NAMES)}
        alone = refine(objective, pack(present, mask, draw=batch.draw[part].numpy(), seed=batch.seed), kernel=kernel, budget=13, samples=2)
        torch.testing.assert_close(alone.z, whole.z[:, part], rtol=1e-9, atol=1e-9)


def test_the_model_is_left_as_it_was() -> None:
    objective = build(MEME, pseudo_inputs=2)
    _, batch = rows(PATTERNS)
    objective(batch).total.backward()
    before = {name: p.grad.clone() for name, p in objective.named_parameters()}
    found = refine(objective, batch, budget=10)
    assert all(torch.equal(p.grad, before[name]) and p.requires_grad for name, p in objective.named_parameters())
    assert objective.training and not found.z.requires_grad


def test_borders_are_checked() -> None:
    objective, (_, batch) = build(MVAE), rows(PATTERNS)
    with pytest.raises(ValueError, match=r"which the batch has, got \['d'\]"):
        refine(objective, batch, modalities=["a", "d"])
    with pytest.raises(ValueError, match=r"in the target, got \['a'\]"):
        refine(objective, batch, modalities=["b"], temper={"a": 0.5})
    with pytest.raises(ValueError, match="at least 0, got {'a': -1.0"):
        refine(objective, batch, temper=-1.0)
    assert Target(objective, batch, []).weight == []
    objective.modalities["a"].weight = 0.0
    with pytest.raises(ValueError, match="a: trained with weight 0, so its likelihood cannot refine"):
        refine(objective, batch)
    refine(objective, batch, modalities=["b"], budget=2)
    objective.modalities["a"].weight = 1.0
    with pytest.raises(ValueError, match=r"temper: expected some of \['a', 'b', 'c'\].*got \['d'\]"):
        Refining(objective, temper={"d": 0.5})
    with pytest.raises(ValueError, match="leapfrogs: expected at least 1, got 0"):
        refine(objective, batch, kernel=HMC(leapfrogs=0))


def test_a_chain_is_run_for_each_measured_row_and_for_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are not asked for, or lack the sources, cost nothing and spoil nothing; the figures are those of the whole batch."""
    objective, (_, batch) = build(MVAE), rows(PATTERNS * 2)
    batch = batch._replace(draw=torch.arange(len(batch.draw)))
    sources: list[tuple[str, ...]] = [("a",), ("a", "c")]
    settings: dict[str, Any] = {"kernel": MALA, "budget": 8}
    chains: list[int] = []
    monkeypatch.setattr(refine_command, "refine", lambda of, part, **k: chains.append(len(part.draw)) or refine(of, part, **k))
    metric = refine_command.refinement(sources, rows=10, temper={"a": 0.5}, **settings)
    unwanted = batch.modalities["a"].row >= 10
    spoilt = torch.where(unwanted[:, None], torch.nan, batch.modalities["a"].data)
    found = metric(objective, replaced(batch, "a", spoilt))
    held = {names: holds(batch, names) & (batch.draw < 10) for names in sources}
    assert chains == [int(wanted.sum()) for wanted in held.values()]
    for names, wanted in held.items():
        whole = refine(objective, batch.only(*names), temper={"a": 0.5}, **settings)
        expected = {"+".join(names): ((whole.after - whole.before)[0], wanted)}
        explained = objective.explanations(batch.only("b"), torch.cat([whole.first, whole.z])[None])[0, 0]
        expected["+".join(names) + ">b"] = (explained[1] - explained[0], wanted & holds(batch, ["b"]))
        for key, (gain, counted) in expected.items():
            assert float(found[f"{key}/gain"].total) == pytest.approx(gain[counted].sum().item(), rel=1e-6)
            assert float(found[f"{key}/gain"].count) == float(counted.sum()) > 0


def test_batches_without_a_measured_row_cost_no_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their sums are those of the others, of nothing."""
    objective, (_, batch) = build(MVAE), rows(PATTERNS)
    places = torch.arange(len(batch.draw))
    metric = refine_command.refinement([("a",), ("a", "b")], rows=12, kernel=MAP(rate=0.4), budget=4, temper={})
    near = metric(objective, batch._replace(draw=places))
    monkeypatch.setattr(refine_command, "refine", None)
    far = metric(objective, batch._replace(draw=places + 12))
    assert near.keys() == far.keys()
    assert all(float(sums.count.sum()) == 0 == float(sums.total.sum()) for sums in far.values())


def test_the_first_rows_are_shared_by_all_ranks(tmp_path: Path) -> None:
    write_shards(linear_gaussian(rows=200), tmp_path)
    manifest = Manifest.load(tmp_path)
    most = manifest.num_rows("test")
    for asked, world in ((8, 1), (9, 2), (7, 3), (most + 100, 2)):
        ranks = [refine_command.first_rows(manifest, asked, seed=0, rank=rank, world=world) for rank in range(world)]
        held = [torch.cat([batch.draw[batch.observed.any(1)] for batch in mine]) for mine in ranks]
        measured = [draw[draw < asked] for draw in held]
        assert torch.cat(measured).sort().values.tolist() == list(range(min(asked, most)))
        assert max(map(len, measured)) == -(-min(asked, most) // world)


# ---- a model whose inference is refined ---------------------------------------------------------------------------------------------


def test_a_refining_model_draws_what_refinement_finds() -> None:
    objective = build(MVAE)
    _, batch = rows(PATTERNS)
    model = Refining(objective, budget=12, temper={"a": 0.5, "b": 2.0})
    drawn = model.infer(batch.only("a", "c")).sample(noise_of(batch), "use", 3)
    torch.testing.assert_close(drawn, refine(objective, batch.only("a", "c"), budget=12, temper={"a": 0.5}, samples=3, purpose="use").z)
    with pytest.raises(ValueError, match="no density"):
        model.infer(batch).log_prob(drawn)
    q = Refining(planted(parameters()), budget=31).infer(data(parameters(), [(0, 0, 0)] * 30)[2])
    assert q.mean.mean().item() == pytest.approx(0, abs=0.2) and q.stddev.mean().item() == pytest.approx(1, abs=0.1)
    torch.testing.assert_close(model(batch).total, objective(batch).total)


def test_refined_imputations_are_nearer_to_the_truth(tmp_path: Path) -> None:
    """Encoders that know nothing, decoders that are the truth: refined, the missing entries are predicted as well as can be."""
    write_shards(linear_gaussian(rows=160), tmp_path)
    truth = parameters()
    objective = planted(truth).float()
    batch = next(iter(Evaluation(tmp_path, "test", batch_size=40)))
    given, target = batch.only("x0", "x1"), batch.dense("x2")
    mean, _ = truth.posterior({name: batch.dense(name).double() for name in ("x0", "x1")})
    best = (mean @ truth.weight["x2"].T + truth.bias["x2"]).float()
    error = {}
    for name, model in (("own", objective), ("refined", Refining(objective, budget=41))):
        z = model.infer(given).sample(noise_of(given), "test", 30)
        made = model.reconstruct("x2", z, noise_of(given), "test").mean(0).detach()
        error[name] = (made - target).square().mean().item()
    assert error["refined"] == pytest.approx((best - target).square().mean().item(), rel=0.1)
    assert error["own"] > 1.3 * error["refined"]


def test_the_command_measures_and_fills_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shards(linear_gaussian(rows=32), tmp_path / "rows")
    tiny = ["--objective", "mvae", "--latent-dim", "2", "--batch-size", "8", "--steps", "2", "--no-evaluate"]
    with contextlib.chdir(tmp_path):
        assert cli(["train", "auto", "--shards", str(tmp_path / "rows"), *tiny, "--run", "first"]) == 0
        capsys.readouterr()
        words = ["first", "--kernel", "map", "--budget", "6", "--temper", "x0", "0.5", "--shards", str(tmp_path / "rows")]
        assert main([*words, "--out", "filled"]) == 0
        told = capsys.readouterr().out
        written = json.loads((tmp_path / "runs" / "first" / "refined-map-6-x0=0.5.json").read_text())
        with pytest.raises(ValueError, match=r"temper: .*got \['y0'\]"):
            main(["first", "--temper", "y0", "0.5"])
        with pytest.raises(ValueError, match="--shards and --out go together"):
            main(["first", "--out", "filled"])
    entries = written["refinement"]
    assert written["settings"]["temper"] == {"x0": 0.5} and written["settings"]["budget"] == 6
    assert "| x0 + x1" in told and "entries filled in" in told
    assert len(entries) == 7 + 3 * 2 + 3  # sets of sources, and targets outside each
    assert all(entry["gain"]["count"] == 8 for entry in entries)
    assert all(entry["gain"]["value"] > 0 for entry in entries if entry["target"] is None)
    for entry in entries:
        assert entry["gain"]["value"] == pytest.approx(entry["after"]["value"] - entry["before"]["value"])
    old, new = (next(iter(Evaluation(folder, "train", batch_size=32))) for folder in (tmp_path / "rows", tmp_path / "filled"))
    assert new.observed.all() and not old.observed.all()
    for name, there in zip(old.modalities, old.observed.T, strict=True):
        torch.testing.assert_close(new.dense(name)[there], old.dense(name)[there])
