"""Grids: what the combinators make, what the papers' designs hold fixed, what is refused."""

import dataclasses
import itertools
import math

import jax
import numpy as np
import pytest

from sae_jax.config import Config
from sae_jax.errors import UserError
from sae_jax.sae import ARCHITECTURES, MatryoshkaConfig, ReLUConfig, TopKConfig
from sae_jax.sweep import grid
from sae_jax.train import controls, optimizer
from sae_jax.train.schedule_steps import ScheduleSteps

KS = grid.sweep("sae.k", [8, 16])
SEEDS = grid.sweep("train.seed", range(3))
RATES = grid.sweep("optimizer.learning_rate", np.geomspace(1e-4, 1e-2, 3))


def test_product_has_every_combination_in_order():
    got = grid.product(KS, SEEDS, RATES)
    want = itertools.product([8, 16], range(3), [1e-4, 1e-3, 1e-2])
    fields = ["sae.k", "train.seed", "optimizer.learning_rate"]
    assert [list(run) for run in got] == [fields] * 18
    np.testing.assert_allclose([list(run.values()) for run in got], list(want))
    assert grid.product(KS) == KS
    assert grid.product(grid.product(KS, SEEDS), RATES) == got, "associative"


def test_zipped_and_chain():
    assert grid.zipped(SEEDS, RATES)[1] == SEEDS[1] | RATES[1]
    assert len(grid.zipped(SEEDS, RATES)) == 3
    assert grid.chain(KS, SEEDS) == [*KS, *SEEDS]
    assert grid.fields(grid.chain(SEEDS, grid.product(KS, RATES))) == [
        "train.seed",
        "sae.k",
        "optimizer.learning_rate",
    ]


def test_values_have_the_types_of_the_config():
    """NumPy's numbers would not be written as JSON, nor hash to the same run id."""
    (run,) = grid.product(
        grid.sweep("sae.k", np.array([8])),
        grid.sweep("optimizer.learning_rate", [1]),
        grid.sweep("train.tokens", [1e6]),
        grid.sweep("sae.prefix_widths", [[8, 16]]),
    )
    assert {field: type(value) for field, value in run.items()} == {
        "sae.k": int,
        "optimizer.learning_rate": float,
        "train.tokens": int,
        "sae.prefix_widths": tuple,
    }
    config = grid.apply(Config(sae=MatryoshkaConfig(d_sae=16, k=2)), run)
    assert (config.sae.k, config.train.tokens, config.sae.prefix_widths) == (8, 10**6, (8, 16))
    assert config.data == Config().data


@pytest.mark.parametrize(
    "make,words",
    [
        (lambda: grid.sweep("sae.d_sea", [1]), ["'sae.d_sea'", "did you mean 'sae.d_sae'"]),
        (lambda: grid.sweep("k", [1]), ["unknown field 'k'"]),
        (lambda: grid.sweep("sae.k", [8, 1.5]), ["sae.k", "whole", "1.5"]),
        (lambda: grid.sweep("sae.k", ["8"]), ["sae.k", "'8'"]),
        (lambda: grid.sweep("sae.k", [float("nan")]), ["sae.k", "nan"]),
        (lambda: grid.sweep("sae.k", []), ["sae.k", "no values"]),
        (lambda: grid.sweep("sae.k", [8, 8.0]), ["sae.k=8", "twice"]),
        (lambda: grid.sweep("mesh.model", [1, 2]), ["mesh.model", "where"]),
        (lambda: grid.product(KS, SEEDS, KS), ["sae.k", "set twice", "8"]),
        (lambda: grid.zipped(SEEDS, SEEDS), ["train.seed", "set twice"]),
        (lambda: grid.zipped(SEEDS, KS), ["same length", "[3, 2]"]),
        (lambda: grid.chain(KS, grid.sweep("sae.k", [32, 16])), ["sae.k=16", "twice"]),
        (
            lambda: grid.isoflop([1e6], [64], d_in=8, batch_size=64),
            ["1e+06", "d_sae 64", "larger budgets"],
        ),
        (lambda: grid.learning_rates(KS, 1e-3, at=64), ["sae.d_sae", "sae.k=8"]),
        (lambda: grid.sparsity_frontier({"topkk": [1]}), ["'topkk'", "did you mean 'topk'"]),
        (
            lambda: grid.budgets([640], batch_size=64, warmup_tokens=640),
            ["640 tokens", "warm-up of 10"],
        ),
    ],
)
def test_mistakes_are_named(make, words):
    with pytest.raises(UserError) as error:
        make()
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("d_out", [None, 48])
def test_runs_of_one_isoflop_budget_cost_the_same(d_out):
    wanted = [2e12, 1e13]
    runs = grid.isoflop(wanted, [512, 1024, 4096], d_in=64, d_out=d_out, batch_size=256)
    assert len(runs) == 6
    for run, budget in zip(runs, np.repeat(wanted, 3), strict=True):
        assert run["train.tokens"] % 256 == 0
        flops = 6 * run["sae.d_sae"] * (64 + (d_out or 64)) * run["train.tokens"]
        assert flops == pytest.approx(budget, rel=5e-3)


def test_learning_rates_follow_one_over_root_n():
    sizes = grid.product(grid.sweep("sae.d_sae", [256, 1024]), grid.sweep("train.tokens", [10**5]))
    got = grid.learning_rates(sizes, 4e-3, at=256, factors=[0.5, 1, 2])
    assert [run["sae.d_sae"] for run in got] == [256] * 3 + [1024] * 3
    np.testing.assert_allclose(
        [run["optimizer.learning_rate"] for run in got], [2e-3, 4e-3, 8e-3, 1e-3, 2e-3, 4e-3]
    )
    assert all(run["train.tokens"] == 10**5 for run in got)


def test_a_frontier_sets_what_each_architecture_has():
    """Over a base of any architecture: what it set for its own sparsity is taken back."""
    got = grid.sparsity_frontier({"topk": [16, 32], "relu": [2, 5], "batchtopk": [16]})
    for run in got:
        sae = grid.apply(Config(sae=TopKConfig(k=7, d_sae=64)), run).sae
        assert type(sae) is ARCHITECTURES[sae.architecture].Config and sae.d_sae == 64
        assert (sae.k is not None) == (sae.architecture != "relu")
        assert (sae.sparsity_coefficient is not None) == (sae.architecture == "relu")
    assert len(got) == 5


@pytest.mark.slow
def test_budgets_are_one_run_until_the_smaller_one_decays():
    """Learning rate and sparsity coefficient of the real schedules agree, step by step."""
    tokens = [64_000, 200_000, 640_000, 6_400_000]
    runs = grid.budgets(
        tokens,
        batch_size=64,
        warmup_tokens=6_400,
        decay_fraction=0.25,
        sparsity_warmup_tokens=3_200,
    )
    relu = Config(sae=ReLUConfig())
    base = grid.apply(relu, {"optimizer.learning_rate": 1e-3, "sae.sparsity_coefficient": 5.0})
    longest = grid.apply(base, runs[-1])
    for budget, run in zip(tokens, runs, strict=True):
        config, steps = grid.apply(base, run), budget // 64
        stable = steps - round(0.25 * steps)
        at = np.arange(stable)
        rates = [
            jax.vmap(
                optimizer.schedule(c.optimizer, ScheduleSteps.from_config(c, c.train.tokens // 64))
            )(at)
            for c in (config, longest)
        ]
        np.testing.assert_array_equal(*rates)
        assert rates[0][98] < 1e-3 and rates[0][99] == pytest.approx(1e-3), "warm-up of 100 steps"
        last = optimizer.schedule(config.optimizer, ScheduleSteps.from_config(config, steps))(
            steps - 1
        )
        assert last < 0.1 * 1e-3, "decayed"
        coefficients = [
            jax.vmap(
                lambda step, c=c: (
                    controls.controls_at(
                        c.sae, step, ScheduleSteps.from_config(c, c.train.tokens // 64), 0.0, None
                    ).coefficient
                )
            )(at)
            for c in (config, longest)
        ]
        np.testing.assert_array_equal(*coefficients)
        assert coefficients[0][48] < 5.0 == coefficients[0][49], "warm-up of 50 steps"
        assert math.isclose(config.optimizer.warmup_fraction * steps, 100)
    assert len({dataclasses.astuple(grid.apply(base, run)) for run in runs}) == 4
