"""Summaries of scores: intervals that cover, controls that count, and records that are replaced."""

import json
import os

import numpy as np
import pytest

from sae_jax.interpret.explain.estimates import difference, means, median
from sae_jax.interpret.explain.others import others
from sae_jax.interpret.explain.records import Explanation, Score, read, update, write
from sae_jax.interpret.explain.summary import summarise, write_summary


@pytest.mark.parametrize("statistic", ["mean", "median"])
@pytest.mark.parametrize("n", [40, 41])
def test_intervals_cover_the_truth_as_often_as_they_say(statistic, n):
    random, truth = np.random.default_rng(n), {"mean": 1.0, "median": np.log(2)}[statistic]
    covered = []
    for seed in range(300):
        values = random.exponential(size=n)
        if statistic == "mean":
            estimate = means({"": values}, seed, resamples=400).estimates[""]
        else:
            estimate = median(values, seed, resamples=400)
        covered.append(estimate.low <= truth <= estimate.high)
    assert 0.88 <= np.mean(covered) <= 0.985


def test_the_middle_of_a_resample_is_distributed_as_if_all_were_drawn():
    random = np.random.default_rng(0)
    for n in (2, 7, 30):
        values = random.normal(size=n)
        drawn = np.median(values[random.integers(0, n, (50_000, n))], axis=1)
        found = median(values, 0, resamples=50_000)
        assert found.value == np.median(values)
        # Between values next to each other: the distribution has steps.
        for end, share in ((found.low, 2.5), (found.high, 97.5)):
            around = np.percentile(drawn, [share - 0.4, share + 0.4])
            assert around[0] - 1e-9 <= end <= around[1] + 1e-9


def test_missing_values_are_left_out_and_few_units_have_no_interval():
    known = np.array([0.25, np.nan, 0.75, np.nan])
    found = means({"a": known, "b": np.full(4, np.nan)}, 0)
    assert (found.estimates["a"].n, found.estimates["a"].value) == (2, 0.5)
    assert (found.estimates["a"].low, found.estimates["a"].high) == (0.25, 0.75)
    assert (found.estimates["b"].n, found.estimates["b"].value) == (0, None)
    for one in (means({"": np.array([0.3])}, 0).estimates[""], median(np.array([0.3, np.nan]), 0)):
        assert (one.n, one.value, one.low, one.high) == (1, 0.3, None, None)
    assert median(np.array([]), 0).n == means({"": np.array([])}, 0).estimates[""].n == 0


def test_unrelated_groups_differ_by_the_difference_of_their_means():
    random = np.random.default_rng(3)
    one, other = random.normal(1, 1, 400), random.normal(0, 2, 900)
    found = difference(means({"": one}, 1), means({"": other}, 2), "")
    error = np.sqrt(one.var() / 400 + other.var() / 900)
    assert found.value == pytest.approx(one.mean() - other.mean())
    assert found.low == pytest.approx(found.value - 1.96 * error, abs=0.12 * error)
    assert found.high == pytest.approx(found.value + 1.96 * error, abs=0.12 * error)


LLM = ("llm", "delphi-1")


def explanation(unit, text, units="latents", way=LLM, **details):
    return Explanation(units, unit, *way, text, details=details)


def score(unit, value, control="", units="latents", scorer="detection", way=LLM, **more):
    return Score(units, unit, *way, scorer, control, value, **more)


def world():
    """60 latents that score 0.8 and differ much; the same with another's explanation 0.2 lower."""
    random = np.random.default_rng(0)
    base = 0.8 + 0.5 * (random.random(60) - 0.5)
    base += 0.8 - base.mean()
    noise = 0.01 * (random.random(60) - 0.5)
    noise -= noise.mean()
    found = [score(i, value) for i, value in enumerate(base)]
    found += [score(i, value, "shuffled") for i, value in enumerate(base - 0.05 + noise)]
    found += [score(i, value, "none") for i, value in enumerate(base + noise)]
    found += [score(i, value, units="neurons") for i, value in enumerate(base[:50] - 0.04)]
    found += [score(i, value, units="shuffled_model") for i, value in enumerate(base[:50] + 0.1)]
    texts = [explanation(i, "" if i % 6 == 0 else "words") for i in range(60)]
    return texts, found


def test_scores_beside_their_controls():
    summary = summarise(*world(), single_token={"latents": range(15)})
    (one,) = summary.of_latents
    assert (one.mean.n, one.undefined, one.chance) == (60, 0, 0.5)
    assert one.mean.value == pytest.approx(0.8)
    assert one.claimed.n == 50 and one.single_token.n == 15 and one.several_tokens.n == 45
    whole = 15 * one.single_token.value + 45 * one.several_tokens.value
    assert whole / 60 == pytest.approx(0.8)
    controls = {control.name: control for control in one.controls}
    assert list(controls) == ["shuffled", "none", "neurons", "shuffled_model"]
    assert controls["shuffled"].difference.value == pytest.approx(0.05)
    assert controls["none"].difference.value == pytest.approx(0.0, abs=1e-12)
    # Over the same latents 0.05 is sure; over others of as large a spread nearly so is not 0.04.
    assert controls["shuffled"].difference.low > 0.048
    assert controls["neurons"].difference.low < 0 < controls["neurons"].difference.high
    assert controls["shuffled_model"].difference.high < 0
    doubts = "\n".join(summary.doubts)
    assert "another unit's explanation" not in doubts
    assert "an explanation that says nothing may score as well" in doubts
    assert "neurons of the same site may score as well" in doubts
    assert "latents of a model with shuffled weights score higher" in doubts


def test_what_is_counted_apart(tmp_path):
    texts = [
        explanation(0, "dogs", way=("statistics", "rules-1"), single_token=True),
        explanation(1, "", way=("statistics", "rules-1"), single_token=False),
        explanation(2, "", way=("statistics", "rules-1"), single_token=False),
        explanation(3, "", dropped="rare"),
        explanation(4, "", unparsable="length"),
        explanation(5, "<b>cats</b>"),
    ]
    scores = [
        score(0, 0.9, scorer="f1", way=("statistics", "rules-1")),
        score(1, 0.1, scorer="f1", way=("statistics", "rules-1")),
        score(2, None, scorer="f1", way=("statistics", "rules-1"), details={"too_seldom": True}),
        score(
            5, 0.5, unparsable=3, examples=100, details={"without_unparsable": 0.8, "chance": 0.4}
        ),
        score(6, 0.6, examples=100),
    ]
    summary = summarise(texts, scores)
    llm, rules = summary.ways
    assert (llm.asked, llm.claimed, llm.nothing, llm.too_seldom, llm.unparsable) == (3, 1, 0, 1, 1)
    assert (rules.asked, rules.claimed, rules.nothing, rules.too_seldom) == (3, 1, 1, 1)
    assert (rules.single_token, llm.single_token) == (1, 0)
    detection, f1 = summary.of_latents
    assert (f1.mean.n, f1.undefined, f1.claimed.value) == (2, 1, 0.9)
    assert (f1.single_token.value, f1.several_tokens.value) == (0.9, 0.1)
    assert detection.mean.value == pytest.approx(0.55) and detection.claimed.value == 0.5
    assert detection.readable.value == pytest.approx(0.7)
    assert (detection.unparsable, detection.affected, detection.chance) == (3, 0.5, 0.4)
    assert "0.550 with them counted as wrong, and 0.700 without them" in "\n".join(summary.doubts)
    write_summary(tmp_path, summary)
    values = json.loads((tmp_path / "summary.json").read_text())
    assert values["scores"][1]["claimed"] == {"n": 1, "value": 0.9, "low": None, "high": None}
    assert "llm delphi-1 detection: 2 latents" in str(summary)


def test_other_ways_change_nothing_and_the_same_seed_gives_the_same():
    texts, scores = world()
    alone = summarise(texts, scores).of_latents[0]
    more = [score(i, 0.5, scorer="f1", way=("statistics", "rules-1")) for i in range(9)]
    assert summarise([], []).scores == []
    assert next(s for s in summarise(texts, more + scores[::-1]).scores if s.by == "llm") == alone
    assert summarise(texts, scores, seed=1).of_latents[0] != alone


def test_records_replace_their_own(tmp_path):
    rules = ("statistics", "rules-1")
    write(
        tmp_path,
        [explanation(1, "a"), explanation(2, "b", way=rules), explanation(1, "n", "neurons")],
        [
            score(1, 0.5),
            score(1, 0.4, "shuffled"),
            score(1, 0.6, scorer="fuzzing"),
            score(2, 0.3, scorer="f1", way=rules),
            score(1, 0.2, units="neurons"),
        ],
    )
    update(tmp_path, [], [score(3, 0.7)])  # scored again: only of this scorer
    _, scores = read(tmp_path)
    assert sorted((s.units, s.scorer, s.unit) for s in scores) == [
        ("latents", "detection", 3),
        ("latents", "f1", 2),
        ("latents", "fuzzing", 1),
        ("neurons", "detection", 1),
    ]
    update(tmp_path, [explanation(2, "b", way=rules)], [score(2, 0.35, scorer="f1", way=rules)])
    texts, scores = read(tmp_path)
    assert len(texts) == 3 and len(scores) == 4, "the same explanations: other scores stay"
    update(tmp_path, [explanation(1, "changed")], [score(1, 0.9)])
    texts, scores = read(tmp_path)
    assert sorted((e.units, e.by, e.text) for e in texts) == [
        ("latents", "llm", "changed"), ("latents", "statistics", "b"), ("neurons", "llm", "n"),
    ]  # fmt: skip
    assert [s.value for s in scores if s.by == "llm" and s.units == "latents"] == [0.9]


def test_a_kill_between_the_files_leaves_no_scores_of_other_texts(tmp_path, monkeypatch):
    write(tmp_path, [explanation(1, "a")], [score(1, 0.5), score(1, 0.6, scorer="fuzzing")])
    replace = os.replace

    def killed(source, target):
        replace(source, target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("os.replace", killed)
        update(tmp_path, [explanation(1, "b")], [score(1, 0.9)])
    update(tmp_path, [explanation(1, "b")], [score(1, 0.9)])
    texts, scores = read(tmp_path)
    assert [e.text for e in texts] == ["b"] and [s.value for s in scores] == [0.9]


@pytest.mark.parametrize("seed", range(3))
def test_what_is_said_in_place_is_another_text_and_of_one_unit(seed):
    texts = {unit: "abcabc"[unit % 6] for unit in range(20)}
    found = others(texts, seed)
    assert sorted(found) == sorted(found.values()) == list(range(20))
    assert all(texts[unit] != texts[other] for unit, other in found.items())
    assert others({1: "a", 2: "a"}, seed) == others({1: "a"}, seed) == others({}, seed) == {}


def test_any_text_of_a_model_is_read_again(tmp_path):
    text = 'half \ud83d of one,\u2028 \x00 \n and "all" of 🙂 עולם'
    write(tmp_path, [explanation(1, text, thinking=text)], [])
    (found,), _ = read(tmp_path)
    assert found.text == found.details["thinking"] == text.replace("\ud83d", "\ufffd")


def test_where_the_second_file_cannot_be_written_the_first_stays_as_it_was(tmp_path):
    write(tmp_path, [explanation(1, "a")], [score(1, 0.5)])
    before = read(tmp_path)
    (tmp_path / "scores.jsonl.tmp").mkdir()
    with pytest.raises(OSError):
        update(tmp_path, [explanation(1, "b")], [])
    assert read(tmp_path) == before
