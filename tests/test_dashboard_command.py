"""`sae-jax dashboard`: from a run to a page that is served, to files, and to one page."""

import contextlib
import dataclasses
import gzip
import http.client
import json
import re
import signal
import sys

import pytest
import world
from training import launch, make_config

from sae_jax import lm
from sae_jax.cli import main
from sae_jax.interop import load
from sae_jax.train.run import train_run

SITE = "resid_post.0"
FLAGS = ["--top=4", "--intervals=2", "--per_interval=2", "--tokens=4000"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on a store of a tiny model, with its evaluation."""
    path = tmp_path_factory.mktemp("command")
    world.make_model(path / "model")
    store = path / "store"
    lm.harvest(path / "model", world.TEXTS * 60, store, sites=(SITE,), context_length=32)
    config = make_config(str(store), steps=20)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, site=SITE))
    train_run(config, path / "run")
    assert main(["eval", f"--run={path / 'run'}", f"--model={path / 'model'}"]) == 0
    return path / "run"


def model_of(run) -> str:
    return f"--model={run.parent / 'model'}"


@pytest.mark.slow
def test_a_run_is_served_until_ctrl_c_and_opens_again_at_once(run, capsys):
    program = [sys.executable, "-m", "sae_jax", "dashboard", f"--run={run}", model_of(run)]
    for flags in (FLAGS, []):  # the second time nothing is collected
        server = launch([*program, *flags, "--serve=0"])
        with contextlib.ExitStack() as stack:
            stack.callback(server.communicate)
            stack.callback(server.kill)
            line = server.stdout.readline()
            found = re.fullmatch(r"128 latents at http://127.0.0.1:(\d+); Ctrl-C ends it\n", line)
            connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=60)
            stack.callback(connection.close)
            connection.request("GET", "/data/about.json")
            about = json.loads(connection.getresponse().read())
            assert about["can"] == dict.fromkeys(["encode", "generate", "ablate", "search"], True)
            assert (about["d_sae"], about["site"], len(about["groups"])) == (128, SITE, 3)
            assert ["L0, latents active"] == [m[0] for m in about["metrics"] if m[0][:2] == "L0"]
            values = json.dumps({"texts": ["The quick brown fox"]})
            connection.request("POST", "/api/encode", values, {"Content-Type": "application/json"})
            assert json.loads(connection.getresponse().read())["latents"]
            server.send_signal(signal.SIGINT)
            _, err = server.communicate(timeout=60)
        assert server.returncode == 130 and "sae-jax dashboard: interrupted" in err
        assert ("collecting" in err) == bool(flags)


@pytest.mark.slow
def test_a_run_is_written_as_files_and_as_one_page(run, tmp_path, capsys):
    where = [f"--run={run}", model_of(run), f"--out={tmp_path / 'o'}"]
    assert main(["dashboard", *where, *FLAGS]) == 0
    assert "python -m http.server" in capsys.readouterr().out
    assert (tmp_path / "o/index.html").is_file() and (tmp_path / "o/app.js").is_file()
    assert not (tmp_path / "o/collection").exists(), "it is the run's, and no web server's"
    found = json.loads(gzip.decompress((tmp_path / "o/data/latents/00000.json.gz").read_bytes()))
    assert len(found) == 128 and any(one["neurons"] for one in found)
    assert any(one["promoted"] for one in found)
    labels = tmp_path / "labels.csv"
    labels.write_text("latent,label\n7,seven\n")
    assert main(["dashboard", *where, f"--labels={labels}"]) == 2, "files of other labels"
    assert "give --overwrite" in capsys.readouterr().err
    assert main(["dashboard", *where, f"--labels={labels}", "--overwrite"]) == 0
    assert main(["dashboard", *where, "--top=5"]) == 2
    err = capsys.readouterr().err
    assert "top was 4 and is 5; give --overwrite to make it again" in err
    (run / "explain").mkdir()
    (run / "explain/explanations.jsonl").write_text(
        '{"units": "latents", "unit": 9, "by": "llm", "method": "a-1", "text": "nine"}\n'
    )
    assert main(["dashboard", *where, "--overwrite"]) == 0
    assert json.loads(gzip.decompress((tmp_path / "o/data/labels.json.gz").read_bytes())) == {
        "9": "nine"
    }
    assert main(["dashboard", *where, f"--explanations={tmp_path}"]) == 2
    assert "holds no explanations.jsonl" in capsys.readouterr().err
    single = tmp_path / "one.html"
    assert main(["dashboard", *where, "--latents=1,5", f"--single={single}"]) == 0
    page = single.read_text()
    assert page.count("<article") == 2 and "They were asked for by number" in page


@pytest.mark.long
def test_any_sae_on_any_text_and_another_host_only_with_a_secret(run, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(world.TEXTS * 30), encoding="utf-8")
    load(run).save(tmp_path / "sae")
    flags = [f"--sae={tmp_path / 'sae'}", model_of(run), f"--out={tmp_path / 'o'}"]
    assert main(["dashboard", *flags, *FLAGS, f"--text={text}", f"--site={SITE}"]) == 0
    assert "Written" in capsys.readouterr().out
    # What it was made of is known from now on.
    server = launch([sys.executable, "-m", "sae_jax", "dashboard", *flags[::2],
                     "--serve=0", "--host=0.0.0.0"])  # fmt: skip
    with contextlib.ExitStack() as stack:
        stack.callback(server.communicate)
        stack.callback(server.kill)
        line = server.stdout.readline()
        assert re.search(r"http://[^:]+:\d+/\?token=[\w-]{32}", line), line
