"""MS-SSIM against a transcription that visits every window, and what it is known to be."""

import numpy as np
import pytest
import torch

from meme_dist.metrics.ms_ssim import WEIGHTS, ms_ssim, scales


def transcribed(a: np.ndarray, b: np.ndarray, number: int, size: int) -> float:
    """One channel, in float64: explicit windows, weighted moments, explicit pooling."""
    place = np.arange(size) - size // 2
    window = np.exp(-(place[:, None] ** 2 + place[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    value, weights = 1.0, np.array(WEIGHTS[:number]) / sum(WEIGHTS[:number])
    for scale in range(number):
        structures, wholes = [], []
        for i in range(a.shape[0] - size + 1):
            for j in range(a.shape[1] - size + 1):
                x, y = a[i : i + size, j : j + size], b[i : i + size, j : j + size]
                mx, my = (window * x).sum(), (window * y).sum()
                vx, vy, cov = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum(), (window * (x - mx) * (y - my)).sum()
                structures.append((2 * cov + 9e-4) / (vx + vy + 9e-4))
                wholes.append(structures[-1] * (2 * mx * my + 1e-4) / (mx**2 + my**2 + 1e-4))
        value *= max(0.0, float(np.mean(wholes if scale == number - 1 else structures))) ** weights[scale]
        height, width = (side // 2 * 2 for side in a.shape)
        a, b = (x[:height, :width].reshape(height // 2, 2, width // 2, 2).mean((1, 3)) for x in (a, b))
    return value


@pytest.mark.parametrize(
    ("shape", "number", "size"), [((28, 28), 2, 11), ((45, 52), 3, 11), ((12, 15), 1, 11), ((4, 8), 1, 3), ((8, 8), 1, 7)]
)
def test_it_equals_a_transcription(shape: tuple[int, int], number: int, size: int) -> None:
    a = torch.rand(2, 3, *shape).double()
    b = (a + 0.2 * torch.randn(2, 3, *shape).double()).clamp(0, 1)
    assert scales(min(shape)) == number
    expected = [
        np.mean([transcribed(x.numpy(), y.numpy(), number, size) for x, y in zip(*pair, strict=True)]) for pair in zip(a, b, strict=True)
    ]
    torch.testing.assert_close(ms_ssim(a, b), torch.tensor(expected), rtol=1e-9, atol=1e-12)


def test_what_it_is_known_to_be() -> None:
    a, b = torch.rand(3, 1, 28, 28), torch.rand(3, 1, 28, 28)
    assert ms_ssim(a, a).tolist() == pytest.approx([1.0] * 3)
    torch.testing.assert_close(ms_ssim(a, b), ms_ssim(b, a))
    torch.testing.assert_close(ms_ssim(255 * a, 255 * b, value_range=255.0), ms_ssim(a, b), rtol=1e-3, atol=1e-4)
    assert (ms_ssim(a, 1 - a) == 0).all()  # inverted structure
    flat = torch.full((1, 1, 20, 20), 0.2).double()  # luminance alone, one scale
    assert ms_ssim(flat, 3 * flat).item() == pytest.approx((2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4))
    nearer, further = (ms_ssim(a, (a + noise * torch.randn_like(a)).clamp(0, 1)) for noise in (0.05, 0.2))
    assert (nearer > further).all()
    assert [scales(side) for side in (4, 21, 22, 28, 43, 44, 175, 176, 1000)] == [1, 1, 2, 2, 2, 3, 4, 5, 5]
    with pytest.raises(ValueError, match="of one shape"):
        ms_ssim(a, b[..., 1:])
