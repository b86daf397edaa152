"""A damaged store is told as one: by `check`, when it is opened, and by a run that meets it."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from training import BATCH, make_config, make_store, sparse_rows

from sae_jax import lm
from sae_jax.activations import Store, Stream
from sae_jax.errors import UserError
from sae_jax.evaluate.sources import HeldOutRows
from sae_jax.train.directory import read_config
from sae_jax.train.results import run_id
from sae_jax.train.run import train_run

STORES = pathlib.Path(__file__).parent / "fixtures" / "stores"
ARRAYS = {  # what a message may name: one array is compared with another
    "harvested/sites": "sites/resid",
    "harvested/checksums": "sites/resid|checksums",
    "harvested/tokens": "tokens",
    "harvested/excluded": "excluded",
    "harvested/usable_rows": "usable_rows",
    "live/tokens": "tokens",
    "live/excluded": "excluded|usable_rows",  # which rows are NaN, the counts tell
    "live/usable_rows": "usable_rows",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return pathlib.Path(make_store(tmp_path_factory.mktemp("stores") / "whole"))


@pytest.fixture
def store(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "store")


def flip(file: pathlib.Path, place: int, bit: int = 0) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1 << bit
    file.write_bytes(data)


def edit(store: pathlib.Path, **fields) -> None:
    """Writes fields of meta.json; NAME__FIELD is one of the site."""
    values = json.loads((store / "meta.json").read_text())
    for name, value in fields.items():
        where = values
        if name.startswith("site__"):
            (where,), name = values["sites"].values(), name.removeprefix("site__")
        where[name] = value
    (store / "meta.json").write_text(json.dumps(values))


@pytest.mark.parametrize("array", ARRAYS)
def test_check_finds_a_flipped_bit_in_every_file(tmp_path, array):
    """The stores are those of an earlier version, which has no checksum of these files."""
    path = shutil.copytree(STORES / array.split("/")[0], tmp_path / "store")
    meta = json.loads((path / "meta.json").read_text())
    if meta["live"]:
        meta["live"]["model"] = str(lm.DEMO_MODEL)
        (path / "meta.json").write_text(json.dumps(meta))
    assert "as written" in lm.open_store(path).check()
    files = [
        f for f in (path / array.split("/")[1]).rglob("*") if f.is_file() and f.name != "zarr.json"
    ]
    assert files
    rng = np.random.default_rng(0)
    for file in files[:6]:
        before = file.read_bytes()
        for place in {0, len(before) - 1, int(rng.integers(len(before)))}:
            flip(file, place, bit=int(rng.integers(8)))
            with pytest.raises(UserError, match=f"store/({ARRAYS[array]})"):
                lm.open_store(path).check()
            file.write_bytes(before)


@pytest.mark.parametrize("field", ["site__mean", "site__mean_squared_norm", "site__rows_used"])
def test_check_finds_altered_statistics(store, field):
    (site,) = json.loads((store / "meta.json").read_text())["sites"].values()
    value = site[field.removeprefix("site__")]
    edit(store, **{field: [2 * x for x in value] if isinstance(value, list) else value - 1})
    with pytest.raises(UserError, match="meta.json has other statistics of site activations"):
        Store.open(store).check()


@pytest.mark.parametrize("fields", [
    {"complete": "no"},
    {"complete": None},
    {"num_sequences": 10**15},
    {"num_sequences": 1e15},
    {"num_sequences": 10**400},
    {"num_sequences": 0},
    {"chunk_sequences": 0},
    {"shard_sequences": 7},
    {"context_length": -8},
    {"sites": {}},
    {"sites": {"..": {"width": 16, "dtype": "float32"}}},
    {"sites": {"../../elsewhere": {"width": 16, "dtype": "float32"}}},
    {"sites": {"": {"width": 16, "dtype": "float32"}}},
    {"sites": ["activations"]},
    {"site__mean": [0.0] * 15},
    {"site__mean": [float("nan")] * 16},
    {"site__mean": [None] * 16},
    {"site__mean": "zero"},
    {"site__mean_squared_norm": float("inf")},
    {"site__mean_squared_norm": -1.0},
    {"site__rows_used": 10**9},
    {"site__width": True},
    {"site__dtype": "int8"},
    {"excluded_positions": [8]},
    {"excluded_positions": [-1]},
    {"tokens_sha256": 3},
    {"provenance": []},
    {"format_version": None},
    {"format_version": [1]},
    {"live": {"model": "m"}},
], ids=str)  # fmt: skip
def test_meta_json_that_is_not_one(store, fields):
    edit(store, **fields)
    with pytest.raises(UserError) as raised:
        Store.open(store)
    assert "\n" not in str(raised.value) and "store" in str(raised.value)


@pytest.mark.parametrize(
    "text", [b"", b"null", b"[]", b"\xff\xfe\x00", b"[" * 100_000, b'{"format']
)
def test_meta_json_that_is_no_object(store, text):
    (store / "meta.json").write_bytes(text)
    with pytest.raises(UserError, match=r"meta\.json.*make the store again"):
        Store.open(store)


def rows_of(store: pathlib.Path, split: str, step: int) -> np.ndarray:
    stream = Stream(Store.open(store), batch_size=BATCH, seed=0, split=split, virtual_shards=8,
                    window_rows=1024)  # fmt: skip
    return stream.batch_rows(step)


def put_nan(store: pathlib.Path, row: int) -> None:
    """Writes NaN into a row, past everything that would note it."""
    site = Store.open(store)
    handle = site._arrays["sites/activations"].open(site.folder)
    handle[row].write(np.full(16, np.nan, np.float32)).result()


@pytest.mark.parametrize("skip", ["stop", "skip"])
def test_nan_in_a_training_row_is_not_the_learning_rates_fault(store, tmp_path, skip):
    row = int(rows_of(store, "train", 3)[5])
    put_nan(store, row)
    config = make_config(str(store), steps=10, train={"on_nonfinite": skip})
    with pytest.raises(UserError, match="sites/activations: chunk .* the store is damaged") as said:
        train_run(config, tmp_path / "run")
    assert "learning_rate" not in str(said.value)
    assert not (tmp_path / "run" / "result.json").exists()


def test_nan_in_a_held_out_row_is_damage(store, tmp_path):
    put_nan(store, int(rows_of(store, "heldout", 0)[5]))
    with pytest.raises(UserError, match="sites/activations: chunk .* the store is damaged"):
        train_run(make_config(str(store), steps=3), tmp_path / "run")
    assert not (tmp_path / "run" / "result.json").exists()
    source = HeldOutRows(Store.open(store), "", tokens=1000, holdout_fraction=0.05)
    with pytest.raises(UserError, match="sites/activations: chunk .* the store is damaged"):
        list(source.batches(64))


@pytest.mark.parametrize("array", ["sites", "excluded"])
@pytest.mark.slow
def test_files_that_vanish_during_training(store, tmp_path, array):
    def remove(line):
        if line["step"] == 2:
            for file in (store / array).rglob("[0-9]*"):
                if file.is_file():
                    file.unlink()

    config = make_config(str(store), steps=100)
    with pytest.raises(UserError, match=f"store/({array}|usable_rows).* the store is damaged"):
        train_run(config, tmp_path / "run", on_metrics=[remove])
    assert not (tmp_path / "run" / "result.json").exists()


def test_an_sae_that_diverges_at_its_last_step_leaves_valid_json(tmp_path):
    """Nothing is wrong with the store here; JSON has no NaN."""
    store = make_store(tmp_path / "store", sparse_rows(8192) * 1e18)
    config = make_config(store, "relu", steps=1, optimizer={"learning_rate": 1e30})
    result = train_run(config, tmp_path / "run").result

    def refuse(name):
        raise AssertionError(f"{name} in result.json")

    text = (tmp_path / "run" / "result.json").read_text()
    assert json.loads(text, parse_constant=refuse) == result and result["eval_loss"] is None


def test_a_run_goes_on_with_its_store_wherever_that_is_and_with_no_other(whole, tmp_path):
    """The path is where the data are, not what they are."""
    store = shutil.copytree(whole, tmp_path / "store")
    run = tmp_path / "run"
    begun = make_config(str(store), steps=4, train={"checkpoint_every": 2})

    def stop(line):
        if line["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_run(begun, run, on_metrics=[stop])
    moved = str(shutil.move(store, tmp_path / "moved"))
    make_store(store, sparse_rows(8192, seed=1))
    with pytest.raises(UserError, match=f"on other data: {store} is not the store that it began"):
        train_run(begun, run)
    with pytest.raises(UserError, match="data.store: .*/store' -> '.*/third'"):
        third = make_store(tmp_path / "third", sparse_rows(8192, seed=2))
        train_run(make_config(third, steps=4, train={"checkpoint_every": 2}), run)
    result = train_run(make_config(moved, steps=4, train={"checkpoint_every": 2}), run).result
    undisturbed = train_run(
        make_config(str(whole), steps=4, train={"checkpoint_every": 2}), tmp_path / "other"
    ).result
    assert result["eval_loss"] == undisturbed["eval_loss"]
    assert result["run_id"] == run_id(read_config(run))


def test_a_run_of_an_earlier_version_goes_on(store, tmp_path):
    """It has no fingerprint of its data, so its store must be where it was."""
    run, config = tmp_path / "run", make_config(str(store), steps=4, train={"checkpoint_every": 2})
    train_run(config, run)
    values = json.loads((run / "config.json").read_text())
    assert values["environment"].pop("data_fingerprint") == Store.open(store).fingerprint
    (run / "config.json").write_text(json.dumps(values))
    (run / "result.json").unlink()
    assert train_run(config, run).result["tokens"] == 4 * BATCH
    (run / "result.json").unlink()
    moved = str(shutil.move(store, tmp_path / "moved"))
    with pytest.raises(UserError, match="data.store: .*/store' -> '.*/moved'"):
        train_run(make_config(moved, steps=4, train={"checkpoint_every": 2}), run)
