"""A harvest as people do it without a package: transformers' model, forward hooks, copies to the
host."""

import importlib.metadata
import importlib.util
import os

import numpy as np

from sae_jax import lm
from sae_jax.bench.harvest import Contestant
from sae_jax.errors import UserError

_ATTENTION = ("self_attn", "attn", "attention")
_LAST_MATRIX = ("down_proj", "c_proj", "dense_4h_to_h")


def forward_to_host(
    model: lm.JaxModel, sites: tuple[str, ...], tokens_NxT: np.ndarray, batch: int
) -> Contestant:
    """Transformers' model of `model`'s directory, which fills float32 arrays (N, T, width) of the
    host. No layer after the last site runs, and no logits are computed. UserError without torch
    and transformers, and for a site that has no module of its own."""
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        raise UserError('this needs torch and transformers: pip install "sae-jax[peers]"')
    # Its threads are not to spin while they wait, in the time of whoever comes next.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        lm.with_weights(model.spec), dtype=torch.float32
    ).to(device)
    layers = theirs.get_submodule(model.layers_module)
    host = {site: torch.empty((*tokens_NxT.shape, model.site_width(site))) for site in sites}
    start = 0

    def keep(site, value):
        value = value[0] if isinstance(value, tuple) else value
        host[site][start : start + batch].copy_(value)

    for site in sites:
        name, _, layer = site.rpartition(".")
        module, is_input = _module_of(layers[int(layer)], name)
        if is_input:
            module.register_forward_pre_hook(
                lambda _, args, kwargs, site=site: keep(site, args or kwargs["hidden_states"]),
                with_kwargs=True,
            )
        else:
            module.register_forward_hook(lambda _, args, output, site=site: keep(site, output))
    del layers[1 + max(int(site.rpartition(".")[2]) for site in sites) :]

    def run():
        nonlocal start
        with torch.inference_mode():
            for start in range(0, len(tokens_NxT), batch):
                tokens = torch.from_numpy(tokens_NxT[start : start + batch].astype(np.int64))
                theirs.base_model(tokens.to(device), use_cache=False)

    name = f"transformers {importlib.metadata.version('transformers')}"
    return Contestant(name, run, {site: tensor.numpy() for site, tensor in host.items()})


def _module_of(layer, name: str):
    """(module of a layer, whether the site is its input)."""

    def child(module, names):
        return next(getattr(module, n) for n in names if hasattr(module, n))

    if name in ("resid_pre", "resid_post"):
        return layer, name == "resid_pre"
    if name == "attn_out":
        return child(layer, _ATTENTION), False
    if name in ("mlp_in", "mlp_out"):
        return layer.mlp, name == "mlp_in"
    if name == "mlp_act":
        return child(layer.mlp, _LAST_MATRIX), True
    raise UserError(
        f"{name} is no module's input or output in transformers; measure resid_pre, attn_out, "
        "mlp_in, mlp_act, mlp_out or resid_post"
    )
