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

import contextlib
import dataclasses
import itertools
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Annotated

import msgspec
import numpy as np
import tokenizers

from sae_jax import hub
from sae_jax.errors import UserError, on_one_line
from sae_jax.json_files import checked, parse_json, read_json
from sae_jax.lm.directory import model_directory

PACKING_RULE = "documents joined by BOS, cut every context_length - 1 tokens, each cut after a BOS"
NO_DOCUMENT = -1
"""The number of the document of a token that is of none, which BOS is."""
_SEPARATOR = "<|endoftext|>"  # between documents of GPT-2, Pythia, Qwen and their kin
_SURROGATE = re.compile("[\ud800-\udfff]")
_DOCUMENTS_PER_BATCH = 256  # tokenised together, by the tokenizer's own threads

_Id = Annotated[int, msgspec.Meta(ge=-1, le=2**31 - 1)]  # -1: none, in early Llamas


@dataclasses.dataclass(frozen=True)
class _Ids:
    """The fields of config.json and generation_config.json that name special tokens."""

    bos_token_id: _Id | None = None
    eos_token_id: _Id | list[_Id] | None = None  # Llama 3 lists several
    pad_token_id: _Id | None = None
    text_config: "_Ids | None" = None  # Gemma 3 nests the language model


@dataclasses.dataclass(frozen=True)
class SpecialToken:
    """A special token in tokenizer_config.json that is written with its properties.

    Attributes:
      content: its text.
    """

    content: str


@dataclasses.dataclass(frozen=True)
class _Tokens:
    """The fields of tokenizer_config.json that name special tokens."""

    bos_token: str | SpecialToken | None = None
    eos_token: str | SpecialToken | None = None
    pad_token: str | SpecialToken | None = None


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
      directory: where its files are, if it was read from any.
    """

    backend: tokenizers.Tokenizer
    bos: int
    eos: int | None
    pad: int | None
    name: str
    special_tokens: tuple[int, ...]
    bos_why: str
    directory: pathlib.Path | None = None

    @property
    def vocab_size(self) -> int:
        """The number of tokens, added ones included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def marks(self) -> list[int]:
        """The sorted ids of all tokens that stand for no text: `special_tokens`, and those that
        were added as special, such as a chat template's."""
        added = self.backend.get_added_tokens_decoder().items()
        return sorted({*self.special_tokens, *(i for i, token in added if token.special)})

    def bos_provenance(self) -> dict:
        """Returns what a store's provenance says of BOS: its id, its text and where it is from."""
        return {"id": self.bos, "token": self.backend.id_to_token(self.bos), "why": self.bos_why}

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without special tokens.

        What is no character stands for U+FFFD (`well_formed`).
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Returns the ids of each text, without special tokens, as `encode` does."""
        texts = [well_formed(text) for text in texts]
        with _explained(f"the tokenizer of {self.name}"):
            encoded = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

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

    Raises UserError if a file is missing or damaged, or if there is no BOS that tokenizer.json
    knows.
    """
    spec, directory = directory, model_directory(directory)
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"no tokenizer.json in {spec}; save the tokenizer there in that format")
    with _explained(file):
        backend = tokenizers.Tokenizer.from_file(str(file))
        backend.no_padding()
        backend.no_truncation()
        if backend.post_processor is not None:
            _check_templates(parse_json(backend.post_processor.__getstate__(), file), file)
    configs = {
        name: checked(read_json(directory / name, default={}), _Ids, directory / name)
        for name in ("config.json", "generation_config.json")
    }
    names_file = directory / "tokenizer_config.json"
    names = checked(read_json(names_file, default={}), _Tokens, names_file)
    ids = {kind: _special_ids(configs, names, backend, kind) for kind in ("bos", "eos", "pad")}
    eos, pad = (next(iter(ids[kind][0]), None) for kind in ("eos", "pad"))
    with _explained(file):
        bos, why = _bos(backend, *ids["bos"], eos)
    if bos is None:
        raise UserError(
            f"{directory} names no BOS or EOS token; add bos_token_id to its config.json"
        )
    if backend.id_to_token(bos) is None:
        raise UserError(f"{file} has no token {bos}, which is to start every text ({why})")
    marked = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
    special = {bos, eos, pad, *(marked & set(ids["eos"][0]))} - {None}
    on_hub = hub.is_hub_name(spec)
    name = str(hub.pinned(spec, directory)) if on_hub else directory.resolve().name
    return Tokenizer(backend, bos, eos, pad, name, tuple(sorted(special)), why, directory)


def eos_ids(directory: pathlib.Path) -> tuple[int, ...]:
    """Returns the ids that end a text of a model, () where its files name none.

    They are those of generation_config.json, of config.json, or of the tokenizer: of the first that
    has any.

    Raises UserError for a file that is damaged.
    """
    for name in ("generation_config.json", "config.json"):
        values = checked(read_json(directory / name, default={}), _Ids, directory / name)
        if ids := _ids_in(values, "eos"):
            return tuple(ids)
    if (directory / "tokenizer.json").is_file():
        eos = load_tokenizer(directory).eos
        return () if eos is None else (eos,)
    return ()


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


def _special_ids(
    configs: dict[str, _Ids], names: _Tokens, backend, kind: str
) -> tuple[list[int], str]:
    """Returns the ids that the first file to name any gives, and the name of that file's field."""
    for file, values in configs.items():
        if ids := _ids_in(values, kind):
            return ids, f"{kind}_token_id of {file}"
    token = getattr(names, f"{kind}_token")
    token = token.content if isinstance(token, SpecialToken) else token
    found = None if token is None else backend.token_to_id(well_formed(token))
    return ([] if found is None else [found]), f"{kind}_token of tokenizer_config.json"


def _ids_in(values: _Ids, kind: str) -> list[int]:
    """Returns the ids that a file names, of its own or else of its language model."""
    for part in (values, values.text_config or _Ids()):
        value = getattr(part, f"{kind}_token_id")
        ids = value if isinstance(value, list) else [-1 if value is None else value]
        if any(i >= 0 for i in ids):
            return [i for i in ids if i >= 0]
    return []


@contextlib.contextmanager
def _explained(where) -> Iterator[None]:
    """Raises whatever the package tokenizers raises within as a UserError that names `where`.

    It raises plain Exception, and where its Rust code panics a PanicException, which is none.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = on_one_line(error)
        raise UserError(f"{where} is not a tokenizer of the tokenizers package: {reason}") from None


def _check_templates(processor: dict, file: pathlib.Path) -> None:
    """Raises UserError if a template puts a token into texts that it does not define.

    The package panics there, and Rust writes to the terminal before Python sees it.
    """
    for part in processor.get("processors", ()):
        _check_templates(part, file)
    for piece in processor.get("single", ()) if "special_tokens" in processor else ():
        name = piece.get("SpecialToken", {}).get("id")
        if name is not None and name not in processor["special_tokens"]:
            raise UserError(
                f"{file}: its post_processor puts {name} into every text, which is not among the "
                "post_processor's special_tokens; save the tokenizer again"
            )


def well_formed(text: str) -> str:
    """Returns a text with its surrogates joined to characters, or lone ones turned into U+FFFD.

    Python's strings may hold halves of UTF-16's pairs, as JSON may; no tokenizer takes them.
    """
    if text.isascii() or not _SURROGATE.search(text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


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
    return _packed(texts, tokenizer, context_length, max_tokens, documents=False)[0]


def pack_documents(
    texts: Iterable[str], tokenizer: Tokenizer, context_length: int, max_tokens: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns what `pack` does, and of which text each token is.

    The second array, of the same shape, has the number of the text, and `NO_DOCUMENT` at BOS.
    """
    return _packed(texts, tokenizer, context_length, max_tokens, documents=True)


def _packed(
    texts: Iterable[str],
    tokenizer: Tokenizer,
    context_length: int,
    max_tokens: int | None,
    documents: bool,
) -> tuple[np.ndarray, ...]:
    """Returns the contexts, and with `documents` the numbers of the documents of their tokens."""
    if context_length < 2:
        raise UserError(
            f"context_length is {context_length}; a context is BOS and one token or more"
        )
    limit = None if max_tokens is None else max_tokens // context_length
    if limit is not None and limit < 1:
        raise UserError(f"{max_tokens} tokens are less than one context of {context_length}")
    blocks, count = [], 0
    for block, numbers in _contexts(texts, tokenizer, context_length):
        part = slice(None if limit is None else limit - count)
        blocks.append((block[part], numbers[part]) if documents else (block[part],))
        count += len(blocks[-1][0])
        if count == limit:
            break
    if not count:
        raise UserError(
            f"the text has fewer tokens than one context of {context_length}; give more text or a "
            "smaller context_length"
        )
    return tuple(map(np.concatenate, zip(*blocks, strict=True)))


def _contexts(
    texts: Iterable[str], tokenizer: Tokenizer, length: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields blocks of contexts, and the number of the document of each of their tokens.

    A BOS between documents that falls on a cut is left out, since the context has one already.
    """
    bos, text_length, texts = tokenizer.bos, length - 1, iter(texts)
    stream, of, seen = np.zeros(0, np.int32), np.zeros(0, np.int32), 0
    while batch := list(itertools.islice(texts, _DOCUMENTS_PER_BATCH)):
        try:
            parts = [np.array([bos, *ids], np.int32) for ids in tokenizer.encode_batch(batch)]
        except OverflowError:
            raise UserError(f"the tokenizer of {tokenizer.name} gives a token above 2^31") from None
        stream = np.concatenate([stream, *parts])
        numbers = np.arange(seen, seen + len(batch), dtype=np.int32)
        of = np.concatenate([of, np.repeat(numbers, [len(part) for part in parts])])
        seen += len(batch)
        starts, at = [], 0
        while True:
            while at < len(stream) and stream[at] == bos:
                at += 1
            if at + text_length > len(stream):
                break
            starts.append(at)
            at += text_length
        block = np.full((len(starts), length), bos, np.int32)
        documents = np.full(block.shape, NO_DOCUMENT, np.int32)
        for row, numbers, start in zip(block, documents, starts, strict=True):
            row[1:] = stream[start : start + text_length]
            numbers[1:] = of[start : start + text_length]
        documents[block == bos] = NO_DOCUMENT
        yield block, documents
        stream, of = stream[at:].copy(), of[at:].copy()
