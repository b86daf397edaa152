"""Turns an SAE of a site that TransformerLens has no hook for into one of the nearest hook.

What an MLP reads, mlp_in.L, is its norm's output h w + b, with the weight and bias of the norm.
TransformerLens has a hook at h alone, blocks.L.ln2.hook_normalized, with a weight and a bias that
come after it or are folded into the MLP (`fold_ln`). So an SAE of mlp_in is exported for that hook
with w and b in its own encoder, and works in TransformerLens with folding and without.
"""

import numpy as np

from sae_jax import lm
from sae_jax.errors import UserError
from sae_jax.interop.weights import float64_parameters, make_sae
from sae_jax.sae import SAE

_SITE = "mlp_in"


def needs_norm(provenance: dict) -> bool:
    """Returns whether an SAE of this provenance reads what TransformerLens has no hook for."""
    return provenance.get("site", "").rpartition(".")[0] == _SITE


def at_hook(sae: SAE, provenance: dict, model) -> tuple[SAE, dict]:
    """Returns a folded SAE as one of TransformerLens' hook, and its provenance with that hook.

    The latents of the result at the hook are those of `sae` at its site, and so are a transcoder's
    outputs. An autoencoder's reconstruct what is at the hook.

    Raises UserError if the model cannot be read, is not as wide as the SAE, or has a weight of 0
    that an autoencoder's output would have to be divided by.

    Args:
      sae: an SAE with scales 1, of a site mlp_in.L that its provenance names.
      provenance: where it comes from, as `read_provenance` gives it.
      model: the language model, of a family that `lm.load_params` reads.
    """
    layer = int(provenance["site"].rpartition(".")[2])
    weight, bias = (array.astype(np.float64) for array in lm.mlp_norm(model, layer))
    config, p = sae.config, float64_parameters(sae)
    if config.d_in != len(weight):
        raise UserError(f"the SAE reads {config.d_in} numbers, but {model} is {len(weight)} wide")
    if not config.apply_b_dec_to_input:
        for name, gain in (("b_enc", 1.0), ("b_mag", np.exp(p.get("r_mag", 0)))):
            if name in p:
                p[name] = p[name] + gain * (bias @ p["w_enc"])
    p["w_enc"] = weight[:, None] * p["w_enc"]
    if config.kind == "autoencoder":
        if not weight.all():
            raise UserError(f"the norm of {provenance['site']} of {model} has a weight of 0")
        p |= {"w_dec": p["w_dec"] / weight, "b_dec": (p["b_dec"] - bias) / weight}
    if "w_skip" in p:
        p["b_dec"] = p["b_dec"] + bias @ p["w_skip"]
        p["w_skip"] = weight[:, None] * p["w_skip"]
    hook = f"blocks.{layer}.ln2.hook_normalized"
    about = provenance | {"hook_name": hook, "hook_layer": layer}
    return make_sae(config, config.d_in, config.d_out, p), about
