"""The dashboard's server: real requests to a tiny model, and what is refused."""

import concurrent.futures
import contextlib
import gzip
import http.client
import json
import threading

import numpy as np
import planted_collection as planted
import pytest
import world

from sae_jax import lm, local_server
from sae_jax.errors import UserError
from sae_jax.interpret import dashboard, used_tokens
from sae_jax.interpret.ablation import ablation_effects

D_SAE, SITE = 60, "resid_post.0"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(latents, model), of a model whose contexts are as long as the collection's."""
    directory = tmp_path_factory.mktemp("server")
    world.make_model(directory / "model")
    model = lm.open_model(directory / "model")
    tokens = planted.make_tokens(model.tokenizer)
    collection, _ = planted.plant(directory / "collection", tokens, D_SAE)
    labels = dashboard.Labels({7: "a fox"})
    latents = dashboard.Latents(
        collection, planted.make_sae(D_SAE), model.tokenizer, model,
        written_site=SITE, labels=labels,
    )  # fmt: skip
    return latents, model


@contextlib.contextmanager
def serving(latents, model, host=local_server.LOCAL):
    """Yields the address of a server, and a function that asks it."""
    live = dashboard.Live(latents, model, (SITE,))
    known = dashboard.about(latents, title="A title", shard=dashboard.SHARD, can=live.can)
    server, address = dashboard.open_server(latents, known, live, 0, host)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()

    def ask(method: str, path: str, body=None, **headers):
        """(status, headers, body); names of headers have _ for -."""
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
        with contextlib.closing(connection):
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, named)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()

    try:
        yield address, ask
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def ask(made):
    with serving(*made) as (_, ask):
        yield ask


def post(ask, name: str, values) -> dict:
    status, headers, body = ask("POST", f"/api/{name}", json.dumps(values), **JSON)
    assert (status, headers["Content-Type"]) == (200, "application/json"), body
    return json.loads(body)


@pytest.mark.slow
def test_the_files_are_those_of_the_folder_made_when_asked_for(made, ask):
    latents, model = made
    about = json.loads(ask("GET", "/data/about.json")[2])
    assert about["live"] and all(about["can"].values()) and about["shard"] * about["shards"] >= 60
    assert ask("GET", "/data/index.bin")[2] == latents.columns().tobytes()
    assert json.loads(gzip.decompress(ask("GET", "/data/labels.json.gz")[2])) == {"7": "a fox"}
    found = []
    for number in range(about["shards"]):
        status, headers, data = ask("GET", f"/data/latents/{number:05}.json.gz")
        assert status == 200 and headers["Content-Encoding"] is None
        found += json.loads(gzip.decompress(data))
    assert [one["index"] for one in found] == list(range(D_SAE))
    (seven,) = [one for one in found if one["index"] == 7]
    assert seven["label"] == "a fox" and len(seven["promoted"]) == 8
    used = used_tokens(model.tokenizer, model.vocab_size)
    assert sum(seven["logit_histogram"]["counts"]) == used.sum() > 100


def test_a_page_is_served_with_headers_that_keep_it_to_itself(ask):
    _, headers, _ = ask("GET", "/data/about.json")
    assert headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self'")
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"


def activations(made, text: str) -> np.ndarray:
    """The activations of a text's tokens, by hand, (tokens, D_SAE)."""
    latents, model = made
    ids = model.tokenizer.encode(text)
    tokens = np.zeros((1, 16), np.int32)  # as long as the server's, which is compiled
    tokens[0, 1 : len(ids) + 1] = ids
    _, taps = model.forward(tokens, taps=[SITE], logits=False)
    w_enc, w_dec = (np.asarray(w[...]) for w in (latents.sae.w_enc, latents.sae.w_dec))
    values = np.asarray(taps[SITE])[0, 1 : len(ids) + 1] @ w_enc
    values[values < np.sort(values, axis=1)[:, -4, None]] = 0  # the top 4
    return np.maximum(values, 0) * np.linalg.norm(w_dec, axis=1)


@pytest.mark.parametrize("sort", ["max", "mean", "frequency"])
def test_latents_of_texts_are_those_of_the_model(made, ask, sort):
    texts, negatives = ["The quick fox", "naïve café 🙂"], ["lazy"]
    answer = post(ask, "encode", {"texts": texts, "negatives": negatives, "top": 5, "sort": sort})
    by_hand = [activations(made, text) for text in texts]
    active = np.all([a.max(axis=0) > 0 for a in by_hand], axis=0)
    active &= activations(made, "lazy").max(axis=0) == 0
    score = {
        "max": lambda a: a.max(axis=0),
        "mean": lambda a: a.mean(axis=0),
        "frequency": lambda a: (a > 0).mean(axis=0),
    }[sort]
    score = np.mean([score(a) for a in by_hand], axis=0)
    expected = sorted(np.flatnonzero(active), key=lambda i: (-score[i], i))[:5]
    assert expected and [one["index"] for one in answer["latents"]] == expected
    for one in answer["latents"]:
        assert one["score"] == pytest.approx(score[one["index"]], rel=1e-4)
        for values, a in zip(one["values"], by_hand, strict=True):
            np.testing.assert_allclose(values, a[:, one["index"]], atol=1e-4)
    for text, shown, a in zip(texts, answer["texts"], by_hand, strict=True):
        assert "".join(shown["pieces"]) == text
        assert shown["stops"][-1] == len(a) == len(shown["tokens"])
        for token, pairs in enumerate(shown["tokens"]):
            assert len(pairs) == np.count_nonzero(a[token]) <= 8
            assert pairs[0][0] == a[token].argmax()


def test_tokens_of_very_high_norm_do_not_count(made):
    class Sink(lm.JaxModel):
        def forward(self, tokens, taps=(), edits=None, logits=True):
            found, tapped = super().forward(tokens, taps, edits, logits)
            return found, {site: x.at[:, 1].multiply(1000.0) for site, x in tapped.items()}

    latents, model = made
    live = dashboard.Live(latents, Sink(model.directory), (SITE,))
    answer = live.answer("encode", {"texts": ["The quick brown fox"], "top": 60})
    assert answer["texts"][0]["tokens"][0] == []
    assert all(one["values"][0][0] == 0 for one in answer["latents"])


@pytest.mark.slow
def test_ablating_a_latent_of_an_example(made, ask):
    latents, model = made
    example = latents.collection.examples(9)[0][0]
    window = {"start": example.start, "stop": example.stop}
    answer = post(ask, "ablate", {"latent": 9, "sequence": example.sequence, **window})
    effects = ablation_effects(model, latents.sae, SITE, 9, np.asarray(example.ids))
    np.testing.assert_allclose(
        answer["effects"], effects[example.start : example.stop], rtol=1e-4, atol=1e-6
    )


@pytest.mark.slow
def test_a_clamp_changes_the_continuation_and_no_clamp_does_not(ask):
    asked = {"prompt": "The quick", "max_new_tokens": 8}
    clamped = post(ask, "generate", {**asked, "clamps": [{"latent": 9, "factor": 30}]})
    assert clamped["clean"] != clamped["steered"]
    same = post(ask, "generate", asked)
    assert same["clean"] == same["steered"] == clamped["clean"]


def test_search_finds_labels_and_examples(ask):
    found = post(ask, "search", {"query": "FOX", "limit": 4})["latents"]
    assert found[0] == 7 and len(found) == 4


BAD = [
    ("encode", "{", "not valid JSON"),
    ("encode", "[]", "the request"),
    ("encode", "{}", "texts"),
    ("encode", '{"texts": []}', "texts"),
    ("encode", '{"texts": [""]}', "a text of 0 tokens"),
    ("encode", '{"texts": [3]}', "texts"),
    ("encode", json.dumps({"texts": ["word " * 100]}), "it must have 1 to 31"),
    ("encode", '{"texts": ["a"], "sort": "best"}', "sort"),
    ("encode", '{"texts": ["a"], "top": 0}', "top"),
    ("encode", "[" * 100_000, "nested too deep"),
    ("generate", '{"prompt": "a", "clamps": [{"latent": 60, "factor": 1}]}', "0 to 59"),
    ("generate", '{"prompt": "a", "clamps": [{"latent": 1, "factor": 1e9}]}', "factor"),
    ("generate", '{"prompt": "a", "clamps": [{"latent": 1, "factor": NaN}]}', "factor"),
    ("generate", json.dumps({"prompt": "a", "clamps": [{"latent": 1, "factor": 1}] * 2}), "twice"),
    ("generate", '{"prompt": "a", "temperature": -1}', "temperature"),
    ("generate", '{"prompt": "a", "max_new_tokens": 1000000}', "max_new_tokens"),
    ("ablate", '{"latent": 9, "sequence": 1, "start": 0, "stop": 3}', "no example of latent 9"),
    ("ablate", '{"latent": 600, "sequence": 0, "start": 0, "stop": 3}', "0 to 59"),
    ("ablate", '{"latent": 9, "sequence": -1, "start": 0, "stop": 3}', "sequence"),
    ("search", '{"query": 3}', "query"),
]


@pytest.mark.parametrize("name, body, says", BAD)
def test_a_bad_request_is_one_sentence(ask, name, body, says):
    status, _, answer = ask("POST", f"/api/{name}", body, **JSON)
    error = json.loads(answer)["error"]
    assert status == 400 and says in error and "\n" not in error, error


def test_a_failure_of_ours_is_said_to_the_page_and_in_the_log(made, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("two\nlines")

    with serving(*made) as (_, ask):
        monkeypatch.setattr(dashboard.Live, "search", fail)
        status, _, body = ask("POST", "/api/search", '{"query": "a"}', **JSON)
    assert status == 500
    assert json.loads(body)["error"] == "/api/search failed: RuntimeError: two lines"
    assert "the dashboard: /api/search failed: RuntimeError: two lines" in caplog.text


def test_what_is_not_for_this_server_is_refused(ask):
    texts = json.dumps({"query": "a"})
    refused = [
        (ask("GET", "/data/latents/00099.json.gz"), 404),
        (ask("GET", "/data/latents/0000%D9%A3.json.gz"), 404),
        (ask("GET", "/../pyproject.toml"), 404),
        (ask("GET", "/%2e%2e/%2e%2e/server.py"), 404),
        (ask("GET", "//etc/passwd"), 404),
        (ask("GET", "/data/settings.json"), 404),
        (ask("POST", "/api/nothing", texts, **JSON), 404),
        (ask("POST", "/", texts, **JSON), 404),
        (ask("PUT", "/api/search", texts, **JSON), 501),
        (ask("GET", "/", Host="evil.example"), 403),
        (ask("GET", "/", Host="[:::"), 403),
        (ask("POST", "/api/search", texts, **JSON, Host="evil.example"), 403),
        (ask("POST", "/api/search", texts, **JSON, Origin="http://evil.example"), 415),
        (ask("POST", "/api/search", texts, Content_Type="text/plain"), 415),
        (ask("POST", "/api/search", texts), 415),
        (ask("POST", "/api/search", b"", **JSON, Content_Length="1000000000"), 413),
        (ask("POST", "/api/search", b"", **JSON, Content_Length="-1"), 413),
        (ask("POST", "/api/search", b"", **JSON, Content_Length="0" * 20 + "9" * 9), 413),
    ]
    assert [answer[0] for answer, _ in refused] == [code for _, code in refused]
    host = {"Origin": "http://localhost:1", "Host": "localhost:1"}
    assert ask("POST", "/api/search", texts, **JSON, **host)[0] == 200


def test_others_need_the_secret_of_the_address(made):
    with serving(*made, host="0.0.0.0") as (address, ask):
        path = "/" + address.split("/", 3)[3]
        secret = path.partition("=")[2]
        assert len(secret) >= 32
        assert ask("GET", "/data/about.json")[0] == 403
        assert ask("GET", "/?token=" + "x" * len(secret))[0] == 403
        assert ask("GET", path, Host="evil.example")[0] == 403
        status, headers, _ = ask("GET", path, Host="10.1.2.3:80")
        cookie = headers["Set-Cookie"]
        assert (
            status == 303 and headers["Location"] == "/" and "HttpOnly; SameSite=Strict" in cookie
        )
        kept = cookie.partition(";")[0]
        assert secret in kept
        assert ask("GET", "/data/about.json", Cookie=f"a=b; {kept}")[0] == 200
        assert ask("GET", "/data/about.json", Cookie=f"{kept}x")[0] == 403
        search = json.dumps({"query": "fox"})
        assert ask("POST", "/api/search", search, **JSON)[0] == 403
        assert ask("POST", "/api/search", search, **JSON, Cookie=kept)[0] == 200
    with pytest.raises(UserError, match="--host=nowhere.invalid is no IPv4 address"):
        local_server.open_server(None, 0, "nowhere.invalid")


def test_without_a_model_there_is_only_the_search(made):
    latents, _ = made
    with serving(latents, None) as (_, ask):
        can = json.loads(ask("GET", "/data/about.json")[2])["can"]
        assert [name for name in can if can[name]] == ["search"]
        for name, values in (("encode", {"texts": ["a"]}), ("generate", {"prompt": "a"})):
            status, _, body = ask("POST", f"/api/{name}", json.dumps(values), **JSON)
            assert status == 400 and "--model=DIR" in json.loads(body)["error"]
        assert post(ask, "search", {"query": "fox"})["latents"]


@pytest.mark.slow
def test_many_at_once_get_what_one_gets(ask):
    def asked(number: int):
        if number % 3:
            return ask("GET", f"/data/latents/{number % 8:05}.json.gz")[2]
        return post(ask, "encode", {"texts": ["The quick fox"]})

    alone = [asked(number) for number in range(24)]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        assert list(pool.map(asked, range(24))) == alone
