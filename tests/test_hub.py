"""Names on the Hugging Face hub, beside a small server that speaks its protocol."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import hub_server
import jax
import numpy as np
import pytest
from hub_server import Repo, files_of
from test_interop_formats import random_sae
from training import make_config, make_store

import sae_jax
from sae_jax import hub, interop, lm
from sae_jax.cli import main
from sae_jax.errors import UserError
from sae_jax.interop import saelens_releases
from sae_jax.train.run import train_run

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "lm"
FILES = {"a/cfg.json": b"{}", "a/big.safetensors": bytes(range(256)) * 40, "b/cfg.json": b"[]"}


@pytest.fixture
def server(monkeypatch, tmp_path):
    with hub_server.running() as running:
        hub_server.use(running, monkeypatch, tmp_path / "cache")
        yield running


@pytest.fixture
def offline(monkeypatch):
    """A function that sets HF_HUB_OFFLINE as if huggingface_hub had been imported with it."""
    constants = pytest.importorskip("huggingface_hub.constants")
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def set_offline():
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        for name in ("reset_sessions", "close_session"):  # as its version goes
            getattr(huggingface_hub.utils, name, lambda: None)()

    yield set_offline
    monkeypatch.undo()
    for name in ("reset_sessions", "close_session"):
        getattr(huggingface_hub.utils, name, lambda: None)()


def cli(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def refused(name: str, read=sae_jax.load) -> str:
    """The error's text, which is one line."""
    with pytest.raises(UserError) as error:
        read(name)
    assert "\n" not in str(error.value) and name.partition("/x")[0] in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "text,parts",
    [
        ("hf://a/b", ("a/b", None, "")),
        ("hf://gpt2", ("gpt2", None, "")),
        ("hf://a/b-2.x/c/d e", ("a/b-2.x", None, "c/d e")),
        ("hf://a/b@v1/c", ("a/b", "v1", "c")),
        ("hf://a/b@refs%2Fpr%2F1", ("a/b", "refs/pr/1", "")),
    ],
)
def test_names(text, parts):
    name = hub.parse(text)
    assert (name.repo, name.revision, name.folder) == parts and str(name) == text


@pytest.mark.parametrize(
    "text", ["hf://", "hf:///a", "hf://a/b/../c", "hf://a b/c", "a/b", "s3://a"]
)
def test_what_is_no_name(text):
    with pytest.raises(UserError, match="write hf://org/repository"):
        hub.parse(text)


def test_only_what_is_needed_is_downloaded_and_only_once(server):
    server.repos["me/x"] = Repo(FILES, revisions={"old": {"a/cfg.json": b"old"}})
    wanted = ("cfg.json", "big.safetensors", "absent.json")
    local = hub.fetch("hf://me/x/a", wanted)
    assert files_of(local) == {"cfg.json": b"{}", "big.safetensors": FILES["a/big.safetensors"]}
    assert not (local.parent / "b").exists()
    commit = server.repos["me/x"].commit("main")
    assert str(hub.pinned("hf://me/x/a", local)) == f"hf://me/x@{commit}/a"
    assert server.sent() == ["a/big.safetensors", "a/cfg.json"]
    assert hub.fetch("hf://me/x/a", wanted) == local == hub.fetch(f"hf://me/x@{commit}/a", wanted)
    assert server.sent() == []
    old = hub.fetch("hf://me/x@old/a", wanted)
    assert files_of(old) == {"cfg.json": b"old"}
    assert hub.fetch("hf://me/x/b/cfg.json", wanted).read_bytes() == b"[]"  # a file by its name
    server.repos["me/x"].files = FILES | {"a/cfg.json": b"new"}
    assert (hub.fetch("hf://me/x/a", wanted) / "cfg.json").read_bytes() == b"new"


def test_what_is_not_there_is_said_with_what_is(server):
    server.repos["me/x"] = Repo(FILES, revisions={"step-1000": FILES})

    def fetch(name):
        return hub.fetch(name, ["cfg.json"], needed=["cfg.json"])

    assert "no model repository me/none" in refused("hf://me/none", fetch)
    assert "did you mean 'step-1000'" in refused("hf://me/x@step-100/a", fetch)
    assert "no folder 'c'; it must be one of: a, b" in refused("hf://me/x/c", fetch)
    server.repos["me/x"].files = {"a/other.json": b""}
    assert "has not cfg.json; it has a/other.json" in refused("hf://me/x/a", fetch)
    server.repos["me/x"].files = {}
    assert "it has no files" in refused("hf://me/x", fetch)


def test_private_and_gated(server, monkeypatch):
    server.repos["me/x"] = Repo(FILES, private=True)
    server.repos["me/gated"] = Repo(FILES, gated=True)

    def fetch(name):
        return hub.fetch(name, ["cfg.json"])

    assert "or it is private" in refused("hf://me/x/a", fetch)
    assert "HF_TOKEN" in refused("hf://me/x/a", fetch)
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    assert fetch("hf://me/x/a").is_dir()
    text = refused("hf://me/gated/a", fetch)
    assert f"is gated: ask for access at {server.url}/me/gated" in text


def test_offline_the_cache_has_to_do(server, offline):
    server.repos["me/x"] = Repo(FILES, revisions={"old": {"a/cfg.json": b"old"}})
    names = ["hf://me/x/a", "hf://me/x@old/a", "hf://me/x/b/cfg.json"]
    before = [hub.fetch(name, ["cfg.json"]) for name in names]
    offline()
    server.requests.clear()
    assert [hub.fetch(name, ["cfg.json"]) for name in names] == before
    for name in ("hf://me/x/none", "hf://me/x@other/a", "hf://me/none"):
        assert "HF_HUB_OFFLINE is set" in refused(name, lambda n: hub.fetch(n, ["cfg.json"]))
    with pytest.raises(UserError, match="not wholly, in the cache"):
        hub.fetch("hf://me/x/a", ["cfg.json", "big.safetensors"], needed=["big.safetensors"])
    assert not server.requests


def test_a_hub_that_cannot_be_reached(server, monkeypatch):
    server.repos["me/x"] = Repo(FILES)
    before = hub.fetch("hf://me/x/a", ["cfg.json"])
    server.broken = True
    assert hub.fetch("hf://me/x/a", ["cfg.json"]) == before
    assert "503" in refused("hf://me/y", lambda name: hub.fetch(name, ["cfg.json"]))
    constants = importlib.import_module("huggingface_hub.constants")
    monkeypatch.setattr(constants, "ENDPOINT", "http://localhost:9")
    assert hub.fetch("hf://me/x/a", ["cfg.json"]) == before
    text = refused("hf://me/y", lambda name: hub.fetch(name, ["cfg.json"]))
    assert "http://localhost:9 cannot be reached" in text


def test_a_download_that_breaks_off_goes_on_when_started_again(server, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # huggingface_hub waits between tries
    constants = importlib.import_module("huggingface_hub.constants")
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)
    server.repos["me/x"] = Repo(FILES)
    server.cut = {"a/big.safetensors": 1000}
    wanted = ("big.safetensors", "cfg.json")
    text = refused("hf://me/x/a", lambda name: hub.fetch(name, wanted, wanted))
    assert "the download stopped" in text and "start it again" in text
    tries, server.cut = list(server.requests), {}
    server.requests.clear()
    local = hub.fetch("hf://me/x/a", wanted, wanted)
    # It goes on where it was: the versions of huggingface_hub differ in when.
    ranges = {range for method, _, range in tries + server.requests if method == "GET" and range}
    assert ranges == {"bytes=1000-"}
    assert (local / "big.safetensors").read_bytes() == FILES["a/big.safetensors"]
    assert "a/cfg.json" not in server.sent()  # it had arrived


@pytest.mark.parametrize(
    "format,architecture",
    [("saelens", "relu"), ("sparsify", "topk"), ("gemma_scope", "jumprelu"),
     ("gemma_scope_2", "jumprelu"), ("sae_jax", "gated")],
)  # fmt: skip
def test_an_sae_of_each_format(tmp_path, server, format, architecture):
    interop.export(random_sae(architecture), format, tmp_path / "sae", {"site": "resid_post.1"})
    folder = "layer_1/width_24"
    others = {f"{folder}/run_me.py": b"raise SystemExit", f"{folder}/sparsity.safetensors": b""}
    files = files_of(tmp_path / "sae", folder)
    server.repos["me/x"] = Repo(files | others | {"layer_2/" + n: b"" for n in files})
    name = f"hf://me/x/{folder}"
    sae = sae_jax.load(name)
    assert server.sent() == sorted(f"{folder}/{file}" for file in interop.FORMATS[format].FILES)
    x = np.random.default_rng(0).normal(size=(20, sae.config.d_in)).astype(np.float32)
    np.testing.assert_array_equal(sae(x), sae_jax.load(tmp_path / "sae")(x))
    assert interop.format_of(name) == format
    assert interop.site(name) == interop.site(tmp_path / "sae")
    assert interop.read_provenance(name) == interop.read_provenance(tmp_path / "sae")
    assert cli("import", f"--path={name}", f"--out={tmp_path / 'ours'}") == 0
    assert interop.format_of(tmp_path / "ours") == "sae_jax"
    assert server.sent() == []


def test_no_code_is_run_for_an_sae_from_a_hub(tmp_path, server):
    """Of an architecture of a user's own, whose file is even on this machine."""
    interop.export(random_sae("topk"), "sae_jax", tmp_path / "sae")
    code = tmp_path / "mine.py"
    code.write_text("raise SystemExit('it ran')")
    values = json.loads((tmp_path / "sae" / "sae.json").read_text())
    values["config"]["architecture"] = "mine"
    values["architecture_file"] = str(code)
    files = files_of(tmp_path / "sae", "a")
    server.repos["me/x"] = Repo(files | {"a/sae.json": json.dumps(values).encode()})
    with pytest.raises(UserError, match="mine.py, which was not run"):
        sae_jax.load("hf://me/x/a", trust_code=True)
    assert cli("import", "--path=hf://me/x/a", f"--out={tmp_path / 'out'}") == 2


def test_a_folder_that_is_no_sae_is_told_which_are(tmp_path, server, capsys):
    interop.export(random_sae("jumprelu"), "gemma_scope", tmp_path / "sae")
    saes = {}
    for folder in ("layer_1/width_16k/average_l0_7", "layer_1/width_65k/average_l0_9"):
        saes |= files_of(tmp_path / "sae", folder)
    server.repos["me/x"] = Repo(saes | {"layer_1/notes.txt": b""})
    server.repos["me/lm"] = Repo({"config.json": b"{}", "model.safetensors": b""})
    text = refused("hf://me/x/layer_1")
    assert "in it: layer_1/width_16k/average_l0_7, layer_1/width_65k/average_l0_9" in text
    assert "layer_1/width_16k/average_l0_7" in refused("hf://me/x/layer_1/width_16k/average_l0_8")
    assert "has no SAE in a format that is read here" in refused("hf://me/lm")
    whole = sae_jax.load("hf://me/x/layer_1/width_16k/average_l0_7/params.npz")  # its file's name
    assert whole.config.architecture == "jumprelu"
    assert cli("eval", "--sae=hf://me/x/layer_1", "--store=none") == 2
    error = capsys.readouterr().err
    assert "is not itself an SAE" in error and error.count("\n") == 1


def test_an_old_config_of_saelens(tmp_path, server):
    """As the first releases have it: no architecture, the hook at the top."""
    interop.export(random_sae("relu"), "saelens", tmp_path / "sae")
    cfg = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    for name in ("architecture", "metadata", "normalize_activations", "reshape_activations"):
        cfg.pop(name)
    old = {"hook_point": "blocks.8.hook_resid_pre", "hook_point_layer": 8, "prepend_bos": True,
           "activation_fn_str": "relu", "normalize_activations": False}  # fmt: skip
    files = files_of(tmp_path / "sae", "a") | {"a/cfg.json": json.dumps(cfg | old).encode()}
    server.repos["me/x"] = Repo(files)
    x = np.random.default_rng(0).normal(size=(20, cfg["d_in"])).astype(np.float32)
    sae = sae_jax.load("hf://me/x/a")
    np.testing.assert_array_equal(sae(x), sae_jax.load(tmp_path / "sae")(x))
    assert interop.site("hf://me/x/a") == "resid_pre.8"
    changed = cfg | old | {"activation_fn_str": "tanh-relu"}
    server.repos["me/x"].files = files | {"a/cfg.json": json.dumps(changed).encode()}
    with pytest.raises(UserError, match="architecture 'tanh-relu' cannot be read"):
        sae_jax.load("hf://me/x/a")


TABLE = """
res-canonical:
  conversion_func: gemma_2
  model: gemma-2-2b
  repo_id: me/x
  saes: [{id: layer_1/canonical, path: layer_1/average_l0_7}, {id: layer_2/canonical, path: b}]
moved: {conversion_func: null, repo_id: me/x, config_overrides: {normalize_activations: layer_norm},
  saes: [{id: a, path: a}]}
odd: {conversion_func: goodfire, repo_id: me/x, saes: [{id: a, path: a.pt}]}
coders: {conversion_func: gemma_2_transcoder, repo_id: me/x,
  saes: [{id: a, path: layer_1/average_l0_7}]}
embeds: {conversion_func: gemma_2, repo_id: me/x, saes: [{id: a, path: embedding/average_l0_7}]}
"""


@pytest.fixture
def sae_lens(tmp_path, monkeypatch):
    """A package that has the table, and must not be imported."""
    pytest.importorskip("yaml")
    package = tmp_path / "site" / "sae_lens"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    (package / "pretrained_saes.yaml").write_text(TABLE)
    monkeypatch.delitem(sys.modules, "sae_lens", raising=False)
    monkeypatch.syspath_prepend(package.parent)
    saelens_releases.read_table.cache_clear()
    yield package
    saelens_releases.read_table.cache_clear()


def test_releases_of_saelens(tmp_path, server, sae_lens, monkeypatch):
    interop.export(random_sae("jumprelu"), "gemma_scope", tmp_path / "sae")
    server.repos["me/x"] = Repo(files_of(tmp_path / "sae", "layer_1/average_l0_7"))
    for sae in (sae_jax.load("res-canonical", sae_id="layer_1/canonical"),
                sae_jax.load("saelens://res-canonical/layer_1/canonical")):  # fmt: skip
        assert (sae.config.architecture, sae.config.kind) == ("jumprelu", "autoencoder")
    assert sae_jax.load("saelens://coders/a").config.kind == "transcoder"
    assert sae_jax.load("coders", sae_id="a").config.kind == "transcoder"
    for name, complaint in {
        "embeds/a": "SAELens rescales SAEs of embeddings as it loads them",
        "res-canonica/layer_1": "did you mean 'res-canonical'",
        "res-canonical/layer_1/canonica": "did you mean 'layer_1/canonical'",
        "odd/a": "a format that is not read here: SAELens' loader for it is 'goodfire'",
        "moved/a": "SAELens changes normalize_activations to 'layer_norm'",
        "res-canonical/layer_2/canonical": "there is no SAE 'b' in me/x",
    }.items():
        with pytest.raises(UserError, match=complaint):
            sae_jax.load(f"saelens://{name}")
    (sae_lens / "pretrained_saes.yaml").unlink()
    saelens_releases.read_table.cache_clear()
    with pytest.raises(UserError, match="name the SAE as hf://"):
        sae_jax.load("saelens://odd/a")


def test_without_sae_lens_its_releases_are_not_known(monkeypatch):
    saelens_releases.read_table.cache_clear()
    monkeypatch.setattr(saelens_releases.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install sae-lens"):
        sae_jax.load("saelens://a/b")


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r'pip install "sae-jax\[hub\]"'):
        sae_jax.load("hf://me/x")


def test_weights_of_a_model_without_their_duplicates(tmp_path, server):
    files = files_of(FIXTURES / "gpt2")
    weights = files.pop("model.safetensors")
    index = {"weight_map": {name: "model-1.safetensors" for name in ("a", "b")}}
    duplicates = ("pytorch_model.bin", "onnx/model.onnx", "model.gguf", "consolidated.safetensors")
    server.repos["me/lm"] = repo = Repo(
        files
        | {"model-1.safetensors": weights, "code.py": b"raise SystemExit"}
        | {"model.safetensors.index.json": json.dumps(index).encode()}
        | dict.fromkeys(duplicates, b"")
    )
    assert lm.load_config("hf://me/lm") == lm.load_config(FIXTURES / "gpt2")
    assert server.sent() == ["config.json", "model.safetensors.index.json"]
    params = lm.load_params("hf://me/lm")
    assert server.sent() == ["model-1.safetensors"]
    jax.tree.map(np.testing.assert_array_equal, params, lm.load_params(FIXTURES / "gpt2"))
    model = lm.open_model("hf://me/lm")
    assert model.spec == f"hf://me/lm@{repo.commit('main')}"
    assert model.fingerprint == lm.fingerprint(model.spec) == lm.fingerprint("hf://me/lm")
    assert server.sent() == []
    repo.files = {"config.json": b'{"model_type": "rwkv"}', "model.safetensors": b""}
    assert "--model=torch:hf://me/lm" in str(refused("hf://me/lm", lm.load_params))
    assert server.sent() == ["config.json"]  # and no weights
    repo.files = files | {"pytorch_model.bin": b""}
    text = refused("hf://me/lm", lm.load_params)
    assert "has not model.safetensors" in text and "--model=torch:hf://me/lm" in text


def test_one_weight_file_goes_before_an_index(server):
    """As in transformers, and an index that names what is outside of the repository is refused."""
    index = {"weight_map": {"a": "model-1.safetensors"}}
    server.repos["me/lm"] = Repo(
        files_of(FIXTURES / "gpt2")
        | {"model-1.safetensors": b"stale"}
        | {"model.safetensors.index.json": json.dumps(index).encode()}
    )
    wanted = lm.load_params(FIXTURES / "gpt2")
    jax.tree.map(np.testing.assert_array_equal, lm.load_params("hf://me/lm"), wanted)
    assert "model-1.safetensors" not in server.sent()
    index["weight_map"]["a"] = "../../elsewhere"
    server.repos["me/b"] = Repo(
        {"config.json": (FIXTURES / "gpt2" / "config.json").read_bytes()}
        | {"model.safetensors.index.json": json.dumps(index).encode()}
    )
    with pytest.raises(UserError, match="index.json says that a is in another place"):
        lm.load_params("hf://me/b")


@pytest.mark.parametrize("live", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_store_knows_its_model_on_the_hub(tmp_path, server, live):
    files = files_of(lm.DEMO_MODEL)
    files["config.json"] += b" "  # another model than the one that ships here
    server.repos["me/lm"] = repo = Repo(files | {"pytorch_model.bin": b"not this"})
    name = f"hf://me/lm@{repo.commit('main')}"
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x + 1\n" * 100)
    flags = [f"--text={text}", "--sites=resid_post.0", "--context_length=32"]
    flags += ["--dtype=float32", f"--live={str(live).lower()}"]
    assert cli("harvest", "--model=hf://me/lm", f"--out={tmp_path / 'store'}", *flags) == 0
    assert server.sent() == sorted(file for file in files if file != "training.json")
    repo.revisions, repo.files = {"was": repo.files}, files_of(FIXTURES / "gpt2")  # main moves on
    store = lm.open_store(tmp_path / "store")
    assert store.meta.model == name
    assert store.meta.provenance["model_fingerprint"] == lm.fingerprint(name)
    if not live:
        return
    assert store.meta.live.model == name
    run = tmp_path / "run"
    config = make_config(str(store.path), steps=10, sae={"aux_coefficient": 0.0})
    train_run(config, run, open_stream=lm.open_stream)
    assert interop.read_provenance(run)["model_name"] == "me/lm"
    assert cli("eval", f"--run={run}", "--lm_tokens=64") == 0
    evaluation = json.loads((run / "eval.json").read_text())
    assert evaluation["settings"]["model"] == name
    assert evaluation["language_model"]["ce_clean"] > 0
    alone = tmp_path / "alone.json"
    assert cli("eval", f"--run={run}", "--model=none", f"--out={alone}") == 0
    assert json.loads(alone.read_text())["language_model"] is None
    assert not server.sent()


@pytest.mark.slow
def test_every_flag_takes_a_name_on_the_hub(tmp_path, server, monkeypatch):
    """Of an SAE: train.init, eval, export (which uploads it again). Of a model: bench."""
    store = make_store(tmp_path / "store")
    config = make_config(store, steps=3, sae={"aux_coefficient": 0.0})
    train_run(config, tmp_path / "first")
    interop.export(sae_jax.load(tmp_path / "first"), "sae_jax", tmp_path / "sae")
    server.repos["me/sae"] = Repo(files_of(tmp_path / "sae", "a"))
    server.repos["me/lm"] = Repo(files_of(lm.DEMO_MODEL))
    begun = dataclasses.replace(config.train, init="hf://me/sae/a")
    train_run(dataclasses.replace(config, train=begun), tmp_path / "second", load_sae=interop.load)
    out = tmp_path / "eval.json"
    evaluate = ["eval", "--sae=hf://me/sae/a", f"--store={store}", "--site=activations"]
    assert cli(*evaluate, "--holdout_fraction=0.2", f"--out={out}") == 0
    assert json.loads(out.read_text())["settings"]["sae"] == "hf://me/sae/a"
    export = ["export", "--checkpoint=hf://me/sae/a", "--format=saelens"]
    assert cli(*export, f"--out={tmp_path / 'again'}", "--push_to=hf://me/sae") == 0
    assert "/api/models/me/sae/commit/main" in server.uploads
    found = importlib.util.find_spec  # transformers does not run the model that ships here
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "torch" else found(n))
    bench = ["bench", "--harvest", "--model=hf://me/lm", "--tokens=2048", "--rounds=1"]
    assert cli(*bench, "--sites=resid_post.0", f"--out={tmp_path / 'bench.json'}") == 0


@pytest.mark.slow
def test_the_environment_is_obeyed(tmp_path):
    """In processes of their own: HF_ENDPOINT, HF_HOME, HF_TOKEN, then HF_HUB_OFFLINE."""
    pytest.importorskip("huggingface_hub")
    interop.export(random_sae("topk"), "saelens", tmp_path / "sae")

    def run(out: str, **environment) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "sae_jax", "import", "--path=hf://me/x/a"]
        environment = os.environ | {"HF_HOME": str(tmp_path / "home")} | environment
        return subprocess.run(
            [*command, f"--out={tmp_path / out}"], env=environment, capture_output=True, text=True
        )

    with hub_server.running() as server:
        server.repos["me/x"] = Repo(files_of(tmp_path / "sae", "a"), private=True)
        there = {"HF_ENDPOINT": server.url}
        without = run("1", **there)
        assert without.returncode == 2 and "or it is private" in without.stderr
        done = run("2", **there, HF_TOKEN=hub_server.TOKEN)
        assert done.returncode == 0, done.stderr
    done = run("3", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "3") == files_of(tmp_path / "2")
    assert run("4", **there).returncode == 0  # no server there any more; the cache has it
    shutil.rmtree(tmp_path / "home")
    nothing = run("5", HF_HUB_OFFLINE="1")
    assert nothing.returncode == 2 and "HF_HUB_OFFLINE is set" in nothing.stderr
    assert nothing.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of what transformers imports
def test_a_model_that_transformers_runs(tmp_path, server):
    """Of old weight files, which our decoder does not read."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.PhiConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=32, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    module = transformers.PhiForCausalLM(config)
    config.save_pretrained(tmp_path / "lm")
    torch.save(module.state_dict(), tmp_path / "lm" / "pytorch_model.bin")
    server.repos["me/lm"] = Repo(files_of(tmp_path / "lm") | {"code.py": b"", "flax.msgpack": b""})
    tokens = np.arange(10, dtype=np.int32)[None]
    want = lm.open_model(f"torch:{tmp_path / 'lm'}").forward(tokens)[0]
    for spec in ("torch:hf://me/lm", "torch:me/lm"):
        model = lm.open_model(spec)
        np.testing.assert_allclose(model.forward(tokens)[0], want, atol=1e-5)
        commit = server.repos["me/lm"].commit("main")
        assert model.spec == f"torch:hf://me/lm@{commit}"
        assert model.fingerprint == lm.open_model(f"torch:{tmp_path / 'lm'}").fingerprint
    assert set(server.sent()) <= {"config.json", "generation_config.json", "pytorch_model.bin"}
