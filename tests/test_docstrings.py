"""Every public module, class, function and method has a docstring that begins with a sentence.

`python tests/test_docstrings.py` lists what is wrong in the whole package, folder by folder.
"""

import ast
import collections
import dataclasses
import importlib
import inspect
import pathlib
import re

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "sae_jax"
# A docstring that begins with one of these names a part of something that it does not name.
RIDDLES = ("Of ", "That ", "Those ", "As ", "None ", "Nothing ", "And ", "Or ", "But ", "Which ")
# A function's docstring that begins with one of these has a verb only if it has one of VERBS.
NOUN_PHRASES = re.compile(r"(The|A|An|All|Every|Each|Its|Their|In|On|At|By|For|From|With|To)\b")
VERBS = re.compile(
    r"\b(is|are|was|were|be|has|have|does|do|can|may|must|will|would|should|gives?|takes?|makes?"
    r"|holds?|says?|tells?|comes?|goes|reads?|writes?|returns?|raises?)\b"
)


@dataclasses.dataclass(frozen=True)
class Public:
    """Something public of a module, and its docstring, None if it has none."""

    name: str  # "" for the module itself
    docstring: str | None
    is_function: bool


def public_of(tree: ast.Module):
    """Yields the module and everything public in it."""
    yield Public("", ast.get_docstring(tree), False)
    yield from _public_in(tree.body, "")


def _public_in(body: list[ast.stmt], prefix: str):
    for node in body:
        if isinstance(node, ast.If | ast.Try | ast.With):
            yield from _public_in(node.body, prefix)
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if node.name.startswith("_"):
            continue
        decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
        if any(d.endswith((".setter", "overload")) for d in decorators):
            continue
        is_class = isinstance(node, ast.ClassDef)
        is_property = any(d.endswith("property") for d in decorators)
        name = prefix + node.name
        yield Public(name, ast.get_docstring(node), not (is_class or is_property))
        if is_class:
            yield from _public_in(node.body, f"{name}.")


def inherited(file: pathlib.Path, name: str) -> str | None:
    """Returns the docstring that a method has from the method of a base class that it overrides."""
    module = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
    found = importlib.import_module(module.removesuffix(".__init__"))
    for part in name.split("."):
        owner, found = found, inspect.getattr_static(found, part)
    if isinstance(found, classmethod | staticmethod):
        found = getattr(owner, part)  # getdoc looks at the base classes of what is bound
    return inspect.getdoc(found)


def fault(docstring: str | None, is_function: bool) -> str | None:
    """Says what is wrong with a docstring; None where nothing is."""
    if not docstring:
        return "no docstring"
    first, *others = docstring.split("\n\n")
    first = " ".join(first.split())
    if not first[0].isupper():
        return f"begins with no capital letter: {first}"
    if not first.endswith((".", ".)")) and not (first.endswith(":") and others):
        return f"its first paragraph does not end with a full stop: {first}"
    sentence = re.split(r"(?<=\.)\s", first)[0]
    if len(sentence.split()) < 2:
        return f"one word is no sentence: {sentence}"
    if sentence.startswith(RIDDLES):
        return f"begins with what it does not name: {sentence}"
    if is_function and NOUN_PHRASES.match(sentence) and not VERBS.search(first):
        return f"a function's docstring without a verb: {sentence}"
    return None


def faults(file: pathlib.Path) -> list[str]:
    """Returns what is wrong in a file, a line each."""
    out = []
    for public in public_of(ast.parse(file.read_text())):
        docstring = public.docstring
        if docstring is None and "." in public.name:
            docstring = inherited(file, public.name)
        if found := fault(docstring, public.is_function):
            out.append(f"{file.relative_to(PACKAGE)} {public.name or '(module)'}: {found}")
    return out


def files() -> list[pathlib.Path]:
    return sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize(
    "file",
    files(),
    ids=lambda file: file.relative_to(PACKAGE).as_posix(),
)
def test_public_names_have_docstrings_that_are_sentences(file):
    found = faults(file)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "docstring,is_function,is_fault",
    [
        ("Returns the rows (n, width).", True, False),
        ("Writes one shard.\n\nArgs:\n  index: its number.", True, False),
        ("A sweep has two files:\n\n    a\n    b", False, False),
        ("The loss of each row is taken from the store.", True, False),
        ("The loss (N,) of each row.", False, False),
        (None, False, True),
        ("returns the rows.", True, True),
        ("(N,) group of each value.", True, True),
        ("Returns the rows", True, True),
        ("Of a pass: that of its first run.", True, True),
        ("The bytes of `name`, or None.", True, True),
        ("Rows.", False, True),
    ],
)
def test_what_counts_as_a_fault(docstring, is_function, is_fault):
    assert (fault(docstring, is_function) is not None) is is_fault


if __name__ == "__main__":
    by_folder = collections.defaultdict(list)
    for path in files():
        by_folder[path.relative_to(PACKAGE).parts[0]] += faults(path)
    for folder, lines in by_folder.items():
        print(f"{folder}: {len(lines)}", *lines, sep="\n  ")
