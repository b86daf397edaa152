"""Models that transformers runs: the figures of our decoder, and families that it does not know."""

import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import world

from sae_jax import lm
from sae_jax.activations import Stream
from sae_jax.cli import main
from sae_jax.errors import UserError
from sae_jax.evaluate.report import evaluate
from sae_jax.evaluate.sources import HeldOutRows, ModelRows
from sae_jax.sae import ReLU, ReLUConfig, resolve

CONTEXT, WIDTH = 16, 16
SIZE = {"vocab_size": 300, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES = {
    "bloom": {"vocab_size": 300, "hidden_size": WIDTH, "n_layer": 2, "n_head": 4},
    "falcon": SIZE,
    "gptj": {"vocab_size": 300, "n_embd": WIDTH, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    "mpt": {"vocab_size": 300, "d_model": WIDTH, "n_layers": 2, "n_heads": 4},
    "olmo2": SIZE | {"intermediate_size": 40},
    "opt": SIZE | {"ffn_dim": 40, "word_embed_proj_dim": WIDTH, "max_position_embeddings": 64},
    "phi": SIZE | {"intermediate_size": 40},
    "stablelm": SIZE | {"num_key_value_heads": 2, "intermediate_size": 40},
}


def make_model(family, directory):
    """A random model of transformers', with the tokenizer of `world`."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    fields = FAMILIES.get(family, SIZE | {"num_key_value_heads": 2, "intermediate_size": 40})
    fields = fields | {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    world.make_model(directory)  # of which the tokenizer stays
    (directory / "model.safetensors").unlink()
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **fields)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weights in model.parameters():
            weights += 0.2 * torch.randn_like(weights)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_model("llama", tmp_path_factory.mktemp("bridge") / "llama")


IN_CI = ("bloom", "falcon", "olmo2", "opt")


@pytest.fixture(
    scope="module",
    params=[pytest.param(f, marks=() if f in IN_CI else pytest.mark.long) for f in FAMILIES],
)
def other(request, tmp_path_factory):
    directory = make_model(request.param, tmp_path_factory.mktemp("bridge") / request.param)
    return lm.open_model(f"torch:{directory}")


def tokens(seed=0):
    return np.random.default_rng(seed).integers(1, 200, (3, CONTEXT)).astype(np.int32)


def harvest(model, out, sites, **options):
    options = {"context_length": CONTEXT, "dtype": "float32", "batch_size": 4} | options
    mesh = jax.make_mesh((1, 1), ("data", "model"), devices=jax.devices()[:1])
    return lm.harvest(model, world.TEXTS * 20, out, sites=sites, mesh=mesh, **options)


@pytest.mark.peers
@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_figures_are_those_of_our_own_decoder(llama, tmp_path):
    """Rows at every site that both have, and an SAE's evaluation inside the model."""
    sites = [f"{name}.{layer}" for layer in (0, 1) for name in lm.SITES if name != "resid_mid"]
    own, bridged = (
        harvest(f"{prefix}{llama}", tmp_path / name, sites)
        for prefix, name in (("", "own"), ("torch:", "bridged"))
    )
    for site in sites:
        a, b = (store.read(site, slice(0, None)) for store in (own, bridged))
        np.testing.assert_allclose(b, a, atol=1e-5 * np.abs(a).max(), rtol=0, err_msg=site)
    assert bridged.meta.provenance["model_fingerprint"] == lm.fingerprint(llama)

    config = resolve(ReLUConfig(d_sae=32), WIDTH)
    sae = ReLU.from_parameters(
        config, ReLU.init_parameters(jax.random.key(0), config, np.zeros(WIDTH))
    )
    found = []
    for spec in (llama, f"torch:{llama}"):
        model = lm.open_model(spec)
        for source in (
            HeldOutRows(own, "resid_post.0", tokens=500, holdout_fraction=0.3),
            ModelRows(model, "resid_post.0", tokens(), what="tokens"),
        ):
            found.append(evaluate(sae, source, model).to_dict())
    for a, b in zip(found[:2], found[2:], strict=True):
        for part in ("reconstruction", "language_model"):
            assert b[part] == pytest.approx(a[part], rel=1e-4, abs=1e-6), part


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_what_a_layer_adds_is_what_attention_and_mlp_add(other):
    """Of every family, whether one reads the other's or both read the same; and z and mlp_act are
    what the last projections read."""
    names = ("resid_pre", "attn_out", "mlp_out", "resid_post", "z", "mlp_act")
    sites = [f"{name}.{layer}" for layer in (0, 1) for name in names]
    logits, x = other.forward(tokens(), taps=sites)
    assert logits.shape == (3, CONTEXT, other.vocab_size)
    for layer in (0, 1):
        pre, attention, mlp, post, z, act = (np.asarray(x[f"{n}.{layer}"]) for n in names)
        np.testing.assert_allclose(post - pre, attention + mlp, atol=1e-4)
        assert (z.shape[-1], act.shape[-1]) == (WIDTH, other.site_width(f"mlp_act.{layer}"))
    np.testing.assert_array_equal(x["resid_post.0"], x["resid_pre.1"])


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_replacements(other):
    """At chosen positions of a site's output and of an input."""
    where = np.random.default_rng(1).random((3, CONTEXT)) < 0.5
    clean, x = other.forward(tokens(), taps=("resid_post.0", "mlp_act.1"))
    for site, values in x.items():
        same, _ = other.forward(tokens(), edits={site: lm.at(where, lm.put(values))})
        np.testing.assert_allclose(same, clean, atol=1e-5)
        changed, seen = other.forward(
            tokens(), taps=(site,), edits={site: lm.at(where, jnp.zeros_like)}
        )
        np.testing.assert_array_equal(seen[site], np.where(where[..., None], 0, values))
        assert np.abs(changed - clean)[where].max() > 1e-3
    _, after = other.forward(tokens(), taps=("resid_pre.1",), edits={"resid_post.0": lm.put(0.0)})
    assert not np.asarray(after["resid_pre.1"]).any()


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_a_family_that_we_do_not_know_is_harvested_trained_on_and_evaluated(tmp_path):
    """By commands, from a store and from a live one, at a site by name and at a module by path."""
    model = f"torch:{make_model('opt', tmp_path / 'opt')}"
    text, sites = tmp_path / "text.txt", "resid_post.0,hf:model.decoder.layers.1.fc1"
    text.write_text("\n".join(world.TEXTS * 40))
    arguments = ["harvest", f"--model={model}", f"--text={text}", f"--sites={sites}",
                 f"--context_length={CONTEXT}", "--batch_size=4"]  # fmt: skip
    assert main([*arguments, f"--out={tmp_path / 'store'}"]) == 0
    assert main([*arguments, f"--out={tmp_path / 'live'}", "--live"]) == 0
    stores = [lm.open_store(tmp_path / name) for name in ("store", "live")]
    streams = [Stream(store, sites, batch_size=64).batches() for store in stores]
    for a, b in zip(*streams, strict=True):
        np.testing.assert_array_equal(a, b)
    run = tmp_path / "run"
    fields = {"data.store": tmp_path / "live", "data.site": "resid_post.0", "data.batch_size": 64,
              "data.epochs": 5, "sae.d_sae": 32, "sae.k": 4, "train.tokens": 64 * 30}  # fmt: skip
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    assert main(["train", f"--workdir={run}", *flags]) == 0
    assert main(["eval", f"--run={run}", f"--model={model}"]) == 0
    found = json.loads((run / "eval.json").read_text())["language_model"]
    assert 0 < found["kl_spliced"] < found["kl_zero"] and found["replaced"] > 100


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_mistakes_in_words(tmp_path):
    model = lm.open_model(f"torch:{make_model('phi', tmp_path / 'phi')}")
    for site, message in {
        "resid_mid.0": "unknown site 'resid_mid.0'; .* has attn_out, mlp_act, .* 0 to 1, and hf:",
        "resid_post.2": "unknown site 'resid_post.2'",
        "hf:model.layer": "did you mean 'model.layers'",
        "hf:model.layers": "has no part in a pass",
        "hf:model.rotary_emb": "has shape .*, no row for each token",
    }.items():
        with pytest.raises(UserError, match=message):
            model.site_width(site)
    mesh = jax.make_mesh((1, 2), ("data", "model"), devices=jax.devices()[:2])
    with pytest.raises(UserError, match="runs on one device; leave the mesh's model axis"):
        lm.open_model(model.spec, mesh=mesh)
    torch = pytest.importorskip("torch")
    before, weights = model.fingerprint, model._module.state_dict()
    (model.directory / "model.safetensors").unlink()
    torch.save(weights, model.directory / "pytorch_model.bin")  # as models of before 2023 have it
    old = lm.open_model(model.spec)
    assert old.site_width("z.0") == WIDTH and old.fingerprint != before
    (model.directory / "config.json").write_text('{"model_type": "unheard_of"}')
    with pytest.raises(UserError, match="transformers cannot read"):
        lm.open_model(model.spec)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000 in .*<= 10000"),
        ({"text_config": {"n_layers": 10**9}}, "n_layers = 1000000000 in .*<= 10000"),
        ({"num_attention_heads": 0}, "transformers cannot read"),
        ({"rope_parameters": "x"}, "transformers cannot read"),
        ({"hidden_size": "x"}, "transformers cannot read"),
    ],
)
def test_a_config_that_transformers_cannot_use(llama, tmp_path, fields, message):
    """It raises errors of many classes, and makes lists of as many layers as the file says."""
    model = shutil.copytree(llama, tmp_path / "model")
    values = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(values | fields))
    with pytest.raises(UserError, match=message):
        lm.open_model(f"torch:{model}").site_width("resid_post.0")


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_weights_that_transformers_would_make_up(llama, tmp_path):
    """A tensor that is missing, and one that holds NaN."""
    model = shutil.copytree(llama, tmp_path / "model")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = safetensors.numpy.load_file(model / "model.safetensors")
    for value, message in ((np.nan, f"parameter {name} .* NaN"), (None, f"no tensor {name}")):
        if value is None:
            del tensors[name]
        else:
            tensors[name][3, 4] = value
        safetensors.numpy.save_file(tensors, model / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=message):
            lm.open_model(f"torch:{model}").site_width("resid_post.0")


def test_without_torch(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r'needs torch and transformers: pip install "sae-jax\[hf'):
        lm.open_model(f"torch:{tmp_path}")
