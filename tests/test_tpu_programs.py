"""What XLA makes of a training step for TPUs that are not there, read from the program's text."""

import importlib.util
import math
import re
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from sae_jax.config import Config, DataConfig, MeshConfig, TrainConfig
from sae_jax.ops import dense, tpu_encoder
from sae_jax.ops.sharding import BATCH
from sae_jax.plan import chips
from sae_jax.plan.estimate import resolve
from sae_jax.plan.hlo import Program
from sae_jax.plan.operations import bytes_of, collectives_of, flops_of, operations_of
from sae_jax.plan.traced import read
from sae_jax.sae import ReLUConfig, TopKConfig
from sae_jax.train.mesh import make_mesh
from sae_jax.train.step import Trainer

pytestmark = [
    pytest.mark.slow,  # compiling takes 20 s of CPU
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the [tpu] extra"),
]
B = 512  # tokens of each of four devices
D, N, K = 1024, 2048, 4  # N are the latents of a device
DENSE_D, DENSE_N, BLOCK = 256, 4096, 1024  # the same of a dense step, and the latents of a block


def compiled(sae):
    """Returns the step of an SAE's config on a 2 x 2 mesh, as the program that a TPU would run."""
    config = Config(
        sae=sae,
        data=DataConfig(batch_size=2 * B),
        mesh=MeshConfig(run=1, data=2, model=2),
        train=TrainConfig(tokens=2000 * B),
    )
    d, n = sae.d_in, sae.d_sae // 2
    config = resolve(config, (d,))
    mesh = make_mesh(config, chips.find("v5p:2x2x1").devices)
    # "highest" is what the command line sets.
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        trainer = Trainer(config, steps=1000, variance=1.0)
        rows = jax.ShapeDtypeStruct((2 * B, d), jnp.bfloat16, sharding=NamedSharding(mesh, BATCH))
        traced = trainer.step.trace(trainer.abstract(), rows)
        products = 1 if sae.architecture == "topk" else 5
        work = read(traced.jaxpr.jaxpr, mesh).operations
        assert flops_of(work)["bfloat16"] == 2 * products * B * d * n
        return Program(traced.lower().compile().as_text())


@pytest.fixture(scope="module")
def step():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tpu_encoder, "_COLUMNS", 256)  # smaller programs compile sooner
        return compiled(
            TopKConfig(d_in=D, d_sae=2 * N, k=K, compute_dtype="bfloat16", aux_coefficient=0.0)
        )


@pytest.fixture(scope="module")
def dense_step():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense, "_BLOCK", BLOCK)
        return compiled(ReLUConfig(d_in=DENSE_D, d_sae=2 * DENSE_N, compute_dtype="bfloat16"))


def of_kind(program, pattern):
    """Returns what the program executes of instructions of an opcode, and fusions named so."""
    return [
        e.instruction
        for e in program.executions
        if re.match(pattern, e.instruction.opcode)
        or (e.instruction.opcode == "fusion" and re.match(pattern, e.instruction.name))
    ]


def large(program, least, *opcodes):
    """Returns the executions of opcodes whose results have at least so many elements."""
    mine = [e for e in program.executions if e.instruction.opcode in opcodes]
    return [e for e in mine if math.prod(sizes(e.instruction)) >= least]


def sizes(instruction):
    """Returns the sizes of the first array of an instruction's result."""
    found = re.search(r"\[([\d,]*)\]", instruction.type).group(1)
    return tuple(int(n) for n in found.split(",") if n)


def test_parameters_are_not_laid_out_anew(step):
    """But for the decoder's rows, once, each of which then lies by itself to be fetched."""
    assert [e.looped for e in large(step, N * D, "transpose", "copy")] == [False]


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


def test_parameters_of_a_dense_step_stay_where_they_are(dense_step):
    """Nothing is laid out anew, or filled with zeros before its blocks are written, and the encoder
    is converted where products read it."""
    moved = "transpose", "copy", "broadcast", "convert"
    assert not [e.instruction.name for e in large(dense_step, DENSE_N * DENSE_D, *moved)]
    types = [e.instruction.type for e in dense_step.executions]
    assert not [t for t in types if f"bf16[{DENSE_D},{DENSE_N}]" in t]


def test_products_of_a_dense_step_are_kept_in_half_precision(dense_step):
    types = [e.instruction.type for e in dense_step.executions]
    whole = f"{DENSE_N // BLOCK},{B},{BLOCK}"
    assert any(f"bf16[{whole}]" in t for t in types)
    assert not [t for t in types if f"f32[{whole}]" in t or f"f32[{B},{DENSE_N}]" in t]


def test_collectives(step, dense_step):
    def counts(program):
        found = Counter()
        for collective in collectives_of(operations_of(program, None)):
            found[collective.kind] += collective.times
        return found

    assert counts(step) == {"all-gather": 1, "all-reduce": 6}
    assert counts(dense_step) == {"all-reduce": 3}


def test_bytes(step, dense_step):
    for program, gigabytes in ((step, 0.351), (dense_step, 0.171)):
        moved = bytes_of(operations_of(program, None))
        assert moved / 1e9 == pytest.approx(gigabytes, rel=0.1)
