"""Figures of a comparison. Pure functions of numbers."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Paired:
    """How a method differs from the baseline over seeds, each seed with itself.

    mean: of method minus baseline.  low, high: its 95 % interval by Student's t; None with one seed.
    p: how often chance alone would give such a mean or one further from zero, by Student's t; None with one seed.
    lower, count: on how many of all seeds the method's value is the lower one.
    """

    mean: float
    low: float | None
    high: float | None
    p: float | None
    lower: int
    count: int


def standard_error(values: Sequence[float]) -> float | None:
    """Return that of the mean; None for one value."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def paired(values: Sequence[float], baseline: Sequence[float]) -> Paired:
    """`values` and `baseline` have the same seeds in the same order."""
    differences = np.subtract(values, baseline)
    mean, error = float(differences.mean()), standard_error(differences.tolist())
    half = None if error is None else float(stats.t.ppf(0.975, len(differences) - 1)) * error
    low, high = (None, None) if half is None else (mean - half, mean + half)
    p = None
    if error is not None:
        p = float(2 * stats.t.sf(abs(mean) / error, len(differences) - 1)) if error else float(mean == 0)
    return Paired(mean, low, high, p, int((differences < 0).sum()), len(differences))


def holm(ps: Sequence[float]) -> list[float]:
    """The p values of several comparisons, corrected for their number (Holm 1979): the smallest counts n times."""
    order = sorted(range(len(ps)), key=lambda index: ps[index])
    corrected, largest = [0.0] * len(ps), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min((len(ps) - rank) * ps[index], 1.0))
        corrected[index] = largest
    return corrected


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval over seeds; None with one seed."""

    value: float
    low: float | None
    high: float | None


def fraction_of_gain(values: Sequence[float], exact: Sequence[float], baseline: Sequence[float]) -> Estimate | None:
    """Return how much of what `exact` is below the baseline, on average, `values` are below it.

    All have the same seeds in the same order. The interval is Fieller's (1954): the fractions r for which the mean of
    (baseline - values) - r (baseline - exact) cannot be told from 0. None if `exact` cannot be told from the baseline,
    or is above it: then every fraction might be the true one.
    """
    gain = paired(baseline, exact)
    if gain.low is None or not gain.low > 0:
        return None
    ours, theirs = np.subtract(baseline, values), np.subtract(baseline, exact)
    t = float(stats.t.ppf(0.975, len(ours) - 1))
    (of_ours, of_both), (_, of_theirs) = np.cov(ours, theirs) * t * t / len(ours)
    square = theirs.mean() ** 2 - of_theirs  # above 0, for theirs.mean() - t errors is
    middle = (ours.mean() * theirs.mean() - of_both) / square
    half = math.sqrt(max(middle**2 - (ours.mean() ** 2 - of_ours) / square, 0.0))
    return Estimate(float(ours.mean() / theirs.mean()), float(middle - half), float(middle + half))


@dataclass(frozen=True)
class Line:
    """log loss = intercept + slope log compute."""

    intercept: float
    slope: float

    def loss(self, compute: float) -> float:
        return math.exp(self.intercept + self.slope * math.log(compute))

    def log_compute(self, loss: float) -> float:
        """Return the logarithm of the compute at which the line has that loss."""
        return (math.log(loss) - self.intercept) / self.slope


def fit_line(compute: Sequence[float], losses: Sequence[float]) -> Line:
    """The line of least squares, in the logarithms of both."""
    slope, intercept = np.polyfit(np.log(compute), np.log(losses), 1)
    return Line(float(intercept), float(slope))


@dataclass(frozen=True)
class Curve:
    """Loss, in nats per token, after `tokens` training tokens, in their order."""

    tokens: tuple[float, ...]
    loss: tuple[float, ...]

    @property
    def final(self) -> float:
        return self.loss[-1]


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean at each point; all curves have the same points."""
    return dataclasses.replace(curves[0], loss=tuple(np.mean([curve.loss for curve in curves], axis=0).tolist()))


def tokens_to_reach(curve: Curve, target: float) -> float:
    """Training tokens after which the loss is first at most `target`, straight between evaluations.

    Infinity if it never is. Nothing is known before the first evaluation: its tokens are the least that is returned.
    """
    before: tuple[float, float] | None = None
    for tokens, loss in zip(curve.tokens, curve.loss, strict=True):
        if loss <= target:
            if before is None:
                return tokens
            return before[0] + (tokens - before[0]) * (before[1] - target) / (before[1] - loss)
        before = tokens, loss
    return math.inf
