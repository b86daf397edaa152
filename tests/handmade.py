"""Makes an activity of known values, for tests of what explains latents."""

import dataclasses

import numpy as np

from sae_jax import paths
from sae_jax.interpret.activity import VERSION, About, Activity


def activity(path, tokens: np.ndarray, dense: list[np.ndarray], used=None) -> Activity:
    """Writes an activity of latents whose activation on each token (n, T) is given."""
    path.mkdir(parents=True)
    used = np.ones(tokens.shape, bool) if used is None else used
    flat = [np.where(used, values, 0).reshape(-1).astype(np.float32) for values in dense]
    rows = [np.flatnonzero(values > 0).astype(np.int32) for values in flat]
    arrays = {
        "starts": np.append(0, np.cumsum([len(r) for r in rows])).astype(np.int64),
        "rows": np.concatenate(rows),
        "values": np.concatenate([values[r] for values, r in zip(flat, rows, strict=True)]),
        "tokens": tokens.astype(np.int32),
        "used": used,
        "numbers": np.arange(len(tokens), dtype=np.int64),
    }
    for name, array in arrays.items():
        np.save(path / f"{name}.npy", array)
    about = About(VERSION, {"site": "made"}, len(dense), int(used.sum()))
    paths.save_json(dataclasses.asdict(about), path / "activity.json")
    return Activity(path)
