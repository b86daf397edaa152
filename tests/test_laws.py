"""Scaling laws: known optima, laws recovered from their own data, worlds with a closed form,
intervals that cover, results that identify nothing, and the next run."""

import concurrent.futures
import csv
import dataclasses
import itertools
import json
import multiprocessing
import pathlib

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import scipy.stats

from sae_jax import cli, config
from sae_jax.config import Config, TrainConfig
from sae_jax.laws import fitting, isoflop, predict, results
from sae_jax.laws.estimators import ESTIMATORS, estimate, huber, last_delta, minimise
from sae_jax.laws.frontier import Cost, Frontier
from sae_jax.laws.intervals import bootstrap, profile_intervals, public_intervals
from sae_jax.laws.laws import LAWS
from sae_jax.sae import TopKConfig

CHINCHILLA = pathlib.Path(__file__).parents[2] / "shared/data/fits/chinchilla_replication.csv"
NK = dict(
    alpha=-0.5, beta_k=0.26, beta_n=-0.017, gamma=-0.042, zeta=-1.32, eta=-0.085
)  # the paper's
TRUE = {
    "power": dict(A=50.0, alpha=0.2, E=0.1),
    "chinchilla": dict(A=3.0, alpha=0.35, B=200.0, beta=0.4, E=0.1),
    "openai_nk": NK,
    "joint": NK | dict(B=200.0, delta=0.4),
}
SIZES, TOKENS, KS = 2.0 ** np.arange(9, 14), 1e6 * 4.0 ** np.arange(5), 2.0 ** np.arange(3, 7)


def grid(**axes):
    return dict(
        zip(axes, map(np.array, zip(*itertools.product(*axes.values()), strict=True)), strict=True)
    )


def runs(law, noise=0.0, seed=0, params=None, **axes):
    """Columns of the runs of a grid, with the law's own loss."""
    columns = grid(**axes or DESIGNS[law])
    loss = LAWS[law].log_loss(LAWS[law].internal(params or TRUE[law]), columns)
    noise = noise * np.random.default_rng(seed).standard_normal(len(loss))
    return columns | {"loss": np.exp(loss + noise)}


DESIGNS = {
    "power": dict(flops=1e12 * 2.0 ** np.arange(9)),
    "chinchilla": dict(d_sae=SIZES, tokens=TOKENS),
    "openai_nk": dict(d_sae=SIZES, k=KS),
    "joint": dict(d_sae=SIZES, tokens=TOKENS, k=KS[::2]),
}


def write(path, columns):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path


def fitted(tmp_path, columns, law):
    """fit.json of a file with these columns, but for what the command adds."""
    file = write(tmp_path / "runs.csv", columns)
    rows = results.read(file, fitting.needed_columns(law))
    return fitting.fit(rows, law, fitting.Options(resamples=100)).summary()


def commanded(tmp_path, columns, law, *flags):
    """fit.json of the command on a file with these columns."""
    file = write(tmp_path / "runs.csv", columns)
    out = tmp_path / "fit"
    assert cli.main(["fit", f"--results={file}", f"--law={law}", f"--out={out}", *flags]) == 0
    return json.loads((out / "fit.json").read_text())


def refusal(tmp_path, capsys, columns, law, *flags):
    """The one line that the command says of a file with these columns."""
    file = write(tmp_path / "runs.csv", columns)
    arguments = [f"--results={file}", f"--law={law}", f"--out={tmp_path / 'fit'}", *flags]
    assert cli.main(["fit", *arguments]) == 2
    assert not (tmp_path / "fit").exists()
    (line,) = capsys.readouterr().err.splitlines()
    return line


# Known optima

PUBLISHED = {"alpha": (0.317, 0.373), "beta": (0.331, 0.415), "E": (1.769, 1.871)}  # 95%


@pytest.fixture(scope="module")
def replication():
    if not CHINCHILLA.exists():
        pytest.skip(f"no {CHINCHILLA}")
    names = {"d_sae": "Model Size", "flops": "Training FLOP"}
    rows = results.read(CHINCHILLA, ("d_sae", "tokens"), names, flops_factor=6)
    return rows.without_largest_losses(5)


@pytest.mark.parametrize(
    "estimator, params",
    [
        ("huber", dict(A=477.83, B=2143.42, E=1.81722, alpha=0.347310, beta=0.367172)),
        ("lad", dict(A=482.00, B=2085.39, E=1.81686, alpha=0.34781, beta=0.36585)),
    ],
)
def test_both_optima_of_the_chinchilla_replication(replication, estimator, params):
    """Besiroglu et al. 2024: to the digits that are published."""
    best = estimate(LAWS["chinchilla"], replication.columns, replication.loss, estimator)
    assert len(replication) == 240
    for name, value in params.items():
        digits = len(str(value).partition(".")[2])
        assert best.params[name] == pytest.approx(value, abs=0.6 * 10**-digits), name
    if estimator == "huber":
        assert best.objective == pytest.approx(1.018274e-3, abs=1e-9)


def test_the_replications_uncertainty(replication):
    """The bootstrap's SD of the frontier's exponent a; intervals about as wide as published."""
    values = fitting.fit(replication, "chinchilla", fitting.Options()).summary()
    assert 0.0185 <= values["bootstrap"]["sd"]["d_sae_exponent"] <= 0.0205
    for name, (low, high) in PUBLISHED.items():
        ours = values["ci95"][name]
        assert 0.6 <= (ours[1] - ours[0]) / (high - low) <= 1.4
        assert ours[0] < (low + high) / 2 < ours[1]
    assert values["holdout"]["rms_relative_error"] < 0.02


@pytest.mark.parametrize("law", LAWS)
def test_minima_are_those_of_scipy(law):
    """Of resamples, each from the fit to all runs, as the bootstrap has them."""
    columns = runs(law, noise=0.02)
    loss = columns.pop("loss")
    best = estimate(LAWS[law], columns, loss, "huber")
    problem, delta = best.problem, last_delta("huber")
    start = problem.coordinates(best.theta)[0]
    draws = np.random.default_rng(0).multinomial(len(loss), np.full(len(loss), 1 / len(loss)), 10)
    y = np.broadcast_to(problem.y_N, draws.shape)
    _, ours = minimise(problem, start, draws.astype(float), y, delta)
    for weights, value in zip(draws, ours, strict=True):

        def objective(z, weights=weights):
            residual, shares = problem.residuals(z[None], problem.y_N)
            slope = weights * np.clip(residual[0], -delta, delta)
            gradient = slope @ (shares[0] * problem.features_NxP)
            return 1e6 * (weights * huber(residual[0], delta)).sum(), 1e6 * gradient

        theirs = scipy.optimize.minimize(objective, start, jac=True, method="BFGS").fun / 1e6
        assert value <= theirs * (1 + 1e-6)


# Laws from their own data


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("law", LAWS)
def test_a_law_is_recovered_from_its_own_data(law, estimator):
    columns = runs(law)
    best = estimate(LAWS[law], columns, columns["loss"], estimator)
    assert best.params == pytest.approx(TRUE[law], rel=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_at_any_scale_and_for_other_parameters(seed):
    random = np.random.default_rng(seed)
    scale_n, scale_d, scale_loss = 10.0 ** random.uniform(-6, 12, 3)
    alpha, beta, share = (
        random.uniform(0.1, 1.2),
        random.uniform(0.1, 1.2),
        random.uniform(0.05, 0.6),
    )
    axes = dict(d_sae=scale_n * 3.0 ** np.arange(5), tokens=scale_d * 5.0 ** np.arange(4))
    params = dict(A=scale_loss * scale_n**alpha, alpha=alpha, B=2 * scale_loss * scale_d**beta)
    params |= dict(beta=beta, E=share * scale_loss)
    columns = runs("chinchilla", params=params, **axes)
    best = estimate(LAWS["chinchilla"], columns, columns["loss"], "huber")
    assert best.params == pytest.approx(params, rel=1e-6)


def test_joint_is_chinchilla_at_one_k():
    theta = LAWS["joint"].internal(TRUE["joint"])
    budgets = np.geomspace(1e12, 1e18, 7)
    at_k = Frontier.from_law(LAWS["joint"], theta, Cost(768.0), k=32.0)
    best = at_k.at(budgets)
    loss = LAWS["joint"].log_loss(theta, best | {"k": np.full(7, 32.0)})
    np.testing.assert_allclose(best["loss"], np.exp(loss), rtol=1e-12)


@pytest.mark.parametrize("cost", [Cost(768.0), Cost(128.0, 256 * 64.0)], ids=["12nd", "executed"])
def test_the_frontier_is_the_least_loss_of_a_budget(cost):
    law = LAWS["chinchilla"]
    theta = law.internal(TRUE["chinchilla"])
    best = Frontier.from_law(law, theta, cost).at(np.array([1e15]))
    n = best["d_sae"] * np.exp(np.linspace(-3, 3, 6001))
    loss = np.exp(law.log_loss(theta, {"d_sae": n, "tokens": 1e15 / cost.flops(n, 1)}))
    assert best["loss"][0] == pytest.approx(loss.min(), rel=1e-6)
    assert n[loss.argmin()] == pytest.approx(best["d_sae"][0], rel=2e-3)
    assert cost.flops(best["d_sae"], best["tokens"])[0] == pytest.approx(1e15)


def test_rows_of_one_run_are_drawn_together():
    """Three rows of a run that share their noise are no more than one row."""
    law = LAWS["chinchilla"]
    once = runs("chinchilla", noise=0.01)
    thrice = {name: np.repeat(values, 3) for name, values in once.items()}
    widths = []
    for columns, run in ((once, np.arange(25)), (thrice, np.repeat(np.arange(25), 3))):
        best = estimate(law, columns, columns["loss"], "log_least_squares")
        drawn = bootstrap(best, run, 400)
        low, high = public_intervals(best, drawn)["beta"]
        widths.append(high - low)
    assert widths[1] == pytest.approx(widths[0], rel=0.25)


# Without a floor

FIVE = dict(flops=1e12 * 4.0 ** np.arange(5))


@pytest.mark.parametrize(
    "law, estimator",
    [
        *(("power", name) for name in ESTIMATORS),
        *(pytest.param("chinchilla", name, marks=pytest.mark.slow) for name in ESTIMATORS),
    ],
)
def test_a_floor_that_is_not_there_is_0_with_a_one_sided_interval(law, estimator):
    """Losses that fall as power laws, in draws of noise that no floor explains: E is 0 or more, and
    less than any loss. `filterwarnings = error` says that no number overflows on the way."""
    power = dict(noise=3e-4, seed=0, params=dict(A=1.8, alpha=0.3, E=0.0)) | FIVE
    chinchilla = dict(noise=0.005, seed=1, params=TRUE["chinchilla"] | {"E": 0.0})
    columns = runs(law, **(power if law == "power" else chinchilla))
    rows = results.Results("runs", columns, np.arange(len(columns["loss"])), "loss")
    found = fitting.fit(rows, law, fitting.Options(estimator=estimator, resamples=50)).summary()
    json.dumps(found, allow_nan=False)
    low, high = found["ci95"]["E"]
    assert found["params"]["E"] == low == 0.0 < high < 0.6 * columns["loss"].min()
    (said,) = (w for w in found["warnings"] if "at its bound" in w)
    assert said.startswith("E is at its bound, 0") and f"0 to {high:.4g}" in said
    for name in ("alpha", "A"):
        low, high = found["ci95"][name]
        assert 0 < high - low < 0.2 * found["params"][name]


@pytest.mark.parametrize("true", [0.0, 0.02])
def test_a_floor_is_held_by_its_interval_wherever_it_is(true):
    """At 0 and a little above it, where the data put it at 0 in about half of the repetitions."""
    params, held = TRUE["power"] | {"E": true}, []
    for seed in range(4):
        columns = runs("power", noise=0.005, seed=seed, params=params)
        best = estimate(LAWS["power"], columns, columns["loss"], "log_least_squares")
        low, high = public_intervals(best, bootstrap(best, np.arange(9), 50, seed))["E"]
        assert (low == 0) or best.params["E"] > 0
        held.append(low <= true <= high < columns["loss"].min())
    assert sum(held) >= 3


@pytest.mark.parametrize(
    "seed,estimator,name",
    [(5, "huber", "E"), (3, "log_least_squares", "E"), (7, "log_least_squares", "A")],
)
def test_an_end_is_where_the_lowest_profile_passes_the_threshold(seed, estimator, name):
    """Nine noisy losses of 6.4 to 9.7, whose fits put E at 0.

    The profile of E is flat, then steep, with worse minima beyond; the lowest of A has E in it
    again. Here each point of the profile is the lowest minimum that many starts lead to.
    """
    law = LAWS["chinchilla"]
    n, D = map(np.ravel, np.meshgrid([64.0, 128.0, 256.0], [1e5, 2e5, 4e5]))
    columns, noise = {"d_sae": n, "tokens": D}, np.random.default_rng(seed).normal(size=9)
    losses = (0.3 + 20 / n**0.25 + 60 / D**0.3) * np.exp(0.02 * noise)
    best = estimate(law, columns, losses, estimator)
    assert best.params["E"] == 0.0
    drawn, at = bootstrap(best, np.arange(9), 50, seed), law.parameters.index(name)
    end = profile_intervals(best, drawn)[at, 1]

    size, delta, problem = len(best.theta), last_delta(estimator), best.problem
    centre, starts = law.features(columns).mean(axis=0), []
    for parts in ((0.5, 0.4, 0.1), (0.2, 0.1, 0.7), (0.1, 0.2, 0.7), (0.5, 0.5, 1e-9)):
        for slopes in itertools.product((0.1, 0.6, 1.5), repeat=2):
            theta = np.array([0.0, slopes[0], 0.0, slopes[1], 0.0])
            theta[law.scales] = np.log(losses).mean() + np.log(parts)
            theta[[0, 2]] -= np.array(slopes) * centre[[1, 3]]
            starts.append(theta)
    distances = np.array([0.25, 0.5, 0.75, 0.9, 1.0, 1.1]) * (end - best.theta[at])
    starts = np.tile(starts, (len(distances), 1, 1))
    starts[:, :, at] = (best.theta[at] + distances)[:, None]
    free = scipy.linalg.null_space(problem.to_theta_PxP[[at]])
    z = problem.coordinates(starts.reshape(-1, size))
    y, free = np.broadcast_to(problem.y_N, (len(z), 9)), np.broadcast_to(free, (len(z), 5, 4))
    _, value = minimise(problem, z, 1.0, y, delta, steps=400, free_SxPxQ=free)
    rise = value.reshape(starts.shape[:2]).min(axis=1) - best.objective
    heights = np.sqrt(rise / (0.5 * drawn.scale * scipy.stats.t.ppf(0.975, 9 - size) ** 2))
    assert np.all(heights[:4] < 1) and heights[4] == pytest.approx(1, abs=0.01) and heights[5] > 1


def test_a_term_that_vanishes_with_its_exponent():
    """Losses that do not depend on d_sae: A is at its bound, and alpha says nothing."""
    law = LAWS["chinchilla"]
    columns = runs("chinchilla", params=TRUE["chinchilla"] | {"A": 0.0})
    best = estimate(law, columns, columns["loss"], "log_least_squares")
    assert best.params["B"] == pytest.approx(200, rel=1e-4)
    theta = law.internal(TRUE["chinchilla"]) - np.array([60.0, 0, 0, 0, 0])
    gone = dataclasses.replace(best, theta=theta)
    assert gone.vanished.tolist() == [True, False, False, False, False]
    assert gone.params["A"] == 0.0


def coverage(law, estimator, floor, first, last):
    """Whether each interval of repetitions `first` to `last` held the truth."""
    true, hits = TRUE[law] | ({} if floor is None else {"E": floor}), []
    for seed in range(first, last):
        columns = runs(law, noise=0.005, seed=seed, params=true)
        best = estimate(LAWS[law], columns, columns["loss"], estimator)
        ends = public_intervals(best, bootstrap(best, np.arange(len(columns["loss"])), 60, seed))
        hits.append([ends[name][0] <= value <= ends[name][1] for name, value in true.items()])
    return hits


@pytest.mark.long
@pytest.mark.parametrize(
    "law, estimator, floor",
    [
        ("chinchilla", "huber", None),
        ("openai_nk", "log_least_squares", None),
        ("chinchilla", "log_least_squares", None),
        ("power", "huber", None),
        *itertools.product(["power", "chinchilla"], ["huber", "log_least_squares"], [0.0, 0.02]),
    ],
)
def test_intervals_hold_the_truth_as_often_as_they_say(law, estimator, floor):
    """400 noisy repetitions. By chance alone a parameter's rate is off by 1.1%, and those of
    openai_nk, weakly identified by 20 runs, are some 2% low. At its bound E is held 97.5% of the
    time: a floor that is not there cannot be missed from below."""
    parts = [(i * 100, (i + 1) * 100) for i in range(4)]
    spawn = multiprocessing.get_context("spawn")  # JAX's threads do not survive a fork
    with concurrent.futures.ProcessPoolExecutor(2, spawn) as pool:
        jobs = [pool.submit(coverage, law, estimator, floor, *part) for part in parts]
        held = np.array([hit for job in jobs for hit in job.result()]).mean(axis=0)
    print(law, estimator, dict(zip(TRUE[law], held.tolist(), strict=True)))
    highest = 0.97 if floor is None else 0.99
    assert 0.93 <= held.mean() <= highest
    assert ((held >= 0.91) & (held <= highest + 0.01)).all()


# The closed-form world


def world_loss(n, tokens, alpha=0.5, p1=0.5, eta=0.1, features=100_000):
    """Gradient descent on decoupled features of frequencies p1 i^-(1 + alpha): those that the
    dictionary has no room for, and what is left of the others."""
    p = p1 * np.arange(1, features + 1.0) ** -(1 + alpha)
    beyond = p1 / alpha * (features + 0.5) ** -alpha
    left = [
        p[int(a) :].sum() + beyond + (p[: int(a)] * np.exp(-2 * eta * p[: int(a)] * b)).sum()
        for a, b in zip(n, tokens, strict=True)
    ]
    return np.array(left)


@pytest.fixture(scope="module")
def world():
    """Six budgets, each at the sizes, in steps of sqrt 2, around its best one."""
    n, tokens = [], []
    for budget in 1e6 * 4.0 ** np.arange(6):
        sizes = np.round(0.5 * budget**0.4 * 2.0 ** np.arange(-1.5, 2.5, 0.5))
        n += sizes.tolist()
        tokens += (budget / sizes).tolist()
    n, tokens = np.array(n), np.array(tokens)
    return {
        "d_sae": n,
        "tokens": tokens,
        "flops": 768 * n * tokens,
        "loss": world_loss(n, tokens),
    }


def test_the_exact_compute_law_and_who_disagrees_with_it(tmp_path, world):
    """n* ~ C^(1 / (2 + alpha)), L* ~ C^-(alpha / (2 + alpha)), with no floor."""
    values = commanded(tmp_path, world, "isoflop", "--predict_flops=3e12")
    frontier = values["frontier"]
    assert frontier["d_sae_exponent"] == pytest.approx(0.4, abs=0.006)
    assert frontier["tokens_exponent"] == pytest.approx(0.6, abs=0.006)
    assert frontier["loss_exponent"] == pytest.approx(-0.2, abs=0.01)
    (warning,) = (w for w in values["warnings"] if w.startswith("chinchilla disagrees"))
    assert "isoflop" in warning
    assert warning.partition("'")[0] in (tmp_path / "fit/report.html").read_text()
    planned = values["prediction"]
    assert planned["d_sae"] * planned["tokens"] * 768 == pytest.approx(3e12, rel=0.02)
    true = world_loss([planned["d_sae"]], [planned["tokens"]], features=400_000)[0]
    assert planned["loss"] == pytest.approx(true, rel=5e-3)


def test_minima_at_the_edge_are_left_out(tmp_path, world):
    largest = world["flops"].max()
    keep = (world["flops"] < 0.9 * largest) | (world["d_sae"] < np.median(world["d_sae"]) * 4)
    values = fitted(tmp_path, {n: v[keep] for n, v in world.items()}, "isoflop")
    assert values["budgets"][-1]["rejected"]
    assert any("left out" in w and "largest size" in w for w in values["warnings"])
    assert values["frontier"]["d_sae_exponent"] == pytest.approx(0.4, abs=0.01)


def test_sizes_by_tokens_have_isoflop_curves_in_between(tmp_path):
    """A grid whose runs share no budget: each size's curve is interpolated."""
    columns = grid(d_sae=np.round(24 * 2.0 ** np.arange(8)), tokens=1e4 * 3.0 ** np.arange(8))
    columns["loss"] = world_loss(columns["d_sae"], columns["tokens"])
    values = fitted(tmp_path, columns, "isoflop")
    assert "interpolated" in values["how"]
    assert values["frontier"]["d_sae_exponent"] == pytest.approx(0.4, abs=0.02)


# What to doubt


def test_estimators_that_disagree(tmp_path):
    """Two of the largest did not converge: least squares is led astray."""
    columns = runs("chinchilla", noise=0.002)
    columns["loss"][[-1, -3]] *= 1.4
    values = fitted(tmp_path, columns, "chinchilla")
    assert any("estimators disagree" in warning for warning in values["warnings"])


def test_parameters_that_are_weakly_identified(tmp_path):
    """Losses far above their floor do not say where it is."""
    columns = runs("chinchilla", noise=0.02, params=TRUE["chinchilla"] | {"E": 0.02})
    values = fitted(tmp_path, columns, "chinchilla")
    assert any("weakly identified" in warning for warning in values["warnings"])
    quiet = runs("chinchilla", noise=1e-4)
    assert not any("weakly" in w for w in fitted(tmp_path, quiet, "chinchilla")["warnings"])


def test_runs_that_failed_or_died_or_had_a_worse_rate(tmp_path):
    columns = {name: values.astype(str) for name, values in runs("chinchilla").items()}
    columns["lr"] = np.full(25, "0.001")
    columns["status"] = np.full(25, "done")
    columns["dead_fraction"] = np.where(np.arange(25) < 3, "0.7", "0.1")
    extra = {
        "d_sae": ["512.0", "512.0"],
        "tokens": ["1000000.0", "1000000.0"],
        "loss": ["", "99"],
        "lr": ["0.001", "0.5"],
        "status": ["failed", "done"],
        "dead_fraction": ["", "0.1"],
    }
    every = {name: [*values, *extra[name]] for name, values in columns.items()}
    values = fitted(tmp_path, every, "chinchilla")
    assert values["n_points"] == 25
    assert values["params"] == pytest.approx(TRUE["chinchilla"], rel=1e-6)
    said = "\n".join(values["warnings"])
    for part in ("1 of 27 runs are left out", "learning rate", "3 of 25 runs have more than half"):
        assert part in said


def test_the_frontier_of_many_runs_is_their_envelope(tmp_path):
    columns = runs("chinchilla")
    columns["flops"] = 768 * columns["d_sae"] * columns["tokens"]
    values = fitted(tmp_path, columns, "power")
    assert 3 < values["n_points"] < 25
    assert any("compute frontier" in warning for warning in values["warnings"])
    assert values["frontier"]["loss_exponent"] == -values["params"]["alpha"]


# Results that do not do


def chinchilla_with(**changed):
    columns = {name: list(values) for name, values in runs("chinchilla", noise=0.01).items()}
    for name, value in changed.items():
        if value is None:
            del columns[name]
        else:
            columns[name][3] = value
    return columns


def only(condition):
    columns = runs("chinchilla", noise=0.01)
    rows = condition(columns)
    return {name: values[rows] for name, values in columns.items()}


LINE = r", line 5: "
BAD = {
    "nan": (chinchilla_with(loss="nan"), "chinchilla", f"{LINE}loss is nan"),
    "negative": (chinchilla_with(loss=-0.5), "chinchilla", f"{LINE}loss is -0.5"),
    "zero": (chinchilla_with(loss=0), "chinchilla", f"{LINE}loss is 0"),
    "empty": (chinchilla_with(loss=""), "chinchilla", f"{LINE}loss is empty"),
    "text": (chinchilla_with(tokens="many"), "chinchilla", f"{LINE}tokens is 'many'"),
    "no loss": (chinchilla_with(loss=None), "chinchilla", "no column loss or eval_loss"),
    "no tokens": (chinchilla_with(tokens=None), "chinchilla", "no column tokens"),
    "no flops": (chinchilla_with(), "power", "no column flops"),
    "no k": (chinchilla_with(), "openai_nk", "no column k"),
    "one size": (only(lambda c: c["d_sae"] == 512), "chinchilla", "only 512 of d_sae"),
    "one size, isoflop": (
        only(lambda c: c["d_sae"] == 512),
        "isoflop",
        "all its runs are of 1 size",
    ),
    "two sizes": (
        only(lambda c: c["d_sae"] < 2000),
        "chinchilla",
        "at least 3 different dictionary",
    ),
    "together": (
        only(lambda c: c["tokens"] == 1e6 * (c["d_sae"] / 512) ** 2),
        "chinchilla",
        "5 points",
    ),
    "few": (
        only(lambda c: np.isin(np.arange(25), (0, 6, 12, 18, 24, 3))[: len(c["loss"])]),
        "joint",
        "k",
    ),
    "no curves": (only(lambda c: np.arange(25) % 4 == 0), "isoflop", "no isoFLOP curves"),
    "constant": (runs("chinchilla") | {"loss": np.ones(25)}, "chinchilla", "every loss is 1"),
    "no rows": ({name: [] for name in ("d_sae", "tokens", "loss")}, "chinchilla", "no rows"),
}


@pytest.mark.parametrize("columns, law, said", BAD.values(), ids=BAD)
def test_results_that_identify_nothing_are_refused(tmp_path, capsys, columns, law, said):
    assert said in refusal(tmp_path, capsys, columns, law)


def test_d_and_n_that_vary_only_together(tmp_path, capsys):
    columns = {"d_sae": SIZES, "tokens": 20 * SIZES, "loss": 1 / SIZES}
    more = {name: np.concatenate([v, v * 32]) for name, v in columns.items()}
    assert "vary only together" in refusal(tmp_path, capsys, more, "chinchilla")


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--estimator=hubert"], "did you mean 'huber'"),
        (["--loss=eval_fvu"], "--loss is 'eval_fvu'"),
        (["--holdout=25"], "--holdout=25"),
        (["--drop_largest_losses=25"], "leaves nothing"),
        (["--accounting=flops_executed"], "no column flops_executed"),
        (["--predict_flops=-1"], "--predict_flops is -1"),
        (["--config.sae.k=3"], "--predict_flops"),
    ],
)
def test_mistaken_flags_are_refused(tmp_path, capsys, flags, said):
    assert said in refusal(tmp_path, capsys, runs("chinchilla"), "chinchilla", *flags)


def test_a_mistyped_law_is_refused_with_the_nearest(tmp_path, capsys):
    said = refusal(tmp_path, capsys, runs("chinchilla"), "chinchila")
    assert "did you mean 'chinchilla'" in said


# A sweep, and the next run


@pytest.fixture
def sweep(tmp_path):
    """A directory as `sae-jax sweep` leaves it: results.csv, and the runs' configs and results."""
    columns = runs("chinchilla", noise=0.002)
    rows = []
    for i, (n, tokens, loss) in enumerate(zip(*columns.values(), strict=True)):
        sae = TopKConfig(d_sae=int(n), d_in=64, d_out=64, k=8)
        base = config.to_dict(Config(sae=sae, train=TrainConfig(tokens=int(tokens))))
        base["optimizer"]["learning_rate"] = lr = 1e-3 * (n / 512) ** -0.5
        base["data"]["store"] = "stores/a"
        row = dict(run_id=f"run{i}", d_in=64, d_sae=int(n), k=8, lr=lr, tokens=int(tokens))
        row |= dict(flops=768 * int(n) * int(tokens), eval_loss=loss, dead_fraction=0.0)
        row["flops_executed"] = (2 * 64 * int(n) + 8 * 8 * 64) * int(tokens)
        run = tmp_path / "sweep/runs" / row["run_id"]
        run.mkdir(parents=True)
        (run / "config.json").write_text(json.dumps(base | {"environment": {"jax": "1"}}))
        (run / "result.json").write_text(json.dumps(row))
        rows.append(row | {"status": "done"})
    rows.append({name: "" for name in rows[0]} | {"run_id": "lost", "status": "failed"})
    write(tmp_path / "sweep/results.csv", {name: [row[name] for row in rows] for name in rows[0]})
    return tmp_path / "sweep"


def test_a_sweep_plans_its_next_run(tmp_path, sweep, capsys):
    out = tmp_path / "fit"
    flags = [f"--results={sweep}", "--law=chinchilla", f"--out={out}", "--predict_flops=1e16"]
    assert cli.main(["fit", *flags]) == 0
    values = json.loads((out / "fit.json").read_text())
    planned = values["prediction"]
    assert values["loss"] == "eval_loss" and values["n_points"] == 25
    assert values["params"]["alpha"] == pytest.approx(0.35, rel=0.1)
    assert planned["d_sae"] % 64 == 0
    assert 768 * planned["d_sae"] * planned["tokens"] == pytest.approx(1e16, rel=1e-3)
    theta = LAWS["chinchilla"].internal(TRUE["chinchilla"])
    at = {"d_sae": np.array([planned["d_sae"]]), "tokens": np.array([planned["tokens"]])}
    true = np.exp(LAWS["chinchilla"].log_loss(theta, at))[0]
    assert planned["interval"][0] <= true <= planned["interval"][1]
    assert any("times the largest budget" in warning for warning in values["warnings"])

    following = config.load_file(str(out / "next_run.py"))
    assert following.sae.d_sae == planned["d_sae"] and following.sae.k == 8
    assert following.train.tokens == planned["tokens"] // 2048 * 2048
    assert following.data.store == "stores/a"
    rate = 1e-3 * (planned["d_sae"] / 512) ** -0.5
    assert following.optimizer.learning_rate == pytest.approx(rate)

    executed = values["accountings"]["flops_executed"]
    assert executed["flops_per_token"] == pytest.approx({"slope": 128.0, "fixed": 4096.0})
    assert (out / "fit.png").stat().st_size > 20_000
    assert "<svg" in (out / "report.html").read_text()
    assert "warning: " in capsys.readouterr().out


def test_the_prediction_of_every_law_that_has_one():
    rows = {name: runs(name, noise=0.002) for name in ("chinchilla", "joint")}
    for name, columns in rows.items():
        columns["flops"] = 768 * columns["d_sae"] * columns["tokens"]
        run = np.arange(len(columns["loss"]))
        found = fitting.fit(
            results.Results("runs", columns, run, "loss"), name, fitting.Options(resamples=50)
        )
        planned = predict.predict(found, 1e15)
        at = {part: np.array([planned[part]]) for part in ("d_sae", "tokens")}
        at["k"] = np.array([found.k or 1.0])
        theta = LAWS[name].internal(TRUE[name])
        assert planned["loss"] == pytest.approx(np.exp(LAWS[name].log_loss(theta, at))[0], rel=0.02)


def test_isoflop_keeps_budgets_to_fit(world):
    rows = results.Results("runs", world, np.arange(len(world["loss"])), "loss")
    with pytest.raises(config.UserError, match="--holdout=5"):
        isoflop.fit(rows, fitting.Options(holdout=5))


@pytest.mark.parametrize("law", ["power", "chinchilla", "joint"])
@pytest.mark.slow
def test_the_command_predicts_by_every_law_that_can(tmp_path, capsys, law):
    design = {"power": "power", "joint": "joint"}.get(law, "chinchilla")
    columns = runs(design, noise=0.002)
    if "tokens" in columns:
        columns |= {"flops": 12 * 64 * columns["d_sae"] * columns["tokens"]}
    write(tmp_path / "runs.csv", columns)
    flags = [f"--results={tmp_path}/runs.csv", f"--law={law}", f"--out={tmp_path}/out"]
    assert cli.main(["fit", *flags, "--predict_flops=1e16"]) == 0, capsys.readouterr().err
    planned = json.loads((tmp_path / "out" / "fit.json").read_text())["prediction"]
    said = capsys.readouterr().out
    assert f"loss {planned['loss']:.5g}, 95% of runs" in said
    assert (f"{planned['d_sae']} latents" in said) == (law != "power")
