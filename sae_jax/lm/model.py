"""A language model that is ready to run: what harvest, live stores and evaluation ask of one.

The parameters are read when the model is first run, so that what is wrong with a request is said
before that.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sae_jax.errors import UserError
from sae_jax.lm import bridge
from sae_jax.lm.architecture import layout, site_width
from sae_jax.lm.decoder import forward
from sae_jax.lm.directory import model_directory, pinned_spec
from sae_jax.lm.families import load_config
from sae_jax.lm.tensors import names_of
from sae_jax.lm.text import load_tokenizer, read_json
from sae_jax.lm.weights import fingerprint, load_params


class Model:
    """The model of a Hugging Face directory, or of hf://org/repository[@revision] on the hub.

    It is computed in `dtype` over `mesh` (axes `data` and `model`; None: all of this process's
    devices along `data`). scan: in a loop over its layers, which compiles in the same time whatever
    their number. Of a model on the hub the weights are downloaded when they are needed."""

    def __init__(
        self,
        directory,
        dtype: str = "float32",
        mesh: jax.sharding.Mesh | None = None,
        scan: bool = False,
    ):
        self.directory = model_directory(directory)
        self.spec = pinned_spec(directory, self.directory)  # what `open_model` takes, from anywhere
        self.dtype, self.scan = dtype, scan
        self.mesh = mesh or jax.make_mesh(
            (jax.local_device_count(), 1), ("data", "model"), devices=jax.local_devices()
        )
        self.config = load_config(self.spec)
        self.vocab_size = self.config.vocab_size
        self.max_context = self.config.max_context

    @functools.cached_property
    def tokenizer(self):
        return load_tokenizer(self.spec)

    @functools.cached_property
    def params(self) -> dict:
        return load_params(self.spec, jnp.dtype(self.dtype), self.mesh, self.scan)

    @functools.cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.spec)

    @property
    def layers_module(self) -> str:
        """Where transformers' model has its layers, such as model.layers."""
        names = names_of(read_json(self.directory / "config.json")["model_type"])
        return names.base + names.layers

    def site_width(self, site: str) -> int:
        """UserError for a site that the model does not have."""
        return site_width(self.config, site)

    def flops_per_token(self, sites: Sequence[str], context_length: int) -> float:
        """FLOPs of the products that `sites` need, whole layers, a multiply and an add being two;
        attention's for the keys that a query sees on average."""
        config = self.config
        depth = 1 + max(int(site.rpartition(".")[2]) for site in sites)
        matrices = [leaf for leaf in layout(config)["layers"][0].values() if leaf.inputs]
        total = 2.0 * depth * sum(math.prod(leaf.shape) for leaf in matrices)
        for layer in range(depth):
            window = config.kind(layer).window or context_length
            keys = np.minimum(np.arange(1, context_length + 1), window).mean()
            total += 4.0 * config.num_heads * config.head_dim * keys
        return total

    def runner(self, sites: Sequence[str], dtype) -> Callable[[np.ndarray], dict]:
        """tokens (B, T) on the host, B a multiple of the mesh's `data` -> {site: (B, T, width)} of
        `dtype` on the devices, not awaited."""
        sharding, sites = NamedSharding(self.mesh, P("data", None)), tuple(sites)

        @jax.jit
        def run(params, tokens):
            _, taps = forward(params, tokens, self.config, taps=sites, logits=False)
            return {site: taps[site].astype(dtype) for site in sites}

        def run_on(tokens):
            # The ambient mesh may be a trainer's: a live store runs its model amid the training.
            with jax.set_mesh(self.mesh):
                return run(self.params, jax.device_put(tokens, sharding))

        return run_on


def open_model(
    spec, dtype: str = "float32", mesh: jax.sharding.Mesh | None = None, scan: bool = False
) -> Model | bridge.TorchModel:
    """The model of a Hugging Face directory, or of hf://org/repository[@revision] on the hub; of
    "torch:" before either, transformers' own, which knows nothing of the mesh."""
    if not bridge.is_torch(spec):
        return Model(spec, dtype, mesh, scan)
    if scan:
        raise UserError(f"{spec} runs as transformers has it; leave out --scan_layers")
    if mesh is not None and mesh.shape["model"] > 1:
        raise UserError(f"{spec} runs on one device; leave the mesh's model axis (mesh_model) at 1")
    return bridge.TorchModel(spec, dtype)


def in_batches(
    run: Callable[[np.ndarray], dict], sequences: np.ndarray, batch_size: int
) -> Iterator[tuple[int, dict]]:
    """(start, activations) of each batch of `sequences` (n, T) by a `runner`, the next one already
    dispatched. The last is padded to the batch's size, so that one compiled program serves all."""
    ahead = None
    for start in range(0, len(sequences), batch_size):
        tokens = sequences[start : start + batch_size]
        missing = batch_size - len(tokens)
        result = run(np.pad(tokens, ((0, missing), (0, 0)), mode="edge"))
        if ahead:
            yield ahead
        ahead = start, result
    yield ahead
