"""Laws of graphs: the codec's order, the definition choice by choice, and that every sample is a graph."""

import itertools
import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from meme_dist.data.graph_codec import END, START, Graph, check, to_array, to_graph
from meme_dist.distributions import DiagLaplace
from meme_dist.modalities.graph import GraphLikelihood, agreement, graph
from meme_dist.modalities.graph_types import Embedding, Factored, OneHot, Types
from meme_dist.modalities.vector import mlp
from meme_dist.modality import Modality
from meme_dist.noise import Noise
from meme_dist.objectives.meme import MEME
from meme_dist.objectives.mvae import MVAE
from meme_dist.types import pack_dense

NAMES = ("a", "b", "c")
PROPERTIES = (("conv", "3"), ("conv", "5"), ("max", "3"))
TYPES = {
    "one_hot": lambda: OneHot(3),
    "one_hot_x4": lambda: OneHot(3, scale=4.0),
    "embedding": lambda: Embedding(3, 5),
    "tied": lambda: Embedding(3, 5, scale=0.25),
    "factored": lambda: Factored(PROPERTIES, 5),
}


def built(kind: str = "embedding", size: int = 4, **settings) -> Modality:
    return graph(size, types=TYPES[kind](), latent_dim=3, hidden=6, tied=kind == "tied", **settings)


def drawn(rows: int, size: int = 4, types: int = 3) -> Tensor:
    """Random graphs of 1 to `size` vertices."""
    rng = np.random.default_rng(0)
    x = np.zeros((rows, size, 1 + size), dtype=np.int64)
    for one in x:
        count = rng.integers(1, size + 1)
        for v in range(count):
            one[v, 0], one[v, 1 : 2 + v] = rng.integers(1, types + 1), rng.random(v + 1) < 0.5
            one[v, 1] |= not one[v, 1:].any()
    check(x, types)
    return torch.from_numpy(x)


def every_graph(size: int, types: int) -> Tensor:
    """All arrays of up to `size` vertices."""
    found = []
    for count in range(1, size + 1):
        bits = [[b for b in itertools.product((0, 1), repeat=v + 1) if any(b)] for v in range(count)]
        for tokens in itertools.product(range(1, types + 1), repeat=count):
            for rows in itertools.product(*bits):
                x = np.zeros((size, 1 + size), dtype=np.int64)
                for v, (token, row) in enumerate(zip(tokens, rows, strict=True)):
                    x[v, 0], x[v, 1 : 2 + v] = token, row
                found.append(x)
    return torch.from_numpy(np.stack(found))


# ---- codec --------------------------------------------------------------------------------------------------------------------------


def test_an_array_comes_back_from_its_graph():
    for x in drawn(50).numpy():
        canonical = to_array(to_graph(x, NAMES), NAMES, 4)
        assert np.array_equal(to_array(to_graph(canonical, NAMES), NAMES, 4), canonical)
        assert sorted(canonical[:, 0]) == sorted(x[:, 0]) and canonical[:, 1:].sum() == x[:, 1:].sum()
    found = to_graph(np.array([[2, 1, 0], [1, 1, 1]]), NAMES)
    assert found == Graph((START, "b", "a", END), ((0, 1), (0, 2), (1, 2), (2, 3)))


def test_other_numbers_for_the_vertices_give_the_same_array():
    """Where types differ; where they do not, also as long as what leads to them differs."""
    chooser = random.Random(0)
    for edges in (((0, 1), (0, 2), (1, 3), (2, 3), (0, 3)), ((2, 0), (3, 1)), ()):
        graph = Graph(("d", "a", "c", "b"), edges)
        for _ in range(20):
            new = chooser.sample(range(4), 4)
            vertices = tuple(graph.vertices[new.index(v)] for v in range(4))
            other = Graph(vertices, tuple(chooser.sample([(new[u], new[v]) for u, v in edges], len(edges))))
            assert np.array_equal(to_array(other, "abcd", 4), to_array(graph, "abcd", 4))
    twins = [Graph(("a", "b", "c", "c"), ((0, 2), (1, 3))), Graph(("a", "b", "c", "c"), ((1, 2), (0, 3)))]
    assert np.array_equal(*(to_array(one, "abc", 4) for one in twins))


def test_start_leads_to_roots_and_is_kept_where_it_is_given():
    without = to_array(Graph(("a", "b"), ((0, 1),)), NAMES, 2)
    assert without.tolist() == [[1, 1, 0], [2, 0, 1]]
    given = to_array(Graph((END, "b", "a", START), ((3, 2), (3, 1), (2, 1), (1, 0))), NAMES, 2)
    assert given.tolist() == [[1, 1, 0], [2, 1, 1]]


@pytest.mark.parametrize(
    ("vertices", "edges", "message"),
    [
        (("a", "b", "c"), ((0, 1), (1, 2), (2, 1)), r"expected no cycle, got one among the vertices \[1, 2\]"),
        (("a", "a"), ((0, 0),), "no cycle"),
        (("a", "x"), (), "expected types among a, b, c, got 'x'"),
        ((START, "a", START), ((0, 1),), "expected one START at most, got 2"),
        (("a", END, END), (), "expected one END at most, got 2"),
        ((START, "a", "b"), ((0, 1),), "predecessor beside a START, got none of vertex 2"),
        ((START, "a"), ((1, 0),), "no edge into START or out of END, got 1 -> 0"),
        (("a", END, "b"), ((0, 1), (1, 2)), "no edge into START or out of END, got 1 -> 2"),
        (("a", "b", END), ((0, 1), (0, 2)), r"END after the vertices without a successor, \[1\], got it after \[0\]"),
        (("a",), ((0, 3),), "between vertices 0 to 0, got 0 -> 3"),
        ((START, END), (), "expected 1 to 4 vertices beside START and END, got 0"),
        (("a",) * 5, (), "expected 1 to 4 vertices beside START and END, got 5"),
    ],
)
def test_what_is_no_graph_is_refused(vertices, edges, message):
    with pytest.raises(ValueError, match=message):
        to_array(Graph(vertices, edges), NAMES, 4)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ((1, 0), 4, "a type from 1 to 3, or 0 for none, got 4 at row 2, vertex 1"),
        ((1, 0), -1, "a type from 1 to 3"),
        ((0, 0), 0, "no vertex after a row without one, got 2 at row 2, vertex 1"),
        ((1, 1), 2, "0 or 1 for each edge, got 2 at row 2, vertex 1"),
        ((0, 2), 1, r"edges from earlier vertices alone \(a cycle, or no topological order\)"),
        ((2, 1), 1, "no edges where there is no vertex"),
        ((0, 1), 0, "a predecessor of every vertex"),
    ],
)
def test_an_array_that_is_no_graph_is_refused(place, value, message):
    x = np.tile([[1, 1, 0, 0], [2, 0, 1, 0], [0, 0, 0, 0]], (3, 1, 1))
    check(x, 3)
    x[(2, *place)] = value
    with pytest.raises(ValueError, match=f"graph: expected {message}"):
        check(x, 3)
    with pytest.raises(ValueError, match="one vertex at least"):
        check(np.zeros((1, 3, 4), dtype=np.int64), 3)


# ---- likelihood ---------------------------------------------------------------------------------------------------------------------


def definition(likelihood: GraphLikelihood, x: Tensor, start: Tensor) -> Tensor:
    """log p of one graph [G, 1 + G] from START's state [H]: one choice after the other, with torch's own GRU, lists and loops."""
    table, hidden = likelihood.types(), len(start)
    gru = nn.GRUCell(table.shape[1], hidden, dtype=start.dtype)
    cell = likelihood.cell.state
    weights = {"weight_ih": likelihood.given.weight, "bias_ih": likelihood.given.bias, "weight_hh": cell.weight, "bias_hh": cell.bias}

    def state_of(token: int, arrived: Tensor) -> Tensor:
        return torch.func.functional_call(gru, weights, (table[token - 1][None], arrived[None]))[0]

    def message(state: Tensor, slot: int) -> Tensor:
        both = likelihood.message.project.weight @ state + likelihood.message.slot[slot]
        return torch.sigmoid(both[:hidden]) * both[hidden:]

    states, total = [start], torch.zeros((), dtype=start.dtype)
    for v in range(likelihood.size):
        scores = likelihood.score(states[v])
        if likelihood.tied:
            scores = torch.cat([scores[:1], table @ scores[1:]])
        token = int(x[v, 0])
        allowed = range(1, len(scores)) if v == 0 else range(len(scores))
        total = total + scores[token] - torch.stack([scores[i] for i in allowed]).logsumexp(0)
        if token == 0:
            return total
        arrived, found = likelihood.always.start.weight @ start + likelihood.always.place[v], False
        for u in reversed(range(v + 1)):
            now = state_of(token, arrived)
            logit = likelihood.connect(likelihood.earlier(states[u]) + likelihood.later(now))[0]
            bit = bool(x[v, 1 + u])
            if u > 0 or found:
                total = total + torch.log(torch.sigmoid(logit) if bit else 1 - torch.sigmoid(logit))
            found |= bit
            arrived = arrived + (message(states[u], u) if bit else 0)
        states.append(state_of(token, arrived))
    return total


@pytest.mark.parametrize("kind", TYPES)
def test_all_states_at_once_give_what_the_definition_gives_and_its_gradients(kind):
    modality, x = built(kind).double(), drawn(7)
    z = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    wanted = [p for p in (z, *modality.decoder.parameters(), *modality.likelihood.parameters())]
    value = modality.log_prob(x, z)
    starts = modality.decoder(z.flatten(0, 1)).unflatten(0, (2, 7))
    expected = torch.stack([torch.stack([definition(modality.likelihood, x[p], starts[k, p]) for p in range(7)]) for k in range(2)])
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-9)
    mine, theirs = (torch.autograd.grad((v * torch.arange(1, 15).view(2, 7)).sum(), wanted) for v in (value, expected))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_the_walk_along_given_choices_has_the_probability_of_the_graph():
    modality, x = built("tied").double(), drawn(20)
    z = torch.randn(1, 20, 3, dtype=torch.float64)
    made = modality.likelihood.walk(modality.decoder(z[0]), lambda v, _: x[:, v, 0], lambda v, u, _: x[:, v, 1 + u] > 0)
    assert torch.equal(made.x, x)
    torch.testing.assert_close(made.log_prob, modality.log_prob(x, z)[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["one_hot", "tied"])
def test_the_probabilities_of_all_graphs_sum_to_one(kind):
    modality, x = built(kind, size=3).double(), every_graph(3, 3)
    assert len(x) == 3 + 9 * 3 + 27 * 3 * 7
    z = 3 * torch.randn(4, 1, 3, dtype=torch.float64)
    total = modality.log_prob(x, z.expand(4, len(x), 3)).exp().sum(1)
    torch.testing.assert_close(total, torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-12)


def test_samples_come_as_often_as_their_probability_says():
    modality, x = built("one_hot", size=2), every_graph(2, 3)
    z, rows = torch.randn(1, 1, 3), 30_000
    probability = modality.log_prob(x, z.expand(1, len(x), 3))[0].exp()
    params = modality.decoder(z[0])[None].expand(1, rows, -1)
    made = modality.likelihood.sample(params, Noise(0, torch.arange(rows)), "graphs")[0]
    count = (made[:, None] == x[None]).flatten(2).all(2).sum(0)
    assert count.sum() == rows
    error = (count / rows - probability).abs() / (probability * (1 - probability) / rows).sqrt()
    assert error.max() < 4


@pytest.mark.parametrize("size", [1, 2, 5])
def test_every_sample_is_a_graph_whatever_the_weights(size):
    modality = built("tied", size=size)
    with torch.no_grad():
        for p in modality.parameters():
            p.mul_(5)
        z = 3 * torch.randn(3, 40, 3)
        params = modality.decoder(z.flatten(0, 1)).unflatten(0, (3, 40))
        check(modality.likelihood.sample(params, Noise(1, torch.arange(40)), "any").flatten(0, 1).numpy(), 3)
        check(modality.reconstruct(z).flatten(0, 1).numpy(), 3)


def test_the_most_probable_choices_are_a_graph_of_their_probability():
    modality, z = built(), torch.randn(2, 3, 3)
    made = modality.reconstruct(z)
    assert made.shape == (2, 3, 4, 5) and made.dtype == torch.int64
    walked = modality.likelihood.walk(modality.decoder(z[0]), lambda _, logits: logits.argmax(-1), lambda _v, _u, logit: logit > 0)
    assert torch.equal(walked.x, made[0])
    torch.testing.assert_close(walked.log_prob, modality.log_prob(made[0], z[:1])[0])


def test_log_probability_is_differentiable_in_z():
    modality, x = built("tied", size=3).double(), drawn(3, size=3)
    z = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: modality.log_prob(x, z), z)
    assert (torch.autograd.grad(modality.log_prob(x, z).sum(), z)[0].abs().sum(-1) > 0).all()


def test_two_vertices_of_one_type_are_told_apart_before_they_have_an_edge():
    """Else a graph in which one of them has the edge and the other not could never be likely."""
    modality, x = built(size=3), torch.tensor([[[1, 1, 0, 0], [2, 1, 0, 0], [2, 0, 1, 0]]])
    made = modality.likelihood.choices(x, modality.decoder(torch.randn(1, 3))[None])
    (first,), (second,) = ((made.edge_logits[0, 0, [late * (late + 1) // 2 + late - 1]]).tolist() for late in (1, 2))
    assert abs(first - second) > 1e-3


def test_a_graph_that_several_samples_explain_is_named_not_copied():
    modality, x = built(), drawn(3)
    row, z = torch.tensor([2, 0, 2, 1]), torch.randn(2, 4, 3)
    torch.testing.assert_close(modality.log_prob(x, z, row), modality.log_prob(x[row], z))


def test_agreement_counts_types_and_possible_edges_of_vertices_that_are_there():
    x = torch.tensor([[[1, 1, 0], [2, 0, 1]], [[3, 1, 0], [0, 0, 0]]])
    assert agreement(x, x).tolist() == [1, 1]
    other = torch.tensor([[[1, 1, 0], [1, 1, 1]], [[3, 1, 0], [2, 1, 1]]])
    assert agreement(other, x).tolist() == pytest.approx([3 / 5, 1])


# ---- encoder ------------------------------------------------------------------------------------------------------------------------


def swept(sweep: nn.Module, vectors: list[Tensor], before: list[list[int]]) -> Tensor:
    """The last state of slots 1, 2, ..., from the messages of `before`; slot 0 has the first state."""
    hidden = len(sweep.first)
    states = [sweep.first]
    for v, slots in enumerate(before, 1):
        arrived = torch.zeros(hidden, dtype=states[0].dtype)
        for u in slots:
            both = sweep.message.project.weight @ states[u] + sweep.message.slot[u]
            arrived = arrived + torch.sigmoid(both[:hidden]) * both[hidden:]
        given = sweep.given(vectors[v - 1]) if v - 1 < len(vectors) else sweep.last
        states.append(sweep.cell(given, arrived))
    return states[-1]


def test_the_encoder_passes_messages_along_edges_to_end_and_back_to_start():
    modality, x = (
        built(size=3).double(),
        torch.tensor([[[1, 1, 0, 0], [3, 1, 0, 0], [2, 0, 1, 1]], [[2, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]]),
    )
    encoder, table = modality.encoder, modality.likelihood.types()
    nothing = torch.zeros(5, dtype=torch.float64)
    vectors = [[table[0], table[2], table[1]], [table[1], table[0], nothing]]
    forwards = [[[0], [0], [1, 2], [3]], [[0], [0, 1], [], [2]]]  # slots 1, 2, 3 and END
    backwards = [[[0], [1], [1], [2, 3]], [[], [0], [2], [2, 3]]]  # END, then vertices backwards, START last
    for row in range(2):
        last = [swept(encoder.forwards, vectors[row], forwards[row]), swept(encoder.backwards, vectors[row][::-1], backwards[row])]
        mean = encoder.posterior(torch.cat(last))[:3]
        torch.testing.assert_close(modality.encode(x).mean[row], mean, rtol=0, atol=1e-12)


def test_a_graph_without_backward_messages_has_half_the_sweeps():
    one, both = built(backward=False), built(backward=True)
    assert one.encoder.backwards is None and both.encoder.backwards is not None
    assert one.encode(drawn(2)).mean.shape == (2, 3)


def test_rows_do_not_see_each_other_and_densities_stay_close_under_autocast():
    modality, x, z = built(family=DiagLaplace), drawn(5), torch.randn(2, 5, 3)
    together, value = modality.encode(x).mean, modality.log_prob(x, z)
    alone = [modality.log_prob(x[b : b + 1], z[:, b : b + 1]) for b in range(5)]
    torch.testing.assert_close(value, torch.cat(alone, 1))
    torch.testing.assert_close(together, torch.cat([modality.encode(x[b : b + 1]).mean for b in range(5)]))
    with torch.autocast("cpu", torch.bfloat16):
        rough, q = modality.log_prob(x, z), modality.encode(x)
    assert rough.dtype == q.mean.dtype == torch.float32
    torch.testing.assert_close(rough, value, rtol=0.02, atol=0.5)


# ---- types --------------------------------------------------------------------------------------------------------------------------


def test_types_that_share_a_property_share_a_vector():
    table = Factored(PROPERTIES, 4)()
    five, three = table[1] - table[0], Factored(PROPERTIES[:1] * 2, 4)()
    assert table.shape == (3, 4) and not torch.equal(table[0], table[1])
    shared = Factored((("conv", "3"), ("conv", "5"), ("sep", "3"), ("sep", "5")), 4)()
    torch.testing.assert_close(shared[1] - shared[0], shared[3] - shared[2])
    assert five.abs().sum() > 0 and torch.equal(three[0], three[1])
    with pytest.raises(ValueError, match=r"as many for each type, one at least, got \[2, 1\]"):
        Factored((("conv", "3"), ("max",)), 4)


def test_the_control_says_the_same_four_times_as_loud():
    assert torch.equal(OneHot(3, scale=4.0)(), 4 * OneHot(3)())
    assert Embedding(2000, 16)().norm(dim=1).mean().item() == pytest.approx(4, rel=0.05)
    assert not list(OneHot(3).parameters())


def test_encoder_decoder_and_scores_share_one_table():
    modality, x = built("tied"), drawn(6)
    assert [name for name, _ in modality.named_parameters() if name.endswith("table")] == ["embed.types.table"]
    (-modality.log_prob(x, modality.encode(x).mean[None])).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in modality.parameters())


def test_an_embedding_of_full_rank_can_say_what_one_hot_says():
    """The same function class: a table of unit vectors, learned or not, gives the same posterior and the same likelihood."""
    hot, learned = built("one_hot"), graph(4, types=Embedding(3, 3), latent_dim=3, hidden=6)
    learned.load_state_dict(hot.state_dict() | {"embed.types.table": torch.eye(3), "likelihood.types.table": torch.eye(3)})
    x, z = drawn(5), torch.randn(2, 5, 3)
    torch.testing.assert_close(learned.log_prob(x, z), hot.log_prob(x, z))
    torch.testing.assert_close(learned.encode(x).mean, hot.encode(x).mean)


# ---- among other modalities ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [lambda parts: MEME(parts, pseudo_inputs=3, samples=2), MVAE])
def test_rows_without_a_graph_cost_nothing_and_bring_nothing(build):
    parts = {"graph": built(), "value": mlp((2,), latent_dim=3, hidden=(8,))}
    objective = build(parts)
    observed = {"graph": torch.tensor([1, 1, 0, 0]).bool(), "value": torch.tensor([1, 0, 1, 1]).bool()}
    x, value = drawn(4), torch.randn(4, 2)
    seen: list[int] = []
    parts["graph"].encoder.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    losses = []
    for absent in (0, 999):  # what stands where there is no graph is never read
        batch = pack_dense({"graph": torch.where(observed["graph"][:, None, None], x, absent), "value": value}, observed)
        torch.manual_seed(0)
        objective.initialise(batch)
        seen.clear()
        losses.append(objective(batch).total)
        assert seen[0] == 2
    assert torch.isfinite(losses[0]) and torch.equal(losses[0], losses[1])
    losses[1].backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in objective.parameters())
    none = pack_dense({"graph": x, "value": value}, {"graph": torch.zeros(4).bool(), "value": torch.ones(4).bool()})
    assert torch.isfinite(objective(none).total)


def test_types_is_what_the_tables_are():
    assert all(isinstance(make(), Types) for make in TYPES.values())
