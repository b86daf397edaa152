"""Reads where an SAE comes from, for other frameworks and for the readers of a model card."""

import dataclasses
from typing import Any

from sae_jax import paths
from sae_jax.activations import is_world
from sae_jax.activations.files import Folder
from sae_jax.activations.meta import read_complete_meta
from sae_jax.config import Config
from sae_jax.errors import UserError
from sae_jax.interop import sae_jax_format, saelens
from sae_jax.interop.locate import locate
from sae_jax.json_files import checked, read_json
from sae_jax.lm import hook_name, hub_name
from sae_jax.train.directory import find_store, read_config, read_lineage

_MEASURED = ("tokens", "eval_loss", "eval_fvu", "eval_rows", "dead_fraction")
_SAE = ("k", "sparsity_coefficient", "target_l0", "prefix_widths", "aux_coefficient", "normalize")
_EVALUATED = {
    "reconstruction": ("fvu", "explained_variance", "mse", "cosine_similarity"),
    "sparsity": ("l0", "dead_fraction"),
    "language_model": ("ce_clean", "ce_spliced", "ce_zero", "ce_recovered_zero", "kl_spliced"),
}
_Number = int | float


@dataclasses.dataclass(frozen=True)
class _Training:
    """Describes what cards and indices need of `training`; they show whatever else there is."""

    architecture: str | None = None
    d_sae: int | None = None


@dataclasses.dataclass(frozen=True)
class _Provenance:
    """Describes a provenance, in which there may be more."""

    site: str | None = None
    target_site: str | None = None
    hook_name: str | None = None
    hook_name_out: str | None = None
    hook_layer: int | None = None
    model_name: str | None = None
    hf_module: str | None = None
    hf_target_module: str | None = None
    dataset_path: str | None = None
    context_size: int | None = None
    prepend_bos: bool | None = None
    run_id: str | None = None
    imported_from: str | None = None
    l0: _Number | None = None
    tokens: _Number | None = None
    eval_loss: _Number | None = None
    eval_fvu: _Number | None = None
    eval_rows: _Number | None = None
    dead_fraction: _Number | None = None
    training: _Training = _Training()
    evaluation: dict[str, _Number | None] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class _Evaluation:
    """Describes what we use of eval.json."""

    reconstruction: dict[str, Any] | None = None
    sparsity: dict[str, Any] | None = None
    language_model: dict[str, Any] | None = None
    rows: int | None = None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


def read_provenance(path) -> dict:
    """Returns what is known of where the SAE at `path` comes from, by name.

    `path` is a run, one of its checkpoints, or an export in sae_jax's own format or in SAELens'.
    For other formats, and where there is no SAE, the result is empty.

    The names are those of SAELens' metadata where it has one: hook_name and hook_layer in
    TransformerLens' terms, model_name, dataset_path, context_size, prepend_bos and l0. Others are
    site, run_id, the final metrics of the run, `training` (how the SAE was trained) and
    `evaluation` (the metrics of eval.json). What cannot be known is left out: what the store says,
    if the store is gone, and the metrics of a checkpoint that is not the end of its run.

    Raises UserError if a file that says it is damaged.
    """
    path = locate(path)
    provenance = _read_provenance(path)
    checked(provenance, _Provenance, f"the provenance of {path}")
    return provenance


def _read_provenance(path: paths.AnyPath) -> dict:
    if not paths.is_remote(path):
        if sae_jax_format.recognises(path):
            return sae_jax_format.read_provenance(path)
        if saelens.recognises(path):
            return saelens.read_provenance(path)
    step = int(path.name) if path.parent.name == "checkpoints" else None
    run = path if step is None else path.parent.parent
    if not (run / "config.json").is_file() or not (run / "checkpoints").is_dir():
        return {}
    config = read_config(run)
    data, last = config.data, config.train.tokens // config.data.batch_size
    if step is None:
        names = [entry.name for entry in (run / "checkpoints").iterdir()]
        step = max((int(name) for name in names if name.isdecimal()), default=0)
    provenance = _site_provenance(data.site, data.target_site)
    provenance |= _store_provenance(find_store(run, data).store, data.site)
    provenance["training"] = _recipe(config, step) | _lineage(run)
    if step == last:
        provenance |= _result_provenance(run) | _evaluation_provenance(run, step)
    return provenance


def _result_provenance(run: paths.AnyPath) -> dict:
    """Returns what result.json says of a run that has ended."""
    result = read_json(run / "result.json", default={})
    values = {"run_id": result.get("run_id"), "l0": result.get("eval_l0")}
    return _without_none(values | {name: result.get(name) for name in _MEASURED})


def _evaluation_provenance(run: paths.AnyPath, step: int) -> dict:
    """Returns {"evaluation": the metrics of the run's eval.json}, or {} if it has none of the
    checkpoint at `step`. (Those made before the step was noted are taken to be of it.)"""
    file = run / "eval.json"
    evaluation = checked(read_json(file, default={}), _Evaluation, file)
    if evaluation.settings.get("step", step) != step:
        return {}
    values = {
        name: (getattr(evaluation, section) or {}).get(name)
        for section, names in _EVALUATED.items()
        for name in names
    }
    values = _without_none(values | {"rows": evaluation.rows})
    return {"evaluation": values} if values else {}


def _site_provenance(site: str, target: str) -> dict:
    hook, layer = hook_name(site), site.rpartition(".")[2]  # no hook at mlp_in: see `hooks`
    values = {"site": site, "hook_name": hook, "hook_layer": int(layer) if hook else None}
    if target:
        values |= {"target_site": target, "hook_name_out": hook_name(target)}
    return _without_none(values)


def _store_provenance(path: str, site: str) -> dict:
    if is_world(path):
        return {"dataset_path": path}
    try:
        meta = read_complete_meta(Folder(path))
    except (UserError, OSError):
        return {}
    values = {
        "model_name": on_hub.repo if (on_hub := hub_name(meta.model or "")) else meta.model,
        "context_size": meta.context_length,
        "prepend_bos": True if meta.model else None,  # as `lm.pack` does
        "dataset_path": _dataset(meta.provenance.get("text")),
    }
    name, _, layer = site.rpartition(".")
    if name == "resid_post" and "layers_module" in meta.provenance:
        values["hf_module"] = f"{meta.provenance['layers_module']}.{layer}.output"
    return _without_none(values)


def _dataset(texts) -> str | None:
    """Returns the texts of harvest's --text, by the names that Hugging Face's `datasets` uses."""
    texts = [texts] if isinstance(texts, str) else texts or []
    return ",".join(text.removeprefix("datasets:") for text in texts) or None


def _lineage(run: paths.AnyPath) -> dict:
    """Returns {"branched_from": the runs that a branch goes back to}, or {} for other runs."""
    texts = [
        f"run {ancestor.run_id} at {ancestor.tokens:,} tokens"
        + (f" ({', '.join(ancestor.changed)})" if ancestor.changed else "")
        for ancestor in read_lineage(run)
    ]
    return {"branched_from": ", then ".join(texts)} if texts else {}


def _recipe(config: Config, steps: int) -> dict:
    sae, data, optimizer = config.sae, config.data, config.optimizer
    recipe = {"architecture": sae.architecture, "kind": sae.kind, "d_sae": sae.d_sae}
    fields = dataclasses.asdict(sae)
    recipe |= {name: fields.get(name) for name in _SAE}
    recipe |= {
        "tokens": steps * data.batch_size,
        "batch_size": data.batch_size,
        "epochs": data.epochs,
        "learning_rate": optimizer.learning_rate,
        "schedule": optimizer.schedule,
        "seed": config.train.seed,
    }
    return _without_none(recipe)


def _without_none(values: dict) -> dict:
    return {name: value for name, value in values.items() if value is not None}
