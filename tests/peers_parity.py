"""Training side by side with a peer package: its own trainer on one side, ours on the other, from
the same parameters and on the same batches.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import sae as saes
from sae_jax.config import Config, DataConfig, OptimizerConfig
from sae_jax.sae import SAEConfig
from sae_jax.train.mesh import BatchPlacement
from sae_jax.train.step import Trainer


@dataclasses.dataclass(frozen=True)
class Setting:
    """What both sides are told. The learning rate is constant, then linear to 0 over the last
    `decay` steps; the sparsity coefficient rises from 0 over the first `warmup`.

    eps is Adam's. With the usual 1e-8 a latent that fires for the first time moves by a whole
    step, however small its gradient: where rounding makes one side pick another latent on one
    token, their trajectories part by some 1e-3."""

    d_in: int = 32
    d_sae: int = 256
    batch: int = 512
    k: int = 8
    steps: int = 200
    decay: int = 40
    warmup: int = 20
    learning_rate: float = 1e-3
    eps: float = 1e-4
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Peer:
    """`parameters`: the initial ones by our names and in our orientation. `step` trains on a batch
    (B, d_in) and returns the loss before the update."""

    parameters: dict[str, np.ndarray]
    step: Callable[[np.ndarray], float]


# ---------------------------------------------------------------------- ours


def our_metrics(
    sae: SAEConfig, adam: OptimizerConfig, setting: Setting, parameters, batches
) -> Iterator[dict[str, float]]:
    """The metrics of each step of our Trainer from `parameters`."""
    config = Config(
        sae=saes.resolve(sae, setting.d_in),
        data=DataConfig(batch_size=setting.batch),
        optimizer=dataclasses.replace(
            adam,
            learning_rate=setting.learning_rate,
            eps=setting.eps,
            schedule="linear_tail",
            warmup_fraction=0.0,
            decay_fraction=setting.decay / setting.steps,
        ),
    )
    trainer = Trainer(config, setting.steps, variance=1.0)
    mesh = jax.make_mesh((1, 1, 1), ("run", "data", "model"), devices=jax.devices()[:1])
    placement = BatchPlacement(mesh, setting.batch)
    with jax.set_mesh(mesh):
        state = trainer.init(jnp.zeros(setting.d_in), 1.0)
        untrained = saes.architecture(config.sae).RUNNING_MEANS
        assert parameters.keys() == state.parameters.keys() - set(untrained)
        placed = {n: jax.device_put(v, state.parameters[n].sharding) for n, v in parameters.items()}
        state = dataclasses.replace(state, parameters=state.parameters | placed)
        for batch in batches:
            state, metrics = trainer.step(state, placement.place(batch))
            yield {name: float(value) for name, value in metrics.items()}


# -------------------------------------------------------------------- theirs

_OUR_NAMES = {
    "w_enc": ("W_enc", "encoder.weight"),
    "w_dec": ("W_dec", "decoder.weight"),
    "b_enc": ("b_enc", "encoder.bias", "gate_bias"),
    "b_dec": ("b_dec", "bias", "decoder.bias", "decoder_bias"),
    "b_mag": ("mag_bias",),
    "r_mag": ("r_mag",),
    "threshold": ("threshold",),
}
_OURS_OF = {theirs: ours for ours, all_theirs in _OUR_NAMES.items() for theirs in all_theirs}


def dictionary_learning(trainer_class, setting: Setting, **options) -> Peer:
    """Its trainer, with `options` of its own."""
    import torch

    torch.manual_seed(setting.seed)
    trainer = trainer_class(
        steps=setting.steps,
        activation_dim=setting.d_in,
        dict_size=setting.d_sae,
        layer=0,
        lm_name="",
        lr=setting.learning_rate,
        warmup_steps=0,
        decay_start=setting.steps - setting.decay,
        device="cpu",
        **options,
    )
    trainer.optimizer.param_groups[0]["eps"] = setting.eps
    losses, loss = [], trainer.loss

    def recorded(*args, **kwargs):
        losses.append(loss(*args, **kwargs))
        return losses[-1]

    trainer.loss = recorded

    def step(x):
        # Not from 0: there it would set b_dec. Its sparsity warm-up is then ours, 1/n at first.
        trainer.update(len(losses) + 1, torch.from_numpy(x))
        return losses[-1].item()

    return Peer(_parameters(trainer.ae), step)


def sae_lens(sae, setting: Setting, *, unit_norm: bool = False, all_dead: bool = False) -> Peer:
    """Its SAETrainer on `sae`. unit_norm: decoder rows are kept at norm 1, as the papers of TopK
    and JumpReLU have it. all_dead: it takes every latent for dead."""
    import torch
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    class AllDead(SAETrainer):
        dead_neurons = property(lambda self: torch.ones(setting.d_sae, dtype=torch.bool))

    config = SAETrainerConfig(
        total_training_samples=setting.steps * setting.batch,
        train_batch_size_samples=setting.batch,
        lr=setting.learning_rate,
        lr_decay_steps=setting.decay,
        lr_end=setting.learning_rate / 10,
    )
    trainer = (AllDead if all_dead else SAETrainer)(config, sae, data_provider=iter(()))
    trainer.optimizer.param_groups[0]["eps"] = setting.eps
    if unit_norm:
        w_dec = sae.W_dec.detach()
        w_dec /= w_dec.norm(dim=1, keepdim=True)
        sae.W_dec.register_hook(lambda g: g - (g * w_dec).sum(dim=1, keepdim=True) * w_dec)
        trainer.optimizer.register_step_post_hook(
            lambda *_: w_dec.div_(w_dec.norm(dim=1, keepdim=True))
        )
    for scheduler in trainer.coefficient_schedulers.values():
        scheduler.step()  # its warm-up begins at 0, ours at 1/n

    def step(x):
        out = trainer.step(torch.from_numpy(x))
        trainer.n_training_steps += 1
        return out.loss.item()

    return Peer(_parameters(sae), step)


def sparsify(setting: Setting, *, fvu: bool) -> Peer:
    """Its SparseCoder through the steps of its Trainer, which itself needs a language model. fvu:
    the loss divided by the batch's variance, as that trainer has it."""
    import torch

    os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # its kernels need a GPU
    from sparsify import SparseCoder, SparseCoderConfig

    torch.manual_seed(setting.seed)
    config = SparseCoderConfig(num_latents=setting.d_sae, k=setting.k)
    sae = SparseCoder(setting.d_in, config, dtype=torch.float32)
    adam = torch.optim.Adam(sae.parameters(), lr=setting.learning_rate, eps=setting.eps)
    tail = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda step: min(1.0, (setting.steps - step) / setting.decay)
    )

    def step(x):
        sae.set_decoder_norm_to_unit_norm()
        total_variance = None if fvu else torch.tensor(float(len(x)))
        loss = sae(torch.from_numpy(x), total_variance=total_variance).fvu
        loss.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()
        tail.step()
        return loss.item()

    return Peer(_parameters(sae), step)


def _parameters(module) -> dict[str, np.ndarray]:
    """A copy of a torch module's parameters; of its linear layers, the transposes."""
    found = {name: p.detach().numpy().copy() for name, p in module.named_parameters()}
    return {_OURS_OF[n]: v.T if n.endswith(".weight") else v for n, v in found.items()}
