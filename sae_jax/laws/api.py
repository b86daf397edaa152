"""The laws in Python: read results, fit a law, ask it, save it and load it again.

    from sae_jax import laws

    runs = laws.read("sweeps/a", select="architecture=topk")      # or a table, a dict, a data frame
    fit = laws.fit(runs, "chinchilla")
    fit.params, fit.ci95, fit.warnings
    fit.loss(n=16384, D=1e9)              # .loss, .low and .high; arrays and tables too
    fit.optimal(1e18)                     # the best size and tokens for a budget, and their loss
    fit.save("fits/a"); fit = laws.load("fits/a")
    laws.fit_by(runs, "chinchilla", by="architecture").differences

`sae-jax fit` does the same from a shell.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from sae_jax import paths
from sae_jax.config import Config
from sae_jax.errors import UserError, choose, known_arguments
from sae_jax.laws import fitting, next_run, predict, report, results, saved
from sae_jax.laws.estimators import ESTIMATORS
from sae_jax.laws.isoflop import IsoflopFit
from sae_jax.laws.predict import Losses
from sae_jax.laws.results import Results
from sae_jax.paths import AnyPath

_SHORT = {"n": "d_sae", "D": "tokens", "C": "flops"}  # as in the laws' formulas
_LEAST, _MOST = 1e-50, 1e50  # of a quantity
_QUANTITIES = ("d_sae", "tokens", "k", "flops")


@known_arguments
def read(
    source,
    *,
    d_sae: str | None = None,
    tokens: str | None = None,
    k: str | None = None,
    flops: str | None = None,
    loss: str | None = None,
    flops_factor: float | None = None,
    select: str = "",
) -> Results:
    """Reads the finished runs of a sweep or a table.

    Args:
      source: a sweep's directory, a .csv or .jsonl file, a dict of columns, a data frame (of pandas
        or polars), or a list of such, whose rows are joined.
      d_sae: what the table calls the dictionary size; by default d_sae.
      tokens: what it calls the number of training tokens.
      k: what it calls k.
      flops: what it calls the training FLOPs.
      loss: the column that is fitted; by default loss, or eval_loss.
      flops_factor: F of C = F d_sae tokens, to compute a missing column of flops or tokens; by
        default 12 d_in where there is a column d_in.
      select: conditions that rows must meet, such as "architecture=topk k=32 eval_l0<60".

    Returns:
      The runs. `columns` has their numbers by our names and `notes` what was left out.

    Raises UserError, with the row's place, where a cell cannot be used, and where no row is left.
    """
    names = {"d_sae": d_sae, "tokens": tokens, "k": k, "flops": flops, "loss": loss}
    return results.read(source, (), names, flops_factor, select)


@known_arguments
def fit(
    runs,
    law: str,
    *,
    estimator: str | None = None,
    accounting: str = "flops",
    holdout: int | None = None,
    drop_largest_losses: int = 0,
    resamples: int = fitting.RESAMPLES,
    seed: int = 0,
) -> "LawFit":
    """Fits a law to runs.

    Args:
      runs: what `read` returned, or what it reads.
      law: power, isoflop, chinchilla, openai_nk or joint.
      estimator: huber, log_least_squares or lad; None takes the law's own.
      accounting: compute as "flops", 12 n d a token, or as "flops_executed".
      holdout: how many of the largest budgets are held out; None takes the fewest that hold a tenth
        of the points.
      drop_largest_losses: keep only losses strictly below the N-th largest.
      resamples: the number of bootstrap draws, 50 or more.
      seed: the seed of the draws.

    Raises UserError where the runs lack a column of the law, or cannot identify it.
    """
    choose(law, fitting.LAW_NAMES, "the law")
    choose(accounting, results.ACCOUNTINGS, "the accounting")
    if estimator is not None:
        choose(estimator, ESTIMATORS, "the estimator")
    if resamples < 50:
        raise UserError(f"resamples is {resamples}; intervals need 50 or more")
    runs = runs if isinstance(runs, Results) else read(runs)
    runs = runs.require(fitting.needed_columns(law)).without_largest_losses(drop_largest_losses)
    options = fitting.Options(estimator, holdout, resamples, seed)
    found = fitting.fit(runs.with_accounting(accounting), law, options)
    return LawFit(runs, accounting, options, found)


def load(path: str | AnyPath) -> "LawFit":
    """Returns the fit that `LawFit.save` or `sae-jax fit` wrote to a directory.

    Nothing is fitted again: it gives the numbers that were saved.

    Raises UserError where there is none, or where it is damaged.
    """
    return LawFit(*saved.load(paths.path(path)))


@dataclasses.dataclass(frozen=True)
class LawFit:
    """A law fitted to runs, which can be asked for losses and for the best run of a budget.

    Attributes:
      runs: the runs that were given.
      accounting: how compute is counted, "flops" or "flops_executed".
      options: how the law was fitted.
      found: the fit itself, with its bootstrap draws.
    """

    runs: Results
    accounting: str
    options: fitting.Options
    found: fitting.Fit | IsoflopFit

    def __repr__(self) -> str:
        """The parameters with their intervals and what to doubt, which is what a notebook shows."""
        return report.text(report.summary(self.found, None, {}))

    @property
    def law(self) -> str:
        """The name of the law."""
        return self.found.name

    @property
    def params(self) -> dict[str, float]:
        """The parameters by name."""
        return self.found.summary()["params"]

    @property
    def ci95(self) -> dict[str, tuple[float, float]]:
        """The 95% interval of each parameter."""
        return {name: tuple(ends) for name, ends in self.found.summary()["ci95"].items()}

    @property
    def exponents(self) -> dict[str, float]:
        """The exponents in compute of the best d_sae, the best tokens and the loss, by name, as far
        as the law has them.
        """
        frontier = self.found.summary()["frontier"]
        return {name: frontier[name] for name in fitting.EXPONENTS if frontier[name] is not None}

    @property
    def warnings(self) -> list[str]:
        """What to doubt about the fit, in words."""
        return self.found.warnings

    def summary(self) -> dict:
        """Returns the content of fit.json, but for what a plan adds."""
        return self.found.summary()

    def loss(self, table=None, **at):
        """Returns the loss to expect of a run, with 95% intervals.

        Args:
          table: a dict of columns or a data frame with what the law needs, by our names or those of
            the runs' table; in place of `at`.
          **at: what the law needs, each a number or an array: n (or d_sae), D (or tokens), k, C (or
            flops), or what the runs' table calls them. With C alone it is the least loss that the
            budget buys.

        Returns:
          `predict.Losses`: loss; low and high, the interval of one more run; law_low and law_high,
          that of the law's curve; beyond, how many times farther out than the runs it is asked (1
          within them). Each is a float where all of `at` are numbers, else an array. For a table:
          the same kind of table, with these as columns; one that the table has already, such as
          its runs' own loss, stays as it is, and the law's is loss_expected.

        Raises UserError where the law needs something else, or cannot say it.
        """
        if table is None:
            called = quantity_names(self.runs.names)
            for name in at:
                choose(name, list(called), "loss: the argument")
            return self._losses(self._columns(at))
        names = list(getattr(table, "columns", table))
        rows = {name: table[name] for name in names}
        expected = dataclasses.asdict(self._losses(self._columns(rows, is_table=True)))
        ours = {name: f"{name}_expected" if name in names else name for name in expected}
        if again := set(ours.values()) & set(names):
            raise UserError(f"loss: the table has a column {min(again)} already; leave it out")
        added = {ours[name]: values for name, values in expected.items()}
        return type(table)(rows | added)

    def optimal(self, C, k: float | None = None) -> dict:
        """Returns the compute-optimal run of a budget.

        Args:
          C: the budget in FLOPs, or an array of budgets.
          k: of the joint law, the k at which it is asked; by default the runs' middle one.

        Returns:
          A dict: d_sae, rounded up to a multiple of 64 (of 8 below 512), tokens, loss, interval
          (the 95% interval of one more run's loss), d_sae_interval and tokens_interval (those of
          the best size and tokens), times_largest_budget, warnings and more. For an array of
          budgets each is an array, with the intervals (..., 2), and there are no warnings.

        Raises UserError for a law without a compute-optimal frontier.
        """
        found = self.found
        if k is not None:
            if self.law != "joint":
                raise UserError(f"optimal: k is of the joint law, and this is {self.law}")
            found = found.at_k(float(_positive("k", k)))
        budgets = _positive("C", C)
        planned = [predict.predict(found, float(budget)) for budget in budgets.ravel()]
        if np.ndim(C) == 0:
            return planned[0]
        return {
            name: np.reshape([one[name] for one in planned], budgets.shape + np.shape(value))
            for name, value in planned[0].items()
            if name not in ("interval_is", "warnings")
        }

    def save(
        self,
        out: str | AnyPath,
        flops: float | None = None,
        start: Config | None = None,
        at: Sequence[dict[str, float]] = (),
        papers: Sequence[str] = (),
        style: str | None = None,
        panel: str | None = None,
    ) -> dict:
        """Writes what `report` lists, fit.json among it, and what `load` reads, to a directory.

        Args:
          out: the directory, made if absent.
          flops: a budget whose best run is planned: next_run.py is its config.
          start: the config that next_run.py starts from; by default that of the sweep's run that is
            nearest to it.
          at: values at which the loss is predicted, each what `loss` takes.
          papers: files that end in .pdf, .svg or .png, for a figure in the look of `plots.paper`.
          style: the user's matplotlib style for these.
          panel: which panel of fit.png they show, the first by default.

        Returns:
          The content of fit.json. What the law cannot say of `flops` and `at` is in its `refused`,
          in words.

        Raises UserError, before anything is written, where the directory is not that of a fit, and
        where the figures cannot be drawn.
        """
        planned, predictions, refused = None, [], []
        try:
            planned = None if flops is None else self.optimal(flops)
        except UserError as error:
            refused.append(str(error))
        for values in at:
            try:
                predictions.append({"at": values, **dataclasses.asdict(self.loss(**values))})
                asked = {name: float(value[0]) for name, value in self._columns(values)[0].items()}
                predictions[-1]["warnings"] = predict.warnings(self.found, asked)
            except UserError as error:
                refused.append(str(error))
        next_config = None
        if planned and planned["d_sae"]:
            next_config = next_run.make(planned, self.found.results.run_folders(), start)
        options, accounting = self.options, self.accounting
        frontiers = fitting.frontiers_by_accounting(self.runs, self.found, accounting, options)
        content = report.summary(self.found, planned, frontiers, predictions, refused)
        report.save(self.found, content, out, papers, style, panel)
        saved.save(self.runs, accounting, options, self.found, out)
        if next_config:
            next_run.save(planned, *next_config, out)
        return content

    @property
    def _needed(self) -> tuple[str, ...]:
        """What the law needs to say a loss."""
        return ("flops",) if self.law == "isoflop" else self.found.law.columns

    def _columns(
        self, at: dict, is_table: bool = False
    ) -> tuple[dict[str, np.ndarray], tuple[int, ...]]:
        """Returns the columns (M,) by our names at which a loss is asked, and the shape of M.

        Args:
          at: numbers or arrays by our names or those of the runs' table.
          is_table: whether they are columns of a table, which may have more than the law needs.
        """
        called: dict[str, list[str]] = {}
        known = quantity_names(self.runs.names)
        for name in at:
            if name in known:
                called.setdefault(known[name], []).append(name)
        is_enough = is_table and set(self._needed) <= set(called)
        wanted = self._needed if is_enough else tuple(called)
        for ours in wanted:
            if is_table:  # it may have other columns by our names: those of the runs come first
                own = self.runs.names.get(ours, ours)
                called[ours].sort(key=lambda name, own=own, ours=ours: (name != own, name != ours))
            elif len(called[ours]) > 1:
                raise UserError(f"loss: {' and '.join(called[ours])} are both {ours}; give one")
        given = {ours: _positive(ours, at[called[ours][0]]) for ours in wanted}
        try:
            values = np.broadcast_arrays(*given.values())
        except ValueError:
            shapes = ", ".join(f"{name} {np.shape(value)}" for name, value in given.items())
            raise UserError(f"loss: the shapes do not go together: {shapes}") from None
        shape = values[0].shape if values else ()
        columns = {name: value.ravel() for name, value in zip(given, values, strict=True)}
        if set(columns) == {"flops"} and "flops" not in self._needed:
            return columns | self._cheapest(columns["flops"]), shape
        if set(columns) != set(self._needed):
            raise UserError(
                f"loss: {self.law} needs {' and '.join(self._needed)}, not "
                f"{' and '.join(given) or 'nothing'}"
            )
        return columns, shape

    def _losses(self, asked: tuple[dict[str, np.ndarray], tuple[int, ...]]) -> Losses:
        """Returns the losses at what `_columns` returned."""
        columns, shape = asked
        expected = dataclasses.asdict(predict.losses(self.found, columns))
        shaped = {name: value.reshape(shape) for name, value in expected.items()}
        return Losses(**{n: v if shape else float(v) for n, v in shaped.items()})

    def _cheapest(self, flops: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the columns of the best runs of budgets (M,)."""
        if self.found.frontier is None:
            raise UserError(f"loss: {predict.no_frontier(self.found)}")
        best = self.found.frontier.at(flops)
        columns = {name: best[name] for name in ("d_sae", "tokens")}
        k = self.found.k
        return columns if k is None else columns | {"k": np.full(len(flops), k)}


def quantity_names(names: dict[str, str]) -> dict[str, str]:
    """Returns our name of each quantity by every name that it goes by.

    Args:
      names: what a table calls columns, by our names.
    """
    ours = _SHORT | {name: name for name in _QUANTITIES}
    return ours | {names[name]: name for name in _QUANTITIES if names.get(name)}


def _positive(name: str, value) -> np.ndarray:
    """Returns positive numbers as an array. Raises UserError for what is none."""
    try:
        numbers = np.asarray(value, float)
    except (TypeError, ValueError):
        raise UserError(f"{name} is {value!r}; it must be a number or an array") from None
    if not numbers.size:
        raise UserError(f"{name} is empty; give a number or more")
    if not ((numbers >= _LEAST) & (numbers <= _MOST)).all():
        raise UserError(f"{name} must be of positive numbers, {_LEAST:g} to {_MOST:g}")
    return numbers
