"""One training step of each peer package, as its own trainer takes it: forward and backward
pass, gradient clipping, Adam, its bookkeeping; float32, on torch's device.

A peer that is not installed, or has no such architecture, is left out.
"""

import contextlib
import importlib.metadata
import os
from collections.abc import Callable

from sae_jax.bench.step import Contestant


def find(architecture: str, batch: int, d_in: int, d_sae: int, k: int) -> dict[str, Contestant]:
    """The installed peers by "package version"; {} where none is installed."""
    makers = {"sae-lens": _sae_lens, "dictionary-learning": _dictionary_learning}
    if architecture == "topk":
        makers["eai-sparsify"] = _sparsify
    contestants = {}
    for package, make in makers.items():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(package)
            step = make(architecture, batch, d_in, d_sae, k)
            contestants[f"{package} {version}"] = _contestant(step)
    return contestants


def _contestant(step: Callable) -> Contestant:
    import torch

    def step_to_its_end(x):
        step(x)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return Contestant(lambda batch: torch.from_numpy(batch).to(_device()), step_to_its_end)


def _sae_lens(architecture, batch, d_in, d_sae, k) -> Callable:
    import sae_lens
    import torch
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(0)
    device = _device()
    sizes = {"d_in": d_in, "d_sae": d_sae, "device": device, "dtype": "float32"}
    if architecture == "topk":
        sae = sae_lens.TopKTrainingSAE(sae_lens.TopKTrainingSAEConfig(**sizes, k=k))
    elif architecture == "batchtopk":
        sae = sae_lens.BatchTopKTrainingSAE(sae_lens.BatchTopKTrainingSAEConfig(**sizes, k=k))
    elif architecture == "jumprelu":
        sae = sae_lens.JumpReLUTrainingSAE(sae_lens.JumpReLUTrainingSAEConfig(**sizes))
    else:
        sae = sae_lens.StandardTrainingSAE(
            sae_lens.StandardTrainingSAEConfig(**sizes, l1_coefficient=5.0)
        )
    config = SAETrainerConfig(
        total_training_samples=batch * 10**6,
        train_batch_size_samples=batch,
        lr_end=3e-5,
        device=device,
    )
    trainer = SAETrainer(config, sae, data_provider=iter(()))

    def step(x):
        trainer.step(x)
        trainer.n_training_steps += 1

    return step


def _dictionary_learning(architecture, batch, d_in, d_sae, k) -> Callable:
    from dictionary_learning import trainers

    common = dict(
        steps=10**6, activation_dim=d_in, dict_size=d_sae, layer=0, lm_name="", device=_device()
    )
    if architecture == "topk":
        trainer = trainers.TopKTrainer(k=k, **common)
    elif architecture == "batchtopk":
        trainer = trainers.BatchTopKTrainer(k=k, **common)
    elif architecture == "jumprelu":
        trainer = trainers.JumpReluTrainer(**common)
    else:
        # Its default dictionary class has unit-norm decoders; the April recipe does not.
        from dictionary_learning.dictionary import AutoEncoder
        from dictionary_learning.trainers.standard import StandardTrainerAprilUpdate

        trainer = StandardTrainerAprilUpdate(dict_class=AutoEncoder, **common)
    done = 0

    def step(x):
        nonlocal done
        done += 1  # not from 0: the first step would also initialise b_dec
        trainer.update(done, x)

    return step


def _sparsify(architecture, batch, d_in, d_sae, k) -> Callable:
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # its kernels need a GPU
    from sparsify import SparseCoder, SparseCoderConfig

    torch.manual_seed(0)
    config = SparseCoderConfig(num_latents=d_sae, k=k)
    sae = SparseCoder(d_in, config, device=_device(), dtype=torch.float32)
    adam = torch.optim.Adam(sae.parameters(), lr=1e-4)
    since_fired = torch.zeros(d_sae, dtype=torch.long, device=_device())

    def step(x):
        sae.set_decoder_norm_to_unit_norm()
        out = sae(x, dead_mask=since_fired > 10_000_000)
        (out.fvu + out.auxk_loss / 32).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
        since_fired.add_(len(x))
        since_fired[out.latent_indices.flatten()] = 0

    return step


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
