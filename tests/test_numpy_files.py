"""NumPy's files: what it wrote comes back, and what is damaged or lies is told in one line."""

import io
import zipfile

import numpy as np
import pytest

from sae_jax.errors import UserError
from sae_jax.numpy_files import map_npy, read_npz

ARRAYS = {
    "rows": np.arange(6, dtype=np.float16).reshape(2, 3),
    "turned": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "one": np.float64(0.5),
    "none": np.zeros((0, 4), np.int32),
}


def test_what_numpy_wrote_comes_back(tmp_path):
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", **ARRAYS)
        found = read_npz(tmp_path / "a.npz")
        assert found.keys() == ARRAYS.keys()
        for name, array in ARRAYS.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array)
        assert list(read_npz(tmp_path / "a.npz", lambda names: names[:1])) == ["rows"]
    for array in (ARRAYS["rows"], ARRAYS["turned"]):
        np.save(tmp_path / "a.npy", array)
        np.testing.assert_array_equal(map_npy(tmp_path / "a.npy"), array)


HEADERS = {
    "larger than memory": "{'descr': '<f4', 'fortran_order': False, 'shape': (100000, 1000000)}",
    "larger than any": f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({2**62}, 4)}}",
    "below zero": "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}",
    "objects": "{'descr': '|O', 'fortran_order': False, 'shape': (2,)}",
    "fields": "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (2,)}",
    "no end": "{'descr': '<f4', 'fortran_order': False, 'shape': (2,",
    "nested": "(" * 5000,
    "no shape": "{'descr': '<f4', 'fortran_order': False}",
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_a_header_that_lies_is_told(tmp_path, header):
    text = header.encode() + b"\n"
    data = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(16)
    (tmp_path / "a.npy").write_bytes(data)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", data)
    for read, name in ((map_npy, "a.npy"), (read_npz, "a.npz")):
        with pytest.raises(UserError, match=f"{name} cannot be read") as caught:
            read(tmp_path / name)
        assert len(str(caught.value).splitlines()) == 1


def test_bombs_and_files_that_are_not_there(tmp_path):
    zeros = io.BytesIO()
    np.save(zeros, np.zeros(1 << 23, np.uint8))
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", zeros.getvalue())
    with pytest.raises(UserError, match="a.npz would unfold to 8,388,736 bytes"):
        read_npz(tmp_path / "a.npz")
    assert len(read_npz(tmp_path / "a.npz", slack=1 << 24)["a"]) == 1 << 23
    for read in (map_npy, read_npz):
        with pytest.raises(UserError, match="no x.npy in "):
            read(tmp_path / "x.npy")
        with pytest.raises(UserError, match="cannot be read"):
            read(tmp_path)
