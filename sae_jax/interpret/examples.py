"""Finds texts on which latents are most active, and texts on which they are less active.

The store is read once, in the order of its sequences. For each latent and group only the best
`count` sequences so far are kept, on the device. A sequence belongs to a group by its peak, which
is the largest activation of the latent in it. So the examples come from distinct sequences.

Group 0 holds the sequences with the highest peaks. Groups 1 to `intervals` cut the range from 0 to
the latent's maximum into equal parts, the highest first. Each holds sequences drawn at random from
those whose peak lies in its part: what a latent means at half its strength is often not what it
means at its maximum (Bricken et al. 2023, "Towards Monosemanticity").
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax.activations import Sites, Store
from sae_jax.errors import UserError
from sae_jax.evaluate.batching import evenly_spaced
from sae_jax.evaluate.metrics import activation_scale
from sae_jax.progress_bar import progress
from sae_jax.sae import SAE

_LATENTS = 2**25  # elements of one batch's dense latents


@dataclasses.dataclass(frozen=True)
class Example:
    """A window of a sequence on which a latent is active.

    Attributes:
      sequence: the number of the sequence in the store.
      ids: the token ids of the whole sequence, (T,).
      start: the position of the window's first token.
      stop: the position after its last token.
      peak: the position of the highest activation in the whole sequence.
      activations: the latent's activations in the window, (stop - start,), as lengths in the units
        of the data (see `evaluate.metrics`).
    """

    sequence: int
    ids: np.ndarray
    start: int
    stop: int
    peak: int
    activations: np.ndarray


def find_examples(
    sae: SAE,
    store: Store,
    site: str,
    latents: np.ndarray,
    max_activation: np.ndarray,
    *,
    tokens: int = 1_000_000,
    count: int = 8,
    intervals: int = 4,
    per_interval: int = 2,
    before: int = 28,
    after: int = 14,
    seed: int = 0,
) -> list[list[list[Example]]]:
    """Returns examples [latent][group][example]; see above for the groups.

    Args:
      sae: the SAE.
      store: where texts are looked for. Its excluded rows do not count.
      site: the site that the SAE reads; "a,b" for a crosscoder's.
      latents: the numbers of the latents, (L,).
      max_activation: the latents' maxima, (L,), of which the intervals are parts.
      tokens: about how many of the store's tokens to look at, spread evenly.
      count: how many examples to find at most for group 0.
      intervals: how many other groups there are.
      per_interval: how many examples to find at most for each of them, up to `count`.
      before: how many tokens of the window lie before the peak.
      after: how many tokens of the window lie after the peak.
      seed: the seed of what is drawn at random.

    A latent that does not fire has empty groups. Raises UserError if the store has no tokens.
    """
    ids = store.tokens()
    if ids is None:
        raise UserError(f"{store.path} has no tokens, so there is no text to show")
    sites = Sites(store, site)
    latents = np.asarray(latents, np.int32)
    edges = np.linspace(1.0, 0.0, intervals + 1)[:, None] * np.asarray(max_activation)[None]
    best = _search(sae, sites, latents, edges, tokens, count, seed)
    best["score"][1:, :, per_interval:] = 0.0
    return _windows(sae, sites, latents, best, ids, before, after)


def _search(sae, sites, latents, edges, tokens, count, seed) -> dict[str, np.ndarray]:
    store, meta = sites.store, sites.store.meta
    chunks = evenly_spaced(np.arange(meta.num_chunks), -(-tokens // meta.chunk_rows))
    parts = min(meta.chunk_sequences, -(-meta.chunk_rows * sae.config.d_sae // _LATENTS))
    size = -(-meta.chunk_sequences // parts)
    shape = (len(edges), len(latents), count)
    best = {
        "score": jnp.zeros(shape),
        "sequence": jnp.zeros(shape, jnp.int32),
        "position": jnp.zeros(shape, jnp.int32),
    }
    key = jax.random.key(seed)
    edges, latents = jnp.asarray(edges, jnp.float32), jnp.asarray(latents)
    for chunk in progress(chunks, "looking for the texts that activate latents"):
        x = np.zeros((1, meta.chunk_rows, sites.width), sites.dtype)
        sites.read_chunks([chunk], x)
        x = x.reshape(meta.chunk_sequences, meta.context_length, sites.width)
        used = (store.read_excluded([chunk]) == 0).reshape(x.shape[:2])
        sites.check_finite([chunk], x, used)
        for first in range(0, len(x), size):
            part = slice(first, first + size)
            start = chunk * meta.chunk_sequences + first
            best = _merge(best, sae, x[part], used[part], latents, edges, start, key)
    return {name: np.array(value) for name, value in best.items()}


@jax.jit
def _merge(best, sae, x_SxTxD, used_SxT, latents_L, edges_GxL, start, key) -> dict:
    """Returns the best sequences so far, taking in the sequences start, start + 1, and so on."""
    acts_SxTxL = _activations(sae, x_SxTxD, latents_L) * used_SxT[:, :, None]
    peak_LxS = acts_SxTxL.max(axis=1).T
    position_LxS = acts_SxTxL.argmax(axis=1).T
    sequence_S = start + jnp.arange(len(x_SxTxD))
    draw_S = jax.vmap(lambda s: jax.random.uniform(jax.random.fold_in(key, s), minval=1e-6))(
        sequence_S
    )
    upper, lower = edges_GxL[:-1, :, None], edges_GxL[1:, :, None]
    inside_GxLxS = (peak_LxS > lower) & (peak_LxS <= upper)
    scores = jnp.concatenate([peak_LxS[None], jnp.where(inside_GxLxS, draw_S, 0.0)])
    new = {
        "score": scores,
        "sequence": jnp.broadcast_to(sequence_S, scores.shape),
        "position": jnp.broadcast_to(position_LxS, scores.shape),
    }
    both = jax.tree.map(lambda old, new: jnp.concatenate([old, new], axis=-1), best, new)
    _, kept = jax.lax.top_k(both["score"], best["score"].shape[-1])
    return jax.tree.map(lambda a: jnp.take_along_axis(a, kept, axis=-1), both)


def _activations(sae: SAE, x_SxTxD, latents_L):
    """Returns the activations (S, T, L) of the chosen latents."""
    latents = sae.encode(x_SxTxD.astype(jnp.float32))
    return latents[..., latents_L] * activation_scale(sae)[latents_L]


_activations_jit = jax.jit(_activations)


def _windows(sae, sites, latents, best, ids, before, after) -> list[list[list[Example]]]:
    """Reads the chosen sequences again, now for the activation at every token."""
    length = sites.store.meta.context_length
    found = best["score"] > 0  # (groups, latents, count)
    groups, num_latents, _ = found.shape
    examples = [[[] for _ in range(groups)] for _ in range(num_latents)]
    wanted: dict[int, list] = {}
    for group, latent, place in np.argwhere(found):
        sequence = int(best["sequence"][group, latent, place])
        peak = int(best["position"][group, latent, place])
        wanted.setdefault(sequence, []).append((latent, group, place, peak))
    latents = jnp.asarray(latents)
    for sequence in progress(sorted(wanted), "reading the texts found"):
        x_TxD = sites.read_rows(np.arange(sequence * length, (sequence + 1) * length))
        acts_TxL = np.asarray(_activations_jit(sae, jnp.asarray(x_TxD)[None], latents)[0])
        tokens = ids[sequence].read().result()
        for latent, group, place, peak in wanted[sequence]:
            start, stop = max(0, peak - before), min(length, peak + after + 1)
            activations = acts_TxL[start:stop, latent]
            example = Example(sequence, tokens, start, stop, peak, activations)
            examples[latent][group].append((place, example))
    return [[[e for _, e in sorted(g, key=lambda p: p[0])] for g in latent] for latent in examples]
