"""The kernels of `cross_log_prob`: one program for a few rows and a chunk of D; the parameters of all N posteriors stay in registers."""

from meme_kernels._math import LOG_2PI
from meme_kernels._triton import jit, tl
from meme_kernels.philox import device_noise, log

LN2 = tl.constexpr(0.6931471805599453)


# ---- device functions ------------------------------------------------------------------------------------------------------------


@jit
def _places(B, D, PARTS, BN: tl.constexpr, BB: tl.constexpr, BD: tl.constexpr):
    """This program's part of the samples and chunk of D, and its n [BN], b [BB] and d [BD]; chunk, part and b are int64."""
    program, chunks = tl.program_id(0).to(tl.int64), tl.maximum(tl.cdiv(D, BD), 1)
    chunk, part = program % chunks, (program // chunks) % PARTS
    b = (program // (chunks * PARTS)) * BB + tl.arange(0, BB)
    return part, chunk, tl.arange(0, BN), b, chunk.to(tl.int32) * BD + tl.arange(0, BD)


@jit
def _parameters(mean_ptr, scale_ptr, observed_ptr, n, b, d, N, B, D, ACC: tl.constexpr):
    """Observed [BN, BB]; mean and scale [BN, BB, BD], 0 and 1 wherever nothing is: absent entries are never read."""
    pair = n.to(tl.int64)[:, None] * B + b[None, :]
    there = tl.load(observed_ptr + pair, mask=(n < N)[:, None] & (b < B)[None, :], other=0).to(tl.int32) != 0
    at = pair[:, :, None] * D + d[None, None, :]
    held = there[:, :, None] & (d < D)[None, None, :]
    return there, tl.load(mean_ptr + at, mask=held, other=0.0).to(ACC), tl.load(scale_ptr + at, mask=held, other=1.0).to(ACC)


@jit
def _source(i, n, there, mean, inverse):
    """Row i of the tiles: whether it is observed [BB], its mean and scale [BB, BD]."""
    own = (n == i)[:, None, None]
    here = tl.sum(tl.where((n == i)[:, None] & there, 1, 0), 0) != 0
    return here, tl.sum(tl.where(own, mean, 0.0), 0), 1.0 / tl.sum(tl.where(own, inverse, 0.0), 0)


@jit
def _log(x, ACC: tl.constexpr):
    """Cheaper than the library's in float32."""
    if ACC == tl.float64:
        return tl.log(x)
    else:
        return log(x)


@jit
def _keys(key_ptr, i):
    """The Philox key of source i; without one the noise is given."""
    if key_ptr is None:
        return i, i
    else:
        return tl.load(key_ptr + 2 * i), tl.load(key_ptr + 2 * i + 1)


@jit
def _noise(noise_ptr, keys, draw, block, at, mask, k, D, LAPLACE: tl.constexpr, ACC: tl.constexpr):
    """Noise [BB, BD] of one source and sample: what was given, or made by Philox, four coordinates a call."""
    if noise_ptr is None:
        eps = device_noise(keys[0], keys[1], (k * tl.cdiv(D, 4) + block)[None, :], draw[:, None], LAPLACE)
    else:
        eps = tl.load(noise_ptr + at, mask=mask, other=0.0)
    return eps.to(ACC)


# ---- kernels ---------------------------------------------------------------------------------------------------------------------


@jit
def forward_kernel(
    mean_ptr, scale_ptr, observed_ptr, noise_ptr, draw_ptr, key_ptr, z_ptr, table_ptr, N, K, B, D, PARTS,
    BN: tl.constexpr, BB: tl.constexpr, BD: tl.constexpr, LAPLACE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """z, and this chunk's part of the table [chunks, N, N, K, B]."""
    part, chunk, n, b, d = _places(B, D, PARTS, BN, BB, BD)
    there, mean, scale = _parameters(mean_ptr, scale_ptr, observed_ptr, n, b, d, N, B, D, ACC)
    inverse = 1.0 / scale
    counted = tl.minimum(D - chunk * BD, BD).to(ACC)
    level = tl.zeros((BN, BB), ACC) - counted * (LN2 if LAPLACE else LOG_2PI / 2)
    for j in range(N):  # not all at once: 32 logarithms side by side take more registers than the rest of the kernel
        own = tl.sum(tl.where((n == j)[:, None, None], inverse, 0.0), 0)
        level += tl.where((n == j)[:, None], tl.sum(_log(own, ACC), 1)[None, :], 0.0)
    B = chunk * 0 + B  # 64 bits from here on
    inside = (b < B)[:, None] & (d < D)[None, :]
    z_at = b[:, None] * D + d[None, :]
    table_at = (chunk * N * N + n[:, None]) * K * B + b[None, :]
    written = (n < N)[:, None] & (b < B)[None, :]
    draw = b if draw_ptr is None else tl.load(draw_ptr + b, mask=b < B, other=0)
    block = chunk.to(tl.int32) * (BD // 4) + tl.arange(0, BD // 4)
    first, last = (part * K // PARTS).to(tl.int32), ((part + 1) * K // PARTS).to(tl.int32)
    for i in range(N):
        here, mean_i, scale_i = _source(i, n, there, mean, inverse)
        read = inside & here[:, None]
        keys = _keys(key_ptr, i)
        for k in range(first, last):
            at = z_at + (i * K + k) * B * D
            eps = _noise(noise_ptr, keys, draw, block, at, read, k, D, LAPLACE, ACC)
            z = tl.where(read, mean_i + scale_i * eps, 0.0)
            tl.store(z_ptr + at, z, mask=inside)
            u = (z[None] - mean) * inverse  # [BN, BB, BD], 0 beyond D
            total = tl.sum(tl.abs(u), 2) if LAPLACE else 0.5 * tl.sum(u * u, 2)
            q = tl.where(there & here[None, :], level - total, 0.0)
            tl.store(table_ptr + table_at + (i * N * K + k) * B, q, mask=written)


@jit
def backward_kernel(
    mean_ptr, scale_ptr, observed_ptr, noise_ptr, draw_ptr, key_ptr, z_ptr, table_ptr, grad_mean_ptr, grad_scale_ptr, N, K, B, D, PARTS,
    BN: tl.constexpr, BB: tl.constexpr, BD: tl.constexpr, LAPLACE: tl.constexpr, PATH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """This part's gradients of mean and scale, [PARTS, N, B, D] each, from those of z and the table; PATH: only through z."""
    part, chunk, n, b, d = _places(B, D, PARTS, BN, BB, BD)
    there, mean, scale = _parameters(mean_ptr, scale_ptr, observed_ptr, n, b, d, N, B, D, ACC)
    inverse = 1.0 / scale
    B = chunk * 0 + B  # 64 bits from here on
    inside = (b < B)[:, None] & (d < D)[None, :]
    z_at = b[:, None] * D + d[None, :]
    table_at = n[:, None] * K * B + b[None, :]
    draw = b if draw_ptr is None else tl.load(draw_ptr + b, mask=b < B, other=0)
    block = chunk.to(tl.int32) * (BD // 4) + tl.arange(0, BD // 4)
    first, last = (part * K // PARTS).to(tl.int32), ((part + 1) * K // PARTS).to(tl.int32)
    # In units of each posterior's scale: sums of g score, of g score u, and of g, where g is the table's gradient.
    shift, stretch, weight = tl.zeros((BN, BB, BD), ACC), tl.zeros((BN, BB, BD), ACC), tl.zeros((BN, BB), ACC)
    for i in range(N):
        here, mean_i, scale_i = _source(i, n, there, mean, inverse)
        read = inside & here[:, None]
        keys = _keys(key_ptr, i)
        path_mean, path_scale = tl.zeros((BB, BD), ACC), tl.zeros((BB, BD), ACC)
        for k in range(first, last):
            at = z_at + (i * K + k) * B * D
            eps = _noise(noise_ptr, keys, draw, block, at, read, k, D, LAPLACE, ACC)
            g = tl.load(table_ptr + table_at + (i * N * K + k) * B, mask=there & here[None, :], other=0.0).to(ACC)
            u = (tl.where(read, mean_i + scale_i * eps, 0.0)[None] - mean) * inverse  # [BN, BB, BD]
            score = g[:, :, None] * (tl.where(u > 0, 1.0, 0.0) - tl.where(u < 0, 1.0, 0.0) if LAPLACE else u)
            slope = tl.load(z_ptr + at, mask=read, other=0.0).to(ACC) - tl.sum(score * inverse, 0)
            path_mean += slope
            path_scale += slope * tl.where(read, eps, 0.0)
            if not PATH:
                shift += score
                stretch += score * u
                weight += g
        own = (n == i)[:, None, None]
        shift += tl.where(own, (path_mean * scale_i)[None], 0.0)
        stretch += tl.where(own, (path_scale * scale_i)[None], 0.0)
    out_at = (part * N * B + (n[:, None] * B + b[None, :])[:, :, None]) * D + d[None, None, :]
    written = (n < N)[:, None, None] & inside[None]
    tl.store(grad_mean_ptr + out_at, (shift * inverse).to(grad_mean_ptr.dtype.element_ty), mask=written)
    tl.store(grad_scale_ptr + out_at, ((stretch - weight[:, :, None]) * inverse).to(grad_scale_ptr.dtype.element_ty), mask=written)
