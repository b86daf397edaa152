"""The interface of a language model, which harvest, live stores, evaluation and steering use."""

import abc
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np

from sae_jax.lm.directory import TORCH
from sae_jax.lm.edits import Edit, ReadingEdit
from sae_jax.lm.sampling import Rules
from sae_jax.lm.text import Tokenizer, eos_ids, load_tokenizer


class LanguageModel(abc.ABC):
    """A language model that `lm.open_model` opened, run by our decoder or by transformers.

    The weights are read when the model first runs, so that a mistake in a request is found before.

    Attributes:
      directory: the directory of the model's files.
      spec: the name that `lm.open_model` takes, valid in any working directory.
      dtype: the type in which it computes.
      mesh: the devices that it is laid out over, with axes `data` and `model`. None: one device.
      vocab_size: the number of its tokens.
      max_context: the tokens of its longest context.
    """

    directory: pathlib.Path
    spec: str
    dtype: str
    mesh: jax.sharding.Mesh | None
    vocab_size: int
    max_context: int

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of its directory. Raises UserError if it has none."""
        return load_tokenizer(self.spec.removeprefix(TORCH))

    @property
    def has_tokenizer(self) -> bool:
        """Whether there is a tokenizer.json in its directory."""
        return (self.directory / "tokenizer.json").is_file()

    @functools.cached_property
    def eos(self) -> tuple[int, ...]:
        """The ids of the tokens that end a text, as its files name them."""
        return eos_ids(self.directory)

    @property
    @abc.abstractmethod
    def fingerprint(self) -> str:
        """A hash of its config and weights, which a store keeps."""

    @property
    @abc.abstractmethod
    def layers_module(self) -> str:
        """The path of the layers in transformers' model, such as model.layers."""

    @abc.abstractmethod
    def site_width(self, site: str) -> int:
        """Returns the width of a site's activations.

        Raises UserError for a site that the model does not have.
        """

    @abc.abstractmethod
    def flops_per_token(self, sites: Sequence[str], context_length: int) -> float | None:
        """Returns the FLOPs of the matrix products by which the model computes `sites`.

        A multiplication and an addition count as two. The result is None where it is not known.
        """

    @abc.abstractmethod
    def forward(
        self,
        tokens,
        taps: Sequence[str] = (),
        edits: Mapping[str, Edit | ReadingEdit] | None = None,
        logits: bool = True,
    ) -> tuple[jax.Array | None, dict[str, jax.Array]]:
        """Runs the model on tokens, and returns its logits and the activations of sites.

        Raises UserError for an unknown site.

        Args:
          tokens: (B, T) integers. On a mesh B must be a multiple of its axis `data`.
          taps: the names of sites whose activations are returned.
          edits: edits by site. An edit is one that `lm.edits` makes, or any function of JAX arrays
            from a site's activations (B, T, width) to their replacement, with which the model
            goes on.
          logits: whether logits are computed. Without them no more of the model is run than the
            taps need.

        Returns:
          The float32 logits (B, T, vocab_size), or None, and {tap: (B, T, width)}. A tap at an
          edited site gives the replacement.
        """

    @abc.abstractmethod
    def continuations(
        self,
        prompts: Sequence[Sequence[int]],
        samples: Sequence[int],
        rules: Rules,
        prompt_edits: Callable[[tuple[int, int]], Mapping[str, Edit | ReadingEdit]],
        new_edits: Mapping[str, Edit | ReadingEdit],
        on_tokens: Callable[[np.ndarray, np.ndarray], None] | None = None,
    ) -> list[np.ndarray]:
        """Returns the new tokens that follow each prompt, for `lm.generate`.

        Raises UserError for an unknown site and for an edit that cannot run.

        Args:
          prompts: ids, of different lengths. On a mesh there may be any number.
          samples: the number of each prompt's sample, on which its random numbers depend.
          rules: how texts go on and where they stop.
          prompt_edits: gives the edits of the prompts, whose shape (B, T) after padding at the left
            it is told.
          new_edits: the edits of the tokens that follow.
          on_tokens: is called after every step with the rows that have a new token, and these.
        """

    @abc.abstractmethod
    def runner(self, sites: Sequence[str], dtype) -> Callable[[np.ndarray], dict]:
        """Returns a function that computes the activations of `sites`, for many batches of a shape.

        The function maps tokens (B, T) on the host to {site: (B, T, width)} of `dtype`. The arrays
        are on the device where there is one, and may still be computing. On a mesh B must be a
        multiple of its axis `data`.
        """


def in_batches(
    run: Callable[[np.ndarray], dict], sequences: np.ndarray, batch_size: int
) -> Iterator[tuple[int, dict]]:
    """Yields the activations of sequences, batch by batch, while the next batch is computing.

    The last batch is padded to the batch size, so that one compiled program serves all.

    Args:
      run: a function that `LanguageModel.runner` made.
      sequences: tokens (n, T).
      batch_size: sequences in a batch.

    Yields:
      The index of each batch's first sequence, and what `run` gives for the batch.
    """
    ahead = None
    for start in range(0, len(sequences), batch_size):
        tokens = sequences[start : start + batch_size]
        missing = batch_size - len(tokens)
        result = run(np.pad(tokens, ((0, missing), (0, 0)), mode="edge"))
        if ahead:
            yield ahead
        ahead = start, result
    yield ahead
