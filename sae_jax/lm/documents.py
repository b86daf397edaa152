"""Reads documents from files, which may be compressed, directories and datasets."""

import itertools
import json
import pathlib
from collections.abc import Iterable, Iterator

from absl import logging

from sae_jax import paths
from sae_jax.errors import UserError
from sae_jax.lm import compressed

_DATASET_PREFIX = "datasets:"
_DOCUMENT_CHARACTERS = 4 << 20  # a larger text file is several documents: tokens take memory


def read_texts(sources, field: str = "text", collapse_newlines: bool = False) -> Iterator[str]:
    """Yields the documents of one source or of several, in order. Blank ones are left out.

    A source is one of

    - a .json file: a list of strings, or of objects with `field`;
    - a .jsonl file: a string, or an object with `field`, on each line;
    - any other file: one document, or several if it is larger than 4 million characters;
    - a directory: all its files, by name; those that are not text are skipped with a warning;
    - datasets:NAME[@CONFIG][:SPLIT]: a dataset that the package `datasets` streams. NAME is a name
      on the Hugging Face hub, a directory that `save_to_disk` wrote, a directory of data files or a
      .parquet file. SPLIT is train by default.

    Files may also be compressed, as .gz, .bz2, .xz or .zst.

    Raises UserError for a source that is missing or cannot be read as its suffix says.

    Args:
      sources: a source, or a list of them.
      field: the field of objects and datasets that holds the text.
      collapse_newlines: whether several newlines become one, for models that never saw an empty
        line.
    """
    sources = [sources] if isinstance(sources, (str, pathlib.Path)) else sources
    for document in itertools.chain.from_iterable(_documents(str(s), field) for s in sources):
        if collapse_newlines:
            while "\n\n" in document:
                document = document.replace("\n\n", "\n")
        if document.strip():
            yield document


def text_files(directory) -> list[pathlib.Path]:
    """Returns all files under a directory, in the order of their paths, but no hidden ones."""
    directory = paths.local(directory)
    files = (path for path in directory.rglob("*") if path.is_file())
    visible = (p for p in files if not any(s[0] == "." for s in p.relative_to(directory).parts))
    return sorted(visible, key=lambda path: path.relative_to(directory).parts)


def _documents(source: str, field: str) -> Iterator[str]:
    if source.startswith(_DATASET_PREFIX):
        yield from _dataset(source.removeprefix(_DATASET_PREFIX), field)
        return
    path = paths.local(source)
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
    suffix = compressed.suffix(path)
    try:
        with compressed.open_text(path) as file:
            if suffix == ".jsonl":
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield _text_of(json.loads(line), field, f"{path}, line {number}")
            elif suffix == ".json":
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
    except compressed.DAMAGED as error:
        raise UserError(f"cannot read {path}: {error}") from None


def _text_of(item, field: str, where: str) -> str:
    text = item.get(field) if isinstance(item, dict) else item
    if not isinstance(text, str):
        has = f"it has {', '.join(item)}" if isinstance(item, dict) else f"it is {item!r:.40}"
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
    path = pathlib.Path(name)
    if (path / "dataset_dict.json").is_file():
        return datasets.load_from_disk(name)[split]
    if (path / "state.json").is_file():
        return datasets.load_from_disk(name)
    if path.suffix == ".parquet":
        return datasets.load_dataset("parquet", data_files=name, split=split, streaming=True)
    config = None
    if not path.exists():
        name, _, config = name.partition("@")
    return datasets.load_dataset(name, config or None, split=split, streaming=True)
