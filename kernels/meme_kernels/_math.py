"""Device helpers: what kernels compute with. No library call and no inline assembly, so that the interpreter runs the same code."""

from meme_kernels._triton import jit, tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOG_2PI = tl.constexpr(1.8378770664093453)


@jit
def exp(x):
    """e^x through the hardware's base-two exponential."""
    return tl.exp2(x * LOG2E)


@jit
def merge_lse(m, s, x, axis: tl.constexpr):
    """Online log-sum-exp: running maximum m and sum s of exp(. - m), with one more tile x along `axis`; -inf is a legal value."""
    new = tl.maximum(m, tl.max(x, axis))
    safe = tl.where(new == float("-inf"), 0.0, new)
    return new, s * exp(m - safe) + tl.sum(exp(x - tl.expand_dims(safe, axis)), axis)
