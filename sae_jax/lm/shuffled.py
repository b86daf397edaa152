"""Shuffles the weights of a model: a control that knows the tokens and nothing of language.

The entries of each matrix change places, each matrix by itself, embeddings too. So every matrix
keeps its distribution of weights, and loses what training put into it. Vectors, which are biases
and the weights of norms, stay as they are. It is the randomised transformer of Bricken et al. 2023,
"Towards Monosemanticity".
"""

import json
import math
import pathlib
import shutil
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
import safetensors

from sae_jax import paths
from sae_jax.errors import UserError
from sae_jax.json_files import read_json
from sae_jax.lm.bridge import is_torch
from sae_jax.lm.directory import TORCH
from sae_jax.lm.weights import fingerprint, weight_files, with_weights
from sae_jax.place_errors import explained
from sae_jax.progress_bar import progress

_BESIDE = (".json", ".jinja", ".model", ".txt")  # config, tokenizer and index
_ABOUT = "shuffled.json"


def shuffled_model(spec, out, seed: int = 0) -> str:
    """Writes a model whose weights are shuffled, and returns what `open_model` takes for it.

    The directory has the config and the tokenizer of the model, and weight files of the same names
    and sizes, of which one tensor at a time is in memory. A tensor of a file counts as one matrix,
    also where it holds several, as of queries, keys and values. If the directory holds the same
    already, nothing is done.

    Args:
      spec: the model, as `open_model` takes it, with safetensors.
      out: the directory to write.
      seed: the seed of the order.

    Raises UserError if the model has no safetensors, or `out` holds something else.
    """
    source = with_weights(str(spec).removeprefix(TORCH))
    out = paths.local(out)
    opened = f"{TORCH}{out.absolute()}" if is_torch(spec) else str(out.absolute())
    about = {"fingerprint": fingerprint(source), "seed": seed}
    if out.exists():
        if read_json(out / _ABOUT, default={}) != about:
            raise UserError(
                f"{out} holds something else than {spec} shuffled with seed {seed}; give another "
                "directory, or remove it"
            )
        return opened
    temporary = out.with_name(f"tmp.{out.name}")
    with explained(out):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for file in source.iterdir():
            if file.suffix in _BESIDE:
                shutil.copy(file, temporary)
        for name in weight_files(source):
            _write_shuffled(source / name, temporary / name, seed)
        paths.save_json(about, temporary / _ABOUT)
        temporary.rename(out)
    return opened


def _write_shuffled(source: pathlib.Path, target: pathlib.Path, seed: int) -> None:
    """Writes a safetensors file with the same header and shuffled matrices."""
    try:
        with safetensors.safe_open(source, framework="numpy"):
            pass
    except safetensors.SafetensorError as error:
        raise UserError(f"{source} is damaged or truncated: {error}") from None
    with source.open("rb") as old, target.open("wb") as new:
        size = old.read(8)
        header = old.read(int.from_bytes(size, "little"))
        new.write(size + header)
        tensors = json.loads(header)
        tensors.pop("__metadata__", None)
        for values in progress(_shuffled(old, tensors, seed), "shuffling", len(tensors), "tensor"):
            new.write(values)


def _shuffled(file: BinaryIO, tensors: dict, seed: int) -> Iterator[np.ndarray]:
    """Yields the entries of each tensor, shuffled if it is a matrix, in the order of the file.

    The entries are moved as whole numbers of their size, whatever their type is.
    """
    for name, about in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = about["data_offsets"]
        count = max(math.prod(about["shape"]), 1)
        values = np.frombuffer(file.read(stop - start), f"u{max((stop - start) // count, 1)}")
        if len(about["shape"]) > 1:
            rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
            values = rng.permutation(values)
        yield values
