"""What an evaluation and a run write: read back, and refused in words where it is damaged."""

import json

import numpy as np
import pytest

from sae_jax.errors import UserError
from sae_jax.evaluate import figures, report
from sae_jax.evaluate.metrics import RowMetrics

STEP = {"step": 1, "tokens": 64, "fvu": None, "l0": 3.0, "dead_fraction": 0.0, "lr": 1e-3}


@pytest.fixture
def saved(tmp_path):
    scalars = dict.fromkeys(report._ROWS, 0.5) | {"fvu": float("nan")}
    arrays = [np.arange(3.0), np.ones(3), np.ones(3), np.ones(2), np.ones(1)]
    spliced = {"ce_clean": 1.5, "replaced": 1234, "predicted": 1200}
    found = report.Evaluation({"rows": "r", "positions": "all"}, RowMetrics(7, scalars, *arrays),
                              spliced)  # fmt: skip
    report.save(found, tmp_path / "eval.json")
    return tmp_path / "eval.json"


def test_an_evaluation_is_read_back(saved):
    found = report.load(saved)
    assert np.isnan(found.rows.scalars["fvu"]) and found.rows.scalars["l0"] == 0.5
    assert found.spliced == {"ce_clean": 1.5, "replaced": 1234, "predicted": 1200}
    assert "1,234 positions replaced" in found.table()


@pytest.mark.parametrize(
    "change",
    [
        "", "{", "[]", "null", "[" * 100_000, '{"rows": 1' + "0" * 5000 + "}", "\\xff\\xfe",
        {"rows": "7"}, {"reconstruction": {"fvu": "x"}}, {"reconstruction": {}}, {"settings": 3},
        {"sites": []}, {"language_model": []}, {"recovery": {"mcc": 1.0}},
    ],
    ids=lambda change: str(change)[:30],
)  # fmt: skip
def test_a_damaged_evaluation_is_refused(saved, change):
    values = json.loads(saved.read_text())
    text = json.dumps(values | change) if isinstance(change, dict) else change
    saved.write_text(text)
    with pytest.raises(UserError, match="eval") as refused:
        report.load(saved)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", [None, b"", b"PK", b"no archive", 0.5])
def test_damaged_arrays_are_refused(saved, content):
    file = report.latents_file(saved)
    whole = file.read_bytes()
    file.unlink()
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else whole[: int(len(whole) / 2)])
    with pytest.raises(UserError, match="no eval_latents.npz|eval_latents.npz .*damaged"):
        report.load(saved)


def test_metrics_without_the_line_that_a_kill_cut(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text(json.dumps(STEP) + "\n" + json.dumps(STEP)[:20])
    assert figures.read_metrics(file) == [STEP]


@pytest.mark.parametrize(
    "line", ["{", "[]", "null", "[" * 100_000, json.dumps(STEP | {"lr": "x"}), '{"tokens": 1}']
)
def test_metrics_that_are_none_are_refused(tmp_path, line):
    file = tmp_path / "metrics.jsonl"
    file.write_text(json.dumps(STEP) + "\n" + line + "\n")
    with pytest.raises(UserError, match="metrics.jsonl, line 2"):
        figures.training_curves(file)
