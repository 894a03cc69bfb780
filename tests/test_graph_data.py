"""Laws of the sets of graphs, of graphs in shards, and of what is measured of graphs: from small files, made-up rows and closed forms."""

import gzip
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from meme_dist.data.fields import Field
from meme_dist.data.graph_codec import Graph, check, to_array
from meme_dist.data.sets import asia, dags, enas
from meme_dist.data.sets._graphs import parts
from meme_dist.data.shards import Dataset, Row, check_shards, write_shards
from meme_dist.data.stream import Evaluation
from meme_dist.evaluate import evaluate
from meme_dist.metrics import gaussian_process, graphs
from meme_dist.modalities.graph import graph
from meme_dist.modalities.graph_types import Embedding
from meme_dist.modalities.vector import mlp
from meme_dist.objectives.meme import MEME
from meme_dist.recipes.graphs import types_of
from meme_dist.types import pack_dense
from tests.data import small

REAL = small.REAL / "dvae"
needs_real_data = pytest.mark.skipif(not (REAL / enas.FILE).is_file(), reason="no real data in ../shared/data")


def architectures(folder: Path, rows: int = 80) -> Path:
    """A thousand lines that are to be dropped, then `rows` others with accuracies .001, .002, ..."""
    rng, lines = np.random.default_rng(0), []
    for row in range(enas.DROPPED + rows):
        layers = [[int(rng.integers(6)), *rng.integers(0, 2, size=layer).tolist()] for layer in range(enas.SIZE)]
        lines.append(f"{json.dumps(layers)}, {max(0, row - enas.DROPPED + 1) / 1000}")
    (folder / enas.FILE).write_bytes(gzip.compress("\n".join(lines).encode()))
    return folder


def networks(folder: Path, rows: int = 40) -> Path:
    """Graphs over the eight variables in orders of their own, with row numbers for BIC."""
    rng = np.random.default_rng(0)
    matrices = np.triu(rng.integers(0, 2, size=(rows, asia.SIZE, asia.SIZE)), 1).astype(np.uint8)
    for matrix in matrices:
        order = rng.permutation(asia.SIZE)
        matrix[:] = matrix[np.ix_(order, order)]
    np.savez(folder / asia.FILE, adjacency=matrices, bic=np.arange(rows, dtype=np.float64))
    return folder


SETS = {
    "enas": lambda folder: partial(enas.enas, source=architectures(folder)),
    "asia": lambda folder: partial(asia.asia, source=networks(folder)),
    "dags": lambda folder: partial(dags.dags, types=16, groups=4, size=5, rows=60),
}


@pytest.fixture(autouse=True)
def _nothing_remembered():
    enas._read.cache_clear(), asia._read.cache_clear()


# ---- sets ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETS)
def test_every_row_is_a_graph_and_its_value_and_nothing_is_in_both_splits(tmp_path, name):
    dataset = SETS[name](tmp_path)()
    train, test = small.rows(dataset, "train"), small.rows(dataset, "test")
    assert len(test) == (len(train) + len(test)) // 10
    for row in train + test:
        assert row.label is None and tuple(row.data) == ("graph", "value")
        for key, value in row.data.items():
            field = dataset.fields[key]
            assert torch.equal(field.decode(field.encode(value)), value)
    value = np.array([small.array(row, "value")[0] for row in train])
    assert abs(value.mean()) < 1e-5 and abs(value.std() - 1) < 1e-5
    if name != "dags":  # values there name the row
        assert not {small.array(row, "value")[0] for row in test} & set(value.tolist())


@pytest.mark.parametrize("name", SETS)
def test_training_rows_follow_the_seed_and_the_asked_share_is_missing(tmp_path, name):
    make = SETS[name](tmp_path)
    assert small.same(make(seed=1), make(seed=1), "train") and not small.same(make(seed=1), make(seed=2), "train")
    assert small.same(make(seed=1), make(seed=2, missing=0.3), "test")
    whole, partial = small.rows(make(missing=0)), small.rows(make(missing=0.3))
    assert abs(sum(len(row.data) for row in partial) - 0.7 * 2 * len(whole)) <= 0.5 and min(len(row.data) for row in partial) == 1
    for row, part in zip(map(small.contents, whole), map(small.contents, partial), strict=True):
        assert part.items() <= row.items()
    with pytest.raises(ValueError, match="missing: expected a share from 0 to 0.500"):
        make(missing=0.6)
    with pytest.raises(ValueError, match="split: expected 'train' or 'test', got 'validation'"):
        list(make().rows("validation"))


def test_a_layer_of_an_architecture_follows_the_one_before_and_its_skips(tmp_path):
    layers = [[5], [0, 1], [2, 0, 1], [3, 0, 0, 0], [1, 1, 0, 0, 1], [4, 0, 0, 0, 0, 0]]
    architectures(tmp_path, 9)
    lines = gzip.decompress((tmp_path / enas.FILE).read_bytes()).decode()
    (tmp_path / enas.FILE).write_bytes(gzip.compress(f"{lines}\n{json.dumps(layers)}, 0.5".encode()))
    found = enas.read(tmp_path)
    assert len(found.x) == 10 and found.value[-1] == 0.5 and found.value[0] == 0.001
    assert found.x[-1].tolist() == [
        [6, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [3, 0, 1, 1, 0, 0, 0],
        [4, 0, 0, 0, 1, 0, 0],
        [2, 1, 0, 0, 1, 1, 0],
        [5, 0, 0, 0, 0, 0, 1],
    ]


@pytest.mark.parametrize("spoil", [small.cut, small.empty, lambda path: path.write_bytes(gzip.compress(b"[[0], [1, 2]], 0.5\n" * 1001))])
def test_a_spoilt_file_of_architectures_is_named(tmp_path, spoil):
    spoil(architectures(tmp_path) / enas.FILE)
    with pytest.raises(ValueError, match=f"{enas.FILE}: expected gzipped text of graphs of 6 layers .*get the file again"):
        list(enas.enas(source=tmp_path).rows("train"))
    (tmp_path / enas.FILE).unlink()
    with pytest.raises(ValueError, match=f"missing {enas.FILE}; name the folder that has them: --source FOLDER"):
        list(enas.enas(source=tmp_path).rows("train"))


def test_a_cycle_in_a_file_of_networks_is_named(tmp_path):
    with np.load(networks(tmp_path) / asia.FILE) as file:
        arrays = dict(file)
    arrays["adjacency"][3] = 0
    arrays["adjacency"][3, 0, 1] = arrays["adjacency"][3, 1, 0] = 1
    np.savez(tmp_path / asia.FILE, **arrays)
    with pytest.raises(ValueError, match=r"asia_bn.*graph: expected no cycle, got one among the vertices \[0, 1\]; get the file again"):
        list(asia.asia(source=tmp_path).rows("train"))


def test_a_network_comes_back_from_its_array_and_its_bic_is_that_of_its_own_terms(tmp_path):
    found = asia.read(networks(tmp_path))
    with np.load(tmp_path / asia.FILE) as file:
        matrices = file["adjacency"].astype(np.int64)
    assert np.array_equal(asia.adjacency(found.x), matrices) and asia.complete(found.x).all()
    twice = found.x[:1].copy()
    twice[0, 1, 0] = twice[0, 0, 0]
    assert not asia.complete(twice).any()
    with pytest.raises(ValueError, match="expected every variable once in each graph, got others in 1 of 1"):
        asia.adjacency(twice)
    sample = np.random.default_rng(1).integers(0, 2, size=(50, asia.SIZE))
    empty, edge = np.zeros((2, asia.SIZE, asia.SIZE), dtype=np.int64)
    edge[0, 1] = 1
    share = sample.mean(0)
    alone = 50 * (share * np.log(share) + (1 - share) * np.log(1 - share)).sum() - 8 * np.log(50) / 2
    pairs = np.histogram2d(sample[:, 0], sample[:, 1], bins=2)[0] / 50
    information = (pairs * np.log(pairs / np.outer(pairs.sum(1), pairs.sum(0)))).sum()
    assert asia.bic(np.stack([empty, edge]), sample).tolist() == pytest.approx([alone, alone + 50 * information - np.log(50) / 2])


@needs_real_data
def test_real_architectures_and_networks_are_what_they_are_said_to_be():
    found = enas.read(REAL)
    assert len(found.x) == 19_020 and len(np.unique(found.x, axis=0)) == 19_015
    assert found.value.mean() == pytest.approx(0.7363, abs=1e-4) and found.value.std() == pytest.approx(0.0061, abs=1e-4)
    assert (found.x[:, range(6), range(1, 7)] == 1).all()  # each layer follows the one before
    with np.load(REAL / asia.FILE) as file:
        matrices, bic = file["adjacency"][:60], file["bic"][:60]
    assert np.abs(asia.bic(matrices, asia.sample(REAL)) - bic).max() < 1e-8
    x = np.stack([to_array(Graph(asia.VARIABLES, tuple(map(tuple, np.argwhere(m).tolist()))), asia.VARIABLES, asia.SIZE) for m in matrices])
    assert np.array_equal(asia.adjacency(x), matrices)


def test_made_up_graphs_have_types_of_their_groups_as_often_as_zipf_says():
    found = dags.drawn(32, 4, 6, 3000, 0)
    check(found.x, 32)
    there = found.x[..., 0][found.x[..., 0] > 0]
    assert set((found.x[..., 0] > 0).sum(1)) == {3, 4, 5, 6}
    rank = np.bincount((there - 1) // 4, minlength=8) / len(there)
    assert np.abs(rank - (1 / np.arange(1, 9)) / (1 / np.arange(1, 9)).sum()).max() < 0.02
    step = ((found.x[:, :, None, 0] - found.x[:, None, :-1, 0]) % 4)[found.x[..., 2:] > 0]
    assert np.isin(step, (1, 2)).mean() > 0.75
    other = found.x.copy()
    other[..., 0] = np.where(other[..., 0] > 4, other[..., 0] - 4, other[..., 0])  # another type of the same group
    assert np.array_equal(dags.value(other, 4), found.value)
    with pytest.raises(ValueError, match="types: expected a multiple of groups, 8, got 12"):
        dags.dags(types=12)


def test_the_split_does_not_depend_on_the_seed():
    both = parts("dags", 45)
    assert sorted(np.concatenate(list(both.values()))) == list(range(45)) and len(both["test"]) == 4


# ---- shards -------------------------------------------------------------------------------------------------------------------------


def test_graphs_go_through_shards_and_what_is_none_is_refused(tmp_path):
    dataset = SETS["dags"](tmp_path)(missing=0.3)
    write_shards(dataset, tmp_path / "shards", rows_per_shard=16)
    assert not check_shards(tmp_path / "shards").problems
    batch = next(iter(Evaluation(tmp_path / "shards", "test", batch_size=6)))
    wanted = [row.data["graph"] for row in dataset.rows("test")]
    assert torch.equal(batch.dense("graph"), torch.stack(wanted)) and batch.dense("graph").dtype == torch.int64
    field, x = dataset.fields["graph"], wanted[0].clone()
    x[0, 2] = 1
    with pytest.raises(ValueError, match="expected edges from earlier vertices alone"):
        field.encode(x)
    with pytest.raises(ValueError, match="expected edges from earlier vertices alone"):
        field.decode(field._layout[0] + x.numpy().astype("<i4").tobytes())
    broken = Dataset("broken", dataset.fields, lambda split: iter([Row({"graph": x})]))
    with pytest.raises(ValueError, match="graph: .*expected edges from earlier vertices alone"):
        write_shards(broken, tmp_path / "broken")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": (3, 3)}, r"shape of a graph: expected \(G, 1 \+ G\), got \(3, 3\)"),
        ({"vocabulary": ()}, "vocabulary of a graph: expected its vertex types, without START and END"),
        ({"vocabulary": ("a", "START")}, "vocabulary of a graph: expected its vertex types, without START and END"),
        ({"likelihood": "bernoulli"}, "likelihood of graph: expected one of categorical, got 'bernoulli'"),
    ],
)
def test_a_field_that_no_graph_fits_is_refused(change, message):
    settings = {"kind": "graph", "shape": (3, 4), "codec": "npy", "likelihood": "categorical", "vocabulary": ("a", "b")}
    assert Field.from_json(Field(**settings).to_json()) == Field(**settings)
    with pytest.raises(ValueError, match=message):
        Field(**settings | change)


# ---- metrics ------------------------------------------------------------------------------------------------------------------------


def model_of(x: np.ndarray, types: int) -> MEME:
    parts = {
        "graph": graph(x.shape[1], types=Embedding(types, 8), latent_dim=8, hidden=24),
        "value": mlp((1,), latent_dim=8, hidden=(8,)),
    }
    objective = MEME(parts, pseudo_inputs=4)
    objective.initialise(batch_of(x))
    return objective


def batch_of(x: np.ndarray, value: np.ndarray | None = None):
    number = torch.zeros(len(x), 1) if value is None else torch.from_numpy(value).float()[:, None]
    present = torch.ones(len(x), dtype=torch.bool)
    return pack_dense({"graph": torch.from_numpy(x), "value": number}, {"graph": present, "value": present})


def test_a_model_that_has_learnt_its_graphs_gives_them_back_and_the_metrics_say_so():
    x = dags.drawn(4, 2, 3, 10, 1).x
    model, batch = model_of(x, 4), batch_of(x)
    before = evaluate(model, [batch], [graphs.reconstruction()])
    modality, data = model.modality("graph"), torch.from_numpy(x)
    modality.to_scale = lambda raw: 0 * raw + 1e-3  # as good as none
    optimizer = torch.optim.Adam(modality.parameters(), 1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        (-modality.log_prob(data, modality.encode(data).mean[None])).sum().backward()
        optimizer.step()
    group = torch.tensor([0, 0, 1, 1])
    after = evaluate(model, [batch, batch], [graphs.reconstruction(), graphs.type_accuracy(group)])
    means = {name: (s.total / s.count) for name, s in after.items()}
    assert before["graph/exact"].total < 6 and means["graph/exact"] == 1 and means["graph/agreement"] == 1
    assert means["graph/log_prob"] > -0.5 and means["graph/exact_sampled"] > 0.8
    assert after["graph/types"].count.sum() == 2 * (x[..., 0] > 0).sum() and means["graph/types"].tolist() == [1, 1]
    made = graphs.prior_graphs(model, 7, draws=3)
    check(made, 4)
    assert made.shape == (21, 3, 4) and np.array_equal(graphs.prior_graphs(model, 4, draws=3)[:4], made[:4])
    assert graphs.novelty(x, x).novel == 0 and graphs.novelty(made, x).valid == 1


def test_shares_of_new_graphs_are_counted_by_hand():
    x = np.array([[[1, 1, 0], [2, 1, 0]], [[1, 1, 0], [2, 0, 1]], [[1, 1, 0], [2, 0, 1]], [[2, 1, 0], [0, 0, 0]]])
    found = graphs.novelty(x, x[:1], lambda some: (some[:, :, 0] > 0).all(1))
    assert found == (3 / 4, 2 / 3, 2 / 3, 4)


def test_frequency_groups_rank_types_by_how_often_they_come():
    x = np.array([[[3, 1, 0], [2, 1, 0]], [[3, 1, 0], [4, 1, 0]], [[2, 1, 0], [3, 0, 1]]])
    assert graphs.frequency_groups(x, 4, 4).tolist() == [3, 1, 0, 2]
    assert graphs.frequency_groups(x, 4, 2).tolist() == [1, 0, 0, 1]
    with pytest.raises(ValueError, match="expected 10 types or more, got 4"):
        graphs.frequency_groups(x, 4)


def test_the_process_with_all_rows_inducing_is_the_exact_one():
    rng = np.random.default_rng(0)
    z, new = rng.standard_normal((60, 2)), rng.standard_normal((5, 2))
    y = 3 + 2 * np.sin(z[:, 0]) + 0.1 * rng.standard_normal(60)
    process = gaussian_process.fit(z, y, inducing=60)

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        distance = np.square((a[:, None] - b[None]) / process.spread).sum(-1)
        return process.variance * np.exp(-distance / (2 * process.length**2))

    inverse = np.linalg.inv(kernel(z, z) + process.noise * np.eye(60))
    mean = y.mean() + kernel(new, z) @ inverse @ (y - y.mean())
    variance = process.variance - np.einsum("ij,jk,ik->i", kernel(new, z), inverse, kernel(new, z))
    found = gaussian_process.predict(process, new)
    assert np.abs(found[0] - mean).max() < 1e-2 and np.abs(found[1] - y.std() * np.sqrt(variance)).max() < 1e-2
    assert np.abs(found[0] - (3 + 2 * np.sin(new[:, 0]))).max() < 0.5
    few, _ = gaussian_process.predict(gaussian_process.fit(z, y, inducing=25), new)
    assert np.abs(few - mean).max() < 0.3
    with pytest.raises(ValueError, match="two rows or more of finite, differing values; got 60 rows"):
        gaussian_process.fit(z, np.ones(60))


@pytest.mark.parametrize("noise", [0, 1e-6, 1e-4])
def test_rows_that_come_again_do_not_make_the_process_one_of_white_noise(noise):
    """Equal rows with equal values are best explained by a length of nothing, which tells nothing of other rows (r = .03)."""
    rng = np.random.default_rng(0)
    z = rng.standard_normal((1300, 4))
    y = np.sin(z).sum(1) + 1.2 * rng.standard_normal(1300)
    seen = rng.integers(300, size=3000)  # each row ten times
    process = gaussian_process.fit(z[seen] + noise * rng.standard_normal((3000, 4)), y[seen], inducing=300)
    mean, _ = gaussian_process.predict(process, z[300:])
    assert len(process.inducing) == 300
    assert process.length > 0.5 and gaussian_process.predictivity(mean, y[300:], unit=y.std()).correlation > 0.6


def test_errors_are_in_standard_deviations_and_expected_improvement_is_its_integral():
    y = np.array([0.0, 1.0, 2.0, 3.0])
    assert gaussian_process.predictivity(y + 0.5, y, unit=2.0) == pytest.approx((0.25, 1.0))
    assert gaussian_process.predictivity(np.ones(4), y, unit=1.0).correlation == 0
    draws = 0.5 + 2 * np.random.default_rng(0).standard_normal(400_000)
    expected = np.maximum(draws - 1, 0).mean()
    assert gaussian_process.expected_improvement(np.array([0.5]), np.array([2.0]), 1.0)[0] == pytest.approx(expected, rel=0.01)


def test_trees_on_the_array_tell_a_value_that_is_a_function_of_it():
    found = dags.drawn(4, 4, 4, 1200, 0)
    z = np.zeros((1200, 2))
    train, test = graphs.Table(z[:1000], found.x[:1000], found.value[:1000]), graphs.Table(z[:200], found.x[1000:], found.value[1000:])
    told = graphs.raw_predictivity(train, test, iterations=100)
    assert told.rmse < 0.5 and told.correlation > 0.85
    good = train._replace(z=np.stack([found.value, np.sin(found.value)], 1)[:1000])
    seen = graphs.latent_predictivity(good, test._replace(z=np.stack([found.value, np.sin(found.value)], 1)[1000:]), inducing=50)
    assert seen.rmse < 0.05 and seen.correlation > 0.99


def test_a_search_tries_new_valid_graphs_alone_and_never_loses_its_best():
    found = dags.drawn(4, 4, 4, 80, 0)
    model = model_of(found.x, 4)
    table = graphs.table(model, [batch_of(found.x, found.value)], rows=70)
    assert len(table.z) == 70 and np.array_equal(table.x, found.x[:70])

    def even(x: np.ndarray) -> np.ndarray:
        return x[:, 0, 0] % 2 == 0

    def oracle(x: np.ndarray) -> np.ndarray:
        return dags.value(x, 4)

    guided = graphs.optimise(model, table, oracle, rounds=2, batch=3, candidates=60, valid=even, spread=2.0)
    for search in (guided, graphs.at_random(guided, table, oracle, batch=3, valid=even)):
        assert list(search.best) == sorted(search.best) and search.best[0] == table.value.max() and len(search.best) == 3
        assert even(search.x).all() and len({x.tobytes() for x in search.x}) == len(search.x) == len(search.value)
        assert not {x.tobytes() for x in search.x} & {x.tobytes() for x in table.x}


def test_types_without_properties_cannot_be_factored():
    assert types_of("factored", 6, width=4, properties=enas.PROPERTIES)().shape == (6, 4)
    with pytest.raises(ValueError, match="vertices 'factored': these types have no properties"):
        types_of("factored", 6, width=4)
