"""Says how well predictions agree with what is true."""

import numpy as np
import scipy.stats


def accuracy(truth: np.ndarray, predicted: np.ndarray) -> float | None:
    """Returns the part of the predictions that is right; None where there are none."""
    return float(np.mean(truth == predicted)) if len(truth) else None


def balanced_accuracy(truth: np.ndarray, predicted: np.ndarray) -> float | None:
    """Returns the mean of the parts of the ones, and of the zeros, that are predicted.

    It is exactly 0.5 for predictions that are all the same, and None where `truth` is.
    """
    yes, no = truth == 1, truth == 0
    if not yes.any() or not no.any():
        return None
    return float(((predicted[yes] == 1).mean() + (predicted[no] == 0).mean()) / 2)


def f1(truth: np.ndarray, predicted: np.ndarray) -> float | None:
    """Returns the harmonic mean of precision and recall; 0 where no one is found, None where there
    are none."""
    if not (truth == 1).any():
        return None
    return float(2 * np.sum(truth * predicted) / (truth.sum() + predicted.sum()))


def pearson(truth: np.ndarray, predicted: np.ndarray) -> float | None:
    """Returns the correlation; 0 for predictions that are all the same, None where `truth` is."""
    if not len(truth) or np.ptp(truth) == 0:
        return None
    if np.ptp(predicted) == 0:
        return 0.0
    return float(np.corrcoef(truth, predicted)[0, 1])


def spearman(truth: np.ndarray, predicted: np.ndarray) -> float | None:
    """Returns the correlation of the ranks, as `pearson` does."""
    if not len(truth):
        return None
    return pearson(scipy.stats.rankdata(truth), scipy.stats.rankdata(predicted))
