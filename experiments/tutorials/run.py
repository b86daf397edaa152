"""Runs the tutorials, each in a fresh kernel, and writes their outputs into them.

  python experiments/tutorials/run.py                    all of them
  python experiments/tutorials/run.py 0_by_hand          one
  python experiments/tutorials/run.py --check            all, and no file is changed

Needs the extra [notebook]. A tutorial that finds no model (5_real_model without a network and
without SAE_JAX_SMOLLM2) says so and is left as it is. What kernels print to stderr is not
kept. Exit code 1: a cell failed; it is shown.
"""

import argparse
import os
import pathlib
import sys
import time

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = pathlib.Path(__file__).parent
ROOT = FOLDER.parents[1]
INLINE = "module://matplotlib_inline.backend_inline"  # figures become outputs
SKIPPED = "SKIPPED: "  # what the first output begins with where a tutorial cannot run here


def names() -> list[str]:
    """Returns the names of the tutorials, in their order."""
    return sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def execute(name: str, timeout: float = 600) -> nbformat.NotebookNode:
    """Returns the tutorial with the outputs of a fresh kernel, which imports sae_jax from here.

    Args:
      name: its name.
      timeout: the most seconds that one cell may take.

    Raises CellExecutionError where a cell fails, CellTimeoutError where one takes too long."""
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        record_timing=False,
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(FOLDER)}},
    )
    try:
        client.execute(env=os.environ | {"PYTHONPATH": path, "MPLBACKEND": INLINE})
    except CellExecutionError:
        if skipped(notebook) is None:
            raise
    return notebook


def skipped(notebook: nbformat.NotebookNode) -> str | None:
    """Returns why a tutorial that was run could not do its work here, or None."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.get("text", "").startswith(SKIPPED):
                return output["text"].removeprefix(SKIPPED).strip()
    return None


def tidy(notebook: nbformat.NotebookNode) -> None:
    """Leaves out of a notebook what changes from run to run and what no reader needs."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", {}
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]


def save(notebook: nbformat.NotebookNode, name: str) -> None:
    """Writes a tutorial in place of the one that there is."""
    whole = FOLDER / f"{name}.ipynb.part"
    nbformat.write(notebook, whole)
    whole.replace(FOLDER / f"{name}.ipynb")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="tutorials; by default all")
    parser.add_argument("--check", action="store_true", help="run copies and change no file")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for a cell")
    arguments = parser.parse_args()
    asked = [pathlib.Path(name).stem for name in arguments.names] or names()
    if unknown := set(asked) - set(names()):
        parser.error(f"no tutorial {sorted(unknown)[0]}; there are {', '.join(names())}")
    failed = 0
    for name in asked:
        start = time.monotonic()
        try:
            notebook = execute(name, arguments.timeout)
        except CellExecutionError as error:
            print(f"{name}: failed\n{error}", file=sys.stderr)
            failed += 1
            continue
        reason = skipped(notebook)
        if reason is None and not arguments.check:
            tidy(notebook)
            save(notebook, name)
        done = f"skipped: {reason}" if reason else f"{time.monotonic() - start:.0f} s"
        print(f"{name}: {done}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
