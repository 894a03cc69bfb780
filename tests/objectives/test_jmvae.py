"""JMVAE: its terms against a transcription, its joint encoder, inference, and its networks on different ranks."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from meme_dist.distributions import DiagLaplace, DiagNormal
from meme_dist.objectives.jmvae import JMVAE
from meme_dist.train.modality_parallel import ModalityParallel
from tests.objectives.rivals import COMPLETE, FAMILIES, NAMES, PATTERNS, Row, apart, assert_transcribed, build, rows
from tests.ranks import run_ranks


def joint(row: Row) -> Any:
    """The joint encoder as one perceptron over a row's concatenated outputs, zeros for what it lacks, and its mask."""
    objective = row.objective
    branches = [objective.branches[n] for n in NAMES]
    outputs = [
        b.encoder(b.embed(row.x[n][None]))[0] if n in row.names else torch.zeros(4).double() for n, b in zip(NAMES, branches, strict=True)
    ]
    mask = torch.tensor([float(n in row.names) for n in NAMES]).double()
    first = torch.cat([*[b.first.weight for b in branches], torch.stack([b.first.bias for b in branches], 1)], 1)
    hidden = F.relu(first @ torch.cat([*outputs, mask]))
    (trunk,) = objective.trunk.values()
    return row.posterior(*trunk[3](F.relu(trunk[1](hidden))).chunk(2))


@pytest.mark.parametrize("patterns", [COMPLETE, PATTERNS], ids=["complete", "incomplete"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradient_are_those_of_a_loop_over_rows(family: type, patterns: list[tuple[int, ...]]) -> None:
    alpha, beta = 0.3, 1.7

    def loss(row: Row) -> Tensor:
        q = joint(row)
        z = row.draw(q, "joint")
        explained = torch.stack([row.explains(n, z) for n in row.names]).sum()
        return beta * apart(q, row.prior()) + alpha * torch.stack([apart(q, row.q[n]) for n in row.names]).sum() - explained

    assert_transcribed(build(JMVAE, family, alpha=alpha, beta=beta, hidden=5), loss, patterns)


@pytest.mark.parametrize("several", ["joint", "product"])
def test_inference_is_one_encoders_or_the_joint_ones_row_by_row(several: str) -> None:
    objective = build(JMVAE, hidden=5, several=several)
    x, batch = rows([*PATTERNS, (0, 0, 0)])
    q = objective.infer(batch)
    for b in range(len(batch.observed)):
        row = Row(objective, x, batch, b)
        if not row.names:
            expected = row.prior()
        elif len(row.names) == 1:
            expected = row.q[row.names[0]]
        else:
            partial = several == "product" and len(row.names) < len(NAMES)
            expected = row.product(row.names, standard=False) if partial else joint(row)
        torch.testing.assert_close(q.mean[b], expected.loc)
        torch.testing.assert_close(q.stddev[b], expected.scale)
    alone = objective.infer(batch.only("b"))
    torch.testing.assert_close(alone.mean[1], Row(objective, x, batch, 1).q["b"].loc)


def test_branches_start_from_weights_of_their_own() -> None:
    torch.manual_seed(0)
    objective = build(JMVAE, hidden=5)
    for name in NAMES:
        ours, theirs = objective.branches[name].encoder, objective.modality(name).encoder
        assert [type(m) for m in ours] == [type(m) for m in theirs] and ours[0] is not theirs[0]
        assert not torch.equal(ours[0].weight, theirs[0].weight)


def test_families_without_products_take_the_joint_encoder_alone() -> None:
    build(JMVAE, DiagLaplace, hidden=5)
    with pytest.raises(ValueError, match="JMVAE multiplies posteriors"):
        build(JMVAE, DiagLaplace, hidden=5, several="product")


def furthest(rank: int, world: int) -> list[float]:
    """Differences of loss and gradients between one process and the same rows with networks on several."""
    torch.manual_seed(0)
    whole = build(JMVAE, DiagNormal, hidden=5)
    _, batch = rows(PATTERNS)
    placed = ModalityParallel(copy.deepcopy(whole), init_device_mesh("cpu", (1, world), mesh_dim_names=("data", "modality")))
    expected, came = whole(batch).total, placed(placed.needed(batch)).total
    expected.backward()
    came.backward()
    true = {name: p.grad for name, p in whole.named_parameters()}
    found = [(p.grad - true[name]).abs().max().item() for name, p in placed.owned_parameters()]
    assert {name.split(".")[1] for name, _ in placed.owned_parameters()} == {n for n, m in placed.assignment.items() if m == rank}
    return [abs(came.item() - expected.item()), max(found)]


def test_networks_on_different_ranks_change_nothing() -> None:
    for differences in run_ranks(furthest, 2):
        assert max(differences) < 1e-9
