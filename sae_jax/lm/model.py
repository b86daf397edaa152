"""A language model of a Hugging Face directory that our own decoder runs, and `open_model`."""

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
from sae_jax.lm.decoder import forward
from sae_jax.lm.directory import model_directory, pinned_spec
from sae_jax.lm.edits import as_pytree
from sae_jax.lm.families import load_config
from sae_jax.lm.language_model import LanguageModel
from sae_jax.lm.tensors import names_of
from sae_jax.lm.weights import fingerprint, load_params


class JaxModel(LanguageModel):
    """The model of a Hugging Face directory, or of hf://org/repository[@revision] on the hub, run
    by `lm.forward`.

    mesh: axes `data` and `model`; None: on JAX's default device. scan: run the layers in a loop,
    which compiles in the same time whatever their number. `config` is its `DecoderConfig`, and
    `params` are the parameters that `lm.forward` takes; those of a model on the hub are downloaded
    when they are first asked for."""

    def __init__(
        self,
        directory,
        dtype: str = "float32",
        mesh: jax.sharding.Mesh | None = None,
        scan: bool = False,
    ):
        self.directory = model_directory(directory)
        self.spec = pinned_spec(directory, self.directory)
        self.dtype, self.mesh, self.scan = dtype, mesh, scan
        self.config = load_config(self.spec)
        self.vocab_size = self.config.vocab_size
        self.max_context = self.config.max_context

    @functools.cached_property
    def params(self) -> dict:
        return load_params(self.spec, jnp.dtype(self.dtype), self.mesh, self.scan)

    @functools.cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.spec)

    @property
    def layers_module(self) -> str:
        names = names_of(read_json(self.directory / "config.json")["model_type"])
        return names.base + names.layers

    def site_width(self, site: str) -> int:
        return site_width(self.config, site)

    def flops_per_token(self, sites: Sequence[str], context_length: int) -> float:
        """Of whole layers; attention's products for the keys that a query sees on average."""
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
        """See `LanguageModel.forward`. The program is compiled once for all values of what
        `lm.edits` makes, and once for each function of another's own."""
        edits = {site: as_pytree(edit) for site, edit in (edits or {}).items()}
        with self._on_mesh():
            return self._compiled(
                self.params, self._placed(tokens), edits, taps=tuple(taps), logits=logits
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
        """The ambient mesh may be a trainer's: a live store runs its model amid the training."""
        return jax.set_mesh(self.mesh) if self.mesh is not None else contextlib.nullcontext()

    def _placed(self, tokens) -> jax.Array:
        if self.mesh is None:
            return jnp.asarray(tokens)
        return jax.device_put(tokens, NamedSharding(self.mesh, P("data", None)))


def open_model(
    spec, dtype: str = "float32", mesh: jax.sharding.Mesh | None = None, scan: bool = False
) -> LanguageModel:
    """Opens a language model.

    spec: a Hugging Face directory, or hf://org/repository[@revision] on the hub, which our decoder
    runs; or either with "torch:" before it, which transformers runs on one device. dtype: in which
    it computes, float32 or bfloat16. mesh: axes `data` and `model` (None: JAX's default device).
    scan: run the layers in a loop. UserError where there is no such model, or one of a family that
    we do not know."""
    if not bridge.is_torch(spec):
        return JaxModel(spec, dtype, mesh, scan)
    if scan:
        raise UserError(f"{spec} runs as transformers has it; leave out --scan_layers")
    if mesh is not None and mesh.shape["model"] > 1:
        raise UserError(f"{spec} runs on one device; leave the mesh's model axis (mesh_model) at 1")
    return bridge.TorchModel(spec, dtype)


def local_mesh(devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """A mesh whose devices share the batch and each hold the model: all of this process's devices,
    or those given."""
    devices = jax.local_devices() if devices is None else devices
    return jax.make_mesh((len(devices), 1), ("data", "model"), devices=devices)
