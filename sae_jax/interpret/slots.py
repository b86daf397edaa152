"""Fills the slots of a collection for some latents, from all their events."""

import numpy as np

from sae_jax.interpret.collection import BINS, FULL, About
from sae_jax.interpret.events import Events
from sae_jax.interpret.hashes import WindowHashes, priorities


def parts_of(values: np.ndarray, maxima: np.ndarray, parts: int) -> np.ndarray:
    """Returns in which of `parts` equal parts of 0..maximum values above 0 lie, 0 for the lowest.

    A part has its upper end, and not its lower one.
    """
    part = np.ceil(values.astype(np.float64) * parts / maxima.astype(np.float64))
    return np.clip(part.astype(np.int64) - 1, 0, parts - 1)


def statistics(events: Events, latents: int) -> dict[str, np.ndarray]:
    """Returns count, sum and max (latents,) and histogram (latents, BINS) of sorted events."""
    index, values = events.latents, events.values
    maxima = np.zeros(latents, np.float32)
    starts = firsts(index)
    if len(index):
        maxima[index[starts]] = np.maximum.reduceat(values, starts)
    bins = index.astype(np.int64) * BINS + parts_of(values, maxima[index], BINS)
    return {
        "count": np.bincount(index, minlength=latents),
        "sum": np.bincount(index, values.astype(np.float64), minlength=latents),
        "max": maxima,
        "histogram": np.bincount(bins, minlength=latents * BINS)
        .reshape(latents, BINS)
        .astype(np.uint32),
    }


def fill(
    events: Events,
    first: int,
    maxima: np.ndarray,
    context_length: int,
    numbers: np.ndarray,
    windows: WindowHashes,
    about: About,
    seed: int,
) -> dict[str, np.ndarray]:
    """Returns the arrays value, sequence, position and window of some latents.

    Args:
      events: all events of the latents, sorted, with latents counted from the first of them.
      first: the number of the first latent.
      maxima: the largest activation of each latent, (n,).
      context_length: how many rows a sequence has.
      numbers: the number of each sequence in the store or text.
      windows: the hashes of windows, by which texts are shown once.
      about: how many slots there are, and how large a window is.
      seed: the seed of what is drawn.
    """
    n, width = len(maxima), about.before + 1 + about.after
    slots = about.top + about.intervals * about.per_interval
    out = {
        "value": np.zeros((n, slots), np.float32),
        "sequence": np.zeros((n, slots), np.int32),
        "position": np.zeros((n, slots), np.int32),
        "window": np.zeros((n, slots, width), np.uint16),
    }
    starts, peaks = _peaks(events, context_length)
    lengths = np.diff(np.append(starts, len(events.rows)))
    latent, value = events.latents[peaks], events.values[peaks]
    sequence, position = np.divmod(events.rows[peaks], context_length)
    kept = _distinct_strongest_first(latent, value, windows(sequence, position))
    place = _places(kept, latent, value, first + latent, numbers[sequence], maxima, about, seed)
    chosen, slot = kept[place >= 0], place[place >= 0]
    where = latent[chosen], slot
    out["value"][where] = value[chosen]
    out["sequence"][where] = sequence[chosen]
    out["position"][where] = position[chosen]
    example, event = _ranges(starts[chosen], lengths[chosen])
    offset = events.rows[event] - events.rows[peaks[chosen]][example] + about.before
    inside = (offset >= 0) & (offset < width)
    example, offset, of_latent = example[inside], offset[inside], latent[chosen][example[inside]]
    strength = events.values[event[inside]].astype(np.float64) / maxima[of_latent]
    out["window"][of_latent, slot[example], offset] = np.rint(strength * FULL)
    return out


def firsts(groups: np.ndarray) -> np.ndarray:
    """Returns where each group begins in an array of groups, of which equal ones are adjacent."""
    return np.flatnonzero(np.append(True, groups[1:] != groups[:-1])[: len(groups)])


def ranks(groups: np.ndarray) -> np.ndarray:
    """Returns the rank of each item in its group, 0 for the first; equal groups are adjacent."""
    starts = firsts(groups)
    lengths = np.diff(np.append(starts, len(groups)))
    return np.arange(len(groups)) - np.repeat(starts, lengths)


def _peaks(events: Events, context_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns where the events of each pair of a latent and a sequence begin, and the first of its
    strongest events."""
    pair = (events.latents.astype(np.int64) << 32) | (events.rows // context_length)
    starts = firsts(pair)
    if not len(pair):
        return starts, starts
    group = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(pair))))
    strongest = np.flatnonzero(events.values == np.maximum.reduceat(events.values, starts)[group])
    return starts, strongest[firsts(group[strongest])]


def _distinct_strongest_first(latent, value, window) -> np.ndarray:
    """Returns which peaks to keep, by latent and the strongest first, of a window only the first.

    Peaks come by latent and sequence; among equal ones the first sequence is first.
    """
    strength = value.view(np.uint32).astype(np.uint64)  # bits of floats above 0 are in their order
    key = (latent.astype(np.uint64) << np.uint64(32)) | (np.uint64(2**32 - 1) - strength)
    order = np.argsort(key, kind="stable")
    latent, window = latent[order], window[order]
    by_window = np.lexsort((window, latent))  # stable, so that the strongest stay first
    latent, window = latent[by_window], window[by_window]
    new = np.append(True, (latent[1:] != latent[:-1]) | (window[1:] != window[:-1]))[: len(latent)]
    return order[np.sort(by_window[new])]


def _places(kept, latent, value, number, sequence, maxima, about: About, seed: int) -> np.ndarray:
    """Returns the slot of each kept peak, -1 for none."""
    group = latent[kept]
    rank = ranks(group)
    place = np.where(rank < about.top, rank, -1)
    if not about.intervals:
        return place
    rest = np.flatnonzero(rank >= about.top)
    peak, group = kept[rest], group[rest]
    part = about.intervals - 1 - parts_of(value[peak], maxima[group], about.intervals)
    drawn = priorities(seed, number[peak], sequence[peak])
    interval = group.astype(np.int64) * about.intervals + part
    order = np.lexsort((~drawn, interval))
    rank = ranks(interval[order])
    taken = rank < about.per_interval
    order, rank = order[taken], rank[taken]
    place[rest[order]] = about.top + part[order] * about.per_interval + rank
    return place


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the numbers of all items of ranges, and for each of them which range it is of."""
    which = np.repeat(np.arange(len(starts)), lengths)
    return which, np.arange(len(which)) + np.repeat(
        starts - (np.cumsum(lengths) - lengths), lengths
    )
