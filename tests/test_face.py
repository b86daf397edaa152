"""What a notebook types: `sae_jax.train`, `evaluate`, `save`, `load`, on data of every kind."""

import ast
import dataclasses
import importlib
import itertools
import json
import pathlib
import sys
import types

import jax
import ml_dtypes
import numpy as np
import pytest
from training import assert_same_arrays, saved_arrays, sparse_rows

import sae_jax
from sae_jax import lm
from sae_jax.activations.iterables import IterableData
from sae_jax.sae import ARCHITECTURES

ROWS = sparse_rows(6000)
QUICK = {"batch_size": 64, "tokens": 64 * 12}
FACE = pathlib.Path(sae_jax.__file__)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Most notebooks have one; the tests' process has four."""
    monkeypatch.setattr(jax, "devices", lambda *_: jax.local_devices()[:1])


def fresh(architecture="topk", **fields):
    if ARCHITECTURES[architecture].Config.k is not None:
        fields = {"k": 4} | fields
    return ARCHITECTURES[architecture](d_in=16, d_sae=64, **fields)


MARKS = {"topk": (), "relu": pytest.mark.slow, "jumprelu": pytest.mark.slow}


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(name, marks=MARKS.get(name, pytest.mark.long)) for name in ARCHITECTURES],
)
def test_every_architecture_on_an_array(architecture, tmp_path):
    lines = []
    sae = fresh(architecture)
    before = sae.parameters()
    result = sae_jax.train(sae, ROWS, **QUICK, on_metrics=lines.append)
    assert lines == result.metrics and lines[-1]["step"] == 12
    assert result.config.data.batch_size == 64 and result.result["tokens"] == 64 * 12
    assert np.isfinite(result.result["eval_fvu"]) and result.workdir is None
    window = result.sae.config.dead_after_tokens  # what was given: the run's default is the run's
    assert window is None and result.config.sae.dead_after_tokens == 96
    assert result.sae.config == dataclasses.replace(result.config.sae, dead_after_tokens=window)
    assert not result.sae.is_fresh()
    assert_same_arrays(sae.parameters(), before)  # the one given stays as it is
    x = ROWS[:50]
    mse = np.mean(np.sum((x - result.sae(x)) ** 2, axis=1))
    np.testing.assert_allclose(result.sae.loss(x, training=False).mse, mse, rtol=1e-4)
    result.sae.save(tmp_path / "mine")
    again = sae_jax.load(tmp_path / "mine")
    np.testing.assert_array_equal(again.encode(x), result.sae.encode(x))
    assert sae_jax.evaluate(again, x).rows.scalars["fvu"] > 0


def test_an_array_is_the_store_that_it_would_make(tmp_path):
    store = sae_jax.write_store(tmp_path / "store", [ROWS])
    options = QUICK | {"holdout_fraction": 0.1, "seed": 3}
    config = sae_jax.Config(data=sae_jax.DataConfig(virtual_shards=8))
    got = [
        sae_jax.train(fresh(), data, config=config, **options)
        for data in (ROWS, list(np.split(ROWS, 3)), store, str(tmp_path / "store"), iter([ROWS]))
    ]
    for other in got[1:]:
        assert_same_arrays(other.sae.parameters(), got[0].sae.parameters())
        assert other.result["eval_loss"] == got[0].result["eval_loss"]


class StopError(Exception):
    pass


@pytest.mark.parametrize("kind", ["array", pytest.param("generator", marks=pytest.mark.slow)])
def test_a_run_on_disk_goes_on_bit_for_bit(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("sae_jax.activations.iterables._MIN_WINDOW_ROWS", 1000)

    def data():
        return ROWS if kind == "array" else (part for part in np.array_split(ROWS, 13))

    def stop(line):
        if line["step"] == 7:
            raise StopError

    data_section = sae_jax.DataConfig(window_rows=1000, virtual_shards=8)
    training = sae_jax.TrainConfig(log_every=1, checkpoint_every=3)
    config = sae_jax.Config(data=data_section, train=training)
    options = QUICK | {"config": config}
    with pytest.raises(StopError):
        sae_jax.train(fresh(), data(), **options, workdir=tmp_path / "cut", on_metrics=stop)
    cut = sae_jax.train(fresh(), data(), **options, workdir=tmp_path / "cut")
    whole = sae_jax.train(fresh(), data(), **options, workdir=tmp_path / "whole")
    assert_same_arrays(saved_arrays(tmp_path / "cut"), saved_arrays(tmp_path / "whole"))
    assert [line["loss"] for line in cut.metrics] == [line["loss"] for line in whole.metrics]
    finished = sae_jax.train(fresh(), data(), **options, workdir=tmp_path / "cut")
    assert finished.result == cut.result == json.loads((tmp_path / "cut/result.json").read_text())
    in_memory = sae_jax.train(fresh(), data(), **options)
    assert_same_arrays(in_memory.sae.parameters(), whole.sae.parameters())
    with pytest.raises(sae_jax.UserError, match="another config"):
        sae_jax.train(fresh(k=5), data(), **options, workdir=tmp_path / "cut")
    with pytest.raises(sae_jax.UserError, match="another config"):
        sae_jax.train(fresh(), ROWS + 1, **options, workdir=tmp_path / "cut")


def test_a_generator_is_read_once_in_shuffled_windows(monkeypatch):
    monkeypatch.setattr("sae_jax.activations.iterables._MIN_WINDOW_ROWS", 1000)
    rows = np.arange(5000, dtype=np.float32)[:, None] * [1.0, 2.0]
    data = sae_jax.DataConfig(batch_size=100, window_rows=1000, virtual_shards=4)
    source = IterableData(np.array_split(rows, 37), data, tokens=4500)
    stream = source.open_stream(data)
    held = source.open_stream(data, "heldout", 50)
    seen = np.concatenate(list(stream.batches()))
    held = np.concatenate(list(held.batches(prefetch=0)))
    assert len(seen) == 4500 and len(held) == 50
    assert len({*seen[:, 0]} | {*held[:, 0]}) == 4550, "no row twice, none of the held out"
    assert held.max() < 2 * 1000 and not np.array_equal(seen, np.sort(seen, axis=0))
    parts = IterableData(np.array_split(rows, 5), data, 4500).open_stream(data)
    own = np.concatenate(list(parts.batches(20, [slice(0, 10), slice(50, 60)])))
    want = seen.reshape(45, 100, 2)[20:][:, [*range(10), *range(50, 60)]]
    np.testing.assert_array_equal(own, want.reshape(-1, 2))
    endless = IterableData(itertools.repeat(rows[:300]), data, 1500).open_stream(data)
    assert sum(len(batch) for batch in endless.batches()) == 1500
    with pytest.raises(sae_jax.UserError, match="1 wide, those before 2"):
        IterableData(iter([rows[:1000], rows[:9, :1]]), data, 1500)


@pytest.mark.slow
def test_data_of_other_types(tmp_path):
    torch = pytest.importorskip("torch")
    whole = sae_jax.train(fresh(), ROWS, **QUICK)
    for data in (torch.from_numpy(ROWS), jax.numpy.asarray(ROWS), ROWS.astype(np.float64)):
        got = sae_jax.train(fresh(), data, **QUICK)
        assert_same_arrays(got.sae.parameters(), whole.sae.parameters())
    for dtype in (np.float16, ml_dtypes.bfloat16):
        half = sae_jax.train(fresh(), ROWS.astype(dtype), **QUICK)
        assert half.result["eval_fvu"] == pytest.approx(whole.result["eval_fvu"], rel=0.05)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("crosscoder", marks=pytest.mark.slow),
        "transcoder",
        pytest.param("skip_transcoder", marks=pytest.mark.long),
    ],
)
@pytest.mark.slow
def test_several_sites(kind):
    sites = {"a": ROWS, "b": ROWS[:, :8] + 1}
    for sae in (
        sae_jax.TopKConfig(kind=kind, d_sae=64, k=4),
        sae_jax.TopK(kind="crosscoder", d_in=24, site_widths=(16, 8), d_sae=64, k=4)
        if kind == "crosscoder"
        else sae_jax.TopK(kind=kind, d_in=16, d_out=8, d_sae=64, k=4),
    ):
        result = sae_jax.train(sae, sites, **QUICK)
        assert result.sae.config.d_out == (24 if kind == "crosscoder" else 8)
        assert sae_jax.evaluate(result.sae, sites).rows.scalars["fvu"] > 0


@pytest.mark.slow
def test_a_trained_sae_goes_on_and_defaults_fit_the_data():
    first = sae_jax.train(fresh(), ROWS, batch_size=256, learning_rate=3e-3, epochs=8)
    start = sae_jax.train(first.sae, ROWS, batch_size=256, tokens=256, learning_rate=1e-9)
    assert start.metrics[0]["fvu"] == pytest.approx(first.metrics[-1]["fvu"], rel=0.3)
    assert start.metrics[0]["fvu"] < 0.6 * first.metrics[0]["fvu"]
    few = sae_jax.train(sae_jax.TopKConfig(d_sae=64, k=4), ROWS[:200])
    assert few.config.data.batch_size == 8 and few.result["tokens"] > 150


@pytest.mark.slow
def test_few_rows_on_several_devices(monkeypatch):
    """A batch has a row for each device, and an SAE on one of them goes on on all."""
    monkeypatch.undo()
    first = sae_jax.train(fresh(), ROWS[:400], epochs=3)
    assert first.result["devices"] == 4 and first.config.data.batch_size == 16
    start = sae_jax.train(first.sae, ROWS[:400], tokens=64, learning_rate=1e-9)
    assert start.metrics[0]["fvu"] < 0.9 * first.metrics[0]["fvu"]
    fewer = sae_jax.train(fresh(), ROWS[:40], holdout_fraction=0.2)
    assert fewer.config.data.batch_size == 4


@pytest.mark.slow
def test_a_path_is_fitted_like_its_store(tmp_path):
    store = sae_jax.write_store(tmp_path / "store", [ROWS[:500]])
    of_store, of_path = (sae_jax.train(fresh(), data) for data in (store, tmp_path / "store"))
    assert of_path.config.data.batch_size == of_store.config.data.batch_size == 16
    assert_same_arrays(of_path.sae.parameters(), of_store.sae.parameters())


def test_evaluate(tmp_path):
    sae = fresh()
    whole = sae_jax.evaluate(sae, ROWS)
    centred = np.square(ROWS - ROWS.mean(axis=0)).sum()
    fvu = np.square(ROWS - np.asarray(sae(ROWS))).sum() / centred
    assert whole.scalars["fvu"] == pytest.approx(fvu, rel=1e-4) and whole.rows.rows == len(ROWS)
    assert sae_jax.evaluate(sae, {"a": ROWS}).scalars == whole.scalars
    store = sae_jax.write_store(tmp_path / "store", [ROWS])
    held = sae_jax.evaluate(sae, store=store, holdout_fraction=0.2)
    of_path = sae_jax.evaluate(sae, store=str(tmp_path / "store"), holdout_fraction=0.2)
    assert held.rows.rows < len(ROWS) and of_path.scalars == held.scalars
    token_ids = np.random.default_rng(0).integers(1, 100, (4, 16))
    model = {"model": lm.DEMO_MODEL, "site": "mlp_act.0"}
    inside = sae_jax.evaluate(sae_jax.TopK(d_in=512, d_sae=64, k=4), token_ids=token_ids, **model)
    assert inside.spliced["replaced"] == 64 and inside.scalars["ce_spliced"] > 0


def test_what_a_notebook_shows(tmp_path):
    assert repr(fresh()) == str(fresh()) == "TopK(d_in=16, d_sae=64, k=4)"
    assert repr(fresh("relu", scale=0.5)) == "ReLU(d_in=16, d_sae=64, scale=0.5)"
    coder = fresh(kind="transcoder", d_out=8)
    assert repr(coder) == "TopK(d_in=16, d_sae=64, kind='transcoder', d_out=8, k=4)"
    result = sae_jax.train(fresh(), ROWS, **QUICK)
    assert repr(result).startswith("TrainResult(TopK(d_in=16") and "eval_fvu" in repr(result)
    store = sae_jax.write_store(tmp_path / "store", [ROWS])
    assert "6,000 rows of activations (16, float32)" in repr(store)
    evaluation = sae_jax.evaluate(result.sae, ROWS)
    assert repr(evaluation) == evaluation.table() and "Positions: all" in repr(evaluation)


def test_a_notebook_keeps_the_last_line_of_a_bar(monkeypatch):
    shown = []

    class Output:
        def update(self, data, raw):
            shown[-1] = data["text/plain"]

    def display(data, raw, display_id):
        shown.append(data["text/plain"])
        return Output()

    ipython = types.SimpleNamespace(
        get_ipython=type("ZMQInteractiveShell", (), {}),
        display=types.SimpleNamespace(display=display),
    )
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    sae_jax.train(fresh(), ROWS, **QUICK)
    (line,) = shown
    assert line.startswith("train: 100%") and "12/12" in line and "fvu=" in line


def test_an_extra_loss_is_added_and_logged():
    def extra(sae, x, y):
        return 0.5 + 0.0 * x.sum() + 0.0 * y.sum() + 0.0 * sae.b_enc[...].sum()

    plain = sae_jax.train(fresh(), ROWS, **QUICK)
    result = sae_jax.train(fresh(), ROWS, **QUICK, extra_loss=extra)
    assert {line["extra_loss"] for line in result.metrics} == {0.5}
    for line, without in zip(result.metrics, plain.metrics, strict=True):
        assert line["loss"] == pytest.approx(without["loss"] + 0.5, rel=1e-5)


NAN = ROWS.copy()
NAN[7, 3] = np.nan
MISTAKES = [
    (lambda: sae_jax.train("topk", ROWS), "an SAE"),
    (lambda: sae_jax.train(fresh(), 5), "an array"),
    (lambda: sae_jax.train(fresh(), ROWS[0]), "(rows, width)"),
    (lambda: sae_jax.train(fresh(), ROWS[:0]), "no rows"),
    (lambda: sae_jax.train(fresh(), ROWS[:, :15]), "sae.d_in is 16"),
    (lambda: sae_jax.train(fresh(), [["a", "b"]]), "numbers"),
    (lambda: sae_jax.train(fresh(), NAN), "drop_nonfinite"),
    (lambda: sae_jax.train(fresh(), ROWS, tokenz=5), "did you mean 'tokens'"),
    (lambda: sae_jax.train(fresh(), ROWS, tokens="many"), "train.tokens"),
    (lambda: sae_jax.train(fresh(), ROWS, tokens=10**9), "epochs"),
    (lambda: sae_jax.train(fresh(), ROWS, batch_size=0.5), "data.batch_size"),
    (lambda: sae_jax.train(fresh(), ROWS, on_metrics=5), "on_metrics"),
    (lambda: sae_jax.train(fresh(), ROWS, log="wandbb:x"), "wandb"),
    (lambda: sae_jax.train(fresh(), "no_such_store"), "no_such_store"),
    (lambda: sae_jax.train(fresh(), "world:superposition,width=16,features=32"), "tokens="),
    (lambda: sae_jax.train(fresh(), {"a": ROWS, "b": ROWS[:5]}), "same number of rows"),
    (lambda: sae_jax.train(fresh(), [ROWS, ROWS[:, :3]]), "of one width"),
    (lambda: sae_jax.train(fresh(), {"a": ROWS, "b": ROWS}), "reads one site, but got 2"),
    (lambda: sae_jax.train(fresh(), ROWS[:1]), "fewer than one batch"),
    (lambda: sae_jax.evaluate(fresh(), ROWS, store="store"), "data and store"),
    (lambda: sae_jax.evaluate(fresh(), token_ids=[[1, 2]]), "model="),
    (lambda: sae_jax.train(fresh(), iter([ROWS, ROWS[:, :3]])), "wide"),
    (lambda: sae_jax.train(fresh(), iter([])), "no activations"),
    (lambda: sae_jax.evaluate(fresh()), "data=array"),
    (lambda: sae_jax.evaluate(fresh(), ROWS, modell=1), "did you mean 'model'"),
    (lambda: sae_jax.evaluate(fresh(), ROWS[:, :15]), "16"),
    (lambda: sae_jax.load("no/such/folder"), "hf://no/such/folder"),
    (lambda: sae_jax.export(fresh(), "saelenz", "out"), "did you mean 'saelens'"),
]


@pytest.mark.parametrize("call,words", MISTAKES, ids=[words for _, words in MISTAKES])
def test_mistakes_are_one_line(call, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(sae_jax.UserError) as error:
        call()
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_the_names_of_the_face():
    """What an editor is told is what there is; and the functions stay functions."""
    importlib.import_module("sae_jax.train.loop")
    importlib.import_module("sae_jax.evaluate.report")
    assert callable(sae_jax.train) and callable(sae_jax.evaluate)
    told = {}
    (block,) = (node for node in ast.parse(FACE.read_text()).body if isinstance(node, ast.If))
    for node in block.body:
        told |= {alias.name: node.module for alias in node.names}
    for name in sae_jax.__all__:
        value = getattr(sae_jax, name)
        if name in told:
            assert value is getattr(importlib.import_module(told.pop(name)), name)
        else:
            assert value is importlib.import_module(f"sae_jax.{name}")
    assert not told
    with pytest.raises(AttributeError, match="tran"):
        _ = sae_jax.tran


def test_a_generator_cannot_be_read_again_to_resample(monkeypatch):
    monkeypatch.setattr("sae_jax.activations.iterables._MIN_WINDOW_ROWS", 1000)
    config = sae_jax.Config(data=sae_jax.DataConfig(window_rows=1000, virtual_shards=8))
    parts = iter(np.array_split(ROWS, 13))
    with pytest.raises(sae_jax.UserError, match="write_store"):
        sae_jax.train(fresh(resample_every_tokens=128), parts, **QUICK, config=config)
