"""The recipes in experiments/: every size is a config that could start, and `:tiny` runs."""

import dataclasses
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import types

import pytest

from sae_jax import lm
from sae_jax.cli import demo
from sae_jax.config import call_in_file, load_file
from sae_jax.errors import UserError
from sae_jax.sweep import grid as grids
from sae_jax.sweep.design import make_passes
from sae_jax.train.mesh import make_mesh
from sae_jax.train.preparation import resolve

ROOT = pathlib.Path(__file__).parents[1]
NAMES = """towards_monosemanticity scaling_monosemanticity openai_topk gemma_scope
anthropic_jan2025 batchtopk matryoshka gated transcoder crosscoder""".split()


def load(name: str, size: str = ""):
    return load_file(f"{ROOT / 'experiments' / name}.py" + (size and f":{size}"))


def sizes(name: str) -> list[str]:
    """As the refusal of a size that the recipe does not have lists them."""
    with pytest.raises(UserError, match=f"the size of {name} is '---'") as error:
        load(name, "---")
    return str(error.value).partition("one of: ")[2].split(", ")


def data_like(config) -> types.SimpleNamespace:
    """What `resolve` asks a stream for, of a model 64 wide."""
    data = config.data
    sites = f"{data.site},{data.target_site}" if data.target_site else data.site or "mlp_act.0"
    names = tuple(sites.split(","))
    return types.SimpleNamespace(site_names=names, site_widths=(64,) * len(names))


@pytest.mark.parametrize("name", NAMES)
def test_every_size_could_start(name):
    assert "tiny" in sizes(name)
    for size in ["", *sizes(name)]:
        config = load(name, size)
        resolved = resolve(config, data_like(config))
        make_mesh(dataclasses.replace(resolved, mesh=dataclasses.replace(resolved.mesh, data=1)))
        assert config.sae.compute_dtype == ("float32" if "tiny" in size else "bfloat16")
        data, steps = config.data, config.train.tokens // config.data.batch_size
        assert steps >= 400, "too few to learn anything"
        assert data.batch_size % data.virtual_shards == 0
        assert resolved.sae.dead_after_tokens < config.train.tokens
        if "tiny" in size:
            sites = [*data.site.split(","), *filter(None, [data.target_site])]
            assert set(sites) <= {demo.SITE, *demo.MORE_SITES}, "of the demo's store"
        elif size:
            assert config.sae.d_sae > load(name, "tiny").sae.d_sae or size == "512"


@pytest.mark.parametrize("name", NAMES)
def test_it_says_what_it_is_and_how_to_run_it(name):
    text = (ROOT / "experiments" / f"{name}.py").read_text()
    (doc,) = re.findall(r'\A"""(.*?)"""', text, flags=re.DOTALL)
    assert re.search(rf"sae-jax train --config={name}\b", doc)
    assert "--config.sae.compute_dtype=float32" in doc
    default = load(name).sae
    for size in sizes(name):
        assert f"`:{size}`" in doc or load(name, size).sae == default, f"{size} is not explained"


FOUND = {  # FVU at most, L0 from, to: of the runs below on another day, and some room
    "towards_monosemanticity:tiny": (0.35, 20, 50),
    "scaling_monosemanticity:tiny": (0.45, 15, 40),
    "openai_topk:tiny": (0.33, 15.5, 16),
    "gemma_scope:tiny": (0.45, 10, 60),
    "anthropic_jan2025:tiny": (0.45, 8, 40),
    "batchtopk:tiny": (0.32, 15, 17),
    "matryoshka:tiny": (0.36, 15, 17),
    "gated:tiny": (0.40, 10, 60),
    "transcoder:tiny": (0.25, 14, 16),
    "transcoder:tiny-skip": (0.22, 14, 16),
    "crosscoder:tiny": (0.30, 10, 50),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """With a store like the demo's in it, where the tiny recipes look for one."""
    directory = tmp_path_factory.mktemp("experiments")
    store = directory / "sae_demo" / "store"
    store.parent.mkdir()
    texts, sites = lm.read_texts(lm.standard_library()), (demo.SITE, *demo.MORE_SITES)
    lm.harvest(lm.DEMO_MODEL, texts, store, sites=sites, tokens=600_000)
    return directory


def sae_jax(directory, *arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "sae_jax", *arguments]
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("design", ["tiny", "tiny-nk", "frontier", "frontier-nk"])
def test_every_design_of_scaling_laws_could_start(design):
    spec = f"{ROOT / 'experiments' / 'scaling_laws.py'}:{design}"
    grid = call_in_file(spec, "get_sweep", "")
    base = load_file(spec)
    sae = dataclasses.replace(base.sae, dead_after_tokens=10**6)  # one for all, as `expand` gives
    runs = [grids.apply(dataclasses.replace(base, sae=sae), swept) for swept in grid]
    data = data_like(runs[0])
    dtype = "bfloat16" if design.startswith("frontier") else "float32"
    assert {run.sae.compute_dtype for run in runs} == {dtype}
    runs = [resolve(run, data) for run in runs]
    sizes = {run.sae.d_sae for run in runs}
    if design.endswith("nk"):
        ks = {run.sae.k for run in runs}
        assert len(sizes) >= 4 and len(ks) >= 4 and len(runs) == len(sizes) * len(ks)
        assert {(run.sae.architecture, run.train.tokens) for run in runs} == {
            ("topk", runs[0].train.tokens)
        }
    else:
        budgets = {run.train.tokens for run in runs}
        assert len(sizes) >= 5 and len(budgets) >= 5 and len(runs) == len(sizes) * len(budgets)
        assert {run.sae.sparsity_coefficient for run in runs} == {5.0}
        (work,) = make_passes(runs)
        trunks = [pack for pack in work.packs if pack.trunk is None]
        assert len(trunks) == len(sizes), "all budgets of a size share a trunk"
    rates = {run.optimizer.learning_rate * run.sae.d_sae**0.5 for run in runs}
    assert max(rates) == pytest.approx(min(rates)), "lr by 1 / sqrt(n)"
    with pytest.raises(UserError, match="the design of scaling_laws is 'tny'"):
        call_in_file(spec.replace(design, "tny"), "get_sweep", "")


@pytest.mark.long
def test_golden_gate_goes_from_text_to_a_steered_model(tmp_path):
    """On the model that ships here, in which a latent of Python's classes is found."""
    for name, lines in {
        "positive": ["class A:\\n    def f(self): return self.x", "    def g(self, y): self.y = y"],
        "negative": ["import os, sys", "# A comment in English about nothing at all."],
    }.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    command = [
        sys.executable, str(ROOT / "experiments" / "golden_gate.py"), f"--model={lm.DEMO_MODEL}",
        f"--text={pathlib.Path(json.__file__).parent}", "--out=gate", "--concept=self",
        "--regex=self", "--positive=positive.txt", "--negative=negative.txt", "--tokens=16384",
        "--d_sae=128", "--k=8", "--epochs=3", "--samples=1", "--max_new_tokens=8",
        "--lm_tokens=256",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    for _ in range(2):  # the second time all is there
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gate" / "self" / "found.json").read_text())
    assert found["candidates"][0]["positives"] > found["candidates"][0]["negatives"]
    steered = json.loads((tmp_path / "gate" / "self" / "steered" / "steer.json").read_text())
    assert len(steered["outcomes"]) == 1 + 3 * 4


@pytest.mark.slow
def test_the_readme_from_a_sweep_to_the_run_it_plans(directory):
    """The law predicts the largest budget from the others within 3%, and the planned run ends
    within the interval."""
    (directory / "experiments").symlink_to(ROOT / "experiments")
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    (commands,) = (block for block in blocks if "sae-jax sweep" in block)
    for line in commands.strip().splitlines():
        program, *arguments = shlex.split(line)
        assert program == "sae-jax"
        sae_jax(directory, *arguments)
    fit = json.loads((directory / "fits" / "compute" / "fit.json").read_text())
    result = json.loads((directory / "runs" / "next" / "result.json").read_text())
    print(f"\n{fit}\n{result}")
    assert fit["holdout"]["rms_relative_error"] < 0.03
    assert 0.4 < fit["frontier"]["d_sae_exponent"] < 0.7
    assert -0.06 < fit["frontier"]["loss_exponent"] < -0.02
    least, most = fit["prediction"]["interval"]
    assert least < result["eval_loss"] < most


@pytest.mark.long
def test_a_tiny_sweep_gives_loss_against_size_and_k(directory):
    config = f"{ROOT}/experiments/scaling_laws.py:tiny-nk"
    sae_jax(directory, "sweep", f"--config={config}", "--workdir=sweeps/nk")
    sae_jax(directory, "fit", "--results=sweeps/nk", "--law=openai_nk", "--out=fits/nk")
    fit = json.loads((directory / "fits" / "nk" / "fit.json").read_text())
    assert fit["holdout"]["rms_relative_error"] < 0.04
    assert fit["params"]["gamma"] < 0 and fit["params"]["eta"] < 0, "as Gao et al. found"


# By hand: all take ten minutes, and the README's, the wheel's and the tutorials' runs, which are
# tested, try the same code.
@pytest.mark.long
@pytest.mark.parametrize("recipe", FOUND)
def test_tiny_gives_a_sensible_sae_in_a_minute(recipe, directory):
    name, size = recipe.split(":")
    run = directory / "runs" / name / size
    config = ROOT / "experiments" / f"{name}.py"
    sae_jax(directory, "train", f"--config={config}:{size}", f"--workdir={run}")
    sae_jax(directory, "eval", f"--run={run}", "--lm_tokens=32768")
    result = json.loads((run / "result.json").read_text())
    found = json.loads((run / "eval.json").read_text())
    fvu, recovered = found["reconstruction"]["fvu"], found["language_model"]["ce_recovered_zero"]
    l0, dead = found["sparsity"]["l0"], found["sparsity"]["dead_fraction"]
    print(
        f"\n| {recipe} | {result['architecture']} | {result['kind']} | {result['tokens']:,} "
        f"| {result['wall_seconds']:.0f} s | {fvu:.3f} | {l0:.1f} | {dead:.3f} | {recovered:.3f} |"
    )
    worst, least, most = FOUND[recipe]
    assert fvu < worst and least <= l0 <= most
    assert dead < 0.2 and recovered > 0.75
