"""`sae-jax plan`: what it says against what is there."""

import dataclasses
import json
import math
import os
import pathlib
import re
import subprocess
import sys
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sae_jax import config as configs
from sae_jax import lm
from sae_jax.activations import StoreWriter
from sae_jax.cli import main
from sae_jax.config import Config, DataConfig, MeshConfig
from sae_jax.errors import UserError
from sae_jax.ops.active import by_all_latents
from sae_jax.ops.sharding import BATCH
from sae_jax.plan import absent_gpus, chips, hlo, operations, search, sweep
from sae_jax.plan import harvest as harvests
from sae_jax.plan import traced as traced_program
from sae_jax.plan.estimate import Estimate, candidates, estimate, least_bytes, resolve, screen
from sae_jax.sae import by_name
from sae_jax.train.mesh import make_mesh
from sae_jax.train.step import Trainer

HERE = pathlib.Path(__file__).parent
CUDA = absent_gpus.installed()


def a_config(architecture="relu", batch=256, d_sae=2048, d_in=64, **mesh) -> Config:
    config = Config(
        sae=by_name(architecture).Config(d_sae=d_sae),
        data=DataConfig(batch_size=batch),
        mesh=MeshConfig(**{"data": 1, "model": 1} | mesh),
    )
    return resolve(config, (d_in,))


def cpus(count: int) -> chips.Topology:
    return chips.Topology(f"cpu:{count}", None, jax.devices()[:count], count)


def test_loops_slices_and_collectives_are_counted_as_often_as_they_run():
    """Five rounds on a mesh of 2 x 2: of a product of (8, 16) by a slice (16, 32) of five, summed
    over `model`; then one gathering over `data`."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), devices=jax.devices()[:4])

    def local(x, w):
        def body(total, w):
            return total + jax.lax.psum(x @ w, "model"), None

        total, _ = jax.lax.scan(body, jnp.zeros((8, 32)), w)
        return jax.lax.all_gather(total, "data", axis=0, tiled=True)

    with jax.set_mesh(mesh):
        specs = (P("data", "model"), P(None, "model", None))
        f = jax.jit(jax.shard_map(local, in_specs=specs, out_specs=P(None, None), check_vma=False))
        x = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=jax.NamedSharding(mesh, specs[0]))
        w = jax.ShapeDtypeStruct(
            (5, 32, 32), jnp.float32, sharding=jax.NamedSharding(mesh, specs[1])
        )
        traced = f.trace(x, w)
    compiled = operations.operations_of(hlo.Program(traced.lower().compile().as_text()), None)
    screened = traced_program.read(traced.jaxpr.jaxpr, mesh).operations
    each = 8 * 32 * 4
    slices = 5 * 16 * 32 * 4  # of w; each once, not the whole w five times
    for work in (compiled, screened):
        assert operations.flops_of(work) == {"float32": 5 * 2 * 8 * 16 * 32}
        assert [o.times for o in work if o.flops] == [5]
        found = operations.collectives_of(work)
        assert {(c.kind, c.group, c.bytes, c.times): c.sent for c in found} == {
            ("all-reduce", (0, 1), each, 5): 5 * each,
            ("all-gather", (0, 2), 2 * each, 1): each,
        }
        assert slices < operations.bytes_of(work) < 3 * slices + 5 * 12 * each


# The third file is another package's, in an environment in a checkout of this one.
OPERATIONS = """HloModule step

FileNames
1 "PACKAGE/ops/sharding.py"
2 "PACKAGE/sae/topk.py"
3 "/home/me/sae_jax/.venv/lib/optax/update.py"

FileLocations
1 {file_name_id=1 function_name_id=1 line=111 end_line=111 column=11 end_column=12}
2 {file_name_id=2 function_name_id=2 line=86 end_line=86 column=11 end_column=12}
3 {file_name_id=3 function_name_id=3 line=33 end_line=33 column=11 end_column=12}

StackFrames
1 {file_location_id=2 parent_frame_id=1}
2 {file_location_id=1 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=3}

%rows (table: f32[4,16], picks: s32[1000,1]) -> f32[1000,16] {
  %table = f32[4,16]{1,0} parameter(0)
  %picks = s32[1000,1]{1,0} parameter(1)
  ROOT %gather = f32[1000,16]{1,0} gather(%table, %picks), offset_dims={1}
}

%body (carry: (s32[], bf16[8,16], bf16[16,32])) -> (s32[], bf16[8,16], bf16[16,32]) {
  %carry = (s32[], bf16[8,16], bf16[16,32]) parameter(0)
  %x = bf16[8,16]{1,0} get-tuple-element(%carry), index=1
  %w = bf16[16,32]{1,0} get-tuple-element(%carry), index=2
  %dot = f32[8,32]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}, \
metadata={op_name="jit(step)/transpose(jvp())/while/body/dot_general" stack_frame_id=3}
}

%condition (carry: (s32[], bf16[8,16], bf16[16,32])) -> pred[] {
  %carry = (s32[], bf16[8,16], bf16[16,32]) parameter(0)
}

%none (p: f32[4,16]) -> f32[4,16] {
  ROOT %p = f32[4,16]{1,0} parameter(0)
}

%some (p: f32[4,16]) -> f32[4,16] {
  %p = f32[4,16]{1,0} parameter(0)
  ROOT %negate = f32[4,16]{1,0} negate(%p)
}

ENTRY %main (a: f32[4,16], b: s32[1000,1], x: f32[16,8], y: f32[8,32]) -> f32[1000,16] {
  %a = f32[4,16]{1,0} parameter(0)
  %b = s32[1000,1]{1,0} parameter(1)
  %x = f32[16,8]{1,0} parameter(2)
  %y = f32[8,32]{1,0} parameter(3)
  %room = f32[4096]{0} custom-call(), custom_call_target="AllocateBuffer"
  %loop = (s32[], bf16[8,16], bf16[16,32]) while(%t), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
  %dead = f32[4,16]{1,0} conditional(%p, %a, %a), true_computation=%some, false_computation=%none
  %product = f32[16,32]{1,0} convolution(%x, %y), dim_labels=bf_io->bf, \
backend_config={"estimated_cycles":"700"}
  ROOT %taken = f32[1000,16]{1,0} fusion(%a, %b), kind=kLoop, calls=%rows
}
""".replace("PACKAGE", str(pathlib.Path(chips.__file__).parents[1]))


def test_a_step_is_the_sum_of_its_operations():
    """Of a chip of 1,024 bfloat16 FLOP/s, 512 float32, 4,096 bytes/s and 100 cycles/s."""
    chip = chips.Chip("chip", 1024, 512, 1e9, 4096, math.inf, math.inf, clock=100)
    topology = chips.Topology("chip:1", chip, [None], 1)
    work = operations.operations_of(hlo.Program(OPERATIONS), chip.clock)
    found = {o.name: (o.times, o.words, o.seconds(topology)) for o in work if o.bytes}
    assert found == {
        "dot": (5, "dot_general backward, sae/topk.py:86", 5 * 2 * 8 * 16 * 32 / 1024),
        "product": (1, "convolution", 2 * 16 * 8 * 32 / 512),
        # A row for each pick, although there are but four; the picks; and what is written.
        "taken": (1, "fusion", 4 * (1000 * 16 + 1000 + 1000 * 16) / 4096),
    }
    assert (
        sum(o.compiler_seconds(topology) for o in work) == found["dot"][2] + 7 + found["taken"][2]
    )


def test_the_tracer_counts_what_is_kept_and_passes_over_what_nobody_asks_for():
    """Of x (64, 32): x @ w is read twice, once fused; a product that nothing needs is none."""
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])

    @jax.jit
    def inner(x, w):
        return jnp.exp(x @ w), jnp.sin(x @ w.T)

    def f(x, w):
        wanted, _ = inner(x, w)
        return wanted.sum(axis=0)

    with jax.set_mesh(mesh):
        traced = jax.jit(f).trace(jnp.zeros((64, 32)), jnp.zeros((32, 32)))
    work = traced_program.read(traced.jaxpr.jaxpr, mesh)
    x, w, out = 4 * 64 * 32, 4 * 32 * 32, 4 * 32
    assert operations.bytes_of(work.operations) == (x + w + x) + (x + out)
    assert work.temporary_bytes == x + out


@pytest.mark.parametrize(
    "text,group",
    [
        ("replica_groups={{0,2},{1,3}}, more", (0, 2)),
        ("source_target_pairs={{0,3},{3,0}}", (0, 3)),
        ("replica_groups=[2,4]<=[8], use_global_device_ids=true", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=3] {'b'}, channel_id=1", (0, 1, 2)),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", (0, 4)),
    ],
)
def test_replica_groups_as_xla_prints_them(text, group):
    assert hlo.parse_group(text) == group


def test_replica_groups_in_an_unknown_print_are_the_users_to_mend():
    with pytest.raises(UserError, match=r"'x'.*another version of jax"):
        hlo.parse_group(", replica_groups={'x'}")


@pytest.mark.parametrize(
    "mesh", [pytest.param((1, 4, False), marks=pytest.mark.slow), (2, 2, True)], ids=str
)
@pytest.mark.slow
def test_bytes_are_those_of_the_live_arrays(mesh):
    data, model, zero = mesh
    config = a_config(data=data, model=model, zero=zero)
    predicted = estimate(config, cpus(4))
    with jax.set_mesh(make_mesh(config)):
        trainer = Trainer(config, 10, 1.0)
        state = trainer.init(np.zeros(64, np.float32), 1.0)
        rows = jax.device_put(np.zeros((256, 64), jnp.bfloat16), BATCH)
        state, metrics = trainer.step(state, rows)
    device = jax.devices()[3]

    def held(tree) -> int:
        shards = [s for a in jax.tree.leaves(tree) for s in a.addressable_shards]
        return sum(s.data.nbytes for s in shards if s.device == device)

    assert predicted.bytes["parameters"] == held(state.parameters)
    assert predicted.bytes["optimizer"] == held(state.optimizer)
    assert predicted.bytes["batch"] == held(rows)
    whole = sum(predicted.bytes[n] for n in ("parameters", "optimizer", "counters"))
    assert whole == held(state)
    assert predicted.total >= least_bytes(config)


@pytest.mark.parametrize("architecture", ["relu", pytest.param("topk", marks=pytest.mark.slow)])
def test_flops_are_those_of_xla(architecture):
    """Where no loop hides any from XLA's own count, which takes a loop's body once: one block, one
    slice, all latents of a dense family, and no AuxK, which counts for nothing."""
    config = a_config(architecture, batch=128, d_sae=1024, d_in=128)
    predicted = estimate(config, cpus(1))
    plain = dataclasses.replace(config, sae=dataclasses.replace(config.sae, aux_coefficient=0.0))
    with jax.set_mesh(make_mesh(plain, jax.devices()[:1])), by_all_latents():
        trainer = Trainer(plain, 10, 1.0)
        rows = jax.device_put(np.zeros((128, 128), jnp.bfloat16), BATCH)
        compiled = trainer.step.lower(trainer.abstract(), rows).compile()
    counted = compiled.cost_analysis()["flops"]
    elementwise = 40 * 2 * 128 * 1024 + 40 * 128 * 1024  # the update's and the activations'
    assert predicted.flops.total() <= counted <= predicted.flops.total() + elementwise
    products, picked = {"relu": (5, 0), "topk": (1, 32)}[architecture]
    expected = products * 2 * 128 * 1024 * 128 + 2 * 128 * picked * 128
    assert predicted.flops["float32"] == pytest.approx(expected, rel=0.01)


def test_candidates_divide_what_they_shard():
    config = a_config(batch=6, d_sae=48)
    meshes = [(c.mesh.data, c.mesh.model, c.mesh.zero) for c in candidates(config, 12)]
    assert meshes == [
        (6, 2, False), (6, 2, True), (3, 4, False), (3, 4, True), (2, 6, False), (2, 6, True),
        (1, 12, False),
    ]  # fmt: skip


def test_rings_between_nodes_share_the_nodes_links():
    topology = chips.Topology("h100:2x4", chips.CHIPS["h100"], [None] * 8, per_node=4)
    assert topology.link_rate((0, 1, 2, 3)) == 450e9
    assert topology.link_rate((0, 4)) == 50e9
    assert topology.link_rate(tuple(range(8))) == 200e9


@pytest.mark.parametrize("name", ["v9:4x4", "h100", "h100:8x", "h100:2x2x2"])
def test_unknown_topologies_are_named(name):
    with pytest.raises(UserError, match=name):
        chips.find(name)


# ------------------------------------------------------------- searches, sweeps and harvests


def an_estimate(config: Config, topology, seconds: float, total: int, compiled: bool) -> Estimate:
    """One whose step takes so many seconds of products and bytes of memory."""
    flops = Counter(float32=seconds * topology.chip.float32)
    sizes, work = {"temporaries": total}, (operations.Operation(0, flops=flops),)
    return Estimate(config, topology, {}, sizes, total, flops, work, compiled)


@pytest.mark.parametrize("seed", range(5))
def test_a_search_finds_what_brute_force_finds(monkeypatch, seed):
    """The compiled estimates are 1 to 1.1 times (traced times 1.5): more meshes are compiled only
    where they could be better, and those that do not fit are passed over."""
    rng = np.random.default_rng(seed)
    topology = chips.describe("h100:2x8")
    tried = search.variants(a_config(d_sae=4096, batch=4096), 16, [4096, 8192])
    assert len(tried) == 18
    traced = {config: (rng.uniform(1, 5), rng.uniform(1e10, 9e10)) for config in tried}
    real = {c: tuple(v * rng.uniform(1.5, 1.65) for v in traced[c]) for c in tried}
    compiled = []

    def compile_(config, topology):
        compiled.append(config)
        return an_estimate(config, topology, *real[config], compiled=True)

    monkeypatch.setattr(search, "estimate", compile_)
    monkeypatch.setattr(
        search, "screen", lambda c, t: an_estimate(c, t, *traced[c], compiled=False)
    )
    found = search.search(tried, topology, most=len(tried))
    fits = [c for c in tried if real[c][1] <= topology.capacity]
    assert found.fastest.config == min(fits, key=lambda c: real[c][0] / c.data.batch_size)
    assert found.least_memory.config == min(fits, key=lambda c: real[c][1])
    assert len(compiled) == len(set(compiled)) < len(tried)
    few = search.search(tried, topology, most=1)
    assert few.fastest.compiled and few.fastest.fits
    none = search.search(tried, topology, most=0)
    assert not none.fastest.compiled and not none.compiled


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["relu", "topk"])
def test_traced_and_compiled_estimates_agree(architecture):
    config = a_config(architecture, 512, 4096, 128, data=2, model=2, zero=True)
    topology = chips.Topology("h100:1x4", chips.CHIPS["h100"], jax.devices()[:4], 4)
    traced, compiled = screen(config, topology), estimate(config, topology)
    assert traced.flops == compiled.flops
    assert traced.seconds["network"] == pytest.approx(compiled.seconds["network"], rel=0.02)
    assert 0.5 < traced.memory_bytes / compiled.memory_bytes < 1.5
    assert 0.25 < traced.total / compiled.total < 1.5


def test_a_sweep_takes_what_its_packs_take(monkeypatch):
    """A step takes d_sae microseconds. Packs of 3 runs: on a mesh with two groups each takes two
    rounds."""
    topology = dataclasses.replace(chips.describe("h100:1x4"), devices=jax.devices()[:4])
    monkeypatch.setattr(
        sweep,
        "screen",
        lambda config, part: dataclasses.replace(
            an_estimate(config, part, config.sae.d_sae * 1e-6, 0, compiled=False),
            bytes={"parameters": config.sae.d_sae, "optimizer": 2 * config.sae.d_sae,
                   "counters": 0, "batch": 7, "temporaries": 1000},
        ),
    )  # fmt: skip
    base = a_config("topk", 4096, 1024)
    fields = [{"sae.d_sae": d, "train.seed": seed} for d in (1024, 4096) for seed in range(3)]
    runs = [configs.assign(base, {**f, "train.tokens": 4096 * 100}) for f in fields]
    for groups, rounds in ((1, 3), (2, 2)):
        mesh = MeshConfig(run=groups, data=4 // groups, model=1)
        plan = sweep.plan(runs, topology, mesh, most=0)
        assert plan.hours * 3600 == pytest.approx(rounds * 100 * (1024 + 4096) * 1e-6)
        assert plan.device_hours == pytest.approx(4 * plan.hours)
        assert plan.memory == rounds * 3 * (1024 + 4096) + rounds * 1000 + 7
        assert (plan.passes, plan.packs, plan.tokens) == (1, 2, 4096 * 100)
        assert plan.bytes_read == 4096 * 100 * 64 * 2
    found = sweep.plan(runs, topology, None, most=0)
    assert found.mesh.run == 2 and found.fits  # a step does not gain here by more devices
    assert sweep.as_dict(found, price=2.0)["cost"] == 2 * found.device_hours


def test_a_harvest_takes_the_bytes_and_files_of_the_store(tmp_path):
    plan = harvests.harvest(
        lm.DEMO_MODEL, ["blocks.0.hook_resid_post", "mlp_act.0"], 3000, tmp_path / "s",
        chips.describe("h100:1x8"), context_length=16,
    )  # fmt: skip
    model = lm.open_model(lm.DEMO_MODEL)
    widths = {site: model.site_width(site) for site in ("resid_post.0", "mlp_act.0")}
    tokens = np.zeros((3000 // 16, 16), np.int32)
    writer = StoreWriter.create_or_resume(
        tmp_path / "s", sites=widths, num_sequences=len(tokens), context_length=16, tokens=tokens
    )
    for shard in writer.missing_shards():
        rows = (shard.sequences.stop - shard.sequences.start) * 16
        values = {site: np.ones((rows, width), np.float32) for site, width in widths.items()}
        writer.write_shard(shard.index, values)
    writer.finish()
    files = [f for f in (tmp_path / "s").rglob("*") if f.is_file() and f.name != "meta.json"]
    data = [f for f in files if f.name != "zarr.json"]
    assert (plan.contexts, plan.tokens) == (187, 2992)
    assert plan.objects == len(files)
    assert plan.bytes == sum(f.stat().st_size for f in data)
    assert plan.flops == 2992 * model.flops_per_token(tuple(widths), 16)
    assert plan.seconds == pytest.approx(plan.flops / 8 / 67e12)
    assert plan.fits and plan.mesh_model == 1
    full = dataclasses.replace(plan, free=plan.bytes - 1)
    assert not full.fits and "DOES NOT FIT" in harvests.text(full)


def test_a_model_too_large_for_a_device_is_shared():
    small = dataclasses.replace(chips.CHIPS["h100"], memory=4 * 2**20)
    topology = dataclasses.replace(chips.describe("h100:1x8"), chip=small)
    plan = harvests.harvest(lm.DEMO_MODEL, ["resid_post.0"], 10**6, "o", topology, context_length=2)
    assert plan.mesh_model is None and not plan.fits  # the batch's activations alone are more


# ------------------------------------------------------------------------- the command


def plan(*flags: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path])}
    environment.pop("XLA_PYTHON_CLIENT_MEM_FRACTION", None)
    command = [sys.executable, "-m", "sae_jax", "plan", *flags]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


PAPER = f"--config={HERE.parent / 'experiments' / 'scaling_monosemanticity.py'}"


@pytest.mark.slow
def test_a_mesh_that_does_not_fit_names_one_that_does():
    refused = plan(f"{PAPER}:4m", "--topology=h100:4x8", "--mesh=1,4,8", "--compiles=1")
    assert refused.returncode == 1, refused.stderr
    assert "DOES NOT FIT" in refused.stdout
    words, command = refused.stdout.split("The fastest that fits")[1].split("\n  ")
    assert words.startswith(", and the least memory: ")
    assert command.startswith(f"sae-jax train {PAPER}:4m --config.mesh.data=1 ")
    named = [word for word in command.split() if word.startswith("--config.mesh.")]
    accepted = plan(f"{PAPER}:4m", "--topology=h100:4x8", *named, "--json", "--price=2.5")
    assert accepted.returncode == 0, accepted.stderr
    told = json.loads(accepted.stdout)
    assert told["fits"] and told["bytes"]["total"] < 60e9
    assert f"{told['seconds']['step'] * 1e3:.1f} ms a step" in words
    run = told["run"]
    assert run["hours"] == pytest.approx(run["tokens"] // 4096 * told["seconds"]["step"] / 3600)
    assert run["cost"] == pytest.approx(2.5 * run["chip_hours"])
    assert told["suggestions"] == {}


@pytest.mark.slow
def test_find_takes_the_least_and_nothing_fits_is_said():
    found = plan(f"{PAPER}:131k", "--topology=h100:1x4", "--find=memory", "--json")
    assert found.returncode == 0, found.stderr
    rows = [line.split() for line in found.stderr.splitlines() if line[:6].strip().isdigit()]
    assert len(rows) == 5  # 4 x 1, 2 x 2 and 1 x 4, with and without ZeRO
    least = min((row for row in rows if row[-1] == "compiled"), key=lambda row: float(row[5]))
    told = json.loads(found.stdout)
    assert [str(told["mesh"]["data"]), str(told["mesh"]["model"])] == least[:2]
    assert told["bytes"]["total"] == told["suggestions"]["least_memory"]["bytes"]
    none = plan(f"{PAPER}:34m", "--topology=h100:1x8", "--find=time")
    assert none.returncode == 1
    assert "No mesh of 8 devices fits" in none.stderr


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    "case", ["relu,2,4,zero", pytest.param("topk,2,4,", marks=pytest.mark.long)]
)
def test_memory_of_a_real_step_on_eight_devices(case):
    """All arrays, temporaries too: what the process takes more at its highest."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path])}
    script = [sys.executable, str(HERE / "measured_memory.py"), *case.split(",")]
    done = subprocess.run(script, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    assert told["held"] == told["predicted_held"]
    assert told["peak"] == pytest.approx(told["predicted_peak"], rel=0.05)


def of_readme(chip: str) -> list[tuple[str, str, str, list[float]]]:
    """The rows of the README's table for a chip: latents, devices, mesh; and GB, ms by peaks and
    ms by the compiler."""
    number = r"([\d.]+) \| "
    row = rf"^\| (\w+) \| (\d+) {chip}, `(--mesh=\S+)` \| {3 * number}"
    rows = re.findall(row, (HERE.parent / "README.md").read_text(), re.M)
    return [(*row[:3], list(map(float, row[3:]))) for row in rows]


def told_by(output: str) -> list[float]:
    told = json.loads(output)
    seconds = told["seconds"]["step"], told["compiler_seconds"] or math.nan
    return [told["bytes"]["total"] / 1e9, *(1e3 * s for s in seconds)]


@pytest.mark.slow
def test_the_tables_of_the_readme():
    """Those of GPUs; the TPU's command is the next test's. CPUs that stand for GPUs need as much
    memory or somewhat more, and more time."""
    rows = of_readme("H100")
    assert len(rows) == 3
    for size, count, mesh, figures in rows[-1:]:
        topology = f"--topology=h100:{int(count) // 8}x8"
        done = plan(f"{PAPER}:{size.lower()}", topology, mesh, "--json", "--top=3")
        found = told_by(done.stdout)
        if CUDA:
            assert found == pytest.approx(figures, rel=0.05)  # the compilers of JAX 0.10 to 0.12
        else:
            assert 'pip install "sae-jax[cuda]"' in done.stderr
            memory, time = (a / b for a, b in zip(found[:2], figures[:2], strict=True))
            assert 1 < memory < 1.2 and 1 < time < 1.4
        dearest = json.loads(done.stdout)["operations"]
        assert "dot_general" in dearest[2]["words"]  # before it may come Adam's passes
        assert dearest[2]["flops"] == {"bfloat16": 2 * 4096 * 4096 * 2**22 // 64}
        times = [o["seconds"] for o in dearest]
        assert len(times) == 3 and times == sorted(times, reverse=True)


@pytest.mark.slow
@pytest.mark.skipif(not CUDA, reason="needs JAX's CUDA plugin: extra [cuda]")
def test_gpus_are_compiled_as_gpus():
    """Two nodes of GPUs that are not there: cuBLAS's products and our own kernels."""
    sizes = [f"--config.sae.{k}={v}" for k, v in {"d_in": 256, "d_sae": 8192, "k": 32}.items()]
    flags = [*sizes, "--config.sae.compute_dtype=bfloat16", "--config.data.batch_size=512"]
    done = plan("--config=openai_topk", *flags, "--topology=h200:2x2", "--mesh=1,2,2", "--top=99",
                "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    calls = {o["name"].split(".")[0]: o for o in told["operations"]}
    assert "pallas_call" in calls
    of_products = Counter()
    for o in told["operations"]:
        of_products.update(o["flops"])
    assert of_products["bfloat16"] == told["flops"]["bfloat16"] == 2 * 256 * 256 * 4096
    by_peaks = told["seconds"]["step"]
    parts = [told["seconds"][name] for name in ("products", "memory", "network")]
    assert max(parts) < by_peaks < sum(parts)
    assert told["compiler_seconds"] > by_peaks


@pytest.mark.slow
def test_34_million_latents_on_a_tpu_slice():
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed: extra [tpu]")
    done = plan(f"{PAPER}:34m", "--topology=v5p:4x4x4", "--mesh=1,1,64", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["bytes"]["parameters"] == pytest.approx(4 * 2 * 4096 * 2**25 / 64, rel=1e-3)
    assert told["flops"]["bfloat16"] == pytest.approx(10 * 4096 * 4096 * 2**25 / 64)
    assert {(c["kind"], *c["axes"]) for c in told["collectives"]} == {("all-reduce", "model")}
    ((_, _, mesh, figures),) = of_readme("TPU v5p")
    assert mesh == "--mesh=1,1,64" and told_by(done.stdout) == pytest.approx(figures, rel=0.02)


@pytest.mark.parametrize(
    "counts",
    [
        pytest.param(["256"], marks=pytest.mark.slow),
        pytest.param(["1", "4", "16", "64", "256"], marks=pytest.mark.long),
    ],
    ids=len,
)
def test_weak_scaling_and_the_collectives_of_the_design(counts):
    """Compiled for up to 256 devices: what a device computes and sends stays the same when the
    batch grows with the `data` axis, or the dictionary with `model`, but for the products with
    picked rows, of which a shard has its share; and no other collectives appear. Top-k's candidates
    are gathered, up to 1 KiB a token, or searched, for less."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path])}
    script = [sys.executable, str(HERE / "many_devices.py"), *counts]
    done = subprocess.run(script, capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 5 * len(counts)
    for line in lines:
        case = f"{line['architecture']} along {line['axis']} at {line['devices']}"
        assert line["flops"] == line["designed_flops"], case
        for collective, size in line["payload"].items():
            assert size <= line["designed"].get(collective, 0), f"{collective} in {case}"


def test_groups_of_devices_are_a_sweeps(capsys):
    config = dataclasses.replace(Config(), mesh=MeshConfig(run=2))
    assert resolve(config, (64,)).mesh.run == 2, "as a sweep without a store has it"
    assert main(["plan", "--mesh=2,1,1", "--config.sae.d_in=64"]) == 2
    assert "the plan of one run has no use for mesh.run" in capsys.readouterr().err


def test_plan_is_of_a_run_with_tokens():
    with pytest.raises(UserError, match="batch_size must be 1 or more, not 0"):
        resolve(dataclasses.replace(Config(), data=DataConfig(batch_size=0)), (64,))


@pytest.mark.parametrize(
    "device_kind, name",
    [("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA A100-SXM4-80GB", "A100 80 GB"),
     ("TPU v5 lite", "TPU v5e"), ("TPU v5", "TPU v5p"), ("TPU v6 lite", "TPU v6e"), ("cpu", None),
     ("NVIDIA GeForce RTX 4090", None)],
)  # fmt: skip
def test_chips_by_what_jax_calls_them(device_kind, name):
    chip = chips.chip_from_kind(device_kind)
    assert (chip and chip.name) == name
