"""Commands run by two processes that are one program do what one process does. (Those of training
and of a sweep are with the other tests of their processes.)"""

import json
import pathlib
import signal
import sys

import pytest
import world
from training import finish_all, launch, together, wait_until

from sae_jax.cli import main
from sae_jax.config import Config, DataConfig, TrainConfig
from sae_jax.sae import TopKConfig
from sae_jax.train.run import train_run

pytestmark = pytest.mark.slow
SITE = "mlp_act.0"


def by_two(arguments: list[str]) -> list[tuple[int, str, str]]:
    program = [sys.executable, "-m", "sae_jax", *arguments]
    return finish_all([launch([*program, *flags]) for flags in together(2)])


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """A model, and the same store harvested by one process and by two; what the two printed."""
    root = tmp_path_factory.mktemp("two")
    world.make_model(root / "model")
    (root / "text.txt").write_text("\n".join(world.TEXTS * 60))
    arguments = ["harvest", f"--model={root / 'model'}", f"--text={root / 'text.txt'}",
                 f"--sites={SITE}", "--context_length=16"]  # fmt: skip
    assert main([*arguments, f"--out={root / 'one'}", "--mesh_data=1"]) == 0
    return root, by_two([*arguments, f"--out={root / 'two'}"])


def test_harvest(stores):
    root, ends = stores
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert "rows to train on" in ends[0][1] and "rows to train on" not in ends[1][1]

    assert contents(root / "two") == contents(root / "one")


def test_harvest_with_one_of_two_killed(tmp_path):
    """Then the other ends too, and both, started again, write what was missing."""
    world.make_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n".join(world.TEXTS * 300))
    arguments = ["harvest", f"--model={tmp_path / 'model'}", f"--text={tmp_path / 'text.txt'}",
                 f"--sites={SITE}", "--context_length=16", "--batch_size=1",
                 "--heartbeat_seconds=2"]  # fmt: skip
    assert main([*arguments, f"--out={tmp_path / 'one'}", "--mesh_data=1"]) == 0
    two = tmp_path / "two"
    program = [sys.executable, "-m", "sae_jax", *arguments, f"--out={two}"]
    processes = [launch([*program, *flags]) for flags in together(2)]
    wait_until(lambda: (two / "written" / "000001.npz").exists(), processes[1])
    processes[1].kill()
    ends = finish_all(processes)
    assert [code for code, _, _ in ends] == [75, -signal.SIGKILL], ends
    assert not json.loads((two / "meta.json").read_text())["complete"]
    ends = by_two([*arguments, f"--out={two}"])
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert contents(two) == contents(tmp_path / "one")


def contents(store: pathlib.Path) -> dict[str, bytes]:
    files = (path for path in store.rglob("*") if path.is_file())
    return {str(path.relative_to(store)): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    "data",
    ["store", pytest.param("world:orthonormal,width=16,features=16", marks=pytest.mark.long)],
)
def test_eval(stores, tmp_path, data):
    root, _ = stores
    where = {"store": data}
    if data == "store":
        where = {"store": str(root / "one"), "site": SITE, "epochs": 9}
    config = Config(
        sae=TopKConfig(d_sae=128, k=4),
        data=DataConfig(**where, batch_size=256, holdout_fraction=0.3),
        train=TrainConfig(tokens=256 * 10),
    )
    run = tmp_path / "run"
    train_run(config, run)
    model = [f"--model={root / 'model'}"] if data == "store" else []
    arguments = ["eval", f"--run={run}", "--tokens=20000", *model]
    assert main([*arguments, f"--out={tmp_path / 'one.json'}"]) == 0
    ends = by_two([*arguments, f"--out={tmp_path / 'two.json'}"])
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert "explained variance" in ends[0][1] and "explained variance" not in ends[1][1]
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert two["settings"] == one["settings"] and two["rows"] == one["rows"]
    for part in ("reconstruction", "language_model", "recovery"):
        # Differences of cross-entropies that are nearly the same are less sure.
        rel = 1e-2 if part == "language_model" else 1e-5
        numbers = {name: value for name, value in (one[part] or {}).items() if value is not None}
        assert (one[part] is None) == (two[part] is None)
        assert {name: two[part][name] for name in numbers} == pytest.approx(numbers, rel=rel), part
    assert two["sparsity"]["density_histogram"] == one["sparsity"]["density_histogram"]
