"""What the dashboard shows of latents, against a planted collection, and the folder it writes."""

import collections
import gzip
import json

import numpy as np
import planted_collection as planted
import pytest
import world

from sae_jax import lm
from sae_jax.errors import UserError
from sae_jax.interpret import dashboard
from sae_jax.interpret.collection import FULL
from sae_jax.interpret.dashboard import neighbours, words
from sae_jax.interpret.dashboard.search import TextSearch
from sae_jax.interpret.explain import records
from sae_jax.interpret.explain.records import Explanation, Score
from sae_jax.interpret.text import pieces, token_bytes, token_text

D_SAE = 300
HOSTILE = ["</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "\u202e\u0000'\"&"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("dashboard") / "model"
    world.make_model(directory)
    return lm.load_tokenizer(directory)


@pytest.fixture(scope="module")
def made(tmp_path_factory, tokenizer):
    """(latents, the planted arrays, tokens)"""
    tokens = planted.make_tokens(tokenizer, [*world.TEXTS, *HOSTILE])
    path = tmp_path_factory.mktemp("planted") / "collection"
    collection, arrays = planted.plant(path, tokens, D_SAE)
    labels = dashboard.Labels({3: "</script> a name", 299: "last"}, {3: 0.5})
    latents = dashboard.Latents(collection, planted.make_sae(D_SAE), tokenizer, labels=labels)
    return latents, arrays, tokens


def about_of(latents):
    return dashboard.about(latents, title="A title", metrics=[("fvu", 0.25, "")])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, made):
    out = tmp_path_factory.mktemp("site") / "out"
    dashboard.export(out, made[0], about_of(made[0]))
    return out


def read(file):
    return json.loads(gzip.decompress(file.read_bytes()))


def test_each_latent_of_the_folder_is_what_was_planted(folder, made, tokenizer):
    latents, arrays, tokens = made
    about = json.loads((folder / "data/about.json").read_text())
    assert (about["d_sae"], about["shard"], about["shards"], about["live"]) == (300, 256, 2, False)
    assert not any(about["can"].values()) and about["metrics"] == [["fvu", 0.25, ""]]
    names = [group["name"] for group in about["groups"]]
    assert names == ["highest", "50–100% of the maximum", "0–50% of the maximum"]
    found = [one for i in range(2) for one in read(folder / f"data/latents/{i:05}.json.gz")]
    assert [one["index"] for one in found] == list(range(D_SAE))
    maximum = latents.collection.max_activation
    for one, latent in zip(found, range(D_SAE), strict=True):
        assert one["max"] == pytest.approx(maximum[latent], rel=1e-5)
        assert one["histogram"] == arrays["histogram"][latent].tolist()
        assert one["coactive"] == ([[latent - 1, 0.25]] if latent else [])
        assert one["promoted"] is one["neurons"] is one["logit_histogram"] is None
        slots = np.flatnonzero(arrays["value"][latent] > 0)
        assert sum(map(len, one["groups"])) == len(slots)
        shown = iter([example for group in one["groups"] for example in group])
        for slot, example in zip(slots, shown, strict=True):
            row, peak = arrays["sequence"][latent, slot], arrays["position"][latent, slot]
            assert example["sequence"] == 10 * row
            start, stop = max(0, peak - planted.BEFORE), min(planted.LENGTH, peak + 4)
            assert example["start"] == start
            expected = pieces(tokenizer, tokens[row], start, stop)
            assert example["pieces"] == [piece.text for piece in expected]
            assert [len(v) for v in example["values"]] == [p.stop - p.start for p in expected]
            values = np.concatenate(example["values"])
            window = arrays["window"][latent, slot, start - peak + 4 : stop - peak + 4]
            expected_values = window * (maximum[latent] / FULL)
            expected_values[peak - start] = arrays["value"][latent, slot]
            np.testing.assert_allclose(values, expected_values, atol=6e-4 * maximum[latent])
            inside = expected[example["peak"]]
            assert inside.start <= peak < inside.stop
            if any(len(v) > 1 for v in example["values"]):
                cut = [len(names) for names in example["tokens"]]
                assert cut == [len(v) if len(v) > 1 else 0 for v in example["values"]]
            else:
                assert "tokens" not in example
    assert any("tokens" in e for one in found for g in one["groups"] for e in g), "split characters"
    assert found[3]["label"] == "</script> a name" and found[3]["score"] == 0.5


def test_the_index_and_the_labels(folder, made):
    latents, _, _ = made
    data = (folder / "data/index.bin").read_bytes()
    density, mean, largest, score = np.frombuffer(data, "<f4").reshape(4, D_SAE)
    np.testing.assert_array_equal(density, latents.collection.density)
    np.testing.assert_array_equal(mean, latents.collection.mean_activation)
    np.testing.assert_array_equal(largest, latents.collection.max_activation)
    assert score[3] == 0.5 and np.isnan(np.delete(score, 3)).all()
    assert read(folder / "data/labels.json.gz") == {"3": "</script> a name", "299": "last"}


def test_a_hint_says_on_which_tokens_a_latent_peaks_most_often(folder, made, tokenizer):
    latents, arrays, tokens = made
    found = read(folder / "data/hints.json.gz")
    for latent in range(D_SAE):
        slots = np.flatnonzero(arrays["value"][latent, : latents.collection.about.top] > 0)
        rows, places = arrays["sequence"][latent, slots], arrays["position"][latent, slots]
        texts = [token_text(tokenizer, i).strip() or "␣" for i in tokens[rows, places]]
        expected = [text for text, _ in collections.Counter(texts).most_common(4)]
        assert found.get(str(latent), "") == " · ".join(expected)


def test_the_words_at_the_peaks_are_found_in_the_file_of_their_hash(folder):
    found = {}
    for part in range(64):
        file = read(folder / f"data/words/{part:02x}.json.gz")
        assert all(words.part_of(word) == part for word in file)
        found |= file
    shown = [one for i in range(2) for one in read(folder / f"data/latents/{i:05}.json.gz")]
    for word in ("quick", "עולם", "überall", "alert"):
        expected = []
        for one in shown:
            texts = ["".join(e["pieces"][max(0, e["peak"] - 4) : e["peak"] + 1]).lower()
                     for e in one["groups"][0]]  # fmt: skip
            if any(word in words._WORD.findall(text) for text in texts):
                expected.append(one["index"])
        assert expected and found[word] == expected
    assert words.part_of("a") == 0xE40C292C % 64, "FNV-1a of 32 bits"


@pytest.mark.parametrize("columns", [7, 64, 10_000])
def test_neighbours_are_those_of_all_cosines(monkeypatch, columns):
    monkeypatch.setattr(neighbours, "_COLUMNS", columns)
    sae = planted.make_sae(60)
    rows = np.asarray(sae.w_dec[...])
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    units = rows / np.where(norms > 0, norms, 1)
    cosines = units @ units.T
    np.fill_diagonal(cosines, -2)
    found = neighbours.Neighbours(sae).find(np.array([0, 5, 59]))
    for latent, near in zip((0, 5, 59), found, strict=True):
        expected = np.argsort(-cosines[latent], kind="stable")[:8]
        assert [i for i, _ in near] == expected.tolist()
        np.testing.assert_allclose([c for _, c in near], cosines[latent][expected], atol=1e-6)


def test_few_latents_have_few_neighbours():
    for count in (1, 2):
        assert [len(n) for n in neighbours.Neighbours(planted.make_sae(count)).find([0])] == [
            count - 1
        ]


def test_the_search_finds_exactly_the_windows_with_the_query(made, tokenizer):
    latents, arrays, tokens = made
    search = TextSearch(latents.collection, tokenizer, latents.labels)
    assert search.find("\ud800", 10) == [], "half a character"
    for query in ("brown</b> fox", "QUICK", "עולם", "script>alert", "e", "🙂", "no such text"):
        plain, expected = query.encode().lower(), set()
        for latent, slot in np.argwhere(arrays["value"] > 0):
            ids = tokens[arrays["sequence"][latent, slot]]
            peak = arrays["position"][latent, slot]
            parts = [token_bytes(tokenizer, i).lower() for i in ids]
            text, starts = b"".join(parts), np.cumsum([0, *map(len, parts)])
            at = -1
            while (at := text.find(plain, at + 1)) >= 0:
                token = np.searchsorted(starts, at, side="right") - 1
                if peak - planted.BEFORE <= token <= peak + planted.AFTER:
                    expected.add(latent)
        assert set(search.find(query, 10_000)) == expected, query
        assert bool(expected) == (query != "no such text")
    assert search.find("</SCRIPT> a", 10)[0] == 3, "labels come first"
    assert len(search.find("e", 5)) == 5 and search.find(" ", 5) == []


def test_the_same_folder_again_byte_for_byte_and_where_it_was_stopped(folder, made, tmp_path):
    files = sorted(f.relative_to(folder) for f in folder.rglob("*") if f.is_file())
    assert not [file for file in files if "tmp" in file.name]
    dashboard.export(tmp_path / "b", made[0], about_of(made[0]))
    for lost in ("data/about.json", "data/latents/00001.json.gz", "data/words/00.json.gz"):
        (tmp_path / "b" / lost).unlink()
    kept = (tmp_path / "b/data/latents/00000.json.gz").stat().st_mtime_ns
    dashboard.export(tmp_path / "b", made[0], about_of(made[0]))
    assert (tmp_path / "b/data/latents/00000.json.gz").stat().st_mtime_ns == kept
    for file in files:
        assert (tmp_path / "b" / file).read_bytes() == (folder / file).read_bytes(), file


def test_a_folder_of_something_else_is_left_as_it_is(folder, made, tmp_path):
    latents, _, _ = made
    other = dashboard.Latents(latents.collection, latents.sae, latents.tokenizer)
    before = (folder / "data/about.json").read_bytes()
    with pytest.raises(UserError, match="other latents, texts or labels; give --overwrite"):
        dashboard.export(folder, other, about_of(other))
    assert (folder / "data/about.json").read_bytes() == before
    (tmp_path / "data").mkdir()
    (tmp_path / "data/mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is there, and of no dashboard"):
        dashboard.export(tmp_path, latents, about_of(latents))
    assert [file.name for file in tmp_path.rglob("*")] == ["data", "mine.txt"]
    damaged = tmp_path / "damaged"
    dashboard.export(damaged, latents, about_of(latents))
    (damaged / "data/latents/00000.json.gz").write_bytes(b"\x1f\x8bnot")
    with pytest.raises(UserError, match="00000.json.gz is damaged"):
        dashboard.export(damaged, latents, about_of(latents))
    dashboard.export(damaged, other, about_of(other), overwrite=True)
    assert read(damaged / "data/labels.json.gz") == {}


@pytest.mark.parametrize(
    "name, text, says",
    [
        ("a.csv", "latent,label\n7,seven\n", None),
        ("a.csv", "latent,label,score\n7,seven,0.5\n8,eight,\n", None),
        ("a.json", '{"7": "seven"}', None),
        ("a.json", '{"7": {"label": "seven", "score": 0.5}}', None),
        ("a.json", '[{"latent": 7, "label": "seven"}]', None),
        ("a.csv", "latent,name\n7,seven\n", "line 2: there is no column label"),
        ("a.csv", "latent,label\nseven,7\n", "line 2: 'seven' is not the number"),
        ("a.csv", "latent,label,score\n7,a,good\n", "score is 'good'"),
        ("a.csv", "latent,label\n7,a\n7,b\n", "two labels of latent 7"),
        ("a.json", '{"300": "x"}', "latent 300; there are 0 to 299"),
        ("a.json", '{"-1": "x"}', "'-1' is not the number"),
        ("a.json", '{"7": 7}', "a.json"),
        ("a.json", '{"7": {"label": 7}}', "a.json"),
        ("a.json", "[7]", "a.json"),
        ("a.json", "{", "not valid JSON"),
        ("no.json", None, "cannot read"),
    ],
)
def test_labels_are_read_or_refused_in_a_line(tmp_path, name, text, says):
    if text is not None:
        (tmp_path / name).write_text(text)
    if says is None:
        assert dashboard.read_labels(tmp_path / name, 300).names[7] == "seven"
        return
    with pytest.raises(UserError, match=says.replace("[", "\\[")) as error:
        dashboard.read_labels(tmp_path / name, 300)
    assert name in str(error.value) and "\n" not in str(error.value)


def explain(directory):
    """Latent 3 has two explanations and 5 one that says nothing; 7 only a score without any."""
    rules, llm = ("statistics", "rules-1"), ("llm", "delphi-1")
    records.write(
        directory,
        [
            Explanation("latents", 3, *rules, "the token fox", "token"),
            Explanation("latents", 3, *llm, "ANIMALS </script>", details={"model": "judge"}),
            Explanation("latents", 5, *rules, ""),
            Explanation("neurons", 9, *rules, "of no latent"),
        ],
        [
            Score("latents", 3, *llm, "detection", "", 0.9, 100, 2),
            Score("latents", 3, *llm, "detection", "shuffled", 0.5, 100),
            Score("latents", 3, *rules, "detection", "", 0.7, 100),
            Score("latents", 7, "", "", "intruder", "", 0.25, 10),
        ],
    )
    return directory


def test_explanations_are_on_the_page_in_the_index_and_in_the_search(made, tokenizer, tmp_path):
    plain, _, _ = made
    explained = dashboard.read_explanations(explain(tmp_path / "explain"), D_SAE)
    latents = dashboard.Latents(plain.collection, plain.sae, tokenizer, explained=explained)
    out = tmp_path / "out"
    dashboard.export(out, latents, about_of(latents))
    about = json.loads((out / "data/about.json").read_text())
    assert about["explained"].startswith("The explanation with the highest score by detection;")
    assert read(out / "data/labels.json.gz") == {"3": "ANIMALS </script>"}
    assert latents.columns()[3, 3] == np.float32(0.9) and np.isnan(latents.columns()[3, 7])
    assert read(out / "data/explanations.json.gz") == {"3": ["ANIMALS </script>", "the token fox"]}
    found = {one["index"]: one for one in read(out / "data/latents/00000.json.gz")}
    llm, rules = found[3]["explanations"]
    assert (found[3]["label"], found[3]["score"]) == ("ANIMALS </script>", 0.9)
    assert llm == {
        "by": "llm", "method": "delphi-1", "text": "ANIMALS </script>", "kind": "",
        "model": "judge", "scores": [{"scorer": "detection", "value": 0.9,
        "controls": {"shuffled": 0.5}, "examples": 100, "unparsable": 2,
        "model": ""}],
    }  # fmt: skip
    assert (rules["text"], rules["kind"]) == ("the token fox", "token")
    assert [one["text"] for one in found[5]["explanations"]] == [""]
    assert [one["text"] for one in found[7]["explanations"]] == [None]
    assert found[9]["explanations"] == []
    search = TextSearch(plain.collection, tokenizer, latents.labels, explained.texts)
    assert search.find("TOKEN fox", 10) == search.find("animals", 10) == [3]
    given = dashboard.Labels({3: "mine"})
    both = dashboard.Latents(
        plain.collection, plain.sae, tokenizer, labels=given, explained=explained
    )
    assert (both.make([3])[0].label, len(both.make([3])[0].explanations)) == ("mine", 2)
    with pytest.raises(UserError, match="other latents, texts or labels"):
        dashboard.export(out, plain, about_of(plain))
    dashboard.export(out, plain, about_of(plain), overwrite=True)
    assert not (out / "data/explanations.json.gz").exists()
    assert "explanations" not in read(out / "data/latents/00000.json.gz")[3]


@pytest.mark.parametrize("d_sae, says", [(5, "explains latent 5; there are 0 to 4"), (0, "")])
def test_explanations_of_another_sae_or_none_are_refused(tmp_path, d_sae, says):
    directory = tmp_path if not d_sae else explain(tmp_path / "explain")
    with pytest.raises(UserError, match=says or "holds no explanations.jsonl; make it with"):
        dashboard.read_explanations(directory, d_sae)


class Rows:
    """A source of given rows, as `texts` and `read` have it."""

    def __init__(self, x: np.ndarray, used: np.ndarray, at_once: int = 3):
        self._x, self._used, self._at_once = x, used, at_once

    def texts(self):
        from sae_jax.evaluate.sources import Texts

        count, length = self._used.shape
        ids = np.zeros((count, length), np.int32)
        return Texts(np.arange(count), ids, self._used, self._at_once, "")

    def read(self, places):
        return self._x[places]


@pytest.mark.slow
def test_correlated_neurons_are_those_of_numpy():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(11, 16, planted.WIDTH)).astype(np.float32) + 0.7
    x[..., 5] = 2  # a neuron that does not vary
    used = rng.random((11, 16)) < 0.8
    sae = planted.make_sae(40)
    found = dashboard.correlated_neurons(sae, Rows(x, used))
    rows = x[used]
    activations = np.asarray(sae.encode(rows)) * np.linalg.norm(sae.w_dec[...], axis=1)
    for latent in range(40):
        if activations[:, latent].std() == 0:
            assert found.of(latent) == []
            continue
        r = [np.corrcoef(activations[:, latent], rows[:, i])[0, 1] if i != 5 else -2
             for i in range(planted.WIDTH)]  # fmt: skip
        expected = np.argsort(r)[::-1][:3]
        assert [i for i, _ in found.of(latent)] == expected.tolist()
        np.testing.assert_allclose(
            [v for _, v in found.of(latent)], np.array(r)[expected], atol=1e-4
        )
    assert dashboard.correlated_neurons(planted.make_sae(8, width=4097), None) is None


def test_correlated_neurons_are_kept_in_a_file(tmp_path):
    neurons = dashboard.Neurons(np.zeros((2, 3), np.int32), np.ones((2, 3), np.float32))
    neurons.save(tmp_path / "n.npz")
    assert dashboard.Neurons.load(tmp_path / "n.npz").of(1) == [(0, 1.0)] * 3
    np.savez(tmp_path / "n.npz", other=np.ones(3))
    with pytest.raises(UserError, match="n.npz has no correlated neurons"):
        dashboard.Neurons.load(tmp_path / "n.npz")
