"""Exports as the hub has them: the model card, the upload, and many from a sweep."""

import ast
import base64
import csv
import importlib.metadata
import json
import re
import sys
from unittest import mock

import hub_server
import numpy as np
import pytest
from test_interop_formats import NEEDS_TORCH, random_sae
from training import make_config, make_store

import sae_jax
from sae_jax import interop, lm
from sae_jax.activations import Store
from sae_jax.cli import main
from sae_jax.config import to_dict
from sae_jax.errors import UserError
from sae_jax.evaluate import report
from sae_jax.evaluate.sources import HeldOutRows
from sae_jax.interop import FORMATS, Hub
from sae_jax.interop.many import width_name
from sae_jax.interop.select import select, still_done
from sae_jax.train.run import train_run

EXPRESSED_BY = {"sparsify": "topk", "gemma_scope": "jumprelu", "gemma_scope_2": "batchtopk"}
ABOUT = {"model_name": "google/gemma-2-2b", "site": "resid_post.1", "l0": 5.0}


def front_matter(card: str) -> dict:
    """Its values are JSON, so YAML's parser is not needed to read them."""
    assert card.startswith("---\n")
    lines = card.split("---\n")[1].splitlines()
    return {name: json.loads(value) for name, _, value in (line.partition(": ") for line in lines)}


def snippet(card: str) -> str:
    (code,) = re.findall(r"```python\n(.*?\n)```", card, re.DOTALL)
    return code


def cli(*arguments: str) -> int:
    return main([str(argument) for argument in arguments])


def quick_or_peers(name: str):
    quick = name in ("gemma_scope", "sae_jax")
    return pytest.param(name, marks=() if quick else pytest.mark.peers)


@pytest.mark.filterwarnings("default")  # of what the peers import
@pytest.mark.parametrize("name", [quick_or_peers(name) for name in FORMATS])
def test_the_snippet_of_the_card_runs_and_gives_the_same(tmp_path, monkeypatch, name):
    if name in NEEDS_TORCH:
        pytest.importorskip("torch")  # to write it
    monkeypatch.setenv("SPARSIFY_DISABLE_TRITON", "1")  # its kernels need a GPU
    sae = random_sae(EXPRESSED_BY.get(name, "relu"))
    interop.export(sae, name, tmp_path / "sae", ABOUT)
    monkeypatch.chdir(tmp_path / "sae")
    found = {}
    exec(snippet((tmp_path / "sae" / "README.md").read_text()), found)
    x = np.asarray(found["x"])
    want = sae.encode(x) if name == "sae_jax" else sae.fold().encode(x)
    assert np.any(want)
    np.testing.assert_allclose(found["latents"], want, atol=1e-4)
    np.testing.assert_allclose(found["x_hat"], sae(x), atol=1e-4)


def test_the_card_states_what_is_known_and_invents_nothing(tmp_path):
    interop.export(random_sae("topk"), "saelens", tmp_path / "a")
    card = (tmp_path / "a" / "README.md").read_text()
    assert front_matter(card).keys() == {"library_name", "tags"}
    assert "Not stated by whoever made this export" in card and "None were measured" in card
    software = f"The sae_jax authors, .* version {importlib.metadata.version('sae-jax')}, 2026"
    assert re.search(software, card)
    about = ABOUT | {"training": {"architecture": "topk", "learning_rate": 3e-4}}
    hub = Hub("apache-2.0", "me/saes", "a/b")
    interop.export(random_sae("topk"), "saelens", tmp_path / "b", about, hub)
    card = (tmp_path / "b" / "README.md").read_text()
    assert front_matter(card)["base_model"] == "google/gemma-2-2b"
    assert front_matter(card)["license"] == "apache-2.0"
    assert "| learning rate | 0.0003 |" in card and "| L0 | 5 |" in card
    call = 'snapshot_download("me/saes", allow_patterns="a/b/*") + "/a/b"'
    assert call in snippet(card) and "2406.04093" in card
    compile(snippet(card), "snippet", "exec")
    local = {"model_name": "one_layer"}  # a folder's name: the hub would refuse the card
    interop.export(random_sae("topk"), "saelens", tmp_path / "c", local)
    assert "base_model" not in front_matter((tmp_path / "c" / "README.md").read_text())


HOSTILE = (
    'a\nimport os; os.abort()\n```\n# b <script>x</script> | c \\| [d](javascript:e) """ `f`\u2028g'
)


def test_names_in_a_card_stay_names(tmp_path):
    """They come from stores, runs and other frameworks' files."""
    cards = []
    for number, text in enumerate(("harmless", HOSTILE)):
        about = {name: text for name in ("site", "model_name", "dataset_path", "run_id")}
        about["training"] = {"architecture": text, "schedule": text}
        hub = Hub(text, "me/saes", f"part-{text}")
        interop.export(random_sae("topk"), "saelens", tmp_path / str(number), about, hub)
        cards.append((tmp_path / str(number) / "README.md").read_text())
    plain, card = cards
    assert front_matter(card)["license"] == HOSTILE
    statements = [[type(s) for s in ast.parse(snippet(one)).body] for one in cards]
    assert statements[0] == statements[1]
    assert len(card.splitlines()) == len(plain.splitlines())
    assert card.count("\n#") == plain.count("\n#")
    rows = [line for line in card.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", row.replace(r"\\", ""))) == 3 for row in rows)
    markdown = card.split("---\n", 2)[2].replace(snippet(card), "")
    assert not re.search(r"(?<!\\)(<|\])", markdown)


def hostile_sweep(tmp_path, run_id="a"):
    """A sweep of one run that is done, of which the checkpoint is not there."""
    sweep = tmp_path / "sweep"
    (sweep / "runs" / "a").mkdir(parents=True)
    config = make_config("store", steps=2)
    (sweep / "runs" / "a" / "config.json").write_text(json.dumps(to_dict(config)))
    (sweep / "runs" / "a" / "result.json").write_text("{}")
    write_results(sweep, [ROWS[0] | {"run_id": run_id}])
    return sweep


@pytest.mark.parametrize("run_id", ["../../a", "/a", "..", ""])
def test_a_run_is_in_its_sweep(tmp_path, capsys, run_id):
    sweep, out = hostile_sweep(tmp_path, run_id), tmp_path / "out"
    assert cli("export", f"--results={sweep}", "--format=saelens", f"--out={out}") == 2
    assert "is not the name of something in" in capsys.readouterr().err and not out.exists()


ENTRY = {"path": "s/width_1k/average_l0_2", "run_id": "b", "architecture": "topk", "site": "s",
         "width": 8, "l0": 1.0, "fvu": None, "ce_recovered": None}  # fmt: skip


@pytest.mark.parametrize(
    "index, complaint",
    [
        ([], "holds no JSON object"),
        ({"format": "saelens"}, "missing required field `saes`"),
        ({"format": "openai", "saes": []}, "of the format openai, not saelens"),
        ({"format": "saelens", "saes": [ENTRY | {"path": "../../x"}]}, "'../../x' is not the name"),
        ({"format": "saelens", "saes": [ENTRY | {"path": "/x"}]}, "'/x' is not the name"),
        ({"format": "saelens", "saes": [ENTRY | {"path": 3}]}, "saes[0].path: Expected `str`"),
        ({"format": "saelens", "saes": [ENTRY | {"width": "8"}]}, "saes[0].width: Expected `int`"),
        ({"format": "saelens", "saes": [ENTRY, ENTRY | {"run_id": "c"}]}, "two SAEs in one folder"),
    ],
)
def test_an_index_names_folders_of_its_own(tmp_path, capsys, index, complaint):
    out = tmp_path / "out"
    out.mkdir()
    (out / "index.json").write_text(json.dumps(index))
    export = ("export", f"--results={hostile_sweep(tmp_path)}", "--format=saelens", f"--out={out}")
    assert cli(*export) == 2
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1
    assert [path.name for path in out.iterdir()] == ["index.json"]


@pytest.mark.parametrize(
    "data, complaint",
    [
        (b"\xff\xfe\x00", "is not a text file"),
        (b"d_sae,loss\n1,2\n", "no columns run_id and status"),
        (b"run_id,status\n" + b"a" * 200_000 + b",done\n", "field larger than"),
    ],
)
def test_a_table_that_is_none_of_a_sweep(tmp_path, data, complaint):
    (tmp_path / "results.csv").write_bytes(data)
    with pytest.raises(UserError, match=complaint):
        select(tmp_path)


def test_where_there_is_no_sweep_no_command_is_offered_that_cannot_help(tmp_path):
    for place, said in ((tmp_path / "S", "there is no"), (tmp_path, "holds no sweep")):
        with pytest.raises(UserError, match=f"{said}.*; give the --workdir of one"):
            select(place)
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(UserError, match="--status writes it"):
        select(tmp_path)


def test_a_table_may_begin_with_a_mark(tmp_path):
    file = write_results(tmp_path, ROWS) / "results.csv"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert len(select(tmp_path)) == 3


def write_results(path, rows: list[dict]):
    with (path / "results.csv").open("w") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


ROWS = [
    {"run_id": "a", "status": "done", "architecture": "topk", "sae.k": 8, "eval_l0": 8.0},
    {"run_id": "b", "status": "done", "architecture": "topk", "sae.k": 32, "eval_l0": 31.5},
    {"run_id": "c", "status": "done", "architecture": "relu", "sae.k": "", "eval_l0": 70.0},
    {"run_id": "d", "status": "failed", "architecture": "relu", "sae.k": "", "eval_l0": ""},
]


@pytest.mark.parametrize(
    "terms,runs",
    [
        ("", "abc"),
        ("architecture=topk", "ab"),
        ("eval_l0<60 architecture=topk sae.k>=3.2e1", "b"),
        ("sae.k!=8", "bc"),
        ("eval_l0<=31.5", "ab"),
        ("run_id!=a eval_l0>40", "c"),
    ],
)
def test_select(tmp_path, terms, runs):
    found = select(write_results(tmp_path, ROWS), terms)
    assert "".join(row["run_id"] for row in found) == runs


@pytest.mark.parametrize(
    "terms,complaint",
    [
        ("eval_lo<60", "did you mean 'eval_l0'"),
        ("eval_l0", "is not COLUMN"),
        ("architecture<topk", "no number"),
        ("architecture=topk eval_l0>60", "architecture=topk by 2, eval_l0>60 by 1"),
        ("status=failed", "none of the 3 done runs"),
        ("architecture=topk, sae.k=32", "'architecture=topk,' ends with a comma; spaces alone"),
        ("architecture=topk,sae.k=32", "by 0 .spaces separate terms, not commas"),
        ("architecture=tpk", "architecture=tpk by 0 .did you mean 'topk'"),
        ("sae.k=33 architecture=topk", "sae.k=33 by 0 .there are 8, 32"),
    ],
)  # fmt: skip
def test_a_selection_of_nothing_is_explained(tmp_path, terms, complaint):
    with pytest.raises(UserError, match=complaint):
        select(write_results(tmp_path, ROWS), terms)


def test_of_a_sweep_only_runs_that_are_done_now_are_taken(tmp_path):
    """Until a rerun is done results.csv speaks of the run that was there before."""
    sweep = hostile_sweep(tmp_path)
    rows = select(write_results(sweep, ROWS))
    assert [row["run_id"] for row in still_done(sweep, rows)] == ["a"]
    (sweep / "runs" / "a" / "result.json").unlink()
    with pytest.raises(UserError, match="none of the 3 runs that .* is done now"):
        still_done(sweep, rows)


def test_widths_are_named_as_in_gemma_scope():
    widths = [2**n for n in (9, 14, 15, 16, 17, 18, 19, 20)]
    names = "512 16k 32k 65k 131k 262k 524k 1m".split()
    assert [width_name(width) for width in widths] == names


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    with hub_server.running() as server:
        hub_server.use(server, monkeypatch, tmp_path / "cache")
        monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
        yield server


@pytest.mark.slow
def test_push_sends_the_files(tmp_path, stand_in):
    out = tmp_path / "out"
    interop.export(random_sae("topk"), "saelens", out)
    (out / "part").mkdir()
    (out / "part" / ".a.tmp").write_text("what an export that was stopped left")
    assert cli("export", f"--out={out}", "--push_to=hf://me/sae") == 0
    made = json.loads(stand_in.uploads["/api/repos/create"])
    assert (made["organization"], made["name"]) == ("me", "sae")
    assert made.get("visibility") == "private" or made.get("private") is True
    commit = stand_in.uploads["/api/models/me/sae/commit/main"].splitlines()
    sent = [line["value"] for line in map(json.loads, commit) if line["key"] == "file"]
    files = {file["path"]: base64.b64decode(file["content"]) for file in sent}
    assert files == {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


class Refusal(Exception):
    pass


def test_push_is_private_unless_asked_and_its_failures_are_told(tmp_path, monkeypatch, capsys):
    """With HfApi's own signatures, but nothing behind them."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    api = mock.create_autospec(huggingface_hub.HfApi, instance=True)
    api.create_repo.return_value = "https://hub/me/sae"
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    interop.export(random_sae("topk"), "sae_jax", tmp_path / "sae")
    out = tmp_path / "out"
    export = ["export", f"--checkpoint={tmp_path / 'sae'}", "--format=saelens", f"--out={out}"]
    assert cli(*export, "--push_to=me/sae") == 0
    assert "Uploaded: https://hub/me/sae" in capsys.readouterr().out
    api.create_repo.assert_called_once_with("me/sae", private=True, exist_ok=True)
    uploaded = api.upload_folder.call_args.kwargs
    assert uploaded["folder_path"] == out and uploaded["repo_id"] == "me/sae"
    assert 'snapshot_download("me/sae")' in (out / "README.md").read_text()

    api.upload_folder.side_effect = Refusal("403 Forbidden\nmore")
    again = ["export", f"--out={out}", "--push_to=me/sae"]
    assert cli(*again, "--public") == 2
    error = capsys.readouterr().err
    assert "403 Forbidden. The folder is written" in error and error.count("\n") == 1
    assert api.create_repo.call_args.kwargs["private"] is False
    assert cli("export", f"--out={tmp_path / 'nothing'}", "--push_to=me/sae") == 2
    assert "is no export" in capsys.readouterr().err
    assert cli(*again[:2], "--push_to=sae") == 2
    assert "write --push_to=user/name" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert cli(*again) == 2
    assert 'pip install "sae-jax[hub]"' in capsys.readouterr().err


@pytest.mark.slow
def test_metadata_of_a_run_on_a_harvested_store(tmp_path):
    """What SAEDashboard and Neuronpedia read of cfg.json."""
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x + 1\n" * 200)
    store = tmp_path / "store"
    harvest = ["harvest", "--model=demo", f"--text={text}", "--sites=resid_post.0"]
    assert cli(*harvest, "--context_length=32", f"--out={store}") == 0
    run = tmp_path / "run"
    train_run(make_config(str(store), steps=10, sae={"aux_coefficient": 0.0}), run)
    rows = HeldOutRows(Store.open(store), "resid_post.0", tokens=320, holdout_fraction=0.05)
    model = lm.open_model(lm.DEMO_MODEL)
    report.save(report.evaluate(sae_jax.load(run), rows, model, 320), run / "eval.json")
    export = ["export", f"--checkpoint={run}", "--format=saelens", "--model_name=me/model"]
    assert cli(*export, f"--out={tmp_path / 'out'}") == 0
    metadata = json.loads((tmp_path / "out" / "cfg.json").read_text())["metadata"]
    result = json.loads((run / "result.json").read_text())
    want = {
        "model_name": "me/model",
        "hook_name": "blocks.0.hook_resid_post",
        "hook_layer": 0,
        "hook_head_index": None,
        "context_size": 32,
        "prepend_bos": True,
        "dataset_path": str(text),
        "l0": result["eval_l0"],
    }
    assert {name: metadata[name] for name in want} == want
    evaluation = json.loads((run / "eval.json").read_text())
    recovered = evaluation["language_model"]["ce_recovered_zero"]
    assert metadata["evaluation"]["ce_recovered_zero"] == recovered
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| CE recovered, against zero ablation | {recovered:.5g} |" in card
    assert front_matter(card)["base_model"] == "me/model"
    assert "| tokens | 640 |" in card

    imported = tmp_path / "imported"  # what is known goes with it
    assert cli("import", f"--path={tmp_path / 'out'}", f"--out={imported}") == 0
    assert interop.read_provenance(imported)["dataset_path"] == str(text)

    evaluation = json.loads((run / "eval.json").read_text())
    evaluation["settings"]["step"] = 5  # as if it had been made while the run was trained
    (run / "eval.json").write_text(json.dumps(evaluation))
    assert "evaluation" not in interop.read_provenance(run)
    (run / "checkpoints" / "10").rename(run / "checkpoints" / "5")  # as if the run had not ended
    about = interop.read_provenance(run)
    assert about == interop.read_provenance(run / "checkpoints" / "5")
    assert about["training"]["tokens"] == 320 and "l0" not in about and "evaluation" not in about
    assert about["model_name"] == lm.load_tokenizer(lm.DEMO_MODEL).name


@pytest.mark.slow
def test_many_of_a_sweep(tmp_path, monkeypatch, capsys, caplog):
    """Three runs of one width and L0; the first export stopped after one."""
    store = make_store(tmp_path / "store")
    config = make_config(store, steps=2, sae={"aux_coefficient": 0.0, "d_sae": 1088})
    (tmp_path / "sweep.py").write_text(
        "from sae_jax.config import from_dict\n"
        "from sae_jax.sweep import grid\n"
        f"def get_config(): return from_dict({to_dict(config)!r})\n"
        "def get_sweep(): return grid.sweep('train.seed', range(3))\n"
    )
    sweep, out = tmp_path / "s", tmp_path / "out"
    assert cli("sweep", f"--config={tmp_path / 'sweep.py'}", f"--workdir={sweep}") == 0
    export = ["export", f"--results={sweep}", "--format=saelens", f"--out={out}"]
    real, left = interop.export, [1]

    def stopped(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr(interop, "export", stopped)
    assert cli(*export, "--select=train.seed<2") == 130
    left[0] = 1  # the one that was missing, and no other
    assert cli(*export, "--select=train.seed<2") == 0
    folders = {path.parent for path in out.rglob("cfg.json")}
    assert {str(folder.relative_to(out)) for folder in folders} == {
        "activations/width_1k/average_l0_2",
        "activations/width_1k/average_l0_2-2",
    }
    left[0] = 1
    assert cli(*export) == 0
    saes = json.loads((out / "index.json").read_text())["saes"]
    assert len({sae["path"] for sae in saes}) == len({sae["run_id"] for sae in saes}) == 3
    rows = list(csv.DictReader((out / "index.csv").read_text().splitlines()))
    assert [row["path"] for row in rows] == [sae["path"] for sae in saes]
    x = np.random.default_rng(0).normal(size=(20, 16)).astype(np.float32)
    for sae in saes:
        result = json.loads((sweep / "runs" / sae["run_id"] / "result.json").read_text())
        assert (sae["l0"], sae["fvu"]) == (result["eval_l0"], result["eval_fvu"])
        assert sae["ce_recovered"] is None and sae["architecture"] == "topk"
        assert sae["rows"] == result["eval_rows"] > 20
        theirs = sae_jax.load(out / sae["path"])
        ours = sae_jax.load(sweep / "runs" / sae["run_id"])
        np.testing.assert_allclose(theirs(x), ours(x), atol=1e-4)
        assert f"]({sae['path']})" in (out / "README.md").read_text()
    assert "The sae_jax authors" in (out / "README.md").read_text()
    evaluation = {"rows": 20, "reconstruction": {"fvu": 0.5}, "settings": {"step": 2}}
    (sweep / "runs" / saes[0]["run_id"] / "eval.json").write_text(json.dumps(evaluation))
    assert cli(*export) == 0
    (index,) = json.loads((out / "index.json").read_text())["saes"][:1]
    assert (index["fvu"], index["rows"]) == (0.5, 20)
    assert "different numbers of held-out rows, 20 (1 runs)" in caplog.text
    capsys.readouterr()
    assert cli(*export[:2], "--format=openai", f"--out={tmp_path / 'no'}") == 2
    assert "openai cannot express a topk" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
    assert cli(*export[:2], "--format=sparsify", f"--out={out}") == 2
    assert "of the format saelens, not sparsify" in capsys.readouterr().err
