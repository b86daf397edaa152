"""Finds a language model's files in a local directory, or downloads them from the hub."""

import pathlib

from sae_jax import hub, paths

TORCH = "torch:"  # before the name of a model, for one that transformers runs
_SMALL = (
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


def model_directory(spec) -> pathlib.Path:
    """Returns the local directory of a model, which need not have its weights yet.

    `spec` is a directory, or hf://org/repository[@revision][/folder], of which the configuration
    and the tokenizer are downloaded. Raises UserError if the hub does not have or give them.
    """
    if not hub.is_hub_name(spec):
        return paths.local(spec)
    return hub.fetch(spec, _SMALL, needed=["config.json"])


def hub_name(spec: str) -> hub.HubName | None:
    """Returns the hub's name of a model that `open_model` takes, or None for a directory."""
    name = spec.removeprefix(TORCH)
    return hub.parse(name) if hub.is_hub_name(name) else None


def pinned_spec(spec, directory: pathlib.Path) -> str:
    """Returns the name by which a model is found again from any working directory.

    It is the absolute path of `directory`, or for a name on the hub that name with the commit.
    """
    if hub.is_hub_name(spec):
        return str(hub.pinned(spec, directory))
    return str(directory.absolute())
