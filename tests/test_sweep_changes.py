"""Sweeps that grow, and shrink: what is done stays, and what is new goes on from it."""

import csv
import json
import pathlib
import re
import shutil

import numpy as np
import pytest
from training import assert_same_arrays, make_config, make_store, metrics, saved_arrays

from sae_jax import cli
from sae_jax.config import to_dict
from sae_jax.errors import UserError
from sae_jax.sweep import grid, run_names
from sae_jax.sweep.directory import SweepDirectory, expand, load
from sae_jax.sweep.leases import Leases
from sae_jax.train.results import planned

BUDGETS = """return grid.product(
    grid.budgets({}, batch_size=64, warmup_tokens=320),
    grid.sweep("train.seed", range({})),
)"""
SMALL, LARGE = BUDGETS.format([1920, 2560], 2), BUDGETS.format([1920, 2560, 5120], 3)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store") / "store")


def write_sweep(place: pathlib.Path, store: str, body: str, **train) -> str:
    train = {"log_every": 5, "checkpoint_every": 20, "keep_trunk": True} | train
    values = to_dict(make_config(store, steps=40, train=train))
    place.write_text(
        "from sae_jax.config import Config, from_dict\n"
        "from sae_jax.sweep import grid\n"
        f"def get_config(): return from_dict({values!r})\n"
        f"def get_sweep(): {body}\n"
    )
    return str(place)


@pytest.fixture(scope="module")
def done(store, tmp_path_factory):
    """A finished sweep of two budgets and two seeds."""
    folder = tmp_path_factory.mktemp("sweeps")
    file = write_sweep(folder / "small.py", store, SMALL)
    assert cli.main(["sweep", f"--config={file}", f"--workdir={folder / 'S'}"]) == 0
    return folder / "S"


@pytest.fixture
def sweep(done, tmp_path):
    return shutil.copytree(done, tmp_path / "S")


@pytest.fixture
def pretended(store, tmp_path):
    """A sweep that looks finished."""
    file = write_sweep(tmp_path / "small.py", store, SMALL)
    directory = SweepDirectory.start(tmp_path / "S", load(file, {}))
    for run in directory.runs:
        path = directory.run_path(run)
        path.mkdir(parents=True)
        (path / "result.json").write_text(json.dumps(planned(run.config)))
    directory.write_results()
    return tmp_path / "S"


def command(*flags) -> int:
    return cli.main(["sweep", *map(str, flags)])


def refused(capsys, *flags) -> str:
    capsys.readouterr()
    assert command(*flags) == 2
    err = capsys.readouterr().err
    assert err.startswith("sae-jax sweep: error: ") and err.count("\n") == 1
    return err


def rows(sweep) -> list[dict]:
    return list(csv.DictReader((sweep / "results.csv").read_text().splitlines()))


def contents(sweep) -> dict[str, bytes]:
    """All files of the runs, by their paths."""
    files = [file for file in (sweep / "runs").rglob("*") if file.is_file()]
    return {str(file.relative_to(sweep)): file.read_bytes() for file in files}


@pytest.mark.slow
def test_the_directory_alone_resumes(sweep, done, tmp_path):
    victim = SweepDirectory(sweep).runs[0]
    shutil.rmtree(sweep / "runs" / victim.id)
    (sweep / "results.csv").unlink()
    assert command(f"--workdir={sweep}", "--config.mesh.data=1") == 0
    assert (sweep / "results.csv").read_bytes() == (done / "results.csv").read_bytes()
    assert_same_arrays(*(saved_arrays(s / "runs" / victim.id) for s in (sweep, done)))


@pytest.mark.slow
def test_a_larger_grid_goes_on_from_what_is_done(sweep, store, tmp_path, capsys):
    file = write_sweep(tmp_path / "large.py", store, LARGE)
    before = contents(sweep)
    flags = [f"--config={file}", f"--workdir={sweep}", "--extend"]
    assert command(*flags, "--dry_run") == 0
    assert "5 runs one by one" in capsys.readouterr().out
    assert command(*flags) == 0
    after = contents(sweep)
    assert {name: after[name] for name in before} == before
    assert [row["status"] for row in rows(sweep)] == ["done"] * 9
    names = [row["name"] for row in rows(sweep)]
    assert names[:2] == ["tokens=1920,seed=0", "tokens=1920,seed=1"] and len(set(names)) == 9
    new = {SweepDirectory(sweep).name(r): r for r in SweepDirectory(sweep).runs if r.round}
    assert set(new) == {
        *("tokens=1920,seed=2", "tokens=2560,seed=2"),
        *(f"tokens=5120,seed={seed}" for seed in range(3)),
    }
    file = write_sweep(tmp_path / "long.py", store, BUDGETS.format([5120], 2))
    assert command(f"--config={file}", f"--workdir={tmp_path / 'long'}") == 0
    for name, begins in (("tokens=5120,seed=1", False), ("tokens=5120,seed=2", True)):
        run = sweep / "runs" / new[name].id
        config = json.loads((run / "config.json").read_text())
        assert ("lineage" in config) != begins
        if not begins:
            assert config["lineage"][0]["step"] == 32
            assert_same_arrays(saved_arrays(run), saved_arrays(tmp_path / "long/runs" / run.name))
    assert command(*flags) == 0, "and again, it changes nothing"
    assert contents(sweep) == after
    assert command(f"--workdir={sweep}") == 0
    assert contents(sweep) == after


@pytest.mark.slow
def test_several_larger_and_smaller_budgets_share_a_trunk_again(sweep, store, tmp_path):
    """The trunk goes on from where the smallest new budget leaves it, or before."""
    file = write_sweep(
        tmp_path / "more.py", store, BUDGETS.format([1280, 1920, 2560, 5120, 7680], 2)
    )
    assert command(f"--config={file}", f"--workdir={sweep}", "--extend") == 0
    new = {SweepDirectory(sweep).name(r): r.id for r in SweepDirectory(sweep).runs if r.round}
    assert len(new) == 6
    file = write_sweep(tmp_path / "whole.py", store, BUDGETS.format([1280, 5120, 7680], 2))
    assert command(f"--config={file}", f"--workdir={tmp_path / 'whole'}") == 0
    for run_id in new.values():
        found = saved_arrays(sweep / "runs" / run_id)
        assert_same_arrays(found, saved_arrays(tmp_path / "whole" / "runs" / run_id))


def test_a_grid_that_leaves_out_what_has_begun(pretended, store, tmp_path, capsys):
    before = contents(pretended), (pretended / "sweep.json").read_bytes()
    file = write_sweep(tmp_path / "other.py", store, BUDGETS.format([2560, 5120], 3))
    err = refused(capsys, f"--config={file}", f"--workdir={pretended}", "--extend")
    assert "leaves out 2 runs" in err and "tokens=1920,seed=0 (done)" in err and "--drop" in err
    assert (contents(pretended), (pretended / "sweep.json").read_bytes()) == before


def test_a_run_is_dropped(pretended, store, tmp_path, capsys):
    before = rows(pretended)
    run = SweepDirectory(pretended).runs[2]
    assert command(f"--workdir={pretended}", "--drop=seed=0,tokens=2560") == 0
    said, name = capsys.readouterr().out, "tokens=2560,seed=0"
    assert f"dropped {name} ({run.id}): what it had is in {pretended / 'dropped' / run.id}" in said
    assert f"--restore={name} brings it back, --rerun={name} trains it again" in said
    err = refused(capsys, f"--workdir={pretended}", f"--drop={name}")
    assert f"{name} ({run.id}) is dropped already; --restore={name} or --rerun={name}" in err
    assert rows(pretended) == [row for row in before if row["run_id"] != run.id]
    assert (pretended / "dropped" / run.id / "result.json").is_file()
    file = write_sweep(tmp_path / "small.py", store, SMALL)
    assert command(f"--config={file}", f"--workdir={pretended}") == 0, "it stays dropped"
    assert len(rows(pretended)) == 3
    capsys.readouterr()
    assert command(f"--config={file}", f"--workdir={pretended}", "--extend", "--dry_run") == 0
    assert f"was dropped and stays so: {name}; --restore=RUN" in capsys.readouterr().out


def test_a_dropped_run_comes_back_as_it_was(pretended, capsys):
    before = contents(pretended), (pretended / "sweep.json").read_bytes(), rows(pretended)
    run = SweepDirectory(pretended).runs[2]
    assert "no run of it is dropped" in refused(capsys, f"--workdir={pretended}", "--restore=x")
    shutil.copytree(pretended / "runs" / run.id, pretended / "dropped" / run.id)
    (pretended / "dropped" / run.id / "result.json").unlink()  # of a time before
    for number in (1, 2):  # and again
        assert command(f"--workdir={pretended}", f"--drop={run.id}") == 0
        assert (pretended / "dropped" / f"{run.id}-2" / "result.json").is_file(), number
        assert command(f"--workdir={pretended}", "--restore=tokens=2560") == 0
        assert f"restored tokens=2560,seed=0 ({run.id}): done" in capsys.readouterr().out
        after = contents(pretended), (pretended / "sweep.json").read_bytes(), rows(pretended)
        assert after == before
    other = SweepDirectory(pretended).runs[0]
    (pretended / "runs" / other.id / "result.json").unlink()
    assert command(f"--workdir={pretended}", f"--drop={other.id}") == 0
    err = refused(capsys, f"--workdir={pretended}", f"--restore={other.id}")
    assert "had not ended when it was dropped" in err and "--rerun=tokens=1920,seed=0" in err
    err = refused(
        capsys, f"--workdir={pretended}", "--restore=seed=0", "--rerun=tokens=1920,seed=0"
    )
    assert "two of --drop, --rerun and --restore name tokens=1920,seed=0" in err


@pytest.fixture
def named(store, tmp_path):
    """A sweep whose runs have several fields in their names."""
    runs = grid.product(
        grid.sweep("sae.architecture", ["topk", "batchtopk"]),
        grid.sweep("sae.k", [2, 8]),
        grid.sweep("train.tokens", [3200, 6400]),
        grid.sweep("train.seed", [1, 10]),
    )
    return SweepDirectory.start(tmp_path / "S", expand(make_config(store, steps=40), runs))


@pytest.mark.parametrize("text,name", [
    ("architecture=topk,k=8,tokens=3200,seed=1", "architecture=topk,k=8,tokens=3200,seed=1"),
    ("seed=1 k=8,tokens=3_200,architecture=topk", "architecture=topk,k=8,tokens=3200,seed=1"),
    ("train.seed=10,sae.k=2,tokens=6.4e3,architecture=topk",
     "architecture=topk,k=2,tokens=6400,seed=10"),
    ("architecture=topk,k=2,tokens=3200,seed=10", "architecture=topk,k=2,tokens=3200,seed=10"),
    ("architecture=topk,k=2,tokens=3200,se", "'architecture=topk,k=2,tokens=3200,se' means 2"),
    ("architecture=topk", "means 8 runs .* and 4 more; name one"),
    ("k=2,architecture=topk,tokens=4000,seed=1", "of tokens there are 3200, 6400$"),
    ("k=8,architecture=topk,tokens=9000,seed=1", "of tokens there are 6400, 3200$"),
    ("k=2,architecture=topk,tokens=3200,seed=2", "of seed there are 1, 10$"),
    ("arch=topk,k=2,tokens=3200,seed=1", "differ in no 'arch', but in architecture, k, tokens"),
    ("architecture=topk,k=2,tokns=3200,seed=1",
     "did you mean 'architecture=topk,k=2,tokens=3200,seed=1'"),
    ("architecture=tpk,k=2,tokens=3200,seed=1",
     "did you mean 'architecture=topk,k=2,tokens=3200,seed=1'"),
    ("architecture=tpk,k=2,tokens=4000,seed=1", "of architecture there are topk, batchtopk$"),
    ("batchtopk", "did you mean 'architecture=batchtopk', with other fields"),
    ("faild", "did you mean 'failed'"),
    ("!", "a run is named as in architecture=topk,k=2,tokens=3200,seed=1, or by its id"),
])  # fmt: skip
def test_what_a_name_means(named, text, name):
    """The run that has all that is said; never another one in its place."""
    if name.startswith("architecture"):
        assert [named.name(run) for run in run_names.find(named, [text], named.runs)] == [name]
        return
    with pytest.raises(UserError, match=name):
        run_names.find(named, [text], named.runs)


def test_the_beginning_of_a_name_ends_within_no_number(named):
    tens = [run for run in named.runs if run.config.train.seed == 10]
    of_ten = [run for run in tens if named.name(run).startswith("architecture=topk,k=8,tokens=64")]
    (found,) = run_names.find(named, ["architecture=topk,k=8,tokens=6400,se"], of_ten)
    assert found == of_ten[0]
    with pytest.raises(UserError, match="of seed there is 10$"):
        run_names.find(named, ["architecture=topk,k=8,tokens=6400,seed=1"], of_ten)


def test_no_run_is_taken_for_the_one_that_was_named(store, tmp_path):
    """Where a name is another's beginning, or its run is none of those that are asked for."""
    swept = [
        {"sae.architecture": "topk", "sae.d_sae": 64},
        {"sae.architecture": "relu_l1_unit", "sae.d_sae": 64},
        {"sae.architecture": "topk", "sae.d_sae": 128, "sae.k": 3},
        {"sae.architecture": "topk", "sae.d_sae": 128},
    ]
    runs = expand(make_config(store, steps=40), swept)
    directory = SweepDirectory.start(tmp_path / "S", runs)
    wide = next(run for run in directory.runs if directory.name(run).endswith("d_sae=128"))
    others = [run for run in directory.runs if run != wide]
    for text in (directory.name(wide), wide.id, "architecture=relu", "d_sae=64,d_sae=128",
                 wide.id[:3]):  # fmt: skip
        with pytest.raises(UserError):
            run_names.find(directory, [text], others)
    assert run_names.find(directory, [wide.id[:4]], directory.runs) == [wide]


def test_a_drop_that_was_cut_short_is_mended_by_restoring(pretended):
    run = SweepDirectory(pretended).runs[2]
    before = contents(pretended)
    assert command(f"--workdir={pretended}", f"--drop={run.id}") == 0
    begun = pretended / "runs" / run.id  # trained again, dropped, and killed before the move
    begun.mkdir()
    (begun / "metrics.jsonl").write_text("")
    assert command(f"--workdir={pretended}", f"--restore={run.id}") == 0
    assert contents(pretended) == before


def test_a_run_that_had_not_ended_is_not_said_to_come_back(pretended, capsys):
    run = SweepDirectory(pretended).runs[2]
    (pretended / "runs" / run.id / "result.json").unlink()
    assert command(f"--workdir={pretended}", f"--drop={run.id}") == 0
    said = capsys.readouterr().out
    assert "--restore" not in said and f"--rerun={SweepDirectory(pretended).name(run)}" in said


def test_budgets_that_begin_anew_are_told(store, tmp_path, capsys):
    """With warm-ups that are parts of the runs they do, and with as many steps they go on."""
    body = "return [{{'train.tokens': 1920}}{}]"
    more = ", {'train.tokens': 5120}"
    file = write_sweep(tmp_path / "small.py", store, body.format(""))
    directory = SweepDirectory.start(tmp_path / "S", load(file, {}))
    path = directory.run_path(directory.runs[0])
    path.mkdir(parents=True)
    (path / "result.json").write_text(json.dumps(planned(directory.runs[0].config)))
    flags = [f"--workdir={tmp_path / 'S'}", "--extend", "--dry_run"]

    def said(file: str) -> str:
        assert command(f"--config={file}", *flags) == 0
        return capsys.readouterr().out

    out = said(write_sweep(tmp_path / "large.py", store, body.format(more)))
    assert "1 run one by one" in out and "1 run of the grid, of another budget" in out
    fraction = re.search("with (optimizer.warmup_fraction) ([0-9.]+) it goes on", out)
    given = f", {{'train.tokens': 5120, {fraction[1]!r}: {fraction[2]}}}"
    out = said(write_sweep(tmp_path / "given.py", store, body.format(given)))
    assert "another budget" not in out and "from step 24 of what is done" in out
    assert re.search(r"1 run one by one +3,584 ", out), "80 steps of 64 tokens, but for 24"
    out = said(write_sweep(tmp_path / "cosine.py", store, body.format(
        ", {'train.tokens': 5120, 'optimizer.schedule': 'cosine'}")))  # fmt: skip
    assert "another budget" not in out, "it is another run altogether"


def test_a_dry_run_lists_what_is_left(pretended, store, tmp_path, capsys):
    assert command(f"--workdir={pretended}", "--dry_run") == 0
    assert capsys.readouterr().out == (
        f"4 of 4 runs of {pretended} have ended; nothing is left to train\n"
    )
    run = SweepDirectory(pretended).runs[1]
    shutil.rmtree(pretended / "runs" / run.id)
    file = write_sweep(tmp_path / "small.py", store, SMALL)
    for flags in ([], [f"--config={file}"]):
        assert command(f"--workdir={pretended}", "--dry_run", *flags) == 0
        out = capsys.readouterr().out
        assert f"3 of 4 runs of {pretended} have ended" in out
        assert re.findall("^    [0-9a-f]{16}  .*seed", out, re.M) == [
            f"    {run.id}  tokens=1920,seed"
        ]
        assert re.search(r"1 run one by one +1,920 ", out)


def test_a_change_that_would_make_runs_begin_anew_is_refused(store, tmp_path, capsys):
    """Without seed 0, seed 1 would come into the pass of seed 2, which stopped at another step."""
    file = write_sweep(tmp_path / "small.py", store, "return grid.sweep('train.seed', range(4))")
    directory = SweepDirectory.start(tmp_path / "S", load(file, {}), 2)
    for run in directory.runs:
        directory.run_path(run).mkdir(parents=True)
        (directory.run_path(run) / "config.json").write_text("{}")
    before = (tmp_path / "S" / "sweep.json").read_bytes()
    assert "begin anew" in refused(capsys, f"--workdir={tmp_path / 'S'}", "--drop=seed=0")
    assert (tmp_path / "S" / "sweep.json").read_bytes() == before


@pytest.mark.slow
def test_what_failed_and_what_was_dropped_is_done_again(sweep, done):
    failed, dropped = SweepDirectory(sweep).runs[1:3]
    path = sweep / "runs" / failed.id
    (path / "result.json").unlink()
    (path / "failed.json").write_text("{}\n")
    assert command(f"--workdir={sweep}", f"--drop={dropped.id}") == 0
    assert command(f"--workdir={sweep}", "--rerun=failed", f"--rerun={dropped.id[:6]}") == 0
    assert (sweep / "dropped" / failed.id / "failed.json").is_file()
    assert [row["status"] for row in rows(sweep)] == ["done"] * 4
    for run in (failed, dropped):
        got, want = (saved_arrays(s / "runs" / run.id) for s in (sweep, done))
        for name in want:
            np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_runs_begin_at_a_checkpoint(done, store, tmp_path):
    """A sweep of learning rates from one checkpoint of a run."""
    run = SweepDirectory(done).runs[2]
    start = done / "runs" / run.id / "checkpoints" / "20"
    body = "return grid.sweep('optimizer.learning_rate', [1e-3, 1e-4])"
    file = write_sweep(tmp_path / "rates.py", store, body, branch_from=str(start))
    assert command(f"--config={file}", f"--workdir={tmp_path / 'S'}") == 0
    for row in rows(tmp_path / "S"):
        assert row["branched_from"] == str(start) and row["status"] == "done"
        branch = tmp_path / "S" / "runs" / row["run_id"]
        assert [line["step"] for line in metrics(branch)] == [*range(5, 41, 5)]
        assert metrics(branch)[:4] == metrics(done / "runs" / run.id)[:4]
        assert json.loads((branch / "config.json").read_text())["lineage"][0]["run_id"] == run.id


@pytest.mark.parametrize("flags,words", [
    (["--rerun=failed"], ["has failed"]),
    (["--rerun=seed=0"], ["'seed=0' means 2 runs", "tokens=1920,seed=0 (", "more of its fields"]),
    (["--drop=zzz"], ["no run 'zzz'", "as in tokens=1920,seed=0"]),
    (["--drop=tokens=1920,seed=0", "--rerun=seed=0,tokens=1920"], ["two of --drop, --rerun and"]),
    (["--drop=tokens=1920,seed=0", "--rerun=zzz"], ["no run 'zzz'"]),
    (["--extend"], ["--config"]),
    (["--config.sae.k=3"], ["sae.k", "mesh"]),
    (["--config=x.py", "--drop=a"], ["leave out --config"]),
    (["--passes=2"], ["--passes=1, not 2"]),
])  # fmt: skip
def test_mistakes(pretended, capsys, flags, words):
    before = contents(pretended), (pretended / "sweep.json").read_bytes()
    err = refused(capsys, f"--workdir={pretended}", *flags)
    for word in words:
        assert word in err
    assert (contents(pretended), (pretended / "sweep.json").read_bytes()) == before


def test_while_a_worker_is_at_it_no_run_is_taken_away(pretended, capsys):
    with Leases(pretended / "leases", 60).claim("pass-x"):
        err = refused(capsys, f"--workdir={pretended}", "--drop=tokens=1920,seed=0")
    assert "works on" in err and "SIGTERM" in err


def test_names_are_short_and_differ():
    rates = grid.sweep("optimizer.learning_rate", [1e-3, 3e-4])
    seeds = grid.zipped(grid.sweep("train.seed", [0, 1]), grid.sweep("data.seed", [5, 6]))
    made = grid.product(grid.sweep("sae.k", [8]), rates, seeds)
    assert grid.names(made) == [
        f"learning_rate={rate},seed={seed}" for rate in ("0.001", "0.0003") for seed in (0, 1)
    ]
    assert grid.names(grid.sweep("data.site", ["a b", "a/b"])) == ["site=a_b.0", "site=a_b.1"]
    assert grid.names([{}]) == ["base"]
    both = grid.product(grid.sweep("train.seed", [0, 1]), grid.sweep("data.seed", [0, 1]))
    assert grid.names(both)[1] == "train.seed=0,data.seed=1"
