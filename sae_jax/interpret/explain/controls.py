"""The controls of explanations: other units on the same text, explained and scored in the same way.

What a score of latents means is seen beside that of units nobody takes for meaningful (Bricken et
al. 2023, "Towards Monosemanticity"):

    neurons         the neurons of the site that the SAE reads
    random          directions in it, drawn at random
    shuffled_model  the latents of an SAE of the same recipe, of the model with shuffled weights

All are SAEs, so that whatever takes an `Activity` takes theirs. An SAE of a shuffled model has more
latents that only tell one token from others, which are easy to explain: `single_token` says which
units are such, to be counted apart.
"""

import pathlib
import shutil
from collections.abc import Callable

import numpy as np

from sae_jax import lm
from sae_jax.errors import UserError, choose
from sae_jax.evaluate.batching import evenly_spaced
from sae_jax.evaluate.sources import HeldOutRows, ModelRows, input_and_target_sites
from sae_jax.interpret.activity import Activity, record
from sae_jax.interpret.explain.shuffled_run import shuffled_run
from sae_jax.interpret.passes import Text, chosen_text
from sae_jax.paths import local
from sae_jax.progress_bar import progress
from sae_jax.sae import SAE, ReLU, ReLUConfig, resolve
from sae_jax.sae.config import TRANSCODERS

CONTROLS = ("neurons", "random", "shuffled_model")
"""The names of all controls, as `records.Explanation.units` has them."""

_SAMPLE = 65_536  # rows that thresholds are taken from, at most
_UNITS = 256  # whose thresholds are found at once


def neurons(source: HeldOutRows | ModelRows, density: float, kind: str = "autoencoder") -> SAE:
    """Returns the neurons of the site as a ReLU SAE, each of which fires on part of the tokens.

    A neuron's activation is what is above its threshold, in the model's units. The threshold is the
    neuron's own quantile, 1 - density, on up to 65,536 of the source's tokens, evenly spaced.

    Args:
      source: what rows are read of.
      density: on what part of the tokens each fires, above 0 and below 1; fewer where values are
        equal, as of a neuron that is mostly 0.
      kind: the kind of the SAE that these are the control of. The neurons are those of all sites of
        a crosscoder, and of the input site of a transcoder, where what they write means nothing.

    Raises UserError if the density is not in this range, or no row counts.
    """
    x = _sample(source, kind)
    thresholds = _thresholds(x.shape[1], lambda block: x[:, block].T, density)
    return _units(source, np.eye(x.shape[1], dtype=np.float32), thresholds, kind)


def random_directions(
    source: HeldOutRows | ModelRows,
    count: int,
    density: float,
    seed: int = 0,
    kind: str = "autoencoder",
) -> SAE:
    """Returns directions drawn at random, uniformly, as a ReLU SAE.

    Args:
      source: what rows are read of.
      count: how many directions.
      density: as for `neurons`.
      seed: the seed of the directions.
      kind: as for `neurons`.

    Raises UserError where `neurons` does.
    """
    x = _sample(source, kind)
    drawn = _drawn(count, x.shape[1], seed)
    thresholds = _thresholds(count, lambda block: drawn[block] @ x.T, density)
    return _units(source, drawn, thresholds, kind)


def written(name: str, source: HeldOutRows | ModelRows, seed: int = 0) -> SAE | None:
    """Returns what the units of an autoencoder's control write, as an SAE without thresholds.

    It is for their output tokens, and not for where they are active. None for shuffled_model, whose
    units write into another model.

    Args:
      name: the control, of `CONTROLS`.
      source: as for `neurons`.
      seed: the seed of random directions.
    """
    if name == "shuffled_model":
        return None
    (width,) = _widths(source, "autoencoder")
    directions = np.eye(width, dtype=np.float32)
    if name == "random":
        directions = _drawn(width, width, seed)
    return _units(source, directions, np.zeros(width, np.float32), "autoencoder")


def record_controls(
    names,
    activity: Activity,
    sae: SAE,
    source: HeldOutRows | ModelRows,
    out,
    *,
    run=None,
    model: lm.LanguageModel | None = None,
    tokens: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, Activity]:
    """Records where the units of each control are active on the text of the latents' activity.

    OUT/controls/NAME/activity is written for each. What is there is not made again, and what was
    stopped goes on. Neurons and random directions, of which there are as many, fire as often as the
    latents that fire at all do in the mean.

    Args:
      names: the controls that are wanted, of `CONTROLS`.
      activity: that of the latents.
      sae: the SAE.
      source: what `activity` was recorded of.
      out: the directory that they are written to.
      run: for shuffled_model, the run's directory.
      model: for shuffled_model, the language model.
      tokens: for shuffled_model, of how many tokens to train; as many as the run.
      seed: the seed of directions and of shuffled weights.
      overwrite: whether controls that were made otherwise are made again.

    Raises UserError if the source has other text than `activity`, if a control was made otherwise,
    and where making one does.
    """
    fires = activity.counts > 0
    density = float(activity.density[fires].mean()) if fires.any() else 0.0
    made_by = {
        "neurons": {"density": density},
        "random": {"density": density, "seed": seed},
        "shuffled_model": {"seed": seed, "tokens": tokens},
    }
    made = {}
    for name in names:
        choose(name, CONTROLS, "the control")
        folder, settings = local(out) / "controls" / name, {"control": name} | made_by[name]
        made[name] = _there(folder / "activity", activity, settings, overwrite)
        if made[name] is not None:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        text, kind = source, sae.config.kind
        if name == "neurons":
            units = neurons(source, density, kind)
        elif name == "random":
            units = random_directions(source, sum(_widths(source, kind)), density, seed, kind)
        else:
            units, text = _of_shuffled_model(activity, source, folder, run, model, tokens, seed)
        if not _same_text(chosen_text(text, activity.tokens.size), activity):
            raise UserError(
                f"{activity.path} was recorded on other text than {source.origin} has; record it "
                "again with --overwrite, or give the same text"
            )
        made[name] = record(
            units,
            text,
            folder / "activity",
            tokens=activity.tokens.size,
            settings=settings,
            overwrite=overwrite,
        )
    return made


def _drawn(count: int, width: int, seed: int) -> np.ndarray:
    """Returns random directions (count, width) of length 1."""
    drawn = np.random.default_rng(seed).normal(size=(count, width))
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


def _widths(source, kind: str) -> tuple[int, ...]:
    """Returns the widths of the sites that an SAE of this kind reads."""
    return input_and_target_sites(kind, source.site_widths)[0]


def _sample(source: HeldOutRows | ModelRows, kind: str) -> np.ndarray:
    """Returns rows that count of what an SAE of this kind reads, (m, d_in) float32."""
    text = chosen_text(source, source.num_rows)
    count, length = text.tokens.shape
    chosen = evenly_spaced(np.arange(count), max(1, _SAMPLE // length))
    # Those that are read together, one group after the other: a chunk of a store is read once.
    groups = np.split(chosen, np.flatnonzero(np.diff(chosen // text.at_once)) + 1)
    width, parts = sum(_widths(source, kind)), []
    for group in progress(groups, "reading rows for thresholds", len(groups), "group"):
        x = source.read(text.places[group])[..., :width]
        parts.append(x[text.used[group]].astype(np.float32))
    x = np.concatenate(parts)
    if len(x) < 2:
        raise UserError(f"{source.origin} has no rows that count, so there are no controls")
    return x


def _thresholds(count: int, values: Callable[[slice], np.ndarray], density: float) -> np.ndarray:
    """Returns what a part of the values of each of `count` units is above, (count,).

    values: gives the values (n, rows) of a slice of the units.

    Raises UserError if the density is not above 0 and below 1.
    """
    if not 0 < density < 1:
        raise UserError(f"controls cannot fire on {density:g} of the tokens; it must be in (0, 1)")
    found = []
    for first in range(0, count, _UNITS):
        block = values(slice(first, first + _UNITS))
        rows = block.shape[1]
        place = rows - 1 - min(max(round(density * rows), 1), rows - 1)
        found.append(np.partition(block, place, axis=1)[:, place])
    return np.concatenate(found)


def _units(source, directions: np.ndarray, thresholds: np.ndarray, kind: str) -> SAE:
    """Returns the ReLU SAE of directions (n, d_in) that fire above their thresholds (n,)."""
    target = source.site_widths[-1] if kind in TRANSCODERS else None
    config = resolve(
        ReLUConfig(d_sae=len(directions), kind=kind, normalize="none", apply_b_dec_to_input=False),
        _widths(source, kind),
        target,
    )
    written = directions
    if target is not None:  # of length 1, so that activations are in the units of the input
        written = np.eye(target, dtype=np.float32)[np.arange(len(directions)) % target]
    parameters = {
        "w_enc": directions.T,
        "b_enc": -thresholds,
        "w_dec": written,
        "b_dec": np.zeros(config.d_out, np.float32),
    }
    if kind == "skip_transcoder":
        parameters["w_skip"] = np.zeros((config.d_in, config.d_out), np.float32)
    return ReLU.from_parameters(config, parameters)


def _of_shuffled_model(activity, source, folder, run, model, tokens, seed) -> tuple:
    """Returns the SAE of the shuffled model, and that model on the text of the activity."""
    if run is None or model is None:
        raise UserError(
            "the control shuffled_model trains as a run did, on what its language model gives: "
            "give --run and --model, or leave it out"
        )
    control = shuffled_run(run, folder, model=model, tokens=tokens, seed=seed)
    text = ModelRows(
        lm.open_model(control.model, model.dtype),
        source.site_names,
        np.asarray(activity.tokens),
        what="the text of the latents",
        used=np.asarray(activity.used),
    )
    return control.sae, text


def _same_text(text: Text | Activity, activity: Activity) -> bool:
    """Returns whether a text has the tokens of the activity, and the same of them count."""
    pairs = (text.tokens, activity.tokens), (text.used, activity.used)
    return all(np.array_equal(*pair) for pair in pairs)


def _there(
    place: pathlib.Path, activity: Activity, settings: dict, overwrite: bool
) -> Activity | None:
    """Returns the control's activity that is there, or None where it is to be made."""
    if not (place / "activity.json").is_file():
        return None
    found = Activity(place)
    before = {name: found.about.settings.get(name) for name in settings}
    if before == settings and _same_text(found, activity):
        return found
    if not overwrite:
        unlike = [f"{n} was {before[n]!r} and is {v!r}" for n, v in settings.items()
                  if before[n] != v]  # fmt: skip
        raise UserError(
            f"{place} was made otherwise: {'; '.join(unlike) or 'on other text'}; give "
            "--overwrite to make it again"
        )
    # On other text the model and its SAE are still those that are wanted.
    old = place if before == settings else place.parent
    gone = old.with_name(f"old.{old.name}")
    shutil.rmtree(gone, ignore_errors=True)
    old.rename(gone)  # since what is removed in part could not be opened
    shutil.rmtree(gone)
    return None
