"""The laws in Python: what a fit says is what the command says, and a saved fit says the same."""

import numpy as np
import pytest
from test_laws import LAWS, TRUE, runs, world_loss

from sae_jax import laws
from sae_jax.errors import UserError
from sae_jax.laws import saved

AT = {  # what each law needs for a loss
    "power": dict(C=[1e13, 1e14]),
    "chinchilla": dict(n=[1000, 30_000], D=[1e7, 1e9]),
    "openai_nk": dict(n=[1000, 30_000], k=[16, 16]),
    "joint": dict(n=[1000, 30_000], D=[1e7, 1e9], k=[16, 16]),
    "isoflop": dict(C=[1e10, 1e12]),
}


def table(law):
    if law != "isoflop":
        columns = runs(law, noise=0.003)
        if "tokens" in columns:
            columns["flops"] = 768 * columns["d_sae"] * columns["tokens"]
        return columns
    budgets, shifts = np.meshgrid(1e6 * 4.0 ** np.arange(5), 2.0 ** np.arange(-2, 3))
    n = np.round(0.5 * budgets**0.4 * shifts).ravel()
    columns = {"d_sae": n, "tokens": budgets.ravel() / n, "flops": 768 * budgets.ravel()}
    return columns | {"loss": world_loss(n, columns["tokens"])}


@pytest.fixture(scope="module", params=[*LAWS, "isoflop"])
def fitted(request):
    return laws.fit(table(request.param), request.param, resamples=50)


@pytest.fixture(scope="module")
def chinchilla():
    return laws.fit(table("chinchilla"), "chinchilla", resamples=50)


def test_a_saved_fit_says_the_same(tmp_path, fitted):
    saved.save(fitted.runs, fitted.accounting, fitted.options, fitted.found, tmp_path)
    loaded = laws.load(tmp_path)
    assert loaded.summary() == fitted.summary()
    at = AT[fitted.law]
    for name, value in vars(fitted.loss(**at)).items():
        np.testing.assert_array_equal(getattr(loaded.loss(**at), name), value)
    if fitted.law != "openai_nk":
        assert loaded.optimal(1e15) == fitted.optimal(1e15)
    (tmp_path / saved.FILE).write_text((tmp_path / saved.FILE).read_text().replace("huber", "hub"))
    with pytest.raises(UserError, match="is damaged"):
        laws.load(tmp_path)


def test_losses_lie_in_their_intervals_in_every_form(fitted):
    at = AT[fitted.law]
    found = fitted.loss(**at)
    assert (found.low <= found.law_low).all() and (found.law_low <= found.loss).all()
    assert (found.loss <= found.law_high).all() and (found.law_high <= found.high).all()
    if fitted.law in TRUE:
        columns = {{"n": "d_sae", "D": "tokens", "C": "flops"}.get(n, n): v for n, v in at.items()}
        law = LAWS[fitted.law]
        true = np.exp(law.log_loss(law.internal(TRUE[fitted.law]), columns))
        assert ((found.low <= true) & (true <= found.high)).all()
    one = fitted.loss(**{name: values[1] for name, values in at.items()})
    assert isinstance(one.loss, float) and one.low == pytest.approx(found.low[1], rel=1e-12)
    square = fitted.loss(**{name: np.array(values)[:, None] for name, values in at.items()})
    assert square.high.shape == (2, 1)
    as_table = fitted.loss({"other": ["a", "b"], **at})
    assert list(as_table) == ["other", *at, *vars(found)]
    np.testing.assert_array_equal(as_table["loss"], found.loss)
    beside = fitted.loss({"loss": [7, 8], **at})  # what the runs lost stays
    assert beside["loss"] == [7, 8]
    np.testing.assert_array_equal(beside["loss_expected"], found.loss)
    assert all(f"  {name} " in repr(fitted) for name in fitted.params)


def test_a_budgets_best_run(fitted):
    if fitted.law == "openai_nk":
        with pytest.raises(UserError, match="knows no tokens.*--predict_at"):
            fitted.optimal(1e15)
        return
    budgets = np.array([[1e13, 1e14], [1e15, 1e16]])
    best = fitted.optimal(budgets)
    assert best["loss"].shape == (2, 2) and best["interval"].shape == (2, 2, 2)
    assert best["loss"][1, 0] == fitted.optimal(1e15)["loss"]
    if fitted.law != "power":
        np.testing.assert_allclose(768 * best["d_sae"] * best["tokens"], budgets, rtol=0.02)
        for name in ("d_sae", "tokens"):
            low, high = fitted.optimal(1e13)[f"{name}_interval"]
            assert 0.9 * low <= best[name][0, 0] <= 1.1 * high  # sizes are rounded up
    assert fitted.loss(C=1e15).loss == pytest.approx(best["loss"][1, 0], rel=0.01)


def test_how_far_beyond_the_runs_a_law_is_asked(tmp_path, chinchilla):
    n, D = (chinchilla.runs.columns[name] for name in ("d_sae", "tokens"))
    inside = chinchilla.loss(n=n, D=D)
    assert (inside.beyond == 1).all() and not chinchilla.optimal(1e12)["warnings"]
    assert chinchilla.loss(n=n.max(), D=50 * D.max()).beyond == pytest.approx(50)
    assert chinchilla.loss(n=n.min() / 8, D=D[0]).beyond == pytest.approx(8)
    (said,) = chinchilla.optimal(1e30)["warnings"]
    assert "times the largest budget" in said and "largest tokens" in said
    asked = [{"n": 8 * n.max(), "D": D.min() / 5}, {"C": 1e13}, {"n": n[0], "D": D[0]}]
    (tmp_path / "fit.json").write_text('{"law": "joint"}')
    (tmp_path / "next_run.py").write_text("of another fit")
    values = chinchilla.save(tmp_path, at=asked)
    assert not (tmp_path / "next_run.py").exists()
    assert [len(one["warnings"]) for one in values["predictions"]] == [1, 0, 0]
    assert "8 times the largest d_sae and 1/5 of the smallest tokens" in values["warnings"][-1]


def test_a_law_is_asked_by_the_names_of_its_table():
    columns = table("chinchilla")
    columns |= {"n": columns.pop("tokens"), "Size": columns.pop("d_sae")}
    found = laws.fit(laws.read(columns, tokens="n", d_sae="Size"), "chinchilla", resamples=50)
    assert found.loss(n=1e8, Size=1000) == found.loss(tokens=1e8, d_sae=1000)
    with pytest.raises(UserError, match="tokens and n are both tokens"):
        found.loss(tokens=1e8, n=1e8, d_sae=1000)


def test_a_table_may_have_other_columns_by_our_names():
    columns = table("chinchilla")
    columns |= {"seen": columns["tokens"], "tokens": columns["tokens"] * 0 + 7}
    found = laws.fit(laws.read(columns, tokens="seen"), "chinchilla", resamples=50)
    asked = found.loss({name: values[:2] for name, values in columns.items()})
    alone = found.loss(n=columns["d_sae"][:2], D=columns["seen"][:2])
    np.testing.assert_array_equal(asked["loss_expected"], alone.loss)


def test_compute_that_says_no_cost_gives_no_plan(tmp_path):
    """Runs of two input widths, whose compute is no function of size and tokens."""
    columns = table("chinchilla")
    widths = np.resize([512, 768], len(columns["loss"]))
    columns |= {"d_in": widths, "flops": 12 * widths * columns["d_sae"] * columns["tokens"]}
    found = laws.fit(columns, "chinchilla", resamples=50)
    assert any("does not say what another run costs" in said for said in found.warnings)
    with pytest.raises(UserError, match="flops does not say what another run costs"):
        found.optimal(1e14)
    assert found.loss(n=1000, D=1e8).loss > 0


def test_a_joint_law_is_asked_at_any_k():
    found = laws.fit(table("joint"), "joint", resamples=50)
    few, many = (found.optimal(1e15, k=k) for k in (8, 64))
    assert few["k"] == 8 and few["loss"] > many["loss"]
    assert few["loss"] == pytest.approx(found.loss(n=few["d_sae"], D=few["tokens"], k=8).loss)


@pytest.mark.parametrize(
    "ask, words",
    [
        (lambda f: f.loss(n=5), "needs d_sae and tokens, not d_sae"),
        (lambda f: f.loss(), "not nothing"),
        (lambda f: f.loss(m=5), "the argument is 'm'"),
        (lambda f: f.loss(n=-5, D=1), "d_sae must be of positive numbers"),
        (lambda f: f.loss(n="many", D=1), "d_sae is 'many'"),
        (lambda f: f.loss(n=[1, 2], D=[1, 2, 3]), "shapes do not go together"),
        (lambda f: f.loss({"n": [1], "k": [2]}), "needs d_sae and tokens"),
        (lambda f: f.optimal(float("nan")), "C must be of positive"),
        (lambda f: f.optimal(1e12, k=3), "k is of the joint law"),
        (lambda f: laws.fit(f.runs, "chinchila"), "did you mean 'chinchilla'"),
        (lambda f: laws.fit(f.runs, "chinchilla", resample=50), "'resample'; did you mean"),
        (lambda f: laws.fit(f.runs, "openai_nk"), "no column k, which this law needs"),
        (lambda f: laws.load("nowhere"), "nowhere has no state.json"),
    ],
)
def test_questions_without_an_answer(chinchilla, ask, words):
    with pytest.raises(UserError, match=words):
        ask(chinchilla)


def test_data_frames(chinchilla):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(table("chinchilla"))
    assert laws.fit(frame, "chinchilla", resamples=50).params == chinchilla.params
    asked = pandas.DataFrame({"n": [1000, 2000], "D": [1e7, 1e8]})
    found = chinchilla.loss(asked)
    assert isinstance(found, pandas.DataFrame)
    assert found["loss"].tolist() == chinchilla.loss(n=asked["n"], D=asked["D"]).loss.tolist()
