"""A place that a store cannot be written to or read from is told in one line that says why."""

import encodings.cp437  # noqa: F401  used later, by a user who may not read Python's own files
import encodings.utf_8_sig  # noqa: F401
import os
import pathlib
import shutil
import tempfile

import numpy as np
import pytest

from sae_jax import lm
from sae_jax.activations import Store, StoreWriter, convert, write_store
from sae_jax.cli import main
from sae_jax.errors import UserError


@pytest.mark.parametrize("folder", ["../made", "a/../b", "./c/../../made"])
def test_a_path_may_lead_upwards(tmp_path, monkeypatch, folder):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write_store(folder, [ROWS], context_length=16)
    assert main(["store", f"--path={folder}"]) == 0
    assert (tmp_path / "here" / folder / "meta.json").resolve().exists()


ROWS = np.ones((64, 4), np.float32) * np.arange(64, dtype=np.float32)[:, None]


@pytest.fixture
def place():
    """A folder of a user without rights, who this process is meanwhile: root may do anything."""
    folder = pathlib.Path(tempfile.mkdtemp())
    source = folder / "rows"
    source.mkdir()
    np.save(source / "0.npy", ROWS)
    (folder / "text.txt").write_text("some words of a text, and some more of them\n" * 20)
    if os.geteuid() == 0:
        for path in (folder, *folder.rglob("*")):
            os.chown(path, 65534, 65534)
        os.seteuid(65534)
        yield folder
        os.seteuid(0)
    else:
        yield folder
    for path in folder.rglob("*"):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)
    shutil.rmtree(folder)


def forbidden(folder):
    (folder / "forbidden").mkdir(mode=0o555)
    return folder / "forbidden" / "store"


def closed(folder):
    (folder / "closed").mkdir(mode=0o000)
    return folder / "closed" / "store"


def under_a_file(folder):
    (folder / "file").write_text("")
    return folder / "file" / "store"


def a_file(folder):
    (folder / "file").write_text("")
    return folder / "file"


def link_loop(folder):
    (folder / "link").symlink_to(folder / "link")
    return folder / "link" / "store"


PLACES = {
    forbidden: "Permission denied; give another place",
    closed: "Permission denied; give another place",
    under_a_file: "Not a directory; a part of this path is a file|is a file",
    a_file: "Not a directory; a part of this path is a file|is a file",
    link_loop: "Too many levels of symbolic links; a link leads back to itself",
}
WRITERS = {
    "write_store": lambda folder, out: write_store(out, [ROWS]),
    "convert": lambda folder, out: convert(folder / "rows", out),
    "harvest": lambda folder, out: lm.harvest(
        lm.DEMO_MODEL, folder / "text.txt", out, sites="resid_post.0", context_length=8
    ),
}


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("where", PLACES)
def test_a_store_that_cannot_be_written(place, where, write):
    out = where(place)
    with pytest.raises(UserError, match=PLACES[where]) as said:
        WRITERS[write](place, out)
    assert "\n" not in str(said.value) and str(out) in str(said.value)


@pytest.mark.parametrize("where", PLACES)
def test_a_store_that_cannot_be_read(place, where, capsys):
    out = where(place)
    expected = f"{PLACES[where]}|no activation store at"
    with pytest.raises(UserError, match=expected):
        Store.open(out)
    assert main(["store", f"--path={out}"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("file", [
    "meta.json",
    "usable_rows/zarr.json",
    "usable_rows/c/0/0",
    "checksums/c/0/0",
    "excluded/c/0",
    "sites/activations/zarr.json",
    "sites/activations/c/0/0",
    "sites",
])  # fmt: skip
def test_a_file_that_may_not_be_read_is_not_called_damaged(place, file):
    store = pathlib.Path(write_store(place / "store", [ROWS]).path)
    (store / file).chmod(0)
    with pytest.raises(
        UserError, match=f"store/{file.split('/c/')[0]}.*: Permission denied"
    ) as said:
        found = Store.open(store)
        found.fingerprint  # noqa: B018
        found.check()
    assert "make" not in str(said.value)


def test_damaged_notes_of_a_shard_are_named(tmp_path):
    arguments = {"sites": {"a": 4}, "num_sequences": 64, "context_length": 1, "dtype": "float32"}
    writer = StoreWriter.create_or_resume(tmp_path, **arguments)
    for shard in writer.missing_shards():
        writer.write_shard(shard.index, {"a": ROWS[shard.sequences]})
    file = tmp_path / "written" / "000003.npz"
    data = file.read_bytes()
    sums = data.index(b"a/rest.npy") + 150  # within its numbers
    for damaged in (data[:sums] + b"xx" + data[sums + 2 :], data[:50], b""):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="written/000003.npz is damaged.*; remove that file"):
            writer.finish()
    file.unlink()
    (shard,) = writer.missing_shards()
    writer.write_shard(shard.index, {"a": ROWS[shard.sequences]})
    writer.finish()
    assert "as written" in Store.open(tmp_path).check()


def test_two_writers_of_one_store(place):
    """Both write the same bytes; who comes later finds it finished, whenever that is."""
    arguments = {"sites": {"a": 4}, "num_sequences": 64, "context_length": 1, "dtype": "float32"}
    first, second, third = (
        StoreWriter.create_or_resume(place / "store", **arguments) for _ in range(3)
    )
    shards = first.missing_shards()
    for writer in (first, second):
        for shard in shards[: 3 if writer is second else None]:
            writer.write_shard(shard.index, {"a": ROWS[shard.sequences]})
    read = third._notes

    def finished_meanwhile():
        for i, notes in enumerate(read()):
            if i == 2:
                first.finish()
            yield i, notes

    third._notes = finished_meanwhile
    third.finish()
    second.write_shard(3, {"a": ROWS[shards[3].sequences]})
    assert not second.missing_shards()
    second.finish()
    assert "as written" in Store.open(place / "store").check()
    assert not (place / "store" / "written").exists()


@pytest.mark.parametrize("path", ["/", "//"])
def test_the_root_of_the_disk_holds_no_store(path):
    with pytest.raises(UserError, match="no activation store|not a store|meta.json"):
        lm.open_store(path)
