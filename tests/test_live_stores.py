"""Live stores: rows computed when they are read are the rows that a harvest would have written."""

import dataclasses
import gc
import json
import pathlib
import shutil
import tracemalloc

import numpy as np
import pytest
import safetensors.numpy
import world
from training import (
    assert_same_arrays,
    finish_all,
    logged_step,
    metrics,
    run_to_end,
    saved_arrays,
    start,
    together,
    wait_until,
)

from sae_jax import lm
from sae_jax.activations import Store, Stream
from sae_jax.cli import main
from sae_jax.config import Config, DataConfig, MeshConfig, TrainConfig
from sae_jax.errors import UserError
from sae_jax.lm import live
from sae_jax.sae import TopKConfig
from sae_jax.train.run import train_run

CONTEXT, BATCH = 16, 64
SITES = ("resid_post.0", "mlp_act.1")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("live") / "model"
    world.make_model(directory, num_layers=2)
    return directory


def texts(repeats=30):
    rng = np.random.default_rng(0)
    return [" ".join(rng.permutation(" ".join(world.TEXTS).split())) for _ in range(repeats)]


def harvest(model, out, *, repeats=30, **options):
    options = {"sites": SITES, "context_length": CONTEXT, "batch_size": 8} | options
    return lm.harvest(model, texts(repeats), out, **options)


@pytest.fixture(scope="module")
def both(model, tmp_path_factory):
    """(harvested, live) stores of the same text, in bfloat16."""
    root = tmp_path_factory.mktemp("stores")
    return harvest(model, root / "harvested"), harvest(model, root / "live", live=True)


def stream(store, **options):
    options = {"batch_size": BATCH, "virtual_shards": 8, "window_rows": 256} | options
    return Stream(store, SITES, **options)


def test_batches_are_those_of_the_harvested_store_bit_for_bit(both):
    """Every batch of both splits; two sites at once; a reader of a part of each batch that begins
    in the middle; and the statistics that training normalises by."""
    harvested, computed = both
    assert harvested.meta.shard_sequences % 8 and not computed.folder.sizes("sites")
    made_by = computed.meta.live
    told = harvested.meta.provenance | {"statistics": "of all rows"}
    assert computed.meta == dataclasses.replace(harvested.meta, live=made_by, provenance=told)
    assert (made_by.batch_size, made_by.mesh_model) == (8, 1)
    for options in ({}, {"split": "heldout", "holdout_fraction": 0.3}, {"seed": 1, "epochs": 2}):
        one, other = (stream(store, **options) for store in both)
        assert one.num_steps == other.num_steps > 2
        for a, b in zip(one.batches(), other.batches(), strict=True):
            assert a.dtype == b.dtype == "bfloat16"
            np.testing.assert_array_equal(a, b)
    parts = (stream(store).batches(7, slice(8, 24), prefetch=0) for store in both)
    for a, b in zip(*parts, strict=True):
        np.testing.assert_array_equal(a, b)


def test_single_rows_are_those_of_the_harvested_store(both):
    ids = np.random.default_rng(0).integers(0, both[0].num_rows, 50)
    rows = [stream(store).read_rows(ids) for store in both]
    np.testing.assert_array_equal(*rows)
    for part in (slice(5, 40, 3), slice(-20, None), slice(9, 3)):
        np.testing.assert_array_equal(*(store.read(SITES[1], part) for store in both))


def test_several_sites_cost_one_pass_of_the_model(both, monkeypatch):
    """As many runs as there are batches of 8 in the window's sequences."""
    runs = []
    runner = lm.JaxModel.runner

    def counting(self, sites, dtype):
        run = runner(self, sites, dtype)
        return lambda tokens: runs.append(sites) or run(tokens)

    monkeypatch.setattr(lm.JaxModel, "runner", counting)
    live._runner.cache_clear()
    store = lm.open_store(both[1].path)
    chunks = np.arange(0, store.meta.num_chunks, 2)
    sites = stream(store).sites
    out = np.empty((len(chunks), store.meta.chunk_rows, sites.width), sites.dtype)
    sites.read_chunks(chunks, out)
    live._runner.cache_clear()
    assert runs == [SITES] * -(-len(chunks) * store.meta.chunk_sequences // 8)


@pytest.mark.slow
def test_a_streams_memory_does_not_grow_with_the_text(model, tmp_path):
    def live_store(repeats):
        return harvest(model, tmp_path / str(repeats), repeats=repeats, live=True)

    def peak(store):
        batches = stream(store).batches(prefetch=0)
        next(batches)
        gc.freeze()  # what is there already, so that collecting the rest is quick
        tracemalloc.start()
        steps = 0
        for _ in batches:
            steps += 1
            gc.collect()  # else JAX's garbage, which comes in cycles, is counted too
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        gc.unfreeze()
        return steps, most

    short, long = live_store(8), live_store(224)
    peak(short)  # what is made once
    (few, small), (many, large) = peak(short), peak(long)
    assert many > 24 * few
    # A window's buffer grows to the most chunks that a window needs, of which a short text has met
    # few. All rows of the long text are twenty times as many bytes.
    assert large - small < long.num_rows * stream(long).width * 2 / 20


def test_statistics_of_a_sample(model, both, tmp_path):
    """Spread over the text, in whole contexts and no more than those; what is excluded by token or
    position is the same."""
    total = both[0].num_rows
    few = harvest(model, tmp_path / "few", live=True, statistics_tokens=5 * CONTEXT + 1)
    assert 3 * CONTEXT < few.meta.sites[SITES[0]].rows_used <= 6 * (CONTEXT - 1)  # six without BOS
    sampled = harvest(model, tmp_path / "s", live=True, statistics_tokens=total // 4)
    site, full = sampled.meta.sites[SITES[0]], both[0].meta.sites[SITES[0]]
    assert 0.2 * total < site.rows_used < 0.5 * total < full.rows_used
    assert site.mean_squared_norm == pytest.approx(full.mean_squared_norm, rel=0.05)
    assert site.mean_squared_norm != full.mean_squared_norm
    for store in (sampled, both[0]):
        assert store.meta.excluded_positions == both[0].meta.excluded_positions
    np.testing.assert_array_equal(*(s.excluded.read().result() for s in (sampled, both[0])))
    for a, b in zip(stream(sampled).batches(), stream(both[0]).batches(), strict=True):
        np.testing.assert_array_equal(a, b)


def with_a_bad_token(model, path):
    """The model with a row so large that its activations are infinite, of a token that is in one
    place of the texts only, and the texts.
    """
    shutil.copytree(model, path)
    weights = safetensors.numpy.load_file(path / "model.safetensors")
    documents = texts()
    documents[20] += " ~~~~~ "
    bad = lm.load_tokenizer(path).encode("~")[0]
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"].copy()
    weights["model.embed_tokens.weight"][bad] = np.finfo(np.float32).max
    safetensors.numpy.save_file(weights, path / "model.safetensors")
    return path, documents


def test_rows_that_are_not_finite(model, tmp_path):
    """A pass over all rows finds and marks them; a sample that missed them leaves them to be met,
    by name, and not to be trained on."""
    model, documents = with_a_bad_token(model, tmp_path / "model")
    options = {"sites": SITES, "context_length": CONTEXT, "batch_size": 8, "live": True}
    known = lm.harvest(model, documents, tmp_path / "known", **options)
    rows = np.flatnonzero(np.asarray(known.excluded.read().result()) & 4)
    assert known.meta.sites[SITES[0]].nonfinite_rows == len(rows) > 0
    with pytest.raises(UserError, match="hold NaN or infinity; set data.drop_nonfinite"):
        stream(known)
    for batch in stream(known, drop_nonfinite=True).batches():
        assert np.isfinite(batch.astype(np.float32)).all()
    unknown = lm.harvest(model, documents, tmp_path / "unknown", statistics_tokens=1, **options)
    with pytest.raises(UserError, match=rf"^row {rows[0]} of site resid_post.0 \(token "):
        for _ in stream(unknown, holdout_fraction=0, window_rows=10**9).batches():
            pass


def test_mistakes_in_words(model, both, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    store = harvest(copy, tmp_path / "live", repeats=3, live=True, statistics_tokens=1)
    assert store.meta.live.model == str(copy)
    with pytest.raises(UserError, match="is live: .*; open it with sae_jax.lm.open_store"):
        Store.open(store.path)
    with pytest.raises(UserError, match="is live: its rows are not there"):
        store.site(SITES[0])
    assert "what the model computes was not checked: activations" in store.check()
    with pytest.raises(UserError, match="already holds another store .live: None ->"):
        harvest(model, both[0].path, live=True)
    with pytest.raises(UserError, match="statistics_tokens 5 is for live stores"):
        harvest(model, tmp_path / "other", statistics_tokens=5)
    world.make_model(copy.parent / "another", num_layers=2, seed=1)
    shutil.copy(copy.parent / "another/model.safetensors", copy)
    with pytest.raises(UserError, match=f"{copy} is no longer the model that it was made with"):
        lm.open_store(store.path)
    shutil.rmtree(copy)
    with pytest.raises(UserError, match="is live and needs its model: no config.json in .*; put"):
        lm.open_store(store.path)


def test_command_line(model, tmp_path, capsys):
    text, out = tmp_path / "text.txt", tmp_path / "live"
    text.write_text("\n".join(texts()))
    arguments = [f"--model={model}", f"--text={text}", f"--out={out}", "--sites=resid_post.1",
                 f"--context_length={CONTEXT}", "--live", "--statistics_tokens=500"]  # fmt: skip
    assert main(["harvest", *arguments]) == 0
    printed = capsys.readouterr().out
    usable = int(lm.open_store(out).usable_rows[:, 0].sum())
    assert f"{usable:,} rows to train on" in printed
    assert f"Live: {model} computes them when they are read" in printed
    assert main(["store", f"--path={out}"]) == 0
    assert f"live: computed by {model} when they are read" in capsys.readouterr().out
    assert main(["store", f"--path={out}", "--check"]) == 0
    assert "what the model computes was not checked" in capsys.readouterr().out


def test_stores_of_version_1_are_read(tmp_path):
    """Those of tests/fixtures/stores, by their script made at d780916: every row, and of the live
    one the same rows."""
    saved = pathlib.Path(__file__).parent / "fixtures" / "stores"
    shutil.copytree(saved / "live", tmp_path / "live")
    file = tmp_path / "live" / "meta.json"
    meta = json.loads(file.read_text())
    meta["live"]["model"] = str(lm.DEMO_MODEL)
    file.write_text(json.dumps(meta))
    harvested, computed = lm.open_store(saved / "harvested"), lm.open_store(tmp_path / "live")
    harvested.check()
    assert (type(harvested), type(computed)) == (Store, lm.LiveStore)
    for site in ("resid_pre.0", "resid_post.0"):
        rows, again = (s.read(site, slice(None)).astype(np.float32) for s in (harvested, computed))
        assert rows.shape == (48, 128) and rows.any(axis=1).all()
        np.testing.assert_allclose(again, rows, rtol=2**-7, atol=2**-10)  # another machine's sums
    np.testing.assert_array_equal(*(s.usable_rows for s in (harvested, computed)))
    assert harvested.usable_rows[:, 0].sum() == 48 - 8  # BOS, of contexts and of documents


# ------------------------------------------------------------------------------------ training


def make_config(store, steps=20, mesh=(2, 2), **fields) -> Config:
    return Config(
        sae=TopKConfig(d_sae=64, k=4),
        data=DataConfig(
            store=store.path, site=SITES[0], batch_size=BATCH, virtual_shards=8, window_rows=256,
            epochs=20,
        ),
        train=TrainConfig(tokens=steps * BATCH, log_every=1, **fields),
        mesh=MeshConfig(data=mesh[0], model=mesh[1]),
    )  # fmt: skip


def losses(run) -> list[float]:
    return [line["loss"] for line in metrics(run)]


@pytest.mark.slow
def test_training_is_the_same_as_on_the_harvested_store(both, tmp_path):
    """On a mesh of 2 x 2 over the devices that also run the model; held-out figures too. And by
    two processes, each of which runs the model on its own two devices."""
    harvested, computed = (train_run(make_config(s), tmp_path / s.path[-4:]).result for s in both)
    want = losses(tmp_path / "sted")
    assert losses(tmp_path / "live") == want and len(want) == 20
    assert computed["eval_loss"] == harvested["eval_loss"] > 0
    config, flags = make_config(both[1]), together(2, devices=2)
    ends = finish_all([start(tmp_path / "two", config, *flags[i]) for i in range(2)])
    assert [end[0] for end in ends] == [0, 0], ends
    np.testing.assert_allclose(losses(tmp_path / "two"), want, rtol=1e-5)


@pytest.mark.long
def test_killed_and_resumed_it_ends_as_an_undisturbed_run_on_the_harvested_store(both, tmp_path):
    harvested, computed = (
        make_config(store, 200, (1, 1), checkpoint_every=20, keep_checkpoints=2) for store in both
    )
    train_run(harvested, tmp_path / "whole")
    run = tmp_path / "run"
    process = start(run, computed, "--cpu_devices=4")
    wait_until(lambda: logged_step(run) >= 90, process)
    process.kill()
    process.communicate()
    assert process.returncode == -9
    code, _, err = run_to_end(run, computed, "--cpu_devices=4")
    assert code == 0, err
    assert_same_arrays(saved_arrays(run), saved_arrays(tmp_path / "whole"))
