"""Runs an evaluation as a whole, and prints, saves and loads it."""

import dataclasses
import hashlib
import io
import math
from collections.abc import Sequence

import jax
import numpy as np

from sae_jax import lm, paths
from sae_jax.config import difference
from sae_jax.errors import UserError
from sae_jax.evaluate.batching import rows_at_once
from sae_jax.evaluate.metrics import RowMetrics, measure_rows
from sae_jax.evaluate.padding import tokenizer_of
from sae_jax.evaluate.recovery import Recovery, measure_recovery
from sae_jax.evaluate.sources import (
    HeldOutRows,
    ModelRows,
    check_sites,
    input_and_target_sites,
)
from sae_jax.evaluate.spliced import measure_spliced
from sae_jax.evaluate.worlds import WorldRows
from sae_jax.json_files import checked, read_json
from sae_jax.numpy_files import read_npz
from sae_jax.paths import AnyPath
from sae_jax.progress_bar import progress
from sae_jax.sae import SAE

_HISTOGRAM_EDGES = np.linspace(-6.0, 0.0, 25)  # of log10 density

_ROWS = {  # name: (label, unit)
    "fvu": ("fraction of variance unexplained", ""),
    "explained_variance": ("explained variance", ""),
    "mse": ("mean squared error, summed over d", "model's units squared"),
    "cosine_similarity": ("cosine similarity of reconstructions", ""),
    "norm_in": ("mean norm of activations", "model's units"),
    "norm_out": ("mean norm of reconstructions", "model's units"),
    "norm_ratio": ("shrinkage, mean ratio of these norms", ""),
    "relative_reconstruction_bias": ("relative reconstruction bias", ""),
    "l0": ("L0, latents active", "a token"),
    "l1": ("L1, latents times decoder norm", "model's units"),
    "dead_fraction": ("latents that never fired", ""),
}
_SPLICED = {
    "ce_clean": ("cross-entropy, model untouched", "nats"),
    "ce_spliced": ("cross-entropy, SAE spliced in", "nats"),
    "ce_zero": ("cross-entropy, zero ablation", "nats"),
    "ce_mean": ("cross-entropy, mean ablation", "nats"),
    "ce_recovered_zero": ("CE recovered against zero ablation", ""),
    "ce_recovered_mean": ("CE recovered against mean ablation", ""),
    "kl_spliced": ("KL(model || SAE spliced in)", "nats"),
    "kl_zero": ("KL(model || zero ablation)", "nats"),
    "kl_mean": ("KL(model || mean ablation)", "nats"),
}
_RECOVERY = {
    "mmcs": ("mean max cosine of a feature (MMCS)", ""),
    "mcc": ("mean |cosine|, matched one to one (MCC)", ""),
    "matched_correlation": ("mean correlation, matched one to one", ""),
    "uniqueness": ("features that are some latent's best", "a latent"),
    "precision": ("precision of latents", ""),
    "recall": ("recall of latents", ""),
    "f1": ("F1 of latents", ""),
    "shrinkage": ("shrinkage, activation / magnitude", ""),
    "optimal_mse": ("least mean squared error there is", "model's units squared"),
    "mse_over_optimal": ("mean squared error / the least", ""),
}
_ARRAYS = ("density", "mean_activation", "max_activation", "mean", "site_fvu")
SPARSITY = ("l0", "l1", "dead_fraction")
_WHICH = ("step", "result")  # the settings that change as a run is trained on, or again


@dataclasses.dataclass(frozen=True, repr=False)
class Evaluation:
    """What an evaluation of an SAE came to.

    Attributes:
      settings: what was evaluated on what, in words and numbers.
      rows: the metrics of the SAE alone.
      spliced: the metrics inside the language model by name (see `spliced`), or None. For a
        crosscoder they are means over its sites.
      sites: for each of a crosscoder's sites its `fvu` and its metrics inside the model.
      recovery: how well the features of a synthetic world were found, or None. Where the least
        possible error is known, its scalars have `optimal_mse` and `mse_over_optimal` too.
    """

    settings: dict
    rows: RowMetrics
    spliced: dict[str, float] | None
    sites: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    recovery: Recovery | None = None

    def __repr__(self) -> str:
        """The table, which is what a notebook shows."""
        return self.table()

    @property
    def scalars(self) -> dict[str, float]:
        """Every number by its name, such as fvu and l0, with ce_spliced and the like where a
        language model was given, and mcc and the like where the features are known."""
        recovered = self.recovery.scalars if self.recovery else {}
        return self.rows.scalars | (self.spliced or {}) | recovered

    @property
    def dead_latents(self) -> np.ndarray:
        """The latents that fired on none of the rows, by their indices in order, (dead,) int."""
        return np.flatnonzero(self.rows.density == 0)

    def to_dict(self) -> dict:
        """Returns the evaluation without its arrays, as it is saved in JSON.

        Its keys are settings, rows, reconstruction, sparsity, language_model, sites and recovery.
        Values that are not finite are None.
        """
        scalars = self.rows.scalars
        log_density = np.log10(np.maximum(self.rows.density, 1e-30))
        alive = log_density[self.rows.density > 0]
        return {
            "settings": self.settings,
            "rows": self.rows.rows,
            "reconstruction": _finite({n: v for n, v in scalars.items() if n not in SPARSITY}),
            "sparsity": {
                **{n: scalars[n] for n in SPARSITY},
                "d_sae": len(self.rows.density),
                "density_histogram": {
                    "log10_edges": _HISTOGRAM_EDGES.tolist(),
                    "latents": np.histogram(alive.clip(-6, 0), _HISTOGRAM_EDGES)[0].tolist(),
                    "never_fired": int((self.rows.density == 0).sum()),
                },
            },
            "language_model": self.spliced and _finite(self.spliced),
            "sites": {site: _finite(values) for site, values in self.sites.items()},
            "recovery": self.recovery and _finite(self.recovery.scalars),
        }

    def sections(self) -> list[tuple[str, list[tuple[str, float, str]]]]:
        """Returns the metrics in words for people: a list of (title, [(label, value, unit)])."""
        what = f"On {self.rows.rows:,} rows: {self.settings['rows']}"
        sections = [(what, _labelled(_ROWS, self.rows.scalars))]
        if self.spliced:
            what = f"In the language model, {self.spliced['replaced']:,} positions replaced"
            what += ", means over the sites" if self.sites else ""
            sections.append((what, _labelled(_SPLICED, self.spliced)))
        for site, values in self.sites.items():
            sections.append((f"At {site}", _labelled(_ROWS | _SPLICED, values)))
        if self.recovery:
            what = f"Of the world's {len(self.recovery.features['rate']):,} features"
            sections.append((what, _labelled(_RECOVERY, self.recovery.scalars)))
        return sections

    def table(self) -> str:
        """Returns a table of all metrics for people, as a text of several lines."""
        lines = []
        for what, values in self.sections():
            lines.append(what)
            lines += [f"  {name:38}{value:>12.5g}  {unit}".rstrip() for name, value, unit in values]
        return "\n".join([*lines, f"Positions: {self.settings['positions']}"])


def evaluate(
    sae: SAE,
    source: HeldOutRows | ModelRows,
    model: lm.LanguageModel | None = None,
    spliced_tokens: int = 262_144,
    settings: dict | None = None,
) -> Evaluation:
    """Measures `sae` on the rows of `source` and, given its language model, inside the model.

    Args:
      sae: the SAE.
      source: the rows, and where it has them the tokens (see `sources`).
      model: the language model whose activations the SAE was trained on, or None.
      spliced_tokens: about how many of the source's tokens to run the model on.
      settings: what else the evaluation's settings should say.

    Mean ablation uses the mean of the evaluated rows. Several processes share the batches, and all
    return the same. Only the recovery of a world's features is computed by process 0 alone, and
    None on the others.

    Raises UserError if the source's sites do not have the SAE's number and widths, or if a model is
    given and the source has no tokens.
    """
    about = full_settings(sae.config.kind, source, model, spliced_tokens, settings)
    return evaluate_each([sae], source, model, spliced_tokens, [about])[0]


def full_settings(
    kind: str,
    source: HeldOutRows | ModelRows,
    model: lm.LanguageModel | None,
    spliced_tokens: int,
    settings: dict | None = None,
) -> dict:
    """Returns the settings of an evaluation of an SAE of this kind, with what they are to say
    besides; the other arguments are those of `evaluate`."""
    inputs, targets = input_and_target_sites(kind, source.site_names)
    settings = {**(settings or {}), "site": ",".join(inputs), **source.settings}
    if inputs != targets:
        settings["target_site"] = targets[0]
    if model is not None:
        settings["spliced_tokens"] = spliced_tokens
    return settings


def evaluate_each(
    saes: Sequence[SAE],
    source: HeldOutRows | ModelRows,
    model: lm.LanguageModel | None,
    spliced_tokens: int,
    settings: Sequence[dict],
) -> list[Evaluation]:
    """Returns the evaluation of each of several SAEs, all of one kind and of the same sites.

    They share one reading of the rows, and but for one run of each in place of its site the runs of
    the language model. The metrics are those of `evaluate`, except that batches are as small as the
    largest SAE needs them, which may change the rounding.

    Args:
      saes: the SAEs.
      source: as for `evaluate`, as the next two are.
      model: the language model, or None.
      spliced_tokens: about how many tokens to run it on.
      settings: those of each evaluation, from `full_settings`.

    Raises UserError as `evaluate` does.
    """
    for sae in saes:
        check_sites(sae, source)
    size = rows_at_once(max(sae.config.d_sae for sae in saes))
    what = f"evaluating {len(saes):,} SAEs" if len(saes) > 1 else "evaluating"
    batches = progress(
        source.batches(size), f"{what} on {source.num_rows:,} rows", source.num_batches(size)
    )
    rows = measure_rows(saes, batches)
    _, targets = input_and_target_sites(saes[0].config.kind, source.site_names)
    spliced = [None] * len(saes)
    if model is not None:
        sequences = source.sequences(spliced_tokens, tokenizer_of(model))
        if sequences is None:
            raise UserError("the store has no tokens to run a language model on; leave out --model")
        tokens, used, is_text = sequences
        # The mean is that of the targets, which are the same for all.
        spliced = measure_spliced(
            saes, model, source.site_names, tokens, used, rows[0].mean, is_text
        )
    return [
        _evaluation(sae, source, about, of_rows, at_sites, targets)
        for sae, about, of_rows, at_sites in zip(saes, settings, rows, spliced, strict=True)
    ]


def _evaluation(
    sae: SAE,
    source,
    settings: dict,
    rows: RowMetrics,
    at_sites: dict[str, dict[str, float]] | None,
    targets: Sequence[str],
) -> Evaluation:
    """Returns what was measured of one SAE, `at_sites` inside the language model or None."""
    by_site = {site: {"fvu": float(v)} for site, v in zip(targets, rows.site_fvu, strict=True)}
    spliced = None
    if at_sites is not None:
        spliced = {
            name: type(value)(np.mean([at_site[name] for at_site in at_sites.values()]))
            for name, value in at_sites[targets[0]].items()
        }
        by_site = {site: by_site[site] | at_sites[site] for site in targets}
    by_site = by_site if len(targets) > 1 else {}
    recovery = None
    if isinstance(source, WorldRows) and jax.process_index() == 0:
        recovery = _with_optimum(measure_recovery(sae, source), sae, source, rows.scalars["mse"])
    return Evaluation(settings, rows, spliced, by_site, recovery)


def _with_optimum(recovery: Recovery, sae: SAE, source: WorldRows, mse: float) -> Recovery:
    """Returns `recovery` with the least error that as many latents can have, where it is known."""
    least = source.optimal_mse(sae)
    if least is None:
        return recovery
    optimum = {"optimal_mse": least, "mse_over_optimal": mse / least if least > 0 else math.nan}
    return dataclasses.replace(recovery, scalars=recovery.scalars | optimum)


def save(evaluation: Evaluation, out, overwrite: bool = False) -> None:
    """Writes an evaluation to the JSON file `out`, and its arrays beside it.

    The arrays are in `latents_file` and, for a synthetic world, in `recovery_file`; the indices of
    the dead latents are in `dead_latents_file`, one a line. Raises UserError if `out` holds
    anything but an evaluation with the same settings, and leaves it as it is. One of the same run
    at another step, or before it was trained again, is replaced, and with `overwrite` any other
    evaluation.
    """
    out = paths.path(out)
    read_saved(out, evaluation.settings, overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = evaluation.rows
    arrays = {name: getattr(rows, name).astype(np.float32) for name in _ARRAYS}
    _save_arrays(latents_file(out), arrays)
    if evaluation.recovery is not None:
        _save_arrays(recovery_file(out), evaluation.recovery.arrays())
    paths.write(dead_latents_file(out), "".join(f"{i}\n" for i in evaluation.dead_latents))
    paths.save_json(evaluation.to_dict(), out)


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What an evaluation is of, as far as its table says it."""

    rows: str
    positions: str


@dataclasses.dataclass(frozen=True)
class _Saved:
    """The JSON file of an evaluation."""

    settings: dict
    rows: int
    reconstruction: dict[str, float | None]
    sparsity: dict
    language_model: dict[str, int | float | None] | None
    sites: dict[str, dict[str, int | float | None]]
    recovery: dict[str, float | None] | None


def load(file) -> Evaluation:
    """Returns the evaluation that `save` wrote to `file`. Raises UserError if it cannot be read."""
    file = paths.path(file)
    saved = checked(read_json(file), _Saved, file)
    checked(saved.settings, _Settings, f"{file}, settings")
    arrays = read_npz(latents_file(file))
    scalars, spliced = saved.reconstruction | saved.sparsity, saved.language_model
    try:
        scalars = {name: scalars[name] for name in _ROWS}
        scalars = _with_nan(checked(scalars, dict[str, float | None], file))
        rows = RowMetrics(saved.rows, scalars, **{name: arrays[name] for name in _ARRAYS})
        if spliced:
            spliced = _with_nan(spliced | {"replaced": spliced["replaced"]})
        recovery = None
        if saved.recovery:
            found, arrays = _with_nan(saved.recovery), read_npz(recovery_file(file))
            recovery = Recovery.from_parts(rows.rows, found, arrays)
    except (KeyError, ValueError) as error:
        raise UserError(f"{file} is no evaluation, or a damaged one: {error}") from None
    sites = {site: _with_nan(found) for site, found in saved.sites.items()}
    return Evaluation(saved.settings, rows, spliced, sites, recovery)


def read_saved(out: AnyPath, settings: dict, overwrite: bool = False) -> dict | None:
    """Returns the content of the JSON file `out`, as `Evaluation.to_dict` made it with these
    settings; None where there is no file, or one of the same run at another step, or before it was
    trained again, or with `overwrite` of any other evaluation.

    Raises UserError if `out` holds anything else.
    """
    if not out.exists():
        return None
    try:
        found = read_json(out)
        saved = checked(found, _Saved, out)
    except UserError:
        raise UserError(f"{out} exists and is no evaluation; choose another --out") from None
    changes = difference(_without_checkpoint(saved.settings), _without_checkpoint(settings))
    if changes and not overwrite:
        raise UserError(
            f"{out} holds another evaluation ({changes[0]}); choose another --out, or measure it "
            "anew with --overwrite"
        )
    return None if difference(saved.settings, settings) else found


def checkpoint_settings(run: AnyPath, step: int) -> dict:
    """Returns the settings that tell a run's checkpoint from those before it, and from those that
    the same run had before it was trained again: the step, and a hash of result.json."""
    file = run / "result.json"
    result = hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.is_file() else None
    return {"step": step, "result": result}


def is_of(out: AnyPath, run: AnyPath) -> bool:
    """Whether the JSON file `out` is there and holds what was found of a run as it has ended, such
    as an evaluation: not of a checkpoint before, nor of the run before it was trained again.
    """
    try:
        settings = read_json(out, default={}).get("settings")
    except UserError:  # damaged
        return False
    result = checkpoint_settings(run, 0)["result"]
    return isinstance(settings, dict) and settings.get("result") == result is not None


def _without_checkpoint(settings: dict) -> dict:
    return {name: value for name, value in settings.items() if name not in _WHICH}


def latents_file(out) -> AnyPath:
    """Returns the path of the .npz file with the arrays of the evaluation in `out`.

    They are those of `metrics.RowMetrics`, in float32: density, mean_activation and max_activation
    (d_sae,), the mean of the targets (d_out,), and site_fvu (sites,).
    """
    out = paths.path(out)
    return out.with_name(f"{out.stem}_latents.npz")


def dead_latents_file(out) -> AnyPath:
    """Returns the path of the text file of dead latents of the evaluation in `out`."""
    out = paths.path(out)
    return out.with_name(f"{out.stem}_dead_latents.txt")


def recovery_file(out) -> AnyPath:
    """Returns the path of the .npz file with the arrays of the recovery in the evaluation `out`.

    They have the names that `Recovery.arrays` gives them.
    """
    out = paths.path(out)
    return out.with_name(f"{out.stem}_recovery.npz")


def _save_arrays(file: AnyPath, arrays: dict[str, np.ndarray]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    paths.write(file, buffer.getvalue())


def _finite(values: dict[str, float]) -> dict:
    """Returns the values with None for those that are not finite, which JSON cannot hold."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _with_nan(values: dict) -> dict:
    """Returns the values with NaN for those that are None."""
    return {name: math.nan if value is None else value for name, value in values.items()}


def _labelled(labels: dict, values: dict) -> list[tuple[str, float, str]]:
    """Returns (label, value, unit) for each of the metrics in `values` that has a label."""
    return [(label, values[name], unit) for name, (label, unit) in labels.items() if name in values]
