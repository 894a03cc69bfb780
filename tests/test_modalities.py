"""Laws of the networks: published sizes, rows that do not see each other, floors that hold."""

import pytest
import torch
from torch import nn

from meme_dist.distributions import DiagLaplace
from meme_dist.likelihoods import Bernoulli, NegativeBinomial, Poisson
from meme_dist.modalities import published
from meme_dist.modalities.image import conv
from meme_dist.modalities.text import conv_text
from meme_dist.modalities.vector import mlp
from meme_dist.modality import SCALE_FLOOR, Encoding, Modality, balanced_weights
from meme_dist.noise import Noise
from meme_dist.recipes.base import Model


def counts(*shape):
    return lambda b: torch.poisson(torch.full((b, *shape), 4.0))


KINDS = {
    "vector": (lambda: mlp((7,), latent_dim=3, hidden=(16, 12)), lambda b: torch.rand(b, 7)),
    "counts": (lambda: mlp((7,), latent_dim=3, hidden=(16,), likelihood=NegativeBinomial((7,)), log_input=True), counts(7)),
    "poisson": (lambda: mlp((2, 5), latent_dim=3, hidden=(16,), likelihood=Poisson(), log_input=True), counts(2, 5)),
    "image": (lambda: conv((3, 13, 10), latent_dim=3, channels=(8, 16), hidden=16), lambda b: torch.rand(b, 3, 13, 10)),
    "binary": (
        lambda: conv((1, 8, 4), latent_dim=3, channels=(8,), hidden=16, likelihood=Bernoulli(), bounded=False),
        lambda b: (torch.rand(b, 1, 8, 4) < 0.5).float(),
    ),
    "text": (lambda: conv_text(6, vocabulary=11, latent_dim=3, embedding=8, hidden=16), lambda b: torch.randint(1, 11, (b, 6))),
    "mnist_released": (lambda: published.mnist_released(3), lambda b: torch.rand(b, 1, 28, 28)),
    "svhn_paper": (lambda: published.svhn_paper(3), lambda b: torch.rand(b, 3, 32, 32)),
}


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_released_networks_have_the_released_sizes():
    """Counted from the authors' code: the two heads that their SVHN encoder never uses (512 x 64 weights each, and biases) apart."""
    mnist, svhn = published.mnist_released(64), published.svhn_released(64)
    assert parameters(mnist.encoder) == 730_240
    assert parameters(mnist.decoder) == 698_128
    assert parameters(svhn.decoder) == 296_675
    trunk = sum(a * b * 16 + b + 2 * b for a, b in [(3, 32), (32, 64), (64, 128), (128, 512)])
    assert parameters(svhn.encoder) == trunk + 2 * (512 * 64 + 64)


def test_paper_networks_have_the_sizes_of_appendix_k():
    mnist, svhn = published.mnist_paper(20), published.svhn_paper(20)
    assert parameters(mnist.encoder) == 784 * 400 + 400 + 2 * (400 * 20 + 20)
    assert parameters(svhn.encoder) == sum(a * b * 16 + b for a, b in [(3, 32), (32, 64), (64, 128), (128, 2 * 20)])
    image = published.cub_image_paper(64)
    assert parameters(image.encoder) == sum(a * b + b for a, b in [(2048, 1024), (1024, 512), (512, 256), (256, 128)])


def test_cub_sentences_come_back_as_scores_for_32_words():
    text = published.cub_text_paper(8, vocabulary=30, embedding=64).eval()
    tokens = torch.randint(1, 30, (2, 32))
    assert text.log_prob(tokens, torch.randn(3, 2, 8)).shape == (3, 2)
    assert text.encode(tokens).mean.shape == (2, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_see_each_other_and_scales_stay_above_the_floor(kind):
    build, draw = KINDS[kind]
    modality, x, z = build(), draw(5), torch.randn(2, 5, 3)
    q = modality.encode(x)
    alone = [modality.encode(x[b : b + 1]) for b in range(5)]
    torch.testing.assert_close(q.mean, torch.cat([a.mean for a in alone]), rtol=1e-4, atol=1e-5)
    value = modality.log_prob(x, z)
    separate = torch.cat([modality.log_prob(x[b : b + 1], z[:, b : b + 1]) for b in range(5)], 1)
    torch.testing.assert_close(value, separate, rtol=1e-4, atol=1e-4)
    assert (q.scale > SCALE_FLOOR).all()
    assert modality.reconstruct(z).shape == (2, *x.shape)


@pytest.mark.parametrize("kind", KINDS)
def test_densities_are_float32_and_close_under_autocast(kind):
    build, draw = KINDS[kind]
    modality, x, z = build(), draw(4), torch.randn(2, 4, 3)
    exact = modality.log_prob(x, z)
    with torch.autocast("cpu", torch.bfloat16):
        value, q = modality.log_prob(x, z), modality.encode(x)
    assert value.dtype == q.mean.dtype == q.scale.dtype == torch.float32
    torch.testing.assert_close(value, exact, rtol=0.02, atol=0.5)


def test_weight_multiplies_the_log_likelihood():
    torch.manual_seed(0)
    plain = mlp((4,), latent_dim=2, hidden=(8,), family=DiagLaplace)
    torch.manual_seed(0)
    heavy = mlp((4,), latent_dim=2, hidden=(8,), family=DiagLaplace, weight=3.0)
    x, z = torch.randn(5, 4), torch.randn(2, 5, 2)
    torch.testing.assert_close(heavy.log_prob(x, z), 3 * plain.log_prob(x, z))


def test_balanced_weights_are_the_largest_event_over_each():
    assert balanced_weights({"mnist": 784, "svhn": 3072}) == {"mnist": 3072 / 784, "svhn": 1.0}


def test_images_of_any_size_come_back_at_that_size():
    for height, width in [(28, 28), (32, 20), (5, 7), (4, 8), (1, 3)]:
        modality: Modality = conv((1, height, width), latent_dim=2, channels=(8, 16, 16), hidden=8)
        assert modality.reconstruct(torch.randn(2, 2)).shape == (2, 1, height, width)


def test_channels_that_group_norm_cannot_divide_are_refused():
    with pytest.raises(ValueError, match=r"channels: expected multiples of 8 \(group norm\), got \[12\]"):
        conv((1, 8, 8), latent_dim=2, channels=(12,))


def test_hidden_features_are_a_share_drawn_anew_and_leave_the_mean():
    modality = mlp((30, 20), latent_dim=2, hidden=(4,))
    modality.dropout, noise = 0.3, Noise(0, torch.arange(400))
    kept = modality.kept(noise, "a")
    assert kept.shape == (400, 30, 20) and set(kept.unique().tolist()) == {0.0, torch.tensor(1 / 0.7).item()}
    deviation = (0.3 * 0.7) ** 0.5 / 0.7  # of one entry
    assert abs(kept.mean() - 1) < 4 * deviation / kept.numel() ** 0.5
    assert (kept.mean((1, 2)) - 1).abs().max() < 5 * deviation / 600**0.5 and (kept.mean(0) - 1).abs().max() < 5 * deviation / 20
    assert not torch.equal(kept, modality.kept(noise, "b")) and not torch.equal(kept[0], kept[1])
    assert torch.equal(kept[7:9], modality.kept(Noise(0, torch.tensor([7, 8])), "a"))
    assert modality.eval().kept(noise, "a") is None


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_of_hidden_features_that_is_none_is_refused(share):
    for make in (lambda: Model(dropout=share), lambda: Encoding(encoder=nn.Identity(), latent_dim=1, feature=(2,), dropout=share)):
        with pytest.raises(ValueError, match=r"dropout: expected a share from 0 to below 1"):
            make()
