"""A damaged checkpoint is named, and never read as another SAE; old ones without checksums load."""

import gc
import json
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from training import BATCH, make_config, make_store, saved_arrays

import sae_jax
from sae_jax.errors import UserError
from sae_jax.train import checkpoints
from sae_jax.train.checkpoints import load_sae
from sae_jax.train.checksums import checksums
from sae_jax.train.run import train_run

# What Orbax's reading threads had under way ends after their event loop.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

STEPS = {"checkpoint_every": 2, "log_every": 2}
FLIPS = 100


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run with checkpoints of steps 2 and 4, and its config."""
    folder = tmp_path_factory.mktemp("done")
    config = make_config(make_store(folder / "store"), steps=4, train=STEPS)
    train_run(config, folder / "run")
    return folder / "run", config


@pytest.fixture(autouse=True)
def collected():
    yield
    gc.collect()  # it leaves sockets behind, which must not be another test's


@pytest.fixture
def run(done, tmp_path):
    return shutil.copytree(done[0], tmp_path / "run")


def edit(file, **fields) -> None:
    values = json.loads(file.read_text())
    values["sae"] = {n: v for n, v in (values["sae"] | fields).items() if v is not ...}
    file.write_text(json.dumps(values))


def without_checksums(run) -> None:
    """Makes checkpoints as an earlier version wrote them."""
    for file in (run / "checkpoints").glob("*/_CHECKPOINT_METADATA"):
        values = json.loads(file.read_text())
        assert values.pop("custom_metadata")["checksums"]
        file.write_text(json.dumps(values))


@pytest.mark.slow
def test_flipped_bits_are_named_or_harmless(done, run):
    want = {name: np.asarray(x) for name, x in load_sae(done[0]).parameters().items()}
    folder, refused = run / "checkpoints" / "4", 0
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.stat().st_size)
    sizes = np.array([f.stat().st_size for f in files])
    rng = np.random.default_rng(0)
    for i in range(FLIPS):
        # every file in turn, and every other time a place among all the bytes
        file = files[i // 2 % len(files)] if i % 2 else rng.choice(files, p=sizes / sizes.sum())
        whole = file.read_bytes()
        data = bytearray(whole)
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        file.write_bytes(data)
        try:
            sae = load_sae(run)
        except UserError as error:
            assert str(folder) in str(error) or "checkpoint 4" in str(error), (file, error)
            assert "NoneType" not in str(error) and "\n" not in str(error), (file, error)
            refused += 1
        else:
            for name, x in sae.parameters().items():
                np.testing.assert_array_equal(x, want[name], err_msg=str(file))
        file.write_bytes(whole)
    assert refused > FLIPS // 8


def test_values_that_were_altered_are_named_when_a_run_resumes(run, done, monkeypatch):
    """Whatever altered them: here all that is between the file and the state."""
    (run / "result.json").unlink()
    load = checkpoints._OrbaxCheckpointer.load

    def altered(self, step, like):
        tree = load(self, step, like)
        w_enc = np.array(tree["parameters"]["w_enc"])
        w_enc.view(np.uint32)[3, 5] ^= 1
        placed = jax.device_put(w_enc, tree["parameters"]["w_enc"].sharding)
        return tree | {"parameters": tree["parameters"] | {"w_enc": placed}}

    monkeypatch.setattr(checkpoints._OrbaxCheckpointer, "load", altered)
    for read in (lambda: train_run(done[1], run), lambda: load_sae(run)):
        with pytest.raises(UserError, match="checkpoint 4 .*parameters/w_enc .*checksum.* step 2"):
            read()
    monkeypatch.undo()
    shutil.rmtree(run / "checkpoints" / "4")
    train_run(done[1], run)
    for name, x in saved_arrays(done[0]).items():
        np.testing.assert_array_equal(saved_arrays(run)[name], x)


@pytest.mark.parametrize("fields, words", [
    ({"d_sae": 64}, "d_sae 128 -> 64"),
    ({"architecture": "batchtopk", "multi_topk": ...}, "architecture 'topk' -> 'batchtopk'"),
    ({"k": 3}, "k 2 -> 3"),
    ({"d_sae": 64, "old": True}, "config.json does not describe checkpoint 4 of the run"),
])  # fmt: skip
def test_a_config_that_was_edited_is_named(run, fields, words):
    if fields.pop("old", False):  # their shapes tell
        without_checksums(run)
    edit(run / "config.json", **fields)
    with pytest.raises(UserError, match=words):
        sae_jax.load(run)


@pytest.mark.parametrize("step", ["2", "4"])
@pytest.mark.parametrize("text", ['"x"', '{"init_timestamp_nsecs": {}}', '{"y": 1}'])
@pytest.mark.slow
def test_a_checkpoint_whose_description_says_nonsense_is_named(run, done, step, text):
    """Orbax reads those of all checkpoints before any is asked for."""
    file = run / "checkpoints" / step / "_CHECKPOINT_METADATA"
    file.write_text(text)
    try:
        sae = load_sae(run)
    except UserError as error:
        assert str(file.parent) in str(error) or f"checkpoint {step} " in str(error)
    else:
        assert step == "2" and sae.config == load_sae(done[0]).config
    if text == '"x"':
        with pytest.raises(UserError, match=f"checkpoints/{step} cannot be read: .*; delete it"):
            load_sae(run)
    shutil.rmtree(file.parent)
    load_sae(run)


def test_checkpoints_of_an_earlier_version_load_and_resume(run, done):
    without_checksums(run)
    want = load_sae(done[0]).parameters()
    for name, x in load_sae(run).parameters().items():
        np.testing.assert_array_equal(x, want[name])
    (run / "result.json").unlink()
    assert train_run(done[1], run).result["tokens"] == 4 * BATCH


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "bool", "float8_e4m3fn"])
@pytest.mark.slow
def test_a_checksum_is_of_the_values_and_their_places(dtype):
    x = np.random.default_rng(0).normal(size=(24, 8)) * 4
    x = jax.numpy.asarray(x > 0 if dtype == "bool" else x).astype(dtype)
    (whole,) = checksums({"x": x}).values()
    swapped = x.at[0].set(x[1]).at[1].set(x[0])
    others = [swapped, x[::-1], x.T, x.at[5, 3].set(~x[5, 3] if dtype == "bool" else x[5, 3] + 1)]
    assert whole not in {checksums({"x": other})["x"] for other in others}
    mesh = jax.make_mesh((2, 2), ("data", "model"))
    for spec in (P(), P("data", "model"), P(("model", "data"), None), P(None, "model")):
        placed = jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
        assert checksums({"x": placed})["x"] == whole
        with jax.set_mesh(mesh):
            assert checksums({"x": placed})["x"] == whole
