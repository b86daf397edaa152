"""What a pass over text costs: FLOPs, disk and memory, said before it and measured after it."""

import dataclasses
import pathlib
import shutil

import numpy as np

from sae_jax.errors import UserError
from sae_jax.evaluate.sources import HeldOutRows, ModelRows
from sae_jax.interpret.coactive import SKETCH
from sae_jax.interpret.collection import BINS, COACTIVE, VERSION, About
from sae_jax.interpret.passes import BLOCK_EVENTS, BLOCK_LATENTS, Text, chosen_text
from sae_jax.sae import SAE


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a pass is to cost, in words by `str`.

    Attributes:
      flops: of encoding.
      events: bytes of events a row on disk, while it lasts; None where it is not known before.
      rows: how many rows are encoded.
      disk: bytes of the collection.
      memory: bytes of the host's memory at most, beside the SAE and the process itself. Pages of
        mapped files, which the system takes back when it needs them, are not counted.
    """

    flops: int
    events: int | None
    rows: int
    disk: int
    memory: int

    def __str__(self) -> str:
        events = "12 bytes a firing latent"
        if self.events is not None:
            events = f"about {self.events * self.rows / 1e9:.2f} GB"
        return (
            f"{self.flops / 1e12:.3g} TFLOP of encoding, {events} of events on disk until it is "
            f"done, {self.disk / 1e9:.2f} GB of disk (twice that while it is made), "
            f"{self.memory / 1e9:.2f} GB of memory beside the SAE"
        )

    def measured(self, seconds: float, encoding: float, counts: np.ndarray, out) -> str:
        """Returns in one line what was stated and what it was."""
        disk = sum(file.stat().st_size for file in pathlib.Path(out).iterdir())
        events = "" if self.events is None else f" (stated {self.events * self.rows / 1e9:.2f})"
        return (
            f"{seconds:.0f} s, of which encoding {encoding:.0f} s "
            f"({self.flops / 1e9 / max(encoding, 1e-9):.0f} GFLOP/s); "
            f"events {12 * counts.sum() / 1e9:.2f} GB{events}; "
            f"disk {disk / 1e9:.2f} GB (stated {self.disk / 1e9:.2f})"
        )


def describe_cost(
    sae: SAE,
    source: HeldOutRows | ModelRows,
    *,
    tokens: int = 1_000_000,
    top: int = 20,
    intervals: int = 12,
    per_interval: int = 5,
    before: int = 28,
    after: int = 14,
) -> Cost:
    """Returns what `collect` with these arguments is to cost.

    Raises UserError if the source has no tokens.
    """
    text = chosen_text(source, tokens)
    about = About(VERSION, {}, sae.config.d_sae, 0, top, intervals, per_interval, before, after)
    return cost_of(sae, text, about)


def cost_of(sae: SAE, text: Text, about: About) -> Cost:
    """Returns what collecting with these settings is to cost."""
    config, rows = sae.config, text.tokens.size
    slots = about.top + about.intervals * about.per_interval
    of_slots = slots * (12 + 2 * (about.before + 1 + about.after))
    of_latent = 12 + 4 * BINS + of_slots + 8 * COACTIVE
    k = config.k
    fired = min(BLOCK_EVENTS, rows * (k or 64))
    memory = 13 * rows + max(
        160 * fired + 2 * min(BLOCK_LATENTS, about.d_sae) * of_latent,
        48 * SKETCH * min(about.d_sae, rows * (k or 64)),
    )
    return Cost(
        flops=2 * config.d_in * config.d_sae * rows,
        events=None if k is None else 12 * k,
        rows=rows,
        disk=about.d_sae * of_latent + text.tokens.nbytes + text.numbers.nbytes,
        memory=memory,
    )


def check_room(cost: Cost, folder: pathlib.Path, out: pathlib.Path) -> None:
    """Raises UserError if the disk has no room for the collection while it is made."""
    free = shutil.disk_usage(folder).free
    if 2 * cost.disk > free:
        raise UserError(
            f"{out} needs {2 * cost.disk / 1e9:.1f} GB of disk while it is made, and there are "
            f"{free / 1e9:.1f} GB; keep fewer examples, or choose another --out"
        )
