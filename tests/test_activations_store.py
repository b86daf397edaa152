"""The store: what is written comes back, and damage never passes for data."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import pytest

from sae_jax.activations import Store, StoreWriter, write_store
from sae_jax.bench.reading import measure_reading
from sae_jax.errors import UserError

BOS, EOS = 1, 2
CONTEXT, SEQUENCES = 12, 700
SITES = {"mlp_out.0": 6, "resid_post.1": 10}


def numpy_dtype(name):
    return np.dtype(getattr(ml_dtypes, name, name))


def make_tokens():
    tokens = np.random.default_rng(0).integers(3, 50, (SEQUENCES, CONTEXT), np.int32)
    tokens[:, 0] = BOS
    tokens[::7, 5] = EOS
    return tokens


def make_values(width, dtype="bfloat16", sink_position=None):
    """(rows, width), three times as large at BOS by id and, if asked, at a position."""
    x = np.random.default_rng(width).normal(1, 2, (SEQUENCES, CONTEXT, width))
    x[:, 0] *= 40
    if sink_position is not None:
        x[:, sink_position] *= 30
    return x.reshape(-1, width).astype(numpy_dtype(dtype))


def make_writer(path, **changes):
    arguments = {
        "sites": SITES,
        "dtype": "bfloat16",
        "context_length": CONTEXT,
        "num_sequences": SEQUENCES,
        "tokens": make_tokens(),
        "model": "a model",
        "tokenizer": "a tokenizer",
        "special_tokens": (BOS, EOS),
        "provenance": {"text": "random"},
    }
    return StoreWriter.create_or_resume(path, **arguments | changes)


def write_missing(writer, values):
    for shard in writer.missing_shards():
        rows = slice(shard.sequences.start * CONTEXT, shard.sequences.stop * CONTEXT)
        writer.write_shard(shard.index, {site: x[rows] for site, x in values.items()})


def make_store(path, values=None, **changes):
    writer = make_writer(path, **changes)
    write_missing(writer, values or {site: make_values(width) for site, width in SITES.items()})
    writer.finish()
    return Store.open(path)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store") / "s")


def test_rows_and_tokens_come_back(store):
    again = Store.open(store.path)
    for site, width in SITES.items():
        np.testing.assert_array_equal(again.read(site, slice(None)), make_values(width))
        np.testing.assert_array_equal(again.read(site, slice(30, 41)), make_values(width)[30:41])
    np.testing.assert_array_equal(again.tokens().read().result(), make_tokens())
    assert (again.meta.model, again.meta.tokenizer) == ("a model", "a tokenizer")
    assert again.meta.provenance == {"text": "random"}
    assert again.num_rows == SEQUENCES * CONTEXT
    again.check()


def test_layout_has_whole_sequences_many_chunks_and_several_shards(store):
    meta = store.meta
    assert meta.chunk_rows % CONTEXT == 0
    assert meta.shard_sequences % meta.chunk_sequences == 0
    assert meta.num_chunks >= 256 and meta.num_shards >= 8


def test_statistics_are_those_of_the_rows_kept(store):
    kept = ~np.isin(make_tokens().reshape(-1), [BOS, EOS])
    for site, width in SITES.items():
        x = make_values(width).astype(np.float64)[kept]
        meta = store.meta.sites[site]
        assert meta.rows_used == len(x) and meta.nonfinite_rows == 0
        np.testing.assert_allclose(meta.mean, x.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(meta.mean_squared_norm, (x**2).sum(axis=1).mean(), rtol=1e-12)


def test_special_tokens_are_excluded_wherever_they_stand(store):
    excluded = store.excluded.read().result()
    np.testing.assert_array_equal(
        excluded, np.isin(make_tokens().reshape(-1), [BOS, EOS]).astype(np.uint8)
    )
    assert store.meta.excluded_tokens == [BOS, EOS] and store.meta.excluded_positions == []
    assert str(int(excluded.sum())) in store.meta.excluded_why
    usable = store.usable_rows
    chunk = np.arange(store.num_rows) // store.meta.chunk_rows
    np.testing.assert_array_equal(usable[:, 0], np.bincount(chunk, excluded == 0))
    np.testing.assert_array_equal(usable[:, 1], np.bincount(chunk))


def test_high_norm_positions_are_found_without_knowing_bos(tmp_path):
    values = {site: make_values(width) for site, width in SITES.items()}
    values["resid_post.1"] = make_values(10, sink_position=3)
    store = make_store(tmp_path / "s", values, special_tokens=())
    assert store.meta.excluded_positions == [0, 3]  # of any site: one mask for all
    position = np.arange(store.num_rows) % CONTEXT
    np.testing.assert_array_equal(
        store.excluded.read().result(), 2 * np.isin(position, [0, 3]).astype(np.uint8)
    )
    assert "positions [0, 3]" in store.meta.excluded_why and "3 times" in store.meta.excluded_why
    x = values["resid_post.1"].astype(np.float64)[~np.isin(position, [0, 3])]
    meta = store.meta.sites["resid_post.1"]
    assert meta.rows_used == len(x)
    np.testing.assert_allclose(meta.mean, x.mean(axis=0), rtol=1e-12)


def test_nonfinite_rows_are_counted_marked_and_left_out(tmp_path):
    values = {site: make_values(width) for site, width in SITES.items()}
    values["mlp_out.0"][[100, 2000]] = [[np.nan], [np.inf]]
    values["resid_post.1"][101, 4] = -np.inf
    store = make_store(tmp_path / "s", values)
    marked = np.flatnonzero(store.excluded.read().result() & 4)
    assert marked.tolist() == [100, 101, 2000]
    assert [store.meta.sites[s].nonfinite_rows for s in SITES] == [2, 1]
    assert np.isfinite(store.meta.sites["mlp_out.0"].mean).all()
    assert "3 rows with NaN" in store.meta.excluded_why
    assert store.usable_rows[:, 1].sum() == store.num_rows - 3
    store.check()  # marked as such, so not damage


def test_chunk_of_nothing_but_nan_is_data(tmp_path):
    """Equal to what an unwritten chunk reads as, it must be stored all the same."""
    x = np.ones((2000, 4), np.float32)
    x[500:900] = np.nan
    store = write_store(tmp_path / "s", x)
    assert (store.usable_rows[:, 1] == 0).any()
    np.testing.assert_array_equal(store.read("", slice(None)), x)
    assert store.meta.sites["activations"].nonfinite_rows == 400


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_write_store_round_trip(tmp_path, dtype):
    x = np.random.default_rng(0).normal(size=(5003, 7)).astype(np.float32)
    uneven = (x[a:b] for a, b in zip([0, 1, 700, 900], [1, 700, 900, 5003], strict=True))
    store = write_store(tmp_path / "s", uneven, dtype=dtype)
    np.testing.assert_array_equal(store.read("", slice(None)), x.astype(numpy_dtype(dtype)))
    assert store.meta.num_chunks >= 256
    assert store.meta.excluded_positions == [] and store.tokens() is None
    store.check()


def test_write_store_of_more_than_a_shard_of_unknown_length(tmp_path, monkeypatch):
    monkeypatch.setattr("sae_jax.activations.from_arrays.SHARD_BYTES", 8192)
    monkeypatch.setattr("sae_jax.activations.writer.SHARD_BYTES", 8192)
    monkeypatch.setattr("sae_jax.activations.writer.CHUNK_BYTES", 1024)
    x = np.random.default_rng(0).normal(size=(30 * 331, 4)).astype(np.float32)
    store = write_store(tmp_path / "s", np.split(x, 331), context_length=10)
    assert store.meta.num_sequences == 993 and store.meta.num_shards > 8
    np.testing.assert_array_equal(store.read("", slice(None)), x)
    store.check()


def test_write_store_refuses_what_it_cannot_keep(tmp_path):
    x = np.ones((40, 3), np.float32)
    write_store(tmp_path / "s", x)
    with pytest.raises(UserError, match="already holds a store"):
        write_store(tmp_path / "s", x)
    with pytest.raises(UserError, match=r"after 40 rows a batch has shapes.*\(40, 2\)"):
        write_store(tmp_path / "widths", [x, x[:, :2]])
    with pytest.raises(UserError, match="not whole sequences of 7"):
        write_store(tmp_path / "length", [x], context_length=7)
    with pytest.raises(UserError, match=r"hold 40 rows, but 5 sequences of 10"):
        write_store(tmp_path / "t", [x], context_length=10, tokens=np.ones((5, 10), np.int32))
    with pytest.raises(UserError, match="no rows"):
        write_store(tmp_path / "none", [])
    with pytest.raises(UserError, match="dtype of a store is 'float64'"):
        write_store(tmp_path / "dtype", [x], dtype="float64")
    with pytest.raises(UserError, match="names a directory"):
        write_store(tmp_path / "site", [{"a/b": x}])


def test_resume_refuses_other_content(tmp_path, store):
    make_writer(tmp_path / "s")
    other = make_tokens()
    other[3, 3] += 1
    with pytest.raises(UserError, match="another store .*tokens_sha256"):
        make_writer(tmp_path / "s", tokens=other)
    with pytest.raises(UserError, match="another store .*float32"):
        make_writer(tmp_path / "s", dtype="float32")
    finished = make_writer(store.path)
    assert finished.missing_shards() == []
    finished.finish()
    assert Store.open(store.path).meta == store.meta


def test_shard_of_wrong_shape_is_refused(tmp_path):
    writer = make_writer(tmp_path / "s")
    with pytest.raises(UserError, match=r"site mlp_out.0 got .*\(5, 6\)"):
        writer.write_shard(0, {s: np.ones((5, w), np.float32) for s, w in SITES.items()})
    with pytest.raises(UserError, match="lacks 8 of 8 shards"):
        writer.finish()


def test_shards_of_two_writers_make_the_same_store(tmp_path, store):
    values = {site: make_values(width) for site, width in SITES.items()}
    writers = make_writer(tmp_path / "s"), make_writer(tmp_path / "s")
    for shard in reversed(writers[0].missing_shards()):
        rows = slice(shard.sequences.start * CONTEXT, shard.sequences.stop * CONTEXT)
        writers[shard.index % 2].write_shard(shard.index, {s: x[rows] for s, x in values.items()})
    assert writers[1].missing_shards() == []
    writers[1].finish()
    assert files_of(tmp_path / "s") == files_of(store.path)


KILLED_WRITER = """
import sys
sys.path.insert(0, sys.argv[2])
from test_activations_store import *
writer = make_writer(sys.argv[1])
values = {site: make_values(width) for site, width in SITES.items()}
print("ready", flush=True)
write_missing(writer, values)
time.sleep(60)
"""


def test_killed_writer_goes_on_and_leaves_the_same_bytes(tmp_path, store):
    here = pathlib.Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": str(here.parent)}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED_WRITER, str(tmp_path / "s"), str(here)],
        stdout=subprocess.PIPE,
        env=environment,
    )
    with process:
        process.stdout.readline()
        while not list((tmp_path / "s").glob("written/*.npz")):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    with pytest.raises(UserError, match="meta.json says the store is incomplete; start the same"):
        Store.open(tmp_path / "s")
    # What a kill in the middle of a shard leaves: an array's file without the shard's notes.
    writer = make_writer(tmp_path / "s")
    missing = {shard.index for shard in writer.missing_shards()}
    assert missing < set(range(writer.meta.num_shards))
    next((tmp_path / "s" / "written").glob("*.npz")).unlink()
    assert len(make_writer(tmp_path / "s").missing_shards()) == len(missing) + 1
    write_missing(writer, {site: make_values(width) for site, width in SITES.items()})
    writer.finish()
    assert files_of(tmp_path / "s") == files_of(store.path)


def files_of(path):
    """The bytes of every file that counts, by name; locks of a killed writer do not."""
    path = pathlib.Path(path)
    files = (f for f in path.rglob("*") if f.is_file() and "__lock" not in f.name)
    return {str(f.relative_to(path)): f.read_bytes() for f in files}


def edit_meta(path, **changes):
    file = path / "meta.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def flip_byte(file):
    data = bytearray(file.read_bytes())
    data[40] ^= 1
    file.write_bytes(data)


def truncate(file):
    os.truncate(file, file.stat().st_size - 1)


DAMAGE = {
    "meta.json is missing": lambda p: (p / "meta.json").unlink(),
    "meta.json is not valid JSON": lambda p: (p / "meta.json").write_text('{"for'),
    "meta.json has format version 99": lambda p: edit_meta(p, format_version=99),
    "meta.json is not as it must be: chunk_seq": lambda p: edit_meta(p, chunk_sequences="many"),
    "meta.json says the store is incomplete": lambda p: edit_meta(p, complete=False),
    "sites/mlp_out.0/c/2/0 is missing": lambda p: (p / "sites/mlp_out.0/c/2/0").unlink(),
    "sites/mlp_out.0/c/7/0 has .* bytes": lambda p: truncate(p / "sites/mlp_out.0/c/7/0"),
    "tokens/c/1/0 is missing": lambda p: (p / "tokens/c/1/0").unlink(),
    "excluded/c/0 has 0 bytes": lambda p: (p / "excluded/c/0").write_bytes(b""),
    "checksums/zarr.json is missing": lambda p: (p / "checksums/zarr.json").unlink(),
    "usable_rows/zarr.json does not fit": lambda p: (p / "usable_rows/zarr.json").write_text("{}"),
    "sites/mlp_out.0/c/7/0 .* it is damaged": lambda p: edit_meta(p, num_sequences=SEQUENCES + 1),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damage_is_refused_by_name(tmp_path, message):
    path = pathlib.Path(make_store(tmp_path / "s").path)
    DAMAGE[message](path)
    with pytest.raises(UserError, match=message):
        Store.open(path)


def test_altered_bytes_are_found_by_check(tmp_path):
    store = make_store(tmp_path / "s")
    flip_byte(tmp_path / "s" / "sites" / "resid_post.1" / "c" / "0" / "0")
    with pytest.raises(UserError, match=r"sites/resid_post.1: chunk 0 .* was altered"):
        store.check()


def test_missing_directory_and_unknown_site(tmp_path, store):
    with pytest.raises(UserError, match="no activation store at .*nowhere"):
        Store.open(tmp_path / "nowhere")
    with pytest.raises(UserError, match="several sites, choose one: mlp_out.0, resid_post.1"):
        store.resolve_site()
    with pytest.raises(UserError, match="did you mean 'resid_post.1'"):
        store.resolve_site("resid_pots.1")


def run_command(*arguments):
    root = pathlib.Path(__file__).parents[1]
    command = [sys.executable, "-m", "sae_jax", "store", *arguments]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
    )


@pytest.mark.slow
def test_command_shows_and_checks_a_store(tmp_path, store):
    shown = run_command(f"--path={store.path}", "--check")
    assert shown.returncode == 0, shown.stderr
    for fact in ("700 sequences of 12", "resid_post.1", "a model", "special tokens [1, 2]"):
        assert fact in shown.stdout
    assert "text: random" in shown.stdout and "all as written" in shown.stdout
    missing = run_command(f"--path={tmp_path / 'nowhere'}")
    assert missing.returncode == 2 and "no activation store at" in missing.stderr
    assert "Traceback" not in missing.stderr


def test_measuring_gives_rates_of_a_given_store(tmp_path):
    store = write_store(tmp_path / "s", np.ones((20_000, 8), np.float32))
    figures = measure_reading(store.path, batch_size=1024, rounds=1)
    assert figures["bytes"] == 20_000 * 8 * 4
    assert all(rate > 0 for rate in figures["warm"].values())
