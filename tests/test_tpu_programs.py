"""What XLA makes of a training step for TPUs that are not there, read from the program's text."""

import importlib.util
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from sae_jax.config import Config, DataConfig, MeshConfig, TrainConfig
from sae_jax.ops.sharding import BATCH
from sae_jax.plan import chips
from sae_jax.plan.estimate import resolve
from sae_jax.plan.flops import matmul_flops
from sae_jax.plan.hlo import Program
from sae_jax.sae import TopKConfig
from sae_jax.train.mesh import make_mesh
from sae_jax.train.step import Trainer

pytestmark = [
    pytest.mark.long,  # compiling takes a minute of CPU
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the [tpu] extra"),
]
D, N, K, B = 1024, 8192, 64, 1024  # of each of four devices N latents and B tokens


@pytest.fixture(scope="module")
def step():
    config = Config(
        sae=TopKConfig(
            d_in=D,
            d_sae=2 * N,
            k=K,
            compute_dtype="bfloat16",
            aux_coefficient=0.0,
        ),
        data=DataConfig(batch_size=2 * B),
        mesh=MeshConfig(run=1, data=2, model=2),
        train=TrainConfig(tokens=2000 * B),
    )
    config = resolve(config, (D,))
    mesh = make_mesh(config, chips.find("v5p:2x2x1").devices)
    with jax.set_mesh(mesh):
        trainer = Trainer(config, steps=1000, variance=1.0)
        rows = jax.ShapeDtypeStruct((2 * B, D), jnp.bfloat16, sharding=NamedSharding(mesh, BATCH))
        traced = trainer.step.trace(trainer.abstract(), rows)
        assert matmul_flops(traced.jaxpr.jaxpr, mesh)["bfloat16"] == 2 * B * D * N
        return Program(traced.lower().compile().as_text())


def of_kind(program, pattern):
    """Returns what the program executes of instructions of an opcode, and fusions named so."""
    return [
        e.instruction
        for e in program.executions
        if re.match(pattern, e.instruction.opcode)
        or (e.instruction.opcode == "fusion" and re.match(pattern, e.instruction.name))
    ]


def sizes(instruction):
    """Returns the sizes of the first array of an instruction's result."""
    found = re.search(r"\[([\d,]*)\]", instruction.type).group(1)
    return tuple(int(n) for n in found.split(",") if n)


def test_parameters_are_not_laid_out_anew(step):
    """But for the decoder's rows, once, each of which then lies by itself to be fetched."""
    moved = [e for e in step.executions if e.instruction.opcode in ("transpose", "copy")]
    large = [e for e in moved if math.prod(sizes(e.instruction)) >= N * D]
    assert [e.looped for e in large] == [False]


def test_preactivations_are_not_written(step):
    """In the forward pass; the gradient of the encoder has their shape here."""
    forward = [
        e.instruction
        for e in step.executions
        if "jvp()" in e.instruction.rest and "transpose(jvp" not in e.instruction.rest
    ]
    assert forward
    assert not [i.name for i in forward if f"f32[{B},{N}]" in i.type]


def test_kernels_and_what_is_left(step):
    """The picks are sorted by latent for either gradient, and their products back by token; XLA
    itself sorts what is added to numbers of latents, twice."""
    kernels = [i.name for i in of_kind(step, "custom-call") if "_bytes" in i.rest]
    assert sorted(name.split(".")[0] for name in kernels) == [
        "encode_bin_maxima",
        "row_sums",
        "row_sums",
        "row_sums_and_products",
    ]
    assert [sizes(i) for i in of_kind(step, "sort")].count((B * K,)) == 5
    assert not [i.name for i in of_kind(step, ".*scatter") if sizes(i) == (N, D)]


def test_collectives(step):
    found = {}
    for collective in step.traffic.collectives:
        found[collective.kind] = found.get(collective.kind, 0) + collective.times
    assert found == {"all-gather": 1, "all-reduce": 6}


def test_bytes(step):
    assert step.traffic.memory_bytes / 1e9 == pytest.approx(2.087, rel=0.1)
