"""What a notebook types: `train`, `evaluate` and the names of `sae_jax`, for any data."""

import ast
import dataclasses
import importlib
import inspect
import pathlib

import ml_dtypes
import numpy as np
import pytest
from training import WIDTH, sparse_rows

import sae_jax
from sae_jax import lm
from sae_jax.config import Config, DataConfig, MeshConfig, TrainConfig
from sae_jax.errors import UserError

ROWS, BATCH = 768, 64
SMALL = Config(
    data=DataConfig(batch_size=BATCH, virtual_shards=8, holdout_fraction=0.2),
    train=TrainConfig(log_every=1, checkpoint_every=4),
    mesh=MeshConfig(data=1, model=1),
)
LONG = DataConfig(batch_size=4096, holdout_fraction=0.1, window_rows=65_536)
every_architecture = pytest.mark.parametrize("name", sae_jax.ARCHITECTURES)


@pytest.fixture(scope="module")
def rows():
    return sparse_rows(ROWS)


def make(name="topk", **fields):
    """A small SAE of an architecture."""
    cls = sae_jax.ARCHITECTURES[name]
    picks = {"k": 3} if cls.Config.k is not None else {}
    return cls(**({"d_in": WIDTH, "d_sae": 32} | picks | fields))


def train(sae, data, **options):
    return sae_jax.train(sae, data, **({"config": SMALL} | options))


def assert_same(one, other):
    assert one.sae.scale == other.sae.scale
    for name, value in one.sae.parameters().items():
        np.testing.assert_array_equal(other.sae.parameters()[name], value, err_msg=name)


def timeless(lines):
    return [{n: v for n, v in line.items() if n != "tokens_per_second"} for line in lines]


def one_line(error) -> str:
    text = str(error.value)
    assert text and "\n" not in text
    return text


# ------------------------------------------------------------------------------- train


@every_architecture
def test_array_store_and_path_are_the_same_training(name, rows, tmp_path):
    sae = make(name)
    before = {n: np.asarray(v) for n, v in sae.parameters().items()}
    of_array = train(sae, rows)
    store = sae_jax.write_store(tmp_path / "store", [rows])
    of_path = train(sae, str(tmp_path / "store"), workdir=tmp_path / "run")
    assert_same(of_array, of_path)
    assert timeless(of_array.metrics) == timeless(of_path.metrics)
    assert of_array.result["eval_loss"] == of_path.result["eval_loss"]
    if name == "topk":
        assert_same(of_array, train(sae, store))
    loaded = sae_jax.load(tmp_path / "run")
    np.testing.assert_array_equal(loaded.encode(rows[:9]), of_array.sae.encode(rows[:9]))

    assert of_array.workdir is None and of_path.workdir == str(tmp_path / "run")
    assert of_array.metrics[-1]["loss"] < of_array.metrics[0]["loss"]
    for parameter, value in before.items():
        np.testing.assert_array_equal(sae.parameters()[parameter], value)
    assert of_array.sae.encode(rows[0]).shape == (32,)
    assert of_array.sae.scale != 1, "activations are given in the model's own units"


def test_other_shapes_of_the_same_rows(rows):
    torch = pytest.importorskip("torch")
    sae, whole = make(), train(make(), rows)
    assert_same(whole, train(sae, [rows[:500], rows[500:]]))
    assert_same(whole, train(sae, (rows[i : i + 100] for i in range(0, ROWS, 100))))
    assert_same(whole, train(sae, torch.from_numpy(rows)))
    assert_same(whole, train(sae, rows.tolist()))
    of_config = train(sae.config, rows)
    np.testing.assert_allclose(of_config.metrics[-1]["loss"], whole.metrics[-1]["loss"], rtol=1e-5)
    assert_same(whole, train(sae, rows, seed=0, epochs=1, batch_size=BATCH))


def test_a_generator_that_does_not_end():
    made = []

    def batches():
        for seed in range(1000):
            made.append(seed)
            yield sparse_rows(10_000, seed, width=4)

    sae = sae_jax.ReLU(d_in=4, d_sae=8)
    config = dataclasses.replace(SMALL, data=LONG)
    result = sae_jax.train(sae, batches(), tokens=80_000, config=config)
    assert result.result["tokens"] == 80_000 // 4096 * 4096
    assert len(made) < 20, "it is read no further than needed"
    for options, why in (({}, "tokens="), ({"tokens": 10**5, "epochs": 2}, "epochs")):
        with pytest.raises(UserError, match=why) as error:
            sae_jax.train(sae, batches(), config=config, **options)
        one_line(error)


def test_sites(rows):
    data = {"a": rows, "b": rows[:, :10] * 3}
    crossed = train(sae_jax.TopK(kind="crosscoder", site_widths=(16, 10), d_sae=32, k=3), data)
    assert crossed.config.data.site == "a,b"
    assert crossed.sae.encode(np.hstack(list(data.values()))).shape == (ROWS, 32)
    coder = sae_jax.TopK(kind="transcoder", d_in=16, d_out=10, d_sae=32, k=3)
    trained = train(coder, data)
    assert (trained.config.data.site, trained.config.data.target_site) == ("a", "b")
    assert trained.sae(rows[:5]).shape == (5, 10)
    assert trained.sae.scale != trained.sae.target_scale
    assert sae_jax.evaluate(trained.sae, data).rows.rows == ROWS
    with pytest.raises(UserError, match="reads one site, but got 2") as error:
        train(make(), data)
    one_line(error)


def test_interrupted_and_resumed(rows, tmp_path):
    seen = []

    def stop(line):
        seen.append(line["step"])
        if line["step"] == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(make(), rows, workdir=tmp_path / "run", on_metrics=stop)
    resumed = train(make(), rows, workdir=tmp_path / "run")
    whole = train(make(), rows)
    assert seen == [1, 2, 3, 4, 5, 6]
    assert_same(whole, resumed)
    assert timeless(whole.metrics) == timeless(resumed.metrics)
    finished = train(make(), rows, workdir=tmp_path / "run")
    assert_same(whole, finished)
    with pytest.raises(UserError, match="another|differ") as error:
        train(make(k=4), rows, workdir=tmp_path / "run")
    assert "k" in one_line(error)
    with pytest.raises(UserError, match="another|differ") as error:
        train(make(), rows[::-1], workdir=tmp_path / "run")
    one_line(error)


def test_on_metrics_and_extra_loss(rows):
    first, second, terms = [], [], []

    def extra(sae, x, y):
        terms.append((x.shape, y.shape))
        return 0.5 * (sae.b_dec[...] ** 2).sum() + 1.0

    result = train(make(), rows, on_metrics=[first.append, second.append], extra_loss=extra)
    assert first == second == result.metrics
    assert terms[0] == ((BATCH, WIDTH), (BATCH, WIDTH))
    assert result.metrics[0]["extra_loss"] >= 1


def test_defaults():
    """Without a config batches and lines of metrics are of a number that suits the rows."""
    rows = sparse_rows(400)
    result = sae_jax.train(make(), rows, epochs=3)
    data = result.config.data
    assert data.batch_size == 16 and data.holdout_fraction == 0.05
    steps = (400 - 20) * 3 // 16
    assert steps - 4 <= result.metrics[-1]["step"] <= steps
    assert 0 < result.result["eval_fvu"]
    again = sae_jax.train(result.sae, rows, tokens=64.0, learning_rate=1e-6)
    assert again.result["tokens"] == 64 and again.config.optimizer.learning_rate == 1e-6
    assert again.metrics[0]["fvu"] < result.metrics[0]["fvu"], "it starts where it ended"


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16, np.int32])
def test_types_of_numbers(rows, dtype):
    data = (rows * 10).astype(dtype)
    result = train(make(), data, tokens=4 * BATCH)
    assert np.isfinite(result.result["eval_loss"])
    assert result.sae.w_enc.dtype == np.float32


WRONG = {
    "three axes": (lambda x: x[None], "(rows, width)"),
    "one axis": (lambda x: x[0], "(rows, width)"),
    "words": (lambda x: x.astype(str), "numbers"),
    "no rows": (lambda x: x[:0], "no rows"),
    "too few rows": (lambda x: x[:1], "fewer than one batch"),
    "another width": (lambda x: x[:, :5], "16"),
    "no activations": (lambda x: 3, "int"),
    "nothing": (lambda x: None, "NoneType"),
    "a path to nowhere": (lambda x: "no/such/store", "no/such/store"),
    "an empty list": (lambda x: [], "rows"),
    "widths that differ": (lambda x: [x, x[:, :3]], "width"),
    "sites of other lengths": (lambda x: {"a": x, "b": x[:9]}, "rows"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_data(what, rows):
    change, said = WRONG[what]
    with pytest.raises(UserError) as error:
        sae_jax.train(make(), change(rows))
    assert said in one_line(error)


def test_rows_that_are_not_finite(rows):
    broken = rows.copy()
    broken[[5, 9], 3] = np.nan, np.inf
    with pytest.raises(UserError, match="NaN") as error:
        train(make(), broken)
    one_line(error)
    data = dataclasses.replace(SMALL.data, drop_nonfinite=True)
    result = train(make(), broken, config=dataclasses.replace(SMALL, data=data))
    assert np.isfinite(result.result["eval_loss"])


def test_wrong_settings(rows):
    for call, said in (
        (lambda: sae_jax.TopK(d_in=16, dsae=32), "d_sae"),
        (lambda: sae_jax.TopK(d_in=16, d_sae=32, k="three"), "sae.k"),
        (lambda: train("topk", rows), "str"),
        (lambda: train(sae_jax.TopK, rows), "TopK"),
        (lambda: train(make(), rows, tokens=10**9), "epochs"),
        (lambda: train(make(), rows, tokens=1), "batch"),
        (lambda: train(make(), rows, tokens="all"), "tokens"),
        (lambda: train(make(), rows, batch_size=0), "batch"),
        (lambda: train(make(), rows, epochs=0), "epochs"),
        (lambda: train(make(), rows, learning_rate="high"), "learning_rate"),
        (lambda: train(make(), rows, holdout_fraction=2.0), "holdout"),
        (lambda: train(make(), "world:superposition"), "tokens="),
    ):
        with pytest.raises(UserError) as error:
            call()
        assert said in one_line(error), one_line(error)


# ---------------------------------------------------------------------------- evaluate


def test_evaluate(rows, tmp_path):
    sae = train(make(), rows).sae
    whole = sae_jax.evaluate(sae, rows)
    assert whole.rows.rows == ROWS
    centred = np.square(rows - rows.mean(axis=0)).sum()
    fvu = np.square(rows - np.asarray(sae(rows))).sum() / centred
    assert whole.scalars["fvu"] == pytest.approx(fvu, rel=1e-4)
    assert repr(whole) == whole.table() and "Positions: all" in repr(whole)
    by_site = sae_jax.evaluate(sae, {"a": rows}).scalars
    assert by_site == whole.scalars
    store = sae_jax.write_store(tmp_path / "store", [rows])
    held = sae_jax.evaluate(sae, store=store, holdout_fraction=0.2)
    assert held.rows.rows < ROWS
    of_path = sae_jax.evaluate(sae, store=str(tmp_path / "store"), holdout_fraction=0.2)
    assert of_path.scalars == held.scalars
    for wrong, said in (
        ({}, "none"),
        ({"data": rows, "store": store}, "store"),
        ({"data": rows[:, :3]}, "16"),
        ({"token_ids": [[1, 2]]}, "model"),
        ({"store": "nowhere"}, "nowhere"),
        ({"data": np.full((3, 16), np.nan)}, "excluded"),
    ):
        with pytest.raises(UserError) as error:
            sae_jax.evaluate(sae, **wrong)
        assert said in one_line(error), one_line(error)


def test_evaluate_inside_a_model():
    model = lm.open_model(lm.DEMO_MODEL)
    token_ids = np.random.default_rng(0).integers(1, model.vocab_size, (4, 16))
    sae = sae_jax.TopK(d_in=512, d_sae=64, k=4)
    found = sae_jax.evaluate(sae, token_ids=token_ids, model=lm.DEMO_MODEL, site="mlp_act.0")
    assert found.scalars["ce_spliced"] > 0 and found.spliced["replaced"] == 64
    with pytest.raises(UserError, match="whole numbers") as error:
        sae_jax.evaluate(sae, token_ids=token_ids / 2, model=model, site="mlp_act.0")
    one_line(error)


# ------------------------------------------------------------------------------- names


def test_every_name_is_what_the_editor_is_told():
    importlib.import_module("sae_jax.train.loop")
    importlib.import_module("sae_jax.evaluate.api")
    assert inspect.isfunction(sae_jax.train) and inspect.isfunction(sae_jax.evaluate)
    tree = ast.parse(pathlib.Path(sae_jax.__file__).read_text())
    (block,) = [
        node
        for node in tree.body
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    ]
    told = set()
    for statement in block.body:
        module = importlib.import_module(statement.module)
        for alias in statement.names:
            assert getattr(sae_jax, alias.name) is getattr(module, alias.name), alias.name
            told.add(alias.name)
    rooms = set(sae_jax.__all__) - told
    for name in rooms:
        assert getattr(sae_jax, name) is importlib.import_module(f"sae_jax.{name}")
    assert told < set(sae_jax.__all__) <= set(dir(sae_jax))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = sae_jax.trian


def test_what_a_notebook_shows(rows, tmp_path):
    assert repr(make()) == str(make()) == "TopK(d_in=16, d_sae=32, k=3)"
    assert repr(make("relu", scale=0.5)) == "ReLU(d_in=16, d_sae=32, scale=0.5)"
    coder = make(kind="transcoder", d_out=8)
    assert repr(coder) == "TopK(d_in=16, d_sae=32, kind='transcoder', d_out=8, k=3)"
    result = train(make(), rows, tokens=4 * BATCH)
    assert repr(result).startswith("TrainResult(TopK(d_in=16") and "eval_fvu" in repr(result)
    store = sae_jax.write_store(tmp_path / "store", [rows])
    assert "768 rows of activations (16, float32)" in repr(store)
