"""Special functions for the kernels, in the type of their argument (float32 or float64). No library call: the interpreter runs them.

Count likelihoods are sums of log-gamma functions that cancel: lgamma(1e6) = 1.3e7, which float32 holds to one unit, in a sum that comes
to -8. So there is no lgamma here but what it leaves behind Stirling's leading terms, which cancel on paper (Loader 2000):

    stirling_rest(z) = lgamma(z) - z log z + z          = log(2 pi / z) / 2 + 1 / (12 z) - ...
    digamma_rest(z)  = digamma(z) - log z               = - 1 / (2 z) - 1 / (12 z^2) + ...

Below 4 (float64: 8) the recurrences lgamma(z + 1) = lgamma(z) + log z and digamma(z + 1) = digamma(z) + 1 / z carry z to where the series
hold. Largest errors over 1e-6 .. 1e8, as a share of max(1, |value|): float32 7e-7 and 5e-7 (2e-7 and 2e-8 from 4 on), float64 5e-15 both.
Relative errors of the others in float32: log1p 3e-7, softplus and sigmoid 1e-6 down to -20.
"""

from meme_kernels._math import LOG_2PI, exp
from meme_kernels._triton import jit, tl


@jit
def log1p(x):
    """log(1 + x) to the last digits of x: the logarithm of the rounded sum, plus what the rounding lost (where that matters)."""
    w = 1.0 + x
    return tl.log(w) + tl.where(tl.abs(x) < 1.0, x - (w - 1.0), 0.0)


@jit
def log_ratio(w, u):
    """log(1 + u) from two roundings of one ratio: w of a / b, and u of (a - b) / b, which holds the digits where a is close to b."""
    return tl.log(w) + tl.where(tl.abs(u) < 0.5, u - (w - 1.0), 0.0)


@jit
def _log1p_unit(x):
    """log(1 + x) for 0 <= x <= 1. In float32 a minimax polynomial of log(1 + x) / x: half the instructions of a logarithm."""
    if x.dtype == tl.float64:
        return log1p(x)
    y = 0.0782259628 + x * (-0.0295052398 + x * 0.00523269363)
    y = -0.24842982 + x * (0.191060081 + x * (-0.136632472 + x * y))
    return x * (0.99999994 + x * (-0.499994934 + x * (0.333190978 + x * y)))


@jit
def softplus(x):
    """log(1 + e^x): no overflow, and e^x itself where x is very negative."""
    return tl.maximum(x, 0.0) + _log1p_unit(exp(-tl.abs(x)))


@jit
def sigmoid(x):
    """1 / (1 + e^-x), with no overflow."""
    e = exp(-tl.abs(x))
    return tl.where(x >= 0.0, 1.0, e) / (1.0 + e)


@jit
def _shift(z):
    """How far small arguments are carried up: far enough for the series below to end under the type's precision."""
    if z.dtype == tl.float64:
        return 8.0
    else:
        return 4.0


@jit
def _rising(z, scale):
    """z (z + 1) (z + 2) (z + 3), each factor times scale."""
    return (z * scale) * ((z + 1.0) * scale) * ((z + 2.0) * scale) * ((z + 3.0) * scale)


@jit
def _steps(z):
    """1 / z + 1 / (z + 1) + 1 / (z + 2) + 1 / (z + 3)."""
    return 1.0 / z + 1.0 / (z + 1.0) + 1.0 / (z + 2.0) + 1.0 / (z + 3.0)


@jit
def stirling_rest(z):
    """lgamma(z) - z log z + z for z > 0."""
    shift = _shift(z)
    small = z < shift
    up = tl.where(small, z + shift, z)
    scale = 1.0 / (z + shift)  # of z (z + 1) ...: keeps the product's logarithm small
    product = _rising(z, scale)
    if z.dtype == tl.float64:
        product *= _rising(z + 4.0, scale)
    carried = z * log1p(shift / z) - shift - tl.log(tl.where(small, product, 1.0))
    y = 1.0 / up
    y2 = y * y
    tail = 1 / 1260 - y2 * (1 / 1680 - y2 * (1 / 1188 - y2 * (691 / 360360 - y2 * (1 / 156))))
    series = y * (1 / 12 - y2 * (1 / 360 - y2 * tail))
    return 0.5 * (LOG_2PI - tl.log(up)) + series + tl.where(small, carried, 0.0)


@jit
def digamma_rest(z):
    """digamma(z) - log z for z > 0."""
    shift = _shift(z)
    small = z < shift
    up = tl.where(small, z + shift, z)
    steps = _steps(z)
    if z.dtype == tl.float64:
        steps += _steps(z + 4.0)
    y = 1.0 / up
    y2 = y * y
    tail = 1 / 252 - y2 * (1 / 240 - y2 * (1 / 132 - y2 * (691 / 32760 - y2 * (1 / 12))))
    series = -0.5 * y - y2 * (1 / 12 - y2 * (1 / 120 - y2 * tail))
    return series + tl.where(small, log1p(shift / z) - steps, 0.0)
