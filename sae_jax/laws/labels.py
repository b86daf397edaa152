"""Names and units of the columns of results, for axes and tables."""

from sae_jax.plots import plain

_LABELS = {  # of a column: (what it is called, its unit)
    "architecture": ("architecture", ""),
    "d_sae": ("dictionary size", "latents"),
    "tokens": ("training tokens", ""),
    "k": ("k", "latents per token"),
    "lr": ("learning rate", ""),
    "learning_rate": ("learning rate", ""),
    "sparsity_coefficient": ("sparsity coefficient", ""),
    "target_l0": ("target L0", "latents per token"),
    "flops": ("training compute", "FLOPs"),
    "flops_executed": ("compute executed", "FLOPs"),
    "eval_loss": ("held-out loss", ""),
    "fvu": ("FVU", "fraction of variance unexplained"),
    "l0": ("L0", "latents per token"),
    "mse": ("mean squared error, summed over d", "model's units squared"),
    "explained_variance": ("explained variance", "fraction"),
    "dead_fraction": ("dead latents", "fraction"),
    "ce_spliced": ("cross-entropy, SAE spliced in", "nats"),
    "ce_recovered_zero": ("CE recovered", "1: model untouched, 0: zero ablation"),
    "ce_recovered_mean": ("CE recovered", "1: model untouched, 0: mean ablation"),
    "kl_spliced": ("KL(model || SAE spliced in)", "nats"),
}
_HELD_OUT = "eval_"  # columns of result.json that are measured on held-out rows


def short(column: str) -> str:
    """Returns what a column of results is called: L0 for eval_l0. Other names are as they are."""
    return _label(column)[0]


def axis(column: str) -> str:
    """Returns the label of an axis of a column's values, with their unit where it is known."""
    name, unit = _label(column)
    return plain(f"{name} ({unit})" if unit else name)


def compute(is_known: bool) -> str:
    """Returns the label of an axis of compute, in FLOPs where what a token costs is known."""
    return axis("flops") if is_known else "compute (latents × tokens)"


def _label(column: str) -> tuple[str, str]:
    own = _LABELS.get(column.rpartition(".")[2], (column, ""))  # sae.target_l0
    measured = _LABELS.get(column.removeprefix(_HELD_OUT), own)
    return _LABELS.get(column, measured)
