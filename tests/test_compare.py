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
    assert "end before the largest L0 (relu 8.8 of 70.4, topk 8 of 64)" in worst.notes[-1]
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


def at_targets(l0, fvu, **columns):
    """Columns of runs of jumprelu at a target L0 of 4 and 8, in turn for three seeds."""
    return dict(architecture=["jumprelu"] * 6, target_l0=[4, 4, 4, 8, 8, 8], seed=[0, 1, 2] * 2,
                eval_l0=l0, eval_fvu=fvu) | columns  # fmt: skip


def test_all_seeds_count_at_equal_l0_whichever_side_of_it_their_own_is_on():
    """At L0 = 8 only the best seed, or only the worst, has runs on both sides."""
    fvu = [0.4, 0.5, 0.6, 0.2, 0.3, 0.4]
    for last, cell in (([8.01, 7.99, 7.98], "0.300 ± 0.100"), ([7.98, 7.99, 8.01], "0.30 ± 0.10")):
        found = compare(at_targets([4.0, 4.0, 4.0, *last], fvu), by="architecture")
        assert found.at == (4, 8)
        first, second = found.values["jumprelu"]
        assert first == pytest.approx(fvu[:3]) and second == pytest.approx(fvu[3:], rel=5e-3)
        assert f"| {cell} |" in found.as_markdown() and "seeds" not in found.as_markdown()
    # In between, as at the ends: a power law whose seeds scatter along it is one value.
    scattered = np.array([4.1, 4.0, 3.9, 7.8, 8.0, 8.2])
    between = compare(at_targets(scattered, scattered**-0.5), at=[4, 5, 8.3]).values[""]
    for place, values in zip([4, 5, 8.3], between, strict=True):
        assert values == pytest.approx([place**-0.5] * 3, rel=1e-4)


def test_a_cell_of_fewer_seeds_says_so_and_an_empty_one_why():
    columns = at_targets([4, 4, 4, 8, 8, 8], [0.4, 0.5, 0.6, 0.2, 0.3, 0.4])
    fewer = {name: values[:5] for name, values in columns.items()}
    table = compare(fewer, at=[4, 5, 8, 9]).as_markdown().splitlines()[2]
    assert table.count("(2 of 3 seeds)") == 2 and "|   0.50 ± 0.10 |" in table
    found = compare(fewer, at=[4, 9])
    assert not len(found.values[""][1])
    assert "the frontier has no value at L0 = 9: its frontier is at 4 to 8" in found.notes[0]
    with pytest.raises(UserError, match="--at=1,16: no group's frontier is at such L0 .4 to 8."):
        compare(fewer, at=[1, 16])
    other = at_targets([32, 32, 32, 64, 64, 64], columns["eval_fvu"], architecture=["topk"] * 6)
    apart = compare({name: [*columns[name], *other[name]] for name in columns})
    assert (
        apart.at == ()
        and "frontiers share no L0 (jumprelu 4 to 8, topk 32 to 64)" in apart.notes[-1]
    )


def test_of_runs_with_one_l0_the_best_are_the_frontier():
    """Longer runs are better, and one of the shorter has an L0 smaller by a thousandth."""
    columns = dict(run_id=list("abcd"), status=["done"] * 4, architecture=["topk"] * 4, k=[4] * 4,
                   tokens=[999936] * 2 + [1999872] * 2, seed=[0, 1, 0, 1],
                   eval_l0=[4.0, 3.999, 4.0, 4.0], eval_fvu=[0.4, 0.4, 0.3, 0.3])  # fmt: skip
    columns["train.tokens"] = [10**6] * 2 + [2 * 10**6] * 2  # which tokens say better
    found = compare(columns, at=[4])
    assert found.values[""][0].tolist() == [pytest.approx(0.3)] * 2
    assert [s.on_frontier for s in found.settings] == [False, True]
    assert ["runs of a group differ in tokens (999936, 1999872)" in n for n in found.notes] == [
        True
    ]
    # Of many, each within 1% of the next, some stay, not the last alone.
    x = 4 * 1.004 ** np.arange(40)
    many = compare(dict(eval_l0=x, eval_fvu=1 / x, tokens=range(40)), alike="tokens")
    on = [s.x.mean() for s in many.settings if s.on_frontier]
    assert 10 < len(on) < 20 and min(np.diff(np.log(on))) > 0.0099


def test_missed_targets_and_learning_rates_are_said():
    columns = at_targets([4.1, 4, 2.6, 8, 8.3, 8], [0.4, 0.4, 0.5, 0.2, 0.2, 0.2])
    (note,) = compare(columns).notes
    assert note.startswith("1 of 6 runs with a target_l0 missed it by more than 5% (4 came to 2.6)")
    rates = [1e-3 if name == "topk" else 2e-3 for name in planted()["architecture"]]
    assert compare(planted() | {"lr": rates}).notes == (
        "the groups differ in lr too (relu: 0.002; topk: 0.001)",
    )


def test_starting_coefficients_are_settings_though_runs_end_at_others():
    rows = [
        dict(target_l0=target, seed=seed, sparsity_coefficient=0.01 * (1 + number), l0=target,
             fvu=target**-0.5 + start) | {"sae.sparsity_coefficient": start}
        for number, (target, start, seed) in enumerate(
            itertools.product((4, 8), (1e-3, 1e-2), (0, 1)))
    ]  # fmt: skip
    found = compare({name: [row[name] for row in rows] for name in rows[0]})
    assert len(found.settings) == 4


@pytest.mark.parametrize("at", [[0, 16], [-1.0], [float("nan")]])
def test_places_are_positive(at):
    with pytest.raises(UserError, match="places are positive numbers"):
        compare(planted(), at=at)
    assert compare(planted(), at=[]).at == compare(planted()).at


def test_tables_say_each_thing_once_by_its_name(tmp_path):
    """What a grid sets stands beside what it came to, which all have."""
    columns = planted() | {"sae.architecture": planted()["architecture"]}
    columns |= {"lr": [0.00113137 * (1 + i // 3 % 2) for i in range(24)], "run_id": range(24)}
    columns |= {"optimizer.learning_rate": columns["lr"], "status": ["done"] * 24}
    columns["k"] = columns.pop("sparsity")
    found = compare(columns, at=[16])
    head = found.as_markdown().splitlines()[5]
    assert [cell.strip() for cell in head.split("|")[1:-1]] == [
        "architecture", "learning rate", "k", "runs", "L0", "FVU",
    ]  # fmt: skip
    assert "0.001131 |" in found.as_markdown()
    found.save(tmp_path / "out")
    tables = [(tmp_path / "out" / name).read_text() for name in ("table.tex", "frontier.tex")]
    assert [text.count("tabular") for text in tables] == [2, 2]
    assert [("at L0 = 16" in text, "learning rate" in text) for text in tables] == [
        (True, False), (False, True),
    ]  # fmt: skip
    alone = compare(columns, select="architecture=topk")
    assert alone.groups == ("",) and "| all" in alone.as_markdown()  # not one for each k


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
        "compare.csv", "compare.png", "frontier.tex", "table.md", "table.tex",
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
        ("--at=-1", "--at=-1: places are positive"),
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
