"""What the tests of training share: a small store, a config for it, and ways to look at a run."""

import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import jax
import numpy as np

from sae_jax.activations import write_store
from sae_jax.config import Config, DataConfig, MeshConfig, TrainConfig
from sae_jax.sae import ARCHITECTURES, by_name
from sae_jax.train.checkpoints import Checkpoints

WIDTH, BATCH = 16, 64


def sparse_rows(count: int, seed: int = 0, width: int = WIDTH) -> np.ndarray:
    """Sums of a few of 40 directions, off-centre: (count, width) float32. The directions are
    the same for every seed."""
    directions = np.random.default_rng(0).normal(size=(40, width))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    rng = np.random.default_rng(seed)
    amounts = rng.exponential(size=(count, 40)) * (rng.random((count, 40)) < 0.1)
    return (amounts @ directions + 0.3).astype(np.float32)


def make_store(path: pathlib.Path, rows: np.ndarray | None = None) -> str:
    write_store(path, [sparse_rows(8192) if rows is None else rows], context_length=8)
    return str(path)


def make_config(store: str, architecture: str = "topk", steps: int = 50, **sections) -> Config:
    """A run of a second: 128 latents, batches of 64 tokens, latents dead after 2 batches and
    revived by AuxK. Keyword sections replace fields: train={"log_every": 5}."""
    picks = ARCHITECTURES[architecture].Config.k is not None
    config = Config(
        sae=by_name(architecture).Config(
            d_sae=128,
            **({"k": 2} if picks else {"sparsity_coefficient": 20.0}),
            aux_coefficient=1 / 32,
            dead_after_tokens=2 * BATCH,
        ),
        data=DataConfig(store=store, batch_size=BATCH, virtual_shards=8, window_rows=1024),
        train=TrainConfig(
            tokens=steps * BATCH, log_every=1, checkpoint_every=steps, keep_trunk=False
        ),
        mesh=MeshConfig(data=1, model=1),
    )
    for name, fields in sections.items():
        section = dataclasses.replace(getattr(config, name), **fields)
        config = dataclasses.replace(config, **{name: section})
    return config


def metrics(run: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def saved_arrays(run: pathlib.Path) -> dict[str, np.ndarray]:
    """Everything in the latest checkpoint of a run, by path."""
    from orbax.checkpoint import v1 as ocp

    checkpoints = Checkpoints(run, keep=2)
    step = checkpoints.latest_step
    checkpoints.close()
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.training.Checkpointer((run / "checkpoints").absolute()) as checkpointer:
        like = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
            checkpointer.metadata().metadata,
        )
        state = checkpointer.load(abstract_state=like)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    arrays = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    return arrays | {"step of the folder": np.asarray(step)}


def assert_same_arrays(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def command(workdir: pathlib.Path, config: Config, *flags: str) -> list[str]:
    """The command line that trains `config` in `workdir`."""
    fields = [
        f"--config.{section}.{name}={value}"
        for section, values in dataclasses.asdict(config).items()
        for name, value in values.items()
    ]
    program = [sys.executable, "-m", "sae_jax", "train", f"--workdir={workdir}"]
    return [*program, *fields, *flags]


def start(
    workdir: pathlib.Path, config: Config, *flags: str, environment: dict | None = None
) -> subprocess.Popen:
    return launch(command(workdir, config, *flags), environment)


def launch(arguments: list[str], environment: dict | None = None) -> subprocess.Popen:
    """A process of this checkout, on the CPU."""
    root = str(pathlib.Path(__file__).parents[1])
    return subprocess.Popen(
        arguments,
        env=os.environ | {"PYTHONPATH": root, "JAX_PLATFORMS": "cpu"} | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def together(count: int, devices: int = 1) -> list[list[str]]:
    """The flags of each of `count` processes that are one program."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = [f"--coordinator=localhost:{port}", f"--num_processes={count}"]
    flags.append(f"--cpu_devices={devices}")
    return [[*flags, f"--process_id={i}"] for i in range(count)]


def finish_all(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each."""
    out = [process.communicate(timeout=180) for process in processes]
    return [(p.returncode, *texts) for p, texts in zip(processes, out, strict=True)]


def run_to_end(workdir: pathlib.Path, config: Config, *flags: str) -> tuple[int, str, str]:
    process = start(workdir, config, *flags)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def wait_until(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    """Until `condition()` or the process has ended."""
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None:
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.002)


def logged_step(run: pathlib.Path) -> int:
    """The last step in metrics.jsonl, 0 before there is one."""
    try:
        lines = (run / "metrics.jsonl").read_bytes().rpartition(b"\n")[0].splitlines()
    except FileNotFoundError:
        return 0
    return int(lines[-1].split(b",")[0].split(b":")[1]) if lines else 0


def assert_each_step_once(run: pathlib.Path, steps: int, every: int) -> None:
    """Regular lines; a step at which the run was stopped may have one besides."""
    got = [line["step"] for line in metrics(run)]
    assert got == sorted(set(got))
    assert set(range(every, steps + 1, every)) <= set(got)
