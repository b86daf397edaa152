"""Processes of one program that were not started alike, and programs that want one directory."""

import concurrent.futures
import dataclasses

import pytest
from training import command, finish_all, launch, make_config, sparse_rows, start, together

from sae_jax import paths
from sae_jax.activations import write_store
from sae_jax.config import Config, MeshConfig
from sae_jax.errors import UserError
from sae_jax.sweep.directory import SweepDirectory, expand
from sae_jax.train.directory import RunDirectory, read_config

WORLD = "world:orthonormal,width=16,features=16"
OTHER_VERSION = """
import importlib.metadata
version = importlib.metadata.version
importlib.metadata.version = lambda name: "9.9.9" if name == "optax" else version(name)
from sae_jax.cli import entry
raise SystemExit(entry())
"""


def by_two(workdirs, configs, code: str | None = None) -> list[tuple[int, str]]:
    """(exit code, stderr) of two processes; `code` is what the second runs instead of sae-jax."""
    flags = together(2)
    configs = [dataclasses.replace(each, mesh=MeshConfig(data=2)) for each in configs]
    commands = [command(workdirs[i], configs[i], *flags[i]) for i in range(2)]
    if code:
        commands[1][1:3] = ["-c", code]
    return [(code, err) for code, _, err in finish_all(list(map(launch, commands)))]


def assert_both_say(ends, *words: str) -> None:
    for code, err in ends:
        last = err.splitlines()[-1]
        assert code == 2 and "Traceback" not in err, err
        for word in words:
            assert word in last


def changed(config: Config, **fields) -> Config:
    optimizer = dataclasses.replace(config.optimizer, **fields)
    return dataclasses.replace(config, optimizer=optimizer)


@pytest.mark.slow
def test_another_config(tmp_path):
    """Both trained in silence, each with its own learning rate, on gradients of both."""
    config = make_config(WORLD)
    configs = [changed(config, learning_rate=1e-3), changed(config, learning_rate=2e-3)]
    ends = by_two([tmp_path / "run"] * 2, configs)
    said = (
        "process 1 (on ",
        "another config than process 0",
        "optimizer.learning_rate: 0.001 -> 0.002",
    )
    assert_both_say(ends, *said)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_another_version(tmp_path):
    ends = by_two([tmp_path / "run"] * 2, [make_config(WORLD)] * 2, OTHER_VERSION)
    assert_both_say(ends, "process 1 (on ", "versions.optax: ", "-> '9.9.9'")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1], ids=["moved", "another"])
def test_a_store_at_another_place(tmp_path, seed):
    """A copy is the same store, and other rows are another one, wherever they lie."""
    configs = []
    for i, number in enumerate((0, seed)):
        write_store(tmp_path / str(i), [sparse_rows(4096, number)], context_length=8)
        configs.append(make_config(str(tmp_path / str(i)), steps=3))
    ends = by_two([tmp_path / "run"] * 2, configs)
    if seed:
        assert_both_say(ends, "process 1 (on ", "another store than process 0", "fingerprint: ")
    else:
        assert [code for code, _ in ends] == [0, 0], ends


@pytest.mark.slow
def test_a_directory_that_is_not_shared(tmp_path):
    """They hung in Orbax's barriers for 20 minutes."""
    ends = by_two([tmp_path / "one", tmp_path / "two"], [make_config(WORLD)] * 2)
    assert_both_say(ends, "process 1 (on ", "does not see what process 0", "one --workdir")


# ------------------------------------------------------------ two programs, one directory


def test_a_file_is_created_by_one_of_many(tmp_path):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda i: paths.create(tmp_path / "f", str(i), f".{i}"), range(8)))
    assert sum(made) == 1 and (tmp_path / "f").read_text() == str(made.index(True))


def test_a_file_is_created_where_there_are_no_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    assert paths.create(tmp_path / "f", "one", ".a")
    assert not paths.create(tmp_path / "f", "two", ".b")
    assert (tmp_path / "f").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize("same", [True, False])
def test_two_programs_that_find_no_run_at_one_instant(tmp_path, monkeypatch, same):
    """The second has looked when the first makes the directory; both were accepted."""
    first = make_config(WORLD)
    second = first if same else changed(first, learning_rate=2e-3)
    create = paths.create

    def another_is_faster(file, data, by):
        monkeypatch.undo()
        RunDirectory(tmp_path / "run", first)
        return create(file, data, by)

    monkeypatch.setattr(paths, "create", another_is_faster)
    if same:
        RunDirectory(tmp_path / "run", second)
    else:
        with pytest.raises(UserError, match="learning_rate: None -> 0.002"):
            RunDirectory(tmp_path / "run", second)
    assert read_config(tmp_path / "run") == first


@pytest.mark.parametrize("same", [True, False])
def test_two_sweeps_that_find_none_at_one_instant(tmp_path, monkeypatch, same):
    grids = [[{"sae.k": 2}], [{"sae.k": 2 if same else 3}]]
    first, second = (expand(make_config(WORLD), grid) for grid in grids)
    create = paths.create

    def another_is_faster(file, data, by):
        monkeypatch.undo()
        SweepDirectory.start(tmp_path / "S", first)
        return create(file, data, by)

    monkeypatch.setattr(paths, "create", another_is_faster)
    if same:
        SweepDirectory.start(tmp_path / "S", second)
    else:
        with pytest.raises(UserError, match="another grid"):
            SweepDirectory.start(tmp_path / "S", second)
    assert [run.config.sae.k for run in SweepDirectory(tmp_path / "S").runs] == [2]


@pytest.mark.slow
def test_two_commands_at_one_instant(tmp_path):
    """Of different configs one is refused, and the other one's run is whole."""
    config = make_config(WORLD, steps=3)
    configs = [changed(config, learning_rate=rate) for rate in (1e-3, 2e-3)]
    ends = finish_all([start(tmp_path / "run", each) for each in configs])
    assert sorted(code for code, _, _ in ends) == [0, 2], ends
    loser = next(i for i, end in enumerate(ends) if end[0] == 2)
    assert "holds a run of another config" in ends[loser][2]
    assert read_config(tmp_path / "run").optimizer == configs[1 - loser].optimizer


def test_a_sweep_is_not_put_among_other_files(tmp_path):
    runs = expand(make_config(WORLD), [{"sae.k": 2}])
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="holds no sweep .*thesis.tex.; give --workdir a new"):
        SweepDirectory.start(tmp_path, runs)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
