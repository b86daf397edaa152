"""What XLA makes of a training step for a GPU that is not there, read from the program's text."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from sae_jax.config import Config, DataConfig, MeshConfig, TrainConfig
from sae_jax.ops.sharding import BATCH
from sae_jax.plan.absent_gpus import COMPILER_OPTIONS, absent_gpus, installed
from sae_jax.plan.estimate import resolve
from sae_jax.plan.hlo import Program
from sae_jax.plan.operations import bytes_of, operations_of
from sae_jax.sae import TopKConfig
from sae_jax.train.mesh import make_mesh
from sae_jax.train.step import Trainer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not installed(), reason="needs JAX's CUDA plugin"),
]
D, N, K, AUX_K, B = 256, 8192, 64, 128, 512
_SORT = r"= \(?\w+\[([\d,]+)\][^=]* sort\("  # in a fusion, too


@pytest.fixture(scope="module")
def step():
    sae = TopKConfig(d_in=D, d_sae=N, k=K, aux_k=AUX_K, compute_dtype="bfloat16")
    config = resolve(
        Config(
            sae=sae,
            data=DataConfig(batch_size=B),
            mesh=MeshConfig(run=1, data=1, model=1),
            train=TrainConfig(tokens=1000 * B),
        ),
        (D,),
    )
    mesh = make_mesh(config, absent_gpus("h200", 1))
    with jax.set_mesh(mesh):
        trainer = Trainer(config, steps=1000, variance=1.0)
        rows = jax.ShapeDtypeStruct((B, D), jnp.bfloat16, sharding=NamedSharding(mesh, BATCH))
        lowered = trainer.step.lower(trainer.abstract(), rows)
        return Program(lowered.compile(compiler_options=COMPILER_OPTIONS).as_text())


def of_opcode(program, opcode):
    """What an ordinary step, in which no latent is dead, executes of an opcode."""
    return [e for e in program.executions if e.times and e.instruction.opcode == opcode]


def test_no_loop_moves_a_parameter(step):
    """XLA once laid the carry of a loop out the other way around, and transposed it each time."""
    whole = re.compile(rf"\w+\[({N},{D}|{D},{N})\]")
    moved = [
        e.instruction.name
        for e in step.executions
        if e.looped
        and "scatter" not in e.instruction.name  # in place
        and whole.match(e.instruction.type)
        and re.search("transpose|copy|fusion", e.instruction.opcode)
    ]
    assert not moved


def test_long_rows_are_not_sorted(step):
    """What is sorted are the latents that were picked: those of a token by their values, and those
    of a batch by their numbers, once for both gradients. AuxK has its own, in two branches."""
    shapes = [tuple(map(int, shape.split(","))) for shape in re.findall(_SORT, step.text)]
    assert Counter(shapes) == {(B, K): 1, (B, AUX_K): 1, (B * K,): 1, (B * AUX_K,): 2}


def test_rows_are_summed_without_a_scatter(step):
    """The scatters that are left are of numbers: of the bias, of what fired, of products."""
    scattered = [e.instruction.type for e in of_opcode(step, "scatter")]
    scattered += [
        e.instruction.type for e in of_opcode(step, "fusion") if "scatter" in e.instruction.name
    ]
    assert not [type_ for type_ in scattered if re.match(rf"\w+\[\d+,{D}\]", type_)]


def test_bytes_are_those_of_the_table(step):
    """Within a tenth, as plan's reader counts them; no latent is dead."""
    assert bytes_of(operations_of(step, None)) == pytest.approx(0.416e9, rel=0.1)
