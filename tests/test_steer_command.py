"""`sae-jax steer` end to end, on the model that ships here."""

import json

import numpy as np
import planted
import pytest

import sae_jax
from sae_jax import cli, lm
from sae_jax.cli import opened_saes
from sae_jax.interpret import steering_report
from sae_jax.interpret.steering import UNTOUCHED, Outcome

SITE = "resid_post.0"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of seconds, whose store knows its model."""
    directory = tmp_path_factory.mktemp("steer")
    texts = lm.read_texts(lm.standard_library())
    lm.harvest(lm.DEMO_MODEL, texts, directory / "store", sites=SITE, tokens=8_192)
    config = sae_jax.TopKConfig(d_sae=128, k=8)
    sae_jax.train(config, str(directory / "store"), workdir=directory / "run", epochs=4)
    return directory / "run"


@pytest.fixture(scope="module")
def latent(run):
    """The one that fires most often, which is alive."""
    store = str(run.parent / "store")
    density = sae_jax.evaluate(sae_jax.load(run), store=store, tokens=4096).rows.density
    return int(np.argmax(density))


def steer(capsys, *arguments: str) -> tuple[int, str]:
    code = cli.main(["steer", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


@pytest.mark.slow
def test_steering_a_run_from_latent_to_figure(run, latent, tmp_path, capsys):
    out = tmp_path / "steered"
    command = [
        f"--run={run}", f"--latent={latent}", "--prompt=def main(", "--prompt=import ",
        "--samples=2", "--max_new_tokens=6", "--concept=self", "--tokens_of=self, return",
        "--lm_tokens=512", "--tokens=4096", f"--out={out}",
    ]  # fmt: skip
    code, said = steer(capsys, *command, "--factors=5,0")
    assert code == 0, said
    assert f"latent {latent}" in said and "difference of means" in said
    assert "random direction" in said and "cross-entropy rises by less than 0.5" in said
    saved = json.loads((out / "steer.json").read_text())
    outcomes = {(o["push"], o["factor"]): o for o in saved["outcomes"]}
    assert len(outcomes) == 1 + 3 * 2
    assert outcomes["untouched", 0.0]["kl"] == 0
    assert outcomes["random direction", 0.0]["kl"] == pytest.approx(0, abs=1e-5)
    for name, outcome in outcomes.items():
        assert outcome["ce"] > 0 and outcome["token_logprob"] < 0, name
        assert 0 < outcome["distinct_1"] <= 1 and 0 <= outcome["concept"] <= 1
    assert outcomes[f"latent {latent}", 5.0]["kl"] > outcomes[f"latent {latent}", 0.0]["kl"]
    settings = saved["settings"]
    assert settings["sae"] == str(run)
    assert settings["maxima_of"].endswith("rows: held-out sequences of the store")
    assert settings["token_set"] == ["self", " return"] and settings["latents"] == [latent]
    lines = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == len(outcomes) * 2 * 2
    assert {line["prompt"] for line in lines} == {"def main(", "import "}
    assert (out / "dose_response.png").stat().st_size > 10_000
    text = (out / "samples.md").read_text()
    assert "| untouched |  |" in text and f"| latent {latent} | 5 | 1. " in text

    parts = {file.name: file.stat().st_mtime_ns for file in (out / "parts").iterdir()}
    code, said = steer(capsys, *command, "--factors=5,2,0")
    assert code == 0, said
    again = {file.name: file.stat().st_mtime_ns for file in (out / "parts").iterdir()}
    assert set(again) - set(parts) == {"2.json"} and again.items() >= parts.items()
    assert len(json.loads((out / "steer.json").read_text())["outcomes"]) == 1 + 3 * 3
    before = (out / "steer.json").read_bytes()
    code, said = steer(capsys, *command, "--mode=add")
    assert code == 2 and "mode: 'clamp' -> 'add'" in said and "--out" in said
    assert (out / "steer.json").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    code, said = steer(capsys, *command[:-1], f"--out={tmp_path / 'mine'}")
    assert code == 2 and "holds no steering" in said


@pytest.mark.long
def test_texts_of_ones_own_and_other_modes(run, latent, tmp_path, capsys):
    for name, text in (
        ("a", "def f(self):\n    return self.x\n"),
        ("b", "import os\nimport sys\n"),
    ):
        (tmp_path / f"{name}.txt").write_text(text * 40)
    shared = [
        f"--sae={run}", "--model=demo", f"--site={SITE}", f"--text={tmp_path / 'a.txt'}",
        "--lm_tokens=256", "--context_length=64", f"--latent={latent}",
    ]  # fmt: skip
    code, said = steer(
        capsys, *shared, f"--positive={tmp_path / 'a.txt'}", f"--negative={tmp_path / 'b.txt'}",
        "--factors=1", "--mode=add", "--same_norm", "--positions=no_bos",
    )  # fmt: skip
    assert code == 0, said
    assert "difference of means" in said and "Nothing was written" in said
    code, said = steer(capsys, *shared, "--mode=ablate")
    assert code == 0 and "random" not in said, said
    code, said = steer(
        capsys, f"--run={run}", f"--latent={latent}", "--mode=pin", "--positions=continuation",
        "--prompt=def ", "--samples=1", "--max_new_tokens=4", "--tokens=2048", "--temperature=0",
    )  # fmt: skip
    assert code == 0 and "what the untouched model writes" in said, said


@pytest.mark.slow
def test_maxima_are_those_of_the_evaluation_where_there_is_one(run, latent, capsys):
    assert cli.main(["eval", f"--run={run}", "--model=none", "--tokens=2048"]) == 0
    arrays = np.load(run / "eval_latents.npz")
    capsys.readouterr()
    code, said = steer(
        capsys, f"--run={run}", f"--latent={latent}", "--factors=1", "--lm_tokens=256",
        "--nobaselines",
    )  # fmt: skip
    assert code == 0 and f"latent {latent}: {arrays['max_activation'][latent]:.4g}" in said, said
    assert str(run / "eval.json") in said
    (run / "eval.json").unlink()


def test_what_was_opened_has_a_name(tmp_path, monkeypatch):
    planted.sae("topk").save(tmp_path / "saved")
    monkeypatch.chdir(tmp_path)
    for run, sae in (("saved", None), (None, "saved")):
        assert opened_saes.open_sae(run, sae, None, {}).name == str(tmp_path / "saved")


WRONG = {
    "--latent=LATENT,LATENT --prompt=a": "named twice",
    "--latent=999 --prompt=a": "999",
    "--latent=LATENT --prompts=nothing.txt": "nothing.txt",
    "--latent=LATENT --site=resid_post.7": "resid_post.7",
    "--latent=LATENT --tokens_of=self,": "--tokens_of",
    "--latent=LATENT --positions=prompt": "--prompt",
}


@pytest.mark.slow
@pytest.mark.parametrize("flags", WRONG)
def test_mistakes_are_one_line(run, latent, flags, capsys):
    flags_given = flags.replace("LATENT", str(latent)).split()
    code, said = steer(capsys, f"--run={run}", "--tokens=1024", *flags_given)
    assert code == 2 and WRONG[flags] in said, said
    assert len([line for line in said.splitlines() if line.startswith("sae-jax steer:")]) == 1


@pytest.mark.slow
def test_the_figure_has_a_line_for_each_push_even_of_few_measures():
    outcomes = [Outcome(UNTOUCHED, 0.0, {}, []), Outcome("latent $1$", 1.0, {"kl": 0.5}, [])]
    figure = steering_report.dose_response(outcomes)
    (axes,) = [axes for axes in figure.axes if axes.get_visible()]
    assert len(axes.get_lines()) == 1
