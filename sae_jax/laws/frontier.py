"""The compute-optimal frontier n*(C), D*(C), L*(C) of laws that are additive in n and D.

With C = c n D, the least of E + A n^-alpha + B D^-beta lies at n* = G (C/c)^(beta/(alpha+beta)),
D* = (C/c) / n*, G = (alpha A / (beta B))^(1/(alpha+beta)) (Hoffmann et al. 2022, eq. 4). Executed
FLOPs have a part that does not grow with n (the sparse decoder of k latents), C = (c n + c0) D;
then n* is the root of the derivative, and the exponents are those of large n.
"""

import dataclasses

import numpy as np

from sae_jax.laws.laws import Columns, Law

_AFFINE = 0.02  # relative: the largest deviation of flops from (c n + c0) D


@dataclasses.dataclass(frozen=True)
class Cost:
    """The compute of a run with n latents and D tokens: C = (slope n + fixed) D, in FLOPs."""

    slope: float
    fixed: float = 0.0

    @classmethod
    def from_columns(cls, columns: Columns) -> "Cost | None":
        """Returns the cost that explains the columns d_sae, tokens and flops; None where no cost of
        this form does.
        """
        n, per_token = columns["d_sae"], columns["flops"] / columns["tokens"]
        ratio = per_token / n
        if np.ptp(ratio) <= 1e-3 * np.median(ratio):
            return cls(float(np.median(ratio)))
        design = np.stack([n, np.ones(len(n))], axis=1) / per_token[:, None]
        (slope, fixed), *_ = np.linalg.lstsq(design, np.ones(len(n)), rcond=None)
        fits = np.abs(design @ [slope, fixed] - 1).max() <= _AFFINE
        return cls(float(slope), float(fixed)) if fits and slope > 0 and fixed >= 0 else None

    def flops(self, n, tokens):
        """Returns the FLOPs of training n latents on so many tokens."""
        return (self.slope * n + self.fixed) * tokens


@dataclasses.dataclass(frozen=True)
class Frontier:
    """The compute-optimal frontier of one parameter vector, or of S at once.

    The loss is E + A n^-alpha + B D^-beta. Every field but `cost` has shape () or (S,). Scales are
    kept as logarithms, because they overflow easily.

    Attributes:
      log_a: the logarithm of A.
      alpha: the exponent of n.
      log_b: the logarithm of B.
      beta: the exponent of D.
      log_e: the logarithm of E.
      cost: the compute of n latents and D tokens.
    """

    log_a: np.ndarray
    alpha: np.ndarray
    log_b: np.ndarray
    beta: np.ndarray
    log_e: np.ndarray
    cost: Cost

    @classmethod
    def from_law(
        cls, law: Law, theta: np.ndarray, cost: Cost, k: float | None = None
    ) -> "Frontier":
        """Makes the frontier of a law.

        Args:
          law: chinchilla or joint.
          theta: internal parameters (P,) or (S, P).
          cost: the compute of n latents and D tokens.
          k: the sparsity at which the joint law is taken.
        """
        at = {name: np.asarray(theta)[..., i] for i, name in enumerate(law.parameters)}
        if law.name == "chinchilla":
            return cls(at["A"], at["alpha"], at["B"], at["beta"], at["E"], cost)
        log_k = np.log(k)
        return cls(
            at["alpha"] + at["beta_k"] * log_k,
            -(at["beta_n"] + at["gamma"] * log_k),
            at["B"],
            at["delta"],
            at["zeta"] + at["eta"] * log_k,
            cost,
        )

    def take(self, rows) -> "Frontier":
        """Returns the frontiers of the chosen `rows`, a mask or indices."""
        fields = ("log_a", "alpha", "log_b", "beta", "log_e")
        return dataclasses.replace(self, **{name: getattr(self, name)[rows] for name in fields})

    @property
    def exists(self) -> np.ndarray:
        """Whether the loss falls in both n and D; where it does not, more of one is never worth its
        compute.
        """
        return (self.alpha > 0) & (self.beta > 0)

    @property
    def exponents(self) -> dict[str, np.ndarray]:
        """The exponents of n*, of D* and of the reducible loss L* - E in C, by name."""
        total = self.alpha + self.beta
        return {
            "d_sae_exponent": self.beta / total,
            "tokens_exponent": self.alpha / total,
            "loss_exponent": -self.alpha * self.beta / total,
        }

    def at(self, flops: np.ndarray) -> Columns:
        """Returns d_sae, tokens and loss, each (..., B), at budgets (B,) in FLOPs."""
        alpha, beta, log_a, log_b, log_e = (
            np.asarray(v)[..., None]
            for v in (self.alpha, self.beta, self.log_a, self.log_b, self.log_e)
        )
        log_c = np.log(np.asarray(flops, float))
        scale = (np.log(alpha / beta) + log_a - log_b) / (alpha + beta)
        log_n = scale + beta / (alpha + beta) * (log_c - np.log(self.cost.slope))
        if self.cost.fixed:
            low, high = log_n - 40, log_n + 40
            for _ in range(100):  # the derivative in log n rises with n; bisect
                log_n = (low + high) / 2
                per_token = np.log(self.cost.slope * np.exp(log_n) + self.cost.fixed)
                share = np.log(self.cost.slope) + log_n - per_token
                width = np.log(alpha) + log_a - alpha * log_n
                data = np.log(beta) + log_b - beta * (log_c - per_token) + share
                low, high = np.where(width > data, log_n, low), np.where(width > data, high, log_n)
        log_d = log_c - np.log(self.cost.slope * np.exp(log_n) + self.cost.fixed)
        terms = (log_a - alpha * log_n, log_b - beta * log_d, log_e + 0 * log_n)
        loss = np.exp(np.logaddexp.reduce(terms))
        return {"d_sae": np.exp(log_n), "tokens": np.exp(log_d), "loss": loss}
