"""A sparse Gaussian process from latents to a number: how smooth a function of z a property is, and what to try next.

    y ~ f(z) + N(0, s^2),   f ~ GP(0, a^2 exp(-|z - z'|^2 / (2 l^2)))

with y standardised and z scaled to one spread in all. a, l and s are those of highest likelihood on the inducing rows alone (an exact
process of them), the prediction uses all rows through them (projected process; Rasmussen and Williams 2006, sections 5.4.1 and 8.3.4):

    mean = k_m(z)' A^-1 K_mn y,   var = k(z, z) - k_m(z)' K_mm^-1 k_m(z) + s^2 k_m(z)' A^-1 k_m(z),   A = s^2 K_mm + K_mn K_nm
"""

import math
from typing import NamedTuple

import numpy as np
from scipy import special
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize
from scipy.spatial.distance import cdist

JITTER = 1e-6  # of the inducing rows' covariance, in units of its diagonal
TINY = 1e-12  # of the trace of what is factored at the end
START = (1.0, 1.0, 0.1)  # a^2, l, s^2
BOUNDS = ((1e-2, 1e3), (1e-2, 1e3), (1e-5, 1e1))
ITERATIONS = 50  # of the search for them
ALIKE = BOUNDS[1][0] / 10  # rows so near each other are one row to a process of the shortest length


class Fitted(NamedTuple):
    """A process that has seen its rows. Lengths are in units of the latents' spread, variances in units of the values'."""

    inducing: np.ndarray
    weight: np.ndarray
    spread: float
    centre: tuple[float, float]
    variance: float
    length: float
    noise: float
    factors: tuple[np.ndarray, np.ndarray]


class Predictivity(NamedTuple):
    """Errors on rows that were held out: the root of the mean square, in standard deviations of the training values, and Pearson's r."""

    rmse: float
    correlation: float


def fit(z: np.ndarray, y: np.ndarray, *, inducing: int = 500, seed: int = 0) -> Fitted:
    """A process from z [R, D] to y [R]; `inducing` rows of them, drawn by `seed`, no two alike, carry it (all that there are of fewer).

    Raises ValueError for fewer than two rows, for values that are all alike, and for numbers that are not finite.
    """
    if len(z) < 2 or not (np.isfinite(z).all() and np.isfinite(y).all()) or np.ptp(y) == 0:
        raise ValueError(f"a Gaussian process needs two rows or more of finite, differing values; got {len(z)} rows")
    z, y = z.astype(np.float64), y.astype(np.float64)
    spread = float(np.sqrt(z.var(0).sum())) or 1.0
    centre = (float(y.mean()), float(y.std()))
    scaled, target = z / spread, (y - centre[0]) / centre[1]
    chosen = _different(scaled, np.random.default_rng(seed).permutation(len(scaled)), inducing)
    variance, length, noise = _hyperparameters(scaled[chosen], target[chosen])
    points = scaled[chosen]
    between = _covariance(points, points, variance, length) + JITTER * variance * np.eye(len(points))
    cross = _covariance(points, scaled, variance, length)
    joint = noise * between + cross @ cross.T
    low, _ = cho_factor(joint + TINY * np.trace(joint) * np.eye(len(joint)), lower=True)
    weight = cho_solve((low, True), cross @ target)
    return Fitted(points, weight, spread, centre, variance, length, noise, (cho_factor(between, lower=True)[0], low))


def predict(process: Fitted, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of f at z [R, D], in the values' own unit."""
    near = _covariance(process.inducing, z / process.spread, process.variance, process.length)
    between, joint = process.factors
    explained = (near * cho_solve((between, True), near)).sum(0)
    left = process.noise * (near * cho_solve((joint, True), near)).sum(0)
    variance = np.maximum(process.variance - explained + left, 0)
    return process.centre[0] + process.centre[1] * (near.T @ process.weight), process.centre[1] * np.sqrt(variance)


def predictivity(predicted: np.ndarray, y: np.ndarray, *, unit: float) -> Predictivity:
    """Of predictions for held-out values y, both [R]; `unit` is the standard deviation of the training values."""
    rmse = float(np.sqrt(np.square(predicted - y).mean())) / unit
    flat = np.ptp(predicted) == 0
    return Predictivity(rmse, 0.0 if flat else float(np.corrcoef(predicted, y)[0, 1]))


def expected_improvement(mean: np.ndarray, deviation: np.ndarray, best: float) -> np.ndarray:
    """E max(f - best, 0) where f ~ N(mean, deviation^2): what a trial is worth to one who looks for high values (Mockus 1975)."""
    gain, safe = mean - best, np.maximum(deviation, 1e-12)
    return gain * special.ndtr(gain / safe) + safe * np.exp(-0.5 * (gain / safe) ** 2) / math.sqrt(2 * math.pi)


def _different(z: np.ndarray, order: np.ndarray, most: int) -> list[int]:
    """The first rows in this order that are not alike: pairs of equal values the likeliest process would explain by a length of nothing.

    Rows of one graph differ by rounding, which depends on their batch; a length within that is as bad as one of nothing.
    """
    chosen: list[int] = []
    for row in order:
        if len(chosen) == most:
            break
        if not chosen or cdist(z[chosen], z[row : row + 1]).min() > ALIKE:
            chosen.append(int(row))
    return chosen


def _hyperparameters(z: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    square, eye = cdist(z, z, "sqeuclidean"), np.eye(len(z))

    def loss(logarithms: np.ndarray) -> tuple[float, np.ndarray]:
        """-log p(y) without its constant, and its gradient 1/2 tr((K^-1 - K^-1 y y' K^-1) dK)."""
        variance, length, noise = np.exp(logarithms)
        smooth = variance * np.exp(-0.5 * square / length**2)
        factor = cho_factor(smooth + (noise + JITTER * variance) * eye, lower=True)
        weight, inverse = cho_solve(factor, y), cho_solve(factor, eye)
        steep = inverse - np.outer(weight, weight)
        gradient = [(steep * part).sum() / 2 for part in (smooth + JITTER * variance * eye, smooth * square / length**2, noise * eye)]
        return float(y @ weight / 2 + np.log(np.diag(factor[0])).sum()), np.array(gradient)

    found = minimize(loss, np.log(START), method="L-BFGS-B", jac=True, bounds=np.log(BOUNDS), options={"maxiter": ITERATIONS})
    variance, length, noise = np.exp(found.x)
    return float(variance), float(length), float(noise)


def _covariance(a: np.ndarray, b: np.ndarray, variance: float, length: float) -> np.ndarray:
    return variance * np.exp(-0.5 * cdist(a, b, "sqeuclidean") / length**2)
