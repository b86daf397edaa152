"""The imports of the package: downwards only, at the top of files, and of public names.

The files are read, not run. What is wrong is said in words, with the file and line of it.
"""

import ast
import pathlib
import sys
from collections.abc import Iterator
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# From the bottom: a folder imports those of earlier rows only, and those of its own row where that
# makes no circle. Files beside the folders are named as folders.
ROWS = [
    {"background", "errors"},
    {"place_errors", "fields"},
    {"buckets", "paths", "recipe_files"},
    {
        "http_posts",
        "hub",
        "json_files",
        "local_server",
        "numpy_files",
        "pages",
        "plots",
        "progress_bar",
        "python_files",
        "tables",
        "typeset",
    },  # fmt: skip
    {"ops"},
    {"sae"},
    {"config"},  # a run's config holds that of its SAE
    {"activations"},
    {"lm"},
    {"train"},
    {"interop", "evaluate"},
    {"bench", "plan", "interpret", "sweep", "laws"},
    {"cli"},
    {"__init__", "__main__"},
]
HEIGHT = {folder: height for height, row in enumerate(ROWS) for folder in row}
APART = {("sweep", "laws"), ("laws", "sweep")}  # results.csv alone joins them

# Packages that an extra brings, which only some need: whoever does imports them in a function.
OPTIONAL = {
    "datasets", "dictionary_learning", "huggingface_hub", "jsonschema", "pyarrow", "sae_lens",
    "sparsify", "tensorboard", "tensorboardX", "torch", "transformers", "wandb", "yaml",
    "zstandard",
}  # fmt: skip

# What is still wrong: (the complaint's start, a part of it). To be kept empty.
KNOWN: set[tuple[str, str]] = set()


class Import(NamedTuple):
    """One imported module or name. target: the file's module where it is ours, else what is
    imported; name: what is taken from the module, None for the module itself; function: where it
    is imported, None for the top of the file."""

    file: pathlib.Path
    line: int
    target: str
    name: str | None
    function: str | None

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}"


class Source(NamedTuple):
    file: pathlib.Path  # from the repository's root
    module: str
    tree: ast.Module

    @property
    def folder(self) -> str:
        return _folder(self.module)


def _folder(module: str) -> str:
    """ "lm" of sae_jax.lm.text; "__init__" of sae_jax itself."""
    return module.split(".")[1] if "." in module else "__init__"


def read_sources(root: pathlib.Path) -> list[Source]:
    sources = []
    for file in sorted(root.glob("sae_jax/**/*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        sources.append(Source(file.relative_to(root), module, ast.parse(file.read_text())))
    return sources


def imports_of(source: Source, modules: set[str]) -> Iterator[Import]:
    def visit(node: ast.AST, function: str | None) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            inner = function
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                inner = function or getattr(child, "name", "lambda")
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(source.file, child.lineno, alias.name, None, function)
            elif isinstance(child, ast.ImportFrom):
                for alias in child.names:
                    whole = f"{child.module}.{alias.name}"
                    target, name = (whole, None) if whole in modules else (child.module, alias.name)
                    yield Import(source.file, child.lineno, target, name, function)
            else:
                yield from visit(child, inner)

    yield from visit(source.tree, None)


def complaints(root: pathlib.Path) -> list[str]:
    sources = read_sources(root)
    modules = {source.module for source in sources}
    found, edges = [], {}
    for source in sources:
        imports = list(imports_of(source, modules))
        ours = [i for i in imports if _is_ours(i.target)]
        edges[source.module] = {i.target for i in ours}
        for i in ours:
            found += _wrong_way(source, i)
        for i in imports:
            found += _wrong_place(source, i)
            found += _private_name(i)
        found += _private_attributes(source, ours)
    found += _circles(edges, "module")
    folders = {}
    for module, targets in edges.items():
        folders.setdefault(_folder(module), set()).update(map(_folder, targets))
    return found + _circles(
        {folder: targets - {folder} for folder, targets in folders.items()}, "folder"
    )


def _is_ours(target: str) -> bool:
    return target.split(".")[0] == "sae_jax"


def _wrong_way(source: Source, i: Import) -> Iterator[str]:
    above, below = source.folder, _folder(i.target)
    if above not in HEIGHT or below not in HEIGHT:
        yield f"{i}: {above} or {below} is no folder that this test knows; add it to ROWS"
    elif HEIGHT[above] < HEIGHT[below]:
        yield f"{i}: {above} imports {below} ({i.target}), which lies above it"
    elif (above, below) in APART:
        yield f"{i}: {above} imports {below} ({i.target}); results.csv alone joins them"


def _wrong_place(source: Source, i: Import) -> Iterator[str]:
    package = i.target.split(".")[0]
    if i.function is None or package in OPTIONAL or source.folder == "cli":
        return  # a command imports what is heavy after it has seen the user's mistakes
    yield f"{i}: {i.target} is imported in the function {i.function}; import it at the top"


def _private_name(i: Import) -> Iterator[str]:
    parts = [*i.target.split("."), *([i.name] if i.name else [])]
    private = [part for part in parts if part.startswith("_") and not part.startswith("__")]
    if private and (_is_ours(i.target) or parts[0] == "jax"):
        yield f"{i}: {'.'.join(parts)} is private ({private[0]}); use, or make, a public name"


def _private_attributes(source: Source, ours: list[Import]) -> Iterator[str]:
    """module._x of an imported module of ours."""
    tree = source.tree
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            base = getattr(node, "module", None)
            for alias in node.names:
                target = f"{base}.{alias.name}" if base else alias.name
                if any(i.target == target and i.name is None for i in ours):
                    names[alias.asname or alias.name] = target
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in names
            and node.attr.startswith("_")
            and not node.attr.startswith("__")
        ):
            where = f"{source.file}, line {node.lineno}"
            yield f"{where}: {names[node.value.id]}.{node.attr} is private; make it a public name"


def _circles(edges: dict[str, set[str]], what: str) -> list[str]:
    """One complaint for each circle that a walk meets."""
    found, done = [], set()

    def walk(node: str, path: list[str]) -> None:
        if node in path:
            circle = [*path[path.index(node) :], node]
            found.append(f"a circle of {what}s: {' -> '.join(circle)}")
        elif node not in done:
            for target in sorted(edges.get(node, ())):
                walk(target, [*path, node])
            done.add(node)

    for node in sorted(edges):
        walk(node, [])
    return found


def test_imports_go_downwards_at_the_top_of_files_and_take_public_names():
    found = complaints(ROOT)
    unknown = [c for c in found if not any(c.startswith(f) and part in c for f, part in KNOWN)]
    assert not unknown, "\n".join(["", *unknown])


WRONG = {
    "lm above train": ({"lm/a.py": "from sae_jax.train import loop"}, "lm imports train .*above"),
    "upward in a function": (
        {"ops/a.py": "def f():\n    import sae_jax.sae"},
        "ops imports sae .*above",
    ),
    "in a function": (
        {"lm/a.py": "def f():\n    from sae_jax import paths"},
        "line 2: sae_jax.paths is imported in the function f; import it at the top",
    ),
    "a third party's in a function": (
        {"lm/a.py": "class A:\n    def f(self):\n        import numpy"},
        "line 3: numpy is imported in the function f",
    ),
    "sweep and laws": ({"sweep/a.py": "import sae_jax.laws.b"}, "results.csv alone"),
    "a circle": (
        {"lm/a.py": "from sae_jax.lm import b", "lm/b.py": "from sae_jax.lm.a import x"},
        "a circle of modules: sae_jax.lm.a -> sae_jax.lm.b -> sae_jax.lm.a",
    ),
    "a circle of folders": (
        {"bench/a.py": "import sae_jax.sweep.b", "sweep/b.py": "import sae_jax.bench.c"},
        "a circle of folders: bench -> sweep -> bench",
    ),
    "a private name": ({"lm/a.py": "from sae_jax.lm.b import _x"}, "sae_jax.lm.b._x is private"),
    "a private attribute": (
        {"lm/a.py": "from sae_jax.lm import b as c\nc._x()"},
        "line 2: sae_jax.lm.b._x is private",
    ),
    "jax's own": ({"lm/a.py": "from jax._src import core"}, "jax._src.core is private"),
}


@pytest.mark.parametrize("files, message", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_found(tmp_path, files, message):
    for name in ("paths.py", "lm/b.py", "laws/b.py", "bench/c.py", "sweep/b.py", *files):
        file = tmp_path / "sae_jax" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(files.get(name, ""))
    with pytest.raises(AssertionError, match=message):
        assert not complaints(tmp_path), "\n".join(complaints(tmp_path))
    assert sys.modules.get("sae_jax.lm.b") is None  # nothing was run
