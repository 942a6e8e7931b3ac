"""What a list of times says, and how two of them compare."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000


class Spread(NamedTuple):
    """The middle of a sample and its edges; load spoils the least last."""

    p20: float
    p50: float
    p80: float
    least: float


def spread(times: Sequence[float]) -> Spread:
    """Quantiles of a sample."""
    p20, p50, p80 = (float(p) for p in np.percentile(times, (20, 50, 80)))
    return Spread(p20, p50, p80, float(min(times)))


def interleaved_ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """The median of the ratios round by round: a slow moment hits both sides of one.

    Where the one has fewer rounds than the other, the first of them are compared.
    """
    return float(np.median(_ratios(times, base)))


class Interval(NamedTuple):
    """A ratio, and bounds that hold it nine times in ten."""

    low: float
    ratio: float
    high: float


def ratio_of_medians(new: Sequence[float], old: Sequence[float]) -> Interval:
    """`new` over `old`, with a bootstrap's interval; the same one at every call."""
    rng = np.random.default_rng(0)

    def medians(times: Sequence[float]) -> np.ndarray:
        return np.median(rng.choice(times, (RESAMPLES, len(times))), axis=1)

    ratios = medians(new) / medians(old)
    low, high = np.percentile(ratios, (5, 95))
    return Interval(float(low), float(np.median(new) / np.median(old)), float(high))


def interval_of_rounds(times: Sequence[float], base: Sequence[float]) -> Interval:
    """`interleaved_ratio`, with a bootstrap's interval; the same one at every call."""
    ratios = _ratios(times, base)
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, (RESAMPLES, len(ratios))), axis=1)
    low, high = np.percentile(medians, (5, 95))
    return Interval(float(low), float(np.median(ratios)), float(high))


def _ratios(times: Sequence[float], base: Sequence[float]) -> np.ndarray:
    rounds = min(len(times), len(base))
    return np.divide(times[:rounds], base[:rounds])
