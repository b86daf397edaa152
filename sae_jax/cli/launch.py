"""Copies scripts that run a command on many hosts: `sae-jax launch`."""

import pathlib
import shutil

from absl import flags

from sae_jax import paths
from sae_jax.errors import UserError, choose

SUMMARY = """Copy a script that runs one command on many hosts; without --copy, list them.

  sae-jax launch --copy=slurm              copies launch/slurm.sbatch and launch/README.md
  sae-jax launch --copy=kubernetes --out=cluster

  local        local.py: several processes on this machine, as if each were a host
  slurm        slurm.sbatch: one program on many nodes, or an array of sweep workers
  tpu_vm       tpu_vm.sh: one program on a slice of Google Cloud TPU VMs, spot or not
  kubernetes   Containerfile, kubernetes/*.yaml: GPU hosts, TPU slices, workers of a sweep

Each passes one `sae-jax` command through to all its processes, and starts it again where that
helps. README.md has the commands, and what happens when a host is taken away. The copies are yours
to change. A file of yours is never written over: one that is there as it would be copied is left,
and one that differs is a mistake, exit code 2, before anything is copied.
"""

_FOLDER = pathlib.Path(__file__).parents[1] / "launch_scripts"  # a link to launch/, or a copy of it
_FILES = {
    "local": ("local.py",),
    "slurm": ("slurm.sbatch",),
    "tpu_vm": ("tpu_vm.sh",),
    "kubernetes": (
        "Containerfile",
        "kubernetes/gpu.yaml",
        "kubernetes/sweep.yaml",
        "kubernetes/tpu.yaml",
    ),
}


def define(values: flags.FlagValues) -> None:
    """Defines the flags of `sae-jax launch`."""
    flags.DEFINE_string("copy", None, f"Which: {', '.join(_FILES)}.", flag_values=values)
    flags.DEFINE_string(
        "out", "launch", "Directory for the copies, made if absent.", flag_values=values
    )


def run(args: flags.FlagValues, overrides: dict[str, str]) -> None:
    """Copies the scripts that --copy names, or lists all."""
    if not args.copy:
        print(SUMMARY.strip())
        return
    files = (*_FILES[choose(args.copy, _FILES, "--copy")], "README.md")
    if not args.out:
        raise UserError("--out is empty; it is the directory for the copies")
    out = paths.local(args.out)
    for name in files:
        _check(_FOLDER / name, out / name)
    for name in files:
        if not (out / name).exists():
            _copy(_FOLDER / name, out / name)
        print(out / name)


def _check(source: pathlib.Path, target: pathlib.Path) -> None:
    """Raises UserError if something other than a copy of `source` is at `target`."""
    if not target.exists():
        return
    if not target.is_file() or target.read_bytes() != source.read_bytes():
        raise UserError(f"{target} is there and differs; move it away, or give another --out")


def _copy(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies a file with its permissions, all of it or nothing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.tmp")
    shutil.copy(source, temporary)
    temporary.replace(target)
