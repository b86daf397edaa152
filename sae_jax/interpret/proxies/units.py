"""Measures how well the activation of a unit, a latent or a neuron, tells where a concept is.

Units and thresholds are chosen on the half of the text for finding, and measured on the other half
(`Activity.held_out`), so that the best of many is not praised for its luck.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import scipy.sparse

from sae_jax.interpret.activity import Activity, peaks
from sae_jax.interpret.passes import blocks_of
from sae_jax.interpret.proxies.bank import Proxy

BINS, BANDS, TOP = 48, 12, 20
_AT_ONCE = 8  # targets, whose values are in memory as float64


@dataclasses.dataclass(frozen=True)
class Halves:
    """The tokens that count of each half of a text, over all sequences in a row.

    Attributes:
      found: those on which units are chosen, (n*T,) bool.
      tested: those on which they are measured, (n*T,) bool.
      length: T.
    """

    found: np.ndarray
    tested: np.ndarray
    length: int

    @classmethod
    def of(cls, activity: Activity) -> "Halves":
        """Returns the halves of an activity's text."""
        held_out = activity.held_out[:, None]
        halves = (activity.used & ~held_out, activity.used & held_out)
        return cls(*(half.reshape(-1) for half in halves), activity.tokens.shape[1])


@dataclasses.dataclass(frozen=True)
class Detection:
    """How well a unit at or above a threshold tells the tokens inside a concept.

    Attributes:
      threshold: the activation from which it counts as active; 0 for all above 0.
      precision: the share of its tokens that are inside; None where it has none.
      recall: the share of the tokens inside that are its own; None where there are none.
      f1: their harmonic mean.
    """

    threshold: float
    precision: float | None
    recall: float | None
    f1: float


@dataclasses.dataclass(frozen=True)
class Unit:
    """What was measured of a unit and a concept, on the half of the text for that.

    Attributes:
      unit: its number.
      sign: 1, or -1 for a neuron whose values below 0 go with the concept; the rest is of its
        values times the sign.
      active: on how many tokens it is above 0.
      pearson: the correlation of its activation and the proxy over tokens; None where either is
        constant.
      pearson_inside: the same with 1 inside the concept and 0 outside.
      above_zero: how well it tells tokens where it is above 0.
      at_best: the same at the threshold with the best F1 on the other half.
      mass: the share of the sum of its activations that is inside; None where that is 0.
      top: how many of the tokens with its `TOP` highest peaks, one of a sequence, are inside.
      of_top: how many peaks there are.
      high: its largest activation.
      inside: its tokens inside the concept, in each of `BINS` equal parts of 0 to `high`.
      outside: its tokens outside.
      mass_inside: the sum of the activations of those inside.
      mass_outside: of those outside.
      bands: the share of its tokens that is inside, in each of `BANDS` parts; None where it has
        none there.
      sensitivity: the share of tokens of documents with the concept's labels on which it is above
        0; None without labels.
      documents: the share of these documents with such a token.
    """

    unit: int
    sign: int
    active: int
    pearson: float | None
    pearson_inside: float | None
    above_zero: Detection
    at_best: Detection
    mass: float | None
    top: int
    of_top: int
    high: float
    inside: list[int]
    outside: list[int]
    mass_inside: list[float]
    mass_outside: list[float]
    bands: list[float | None]
    sensitivity: float | None = None
    documents: float | None = None


def correlations(activity: Activity, targets: list[np.ndarray], where: np.ndarray) -> np.ndarray:
    """Returns the Pearson correlation of targets with all latents, (targets, d_sae) float64.

    It is NaN where one of both is constant. Work goes with the events, not with latents times
    tokens.

    Args:
      activity: where the latents are active.
      targets: values of each token, (n*T,) each.
      where: the tokens that count, (n*T,) bool.
    """
    sums, products = _products(activity, targets, where, lambda values: values)
    (squares, _) = _products(activity, [], where, np.square)
    totals = np.array([_moments(target[where]) for target in targets]).reshape(-1, 2)
    return pearson(int(where.sum()), sums, squares, totals[:, :1], totals[:, 1:], products)


def latents_inside(activity: Activity, concepts: list[np.ndarray], where: np.ndarray) -> np.ndarray:
    """Returns how many latents have most of their tokens inside each concept, (concepts,).

    Those that are active on less than `TOP` of the tokens do not count.

    Args:
      activity: where the latents are active.
      concepts: the tokens inside each, (n*T,) bool.
      where: the tokens that count, (n*T,) bool.
    """
    active, inside = _products(activity, concepts, where, np.ones_like)
    return ((inside > active / 2) & (active >= TOP)).sum(axis=1)


def _products(
    activity: Activity, targets: list[np.ndarray], where: np.ndarray, of: Callable
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the sums over tokens of something of each latent's activation, (d_sae,), and of its
    products with targets, (targets, d_sae).

    of: takes activations, and gives what is summed.
    """
    sums = np.zeros(activity.d_sae)
    products = np.zeros((len(targets), activity.d_sae))
    for at in range(0, max(len(targets), 1), _AT_ONCE):
        part = targets[at : at + _AT_ONCE]
        columns = np.stack([where, *(np.where(where, target, 0) for target in part)], axis=1)
        columns = columns.astype(np.float64)
        for first, stop in blocks_of(activity.counts):
            starts, rows, values = activity.between(first, stop)
            shape = (stop - first, len(where))
            events = scipy.sparse.csr_array((of(values.astype(np.float64)), rows, starts), shape)
            found = events @ columns
            sums[first:stop] = found[:, 0]
            products[at : at + len(part), first:stop] = found[:, 1:].T
    return sums, products


def pearson(count, sums, squares, target_sums, target_squares, products) -> np.ndarray:
    """Returns correlations from the sums of values, squares and products; NaN where constant."""
    with np.errstate(invalid="ignore", divide="ignore"):
        covariance = products - sums * target_sums / count
        spread = np.maximum(squares - sums**2 / count, 0)
        target_spread = np.maximum(target_squares - target_sums**2 / count, 0)
        scale = np.sqrt(spread * target_spread)
        found = np.where(
            scale > 1e-9 * np.sqrt(squares * target_squares), covariance / scale, np.nan
        )
    return np.clip(found, -1, 1)


def measured(
    unit: int,
    rows: np.ndarray,
    values: np.ndarray,
    proxy: Proxy,
    halves: Halves,
    *,
    sign: int = 1,
    below: np.ndarray | None = None,
    labelled: np.ndarray | None = None,
    documents: np.ndarray | None = None,
) -> Unit:
    """Returns what is measured of a unit and a concept.

    Args:
      unit: the unit's number.
      rows: the tokens on which it is above 0, (m,).
      values: its activations there, (m,).
      proxy: the concept.
      halves: the halves of the text.
      sign: what its values were multiplied with.
      below: the values of a neuron on all tokens, (n*T,), those below 0 too; None: it is 0 where it
        is not above.
      labelled: the tokens of documents with the concept's labels, (n*T,) bool; None: not known.
      documents: the number of the document of each token, (n*T,).
    """
    target, inside = proxy.values.reshape(-1), proxy.inside.reshape(-1)
    threshold = _best_threshold(rows, values, inside, halves.found)
    tested = halves.tested[rows]
    rows, values = rows[tested], values[tested].astype(np.float64)
    total = int((inside & halves.tested).sum())
    hit, mass = inside[rows], values.sum()
    whole = below[halves.tested] if below is not None else None
    high = float(values.max(initial=0))
    part = np.minimum((values / max(high, 1e-30) * BINS).astype(int), BINS - 1)
    counts = [np.bincount(part[side], minlength=BINS) for side in (hit, ~hit)]
    masses = [np.bincount(part[side], values[side], minlength=BINS) for side in (hit, ~hit)]
    by_band = (side.reshape(BANDS, -1).sum(axis=1).tolist() for side in counts)
    bands = list(zip(*by_band, strict=True))
    highest = rows[peaks(rows, values, halves.length)[:TOP]]
    return Unit(
        unit=int(unit),
        sign=int(sign),
        active=len(rows),
        pearson=_correlation(rows, values, target, halves.tested, whole),
        pearson_inside=_correlation(rows, values, inside, halves.tested, whole),
        above_zero=_detection(0.0, hit, total),
        at_best=_detection(threshold, hit[values >= threshold], total),
        mass=float(values[hit].sum() / mass) if mass else None,
        top=int(inside[highest].sum()),
        of_top=len(highest),
        high=high,
        inside=counts[0].tolist(),
        outside=counts[1].tolist(),
        mass_inside=masses[0].tolist(),
        mass_outside=masses[1].tolist(),
        bands=[i / (i + o) if i + o else None for i, o in bands],
        **_sensitivity(rows, halves.tested, labelled, documents),
    )


def _moments(values: np.ndarray) -> tuple[float, float]:
    return values.sum(dtype=np.float64), np.square(values, dtype=np.float64).sum()


def _correlation(rows, values, target, tested, whole) -> float | None:
    """Returns the correlation of a unit with a target over the tested tokens.

    whole: the unit's values there; None where it is 0 beside `rows`.
    """
    own = _moments(values) if whole is None else _moments(whole)
    if whole is None:
        product = np.dot(values, target[rows].astype(np.float64))
    else:
        product = np.dot(whole.astype(np.float64), target[tested].astype(np.float64))
    found = pearson(int(tested.sum()), *own, *_moments(target[tested]), product)
    return float(found) if np.isfinite(found) else None


def _best_threshold(rows, values, inside, found) -> float:
    """Returns the activation from which F1 is best on the half for finding; 0 if there is none."""
    here = found[rows]
    rows, values = rows[here], values[here]
    if not len(rows):
        return 0.0
    order = np.argsort(-values, kind="stable")
    ordered, hits = values[order], np.cumsum(inside[rows[order]])
    f1 = 2 * hits / (np.arange(1, len(rows) + 1) + (inside & found).sum())
    last = np.append(ordered[1:] < ordered[:-1], True)  # of those with the same value
    return float(ordered[np.argmax(np.where(last, f1, -1))])


def _detection(threshold: float, hit: np.ndarray, total: int) -> Detection:
    """Returns how well tokens, of which `hit` are inside, tell all the `total` that are."""
    hits, active = int(hit.sum()), len(hit)
    return Detection(
        threshold,
        hits / active if active else None,
        hits / total if total else None,
        2 * hits / (active + total) if active + total else 0.0,
    )


def _sensitivity(rows, tested, labelled, documents) -> dict[str, float]:
    if labelled is None or not (labelled & tested).any():
        return {}
    ours = labelled & tested
    on = rows[ours[rows]]
    return {
        "sensitivity": len(on) / int(ours.sum()),
        "documents": len(np.unique(documents[on])) / len(np.unique(documents[ours])),
    }
