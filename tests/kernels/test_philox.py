"""Laws of the counter-based generator: the device functions make the reference's numbers, which follow their distributions."""

import math

import pytest
import torch
from scipy import stats

from meme_kernels import philox
from meme_kernels._op import backend
from meme_kernels._triton import jit, tl
from tests.kernels.catalogue import LANE

launches_kernels = pytest.mark.skipif(LANE == "plain", reason="no kernel can be launched here")
SEEDS = (0, 3, 2**33 + 9)
# Random123's known-answer file, philox4x32-10: counter, key, words.
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


@jit
def _words_kernel(counter_ptr, key_ptr, out_ptr, N: tl.constexpr):
    """Four words of each counter [N, 4] and key [N, 2], through the generator that device_noise calls."""
    n = tl.arange(0, N)
    c0 = tl.load(counter_ptr + 4 * n).to(tl.uint32)
    c1 = tl.load(counter_ptr + 4 * n + 1).to(tl.uint32)
    c2 = tl.load(counter_ptr + 4 * n + 2).to(tl.uint32)
    c3 = tl.load(counter_ptr + 4 * n + 3).to(tl.uint32)
    a, b, c, d = tl.philox_impl(c0, c1, c2, c3, tl.load(key_ptr + 2 * n).to(tl.uint32), tl.load(key_ptr + 2 * n + 1).to(tl.uint32))  # type: ignore[misc]
    tl.store(out_ptr + 4 * n, a.to(tl.int64))
    tl.store(out_ptr + 4 * n + 1, b.to(tl.int64))
    tl.store(out_ptr + 4 * n + 2, c.to(tl.int64))
    tl.store(out_ptr + 4 * n + 3, d.to(tl.int64))


@jit
def _uniform_kernel(word_ptr, out_ptr, N: tl.constexpr):
    n = tl.arange(0, N)
    tl.store(out_ptr + n, philox.device_uniform(tl.load(word_ptr + n).to(tl.uint32)))


@jit
def _log_kernel(x_ptr, out_ptr, N: tl.constexpr):
    n = tl.arange(0, N)
    tl.store(out_ptr + n, philox.log(tl.load(x_ptr + n)))


@launches_kernels
def test_device_words_equal_the_published_test_vectors(device):
    counter, key, expected = (torch.tensor([VECTORS[i % 3][part] for i in range(4)], device=device) for part in range(3))
    words = torch.empty_like(counter)
    _words_kernel[(1,)](counter, key, words, N=4)
    assert torch.equal(words, expected)


@launches_kernels
def test_device_uniforms_are_the_references_exactly(device):
    """At both ends of the range, at the median and where adding the half is a tie."""
    ends = torch.cat([torch.arange(1024) << 8, (torch.arange(2**23 - 512, 2**23 + 512)) << 8, 0xFFFFFFFF - (torch.arange(2048) << 7)])
    word = ends.to(device)
    out = torch.empty(4096, device=device)
    _uniform_kernel[(1,)](word, out, N=4096)
    expected = ((word >> 8).float() + 0.5) * 2.0**-24
    assert torch.equal(out, expected) and out.min() == 2.0**-25 and out.max() == 1


@launches_kernels
@pytest.mark.parametrize("seed", SEEDS)
def test_device_normal_equals_the_reference_within_one_millionth(device, seed):
    """Measured: 7.2e-7 at most over 10^6 draws; the bound over all pairs of uniforms is 4.8e-7 + 5.9 * 8.7e-8."""
    draw = torch.cat([torch.arange(63), torch.tensor([2**40 + 3])]).to(device)
    key = philox.key(seed, "z")
    torch.testing.assert_close(philox.normal(draw, key, 8, 126), philox.reference(draw, key, 8, 126, "normal"), rtol=0, atol=1e-6)


@launches_kernels
@pytest.mark.parametrize("seed", SEEDS)
def test_device_laplace_equals_the_reference_within_two_roundings(device, seed):
    draw = torch.cat([torch.arange(63), torch.tensor([2**40 + 3])]).to(device)
    key = philox.key(seed, "z")
    torch.testing.assert_close(philox.laplace(draw, key, 8, 126), philox.reference(draw, key, 8, 126, "laplace"), rtol=3e-7, atol=0)


@launches_kernels
def test_device_log_keeps_its_digits_near_one_and_over_the_whole_range(device):
    near = 1 - torch.arange(1, 2049) * 2.0**-24
    x = torch.cat([near, 1 + torch.arange(1, 1025) * 2.0**-23, torch.logspace(-37, 37, 1024)]).to(device)
    out = torch.empty_like(x)
    _log_kernel[(1,)](x, out, N=4096)
    torch.testing.assert_close(out.double(), x.double().log(), rtol=2e-7, atol=0)


# E x^2, E x^4, E x^6, E x^8: double factorials of a standard Normal, factorials of a standard Laplace.
EVEN = {"normal": (1, 3, 15, 105), "laplace": (2, 24, 720, 40320)}


@pytest.mark.parametrize("kind, law", [("normal", stats.norm), ("laplace", stats.laplace)])
def test_draws_have_the_moments_and_the_distribution_function_of_their_law(device, kind, law):
    """Of the kernel where one runs, else of the reference: n = 2^17, four standard errors, Kolmogorov-Smirnov at 1e-3."""
    draw, key = torch.arange(256, device=device), philox.key(11, "moments")
    x = getattr(philox, kind)(draw, key, 8, 64).double().cpu()
    flat = x.flatten().numpy()
    for order, squared in enumerate(EVEN[kind], 1):
        expected = 0 if order % 2 else EVEN[kind][order // 2 - 1]
        assert abs((flat**order).mean() - expected) < 4 * ((squared - expected**2) / len(flat)) ** 0.5
    assert stats.kstest(flat, law.cdf).pvalue > 1e-3
    # Neighbours in coordinates (the two of a Box-Muller pair too), in rows and in samples.
    for a, b in [(x[..., :-1], x[..., 1:]), (x[:, :-1], x[:, 1:]), (x[:-1], x[1:])]:
        assert abs(float((a * b).mean()) / EVEN[kind][0]) < 4 / a.numel() ** 0.5


def test_no_laplace_draw_is_infinite(device):
    """A word of 24 leading ones rounds its uniform to 1, whose logarithm would be infinite; this stream holds one."""
    draw, key = torch.tensor([4148], device=device), philox.key(0, "z")
    assert philox.uniform(draw, key, 16, 64)[5, 0, 42] == 1
    for x in (philox.laplace(draw, key, 16, 64), philox.reference(draw, key, 16, 64, "laplace")):
        assert x.isfinite().all() and abs(x[5, 0, 42].item() - 24 * math.log(2)) < 1e-5


# ---- one launch a call ------------------------------------------------------------------------------------------------------------------

TOLERANCE = {"uniform": {"rtol": 0, "atol": 0}, "normal": {"rtol": 0, "atol": 1e-6}, "laplace": {"rtol": 3e-7, "atol": 0}}
kinds = pytest.mark.parametrize("kind", TOLERANCE)


@launches_kernels
@kinds
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (2, 300, 2), (7, 2, 130), (1, 3, 1027), (0, 2, 3), (2, 0, 3), (2, 3, 0)], ids=str)
def test_a_launch_gives_the_reference_for_any_shape(kind, shape, device):
    """Uniforms to the bit; the others as far apart as the device functions are from PyTorch's. Draws beyond 2^32, and not contiguous."""
    num, rows, size = shape
    draw = torch.stack([torch.arange(rows) * 2**29 + 5, torch.zeros(rows, dtype=torch.int64)], 1).to(device)[:, 0]
    for seed, purpose in ((0, "z"), (2**40 + 7, "photo/resample")):
        key = philox.key(seed, purpose)
        found = getattr(philox, kind)(draw, key, num, size)
        expected = philox.reference(draw, key, num, size, kind)
        assert found.dtype == torch.float32 and found.shape == shape
        torch.testing.assert_close(found, expected, **TOLERANCE[kind])


@launches_kernels
def test_words_of_any_size_are_keys_of_one_compiled_kernel(device):
    """0, 1, a multiple of 16 and words above 2^31, which as they stand would each be another type or specialisation."""
    draw = torch.arange(5, device=device)
    for key in ((0, 1), (16, 0), (2**31, 2**32 - 1), (7, 2**31 + 16)):
        assert torch.equal(philox.uniform(draw, key, 2, 6), philox.reference(draw, key, 2, 6, "uniform"))
    if LANE == "gpu":
        compiled = philox._noise_kernel.device_caches[torch.cuda.current_device()][0]
        before = len(compiled)
        for word in (3, 32, 2**31 + 1):
            philox.uniform(draw, (word, word), 2, 6)
        assert len(compiled) == before


@launches_kernels
def test_a_key_in_a_tensor_is_the_same_key(device):
    draw, key = torch.arange(5, device=device), philox.key(3, "z")
    torch.testing.assert_close(
        philox.normal(draw, torch.tensor(key, device=device), 2, 6), philox.normal(draw, key, 2, 6), rtol=0, atol=1e-6
    )


@kinds
def test_compiled_draws_are_eager_ones_and_other_sizes_compile_at_most_once_more(kind, device):
    call = torch.compile(lambda draw, num: getattr(philox, kind)(draw, (3, 2**31 + 5), num, 6), fullgraph=True, backend="aot_eager")
    for rows, num in ((4, 3), (6, 3), (9, 3)):
        draw = torch.arange(rows, device=device)
        torch.testing.assert_close(call(draw, num), getattr(philox, kind)(draw, (3, 2**31 + 5), num, 6), rtol=0, atol=0)


@launches_kernels
def test_the_opaque_node_passes_opcheck(device):
    torch.library.opcheck(philox._drawn.node, (torch.arange(5, device=device), 3, -5, 2, 6, "normal"))


@pytest.mark.gpu
@kinds
def test_a_replayed_graph_draws_for_the_rows_that_are_there_then(kind, device):
    draw, key = torch.arange(9, device=device), philox.key(3, "z")
    philox.normal(draw, key, 2, 6)
    getattr(philox, kind)(draw, key, 4, 10)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = getattr(philox, kind)(draw, key, 4, 10)
    draw.add_(1000)
    graph.replay()
    assert torch.equal(found, getattr(philox, kind)(draw, key, 4, 10))


@launches_kernels
def test_where_kernels_are_switched_off_draws_are_the_references(device):
    draw, key = torch.arange(5, device=device), philox.key(3, "z")
    with backend("reference"):
        assert torch.equal(philox.normal(draw, key, 2, 6), philox.reference(draw, key, 2, 6, "normal"))
