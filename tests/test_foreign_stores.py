"""Activations that others saved become stores: SAELens' cache, .npy, .safetensors."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from sae_jax.activations import Store, writer
from sae_jax.activations.foreign import convert
from sae_jax.cli import main
from sae_jax.errors import UserError

WIDTH = 6


def rows(count, dtype="float32", seed=0):
    x = np.random.default_rng(seed).normal(size=(count, WIDTH))
    return x.astype(getattr(ml_dtypes, dtype, dtype))


def save(file, x, name="x"):
    if file.suffix == ".npy":
        np.save(file, x)
    else:
        safetensors.numpy.save_file({name: x}, file)


@pytest.mark.parametrize("suffix, dtype", [
    (".npy", "float16"), (".npy", "float64"), (".safetensors", "float32"),
    (".safetensors", "bfloat16"),
])  # fmt: skip
def test_plain_files_come_back_in_the_order_of_their_names(tmp_path, suffix, dtype):
    x = rows(70, dtype)
    for number, part in enumerate((x[:30], x[30:40], x[40:])):
        save(tmp_path / f"{number}{suffix}", part)
    (tmp_path / "README.txt").write_text("not activations")
    arguments = [f"--from={tmp_path}", f"--out={tmp_path / 'store'}"]
    assert main(["store", *arguments, "--site=mlp_out.3", "--context_length=5"]) == 0
    store = Store.open(tmp_path / "store")
    assert (store.meta.context_length, store.meta.num_sequences) == (5, 14)
    stored = "float32" if dtype == "float64" else dtype
    assert store.meta.sites["mlp_out.3"].dtype == stored
    np.testing.assert_array_equal(
        store.read("mlp_out.3", slice(None)), x.astype(getattr(ml_dtypes, stored, stored))
    )
    store.check()


def test_a_tensor_of_several_is_named(tmp_path):
    x = rows(20)
    safetensors.numpy.save_file({"a": x, "b": -x}, tmp_path / "s.safetensors")
    with pytest.raises(UserError, match=r"s.safetensors holds 2 tensors \(a, b\); say which"):
        convert(tmp_path, tmp_path / "store")
    store = convert(tmp_path / "s.safetensors", tmp_path / "store", site="b")
    np.testing.assert_array_equal(store.read("b", slice(None)), -x)


def cut(file, x):
    save(file, x)
    file.write_bytes(file.read_bytes()[:-10])


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
@pytest.mark.parametrize(
    "spoil, message",
    [
        (cut, "cannot be read, it is damaged or cut off"),
        (lambda file, x: file.write_bytes(b""), "cannot be read, it is damaged or cut off"),
        (lambda file, x: save(file, x[:, :-1].copy()), "is 5 wide, but 0.[a-z]* is 6"),
        (lambda file, x: save(file, x[None]), r"has shape \(1, 20, 6\); it must be \(rows"),
        (lambda file, x: save(file, x.astype(np.int32)), "not activations in floating point"),
        (lambda file, x: save(file, x[:-1]), "has 19 rows, not whole sequences of 4"),
    ],
    ids=["cut off", "empty", "width", "shape", "whole numbers", "length"],
)  # fmt: skip
def test_a_file_that_will_not_do_is_named(tmp_path, suffix, spoil, message):
    save(tmp_path / f"0{suffix}", rows(20))
    spoil(tmp_path / f"1{suffix}", rows(20))
    with pytest.raises(UserError, match=f"1{suffix} {message}|1{suffix} .*{message}") as caught:
        convert(tmp_path, tmp_path / "store", context_length=4)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "store").exists()


def test_rows_with_nan_are_kept_marked_and_told(tmp_path, caplog):
    x = rows(40)
    x[7, 2], x[30, 0] = np.nan, np.inf
    save(tmp_path / "0.npy", x[:20])
    save(tmp_path / "1.npy", x[20:])
    store = convert(tmp_path, tmp_path / "store")
    assert store.meta.sites["activations"].nonfinite_rows == 2
    assert list(np.flatnonzero(store.excluded.read().result())) == [7, 30]
    assert "0.npy: 1 of rows" in caplog.text and "1.npy: 1 of rows" in caplog.text


def test_a_conversion_that_was_stopped_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "SHARD_BYTES", 64 * WIDTH * 4)
    x = rows(1000)
    save(tmp_path / "x.npy", x)

    def stopped(shards):
        yield from shards[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "x.npy", tmp_path / "store", progress=stopped)
    left = []
    store = convert(tmp_path / "x.npy", tmp_path / "store", progress=lambda s: left.extend(s) or s)
    assert store.meta.num_shards > 4 and len(left) == store.meta.num_shards - 3
    np.testing.assert_array_equal(store.read("activations", slice(None)), x)
    save(tmp_path / "other.npy", rows(999))
    with pytest.raises(UserError, match="already holds another store"):
        convert(tmp_path / "other.npy", tmp_path / "store")


@pytest.mark.parametrize("arguments, message", [
    (["--out=s"], "give either --path=STORE, or --from=FILES"),
    (["--from=nowhere"], "--from needs --out"),
    (["--from=nowhere", "--out=s"], "no activations at nowhere"),
])  # fmt: skip
def test_mistakes_of_the_command(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["store", *arguments]) == 2
    assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------------- SAELens

HOOK, T = "blocks.2.hook_resid_post", 8


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """(folder, x (n, T, WIDTH), ids (n, T)): SAELens' own shards and its own consolidation."""
    torch = pytest.importorskip("torch")
    runner = pytest.importorskip("sae_lens.cache_activations_runner").CacheActivationsRunner
    from datasets import Array2D, Features, Sequence, Value

    root = tmp_path_factory.mktemp("cache")
    x = np.random.default_rng(0).normal(size=(60, T, WIDTH)).astype(np.float32)
    ids = np.random.default_rng(1).integers(0, 50, (60, T)).astype(np.int32)
    made = runner.__new__(runner)  # without a model, which the writing does not need
    made.context_size = T
    made.cfg = type("Config", (), {"hook_name": HOOK, "n_seq_in_buffer": 20, "d_in": WIDTH})
    made.features = Features({
        HOOK: Array2D(shape=(T, WIDTH), dtype="float32"),
        "token_ids": Sequence(Value(dtype="int32"), length=T),
    })  # fmt: skip
    for number in range(3):
        part = slice(20 * number, 20 * number + 20)
        shard = made._create_shard(
            (torch.from_numpy(x[part].reshape(-1, WIDTH)), torch.from_numpy(ids[part].reshape(-1)))
        )
        shard.save_to_disk(str(root / ".tmp" / f"shard_{number:05d}"), num_shards=1)
    (root / "cache").mkdir()
    runner._consolidate_shards(root / ".tmp", root / "cache", copy_files=False)
    return root / "cache", x, ids


@pytest.mark.peers
@pytest.mark.filterwarnings("default")  # of what the peers import
def test_what_saelens_cached(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "SHARD_BYTES", 7 * T * WIDTH * 4)  # shards across its files
    folder, x, ids = cache
    assert main(["store", f"--from={folder}", f"--out={tmp_path / 'store'}"]) == 0
    store = Store.open(tmp_path / "store")
    np.testing.assert_array_equal(store.read("resid_post.2", slice(None)), x.reshape(-1, WIDTH))
    np.testing.assert_array_equal(store.tokens().read().result(), ids)
    assert convert(folder, tmp_path / "named", site=HOOK).resolve_site() == HOOK


@pytest.mark.peers
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "damage", ["cut off", "missing", "another column", "another shape", "bomb"]
)
def test_a_damaged_cache_is_refused_by_the_name_of_its_file(cache, tmp_path, damage):
    folder = shutil.copytree(cache[0], tmp_path / "cache")
    file = sorted(folder.glob("*.arrow"))[1]
    if damage == "cut off":
        file.write_bytes(file.read_bytes()[:-3000])
    elif damage == "missing":
        file.unlink()
    else:
        info = folder / "dataset_info.json"
        content = json.loads(info.read_text())
        feature = content["features"].pop(HOOK)
        name = HOOK if damage in ("another shape", "bomb") else "blocks.3.hook_resid_post"
        feature["shape"] = {
            "another shape": [T + 1, WIDTH], "bomb": [10**12, WIDTH],
        }.get(damage, feature["shape"])  # fmt: skip
        content["features"][name] = feature
        info.write_text(json.dumps(content))
        file = sorted(folder.glob("*.arrow"))[0]
    with pytest.raises(UserError, match=file.name) as caught:
        convert(folder, tmp_path / "store")
    assert "\n" not in str(caught.value)


@pytest.mark.peers
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("file", ["state.json", "dataset_info.json"])
@pytest.mark.parametrize("content", [
    b"", b"[]", b"null", b"\xff\xfe\x00", b"[" * 100_000, b"{}",
    b'{"_data_files": [], "features": []}',
    b'{"_data_files": [{"filename": "../../elsewhere.arrow"}], "features": {"a": 3}}',
    b'{"_data_files": [{"filename": 3}], "features": {"a": {"_type": "Array2D", "shape": "8, 6"}}}',
    b'{"_data_files": 3, "features": {"a": {"_type": "Array2D", "shape": [-8, 6], "dtype": "x"}}}',
], ids=lambda content: repr(content)[:40])  # fmt: skip
def test_a_cache_that_does_not_describe_itself(cache, tmp_path, file, content):
    folder = shutil.copytree(cache[0], tmp_path / "cache")
    (folder / file).write_bytes(content)
    with pytest.raises(UserError, match=r"cache") as caught:
        convert(folder, tmp_path / "store")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("header", [
    b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 6), }",
    b"{'descr': '<f4', 'fortran_order': False, 'shape': (-20, 6), }",
    b"{'descr': '<f4', 'fortran_order': False, 'shape': 'x', }",
    b"{'descr': '|O', 'fortran_order': False, 'shape': (20, 6), }",
    b"{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (20,), }",
    b"{'descr': '<f4'",
    b"(" * 200,
    b"",
])  # fmt: skip
def test_a_header_that_lies(tmp_path, header):
    header = header.ljust(246) + b"\n"
    data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(480)
    (tmp_path / "0.npy").write_bytes(data)
    with pytest.raises(UserError, match=r"0\.npy"):
        convert(tmp_path, tmp_path / "store")
    assert not (tmp_path / "store").exists()
