"""Language models: a decoder whose activations can be read and edited, and harvests of them."""

import pathlib

from sae_jax.lm.architecture import (
    SITES,
    DecoderConfig,
    Rope,
    hook_name,
    init,
    layout,
    site_of_hook,
    site_width,
)
from sae_jax.lm.bridge import TorchModel, is_torch
from sae_jax.lm.chat import chat_prompt
from sae_jax.lm.corpus import standard_library
from sae_jax.lm.decoder import forward, next_token_loss
from sae_jax.lm.directory import hub_name
from sae_jax.lm.documents import read_labelled, read_texts, text_files
from sae_jax.lm.edits import add_direction, at, put, reading, same_norm, unless
from sae_jax.lm.families import load_config
from sae_jax.lm.generate import Generated, generate
from sae_jax.lm.harvest import harvest
from sae_jax.lm.language_model import LanguageModel, in_batches
from sae_jax.lm.latent_edits import clamp, latent_edits, reconstruct
from sae_jax.lm.live import LiveStore, open_store, open_stream
from sae_jax.lm.model import JaxModel, local_mesh, open_model
from sae_jax.lm.shuffled import shuffled_model
from sae_jax.lm.text import (
    NO_DOCUMENT,
    PACKING_RULE,
    Tokenizer,
    load_tokenizer,
    pack,
    pack_documents,
)
from sae_jax.lm.weights import fingerprint, load_params, mlp_norm, save_model, with_weights

__all__ = [
    "DEMO_MODEL",
    "NO_DOCUMENT",
    "PACKING_RULE",
    "SITES",
    "DecoderConfig",
    "Generated",
    "JaxModel",
    "LanguageModel",
    "LiveStore",
    "Rope",
    "Tokenizer",
    "TorchModel",
    "add_direction",
    "at",
    "chat_prompt",
    "clamp",
    "fingerprint",
    "forward",
    "generate",
    "harvest",
    "hook_name",
    "hub_name",
    "in_batches",
    "init",
    "is_torch",
    "latent_edits",
    "layout",
    "load_config",
    "load_params",
    "load_tokenizer",
    "local_mesh",
    "mlp_norm",
    "next_token_loss",
    "open_model",
    "open_store",
    "open_stream",
    "pack",
    "pack_documents",
    "put",
    "read_labelled",
    "read_texts",
    "reading",
    "reconstruct",
    "same_norm",
    "save_model",
    "shuffled_model",
    "site_of_hook",
    "site_width",
    "standard_library",
    "text_files",
    "unless",
    "with_weights",
]

DEMO_MODEL = pathlib.Path(__file__).parents[1] / "assets" / "one_layer"
"""The directory of the one-layer transformer that ships here, which
experiments/one_layer_transformer.py made."""
