"""Reads and writes Hugging Face model directories, config.json and safetensors, without torch.

A tensor is read slice by slice, each device's slice straight to that device, so that no parameter
is whole on one device of a mesh that shards it. Where several files hold a model, an index says
which of them each tensor is read from. What would change the function and is not
implemented is refused, never ignored: an unknown field of config.json as much as an unknown tensor.
"""

import contextlib
import dataclasses
import hashlib
import math
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sae_jax import hub
from sae_jax.activations.statistics import finite_rows
from sae_jax.errors import UserError
from sae_jax.json_files import checked, read_json
from sae_jax.lm.architecture import DecoderConfig, Leaf, layout
from sae_jax.lm.directory import model_directory
from sae_jax.lm.families import OWN_TYPE, load_config
from sae_jax.lm.tensors import IMAGE_PARTS, Names, in_files, names_of
from sae_jax.paths import inside, local, save_json

_BLOCK = 1 << 20  # values that are looked at together
_FLOATS = ("F32", "BF16", "F16", "F64")  # safetensors' names


def load_params(
    directory, dtype=jnp.float32, mesh: jax.sharding.Mesh | None = None, scan: bool = False
) -> dict:
    """Loads the parameters of a model, as the tree of `architecture.layout`.

    Raises UserError, which names the file or the tensor, if one is missing, truncated, of another
    shape or unknown.

    Args:
      directory: a Hugging Face directory, or hf://org/repository[@revision] on the hub.
      dtype: the type of the parameters.
      mesh: a mesh, over whose axis `model` they are sharded. None: JAX's default device.
      scan: whether layers are stacked along a leading axis, for `forward` to loop over.
    """
    config = load_config(directory)  # before the weights are downloaded
    directory = with_weights(directory)
    with contextlib.ExitStack() as stack:
        tensors = _open(directory, stack)
        if config.num_layers > len(tensors):
            raise UserError(
                f"config.json of {directory} says {config.num_layers:,} layers, and its files hold "
                f"{len(tensors):,} tensors"
            )
        tree = layout(config)
        names = in_files(names_of(read_json(directory / "config.json")["model_type"]), tensors)
        _check_names(directory, tree, tensors, names, config)

        def read(leaf: Leaf, *paths) -> jax.Array:
            parts = []
            for path in paths:
                stored = names.stored(path)
                tensor, shape = tensors[stored.name], stored.shape(leaf)
                if tensor.get_dtype() not in _FLOATS:
                    raise UserError(
                        f"tensor {stored.name} of {directory} is {tensor.get_dtype()}, which is "
                        f"none of {', '.join(_FLOATS)}; --model=torch:{directory} may run it"
                    )
                if tensor.get_shape() != shape:
                    raise UserError(
                        f"tensor {stored.name} has shape {tensor.get_shape()}; config.json says "
                        f"{shape}"
                    )
                parts.append((stored, tensor))
            return _array(leaf, parts, dtype, mesh, stacked=scan and paths[0][0] == "layers")

        layers = tree.pop("layers")
        params = {name: read(leaf, (name,)) for name, leaf in tree.items()}
        if scan:
            params["layers"] = {
                name: read(leaf, *(("layers", i, name) for i in range(len(layers))))
                for name, leaf in layers[0].items()
            }
        else:
            params["layers"] = [
                {name: read(leaf, ("layers", i, name)) for name, leaf in layer.items()}
                for i, layer in enumerate(layers)
            ]
        return params


def mlp_norm(directory, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns what the norm before a layer's MLP multiplies by and adds, (d_model,) and float32.

    Nothing else of the model is read. Raises UserError where `load_params` does for these tensors,
    and if the model has no such layer.
    """
    config = load_config(directory)
    directory = with_weights(directory)
    if not layer < config.num_layers:
        raise UserError(f"{directory} has {config.num_layers} layers, and none of number {layer}")
    with contextlib.ExitStack() as stack:
        tensors = _open(directory, stack)
        names = in_files(names_of(read_json(directory / "config.json")["model_type"]), tensors)

        def read(name: str) -> np.ndarray:
            tensor = names.stored(("layers", layer, name)).name
            if tensor not in tensors or tensors[tensor].get_shape() != [config.d_model]:
                raise UserError(f"{directory} has no tensor {tensor} ({config.d_model},)")
            return np.asarray(tensors[tensor][:], np.float32)

        weight = read("mlp_norm") + np.float32(config.norm_plus_one)
        bias = read("b_mlp_norm") if config.norm == "layer" else np.zeros_like(weight)
        return weight, bias


def save_model(
    directory, config: DecoderConfig, params: dict, dtype=jnp.bfloat16, **fields
) -> None:
    """Writes config.json and model.safetensors into an existing directory.

    Raises FileExistsError if there are weights already, and ValueError for a config that our own
    config.json cannot express.

    Args:
      directory: the directory.
      config: the decoder's config.
      params: its parameters, with layers as a list.
      dtype: the type in which they are written.
      **fields: more fields of config.json, such as bos_token_id.
    """
    values = {
        "model_type": OWN_TYPE,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.d_mlp,
        "max_position_embeddings": config.max_context,
        "hidden_act": config.activation,
        "gated_mlp": config.gated_mlp,
        "attention_bias": config.attn_out_bias,
        "mlp_bias": config.mlp_bias,
        "tie_word_embeddings": config.tie_embeddings,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta if config.rope else None,
    }
    directory = local(directory)
    weights = directory / "model.safetensors"
    if weights.exists():
        raise FileExistsError(weights)
    save_json(values | fields, directory / "config.json")
    if load_config(directory) != config:
        (directory / "config.json").unlink()
        raise ValueError(f"our config.json cannot say all of {config}")
    names, tensors = names_of(OWN_TYPE), {}
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for (path, array), leaf in zip(leaves, jax.tree.leaves(layout(config)), strict=True):
        stored = names.stored(_keys(path))
        matrix = np.asarray(array).astype(dtype)
        if leaf.inputs:
            matrix = matrix.reshape(math.prod(leaf.shape[: leaf.inputs]), -1)
            matrix = matrix if stored.inputs_first else matrix.T
        tensors[stored.name] = np.ascontiguousarray(matrix.reshape(stored.shape(leaf)))
    temporary = directory / "model.safetensors.tmp"
    safetensors.numpy.save_file(tensors, temporary)
    temporary.replace(weights)


def fingerprint(directory, files: Sequence[str] = ()) -> str:
    """Returns a hash by which one model is told from another.

    It is a hash of config.json and, for every weight file, of its size, its first and last MiB (the
    header is in the first) and 64 KiB from each of 64 places between. Hashing all bytes of 140 GB
    would take minutes.

    Args:
      directory: a directory, or a name on the hub, of which the weights are downloaded.
      files: the names of the weight files if they are not safetensors.
    """
    directory = with_weights(directory)
    try:
        digest = hashlib.sha256((directory / "config.json").read_bytes())
        for name in files or weight_files(directory):
            with (directory / name).open("rb") as file:
                size = file.seek(0, 2)
                digest.update(f"{name} {size}".encode())
                places = [(0, 1 << 20), (max(size - (1 << 20), 0), 1 << 20)]
                places += [(size * i // 65, 1 << 16) for i in range(1, 65)]
                for start, length in places:
                    file.seek(start)
                    digest.update(file.read(length))
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from None
    return digest.hexdigest()


def with_weights(spec, old: bool = False) -> pathlib.Path:
    """Returns the local directory of a model, after downloading its weights if it is on the hub.

    Raises UserError if the hub cannot be reached or has no such files.

    Args:
      spec: a directory, or a name on the hub, of which the safetensors are downloaded.
      old: whether files that torch.save wrote are downloaded if there are no safetensors.
    """
    directory = model_directory(spec)
    if not hub.is_hub_name(spec):
        return directory
    name, stems = hub.pinned(spec, directory), ["model.safetensors"]
    for stem in stems + ["pytorch_model.bin"] * old:
        files = _to_download(name, directory, stem)
        try:
            hub.fetch(name, files, needed=files)
            return directory
        except hub.MissingFileError as error:
            missing = str(error)
    hint = "" if old else f"; --model=torch:{spec} runs what transformers can read"
    raise UserError(f"{missing}{hint}")


def _to_download(name: hub.HubName, directory: pathlib.Path, stem: str) -> list[str]:
    """Returns the names of the weight files of a repository, a single one before an index's."""
    indexed = sorted(set(_files(directory, stem).values()))
    if not indexed or (directory / stem).is_file():
        return [stem]
    try:
        there = hub.list_files(name)
    except UserError:  # without the hub, what is in the cache
        return indexed
    return [stem] if name.file(stem) in there else indexed


@dataclasses.dataclass(frozen=True)
class _Index:
    """An index of weight files."""

    weight_map: dict[str, str]  # the file of each tensor


def _files(directory: pathlib.Path, stem: str) -> dict[str, str]:
    """Returns the file of each tensor by the index of files called `stem`; {} without an index."""
    index = directory / f"{stem}.index.json"
    if not index.is_file():
        return {}
    files = checked(read_json(index), _Index, index).weight_map
    for tensor, name in files.items():
        try:
            inside(directory, name)
        except UserError as error:
            raise UserError(f"{index} says that {tensor} is in another place: {error}") from None
    return files


def weight_files(directory: pathlib.Path) -> list[str]:
    """Returns the names of a directory's weight files, which exist.

    A single model.safetensors comes before an index beside it, as in transformers.
    """
    whole = "model.safetensors"
    names = [whole] if (directory / whole).is_file() else []
    names = names or sorted(set(_files(directory, whole).values())) or [whole]
    for name in names:
        if not (directory / name).is_file():
            raise UserError(
                f"no {name} in {directory}; transformers' save_pretrained writes one, or "
                f"--model=torch:{directory} runs what is there"
            )
    return names


def _open(directory: pathlib.Path, stack: contextlib.ExitStack) -> dict:
    """Returns the safetensors slice of each tensor in the directory's files, by name.

    Raises UserError if a tensor stands in two files and the index does not say which is meant.
    """
    slices, found_in = {}, {}
    names = weight_files(directory)
    index = _files(directory, "model.safetensors") if names != ["model.safetensors"] else {}
    for name in names:
        file = directory / name
        try:
            handle = stack.enter_context(safetensors.safe_open(file, framework="numpy"))
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{file} is damaged or truncated: {error}") from None
        for key in handle.keys():
            if index.get(key, name) != name:
                continue  # a copy that the index does not mean
            if key in slices:
                raise UserError(
                    f"tensor {key} is in {found_in[key]} and in {name} of {directory}, and its "
                    "index does not say which is meant"
                )
            slices[key], found_in[key] = handle.get_slice(key), name
    return slices


def _keys(path) -> tuple:
    """Returns a path of jax.tree_util as a tuple such as ("layers", 3, "w_q")."""
    return tuple(getattr(part, "key", None) or getattr(part, "idx", None) or 0 for part in path)


def _check_names(directory, tree, tensors: dict, names: Names, config: DecoderConfig) -> None:
    """Raises UserError if a tensor that config.json implies is missing, or one is unknown."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    expected = {names.stored(_keys(path)).name for path, _ in leaves}
    # Tied files sometimes have the matrix twice, old ones what can be computed.
    derived = names.derived + ((names.unembed,) if config.tie_embeddings else ())
    known = {n for n in tensors if n.endswith(derived) or n.startswith(IMAGE_PARTS)}
    if missing := sorted(expected - tensors.keys()):
        raise UserError(f"{directory} has no tensor {missing[0]} ({len(missing)} missing)")
    if unknown := sorted(tensors.keys() - expected - known):
        raise UserError(
            f"{directory} has a tensor {unknown[0]} that its config.json does not explain "
            f"({len(unknown)} such)"
        )


def _check_finite(values: np.ndarray, name: str) -> None:
    """Raises UserError if a tensor holds NaN or infinity."""
    flat = values.ravel(order="K")  # a view, whichever axis comes first
    for start in range(0, flat.size, _BLOCK):
        if not finite_rows(flat[None, start : start + _BLOCK]).all():
            raise UserError(f"tensor {name} holds NaN or infinity; get its file again")


def _array(leaf: Leaf, parts: list, dtype, mesh, stacked: bool) -> jax.Array:
    """Returns a parameter, of which only each device's share is read for that device.

    parts: (stored, tensor) of the parameter, or if it is stacked, of the parameter of each layer.
    """

    def read(index: tuple[slice, ...]) -> np.ndarray:
        own = index[1:] if stacked else index
        shares = []
        for stored, tensor in parts:
            shares.append(stored.read(tensor, leaf, own).astype(dtype))
            _check_finite(shares[-1], stored.name)
        return np.stack(shares) if stacked else shares[0]

    shape = (len(parts), *leaf.shape) if stacked else leaf.shape
    if mesh is None:
        return jnp.asarray(read((slice(None),) * len(shape)))
    spec = leaf.spec(mesh.shape["model"])
    sharding = NamedSharding(mesh, P(None, *spec) if stacked else spec)
    return jax.make_array_from_callback(shape, sharding, read)
