"""What a law is fitted to: tables that are joined and selected from, and what varies in them."""

import json

import numpy as np
import pytest
from test_laws import SIZES, TOKENS, grid, runs, write

from sae_jax import cli, laws
from sae_jax.errors import UserError
from sae_jax.laws import holdout, settings


def said(columns, law, **named):
    """What a fit says of columns that vary."""
    rows = laws.read(columns, **named)
    known = {"power": ("flops",), "chinchilla": ("d_sae", "tokens"), "openai_nk": ("d_sae", "k")}
    found = rows.varying(known.get(law, ("d_sae", "tokens")))
    return found, "\n".join(settings.warnings(law, found))


def test_every_column_that_varies_beside_the_law_is_named():
    """Whatever it is called: but not what the law's own columns give, nor repetitions."""
    columns = runs("chinchilla") | {
        "sparsity": np.tile([16, 8, 128, 32, 64], 5),
        "architecture": np.where(np.arange(25) % 2, "relu", "topk"),
        "seed": np.arange(25) % 3,
        "same": np.full(25, 7),
        "l0": np.random.default_rng(0).uniform(3, 60, 25),
    }
    columns["lr"] = 1e-3 * (columns["d_sae"] / 512) ** -0.5
    columns["train.tokens"] = columns["tokens"] + 37
    columns["C"] = 768 * columns["d_sae"] * columns["tokens"]
    for named in ({}, {"k": "sparsity", "flops": "C"}):
        found, text = said(columns, "chinchilla", **named)
        assert found["sparsity"]["values"] == ["8", "16", "32", "64", "128"]
        assert found["seed"]["is"] == "repetition" and found["lr"]["follows"] == "d_sae"
        assert set(found) == {"sparsity", "architecture", "seed", "l0", "lr"}
        assert "differ in sparsity (8, 16, 32, 64, 128); in architecture (relu, topk)" in text
        assert "change lr (" in text and "with d_sae" in text and "its own l0 (" in text
        assert "seed" not in text and "same" not in text


@pytest.mark.parametrize(
    "law, columns, name",
    [
        ("openai_nk", grid(d_sae=SIZES, k=[8.0, 16.0], tokens=TOKENS[:2]), "tokens"),
        ("power", grid(d_sae=SIZES[:3], tokens=TOKENS, flops=[1.0]), "d_sae"),
        ("isoflop", grid(d_sae=SIZES, tokens=TOKENS, k=[8.0, 16.0]), "k"),
    ],
)
def test_quantities_that_a_law_does_not_know_are_named(law, columns, name):
    columns["loss"] = columns["d_sae"] ** -0.3
    columns["flops"] = columns["d_sae"] * columns["tokens"]
    found, text = said(columns, law)
    assert found[name]["is"] == "setting" and f"{name} (" in text


def test_a_sweeps_own_measurements_are_no_settings():
    columns = runs("chinchilla") | {"run_id": [f"r{i}" for i in range(25)], "status": ["done"] * 25}
    columns |= {"architecture": ["topk"] * 25, "eval_l0": np.arange(25.0), "odd": np.arange(25) % 2}
    columns["sae.knee"] = ["", *[0.1] * 24]
    assert said(columns, "chinchilla")[0] == {
        "sae.knee": {"is": "setting", "follows": None, "values": ["0.1", "none"]}
    }


def test_the_axes_of_a_law_of_compute_are_no_doubt():
    """Sizes and tokens vary along it, and what follows these; each is named once."""
    columns = grid(d_sae=SIZES, tokens=TOKENS)
    columns |= {"sae.d_sae": columns["d_sae"], "train.tokens": columns["tokens"] + 37}
    columns |= {"lr": columns["d_sae"] ** -0.5, "architecture": np.tile(["a", "b"], 13)[:25]}
    columns |= {"sae.architecture": columns["architecture"], "k": columns["d_sae"] % 7}
    columns |= {"flops": columns["d_sae"] * columns["tokens"], "loss": columns["d_sae"] ** -0.3}
    found, text = said(columns, "power")
    assert set(found) == {"d_sae", "tokens", "lr", "architecture", "k"}
    follows = {name: column["follows"] for name, column in found.items()}
    assert follows["d_sae"] == follows["tokens"] == "flops" and follows["lr"] == "d_sae"
    differ, change = text.splitlines()
    assert "architecture (a, b)" in differ and "tokens" not in differ and "select" not in change


@pytest.mark.parametrize("count, words", [(1, "the largest of 5"), (2, "the 2 largest of 5")])
def test_what_is_held_out_is_told_in_words(count, words):
    columns = {"flops": 10.0 ** np.arange(5), "loss": np.arange(1.0, 6)}
    _, held, what = holdout.split(laws.read(columns), ("flops",), count)
    points = "1 point " if count == 1 else "2 points "
    assert len(held) == count and words in what and points in what


def test_tables_are_joined_and_selected_from(tmp_path):
    """A row of each file; a run that two sweeps have counts once, others of its name do not."""
    columns = runs("chinchilla") | {"run_id": np.arange(25).astype(str)}
    first = write(tmp_path / "a.csv", columns)
    part = {name: values[:5] for name, values in columns.items()}
    second = write(tmp_path / "b.csv", part | {"extra": ["x"] * 5})
    other = write(tmp_path / "c.csv", part | {"loss": 2 * part["loss"]})
    rows = laws.read([str(first), second, other])
    assert len(rows) == 30 and rows.run.max() == 29
    assert "5 runs are in several tables" in "".join(rows.notes)
    assert laws.read([first, other], select=f"results={other}").loss.min() == 2 * min(part["loss"])

    foreign = {"Model Size": columns["d_sae"], "loss": columns["loss"]}
    chosen = laws.read(foreign, d_sae="Model Size", select="d_sae>600 d_sae!=2048")
    assert set(chosen.columns["d_sae"]) == {1024, 4096, 8192}
    with pytest.raises(UserError, match="none of the 25 rows.*d_sae>1e9 by 0"):
        laws.read(columns, select="d_sae>1e9")
    with pytest.raises(UserError, match="did you mean 'd_sae'"):
        laws.read(columns, select="d_sea>1e9")


def test_results_and_evaluations_of_a_sweep_are_the_same_runs():
    """What eval measured of three counts, and the others stay; on how many rows is said."""
    columns = dict(run_id=list("abcde"), seed=range(5), eval_fvu=[0.5] * 5, eval_l0=[8] * 5,
                   eval_rows=[65_536] * 5)  # fmt: skip
    evals = {name: list(values)[:3] for name, values in columns.items()}
    evals |= dict(eval_fvu=[0.4] * 3, eval_rows=[10**6] * 3, eval_ce_recovered_zero=[0.9] * 3)
    found = laws.compare([columns, evals])
    assert found.settings[0].y.tolist() == [0.4, 0.4, 0.4, 0.5, 0.5]
    assert found.notes[0] == (
        "3 runs are in several tables and count once, 3 of them with the eval_ figures of the last"
    )
    assert "numbers of held-out rows, 65,536 (2 runs), 1,000,000 (3 runs)" in found.notes[1]
    assert "left out" in laws.compare([columns, evals], "ce_recovered_zero").notes[-1]
    assert laws.compare([columns | {"eval_rows": [65_000, *[65_536] * 4]}]).notes == ()


def test_runs_of_one_number_in_two_tables_of_other_programs_are_two():
    columns = dict(run_id=range(3), d_sae=[64, 128, 256], eval_loss=[3.0, 2.0, 1.0])
    other = columns | {"eval_loss": [3.1, 2.1, 1.1]}
    assert laws.read([columns, other]).loss.tolist() == [1.0, 1.1, 2.0, 2.1, 3.0, 3.1]


def test_a_sweep_that_has_grown_since_it_was_evaluated():
    """Its runs have longer names now."""
    columns = dict(run_id=list("ab"), name=["d=1", "d=2"], eval_fvu=[0.5] * 2, eval_l0=[8] * 2,
                   eval_rows=[65_536] * 2)  # fmt: skip
    grown = columns | {"name": ["d=1,k=8", "d=2,k=8"]}
    found = laws.compare([grown, columns | {"eval_fvu": [0.4] * 2, "eval_rows": [10**6] * 2}])
    assert sum(len(setting.y) for setting in found.settings) == 2


def test_of_many_bad_rows_the_first_is_named(tmp_path):
    columns = runs("chinchilla")
    columns["d_sae"] = [f"{int(n):,}" for n in 1000 * columns["d_sae"]]
    with pytest.raises(UserError, match="a.csv, line 2: d_sae is '"):
        laws.fit(laws.read(write(tmp_path / "a.csv", columns)), "chinchilla")


def test_the_best_learning_rate_is_that_of_each_setting():
    """An architecture is not left out because another does better at another rate."""
    columns = runs("chinchilla")
    two = {name: np.tile(values, 2) for name, values in columns.items()}
    two |= {"architecture": np.repeat(["topk", "relu"], 25), "lr": np.repeat([1e-3, 3e-3], 25)}
    two["loss"] = two["loss"] * np.repeat([1.0, 1.2], 25)
    assert len(laws.read(two)) == 50


def test_the_best_learning_rate_where_the_coefficient_is_moved():
    """What it ended at is each run's own, and sets none of them apart."""
    columns = {
        "d_sae": [64, 64, 128, 128], "tokens": [1e6] * 4, "lr": [1e-3, 1e-4] * 2,
        "target_l0": [8] * 4, "sparsity_coefficient": [0.31, 0.47, 0.29, 0.52],
        "loss": [0.5, 0.6, 0.4, 0.5],
    }  # fmt: skip
    found = laws.read(columns)
    assert sorted(found.columns["loss"]) == [0.4, 0.5]
    assert "2 runs are left out, another learning rate being better" in found.notes[0]


def test_long_whole_numbers_are_told_apart():
    assert settings.as_text(20240101) != settings.as_text(20240102)


def test_a_column_that_some_runs_have_is_there_in_their_group():
    columns = runs("chinchilla") | {"architecture": np.repeat(["topk", "relu"], [15, 10])}
    columns["k"] = np.array([*[32] * 15, *[None] * 10], object)
    groups = laws.read(columns).split(["architecture"])
    assert list(groups) == ["relu", "topk"]
    assert "k" not in groups["relu"].columns and (groups["topk"].columns["k"] == 32).all()
    columns |= {"data.site": np.repeat(["a", "b"], [15, 10])}
    assert list(laws.read(columns).split(["site"])) == ["a", "b"]
    with pytest.raises(UserError, match="did you mean 'architecture'"):
        laws.read(columns).split(["architectur"])
    with pytest.raises(UserError, match="row .*: k is empty"):
        laws.fit(columns, "openai_nk")


@pytest.mark.parametrize(
    "source, words",
    [
        ({"d_sae": [1, 2], "loss": [1.0]}, "different lengths"),
        ({"d_sae": [1, 2], "loss": [1.0, float("nan")]}, "row 1: loss is nan.*--select=.loss<1e99"),
        ({"loss": ["", ""]}, "row 0: loss is empty"),
        (7, "a data frame, not int"),
        ({}, "no rows"),
        ([], "no rows"),
    ],
)
def test_tables_that_are_none(source, words):
    with pytest.raises(UserError, match=words):
        laws.read(source)


@pytest.mark.parametrize(
    "flags",
    [
        ["--law=power", "--law=chinchilla"],
        ["--seed=0", "--seed=0"],
        ["--config.sae.k=3", "--config.sae.k=4"],
    ],
)
def test_a_flag_that_would_be_ignored_is_refused(capsys, flags):
    assert cli.main(["fit", "--results=a.csv", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert flags[0].partition("=")[0] in line
    assert "already defined" in line or "given twice" in line


def test_a_prediction_at_what_is_no_quantity_is_refused_before_the_fit(capsys):
    flags = ["--results=absent.csv", "--law=power", "--out=fit", "--d_sae=params"]
    assert cli.main(["fit", *flags, "--predict_at=params=3 tks=4"]) == 2
    assert "--predict_at: the name is 'tks'" in capsys.readouterr().err
    assert cli.main(["fit", *flags, "--predict_at=params=3 tokens=4"]) == 2
    assert "there is no file absent.csv" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_joins_selects_and_says_what_it_cannot(tmp_path, capsys):
    """openai_nk has no frontier: the fit is written, losses are predicted, and then it is said."""
    columns = runs("openai_nk", noise=0.002)
    half = {name: values[:10] for name, values in columns.items()}
    rest = {name: values[10:] for name, values in columns.items()}
    files = [write(tmp_path / "a.csv", half), write(tmp_path / "b.csv", rest)]
    out = tmp_path / "fit"
    flags = [*(f"--results={file}" for file in files), "--law=openai_nk", f"--out={out}"]
    flags += ["--select=k<64", "--predict_at=d_sae=20000 k=16", "--predict_flops=1e15"]
    assert cli.main(["fit", *flags]) == 2
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert "has the fit, but not all" in line and "knows no tokens" in line
    values = json.loads((out / "fit.json").read_text())
    assert values["n_points"] == 15 and values["refused"] and values["prediction"] is None
    (predicted,) = values["predictions"]
    assert f"at d_sae=20000 k=16: loss {predicted['loss']:.5g}, 95% of runs" in said.out
    found = laws.load(out)
    assert found.loss(n=20000, k=16).low == predicted["low"]
