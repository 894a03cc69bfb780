"""MS-SSIM: how alike two images look, from 1 (equal) down to 0 (Wang, Simoncelli and Bovik 2003).

With local means, variances and covariance under a Gaussian window (11 pixels, sigma 1.5; positions where it fits whole), at scale j:

    c_j = mean over positions of  (2 cov + C2) / (var_a + var_b + C2)                              contrast and structure
    s   = mean over positions of that times  (2 mean_a mean_b + C1) / (mean_a^2 + mean_b^2 + C1)   and luminance, at the coarsest scale
    MS-SSIM = s^w_M prod_{j < M} c_j^w_j,          C1 = (0.01 range)^2, C2 = (0.03 range)^2

of each channel, then the mean over channels. Between scales 2 x 2 pixels are averaged (an odd last row or column is left out). Negative
factors, which only inverted structure gives, count as 0.

The five published scales need images of 176 pixels. Smaller ones get as many scales as leave a side of at least the window, with the
weights of these scales made to sum to 1: two for 28 pixels, one (plain SSIM) for less than 22. Below 11 pixels the window shrinks to the
largest odd number that fits. Values of different numbers of scales are not comparable: `scales` says how many an image gets.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # from fine to coarse, as published
WINDOW, SIGMA = 11, 1.5
STABILITY = (0.01, 0.03)  # K1 and K2


def ms_ssim(a: Float[Tensor, "R C H W"], b: Float[Tensor, "R C H W"], *, value_range: float = 1.0) -> Float[Tensor, " R"]:
    """MS-SSIM of each pair of images, whose values span `value_range`; symmetric, and 1 for equal ones.

    Raises ValueError for images of different shapes.
    """
    if a.shape != b.shape:
        raise ValueError(f"ms_ssim: expected images of one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    number = scales(min(a.shape[-2:]))
    weights = torch.tensor(WEIGHTS[:number], dtype=a.dtype, device=a.device)
    factors = []
    for _ in range(number - 1):
        factors.append(_similarity(a, b, value_range)[0])
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    factors.append(_similarity(a, b, value_range)[1])
    powers = (weights / weights.sum()).view(-1, 1, 1)
    return (torch.stack(factors).clamp(min=0) ** powers).prod(0).mean(-1)


def scales(side: int) -> int:
    """How many scales an image has whose smaller side is so many pixels."""
    number = 1
    while number < len(WEIGHTS) and side // 2**number >= WINDOW:
        number += 1
    return number


def _similarity(a: Tensor, b: Tensor, value_range: float) -> tuple[Float[Tensor, "R C"], Float[Tensor, "R C"]]:
    """Contrast and structure, without and with luminance, as means over positions."""
    first, second = ((k * value_range) ** 2 for k in STABILITY)
    x, y, xx, yy, xy = _windowed(torch.stack([a, b, a * a, b * b, a * b]))
    structure = (2 * (xy - x * y) + second) / (xx - x * x + yy - y * y + second)
    luminance = (2 * x * y + first) / (x * x + y * y + first)
    return structure.mean((-2, -1)), (luminance * structure).mean((-2, -1))


def _windowed(x: Float[Tensor, "5 R C H W"]) -> Float[Tensor, "5 R C h w"]:
    """Means under the window, which is a product of one for rows and one for columns."""
    images, window = x.flatten(0, 2).unsqueeze(1), _window(min(x.shape[-2:]), x)
    found = F.conv2d(F.conv2d(images, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))
    return found.view(*x.shape[:3], *found.shape[-2:])


def _window(side: int, like: Tensor) -> Float[Tensor, " window"]:
    size = min(WINDOW, side - 1 + side % 2)
    place = torch.arange(size, dtype=like.dtype, device=like.device) - size // 2
    weight = torch.exp(-place.square() / (2 * SIGMA**2))
    return weight / weight.sum()
