"""The statistics of an ablation: intervals, verdicts, and the tests of contrasts that were named before the runs."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95  # of the intervals over seeds; tests have the level 1 - LEVEL
EQUIVALENT = 3.0  # points: contrasts surely smaller than this count as equivalent


def t_interval(values: list[float]) -> tuple[float, float]:
    """The interval of the mean at LEVEL (Student's t, n - 1 degrees of freedom); NaN for fewer than 2 values."""
    if len(values) < 2:
        return math.nan, math.nan
    half = stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return float(np.mean(values) - half), float(np.mean(values) + half)


def over_seeds(values: list[float]) -> dict:
    return {"mean": float(np.mean(values)), "interval": list(t_interval(values)), "seeds": values}


def verdict(interval: list[float], paper: float | None) -> str:
    """The verdict on an interval of differences. paper: the paper's difference or None; only its sign counts."""
    low, high = interval
    if math.isnan(low):
        return "no interval"
    if low <= 0 <= high:
        return "no difference"
    return _direction(low, paper)


def _direction(difference: float, paper: float | None) -> str:
    """The verdict on a difference that is not 0."""
    if paper is None:
        return "higher" if difference > 0 else "lower"
    return "same sign as the paper" if (difference > 0) == (paper > 0) else "opposite"


# ---- contrasts that were named before the runs -------------------------------------------------------------


class Verdict(NamedTuple):
    """The tests of one contrast, in [0, 1]; NaN for fewer than 2 values.

    p: of the paired t-test, two-sided, that the mean is not 0. equivalent_p: of the two one-sided t-tests that it lies
    within EQUIVALENT of 0. holm, equivalent_holm: these after Holm's correction (Holm 1979) over all contrasts.
    """

    p: float
    holm: float
    equivalent_p: float
    equivalent_holm: float
    verdict: str


def judged(contrasts: Sequence[list[float]], papers: Sequence[float | None]) -> list[Verdict]:
    """contrasts: for each one its differences, in points, paired by seed; papers: the paper's difference of each."""
    if any(len(values) < 2 for values in contrasts):
        return [Verdict(math.nan, math.nan, math.nan, math.nan, "no interval")] * len(contrasts)
    ps = [float(stats.ttest_1samp(values, 0).pvalue) for values in contrasts]
    equivalent = [_equivalence(values) for values in contrasts]
    rows = []
    for values, paper, *tests in zip(contrasts, papers, ps, holm(ps), equivalent, holm(equivalent), strict=True):
        words = "not decided"
        if tests[1] < 1 - LEVEL:
            words = _direction(float(np.mean(values)), paper)
        elif tests[3] < 1 - LEVEL:
            words = f"equivalent, within {EQUIVALENT:g} points"
        rows.append(Verdict(*tests, words))
    return rows


def _equivalence(values: list[float]) -> float:
    """p of the two one-sided t-tests (Schuirmann 1987)."""
    sides = ((-EQUIVALENT, "greater"), (EQUIVALENT, "less"))
    return float(max(stats.ttest_1samp(values, bound, alternative=side).pvalue for bound, side in sides))


def holm(ps: Sequence[float]) -> list[float]:
    """p values after the correction for their number: the level holds for all of them together."""
    order = np.argsort(ps)
    adjusted = np.maximum.accumulate([min(1.0, (len(ps) - rank) * ps[at]) for rank, at in enumerate(order)])
    return [float(adjusted[place]) for place in np.argsort(order)]
