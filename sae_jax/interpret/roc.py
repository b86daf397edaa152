"""The area under the ROC curve."""

import numpy as np
import scipy.stats


def auc(ones: np.ndarray, zeros: np.ndarray) -> tuple[float, float]:
    """Returns how often a value of `ones` is above one of `zeros`, ties counting as half.

    The second number is its standard error (DeLong et al. 1988), NaN where either has fewer than 2
    values. Both have at least one.
    """
    m, n = len(ones), len(zeros)
    ranks = scipy.stats.rankdata(np.concatenate([ones, zeros]))
    below = (ranks[:m] - scipy.stats.rankdata(ones)) / n  # for each of the ones, the part below
    if min(m, n) < 2:
        return float(below.mean()), float("nan")
    above = 1 - (ranks[m:] - scipy.stats.rankdata(zeros)) / m
    return float(below.mean()), float(np.sqrt(below.var(ddof=1) / m + above.var(ddof=1) / n))
