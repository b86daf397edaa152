"""Attributes a number that a model computes to latents at positions: gradients times activations.

A target is a logit, less another or the mean of all, or the loss of a context. To first order,
latent i at position t contributes

    f_i(x_t) * (d_i . gradient of the target in y_t)

where d_i is its decoder row and y_t what the SAE writes to (Templeton et al. 2024, "Scaling
Monosemanticity", attributions). One backward pass gives that for all latents of several SAEs at
all positions. What an SAE leaves over contributes in the same way: with y = sum_i f_i d_i +
constant + error, the contributions of latents, constant and error add up to y . gradient. Where
a norm follows that no constant outweighs, that sum is near 0, since the norm takes no notice of the
length of y.

A contribution is what taking the latent out would cost if all that follows were linear. Two other
methods need more runs of the model:

- integrated: the mean gradient along the way from f = 0 to f, all latents of the SAE together, with
  the error and which latents are active held fixed. The contributions then add up to what taking
  out all latents does to the target (Sundararajan et al. 2017, arXiv:1703.01365).
- ablation: the latent is taken out at that position, in a run of its own. It is exact.

Above zero a latent raises the target: a logit that it makes likelier, a loss that it makes larger.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import lm, ops
from sae_jax.errors import UserError
from sae_jax.evaluate.batching import pad_rows, sequences_at_once
from sae_jax.evaluate.metrics import activation_scale
from sae_jax.interpret.placed import Placed, check_ids, unit_directions
from sae_jax.ops.sharding import matmul_f32
from sae_jax.progress_bar import progress

METHODS = ("gradient", "integrated", "ablation")
_PER_POSITION = 256  # latents of a position that are kept, at most


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Target:
    """A number that a model computes from a context.

    It is the logit of `token` after the context's last token, less that of `baseline`, or else less
    the mean of all logits, which the softmax takes no notice of. Without `token` it is the loss:
    the mean cross-entropy of the context's tokens after the first, in nats.

    Attributes:
      token: the id of a token, or None for the loss.
      baseline: the id of another, or None for the mean.
    """

    token: int | None = None
    baseline: int | None = None

    def check(self, model: lm.LanguageModel, ids: np.ndarray) -> None:
        """Raises UserError if the tokens are none of the model's, or if nothing can be computed."""
        for token in (self.token, self.baseline):
            if token is not None:
                check_ids(model, [token])
        if self.token is None and self.baseline is not None:
            raise UserError(
                "a loss has no baseline; give a target token, or leave the baseline out"
            )
        if self.token is None and len(ids) < 2:
            raise UserError("a loss needs a context of two tokens or more")

    def values(self, logits_BxTxV: jax.Array, ids_BxT: jax.Array) -> jax.Array:
        """Returns the number for each context, (B,)."""
        if self.token is None:
            return lm.next_token_loss(logits_BxTxV, ids_BxT).mean(axis=1)
        last_BxV = logits_BxTxV[:, -1]
        if self.baseline is None:
            return last_BxV[:, self.token] - last_BxV.mean(axis=1)
        return last_BxV[:, self.token] - last_BxV[:, self.baseline]


@dataclasses.dataclass(frozen=True)
class Attribution:
    """What the latents of one SAE contribute to a target, by the position of the context.

    Of each position the latents with the largest contributions, of either sign, come first, and
    empty places have activation 0. The contributions of the constant and the error are gradient
    times activation, with the same gradient as those of the latents.

    Attributes:
      placed: the SAE and its sites.
      value: the target in the untouched model.
      latents: the numbers of latents, (T, m).
      activations: their activations, in the model's units, (T, m).
      contributions: their contributions, (T, m).
      active: how many latents are active, (T,).
      total: the contributions of all latents together, (T,).
      constant: that of the decoder's bias and of a skip connection, (T,).
      error: that of what the SAE leaves over, (T,).
      whole: y . gradient, which the three before add up to, (T,).
      without_latents: the target with all latents taken out, where the method is integrated.
    """

    placed: Placed
    value: float
    latents: np.ndarray
    activations: np.ndarray
    contributions: np.ndarray
    active: np.ndarray
    total: np.ndarray
    constant: np.ndarray
    error: np.ndarray
    whole: np.ndarray
    without_latents: float | None = None

    @property
    def gap(self) -> float:
        """What the contributions miss of what they should add up to, as a part of it.

        That is y . gradient, which they miss by rounding only, or where the method is integrated
        what taking all latents out does to the target, which they miss for want of steps.
        """
        if self.without_latents is None:
            missing = self.total + self.constant + self.error - self.whole
            size = np.abs(self.total) + np.abs(self.constant) + np.abs(self.error)
            return float(np.abs(missing).max() / max(size.max(), np.finfo(np.float32).tiny))
        change = self.value - self.without_latents
        missing = abs(float(self.total.sum()) - change)
        return missing / max(abs(change), float(np.finfo(np.float32).tiny))

    def largest(self, count: int) -> list[tuple[int, int]]:
        """Returns up to `count` (position, place) of active latents, the largest first."""
        size = np.where(self.activations > 0, np.abs(self.contributions), -1.0)
        order = np.argsort(-size, axis=None, kind="stable")[:count]
        places = zip(*np.unravel_index(order, size.shape), strict=True)
        return [(int(t), int(i)) for t, i in places if size[t, i] >= 0]


def attribute(
    model: lm.LanguageModel,
    placed: Placed | Sequence[Placed],
    ids: np.ndarray,
    target: Target,
    *,
    steps: int = 0,
    positions: np.ndarray | None = None,
) -> list[Attribution]:
    """Returns what latents contribute to a target, for each SAE.

    Args:
      model: the language model, which our own decoder runs.
      placed: an SAE and its site, or several, of the same layer or of others.
      ids: the tokens of the context, (T,).
      target: what is attributed.
      steps: over how many steps from f = 0 the gradient is averaged, by the midpoints of equal
        parts, each SAE by itself. 0: it is the gradient of the untouched model.
      positions: the positions of which the latents count, (T,) bool; None: all. What SAEs say of
        BOS, say, which they were not trained on, is no part of an explanation.

    Raises UserError if an SAE does not fit its sites, if a token is not the model's, and for a
    model that transformers runs, which has no gradient here.
    """
    if not isinstance(model, lm.JaxModel) or model.mesh is not None:
        raise UserError(
            f"gradients are of our own decoder on one device; open {model.directory} without "
            f"{'a mesh' if isinstance(model, lm.JaxModel) else 'torch:'}"
        )
    ids = check_ids(model, ids)
    placed = [placed] if isinstance(placed, Placed) else placed
    for place in placed:
        place.check(model)
    target.check(model, ids)
    where = np.ones(len(ids), bool) if positions is None else np.asarray(positions, bool)
    sites = sorted({site for place in placed for site in (place.site, place.written)})
    written = sorted({place.written for place in placed})
    shapes = {site: (1, len(ids), model.site_width(site)) for site in written}
    nothing = {site: jnp.zeros(shape) for site, shape in shapes.items()}
    value, taps, gradients = _gradients(model, ids[None], nothing, target, sites)
    found = []
    for place in placed:
        x, y, g = (a[0] for a in (taps[place.site], taps[place.written], gradients[place.written]))
        without = None
        if steps:
            changes = _without_latents(place, x, where)
            g = _mean_gradient(model, ids, place.written, changes, target, steps)
            logits, _ = model.forward(
                ids[None], edits={place.written: lm.add_direction(changes[None])}
            )
            without = float(_values(target, logits, ids[None])[0])
        parts = [
            _of_rows(place.sae, *rows, count=min(_PER_POSITION, place.sae.config.d_sae))
            for rows in _blocks(place, x, y, g, where)
        ]
        parts = {name: np.concatenate([p[name] for p in parts])[: len(ids)] for name in parts[0]}
        found.append(Attribution(place, float(value[0]), **parts, without_latents=without))
    return found


def ablate(
    model: lm.LanguageModel,
    placed: Placed,
    ids: np.ndarray,
    target: Target,
    positions: Sequence[int],
    latents: Sequence[int],
    activations: Sequence[float],
) -> np.ndarray:
    """Returns what latents at positions are worth to a target: it, less it without the latent.

    Each is taken out by itself, at its position only, (N,).

    Args:
      model: the language model.
      placed: the SAE and its sites.
      ids: the tokens of the context, (T,).
      target: what is computed.
      positions: the position of each, (N,).
      latents: its latent, (N,).
      activations: the latent's activation there, in the model's units, (N,).

    Raises UserError as `attribute` does, but for models that transformers runs.
    """
    ids = check_ids(model, ids)
    placed.check(model)
    target.check(model, ids)
    if not len(latents):
        return np.zeros(0, np.float32)
    changes = -np.asarray(activations, np.float32)[:, None] * np.asarray(
        unit_directions(placed.sae, np.asarray(latents))
    )
    size = sequences_at_once(model.vocab_size, 1 + len(latents), len(ids))
    tokens = np.repeat(ids[None], size, axis=0)
    # The first is left as it is, by the program that runs the others, so that rounding is the same.
    changes = np.concatenate([0 * changes[:1], changes])
    positions = np.concatenate([[0], positions])
    values = []
    for start in progress(range(0, len(changes), size), f"taking out latents at {placed.written}"):
        part = changes[start : start + size]
        edit = np.zeros((size, len(ids), changes.shape[1]), np.float32)
        edit[np.arange(len(part)), positions[start : start + size]] = part
        logits, _ = model.forward(tokens, edits={placed.written: lm.add_direction(edit)})
        values.append(np.asarray(_values(target, logits, tokens))[: len(part)])
    values = np.concatenate(values)
    return values[0] - values[1:]


def correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Returns Pearson's correlation, or None where one of the two does not vary."""
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


@jax.jit
def _values(target: Target, logits_BxTxV, ids_BxT) -> jax.Array:
    return target.values(logits_BxTxV, jnp.asarray(ids_BxT))


def _gradients(model: lm.JaxModel, ids_BxT, changes: dict, target: Target, taps=()):
    """Returns the target's values (B,), the taps, and the gradient in each site's activations,
    where `changes` (B, T, W), by site, are added to these."""
    return _compiled_gradients(model.params, ids_BxT, changes, target, model.config, tuple(taps))


@functools.partial(jax.jit, static_argnames=("config", "taps"))
def _compiled_gradients(params, ids_BxT, changes, target, config: lm.DecoderConfig, taps):
    def run(changes):
        edits = {site: lm.add_direction(change) for site, change in changes.items()}
        logits, seen = lm.forward(params, ids_BxT, config, taps, edits)
        values = target.values(logits, jnp.asarray(ids_BxT))
        return values.sum(), (values, seen)

    (_, (values, seen)), gradients = jax.value_and_grad(run, has_aux=True)(changes)
    return values, seen, gradients


def _mean_gradient(model, ids, site: str, changes_TxW, target: Target, steps: int):
    """Returns the mean of the gradients (T, W) where a part of `changes` is added, from all to
    none of it."""
    parts = 1.0 - (np.arange(steps) + 0.5) / steps
    size = sequences_at_once(model.vocab_size, steps, len(ids))
    tokens, total = np.repeat(ids[None], size, axis=0), 0.0
    for start in progress(range(0, steps, size), f"integrating along the latents at {site}"):
        part = jnp.asarray(pad_rows(parts[start : start + size], size), jnp.float32)
        added = {site: part[:, None, None] * changes_TxW[None]}
        _, _, gradients = _gradients(model, tokens, added, target)
        total += gradients[site][: len(parts[start : start + size])].sum(axis=0)
    return total / steps


def _without_latents(placed: Placed, x_TxD, where_T) -> jax.Array:
    """Returns what is added to take all latents out, (T, W)."""
    blocks = _blocks(placed, x_TxD, where_T)
    return jnp.concatenate([_minus_latents(placed.sae, *b) for b in blocks])[: len(where_T)]


def _blocks(placed: Placed, *arrays) -> Iterator[list]:
    """Yields the arrays' rows in blocks whose dense latents fit in memory, the last one padded."""
    size = placed.rows_at_once(len(arrays[0]))
    for start in range(0, len(arrays[0]), size):
        yield [pad_rows(np.asarray(a[start : start + size]), size) for a in arrays]


@jax.jit
def _minus_latents(sae, x_RxD, where_R):
    x_RxD = jnp.asarray(x_RxD, jnp.float32)
    latents = sae.encode(x_RxD) * where_R[:, None]
    return sae.decode(jnp.zeros_like(latents), x_RxD) - sae.decode(latents, x_RxD)


@functools.partial(jax.jit, static_argnames="count")
def _of_rows(sae, x_RxD, y_RxW, g_RxW, where_R, count: int) -> dict[str, jax.Array]:
    """Returns the fields of `Attribution` that rows have."""
    x_RxD, y_RxW, g_RxW = (a.astype(jnp.float32) for a in (x_RxD, y_RxW, g_RxW))
    latents = sae.encode(x_RxD) * where_R[:, None]
    each = latents * matmul_f32(g_RxW, (sae.w_dec[...] / sae.target_scale).T)
    _, places = ops.top_k(jnp.where(latents > 0, jnp.abs(each), -1.0), count)
    constant_RxW = sae.decode(jnp.zeros_like(latents), x_RxD)
    error_RxW = y_RxW - sae.decode(latents, x_RxD)

    def taken(values):
        return jnp.take_along_axis(values, places, axis=1)

    return {
        "latents": places,
        "activations": taken(latents * activation_scale(sae)),
        "contributions": taken(each),
        "active": (latents > 0).sum(axis=1),
        "total": each.sum(axis=1),
        "constant": (constant_RxW * g_RxW).sum(axis=1),
        "error": (error_RxW * g_RxW).sum(axis=1),
        "whole": (y_RxW * g_RxW).sum(axis=1),
    }
