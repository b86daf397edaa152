"""The published loss of every architecture, in plain numpy and float64.

A reference is built from parameters, and gives `total(held)`, what is differentiated, with
whatever the formula holds fixed taken from `held`, another reference: so a finite difference of
`total` in a parameter is the gradient that the formula means. `straight_through` adds what steps
do not show: by parameter, the gradient that stands in for theirs.
"""

import numpy as np


class Reference:
    """What all have in common: inputs, pre-activations z, decoding, AuxK."""

    def __init__(self, config, p, x, y, controls, held=None):
        self.config, self.p = config, p
        self.x, self.y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        self.dead = np.asarray(controls.dead)
        self.coefficient = float(controls.coefficient)
        self.k = int(config.k if controls.k is None else controls.k) if config.k else None
        self.exponent = controls.p
        self.held = held or self
        self.input = self.x - p["b_dec"] if config.apply_b_dec_to_input else self.x
        self.z = self.input @ p["w_enc"] + p["b_enc"]
        widths = config.site_widths or (self.y.shape[1],)
        parts = np.split(p["w_dec"], np.cumsum(widths)[:-1], axis=1)
        self.norms = sum(np.linalg.norm(part, axis=1) for part in parts)
        if config.unit_norm_decoder and config.site_widths is None:
            self.norms = np.ones_like(self.norms)  # the published formula has none
        self.straight_through = {}
        self.latents = self.activate()
        self.error = self.y - self.decode(self.latents)

    def decode(self, latents):
        skip = self.x @ self.p["w_skip"] if "w_skip" in self.p else 0.0
        return latents @ self.p["w_dec"] + self.p["b_dec"] + skip

    def total(self, held):
        total = np.mean((self.error**2).sum(axis=1)) + self.penalty()
        if self.dead.any():  # Gao et al. 2024, A.2, with the error held fixed
            z = np.where(self.dead, self.z, -np.inf)
            picked = largest(z, self.config.aux_k)
            e_hat = np.maximum(picked, 0.1 * picked) @ self.p["w_dec"]  # a leaky ReLU
            difference = ((held.error - e_hat) ** 2).sum(axis=1)
            total += self.config.aux_coefficient * np.mean(difference)
        return total

    def penalty(self):
        return 0.0


class ReLU(Reference):
    """Conerly et al. 2024, and Bricken et al. 2023 with unit norms:
    E[ ||x - x_hat||^2 + lambda sum_i (f_i ||W_dec,i||)^p ], p = 1 unless annealed."""

    def activate(self):
        return np.maximum(self.z, 0)

    def penalty(self):
        lengths = self.latents * self.norms
        if self.config.p_end < 1:
            lengths = (lengths + 1e-3) ** self.exponent - 1e-3**self.exponent
        return self.coefficient * np.mean(lengths.sum(axis=1))


class TopK(Reference):
    """Gao et al. 2024, 2.3 and 5.3.1."""

    def activate(self):
        return np.maximum(largest(self.z, self.k), 0)

    def penalty(self):
        if not self.config.multi_topk:
            return 0.0
        wide = np.maximum(largest(self.z, 4 * self.k), 0)
        return np.mean(((self.y - self.decode(wide)) ** 2).sum(axis=1)) / 8


class BatchTopK(Reference):
    """Bussmann et al. 2024, section 3."""

    def activate(self):
        positive = np.maximum(self.z, 0)
        count = self.k * len(positive)
        smallest = np.sort(positive, axis=None)[-count]
        return np.where(positive >= smallest, positive, 0.0)


class Matryoshka(BatchTopK):
    """Bussmann, Nabeshima et al. 2025, section 3: the mean over prefixes."""

    def penalty(self):
        errors = []
        for width in self.config.prefix_widths:
            prefix = np.where(np.arange(self.latents.shape[1]) < width, self.latents, 0.0)
            errors.append(np.mean(((self.y - self.decode(prefix)) ** 2).sum(axis=1)))
        return np.mean(errors) - errors[-1]  # the last one stands in `total`


class JumpReLU(Reference):
    """Rajamanoharan et al. 2024 (arXiv:2407.14435), eqs. 9 to 12; Circuits Updates, January 2025.

    Finite differences do not see steps; `straight_through` has their stand-ins, written out from
    the chain rule: of z 1[z > theta] and 1[z > theta], by theta and, "to all", by z.
    """

    def activate(self):
        config, theta = self.config, self.p["threshold"]
        latents = np.maximum(self.z, 0) * (self.z > theta)
        self._add_straight_through(config, theta, latents)
        return latents

    def _add_straight_through(self, config, theta, latents):
        tokens, e = len(self.z), config.bandwidth
        kernel = (np.abs((self.z - theta) / e) < 0.5) / e
        d_latents = 2 * (self.decode(latents) - self.y) @ self.p["w_dec"].T
        d_above = np.zeros_like(self.z)
        if config.sparsity_loss == "tanh":
            c = config.tanh_scale * self.norms
            d_latents += self.coefficient * c / np.cosh(c * latents) ** 2
        else:
            l0 = (self.z > theta).sum(axis=1, keepdims=True)
            slope = 1.0
            if config.sparsity_loss == "gemma_scope_2":
                slope = 4 / config.target_l0 * (l0 - config.target_l0)
            elif config.sparsity_loss == "jumprelu_paper":
                slope = 2 * (l0 / config.target_l0 - 1) / config.target_l0
            d_above += self.coefficient * slope
        through = (theta * d_latents + d_above) * kernel / tokens
        self.straight_through["threshold"] = -through.sum(axis=0)
        if config.gradient_to == "all":
            self.straight_through["b_enc"] = through.sum(axis=0)
            self.straight_through["w_enc"] = self.input.T @ through
            if config.apply_b_dec_to_input:
                self.straight_through["b_dec"] = -self.p["w_enc"] @ through.sum(axis=0)

    def penalty(self):
        config, theta = self.config, self.p["threshold"]
        l0 = (self.latents > 0).sum(axis=1)
        if config.sparsity_loss == "l0":
            sparsity = l0
        elif config.sparsity_loss == "gemma_scope_2":  # its technical paper, eq. 5
            sparsity = 2 / config.target_l0 * (l0 - config.target_l0) ** 2
        elif config.sparsity_loss == "jumprelu_paper":
            sparsity = (l0 / config.target_l0 - 1) ** 2
        else:
            sparsity = np.tanh(config.tanh_scale * self.latents * self.norms).sum(axis=1)
        below = (np.maximum(theta - self.z, 0) * self.norms).sum(axis=1)
        return np.mean(self.coefficient * sparsity + config.preactivation_coefficient * below)


class Gated(Reference):
    """Rajamanoharan et al. 2024 (arXiv:2404.16014), eqs. 5 to 8."""

    def activate(self):
        magnitude = np.exp(self.p["r_mag"]) * (self.z - self.p["b_enc"]) + self.p["b_mag"]
        return np.where(self.z > 0, np.maximum(magnitude, 0), 0.0)

    def penalty(self):
        gate = np.maximum(self.z, 0)
        l1 = self.coefficient * np.mean((gate * self.norms).sum(axis=1))
        # The decoder of the auxiliary reconstruction is held fixed.
        return l1 + np.mean(((self.y - self.held.decode_held(gate)) ** 2).sum(axis=1))

    def decode_held(self, latents):
        if not hasattr(self, "_decoder"):
            self._decoder = {n: v.copy() for n, v in self.p.items()}
        frozen = self._decoder
        skip = self.x @ frozen["w_skip"] if "w_skip" in frozen else 0.0
        return latents @ frozen["w_dec"] + frozen["b_dec"] + skip


REFERENCES = {
    "relu": ReLU,
    "relu_l1_unit": ReLU,
    "topk": TopK,
    "batchtopk": BatchTopK,
    "matryoshka": Matryoshka,
    "jumprelu": JumpReLU,
    "gated": Gated,
}


def largest(z, k):
    """`z` with all but the k largest finite of each row set to 0."""
    threshold = -np.sort(-z, axis=1)[:, k - 1 : k]
    return np.where((z >= threshold) & np.isfinite(z), z, 0.0)
