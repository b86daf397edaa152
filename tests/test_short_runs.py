"""What a run is too short for is said: before it, by field, and at its end, of its target L0."""

import csv
import itertools

import numpy as np
import pytest
from training import BATCH, make_config, make_store

import sae_jax
from sae_jax import cli
from sae_jax.activations import open_stream
from sae_jax.config import assign, override
from sae_jax.sweep import dry_run, grid
from sae_jax.sweep.directory import expand
from sae_jax.train import preparation, results, short_runs
from sae_jax.train.run import train_run
from sae_jax.train.schedule_steps import dead_after_tokens

WORLD = "world:superposition,width=16,features=64"
LONG = 4000  # steps


def doubts(architecture: str = "topk", steps: int = LONG, **fields) -> dict[str, str]:
    config = assign(make_config(WORLD, architecture, steps), fields)
    return short_runs.doubts(preparation.resolve(config, open_stream(config.data)))


@pytest.mark.parametrize(
    "architecture,steps,fields,field,words",
    [
        ("relu", 400, {}, "optimizer.learning_rate", ["5e-05", "0.02", "400 steps", "0.00025"]),
        ("relu", 400, {"sae.target_l0": 4.0, "optimizer.learning_rate": 2e-4},
         "optimizer.learning_rate", ["moves no parameter", "0.08", "0.0025 or more, or to none"]),
        ("topk", 97, {"optimizer.learning_rate": 1e-3}, "optimizer.learning_rate",
         ["learning_rate 0.001 moves no parameter by more than 0.097", "set it to 0.0011 or more"]),
        ("topk", 20, {}, "optimizer.warmup_fraction", ["0.02", "20 steps", "does not warm up"]),
        ("topk", LONG, {"optimizer.decay_fraction": 0.0}, "optimizer.decay_fraction",
         ["never decays", "linear_tail"]),
        ("relu", 50, {"sae.target_l0": 4.0}, "sae.target_l0", ["rarely reached in 50 steps"]),
        ("topk", LONG, {"sae.k_start": 9}, "sae.k_start", ["9 is k for one step only"]),
        ("topk", 5, {"sae.k_start": 100, "sae.k_anneal_fraction": 1.0}, "sae.k_anneal_fraction",
         ["sae.k 2 is reached 0 steps before the end of 5"]),
        ("relu", LONG, {"sae.p_end": 0.5, "sae.p_anneal_start": 1.0}, "sae.p_anneal_start",
         ["does not come to sae.p_end 0.5", "now 1, lower"]),
        ("relu", 9, {}, "sae.sparsity_warmup_fraction", ["whole from the first step on"]),
        ("topk", 9, {"sae.dead_after_tokens": 10**7}, "sae.dead_after_tokens",
         ["10000000", f"{9 * BATCH} tokens", "AuxK does nothing", "null", "leave it out"]),
        ("topk", 100, {"sae.resample_every_tokens": 40 * BATCH}, "sae.resample_every_tokens",
         ["4 resamplings, of which 2 are"]),
    ],
)  # fmt: skip
def test_what_a_run_is_too_short_for(architecture, steps, fields, field, words):
    found = doubts(architecture, steps, **fields)
    for word in words:
        assert word in found[field]
    assert "\n" not in found[field]


@pytest.mark.parametrize(
    "architecture,fields",
    [
        ("topk", {"sae.k_start": 100, "sae.k_anneal_fraction": 0.5}),
        ("topk", {"sae.resample_every_tokens": 40 * BATCH}),
        ("relu", {"sae.p_end": 0.5, "sae.target_l0": 4.0}),
        ("jumprelu", {"sae.target_l0": 4.0}),
        ("gated", {"sae.sparsity_warmup_fraction": 1.0}),
    ],
)
def test_a_run_that_is_long_enough_is_not_doubted(architecture, fields):
    assert doubts(architecture, **fields) == {}


def test_doubts_of_a_sweep_are_one_line_for_each_field():
    base = assign(make_config(WORLD, steps=100), {"sae.dead_after_tokens": 10**7})
    runs = expand(base, grid.sweep("train.tokens", [100 * BATCH, 10**6 * BATCH, 200 * BATCH]))
    (line,) = dry_run.doubts(runs)
    said = f"2 of 3 runs, such as train.tokens={100 * BATCH}: sae.dead_after_tokens 10000000 is no"
    assert line.startswith(said)
    (line,) = dry_run.doubts(runs[:1])
    assert line.startswith("1 of 1 run: sae.dead_after_tokens 10000000 is no less than")


# -------------------------------------------------------------------------- targets


@pytest.mark.parametrize("architecture", ["relu", "jumprelu", "gated"])
def test_the_learning_rate_to_a_target_follows_the_length_of_the_run(architecture):
    def rate(steps, **fields):
        config = assign(make_config(WORLD, architecture, steps), fields)
        return preparation.resolve(config, open_stream(config.data)).optimizer.learning_rate

    target = {"sae.target_l0": 4.0}
    long = rate(10**6)
    assert rate(500) == long == rate(10**6, **target)  # without a target it is the architecture's
    assert rate(4000, **target) == pytest.approx(1e-3)
    assert rate(20, **target) == pytest.approx(0.1 / 16**0.5)  # of a row of 16, a tenth a step
    assert rate(500, **target | {"optimizer.learning_rate": 1e-5}) == 1e-5


@pytest.mark.slow
def test_a_target_that_is_missed_is_said(tmp_path, capsys, caplog):
    """In result.json, in a warning, and of a sweep in results.csv and its status."""
    file = tmp_path / "sweep.py"
    config = make_config(make_store(tmp_path / "store"), "relu", 8, train={"log_every": 4})
    file.write_text(
        "from sae_jax import config\nfrom sae_jax.sweep import grid\n"
        f"def get_config(): return config.from_dict({sae_jax.config.to_dict(config)!r})\n"
        "def get_sweep(): return grid.product(\n"
        "    grid.sweep('sae.target_l0', [2.0, None]),\n"
        "    grid.sweep('optimizer.learning_rate', [1e-5]))\n"
    )
    assert cli.main(["sweep", f"--config={file}", f"--workdir={tmp_path / 'sweep'}"]) == 0
    said = capsys.readouterr().out
    assert "1 run missed the target L0:" in said and "sae.target_l0=2: sae.target_l0 is 2" in said
    assert "2 of 2 runs, such as sae.target_l0=2 optimizer.learning_rate=1e-05: " in caplog.text
    assert "optimizer.learning_rate 1e-05 moves no parameter" in caplog.text
    assert "sae.target_l0 is 2, but the run ended at" in caplog.text
    with open(tmp_path / "sweep" / "results.csv") as text:
        missed, without = csv.DictReader(text)
    assert float(missed["target_l0"]) == 2 and float(missed["eval_l0"]) > 3
    assert (missed["target_reached"], missed["coefficient_at_limit"]) == ("False", "True")
    assert "its coefficient is at a limit, 2e+04" in missed["warnings"]
    assert without["target_reached"] == without["target_l0"] == ""
    assert "ended at" not in without["warnings"]


# ------------------------------------------------------------------- dead latents


@pytest.mark.parametrize(
    "tokens,window", [(100, BATCH), (10**6, 125_000), (8 * 10**7, 10**7), (10**10, 10**7)]
)
def test_the_window_of_dead_latents_is_a_part_of_the_run(tokens, window):
    config = override(
        make_config(WORLD), {"train.tokens": str(tokens), "sae.dead_after_tokens": "none"}
    )
    assert dead_after_tokens(config) == window
    resolved = preparation.resolve(config, open_stream(config.data))
    assert resolved.sae.dead_after_tokens == window


def test_the_runs_of_a_sweep_have_one_window():
    base = assign(make_config(WORLD), {"sae.dead_after_tokens": None})
    budgets = grid.sweep("train.tokens", [8000, 80_000])
    windows = [run.config.sae.dead_after_tokens for run in expand(base, budgets)]
    assert windows == [1000, 1000]
    given = grid.chain(budgets, [{"train.tokens": 800, "sae.dead_after_tokens": 7000}])
    windows = [run.config.sae.dead_after_tokens for run in expand(base, given)]
    assert windows == [1000, 1000, 7000]


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture", ["topk", pytest.param("batchtopk", marks=pytest.mark.long)]
)
def test_dead_latents_on_held_out_rows(tmp_path, architecture):
    """As the SAE's latents say, in the result, in Python and from the command line, where the run
    itself could not know."""
    store = make_store(tmp_path / "store")
    config = make_config(store, architecture, 12, sae={"dead_after_tokens": 10**6})
    recorder = train_run(config, tmp_path / "run")
    assert recorder.result["dead_fraction"] is None
    assert {line["dead_fraction"] for line in recorder.read_lines()} == {None}
    sae = sae_jax.load(tmp_path / "run")

    def never_fire(batch: int) -> np.ndarray:
        """On held-out rows in batches, of which a last part of one is left out."""
        heldout = open_stream(config.data, "heldout", batch)
        rows = np.concatenate(list(itertools.islice(heldout.batches(), heldout.steps_per_epoch)))
        return np.flatnonzero(~(np.asarray(sae.encode(rows)) > 0).any(axis=0))

    dead = sae_jax.dead_latents(tmp_path / "run")
    again = sae_jax.dead_latents(tmp_path / "run", store=store)  # of the same held-out rows
    np.testing.assert_array_equal(again, dead)
    np.testing.assert_array_equal(dead, never_fire(8))
    assert recorder.result["eval_dead_fraction"] == pytest.approx(len(never_fire(BATCH)) / 128)
    assert 0 < len(dead) < 128
    assert cli.main(["eval", f"--run={tmp_path / 'run'}"]) == 0
    written = (tmp_path / "run" / "eval_dead_latents.txt").read_text().split()
    assert [int(index) for index in written] == dead.tolist()


def test_lines_of_metrics_say_when_dead_latents_are_known():
    """Dead after 2 batches, so that the third step is the first that can have one."""
    config = preparation.resolve(config := make_config(WORLD), open_stream(config.data))
    lines = [results.metrics_line(config, step, {"dead_fraction": 0.0}, None) for step in (1, 2, 3)]
    assert [line["dead_fraction"] for line in lines] == [None, None, 0.0]
