"""The laws: a loss as a sum of positive terms, each a power law of what a run was given.

Every law here has the form L = sum_j exp(t_j), where t_j is linear in the law's internal
parameters (logarithms of scales such as A, and exponents as they are). Hence log L is a
log-sum-exp of linear functions, whose derivatives are short, and one fitter serves all laws.

  power      L = E + A C^-alpha
  chinchilla L = E + A n^-alpha + B D^-beta            (Hoffmann et al. 2022, eq. 2)
  openai_nk  L = exp(alpha + beta_k ln k + beta_n ln n + gamma ln k ln n) + exp(zeta + eta ln k)
                                                       (Gao et al. 2024, section 3.1.3)
  joint      L = openai_nk(n, k) + B D^-delta

`joint` is ours: Gao et al. give the converged loss of n latents at sparsity k; Hoffmann's data
term, which vanishes as D grows, is added to it. At one k it is `chinchilla` with
alpha = -(beta_n + gamma ln k) and E = exp(zeta + eta ln k).
"""

import dataclasses

import numpy as np

Columns = dict[str, np.ndarray]
_LARGEST = np.log(np.finfo(float).max)


@dataclasses.dataclass(frozen=True)
class Slope:
    """A parameter that multiplies a product of logarithms of columns in its term's exponent.

    Attributes:
      name: the parameter's name.
      columns: the columns whose logarithms are multiplied.
      sign: 1, or -1 for a parameter that users see with the other sign.
      starts: values that a fit starts from.
    """

    name: str
    columns: tuple[str, ...]
    sign: int = 1
    starts: tuple[float, ...] = (0.1, 0.3, 0.8)

    def feature(self, logs: Columns) -> np.ndarray:
        """Returns what the parameter is multiplied by (N,), from the logarithms of the columns."""
        return self.sign * np.prod([logs[column] for column in self.columns], axis=0)


@dataclasses.dataclass(frozen=True)
class Term:
    """One term of a law: exp(scale + slopes . features).

    Attributes:
      scale: the name of the scale's parameter.
      slopes: the term's other parameters.
      is_log: whether users see the scale as it is; else they see exp(scale).
    """

    scale: str
    slopes: tuple[Slope, ...] = ()
    is_log: bool = False


@dataclasses.dataclass(frozen=True)
class Law:
    """A scaling law, as a sum of terms.

    Attributes:
      name: the law's name.
      formula: the formula, as users read it.
      columns: the columns of results that it needs, besides the loss.
      terms: its terms.
      levels: how many different values of each column identify the parameters.
      estimator: the estimator that is used by default.
    """

    name: str
    formula: str
    columns: tuple[str, ...]
    terms: tuple[Term, ...]
    levels: dict[str, int]
    estimator: str = "huber"

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of all P parameters, term by term, each term's scale first."""
        names = []
        for term in self.terms:
            names += [term.scale, *(slope.name for slope in term.slopes)]
        return tuple(names)

    @property
    def positive(self) -> np.ndarray:
        """A mask (P,) of the parameters whose public value is exp of the internal one."""
        scales = {term.scale for term in self.terms if not term.is_log}
        return np.array([name in scales for name in self.parameters])

    @property
    def scales(self) -> np.ndarray:
        """The places (T,) of the terms' scales among the parameters."""
        return np.flatnonzero(np.diff(self.term_of, prepend=-1))

    @property
    def term_of(self) -> np.ndarray:
        """The number (P,) of the term that each parameter belongs to."""
        return np.repeat(np.arange(len(self.terms)), [1 + len(t.slopes) for t in self.terms])

    def features(self, columns: Columns) -> np.ndarray:
        """Returns what each parameter is multiplied by in its term's exponent, (N, P)."""
        logs = {name: np.log(np.asarray(columns[name], float)) for name in self.columns}
        ones = np.ones(len(logs[self.columns[0]]))
        out = []
        for term in self.terms:
            out += [ones, *(slope.feature(logs) for slope in term.slopes)]
        return np.stack(out, axis=1)

    def public(self, internal: np.ndarray) -> np.ndarray:
        """Returns parameters (..., P) as users see them: scales, not their logarithms.

        A scale beyond the largest number that there is becomes that number.
        """
        internal = np.asarray(internal, float)
        logs = np.where(self.positive, np.minimum(internal, _LARGEST), 0)
        return np.where(self.positive, np.exp(logs), internal)

    def internal(self, params: dict[str, float]) -> np.ndarray:
        """Returns the internal parameters (P,) of public ones by name."""
        values = np.array([params[name] for name in self.parameters], float)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(self.positive, np.log(values), values)

    def named(self, public: np.ndarray) -> dict[str, float]:
        """Returns public parameters (P,) by name."""
        return {name: float(v) for name, v in zip(self.parameters, public, strict=True)}

    def log_loss(self, internal: np.ndarray, columns: Columns) -> np.ndarray:
        """Returns the law's log-loss (..., N) for internal parameters (..., P) at columns of N
        rows.
        """
        terms = log_terms(self.features(columns), self.term_of, np.atleast_2d(internal))
        value = np.logaddexp.reduce(terms, axis=1)
        return value[0] if np.ndim(internal) == 1 else value


def log_terms(features_NxP: np.ndarray, term_of_P: np.ndarray, theta_SxP: np.ndarray):
    """Returns the exponent of each term, (S, T, N), for parameters (S, P)."""
    return np.stack(
        [
            theta_SxP[:, term_of_P == term] @ features_NxP[:, term_of_P == term].T
            for term in range(term_of_P[-1] + 1)
        ],
        axis=1,
    )


_SHALLOW = (-0.05, -0.3, -0.8)
_K = (0.3, 0.0, -0.3)
_N_AND_K = (
    Term(
        "alpha",
        (
            Slope("beta_k", ("k",), starts=_K),
            Slope("beta_n", ("d_sae",), starts=_SHALLOW),
            Slope("gamma", ("k", "d_sae"), starts=(0.0,)),
        ),
        is_log=True,
    ),
    Term("zeta", (Slope("eta", ("k",), starts=(-0.05, -0.3, -1.0)),), is_log=True),
)
LAWS = {
    law.name: law
    for law in (
        Law(
            "power",
            "L = E + A C^-alpha",
            ("flops",),
            (Term("A", (Slope("alpha", ("flops",), -1, (0.05, 0.2, 0.5, 1.0)),)), Term("E")),
            {"flops": 3},
        ),
        Law(
            "chinchilla",
            "L = E + A n^-alpha + B D^-beta",
            ("d_sae", "tokens"),
            (
                Term("A", (Slope("alpha", ("d_sae",), -1, (0.1, 0.3, 0.6, 1.2)),)),
                Term("B", (Slope("beta", ("tokens",), -1, (0.1, 0.3, 0.6, 1.2)),)),
                Term("E"),
            ),
            {"d_sae": 3, "tokens": 3},
        ),
        Law(
            "openai_nk",
            "L = exp(alpha + beta_k ln k + beta_n ln n + gamma ln k ln n) + exp(zeta + eta ln k)",
            ("d_sae", "k"),
            _N_AND_K,
            {"d_sae": 3, "k": 2},
            estimator="log_least_squares",
        ),
        Law(
            "joint",
            "L = exp(alpha + beta_k ln k + beta_n ln n + gamma ln k ln n) + exp(zeta + eta ln k)"
            " + B D^-delta",
            ("d_sae", "k", "tokens"),
            (*_N_AND_K, Term("B", (Slope("delta", ("tokens",), -1, (0.2, 0.6)),))),
            {"d_sae": 3, "k": 2, "tokens": 3},
        ),
    )
}
