"""Reads documents from files, which may be compressed, directories and datasets."""

import codecs
import io
import itertools
import json
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from absl import logging

from sae_jax import paths
from sae_jax.errors import UserError, some
from sae_jax.json_files import parse_json
from sae_jax.lm import compressed

_DATASET_PREFIX = "datasets:"
_DOCUMENT_CHARACTERS = 4 << 20  # a larger text file is several documents: tokens take memory
_READ_AHEAD = 16 << 20  # characters
_JSON_LINES = (".jsonl", ".ndjson")
_LOOK = 8192  # bytes that tell text from other files


def read_texts(sources, field: str = "text", collapse_newlines: bool = False) -> Iterator[str]:
    """Yields the documents of one source or of several, in order. Blank ones are left out.

    A source is one of

    - a .json file: a list of strings, or of objects with `field`; or lines as in a .jsonl file;
    - a .jsonl or .ndjson file: a string, or an object with `field`, on each line;
    - any other file: one document, or several if it is larger than 4 million characters;
    - a directory: all its files, by name, also behind links; those that do not begin as text are
      skipped with a warning;
    - datasets:NAME[@CONFIG][:SPLIT]: a dataset that the package `datasets` streams. NAME is a name
      on the Hugging Face hub, a directory that `save_to_disk` wrote, a directory of data files or a
      .parquet file. SPLIT is train by default.

    Files may also be compressed, as .gz, .bz2, .xz or .zst, and may begin with a byte-order mark. A
    text that is null is blank.

    Of files, 16 million characters are read before the first document is yielded, so that a mistake
    in them is found before anything is made of them.

    Raises UserError for a source that is missing or cannot be read as its suffix says. It names the
    file, and the line.

    Args:
      sources: a source, or a list of them.
      field: the field of objects and datasets that holds the text.
      collapse_newlines: whether several newlines become one, for models that never saw an empty
        line.
    """
    for document in _in_order(_listed(sources), field):
        if collapse_newlines:
            document = _collapsed(document)
        if document.strip():
            yield document


def read_labelled(
    sources, label_field: str, field: str = "text", collapse_newlines: bool = False
) -> Iterator[tuple[str, str]]:
    """Yields the documents that `read_texts` does, each with its label.

    Raises UserError as `read_texts` does, and where a document is no object with fields, which has
    no label.

    Args:
      sources: a source, or a list of them.
      label_field: the field of objects and datasets that holds the label, a text.
      field: the field that holds the text.
      collapse_newlines: as for `read_texts`.
    """
    sources = _listed(sources)
    both = zip(_in_order(sources, field), _in_order(sources, label_field), strict=True)
    for number, (document, label) in enumerate(both, 1):
        if not document.strip():
            continue
        if label == document:  # a text file, or a list of texts
            raise UserError(
                f"document {number} of {some(sources)} has no label: it is no object with the "
                f"fields {field!r} and {label_field!r}"
            )
        yield _collapsed(document) if collapse_newlines else document, label


def _listed(sources) -> list[str]:
    sources = [sources] if isinstance(sources, (str, pathlib.Path)) else sources
    return [str(source) for source in sources]


def _collapsed(document: str) -> str:
    """Returns a document with several newlines as one."""
    while "\n\n" in document:
        document = document.replace("\n\n", "\n")
    return document


def text_files(directory) -> list[pathlib.Path]:
    """Returns all files under a directory, in the order of their paths, but no hidden ones.

    Links are followed; a directory that several lead to counts once. Raises UserError for one that
    cannot be read.
    """

    def refuse(error: OSError):
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from None

    directory, found, seen = paths.local(directory), [], set()
    for folder, folders, names in os.walk(directory, onerror=refuse, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if name[0] != ".")
        found += [pathlib.Path(folder, name) for name in names if name[0] != "."]
    files = (path for path in found if path.is_file())
    return sorted(files, key=lambda path: path.relative_to(directory).parts)


def _in_order(sources: list[str], field: str) -> Iterator[str]:
    """Yields the documents of all sources, reading ahead where they are files."""
    for source in sources:
        if not source.startswith(_DATASET_PREFIX):
            _place(source)  # the last one too is there
    groups = itertools.groupby(sources, lambda source: source.startswith(_DATASET_PREFIX))
    for streamed, group in groups:
        documents = itertools.chain.from_iterable(_documents(s, field) for s in list(group))
        yield from documents if streamed else _ahead(documents)


def _ahead(documents: Iterator[str]) -> Iterator[str]:
    """Yields documents after the first 16 million characters of them have been read."""
    read, characters = [], 0
    for document in documents:
        read.append(document)
        characters += len(document)
        if characters > _READ_AHEAD:
            break
    yield from read
    del read
    yield from documents


def _documents(source: str, field: str) -> Iterator[str]:
    if source.startswith(_DATASET_PREFIX):
        yield from _dataset(source.removeprefix(_DATASET_PREFIX), field)
        return
    path = _place(source)
    if path.is_dir():
        skipped = []
        for file in text_files(path):
            if _begins_as_text(file):
                yield from _file(file, field)
            else:
                skipped.append(file)
        if skipped:
            logging.warning("%s: skipped %d files that are not UTF-8 text, such as %s",
                            path, len(skipped), skipped[0])  # fmt: skip
    else:
        yield from _file(path, field)


def _place(source: str) -> pathlib.Path:
    path = paths.local(source)
    try:
        there = path.exists()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if not there:
        raise UserError(
            f"no text at {source}; give a file, a directory, or {_DATASET_PREFIX}NAME for a "
            "Hugging Face dataset"
        )
    return path


def _begins_as_text(path: pathlib.Path) -> bool:
    """Returns whether the first bytes of a file are UTF-8; `_file` tells where it is damaged."""
    try:
        with compressed.open_bytes(path) as file:
            codecs.getincrementaldecoder("utf-8")().decode(file.read(_LOOK))
    except UnicodeDecodeError:
        return False
    except compressed.DAMAGED:
        return True
    return True


def _file(path: pathlib.Path, field: str) -> Iterator[str]:
    try:
        yield from _content(path, field)
    except compressed.DAMAGED as error:
        raise UserError(f"cannot read {path}: {error}") from None


def _content(path: pathlib.Path, field: str) -> Iterator[str]:
    suffix = compressed.suffix(path)
    try:
        with compressed.open_bytes(path) as file:
            if suffix in _JSON_LINES:
                yield from _json_lines(file, field, path)
            elif suffix == ".json":
                yield from _json(file, field, path)
            else:
                text = io.TextIOWrapper(file, encoding="utf-8-sig")  # with or without a mark
                while lines := text.readlines(_DOCUMENT_CHARACTERS):
                    yield "".join(lines)
    except UnicodeDecodeError:
        raise UserError(f"{_first_broken(path)}; save it as UTF-8, or leave it out") from None


def _json(file: BinaryIO, field: str, path: pathlib.Path) -> Iterator[str]:
    """Yields the texts of a .json file, which may hold lines as a .jsonl file does.

    Files of the hub do (C4's): their first line is an object, and there are more lines.
    """
    first = list(itertools.islice(file, 2))
    if len(first) == 2 and first[1].strip() and _is_object(first[0]):
        yield from _json_lines(itertools.chain(first, file), field, path)
        return
    items = parse_json(b"".join(first) + file.read(), path)
    if not isinstance(items, list):
        raise UserError(f"{path} holds no list; give a list of texts, or .jsonl")
    for number, item in enumerate(items):
        yield _text_of(item, field, f"{path}, item {number}")


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _json_lines(lines: Iterable[bytes], field: str, path: pathlib.Path) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield _text_of(parse_json(line, where), field, where)


def _first_broken(path: pathlib.Path) -> str:
    """Returns the place of the first line of a file that is not UTF-8, in words."""
    at = 0
    with compressed.open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f"{path}, line {number} is not UTF-8 text (byte {at + error.start})"
            at += len(line)
    return f"{path} is not UTF-8 text"


def _text_of(item, field: str, where: str) -> str:
    if isinstance(item, dict) and field in item and item[field] is None:
        return ""
    text = item.get(field) if isinstance(item, dict) else item
    if not isinstance(text, str):
        has = f"it has {some(list(item))}" if isinstance(item, dict) else f"it is {item!r:.40}"
        raise UserError(f"{where} has no text in field {field!r}; {has}")
    return text


def _dataset(what: str, field: str) -> Iterator[str]:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{_DATASET_PREFIX}{what} needs the datasets package: pip install 'sae-jax[lm]'"
        ) from None
    name, _, split = what.partition(":")
    split = split or "train"
    if "[" in split:
        raise UserError(
            f"{_DATASET_PREFIX}{what}: a dataset is streamed from its start, which has no slices; "
            f"write {_DATASET_PREFIX}{name}:{split.partition('[')[0]} and limit it with --tokens"
        )
    try:
        rows = _rows(datasets, name, split)
    except (OSError, ValueError, KeyError) as error:  # what it raises for a name, config or split
        reason = str(error).strip("'\"").partition("\n")[0]
        raise UserError(f"{_DATASET_PREFIX}{what} does not open: {reason}") from None
    for number, row in enumerate(rows):
        yield _text_of(row, field, f"{name}, row {number}")


def _rows(datasets, name: str, split: str) -> Iterable[dict]:
    path = paths.local(name)
    if (path / "dataset_dict.json").is_file():
        return datasets.load_from_disk(str(path))[split]
    if (path / "state.json").is_file():
        return datasets.load_from_disk(str(path))
    if path.suffix == ".parquet":
        return datasets.load_dataset("parquet", data_files=str(path), split=split, streaming=True)
    config = None
    if path.exists():
        name = str(path)
    else:
        name, _, config = name.partition("@")
    return datasets.load_dataset(name, config or None, split=split, streaming=True)
