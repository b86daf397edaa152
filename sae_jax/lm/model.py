"""Opens language models, and runs those of a Hugging Face directory by our own decoder."""

import contextlib
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sae_jax.errors import UserError
from sae_jax.json_files import read_json
from sae_jax.lm import bridge
from sae_jax.lm.architecture import layout, site_width
from sae_jax.lm.continuation import continuations
from sae_jax.lm.decoder import forward
from sae_jax.lm.directory import model_directory, pinned_spec
from sae_jax.lm.edits import as_pytree
from sae_jax.lm.families import load_config
from sae_jax.lm.language_model import LanguageModel
from sae_jax.lm.tensors import names_of
from sae_jax.lm.weights import fingerprint, load_params


class JaxModel(LanguageModel):
    """A language model that `lm.forward` runs.

    Attributes:
      config: its `DecoderConfig`.
      scan: whether its layers run in a loop.

    Other attributes are those of `LanguageModel`.
    """

    def __init__(
        self,
        directory,
        dtype: str = "float32",
        mesh: jax.sharding.Mesh | None = None,
        scan: bool = False,
    ):
        """Opens the model, but does not read its weights.

        Raises UserError if there is no such model, or if it is of a family that is not implemented.

        Args:
          directory: a Hugging Face directory, or hf://org/repository[@revision] on the hub.
          dtype: the type in which it computes, float32 or bfloat16.
          mesh: a mesh with axes `data` and `model`. None: JAX's default device.
          scan: whether the layers run in a loop, which compiles in the same time whatever their
            number.
        """
        self.directory = model_directory(directory)
        self.spec = pinned_spec(directory, self.directory)
        self.dtype, self.mesh, self.scan = dtype, mesh, scan
        self.config = load_config(self.spec)
        self.vocab_size = self.config.vocab_size
        self.max_context = self.config.max_context

    @functools.cached_property
    def params(self) -> dict:
        """The parameters that `lm.forward` takes, read or downloaded when first asked for."""
        return load_params(self.spec, jnp.dtype(self.dtype), self.mesh, self.scan)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of its config and weights, which a store keeps."""
        return fingerprint(self.spec)

    @property
    def layers_module(self) -> str:
        names = names_of(read_json(self.directory / "config.json")["model_type"])
        return names.base + names.layers

    def site_width(self, site: str) -> int:
        return site_width(self.config, site)

    def flops_per_token(self, sites: Sequence[str], context_length: int) -> float:
        """Returns the FLOPs of the matrix products of all layers up to the last of `sites`.

        Layers count whole. Attention counts for as many keys as a query sees on average in a
        context of `context_length` tokens.
        """
        config = self.config
        depth = 1 + max(int(site.rpartition(".")[2]) for site in sites)
        matrices = [leaf for leaf in layout(config)["layers"][0].values() if leaf.inputs]
        total = 2.0 * depth * sum(math.prod(leaf.shape) for leaf in matrices)
        for layer in range(depth):
            window = config.kind(layer).window or context_length
            keys = np.minimum(np.arange(1, context_length + 1), window).mean()
            total += 4.0 * config.num_heads * config.head_dim * keys
        return total

    def forward(self, tokens, taps=(), edits=None, logits=True):
        """Runs the model as `LanguageModel.forward` says.

        The program is compiled once for all edits of one kind that `lm.edits` makes, whatever their
        values, and once for each other function.
        """
        edits = {site: as_pytree(edit) for site, edit in (edits or {}).items()}
        with self._on_mesh():
            return self._compiled(
                self.params, self._placed(tokens), edits, taps=tuple(taps), logits=logits
            )

    def continuations(self, prompts, samples, rules, prompt_edits, new_edits, on_tokens=None):
        """Writes texts as `LanguageModel.continuations` says.

        The programs are compiled once for prompts and limits of similar length and for all edits of
        one kind.
        """
        with self._on_mesh():
            return continuations(
                self.params,
                self.config,
                self.mesh,
                prompts,
                samples,
                rules,
                prompt_edits,
                new_edits,
                on_tokens,
            )

    def runner(self, sites, dtype):
        sites = tuple(sites)

        @jax.jit
        def run(params, tokens):
            _, taps = forward(params, tokens, self.config, taps=sites, logits=False)
            return {site: taps[site].astype(dtype) for site in sites}

        def run_on(tokens):
            with self._on_mesh():
                return run(self.params, self._placed(tokens))

        return run_on

    @functools.cached_property
    def _compiled(self):
        def run(params, tokens, edits, taps, logits):
            return forward(params, tokens, self.config, taps, edits, logits)

        return jax.jit(run, static_argnames=("taps", "logits"))

    def _on_mesh(self):
        """Makes the model's mesh the ambient one, which in training is the trainer's otherwise."""
        return jax.set_mesh(self.mesh) if self.mesh is not None else contextlib.nullcontext()

    def _placed(self, tokens) -> jax.Array:
        if self.mesh is None:
            return jnp.asarray(tokens)
        return jax.device_put(tokens, NamedSharding(self.mesh, P("data", None)))


def open_model(
    spec, dtype: str = "float32", mesh: jax.sharding.Mesh | None = None, scan: bool = False
) -> LanguageModel:
    """Opens a language model.

    Raises UserError if there is no such model, or if it is of a family that is not implemented.

    Args:
      spec: a Hugging Face directory, or hf://org/repository[@revision] on the hub, which our
        decoder runs. With "torch:" before it, transformers runs it on one device.
      dtype: the type in which it computes, float32 or bfloat16.
      mesh: a mesh with axes `data` and `model`. None: JAX's default device.
      scan: whether our decoder runs the layers in a loop, which compiles faster.
    """
    if not bridge.is_torch(spec):
        return JaxModel(spec, dtype, mesh, scan)
    if scan:
        raise UserError(f"{spec} runs as transformers has it; leave out --scan_layers")
    if mesh is not None and mesh.shape["model"] > 1:
        raise UserError(f"{spec} runs on one device; leave the mesh's model axis (mesh_model) at 1")
    return bridge.TorchModel(spec, dtype)


def local_mesh(devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """Returns a mesh whose devices share the batch and each hold the whole model.

    devices: by default all devices of this process.
    """
    devices = jax.local_devices() if devices is None else devices
    return jax.make_mesh((len(devices), 1), ("data", "model"), devices=devices)
