"""From the tables of one batch to MEME's bound, its metrics and the gradient of every entry (Joy et al. 2022, eq. 1, 4, 6, 8, app. B, D).

For source i of row b, targets T = the other modalities that the row holds, samples k:

    t[k]       = sum_{j in T} A[i,j,k]
    p[k]       = softmax_k t[k]
    marginal   = logsumexp_k t[k] - log K
    prior[k]   = logsumexp_{j in T} Q[i,j,k] - log |T|     (or given: a product of experts), and the pseudo-input prior where T is empty
    ratio[k]   = prior[k] - Q[i,i,k]
    objective  = (sum_k v[k] (A[i,i,k] - t[k] + ratio[k]) + c marginal) / |observed|

    estimator        v[k]
    rao_blackwell    p[k]
    released         K p[0] at k = 0, else 0
    resampled        1 at a k drawn from p (`resample`), whose A come afresh, with gradients; t and marginal then read
                     t = fresh, marginal = fresh + (marginal - t[k]) so that the value is the marginal and the gradient that of t[k]

Where T is one expert, or the prior a product, a closed-form -KL may take the place of the sampled ratio: v's sum times it. The gradient
of v is stopped unless `stop_gradient` is False (eq. 7):
    d objective / d t[l] gains  F[l] v[l] - p[l] sum_k F[k] v[k],  F = A_ii - t + ratio.

The bound at c = 1 is a metric whatever is optimised. Everything is masked by selection: an absent entry reaches neither value nor gradient.
Forward reads 2 N^2 K B + N K B numbers (resampled: N^2 K B + N^2 B) and writes 6 N B; backward reads them again (Q twice, the second time
from the cache) and writes as many: one launch each, one program for a source and a block of rows, every sum in one order.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from meme_kernels._meme_bound import Tables, backward, draw, forward
from meme_kernels._op import Case, Cost, FusedOp, Size, nbytes, sums_dtype, through_reference, uses_triton

Estimator = Literal["released", "rao_blackwell", "resampled"]
ESTIMATORS = ("rao_blackwell", "released", "resampled")
METRICS = ("bound", "reconstruction", "log_ratio", "marginal", "ess")


class Drawn(NamedTuple):
    """What resampling leaves of the K samples: the index drawn, marginal - t[index], and the effective sample size 1 / sum_k p[k]^2."""

    index: Tensor  # int64 [N, B]
    gap: Tensor  # [N, B]
    ess: Tensor  # [N, B]


class Bound(NamedTuple):
    """`objective` [N, B]: each source's share of its row's objective, 0 where the row lacks it; minus its sum is the loss.
    `metrics` [5, N, B], no gradient: bound, reconstruction, log-ratio, marginal, effective sample size; 0 where there is none."""

    objective: Tensor
    metrics: Tensor


def meme_bound(
    own: Tensor,
    cross: Tensor,
    density: Tensor,
    observed: Tensor,
    *,
    estimator: Estimator,
    cross_weight: float,
    prior: Tensor | None = None,
    alone: Tensor | None = None,
    closed: Tensor | None = None,
    drawn: Drawn | None = None,
    stop_gradient: bool = True,
) -> Bound:
    """own [N, K, B] (or [N, 1, B] unless rao_blackwell): A[i,i]; cross [N, N, K, B] (resampled: [N, N, 1, B]): A, its diagonal unread;
    density [N, N, K, B]: Q; observed bool [N, B]. `prior` [N, K, B]: log of a product of experts instead of the mixture;
    `alone` [N, K, B]: log of the prior of rows that hold one modality; `closed` [N, B]: -KL(q_i || p(z | x_T)); `drawn`: with `resampled`.

    Raises ValueError for shapes and types that do not fit, `resampled` without `drawn`, or with stop_gradient=False.
    """
    tables = Tables(own, cross, density, prior, alone, closed, observed, *(drawn if drawn is not None else (None, None, None)))
    _check(tables, estimator, stop_gradient)
    if not uses_triton(*tables):
        settings = {"estimator": estimator, "cross_weight": cross_weight, "drawn": drawn, "stop_gradient": stop_gradient}
        return reference(own, cross, density, observed, prior=prior, alone=alone, closed=closed, **settings)
    return Bound(*_Bound.apply(*tables, ESTIMATORS.index(estimator), cross_weight, stop_gradient))


def resample(cross: Tensor, observed: Tensor, uniform: Tensor) -> Drawn:
    """One k ~ softmax_k t[k] for every source and row; cross [N, N, K, B], observed bool [N, B], uniform [N, B] in (0, 1). No gradient.

    Raises ValueError for shapes and types that do not fit.
    """
    _check_resample(cross, observed, uniform)
    with torch.no_grad():
        if uses_triton(cross, observed, uniform):
            return Drawn(*draw(cross, observed, uniform))
        t = _targets(cross, observed)
        share = t.softmax(1)
        edges = share.cumsum(1)
        index = (uniform.unsqueeze(1) * edges[:, -1:] > edges).sum(1).clamp(max=t.shape[1] - 1)
        gap = _log_mean_exp(t) - t.gather(1, index.unsqueeze(1))[:, 0]
        return Drawn(index, gap, share.square().sum(1).reciprocal())


def reference(
    own: Tensor,
    cross: Tensor,
    density: Tensor,
    observed: Tensor,
    *,
    estimator: Estimator,
    cross_weight: float,
    prior: Tensor | None = None,
    alone: Tensor | None = None,
    closed: Tensor | None = None,
    drawn: Drawn | None = None,
    stop_gradient: bool = True,
) -> Bound:
    """The specification, in plain PyTorch."""
    wide = sums_dtype(own, cross, density)
    own, cross, density = own.to(wide), cross.to(wide), density.to(wide)
    prior, alone, closed = (None if x is None else x.to(wide) for x in (prior, alone, closed))
    held = observed.sum(0)
    others = (held - 1).where(observed, torch.zeros_like(held))  # |T|, [N, B]
    t, samples = _targets(cross, observed), density.shape[1 + 1]
    ratio = _log_ratio(density, observed, others, prior, alone)
    if drawn is not None:
        once = torch.arange(samples, device=own.device)[:, None] == drawn.index.unsqueeze(1)
        weight = torch.where(others.unsqueeze(1) > 0, once.to(own.dtype), 1 / samples)
        fit, marginal, ess = (own - t)[:, 0], t[:, 0] + drawn.gap, drawn.ess
    else:
        share = t.softmax(1)
        weight = share if estimator == "rao_blackwell" else torch.cat([samples * share[:, :1], torch.zeros_like(share[:, 1:])], 1)
        weight = weight.detach() if stop_gradient else weight
        fit, marginal = (weight * (own - t)).sum(1), _log_mean_exp(t)
        ess = share.detach().square().sum(1).reciprocal()
    sampled, mass = (weight * ratio).sum(1), weight.sum(1)
    exact = torch.zeros_like(observed) if closed is None else (others == 1 if prior is None else others > 0)
    log_ratio = sampled if closed is None else torch.where(exact, mass * closed, sampled)
    reconstruction = (weight * own).sum(1) if estimator == "rao_blackwell" else own[:, 0]
    objective = torch.where(observed, (fit + log_ratio + cross_weight * marginal) / held.clamp(min=1), 0.0)
    metrics = torch.stack([fit + sampled + marginal, reconstruction, log_ratio, marginal, ess]).detach()
    mask = torch.stack([observed, observed, observed, others > 0, others > 0])
    return Bound(objective, torch.where(mask, metrics, 0.0))


def _targets(cross: Tensor, observed: Tensor) -> Tensor:
    """t [N, K, B]: the sum over targets."""
    return torch.where(_pairs(observed).unsqueeze(2), cross, 0.0).sum(1)


def _pairs(observed: Tensor) -> Tensor:
    """[i, j, b]: row b holds both i and j, and i is not j."""
    return observed[:, None] & observed[None] & ~torch.eye(len(observed), dtype=torch.bool, device=observed.device)[..., None]


def _log_ratio(density: Tensor, observed: Tensor, others: Tensor, prior: Tensor | None, alone: Tensor | None) -> Tensor:
    own = torch.where(observed.unsqueeze(1), density.diagonal(dim1=0, dim2=1).permute(2, 0, 1), 0.0)
    paired = (others > 0).unsqueeze(1)
    if prior is None:
        table = torch.where(_pairs(observed).unsqueeze(2), density, -torch.inf)
        table = torch.where(paired.unsqueeze(1), table, 0.0)  # a log-sum-exp of nothing but -inf has no gradient
        prior = torch.logsumexp(table, 1) - others.clamp(min=1).to(table.dtype).log().unsqueeze(1)
    single = observed.unsqueeze(1) & ~paired
    return torch.where(paired, prior, 0.0) + (0.0 if alone is None else torch.where(single, alone, 0.0)) - own


def _log_mean_exp(t: Tensor) -> Tensor:
    return torch.logsumexp(t, 1) - math.log(t.shape[1])


def _check(tables: Tables, estimator: str, stop_gradient: bool) -> None:
    drawn, shape = tables.index is not None, tuple(tables.density.shape)
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator: expected one of {', '.join(ESTIMATORS)}, got {estimator!r}")
    if (estimator == "resampled") != drawn:
        raise ValueError("estimator 'resampled' goes with `drawn` (see resample), the others without")
    if drawn and not stop_gradient:
        raise ValueError("stop_gradient=False: a resampled index has no gradient; use released or rao_blackwell")
    if len(shape) != 4 or shape[0] != shape[1] or shape[2] < 1:
        raise ValueError(f"meme_bound: expected density [N, N, K, B] with K > 0, got {shape}")
    n, _, samples, rows = shape
    tall = {
        "own": (n, samples if estimator == "rao_blackwell" else 1, rows),
        "cross": (n, n, 1 if drawn else samples, rows),
        "density": shape,
        "prior": (n, samples, rows),
        "alone": (n, samples, rows),
    }
    for name, x in zip(Tables._fields, tables, strict=True):
        expected = tall.get(name, (n, rows))
        if x is not None and tuple(x.shape) != expected:
            raise ValueError(f"meme_bound: {name}: for density {shape} expected {expected}, got {tuple(x.shape)}")
    for name, x, dtype in (("observed", tables.observed, torch.bool), ("index", tables.index, torch.int64)):
        if x is not None and x.dtype != dtype:
            raise ValueError(f"meme_bound: {name}: expected {dtype}, got {x.dtype}")


def _check_resample(cross: Tensor, observed: Tensor, uniform: Tensor) -> None:
    shape, entry = tuple(cross.shape), (*cross.shape[:1], *cross.shape[3:])
    good = len(shape) == 4 and shape[0] == shape[1] and shape[2] > 0
    if not good or tuple(observed.shape) != entry or tuple(uniform.shape) != entry or observed.dtype != torch.bool:
        got = f"{shape}, {observed.dtype} {tuple(observed.shape)} and {tuple(uniform.shape)}"
        raise ValueError(f"resample: expected cross [N, N, K, B] with K > 0, bool observed [N, B] and uniform [N, B], got {got}")


class _Bound(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, own: Tensor, cross: Tensor, density: Tensor, prior: Any, alone: Any, closed: Any, observed: Tensor, *rest: Any
    ) -> Any:
        index, gap, ess, *ctx.settings = rest
        ctx.save_for_backward(own, cross, density, prior, alone, closed, observed, index, gap, ess)
        objective, metrics = forward(Tables(own, cross, density, prior, alone, closed, observed, index, gap, ess), *ctx.settings)
        ctx.mark_non_differentiable(metrics)
        return objective, metrics

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        tables = Tables(*ctx.saved_tensors)
        if torch.is_grad_enabled():
            return *through_reference(_objective(tables, *ctx.settings), tables[:6], gradients[:1]), *(None,) * 7
        found = backward(tables, gradients[0], *ctx.settings)
        given = zip(found, tables[:6], strict=True)
        return *(None if x is None or g is None else g.to(x.dtype) for g, x in given), *(None,) * 7


def _objective(tables: Tables, code: int, cross_weight: float, stop_gradient: bool) -> Any:
    drawn = None if tables.index is None else Drawn(*cast(tuple[Tensor, Tensor, Tensor], tables[7:]))

    def objective(own: Tensor, cross: Tensor, density: Tensor, prior: Tensor | None, alone: Tensor | None, closed: Tensor | None) -> Tensor:
        settings = {"estimator": ESTIMATORS[code], "cross_weight": cross_weight, "drawn": drawn, "stop_gradient": stop_gradient}
        return reference(own, cross, density, tables.observed, prior=prior, alone=alone, closed=closed, **settings).objective

    return objective


def naive(own: Tensor, cross: Tensor, density: Tensor, observed: Tensor, **settings: Any) -> Bound:
    """As commonly written: a Python loop over sources and another over their targets, a few small operations each."""
    parts = [_one_source(i, own[i], cross[i], density[i], observed, **settings) for i in range(len(observed))]
    return Bound(torch.stack([objective for objective, _ in parts]), torch.stack([metrics for _, metrics in parts], 1).detach())


def _one_source(
    i: int,
    own: Tensor,
    cross: Tensor,
    density: Tensor,
    observed: Tensor,
    *,
    estimator: Estimator,
    cross_weight: float,
    prior: Tensor | None = None,
    alone: Tensor | None = None,
    closed: Tensor | None = None,
    drawn: Drawn | None = None,
    stop_gradient: bool = True,
) -> tuple[Tensor, Tensor]:
    here, samples, targets = observed[i], density.shape[1], [j for j in range(len(observed)) if j != i]
    number = sum((observed[j].long() for j in targets), start=torch.zeros_like(here, dtype=torch.long)) * here
    t, mixed = torch.zeros_like(cross[0]), torch.full_like(density[0], -torch.inf)
    for j in targets:
        t = torch.where(here & observed[j], t + cross[j], t)
        mixed = torch.where(here & observed[j], torch.logaddexp(mixed, density[j]), mixed)
    of_several = mixed.where(number > 0, 0.0) - number.clamp(min=1).to(mixed.dtype).log() if prior is None else prior[i]
    of_one = torch.zeros_like(density[i]) if alone is None else alone[i]
    ratio = torch.where(number > 0, of_several, of_one) - density[i]
    share = t.exp() / t.exp().sum(0)
    if drawn is not None:
        weight = torch.nn.functional.one_hot(drawn.index[i], samples).T.to(ratio.dtype).where(number > 0, 1 / samples)
        fit, marginal, ess = own[0] - t[0], t[0] + drawn.gap[i], drawn.ess[i]
    else:
        weight = share if stop_gradient is False else share.detach()
        weight = weight * samples * torch.eye(samples, dtype=weight.dtype, device=t.device)[:1].T if estimator == "released" else weight
        fit, marginal, ess = (weight * (own - t)).sum(0), t.exp().mean(0).log(), 1 / share.square().sum(0)
    sampled = (weight * ratio).sum(0)
    exact = number == 1 if prior is None else number > 0
    log_ratio = sampled if closed is None else torch.where(exact, weight.sum(0) * closed[i], sampled)
    objective = ((fit + log_ratio + cross_weight * marginal) / observed.sum(0).clamp(min=1)).where(here, 0.0)
    reconstruction = (weight * own).sum(0) if estimator == "rao_blackwell" else own[0]
    paired = [x.where(number > 0, 0.0) for x in (marginal, ess)]
    return objective, torch.stack([x.where(here, 0.0) for x in (fit + sampled + marginal, reconstruction, log_ratio)] + paired)


# ---- what the op says of itself ----------------------------------------------------------------------------------------------------------

_SIZES = {
    "tiny": [(2, 3, 5), (2, 1, 1), (3, 5, 33), (5, 2, 7), (3, 4, 0), (1, 3, 4)],
    "small": [(2, 11, 128)],
    "paper": [(5, 11, 128)],
    "large": [(8, 16, 16384)],
}


def _cases(size: Size, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    for n, k, b in _SIZES[size]:
        for estimator in ESTIMATORS:
            for variant in ("plain", "everything") if size == "tiny" else ("plain",):
                yield _case(n, k, b, estimator, variant, device, dtype)


def _case(n: int, k: int, b: int, estimator: Estimator, variant: str, device: torch.device, dtype: torch.dtype) -> Case:
    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype).requires_grad_()

    observed = torch.rand(n, b, device=device) > 0.3
    decoded, owns = 1 if estimator == "resampled" else k, k if estimator == "rao_blackwell" else 1
    arguments = (leaf(n, owns, b), leaf(n, n, decoded, b), leaf(n, n, k, b), observed)
    settings: dict[str, Any] = {"estimator": estimator, "cross_weight": 10.0}
    if estimator == "resampled":
        uniform = torch.rand(2, n, b, device=device)
        settings["drawn"] = Drawn((uniform[0] * k).long(), uniform[1], 1 + uniform[0])
    if variant == "everything":
        settings |= {"prior": leaf(n, k, b), "alone": leaf(n, k, b), "closed": leaf(n, b), "stop_gradient": estimator == "resampled"}
    return Case(f"N={n} K={k} B={b} {estimator} {variant}", arguments, settings)


def _cost(own: Tensor, cross: Tensor, density: Tensor, observed: Tensor, *, backward: bool = False, **settings: Any) -> Cost:
    inputs = [own, cross, density] + [settings.get(name) for name in ("prior", "alone", "closed")]
    read, sums = nbytes(*inputs, observed, *(settings.get("drawn") or ())), observed.numel() * density.element_size()
    flops = 8 * density.numel()
    return Cost(read + sums, nbytes(*inputs), 2 * flops) if backward else Cost(read, (1 + len(METRICS)) * sums, flops)


OP = FusedOp(name="meme_bound", call=meme_bound, reference=reference, naive=naive, cases=_cases, cost=_cost)
