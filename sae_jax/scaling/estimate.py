"""Estimators: which parameters of a law fit data best, for many starts or many resamples at once.

Every estimator minimises a sum over points of a function of the residual of log-loss. The sum,
not the mean: with the mean of Huber's function at delta 1e-3 gradients are so small that
optimisers stop early, which is what went wrong in the first Chinchilla fit (Besiroglu et al. 2024).
"""

import dataclasses
import itertools

import numpy as np

from sae_jax.scaling.laws import Columns, Law, log_terms

ESTIMATORS = ("huber", "log_least_squares", "lad")
_DELTAS = {  # of Huber's function, in turn: each minimum is the start of the next
    "huber": (1e-3,),  # Hoffmann et al. 2022
    "log_least_squares": (np.inf,),
    "lad": (1e-3, 1e-4, 1e-5, 1e-6, 1e-7),  # the last stands for 0
}
_SHARES = (0.1, 0.45)  # of the loss at the data's centre, of every term but the last at a start


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A law's parameters, `theta` (P,) in the law's internal form. `objective` is the minimised
    sum: of Huber's function, of squares halved, or of absolute residuals, all of log-loss."""

    law: Law
    estimator: str
    theta: np.ndarray
    objective: float
    rms_log_error: float
    problem: "Problem"

    @property
    def params(self) -> dict[str, float]:
        return self.law.named(self.law.public(self.theta))

    def loss(self, columns: Columns) -> np.ndarray:
        return np.exp(self.law.log_loss(self.theta, columns))


def estimate(
    law: Law, columns: Columns, loss: np.ndarray, estimator: str, start: np.ndarray | None = None
) -> Estimate:
    """Fits `law` from a grid of starts, or from internal parameters `start` (P,) alone."""
    problem = Problem.of(law, columns, loss)
    z = problem.coordinates(_starts(law, columns, loss) if start is None else start)
    y_SxN = np.broadcast_to(problem.y_N, (len(z), len(loss)))
    for delta in _DELTAS[estimator]:
        z, value = minimise(problem, z, 1.0, y_SxN[: len(z)], delta, steps=300, tolerance=1e-15)
        z = z[[value.argmin()]]
    residual, _ = problem.residuals(z, y_SxN[:1])
    objective = float(value.min()) / (delta if estimator == "lad" else 1.0)
    rms = float(np.sqrt(np.mean(residual**2)))
    return Estimate(law, estimator, problem.theta(z)[0], objective, rms, problem)


def last_delta(estimator: str) -> float:
    return _DELTAS[estimator][-1]


def _starts(law: Law, columns: Columns, loss: np.ndarray) -> np.ndarray:
    """(S, P) internal parameters: every term has some share of the loss at the data's centre, and
    exponents from its grid."""
    centre, level = law.features(columns).mean(axis=0), np.log(loss).mean()
    shares = [
        (*parts, 1 - sum(parts)) for parts in itertools.product(_SHARES, repeat=len(law.terms) - 1)
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
    """Residuals of one law on one set of runs, in coordinates in which the features of each
    term are orthonormal: any scale of n, D or C is then the same problem."""

    features_NxP: np.ndarray
    term_of_P: np.ndarray
    y_N: np.ndarray  # log loss
    to_theta_PxP: np.ndarray  # theta = to_theta @ coordinates

    @classmethod
    def of(cls, law: Law, columns, loss: np.ndarray) -> "Problem":
        raw, term_of = law.features(columns), law.term_of
        to_theta = np.zeros((raw.shape[1],) * 2)
        for term in range(term_of[-1] + 1):
            own = np.flatnonzero(term_of == term)
            _, upper = np.linalg.qr(raw[:, own])
            to_theta[np.ix_(own, own)] = np.linalg.inv(upper / np.sqrt(len(raw)))
        return cls(raw @ to_theta, term_of, np.log(loss), to_theta)

    def theta(self, z_SxP: np.ndarray) -> np.ndarray:
        return z_SxP @ self.to_theta_PxP.T

    def coordinates(self, theta_SxP: np.ndarray) -> np.ndarray:
        return np.linalg.solve(self.to_theta_PxP, np.atleast_2d(theta_SxP).T).T

    def residuals(self, z_SxP: np.ndarray, y_SxN: np.ndarray):
        """(S, N) fitted minus seen log loss, and each parameter's term's share of the loss
        (S, N, P)."""
        t_SxTxN = log_terms(self.features_NxP, self.term_of_P, z_SxP)
        top = t_SxTxN.max(axis=1, keepdims=True)
        parts = np.exp(t_SxTxN - top)
        total = parts.sum(axis=1, keepdims=True)
        fitted = (np.log(total) + top)[:, 0]
        shares = (parts / total)[:, self.term_of_P]  # (S, P, N)
        return fitted - y_SxN, shares.transpose(0, 2, 1)


def rho(residual: np.ndarray, delta: float) -> np.ndarray:
    size = np.abs(residual)
    return np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))


def minimise(
    problem: Problem, z_SxP, weights_SxN, y_SxN, delta, steps=60, tolerance=1e-12, free_SxPxQ=None
):
    """Damped Newton steps for S problems at once -> (coordinates (S, P), objectives (S,)).

    Near a minimum the curvature is the exact one, its eigenvalues made positive; where that fails
    the damping grows until a step descends. `delta` infinite: least squares."""
    z = np.array(np.broadcast_to(z_SxP, (len(y_SxN), np.shape(z_SxP)[-1])), float)
    weights = np.broadcast_to(weights_SxN, y_SxN.shape)
    features, same_term = problem.features_NxP, problem.term_of_P[:, None] == problem.term_of_P
    count, size = z.shape
    damping = np.full(count, 1e-2)
    residual, shares = problem.residuals(z, y_SxN)
    value = (weights * rho(residual, delta)).sum(axis=1)
    active = np.ones(count, bool)
    for _ in range(steps):
        at = np.flatnonzero(active)
        if not len(at):
            break
        r, p, w = residual[at], shares[at], weights[at]
        jacobian = p * features
        inner = np.abs(r) <= delta
        slope = w * np.clip(r, -delta, delta)
        with np.errstate(divide="ignore"):
            convex = w * np.where(inner, 1.0, delta / np.maximum(np.abs(r), 1e-300))
        gradient = np.einsum("sn,snp->sp", slope, jacobian)
        own = np.einsum("snp,nq->spq", slope[:, :, None] * p * features, features) * same_term
        outer = np.einsum("snp,snq->spq", (w * inner - slope)[:, :, None] * jacobian, jacobian)
        exact = own + outer
        majorising = np.einsum("snp,snq->spq", convex[:, :, None] * jacobian, jacobian)
        best_value, best_z = value[at].copy(), z[at].copy()
        moved = np.zeros(len(at), bool)
        for hessian in (exact, majorising):
            if free_SxPxQ is not None:
                free = free_SxPxQ[at]
                hessian = free.transpose(0, 2, 1) @ hessian @ free
            bend, axes = np.linalg.eigh(hessian)
            scale = np.abs(bend).max(axis=1, keepdims=True) + 1e-300
            bend = np.abs(bend) + scale * (damping[at, None] + 1e-14)
            if free_SxPxQ is not None:
                axes = free @ axes
            along = np.einsum("spq,sp->sq", axes, gradient) / bend
            trial = z[at] - np.einsum("spq,sq->sp", axes, along)
            trial_r, _ = problem.residuals(trial, y_SxN[at])
            trial_value = (w * rho(trial_r, delta)).sum(axis=1)
            better = trial_value < best_value
            best_value = np.where(better, trial_value, best_value)
            best_z[better] = trial[better]
            moved |= better
        gain = value[at] - best_value
        z[at], value[at] = best_z, best_value
        residual[at], shares[at] = problem.residuals(best_z, y_SxN[at])
        damping[at] = np.where(moved, damping[at] * 0.2, damping[at] * 10).clip(1e-16, 1e8)
        done = (moved & (gain <= tolerance * value[at])) | (damping[at] > 1e6)
        active[at[done]] = False
    return z, value
