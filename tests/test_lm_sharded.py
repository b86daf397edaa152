"""A model that is too large for one device: what each device holds, and what is sent."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy
import world
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sae_jax import lm

FILES = 3


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A model in several files."""
    directory = tmp_path_factory.mktemp("large") / "model"
    world.make_model(directory, num_layers=4, d_model=64, gated=True)
    whole = directory / "model.safetensors"
    tensors = safetensors.numpy.load_file(whole)
    whole.unlink()
    names, where = sorted(tensors), {}
    for i in range(FILES):
        file = f"model-{i + 1:05}-of-{FILES:05}.safetensors"
        where |= dict.fromkeys(names[i::FILES], file)
        part = {name: tensors[name] for name in names[i::FILES]}
        safetensors.numpy.save_file(part, directory / file)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return directory


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((1, 2), ("data", "model"), devices=jax.devices()[:2])


def held(arrays) -> dict[int, int]:
    """Bytes of `arrays` on each device."""
    bytes_of = {}
    for array in arrays:
        for shard in array.addressable_shards:
            bytes_of[shard.device.id] = bytes_of.get(shard.device.id, 0) + shard.data.nbytes
    return bytes_of


@pytest.mark.parametrize("scan", [False, True])
def test_no_device_holds_more_than_its_share(directory, mesh, scan):
    """Of the weights, while they are read too: nothing whole is left behind."""
    before = {id(array) for array in jax.live_arrays()}
    params = lm.load_params(directory, mesh=mesh, scan=scan)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    total = sum(leaf.nbytes for _, leaf in leaves)
    norms = sum(leaf.nbytes for path, leaf in leaves if path[-1].key.endswith("norm"))
    alive = held(array for array in jax.live_arrays() if id(array) not in before)
    assert set(alive) == {0, 1}
    assert max(alive.values()) <= (total - norms) / 2 + norms + 1024 < 0.52 * total


def test_no_activation_is_gathered(directory, mesh):
    """Two all-reduces a layer and one for the embedding; the sites inside a layer stay sharded."""
    config, params = lm.load_config(directory), lm.load_params(directory, mesh=mesh)
    tokens = jax.device_put(np.zeros((2, 16), int), NamedSharding(mesh, P("data", None)))
    sites = ("z.1", "mlp_act.2", "resid_post.3")
    run = jax.jit(lambda p, t: lm.forward(p, t, config, sites, logits=False)[1])
    program = run.lower(params, tokens).compile().as_text()
    for sent in ("all-gather", "all-to-all", "collective-permute"):
        assert f"{sent}(" not in program, sent
    assert program.count("all-reduce(") == 2 * config.num_layers + 1
    taps = run(params, tokens)
    for site in sites[:2]:
        shard = taps[site].addressable_shards[0].data
        assert shard.shape[-1] == lm.site_width(config, site) // 2


@pytest.mark.slow
def test_a_harvest_sharded_over_the_model_is_the_same(directory, mesh, tmp_path):
    options = {"sites": ("z.1", "mlp_act.2", "resid_post.3"), "context_length": 16}
    options |= {"tokens": 640, "dtype": "float32"}
    one = jax.make_mesh((1, 1), ("data", "model"), devices=jax.devices()[:1])
    texts = world.TEXTS * 20
    ours = lm.harvest(directory, texts, tmp_path / "sharded", mesh=mesh, **options)
    loop = lm.harvest(directory, texts, tmp_path / "loop", mesh=mesh, scan_layers=True, **options)
    whole = lm.harvest(directory, texts, tmp_path / "whole", mesh=one, **options)
    for site in options["sites"]:
        a, b, c = (store.read(site, slice(0, 640)) for store in (ours, loop, whole))
        np.testing.assert_allclose(a, c, atol=1e-4 * np.abs(c).max())
        np.testing.assert_allclose(b, c, atol=1e-4 * np.abs(c).max())
