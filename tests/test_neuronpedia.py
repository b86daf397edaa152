"""Neuronpedia and SAEDashboard: planted latents come out as exact JSON, within every limit; uploads
to a real server survive its failures; SAEDashboard's own programs take what is written."""

import dataclasses
import gzip
import json
import os
import subprocess
import sys
import time

import jax.numpy as jnp
import neuronpedia_server
import numpy as np
import pytest
import world

from sae_jax import interop, lm
from sae_jax.cli import main
from sae_jax.errors import UserError
from sae_jax.evaluate.metrics import activation_scale
from sae_jax.interpret import collection, effects
from sae_jax.interpret.dashboard import Neurons
from sae_jax.interpret.explain.labels import Mark, Said
from sae_jax.interpret.neuronpedia import (
    Export,
    Release,
    planned,
    push,
    write_bulk,
    write_saedashboard,
    write_upload_batches,
)
from sae_jax.sae import ReLU, ReLUConfig, resolve

SITE, WIDTH, D_SAE, LENGTH, ROWS = "resid_post.0", 16, 6, 12, 100
BOS = 0


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("neuronpedia") / "model"
    world.make_model(directory)
    return directory


@pytest.fixture(scope="module")
def tokenizer(model_directory):
    return lm.load_tokenizer(model_directory)


def make_sae(kind="autoencoder", scale=1.0):
    rows = np.zeros((D_SAE, WIDTH), np.float32)
    rows[:, 0], rows[:, 5], rows[:, 7] = 3.0, -4.0, np.arange(D_SAE)
    config = resolve(ReLUConfig(d_sae=D_SAE, kind=kind), WIDTH)
    arrays = {"w_enc": rows.T, "w_dec": rows, "b_enc": np.zeros(D_SAE), "b_dec": np.zeros(WIDTH)}
    arrays = {name: jnp.asarray(a, jnp.float32) for name, a in arrays.items()}
    return ReLU.from_parameters(config, arrays, scale)


def write_collection(path, tokenizer, about=None, **changes):
    """Plants latents 0, 2, 3, 4 and 5; latent 1 never fired. Latent i has the maximum 2 i + 2."""
    text = "".join(world.TEXTS)
    ids = np.array([BOS, *tokenizer.encode(text)], np.int32)
    tokens = np.stack([np.roll(ids, -7 * i)[:LENGTH] for i in range(4)])
    tokens[3, -1] = 100_000  # of a vocabulary that is padded beyond the tokenizer's
    slots = 4
    maximum = 2.0 * np.arange(D_SAE, dtype=np.float32) + 2
    maximum[1] = 0
    value = np.zeros((D_SAE, slots), np.float32)
    value[:] = maximum[:, None] * np.array([1.0, 0.75, 0.75, 0.25])
    histogram = np.zeros((D_SAE, collection.BINS), np.uint32)
    histogram[:, [0, 12, 37, 49]] = [3, 1, 1, 1]
    histogram[1] = 0
    window = np.zeros((D_SAE, slots, 4), np.uint16)
    window[:, 0] = [0, 0, collection.FULL, collection.FULL // 5]
    window[:, 1:] = [0, 0, 1, 0]
    arrays = {
        "histogram": histogram,
        "value": value,
        "sequence": np.tile(np.array([0, 1, 2, 3], np.int32), (D_SAE, 1)),
        "position": np.tile(np.array([5, 0, 11, 10], np.int32), (D_SAE, 1)),
        "window": window,
        "coactive": np.full((D_SAE, collection.COACTIVE), -1, np.int32),
        "similarity": np.zeros((D_SAE, collection.COACTIVE), np.float32),
        "tokens": tokens,
        "numbers": np.arange(4),
    }
    latents = {
        "density": np.where(maximum > 0, 0.06, 0).astype(np.float32),
        "mean_activation": maximum / 3,
        "max_activation": maximum,
    }
    for name, array in changes.items():
        (latents if name in latents else arrays)[name] = array
    settings = {
        "version": 1, "settings": {}, "d_sae": D_SAE, "rows": ROWS, "top": 2, "intervals": 2,
        "per_interval": 1, "before": 2, "after": 1,
    }  # fmt: skip
    about = collection.About(**(settings | (about or {})))
    return collection.write(path, about, latents, arrays)


@pytest.fixture
def export(tmp_path, tokenizer):
    planted = write_collection(tmp_path / "collection", tokenizer)
    return Export(planted, make_sae(), tokenizer, SITE, "tiny-1", "0-mine-res")


def changed(export, **fields):
    return dataclasses.replace(export, **fields)


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_an_upload_is_this(export, tmp_path):
    tokens = [export.token(int(t)) for t in export.collection.array("tokens")[0]]
    assert tokens[:4] == ["<|bos|>", "The", " ", "q"]
    labelled = changed(export, labels={0: "the word fox", 1: "dead"}, method="oai_token-act-pair")
    written = write_upload_batches(tmp_path / "out", labelled, batch=2)
    assert (written.latents, written.left_out) == (5, 1)
    assert written.files == ["batch-0.json", "batch-1.json", "batch-2.json"]
    bodies = [read(tmp_path / "out" / name) for name in written.files]
    assert [[f["index"] for f in body["features"]] for body in bodies] == [[0, 2], [3, 4], [5]]
    first = bodies[0]["features"][0]
    top, at_start, interval, low = first.pop("activations")
    assert bodies[0] | {"features": []} == {
        "modelId": "tiny-1", "source": "0-mine-res", "features": []
    }  # fmt: skip
    assert first == {
        "index": 0,
        "density": 0.06,
        "explanations": [{"text": "the word fox", "methodName": "oai_token-act-pair"}],
    }
    assert top == {
        "tokens": tokens[3:7],
        "values": [0.0, 0.0, 2.0, 0.4],
        "quantileMin": -1,
        "quantileMax": 2.0,
    }
    # Windows end where their sequences do.
    assert at_start["values"] == [1.5, 0.0] and len(at_start["tokens"]) == 2
    # Histogram: 1 of 100 tokens at 0.74 of the maximum, 1 at 0.98; 3 at 0.01 and 1 at 0.25.
    assert (interval["quantileMin"], interval["quantileMax"]) == (1.0, 2.0)
    assert interval["quantileFraction"] == 0.02 and interval["values"] == [0.0, 0.0, 1.5]
    assert (low["quantileMin"], low["quantileMax"], low["quantileFraction"]) == (0.0, 1.0, 0.04)
    assert low["tokens"][-1] == "<|outofrange|>" and low["values"] == [0.0, 0.0, 0.5, 0.0]
    assert bodies[1]["features"][0]["activations"][0]["values"] == [0.0, 0.0, 8.0, 1.6]


EXPLAINED = {
    0: [
        Said("llm", "Delphi-1", "foxes \0" + "🙂" * 300, "", "GPT-4o-mini", [
            Mark("detection", 0.75, {"shuffled": 0.5}, 100, 2, "Judge-1"),
            Mark("fuzzing", None, {}, 0, 0), Mark("simulation", 0.5, {"none": 0.25}, 60, 1),
        ]),
        Said("statistics", "rules-1", "the token fox", "token", "", [Mark("f1", 0.9, {}, 8, 0)]),
    ],
    2: [Said("statistics", "rules-1", "", "", "", []), Said("", "", None, "", "", [])],
}  # fmt: skip


def test_all_explanations_are_uploaded_with_their_methods_and_within_the_limits(export, tmp_path):
    explained = changed(export, labels={0: "mine"}, method="by-hand", explanations=EXPLAINED)
    write_upload_batches(tmp_path / "out", explained)
    body = read(tmp_path / "out" / "batch-0.json")
    mine, llm, rules = body["features"][0]["explanations"]
    assert mine == {"text": "mine", "methodName": "by-hand"}
    assert (llm["methodName"], llm["modelName"]) == ("sae_jax-llm-delphi-1", "gpt-4o-mini")
    assert llm["text"].startswith("foxes ") and llm["text"].endswith("🙂…")
    assert 511 <= len(llm["text"].encode("utf-16-le")) // 2 <= 512
    assert rules == {"text": "the token fox", "methodName": "sae_jax-statistics-rules-1"}
    assert all("explanations" not in feature for feature in body["features"][1:])
    assert neuronpedia_server.what_is_wrong(body) is None
    with pytest.raises(UserError, match="another export, with explanations"):
        write_upload_batches(tmp_path / "out", changed(explained, explanations={}))
    with pytest.raises(UserError, match="latent 6 is explained, but the SAE has 6"):
        write_upload_batches(tmp_path / "o", changed(export, explanations={6: EXPLAINED[0]}))


def test_the_bulk_layout_has_explanations_and_their_scores(export, tmp_path):
    explained = changed(export, labels={2: "mine"}, explanations=EXPLAINED)
    write_bulk(tmp_path / "out", explained, Release(), batch=4)
    rows = rows_of(tmp_path / "out" / "tiny-1" / "0-mine-res")
    llm, rules, mine = rows["explanations"]
    assert [row["index"] for row in rows["explanations"]] == [0, 0, 2]
    assert (mine["description"], mine["typeName"]) == ("mine", None)
    assert len(llm["description"]) > 300 and llm["explanationModelName"] == "gpt-4o-mini"
    assert len({row["id"] for kind in rows.values() for row in kind if "id" in row}) == 26
    assert [
        (row["explanationId"], row["explanationScoreTypeName"], row["value"])
        for row in rows["scores"]
    ] == [
        (llm["id"], "eleuther_recall", 0.75),
        (llm["id"], "sae_jax-simulation", 0.5),
        (rules["id"], "sae_jax-f1", 0.9),
    ]
    assert rows["scores"][0]["explanationScoreModelName"] == "judge-1"
    assert json.loads(rows["scores"][0]["jsonDetails"]) == []
    assert json.loads(rows["scores"][1]["jsonDetails"])["controls"] == {"none": 0.25}


def test_tokens_are_text_where_they_can_be(tokenizer, export):
    names = {tokenizer.backend.id_to_token(i): i for i in range(tokenizer.vocab_size)}
    for name, shown in (("Ġ", " "), ("Ċ", "\n"), ("ĉ", "\t"), ("<|bos|>", "<|bos|>"), ("a", "a")):
        assert export.token(names[name]) == shown  # as SAEDashboard's HTML_ANOMALIES have it
    assert export.token(names["Ã"]) == "Ã"  # the first byte of é, é and others
    assert export.token(names["Ā"]) == "<0x00>"  # the character 0
    assert export.token(-1) == export.token(10**6) == "<|outofrange|>"
    assert all(export.vocabulary)


def test_hostile_text_is_text(export, tmp_path):
    label = '</script><script>alert(1)</script>"\\\u2028\r\n\u202e\x1b[31m🙂'
    write_upload_batches(tmp_path / "out", changed(export, labels={0: label}))
    lines = (tmp_path / "out" / "batch-0.json").read_bytes().split(b"\n")
    assert len(lines) == 2 and not lines[1]
    body = json.loads(lines[0])
    assert body["features"][0]["explanations"][0]["text"] == label
    assert neuronpedia_server.what_is_wrong(body) is None


def test_values_are_those_of_the_sae_that_is_exported():
    sae = make_sae(scale=3.0)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(50, WIDTH)), jnp.float32)
    activations = sae.encode(x) * activation_scale(sae)
    # Small ones are differences of large numbers, and rounded as these are.
    np.testing.assert_allclose(
        sae.fold().encode(x), activations, rtol=1e-5, atol=1e-6 * float(activations.max())
    )


def test_with_a_model_the_promoted_tokens_and_their_histogram(export, model_directory, tmp_path):
    model = lm.open_model(model_directory)
    with_model = changed(export, model=model)
    write_upload_batches(tmp_path / "out", with_model)
    write_saedashboard(tmp_path / "theirs", with_model)
    expected = effects.output_tokens(export.sae, model, SITE, np.array([2]), 10)
    feature = read(tmp_path / "out" / "batch-0.json")["features"][1]
    for name, ids, values in (
        ("topLogits", expected.promoted, expected.promoted_values),
        ("bottomLogits", expected.suppressed, expected.suppressed_values),
    ):
        assert [x["token"] for x in feature[name]] == [export.token(i) for i in ids[0]]
        np.testing.assert_allclose([x["value"] for x in feature[name]], values[0], rtol=1e-4)
    theirs = read(tmp_path / "theirs" / "batch-0.json")["features"][2]
    assert sum(theirs["logits_hist_data_bar_heights"]) == expected.histogram.sum()
    bars = theirs["logits_hist_data_bar_values"]
    assert len(bars) == 50 and expected.low[0] < bars[0] < bars[-1] < expected.high[0]


LIMITS = {
    "the model's name": (dict(model_id="GPT2"), {}),
    "the source at Neuronpedia is 'res'": (dict(source="res"), {}),
    "the source at": (dict(source="0-../../x"), {}),
    "latent 2: its label, explanations.text, has 0": (dict(labels={2: ""}), {}),
    "latent 2: its label, explanations.text, has 513": (dict(labels={2: "x" * 513}), {}),
    "latent 2: its label, explanations.text, has 514": (dict(labels={2: "🙂" * 257}), {}),
    "latent 3: its label holds half of a character": (dict(labels={3: "\ud800"}), {}),
    "latent 3: its label holds the character 0": (dict(labels={3: "a\0"}), {}),
    "a label is of latent 6": (dict(labels={6: "x"}), {}),
    "the labels' method is 'OAI'": (dict(method="OAI"), {}),
    "examples of 1,025 tokens": ({}, dict(about={"before": 1000, "after": 24})),
    "latent 4: density is 1.5": ({}, dict(density=np.array([0, 0, 0, 0, 1.5, 0], np.float32))),
    "latent 5: activations is inf": (
        {},
        dict(max_activation=np.array([1, 0, 1, 1, 1, np.inf], np.float32)),
    ),
    "latent 0: activations is 100000000.0": (
        {},
        dict(max_activation=np.array([1e8, 0, 1, 1, 1, 1], np.float32)),
    ),
    "latent 0: values has a number that is not finite": (
        {},
        dict(value=np.full((D_SAE, 4), np.inf, np.float32)),
    ),
    "is of 7 latents, but the SAE has 6": ({}, dict(about={"d_sae": 7})),
    "no latent of": ({}, dict(max_activation=np.zeros(D_SAE, np.float32))),
    "latent 0 is not as it must be: activations: ": (
        {},
        dict(value=np.zeros((D_SAE, 4), np.float32)),
    ),
}


@pytest.mark.parametrize("says", LIMITS)
def test_what_neuronpedia_refuses_is_named_before_anything_is_there(says, tmp_path, tokenizer):
    fields, changes = LIMITS[says]
    planted = write_collection(tmp_path / "collection", tokenizer, **changes)
    export = Export(planted, make_sae(), tokenizer, SITE, "tiny-1", "0-mine-res")
    with pytest.raises(UserError) as error:
        write_upload_batches(tmp_path / "out", changed(export, **fields))
    assert says in str(error.value)
    assert not (tmp_path / "out").exists()


def test_other_things_that_are_refused(export, tmp_path):
    with pytest.raises(UserError, match="129 latents a file; it may be 1 to 128"):
        write_upload_batches(tmp_path / "out", export, batch=129)
    nameless = changed(export)
    nameless.vocabulary[:] = [""] * len(nameless.vocabulary)
    with pytest.raises(UserError, match=r"latent 0 .*activations\[0\].tokens\[0\]"):
        write_upload_batches(tmp_path / "out", nameless)
    both = make_sae()
    object.__setattr__(both.config, "kind", "crosscoder")
    with pytest.raises(UserError, match="a crosscoder writes to several sites"):
        write_bulk(tmp_path / "out", changed(export, sae=both), Release())


def test_after_an_interruption_the_same_call_goes_on(export, tmp_path):
    whole = write_upload_batches(tmp_path / "whole", export, batch=1)
    values = np.load(export.collection.path / "value.npy")
    damaged = values.copy()
    damaged[3] = np.nan
    np.save(export.collection.path / "value.npy", np.where(np.isnan(damaged), np.inf, damaged))
    reopened = changed(export, collection=collection.Collection(export.collection.path))
    out = tmp_path / "out"
    with pytest.raises(UserError, match="latent 3"):
        write_upload_batches(out, reopened, batch=1)
    part = tmp_path / "tmp.out"
    assert sorted(p.name for p in part.iterdir()) == [
        "batch-0.json", "batch-1.json", "neuronpedia.json"
    ]  # fmt: skip
    os.utime(part / "batch-0.json", ns=(1, 1))
    np.save(export.collection.path / "value.npy", values)
    reopened = changed(export, collection=collection.Collection(export.collection.path))
    write_upload_batches(out, reopened, batch=1)
    assert not part.exists() and (out / "batch-0.json").stat().st_mtime_ns == 1
    for name in (*whole.files, "neuronpedia.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_another_export_is_left_as_it_is(export, tmp_path):
    out = tmp_path / "out"
    write_upload_batches(out, export)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    write_upload_batches(out, export)  # the same: nothing to do
    with pytest.raises(UserError, match="another export, with source '0-mine-res' and not '0-b'"):
        write_upload_batches(out, changed(export, source="0-b"))
    with pytest.raises(UserError, match="with layout 'upload' and not 'saedashboard'"):
        write_saedashboard(out, export)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(UserError, match="mine exists and is not empty"):
        write_upload_batches(tmp_path / "mine", export)
    (tmp_path / "mine").rename(tmp_path / "tmp.new")
    with pytest.raises(UserError, match="tmp.new is in the way"):
        write_upload_batches(tmp_path / "new", export)
    assert (tmp_path / "tmp.new" / "thesis.tex").exists()


def test_saedashboards_files(export, tmp_path):
    written = write_saedashboard(tmp_path / "out", changed(export, source="0-mine-res__l0-40"))
    batch = read(tmp_path / "out" / written.files[0])
    features = batch.pop("features")
    assert batch == {
        "model_id": "tiny-1", "layer": 0, "sae_set": "mine-res", "sae_id_suffix": "l0-40"
    }  # fmt: skip
    assert [f["feature_index"] for f in features] == list(range(D_SAE))
    dead = features[1]
    assert dead["activations"] == dead["freq_hist_data_bar_heights"] == []
    # Decoder row (3, -4, 2) at columns 0, 5, 7, at length 1; the largest, not the largest in size.
    fifth = features[2]
    assert fifth["neuron_alignment_indices"] == [0, 7, 1]
    unit = np.array([3, 2, 0]) / np.sqrt(29)
    np.testing.assert_allclose(fifth["neuron_alignment_values"], unit, rtol=1e-4)
    np.testing.assert_allclose(fifth["neuron_alignment_l1"], [3 / 9, 2 / 9, 0], rtol=1e-4)
    assert sum(fifth["freq_hist_data_bar_heights"]) == 6
    np.testing.assert_allclose(fifth["freq_hist_data_bar_values"][:2], [0.06, 0.18], rtol=1e-4)
    top, _, interval, _ = fifth["activations"]
    assert (top["bin_min"], top["bin_max"], top["bin_contains"]) == (-1, 6.0, -1)
    assert (interval["bin_min"], interval["bin_max"], interval["bin_contains"]) == (3.0, 6.0, 0.02)
    for example in fifth["activations"]:
        assert example["values"][example["qualifying_token_index"]] == max(example["values"])


def rows_of(folder):
    found = {}
    for kind in ("features", "activations", "explanations", "scores"):
        files = sorted((folder / kind).glob("*.jsonl.gz"))
        lines = [line for file in files for line in gzip.decompress(file.read_bytes()).splitlines()]
        found[kind] = [json.loads(line) for line in lines]
    return found


def test_the_bulk_layout(export, tmp_path):
    labelled = changed(export, labels={2: "fox"}, method="np_max-act", labeller="gpt-4o-mini")
    release = Release("tiny-release", "A title", "Me", url="https://example.org")
    write_bulk(tmp_path / "out", labelled, release, batch=4)
    folder = tmp_path / "out" / "tiny-1" / "0-mine-res"
    rows = rows_of(folder)
    assert [r["index"] for r in rows["features"]] == list(range(D_SAE))
    assert rows["features"][2]["maxActApprox"] == 6.0
    assert rows["features"][2]["hookName"] == "blocks.0.hook_resid_post"
    # Latent 2's row is (3, -4, 2); those of 1 and 3 are nearest.
    near = rows["features"][2]["topkCosSimIndices"]
    assert set(near[:2]) == {1, 3} and 2 not in near
    assert len(rows["activations"]) == 5 * 4
    assert len({r["id"] for r in rows["activations"]} | {rows["explanations"][0]["id"]}) == 21
    (explanation,) = rows["explanations"]
    assert explanation["description"] == "fox" and explanation["index"] == 2
    assert explanation["explanationModelName"] == "gpt-4o-mini"
    (source,) = map(json.loads, (folder / "source.jsonl").read_text().splitlines())
    assert (source["num_prompts"], source["num_tokens_in_prompt"]) == (4, LENGTH)
    (head,) = map(json.loads, (folder / "release.jsonl").read_text().splitlines())
    assert head["name"] == "tiny-release" and head["urls"] == ["https://example.org"]


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("MY_KEY", neuronpedia_server.KEY)
    with neuronpedia_server.serve() as server:
        yield server


def send(directory, server):
    return push(directory, url=server.url, key_variable="MY_KEY", wait=0.001)


def test_uploads_survive_a_server_that_fails(export, server, tmp_path):
    write_upload_batches(tmp_path / "out", export, batch=1)
    server.failures = [503, "close", (429, {"retry-after": "0"}, b""), 500, None, 502]
    done = send(tmp_path / "out", server)
    assert len(done.sent) == 5 and done.there == 0 and server.asked == 10
    assert [body["features"][0]["index"] for body in server.requests] == [0, 2, 3, 4, 5]
    assert send(tmp_path / "out", server).there == 5 and server.asked == 10


def test_an_upload_that_was_stopped_goes_on(export, server, tmp_path):
    write_upload_batches(tmp_path / "out", export, batch=1)
    server.failures = [None, None]
    server.always = (500, {}, b'{"error": "Source set not found."}')
    with pytest.raises(UserError) as error:
        send(tmp_path / "out", server)
    assert "batch-2.json" in str(error.value) and "Source set not found. 8 times" in str(
        error.value
    ).replace(") ", " ")
    assert "2 of 5 files are there" in str(error.value)
    server.always = None
    assert send(tmp_path / "out", server).sent == ["batch-2.json", "batch-3.json", "batch-4.json"]
    assert len(server.requests) == 5


@pytest.mark.slow
def test_a_process_that_is_killed_while_it_sends(export, server, tmp_path):
    """SIGKILL between an upload's requests, and then the same call: each file arrives once."""
    write_upload_batches(tmp_path / "out", export, batch=1)
    server.failures = [None, None, (503, {"retry-after": "100"}, b"")]
    send = (
        "import sys; from sae_jax.interpret.neuronpedia import push; "
        "push(sys.argv[1], url=sys.argv[2], key_variable='MY_KEY')"
    )
    command = [sys.executable, "-c", send, str(tmp_path / "out"), server.url]
    process = subprocess.Popen(command)
    while server.asked < 3 and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert len(server.requests) == 2
    subprocess.run(command, check=True)
    assert [body["features"][0]["index"] for body in server.requests] == [0, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "answer, says",
    [
        ((400, {}, b'{"error": "bad token", "path": "features[0]"}'), "400 (bad token, features"),
        ((401, {}, b"<html>"), "answered 401; is the key right?"),
        ((401, {}, f'{{"error": "{neuronpedia_server.KEY}"}}'.encode()), "401 (***)"),
        ((413, {}, b""), "write smaller files"),
        ((307, {"location": "https://evil.example/"}, b""), "points to https://evil.example/"),
    ],
)
def test_refusals_are_told_at_once_and_without_the_key(answer, says, export, server, tmp_path):
    write_upload_batches(tmp_path / "out", export)
    server.always = answer
    with pytest.raises(UserError) as error:
        send(tmp_path / "out", server)
    assert says in str(error.value) and server.asked == 1
    assert neuronpedia_server.KEY not in str(error.value)


def test_a_plan_sends_nothing_and_needs_no_key(export, server, tmp_path, monkeypatch):
    write_upload_batches(tmp_path / "out", export, batch=4)
    shown = planned(tmp_path / "out", url=server.url, key_variable="MY_KEY")
    size = (tmp_path / "out" / "batch-0.json").stat().st_size
    assert f"batch-0.json: 4 latents, {size:,} bytes" in shown and "2 requests" in shown
    assert "is set" in shown and neuronpedia_server.KEY not in shown
    monkeypatch.delenv("MY_KEY")
    shown = planned(tmp_path / "out", url=server.url, key_variable="MY_KEY")
    assert "is not set" in shown and server.asked == 0


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(key_variable="NOT_SET"), "key is not set"),
        (dict(url="http://neuronpedia.example"), "in the clear; write https://"),
        (dict(url="ftp://127.0.0.1"), "is no address of a server"),
        (dict(url="https://me:secret@127.0.0.1"), "holds a password"),
    ],
)
def test_what_cannot_be_sent(options, says, export, server, tmp_path):
    write_upload_batches(tmp_path / "out", export)
    with pytest.raises(UserError) as error:
        push(tmp_path / "out", **({"url": server.url, "key_variable": "MY_KEY"} | options))
    assert says in str(error.value) and server.asked == 0
    assert "NOT_SET" not in str(error.value) and "secret" not in str(error.value)


def test_only_a_finished_upload_is_sent(export, server, tmp_path):
    with pytest.raises(UserError, match="holds no finished export"):
        send(tmp_path, server)
    write_saedashboard(tmp_path / "out", export)
    with pytest.raises(UserError, match="of the layout saedashboard; only upload can be sent"):
        send(tmp_path / "out", server)


@pytest.fixture
def board(tokenizer, model_directory, tmp_path):
    """Returns a function that runs `sae-jax dashboard` on planted latents, and returns its code."""
    sae, out = tmp_path / "sae", tmp_path / "board"
    interop.export(make_sae(), "sae_jax", sae)
    out.mkdir()
    settings = {"sae": str(sae), "site": SITE}
    write_collection(out / "collection", tokenizer, about={"settings": settings})
    shape = (D_SAE, 3)
    Neurons(np.zeros(shape, np.int32), np.zeros(shape, np.float32)).save(out / "neurons.npz")
    (tmp_path / "labels.json").write_text('{"2": "the word fox"}')
    flags = [f"--sae={sae}", f"--out={out}", f"--model={model_directory}"]
    names = {"neuronpedia": tmp_path / "np", "np_model": "tiny-1", "np_source": "0-mine-res"}

    def run(*more, **others):
        named = (f"--{name}={value}" for name, value in (names | others).items() if value)
        return main(["dashboard", *flags, *named, *more])

    return run


def test_the_command_writes_shows_and_sends(board, server, tmp_path, capsys):
    labels = [f"--labels={tmp_path / 'labels.json'}", "--np_method=np_max-act"]
    push_it = ["--push", f"--np_server={server.url}", "--np_key_env=MY_KEY", *labels]
    assert board(*push_it, "--dry_run") == 0
    shown = capsys.readouterr().out
    assert "5 latents; 1 that never fired are left out" in shown and "1 requests" in shown
    assert server.asked == 0
    assert board(*push_it) == 0
    assert "Sent: 1 files" in capsys.readouterr().out
    (body,) = server.requests
    assert body["features"][1]["explanations"] == [
        {"text": "the word fox", "methodName": "np_max-act"}
    ]
    assert len(body["features"][1]["topLogits"]) == 10
    assert board(*push_it) == 0
    assert "Sent: 0 files" in capsys.readouterr().out and server.asked == 1


@pytest.mark.slow
def test_the_command_writes_the_other_layouts(board, tmp_path):
    release = ["--np_release=r", "--np_creator=Me", "--np_weights=hf://me/saes/l0"]
    for layout, more in (("saedashboard", []), ("bulk", release)):
        flags = [f"--np_layout={layout}", "--np_batch=2", *more]
        assert board(*flags, neuronpedia=tmp_path / layout) == 0
    assert len(list((tmp_path / "saedashboard").glob("batch-*.json"))) == 3
    folder = tmp_path / "bulk" / "tiny-1" / "0-mine-res"
    source = read(folder / "source.jsonl")
    assert (source["hfRepoId"], source["hfFolderId"]) == ("me/saes", "l0")
    assert len(rows_of(folder)["features"]) == D_SAE


@pytest.mark.parametrize(
    "more, others, says",
    [
        ([], {"np_model": "GPT2"}, "the model's name at Neuronpedia is 'GPT2'"),
        ([], {"np_source": None}, "--neuronpedia needs Neuronpedia's names"),
        (["--np_layout=bulk", "--push"], {}, "--push is of --np_layout=upload"),
        (["--dry_run"], {}, "--dry_run shows what --push would send"),
        (["--np_creator=me"], {}, "--np_creator is of --np_layout=bulk"),
        (["--np_method=x"], {}, "--np_method is of the labels of --labels=FILE"),
        (["--serve"], {}, "--neuronpedia is instead of --serve"),
        ([], {"neuronpedia": None}, "--np_model is of --neuronpedia=DIR"),
    ],
)
def test_flags_that_do_not_go_together(more, others, says, board, tmp_path, capsys):
    assert board(*more, **others) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "np").exists()


@pytest.mark.peers
@pytest.mark.filterwarnings("default")  # of what the package imports
def test_saedashboards_own_programs_take_it(export, tmp_path):
    """How to have the package: test_export_peers.py. Its repository, first on PYTHONPATH, has
    neuronpedia_export too, which needs orjson."""
    dashboard = pytest.importorskip("sae_dashboard.neuronpedia.neuronpedia_dashboard")
    export = changed(export, source="0-mine-res__l0-40", dataset="a text")
    batches, ours, theirs = (tmp_path / name for name in ("batches", "ours", "theirs"))
    write_saedashboard(batches, export)
    written = read(batches / "batch-0.json")
    assert dashboard.NeuronpediaDashboardBatch(**written).to_dict() == written
    exporter = pytest.importorskip("sae_dashboard.neuronpedia.neuronpedia_export")
    exporter.export_neuronpedia_dashboards(
        exporter.NeuronpediaExportConfig(
            saedashboard_output_dir=str(batches), exports_dir=str(theirs), creator_name="Me",
            creator_id="someone", release_id="tiny-release", release_title="A title",
            url="https://example.org", model_name="tiny-1", neuronpedia_source_set_id="mine-res",
            neuronpedia_source_set_description="A title", hf_weights_repo_id="me/saes",
            hf_weights_path="l0/sae_weights.safetensors", hook_point="hook_resid_post",
            layer_num=0, prompts_huggingface_dataset_path="a text", n_prompts_total=4,
            n_tokens_in_prompt=LENGTH,
        )
    )  # fmt: skip
    about = ("tiny-release", "A title", "Me", "someone", "https://example.org", "me/saes", "l0")
    write_bulk(ours, export, Release(*about))
    (ours / "neuronpedia.json").unlink()
    names = {p.relative_to(theirs) for p in theirs.rglob("*") if p.is_file()}
    assert len(names) == 6
    assert names == {p.relative_to(ours) for p in ours.rglob("*") if p.is_file()}
    for name in names:
        mine, other = (
            gzip.decompress(data) if name.suffix == ".gz" else data
            for data in ((root / name).read_bytes() for root in (ours, theirs))
        )
        mine, other = ([json.loads(x) for x in lines.splitlines()] for lines in (mine, other))
        assert len(mine) == len(other) >= 1, name
        made_apart = {"createdAt", "updatedAt", "topkCosSimIndices", "topkCosSimValues"}
        made_apart |= {"id"} if "activations" in name.parts else set()
        for row, expected in zip(mine, other, strict=True):
            assert row.keys() == expected.keys(), name
            for field in row.keys() - made_apart:
                assert row[field] == expected[field], (name, field)
