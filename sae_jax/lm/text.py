"""Loads the tokenizer of a model's directory, and packs text into contexts.

Text is packed by these rules, which a store's provenance names:

- A document is a text file (one of more than 4 million characters is cut into several at line
  ends), one string of a .json list, one line of a .jsonl file or one row of a dataset.
- Every document is tokenised without special tokens.
- Documents are joined with one BOS between them.
- The stream of tokens is cut every context_length - 1 tokens, and each piece is preceded by BOS, so
  that every context starts with exactly one. A last piece that is too short is dropped.

The rules are the same for every family. A model that was trained without BOS gets the token that
stood between its documents (`load_tokenizer` says which), since attention needs a first token that
means nothing to attend to.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterable, Iterator

import numpy as np
import tokenizers

from sae_jax import hub
from sae_jax.errors import UserError
from sae_jax.json_files import read_json
from sae_jax.lm.directory import model_directory

PACKING_RULE = "documents joined by BOS, cut every context_length - 1 tokens, each cut after a BOS"
_SEPARATOR = "<|endoftext|>"  # between documents of GPT-2, Pythia, Qwen and their kin
_DOCUMENTS_PER_BATCH = 256  # tokenised together, by the tokenizer's own threads


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A tokenizer with the ids of its special tokens.

    Attributes:
      backend: the tokenizer of the package tokenizers.
      bos: the token that starts every context.
      eos: the first end-of-sequence token, or None.
      pad: the padding token, or None.
      name: the name of the model's directory, or its name on the hub.
      special_tokens: the sorted ids of BOS, every EOS and PAD, which stand for no text.
      bos_why: which file or rule BOS comes from.
    """

    backend: tokenizers.Tokenizer
    bos: int
    eos: int | None
    pad: int | None
    name: str
    special_tokens: tuple[int, ...]
    bos_why: str

    @property
    def vocab_size(self) -> int:
        """The number of tokens, added ones included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def bos_provenance(self) -> dict:
        """Returns what a store's provenance says of BOS: its id, its text and where it is from."""
        return {"id": self.bos, "token": self.backend.id_to_token(self.bos), "why": self.bos_why}

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without special tokens."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Returns the ids of each text, without special tokens."""
        return [e.ids for e in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids, special tokens included."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)


def load_tokenizer(directory) -> Tokenizer:
    """Loads the tokenizer of a model's directory, or of a name on the hub.

    It reads tokenizer.json, config.json, generation_config.json and tokenizer_config.json. BOS is
    the first of these that exists:

    - the special token that tokenizer.json puts before a text (Llama, Mistral, Gemma);
    - bos_token_id of config.json or generation_config.json (GPT-2, Pythia; and Qwen, for which it
      is <|endoftext|>, which stood between the documents that it was trained on);
    - bos_token of tokenizer_config.json;
    - the token <|endoftext|>;
    - EOS.

    EOS and PAD are those that the configs name. If they name several EOS, `eos` is the first, and
    all those that tokenizer.json marks as special are special tokens, such as the end of a turn of
    Llama 3 and Gemma.

    Raises UserError if a file is missing or damaged, or if there is no BOS.
    """
    spec, directory = directory, model_directory(directory)
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"no tokenizer.json in {spec}; save the tokenizer there in that format")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises plain Exception
        raise UserError(f"{file} is not a tokenizer of the tokenizers package: {error}") from None
    backend.no_padding()
    backend.no_truncation()
    ids = {kind: _special_ids(directory, backend, kind) for kind in ("bos", "eos", "pad")}
    eos, pad = (next(iter(ids[kind][0]), None) for kind in ("eos", "pad"))
    bos, why = _bos(backend, *ids["bos"], eos)
    if bos is None:
        raise UserError(
            f"{directory} names no BOS or EOS token; add bos_token_id to its config.json"
        )
    marked = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
    special = {bos, eos, pad, *(marked & set(ids["eos"][0]))} - {None}
    on_hub = hub.is_hub_name(spec)
    name = str(hub.pinned(spec, directory)) if on_hub else directory.resolve().name
    return Tokenizer(backend, bos, eos, pad, name, tuple(sorted(special)), why)


def _bos(backend, configured: list[int], where: str, eos: int | None) -> tuple[int | None, str]:
    """Returns the id of BOS, or None, and where it comes from."""
    with_special, without = (backend.encode("a", add_special_tokens=s).ids for s in (True, False))
    if len(with_special) > len(without) and with_special[0] != (without or [None])[0]:
        return with_special[0], "tokenizer.json puts it before every text"
    if configured:
        return configured[0], f"{where}; tokenizer.json puts nothing before a text"
    separator = backend.token_to_id(_SEPARATOR)
    if separator is not None:
        return separator, f"no BOS is named; {_SEPARATOR} stands between documents"
    return eos, "no BOS is named; EOS serves as one"


def _special_ids(directory: pathlib.Path, backend, kind: str) -> tuple[list[int], str]:
    """Returns the ids that the first file to name any gives, and the name of that file's field."""
    for name in ("config.json", "generation_config.json"):
        values = read_json(directory / name, default={})
        for part in (values, values.get("text_config") or {}):  # Gemma 3 nests the language model
            value = part.get(f"{kind}_token_id")
            if value is not None:
                ids = value if isinstance(value, list) else [value]  # Llama 3 lists several EOS
                return [int(i) for i in ids], f"{kind}_token_id of {name}"
    token = read_json(directory / "tokenizer_config.json", default={}).get(f"{kind}_token")
    token = token.get("content") if isinstance(token, dict) else token
    found = None if token is None else backend.token_to_id(token)
    return ([] if found is None else [found]), f"{kind}_token of tokenizer_config.json"


def pack(
    texts: Iterable[str], tokenizer: Tokenizer, context_length: int, max_tokens: int | None = None
) -> np.ndarray:
    """Packs texts into contexts, (num_sequences, context_length) of int32, by this module's rules.

    It reads no more texts than it needs, and takes 8 bytes of memory a token while it works, 4
    after. Raises UserError if the texts do not fill one context.

    Args:
      texts: the documents.
      tokenizer: the tokenizer.
      context_length: tokens of a context, BOS included.
      max_tokens: how many tokens to return at most, BOS counted. None: all.
    """
    if context_length < 2:
        raise UserError(
            f"context_length is {context_length}; a context is BOS and one token or more"
        )
    limit = None if max_tokens is None else max_tokens // context_length
    if limit is not None and limit < 1:
        raise UserError(f"{max_tokens} tokens are less than one context of {context_length}")
    blocks, count = [], 0
    for block in _contexts(texts, tokenizer, context_length):
        blocks.append(block if limit is None else block[: limit - count])
        count += len(blocks[-1])
        if count == limit:
            break
    if not count:
        raise UserError(
            f"the text has fewer tokens than one context of {context_length}; give more text or a "
            "smaller context_length"
        )
    return np.concatenate(blocks)


def _contexts(texts: Iterable[str], tokenizer: Tokenizer, length: int) -> Iterator[np.ndarray]:
    """Yields blocks of contexts.

    A BOS between documents that falls on a cut is left out, since the context has one already.
    """
    bos, text_length, texts = tokenizer.bos, length - 1, iter(texts)
    stream = np.zeros(0, np.int32)
    while batch := list(itertools.islice(texts, _DOCUMENTS_PER_BATCH)):
        parts = (np.array([bos, *ids], np.int32) for ids in tokenizer.encode_batch(batch))
        stream = np.concatenate([stream, *parts])
        starts, at = [], 0
        while True:
            while at < len(stream) and stream[at] == bos:
                at += 1
            if at + text_length > len(stream):
                break
            starts.append(at)
            at += text_length
        block = np.full((len(starts), length), bos, np.int32)
        for row, start in zip(block, starts, strict=True):
            row[1:] = stream[start : start + text_length]
        yield block
        stream = stream[at:].copy()
