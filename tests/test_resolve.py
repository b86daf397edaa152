"""Settings that contradict each other, or the data, are refused by name before any device."""

import subprocess
import sys

import numpy as np
import pytest

from sae_jax import sae as saes
from sae_jax.activations import open_stream, write_store
from sae_jax.config import Config, DataConfig, override
from sae_jax.errors import UserError
from sae_jax.sae import MatryoshkaConfig, TopKConfig, by_name
from sae_jax.train import preparation

REFUSED = [
    ("topk", {"sparsity_coefficient": 1.0}, ["sae.sparsity_coefficient", "topk"]),
    ("batchtopk", {"target_l0": 8.0}, ["sae.target_l0", "batchtopk"]),
    ("relu", {"k": 3}, ["sae.k", "relu"]),
    ("gated", {"p_end": 0.5}, ["sae.p_end", "gated"]),
    ("gated", {"unit_norm_decoder": False}, ["sae.unit_norm_decoder", "gated"]),
    ("relu", {"bandwidth": 0.1}, ["sae.bandwidth", "relu"]),
    ("topk", {"prefix_widths": (8, 40)}, ["sae.prefix_widths", "topk"]),
    ("batchtopk", {"multi_topk": True}, ["sae.multi_topk", "batchtopk"]),
    ("topk", {"k": 41}, ["sae.k", "sae.d_sae, 40", "41"]),
    ("topk", {"k": 0}, ["sae.k"]),
    ("topk", {"k_start": 41}, ["sae.k_start", "40"]),
    ("relu", {"target_l0": 41.0}, ["sae.target_l0", "sae.d_sae, 40", "41"]),
    ("relu", {"target_l0": 5.0, "sparsity_coefficient": 0.0}, ["sae.target_l0", "which is 0"]),
    ("jumprelu", {"sparsity_loss": "quadratic"}, ["quadratic", "sae.target_l0"]),
    ("jumprelu", {"sparsity_loss": "l1"}, ["sae.sparsity_loss", "'l0'"]),
    ("jumprelu", {"gradient_to": "al"}, ["sae.gradient_to", "'all'"]),
    ("jumprelu", {"bandwidth": 0.0}, ["sae.bandwidth"]),
    ("matryoshka", {"prefix_widths": (8, 8, 40)}, ["sae.prefix_widths must grow", "8,8,40"]),
    ("matryoshka", {"prefix_widths": (8, 16)}, ["sae.prefix_widths", "end at sae.d_sae, 40"]),
    ("matryoshka", {"prefix_widths": ()}, ["sae.prefix_widths"]),
    ("topk", {"aux_k": 0}, ["sae.aux_k"]),
    ("relu", {"aux_coefficient": -0.1}, ["sae.aux_coefficient"]),
    ("relu", {"resample_every_tokens": -1}, ["sae.resample_every_tokens"]),
    ("topk", {"d_sae": 0}, ["sae.d_sae"]),
    ("topk", {"compute_dtype": "float16"}, ["sae.compute_dtype", "bfloat16"]),
    ("topk", {"b_dec_init": "median"}, ["sae.b_dec_init", "'mean'"]),
    ("topk", {"normalize": "l2"}, ["sae.normalize"]),
    ("topkk", {}, ["sae.architecture", "'topk'"]),
    ("topk", {"kind": "crosscode"}, ["sae.kind", "'crosscoder'"]),
    ("relu", {"sparsity_coefficient": -1.0}, ["sae.sparsity_coefficient"]),
    ("relu", {"sparsity_warmup_fraction": 1.5}, ["sae.sparsity_warmup_fraction"]),
    ("relu", {"p_end": 1.5}, ["sae.p_end"]),
    ("relu", {"decoder_init_norm": 0.0}, ["sae.decoder_init_norm"]),
    ("topk", {"dead_after_tokens": 0}, ["sae.dead_after_tokens"]),
    ("topk", {"d_in": 7}, ["sae.d_in is 7", "6 wide"]),
]


def picks(architecture) -> dict:
    """A k that 40 latents have."""
    has_k = architecture in ("topk", "batchtopk", "matryoshka")
    return {"k": 32} if has_k else {}


def refusal(architecture, sites=6, target=None, **changes) -> str:
    with pytest.raises(UserError) as error:
        config = by_name(architecture).Config(**({"d_sae": 40} | picks(architecture) | changes))
        saes.resolve(config, sites, target)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("architecture,changes,words", REFUSED)
def test_resolve_refuses(architecture, changes, words):
    message = refusal(architecture, **changes)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("architecture", saes.ARCHITECTURES)
def test_kinds_that_do_not_fit_the_sites(architecture):
    assert "data.site=a,b" in refusal(architecture, kind="crosscoder")
    assert "sae.kind=crosscoder" in refusal(architecture, (6, 4))
    assert "data.target_site" in refusal(architecture, kind="transcoder")
    assert "sae.kind=transcoder" in refusal(architecture, target=4)
    message = refusal(architecture, (6, 4), kind="crosscoder", site_widths=(5, 5))
    assert "sae.site_widths" in message and "(6, 4)" in message


def test_transcoder_cannot_shift_its_input_by_b_dec():
    message = refusal("topk", target=4, kind="transcoder", apply_b_dec_to_input=True)
    assert "sae.apply_b_dec_to_input" in message


@pytest.mark.parametrize("architecture", saes.ARCHITECTURES)
@pytest.mark.parametrize("kind", ["autoencoder", "transcoder", "skip_transcoder", "crosscoder"])
def test_resolve_is_idempotent(architecture, kind):
    sites = (4, 2) if kind == "crosscoder" else 6
    target = 4 if "transcoder" in kind else None
    config = saes.resolve(by_name(architecture).Config(kind=kind, d_sae=40), sites, target)
    assert saes.resolve(config, sites, target) == config
    assert config.d_out == (target or 6)


def test_sites_of_a_config(tmp_path):
    rng = np.random.default_rng(0)
    rows = {name: rng.normal(size=(1024, width)) for name, width in (("a", 6), ("b", 4))}
    write_store(tmp_path / "two", [rows])
    write_store(tmp_path / "one", [rows["a"]], site="a")

    def resolved(store, kind, site="", target=""):
        data = DataConfig(
            store=str(tmp_path / store), site=site, target_site=target,
            batch_size=64, virtual_shards=8,
        )  # fmt: skip
        config = Config(sae=TopKConfig(kind=kind, d_sae=40, k=2), data=data)
        return preparation.resolve(config, open_stream(data))

    config = resolved("two", "crosscoder", "a,b")
    assert config.sae.site_widths == (6, 4) and config.sae.d_in == config.sae.d_out == 10
    config = resolved("two", "skip_transcoder", "b", "a")
    assert (config.sae.d_in, config.sae.d_out) == (4, 6)
    assert (config.data.site, config.data.target_site) == ("b", "a")
    assert resolved("one", "autoencoder").data.site == "a"
    for arguments, words in [
        (("one", "crosscoder"), ["crosscoder", "two or more sites"]),
        (("one", "crosscoder", "a,b"), ["'b'", "one"]),
        (("two", "crosscoder", "a,a"), ["a", "twice"]),
        (("two", "transcoder", "a"), ["data.target_site"]),
        (("two", "transcoder", "a", "a"), ["a", "twice"]),
        (("two", "autoencoder", "a,b"), ["sae.kind=crosscoder"]),
        (("two", "autoencoder"), ["a", "b"]),
    ]:
        with pytest.raises(UserError) as error:
            resolved(*arguments)
        assert all(word in str(error.value) for word in words), str(error.value)


def test_widths_on_the_command_line():
    nested = Config(sae=MatryoshkaConfig())
    config = override(nested, {"sae.prefix_widths": "256,512,4096", "sae.k_start": "64"})
    assert config.sae.prefix_widths == (256, 512, 4096) and config.sae.k_start == 64
    for text in ("256,x", "256,1.5"):
        with pytest.raises(UserError, match="sae.prefix_widths"):
            override(nested, {"sae.prefix_widths": text})


def test_refused_before_a_device_is_touched(tmp_path):
    write_store(tmp_path / "store", [np.zeros((1024, 6)) + np.arange(6)])
    program = (
        "import sys, jax; from sae_jax import cli\n"
        "jax.devices = jax.make_mesh = None\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    flags = ["train", f"--config.data.store={tmp_path / 'store'}", f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            program,
            *flags,
            "--config.data.batch_size=64",
            "--config.sae.sparsity_coefficient=1",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert "sae.sparsity_coefficient" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
