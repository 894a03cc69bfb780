"""The whole objective on kernels is the objective on references: loss, terms and the gradient of every parameter, for every setting."""

import pytest
import torch
from torch.utils._pytree import tree_map

from meme_dist.distributions import DiagLaplace, DiagNormal
from meme_dist.likelihoods import Bernoulli, Normal
from meme_dist.modalities.vector import mlp
from meme_dist.objectives.meme import MEME
from meme_dist.types import Batch, pack
from meme_kernels._op import backend

SETTINGS = [
    {"estimator": "resampled"},
    {"estimator": "released", "log_ratio": "sampled", "family": DiagLaplace},
    {"estimator": "rao_blackwell", "combination": "product"},
    {"estimator": "rao_blackwell", "combination": "product_with_standard", "log_ratio": "sampled", "stop_gradient": False},
    {"estimator": "released", "stop_gradient": False, "cross_weight": 1.0},
]


def objective(device: torch.device, *, family: type = DiagNormal, **settings) -> MEME:
    torch.manual_seed(0)
    likelihoods = {"a": Normal(1.0, learned=True), "b": Bernoulli(), "c": Normal(0.3)}
    sizes = {"a": 5, "b": 3, "c": 4}
    parts = {n: mlp((sizes[n],), latent_dim=3, hidden=(6,), likelihood=x, family=family) for n, x in likelihoods.items()}
    return MEME(parts, pseudo_inputs=4, samples=3, **settings).to(device)


def batch(device: torch.device) -> Batch:
    """Seven rows, one for each non-empty pattern of three modalities."""
    observed = torch.tensor([[bool(row >> i & 1) for i in range(3)] for row in range(1, 8)])
    generator = torch.Generator().manual_seed(0)
    sizes = {"a": 5, "b": 3, "c": 4}
    data = {n: torch.rand(int(observed[:, i].sum()), size, generator=generator) for i, (n, size) in enumerate(sizes.items())}
    made = pack(data, observed.numpy(), draw=torch.arange(7).numpy() + (5 << 32), seed=(3 << 32) + 1, single=True)
    return tree_map(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, made)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: " ".join(str(getattr(x, "__name__", x)) for x in s.values()))
def test_kernels_and_references_give_one_loss_and_one_gradient(settings, device):
    rows, found = batch(device), []
    for lane in (None, "reference"):
        model = objective(device, **settings)
        model.initialise(rows)
        if lane is None:
            loss = model(rows)
            loss.total.backward()
        else:
            with backend(lane):
                loss = model(rows)
                loss.total.backward()
        terms = {name: torch.stack(list(term)) for name, term in loss.terms.items()}
        found.append({"total": loss.total.detach(), **terms, **{n: p.grad for n, p in model.named_parameters()}})
    for name, expected in found[1].items():
        scale = float(expected.abs().max()) + 1.0
        torch.testing.assert_close(found[0][name], expected, rtol=2e-5, atol=2e-5 * scale, msg=lambda text, name=name: f"{name}: {text}")
