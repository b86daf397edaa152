"""Estimators: which parameters of a law fit data best, for many starts or many resamples at once.

Every estimator minimises a sum over points of a function of the residual of log-loss. It is the sum
and not the mean: with the mean of Huber's function at delta 1e-3 gradients are so small that
optimisers stop early, which is what went wrong in the first Chinchilla fit (Besiroglu et al. 2024).

Bootstraps and profile intervals are thousands of small problems of one form. `minimise` solves them
as one array. scipy's BFGS, run on one problem after the other, comes to the same minima
(tests/test_laws.py) and took 17 times as long for 400 draws of the 240 Chinchilla runs.
"""

import dataclasses
import itertools

import numpy as np

from sae_jax.laws.laws import Columns, Law, log_terms

ESTIMATORS = ("huber", "log_least_squares", "lad")
_DELTAS = {  # deltas of Huber's function; the minimum of each is where the next one starts
    "huber": (1e-3,),  # Hoffmann et al. 2022
    "log_least_squares": (np.inf,),
    "lad": (1e-3, 1e-4, 1e-5, 1e-6, 1e-7),  # the last stands for 0
}
_FINALISTS = 20  # starts that are refined to full precision
_NO_PART = 1e-6  # of the loss of any run, below which a term is nothing
_PATIENCE = 3000  # steps; valleys of openai_nk, and of Huber's function, are long and flat
_LONGEST = 10.0  # longest step in coordinates; a residual moves by about as much
_SHARES = {  # by number of terms, shares of the loss that each term but the last starts with
    1: (),
    2: (0.1, 0.3, 0.5, 0.7, 0.9),
    3: (0.1, 0.45),
}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A law's parameters, as one estimator finds them.

    Attributes:
      law: the law.
      estimator: one of `ESTIMATORS`.
      theta: the parameters (P,) in the law's internal form.
      objective: the minimised sum over points: of Huber's function of the residuals of log-loss, of
        their halved squares, or of their absolute values.
      rms_log_error: the root mean square of the residuals of log-loss.
      problem: the residuals' problem, from which intervals go on.
    """

    law: Law
    estimator: str
    theta: np.ndarray
    objective: float
    rms_log_error: float
    problem: "Problem"

    @property
    def params(self) -> dict[str, float]:
        """Returns the parameters by name, as users see them. The scale of a term that vanishes is
        0.
        """
        public = self.law.public(self.theta)
        return self.law.named(np.where(self.vanished & self.law.positive, 0.0, public))

    @property
    def vanished(self) -> np.ndarray:
        """A mask (P,) of the scales at their bound: their terms are no part of any run's loss."""
        _, shares = self.problem.residuals(self.problem.coordinates(self.theta), self.problem.y_N)
        is_scale = np.isin(np.arange(len(self.theta)), self.law.scales)
        return is_scale & (shares[0].max(axis=0) < _NO_PART)

    def loss(self, columns: Columns) -> np.ndarray:
        """Returns the law's losses (N,) at `columns` of N rows."""
        return np.exp(self.law.log_loss(self.theta, columns))


def estimate(
    law: Law, columns: Columns, loss: np.ndarray, estimator: str, starts: np.ndarray | None = None
) -> Estimate:
    """Fits `law` to losses (N,) at columns of N rows and returns its best parameters.

    The fit starts from a grid of some hundred parameter vectors, or from the internal parameters
    `starts` (S, P) where these are given. All of them take 60 steps, and the best 20 are minimised
    to full precision.
    """
    problem = Problem.from_law(law, columns, loss)
    deltas = _DELTAS[estimator]
    starts = _starts(law, columns, loss) if starts is None else starts
    z = problem.coordinates(starts)
    y_SxN = np.broadcast_to(problem.y_N, (len(z), len(loss)))
    z, value = minimise(problem, z, 1.0, y_SxN, deltas[0], steps=60, tolerance=1e-9)
    z = z[np.argsort(value)[:_FINALISTS]]
    for delta in deltas:
        z, value = minimise(problem, z, 1.0, y_SxN[: len(z)], delta, tolerance=1e-15)
        z = z[[value.argmin()]]
    residual, _ = problem.residuals(z, y_SxN[:1])
    objective = float(value.min()) / (deltas[-1] if estimator == "lad" else 1.0)
    rms = float(np.sqrt(np.mean(residual**2)))
    return Estimate(law, estimator, problem.theta(z)[0], objective, rms, problem)


def last_delta(estimator: str) -> float:
    """Returns the delta of Huber's function that an estimator ends with; infinity for least
    squares.
    """
    return _DELTAS[estimator][-1]


def _starts(law: Law, columns: Columns, loss: np.ndarray) -> np.ndarray:
    """Returns starts (S, P): each term has some share of the loss at the data's centre, and
    exponents come from the term's grid.
    """
    centre, level = law.features(columns).mean(axis=0), np.log(loss).mean()
    shares = [
        (*parts, 1 - sum(parts))
        for parts in itertools.product(_SHARES[len(law.terms)], repeat=len(law.terms) - 1)
    ]
    slopes = [slope.starts for term in law.terms for slope in term.slopes]
    starts = []
    for parts, exponents in itertools.product(shares, itertools.product(*slopes)):
        theta, left = [], iter(exponents)
        for term, share in zip(law.terms, parts, strict=True):
            own = [next(left) for _ in term.slopes]
            place = len(theta) + 1
            at_centre = np.dot(own, centre[place : place + len(own)])
            theta += [level + np.log(share) - at_centre, *own]
        starts.append(theta)
    return np.array(starts)


@dataclasses.dataclass(frozen=True)
class Problem:
    """The residuals of one law on one set of runs, as a function of coordinates z (P,).

    In these coordinates the features of each term are orthonormal, so that any units of n, D or C
    make the same problem.

    Attributes:
      features_NxP: the orthonormal features of each run.
      term_of_P: the number of the term that each coordinate belongs to.
      y_N: the logarithm of each run's loss.
      to_theta_PxP: the matrix that turns coordinates into parameters.
    """

    features_NxP: np.ndarray
    term_of_P: np.ndarray
    y_N: np.ndarray  # log loss
    to_theta_PxP: np.ndarray  # theta = to_theta @ coordinates

    @classmethod
    def from_law(cls, law: Law, columns, loss: np.ndarray) -> "Problem":
        """Makes the problem of fitting `law` to losses (N,) at columns of N rows."""
        raw, term_of = law.features(columns), law.term_of
        to_theta = np.zeros((raw.shape[1],) * 2)
        for term in range(term_of[-1] + 1):
            own = np.flatnonzero(term_of == term)
            _, upper = np.linalg.qr(raw[:, own])
            to_theta[np.ix_(own, own)] = np.linalg.inv(upper / np.sqrt(len(raw)))
        return cls(raw @ to_theta, term_of, np.log(loss), to_theta)

    def theta(self, z_SxP: np.ndarray) -> np.ndarray:
        """Returns the internal parameters (S, P) at coordinates (S, P)."""
        return z_SxP @ self.to_theta_PxP.T

    def coordinates(self, theta_SxP: np.ndarray) -> np.ndarray:
        """Returns the coordinates (S, P) of internal parameters (S, P) or (P,)."""
        return np.linalg.solve(self.to_theta_PxP, np.atleast_2d(theta_SxP).T).T

    def residuals(self, z_SxP: np.ndarray, y_SxN: np.ndarray):
        """Returns fitted minus observed log-loss, and the shares of the terms in the loss.

        Args:
          z_SxP: coordinates of S parameter vectors.
          y_SxN: the observed log-losses of each.

        Returns:
          The residuals (S, N), and for each parameter the share of its term in the fitted loss (S,
          N, P).
        """
        t_SxTxN = log_terms(self.features_NxP, self.term_of_P, z_SxP)
        top = t_SxTxN.max(axis=1, keepdims=True)
        parts = np.exp(t_SxTxN - top)
        total = parts.sum(axis=1, keepdims=True)
        fitted = (np.log(total) + top)[:, 0]
        shares = (parts / total)[:, self.term_of_P]  # (S, P, N)
        return fitted - y_SxN, shares.transpose(0, 2, 1)


def huber(residual: np.ndarray, delta: float) -> np.ndarray:
    """Returns Huber's function of residuals; half their square where `delta` is infinite."""
    size = np.abs(residual)
    inner = np.minimum(size, delta)
    outside = 0.0 if np.isinf(delta) else delta * (size - inner)
    return 0.5 * inner**2 + outside


def minimise(
    problem: Problem,
    z_SxP: np.ndarray,
    weights_SxN: np.ndarray | float,
    y_SxN: np.ndarray,
    delta: float,
    steps: int = _PATIENCE,
    tolerance: float = 1e-10,
    free_SxPxQ: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Minimises S sums of Huber's function at once, by damped Newton steps.

    Every step tries two curvatures and takes whichever descends farther. One is the exact curvature
    with its eigenvalues made positive, which converges quadratically near a minimum. The other is
    that of the least squares that lie above Huber's function, which descends from far away. Where
    neither descends, the damping grows.

    Args:
      problem: the residuals to minimise.
      z_SxP: where each of the S problems starts.
      weights_SxN: the weight of each run in each problem, or one weight for all.
      y_SxN: the observed log-losses of each problem.
      delta: where Huber's function becomes linear.
      steps: the most steps to take.
      tolerance: the relative descent of a step below which a problem is done.
      free_SxPxQ: orthonormal directions that each problem may move in; all by default.

    Returns:
      The coordinates (S, P) of the minima, and the objectives (S,) there.
    """
    z = np.array(np.broadcast_to(z_SxP, (len(y_SxN), np.shape(z_SxP)[-1])), float)
    weights = np.broadcast_to(weights_SxN, y_SxN.shape)
    damping = np.full(len(z), 1e-2)
    residual, shares = problem.residuals(z, y_SxN)
    value = (weights * huber(residual, delta)).sum(axis=1)
    active = np.ones(len(z), bool)
    for _ in range(steps):
        at = np.flatnonzero(active)
        if not len(at):
            break
        free = None if free_SxPxQ is None else free_SxPxQ[at]
        gradient, curvatures = _derivatives(problem, residual[at], shares[at], weights[at], delta)
        before, here = value[at], z[at]
        for curvature in curvatures:
            trial = here - _damped_step(gradient, curvature, damping[at], free)
            trial_residual, trial_shares = problem.residuals(trial, y_SxN[at])
            trial_value = (weights[at] * huber(trial_residual, delta)).sum(axis=1)
            better = trial_value < value[at]
            now = at[better]
            z[now], value[now] = trial[better], trial_value[better]
            residual[now], shares[now] = trial_residual[better], trial_shares[better]
        gain = before - value[at]
        moved = gain > 0
        damping[at] = np.clip(damping[at] * np.where(moved, 0.2, 10.0), 1e-16, 1e8)
        done = (moved & (gain <= tolerance * value[at])) | (damping[at] > 1e6)
        active[at[done]] = False
    return z, value


def _derivatives(problem: Problem, residual_SxN, shares_SxNxP, weights_SxN, delta):
    """Returns the objectives' gradients (S, P) and two curvatures (S, P, P), the exact and the
    majorising one.
    """
    features, term_of = problem.features_NxP, problem.term_of_P
    jacobian = shares_SxNxP * features
    across = jacobian.transpose(0, 2, 1)
    size = np.abs(residual_SxN)
    slope = weights_SxN * np.clip(residual_SxN, -delta, delta)
    if np.isinf(delta):
        inside, above = weights_SxN, weights_SxN
    else:
        inside = weights_SxN * (size <= delta)
        above = weights_SxN * (delta / np.maximum(size, delta))
    gradient = (across @ slope[..., None])[..., 0]
    # log L is a log-sum-exp, so its own curvature is diag(shares) - shares shares^T.
    own = (slope[..., None] * jacobian).transpose(0, 2, 1) @ features
    own = own * (term_of[:, None] == term_of)
    exact = own + across @ ((inside - slope)[..., None] * jacobian)
    return gradient, (exact, across @ (above[..., None] * jacobian))


def _damped_step(gradient_SxP, curvature_SxPxP, damping_S, free_SxPxQ) -> np.ndarray:
    """Returns the steps (S, P) to subtract, each at most `_LONGEST` long."""
    if free_SxPxQ is not None:
        curvature_SxPxP = free_SxPxQ.transpose(0, 2, 1) @ curvature_SxPxP @ free_SxPxQ
    bend, axes = np.linalg.eigh(curvature_SxPxP)
    bend = np.abs(bend)
    bend = bend + bend.max(axis=1, keepdims=True) * (damping_S[:, None] + 1e-14) + 1e-40
    if free_SxPxQ is not None:
        axes = free_SxPxQ @ axes
    along = (gradient_SxP[:, None] @ axes)[:, 0] / bend
    step = (axes @ along[..., None])[..., 0]
    length = np.sqrt((step**2).sum(axis=1, keepdims=True))
    return step * np.minimum(1.0, _LONGEST / np.maximum(length, _LONGEST))
