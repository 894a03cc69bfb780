"""Directed acyclic graphs: asynchronous message passing each way (D-VAE; Zhang et al. 2019, arXiv 1904.11088).

Data are arrays [G, 1 + G] of types and predecessors (`meme_dist.data.graph_codec`); slot 0 is START, slot v + 1 vertex v. A state h [H] for
each slot,

    message   m(u)  = sigmoid(W_g h_u + b_g[u]) * (W_m h_u + b_m[u])       b: a bias for each slot ("which vertex it is")
    state     h_v   = GRU(type_v, sum over predecessors u of m(u))               decoder: + W_a h_START + b_a[v]

Encoder: vertices in order, then END after all loose ends; the same backwards from END to START with weights of its own (`backward`); both
last states give q(z | x). Decoder: h_START from z, then vertex by vertex

    type_v ~ softmax(MLP(h_{v-1}));  for u = v - 1 .. START:  edge ~ sigmoid(MLP(h_u, h_v));  h_v again, with the new edge

until the type says END. A first vertex there always is, and START leads to whatever nothing else leads to: those two choices, and END
after G vertices, are no choices and have no probability, so that every sample is a graph and the probabilities of all graphs sum to 1.

With the edges known, the states of v on the way, after its 0, 1, ... latest possible predecessors were asked, have as input partial sums
of messages over u = v - 1, v - 2, ...: one cumulative sum, one call of the GRU. G + 1 calls one after the other in all, where the
definition takes (G + 1)(G + 2) / 2.

Differs from the published code: decoder and encoder have message functions of their own, and in the decoder every vertex also hears a
linear map of h_START and which vertex it is, whatever edges lead to it. Otherwise what z says has to come through all vertices in between,
and two vertices of one type that have no edge yet are one and the same to their first edge: some graphs could never be told from others.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from meme_dist.distributions import DiagNormal, Diagonal, token_log_prob, wide
from meme_dist.likelihoods import Rows
from meme_dist.modalities.graph_types import Types
from meme_dist.modality import Modality
from meme_dist.noise import Noise

UNSCORED = -1  # in a list of choices of types: no choice

ChooseType = Callable[[int, Float[Tensor, "R choices"]], Int[Tensor, " R"]]
"""From the number of a vertex and the logits of its type (0: END instead) to the choice."""
ChooseEdge = Callable[[int, int, Float[Tensor, " R"]], Bool[Tensor, " R"]]
"""From vertex, slot of a possible predecessor and the logit of that edge to the choice."""


def graph(
    size: int,
    *,
    types: Types,
    latent_dim: int,
    hidden: int = 64,
    tied: bool = False,
    backward: bool = True,
    family: type[Diagonal] = DiagNormal,
    weight: float = 1.0,
) -> Modality:
    """Graphs of at most `size` vertices. `types` is shared by encoder, decoder and (`tied`) the scores of types."""
    features = types.width + 1 + size
    return Modality(
        encoder=_Encoder(size, types.width, latent_dim, hidden, backward),
        decoder=_Start(latent_dim, hidden),
        likelihood=GraphLikelihood(size, types=types, hidden=hidden, tied=tied),
        latent_dim=latent_dim,
        feature=(size, features),
        embed=_Embed(types),
        family=family,
        weight=weight,
    )


class Choices(NamedTuple):
    """Every choice on the way to a graph, in nats' logits, and what was chosen: of types 0 is END, `UNSCORED` no choice."""

    type_logits: Float[Tensor, "K P G choices"]
    types: Int[Tensor, "P G"]
    edge_logits: Float[Tensor, "K P pairs"]
    edges: Bool[Tensor, "P pairs"]
    free: Bool[Tensor, "P pairs"]  # whether that edge was a choice at all


class Walk(NamedTuple):
    """Graphs that were made choice by choice, and the log probability of those choices."""

    x: Int[Tensor, "R G columns"]
    log_prob: Float[Tensor, " R"]


class GraphLikelihood(nn.Module):
    """p(graph | h_START): the parameters that the decoder gives are START's state, the networks that go on from there are here.

    `types` may be shared with an encoder's embedding; `tied` scores a type by its product with the same table.
    """

    def __init__(self, size: int, *, types: Types, hidden: int, tied: bool = False):
        super().__init__()
        self.size, self.types, self.tied = size, types, tied
        choices = 1 + len(types())
        self.given = nn.Linear(types.width, 3 * hidden)
        self.cell, self.message, self.always = Cell(hidden), Message(hidden, size), _Always(hidden, size)
        self.score = nn.Sequential(nn.Linear(hidden, 2 * hidden), nn.SiLU(), nn.Linear(2 * hidden, types.width + 1 if tied else choices))
        self.earlier, self.later = nn.Linear(hidden, 4 * hidden), nn.Linear(hidden, 4 * hidden, bias=False)
        self.connect = nn.Sequential(nn.SiLU(), nn.Linear(4 * hidden, 1))
        late, early = zip(*_pairs(size), strict=True)
        self.register_buffer("late", torch.tensor(late), persistent=False)
        self.register_buffer("early", torch.tensor(early), persistent=False)
        forbidden = torch.zeros(size, choices, dtype=torch.bool)
        forbidden[0, 0] = True  # no graph is without a vertex
        self.register_buffer("forbidden", forbidden, persistent=False)

    def log_prob(self, x: Int[Tensor, "X G columns"], params: Float[Tensor, "K P H"], row: Rows = None) -> Float[Tensor, "K P"]:
        """Sum over all choices, in nats; differentiable in the parameters."""
        made = self.choices(x if row is None else x[row], params)
        types = token_log_prob(made.types, made.type_logits, UNSCORED)
        edges = F.logsigmoid(torch.where(made.edges, made.edge_logits, -made.edge_logits))
        return types + torch.where(made.free, edges, 0.0).sum(-1)

    def mean(self, params: Float[Tensor, "*rows H"]) -> Int[Tensor, "*rows G columns"]:
        """The most probable choice at each step, given those before it (graphs have no mean, and this is not always their mode)."""
        made = self.walk(params.reshape(-1, params.shape[-1]), lambda _, logits: logits.argmax(-1), lambda _v, _u, logit: logit > 0)
        return made.x.unflatten(0, params.shape[:-1])

    def sample(self, params: Float[Tensor, "K B H"], noise: Noise, purpose: str) -> Int[Tensor, "K B G columns"]:
        """A graph for each of K parameters of B rows."""
        size, rows = self.size, len(params) * params.shape[1]
        uniform = noise.uniform(purpose, len(params), size + len(torch.as_tensor(self.early))).reshape(rows, -1)
        number = {pair: size + place for place, pair in enumerate(_pairs(size))}

        def choose_type(v: int, logits: Tensor) -> Tensor:
            reached = logits.softmax(-1).cumsum(-1)
            return (uniform[:, v : v + 1] * reached[:, -1:] > reached).sum(-1)

        made = self.walk(params.flatten(0, 1), choose_type, lambda v, u, logit: uniform[:, number[v, u]] <= logit.sigmoid())
        return made.x.unflatten(0, params.shape[:2])

    def choices(self, x: Int[Tensor, "P G columns"], params: Float[Tensor, "K P H"]) -> Choices:
        """All choices that lead to these graphs: every intermediate state of a vertex at once."""
        token, bits = x[..., 0], x[..., 1:]
        states, asking = self._states(token, bits, params)
        late, early = torch.as_tensor(self.late), torch.as_tensor(self.early)
        edge_logits = wide(self.connect(self.earlier(states)[:, :, early] + self.later(asking))[..., 0])
        others = (bits[..., 1:] > 0).any(-1)[:, late]
        free = (token[:, late] > 0) & ((early > 0) | others)
        type_logits = self._type_logits(states).masked_fill(torch.as_tensor(self.forbidden), -torch.inf)
        there = F.pad(token[:, :-1] > 0, (1, 0), value=True)  # a choice follows every vertex but the last possible, and START
        return Choices(type_logits, torch.where(there, token, UNSCORED), edge_logits, bits[:, late, early] > 0, free)

    def walk(self, start: Float[Tensor, "R H"], choose_type: ChooseType, choose_edge: ChooseEdge) -> Walk:
        """The definition: one choice after the other, each followed by the state that it leads to."""
        given, rows = self._given(), len(start)
        states, messages = [start], [self.message(start, 0)]
        token = [torch.zeros(rows, dtype=torch.int64, device=start.device)] * self.size
        bits = [[torch.zeros(rows, dtype=torch.bool, device=start.device)] * self.size for _ in range(self.size)]
        log_prob = torch.zeros(rows, dtype=wide(start).dtype, device=start.device)
        alive = torch.ones_like(bits[0][0])
        for v in range(self.size):
            logits = self._type_logits(states[-1]).masked_fill(torch.as_tensor(self.forbidden)[v], -torch.inf)
            token[v] = torch.where(alive, choose_type(v, logits), 0)
            log_prob = log_prob + torch.where(alive, logits.log_softmax(-1).gather(-1, token[v][:, None])[:, 0], 0.0)
            alive = token[v] > 0
            arrived = self.always(start, v)
            state = self.cell(given[token[v]], arrived)
            for u in range(v, -1, -1):
                logit = wide(self.connect(self.earlier(states[u]) + self.later(state))[:, 0])
                free = alive & torch.stack(bits[v]).any(0) if u == 0 else alive
                bits[v][u] = torch.where(free, choose_edge(v, u, logit), alive)
                log_prob = log_prob + torch.where(free, F.logsigmoid(torch.where(bits[v][u], logit, -logit)), 0.0)
                arrived = arrived + bits[v][u][:, None] * messages[u]
                state = self.cell(given[token[v]], arrived)
            if v + 1 < self.size:
                states.append(state)
                messages.append(self.message(state, v + 1))
        x = torch.cat([torch.stack(token, 1)[..., None], torch.stack([torch.stack(own, 1) for own in bits], 1).long()], -1)
        return Walk(x, log_prob)

    def _states(self, token: Tensor, bits: Tensor, start: Float[Tensor, "K P H"]) -> tuple[Tensor, Tensor]:
        """Final states of all slots but the last [K, P, G, H], and those in which each edge is asked for [K, P, pairs, H]."""
        given = self._given()[token].unsqueeze(2)
        states, asking = [start], []
        messages = self.message(start, 0).unsqueeze(2)  # latest slot first
        for v in range(self.size):
            chosen = bits[:, v, : v + 1].flip(-1).to(start.dtype)[..., None]
            arrived = F.pad((messages * chosen).cumsum(2), (0, 0, 1, 0))  # none, the latest, the latest two ...
            on_the_way = self.cell(given[:, v], self.always(start, v).unsqueeze(2) + arrived)
            asking.append(on_the_way[:, :, :-1])
            if v + 1 < self.size:
                states.append(on_the_way[:, :, -1])
                messages = torch.cat([self.message(states[-1], v + 1).unsqueeze(2), messages], 2)
        return torch.stack(states, 2), torch.cat(asking, 2)

    def _given(self) -> Float[Tensor, "tokens gates"]:
        """What a GRU is told by each token; token 0 is no vertex."""
        return F.pad(self.given(self.types()), (0, 0, 1, 0))

    def _type_logits(self, states: Float[Tensor, "*rows H"]) -> Float[Tensor, "*rows choices"]:
        scores = self.score(states)
        return wide(torch.cat([scores[..., :1], scores[..., 1:] @ self.types().T], -1) if self.tied else scores)


class Cell(nn.Module):
    """A gated recurrent unit whose input comes projected, [r, u, n] of 3 H: u * h + (1 - u) * tanh(n + r * W_n h), as `torch.nn.GRU`."""

    def __init__(self, hidden: int):
        super().__init__()
        self.state = nn.Linear(hidden, 3 * hidden)

    def forward(self, given: Float[Tensor, "*#rows gates"], state: Float[Tensor, "*#rows H"]) -> Float[Tensor, "*rows H"]:
        reset, keep, new = given.chunk(3, -1)
        own_reset, own_keep, own_new = self.state(state).chunk(3, -1)
        new = torch.tanh(new + torch.sigmoid(reset + own_reset) * own_new)
        return new + torch.sigmoid(keep + own_keep) * (state - new)


class Message(nn.Module):
    """What a state says to its successors; each slot has biases of its own."""

    def __init__(self, hidden: int, slots: int):
        super().__init__()
        self.project = nn.Linear(hidden, 2 * hidden, bias=False)
        self.slot = nn.Parameter(hidden**-0.5 * (2 * torch.rand(slots, 2 * hidden) - 1))

    def forward(self, state: Float[Tensor, "*rows H"], slot: int) -> Float[Tensor, "*rows H"]:
        gate, value = (self.project(state) + self.slot[slot]).chunk(2, -1)
        return gate.sigmoid() * value


class _Always(nn.Module):
    """What every vertex of a decoder hears: START, and which one it is itself."""

    def __init__(self, hidden: int, size: int):
        super().__init__()
        self.start = nn.Linear(hidden, hidden, bias=False)
        self.place = nn.Parameter(hidden**-0.5 * (2 * torch.rand(size, hidden) - 1))

    def forward(self, start: Float[Tensor, "*rows H"], v: int) -> Float[Tensor, "*rows H"]:
        return self.start(start) + self.place[v]


class _Embed(nn.Module):
    """x -> for each vertex its type's vector, 1 (0 where there is none), and its predecessors."""

    def __init__(self, types: Types):
        super().__init__()
        self.types = types

    def forward(self, x: Int[Tensor, "R G columns"]) -> Float[Tensor, "R G features"]:
        table = F.pad(self.types(), (1, 0, 1, 0))  # token 0: nothing
        table = torch.cat([table[:, 1:], (torch.arange(len(table), device=table.device) > 0).to(table.dtype)[:, None]], -1)
        return torch.cat([table[x[..., 0]], x[..., 1:].to(table.dtype)], -1)


class _Encoder(nn.Module):
    """Messages forwards to END, and backwards to START; linear in the edges, so that a pseudo-input may hold any numbers."""

    def __init__(self, size: int, width: int, latent_dim: int, hidden: int, backward: bool):
        super().__init__()
        self.width = width
        self.forwards = _Sweep(size, width, hidden)
        self.backwards = _Sweep(size, width, hidden) if backward else None
        self.posterior = nn.Sequential(nn.Linear((1 + backward) * hidden, hidden), nn.SiLU(), nn.Linear(hidden, 2 * latent_dim))

    def forward(self, features: Float[Tensor, "R G features"]) -> Float[Tensor, "R outputs"]:
        types, there, edges = features.split([self.width, 1, features.shape[1]], -1)
        edges = edges.tril()
        loose = there[..., 0] * (1 - F.pad(edges[..., 1:].sum(1), (0, 1))).clamp(min=0)  # 1 where nothing follows
        edges = torch.cat([F.pad(edges, (0, 1)), F.pad(loose, (1, 0))[:, None]], 1)  # a last row, into END; a last column, out of vertex G
        last = [self.forwards(types, edges)]
        if self.backwards is not None:
            last.append(self.backwards(types.flip(1), edges.transpose(1, 2).flip(1, 2)))
        return self.posterior(torch.cat(last, -1))


class _Sweep(nn.Module):
    """States of slots in order, each from the messages of those before it that lead to it; the state of the one after all vertices."""

    def __init__(self, size: int, width: int, hidden: int):
        super().__init__()
        self.given = nn.Linear(width, 3 * hidden)
        self.cell, self.message = Cell(hidden), Message(hidden, size + 1)
        self.first = nn.Parameter(hidden**-0.5 * (2 * torch.rand(hidden) - 1))
        self.last = nn.Parameter(hidden**-0.5 * (2 * torch.rand(3 * hidden) - 1))

    def forward(self, types: Float[Tensor, "R G E"], edges: Float[Tensor, "R slots slots"]) -> Float[Tensor, "R H"]:
        """`edges` [v, u]: from slot u to vertex v, the last v the slot after all vertices."""
        given = torch.cat([self.given(types), self.last.expand(len(types), 1, -1)], 1)
        messages = [self.message(self.first.expand(len(types), -1), 0)]
        state = self.first.expand(len(types), -1)
        for v in range(given.shape[1]):
            arrived = torch.einsum("ru,ruh->rh", edges[:, v, : v + 1], torch.stack(messages, 1))
            state = self.cell(given[:, v], arrived)
            if v + 1 < given.shape[1]:
                messages.append(self.message(state, v + 1))
        return state


class _Start(nn.Module):
    """z -> the state of START: tanh of a linear map, through a GRU that is told that it is START."""

    def __init__(self, latent_dim: int, hidden: int):
        super().__init__()
        self.spread, self.cell = nn.Linear(latent_dim, hidden), Cell(hidden)
        self.start = nn.Parameter(hidden**-0.5 * (2 * torch.rand(3 * hidden) - 1))

    def forward(self, z: Float[Tensor, "rows D"]) -> Float[Tensor, "rows H"]:
        return self.cell(self.start, torch.tanh(self.spread(z)))


def _pairs(size: int) -> list[tuple[int, int]]:
    """Vertex and slot of a possible predecessor, in the order in which edges are asked for."""
    return [(v, u) for v in range(size) for u in range(v, -1, -1)]


def agreement(made: Int[Tensor, "*rows G columns"], x: Int[Tensor, "*#rows G columns"]) -> Float[Tensor, "*rows"]:
    """The share of x's types and possible edges that `made` has too; what stands where x has no vertex is left out."""
    size = x.shape[-2]
    entries = torch.ones(size, 1 + size, dtype=torch.bool, device=x.device).tril(1) & (x[..., :1] > 0)
    return ((made == x) & entries).sum((-2, -1)) / entries.sum((-2, -1)).clamp(min=1)
