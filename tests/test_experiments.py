"""The recipes in experiments/: every size is a config that could start, and `:tiny` runs."""

import dataclasses
import pathlib
import re
import types

import pytest

from sae_jax.cli import demo
from sae_jax.config import UserError, load_file
from sae_jax.train.loop import resolve
from sae_jax.train.mesh import make_mesh

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
        data, steps = config.data, config.train.tokens // config.data.batch_size
        assert steps >= 400, "too few to learn anything"
        assert data.batch_size % data.virtual_shards == 0
        assert config.sae.dead_after_tokens < config.train.tokens
        if "tiny" in size:
            sites = [*data.site.split(","), *filter(None, [data.target_site])]
            assert set(sites) <= {demo.SITE, *demo.MORE_SITES}, "of the demo's store"
        elif size:
            assert config.sae.d_sae > load(name, "tiny").sae.d_sae or size == "512"


@pytest.mark.parametrize("name", NAMES)
def test_it_says_what_it_is_and_how_to_run_it(name):
    text = (ROOT / "experiments" / f"{name}.py").read_text()
    (doc,) = re.findall(r'\A"""(.*?)"""', text, flags=re.DOTALL)
    assert f"sae-jax train --config=experiments/{name}.py" in doc
    default = load(name).sae
    for size in sizes(name):
        assert f"`:{size}`" in doc or load(name, size).sae == default, f"{size} is not explained"
