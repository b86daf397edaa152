"""One law for each group of runs, and whether their exponents differ.

Each group is fitted alone. The exponents of two groups are compared by the interval of their
difference, which is made of their own intervals (Zou & Donner 2008, the method of variance
estimates recovery): d - sqrt(l1^2 + u2^2) to d + sqrt(u1^2 + l2^2), l and u being the lower and
upper deviations. These come from the bootstrap over runs (`intervals`), so that each group keeps
its own noise, and are not symmetric where the law bends. Degrees of freedom are Welch's, and more
than two groups are tested together by his analysis of variance (Welch 1951).

Three laws for all runs are compared too (`common_exponents`).

A test in tests/test_laws_by.py counts over 200 planted worlds, with a known difference and with
none, how often the interval of the difference holds the truth and how often groups are said to
differ.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence

import numpy as np
import scipy.stats

from sae_jax import paths, plots, typeset
from sae_jax.config import Config
from sae_jax.errors import UserError, choose, some
from sae_jax.laws import api, fitting, group_figures, group_report, isoflop, outputs, report
from sae_jax.laws.common_exponents import models
from sae_jax.laws.results import Results
from sae_jax.paths import AnyPath

LEVEL = 0.05  # of the tests
_LEAST_DEVIATION = 1e-9  # of an exponent: what the search for the least objective leaves


@dataclasses.dataclass(frozen=True)
class Exponent:
    """One exponent of one group: its value, its 95% interval and the degrees of freedom of that."""

    value: float
    low: float
    high: float
    degrees: int

    @property
    def deviations(self) -> tuple[float, float]:
        """The standard deviations below and above the value."""
        t = scipy.stats.t.ppf(0.975, self.degrees)
        return max(self.value - self.low, 0.0) / t, max(self.high - self.value, 0.0) / t


@dataclasses.dataclass(frozen=True)
class Groups:
    """A law fitted to each group of runs.

    Attributes:
      by: the columns that tell the groups, with commas between them.
      law: the name of the law.
      fits: the fit of each group, by its label.
      refused: why a group has no fit, by its label.
      exponents: by exponent, its value and interval in each group.
      differences: by exponent, `p`, the probability of groups that differ so much where the
        exponents are one; `differ`, whether that is below 5%; and `pairs`, with `of` (two labels),
        `difference`, `ci95` and `p` of each, which are not corrected for the number of pairs.
      models: one law, common exponents, and one law for each group: `model`, `parameters`,
        `objective`, `rms_log_error`, `holdout` (the rms relative error held out, None where too few
        points are left), and `p`, the probability of such a gain over the model before where there
        is nothing to gain. Empty for isoflop.
    """

    by: str
    law: str
    fits: dict[str, api.LawFit]
    refused: dict[str, str]
    exponents: dict[str, dict[str, Exponent]]
    differences: dict[str, dict]
    models: list[dict]

    @property
    def folders(self) -> dict[str, str]:
        """The name of each group's directory, by label."""
        names = {label: folder(self.by, label) for label in self.fits}
        taken = list(names.values())
        return {
            label: name if taken.count(name) == 1 else f"{name}.{number}"
            for number, (label, name) in enumerate(names.items(), 1)
        }

    @property
    def warnings(self) -> list[str]:
        """What to doubt, in words: of the groups, and of the fit of each."""
        return self._warnings({label: fit.warnings for label, fit in self.fits.items()})

    def __repr__(self) -> str:
        """What `sae-jax fit --by` prints, which is what a notebook shows."""
        return group_report.text(self.summary())

    def table(self) -> dict[str, list]:
        """Returns the parameters and exponents of all groups as columns: `group`, `parameter`,
        `value`, `low`, `high`.
        """
        rows = []
        for label, fit in self.fits.items():
            ci95 = fit.ci95
            rows += [(label, name, value, *ci95[name]) for name, value in fit.params.items()]
            rows += [
                (label, name, of[label].value, of[label].low, of[label].high)
                for name, of in self.exponents.items()
                if name not in fit.params and label in of
            ]
        names = ("group", "parameter", "value", "low", "high")
        return {name: [row[place] for row in rows] for place, name in enumerate(names)}

    def summary(self, told: dict[str, dict] | None = None) -> dict:
        """Returns the content of by.json.

        Args:
          told: what `LawFit.save` returned for each group, by its label; without it there are no
            predictions.
        """
        told = told or {
            label: report.summary(fit.found, None, {}) for label, fit in self.fits.items()
        }
        numbers: dict[str, dict] = {label: {} for label in told}
        for label, name, *ends in zip(*self.table().values(), strict=True):
            numbers[label][name] = ends
        same = ("params", "ci95", "n_points", "rms_log_error", "prediction", "predictions")
        return {
            "by": self.by,
            "law": self.law,
            "groups": {
                label: {"directory": self.folders[label], "numbers": numbers[label]}
                | {name: values[name] for name in same}
                for label, values in told.items()
            },
            "differences": self.differences,
            "models": self.models,
            "warnings": self._warnings({label: of["warnings"] for label, of in told.items()}),
            "refused": [f"{label}: {why}" for label, of in told.items() for why in of["refused"]],
        }

    def _warnings(self, of_fits: dict[str, list[str]]) -> list[str]:
        """Returns what to doubt, of which the groups' fits say `of_fits`."""
        out = [f"{self.by} {label} is left out: {why}" for label, why in self.refused.items()]
        if len(self.fits) < 2:
            out.append("one group is fitted, so there is nothing to compare")
        columns = fitting.needed_columns(self.law)
        runs = {label: fit.runs for label, fit in self.fits.items()}
        return [*out, *group_report.apart(runs, columns, self.by), *group_report.merged(of_fits)]

    def save(
        self,
        out: str | AnyPath,
        flops: float | None = None,
        start: Config | None = None,
        at: Sequence[dict[str, float]] = (),
        papers: Sequence[str] = (),
        style: str | None = None,
    ) -> dict:
        """Writes by.json, by.csv, by.png, table.md and table.tex, and the fit of each group to a
        directory of its own.

        The fits of an earlier fit's groups that are none of this are removed.

        Args:
          out: the directory, made if absent.
          flops: as of `LawFit.save`.
          start: as of `LawFit.save`.
          at: as of `LawFit.save`.
          papers: files that end in .pdf, .svg or .png, for the laws of all groups in the look of
            `plots.paper`.
          style: the user's matplotlib style for these.

        Returns:
          The content of by.json. What the groups' laws cannot say of `flops` and `at` is in its
          `refused`, in words.

        Raises UserError, before anything is written, where a directory is not that of a fit, and
        where the figures cannot be drawn.
        """
        out = paths.path(out)
        folders = {label: out / name for label, name in self.folders.items()}
        outputs.check_groups(out)
        for each in folders.values():
            outputs.check_fit(each)
        found = {label: fit.found for label, fit in self.fits.items()}

        def draw():
            return group_figures.laws_alone(found, self.by)

        drawn = {paths.path(file): plots.rendered(draw, file, style) for file in papers}
        out.mkdir(parents=True, exist_ok=True)
        told = {n: fit.save(folders[n], flops, start, at) for n, fit in self.fits.items()}
        outputs.forget_groups(out, set(self.folders.values()))
        values = self.summary(told)
        paths.save_json(values, out / "by.json")  # first: it says whose the others are
        table = self.table()
        rows = [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
        paths.write(out / "by.csv", typeset.as_csv(list(table), rows))
        plots.save(group_figures.overview(found, self.by, self.exponents), out / "by.png")
        paths.write(out / "table.md", group_report.as_markdown(values))
        paths.write(out / "table.tex", group_report.as_latex(values))
        for file, content in drawn.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            paths.write(file, content)
        return values


def fit_by(runs, law: str, by: str | Sequence[str], **options) -> Groups:
    """Fits a law to each group of runs, and compares them.

    Args:
      runs: what `api.read` returned, or what it reads.
      law: the name of the law.
      by: the column, or columns, whose values tell the groups, such as "architecture".
      **options: those of `api.fit`.

    Raises UserError for an unknown column, and where no group identifies the law.
    """
    choose(law, fitting.LAW_NAMES, "the law")
    runs = runs if isinstance(runs, Results) else api.read(runs)
    columns = by.split(",") if isinstance(by, str) else list(by)
    groups = {str(label): group for label, group in runs.split(columns).items()}
    fits, refused = {}, {}
    for label, group in groups.items():
        try:
            fits[label] = api.fit(group, law, **options)
        except UserError as error:
            if len(groups) == 1:
                raise
            refused[label] = str(error)
    by = ",".join(columns)
    if not fits:
        label, why = next(iter(refused.items()))
        raise UserError(
            f"--by={by}: none of the {len(groups)} groups identifies the law ({some(list(groups))}"
            f"); {label}: {why}"
        )
    exponents = _exponents(fits)
    differences = {name: compare(of) for name, of in exponents.items() if len(of) == len(fits) > 1}
    return Groups(
        by, law, fits, refused, exponents, differences, models([fit.found for fit in fits.values()])
    )


def folder(by: str, label: str) -> str:
    """Returns the name of a group's directory."""
    return re.sub(r"[^\w.=+-]+", "_", f"{by}={label}")[:100]


def compare(exponents: dict[str, Exponent]) -> dict:
    """Tests whether an exponent differs between groups.

    Args:
      exponents: that of each group, by label.

    Returns:
      `p`, `differ` and `pairs`, as `Groups.differences` has them.
    """
    pairs = []
    for (one, a), (other, b) in itertools.combinations(exponents.items(), 2):
        (below_a, above_a), (below_b, above_b) = a.deviations, b.deviations
        difference = float(a.value - b.value)
        variances = a.deviations[0] ** 2 + a.deviations[1] ** 2, sum(s**2 for s in b.deviations)
        parts = variances[0] ** 2 / a.degrees + variances[1] ** 2 / b.degrees
        degrees = sum(variances) ** 2 / parts if parts else a.degrees + b.degrees
        t = scipy.stats.t.ppf(0.975, degrees)
        low, high = math.hypot(below_a, above_b), math.hypot(above_a, below_b)
        low, high = max(low, _LEAST_DEVIATION), max(high, _LEAST_DEVIATION)
        pairs.append(
            {
                "of": [one, other],
                "difference": difference,
                "ci95": [float(difference - t * low), float(difference + t * high)],
                "p": _two_sided(difference, low if difference > 0 else high, degrees),
            }
        )
    p = pairs[0]["p"] if len(pairs) == 1 else _welch(list(exponents.values()))
    return {"p": p, "differ": bool(p < LEVEL), "pairs": pairs}


def _two_sided(difference: float, deviation: float, degrees: float) -> float:
    return float(2 * scipy.stats.t.sf(abs(difference) / deviation, degrees))


def _welch(exponents: list[Exponent]) -> float:
    """Returns the probability that groups of one exponent would differ so much (Welch 1951)."""
    values = np.array([exponent.value for exponent in exponents])
    sides = np.array([exponent.deviations for exponent in exponents])
    degrees = np.array([exponent.degrees for exponent in exponents])
    deviations = np.maximum(sides.mean(axis=1), _LEAST_DEVIATION)
    for _ in range(2):  # the deviation on the side of the mean, which it decides
        weights = deviations**-2
        mean = (weights * values).sum() / weights.sum()
        deviations = np.maximum(np.where(values > mean, sides[:, 0], sides[:, 1]), _LEAST_DEVIATION)
    count = len(values)
    spread = (weights * (values - mean) ** 2).sum() / (count - 1)
    lacking = ((1 - weights / weights.sum()) ** 2 / degrees).sum()
    f = spread / (1 + 2 * (count - 2) / (count**2 - 1) * lacking)
    return float(scipy.stats.f.sf(f, count - 1, (count**2 - 1) / (3 * lacking)))


def _exponents(fits: dict[str, api.LawFit]) -> dict[str, dict[str, Exponent]]:
    """Returns the exponents of each group by name: those of the law, and those in compute."""
    out: dict[str, dict[str, Exponent]] = {}
    for label, fit in fits.items():
        found, summary = fit.found, fit.summary()
        if isinstance(found, isoflop.IsoflopFit):
            names, degrees = list(fit.exponents), found.degrees
        else:
            names = [slope.name for term in found.law.terms for slope in term.slopes]
            degrees = [found.drawn.runs - len(found.estimate.theta)]
        known = {name: (summary["params"][name], summary["ci95"][name]) for name in names}
        if found.name in ("chinchilla", "joint"):  # that of `power` is its parameter
            frontier = summary["frontier"]["ci95"]
            known |= {n: (fit.exponents[n], frontier[n]) for n in fit.exponents if n in frontier}
        each = degrees if len(degrees) == len(known) else degrees * len(known)
        for (name, (value, (low, high))), of in zip(known.items(), each, strict=True):
            out.setdefault(name, {})[label] = Exponent(value, low, high, max(of, 1))
    return out
