"""What a training loss is given and what it gives, and the terms that architectures share."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sae_jax import ops

_AUXILIARY_SLOPE = 0.1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossInputs:
    """Holds what a training loss depends on besides the SAE and its batch.

    The trainer computes these values anew at every step.

    Attributes:
      dead: (d_sae,) bool, the latents that have not fired for `dead_after_tokens` tokens.
      coefficient: the coefficient of the sparsity penalty at this step.
      k: the number of latents for each token at this step. None stands for the config's k.
      p: the exponent of the L1 family's penalty at this step.
      next_p: the exponent at the next step.
      training: whether latents are computed as in training. With False they are computed as
        `SAE.encode` computes them, which differs where an architecture looks at a whole batch.
    """

    dead: jax.Array
    coefficient: jax.Array | float = 0.0
    k: jax.Array | int | None = None
    p: jax.Array | float = 1.0
    next_p: jax.Array | float = 1.0
    training: bool = dataclasses.field(default=True, metadata={"static": True})


class Losses(NamedTuple):
    """Holds the losses and statistics of one batch.

    Scalars are means over the batch's tokens. `SAE.training_loss` gives them in the SAE's own
    units, those of the activations times `scale`; `SAE.loss` gives them in the model's units.

    Attributes:
      total: the loss that is differentiated.
      mse: ||y - y_hat||^2, summed over d_out.
      l0: the number of latents above zero.
      l1: the sum over latents of activation times decoder norm.
      fired: (d_sae,) bool, the latents that fired on any token.
      running: this batch's values of the parameters named in `SAE.RUNNING_MEANS`, by name.
      log_coefficient: how much the trainer adds to the logarithm of the sparsity coefficient.
    """

    total: jax.Array
    mse: jax.Array
    l0: jax.Array
    l1: jax.Array
    fired: jax.Array
    running: dict[str, jax.Array] = {}
    log_coefficient: jax.Array | float = 0.0


def squared_error(y: jax.Array, y_hat: jax.Array) -> jax.Array:
    """Returns the mean over rows of ||y - y_hat||^2, for y and y_hat (..., width)."""
    return jnp.mean(jnp.sum(jnp.square(y - y_hat), axis=-1))


def dictionary_means(sums: dict, weights: dict, tokens: int) -> dict[str, jax.Array]:
    """Returns the sums over the dictionary of each latent's mean, by name.

    Decoder norms are weights of L1 norms here, and not in the blocks of `ops.dense_autoencode`,
    whose backward pass would add up all latents again for the norms' gradient.

    Args:
      sums: sums (d_sae,) over tokens, by name.
      weights: of the latents (d_sae,), for those sums that have any, by name.
      tokens: how many tokens were summed.
    """
    return {name: jnp.sum(a * weights.get(name, 1.0)) / tokens for name, a in sums.items()}


def auxiliary_activation(preactivations: jax.Array) -> jax.Array:
    """Returns the latents of the AuxK loss: a leaky ReLU of slope 0.1 of pre-activations.

    The code of Gao et al. has a ReLU here too: without one, dead latents fit the error together, as
    a dense linear code, and few come back as features. The slope below 0 is not 0, so that dead
    latents whose pre-activations are all negative learn too.
    """
    return jax.nn.leaky_relu(preactivations, _AUXILIARY_SLOPE)


def auxiliary_code(code: ops.Code) -> ops.Code:
    """Returns the code of the AuxK loss from one of pre-activations."""
    return code._replace(values=auxiliary_activation(code.values))
