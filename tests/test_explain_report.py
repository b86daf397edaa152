"""The report of a whole SAE and its labels: what is shown, and that nothing in it is markup."""

import html.parser
import re

import planted
import pytest
import world

from sae_jax import lm
from sae_jax.errors import UserError
from sae_jax.evaluate.sources import HeldOutRows
from sae_jax.interpret.activity import record
from sae_jax.interpret.dashboard import read_labels
from sae_jax.interpret.explain.labels import best, gathered, short, write_labels
from sae_jax.interpret.explain.records import Explanation, Score
from sae_jax.interpret.explain.report import write_report
from sae_jax.interpret.explain.summary import summarise

HOSTILE = '</script><img src=x onerror="alert(1)">{{ 7 * 7 }}'
LLM, RULES = ("llm", "delphi-1"), ("statistics", "rules-1")


def score(unit, value, control="", scorer="detection", way=LLM, units="latents", **more):
    return Score(units, unit, *way, scorer, control, value, 10, **more)


def told(latents):
    texts = [Explanation("latents", i, *LLM, f"words {i} {HOSTILE}") for i in latents]
    texts += [Explanation("latents", i, *RULES, "" if i % 2 else f"rule {i}") for i in latents]
    scores = [score(i, i / 40) for i in latents] + [score(i, 0.3, "shuffled") for i in latents]
    scores += [score(i, 0.9, units="shuffled_model") for i in latents]
    return texts, scores


class Reader(html.parser.HTMLParser):
    """Collects the tags of a page, what they load, and its text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.loads, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [v for k, v in attrs if k in ("src", "href", "xlink:href", "onerror")]

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    world.make_model(folder / "model")
    source = HeldOutRows(planted.store(folder / "store"), "a", tokens=10**6, holdout_fraction=None)
    activity = record(planted.sae("relu"), source, folder / "activity")
    texts, scores = told(range(20, 40))
    (folder / "proxies").mkdir()
    (folder / "proxies/table.csv").write_text("proxy,pearson\nArabic <b>script</b>,0.74\n")
    (folder / "proxies/arabic.png").write_bytes(b"\x89PNG")
    file = write_report(
        folder,
        summarise(texts, scores),
        texts,
        scores,
        activity,
        lm.load_tokenizer(folder / "model"),
        title=f"A run {HOSTILE}",
        about=[("judge", HOSTILE)],
    )
    return Reader(file.read_text())


def test_the_report_says_what_was_found_and_what_to_doubt(page):
    text = re.sub(r"\s+", " ", page.text)
    assert "llm delphi-1 detection: latents of a model with shuffled weights score higher" in text
    assert "20 100%" in text and "10 50%" in text  # explained by each way
    best_ones, worst, random = re.split("The (?:best|worst) by detection|At random", text)[1:]
    assert [int(n) for n in re.findall(r"Latent (\d+)", best_ones)] == list(range(39, 31, -1))
    assert [int(n) for n in re.findall(r"Latent (\d+)", worst)] == list(range(20, 28))
    assert sorted(int(n) for n in re.findall(r"Latent (\d+)", random)) == [28, 29, 30, 31]
    assert "detection 0.975 (shuffled 0.300)" in best_ones and "words 39" in best_ones
    assert "Arabic <b>script</b>" in text and "0.74" in text
    assert page.tags.count("svg") == 2 and page.tags.count("mark") > 20


def test_the_report_needs_nothing_and_runs_nothing(page):
    assert HOSTILE in page.text and "script" not in page.tags
    inside = [load for load in page.loads if not load.startswith(("#", "data:image/png;base64,"))]
    assert not inside
    assert page.tags.count("img") == 1


def test_the_label_is_the_best_by_the_scorer_and_by_order_where_it_cannot_be_told():
    texts = [Explanation("latents", i, *LLM, "llm") for i in range(4)]
    texts += [Explanation("latents", i, *RULES, "rules") for i in range(3)]
    texts += [Explanation("latents", 4, *RULES, ""), Explanation("neurons", 5, *LLM, "other")]
    scores = [score(0, 0.6), score(0, 0.7, way=RULES), score(1, 0.6), score(1, 0.6, way=RULES)]
    scores += [score(2, 0.9, way=RULES), score(7, 0.8, scorer="intruder", way=("", ""))]
    found = best(gathered(texts, scores), "detection")
    assert {latent: (one.text, value) for latent, (one, value) in found.items()} == {
        0: ("rules", 0.7), 1: ("llm", 0.6), 2: ("llm", None), 3: ("llm", None),
    }  # fmt: skip


def test_labels_are_read_by_the_dashboard(tmp_path):
    texts, scores = told(range(3))
    texts.append(Explanation("latents", 9, *LLM, 'two\nlines, "quoted" ' + "x" * 3000))
    rule = write_labels(tmp_path, texts, scores)
    assert rule.startswith("The explanation with the highest score by detection;")
    labels = read_labels(tmp_path / "labels.csv", 40)
    assert sorted(labels.names) == [0, 1, 2, 9] and HOSTILE in labels.names[1]
    assert labels.scores == {0: 0.0, 1: 0.025, 2: 0.05}
    assert labels.names[9].startswith('two\nlines, "quoted" x') and len(labels.names[9]) == 2000
    with pytest.raises(UserError, match="nothing was scored by fuzzing"):
        write_labels(tmp_path, texts, scores, "fuzzing")


@pytest.mark.parametrize(
    "text, most, cut",
    [("abc", 3, "abc"), ("abcd", 3, "ab…"), ("🙂🙂", 3, "🙂…"), ("a🙂b", 3, "a…")],
)
def test_texts_are_cut_as_javascript_counts(text, most, cut):
    assert short(text, most) == cut
