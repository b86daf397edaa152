"""Groups of runs compared: planted frontiers come back, what is not comparable is said."""

import csv
import itertools
import json

import numpy as np
import pytest
from test_laws import write

from sae_jax import cli, plots
from sae_jax.config import UserError
from sae_jax.laws.comparison import compare

TRUE = {"topk": 0.4, "relu": 0.5}  # FVU = TRUE L0^-1/2, times one of SEEDS
SEEDS = {0: 0.98, 1: 1.0, 2: 1.02}
SPREAD = 0.02


def planted(sizes=(512,), architectures=TRUE):
    """Columns of two architectures, four sparsities and three seeds at each size; a quarter of the
    latents costs twice the FVU."""
    rows = []
    for name, size, k, (seed, factor) in itertools.product(
        architectures, sizes, (8, 16, 32, 64), SEEDS.items()
    ):
        l0 = k if name == "topk" else 1.1 * k  # so that it is never at a power of two
        fvu = TRUE[name] * factor * l0**-0.5 * (512 / size) ** 0.5
        rows.append(dict(architecture=name, d_sae=size, sparsity=k, seed=seed, l0=l0, fvu=fvu,
                         probe_f1=1 - fvu))  # fmt: skip
    return {name: [row[name] for row in rows] for name in rows[0]}


def test_frontiers_at_equal_l0_and_the_spread_over_seeds():
    """Power laws are straight lines in between, so that interpolation is exact."""
    found = compare(planted())
    assert found.by == ("architecture",) and found.groups == ("relu", "topk")
    assert found.at == (16, 32, 64) and (found.x, found.y, found.best) == ("l0", "fvu", "low")
    for group, true in TRUE.items():
        for place, values in zip(found.at, found.values[group], strict=True):
            assert sorted(values) == pytest.approx([true * f * place**-0.5 for f in SEEDS.values()])
    assert len(found.settings) == 8 and all(s.on_frontier for s in found.settings)
    assert found.notes == ()
    (row,) = (r for r in found.rows if r["group"] == "topk" and r["sparsity"] == "16")
    assert row["runs"] == 3 and row["l0"] == 16 and row["l0_sd"] == 0 and row["frontier"] == 1
    assert row["fvu"] == pytest.approx(0.1) and row["fvu_sd"] == pytest.approx(0.1 * SPREAD)
    assert "0.1000 ± 0.0020" in found.as_markdown() and r"$0.1000 \pm 0.0020$" in found.as_latex()


def test_what_is_beaten_is_off_the_frontier_and_said():
    found = compare(planted(sizes=(128, 512)), at=[16])
    assert {s.cells["d_sae"] for s in found.settings if s.on_frontier} == {"512"}
    (note,) = found.notes
    assert "differ in d_sae (128, 512)" in note
    assert found.values["topk"][0].mean() == pytest.approx(0.1)
    assert compare(planted(sizes=(128, 512)), select="d_sae=128").notes[1:] == ()
    both = compare(planted(sizes=(128, 512)), by="architecture,d_sae")
    assert both.groups == (
        "relu, d_sae 128",
        "relu, d_sae 512",
        "topk, d_sae 128",
        "topk, d_sae 512",
    )
    assert both.notes == () and all(s.on_frontier for s in both.settings)
    unequal = {n: v + [*w] for (n, v), w in zip(planted(architectures=["topk"]).items(),
               planted(sizes=(128,), architectures=["relu"]).values(), strict=True)}  # fmt: skip
    assert "the groups differ in d_sae too (relu: 128; topk: 512)" in compare(unequal).notes


def test_a_score_of_which_more_is_better():
    found = compare(planted(), "probe_f1", by="architecture")
    assert found.best == "high" and all(s.on_frontier for s in found.settings)
    columns = planted() | {"odd": planted()["fvu"]}
    with pytest.raises(UserError, match="--best=high or low"):
        compare(columns, "odd")
    worst = compare(columns, "odd", best="high")
    assert sum(s.on_frontier for s in worst.settings) == 2  # the sparsest of each is best in both


def test_without_seeds_or_groups():
    columns = planted(architectures=["topk"])
    one = {name: values[1::3] for name, values in columns.items() if name != "seed"}
    found = compare(one)
    assert found.groups == ("",) and [v.tolist() for v in found.values[""]] == [
        [pytest.approx(0.4 * place**-0.5)] for place in found.at
    ]
    assert "±" not in found.as_markdown() and len(found.settings) == 4
    assert compare(one | {"again": [1, 1, 2, 2]}, alike="again").as_markdown().count("±") == 4


def test_the_figure_has_units_a_line_for_each_group_and_looks_that_differ():
    with plots.paper():
        (axes,) = compare(planted(sizes=(128, 512)), by="architecture,d_sae").figure().axes
    assert axes.get_xlabel() == "L0 (latents per token)"
    assert axes.get_ylabel() == "FVU (fraction of variance unexplained)"
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    lines = [bars.lines[0] for bars in axes.containers]
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines}
    assert len(lines) == len(looks) == 4 and len({line.get_color() for line in lines}) == 2
    assert [text.get_text() for text in axes.get_legend().get_texts()][0] == "relu, d_sae 128"


@pytest.fixture
def sweep(tmp_path):
    """A sweep's results.csv, and eval.json in all runs but one."""
    columns = planted()
    count = len(columns["seed"])
    ids = [f"run{i}" for i in range(count)]
    columns = dict(run_id=ids, status=["done"] * count, **{"train.seed": columns["seed"]}) | columns
    theirs = {"eval_l0": "l0", "eval_fvu": "fvu", "sae.k": "sparsity"}
    columns |= {name: columns.pop(own) for name, own in theirs.items()}
    for run_id, score in list(zip(ids, columns["probe_f1"], strict=True))[1:]:
        (tmp_path / "sweep/runs" / run_id).mkdir(parents=True)
        values = {"language_model": {"ce_recovered_zero": score}, "sparsity": {"d_sae": 512}}
        (tmp_path / "sweep/runs" / run_id / "eval.json").write_text(json.dumps(values))
    write(tmp_path / "sweep/results.csv", columns)
    return tmp_path / "sweep"


def test_an_evaluation_of_a_run_that_had_not_ended_does_not_count(sweep, tmp_path, capsys):
    file = sweep / "runs/run3/eval.json"
    early = json.loads(file.read_text()) | {"settings": {"step": 5, "result": None}}
    file.write_text(json.dumps(early))
    flags = [f"--results={sweep}", "--y=ce_recovered_zero", f"--out={tmp_path / 'out'}"]
    assert cli.main(["compare", *flags]) == 0
    assert "note: 2 of 24 runs are left out" in capsys.readouterr().out


def test_the_command_reads_evaluations_and_writes_figure_and_tables(sweep, tmp_path, capsys):
    out, paper = tmp_path / "out", tmp_path / "paper/ce.pdf"
    flags = [f"--results={sweep}", "--y=ce_recovered_zero", f"--out={out}", "--at=16,32"]
    assert cli.main(["compare", *flags]) == 0
    assert cli.main(["compare", *flags, f"--figure={paper}"]) == 0  # its own files anew
    said = capsys.readouterr().out
    assert "note: 1 of 24 runs are left out, without eval_l0 or ce_recovered_zero" in said
    assert "CE recovered at L0 = 32" in said
    assert sorted(p.name for p in out.iterdir()) == [
        "compare.csv", "compare.png", "table.md", "table.tex",
    ]  # fmt: skip
    with (out / "compare.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sum(int(row["runs"]) for row in rows) == 23
    assert paper.read_bytes().startswith(b"%PDF")
    assert np.isclose(float(rows[-1]["ce_recovered_zero"]), 1 - 0.4 / 8)


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--y=fvuu", "did you mean 'fvu'? it has d_sae, sparsity, seed, l0, fvu, probe_f1"),
        ("--y=ce_recovered_zero", "sae-jax eval --model"),
        ("--x=eval_l1", "no column eval_l1"),
        ("--by=arch", "has no column arch; it has architecture, d_sae"),
        ("--alike=d_sea", "has no column d_sea"),
        ("--alike=architecture", "differ by something else"),
        ("--by=fvu", "24 groups|cannot be told apart"),
        ("--select=d_sae=3", "none of the 48 rows"),
        ("--at=16,x", "--at: 'x'"),
        ("--at=-1", "--at: '-1'"),
        ("--best=highest", "best"),
        ("--figure=a.gif", ".pdf, .svg or .png"),
        ("--figure=a.pdf --style=runs.csv", "no matplotlib style"),
        ("--style=ggplot", "--figure"),
        ("--results=nothing", "nothing"),
        ("--out=runs.csv", "is a file"),
        ("--out=theirs", "theirs/compare.csv is not of sae-jax compare"),
    ],
)
def test_mistakes_are_one_line_and_leave_everything_as_it_was(
    tmp_path, monkeypatch, capsys, flags, says
):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "runs.csv", planted(sizes=(128, 512)))
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/compare.csv").write_text("mine\n")
    usual = [flag for flag in ("--results=runs.csv", "--out=out") if flag[:5] not in flags]
    assert cli.main(["compare", *usual, *flags.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert any(part in line for part in says.split("|")), line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["runs.csv", "theirs"]
    assert (tmp_path / "theirs/compare.csv").read_text() == "mine\n"
