"""What harvest, live stores, evaluation and steering ask of a language model, whoever runs it."""

import abc
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np

from sae_jax.lm.directory import TORCH
from sae_jax.lm.edits import Edit
from sae_jax.lm.text import Tokenizer, load_tokenizer


class LanguageModel(abc.ABC):
    """A language model that `lm.open_model` opened: ours in JAX or transformers' own.

    The weights are read when the model first runs, so that what is wrong with a request is said
    before that.

    directory: the model's files. spec: what `lm.open_model` takes, from any working directory.
    dtype: in which it computes. mesh: the devices that it is laid out over (axes `data` and
    `model`); None: it runs on one device. vocab_size; max_context: tokens of its longest context.
    """

    directory: pathlib.Path
    spec: str
    dtype: str
    mesh: jax.sharding.Mesh | None
    vocab_size: int
    max_context: int

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of its directory. UserError where it has none."""
        return load_tokenizer(self.spec.removeprefix(TORCH))

    @property
    @abc.abstractmethod
    def fingerprint(self) -> str:
        """A hash of its config and weights, which a store keeps."""

    @property
    @abc.abstractmethod
    def layers_module(self) -> str:
        """Where transformers' model has its layers, such as model.layers."""

    @abc.abstractmethod
    def site_width(self, site: str) -> int:
        """The width of a site's activations. UserError for a site that the model does not have."""

    @abc.abstractmethod
    def flops_per_token(self, sites: Sequence[str], context_length: int) -> float | None:
        """FLOPs of the matrix products that the activations of `sites` take, a multiply and an add
        being two; None where that is not known."""

    @abc.abstractmethod
    def forward(
        self,
        tokens,
        taps: Sequence[str] = (),
        edits: Mapping[str, Edit] | None = None,
        logits: bool = True,
    ) -> tuple[jax.Array | None, dict[str, jax.Array]]:
        """Runs the model on `tokens` (B, T) and returns (logits float32 (B, T, vocab_size), {tap:
        (B, T, width)}).

        taps: names of sites to return. edits: {site: edit}, an edit being what `lm.edits` makes or
        any function of JAX arrays from a site's activations (B, T, width) to their replacement,
        with which the model goes on. A tap at an edited site gives the replacement. logits=False
        returns None for the logits and runs no more of the model than the taps need. On a mesh B is
        a multiple of its `data` axis. UserError for an unknown site."""

    @abc.abstractmethod
    def runner(self, sites: Sequence[str], dtype) -> Callable[[np.ndarray], dict]:
        """A function for many batches of one shape: tokens (B, T) on the host -> {site: (B, T,
        width)} of `dtype`, on the device where there is one, and not awaited. On a mesh B is a
        multiple of its `data` axis."""


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
