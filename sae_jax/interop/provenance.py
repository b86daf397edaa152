"""What is known of where an SAE comes from: for other frameworks and the reader of a model card."""

import dataclasses
import json

from sae_jax import paths
from sae_jax.activations import is_world
from sae_jax.activations.files import Folder
from sae_jax.activations.store import read_complete_meta
from sae_jax.config import Config
from sae_jax.errors import UserError
from sae_jax.interop import sae_jax_format, saelens
from sae_jax.interop.locate import locate
from sae_jax.lm import hook_name, hub_name
from sae_jax.train.directory import read_config

_MEASURED = ("tokens", "eval_loss", "eval_fvu", "dead_fraction")
_SAE = ("k", "sparsity_coefficient", "target_l0", "prefix_widths", "aux_coefficient", "normalize")
_EVALUATED = {
    "reconstruction": ("fvu", "explained_variance", "mse", "cosine_similarity"),
    "sparsity": ("l0", "dead_fraction"),
    "language_model": ("ce_clean", "ce_spliced", "ce_zero", "ce_recovered_zero", "kl_spliced"),
}


def read_provenance(path) -> dict:
    """Of the SAE at `path`: a run of ours, one of its checkpoints, our own exchange format, or
    SAELens'.

    Names as in SAELens' metadata where it has one: hook_name and hook_layer in TransformerLens'
    terms, model_name, dataset_path, context_size, prepend_bos, l0; then site, run_id, how well it
    did, `training` (how it was trained) and `evaluation` (of eval.json). What cannot be known, as
    when the store is not at hand any more, or how well a checkpoint does that is not a run's end,
    is left out."""
    path = locate(path)
    if not paths.is_remote(path):
        if sae_jax_format.recognises(path):
            return sae_jax_format.read_provenance(path)
        if saelens.recognises(path):
            return saelens.about(path)
    step = int(path.name) if path.parent.name == "checkpoints" else None
    run = path if step is None else path.parent.parent
    if not (run / "config.json").is_file() or not (run / "checkpoints").is_dir():
        return {}
    config = read_config(run)
    data, last = config.data, config.train.tokens // config.data.batch_size
    if step is None:
        names = [entry.name for entry in (run / "checkpoints").iterdir()]
        step = max((int(name) for name in names if name.isdecimal()), default=0)
    about = _of_sites(data.site, data.target_site) | _of_store(data.store, data.site)
    about["training"] = _recipe(config, step)
    return about | _result(run) | _evaluation(run) if step == last else about


def _result(run: paths.AnyPath) -> dict:
    """What result.json says of a run that has ended."""
    values = _read(run / "result.json")
    told = {"run_id": values.get("run_id"), "l0": values.get("eval_l0")}
    return _known(told | {name: values.get(name) for name in _MEASURED})


def _evaluation(run: paths.AnyPath) -> dict:
    """{"evaluation": {...}} of the eval.json that `sae-jax eval --run` left, {} without one."""
    values = _read(run / "eval.json")
    told = {
        name: (values.get(section) or {}).get(name)
        for section, names in _EVALUATED.items()
        for name in names
    }
    told = _known(told | {"rows": values.get("rows")})
    return {"evaluation": told} if told else {}


def _of_sites(site: str, target: str) -> dict:
    hook, layer = hook_name(site), site.rpartition(".")[2]
    told = {"site": site, "hook_name": hook, "hook_layer": int(layer) if hook else None}
    if target:
        told |= {"target_site": target, "hook_name_out": hook_name(target)}
    return _known(told)


def _of_store(path: str, site: str) -> dict:
    if is_world(path):
        return {"dataset_path": path}
    try:
        meta = read_complete_meta(Folder(path))
    except (UserError, OSError):
        return {}
    told = {
        "model_name": on_hub.repo if (on_hub := hub_name(meta.model or "")) else meta.model,
        "context_size": meta.context_length,
        "prepend_bos": True if meta.model else None,  # as `lm.pack` does
        "dataset_path": _dataset(meta.provenance.get("text")),
    }
    name, _, layer = site.rpartition(".")
    if name == "resid_post" and "layers_module" in meta.provenance:
        told["hf_module"] = f"{meta.provenance['layers_module']}.{layer}.output"
    return _known(told)


def _dataset(texts) -> str | None:
    """Of harvest's --text, as Hugging Face's `datasets` calls it where it is from there."""
    texts = [texts] if isinstance(texts, str) else texts or []
    return ",".join(text.removeprefix("datasets:") for text in texts) or None


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
    return _known(recipe)


def _read(file: paths.AnyPath) -> dict:
    return json.loads(file.read_text()) if file.is_file() else {}


def _known(values: dict) -> dict:
    return {name: value for name, value in values.items() if value is not None}
