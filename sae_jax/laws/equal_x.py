"""Groups at equal x: what the frontier of each comes to at one place, such as an L0 of 16.

What a setting's seeds have as x, such as the L0 of a target, scatters, so that its runs are on both
sides of a place that the setting is meant for. Which seeds count therefore follows from the
settings' means, never from a run's own x: a choice by that would keep the best runs, or the worst.
"""

import math

import numpy as np

from sae_jax.errors import UserError, some
from sae_jax.laws.alike import SAME_X, Setting, mean

REACHED = 0.05  # relative: a place so near a frontier's end is reached
_WIDE = 1.1  # a slope is taken over at least this factor to either side, where there is so much
_MOST_PLACES = 5  # at which groups are compared by default


def shared_places(made: list[Setting], names: list[str]) -> tuple[float, ...]:
    """Returns powers of two that the frontiers of all groups reach, or else a place in the middle
    of what they share; () where they share nothing.

    Args:
      made: the settings.
      names: the groups.
    """
    lines = [_line(made, group) for group in names]
    if not all(lines):
        return ()
    low = max(mean(line[0].x) for line in lines) / (1 + REACHED)
    high = min(mean(line[-1].x) for line in lines) / (1 - REACHED)
    if low > high:
        return ()
    powers = [2.0**i for i in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)]
    if len(powers) > _MOST_PLACES:
        few = np.linspace(0, len(powers) - 1, _MOST_PLACES).round()
        powers = [powers[int(place)] for place in few]
    if powers:
        return tuple(powers)
    middle = math.sqrt(low * high)
    rounded = (float(f"{middle:.{digits}g}") for digits in range(2, 17))
    return (next((place for place in rounded if low <= place <= high), middle),)


def at_place(made: list[Setting], group: str, place: float, logs: bool) -> np.ndarray:
    """Returns the y of each seed at x = `place` on a group's frontier.

    It is that of the setting whose mean x is the place within 1%, or else interpolated between the
    settings on both sides in the logarithm of x, and of y with `logs`, or that of the frontier's
    end where that is within 5%. Each seed is moved from its own x along the slope of the means. The
    seeds are those that have runs in all settings that are needed; none where the frontier does not
    reach the place.

    Args:
      made: the settings of all groups.
      group: the group's name.
      place: the x, positive.
      logs: whether y, which is then positive, is interpolated in its logarithm.
    """
    line = _line(made, group)
    weights = _weights([mean(setting.x) for setting in line], place)
    if not weights:
        return np.array([])
    slope, values = _slope(line, place, logs), []
    runs = {at: dict(zip(line[at].seeds, _points(line[at], logs), strict=True)) for at in weights}
    first, *others = runs.values()
    for seed in first:
        if all(seed in of_setting for of_setting in others):
            x, y = sum(weight * runs[at][seed] for at, weight in weights.items())
            value = y + slope * (math.log(place) - x)
            values.append(math.exp(value) if logs else value)
    return np.array(values)


def not_reached(
    values: dict[str, tuple[np.ndarray, ...]],
    at: tuple[float, ...],
    made: list[Setting],
    what: str,
    given: bool,
) -> list[str]:
    """Returns notes on the groups that have no value at some of the places.

    Args:
      values: what `at_place` returned, by group.
      at: the places, of which there are none where the groups share nothing.
      made: the settings of all groups.
      what: what x is called.
      given: whether the user chose the places.

    Raises UserError where no group reaches any of the places that the user chose.
    """
    spans = {group: _span(made, group) for group in values}
    said = some([f"{group} {span}".strip() for group, span in spans.items()])
    if not at:
        return [f"the groups' frontiers share no {what} ({said}), so no table is at equal {what}"]
    if given and not any(len(found) for of_group in values.values() for found in of_group):
        asked = ",".join(f"{place:g}" for place in at)
        raise UserError(f"--at={asked}: no group's frontier is at such {what} ({said})")
    notes = []
    for group, of_group in values.items():
        empty = [f"{place:g}" for place, found in zip(at, of_group, strict=True) if not len(found)]
        if empty:
            notes.append(
                f"{group or 'the frontier'} has no value at {what} = {some(empty)}: its frontier "
                f"is at {spans[group]}, and a value takes a seed with runs on both sides"
            )
    return notes


def off_frontier(made: list[Setting], names: list[str], what: str, y: str) -> list[str]:
    """Returns a note on groups with settings beyond the end of their frontier, which no table at
    equal x has: there more x makes y no better.

    Args:
      made: the settings.
      names: the groups.
      what: what x is called.
      y: what y is called.
    """
    short = []
    for group in names:
        line = _line(made, group)
        most = max(mean(setting.x) for setting in made if setting.group == group)
        if line and most > mean(line[-1].x) * (1 + REACHED):
            short.append(f"{group} {mean(line[-1].x):.3g} of {most:.3g}".strip())
    if not short:
        return []
    return [
        f"the frontiers end before the largest {what} ({some(short)}), beyond which no setting has "
        f"a better {y}; compare.csv has all"
    ]


def _line(made: list[Setting], group: str) -> list[Setting]:
    """Returns the settings on a group's frontier in order of x, as far as x has a logarithm."""
    line = [s for s in made if s.group == group and s.on_frontier and (s.x > 0).all()]
    return sorted(line, key=lambda setting: mean(setting.x))


def _span(made: list[Setting], group: str) -> str:
    line = _line(made, group)
    ends = [f"{mean(setting.x):.3g}" for setting in (line[0], line[-1])] if line else ["none"]
    return " to ".join(dict.fromkeys(ends))


def _weights(means: list[float], place: float) -> dict[int, float]:
    """Returns by the settings' places what each counts, of settings with these means of x."""
    if not means:
        return {}
    away = [abs(x / place - 1) for x in means]
    nearest = int(np.argmin(away))
    if away[nearest] <= SAME_X:
        return {nearest: 1.0}
    if means[0] < place < means[-1]:
        right = int(np.searchsorted(means, place))
        low, high = math.log(means[right - 1]), math.log(means[right])
        weight = (math.log(place) - low) / (high - low)
        return {right - 1: 1 - weight, right: weight}
    return {nearest: 1.0} if away[nearest] <= REACHED else {}


def _points(setting: Setting, logs: bool) -> np.ndarray:
    """Returns (log x, y) of each run (R, 2), or (log x, log y)."""
    return np.stack([np.log(setting.x), np.log(setting.y) if logs else setting.y], axis=1)


def _slope(line: list[Setting], place: float, logs: bool) -> float:
    """Returns the slope of the means of y in log x around a place.

    It is not taken between settings that are as near to each other as the seeds of one.
    """
    means = [mean(setting.x) for setting in line]
    below = [at for at, x in enumerate(means) if x * _WIDE <= place]
    above = [at for at, x in enumerate(means) if x >= place * _WIDE]
    ends = (below[-1] if below else 0), (above[0] if above else len(line) - 1)
    (x_low, y_low), (x_high, y_high) = (_points(line[at], logs).mean(axis=0) for at in ends)
    return float((y_high - y_low) / (x_high - x_low)) if x_high > x_low else 0.0
