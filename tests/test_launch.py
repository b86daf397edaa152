"""local.py's promises about processes, and what can be checked of the other launchers here."""

import importlib
import os
import pathlib
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from absl import flags
from training import make_config, metrics, start

from sae_jax import cli, config

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
FILES = sorted(path for path in LAUNCH.rglob("*") if path.is_file())

# ------------------------------------------------------------------------------------ local.py


@pytest.fixture
def local(tmp_path):
    """Starts launch/local.py with a `sae_jax` that runs the Python code it is given as its
    command, where `i` is its --process_id, in place of the real one."""
    (tmp_path / "sae_jax").mkdir()
    (tmp_path / "sae_jax" / "__init__.py").touch()  # without it an installed one would come first
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


@pytest.mark.parametrize(
    "number,heard",
    [
        (signal.SIGTERM, signal.SIGTERM),
        (signal.SIGINT, signal.SIGINT),
        (signal.SIGHUP, signal.SIGTERM),
    ],
)
def test_a_signal_goes_to_all_and_starts_nothing_again(local, number, heard):
    code = f"signal.signal({int(heard)}, lambda *_: sys.exit(75)); print('up', flush=True)"
    process = local(f"{code}; time.sleep(60)", "--processes=2", "--restarts=3")
    assert [process.stdout.readline()[4:] for _ in range(2)] == ["up\n", "up\n"]
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 75 and "starting again" not in err


# ------------------------------------------------------------------- tpu_vm.sh, without a cloud


@pytest.fixture
def tpu_vm(tmp_path):
    """Starts launch/tpu_vm.sh with a gcloud that answers with `states` and `codes`, one after the
    other, when asked for the slice's state and told to run, and notes what it heard. The code
    "wait" is 75, once the program is told to stop."""
    (tmp_path / "gcloud").write_text(
        f"#!/bin/bash\ncd {tmp_path}\n"
        """next() { head -1 "$1"; sed -i 1d "$1"; }
all="$*"
case $all in
  *describe*)
    state=$(next states)
    if [ "$state" = ABSENT ]; then echo "ERROR: NOT_FOUND" >&2; exit 1; fi
    echo "$state" ;;
  *create*) echo request >> heard ;;
  *delete*) echo delete >> heard ;;
  *" scp "*) echo copy >> heard ;;
  *uv*) echo install >> heard; printf %s "$all" > installing ;;
  *sae-jax" "*)
    echo "run ${all##*sae-jax }" >> heard
    code=$(next codes)
    if [ "$code" = wait ]; then until [ -e stopped ]; do /bin/sleep 0.02; done; code=75; fi
    exit "$code" ;;
  *pkill*) echo stop >> heard; touch stopped ;;
esac
"""
    )
    (tmp_path / "sleep").write_text("#!/bin/sh\n")
    for program in ("gcloud", "sleep"):
        (tmp_path / program).chmod(0o755)
    heard = tmp_path / "heard"
    heard.touch()

    def start(states: str, codes: str, **variables: str) -> subprocess.Popen:
        (tmp_path / "states").write_text("\n".join(states.split()) + "\n")
        (tmp_path / "codes").write_text("\n".join(codes.split()) + "\n")
        (tmp_path / "sae_jax.whl").touch()
        place = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "ZONE": "z", "TYPE": "v5p-128"}
        place |= {"WHEEL": str(tmp_path / "sae_jax.whl")}
        command = [LAUNCH / "tpu_vm.sh", "slice", "train", "--workdir=gs://a b"]
        return subprocess.Popen(
            command, env=os.environ | place | variables, stderr=subprocess.DEVNULL
        )

    return start, lambda: heard.read_text().splitlines()


RUN = r"run train --workdir=gs://a\ b --distributed"


def test_a_slice_that_is_taken_away_is_asked_for_again_until_the_program_is_done(tpu_vm):
    start, heard = tpu_vm
    asked = "ABSENT WAITING_FOR_RESOURCES PROVISIONING ACTIVE"
    process = start(f"{asked} ACTIVE SUSPENDING SUSPENDED {asked}", "137 255 0")
    there = ["request", "copy", "install", RUN]
    assert process.wait(timeout=30) == 0
    assert heard() == [*there, RUN, "delete", *there, "delete"]


def test_a_mistake_leaves_the_slice(tpu_vm):
    start, heard = tpu_vm
    assert start("ACTIVE", "2").wait(timeout=30) == 2
    assert heard() == ["copy", "install", RUN]


def test_a_signal_to_the_launcher_stops_the_program_and_leaves_the_slice(tpu_vm):
    start, heard = tpu_vm
    process = start("ACTIVE", "wait")
    while RUN not in heard():
        time.sleep(0.02)
    process.terminate()
    assert process.wait(timeout=30) == 75
    assert heard() == ["copy", "install", RUN, "stop"]


def test_the_name_of_a_wheel_is_no_command_on_the_hosts(tpu_vm, tmp_path):
    start, heard = tpu_vm
    wheel = tmp_path / "it's $(touch there); `touch here`.whl"
    wheel.touch()
    assert start("ACTIVE", "2", WHEEL=str(wheel)).wait(timeout=30) == 2
    line = (tmp_path / "installing").read_text().splitlines()[-1]
    assert shlex.split(line)[-1] == f"./{wheel.name}[tpu]"


def test_a_wheel_that_is_not_there_is_a_mistake(tpu_vm, tmp_path):
    start, heard = tpu_vm
    process = start("ACTIVE", "0", WHEEL="no.whl")
    assert process.wait(timeout=30) == 2 and not heard()


# ------------------------------------------------------------------------------------ kubernetes


def documents(name: str) -> dict[str, dict]:
    """What a manifest asks for, by kind."""
    yaml = pytest.importorskip("yaml", reason="needs the extra [test-launch]")
    text = (LAUNCH / "kubernetes" / name).read_text()
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


def job(name: str) -> dict:
    """The manifest's job; a JobSet's, whose own schema is not a part of Kubernetes, is in it."""
    found = documents(name)
    if "Job" in found:
        return found["Job"]
    (replicated,) = found["JobSet"]["spec"]["replicatedJobs"]
    metadata = {"name": replicated["name"]}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, **replicated["template"]}


MANIFESTS = [path.name for path in FILES if path.suffix == ".yaml"]


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_obey_the_published_schemas(name):
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="needs [test-launch]")
    known = [document for kind, document in documents(name).items() if kind != "JobSet"]
    for document in [*known, job(name)]:
        kubernetes_validate.validate(document, "1.31", strict=True)  # first with all that is used


@pytest.mark.parametrize("name", MANIFESTS)
def test_mistakes_fail_a_job_at_once_and_what_was_saved_goes_on(name):
    spec = job(name)["spec"]
    (container,) = spec["template"]["spec"]["containers"]

    def action(code: int) -> str | None:
        for rule in spec["podFailurePolicy"]["rules"]:
            if code in rule.get("onExitCodes", {}).get("values", ()):
                assert rule["onExitCodes"]["containerName"] == container["name"]
                return rule["action"]
        return None

    assert action(2) == "FailJob" and action(137) is None
    if spec["backoffLimit"]:
        assert action(75) == "Ignore"
    else:  # one pod that ends badly ends the job, and the set starts it again
        policy = documents(name)["JobSet"]["spec"]["failurePolicy"]
        rule = {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
        assert policy["rules"] == [rule] and policy["maxRestarts"] > 0
        assert action(75) is None
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"]
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] >= 60


def test_a_job_has_what_jax_reads_of_the_cluster():
    """jax/_src/clusters/k8s_cluster.py: the pod by its address, its job's size and labels, and
    process 0 at JOB-0.SUBDOMAIN."""
    found = documents("gpu.yaml")
    name, pod = found["Job"]["metadata"]["name"], found["Job"]["spec"]["template"]["spec"]
    service = found["Service"]
    assert found["Job"]["metadata"]["labels"]
    assert service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"]
    assert service["spec"]["selector"] == {"job-name": name}
    allowed = {
        (resource, verb)
        for rule in found["Role"]["rules"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert allowed == {("pods", "list"), ("jobs", "get")}
    (subject,) = found["RoleBinding"]["subjects"]
    assert (
        subject["name"] == pod["serviceAccountName"] == found["ServiceAccount"]["metadata"]["name"]
    )
    assert found["RoleBinding"]["roleRef"]["name"] == found["Role"]["metadata"]["name"]


@pytest.mark.long
def test_processes_that_are_replaced_one_by_one_meet_again(tmp_path):
    """As an Indexed Job replaces pods, while their peers still run."""
    world = "world:superposition,width=16,features=64"
    checkpoints = {"log_every": 5, "checkpoint_every": 50}
    settings = make_config(world, steps=600, mesh={"data": 2, "model": 2}, train=checkpoints)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        together = [f"--coordinator=localhost:{free.getsockname()[1]}", "--num_processes=2"]
    first, codes = {}, {0: [], 1: []}

    def pod(i: int) -> None:
        while not codes[i] or codes[i][-1] not in (0, 2, 3):
            process = start(tmp_path, settings, *together, f"--process_id={i}", "--cpu_devices=2")
            first.setdefault(i, process)
            process.communicate(timeout=300)
            codes[i].append(process.returncode)

    pods = [threading.Thread(target=pod, args=(i,)) for i in range(2)]
    for each in pods:
        each.start()
    while not (tmp_path / "metrics.jsonl").exists() or len(metrics(tmp_path)) < 20:
        time.sleep(0.1)
    first[1].kill()
    for each in pods:
        each.join()
    assert codes[1][0] == -signal.SIGKILL and codes[0][0] == 75
    assert codes[0][-1] == codes[1][-1] == 0
    steps = [line["step"] for line in metrics(tmp_path)]
    assert steps == sorted(set(steps)) and steps[-1] == 600


# ---------------------------------------------------------------------------- sae-jax launch


def command(capsys, *argv: str) -> tuple[int, str, str]:
    code = cli.main(["launch", *argv])
    return code, *capsys.readouterr()


def test_every_script_can_be_copied(tmp_path, capsys):
    for name in ("local", "slurm", "tpu_vm", "kubernetes"):
        code, out, _ = command(capsys, f"--copy={name}", f"--out={tmp_path}")
        assert code == 0 and str(tmp_path / "README.md") in out.splitlines()
    copies = [path for path in tmp_path.rglob("*") if path.is_file()]
    files = [path for path in FILES if path.suffix != ".pyc"]
    assert sorted(path.relative_to(tmp_path) for path in copies) == [
        path.relative_to(LAUNCH) for path in files
    ]
    for path in files:
        copy = tmp_path / path.relative_to(LAUNCH)
        assert copy.read_bytes() == path.read_bytes()
        assert copy.stat().st_mode == path.stat().st_mode


def test_a_file_that_is_there_is_never_written_over(tmp_path, capsys):
    for name in ("kubernetes", "kubernetes"):  # the second finds all that it would write
        assert command(capsys, f"--copy={name}", f"--out={tmp_path}")[0] == 0
    (tmp_path / "Containerfile").unlink()
    (tmp_path / "kubernetes" / "tpu.yaml").write_text("mine")
    code, _, err = command(capsys, "--copy=kubernetes", f"--out={tmp_path}")
    assert code == 2 and err.count("\n") == 1
    assert "tpu.yaml is there and differs" in err
    assert (tmp_path / "kubernetes" / "tpu.yaml").read_text() == "mine"
    assert not (tmp_path / "Containerfile").exists()


@pytest.mark.parametrize(
    "argv,words",
    [
        (["--copy=slrum"], ["'slrum'", "'slurm'"]),
        (["slurm"], ["'slurm'", "--name=value"]),
        (["--copy=slurm", "--out=s3://bucket/launch"], ["s3://bucket/launch", "this machine"]),
        (["--copy=slurm", "--out={}/file"], ["file"]),
    ],
)
def test_a_wrong_launch_is_one_line_and_code_2(tmp_path, capsys, argv, words):
    (tmp_path / "file").touch()
    code, _, err = command(capsys, *[text.format(tmp_path) for text in argv])
    assert code == 2 and err.count("\n") == 1
    for word in words:
        assert word in err


def test_without_a_name_it_lists_them(capsys):
    code, out, _ = command(capsys)
    assert code == 0
    for path in FILES:
        if path.suffix in (".py", ".sh", ".sbatch"):
            assert path.name in out


# --------------------------------------------------------------------------------- what is written


def checked_by(program: str, *arguments) -> None:
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    if not shutil.which(program, path=path):
        pytest.skip(f"{program} is not installed ([test-launch])")
    command = [shutil.which(program, path=path), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_shell_scripts():
    scripts = [path for path in FILES if path.suffix in (".sh", ".sbatch")]
    assert len(scripts) == 2
    checked_by("shellcheck", *scripts, ROOT / ".ci" / "run")


def test_containerfile():
    checked_by("hadolint", LAUNCH / "Containerfile")


def parse(argv: list[str]) -> None:
    """As `sae-jax` does, up to where it would begin."""
    name, *rest = argv
    assert name in cli.COMMANDS
    values = flags.FlagValues()
    importlib.import_module(f"sae_jax.cli.{name}").define(values)
    overrides, others = cli._split_overrides(rest)
    assert values([name, *others])[1:] == []
    config.override(config.load_file(values.config), overrides)


def commands(path: pathlib.Path) -> list[list[str]]:
    """The sae-jax commands in a file's examples that are written out in full."""
    text = re.sub(r"\\\n#?", " ", path.read_text())
    launcher = r"^#? *\S.*(?:local\.py .* --|slurm\.sbatch|tpu_vm\.sh \w+) (\w+ .*)$"
    found = re.findall(launcher, text, re.MULTILINE)
    return [shlex.split(line) for line in found if not line.endswith("...")]


def test_the_commands_here_are_commands_of_the_program(monkeypatch):
    monkeypatch.chdir(ROOT)  # for --config=experiments/FILE.py
    here, there = commands(LAUNCH / "README.md"), commands(ROOT / "README.md")
    assert (len(here), len(there)) == (4, 3)
    manifests = [job(name)["spec"]["template"]["spec"]["containers"][0] for name in MANIFESTS]
    for argv in [*here, *there, *(container["args"] for container in manifests)]:
        parse(argv)


def test_readme_names_every_file():
    readme = (LAUNCH / "README.md").read_text()
    unnamed = [path.name for path in FILES if path.name != "README.md" and path.name not in readme]
    assert not [name for name in unnamed if not name.endswith(".pyc")]
