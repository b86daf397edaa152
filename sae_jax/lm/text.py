"""The tokenizer of a model's directory, its special tokens, and packing text into contexts.

The rules, which a store's provenance names: a document is a text file (one of more than 4 million
characters is cut into several at line ends), one string of a .json list, one line of a .jsonl or
one row of a dataset; every document is tokenised without special tokens; documents are joined with
one BOS between them; the stream is cut every context_length - 1 tokens and each piece is preceded
by BOS, so that every context starts with exactly one. A last piece that is too short is dropped.
So it is for every family: models that were trained without BOS get the token that stood between
their documents (`load_tokenizer` says which), as attention needs one at the start to rest on.
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
    """A tokenizer.json with the ids of its special tokens. `bos` starts every context; `bos_why`
    says where it comes from."""

    backend: tokenizers.Tokenizer
    bos: int
    eos: int | None
    pad: int | None
    name: str
    special_tokens: tuple[int, ...]  # BOS, every EOS, PAD: they stand for no text; sorted
    bos_why: str

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    def about_bos(self) -> dict:
        """For a store's provenance."""
        return {"id": self.bos, "token": self.backend.id_to_token(self.bos), "why": self.bos_why}

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone, no special token added."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)


def load_tokenizer(directory) -> Tokenizer:
    """From tokenizer.json, config.json, generation_config.json and tokenizer_config.json.

    BOS is the first there is of: the special token that tokenizer.json itself puts before a text
    (Llama, Mistral, Gemma); bos_token_id of config.json or generation_config.json (GPT-2, Pythia;
    Qwen, whose tokenizer adds none: it is <|endoftext|>, which stood between the documents it was
    trained on); bos_token of tokenizer_config.json; the token <|endoftext|>; EOS. EOS and PAD are
    what the configs say. Of several EOS `eos` is the first; those that tokenizer.json marks as
    special are all special tokens (Llama 3's and Gemma's end of a turn too).

    UserError where a file is missing or damaged, or none of them gives a BOS."""
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
    """(id, why)."""
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
    """(ids, which file says so) of the first file that names any."""
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
    """Contexts (num_sequences, context_length) of int32 by the rules above; at most `max_tokens`
    tokens, BOS counted. Reads no more texts than it needs. Takes 8 bytes a token while it works
    and 4 after. UserError where the texts do not fill one context."""
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
    """Blocks of contexts. A BOS between documents that falls on a cut is left out: the context has
    one already."""
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
