"""Text: reading documents, the tokenizer, packing into contexts.

The rules, which a store's provenance names: a document is a text file (one of more than 4 million
characters is cut into several at line ends), one string of a .json list, or one line of a .jsonl;
every document is tokenised without special tokens; documents are joined with one BOS between them;
the stream is cut every context_length - 1 tokens and each piece is preceded by BOS, so that every
context starts with exactly one. A last piece that is too short is dropped.
"""

import dataclasses
import gzip
import itertools
import json
import pathlib
from collections.abc import Iterable, Iterator

import numpy as np
import tokenizers
from absl import logging

from sae_jax.config import UserError

PACKING_RULE = "documents joined by BOS, cut every context_length - 1 tokens, each cut after a BOS"
_DATASET_PREFIX = "datasets:"
_DOCUMENT_CHARACTERS = 4 << 20  # a larger text file is several documents: tokens take memory
_DOCUMENTS_PER_BATCH = 256  # tokenised together, by the tokenizer's own threads


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A tokenizer.json with the ids of its special tokens. `bos` starts every context."""

    backend: tokenizers.Tokenizer
    bos: int
    eos: int | None
    pad: int | None
    name: str

    @property
    def special_tokens(self) -> tuple[int, ...]:
        """Ids that stand for no text: BOS, EOS, PAD, each once, sorted."""
        return tuple(sorted({t for t in (self.bos, self.eos, self.pad) if t is not None}))

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone, no special token added."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)


def load_tokenizer(directory) -> Tokenizer:
    """From tokenizer.json and the ids in config.json, generation_config.json or, by name,
    tokenizer_config.json (the first that has them). A model without BOS uses its EOS, as GPT-2's
    <|endoftext|> does for both. UserError where a file is missing or none of them gives a BOS."""
    directory = pathlib.Path(directory)
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise UserError(
            f"no tokenizer.json in {directory}; save the tokenizer there in that format"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises plain Exception
        raise UserError(f"{file} is not a tokenizer of the tokenizers package: {error}") from None
    backend.no_padding()
    backend.no_truncation()
    ids = {kind: _special_id(directory, backend, kind) for kind in ("bos", "eos", "pad")}
    bos = ids["eos"] if ids["bos"] is None else ids["bos"]
    if bos is None:
        raise UserError(
            f"{directory} names no BOS or EOS token; add bos_token_id to its config.json"
        )
    return Tokenizer(backend, bos, ids["eos"], ids["pad"], directory.resolve().name)


def _special_id(directory: pathlib.Path, backend, kind: str) -> int | None:
    for name in ("config.json", "generation_config.json"):
        value = read_json(directory / name, default={}).get(f"{kind}_token_id")
        value = value[0] if isinstance(value, list) else value  # Llama 3 lists several EOS
        if value is not None:
            return int(value)
    token = read_json(directory / "tokenizer_config.json", default={}).get(f"{kind}_token")
    token = token.get("content") if isinstance(token, dict) else token
    return None if token is None else backend.token_to_id(token)


def read_texts(sources, field: str = "text", collapse_newlines: bool = False) -> Iterator[str]:
    """Documents of one source or of several, in order; those of nothing but blanks left out.

    A source is a file (.json: a list of strings or of objects with `field`; .jsonl: an object
    with `field` or a string on each line; anything else: one document; each also as .gz), a
    directory (all its files, by name, those that are not text skipped with a warning), or
    "datasets:NAME[:SPLIT]" (streamed by the `datasets` package; split train). collapse_newlines
    makes one newline of several, for models that never saw an empty line. UserError for a source
    that is missing or does not read as its suffix says.
    """
    sources = [sources] if isinstance(sources, (str, pathlib.Path)) else sources
    for document in itertools.chain.from_iterable(_documents(str(s), field) for s in sources):
        if collapse_newlines:
            while "\n\n" in document:
                document = document.replace("\n\n", "\n")
        if document.strip():
            yield document


def text_files(directory) -> list[pathlib.Path]:
    """All files under a directory in the order of their paths, hidden ones left out."""
    directory = pathlib.Path(directory)
    files = (path for path in directory.rglob("*") if path.is_file())
    visible = (p for p in files if not any(s[0] == "." for s in p.relative_to(directory).parts))
    return sorted(visible, key=lambda path: path.relative_to(directory).parts)


def _documents(source: str, field: str) -> Iterator[str]:
    if source.startswith(_DATASET_PREFIX):
        yield from _dataset(source.removeprefix(_DATASET_PREFIX), field)
        return
    path = pathlib.Path(source)
    if path.is_dir():
        skipped = []
        for file in text_files(path):
            try:
                yield from _file(file, field)
            except UnicodeDecodeError:
                skipped.append(file)
        if skipped:
            logging.warning("%s: skipped %d files that are not UTF-8 text, such as %s",
                            path, len(skipped), skipped[0])  # fmt: skip
    elif path.is_file():
        try:
            yield from _file(path, field)
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text (byte {error.start})") from None
    else:
        raise UserError(
            f"no text at {source}; give a file, a directory, or {_DATASET_PREFIX}NAME for a "
            "Hugging Face dataset"
        )


def _file(path: pathlib.Path, field: str) -> Iterator[str]:
    suffixes = path.suffixes
    packed = suffixes[-1:] == [".gz"]
    suffix = (suffixes[:-1] if packed else suffixes)[-1:]
    try:
        with (gzip.open if packed else open)(path, "rt", encoding="utf-8") as file:
            if suffix == [".jsonl"]:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield _text_of(json.loads(line), field, f"{path}, line {number}")
            elif suffix == [".json"]:
                items = json.load(file)
                if not isinstance(items, list):
                    raise UserError(f"{path} holds no list; give a list of texts, or .jsonl")
                for number, item in enumerate(items):
                    yield _text_of(item, field, f"{path}, item {number}")
            else:
                while lines := file.readlines(_DOCUMENT_CHARACTERS):
                    yield "".join(lines)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    except (OSError, EOFError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def _text_of(item, field: str, where: str) -> str:
    text = item.get(field) if isinstance(item, dict) else item
    if not isinstance(text, str):
        has = f"it has {', '.join(item)}" if isinstance(item, dict) else f"it is {item!r:.40}"
        raise UserError(f"{where} has no text in field {field!r}; {has}")
    return text


def _dataset(name: str, field: str) -> Iterator[str]:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{_DATASET_PREFIX}{name} needs the datasets package: pip install sae-jax[lm]"
        ) from None
    name, _, split = name.partition(":")
    rows = datasets.load_dataset(name, split=split or "train", streaming=True)
    for number, row in enumerate(rows):
        yield _text_of(row, field, f"{name}, row {number}")


def pack(
    texts: Iterable[str], tokenizer: Tokenizer, context_length: int, max_tokens: int | None = None
) -> np.ndarray:
    """Contexts (num_sequences, context_length) of int32 by the rules above; at most `max_tokens`
    tokens, BOS counted. Reads no more texts than it needs. UserError where they do not fill one
    context."""
    if context_length < 2:
        raise UserError(
            f"context_length is {context_length}; a context is BOS and one token or more"
        )
    limit = None if max_tokens is None else max_tokens // context_length
    if limit is not None and limit < 1:
        raise UserError(f"{max_tokens} tokens are less than one context of {context_length}")
    pieces = itertools.islice(_pieces(texts, tokenizer, context_length - 1), limit)
    body = np.fromiter(
        itertools.chain.from_iterable(pieces), dtype=np.int32
    ).reshape(-1, context_length - 1)  # fmt: skip
    if not len(body):
        raise UserError(
            f"the text has fewer tokens than one context of {context_length}; give more text or a "
            "smaller context_length"
        )
    return np.concatenate([np.full((len(body), 1), tokenizer.bos, np.int32), body], axis=1)


def _pieces(texts: Iterable[str], tokenizer: Tokenizer, length: int) -> Iterator[list[int]]:
    """The stream of tokens, cut. A BOS between documents that falls on a cut is left out: the
    context has one already."""
    stream: list[int] = []
    texts = iter(texts)
    while batch := list(itertools.islice(texts, _DOCUMENTS_PER_BATCH)):
        for ids in tokenizer.encode_batch(batch):
            stream += [tokenizer.bos, *ids]
        start = 0
        while True:
            while start < len(stream) and stream[start] == tokenizer.bos:
                start += 1
            if start + length > len(stream):
                break
            yield stream[start : start + length]
            start += length
        del stream[:start]


def read_json(path: pathlib.Path, default=None) -> dict:
    """A JSON object. UserError where it is missing (and there is no default) or damaged."""
    if not path.is_file():
        if default is None:
            raise UserError(f"no {path.name} in {path.parent}")
        return default
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no JSON object")
    return values
