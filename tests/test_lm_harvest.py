"""Harvest end to end: real files, real processes, kills."""

import filecmp
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tokenizers
from absl import flags

from sae_jax import lm
from sae_jax.activations import StoreWriter
from sae_jax.cli import counts, main
from sae_jax.errors import UserError

CONTEXT = 16
SITES = ("resid_post.0", "mlp_act.1")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(model directory, text file): two random layers and a tokenizer of single letters."""
    root = tmp_path_factory.mktemp("world")
    model = root / "model"
    model.mkdir()
    letters = "abcdefghijklmnopqrstuvwxyz \n"
    vocab = {"<s>": 0} | {letter: i + 1 for i, letter in enumerate(letters)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<s>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    backend.save(str(model / "tokenizer.json"))
    config = lm.DecoderConfig(
        vocab_size=len(vocab), d_model=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4,
        d_mlp=24, max_context=32,
    )  # fmt: skip
    save_random(model, config, seed=0)
    rng = np.random.default_rng(0)
    text = "".join(rng.choice(list(letters), 20_000))
    (root / "text.txt").write_text(text)
    return model, root / "text.txt"


def save_random(directory, config, seed):
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda leaf: 0.3 * rng.normal(size=leaf.shape), lm.layout(config))
    lm.save_model(directory, config, params, bos_token_id=0)


def harvest(world, out, **options):
    model, text = world
    options = {"sites": SITES, "context_length": CONTEXT, "tokens": 3000} | options
    return lm.harvest(model, lm.read_texts(text), out, **options)


def command(world, out, *more):
    model, text = world
    return [f"--model={model}", f"--text={text}", f"--out={out}", f"--sites={','.join(SITES)}",
            f"--context_length={CONTEXT}", *more]  # fmt: skip


def same_files(a, b):
    names = [p.relative_to(a) for p in sorted(pathlib.Path(a).rglob("*")) if p.is_file()]
    others = [p.relative_to(b) for p in sorted(pathlib.Path(b).rglob("*")) if p.is_file()]
    assert names == others and len(names) > 5
    _, differing, errors = filecmp.cmpfiles(a, b, names, shallow=False)
    return not differing and not errors


def test_rows_are_the_models_activations(world, tmp_path):
    """A batch of 8 contexts does not divide the shards: the padding must leave no trace."""
    store = harvest(world, tmp_path / "store", batch_size=8, dtype="float32")
    tokens = lm.pack(lm.read_texts(world[1]), lm.load_tokenizer(world[0]), CONTEXT, 3000)
    assert store.meta.num_sequences == len(tokens) == 187
    np.testing.assert_array_equal(store.tokens().read().result(), tokens)
    config, params = lm.load_config(world[0]), lm.load_params(world[0])
    _, taps = lm.forward(params, tokens, config, SITES)
    rows = slice(0, tokens.size)
    for site in SITES:
        want = np.asarray(taps[site]).reshape(tokens.size, -1)
        np.testing.assert_allclose(store.read(site, rows), want, atol=1e-5)
    excluded = np.asarray(store.excluded.read().result())
    assert (excluded[::CONTEXT] > 0).all() and (excluded > 0).sum() >= len(tokens)
    assert store.meta.provenance["packing"] == lm.PACKING_RULE
    assert store.meta.provenance["bos"]["token"] == "<s>"


def test_mesh_gives_the_same_rows(world, tmp_path):
    mesh = jax.make_mesh((2, 2), ("data", "model"))
    a = harvest(world, tmp_path / "a", dtype="float32", mesh=mesh)
    one = jax.make_mesh((1, 1), ("data", "model"), devices=jax.devices()[:1])
    b = harvest(world, tmp_path / "b", dtype="float32", mesh=one)
    rows = slice(0, a.meta.num_sequences * CONTEXT)
    for site in SITES:
        np.testing.assert_allclose(a.read(site, rows), b.read(site, rows), atol=1e-5)


def test_started_again_it_does_nothing_and_another_content_is_refused(world, tmp_path):
    out = tmp_path / "store"
    harvest(world, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    harvest(world, out)
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with pytest.raises(UserError, match="sites"):
        harvest(world, out, sites=("resid_post.1",))
    with pytest.raises(UserError, match="num_sequences: 187 -> 125"):
        harvest(world, out, tokens=2000)
    other_text = tmp_path / "other.txt"
    other_text.write_text("z" + world[1].read_text())
    with pytest.raises(UserError, match="tokens"):
        harvest((world[0], other_text), out)
    with pytest.raises(UserError, match="another model .model_dtype: 'float32' -> 'bfloat16'"):
        harvest(world, out, model_dtype="bfloat16")
    other_model = tmp_path / "model"
    shutil.copytree(world[0], other_model)
    config = lm.load_config(other_model)
    (other_model / "model.safetensors").unlink()
    save_random(other_model, config, seed=1)
    with pytest.raises(UserError, match="another model .model_fingerprint"):
        harvest((other_model, world[1]), out)
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}


def test_mistakes_are_refused_before_anything_is_written(world, tmp_path, monkeypatch):
    out = tmp_path / "store"
    for options, message in (
        ({"sites": ("resid_post.2",)}, "unknown site 'resid_post.2'"),
        ({"sites": ()}, "no sites"),
        ({"context_length": 64}, "context_length 64 is not between 2 and the model's 32"),
        ({"context_length": 0}, "context_length 0 is not between 2"),
        ({"batch_size": 6}, "batch_size 6 is not a multiple"),
        ({"tokens": 3}, "3 tokens are less than one context"),
        (
            {"max_bytes": 3},
            "max_bytes 3 is too little for one context of 16 tokens of resid_post.0",
        ),
        (
            {"sites": "blocks.0.ln2.hook_normalized"},
            "no site: it is before the norm's weight, and ",
        ),
        ({"sites": "blocks.1.hook_mlp_in"}, "no site: it enters the MLP's norm, as resid_mid.1;"),
        (
            {"sites": "blocks.1.attn.hook_q"},
            r"blocks.1.attn.hook_q is at no site; hooks that are: ",
        ),
        ({"sites": "blocks.x.hook_resid_post"}, r"is at no site; hooks that are: .*blocks.0.hook"),
        ({"sites": "blocks.2.hook_mlp_out"}, "unknown site 'mlp_out.2'"),
    ):
        with pytest.raises(UserError, match=message):
            harvest(world, out, **options)
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"needs 0.00 GB .* fewer tokens or sites"):
        harvest(world, out)
    assert not out.exists()
    with pytest.raises(UserError, match="text.txt is a file"):
        harvest(world, world[1])


def test_what_is_there_already_needs_no_room(world, tmp_path, monkeypatch):
    """3,000 tokens of 40 values in bfloat16 are 0.26 MB; of those, a quarter is written."""
    out = tmp_path / "store"

    class Stopped(Exception):
        pass

    write_shard = StoreWriter.write_shard

    def stop_after_two(writer, index, *values):
        if index == 2:
            raise Stopped
        write_shard(writer, index, *values)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(StoreWriter, "write_shard", stop_after_two)
        harvest(world, out)
    there = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    needed = 187 * CONTEXT * (40 * 2 + 5)
    assert 0 < there < needed
    for free, enough in ((needed - there - 1, False), (needed - there + 1, True)):
        usage = shutil.disk_usage(tmp_path)._replace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        if enough:
            assert harvest(world, out).meta.complete
        else:
            with pytest.raises(UserError, match="fewer tokens or sites"):
                harvest(world, out)


def test_hooks_of_transformer_lens_are_sites():
    """Each site has the hook that `hook_name` says, and no other hook is a site."""
    for site in lm.SITES:
        hook = lm.hook_name(f"{site}.11")
        assert (hook is None) == (site == "mlp_in")
        assert hook is None or lm.site_of_hook(hook) == f"{site}.11"
    for hook in ("blocks.1.hook_mlp_in", "blocks.1.ln2.hook_normalized", "blocks.x.hook_mlp_out",
                 "blocks.1.hook_mlp_out.x", "hook_embed", "resid_post.1"):  # fmt: skip
        assert lm.site_of_hook(hook) is None


@pytest.mark.parametrize("max_bytes, live", [(60_000, True), (250_000, False)])
def test_max_bytes_is_the_most_that_a_store_takes(world, tmp_path, max_bytes, live):
    harvest(world, tmp_path / "store", tokens=None, max_bytes=max_bytes, live=live)
    size = sum(file.stat().st_size for file in (tmp_path / "store").rglob("*") if file.is_file())
    assert 0.7 * max_bytes < size <= max_bytes


def test_a_text_of_fewer_tokens_is_told(world, tmp_path, caplog):
    hooks = "blocks.0.hook_resid_post,blocks.1.mlp.hook_post"
    options = {"sites": hooks, "tokens": 10**8, "live": True, "statistics_tokens": 1}
    store = harvest(world, tmp_path / "store", **options)
    assert tuple(store.meta.sites) == SITES
    assert "the text has 21,328 tokens, not the 100,000,000 of --tokens" in caplog.text


def test_flops_are_those_of_the_layers_up_to_the_last_site(world):
    """Against the shapes of the fixture's products, by hand: a layer has q 16x16, k and v 16x8, o
    16x16, three 16x24; a query of 4 tokens meets 2.5 keys, in 4 heads of 4, twice."""
    model = lm.JaxModel(world[0])
    layer = 2 * (16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 24) + 4 * 4 * 4 * 2.5
    assert model.flops_per_token(("resid_post.0",), 4) == layer
    assert model.flops_per_token(("resid_post.0", "mlp_act.1"), 4) == 2 * layer


NUMBERS = {"2000": 2000, "2e3": 2000, "2_000": 2000, "2K": 2000, "0.5M": 500_000, "1B": 10**9}


@pytest.mark.parametrize("text, number", NUMBERS.items())
def test_large_numbers_as_people_write_them(text, number):
    values = flags.FlagValues()
    counts.define("tokens", None, "", values)
    values(["x", f"--tokens={text}"])
    assert values.tokens == number


def test_command_line(world, tmp_path, capsys):
    out = tmp_path / "store"
    assert main(["harvest", *command(world, out, "--tokens=2e3", "--mesh_model=2")]) == 0
    printed = capsys.readouterr().out
    assert "2,000 rows (125 contexts of 16)" in printed
    assert "Left out of training: 125 rows of special tokens [0]" in printed
    assert main(["harvest", *command(world, out, "--mesh_model=3", "--mesh_data=2")]) == 2
    assert "--mesh_data=2 --mesh_model=3 does not fit the 4 devices here" in capsys.readouterr().err
    none, bounds = "not a whole number; write", "it must be from 1 to 1,000,000,000,000,000"
    for wrong, said in (("1.5", none), ("many", none), ("1e", none), ("-3", bounds), ("0", bounds)):
        assert main(["harvest", *command(world, out, f"--tokens={wrong}")]) == 2
        assert said in capsys.readouterr().err
    assert main(["harvest", *command((tmp_path, world[1]), tmp_path / "b")]) == 2
    assert "no config.json in" in capsys.readouterr().err


def start(arguments, **environment):
    variables = os.environ | {"NPROC": "16", "JAX_PLATFORMS": "cpu"} | environment
    return subprocess.Popen([sys.executable, *arguments], env=variables)


@pytest.mark.slow
def test_killed_and_started_again_it_writes_the_same_bytes(world, tmp_path):
    run = ["-m", "sae_jax", "harvest"]
    options = ["--tokens=18000", "--batch_size=1"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(run + command(world, whole, *options)).wait(120) == 0
    kills = 0
    moments = random.Random(0)
    for shard in (0, 2, 4):  # of 9
        process = start(run + command(world, killed, *options))
        while not (killed / "written" / f"{shard:06d}.npz").exists() and process.poll() is None:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills == 3
    assert start(run + command(world, killed, *options)).wait(120) == 0
    assert same_files(whole, killed)
