"""The statistics of reports: small pure functions over per-seed values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import DescrStatsW

NAN = float("nan")
PERMUTATIONS = 2**14
"""Flips of signs that are tried: all of them up to 14 seeds, so many at random beyond."""


@dataclass(frozen=True)
class Summary:
    """Mean of n values; NaN where n does not allow a number."""

    n: int
    mean: float
    sd: float
    """Sample standard deviation (n - 1)."""
    low: float
    high: float
    """Ends of the t interval of the mean."""


@dataclass(frozen=True)
class Paired:
    """Difference of two methods over the seeds that both have."""

    n: int
    difference: float
    low: float
    high: float
    """Ends of the t interval of the mean difference."""
    p_t: float
    """Paired t test, two-sided."""
    p_permutation: float
    """Test by flipping signs, two-sided, exact up to 14 seeds; with n of them at least
    2 ** (1 - n)."""


def mean_of_learnt(values: npt.NDArray[np.float64]) -> float:
    """Return the mean over what is a number; NaN if nothing is."""
    learnt = values[np.isfinite(values)]
    return float(learnt.mean()) if len(learnt) else NAN


def mean_accuracy(matrix: npt.NDArray[np.float64]) -> float:
    """Return the mean of the last row of R, shape (tasks, tasks), over the tasks learnt."""
    return mean_of_learnt(matrix[-1])


def backward_transfer(matrix: npt.NDArray[np.float64]) -> float:
    """Return BWT, the mean over j < T - 1 of R[T-1, j] - R[j, j] (Lopez-Paz and Ranzato 2017).

    Returns
    -------
    float
        In the unit of R, over the tasks that were learnt; NaN with one task, or if the first was
        not measured by itself, since then tasks were learnt together.
    """
    if np.isnan(matrix[0, 0]):
        return NAN
    return mean_of_learnt((matrix[-1] - np.diag(matrix))[:-1])


def summarise(values: Sequence[float], level: float = 0.95) -> Summary:
    """Return mean, deviation and t interval of one value a seed."""
    n = len(values)
    if n == 0:
        return Summary(0, NAN, NAN, NAN, NAN)
    mean = float(np.mean(values))
    if n == 1:
        return Summary(1, mean, NAN, NAN, NAN)
    sd = float(np.std(values, ddof=1))
    half = float(stats.t.ppf((1 + level) / 2, n - 1)) * sd / n**0.5
    return Summary(n, mean, sd, mean - half, mean + half)


def paired(first: Sequence[float], second: Sequence[float], level: float = 0.95) -> Paired:
    """Compare two methods seed by seed.

    Parameters
    ----------
    first, second
        Values of the same seeds, in the same order.
    level
        Of the interval.

    Returns
    -------
    Paired
        Of first - second; tests are NaN below two seeds, the t test also without any spread.
    """
    differences = np.subtract(first, second)
    summary = summarise(list(differences), level)
    if summary.n < 2:
        return Paired(summary.n, summary.mean, NAN, NAN, NAN, NAN)
    p_t = stats.ttest_rel(first, second).pvalue if summary.sd > 0 else NAN
    permutation = stats.permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",
        n_resamples=PERMUTATIONS,
        random_state=np.random.default_rng(0),  # the same records give the same bytes
    )
    return Paired(
        summary.n, summary.mean, summary.low, summary.high, float(p_t), float(permutation.pvalue)
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values corrected by Holm; NaN stays NaN and does not count."""
    p = np.array(p_values, dtype=np.float64)
    known = ~np.isnan(p)
    if known.any():
        p[known] = multipletests(p[known], method="holm")[1]
    return [float(value) for value in p]


def equivalence(values: Sequence[float], target: float, margin: float) -> float:
    """Return the p value of two one-sided t tests (TOST).

    The null hypothesis is that the mean lies `margin` or more away from `target`; a small p shows
    equivalence. NaN below two values.
    """
    if len(values) < 2:
        return NAN
    if np.ptp(values) == 0:  # no spread: the t statistics would divide by 0
        return float(abs(values[0] - target) >= margin)
    return float(DescrStatsW(values).ttost_mean(target - margin, target + margin)[0])
