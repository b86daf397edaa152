"""local.py's promises about processes, and what can be checked of the other launchers here."""

import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest

LAUNCH = pathlib.Path(__file__).parents[1] / "launch"

# ------------------------------------------------------------------------------------ local.py


@pytest.fixture
def local(tmp_path):
    """Starts launch/local.py with a `sae_jax` that runs the Python code it is given as its
    command, where `i` is its --process_id, in place of the real one."""
    (tmp_path / "sae_jax").mkdir()
    (tmp_path / "sae_jax" / "__main__.py").write_text(
        "import os, pathlib, signal, sys, time\n"
        "flags = dict(argument.lstrip('-').split('=') for argument in sys.argv[2:])\n"
        "i = int(flags['process_id'])\n"
        "exec(sys.argv[1])\n"
    )

    def start(code: str, *flags: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, LAUNCH / "local.py", *flags, "--", code],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def test_each_process_knows_the_others_and_its_lines_carry_its_number(local):
    code = "print(flags['num_processes'], flags['coordinator'], os.environ['JAX_NUM_CPU_DEVICES'])"
    process = local(code, "--processes=2", "--devices=3")
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    lines = sorted(out.splitlines())
    assert re.fullmatch(r"\[0\] 2 localhost:\d+ 3", lines[0])
    assert lines[1] == lines[0].replace("[0]", "[1]")


@pytest.mark.parametrize(
    "how,code,said",
    [
        ("sys.exit(2)", 2, "process 1 ended with exit code 2"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "process 1 died of SIGKILL"),
        ("sys.exit(75)", 75, "process 1 was told to stop and saved (exit code 75)"),
    ],
)
def test_one_that_ends_badly_is_named_and_the_others_do_not_outlive_their_grace(
    local, how, code, said
):
    process = local(f"{how} if i == 1 else time.sleep(60)", "--processes=2", "--grace=0.1")
    out, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert f"{said}; the others have 0.1 s to end" in err
    assert "killing process 0, still running" in err


def test_all_are_started_again_until_they_end_well(local):
    code = "p = pathlib.Path('died'); d = p.exists(); p.touch(); print(d)\nsys.exit(0 if d else 75)"
    process = local(code, "--processes=1", "--restarts=3")
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0 and out == "[0] False\n[0] True\n", err
    assert "ended with 75; starting again, 2 restarts left after this" in err


def test_a_mistake_is_not_started_again(local):
    process = local("sys.exit(2)", "--processes=1", "--restarts=3")
    _, err = process.communicate(timeout=30)
    assert process.returncode == 2 and "starting again" not in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_goes_to_all_and_starts_nothing_again(local, number):
    code = f"signal.signal({int(number)}, lambda *_: sys.exit(75)); print('up', flush=True)"
    process = local(f"{code}; time.sleep(60)", "--processes=2", "--restarts=3")
    assert [process.stdout.readline()[4:] for _ in range(2)] == ["up\n", "up\n"]
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 75 and "starting again" not in err
