"""Damaged files of every format end as the right result or as a UserError of one line."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent
# One of each end that is not allowed, and of the two that are, by the number of the case.
PLANTED = """
import os, sys, time
sys.path.insert(0, {here!r})
import json, pathlib, numpy as np
import run
from formats import Format
from sae_jax.errors import UserError

def make(root):
    (root / "example").mkdir()
    (root / "example/a.txt").write_text("0123456789")
    (root / "example/b.json").write_text("[1, 2, 3]")

def read(folder, scratch):
    try:
        files = [(folder / name).read_bytes() for name in ("a.txt", "b.json")]
    except OSError:
        return True
    return files != [b"0123456789", b"[1, 2, 3]"]

def ending(function):
    def reader(folder, scratch):
        if read(folder, scratch):
            function(folder)
        return {{"a": np.ones(3)}}
    return Format(make, reader)

def refuse(text):
    def function(folder):
        raise UserError(text)
    return function

def wait(folder):
    time.sleep(60)

def allocate(folder):
    np.ones(1 << 28)

def spin_in_c(folder):
    b"a" * 10 in b"b"
    sum(range(1 << 40))

formats = {{
    "refuses": ending(refuse("one line")),
    "raises": ending(lambda folder: [][1]),
    "exits": ending(lambda folder: sys.exit(0)),
    "hangs": ending(wait),
    "hangs_in_c": ending(spin_in_c),
    "memory": ending(allocate),
    "crashes": ending(lambda folder: os.abort()),
    "writes": ending(lambda folder: (folder.parent / "x").write_text("")),
    "leaves": ending(lambda folder: (folder / "x").write_text("")),
    "reads": ending(lambda folder: open("/etc/hostname").close()),
    "nan": Format(make, lambda folder, scratch: {{"a": np.full(1, np.nan if read(folder, scratch)
                                                              else 1.0)}}),
    "unnoticed": Format(make, lambda folder, scratch: {{"a": np.full(1, read(folder, scratch))}},
                        sealed=("*",)),
}}
reports = run.fuzz(formats, dict.fromkeys(formats, 4), limits=run.Limits(1.0, 1 << 29, 4.0))
print(json.dumps({{name: [report.right, report.refused, sorted({{f.what for f in report.failures}})]
                   for name, report in reports.items()}}))
"""


def start(*arguments: str, **options) -> subprocess.CompletedProcess:
    root = HERE.parents[1]
    environment = os.environ | {"PYTHONPATH": f"{root}:{root / 'tests'}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, **options)


def failures(folder: pathlib.Path, *flags: str) -> tuple[str, dict]:
    done = start(str(HERE / "run.py"), f"--json={folder / 'out.json'}", *flags)
    assert done.returncode in (0, 1), done.stderr[-3000:]
    return done.stdout, json.loads((folder / "out.json").read_text())


@pytest.mark.slow
def test_damaged_files_end_right_or_refused(tmp_path):
    text, reports = failures(tmp_path, "--cases=10000", "--by_cost", "--seed=1")
    for ending in ("right", "refused"):
        assert sum(report[ending] for report in reports.values()) > 2000, text
    assert not any(report["failures"] for report in reports.values()), text


@pytest.mark.slow
def test_the_fuzzer_tells_every_other_end():
    """Each reader here does one thing wrong as soon as its files are damaged."""
    done = start("-c", PLANTED.format(here=str(HERE)))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("refuses")[1:] == [4, []]
    expected = {
        "raises": "IndexError", "exits": "SystemExit", "hangs": "hang", "hangs_in_c": "hang",
        "memory": "memory", "crashes": "signal 6", "writes": "wrote outside",
        "leaves": "left files behind", "reads": "read a file outside", "nan": "not finite",
        "unnoticed": "damage unnoticed",
    }  # fmt: skip
    assert {name: what for name, (_, _, what) in found.items()} == {
        name: [what] for name, what in expected.items()
    }
