"""What is written into Python, shell, HTML, SVG, CSV and a figure's text is quoted by the rules of
that language: names of runs, files and columns are read back as they are, and nothing in them runs.
"""

import ast
import csv
import html.parser
import json
import shlex
import xml.etree.ElementTree as ElementTree

import matplotlib.figure
import numpy as np
import pytest

from sae_jax import cli, config, plots
from sae_jax.config import Config, DataConfig, OptimizerConfig, TrainConfig
from sae_jax.errors import UserError
from sae_jax.laws import next_run, results
from sae_jax.sae import TopKConfig
from sae_jax.sweep.directory import Run, SweepDirectory
from sae_jax.train.results import run_id

RUNS_CODE = "__import__('pathlib').Path('ran').touch()"
HOSTILE = [
    f'a""" + {RUNS_CODE} + """b',
    f"a''' + {RUNS_CODE} + '''b",
    f"{{{RUNS_CODE}}}",
    '"',
    "ends with \\",
    'with \\"""quotes',
    "two\nlines\r\nor more",
    "$(touch ran) `touch ran` ; touch ran # %s",
    "--config=x",
    "</title><script>touch()</script> & <b onclick='x'>",
    "$x_1$ and \\frac{",
    '=1+2,"3"\t\',',
    "\x07\x1b[31m\u2028\u00e9\u4e2d",
]


@pytest.fixture(params=HOSTILE, ids=ascii)
def name(request, tmp_path, monkeypatch):
    """A name of a folder or a column; afterwards, that nothing in it ran."""
    monkeypatch.chdir(tmp_path)
    yield request.param
    assert not list(tmp_path.rglob("ran")), "something in the name ran"


def folder_of(name: str) -> str:
    return name.replace("/", "_")


def test_the_next_runs_config_is_python_whatever_runs_and_folders_are_called(tmp_path, name):
    """Of a sweep whose nearest run has the name, into a folder with the name."""
    folder = folder_of(name)
    run = tmp_path / "sweep" / "runs" / folder
    run.mkdir(parents=True)
    base = Config(
        sae=TopKConfig(d_sae=64, k=4, d_in=16, d_out=16),
        data=DataConfig(store=name, batch_size=64),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        train=TrainConfig(tokens=6400),
    )
    (run / "config.json").write_text(json.dumps(config.to_dict(base)))
    (run / "result.json").write_text(json.dumps(dict(d_sae=64, tokens=6400, k=4, lr=1e-3)))
    out = tmp_path / folder
    out.mkdir()
    planned = dict(flops=1e9, d_sae=128, tokens=12800, loss=0.5, interval=[0.4, 0.6])
    next_run.save(planned, *next_run.make(planned, [run], None), str(out))

    file = out / next_run.FILE
    tree = ast.parse(file.read_bytes())
    kinds = [type(part).__name__ for part in tree.body]
    assert kinds == ["Expr", "ImportFrom", "Assign", "FunctionDef"]
    said = ast.get_docstring(tree, clean=False)
    assert " ".join(folder.split()) in " ".join(said.split())
    command = said[said.index("sae-jax train") : said.index("\n\nExpected loss")]
    assert shlex.split(command) == [
        "sae-jax", "train", f"--config={file}", "--workdir=DIRECTORY"
    ]  # fmt: skip
    loaded = config.load_file(str(file))
    assert loaded.data.store == name and loaded.sae.d_sae == 128


def table(path, column: str, more: dict | None = None):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["flops", column, *(more or {})])
        for i in range(6):
            writer.writerow([10.0**i, 2 * 0.7**i + 0.1, *(v[i] for v in (more or {}).values())])
    return path


class Elements(html.parser.HTMLParser):
    """The elements, attributes and text of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.names, self.attributes, self.texts = set(), set(), []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        self.attributes |= {attribute for attribute, _ in attrs}

    def handle_data(self, data):
        self.texts.append(data)


@pytest.mark.parametrize("name", HOSTILE[9:11], indirect=True, ids=ascii)
def test_a_report_shows_the_columns_name_and_no_element_of_it(tmp_path, name, capsys):
    folder = folder_of(name)
    values = {"architecture": [f"{name}{i % 2}" for i in range(6)]}
    file = table(tmp_path / f"{folder}.csv", name, values)
    flags = [f"--results={file}", f"--loss={name}", "--law=power", f"--out={folder}"]
    assert cli.main(["fit", *flags, "--bootstrap=50"]) == 0, capsys.readouterr().err
    plain = Elements((tmp_path / folder / "report.html").read_text(encoding="utf-8"))
    assert "script" not in plain.names and "onclick" not in plain.attributes
    assert " ".join(name.split()) in " ".join("".join(plain.texts).split())
    fit = json.loads((tmp_path / folder / "fit.json").read_text())
    assert fit["loss"] == name and any("architecture" in w for w in fit["warnings"])


def test_a_figure_shows_dollar_signs_as_they_are(name):
    figure = matplotlib.figure.Figure()
    axes = figure.subplots()
    axes.set_title(plots.plain(name))
    svg = ElementTree.fromstring(plots.inline_svg(figure, plots.plain(name)))
    assert svg.get("aria-label") == plots.plain(name)
    assert svg.get("role") == "img"
    shown = "".join("".join(part.itertext()) for part in svg.iter() if part.tag.endswith("text"))
    if name.isprintable() and len(name) < 60:
        assert name in shown


def test_a_table_of_a_sweep_is_read_back_as_it_was(tmp_path, name):
    base = Config(sae=TopKConfig(d_sae=64, k=4, d_in=16, d_out=16), data=DataConfig(store=name))
    runs = [Run(run_id(base), base, {"data.store": name})]
    file = SweepDirectory.start(tmp_path / "sweep", runs).write_results()
    with file.open(newline="", encoding="utf-8") as opened:
        (row,) = csv.DictReader(opened)
    assert row["data.store"] == name and row["run_id"] == runs[0].id


def test_a_table_with_such_columns_is_read(tmp_path, name):
    file = table(tmp_path / "a.csv", name)
    rows = results.read(file, ("flops",), {"loss": name})
    np.testing.assert_allclose(rows.loss, sorted(2 * 0.7**i + 0.1 for i in range(6)))
    lines = [{"flops": 10.0**i, name: 0.7**i, "note": name} for i in range(6)]
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    assert len(results.read(file, ("flops",), {"loss": name})) == 6


def test_an_error_is_one_line_whatever_it_names(tmp_path, name, capsys):
    """And nothing in it moves a terminal's cursor or changes its colours."""
    assert cli.main(["fit", f"--results={name}.csv", "--law=power", "--out=o"]) == 2
    err = capsys.readouterr().err
    (line,) = err.splitlines()
    assert line.isprintable() and line.startswith("sae-jax fit: error: --results")


@pytest.mark.parametrize("name", ["it's $(touch ran)"], indirect=True)
def test_a_command_that_is_printed_can_be_pasted(tmp_path, name, capsys):
    folder = folder_of(name)
    file = table(tmp_path / "runs.csv", "loss")
    more = ["--law=chinchilla", f"--out={folder}", "--predict_flops=1e12", "--bootstrap=50"]
    n, tokens = np.meshgrid(2.0 ** np.arange(9, 14), 4.0 ** np.arange(8, 13))
    noise = np.random.default_rng(0).normal(size=n.shape)
    loss = (3 * n**-0.35 + 200 * tokens**-0.4 + 0.1) * np.exp(0.01 * noise)
    with file.open("w") as opened:
        opened.write("d_sae,tokens,d_in,loss\n")
        for row in zip(n.flat, tokens.flat, loss.flat, strict=True):
            opened.write("{},{},16,{}\n".format(*row))
    assert cli.main(["fit", f"--results={file}", *more]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    command = said[said.rindex("next: ") :].removeprefix("next: ")
    assert shlex.split(command)[2] == f"--config={folder}/{next_run.FILE}"


@pytest.mark.parametrize(
    "run", ["../../run", "/etc", "", "a/../../b", ".", "a\\b", "nul\0l"], ids=ascii
)
def test_a_run_id_of_a_table_stays_in_its_sweep(tmp_path, run):
    from sae_jax.interop.many import export_many

    (tmp_path / "results.csv").write_text(f'run_id,status\n"{run}",done\n')
    with pytest.raises(UserError, match="is not the name of something in"):
        export_many(tmp_path, "saelens", tmp_path / "out")
    assert not (tmp_path / "out").exists()
