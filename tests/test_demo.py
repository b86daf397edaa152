"""The demo, as a user runs it: killed, started again, and in the time that the README promises."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

SMALL = ["--tokens=60000", "--d_sae=2048", "--epochs=2"]
MINUTES = 4  # promised on two idle cores; a shared machine gets twice that here


def start(out: pathlib.Path, *flags) -> subprocess.Popen:
    command = [sys.executable, "-m", "sae_jax", "demo", f"--out={out}", *flags]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def results(out: pathlib.Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}


@pytest.mark.long
def test_killed_again_and_again_it_goes_on_and_ends_with_the_page(tmp_path):
    out, run = tmp_path / "demo", tmp_path / "demo" / "run"
    moments = [out / "store" / "written", run / "metrics.jsonl", run / "result.json"]
    for moment in moments:
        process = start(out, *SMALL)
        deadline = time.monotonic() + 300
        while not moment.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert not (out / "index.html").exists()
    text, _ = start(out, *SMALL).communicate(timeout=600)
    assert (out / "index.html").is_file(), text
    assert json.loads((run / "result.json").read_text())["d_sae"] == 2048
    assert not [p for p in out.rglob("*") if "tmp" in p.name]

    before = results(out)
    text, _ = start(out, *SMALL).communicate(timeout=300)
    assert results(out) == before, "run again, it must redo nothing"
    assert str(out / "index.html") in text

    text, _ = (other := start(out, "--tokens=70000")).communicate(timeout=300)
    assert other.returncode == 2 and "Traceback" not in text
    assert results(out) == before


@pytest.mark.long
def test_it_takes_minutes_and_finds_a_good_sae(tmp_path):
    begin = time.monotonic()
    process = start(tmp_path / "demo")
    text, _ = process.communicate(timeout=1200)
    assert process.returncode == 0, text
    assert time.monotonic() - begin < 2 * 60 * MINUTES
    found = json.loads((tmp_path / "demo" / "run" / "eval.json").read_text())
    assert found["reconstruction"]["fvu"] < 0.1
    assert found["language_model"]["ce_recovered_zero"] > 0.95
    page = (tmp_path / "demo" / "index.html").read_text(encoding="utf-8")
    assert page.count("<article") == 30
