"""The peers' own trainers on given rows: what each finds, as a decoder and latents.

Their recipes are their defaults, but for what a short run must scale and what both sides share:
sizes, learning rate, sparsity, the schedule (warm-up over the first 5% of steps, linear to 0 over
the last 20%) and the window after which a latent counts as dead.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Iterator

import numpy as np

from sae_jax import sae as saes

_BOTH = {"relu", "gated", "topk", "batchtopk", "matryoshka", "jumprelu"}
# The architectures that each package trains.
OFFERED = {"sae-lens": _BOTH, "dictionary-learning": _BOTH | {"relu_l1_unit"}}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """sparsity: k, the target L0 or the coefficient, as `worlds` says for the architecture.
    Coefficients are meant for rows with E||x||^2 = d."""

    architecture: str
    d_in: int
    d_sae: int
    batch: int
    steps: int
    learning_rate: float
    sparsity: float
    dead_steps: int
    seed: int

    @property
    def warmup(self) -> int:
        return self.steps // 20

    @property
    def decay(self) -> int:
        return self.steps // 5


@dataclasses.dataclass(frozen=True)
class Found:
    """decoder (d_sae, d_in); encode: rows (B, d_in) to latents (B, d_sae)."""

    decoder: np.ndarray
    encode: Callable[[np.ndarray], np.ndarray]


def train_peer(package: str, recipe: Recipe, rows: Iterator[np.ndarray], scale: float) -> Found:
    """scale: what makes E||x||^2 = d. `recipe.architecture` is one that OFFERED has of the
    package."""
    import torch

    torch.set_num_threads(1)  # more are slower at this size
    torch.manual_seed(recipe.seed)
    train = {"sae-lens": _sae_lens, "dictionary-learning": _dictionary_learning}[package]
    return train(recipe, rows, scale)


# ------------------------------------------------------------------- sae-lens


def _sae_lens(recipe: Recipe, rows, scale: float) -> Found:
    import sae_lens
    import torch
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    name, options = _sae_lens_options(recipe)
    config_class = getattr(sae_lens, f"{name}TrainingSAEConfig")
    sizes = {"d_in": recipe.d_in, "d_sae": recipe.d_sae, "device": "cpu"}
    sae = getattr(sae_lens, f"{name}TrainingSAE")(config_class(**sizes, **options))
    config = SAETrainerConfig(
        total_training_samples=recipe.steps * recipe.batch,
        train_batch_size_samples=recipe.batch,
        lr=recipe.learning_rate,
        lr_warm_up_steps=recipe.warmup,
        lr_decay_steps=recipe.decay,
        lr_end=recipe.learning_rate / 10,
        dead_feature_window=recipe.dead_steps,
    )
    trainer = SAETrainer(config, sae, data_provider=iter(()))
    for batch in rows:
        trainer.step(torch.from_numpy(batch * scale))
        trainer.n_training_steps += 1
    with tempfile.TemporaryDirectory() as path:
        sae.save_inference_model(path)
        usable = sae_lens.SAE.load_from_disk(path)
    return _found(usable.W_dec, usable.encode, scale)


def _sae_lens_options(recipe: Recipe) -> tuple[str, dict]:
    l1 = {"l1_coefficient": recipe.sparsity, "l1_warm_up_steps": recipe.warmup}
    k = {"k": recipe.sparsity}
    target = {"target_l0": recipe.sparsity, "l0_warm_up_steps": recipe.warmup}
    return {
        "relu": ("Standard", l1),
        "gated": ("Gated", l1),
        "topk": ("TopK", {"k": int(recipe.sparsity)}),
        "batchtopk": ("BatchTopK", k),
        "matryoshka": (
            "MatryoshkaBatchTopK",
            k | {"matryoshka_widths": list(_prefix_widths(recipe))},
        ),
        "jumprelu": ("JumpReLU", target | {"jumprelu_sparsity_loss_mode": "quadratic"}),
    }[recipe.architecture]


# -------------------------------------------------------- dictionary-learning


def _dictionary_learning(recipe: Recipe, rows, scale: float) -> Found:
    import torch
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.gdm import GatedSAETrainer
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
    from dictionary_learning.trainers.standard import StandardTrainer, StandardTrainerAprilUpdate
    from dictionary_learning.trainers.top_k import TopKTrainer

    # Its coefficients are for rows with E||x||^2 = 1, which `normalize_activations` makes of them.
    scale = scale / recipe.d_in**0.5
    l1 = {"l1_penalty": recipe.sparsity / recipe.d_in**0.5, "sparsity_warmup_steps": recipe.warmup}
    k = {"k": int(recipe.sparsity)}
    widths = np.diff([0, *_prefix_widths(recipe)]) / recipe.d_sae
    trainer_class, options = {
        "relu": (StandardTrainerAprilUpdate, l1),
        "relu_l1_unit": (StandardTrainer, l1),
        "gated": (GatedSAETrainer, l1),
        "topk": (TopKTrainer, k),
        "batchtopk": (BatchTopKTrainer, k),
        "matryoshka": (MatryoshkaBatchTopKTrainer, k | {"group_fractions": widths.tolist()}),
        "jumprelu": (
            JumpReluTrainer,
            {"target_l0": recipe.sparsity, "sparsity_warmup_steps": recipe.warmup},
        ),
    }[recipe.architecture]
    trainer = trainer_class(
        steps=recipe.steps,
        activation_dim=recipe.d_in,
        dict_size=recipe.d_sae,
        layer=0,
        lm_name="",
        lr=recipe.learning_rate,
        warmup_steps=recipe.warmup,
        decay_start=recipe.steps - recipe.decay,
        seed=recipe.seed,
        device="cpu",
        **options,
    )
    trainer.dead_feature_threshold = recipe.dead_steps * recipe.batch
    trainer.threshold_start_step = min(1000, recipe.steps // 2)
    for step, batch in enumerate(rows):
        trainer.update(step, torch.from_numpy(batch * scale))
    decoder = trainer.ae.W_dec if hasattr(trainer.ae, "W_dec") else trainer.ae.decoder.weight.T
    return _found(decoder, trainer.ae.encode, scale)


def _prefix_widths(recipe: Recipe) -> tuple[int, ...]:
    """Our default, for all."""
    config = saes.MatryoshkaConfig(d_sae=recipe.d_sae, k=1)
    return saes.resolve(config, recipe.d_in).prefix_widths


def _found(decoder, encode, scale: float) -> Found:
    """In the units of the rows, from torch."""
    import torch

    def encode_rows(rows: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return encode(torch.from_numpy(rows * scale)).numpy()

    return Found(decoder.detach().numpy() / scale, encode_rows)
