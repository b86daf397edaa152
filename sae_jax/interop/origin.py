"""What a run can tell other frameworks of where its SAE comes from."""

import json

from sae_jax import paths
from sae_jax.activations import Store, is_world
from sae_jax.config import UserError
from sae_jax.interop import native, saelens
from sae_jax.train import read_config

_MEASURED = ("tokens", "eval_loss", "eval_fvu", "dead_fraction")


def origin(path) -> dict:
    """Of the SAE at `path`: a run of ours, one of its checkpoints, or our own exchange format.

    Names as in SAELens' metadata where it has one: hook_name and hook_layer in TransformerLens'
    terms, model_name, context_size, prepend_bos, l0; then site, run_id and how well it did. What
    cannot be known, as when the store is not at hand any more, is left out."""
    path = paths.path(path)
    if not paths.is_remote(path) and native.recognises(path):
        return native.about(path)
    run = path.parent.parent if path.parent.name == "checkpoints" else path
    if not (run / "config.json").is_file() or not (run / "checkpoints").is_dir():
        return {}
    data = read_config(run).data
    target = {"target_site": data.target_site} if data.target_site else {}
    return _of_site(data.site) | target | _of_store(data.store) | _of_result(run / "result.json")


def _of_site(site: str) -> dict:
    hook, layer = saelens.hook_of(site), site.rpartition(".")[2]
    told = {"site": site, "hook_name": hook}
    if hook and layer.isdecimal():
        told["hook_layer"] = int(layer)
    if site.startswith("resid_post."):
        told["hf_module"] = f"model.layers.{layer}.output"
    return {name: value for name, value in told.items() if value is not None}


def _of_store(path: str) -> dict:
    if is_world(path):
        return {"dataset_path": path}
    try:
        meta = Store.open(path).meta
    except (UserError, OSError):
        return {}
    told = {
        "model_name": meta.model,
        "context_size": meta.context_length,
        "prepend_bos": True if meta.model else None,
        "dataset_path": meta.provenance.get("text"),
    }
    return {name: value for name, value in told.items() if value is not None}


def _of_result(file) -> dict:
    if not file.is_file():
        return {}
    result = json.loads(file.read_text())
    told = {"run_id": result.get("run_id"), "l0": result.get("eval_l0")}
    told |= {name: result.get(name) for name in _MEASURED}
    return {name: value for name, value in told.items() if value is not None}
