"""SAE files of every format with something wrong: one line that says what, or the right SAE.

Nothing else may come of them, and no more memory than a small multiple of the file's own size.
"""

import json
import os
import pickle
import subprocess
import sys
import textwrap
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
from test_interop_formats import D, N, edit_json, edit_tensors, inputs, needs, random_sae

import sae_jax
from sae_jax import interop
from sae_jax.cli import main
from sae_jax.errors import UserError
from sae_jax.interop import archives

ARCHITECTURES = {"gemma_scope": "jumprelu", "gemma_scope_2": "jumprelu", "openai": "relu"}
JSON = {"saelens": "cfg.json", "dictionary_learning": "config.json", "sparsify": "cfg.json",
        "gemma_scope_2": "config.json", "sae_jax": "sae.json"}  # fmt: skip


def exported(path, name, about=None):
    needs(name)
    interop.export(random_sae(ARCHITECTURES.get(name, "topk")), name, path, about)
    return path


def fields(name, changes):
    """A damage: other values of fields in a format's JSON, the innermost section replaced."""

    def damage(path):
        edit_json(path / JSON[name], **changes)

    return damage


def config_field(**changes):
    def damage(path):
        values = json.loads((path / "sae.json").read_text())
        values["config"] |= changes
        (path / "sae.json").write_text(json.dumps(values))

    return damage


def tensors(file, change):
    return lambda path: edit_tensors(path / file, change)


def torch_state(change):
    def damage(path):
        import torch

        (file,) = path.glob("*.pt")
        torch.save(change(torch.load(file)), file)

    return damage


def npz(change):
    def damage(path):
        arrays = dict(np.load(path / "params.npz"))
        np.savez(path / "params.npz", **change(arrays))

    return damage


def cast(name, dtype):
    return lambda t: t | {name: np.asarray(t[name]).astype(dtype)}


SPARSE = "which is no dense tensor"
WRONG = [
    ("sparsify", fields("sparsify", {"transcode": "false"}), "transcode: Expected `bool`"),
    ("sparsify", fields("sparsify", {"k": True}), "k: Expected `int`, got `bool`"),
    ("sparsify", fields("sparsify", {"k": N + 1}), "sae.k must be at most sae.d_sae"),
    ("sparsify", fields("sparsify", {"skip_connection": 1}), "skip_connection: Expected `bool`"),
    ("sparsify", fields("sparsify", {"activation": "groupmax"}), "activation: Invalid enum value"),
    ("sparsify", fields("sparsify", {"num_latents": 1e30}), "num_latents"),
    ("sparsify", tensors("sae.safetensors", cast("W_dec", np.int32)), "W_dec is of type int32"),
    ("sparsify", tensors("sae.safetensors", cast("b_dec", bool)), "b_dec is of type bool"),
    ("saelens", fields("saelens", {"architecture": ["topk"]}), "architecture: Expected `str`"),
    ("saelens", fields("saelens", {"metadata": "none"}), "metadata: Expected `object"),
    ("saelens", fields("saelens", {"k": True}), "k: Expected `int"),
    ("saelens", fields("saelens", {"k": N + 1}), "cfg.json: sae.k must be at most"),
    ("saelens", fields("saelens", {"d_sae": 10**30}), "W_enc has shape"),
    ("saelens", fields("saelens", {"apply_b_dec_to_input": "false"}), "apply_b_dec_to_input"),
    ("saelens", tensors("sae_weights.safetensors", cast("W_enc", np.int8)), "W_enc is of type"),
    ("dictionary_learning", fields("dictionary_learning", {"trainer": []}), "trainer: Expected"),
    ("dictionary_learning", fields("dictionary_learning", {"trainer": {"dict_class": ["x"]}}),
     "trainer.dict_class: Expected `str`"),
    ("dictionary_learning", fields("dictionary_learning", {"trainer": {"dict_class": "Auto"}}),
     "trainer.dict_class is 'Auto'; did you mean"),
    ("dictionary_learning", torch_state(lambda t: t | {"k": t["k"] + N}), "k is"),
    ("dictionary_learning", torch_state(lambda t: t | {"k": t["b_dec"]}), "k must be one number"),
    ("dictionary_learning", torch_state(lambda t: t | {"b_dec": t["b_dec"].int()}),
     "b_dec is of type int32"),
    ("dictionary_learning", torch_state(lambda t: t | {"b_dec": "text"}), "b_dec has shape"),
    ("dictionary_learning", torch_state(lambda t: t | {"b_dec": t["b_dec"].to_sparse()}), SPARSE),
    ("dictionary_learning", torch_state(lambda t: t | {"b_dec": t["b_dec"].to("meta")}), SPARSE),
    ("gemma_scope_2", fields("gemma_scope_2", {"architecture": ["jump_relu"]}), "architecture: "),
    ("gemma_scope_2", fields("gemma_scope_2", {"hf_hook_point_in": 3}), "hf_hook_point_in: "),
    ("gemma_scope_2", tensors("params.safetensors", cast("w_enc", np.int64)), "w_enc is of type"),
    ("gemma_scope", npz(cast("threshold", np.int32)), "threshold is of type int32"),
    ("gemma_scope", npz(cast("W_enc", np.complex64)), "w_enc is of type complex64"),
    ("gemma_scope", npz(lambda t: t | {"b_dec": np.full(D, np.inf)}), "b_dec holds NaN or inf"),
    ("gemma_scope", npz(lambda t: t | {"b_dec": np.full(D, 1e300)}), "b_dec holds NaN or inf"),
    ("gemma_scope", npz(lambda t: t | {"W_enc": t["W_enc"][:0]}), "two dimensions above 0"),
    ("gemma_scope", npz(lambda t: t | {"W_enc": np.array([{}] * D)}), "params.npz cannot be read"),
    ("openai", torch_state(lambda t: t | {"activation": ["ReLU"]}), "activation"),
    ("openai", torch_state(lambda t: {"encoder.weight": t}), "encoder.weight"),
    ("openai", torch_state(lambda t: [t]), "not a dictionary of tensors"),
    ("sae_jax", fields("sae_jax", {"config": []}), "config: Expected `object`"),
    ("sae_jax", fields("sae_jax", {"version": "2"}), "version: "),
    ("sae_jax", fields("sae_jax", {"about": 3}), "about: Expected `object`"),
    ("sae_jax", fields("sae_jax", {"architecture_file": 3}), "architecture_file: Expected `str"),
    ("sae_jax", config_field(architecture=[]), "names an architecture"),
    ("sae_jax", config_field(k=True), "sae.k must be a whole number"),
    ("sae_jax", config_field(k=N + 1), "sae.k must be at most"),
    ("sae_jax", config_field(kind=["x"]), "sae.kind must be text"),
    ("sae_jax", config_field(d_sae=10**12), "it must be (1000000000000,)"),
    ("sae_jax", config_field(d_sae=10**30), "sae"),
    ("sae_jax", config_field(nonsense=1), "unknown field 'sae.nonsense'"),
    ("sae_jax", tensors("sae.safetensors", cast("b_enc", np.int32)), "b_enc is of type int32"),
    ("sae_jax", tensors("sae.safetensors", cast("scale", bool)), "scale must be above 0"),
    ("sae_jax", tensors("sae.safetensors", lambda t: t | {"scale": np.asarray(-t["scale"])}),
     "scale must be above 0"),
    ("sae_jax", tensors("sae.safetensors", lambda t: t | {"scale": t["b_enc"]}), "scale has shape"),
]  # fmt: skip


@pytest.mark.parametrize("name, damage, complaint", WRONG)
def test_what_is_wrong_is_named_in_one_line(tmp_path, name, damage, complaint):
    exported(tmp_path / "sae", name)
    damage(tmp_path / "sae")
    with pytest.raises(UserError) as caught:
        sae_jax.load(tmp_path / "sae")
    message = str(caught.value)
    assert complaint in message and str(tmp_path) in message and "\n" not in message


@pytest.mark.parametrize("name", JSON)
@pytest.mark.parametrize("text", [b"", b"[]", b"null", b"{", b"\xff\xfe\x00", b"[" * 10**5])
def test_json_that_is_none(tmp_path, name, text):
    needs(name)
    exported(tmp_path / "sae", name)
    (tmp_path / "sae" / JSON[name]).write_bytes(text)
    with pytest.raises(UserError, match=JSON[name]):
        sae_jax.load(tmp_path / "sae")
    if name in ("saelens", "sae_jax"):
        with pytest.raises(UserError, match=JSON[name]):
            interop.read_provenance(tmp_path / "sae")


ABOUT = [{"site": 3}, {"model_name": ["x"]}, {"l0": "many"}, {"training": {"architecture": []}},
         {"training": []}, {"evaluation": {"fvu": "low"}}]  # fmt: skip


@pytest.mark.parametrize("about", ABOUT)
def test_a_provenance_of_wrong_types(tmp_path, capsys, about):
    exported(tmp_path / "sae", "sae_jax", about and {})
    edit_json(tmp_path / "sae" / "sae.json", about=about)
    out = tmp_path / "out"
    assert (
        main(["export", f"--checkpoint={tmp_path / 'sae'}", "--format=saelens", f"--out={out}"])
        == 2
    )
    error = capsys.readouterr().err
    assert next(iter(about)) in error and error.count("\n") == 1 and not out.exists()


def test_weights_of_other_types_are_the_same_sae(tmp_path):
    """Half precision, parameters of torch, columns first, and tensors that others share."""
    torch = pytest.importorskip("torch")
    exported(tmp_path / "dl", "dictionary_learning")
    exported(tmp_path / "gs", "gemma_scope")
    x = inputs()
    for path, file in ((tmp_path / "dl", "ae.pt"), (tmp_path / "gs", "params.npz")):
        before = sae_jax.load(path)(x)
        if file == "ae.pt":
            state = torch.load(path / file)
            state["b_dec"] = torch.nn.Parameter(state["b_dec"])
            state["encoder.weight"] = state["encoder.weight"].T.contiguous().T
            torch.save(state, path / file)
        else:
            np.savez_compressed(
                path / file, **{n: np.asfortranarray(a) for n, a in np.load(path / file).items()}
            )
        np.testing.assert_array_equal(sae_jax.load(path)(x), before)
    exported(tmp_path / "lens", "saelens")
    half = lambda t: {n: a.astype(jnp.bfloat16) for n, a in t.items()}  # noqa: E731
    edit_tensors(tmp_path / "lens" / "sae_weights.safetensors", half)
    assert sae_jax.load(tmp_path / "lens").w_enc[...].dtype == jnp.float32


# ------------------------------------------------------------------ bombs


def npy_header(shape) -> bytes:
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"
    return b"\x93NUMPY\x01\x00\x76\x00" + text.ljust(117).encode() + b"\n"


def lying_npz(path):
    with zipfile.ZipFile(path / "params.npz", "w") as archive:
        archive.writestr("W_enc.npy", npy_header((10**10,)) + bytes(16))


def unfolding_npz(path):
    np.savez_compressed(path / "params.npz", W_enc=np.zeros((500, 10**6), np.float32))


def expanded(path):
    torch = pytest.importorskip("torch")
    torch.save({"encoder.weight": torch.ones(1).expand(10**5, 10**5)}, path / "autoencoder.pt")


def unfolding_pt(path):
    with zipfile.ZipFile(path / "autoencoder.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", pickle.dumps({}))
        archive.writestr("a/data/0", bytes(10**9))


class _Call:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def pickled(content):
    def make(path):
        with zipfile.ZipFile(path / "autoencoder.pt", "w") as archive:
            archive.writestr(
                "a/data.pkl", content if isinstance(content, bytes) else pickle.dumps(content)
            )

    return make


BOMBS = {
    "an array that says it is large": lying_npz,
    "an array that unfolds": unfolding_npz,
    "an expanded tensor": expanded,
    "a storage that unfolds": unfolding_pt,
    "a call that allocates": pickled({"a": _Call(bytearray, 10**11)}),
    "a memo that is large": pickled(b"\x80\x02}r\xff\xff\xff\x7f."),
    "a text that says it is long": pickled(b"\x80\x04\x8d" + (2**62).to_bytes(8, "little") + b"a."),
}


@pytest.mark.slow
@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_take_no_memory(tmp_path, bomb):
    """In a process whose memory ends 1 GB above what it has before it reads."""
    BOMBS[bomb](tmp_path)
    code = """
        import resource, sys
        import sae_jax
        sae_jax.load
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 10**9,) * 2)
        try:
            sae_jax.load(sys.argv[1])
        except sae_jax.UserError as error:
            print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1 and str(tmp_path) in done.stdout


# ---------------------------------------------- what is written, and where


def test_an_export_touches_nothing_that_is_there(tmp_path):
    """Not even a folder of the name that its temporary one had."""
    mine = tmp_path / ".out.tmp"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    interop.export(random_sae("relu"), "saelens", tmp_path / "out")
    assert (mine / "notes.txt").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {".out.tmp", "out"}


def test_of_two_exports_at_once_one_is_told(tmp_path, monkeypatch):
    """The other's folder appears while this one is written."""
    sae, real = random_sae("relu"), os.rename
    from sae_jax.interop import saelens

    write = saelens.write

    def while_another_writes(*arguments):
        write(*arguments)
        if not (tmp_path / "out").exists():
            monkeypatch.setattr(saelens, "write", write)
            interop.export(sae, "saelens", tmp_path / "out")

    monkeypatch.setattr(saelens, "write", while_another_writes)
    with pytest.raises(UserError, match="is there already"):
        interop.export(sae, "saelens", tmp_path / "out")
    assert os.rename is real and [path.name for path in tmp_path.iterdir()] == ["out"]
    assert sae_jax.load(tmp_path / "out").config.d_sae == N


def test_a_place_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*Not a directory"):
        interop.export(random_sae("relu"), "saelens", tmp_path / "file" / "out")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UserError, match="is there already"):
        interop.export(random_sae("relu"), "saelens", tmp_path / "loop")


def test_a_transcoder_of_gemma_scope_can_be_told_to_be_one(tmp_path, capsys):
    interop.export(random_sae("jumprelu", "transcoder"), "gemma_scope", tmp_path / "a")
    assert sae_jax.load(tmp_path / "a").config.kind == "autoencoder"
    sae = sae_jax.load(tmp_path / "a", kind="transcoder")
    assert sae.config.kind == "transcoder"
    x = inputs()
    np.testing.assert_allclose(
        sae(x), random_sae("jumprelu", "transcoder")(x), atol=2e-5, rtol=1e-5
    )
    path, out = f"--path={tmp_path / 'a'}", tmp_path / "b"
    assert main(["import", path, f"--out={out}", "--kind=transcoder"]) == 0
    assert sae_jax.load(out).config.kind == "transcoder"
    with pytest.raises(UserError, match="is of kind transcoder, not autoencoder"):
        sae_jax.load(out, kind="autoencoder")
    capsys.readouterr()
    assert main(["import", path, f"--out={tmp_path / 'c'}", "--kind=coder"]) == 2
    assert "did you mean" in capsys.readouterr().err
    with pytest.raises(UserError, match="no tensor w_skip"):
        sae_jax.load(tmp_path / "a", kind="skip_transcoder")
    interop.export(random_sae("jumprelu"), "gemma_scope_2", tmp_path / "d", {"hf_module": "a.b"})
    edit_json(tmp_path / "d" / "config.json", hf_hook_point_out=None)  # as some of theirs
    assert sae_jax.load(tmp_path / "d").config.kind == "autoencoder"


def test_archives_read_what_torch_and_numpy_wrote(tmp_path):
    torch = pytest.importorskip("torch")
    t = torch.randn(4, 3)
    state = {"a": t, "b": t.T, "c": t[1:, 1:], "one": torch.zeros(()), "none": torch.zeros(0, 3),
             "k": torch.tensor(3, dtype=torch.int32), "half": t.half(), "bf": t.bfloat16(),
             "wide": torch.ones(1).expand(5), "mask": t > 0, "grad": t.clone().requires_grad_(),
             "n": 3, "name": "ReLU", "inner": {"k": 1}}  # fmt: skip
    torch.save(state, tmp_path / "a.pt")
    for name, found in archives.read_torch(tmp_path / "a.pt").items():
        if isinstance(state[name], torch.Tensor):
            assert found.shape == tuple(state[name].shape), name
            np.testing.assert_array_equal(
                found.astype(np.float64), state[name].detach().double().numpy(), err_msg=name
            )
        else:
            assert found == state[name]
    torch.save(state, tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="PyTorch before 1.6"):
        archives.read_torch(tmp_path / "b.pt")
