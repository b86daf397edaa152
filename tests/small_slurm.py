"""A Slurm of two nodes on this machine, with its own key, ports and files: nothing of the system's
is touched. Needs munged, slurmctld and slurmd (Debian: slurm-wlm, munge)."""

import contextlib
import getpass
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time

_PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"
MISSING = [name for name in ("munged", "slurmctld", "slurmd") if not shutil.which(name, path=_PATH)]


@contextlib.contextmanager
def cluster():
    """Yields the environment in which sbatch, squeue and scontrol speak to it."""
    place = pathlib.Path(tempfile.mkdtemp(prefix="slurm"))  # short: sockets' paths are limited
    place.chmod(0o711)  # munged asks for it
    daemons = []

    def daemon(*command: str) -> None:
        with (place / f"{len(daemons)}.{command[0]}.out").open("w") as out:
            daemons.append(
                subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
            )

    host = socket.gethostname().split(".")[0]
    nodes = [host, f"{host}-b"]  # the first one's name must resolve: JAX's coordinator is there
    environment = os.environ | {"SLURM_CONF": str(place / "slurm.conf"), "PATH": _PATH}
    (place / "slurm.conf").write_text(_configuration(place, host, nodes))
    (place / "state").mkdir()
    (place / "munge.key").write_bytes(os.urandom(128))
    (place / "munge.key").chmod(0o600)
    files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid"}
    files |= {"log-file": "munged.log", "seed-file": "munged.seed"}
    try:
        daemon("munged", "--foreground", *(f"--{k}={place / v}" for k, v in files.items()))
        _wait(lambda: (place / "munge.socket").exists(), "munged", place)
        daemon("slurmctld", "-D")
        for node in nodes:
            daemon("slurmd", "-D", "-N", node)
        idle = ["sinfo", "--noheader", "--format=%T %D"]
        _wait(lambda: _output(idle, environment) == "idle 2", "two idle nodes", place)
        yield environment
        # Jobs that a failed test leaves; a job's processes would outlive the daemons.
        _output(["scancel", f"--user={getpass.getuser()}"], environment)
        _wait(lambda: not _output(["squeue", "--noheader"], environment), "end of jobs", place)
    finally:
        for process in reversed(daemons):
            process.send_signal(signal.SIGTERM)
        for process in daemons:
            process.wait(timeout=30)
        shutil.rmtree(place)


def _configuration(place: pathlib.Path, host: str, nodes: list[str]) -> str:
    ports = []
    for _ in range(3):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            ports.append(free.getsockname()[1])
    # JAX makes its port of the job's number, which is therefore not everybody's 1. A job that was
    # put back into the queue waits for cred_expire seconds; 5 is the least.
    return f"""
ClusterName=small
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={getpass.getuser()}
SlurmdUser={getpass.getuser()}
AuthType=auth/munge
AuthInfo=socket={place}/munge.socket,cred_expire=5
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/%n
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
FirstJobId={random.SystemRandom().randrange(1, 4000)}
SchedulerParameters=sched_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
KillWait=20
NodeName={",".join(nodes)} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]},{ports[2]} CPUs=4
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def _output(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _wait(condition, what: str, place: pathlib.Path) -> None:
    end = time.monotonic() + 30
    while not condition():
        if time.monotonic() > end:
            logs = "\n".join(f"{p.name}: {p.read_text()[-500:]}" for p in place.glob("*.out"))
            raise TimeoutError(f"no {what} in 30 s\n{logs}")
        time.sleep(0.05)
