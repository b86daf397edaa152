"""Damages files: what a bad disk, a broken download, another program or an attacker makes of them.

`damage` draws one change to one file from a NumPy generator, so that a seed says all of it. Half of
the changes know the file's format: JSON stays JSON with another value in it, safetensors and NumPy
files get headers that lie or arrays of another kind. The other half are changes of bytes.
"""

import bz2
import gzip
import io
import json
import lzma
import pathlib
import shutil
import struct
import zipfile
from collections.abc import Callable, Sequence

import numpy as np
import safetensors
import safetensors.numpy

_RAW = "\ue000{}\ue001"  # stands in JSON for text that no value of Python is written as
_RAW_TEXTS = (
    "9" * 5000, "-" + "9" * 5000, "1e400", "[" * 100_000, "[" * 3000 + "]" * 3000,
    '{"a":' * 3000 + "1" + "}" * 3000, "NaN", "Infinity", "-Infinity", '"\\ud800"', "0x10", "1_000",
)  # fmt: skip
_NAMES = (
    "../x", "../../x", "a/../../x", "/etc/hostname", "..", ".", "", "/", "~", "~nobody-here/x",
    "a\\b", "a\0b", "con", "x" * 300, "x" * 100_000, "\u202e", "é", " ", "\n", 'a"""b', "$x$",
)  # fmt: skip
_VALUES = (
    None, True, False, 0, 1, -1, 2, 3, 7, 255, 65536, 2**31 - 1, 2**31, -(2**31) - 1, 2**32,
    2**53 + 1, 2**63 - 1, 2**63, -(2**63) - 1, 2**64, 10**9, 10**12, 10**15, 10**30, 10**400, 0.0,
    -0.0, 0.5, 1.0, -1.5, 1e-320, 1e38, 1e39, 1e308, [], {}, [None], [[]], [0], [1, 2, 3], ["x"],
    {"a": 1}, {"": None}, "false", "true", "1", "0", "1.5", "none", "null", "nan", "x", "float32",
    "int8", "abc", "1e9", b"bytes".hex(), *_NAMES,
)  # fmt: skip
_DTYPES = (
    "float64", "float32", "float16", "int64", "int32", "int8", "uint8", "uint16", "bool",
)  # fmt: skip
_SAFETENSORS_DTYPES = (
    "F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "U64", "F8_E4M3",
    "F8_E5M2", "C64", "F4", "x",
)  # fmt: skip
_NPY_DTYPES = (
    "<f8", "<f4", ">f4", "<f2", "<i8", "<u2", "|b1", "|O", "<U100000", "|V8", "<c8", "<M8[s]",
    "x", "f" * 500, "<f99",
)  # fmt: skip


def damage(rng: np.random.Generator, folder: pathlib.Path, files: Sequence[str]) -> str:
    """Changes one of the `files` of `folder`, and returns in words what was done.

    The file that is written is a new one under the old name, so that what still has the old one
    open does not see it change.
    """
    name = files[rng.integers(len(files))]
    file = folder / name
    if rng.random() < 0.06:
        what = _PLACES[rng.integers(len(_PLACES))]
        what(rng, file, [folder / other for other in files])
        return f"{name}: {what.__name__.strip('_')}"
    data, what = _changed(rng, file.name, file.read_bytes())
    _write(file, data)
    return f"{name}: {what}"


def _changed(rng: np.random.Generator, name: str, data: bytes) -> tuple[bytes, str]:
    """Returns other content for a file, and in words what is other about it."""
    change = _changer(name, data)
    if change is None or rng.random() < 0.35:
        return _change_bytes(rng, data)
    try:
        return change(rng, data)
    except _NOT_AS_NAMED as error:  # damaged before
        data, what = _change_bytes(rng, data)
        return data, f"{what} (no structure: {type(error).__name__})"


def _changer(name: str, data: bytes) -> Callable | None:
    suffixes = pathlib.PurePath(name).suffixes
    if suffixes and suffixes[-1] in _COMPRESSED:
        return lambda rng, data: _change_compressed(rng, name, data)
    if suffixes and suffixes[-1] in _BY_SUFFIX:
        return _BY_SUFFIX[suffixes[-1]]
    return _change_json if data[:1] in (b"{", b"[") else None  # Orbax's files have no suffix


def _write(file: pathlib.Path, data: bytes) -> None:
    temporary = file.with_name(f"{file.name}.fuzz")
    temporary.write_bytes(data)
    temporary.replace(file)


# ---------------------------------------------------------------------------- what is at the place


def _missing(rng, file, others):
    file.unlink()


def _folder(rng, file, others):
    file.unlink()
    file.mkdir()


def _link_loop(rng, file, others):
    file.unlink()
    file.symlink_to(file.name)


def _dangling_link(rng, file, others):
    file.unlink()
    file.symlink_to("nothing-there")


def _another_file(rng, file, others):
    _write(file, others[rng.integers(len(others))].read_bytes())


_PLACES = (_missing, _folder, _link_loop, _dangling_link, _another_file)


# ------------------------------------------------------------------------------------------- bytes


def _change_bytes(rng: np.random.Generator, data: bytes) -> tuple[bytes, str]:
    """Returns the bytes with one to three changes that know nothing of the format."""
    words = []
    for _ in range(1 + (rng.random() < 0.2) + (rng.random() < 0.1)):
        change = _BYTE_CHANGES[rng.integers(len(_BYTE_CHANGES))]
        data, what = change(rng, data)
        words.append(what)
    return data, ", ".join(words)


def _place(rng, data) -> int:
    """Returns a place in the bytes, the first and last hundred more often than others: headers."""
    near = rng.integers(3)
    if near == 0 or len(data) < 200:
        return int(rng.integers(len(data) + 1))
    return int(rng.integers(100)) if near == 1 else len(data) - int(rng.integers(100))


def _span(rng, data) -> tuple[int, int]:
    start = _place(rng, data)
    return start, min(len(data), start + int(2 ** rng.uniform(0, 9)))


def _flip_bit(rng, data):
    if not data:
        return b"\0", "a zero byte"
    place = min(_place(rng, data), len(data) - 1)
    bit = 1 << int(rng.integers(8))
    changed = bytearray(data)
    changed[place] ^= bit
    return bytes(changed), f"bit {bit} of byte {place} flipped"


def _random_bytes(rng, data):
    start, stop = _span(rng, data)
    return data[:start] + rng.bytes(stop - start) + data[stop:], f"bytes {start}:{stop} random"


def _truncated(rng, data):
    length = int(rng.integers(len(data) + 1)) if rng.random() < 0.7 else max(0, len(data) - 1)
    return data[:length], f"cut to {length} of {len(data)} bytes"


def _inserted(rng, data):
    place, count = _place(rng, data), int(2 ** rng.uniform(0, 8))
    return data[:place] + rng.bytes(count) + data[place:], f"{count} bytes inserted at {place}"


def _doubled(rng, data):
    if rng.random() < 0.3:
        return data * 2, "doubled"
    start, stop = _span(rng, data)
    return data[:stop] + data[start:stop] + data[stop:], f"bytes {start}:{stop} doubled"


def _removed(rng, data):
    start, stop = _span(rng, data)
    return data[:start] + data[stop:], f"bytes {start}:{stop} removed"


def _swapped(rng, data):
    (a, b), (c, d) = sorted([_span(rng, data), _span(rng, data)])
    if b > c:
        return _flip_bit(rng, data)
    swapped = data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]
    return swapped, f"bytes {a}:{b} and {c}:{d} swapped"


def _zeroed(rng, data):
    start, stop = _span(rng, data)
    byte = b"\0" if rng.random() < 0.7 else b"\xff"
    return data[:start] + byte * (stop - start) + data[stop:], f"bytes {start}:{stop} = {byte[0]}"


def _number(rng, data):
    """Another number where a header may have one: a length, an offset, a shape."""
    form = ("<Q", "<I", "<H", ">I", "<q")[rng.integers(5)]
    size = struct.calcsize(form)
    if len(data) < size:
        return _flip_bit(rng, data)
    place = min(_place(rng, data), len(data) - size)
    most = 256**size if form[1].isupper() else 256**size // 2
    value = (0, 1, most - 1, most // 2, most // 256, len(data), len(data) * 1000)
    value = min(value[rng.integers(len(value))], most - 1)
    packed = struct.pack(form, value)
    return data[:place] + packed + data[place + size :], f"{form} {value} at {place}"


def _empty(rng, data):
    return b"", "empty"


_BYTE_CHANGES = (
    _flip_bit, _flip_bit, _flip_bit, _random_bytes, _truncated, _truncated, _inserted, _doubled,
    _removed, _swapped, _zeroed, _number, _number, _empty,
)  # fmt: skip


# -------------------------------------------------------------------------------------------- JSON


def _change_json(rng, data: bytes) -> tuple[bytes, str]:
    """Returns JSON with another value, key or encoding."""
    tree, words = json.loads(data), []
    for _ in range(1 + (rng.random() < 0.25)):
        tree, what = _change_tree(rng, tree)
        words.append(what)
    return _encoded(rng, _to_text(tree), words)


def _to_text(tree) -> str:
    text = json.dumps(tree, indent=1 if isinstance(tree, dict) else None)
    for number, raw in enumerate(_RAW_TEXTS):
        text = text.replace(json.dumps(_RAW.format(number)), raw)
    return text


def _encoded(rng, text: str, words: list[str]) -> tuple[bytes, str]:
    encoding = "utf-8"
    if rng.random() < 0.08:
        encoding = ("utf-8-sig", "utf-16", "utf-32", "latin-1")[rng.integers(4)]
        words = [*words, encoding]
    return text.encode(encoding, "replace"), ", ".join(words)


def _change_tree(rng, tree):
    """Returns a value of JSON with one change somewhere in it, and what that is.

    Each level is as likely as the next, so that a list of a thousand numbers does not take it all.
    """
    parents, node, place = [], tree, "$"
    while isinstance(node, dict | list) and node and rng.random() < 0.8:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        key = keys[int(rng.integers(len(keys)))]
        parents.append((node, key))
        node, place = node[key], f"{place}[{key!r}]" if isinstance(key, int) else f"{place}.{key}"
    if parents and isinstance(parents[-1][0], dict) and rng.random() < 0.25:
        parent, key = parents.pop()
        node, what = _change_key(rng, parent, key)
        place = place.rpartition(".")[0]
    else:
        node, what = _change_value(rng, node)
    for parent, key in reversed(parents):
        copy = dict(parent) if isinstance(parent, dict) else list(parent)
        copy[key] = node
        node = copy
    return node, f"{place:.100} {what:.100}"


def _change_key(rng, parent: dict, key: str):
    kind = rng.integers(4)
    rest = {name: value for name, value in parent.items() if name != key}
    if kind == 0:
        return rest, f"without {key!r}"
    name = _NAMES[rng.integers(len(_NAMES))] if rng.random() < 0.5 else f"{key}_"
    if kind == 1:
        return rest | {name: parent[key]}, f"{key!r} renamed {name!r}"
    if kind == 2:
        return parent | {name: _any_value(rng)}, f"{name!r} added"
    others = list(parent)
    other = others[rng.integers(len(others))]
    return parent | {key: parent[other]}, f"{key!r} = {other!r}"


def _change_value(rng, node):
    kind = rng.integers(6)
    if kind == 0 and isinstance(node, list):
        return _change_length(rng, node)
    if kind == 1 and isinstance(node, int | float) and not isinstance(node, bool):
        new = (node + 1, node - 1, -node, node * 1000, node + 0.5, node * 0, node * 10**9)
        new = new[rng.integers(len(new))]
        return new, f"{node} -> {new}"
    if kind == 2:
        new = str(node) if isinstance(node, str) or rng.random() < 0.5 else json.dumps(node)
        return (new, "as text") if new != node else ([node], "in a list")
    if kind == 3:
        return ([node], "in a list") if rng.random() < 0.5 else ({"a": node}, "in an object")
    new = _any_value(rng)
    return new, f"-> {_shown(new)}"


def _change_length(rng, node: list):
    kind = rng.integers(4)
    if kind == 0:
        return node[:-1], "one shorter"
    if kind == 1:
        return node + node[-1:], "one longer"
    if kind == 2:
        return node * 2, "doubled"
    order = rng.permutation(len(node))
    return [node[i] for i in order], "in another order"


def _shown(value) -> str:
    """Returns a value as it will be in the file."""
    for number, raw in enumerate(_RAW_TEXTS):
        if value == _RAW.format(number):
            return raw[:30]
    return repr(value)[:60]


def _any_value(rng):
    if rng.random() < 0.15:
        return _RAW.format(rng.integers(len(_RAW_TEXTS)))
    return _VALUES[rng.integers(len(_VALUES))]


def _change_lines(rng, data: bytes) -> tuple[bytes, str]:
    """Returns JSON lines of which one is another."""
    lines = data.splitlines(keepends=True)
    if not lines:
        return _change_bytes(rng, data)
    number = int(rng.integers(len(lines)))
    kind = rng.integers(8)
    if kind == 0:
        lines[number], what = b"", "removed"
    elif kind == 1:
        lines.insert(number, lines[number])
        what = "twice"
    elif kind == 2:
        lines[number], what = lines[number].rstrip(b"\n"), "without its end"
    elif kind == 3:
        junk = (
            b"\n",
            b"\0\n",
            b"\xff\xfe\n",
            b"null\n",
            b"[]\n",
            b"1\n",
            b"\xe9\n",
            b"{}\n",
            b"  ",
        )
        lines[number], what = junk[rng.integers(len(junk))], "junk"
    else:
        tree, what = _change_tree(rng, json.loads(lines[number]))
        # Line breaks are within the value that makes the line's end another place.
        lines[number] = _to_text(tree).replace("\n", " ").encode("utf-8", "replace") + b"\n"
    encoded, words = b"".join(lines), [f"line {number + 1}: {what}"]
    if rng.random() < 0.08:
        return _encoded(rng, encoded.decode("utf-8", "replace"), words)
    return encoded, words[0]


# ------------------------------------------------------------------------------- tables and text


_CELLS = (
    "", "nan", "inf", "-inf", "1e999", "-1", "0", "1e-320", "1_000", "0x10", "true", "None", "x",
    '"', '"a\nb"', "a,b", "\0", "9" * 5000, "y" * 200_000, "=1+1", "١", "²", *_NAMES,
)  # fmt: skip


def _change_table(rng, data: bytes) -> tuple[bytes, str]:
    """Returns a .csv file with other cells."""
    rows = [line.split(",") for line in data.decode().splitlines()]
    number = int(rng.integers(len(rows)))
    row = rows[number]
    column = int(rng.integers(len(row)))
    kind = rng.integers(7)
    if kind == 0:
        del row[column]
        what = "gone"
    elif kind == 1:
        row.insert(column, row[column])
        what = "twice"
    elif kind == 2:
        for each in rows:
            del each[min(column, len(each) - 1)]
        what = "gone in all rows"
    elif kind == 3 and len(rows) > 1:
        rows[0][column] = rows[0][rng.integers(len(rows[0]))]
        what = "renamed"
    elif kind == 4:
        rows[number] = [row[i] for i in rng.permutation(len(row))]
        what = "in another order"
    else:
        row[column] = _CELLS[rng.integers(len(_CELLS))]
        what = f"-> {row[column]!r:.60}"
    text = "\n".join(",".join(row) for row in rows) + "\n"
    return _encoded(rng, text, [f"row {number}, cell {column}: {what}"])


_PIECES = (
    b"\xef\xbb\xbf", b"\0", b"\xff", b"\xed\xa0\x80", b"\xe9t\xe9", b"\r", b"\r\n", b"\n\n\n\n",
    b"\x1a", b"\xe2\x80\xa8", b"\x85", b"\x0c", b" " * 1000, b"a" * 100_000, b"\xf0\x9f\x99\x82",
)  # fmt: skip


def _change_text(rng, data: bytes) -> tuple[bytes, str]:
    """Returns text in another encoding, or with a piece that no plain text has."""
    if rng.random() < 0.3:
        return _encoded(rng, data.decode("utf-8", "replace"), [])
    piece = _PIECES[rng.integers(len(_PIECES))]
    place = int(rng.integers(len(data) + 1))
    return data[:place] + piece + data[place:], f"{piece[:8]!r} at {place}"


_STATEMENTS = (
    "raise SystemExit(0)", "import sys; sys.exit(1)", "raise ValueError('two\\nlines')", "exit()",
    "import no_such", "return", "x = 1 / 0", "raise RecursionError",
    "assert 0, ''", "get_config = 3", "get_config = lambda: 3", "del get_config",
    "class Config: pass", "get_sweep = lambda: 3", "get_sweep = lambda: [{}, {}]",
    "get_sweep = lambda: [{1: 2}]", "get_sweep = lambda: [{'sae.k': []}]",
    "get_sweep = lambda: [{'sae': 3}]", "get_sweep = lambda: iter([])",
)  # fmt: skip


def _change_python(rng, data: bytes) -> tuple[bytes, str]:
    """Returns a file of Python with one line or one number other."""
    lines = data.decode().splitlines()
    number = int(rng.integers(len(lines) + 1))
    kind = rng.integers(3)
    if kind == 0 and number < len(lines):
        gone = lines.pop(number)
        return "\n".join(lines).encode(), f"without {gone!r:.60}"
    if kind == 1:
        value = repr(_VALUES[rng.integers(len(_VALUES))])
        places = [i for i, line in enumerate(lines) if "=" in line or "(" in line]
        number = places[rng.integers(len(places))]
        before = lines[number]
        head, sign, _ = before.rpartition("=") if "=" in before else before.rpartition("(")
        lines[number] = head + sign + value + ("," if sign == "=" else ")")
        return "\n".join(lines).encode("utf-8", "replace"), f"{before.strip()!r:.60} -> {value:.60}"
    statement = _STATEMENTS[rng.integers(len(_STATEMENTS))]
    indent = "    " if rng.random() < 0.3 else ""
    lines.insert(number, indent + statement)
    return "\n".join(lines).encode(), f"line {number + 1}: {statement!r}"


_COMPRESSED = {".gz": gzip, ".bz2": bz2, ".xz": lzma}


def _change_compressed(rng, name: str, data: bytes) -> tuple[bytes, str]:
    """Returns a compressed file whose content is other, or that has more than one part."""
    path = pathlib.PurePath(name)
    module = _COMPRESSED[path.suffix]
    content, what = _changed(rng, path.stem, module.decompress(data))
    compressed = module.compress(content)
    if rng.random() < 0.1:
        return compressed + rng.bytes(20), f"{what}, and bytes behind it"
    return compressed, what


# ------------------------------------------------------------------------------------------ arrays


def _change_array(rng, array: np.ndarray) -> tuple[np.ndarray, str]:
    """Returns an array with other values, of another shape or of another type."""
    kind, array = rng.integers(10), np.array(array)
    if kind == 0 and array.ndim:
        return np.ascontiguousarray(array.T), "transposed"
    if kind == 1:
        return array.reshape(-1), "flat"
    if kind == 2:
        return array[None], "one axis more"
    if kind == 3 and array.ndim and len(array):
        return array[:-1].copy(), "one row less"
    if kind == 4 and array.ndim:
        return array[:0].copy(), "no rows"
    if kind == 5:
        dtype = _DTYPES[rng.integers(len(_DTYPES))]
        with np.errstate(all="ignore"):
            return array.astype(np.float32).astype(dtype), f"as {dtype}"
    if kind == 6 and array.size and array.dtype.kind == "f":
        value = (np.nan, np.inf, -np.inf, 0.0, -1e30, 1e38)[rng.integers(6)]
        with np.errstate(all="ignore"):
            array.reshape(-1)[rng.integers(array.size)] = value
        return array, f"a {value}"
    if kind == 7:
        return np.zeros_like(array), "zeros"
    if kind == 8:
        return array[tuple(0 for _ in array.shape)] if array.size else array, "one number"
    return -array if array.dtype.kind in "fi" else array, "negative"


def _change_arrays(rng, arrays: dict[str, np.ndarray]) -> tuple[dict, str]:
    """Returns arrays by name of which one is another, gone, or has another name."""
    arrays = dict(arrays)
    names = list(arrays)
    name = names[rng.integers(len(names))]
    kind = rng.integers(8)
    if kind == 0:
        del arrays[name]
        return arrays, f"without {name}"
    if kind == 1:
        other = _NAMES[rng.integers(len(_NAMES))]
        arrays[other] = arrays.pop(name)
        return arrays, f"{name} renamed {other!r:.60}"
    if kind == 2:
        arrays[f"{name}_"] = arrays[name]
        return arrays, f"{name}_ added"
    if kind == 3:
        other = names[rng.integers(len(names))]
        arrays[name], arrays[other] = arrays[other], arrays[name]
        return arrays, f"{name} and {other} swapped"
    arrays[name], what = _change_array(rng, arrays[name])
    return arrays, f"{name} {what}"


def _change_safetensors(rng, data: bytes) -> tuple[bytes, str]:
    """Returns a file whose header says something else of the same bytes, or with other arrays."""
    if rng.random() < 0.5:
        arrays, what = _change_arrays(rng, safetensors.numpy.load(data))
        return safetensors.numpy.save({n.replace("\0", ""): a for n, a in arrays.items()}), what
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    name = names[rng.integers(len(names))]
    about, kind = dict(header[name]), rng.integers(6)
    if kind == 0:
        about["dtype"] = _SAFETENSORS_DTYPES[rng.integers(len(_SAFETENSORS_DTYPES))]
    elif kind == 1:
        shapes = ([10**9], [2**62, 4], [0], [], [-1], [10**5, 10**5], about["shape"][::-1])
        about["shape"] = shapes[rng.integers(len(shapes))]
    elif kind == 2:
        first, last = about["data_offsets"]
        ends = (
            [0, last],
            [first, 10**12],
            [last, first],
            [first, first],
            [2**63, 2**64 - 1],
            [0, 0],
        )
        about["data_offsets"] = ends[rng.integers(len(ends))]
    what = f"{name}: {about}"
    header = header | {name: about}
    if kind > 2:
        header, what = _change_tree(rng, header)
    text = _to_text(header).encode("utf-8", "replace")
    length = len(text) if rng.random() < 0.9 else int(2 ** rng.uniform(0, 63))
    return struct.pack("<Q", length) + text + body, f"header: {what}"


def _change_npy(rng, data: bytes) -> tuple[bytes, str]:
    """Returns a .npy file whose header says something else of the same bytes, or another array."""
    if rng.random() < 0.5:
        array, what = _change_array(rng, np.load(io.BytesIO(data)))
        return _npy(array), what
    array = np.load(io.BytesIO(data))
    shapes = (
        array.shape[::-1], (10**9,), (10**5, 10**5), (2**62, 4), (-1,), (0,), (), "x", (1.5,), None
    )  # fmt: skip
    descr, shape = np.lib.format.dtype_to_descr(array.dtype), array.shape
    if rng.random() < 0.5:
        shape = shapes[rng.integers(len(shapes))]
    else:
        descr = _NPY_DTYPES[rng.integers(len(_NPY_DTYPES))]
    order = rng.random() < 0.1
    text = f"{{'descr': {descr!r}, 'fortran_order': {order}, 'shape': {shape}, }}\n".encode()
    return (
        b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + array.tobytes(),
        f"header: {descr:.20} {shape}",
    )


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def _change_zip(rng, data: bytes) -> tuple[bytes, str]:
    """Returns a zip file in which a member has other content, another name or another size."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    number = int(rng.integers(len(members)))
    name, content = members[number]
    kind, method = rng.integers(6), zipfile.ZIP_STORED
    if kind == 0:
        members.pop(number)
        what = f"without {name}"
    elif kind == 1:
        other = _NAMES[rng.integers(len(_NAMES))].replace("\0", "")[:1000] or "x"
        members[number] = (other, content)
        what = f"{name} renamed {other!r:.40}"
    elif kind == 2:
        members.append((f"more/{name}", content))
        what = f"more/{name} added"
    elif kind == 3:
        method, what = zipfile.ZIP_DEFLATED, "deflated"
        if rng.random() < 0.3:
            members[number] = (name, content + bytes(64 << 20))
            what = f"deflated, {name} with 64 MiB of zeros"
    else:
        content, what = _changed(rng, name, content)
        members[number], what = (name, content), f"{name}: {what}"
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return file.getvalue(), what


def _change_npz(rng, data: bytes) -> tuple[bytes, str]:
    if rng.random() < 0.5:
        return _change_zip(rng, data)
    with np.load(io.BytesIO(data)) as archive:
        arrays, what = _change_arrays(rng, dict(archive))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:  # np.savez takes no name that is a path
        for name, array in arrays.items():
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"[:60_000]), _npy(array))
    return file.getvalue(), what


def _change_torch(rng, data: bytes) -> tuple[bytes, str]:
    """Returns a file of torch.save with another value in its dictionary."""
    if rng.random() < 0.4:
        return _change_zip(rng, data)
    import torch

    content = torch.load(io.BytesIO(data), weights_only=True)
    names = list(content)
    name = names[rng.integers(len(names))]
    value = content[name]
    tensor = value if isinstance(value, torch.Tensor) else torch.ones(2, 3)
    kinds = {
        "float16": lambda: tensor.to(torch.float16),
        "int8": lambda: tensor.to(torch.int8),
        "complex": lambda: tensor.to(torch.complex64),
        "bool": lambda: tensor > 0,
        "of no memory": lambda: tensor.to("meta"),
        "sparse": lambda: tensor.to_sparse(),
        "of a huge shape": lambda: tensor.reshape(-1)[:1].expand(200_000, 20_000),
        "of a negative stride": lambda: tensor.reshape(-1).flip(0)[::2],
        "transposed": lambda: tensor.T,
        "empty": lambda: tensor.reshape(-1)[:0],
        "with a gradient": lambda: tensor.float().clone().requires_grad_(),
        "a parameter": lambda: torch.nn.Parameter(tensor.float()),
        "quantised": lambda: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8),
        "NaN": lambda: tensor.float() * float("nan"),
        "nested": lambda: torch.nested.nested_tensor([tensor.float().reshape(-1)]),
        "as a list": lambda: tensor.reshape(-1).tolist(),
        "as a number": lambda: 3.5,
        "in a dict": lambda: {"a": tensor},
        "gone": lambda: None,
    }
    what = list(kinds)[rng.integers(len(kinds))]
    content[name] = kinds[what]()
    if rng.random() < 0.1:
        key = (3, None, "", "x" * 1000, ("a", 1))[rng.integers(5)]
        content[key], what = content.pop(name), f"{what}, key {key!r:.20}"
    if rng.random() < 0.03:
        content, what = [content, content[name] if name in content else 1], "a list"
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue(), f"{name} {what}"


_BY_SUFFIX = {
    ".json": _change_json, ".jsonl": _change_lines, ".ndjson": _change_lines, ".csv": _change_table,
    ".txt": _change_text, ".py": _change_python, ".safetensors": _change_safetensors,
    ".npy": _change_npy, ".npz": _change_npz, ".pt": _change_torch,
}  # fmt: skip
_NOT_AS_NAMED = (
    ValueError, KeyError, IndexError, TypeError, AttributeError, EOFError, OSError, RuntimeError,
    RecursionError, OverflowError, MemoryError, NotImplementedError, zipfile.BadZipFile,
    lzma.LZMAError, safetensors.SafetensorError, struct.error, SyntaxError,
)  # fmt: skip


def put_back(folder: pathlib.Path, originals: dict[str, bytes]) -> list[str]:
    """Makes a folder hold the files `originals` again, and returns the names of files that were
    new in it.
    """
    new = []
    for path in sorted(folder.rglob("*"), reverse=True):
        name = path.relative_to(folder).as_posix()
        if name in originals:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.is_symlink():
                path.unlink()
        elif path.is_symlink() or not path.is_dir():
            new.append(name)
            path.unlink()
    for name, data in originals.items():
        file = folder / name
        if not file.is_file() or file.read_bytes() != data:
            file.parent.mkdir(parents=True, exist_ok=True)
            _write(file, data)
    return new
