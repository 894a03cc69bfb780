"""Laws of the counter-based noise."""

import numpy as np
import pytest
import torch
from scipy import stats

from meme_dist.noise import Noise
from meme_kernels.philox import philox


def test_philox_equals_the_published_test_vectors():
    """Random123's known-answer file, philox4x32-10: counter and key all zeros, all ones, and digits of pi."""
    vectors = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ]
    for counter, key, expected in vectors:
        words = philox([torch.tensor([c]) for c in counter], key)
        assert tuple(int(w) for w in words) == expected


@pytest.mark.parametrize("kind, law", [("uniform", stats.uniform), ("normal", stats.norm), ("laplace", stats.laplace)])
def test_draws_follow_their_law(kind, law):
    draws = getattr(Noise(3, torch.arange(5000)), kind)("z", 4, 7).flatten().numpy()
    assert stats.kstest(draws[:50_000], law.cdf).pvalue > 1e-3
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.01


def test_a_row_has_the_same_noise_in_any_batch_and_for_any_number_of_samples():
    whole = Noise(1, torch.tensor([5, 7, 2**40])).normal("z", 6, 5)
    alone = Noise(1, torch.tensor([2**40])).normal("z", 3, 5)
    assert torch.equal(whole[:3, 2:], alone)


def test_noise_differs_between_seeds_draws_purposes_samples_and_coordinates():
    noise = Noise(1, torch.arange(3))
    base = noise.normal("z", 2, 4)
    others = [Noise(2, torch.arange(3)).normal("z", 2, 4), noise.normal("w", 2, 4), Noise(1 + 2**33, torch.arange(3)).normal("z", 2, 4)]
    assert all(not torch.isclose(base, other).any() for other in others)
    assert len(torch.unique(base)) == base.numel()
