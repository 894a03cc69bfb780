"""Launch heuristics as pure functions: sizes in, block sizes and warps out."""


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two >= max(n, 1)."""
    return 1 << max(n - 1, 0).bit_length()


def block(n: int, *, least: int = 1, most: int) -> int:
    """A power-of-two block for an axis of n elements, between `least` and `most`."""
    return min(max(power_of_two(n), least), most)
