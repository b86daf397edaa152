"""`sae-jax attribute` on the model that ships here: what it prints, writes and refuses."""

import html
import json
import re

import numpy as np
import pytest

from sae_jax import cli, lm
from sae_jax.interpret.attribution import Target, attribute
from sae_jax.interpret.placed import Placed
from sae_jax.sae import TopK
from sae_jax.tables import read_csv

SITES = ("resid_pre.0", "mlp_out.0")
PROMPT = "def main(self, x):\n    return self"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two SAEs that nobody trained, and labels of one, with what a page must not take for HTML."""
    folder = tmp_path_factory.mktemp("attribute")
    for n in range(2):
        TopK(d_in=128, d_sae=256, k=8, rngs=n).save(folder / f"sae{n}")
    (folder / "labels.json").write_text(json.dumps({str(i): f"<b>latent {i}" for i in range(256)}))
    (folder / "none.json").write_text("{}")
    return folder


def command(folders, *more, prompt=PROMPT):
    named = [f"--{flag}" for n, site in enumerate(SITES)
             for flag in (f"sae={folders}/sae{n}", f"site={site}")]  # fmt: skip
    return cli.main(["attribute", *named, "--model=demo", f"--prompt={prompt}", *more])


def test_several_saes_with_files_and_a_page(folders, capsys):
    out = folders / "out"
    labels = [f"--labels={folders}/{name}.json" for name in ("labels", "none")]
    more = ["--target=.", "--baseline=,", "--top=12", "--ablations=40", f"--out={out}", *labels]
    assert command(folders, *more) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("logit of '.' less that of ',': ") and "correlation" in printed
    found = json.loads((out / "attribution.json").read_text())

    model = lm.open_model(lm.DEMO_MODEL)
    ids = np.array([model.tokenizer.bos, *model.tokenizer.encode(PROMPT)])
    dot, comma = (model.tokenizer.encode(text)[0] for text in ".,")
    placed = [Placed(TopK(d_in=128, d_sae=256, k=8, rngs=n), site) for n, site in enumerate(SITES)]
    where = ids != model.tokenizer.bos
    expected = attribute(model, placed, ids, Target(dot, comma), positions=where)
    assert found["value"] == pytest.approx(expected[0].value, rel=1e-5)
    for own, a in zip(found["saes"], expected, strict=True):
        np.testing.assert_allclose(own["latents"], a.total, rtol=1e-4, atol=1e-5)
        assert own["active"] == [0, *[8] * (len(ids) - 1)] and own["gap"] < 1e-5
    rows = found["rows"]
    size = [abs(row["attribution"]) for row in rows]
    assert len(rows) == 40 and size == sorted(size, reverse=True)
    assert all((row["label"] is not None) == row["sae"].endswith("sae0") for row in rows)
    assert all(len(row["promoted"]) == 5 for row in rows)
    assert {row["site"] for row in rows} == set(SITES)

    table = [row for _, row in read_csv(out / "attribution.csv")]
    assert [int(row["latent"]) for row in table] == [row["latent"] for row in rows]
    page = (out / "index.html").read_text()
    assert page.count("<tr>") == 1 + 12 and "<b>" not in page and "&lt;b&gt;latent" in page
    assert not re.findall(r"(?:src|href)=.(?!data:|#)|@import|url\((?!#)", page)
    (first, _) = re.findall(r'<p class="text".*?</p>', page, flags=re.DOTALL)
    shown = html.unescape(re.sub(r"<[^>]*>", "", first))
    assert shown == "<|bos|>" + PROMPT.replace("\n", "↵")

    assert command(folders, *more) == 0  # the same again
    assert command(folders, "--loss", f"--out={out}") == 2
    assert "choose another --out" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["integrated", "ablation"])
def test_other_methods(folders, capsys, method):
    assert command(folders, "--loss", f"--method={method}", "--top=5", "--ablations=30") == 0
    printed = capsys.readouterr().out
    assert (
        printed.startswith("loss of the prompt, nats a token: ") and "Nothing was writ" in printed
    )
    rows = [line.split() for line in printed.splitlines()[2:7]]
    assert all(row[0].startswith(str(folders)) for row in rows)
    assert ("% missing" in printed) == (method == "integrated")


def test_a_target_that_is_part_of_the_prompts_last_token_is_refused(folders, capsys):
    assert command(folders, "--target=urn", prompt="def main():\n    ret") == 2
    assert "changes how the end of the prompt is cut" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, says",
    [
        (["--target= self.name"], "is 3 tokens after the prompt; give the first"),
        (["--target=.", "--baseline=."], "are the same token"),
        (["--target="], "is 0 tokens after the prompt; give a token"),
        (["--loss", "--labels=a"], "--labels is given 1 times for 2 SAEs"),
        (["--loss", "--kind=transcoder"], "transcoder"),
    ],
)
def test_what_cannot_be_attributed_is_refused(folders, capsys, more, says):
    assert command(folders, *more) == 2
    assert says in capsys.readouterr().err
