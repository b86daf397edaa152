"""`sae-jax explain` end to end, on the model that ships here and a judge over HTTP."""

import csv
import json
import os
import pathlib
import signal
import subprocess
import sys

import judge_server
import pytest

import sae_jax
from sae_jax import cli, lm
from sae_jax.cli import made_before
from sae_jax.interpret.explain import records

SITE = "resid_post.0"
LLM = ["--by=llm", "--judge=scripted", "--sample=3", "--controls=none", "--scorers=detection"]
LLM += ["--explainer=saebench", "--concurrency=1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of seconds, whose store knows its model."""
    directory = tmp_path_factory.mktemp("explain")
    texts = lm.read_texts(lm.standard_library())
    lm.harvest(lm.DEMO_MODEL, texts, directory / "store", sites=SITE, tokens=24_000)
    config = sae_jax.TopKConfig(d_sae=32, k=4)
    sae_jax.train(config, str(directory / "store"), workdir=directory / "run", epochs=1)
    return directory / "run"


def explain(capsys, *arguments) -> str:
    code = cli.main(["explain", *map(str, arguments)])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def judged(body: dict) -> str:
    """Answers what is asked for, by the schema: an explanation, or that all texts have it."""
    properties = body["response_format"]["json_schema"]["schema"]["properties"]
    if "explanation" in properties:
        return json.dumps({name: "code" for name in properties})
    ((name, labels),) = properties.items()
    return json.dumps({name: [1] * labels["minItems"]})


@pytest.mark.slow
def test_from_a_run_to_its_report(run, tmp_path, capsys):
    out = tmp_path / "explained"
    said = explain(capsys, f"--run={run}", f"--out={out}", "--proxies=patterns")
    for part in ("32", "shuffled", "neurons", "random", "report.html"):
        assert part in said
    explanations, scores = records.read(out)
    assert {e.units for e in explanations} == {"latents", "neurons", "random"}
    assert sum(e.units == "latents" for e in explanations) == 32
    labels = list(csv.DictReader((out / "labels.csv").read_text().splitlines()))
    own = {s.unit: s for s in scores if s.units == "latents" and not s.control}
    assert labels and all(own[int(row["latent"])].details["claimed"] for row in labels)
    assert "<html" in (out / "report.html").read_text()
    assert (out / "proxies" / "table.csv").is_file()

    before = (out / "explanations.jsonl").read_bytes()
    assert explain(capsys, f"--run={run}", f"--out={out}") in said  # without --proxies' line
    assert (out / "explanations.jsonl").read_bytes() == before


@pytest.mark.slow
def test_a_judge_that_is_killed_for_is_paid_once(run, tmp_path, capsys):
    flags = [f"--run={run}", *LLM]
    with judge_server.serve(judged) as server:
        whole = tmp_path / "whole"
        flags.append(f"--base_url={server.base_url}")
        planned = explain(capsys, *flags, f"--out={whole}", "--dry_run", "--price=1,2")
        assert not server.calls and "calls" in planned
        explain(capsys, *flags, f"--out={whole}")
        calls = len(server.calls)

    killed, seen = tmp_path / "killed", []

    def deadly(body: dict) -> str:
        seen.append(body)
        if len(seen) == calls // 2:
            os.kill(process.pid, signal.SIGKILL)
        return judged(body)

    command = [sys.executable, "-m", "sae_jax", "explain", *flags[:-1], f"--out={killed}"]
    root = str(pathlib.Path(sae_jax.__file__).parents[1])
    with judge_server.serve(deadly) as server:
        command.append(f"--base_url={server.base_url}")
        for expected in (-signal.SIGKILL, 0):
            process = subprocess.Popen(
                command, env=os.environ | {"PYTHONPATH": root}, stderr=subprocess.PIPE, text=True
            )
            assert (process.communicate()[1], process.returncode)[1] == expected
    assert len(seen) == calls + 1  # the one that was under way
    for name in ("explanations.jsonl", "scores.jsonl", "labels.csv"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    scores = [s for s in records.read(whole)[1] if s.scorer == "detection" and not s.control]
    assert len(scores) == 3 and all(s.value == 0.5 for s in scores)


@pytest.mark.slow
def test_controls_are_judged_by_their_output_tokens_too(run, tmp_path, capsys):
    out, flags = tmp_path / "out", ["--by=llm", "--judge=scripted", "--scorers=logits"]
    flags += ["--explainer=bricken2023", "--sample=3", "--control_sample=2", "--latents=1,2,3"]
    with judge_server.serve(judged) as server:
        explain(capsys, f"--run={run}", f"--out={out}", f"--base_url={server.base_url}", *flags)
        asked = [body["messages"][-1]["content"] for body in server.calls]
    _, scores = records.read(out)
    assert {s.units for s in scores if s.scorer == "logits"} == {"latents", "neurons", "random"}
    explaining = [text for text in asked if "PROMOTED" in text]
    assert explaining and not any("PROMOTED\n[]" in text for text in explaining)
    again = ["--tokens=20000", "--overwrite", "--controls=none"]
    explain(capsys, f"--run={run}", f"--out={out}", *again)
    explanations, scores = records.read(out)
    assert {e.by for e in [*explanations, *scores]} == {"statistics"}, "of the other text"


def test_what_is_made_again_takes_the_place_as_a_whole(tmp_path):
    place = tmp_path / "activity"
    for text in ("first", "second"):
        with made_before.replacing(place) as made:
            made.mkdir()
            (made / text).touch()
        assert [file.name for file in place.iterdir()] == [text]
        assert [file.name for file in tmp_path.iterdir()] == ["activity"]
    with pytest.raises(KeyboardInterrupt), made_before.replacing(place) as made:
        made.mkdir()
        raise KeyboardInterrupt
    assert [file.name for file in place.iterdir()] == ["second"]


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--by=statistic"], "--by is 'statistic'"),
        (["--by=embedding"], "--sentences=DIR"),
        (["--by=llm"], "--judge=NAME"),
        (["--dry_run"], "only --by=llm makes any"),
        (["--controls=neuron"], "--controls is 'neuron'"),
        (["--by=llm", "--judge=x", "--price=cheap"], "--price=cheap"),
        (["--by=embedding", "--sentences=x", "--latents=one"], "--latents=one"),
        (["--by=llm", "--judge=x", "--scorers=detect"], "detection"),
    ],
)
def test_mistakes_are_told_before_anything_is_opened(tmp_path, capsys, arguments, expected):
    assert cli.main(["explain", f"--run={tmp_path / 'none'}", *arguments]) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
